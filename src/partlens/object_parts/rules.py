"""The two rules by which filters get parts: the nearest landmark that they follow, or the group that they move with.

A filter is measured on the photos of its own category only (ICLR 2020 submission, Sec. 4): where its part is on photos
of another category means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.estimate import Estimate, percentile_interval
from partlens.metrics.localisation import Peaks, consistency_per_filter, dead_filters, null_peaks
from partlens.object_parts.assignment import (
    OTHER,
    Clusters,
    agreement_thresholds,
    agreement_with_group,
    by_size,
    clustered,
    filter_vectors,
    landmark_distances,
    nearest_landmark,
    parts_by_landmark,
    peak_features,
    place_vectors,
)
from partlens.object_parts.record import OTHER_ID, Evidence, FilterPart, FoundPart, PartsConfig, Rule

_AUTO_PHOTOS = 20
_FEWEST_PHOTOS = 2
_SILHOUETTE_DRAWS = 10
_NULL_LEVEL = 0.95  # share of the filters with random peaks that the measured thresholds refuse
_APART = 1000  # labels of different categories never meet

Assign = Callable[[Int[Tensor, " row"]], Int[Tensor, " filter"]]


@dataclass(frozen=True)
class SeenPhotos:
    """What one pass over the photos leaves."""

    maps: Float[Tensor, "image channel row col"]  # of the tap
    peaks: Peaks  # of the last interpretable layer
    outputs: Float[Tensor, "image class"]  # of the performer
    landmarks: Float[Tensor, "image landmark 2"]  # x, y in the input; NaN where absent
    names: tuple[str, ...]  # of the landmarks
    photos: Int[Tensor, " image"]  # an integer per image, equal for crops of one photo
    labels: Int[Tensor, " image"]  # the category of each image
    assigned: Int[Tensor, " filter"]  # the category of each filter
    # start and stride (rows, cols) of the cells' centres, in pixels
    grid: tuple[tuple[float, float], tuple[float, float]]
    size_px: tuple[int, int]  # rows and columns of the input

    def photos_of(self, category: int) -> Int[Tensor, " row"]:
        """Return the positions of a category's images."""
        return (self.labels == category).nonzero()[:, 0]

    def filters_of(self, category: int) -> Int[Tensor, " own"]:
        """Return a category's filters."""
        return (self.assigned == category).nonzero()[:, 0]

    def of(self, category: int) -> SeenPhotos:
        """Return what was seen of a category's filters on its images."""
        rows, own = self.photos_of(category), self.filters_of(category)
        of_images = {name: getattr(self, name)[rows] for name in ("maps", "outputs", "landmarks", "photos", "labels")}
        return replace(self, **of_images, peaks=self.peaks.rows(rows).filters(own), assigned=self.assigned[own])

    @property
    def live(self) -> Bool[Tensor, " filter"]:
        """Which filters activate on any image."""
        return ~dead_filters(self.peaks)

    def null(self, filters: int, generator: torch.Generator) -> Peaks:
        """Return filters with random peaks on as many images."""
        start, stride = self.grid
        count, side = len(self.photos), self.peaks.side_cells
        size = self.size_px
        return null_peaks(
            "random", count, side, start, stride, input_size_px=size, filters=filters, generator=generator
        )


@dataclass(frozen=True)
class _Assigned:
    """Parts as a rule found them."""

    rule: Rule  # landmarks or clusters
    parts: tuple[FoundPart, ...]  # without pictures; "other" last in each category
    filters: tuple[FilterPart, ...]  # why each has its part
    evidence: tuple[Evidence, ...]  # by category
    assign: Assign  # gets images, repeats allowed, and returns a label per filter


@dataclass(frozen=True)
class _Found:
    """What a rule finds for the filters of one category: the names of its labels, and the order to show them in."""

    names: tuple[str, ...]
    order: tuple[int, ...]
    labels: Int[Tensor, " filter"]
    filters: tuple[FilterPart, ...]
    evidence: Evidence
    assign: Assign


def chosen_rule(rule: str, seen: SeenPhotos) -> Rule:
    """Return the rule that ``auto`` means: landmarks where enough photos of each category with filters show one."""
    if rule != "auto":
        return "landmarks" if rule == "landmarks" else "clusters"
    for category in seen.assigned.unique().tolist():
        shown = (~seen.landmarks[seen.photos_of(category)].isnan().any(-1)).sum(0)
        if not len(shown) or int(shown.max()) < _AUTO_PHOTOS:
            return "clusters"
    return "landmarks"


def find_parts(
    rule: Rule, seen: SeenPhotos, categories: Sequence[str], how: PartsConfig, generator: torch.Generator
) -> _Assigned:
    """Find the parts of each category's filters on its photos.

    Where there are several categories, parts are called ``CATEGORY: PART``. Filters of a category without two photos
    are its "other".
    """
    search = _by_landmarks if rule == "landmarks" else _by_clusters
    found: dict[int, _Found] = {}
    parts: list[FoundPart] = []
    rows: dict[int, FilterPart] = {}
    for category in seen.assigned.unique().tolist():
        name, own, here = categories[category], seen.filters_of(category), seen.of(category)
        enough = len(here.photos) >= _FEWEST_PHOTOS
        found[category] = one = search(here, how, generator) if enough else _unseen(here, seen.live[own])
        prefix = f"{name}: " if len(categories) > 1 else ""
        parts += _listed_parts(one, own, prefix, name)
        for k, row in zip(own.tolist(), one.filters, strict=True):
            rows[k] = row.changed(filter=k, part=prefix + row.part)

    def assign(index: Tensor) -> Tensor:
        labels = torch.full((len(seen.assigned),), OTHER, dtype=torch.long)
        for category, one in found.items():
            chosen = index[seen.labels[index] == category]
            if len(chosen.unique()) >= _FEWEST_PHOTOS:
                inside = one.assign(torch.searchsorted(seen.photos_of(category), chosen))
                labels[seen.filters_of(category)] = torch.where(inside >= 0, inside + _APART * category, inside)
        return labels

    evidence = tuple(one.evidence.changed(category=categories[c]) for c, one in found.items())
    return _Assigned(rule, tuple(parts), tuple(rows[k] for k in sorted(rows)), evidence, assign)


def _listed_parts(one: _Found, own: Tensor, prefix: str, category: str) -> list[FoundPart]:
    """Return the parts of one category as the file lists them, "other" last."""
    parts = []
    for label in (*one.order, OTHER):
        called, inside = prefix + (one.names[label] if label >= 0 else OTHER_ID), one.labels == label
        parts.append(FoundPart(id=called, name=called, category=category, filters=tuple(own[inside].tolist())))
    return parts


def _unseen(seen: SeenPhotos, live: Tensor) -> _Found:
    labels = torch.full_like(seen.assigned, OTHER)
    filters = tuple(FilterPart(filter=k, part=OTHER_ID, dead=not bool(live[k])) for k in range(len(labels)))
    return _Found((), (), labels, filters, Evidence(category="", photos=len(seen.photos)), lambda _: labels)


def _rounded(value: Tensor) -> float:
    return round(float(value), 5)


# --- landmarks --------------------------------------------------------------------------------------------------------


def _consistency(peaks: Peaks, landmarks: Tensor, photos: Tensor) -> Float[Tensor, "filter landmark"]:
    """Return cross-validated R², NaN for landmarks that too few photos show."""
    each = [consistency_per_filter(peaks, landmarks[:, k : k + 1], photos)[0] for k in range(landmarks.shape[1])]
    return torch.stack(each, 1) if each else torch.empty(peaks.scores.shape[1], 0, dtype=torch.float64)


@dataclass(frozen=True)
class _Near:
    """How near filters are to the landmarks, and how well they predict them."""

    distances: Float[Tensor, "filter landmark"]
    consistency: Float[Tensor, "filter landmark"]

    @staticmethod
    def of(peaks: Peaks, landmarks: Tensor, photos: Tensor, diagonal_px: float) -> _Near:
        far = landmark_distances(peaks.positions_px, landmarks, diagonal_px)
        return _Near(far, _consistency(peaks, landmarks, photos))

    def nearest(self, usable: Tensor) -> Int[Tensor, " filter"]:
        return nearest_landmark(self.distances, usable)


def _by_landmarks(seen: SeenPhotos, how: PartsConfig, generator: torch.Generator) -> _Found:
    """Give each filter the landmark that it is nearest to, where it follows that better than random peaks do."""
    diagonal, live = math.hypot(*seen.size_px), seen.live
    near = _Near.of(seen.peaks, seen.landmarks, seen.photos, diagonal)
    usable = ~near.consistency.isnan().all(0)
    nearest = near.nearest(usable)
    drawn = _Near.of(seen.null(how.null_filters, generator), seen.landmarks, seen.photos, diagonal)
    reached = drawn.consistency.gather(1, drawn.nearest(usable)[:, None])[:, 0]
    beyond_chance = float(torch.quantile(reached, _NULL_LEVEL))
    least = beyond_chance if how.consistency_min is None else how.consistency_min

    def labelled(one: _Near, alive: Tensor) -> Tensor:
        limits = {"distance_max_frac": how.distance_max_frac, "consistency_min": least}
        return parts_by_landmark(one.distances, one.consistency, alive, **limits)

    def assign(rows: Tensor) -> Tensor:
        half = _Near.of(seen.peaks.rows(rows), seen.landmarks[rows], seen.photos[rows], diagonal)
        return torch.full_like(nearest, OTHER) if bool(half.consistency.isnan().all()) else labelled(half, live)

    labels = labelled(near, live)
    far = drawn.distances.gather(1, drawn.nearest(usable)[:, None])[:, 0]
    evidence = Evidence(
        category="",
        photos=len(seen.photos),
        null_consistency_p95=beyond_chance,
        null_distance_mean_frac=float(far.mean()),
        null_kept_frac=float((labelled(drawn, torch.ones(len(far), dtype=torch.bool)) >= 0).double().mean()),
    )
    # A landmark may be called as the filters are that follow none.
    names = tuple(f"{name} (landmark)" if name == OTHER_ID else name for name in seen.names)
    order = sorted(range(len(names)), key=lambda k: (-int((labels == k).sum()), k))
    shown = tuple(k for k in order if bool(usable[k]))
    rows = _landmark_rows(seen, near, nearest, labels, names)
    return _Found(names, shown, labels, rows, evidence, assign)


def _landmark_rows(
    seen: SeenPhotos, near: _Near, nearest: Tensor, labels: Tensor, names: tuple[str, ...]
) -> tuple[FilterPart, ...]:
    index, live = torch.arange(len(nearest)), seen.live
    mean, follows = near.distances[index, nearest], near.consistency[index, nearest]
    return tuple(
        FilterPart(
            filter=k,
            part=names[int(labels[k])] if int(labels[k]) >= 0 else OTHER_ID,
            dead=not bool(live[k]),
            nearest=seen.names[int(nearest[k])],
            distance_frac=_rounded(mean[k]),
            consistency=_rounded(follows[k]),
        )
        for k in range(len(labels))
    )


# --- clusters ---------------------------------------------------------------------------------------------------------


def _by_clusters(seen: SeenPhotos, how: PartsConfig, generator: torch.Generator) -> _Found:
    """Group filters by where and on what they activate, where they agree with their group better than random peaks."""
    live = seen.live
    drawn = seen.null(how.null_filters, generator)

    def grouped(rows: Tensor, fewest: int, most: int) -> tuple[Clusters, Tensor, Tensor, Tensor]:
        cells = seen.peaks.cells[rows]
        groups = clustered(filter_vectors(cells, peak_features(seen.maps[rows], cells)), live, fewest=fewest, most=most)
        place = place_vectors(cells)
        agreement = agreement_with_group(place, groups.labels)
        least = agreement_thresholds(place, groups.labels, place_vectors(drawn.cells[rows]), _NULL_LEVEL)
        return groups, by_size(torch.where(agreement > least, groups.labels, OTHER)), agreement, least

    groups, labels, agreement, least = grouped(torch.arange(len(seen.photos)), how.clusters_min, how.clusters_max)

    def assign(rows: Tensor) -> Tensor:
        return grouped(rows, groups.count, groups.count)[1] if groups.count else labels

    names = tuple(f"part {k + 1}" for k in range(int(labels.max()) + 1))
    rows = tuple(
        FilterPart(
            filter=k,
            part=names[int(labels[k])] if int(labels[k]) >= 0 else OTHER_ID,
            dead=not bool(live[k]),
            agreement=_rounded(agreement[k]),
            agreement_min=_rounded(least[k]),
        )
        for k in range(len(labels))
    )
    evidence = Evidence(
        category="",
        photos=len(seen.photos),
        clusters=groups.count,
        silhouettes={str(k): round(v, 5) for k, v in groups.silhouette.items()},
        null_silhouette=_silhouette_of_chance(seen, groups.count, generator),
    )
    return _Found(names, tuple(range(len(names))), labels, rows, evidence, assign)


def _silhouette_of_chance(seen: SeenPhotos, count: int, generator: torch.Generator) -> Estimate:
    """Return the silhouette of as many groups when no filter's peaks belong to the photo they were found in."""
    if not count:
        return Estimate.undefined("draws")
    found = []
    for _ in range(_SILHOUETTE_DRAWS):
        order = torch.rand(seen.peaks.scores.shape, generator=generator).argsort(0)
        cells = seen.peaks.cells.gather(0, order[..., None].expand_as(seen.peaks.cells))
        vectors = filter_vectors(cells, peak_features(seen.maps, cells))
        found.append(clustered(vectors, seen.live, fewest=count, most=count).silhouette[count])
    return Estimate(sum(found) / len(found), percentile_interval(found), len(found), "draws")
