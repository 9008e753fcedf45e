"""Guided backpropagation against a stranger: autograd functions written from the papers, loops, other libraries."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from partlens.attribution.backprop import backward_signals, guided_backprop
from partlens.attribution.strides import strided_gradient
from partlens.errors import PartlensWarning


class _Guided(torch.autograd.Function):
    """Springenberg et al. 2015: pass where the input and the signal are both positive; ``top`` bounds ReLU6."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.top = top
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return dy * (x > 0) * (x < ctx.top) * (dy > 0), None


class _Deconvnet(torch.autograd.Function):
    """Zeiler and Fergus 2014: rectify the signal itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float) -> Tensor:
        return x.clamp(0, top)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * (dy > 0), None


INFINITE = float("inf")
REFERENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "guided": lambda x, top: _Guided.apply(x, top),  # noqa: PLW0108 - fx needs a Python function
    "deconvnet": lambda x, top: _Deconvnet.apply(x, top),  # noqa: PLW0108
    "gradient": lambda x, top: x.clamp(0, top),
}


class Net(nn.Module):
    """Three convolutions with whatever stands for the activation."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.convs = nn.ModuleList([nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, 2), nn.Conv2d(6, 5, 3)])
        self.head = nn.Linear(5, 4)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.activation(conv(x))
        return self.head(x.mean((2, 3)))


SPELLINGS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "module, re-used": nn.ReLU,
    "module in place": lambda: nn.ReLU(inplace=True),
    "F.relu": lambda: F.relu,
    "F.relu in place": lambda: lambda x: F.relu(x, inplace=True),
    "F.relu_": lambda: F.relu_,
    "torch.relu": lambda: torch.relu,
    "torch.relu_": lambda: torch.relu_,
    "method": lambda: lambda x: x.relu(),
    "method in place": lambda: lambda x: x.relu_(),
    "clamp": lambda: lambda x: x.clamp(min=0),
    "clamp in place": lambda: lambda x: x.clamp_(min=0),
    "clamp_min": lambda: lambda x: x.clamp_min(0.0),
    "torch.clip": lambda: lambda x: torch.clip(x, 0),
    "clamp with a tensor": lambda: lambda x: x.clamp(min=torch.zeros(())),
    "threshold": lambda: nn.Threshold(0.0, 0.0),
    "maximum": lambda: lambda x: torch.maximum(x, torch.zeros(())),
    "maximum, constant first": lambda: lambda x: torch.maximum(torch.zeros(1), x),
    "torch.max": lambda: lambda x: torch.max(x, torch.zeros_like(x)),
    "aten": lambda: torch.ops.aten.relu.default,
    "leaky with slope 0": lambda: nn.LeakyReLU(0.0),
    "RReLU with slope 0": lambda: nn.RReLU(0.0, 0.0),
    "hardtanh from 0": lambda: nn.Hardtanh(0.0, 1e9),
}


@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_relu(spelling: str, rule: str) -> None:
    images = torch.randn(3, 3, 9, 9)
    ours = guided_backprop(Net(SPELLINGS[spelling]()), images, target=2, rule=rule, fix_strides=False)
    reference = Net(lambda x: REFERENCES[rule](x, INFINITE))
    leaf = images.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(reference(leaf)[:, 2].sum(), leaf)
    assert float(theirs.abs().max()) > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("spelling", [nn.ReLU6(), lambda x: F.relu6(x, inplace=True), lambda x: x.clamp(0, 6)])
@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
def test_relu6(spelling: Callable[[Tensor], Tensor], rule: str) -> None:
    images = 30 * torch.randn(3, 3, 9, 9)
    ours = guided_backprop(Net(spelling), images, target=1, rule=rule, fix_strides=False)
    leaf = images.clone().requires_grad_()
    reference = Net(lambda x: REFERENCES[rule](x, 6.0))
    (theirs,) = torch.autograd.grad(reference(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


class _Smooth(torch.autograd.Function):
    """The stated rule for other activations: the positive part of the signal times the true derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            ctx.out = function(leaf)
            ctx.leaf = leaf
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return torch.autograd.grad(ctx.out, ctx.leaf, dy * (dy > 0))[0], None


OTHERS = {
    "leaky": F.leaky_relu,
    "leaky in place": lambda x: F.leaky_relu_(x.clone()),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.3])),
    "elu": F.elu,
    "selu": F.selu,
    "celu": lambda x: F.celu(x, 0.7),
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_rectifying_activations(name: str) -> None:
    images = torch.randn(2, 3, 9, 9)
    ours = guided_backprop(Net(OTHERS[name]), images, target=0, fix_strides=False)
    leaf = images.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(Net(lambda x: _Smooth.apply(x, OTHERS[name]))(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(ours, theirs)
    plain = guided_backprop(Net(OTHERS[name]), images, target=0, rule="gradient", fix_strides=False)
    assert float((ours - plain).abs().max()) > 1e-4


@pytest.mark.parametrize("gate", [torch.sigmoid, torch.tanh, F.hardsigmoid, F.hardtanh, F.softsign])
def test_gates_keep_their_true_derivative(gate: Callable[[Tensor], Tensor]) -> None:
    images = torch.randn(2, 3, 9, 9)
    with pytest.warns(PartlensWarning, match="No activation was found"):
        ours = guided_backprop(Net(gate), images, target=0, fix_strides=False)
    leaf = images.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(Net(gate)(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# torchvision's networks, their activations replaced in the fx graph


def replaced(module: nn.Module, rule: str) -> nn.Module:
    """The same network with every rectifier exchanged for an autograd function, whatever its spelling."""
    traced = torch.fx.symbolic_trace(module)
    names = {F.relu, torch.relu, F.relu6, F.hardtanh, "relu", "relu_"}
    for node in list(traced.graph.nodes):
        child = traced.get_submodule(node.target) if node.op == "call_module" else None
        found = node.op in {"call_function", "call_method"} and node.target in names
        if found or isinstance(child, (nn.ReLU, nn.ReLU6)):
            six = isinstance(child, nn.ReLU6) or node.target is F.relu6
            with traced.graph.inserting_after(node):
                new = traced.graph.call_function(REFERENCES[rule], (node.args[0], 6.0 if six else INFINITE))
            node.replace_all_uses_with(new)
            new.args = (node.args[0], *new.args[1:])
            traced.graph.erase_node(node)
        elif node.op == "call_function" and node.target is operator.iadd:
            node.target = operator.add
    traced.recompile()
    return traced


@pytest.fixture(scope="module")
def network() -> Callable[[str], nn.Module]:
    made: dict[str, nn.Module] = {}

    def make(name: str) -> nn.Module:
        if name not in made:
            torch.manual_seed(0)
            extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
            if name == "vgg11":  # with one small linear layer: its own head takes seconds to fill
                features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"])
                head = {"avgpool": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten(), "classifier": nn.Linear(2048, 5)}
                made[name] = nn.Sequential(OrderedDict(features=features, **head)).eval()
            elif name == "densenet121":  # its blocks and its functional ReLU, two blocks deep
                made[name] = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5).eval()
            else:
                made[name] = torchvision.models.get_model(name, weights=None, num_classes=5, **extra).eval()
        return made[name]

    return make


NETWORKS = ("googlenet", "densenet121", "mobilenet_v2", "resnet18", "vgg11")


@pytest.mark.parametrize("name", NETWORKS)
def test_torchvision_networks(network, name: str) -> None:
    module = network(name)
    images = torch.randn(2, 3, 64, 64)
    for rule in ("guided", "deconvnet"):
        ours = guided_backprop(module, images, target=torch.tensor([1, 4]), rule=rule, fix_strides=False)
        leaf = images.clone().requires_grad_()
        score = replaced(module, rule)(leaf)[[0, 1], [1, 4]].sum()
        (theirs,) = torch.autograd.grad(score, leaf)
        assert float(theirs.abs().max()) > 0
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error <= 1e-6, (rule, error)


# captum, where it is exact: networks whose activations are modules


@pytest.mark.parametrize("name", ["resnet18", "vgg11"])
def test_scores_equal_captum(network, name: str) -> None:
    captum = pytest.importorskip("captum.attr")
    module, images = network(name), torch.randn(2, 3, 64, 64)
    for rule, method in (("guided", captum.GuidedBackprop), ("deconvnet", captum.Deconvolution)):
        ours = guided_backprop(module, images, target=3, rule=rule, fix_strides=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = method(module).attribute(images.clone().requires_grad_(), target=3)
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_filters_equal_captum(network) -> None:
    captum = pytest.importorskip("captum.attr")
    module, images = network("vgg11"), torch.randn(2, 3, 64, 64)
    ours = guided_backprop(module, images, layer="features.12", filters=[5, 9], start="ones")
    for place, k in enumerate((5, 9)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            method = captum.NeuronGuidedBackprop(module, module.features[12])
            theirs = method.attribute(images.clone().requires_grad_(), lambda out, k=k: out[:, k].sum((1, 2)))
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours[:, place], theirs.detach(), rtol=0, atol=1e-6 * scale)


# Strides, as loops


def slow_strided_gradient(
    signal: Tensor, weight: Tensor, size: tuple[int, int], pad: int, gap: int, groups: int
) -> Tensor:
    """Resize by the nearest middle of a pixel, then add every weight at the places it read from."""
    images, outputs, rows, cols = signal.shape
    _, per_group, kernel_rows, kernel_cols = weight.shape
    tall = size[0] + 2 * pad - gap * (kernel_rows - 1)
    wide = size[1] + 2 * pad - gap * (kernel_cols - 1)
    padded = torch.zeros(images, per_group * groups, size[0] + 2 * pad, size[1] + 2 * pad, dtype=signal.dtype)
    for n, o, r, c in itertools.product(range(images), range(outputs), range(tall), range(wide)):
        value = signal[n, o, int((r + 0.5) * rows / tall), int((c + 0.5) * cols / wide)]
        value = value / (tall * wide / (rows * cols))
        first = (o // (outputs // groups)) * per_group
        for i, u, v in itertools.product(range(per_group), range(kernel_rows), range(kernel_cols)):
            padded[n, first + i, r + u * gap, c + v * gap] += value * weight[o, i, u, v]
    return padded[:, :, pad : pad + size[0], pad : pad + size[1]]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pad", "gap", "groups"),
    [
        ((9, 8), 3, 2, 1, 1, 1),
        ((11, 9), 3, 3, 0, 1, 2),
        ((8, 8), 2, 2, 0, 1, 1),
        ((10, 11), 3, 2, 2, 2, 2),
        ((7, 7), 1, 2, 0, 1, 1),
    ],
)
def test_strided_gradient_as_loops(
    size: tuple[int, int], kernel: int, stride: int, pad: int, gap: int, groups: int
) -> None:
    conv = nn.Conv2d(2, 4, kernel, stride, pad, gap, groups, bias=False).double()
    signal = torch.randn(2, 4, *conv(torch.zeros(1, 2, *size, dtype=torch.float64)).shape[2:], dtype=torch.float64)
    ours = strided_gradient(
        signal,
        conv.weight.detach(),
        size,
        stride=(stride, stride),
        padding=(pad, pad),
        dilation=(gap, gap),
        groups=groups,
    )
    torch.testing.assert_close(ours, slow_strided_gradient(signal, conv.weight.detach(), size, pad, gap, groups))


@pytest.mark.parametrize(("kernel", "stride", "pad"), [(3, 2, 0), (3, 2, 1), (2, 2, 0), (3, 1, 1)])
@pytest.mark.parametrize("pooling", ["route", "overwrite", "resample"])
def test_max_pooling_as_loops(kernel: int, stride: int, pad: int, pooling: str) -> None:
    module = nn.MaxPool2d(kernel, stride, pad, ceil_mode=pad == 0)
    images = torch.randn(1, 2, 8, 7, dtype=torch.float64)
    out = module(images)
    weights = torch.ones(1, 2, dtype=torch.float64)
    network = nn.Sequential(module, nn.Identity())
    ours = backward_signals(network, images, [{"0": weights}], pooling=pooling)[0]
    expected = torch.zeros_like(images)
    rows, cols = out.shape[2:]
    step = stride
    signal = out
    if pooling == "resample":
        tall, wide = 8 + 2 * pad - kernel + 1, 7 + 2 * pad - kernel + 1
        signal = torch.zeros(1, 2, tall, wide, dtype=torch.float64)
        for r, c in itertools.product(range(tall), range(wide)):
            near = out[:, :, int((r + 0.5) * rows / tall), int((c + 0.5) * cols / wide)]
            signal[:, :, r, c] = near / (tall * wide / (rows * cols))
        step = 1
    for k, r, c in itertools.product(range(2), range(signal.shape[2]), range(signal.shape[3])):
        cells = [
            (y, x)
            for y in range(r * step - pad, r * step - pad + kernel)
            for x in range(c * step - pad, c * step - pad + kernel)
            if 0 <= y < 8 and 0 <= x < 7
        ]
        y, x = max(cells, key=lambda cell: float(images[0, k, cell[0], cell[1]]))
        if pooling == "overwrite":
            expected[0, k, y, x] = signal[0, k, r, c]
        else:
            expected[0, k, y, x] += signal[0, k, r, c]
    torch.testing.assert_close(ours, expected)
