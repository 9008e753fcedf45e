"""Part teachers: where parts are according to the performer's own later layers, found without labels.

A layer after the tap sees more of the image and separates the object's regions better than the tap does. The
interpretable track learns to say from the tap's maps alone where these regions are:

1. *Candidates.* The later layer's features of the category's photos, cell by cell, are factorised into few non-negative
   parts (Lee & Seung 2001), for several numbers of parts and random shares of the photos. The centroid of a part's
   codes, squared, is its place in a view of a photo.
2. *Selection.* A part must move with the photo. A candidate's cost is the mean squared distance between its place in a
   crop or mirror and where the window takes its place in the photo, over the variance of that place: 0 follows every
   crop, and a place that never moves is as bad as a random one, unlike under the plain distance. The cheapest
   candidates are taken, one by one, each with a penalty for moving like those already taken.
3. *Places.* The places in all views, taken back to the photo, are averaged.

Factorising a layer's cells into object parts follows Collins, Achanta & Süsstrunk, ECCV 2018; choosing the factors by
their equivariance, and teaching an explainer with them, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from partlens.errors import ImageError, expected
from partlens.explainer.network import Explainer
from partlens.explainer.templates import cell_grid, centroid_cells
from partlens.explainer.views import NORM_SAMPLE, TrainingMaps, epoch_generator, gather

_PARTS = (3, 4, 5, 6, 8, 10, 12, 16)
_ROUNDS = 3
_SHARE_OF_PHOTOS = 0.7
_MOST_CELLS = 8000
_PHOTOS_AT_ONCE = 1000
"""Photos whose later maps are in memory together; as many, at most, give the cells that candidates are found in."""
_BLUR_CELLS = 1.5
_FIT_STEPS = 40
_CODE_STEPS = 25
_CODE_CELLS = 65_536
_LITTLE = 1e-8
_BUMP = 0.12  # of the side: about the width of a mask
_STILL = 1e-6  # a thousandth of the side, squared
_VIEWS = 6  # that teachers are chosen by, at most
_LEAST_UPPER_CELLS = 3

Source = Callable[[int], Tensor]
"""Returns where candidates are in a view of a category's photos, (photo, part, 2) as shares of its sides."""

PlaceSource = Callable[[Explainer, TrainingMaps, int, torch.Generator], Source]
"""Finds the candidates of one category in the cached maps."""


@dataclass(frozen=True)
class Teachers:
    """Parts that teach: the mean place over views (row, col) of each in each photo, as shares of its sides.

    ``chosen`` are their numbers among the candidates; ``movement``, lower is better, is the mean squared error of
    moving with crops and mirrors over the variance of the place; ``correlation`` is that of the places of two parts,
    the mean.
    """

    places: Float[Tensor, "photo teacher 2"]
    chosen: tuple[int, ...]
    movement: Float[Tensor, " teacher"]
    correlation: float


def _nonnegative_parts(
    cells: Float[Tensor, "cell filter"], count: int, generator: torch.Generator
) -> Float[Tensor, "part filter"]:
    """Factorise cells into ``count`` non-negative directions by multiplicative steps (Lee & Seung 2001)."""
    scale = float(cells.mean()) + _LITTLE
    codes = torch.rand(len(cells), count, generator=generator).to(cells) * scale
    parts = torch.rand(count, cells.shape[1], generator=generator).to(cells) * scale + _LITTLE
    for _ in range(_FIT_STEPS):  # only candidates are wanted, so the number of steps is fixed
        codes = codes * (cells @ parts.t()) / (codes @ (parts @ parts.t()) + _LITTLE)
        parts = parts * (codes.t() @ cells) / ((codes.t() @ codes) @ parts + _LITTLE)
    return F.normalize(parts, dim=1)


def part_codes(
    maps: Float[Tensor, "image filter row col"], parts: Float[Tensor, "part filter"]
) -> Float[Tensor, "image part row col"]:
    """Return how much of each part every cell holds, all parts competing for it."""
    images, _, rows, cols = maps.shape
    gram = parts @ parts.t()
    found = []
    for cells in maps.permute(0, 2, 3, 1).flatten(0, 2).split(_CODE_CELLS):
        target = cells @ parts.t()
        codes = torch.full_like(target, float(cells.mean()) + _LITTLE)
        for _ in range(_CODE_STEPS):
            codes = codes * target / (codes @ gram + _LITTLE)
        found.append(codes)
    return torch.cat(found).reshape(images, rows, cols, -1).permute(0, 3, 1, 2)


def centroids(codes: Float[Tensor, "image part row col"], power: float = 2.0) -> Float[Tensor, "image part 2"]:
    """Return the centroid (row, col) of codes to a power as shares of the map's sides; its middle for an empty map."""
    shares = (centroid_cells(codes, power) + 0.5) / torch.tensor(codes.shape[2:], device=codes.device)
    return torch.where(codes.amax((2, 3))[..., None] > 0, shares, 0.5)


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
    grid = torch.stack(
        torch.meshgrid(
            (torch.arange(rows, device=maps.device) + 0.5) / rows,
            (torch.arange(cols, device=maps.device) + 0.5) / cols,
            indexing="ij",
        ),
        -1,
    ).reshape(-1, 2)
    far = (places[:, :, None] - grid).square().sum(-1)
    bumps = (-far / (2 * _BUMP**2)).exp().transpose(1, 2).flatten(0, 1)
    values = maps.flatten(2).transpose(1, 2).flatten(0, 1)
    bumps, values = (v - v.mean(0) for v in (bumps, values))
    alike = (values / values.norm(dim=0).clamp(min=1e-12)).T @ (bumps / bumps.norm(dim=0).clamp(min=1e-12))
    parts = places.shape[1]
    seats = torch.arange(filters) % parts  # as many for each, one more for the first
    _, chosen = linear_sum_assignment(-alike[:, seats].cpu().numpy())
    return seats[torch.from_numpy(chosen)]


def place_correlations(places: Float[Tensor, "photo part 2"]) -> Float[Tensor, "part part"]:
    """Return the correlation of the places of two parts over photos, the mean of rows and columns."""
    centred = places - places.mean(0)
    unit = centred / centred.norm(dim=0).clamp(min=_LITTLE)
    return torch.einsum("ipa,iqa->pqa", unit, unit).mean(-1)


def mean_correlation(alike: Float[Tensor, "part part"]) -> float:
    """Return the mean correlation of two different parts (:func:`place_correlations`); 0 for a single part."""
    pairs = len(alike) * (len(alike) - 1)
    return float(alike.sum() - alike.diagonal().sum()) / pairs if pairs else 0.0


class LaterParts:
    """Non-negative parts of a later layer: candidates to teach.

    ``view`` returns the later layer's maps (at least 0) of some photos in a view; view 0 is the whole photo. Each of
    ``sizes`` is a number of parts that share the cells.
    """

    def __init__(
        self,
        view: Callable[[Int[Tensor, " photo"], int], Float[Tensor, "photo filter row col"]],
        photos: int,
        generator: torch.Generator,
        sizes: Sequence[int] = _PARTS,
    ) -> None:
        self.view = view
        self.everyone = torch.arange(photos)
        few = photos <= _PHOTOS_AT_ONCE
        sample = self.everyone if few else torch.randperm(photos, generator=generator)[:_PHOTOS_AT_ONCE].sort().values
        whole = view(sample, 0).clamp(min=0)
        if not bool(whole.any()):
            raise ImageError(
                expected("a later layer that activates on the photos", "zeros only", "Check the performer")
            )
        self.dictionaries = []
        for parts in sizes:
            for _ in range(_ROUNDS):
                chosen = torch.rand(len(sample), generator=generator) < _SHARE_OF_PHOTOS
                cells = whole[chosen if int(chosen.sum()) > 1 else slice(None)].permute(0, 2, 3, 1).flatten(0, 2)
                cells = cells[torch.randperm(len(cells), generator=generator)[:_MOST_CELLS]]
                self.dictionaries.append(_nonnegative_parts(cells, parts, generator))

    def __call__(self, number: int) -> Float[Tensor, "photo part 2"]:
        """Return the places of all candidates in a view, as shares of its sides."""
        found = []
        for some in self.everyone.split(_PHOTOS_AT_ONCE):
            # Cells lie side by side in memory, so that no dictionary copies them.
            maps = self.view(some, number).clamp(min=0).contiguous(memory_format=torch.channels_last)
            found.append(torch.cat([centroids(part_codes(maps, parts)) for parts in self.dictionaries], 1))
        return torch.cat(found)


def followed(
    source: Source, windows: Float[Tensor, "photo view 5"]
) -> tuple[Float[Tensor, "photo part 2"], Float[Tensor, "photo part 2"], Float[Tensor, " part"]]:
    """Return where candidates are in the whole photos and in the mean of all views, and how they move with the views.

    ``source`` says where candidates are in a view, ``windows`` how each view was cut, view 0 being the whole photo.
    """
    photos, views, _ = windows.shape
    if photos < 4:
        raise ImageError(expected("at least 4 photos to find parts in", int(photos), "Add photos"))
    first = source(0)
    sums, error = first.clone(), torch.zeros(first.shape[1])
    for number in range(1, views):
        seen = source(number)
        wanted = places_in_view(first, windows[:, number])
        inside = ((wanted > 0) & (wanted < 1)).all(-1).to(seen.dtype)
        missed = (seen - wanted).square().sum(-1)
        error += (missed * inside).sum(0) / inside.sum(0).clamp(min=1) / (views - 1)
        sums += places_in_photo(seen, windows[:, number])
    # A place that never moves misses nothing and has no variance: 1, no better than one that moves at random.
    movement = (error + _STILL) / (first.var(0).sum(-1) + _STILL)
    return first, sums / views, movement


def part_teachers(source: Source, windows: Float[Tensor, "photo view 5"], count: int, variety: float) -> Teachers:
    """Choose ``count`` parts that move with the photo, best first, or all where there are fewer candidates.

    A part pays ``variety`` for the mean correlation of its place with the places already chosen; for the rest see
    :func:`followed`.
    """
    _, places, movement = followed(source, windows)
    alike = place_correlations(places)
    taken: list[int] = []
    for _ in range(min(count, len(movement))):
        cost = movement + (variety * alike[:, taken].mean(1) if taken else 0.0)
        cost[taken] = torch.inf
        taken.append(int(cost.argmin()))
    return Teachers(places[:, taken], tuple(taken), movement[taken], mean_correlation(alike[taken][:, taken]))


def later_places(explainer: Explainer, data: TrainingMaps, category: int, generator: torch.Generator) -> Source:
    """Return where parts of what comes after the tap are, the candidates of one category.

    After the tap comes, where the tracks replace a convolution, that convolution; elsewhere the last target that has
    maps of at least 3x3 cells, and the tap itself where none has.
    """
    own = data.own(category)
    spare = explainer.structure.spare_rows[1:] or (0,) * len(data.targets)
    mapped = [(t, t.shape[2] - rows) for t, rows in zip(data.targets, spare, strict=True) if t.ndim == 4]
    large = [(t, rows) for t, rows in mapped if min(rows, t.shape[3]) >= _LEAST_UPPER_CELLS]
    upper, upper_rows = large[-1] if large else (data.tap, explainer.structure.side_cells[0])

    def view(photos: Tensor, number: int) -> Tensor:
        rows = data.rows(own[photos], number)
        if explainer.structure.replaced is None:
            return gather(upper, rows)[:, :, :upper_rows]
        pieces = np.array_split(rows, max(1, math.ceil(len(rows) / NORM_SAMPLE)))
        with torch.no_grad():
            return torch.cat([explainer.ordinary(gather(data.tap, piece)) for piece in pieces])

    return LaterParts(view, len(own), generator)


def find_teachers(
    explainer: Explainer, data: TrainingMaps, places_of: PlaceSource = later_places
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Find the part teachers of every category and give each filter one.

    Returns:
        ``teachers``, places (photo, teacher, 2) in shares, NaN for photos of other categories, and ``teacher_of``, the
        teacher of each filter of conv-interp-2 for each category (filter, category), since filters change category; and
        what was found, for the log.
    """
    config, filters = explainer.config, explainer.structure.channels_out
    places = torch.full((data.photos, config.teachers * data.categories, 2), math.nan)
    teacher_of = torch.zeros(filters, data.categories, dtype=torch.long)
    found = {"teacher_movement": 0.0, "teacher_correlation": 0.0}
    for category in range(data.categories):
        own = data.own(category)
        source = places_of(explainer, data, category, epoch_generator(config.seed, -1 - category))
        views = min(data.views, _VIEWS)
        teachers = part_teachers(source, data.windows[own, :views], config.teachers, config.teacher_variety)
        mine = slice(category * config.teachers, category * config.teachers + teachers.places.shape[1])
        places[own, mine] = teachers.places
        shown = own[:: max(1, len(own) // NORM_SAMPLE)][:NORM_SAMPLE]
        with torch.no_grad():
            ordinary = explainer.ordinary(gather(data.tap, data.rows(shown))).clamp(min=0)
        teacher_of[:, category] = mine.start + matched_teachers(ordinary, places[shown, mine])
        found["teacher_movement"] += float(teachers.movement.mean()) / data.categories
        found["teacher_correlation"] += teachers.correlation / data.categories
    return {"teachers": places, "teacher_of": teacher_of}, found


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
    return torch.where(known, cost, torch.zeros_like(cost)).sum(0) / known.sum(0).clamp(min=1)
