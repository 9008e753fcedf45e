"""Data sets in their own layouts, and sets to be used as one, as the tables that partlens reads.

A folder is written with ``images.csv`` (name, file, box, category, split and photo group of each image),
``landmarks.csv`` and ``masks/``. Photos are not copied: the table names them relative to its folder.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from partlens.data.annotations import BoolArray, PartTruth, UnusedPart
from partlens.data.files import Box, Files, window_px
from partlens.data.folders import filled_splits
from partlens.data.images import ImageSet
from partlens.data.tables import BOX_COLUMNS, IMAGE_TABLE, LANDMARK_TABLE, MASK_FOLDER
from partlens.errors import BACKGROUND, ImageError, InputError, StorageError, expected, failed, listed
from partlens.records import write_text
from partlens_papers.data.layouts import LAYOUTS, LayoutName, layout_of
from partlens_papers.data.listing import Choice, Crop, Landmarks, LeftOut, Listing

_SHOWN = 5  # findings of one kind on the terminal


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        path: the folder, for :meth:`partlens.data.images.ImageSet.open`.
        categories: number of images of each category.
        landmarks: number of positions of each landmark.
        left_out: images, objects and files of the data set that are not in the table.
        unused_parts: annotated parts without a position in it.
        notes: sentences about the data set as a whole.
    """

    path: Path
    categories: dict[str, int]
    landmarks: dict[str, int]
    left_out: tuple[LeftOut, ...] = ()
    unused_parts: tuple[UnusedPart, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return what was written as lines for the terminal, the longest lists cut short and counted."""
        out = [f"{self.path}: {sum(self.categories.values())} images"]
        out += [f"  {count} {name or '(no category)'}" for name, count in self.categories.items()]
        out += [f"  landmark {name}: {count}" for name, count in self.landmarks.items()]
        for what, found in (
            ("not listed", [f"{item.key}: {item.reason}" for item in self.left_out]),
            ("part not used", [f"{part.key}, {part.landmark}: {part.reason}" for part in self.unused_parts]),
            ("note", list(self.notes)),
        ):
            out += [f"  {what}: {text}" for text in found[:_SHOWN]]
            if len(found) > _SHOWN:
                out.append(f"  {what}: {len(found) - _SHOWN} more")
        return out


def print_converted(result: Converted) -> None:
    """Print what was written."""
    print("\n".join(result.lines()))  # noqa: T201 -- the command's output


@dataclass(frozen=True)
class _Images:
    """The rows of ``images.csv``, and the parts in pixels of the images."""

    keys: tuple[str, ...]
    files: Files
    categories: tuple[str, ...]
    splits: tuple[str, ...]
    photos: tuple[str, ...]
    truth: PartTruth | None

    def of_category(self, category: str | None) -> _Images:
        return self if category is None else replace(self, categories=(category,) * len(self.keys))

    def with_background(self, others: _Images) -> _Images:
        """Add images as the category ``background``; the parts stay those of the first set."""
        mark = f"{BACKGROUND}/"
        return _Images(
            self.keys + tuple(mark + key for key in others.keys),
            Files(self.files.paths + others.files.paths, self.files.boxes + others.files.boxes),
            self.categories + (BACKGROUND,) * len(others.keys),
            self.splits + others.splits,
            self.photos + tuple(mark + photo for photo in others.photos),
            self.truth,
        )


def convert(
    layout: LayoutName,
    source: str | Path,
    out: str | Path,
    *,
    crop: Crop = "box",
    margin_frac: float = 0.0,
    landmarks: Landmarks = "all",
    category: str | None = None,
    background: str | Path | None = None,
) -> Converted:
    """Write the tables of a data set that is in its own layout.

    Annotated parts move with the cut: a part whose centre the cut leaves outside, or that was marked on another size
    of the photo, gets no position and is named in the result.

    Args:
        layout: ``cub`` (CUB-200-2011), ``animal-part`` (ILSVRC 2013 DET Animal-Part), ``pascal-part`` (VOC 2010) or
            ``animal-pose``.
        source: the data set's folder.
        out: the folder to write.
        crop: ``box`` gives one image per object, the content of its box, as the papers show objects to their networks;
            ``photo`` gives whole photos.
        margin_frac: share of the box's width and height to add on each side, 0 or more; the photo ends it.
        landmarks: ``all`` parts or those that the ``paper`` measures (head, back, tail of CUB; head, neck, torso of
            Pascal-Part).
        category: one name for all images, such as "bird" for the species of CUB.
        background: folder, table or data set whose whole photos all become the category ``background``.

    Returns:
        What was written, and what of the data set is not in it.

    Raises:
        ImageError: the folder is not in this layout, or its content is damaged.
        InputError: a margin below 0, or a margin around whole photos.
        StorageError: the folder could not be written.
    """
    known = next((each for each in LAYOUTS if each.name == layout), None)
    if known is None:
        raise InputError(expected(f"a layout among {listed([each.name for each in LAYOUTS])}", layout, "Choose one"))
    source, out = Path(source), Path(out)
    if reason := known.why_not(source):
        raise ImageError(expected(f"{known.title} in {source}", reason, "Complete the data set, or give its folder"))
    if not 0 <= margin_frac < float("inf") or (margin_frac and crop == "photo"):
        rule = "margin_frac 0 for whole photos" if margin_frac > 0 else "margin_frac >= 0"
        raise InputError(expected(rule, margin_frac, "Use 0 for boxes as annotated"))
    listing = known.read(source, Choice(crop, landmarks))
    images = _of_listing(listing, margin_frac).of_category(category)
    images = images if background is None else images.with_background(_background(Path(background)))
    truth = _write(images, out)
    return Converted(
        out,
        _counts(images),
        truth.count() if truth else {},
        listing.left_out,
        truth.unused if truth else (),
        listing.notes,
    )


def join(
    out: str | Path, photos: str | Path, *, background: str | Path | None = None, category: str | None = None
) -> Converted:
    """Write one table of photos and of background from elsewhere.

    Args:
        out: the folder to write.
        photos: folder or table whose categories are explained and whose parts are used.
        background: folder, table or data set whose images all become the category ``background``.
        category: one name for all of ``photos``.

    Returns:
        What was written.

    Raises:
        ImageError: a set that cannot be opened.
        StorageError: the folder could not be written.
    """
    images = _of_set(ImageSet.open(photos)).of_category(category)
    images = images if background is None else images.with_background(_background(Path(background)))
    truth = _write(images, Path(out))
    return Converted(Path(out), _counts(images), truth.count() if truth else {}, (), truth.unused if truth else ())


def _counts(images: _Images) -> dict[str, int]:
    return {name: images.categories.count(name) for name in sorted(set(images.categories))}


def _background(path: Path) -> _Images:
    layout = layout_of(path) if path.is_dir() and not (path / IMAGE_TABLE).is_file() else None
    if layout is None:
        return _of_set(ImageSet.open(path))
    return _of_listing(layout.read(path, Choice("photo")), 0.0)


def _of_set(images: ImageSet) -> _Images:
    files = Files(images.files, images.boxes_px)
    return _Images(images.keys, files, images.categories, images.splits, images.photos, images.part_truth)


def _of_listing(listing: Listing, margin_frac: float) -> _Images:
    """Cut the photos of a data set to their boxes, and move its parts along."""
    whole = Files(listing.files, ((0.0, 0.0, 1e9, 1e9),) * len(listing.files))  # with a box: pixels as stored
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sizes = tuple(pool.map(lambda row: _size(whole, row), range(len(listing.files))))
    boxes: list[Box | None] = []
    for (left, top, right, bottom), size in zip(listing.boxes_px.tolist(), sizes, strict=True):
        if listing.cut and np.isfinite((left, top, right, bottom)).all():
            across, down = margin_frac * (right - left), margin_frac * (bottom - top)
            boxes.append((left - across, top - down, right + across, bottom + down))
        else:  # a box of the whole photo says that its pixels are shown as stored
            boxes.append(None if size is None else (0.0, 0.0, float(size[0]), float(size[1])))
    return _Images(
        listing.keys,
        Files(listing.files, tuple(boxes)),
        listing.categories,
        filled_splits(listing.splits, listing.photos),
        listing.photos,
        None if listing.truth is None else _cut_truth(listing.truth(listing.keys), boxes, sizes),
    )


def _size(files: Files, row: int) -> tuple[int, int] | None:
    """Return width and height of a photo, None where it cannot be read; partlens then reports it by name."""
    try:
        return files.size_px(row)
    except ImageError:
        return None


def _cut_truth(truth: PartTruth, boxes: Sequence[Box | None], sizes: Sequence[tuple[int, int] | None]) -> PartTruth:
    """Move parts from the whole photos to the images that are cut out of them."""
    positions, unused = truth.positions_px.copy(), list(truth.unused)
    image_sizes = np.full((len(truth.keys), 2), np.nan, dtype=np.float32)
    windows: dict[str, tuple[int, int, int, int]] = {}
    for row, (key, box, photo) in enumerate(zip(truth.keys, boxes, sizes, strict=True)):
        if photo is None or box is None:
            continue
        left, top, right, bottom = window_px(box, photo)
        if right <= left or bottom <= top:  # the box lies outside; partlens reports the image by name
            continue
        marked = truth.image_size_px[row]
        known = np.flatnonzero(np.isfinite(positions[row]).all(axis=1))
        if np.isfinite(marked).all() and tuple(marked) != photo:
            reason = f"it was marked in {marked[0]:g}x{marked[1]:g} pixels, the photo has {photo[0]}x{photo[1]}"
            unused += [UnusedPart(key, truth.landmarks[column], reason) for column in known]
            positions[row] = np.nan
            continue
        windows[key] = (left, top, right, bottom)
        positions[row] -= np.array([left, top], dtype=np.float32)
        image_sizes[row] = right - left, bottom - top
        for column in known:
            x, y = positions[row, column]
            if not (0 <= x <= right - left and 0 <= y <= bottom - top):
                reason = f"its centre ({x:g}, {y:g}) is outside the image of {right - left}x{bottom - top} pixels"
                unused.append(UnusedPart(key, truth.landmarks[column], reason))
                positions[row, column] = np.nan
    return replace(
        truth,
        positions_px=positions,
        sizes_px=np.where(np.isnan(positions), np.float32(np.nan), truth.sizes_px),
        image_size_px=image_sizes,
        unused=tuple(unused),
        masks=None if truth.masks is None else _CutMasks(truth.masks, windows),
    )


@dataclass(frozen=True)
class _CutMasks:
    """The parts' pixels in the images that are cut out of the photos; none where a photo cannot be cut."""

    whole: Callable[[str], dict[str, BoolArray]]
    windows: dict[str, tuple[int, int, int, int]]

    def __call__(self, key: str) -> dict[str, BoolArray]:
        if key not in self.windows:
            return {}
        left, top, right, bottom = self.windows[key]
        return {name: mask[top:bottom, left:right] for name, mask in self.whole(key).items()}


def _write(images: _Images, out: Path) -> PartTruth | None:
    """Write everything, the table of images last; return the parts that were written."""
    twice = [key for key, times in Counter(images.keys).items() if times > 1]
    if twice:
        raise ImageError(expected("every image's name once", f"{listed(twice)} more than once", "Rename the photos"))
    truth = images.truth
    if truth is not None and truth.landmarks:
        _table(out / LANDMARK_TABLE, ("image", "landmark", "x", "y", "width", "height", "instances"), _marks(truth))
        if truth.masks is not None:
            draw = _Drawing(out / MASK_FOLDER, truth.masks)
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(draw, truth.keys))
    else:
        (out / LANDMARK_TABLE).unlink(missing_ok=True)  # of an earlier call
    rows = [
        (key, _relative(path, out), category, split, photo, *(box or ("",) * 4))
        for key, path, category, split, photo, box in zip(
            images.keys,
            images.files.paths,
            images.categories,
            images.splits,
            images.photos,
            images.files.boxes,
            strict=True,
        )
    ]
    _table(out / IMAGE_TABLE, ("image", "file", "category", "split", "photo", *BOX_COLUMNS), rows)
    return truth


def _relative(path: Path, out: Path) -> str:
    """Name a file relative to the folder, absolutely where it lies on another drive."""
    try:
        return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def _marks(truth: PartTruth) -> Iterable[tuple[Any, ...]]:
    """List the known positions; numbers are written so that the same float32 comes back."""
    for column, name in enumerate(truth.landmarks):
        known = np.flatnonzero(np.isfinite(truth.positions_px[:, column]).all(axis=1))
        if not known.size:
            yield truth.keys[0], name, 0, 0, "", "", 0  # the landmark exists, but no image shows it
        for row in known:
            place = [str(value) for value in truth.positions_px[row, column]]
            size = ["" if np.isnan(value) else str(value) for value in truth.sizes_px[row, column]]
            yield (truth.keys[row], name, *place, *size, 1)


def _table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


@dataclass(frozen=True)
class _Drawing:
    """Writes the masks of one image, one file for each part that it shows."""

    folder: Path
    masks: Callable[[str], dict[str, BoolArray]]

    def __call__(self, key: str) -> None:
        for name, mask in self.masks(key).items():
            path = self.folder / name / f"{key}.png"
            try:
                if mask.any():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(mask).save(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(failed(f"write {path}", error, "Free space or choose another folder")) from error
