"""Non-negative matrix factorisation and k-means over the cells of a tap.

Both write a cell ``x`` as a combination of *parts* ``h_j``, one unit vector over the filters per unit:

    NMF      x ≈ sum_j z_j h_j,   z >= 0, h >= 0        as many parts at once as the cell needs
    k-means  x ≈ z_j h_j          for the nearest h_j   one part per cell

Sources: Lee & Seung, Nature 1999 (NMF); Fel et al., CRAFT, CVPR 2023, and Zhang et al., ICE, AAAI 2021 (NMF of a
network's activations, one row per cell); Dhillon & Modha, Machine Learning 2001 (k-means of unit vectors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.errors import InputError, expected
from partlens_papers.rivals.cells import CELLS, Rival, sample_cells, spread_directions

CODE_TOLERANCE = 1e-3
"""New cells: one more coordinate step would change no entry of a code by more than this share of the cell's length."""

_CODE_STEPS = 20_000
_LOOK_EVERY = 10
_INNER_STEPS = 8
_CELLS_AT_ONCE = 4096
_NOTHING_LEFT = 1e-10


class Codes(NamedTuple):
    """Solutions of non-negative least squares.

    Attributes:
        values: one code per row.
        residual: largest change that one more coordinate step would make, per row, in the units of the code.
        steps: gradient steps taken.
    """

    values: Float[Tensor, "cell unit"]
    residual: Float[Tensor, " cell"]
    steps: int


def nonnegative_codes(
    gram: Float[Tensor, "unit unit"],
    target: Float[Tensor, "cell unit"],
    start: Float[Tensor, "cell unit"] | None = None,
    *,
    tolerance: Float[Tensor, " cell"] | None = None,
    steps: int = _CODE_STEPS,
) -> Codes:
    """Minimise ``|x - z H|² / 2`` over ``z >= 0`` for many cells, given ``H Hᵀ`` and ``x Hᵀ``.

    Accelerated projected gradient with a restart wherever a cell's steps turn against its gradient (O'Donoghue &
    Candès, 2015), on all cells together; rows that are done leave the batch. ``H`` is scaled to unit rows inside.
    Cyclic coordinate descent needs a loop over units and, measured on one thread with 256 units, was slower.

    Args:
        gram: ``H Hᵀ``.
        target: ``x Hᵀ``, one row per cell.
        start: codes to begin with; zero by default.
        tolerance: residual at which a row is done; with ``None`` all ``steps`` are taken.
        steps: most steps.

    Returns:
        Codes, never worse than ``start``.
    """
    length = gram.diagonal().clamp(min=0).sqrt()
    live = length > 0
    scale = torch.where(live, length, torch.ones_like(length))
    inner = gram / scale[:, None] / scale[None, :]
    rate = 1 / torch.linalg.eigvalsh(inner.double())[-1].clamp(min=1).to(gram.dtype)
    goal = target / scale
    values = torch.zeros_like(goal) if start is None else start * scale
    result, residual = values.clone(), goal.new_zeros(len(goal))
    rows = torch.arange(len(goal), device=goal.device)
    ahead, pace, taken = values, goal.new_ones(len(goal), 1), 0
    while taken < steps and len(rows):
        slope = torch.addmm(goal, ahead, inner, beta=-1)
        moved = (ahead - slope * rate).clamp_(min=0)
        step = moved - values
        turned = ((ahead - moved) * step).sum(1, keepdim=True) > 0
        faster = (1 + (1 + 4 * pace * pace).sqrt()) / 2
        push = torch.where(turned, torch.zeros_like(pace), (pace - 1) / faster)
        pace = torch.where(turned, torch.ones_like(pace), faster)
        ahead, values, taken = torch.addcmul(moved, push, step), moved, taken + 1
        if tolerance is not None and taken % _LOOK_EVERY == 0:
            slope = torch.addmm(goal, values, inner, beta=-1)
            change = (values - (values - slope).clamp_(min=0)).div_(scale).abs_().amax(1)
            done = change <= tolerance[rows]
            if bool(done.any()):
                result[rows[done]], residual[rows[done]] = values[done], change[done]
                left = ~done
                rows, goal, values, ahead, pace = rows[left], goal[left], values[left], ahead[left], pace[left]
    if len(rows):
        slope = torch.addmm(goal, values, inner, beta=-1)
        change = (values - (values - slope).clamp_(min=0)).div_(scale).abs_().amax(1)
        if start is not None:
            before = start[rows] * scale
            worse = _energy(values, inner, goal) >= _energy(before, inner, goal)
            values = torch.where(worse[:, None], before, values)
        result[rows], residual[rows] = values, change
    return Codes(result / scale, residual, taken)


def _energy(codes: Tensor, gram: Tensor, target: Tensor) -> Tensor:
    """``|x - z H|² / 2`` of every row without its constant ``|x|² / 2``."""
    return ((codes @ gram / 2 - target) * codes).sum(1)


@dataclass(frozen=True, eq=False)
class _Dictionary(Rival):
    """Units that are directions of the tap's cells.

    Attributes:
        parts: ``h_j`` (unit, filter) of length 1.
    """

    parts: Float[Tensor, "unit filter"]

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.parts.shape[0])

    @property
    def filters(self) -> int:
        """Number of filters of the tap."""
        return int(self.parts.shape[1])

    def decode(self, codes: Float[Tensor, "cell unit"]) -> Float[Tensor, "cell filter"]:
        """Return ``z H``."""
        return codes @ self.parts.to(codes)


@dataclass(frozen=True, eq=False)
class Nmf(_Dictionary):
    """Non-negative parts; see the module.

    Attributes:
        parts: ``h_j`` (unit, filter), at least 0, of length 1.
        history: ``|X - Z H|² / |X|²`` over the sample after every alternation, falling.
    """

    def encode(self, cells: Float[Tensor, "cell filter"]) -> Float[Tensor, "cell unit"]:
        """Solve non-negative least squares for every cell, to :data:`CODE_TOLERANCE` of the cell's length.

        Raises:
            InputError: a cell below 0, or codes that do not settle.
        """
        if bool((cells < 0).any()):
            raise InputError(
                expected("maps of at least 0, after a ReLU", f"{float(cells.min()):.3g}", "Use the tap of the fit")
            )
        parts = self.parts.to(cells)
        tolerance = CODE_TOLERANCE * cells.norm(dim=1)
        codes = nonnegative_codes(parts @ parts.T, cells @ parts.T, tolerance=tolerance)
        if codes.steps >= _CODE_STEPS and bool((codes.residual > tolerance).any()):
            raise InputError(
                expected(
                    f"codes within {CODE_TOLERANCE:g} after {_CODE_STEPS} steps",
                    f"{float((codes.residual / cells.norm(dim=1).clamp(min=1e-30)).max()):.2g}",
                    "Fit with fewer units",
                )
            )
        return codes.values


def fit_nmf(
    maps: Tensor | np.ndarray,
    units: int,
    *,
    seed: int = 0,
    cells: int = CELLS,
    iterations: int = 100,
    tolerance: float = 1e-4,
) -> Nmf:
    """Factorise the cells of a tap into non-negative parts.

    Alternates between codes and parts; each half solves its non-negative least squares by a few accelerated steps from
    where it stood and never raises ``|X - Z H|²``. A part that no cell uses starts anew at the cell that is explained
    worst. The parts start at cells of different directions (:func:`~partlens_papers.rivals.cells.spread_directions`).

    Args:
        maps: ``[row, filter, row, col]`` of the tap on training photos, at least 0; a tensor or a memory map.
        units: number of parts, at most the number of cells.
        seed: of the cells and the start.
        cells: cells to learn from.
        iterations: most alternations.
        tolerance: stop when the loss falls by less than this share of itself in one alternation.

    Raises:
        InputError: negative values, NaN or infinity, zeros only, or more units than cells.

    Example:
        >>> found = fit_nmf(torch.rand(8, 5, 4, 4), 2, seed=0)
        >>> found.units, found.maps(torch.rand(3, 5, 4, 4)).shape
        (2, torch.Size([3, 2, 4, 4]))
    """
    sample = sample_cells(maps, units, seed=seed, cells=cells, non_negative=True)
    generator = torch.Generator().manual_seed(seed)
    parts = spread_directions(sample, units, generator)
    energy = float(sample.double().square().sum())
    codes = torch.zeros(len(sample), units, dtype=sample.dtype, device=sample.device)
    history: list[float] = []
    for _ in range(iterations):
        codes = torch.cat(
            [
                nonnegative_codes(parts @ parts.T, x @ parts.T, z, steps=_INNER_STEPS).values
                for x, z in zip(sample.split(_CELLS_AT_ONCE), codes.split(_CELLS_AT_ONCE), strict=True)
            ]
        )
        gram = codes.T @ codes
        parts = nonnegative_codes(gram, sample.T @ codes, parts.T.contiguous(), steps=_INNER_STEPS).values.T
        length = parts.norm(dim=1)
        unused = (gram.diagonal() <= 0) | (length <= 0)
        length = torch.where(unused, torch.ones_like(length), length)
        parts, codes = parts / length[:, None], codes * length
        left = sample - codes @ parts
        error = left.square().sum(1)
        history.append(float(error.double().sum()) / energy)
        if bool(unused.any()) and history[-1] > _NOTHING_LEFT:
            part = int(unused.nonzero()[0])  # one at a time: the next one gets what this one leaves
            parts[part] = _rays(left[error.argmax()].clamp(min=0)[None])[0]
            codes[:, part] = 0
        elif _settled(history, tolerance):
            break
    return Nmf(tuple(history), parts.contiguous())


def _settled(history: list[float], tolerance: float) -> bool:
    """Whether the last alternation lowered the loss by no more than a share of itself."""
    return len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-2]


def _rays(rows: Tensor) -> Tensor:
    """Scale rows to length 1; a row of zeros becomes the even direction."""
    length = rows.norm(dim=1, keepdim=True)
    even = torch.full_like(rows, rows.shape[1] ** -0.5)
    return torch.where(length > 0, rows / length.clamp(min=torch.finfo(rows.dtype).tiny), even)


@dataclass(frozen=True, eq=False)
class KMeans(_Dictionary):
    """Clusters of directions; see the module.

    A unit's map is ``max(x · h_j, 0)`` at the cells whose best centre it is, and 0 elsewhere. Only there, because the
    cosines of non-negative cells are all high, so that the maps of all units would otherwise be nearly one map. The
    projection instead of the cosine, because it is the least-squares scale of the centre (so the reconstruction is the
    sum of the units' maps, as for the other rivals), and because the cosine would let cells in which next to nothing
    happens hold the peak.

    Attributes:
        parts: centres ``h_j`` (unit, filter) of length 1.
        history: 1 - mean cosine to the nearest centre over the sample's cells that are not zero, falling.
    """

    def encode(self, cells: Float[Tensor, "cell filter"]) -> Float[Tensor, "cell unit"]:
        """Return the projection on the nearest centre, in that unit's column."""
        best, unit = (cells @ self.parts.to(cells).T).max(1, keepdim=True)
        return cells.new_zeros(len(cells), self.units).scatter_(1, unit, best.clamp(min=0))


def fit_kmeans(
    maps: Tensor | np.ndarray,
    units: int,
    *,
    seed: int = 0,
    cells: int = CELLS,
    iterations: int = 100,
    tolerance: float = 1e-5,
) -> KMeans:
    """Cluster the directions of a tap's cells.

    Lloyd's alternation on unit vectors, started by k-means++; cells of zeros take no part. A cluster that loses its
    last cell starts anew at the cell that is farthest from its centre.

    Args:
        maps: ``[row, filter, row, col]`` of the tap on training photos; a tensor or a memory map.
        units: number of clusters, at most the number of cells that are not zero.
        seed: of the cells and the start.
        cells: cells to learn from.
        iterations: most alternations.
        tolerance: stop when the loss falls by less than this share of itself in one alternation.

    Raises:
        InputError: NaN or infinity, zeros only, or more units than cells.
    """
    sample = sample_cells(maps, units, seed=seed, cells=cells)
    rays = sample[sample.norm(dim=1) > 0]
    if units > len(rays):
        raise InputError(
            expected(f"at most {len(rays)} units, one per cell that is not zero", units, "Ask for fewer units")
        )
    rays = rays / rays.norm(dim=1, keepdim=True)
    centres = spread_directions(rays, units, torch.Generator().manual_seed(seed))
    history: list[float] = []
    for _ in range(iterations):
        cosine, unit = (rays @ centres.T).max(1)
        history.append(1 - float(cosine.double().mean()))
        empty = torch.bincount(unit, minlength=units) == 0
        revived = bool(empty.any()) and history[-1] > _NOTHING_LEFT
        if not revived and _settled(history, tolerance):
            break
        centres = _rays(torch.zeros_like(centres).index_add_(0, unit, rays))
        if revived:  # one at a time: the next one gets what this one leaves
            centres[int(empty.nonzero()[0])] = rays[cosine.argmin()]
    return KMeans(tuple(history), centres)
