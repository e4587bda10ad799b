"""The address of an index: what to connect to, with what, and how it may be shown."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
SCHEME = re.compile(r"\w+:/+")
QUERY = re.compile(r"([?&;][^=&;#]*)=[^&;#]*")
REMEDY = "give http://host:port, https://host:port or a path ending in .db"


@dataclass(frozen=True)
class Address:
    """
    Where an index is.

    Args:
        shown: As messages, files and logs may have it: without a password.
        uri: What to connect to, without user and password.
        path: The folder of an embedded engine, wherever the program's working folder is later; `None` for a server.
        token: What a server asks for, "" for nothing.
    """

    shown: str
    uri: str
    path: Path | None
    token: str = field(default="", repr=False)

    def hide(self, text: str) -> str:
        """The text without what must stay secret."""
        for secret in self._secrets():
            text = text.replace(secret, HIDDEN)
        return text

    def _secrets(self) -> list[str]:
        if not self.token:
            return []
        # The longest first, which hold the others. This is how the token travels.
        return [base64.b64encode(self.token.encode()).decode(), self.token, self.token.partition(":")[2] or self.token]


def read_address(uri: Any, token: Any = None) -> Address:
    """
    Args:
        uri: A path that ends in ".db", or "http://host:port", also with "user:password@" before the host; or an `Address`.
        token: A server's token, or "user:password".

    Raises:
        TypeError: One is no text.
        ValueError: The address is empty or has characters that none has, or names a user beside a token.
    """
    if isinstance(uri, Address):
        return uri
    if not isinstance(uri, str | os.PathLike) or isinstance(given := os.fspath(uri), bytes):
        raise TypeError(f"`uri` is a {type(uri).__name__}: {REMEDY}.")
    if not isinstance(token, str | None):
        raise TypeError(f"`token` is a {type(token).__name__}: give the server's token as text, or 'user:password'.")
    shown = redacted(given)
    if not given or re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", given):
        raise ValueError(f"`uri` is {shown!r}: {REMEDY}.")
    if token is not None and re.search(r"[\r\n\x00]", token):
        raise ValueError("`token` has control characters in it: give it without line ends.")
    if "://" not in given:
        path = Path(given)
        if path.suffix != ".db":
            raise ValueError(f"`uri` is {shown!r}: {REMEDY}.")
        return Address(redacted(str(path)), str(path.absolute()), path.absolute(), token or "")
    scheme, _, rest = given.partition("://")
    user, at, host = rest.rpartition("@")
    if at and token:
        raise ValueError(f"`token` is given, and `uri` ({shown!r}) names a user as well: leave one of them out.")
    name, colon, password = user.partition(":")
    return Address(shown, f"{scheme}://{host}", None, token or unquote(name) + colon + unquote(password))


def redacted(uri: str) -> str:
    """An address without its password; "http://user:***@host"."""
    prefix = SCHEME.match(uri)
    start = prefix.end() if prefix else 0
    user, at, host = uri[start:].rpartition("@")
    name, colon, _ = user.partition(":")
    if not prefix and (not colon or name.startswith(("/", ".")) or os.sep in name):
        return uri  # a path
    if at:
        uri = uri[:start] + (f"{name}:{HIDDEN}@" if colon else f"{HIDDEN}@") + host
    return QUERY.sub(rf"\1={HIDDEN}", uri) if prefix else uri


__all__ = ["Address", "read_address", "redacted"]
