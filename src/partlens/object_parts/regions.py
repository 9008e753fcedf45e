"""What windows of the image carry of the performer's own score: cells of the tap outside them are set to nothing.

The performer's own upper layers go on from there, so nothing is learned and the answer is the performer's. With the
score ``S`` of the class that the network decides for,

    kept(W) = (S(cells of W alone) - S(no cell)) / (S(all cells) - S(no cell))

is the *kept score* of windows ``W``, and a *decision is kept* where that class is still the largest output. Windows of
an area ``a`` around places are the ``a · cells`` cells that are nearest to any of the places, so that all kinds of
windows have exactly the same area: those at the parts, the same windows laid on another photo, windows at random
places and one in the centre. The *rest* is everything outside the windows at the parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.network.performer import Performer
from partlens.network.taps import as_float, in_precision
from partlens.object_parts.shapley import Shapley, exact_shapley, sampled_shapley

AREAS = (0.1, 0.2, 0.3, 0.4)
MOST_EXACT_PLAYERS = 10
CENTRE = (0.5, 0.5)

_CHUNK = 64  # masked maps that go through the upper layers together
_LITTLE = 1e-6
_MOST_WINDOWS = 4
_OUTWARDS = 1.2  # standard deviations: a diagonal place of an even ellipse is 0.85 of the way to its edge

Upper = Callable[[Tensor], Tensor]
"""The performer's layers above the tap: maps to scores (image, output)."""


def upper_of(performer: Performer, tap: str) -> Upper:
    """Return the performer's own layers above the tap, from maps to scores of its decisions, float32 on the CPU.

    They compute in the performer's precision.
    """
    module, outputs = performer.upper(tap), performer.outputs
    weight = next(module.parameters(), None)  # a mean over the cells has none

    def upper(maps: Tensor) -> Tensor:
        given, computing = in_precision(performer.precision, maps if weight is None else maps.to(weight))
        with computing:
            answer = as_float(module(given)[0])
        return outputs.decisions(outputs.scores(answer, len(maps))).cpu()

    return upper


@dataclass(frozen=True)
class TapMaps:
    """The tap's maps of some photos, what stands for nothing there, and the layers above."""

    upper: Upper  # from maps to the performer's scores
    # at the tap; rows below those of ``nothing`` hold tokens without a place, which stay as they are
    maps: Float[Tensor, "photo filter read_row col"]
    nothing: Float[Tensor, "filter row col"]  # what a cell is set to: zero after a ReLU; else the mean map of photos

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.nothing.shape[1], self.nothing.shape[2]

    def take(self, photos: Int[Tensor, " chosen"] | slice) -> TapMaps:
        """Return the maps of some of the photos."""
        return TapMaps(self.upper, self.maps[photos], self.nothing)


@dataclass(frozen=True)
class Kept:
    """What is kept where only some cells remain."""

    score: Float[Tensor, "photo variant"]  # kept score, NaN where no cell at all scores as much as the whole photo
    decision: Bool[Tensor, "photo variant"] | Float[Tensor, "photo variant"]


# --- windows ----------------------------------------------------------------------------------------------------------


def cells_of(grid: tuple[int, int], area: float) -> int:
    """Return how many cells an area has, at least one."""
    return max(1, round(area * grid[0] * grid[1]))


def distances(places: Float[Tensor, "*set place 2"], grid: tuple[int, int]) -> Float[Tensor, "*set place row col"]:
    """Return how far the middle of each cell is from each place, in shares of the sides."""
    rows, cols = ((torch.arange(side, device=places.device) + 0.5) / side for side in grid)
    by_row = (rows - places[..., 0, None]).square()
    by_col = (cols - places[..., 1, None]).square()
    return (by_row[..., :, None] + by_col[..., None, :]).sqrt()


def nearest_cells(distance: Float[Tensor, "*set row col"], count: int) -> Bool[Tensor, "*set row col"]:
    """Return the ``count`` cells of the smallest distances.

    Example:
        >>> nearest_cells(torch.tensor([[0.3, 0.1], [0.2, 0.4]]), 2).int().tolist()
        [[0, 1], [1, 0]]
    """
    flat = distance.flatten(-2)
    chosen = flat.argsort(dim=-1, stable=True)[..., :count]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, chosen, value=True).view(distance.shape)


def windows_at(
    places: Float[Tensor, "*set place 2"], grid: tuple[int, int], area: float
) -> Bool[Tensor, "*set row col"]:
    """Return windows of an area around places: the cells nearest to any of them."""
    return nearest_cells(distances(places, grid).amin(-3), cells_of(grid, area))


def _windows_elsewhere(
    taken: Bool[Tensor, "*set row col"], places: Float[Tensor, "*set place 2"], area: float
) -> Bool[Tensor, "*set row col"]:
    """Return windows of an area around places that avoid the cells that are taken, as far as there are others."""
    grid = (taken.shape[-2], taken.shape[-1])
    far = distances(places, grid).amin(-3)
    return nearest_cells(far + 10.0 * taken, cells_of(grid, area))


def part_cells(
    places: Float[Tensor, "photo part 2"], grid: tuple[int, int], area: float
) -> Bool[Tensor, "photo player row col"]:
    """Give the cells of the windows of an area to the nearest part each, all others to elsewhere, which is last."""
    far = distances(places, grid)
    inside = nearest_cells(far.amin(1), cells_of(grid, area))
    owner = far.argmin(1)
    own = [(owner == part) & inside for part in range(places.shape[1])]
    return torch.stack([*own, ~inside], 1)


# --- what is kept -----------------------------------------------------------------------------------------------------


def _scores(taps: TapMaps, keep: Bool[Tensor, "photo variant row col"]) -> Float[Tensor, "photo variant output"]:
    """Return the scores of every photo where only the cells of each variant remain."""
    photos, variants = keep.shape[:2]
    found: list[Tensor] = []
    photo = torch.arange(photos).repeat_interleave(variants)
    with torch.no_grad():
        for rows in torch.arange(photos * variants).split(_CHUNK):
            mask = keep.flatten(0, 1)[rows][:, None]
            maps = taps.maps[photo[rows]]
            filled = torch.where(mask, maps[:, :, : taps.grid[0]], taps.nothing)
            found.append(taps.upper(torch.cat([filled, maps[:, :, taps.grid[0] :]], 2)))
    return torch.cat(found).view(photos, variants, -1)


@dataclass(frozen=True)
class Whole:
    """What the performer says of whole photos and of nothing, at the tap."""

    classes: Int[Tensor, " photo"]
    score: Float[Tensor, " photo"]
    nothing: Float[Tensor, " photo"]

    @property
    def range(self) -> Float[Tensor, " photo"]:
        """What there is to keep; NaN where nothing scores as much."""
        reach = self.score - self.nothing
        return torch.where(reach > _LITTLE * (1 + self.score.abs()), reach, torch.nan)

    def take(self, photos: slice) -> Whole:
        """Return what is said of some of the photos."""
        return Whole(self.classes[photos], self.score[photos], self.nothing[photos])


def whole_photos(taps: TapMaps) -> Whole:
    """Run the whole maps and the empty one."""
    keep = torch.ones(len(taps.maps), 1, *taps.grid, dtype=torch.bool)
    scores = _scores(taps, keep)[:, 0]
    # Without tokens beside the grid, nothing is the same in all photos.
    alike = taps.maps.shape[2] == taps.grid[0]
    empty = _scores(taps.take(slice(0, 1)) if alike else taps, ~keep[: 1 if alike else None])[:, 0]
    classes = scores.argmax(1, keepdim=True)
    score, nothing = (each.expand(len(scores), -1).gather(1, classes)[:, 0].double() for each in (scores, empty))
    return Whole(classes[:, 0], score, nothing)


def kept(taps: TapMaps, whole: Whole, keep: Bool[Tensor, "photo variant row col"]) -> Kept:
    """Measure what the cells of each variant keep of each photo's score and decision."""
    scores = _scores(taps, keep)
    of_class = scores.gather(2, whole.classes[:, None, None].expand(-1, scores.shape[1], 1))[..., 0].double()
    share = (of_class - whole.nothing[:, None]) / whole.range[:, None]
    return Kept(share, scores.argmax(2) == whole.classes[:, None])


NULLS = ("other_photos", "random", "centre")
"""Windows for comparison that know nothing of the parts in a photo."""
OBJECT_KINDS = ("object", "off_object")
"""A window at one place of the object, and windows beside it, where masks say where it is."""


def kept_by_kind(
    taps: TapMaps,
    whole: Whole,
    places: Float[Tensor, "photo part 2"],
    generator: torch.Generator,
    *,
    counts: Sequence[int] | None = None,
    draws: int = 1,
    annotated: Float[Tensor, "photo landmark 2"] | None = None,
    objects: Float[Tensor, "photo row col"] | None = None,
) -> dict[str, Kept]:
    """Measure windows at the parts and, at the same area, those of every kind for comparison.

    Variants are the `AREAS`; where windows were drawn several times, decisions are the share of them that keep it.

    Args:
        taps: maps of the photos.
        whole: what the performer says of them.
        places: of the parts, as shares of the sides, those that carry most first.
        generator: source of random places.
        counts: how many of the parts get windows at each of the areas; by default all.
        draws: of other photos and of random places, averaged.
        annotated: places of annotated parts, NaN where they are unknown; optional.
        objects: how much of each cell is the object, NaN for photos where it is not known; optional. Windows of the
            kinds ``object`` and ``off_object`` stand at the one of nine places on it that keeps most, and at random
            places beside it.
    """
    kinds = _kinds(places, generator, draws, annotated)
    unknown = _unknown(annotated, objects)
    means: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for area, count in zip(AREAS, counts or [places.shape[1]] * len(AREAS), strict=True):
        masks = _masks(kinds, taps.grid, area, count, objects)
        found = kept(taps, whole, torch.stack(list(itertools.chain.from_iterable(masks.values())), 1))
        several = [len(each) for each in masks.values()]
        parted = (found.score.split(several, 1), found.decision.double().split(several, 1))
        for kind, scores, right in zip(masks, *parted, strict=True):
            at: slice | list[int] = slice(None)
            if kind == "object":  # of the places on the object, the one that keeps most: as a part would be chosen
                at = [int(scores[~unknown[kind]].nanmedian(0).values.nan_to_num(-torch.inf).argmax())]
            score = scores[:, at].mean(1)
            if kind in unknown:
                score[unknown[kind]] = torch.nan
            means.setdefault(kind, []).append((score, right[:, at].mean(1)))
    return {kind: Kept(*(torch.stack(each, 1) for each in zip(*areas, strict=True))) for kind, areas in means.items()}


def _masks(
    kinds: Mapping[str, Sequence[Tensor]], grid: tuple[int, int], area: float, count: int, objects: Tensor | None
) -> dict[str, list[Bool[Tensor, "photo row col"]]]:
    """Return the windows of each kind at an area, those at parts at so many of them."""
    masks = {
        kind: [windows_at(each if kind == "annotated" else each[:, :count], grid, area) for each in sets]
        for kind, sets in kinds.items()
    }
    masks["rest"] = [~masks["parts"][0]]
    if objects is not None:
        masks["object"] = [windows_at(each, grid, area) for each in _places_on(objects)]
        masks["off_object"] = [_windows_elsewhere(objects > 0, each[:, :count], area) for each in kinds["random"]]
    return masks


def _places_on(objects: Float[Tensor, "photo row col"]) -> list[Float[Tensor, "photo 1 2"]]:
    """Return nine places on the object: its middle, and so far from it along each axis that an ellipse holds them."""
    held = objects.nan_to_num(1.0)
    middle, spread = [], []
    for axis, side in ((2, objects.shape[1]), (1, objects.shape[2])):
        share = held.sum(axis) / held.sum((1, 2))[:, None].clamp(min=_LITTLE)
        at = (torch.arange(side) + 0.5) / side
        mean = (share * at).sum(1, keepdim=True)
        middle.append(mean[:, 0])
        spread.append((share * (at - mean).square()).sum(1).sqrt())
    centre, away = torch.stack(middle, -1), _OUTWARDS * torch.stack(spread, -1)
    steps = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2))
    return [(centre + step * away)[:, None] for step in steps]


def _unknown(annotated: Tensor | None, objects: Tensor | None) -> dict[str, Bool[Tensor, " photo"]]:
    """Tell, by kind of windows, the photos that say nothing of it: no landmark, or no mask."""
    found = {} if objects is None else dict.fromkeys(OBJECT_KINDS, objects.isnan().flatten(1).any(1))
    return found if annotated is None else found | {"annotated": annotated.isnan().any(-1).all(1)}


def _kinds(
    places: Tensor, generator: torch.Generator, draws: int, annotated: Tensor | None
) -> dict[str, list[Float[Tensor, "photo place 2"]]]:
    photos, parts, _ = places.shape
    kinds = {"parts": [places]}
    # Another photo, never the photo itself: the photos in a drawn order, turned by some steps.
    order = torch.randperm(photos, generator=generator)
    steps = [1 + number % max(1, photos - 1) for number in range(draws)]
    kinds["other_photos"] = [places[order.roll(step)[order.argsort()]] for step in steps]
    kinds["random"] = [torch.rand(photos, parts, 2, generator=generator) for _ in range(draws)]
    kinds["centre"] = [torch.tensor([[CENTRE]]).expand(photos, 1, 2)]
    if annotated is not None:
        # A landmark that a photo lacks is far away, so that no cell is near to it.
        kinds["annotated"] = [annotated.nan_to_num(99.0)]
    return kinds


def carrying_order(
    taps: TapMaps, whole: Whole, places: Float[Tensor, "photo part 2"]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the parts in the order of what they carry, and how many of them are worth a window at each area.

    To be asked of other photos than those that are measured. The order is that of the median kept score of a window of
    the smallest area at each part alone; the number, up to four, is that of the largest median kept score. A part that
    stands, on average, less than half a cell from one found before it has the same window, and is left out.
    """
    alone = torch.stack([windows_at(places[:, [part]], taps.grid, AREAS[0]) for part in range(places.shape[1])], 1)
    order = kept(taps, whole, alone).score.nanmedian(0).values.argsort(descending=True, stable=True)
    apart = (places[:, :, None] - places[:, None]).norm(dim=-1).mean(0)
    order = order[~(apart < 0.5 / max(taps.grid)).tril(-1).any(1)[order]]
    counts = range(1, min(_MOST_WINDOWS, len(order)) + 1)
    masks = [windows_at(places[:, order[:count]], taps.grid, area) for area in AREAS for count in counts]
    found = kept(taps, whole, torch.stack(masks, 1)).score.nanmedian(0).values.view(len(AREAS), len(counts))
    return tuple(order.tolist()), tuple((found.argmax(1) + 1).tolist())


def grid_places(side: int) -> Float[Tensor, "window 2"]:
    """Return the middles of ``side`` x ``side`` windows spread evenly over the image."""
    steps = (torch.arange(side) + 0.5) / side
    return torch.cartesian_prod(steps, steps)


def kept_at(taps: TapMaps, whole: Whole, places: Float[Tensor, "window 2"]) -> Float[Tensor, "photo area window"]:
    """Measure single windows at the same places of all photos."""
    masks = torch.stack([windows_at(places[:, None], taps.grid, area) for area in AREAS])
    keep = masks.flatten(0, 1).expand(len(taps.maps), -1, *taps.grid)
    return kept(taps, whole, keep).score.view(len(taps.maps), *masks.shape[:2])


# --- shares -----------------------------------------------------------------------------------------------------------


def shapley_shares(
    taps: TapMaps,
    whole: Whole,
    cells: Bool[Tensor, "photo player row col"],
    *,
    pairs: int = 32,
    generator: torch.Generator,
) -> Shapley:
    """Share what there is to keep of each photo among players that own the cells (:func:`part_cells`), elsewhere last.

    Exact up to ten players; beyond from random orders (:func:`partlens.object_parts.shapley.sampled_shapley`). Of
    photos on which nothing scores as much as the whole, NaN.
    """

    def values(coalitions: Tensor) -> Tensor:
        # Nobody keeps nothing, everybody keeps all; where that is the same, nothing is defined.
        everybody = coalitions.all(1)
        found = (whole.range * 0)[:, None] + everybody.double()
        some = coalitions.any(1) & ~everybody
        keep = torch.einsum("cp,iprs->icrs", coalitions[some].float(), cells.float()) > 0
        found[:, some] = kept(taps, whole, keep).score
        return found

    players = cells.shape[1]
    if players <= MOST_EXACT_PLAYERS:
        return exact_shapley(values, players)
    return sampled_shapley(values, players, pairs=pairs, generator=generator)
