"""
An index of training documents in a model's own concept space: which documents is a text like, and by which concepts?

What it measures is similarity: a document that is like an answer may or may not have caused it.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar, overload

from tqdm import tqdm

from .checks import check_filled, check_positive
from .embeddings import KINDS as EMBEDDINGS
from .fingerprint import concept_fingerprint
from .trace_address import read_address
from .trace_documents import chunks_of, read_documents
from .trace_engine import TraceEngine, open_engine
from .trace_filter import expression
from .trace_results import Trace, hit_of, ranked
from .trace_store import PAGE, IndexInfo, TraceStore, store_of
from .trace_vectors import TraceVectors, trace_vectors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .catalog import ConceptCatalog
    from .modeling.modeling_steerling import SteerlingForDiffusionLM

T = TypeVar("T")

SEARCHES = ("dense", "sparse", "hybrid")
# Chunks that are looked up, embedded and written together; a kill costs no more than these.
WRITTEN_AT_ONCE = 512
# Milvus returns no more.
MOST_HITS = 4096
# A hybrid search takes the best of either kind from so many candidates.
CANDIDATES = 4


@dataclass(frozen=True)
class BuildReport:
    """
    What a build did.

    Args:
        documents: Documents that were read, those without any text included.
        chunks: Chunks that they were cut into.
        added: Chunks that were not in the index before.
    """

    documents: int
    chunks: int
    added: int


class TraceIndex:
    """
    Chunks of training documents with their embeddings and concepts, in Milvus.

        with TraceIndex("./index.db") as index:
            index.build(model, tokenizer, "corpus.jsonl")
            print(index.trace(model, tokenizer, "You can call 555-0142.", k=5).hits[0])

    What it finds is similarity in the model's own concept space, not causal influence. An index remembers whose vectors it
    holds and refuses another model's. Threads may share an index: one that is being built answers from what it has so far.

    Attributes:
        uri: Where it is, without a password.

    Args:
        uri: "./index.db", a folder of the embedded engine, which one process at a time can open, with any number of
            `TraceIndex` objects; or "http://host:19530", a Milvus server. A password in it ("http://user:password@host:19530")
            is shown nowhere.
        token: The server's token, or "user:password".
        collection: Name of the collection; a server can have several.
        timeout: Seconds to wait for a server.

    Raises:
        ImportError: The extra `trace` is not installed.
        ConnectionError, PermissionError: A server does not answer, or does not accept the token.
        ValueError: `uri` is neither, or what lies there is no index, is damaged, or is open in another process.
    """

    def __init__(
        self, uri: str, token: str | None = None, collection: str = "steerling_documents", timeout: float = 10
    ):
        address = read_address(uri, token)
        self.uri = address.shown
        _check_collection(collection)
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ValueError(f"`timeout` is {timeout!r}: give seconds, more than 0.")
        self._collection = collection
        self._address, self._timeout = address, timeout
        self._lock = threading.RLock()
        self._engine: TraceEngine | None = None
        # Gives the engine back, also when this object is forgotten without having been closed.
        self._give_back: weakref.finalize | None = None
        # What does not exist can still be built.
        with suppress(FileNotFoundError):
            self._open(create=False)

    def __repr__(self) -> str:
        return f"TraceIndex({self.uri!r}, collection={self._collection!r})"

    def __enter__(self) -> TraceIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Chunks in the index; 0 before it is built."""
        try:
            with self._using() as store:
                return store.count() if store.info() else 0
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """
        Disconnect, so that another process can open the files of an embedded engine, once no other `TraceIndex` and no thread of
        this process uses them. An index that is closed opens again when it is asked.
        """
        with self._lock:
            if self._give_back is not None:
                self._give_back()
            self._engine = self._give_back = None

    @property
    def info(self) -> IndexInfo | None:
        """Whose vectors the index holds; None before it is built."""
        try:
            with self._using() as store:
                return store.info()
        except FileNotFoundError:
            return None

    def build(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        documents: Any,
        text: str = "text",
        source: str = "source",
        chunk_tokens: int = 128,
        embedding: str = "composed",
        index: str = "FLAT",
        batch_size: int = 32,
        shard: tuple[int, int] = (0, 1),
        progress: bool = True,
    ) -> BuildReport:
        """
        Add documents. A chunk's key is a hash of its source and text, and a chunk that is there already is not embedded again:
        so a build that was killed goes on where it stopped, and the same documents can be given twice. Documents are
        streamed, and so are chunks: on a file no more than 16,384 of them are in memory at once. A chunk that stands twice in
        a source is kept once.

        Args:
            documents, text, source: What to read; see `read_documents`.
            chunk_tokens: Most tokens of a chunk; see `chunks_of`.
            embedding: Which states the dense vectors are, one of `embed`'s kinds; set when the index is first built.
            index: Kind of the dense vectors' index; set when the index is first built. "FLAT" is exact; "HNSW" is faster in
                large indexes, but misses more of what stands there many times. On a file only what the embedded engine
                really builds: "FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8".
            batch_size: Texts that pass through the model at once.
            shard: (i, n) reads every n-th document from the i-th on, so that n processes can share the work and write to one
                server. The embedded engine allows one writer.
            progress: Show a bar.

        Raises:
            FileNotFoundError: See `read_documents`.
            ValueError: There is nothing to index; the index is another model's, or of another kind; a number is out of range;
                a document cannot be read. What was written before such an error stays.
        """
        for name, value in (("chunk_tokens", chunk_tokens), ("batch_size", batch_size)):
            check_positive(name, value)
        for name, field in (("text", text), ("source", source), ("embedding", embedding), ("index", index)):
            check_filled(name, field)
        if chunk_tokens > model.config.block_size:
            raise ValueError(
                f"`chunk_tokens` is {chunk_tokens}: the model's context holds no more than {model.config.block_size}."
            )
        if embedding not in EMBEDDINGS:
            raise ValueError(f"`embedding` is {embedding!r}: choose from {', '.join(map(repr, EMBEDDINGS))}.")
        first, count = _shard(shard)
        info = IndexInfo(concept_fingerprint(model), model.config.n_embd, _concepts(model), embedding, index.upper())
        mine = islice(read_documents(documents, text, source), first, None, count)
        counts = {"documents": 0, "chunks": 0, "added": 0}
        rows = _rows(mine, tokenizer, chunk_tokens, counts)
        batch = list(islice(rows, WRITTEN_AT_ONCE))
        if not batch and count > 1:
            return BuildReport(**counts)
        if not batch:
            raise ValueError("`documents` has no text in it: give at least one document that is not empty.")
        with (
            self._using(create=True) as store,
            tqdm(desc="indexing", unit="chunk", disable=not progress) as bar,
        ):
            self._prepare(store, info)
            while batch:
                counts["added"] += self._add(store, model, tokenizer, batch, info.embedding, batch_size)
                bar.update(len(batch))
                batch = list(islice(rows, WRITTEN_AT_ONCE))
            store.finish()
        return BuildReport(**counts)

    @overload
    def trace(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        k: int = ...,
        kind: str = ...,
        where: str | Mapping[str, Any] | None = ...,
        by: str = ...,
        catalog: ConceptCatalog | None = ...,
    ) -> Trace: ...

    @overload
    def trace(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        text: Any,
        k: int = ...,
        kind: str = ...,
        where: str | Mapping[str, Any] | None = ...,
        by: str = ...,
        catalog: ConceptCatalog | None = ...,
    ) -> Any: ...

    def trace(
        self,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        text: Any,
        k: int = 10,
        kind: str = "dense",
        where: str | Mapping[str, Any] | None = None,
        by: str = "source",
        catalog: ConceptCatalog | None = None,
    ) -> Trace | list[Trace]:
        """
        Training documents that texts are like; this is similarity, not causal influence.

        Args:
            text: A text, a chunk of an `Explanation`, or a list of these; or `TraceVectors`.
            k: Hits, at most.
            kind: What is compared: "dense", the embeddings; "sparse", the concepts; "hybrid", the mean of both scores, for
                the best candidates of either.
            where: Only these documents: values by field, such as {"source": "a.jsonl", "topic": ["bees", "trees"]}, or an
                expression of Milvus.
            by: What the distribution over sources groups hits by: "source", or a field of the metadata.
            catalog: Where names of concepts come from.

        Returns:
            A `Trace`, or for a list or vectors a list of them.

        Raises:
            FileNotFoundError: The index was not built.
            ValueError: It is another model's; a text is empty or longer than the model's context; the filter cannot be read;
                an argument is out of range.
        """
        wanted = check_search(k, kind, where)
        check_filled("by", by)
        catalog = None if catalog is None else catalog.fit(model.config)
        single = isinstance(text, str) or not isinstance(text, Sequence | TraceVectors)
        texts: list[Any] = []
        if isinstance(text, TraceVectors):
            vectors, texts = text, [None] * len(text)
        else:
            texts = [getattr(one, "text", one) for one in ([text] if single else text)]
            vectors = None
            if not all(isinstance(one, str) for one in texts):
                raise ValueError(f"`text` is {text!r:.80}: give a string or a list of strings, or what has a text.")
        with self._using() as store:
            info = self._built(store)
            self._check_model(info, concept_fingerprint(model), model.config.n_embd)
            if vectors is None:
                vectors = trace_vectors(model, tokenizer, texts, info.embedding)
            if vectors.dense.shape[-1] != info.dimension or vectors.concepts.size != info.concepts:
                raise ValueError(
                    f"`text` has vectors of {vectors.dense.shape[-1]} dimensions over {vectors.concepts.size} concepts, the "
                    f"index holds {info.dimension} over {info.concepts}: make them with the model that built it."
                )
            if not texts:
                return []
            found = self._candidates(store, info, vectors, k, kind, wanted)
        queries = zip(texts, vectors.dense, vectors.sparse(), found)
        traces = [
            ranked(query, kind, [hit_of(row, dense, sparse, kind, catalog) for row in rows], k, by)
            for query, dense, sparse, rows in queries
        ]
        return traces[0] if single else traces

    def rows(self, batch_size: int = 1000) -> Iterator[list[dict[str, Any]]]:
        """
        All chunks, `batch_size` at a time: dictionaries with id, text, source, metadata, dense (D numbers) and sparse (weights
        by concept).

        Raises:
            FileNotFoundError: The index was not built.
            ValueError: `batch_size` is out of range.
            RuntimeError: On the way: the index was closed, or a build has begun another part of it.
        """
        check_positive("batch_size", batch_size)
        if batch_size > PAGE:
            raise ValueError(f"`batch_size` is {batch_size}: an index gives no more than {PAGE} chunks at once.")
        with self._using() as store:
            self._built(store)
            return store.rows(batch_size)

    def _candidates(
        self, store: TraceStore, info: IndexInfo, vectors: TraceVectors, k: int, kind: str, where: str
    ) -> list[list[dict[str, Any]]]:
        """For each query the rows that may be hits, none twice."""
        limit = min(CANDIDATES * k, MOST_HITS) if kind == "hybrid" else k
        found: list[dict[str, dict[str, Any]]] = [{} for _ in range(len(vectors))]
        data = {"dense": vectors.dense.tolist(), "sparse": vectors.sparse()}
        for name in data if kind == "hybrid" else (kind,):
            for rows, more in zip(found, store.search(data[name], name, limit, where, info.index)):
                rows.update({row["id"]: row for row in more})
        return [list(rows.values()) for rows in found]

    def _add(
        self,
        store: TraceStore,
        model: SteerlingForDiffusionLM,
        tokenizer: PreTrainedTokenizerBase,
        batch: list[dict[str, Any]],
        embedding: str,
        batch_size: int,
    ) -> int:
        """Embed and write the chunks that are not there yet; their number."""
        rows = {row["id"]: row for row in batch}
        present = store.present(list(rows))
        new = [row for key, row in rows.items() if key not in present]
        if not new:
            return 0
        # Training text repeats itself, and a text's vectors do not depend on the others.
        texts = list(dict.fromkeys(row["text"] for row in new))
        place = {text: i for i, text in enumerate(texts)}
        # A text may have a token more than it had inside its document.
        limit = model.config.block_size
        vectors = trace_vectors(model, tokenizer, texts, embedding, batch_size, max_length=limit)
        dense, sparse = vectors.dense.tolist(), vectors.sparse()
        store.write([{**row, "dense": dense[place[row["text"]]], "sparse": sparse[place[row["text"]]]} for row in new])
        return len(new)

    def _prepare(self, store: TraceStore, info: IndexInfo) -> None:
        """Make sure that there is a collection for these vectors."""
        store.engine.check_index(info.index)
        with store.engine.lock:
            if store.info() is None:
                try:
                    store.create(info)
                except ValueError:
                    # Another process may have made it in the meantime.
                    if store.info() is None:
                        raise
        known = self._built(store)
        store.begin()
        self._check_model(known, info.fingerprint, info.dimension)
        for name in ("embedding", "index"):
            if getattr(known, name) != getattr(info, name):
                raise ValueError(
                    f"`{name}` is {getattr(info, name)!r}, but the index at {self.uri!r} was built with "
                    f"{getattr(known, name)!r}: give that, or build another index."
                )

    def check(self, model: SteerlingForDiffusionLM) -> None:
        """
        Raises:
            FileNotFoundError: The index was not built.
            ValueError: It is another model's.
        """
        with self._using() as store:
            info = self._built(store)
        self._check_model(info, concept_fingerprint(model), model.config.n_embd)

    def _check_model(self, known: IndexInfo, fingerprint: str, dimension: int) -> None:
        if (known.fingerprint, known.dimension) != (fingerprint, dimension):
            raise ValueError(
                f"The index at {self.uri!r} holds vectors of {known.dimension} dimensions from a model with the fingerprint "
                f"{known.fingerprint[:12]}; `model` has {dimension} and {fingerprint[:12]}: build an index with this model."
            )

    def _open(self, create: bool) -> TraceEngine:
        with self._lock:
            if self._engine is None:
                self._engine = open_engine(self._address, None, self._timeout, create)
                self._give_back = weakref.finalize(self, self._engine.release)
                self._give_back.atexit = False
            return self._engine

    @contextmanager
    def _using(self, create: bool = False) -> Iterator[TraceStore]:
        """The store, which stays open for as long as this context lasts, even if another thread closes the index."""
        with self._lock:
            engine = self._open(create)
            engine.hold()
        try:
            yield store_of(engine, self._collection)
        finally:
            engine.release()

    def _built(self, store: TraceStore) -> IndexInfo:
        """
        Whose vectors there are.

        Raises:
            FileNotFoundError: There are none.
        """
        info = store.info()
        if info is None:
            raise FileNotFoundError(f"There is no index at {self.uri!r}: build one first.")
        return info


def check_search(k: int = 1, kind: str = "dense", where: str | Mapping[str, Any] | None = None) -> str:
    """
    The filter of a search as the engine reads it; for the arguments see `TraceIndex.trace`.

    Raises:
        ValueError: An argument is out of range.
    """
    check_positive("k", k)
    if k > MOST_HITS:
        raise ValueError(f"`k` is {k}: an index returns no more than {MOST_HITS} hits.")
    if kind not in SEARCHES:
        raise ValueError(f"`kind` is {kind!r}: choose from {', '.join(map(repr, SEARCHES))}.")
    return expression(where)


def _check_collection(name: Any) -> None:
    # It becomes the name of a folder and of files.
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", name):
        raise ValueError(
            f"`collection` is {name!r:.200}: give letters, digits and underscores of ASCII, the first no digit, 200 at most."
        )


def _shard(shard: Any) -> tuple[int, int]:
    pair = tuple(shard) if isinstance(shard, Sequence) and not isinstance(shard, str) else ()
    whole = len(pair) == 2 and all(isinstance(one, int) and not isinstance(one, bool) for one in pair)
    if not whole or not 0 <= pair[0] < pair[1]:
        raise ValueError(f"`shard` is {shard!r}: give (i, n) with 0 <= i < n.")
    return pair


def _concepts(model: SteerlingForDiffusionLM) -> int:
    return sum(head.n_concepts for head in model.concept_heads())


def _rows(
    documents: Iterable[Any], tokenizer: PreTrainedTokenizerBase, chunk_tokens: int, counts: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Chunks as rows without vectors; counts what passes."""
    for document in documents:
        counts["documents"] += 1
        for chunk in chunks_of(document.text, tokenizer, chunk_tokens):
            counts["chunks"] += 1
            # 128 bits: among 11 billion keys none is expected to be there twice.
            key = hashlib.sha256(f"{len(document.source)}:{document.source}{chunk}".encode()).hexdigest()[:32]
            metadata = dict(document.metadata)
            yield {"id": key, "text": chunk, "source": document.source, "metadata": metadata}


__all__ = ["BuildReport", "TraceIndex"]
