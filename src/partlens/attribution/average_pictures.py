"""Interpretation of a model: what a filter answers to, as crops, their average, and a control of random crops.

For a filter, the photos with the largest peak are cut where the peak stands, as large as the receptive field of one
cell, and averaged, so that what they share stays and the rest washes out (Oramas et al. 2019; the exact recipe is not
published and is reconstructed from later code of the same laboratory). Crops that reach beyond the photo are padded and
the padding is left out of the mean, so that everything stays aligned on the peak; the later code resizes them instead.
Beside it stands the average of equally many crops from the same photos at random places: what does not differ from that
control says nothing about the filter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, expected
from partlens.network.receptive_field import ReceptiveField, cell_centre_px, receptive_fields
from partlens.network.zoo import Performer

FloatArray = npt.NDArray[np.float32]
Advance = Callable[[int, int], None]
STRIP_PHOTOS = 8
LARGEST_FRAC = 0.5
_STRIP_PADDING = 0.9


@dataclass(frozen=True)
class Crop:
    """The region that the cells of a layer see, on the network's input.

    Attributes:
        side_px: rows and columns of the region.
        whole: whether every cell sees the whole input (fully connected layers, global pooling), so that there is
            nothing to align.
    """

    side_px: tuple[int, int]
    whole: bool


@dataclass(frozen=True)
class AveragePicture:
    """What one filter answers to.

    Attributes:
        layer: the filter's layer.
        channel: its number there.
        receptive_field_px: rows and columns one cell sees, ``None`` for the whole image.
        rows: positions of the strongest photos in the image set, best first; equal peaks in the set's order.
        average: ``[row, col, 3]`` in [0, 1], the mean over the valid pixels of the crops; grey where no crop is valid.
        valid_frac: ``[row, col]`` share of the crops that cover a pixel.
        control: the same average over random places of the same photos.
        crops: the strongest crops, uint8 ``[photo, row, col, 3]``.
        contrast: standard deviation of ``average`` over its valid pixels; an average of unrelated crops is flat.
        control_contrast: that of ``control``.
    """

    layer: str
    channel: int
    receptive_field_px: tuple[int, int] | None
    rows: tuple[int, ...]
    average: FloatArray
    valid_frac: FloatArray
    control: FloatArray
    crops: npt.NDArray[np.uint8]
    contrast: float
    control_contrast: float


def strongest(peak: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Return the images with the largest peaks of each filter.

    Args:
        peak: ``[image, filter]``.
        count: images wanted per filter.

    Returns:
        ``[filter, count]``, best first; equal peaks in the order of the images.

    Example:
        >>> strongest(np.array([[1.0], [3.0], [3.0]]), 2).tolist()
        [[1, 2]]
    """
    order = np.argsort(-np.asarray(peak), axis=0, kind="stable")[:count]
    return np.ascontiguousarray(order.T).astype(np.int64)


def crop_of(
    performer: Performer, layers: Sequence[str], largest_frac: float = LARGEST_FRAC
) -> dict[str, tuple[Crop, ReceptiveField | None]]:
    """Return each layer's crop and receptive field; layers whose cells see everything have no field.

    The analytic receptive field of a deep layer is larger than the whole input, while what moves the cell in fact is a
    small middle part of it. Crops are therefore cut to a share of the input; they still stand on the peak.

    Args:
        performer: the network.
        layers: names.
        largest_frac: longest crop as a share of the input's sides; 1 keeps every field that fits into the input.
    """
    size = performer.preprocessing.size_px
    fields = receptive_fields(performer.graph, tuple(dict.fromkeys(layers)), size)
    found: dict[str, tuple[Crop, ReceptiveField | None]] = {}
    for layer in layers:
        field = fields.get(layer)
        if field is None or 0 in field.stride_px:
            found[layer] = (Crop(size, whole=True), None)
        else:
            most = (max(1, round(size[0] * largest_frac)), max(1, round(size[1] * largest_frac)))
            side = (min(field.size_px[0], most[0]), min(field.size_px[1], most[1]))
            found[layer] = (Crop(side, whole=False), field)
    return found


@dataclass
class _Group:
    """All filters of one layer: their crops grow photo by photo."""

    crop: Crop
    scale: float
    side: tuple[int, int]
    positions: list[int]  # in the caller's list of filters
    total: FloatArray
    covered: FloatArray
    control: FloatArray
    control_covered: FloatArray
    strip: npt.NDArray[np.uint8]


def _padded(image: npt.NDArray[np.uint8], side: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Add a border as wide as a crop; say which pixels are the photo's."""
    border = ((side[0], side[0]), (side[1], side[1]))
    picture = np.pad(image.astype(np.float32) / np.float32(255), (*border, (0, 0)))
    return picture.astype(np.float32), np.pad(np.ones(image.shape[:2], dtype=np.float32), border)


def _windows(
    picture: FloatArray, inside: FloatArray, corners: npt.NDArray[np.int64], side: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Cut many windows at once; corners are (row, col) in the padded picture."""
    views = np.lib.stride_tricks.sliding_window_view(picture, side, axis=(0, 1))
    covers = np.lib.stride_tricks.sliding_window_view(inside, side)
    cut = views[corners[:, 0], corners[:, 1]].transpose(0, 2, 3, 1)
    return cut, covers[corners[:, 0], corners[:, 1]]


def _mean(total: FloatArray, covered: FloatArray) -> FloatArray:
    """Divide where anything was seen; grey elsewhere."""
    weight = covered[..., None]
    return np.where(weight > 0, total / np.maximum(weight, 1e-6), 0.5).astype(np.float32)


def _contrast(average: FloatArray, covered: FloatArray) -> float:
    seen = covered > 0
    return float(average[seen].std(axis=0).mean()) if seen.any() else float("nan")


def average_pictures(
    performer: Performer,
    images: ImageSet,
    filters: Sequence[tuple[str, int]],
    peak: npt.NDArray[np.floating],
    peak_cell: npt.NDArray[np.integer],
    *,
    rows: Sequence[int] | None = None,
    top_photos: int = 100,
    most_px: int | None = None,
    largest_frac: float = LARGEST_FRAC,
    seed: int = 0,
    advance: Advance | None = None,
) -> list[AveragePicture]:
    """Average what the strongest photos of each filter show at its peak.

    Args:
        performer: for the frame the network sees and its receptive fields.
        images: the photos.
        filters: (layer, channel) of each filter.
        peak: ``[photo, filter]`` largest value of the filter's map.
        peak_cell: ``[photo, filter, 2]`` where it stands, (row, col).
        rows: positions in ``images`` of the photos, all of them when left out.
        top_photos: photos averaged per filter, at most all.
        most_px: pictures with a longer side are made from photos scaled down to it; ``None`` keeps the input's pixels.
        largest_frac: longest crop as a share of the input's sides, see :func:`crop_of`.
        seed: of the random crops.
        advance: called with (photos done, photos in all).

    Returns:
        One picture per filter, in order.

    Raises:
        InputError: arrays that do not fit the filters.
        ImageError: no photo.
    """
    rows = tuple(range(len(images))) if rows is None else tuple(rows)
    if not rows:
        raise ImageError(expected("at least 1 photo for the pictures", 0, "Add photos"))
    if peak.shape != (len(rows), len(filters)) or peak_cell.shape != (len(rows), len(filters), 2):
        raise InputError(
            expected(
                f"peaks of shape ({len(rows)}, {len(filters)})",
                f"{peak.shape} and {peak_cell.shape}",
                "Give one column per filter and one row per photo",
            )
        )
    top = strongest(peak, min(top_photos, len(rows)))
    layers = list(dict.fromkeys(layer for layer, _ in filters))
    known = crop_of(performer, layers, largest_frac)
    groups = [
        _group(known[layer][0], [k for k, (name, _) in enumerate(filters) if name == layer], most_px)
        for layer in layers
    ]
    place = {k: (group, i) for group in groups for i, k in enumerate(group.positions)}
    corner, random_corner = _corners(performer, filters, peak_cell, top, known, place, seed)
    wanted: dict[int, list[tuple[int, int]]] = {}
    for k in range(len(filters)):
        for rank, photo in enumerate(top[k].tolist()):
            wanted.setdefault(photo, []).append((k, rank))
    for done, (photo, uses) in enumerate(sorted(wanted.items()), start=1):
        frame = performer.preprocessing.frame(images.read(rows[photo]))
        _add_photo(frame, uses, place, corner, random_corner)
        if advance is not None:
            advance(done, len(wanted))
    return [
        _finished(filters[k], place[k], known, tuple(rows[p] for p in top[k].tolist())) for k in range(len(filters))
    ]


def _group(crop: Crop, positions: list[int], most_px: int | None) -> _Group:
    longest = max(crop.side_px)
    scale = 1.0 if most_px is None or longest <= most_px else most_px / longest
    side = (max(1, round(crop.side_px[0] * scale)), max(1, round(crop.side_px[1] * scale)))
    count = len(positions)
    return _Group(
        crop,
        scale,
        side,
        positions,
        np.zeros((count, *side, 3), np.float32),
        np.zeros((count, *side), np.float32),
        np.zeros((count, *side, 3), np.float32),
        np.zeros((count, *side), np.float32),
        np.zeros((count, STRIP_PHOTOS, *side, 3), np.uint8),
    )


def _corners(
    performer: Performer,
    filters: Sequence[tuple[str, int]],
    peak_cell: npt.NDArray[np.integer],
    top: npt.NDArray[np.int64],
    known: dict[str, tuple[Crop, ReceptiveField | None]],
    place: dict[int, tuple[_Group, int]],
    seed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ``[filter, rank, 2]`` upper left corners in the scaled, padded photo: around the peak, and at random."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand((len(filters), top.shape[1], 2), generator=generator, dtype=torch.float64).numpy()
    corner = np.zeros((len(filters), top.shape[1], 2), np.int64)
    random_corner = np.zeros_like(corner)
    height, width = performer.preprocessing.size_px
    for k, (layer, _) in enumerate(filters):
        group, _ = place[k]
        side = np.array(group.side)
        size = np.array([max(1, round(height * group.scale)), max(1, round(width * group.scale))])
        field = known[layer][1]
        if group.crop.whole or field is None:
            corner[k] = random_corner[k] = side  # the photo itself starts behind the border
            continue
        centre = cell_centre_px(field, peak_cell[top[k], k])[:, ::-1] * group.scale  # (row, col)
        corner[k] = _clipped(centre, side, size)
        random_corner[k] = _clipped(draws[k] * size, side, size)
    return corner, random_corner


def _clipped(
    centre: npt.NDArray[np.floating], side: npt.NDArray[np.int64], size: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return corners in the padded photo of crops around centres; centres outside the photo move to its border."""
    inside = np.clip(centre, 0, size)
    first = np.floor(inside - side / 2 + 0.5).astype(np.int64) + side
    clipped: npt.NDArray[np.int64] = np.clip(first, 0, size + side)
    return clipped


def _add_photo(
    frame: Image.Image,
    uses: list[tuple[int, int]],
    place: dict[int, tuple[_Group, int]],
    corner: npt.NDArray[np.int64],
    random_corner: npt.NDArray[np.int64],
) -> None:
    """Add one photo's crops to every filter that wants it; filters of one layer are cut together."""
    by_group: dict[int, list[tuple[int, int]]] = {}
    for k, rank in uses:
        by_group.setdefault(id(place[k][0]), []).append((k, rank))
    for members in by_group.values():
        group = place[members[0][0]][0]
        size = (max(1, round(frame.width * group.scale)), max(1, round(frame.height * group.scale)))
        scaled = frame if size == frame.size else frame.resize(size, Image.Resampling.BOX)
        picture, inside = _padded(np.asarray(scaled, dtype=np.uint8), group.side)
        slots = np.array([place[k][1] for k, _ in members])
        at = np.array([corner[k, rank] for k, rank in members])
        cut, covers = _windows(picture, inside, at, group.side)
        group.total[slots] += cut
        group.covered[slots] += covers
        for n, (k, rank) in enumerate(members):
            if rank < STRIP_PHOTOS:
                shown = cut[n] + _STRIP_PADDING * (1 - covers[n][..., None])
                group.strip[place[k][1], rank] = np.rint(shown * 255).astype(np.uint8)
        at = np.array([random_corner[k, rank] for k, rank in members])
        cut, covers = _windows(picture, inside, at, group.side)
        group.control[slots] += cut
        group.control_covered[slots] += covers


def _finished(
    owner: tuple[str, int],
    place: tuple[_Group, int],
    known: dict[str, tuple[Crop, ReceptiveField | None]],
    rows: tuple[int, ...],
) -> AveragePicture:
    group, slot = place
    crop, field = known[owner[0]]
    average = _mean(group.total[slot], group.covered[slot])
    control = _mean(group.control[slot], group.control_covered[slot])
    return AveragePicture(
        owner[0],
        owner[1],
        None if crop.whole or field is None else field.size_px,
        rows,
        average,
        group.covered[slot] / max(1, len(rows)),
        control,
        group.strip[slot, : len(rows)],
        _contrast(average, group.covered[slot]),
        _contrast(control, group.control_covered[slot]),
    )
