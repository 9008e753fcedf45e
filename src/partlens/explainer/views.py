"""Views of photos, and the cached maps of views that training reads.

A view is the photo, its mirror, or a crop whose window is known. A part must move with the image; to ask that of a
filter, training has to know where a crop was cut.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import InputError, expected
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.processes import Processes
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing

_CROP_AREA_MIN = 0.55
"""Smallest share of a photo's area in a crop (ours)."""

NORM_SAMPLE = 256
"""Photos that norms and target norms are measured on, at most."""

_ASPECT = 0.2
_FRAMES_KEPT = 64

_CPU = torch.device("cpu")


def view_windows(
    photos: int, views: int, generator: torch.Generator, area_min: float = _CROP_AREA_MIN
) -> Float[Tensor, "photo view 5"]:
    """Draw each view's window: left, top, width, height as shares of the frame, and 1 where it is mirrored.

    View 0 is the whole photo, view 1 its mirror; the others are crops of ``area_min`` to all of the area, sides
    stretched by up to ``exp(0.2)`` against each other, half of them mirrored.
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


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.frame: Image.Image | None = None


class _Frames:
    """Photos as the network sees them; the last ones are kept, since the views of a photo are read one by one."""

    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self._images, self._preprocessing = images, preprocessing
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, photo: int) -> Image.Image:
        with self._lock:
            slot = self._slots.setdefault(photo, _Slot())
            while len(self._slots) > _FRAMES_KEPT:
                self._slots.popitem(last=False)
        with slot.lock:  # of several threads that ask for one photo, one decodes
            if slot.frame is None:
                slot.frame = self._preprocessing.frame(self._images.read(photo, self._preprocessing.scaled_size))
            return slot.frame


@dataclass(frozen=True)
class _Viewer:
    """Draws row ``k``: photo ``photos[k]`` seen through window ``windows[k]``."""

    frames: _Frames
    photos: np.ndarray
    windows: np.ndarray

    def __call__(self, row: int) -> np.ndarray:
        frame = self.frames(int(self.photos[row]))
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

    Views are cut from the frame the network sees, so the returned performer only scales colours. A photo is decoded
    once for views that are read one after another. Row ``k`` is photo ``photos[k]`` seen through ``windows[k]``.
    """
    if len(photos) != windows.shape[0]:
        raise InputError(expected(f"windows of {len(photos)} rows", int(windows.shape[0]), "Draw one per row"))
    table = windows.double().numpy()
    digest = hashlib.sha256(table.tobytes() + np.ascontiguousarray(photos, dtype=np.int64).tobytes()).hexdigest()
    keys = [f"{images.keys[int(photo)]}#{row}" for row, photo in enumerate(photos)]
    recipe = f"views {images.fingerprint()} {digest} {performer.preprocessing.to_dict()}"
    viewer = _Viewer(_Frames(images, performer.preprocessing), photos, table)
    drawn = ImageSet.from_generator(viewer, keys, recipe=recipe)
    as_framed = performer.preprocessing.changed({"resize": "squash", "resize_px": None})
    return drawn, performer.taking(as_framed)


@dataclass(frozen=True)
class TrainingMaps:
    """What training reads: cached maps of views of photos."""

    tap: np.ndarray  # maps at the tap, ``[row, filter, row, col]``; memory maps are read batch by batch
    targets: tuple[np.ndarray, ...]  # features to reconstruct, one array per target
    # how each view of the explained photos was cut, see :func:`view_windows`; row ``photo * views + view`` of the
    # arrays
    windows: Float[Tensor, "photo view 5"]
    labels: Int[Tensor, " photo"]  # the category of each of these photos, from 0
    background_rows: Int[np.ndarray, " background"]  # rows of the arrays that hold other photos; may be empty
    # maps of the layers that parts are found on, likewise; empty where nothing is taught
    finding: tuple[np.ndarray, ...] = ()

    @property
    def categories(self) -> int:
        """Number of categories that filters are shared among."""
        return int(self.labels.max()) + 1

    @property
    def photos(self) -> int:
        """Number of photos of the categories."""
        return int(self.windows.shape[0])

    @property
    def views(self) -> int:
        """Views of each photo."""
        return int(self.windows.shape[1])

    def rows(self, photos: Tensor, view: Tensor | int = 0) -> np.ndarray:
        """Return the array rows of photos in views."""
        found: np.ndarray = (photos * self.views + view).numpy()
        return found

    def own(self, category: int) -> Tensor:
        """Return the photos of one category."""
        return (self.labels == category).nonzero()[:, 0]

    @property
    def sample(self) -> np.ndarray:
        """Rows of whole photos that norms and target norms are measured on: with several categories, some of each."""
        count = min(self.photos, NORM_SAMPLE)
        # Photos often come in the order of their categories. Of one category the first ones are as good as any.
        several = self.categories > 1
        return self.rows(torch.arange(count) * self.photos // count if several else torch.arange(count))


def gather(array: np.ndarray, rows: np.ndarray, device: torch.device = _CPU) -> Tensor:
    """Read rows as float32: in the file's order, which a memory map serves best, returned in the order asked."""
    order = np.argsort(rows, kind="stable")
    read = np.empty((len(rows), *array.shape[1:]), array.dtype)
    read[order] = array[rows[order]]
    held = torch.from_numpy(read)
    if device.type == "cuda":  # from pinned memory the copy does not wait, and as stored it is half as large
        held = held.pin_memory()
    return held.to(device, non_blocking=True).float()


class Batch(NamedTuple):
    """Rows of one step, explained photos first, then background; which photos these are and in which view."""

    rows: np.ndarray
    photos: Int[Tensor, " positive"]
    view: Int[Tensor, " positive"]

    def of(self, processes: Processes) -> Batch:
        """Return the part of one of several processes."""
        first = len(self.photos)
        rows = np.concatenate([processes.own(self.rows[:first]), processes.own(self.rows[first:])])
        return Batch(rows, processes.own(self.photos), processes.own(self.view))


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch; what is drawn before the first one takes epochs of 0 and below."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch * 7_919 + 17) % (2**63))


def epoch_batches(data: TrainingMaps, config: ExplainerConfig, epoch: int) -> Iterator[Batch]:
    """Draw an epoch from (seed, epoch): every photo once or twice, each time in a drawn view, with background."""
    generator = epoch_generator(config.seed, epoch)
    size = min(config.batch_size, data.photos)
    order = torch.randperm(data.photos, generator=generator)
    for step in range(math.ceil(data.photos / size)):
        # The last batch is filled up from the start of the order, so that all batches have one size.
        photos = order[(torch.arange(size) + step * size) % data.photos]
        view = torch.randint(0, data.views, (size,), generator=generator)
        rows = data.rows(photos, view)
        if len(data.background_rows) and config.background_batch:
            drawn = torch.randint(len(data.background_rows), (config.background_batch,), generator=generator)
            rows = np.concatenate([rows, data.background_rows[drawn.numpy()]])
        yield Batch(rows, photos, view)
