"""Where an index lies: a Milvus collection, on a server or embedded in this process with a folder of files."""

from __future__ import annotations

import heapq
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from .trace_keys import KeyFile

# The embedded engine accepts any other name, reports the index as finished and does not build it.
EMBEDDED_KINDS = ("FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8")
HNSW = {"M": 32, "efConstruction": 200}
# How much of an index is looked at, at least: neighbours of HNSW, lists of IVF.
EF = 256
NPROBE = 32
PROPERTY = "steerling.index"
# pymilvus asks every 10 seconds whether the server is there, and servers hang up on who asks so often.
PATIENCE = {"grpc.keepalive_time_ms": 600_000}
# Seconds to wait for a file that the embedded engine is writing, and between two looks at it.
SECONDS_TO_WRITE, PAUSE = 120.0, 0.5
# The embedded engine keeps all of every collection that it has open in memory, whether or not it is released. So an index on
# a file is a row of collections of so many chunks, of which a build has only the last one open.
CHUNKS_OF_A_PART = 16_384
# Milvus returns no more at once.
PAGE = 16_384
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
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
        uri: "http://host:19530" or https, a server; or a path that ends in ".db", which the embedded engine makes a folder.
        token: The server's token, or "user:password".
        collection: Name of the collection.
        timeout: Seconds to wait for a server.
        create: Make the folder of an embedded engine if there is none.

    Raises:
        ImportError: The extra `trace` is not installed.
        FileNotFoundError: There is no such folder, or none to create it in.
        ConnectionError: The server does not answer.
        PermissionError: The server does not accept the token.
        ValueError: `uri` is neither, or what lies there is no index or is damaged.
    """

    def __init__(self, uri: str, token: str | None, collection: str, timeout: float, create: bool):
        try:
            from grpc import RpcError
            from pymilvus import MilvusException
        except ImportError as error:
            raise ImportError("An index of documents needs Milvus: pip install 'steerling-hf[trace]'") from error
        self.uri = uri
        self.collection = collection
        self.path = None if "://" in uri else Path(uri)
        # Some calls raise the errors of gRPC as they are.
        self._errors = (MilvusException, RpcError)
        self._options = {"token": token or "", "timeout": timeout, "grpc_options": PATIENCE}
        # Collections of this index, and which of them are ready to be searched.
        self._parts: list[str] = []
        self._ready: set[str] = set()
        self._info: IndexInfo | None = None
        # Chunks of the last part, once they were counted.
        self._size: int | None = None
        if self.path is not None:
            _check_path(self.path, create)
        self._connect()

    def _connect(self) -> None:
        from pymilvus import MilvusClient

        try:
            with _quiet():
                self._client = MilvusClient(self.uri, **self._options)
                version = self._client.get_server_version()
        except self._errors as error:
            raise self._refusal(error) from error
        self.embedded_engine = "lite" in version.lower()

    def close(self) -> None:
        """Disconnect; an embedded engine writes what it has to disk, and other processes may open it."""
        self._client.close()
        if self.path is not None:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(str(self.path))

    def info(self) -> IndexInfo | None:
        """Whose vectors these are; None if there is no collection yet."""
        with self._asking("read the index"):
            self._parts = self._find_parts()
            if not self._parts:
                return None
            properties = self._client.describe_collection(self._parts[-1]).get("properties", {})
        if PROPERTY not in properties:
            raise ValueError(
                f"`collection` is {self.collection!r}, which at {self.uri!r} is not an index of documents: choose another "
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

        self.check_index(info.index)
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=32)
        schema.add_field("text", DataType.VARCHAR, max_length=65_535)
        schema.add_field("source", DataType.VARCHAR, max_length=4096)
        schema.add_field("metadata", DataType.JSON)
        schema.add_field("dense", DataType.FLOAT_VECTOR, dim=info.dimension)
        schema.add_field("sparse", DataType.SPARSE_FLOAT_VECTOR)
        name = self._part(len(self._parts))
        with self._asking(f"make an index of kind {info.index!r}"):
            self._client.create_collection(
                name,
                schema=schema,
                consistency_level="Strong",
                properties={PROPERTY: json.dumps(asdict(info))},
            )
        self._parts.append(name)

    def check_index(self, kind: str) -> None:
        """
        Refuse what would not be built.

        Raises:
            ValueError: The embedded engine does not build this kind.
        """
        if self.embedded_engine and kind not in EMBEDDED_KINDS:
            raise ValueError(
                f"`index` is {kind!r}: the embedded engine at {self.uri!r} builds {', '.join(EMBEDDED_KINDS)}; other kinds "
                f"need a Milvus cluster."
            )

    def load(self, info: IndexInfo) -> None:
        """Make what indexes are missing, after a kill too, and make the collection ready for writing and searches."""
        self._info = info
        if self.path is None:
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
            halves = list(self.path.glob(f"collections/{part}/**/*.idx")) if self.path else []
            if not halves:
                raise
            for file in halves:
                file.unlink()
            self._load(part)
        self._ready.add(part)

    def _load(self, part: str) -> None:
        assert self._info is not None
        kind = self._info.index
        with self._asking("load the index"):
            present = self._client.list_indexes(part)
            params = self._client.prepare_index_params()
            if "dense" not in present:
                build = HNSW if kind.startswith("HNSW") else {}
                params.add_index("dense", index_type=kind, index_name="dense", metric_type="COSINE", params=build)
            if "sparse" not in present:
                params.add_index("sparse", index_type="SPARSE_INVERTED_INDEX", index_name="sparse", metric_type="IP")
            if len(params):
                # The embedded engine has made them when it answers; pymilvus would wait a second before it asks.
                self._client.create_index(part, params, sync=not self.embedded_engine)
            self._client.load_collection(part)

    def present(self, ids: Sequence[str]) -> set[str]:
        """Which of these keys there are."""
        found: set[str] = set()
        parts = self._parts
        if self.path is not None and len(parts) > 1:
            found, parts = self._present_in_full_parts(ids), parts[-1:]
        with self._asking("look chunks up"):
            for part in parts:
                found |= {row["id"] for row in self._client.get(part, ids=list(ids), output_fields=["id"])}
        return found

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Write rows; a row whose key there is already is replaced. Once this returns, a kill cannot lose them."""
        if self.path is not None:
            if self._size is None:
                self._size = self._count(self._parts[-1])
            if self._size and self._size + len(rows) > CHUNKS_OF_A_PART:
                self._begin_part()
            self._size += len(rows)
        with self._asking("write chunks"):
            self._client.upsert(self._parts[-1], rows)

    def finish(self) -> None:
        """Bring everything written to disk and build all of the indexes."""
        part = self._parts[-1]
        with self._asking("build the index"):
            self._client.flush(part)
        # The embedded engine builds indexes in the background, and at once when a collection is loaded. A file that it is
        # writing in the background at that moment, it cannot load yet.
        last = time.monotonic() + SECONDS_TO_WRITE
        while self.embedded_engine:
            try:
                with self._asking("build the index"):
                    self._client.release_collection(part)
                    self._client.load_collection(part)
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
            if not self.embedded_engine:
                break
        return found

    def _exists(self, part: str) -> bool:
        if self.path is None:
            return self._client.has_collection(part)
        # The engine would read the collection into memory to answer.
        return (self.path / "collections" / part / "schema.json").exists()

    def _begin_part(self) -> None:
        """Finish the last part, take it out of memory and begin another one."""
        assert self._info is not None
        self.finish()
        self._note_keys(self._parts[-1])
        self._reopen()
        self.create(self._info)
        self._make_ready(self._parts[-1])
        self._size = 0

    def _reopen(self) -> None:
        """The only way to have the embedded engine let go of what it has in memory."""
        self.close()
        self._ready.clear()
        self._connect()

    def _present_in_full_parts(self, ids: Sequence[str]) -> set[str]:
        noted = self._keys.parts()
        for part in self._parts[:-1]:
            if part not in noted:
                self._make_ready(part)
                self._note_keys(part)
                self._reopen()
        self._make_ready(self._parts[-1])
        return self._keys.present(ids)

    def _note_keys(self, part: str) -> None:
        self._keys.note(part, ([row["id"] for row in rows] for rows in self._pages(part, PAGE, ["id"])))

    @property
    def _keys(self) -> KeyFile:
        assert self.path is not None
        return KeyFile(self.path / f"{self.collection}.keys")

    def count(self) -> int:
        """Chunks in the collection."""
        return sum(self._count(part) for part in self._all_ready())

    def _count(self, part: str) -> int:
        with self._asking("count chunks"):
            return self._client.query(part, output_fields=["count(*)"])[0]["count(*)"]

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
        with self._asking(doing):
            hits = [
                self._client.search(
                    part,
                    data=vectors,
                    anns_field=kind,
                    limit=limit,
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
            found = self._client.get(part, ids=sorted(keys), output_fields=["id", *FIELDS])
            rows |= {row["id"]: row for row in found}
        return [[rows[key] for _, key in of_one] for of_one in hits]

    def rows(self, batch_size: int) -> Iterator[list[dict[str, Any]]]:
        """All rows, some at a time."""
        for part in self._all_ready():
            yield from self._pages(part, batch_size, ["id", *FIELDS])

    def _pages(self, part: str, batch_size: int, fields: list[str]) -> Iterator[list[dict[str, Any]]]:
        with self._asking("read chunks"):
            pages = self._client.query_iterator(part, batch_size=batch_size, output_fields=fields)
        while True:
            with self._asking("read chunks"):
                page = pages.next()
            if not page:
                pages.close()
                return
            yield list(page)

    @contextmanager
    def _asking(self, doing: str) -> Iterator[None]:
        try:
            with _quiet():
                yield
        except self._errors as error:
            if _status(error) in DENIED:
                raise PermissionError(f"`token` does not allow to {doing} at {self.uri!r}: {_words(error)}") from error
            if "server unavailable" in _words(error):
                raise ConnectionError(
                    f"`uri` is {self.uri!r}, where no Milvus server answers any more: start it and try again."
                ) from error
            raise ValueError(f"{self.uri!r} cannot {doing}: {_words(error)}") from error

    def _refusal(self, error: Exception) -> Exception:
        if self.path is not None:
            return ValueError(
                f"`uri` is {self.uri!r}, which cannot be opened ({_words(error)}): another process has it open, or it is "
                f"damaged. Close the other one, or build the index anew."
            )
        words = _words(error)
        if _status(error) in DENIED or "auth check failure" in words:
            return PermissionError(f"`token` is not accepted by {self.uri!r}: give the server's, or 'user:password'.")
        if "illegal, needs start" in words:
            return ValueError(
                f"`uri` is {self.uri!r}: give http://host:port, https://host:port or a path ending in .db"
            )
        return ConnectionError(
            f"`uri` is {self.uri!r}, where no Milvus server answers: start one, or check the address."
        )


def expression(where: str | Mapping[str, Any] | None) -> str:
    """
    A filter as the engine reads it.

    Args:
        where: Values by field, of which all must be equal, or, if a list is given, in that list: "source", "text", or any
            field of the metadata. Or an expression in Milvus' own language (`metadata["year"] > 2020`).

    Raises:
        ValueError: A value is not a string, a number, a truth value or a list of these.
    """
    if where is None or isinstance(where, str):
        return where or ""
    parts = []
    for name, value in where.items():
        several = isinstance(value, list | tuple | set)
        values = list(value) if several else [value]
        if not values or not all(isinstance(one, str | bool | int | float) for one in values):
            raise ValueError(f"`where` has {value!r} for {name!r}: give a string, a number, or a list of these.")
        place = name if name in ("source", "text") else f"metadata[{json.dumps(name, ensure_ascii=False)}]"
        # Not `in`, which the embedded engine does not take of fields of the metadata.
        equal = [f"{place} == {json.dumps(one, ensure_ascii=False)}" for one in values]
        parts.append(equal[0] if len(equal) == 1 else f"({' or '.join(equal)})")
    return " and ".join(parts)


def _check_path(path: Path, create: bool) -> None:
    if path.suffix != ".db":
        raise ValueError(f"`uri` is {str(path)!r}: give http://host:port, https://host:port or a path ending in .db")
    if path.is_dir():
        if any(path.iterdir()) and not (path / "collections").is_dir():
            raise ValueError(f"`uri` is {str(path)!r}, a folder that holds no index: choose another path.")
    elif path.exists():
        raise ValueError(f"`uri` is {str(path)!r}, a file that is no index: choose another path.")
    elif not create:
        raise FileNotFoundError(f"`uri` is {str(path)!r}, where there is no index: build one first.")
    elif not path.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"`uri` is {str(path)!r}: there is no folder {str(path.absolute().parent)!r}; make it."
        )


def _words(error: Exception) -> str:
    details = getattr(error, "details", None)
    return str(getattr(error, "message", None) or (details() if callable(details) else None) or error)


def _status(error: BaseException | None) -> str:
    """The gRPC status behind an error: pymilvus tells of a wrong token as of a server that is not there."""
    from grpc import RpcError

    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, RpcError):
            return error.code().name
        seen.append(error)
        # pymilvus raises errors from themselves.
        error = error.__context__ if error.__cause__ is error else error.__cause__
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors are raised: the engine need not print them too."""
    loggers = [logging.getLogger(name) for name in ("pymilvus", "milvus_lite", "grpc")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
