"""The engine of an index: a Milvus server, or Milvus Lite embedded in this process, which keeps a folder of files."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from .trace_address import REMEDY, Address, read_address

T = TypeVar("T")

# The embedded engine accepts any other name, reports the index as finished and does not build it.
EMBEDDED_KINDS = ("FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8")
# pymilvus asks every 10 seconds whether the server is there, and servers hang up on who asks so often.
PATIENCE = {"grpc.keepalive_time_ms": 600_000}
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
# Characters of an engine's own words that a message has.
WORDS = 500


class TraceEngine:
    """
    A connection, and what its errors mean. Of a file there is one in a process at most, which whoever opens the file shares (see
    `open_engine`): the embedded engine has one server for each folder.

    Args:
        uri: "http://host:19530" or https, a server; or a path that ends in ".db", which the embedded engine makes a folder; or an
            `Address`.
        token: The server's token, or "user:password".
        timeout: Seconds to wait for a server.
        create: Make the folder of an embedded engine if there is none.

    Attributes:
        client: pymilvus' client; another one after `reopen`.
        path: The folder of an engine that is embedded here.
        lite: Whether the engine is Milvus Lite, here or behind a server.
        lock: Held by whoever needs several answers that belong together.
        loaded: Collections that are ready to be searched.
        generation: Counts the times that everything was taken out of the engine's memory.
        stores: What is known of its collections, which all share.

    Raises:
        ImportError: The extra `trace` is not installed.
        FileNotFoundError: There is no such folder, or none to create it in.
        ConnectionError: The server does not answer.
        PermissionError: The server does not accept the token.
        ValueError: `uri` is neither, or what lies there is no index or is damaged.
    """

    def __init__(self, uri: Any, token: str | None, timeout: float, create: bool):
        try:
            from grpc import RpcError
            from pymilvus import MilvusException
        except ImportError as error:
            raise ImportError("An index of documents needs Milvus: pip install 'steerling-hf[trace]'") from error
        self._address = read_address(uri, token)
        self.uri = self._address.shown
        self.path = self._address.path
        # Some calls raise the errors of gRPC as they are.
        self._errors = (MilvusException, RpcError)
        self._options = {"timeout": timeout, "grpc_options": PATIENCE}
        self.lock = threading.RLock()
        self.loaded: set[str] = set()
        self.generation = 0
        self.stores: dict[str, Any] = {}
        self.closed = False
        self._users = 1
        if self.path is not None:
            _check_path(self.path, self.uri, create)
        self._connect()

    def _connect(self) -> None:
        from pymilvus import MilvusClient

        refusal: Exception
        try:
            with _quiet():
                self.client = MilvusClient(self._address.uri, token=self._address.token, **self._options)
                version = self.client.get_server_version()
        except self._errors as error:
            refusal, cause = self._refusal(error), error
        else:
            self.lite = "lite" in version.lower()
            return
        raise refusal from self._shown(cause)

    def hold(self) -> None:
        """Keep the engine open until `release`, whoever else closes it."""
        with _OPENING:
            self._users += 1

    def release(self) -> None:
        """
        Have no more use for it. With its last user it disconnects; an embedded engine writes what it has to disk, and other
        processes may open it.
        """
        with _OPENING:
            self._users -= 1
            if self._users or self.closed:
                return
            self.closed = True
            if self.path is not None and _OPEN.get(self.path.resolve()) is self:
                del _OPEN[self.path.resolve()]
            with self.lock:
                self._disconnect()

    def _disconnect(self) -> None:
        self.generation += 1
        self.loaded.clear()
        self.client.close()
        if self.path is not None:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(str(self.path))

    def reopen(self) -> None:
        """Close and connect again: the only way to have the embedded engine let go of what it has in memory."""
        with self.lock:
            self._disconnect()
            self._connect()

    def one_by_one(self) -> AbstractContextManager[Any]:
        """What the embedded engine is asked, in turns: it may be reopened between two questions. Servers answer many at once."""
        return nullcontext() if self.path is None else self.lock

    def check_index(self, kind: str) -> None:
        """
        Refuse what would not be built.

        Raises:
            ValueError: Milvus Lite does not build this kind.
        """
        if self.lite and kind not in EMBEDDED_KINDS:
            raise ValueError(
                f"`index` is {kind!r}: the embedded engine at {self.uri!r} builds {', '.join(EMBEDDED_KINDS)}; other kinds "
                f"need a Milvus cluster."
            )

    def ask(self, doing: str, question: Callable[[Any], T]) -> T:
        """
        The answer to a question.

        Args:
            doing: What could not be done if it fails.
            question: Asks pymilvus' client.

        Raises:
            PermissionError: The token does not allow it.
            ConnectionError: The server is gone.
            ValueError: Anything else, in the engine's words.
        """
        refusal: Exception
        try:
            with _quiet(), self.one_by_one():
                return question(self.client)
        except self._errors as error:
            refusal, cause = self._failure(doing, error), error
        # Not inside `except`, where the error that may name a secret would be the context of this one.
        raise refusal from self._shown(cause)

    def _failure(self, doing: str, error: Exception) -> Exception:
        words = self._words(error)
        if _status(error) in DENIED:
            return PermissionError(f"`token` does not allow to {doing} at {self.uri!r}: {words}")
        if "server unavailable" in words and self.path is not None:
            return ConnectionError(
                f"`uri` is {self.uri!r}, whose embedded engine has stopped in this process: close() the index, and it opens "
                f"again when it is asked."
            )
        if "server unavailable" in words:
            return ConnectionError(
                f"`uri` is {self.uri!r}, where no Milvus server answers any more: start it and try again."
            )
        return ValueError(f"{self.uri!r} cannot {doing}: {words}")

    def _refusal(self, error: Exception) -> Exception:
        words = self._words(error)
        if self.path is not None:
            return ValueError(
                f"`uri` is {self.uri!r}, which cannot be opened ({words}): another process has it open, or it is "
                f"damaged. Close the other one, or build the index anew."
            )
        if _status(error) in DENIED or "auth check failure" in words:
            return PermissionError(f"`token` is not accepted by {self.uri!r}: give the server's, or 'user:password'.")
        if "illegal, needs start" in words:
            return ValueError(f"`uri` is {self.uri!r}: {REMEDY}.")
        return ConnectionError(
            f"`uri` is {self.uri!r}, where no Milvus server answers: start one, or check the address."
        )

    def _words(self, error: Exception) -> str:
        details = getattr(error, "details", None)
        words = str(getattr(error, "message", None) or (details() if callable(details) else None) or error)
        words = self._address.hide(words)
        return words if len(words) <= WORDS else f"{words[:WORDS]}..."

    def _shown(self, error: Exception) -> Exception | None:
        """The error, unless it could tell a secret."""
        return None if self._address.token else error


# The engines of files that are open in this process.
_OPEN: dict[Path, TraceEngine] = {}
_OPENING = threading.RLock()


def open_engine(uri: Any, token: str | None, timeout: float, create: bool) -> TraceEngine:
    """The `TraceEngine` of these arguments, of a file the one that there is; to be given back by `release`."""
    address: Address = read_address(uri, token)
    if address.path is None:
        return TraceEngine(uri, token, timeout, create)
    with _OPENING:
        # One folder may have many names.
        place = address.path.resolve()
        if (engine := _OPEN.get(place)) is not None:
            engine.hold()
            if not engine.closed:
                return engine
        _OPEN[place] = engine = TraceEngine(uri, token, timeout, create)
        return engine


def _check_path(path: Path, shown: str, create: bool) -> None:
    try:
        if path.is_dir():
            if any(path.iterdir()) and not (path / "collections").is_dir():
                raise ValueError(f"`uri` is {shown!r}, a folder that holds no index: choose another path.")
        elif path.exists() or path.is_symlink():
            raise ValueError(f"`uri` is {shown!r}, a file that is no index: choose another path.")
        elif not create:
            raise FileNotFoundError(f"`uri` is {shown!r}, where there is no index: build one first.")
        elif not path.parent.is_dir():
            raise FileNotFoundError(f"`uri` is {shown!r}: there is no folder {str(path.parent)!r}; make it.")
    except PermissionError as error:
        raise PermissionError(f"`uri` is {shown!r}, which may not be read: change its permissions.") from error
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"`uri` is {shown!r}, which is no path of a folder ({error.strerror}).") from error


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


LOGGERS = tuple(logging.getLogger(name) for name in ("pymilvus", "milvus_lite", "grpc"))
SILENT = logging.CRITICAL + 1


class _Silence:
    """Levels of loggers, and how many threads want these silent."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.wanted = 0
        self.levels: list[int] = []

    def begin(self) -> None:
        with self.lock:
            if not self.wanted:
                self.levels = [logger.level for logger in LOGGERS]
                for logger in LOGGERS:
                    logger.setLevel(SILENT)
            self.wanted += 1

    def end(self) -> None:
        with self.lock:
            self.wanted -= 1
            if not self.wanted:
                for logger, level in zip(LOGGERS, self.levels):
                    if logger.level == SILENT:  # else somebody has set another one since
                        logger.setLevel(level)


_SILENCE = _Silence()


@contextmanager
def _quiet() -> Iterator[None]:
    """Errors are raised: the engine need not print them too. Levels return when the last thread leaves."""
    _SILENCE.begin()
    try:
        yield
    finally:
        _SILENCE.end()


__all__ = ["EMBEDDED_KINDS", "TraceEngine", "open_engine"]
