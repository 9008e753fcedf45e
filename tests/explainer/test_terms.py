"""Each term as a function, and its wiring by a number: a weight alone changes the objective as computed by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.filter_loss import filter_loss, filter_loss_of_scores, template_scores
from partlens.explainer.network import Explainer, ExplainerOutput
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.teachers import teacher_cost
from partlens.explainer.templates import part_templates
from partlens.explainer.terms import (
    BatchFacts,
    Classification,
    FilterLoss,
    Group,
    Objective,
    Reconstruction,
    Share,
    TeacherDistance,
    target_norm,
)

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])


def explainer_with(**changes: object) -> Explainer:
    structure = ExplainerStructure("tap", ("a",), 6, 6, (8, 8), None, "tap")
    torch.manual_seed(1)
    explainer = Explainer(structure, ExplainerConfig.preset("paper", **changes), nn.Conv2d(6, 4, 3))
    explainer.start_norms(torch.rand(16, 6, 8, 8))
    return explainer.train()


def facts_of(positives: int, labels: Tensor | None = None) -> BatchFacts:
    labels = torch.zeros(positives, dtype=torch.long) if labels is None else labels
    return BatchFacts(labels, torch.arange(positives), WHOLE.expand(positives, 5))


def output_of(p: float, *reconstructions: Tensor) -> ExplainerOutput:
    nothing = torch.zeros(1, 1, 2, 2)
    return ExplainerOutput(nothing, nothing, nothing, torch.tensor(p), reconstructions)


def group_of(maps: Tensor, rows: list[int], filters: list[int], layer: str = "2", category: int = 0) -> Group:
    scores = template_scores(maps, part_templates(*maps.shape[2:]))
    return Group(layer, category, torch.tensor(rows), torch.tensor(filters), maps, scores)


def test_share_is_minus_eta_log_p() -> None:
    assert float(Share(3.0).cost(output_of(0.25), (), facts_of(2))) == pytest.approx(3 * math.log(4))


def test_share_pulls_p_up_by_eta_times_one_minus_p() -> None:
    explainer = explainer_with(p_init=0.3)
    cost = Share(1.5e5).cost(explainer(torch.rand(2, 6, 8, 8)), (), facts_of(2))
    (gradient,) = torch.autograd.grad(cost, explainer.share_logit)
    assert float(gradient) == pytest.approx(-1.5e5 * 0.7, rel=1e-5)


def test_reconstruction_is_weighted_by_each_targets_norm() -> None:
    first, second = torch.zeros(2, 3), torch.zeros(2, 1, 2, 2)
    targets = (torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]]), torch.ones(2, 1, 2, 2))
    # Mean over images of 9 and 0, and of 4 and 4; each over its own norm.
    wanted = 5e4 * (4.5 / 2.0 + 4 / 10.0)
    found = Reconstruction((2.0, 10.0)).cost(output_of(0.5, first, second), targets, facts_of(2))
    assert float(found) == pytest.approx(wanted)


def test_target_norm_counts_positive_values_only() -> None:
    assert target_norm(torch.tensor([[3.0, -9.0, 4.0], [0.0, 0.0, -1.0]])) == pytest.approx(2.5)


def test_classification_by_hand() -> None:
    """The logistic loss of the categories' outputs only; background shows none of them."""
    features = torch.tensor([[2.0, 0.0, 9.0], [0.0, 1.0, 9.0], [1.0, 1.0, 9.0]])
    term = Classification(nn.Identity(), (1, 0))
    found = term.cost(output_of(0.5, features), (), facts_of(2, torch.tensor([1, 0])))

    def loss(score: float, wanted: bool) -> float:
        return math.log1p(math.exp(-score if wanted else score))

    rows = [loss(2, True) + loss(0, False), loss(0, False) + loss(1, True), loss(1, False) + loss(1, False)]
    assert float(found) == pytest.approx(1e6 * sum(rows) / 3, rel=1e-5)


def test_filter_loss_of_a_group_is_that_of_its_photos_and_filters() -> None:
    maps = torch.rand(7, 6, 8, 8) * 20
    term = FilterLoss(ExplainerConfig(gradient="exact", filter_background=False), {})
    found = term.cost(group_of(maps, [0, 2, 3], [1, 4]), facts_of(5))
    assert torch.allclose(found, filter_loss(maps[[0, 2, 3]][:, [1, 4]], part_templates(8)))
    everyone = FilterLoss(ExplainerConfig(gradient="exact", filter_background=True), {})
    assert torch.allclose(
        everyone.cost(group_of(maps, [0, 2, 3], [1, 4]), facts_of(5)), filter_loss(maps[:, [1, 4]], part_templates(8))
    )


def test_scores_are_scaled_by_a_running_mean_of_each_filters_best() -> None:
    state: dict[str, Tensor] = {}
    term = FilterLoss(ExplainerConfig(gradient="exact", filter_background=False, score_scale_nats=8.0), state)
    first, second = torch.rand(4, 6, 8, 8) * 30, torch.rand(4, 6, 8, 8) * 30
    filters = [0, 2, 5]

    def best(maps: Tensor) -> Tensor:
        scores = template_scores(maps[:3][:, filters], part_templates(8))
        largest = scores.amax(-1)
        return torch.maximum(largest, 0.1 * (largest - scores.amin(-1))).mean(0)

    term.cost(group_of(first, [0, 1, 2], filters), facts_of(4))
    assert torch.allclose(state["scale.2"][filters], best(first))
    assert bool(state["scale.2"][[1, 3, 4]].isnan().all())
    found = term.cost(group_of(second, [0, 1, 2], filters), facts_of(4))
    running = 0.9 * best(first) + 0.1 * best(second)
    assert torch.allclose(state["scale.2"][filters], running)
    scores = template_scores(second[:3][:, filters], part_templates(8)) * (8.0 / running)[:, None]
    assert torch.allclose(found, filter_loss_of_scores(scores), atol=1e-6)
    # The scale is of one layer; a filter without a response is not blown up.
    assert "scale.1" not in state
    term.cost(group_of(first * torch.tensor([0.0, 1, 1, 1, 1, 1])[:, None, None], [0, 1, 2], [0, 1], "1"), facts_of(4))
    assert state["scale.1"][0] == 0


def test_a_silent_filter_is_scaled_by_no_more_than_a_million_times_the_mean() -> None:
    term = FilterLoss(ExplainerConfig(score_scale_nats=8.0), {})
    scores = torch.zeros(3, 2, 5)
    scores[:, 1, 0] = 4.0
    factor = term._scale(scores, Group("2", 0, torch.arange(3), torch.arange(2), torch.zeros(3, 2, 2, 2), scores))
    assert factor.tolist() == pytest.approx([8 / (2 * 1e-6), 2.0], rel=1e-4)


def test_background_takes_the_negative_template_in_the_papers_rule() -> None:
    explainer = explainer_with(filter_mix=False)
    objective = Objective.of(explainer, (2.0,))
    output = explainer(torch.rand(8, 6, 8, 8))
    for positives, flat in ((8, False), (2, True)):
        cost, _ = objective.layer_cost("1", output.interp1, facts_of(positives))
        (pull,) = torch.autograd.grad(cost.sum(), output.interp1, retain_graph=True)
        last = pull[7].flatten(1)
        spread = last.max(1).values - last.min(1).values
        assert bool((spread < 1e-12).all()) is flat


def test_a_teachers_place_is_the_centre_of_the_cell_it_falls_in() -> None:
    """Shares of the view, 0 its border: a teacher in the middle of cell (2, 5) of 8 is at (2.5 / 8, 5.5 / 8)."""
    places = torch.tensor([[[2.5 / 8, 5.5 / 8], [0.9, 0.9]], [[0.3, 0.25], [math.nan, math.nan]]])
    state = {"teachers": places, "teacher_of": torch.tensor([[0, 1], [1, 0], [0, 0]])}
    maps = torch.rand(2, 3, 8, 8)
    # The second photo is seen in a crop of its right half, mirrored, which cuts off the first teacher's place.
    windows = torch.stack([WHOLE, torch.tensor([0.5, 0.0, 0.5, 1.0, 1.0])])
    facts = BatchFacts(torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]), windows)
    found = TeacherDistance(state).cost(group_of(maps, [0, 1], [0, 2]), facts)
    seen = torch.tensor([[2.0, 5.0], [2.0, 5.0]])
    nowhere = torch.full((2, 2), math.nan)
    wanted = teacher_cost(maps[:, [0, 2]], torch.stack([seen, nowhere]))
    assert torch.allclose(found, wanted)
    # In the other category filter 0 has the other teacher.
    other = TeacherDistance(state).cost(group_of(maps, [0], [0], category=1), facts)
    assert torch.allclose(other, teacher_cost(maps[:1, :1], torch.tensor([[[0.9 * 8 - 0.5, 0.9 * 8 - 0.5]]])))
    # Photos are found by their number, not by their row.
    swapped = BatchFacts(facts.labels, torch.tensor([1, 0]), windows.flip(0))
    again = TeacherDistance(state).cost(group_of(maps.flip(0), [0, 1], [0, 2]), swapped)
    assert torch.allclose(again, wanted)


def test_a_teacher_weighs_a_hundred_filter_losses_and_teaches_the_second_layer_only() -> None:
    explainer = explainer_with(teachers=2, warmup_epochs=1, filter_mix=False)
    objective = Objective.of(explainer, (2.0,))
    places = torch.rand(4, 2, 2)
    objective.state.update({"teachers": places, "teacher_of": torch.tensor([[0], [1]] * 3)})
    plain = Objective.of(explainer_with(filter_mix=False), (2.0,))
    interp1, interp2 = explainer.interpret(torch.rand(4, 6, 8, 8))
    found, logged = objective.warmup(interp1, interp2, facts_of(4))
    without, other = plain.warmup(interp1, interp2, facts_of(4))
    taught = teacher_cost(interp2, places[:, [0, 1] * 3] * 8 - 0.5)
    assert (found - without).item() == pytest.approx(100 * float(taught.detach().sum()), rel=1e-4)
    assert float(logged["teacher"]) == pytest.approx(float(taught.detach().mean()), rel=1e-5)
    assert {k: float(v) for k, v in other.items()} == {k: float(logged[k]) for k in ("filter_1", "filter_2")}


def test_the_warm_up_sums_both_layers() -> None:
    explainer = explainer_with(gradient="exact")
    objective = Objective.of(explainer, (2.0,))
    interp1, interp2 = explainer.interpret(torch.rand(5, 6, 8, 8) * 9)
    found, logged = objective.warmup(interp1, interp2, facts_of(5))
    each = [filter_loss(maps, part_templates(8)) for maps in (interp1, interp2)]
    assert found.item() == pytest.approx((each[0].sum() + each[1].sum()).item(), rel=1e-5)
    assert [float(logged[f"filter_{n}"]) for n in "12"] == pytest.approx([e.mean().item() for e in each], rel=1e-5)
    assert objective.step == 1


def test_the_joint_objective_is_the_sum_of_its_terms() -> None:
    """Everything by hand: reconstruction, share and both layers, each filter by its weight, over a million."""
    explainer = explainer_with(filter_mix=False, gradient="exact", filter_ratio=0.5)
    objective = Objective.of(explainer, (2.0,))
    objective.epoch = 3
    maps, targets = torch.rand(6, 6, 8, 8) * 9, (torch.rand(6, 4, 6, 6),)
    output, facts = explainer(maps), facts_of(6)
    total, logged = objective.joint(output, targets, facts)
    reconstruction = Reconstruction((2.0,)).cost(output, targets, facts)
    wanted = reconstruction + Share(1.5e5).cost(output, targets, facts)
    for layer, seen in (("1", output.interp1), ("2", output.interp2)):
        cost = filter_loss(seen, part_templates(8))
        (pull,) = torch.autograd.grad(reconstruction, seen, retain_graph=True)
        (push,) = torch.autograd.grad(cost.sum(), seen, retain_graph=True)
        sizes = [g.flatten(2).norm(dim=2).mean(0) for g in (pull, push)]
        weights = 0.5 / 3 * sizes[0] / sizes[1].clamp(min=1e-3 * float(sizes[1].mean()))
        assert torch.allclose(objective.filter_weights(layer), weights, rtol=1e-3)
        wanted = wanted + (weights * cost).sum()
    assert total.item() == pytest.approx(wanted.item() / 1e6, rel=1e-5)
    assert logged["reconstruction"].item() == pytest.approx(reconstruction.item())
    assert float(logged["p"]) == pytest.approx(0.5)
    assert float(logged["share"]) == pytest.approx(1.5e5 * math.log(2), rel=1e-5)


def test_gradients_are_measured_every_eighth_step_and_mixed() -> None:
    objective = Objective.of(explainer_with(filter_mix=False, gradient="exact"), (2.0,))
    explainer, seen = objective.explainer, []
    for _ in range(10):
        output = explainer(torch.rand(6, 6, 8, 8) * 9)
        objective.joint(output, (torch.rand(6, 4, 6, 6),), facts_of(6))
        seen.append(objective.state["push.1"].clone())
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [False] * 7 + [True, False]


def test_a_new_measurement_counts_three_tenths() -> None:
    explainer = explainer_with(filter_mix=False)
    objective = Objective.of(explainer, (2.0,))
    maps = torch.ones(1, 6, 8, 8, requires_grad=True)
    for size in (2.0, 10.0):
        objective._measure((size * maps).sum(), (maps, maps), [maps.sum() * 0 + maps.sum((0, 2, 3))] * 2)
    # The norm of 64 equal gradients is 8 times one of them.
    assert objective.state["pull.1"].tolist() == pytest.approx([8 * (0.7 * 2 + 0.3 * 10)] * 6)
    assert objective.state["push.2"].tolist() == pytest.approx([8.0] * 6)


def test_dead_filters_get_no_unbounded_weight() -> None:
    objective = Objective.of(explainer_with(filter_ratio=2.0, filter_decay=1.0), (1.0,))
    objective.state |= {"pull.2": torch.tensor([1.0, 1.0, 4.0]), "push.2": torch.tensor([0.0, 1.0, 2.0])}
    objective.epoch = 4
    # A dead filter's push counts as a thousandth of the mean, which is 1.
    assert objective.filter_weights("2").tolist() == pytest.approx([0.5 / 1e-3, 0.5, 0.5 * 4 / 2])
    objective.state["push.2"] = torch.zeros(3)
    assert bool(objective.filter_weights("2").isfinite().all())


def test_without_reconstruction_p_rises_and_with_it_alone_p_falls_for_a_useless_track() -> None:
    for eta, norm, rises in ((1.5e5, 1e15, True), (0.0, 2.0, False)):
        explainer = explainer_with(filter_ratio=0.0, p_init=0.5, eta=eta)
        with torch.no_grad():
            explainer.conv_interp_2.weight.zero_()
            explainer.conv_interp_2.bias.fill_(0.5)  # constant maps: the track says nothing
        maps = torch.rand(12, 6, 8, 8)
        with torch.no_grad():
            target = explainer.decoder(maps)
        objective = Objective.of(explainer, (norm,))
        optimiser = torch.optim.SGD([explainer.share_logit], lr=0.2)
        seen = [float(explainer.p.detach())]
        for _ in range(12):
            loss, _ = objective.joint(explainer(maps), (target,), facts_of(12))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen.append(float(explainer.p.detach()))
        assert (seen == sorted(seen)) is rises
        assert (seen[-1] > 0.5) is rises


def at_the_target(**changes: object) -> tuple[Explainer, Tensor, Objective]:
    """An objective whose reconstruction pulls at nothing, its filter weights measured before."""
    explainer = explainer_with(eta=0.0, filter_ratio=1.0, **changes)
    objective, maps = Objective.of(explainer, (2.0,)), torch.rand(12, 6, 8, 8)
    with torch.no_grad():
        target = explainer.decoder(maps)
    objective.joint(explainer(maps), (target,), facts_of(12))  # step 0 measures the gradients
    explainer.eval()
    return explainer, maps, objective


@pytest.mark.parametrize("mix", [True, False])
def test_the_filter_loss_pulls_at_p_through_the_mixture_only(mix: bool) -> None:
    explainer, maps, objective = at_the_target(filter_mix=mix)
    output = explainer(maps)
    loss, _ = objective.joint(output, tuple(r.detach() for r in output.reconstructions), facts_of(12))
    (pull,) = torch.autograd.grad(loss, explainer.share_logit, allow_unused=True)
    assert (pull is not None and float(pull.abs()) > 0) is mix


def test_the_filter_loss_of_the_first_layer_moves_it_by_itself() -> None:
    explainer, maps, objective = at_the_target()
    objective.state["pull.2"] = torch.zeros_like(objective.state["pull.2"])  # no weight for the second layer's
    output = explainer(maps)
    loss, _ = objective.joint(output, tuple(r.detach() for r in output.reconstructions), facts_of(12))
    first, second = torch.autograd.grad(loss, [explainer.conv_interp_1.weight, explainer.conv_interp_2.weight])
    assert float(first.abs().max()) > 0
    assert float(second.abs().max()) == 0


def test_a_classification_replaces_the_reconstruction_which_is_still_logged() -> None:
    explainer = explainer_with(filter_ratio=0.0, eta=0.0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    term = Classification(head.requires_grad_(requires_grad=False), (0,))
    objective = Objective.of(explainer, (2.0,), 1, term)
    output, targets = explainer(torch.rand(6, 6, 8, 8)), (torch.rand(6, 4, 6, 6),)
    total, logged = objective.joint(output, targets, facts_of(4))
    assert total.item() == pytest.approx(term.cost(output, targets, facts_of(4)).item() / 1e6)
    assert float(logged["classification"]) == pytest.approx(1e6 * total.item())
    reconstruction = Reconstruction((2.0,)).cost(output, targets, facts_of(4))
    assert logged["reconstruction"].item() == pytest.approx(reconstruction.item())


def test_classification_takes_what_a_bfloat16_decoder_gives() -> None:
    explainer = explainer_with()
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)).requires_grad_(requires_grad=False)
    objective = Objective.of(explainer, (1.0,), 1, Classification(head, (0,)))
    with torch.autocast("cpu", torch.bfloat16):
        output = explainer(torch.rand(6, 6, 8, 8))
    assert output.reconstructions[-1].dtype == torch.bfloat16
    loss, _ = objective.joint(output, (torch.zeros(6, 4, 6, 6),), facts_of(3))
    loss.backward()
    assert bool(torch.isfinite(explainer.decoder.weight.grad).all())
