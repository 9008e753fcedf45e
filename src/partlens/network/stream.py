"""Stream a set of images through a performer once: maps on disk, responses of every filter, top images.

Nothing grows in memory with the number of images when an output folder is given: each batch is written to
plain files (``.npy``, readable by any memory map) and forgotten. The manifest says how many rows are
complete, so that a run that was killed goes on with the next batch.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.lib.format import open_memmap
from PIL import Image
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, RunError, StorageError, expected, failed, listed
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer
from partlens.records import SCHEMA, read_json, sole_writer, write_json

MANIFEST = "maps.json"
_FLOAT16_MAX = 65504.0
_AHEAD = 2  # batches decoded in advance

Augment = Callable[[Image.Image, int], Image.Image]
Progress = Callable[[int, int], None]
Dtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class StreamResult:
    """What one pass over the images gave. Row ``image · views + view`` stands for one view of one image.

    Args:
        keys: names of the images, in order.
        views: views per image.
        taps: the layers read.
        peak: by tap, ``[row, filter]`` float32: the largest value of each map.
        peak_cell: by tap, ``[row, filter, 2]`` int32: where it stands (row, col); the first of equal ones.
        mean: by tap, ``[row, filter]`` float32: the mean of each map.
        top: by tap, ``[filter, k]`` int64: the rows with the largest peaks, best first, equal ones in order.
        path: folder of the maps, ``None`` when they were not kept.
    """

    keys: tuple[str, ...]
    views: int
    taps: tuple[str, ...]
    peak: dict[str, np.ndarray]
    peak_cell: dict[str, np.ndarray]
    mean: dict[str, np.ndarray]
    top: dict[str, np.ndarray]
    path: Path | None

    def maps(self) -> dict[str, np.memmap]:
        """Open the cached maps (`open_maps`).

        Raises:
            RunError: the maps were not kept.
        """
        if self.path is None:
            raise RunError(expected("maps on disk", "a pass without an output folder", "Give out= to stream_maps"))
        return open_maps(self.path)


class RowFile:
    """A ``.npy`` file that is filled row by row, or an array in memory.

    Rows are written, not mapped: mapped pages would count as the process's memory, and a full disk would kill
    the process instead of raising an error.
    """

    def __init__(self, path: Path | None, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.array: np.ndarray | None = None
        if path is None:
            self.array = np.zeros(shape, dtype=self.dtype)
            return
        if not path.exists():
            open_memmap(path, mode="w+", dtype=self.dtype, shape=shape).flush()
        mapped = open_memmap(path, mode="r")
        if mapped.shape != shape or mapped.dtype != self.dtype:
            raise RunError(
                expected(
                    f"{shape} {dtype} in {path.name}",
                    f"{mapped.shape} {mapped.dtype}",
                    "Delete the folder and run again",
                )
            )
        self.offset = int(mapped.offset)
        self.row_bytes = self.dtype.itemsize * math.prod(shape[1:])
        self.handle = path.open("r+b")

    def write(self, start: int, rows: np.ndarray) -> None:
        """Put rows in their place."""
        if self.array is not None:
            self.array[start : start + len(rows)] = rows
            return
        self.handle.seek(self.offset + start * self.row_bytes)
        self.handle.write(np.ascontiguousarray(rows, dtype=self.dtype).tobytes())

    def settle(self) -> None:
        """Bring what was written to the disk."""
        if self.array is None:
            self.handle.flush()
            os.fsync(self.handle.fileno())

    def read(self) -> np.ndarray:
        """Return all rows, a read-only memory map where there is a file."""
        if self.array is not None:
            return self.array
        self.handle.flush()
        return cast("np.ndarray", np.load(cast("Path", self.path), mmap_mode="r"))

    def close(self) -> None:
        """Close the file."""
        if self.array is None:
            self.handle.close()


class _Top:
    """The k largest peaks of each filter so far."""

    def __init__(self, filters: int, k: int) -> None:
        self.value = np.full((filters, 0), -np.inf, dtype=np.float32)
        self.row = np.zeros((filters, 0), dtype=np.int64)
        self.k = k

    def add(self, start: int, peak: np.ndarray) -> None:
        """Take in rows; earlier rows win among equals."""
        rows = np.broadcast_to(np.arange(start, start + len(peak), dtype=np.int64), (peak.shape[1], len(peak)))
        value = np.concatenate([self.value, peak.T.astype(np.float32)], axis=1)
        row = np.concatenate([self.row, rows], axis=1)
        best = np.argsort(-value, axis=1, kind="stable")[:, : self.k]
        self.value, self.row = np.take_along_axis(value, best, axis=1), np.take_along_axis(row, best, axis=1)


@dataclass
class _TapFiles:
    """The growing results of one tap."""

    maps: RowFile | None
    peak: RowFile
    cell: RowFile
    mean: RowFile
    top: _Top

    def all(self) -> list[RowFile]:
        return [rows for rows in (self.maps, self.peak, self.cell, self.mean) if rows is not None]


def _file_name(number: int, tap: str, kind: str) -> str:
    return f"{number}-{re.sub(r'[^A-Za-z0-9._-]', '_', tap)}.{kind}.npy"


def _responses(values: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Peak, its cell and mean of each map; vectors count as maps of one cell."""
    maps = values if values.ndim == 4 else values[:, :, None, None]
    flat = maps.flatten(2)
    peak, place = flat.max(dim=2)
    cols = maps.shape[3]
    cell = torch.stack([place // cols, place % cols], dim=2)
    return (
        peak.cpu().numpy().astype(np.float32),
        cell.cpu().numpy().astype(np.int32),
        flat.mean(dim=2).cpu().numpy().astype(np.float32),
    )


def _decode(performer: Performer, images: ImageSet, row: int, views: int, augment: Augment | None) -> Tensor:
    index, view = divmod(row, views)
    try:
        image = images.read(index)
        if augment is not None:
            image = augment(image, view)
        return performer.preprocessing([image])
    except OSError as error:
        raise ImageError(
            failed(f"read the image {images.keys[index]}", str(error), "Remove or replace the file")
        ) from error


def batches(
    performer: Performer,
    images: ImageSet,
    rows: range,
    batch_size: int,
    views: int = 1,
    augment: Augment | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Decode batches in a few threads, a little ahead of the network.

    Args:
        performer: for its preprocessing.
        images: the photos.
        rows: ``image · views + view`` to read, in order.
        batch_size: rows per batch.
        views: views per image.
        augment: makes a view of an image.

    Yields:
        The first row of the batch and the network's input.

    Raises:
        ImageError: an image that cannot be read, with its name.
    """
    starts = deque(range(rows.start, rows.stop, batch_size))
    waiting: deque[tuple[int, list[Future[Tensor]]]] = deque()
    pool = ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1)), thread_name_prefix="partlens-decode")
    try:
        while starts or waiting:
            while starts and len(waiting) < _AHEAD:
                start = starts.popleft()
                wanted = range(start, min(start + batch_size, rows.stop))
                waiting.append(
                    (start, [pool.submit(_decode, performer, images, row, views, augment) for row in wanted])
                )
            start, futures = waiting.popleft()
            yield start, torch.cat([future.result() for future in futures])
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_manifest(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    found = read_json(path)
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        name = different[0]
        raise RunError(
            expected(
                f"maps of this configuration in {path.parent}",
                f"another {', '.join(different)} ({name}: {found.get(name)!r} instead of {wanted[name]!r})",
                "Choose another folder, or give resume=False to start again",
            )
        )
    return found


def _open_files(
    out: Path | None,
    taps: Sequence[str],
    shapes: dict[str, tuple[int, ...]],
    rows: int,
    dtype: str,
    top_k: int,
) -> dict[str, _TapFiles]:
    files = {}
    for number, tap in enumerate(taps):
        shape = shapes[tap]
        filters = shape[0]

        def rows_of(kind: str, tail: tuple[int, ...], kept: str, number: int = number, tap: str = tap) -> RowFile:
            return RowFile(out / _file_name(number, tap, kind) if out else None, (rows, *tail), kept)

        files[tap] = _TapFiles(
            maps=rows_of("maps", shape, dtype) if out else None,
            peak=rows_of("peak", (filters,), "float32"),
            cell=rows_of("cell", (filters, 2), "int32"),
            mean=rows_of("mean", (filters,), "float32"),
            top=_Top(filters, top_k),
        )
    return files


def _check_space(out: Path, shapes: dict[str, tuple[int, ...]], rows: int, dtype: str) -> None:
    needed = sum(rows * (math.prod(s) * np.dtype(dtype).itemsize + s[0] * 16) for s in shapes.values())
    free = shutil.disk_usage(out).free
    if needed > free:
        raise StorageError(
            expected(
                f"{needed / 1e9:.1f} GB free for the maps in {out}",
                f"{free / 1e9:.1f} GB",
                "Free space, choose another folder, fewer taps or images, or float16",
            )
        )


def _checked(tap: str, values: Tensor, dtype: str, batch_keys: Sequence[str]) -> Tensor:
    if values.ndim not in {2, 4}:
        raise LayerError(
            expected(
                f"{tap} to give maps (image, filter, row, col) or vectors (image, filter)",
                f"shape {tuple(values.shape)}",
                "Choose another layer",
            )
        )
    if dtype == "float16" and values.numel():
        largest = values.abs().flatten(1).amax(dim=1)
        if float(largest.max()) > _FLOAT16_MAX:
            raise InputError(
                expected(
                    f"values up to {_FLOAT16_MAX:.0f} for float16 maps of {tap}",
                    f"{float(largest.max()):.6g} on {batch_keys[int(largest.argmax())]}",
                    "Use dtype float32",
                )
            )
    return values


def stream_maps(
    performer: Performer,
    images: ImageSet,
    taps: Sequence[str],
    out: Path | None,
    dtype: Dtype = "float16",
    batch_size: int = 32,
    augment: Augment | None = None,
    resume: bool = True,
    progress: Progress | None = None,
    *,
    views: int = 1,
    top_k: int = 100,
) -> StreamResult:
    """Run every image through the performer once and keep what its taps hold.

    Args:
        performer: the network; left as it was.
        images: the photos.
        taps: layers to read: maps, or vectors such as fc6 (which count as maps of one cell).
        out: folder for the maps, made when missing; ``None`` keeps only the responses, in memory.
        dtype: of the maps on disk. Responses are always computed from float32 values.
        batch_size: images per forward pass; also the granularity at which a killed run resumes.
        augment: makes a view of an image, called as ``augment(image, view)`` for views 0 to ``views - 1``, in
            several threads. It must give the same view each time, because a resumed run does not repeat
            finished rows.
        resume: go on with the maps found in ``out``; ``False`` starts again.
        progress: called as ``progress(rows_done, rows)`` after each batch.
        views: views per image; more than 1 needs ``augment``.
        top_k: rows kept per filter in ``top``; 100 is what location instability uses.

    Returns:
        The responses; with ``out`` they are memory maps, too.

    Raises:
        ImageError: no images, or one that cannot be read (with its name); finished batches stay on disk.
        InputError: a value that float16 cannot hold or that is not finite, or an argument out of range.
        LayerError: an unknown tap, or one that gives neither maps nor vectors.
        RunError: ``out`` holds maps of another configuration.
        StorageError: not enough space, or no permission.
    """
    if dtype not in {"float16", "float32"}:
        raise InputError(expected("dtype float16 or float32", dtype, "Choose float16"))
    if batch_size < 1 or views < 1 or top_k < 1:
        raise InputError(
            expected(
                "batch_size, views and top_k of at least 1",
                f"{batch_size}, {views} and {top_k}",
                "Correct the value",
            )
        )
    if views > 1 and augment is None:
        raise InputError(expected("augment, to make several views", f"views={views} alone", "Give augment, or views=1"))
    if not taps:
        raise LayerError(expected("at least one tap", "none", "Name a layer"))
    if len(images) == 0:
        raise ImageError(expected("at least 1 image", 0, "Choose a folder with photos"))
    taps = tuple(dict.fromkeys(taps))
    rows = len(images) * views
    wanted: dict[str, Any] = {
        "schema": SCHEMA,
        "performer": performer.weights_sha256,
        "images": images.fingerprint(),
        "preprocessing": performer.preprocessing.to_dict(),
        "dtype": dtype,
        "taps": list(taps),
        "rows": rows,
        "views": views,
        "augment": getattr(augment, "__qualname__", type(augment).__name__) if augment is not None else None,
    }
    try:
        with contextlib.nullcontext() if out is None else sole_writer(out, "maps"):
            return _stream(
                performer,
                images,
                taps,
                out,
                batch_size,
                augment,
                resume,
                progress,
                views=views,
                top_k=top_k,
                wanted=wanted,
            )
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            failed(f"write maps in {out}", error, "Free space and run the same command again")
        ) from error


def _stream(
    performer: Performer,
    images: ImageSet,
    taps: tuple[str, ...],
    out: Path | None,
    batch_size: int,
    augment: Augment | None,
    resume: bool,
    progress: Progress | None,
    *,
    views: int,
    top_k: int,
    wanted: dict[str, Any],
) -> StreamResult:
    rows, dtype = wanted["rows"], wanted["dtype"]
    manifest = out / MANIFEST if out is not None else None
    done = 0
    files: dict[str, _TapFiles] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    if out is not None and manifest is not None:
        out.mkdir(parents=True, exist_ok=True)
        if manifest.exists() and resume:
            found = _check_manifest(manifest, wanted)
            done = int(found["rows_done"])
            shapes = {tap: tuple(shape) for tap, shape in found["shapes"].items()}
            files = _open_files(out, taps, shapes, rows, dtype, top_k)
            for parts in files.values():
                peak = parts.peak.read()
                for start in range(0, done, 4096):
                    parts.top.add(start, np.asarray(peak[start : min(start + 4096, done)]))
        else:
            manifest.unlink(missing_ok=True)
            for number, tap in enumerate(taps):
                for kind in ("maps", "peak", "cell", "mean"):
                    (out / _file_name(number, tap, kind)).unlink(missing_ok=True)
    try:
        for start, batch in batches(performer, images, range(done, rows), batch_size, views, augment):
            _, values = forward_taps(performer, batch, taps)
            keys = [images.keys[row // views] for row in range(start, start + len(batch))]
            for tap in taps:
                _checked(tap, values[tap], dtype, keys)
            if not files:
                shapes = {tap: tuple(values[tap].shape[1:]) for tap in taps}
                if out is not None:
                    _check_space(out, shapes, rows, dtype)
                files = _open_files(out, taps, shapes, rows, dtype, top_k)
            for tap, parts in files.items():
                peak, cell, mean = _responses(values[tap])
                if parts.maps is not None:
                    parts.maps.write(start, values[tap].cpu().numpy())
                parts.peak.write(start, peak)
                parts.cell.write(start, cell)
                parts.mean.write(start, mean)
                parts.top.add(start, peak)
            done = start + len(batch)
            if manifest is not None:
                for parts in files.values():
                    for each in parts.all():
                        each.settle()
                write_json(
                    manifest,
                    {**wanted, "performer_name": performer.name, "shapes": shapes, "rows_done": done},
                )
            if progress is not None:
                progress(done, rows)
        return StreamResult(
            keys=tuple(images.keys),
            views=views,
            taps=taps,
            peak={tap: parts.peak.read() for tap, parts in files.items()},
            peak_cell={tap: parts.cell.read() for tap, parts in files.items()},
            mean={tap: parts.mean.read() for tap, parts in files.items()},
            top={tap: parts.top.row for tap, parts in files.items()},
            path=out,
        )
    finally:
        for parts in files.values():
            for each in parts.all():
                each.close()


def open_maps(path: Path) -> dict[str, np.memmap]:
    """Open cached maps without reading them.

    Args:
        path: folder that `stream_maps` filled.

    Returns:
        Read-only memory maps ``[row, filter, row, col]`` by tap.

    Raises:
        RunError: no maps there, or a pass that did not finish.
    """
    manifest = read_json(path / MANIFEST)
    missing = [name for name in ("taps", "rows", "rows_done") if name not in manifest]
    if missing:
        raise RunError(
            expected(f"a manifest of maps in {path}", f"one without {listed(missing)}", "Delete it and run again")
        )
    if manifest["rows_done"] != manifest["rows"]:
        raise RunError(
            expected(
                f"{manifest['rows']} finished rows in {path}",
                manifest["rows_done"],
                "Run stream_maps again with the same arguments; it goes on where it stopped",
            )
        )
    try:
        return {
            tap: cast("np.memmap", np.load(path / _file_name(number, tap, "maps"), mmap_mode="r"))
            for number, tap in enumerate(manifest["taps"])
        }
    except (OSError, ValueError) as error:
        raise RunError(
            expected(f"the maps named in {path / MANIFEST}", str(error), "Delete it and run again")
        ) from error
