"""Heat maps and average pictures as images that a person looks at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from partlens.attribution.record import Style
from partlens.records import write_atomically

FloatArray = npt.NDArray[np.floating]
ByteArray = npt.NDArray[np.uint8]

# Dark violet, red, orange, light yellow: lightness rises with the value, so that it reads in print and by people who
# do not tell red from green.
_GLOW = np.array([[13, 8, 60], [122, 20, 110], [214, 48, 70], [250, 140, 40], [254, 240, 130]], dtype=np.float64)
_JET_ALPHA = 0.75
_FIRST, _SECOND = (86, 180, 233), (250, 140, 40)


def coloured(heat: FloatArray, style: Style = "glow") -> ByteArray:
    """Colour a heat map in [0, 1]: ``glow``, or ``jet`` as in the authors' figures.

    Example:
        >>> coloured(np.array([[0.0, 1.0]]))[0].tolist()
        [[13, 8, 60], [254, 240, 130]]
    """
    values = np.clip(np.nan_to_num(np.asarray(heat, dtype=np.float64)), 0, 1)
    if style == "jet":
        channels = [np.clip(1.5 - np.abs(4 * values - centre), 0, 1) for centre in (3, 2, 1)]
        return np.rint(np.stack(channels, axis=-1) * 255).astype(np.uint8)
    stops = np.linspace(0, 1, len(_GLOW))
    channels = [np.interp(values, stops, _GLOW[:, c]) for c in range(3)]
    return np.rint(np.stack(channels, axis=-1)).astype(np.uint8)


def overlay(photo: Image.Image, heat: FloatArray, style: Style = "glow") -> Image.Image:
    """Lay a heat map in [0, 1] over a photo.

    ``glow`` keeps the photo, greyed and darkened, and lets the heat shine in proportion to its value, so that what was
    not looked at stays visible; ``jet`` covers it evenly with alpha 0.75 as the authors did.
    """
    base = photo.convert("RGB")
    resized = Image.fromarray(np.asarray(heat, dtype=np.float32)).resize(base.size, Image.Resampling.BILINEAR)
    values = np.clip(np.asarray(resized, dtype=np.float64), 0, 1)
    colour = coloured(values, style).astype(np.float64)
    pixels = np.asarray(base, dtype=np.float64)
    if style == "jet":
        mixed = _JET_ALPHA * colour + (1 - _JET_ALPHA) * pixels
    else:
        grey = pixels.mean(axis=2, keepdims=True)
        dim = 0.72 * (0.55 * grey + 0.45 * pixels) + 22
        alpha = np.power(values, 0.6)[..., None] * 0.92
        # Where the heat is, the photo's own structure shows through as brightness.
        lit = colour * (0.55 + 0.45 * grey / 255)
        mixed = alpha * lit + (1 - alpha) * dim
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def difference(photo: Image.Image, first: FloatArray, second: FloatArray) -> Image.Image:
    """Lay the difference of two heat maps in [0, 1] over a photo: orange where the second is larger, blue the first.

    The largest difference has the full colour, so that two maps that are nearly the same are told apart.
    """
    base = np.asarray(photo.convert("L").convert("RGB"), dtype=np.float64) * 0.55 + 22
    both = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    scaled = (both / max(float(np.abs(both).max()), 1e-9)).astype(np.float32)
    values = np.asarray(Image.fromarray(scaled).resize(photo.size, Image.Resampling.BILINEAR))[..., None]
    colour = np.where(values > 0, np.array(_SECOND), np.array(_FIRST))
    alpha = np.abs(values) * 0.85
    mixed = alpha * colour + (1 - alpha) * base
    return Image.fromarray(np.clip(np.rint(mixed), 0, 255).astype(np.uint8))


def picture_of(values: FloatArray | ByteArray) -> Image.Image:
    """Return an image of ``[row, col, 3]`` values in [0, 1], or of bytes."""
    array = np.asarray(values)
    if array.dtype != np.uint8:
        array = np.rint(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(array)


def stretched(average: FloatArray, valid_frac: FloatArray) -> FloatArray:
    """Spread an average picture over the range a screen shows; averages of many photos are pale.

    The 1st and 99th percentile of the valid pixels, over all channels together so that hues stay, go to 0 and 1.
    """
    seen = average[valid_frac > 0]
    if not len(seen):
        return average
    low, high = np.percentile(seen, [1, 99])
    wide: FloatArray = np.clip((average - low) / max(1e-3, high - low), 0, 1).astype(average.dtype)
    return wide


def strip(crops: Sequence[ByteArray] | ByteArray, side_px: int, gap_px: int = 4) -> Image.Image:
    """Return crops side by side on white, each fitted into a square."""
    count = len(crops)
    sheet = Image.new("RGB", (max(1, count * side_px + (count - 1) * gap_px), side_px), "white")
    for n, crop in enumerate(crops):
        picture = Image.fromarray(np.asarray(crop, dtype=np.uint8))
        scale = side_px / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        fitted = picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
        sheet.paste(fitted, (n * (side_px + gap_px) + (side_px - size[0]) // 2, (side_px - size[1]) // 2))
    return sheet


def save_picture(path: Path, picture: Image.Image) -> str:
    """Write a PNG or a JPEG, by the ending, whole or not at all; return its name."""
    content = io.BytesIO()
    if path.suffix == ".png":  # level 6 takes two and a half times as long for 5 % fewer bytes
        picture.save(content, "PNG", optimize=False, compress_level=4)
    else:
        picture.save(content, "JPEG", quality=82)
    write_atomically(path, lambda p: p.write_bytes(content.getvalue()))
    return path.name
