"""Part templates, their prior, and the mask a peak casts.

A template is an ideal map of a part filter: one peak at a cell, falling off with the L1 distance, negative far away.
The family holds one template per cell and a negative one for "the part is not in the image".

Source: Zhang, Wu & Zhu, CVPR 2018, Sec. 3.1 (templates, prior); Zhang et al., ICLR 2020 submission, Sec. 3.1 (mask).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.errors import InputError, InputTypeError, expected

BETA = 4.0
"""Fall-off of a template per side length (CVPR 2018, Sec. 3.1)."""

PEAK_POWER = 6.0
"""Power by which an explainer's maps are weighted for their centroid (ours)."""


def _check_side(rows: int, cols: int) -> None:
    if rows < 2 or cols < 2:
        remedy = "Tap a layer further from the output, where maps are larger"
        raise InputError(expected("maps of at least 2x2 cells", f"{rows}x{cols}", remedy))


def _distance_cells(rows: int, cols: int) -> Float[Tensor, "cell cell"]:
    """L1 distance between every pair of cells, in cells, row-major."""
    grid = cell_grid(rows, cols, torch.zeros((), dtype=torch.float64))
    return torch.cdist(grid, grid, p=1)


def part_templates(
    rows: int,
    cols: int | None = None,
    *,
    beta: float = BETA,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "template row col"]:
    """Return the template family ``T_mu1 … T_mu(L²), T-`` of a map, row-major by peak cell, the negative one last.

    ``T_mu[i, j] = tau * max(1 - beta * |[i, j] - mu|_1 / L, -1)`` and ``T-[i, j] = -tau``, where ``L`` is the side
    length (for maps that are not square, the geometric mean of both sides; the papers have square maps only) and
    ``tau`` is ``0.5 / L²``. A map has ``cols = rows`` by default, and at least 2 of each.

    Example:
        >>> family = part_templates(14)
        >>> family.shape[0], round(float(family[0, 0, 0]) * 196, 6), round(float(family.min()) * 196, 6)
        (197, 0.5, -0.5)
    """
    cols = rows if cols is None else cols
    _check_side(rows, cols)
    tau = 0.5 / (rows * cols)
    side = math.sqrt(rows * cols)
    positive = (1 - beta * _distance_cells(rows, cols) / side).clamp(min=-1)
    family = torch.cat([positive, positive.new_full((1, rows * cols), -1.0)]) * tau
    return family.reshape(-1, rows, cols).to(dtype)


def template_log_prior(cells: int, *, alpha: float | None = None) -> Float[Tensor, " template"]:
    """Return ``log p(T)`` for ``L²`` cells: ``alpha / L²`` for each positive template, ``1 - alpha`` for ``T-``.

    With the paper's ``alpha = L² / (1 + L²)`` all ``L² + 1`` templates are equally likely. (CVPR 2018, Sec. 3.1)

    Example:
        >>> round(float(template_log_prior(196).exp()[0] * 197), 5)
        1.0
    """
    alpha = cells / (1 + cells) if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise InputTypeError(expected("alpha as a number", type(alpha).__name__, "Omit it for the paper's value"))
    if not 0 < alpha < 1:
        raise InputError(expected("alpha between 0 and 1", alpha, "Omit it for the paper's value"))
    prior = torch.full((cells + 1,), math.log(alpha / cells), dtype=torch.float64)
    prior[-1] = math.log1p(-alpha)
    return prior


def peak_masks(
    rows: int, cols: int | None = None, *, beta: float = BETA, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "cell row col"]:
    """Return ``max(1 - beta * |mu - [i, j]|_1 / L, 0)`` for every peak cell ``mu``: 1 at the peak, no ``tau``.

    Source: ICLR 2020 submission, Sec. 3.1 ("Mask layer").

    Example:
        >>> int((peak_masks(14)[7 * 14 + 7] > 0).sum())
        25
    """
    cols = rows if cols is None else cols
    _check_side(rows, cols)
    mask = (1 - beta * _distance_cells(rows, cols) / math.sqrt(rows * cols)).clamp(min=0)
    return mask.reshape(-1, rows, cols).to(dtype)


def peak_cells(maps: Float[Tensor, "image filter row col"]) -> Int[Tensor, "image filter"]:
    """Return the row-major index of each map's largest cell, the first of equals (a map of zeros gives 0)."""
    return maps.flatten(2).argmax(-1)


def cell_grid(rows: int, cols: int, like: Tensor) -> Float[Tensor, "cell 2"]:
    """Return (row, col) of every cell, row-major, in the type and on the device of ``like``."""
    row = torch.arange(rows, dtype=like.dtype, device=like.device).repeat_interleave(cols)
    col = torch.arange(cols, dtype=like.dtype, device=like.device).repeat(rows)
    return torch.stack([row, col], -1)


def centroid_cells(
    maps: Float[Tensor, "image filter row col"], power: float = PEAK_POWER
) -> Float[Tensor, "image filter 2"]:
    """Return the centroid (row, col) of each non-negative map raised to a power: its largest cell for a large one.

    Where a map has one narrow peak, this is that peak to a part of a cell; where the map has two, it is a
    place between them instead of a jump. It does not depend on the map's scale.

    Example:
        >>> maps = torch.zeros(1, 1, 5, 5)
        >>> maps[0, 0, 1, 2] = maps[0, 0, 1, 3] = 7.0
        >>> centroid_cells(maps, 4.0).tolist()
        [[[1.0, 2.5]]]
    """
    rows, cols = maps.shape[2:]
    flat = maps.flatten(2).float()
    largest = flat.amax(-1, keepdim=True)
    weight = (flat / largest.clamp(min=torch.finfo(flat.dtype).tiny)).pow(power)
    places = weight @ cell_grid(rows, cols, weight) / weight.sum(-1, keepdim=True)
    # An empty map has no peak: it gets cell (0, 0), as its largest cell does, so that silent filters are never taken
    # for filters that stay in the middle.
    return torch.where(largest <= 0, 0.0, places)


def mask_around(
    maps: Float[Tensor, "image filter row col"], places: Float[Tensor, "image filter 2"]
) -> Float[Tensor, "image filter row col"]:
    """Keep each map's neighbourhood of a place that need not be a cell: ``x * max(1 - beta |mu - [i, j]|_1 / L, 0)``.

    Equal to :func:`mask_at_peak` where the places are the largest cells; a constant of the backward pass, too.
    """
    rows, cols = maps.shape[2:]
    by_row = (torch.arange(rows).to(places) - places.detach()[..., 0, None]).abs()
    by_col = (torch.arange(cols).to(places) - places.detach()[..., 1, None]).abs()
    distance = by_row[..., :, None] + by_col[..., None, :]
    return maps * (1 - BETA * distance / math.sqrt(rows * cols)).clamp(min=0).to(maps.dtype)


def mask_at_peak(
    maps: Float[Tensor, "image filter row col"], masks: Float[Tensor, "cell row col"]
) -> Float[Tensor, "image filter row col"]:
    """Keep each map's neighbourhood of its largest cell, with :func:`peak_masks`: ``x ∘ mask(argmax x)``.

    The mask is a constant in the backward pass: ``dx = dy ∘ mask``. (ICLR 2020 submission, Sec. 3.1)
    """
    return maps * masks.to(maps.dtype)[peak_cells(maps.detach())]
