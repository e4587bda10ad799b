"""The chunks of an index: a Milvus collection, or a row of them on a file."""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
# Of what is written there.
FORMAT = 1
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


def _look_up(client: Any, part: str, ids: list[str]) -> list[dict[str, Any]]:
    return client.get(part, ids=ids, output_fields=["id"])


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
    A collection of chunks; on a file, as many collections as it takes (see `CHUNKS_OF_A_PART`). Any number of threads may use it:
    what belongs together is done under the engine's lock, and the embedded engine is asked one question after another.

    Args:
        engine: Where it lies.
        collection: Name of the collection.
    """

    def __init__(self, engine: TraceEngine, collection: str):
        self.engine = engine
        self.collection = collection
        # Collections of this index.
        self._parts: list[str] = []
        self._info: IndexInfo | None = None
        # Chunks of the last part, once they were counted.
        self._size: int | None = None

    def info(self) -> IndexInfo | None:
        """
        Whose vectors these are, and make the collection ready, with indexes that may be missing after a kill; None if there is no
        collection yet.
        """
        if self._info is not None:
            return self._info
        with self.engine.lock:
            found = self._read_info()
            if found is not None:
                if self.engine.path is None:
                    for part in self._parts:
                        self._make_ready(part, found)
                else:
                    self._make_ready(self._parts[-1], found)
            self._info = found
            return found

    def _read_info(self) -> IndexInfo | None:
        def read(client: Any) -> dict[str, Any]:
            self._parts = self._find_parts(client)
            return client.describe_collection(self._parts[-1]).get("properties", {}) if self._parts else {}

        properties = self.engine.ask("read the index", read)
        if not self._parts:
            return None
        if PROPERTY not in properties:
            raise ValueError(
                f"`collection` is {self.collection!r}, which at {self.engine.uri!r} is not an index of documents: choose another "
                f"name."
            )
        return _info_of(properties[PROPERTY], self.engine.uri)

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
        properties = {PROPERTY: json.dumps({"format": FORMAT, **asdict(info)})}
        self.engine.ask(
            f"make an index of kind {info.index!r}",
            lambda client: client.create_collection(
                name, schema=schema, consistency_level="Strong", properties=properties
            ),
        )
        self._parts.append(name)

    def begin(self) -> None:
        """Look again at what there is, before more is written: another build may have ended anywhere."""
        with self.engine.lock:
            self._parts = self.engine.ask("read the index", self._find_parts)
            self._size = None

    def _all_ready(self) -> list[str]:
        assert self._info is not None
        for part in self._parts:
            self._make_ready(part, self._info)
        return list(self._parts)

    def _make_ready(self, part: str, info: IndexInfo) -> None:
        if part in self.engine.loaded:
            return
        try:
            self._load(part, info.index)
        except ValueError:
            # The embedded engine writes these files in place, so that a kill leaves half of one, which it cannot load. They
            # hold nothing that the data does not, and one that is not there is made anew.
            halves = list(self._folder(part).rglob("*.idx")) if self.engine.path else []
            if not halves:
                raise
            for file in halves:
                file.unlink()
            self._load(part, info.index)
        self.engine.loaded.add(part)

    def _load(self, part: str, kind: str) -> None:
        def load(client: Any) -> None:
            present = client.list_indexes(part)
            params = client.prepare_index_params()
            if "dense" not in present:
                build = HNSW if kind.startswith("HNSW") else {}
                params.add_index("dense", index_type=kind, index_name="dense", metric_type="COSINE", params=build)
            if "sparse" not in present:
                params.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", index_name="sparse", metric_type="IP")
            if len(params):
                # The embedded engine has made them when it answers; pymilvus would wait a second before it asks.
                client.create_index(part, params, sync=not self.engine.lite)
            client.load_collection(part)

        self.engine.ask("load the index", load)

    def present(self, ids: Sequence[str]) -> set[str]:
        """Which of these keys there are."""
        with self.engine.one_by_one():
            found: set[str] = set()
            parts = self._parts
            if self.engine.path is not None and len(parts) > 1:
                found, parts = self._present_in_full_parts(ids), parts[-1:]
            for part in parts:
                rows = self.engine.ask("look chunks up", partial(_look_up, part=part, ids=list(ids)))
                found |= {row["id"] for row in rows}
            return found

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows; a row whose key there is already is replaced. Once this returns, a kill cannot lose them."""
        with self.engine.lock:
            if self.engine.path is not None:
                if self._size is None:
                    self._size = self._count(self._parts[-1])
                if self._size and self._size + len(rows) > CHUNKS_OF_A_PART:
                    self._begin_part()
                self._size += len(rows)
            self.engine.ask("write chunks", lambda client: client.upsert(self._parts[-1], rows))

    def finish(self) -> None:
        """Bring everything written to disk and build all of the indexes."""
        part = self._parts[-1]

        def reload(client: Any) -> None:
            client.release_collection(part)
            client.load_collection(part)

        # In turns, so that nobody asks what is not loaded.
        with self.engine.one_by_one():
            self.engine.ask("build the index", lambda client: client.flush(part))
            # The embedded engine builds indexes in the background, and at once when a collection is loaded. A file that it is
            # writing in the background at that moment, it cannot load yet.
            last = time.monotonic() + SECONDS_TO_WRITE
            while self.engine.lite:
                try:
                    self.engine.ask("build the index", reload)
                    return
                except ValueError:
                    if time.monotonic() > last:
                        raise
                    time.sleep(PAUSE)

    def _part(self, number: int) -> str:
        return f"{self.collection}_part_{number + 1}" if number else self.collection

    def _find_parts(self, client: Any) -> list[str]:
        found: list[str] = []
        # Only the embedded engine's have several; of a server's other collections a token may not allow to ask.
        while self._exists(client, self._part(len(found))):
            found.append(self._part(len(found)))
            if not self.engine.lite:
                break
        return found

    def _exists(self, client: Any, part: str) -> bool:
        if self.engine.path is None:
            return client.has_collection(part)
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
        self._make_ready(self._parts[-1], self._info)
        self._size = 0

    def _forget(self) -> None:
        """Take everything out of the embedded engine's memory."""
        self.engine.reopen()

    def _present_in_full_parts(self, ids: Sequence[str]) -> set[str]:
        assert self._info is not None
        noted = self._keys.parts()
        for part in self._parts[:-1]:
            if part not in noted:
                self._make_ready(part, self._info)
                self._note_keys(part)
                self._forget()
        self._make_ready(self._parts[-1], self._info)
        return self._keys.present(ids)

    def _note_keys(self, part: str) -> None:
        self._keys.note(part, ([row["id"] for row in rows] for rows in self._pages(part, PAGE, ["id"])))

    @property
    def _keys(self) -> KeyFile:
        assert self.engine.path is not None
        return KeyFile(self.engine.path / f"{self.collection}.keys")

    def count(self) -> int:
        """Chunks in the collection."""
        with self.engine.one_by_one():
            return sum(self._count(part) for part in self._all_ready())

    def _count(self, part: str) -> int:
        found = self.engine.ask("count chunks", lambda client: client.query(part, output_fields=["count(*)"]))
        return found[0]["count(*)"]

    def search(self, vectors: list[Any], kind: str, limit: int, where: str, index: str) -> list[list[dict[str, Any]]]:
        """For each vector the rows (see `FIELDS`) of the highest similarity, at most `limit`, best first."""
        metric, params = "IP", {}
        if kind == "dense":
            metric = "COSINE"
            if index.startswith("HNSW"):
                params = {"ef": max(EF, 2 * limit)}
            elif index.startswith("IVF"):
                params = {"nprobe": NPROBE}
        doing = f"search with `where` {where!r:.200}" if where else "search"
        search_params = {"metric_type": metric, "params": params}

        def search(client: Any) -> list[list[dict[str, Any]]]:
            hits = [
                client.search(
                    part,
                    data=vectors,
                    anns_field=kind,
                    limit=int(limit),  # the engine knows no integers of NumPy
                    filter=where,
                    output_fields=["id"],
                    search_params=search_params,
                )
                for part in parts
            ]
            return self._rows_of(client, [self._nearest(parts, of_one, limit) for of_one in zip(*hits)])

        with self.engine.one_by_one():
            parts = self._all_ready()
            return self.engine.ask(doing, search)

    @staticmethod
    def _nearest(parts: Sequence[str], hits: Sequence[Any], limit: int) -> list[tuple[str, str]]:
        """Parts and keys of the nearest of every part's hits; by both metrics these have the highest numbers."""
        found = [(hit["distance"], part, hit["id"]) for part, own in zip(parts, hits) for hit in own]
        return [(part, key) for _, part, key in heapq.nlargest(limit, found, key=lambda hit: hit[0])]

    @staticmethod
    def _rows_of(client: Any, hits: list[list[tuple[str, str]]]) -> list[list[dict[str, Any]]]:
        wanted: dict[str, set[str]] = {}
        for part, key in chain(*hits):
            wanted.setdefault(part, set()).add(key)
        rows: dict[str, dict[str, Any]] = {}
        for part, keys in wanted.items():
            found = client.get(part, ids=sorted(keys), output_fields=["id", *FIELDS])
            rows |= {row["id"]: row for row in found}
        return [[rows[key] for _, key in of_one] for of_one in hits]

    def rows(self, batch_size: int) -> Iterator[list[dict[str, Any]]]:
        """All rows, some at a time."""
        with self.engine.one_by_one():
            pages = [self._pages(part, batch_size, ["id", *FIELDS]) for part in self._all_ready()]
        return chain.from_iterable(pages)

    def _pages(self, part: str, batch_size: int, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
        generation = self.engine.generation

        def ask(question: Callable[[Any], Any]) -> Any:
            with self.engine.one_by_one():
                if self.engine.generation != generation:
                    raise RuntimeError(
                        f"The index at {self.engine.uri!r} was closed, or begun anew by a build, while its rows were read: read them "
                        f"again."
                    )
                return self.engine.ask("read chunks", question)

        def read() -> Iterator[list[dict[str, Any]]]:
            pages = ask(lambda client: client.query_iterator(part, batch_size=batch_size, output_fields=fields))
            while page := ask(lambda client: pages.next()):
                yield list(page)
            ask(lambda client: pages.close())

        return read()


def store_of(engine: TraceEngine, collection: str) -> TraceStore:
    """The store of a collection, which all that have the engine share."""
    with engine.lock:
        return engine.stores.setdefault(collection, TraceStore(engine, collection))


def _info_of(written: str, uri: str) -> IndexInfo:
    try:
        values = json.loads(written)
        version = values.pop("format", 1)
        if isinstance(version, int) and version > FORMAT:
            raise ValueError(
                f"The index at {uri!r} has the format {version}, and this version of steerling-hf reads {FORMAT}: update it."
            )
        info = IndexInfo(**values)
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The index at {uri!r} does not say whose vectors it holds ({error}): build it anew."
        ) from error
    if not all(isinstance(getattr(info, name), int) for name in ("dimension", "concepts")) or not all(
        isinstance(getattr(info, name), str) for name in ("fingerprint", "embedding", "index")
    ):
        raise ValueError(f"The index at {uri!r} does not say whose vectors it holds ({values!r:.200}): build it anew.")
    return info


__all__ = ["IndexInfo", "TraceStore", "store_of"]
