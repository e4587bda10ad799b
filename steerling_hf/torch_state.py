"""What a caller may have set in torch, and code that is not ours cannot stand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class PlainTensors(TorchFunctionMode):
    """
    Within this context captum and tokenizers make tensors on the CPU, and numbers with a fraction are float32, whatever the
    defaults are. It is the thread's own: another thread's defaults stay.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """The call, with what it leaves open."""
        given = dict(kwargs or {})
        if func in (torch.tensor, torch.linspace):
            given.setdefault("device", "cpu")
            data = args[0] if args else given.get("data")
            if func is torch.linspace or (isinstance(data, list) and data and type(data[0]) is float):
                given.setdefault("dtype", torch.float32)
        return func(*args, **given)


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[None]:
    """
    Gradients can be computed for as long as this context lasts, inside `torch.inference_mode()` too. They are not recorded until
    they are asked for.

    Raises:
        ValueError: The weights cannot take part in gradients.
    """
    check_differentiable(model)
    with torch.inference_mode(False), torch.no_grad():
        yield


def check_differentiable(model: torch.nn.Module) -> None:
    """
    Raises:
        ValueError: The weights were made inside `torch.inference_mode()`, whose tensors never take part in gradients.
    """
    for name, weight in model.named_parameters():
        if weight.is_inference():
            raise ValueError(
                f"`model` has weights ({name}) that were made inside torch.inference_mode(), so that nothing can be attributed to "
                "inputs, which takes gradients: load the model outside of it, or explain with `inputs=False`."
            )
