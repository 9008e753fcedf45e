"""Grad-CAM of both tracks: the formula, another package, the share of p, and networks handed back as they were."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partlens.attribution import grad_cam as room
from partlens.attribution.grad_cam import (
    concentration_frac,
    grad_cam,
    layer_grad_cam,
    random_grad_cam,
    track_grad_cam,
)
from partlens.errors import InputError, LayerError
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer, build_explainer, explainer_structure, performer_head
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps

SIZE = (32, 32)
CLASSES = torch.tensor([0, 3, 1, 1, 2])


@pytest.fixture
def batch(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 3, *SIZE, generator=generator)


@pytest.fixture
def maps(tiny: Performer, batch: Tensor) -> Tensor:
    return forward_taps(tiny, batch, ["relu2"])[1]["relu2"]


@pytest.fixture
def explained(tiny: Performer, batch: Tensor, maps: Tensor) -> tuple[Explainer, nn.Module]:
    structure = explainer_structure(tiny, batch, "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig.preset("partlens", p_init=0.4))
    explainer.start_norms(maps)
    return explainer.eval(), performer_head(tiny, structure)


@pytest.mark.parametrize("layer", ["relu3", "relu2"])
def test_a_layers_map_is_that_of_grad_cam_the_package(layer: str, tiny: Performer, batch: Tensor) -> None:
    package = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    ours = layer_grad_cam(tiny, batch, layer, CLASSES)
    with package.GradCAM(tiny.module, [tiny.module.get_submodule(layer)]) as extractor:
        theirs = torch.from_numpy(extractor(batch, [ClassifierOutputTarget(int(c)) for c in CLASSES]))
    # The package stretches each map to 0 … 1, before and after enlarging; ours keeps the units of the score.
    low, high = ours.amin((1, 2), keepdim=True), ours.amax((1, 2), keepdim=True)
    torch.testing.assert_close((ours - low) / (high - low), theirs, atol=2e-5, rtol=1e-4)


def by_hand(performer: Performer, batch: Tensor, layer: str) -> Tensor:
    found = []
    for image in range(len(batch)):
        kept: list[Tensor] = []
        handle = performer.module.get_submodule(layer).register_forward_hook(lambda _m, _i, out: kept.append(out))  # noqa: B023
        score = performer.module(batch[image : image + 1])[0, CLASSES[image]]
        handle.remove()
        (gradient,) = torch.autograd.grad(score, kept)
        joined = torch.zeros(kept[0].shape[2:])
        for k in range(kept[0].shape[1]):
            joined += gradient[0, k].mean() * kept[0][0, k].detach()
        found.append(F.interpolate(joined.clamp(min=0)[None, None], size=SIZE, mode="bilinear")[0, 0])
    return torch.stack(found)


@pytest.mark.parametrize("layer", ["relu3", "relu2"])
def test_a_layers_map_is_its_formula(
    layer: str, tiny: Performer, batch: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = layer_grad_cam(tiny, batch, layer, CLASSES)
    assert torch.allclose(ours, by_hand(tiny, batch, layer), atol=1e-6)
    assert not ours.requires_grad
    monkeypatch.setattr(room, "_BATCH", 2)
    assert torch.allclose(layer_grad_cam(tiny, batch, layer, CLASSES), ours, atol=1e-6)


def test_the_tracks_map_is_autograd_by_hand(
    explained: tuple[Explainer, nn.Module], maps: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer, head = explained
    ours = track_grad_cam(explainer, head, maps, CLASSES, size_px=SIZE)
    for image in range(5):
        _, interp2 = explainer.interpret(maps[image : image + 1])
        masked = explainer.masked(interp2).detach().requires_grad_()
        ordinary = (
            explainer.pool(explainer.conv_ordin(maps[image : image + 1]).relu())
            / explainer.norm_ordin.divisor[:, None, None]
        )
        mixed = explainer.p * explainer.pool(masked) / explainer.norm_interp.divisor[:, None, None]
        mixed = mixed + (1 - explainer.p) * ordinary
        score = head(explainer.decode(mixed)[-1])[0][0, CLASSES[image]]
        (gradient,) = torch.autograd.grad(score, masked)
        joined = torch.zeros(masked.shape[2:])
        for k in range(masked.shape[1]):
            joined += gradient[0, k].mean() * masked.detach()[0, k]
        want = F.interpolate(joined.clamp(min=0)[None, None], size=SIZE, mode="bilinear")[0, 0]
        assert torch.allclose(ours[image], want, atol=1e-6)
        # The mixture written out here is the explainer's own.
        assert torch.allclose(mixed, explainer.encoded(explainer.normed_tracks(maps[image : image + 1])), atol=1e-6)
    assert float(ours.max()) > 0
    monkeypatch.setattr(room, "_BATCH", 2)
    assert torch.allclose(track_grad_cam(explainer, head, maps, CLASSES, size_px=SIZE), ours, atol=1e-6)


def test_without_a_share_the_track_has_no_map(explained: tuple[Explainer, nn.Module], maps: Tensor) -> None:
    explainer, head = explained
    with torch.no_grad():
        explainer.share_logit.fill_(-200.0)
    assert float(track_grad_cam(explainer, head, maps, CLASSES, size_px=SIZE).max()) == 0


def test_networks_are_handed_back_as_they_were(
    tiny: Performer, explained: tuple[Explainer, nn.Module], batch: Tensor, maps: Tensor, state: Any
) -> None:
    explainer, head = explained
    tiny.module.relu3.inplace = True
    tiny.module.train()
    explainer.train()
    for module in (tiny.module, explainer):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = [state(m, python=False) for m in (tiny.module, explainer, head)]
    kept = (batch.clone(), maps.clone())
    layer_grad_cam(tiny, batch, "relu2", CLASSES)
    track_grad_cam(explainer, head, maps, CLASSES, size_px=SIZE)
    with pytest.raises(InputError, match="classes from 0 to 3"):
        layer_grad_cam(tiny, batch, "relu2", CLASSES + 9)
    with pytest.raises(InputError, match="classes from 0 to 3"):
        track_grad_cam(explainer, head, maps, CLASSES + 9, size_px=SIZE)
    assert [state(m, python=False) for m in (tiny.module, explainer, head)] == before
    assert torch.equal(kept[0], batch)
    assert torch.equal(kept[1], maps)


class Overwrites(nn.Module):
    """Writes into its layer's output after it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x)
        maps += 1
        return maps.mean((2, 3))


class Aside(nn.Module):
    """Has a layer that does not lead to the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.aside = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.first(x)
        self.aside(maps)
        return maps.mean((2, 3))


@pytest.mark.parametrize(
    ("network", "layer", "words"),
    [
        (Overwrites(), "first", "stay as they were"),
        (Aside(), "aside", "depend on aside"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), "1", "maps at 1"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "conv9", "a layer of"),
    ],
)
def test_layers_that_cannot_be_explained_are_refused(network: nn.Module, layer: str, words: str, batch: Tensor) -> None:
    with pytest.raises(LayerError, match=words):
        layer_grad_cam(network, batch, layer, CLASSES)


def test_an_inplace_activation_after_the_layer_changes_nothing(tiny: Performer, batch: Tensor) -> None:
    before = layer_grad_cam(tiny, batch, "conv3", CLASSES)
    tiny.module.relu3.inplace = True
    assert torch.equal(layer_grad_cam(tiny, batch, "conv3", CLASSES), before)


def test_frozen_networks_and_inference_mode_are_welcome(tiny: Performer, batch: Tensor) -> None:
    want = layer_grad_cam(tiny, batch, "relu2", CLASSES)
    tiny.module.requires_grad_(requires_grad=False)
    with torch.inference_mode():
        got = layer_grad_cam(tiny, batch, "relu2", CLASSES)
    assert torch.equal(got, want)


def test_inputs_are_checked(tiny: Performer, explained: tuple[Explainer, nn.Module], batch: Tensor) -> None:
    with pytest.raises(InputError, match="one class for each"):
        layer_grad_cam(tiny, batch[:0], "relu2", CLASSES[:0])
    with pytest.raises(InputError, match="maps"):
        track_grad_cam(*explained, torch.rand(5, 12, 4, 4), CLASSES, size_px=SIZE)


def test_concentration_is_counted_as_by_hand(generator: torch.Generator) -> None:
    maps = torch.rand(4, 5, 7, generator=generator) ** 3
    for n, share in enumerate(concentration_frac(maps).tolist()):
        held, cells = 0.0, 0
        for value in sorted(maps[n].flatten().tolist(), reverse=True):
            held, cells = held + value, cells + 1
            if held >= 0.5 * float(maps[n].sum()):
                break
        assert share == pytest.approx(cells / 35)
    for flat in (3, 7, 1000):
        assert float(concentration_frac(torch.full((1, 1, flat), 0.1))) == pytest.approx(math.ceil(flat / 2) / flat)
    with pytest.raises(InputError, match="negative"):
        concentration_frac(-maps)


def test_the_null_is_that_of_even_draws(generator: torch.Generator) -> None:
    # Cells drawn evenly from 0 … 1: those above t hold (1 - t²) of the sum, so half lies in 1 - sqrt(1/2) = 0.293.
    cells = random_grad_cam(50, (40, 40), (40, 40), generator)
    assert float(concentration_frac(cells).mean()) == pytest.approx(1 - math.sqrt(0.5), abs=0.004)
    assert random_grad_cam(2, (7, 7), SIZE, generator).shape == (2, *SIZE)


def test_only_filters_that_raise_the_score_count() -> None:
    maps = torch.zeros(1, 2, 2, 2)
    maps[0, 0, 0, 0], maps[0, 1, 1, 1] = 1.0, 1.0
    gradients = torch.ones(1, 2, 2, 2)
    gradients[0, 1] = -1
    assert grad_cam(maps, gradients, (2, 2))[0].tolist() == [[1.0, 0.0], [0.0, 0.0]]
