"""Which chunks a search may find."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def expression(where: str | Mapping[str, Any] | None) -> str:
    """
    A filter as the engine reads it.

    Args:
        where: Values by field, of which all must be equal, or, if a list is given, in that list: "source", "text", or any
            field of the metadata. Or an expression in Milvus' own language (`metadata["year"] > 2020`).

    Raises:
        ValueError: It is neither, or a value is not a string, a number, a truth value or a list of these.
    """
    if where is None or isinstance(where, str):
        return where or ""
    if not isinstance(where, Mapping):
        raise ValueError(f"`where` is {where!r}: give values by field, such as {{'year': 2020}}, or an expression.")
    parts = []
    for name, value in where.items():
        several = isinstance(value, list | tuple | set)
        # NumPy's numbers as Python's, which JSON knows.
        values = [one.item() if getattr(one, "ndim", None) == 0 else one for one in (value if several else [value])]
        if not values or not all(isinstance(one, str | bool | int | float) for one in values):
            raise ValueError(f"`where` has {value!r} for {name!r}: give a string, a number, or a list of these.")
        place = name if name in ("source", "text") else f"metadata[{json.dumps(name, ensure_ascii=False)}]"
        # Not `in`, which the embedded engine does not take of fields of the metadata.
        equal = [f"{place} == {json.dumps(one, ensure_ascii=False)}" for one in values]
        parts.append(equal[0] if len(equal) == 1 else f"({' or '.join(equal)})")
    return " and ".join(parts)
