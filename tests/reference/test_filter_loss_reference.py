"""The filter loss against the papers' formulas as slow float64 loops, finite differences and hand-made cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from partlens.explainer.filter_loss import filter_loss, filter_loss_of_scores, single_templates, template_scores
from partlens.explainer.templates import mask_at_peak, part_templates, peak_masks, template_log_prior


def templates_by_loops(n: int, beta: float = 4.0) -> np.ndarray:
    """CVPR 2018, Sec. 3.1, cell by cell."""
    tau = 0.5 / n**2
    family = np.zeros((n * n + 1, n, n))
    for a in range(n):
        for b in range(n):
            for i in range(n):
                for j in range(n):
                    family[a * n + b, i, j] = tau * max(1 - beta * (abs(i - a) + abs(j - b)) / n, -1)
    family[-1] = -tau
    return family


def loss_by_loops(maps: np.ndarray, family: np.ndarray) -> float:
    """-sum_T p(T) sum_x p(x|T) log[p(x|T) / p(x)] for the maps of one filter."""
    count, cells = len(maps), family.shape[0] - 1
    alpha = cells / (1 + cells)
    prior = [alpha / cells] * cells + [1 - alpha]
    score = np.zeros((count, cells + 1))
    for x in range(count):
        for t in range(cells + 1):
            score[x, t] = float((maps[x] * family[t]).sum())
    given = np.exp(score) / np.exp(score).sum(0)
    total = 0.0
    for t in range(cells + 1):
        for x in range(count):
            anyway = sum(prior[u] * given[x, u] for u in range(cells + 1))
            total -= prior[t] * given[x, t] * math.log(given[x, t] / anyway)
    return total


def some_maps(n: int, count: int, filters: int, scale: float = 40.0) -> torch.Tensor:
    return (torch.randn(count, filters, n, n, dtype=torch.float64) * scale).clamp(min=0)


@pytest.mark.parametrize("n", [3, 5])
def test_templates_are_the_papers(n: int) -> None:
    expected = templates_by_loops(n)
    assert np.abs(part_templates(n, dtype=torch.float64).numpy() - expected).max() < 1e-15


def test_prior_is_uniform_over_197_templates() -> None:
    prior = template_log_prior(196).exp()
    assert prior.shape == (197,)
    assert torch.allclose(prior, torch.full((197,), 1 / 197, dtype=torch.float64), atol=0, rtol=1e-13)


def test_template_extremes() -> None:
    family = part_templates(14, dtype=torch.float64)
    assert family[100].max() == pytest.approx(0.5 / 196, rel=1e-12)
    assert family[:196].min() == pytest.approx(-0.5 / 196, rel=1e-12)
    assert torch.equal(family[196], torch.full((14, 14), -0.5 / 196, dtype=torch.float64))


def test_loss_equals_the_loops() -> None:
    maps = some_maps(4, 6, 3)
    family = part_templates(4, dtype=torch.float64)
    loss = filter_loss(maps, family)
    for f in range(3):
        assert float(loss[f]) == pytest.approx(loss_by_loops(maps[:, f].numpy(), templates_by_loops(4)), abs=1e-12)


def test_gradient_equals_finite_differences_and_the_closed_form() -> None:
    maps = some_maps(4, 5, 2).add(0.1).requires_grad_(requires_grad=True)
    family = part_templates(4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: filter_loss(x, family), (maps,), eps=1e-4, atol=1e-9)

    # -sum_T p(T) p(x|T) t [log(p(x|T)/p(x)) - KL_T]
    (gradient,) = torch.autograd.grad(filter_loss(maps, family)[0], maps)
    score = template_scores(maps.detach(), family)[:, 0]
    given = score.softmax(0)
    prior = 1 / 17
    ratio = (given / (given * prior).sum(1, keepdim=True)).log()
    divergence = (given * ratio).sum(0)
    closed = -torch.einsum("xt,trc->xrc", prior * given * (ratio - divergence), family)
    assert torch.allclose(gradient[:, 0], closed, atol=1e-14)
    assert torch.equal(gradient[:, 1], torch.zeros_like(gradient[:, 1]))


def frozen_gradient(maps: torch.Tensor, family: torch.Tensor, *, single: bool) -> torch.Tensor:
    """The papers' gradient with Z_T a constant, of one filter: over all templates, or of the one at the peak."""
    score = template_scores(maps, family)[:, 0]
    log_z = score.logsumexp(0)
    weight = (score - log_z).exp() / score.shape[1]
    printed = weight * (score - (log_z + weight.sum(1, keepdim=True).log()))
    if single:
        kept = torch.zeros_like(printed)
        peak = maps[:, 0].flatten(1).argmax(1, keepdim=True)
        printed = kept.scatter(1, peak, printed.gather(1, peak))
    return -torch.einsum("xt,trc->xrc", printed, family)


def test_the_approximate_rule_is_the_papers_gradient_with_a_leading_minus() -> None:
    maps = some_maps(4, 5, 1).requires_grad_(requires_grad=True)
    family = part_templates(4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(filter_loss(maps, family, gradient="approximate")[0], maps)
    assert torch.allclose(gradient[:, 0], frozen_gradient(maps.detach(), family, single=True), atol=1e-14)
    assert float(gradient.abs().max()) > 1e-6

    # The sign as finite differences of the frozen-Z loss confirm it.
    log_z = template_scores(maps.detach(), family)[:, 0].logsumexp(0)

    def value(x: torch.Tensor) -> float:
        log_given = template_scores(x, family)[:, 0] - log_z
        joint = log_given.exp() / 17
        return float(-(joint * (log_given - joint.sum(1, keepdim=True).log())).sum())

    step = torch.zeros(5, 1, 4, 4, dtype=torch.float64)
    step[2, 0, 1, 1] = 1e-3
    slope = (value(maps.detach() + step) - value(maps.detach() - step)) / 2e-3
    assert slope == pytest.approx(float(frozen_gradient(maps.detach(), family, single=False)[2, 1, 1]), rel=1e-5)


def test_bounds_and_extremes() -> None:
    family = part_templates(5, dtype=torch.float64)
    same = some_maps(5, 1, 4).expand(7, 4, 5, 5)
    assert filter_loss(same, family).abs().max() < 1e-12
    assert filter_loss(torch.zeros(7, 1, 5, 5, dtype=torch.float64), family).abs().max() < 1e-12
    # One map per template with a huge peak, and one empty map for the negative template.
    peaks = torch.zeros(26, 1, 25, dtype=torch.float64)
    peaks[torch.arange(25), 0, torch.arange(25)] = 1e5
    assert float(filter_loss(peaks.reshape(26, 1, 5, 5), family)) == pytest.approx(-math.log(26), abs=1e-3)


def test_loss_is_the_entropy_decomposition() -> None:
    """-H(T) + H(T' | X) + sum_x p(T+, x) H(T+ | X = x)  (CVPR 2018, Eq. (5))."""
    maps = some_maps(4, 6, 1)
    score = template_scores(maps, part_templates(4, dtype=torch.float64))[:, 0]
    joint = score.softmax(0) / 17  # p(T) p(x|T)
    anyway = joint.sum(1)
    posterior = joint / anyway[:, None]
    present = posterior[:, :-1].sum(1)
    coarse = -(anyway * (present * present.log() + (1 - present) * (1 - present).log())).sum()
    fine = posterior[:, :-1] / present[:, None]
    inner = -(anyway * present * (fine * fine.log()).sum(1)).sum()
    total = -math.log(17) + coarse + inner
    assert float(filter_loss(maps, part_templates(4, dtype=torch.float64))) == pytest.approx(float(total), abs=1e-12)


def test_huge_scores_do_not_overflow_and_float32_is_close() -> None:
    family = part_templates(6, dtype=torch.float64)
    maps = some_maps(6, 8, 16, scale=300.0)
    top = float(template_scores(maps, family).max())
    maps = maps * (50 / top)
    exact = filter_loss(maps, family)
    single = filter_loss(maps.float(), family.float())
    assert (single.double() - exact).abs().max() < 2e-5
    assert torch.isfinite(filter_loss(maps.float() * 1e3, family.float())).all()


def test_approximation_is_good_for_peaked_maps_only() -> None:
    family = part_templates(6, dtype=torch.float64)

    def cosine(maps: torch.Tensor) -> float:
        gradients = [frozen_gradient(maps, family, single=single).flatten() for single in (False, True)]
        return float(torch.nn.functional.cosine_similarity(gradients[0], gradients[1], dim=0))

    # One image per positive template: otherwise templates without an image pull too, which one template cannot show.
    peaked = torch.diag(torch.full((36,), 4000.0, dtype=torch.float64)).reshape(36, 1, 6, 6)
    flat = torch.rand(36, 1, 6, 6, dtype=torch.float64)
    assert cosine(peaked) > 0.99
    assert cosine(flat) < 0.9


def test_single_template_is_the_negative_one_off_category() -> None:
    maps = some_maps(4, 3, 2)
    chosen = single_templates(maps, torch.tensor([True, False, True]))[..., 0]
    assert torch.equal(chosen[1], torch.tensor([16, 16]))
    assert torch.equal(chosen[0], maps[0].flatten(1).argmax(1))


def test_descent_raises_the_peak_of_a_fitting_map() -> None:
    family = part_templates(7, dtype=torch.float64)
    maps = torch.zeros(4, 1, 7, 7, dtype=torch.float64)
    for image, (row, col) in enumerate(((1, 1), (1, 5), (5, 1), (5, 5))):
        maps[image, 0, row, col] = 600.0
    maps.requires_grad_(requires_grad=True)
    (gradient,) = torch.autograd.grad(filter_loss(maps, family).sum(), maps)
    step = -gradient[0, 0]
    assert step[1, 1] > 0
    assert step[5, 5] < 0


def test_shifting_maps_shifts_the_gradient() -> None:
    family = part_templates(15, dtype=torch.float64)

    def gradient_of(shift: int) -> torch.Tensor:
        maps = torch.zeros(3, 1, 15, 15, dtype=torch.float64)
        for image, (row, col) in enumerate(((5, 5), (6, 8), (8, 6))):
            maps[image, 0, row + shift, col] = 900.0
        maps.requires_grad_(requires_grad=True)
        return torch.autograd.grad(filter_loss(maps, family).sum(), maps)[0]

    before, after = gradient_of(0), gradient_of(1)
    inner, moved = before[:, :, 4:10, 4:10], after[:, :, 5:11, 4:10]
    assert float((inner - moved).abs().max() / inner.abs().max()) < 0.02


def unclamped(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and exact gradient as before scores were clamped."""
    log_prior = template_log_prior(scores.shape[2] - 1).to(scores)
    log_given = scores - torch.logsumexp(scores, 0)
    joint = (log_given + log_prior).exp()
    log_ratio = log_given - joint.sum(-1, keepdim=True).clamp(min=torch.finfo(joint.dtype).tiny).log()
    weighted = joint * log_ratio
    gradient = -torch.addcmul(weighted, joint, weighted.sum(0) / log_prior.exp(), value=-1)
    return -weighted.sum(0).sum(-1), gradient


def test_clamping_at_minus_85_nats_changes_no_loss_and_leaves_no_denormal_number() -> None:
    scores = torch.randn(24, 6, 50) * torch.linspace(1, 90, 6)[:, None]
    scores.requires_grad_()
    before, slope = unclamped(scores.detach())
    loss = filter_loss_of_scores(scores)
    assert torch.equal(loss, before)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert float((gradient - slope).abs().max()) < 1e-33

    def denormal(values: torch.Tensor) -> int:
        return int(((values != 0) & (values.abs() < torch.finfo(values.dtype).tiny)).sum())

    assert denormal(slope) > 0  # the scores are such that there were some
    assert denormal(gradient) == 0


def test_bad_maps_are_refused() -> None:
    family = part_templates(4)
    with pytest.raises(ValueError, match=r"maps of 4x4 cells like the templates, got 5x5"):
        filter_loss(torch.zeros(2, 1, 5, 5), family)
    broken = torch.zeros(2, 3, 4, 4)
    broken[1, 2, 0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinity in 1 filters"):
        filter_loss(broken, family)
    with pytest.raises(ValueError, match="at least 2x2 cells, got 1x1"):
        part_templates(1)
    with pytest.raises(ValueError, match="alpha between 0 and 1"):
        filter_loss_of_scores(torch.zeros(2, 1, 17), alpha=1.0)


def test_mask_is_the_papers() -> None:
    masks = peak_masks(14)
    assert int((masks[7 * 14 + 7] > 0).sum()) == 25
    assert torch.allclose(masks[7 * 14 + 7][7, 7:11], torch.tensor([1, 5 / 7, 3 / 7, 1 / 7]), atol=1e-6)
    assert int((peak_masks(7)[24] > 0).sum()) == 5
    maps = torch.rand(2, 3, 14, 14)
    at = int(maps[1, 2].argmax())
    assert torch.equal(mask_at_peak(maps, masks)[1, 2], maps[1, 2] * masks[at])


def test_mask_picks_the_first_of_equal_peaks_and_passes_gradient_inside_only() -> None:
    maps = torch.zeros(1, 1, 14, 14)
    maps[0, 0, 2, 3] = maps[0, 0, 11, 11] = 5.0
    maps.requires_grad_(requires_grad=True)
    masked = mask_at_peak(maps, peak_masks(14))
    assert masked[0, 0, 2, 3] == 5
    assert masked[0, 0, 11, 11] == 0
    (gradient,) = torch.autograd.grad(masked.sum(), maps)
    assert torch.equal(gradient[0, 0], peak_masks(14)[2 * 14 + 3])
