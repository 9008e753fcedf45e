"""What a filter reads, found by covering pieces of photos, and drawn on them.

A piece of a photo is covered; where the filter's response drops most, it was reading. The covered places are put
together relative to the filter's peak, which gives one receptive field per filter; laid at the active cells of a map it
gives the region of one photo. The theoretical field (`partlens.network.receptive_field`) says what a filter could
read, this one what it does read.

Source: Zhou et al., ICLR 2015 ("Object detectors emerge in deep scene CNNs"), section 3.2, in the simplified form of
the code that Zhang et al. released with CVPR 2018 (``step_drawRF.m``), which the explainer paper uses (ICLR 2020
submission, Fig. 3, App. B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from partlens.attribution.record import OcclusionConfig
from partlens.errors import InputError, expected
from partlens.network.receptive_field import ReceptiveField, cell_centre_px

_MapOf = Callable[[Tensor], Tensor]

BATCH = 32
_FILTERS_AT_ONCE = 32
TOP_SHARE = 0.003
"""Share of a filter's values that counts as active, as in the released code."""
_GAIN = 1.5  # factor on a map divided by its maximum, before it is cut at 1; likewise
_REGION_SHARE = 0.5  # of the highest weight, from which a pixel belongs to the region; likewise


@dataclass(frozen=True)
class OcclusionFields:
    """The receptive fields of some filters as occlusion shows them."""

    # one picture per filter on a canvas of twice the input's size. The pixel (H, W) is the peak; values are sums of
    # lowered responses, in the units of the maps, smoothed
    fields: Float[Tensor, "filter row col"]
    # side of the square as large as the smallest set of pixels that holds half of the field before smoothing. One exact
    # place gives ``occluder_px / sqrt(2)``, so nothing smaller can be told apart; ``nan`` where no place lowered the
    # response
    effective_px: Float[Tensor, " filter"]
    images: Int[Tensor, "filter image"]  # positions in the batch of the photos used, the strongest first


def occluder_places(size_px: tuple[int, int], occluder_px: int = 33, stride_px: int = 9) -> Int[Tensor, "place 2"]:
    """Return the upper left corners (row, col) of all places of the occluder inside an image.

    Example:
        >>> len(occluder_places((224, 224)))
        484
    """
    if occluder_px > min(size_px) or occluder_px < 1:
        raise InputError(
            expected(f"an occluder of 1 to {min(size_px)} px", occluder_px, "Use OcclusionConfig().scaled(size_px)")
        )
    rows, cols = (torch.arange(0, side - occluder_px + 1, stride_px) for side in size_px)
    return torch.cartesian_prod(rows, cols)


def covered(
    images: Float[Tensor, "image channel row col"], corners: Int[Tensor, "image 2"], occluder_px: int
) -> Float[Tensor, "image channel row col"]:
    """Set a square of each image to 0, which in preprocessed images is the training set's mean colour."""

    def inside(axis: int) -> Tensor:
        place = torch.arange(images.shape[axis + 2]) - corners[:, axis, None]
        return (place >= 0) & (place < occluder_px)

    square = inside(0)[:, :, None] & inside(1)[:, None, :]
    return images.masked_fill(square[:, None].to(images.device), 0.0)


def activation_thresholds(
    maps: Float[Tensor, "image filter row col"], *, top_share: float = TOP_SHARE, images: int = 10
) -> Float[Tensor, " filter"]:
    """Return for each filter the value that its highest ``top_share`` of cells reaches.

    Where fewer than ``images`` photos have a cell that high, the ``images``-th highest peak takes its place, as in the
    released code, so that each of the photos used has an active cell.
    """
    flat = maps.transpose(0, 1).flatten(1)
    wanted = min(max(1, round(top_share * flat.shape[1])), flat.shape[1])
    share = flat.topk(wanted, dim=1).values[:, -1]
    peaks = maps.amax((2, 3))
    return torch.minimum(share, peaks.topk(min(images, len(peaks)), dim=0).values[-1])


class _Seen(NamedTuple):
    """Sums of the filters' maps on the photos, uncovered (image, filter) and covered (image, place, filter)."""

    sums: Tensor
    peaks_px: Tensor
    covered: Tensor
    places: Tensor
    size_px: tuple[int, int]


def _cell_anchors(receptive: ReceptiveField, rows: int, cols: int, size_px: tuple[int, int]) -> Int[Tensor, "cell 2"]:
    """Return the pixel (row, col) of each cell, row-major, moved into the image where it is outside."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).numpy()
    centres = torch.from_numpy(cell_centre_px(receptive, grid))[:, [1, 0]]
    return torch.minimum(centres.floor().long().clamp(min=0), torch.tensor(size_px) - 1)


def _peaks_px(maps: Tensor, receptive: ReceptiveField, size_px: tuple[int, int]) -> Int[Tensor, "image filter 2"]:
    anchors = _cell_anchors(receptive, maps.shape[2], maps.shape[3], size_px)
    return anchors[maps.flatten(2).argmax(-1).cpu()]


def _run(map_of: _MapOf, batch: Tensor, filters: Sequence[int] | None) -> Tensor:
    with torch.no_grad():
        maps = map_of(batch)
    if maps.ndim != 4 or len(maps) != len(batch):
        raise InputError(
            expected(
                f"map_of to return maps (image, filter, row, col) of {len(batch)} images",
                f"shape {tuple(maps.shape)}",
                "Return the maps of one layer",
            )
        )
    maps = maps.detach().float().cpu().clamp(min=0)
    if filters is None:
        return maps
    if not filters or min(filters) < 0 or max(filters) >= maps.shape[1]:
        raise InputError(
            expected(f"filters from 0 to {maps.shape[1] - 1}, at least one", list(filters), "Name existing filters")
        )
    return maps[:, list(filters)]


def occlusion_receptive_fields(
    map_of: _MapOf,
    batch: Float[Tensor, "image channel row col"],
    receptive: ReceptiveField,
    filters: Sequence[int] | None = None,
    *,
    config: OcclusionConfig | None = None,
    batch_size: int = BATCH,
    advance: Callable[[int], None] = lambda _: None,
) -> OcclusionFields:
    """Find out by occlusion what filters read.

    For a filter with maps ``x`` (negative values set to 0), a photo ``I`` and the photo ``I_o`` with the square at
    place ``o`` covered, the drop is ``d_o = max(Σ_ij x_ij(I) - Σ_ij x_ij(I_o), 0)``. The ``strongest`` places with
    the lowest ``Σ x(I_o)`` are added with height ``d_o`` to a canvas of twice the input's size, moved so that the
    filter's peak comes to lie on its centre. The canvases of the filter's photos are summed and smoothed.

    All filters share the covered photos: the cost is one forward pass of every photo of the batch, and one for every
    place on every photo that some filter uses, ``photos · places`` in all (484 places at 224 px and the default
    stride; twice the stride is a quarter of it). Memory holds ``photos · places · filters`` sums.

    Args:
        map_of: takes preprocessed images and returns the maps of one layer; called without gradients.
        batch: the pool of photos, preprocessed.
        receptive: where the cells of the maps are.
        filters: filters wanted; by default all.
        config: settings; by default those for the input's size.
        batch_size: images per forward pass.
        advance: called with the number of images just run.

    Source:
        ``step_drawRF.m`` of Zhang et al., CVPR 2018. Two differences: the code draws ten random photos for each
        filter from the whole data set, of those whose peak reaches the threshold, and covers them for this filter
        alone; here each filter takes its strongest photos of one shared pool, and thresholds are those of the pool.
        And the code puts places relative to the peak on the covered photo. A well covered part moves that peak to some
        other place, which smears the field; so here it is the peak on the uncovered one.
    """
    if not len(batch):
        raise InputError(expected("at least one image", "an empty batch", "Add photos"))
    if batch_size < 1:
        raise InputError(expected("a batch_size of at least 1", batch_size, f"Use the default, {BATCH}"))
    size_px = (int(batch.shape[2]), int(batch.shape[3]))
    config = OcclusionConfig().scaled(size_px) if config is None else config
    places = occluder_places(size_px, config.occluder_px, config.stride_px)
    pieces = []
    for part in batch.split(batch_size):
        pieces.append(_run(map_of, part, filters))
        advance(len(part))
    maps = torch.cat(pieces)
    # Ties go to the earlier photo, so that the result does not depend on how topk orders equals.
    chosen = maps.amax((2, 3)).argsort(dim=0, descending=True, stable=True)[: config.images].T
    used = chosen.unique()
    pairs = torch.cartesian_prod(used, torch.arange(len(places)))
    sums = []
    for part in pairs.split(batch_size):
        hidden = covered(batch[part[:, 0]], places[part[:, 1]], config.occluder_px)
        sums.append(_run(map_of, hidden, filters).double().sum((2, 3)))
        advance(len(part))
    lowered = torch.zeros(len(batch), len(places), maps.shape[1], dtype=torch.float64)
    lowered[used] = torch.cat(sums).unflatten(0, (len(used), len(places)))
    seen = _Seen(maps.double().sum((2, 3)), _peaks_px(maps, receptive, size_px), lowered, places, size_px)
    fields, sides = _fields(seen, chosen, config)
    return OcclusionFields(fields, sides, chosen)


def _fields(seen: _Seen, chosen: Tensor, config: OcclusionConfig) -> tuple[Tensor, Tensor]:
    """Put the strongest places of every filter onto its canvas; return the smoothed canvases and effective sides."""
    fields, sides = [], []
    for k in torch.arange(len(chosen)).split(_FILTERS_AT_ONCE):
        photos = chosen[k]
        hidden = seen.covered[photos, :, k[:, None]]  # filter, photo, place
        best = hidden.argsort(dim=-1, stable=True)[..., : config.strongest]
        drops = (seen.sums[photos, k[:, None]][..., None] - hidden.gather(-1, best)).clamp(min=0)
        peaks = seen.peaks_px[photos, k[:, None]][:, :, None]
        corners = seen.places[best] - peaks + torch.tensor(seen.size_px)
        canvas = _pasted(corners, drops, seen.size_px, config.occluder_px)
        sides.append(pixels_of_half(canvas).sqrt().float())
        fields.append(smoothed(canvas, config.smoothing_px, config.smoothing_sigma_px))
    return torch.cat(fields), torch.cat(sides)


def _pasted(corners: Tensor, heights: Tensor, size_px: tuple[int, int], side: int) -> Float[Tensor, "filter row col"]:
    """Add squares to canvases: the running sums of +1 and -1 at their corners are the squares."""
    rows, cols = 2 * size_px[0] + 1, 2 * size_px[1] + 1
    steps = torch.zeros(len(corners), rows * cols, dtype=torch.float64)
    for down, right, sign in ((0, 0, 1), (0, side, -1), (side, 0, -1), (side, side, 1)):
        index = (corners[..., 0] + down) * cols + corners[..., 1] + right
        steps.scatter_add_(1, index.flatten(1), (sign * heights).flatten(1))
    canvas = steps.reshape(-1, rows, cols).cumsum(1).cumsum(2)[:, :-1, :-1]
    # Running sums leave rounding errors where nothing lies, about 1e-16 of what was added.
    floor = 1e-12 * heights.flatten(1).sum(1)[:, None, None]
    return torch.where(canvas > floor, canvas, 0.0).float()


def smoothed(
    fields: Float[Tensor, "filter row col"], window_px: int = 50, sigma_px: float = 30.0
) -> Float[Tensor, "filter row col"]:
    """Smooth pictures with a Gaussian cut to a window, borders repeated; the even window leans down and right by half.

    Example:
        >>> flat = torch.ones(1, 4, 4)
        >>> bool(torch.allclose(smoothed(flat, 3, 1.0), flat))
        True
    """
    if window_px <= 1:
        return fields
    place = torch.arange(window_px, dtype=torch.float64) - (window_px - 1) / 2
    kernel = torch.exp(-(place**2) / (2 * sigma_px**2))
    kernel = (kernel / kernel.sum()).to(fields.dtype)
    before, after = (window_px - 1) // 2, window_px // 2
    wide = F.pad(fields[:, None], (before, after, before, after), mode="replicate")
    return F.conv2d(F.conv2d(wide, kernel[None, None, :, None]), kernel[None, None, None])[:, 0]


def pixels_of_half(pictures: Float[Tensor, "picture row col"]) -> Float[Tensor, " picture"]:
    """Return the fewest pixels that hold half of each non-negative picture; ``nan`` for a picture of zeros.

    Example:
        >>> picture = torch.zeros(2, 6, 6)
        >>> picture[0, :4, :4] = 1.0
        >>> pixels_of_half(picture).tolist()
        [8.0, nan]
    """
    ordered = pictures.flatten(1).double().sort(dim=1, descending=True).values
    total = ordered.sum(1, keepdim=True)
    # The tolerance keeps rounding of the running sum from costing a flat picture one pixel more.
    needed = (ordered.cumsum(1) < total * 0.5 * (1 - 1e-9)).sum(1) + 1
    return torch.where(total[:, 0] > 0, needed.double(), torch.nan)


def regions(
    maps: Float[Tensor, "shown row col"],
    fields: Float[Tensor, "filter row2 col2"],
    of: Int[Tensor, " shown"],
    thresholds: Float[Tensor, " shown"],
    receptive: ReceptiveField,
) -> Bool[Tensor, "shown height width"]:
    """Return the regions of photos that maps represent.

    Cells below ``min(threshold, max x)`` are set to 0 and the rest becomes ``v = min(1.5 · x / max x, 1)``. The
    weight of a pixel is the highest ``v · field`` over cells, the field moved so that its centre lies on the cell's
    centre; the region holds the pixels with at least half of the highest weight.

    Args:
        maps: one map for each picture wanted, non-negative.
        fields: from `occlusion_receptive_fields`, twice the input's size.
        of: for each map which field is its filter's.
        thresholds: for each map the value from which a cell is active.
        receptive: where the cells are located.

    Returns:
        True inside; all False for a map or a field of zeros.

    Source:
        ``step_drawRF.m`` (CVPR 2018). It then also raises to 1 the cells whose scaled value reaches the unscaled
        threshold; that depends on the unit of the maps and is not done here.
    """
    size_px = (fields.shape[1] // 2, fields.shape[2] // 2)
    anchors = _cell_anchors(receptive, maps.shape[1], maps.shape[2], size_px)
    flat = maps.flatten(1)
    peaks = flat.amax(1, keepdim=True)
    live = torch.where(flat >= torch.minimum(thresholds[:, None], peaks), flat, 0.0)
    values = (_GAIN * live / peaks.clamp(min=torch.finfo(flat.dtype).tiny)).clamp(max=1)
    weights = torch.zeros(len(maps), *size_px)
    for cell in torch.nonzero(values.amax(0) > 0).flatten().tolist():
        shown = torch.nonzero(values[:, cell] > 0).flatten()
        top, left = (side - int(at) for side, at in zip(size_px, anchors[cell], strict=True))
        moved = fields[of[shown], top : top + size_px[0], left : left + size_px[1]]
        weights[shown] = torch.maximum(weights[shown], moved * values[shown, cell, None, None])
    highest = weights.amax((1, 2), keepdim=True)
    return (weights >= _REGION_SHARE * highest) & (highest > 0)


def region_picture(photo: Image.Image, region: npt.NDArray[np.bool_]) -> Image.Image:
    """Draw a region on a photo: what lies outside is darkened by half, the border is a white line on black."""
    base = photo.convert("RGB")
    mask = Image.fromarray(np.asarray(region, dtype=np.uint8) * 255).resize(base.size, Image.Resampling.BILINEAR)
    inside = torch.from_numpy(np.asarray(mask) >= 128)
    width = max(1, math.ceil(max(base.size) / 170))

    def grown(steps: int) -> npt.NDArray[np.bool_]:
        wide = F.max_pool2d(inside[None].float(), 2 * steps + 1, stride=1, padding=steps)
        return wide[0].numpy() > 0

    pixels = np.asarray(base, dtype=np.float32)
    core = inside.numpy()
    pixels = np.where(core[..., None], pixels, pixels * 0.5)
    pixels[grown(2 * width) & ~core] *= 0.35
    pixels[grown(width) & ~core] = 255
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
