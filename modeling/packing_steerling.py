"""Weights packed for oneDNN, which multiplies narrow windows several times as fast on CPUs, for the time of one call."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .quantized_steerling import is_opaque, multiply_opaque

# Packed weights are a second copy: what is larger does without.
LARGEST = 2 * 2**30  # bytes
# Packing takes as long as ten passes or so, and saves a third to a half of each.
FEWEST_PASSES = 16
# Of tables that may be wanted at every pass or at none, nobody knows in advance whether packing will pay. After so many
# products it would have, and most likely will.
PRODUCTS_UNPACKED = 8
# What can make the call of a linear layer more than its product.
_ATTACHMENTS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Packed:
    """A weight and its packed copy, which calls that run at the same time share."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight  # held, so that no other tensor gets its identity
        self.copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach())


class _Packs:
    """
    What one call of generate packs. Which of its products are packed depends on this call alone, whatever other calls do
    meanwhile: packed and plain products differ in their last bits.
    """

    def __init__(self) -> None:
        # Products of each weight, by its identity, before it is packed.
        self.waiting: dict[int, tuple[torch.Tensor, int]] = {}
        self.packed: dict[int, _Packed] = {}

    def packed_copy(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The packed copy for the next product with a weight, `None` if that is a plain one."""
        key = id(weight)
        packed = self.packed.get(key)
        if packed is None and key in self.waiting:
            own, left = self.waiting[key]
            if left:
                self.waiting[key] = (own, left - 1)
            else:
                del self.waiting[key]
                packed = self.packed[key] = _shared(own)
        return None if packed is None else packed.copy


# The packs of the innermost call of generate in this thread.
_PRESENT: ContextVar[_Packs | None] = ContextVar("steerling_packs", default=None)
# What calls in all threads have packed, by the weight's identity and version; gone with the last call that uses it.
_SHARED: weakref.WeakValueDictionary[tuple[int, int | None], _Packed] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def _shared(weight: torch.Tensor) -> _Packed:
    key = (id(weight), None if weight.is_inference() else weight._version)
    with _LOCK:
        packed = _SHARED.get(key)
        if packed is None:
            packed = _SHARED[key] = _Packed(weight)
        return packed


def multiply_packed(states: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`states @ weight.T + bias`, (..., rows), of states (..., D) and a packed weight (rows, D)."""
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


def packed_copy(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor | None:
    """
    The packed weight for a product with these states, `None` if it is one with the weight as it is: gradients are wanted,
    or it is compiled, or the present call has not packed this weight.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or states.dtype != torch.float32:
        return None
    packs = _PRESENT.get()
    return None if packs is None else packs.packed_copy(weight)


class _PackedProducts(TorchFunctionMode):
    """While a layer runs that is more than its product, that product is the packed one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    packed = packed_copy(weight, input)
    return nn.functional.linear(input, weight, bias) if packed is None else multiply_packed(input, packed, bias)


def multiply(layer: Any, states: torch.Tensor) -> torch.Tensor:
    """
    `layer(states)`: with the packed weights of the present call of generate where it has some, and differentiable.

    Args:
        layer: A linear layer, or what has taken its place: with hooks or adapters, quantised, offloaded.
        states: (..., D).
    """
    if torch.compiler.is_compiling():
        return layer(states)
    if torch.is_grad_enabled():
        opaque = states.requires_grad and is_opaque(layer, states)
        return multiply_opaque(layer, states) if opaque else layer(states)
    if _PRESENT.get() is None:
        return layer(states)
    if _is_plain(layer):
        return _linear(states, layer.weight, layer.bias)
    with _PackedProducts():
        return layer(states)


def _is_plain(layer: nn.Module) -> bool:
    """Whether calling a layer is nothing but its product. Hooks on all modules, as of profilers, are not asked for."""
    return (
        type(layer) is nn.Linear
        and not any(getattr(layer, name) for name in _ATTACHMENTS)
        and "forward" not in layer.__dict__
        and layer._compiled_call_impl is None
    )


@contextmanager
def packed_weights(always: nn.Module, perhaps: Iterable[nn.Module], passes: int) -> Iterator[None]:
    """
    Use packed copies of weights for as long as this context lasts, no longer, so that weights may change before and after it
    in any way. It is the calling thread's own; inside another one it takes that one's place. Nothing is packed where packing
    cannot pay: off the CPU, in half precision (which torch leaves to oneDNN by itself), under autocast, for modules that are
    too large and for few passes. Quantised weights and others that are not plain tensors stay as they are.

    Args:
        always: What every pass runs; its linear layers are packed at their first product.
        perhaps: Modules with a weight that passes may multiply with, or not; packed after `PRODUCTS_UNPACKED` products.
        passes: Forward passes to come.
    """
    packs, left = _Packs(), LARGEST
    if passes >= FEWEST_PASSES and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
        layers = [layer for layer in always.modules() if isinstance(layer, nn.Linear)]
        groups: list[tuple[list[Any], int]] = [(layers, 0), *(([module], PRODUCTS_UNPACKED) for module in perhaps)]
        for modules, products in groups:
            weights = [module.weight for module in modules if _is_packable(module)]
            needed = sum(weight.nbytes for weight in weights)
            if needed <= left:
                left -= needed
                packs.waiting |= {id(weight): (weight, products) for weight in weights}
    token = _PRESENT.set(packs)
    try:
        yield
    finally:
        _PRESENT.reset(token)
        # A traceback may keep this frame alive.
        packs.waiting.clear()
        packs.packed.clear()


def _is_packable(module: nn.Module) -> bool:
    # A weight that is computed whenever it is read (a parametrisation) is another tensor each time.
    weight = module._parameters.get("weight")
    return type(weight) is nn.Parameter and weight.device.type == "cpu" and weight.dtype == torch.float32


__all__ = ["multiply", "multiply_packed", "packed_copy", "packed_weights"]
