"""The account of one category: which found parts carry the score, how much, and the verdict.

Windows stand at those of all found parts that carry most, on other photos than those that are measured; what moves like
a part before it, or follows crops less well, may carry more. Accounted for are these and the parts that the photos
support (`partlens.object_parts.finding`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from partlens.object_parts.regions import (
    AREAS,
    Kept,
    TapMaps,
    Whole,
    carrying_order,
    grid_places,
    kept,
    kept_at,
    kept_by_kind,
    part_cells,
    shapley_shares,
    whole_photos,
    windows_at,
)
from partlens.object_parts.shapley import Shapley
from partlens.object_parts.verdict import SAID_AREA, Verdict, best_place, judged

GRID = 3
"""Windows of the ceiling along a side."""

_RANKING_PHOTOS = 12
_GRID_PHOTOS = 12
_ALONE_PHOTOS = 24
_SHARED_PASSES = 512  # coalitions in all, so that many parts do not take many times as long
_LEAST_SHARED = 3


@dataclass(frozen=True)
class Truth:
    """What annotations say of the measured photos; ``None`` where there are none."""

    # places of annotated parts, NaN where unknown, as shares of the sides
    annotated: Float[Tensor, "photo landmark 2"] | None = None
    # how much of each cell is the object, NaN for photos where it is not known
    objects: Float[Tensor, "photo row col"] | None = None
    landmarks: tuple[str, ...] = ()  # names of the annotated parts


@dataclass(frozen=True)
class Account:
    """What was measured of a category; parts come in ``order``, those that carry most first."""

    order: tuple[int, ...]  # their numbers among the found ones
    windows: tuple[int, ...]  # how many of them get windows at each area
    places: Float[Tensor, "photo part 2"]  # of the parts in the measured photos
    whole: Whole  # what the performer says of the measured photos
    kept: dict[str, Kept]  # by windows of each kind
    # kept by single windows over the whole image, on the first of the photos
    grid: Float[Tensor, "gridded area window"]
    # kept by a window of the smallest area at each part alone, on the first of the photos
    alone: Float[Tensor, "alone part"]
    shares: Shapley  # of the first of the photos, elsewhere last
    verdict: Verdict  # what the network knows the category by


def account_of(
    seen: TapMaps,
    seen_places: Float[Tensor, "seen part 2"],
    measured: TapMaps,
    places: Float[Tensor, "measured part 2"],
    supported: int,
    truth: Truth,
    generator: torch.Generator,
) -> Account:
    """Measure what the found parts carry.

    Args:
        seen: the tap on :func:`ranking_photos` of those that the parts were found on; they say which parts carry most.
        seen_places: of the found parts there, in the found order.
        measured: the tap on the photos to measure on.
        places: of the found parts there, in the found order.
        supported: how many of them, from the first on, the photos support.
        truth: what annotations say of these.
        generator: source of all draws.
    """
    carrying, windows = carrying_order(seen, whole_photos(seen), seen_places)
    order = tuple(part for rank, part in enumerate(carrying) if rank < max(windows) or part < supported)
    places = places[:, order]
    whole = whole_photos(measured)
    by_kind = kept_by_kind(
        measured, whole, places, generator, counts=windows, annotated=truth.annotated, objects=truth.objects
    )
    gridded = min(_GRID_PHOTOS, (len(places) + 1) // 2)
    first, others = slice(0, gridded), slice(gridded, len(places))
    grid = kept_at(measured.take(first), whole.take(first), grid_places(GRID))
    fixed = torch.full((len(places), len(AREAS)), torch.nan, dtype=grid.dtype)
    best = grid_places(GRID)[[best_place(grid)]]
    if gridded < len(places):
        fixed[others] = kept_at(measured.take(others), whole.take(others), best)[:, :, 0]
    some = slice(0, _ALONE_PHOTOS)
    alone = torch.stack([windows_at(places[some, [p]], measured.grid, AREAS[0]) for p in range(len(order))], 1)
    shared = slice(0, max(_LEAST_SHARED, _SHARED_PASSES // 2 ** (len(order) + 1)))
    return Account(
        order=order,
        windows=windows,
        places=places,
        whole=whole,
        kept=by_kind,
        grid=grid,
        alone=kept(measured.take(some), whole.take(some), alone).score,
        shares=shapley_shares(
            measured.take(shared),
            whole.take(shared),
            part_cells(places[shared], measured.grid, SAID_AREA),
            generator=generator,
        ),
        verdict=judged({kind: each.score for kind, each in by_kind.items()}, grid, fixed, places, generator),
    )


def ranking_photos(count: int) -> Tensor:
    """Choose the photos, out of those that parts were found on, which say what parts carry most."""
    some = min(count, _RANKING_PHOTOS)
    return torch.arange(some) * count // max(1, some)


def nearest_landmarks(
    places: Float[Tensor, "photo part 2"], landmarks: Float[Tensor, "photo landmark 2"]
) -> list[int | None]:
    """Return the landmark that each part is nearest to, ``None`` where it says no more than the landmark's mean place.

    A part stands for a landmark where its mean distance to it is smaller than that of a place which never moves from
    the landmark's mean.
    """
    away = (places[:, :, None] - landmarks[:, None]).norm(dim=-1).nanmean(0)
    still = (landmarks - landmarks.nanmean(0)).norm(dim=-1).nanmean(0)
    score = torch.where(away.isnan(), math.inf, away)
    best = score.argmin(1)
    return [int(k) if float(score[part, k]) < float(still[k]) else None for part, k in enumerate(best)]
