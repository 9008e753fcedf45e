"""Generated flowers whose parts are known to the pixel: the colour of the petals decides the class, all else varies.

The class colours are also those of blossoms out of focus, fallen petals, backgrounds and centres, so that a network has
to find the petals. Only sums, products and roots touch the pixels: a seed gives the same bytes on every processor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partlens.data.annotations import BoolArray, PartTruth
from partlens.data.files import ByteArray
from partlens.data.images import ImageSet
from partlens.errors import InputError, checked, expected, listed, nearest

PARTS = ("stem", "leaf", "petal", "centre")
COLOURS = {
    "red": (0.82, 0.10, 0.12),
    "orange": (0.96, 0.50, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "pink": (0.95, 0.48, 0.68),
    "violet": (0.52, 0.24, 0.74),
    "blue": (0.20, 0.36, 0.86),
}
PETAL_CATEGORIES = tuple(f"petal-{colour}" for colour in COLOURS)
_CLASSES, _BROWN = tuple(COLOURS.values()), (0.40, 0.25, 0.11)
_GREENS = ((0.34, 0.50, 0.20), (0.22, 0.40, 0.14), (0.40, 0.56, 0.26))
_GROUNDS = (*_GREENS, (0.52, 0.70, 0.90), (0.42, 0.32, 0.22), (0.70, 0.72, 0.66))
_LAYERS = ("stem", "leaf", "leaf", "petal", "centre")  # of a plant, back to front

_Pair = tuple[float, float]
_Colour = tuple[float, float, float]
_Floats = npt.NDArray[np.floating]  # float32 throughout, which numpy's types do not know of products with numbers
_Draw = Callable[[float, float], float]
_Layer = tuple[tuple[slice, slice], _Floats, _Floats]  # pixels, how much of each is covered, how light it is there


@dataclass(frozen=True, eq=False)
class Flower:
    """One generated flower.

    Attributes:
        image: uint8 ``[row, col, 3]``.
        category: ``petal-COLOUR``.
        masks: for each of :data:`PARTS`, boolean ``[row, col]``: where it is seen. No pixel has two parts.
        landmarks: for each part, x and y of its mean pixel (of the leaf of which most is seen); ``nan`` if hidden.
        sizes: for each part, width and height in pixels of the box around these pixels; ``nan`` if hidden.
    """

    image: ByteArray
    category: str
    masks: Mapping[str, BoolArray]
    landmarks: Mapping[str, _Pair]
    sizes: Mapping[str, _Pair]


def _dice(seed: int, stream: int) -> _Draw:
    """Return what draws a number between two bounds; streams of one seed do not disturb one another."""
    pool = iter(np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream]))).random(256).tolist())
    return lambda low, high: low + (high - low) * next(pool)


def _pick(draw: _Draw, options: Sequence[_Colour], spread: float) -> _Floats:
    """Return the light ``[3, 1, 1]`` of one of the colours, brighter or darker and a little shifted."""
    colour, bright = options[int(draw(0, len(options)))], 1 + draw(-spread, spread)
    values = [min(max(value * bright + draw(-spread, spread) / 4, 0.0), 1.0) ** 2 for value in colour]
    return np.array(values, dtype=np.float32)[:, None, None]


def _turn(angle: float) -> _Pair:
    """Return cosine and sine, rounded so that the last bit of a processor's library does not matter."""
    return round(math.cos(angle), 7), round(math.sin(angle), 7)


def _turned(size: int, place: _Pair, reach: float, angle: float, axes: _Pair) -> _Layer:
    """Return the pixels within reach of a place, and where they lie along and across a direction, in half axes."""
    cols, rows = (slice(max(0, int((at - reach) * size)), max(0, int((at + reach) * size) + 2)) for at in place)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    x, y = axis[cols] - place[0], axis[rows, None] - place[1]
    (cos, sin), long, wide = _turn(angle), 1 / axes[0], 1 / axes[1]
    return (rows, cols), x * (cos * long) + y * (sin * long), y * (cos * wide) - x * (sin * wide)


def _edge(inside: _Floats, pixels: float) -> _Floats:
    """Return how much of each pixel is covered, from the distance inside a shape whose unit has so many pixels."""
    covered: _Floats = np.clip(inside * pixels + 0.5, 0, 1)
    return covered


def _oval(size: int, place: _Pair, axes: _Pair, angle: float, soft: float) -> _Layer:
    """Return an ellipse with an edge that is ``soft`` wide (a share of its half axes)."""
    window, along, across = _turned(size, place, max(axes) * (1 + soft), angle, axes)
    far = np.sqrt(along * along + across * across)
    return window, _edge(1 - far, 1 / soft), 1 - 0.2 * far


def _plant(draw: _Draw, size: int) -> list[_Layer]:
    """Return the layers of a plant; nothing in them depends on a colour."""
    radius = draw(0.13, 0.27)
    x, y = draw(radius + 0.02, 0.98 - radius), draw(radius + 0.02, 0.72 - radius)
    lean, bend, thick, height = draw(-0.25, 0.25), draw(-0.12, 0.12), radius * draw(0.06, 0.1), 1.05 - y
    window, aside, down = _turned(size, (x, y), height, 0, (1, height))  # the stem is a parabola downwards
    aside = ((aside - down * (lean + 4 * bend * (1 - down))) / thick) ** 2
    layers = [(window, _edge(1 - aside, thick * size / 2) * (down > 0), 0.95 - 0.3 * aside)]
    for side in (1, -1) if draw(0, 1) < 0.5 else (-1, 1):
        share, length, half = draw(0.35, 0.75), radius * draw(0.75, 1.15), draw(0.16, 0.24)
        foot = x + share * (lean + 4 * bend * (1 - share)), y + height * share
        window, along, across = _turned(
            size, foot, length, side * draw(0.6, 1.2) - math.pi / 2, (length, half * length)
        )
        inside = 4 * along * (1 - along) - abs(across)
        layers.append((window, _edge(inside, half * length * size), 0.85 + 0.25 * (along + (abs(across) < 0.1))))
    return [*layers, *_blossom(draw, size, (x, y), radius)]


def _blossom(draw: _Draw, size: int, place: _Pair, radius: float) -> list[_Layer]:
    """Return the petals, five to nine ellipses around the middle, and the centre, foreshortened alike."""
    window, u, v = _turned(size, place, radius * 1.05, draw(0, math.pi), (radius, radius / draw(1.0, 1.7)))
    count, start = int(draw(5, 10)), draw(0, 2 * math.pi)
    half = min(0.46, math.pi * 0.55 / count * draw(0.9, 1.3))
    turns = [_turn(start + petal * 2 * math.pi / count + draw(-0.12, 0.12)) for petal in range(count)]
    cos, sin = np.array(turns, np.float32).T[:, :, None, None]
    out, across = (u * cos + v * sin - 0.54) / 0.46, (v * cos - u * sin) / half
    inside = 1 - np.sqrt((out * out + across * across).min(axis=0))  # of the petal that covers a pixel most
    petals = _edge(inside, half * radius * size), 0.72 + 0.3 * np.clip(inside * 2, 0, 1)
    dots = (np.floor((u + v) * 9) + np.floor((u - v) * 9)) % 2
    centre = _edge(draw(0.22, 0.34) - np.sqrt(u * u + v * v), radius * size), 0.8 + 0.25 * dots
    return [(window, *petals), (window, *centre)]


def _paint(seed: int, category: str, size: int, layers: Sequence[_Layer]) -> ByteArray:
    """Paint surroundings and plant; colours are squared before and rooted after, to mix as light does."""
    draw, scene = _dice(seed, 2), []
    tones = _CLASSES if draw(0, 1) < 0.35 else _GROUNDS
    light = np.ones((3, size, size), np.float32) * _pick(draw, tones, 0.3)
    for least, most, options, long, wide, top, blur in (
        (2, 5, tones, 0.5, 0.4, 1.0, 1.2),  # the background
        (4, 8, _CLASSES, 0.15, 0.12, 1.0, 0.6),  # blossoms and lights out of focus
        (2, 6, _CLASSES, 0.06, 0.025, 0.25, 0.3),  # fallen petals, at the bottom
    ):
        for _ in range(int(draw(least, most))):
            place, axes = (draw(0, 1), 1 - top * draw(0, 1)), (long * draw(0.5, 1.2), wide * draw(0.6, 1.2))
            scene.append((_oval(size, place, axes, draw(-1, 1), blur * draw(0.6, 1.4)), _pick(draw, options, 0.15)))
    natural = [_GREENS, _GREENS[:1], _GREENS[1:], (COLOURS[category[6:]],), (*_CLASSES, _BROWN)]
    colours = [_pick(draw, options, 0.1) for options in natural]
    for (window, cover, shade), colour in [*scene, *zip(layers, colours, strict=True)]:
        region = light[:, *window]
        region *= 1 - cover
        region += colour * (cover * shade)
    _, across, down = _turned(size, (0.5, 0.5), 1, 0, (1, 1))
    light *= (1 + draw(-0.4, 0.4) * across + draw(-0.4, 0.4) * down) * draw(0.75, 1.25)
    return np.ascontiguousarray((np.sqrt(np.clip(light, 0, 1)) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def _check(categories: Sequence[str], **numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if value < least:
            raise InputError(expected(f"{name} >= {least}", value, f"Give a larger {name}"))
    if not categories or len(set(categories)) < len(categories):
        raise InputError(expected("different categories, at least one", list(categories), "Name each once"))
    for category in set(categories) - set(PETAL_CATEGORIES):
        remedy = f"Choose one of {listed(nearest(category, PETAL_CATEGORIES, 5))}"
        raise InputError(expected("a flower category", f"{category!r}", remedy))


@checked
def render_flower(seed: int, category: str | None = None, size: int = 128) -> Flower:
    """Draw one flower; equal bytes for equal arguments.

    Position, size, tilt, light and surroundings follow from the seed; the category is the colour of the petals alone.

    Args:
        seed: a whole number >= 0.
        category: one of :data:`PETAL_CATEGORIES`; drawn by the seed by default.
        size: side of the picture in pixels, at least 32. The scene does not depend on it.

    Raises:
        InputError: a negative seed, an unknown category, or a size below 32.
    """
    _check((PETAL_CATEGORIES[0] if category is None else category,), seed=(seed, 0), size=(size, 32))
    category = category or PETAL_CATEGORIES[int(_dice(seed, 3)(0, 6))]
    layers, labels = _plant(_dice(seed, 1), size), np.zeros((size, size), dtype=np.uint8)
    for number, (window, cover, _) in enumerate(layers, start=1):
        labels[window][cover > 0.5] = number
    masks, landmarks, sizes = {}, dict.fromkeys(PARTS, (math.nan, math.nan)), dict.fromkeys(PARTS, (math.nan, math.nan))
    for part in PARTS:
        own = [labels == number for number, name in enumerate(_LAYERS, start=1) if name == part]
        masks[part] = np.logical_or.reduce(own)
        rows, cols = np.nonzero(max(own, key=np.count_nonzero))
        if rows.size:
            landmarks[part] = float(cols.mean()) + 0.5, float(rows.mean()) + 0.5
            sizes[part] = float(np.ptp(cols)) + 1, float(np.ptp(rows)) + 1
    return Flower(_paint(seed, category, size, layers), category, masks, landmarks, sizes)


@dataclass(frozen=True)
class _Garden:
    """The recipe of a set of flowers; picklable, so that worker processes can draw."""

    seed: int
    size: int
    categories: tuple[str, ...]

    def flower(self, index: int) -> Flower:
        seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{index}".encode()).digest()[:8], "big")
        return render_flower(seed, self.categories[index % len(self.categories)], self.size)

    def __call__(self, index: int) -> ByteArray:
        return self.flower(index).image

    def masks(self, key: str) -> dict[str, BoolArray]:
        return dict(self.flower(int(key[7:])).masks)

    def truth(self, keys: tuple[str, ...]) -> PartTruth:
        flowers = [self.flower(int(key[7:])) for key in keys]
        places = np.array([[*zip(flower.landmarks.values(), flower.sizes.values(), strict=True)] for flower in flowers])
        return PartTruth(PARTS, keys, places[:, :, 0], places[:, :, 1], np.full((len(keys), 2), self.size), self.masks)


@checked
def generated_flowers(
    count: int, seed: int = 0, size: int = 128, categories: Sequence[str] = PETAL_CATEGORIES
) -> ImageSet:
    """Make a set of generated flowers, each drawn when it is read.

    The categories take turns. Flower ``index`` depends on ``seed`` and ``index`` alone: a larger set begins with the
    images of a smaller one. About a quarter is for testing, by a hash of the index; ``part_truth`` holds every part.

    Args:
        count: number of images, at least 1.
        seed: a whole number >= 0.
        size: side of the pictures in pixels, at least 32.
        categories: which of :data:`PETAL_CATEGORIES` to draw.

    Raises:
        InputError: a number out of range, or an unknown or repeated category, or none.

    Example:
        >>> flowers = generated_flowers(12, size=32)
        >>> flowers.read(0).size, flowers.categories[:2], flowers.part_truth.landmarks
        ((32, 32), ('petal-red', 'petal-orange'), ('stem', 'leaf', 'petal', 'centre'))
    """
    _check(categories, count=(count, 1), seed=(seed, 0), size=(size, 32))
    garden = _Garden(seed, size, tuple(categories))
    keys, kinds = zip(*((f"flower-{i:06d}", categories[i % len(categories)]) for i in range(count)), strict=True)
    recipe = f"partlens.flowers/2 seed={seed} size={size} categories={','.join(categories)}"
    return ImageSet.from_generator(garden, keys, kinds, recipe=recipe, truth=garden.truth, name="flowers")
