"""A second device without a second processor: tensors that say they are ``far`` and refuse to meet those of the CPU.

Each is a wrapper around a tensor of the CPU, which computes. What a GPU would refuse is refused: operations on tensors
of both places, and arrays of NumPy from there. What it would compute comes out bit for bit.

    python far_device.py OUT

runs every verb on the CPU and there, into OUT/cpu and OUT/far. It is a process of its own, since torch counts devices
at the first backward pass.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import nn
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


def register() -> None:
    """Make the device known, and let the verbs' ``--device`` name it."""
    from partlens.network import performer

    _setup_privateuseone_for_python_backend("far", backend_module=_MODULE)
    _LIBRARY.fallback(compute, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)
    real, made = performer.device_of, torch.tensor

    def device_of(name: str | None, here: torch.device | None = None, number: int = 0) -> torch.device:
        return torch.device("far:0") if name == "far" else real(name, here, number)

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> torch.Tensor:
        return made(data, **rest) if device is None else made(data, **rest).to(device)

    performer.device_of, torch.tensor = device_of, tensor  # torch's own makes no tensors on such devices


_MODULE = SimpleNamespace(
    is_initialized=lambda: True,
    is_available=lambda: True,
    current_device=lambda: 0,
    device_count=lambda: 1,
    _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda _: None,
    get_amp_supported_dtype=lambda: [torch.bfloat16],
)
_LIBRARY = torch.library.Library("_", "IMPL")


def network() -> nn.Sequential:
    """32 px images, 8x8 cells at the tap ``relu2``."""
    torch.manual_seed(7)
    layers = {
        "conv1": nn.Conv2d(3, 8, 3, stride=2, padding=1),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(8, 12, 3, stride=2, padding=1),
        "relu2": nn.ReLU(),
        "conv3": nn.Conv2d(12, 12, 3, padding=1),
        "relu3": nn.ReLU(),
        "pool3": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classes": nn.Linear(12, 4),
    }
    return nn.Sequential(OrderedDict(layers)).eval()


def main(out: Path) -> None:
    """Run every verb in both places, and print how many convolutions each computed there."""
    from partlens import evaluate, explain, fit_explainer, generated_flowers, inspect, load_explainer, parts
    from partlens.network.preprocessing import Preprocessing
    from partlens.network.zoo import load_performer

    flowers = generated_flowers(40, seed=3, size=48, categories=("petal-red", "petal-blue"))
    model = load_performer(network(), Preprocessing(size_px=(32, 32), resize="squash"))
    config = {"epochs": 1, "warmup_epochs": 1, "views": 2, "batch_size": 8, "precision": "float32"}
    fit = {"category": "petal-red", "tap": "relu2", "config": config}
    verbs: dict[str, Callable[..., Any]] = {
        "inspect": lambda run, where: inspect(model, flowers, out=run / "new", tap="relu2", compute=where),
        "fit": lambda run, where: fit_explainer(model, flowers, out=run / "new", **fit, compute=where),
        "evaluate": lambda run, where: evaluate(run, flowers, model=model, rounds=3, fields="occlusion", compute=where),
        "parts": lambda run, where: parts(run, flowers, model=model, compute=where),
        "explain": lambda run, where: explain(run, flowers.take(range(2)), model=model, compute=where),
    }
    inspect(model, flowers, out=out / "run", tap="relu2")
    fit_explainer(model, flowers, out=out / "run", **fit)
    parts(out / "run", flowers, model=model)
    for verb, run in verbs.items():
        for where in ("cpu", "far"):
            run(Path(shutil.copytree(out / "run", out / where / verb)), {"device": where})
        sys.stdout.write(json.dumps({"verb": verb, "convolutions": DONE["aten::convolution"]}) + "\n")
        DONE.clear()
    explainer, _ = load_explainer(out / "run", model, device="far")
    sys.stdout.write(json.dumps({"explainer": str(explainer.device)}) + "\n")
    refused = []
    there = torch.ones(2, 3).to("far:0")
    for work in (lambda: there + torch.ones(2, 3), there.numpy):
        try:
            work()
        except (RuntimeError, TypeError) as error:
            refused.append(type(error).__name__)
    sys.stdout.write(json.dumps({"refused": refused}) + "\n")


if __name__ == "__main__":
    register()
    main(Path(sys.argv[1]))
