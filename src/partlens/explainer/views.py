"""Views of photos: the photo, its mirror, and crops whose windows are known.

A part filter must move with the image; to ask that of it, training has to know where a crop was cut.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import InputError, expected
from partlens.network.zoo import Performer

_ASPECT = 0.2


def view_windows(photos: int, views: int, area_min: float, generator: torch.Generator) -> Float[Tensor, "photo view 5"]:
    """Draw the windows of every view.

    View 0 is the whole photo, view 1 its mirror; the others are crops of ``area_min`` to all of the area, sides
    stretched by up to ``exp(0.2)`` against each other, half of them mirrored.

    Args:
        photos: number of photos.
        views: views of each.
        area_min: smallest share of the area, in (0, 1).
        generator: source of the draws.

    Returns:
        Left, top, width and height as shares of the photo's frame, and 1 where the view is mirrored.
    """
    if views < 1:
        raise InputError(expected("at least 1 view", views, "Set views to 1 or more"))
    draw = torch.rand(photos, views, 5, generator=generator)
    area = area_min + (1 - area_min) * draw[..., 0]
    stretch = torch.exp(_ASPECT * (2 * draw[..., 1] - 1))
    width = (area.sqrt() * stretch).clamp(max=1)
    height = (area.sqrt() / stretch).clamp(max=1)
    windows = torch.stack(
        [
            draw[..., 2] * (1 - width),
            draw[..., 3] * (1 - height),
            width,
            height,
            (draw[..., 4] < 0.5).float(),
        ],
        -1,
    )
    windows[:, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0])
    if views > 1:
        windows[:, 1] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    return windows


@dataclass(frozen=True)
class _Viewer:
    """Draws row ``k``: photo ``photos[k]`` seen through window ``windows[k]``."""

    images: ImageSet
    performer: Performer
    photos: np.ndarray
    windows: np.ndarray

    def __call__(self, row: int) -> np.ndarray:
        frame = self.performer.preprocessing.frame(self.images.read(int(self.photos[row])))
        left, top, width, height, mirrored = self.windows[row].tolist()
        if (left, top, width, height) != (0.0, 0.0, 1.0, 1.0):
            wide, high = frame.size
            box = (left * wide, top * high, min(wide, (left + width) * wide), min(high, (top + height) * high))
            frame = frame.resize(frame.size, Image.Resampling.BILINEAR, box=box)
        if mirrored > 0.5:
            frame = frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(frame)


def viewed_images(
    images: ImageSet,
    performer: Performer,
    photos: Int[np.ndarray, " photo"],
    windows: Float[Tensor, "row 5"],
) -> tuple[ImageSet, Performer]:
    """Return views as images of their own, and the performer that takes them as they are.

    Views are cut from the frame the network sees, so the returned performer only scales colours.

    Args:
        images: the photos.
        performer: the network under study.
        photos: position in ``images`` of each row's photo.
        windows: of each row, as in :func:`view_windows`.

    Returns:
        The rows as images, and the performer with the preprocessing ``squash``.

    Raises:
        InputError: photos and windows differ in number.
    """
    if len(photos) != windows.shape[0]:
        raise InputError(expected(f"windows of {len(photos)} rows", int(windows.shape[0]), "Draw one per row"))
    table = windows.double().numpy()
    digest = hashlib.sha256(table.tobytes() + np.ascontiguousarray(photos, dtype=np.int64).tobytes()).hexdigest()
    keys = [f"{images.keys[int(photo)]}#{row}" for row, photo in enumerate(photos)]
    recipe = f"views {images.fingerprint()} {digest} {performer.preprocessing.to_dict()}"
    drawn = ImageSet.from_generator(_Viewer(images, performer, photos, table), keys, recipe=recipe)
    as_framed = dataclasses.replace(performer.preprocessing, resize="squash", resize_px=None)
    return drawn, dataclasses.replace(performer, preprocessing=as_framed)
