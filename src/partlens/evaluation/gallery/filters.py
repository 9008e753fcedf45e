"""Which filters are shown, on which photos, and what they read there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.attribution.receptive_pictures import (
    OcclusionConfig,
    OcclusionFields,
    activation_thresholds,
    occlusion_receptive_fields,
    regions,
    round_fields,
)
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.gallery.common import BATCH, FieldKind, Frames, JoinedMaps
from partlens.explainer.network import TRACK_REACH_CELLS
from partlens.metrics.localisation import Peaks, dead_filters
from partlens.network.receptive_field import ReceptiveField, widened

FILTERS = 12
_REGION_CELLS = 4.5


def chosen_filters(peaks: Peaks, table: Sequence[Mapping[str, Any]], count: int = FILTERS) -> list[int]:
    """Choose filters that show the variety of a layer, not only its best.

    Half of them are the most consistent ones, taken greedily so that none follows another (peak correlation at most
    0.8 while that is possible); the other half are spread evenly over the ranking that remains. Without landmarks the
    ranking is by mean peak score.

    Args:
        peaks: of every filter.
        table: one record per filter, as in the evaluation.
        count: filters wanted.

    Returns:
        Filter numbers, the chosen best first.
    """
    live = [k for k in range(peaks.scores.shape[1]) if not bool(dead_filters(peaks)[k])]
    strength = peaks.scores.mean(0)

    def rank(k: int) -> float:
        value = table[k]["consistency"]
        return float(value) if value is not None else -10 + float(strength[k] / strength.max().clamp(min=1e-9))

    order = sorted(live, key=rank, reverse=True)
    cells = peaks.cells - peaks.cells.mean(0)
    unit = cells / cells.norm(dim=0).clamp(min=1e-9)
    best: list[int] = []
    for k in order:
        if len(best) == count // 2:
            break
        if all(float((unit[:, k] * unit[:, j]).sum(0).mean()) <= 0.8 for j in best):
            best.append(k)
    rest = [k for k in order if k not in best]
    wanted = min(count - len(best), len(rest))
    spread = [rest[round(i * (len(rest) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    return best + list(dict.fromkeys(spread))


def region_px(
    peak: Float[Tensor, " 2"], receptive: ReceptiveField, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the box drawn around a peak: the part of the receptive field that the mask keeps.

    The theoretical field of a deep layer covers most of the image; what a masked filter reads is centred on its peak.
    The box is 4.5 cells wide (the mask's half height on both sides), clipped to the image.
    """
    half_x = _REGION_CELLS * max(1, receptive.stride_px[1]) / 2
    half_y = _REGION_CELLS * max(1, receptive.stride_px[0]) / 2
    x, y = float(peak[0]), float(peak[1])
    return max(0.0, x - half_x), max(0.0, y - half_y), min(float(size[1]), x + half_x), min(float(size[0]), y + half_y)


@dataclass(frozen=True)
class Shown:
    """A filter on the page: the layer, its number, its place in the joined maps, and its best photos."""

    layer: str
    filter: int
    joined: int
    photos: tuple[int, ...]


def covered_pool(shown: Sequence[Shown], count: int) -> list[int]:
    """Return the photos that most of the shown filters answer to, the first of equals first."""
    votes: dict[int, int] = {}
    for one in shown:
        for photo in one.photos:
            votes[photo] = votes.get(photo, 0) + 1
    return sorted(sorted(votes), key=lambda photo: -votes[photo])[:count]


def theoretical_px(receptive: ReceptiveField) -> dict[str, tuple[int, int]]:
    """Return how many rows and columns a filter of either network can read in theory."""
    return {"explainer": widened(receptive, TRACK_REACH_CELLS).size_px, "performer": receptive.size_px}


@dataclass(frozen=True)
class Looked:
    """What the shown filters read, by (position in shown, photo) where a photo is meant.

    Attributes:
        reads_px: side of each filter's field; NaN where nothing was found.
        fields: how it was found by covering; ``None`` for analytic fields.
        regions: where they look on their photos.
        maps: their maps there.
    """

    reads_px: Float[Tensor, " shown"]
    fields: OcclusionFields | None
    regions: dict[tuple[int, int], np.ndarray]
    maps: dict[tuple[int, int], Float[Tensor, "row col"]]


def looked_at(
    joined: JoinedMaps,
    frames: Frames,
    shown: Sequence[Shown],
    pool: Sequence[int],
    receptive: ReceptiveField,
    config: OcclusionConfig,
    kind: FieldKind,
    advance: Callable[[int], None],
) -> Looked:
    """Find the fields of the shown filters, and their maps and regions on their photos."""
    numbers = [one.joined for one in shown]
    if kind == "analytic":
        sides = {layer: math.sqrt(rows * cols) for layer, (rows, cols) in theoretical_px(receptive).items()}
        reads, found = torch.tensor([sides[one.layer] for one in shown]), None
        fields = round_fields(frames.performer.preprocessing.size_px, reads)
    else:
        found = occlusion_receptive_fields(
            joined, frames.batch(pool), receptive, numbers, config=config, batch_size=BATCH, advance=advance
        )
        reads, fields = found.effective_px, found.fields
    photos = sorted({photo for one in shown for photo in one.photos})
    pieces = []
    for start in range(0, len(photos), BATCH):
        part = photos[start : start + BATCH]
        pieces.append(joined(frames.batch(part))[:, numbers])
        advance(len(part))
    maps = torch.cat(pieces)
    thresholds = activation_thresholds(maps, top_share=config.top_share, images=config.images)
    pairs = [(n, photo) for n, one in enumerate(shown) for photo in one.photos]
    of = torch.tensor([n for n, _ in pairs])
    where = torch.tensor([photos.index(photo) for _, photo in pairs])
    own = maps[where, of]
    drawn = regions(
        own,
        fields,
        of,
        thresholds[of],
        receptive,
        gain=config.gain,
        region_share=config.region_share,
    )
    return Looked(
        reads,
        found,
        {pair: region.numpy() for pair, region in zip(pairs, drawn, strict=True)},
        dict(zip(pairs, own, strict=True)),
    )


def median_side(sides: Float[Tensor, " filter"], generator: torch.Generator) -> dict[str, Any]:
    """Return the median effective side of the shown filters, with an interval over filters."""
    known = sides[~sides.isnan()].double()
    if not len(known):
        return Estimate.undefined("filters").to_dict()
    return bootstrap(
        lambda i: float(known[i].quantile(0.5)), len(known), generator=generator, rounds=300, unit="filters"
    ).to_dict()
