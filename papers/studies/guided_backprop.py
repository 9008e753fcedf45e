"""Guided backpropagation: is it right, what does it cost, what does it leave behind; and maps of many filters.

H1: eight networks (five spellings of ReLU in one small network, GoogLeNet, DenseNet-121, ResNet-18, random weights),
judged by the same networks with an autograd function in the place of every ReLU. Error is the largest difference over
the largest value. Time is CPU time over that of the plain gradient, rounds interleaved, median. Side effects are
compared before and after one call.

H2: maps of K filters of VGG-11's features.12 over the bound "one forward pass to the layer and K backward passes".

    uv run python papers/studies/guided_backprop.py [--rounds 7]

captum is in the dev group; zennit and grad-cam are measured where they are installed, else noted as absent.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import json
import operator
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from partlens.attribution.backprop import guided_backprop

SEED, THREADS, IMAGES, SIZE, TARGET = 0, 1, 4, 96, 3
SPELLINGS = ("module", "in-place", "re-used", "functional", "method")
NETWORKS = (*SPELLINGS, "GoogLeNet", "DenseNet-121", "ResNet-18")


class Plain(nn.Module):
    """Six convolutions and a head; its ReLUs are spelt as asked."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 128, 128)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(128, 10)
        self.spelling = spelling
        if spelling in {"module", "in-place"}:
            self.relus = nn.ModuleList(nn.ReLU(inplace=spelling == "in-place") for _ in self.convs)
        elif spelling == "re-used":
            self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for number, conv in enumerate(self.convs):
            x = conv(x)
            if self.spelling in {"module", "in-place"}:
                x = self.relus[number](x)
            elif self.spelling == "re-used":
                x = self.relu(x)
            elif self.spelling == "functional":
                x = F.relu(x)
            else:
                x = x.relu()
            if number % 2:
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


def build(name: str) -> nn.Module:
    torch.manual_seed(SEED)
    if name in SPELLINGS:
        return Plain(name).eval()
    if name == "GoogLeNet":
        return torchvision.models.googlenet(weights=None, init_weights=False, aux_logits=False).eval()
    return torchvision.models.get_model(name.lower().replace("-", ""), weights=None).eval()


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * (ctx.saved_tensors[0] > 0) * (dy > 0)


def _relu(x: Tensor) -> Tensor:
    return _Guided.apply(x)


def reference(module: nn.Module, x: Tensor) -> Tensor:
    traced = torch.fx.symbolic_trace(module)
    for node in list(traced.graph.nodes):
        is_module = node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.ReLU)
        if is_module or node.target in {F.relu, torch.relu, "relu", "relu_"}:
            with traced.graph.inserting_after(node):
                new = traced.graph.call_function(_relu, (node.args[0],))
            node.replace_all_uses_with(new)
            new.args = (node.args[0],)
            traced.graph.erase_node(node)
        elif node.target is operator.iadd:
            node.target = operator.add
    traced.recompile()
    return plain(traced, x)


def plain(module: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(module(leaf)[:, TARGET].sum(), leaf)[0]


def ours(module: nn.Module, x: Tensor) -> Tensor:
    return guided_backprop(module, x, TARGET, fix_strides=False)


def captum_maps(module: nn.Module, x: Tensor) -> Tensor:
    from captum.attr import GuidedBackprop

    return GuidedBackprop(module).attribute(x.clone().requires_grad_(), target=TARGET).detach()


def zennit_maps(module: nn.Module, x: Tensor) -> Tensor:
    from zennit.attribution import Gradient
    from zennit.composites import GuidedBackprop

    with Gradient(model=module, composite=GuidedBackprop()) as attributor:
        outputs = module(x).shape[1]
        return attributor(x.clone(), torch.eye(outputs)[[TARGET] * len(x)])[1].detach()


def grad_cam_maps(module: nn.Module, x: Tensor) -> Tensor:
    from pytorch_grad_cam import GuidedBackpropReLUModel

    model = GuidedBackpropReLUModel(module, "cpu")
    maps = [np.array(model(one[None].clone(), TARGET)) for one in x]
    return torch.from_numpy(np.stack(maps)).permute(0, 3, 1, 2)


TOOLS: dict[str, tuple[str | None, Callable[[nn.Module, Tensor], Tensor]]] = {
    "partlens": (None, ours),
    "captum": ("captum", captum_maps),
    "zennit": ("zennit", zennit_maps),
    "grad-cam": ("grad-cam", grad_cam_maps),
}


def state(module: nn.Module) -> dict[str, Any]:
    """What a caller may expect to find unchanged."""
    modules = list(module.modules())
    return {
        "parameters": [(p.data_ptr(), p._version, p.requires_grad) for p in module.parameters()],  # noqa: SLF001
        "gradients": [p.grad is None for p in module.parameters()],
        "modules": [(id(m), type(m).__name__) for m in modules],
        "modes": [m.training for m in modules],
        "in-place flags": [getattr(m, "inplace", None) for m in modules],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules],  # noqa: SLF001
    }


def side_effects(tool: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor) -> list[str]:
    """Names of what one call changed in a network that is handed over in train mode."""
    network = copy.deepcopy(module).train()
    for child in network.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.Dropout)):
            child.eval()  # so that the tools which do not switch modes give defined results
    before = state(network)
    tool(network, x)
    after = state(network)
    return [key for key in before if before[key] != after[key]]


def cpu_seconds(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def summary(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
        "rounds": len(ratios),
    }


def correctness(rounds: int, tools: dict[str, Callable[[nn.Module, Tensor], Tensor]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in NETWORKS:
        module = build(name)
        x = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))
        truth, gradient = reference(module, x), plain(module, x)
        scale = float(truth.abs().max())
        row: dict[str, Any] = {}
        kept = {}
        for tool, function in tools.items():
            kept[tool] = copy.deepcopy(module)  # grad-cam alters the network for good
            maps = function(kept[tool], x)
            row[tool] = {
                "error": float((maps - truth).abs().max()) / scale,
                "is_plain_gradient": float((maps - gradient).abs().max()) <= 1e-6 * float(gradient.abs().max()),
                "side_effects": side_effects(function, module, x),
            }
        seconds: dict[str, list[float]] = {tool: [] for tool in tools}
        base = []
        for _ in range(rounds):
            before = cpu_seconds(lambda m=module, v=x: plain(m, v))
            for tool, function in tools.items():
                seconds[tool].append(cpu_seconds(lambda f=function, m=kept[tool], v=x: f(m, v)))
            base.append((before + cpu_seconds(lambda m=module, v=x: plain(m, v))) / 2)
        for tool in tools:
            row[tool]["cpu_time_over_plain_gradient"] = summary(
                [s / b for s, b in zip(seconds[tool], base, strict=True)]
            )
        row["plain_gradient_differs_by"] = float((gradient - truth).abs().max()) / scale
        result[name] = row
        print(name, json.dumps(row), flush=True)
    return result


def many_filters(rounds: int, *, with_captum: bool) -> list[dict[str, Any]]:
    torch.manual_seed(SEED)
    module = torchvision.models.vgg11(weights=None).eval()
    rows = []
    for filters, images in ((16, 2), (16, 8), (64, 2), (64, 8)):
        x = torch.randn(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))

        def bound(x: Tensor = x, filters: int = filters) -> Tensor:
            leaf = x.clone().requires_grad_()
            maps = module.features[:13](leaf)
            out = []
            for k in range(filters):
                start = torch.zeros_like(maps)
                start[:, k] = 1
                out.append(torch.autograd.grad(maps, leaf, start, retain_graph=k + 1 < filters)[0])
            return torch.stack(out, 1)

        def mine(x: Tensor = x, filters: int = filters) -> Tensor:
            wanted = list(range(filters))
            return guided_backprop(module, x, layer="features.12", filters=wanted, start="ones", fix_strides=False)

        def theirs(x: Tensor = x, filters: int = filters) -> Tensor:
            from captum.attr import NeuronGuidedBackprop

            method = NeuronGuidedBackprop(module, module.features[12])
            maps = [
                method.attribute(x.clone().requires_grad_(), lambda out, k=k: out[:, k].sum((1, 2)))
                for k in range(filters)
            ]
            return torch.stack(maps, 1).detach()

        row: dict[str, Any] = {"filters": filters, "images": images}
        seconds: dict[str, list[float]] = {"bound": [], "partlens": [], "captum": []}
        for _ in range(rounds):
            seconds["bound"].append(cpu_seconds(bound))
            seconds["partlens"].append(cpu_seconds(mine))
            if with_captum:
                seconds["captum"].append(cpu_seconds(theirs))
        over = {tool: [s / b for s, b in zip(v, seconds["bound"], strict=False)] for tool, v in seconds.items() if v}
        row["partlens_over_bound"] = summary(over["partlens"])
        row["bound_cpu_seconds"] = round(statistics.median(seconds["bound"]), 3)
        if with_captum:
            few = list(range(2))
            ours_few = guided_backprop(module, x, layer="features.12", filters=few, start="ones", fix_strides=False)
            captum_few = theirs(x, 2)
            row["captum_over_bound"] = summary(over["captum"])
            row["captum_over_partlens"] = summary(
                [c / p for c, p in zip(seconds["captum"], seconds["partlens"], strict=True)]
            )
            row["difference_from_captum"] = float((ours_few - captum_few).abs().max() / captum_few.abs().max())
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--filter-rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore")  # captum announces its hooks at every call
    versions, absent, tools = {"torch": torch.__version__, "torchvision": torchvision.__version__}, [], {}
    for name, (package, function) in TOOLS.items():
        try:
            if package is not None:
                versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
        else:
            tools[name] = function
    result = {
        "seed": SEED,
        "threads": THREADS,
        "versions": versions,
        "not_installed": absent,
        "images": IMAGES,
        "size_px": SIZE,
        "correctness": correctness(arguments.rounds, tools),
        "many_filters": many_filters(arguments.filter_rounds, with_captum="captum" in tools),
    }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
