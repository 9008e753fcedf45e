"""Candidates for the parts of a category: non-negative factors of a later layer, and the choice among them.

1. *Candidates.* The layer's features, cell by cell, are factorised into few non-negative parts (Lee & Seung 2001), for
   several numbers of parts and random shares of the photos. The centroid of a part's codes, squared, is its place in a
   view of a photo.
2. *Choice.* A part must move with the photo. A candidate's cost is the mean squared distance between its place in a
   crop or mirror and where the window takes its place in the photo, over the variance of that place: 0 follows every
   crop, and a place that never moves is as bad as a random one, unlike under the plain distance. The cheapest
   candidates are taken, one by one, each with a penalty for moving like those already taken.

Factorising a layer's cells into object parts follows Collins, Achanta & Süsstrunk, ECCV 2018; choosing the factors by
their equivariance is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import ImageError, expected
from partlens.explainer.teachers import place_correlations, places_in_photo, places_in_view
from partlens.explainer.templates import centroid_cells
from partlens.run import Precision

_ROUNDS = 3
_SHARE_OF_PHOTOS = 0.7
_MOST_CELLS = 11_000  # of which each time uses its share of the photos
_PHOTOS_AT_ONCE = 1000
"""Photos whose later maps are in memory together; as many, at most, give the cells that candidates are found in."""
_FIT_STEPS = 40
_CODE_STEPS = 25
_CODE_CELLS = 16_384
_LITTLE = 1e-8
_STILL = 1e-6  # a thousandth of the side, squared

Source = Callable[[int], Tensor]
"""Returns where candidates are in a view of a category's photos, (photo, part, 2) as shares of its sides."""


@dataclass(frozen=True)
class _ChosenParts:
    """Parts that were chosen: the mean place over views (row, col) of each in each photo, as shares of its sides.

    ``chosen`` are their numbers among the candidates; ``movement``, lower is better, is the mean squared error of
    moving with crops and mirrors over the variance of the place.
    """

    places: Float[Tensor, "photo part 2"]
    chosen: tuple[int, ...]
    movement: Float[Tensor, " part"]


def _factorised(
    cells: Float[Tensor, "cell filter"],
    used: Bool[Tensor, "times cell"],
    sizes: Sequence[int],
    generator: torch.Generator,
    precision: Precision = "float32",
) -> list[Float[Tensor, "part filter"]]:
    """Factorise cells several times, each into a number of non-negative directions (Lee & Seung 2001).

    All times go through the same multiplicative steps together, so that the cells are read once for all of them; of
    each, only the cells that it uses have codes. In bfloat16 the products with the cells are rounded, the rest is not.
    """
    read = cells.bfloat16() if precision == "bfloat16" else cells
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    together = (of[:, None] == of).to(cells)  # parts of two times do not compete
    scale = float(cells.mean()) + _LITTLE
    codes = torch.rand(len(cells), len(of), generator=generator).to(cells) * scale * used.t()[:, of].to(cells)
    parts = torch.rand(len(of), cells.shape[1], generator=generator).to(cells) * scale + _LITTLE
    for _ in range(_FIT_STEPS):  # only candidates are wanted, so the number of steps is fixed
        codes = codes * (read @ parts.t().to(read)) / (codes @ (parts @ parts.t() * together) + _LITTLE)
        parts = parts * (codes.t().to(read) @ read) / ((codes.t() @ codes * together) @ parts + _LITTLE)
    return list(F.normalize(parts, dim=1).split(list(sizes)))


def part_codes(
    maps: Float[Tensor, "image filter row col"], *dictionaries: Float[Tensor, "_ filter"]
) -> Float[Tensor, "image part row col"]:
    """Return how much of each part every cell holds, all parts of a dictionary competing for it."""
    images, _, rows, cols = maps.shape
    parts = torch.cat(dictionaries)
    gram = torch.block_diag(*(each @ each.t() for each in dictionaries))
    found = []
    for cells in maps.permute(0, 2, 3, 1).flatten(0, 2).split(_CODE_CELLS):
        target = cells @ parts.t()
        codes = torch.full_like(target, float(cells.mean()) + _LITTLE)
        for _ in range(_CODE_STEPS):
            codes = codes * target / (codes @ gram + _LITTLE)
        found.append(codes)
    return torch.cat(found).reshape(images, rows, cols, -1).permute(0, 3, 1, 2)


def centroids(codes: Float[Tensor, "image part row col"], power: float = 2.0) -> Float[Tensor, "image part 2"]:
    """Return the centroid (row, col) of codes to a power as shares of the map's sides; its middle for an empty map."""
    shares = (centroid_cells(codes, power) + 0.5) / torch.tensor(codes.shape[2:], device=codes.device)
    return torch.where(codes.amax((2, 3))[..., None] > 0, shares, 0.5)


class LaterParts:
    """Non-negative parts of a later layer: candidates for parts.

    ``view`` returns the later layer's maps (at least 0) of some photos in a view; view 0 is the whole photo. Each of
    ``sizes`` is a number of parts that share the cells. ``precision`` is that of the steps which find them.
    """

    def __init__(
        self,
        view: Callable[[Int[Tensor, " photo"], int], Float[Tensor, "photo filter row col"]],
        photos: int,
        generator: torch.Generator,
        sizes: Sequence[int],
        precision: Precision = "float32",
    ) -> None:
        self.view = view
        self.everyone = torch.arange(photos)
        few = photos <= _PHOTOS_AT_ONCE
        sample = self.everyone if few else torch.randperm(photos, generator=generator)[:_PHOTOS_AT_ONCE].sort().values
        whole = view(sample, 0).clamp(min=0)
        if not bool(whole.any()):
            raise ImageError(
                expected("a later layer that activates on the photos", "zeros only", "Check the performer")
            )
        times = [size for size in sizes for _ in range(_ROUNDS)]
        chosen = torch.rand(len(times), len(sample), generator=generator) < _SHARE_OF_PHOTOS
        chosen |= chosen.sum(1, keepdim=True) < 2  # too few: all of them
        cells = whole.permute(0, 2, 3, 1).flatten(0, 2)
        some = torch.randperm(len(cells), generator=generator)[:_MOST_CELLS]
        used = chosen[:, some // (len(cells) // len(sample))]
        self.dictionaries = _factorised(cells[some], used, times, generator, precision)

    def __call__(self, number: int) -> Float[Tensor, "photo part 2"]:
        """Return the places of all candidates in a view, as shares of its sides."""
        found = []
        for some in self.everyone.split(_PHOTOS_AT_ONCE):
            # Cells lie side by side in memory, so that no dictionary copies them.
            maps = self.view(some, number).clamp(min=0).contiguous(memory_format=torch.channels_last)
            found.append(centroids(part_codes(maps, *self.dictionaries)))
        return torch.cat(found)


def followed(
    source: Source, windows: Float[Tensor, "photo view 5"]
) -> tuple[Float[Tensor, "photo part 2"], Float[Tensor, "photo part 2"], Float[Tensor, " part"]]:
    """Return where candidates are in the whole photos and in the mean of all views, and how they move with the views.

    ``source`` says where candidates are in a view, ``windows`` how each view was cut, view 0 being the whole photo.
    """
    photos, views, _ = windows.shape
    if photos < 4:
        raise ImageError(expected("at least 4 photos to find parts in", int(photos), "Add photos"))
    first = source(0)
    sums, error = first.clone(), torch.zeros(first.shape[1])
    for number in range(1, views):
        seen = source(number)
        wanted = places_in_view(first, windows[:, number])
        inside = ((wanted > 0) & (wanted < 1)).all(-1).to(seen.dtype)
        missed = (seen - wanted).square().sum(-1)
        error += (missed * inside).sum(0) / inside.sum(0).clamp(min=1) / (views - 1)
        sums += places_in_photo(seen, windows[:, number])
    # A place that never moves misses nothing and has no variance: 1, no better than one that moves at random.
    movement = (error + _STILL) / (first.var(0).sum(-1) + _STILL)
    return first, sums / views, movement


def chosen_parts(source: Source, windows: Float[Tensor, "photo view 5"], count: int, variety: float) -> _ChosenParts:
    """Choose ``count`` parts that move with the photo, best first, or all where there are fewer candidates.

    A part pays ``variety`` for the mean correlation of its place with the places already chosen; for the rest see
    :func:`followed`.
    """
    _, places, movement = followed(source, windows)
    alike = place_correlations(places)
    taken: list[int] = []
    for _ in range(min(count, len(movement))):
        cost = movement + (variety * alike[:, taken].mean(1) if taken else 0.0)
        cost[taken] = torch.inf
        taken.append(int(cost.argmin()))
    return _ChosenParts(places[:, taken], tuple(taken), movement[taken])
