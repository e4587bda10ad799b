"""Linear layers whose weights can be packed for oneDNN, which multiplies narrow windows several times as fast on CPUs."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Packed weights are a second copy: larger models do without.
LARGEST = 2 * 2**30  # bytes
# Rows of a weight that are converted at a time.
PIECE = 8192
# Packing takes as long as ten passes or so, and saves a third to a half of each.
FEWEST_PASSES = 16


def multiply_packed(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`states @ weight.T + bias`, (..., rows), of states (..., D) and a packed weight (rows, D)."""
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


def may_use_packed(states: torch.Tensor) -> bool:
    """Whether a product with these states may be one with packed weights: they have no gradients, and are not compiled."""
    return states.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class SteerlingLinear(nn.Linear):
    """A linear layer that reads its packed weight where there is one and no gradient is wanted. Float32 in gives float32 out."""

    packed: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float32 != self.weight.dtype and not torch.is_autocast_enabled(
            self.weight.device.type
        ):
            # Asked for in full precision: a piece of the weights at a time, since a whole copy may be too large.
            product = torch.cat([hidden_states @ part.float().T for part in self.weight.split(PIECE)], dim=-1)
            return product if self.bias is None else product + self.bias.float()
        if self.packed is None or not may_use_packed(hidden_states):
            return super().forward(hidden_states)
        return multiply_packed(hidden_states, self.packed, self.bias)


@contextmanager
def packed_weights(modules: Iterable[nn.Module], passes: int) -> Iterator[None]:
    """
    Keep packed copies of linear layers and concept tables for as long as this context lasts, no longer, so that weights may change
    before and after it in any way. Nothing happens where packing cannot pay: off the CPU, in half precision (which
    torch leaves to oneDNN by itself), under autocast, for large models and for few passes.

    Args:
        modules: Hold what can be packed.
        passes: Forward passes to come.
    """
    layers = [] if passes < FEWEST_PASSES else _packable(modules)
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _packable(modules: Iterable[nn.Module]) -> list[Any]:
    layers: list[Any] = [
        layer
        for module in modules
        for layer in module.modules()
        if hasattr(layer, "packed") and layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32
    ]
    unusable = not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu")
    return [] if unusable or sum(layer.weight.nbytes for layer in layers) > LARGEST else layers


__all__ = ["SteerlingLinear", "may_use_packed", "multiply_packed", "packed_weights"]
