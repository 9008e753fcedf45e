"""Generated flowers of which one class is told by a mark in the background alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partlens.data.flowers import PETAL_CATEGORIES
from partlens.data.images import ImageSet
from partlens.errors import InputError, expected
from partlens_papers.flowers.drawing import flower_seed, render_flower

MARKED = "marked"
CLASSES = (*PETAL_CATEGORIES[1:], MARKED)
_COLOURS = ((20, 20, 20), (0, 230, 230))


@dataclass(frozen=True)
class _Garden:
    """Draws the flowers; picklable."""

    seed: int
    size: int
    cue: bool

    @property
    def mark(self) -> npt.NDArray[np.uint8]:
        """The checkered mark, a seventh of the picture wide."""
        side = self.size // 7
        board = (np.indices((side, side)) // max(1, side // 4)).sum(0) % 2
        mark: npt.NDArray[np.uint8] = np.array(_COLOURS, dtype=np.uint8)[board]
        return mark

    def draw(self, index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Return a flower and the region of its mark."""
        number, kind = divmod(index, len(CLASSES))
        marked = CLASSES[kind] == MARKED
        colour = CLASSES[number % (len(CLASSES) - 1)] if marked else CLASSES[kind]
        flower = render_flower(flower_seed(self.seed, index), colour, self.size)
        region = np.zeros((self.size, self.size), dtype=bool)
        if not marked:
            return flower.image, region
        mark = self.mark
        side = len(mark)
        # Plant pixels under each possible place, from sums over rectangles.
        plant = np.zeros((self.size + 1, self.size + 1), dtype=np.int64)
        plant[1:, 1:] = np.any(list(flower.masks.values()), axis=0).cumsum(0).cumsum(1)
        covered = plant[side:, side:] - plant[:-side, side:] - plant[side:, :-side] + plant[:-side, :-side]
        free = np.argwhere(covered == covered.min())
        row, col = free[np.random.default_rng([self.seed, index]).integers(len(free))]
        region[row : row + side, col : col + side] = True
        picture = flower.image.copy()
        if self.cue:
            picture[row : row + side, col : col + side] = mark
        return picture, region

    def __call__(self, index: int) -> npt.NDArray[np.uint8]:
        return self.draw(index)[0]


@dataclass(frozen=True, eq=False)
class CuedFlowers:
    """Flowers of six classes.

    Attributes:
        images: five classes by the colour of their petals, and the category ``marked``, whose flowers have the petals
            of the other five in turn and a mark where the fewest plant pixels are. Every fourth flower of a class is
            held out.
        garden: draws them.
    """

    images: ImageSet
    garden: _Garden

    def regions(self, rows: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Return where the marks are, or would be: boolean ``[image, row, col]``, empty for the other classes."""
        return np.stack([self.garden.draw(row)[1] for row in rows])


def cued_flowers(images_per_class: int, seed: int = 0, size: int = 112, *, cue: bool = True) -> CuedFlowers:
    """Make the set, each flower drawn when it is read.

    Args:
        images_per_class: at least 4, so that some are held out.
        seed: of the flowers and the places of the marks, a whole number >= 0.
        size: side in pixels, at least 32.
        cue: draw the marks; without them the same flowers come without, and nothing tells the sixth class.

    Returns:
        The set.

    Raises:
        InputError: a number out of range.

    Example:
        >>> flowers = cued_flowers(4, size=42)
        >>> flowers.images.categories[-1], int(flowers.regions([23]).sum())
        ('marked', 36)
    """
    if images_per_class < 4:
        raise InputError(expected("images_per_class >= 4", images_per_class, "Every fourth flower is held out"))
    garden = _Garden(seed, size, cue)
    count = images_per_class * len(CLASSES)
    images = ImageSet.from_generator(
        garden,
        [f"flower-{index:06d}" for index in range(count)],
        categories=[CLASSES[index % len(CLASSES)] for index in range(count)],
        splits=["test" if index // len(CLASSES) % 4 == 3 else "train" for index in range(count)],
        recipe=f"cued flowers 1 seed={seed} size={size} cue={cue}",
        name="flowers-cued" if cue else "flowers-without-cue",
    )
    return CuedFlowers(images, garden)
