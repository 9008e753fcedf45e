"""Part interpretability of an evaluation's layers, where the photos say which region each part covers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.data.annotations import PartTruth
from partlens.data.images import ImageSet
from partlens.errors import ImageError, expected
from partlens.estimate import Estimate
from partlens.evaluation.places import NULL_FILTERS, ROUNDS, mean_of
from partlens.evaluation.results import PartInterpretability, RegionScores
from partlens.metrics.part_regions import (
    VALID_SHARE,
    CellsOn,
    ValidCells,
    cell_cover,
    meets_parts,
    part_interpretability,
    random_cells,
    round_cover,
    same_cell,
)
from partlens.metrics.scores import REGION_READINGS
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import ReceptiveField, cell_centre_px

# Regions are compared at about this many points along the input's shorter side: 4 px apart at 224 px.
_POINTS_PER_SIDE = 56


def _raster(size_px: tuple[int, int]) -> Float[Tensor, "point 2"]:
    """Return x, y of the points at which regions are compared: centres of equal squares that cover the input."""
    step = max(1, min(size_px) // _POINTS_PER_SIDE)
    rows, cols = (torch.arange(step / 2, side, step, dtype=torch.float64) for side in size_px)
    return torch.cartesian_prod(rows, cols).flip(1)


def _of_masks(
    masks: Mapping[str, np.ndarray], names: Sequence[str], at: np.ndarray, key: str, size_px: tuple[int, int]
) -> Bool[Tensor, "part point"]:
    found = torch.zeros(len(names), len(at), dtype=torch.bool)
    for number, name in enumerate(names):
        if name not in masks:
            continue
        cols, rows = size_px
        if masks[name].shape != (rows, cols):
            got = "x".join(str(side) for side in reversed(masks[name].shape))
            remedy = "Give masks of the image's own size"
            raise ImageError(expected(f"a mask of {name} as large as {key}, {cols}x{rows} px", got, remedy))
        x, y = np.floor(at).astype(np.int64).T
        inside = (x >= 0) & (y >= 0) & (x < cols) & (y < rows)
        found[number, torch.from_numpy(inside)] = torch.from_numpy(masks[name][y[inside], x[inside]])
    return found


def _of_boxes(truth: PartTruth, row: int, at: np.ndarray) -> Bool[Tensor, "part point"]:
    # Comparisons with NaN are false: a part whose place or size is not known is absent.
    away = np.abs(at[None] - truth.positions_px[row][:, None])
    return torch.from_numpy((away <= truth.sizes_px[row][:, None] / 2).all(-1))


@dataclass(frozen=True)
class PartRegions:
    """Which points of the input belong to each part of each photo."""

    kind: Literal["masks", "boxes"]
    names: tuple[str, ...]
    parts: tuple[Bool[Tensor, "part point"], ...]  # per photo; no point where a part is absent or cropped away
    points_px: Float[Tensor, "point 2"]
    size_px: tuple[int, int]

    @classmethod
    def of(cls, images: ImageSet, rows: Sequence[int], preprocessing: Preprocessing) -> PartRegions | None:
        """Return the regions of some photos' parts; ``None`` where nothing is known but points."""
        truth = images.part_truth
        if truth is None:
            return None
        points = _raster(preprocessing.size_px)
        of = truth.for_keys([images.keys[i] for i in rows])
        if truth.masks is None and not np.isfinite(of.sizes_px).any():
            return None
        annotated = set(truth.keys)
        found = []
        for number, row in enumerate(rows):
            size_px, key = images.size_px(row), images.keys[row]
            at = preprocessing.to_image_px(points.numpy(), size_px)
            if truth.masks is None:
                found.append(_of_boxes(of, number, at))
            else:
                masks = truth.masks(key) if key in annotated else {}
                found.append(_of_masks(masks, truth.landmarks, at, key, size_px))
        return cls(
            "boxes" if truth.masks is None else "masks",
            tuple(truth.landmarks),
            tuple(found),
            points,
            preprocessing.size_px,
        )

    @property
    def present(self) -> Bool[Tensor, "photo part"]:
        """Which part is on which photo."""
        return torch.stack([part.any(1) for part in self.parts])

    @property
    def median_radius_px(self) -> float:
        """Radius of the disc as large as half of the parts are at most; 0 where there is none."""
        sizes = torch.stack([part.sum(1) for part in self.parts])
        share = float(sizes[sizes > 0].double().median()) / len(self.points_px) if bool((sizes > 0).any()) else 0.0
        return math.sqrt(share * self.size_px[0] * self.size_px[1] / math.pi)


class RegionPass:
    """Valid cells of some layers, collected while photos stream by, and then their part interpretability.

    Args:
        regions: of the photos, in the order in which they stream.
        layers: whose maps will come.
        labels: the category of each photo, an index; a filter's valid cells are those on photos of its own.
        categories: how many there are.
        share: of a filter's cells that are valid.
    """

    def __init__(
        self,
        regions: PartRegions,
        layers: Sequence[str],
        labels: Int[Tensor, " photo"],
        categories: int = 1,
        share: float = VALID_SHARE,
    ) -> None:
        self.regions, self._share, self._present = regions, share, regions.present
        self._rows = [(labels == number).nonzero()[:, 0] for number in range(categories)]
        self._labels = labels
        self._cells = {
            name: [ValidCells(len(rows), share) if len(rows) else None for rows in self._rows] for name in layers
        }
        self._seen = dict.fromkeys(layers, 0)
        self._filters: dict[str, int] = {}

    def add(self, layer: str, maps: Float[Tensor, "image filter row col"]) -> None:
        """Take a layer's maps of the next photos."""
        start = self._seen[layer]
        labels = self._labels[start : start + len(maps)]
        self._seen[layer] = start + len(maps)
        self._filters[layer] = maps.shape[1]
        for number, cells in enumerate(self._cells[layer]):
            if cells is not None and bool((labels == number).any()):
                cells.add(maps[labels == number])

    def scores(
        self,
        fields: Mapping[str, ReceptiveField],
        assigned: Mapping[str, Int[Tensor, " filter"]],
        photos: Int[Tensor, " photo"],
        roles: Mapping[str, str],
        seed: int,
        rounds: int = ROUNDS,
    ) -> PartInterpretability:
        """Return the part interpretability of every layer, and what regions that know nothing would have.

        Args:
            fields: what each layer's cells see, in theory.
            assigned: per layer, the category of each filter; the first for all filters of a layer that is not in it.
            photos: an integer per photo, equal for crops of one.
            roles: the layer of each role; the nulls have the cells and discs of the first.
            seed: of nulls and bootstrap.
            rounds: of the bootstrap.
        """
        in_theory = {role: math.sqrt(math.prod(fields[name].size_px)) / 2 for role, name in roles.items()}
        like_parts = dict.fromkeys(roles, self.regions.median_radius_px)
        draws = _Draws(photos, seed, rounds)
        first = {name: torch.zeros(self._filters[name], dtype=torch.long) for name in roles.values()}
        of_filters = {role: (first | dict(assigned))[name] for role, name in roles.items()}
        readings = {
            reading: self._reading(fields, of_filters, roles, radius_px, draws)
            for reading, radius_px in zip(REGION_READINGS, (in_theory, like_parts, None), strict=True)
        }
        present = dict(zip(self.regions.names, self._present.sum(0).tolist(), strict=True))
        return PartInterpretability(regions=self.regions.kind, photos=present, readings=readings)

    def _reading(
        self,
        fields: Mapping[str, ReceptiveField],
        assigned: Mapping[str, Tensor],
        roles: Mapping[str, str],
        radius_px: Mapping[str, float] | None,
        draws: _Draws,
    ) -> RegionScores:
        """Score one way of laying cells into the photo: as discs, or as rectangles where there are no radii."""
        main, own = next(iter(roles.items()))
        radii = radius_px or dict.fromkeys(roles)
        covers = {
            role: self._cover(_centres(fields[name], self._side(name)), fields[name], radii[role])
            for role, name in roles.items()
        }
        centre = torch.tensor([[self.regions.size_px[1] / 2, self.regions.size_px[0] / 2]])
        middle = self._cover(centre, fields[own], radii[main])

        def layers(*, shuffled: bool) -> dict[str, Estimate]:
            return {
                role: self._score(name, covers[role], assigned[role], draws, shuffled=shuffled)
                for role, name in roles.items()
            }

        def anywhere(photos: int) -> tuple[int, CellsOn]:
            cells = math.prod(self._side(own))
            return NULL_FILTERS, random_cells(photos, cells, NULL_FILTERS, draws.generator(), self._share)

        return RegionScores(
            radius_px=None if radius_px is None else {role: round(r, 1) for role, r in radius_px.items()},
            layers=layers(shuffled=False),
            other_photo=layers(shuffled=True),
            random=self._score(own, covers[main], assigned[main], draws, null=anywhere),
            centre=self._score(own, middle, assigned[main], draws, null=lambda _: (1, same_cell)),
        )

    def _side(self, layer: str) -> tuple[int, int]:
        return next(cells.side_cells for cells in self._cells[layer] if cells is not None)

    def _cover(self, centres: Tensor, receptive: ReceptiveField, radius: float | None) -> Bool[Tensor, "cell point"]:
        points = self.regions.points_px
        if radius is None:
            return cell_cover(centres, points, (float(receptive.stride_px[0]), float(receptive.stride_px[1])))
        return round_cover(centres, points, radius)

    def _score(
        self,
        layer: str,
        cover: Tensor,
        assigned: Tensor,
        draws: _Draws,
        *,
        shuffled: bool = False,
        null: Callable[[int], tuple[int, CellsOn]] | None = None,
    ) -> Estimate:
        """Score each category's filters on its photos, or as many times what ``null`` gives for so many photos."""
        found, weights = [], []
        for number, rows in enumerate(self._rows):
            chosen, cells = (assigned == number).nonzero()[:, 0], self._cells[layer][number]
            if cells is None or not len(chosen):
                continue
            weights.append(len(chosen))
            generator = draws.generator()
            order = _strangers(draws.photos[rows], generator) if shuffled else None
            filters, valid = null(len(rows)) if null else (self._filters[layer], cells.on)
            met = meets_parts(valid, filters, [self.regions.parts[i] for i in rows], cover, photos=order)
            found.append(
                part_interpretability(
                    met if null else met[:, chosen],
                    self._present[rows],
                    photos=draws.photos[rows],
                    generator=generator,
                    rounds=draws.rounds,
                )
            )
        return mean_of(found, weights)


@dataclass(frozen=True)
class _Draws:
    """What bootstraps draw: photos (an integer per row, equal for crops of one), so many rounds, from a seed."""

    photos: Int[Tensor, " photo"]
    seed: int
    rounds: int

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _centres(receptive: ReceptiveField, side: tuple[int, int]) -> Float[Tensor, "cell 2"]:
    """Return x, y of every cell's centre in the input, row by row."""
    cells = torch.cartesian_prod(*(torch.arange(count) for count in side))
    return torch.from_numpy(cell_centre_px(receptive, cells))


def _strangers(photos: Int[Tensor, " row"], generator: torch.Generator) -> list[int]:
    """Return, for each row, a row of another photo (its own where there is no other), each row once."""
    _, numbers, crops = photos.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(crops), generator=generator)[numbers].argsort(stable=True)  # crops of one are neighbours
    most = int(crops.max())
    found = torch.empty_like(order)
    found[order] = order.roll(-most)
    return [int(row) for row in found]
