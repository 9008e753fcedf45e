"""Contributions of filters and parts to a score: they sum, they match enumeration, removal does what they say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from partlens.artefacts.contributions import (
    Tracks,
    class_score,
    filter_contributions,
    part_contributions,
    tracks,
)
from partlens.explainer.assembly import build_explainer, explainer_structure, performer_head
from partlens.explainer.config import ExplainerConfig
from partlens.performer.taps import forward_taps
from partlens.performer.zoo import Performer
from partlens.vocabulary import InputError


def _bent(encoded: Tensor) -> Tensor:
    """A score with interactions: no part's contribution can be read off alone."""
    sums = encoded.sum((2, 3))
    return sums[:, 0] * sums[:, 1] + torch.relu(sums[:, 2] - 0.5) + 0.3 * sums[:, 3]


@pytest.fixture
def some(generator: torch.Generator) -> Tracks:
    z, o = torch.rand(2, 3, 4, 2, 2, generator=generator)
    return Tracks(z, o, z)


def test_filters_and_ordinary_track_sum_to_the_score_difference(some: Tracks) -> None:
    found = filter_contributions(_bent, some)
    total = found.filters.sum(1) + found.ordinary + found.remainder
    assert torch.allclose(total, found.score - found.baseline, atol=1e-5)
    assert float(found.remainder.abs().mean()) <= 0.005 * float((found.score - found.baseline).abs().mean())


def test_shapley_values_match_the_mean_over_all_orders(some: Tracks) -> None:
    part_of = torch.tensor([0, 1, 1, 2])
    found = part_contributions(_bent, some, part_of, 3)

    def worth(players: frozenset[int]) -> Tensor:
        keep = torch.tensor([float(int(p) in players) for p in part_of])[None, :, None, None]
        return _bent(keep * some.interpretable + float(3 in players) * some.ordinary)

    mean = torch.zeros(3, 4)
    for order in itertools.permutations(range(4)):
        for place, player in enumerate(order):
            before = frozenset(order[:place])
            mean[:, player] += (worth(before | {player}) - worth(before)) / math.factorial(4)
    assert torch.allclose(found.parts.float(), mean[:, :3], atol=1e-5)
    assert torch.allclose(found.ordinary.float(), mean[:, 3], atol=1e-5)
    assert torch.allclose(found.parts.sum(1) + found.ordinary, found.score - found.baseline, atol=1e-9)


def test_removal_is_the_fall_of_the_score(some: Tracks) -> None:
    found = part_contributions(_bent, some, torch.tensor([0, 0, 1, 1]), 2)
    without = some.interpretable.clone()
    without[:, 2:] = 0
    fall = _bent(some.interpretable + some.ordinary) - _bent(without + some.ordinary)
    assert torch.allclose(found.removal[:, 1].float(), fall, atol=1e-5)


def test_gradient_times_activation_is_exact_for_a_linear_score(some: Tracks) -> None:
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def linear(encoded: Tensor) -> Tensor:
        return encoded.sum((2, 3)) @ weight

    found = filter_contributions(linear, some)
    assert torch.allclose(found.gradient_activation, some.interpretable.sum((2, 3)) * weight, atol=1e-5)
    assert torch.allclose(found.filters, found.gradient_activation, atol=1e-5)
    assert found.steps == 8


def test_through_a_real_explainer_the_whole_is_the_fed_back_score(tiny: Performer, generator: torch.Generator) -> None:
    batch = torch.randn(4, 3, 32, 32, generator=generator)
    structure = explainer_structure(tiny, batch[:1], "relu2", None)
    explainer = build_explainer(tiny, structure, ExplainerConfig(p_init=0.4))
    output, taps = forward_taps(tiny, batch, ["relu2"])
    explainer.start_norms(taps["relu2"])
    explainer.eval()
    head = performer_head(tiny, structure)
    classes = output.argmax(1)
    parts = tracks(explainer, taps["relu2"])
    score = class_score(explainer, head, classes)
    with torch.no_grad():
        fed = head(explainer(taps["relu2"]).reconstructions[-1])
    fed = fed[0] if isinstance(fed, tuple) else fed
    found = filter_contributions(score, parts)
    assert torch.allclose(found.score, fed.gather(1, classes[:, None])[:, 0], atol=1e-5)
    assert float(found.remainder.abs().mean()) < 0.01 * float((found.score - found.baseline).abs().mean())
    grouped = part_contributions(score, parts, torch.arange(12) % 3, 3)
    assert torch.allclose(grouped.score.float(), found.score, atol=1e-5)
    assert all(p.grad is None for p in explainer.parameters())


def test_bad_parts(some: Tracks) -> None:
    with pytest.raises(InputError, match="Expected 1 to 11 parts, got 12"):
        part_contributions(_bent, some, torch.zeros(4, dtype=torch.long), 12)
    with pytest.raises(InputError, match="Expected a part from 0 to 1 for each of 4 filters"):
        part_contributions(_bent, some, torch.tensor([0, 1, 2, 0]), 2)
    with pytest.raises(InputError, match="Expected a tolerance between 0 and 1, got 0"):
        filter_contributions(_bent, some, tolerance=0.0)
