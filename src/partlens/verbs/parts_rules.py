"""The two rules by which filters get parts: the nearest stable landmark, or clusters of where and on what they fire."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partlens.verbs.parts_file import OTHER_ID

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from partlens.metrics.localisation import Peaks
    from partlens.network.zoo import Performer
    from partlens.object_parts.assignment import PartsConfig

_AUTO_PHOTOS = 20
_SILHOUETTE_DRAWS = 10


@dataclass(frozen=True)
class SeenPhotos:
    """What one pass over the photos leaves.

    Attributes:
        maps: of the tap (image, filter, row, col).
        peaks: of conv-interp-2.
        outputs: the performer's outputs (image, class).
        landmarks: x, y in the input (image, landmark, 2), NaN where absent.
        names: of the landmarks.
        photos: an integer per image, equal for crops of one photo.
    """

    maps: Tensor
    peaks: Peaks
    outputs: Tensor
    landmarks: Tensor
    names: tuple[str, ...]
    photos: Tensor


@dataclass(frozen=True)
class AssignedParts:
    """Parts as a rule found them: records without pictures, a record per filter, and what speaks for them."""

    rule: str
    parts: list[dict[str, Any]]
    filters: list[dict[str, Any]]
    thresholds: dict[str, Any]
    null: dict[str, Any]
    assign: Callable[[Tensor], Tensor]
    matched: bool


def chosen_rule(rule: str, seen: SeenPhotos) -> str:
    """Return the rule that ``auto`` takes: landmarks where enough photos show one."""
    shown = (~seen.landmarks.isnan().any(-1)).sum(0)
    most = int(shown.max()) if len(shown) else 0
    if rule == "auto":
        return "landmarks" if most >= _AUTO_PHOTOS else "clusters"
    return rule


def _consistency(peaks: Peaks, landmarks: Tensor, photos: Tensor) -> Tensor:
    """Return (filter, landmark) cross-validated R², NaN for landmarks that too few photos show."""
    import torch

    from partlens.metrics.localisation import consistency_per_filter

    each = [consistency_per_filter(peaks, landmarks[:, k : k + 1], photos)[0] for k in range(landmarks.shape[1])]
    return torch.stack(each, 1) if each else torch.empty(peaks.scores.shape[1], 0, dtype=torch.float64)


def _null(seen: SeenPhotos, performer: Performer, how: PartsConfig, generator: torch.Generator) -> Peaks:
    from partlens.metrics.localisation import null_peaks

    peaks = seen.peaks
    # The grid of the real peaks: two cells of different row and column give start and stride.
    start, stride = _grid(peaks)
    return null_peaks(
        "random",
        len(peaks.scores),
        peaks.side_cells,
        start,
        stride,
        input_size_px=performer.preprocessing.size_px,
        filters=how.null_filters,
        generator=generator,
    )


def _grid(peaks: Peaks) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return start and stride (rows, cols) of the grid that the peaks stand on."""
    ends = []
    for axis in (0, 1):
        cells, place = peaks.cells[..., axis].flatten(), peaks.positions_px[..., 1 - axis].flatten()
        low, high = int(cells.argmin()), int(cells.argmax())
        span = float(cells[high] - cells[low])
        stride = float(place[high] - place[low]) / span if span else 1.0
        ends.append((float(place[low]) - float(cells[low]) * stride, stride))
    return (ends[0][0], ends[1][0]), (ends[0][1], ends[1][1])


def by_landmarks(seen: SeenPhotos, performer: Performer, how: PartsConfig, generator: torch.Generator) -> AssignedParts:
    """Give each filter the landmark it stands nearest to, where it follows that better than random peaks do."""
    import torch

    from partlens.metrics.localisation import dead_filters
    from partlens.object_parts.assignment import OTHER, landmark_distances, nearest_landmark, parts_by_landmark

    diagonal = math.hypot(*performer.preprocessing.size_px)
    live = ~dead_filters(seen.peaks)

    def measured(peaks: Peaks, landmarks: Tensor, photos: Tensor) -> tuple[Any, Tensor]:
        return landmark_distances(peaks.positions_px, landmarks, diagonal), _consistency(peaks, landmarks, photos)

    distances, consistency = measured(seen.peaks, seen.landmarks, seen.photos)
    usable = ~consistency.isnan().all(0)
    nearest = nearest_landmark(distances.mean_frac, usable)
    drawn = _null(seen, performer, how, generator)
    null_distances, null_consistency = measured(drawn, seen.landmarks, seen.photos)
    null_nearest = nearest_landmark(null_distances.mean_frac, usable)
    row = torch.arange(len(null_nearest))
    null_r2 = null_consistency[row, null_nearest]
    least = float(torch.quantile(null_r2, how.null_level)) if how.consistency_min is None else how.consistency_min
    limits = {"distance_max_frac": how.distance_max_frac, "consistency_min": least}
    labels = parts_by_landmark(distances, consistency, live, **limits)
    null_labels = parts_by_landmark(null_distances, null_consistency, torch.ones_like(null_nearest) > 0, **limits)

    def assign(rows: Tensor) -> Tensor:
        far, follows = measured(seen.peaks.rows(rows), seen.landmarks[rows], seen.photos[rows])
        if bool(follows.isnan().all()):
            return torch.full_like(labels, OTHER)
        return parts_by_landmark(far, follows, live, **limits)

    index = torch.arange(len(labels))
    mean, deviation = distances.mean_frac[index, nearest], distances.deviation_frac[index, nearest]
    own = consistency[index, nearest]
    # A landmark may be called as the filters are that follow none.
    ids = [f"{name} (landmark)" if name == OTHER_ID else name for name in seen.names]
    filters = [
        {
            "filter": k,
            "part": ids[int(labels[k])] if int(labels[k]) >= 0 else OTHER_ID,
            "nearest": seen.names[int(nearest[k])],
            "distance_frac": round(float(mean[k]), 5),
            "distance_deviation_frac": round(float(deviation[k]), 5),
            "consistency": round(float(own[k]), 5),
            "dead": not bool(live[k]),
        }
        for k in range(len(labels))
    ]
    order = sorted(range(len(seen.names)), key=lambda k: (-int((labels == k).sum()), k))
    records = [
        record_of(seen, performer, ids[k], labels == k, {"distance_frac": mean, "consistency": own})
        for k in order
        if bool(usable[k])
    ]
    records.append(record_of(seen, performer, OTHER_ID, labels == OTHER, {"distance_frac": mean, "consistency": own}))
    level = torch.tensor([1 - how.null_level, how.null_level], dtype=torch.float64)
    nearest_null = null_distances.mean_frac[row, null_nearest]
    return AssignedParts(
        rule="landmarks",
        parts=records,
        filters=filters,
        thresholds={**limits, "consistency_is_measured": how.consistency_min is None},
        null={
            "kind": "random cell per photo",
            "filters": how.null_filters,
            "distance_frac_p05": float(torch.quantile(nearest_null, level[0])),
            "distance_frac_mean": float(nearest_null.mean()),
            "consistency_p95": float(torch.quantile(null_r2, level[1])),
            "kept": float((null_labels >= 0).double().mean()),
        },
        assign=assign,
        matched=False,
    )


def by_clusters(seen: SeenPhotos, performer: Performer, how: PartsConfig, generator: torch.Generator) -> AssignedParts:
    """Group filters by where and on what they fire, where they agree with their group better than random peaks do."""
    import torch

    from partlens.metrics.localisation import dead_filters
    from partlens.object_parts.assignment import (
        OTHER,
        Clusters,
        agreement_thresholds,
        agreement_with_group,
        by_size,
        clustered,
        filter_vectors,
        peak_features,
        place_vectors,
    )

    live = ~dead_filters(seen.peaks)
    drawn = _null(seen, performer, how, generator)

    def grouped(rows: Tensor, fewest: int, most: int) -> tuple[Clusters, Tensor, Tensor, Tensor]:
        cells = seen.peaks.cells[rows]
        vectors = filter_vectors(cells, peak_features(seen.maps[rows], cells), place_weight=how.place_weight)
        groups = clustered(vectors, live, fewest=fewest, most=most)
        place = place_vectors(cells)
        agreement = agreement_with_group(place, groups.labels)
        least = agreement_thresholds(place, groups.labels, place_vectors(drawn.cells[rows]), how.null_level)
        return groups, by_size(torch.where(agreement > least, groups.labels, OTHER)), agreement, least

    every = torch.arange(len(seen.photos))
    groups, labels, agreement, least = grouped(every, how.clusters_min, how.clusters_max)

    def assign(rows: Tensor) -> Tensor:
        return grouped(rows, groups.count, groups.count)[1] if groups.count else labels

    names = [f"part {k + 1}" for k in range(int(labels.max()) + 1)]
    filters = [
        {
            "filter": k,
            "part": names[int(labels[k])] if int(labels[k]) >= 0 else OTHER_ID,
            "agreement": _rounded(agreement[k]),
            "agreement_min": _rounded(least[k]),
            "dead": not bool(live[k]),
        }
        for k in range(len(labels))
    ]
    records = [record_of(seen, performer, n, labels == k, {"agreement": agreement}) for k, n in enumerate(names)]
    records.append(record_of(seen, performer, OTHER_ID, labels == OTHER, {"agreement": agreement}))
    shuffled = _silhouettes_of_chance(seen, live, groups.count, how, generator) if groups.count else []
    low, high = (
        torch.quantile(torch.tensor(shuffled), torch.tensor([0.025, 0.975])).tolist() if shuffled else (math.nan,) * 2
    )
    return AssignedParts(
        rule="clusters",
        parts=records,
        filters=filters,
        thresholds={
            "clusters": groups.count,
            "silhouette": groups.silhouette.get(groups.count, math.nan),
            "silhouette_by_count": {str(k): round(v, 5) for k, v in groups.silhouette.items()},
            "agreement_min_level": how.null_level,
        },
        null={
            "kind": "random cell per photo; for the silhouette every filter's photos shuffled",
            "filters": how.null_filters,
            "silhouette": {
                "value": sum(shuffled) / len(shuffled) if shuffled else math.nan,
                "interval": [low, high],
                "n": len(shuffled),
                "unit": "draws",
            },
        },
        assign=assign,
        matched=True,
    )


def _silhouettes_of_chance(
    seen: SeenPhotos, live: Tensor, count: int, how: PartsConfig, generator: torch.Generator
) -> list[float]:
    """Return the silhouette of as many groups when no filter's peaks belong to the photo they were found in."""
    import torch

    from partlens.object_parts.assignment import clustered, filter_vectors, peak_features

    found = []
    for _ in range(_SILHOUETTE_DRAWS):
        order = torch.rand(seen.peaks.scores.shape, generator=generator).argsort(0)
        cells = seen.peaks.cells.gather(0, order[..., None].expand_as(seen.peaks.cells))
        vectors = filter_vectors(cells, peak_features(seen.maps, cells), place_weight=how.place_weight)
        found.append(clustered(vectors, live, fewest=count, most=count).silhouette[count])
    return found


def _rounded(value: Tensor) -> float:
    return round(float(value), 5)


def record_of(
    seen: SeenPhotos, performer: Performer, name: str, inside: Tensor, scores: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Describe one part: its filters, where they peak, and its mean scores."""
    size = performer.preprocessing.size_px
    place = seen.peaks.positions_px[:, inside].flatten(0, 1)
    means = {k: _rounded(v[inside].nanmean()) if bool(inside.any()) else math.nan for k, v in scores.items()}
    return {
        "id": name,
        "name": name,
        "filters": inside.nonzero()[:, 0].tolist(),
        "n": int(inside.sum()),
        "mean_place_frac": [_rounded(place[:, a].mean() / size[1 - a]) if len(place) else None for a in (0, 1)],
        **means,
    }
