"""The filter loss: minus the mutual information between a filter's maps and the template family.

For the maps ``X`` of one filter ``f`` over a set of images and the templates ``T`` (``L²`` positive, one negative):

    s_T(x)   = tr(x · T) = sum_ij x_ij t_ij
    p(x | T) = exp s_T(x) / Z_T,     Z_T = sum_x exp s_T(x)
    p(x)     = sum_T p(T) p(x | T)
    Loss_f   = -MI(X; T) = -sum_T p(T) sum_x p(x | T) log [p(x | T) / p(x)]

Source: Zhang, Wu & Zhu, CVPR 2018, Eqs. (1)-(4); ICLR 2020 submission, Eq. (2) and App. H.

**Sign.** The papers print the gradient without the leading minus; finite differences confirm the minus, which the
authors' released code has too:

    frozen Z:   dLoss_f/dx = -sum_T (p(T) t / Z_T) e^{s_T} { s_T - log[Z_T p(x)] }
    batch Z:    dLoss_f/dx = -sum_T p(T) p(x|T) t { log[p(x|T)/p(x)] - KL_T },  KL_T = sum_x' p(x'|T) log[p(x'|T)/p(x')]

**Numerics.** Everything stays in logarithms until the last step; scores of some hundred nats neither overflow nor lose
the loss. In float32 the loss differs from float64 by less than 2e-5 nats for scores up to 50 (tested).
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.explainer.templates import peak_cells, template_log_prior

GradientRule = Literal["exact", "approximate"]


class RunningNormaliser(NamedTuple):
    """Running estimate of the normalisers over the whole data set, per filter and template.

    ``log_mean`` is the logarithm of the running mean of ``exp s_T(x)``; ``Z_T`` of a batch of N images is then
    ``N * exp(log_mean)``. The paper (CVPR 2018, footnote 2) says only that ``Z_T`` is updated as maps arrive; an
    exponential average with momentum ``momentum`` is our choice.
    """

    log_mean: Float[Tensor, "filter template"]
    momentum: float = 0.9

    def updated(self, scores: Float[Tensor, "image filter template"]) -> RunningNormaliser:
        """Mix in the mean of ``exp s`` over a batch, in logarithms."""
        with torch.no_grad():
            batch = torch.logsumexp(scores, 0) - math.log(scores.shape[0])
            mixed = torch.logaddexp(self.log_mean + math.log(self.momentum), batch + math.log1p(-self.momentum))
        return RunningNormaliser(mixed, self.momentum)

    @staticmethod
    def started(scores: Float[Tensor, "image filter template"], momentum: float = 0.9) -> RunningNormaliser:
        """Begin with a first batch's means."""
        with torch.no_grad():
            return RunningNormaliser(torch.logsumexp(scores, 0) - math.log(scores.shape[0]), momentum)


def template_scores(
    maps: Float[Tensor, "image filter row col"], templates: Float[Tensor, "template side_row side_col"]
) -> Float[Tensor, "image filter template"]:
    """Return ``tr(x · T)`` in nats for every map and template."""
    if maps.shape[2:] != templates.shape[1:]:
        raise InputError(
            expected(
                f"maps of {templates.shape[1]}x{templates.shape[2]} cells like the templates",
                f"{maps.shape[2]}x{maps.shape[3]}",
                "Build the templates with part_templates(rows, cols)",
            )
        )
    return maps.flatten(2) @ templates.to(maps.dtype).flatten(1).t()


class _ScoreLoss(torch.autograd.Function):
    """Loss per filter from template scores, with its closed-form gradient computed in the same pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, log_prior: Tensor, log_mean: Tensor | None, chosen: Tensor | None) -> Tensor:
        log_z = torch.logsumexp(scores, 0) if log_mean is None else log_mean + math.log(scores.shape[0])
        log_given = scores - log_z
        joint = (log_given + log_prior).exp_()  # p(T) p(x|T)
        # p(x) is the sum of the joint; where it underflows, every term of that image is 0 times a finite number.
        log_any = joint.sum(-1, keepdim=True).clamp_(min=torch.finfo(joint.dtype).tiny).log_()
        log_ratio = log_given.sub_(log_any)
        weighted = joint * log_ratio
        loss = -weighted.sum((0, 2))
        if ctx.needs_input_grad[0]:
            if chosen is not None:
                gradient = torch.zeros_like(weighted).scatter_(2, chosen, -weighted.gather(2, chosen))
            elif log_mean is None:
                divergence = weighted.sum(0) / log_prior.exp()  # KL_T
                gradient = weighted.addcmul_(joint, divergence, value=-1).neg_()
            else:
                gradient = weighted.neg_()
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][None, :, None], None, None, None


def filter_loss_of_scores(
    scores: Float[Tensor, "image filter template"],
    *,
    alpha: float | None = None,
    normaliser: RunningNormaliser | None = None,
    chosen: Int[Tensor, "image filter 1"] | None = None,
) -> Float[Tensor, " filter"]:
    """Return the filter loss from template scores in nats, differentiable in the scores.

    Args:
        scores: from :func:`template_scores`, the negative template last.
        alpha: as in :func:`filter_loss`.
        normaliser: as in :func:`filter_loss`.
        chosen: the single template whose gradient is used, for the paper's approximation; all of them when left out.

    Raises:
        InputError: a score is NaN or infinite.
    """
    if not bool(torch.isfinite(scores.detach().sum())):
        bad = int((~torch.isfinite(scores.detach())).any(-1).any(0).sum())
        raise InputError(
            expected("finite maps", f"NaN or infinity in {bad} filters", "Lower the learning rate or check the weights")
        )
    log_prior = template_log_prior(scores.shape[2] - 1, alpha=alpha).to(scores)
    log_mean = None if normaliser is None else normaliser.log_mean.to(scores)
    result: Tensor = _ScoreLoss.apply(scores, log_prior, log_mean, chosen)
    return result


def single_templates(
    maps: Float[Tensor, "image filter row col"], positive: Bool[Tensor, " image"] | None = None
) -> Int[Tensor, "image filter 1"]:
    """Return the paper's single template of every map: at its peak, the negative one for images not ``positive``."""
    chosen = peak_cells(maps.detach())
    if positive is not None:
        chosen = torch.where(positive.to(maps.device)[:, None], chosen, maps.shape[2] * maps.shape[3])
    return chosen[..., None]


def filter_loss(
    maps: Float[Tensor, "image filter row col"],
    templates: Float[Tensor, "template side_row side_col"],
    *,
    alpha: float | None = None,
    normaliser: RunningNormaliser | None = None,
    gradient: GradientRule = "exact",
    positive: Bool[Tensor, " image"] | None = None,
) -> Float[Tensor, " filter"]:
    """Return ``Loss_f = -MI(X; T)`` of every filter, differentiable in the maps.

    Args:
        maps: non-negative maps of a batch (after a ReLU), at least one image.
        templates: from :func:`~partlens.explainer.templates.part_templates`, the negative one last.
        alpha: prior probability that the part is present; the paper's ``L²/(1+L²)`` when left out.
        normaliser: running ``Z_T``; when left out, ``Z_T`` is the batch's own and is differentiated too. With it,
            ``Z_T`` is a constant of the backward pass, as in the paper's Eq. (4), and the value is an estimate that
            need not stay within the bounds.
        gradient: ``"exact"`` over all templates; ``"approximate"``, the paper's single template: the one at the
            map's peak for images of the filter's category, the negative one for others (CVPR 2018, Eq. (4)).
        positive: for the approximate rule, which images are of the category (image,); all when left out.

    Returns:
        One value per filter in nats, within ``[-min(log N, log(L² + 1)), 0]`` for the batch's own ``Z_T``; lower is
        better: each image matches one template, and different images match different ones.

    Raises:
        InputError: map size and templates differ, or a map holds NaN or infinity.

    Example:
        >>> from partlens.explainer.templates import part_templates
        >>> float(filter_loss(torch.zeros(4, 1, 5, 5), part_templates(5)).abs().max()) < 1e-6
        True
    """
    return filter_loss_of_scores(
        template_scores(maps, templates),
        alpha=alpha,
        normaliser=normaliser,
        chosen=single_templates(maps, positive) if gradient == "approximate" else None,
    )
