"""Passes over rows that begin alike: what they have in common is computed once, and every row still has its own gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import DynamicCache

# Where all backward passes through the common part are one, because narrow products are slow there.
BATCHED_ON = ("cpu",)
# From embeddings (m, L, D) to the keys and values of their positions.
Read = Callable[[torch.Tensor], DynamicCache]


def beginnings(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Which of several rows (n, L, D) are the same.

    Returns:
        (m,) number of the first row of each kind, and (n,) the kind of each row.
    """
    kinds: list[int] = []
    first: list[int] = []
    for row, own in enumerate(embeddings):
        same = (kind for kind, other in enumerate(first) if torch.equal(embeddings[other], own))
        kinds.append(next(same, len(first)))
        if kinds[-1] == len(first):
            first.append(row)
    return torch.tensor(first, device="cpu"), torch.tensor(kinds, device="cpu")


def read_prefix(
    read: Read, embeddings: torch.Tensor, first: torch.Tensor, kinds: torch.Tensor, config: Any
) -> DynamicCache:
    """
    Keys and values of rows (n, L, D), from one pass over each of their kinds; gradients are those of n passes.

    Args:
        read: Makes the pass.
        embeddings: The rows.
        first: (m,) number of the first row of each kind, see `beginnings`.
        kinds: (n,) kind of each row.
        config: The model's configuration.
    """
    states = _Shared.apply(read, first, kinds, embeddings)
    cache = DynamicCache(config=config)
    for layer, (keys, values) in enumerate(zip(states[::2], states[1::2])):
        cache.update(keys, values, layer)
    return cache


class _Shared(torch.autograd.Function):
    """Keys and values, layer by layer, of rows (n, L, D) of m kinds."""

    @staticmethod
    def forward(ctx: Any, read: Read, first: torch.Tensor, kinds: torch.Tensor, embeddings: torch.Tensor) -> Any:
        with torch.set_grad_enabled(ctx.needs_input_grad[3]):
            begin = embeddings.detach()[first].requires_grad_(ctx.needs_input_grad[3])
            cache: Any = read(begin)
        states = [part for layer in cache.layers for part in (layer.keys, layer.values)]
        ctx.begin, ctx.states, ctx.kinds = begin, states, kinds
        return tuple(part.detach()[kinds] for part in states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        """The first rows of all kinds go backwards together, then the second ones, and so on."""
        turns = torch.tensor(
            [int((ctx.kinds[:row] == kind).sum()) for row, kind in enumerate(ctx.kinds)], device="cpu"
        )
        upstream = [part.new_zeros(int(turns.max()) + 1, *part.shape) for part in ctx.states]
        for part, own in zip(upstream, gradients):
            part[turns, ctx.kinds] = own
        if ctx.begin.device.type in BATCHED_ON:
            (found,) = torch.autograd.grad(ctx.states, ctx.begin, upstream, is_grads_batched=True)
        else:
            of_turns = [
                torch.autograd.grad(ctx.states, ctx.begin, list(turn), retain_graph=True)[0] for turn in zip(*upstream)
            ]
            found = torch.stack(of_turns)
        return None, None, None, found[turns, ctx.kinds]
