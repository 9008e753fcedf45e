"""Teachers from the tap: parts that the tap's own features vote for, found without labels.

They are better than the later layer's parts on AlexNet's birds, and hardly anywhere else::

    fit_explainer("partlens-papers:alexnet-caffe", birds, out="runs/birds", places_of=tap_places)

1. *Candidates.* Features of the category's photos, averaged over 3x3 cells and whitened by the covariance of all
   photos' features, are clustered by spherical k-means, for several numbers of clusters and random shares of the
   photos. Only the half of the cells that a linear discriminant finds most typical of the category take part. A cluster
   centre is a linear part detector (a discriminant against everything else in the photos).
2. *Selection.* Two ranks, both without labels, are added: how exactly a candidate's peak moves with crops and mirrors
   of the photo, and how much stronger its response is to photos of the category than to others (area under the curve).
3. *Votes.* A part is the average, after the mask, of the candidates whose peaks move most like its own.

Whitened (linear discriminant) detectors follow Hariharan, Malik & Ramanan, ECCV 2012; the rest is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from partlens.errors import ImageError, expected
from partlens.explainer.network import Explainer
from partlens.explainer.teachers import places_in_view
from partlens.explainer.templates import PEAK_POWER, mask_at_peak, peak_cells, peak_masks
from partlens.explainer.views import NORM_SAMPLE, TrainingMaps, epoch_generator, gather
from partlens.object_parts.candidates import centroids, chosen_parts
from partlens.object_parts.inspection import FindingConfig

CLUSTERS = (6, 8, 12, 16)
ROUNDS = 12
SHARE_OF_PHOTOS = 0.7
SHRINKAGE = 0.05
MOST_PHOTOS = 400
_VIEWS = 5
_VOTERS = 256
_VOTES = 128
_CANDIDATES = 16 * _VOTERS
_FAR_CELLS = 5.0
_AT_ONCE = 256


def _smooth(maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image filter row col"]:
    """Average over 3x3 cells with zeros outside, what a 3x3 convolution of equal weights sees."""
    return F.avg_pool2d(maps, 3, 1, padding=1)


def _cells(maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "cell filter"]:
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def _spherical_means(
    points: Float[Tensor, "cell filter"], count: int, generator: torch.Generator
) -> Float[Tensor, "cluster filter"]:
    """Cluster unit vectors by cosine (Lloyd's iteration from random points)."""
    centres = points[torch.randperm(points.shape[0], generator=generator)[:count]]
    for _ in range(ROUNDS):
        nearest = (points @ centres.t()).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return centres


def _areas(
    positive: Float[Tensor, "image filter"], negative: Float[Tensor, "other filter"]
) -> Float[Tensor, " filter"]:
    """Area under the receiver operating curve of every filter's peak, category against others (Mann-Whitney)."""
    stacked = torch.cat([positive, negative])
    ranks = stacked.argsort(0).argsort(0).double() + 1
    count, others = positive.shape[0], negative.shape[0]
    return ((ranks[:count].sum(0) - count * (count + 1) / 2) / (count * others)).float()


def _rank(values: Float[Tensor, " filter"]) -> Float[Tensor, " filter"]:
    return values.argsort(stable=True).argsort(stable=True).float() / max(1, values.numel() - 1)


def _peaks_of(
    detectors: Float[Tensor, "candidate filter"],
    mean: Float[Tensor, " filter"],
    maps: Float[Tensor, "image filter row col"],
) -> tuple[Float[Tensor, "image candidate 2"], Float[Tensor, "image candidate"]]:
    """Return peak cells and peak values of detectors; some hundred detectors at a time, to bound the memory."""
    smooth = _smooth(maps)
    places, values = [], []
    for part in detectors.split(_AT_ONCE):
        answer = torch.einsum("kf,ifrc->ikrc", part, smooth)
        index = peak_cells(answer)
        places.append(torch.stack([index // maps.shape[3], index % maps.shape[3]], -1).float())
        values.append(answer.flatten(2).amax(-1) - part @ mean)
    return torch.cat(places, 1), torch.cat(values, 1)


def _movement_error(
    first: Float[Tensor, "image filter 2"],
    second: Float[Tensor, "image filter 2"],
    windows: Float[Tensor, "image 5"],
    side: tuple[int, int],
) -> Float[Tensor, "image filter"]:
    """Distance in cells, at most 5, between a view's peak and where its window puts the photo's; NaN where cut off."""
    rows, cols = side
    y, x = places_in_view((first + 0.5) / torch.tensor(side, dtype=first.dtype), windows).unbind(-1)
    error = torch.hypot((second[..., 1] + 0.5) - x * cols, (second[..., 0] + 0.5) - y * rows).clamp(max=_FAR_CELLS)
    inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
    return torch.where(inside, error, math.nan)


def part_candidates(
    photos: Float[Tensor, "image filter row col"],
    others: Float[Tensor, "other filter row col"],
    count: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "candidate filter"], Float[Tensor, " filter"]]:
    """Cluster the tap's features into linear part detectors.

    Args:
        photos: tap maps of photos of the category.
        others: tap maps of other photos; may be empty, then the category's own mean is taken.
        count: detectors wanted, at least.
        generator: source of the draws.

    Returns:
        The detectors and the mean feature they are applied after.
    """
    own = _cells(_smooth(photos))
    rest = _cells(_smooth(others)[:, :, ::3, ::3]) if others.shape[0] else own
    everything = torch.cat([own, rest])
    mean = everything.mean(0)
    centred = everything - mean
    covariance = centred.t() @ centred / centred.shape[0]
    covariance += SHRINKAGE * covariance.diagonal().mean() * torch.eye(covariance.shape[0])
    values, vectors = torch.linalg.eigh(covariance.double())
    white = (vectors @ torch.diag(values.clamp(min=1e-12).rsqrt()) @ vectors.t()).float()
    direction = torch.linalg.solve(covariance, own.mean(0) - rest.mean(0))
    typical = own @ direction if others.shape[0] else own.norm(dim=1)
    kept = typical >= typical.median()
    points = F.normalize((own - mean) @ white, dim=1)
    per_photo = photos.shape[2] * photos.shape[3]
    found: list[Tensor] = []
    while sum(f.shape[0] for f in found) < count:
        chosen = torch.rand(photos.shape[0], generator=generator) < SHARE_OF_PHOTOS
        used = points[kept & chosen.repeat_interleave(per_photo)]
        if used.shape[0] <= max(CLUSTERS):
            used = points[kept]
        found.extend(_spherical_means(used, k, generator) @ white for k in CLUSTERS)
    return torch.cat(found), mean


@dataclass(frozen=True)
class VotedParts:
    """Part candidates of the tap's features and who votes with whom.

    Attributes:
        detectors: linear detectors, each over the mean of its peaks.
        bias: of each detector, so that it is 0 at the mean feature.
        votes: how much each detector counts for each part; rows sum to 1.
        found: what was found, for the log.
    """

    detectors: Float[Tensor, "voter filter"]
    bias: Float[Tensor, " voter"]
    votes: Float[Tensor, "part voter"]
    found: dict[str, float]

    def maps(self, maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image part row col"]:
        """Return where the parts are located: the votes of their detectors."""
        answers = torch.einsum("vf,ifrc->ivrc", self.detectors, _smooth(maps)) + self.bias[:, None, None]
        masked = mask_at_peak(answers.relu(), peak_masks(*maps.shape[2:]).to(maps))
        return torch.einsum("pv,ivrc->iprc", self.votes, _smooth(masked))


@torch.no_grad()
def voted_parts(
    views: Float[Tensor, "view image filter row col"],
    windows: Float[Tensor, "view image 5"],
    others: Float[Tensor, "other filter row col"],
    generator: torch.Generator,
    *,
    voters: int,
    parts: int,
    candidates: int,
    votes: int,
) -> VotedParts:
    """Find part candidates and let those that move alike vote together.

    Args:
        views: tap maps of photos of the category; view 0 is the whole photo, the others are its mirror and crops.
        windows: how each view was cut.
        others: tap maps of other photos; may be empty.
        generator: source of the draws.
        voters: detectors that are kept.
        parts: parts that are voted for.
        candidates: detectors to choose from, at least.
        votes: detectors that vote for one part.

    Returns:
        The parts; ``found`` holds the candidates tried, and mean movement error (cells) and mean area under the curve
        of those kept.

    Raises:
        ImageError: fewer than four photos.
    """
    if views.shape[1] < 4:
        raise ImageError(expected("at least 4 photos to find parts in", int(views.shape[1]), "Add photos"))
    side = (int(views.shape[3]), int(views.shape[4]))
    detectors, mean = part_candidates(views[0], others, candidates, generator)
    at, peaks = _peaks_of(detectors, mean, views[0])
    errors = torch.cat(
        [
            _movement_error(at, _peaks_of(detectors, mean, views[v])[0], windows[v], side)
            for v in range(1, views.shape[0])
        ]
        or [torch.zeros_like(peaks)]
    )
    moved = errors.nanmean(0).nan_to_num(_FAR_CELLS)
    area = _areas(peaks, _peaks_of(detectors, mean, others)[1]) if others.shape[0] else torch.full_like(moved, 0.5)
    cost = _rank(moved) - _rank(area)
    order = cost.argsort(stable=True)
    chosen = order[torch.arange(voters) % order.numel()]
    strength = peaks.mean(0)[chosen].clamp(min=1e-6)
    return VotedParts(
        detectors[chosen] / strength[:, None],
        -(detectors[chosen] @ mean) / strength,
        _votes(at[:, chosen], at[:, order[torch.arange(parts) % order.numel()]], votes),
        {
            "candidates": float(detectors.shape[0]),
            "movement_error_cells": float(moved[chosen].mean()),
            "category_auc": float(area[chosen].mean()),
        },
    )


def _votes(
    voters: Float[Tensor, "image voter 2"], filters: Float[Tensor, "image filter 2"], count: int
) -> Float[Tensor, "filter voter"]:
    """Weigh for each filter the ``count`` voters whose peaks move most like its own, by squared correlation."""

    def standard(peaks: Tensor) -> Tensor:
        return (peaks - peaks.mean(0)) / peaks.std(0).clamp(min=1e-3)

    alike = torch.einsum("ifa,iva->fv", standard(filters), standard(voters)) / (2 * (voters.shape[0] - 1))
    best: tuple[Tensor, Int[Tensor, "filter vote"]] = alike.topk(min(count, alike.shape[1]), dim=1)
    weights = torch.zeros_like(alike).scatter_(1, best[1], best[0].clamp(min=1e-3).square())
    return weights / weights.sum(1, keepdim=True)


def tap_parts(data: TrainingMaps, category: int, generator: torch.Generator) -> VotedParts:
    """Find the parts of one category that the tap's own features vote for."""
    own = data.own(category)
    photos = own[torch.randperm(len(own), generator=generator)[:MOST_PHOTOS]].sort().values
    views = min(_VIEWS, data.views)
    maps = torch.stack([gather(data.tap, data.rows(photos, view)) for view in range(views)])
    strangers = (data.labels != category).nonzero()[:, 0]
    rest = np.concatenate([data.background_rows, data.rows(strangers)])
    others = rest[:: max(1, len(rest) // (2 * MOST_PHOTOS))][: 2 * MOST_PHOTOS]
    return voted_parts(
        maps,
        data.windows[photos, :views].transpose(0, 1),
        gather(data.tap, others),
        generator,
        voters=_VOTERS,
        parts=_VOTERS,
        candidates=_CANDIDATES,
        votes=_VOTES,
    )


def tap_places(explainer: Explainer, data: TrainingMaps, category: int) -> Float[Tensor, "photo part 2"]:
    """Return where the parts of the tap are: a source of places for :func:`partlens.fit_explainer`."""
    generator = epoch_generator(explainer.config.seed, -1 - category)
    parts, own = tap_parts(data, category, generator), data.own(category)

    def places(number: int) -> Tensor:
        rows = data.rows(own, number)
        pieces = np.array_split(rows, max(1, math.ceil(len(rows) / NORM_SAMPLE)))
        with torch.no_grad():
            return torch.cat([centroids(parts.maps(gather(data.tap, piece)), PEAK_POWER) for piece in pieces])

    return chosen_parts(places, data.windows[own], explainer.config.teachers, FindingConfig().variety).places
