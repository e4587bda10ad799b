"""The chunks of an index: a Milvus collection, or a row of them on a file."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .trace_engine import TraceEngine
from .trace_keys import KeyFile

HNSW = {"M": 32, "efConstruction": 200}
# How much of an index is looked at, at least: neighbours of HNSW, lists of IVF.
EF = 256
NPROBE = 32
PROPERTY = "steerling.index"
# The file with which a collection of the embedded engine begins to be.
SCHEMA = "schema.json"
# Seconds to wait for a file that the embedded engine is writing, and between two looks at it.
SECONDS_TO_WRITE, PAUSE = 120.0, 0.5
# The embedded engine keeps all of every collection that it has open in memory, whether or not it is released. So an index on
# a file is a row of collections of so many chunks, of which a build has only the last one open.
CHUNKS_OF_A_PART = 16_384
# Milvus returns no more at once.
PAGE = 16_384
FIELDS = ["text", "source", "metadata", "dense", "sparse"]


@dataclass(frozen=True)
class IndexInfo:
    """
    Whose vectors an index holds.

    Args:
        fingerprint: Of the model's concepts; see `concept_fingerprint`.
        dimension: D of the dense vectors.
        concepts: Concepts of the model.
        embedding: Which states the dense vectors are, one of `embed`'s kinds.
        index: Kind of the dense vectors' index.
    """

    fingerprint: str
    dimension: int
    concepts: int
    embedding: str
    index: str


class TraceStore:
    """
    A collection of chunks; on a file, as many collections as it takes (see `CHUNKS_OF_A_PART`).

    Args:
        engine: Where it lies.
        collection: Name of the collection.
    """

    def __init__(self, engine: TraceEngine, collection: str):
        self.engine = engine
        self.collection = collection
        # Collections of this index, and which of them are ready to be searched.
        self._parts: list[str] = []
        self._ready: set[str] = set()
        self._info: IndexInfo | None = None
        # Chunks of the last part, once they were counted.
        self._size: int | None = None

    def info(self) -> IndexInfo | None:
        """Whose vectors these are; None if there is no collection yet."""
        with self.engine.asking("read the index"):
            self._parts = self._find_parts()
            if not self._parts:
                return None
            properties = self.engine.client.describe_collection(self._parts[-1]).get("properties", {})
        if PROPERTY not in properties:
            raise ValueError(
                f"`collection` is {self.collection!r}, which at {self.engine.uri!r} is not an index of documents: choose another "
                f"name."
            )
        return IndexInfo(**json.loads(properties[PROPERTY]))

    def create(self, info: IndexInfo) -> None:
        """
        Make the collection, or one more part of it.

        Raises:
            ValueError: There is no such kind of index, or the embedded engine does not build it.
        """
        from pymilvus import DataType, MilvusClient

        self.engine.check_index(info.index)
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=32)
        schema.add_field("text", DataType.VARCHAR, max_length=65_535)
        schema.add_field("source", DataType.VARCHAR, max_length=4096)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=info.dimension)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        name = self._part(len(self._parts))
        self._clear_remains(name)
        if self.engine.path is not None and not self._parts:
            self._keys.forget()
        with self.engine.asking(f"make an index of kind {info.index!r}"):
            self.engine.client.create_collection(
                name,
                schema=schema,
                consistency_level="Strong",
                properties={PROPERTY: json.dumps(asdict(info))},
            )
        self._parts.append(name)

    def load(self, info: IndexInfo) -> None:
        """Make what indexes are missing, after a kill too, and make the collection ready for writing and searches."""
        self._info = info
        if self.engine.path is None:
            self._all_ready()
        else:
            self._make_ready(self._parts[-1])

    def _all_ready(self) -> list[str]:
        for part in self._parts:
            self._make_ready(part)
        return self._parts

    def _make_ready(self, part: str) -> None:
        if part in self._ready:
            return
        try:
            self._load(part)
        except ValueError:
            # The embedded engine writes these files in place, so that a kill leaves half of one, which it cannot load. They
            # hold nothing that the data does not, and one that is not there is made anew.
            halves = list(self._folder(part).rglob("*.idx")) if self.engine.path else []
            if not halves:
                raise
            for file in halves:
                file.unlink()
            self._load(part)
        self._ready.add(part)

    def _load(self, part: str) -> None:
        assert self._info is not None
        kind = self._info.index
        with self.engine.asking("load the index"):
            present = self.engine.client.list_indexes(part)
            params = self.engine.client.prepare_index_params()
            if "dense" not in present:
                build = HNSW if kind.startswith("HNSW") else {}
                params.add_index("dense", index_type=kind, index_name="dense", metric_type="COSINE", params=build)
            if "sparse" not in present:
                params.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", index_name="sparse", metric_type="IP")
            if len(params):
                # The embedded engine has made them when it answers; pymilvus would wait a second before it asks.
                self.engine.client.create_index(part, params, sync=not self.engine.lite)
            self.engine.client.load_collection(part)

    def present(self, ids: Sequence[str]) -> set[str]:
        """Which of these keys there are."""
        found: set[str] = set()
        parts = self._parts
        if self.engine.path is not None and len(parts) > 1:
            found, parts = self._present_in_full_parts(ids), parts[-1:]
        with self.engine.asking("look chunks up"):
            for part in parts:
                found |= {row["id"] for row in self.engine.client.get(part, ids=list(ids), output_fields=["id"])}
        return found

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows; a row whose key there is already is replaced. Once this returns, a kill cannot lose them."""
        if self.engine.path is not None:
            if self._size is None:
                self._size = self._count(self._parts[-1])
            if self._size and self._size + len(rows) > CHUNKS_OF_A_PART:
                self._begin_part()
            self._size += len(rows)
        with self.engine.asking("write chunks"):
            self.engine.client.upsert(self._parts[-1], rows)

    def finish(self) -> None:
        """Bring everything written to disk and build all of the indexes."""
        part = self._parts[-1]
        with self.engine.asking("build the index"):
            self.engine.client.flush(part)
        # The embedded engine builds indexes in the background, and at once when a collection is loaded. A file that it is
        # writing in the background at that moment, it cannot load yet.
        last = time.monotonic() + SECONDS_TO_WRITE
        while self.engine.lite:
            try:
                with self.engine.asking("build the index"):
                    self.engine.client.release_collection(part)
                    self.engine.client.load_collection(part)
                return
            except ValueError:
                if time.monotonic() > last:
                    raise
                time.sleep(PAUSE)

    def _part(self, number: int) -> str:
        return f"{self.collection}_part_{number + 1}" if number else self.collection

    def _find_parts(self) -> list[str]:
        found: list[str] = []
        # Only the embedded engine's have several; of a server's other collections a token may not allow to ask.
        while self._exists(self._part(len(found))):
            found.append(self._part(len(found)))
            if not self.engine.lite:
                break
        return found

    def _exists(self, part: str) -> bool:
        if self.engine.path is None:
            return self.engine.client.has_collection(part)
        # The engine would read the collection into memory to answer.
        return (self._folder(part) / SCHEMA).exists()

    def _folder(self, part: str) -> Path:
        assert self.engine.path is not None
        return self.engine.path / "collections" / part

    def _clear_remains(self, part: str) -> None:
        """Remove the folder of a collection that a kill kept from coming into being: the engine would refuse to make it."""
        if self.engine.path is not None and self._folder(part).is_dir():
            (self._folder(part) / f"{SCHEMA}.tmp").unlink(missing_ok=True)
            self._folder(part).rmdir()

    def _begin_part(self) -> None:
        """Finish the last part, take it out of memory and begin another one."""
        assert self._info is not None
        self.finish()
        self._note_keys(self._parts[-1])
        self._forget()
        self.create(self._info)
        self._make_ready(self._parts[-1])
        self._size = 0

    def _forget(self) -> None:
        """Take everything out of the embedded engine's memory."""
        self._ready.clear()
        self.engine.reopen()

    def _present_in_full_parts(self, ids: Sequence[str]) -> set[str]:
        noted = self._keys.parts()
        for part in self._parts[:-1]:
            if part not in noted:
                self._make_ready(part)
                self._note_keys(part)
                self._forget()
        self._make_ready(self._parts[-1])
        return self._keys.present(ids)

    def _note_keys(self, part: str) -> None:
        self._keys.note(part, ([row["id"] for row in rows] for rows in self._pages(part, PAGE, ["id"])))

    @property
    def _keys(self) -> KeyFile:
        assert self.engine.path is not None
        return KeyFile(self.engine.path / f"{self.collection}.keys")

    def count(self) -> int:
        """Chunks in the collection."""
        return sum(self._count(part) for part in self._all_ready())

    def _count(self, part: str) -> int:
        with self.engine.asking("count chunks"):
            return self.engine.client.query(part, output_fields=["count(*)"])[0]["count(*)"]

    def search(self, vectors: list[Any], kind: str, limit: int, where: str, index: str) -> list[list[dict[str, Any]]]:
        """For each vector the rows (see `FIELDS`) of the highest similarity, at most `limit`, best first."""
        metric, params = "IP", {}
        if kind == "dense":
            metric = "COSINE"
            if index.startswith("HNSW"):
                params = {"ef": max(EF, 2 * limit)}
            elif index.startswith("IVF"):
                params = {"nprobe": NPROBE}
        doing = f"search with `where` {where!r}" if where else "search"
        search_params = {"metric_type": metric, "params": params}
        with self.engine.asking(doing):
            hits = [
                self.engine.client.search(
                    part,
                    data=vectors,
                    anns_field=kind,
                    limit=int(limit),  # the engine knows no integers of NumPy
                    filter=where,
                    output_fields=["id"],
                    search_params=search_params,
                )
                for part in self._all_ready()
            ]
            return self._rows_of([self._nearest(of_one, limit) for of_one in zip(*hits)])

    def _nearest(self, hits: Sequence[Any], limit: int) -> list[tuple[str, str]]:
        """Parts and keys of the nearest of every part's hits; by both metrics these have the highest numbers."""
        found = [(hit["distance"], part, hit["id"]) for part, own in zip(self._parts, hits) for hit in own]
        return [(part, key) for _, part, key in heapq.nlargest(limit, found, key=lambda hit: hit[0])]

    def _rows_of(self, hits: list[list[tuple[str, str]]]) -> list[list[dict[str, Any]]]:
        wanted: dict[str, set[str]] = {}
        for part, key in chain(*hits):
            wanted.setdefault(part, set()).add(key)
        rows: dict[str, dict[str, Any]] = {}
        for part, keys in wanted.items():
            found = self.engine.client.get(part, ids=sorted(keys), output_fields=["id", *FIELDS])
            rows |= {row["id"]: row for row in found}
        return [[rows[key] for _, key in of_one] for of_one in hits]

    def rows(self, batch_size: int) -> Iterator[list[dict[str, Any]]]:
        """All rows, some at a time."""
        for part in self._all_ready():
            yield from self._pages(part, batch_size, ["id", *FIELDS])

    def _pages(self, part: str, batch_size: int, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
        with self.engine.asking("read chunks"):
            pages = self.engine.client.query_iterator(part, batch_size=batch_size, output_fields=fields)
        while True:
            with self.engine.asking("read chunks"):
                page = pages.next()
            if not page:
                pages.close()
                return
            yield list(page)
