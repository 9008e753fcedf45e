"""The light over a generated flower: where it comes from, and the bytes of the picture that it makes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from partlens_papers.flowers.canvas import ByteArray, Canvas, Dice, turn


@dataclass(frozen=True)
class Light:
    """Where the light comes from, how strong it is, and how warm."""

    x: float  # towards the light, in the picture
    y: float
    exposure: float
    warmth: float


def draw_light(dice: Dice) -> Light:
    """Draw a light from above."""
    cos, sin = turn(dice.between(-math.pi, 0.0))
    return Light(cos, sin, round(2 ** dice.between(-0.45, 0.4), 9), dice.between(-0.09, 0.09))


def develop(canvas: Canvas, dice: Dice, light: Light) -> ByteArray:
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
