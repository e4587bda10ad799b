"""What is asked of arguments all over the package. Every refusal names the argument and its value, and says what will do."""

import math
import os
import reprlib
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import Any


def check_number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, above: float | None = None
) -> None:
    """
    Raise a `ValueError` that names the argument unless its value is a finite number from `low` to `high`.

    Args:
        above: A bound that the value has to exceed.
    """
    if not _is_finite(value) or not low <= value <= high or (above is not None and value <= above):
        bounds = [] if above is None else [f"above {above:g}"]
        bounds += [f"from {low:g}"] * (low > -math.inf) + [f"to {high:g}"] * (high < math.inf)
        raise ValueError(f"`{name}` is {short(value)}: give a number{' ' if bounds else ''}{' '.join(bounds)}.")


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        return False


def check_whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> None:
    """Raise a `ValueError` that names the argument unless its value is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"`{name}` is {short(value)}: give a whole number.")
    value = int(value)
    if low is not None and value < low:
        raise ValueError(f"`{name}` is {value}: choose {low} or more.")
    if high is not None and value > high:
        raise ValueError(f"`{name}` is {value}: choose {high} or less.")


def check_positive(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless its value is a whole number, 1 or more."""
    check_whole(name, value, 1)


def check_switches(**values: Any) -> None:
    """Raise a `ValueError` that names the argument unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` is {short(value)}: give True or False.")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raise a `ValueError` that names the argument unless its value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` is {short(value)}: choose from {', '.join(map(repr, choices))}.")


def check_text(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless its value is a string."""
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {short(value)}: give a string.")


def check_filled(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless its value is a string that is not empty."""
    check_text(name, value)
    if not value:
        raise ValueError(f"`{name}` is empty: give a text.")


def check_path(name: str, value: Any) -> None:
    """
    Raises:
        TypeError: The value is no path.
        ValueError: It is empty, or has a NUL character, which no path has.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`{name}` is {short(value)}: give a path.")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise TypeError(f"`{name}` is {short(value)}: give a path as a string.")
    if not path or "\0" in path:
        raise ValueError(f"`{name}` is {short(value)}: give a path that is not empty and has no NUL.")


def check_model(model: Any, name: str = "model") -> None:
    """Raise a `ValueError` that names the argument unless its value is a Steerling model, from this package or from the Hub."""
    config = getattr(model, "config", None)
    if isinstance(model, type) or not hasattr(model, "generate") or not hasattr(config, "diff_block_size"):
        raise ValueError(f"`{name}` is of the type {type(model).__name__}: give a SteerlingForDiffusionLM.")


def check_tokenizer(tokenizer: Any, name: str = "tokenizer") -> None:
    """Raise a `ValueError` that names the argument unless its value is a tokenizer."""
    if isinstance(tokenizer, type) or not callable(tokenizer):
        raise ValueError(f"`{name}` is of the type {type(tokenizer).__name__}: give the model's tokenizer.")


def check_catalog(catalog: Any) -> None:
    """Raise a `ValueError` unless the value of `catalog` is a catalog or None."""
    if catalog is not None and not (hasattr(catalog, "fit") and hasattr(catalog, "group")):
        raise ValueError(f"`catalog` is of the type {type(catalog).__name__}: give a ConceptCatalog, or None.")


def check_trace(trace: Any) -> None:
    """Raise a `ValueError` unless the value of `trace` says how a row was written."""
    if not all(hasattr(trace, name) for name in ("tokens", "step_map", "prompt_length")):
        raise ValueError(
            f"`trace` is of the type {type(trace).__name__}: give one of `traces` of generate(..., return_dict_in_generate=True)."
        )


def check_texts(name: str, value: Any) -> None:
    """Raise a `ValueError` that names the argument unless its value is a collection of strings, and no string itself."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(f"`{name}` is {short(value)}: give a list of strings.")
    for text in value:
        if not isinstance(text, str):
            raise ValueError(f"`{name}` has {short(text)}: give strings.")


def short(value: Any) -> str:
    """A value as errors show it."""
    return reprlib.repr(value) if not isinstance(value, str) or len(value) > 200 else repr(value)
