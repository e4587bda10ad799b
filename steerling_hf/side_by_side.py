"""Texts beside each other on a terminal."""

import shutil
import textwrap
from collections.abc import Mapping
from itertools import zip_longest

GAP = "  |  "


def side_by_side(texts: Mapping[str, str], width: int | None = None) -> str:
    """
    Columns of equal width under their titles.

    Args:
        texts: By title, from left to right.
        width: Of all columns together, in characters; by default that of the terminal.
    """
    whole = width or shutil.get_terminal_size((100, 24)).columns
    column = max(16, (whole - len(GAP) * (len(texts) - 1)) // len(texts))
    columns = []
    for title, text in texts.items():
        lines = [line for part in text.splitlines() for line in textwrap.wrap(part, column) or [""]]
        columns.append([*textwrap.wrap(title, column), "-" * column, *lines])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(GAP.join(line.ljust(column) for line in row).rstrip() for row in rows)
