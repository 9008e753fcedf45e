"""Parts of a category, found without training or labels on later layers of the performer.

Candidates are non-negative factors of a later layer's cells, of several sizes and of random shares of the photos; those
are kept that move with crops and mirrors of the photos, one by one, with a penalty for moving like those already kept
(`partlens.explainer.teachers`). What is found are directions of the later layer, so that the places of the same parts
are known on any further photo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.errors import LayerError, expected
from partlens.explainer.teachers import LaterParts, centroids, part_codes, part_teachers
from partlens.network.performer import Performer
from partlens.object_parts.inspection import FindingConfig

_LEAST_CELLS = 3
_FOLLOWS = 1.0  # the movement of a place that never moves, or moves at random

Views = Callable[[Int[Tensor, " photo"], int], Sequence[Tensor]]
"""Returns the maps of the finding layers, in their order, of some photos in a view; view 0 is the whole photo."""


@dataclass(frozen=True)
class PartFinder:
    """Says where the parts of a category are in any photo.

    Attributes:
        dictionaries: directions (part, filter) of the later layer that compete for its cells.
        chosen: for each part, the number of its dictionary and of its direction in it.
    """

    dictionaries: tuple[Tensor, ...]
    chosen: tuple[tuple[int, int], ...]

    def codes(self, maps: Sequence[Tensor]) -> Float[Tensor, "photo part row col"]:
        """Return how much of each part every cell of the later layer holds."""
        found = [part_codes(maps[0].clamp(min=0), directions) for directions in self.dictionaries]
        return torch.stack([found[number][:, row] for number, row in self.chosen], 1)

    def __call__(self, maps: Sequence[Tensor]) -> Float[Tensor, "photo part 2"]:
        """Return the places (row, col) of the parts as shares of the photo's sides, from the finding layers' maps."""
        return centroids(self.codes(maps))

    def tensors(self) -> dict[str, Tensor]:
        """Return what `of` reads again."""
        return {"chosen": torch.tensor(self.chosen)} | {f"parts.{n}": d for n, d in enumerate(self.dictionaries)}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> PartFinder:
        """Return the finder that `tensors` describe."""
        dictionaries = tuple(tensors[f"parts.{n}"] for n in range(len(tensors) - 1))
        return cls(dictionaries, tuple((int(number), int(row)) for number, row in tensors["chosen"]))


@dataclass(frozen=True)
class FoundParts:
    """The parts of a category, best first.

    Attributes:
        places: mean place over the views (row, col), as shares of the photo's sides.
        movement: mean squared error of moving with crops and mirrors over the variance of the place; lower is better.
        stability: correlation, over photos, of each place with that of the part nearest to it among those found again
            in half of the photos, the mean of both halves; 1 is the same part.
        correlation: of the places of two parts, the mean; lower is more variety.
        finder: says where the parts are in further photos.
    """

    places: Float[Tensor, "photo part 2"]
    movement: Float[Tensor, " part"]
    stability: Float[Tensor, " part"]
    correlation: float
    finder: PartFinder


def finding_layers(performer: Performer) -> tuple[str, ...]:
    """Return the layers whose maps `find_parts` reads: the last one with maps of at least 3x3 cells.

    Raises:
        LayerError: no layer has such maps.
    """
    maps = [layer for layer in performer.layers if len(layer.shape) == 3 and "Pool" not in layer.kind]
    fine = [layer for layer in maps if min(layer.shape[1:]) >= _LEAST_CELLS]
    if not fine:
        rule = f"a layer of {performer.name} with maps of at least {_LEAST_CELLS}x{_LEAST_CELLS} cells"
        raise LayerError(expected(rule, "none", "Use a larger input"))
    same = [layer for layer in fine if layer.shape == fine[-1].shape]
    return (min((layer.name for layer in same[-2:]), key=lambda name: (name.count("."), len(name))),)


def find_parts(
    views: Views, windows: Float[Tensor, "photo view 5"], settings: FindingConfig, generator: torch.Generator
) -> FoundParts:
    """Find the parts of a category's photos.

    As many parts are kept, from ``settings.parts_min`` to ``settings.parts_max``, as move with the photos better than
    a place that stays where it is.

    Args:
        views: gives the maps of the finding layers.
        windows: how each view was cut (`partlens.explainer.views.view_windows`); view 0 is the whole photo.
        settings: how many parts, how different.
        generator: source of the draws.
    """
    everyone = torch.arange(len(windows))
    whole, finder = _found(views, everyone, windows, settings, generator)
    halves = everyone[torch.randperm(len(everyone), generator=generator)].chunk(2)
    again = [_found(views, half, windows[half], settings, generator)[1] for half in halves if len(half) >= 4]
    maps = views(everyone, 0)
    places = finder(maps)
    alike = [_likeness(places, one(maps)).amax(1) for one in again]
    stability = torch.stack(alike).mean(0) if alike else torch.full((places.shape[1],), torch.nan)
    return FoundParts(whole.places, whole.movement, stability, whole.correlation, finder)


def _found(
    views: Views, photos: Tensor, windows: Tensor, settings: FindingConfig, generator: torch.Generator
) -> tuple[FoundParts, PartFinder]:
    source = LaterParts(lambda some, view: views(photos[some], view)[0], len(photos), generator)
    taught = part_teachers(source, windows, settings.parts_max, settings.variety)
    count = max(settings.parts_min, int((taught.movement < _FOLLOWS).sum()))
    kept = sorted(taught.movement.argsort(stable=True)[:count].tolist())
    numbered = [(n, row) for n, directions in enumerate(source.dictionaries) for row in range(len(directions))]
    picked = [numbered[taught.chosen[k]] for k in kept]
    used = sorted({number for number, _ in picked})
    finder = PartFinder(
        tuple(source.dictionaries[number] for number in used),
        tuple((used.index(number), row) for number, row in picked),
    )
    undefined = torch.full((len(kept),), torch.nan)
    found = FoundParts(taught.places[:, kept], taught.movement[kept], undefined, taught.correlation, finder)
    return found, finder


def _likeness(one: Float[Tensor, "photo part 2"], other: Float[Tensor, "photo more 2"]) -> Float[Tensor, "part more"]:
    """Return the correlation of places over photos, the mean of rows and columns."""

    def unit(places: Tensor) -> Tensor:
        centred = places - places.mean(0)
        scaled: Tensor = centred / centred.norm(dim=0).clamp(min=1e-8)
        return scaled

    return torch.einsum("ipa,iqa->pqa", unit(one), unit(other)).mean(-1)
