"""The flower benchmark's two sets: classes, held-out flowers, five folds, and the region that decides the class.

A stand-in for an8Flower (Oramas et al., ICLR 2019), whose files are not to be had; the flowers are those of
:mod:`partlens_papers.flowers.drawing`.

``flowers-single-6c``: the colour of the petals is the class, six colours. The region is the petals.

``flowers-double-12c``: the colours of two parts, petals and stem, are the class together. Six pairs of neighbouring
colours, and for each pair two ways to put them: red petals on an orange stem are another class than orange petals on
a red one. Why so: the facts that survive of the original are twelve classes, two "visual features" of colour in its
internal name (SynDVFColor), and that the combination of a colour and the part that bears it is the class. Twelve
classes of one coloured part each (six on petals, six on stems) would fit the count, but then a look at one part
would settle the class, and "are both parts covered?" could not be decided. Here every colour is on petals and on
stems equally often, every petal colour belongs to two classes and so does every stem colour: neither the set of
colours nor one part alone gives the class away, and the region is petals and stem.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from partlens.data.flowers import PARTS, PETAL_CATEGORIES
from partlens.data.images import ImageSet
from partlens.data.tables import IMAGE_TABLE, LANDMARK_TABLE
from partlens.errors import InputError, RunError, expected
from partlens.progress import Progress
from partlens.records import read_json, remove_leftovers, sole_writer, write_atomically, write_json, write_text
from partlens_papers.flowers.categories import DOUBLE_CATEGORIES
from partlens_papers.flowers.drawing import Flower, flower_labels, flower_seed, generated_flowers, render_flower

ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

FOLDS = 5
MANIFEST = "flowers.json"
SCHEMA = "partlens.flower-set/1"
# Fast to write; half as large again as the slowest setting.
_COMPRESS_LEVEL = 1
_LABEL_PALETTE = (255, 255, 255, 90, 60, 30, 60, 150, 60, 220, 60, 110, 240, 200, 60)


@dataclass(frozen=True)
class _Kind:
    categories: tuple[str, ...]
    parts: tuple[str, ...]


_KINDS = {
    "flowers-single-6c": _Kind(PETAL_CATEGORIES, ("petal",)),
    "flowers-double-12c": _Kind(DOUBLE_CATEGORIES, ("petal", "stem")),
}
FLOWER_SETS = tuple(_KINDS)


@dataclass(frozen=True, eq=False)
class FlowerSet:
    """One of the two sets.

    Attributes:
        name: one of :data:`FLOWER_SETS`.
        images: the flowers with categories and splits; classes take turns. Of every four flowers of a class the
            last is held out (``"test"``).
        folds: for each flower a number from 0 to 4. Fold, split and class are balanced against one another, so each
            fold holds as many flowers of each class, and a quarter of them held out. So one network can be measured on
            the held-out flowers of five folds, or five networks trained on four folds each.
        parts: the parts whose colours decide the class.
    """

    name: str
    images: ImageSet
    folds: tuple[int, ...]
    parts: tuple[str, ...]
    _labels: Callable[[int], ByteArray] = field(repr=False)

    @property
    def classes(self) -> tuple[str, ...]:
        """The categories, in alphabetical order: class ``c`` of a network is the ``c``-th."""
        return tuple(self.images.category_counts())

    def rows(self, split: str | None = None, fold: int | None = None) -> tuple[int, ...]:
        """Return the positions of the flowers of a split and a fold, in order.

        Args:
            split: ``"train"`` or ``"test"``; both by default.
            fold: 0 to 4; all by default.

        Raises:
            InputError: a fold that does not exist.
            ImageError: a split that does not exist.
        """
        if fold is not None and not 0 <= fold < FOLDS:
            raise InputError(expected(f"a fold from 0 to {FOLDS - 1}", fold, "Count folds from 0"))
        chosen = self.images.indices(split=split)
        return tuple(row for row in chosen if fold is None or self.folds[row] == fold)

    def labels(self, rows: Sequence[int]) -> ByteArray:
        """Say which part each pixel shows.

        Args:
            rows: positions in :attr:`images`.

        Returns:
            uint8 ``[image, row, col]``: 0 for no part, else 1 + the position in
            :data:`partlens_papers.flowers.categories.PARTS`.
        """
        if not len(rows):
            raise InputError(expected("at least one flower", "none", "Choose another split or fold"))
        return np.stack([self._labels(row) for row in rows])

    def part_regions(self, rows: Sequence[int]) -> BoolArray:
        """Return where the deciding parts are seen.

        Args:
            rows: positions in :attr:`images`.

        Returns:
            Boolean ``[image, part, row, col]``, parts in the order of :attr:`parts`; no pixel belongs to two.
        """
        labels = self.labels(rows)
        return np.stack([labels == 1 + PARTS.index(part) for part in self.parts], axis=1)

    def regions(self, rows: Sequence[int]) -> BoolArray:
        """Return the discriminative region: the visible pixels of all deciding parts.

        Args:
            rows: positions in :attr:`images`.

        Returns:
            Boolean ``[image, row, col]``.
        """
        return np.asarray(self.part_regions(rows).any(axis=1))


def _checked_kind(name: str) -> _Kind:
    if name not in _KINDS:
        raise InputError(expected(f"a flower set among {', '.join(FLOWER_SETS)}", f"{name!r}", "Choose one of them"))
    return _KINDS[name]


def _place(index: int, classes: int) -> tuple[str, int]:
    """Return split and fold of a flower by its number within its class."""
    number = index // classes
    return ("test" if number % 4 == 3 else "train"), (number // 4) % FOLDS


@dataclass(frozen=True)
class _Labels:
    """Part labels by position, drawn when asked for; picklable."""

    seed: int
    size: int
    categories: tuple[str, ...]

    def __call__(self, index: int) -> ByteArray:
        category = self.categories[index % len(self.categories)]
        return flower_labels(flower_seed(self.seed, index), category, self.size)


def flower_set(name: str, images_per_class: int = 1000, seed: int = 0, size: int = 112) -> FlowerSet:
    """Make one of the sets, each flower drawn when it is read.

    Flower ``index`` depends on ``seed`` and ``index`` alone: a larger set begins with the flowers of a smaller one.

    Args:
        name: ``"flowers-single-6c"`` or ``"flowers-double-12c"``.
        images_per_class: flowers of each class, at least 1; from 20 on, every fold holds flowers of both splits.
        seed: a whole number >= 0.
        size: side of the pictures in pixels, at least 32; 112 as the authors' network takes them.

    Returns:
        The set.

    Raises:
        InputError: an unknown name, or a number out of range.

    Example:
        >>> flowers = flower_set("flowers-double-12c", images_per_class=20, size=32)
        >>> len(flowers.images), len(flowers.rows("test", fold=0)), flowers.parts
        (240, 12, ('petal', 'stem'))
        >>> flowers.part_regions(flowers.rows("test", fold=0)).shape
        (12, 2, 32, 32)
    """
    kind = _checked_kind(name)
    if images_per_class < 1:
        raise InputError(expected("images_per_class >= 1", images_per_class, "Ask for at least one flower a class"))
    classes = len(kind.categories)
    places = [_place(index, classes) for index in range(images_per_class * classes)]
    images = generated_flowers(
        len(places), seed, size, kind.categories, splits=[split for split, _ in places], name=name
    )
    return FlowerSet(name, images, tuple(fold for _, fold in places), kind.parts, _Labels(seed, size, kind.categories))


# A set as a folder


def _save_png(picture: Image.Image, path: Path) -> None:
    picture.save(path, format="PNG", compress_level=_COMPRESS_LEVEL)


def _pictures(flower: Flower, parts: Sequence[str]) -> tuple[ByteArray, dict[str, Image.Image]]:
    """Return the part of each pixel, and the pictures of a flower by their folder."""
    labels = np.zeros(flower.image.shape[:2], dtype=np.uint8)
    for number, mask in enumerate(flower.masks.values(), start=1):
        labels[mask] = number
    region = np.isin(labels, [1 + PARTS.index(part) for part in parts]).astype(np.uint8) * np.uint8(255)
    shown = Image.fromarray(labels).convert("P")
    shown.putpalette(_LABEL_PALETTE)
    return labels, {"images": Image.fromarray(flower.image), "masks": Image.fromarray(region), "parts": shown}


def make_flowers(
    name: str,
    *,
    out: str | Path,
    images_per_class: int = 1000,
    seed: int = 0,
    size: int = 112,
    progress: Progress | None = None,
) -> Path:
    """Write one of the sets as a folder of files, which :meth:`ImageSet.open` and :func:`open_flower_set` read.

    ========================  ==========================================================================
    ``images/CLASS/*.png``    the flowers, RGB
    ``masks/CLASS/*.png``     the discriminative region: one channel, 255 inside, 0 outside (an8Flower's
                              masks are the reverse, dark on white)
    ``parts/CLASS/*.png``     part of each pixel: palette index 0 none, 1 stem, 2 leaf, 3 petal, 4 centre
    ``images.csv``            image, category, split, fold, photo
    ``landmarks.csv``         image, landmark, x, y, width, height (pixels)
    ``flowers.json``          the recipe, the counts and ``pixels_sha256``
    ========================  ==========================================================================

    ``pixels_sha256`` is the guarantee: the SHA-256 over every flower's SHA-256 of its RGB bytes followed by its part
    labels, in order. It is the same on every machine. The bytes of the PNG files also depend on Pillow's compressor.

    A call that was stopped begins again; a finished folder is left as it is.

    Args:
        name: ``"flowers-single-6c"`` or ``"flowers-double-12c"``.
        out: the folder; empty, missing, or of the same recipe.
        images_per_class: flowers of each class, at least 1.
        seed: a whole number >= 0.
        size: side of the pictures in pixels, at least 32.
        progress: how to show progress; silent by default.

    Returns:
        The folder.

    Raises:
        AtWorkError: another process writes there.
        InputError: an unknown name, or a number out of range.
        RunError: the folder holds something else.
        StorageError: the files could not be written.
    """
    recipe = {"schema": SCHEMA, "name": name, "images_per_class": images_per_class, "seed": seed, "size_px": size}
    flowers = flower_set(name, images_per_class, seed, size)  # checks the arguments
    out = Path(out)
    if _finished(out, recipe):
        return out  # without a lock: the folder may be read-only
    with sole_writer(out):
        if not _finished(out, recipe):
            _write_set(recipe, flowers, out, progress or Progress.silent())
    return out


def _write_set(recipe: Mapping[str, Any], flowers: FlowerSet, out: Path, show: Progress) -> None:
    # The recipe comes first: a folder that was stopped anywhere says what it will hold.
    write_json(out / MANIFEST, {**recipe, "finished": False})
    images, landmarks, digests = [], [], hashlib.sha256()
    with show.task(f"drawing {flowers.name}", len(flowers.images)) as advance:
        for index, category in enumerate(flowers.images.categories):
            flower = render_flower(flower_seed(recipe["seed"], index), category, recipe["size_px"])
            labels, pictures = _pictures(flower, flowers.parts)
            photo = f"flower-{index:06d}"
            for folder, picture in pictures.items():
                # The manifest vouches for the pictures; to wait for the disk at each would take longer than to draw.
                path = out / folder / category / f"{photo}.png"
                write_atomically(path, functools.partial(_save_png, picture), flush=False)
            key = f"images/{category}/{photo}.png"
            images.append((key, category, flowers.images.splits[index], flowers.folds[index], photo))
            landmarks += [
                (key, part, round(x, 3), round(y, 3), *flower.sizes[part])
                for part, (x, y) in flower.landmarks.items()
                if math.isfinite(x)
            ]
            digests.update(hashlib.sha256(flower.image.tobytes() + labels.tobytes()).hexdigest().encode())
            advance(index + 1)
    for place in (out, *(path for path in out.glob("*/*") if path.is_dir())):
        remove_leftovers(place)
    _table(out / IMAGE_TABLE, ("image", "category", "split", "fold", "photo"), images)
    _table(out / LANDMARK_TABLE, ("image", "landmark", "x", "y", "width", "height"), landmarks)
    facts = {
        "finished": True,
        "classes": list(flowers.classes),
        "deciding_parts": list(flowers.parts),
        "folds": FOLDS,
        "images": len(flowers.images),
        "splits": {split: len(flowers.rows(split)) for split in sorted(set(flowers.images.splits))},
        "pixels_sha256": digests.hexdigest(),
    }
    write_json(out / MANIFEST, {**recipe, **facts})


def _table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    write_text(path, buffer.getvalue())


def _finished(out: Path, recipe: Mapping[str, Any]) -> bool:
    """Say whether the folder is finished; refuse one that holds something else."""
    if (out / MANIFEST).is_file():
        found = read_json(out / MANIFEST)
        same = {key: found.get(key) for key in recipe}
        if same != recipe:
            remedy = "Choose another --out folder or delete this one"
            raise RunError(expected(f"{recipe} in {out / MANIFEST}", f"{same}", remedy))
        return bool(found.get("finished"))
    if out.exists() and (not out.is_dir() or not all(path.name.startswith(".") for path in out.iterdir())):
        got = "a folder with other files" if out.is_dir() else "a file"
        raise RunError(expected(f"an empty folder at {out}", got, "Choose another --out folder"))
    return False


@dataclass(frozen=True)
class _LabelFiles:
    """Part labels by position, read from a folder."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> ByteArray:
        with Image.open(self.paths[index]) as picture:
            return np.asarray(picture, dtype=np.uint8)


def open_flower_set(folder: str | Path) -> FlowerSet:
    """Read a set that :func:`make_flowers` wrote.

    Args:
        folder: where it lies.

    Returns:
        The set; equal pixels, labels, splits and folds as from :func:`flower_set`, other keys.

    Raises:
        RunError: no finished set lies there.
        ImageError: its tables or files are damaged.
    """
    folder = Path(folder)
    found = read_json(folder / MANIFEST)
    if found.get("schema") != SCHEMA or not found.get("finished"):
        got = "an unfinished one" if found.get("schema") == SCHEMA else f"schema {found.get('schema')!r}"
        raise RunError(expected(f"a finished flower set in {folder}", got, "Run make-flowers with this folder again"))
    images = ImageSet.open(folder)
    with (folder / IMAGE_TABLE).open(encoding="utf-8", newline="") as handle:
        folds = tuple(int(row["fold"]) for row in csv.DictReader(handle))
    paths = tuple(folder / "parts" / Path(key).relative_to("images") for key in images.keys)
    return FlowerSet(str(found["name"]), images, folds, _checked_kind(str(found["name"])).parts, _LabelFiles(paths))
