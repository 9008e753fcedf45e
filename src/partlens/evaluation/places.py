"""Where filters peak on held-out photos, scored against landmarks and against filters that see nothing.

Filters may be shared among several categories; each is then measured on the photos of its own (ICLR 2020, Sec. 4), and
a layer's score is the mean over its filters. One category is a list of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.estimate import Estimate
from partlens.evaluation.results import CategoryScores, FilterScores, LayerScores
from partlens.metrics.localisation import (
    Peaks,
    consistency_per_filter,
    dead_filters,
    instability_differences,
    instability_per_filter,
    localisation_scores,
    null_peaks,
    spread_per_filter,
)
from partlens.metrics.scores import LOCALISATION, LocalisationScores
from partlens.network.performer import Performer

ROUNDS = 100
NULL_FILTERS = 256


def top_layer(performer: Performer) -> str:
    """Return the performer's last layer with maps larger than 1x1 and a local receptive field."""
    # The papers take the top convolution; for a residual network that is the output of the last block.
    spatial = [layer for layer in performer.layers if layer.has_places]
    blocks = [layer.name for layer in spatial if "pool" not in layer.kind.lower()]
    return blocks[-1] if blocks else spatial[-1].name


def landmarks_in_input(
    images: ImageSet, rows: Sequence[int], performer: Performer
) -> tuple[tuple[str, ...], Float[Tensor, "image landmark 2"]]:
    """Return landmark names and positions in input pixels; NaN where absent or cropped away."""
    truth = images.part_truth
    if truth is None:
        return (), torch.full((len(rows), 0, 2), math.nan, dtype=torch.float64)
    chosen = truth.for_keys([images.keys[i] for i in rows])
    moved = np.full(chosen.positions_px.shape, np.nan)
    for index, row in enumerate(rows):
        if not np.isnan(chosen.positions_px[index]).all():
            moved[index] = performer.preprocessing.to_input_px(chosen.positions_px[index], images.size_px(row))
    height, width = performer.preprocessing.size_px
    outside = (moved < 0).any(-1) | (moved[..., 0] > width) | (moved[..., 1] > height)
    moved[outside] = np.nan
    return tuple(truth.landmarks), torch.from_numpy(moved)


def photo_numbers(images: ImageSet, rows: Sequence[int]) -> Int[Tensor, " image"]:
    """Return an integer per row, equal for crops of one photo."""
    return torch.from_numpy(np.unique([images.photos[i] for i in rows], return_inverse=True)[1])


@dataclass(frozen=True)
class MeasuredPhotos:
    """The photos that layers and nulls are scored on."""

    landmarks: Float[Tensor, "image landmark 2"]  # x, y in the input, NaN where absent
    names: tuple[str, ...]  # of the landmarks
    photos: Int[Tensor, " image"]  # an integer per image, equal for crops of one photo
    size_px: tuple[int, int]  # height and width of the input
    categories: tuple[str, ...]  # that filters may belong to, at least one; ``("",)`` means all photos as one
    labels: Int[Tensor, " image"]  # the category of each image, an index
    generator: torch.Generator  # of every bootstrap, one after the other
    rounds: int = ROUNDS  # of every bootstrap

    @classmethod
    def of(
        cls,
        images: ImageSet,
        rows: Sequence[int],
        performer: Performer,
        categories: tuple[str, ...],
        labels: Int[Tensor, " image"],
        *,
        seed: int,
        rounds: int = ROUNDS,
    ) -> MeasuredPhotos:
        """Return some rows of a set, as a performer sees them."""
        names, landmarks = landmarks_in_input(images, rows, performer)
        numbers, size_px = photo_numbers(images, rows), performer.preprocessing.size_px
        return cls(landmarks, names, numbers, size_px, categories, labels, torch.Generator().manual_seed(seed), rounds)

    @property
    def landmark_counts(self) -> dict[str, int]:
        """How many photos have each landmark."""
        return dict(zip(self.names, (~self.landmarks.isnan().any(-1)).sum(0).tolist(), strict=True))

    def of_categories(
        self, assigned: Int[Tensor, " filter"], *, empty: bool = False
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Give each category's name, photos and filters where both can be scored, without filters if ``empty``."""
        for number, name in enumerate(self.categories):
            index, own = ((of == number).nonzero()[:, 0] for of in (self.labels, assigned))
            # A single photo says nothing of how far a peak moves.
            if len(index) >= 2 and (empty or len(own)):
                yield name, index, own


def filter_scores(on: MeasuredPhotos, peaks: Peaks, assigned: Int[Tensor, " filter"]) -> tuple[FilterScores, ...]:
    """Return the scores of every filter, each on the photos of its category."""
    found: dict[int, FilterScores] = {}
    for number, category in enumerate(on.categories):
        index, own = ((of == number).nonzero()[:, 0] for of in (on.labels, assigned))
        if not len(own):
            continue
        part, landmarks = peaks.rows(index).filters(own), on.landmarks[index]
        instability = instability_per_filter(part, landmarks, on.size_px).tolist()
        consistency, landmark = consistency_per_filter(part, landmarks, on.photos[index])
        spread, dead = spread_per_filter(part).tolist(), dead_filters(part).tolist()
        for place, k in enumerate(own.tolist()):
            known = on.names and not bool(consistency[place].isnan())
            found[k] = FilterScores(
                filter=k,
                category=category,
                instability=round(instability[place], 5),
                consistency=round(float(consistency[place]), 5),
                landmark=on.names[int(landmark[place])] if known else None,
                spread_cells=round(spread[place], 5),
                dead=dead[place],
            )
    return tuple(found[k] for k in sorted(found))


def measure_maps(
    on: MeasuredPhotos,
    peaks: Peaks,
    assigned: Int[Tensor, " filter"],
    *,
    null: Literal["", "moving", "constant"] = "",
) -> LayerScores:
    """Score where the filters of a layer peak: per category on its photos, then the mean over filters.

    Args:
        on: the photos.
        peaks: of every filter on every photo.
        assigned: the category of each filter, an index; of a null, the categories of the layer it is compared with.
        null: the peaks are of filters that see nothing. Of ``constant`` peaks nothing but instability is defined.
    """
    # Nulls belong to no category: all of them are measured in each, which weighs as it does in the compared layer.
    found, counts, by_category = [], [], {}
    for name, index, own in on.of_categories(assigned, empty=bool(null)):
        part = peaks.rows(index) if null else peaks.rows(index).filters(own)
        scores = localisation_scores(
            part,
            on.landmarks[index],
            on.size_px,
            landmark_names=on.names,
            photos=on.photos[index],
            generator=on.generator,
            rounds=on.rounds,
            fixed_null=null == "constant",
        )
        found.append(scores)
        counts.append(len(own))
        by_category[name] = CategoryScores(**dict(scores), filters=len(own))
    return LayerScores(**dict(_joined(found, counts)), by_category=by_category)


def measure_nulls(
    on: MeasuredPhotos,
    peaks: Peaks,
    assigned: Int[Tensor, " filter"],
    grid: tuple[tuple[float, float], tuple[float, float]],
) -> tuple[dict[str, LayerScores], dict[str, Estimate]]:
    """Score filters that see nothing, on the same photos: random cells, always the centre, always the corner.

    Returns:
        Scores by null, and the instability of the layer with ``peaks`` and ``grid`` minus that of each null.
    """
    nulls = {kind: _null(kind, on, peaks, grid) for kind in ("random", "centre", "corner")}
    scores = {
        kind: measure_maps(on, of, assigned, null="moving" if kind == "random" else "constant")
        for kind, of in nulls.items()
    }
    # Draws of their own, so that the scores' intervals do not depend on whether differences are taken.
    draws, each, counts = torch.Generator().manual_seed(on.generator.initial_seed()), [], []
    for _, index, own in on.of_categories(assigned):
        counts.append(len(own))
        each.append(
            instability_differences(
                peaks.rows(index).filters(own),
                {kind: of.rows(index) for kind, of in nulls.items()},
                on.landmarks[index],
                on.size_px,
                photos=on.photos[index],
                generator=draws,
                rounds=on.rounds,
            )
        )
    return scores, {kind: mean_of([found[kind] for found in each], counts) for kind in nulls}


def _null(kind: str, on: MeasuredPhotos, peaks: Peaks, grid: tuple[tuple[float, float], tuple[float, float]]) -> Peaks:
    drawn = null_peaks(
        kind,
        len(on.photos),
        peaks.side_cells,
        *grid,
        input_size_px=on.size_px,
        filters=NULL_FILTERS,
        generator=on.generator,
    )
    # The filters of a constant null are all the same, so one of them says as much.
    return drawn if kind == "random" else drawn.filters(torch.tensor([0]))


def mean_of(values: Sequence[Estimate], weights: Sequence[int]) -> Estimate:
    """Return a weighted mean of independent estimates; each end of the interval adds up in squares."""
    usable = [(v, w) for v, w in zip(values, weights, strict=True) if w > 0 and v.defined]
    if len(usable) < 2:
        return usable[0][0] if usable else Estimate.undefined()
    total = sum(w for _, w in usable)

    def end(side: int) -> float:
        return math.sqrt(sum(((v.interval[side] - v.value) * w / total) ** 2 for v, w in usable))

    mean = sum(v.value * w for v, w in usable) / total
    return Estimate(mean, (mean - end(0), mean + end(1)), sum(v.n for v, _ in usable), usable[0][0].unit)


def _joined(scores: Sequence[LocalisationScores], filters: Sequence[int]) -> LocalisationScores:
    """Return the mean over filters of scores that were measured per category, each on its own photos."""
    if len(scores) == 1:
        return scores[0]
    names = dict.fromkeys(name for one in scores for name in one.landmark_shares)
    shares = {
        name: _mean_share([(s.landmark_shares[name], n) for s, n in zip(scores, filters, strict=True)])
        for name in names
    }
    joined = {name: mean_of([s.of(name) for s in scores], filters) for name in LOCALISATION}
    return LocalisationScores(**joined, landmark_shares=shares)


def _mean_share(shares: Sequence[tuple[float, int]]) -> float:
    """Return the mean of (share, weight), undefined ones apart."""
    known = [(share, weight) for share, weight in shares if not math.isnan(share) and weight]
    return sum(share * weight for share, weight in known) / sum(weight for _, weight in known) if known else math.nan
