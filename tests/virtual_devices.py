"""
Accelerators that are not there. A tensor on one of them holds a tensor of the CPU and is computed there, but computing with
tensors of two devices at once is an error, as it is on real ones.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "virtual"
MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class VirtualTensor(torch.Tensor):
    """A tensor of the CPU that says it is on another device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"VirtualTensor({self.held}, device={self.device})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


class VirtualDevices(TorchDispatchMode):
    """A block in which `torch.device("virtual:0")` and others can be used."""

    registered = False

    def __enter__(self):
        if not VirtualDevices.registered:
            _setup_privateuseone_for_python_backend(NAME)
            VirtualDevices.registered = True
        # torch.tensor(..., device=...) makes its tensor on the CPU and moves it then.
        self.lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.lifted)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _compute(function, args, kwargs or {})


def _compute(function, args: tuple, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # Single numbers and indices on the CPU may meet tensors of any device.
    guests = [tensor for tensor in tensors if not tensor.dim()] + (list(args[1]) if function in INDEXING else [])
    at_home = [
        tensor for tensor in tensors if tensor.device.type != "cpu" or all(tensor is not guest for guest in guests)
    ]
    devices = {tensor.device for tensor in at_home}
    if len(devices) > 1 and function not in MOVES:
        raise RuntimeError(f"{function} of tensors on {sorted(map(str, devices))}")
    device = tensors[0].device if function in MOVES else next(iter(devices), torch.device("cpu"))
    if kwargs.get("device") is not None:
        device, kwargs = torch.device(kwargs["device"]), {**kwargs, "device": "cpu"}
    found = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if device.type == "cpu":
        return found
    # What is changed in place stays the tensor that it was.
    changed = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, VirtualTensor)}

    def placed(leaf: Any) -> Any:
        return changed.get(id(leaf), VirtualTensor(leaf, device)) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(placed, found)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, VirtualTensor) else leaf
