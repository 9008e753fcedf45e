"""Pictures of found parts: a strip of photos around each, and a photo in which the parts' windows are lit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from partlens.attribution.pictures import save_picture, strip
from partlens.object_parts.regions import part_cells
from partlens.object_parts.verdict import SAID_AREA

# Told apart in print and by people who do not tell red from green (Okabe & Ito 2008).
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#4a8fd0", "#d55e00", "#cc79a7", "#b8b8b8")
_GALLERY_PX = 72
_CROP_FRAC = 0.38
_PHOTO_PX = 288
_DIM = 0.38


def draw_gallery(path: Path, frames: Sequence[Image.Image], places: Sequence[Sequence[float]]) -> None:
    """Draw crops of photos around places (row, col) side by side; crops at the border are moved inside."""
    crops = []
    for frame, (row, col) in zip(frames, places, strict=True):
        side = max(8, round(_CROP_FRAC * min(frame.size)))
        left = min(max(0, round(col * frame.width - side / 2)), frame.width - side)
        top = min(max(0, round(row * frame.height - side / 2)), frame.height - side)
        crops.append(np.asarray(frame.crop((left, top, left + side, top + side)).convert("RGB")))
    save_picture(path, strip(crops, _GALLERY_PX, 3))


def draw_parts(path: Path, frame: Image.Image, places: Tensor, grid: Sequence[int]) -> None:
    """Draw a photo in which the windows of the parts on a grid of cells are lit, each with its number in its colour."""
    scale = _PHOTO_PX / max(frame.size)
    shown = frame.convert("RGB").resize((round(frame.width * scale), round(frame.height * scale)))
    inside = ~part_cells(places[None], (grid[0], grid[1]), SAID_AREA)[0, -1].numpy()
    mask = Image.fromarray((inside * 255).astype(np.uint8)).resize(shown.size, Image.Resampling.BICUBIC)
    dark = Image.fromarray((np.asarray(shown) * _DIM).astype(np.uint8))
    lit = Image.composite(shown, dark, mask)
    pen = ImageDraw.Draw(lit)
    for number, (row, col) in enumerate(places.tolist()):
        x, y = col * lit.width, row * lit.height
        pen.ellipse((x - 9, y - 9, x + 9, y + 9), fill=COLOURS[number % len(COLOURS)], outline="black")
        pen.text((x, y), str(number + 1), fill="black", anchor="mm")
    save_picture(path, lit)
