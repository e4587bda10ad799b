"""Steering operations of files: whatever is read could be attached to some model."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from .modeling.configuration_steerling import SteerlingConfig
from .modeling.steering_steerling import Operation, operation_from_dict


def read_operations(values: Sequence[Mapping[str, Any]], place: str) -> tuple[Operation, ...]:
    """
    The operations of a list of `Operation.to_dict`.

    Args:
        place: How errors call the list.

    Raises:
        ValueError: A value is one that no model takes. Whether a concept, token or layer exists depends on the model, and is
            checked when the operation is attached to one.
    """
    found = []
    for number, value in enumerate(values):
        try:
            operation = operation_from_dict(dict(value))
            operation.check(_largest())
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"`{place}[{number}]` is no operation: {error}") from error
        found.append(operation)
    return tuple(found)


@cache
def _largest() -> SteerlingConfig:
    """A model that has whatever a model could have."""
    most = 2**31
    return SteerlingConfig(
        vocab_size=most, n_layers=10**6, n_concepts=most, n_unknown_concepts=most, block_size=most, diff_block_size=64
    )
