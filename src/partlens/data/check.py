"""What a folder of images holds, before anything is learned from it: counts, splits, parts, and what is wrong."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from partlens.data.annotations import PartTruth, UnusedPart
from partlens.data.images import ImageSet, UnreadableImage
from partlens.data.listing import Choice, Crop, Landmarks, LeftOut
from partlens.data.tables import IMAGE_TABLE
from partlens.errors import listed
from partlens_papers.data.layouts import LAYOUTS, layout_of

FEW = 20
"""Fewer images than this in one category and split are worth a warning."""

_SHOWN = 5  # findings of one kind on the terminal
_ROWS = 40  # categories on the terminal


@dataclass(frozen=True)
class DataCheck:
    """What :func:`check_data` found.

    Attributes:
        path: the folder or table.
        layout: ``"cub"``, ``"animal-part"``, ``"pascal-part"``, ``"table"``, ``"folder"`` or ``"joined"``.
        title: the layout in words.
        not_in_layout: for a plain folder, why it is none of the known data sets, by layout.
        images: number of readable images.
        categories: readable images of each category; ``""`` is "no category".
        splits: for each split the images of each category.
        landmarks: for each landmark the images of each category in which its position is known.
        boxes: images that are cut to the box of an object.
        masks: whether the parts have silhouettes.
        smallest_px: least width and least height among the readable images.
        largest_px: greatest width and greatest height.
        unreadable: images that cannot be decoded.
        left_out: what the data set's reader did not list.
        unused_parts: annotated parts that cannot be used.
        duplicates: groups of images with equal content that do not count as one photo.
        notes: what the reader says about the data set as a whole.
        warnings: what will spoil results, one sentence each.
        fingerprint: of the readable images (:meth:`~partlens.data.images.ImageSet.fingerprint`).
    """

    path: str
    layout: str
    title: str
    not_in_layout: Mapping[str, str]
    images: int
    categories: Mapping[str, int]
    splits: Mapping[str, Mapping[str, int]]
    landmarks: Mapping[str, Mapping[str, int]]
    boxes: int
    masks: bool
    smallest_px: tuple[int, int]
    largest_px: tuple[int, int]
    unreadable: tuple[UnreadableImage, ...]
    left_out: tuple[LeftOut, ...]
    unused_parts: tuple[UnusedPart, ...]
    duplicates: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the findings as lines for the terminal, the longest lists cut short and counted."""
        width = max([len(name) for name in (*self.categories, *self.landmarks)] + [12])
        held = list(self.splits)
        out = [f"{self.path}: {self.title}, {_count(self.images, 'image')}"]
        out += [f"  not {name}: {reason}" for name, reason in self.not_in_layout.items()]
        out.append(f"  {'category':<{width}}  {'images':>7}" + "".join(f"  {name:>7}" for name in held))
        for category, count in list(self.categories.items())[:_ROWS]:
            sides = "".join(f"  {self.splits[name].get(category, 0):>7}" for name in held)
            out.append(f"  {category or '(none)':<{width}}  {count:>7}{sides}")
        if len(self.categories) > _ROWS:
            out.append(f"  {len(self.categories) - _ROWS} more categories")
        if self.landmarks:
            out.append(f"  {'landmark':<{width}}  {'images':>7}")
            out += [f"  {name:<{width}}  {sum(counts.values()):>7}" for name, counts in self.landmarks.items()]
        else:
            out.append("  no landmarks")
        out.append(f"  boxes: {self.boxes or 'none'}; silhouettes of parts: {'yes' if self.masks else 'none'}")
        (narrow, low), (wide, high) = self.smallest_px, self.largest_px
        out.append(f"  width {narrow} to {wide} px, height {low} to {high} px")
        for what, found in (
            ("unreadable", [f"{image.key}: {image.reason}" for image in self.unreadable]),
            ("left out", [f"{item.key}: {item.reason}" for item in self.left_out]),
            ("part not used", [f"{part.key}, {part.landmark}: {part.reason}" for part in self.unused_parts]),
            ("equal content", [" = ".join(group) for group in self.duplicates]),
            ("note", list(self.notes)),
        ):
            out += [f"  {what}: {text}" for text in found[:_SHOWN]]
            if len(found) > _SHOWN:
                out.append(f"  {what}: {len(found) - _SHOWN} more")
        out += [f"  warning: {text}" for text in self.warnings]
        out.append(f"  fingerprint {self.fingerprint}")
        return out


def check_data(
    path: Path | str,
    *,
    crop: Crop = "box",
    margin_frac: float = 0.0,
    landmarks: Landmarks = "all",
    few: int = FEW,
    workers: int | None = None,
) -> DataCheck:
    """Look at every image and annotation of a folder, data set or table, and say what is there.

    Every image is decoded once and every file hashed twice; nothing is written.

    Args:
        path: as for :meth:`~partlens.data.images.ImageSet.open`.
        crop: as there.
        margin_frac: as there.
        landmarks: as there.
        few: warn about categories with fewer images than this in a split.
        workers: threads; one per core, at most 8, when left out.

    Raises:
        ImageError: what keeps :meth:`~partlens.data.images.ImageSet.open` from opening it, or not one image can
            be decoded.

    Example:
        >>> import tempfile, pathlib
        >>> from PIL import Image
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (8, 6)).save(folder / "a.png")
        >>> found = check_data(folder, few=0)
        >>> found.layout, found.images, found.smallest_px
        ('folder', 1, (8, 6))
    """
    path = Path(path)
    in_table = path.is_file() or (path / IMAGE_TABLE).is_file()
    layout = None if in_table or not path.is_dir() else layout_of(path)
    reasons: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    boxed: set[str] = set()
    if layout is not None:
        listing = layout.read(path, Choice(crop, landmarks))
        images, notes = ImageSet.from_listing(listing, margin_frac), listing.notes
        name, title = layout.name, layout.title
        boxed = {key for key, box in zip(listing.keys, listing.windows(), strict=True) if box is not None}
    else:
        images = ImageSet.open(path, crop=crop, margin_frac=margin_frac, landmarks=landmarks)
        name, title = ("table", "a table of images") if in_table else ("folder", "a folder of images")
        if path.suffix.lower() == ".json":
            name, title = "joined", "several sets as one"
        if not in_table:
            reasons = {known.name: known.why_not(path) for known in LAYOUTS}
    good, bad = images.readable(workers)
    sizes = np.array([good.size_px(index) for index in range(len(good))])
    truth = good.part_truth
    duplicates = _duplicates(good, good.digests(workers))
    pairs = Counter(zip(good.splits, good.categories, strict=True))
    splits: dict[str, dict[str, int]] = {name: {} for name in sorted(set(good.splits), reverse=True)}  # train first
    for (split, category), count in sorted(pairs.items()):
        splits[split][category] = count
    parts = {} if truth is None else _known(truth, good.categories)
    return DataCheck(
        path=str(path),
        layout=name,
        title=title,
        not_in_layout=reasons,
        images=len(good),
        categories=good.category_counts(),
        splits=splits,
        landmarks=parts,
        boxes=sum(key in boxed for key in good.keys),
        masks=truth is not None and truth.masks is not None,
        smallest_px=(int(sizes[:, 0].min()), int(sizes[:, 1].min())),
        largest_px=(int(sizes[:, 0].max()), int(sizes[:, 1].max())),
        unreadable=bad,
        left_out=images.left_out,
        unused_parts=() if truth is None else truth.unused,
        duplicates=duplicates,
        notes=notes,
        warnings=tuple(_warnings(good, splits, duplicates, truth, parts, few)),
        fingerprint=good.fingerprint(workers),
    )


def _known(truth: PartTruth, categories: Sequence[str]) -> dict[str, dict[str, int]]:
    """Count, for each landmark and category, the images in which the position is known."""
    known = np.isfinite(truth.positions_px[:, :, 0] + truth.positions_px[:, :, 1])
    found: dict[str, dict[str, int]] = {}
    for column, name in enumerate(truth.landmarks):
        counts = Counter(category for category, here in zip(categories, known[:, column], strict=True) if here)
        found[name] = dict(sorted(counts.items()))
    return found


def _duplicates(images: ImageSet, digests: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Group images of equal content; images of one photo group are meant to share what they show."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
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
    side = dict(zip(images.keys, images.splits, strict=True))
    crossing = [group for group in duplicates if len({side[key] for key in group}) > 1]
    if crossing:
        shown = listed([" = ".join(group) for group in crossing], 3)
        found.append(
            f"the same photo stands on both sides of the split ({len(crossing)} times: {shown}); "
            "name it once in the column 'photo', or remove the copy"
        )
    category_of = dict(zip(images.keys, images.categories, strict=True))
    torn = [group for group in duplicates if len({category_of[key] for key in group}) > 1]
    if torn:
        found.append(f"the same photo stands in several categories: {listed([' = '.join(g) for g in torn], 3)}")
    small = [
        f"{category or '(none)'} in {split} ({counts.get(category, 0)})"
        for split, counts in splits.items()
        for category in images.category_counts()
        if counts.get(category, 0) < few
    ]
    if small:
        found.append(f"fewer than {few} images: {listed(small)}")
    if len(splits) < 2:
        found.append(f"every image is in the split {next(iter(splits))!r}; nothing is held out to measure on")
    astray = () if truth is None else _outside(truth)
    if astray:
        found.append(f"landmarks outside their image: {listed(astray)}")
    nowhere = [name for name, counts in parts.items() if not counts]
    if nowhere:
        found.append(f"landmarks without a single position: {listed(nowhere)}")
    return found


def _outside(truth: PartTruth) -> list[str]:
    """Name the landmarks whose position lies outside the image (readers leave none; tables may)."""
    places, sizes = truth.positions_px, truth.image_size_px[:, None]
    rows, columns = np.nonzero(((places < 0) | (places > sizes)).any(axis=2))
    return [f"{truth.keys[row]} {truth.landmarks[column]}" for row, column in zip(rows, columns, strict=True)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
