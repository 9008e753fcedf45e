"""Where filters peak, and whether that place is a part: location instability and the scores that keep it honest.

Location instability alone is won by filters that hold nothing: a peak that never leaves the image centre scores 0.068
on thirty ILSVRC categories, better than every published network. So every function here measures one thing that
instability cannot see, and :func:`localisation_scores` returns them together.

All functions take peaks and landmarks in one frame (pixels of the network's input, x to the right, y down).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.estimate import Estimate, bootstrap, percentile_interval, resampler
from partlens.metrics.scores import LocalisationScores

TOP_IMAGES = 100
"""Images with the highest peaks that enter location instability (CVPR 2018, Sec. 5.2.2)."""

FOLDS = 5
_ROUNDING = 1e-5
_DISTINCT_CELLS = 1.0  # filters whose peaks are one cell apart are alike by exp(-1/2)
_STILL_CELLS = 1e-9


@dataclass(frozen=True)
class Peaks:
    """Peaks of every filter on every image."""

    # row and column of the peak (image, filter, 2): a cell, or a place between cells
    cells: Float[Tensor, "image filter 2"]
    # x, y of the centre of that cell's receptive field in the input (image, filter, 2)
    positions_px: Float[Tensor, "image filter 2"]
    scores: Float[Tensor, "image filter"]  # value at the peak (image, filter); 0 where the map is empty
    side_cells: tuple[int, int]  # rows and columns of the map

    def rows(self, index: Int[Tensor, " row"]) -> Peaks:
        """Return the peaks of chosen images, repeats allowed."""
        return Peaks(self.cells[index], self.positions_px[index], self.scores[index], self.side_cells)

    def filters(self, index: Int[Tensor, " filter"]) -> Peaks:
        """Return the peaks of chosen filters."""
        return Peaks(self.cells[:, index], self.positions_px[:, index], self.scores[:, index], self.side_cells)


def peaks_from_cells(
    cells: Int[Tensor, "image filter 2"] | Float[Tensor, "image filter 2"],
    scores: Float[Tensor, "image filter"],
    side_cells: tuple[int, int],
    start_px: tuple[float, float],
    stride_px: tuple[float, float],
) -> Peaks:
    """Build :class:`Peaks` from peak cells (row, col), or places between cells, and their scores."""
    grid = cells.double()
    xy = torch.stack([start_px[1] + grid[..., 1] * stride_px[1], start_px[0] + grid[..., 0] * stride_px[0]], -1)
    return Peaks(grid, xy, scores.double(), side_cells)


def _check(peaks: Peaks, landmarks_px: Tensor) -> None:
    if landmarks_px.shape[0] != peaks.cells.shape[0]:
        rule = f"landmarks of {peaks.cells.shape[0]} images like the peaks"
        raise InputError(expected(rule, int(landmarks_px.shape[0]), "Select the same photos for both"))


def dead_filters(peaks: Peaks) -> Bool[Tensor, " filter"]:
    """Return which filters never activate: their peak is not above 0 on any image."""
    return peaks.scores.amax(0) <= 0


def _silent_share(peaks: Peaks) -> float:
    """Return the share of pairs of a filter and an image where the map is empty; its peak is then cell (0, 0)."""
    return float((peaks.scores <= 0).double().mean())


def instability_per_filter(
    peaks: Peaks,
    landmarks_px: Float[Tensor, "photo landmark 2"],
    input_size_px: tuple[int, int],
    top: int = TOP_IMAGES,
) -> Float[Tensor, " filter"]:
    """Return each filter's location instability, the mean over landmarks of ``D_{f,k}``.

    ``d_I = |p_k - p(mu^)| / sqrt(w² + h²)`` on each image that has landmark ``k``, and ``D_{f,k}`` is the standard
    deviation (N - 1) of ``d_I`` over the ``top`` such images with the highest peaks. Range 0 (the peak keeps its
    distance to every landmark) to about 0.2; lower is more stable. Source: CVPR 2018, Sec. 5.2.2; the released code
    agrees (N - 1, images with one instance of the landmark only).

    Args:
        peaks: of every filter on every image.
        landmarks_px: x, y in the same frame; NaN where absent or present more than once.
        input_size_px: rows and columns of the input (``h``, ``w``).
        top: images taken per filter and landmark; fewer where fewer have the landmark.

    Returns:
        One value per filter, NaN where no landmark occurs on at least two images.
    """
    _check(peaks, landmarks_px)
    diagonal = math.hypot(*input_size_px)
    per_landmark = []
    for landmark in range(landmarks_px.shape[1]):
        truth = landmarks_px[:, landmark].double()
        present = ~truth.isnan().any(-1)
        if int(present.sum()) < 2:
            per_landmark.append(torch.full((peaks.scores.shape[1],), math.nan, dtype=torch.float64))
            continue
        distance = (peaks.positions_px[present] - truth[present][:, None]).norm(dim=-1) / diagonal
        order = peaks.scores[present].argsort(dim=0, descending=True, stable=True)[:top]
        per_landmark.append(distance.gather(0, order).std(0))
    return torch.stack(per_landmark).nanmean(0) if per_landmark else torch.full((peaks.scores.shape[1],), math.nan)


def spread_per_filter(peaks: Peaks) -> Float[Tensor, " filter"]:
    """Return how far each filter's peak moves: the root mean square over both axes of its standard deviation, in cells.

    0 for a peak that never moves, 4.03 for a uniformly random cell of a 14x14 map. (The root of the *sum* of both
    variances would be larger by ``sqrt 2``; this is the stricter reading.)
    """
    return peaks.cells.var(0, unbiased=True).mean(-1).sqrt()


def _r2(
    error: Float[Tensor, "image landmark filter"],
    total: Float[Tensor, "image landmark"],
    weights: Float[Tensor, " image"],
) -> Float[Tensor, "landmark filter"]:
    """Return R² over photos that count as often as ``weights`` says, at least -1; NaN where nothing varies."""
    of_all = weights @ total
    score = 1 - torch.einsum("i,ilf->lf", weights, error) / torch.where(of_all > 0, of_all, math.nan)[:, None]
    # A peak that never moves predicts exactly the mean; what rounding leaves of that is not a score.
    return torch.where(score.abs() < _ROUNDING, 0.0, score).clamp(min=-1)


def _missed_by(
    peaks: Float[Tensor, "image filter 2"], truth: Float[Tensor, "image 2"], photos: Int[Tensor, " image"]
) -> tuple[Float[Tensor, "image filter"], Float[Tensor, " image"]]:
    """Fit a landmark's x, y by the peak's x, y in folds of photos: squared errors, and those of the mean."""
    count, filters = peaks.shape[:2]
    fold = photos % FOLDS
    design = torch.cat([peaks, peaks.new_ones(count, filters, 1)], -1).permute(1, 0, 2)  # filter image 3
    error, total = peaks.new_zeros(count, filters), peaks.new_zeros(count)
    for held in range(FOLDS):
        fit, test = fold != held, fold == held
        if not bool(test.any()) or int(fit.sum()) < 4:
            continue
        a, y = design[:, fit], truth[fit]
        ridge = torch.eye(3, dtype=peaks.dtype) * 1e-6 * int(fit.sum())
        weights = torch.linalg.solve(a.transpose(1, 2) @ a + ridge, a.transpose(1, 2) @ y)
        error[test] = (design[:, test] @ weights - truth[test]).square().sum(2).t()
        total[test] = (truth[test] - y.mean(0)).square().sum(1)
    return error, total


def _held_out_errors(
    peaks: Peaks, landmarks_px: Float[Tensor, "image landmark 2"], photos: Int[Tensor, " image"] | None = None
) -> tuple[Float[Tensor, "image landmark filter"], Float[Tensor, "image landmark"]]:
    """Fit every landmark by every filter's peak in five folds of photos, and measure each photo with the other folds.

    Returns:
        Squared distances from the landmark, and those of the mean place of the photos that were fitted; 0 where the
        landmark is absent, or on fewer than ten images.
    """
    _check(peaks, landmarks_px)
    count, filters = peaks.scores.shape
    group = torch.arange(count) if photos is None else photos
    landmarks = landmarks_px.shape[1]
    error = torch.zeros((count, landmarks, filters), dtype=torch.float64)
    total = torch.zeros((count, landmarks), dtype=torch.float64)
    scale = max(peaks.side_cells)
    for landmark in range(landmarks):
        truth = landmarks_px[:, landmark].double()
        present = ~truth.isnan().any(-1)
        if int(present.sum()) < 2 * FOLDS:
            continue
        # Photo numbers are ranked so that the folds are balanced whatever the numbers are.
        ranks = torch.unique(group[present], return_inverse=True)[1]
        cells = (peaks.cells[present] - (scale - 1) / 2) / scale
        error[present, landmark], total[present, landmark] = _missed_by(cells.double(), truth[present], ranks)
    return error, total


def _best_landmark(
    r2: Float[Tensor, "landmark filter"],
) -> tuple[Float[Tensor, " filter"], Int[Tensor, " filter"]]:
    """Return each filter's highest score and its landmark; NaN where no landmark could be measured."""
    if not len(r2):
        return torch.full(r2.shape[1:], math.nan, dtype=r2.dtype), torch.zeros(r2.shape[1:], dtype=torch.long)
    best = r2.nan_to_num(-2).max(0)
    return torch.where(best.values < -1, math.nan, best.values), best.indices


def consistency_per_filter(
    peaks: Peaks,
    landmarks_px: Float[Tensor, "image landmark 2"],
    photos: Int[Tensor, " image"] | None = None,
) -> tuple[Float[Tensor, " filter"], Int[Tensor, " filter"]]:
    """Return the share of a landmark's position variance that the filter's peak predicts, for its best landmark.

    Five-fold cross-validated R² of the affine fit ``landmark ≈ A · peak + b``, x and y together, folds by photo:
    1 for a perfect tracker, about 0 for a random or constant peak (slightly below, since the fit is tested on
    photos it has not seen). Bounded below by -1 per filter, so that one wild fit does not rule a mean.

    Returns:
        The score and the index of the landmark it belongs to; NaN where no landmark has ten images.
    """
    errors = _held_out_errors(peaks, landmarks_px, photos)
    return _best_landmark(_r2(*errors, torch.ones(len(errors[1]), dtype=torch.float64)))


def _directions(peaks: Peaks, live: Bool[Tensor, " filter"]) -> Float[Tensor, "image live 2"]:
    """Return how the live filters' peaks move over images, of length 1 on each axis; NaN where they do not move."""
    cells = peaks.cells[:, live]
    centred = cells - cells.mean(0)
    norm = centred.norm(dim=0)
    # Less its mean, a place between cells that never moves leaves rounding errors, which point nowhere.
    return centred / torch.where(norm > _STILL_CELLS, norm, math.nan)


def filter_correlation_of(peaks: Peaks, live: Bool[Tensor, " filter"]) -> float:
    """Return the mean correlation of peak positions over pairs of different live filters, the mean over both axes.

    A filter whose peak does not move on an axis has no correlation and does not count; NaN for fewer than two others.
    """
    unit = _directions(peaks, live)
    unit = unit[:, ~unit.isnan().any(0).any(-1)]
    count = unit.shape[1]
    if count < 2:
        return math.nan
    # The sum over all pairs of products is the square of the sum; each filter's product with itself is 1 per axis.
    total = float(unit.sum(1).square().sum()) / unit.shape[2]
    mean: float = (total - count) / (count * (count - 1))
    return mean


def distinct_parts(peaks: Peaks, live: Bool[Tensor, " filter"]) -> float:
    """Return the effective number of distinct parts that the live filters hold.

    Each filter's peak *relative to the mean filter layout* is what makes a part: filters are distinct when they peak at
    different places of the object or move differently. Over both axes and all images, the peak positions of the
    live filters form a matrix (filter, image x 2); two filters are similar by ``exp(-d² / 2 s²)`` where ``d`` is the
    root mean square distance of their peaks in cells and ``s`` one cell. The number is the effective size of the
    population under that similarity (Leinster & Cobbold 2012, order 2): ``1 / mean_fg similarity``. It is 1 when all
    filters follow the same part and the number of filters when no two are within a few cells of each other.
    """
    cells = peaks.cells[:, live]
    count = cells.shape[1]
    if count == 0:
        return math.nan
    # Less the mean layout the numbers are small, and products in single precision cost 1e-5 of the result.
    flat = (cells - cells.mean(1, keepdim=True)).permute(1, 0, 2).reshape(count, -1).float()
    products = flat @ flat.t()
    own = products.diagonal().clone()
    distance2 = products.mul_(-2).add_(own).add_(own[:, None]).clamp_(min=0)
    similarity = distance2.mul_(-1 / (2 * cells.shape[0] * _DISTINCT_CELLS**2)).exp_()
    return float(1 / similarity.mean(dtype=torch.float64))


def border_share(peaks: Peaks) -> float:
    """Return the share of peaks on the outermost ring of cells; 0.27 for random cells of a 14x14 map."""
    limit = torch.tensor(peaks.side_cells, dtype=peaks.cells.dtype) - 1
    return float(((peaks.cells < 0.5) | (peaks.cells > limit - 0.5)).any(-1).double().mean())


def localisation_scores(
    peaks: Peaks,
    landmarks_px: Float[Tensor, "image landmark 2"],
    input_size_px: tuple[int, int],
    *,
    landmark_names: tuple[str, ...],
    photos: Int[Tensor, " image"] | None = None,
    generator: torch.Generator,
    rounds: int = 100,
    fixed_null: bool = False,
) -> LocalisationScores:
    """Measure one layer: instability, and with it what degenerate filters cannot win.

    Dead filters are counted in ``dead_frac`` and, as in the released code, stay in the mean instability (their peak
    is cell (0, 0), which is the corner null); consistency, correlation and distinct parts do not count them. With
    ``fixed_null`` the peaks are a constant null model: correlation and distinct parts are undefined.

    Returns:
        The scores; each interval ranges over photos, and ``n`` counts photos, not crops.
    """
    count = peaks.scores.shape[0]
    live, has_landmark = ~dead_filters(peaks), (~landmarks_px.isnan().any(-1)).any(-1)
    group = torch.arange(count) if photos is None else photos
    annotated, distinct = len(group[has_landmark].unique()), len(group.unique())

    def over_photos(statistic: object, n: int, draws: torch.Generator = generator) -> Estimate:
        estimate = bootstrap(statistic, count, generator=draws, rounds=rounds, groups=group)  # type: ignore[arg-type]
        return Estimate(estimate.value, estimate.interval, n)

    # A constant peak prefers no photo, so all of them count.
    highest = count if fixed_null else TOP_IMAGES

    def instability(index: Tensor, top: int = highest) -> float:
        return float(instability_per_filter(peaks.rows(index), landmarks_px[index], input_size_px, top).nanmean())

    errors = _held_out_errors(peaks, landmarks_px, group)

    # Drawn photos keep the fits of all: fitted on fewer different photos, each draw would be worse than the value.
    def consistency(index: Tensor) -> float:
        score = _best_landmark(_r2(*errors, index.bincount(minlength=count).double()))[0][live]
        return float(score.nanmean()) if score.numel() else math.nan

    def correlation(index: Tensor) -> float:
        return math.nan if fixed_null else filter_correlation_of(peaks.rows(index), live)

    def parts(index: Tensor) -> float:
        return math.nan if fixed_null else distinct_parts(peaks.rows(index), live)

    best = _best_landmark(_r2(*errors, torch.ones(count, dtype=torch.float64)))
    held = best[1][live & ~best[0].isnan()]
    shares = {
        name: float((held == i).double().mean()) if held.numel() else math.nan for i, name in enumerate(landmark_names)
    }
    return LocalisationScores(
        instability=over_photos(instability, annotated),
        # Draws of its own: whoever adds a score must not move the intervals of the others.
        instability_all=over_photos(
            lambda i: instability(i, count), annotated, torch.Generator().manual_seed(generator.initial_seed())
        ),
        peak_spread_cells=over_photos(lambda i: float(spread_per_filter(peaks.rows(i)).median()), distinct),
        dead_frac=over_photos(lambda i: float(dead_filters(peaks.rows(i)).double().mean()), distinct),
        silent_frac=over_photos(
            lambda i: _silent_share(peaks.rows(i)), distinct, torch.Generator().manual_seed(generator.initial_seed())
        ),
        border_frac=over_photos(lambda i: border_share(peaks.rows(i)), distinct),
        consistency=over_photos(consistency, annotated),
        filter_correlation=over_photos(correlation, distinct),
        distinct_parts=over_photos(parts, distinct),
        landmark_shares=shares,
    )


def instability_differences(
    peaks: Peaks,
    others: Mapping[str, Peaks],
    landmarks_px: Float[Tensor, "image landmark 2"],
    input_size_px: tuple[int, int],
    *,
    photos: Int[Tensor, " image"] | None = None,
    generator: torch.Generator,
    rounds: int = 100,
) -> dict[str, Estimate]:
    """Return how much more unstable one layer is than others, or than nulls, on the same photos.

    The bootstrap draws photos once for all of them, so that what makes some photos harder for everything cancels: an
    interval below 0 says that ``peaks`` is more stable even where the two intervals themselves overlap.
    """
    if not landmarks_px.shape[1]:
        return {name: Estimate.undefined() for name in others}
    count = peaks.scores.shape[0]
    group = torch.arange(count) if photos is None else photos
    annotated = len(group[~landmarks_px.isnan().any(-1).all(-1)].unique())

    def instability(of: Peaks, index: Tensor) -> float:
        still = bool((of.cells == of.cells[:1]).all())  # a constant peak prefers no photo, so all of them count
        top = count if still else TOP_IMAGES
        return float(instability_per_filter(of.rows(index), landmarks_px[index], input_size_px, top).nanmean())

    draw, _ = resampler(count, group)
    indices = [torch.arange(count), *(draw(generator) for _ in range(rounds))]
    own = [instability(peaks, index) for index in indices]  # once, whatever it is compared with
    found = {}
    for name, other in others.items():
        value, *draws = (mine - instability(other, index) for mine, index in zip(own, indices, strict=True))
        found[name] = Estimate(value, percentile_interval(draws), annotated)
    return found


def null_peaks(
    kind: str,
    images: int,
    side_cells: tuple[int, int],
    start_px: tuple[float, float],
    stride_px: tuple[float, float],
    *,
    input_size_px: tuple[int, int],
    filters: int = 256,
    generator: torch.Generator,
) -> Peaks:
    """Return peaks of a model that has learned nothing.

    ``random`` is a uniformly random cell per image and filter, ``centre`` exactly the middle of the input, ``corner``
    cell (0, 0), where the argmax of an empty map is.
    """
    rows, cols = side_cells
    # Scores are drawn for every null: they choose the top images, and a constant model has no reason to prefer any.
    scores = torch.rand(images, filters, generator=generator, dtype=torch.float64)
    if kind == "random":
        index = torch.randint(rows * cols, (images, filters), generator=generator)
        cells = torch.stack([index // cols, index % cols], -1)
        return peaks_from_cells(cells, scores, side_cells, start_px, stride_px)
    if kind == "corner":
        corner = torch.zeros(images, filters, 2, dtype=torch.int64)
        return peaks_from_cells(corner, scores, side_cells, start_px, stride_px)
    if kind == "centre":
        middle = torch.tensor([input_size_px[1] / 2, input_size_px[0] / 2], dtype=torch.float64)
        cells = torch.tensor([(rows - 1) / 2, (cols - 1) / 2], dtype=torch.float64)
        shape = (images, filters, 2)
        return Peaks(cells.expand(shape), middle.expand(shape), scores, side_cells)
    raise InputError(expected("a null called random, centre or corner", kind, "Choose one of them"))
