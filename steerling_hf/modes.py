"""Modes of a model for the length of a context, which threads that share the model may be in together."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

_LOCK = threading.Lock()
# By model: how many contexts are open, and what the first one changed.
_Open = WeakKeyDictionary[torch.nn.Module, tuple[int, list[Any]]]
_EVALUATING: _Open = WeakKeyDictionary()
_FROZEN: _Open = WeakKeyDictionary()


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, until the last of the contexts that are open at once ends."""

    def begin() -> list[Any]:
        training = [module for module in model.modules() if module.training]
        for module in training:
            module.training = False
        return training

    def end(module: Any) -> None:
        module.training = True

    with _shared(_EVALUATING, model, begin, end):
        yield


@contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No weight wants gradients, until the last of the contexts that are open at once ends."""

    def begin() -> list[Any]:
        wanted = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in wanted:
            weight.requires_grad_(False)
        return wanted

    def end(weight: Any) -> None:
        weight.requires_grad_(True)

    with _shared(_FROZEN, model, begin, end):
        yield


@contextmanager
def _shared(open_: _Open, model: torch.nn.Module, begin: Callable, end: Callable) -> Iterator[None]:
    with _LOCK:
        count, changed = open_.get(model) or (0, begin())
        open_[model] = (count + 1, changed)
    try:
        yield
    finally:
        with _LOCK:
            count, changed = open_.pop(model)
            if count > 1:
                open_[model] = (count - 1, changed)
            else:
                for one in changed:
                    end(one)
