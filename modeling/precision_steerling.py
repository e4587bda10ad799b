"""Products in full precision with weights that are kept in half of it."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Rows of a weight that are converted at a time, since a whole copy may be too large.
PIECE = 8192


class _FullPrecision(TorchFunctionMode):
    """Linear products of float32 states with half-precision weights are float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (_linear if func is nn.functional.linear else func)(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if input.dtype != torch.float32 or weight.dtype == torch.float32 or not weight.is_floating_point():
        return nn.functional.linear(input, weight, bias)
    if type(weight) not in (torch.Tensor, nn.Parameter):  # quantised, for states of its own type
        return nn.functional.linear(input.to(weight.dtype), weight, bias).float()
    product = torch.cat([nn.functional.linear(input, part.float()) for part in weight.split(PIECE)], dim=-1)
    return product if bias is None else product + bias.float()


def in_full_precision(layer: Callable, states: torch.Tensor) -> torch.Tensor:
    """
    What a linear layer makes of states, computed in float32 although its weights may be kept in half precision. Quantised
    weights are used as the layer itself uses them.

    Args:
        layer: The layer, or its `forward` where hooks are to be left out.
        states: (..., D), any dtype.

    Returns:
        (..., rows), float32.
    """
    kind = states.device.type
    with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext(), _FullPrecision():
        return layer(states.float()).float()


__all__ = ["in_full_precision"]
