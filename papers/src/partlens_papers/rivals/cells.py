"""What every rival shares: codes of cells, the way from maps to cells and back, and a sample to learn from.

A rival describes one cell of a tap, the vector ``x`` of all filters' values there, by a non-negative *code* ``z`` with
one entry per *unit*, and gives back ``x`` from ``z``. A unit's map is its entry of the codes over an image's cells. So
every rival can be measured as the explainer's filters are (where its maps peak) and fed back through the performer's
own upper layers (what its reconstruction keeps).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.errors import InputError, InputTypeError, expected

CELLS = 16_384
"""Cells a rival learns from when no number is given: about 100 photos of 13x13 cells, drawn from all of them."""

_CELLS_AT_ONCE = 8192
_IMAGES_AT_ONCE = 64


@dataclass(frozen=True, eq=False)
class Rival(ABC):
    """A dictionary of units over the cells of a tap.

    Attributes:
        history: the training loss after every iteration or step, relative to the sample's energy; see each rival.
    """

    history: tuple[float, ...]

    @property
    @abstractmethod
    def units(self) -> int:
        """Number of units."""

    @property
    @abstractmethod
    def filters(self) -> int:
        """Number of filters of the tap."""

    @abstractmethod
    def encode(self, cells: Float[Tensor, "cell filter"]) -> Float[Tensor, "cell unit"]:
        """Return the non-negative codes of cells, in units of the tap's values."""

    @abstractmethod
    def decode(self, codes: Float[Tensor, "cell unit"]) -> Float[Tensor, "cell filter"]:
        """Return the cells that codes encode."""

    def maps(self, tap_maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image unit row col"]:
        """Return every unit's map: its code at each cell, at least 0.

        Args:
            tap_maps: maps of the tap the rival was fitted on; of any size.

        Raises:
            InputError: another number of filters, NaN or infinity, or what the rival itself cannot take.
        """
        parts = [self.encode(part) for part in self._cells(tap_maps)]
        return _as_maps(torch.cat(parts), tap_maps)

    def reconstruct(self, tap_maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image filter row col"]:
        """Return the maps that the codes encode, to be fed back through the performer's upper layers.

        Args:
            tap_maps: as for :meth:`maps`.
        """
        parts = [self.decode(self.encode(part)) for part in self._cells(tap_maps)]
        return _as_maps(torch.cat(parts), tap_maps)

    def _cells(self, tap_maps: Tensor) -> Iterator[Tensor]:
        if tap_maps.shape[1] != self.filters:
            raise InputError(
                expected(
                    f"maps of {self.filters} filters",
                    int(tap_maps.shape[1]),
                    "Use the tap that the rival was fitted on",
                )
            )
        if not tap_maps.numel():
            raise InputError(expected("at least 1 image", tuple(tap_maps.shape), "Give maps of photos"))
        check_finite(tap_maps)
        return iter(cells_of(tap_maps).split(_CELLS_AT_ONCE))


def cells_of(maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "cell filter"]:
    """Return the vectors of all cells as float32, image by image, row by row.

    Example:
        >>> cells_of(torch.arange(8.0).reshape(1, 2, 2, 2)).tolist()
        [[0.0, 4.0], [1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]
    """
    cells: Tensor = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1]).float()
    return cells


def _as_maps(cells: Tensor, like: Tensor) -> Tensor:
    images, _, rows, cols = like.shape
    return cells.reshape(images, rows, cols, -1).permute(0, 3, 1, 2).contiguous()


def check_finite(maps: Tensor) -> None:
    """Refuse maps with NaN or infinity.

    Raises:
        InputError: there is one.
    """
    if not bool(torch.isfinite(maps).all()):
        bad = int((~torch.isfinite(maps)).flatten(1).any(1).sum())
        raise InputError(
            expected("finite maps", f"NaN or infinity in {bad} of {len(maps)} images", "Check the performer's weights")
        )


def sample_cells(
    maps: Tensor | np.ndarray, units: int, *, seed: int, cells: int = CELLS, non_negative: bool = False
) -> Float[Tensor, "cell filter"]:
    """Draw cells of cached maps without replacement, every cell of every image with equal chance.

    A memory map is read some images at a time; only the drawn cells are kept.

    Args:
        maps: ``[row, filter, row, col]``: a tensor or a memory map of the tap's maps, of any float type.
        units: units to be fitted; there must be as many cells.
        seed: of the draw.
        cells: how many; all where there are fewer.
        non_negative: refuse maps with values below 0.

    Returns:
        float32, in the order of the maps, on the maps' device.

    Raises:
        InputTypeError: not floating-point maps.
        InputError: fewer than 1 unit, more units than cells, negative values where refused, NaN or infinity in an
            image that is drawn from, or no value above 0.

    Example:
        >>> sample_cells(torch.ones(2, 3, 4, 4), 2, seed=0, cells=5).shape
        torch.Size([5, 3])
    """
    floating = maps.dtype.is_floating_point if isinstance(maps, Tensor) else np.issubdtype(maps.dtype, np.floating)
    if maps.ndim != 4 or not floating:
        raise InputTypeError(
            expected("floating-point maps [row, filter, row, col]", f"{maps.dtype} {tuple(maps.shape)}", "Give maps")
        )
    per_image = int(maps.shape[2] * maps.shape[3])
    total = int(maps.shape[0]) * per_image
    if units < 1:
        raise InputError(expected("at least 1 unit", units, "Ask for some"))
    if units > min(cells, total):
        raise InputError(
            expected(
                f"at most {min(cells, total)} units, one per cell", units, "Ask for fewer, or give more cells or photos"
            )
        )
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(cells, total), replace=False))
    image, place = np.divmod(drawn, per_image)
    bounds = np.searchsorted(image, np.arange(0, maps.shape[0] + _IMAGES_AT_ONCE, _IMAGES_AT_ONCE))
    picked = []
    for low, high in itertools.pairwise(bounds):
        if low == high:
            continue
        wanted, local = np.unique(image[low:high], return_inverse=True)
        block = (
            maps[torch.from_numpy(wanted)] if isinstance(maps, Tensor) else torch.from_numpy(np.asarray(maps[wanted]))
        )
        check_finite(block)
        if non_negative and bool((block < 0).any()):
            raise InputError(
                expected(
                    "maps of at least 0, after a ReLU", f"values down to {float(block.min()):.3g}", "Tap an activation"
                )
            )
        rows = torch.from_numpy(local.reshape(-1)).to(block.device)
        cols = torch.from_numpy(place[low:high]).to(block.device)
        picked.append(block.flatten(2)[rows, :, cols].float())
    found = torch.cat(picked)
    if not bool((found != 0).any()):
        raise InputError(expected("maps with values above 0", "zeros only", "Tap another layer or check the photos"))
    return found


def spread_directions(
    cells: Float[Tensor, "cell filter"], units: int, generator: torch.Generator
) -> Float[Tensor, "unit filter"]:
    """Choose cells that point in different directions, as unit vectors to start a dictionary from.

    The seeding of k-means++ on unit vectors: each next cell is drawn with a chance proportional to ``1 - cos²`` to the
    nearest chosen one. At most 16 cells per unit are looked at. (Arthur & Vassilvitskii, SODA 2007.)

    Args:
        cells: at least as many as units; cells of zeros are passed over as long as others are left.
        units: how many to choose.
        generator: draws, on the CPU.
    """
    norm = cells.norm(dim=1)
    alive = norm.nonzero()[:, 0]
    pool = alive[torch.randperm(len(alive), generator=generator)[: 16 * units].to(alive.device)]
    rays = cells[pool] / norm[pool, None]
    draws = torch.rand(units, generator=generator, dtype=torch.float64).to(cells.device)
    chosen: Tensor = rays.new_empty(units, cells.shape[1])
    apart = torch.ones(len(rays), dtype=torch.float64, device=cells.device)
    for unit in range(units):  # each draw depends on all before it
        mass = apart.cumsum(0)
        if float(mass[-1]) <= 0:
            apart = torch.ones_like(apart)  # every direction is taken: the rest are repeats
            mass = apart.cumsum(0)
        at = int(torch.searchsorted(mass, draws[unit] * mass[-1]).clamp(max=len(rays) - 1))
        chosen[unit] = rays[at]
        apart = torch.minimum(apart, (1 - (rays @ rays[at]) ** 2).clamp(min=0).double())
        apart[at] = 0
    return chosen
