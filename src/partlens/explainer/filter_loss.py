"""The filter loss: minus the mutual information between a filter's maps and the template family.

For the maps ``X`` of one filter ``f`` over a set of images and the templates ``T`` (``L²`` positive, one negative):

    s_T(x)   = tr(x · T) = sum_ij x_ij t_ij
    p(x | T) = exp s_T(x) / Z_T,     Z_T = sum_x exp s_T(x)
    p(x)     = sum_T p(T) p(x | T)
    Loss_f   = -MI(X; T) = -sum_T p(T) sum_x p(x | T) log [p(x | T) / p(x)]

Source: Zhang, Wu & Zhu, CVPR 2018, Eqs. (1)-(4); ICLR 2020 submission, Eq. (2) and App. H.

**Sign.** The papers print the gradient without the leading minus; finite differences confirm the minus, which the
authors' released code has too:

    exact:        dLoss_f/dx = -sum_T p(T) p(x|T) t { log[p(x|T)/p(x)] - KL_T },
                  KL_T = sum_x' p(x'|T) log[p(x'|T)/p(x')]
    approximate:  dLoss_f/dx = -(p(T) t / Z_T) e^{s_T} { s_T - log[Z_T p(x)] } of a single T, Z_T taken as constant

``Z_T`` is that of the batch. The paper would go on updating it over batches (CVPR 2018, footnote 2) without saying how;
the released code takes the batch's own, which is followed.

**Numerics.** Everything stays in logarithms until the last step; scores of some hundred nats neither overflow nor lose
the loss. In float32 the loss differs from float64 by less than 2e-5 nats for scores up to 50 (tested).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, InputTypeError, checked, expected
from partlens.explainer.processes import from_all
from partlens.explainer.templates import peak_cells, template_log_prior

_GradientRule = Literal["exact", "approximate"]

_LEAST_LOG = -85.0


def template_scores(
    maps: Float[Tensor, "image filter row col"], templates: Float[Tensor, "template side_row side_col"]
) -> Float[Tensor, "image filter template"]:
    """Return ``tr(x · T)`` in nats for every map and template."""
    for name, given in (("maps", maps), ("templates", templates)):
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.layout != torch.strided:
            kind = f"{given.dtype} in layout {given.layout}" if isinstance(given, Tensor) else type(given).__name__
            raise InputTypeError(expected(f"{name} as a floating-point tensor", kind, "Convert it, as x.float()"))
    if maps.ndim != 4 or 0 in maps.shape:
        rule = "maps of at least one image and filter with axes image, filter, row, col"
        raise InputError(expected(rule, f"shape {tuple(maps.shape)}", "Give a batch of maps"))
    if maps.shape[2:] != templates.shape[1:]:
        rule, got = ("x".join(map(str, size)) for size in (templates.shape[1:], maps.shape[2:]))
        remedy = "Build the templates with part_templates(rows, cols)"
        raise InputError(expected(f"maps of {rule} cells like the templates", got, remedy))
    return maps.flatten(2) @ templates.to(maps.dtype).flatten(1).t()


class _ScoreLoss(torch.autograd.Function):
    """Loss per filter from template scores, with its closed-form gradient computed in the same pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, log_prior: Tensor, chosen: Tensor | None) -> Tensor:
        log_given = scores - from_all(torch.logsumexp(scores, 0)).logsumexp(0)
        # Most templates fit most maps badly: below exp(-87) float32 has only denormal numbers, with which a processor
        # is six times slower. exp(-85) is as good as 0 for every sum it enters.
        joint = (log_given + log_prior).clamp_(min=_LEAST_LOG).exp_()  # p(T) p(x|T)
        log_ratio = log_given.sub_(joint.sum(-1, keepdim=True).log_())  # log p(x|T) / p(x)
        weighted = joint * log_ratio
        summed = from_all(weighted.sum(0)).sum(0)
        if ctx.needs_input_grad[0]:
            if chosen is not None:
                gradient = torch.zeros_like(weighted).scatter_(2, chosen, -weighted.gather(2, chosen))
            else:
                divergence = summed / log_prior.exp()  # KL_T
                gradient = weighted.addcmul_(joint, divergence, value=-1).neg_()
            ctx.save_for_backward(gradient)
        return -summed.sum(-1)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0][None, :, None], None, None


def filter_loss_of_scores(
    scores: Float[Tensor, "image filter template"],
    *,
    alpha: float | None = None,
    chosen: Int[Tensor, "image filter 1"] | None = None,
) -> Float[Tensor, " filter"]:
    """Return the filter loss from template scores in nats, differentiable in the scores.

    Args:
        scores: from :func:`template_scores`, the negative template last.
        alpha: as in :func:`filter_loss`.
        chosen: the single template whose gradient is used, for the paper's approximation; by default all are.

    Raises:
        InputError: a score is NaN or infinite.
    """
    if not bool(torch.isfinite(scores.detach().sum())):
        bad = int((~torch.isfinite(scores.detach())).any(-1).any(0).sum())
        raise InputError(
            expected("finite maps", f"NaN or infinity in {bad} filters", "Lower the learning rate or check the weights")
        )
    log_prior = template_log_prior(scores.shape[2] - 1, alpha=alpha).to(scores)
    result: Tensor = _ScoreLoss.apply(scores, log_prior, chosen)
    return result


def single_templates(
    maps: Float[Tensor, "image filter row col"], positive: Bool[Tensor, " image"] | None = None
) -> Int[Tensor, "image filter 1"]:
    """Return the paper's single template of every map: at its peak, the negative one for images not ``positive``."""
    chosen = peak_cells(maps.detach())
    if positive is not None:
        chosen = torch.where(positive.to(maps.device)[:, None], chosen, maps.shape[2] * maps.shape[3])
    return chosen[..., None]


@checked
def filter_loss(
    maps: Float[Tensor, "image filter row col"],
    templates: Float[Tensor, "template side_row side_col"],
    *,
    alpha: float | None = None,
    gradient: _GradientRule = "exact",
    positive: Bool[Tensor, " image"] | None = None,
) -> Float[Tensor, " filter"]:
    """Return ``Loss_f = -MI(X; T)`` of every filter, differentiable in the maps.

    Args:
        maps: non-negative maps of a batch (after a ReLU), at least one image.
        templates: from :func:`~partlens.explainer.templates.part_templates`, the negative one last.
        alpha: prior probability that the part is present; by default the paper's ``L²/(1+L²)``.
        gradient: ``"exact"`` over all templates; ``"approximate"``, the paper's single template: the one at the
            map's peak for images of the filter's category, the negative one for others (CVPR 2018, Eq. (4)).
        positive: for the approximate rule, which images are of the category (image,); by default all.

    Returns:
        One value per filter in nats, within ``[-min(log N, log(L² + 1)), 0]``; lower is better: each image
        matches one template, and different images match different ones.

    Raises:
        InputError: no image, map size and templates differ, or a map holds NaN or infinity.
        InputTypeError: maps that are no floating-point tensor, an alpha that is no number.

    Example:
        >>> from partlens.explainer.templates import part_templates
        >>> float(filter_loss(torch.zeros(4, 1, 5, 5), part_templates(5)).abs().max()) < 1e-6
        True
    """
    if gradient not in ("exact", "approximate"):
        raise InputError(expected("gradient exact or approximate", gradient, "Choose exact"))
    if positive is not None and (not isinstance(positive, Tensor) or positive.dtype != torch.bool):
        raise InputTypeError(expected("positive as a tensor of truth values", positive, "Give one for each image"))
    return filter_loss_of_scores(
        template_scores(maps, templates),
        alpha=alpha,
        chosen=single_templates(maps, positive) if gradient == "approximate" else None,
    )
