"""Whether a filter's region meets an object part: the part interpretability of CVPR 2018.

Location instability needs a point for each part; this measure needs its region. A filter's valid cells are the highest
of all its cells on all photos; laid into the image they are the filter's region there, and the filter meets a part on a
photo where the two overlap enough.

Source: Zhang, Wu & Zhu, CVPR 2018, Sec. 5.3, Tables 1 and 2, after Bau et al., CVPR 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.estimate import Estimate, bootstrap

VALID_SHARE = 0.005
"""Share of a filter's cells on all photos that are valid: ``p(x > T) = 0.005``."""
_OVERLAP = 0.2  # intersection over union above which a region meets a part
FEWEST_PHOTOS = 10
"""Photos that a part has to be on: a filter takes its best part, and among few photos chance makes one."""


CellsOn = Callable[[int], tuple[Tensor, Tensor]]
"""Gives the filter and the cell (row by row) of every valid cell on a photo."""


class ValidCells:
    """The highest cells of every filter over a stream of maps, exactly, in memory that does not grow with the maps.

    Args:
        photos: how many photos the stream will have.
        share: of all cells that are kept, at least one; cells that are not above 0 never are.

    Example:
        >>> cells = ValidCells(photos=2, share=0.25)
        >>> cells.add(torch.tensor([[[[5.0, 0.0], [0.0, 0.0]]], [[[0.0, 4.0], [1.0, 0.0]]]]))
        >>> cells.on(0), cells.on(1)
        ((tensor([0]), tensor([0])), (tensor([0]), tensor([1])))
    """

    def __init__(self, photos: int, share: float = VALID_SHARE) -> None:
        if photos < 1 or not 0 < share <= 1:
            got = f"{photos} and {share}"
            raise InputError(expected("at least 1 photo and a share above 0 and at most 1", got, "Correct them"))
        self.photos, self.share = photos, share
        self.side_cells = (0, 0)
        self._seen = 0
        self._values = torch.empty(0, 0)
        self._places = torch.empty(0, 0, dtype=torch.int64)
        self._on: CellsOn | None = None

    def add(self, maps: Float[Tensor, "image filter row col"]) -> None:
        """Take the maps of the next photos.

        Raises:
            InputError: more photos than were announced, or maps of another size.
        """
        images, filters, rows, cols = maps.shape
        if self._seen + images > self.photos:
            got = self._seen + images
            raise InputError(expected(f"the maps of {self.photos} photos", got, "Announce as many photos as come"))
        if self._seen and (rows, cols) != self.side_cells:
            raise InputError(expected(f"maps of {self.side_cells} cells", (rows, cols), "Give maps of one layer"))
        self.side_cells = (rows, cols)
        keep = max(1, math.floor(self.share * self.photos * rows * cols))
        flat = maps.permute(1, 0, 2, 3).reshape(filters, -1)
        places = torch.arange(flat.shape[1], device=flat.device) + self._seen * rows * cols
        if self._seen:
            flat = torch.cat([self._values, flat], 1)
            places = torch.cat([self._places, places.expand(filters, -1)], 1)
        else:
            places = places.expand(filters, -1)
        self._values, chosen = flat.topk(min(keep, flat.shape[1]), dim=1)
        self._places = places.gather(1, chosen)
        self._seen += images
        self._on = None

    def on(self, photo: int) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]:
        """Return the filter and the cell (row by row) of every valid cell on a photo.

        Raises:
            InputError: not all photos were added yet, so that nothing is known to be among the highest.
        """
        if self._seen != self.photos:
            got = f"{self._seen} so far"
            raise InputError(expected(f"the maps of all {self.photos} photos", got, "Add the other photos first"))
        if self._on is None:
            live = (self._values > 0).flatten().cpu()
            of = torch.arange(len(self._values)).repeat_interleave(self._values.shape[1])[live]
            self._on = _by_photo(of, self._places.flatten().cpu()[live], self.photos, math.prod(self.side_cells))
        return self._on(photo)


def _by_photo(of: Int[Tensor, " entry"], places: Int[Tensor, " entry"], photos: int, cells: int) -> CellsOn:
    """Return a look-up of filters and cells by photo; ``places`` count the cells of all photos in a row."""
    order = places.argsort(stable=True)
    of, places = of[order], places[order]
    starts = torch.arange(photos + 1) * cells

    def on(photo: int) -> tuple[Tensor, Tensor]:
        first, last = torch.searchsorted(places, starts[photo : photo + 2]).tolist()
        return of[first:last], places[first:last] - starts[photo]

    return on


def random_cells(
    photos: int, cells: int, filters: int, generator: torch.Generator, share: float = VALID_SHARE
) -> CellsOn:
    """Return valid cells of filters that know nothing: as many, anywhere."""
    keep = max(1, math.floor(share * photos * cells))
    drawn = torch.randint(photos * cells, (filters, keep), generator=generator)
    of = torch.arange(filters)[:, None].expand(-1, keep)
    of, places = torch.stack([of.flatten(), drawn.flatten()]).unique(dim=1)
    return _by_photo(of, places, photos, cells)


def same_cell(photo: int) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]:  # noqa: ARG001 - the same everywhere
    """Return filter 0 and cell 0: a single filter whose only cell is valid on every photo."""
    return torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)


def round_cover(
    cells_px: Float[Tensor, "cell 2"], points_px: Float[Tensor, "point 2"], radius_px: float
) -> Bool[Tensor, "cell point"]:
    """Return which points of the input lie in the disc around each cell's centre (both x, y)."""
    return torch.cdist(cells_px.double(), points_px.double()) <= radius_px


def cell_cover(
    cells_px: Float[Tensor, "cell 2"], points_px: Float[Tensor, "point 2"], stride_px: tuple[float, float]
) -> Bool[Tensor, "cell point"]:
    """Return which points lie in each cell's own rectangle, ``stride_px`` (rows, cols) large: the map, scaled up."""
    away = (cells_px[:, None].double() - points_px.double()).abs()
    return (away[..., 0] <= stride_px[1] / 2) & (away[..., 1] <= stride_px[0] / 2)


def meets_parts(
    valid: CellsOn,
    filters: int,
    parts: Sequence[Bool[Tensor, "part point"]],
    cover: Bool[Tensor, "cell point"],
    *,
    photos: Sequence[int] | None = None,
) -> Bool[Tensor, "photo filter part"]:
    """Return where a filter's region overlaps a part by more than 0.2 (intersection over union).

    ``photos`` says whose cells are laid on ``parts[i]``, by default each photo's own. Cells of other photos are a null:
    the same regions, which know nothing of the photo.
    """
    order = range(len(parts)) if photos is None else photos
    met = torch.zeros(len(parts), filters, parts[0].shape[0] if len(parts) else 0, dtype=torch.bool)
    covers = cover.float()
    for row, (photo, truth) in enumerate(zip(order, parts, strict=True)):
        of, cells = valid(photo)
        if not len(of):
            continue
        active, number = of.unique(return_inverse=True)
        regions = (torch.zeros(len(active), cover.shape[1]).index_add_(0, number, covers[cells]) > 0).float()
        shared = regions @ truth.float().t()
        union = regions.sum(1, keepdim=True) + truth.sum(1).float() - shared
        met[row, active] = shared > _OVERLAP * union
    return met


def _interpretability_per_filter(
    met: Bool[Tensor, "photo filter part"], present: Bool[Tensor, "photo part"]
) -> Float[Tensor, " filter"]:
    """Return ``P_f = max_k P_{f,k}``, ``P_{f,k}`` the share of photos with part ``k`` on which filter ``f`` meets it.

    NaN where no part is on a photo.
    """
    known = present.any(0)
    if not bool(known.any()):
        return torch.full((met.shape[1],), math.nan, dtype=torch.float64)
    counts = present.sum(0)[known].double()
    shares: Tensor = (met & present[:, None])[..., known].sum(0).double() / counts
    return shares.amax(1)


def part_interpretability(
    met: Bool[Tensor, "photo filter part"],
    present: Bool[Tensor, "photo part"],
    *,
    photos: Int[Tensor, " photo"],
    generator: torch.Generator,
    rounds: int = 100,
) -> Estimate:
    """Return the mean over filters of :func:`_interpretability_per_filter` with a bootstrap over photos."""
    enough = torch.tensor([len(photos[has].unique()) >= FEWEST_PHOTOS for has in present.t()], dtype=torch.bool)
    if not bool(enough.any()) or not met.shape[1]:
        return Estimate.undefined()
    used, shown = present[:, enough], met[..., enough]

    def mean(index: Tensor) -> float:
        return float(_interpretability_per_filter(shown[index], used[index]).mean())

    found = bootstrap(mean, len(photos), generator=generator, rounds=rounds, groups=photos)
    return Estimate(found.value, found.interval, len(photos[used.any(1)].unique()))
