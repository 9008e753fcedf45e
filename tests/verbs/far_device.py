"""A second device without a second processor: tensors that say they are ``far`` and refuse to meet those of the CPU.

Each is a wrapper around a tensor of the CPU, which computes. What a GPU would refuse is refused: operations on tensors
of both places, and arrays of NumPy from there. What it would compute comes out bit for bit.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# A GPU copies from and to the CPU, and takes indices from there.
BETWEEN = {"aten::copy_", "aten::_copy_from", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}
CPU = torch.device("cpu")
DONE: Counter[str] = Counter()  # operations, by name


class Far(torch.Tensor):
    """A tensor on the device ``far``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Self:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device="far:0", **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(operation, *args, **(kwargs or {}))

    def __deepcopy__(self, memo: Any) -> Far:
        made = Far(self.held.clone()).requires_grad_(self.requires_grad)
        made._is_param = getattr(self, "_is_param", False)
        return made

    def tolist(self) -> Any:
        return self.held.tolist()


def held(value: Any) -> Any:
    return value.held if isinstance(value, Far) else value


def compute(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Do with the held tensors what was asked for; wrap what comes out."""
    name, wrapped = operation._schema.name, {}
    DONE[name] += 1
    if name == "aten::_copy_from":  # how a far tensor is copied to the CPU
        held(args[1]).copy_(held(args[0]))
        return args[1]
    if name == "aten::copy_":
        held(args[0]).copy_(held(args[1]))
        return args[0]

    def inside(value: Any) -> Any:
        if isinstance(value, Far):
            wrapped[id(value.held)] = value
        elif isinstance(value, torch.Tensor) and value.dim() and name not in BETWEEN:
            raise RuntimeError(f"{name}: expected all tensors on one device, got {tuple(value.shape)} on the CPU")
        return CPU if isinstance(value, torch.device) else held(value)

    there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"

    def outside(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, Far) or there:
            return value
        return wrapped[id(value)] if id(value) in wrapped else Far(value)  # in place: the one that was given

    return tree_map(outside, operation(*tree_map(inside, args), **tree_map(inside, kwargs)))


_MODULE = SimpleNamespace(
    is_initialized=lambda: True,
    is_available=lambda: True,
    current_device=lambda: 0,
    device_count=lambda: 1,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda _: None,
    get_amp_supported_dtype=lambda: [torch.bfloat16],
)
_setup_privateuseone_for_python_backend("far", backend_module=_MODULE)
_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(compute, "PrivateUse1")
