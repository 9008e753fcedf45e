"""What is behind and around a generated flower, drawn without regard to its class."""

from __future__ import annotations

import math

import numpy as np

from partlens.data.flowers import COLOURS
from partlens_papers.flowers.canvas import (
    Blade,
    Canvas,
    Dice,
    blade_cover,
    disc_cover,
    enlarge,
    linear,
    mix,
    oval_cover,
    rotation,
    turn,
)
from partlens_papers.flowers.categories import CENTRES, WHITE
from partlens_papers.flowers.light import Light

_GRID = 24


def background(canvas: Canvas, dice: Dice, light: Light) -> None:
    """Fill the picture: meadow, sky, wall or soil, then lights, blossoms and grass out of focus."""
    size = canvas.size
    noise = dice.generator.random((3, _GRID, _GRID), dtype=np.float32) - np.float32(0.5)
    coarse = dice.generator.random((2, 7, 7), dtype=np.float32) - np.float32(0.5)
    rough = enlarge(coarse, _GRID)
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
        pale = mix(hue, (0.8, 0.78, 0.74), dice.between(0.15, 0.75))
        top, middle, bottom = (
            dice.near(pale, 0.12),
            pale,
            mix(pale, (0.1, 0.1, 0.12), dice.between(0.2, 0.7)),
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
    first, second, third = linear(top), linear(middle), linear(bottom)
    grid = (first + (second - first) * upper) * (1 - lower) + third * lower
    grid *= 1 + strength * (noise[:1] + 1.6 * rough[1]) + 0.06 * noise[1:2]
    canvas.light[...] = enlarge(grid.astype(np.float32), size)
    _bokeh(canvas, dice)
    for _ in range(dice.whole(0, 3)):
        grass(canvas, dice, light, soft=dice.between(0.012, 0.035))
    for _ in range(dice.whole(3, 6)):
        _far_blossom(canvas, dice, light)
    _ground(canvas, dice, light, pebbles=kind >= 0.87)


def _bokeh(canvas: Canvas, dice: Dice) -> None:
    """Draw lights out of focus: discs with a brighter rim, in class colours, greens and white."""
    colours = [*COLOURS.values(), WHITE, (0.55, 0.72, 0.35), (0.75, 0.82, 0.6)]
    for _ in range(dice.whole(2, 9)):
        colour, alpha = dice.near(dice.pick(colours), 0.1), dice.between(0.15, 0.55)
        radius = dice.between(0.025, 0.1)
        found = disc_cover(canvas, dice.unit(), dice.unit() * 0.9, radius, dice.between(0.012, 0.03))
        if found:
            window, cover, far = found
            canvas.lay(window, cover * np.float32(alpha), linear(colour), 0.85 + 0.3 * (far * far))


def grass(canvas: Canvas, dice: Dice, light: Light, soft: float) -> None:
    """Draw one blade of grass from the lower edge, covering whatever part is there."""
    length = dice.between(0.3, 0.75)
    blade = Blade(length, dice.between(0.008, 0.02), -0.3, 0.5, curve=dice.between(-0.7, 0.7))
    angle = dice.between(-0.5, 0.5) - math.pi / 2
    found = blade_cover(canvas, blade, (dice.unit(), 1.05), rotation(angle), soft)
    colour = dice.near(dice.pick([(0.36, 0.52, 0.16), (0.22, 0.40, 0.14), (0.62, 0.60, 0.28)]), 0.2)
    if found is None:
        return
    window, cover, _, share, across = found
    if canvas.colours:
        canvas.lay(window, cover, linear(colour), 0.6 + 0.5 * share + (0.25 * light.x) * across)
    canvas.mark(window, cover, 0)


def _far_blossom(canvas: Canvas, dice: Dice, light: Light) -> None:
    """Draw a blossom out of focus in one of the class colours, whatever the class."""
    x, y, radius = dice.between(0.02, 0.98), dice.between(0.05, 0.95), dice.between(0.1, 0.23)
    soft = dice.between(0.012, 0.045)
    count, start = dice.whole(5, 7), dice.between(0.0, 6.3)
    colour = linear(dice.near(dice.pick(list(COLOURS.values())), 0.08))
    centre = linear(dice.near(dice.pick(CENTRES), 0.1))
    half_axes = (radius * 0.5, radius * dice.between(0.26, 0.4))
    for petal in range(count):
        angle = start + petal * 2 * math.pi / count
        cos, sin = turn(angle)
        found = oval_cover(canvas, (x + radius * 0.55 * cos, y + radius * 0.55 * sin), half_axes, angle, soft)
        if found:
            window, cover, out, _ = found
            canvas.lay(window, cover, colour, 0.8 + 0.14 * out + 0.12 * (cos * light.x + sin * light.y))
    disc = disc_cover(canvas, x, y, radius * 0.25, soft)
    if disc:
        canvas.lay(disc[0], disc[1], centre, 0.9)


def _ground(canvas: Canvas, dice: Dice, light: Light, *, pebbles: bool) -> None:
    """Draw pebbles and fallen petals on the lowest fifth."""
    count = dice.whole(4, 9) if pebbles else dice.whole(0, 3)
    for _ in range(count):
        x, y = dice.unit(), 1 - 0.22 * dice.unit() ** 2
        fallen = dice.unit() < 0.45
        length = dice.between(0.05, 0.13)
        half_axes = (length / 2, length * dice.between(0.14, 0.24))
        hue = dice.pick(list(COLOURS.values())) if fallen else dice.pick([(0.6, 0.57, 0.52), (0.42, 0.38, 0.36)])
        colour = linear(dice.near(hue, 0.15))
        angle, soft = dice.between(-0.4, 0.4), dice.between(0.008, 0.02)
        shadow = oval_cover(canvas, (x, y + half_axes[1] * 0.5), half_axes, angle, 2 * soft)
        if shadow:
            canvas.darken(shadow[0], shadow[1], 0.4)
        found = oval_cover(canvas, (x, y), half_axes, angle, soft)
        if found:
            window, cover, along, across = found
            canvas.lay(window, cover, colour, 0.8 - 0.25 * across + (0.15 * light.x) * along)
