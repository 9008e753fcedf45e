"""Contributions of filters and parts to a score: they sum, they match enumeration, removal does what they say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from partlens.errors import InputError
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import NormedTracks, build_explainer, explainer_structure, performer_head
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.object_parts.contributions import (
    MOST_PLAYERS,
    class_score,
    gradient_activation,
    part_contributions,
    part_heat_maps,
    shares_of_random_parts,
    sums_by_part,
    tracks,
)
from partlens.object_parts.shapley import Shapley


def _bent(encoded: Tensor) -> Tensor:
    """A score with interactions: no part's contribution can be read off alone."""
    sums = encoded.sum((2, 3))
    return sums[:, 0] * sums[:, 1] + torch.relu(sums[:, 2] - 0.5) + 0.3 * sums[:, 3]


@pytest.fixture
def some(generator: torch.Generator) -> NormedTracks:
    z, o = torch.rand(2, 3, 4, 2, 2, generator=generator)
    return NormedTracks(z, z, z, z, o, None)


def test_shapley_values_match_the_mean_over_all_orders(some: NormedTracks) -> None:
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
    assert torch.allclose(found.players[:, :3].float(), mean[:, :3], atol=1e-5)
    assert torch.allclose(found.players[:, 3].float(), mean[:, 3], atol=1e-5)
    assert torch.allclose(found.players.sum(1), found.everyone - found.nobody, atol=1e-9)


@pytest.mark.parametrize("wrong", [0, MOST_PLAYERS])
def test_one_part_to_as_many_as_can_be_enumerated(some: NormedTracks, wrong: int) -> None:
    alone = part_contributions(_bent, some, torch.zeros(4, dtype=torch.long), 1)
    assert torch.allclose(alone.players.sum(1), alone.everyone - alone.nobody, atol=1e-9)
    part_contributions(_bent, some, torch.zeros(4, dtype=torch.long), MOST_PLAYERS - 1)
    with pytest.raises(InputError, match=f"Expected 1 to {MOST_PLAYERS - 1} parts, got {wrong}"):
        part_contributions(_bent, some, torch.zeros(4, dtype=torch.long), wrong)


def test_removal_is_the_fall_of_the_score(some: NormedTracks) -> None:
    found = part_contributions(_bent, some, torch.tensor([0, 0, 1, 1]), 2)
    without = some.interpretable.clone()
    without[:, 2:] = 0
    fall = _bent(some.interpretable + some.ordinary) - _bent(without + some.ordinary)
    assert torch.allclose(found.loss[:, 1].float(), fall, atol=1e-5)


def test_gradient_times_activation_is_exact_for_a_linear_score(some: NormedTracks) -> None:
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def linear(encoded: Tensor) -> Tensor:
        return encoded.sum((2, 3)) @ weight

    found = gradient_activation(linear, some)
    assert torch.allclose(found, some.interpretable.sum((2, 3)) * weight, atol=1e-5)
    assert not found.requires_grad
    assert torch.allclose(gradient_activation(linear, some, at=(0.25, 0.75)), found, atol=1e-5)


def test_integrated_gradients_sum_to_the_rise(some: NormedTracks) -> None:
    """Of a quadratic score the middles of equal steps are exact."""

    def quadratic(encoded: Tensor) -> Tensor:
        sums = encoded.sum((2, 3))
        return sums[:, 0] * sums[:, 1] + 0.3 * sums[:, 3]

    swapped = some._replace(interpretable=some.ordinary, ordinary=some.interpretable)
    both = [gradient_activation(quadratic, one, at=(0.25, 0.75)).sum(1) for one in (some, swapped)]
    rise = quadratic(some.interpretable + some.ordinary) - quadratic(torch.zeros_like(some.ordinary))
    assert torch.allclose(both[0] + both[1], rise, rtol=1e-4)


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
    grouped = part_contributions(score, parts, torch.arange(12) % 3, 3)
    assert torch.allclose(grouped.everyone.float(), fed.gather(1, classes[:, None])[:, 0], atol=1e-5)
    assert gradient_activation(score, parts).shape == (4, 12)
    assert all(p.grad is None for p in explainer.parameters())


def _tangled(encoded: Tensor) -> Tensor:
    """Three players gain only together: pairs of an order and its reverse do not cancel that."""
    sums = encoded.sum((2, 3))
    return sums[:, 0] * sums[:, 1] * sums[:, 2] + _bent(encoded)


def test_sampled_shapley_values_meet_the_exact_ones_within_their_error(some: NormedTracks) -> None:
    part_of = torch.tensor([0, 1, 2, 1])
    exact = part_contributions(_tangled, some, part_of, 3)

    def sampled() -> Shapley:
        draws = torch.Generator().manual_seed(5)
        return part_contributions(_tangled, some, part_of, 3, pairs=200, generator=draws)

    found = sampled()
    assert torch.allclose(found.loss, exact.loss, atol=1e-5)
    assert torch.allclose(found.players.sum(1), found.everyone - found.nobody, atol=1e-9)
    assert bool(((found.players - exact.players).abs() <= 4 * found.standard_error + 1e-5).all())
    assert float(found.standard_error.min()) > 1e-3
    assert float(exact.standard_error.max()) == 0
    assert torch.equal(found.players, sampled().players)


def test_the_standard_error_is_that_of_the_mean_over_pairs_of_orders(some: NormedTracks) -> None:
    part_of, pairs = torch.tensor([0, 1, 2, 1]), 3
    found = part_contributions(_tangled, some, part_of, 3, pairs=pairs, generator=torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(7)

    def score(members: set[int]) -> Tensor:
        kept = torch.tensor([float(int(part) in members) for part in part_of])
        ordinary = some.ordinary if 3 in members else 0 * some.ordinary
        return _tangled(some.interpretable * kept[:, None, None] + ordinary).double()

    gains = []  # [pair][player]: the mean over an order and its reverse
    for order in [torch.randperm(4, generator=draws).tolist() for _ in range(pairs)]:
        both = []
        for one in (order, order[::-1]):
            before = {player: set(one[: one.index(player)]) for player in range(4)}
            both.append(torch.stack([score(before[p] | {p}) - score(before[p]) for p in range(4)]))
        gains.append((both[0] + both[1]) / 2)
    each = torch.stack(gains)
    mean = each.mean(0)
    error = (((each - mean) ** 2).sum(0) / (pairs - 1)).sqrt() / math.sqrt(pairs)
    assert torch.allclose(found.players, mean.T, atol=1e-6)
    assert torch.allclose(found.standard_error, error.T, atol=1e-6)


def test_sampling_is_exact_for_a_score_without_interactions_and_serves_many_parts(generator: torch.Generator) -> None:
    z, o = torch.rand(2, 2, 20, 2, 2, generator=generator)

    def linear(encoded: Tensor) -> Tensor:
        return encoded.sum((1, 2, 3))

    found = part_contributions(
        linear, NormedTracks(z, z, z, z, o, None), torch.arange(20), 20, pairs=2, generator=generator
    )
    assert torch.allclose(found.players[:, :-1].float(), z.sum((2, 3)), atol=1e-4)
    assert float(found.standard_error.max()) < 1e-4


def test_parts_dealt_by_lot_keep_their_sizes_and_the_sum(generator: torch.Generator) -> None:
    part_of = torch.tensor([0, 0, 0, 1])
    assert torch.equal(
        shares_of_random_parts(torch.ones(2, 4), part_of, 2, generator=generator)[7], torch.tensor([[3.0, 1], [3, 1]])
    )
    filters = torch.rand(5, 4, generator=generator)
    dealt = shares_of_random_parts(filters, part_of, 2, draws=400, generator=generator)
    assert torch.allclose(dealt.sum(2), filters.sum(1).expand(400, 5), atol=1e-5)
    assert torch.allclose(dealt.mean(0)[:, 0], 0.75 * filters.sum(1), atol=0.06)
    assert not torch.equal(dealt[0], dealt[1])


def test_heat_maps_sum_to_the_contributions(generator: torch.Generator) -> None:
    masked = torch.rand(2, 3, 4, 4, generator=generator)
    masked[:, 2] = 0
    filters = torch.randn(2, 3, generator=generator)
    filters[:, 2] = 0
    part_of = torch.tensor([1, 0, 0])
    heat = part_heat_maps(masked, filters, part_of, 2)
    assert torch.allclose(heat.sum((2, 3)), sums_by_part(filters, part_of, 2), atol=1e-5)
    assert torch.allclose(
        heat[:, 1], masked[:, 0] * (filters[:, 0] / masked[:, 0].sum((1, 2)))[:, None, None], atol=1e-6
    )


def test_bad_parts(some: NormedTracks) -> None:
    with pytest.raises(InputError, match="Expected 1 to 11 parts, got 12"):
        part_contributions(_bent, some, torch.zeros(4, dtype=torch.long), 12)
    with pytest.raises(InputError, match="Expected a part from 0 to 1 for each of 4 filters"):
        part_contributions(_bent, some, torch.tensor([0, 1, 2, 0]), 2)
    with pytest.raises(InputError, match="Expected at least 2 pairs of orders, got 1"):
        part_contributions(_bent, some, torch.zeros(4).long(), 1, pairs=1, generator=torch.Generator())
