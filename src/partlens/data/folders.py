"""Folders of images: which files they hold, and what the sub-folders say."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from partlens.data.tables import LANDMARK_TABLE, MASK_FOLDER
from partlens.errors import ImageError, expected

SUFFIXES = frozenset(
    (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp")
)

_VALIDATION_FOLDERS = frozenset({"val", "valid", "validation"})
_SPLIT_FOLDERS = _VALIDATION_FOLDERS | {"train", "test"}


def _below(folder: Path) -> Iterator[Path]:
    """Yield image files below a folder in a fixed order, following links but no circle of links."""
    seen: set[str] = set()
    masks = folder / MASK_FOLDER if (folder / LANDMARK_TABLE).is_file() else None
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen or Path(parent) == masks:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent) / name


def image_files(path: Path) -> tuple[Path, ...]:
    """Return the image files below a folder, in alphabetical order of folders and files.

    Raises:
        ImageError: the folder does not exist or holds no image.
    """
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        raise ImageError(expected(f"a folder of images at {path}", got, "Check the path"))
    files = tuple(_below(path))
    if not files:
        remedy = f"Add files ending in {', '.join(sorted(SUFFIXES))}, or give another folder"
        raise ImageError(expected(f"images in {path}", "none", remedy))
    return files


def categories_and_splits(parts: Sequence[tuple[str, ...]]) -> tuple[list[str] | None, list[str] | None]:
    """Read category and split of each image off its path below the folder, None where it does not say them."""
    top = _top_folders(parts)
    if top is None or not {"train"} <= set(top) <= _SPLIT_FOLDERS:
        return top, None
    rename = {} if "test" in top else dict.fromkeys(_VALIDATION_FOLDERS, "test")
    return _top_folders([names[1:] for names in parts]), [rename.get(name, name) for name in top]


def _top_folders(parts: Sequence[tuple[str, ...]]) -> list[str] | None:
    """Return the first folder of each path, None where a file lies in none."""
    return [names[0] for names in parts] if all(len(names) > 1 for names in parts) else None
