"""What a reader of a data set hands over: which images there are, where the objects are, what it does not list.

A reader lists; it decodes nothing. :mod:`partlens_papers.data.convert` writes the tables that partlens reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from partlens.data.annotations import PartTruth, UnusedPart
from partlens.data.files import Box

BoxArray = npt.NDArray[np.float64]
Crop = Literal["box", "photo"]
Landmarks = Literal["all", "paper"]


@dataclass(frozen=True)
class LeftOut:
    """An image, object or file of the data set that is not in the listing: its name, and the reason in words."""

    key: str
    reason: str


@dataclass(frozen=True, eq=False)
class Listing:
    """The content of one data set, one row per image that is to be read.

    Attributes:
        layout: name of the layout, as in :data:`partlens_papers.data.layouts.LAYOUTS`.
        root: folder of the data set.
        keys: unique names: the path below ``root``; where one photo gives several images, with ``#`` and the
            number of the object behind it.
        files: the photo of each row.
        categories: what each image shows.
        splits: the data set's own split, ``""`` where it has none.
        photos: the photo that each image is cut from; equal names stay on one side of a split.
        boxes_px: float64 ``[image, 4]``, left, top, right and bottom edge of the object in pixels of the photo
            as it is stored (the top left corner of the photo is 0, 0); ``nan`` where there is no box.
        cut: whether the images are the boxes' contents (True) or the whole photos.
        truth: gives, for some of the keys, the parts in pixels of the whole photo; None where the data set
            holds none. Called when the parts are first needed.
        left_out: what is not listed, and why.
        notes: sentences about the data set as a whole, such as a missing annotation file.
    """

    layout: str
    root: Path
    keys: tuple[str, ...]
    files: tuple[Path, ...]
    categories: tuple[str, ...]
    splits: tuple[str, ...]
    photos: tuple[str, ...]
    boxes_px: BoxArray
    cut: bool
    truth: Callable[[tuple[str, ...]], PartTruth] | None = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """How a data set is to be read.

    Attributes:
        crop: ``"box"``: one image per object, the content of its box, as the papers' single-category
            performers see it; ``"photo"``: one image per photo, whole.
        landmarks: ``"all"`` parts of the data set under its own names, or those of the ``"paper"``.
    """

    crop: Crop = "box"
    landmarks: Landmarks = "all"

    @property
    def cut(self) -> bool:
        """Whether images are the contents of boxes."""
        return self.crop == "box"


@dataclass(frozen=True)
class PartTable:
    """Parts that were found, before they become a :class:`~partlens.data.annotations.PartTruth`.

    Attributes:
        landmarks: the columns, as the reader names them.
        found: for a key and a landmark, every instance as x, y, width and height in pixels of the photo.
        rename: landmarks to keep and what to call them; all under their own names where empty.
        unused: annotations that could not be read as a position.
        sizes_px: for a key, width and height of the photo for which the parts were marked, where that is known.
    """

    landmarks: tuple[str, ...]
    found: Mapping[tuple[str, str], list[Box]] = field(repr=False)
    rename: Mapping[str, str] = field(default_factory=dict)
    unused: tuple[UnusedPart, ...] = ()
    sizes_px: Mapping[str, tuple[int, int]] = field(default_factory=dict, repr=False)

    def truth(
        self, keys: tuple[str, ...], masks: Callable[[str], dict[str, npt.NDArray[np.bool_]]] | None = None
    ) -> PartTruth:
        """Return the parts of these images; a part that an image shows more than once becomes ``nan``."""
        kept = {name: self.rename.get(name, "") if self.rename else name for name in self.landmarks}
        names = [name for name in self.landmarks if kept[name]]
        values = np.full((len(keys), len(names), 4), np.nan, dtype=np.float32)
        several: list[UnusedPart] = []
        for row, key in enumerate(keys):
            for column, name in enumerate(names):
                instances = self.found.get((key, name), [])
                if len(instances) == 1:
                    values[row, column] = instances[0]
                elif instances:
                    several.append(UnusedPart(key, kept[name], f"it is there {len(instances)} times"))
        unknown = (np.nan, np.nan)
        sizes = np.array([self.sizes_px.get(key, unknown) for key in keys], dtype=np.float32).reshape(-1, 2)
        shown = set(keys)
        empty = [part for part in self.unused if part.key in shown and kept.get(part.landmark)]
        return PartTruth(
            tuple(kept[name] for name in names),
            keys,
            values[:, :, :2],
            values[:, :, 2:],
            sizes,
            masks,
            (*several, *(replace(part, landmark=kept[part.landmark]) for part in empty)),
        )
