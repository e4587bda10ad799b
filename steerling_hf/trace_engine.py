"""The engine of an index: a Milvus server, or Milvus Lite embedded in this process, which keeps a folder of files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# The embedded engine accepts any other name, reports the index as finished and does not build it.
EMBEDDED_KINDS = ("FLAT", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8")
# pymilvus asks every 10 seconds whether the server is there, and servers hang up on who asks so often.
PATIENCE = {"grpc.keepalive_time_ms": 600_000}
DENIED = ("UNAUTHENTICATED", "PERMISSION_DENIED")


class TraceEngine:
    """
    A connection, and what its errors mean.

    Args:
        uri: "http://host:19530" or https, a server; or a path that ends in ".db", which the embedded engine makes a folder.
        token: The server's token, or "user:password".
        timeout: Seconds to wait for a server.
        create: Make the folder of an embedded engine if there is none.

    Attributes:
        client: pymilvus' client; another one after `reopen`.
        path: The folder of an engine that is embedded here.
        lite: Whether the engine is Milvus Lite, here or behind a server.

    Raises:
        ImportError: The extra `trace` is not installed.
        FileNotFoundError: There is no such folder, or none to create it in.
        ConnectionError: The server does not answer.
        PermissionError: The server does not accept the token.
        ValueError: `uri` is neither, or what lies there is no index or is damaged.
    """

    def __init__(self, uri: str, token: str | None, timeout: float, create: bool):
        try:
            from grpc import RpcError
            from pymilvus import MilvusException
        except ImportError as error:
            raise ImportError("An index of documents needs Milvus: pip install 'steerling-hf[trace]'") from error
        self.path = None if "://" in uri else Path(uri)
        # Without the slash that shells put behind a folder's name, which pymilvus does not take.
        self.uri = uri if self.path is None else str(self.path)
        # Some calls raise the errors of gRPC as they are.
        self._errors = (MilvusException, RpcError)
        self._options = {"token": token or "", "timeout": timeout, "grpc_options": PATIENCE}
        if self.path is not None:
            _check_path(self.path, create)
        self._connect()

    def _connect(self) -> None:
        from pymilvus import MilvusClient

        try:
            with _quiet():
                self.client = MilvusClient(self.uri, **self._options)
                version = self.client.get_server_version()
        except self._errors as error:
            raise self._refusal(error) from error
        self.lite = "lite" in version.lower()

    def close(self) -> None:
        """Disconnect; an embedded engine writes what it has to disk, and other processes may open it."""
        self.client.close()
        if self.path is not None:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(str(self.path))

    def reopen(self) -> None:
        """Close and connect again: the only way to have the embedded engine let go of what it has in memory."""
        self.close()
        self._connect()

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

    @contextmanager
    def asking(self, doing: str) -> Iterator[None]:
        """The engine's errors in this block, as what could not be done and why."""
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
