"""Files that are whole or not there, and what is asked of their names and lines."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Artefact = TypeVar("Artefact")


def check_file(path: str | os.PathLike, endings: Sequence[str]) -> Path:
    """
    The path, if something can be saved there.

    Args:
        path: What was asked for.
        endings: What it can be saved as.

    Raises:
        ValueError: It has none of these endings.
        FileNotFoundError: Its folder does not exist.
    """
    target = Path(path)
    if target.suffix not in endings:
        raise ValueError(f"`path` is {str(path)!r}: choose a name that ends in {', '.join(endings)}.")
    return check_folder(target)


def check_folder(target: Path) -> Path:
    """
    The path, if a file can be saved there.

    Raises:
        FileNotFoundError: Its folder does not exist.
    """
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"`path` is {str(target)!r}, but there is no folder {str(target.parent)!r}: make it first."
        )
    return target


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A temporary name to write a file under, which is renamed at the end of the block: whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging:
        whole = Path(staging) / target.name
        yield whole
        whole.replace(target)


def write_whole(target: Path, text: str) -> Path:
    """Write a text as UTF-8, whole or not at all."""
    with whole_file(target) as whole:
        whole.write_text(text, encoding="utf-8")
    return target


def read_artefact(path: Path, what: str, parse: Callable[[Any], Artefact]) -> Artefact:
    """
    What a JSON file holds.

    Args:
        path: The file.
        what: It should hold, for the error.
        parse: Makes it of the file's values.

    Raises:
        ValueError: It holds something else.
    """
    try:
        return parse(json.loads(path.read_bytes()))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} holds no {what}: {error!r}.") from error


def parquet_library(purpose: str, extra: str = "concepts") -> Any:
    """
    pyarrow with its `parquet`, which few need.

    Args:
        purpose: What needs it, for the error.
        extra: The extra of this package that brings it.

    Raises:
        ImportError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{purpose} needs pyarrow: pip install 'steerling-hf[{extra}]'") from error
    return pyarrow


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """
    The values of a JSONL file, each behind the number of its line, from 1. Empty lines are left out.

    Raises:
        ValueError: A line is not JSON, or the file is not in UTF-8 (`UnicodeDecodeError`).
    """
    # With a signature or without: spreadsheets write one.
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): correct it or leave it out."
                ) from error
