"""Which operations are activations, however they are written; what is said where none is found."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import partlens
from partlens.attribution.backprop import backward_signals
from partlens.errors import InputError, InputTypeError, LayerError, PartlensWarning
from partlens.explainer.filter_loss import filter_loss
from partlens.explainer.templates import part_templates
from partlens.selection.lasso import mu_lasso

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def network(activation: Callable[[], nn.Module], *, gate: bool = False) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body: list[nn.Module] = [nn.Conv2d(3, 6, 3, padding=1), activation(), nn.Conv2d(6, 6, 3, 2), activation()]
        body += [Squeeze()] if gate else []
        return nn.Sequential(*body, nn.Conv2d(6, 4, 3), activation(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


class Squeeze(nn.Module):
    """A gate that is computed from all cells: no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], nn.Module]]] = {
    "x * sigmoid(x)": (lambda x: x * torch.sigmoid(x), nn.SiLU),
    "sigmoid(x) * x": (lambda x: x.sigmoid() * x, nn.SiLU),
    "x / (1 + exp(-x))": (lambda x: x / (1 + torch.exp(-x)), nn.SiLU),
    "sigmoid(x).mul(x)": (lambda x: x.sigmoid().mul(x), nn.SiLU),
    "x * relu6(x + 3) / 6": (lambda x: x * F.relu6(x + 3) / 6, nn.Hardswish),
    "x * (relu6(x + 3) / 6)": (lambda x: x * (F.relu6(x + 3) / 6), nn.Hardswish),
    "x * clamp(x + 3, 0, 6) / 6": (lambda x: x * (x + 3).clamp(0, 6) / 6, nn.Hardswish),
    "x * hardsigmoid(x)": (lambda x: x * F.hardsigmoid(x), nn.Hardswish),
    "GELU by erf": (lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), nn.GELU),
    "GELU, the half last": (lambda x: x * (1.0 + torch.erf(x / math.sqrt(2.0))) * 0.5, nn.GELU),
    "GELU by tanh": (gelu_tanh, lambda: nn.GELU(approximate="tanh")),
    "x * tanh(softplus(x))": (lambda x: x * torch.tanh(F.softplus(x)), nn.Mish),
    "x * tanh(log(1 + exp(x)))": (lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), nn.Mish),
}


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(("function", "module"), SPELLINGS.values(), ids=list(SPELLINGS))
def test_an_activation_written_in_python_is_one(
    function: Callable[[Tensor], Tensor], module: Callable[[], nn.Module], gate: bool
) -> None:
    for rule in ("guided", "deconvnet", "gradient"):
        for how in ({"target": 1}, {"layer": "5" if not gate else "6", "filters": [0, 2]}):
            found = partlens.guided_backprop(network(lambda: Written(function), gate=gate), IMAGES, rule=rule, **how)
            wanted = partlens.guided_backprop(network(module, gate=gate), IMAGES, rule=rule, **how)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


NO_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "a square": lambda x: x * x,
    "tanh": torch.tanh,
    "softsign in Python": lambda x: x / (1 + x * x).sqrt(),
    "a gate of its own": lambda x: x * torch.sigmoid(x.flip(1)),
    "a mask": lambda x: x * (x > 0),
    "torch.where": lambda x: torch.where(x > 0, x, 0.0),
    "half of x + |x|": lambda x: 0.5 * (x + x.abs()),
}


@pytest.mark.parametrize("function", NO_ACTIVATIONS.values(), ids=list(NO_ACTIVATIONS))
@pytest.mark.parametrize("rule", ["guided", "deconvnet"])
def test_the_plain_gradient_is_called_so(function: Callable[[Tensor], Tensor], rule: str) -> None:
    module = network(lambda: Written(function))
    with pytest.warns(PartlensWarning, match="No activation was found, so that this is the plain gradient"):
        found = partlens.guided_backprop(module, IMAGES, 1, rule=rule)
    assert torch.equal(found, partlens.guided_backprop(module, IMAGES, 1, rule="gradient"))
    said: list[str] = []
    backward_signals(module, IMAGES, [{"5": torch.ones(2, 4)}], rule=rule, tell=said.append)
    assert len(said) == 1


def test_nothing_is_said_where_every_activation_is_found() -> None:
    for activation in (nn.ReLU, nn.SiLU, lambda: Written(SPELLINGS["x * sigmoid(x)"][0])):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            partlens.guided_backprop(network(activation, gate=True), IMAGES)
            partlens.guided_backprop(network(activation), IMAGES, layer="0", filters=0)  # a single layer


def test_some_activations_that_cannot_be_told_are_counted() -> None:
    module = network(nn.ReLU)
    module[3] = Written(lambda x: torch.where(x > 0, x, 0.1 * x))
    module[5] = Written(lambda x: x * (x > 0))
    with pytest.warns(PartlensWarning, match="1 activations were found, and 2 operations"):
        partlens.guided_backprop(module, IMAGES)


# Denormal numbers


def flushes() -> bool:
    return float(torch.tensor(1e-40) * 1) == 0


@pytest.mark.parametrize("before", [False, True])
def test_denormal_numbers_are_flushed_in_the_call_alone(before: bool) -> None:
    inside: list[bool] = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
            inside.append(flushes())
            if len(inside) > 1:
                raise KeyError("after the first")
            return grads[0]

    module = network(nn.ReLU)
    module[1].register_forward_hook(lambda _m, _i, o: Looks.apply(o))
    torch.set_flush_denormal(before)
    try:
        partlens.guided_backprop(module, IMAGES, rule="gradient", fix_strides=False)
        assert flushes() is before
        with pytest.raises(KeyError):
            partlens.guided_backprop(module, IMAGES, rule="gradient", fix_strides=False)
        assert flushes() is before
        assert inside == [True, True]
        elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: elsewhere.append(flushes()))
        thread.start()
        thread.join()
        assert elsewhere == [before]
    finally:
        torch.set_flush_denormal(False)


# Strides


def test_a_patch_embedding_needs_no_treatment_of_its_stride() -> None:
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU()).eval()
    how = {"layer": "3", "filters": [0, 1]}
    for fix in ("nearest", "aligned"):
        assert torch.equal(
            partlens.guided_backprop(patches, IMAGES, fix_strides=fix, **how),
            partlens.guided_backprop(patches, IMAGES, fix_strides=False, **how),
        )
    for kernel, stride in ((3, 2), (1, 2)):  # overlapping windows, and gaps between them
        other = nn.Sequential(nn.Conv2d(3, 8, kernel, stride), nn.ReLU()).eval()
        treated, plain = (
            partlens.guided_backprop(other, IMAGES, layer="1", filters=0, start="ones", fix_strides=fix)
            for fix in (True, False)
        )
        assert not torch.equal(treated, plain)


# At the door


SMALL = network(nn.ReLU)
GOOD_FILTERS: dict[str, Any] = {
    "a tensor": torch.tensor([1, 2]),
    "an array": np.array([1, 2]),
    "small integers": np.array([1, 2], dtype=np.uint8),
    "a range": range(1, 3),
    "a tuple of numpy numbers": (np.int64(1), np.int32(2)),
    "a list of tensors": [torch.tensor(1), torch.tensor(2)],
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("filters", GOOD_FILTERS.values(), ids=list(GOOD_FILTERS))
def test_filters_come_as_any_whole_numbers_on_one_axis(filters: Any) -> None:
    wanted = partlens.guided_backprop(SMALL, IMAGES, layer="5", filters=[1, 2])
    assert torch.equal(partlens.guided_backprop(SMALL, IMAGES, layer="5", filters=filters), wanted)
    if len(filters) == len(IMAGES):
        targets = partlens.guided_backprop(SMALL, IMAGES, torch.tensor([1, 2]))
        assert torch.equal(partlens.guided_backprop(SMALL, IMAGES, filters), targets)


@pytest.mark.usefixtures("unchecked")
def test_one_filter_is_one_however_it_comes() -> None:
    wanted = partlens.guided_backprop(SMALL, IMAGES, layer="5", filters=1)
    for one in (np.int64(1), torch.tensor(1), np.array(1)):
        assert torch.equal(partlens.guided_backprop(SMALL, IMAGES, layer="5", filters=one), wanted)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "wrong",
    ["a", "12", 1.0, True, [True], {1}, torch.tensor([0.0, 1.0]), np.array([[1]]), torch.tensor([True, False]), b"1"],
    ids=repr,
)
def test_what_is_no_whole_number_is_refused(wrong: Any) -> None:
    with pytest.raises(InputTypeError, match="target as a whole number"):
        partlens.guided_backprop(SMALL, IMAGES, wrong)
    with pytest.raises(InputTypeError, match="filters as a whole number"):
        partlens.guided_backprop(SMALL, IMAGES, layer="5", filters=wrong)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (IMAGES.permute(0, 2, 3, 1), r"shape \(2, 16, 16, 3\).*permute\(0, 3, 1, 2\)"),
        (IMAGES[:, :1], r"shape \(2, 1, 16, 16\).*to have 3 channels"),
        (IMAGES[:, :, :0], r"at least one image with axes"),
        (IMAGES[:, :0], r"at least one image with axes"),
        (IMAGES[None], r"at least one image with axes"),
        (IMAGES.to_sparse(), r"an ordinary tensor of images, got layout torch\.sparse_coo"),
        (IMAGES.to("meta"), r"an ordinary tensor of images, got a tensor without values"),
        (IMAGES.numpy(), r"a floating-point tensor of images, got ndarray"),
        ((IMAGES * 255).byte(), r"a floating-point tensor of images, got torch\.uint8"),
        (IMAGES[..., :2, :2], r"images that Sequential takes, got shape \(2, 3, 2, 2\)"),
    ],
    ids=["NHWC", "one channel", "no row", "no channel", "video", "sparse", "meta", "array", "bytes", "too small"],
)
def test_images_that_cannot_be_used_are_refused_in_a_sentence(images: Any, words: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=words):
        partlens.guided_backprop(SMALL, images)
    # To read a layer, its layout is found beforehand.
    reading = words if "shape" not in words else "permute" if "permute" in words else "an input that Sequential accepts"
    with pytest.raises((InputError, InputTypeError), match=reading):
        backward_signals(SMALL, images, [{"5": torch.ones(2, 4)}])


class Two(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


@pytest.mark.parametrize(
    "module",
    [nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), nn.Sequential(nn.Conv3d(3, 4, 3), nn.Flatten()), Two()],
    ids=["one channel", "video", "two inputs"],
)
def test_networks_of_other_inputs_are_refused_in_a_sentence(module: nn.Module) -> None:
    with pytest.raises(InputError, match=r"Expected images that \w+ takes, got shape \(2, 3, 16, 16\)"):
        partlens.guided_backprop(module, IMAGES)


def test_the_owners_own_exception_passes() -> None:
    class Enough(RuntimeError):
        pass

    def stop(*_: Any) -> None:
        raise Enough

    module = network(nn.ReLU)
    module[3].register_forward_hook(stop)
    with pytest.raises(Enough):
        partlens.guided_backprop(module, IMAGES)


@pytest.mark.usefixtures("unchecked")
def test_a_layers_name_is_a_text() -> None:
    with pytest.raises(InputTypeError, match="Expected layer as a text or None, got 5"):
        partlens.guided_backprop(SMALL, IMAGES, layer=5, filters=1)
    with pytest.raises(LayerError):
        partlens.guided_backprop(SMALL, IMAGES, layer="55", filters=1)


@pytest.mark.usefixtures("unchecked")
def test_wrong_kinds_for_the_filter_loss_and_the_lasso() -> None:
    maps, templates = torch.rand(3, 2, 4, 4), part_templates(4)
    x, labels = torch.rand(6, 4), torch.eye(2).repeat(3, 1)
    cases: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: filter_loss(maps, templates, alpha="x"), InputTypeError, "alpha as a number"),
        (lambda: filter_loss(maps, templates, alpha=True), InputTypeError, "alpha as a number"),
        (lambda: filter_loss(maps[:0], templates), InputError, "at least one image"),
        (lambda: filter_loss(maps[0], templates), InputError, "axes image, filter"),
        (lambda: filter_loss(maps.long(), templates), InputTypeError, "maps as a floating-point tensor"),
        (lambda: filter_loss(maps.numpy(), templates), InputTypeError, "maps as a floating-point tensor"),
        (lambda: filter_loss(maps.to_sparse(), templates), InputTypeError, "maps as a floating-point tensor"),
        (lambda: filter_loss(maps, None), InputTypeError, "templates as a floating-point tensor"),
        (
            lambda: filter_loss(maps, templates, gradient=["exact"]),
            InputTypeError,
            "gradient as one of exact, approximate",
        ),
        (lambda: mu_lasso(x.to_sparse(), labels), InputTypeError, "ordinary tensor of responses"),
        (lambda: mu_lasso(x, labels.to_sparse()), InputTypeError, "ordinary tensor of labels"),
        (lambda: mu_lasso(x.to("meta"), labels), InputTypeError, "without values"),
        (lambda: mu_lasso(x, labels, tolerance="x"), InputTypeError, "tolerance as a number"),
        (lambda: mu_lasso(x, labels, on_failure=[]), InputTypeError, "on_failure as one of raise, return"),
    ]
    for call, kind, words in cases:
        with pytest.raises(kind, match=words):
            call()
