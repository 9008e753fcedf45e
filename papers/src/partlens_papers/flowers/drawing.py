"""Generated flowers whose parts are known to the pixel: one part's colour decides the class, all else varies.

A stand-in for an8Flower (Oramas et al., ICLR 2019: in its set single-6c the colour of one part is the class,
in double-12c the colour and the part that bears it), drawn here because its files are not to be had;
``PETAL_CATEGORIES`` play the first part, ``DOUBLE_CATEGORIES`` the second (:mod:`partlens_papers.flowers.categories`;
:mod:`partlens_papers.flowers.sets` makes the two sets of them). The six class colours are also on the centre
of the blossom, on blossoms out of focus, on fallen petals, lights and backgrounds, drawn without regard to the
class: a network has to find the part, not the colour.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partlens.data.annotations import PartTruth
from partlens.data.flowers import PARTS, PETAL_CATEGORIES
from partlens.data.folders import split_of
from partlens.data.images import ImageSet
from partlens.errors import InputError, expected
from partlens_papers.flowers.background import background, grass
from partlens_papers.flowers.canvas import BoolArray, ByteArray, Canvas, Dice
from partlens_papers.flowers.categories import checked_category
from partlens_papers.flowers.light import Light, develop, draw_light
from partlens_papers.flowers.plant import plant

MINIMUM_SIZE_PX = 32

_VERSION = "partlens.flowers/1"


@dataclass(frozen=True, eq=False)
class Flower:
    """One generated flower.

    Attributes:
        image: uint8 ``[row, col, 3]``.
        category: ``petal-COLOUR``, ``stem-COLOUR`` or ``petal-COLOUR-stem-COLOUR``.
        masks: for each of :data:`~partlens_papers.flowers.categories.PARTS`, a boolean array ``[row, col]``: where
            that part is what one sees. No pixel belongs to two parts.
        landmarks: for each part, x and y in pixels of the mean pixel of its mask (for ``leaf``, of the leaf
            of which most is seen; for ``petal``, of all petals, thus near the blossom's middle). ``nan``
            where nothing of the part is seen.
        sizes: for each part, width and height in pixels of the box around the same pixels; ``nan`` where
            unseen.
    """

    image: ByteArray
    category: str
    masks: Mapping[str, BoolArray]
    landmarks: Mapping[str, tuple[float, float]]
    sizes: Mapping[str, tuple[float, float]]


def _checked_size(size: int) -> None:
    if size < MINIMUM_SIZE_PX:
        raise InputError(expected(f"a size of at least {MINIMUM_SIZE_PX} px", size, "Draw larger flowers"))


def _checked_seed(seed: int) -> None:
    if seed < 0:
        raise InputError(expected("a seed >= 0", seed, "Give a whole number that is not negative"))


def _places(labels: ByteArray, leaves: ByteArray) -> dict[str, tuple[tuple[float, float], tuple[float, float]]]:
    """Return for each part the mean pixel and the size of the box around what is seen of it."""
    places = {}
    for part, name in enumerate(PARTS, start=1):
        seen = labels == part
        if name == "leaf":
            seen = leaves == 1 + int(np.argmax(np.bincount(leaves.ravel(), minlength=4)[1:]))
        rows, cols = np.nonzero(seen)
        if rows.size == 0:
            places[name] = ((math.nan, math.nan), (math.nan, math.nan))
            continue
        mean = (float(cols.mean()) + 0.5, float(rows.mean()) + 0.5)
        places[name] = (mean, (float(np.ptp(cols)) + 1, float(np.ptp(rows)) + 1))
    return places


def _draw(seed: int, category: str, size: int, *, colours: bool) -> tuple[Canvas, ByteArray, Dice, Light]:
    """Draw everything up to the development; without ``colours`` only what decides the masks."""
    petal_colour, stem_colour = checked_category(category)
    canvas = Canvas(size, colours=colours)
    light = draw_light(Dice(seed, 1))
    if colours:
        background(canvas, Dice(seed, 2), light)
    leaves = plant(canvas, Dice(seed, 3), light, petal_colour, stem_colour)
    front = Dice(seed, 4)
    for _ in range(max(0, front.whole(-2, 2))):
        grass(canvas, front, light, soft=front.between(0.012, 0.03))
    leaves[canvas.labels != 1 + PARTS.index("leaf")] = 0
    return canvas, leaves, front, light


def _masks(labels: ByteArray) -> dict[str, BoolArray]:
    return {name: labels == part for part, name in enumerate(PARTS, start=1)}


def render_flower(seed: int, category: str | None = None, size: int = 128) -> Flower:
    """Draw one flower.

    Position, size, tilt, bend, shape and number of petals and leaves, light, background and what stands
    around all follow from the seed; the category changes nothing but the colour of the petals, stem or both and,
    where it would be the same, of the centre. So two categories with one seed make a pair that differs in one
    part's colour.

    Args:
        seed: a whole number >= 0.
        category: one of :mod:`partlens_papers.flowers.categories`: of ``PETAL_CATEGORIES`` (leaves and stem green),
            ``STEM_CATEGORIES`` (petals white, leaves green) or ``DOUBLE_CATEGORIES`` (leaves green); drawn from
            ``PETAL_CATEGORIES`` by the seed when not given.
        size: side of the picture in pixels, at least 32. The scene does not depend on it.

    Returns:
        The picture, its category, masks and landmarks; equal bytes for equal arguments.

    Raises:
        InputError: a negative seed, an unknown category, or a size below 32.

    Example:
        >>> flower = render_flower(7, "petal-red", size=64)
        >>> flower.image.shape, sorted(flower.masks)
        ((64, 64, 3), ['centre', 'leaf', 'petal', 'stem'])
    """
    _checked_seed(seed)
    _checked_size(size)
    if category is None:
        category = PETAL_CATEGORIES[Dice(seed, 5).whole(0, len(PETAL_CATEGORIES) - 1)]
    canvas, leaves, front, light = _draw(seed, category, size, colours=True)
    places = _places(canvas.labels, leaves)
    return Flower(
        image=develop(canvas, front, light),
        category=category,
        masks=_masks(canvas.labels),
        landmarks={name: place[0] for name, place in places.items()},
        sizes={name: place[1] for name, place in places.items()},
    )


def flower_seed(seed: int, index: int) -> int:
    """Return the seed of one flower of a set: the first eight bytes of the SHA-256 of ``seed/index``.

    Args:
        seed: of the set.
        index: of the flower in it, from 0.

    Example:
        >>> flower_seed(0, 0) == flower_seed(0, 1)
        False
    """
    digest = hashlib.sha256(f"{seed}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def flower_labels(seed: int, category: str, size: int = 128) -> ByteArray:
    """Say which part each pixel of a flower shows, without drawing the picture (about five times faster).

    Args:
        seed: of the flower, a whole number >= 0.
        category: as for :func:`render_flower`; it does not change the answer.
        size: side in pixels, at least 32.

    Returns:
        uint8 ``[row, col]``: 0 where no part is seen, else 1 + the position in
            :data:`~partlens_papers.flowers.categories.PARTS`.

    Raises:
        InputError: as :func:`render_flower`.

    Example:
        >>> labels = flower_labels(7, "petal-red", size=64)
        >>> bool(((labels == 1 + PARTS.index("petal")) == render_flower(7, "petal-red", size=64).masks["petal"]).all())
        True
    """
    _checked_seed(seed)
    _checked_size(size)
    return _draw(seed, category, size, colours=False)[0].labels


@dataclass(frozen=True)
class _Garden:
    """The recipe of a set of flowers; picklable, so that worker processes can draw."""

    seed: int
    size: int
    categories: tuple[str, ...]

    def seed_of(self, index: int) -> int:
        return flower_seed(self.seed, index)

    def category_of(self, index: int) -> str:
        return self.categories[index % len(self.categories)]

    def __call__(self, index: int) -> ByteArray:
        canvas, _, front, light = _draw(self.seed_of(index), self.category_of(index), self.size, colours=True)
        return develop(canvas, front, light)

    def outline(self, index: int) -> tuple[ByteArray, ByteArray]:
        """Return labels and leaves without drawing the picture."""
        canvas, leaves, _, _ = _draw(self.seed_of(index), self.category_of(index), self.size, colours=False)
        return canvas.labels, leaves

    def masks(self, key: str) -> dict[str, BoolArray]:
        return _masks(self.outline(_index_of(key))[0])

    def truth(self, keys: tuple[str, ...]) -> PartTruth:
        places = [_places(*self.outline(_index_of(key))) for key in keys]
        values = np.array([[place[name] for name in PARTS] for place in places], dtype=np.float32)
        return PartTruth(
            landmarks=PARTS,
            keys=keys,
            positions_px=values[:, :, 0],
            sizes_px=values[:, :, 1],
            image_size_px=np.full((len(keys), 2), self.size, dtype=np.float32),
            masks=self.masks,
        )


def _key_of(index: int) -> str:
    return f"flower-{index:06d}"


def _index_of(key: str) -> int:
    return int(key.removeprefix("flower-"))


def generated_flowers(
    count: int,
    seed: int = 0,
    size: int = 128,
    categories: Sequence[str] = PETAL_CATEGORIES,
    *,
    splits: Sequence[str] | None = None,
    name: str = "flowers",
) -> ImageSet:
    """Make a set of generated flowers, each drawn when it is read.

    The categories take turns, so each has the same number of images (one more or less). Flower ``index``
    depends on ``seed`` and ``index`` alone: a larger set begins with the images of a smaller one. About a
    quarter is for testing, by a hash of the index.

    Args:
        count: number of images, at least 1.
        seed: a whole number >= 0.
        size: side of the pictures in pixels, at least 32.
        categories: which of ``PETAL_CATEGORIES``, ``STEM_CATEGORIES`` and ``DOUBLE_CATEGORIES`` of
            :mod:`partlens_papers.flowers.categories` to draw.
        splits: the side of each flower; :func:`~partlens.data.folders.split_of` of its key by default.
        name: what to call the set in reports.

    Returns:
        The images; ``part_truth`` holds position, box and mask of stem, leaf, petal and centre in each, found
        when first asked for by drawing the outlines only.

    Raises:
        InputError: a count below 1, a negative seed, a size below 32, or an unknown or repeated category, or
            none.

    Example:
        >>> flowers = generated_flowers(12, size=32)
        >>> flowers.read(0).size, flowers.categories[:2], flowers.part_truth.landmarks
        ((32, 32), ('petal-red', 'petal-orange'), ('stem', 'leaf', 'petal', 'centre'))
    """
    _checked_seed(seed)
    _checked_size(size)
    if count < 1:
        raise InputError(expected("count >= 1", count, "Ask for at least one flower"))
    if not categories or len(set(categories)) < len(categories):
        raise InputError(expected("different categories, at least one", list(categories), "Name each once"))
    for category in categories:
        checked_category(category)
    garden = _Garden(seed, size, tuple(categories))
    keys = [_key_of(index) for index in range(count)]
    return ImageSet.from_generator(
        garden,
        keys,
        categories=[garden.category_of(index) for index in range(count)],
        splits=splits if splits is not None else [split_of(key) for key in keys],
        recipe=f"{_VERSION} seed={seed} size={size} categories={','.join(categories)}",
        truth=garden.truth,
        name=name,
    )
