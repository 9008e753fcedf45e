"""Caltech-UCSD Birds-200-2011: species, boxes, the official split and fifteen parts, from its text files."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from partlens.data.annotations import PartTruth
from partlens.data.files import Box
from partlens.errors import ImageError, expected, listed
from partlens_papers.data.listing import Choice, LeftOut, Listing, PartTable

PAPER_LANDMARKS = {"forehead": "head", "back": "back", "tail": "tail"}
"""The parts that the papers measure, by the data set's name, with the name that the papers' tables use.

The released code takes parts 1, 6 and 14 of ``parts.txt`` (back, forehead, tail), the text calls the forehead
the head.
"""

_SIGNS = ("images.txt", "image_class_labels.txt", "classes.txt")
_BOXES, _SPLIT = "bounding_boxes.txt", "train_test_split.txt"
_PART_NAMES, _PART_PLACES = "parts/parts.txt", "parts/part_locs.txt"


def why_not(folder: Path) -> str:
    """Return what keeps a folder from being read as CUB-200-2011, ``""`` where nothing does.

    The data set's folder holds ``images/``, ``images.txt``, ``image_class_labels.txt`` and ``classes.txt``. A
    folder with ``images.txt`` and ``images/`` is taken for it, so that a missing file is an error and not a
    folder of nameless photos.
    """
    missing = [name for name in ("images.txt", "images") if not (folder / name).exists()]
    return f"no {' and no '.join(missing)}" if missing else ""


def read(folder: Path, choice: Choice) -> Listing:
    """List the photos of CUB-200-2011.

    Categories are the species (``001.Black_footed_Albatross``), splits the data set's own. Boxes and parts are
    taken in pixels from the photo's top left corner. A part that is marked as not visible is ``nan``.

    Args:
        folder: the data set's folder.
        choice: crop, and the landmarks: all fifteen, or ``head`` (the forehead), ``back`` and ``tail``.

    Raises:
        ImageError: a file is missing or damaged; the text names it and the line.
    """
    for name in (*_SIGNS, *((_BOXES,) if choice.cut else ())):
        if not (folder / name).is_file():
            remedy = "Complete the data set" + (", or convert it with --crop photo" if name == _BOXES else "")
            raise ImageError(expected(f"a file {folder / name}", "nothing there", remedy))
    path_of = _by_number(folder / "images.txt")
    species = _by_number(folder / "classes.txt")
    label = _by_number(folder / "image_class_labels.txt")
    boxes = _values(folder / _BOXES, 4) if (folder / _BOXES).is_file() else {}
    side = _values(folder / _SPLIT, 1) if (folder / _SPLIT).is_file() else {}
    notes = [] if side else [f"{_SPLIT} is missing, so the hash of the photo's name splits the photos"]
    left_out: list[LeftOut] = []
    kept: list[str] = []
    for number, path in path_of.items():
        reason = ""
        if number not in label:
            reason = "image_class_labels.txt does not name it"
        elif label[number] not in species:
            reason = f"its class {label[number]} is not in classes.txt"
        elif choice.cut and number not in boxes:
            reason = f"{_BOXES} does not name it"
        elif choice.cut and not (boxes[number][2] > 0 and boxes[number][3] > 0):
            reason = f"its box in {_BOXES} is empty"
        if reason:
            left_out.append(LeftOut(f"images/{path}", reason))
        else:
            kept.append(number)
    if not kept:
        rule = f"annotated photos in {folder}"
        raise ImageError(expected(rule, left_out[0].reason if left_out else "none", "Complete the data set"))
    without_side = [f"images/{path_of[number]}" for number in kept if side and number not in side]
    if without_side:
        notes.append(f"{_SPLIT} does not name {listed(without_side)}; the hash of the name splits them")
    notes.extend(_strangers(folder, set(path_of.values())))
    keys = tuple(f"images/{path_of[number]}" for number in kept)
    corners = np.array([boxes.get(number, [math.nan] * 4) for number in kept], dtype=np.float64)
    corners[:, 2:] += corners[:, :2]
    truth = None
    if (folder / _PART_NAMES).is_file() and (folder / _PART_PLACES).is_file():
        truth = _Parts(folder, dict(zip(kept, keys, strict=True)), choice)
    else:
        notes.append(f"{_PART_NAMES} or {_PART_PLACES} is missing, so there are no landmarks")
    return Listing(
        layout="cub",
        root=folder,
        keys=keys,
        files=tuple(folder / key for key in keys),
        categories=tuple(species[label[number]] for number in kept),
        splits=tuple(("test", "train")[side[number][0] > 0] if number in side else "" for number in kept),
        photos=keys,
        boxes_px=corners,
        cut=choice.cut,
        truth=truth,
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Parts:
    """Reads the part files when they are first asked for."""

    folder: Path
    key_of: dict[str, str]
    choice: Choice

    def __call__(self, keys: tuple[str, ...]) -> PartTruth:
        return self._table.truth(keys)

    @cached_property
    def _table(self) -> PartTable:
        names = _by_number(self.folder / _PART_NAMES)
        found: dict[tuple[str, str], list[Box]] = defaultdict(list)
        path = self.folder / _PART_PLACES
        for line, (image, part, *rest) in _lines(path, 5):
            x, y, visible = _floats(rest, path, line)
            if part not in names:
                raise ImageError(
                    expected(f"a part of {_PART_NAMES} in line {line} of {path}", part, "Copy the file again")
                )
            if visible and image in self.key_of:
                found[self.key_of[image], names[part]].append((x, y, math.nan, math.nan))
        rename = PAPER_LANDMARKS if self.choice.landmarks == "paper" else {}
        return PartTable(tuple(names.values()), found, rename)


def _lines(path: Path, columns: int) -> list[tuple[int, list[str]]]:
    """Read a text file of ``columns`` values per line, the last of which may hold blanks."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(expected(f"a text file {path}", str(error), "Copy the file again")) from error
    rows = [(line, row.split(None, columns - 1)) for line, row in enumerate(text.splitlines(), start=1) if row.strip()]
    short = next((row for row in rows if len(row[1]) != columns), None)
    if short is not None:
        rule = f"{columns} values in line {short[0]} of {path}"
        raise ImageError(expected(rule, f"{' '.join(short[1])!r}", "Copy the file again"))
    return rows


def _by_number(path: Path) -> dict[str, str]:
    """Read lines of a number and a text."""
    found: dict[str, str] = {}
    for line, (number, text) in _lines(path, 2):
        if number in found:
            raise ImageError(
                expected(f"every number once in {path}", f"{number} again in line {line}", "Copy it again")
            )
        found[number] = text.strip()
    return found


def _values(path: Path, columns: int) -> dict[str, list[float]]:
    """Read lines of a number and ``columns`` values."""
    return {number: _floats(rest, path, line) for line, (number, *rest) in _lines(path, 1 + columns)}


def _floats(texts: list[str], path: Path, line: int) -> list[float]:
    try:
        values = [float(text) for text in texts]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise ImageError(expected(f"numbers in line {line} of {path}", f"{' '.join(texts)!r}", "Copy the file again"))
    return values


def _strangers(folder: Path, known: set[str]) -> list[str]:
    """Say which photos lie in the folder but in no list."""
    root = folder / "images"
    strangers = sorted(
        path.relative_to(root).as_posix()
        for parent, _, names in os.walk(root)
        for path in (Path(parent) / name for name in names if name.lower().endswith((".jpg", ".jpeg")))
        if path.relative_to(root).as_posix() not in known
    )
    if not strangers:
        return []
    count = f"{len(strangers)} photo{'s' if len(strangers) > 1 else ''}"
    return [f"{count} in images/ without a line in images.txt, not used: {listed(strangers)}"]
