"""Gradients through quantised linear layers, some of which autograd takes for constants."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Columns of a weight that are computed at a time.
PIECE = 512
# Inputs of a layer whose gradients are compared with what the layer makes of them.
PROBED = 8
_OPAQUE: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def parts_of(tensor: Any) -> list[torch.Tensor]:
    """The tensors that a tensor is made of: several for most quantised weights (numbers, scales), otherwise itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in parts_of(getattr(tensor, name))]


def is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is kept in integers or in numbers of one byte."""
    return any(not part.is_floating_point() or part.element_size() == 1 for part in parts_of(weight))


def is_opaque(layer: nn.Module, states: torch.Tensor) -> bool:
    """Whether gradients with respect to states like these are lost in a quantised layer, which nobody would tell."""
    weights = ((part, part._parameters.get("weight")) for part in layer.modules())
    return any(
        weight is not None and is_quantized(weight) and _loses_gradients(part, states) for part, weight in weights
    )


def _loses_gradients(layer: nn.Module, states: torch.Tensor) -> bool:
    # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in their first product without gradients (a probe would be
    # one), and the kernel for these has no backward pass.
    if hasattr(layer.weight, "quant_state"):
        return getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    # Others round the states (torchao's dynamic activations), which has no gradient either.
    if layer not in _OPAQUE:
        with torch.enable_grad():
            probe = states.new_ones(1, states.shape[-1], requires_grad=True)
            product = layer.forward(probe).float().sum()
            found = torch.autograd.grad(product, probe)[0][0, :PROBED].float() if product.requires_grad else None
        wanted = next(_columns(layer.forward, probe, PROBED)).float().sum(dim=-1)
        _OPAQUE[layer] = found is None or bool((found - wanted).abs().max() > 0.1 * wanted.abs().max())
    return _OPAQUE[layer]


def multiply_opaque(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """
    `layer(states)`, whose gradient with respect to the states is that of the layer's weight.

    Raises:
        ValueError: Weights of the layer want gradients too, or it has hooks.
    """
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules())
    if hooked or any(weight.requires_grad for weight in layer.parameters()):
        wanted = "under hooks" if hooked else "to train what is attached to it"
        raise ValueError(
            f"No gradients come through a quantised layer ({type(layer).__name__}), so it cannot be used {wanted}. If "
            "bitsandbytes has packed its 4 bits in a call without gradients, call model.train() and then model.state_dict() "
            "once, which unpacks them; otherwise load the model with another quantisation, or without."
        )
    return _Product.apply(states, layer)


def weight_rows(layer: Any, rows: torch.Tensor) -> torch.Tensor:
    """(n, in features) rows (n,) of the weight that a linear layer multiplies with, float32; hooks are left out."""
    like = torch.empty(0, layer.in_features, dtype=torch.float32, device=rows.device)
    return torch.cat([columns[:, rows.to(columns.device)].float() for columns in _columns(layer.forward, like)]).T


@torch.no_grad()
def _columns(layer: Callable, like: torch.Tensor, piece: int = PIECE) -> Iterator[torch.Tensor]:
    """The weight's columns (m, out features) piece by piece; what a row of the identity matrix becomes, less the bias."""
    bias = layer(like.new_zeros(1, like.shape[-1]))
    unit = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    for part in unit.split(piece):
        yield layer(part) - bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, layer):
        ctx.layer, ctx.width = layer, states.shape[-1]
        return layer(states.detach())

    @staticmethod
    def backward(ctx, gradient):
        like = gradient.new_empty(0, ctx.width)
        return torch.cat([gradient @ part.T for part in _columns(ctx.layer, like)], dim=-1), None


__all__ = ["is_opaque", "is_quantized", "multiply_opaque", "parts_of", "weight_rows"]
