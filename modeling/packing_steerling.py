"""Linear layers whose weights can be packed for oneDNN, which multiplies narrow windows several times as fast on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Packed weights are a second copy: larger models do without.
LARGEST = 2 * 2**30  # bytes
# Rows of a weight that are converted at a time.
PIECE = 8192
# Packing takes as long as ten passes or so, and saves a third to a half of each.
FEWEST_PASSES = 16


class SteerlingLinear(nn.Linear):
    """A linear layer that reads its packed weight where there is one and no gradient is wanted. Float32 in gives float32 out."""

    packed: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float32 != self.weight.dtype and not torch.is_autocast_enabled(
            self.weight.device.type
        ):
            # Asked for in full precision: a piece of the weights at a time, since a whole copy may be too large.
            return torch.cat([hidden_states @ part.float().T for part in self.weight.split(PIECE)], dim=-1)
        packed = self.packed
        if packed is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(hidden_states)
        return torch.ops.mkldnn._linear_pointwise(hidden_states, packed, self.bias, "none", [], "")


@contextmanager
def packed_weights(model: nn.Module, passes: int) -> Iterator[None]:
    """
    Keep packed copies of a model's linear layers for as long as this context lasts, no longer, so that weights may change
    before and after it in any way. Nothing happens where packing cannot pay: off the CPU, in half precision (which
    torch leaves to oneDNN by itself), under autocast, for large models and for few passes.

    Args:
        model: Holds `SteerlingLinear`s.
        passes: Forward passes to come.
    """
    layers = [] if passes < FEWEST_PASSES else _packable(model)
    try:
        for layer in layers:
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
        yield
    finally:
        for layer in layers:
            layer.packed = None


def _packable(model: nn.Module) -> list[SteerlingLinear]:
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, SteerlingLinear)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    ]
    unusable = not torch.backends.mkldnn.is_available() or torch.is_autocast_enabled("cpu")
    return [] if unusable or sum(layer.weight.nbytes for layer in layers) > LARGEST else layers


__all__ = ["SteerlingLinear", "packed_weights"]
