"""Baseline heat maps: their formulas, one form for all, and the network handed back as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partlens.attribution.backprop import guided_backprop, heat_map
from partlens.errors import InputError, LayerError
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer
from partlens_papers.flowers import baselines
from partlens_papers.flowers.baselines import (
    BASELINES,
    cam,
    guided_cam,
    guided_map,
    last_maps,
    upsampled_activation,
)

SIZE = (32, 32)


def _pooled() -> Performer:
    """A network without a layer of more than one cell."""
    prepare = Preprocessing(size_px=SIZE, resize="squash")
    return load_performer(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval(), prepare)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 3, *SIZE), torch.tensor([0, 3, 1, 1, 2])


@pytest.mark.parametrize("name", BASELINES)
def test_every_method_has_one_form(name: str, tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    before, kept = weights_sha256(tiny.module), images.clone()
    for parameter in tiny.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    hooks = [len(m._forward_hooks) for m in tiny.module.modules()]
    state = torch.get_rng_state()
    maps = BASELINES[name](tiny, images, classes)
    assert maps.shape == (5, *SIZE)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    low, high = maps.amin((1, 2)), maps.amax((1, 2))
    assert (low == 0).all()
    assert ((high == 0) | (high == 1)).all()
    assert (high == 1).any()
    assert weights_sha256(tiny.module) == before
    assert torch.equal(images, kept)
    assert all((p.grad == 1).all() and p.requires_grad for p in tiny.module.parameters())
    assert [len(m._forward_hooks) for m in tiny.module.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)
    chunks = BASELINES[name](tiny, images, classes, batch_size=2)  # type: ignore[call-arg]
    torch.testing.assert_close(chunks, maps, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["grad-cam", "grad-cam++"])
def test_an_error_inside_leaves_no_trace(kind: baselines.Cam, tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(IndexError):
        cam(tiny, batch[0], torch.full((5,), 99), kind=kind)
    assert all(p.requires_grad and p.grad is None for p in tiny.module.parameters())
    assert not any(m._forward_hooks for m in tiny.module.modules())


def gradients(performer: Performer, images: Tensor, classes: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Maps of a layer, and the gradient of each image's class score with regard to them."""
    kept: list[Tensor] = []
    handle = performer.module.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out))
    scores = performer.module(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), kept)
    return kept[0].detach(), gradient


def stretched(maps: Tensor) -> Tensor:
    """One map at a time."""
    done = []
    for each in maps:
        span = each.max() - each.min()
        done.append((each - each.min()) / span if span > 0 else torch.zeros_like(each))
    return torch.stack(done)


@pytest.mark.parametrize("layer", ["relu3", "relu2"])
def test_grad_cam_is_its_formula_and_captums(layer: str, tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    maps, gradient = gradients(tiny, images, classes, layer)
    weighted = torch.zeros(len(maps), *maps.shape[2:])
    for n in range(len(maps)):
        for k in range(maps.shape[1]):
            weighted[n] += gradient[n, k].mean() * maps[n, k]
    want = stretched(F.interpolate(weighted.clamp(min=0)[:, None], size=SIZE, mode="bilinear")[:, 0])
    got = cam(tiny, images, classes, kind="grad-cam", layer=layer)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    captum = pytest.importorskip("captum.attr")
    theirs = captum.LayerGradCam(tiny.module, tiny.module.get_submodule(layer)).attribute(
        images, target=classes, relu_attributions=True
    )
    enlarged = F.interpolate(theirs.detach(), size=SIZE, mode="bilinear")[:, 0]
    torch.testing.assert_close(got, stretched(enlarged), atol=2e-5, rtol=1e-4)


def test_grad_cam_plus_plus_is_its_formula(tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    maps, gradient = gradients(tiny, images, classes, "relu3")
    weighted = torch.zeros(len(maps), *maps.shape[2:])
    for n in range(len(maps)):
        for k in range(maps.shape[1]):
            g, total = gradient[n, k], maps[n, k].sum()
            alpha = torch.where(g != 0, g**2 / (2 * g**2 + total * g**3 + 1e-6), 0)
            weighted[n] += (alpha * g.clamp(min=0)).sum() * maps[n, k]
    want = stretched(F.interpolate(weighted.clamp(min=0)[:, None], size=SIZE, mode="bilinear")[:, 0])
    got = cam(tiny, images, classes, kind="grad-cam++", layer="relu3")
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(got, cam(tiny, images, classes, layer="relu3"), atol=0.05)


def test_guided_cams_are_products(tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    guided = heat_map(guided_backprop(tiny, images, classes, fix_strides=False))
    torch.testing.assert_close(guided_map(tiny, images, classes), guided)
    for kind in ("grad-cam", "grad-cam++"):
        want = stretched(guided * cam(tiny, images, classes, kind=kind))
        torch.testing.assert_close(guided_cam(tiny, images, classes, kind=kind), want)
    fixed = guided_map(tiny, images, classes, fix_strides=True)
    assert not torch.allclose(fixed, guided)  # the baseline leaves the strides alone


def test_class_methods_follow_the_class(tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    for name in ("deconvnet + guided backprop", "grad-cam"):
        other = BASELINES[name](tiny, images, (classes + 1) % 4)
        assert not torch.allclose(other, BASELINES[name](tiny, images, classes), atol=0.05)


def test_upsampled_mean_of_the_last_maps(tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    assert last_maps(tiny) == "relu4"
    maps = forward_taps(tiny, images, ["relu4"])[1]["relu4"].mean(1, keepdim=True)
    want = stretched(F.interpolate(maps, size=SIZE, mode="bilinear")[:, 0])
    torch.testing.assert_close(upsampled_activation(tiny, images, classes), want)


def test_upsampled_chosen_features_are_joined_by_their_maximum(tiny: Performer, batch: tuple[Tensor, Tensor]) -> None:
    images, classes = batch
    chosen = {0: [("relu2", 3)], 1: [("relu2", 1), ("conv3", 4)], 2: [("flatten", 0)], 3: [("relu3", 0), ("relu3", 1)]}
    got = upsampled_activation(tiny, images, classes, chosen=chosen)
    names = ["relu2", "conv3", "relu3", "flatten"]
    taps = forward_taps(tiny, images, names)[1]
    for n, c in enumerate(classes.tolist()):
        parts = []
        for layer, k in chosen[c]:
            one = taps[layer][n, k]
            if one.ndim == 0:  # a fully connected feature has no place
                parts.append(torch.zeros(SIZE))
                continue
            parts.append(stretched(F.interpolate(one[None, None], size=SIZE, mode="bilinear")[0])[0])
        torch.testing.assert_close(got[n], torch.stack(parts).amax(0))
    assert (got[4] == 0).all()
    assert (got[2] == 1).any()


def blind() -> Performer:
    """A network whose scores do not depend on the image."""
    module = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                    classes=nn.Linear(4, 2))
    ).eval()  # fmt: skip
    nn.init.zeros_(module.conv.weight)
    nn.init.constant_(module.conv.bias, -1)
    from partlens.network.preprocessing import Preprocessing

    return Performer(module, "blind", Preprocessing(size_px=SIZE, resize="squash"), weights_sha256(module))


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_to_show_is_a_map_of_zeros(name: str, batch: tuple[Tensor, Tensor]) -> None:
    assert (BASELINES[name](blind(), batch[0], torch.zeros(5).long()) == 0).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda p, i, c: cam(p, i, c, layer="relu9"), LayerError, "a module of the network, got relu9"),
        (lambda p, i, c: upsampled_activation(p, i, c, chosen={0: [("relu2", 0)]}), InputError, "got none of class 1"),
        (
            lambda p, i, c: upsampled_activation(p, i, c, chosen={c: [("relu2", 12)] for c in range(4)}),
            InputError,
            "filters of relu2 from 0 to 11",
        ),
        (lambda p, i, c: guided_map(p, i, c, batch_size=0), InputError, "a batch_size of at least 1, got 0"),
        (lambda p, i, c: upsampled_activation(p, i, c, layer="relu9"), LayerError, "relu9"),
        (lambda p, i, c: last_maps(_pooled()), LayerError, "more than one cell"),
    ],
)
def test_refusals(
    call: Callable[..., object], error: type, text: str, tiny: Performer, batch: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(error, match=text):
        call(tiny, *batch)
