"""Pascal-Part: silhouettes of objects and their parts for the photos of PASCAL VOC 2010.

``Annotations_Part/2008_000008.mat`` holds one struct ``anno`` per photo with ``objects(k).class``, ``.mask`` and
``.parts(j).part_name``, ``.mask``; the photos lie in VOC's ``JPEGImages``, next to it or in a VOC folder next to it.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from partlens.data.annotations import BoolArray, PartTruth, UnusedPart
from partlens.data.files import Box
from partlens.errors import ImageError, RunError, StorageError, expected, listed, nearest
from partlens.records import content_hash, read_json, write_json
from partlens_papers.data.listing import Choice, LeftOut, Listing, PartTable
from partlens_papers.data.matlab import MissingPackageError, numbers, read_matlab, structs

ANIMALS = ("bird", "cat", "cow", "dog", "horse", "sheep")
"""The six categories of the papers."""

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
"""The twenty classes of VOC 2010; not all have parts."""

PAPER_LANDMARKS = {"head": "head", "neck": "neck", "torso": "torso"}
"""The parts that the papers measure on animals."""

_FOLDER, _PHOTOS = "Annotations_Part", "JPEGImages"
_BESIDE = (".", "VOC2010", "VOCdevkit/VOC2010")
_SUFFIXES = (".jpg", ".jpeg", ".JPG", ".JPEG")
_KEEP_FROM = 500
"""Number of annotation files from which on what was found in them is kept for the next time."""
_VERSION = 1  # of what is kept


def why_not(folder: Path) -> str:
    """Return what keeps a folder from being read as Pascal-Part, ``""`` where nothing does.

    The folder holds ``Annotations_Part`` with MATLAB files.
    """
    if not (folder / _FOLDER).is_dir():
        return f"no folder {_FOLDER}"
    return "" if any((folder / _FOLDER).glob("*.mat")) else f"no .mat files in {_FOLDER}"


def read(folder: Path, choice: Choice, categories: Sequence[str] = ANIMALS) -> Listing:
    """List the objects (or the photos) of Pascal-Part.

    With ``crop="box"`` every object is an image, and only its own parts are its landmarks. With ``crop="photo"``
    every photo is one image; photos that show several of the categories are skipped, and a part that the photo
    shows more than once is ``nan``. A landmark is the centre of the box around the part's silhouette. The data
    set's own parts are kept as they are (left and right legs apart); photos have no split of their own.

    What the files hold is found out once: from 500 files on it is kept as JSON below ``$XDG_CACHE_HOME/partlens``
    (``~/.cache/partlens`` where that is not set) until a file of the data set changes.

    Args:
        folder: holds ``Annotations_Part``, and VOC's ``JPEGImages`` next to it, in ``VOC2010`` or in
            ``VOCdevkit/VOC2010``.
        choice: crop, and the landmarks: all, or ``head``, ``neck`` and ``torso``.
        categories: classes of VOC to list.

    Raises:
        ImageError: no photos next to the annotations, an unknown category, not one usable object, or the package
            that reads the files is missing.
    """
    unknown = [name for name in categories if name not in CLASSES]
    if unknown or not categories:
        options = nearest(unknown[0], CLASSES) if unknown else ANIMALS
        raise ImageError(
            expected("classes of VOC 2010", listed(unknown) or "none", f"Choose such as {listed(options)}")
        )
    photos = next((folder / name / _PHOTOS for name in _BESIDE if (folder / name / _PHOTOS).is_dir()), None)
    if photos is None:
        rule = f"VOC 2010's folder {_PHOTOS} in {folder}"
        raise ImageError(expected(rule, "nothing there", f"Copy or link {_PHOTOS} next to {_FOLDER}"))
    with os.scandir(photos) as entries:
        photo_of = {Path(entry.name).stem: Path(entry.path) for entry in entries if entry.name.endswith(_SUFFIXES)}
    records, notes = _records(folder / _FOLDER)
    left_out: list[LeftOut] = []
    rows: list[_Row] = []
    others: Counter[str] = Counter()
    for stem, record in records.items():
        annotation = f"{_FOLDER}/{stem}.mat"
        reason = record.problem or ("" if stem in photo_of else f"no photo {stem}.jpg in {_PHOTOS}")
        if reason:
            left_out.append(LeftOut(annotation, reason))
            continue
        path = photo_of[stem]
        key = path.relative_to(folder).as_posix()
        wanted: list[_Object] = []
        for thing in record.objects:
            if thing.name not in CLASSES:
                left_out.append(LeftOut(f"{key}#{thing.number}", f"its class {thing.name!r} is none of VOC's"))
            elif thing.name not in categories:
                others[thing.name] += 1
            elif choice.cut and thing.box is None:
                left_out.append(LeftOut(f"{key}#{thing.number}", "its silhouette is empty"))
            else:
                wanted.append(thing)
        names = sorted({thing.name for thing in wanted})
        if choice.cut:
            rows += [_Row(f"{key}#{thing.number}", path, stem, (thing,)) for thing in wanted]
        elif len(names) > 1:
            left_out.append(LeftOut(key, f"it shows {' and '.join(names)}"))
        elif names:
            rows.append(_Row(key, path, stem, tuple(wanted)))
    if not rows:
        got = f"none ({len(left_out)} skipped: {left_out[0].key}, {left_out[0].reason})" if left_out else "none"
        raise ImageError(expected(f"objects of {listed(categories, 6)} in {folder}", got, "Complete the data set"))
    if others:
        notes.append(f"objects of other classes, not used: {listed([f'{t} {n}' for n, t in others.most_common()], 20)}")
    alone = len(photo_of) - len(records.keys() & photo_of.keys())
    if alone:
        notes.append(f"{alone} photos in {_PHOTOS} without an annotation file, not used")
    nowhere = (math.nan,) * 4
    return Listing(
        layout="pascal-part",
        root=folder,
        keys=tuple(row.key for row in rows),
        files=tuple(row.path for row in rows),
        categories=tuple(row.objects[0].name for row in rows),
        splits=("",) * len(rows),
        photos=tuple(row.stem for row in rows),
        boxes_px=np.array(
            [(row.objects[0].box or nowhere) if len(row.objects) == 1 else nowhere for row in rows], dtype=np.float64
        ),
        cut=choice.cut,
        truth=_Parts(folder / _FOLDER, {row.key: row for row in rows}, choice),
        left_out=tuple(left_out),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Object:
    """One object of an annotation file.

    Its number there (from 1), class, size of the photo for which it was drawn, box, parts, parts without pixels.
    """

    number: int
    name: str
    size_px: tuple[int, int]
    box: Box | None
    parts: tuple[tuple[str, Box], ...]
    empty: tuple[str, ...]


@dataclass(frozen=True)
class _Record:
    """What one annotation file holds, or why it cannot be used."""

    objects: tuple[_Object, ...]
    problem: str = ""


@dataclass(frozen=True)
class _Row:
    key: str
    path: Path
    stem: str
    objects: tuple[_Object, ...]


def _edges(mask: BoolArray) -> Box | None:
    """Return the box around a silhouette, None where it has no pixel."""
    cols, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    if not cols.size:
        return None
    return float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1)


def _objects_in(path: Path) -> list[dict[str, Any]]:
    content = read_matlab(path)
    anno = content.get("anno")
    if not isinstance(anno, dict) or "objects" not in anno:
        raise ValueError(f"no struct anno with objects in it (variables: {', '.join(content) or 'none'})")
    image = anno.get("imname", path.stem)
    if image != path.stem:
        raise ValueError(f"it belongs to another photo, {image!r}")
    return structs(anno["objects"])


def _mask(value: Any, shape: tuple[int, ...] | None = None) -> BoolArray:
    mask = np.asarray(value)
    if mask.ndim != 2 or (shape is not None and mask.shape != shape):
        raise ValueError(f"a mask of shape {mask.shape} in a photo of {shape or 'two axes'}")
    found: BoolArray = mask.astype(bool)
    return found


def _record(path: Path) -> _Record:
    """Read the annotation file of one photo."""
    try:
        found = []
        for number, thing in enumerate(_objects_in(path), start=1):
            whole = _mask(thing["mask"])
            box = _edges(whole)
            if "bbox" in thing and np.size(thing["bbox"]) == 4:  # first and last pixel, counted from 1
                left, top, right, bottom = (float(value) for value in numbers(thing["bbox"]))
                box = (left - 1, top - 1, right, bottom)
            places = [
                (str(part["part_name"]), _edges(_mask(part["mask"], whole.shape))) for part in structs(thing["parts"])
            ]
            found.append(
                _Object(
                    number,
                    str(thing["class"]),
                    (whole.shape[1], whole.shape[0]),
                    box,
                    tuple((name, place) for name, place in places if place is not None),
                    tuple(name for name, place in places if place is None),
                )
            )
    except MissingPackageError:
        raise
    except KeyError as error:
        return _Record((), f"no field {error} in an object or part")
    except (ImageError, ValueError, TypeError) as error:
        return _Record((), str(error))
    return _Record(tuple(found))


def _records(folder: Path) -> tuple[dict[str, _Record], list[str]]:
    """Read every annotation file, or what was kept of them; also say where that could not be kept."""
    paths = sorted(folder.glob("*.mat"))
    if len(paths) < _KEEP_FROM:
        return _read_all(paths), []
    stats = [path.stat() for path in paths]
    state = [[p.name, s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    kept = _cache() / f"pascal-part-{content_hash({'version': _VERSION, 'at': folder.resolve(), 'files': state})}.json"
    if kept.is_file():
        try:
            return {stem: _restored(value) for stem, value in read_json(kept)["records"].items()}, []
        except (RunError, KeyError, TypeError, ValueError):  # damaged: found out again and overwritten below
            pass
    records = _read_all(paths)
    content = {stem: [record.problem, [_kept(thing) for thing in record.objects]] for stem, record in records.items()}
    try:
        write_json(kept, {"records": content})
    except StorageError as error:
        return records, [f"what the annotation files hold could not be kept for the next time: {error}"]
    return records, []


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given else Path.home() / ".cache") / "partlens"


def _read_all(paths: Sequence[Path]) -> dict[str, _Record]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return {path.stem: record for path, record in zip(paths, pool.map(_record, paths), strict=True)}


def _kept(thing: _Object) -> list[Any]:
    return [thing.number, thing.name, thing.size_px, thing.box, thing.parts, thing.empty]


def _restored(value: list[Any]) -> _Record:
    problem, objects = value
    return _Record(
        tuple(
            _Object(
                number,
                name,
                tuple(size),
                tuple(box) if box else None,
                tuple((n, tuple(p)) for n, p in parts),
                tuple(empty),
            )
            for number, name, size, box, parts, empty in objects
        ),
        problem,
    )


@dataclass(frozen=True)
class _Parts:
    """The parts of the listed images; silhouettes are read again from the files when they are asked for."""

    folder: Path
    rows: Mapping[str, _Row]
    choice: Choice

    def __call__(self, keys: tuple[str, ...]) -> PartTruth:
        return self._table.truth(keys, self.masks)

    @property
    def _rename(self) -> dict[str, str]:
        return PAPER_LANDMARKS if self.choice.landmarks == "paper" else {}

    @cached_property
    def _table(self) -> PartTable:
        found: dict[tuple[str, str], list[Box]] = defaultdict(list)
        unused: list[UnusedPart] = []
        for key, row in self.rows.items():
            for thing in row.objects:
                for name, (left, top, right, bottom) in thing.parts:
                    found[key, name].append(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top))
                unused += [UnusedPart(key, name, "its silhouette is empty") for name in thing.empty]
        names = sorted({name for _, name in found} | {part.landmark for part in unused})
        sizes = {key: row.objects[0].size_px for key, row in self.rows.items()}
        return PartTable(tuple(names), found, self._rename, tuple(unused), sizes)

    def masks(self, key: str) -> dict[str, BoolArray]:
        """Return the silhouette of every part in the whole photo; parts that it does not show are all False."""
        row = self.rows[key]
        things = _objects_in(self.folder / f"{row.stem}.mat")
        chosen = [things[thing.number - 1] for thing in row.objects]
        shape = _mask(chosen[0]["mask"]).shape
        names = {name: self._rename.get(name, "") if self._rename else name for name in self._table.landmarks}
        masks = {shown: np.zeros(shape, dtype=np.bool_) for shown in names.values() if shown}
        for name, mask in _silhouettes(chosen, shape):
            if names.get(name):
                masks[names[name]] |= mask
        return masks


def _silhouettes(things: Iterable[dict[str, Any]], shape: tuple[int, ...]) -> Iterable[tuple[str, BoolArray]]:
    for thing in things:
        for part in structs(thing["parts"]):
            yield str(part["part_name"]), _mask(part["mask"], shape)
