"""Generated flowers whose parts are known to the pixel: one part's colour decides the class, all else varies.

A stand-in for an8Flower (Oramas et al., ICLR 2019: in its set single-6c the colour of one part is the class,
in double-12c the colour and the part that bears it), drawn here so that nothing need be downloaded;
:data:`PETAL_CATEGORIES` play the first part, :data:`DOUBLE_CATEGORIES` the second
(:mod:`partlens.data.flower_sets` makes the two sets of them). The six class colours also stand on the centre
of the blossom, on blossoms out of focus, on fallen petals, lights and backgrounds, drawn without regard to the
class: a network has to find the part, not the colour.

All shapes are polynomials with a first-order distance to their outline, which gives smooth edges at any size.
Lengths are shares of the image's side. Colours are squared before and rooted after the drawing, an
approximation of linear light. Only sums, products, quotients, square roots and table look-ups touch the
pixels, and sines of angles are rounded, so that the same seed gives the same bytes on every processor.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from partlens.data.annotations import PartTruth
from partlens.data.images import ImageSet, split_of
from partlens.vocabulary import InputError, expected, listed, nearest

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Colour = tuple[float, float, float]

PARTS = ("stem", "leaf", "petal", "centre")
COLOURS: dict[str, Colour] = {
    "red": (0.82, 0.10, 0.12),
    "orange": (0.96, 0.50, 0.08),
    "yellow": (0.98, 0.86, 0.16),
    "pink": (0.95, 0.48, 0.68),
    "violet": (0.52, 0.24, 0.74),
    "blue": (0.20, 0.36, 0.86),
}
PETAL_CATEGORIES = tuple(f"petal-{colour}" for colour in COLOURS)
STEM_CATEGORIES = tuple(f"stem-{colour}" for colour in COLOURS)
# Two colours that are neighbours on the wheel, and which part bears which: 6 pairs x 2 ways. Every petal colour meets
# two stem colours and the reverse, so that one part alone leaves two classes open.
_WHEEL = tuple(zip(COLOURS, (*tuple(COLOURS)[1:], next(iter(COLOURS))), strict=True))
DOUBLE_CATEGORIES = tuple(
    f"petal-{petal}-stem-{stem}" for pair in _WHEEL for petal, stem in (pair, tuple(reversed(pair)))
)
MINIMUM_SIZE_PX = 32

_WHITE: Colour = (0.96, 0.95, 0.92)
_CENTRES: tuple[Colour, ...] = (
    (0.28, 0.16, 0.09),
    (0.45, 0.30, 0.12),
    (0.62, 0.62, 0.22),
    (0.86, 0.80, 0.62),
    *COLOURS.values(),
)
_VERSION = "partlens.flowers/1"
_GRID = 24


@dataclass(frozen=True, eq=False)
class Flower:
    """One generated flower.

    Attributes:
        image: uint8 ``[row, col, 3]``.
        category: ``petal-COLOUR``, ``stem-COLOUR`` or ``petal-COLOUR-stem-COLOUR``.
        masks: for each of :data:`PARTS`, a boolean array ``[row, col]``: where that part is what one sees. No
            pixel belongs to two parts.
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


class _Dice:
    """Numbers for one layer of the picture; each layer has its own stream, so that none disturbs another."""

    def __init__(self, seed: int, stream: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))
        self._pool: list[float] = []

    def unit(self) -> float:
        if not self._pool:
            self._pool = self.generator.random(64).tolist()
        return self._pool.pop()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.unit()

    def whole(self, low: int, high: int) -> int:
        """Return a whole number from ``low`` to ``high``, both included."""
        return low + int(self.unit() * (high - low + 1))

    def pick(self, options: Sequence[Colour]) -> Colour:
        return options[int(self.unit() * len(options))]

    def near(self, colour: Colour, spread: float) -> Colour:
        """Return a colour beside ``colour``: lighter or darker, and a little shifted."""
        light = self.between(-spread, spread)
        red, green, blue = (
            min(1.0, max(0.0, value * (1 + light) + self.between(-spread, spread) * 0.25)) for value in colour
        )
        return red, green, blue


def _turn(angle: float) -> tuple[float, float]:
    """Return cosine and sine, rounded so that the last bit of a processor's library does not matter."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def _linear(colour: Colour) -> FloatArray:
    return np.array([value * value for value in colour], dtype=np.float32).reshape(3, 1, 1)


def _mix(first: Colour, second: Colour, share: float) -> Colour:
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


@functools.cache
def _spline(cells: int, size: int) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """Return for each pixel the three cells and weights of a quadratic B-spline."""
    place = (np.arange(size, dtype=np.float64) + 0.5) * ((cells - 2) / size) + 1
    middle = np.floor(place).astype(np.intp)
    offset = place - middle - 0.5
    weights = np.stack([(0.5 - offset) ** 2 / 2, 0.75 - offset**2, (0.5 + offset) ** 2 / 2])
    return np.stack([middle - 1, middle, middle + 1]), weights.astype(np.float32)


def _enlarge(grid: FloatArray, size: int) -> FloatArray:
    """Enlarge ``[..., cells, cells]`` to ``[..., size, size]`` without a visible lattice."""
    index, weight = _spline(grid.shape[-1], size)
    rows = (grid[..., index[tap], :] * weight[tap][:, None] for tap in range(3))
    tall: FloatArray = functools.reduce(np.add, rows)
    cols = (tall[..., index[tap]] * weight[tap] for tap in range(3))
    wide: FloatArray = functools.reduce(np.add, cols)
    return wide


@functools.cache
def _axis(size: int) -> FloatArray:
    return ((np.arange(size, dtype=np.float64) + 0.5) / size).astype(np.float32)


Window = tuple[slice, slice]


class _Canvas:
    """The picture under way: light per colour and pixel, and which part each pixel shows (0 for none)."""

    def __init__(self, size: int, *, colours: bool) -> None:
        self.size = size
        self.pixel = 1 / size
        self.axis = _axis(size)
        self.colours = colours
        self.light: FloatArray = np.zeros((3, size, size), dtype=np.float32)
        self.labels: ByteArray = np.zeros((size, size), dtype=np.uint8)

    def window(self, left: float, right: float, top: float, bottom: float) -> Window | None:
        """Return the pixels of a box, None when it lies outside the picture."""
        size = self.size
        first_col, last_col = max(0, math.floor(left * size) - 1), min(size, math.ceil(right * size) + 1)
        first_row, last_row = max(0, math.floor(top * size) - 1), min(size, math.ceil(bottom * size) + 1)
        if first_col >= last_col or first_row >= last_row:
            return None
        return slice(first_row, last_row), slice(first_col, last_col)

    def lay(self, window: Window, cover: FloatArray, colour: FloatArray, shade: FloatArray | float) -> None:
        """Blend a shaded colour over the picture."""
        region = self.light[:, window[0], window[1]]
        region += cover * (colour * shade - region)

    def darken(self, window: Window, cover: FloatArray, strength: float) -> None:
        region = self.light[:, window[0], window[1]]
        region *= 1 - strength * cover

    def mark(self, window: Window, cover: FloatArray, label: int) -> None:
        self.labels[window][cover > 0.5] = label


@dataclass(frozen=True)
class _Blade:
    """A petal, leaf or blade of grass: a length, a half width and a profile between base and tip.

    With ``s`` the share of the length and ``e = 4 s (1 - s)``, the half width is
    ``half_width * (1 + belly (2 s - 1)) * sqrt(e (1 - point + point e))``: ``belly`` moves the widest place
    towards the tip, ``point`` sharpens both ends, ``notch`` dents the tip, ``curve`` bends the axis.
    """

    length: float
    half_width: float
    belly: float = 0.0
    point: float = 0.0
    notch: float = 0.0
    curve: float = 0.0


Matrix = tuple[float, float, float, float]


def _blade(
    canvas: _Canvas,
    blade: _Blade,
    origin: tuple[float, float],
    to_local: Matrix,
    soft: float,
    halo: float = 0.0,
) -> tuple[Window, FloatArray, FloatArray, FloatArray, FloatArray] | None:
    """Return window, cover, distance inwards, share of length and of half width, or None if outside.

    ``to_local`` is the 2 x 2 matrix from picture to (along, across); ``soft`` is the width of the edge,
    ``halo`` how far outside it values are wanted.
    """
    a, b, c, d = to_local
    det = a * d - b * c
    reach = blade.half_width * (1 + abs(blade.belly)) + abs(blade.curve) * blade.length / 4
    xs, ys = [], []
    for along in (0.0, blade.length):
        for aside in (-reach, reach):
            xs.append((d * along - b * aside) / det)
            ys.append((a * aside - c * along) / det)
    # far from a narrow blade the first-order distance falls short of the true one
    margin = 1.5 * max(soft, halo) + canvas.pixel
    x0, y0 = origin
    window = canvas.window(x0 + min(xs) - margin, x0 + max(xs) + margin, y0 + min(ys) - margin, y0 + max(ys) + margin)
    if window is None:
        return None
    x = canvas.axis[window[1]] - np.float32(x0)
    y = (canvas.axis[window[0]] - np.float32(y0))[:, None]
    share = (x * np.float32(a / blade.length)) + (y * np.float32(b / blade.length))
    across = (x * np.float32(c)) + (y * np.float32(d))
    if blade.curve:
        across = across - (blade.curve * blade.length) * (share * (1 - share))
    if blade.notch:
        share = share * (1 + blade.notch * (1 - np.minimum(np.abs(across) * (1.6 / blade.half_width), 1.0)))
    flat = 1 - 2 * share
    bulge = 1 - flat * flat  # e above; below zero before the base and beyond the tip
    wide = 1 - blade.belly * np.clip(flat, -1.2, 1.2)
    inner = np.maximum(bulge, 0)
    ends = (1 - blade.point) + blade.point * inner
    squared = blade.half_width**2
    wide_bulge = wide * bulge
    level = squared * (wide * wide_bulge * ends) - across * across
    slope = (squared / blade.length) * (
        4 * blade.belly * wide_bulge * ends + 4 * (wide * wide) * flat * (ends + blade.point * inner)
    )
    slope_x, slope_y = a * slope - 2 * c * across, b * slope - 2 * d * across
    distance = level / (np.sqrt(slope_x * slope_x + slope_y * slope_y) + np.float32(1e-7))
    cover = np.clip(distance * np.float32(1 / soft) + np.float32(0.5), 0, 1)
    return window, cover, distance, share, across * np.float32(1 / blade.half_width)


def _disc(
    canvas: _Canvas, x: float, y: float, radius: float, soft: float
) -> tuple[Window, FloatArray, FloatArray] | None:
    """Return window, cover and distance from the middle in radii, or None if outside."""
    reach = radius + soft
    window = canvas.window(x - reach, x + reach, y - reach, y + reach)
    if window is None:
        return None
    dx = (canvas.axis[window[1]] - np.float32(x)) * np.float32(1 / radius)
    dy = ((canvas.axis[window[0]] - np.float32(y)) * np.float32(1 / radius))[:, None]
    far = np.sqrt(dx * dx + dy * dy)
    return window, np.clip((1 - far) * np.float32(radius / soft) + np.float32(0.5), 0, 1), far


def _oval(
    canvas: _Canvas, middle: tuple[float, float], half_axes: tuple[float, float], angle: float, soft: float
) -> tuple[Window, FloatArray, FloatArray, FloatArray] | None:
    """Return window, cover and position in half axes of an ellipse with a wide soft edge, or None."""
    long, short = half_axes
    reach = max(long, short) + soft
    window = canvas.window(middle[0] - reach, middle[0] + reach, middle[1] - reach, middle[1] + reach)
    if window is None:
        return None
    cos, sin = _turn(angle)
    x = canvas.axis[window[1]] - np.float32(middle[0])
    y = (canvas.axis[window[0]] - np.float32(middle[1]))[:, None]
    u, v = (
        x * np.float32(cos / long) + y * np.float32(sin / long),
        y * np.float32(cos / short) - x * np.float32(sin / short),
    )
    squared_u, squared_v = u * u, v * v
    far = np.sqrt(squared_u + squared_v)
    steep = np.sqrt(squared_u * np.float32(1 / long**2) + squared_v * np.float32(1 / short**2)) + np.float32(1e-7)
    distance = np.where(far < 0.5, np.float32(min(long, short) / 2), far * (1 - far) / steep)
    return window, np.clip(distance * np.float32(1 / soft) + np.float32(0.5), 0, 1), u, v


def _rotation(angle: float) -> Matrix:
    cos, sin = _turn(angle)
    return cos, sin, -sin, cos


# The light


@dataclass(frozen=True)
class _Light:
    x: float  # towards the light, in the picture
    y: float
    exposure: float
    warmth: float


def _draw_light(dice: _Dice) -> _Light:
    cos, sin = _turn(dice.between(-math.pi, 0.0))
    return _Light(cos, sin, round(2 ** dice.between(-0.45, 0.4), 9), dice.between(-0.09, 0.09))


# The background


def _background(canvas: _Canvas, dice: _Dice, light: _Light) -> None:
    """Fill the picture: meadow, sky, wall or soil, then lights, blossoms and grass out of focus."""
    size = canvas.size
    noise = dice.generator.random((3, _GRID, _GRID), dtype=np.float32) - np.float32(0.5)
    coarse = dice.generator.random((2, 7, 7), dtype=np.float32) - np.float32(0.5)
    rough = _enlarge(coarse, _GRID)
    kind = dice.unit()
    down = ((np.arange(_GRID, dtype=np.float32) + 0.5) / _GRID)[:, None]
    right = down.T
    tilt = dice.between(-0.5, 0.5)
    ramp = np.clip(down + tilt * (right - 0.5) + 0.25 * rough[0], 0, 1)
    green = dice.near((0.34, 0.50, 0.20), 0.3)
    dark = dice.near((0.12, 0.24, 0.10), 0.3)
    strength = 0.25
    if kind < 0.45:  # meadow
        top, middle, bottom = dice.near((0.66, 0.76, 0.52), 0.25), green, dark
    elif kind < 0.62:  # sky over a meadow
        top, middle, bottom = dice.near((0.45, 0.65, 0.90), 0.2), dice.near((0.85, 0.90, 0.94), 0.08), green
        ramp = np.clip(ramp * 1.15, 0, 1)
    elif kind < 0.87:  # wall or curtain in any tone, the class colours among them
        hue = dice.pick(list(COLOURS.values()))
        pale = _mix(hue, (0.8, 0.78, 0.74), dice.between(0.15, 0.75))
        top, middle, bottom = (
            dice.near(pale, 0.12),
            pale,
            _mix(pale, (0.1, 0.1, 0.12), dice.between(0.2, 0.7)),
        )
        strength = 0.12
    else:  # soil
        top, middle, bottom = (
            dice.near((0.52, 0.42, 0.32), 0.3),
            dice.near((0.36, 0.26, 0.18), 0.3),
            (0.16, 0.11, 0.08),
        )
        strength = 0.7
    upper = np.clip(ramp * 2, 0, 1)
    lower = np.clip(ramp * 2 - 1, 0, 1)
    first, second, third = _linear(top), _linear(middle), _linear(bottom)
    grid = (first + (second - first) * upper) * (1 - lower) + third * lower
    grid *= 1 + strength * (noise[:1] + 1.6 * rough[1]) + 0.06 * noise[1:2]
    canvas.light[...] = _enlarge(grid.astype(np.float32), size)
    _bokeh(canvas, dice)
    for _ in range(dice.whole(0, 3)):
        _grass(canvas, dice, light, soft=dice.between(0.012, 0.035))
    for _ in range(dice.whole(3, 6)):
        _far_blossom(canvas, dice, light)
    _ground(canvas, dice, light, pebbles=kind >= 0.87)


def _bokeh(canvas: _Canvas, dice: _Dice) -> None:
    """Draw lights out of focus: discs with a brighter rim, in class colours, greens and white."""
    colours = [*COLOURS.values(), _WHITE, (0.55, 0.72, 0.35), (0.75, 0.82, 0.6)]
    for _ in range(dice.whole(2, 9)):
        colour, alpha = dice.near(dice.pick(colours), 0.1), dice.between(0.15, 0.55)
        radius = dice.between(0.025, 0.1)
        found = _disc(canvas, dice.unit(), dice.unit() * 0.9, radius, dice.between(0.012, 0.03))
        if found:
            window, cover, far = found
            canvas.lay(window, cover * np.float32(alpha), _linear(colour), 0.85 + 0.3 * (far * far))


def _grass(canvas: _Canvas, dice: _Dice, light: _Light, soft: float) -> None:
    """Draw one blade of grass from the lower edge, covering whatever part stands there."""
    length = dice.between(0.3, 0.75)
    blade = _Blade(length, dice.between(0.008, 0.02), -0.3, 0.5, curve=dice.between(-0.7, 0.7))
    angle = dice.between(-0.5, 0.5) - math.pi / 2
    found = _blade(canvas, blade, (dice.unit(), 1.05), _rotation(angle), soft)
    colour = dice.near(dice.pick([(0.36, 0.52, 0.16), (0.22, 0.40, 0.14), (0.62, 0.60, 0.28)]), 0.2)
    if found is None:
        return
    window, cover, _, share, across = found
    if canvas.colours:
        canvas.lay(window, cover, _linear(colour), 0.6 + 0.5 * share + (0.25 * light.x) * across)
    canvas.mark(window, cover, 0)


def _far_blossom(canvas: _Canvas, dice: _Dice, light: _Light) -> None:
    """Draw a blossom out of focus in one of the class colours, whatever the class."""
    x, y, radius = dice.between(0.02, 0.98), dice.between(0.05, 0.95), dice.between(0.1, 0.23)
    soft = dice.between(0.012, 0.045)
    count, start = dice.whole(5, 7), dice.between(0.0, 6.3)
    colour = _linear(dice.near(dice.pick(list(COLOURS.values())), 0.08))
    centre = _linear(dice.near(dice.pick(_CENTRES), 0.1))
    half_axes = (radius * 0.5, radius * dice.between(0.26, 0.4))
    for petal in range(count):
        angle = start + petal * 2 * math.pi / count
        cos, sin = _turn(angle)
        found = _oval(canvas, (x + radius * 0.55 * cos, y + radius * 0.55 * sin), half_axes, angle, soft)
        if found:
            window, cover, out, _ = found
            canvas.lay(window, cover, colour, 0.8 + 0.14 * out + 0.12 * (cos * light.x + sin * light.y))
    disc = _disc(canvas, x, y, radius * 0.25, soft)
    if disc:
        canvas.lay(disc[0], disc[1], centre, 0.9)


def _ground(canvas: _Canvas, dice: _Dice, light: _Light, *, pebbles: bool) -> None:
    """Draw pebbles and fallen petals on the lowest fifth."""
    count = dice.whole(4, 9) if pebbles else dice.whole(0, 3)
    for _ in range(count):
        x, y = dice.unit(), 1 - 0.22 * dice.unit() ** 2
        fallen = dice.unit() < 0.45
        length = dice.between(0.05, 0.13)
        half_axes = (length / 2, length * dice.between(0.14, 0.24))
        hue = dice.pick(list(COLOURS.values())) if fallen else dice.pick([(0.6, 0.57, 0.52), (0.42, 0.38, 0.36)])
        colour = _linear(dice.near(hue, 0.15))
        angle, soft = dice.between(-0.4, 0.4), dice.between(0.008, 0.02)
        shadow = _oval(canvas, (x, y + half_axes[1] * 0.5), half_axes, angle, 2 * soft)
        if shadow:
            canvas.darken(shadow[0], shadow[1], 0.4)
        found = _oval(canvas, (x, y), half_axes, angle, soft)
        if found:
            window, cover, along, across = found
            canvas.lay(window, cover, colour, 0.8 - 0.25 * across + (0.15 * light.x) * along)


# The flower


def _plant(
    canvas: _Canvas, dice: _Dice, light: _Light, petal_colour: Colour | None, stem_colour: Colour | None
) -> ByteArray:
    """Draw stem, leaves and blossom; return which leaf (from 1) lies at each pixel, seen or not."""
    scale = dice.between(0.5, 0.9)
    radius = scale * dice.between(0.24, 0.32)
    x = dice.between(radius + 0.02, 0.98 - radius)
    y = dice.between(radius * 0.9 + 0.02, 0.72 - radius)
    foot = min(0.88, max(0.12, x + dice.between(-0.3, 0.3)))
    height = 1.08 - y
    length = math.sqrt((foot - x) ** 2 + height**2)
    along = ((foot - x) / length, height / length)
    bend = dice.between(-0.16, 0.16)
    thick = scale * dice.between(0.014, 0.024)
    green = dice.near(dice.pick([(0.28, 0.50, 0.18), (0.36, 0.55, 0.22), (0.22, 0.44, 0.26)]), 0.16)
    stem = dice.near(stem_colour or green, 0.06)
    _stem(canvas, (x, y), along, length, bend, thick, stem, light)
    leaves = _leaves(canvas, dice, light, (x, y), along, length, bend, radius, scale, dice.near(green, 0.12))
    _blossom(canvas, dice, light, (x, y), radius, petal_colour or _WHITE)
    return leaves


def _stem(
    canvas: _Canvas,
    top: tuple[float, float],
    along: tuple[float, float],
    length: float,
    bend: float,
    thick: float,
    colour: Colour,
    light: _Light,
) -> None:
    foot_x = top[0] + along[0] * length
    reach = abs(bend) * length + 2 * thick + canvas.pixel
    window = canvas.window(min(top[0], foot_x) - reach, max(top[0], foot_x) + reach, top[1], 1.0)
    assert window is not None, "the stem begins inside the picture"
    x = canvas.axis[window[1]] - np.float32(top[0])
    y = (canvas.axis[window[0]] - np.float32(top[1]))[:, None]
    share = (x * np.float32(along[0] / length)) + (y * np.float32(along[1] / length))
    across = (y * np.float32(along[0])) - (x * np.float32(along[1]))
    flat = 1 - 2 * share
    across = across - (bend * length) * (1 - flat * flat)
    slant = (4 * bend) * flat
    half = thick * (0.8 + 0.5 * share)
    offset = across / np.sqrt(1 + slant * slant)
    cover = np.clip((half - np.abs(offset)) * np.float32(1 / canvas.pixel) + np.float32(0.5), 0, 1)
    if canvas.colours:
        side = offset / half
        shade = 0.85 - (0.35 * light.x) * side - 0.25 * (side * side)
        canvas.lay(window, cover, _linear(colour), np.maximum(shade, np.float32(0.2)))
    canvas.mark(window, cover, 1 + PARTS.index("stem"))


def _leaves(
    canvas: _Canvas,
    dice: _Dice,
    light: _Light,
    top: tuple[float, float],
    along: tuple[float, float],
    length: float,
    bend: float,
    radius: float,
    scale: float,
    colour: Colour,
) -> ByteArray:
    """Draw one to three leaves at the stem and return which of them each pixel shows."""
    which: ByteArray = np.zeros_like(canvas.labels)
    count = dice.whole(1, 3)
    side = 1.0 if dice.unit() < 0.5 else -1.0
    nearest_share = radius * 1.05 / length
    farthest_share = (0.95 - top[1]) / (1.08 - top[1])
    for leaf in range(count):
        place = (leaf + dice.between(0.3, 1.0)) / count
        share = nearest_share + (farthest_share - nearest_share) * place
        middle = -bend * length * (4 * share * (1 - share))
        # "across" is measured along (-along_y, along_x); the stem's axis lies at +bend there
        x = top[0] + along[0] * share * length + along[1] * middle
        y = top[1] + along[1] * share * length - along[0] * middle
        up = math.atan2(-along[1], -along[0])
        angle = up + side * dice.between(0.55, 1.25)
        blade = _Blade(
            scale * dice.between(0.26, 0.42),
            scale * dice.between(0.05, 0.085),
            dice.between(-0.25, 0.1),
            dice.between(0.35, 0.65),
            curve=side * dice.between(-0.2, 0.7),
        )
        tone = _linear(dice.near(colour, 0.1))
        found = _blade(canvas, blade, (x, y), _rotation(angle), canvas.pixel, halo=0.03)
        side = -side
        if found is None:
            continue
        window, cover, distance, along_share, across = found
        if canvas.colours:
            canvas.darken(window, np.clip(distance * 25 + 0.6, 0, 1), 0.2)
            cos, sin = _turn(angle)
            facing = light.y * cos - light.x * sin
            size: FloatArray = np.abs(across)
            phase = along_share * np.float32(9) - size * np.float32(2.2)
            veins: FloatArray = np.abs(phase - np.floor(phase) - np.float32(0.5))
            shade = 0.74 + (0.22 * facing) * across + 0.3 * along_share + 0.14 * veins
            shade += np.float32(0.35) * np.clip(1 - size * np.float32(14), 0, 1) * (1 - along_share)
            canvas.lay(window, cover, tone, shade)
        canvas.mark(window, cover, 1 + PARTS.index("leaf"))
        which[window][cover > 0.5] = leaf + 1
    return which


def _blossom(
    canvas: _Canvas, dice: _Dice, light: _Light, middle: tuple[float, float], radius: float, colour: Colour
) -> None:
    """Draw the petals, in one or two rows, and the centre."""
    x, y = middle
    lying = dice.unit()
    squeeze = 1 - 0.45 * lying * math.sqrt(lying)
    cos, sin = _turn(dice.between(0.0, math.pi))
    narrow = 1 / squeeze
    # from the picture into the blossom's own plane: stretch across the direction of the tilt
    plane = (
        cos * cos + narrow * sin * sin,
        (1 - narrow) * cos * sin,
        (1 - narrow) * cos * sin,
        sin * sin + narrow * cos * cos,
    )
    rows = 2 if dice.unit() < 0.4 else 1
    count = dice.whole(5, 8) if rows == 2 else dice.whole(5, 13)
    fill = dice.between(0.85, 1.35) * (1.15 if count < 7 else 1.0)
    belly, point = dice.between(0.05, 0.6), dice.between(0.0, 0.55)
    notch = dice.between(0.05, 0.16) if dice.unit() < 0.3 else 0.0
    start = dice.between(0.0, 2 * math.pi)
    jitter, wave = dice.between(0.02, 0.12), dice.between(0.0, 0.1)
    stripes, glow = dice.between(0.03, 0.24), dice.between(0.15, 0.5)
    core = radius * dice.between(0.2, 0.34)
    core_colour = dice.near(dice.pick([tone for tone in _CENTRES if tone != colour]), 0.1)
    tone = dice.near(colour, 0.07)
    if canvas.colours:
        shadow = _disc(canvas, x - 0.05 * light.x, y - 0.05 * light.y, radius * 0.9, radius * 0.8)
        if shadow:
            canvas.darken(shadow[0], shadow[1], 0.35)
    base = _linear(tone)
    for row in range(rows):
        long = radius * (1.0 if row == 0 else 0.7)
        half = math.pi * long * 0.62 / count * fill / (1 + 0.3 * belly)
        for petal in range(count):
            angle = start + (petal + 0.5 * row) * 2 * math.pi / count + dice.between(-jitter, jitter)
            blade = _Blade(
                long * dice.between(0.93, 1.07),
                half,
                belly,
                point,
                notch,
                curve=dice.between(-wave, wave) * 2,
            )
            level = dice.between(0.94, 1.06)
            c, s = _turn(angle)
            to_local = (
                c * plane[0] + s * plane[2],
                c * plane[1] + s * plane[3],
                c * plane[2] - s * plane[0],
                c * plane[3] - s * plane[1],
            )
            found = _blade(canvas, blade, (x, y), to_local, canvas.pixel, halo=0.1 * radius)
            if found is None:
                continue
            window, cover, distance, share, across = found
            if canvas.colours:
                canvas.darken(window, np.clip(distance * np.float32(9 / radius) + np.float32(0.6), 0, 1), 0.26)
                size = np.abs(across)
                lines = size * np.float32(3.5)
                lines = np.abs(lines - np.floor(lines) - np.float32(0.5))
                behind = 0.1 if row < rows - 1 else 0.0
                level *= 0.86 + 0.1 * (c * light.x + s * light.y) - behind
                lean = 0.16 * (c * light.y - s * light.x)
                shade = level + glow * (share - np.float32(0.6)) + lean * across - stripes * lines
                canvas.lay(window, cover, base, np.maximum(shade, np.float32(0.25)))
            canvas.mark(window, cover, 1 + PARTS.index("petal"))
    _centre(canvas, light, middle, core, plane, core_colour, dice.between(5.0, 9.0))


def _centre(
    canvas: _Canvas,
    light: _Light,
    middle: tuple[float, float],
    radius: float,
    plane: Matrix,
    colour: Colour,
    seeds: float,
) -> None:
    """Draw the dome in the middle of the blossom, with its pattern of seeds."""
    x0, y0 = middle
    reach = radius + 2 * canvas.pixel
    window = canvas.window(x0 - reach, x0 + reach, y0 - reach, y0 + reach)
    assert window is not None, "the blossom's middle lies inside the picture"
    x = (canvas.axis[window[1]] - np.float32(x0)) * np.float32(1 / radius)
    y = ((canvas.axis[window[0]] - np.float32(y0)) * np.float32(1 / radius))[:, None]
    u, v = (
        x * np.float32(plane[0]) + y * np.float32(plane[1]),
        x * np.float32(plane[2]) + y * np.float32(plane[3]),
    )
    far = np.sqrt(u * u + v * v)
    cover = np.clip((1 - far) * np.float32(radius / canvas.pixel) + np.float32(0.5), 0, 1)
    if canvas.colours:
        dark = np.clip((np.float32(1.35) - far) * np.float32(2.5), 0, 1)
        canvas.darken(window, dark, 0.35)
        first, second = (u + v) * np.float32(seeds / 2), (u - v) * np.float32(seeds / 2)
        first = np.abs(first - np.floor(first) - np.float32(0.5))
        second = np.abs(second - np.floor(second) - np.float32(0.5))
        dome = light.x * u + light.y * v
        shade = 0.95 + 0.28 * dome - 0.45 * (far * far) + 0.9 * (np.float32(0.5) - first - second)
        canvas.lay(window, cover, _linear(colour), np.maximum(shade, np.float32(0.15)))
    canvas.mark(window, cover, 1 + PARTS.index("centre"))


def _develop(canvas: _Canvas, dice: _Dice, light: _Light) -> ByteArray:
    """Apply the light's fall-off, exposure and colour, a little grain, and round to bytes."""
    across = canvas.axis - np.float32(0.5)
    down = across[:, None]
    fall = 1 + (0.35 * light.x) * across + (0.35 * light.y) * down
    fall *= (1.08 - 0.7 * (across * across + down * down)) * light.exposure
    grain = dice.generator.random((canvas.size, canvas.size), dtype=np.float32) - np.float32(0.5)
    tint = np.array([1 + light.warmth, 1.0, 1 - light.warmth], dtype=np.float32).reshape(3, 1, 1)
    value = np.sqrt(np.maximum(canvas.light * (fall * tint), 0)) + np.float32(0.025) * grain
    value = np.clip(value, 0, 1) * np.float32(255) + np.float32(0.5)
    return np.ascontiguousarray(value.astype(np.uint8).transpose(1, 2, 0))


def _checked_category(category: str) -> tuple[Colour | None, Colour | None]:
    """Return the colour of petals and of the stem, None for the natural one."""
    known = (*PETAL_CATEGORIES, *STEM_CATEGORIES, *DOUBLE_CATEGORIES)
    if category not in known:
        raise InputError(
            expected("a flower category", f"{category!r}", f"Choose one of {listed(nearest(category, known, 5))}")
        )
    words = category.split("-")
    coloured = {part: COLOURS[colour] for part, colour in zip(words[::2], words[1::2], strict=True)}
    return coloured.get("petal"), coloured.get("stem")


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


def _draw(seed: int, category: str, size: int, *, colours: bool) -> tuple[_Canvas, ByteArray, _Dice, _Light]:
    """Draw everything up to the development; without ``colours`` only what decides the masks."""
    petal_colour, stem_colour = _checked_category(category)
    canvas = _Canvas(size, colours=colours)
    light = _draw_light(_Dice(seed, 1))
    if colours:
        _background(canvas, _Dice(seed, 2), light)
    leaves = _plant(canvas, _Dice(seed, 3), light, petal_colour, stem_colour)
    front = _Dice(seed, 4)
    for _ in range(max(0, front.whole(-2, 2))):
        _grass(canvas, front, light, soft=front.between(0.012, 0.03))
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
        category: one of :data:`PETAL_CATEGORIES` (leaves and stem green), :data:`STEM_CATEGORIES` (petals
            white, leaves green) or :data:`DOUBLE_CATEGORIES` (leaves green); drawn from
            :data:`PETAL_CATEGORIES` by the seed when left out.
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
        category = PETAL_CATEGORIES[_Dice(seed, 5).whole(0, len(PETAL_CATEGORIES) - 1)]
    canvas, leaves, front, light = _draw(seed, category, size, colours=True)
    places = _places(canvas.labels, leaves)
    return Flower(
        image=_develop(canvas, front, light),
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
        uint8 ``[row, col]``: 0 where no part is seen, else 1 + the position in :data:`PARTS`.

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
        return _develop(canvas, front, light)

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
        categories: which of :data:`PETAL_CATEGORIES`, :data:`STEM_CATEGORIES` and :data:`DOUBLE_CATEGORIES`
            to draw.
        splits: the side of each flower; :func:`~partlens.data.images.split_of` of its key when left out.
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
        _checked_category(category)
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
