from __future__ import annotations

import pytest
import torch

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.filter_loss import template_scores
from partlens.explainer.network import Explainer, ExplainerStructure
from partlens.explainer.templates import part_templates
from partlens.explainer.terms import (
    BatchFacts,
    Objective,
    equivariance_cost,
    expected_peaks,
    mean_peak_correlation,
    target_norm,
)


def explainer_with(**changes: object) -> Explainer:
    structure = ExplainerStructure("tap", ("a",), 6, 6, (8, 8), None, "tap")
    torch.manual_seed(1)
    explainer = Explainer(structure, ExplainerConfig.preset("paper", **changes), torch.nn.Conv2d(6, 4, 3))
    explainer.start_norms(torch.rand(16, 6, 8, 8))
    return explainer.train()


def objective_of(explainer: Explainer, norm: float = 2.0) -> Objective:
    return Objective(explainer.config, explainer, (norm,))


def test_share_term_pulls_p_up_by_eta_times_one_minus_p() -> None:
    explainer = explainer_with(p_init=0.3)
    (gradient,) = torch.autograd.grad(
        objective_of(explainer).share(explainer(torch.rand(2, 6, 8, 8))), explainer.share_logit
    )
    assert float(gradient) == pytest.approx(-1.5e5 * 0.7, rel=1e-5)


def test_reconstruction_is_weighted_by_the_targets_norm() -> None:
    explainer = explainer_with()
    maps, target = torch.rand(3, 6, 8, 8), torch.rand(3, 4, 6, 6)
    output = explainer(maps)
    error = (output.reconstructions[0] - target).square().flatten(1).sum(1).mean()
    assert float(objective_of(explainer, 4.0).reconstruction(output, (target,)).detach()) == pytest.approx(
        5e4 / 4 * float(error.detach()), rel=1e-5
    )


def test_filter_weight_balances_gradients_per_filter_and_epoch() -> None:
    """E|lambda_f dLoss_f/dx_f| / E|dLoss_rec/dx_f| = ratio / N at epoch N for every live filter."""
    explainer = explainer_with(filter_mix=False, gradient="exact")
    objective = objective_of(explainer)
    objective.epoch = 4
    output = explainer(torch.rand(8, 6, 8, 8))
    target = torch.rand(8, 4, 6, 6)
    reconstruction = objective.reconstruction(output, (target,))
    _, costs = objective.interpretable(output, BatchFacts(8), mix=False)
    objective._measure(reconstruction, output, costs)
    for layer, maps, cost in (("1", output.interp1, costs[0]), ("2", output.interp2, costs[1])):
        (pull,) = torch.autograd.grad(reconstruction, maps, retain_graph=True)
        (push,) = torch.autograd.grad((objective.filter_weights(layer) * cost).sum(), maps, retain_graph=True)
        size = [g.flatten(2).norm(dim=2).mean(0) for g in (push, pull)]
        live = size[0] > 0
        assert bool(live.any())
        assert torch.allclose(size[0][live] / size[1][live], torch.full((int(live.sum()),), 1 / 300 / 4), rtol=1e-3)


def test_without_reconstruction_p_rises_and_with_it_alone_p_falls_for_a_useless_track() -> None:
    for changes, rises in (({"reconstruction_weight": 1e-9}, True), ({"eta": 0.0}, False)):
        explainer = explainer_with(filter_ratio=0.0, p_init=0.5, **changes)
        with torch.no_grad():
            explainer.conv_interp_2.weight.zero_()
            explainer.conv_interp_2.bias.fill_(0.5)  # constant maps: the track says nothing
        maps = torch.rand(12, 6, 8, 8)
        with torch.no_grad():
            target = explainer.decoder(maps)
        objective = objective_of(explainer)
        optimiser = torch.optim.SGD([explainer.share_logit], lr=0.2)
        seen = [float(explainer.p.detach())]
        for _ in range(12):
            loss, _ = objective.joint(explainer(maps), (target,), BatchFacts(12))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            seen.append(float(explainer.p.detach()))
        assert (seen == sorted(seen)) is rises
        assert (seen[-1] > 0.5) is rises


def test_expected_peaks_of_sharp_maps_are_their_peaks() -> None:
    maps = torch.zeros(1, 2, 9, 9)
    maps[0, 0, 4, 6] = maps[0, 1, 2, 3] = 5e4
    peaks = expected_peaks(template_scores(maps, part_templates(9)), 9, 9)
    assert torch.allclose(peaks[0], torch.tensor([[4.0, 6.0], [2.0, 3.0]]), atol=1e-3)


def test_mean_correlation_equals_the_matrix_of_pairs() -> None:
    peaks = torch.randn(50, 7, 2) * 5
    standard = (peaks - peaks.mean(0)) / (peaks.std(0) + 0.1)
    for axis in range(2):
        pairs = standard[..., axis].t() @ standard[..., axis] / 50
        unit = pairs / pairs.diagonal().sqrt().outer(pairs.diagonal().sqrt())
        off = unit[~torch.eye(7, dtype=torch.bool)].mean()
        assert float(mean_peak_correlation(peaks)[axis]) == pytest.approx(float(off), abs=0.03)


def test_same_peaks_correlate_fully() -> None:
    peaks = (torch.randn(50, 1, 2) * 4).expand(50, 9, 2)
    assert float(mean_peak_correlation(peaks).min()) > 0.9


def test_equivariance_is_zero_for_a_peak_that_moves_with_the_crop() -> None:
    first = torch.tensor([[[3.0, 5.0]]])
    # Left 0.25, top 0, half of the width, all of the height, not mirrored; then the same, mirrored.
    plain = torch.tensor([[0.25, 0.0, 0.5, 1.0, 0.0]])
    there = torch.tensor([[[3.0, ((5.5 / 14) - 0.25) / 0.5 * 14 - 0.5]]])
    assert float(equivariance_cost(first, there, plain, 14, 14)) == pytest.approx(0, abs=1e-5)
    mirrored = torch.tensor([[0.25, 0.0, 0.5, 1.0, 1.0]])
    back = there.clone()
    back[..., 1] = 13 - there[..., 1]
    assert float(equivariance_cost(first, back, mirrored, 14, 14)) == pytest.approx(0, abs=1e-5)
    assert float(equivariance_cost(first, there, mirrored, 14, 14)) > 1


def test_peaks_that_the_crop_cuts_off_do_not_count() -> None:
    first = torch.tensor([[[3.0, 1.0]]])
    window = torch.tensor([[0.5, 0.0, 0.5, 1.0, 0.0]])
    assert float(equivariance_cost(first, torch.tensor([[[9.0, 9.0]]]), window, 14, 14)) == 0


def test_diversity_pushes_filters_apart() -> None:
    explainer = explainer_with(diversity_weight=200.0, diversity_target=0.0, filter_mix=False, score_scale_nats=8.0)
    with torch.no_grad():  # every filter is the same one
        for conv in (explainer.conv_interp_1, explainer.conv_interp_2):
            conv.weight.copy_(conv.weight[:1].expand_as(conv.weight) + 1e-2 * torch.randn_like(conv.weight))
    objective = objective_of(explainer)
    optimiser = torch.optim.Adam(explainer.parameters(), lr=1e-2)
    maps = torch.rand(32, 6, 8, 8)
    seen = []
    for _ in range(40):
        interp1, interp2 = explainer.interpret(maps)
        output = explainer(maps)._replace(interp1=interp1, interp2=interp2)
        loss, logged = objective.warmup(output, BatchFacts(32))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(float(logged["correlation"]))
    assert seen[0] > 0.5
    assert seen[-1] < seen[0] - 0.2


def test_target_norm_counts_positive_values_only() -> None:
    assert target_norm(torch.tensor([[3.0, -9.0, 4.0], [0.0, 0.0, -1.0]])) == pytest.approx(2.5)


def test_background_takes_the_negative_template_in_the_papers_rule() -> None:
    explainer = explainer_with(filter_mix=False, gradient="approximate")
    objective = objective_of(explainer)
    output = explainer(torch.rand(8, 6, 8, 8))
    for positives, sign in ((8, "peaked"), (2, "flat")):
        _, costs = objective.interpretable(output, BatchFacts(positives), mix=False)
        (pull,) = torch.autograd.grad(costs[0].sum(), output.interp1, retain_graph=True)
        last = pull[7].flatten(1)
        spread = last.max(1).values - last.min(1).values
        assert bool((spread < 1e-12).all()) is (sign == "flat")


def test_shuffled_templates_no_longer_ask_for_one_place() -> None:
    """The papers' loss raises cells near a map's peak and lowers far ones; with shuffled cells it does neither."""
    near = part_templates(8)[:-1].clamp(min=0)[:, None].expand(-1, 6, -1, -1) > 0
    pulls = {}
    for kind in ("peaks", "shuffled"):
        explainer = explainer_with(templates=kind, score_scale_nats=4.0, gradient="exact", filter_background=False)
        maps = (near * 1.0 + 0.1).requires_grad_()
        cost, _ = objective_of(explainer)._layer_cost("1", maps, BatchFacts(64))
        (gradient,) = torch.autograd.grad(cost.sum(), maps)
        pulls[kind] = float((gradient[~near].mean() - gradient[near].mean()) / gradient.std())
    assert pulls["peaks"] > 0.2
    assert abs(pulls["shuffled"]) < pulls["peaks"] / 4


def at_the_target(**changes: object) -> tuple[Explainer, torch.Tensor, Objective]:
    """An objective whose reconstruction pulls at nothing, its filter weights measured before."""
    explainer = explainer_with(eta=0.0, filter_ratio=1.0, **changes)
    objective, maps = objective_of(explainer), torch.rand(12, 6, 8, 8)
    with torch.no_grad():
        target = explainer.decoder(maps)
    objective.joint(explainer(maps), (target,), BatchFacts(12))  # step 0 measures the gradients
    explainer.eval()
    return explainer, maps, objective


@pytest.mark.parametrize("mix", [True, False])
def test_the_filter_loss_pulls_at_p_through_the_mixture_only(mix: bool) -> None:
    explainer, maps, objective = at_the_target(filter_mix=mix)
    output = explainer(maps)
    loss, _ = objective.joint(output, tuple(r.detach() for r in output.reconstructions), BatchFacts(12))
    (pull,) = torch.autograd.grad(loss, explainer.share_logit, allow_unused=True)
    assert (pull is not None and float(pull.abs()) > 0) is mix


def test_the_filter_loss_of_the_first_layer_moves_it_by_itself() -> None:
    explainer, maps, objective = at_the_target()
    objective.state["pull.2"] = torch.zeros_like(objective.state["pull.2"])  # no weight for the second layer's
    output = explainer(maps)
    loss, _ = objective.joint(output, tuple(r.detach() for r in output.reconstructions), BatchFacts(12))
    first, second = torch.autograd.grad(loss, [explainer.conv_interp_1.weight, explainer.conv_interp_2.weight])
    assert float(first.abs().max()) > 0
    assert float(second.abs().max()) == 0
