"""Animal-Pose: twenty keypoints of dogs, cats, sheep, horses and cows in photos of VOC, from ``keypoints.json``."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from partlens.data.annotations import PartTruth
from partlens.errors import ImageError, expected
from partlens_papers.data.listing import Choice, LeftOut, Listing, PartTable

_FILE, _PHOTOS = "keypoints.json", "images"


def why_not(folder: Path) -> str:
    """Return what keeps a folder from being read as Animal-Pose, ``""`` where nothing does."""
    missing = [name for name in (_FILE, _PHOTOS) if not (folder / name).exists()]
    return f"no {' and no '.join(missing)}" if missing else ""


def read(folder: Path, choice: Choice) -> Listing:
    """List the animals (or the photos) of Animal-Pose.

    With ``crop="box"`` every animal is an image; with ``crop="photo"`` photos of several animals are skipped. Keypoints
    keep their names; one that is not marked is ``nan``. The papers measure no keypoints, so ``landmarks="paper"`` gives
    the same. Photos have no split of their own.

    Args:
        folder: holds ``keypoints.json`` and ``images``.
        choice: crop and landmarks.

    Raises:
        ImageError: the file is damaged, or there is not one usable animal.
    """
    content = _content(folder / _FILE)
    per_photo = Counter(each.photo for each in content)
    rows: list[_Animal] = []
    left_out: list[LeftOut] = []
    for each in content:
        reason = ""
        if not (folder / _PHOTOS / each.photo).is_file():
            reason = f"no photo {each.photo} in {_PHOTOS}"
        elif choice.cut and not (each.box[2] > each.box[0] and each.box[3] > each.box[1]):
            reason = f"its box {each.box} is empty"
        elif not choice.cut and per_photo[each.photo] > 1:
            reason = f"{each.photo} shows {per_photo[each.photo]} animals"
        if reason:
            left_out.append(LeftOut(each.key, reason))
        else:
            rows.append(each)
    if not rows:
        got = left_out[0].reason if left_out else "none"
        raise ImageError(expected(f"animals in {folder / _FILE}", got, "Complete the data set"))
    return Listing(
        layout="animal-pose",
        root=folder,
        keys=tuple(each.key for each in rows),
        files=tuple(folder / _PHOTOS / each.photo for each in rows),
        categories=tuple(each.category for each in rows),
        splits=("",) * len(rows),
        photos=tuple(Path(each.photo).stem for each in rows),
        boxes_px=np.array([each.box for each in rows], dtype=np.float64),
        cut=choice.cut,
        truth=_Parts(tuple(rows)),
        left_out=tuple(left_out),
    )


@dataclass(frozen=True)
class _Animal:
    """One annotated animal: its photo, number (from 1), category, box (left, top, right, bottom) and keypoints."""

    photo: str
    number: int
    category: str
    box: tuple[float, float, float, float]
    points: tuple[tuple[str, float, float], ...]

    @property
    def key(self) -> str:
        return f"{_PHOTOS}/{self.photo}#{self.number}"


@dataclass(frozen=True)
class _Parts:
    rows: tuple[_Animal, ...]

    def __call__(self, keys: tuple[str, ...]) -> PartTruth:
        found = {(each.key, name): [(x, y, math.nan, math.nan)] for each in self.rows for name, x, y in each.points}
        return PartTable(tuple(dict.fromkeys(name for _, name in found)), found).truth(keys)


def _content(path: Path) -> list[_Animal]:
    """Read the annotations in their order.

    Raises:
        ImageError: the file is not in Animal-Pose's layout.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = {each["id"]: each for each in content["categories"]}
        found = [
            _animal(each, number, content["images"][str(each["image_id"])], kinds[each["category_id"]])
            for number, each in enumerate(content["annotations"], start=1)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ImageError(expected(f"the annotations of Animal-Pose in {path}", what, "Copy the file again")) from error
    return found


def _animal(entry: dict[str, Any], number: int, photo: str, kind: dict[str, Any]) -> _Animal:
    left, top, right, bottom = map(float, entry["bbox"])
    marked = zip(kind["keypoints"], entry["keypoints"], strict=True)
    points = tuple((str(name), float(x), float(y)) for name, (x, y, visible) in marked if visible)
    return _Animal(str(photo), number, str(kind["name"]), (left, top, right, bottom), points)
