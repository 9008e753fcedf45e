"""Which part each filter of the last interpretable layer holds: the nearest landmark, or a group found without any.

The papers assign filters to head, neck, torso and other by hand (ICLR 2020, Fig. 5 and App. D). Here are two rules
that need no hand, and a person names or joins what they give:

- *landmarks*: the landmark that the filter's peak is nearest to on average, unless it is far from all of them or its
  peak does not predict that landmark's position better than a random peak would;
- *clusters*: filters that move together over the photos and respond to similar features of the performer.

A filter that fits nowhere, or is dead, belongs to "other" (:data:`OTHER`). Everything here takes tensors; the scores
that say how far an assignment can be trusted are in :mod:`partlens.object_parts.trust`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected

OTHER = -1
"""The label of a filter without a part."""

# --- with landmarks ---------------------------------------------------------------------------------------------------


def landmark_distances(
    positions_px: Float[Tensor, "image filter 2"],
    landmarks_px: Float[Tensor, "photo landmark 2"],
    diagonal_px: float,
) -> Float[Tensor, "filter landmark"]:
    """Return the mean distance of every filter's peak to every landmark, over the photos that show it.

    In shares of the input's diagonal; NaN where no photo shows the landmark.

    Raises:
        InputError: peaks and landmarks of different numbers of images.
    """
    if positions_px.shape[0] != landmarks_px.shape[0]:
        rule = f"landmarks of {positions_px.shape[0]} images like the peaks"
        raise InputError(expected(rule, int(landmarks_px.shape[0]), "Select the same photos for both"))
    truth = landmarks_px.double()
    shown = ~truth.isnan().any(-1)  # [image, landmark]
    apart = (positions_px.double()[:, :, None] - truth.nan_to_num(0.0)[:, None]).norm(dim=-1) / diagonal_px
    count = shown.sum(0)
    return torch.where(count > 0, (apart * shown[:, None].double()).sum(0) / count, math.nan)


def nearest_landmark(
    mean_frac: Float[Tensor, "filter landmark"], usable: Bool[Tensor, " landmark"]
) -> Int[Tensor, " filter"]:
    """Return the usable landmark with the smallest mean distance.

    Raises:
        InputError: no landmark is usable.
    """
    if not bool(usable.any()):
        raise InputError(expected("a landmark that enough photos show", "none", "Use rule clusters"))
    return torch.where(usable, mean_frac.nan_to_num(math.inf), math.inf).argmin(1)


def parts_by_landmark(
    distances: Float[Tensor, "filter landmark"],
    consistency: Float[Tensor, "filter landmark"],
    live: Bool[Tensor, " filter"],
    *,
    distance_max_frac: float,
    consistency_min: float,
) -> Int[Tensor, " filter"]:
    """Assign each filter to its nearest landmark, or to :data:`OTHER`.

    A filter is "other" if it activates on no photo, if the landmark is farther than ``distance_max_frac``, or if the
    peak predicts it no better than ``consistency_min``. A landmark whose R² is NaN for all filters is no candidate.

    Example:
        >>> d = torch.tensor([[0.1, 0.3], [0.1, 0.3], [0.4, 0.3]])
        >>> r2 = torch.tensor([[0.6, 0.1], [0.0, 0.5], [0.6, 0.6]])
        >>> rule = {"distance_max_frac": 0.2, "consistency_min": 0.05}
        >>> parts_by_landmark(d, r2, torch.tensor([True, True, True]), **rule).tolist()
        [0, -1, -1]
    """
    usable = ~consistency.isnan().all(0)
    nearest = nearest_landmark(distances, usable)
    row = torch.arange(len(nearest))
    near = distances[row, nearest] <= distance_max_frac
    follows = consistency[row, nearest] > consistency_min
    return torch.where(live & near & follows, nearest, OTHER)


# --- without landmarks ------------------------------------------------------------------------------------------------


def peak_features(
    maps: Float[Tensor, "image channel row col"], cells: Float[Tensor, "image filter 2"]
) -> Float[Tensor, "filter channel"]:
    """Return the mean over photos of the performer's features in the cell where each filter peaks."""
    nearest = cells.round().long()
    index = nearest[..., 0] * maps.shape[3] + nearest[..., 1]  # [image, filter]
    total = maps.new_zeros(cells.shape[1], maps.shape[1], dtype=torch.float64)
    for one, place in zip(maps.flatten(2), index, strict=True):  # photo by photo: all at once would be image x filter
        total += one[:, place].T
    return total / maps.shape[0]


def _unit(rows: Tensor) -> Tensor:
    norm = rows.norm(dim=1, keepdim=True)
    return torch.where(norm > 1e-9, rows / norm.clamp(min=1e-9), 0.0)


def place_vectors(cells: Float[Tensor, "image filter 2"]) -> Float[Tensor, "filter value"]:
    """Return each filter's peak positions over the photos, centred and of length 1.

    Rows and columns are centred each by its own mean, so that the product of two vectors is the correlation of two
    filters' movements over both axes; a peak that never moves gives zeros.
    """
    moved = (cells - cells.mean(0)).double()
    return _unit(moved.permute(1, 0, 2).flatten(1))


def filter_vectors(
    cells: Float[Tensor, "image filter 2"], features: Float[Tensor, "filter channel"]
) -> Float[Tensor, "filter value"]:
    """Return one vector per filter whose squared distance is ``(1 - corr) + (1 - cos)``.

    ``corr`` is the correlation of the peaks' movements (:func:`place_vectors`), ``cos`` the cosine of the features at
    the peaks, less their mean over the filters: features after a ReLU all point one way, only what differs tells
    parts apart.
    """
    place = place_vectors(cells)
    content = _unit((features - features.mean(0)).double())
    return math.sqrt(0.5) * torch.cat([place, content], 1)


@dataclass(frozen=True)
class Clusters:
    """Groups of filters."""

    labels: Int[Tensor, " filter"]  # group of each filter by size, the largest 0; OTHER without one
    # mean silhouette of the groups (-1 to 1, higher is more distinct) by number of groups tried
    silhouette: dict[int, float]
    count: int  # number of groups with the highest silhouette


def by_size(labels: Int[Tensor, " filter"]) -> Int[Tensor, " filter"]:
    """Number groups anew by size, the largest 0; of equals the one with the first filter. :data:`OTHER` stays.

    Example:
        >>> by_size(torch.tensor([3, 7, 7, -1])).tolist()
        [1, 0, 0, -1]
    """
    found, counts = labels[labels >= 0].unique(return_counts=True)
    first = torch.tensor([int((labels == k).nonzero()[0]) for k in found.tolist()], dtype=torch.long)
    order = sorted(range(len(found)), key=lambda i: (-int(counts[i]), int(first[i])))
    result = torch.full_like(labels, OTHER)
    for new, old in enumerate(order):
        result[labels == found[old]] = new
    return result


def clustered(
    vectors: Float[Tensor, "filter value"], live: Bool[Tensor, " filter"], *, fewest: int = 3, most: int = 8
) -> Clusters:
    """Group the live filters by Ward's agglomerative clustering; the number of groups is that of the best silhouette.

    There are none where fewer than ``fewest + 1`` filters are alive.
    """
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    labels = torch.full((vectors.shape[0],), OTHER, dtype=torch.long)
    rows = vectors[live].numpy()
    tried: dict[int, tuple[float, Any]] = {}
    for count in range(fewest, min(most, len(rows) - 1) + 1):
        found = AgglomerativeClustering(n_clusters=count, linkage="ward").fit_predict(rows)
        tried[count] = (float(silhouette_score(rows, found)), found)
    if not tried:
        return Clusters(labels, {}, 0)
    best = max(tried, key=lambda count: tried[count][0])
    labels[live] = torch.from_numpy(tried[best][1]).long()
    return Clusters(by_size(labels), {count: score for count, (score, _) in tried.items()}, best)


def agreement_with_group(
    place: Float[Tensor, "filter value"], labels: Int[Tensor, " filter"]
) -> Float[Tensor, " filter"]:
    """Return the mean correlation of each filter's movements with those of the others in its group.

    From -1 to 1; NaN for a filter without a group, and for one that is alone in its group.
    """
    result = torch.full((len(labels),), math.nan, dtype=torch.float64)
    for label in labels[labels >= 0].unique().tolist():
        inside = labels == label
        size = int(inside.sum())
        if size > 1:
            own = place[inside]
            result[inside] = (own @ own.sum(0) - own.square().sum(1)) / (size - 1)
    return result


def agreement_thresholds(
    place: Float[Tensor, "filter value"],
    labels: Int[Tensor, " filter"],
    null_place: Float[Tensor, "drawn value"],
    level: float,
) -> Float[Tensor, " filter"]:
    """Return for each filter the agreement with its group that a random peak reaches with probability ``1 - level``.

    NaN for a filter without a group.
    """
    result = torch.full((len(labels),), math.nan, dtype=torch.float64)
    for label in labels[labels >= 0].unique().tolist():
        inside = labels == label
        result[inside] = torch.quantile(null_place @ place[inside].mean(0), level)
    return result


# --- where in the photo -----------------------------------------------------------------------------------------------


def upsampled(
    maps: Float[Tensor, "image part row col"],
    start_px: tuple[float, float],
    stride_px: tuple[float, float],
    size_px: tuple[int, int],
) -> Float[Tensor, "image part input_row input_col"]:
    """Bring maps to the input's size, each cell's value at the middle of its receptive field, bilinear in between."""
    grids = []
    for axis in (0, 1):
        middle = torch.arange(size_px[axis], dtype=maps.dtype) + 0.5
        cell = (middle - start_px[axis]) / stride_px[axis]
        grids.append(2 * cell / max(maps.shape[2 + axis] - 1, 1) - 1)
    grid = torch.stack(torch.meshgrid(*grids, indexing="ij")[::-1], -1)
    return torch.nn.functional.grid_sample(
        maps, grid.expand(maps.shape[0], *grid.shape), mode="bilinear", padding_mode="border", align_corners=True
    )
