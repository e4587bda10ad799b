"""What is asked of arguments all over the package."""

import operator
from typing import Any


def check_positive(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless its value is a whole number of 1 or more."""
    try:
        whole = not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        raise ValueError(f"`{name}` is {value!r:.200}: give a whole number of 1 or more.") from None
    if not whole:
        raise ValueError(f"`{name}` is {value}: choose 1 or more.")


def check_text(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless its value is a text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"`{name}` is {value!r:.200}: give a text that is not empty.")
