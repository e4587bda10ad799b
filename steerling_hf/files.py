"""Files that are whole or not there, and what is asked of their names and lines."""

import json
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def write_json(target: Path, values: Any, indent: int | None = None) -> Path:
    """
    Write values as JSON in UTF-8, whole or not at all.

    Raises:
        ValueError: They have a number that is not finite, which JSON cannot hold.
    """
    try:
        text = json.dumps(values, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{str(target)!r} cannot be written: {error}; every number has to be finite.") from error
    # A lone surrogate, as a decoded text may have, is written as its escape.
    return write_whole(target, re.sub("[\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def check_format(values: Any, version: int, what: str) -> None:
    """
    Raises:
        ValueError: Values are not an object, or one of another format than this version reads.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"it is a {type(values).__name__} in place of an object with named values.")
    found = values.get("format")
    if type(found) is not int or found != version:
        raise ValueError(f"`format` of the {what} is {found!r}, and this version reads {version}.")


def read_artefact(path: Path, what: str, parse: Callable[[Any], Artefact]) -> Artefact:
    """
    What a JSON file holds.

    Args:
        path: The file.
        what: It should hold, for the error.
        parse: Makes it of the file's values.

    Raises:
        ValueError: It holds something else; the message names the file, and what is wrong in it.
    """
    with reading_artefact(path, what):
        return parse(parse_json(path.read_bytes()))


@contextmanager
def reading_artefact(path: Path, what: str) -> Iterator[None]:
    """
    Whatever is wrong with an artefact while this context lasts, the error names its file.

    Raises:
        ValueError: The file cannot be read, or what is in it is not what it should be.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); give a file with a {what}.") from error
    except RecursionError as error:
        raise ValueError(f"{str(path)!r} holds no {what}: its values are nested too deeply.") from error
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{str(path)!r} holds no {what}: {error!r}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} holds no {what}: it is not in UTF-8 ({error}).") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{str(path)!r} holds no {what}: {error}") from error


def parse_json(content: str | bytes) -> Any:
    """
    The value of a JSON text, in UTF-8 if it is bytes.

    Raises:
        ValueError: It is not JSON, an object has a key twice, or a number is not finite.
        RecursionError: It is nested too deeply.
    """
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number, parse_float=_finite)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {twice!r} twice; leave one of them out.")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"it has {name}, which is no number; write a finite one, or null.")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has the number {text}, which is too large; write a finite one.")
    return value


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
        ValueError: A line is not JSON, has a number that is not finite, a key twice or too many levels; or the file is not in
            UTF-8 (`UnicodeDecodeError`).
    """
    # With a signature or without: spreadsheets write one.
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, parse_json(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): correct it or leave it out."
                ) from error
