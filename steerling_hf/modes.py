"""Models as they are when they are read, not trained."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, for as long as this context lasts."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def reading(model: torch.nn.Module) -> Iterator[None]:
    """`evaluating`, without gradients."""
    # Not inference mode: what a module may keep must not break later gradients.
    with evaluating(model), torch.no_grad():
        yield
