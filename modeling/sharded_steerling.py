"""Generation with weights that FSDP2 (`torch.distributed.fsdp.fully_shard`) has shared out among processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def gathered_weights(model: Any) -> Iterator[None]:
    """
    Every process holds all weights of a sharded model in here, and its own shards behind. FSDP gathers a block's weights when
    all processes compute it, and sees `forward` only; generation calls parts of a model, as often as its own texts need.
    """
    sharded = _sharded_modules(model)
    states = [module._get_fsdp_state() for module in sharded]
    for state in states:
        state._lazy_init()  # outermost first, as a forward pass would
    groups = [group for state in states for group in state._fsdp_param_groups]
    meshes = [group.post_forward_mesh_info for group in groups]
    automatic = [state._auto_reshard_after_forward for state in states]
    try:
        for module in sharded:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()
        for group, mesh in zip(groups, meshes):
            group.post_forward_mesh_info = mesh
        for state, auto in zip(states, automatic):
            state._auto_reshard_after_forward = auto


def _sharded_modules(model: nn.Module) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


__all__ = ["gathered_weights"]
