"""Which chunks a search may find."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from .trace_documents import as_unicode

# All that a string of the engine's language cannot hold as it is. Other control characters it takes only so.
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})
FIELDS = ("source", "text")
INTEGERS = range(-(2**63), 2**63)


def expression(where: str | Mapping[str, Any] | None) -> str:
    """
    A filter as the engine reads it.

    Args:
        where: Values by field, of which all must be equal, or, if a list is given, in that list: "source", "text", or any
            field of the metadata. Or an expression in Milvus' own language (`metadata["year"] > 2020`).

    Raises:
        ValueError: It is neither, or a value is not a string, a number, a truth value or a list of these.
    """
    if where is None:
        return ""
    if isinstance(where, str):
        if not _is_unicode(where):
            raise ValueError(f"`where` is {where!r:.200}, which has lone surrogates: UTF-8 has none, leave them out.")
        return where
    if not isinstance(where, Mapping):
        raise ValueError(
            f"`where` is {where!r:.200}: give values by field, such as {{'year': 2020}}, or an expression."
        )
    parts = []
    for name, value in where.items():
        if not isinstance(name, str) or not _is_unicode(name):
            raise ValueError(f"`where` has the field {name!r:.200}: give the name of a field as text.")
        place = name if name in FIELDS else f"metadata[{_literal(name)}]"
        # Not `in`, which the embedded engine does not take of fields of the metadata.
        equal = [f"{place} == {_value(name, one)}" for one in _values(name, value)]
        parts.append(equal[0] if len(equal) == 1 else f"({' or '.join(equal)})")
    return " and ".join(parts)


def _values(name: str, value: Any) -> list[Any]:
    several = isinstance(value, list | tuple | set | frozenset)
    # NumPy's numbers as Python's, which JSON knows.
    values = [one.item() if getattr(one, "ndim", None) == 0 else one for one in (value if several else [value])]
    if not values or not all(isinstance(one, str | bool | int | float) for one in values):
        raise ValueError(f"`where` has {value!r:.200} for {name!r}: give a string, a number, or a list of these.")
    return values


def _value(name: str, value: Any) -> str:
    if isinstance(value, str):
        # Documents are kept so.
        value = as_unicode(value) if name in FIELDS else value
        if not _is_unicode(value):
            raise ValueError(f"`where` has {value!r:.200} for {name!r}: UTF-8 has no lone surrogates, leave them out.")
        return _literal(value)
    if name in FIELDS:
        raise ValueError(f"`where` has {value!r} for {name!r}, which is text: give a string.")
    if not isinstance(value, bool) and (value not in INTEGERS if isinstance(value, int) else not math.isfinite(value)):
        raise ValueError(f"`where` has {value!r:.200} for {name!r}: give a finite number, a whole one within 64 bits.")
    return json.dumps(value)


def _literal(text: str) -> str:
    """A string in the engine's language."""
    return f'"{text.translate(ESCAPES)}"'


def _is_unicode(text: str) -> bool:
    return as_unicode(text) == text
