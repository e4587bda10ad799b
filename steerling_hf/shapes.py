"""
What nested values of an artefact have to be, written as a value of the same form, and compared with it.

A shape is: a type, of which `object` is any; a choice of texts (a frozenset); a dictionary with the shape of each key, of which those with a question
mark need not be there, and `...` stands for any; a list with the shape of its items; a pair of a shape and None for what may
be missing; SCORE or COUNT.
"""

import math
from typing import Any

from .checks import short

# A number from 0 to 1; rounding may bring one this far beyond.
SCORE = "score"
SLACK = 1e-6
# A whole number from 0 that every reader of JSON reads exactly.
COUNT = "count"
LARGEST_WHOLE = 2**53
# Of a whole number, such as a seed.
MOST_BITS = 64


def check_shape(value: Any, shape: Any, place: str, *, exact: bool = False) -> None:
    """
    Check that nested values have a shape.

    Args:
        value: Dictionaries, lists, texts and numbers.
        shape: See this module.
        place: How errors call the value.
        exact: Whether further keys of dictionaries are refused.

    Raises:
        ValueError: They have another; the message names the place.
    """
    if isinstance(shape, tuple):
        if value is not None:
            check_shape(value, shape[0], place, exact=exact)
    elif isinstance(shape, dict):
        _check_type(value, dict, place)
        _check_keys(value, shape, place, exact)
        for key, part in shape.items():
            if key is ...:
                for name, item in value.items():
                    check_shape(item, part, f"{place}[{name!r}]", exact=exact)
            elif key.removesuffix("?") in value:
                name = key.removesuffix("?")
                check_shape(value[name], part, f"{place}[{name!r}]", exact=exact)
    elif isinstance(shape, list):
        _check_type(value, list, place)
        for number, item in enumerate(value):
            check_shape(item, shape[0], f"{place}[{number}]", exact=exact)
    elif isinstance(shape, frozenset):
        _check_type(value, str, place)
        if value not in shape:
            raise ValueError(f"`{place}` is {short(value)}, not {' or '.join(map(repr, sorted(shape)))}.")
    elif shape is SCORE:
        _check_type(value, float, place)
        if not -SLACK <= value <= 1 + SLACK:
            raise ValueError(f"`{place}` is {value!r}, not a number from 0 to 1.")
    elif shape is COUNT:
        _check_type(value, int, place)
        if not 0 <= value <= LARGEST_WHOLE:
            raise ValueError(f"`{place}` is {shown(value)}, not a whole number from 0 to 2**53.")
    elif shape is not object:
        _check_type(value, shape, place)


def _check_keys(value: dict[Any, Any], shape: dict[Any, Any], place: str, exact: bool) -> None:
    for key in shape:
        if key is not ... and not key.endswith("?") and key not in value:
            raise ValueError(f"`{place}` has no key {key!r}; it has {sorted(map(str, value))}.")
    if exact and ... not in shape:
        known = {key.removesuffix("?") for key in shape}
        for key in value:
            if key not in known:
                raise ValueError(f"`{place}` has the key {key!r}, which means nothing; it may have {sorted(known)}.")


def _check_type(value: Any, kind: type, place: str) -> None:
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"`{place}` is {shown(value)}, not of the type {kind.__name__}.")
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ValueError(f"`{place}` is a whole number of {value.bit_length()} bits; {MOST_BITS} are the most.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{place}` is {value}: only finite numbers can be kept and shown.")


def check_derived(given: Any, made: Any, place: str) -> None:
    """
    Check that values which follow from others are what follows, but for rounding.

    Args:
        given: What an artefact holds.
        made: What was made of its other values.

    Raises:
        ValueError: They differ; the message names the place.
    """
    if isinstance(made, dict) and isinstance(given, dict) and made.keys() == given.keys():
        for key, value in made.items():
            check_derived(given[key], value, f"{place}[{key!r}]")
    elif isinstance(made, list) and isinstance(given, list) and len(made) == len(given):
        for number, value in enumerate(made):
            check_derived(given[number], value, f"{place}[{number}]")
    elif isinstance(made, float) and isinstance(given, (int, float)):
        if not math.isclose(given, made, rel_tol=1e-6, abs_tol=1e-9):
            raise ValueError(f"`{place}` is {given}, but {made} follows from the other values.")
    elif given != made:
        raise ValueError(f"`{place}` is {shown(given)}, but {shown(made)} follows from the other values.")


def shown(value: Any) -> str:
    """A value and its type, as errors show them."""
    text = repr(value)
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"
