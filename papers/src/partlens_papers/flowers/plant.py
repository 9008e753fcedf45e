"""The generated flower itself: stem, leaves, petals and centre."""

from __future__ import annotations

import math

import numpy as np

from partlens.data.flowers import PARTS
from partlens_papers.flowers.canvas import (
    Blade,
    ByteArray,
    Canvas,
    Colour,
    Dice,
    FloatArray,
    Matrix,
    blade_cover,
    disc_cover,
    linear,
    rotation,
    turn,
)
from partlens_papers.flowers.categories import CENTRES, WHITE
from partlens_papers.flowers.light import Light


def plant(
    canvas: Canvas, dice: Dice, light: Light, petal_colour: Colour | None, stem_colour: Colour | None
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
    _blossom(canvas, dice, light, (x, y), radius, petal_colour or WHITE)
    return leaves


def _stem(
    canvas: Canvas,
    top: tuple[float, float],
    along: tuple[float, float],
    length: float,
    bend: float,
    thick: float,
    colour: Colour,
    light: Light,
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
        canvas.lay(window, cover, linear(colour), np.maximum(shade, np.float32(0.2)))
    canvas.mark(window, cover, 1 + PARTS.index("stem"))


def _leaves(
    canvas: Canvas,
    dice: Dice,
    light: Light,
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
        blade = Blade(
            scale * dice.between(0.26, 0.42),
            scale * dice.between(0.05, 0.085),
            dice.between(-0.25, 0.1),
            dice.between(0.35, 0.65),
            curve=side * dice.between(-0.2, 0.7),
        )
        tone = linear(dice.near(colour, 0.1))
        found = blade_cover(canvas, blade, (x, y), rotation(angle), canvas.pixel, halo=0.03)
        side = -side
        if found is None:
            continue
        window, cover, distance, along_share, across = found
        if canvas.colours:
            canvas.darken(window, np.clip(distance * 25 + 0.6, 0, 1), 0.2)
            cos, sin = turn(angle)
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
    canvas: Canvas, dice: Dice, light: Light, middle: tuple[float, float], radius: float, colour: Colour
) -> None:
    """Draw the petals, in one or two rows, and the centre."""
    x, y = middle
    lying = dice.unit()
    squeeze = 1 - 0.45 * lying * math.sqrt(lying)
    cos, sin = turn(dice.between(0.0, math.pi))
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
    core_colour = dice.near(dice.pick([tone for tone in CENTRES if tone != colour]), 0.1)
    tone = dice.near(colour, 0.07)
    if canvas.colours:
        shadow = disc_cover(canvas, x - 0.05 * light.x, y - 0.05 * light.y, radius * 0.9, radius * 0.8)
        if shadow:
            canvas.darken(shadow[0], shadow[1], 0.35)
    base = linear(tone)
    for row in range(rows):
        long = radius * (1.0 if row == 0 else 0.7)
        half = math.pi * long * 0.62 / count * fill / (1 + 0.3 * belly)
        for petal in range(count):
            angle = start + (petal + 0.5 * row) * 2 * math.pi / count + dice.between(-jitter, jitter)
            blade = Blade(
                long * dice.between(0.93, 1.07),
                half,
                belly,
                point,
                notch,
                curve=dice.between(-wave, wave) * 2,
            )
            level = dice.between(0.94, 1.06)
            c, s = turn(angle)
            to_local = (
                c * plane[0] + s * plane[2],
                c * plane[1] + s * plane[3],
                c * plane[2] - s * plane[0],
                c * plane[3] - s * plane[1],
            )
            found = blade_cover(canvas, blade, (x, y), to_local, canvas.pixel, halo=0.1 * radius)
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
    canvas: Canvas,
    light: Light,
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
        canvas.lay(window, cover, linear(colour), np.maximum(shade, np.float32(0.15)))
    canvas.mark(window, cover, 1 + PARTS.index("centre"))
