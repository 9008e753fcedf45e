"""Parts of a category, found without training or labels on a later layer of the performer.

1. *Candidates* are non-negative factors of the layer's cells, for 2 to 8 parts at a time and random shares of the
   photos. Each filter is divided by its standard deviation, so that no few strong ones decide. A part's place in a view
   is the centroid of its codes, squared.
2. *Choice.* A candidate's movement is the mean squared error of its place under crops and mirrors over the variance of
   the place. Those of least movement are taken, each with a penalty for moving like those already taken
   (`partlens.object_parts.candidates`).
3. *Number.* What a part adds is the share of its place's variance that the places of the parts before it do not
   foretell, by linear regression. The photos support a part that adds more than half, and more than its movement
   (else a place that never moves would say as much), and that is found again in both halves of the photos: its place
   there must be more like its own than in 95 of 100 shuffles of the photos.
4. *Places.* On a coarse later layer a place is sharpened on a finer one: there a part looks like the mean, over the
   photos, of the unit vectors at its places, and its place is the centroid of the cells that look so (length times
   cosine to the eighth power) near the place on the later layer (a Gaussian of 0.12 of the side). The mean of the photo
   and its mirror is taken. Crops are left out: they cut parts off.

What is found are directions of the later layer, so that the places of the same parts are known on any further photo.
Factors follow Collins, Achanta & Süsstrunk, ECCV 2018; the rest is ours. ``papers/docs/part-discovery.md`` measures
what each step gains on landmarks of birds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from partlens.errors import LayerError, expected
from partlens.explainer.network import Explainer
from partlens.explainer.teachers import PlaceSource, place_correlations, places_in_photo
from partlens.explainer.views import TrainingMaps, epoch_generator, gather
from partlens.network.layers import LayerInfo
from partlens.network.performer import Performer
from partlens.object_parts.candidates import LaterParts, centroids, chosen_parts, part_codes
from partlens.object_parts.inspection import FindingConfig
from partlens.object_parts.reading import View
from partlens.object_parts.regions import distances
from partlens.run import Precision

_SIZES = (2, 3, 4, 5, 6, 7, 8)
_LEAST_CELLS = 3
_PHOTOS_AT_ONCE = 1000
_SCALE_PHOTOS = 256
"""Photos that the standard deviations of filters are measured on, at most."""
_SHUFFLES = 100
_LEVEL = 0.95
_LEAST_HALF = 4
_COARSE_CELLS = 12
_FINER = 1.5
_NEAR = 0.12  # of the side
_LIKENESS_POWER = 8
_NEW = 0.5
"""Least share that a part adds: more than the others foretell."""
_LITTLE = 1e-6


@dataclass(frozen=True)
class PartFinder:
    """Says where the parts of a category are in any photo."""

    scale: Float[Tensor, " filter"]  # standard deviation of each filter of the later layer
    dictionaries: tuple[Tensor, ...]  # directions (part, filter) of the scaled layer that compete for its cells
    chosen: tuple[tuple[int, int], ...]  # for each part, the number of its dictionary and of its direction in it
    looks: Float[Tensor, "part finer"] | None = None  # how each part looks on the finer layer, where there is one

    def codes(self, maps: Float[Tensor, "photo filter row col"]) -> Float[Tensor, "photo part row col"]:
        """Return how much of each part every cell of the later layer holds."""
        scaled = _scaled(maps, self.scale)
        needed = {number: part_codes(scaled, self.dictionaries[number]) for number in {n for n, _ in self.chosen}}
        return torch.stack([needed[number][:, row] for number, row in self.chosen], 1)

    def __call__(
        self, maps: Float[Tensor, "photo filter row col"], finer: Tensor | None = None
    ) -> Float[Tensor, "photo part 2"]:
        """Return the places (row, col) of the parts as shares of the photo's sides.

        They are sharpened on the finer layer's maps where these are given.
        """
        places = centroids(self.codes(maps))
        return places if self.looks is None or finer is None else _sharpened(places, finer.clamp(min=0), self.looks)

    def only(self, parts: Sequence[int]) -> PartFinder:
        """Return the finder of some parts, in their order."""
        picked = [self.chosen[part] for part in parts]
        used = sorted({number for number, _ in picked})
        numbered = tuple((used.index(number), row) for number, row in picked)
        looks = None if self.looks is None else self.looks[list(parts)]
        return PartFinder(self.scale, tuple(self.dictionaries[n] for n in used), numbered, looks)

    def sharpened(self, places: Float[Tensor, "photo part 2"], finer: View) -> PartFinder:
        """Return the finder that also knows how its parts look on the finer layer at their places in whole photos."""
        seen = []
        for some in torch.arange(len(places)).split(_SCALE_PHOTOS):
            at = places[some].flip(-1)[:, :, None] * 2 - 1
            cells = F.normalize(finer(some, 0).clamp(min=0), dim=1)
            seen.append(F.grid_sample(cells, at, padding_mode="border", align_corners=False)[..., 0].sum(0))
        return dataclasses.replace(self, looks=F.normalize(torch.stack(seen).sum(0).t(), dim=1))

    def tensors(self) -> dict[str, Tensor]:
        """Return what `of` reads again."""
        parts = {f"parts.{number}": directions for number, directions in enumerate(self.dictionaries)}
        looks = {} if self.looks is None else {"looks": self.looks}
        return {"scale": self.scale, "chosen": torch.tensor(self.chosen), **parts, **looks}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PartFinder:
        """Return the finder that `tensors` describe."""
        count = sum(name.startswith("parts.") for name in tensors)
        dictionaries = tuple(tensors[f"parts.{number}"] for number in range(count))
        chosen = tuple((int(n), int(row)) for n, row in tensors["chosen"])
        return cls(tensors["scale"], dictionaries, chosen, tensors.get("looks"))


@dataclass(frozen=True)
class FoundParts:
    """All parts that were chosen for a category: first those that the photos support, each group best first."""

    # mean place (row, col) in the photo and its mirror, as shares of the photo's sides
    places: Float[Tensor, "photo part 2"]
    # mean squared error of moving with crops and mirrors over the variance of the place; lower is better
    movement: Float[Tensor, " part"]
    # correlation, over photos, of each place with that of the part nearest to it among those found again in half of the
    # photos, the mean of both halves; 1 is the same part
    stability: Float[Tensor, " part"]
    supported: int  # how many of them the photos support as parts of their own, or the fewest that were asked for
    finder: PartFinder  # says where the parts are in further photos. All of them teach an explainer's filters


def finding_layers(performer: Performer) -> tuple[str, ...]:
    """Return the layers whose maps `find_parts` reads: the last one with maps of at least 3x3 cells.

    Where that one is coarse (fewer than 12 cells a side), the last one with 1.5 times the sides sharpens places.

    Raises:
        LayerError: no layer has such maps.
    """
    maps = [layer for layer in performer.layers if layer.has_maps and "Pool" not in layer.kind]
    fine = _at_least(maps, _LEAST_CELLS, _LEAST_CELLS)
    if not fine:
        rule = f"a layer of {performer.name} with maps of at least {_LEAST_CELLS}x{_LEAST_CELLS} cells"
        raise LayerError(expected(rule, "none", "Use a larger input"))
    rows, cols = fine[-1].shape[1:]
    finer = _at_least(fine, _FINER * rows, _FINER * cols) if min(rows, cols) < _COARSE_CELLS else []
    same = [layer.name for layer in fine if layer.shape == fine[-1].shape]
    later = min(same[-2:], key=lambda name: (name.count("."), len(name)))
    return (later, _last_block(finer)) if finer else (later,)


def _at_least(layers: Sequence[LayerInfo], rows: float, cols: float) -> list[LayerInfo]:
    return [layer for layer in layers if layer.shape[1] >= rows and layer.shape[2] >= cols]


def _last_block(layers: Sequence[LayerInfo]) -> str:
    """Return the last block with maps as large as the last ones: ResNet-50's layer3, not what layer4 begins with."""
    same = [layer.name for layer in layers if layer.shape[1:] == layers[-1].shape[1:]]
    return min(reversed(same), key=lambda name: name.count("."))


def find_parts(
    later: View,
    windows: Float[Tensor, "photo view 5"],
    settings: FindingConfig,
    generator: torch.Generator,
    precision: Precision = "float32",
    finer: View | None = None,
) -> FoundParts:
    """Find the parts of a category's photos.

    Of ``settings.parts_max`` parts as many are counted, at least ``settings.parts_min``, as the photos support: parts
    that add more than they repeat and more than their error, and that are found again in both halves of the photos.

    Args:
        later: gives the later layer's maps.
        windows: how each view was cut (`partlens.explainer.views.view_windows`); view 0 is the whole photo, view 1 its
            mirror.
        settings: how many parts, how different.
        generator: source of the draws.
        precision: of the products by which candidates are found.
        finer: gives the finer layer's maps, where places are sharpened.
    """
    everyone = torch.arange(len(windows))
    scale = _filter_scale(later, len(windows))
    finder, movement = search(later, everyone, windows, scale, settings, generator, precision)
    maps = later(everyone, 0)
    places = finder(maps)
    halves = everyone[torch.randperm(len(everyone), generator=generator)].chunk(2)
    again = [
        search(later, half, windows[half], scale, settings, generator, precision)[0](maps)
        for half in halves
        if len(half) >= _LEAST_HALF
    ]
    stability, repeated = _found_again(places, again, generator)
    order = [part for part in supported(places, movement) if repeated[part]]
    rest = [part for part in range(len(movement)) if part not in order]
    missing = max(0, settings.parts_min - len(order))
    counted = sorted(order + rest[:missing], key=movement.tolist().__getitem__)
    ordered = counted + rest[missing:]
    finder = finder.only(ordered)
    if finer is not None:
        finder = finder.sharpened(places[:, ordered], finer)
    places = places_of_views(finder, windows, later, finer)
    return FoundParts(places, movement[ordered], stability[ordered], len(counted), finder)


def places_of_views(
    finder: PartFinder, windows: Float[Tensor, "photo view 5"], later: View, finer: View | None = None
) -> Float[Tensor, "photo part 2"]:
    """Return where parts are in photos: the mean of the photo and, where there is one, its mirror."""
    parts = torch.arange(len(windows)).split(_PHOTOS_AT_ONCE)
    seen = [
        places_in_photo(torch.cat([finder(later(s, view), finer and finer(s, view)) for s in parts]), windows[:, view])
        for view in range(min(2, windows.shape[1]))
    ]
    return torch.stack(seen).mean(0)


def _later_of(data: TrainingMaps, own: Int[Tensor, " photo"]) -> View:
    return lambda some, view: gather(data.finding[0], data.rows(own[some], view))


def found_places(explainer: Explainer, data: TrainingMaps, category: int) -> Float[Tensor, "photo part 2"]:
    """Choose ``config.teachers`` parts of one category of an explainer's photos and say where they are.

    They are those that `find_parts` chooses, not only those that the photos support as parts of their own; more of them
    teach better (consistency 0.55 and 0.58, not 0.32 and 0.55, on held-out foxes, two seeds).
    """
    own = data.own(category)
    # Whether a part comes back in halves of the photos is not asked: that decides what is called a part.
    later, windows, most = _later_of(data, own), data.windows[own], explainer.config.teachers
    settings = FindingConfig(parts_min=min(FindingConfig().parts_min, most), parts_max=most)
    generator = epoch_generator(explainer.config.seed, -1 - category)
    finder, _ = search(later, torch.arange(len(own)), windows, _filter_scale(later, len(own)), settings, generator)
    return places_of_views(finder, windows, later)


def known_places(finders: Sequence[PartFinder]) -> PlaceSource:
    """Return what says where parts are that were chosen before, given the finder of each category."""

    def places(explainer: Explainer, data: TrainingMaps, category: int) -> Tensor:
        own, finder = data.own(category), finders[category]
        first = finder.only(range(min(explainer.config.teachers, len(finder.chosen))))
        return places_of_views(first, data.windows[own], _later_of(data, own))

    return places


def _scaled(maps: Float[Tensor, "photo filter row col"], scale: Float[Tensor, " filter"]) -> Tensor:
    scaled: Tensor = maps.clamp(min=0) / scale[:, None, None]
    return scaled


def _filter_scale(view: View, photos: int) -> Float[Tensor, " filter"]:
    """Return the standard deviation of each filter; 1 where it is the same everywhere."""
    some = torch.linspace(0, photos - 1, min(photos, _SCALE_PHOTOS)).long()
    spread = view(some, 0).clamp(min=0).std((0, 2, 3))
    return torch.where(spread > 0, spread, 1.0)


def _sharpened(
    places: Float[Tensor, "photo part 2"], cells: Float[Tensor, "photo finer r c"], looks: Float[Tensor, "part finer"]
) -> Float[Tensor, "photo part 2"]:
    """Return the centroids, near the places, of the cells that look like the parts; where none does, the places."""
    length = cells.norm(dim=1, keepdim=True)
    likeness = torch.einsum("nfrc,pf->nprc", cells, looks) / length.clamp(min=_LITTLE)
    far = distances(places, (cells.shape[2], cells.shape[3]))
    near = length * likeness.pow(_LIKENESS_POWER) * torch.exp(-far.square() / (2 * _NEAR**2))
    return torch.where(near.amax((2, 3))[..., None] > 0, centroids(near, 1.0), places)


def search(
    later: View,
    photos: Int[Tensor, " photo"],
    windows: Float[Tensor, "photo view 5"],
    scale: Float[Tensor, " filter"],
    settings: FindingConfig,
    generator: torch.Generator,
    precision: Precision = "float32",
) -> tuple[PartFinder, Float[Tensor, " part"]]:
    """Choose parts of some photos, in the order of their choice; return their finder and their movement."""
    source = LaterParts(
        lambda some, view: _scaled(later(photos[some], view), scale), len(photos), generator, _SIZES, precision
    )
    taught = chosen_parts(source, windows, settings.parts_max, settings.variety)
    numbered = [(n, row) for n, directions in enumerate(source.dictionaries) for row in range(len(directions))]
    finder = PartFinder(scale, tuple(source.dictionaries), tuple(numbered))
    return finder.only(taught.chosen), taught.movement


def added(places: Float[Tensor, "photo part 2"], chosen: Sequence[int]) -> Float[Tensor, " part"]:
    """Return the share of each place's variance that the chosen places do not foretell: 1 where none is chosen.

    By linear regression with intercept; the residual's variance is divided by its degrees of freedom, so that a place
    that is independent of the others has 1 on average. 0 where there are no degrees of freedom left.
    """
    photos = places.shape[0]
    centred = (places - places.mean(0)).double()
    left = photos - 1 - 2 * len(chosen)
    if left < 1:
        return torch.zeros(places.shape[1])
    known = torch.linalg.qr(centred[:, list(chosen)].flatten(1))[0]
    flat = centred.flatten(1)
    rest = (flat - known @ (known.T @ flat)).reshape(centred.shape).square().sum((0, 2)) / left
    whole: Tensor = centred.square().sum((0, 2)) / (photos - 1)
    adds: Tensor = rest / whole.clamp(min=_LITTLE)
    return adds.float()


def supported(places: Float[Tensor, "photo part 2"], movement: Float[Tensor, " part"]) -> list[int]:
    """Return which parts, in their order, add more than half of their variance to those before, and more than they err.

    The first one always does, unless it moves no better than a place that stays.
    """
    kept: list[int] = []
    for part, error in enumerate(movement.tolist()):
        if max(error, _NEW) < float(added(places, kept)[part]):
            kept.append(part)
    return kept


def _found_again(
    places: Float[Tensor, "photo part 2"], again: Sequence[Float[Tensor, "photo more 2"]], generator: torch.Generator
) -> tuple[Float[Tensor, " part"], Tensor]:
    """Return how like each part is to its nearest in each half, the mean, and whether that is more than by chance.

    By chance: with the photos of the halves' places shuffled, in 95 of 100 shuffles. Without halves nothing is known
    (NaN) and nothing supported.
    """
    if not again:
        return torch.full((places.shape[1],), torch.nan), torch.zeros(places.shape[1], dtype=torch.bool)
    likeness = torch.stack([place_correlations(places, other).amax(1) for other in again])
    chance = []
    for _ in range(_SHUFFLES):
        order = torch.randperm(len(places), generator=generator)
        chance.append(torch.stack([place_correlations(places, other[order]).amax(1) for other in again]))
    limit = torch.stack(chance).quantile(_LEVEL, dim=0)
    beyond: Tensor = (likeness > limit).all(0)
    return likeness.mean(0), beyond
