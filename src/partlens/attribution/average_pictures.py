"""What activates a filter: the strongest crops, their average, and a control of random crops.

For a filter, the photos with the largest peak are cut around the peak, as large as the receptive field of one cell, and
averaged, so that what they share stays and the rest washes out (Oramas et al. 2019; the exact recipe is not published
and is reconstructed from later code of the same laboratory). Crops that reach beyond the photo are padded and the
padding does not count in the mean, so that everything stays aligned on the peak; the later code resizes them instead.
For comparison there is the average of equally many crops from the same photos at random places: what does not differ
from that control says nothing about the filter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from partlens.data.images import ImageSet
from partlens.errors import InputError, expected
from partlens.network.performer import Performer
from partlens.network.receptive_field import ReceptiveField, cell_centre_px
from partlens.selection.responses import TopPhotos

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Advance = Callable[[int, int], None]

STRIP_PHOTOS = 8
PICTURE_PX = 96
"""Pictures with a longer side are made from photos scaled down to it."""

LARGEST_FRAC = 0.5
"""Longest crop as a share of the input's sides. The receptive field in theory of a deep layer is larger than the whole
input, while what moves the cell in fact is a small middle part of it."""

_STRIP_PADDING = 0.9  # grey of what lies beyond the photo


@dataclass(frozen=True)
class Crop:
    """Rows and columns of the input that a cell of a layer sees; no ``field`` where each sees the whole input."""

    side_px: tuple[int, int]
    field: ReceptiveField | None


@dataclass(frozen=True)
class _AveragePicture:
    """What activates one filter."""

    layer: str  # the filter's layer
    channel: int  # its number there
    receptive_field_px: tuple[int, int] | None  # rows and columns one cell sees, ``None`` for the whole image
    # positions of the strongest photos in the image set, best first; equal peaks in the set's order
    rows: tuple[int, ...]
    # ``[row, col, 3]`` in [0, 1], the mean over the valid pixels of the crops; grey where no crop is valid
    average: FloatArray
    valid_frac: FloatArray  # ``[row, col]`` share of the crops that cover a pixel
    control: FloatArray  # the same average over random places of the same photos
    crops: npt.NDArray[np.uint8]  # the strongest crops, uint8 ``[photo, row, col, 3]``
    contrast: float  # standard deviation of ``average`` over its valid pixels; an average of unrelated crops is flat
    control_contrast: float  # that of ``control``


def _crop_of(performer: Performer, layers: Sequence[str]) -> dict[str, Crop]:
    """Return the crop of each layer."""
    size = performer.preprocessing.size_px
    located = {layer.name for layer in performer.layers if layer.has_places}
    fields = {layer: performer.field(layer) for layer in dict.fromkeys(layers) if layer in located}
    most = [max(1, round(side * LARGEST_FRAC)) for side in size]
    found: dict[str, Crop] = {}
    for layer in layers:
        seen = fields.get(layer)
        if seen is None or 0 in seen.stride_px:
            found[layer] = Crop(size, None)
        else:
            found[layer] = Crop((min(seen.size_px[0], most[0]), min(seen.size_px[1], most[1])), seen)
    return found


@dataclass
class _Sum:
    """The crops of the filters of a layer, added up, and how many of them cover each pixel."""

    total: FloatArray
    covered: FloatArray

    def mean(self, slot: int) -> FloatArray:
        """Divide where anything was seen; grey elsewhere."""
        weight = self.covered[slot][..., None]
        return np.where(weight > 0, self.total[slot] / np.maximum(weight, 1e-6), 0.5).astype(np.float32)

    def contrast(self, slot: int) -> float:
        seen = self.covered[slot] > 0
        return float(self.mean(slot)[seen].std(axis=0).mean()) if seen.any() else float("nan")


@dataclass
class _Layer:
    """The filters of one layer, by their positions in the caller's list: their crops are added photo by photo."""

    crop: Crop
    filters: list[int]
    scale: float = field(init=False)
    side: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        rows, cols = self.crop.side_px
        self.scale = min(1.0, PICTURE_PX / max(rows, cols))
        self.side = (max(1, round(rows * self.scale)), max(1, round(cols * self.scale)))
        shape = (len(self.filters), *self.side)
        self.average, self.control = (
            _Sum(np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)) for _ in range(2)
        )
        self.strip = np.zeros((shape[0], STRIP_PHOTOS, *self.side, 3), np.uint8)

    def scaled_px(self, sides: Sequence[int]) -> tuple[int, int]:
        return max(1, round(sides[0] * self.scale)), max(1, round(sides[1] * self.scale))

    def add(self, frame: Image.Image, uses: Sequence[tuple[int, int]], corner: IntArray, at_random: IntArray) -> None:
        """Add one photo's crops: those of filters (position in the list) for which it has some rank."""
        size = self.scaled_px(frame.size)
        scaled = frame if size == frame.size else frame.resize(size, Image.Resampling.BOX)
        picture, inside = _padded(np.asarray(scaled, dtype=np.uint8), self.side)
        slots = np.array([self.filters.index(k) for k, _ in uses])
        which = tuple(np.array(uses).T)
        cut, covers = _windows(picture, inside, corner[which], self.side)
        self.average.total[slots] += cut
        self.average.covered[slots] += covers
        for n, (_, rank) in enumerate(uses):
            if rank < STRIP_PHOTOS:
                shown = cut[n] + _STRIP_PADDING * (1 - covers[n][..., None])
                self.strip[slots[n], rank] = np.rint(shown * 255).astype(np.uint8)
        cut, covers = _windows(picture, inside, at_random[which], self.side)
        self.control.total[slots] += cut
        self.control.covered[slots] += covers


def _padded(image: npt.NDArray[np.uint8], side: tuple[int, int]) -> tuple[FloatArray, FloatArray]:
    """Add a border as wide as a crop; say which pixels are the photo's."""
    border = ((side[0], side[0]), (side[1], side[1]))
    picture = np.pad(image.astype(np.float32) / np.float32(255), (*border, (0, 0)))
    return picture.astype(np.float32), np.pad(np.ones(image.shape[:2], dtype=np.float32), border)


def _windows(
    picture: FloatArray, inside: FloatArray, corners: IntArray, side: tuple[int, int]
) -> tuple[FloatArray, FloatArray]:
    """Cut many windows at once; corners are (row, col) in the padded picture."""
    views = np.lib.stride_tricks.sliding_window_view(picture, side, axis=(0, 1))
    covers = np.lib.stride_tricks.sliding_window_view(inside, side)
    cut = views[corners[:, 0], corners[:, 1]].transpose(0, 2, 3, 1)
    return cut, covers[corners[:, 0], corners[:, 1]]


def average_pictures(
    performer: Performer,
    images: ImageSet,
    filters: Sequence[tuple[str, int]],
    top: TopPhotos,
    *,
    seed: int = 0,
    advance: Advance = lambda *_: None,
) -> list[_AveragePicture]:
    """Average what the strongest photos of each filter (layer, channel) show at its peak; a picture per filter.

    ``top`` are these photos, a column per filter. ``advance`` is called with (photos done, photos in all).
    """
    if top.photo.shape[1] != len(filters) or top.photo.max(initial=-1) >= len(images):
        rule = f"photos among {len(images)} for {len(filters)} filters"
        got = f"number {top.photo.max(initial=-1)} for {top.photo.shape[1]}"
        raise InputError(expected(rule, got, "Give one column per filter, of the same photos"))
    crops = _crop_of(performer, list(dict(filters)))
    layers = {
        layer: _Layer(crop, [k for k, (name, _) in enumerate(filters) if name == layer])
        for layer, crop in crops.items()
    }
    corner, at_random = _corners(performer, filters, top, layers, seed)
    wanted = _uses(filters, top.photo)
    for done, (photo, uses) in enumerate(wanted, start=1):
        frame = performer.preprocessing.frame(images.read(photo, performer.preprocessing.scaled_size))
        for layer, members in uses.items():
            layers[layer].add(frame, members, corner, at_random)
        advance(done, len(wanted))
    return [_finished(owner, layers[owner[0]], k, top.photo[:, k].tolist()) for k, owner in enumerate(filters)]


def _uses(filters: Sequence[tuple[str, int]], photos: IntArray) -> list[tuple[int, dict[str, list[tuple[int, int]]]]]:
    """Return, photo by photo, the filters (position in the list) of each layer that use it and its rank for them."""
    wanted: dict[int, dict[str, list[tuple[int, int]]]] = {}
    for k, (layer, _) in enumerate(filters):
        for rank, photo in enumerate(photos[:, k].tolist()):
            wanted.setdefault(photo, {}).setdefault(layer, []).append((k, rank))
    return sorted(wanted.items())


def _corners(
    performer: Performer,
    filters: Sequence[tuple[str, int]],
    top: TopPhotos,
    layers: Mapping[str, _Layer],
    seed: int,
) -> tuple[IntArray, IntArray]:
    """Return ``[filter, rank, 2]`` upper left corners in the scaled, padded photo: around the peak, and at random."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand((len(filters), len(top.photo), 2), generator=generator, dtype=torch.float64).numpy()
    corner = np.zeros((len(filters), len(top.photo), 2), np.int64)
    at_random = np.zeros_like(corner)
    for k, (name, _) in enumerate(filters):
        layer = layers[name]
        side, size = np.array(layer.side), np.array(layer.scaled_px(performer.preprocessing.size_px))
        if layer.crop.field is None:
            corner[k] = at_random[k] = side  # the photo itself starts behind the border
            continue
        centre = cell_centre_px(layer.crop.field, top.cell[:, k])[:, ::-1] * layer.scale  # (row, col)
        corner[k] = _clipped(centre, side, size)
        at_random[k] = _clipped(draws[k] * size, side, size)
    return corner, at_random


def _clipped(centre: npt.NDArray[np.floating], side: IntArray, size: IntArray) -> IntArray:
    """Return corners in the padded photo of crops around centres; centres outside the photo move to its border."""
    inside = np.clip(centre, 0, size)
    first = np.floor(inside - side / 2 + 0.5).astype(np.int64) + side
    clipped: IntArray = np.clip(first, 0, size + side)
    return clipped


def _finished(owner: tuple[str, int], layer: _Layer, k: int, photos: Sequence[int]) -> _AveragePicture:
    slot = layer.filters.index(k)
    return _AveragePicture(
        *owner,
        None if layer.crop.field is None else layer.crop.field.size_px,
        tuple(photos),
        layer.average.mean(slot),
        layer.average.covered[slot] / max(1, len(photos)),
        layer.control.mean(slot),
        layer.strip[slot, : len(photos)],
        layer.average.contrast(slot),
        layer.control.contrast(slot),
    )
