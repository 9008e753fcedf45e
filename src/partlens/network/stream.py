"""One pass of images through a performer: batches with maps and outputs, or maps on disk for training."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, expected, failed, listed
from partlens.network.performer import Performer, device_of
from partlens.network.taps import Reduce, forward_taps
from partlens.progress import Advance
from partlens.rows import row_store
from partlens.shards import Compute, in_shards

BATCH = 32
"""Photos of a batch of a pass, which is the same on any number of processes."""

_FLOAT16_MAX = 65504.0
_AHEAD = 2  # batches decoded in advance
_THREADS = 4


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass gave.

    ``inputs`` are what the network got, on the CPU; ``outputs`` and ``maps`` (by tap, what `stream` kept of them) are
    float32 on its device.
    """

    rows: tuple[int, ...]
    inputs: Tensor
    outputs: Any
    maps: dict[str, Tensor]


def decoded(performer: Performer, images: ImageSet, row: int) -> Tensor:
    """Return the network's input of one photo, a batch of one.

    Raises:
        ImageError: it cannot be read, with its name.
    """
    try:
        return performer.preprocessing([images.read(row, performer.preprocessing.scaled_size)])
    except OSError as error:
        what = f"read the image {images.keys[row]}"
        raise ImageError(failed(what, str(error), "Remove or replace the file")) from error


def batches(
    performer: Performer, images: ImageSet, rows: Sequence[int], batch_size: int = 32
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Decode batches in a few threads, a little ahead of the network: their rows and the network's input.

    Raises:
        ImageError: an image that cannot be read, with its name.
    """
    parts = deque(tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))
    waiting: deque[tuple[tuple[int, ...], list[Future[Tensor]]]] = deque()
    threads = max(1, min(_THREADS, os.cpu_count() or 1))
    pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="partlens-decode")
    try:
        while parts or waiting:
            while parts and len(waiting) < _AHEAD:
                part = parts.popleft()
                waiting.append((part, [pool.submit(decoded, performer, images, row) for row in part]))
            part, futures = waiting.popleft()
            yield part, torch.cat([future.result() for future in futures])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def naming_photos(performer: Performer, keys: Sequence[str], inputs: Callable[[], Tensor]) -> Iterator[None]:
    """Say of a batch whose values are not finite which photos these are of; all of several are no fault of photos.

    ``inputs`` gives the batch again and is called after an error alone.
    """
    try:
        yield
    except LayerError:
        raise
    except InputError as error:
        batch = inputs()
        bad = [key for row, key in enumerate(keys) if not _is_taken(performer, batch[row : row + 1])]
        if not bad or len(bad) == len(keys) > 1:
            raise
        raise InputError(f"Photo {listed(bad)}: {error}") from error


def _is_taken(performer: Performer, image: Tensor) -> bool:
    try:
        forward_taps(performer, image, [])
    except InputError:
        return False
    return True


def stream(
    performer: Performer,
    images: ImageSet,
    rows: Sequence[int],
    taps: Sequence[str] = (),
    *,
    batch_size: int = 32,
    reduce: Reduce | None = None,
) -> Iterator[Batch]:
    """Run images through the performer, batch by batch; the next photos are decoded meanwhile.

    The performer is borrowed for each batch alone, so that it is as it was whenever the caller has control.

    ``rows`` are positions in ``images``, read in their order; ``reduce`` says what to keep of each layer's output
    instead of the whole (`partlens.network.taps.read_taps`).

    Raises:
        ImageError: an image that cannot be read, with its name.
        LayerError: an unknown layer.
        InputError: values that are not finite, with the names of the photos where it is not all of them.

    Example:
        >>> from partlens.data.images import ImageSet
        >>> from partlens.network.preprocessing import Preprocessing
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten())
        >>> performer = Performer(network, "tiny", Preprocessing(size_px=(8, 8)), weights_sha256="")
        >>> images = ImageSet.from_arrays(np.zeros((5, 8, 8, 3), np.uint8))
        >>> [(batch.rows, tuple(batch.maps["0"].shape)) for batch in stream(performer, images, [4, 0, 2], ["0"])]
        [((4, 0, 2), (3, 2, 6, 6))]
    """
    for part, inputs in batches(performer, images, rows, batch_size):
        with naming_photos(performer, [images.keys[row] for row in part], lambda batch=inputs: batch):  # type: ignore[misc]
            outputs, maps = forward_taps(performer, inputs, taps, reduce)
        yield Batch(part, inputs, outputs, maps)


@dataclass(frozen=True, eq=False)
class PhotoReader:
    """What reads photos shard by shard on any process (`partlens.shards.Reader`), for rows on disk."""

    performer: Performer
    images: ImageSet
    shard: int

    def on(self, device: str | None, number: int) -> Self:
        """Return the same for a worker of a number."""
        return replace(self, performer=self.performer.on(device_of(device, self.performer.device, number)))

    def identity(self, **further: Any) -> dict[str, Any]:
        """Return everything that its rows depend on."""
        return {
            "performer": self.performer.weights_sha256,
            "images": self.images.fingerprint(),
            "preprocessing": self.performer.preprocessing.to_dict(),
            "precision": self.performer.precision,
        } | further


def _file(number: int, tap: str) -> str:
    return f"{number}-{tap}.maps"


def _as_stored(tap: str, values: Tensor, dtype: str, names: Sequence[str]) -> np.ndarray:
    if values.ndim not in {2, 4}:
        rule = f"{tap} to give maps (image, filter, row, col) or vectors (image, filter)"
        raise LayerError(expected(rule, f"shape {tuple(values.shape)}", "Choose another layer"))
    if dtype == "float16" and values.numel():
        largest = values.abs().flatten(1).amax(dim=1)
        if float(largest.max()) > _FLOAT16_MAX:
            rule = f"values up to {_FLOAT16_MAX:.0f} for float16 maps of {tap}"
            got = f"{float(largest.max()):.6g} on {names[int(largest.argmax())]}"
            raise InputError(expected(rule, got, "Choose another tap or targets, such as a layer behind a norm layer"))
    return values.cpu().numpy().astype(dtype)


def stream_maps(
    performer: Performer,
    images: ImageSet,
    taps: Sequence[str],
    folder: Path,
    dtype: Literal["float16", "float32"] = "float16",
    *,
    compute: Compute = Compute(),  # noqa: B008 - frozen
    progress: Advance = lambda _: None,
) -> dict[str, np.ndarray]:
    """Run every image through the performer once and keep its maps on disk.

    Maps, or vectors such as fc6, go to ``folder`` (`partlens.rows`) and come back as read-only memory maps ``[image,
    filter, row, col]`` or ``[image, filter]`` by tap. It goes on with maps found there. ``progress`` is called with the
    number of images done after each batch.

    Raises:
        ImageError: an image that cannot be read (with its name); finished batches stay on disk.
        InputError: a value that float16 cannot hold or that is not finite, or an argument out of range.
        LayerError: an unknown tap, or one that gives neither maps nor vectors.
        RunError: ``folder`` holds maps of another configuration, or damaged ones.
        StorageError: not enough space, or no permission.
    """
    if dtype not in {"float16", "float32"}:
        raise InputError(expected("dtype float16 or float32", dtype, "Choose float16"))
    if not taps:
        raise LayerError(expected("at least one tap", "none", "Name a layer"))
    taps = tuple(dict.fromkeys(taps))
    read = _Maps(performer, images, BATCH, taps, dtype)
    with row_store(folder, read.identity(dtype=dtype, taps=taps), len(images)) as store:
        for maps in in_shards(read, range(store.done, store.rows), compute):
            store.append(maps)
            progress(store.done)
        return {tap: store.read(_file(n, tap)) for n, tap in enumerate(taps)}


@dataclass(frozen=True, eq=False)
class _Maps(PhotoReader):
    """Reads maps, a batch a shard."""

    taps: tuple[str, ...]
    dtype: str

    def __call__(self, rows: Sequence[int]) -> Iterator[dict[str, np.ndarray]]:
        for batch in stream(self.performer, self.images, rows, self.taps, batch_size=self.shard):
            names = [self.images.keys[row] for row in batch.rows]
            maps = enumerate(self.taps)
            yield {_file(n, tap): _as_stored(tap, batch.maps[tap], self.dtype, names) for n, tap in maps}
