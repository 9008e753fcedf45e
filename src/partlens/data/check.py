"""What a folder of images holds, before anything is learned from it: counts, splits, parts, and what is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from partlens.data.annotations import PartTruth, UnusedPart
from partlens.data.images import ImageSet
from partlens.data.tables import IMAGE_TABLE, table_in
from partlens.errors import checked, listed, printable
from partlens.records import Value
from partlens.run import Unreadable

FEW = 20
"""Fewer images than this in one category and split are worth a warning."""

_SHOWN = 5  # findings of one kind on the terminal
_ROWS = 40  # categories on the terminal


class _DataCheck(Value):
    """What :func:`check_data` found.

    Attributes:
        path: the folder or table.
        kind: ``"table"`` or ``"folder"``.
        categories: readable images of each category; ``""`` is "no category".
        splits: for each split the images of each category.
        landmarks: for each landmark the images of each category in which its position is known.
        sized: for each landmark the images in which its size is known, too.
        masks: whether the parts have pixels.
        boxes: images that are cut to a box by the table.
        notes: what of the folder or table is not used, and how pixels of more than 8 bits are read.
        smallest_px: least width and least height among the readable images.
        largest_px: greatest width and greatest height.
        unreadable: images that cannot be decoded.
        unused_parts: annotated parts that cannot be used.
        duplicates: groups of images with equal content that do not count as one photo.
        warnings: what will spoil results, one sentence each.
        fingerprint: of the readable images (:meth:`~partlens.data.images.ImageSet.fingerprint`).
    """

    path: str
    kind: Literal["table", "folder"]
    categories: dict[str, int]
    splits: dict[str, dict[str, int]]
    landmarks: dict[str, dict[str, int]]
    sized: dict[str, int]
    masks: bool
    boxes: int
    notes: tuple[str, ...]
    smallest_px: tuple[int, int]
    largest_px: tuple[int, int]
    unreadable: tuple[Unreadable, ...]
    unused_parts: tuple[UnusedPart, ...]
    duplicates: tuple[tuple[str, ...], ...]
    warnings: tuple[str, ...]
    fingerprint: str

    @property
    def images(self) -> int:
        """Number of readable images."""
        return sum(self.categories.values())

    def lines(self) -> list[str]:
        """Return the findings as lines for the terminal, the longest lists cut short and counted."""
        width = max([len(name) for name in (*self.categories, *self.landmarks)] + [12])
        (narrow, low), (wide, high) = self.smallest_px, self.largest_px
        out = [f"{self.path}: a {self.kind} of {_count(self.images, 'image')}"]
        out += self._category_lines(width)
        out += self._landmark_lines(width) if self.landmarks else ["  no landmarks"]
        out.append(f"  width {narrow} to {wide} px, height {low} to {high} px{self._cuts()}")
        out += [f"  {text}" for text in self.notes]
        for what, found in (
            ("unreadable", [f"{image.key}: {image.reason}" for image in self.unreadable]),
            ("part not used", [f"{part.key}, {part.landmark}: {part.reason}" for part in self.unused_parts]),
            ("equal content", [" = ".join(group) for group in self.duplicates]),
        ):
            out += [f"  {what}: {text}" for text in found[:_SHOWN]]
            out += [f"  {what}: {len(found) - _SHOWN} more"] * (len(found) > _SHOWN)
        out += [f"  warning: {text}" for text in self.warnings]
        return [*out, f"  fingerprint {self.fingerprint}"]

    def _category_lines(self, width: int) -> list[str]:
        out = [f"  {'category':<{width}}  {'images':>7}" + "".join(f"  {name:>7}" for name in self.splits)]
        for category, count in list(self.categories.items())[:_ROWS]:
            sides = "".join(f"  {counts.get(category, 0):>7}" for counts in self.splits.values())
            out.append(f"  {category or '(none)':<{width}}  {count:>7}{sides}")
        return out + [f"  {len(self.categories) - _ROWS} more categories"] * (len(self.categories) > _ROWS)

    def _landmark_lines(self, width: int) -> list[str]:
        rows = [
            f"  {name:<{width}}  {sum(counts.values()):>7}  {self.sized[name]:>9}"
            for name, counts in self.landmarks.items()
        ]
        masks = f"  masks of the landmarks: {'yes' if self.masks else 'no'}"
        return [f"  {'landmark':<{width}}  {'images':>7}  with size", *rows, masks]

    def _cuts(self) -> str:
        if not self.boxes:
            return ""
        which = "all" if self.boxes == self.images else str(self.boxes)
        return f"; {which} cut to the boxes of the table"


@checked
def check_data(path: Path | str, *, few: int = FEW) -> _DataCheck:
    """Check every image and annotation of a folder or table, and list what it holds.

    Every file is read once; nothing is written.

    Args:
        path: a folder or table of photos, as for :meth:`~partlens.data.images.ImageSet.open`.
        few: warn about categories with fewer images than this in a split.

    Raises:
        ImageError: what keeps :meth:`~partlens.data.images.ImageSet.open` from opening it, or not one image can
            be decoded.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 6)).save(folder / "a.png")
        >>> found = check_data(folder, few=0)
        >>> found.kind, found.images, found.smallest_px
        ('folder', 1, (8, 6))
    """
    path = Path(path)
    images, bad = ImageSet.open(path).readable()
    table = table_in(path, IMAGE_TABLE) if path.is_dir() else path
    sizes = np.array(list(map(images.size_px, range(len(images)))))
    truth = images.part_truth
    duplicates = _duplicates(images)
    pairs = Counter(zip(images.splits, images.categories, strict=True))
    splits: dict[str, dict[str, int]] = {name: {} for name in sorted(set(images.splits), reverse=True)}  # train first
    for (split, category), count in sorted(pairs.items()):
        splits[split][category] = count
    landmarks, sized, unused = ({}, {}, ()) if truth is None else (_known(truth, images), _sized(truth), truth.unused)
    return _DataCheck(
        path=printable(str(path)),
        kind="table" if table.is_file() else "folder",
        categories=images.category_counts(),
        splits=splits,
        landmarks=landmarks,
        sized=sized,
        masks=truth is not None and truth.masks is not None,
        boxes=sum(box is not None for box in images.boxes_px),
        notes=images.notes,
        smallest_px=(int(sizes[:, 0].min()), int(sizes[:, 1].min())),
        largest_px=(int(sizes[:, 0].max()), int(sizes[:, 1].max())),
        unreadable=bad,
        unused_parts=unused,
        duplicates=duplicates,
        warnings=tuple(_warnings(images, splits, duplicates, truth, landmarks, few)),
        fingerprint=images.fingerprint(),
    )


def _known(truth: PartTruth, images: ImageSet) -> dict[str, dict[str, int]]:
    """Count, for each landmark and category, the images in which the position is known."""
    known = np.isfinite(truth.positions_px[:, :, 0] + truth.positions_px[:, :, 1])
    found: dict[str, dict[str, int]] = {}
    for column, name in enumerate(truth.landmarks):
        counts = Counter(category for category, here in zip(images.categories, known[:, column], strict=True) if here)
        found[name] = dict(sorted(counts.items()))
    return found


def _sized(truth: PartTruth) -> dict[str, int]:
    """Count, for each landmark, the images in which its size is known."""
    known = np.isfinite(truth.sizes_px).all(axis=2).sum(axis=0)
    return {name: int(number) for name, number in zip(truth.landmarks, known, strict=True)}


def _duplicates(images: ImageSet) -> tuple[tuple[str, ...], ...]:
    """Group images of equal content; images of one photo group are meant to share what they show."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, digest in enumerate(images.digests()):
        groups[digest.partition("@")[0]].append(index)
    several = (rows for rows in groups.values() if len({images.photos[row] for row in rows}) > 1)
    return tuple(tuple(images.keys[row] for row in rows) for rows in several)


def _warnings(
    images: ImageSet,
    splits: Mapping[str, Mapping[str, int]],
    duplicates: Sequence[Sequence[str]],
    truth: PartTruth | None,
    parts: Mapping[str, Mapping[str, int]],
    few: int,
) -> list[str]:
    found = []
    crossing = _torn(duplicates, dict(zip(images.keys, images.splits, strict=True)))
    if crossing:
        found.append(
            f"the same photo is on both sides of the split ({len(crossing)} times: {listed(crossing, 3)}); "
            "name it once in the column 'photo', or remove the copy"
        )
    torn = _torn(duplicates, dict(zip(images.keys, images.categories, strict=True)))
    small = _small(splits, images, few)
    astray = () if truth is None else _outside(truth)
    nowhere = [name for name, counts in parts.items() if not counts]
    alike = _alike(images)
    for names, text in (
        (torn, f"the same photo is in several categories: {listed(torn, 3)}"),
        (small, f"fewer than {few} images: {listed(small)}"),
        (alike, f"categories that differ in upper and lower case alone: {listed(alike)}"),
        ("nan" in images.category_counts(), "a category is called 'nan', as pandas writes an empty cell"),
        (
            "train" not in splits and len(splits) > 1,
            f"no image is in the split 'train', which fits use: there are {listed(list(splits))}",
        ),
        (len(splits) < 2, f"every image is in the split {next(iter(splits))!r}; nothing is held out to measure on"),
        (astray, f"landmarks outside their image: {listed(astray)}"),
        (nowhere, f"landmarks without a single position: {listed(nowhere)}"),
    ):
        if names:
            found.append(text)
    return [*found, *(() if truth is None else truth.warnings)]


def _alike(images: ImageSet) -> list[str]:
    """Name the categories that differ in upper and lower case alone."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in images.category_counts():
        groups[name.casefold()].append(name)
    return [" = ".join(group) for group in groups.values() if len(group) > 1]


def _small(splits: Mapping[str, Mapping[str, int]], images: ImageSet, few: int) -> list[str]:
    """Name the categories with too few images in a split."""
    counts = {
        f"{category or '(none)'} in {split}": there.get(category, 0)
        for split, there in splits.items()
        for category in images.category_counts()
    }
    return [f"{where} ({count})" for where, count in counts.items() if count < few]


def _torn(groups: Sequence[Sequence[str]], value_of: Mapping[str, str]) -> list[str]:
    """Write down the groups of equal images in which something differs."""
    return [" = ".join(group) for group in groups if len({value_of[key] for key in group}) > 1]


def _outside(truth: PartTruth) -> list[str]:
    """Name the landmarks whose position lies outside the image ."""
    places, sizes = truth.positions_px, truth.image_size_px[:, None]
    rows, columns = np.nonzero(((places < 0) | (places > sizes)).any(axis=2))
    return [f"{truth.keys[row]} {truth.landmarks[column]}" for row, column in zip(rows, columns, strict=True)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
