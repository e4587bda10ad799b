"""
Throughput of the tokenizer beside raw tiktoken, in one run: `python benchmarks/tokenization.py [--json]`.

Each figure is the median over repetitions of megabytes of text a second; the ratio is ours over tiktoken's.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable

from steerling_hf import SteerlingTokenizer, checkpoint

WORDS = [
    "the",
    "of",
    "a",
    "garden",
    "2024",
    "boats",
    "water,",
    "naïve",
    "running",
    "北京",
    "function(x)",
    "=",
    "y;",
    "\n",
    "Привет",
    "sailing",
    "under",
    "stars",
]


def text(size: int, seed: int) -> str:
    rng = random.Random(seed)
    parts: list[str] = []
    length = 0
    while length < size:
        parts.append(rng.choice(WORDS))
        length += len(parts[-1].encode()) + 1
    return " ".join(parts)


def rate(work: Callable[[], object], size: int, repetitions: int) -> float:
    work()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return size / statistics.median(times) / 1e6


def measure(size: int, count: int, repetitions: int) -> dict[str, dict[str, float]]:
    tokenizer = SteerlingTokenizer.from_pretrained(checkpoint("steerling-8b"))
    raw = tokenizer._vocabulary.encoding
    texts = [text(size, seed) for seed in range(count)]
    ids = [raw.encode_ordinary(item) for item in texts]
    total = sum(len(item.encode()) for item in texts)
    pairs = {
        "encode": (
            lambda: [tokenizer(item)["input_ids"] for item in texts],
            lambda: [raw.encode_ordinary(item) for item in texts],
        ),
        "encode_batch": (lambda: tokenizer(texts)["input_ids"], lambda: raw.encode_ordinary_batch(texts)),
        "decode": (lambda: tokenizer.batch_decode(ids), lambda: raw.decode_batch(ids)),
    }
    results = {}
    for name, (ours, theirs) in pairs.items():
        mine, peer = rate(ours, total, repetitions), rate(theirs, total, repetitions)
        results[name] = {"ours_mb_s": mine, "tiktoken_mb_s": peer, "ratio": mine / peer}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000], help="bytes of a text")
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    results = {size: measure(size, max(8, 400_000 // size), options.repetitions) for size in options.sizes}
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'bytes':>8} {'':14} {'ours MB/s':>10} {'tiktoken':>10} {'ratio':>6}")
    for size, rows in results.items():
        for name, row in rows.items():
            print(f"{size:>8} {name:14} {row['ours_mb_s']:10.1f} {row['tiktoken_mb_s']:10.1f} {row['ratio']:6.2f}")


if __name__ == "__main__":
    main()
