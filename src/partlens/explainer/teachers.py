"""Part teachers: where the parts of a category are, found without labels, and which filter learns to be where.

A layer after the tap sees more of the image and separates the object's regions better than the tap does. The
interpretable track learns to say from the tap's maps alone where these regions are. The parts are found before
(:mod:`partlens.object_parts.finding`); here they are given to filters, and what they teach is a cost. Teaching an
explainer so is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.explainer.network import Explainer
from partlens.explainer.processes import from_all
from partlens.explainer.templates import cell_grid
from partlens.explainer.views import NORM_SAMPLE, TrainingMaps, gather

_BLUR_CELLS = 1.5
_LITTLE = 1e-8
_BUMP = 0.12  # of the side: about the width of a mask

PlaceSource = Callable[[Explainer, TrainingMaps, int], Tensor]
"""Says where the parts of one category are in its photos, (photo, part, 2) as shares of their sides."""


def places_in_view(
    places: Float[Tensor, "photo part 2"], windows: Float[Tensor, "photo 5"]
) -> Float[Tensor, "photo part 2"]:
    """Return where windows take places of the photo, as shares of the view; outside 0 to 1 where it is cut off.

    Example:
        >>> mirror = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]])
        >>> places_in_view(torch.tensor([[[0.5, 0.25]]]), mirror).tolist()
        [[[0.5, 0.75]]]
    """
    left, top, width, height, mirrored = (windows[:, None, k] for k in range(5))
    col = (places[..., 1] - left) / width
    return torch.stack([(places[..., 0] - top) / height, torch.where(mirrored > 0.5, 1 - col, col)], -1)


def places_in_photo(
    places: Float[Tensor, "photo part 2"], windows: Float[Tensor, "photo 5"]
) -> Float[Tensor, "photo part 2"]:
    """Return where places of a view are in the photo; the inverse of :func:`places_in_view`."""
    left, top, width, height, mirrored = (windows[:, None, k] for k in range(5))
    col = torch.where(mirrored > 0.5, 1 - places[..., 1], places[..., 1])
    return torch.stack([top + height * places[..., 0], left + width * col], -1)


def matched_teachers(
    maps: Float[Tensor, "photo filter row col"], places: Float[Tensor, "photo part 2"]
) -> Int[Tensor, " filter"]:
    """Give every filter the teacher at whose place its channel is most active, all teachers as many filters (ours).

    The interpretable track is added to the ordinary one channel by channel: a part in a channel that is active there
    paraphrases it, in any other it is noise. A channel of the ordinary track, after the ReLU, is compared with a bump
    at the teacher's place (Pearson's correlation over all cells of all photos), and the sum over filters is made as
    large as it can be.
    """
    from scipy.optimize import linear_sum_assignment

    filters, (rows, cols) = maps.shape[1], maps.shape[2:]
    grid = (cell_grid(rows, cols, maps) + 0.5) / torch.tensor([rows, cols], device=maps.device)
    far = (places[:, :, None] - grid).square().sum(-1)
    bumps = (-far / (2 * _BUMP**2)).exp().transpose(1, 2).flatten(0, 1)
    values = maps.flatten(2).transpose(1, 2).flatten(0, 1)
    bumps, values = (v - v.mean(0) for v in (bumps, values))
    alike = (values / values.norm(dim=0).clamp(min=1e-12)).T @ (bumps / bumps.norm(dim=0).clamp(min=1e-12))
    parts = places.shape[1]
    seats = torch.arange(filters) % parts  # as many for each, one more for the first
    _, chosen = linear_sum_assignment(-alike[:, seats].cpu().numpy())
    return seats[torch.from_numpy(chosen)]


def place_correlations(
    places: Float[Tensor, "photo part 2"], others: Float[Tensor, "photo other 2"] | None = None
) -> Float[Tensor, "part other"]:
    """Return the correlation of places over photos, the mean of rows and columns, by default among each other."""
    centred = [each - each.mean(0) for each in (places, places if others is None else others)]
    one, other = (each / each.norm(dim=0).clamp(min=_LITTLE) for each in centred)
    return torch.einsum("ipa,iqa->pqa", one, other).mean(-1)


def mean_correlation(places: Float[Tensor, "photo part 2"]) -> float:
    """Return the mean correlation of the places of two different parts; lower is more variety, 0 for a single part."""
    return float(place_correlations(places).fill_diagonal_(math.nan).nanmean().nan_to_num(0.0))


def find_teachers(
    explainer: Explainer, data: TrainingMaps, places_of: PlaceSource
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Find the part teachers of every category and give each filter one.

    Returns:
        ``teachers``, places (photo, teacher, 2) in shares, NaN for photos of other categories, and ``teacher_of``, the
        teacher of each filter of conv-interp-2 for each category (filter, category), since filters change category; and
        the correlation of their places, the mean over categories, for the log.
    """
    found = [places_of(explainer, data, category) for category in range(data.categories)]
    places = torch.full((data.photos, sum(each.shape[1] for each in found), 2), math.nan)
    teacher_of = torch.zeros(explainer.structure.channels_out, data.categories, dtype=torch.long)
    first = 0
    for category, each in enumerate(found):
        own, mine = data.own(category), slice(first, first + each.shape[1])
        places[own, mine] = each
        shown = own[:: max(1, len(own) // NORM_SAMPLE)][:NORM_SAMPLE]
        with torch.no_grad():
            ordinary = explainer.ordinary(gather(data.tap, data.rows(shown))).clamp(min=0)
        teacher_of[:, category] = first + matched_teachers(ordinary, places[shown, mine])
        first = mine.stop
    correlation = sum(mean_correlation(each) for each in found) / data.categories
    return {"teachers": places, "teacher_of": teacher_of}, {"teacher_correlation": correlation}


def _place_posterior(
    maps: Float[Tensor, "image filter row col"],
) -> tuple[Float[Tensor, "image filter cell"], Float[Tensor, "image filter 2"]]:
    """Return the logarithm of the softmax of maps over their cells, and the mean cell (row, col) under it."""
    rows, cols = maps.shape[2:]
    logs = maps.flatten(2).log_softmax(-1)
    return logs, logs.exp() @ cell_grid(rows, cols, logs)


def teacher_cost(
    maps: Float[Tensor, "image filter row col"], wanted: Float[Tensor, "image filter 2"]
) -> Float[Tensor, " filter"]:
    """Return how far filters are from their teachers' places; NaN in ``wanted`` asks for nothing.

    The mean over photos of ``|E mu - mu*|² / 4 + 0.3 H(b, q)``, ``q`` the softmax of the filter's map over its cells:
    the squared distance (cells) between the mean cell and the teacher's place, which makes ``q`` as wide as the place
    is uncertain, and the cross entropy (nats) of ``q`` with the place blurred, which keeps it in one piece.
    """
    rows, cols = maps.shape[2:]
    known = ~wanted.isnan().any(-1)
    target = wanted.nan_to_num()
    logs, mean = _place_posterior(maps)
    row, col = torch.arange(rows).to(logs), torch.arange(cols).to(logs)
    by_row = (-(row - target[..., 0, None]).square() / (2 * _BLUR_CELLS**2)).softmax(-1)
    by_col = (-(col - target[..., 1, None]).square() / (2 * _BLUR_CELLS**2)).softmax(-1)
    blurred = (by_row[..., :, None] * by_col[..., None, :]).flatten(2)
    cost = (mean - target).square().sum(-1) / 4 - 0.3 * (blurred * logs).sum(-1)
    sums = from_all(torch.stack([torch.where(known, cost, 0.0).sum(0), known.to(cost).sum(0)])).sum(0)
    return sums[0] / sums[1].clamp(min=1)
