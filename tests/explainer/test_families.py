"""Networks of every family have an explainer that starts as their copy: with p = 0 it says what they say."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest
import torch
from torch import Tensor, nn

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer, build_explainer, explainer_structure, performer_head
from partlens.network.outputs import class_scores
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.object_parts.contributions import class_score, tracks

MADE = run_path(str(Path(__file__).parents[1] / "network" / "families.py"))
FAMILIES, performer_of, network_of, Branching = (
    MADE[name] for name in ("FAMILIES", "performer_of", "network_of", "Branching")
)


def photos(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def explained(performer: Performer, tap: str | None = None) -> tuple[Explainer, Tensor, Tensor]:
    """Build an explainer with p = 0; return it with its input and the network's scores."""
    structure = explainer_structure(performer, photos(), tap or performer.tap)
    explainer = build_explainer(performer, structure, ExplainerConfig.preset("partlens", standardise=False))
    output, taps = forward_taps(performer, photos(), [structure.read])
    explainer.start_norms(taps[structure.read])
    with torch.no_grad():
        explainer.share_logit.fill_(-torch.inf)
    return explainer.eval(), taps[structure.read], class_scores(output, len(photos()))


@pytest.mark.parametrize("family", FAMILIES)
def test_with_p_of_0_the_explainer_says_what_the_network_says(family: str) -> None:
    performer = performer_of(Branching(network_of(family)).eval())
    explainer, maps, scores = explained(performer)
    head = performer_head(performer, explainer.structure)
    with torch.no_grad():
        (again,) = head(explainer(maps).reconstructions[-1])
    assert torch.allclose(again, scores, atol=1e-5)
    assert bool((again.argmax(1) == scores.argmax(1)).all())
    # What parts add is measured through the same layers.
    score = class_score(explainer, head, scores.argmax(1), tracks(explainer, maps).passing)
    both = tracks(explainer, maps)
    with torch.no_grad():
        assert torch.allclose(score(both.interpretable + both.ordinary), scores.amax(1), atol=1e-5)
        twice = score(torch.cat([both.ordinary, both.ordinary]))
    assert torch.allclose(twice[:3], twice[3:])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_interpretable_track_is_not_negative_whatever_the_tap_is(family: str) -> None:
    explainer, maps, _ = explained(performer_of(family))
    assert explainer.structure.signed == (family != "relu")
    with torch.no_grad():
        found = explainer.normed_tracks(maps)
    assert float(found.interp2.min()) >= 0
    assert (float(found.ordinary.min()) < 0) == explainer.structure.signed


def test_a_filter_that_is_always_negative_is_normed_by_its_magnitude() -> None:
    class Negative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return -x.relu() - 1

    network = network_of("relu")
    network.two.act2 = Negative()
    explainer, maps, scores = explained(performer_of(network), "two")
    assert float(maps.max()) < 0
    (again,) = performer_head(performer_of(network), explainer.structure)(explainer(maps).reconstructions[-1])
    assert torch.allclose(again, scores, atol=1e-5)
