"""Several data sets used as one, described by a small JSON file beside them.

    {"schema": "partlens.photos/1",
     "sets": [{"path": "CUB_200_2011", "landmarks": "paper", "category": "bird"},
              {"path": "animals", "crop": null, "category": "background"}]}

Paths are relative to the file. ``crop`` and ``landmarks`` are those of
:meth:`~partlens.data.images.ImageSet.open`; ``category`` gives all images of a set one category. Annotated parts are
those of the first set. So CUB's two hundred species become one category "bird", and photos of other animals its
background.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from partlens.data.images import ImageSet
from partlens.data.listing import Crop, Landmarks
from partlens.errors import BACKGROUND, ImageError, InputError, expected
from partlens.records import read_json, write_json

SCHEMA = "partlens.photos/1"
_FIELDS = ("path", "crop", "landmarks", "category")


@dataclass(frozen=True)
class PhotoSource:
    """One of the sets that are joined.

    Attributes:
        path: folder or table.
        category: what all its images show; their own categories when left out.
        crop: as in :meth:`~partlens.data.images.ImageSet.open`.
        landmarks: as there.
    """

    path: Path
    category: str | None = None
    crop: Crop = "box"
    landmarks: Landmarks = "all"

    def open(self) -> ImageSet:
        """Open the set."""
        images = ImageSet.open(self.path, crop=self.crop, landmarks=self.landmarks)
        if self.category is None:
            return images
        return dataclasses.replace(images, categories=(self.category,) * len(images), path=None)


def join(sources: Sequence[PhotoSource]) -> ImageSet:
    """Open several sets as one.

    Names of further sets' images begin with their category, or with the folder's name where they keep their own.

    Raises:
        ImageError: no set, one that cannot be opened, or two sets whose images have the same names.
    """
    if not sources:
        raise ImageError(expected("at least one set to join", "none", "Name a folder"))
    sets = [source.open() for source in sources]
    if len(sets) == 1:
        return sets[0]
    prefixes = [f"{source.category or source.path.name}/" for source in sources[1:]]
    return ImageSet.from_sets(sets, prefixes, name=" and ".join(images.name for images in sets))


def write_joined(path: Path, sources: Sequence[PhotoSource]) -> None:
    """Write the file that :func:`open_joined` reads; paths are written as absolute ones."""
    entries = [
        {"path": str(s.path.resolve()), "crop": s.crop, "landmarks": s.landmarks}
        | ({} if s.category is None else {"category": s.category})
        for s in sources
    ]
    write_json(path, {"schema": SCHEMA, "sets": entries})


def join_data(
    out: str | Path,
    photos: str | Path | None,
    background: str | Path | None = None,
    *,
    category: str | None = None,
    landmarks: Landmarks = "all",
) -> dict[str, int]:
    """Write a file by which photos and background are opened as one set.

    Args:
        out: the file to write, its name ending in ``.json``.
        photos: folder or table whose categories are explained and whose parts are used.
        background: folder or table whose whole photos all count as the category ``background``.
        category: one name for all of ``photos``; their own categories when left out.
        landmarks: of ``photos``, as in :meth:`~partlens.data.images.ImageSet.open`.

    Returns:
        The number of images of each category.

    Raises:
        InputError: no photos, or a name that does not end in ``.json``.
        ImageError: a set that cannot be opened, or two whose images have the same names.
    """
    if photos is None or Path(out).suffix != ".json":
        got = "no --photos" if photos is None else out
        raise InputError(expected("a file NAME.json to write and --photos FOLDER", got, "Name both"))
    sources = [PhotoSource(Path(photos), category, landmarks=landmarks)]
    if background is not None:
        sources.append(PhotoSource(Path(background), BACKGROUND, crop=None))
    counts = join(sources).category_counts()
    write_joined(Path(out), sources)
    return counts


def _source(entry: Any, number: int, file: Path) -> PhotoSource:
    where = f"set {number} of {file}"
    if not isinstance(entry, Mapping) or not isinstance(entry.get("path"), str):
        raise ImageError(expected(f"a path in {where}", entry, 'Write {"path": "FOLDER"}'))
    unknown = [name for name in entry if name not in _FIELDS]
    if unknown:
        raise ImageError(expected(f"fields among {', '.join(_FIELDS)} in {where}", unknown[0], "Remove it"))
    category = entry.get("category")
    if category is not None and (not isinstance(category, str) or not category):
        raise ImageError(expected(f"a category's name in {where}", category, "Write a word, or leave it out"))
    # Values that do not exist are refused by ImageSet.open.
    crop, landmarks = cast("Crop", entry.get("crop", "box")), cast("Landmarks", entry.get("landmarks", "all"))
    return PhotoSource(file.parent / entry["path"], category, crop, landmarks)


def open_joined(path: Path) -> ImageSet:
    """Open the sets that a JSON file names, as one.

    Raises:
        ImageError: no such file, another kind of JSON, or a set that cannot be opened.
    """
    if not path.is_file():
        raise ImageError(expected("a file that joins sets", f"nothing at {path}", "Check the path"))
    content = read_json(path)
    if not isinstance(content, Mapping) or content.get("schema") != SCHEMA or not isinstance(content.get("sets"), list):
        found = content.get("schema", "no schema") if isinstance(content, Mapping) else type(content).__name__
        raise ImageError(
            expected(f'"schema": "{SCHEMA}" and a list "sets" in {path}', found, "Write it with partlens data join")
        )
    return join([_source(entry, number, path) for number, entry in enumerate(content["sets"], 1)])
