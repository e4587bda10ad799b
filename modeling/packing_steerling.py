"""Weights that can be packed for oneDNN, which multiplies narrow windows several times as fast on CPUs."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Packed weights are a second copy: what is larger does without.
LARGEST = 2 * 2**30  # bytes
# Rows of a weight that are converted at a time.
PIECE = 8192
# Packing takes as long as ten passes or so, and saves a third to a half of each.
FEWEST_PASSES = 16
# Of tables that may be wanted at every pass or at none, nobody knows in advance whether packing will pay. After so many
# products it would have, and most likely will.
PRODUCTS_UNPACKED = 8
PACKING = ("packed", "products_unpacked")
# Another thread's call may end meanwhile.
_LOCK = threading.Lock()


def multiply_packed(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`states @ weight.T + bias`, (..., rows), of states (..., D) and a packed weight (rows, D)."""
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


def may_use_packed(states: torch.Tensor) -> bool:
    """Whether a product with these states may be one with packed weights: they have no gradients, and are not compiled."""
    return states.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Packable(nn.Module):
    """A module whose weight can be packed."""

    weight: torch.Tensor
    packed: torch.Tensor | None = None
    # Products that are made before the weight is packed; never, if None.
    products_unpacked: int | None = None

    def packed_for(self, states: torch.Tensor) -> torch.Tensor | None:
        """The packed weight for a product with these states, None if it is one for the weight as it is."""
        if not may_use_packed(states):
            return None
        packed = self.packed
        if packed is not None or self.products_unpacked is None:
            return packed
        with _LOCK:
            if self.packed is None and self.products_unpacked is not None:
                if self.products_unpacked == 0:
                    self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
                else:
                    self.products_unpacked -= 1
            return self.packed

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are without what is packed for a call of generate."""
        return {key: value for key, value in super().__getstate__().items() if key not in PACKING}


class SteerlingLinear(Packable, nn.Linear):
    """A linear layer that reads its packed weight where there is one and no gradient is wanted. Float32 in gives float32 out."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype == torch.float32 != self.weight.dtype and not torch.is_autocast_enabled(
            self.weight.device.type
        ):
            # Asked for in full precision: a piece of the weights at a time, since a whole copy may be too large.
            product = torch.cat([hidden_states @ part.float().T for part in self.weight.split(PIECE)], dim=-1)
            return product if self.bias is None else product + self.bias.float()
        packed = self.packed_for(hidden_states)
        return super().forward(hidden_states) if packed is None else multiply_packed(hidden_states, packed, self.bias)


@contextmanager
def packed_weights(always: nn.Module, perhaps: Iterable[nn.Module], passes: int) -> Iterator[None]:
    """
    Use packed copies of weights for as long as this context lasts, no longer, so that weights may change before and after it
    in any way. Nothing happens where packing cannot pay: off the CPU, in half precision (which torch leaves to oneDNN by
    itself), under autocast, for modules that are too large and for few passes; and nothing more for what another call, around
    this one or in another thread, has packed.

    Args:
        always: What every pass runs.
        perhaps: What passes may run, or not; packed when it has been wanted `PRODUCTS_UNPACKED` times.
        passes: Forward passes to come.
    """
    left, packable = LARGEST, []
    if passes >= FEWEST_PASSES and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        for module in (always, *perhaps):
            layers = _packable(module)
            needed = sum(layer.weight.nbytes for layer in layers)
            if needed <= left:
                left -= needed
                packable += layers
                for layer in layers:
                    layer.products_unpacked = 0 if module is always else PRODUCTS_UNPACKED
    try:
        yield
    finally:
        with _LOCK:
            for layer in packable:
                layer.packed = layer.products_unpacked = None


def _packable(module: nn.Module) -> list[Packable]:
    return [
        layer
        for layer in module.modules()
        if isinstance(layer, Packable)
        and layer.products_unpacked is None
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
    ]


__all__ = ["Packable", "SteerlingLinear", "multiply_packed", "packed_weights"]
