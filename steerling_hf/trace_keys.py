"""Keys of the full parts of an index on a file, so that a part need not be read into memory to know what it has."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path


class KeyFile:
    """
    A file of keys, made when it is first needed. It holds nothing that the parts do not: it can be deleted and made anew.

    Args:
        path: The file.
    """

    def __init__(self, path: Path):
        self.path = path

    def parts(self) -> set[str]:
        """Names of the parts whose keys are noted."""
        with self._open() as keys:
            return {name for (name,) in keys.execute("SELECT name FROM parts")}

    def note(self, part: str, pages: Iterable[Sequence[str]]) -> None:
        """Note the keys of a part, all of them or none."""
        with self._open() as keys, keys:
            for page in pages:
                keys.executemany("INSERT OR IGNORE INTO keys VALUES (?)", [(key,) for key in page])
            keys.execute("INSERT OR IGNORE INTO parts VALUES (?)", (part,))  # a build may have been killed behind it

    def present(self, ids: Sequence[str]) -> set[str]:
        """Which of these keys are noted."""
        with self._open() as keys:
            return {key for key in ids if keys.execute("SELECT 1 FROM keys WHERE id = ?", (key,)).fetchone()}

    def forget(self) -> None:
        """Delete the file: what it tells of is gone."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path)) as keys:
                keys.execute("CREATE TABLE IF NOT EXISTS keys (id TEXT PRIMARY KEY) WITHOUT ROWID")
                keys.execute("CREATE TABLE IF NOT EXISTS parts (name TEXT PRIMARY KEY) WITHOUT ROWID")
                yield keys
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{str(self.path)!r} cannot be read ({error}): delete it, a build makes it anew."
            ) from error
