"""The two masks of interpretable CNNs: as published, and as the authors' released code works.

Both keep a map's surroundings of one cell, its centre, and leave the rest of the image out. They differ in nearly every
detail:

                        published (CVPR 2018)               released (MATLAB, layer ``conv_mask``)
    centre              the largest cell                    the centroid of the map, rounded
    radius              fixed, beta = 4                     learned per filter, start 2 (in half map sides)
    gradient            of -MI(X; T), one template          a strength per map, normalised, times the mask
    its weight          0.003 mean peak / epoch             1e-6 / epoch per map on average
    filter's category   largest mean sum of activations     largest running mean of peaks

The facts about the released code were read in it; the ones it leaves open are stated where they are decided.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from partlens.errors import InputError, expected
from partlens.explainer.filter_loss import filter_loss_of_scores, template_scores
from partlens.explainer.templates import BETA, mask_at_peak, part_templates, peak_cells, peak_masks
from partlens_papers.rivals.interpretable_config import Method

_LAMBDA = 3e-3
_STRENGTH_SCALE = 0.5
_MAP_COEFFICIENT = 1e-6
_RADIUS_START = 2.0
_RADIUS_RANGE = (1.5, 3.0)
_RADIUS_PULL = 1e4
_LEAST_SUM = 1e-9
_LEAST_PEAK = 0.1
_PAST = 0.9


class FilterCategories(nn.Module):
    """Which category each filter belongs to, followed from batch to batch.

    ``c_f = argmax_c M_fc``, ``M_fc`` a running mean over the images of category ``c`` of the map's sum (published) or
    of its peak (released). The released code keeps 0.9 of the past and begins with at least 0.1; the paper does not say
    how it averages, and the same is done for it. Before the first batch every filter belongs to all categories
    together.

    Where a filter is silent on a category's images of a batch, the released code takes the running mean of the first
    category (a slip of an index); here the filter keeps its own.

    Args:
        filters: number of filters.
        categories: number of categories; with one, every filter belongs to it.
        method: sum or peak.
    """

    magnitude: Tensor
    started: Tensor

    def __init__(self, filters: int, categories: int, method: Method) -> None:
        super().__init__()
        self.method = method
        self.register_buffer("magnitude", torch.zeros(filters, categories))
        self.register_buffer("started", torch.zeros(categories, dtype=torch.bool))

    @property
    def single(self) -> bool:
        """Whether one set of positive images serves all filters: one category, or nothing measured yet."""
        return self.magnitude.shape[1] == 1 or not bool(self.started.any())

    def chosen(self) -> Tensor:
        """Return each filter's category (filter,)."""
        return self.magnitude.argmax(1)

    def positives(self, labels: Bool[Tensor, "image category"]) -> Bool[Tensor, "image filter"]:
        """Return for every image and filter whether the image is of the filter's category."""
        if self.single:
            return labels.any(1)[:, None].expand(-1, self.magnitude.shape[0])
        return labels[:, self.chosen()]

    @torch.no_grad()
    def update(self, maps: Float[Tensor, "image filter row col"], labels: Bool[Tensor, "image category"]) -> None:
        """Mix in a batch; categories without an image in it stay as they are."""
        size = maps.sum((2, 3)) if self.method == "published" else maps.amax((2, 3))
        count = labels.sum(0)
        share = labels.to(size) / count.clamp(min=1)
        mean = size.T @ share
        seen = count > 0
        first = seen & ~self.started
        later = seen & self.started
        mean[:, later] = torch.where(mean == 0, self.magnitude, mean)[:, later]
        self.magnitude[:, later] = _PAST * self.magnitude[:, later] + (1 - _PAST) * mean[:, later]
        self.magnitude[:, first] = mean[:, first].clamp(min=_LEAST_PEAK)
        self.started |= seen


class PublishedMask(nn.Module):
    """Mask at the largest cell, and the filter loss with the paper's single template.

    Source: CVPR 2018, Secs. 3 and 3.1; the mask without the template's scale, as the authors' later papers and their
    code have it.

    Args:
        side_cells: rows and columns of the maps.
    """

    masks: Tensor
    templates: Tensor

    def __init__(self, side_cells: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("masks", peak_masks(*side_cells, beta=BETA), persistent=False)
        self.register_buffer("templates", part_templates(*side_cells, beta=BETA), persistent=False)

    def forward(self, maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image filter row col"]:
        """Keep each map's surroundings of its largest cell."""
        return mask_at_peak(maps, self.masks)

    def penalty(
        self, maps: Float[Tensor, "image filter row col"], positive: Bool[Tensor, "image filter"], epoch: int
    ) -> Float[Tensor, " filter"]:
        """Return ``lambda_f Loss_f``.

        ``lambda_f = 0.003 mean_x max_ij x_ij / t`` over the batch, ``t`` the epoch (CVPR 2018, Sec. 3.1); ``Loss_f``
        with the gradient of the template at the peak on images of the filter's category, of the negative one on others
        (Eq. 4). The paper leaves the factor open. With 0.003 the maps of AlexNet's conv5 begin with the gradient at the
        peak that the released code gives them, 1e-6 of a summed loss (3.4e-4 with 1, measured on 64 photos). The
        gradient grows with the maps, exponentially in the end: too large a factor ends in infinite maps.

        Args:
            maps: after the ReLU, before the mask.
            positive: which images are of each filter's category.
            epoch: from 1.
        """
        peak = peak_cells(maps.detach())
        chosen = torch.where(positive, peak, maps.shape[2] * maps.shape[3])[..., None]
        loss = filter_loss_of_scores(template_scores(maps, self.templates), chosen=chosen)
        return loss * maps.detach().amax((2, 3)).mean(0) * (_LAMBDA / epoch)


class ReleasedMask(nn.Module):
    """Mask at the centroid with a learned radius, and what the released code adds to the gradient.

    With ``x`` (image ``b``, filter ``c``) the ReLU's maps, ``X, Y`` the cells' coordinates from -1 to 1, ``mu`` the
    centroid of ``x_cb`` rounded to a cell, ``w_c`` the radius and ``a = 0.5``:

        m    = max(1 - w_c (|X - mu_x| + |Y - mu_y|), -1)
        out  = max(x m, 0)
        s_cb = mean_cells(x m),      u_cb = mean_cells(x)
        A+_c = a log mean_b exp(mean_cells(x m') / a),   m' = m with channels and images in reverse order
        A-_c = a log mean_b exp(-u / a)
        g_cb = exp(s / a) (s - A+ + a)      on images of the filter's category
        g_cb = exp(-u / a) (-u - A- + a)    on others

    ``g`` is divided by its mean over the filter's positive (negative) images, so that a map gets ``1e-6 / epoch`` on
    average. To the gradient of the output, ``dout max(m, 0)``, are added

        - (1e-6 / epoch) w_pos g m     on positive images,      + (1e-6 / epoch) w_neg g     on negative ones.

    The radius is no minimum of the loss: its gradient is set to ``-1e4 (target_c - w_c)`` with ``target_c = 3 / (sum_b
    s r / sum_b s)`` over positive images, clipped to 1.5 … 3, where ``r`` is the root of the mean square distance of
    the activations from ``mu``, in cells.

    ``exp`` is taken relative to the filter's largest exponent, which the normalisation cancels, so that it cannot
    overflow; the code in MATLAB replaces infinities by the largest finite strength.

    Args:
        filters: number of filters.
        side_cells: rows and columns of the maps.
    """

    row: Tensor
    col: Tensor

    def __init__(self, filters: int, side_cells: tuple[int, int]) -> None:
        super().__init__()
        if min(side_cells) < 2:
            raise InputError(expected("maps of at least 2x2 cells", f"{side_cells}", "Tap an earlier layer"))
        self.radius = nn.Parameter(torch.full((filters,), _RADIUS_START))
        rows, cols = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in side_cells)
        self.register_buffer("row", rows, persistent=False)
        self.register_buffer("col", cols, persistent=False)

    def template(
        self, maps: Float[Tensor, "image filter row col"]
    ) -> tuple[Float[Tensor, "image filter row col"], Float[Tensor, "image filter"]]:
        """Return the mask ``m`` with its negative part, and ``r``, the spread about its centre in cells.

        Raises:
            InputError: a map holds NaN or infinity.
        """
        rows, cols = maps.shape[2:]
        total = maps.sum((2, 3)).clamp(min=_LEAST_SUM)
        if not bool(torch.isfinite(total).all()):
            raise InputError(expected("finite maps", "NaN or infinity", "Lower the learning rate or check the weights"))
        by_row, by_col = maps.sum(3), maps.sum(2)
        row, col = (torch.arange(1, n + 1, device=maps.device, dtype=maps.dtype) for n in (rows, cols))
        # MATLAB rounds halves away from zero; an empty map has its centre in the first cell.
        mu_row = ((by_row @ row) / total + 0.5).floor().clamp(min=1, max=rows)
        mu_col = ((by_col @ col) / total + 0.5).floor().clamp(min=1, max=cols)
        away = (by_row * (row - mu_row[..., None]).square()).sum(-1)
        across = (by_col * (col - mu_col[..., None]).square()).sum(-1)
        spread = ((away + across) / total).sqrt()
        at_row, at_col = self.row.to(maps)[mu_row.long() - 1], self.col.to(maps)[mu_col.long() - 1]
        distance = (self.row.to(maps) - at_row[..., None]).abs()[..., None] + (
            self.col.to(maps) - at_col[..., None]
        ).abs()[..., None, :]
        radius = self.radius.detach().to(maps)[:, None, None]
        return (1 - distance * radius).clamp(min=-1), spread

    @torch.no_grad()
    def kept(self, maps: Tensor) -> Tensor:
        """Return ``max(m, 0)``."""
        return self.template(maps)[0].clamp_(min=0)

    def forward(self, maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image filter row col"]:
        """Keep each map's surroundings of its centroid; nothing is added to the gradient."""
        return maps * self.kept(maps.detach())

    def penalised(
        self,
        maps: Float[Tensor, "image filter row col"],
        positive: Bool[Tensor, "image filter"],
        epoch: int,
        *,
        weight: tuple[Float[Tensor, " filter"], Float[Tensor, " filter"]] | None = None,
        strength: float = 1.0,
        share: float = 1.0,
    ) -> Float[Tensor, "image filter row col"]:
        """Mask as :meth:`forward`, and add the filter terms in the backward pass.

        Args:
            maps: after the ReLU.
            positive: which images are of each filter's category.
            epoch: from 1.
            weight: ``w_pos`` and ``w_neg`` of every filter; 1 by default.
            strength: factor on what is added; 1 is the released code's.
            share: factor on it and on the radius' gradient: one over the batch size where the loss is a mean over the
                batch (the released code sums the loss and divides the gradients of the weights later).
        """
        ones = maps.new_ones(maps.shape[1])
        positive_weight, negative_weight = (ones, ones) if weight is None else weight
        coefficient = strength * share * _MAP_COEFFICIENT / epoch
        with torch.no_grad():
            template, spread = self.template(maps.detach())
        found: Tensor = _ReleasedTerms.apply(
            maps,
            self.radius,
            template,
            spread,
            positive,
            positive_weight * coefficient,
            negative_weight * coefficient,
            share * _RADIUS_PULL,
        )
        return found


class _ReleasedTerms(torch.autograd.Function):
    """Masking whose backward pass adds the released code's terms."""

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        radius: Tensor,
        template: Tensor,
        spread: Tensor,
        positive: Tensor,
        positive_weight: Tensor,
        negative_weight: Tensor,
        pull: float,
    ) -> Tensor:
        ctx.save_for_backward(maps, radius, template, spread, positive, positive_weight, negative_weight)
        ctx.pull = pull
        return maps * template.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        maps, radius, template, spread, positive, positive_weight, negative_weight = ctx.saved_tensors
        cells = maps.shape[2] * maps.shape[3]
        fit = (maps * template).mean((2, 3))
        mean = maps.mean((2, 3))
        wrong = torch.einsum("bcij,bcij->bc", maps, template.flip((0, 1))) / cells
        scale = _STRENGTH_SCALE
        offset_positive = _log_mean_exp(wrong / scale) * scale
        offset_negative = _log_mean_exp(-mean / scale) * scale
        inside = _normalised(fit / scale, fit - offset_positive + scale, positive)
        outside = _normalised(-mean / scale, -mean - offset_negative + scale, ~positive)
        gradient = upstream[0] * template.clamp(min=0)
        gradient.addcmul_((inside * positive_weight)[..., None, None], template, value=-1)
        gradient.add_((outside * negative_weight)[..., None, None])
        weighed = torch.where(positive, fit, 0.0)
        distance = (weighed * spread).sum(0) / weighed.sum(0)
        low, high = _RADIUS_RANGE
        # Without positive images, and for a silent filter, 0 / 0 is followed by MATLAB's min, which drops the NaN.
        target = torch.nan_to_num(3 / distance, nan=high, posinf=high, neginf=low).clamp(low, high)
        return gradient, (-ctx.pull * (target - radius)).to(radius), None, None, None, None, None, None


def _log_mean_exp(values: Tensor) -> Tensor:
    return torch.logsumexp(values, 0) - math.log(values.shape[0])


def _normalised(exponent: Tensor, factor: Tensor, chosen: Tensor) -> Tensor:
    """Return ``exp(exponent) factor`` over its mean over each filter's chosen images; 0 for the others."""
    top = torch.where(chosen, exponent, -math.inf).amax(0)
    raw = torch.where(chosen, (exponent - torch.nan_to_num(top, neginf=0.0)).exp() * factor, 0.0)
    mean = raw.sum(0) / chosen.sum(0)
    strength = torch.nan_to_num(torch.where(chosen, raw / mean, 0.0), nan=0.0, posinf=math.inf, neginf=math.inf)
    finite = torch.where(torch.isinf(strength), -math.inf, strength).max()
    return torch.where(torch.isinf(strength), finite.clamp(min=0), strength)
