"""Photos cut to their objects' boxes, and annotated parts moved along with the cut."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from partlens.data.annotations import BoolArray, PartTruth, UnusedPart
from partlens.data.listing import Box, Listing, window_px
from partlens.errors import ImageError, expected


class Photos(Protocol):
    """Whole photos in files; rows are counted from 0."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return the files."""
        ...

    def read(self, row: int) -> Image.Image:
        """Decode one photo to RGB."""
        ...

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height."""
        ...

    def digest(self, row: int) -> str:
        """Return a text for the file's content."""
        ...


@dataclass(frozen=True)
class Cuts:
    """Photos cut to boxes, when they are read.

    Attributes:
        photos: the whole photos, pixels as stored.
        boxes_px: for each row left, top, right and bottom edge; None for the whole photo.
        margin_frac: as in :func:`~partlens.data.listing.window_px`.
    """

    photos: Photos
    boxes_px: tuple[Box | None, ...]
    margin_frac: float

    def window_px(self, row: int, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the edges of the part of a photo of this size that a row shows.

        Raises:
            ImageError: the box lies outside the photo.
        """
        box = self.boxes_px[row]
        if box is None:
            return (0, 0, *size_px)
        window = window_px(box, size_px, self.margin_frac)
        if window[2] <= window[0] or window[3] <= window[1]:
            width, height = size_px
            rule = f"a box inside the {width}x{height} photo {self.photos.paths[row]}"
            raise ImageError(expected(rule, str(box), "Correct the annotation or drop the image with readable()"))
        return window

    def read(self, row: int) -> Image.Image:
        """Decode one photo and cut it."""
        image = self.photos.read(row)
        return image.crop(self.window_px(row, image.size))

    def photo_size_px(self, row: int) -> tuple[int, int]:
        """Return width and height of the whole photo."""
        return self.photos.size_px(row)

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height of the cut."""
        left, top, right, bottom = self.window_px(row, self.photos.size_px(row))
        return right - left, bottom - top

    def digest(self, row: int) -> str:
        """Return a text for the content of the file and the window."""
        return f"{self.photos.digest(row)}@{self.boxes_px[row]}+{self.margin_frac}"

    def may_fail(self) -> bool:
        """Return whether reading can fail: files can be missing or damaged."""
        return True


@dataclass(frozen=True, eq=False)
class CutTruth:
    """The parts of a listing, moved from the whole photos to the images that are cut out of them.

    Attributes:
        listing: says where the parts are in the whole photos; it has to have a truth.
        source: says where the photos are cut.
    """

    listing: Listing
    source: Cuts

    def __call__(self, keys: tuple[str, ...]) -> PartTruth:
        """Return the parts of the images with these keys, in pixels of those images."""
        assert self.listing.truth is not None
        truth = self.listing.truth(keys)
        row_of = {key: row for row, key in enumerate(self.listing.keys)}
        annotated = [row for row in range(len(keys)) if np.isfinite(truth.positions_px[row]).any()]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            photos = list(pool.map(self._photo_size, (row_of[keys[row]] for row in annotated)))
        positions = truth.positions_px.copy()
        sizes = np.full((len(keys), 2), np.nan, dtype=np.float32)
        unused = list(truth.unused)
        for row, photo in zip(annotated, photos, strict=True):
            if photo is None:  # a file that cannot be read has no known size; readable() reports it by name
                continue
            marked = truth.image_size_px[row]
            if np.isfinite(marked).all() and tuple(marked) != photo:
                columns = np.flatnonzero(np.isfinite(positions[row]).all(axis=1))
                reason = f"it was marked in {marked[0]:g}x{marked[1]:g} pixels, the photo has {photo[0]}x{photo[1]}"
                unused += [UnusedPart(keys[row], truth.landmarks[column], reason) for column in columns]
                positions[row] = np.nan
                continue
            left, top, right, bottom = self.source.window_px(row_of[keys[row]], photo)
            positions[row] -= np.array([left, top], dtype=np.float32)
            sizes[row] = right - left, bottom - top
            outside = ((positions[row] < 0) | (positions[row] > sizes[row])).any(axis=1)
            for column in np.flatnonzero(outside):
                x, y = positions[row, column]
                reason = f"its centre ({x:g}, {y:g}) is outside the image of {right - left}x{bottom - top} pixels"
                unused.append(UnusedPart(keys[row], truth.landmarks[column], reason))
            positions[row, outside] = np.nan
        part_sizes = np.where(np.isnan(positions), np.float32(np.nan), truth.sizes_px)
        masks = None if truth.masks is None else self.masks
        return replace(
            truth,
            positions_px=positions,
            sizes_px=part_sizes,
            image_size_px=sizes,
            unused=tuple(unused),
            masks=masks,
        )

    def _photo_size(self, row: int) -> tuple[int, int] | None:
        """Return width and height of a photo, None where it or its cut cannot be read."""
        try:
            size = self.source.photo_size_px(row)
            self.source.window_px(row, size)
        except ImageError:
            return None
        return size

    def masks(self, key: str) -> dict[str, BoolArray]:
        """Return the silhouettes of the parts in the image with this key.

        Raises:
            ImageError: the photo cannot be read, or the silhouettes were drawn for another size.
        """
        assert self.listing.truth is not None
        whole = self.listing.truth((key,)).masks
        assert whole is not None
        row = self.listing.keys.index(key)
        width, height = self.source.photo_size_px(row)
        left, top, right, bottom = self.source.window_px(row, (width, height))
        drawn = whole(key)
        for mask in drawn.values():
            if mask.shape != (height, width):
                got = f"{mask.shape[1]}x{mask.shape[0]}"
                rule = f"silhouettes of {width}x{height} pixels for {key}"
                raise ImageError(expected(rule, got, "Use the photos for which the parts were marked"))
        return {name: mask[top:bottom, left:right] for name, mask in drawn.items()}
