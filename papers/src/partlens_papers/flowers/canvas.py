"""What flowers are drawn with: dice, a canvas, and shapes with soft edges.

All shapes are polynomials with a first-order distance to their outline, which gives smooth edges at any size.
Lengths are shares of the image's side. Colours are squared before and rooted after the drawing, an
approximation of linear light. Only sums, products, quotients, square roots and table look-ups touch the
pixels, and sines of angles are rounded, so that the same seed gives the same bytes on every processor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Colour = tuple[float, float, float]


class Dice:
    """Numbers for one layer of the picture; each layer has its own stream, so that none disturbs another."""

    def __init__(self, seed: int, stream: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, stream])))
        self._pool: list[float] = []

    def unit(self) -> float:
        """Return a number from 0 up to 1, without 1."""
        if not self._pool:
            self._pool = self.generator.random(64).tolist()
        return self._pool.pop()

    def between(self, low: float, high: float) -> float:
        """Return a number from ``low`` to ``high``."""
        return low + (high - low) * self.unit()

    def whole(self, low: int, high: int) -> int:
        """Return a whole number from ``low`` to ``high``, both included."""
        return low + int(self.unit() * (high - low + 1))

    def pick(self, options: Sequence[Colour]) -> Colour:
        """Return one of the colours."""
        return options[int(self.unit() * len(options))]

    def near(self, colour: Colour, spread: float) -> Colour:
        """Return a colour near ``colour``: lighter or darker, and a little shifted."""
        light = self.between(-spread, spread)
        red, green, blue = (
            min(1.0, max(0.0, value * (1 + light) + self.between(-spread, spread) * 0.25)) for value in colour
        )
        return red, green, blue


def turn(angle: float) -> tuple[float, float]:
    """Return cosine and sine, rounded so that the last bit of a processor's library does not matter."""
    return round(math.cos(angle), 9), round(math.sin(angle), 9)


def linear(colour: Colour) -> FloatArray:
    """Return a colour as light, ``[3, 1, 1]``."""
    return np.array([value * value for value in colour], dtype=np.float32).reshape(3, 1, 1)


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """Return the colour that lies at ``share`` of the way from the first to the second."""
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


def enlarge(grid: FloatArray, size: int) -> FloatArray:
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


class Canvas:
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
        """Take a share of the light away."""
        region = self.light[:, window[0], window[1]]
        region *= 1 - strength * cover

    def mark(self, window: Window, cover: FloatArray, label: int) -> None:
        """Say which part is seen where more than half of a pixel is covered."""
        self.labels[window][cover > 0.5] = label


@dataclass(frozen=True)
class Blade:
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


def blade_cover(
    canvas: Canvas,
    blade: Blade,
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


def disc_cover(
    canvas: Canvas, x: float, y: float, radius: float, soft: float
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


def oval_cover(
    canvas: Canvas, middle: tuple[float, float], half_axes: tuple[float, float], angle: float, soft: float
) -> tuple[Window, FloatArray, FloatArray, FloatArray] | None:
    """Return window, cover and position in half axes of an ellipse with a wide soft edge, or None."""
    long, short = half_axes
    reach = max(long, short) + soft
    window = canvas.window(middle[0] - reach, middle[0] + reach, middle[1] - reach, middle[1] + reach)
    if window is None:
        return None
    cos, sin = turn(angle)
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


def rotation(angle: float) -> Matrix:
    """Return the matrix from the picture to (along, across) of a direction."""
    cos, sin = turn(angle)
    return cos, sin, -sin, cos
