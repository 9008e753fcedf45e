"""Explainers of several categories: which filter belongs to which, and what it learns from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.terms import BatchFacts, Objective
from partlens.explainer.views import TrainingMaps

SIDE = 6


def objective_with(categories: int = 2, **changes: object) -> Objective:
    structure = ExplainerStructure("tap", ("a",), 4, 4, (SIDE, SIDE), None, "tap")
    torch.manual_seed(1)
    config = ExplainerConfig.preset("partlens", teachers=0, **changes)
    explainer = Explainer(structure, config, nn.Conv2d(4, 3, 3))
    explainer.start_norms(torch.rand(16, 4, SIDE, SIDE))
    return Objective.of(explainer.train(), (1.0,), categories)


def facts_of(labels: Tensor) -> BatchFacts:
    return BatchFacts(labels, torch.arange(len(labels)), torch.zeros(len(labels), 5))


def maps_of_two(labels: Tensor) -> Tensor:
    """Filters 0 and 1 respond to category 0, filters 2 and 3 to category 1."""
    maps = 0.05 * torch.rand(len(labels), 4, SIDE, SIDE)
    for row, label in enumerate(labels.tolist()):
        for k in (2 * label, 2 * label + 1):
            maps[row, k, row % SIDE, (row + k) % SIDE] += 4.0
    return maps


def test_filters_go_to_the_category_that_excites_them_most_and_can_move() -> None:
    objective = objective_with()
    labels = torch.tensor([0, 0, 1, 1])
    objective.layer_cost("2", maps_of_two(labels), facts_of(labels))
    assert objective.assigned("2").tolist() == [0, 0, 1, 1]
    for _ in range(60):
        objective.layer_cost("2", maps_of_two(1 - labels), facts_of(labels))
    assert objective.assigned("2").tolist() == [1, 1, 0, 0]


def test_activity_runs_with_a_tenth_of_each_batch() -> None:
    objective = objective_with()
    labels = torch.tensor([0, 0, 1])
    first, second = torch.rand(3, 4, SIDE, SIDE), torch.rand(3, 4, SIDE, SIDE)
    for maps in (first, second):
        objective._follow_activity("1", maps, labels)
    wanted = 0.9 * first[:2].sum((2, 3)).mean(0) + 0.1 * second[:2].sum((2, 3)).mean(0)
    assert torch.allclose(objective.state["activity.1"][:, 0], wanted)


def test_background_does_not_say_where_a_filter_belongs() -> None:
    objective = objective_with()
    labels = torch.tensor([0, 0, 1, 1])
    maps = torch.cat([maps_of_two(labels), 100 * maps_of_two(1 - labels)])
    objective.layer_cost("2", maps, facts_of(labels))
    assert objective.assigned("2").tolist() == [0, 0, 1, 1]


def test_a_filter_learns_from_photos_of_its_category_only() -> None:
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    maps = maps_of_two(labels).requires_grad_()
    cost, _ = objective_with().layer_cost("2", maps, facts_of(labels))
    (gradient,) = torch.autograd.grad(cost.sum(), maps)
    size = gradient.abs().sum((2, 3))
    assert (size[labels == 0][:, :2] > 0).all()
    assert (size[labels == 1][:, 2:] > 0).all()
    assert (size[labels == 0][:, 2:] == 0).all()
    assert (size[labels == 1][:, :2] == 0).all()


def test_in_the_papers_rule_other_categories_take_the_negative_template() -> None:
    objective = objective_with(gradient="approximate", filter_background=True, score_scale_nats=0.0)
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    maps = (20 * maps_of_two(labels)).requires_grad_()
    cost, _ = objective.layer_cost("2", maps, facts_of(labels))
    (gradient,) = torch.autograd.grad(cost.sum(), maps)
    others = gradient[labels == 1][:, 0]
    # The negative template is flat: one value for the whole map.
    assert torch.allclose(others, others[:, :1, :1].expand_as(others))
    own = gradient[labels == 0][:, 0]
    assert (own.flatten(1).std(1) > 0).all()


def test_scores_are_scaled_by_a_filters_own_photos_where_all_filters_belong_to_one_category() -> None:
    objective = objective_with(filter_background=True)
    labels = torch.tensor([1, 1, 0, 0])
    maps = torch.rand(4, 4, SIDE, SIDE)
    maps[2:] *= 5  # every filter belongs to category 0, whose photos are not the first
    objective.layer_cost("2", maps, facts_of(labels))
    (group,) = objective.groups("2", maps, labels)
    own = group.scores[2:]
    best = torch.maximum(own.amax(-1), 0.1 * (own.amax(-1) - own.amin(-1))).mean(0)
    assert torch.allclose(objective.state["scale.2"], best)


def test_one_category_is_a_list_of_one() -> None:
    """A second category that no photo shows changes nothing."""
    maps = torch.rand(6, 4, SIDE, SIDE)
    labels = torch.zeros(6, dtype=torch.long)
    costs = [objective_with(count).layer_cost("2", maps, facts_of(labels))[0] for count in (1, 2)]
    assert torch.equal(costs[0], costs[1])


def test_a_category_of_one_photo_in_a_batch_teaches_nothing() -> None:
    labels = torch.tensor([0, 0, 1])
    groups = objective_with().groups("2", maps_of_two(labels), labels)
    assert [(g.category, g.rows.tolist(), g.filters.tolist()) for g in groups] == [(0, [0, 1], [0, 1])]


def test_norms_of_several_categories_are_measured_on_photos_of_each() -> None:
    """Photos often come in the order of their categories: the first ones alone would be of one category."""
    labels = torch.arange(3).repeat_interleave(300)
    maps, windows = np.zeros((900, 1, 2, 2), np.float16), torch.zeros(900, 1, 5)
    drawn = TrainingMaps(maps, (), windows, labels, np.arange(0)).sample
    assert len(drawn) == 256
    assert torch.bincount(labels[drawn], minlength=3).min() > 80
    assert TrainingMaps(maps, (), windows, 0 * labels, np.arange(0)).sample.tolist() == list(range(256))


def test_a_category_that_comes_late_is_measured_from_its_first_batch_on() -> None:
    objective = objective_with()
    only = torch.tensor([0, 0, 0, 0])
    objective._follow_activity("2", maps_of_two(only), only)
    assert objective.assigned("2").tolist() == [0, 0, 0, 0]
    both = torch.tensor([0, 0, 1, 1])
    objective._follow_activity("2", maps_of_two(both), both)
    assert objective.assigned("2").tolist() == [0, 0, 1, 1]
