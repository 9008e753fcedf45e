"""Explainers of several categories, of evidence, and of labels instead of features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from partlens.errors import InputError
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.evidence import decision_scores, evidence_maps, sharpened
from partlens.explainer.network import Explainer, ExplainerStructure
from partlens.explainer.terms import BatchFacts, Objective, ViewPair, evidence_cost
from partlens.explainer.training_maps import TrainingMaps, norm_sample

SIDE = 6


def explainer_with(**changes: object) -> Explainer:
    structure = ExplainerStructure("tap", ("a",), 4, 4, (SIDE, SIDE), None, "tap")
    torch.manual_seed(1)
    explainer = Explainer(structure, ExplainerConfig.preset("partlens", **changes), nn.Conv2d(4, 3, 3))
    explainer.start_norms(torch.rand(16, 4, SIDE, SIDE))
    return explainer.train()


def maps_of_two(labels: torch.Tensor) -> torch.Tensor:
    """Filters 0 and 1 answer to category 0, filters 2 and 3 to category 1."""
    maps = 0.05 * torch.rand(len(labels), 4, SIDE, SIDE)
    for row, label in enumerate(labels.tolist()):
        for k in (2 * label, 2 * label + 1):
            maps[row, k, row % SIDE, (row + k) % SIDE] += 4.0
    return maps


def test_filters_go_to_the_category_that_excites_them_most_and_can_move() -> None:
    objective = Objective(explainer_with().config, explainer_with(), (1.0,), categories=2)
    labels = torch.tensor([0, 0, 1, 1])
    objective._layer_cost("2", maps_of_two(labels), BatchFacts(4, labels=labels))
    assert objective.assigned("2").tolist() == [0, 0, 1, 1]
    for _ in range(60):
        objective._layer_cost("2", maps_of_two(1 - labels), BatchFacts(4, labels=labels))
    assert objective.assigned("2").tolist() == [1, 1, 0, 0]


def test_activity_runs_with_a_tenth_of_each_batch() -> None:
    objective = Objective(explainer_with().config, explainer_with(), (1.0,), categories=2)
    labels = torch.tensor([0, 0, 1])
    first, second = torch.rand(3, 4, SIDE, SIDE), torch.rand(3, 4, SIDE, SIDE)
    for maps in (first, second):
        objective._follow_activity("1", maps, labels)
    wanted = 0.9 * first[:2].sum((2, 3)).mean(0) + 0.1 * second[:2].sum((2, 3)).mean(0)
    assert torch.allclose(objective.state["activity.1"][:, 0], wanted)


def test_a_filter_learns_from_photos_of_its_category_only() -> None:
    objective = Objective(explainer_with().config, explainer_with(), (1.0,), categories=2)
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    maps = maps_of_two(labels).requires_grad_()
    cost, _ = objective._layer_cost("2", maps, BatchFacts(6, labels=labels))
    (gradient,) = torch.autograd.grad(cost.sum(), maps)
    size = gradient.abs().sum((2, 3))
    assert (size[labels == 0][:, :2] > 0).all()
    assert (size[labels == 1][:, 2:] > 0).all()
    assert (size[labels == 0][:, 2:] == 0).all()
    assert (size[labels == 1][:, :2] == 0).all()


def test_in_the_papers_rule_other_categories_take_the_negative_template() -> None:
    explainer = explainer_with(gradient="approximate", filter_background=True, score_scale_nats=0.0)
    objective = Objective(explainer.config, explainer, (1.0,), categories=2)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    maps = (20 * maps_of_two(labels)).requires_grad_()
    cost, _ = objective._layer_cost("2", maps, BatchFacts(6, labels=labels))
    (gradient,) = torch.autograd.grad(cost.sum(), maps)
    others = gradient[labels == 1][:, 0]
    # The negative template is flat: one value for the whole map.
    assert torch.allclose(others, others[:, :1, :1].expand_as(others))
    own = gradient[labels == 0][:, 0]
    assert (own.flatten(1).std(1) > 0).all()


def test_one_category_with_labels_is_the_same_as_without() -> None:
    maps = torch.rand(6, 4, SIDE, SIDE)
    pair = ViewPair(slice(0, 3), slice(3, 6), torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]).repeat(3, 1))
    evidence = torch.rand(6, SIDE, SIDE)
    costs = []
    for labels in (None, torch.zeros(6, dtype=torch.long)):
        explainer = explainer_with(evidence_weight=2.0)
        objective = Objective(explainer.config, explainer, (1.0,))
        costs.append(objective._layer_cost("2", maps, BatchFacts(6, pair, evidence, labels))[0])
    assert torch.allclose(costs[0], costs[1], atol=1e-6)


def test_pairs_stay_pairs_when_a_batch_is_split_by_category() -> None:
    explainer = explainer_with()
    objective = Objective(explainer.config, explainer, (1.0,), categories=2)
    labels = torch.tensor([0, 1, 1, 0, 1, 1])
    windows = torch.arange(15.0).view(3, 5)
    groups = objective._groups(
        "2", maps_of_two(labels), BatchFacts(6, ViewPair(slice(0, 3), slice(3, 6), windows), None, labels)
    )
    assert [g.rows.tolist() for g in groups] == [[0, 3], [1, 2, 4, 5]]
    assert groups[1].pair is not None
    assert torch.equal(groups[1].pair.windows, windows[1:])
    assert (groups[1].pair.first, groups[1].pair.second) == (slice(0, 2), slice(2, 4))


def test_evidence_is_where_a_linear_network_looks() -> None:
    class Corner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            score = 3 * x[:, 0, 1, 2] - 4 * x[:, 1, 1, 2] + 0.5 * x[:, 0, 4, 4]
            return torch.stack([score, score - 1], 1)

    maps = torch.full((2, 2, SIDE, SIDE), 0.5)
    found = evidence_maps(Corner(), maps)
    assert float(found[0, 1, 2]) == pytest.approx(5 * 0.5**0.5 / 2**0.5 * 2**0.5, rel=1e-5)
    assert float(found[0, 4, 4]) == pytest.approx(0.5 * 0.5**0.5, rel=1e-5)
    assert int((found[0] > 0).sum()) == 2


def test_evidence_of_a_single_output_is_of_the_decision_whatever_its_sign() -> None:
    assert decision_scores(torch.tensor([[-2.0], [3.0]])).tolist() == [2.0, 3.0]
    assert decision_scores(torch.tensor([[-2.0, 1.0]])).tolist() == [1.0]


def test_sharpened_evidence_peaks_at_one_and_says_nothing_where_there_is_none() -> None:
    evidence = torch.rand(3, SIDE, SIDE)
    evidence[2] = 0
    found = sharpened(evidence, 3, 4.0)
    assert found[:2].flatten(1).amax(1).tolist() == [1.0, 1.0]
    assert bool((found[2] == 1).all())
    with pytest.raises(InputError, match="odd evidence_smooth_cells, got 4"):
        sharpened(evidence, 4, 2.0)


def test_evidence_cost_is_least_for_a_peak_on_the_evidence() -> None:
    scores = torch.zeros(1, 2, SIDE * SIDE + 1)
    scores[0, 0, 8] = scores[0, 1, 20] = 30.0
    evidence = torch.zeros(1, SIDE, SIDE)
    evidence[0, 8 // SIDE, 8 % SIDE] = 1.0
    cost = evidence_cost(scores, evidence)
    assert float(cost[0]) == pytest.approx(0.0, abs=1e-5)
    assert float(cost[1]) > 10


def test_classification_objective_learns_labels_and_needs_a_head() -> None:
    explainer = explainer_with(objective="classification", learning_rate_decoder=1e-2)
    targets = (torch.zeros(8, 3, SIDE - 2, SIDE - 2),)
    maps = torch.rand(8, 4, SIDE, SIDE)
    maps[:4] += torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None, None]
    bare = Objective(explainer.config, explainer, (1.0,))
    with pytest.raises(InputError, match="upper layers for objective=classification"):
        bare.joint(explainer(maps), targets, BatchFacts(4))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)).requires_grad_(requires_grad=False)
    objective = Objective(explainer.config, explainer, (1.0,), head=head)
    optimiser = torch.optim.Adam(explainer.decoder.parameters(), 0.05)
    losses = []
    for _ in range(40):
        loss, logged = objective.joint(explainer(maps), targets, BatchFacts(4))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(logged["classification"]) / explainer.config.classification_weight)
    assert losses[0] > 0.4
    assert losses[-1] < 0.5 * losses[0]


def test_classification_takes_what_a_bfloat16_decoder_gives() -> None:
    explainer = explainer_with(objective="classification")
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)).requires_grad_(requires_grad=False)
    objective = Objective(explainer.config, explainer, (1.0,), head=head)
    with torch.autocast("cpu", torch.bfloat16):
        output = explainer(torch.rand(6, 4, SIDE, SIDE))
    assert output.reconstructions[-1].dtype == torch.bfloat16
    loss, _ = objective.joint(output, (torch.zeros(6, 3, SIDE - 2, SIDE - 2),), BatchFacts(3))
    loss.backward()
    assert bool(torch.isfinite(explainer.decoder.weight.grad).all())


def test_norms_of_several_categories_are_measured_on_photos_of_each() -> None:
    """Photos often stand in the order of their categories: the first ones alone would be of one category."""
    labels = torch.arange(3).repeat_interleave(300)
    maps, windows = np.zeros((900, 1, 2, 2), np.float16), torch.zeros(900, 1, 5)
    data = TrainingMaps(maps, (), windows, np.arange(0), labels=labels)
    drawn = norm_sample(data)
    assert len(drawn) == 256
    assert torch.bincount(labels[drawn], minlength=3).min() > 80
    assert norm_sample(dataclasses.replace(data, labels=None)).tolist() == list(range(256))


def test_a_category_that_comes_late_is_measured_from_its_first_batch_on() -> None:
    objective = Objective(explainer_with().config, explainer_with(), (1.0,), categories=2)
    only = torch.tensor([0, 0, 0, 0])
    objective._follow_activity("2", maps_of_two(only), only)
    assert objective.assigned("2").tolist() == [0, 0, 0, 0]
    both = torch.tensor([0, 0, 1, 1])
    objective._follow_activity("2", maps_of_two(both), both)
    assert objective.assigned("2").tolist() == [0, 0, 1, 1]
