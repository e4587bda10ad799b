"""
An index of training documents at size: builds that are killed, memory of a build, and queries beside brute force.

    python benchmarks/tracing.py [kills] [changes] [memory] [queries] [--json]

Documents of one chunk are streamed from a JSONL file. Reading, cutting, keys and the engine are the real ones. In place of
what a model makes of a chunk stand random vectors of steerling-nano's sizes (256 numbers around one of 500 centres, and 120
of 572 concepts): what is measured is the index, and a model would need hours for 200,000 documents on two cores.

kills     a build, 64 documents at once, is killed by SIGKILL at random times of its duration and started again after each,
          until it ends; then another one is, until there were 20 kills. `missing` and `doubled` count documents, `changed`
          those whose vectors are not what they should be, and `chunks_at_kills` how many were written at each kill. The
          index is made of parts of 256 chunks, so that kills meet the change from one to the next as well
changes   a build of a few chunks in three parts is killed before every single change that it makes to the files of its index
          (folders, renames, removals, files that Python opens for writing), and each is built on and judged as above
memory    peak memory of the building process above what it was before the build (`mb`): on a file, where the engine is
          part of that process; and with the engine's own server in another process, whose peak is `server_mb`, since that
          engine keeps all that it has in memory. It is looked at 50 times a second, and pages of files do not count: the
          system drops those of a program that it does not run, so that growth would hide behind them (Linux only)
queries   on an index file of the largest number of documents, for dense and sparse searches: median milliseconds of one
          query of ten hits, queries a second when several are asked together, the same by brute force in NumPy over the
          same vectors held in memory, and the share of NumPy's ten best that the index finds
"""

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import seconds
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import steerling_hf
from steerling_hf import trace_index, trace_store
from steerling_hf.embeddings import ConceptVectors
from steerling_hf.trace_store import TraceStore
from steerling_hf.trace_vectors import TraceVectors

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "nano"))
from loopback import loopback_server

DIMENSION, CONCEPTS, KEPT = 256, 572, 120
CENTRES = np.random.default_rng(0).standard_normal((500, DIMENSION))
KILLED_AT_ONCE, KILLED_PART = 64, 256
CHANGES_DOCUMENTS, CHANGES_AT_ONCE, CHANGES_PART = 10, 2, 4
CHANGING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
HITS = 10
LOOKS_A_SECOND = 50
# Queries one after another, and together. A sparse search of the embedded engine takes seconds.
ALONE = {"dense": 50, "sparse": 5}
TOGETHER = {"dense": 100, "sparse": 10}


def stand_in(model: Any, tokenizer: Any, texts: list[str], *_: Any, **__: Any) -> TraceVectors:
    """Random vectors in place of a model's, always the same of a text."""
    dense = np.empty((len(texts), DIMENSION), np.float32)
    ids = np.empty((len(texts), KEPT), np.int64)
    weights = np.empty((len(texts), KEPT), np.float32)
    for i, text in enumerate(texts):
        rng = np.random.default_rng(zlib.crc32(text.encode()))
        dense[i] = CENTRES[rng.integers(len(CENTRES))] + rng.standard_normal(DIMENSION)
        ids[i] = rng.permutation(CONCEPTS)[:KEPT]
        weights[i] = rng.random(KEPT) ** 4
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    concepts = ConceptVectors(torch.from_numpy(ids), torch.from_numpy(weights), CONCEPTS)
    return TraceVectors(torch.from_numpy(dense), concepts)


def text_of(i: int) -> str:
    return f"Document {i} tells of the garden, the sea and {i * 7919 % 100_003} other things in plain words."


def corpus(folder: str, count: int) -> Path:
    file = Path(folder) / f"{count}.jsonl"
    if not file.exists():
        with file.open("w") as lines:
            for i in range(count):
                lines.write(json.dumps({"text": text_of(i), "source": f"file {i % 1000}", "year": i % 30}) + "\n")
    return file


def nano() -> tuple[Any, Any]:
    folder = steerling_hf.checkpoint("steerling-nano")
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def memory_of(process: int | str = "self") -> float:
    """MB of a process that no file holds."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon:"))


@contextmanager
def peak_memory(process: int | str = "self") -> Iterator[list[float]]:
    """Yields a list of one number, the most that a process had of `memory_of` until the end of the block."""
    peak, ended = [memory_of(process)], threading.Event()

    def watch() -> None:
        while not ended.wait(1 / LOOKS_A_SECOND):
            peak[0] = max(peak[0], memory_of(process))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield peak
    finally:
        ended.set()
        watching.join()


def build_here(uri: str, file: str) -> dict[str, float]:
    """Build in this process."""
    model, tokenizer = nano()
    trace_index.trace_vectors = stand_in
    before, started = memory_of(), time.perf_counter()
    with peak_memory() as peak, trace_index.TraceIndex(uri) as index:
        report = index.build(model, tokenizer, file, progress=False)
    took = time.perf_counter() - started
    return {"documents": report.documents, "mb": peak[0] - before, "seconds": took}


def build_apart(uri: str, file: Path) -> dict[str, float]:
    """Build in a process of its own."""
    command = [sys.executable, __file__, "--here", uri, str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_memory(folder: str, counts: list[int]) -> list[dict[str, Any]]:
    rows = []
    for count in tqdm(counts, desc="memory"):
        rows.append({"index": "file", **build_apart(f"{folder}/file-{count}.db", corpus(folder, count))})
        with loopback_server(Path(folder) / f"served-{count}.db") as (uri, process):
            with peak_memory(process) as peak:
                built = build_apart(uri, corpus(folder, count))
            rows.append({"index": "server", **built, "server_mb": peak[0]})
    return rows


def one_of(vectors: TraceVectors, first: int, count: int = 1) -> TraceVectors:
    some, concepts = slice(first, first + count), vectors.concepts
    return TraceVectors(vectors.dense[some], ConceptVectors(concepts.ids[some], concepts.weights[some], concepts.size))


def best_scores(stored: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Brute force: the ten highest of (N, D) times (Q, D), unordered, as (Q, 10)."""
    scores = queries @ stored.T
    best = np.argpartition(-scores, HITS, axis=1)[:, :HITS]
    return np.take_along_axis(scores, best, axis=1)


def measure_queries(folder: str, count: int) -> dict[str, Any]:
    path = f"{folder}/file-{count}.db"
    documents = corpus(folder, count)
    build_apart(path, documents)  # what is there already is kept
    model, tokenizer = nano()
    stored = {"dense": np.zeros((count, DIMENSION), np.float32), "sparse": np.zeros((count, CONCEPTS), np.float32)}
    texts = [json.loads(line)["text"] for line in documents.read_text(encoding="utf-8").splitlines()]
    for start in tqdm(range(0, count, 1000), desc="vectors"):
        some = stand_in(None, None, texts[start : start + 1000])
        stored["dense"][start : start + 1000] = some.dense.numpy()
        stored["sparse"][start : start + 1000] = some.concepts.to_dense().numpy()
    result: dict[str, Any] = {}
    with trace_index.TraceIndex(path) as index:
        result["chunks"] = len(index)
        queries = stand_in(None, None, [f"query {i}" for i in range(max(TOGETHER.values()))])
        plain = {"dense": queries.dense.numpy(), "sparse": queries.concepts.to_dense().numpy()}
        for kind, together in TOGETHER.items():
            ask = partial(index.trace, model, tokenizer, k=HITS, kind=kind)
            ask(one_of(queries, 0))  # makes what is made at the first query
            repeats = tqdm(range(ALONE[kind]), desc=kind)
            alone = [seconds(partial(ask, one_of(queries, i))) for i in repeats]
            batch = seconds(partial(ask, one_of(queries, 0, together)))
            force = partial(best_scores, stored[kind])
            force(plain[kind][:1])
            numpy_alone = [seconds(partial(force, plain[kind][[i]])) for i in range(ALONE[kind])]
            numpy_batch = seconds(partial(force, plain[kind][:together]))
            traces = ask(one_of(queries, 0, together))
            found = np.array([[getattr(hit, f"{kind}_score") for hit in trace.hits] for trace in traces])
            found = 2 * found - 1 if kind == "dense" else found
            tenth = force(plain[kind][:together]).min(axis=1, keepdims=True)
            result[kind] = {
                "ms": 1000 * statistics.median(alone),
                "together": together,
                "a_second_together": together / batch,
                "numpy_ms": 1000 * statistics.median(numpy_alone),
                "numpy_a_second_together": together / numpy_batch,
                "recall": float((found >= tenth - 1e-5).mean()),
            }
    return result


class KilledBuilds:
    """
    Builds of one corpus, in forked processes: so they start at once and not with seconds of imports. In this process runs no
    engine.

    Args:
        folder: Where the corpus is, or is made.
        count: Its documents.
        at_once: How many are written at once.
        part: How many make a part of an index.
    """

    def __init__(self, folder: str, count: int, at_once: int, part: int):
        for library in ("milvus_lite.db", "pymilvus"):
            importlib.import_module(library)  # once, and not in each of the processes
        torch.set_num_threads(1)
        self.fork = multiprocessing.get_context("fork")
        self.model, self.tokenizer = nano()
        self.file = corpus(folder, count)
        self.texts = {text_of(i) for i in range(count)}
        trace_index.trace_vectors = stand_in
        trace_index.WRITTEN_AT_ONCE, trace_store.CHUNKS_OF_A_PART = at_once, part

    def build(self, path: str, seconds: float | None = None, before: Callable[[], None] = lambda: None) -> bool:
        """Whether the build came to its end before it was killed; `before` is called in its process."""

        def quietly() -> None:
            before()
            with trace_index.TraceIndex(path) as index:
                index.build(self.model, self.tokenizer, self.file, progress=False)

        child = self.fork.Process(target=quietly)
        child.start()
        child.join(seconds)
        child.kill()
        child.join()
        if child.exitcode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"a build ended with exit code {child.exitcode}")
        return child.exitcode == 0

    def judge(self, path: str) -> dict[str, int]:
        """How many documents are missing, are there twice, and have other vectors than they should."""

        def look(sender: Any) -> None:
            texts, changed = [], 0
            with trace_index.TraceIndex(path) as index:
                for page in index.rows():
                    texts += [row["text"] for row in page]
                    wanted = stand_in(None, None, texts[-len(page) :])
                    stored = torch.tensor([row["dense"] for row in page])
                    changed += int(((stored - wanted.dense).abs().amax(dim=1) > 1e-6).sum())
            missing, doubled = len(self.texts - set(texts)), len(texts) - len(set(texts))
            sender.send({"missing": missing, "doubled": doubled, "changed": changed})

        receiver, sender = self.fork.Pipe(duplex=False)
        child = self.fork.Process(target=look, args=(sender,))
        child.start()
        found = receiver.recv()
        child.join()
        return found


def measure_kills(folder: str, kills: int, count: int) -> dict[str, Any]:
    builds = KilledBuilds(folder, count, KILLED_AT_ONCE, KILLED_PART)
    rng, written, write = random.Random(0), builds.fork.Value("i", 0), TraceStore.write

    def count_and_write(store: TraceStore, rows: list[dict[str, Any]]) -> None:
        write(store, rows)
        written.value += len(rows)

    TraceStore.write = count_and_write
    started = time.perf_counter()
    builds.build(f"{folder}/whole.db")
    whole = time.perf_counter() - started
    found, indexes, at_kills = Counter(), 0, []
    with tqdm(total=kills, desc="kills") as bar:
        while len(at_kills) < kills:
            path, written.value = f"{folder}/killed-{indexes}.db", 0
            while not builds.build(path, rng.uniform(0, whole) if len(at_kills) < kills else None):
                at_kills.append(written.value)
                bar.update()
            found.update(builds.judge(path))
            indexes += 1
    TraceStore.write = write
    return {"documents": count, "kills": kills, "indexes": indexes, **found, "chunks_at_kills": at_kills}


def measure_changes(folder: str) -> dict[str, Any]:
    builds = KilledBuilds(folder, CHANGES_DOCUMENTS, CHANGES_AT_ONCE, CHANGES_PART)
    found, kills = Counter(), 0
    with tqdm(desc="changes") as bar:
        while True:
            path = f"{folder}/change-{kills + 1}.db"
            if builds.build(path, before=partial(die_before_change, path, kills + 1)):
                break
            builds.build(path)
            found.update(builds.judge(path))
            kills += 1
            bar.update()
    return {"documents": CHANGES_DOCUMENTS, "kills": kills, **found}


def die_before_change(path: str, number: int) -> None:
    """Kill this process before its change of this number, from 1 on, to what lies under `path`."""
    changes = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        changing = event in CHANGING or (event == "open" and str(arguments[1]).strip("bt") not in ("r", "None"))
        if changing and str(arguments[0]).startswith(path):
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="kills, changes, memory, queries; all by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--documents", type=int, nargs="+", default=[20_000, 200_000], metavar="N")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--killed-documents", type=int, default=2000, metavar="N")
    parser.add_argument("--folder", help="where indexes are made and kept; by default a temporary one")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(build_here(*options.here)))
        return
    if min(*options.documents, options.kills, options.killed_documents) < 1:
        parser.error("--documents, --kills and --killed-documents take numbers of 1 or more")
    work = {
        "kills": lambda folder: measure_kills(folder, options.kills, options.killed_documents),
        "changes": measure_changes,
        "memory": lambda folder: measure_memory(folder, options.documents),
        "queries": lambda folder: measure_queries(folder, max(options.documents)),
    }
    unknown = set(options.parts) - set(work)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(work)}")
    result: dict[str, Any] = {"vectors": "random, of steerling-nano's sizes, in place of a model's"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or temporary
        Path(folder).mkdir(parents=True, exist_ok=True)
        # Kills come first: they need a process in which no engine has run.
        for part in work:
            if part in (options.parts or work):
                result[part] = work[part](folder)
                print(f"{part}: {json.dumps(result[part])}", file=sys.stderr)
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name}:")
        for line in value if isinstance(value, list) else [value]:
            print(f"  {line}")


if __name__ == "__main__":
    main()
