"""ILSVRC 2013 DET Animal-Part: photos of thirty kinds of animals with boxes, heads and front legs, in MATLAB files.

The data set comes in two pieces, which are read together when both lie below one folder:

- ``nXXXXXXXX_obj/img/img/00001.jpg``, the whole photo of every object (a photo with two objects is there twice),
  and ``nXXXXXXXX_obj/img/data.mat``, the objects' boxes;
- ``nXXXXXXXX/truth_part01.mat`` and ``truth_part02.mat``, the heads and the front legs of some of them.

A folder ``neg`` of photos next to them is the category ``background``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from partlens.data.annotations import PartTruth
from partlens.data.files import Box
from partlens.errors import BACKGROUND, ImageError, expected, listed
from partlens_papers.data.listing import BoxArray, Choice, LeftOut, Listing, PartTable
from partlens_papers.data.matlab import numbers, read_matlab, structs

CATEGORIES = {
    "n01443537": "goldfish",
    "n01503061": "bird",
    "n01639765": "frog",
    "n01662784": "turtle",
    "n01674464": "lizard",
    "n01882714": "koala",
    "n01983481": "lobster",
    "n02084071": "dog",
    "n02118333": "fox",
    "n02121808": "cat",
    "n02129165": "lion",
    "n02129604": "tiger",
    "n02131653": "bear",
    "n02324045": "rabbit",
    "n02342885": "hamster",
    "n02355227": "squirrel",
    "n02374451": "horse",
    "n02391049": "zebra",
    "n02395003": "swine",
    "n02398521": "hippopotamus",
    "n02402425": "cattle",
    "n02411705": "sheep",
    "n02419796": "antelope",
    "n02437136": "camel",
    "n02444819": "otter",
    "n02454379": "armadillo",
    "n02484322": "monkey",
    "n02503517": "elephant",
    "n02509815": "red_panda",
    "n02510455": "giant_panda",
}
"""The thirty categories by WordNet number; another number becomes a category under its own name."""

LANDMARKS = {1: "head", 2: "front_legs"}
"""What ``truth_part01.mat`` and ``truth_part02.mat`` hold: the feet of birds and claws of lobsters are front legs."""

FRAME_PX = 224.0
"""Side of the square to which a box was squashed before its parts were marked."""

_OBJECTS = re.compile(r"n\d{8}_obj")
_TRUTH = re.compile(r"truth_part(\d+)\.mat")
_DEPTH = 5  # the released code keeps its truth files five folders below its root
_FULL_OF_PHOTOS = frozenset({"img", "images", "neg"})  # nothing else is to be found below them
_PHOTOS = (".jpg", ".jpeg")
_NO_BOX = (math.nan, math.nan, math.nan, math.nan)


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Go down at most ``depth`` folders, past hidden ones, links followed; yield folders and files by name."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield here, list(folders), sorted(names)
        if len(here.relative_to(folder).parts) >= depth:
            folders.clear()
        folders[:] = [name for name in folders if name not in _FULL_OF_PHOTOS]


def _object_folders(folder: Path) -> list[Path]:
    """Find the categories' folders, in ``folder`` itself or one level below."""
    found = [here / name for here, folders, _ in _walk(folder, 1) for name in folders if _OBJECTS.fullmatch(name)]
    return sorted((path for path in found if (path / "img" / "img").is_dir()), key=lambda path: path.name)


def why_not(folder: Path) -> str:
    """Return what keeps a folder from being read as ILSVRC Animal-Part, ``""`` where nothing does.

    The folder, or one right below it, holds ``nXXXXXXXX_obj/img/img/`` for at least one category.
    """
    return "" if _object_folders(folder) else "no folder nXXXXXXXX_obj/img/img in it or one level below"


def read(folder: Path, choice: Choice) -> Listing:
    """List the objects (or the photos) of ILSVRC Animal-Part.

    Photos are named by the first twelve digits of the number that Git gives their content, so that copies of one
    photo for several objects are one group; the data set has no split of its own. Parts were marked on the box's
    content squashed to 224x224; their positions are taken back to the photo. A part with several boxes on one
    object is ``nan``, as in the released code.

    Args:
        folder: the folder above both pieces of the data set (or that of the photos alone).
        choice: crop; the landmarks ``"all"`` and ``"paper"`` are the same here.

    Raises:
        ImageError: a MATLAB file that is damaged or does not fit the photos, or the package for it is missing.
    """
    truth_of, neg = _below(folder)
    rows: list[_Row] = []
    left_out: list[LeftOut] = []
    notes: list[str] = []
    files: dict[str, dict[int, Path]] = {}
    for place in _object_folders(folder):
        number = place.name.removesuffix("_obj")
        if number in files:
            raise ImageError(
                expected(f"one folder {place.name} in {folder}", "several", "Open the folder of one copy alone")
            )
        if number not in CATEGORIES:
            notes.append(f"{number} is none of the data set's thirty categories; it keeps its number as name")
        files[number] = _photos(place / "img" / "img")
        boxes, more = _boxes(place / "img" / "data.mat", truth_of.get(number, {}))
        notes.extend(more)
        for index, path in files[number].items():
            key = path.relative_to(folder).as_posix()
            box = boxes.get(index, _NO_BOX)
            if choice.cut and not all(map(math.isfinite, box)):
                left_out.append(LeftOut(key, "no annotation file holds its box"))
            elif choice.cut and not (box[2] > box[0] and box[3] > box[1]):
                left_out.append(LeftOut(key, f"its box {box} is empty"))
            else:
                rows.append(_Row(key, path, CATEGORIES.get(number, number), number, index, box))
        notes.extend(_truth_notes(number, truth_of.get(number, {})))
        missing = [f"{index:05d}.jpg" for index in sorted(set(boxes) - set(files[number]))]
        if missing:
            notes.append(f"{number}: boxes of {len(missing)} objects without a photo ({listed(missing, 2)})")
    rows += [
        _Row(path.relative_to(folder).as_posix(), path, BACKGROUND, "", 0, _NO_BOX)
        for path in (_photos(neg).values() if neg else ())
    ]
    if not rows:
        got = f"{len(left_out)} photos without a box" if left_out else "none"
        raise ImageError(expected(f"annotated photos in {folder}", got, "Complete the data set"))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        photos = list(pool.map(_content_name, (row.path for row in rows)))
    if not choice.cut:
        rows, photos, objects = _one_per_photo(rows, photos)
    else:
        objects = {row.key: (row,) for row in rows}
    return Listing(
        layout="animal-part",
        root=folder,
        keys=tuple(row.key for row in rows),
        files=tuple(row.path for row in rows),
        categories=tuple(row.category for row in rows),
        splits=("",) * len(rows),
        photos=tuple(photos),
        boxes_px=np.array([row.box for row in rows], dtype=np.float64),
        cut=choice.cut,
        truth=_Parts(objects, truth_of) if truth_of else None,
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Row:
    """One object: its photo, category, number within the category, and box (``nan`` where unknown)."""

    key: str
    path: Path
    category: str
    wordnet: str
    index: int
    box: Box


def _one_per_photo(rows: list[_Row], photos: list[str]) -> tuple[list[_Row], list[str], dict[str, tuple[_Row, ...]]]:
    """Keep the first of the files with equal content; give all its objects to it."""
    groups: dict[tuple[str, str], list[_Row]] = defaultdict(list)
    for row, photo in zip(rows, photos, strict=True):
        groups[row.category, photo].append(row)
    first = [group[0] for group in groups.values()]
    return first, [photo for _, photo in groups], {group[0].key: tuple(group) for group in groups.values()}


def _content_name(path: Path) -> str:
    """Name a photo by its content, as Git does."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(expected(f"a photo {path}", str(error), "Copy the file again")) from error
    digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest()[:12]


def _below(folder: Path) -> tuple[dict[str, dict[int, Path]], Path | None]:
    """Find the truth files (by category and part) and the background photos, a few folders down."""
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    neg: Path | None = None
    for here, folders, names in _walk(folder, _DEPTH):
        number = here.name.removesuffix("_obj")
        for name in names:
            if match := _TRUTH.fullmatch(name):
                part = int(match[1])
                if part in found[number]:
                    raise ImageError(
                        expected(f"one {name} of {number}", f"{found[number][part]} and {here / name}", "Remove one")
                    )
                found[number][part] = here / name
        if neg is None and "neg" in folders:
            neg = here / "neg"
    return {number: dict(sorted(parts.items())) for number, parts in found.items() if parts}, neg


def _photos(folder: Path) -> dict[int, Path]:
    """List numbered photos."""
    with os.scandir(folder) as entries:
        paths = [Path(entry.path) for entry in entries if entry.name.lower().endswith(_PHOTOS)]
    strange = sorted(path.name for path in paths if not path.stem.isdecimal())
    if strange:
        rule = f"photos named by numbers, such as 00001.jpg, in {folder}"
        raise ImageError(expected(rule, listed(strange), "Remove what does not belong to the data set"))
    return {int(path.stem): path for path in sorted(paths, key=lambda path: int(path.stem))}


def _entries(path: Path, variable: str, *fields: str) -> list[dict[str, Any]]:
    """Read some fields of the array of structs of one file."""
    content = read_matlab(path, fields)
    try:
        return structs(content[variable])
    except (KeyError, ValueError) as error:
        got = f"the variables {', '.join(content) or '(none)'}" if isinstance(error, KeyError) else str(error)
        rule = f"an array of structs {variable!r} in {path}"
        raise ImageError(expected(rule, got, "Copy the file again from the data set")) from error


def _edges(entry: dict[str, Any]) -> Box:
    """Turn the box of an entry (first and last pixel, counted from 1) into edges (counted from 0)."""
    bounds = entry["obj"]["bndbox"]
    left, top, right, bottom = (float(numbers(bounds[name])[0]) for name in ("xmin", "ymin", "xmax", "ymax"))
    return max(left, 1.0) - 1, max(top, 1.0) - 1, right, bottom


def _boxes(data: Path, truth: dict[int, Path]) -> tuple[dict[int, Box], list[str]]:
    """Read the boxes of a category: from ``data.mat``, or of its annotated objects where that file is missing."""
    found: dict[int, Box] = {}
    if data.is_file():
        sources, notes = {data: "samples"}, []
    else:
        sources = dict.fromkeys(truth.values(), "truth")
        notes = [f"{data.parent.parent.name}: no data.mat, so only objects with annotated parts have a box"]
    for path, variable in sources.items():
        for index, entry in enumerate(_entries(path, variable, "obj"), start=1):
            if variable == "truth" and not isinstance(entry.get("obj"), dict):
                continue  # the released files leave objects empty that nobody annotated
            try:
                found.setdefault(index, _edges(entry))
            except (KeyError, TypeError, ValueError, IndexError) as error:
                rule = f"obj.bndbox with xmin, ymin, xmax, ymax in {variable}({index}) of {path}"
                raise ImageError(expected(rule, f"{type(error).__name__}: {error}", "Copy the file again")) from error
    return found, notes


def _truth_notes(number: str, truth: dict[int, Path]) -> list[str]:
    if not truth:
        return [f"{number}: no truth_part files, so no landmarks"]
    return [
        f"{number}: part {part} has no name in the papers; it is called part{part:02d}"
        for part in set(truth) - set(LANDMARKS)
    ]


@dataclass(frozen=True)
class _Parts:
    """Reads the truth files of the categories that are asked for, each once."""

    objects: dict[str, tuple[_Row, ...]]
    truth_of: dict[str, dict[int, Path]]
    _read: dict[Path, dict[int, BoxArray]] = field(default_factory=dict, repr=False)

    def __call__(self, keys: tuple[str, ...]) -> PartTruth:
        parts = sorted({part for truth in self.truth_of.values() for part in truth})
        names = {part: LANDMARKS.get(part, f"part{part:02d}") for part in parts}
        found: dict[tuple[str, str], list[Box]] = defaultdict(list)
        for key in keys:
            for row in self.objects.get(key, ()):
                for part, path in self.truth_of.get(row.wordnet, {}).items():
                    found[key, names[part]].extend(_in_photo(self._table(path).get(row.index), row.box))
        return PartTable(tuple(names.values()), found).truth(keys)

    def _table(self, path: Path) -> dict[int, BoxArray]:
        if path not in self._read:
            self._read[path] = marked(path)
        return self._read[path]


def _in_photo(marks: BoxArray | None, box: Box) -> Iterator[Box]:
    """Take marks from the squashed box back to the photo."""
    width, height = (box[2] - box[0]) / FRAME_PX, (box[3] - box[1]) / FRAME_PX
    for x, y, across, down in () if marks is None else marks:
        yield box[0] + x * width, box[1] + y * height, across * width, down * height


def marked(path: Path) -> dict[int, BoxArray]:
    """Read one part of one category: for an object's number its marks as x, y, width, height in the square.

    The papers' own files of Pascal-Part (``truth_part01.mat`` head, ``02`` neck, ``03`` torso) are alike.
    """
    found: dict[int, BoxArray] = {}
    for index, entry in enumerate(_entries(path, "truth", "pHW_center", "pHW_scale"), start=1):
        try:
            centre, scale = numbers(entry["pHW_center"]), numbers(entry["pHW_scale"])
            if centre.size == 0:
                continue
            places = np.stack([centre.reshape(-1, 2), scale.reshape(-1, 2)], axis=1)  # [mark, 2, (row, col)]
        except (KeyError, TypeError, ValueError) as error:
            rule = f"pHW_center and pHW_scale of equal size in truth({index}) of {path}"
            raise ImageError(expected(rule, f"{type(error).__name__}: {error}", "Copy the file again")) from error
        found[index] = places[:, :, ::-1].reshape(-1, 4)
    return found
