"""Open whatever lies at a path as images: a table, a data set in its own layout, a folder or a joined set."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from partlens.data.annotations import LANDMARK_TABLE, PartTruth, read_landmark_table
from partlens.data.files import Files, parallel
from partlens.data.images import ImageSet
from partlens.data.listing import Choice, Crop, Landmarks
from partlens.data.tables import IMAGE_TABLE
from partlens.errors import ImageError, InputError, expected, nearest
from partlens_papers.data.joined import open_joined
from partlens_papers.data.layouts import layout_of


def open_images(path: Path | str, crop: Crop, margin_frac: float, landmarks: Landmarks) -> ImageSet:
    """Open what lies at a path; arguments and errors are those of :meth:`~partlens.data.images.ImageSet.open`."""
    plain = crop == "box" and margin_frac == 0 and landmarks == "all"
    path = Path(path)
    if path.suffix.lower() == ".json":
        if not plain:
            raise InputError(
                expected(f"no other choices beside {path}", "crop, margin_frac or landmarks", "Write them into it")
            )
        found = open_joined(path)
    else:
        found = _open_one(path, crop, margin_frac, landmarks)
    return replace(found, path=path.resolve() if plain else None)


def _open_one(path: Path, crop: Crop, margin_frac: float, landmarks: Landmarks) -> ImageSet:
    choice = Choice(crop, landmarks)
    layout = layout_of(path) if path.is_dir() and not (path / IMAGE_TABLE).is_file() else None
    if layout is not None:
        return ImageSet.from_listing(layout.read(path, choice), margin_frac)
    if margin_frac != 0:
        rule = f"margin_frac 0 for images without boxes at {path}"
        raise InputError(expected(rule, margin_frac, "Leave it out, or open a data set with boxes"))
    if path.is_dir():
        table, folder = path / IMAGE_TABLE, path
        images = ImageSet.from_table(table) if table.is_file() else ImageSet.from_folder(path)
    else:
        images, folder = ImageSet.from_table(path), path.parent
        if path.name != IMAGE_TABLE:
            return images
    annotated = folder / LANDMARK_TABLE
    if not annotated.is_file():
        return images
    truth = read_landmark_table(annotated)
    if not set(truth.keys) & set(images.keys):
        raise ImageError(
            expected(
                f"images of the set in {annotated}",
                f"only others, such as {truth.keys[0]!r}",
                f"Write names like {nearest(truth.keys[0], images.keys, 1)[0]!r}",
            )
        )
    return replace(images, _truth=partial(_with_image_sizes, truth, folder))


def _with_image_sizes(truth: PartTruth, root: Path, keys: tuple[str, ...]) -> PartTruth:
    """Select the rows of ``keys`` and read the size of every annotated image from its header."""
    rows = truth.for_keys(keys)
    wanted = [
        row
        for row in range(len(keys))
        if np.isfinite(rows.positions_px[row]).any() and not np.isfinite(rows.image_size_px[row]).all()
    ]
    files = Files(tuple(root / key for key in keys))

    def size(row: int) -> tuple[float, float]:
        try:
            return files.size_px(row)
        except ImageError:  # a file that cannot be read has no known size; readable() reports it by name
            return np.nan, np.nan

    for row, found in zip(wanted, parallel(size, wanted, None), strict=True):
        rows.image_size_px[row] = found
    return rows
