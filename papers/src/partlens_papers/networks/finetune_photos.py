"""The photos a performer is trained on: which an epoch shows, what is computed once, and how batches are read."""

from __future__ import annotations

import math
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image, ImageOps
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import StorageError, expected, failed
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import RowFile, open_maps, stream_maps
from partlens.network.zoo import Performer
from partlens.progress import Progress
from partlens.records import SCHEMA, read_json, write_json
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.networks.finetune_network import copied

OTHER = -1
"""Label of a photo that shows none of the categories."""

_FRAMES = "frames"
_AHEAD = 2  # batches prepared in advance
_READ_AT_ONCE = 128


def epoch_photos(
    labels: Int[Tensor, " photo"], outputs: int, config: FinetuneConfig, epoch: int
) -> tuple[Int[Tensor, " draw"], Bool[Tensor, " draw"]]:
    """Draw the order of an epoch: every photo at least once, those of rare categories several times.

    Args:
        labels: number of each photo's category, :data:`OTHER` for none.
        outputs: of the network; with 1, categories are balanced by ``positive_share``, else equally.
        config: seed, shares and mirrors.
        epoch: its number.

    Returns:
        Positions in ``labels``, and whether each is shown mirrored.

    Example:
        >>> photos, _ = epoch_photos(torch.tensor([0, -1, -1, -1]), 1, FinetuneConfig(), 1)
        >>> sorted(photos.tolist())
        [0, 0, 0, 1, 2, 3]
    """
    generator = _generator(config.seed, epoch)
    groups = [torch.nonzero(labels == value).flatten() for value in labels.unique()]
    sizes = [len(group) for group in groups]
    if outputs == 1 and len(groups) == 2:
        share = config.positive_share  # groups stand in the order others, category
        positive = max(sizes[1], math.ceil(sizes[0] * share / (1 - share)))
        sizes = [max(sizes[0], round(positive * (1 - share) / share)), positive]
    else:
        sizes = [max(sizes)] * len(groups)
    drawn = []
    for group, size in zip(groups, sizes, strict=True):
        rounds = [torch.randperm(len(group), generator=generator) for _ in range(math.ceil(size / len(group)))]
        drawn.append(group[torch.cat(rounds)[:size]])
    photos = torch.cat(drawn)
    photos = photos[torch.randperm(len(photos), generator=generator)]
    mirrored = torch.randint(2, (len(photos),), generator=generator).bool()
    return photos, mirrored if config.mirror else torch.zeros_like(mirrored)


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch * 7_919 + 29) % (2**63))


@dataclass(frozen=True)
class _View:
    """Makes view 0, what the network sees of a photo, and view 1, its mirror."""

    preprocessing: Preprocessing

    def __call__(self, image: Image.Image, view: int) -> Image.Image:
        frame = self.preprocessing.frame(image)
        return ImageOps.mirror(frame) if view else frame


def fixed_maps(
    performer: Performer,
    source: str,
    images: ImageSet,
    config: FinetuneConfig,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> np.ndarray:
    """Compute the fixed layers' output for each photo and its mirror once; row ``photo * views + view``."""
    module = performer.module if device.type == "cpu" else copied(performer).to(device)
    as_framed = replace(performer.preprocessing, resize="squash", resize_px=None)  # views are frames already
    framed = replace(performer, module=module, preprocessing=as_framed)
    views = 2 if config.mirror else 1
    with progress.task(f"computing {source} once", len(images) * views) as advance:
        stream_maps(
            framed,
            images,
            [source],
            folder,
            dtype=config.cache_precision,
            augment=_View(performer.preprocessing),
            views=views,
            progress=lambda done, _: advance(done),
        )
    return open_maps(folder)[source]


def kept_frames(images: ImageSet, preprocessing: Preprocessing, folder: Path, progress: Progress) -> np.ndarray:
    """Decode each photo once and keep what the network sees of it as bytes on disk."""
    rows, cols = preprocessing.size_px
    path, state = folder / f"{_FRAMES}.npy", folder / f"{_FRAMES}.json"
    wanted = {"schema": SCHEMA, "images": images.fingerprint(), "preprocessing": preprocessing.to_dict()}
    if not state.exists() or read_json(state) != wanted:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _check_space(folder, len(images) * rows * cols * 3)
            path.unlink(missing_ok=True)
            kept = RowFile(path, (len(images), rows, cols, 3), "uint8")
            with (
                ThreadPoolExecutor(4, thread_name_prefix="partlens-decode") as pool,
                progress.task("reading photos", len(images)) as advance,
            ):
                for start in range(0, len(images), _READ_AT_ONCE):
                    part = range(start, min(start + _READ_AT_ONCE, len(images)))
                    kept.write(start, np.stack(list(pool.map(lambda i: _frame(images, i, preprocessing), part))))
                    advance(part.stop)
            kept.settle()
            kept.close()
        except StorageError:
            raise
        except OSError as error:
            raise StorageError(failed(f"write frames in {folder}", error, "Free space")) from error
        write_json(state, wanted)
    frames: np.ndarray = np.load(path, mmap_mode="r")
    return frames


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageError(
            expected(f"{needed / 1e9:.1f} GB free for frames in {folder}", f"{free / 1e9:.1f} GB", "Free space")
        )


def _frame(images: ImageSet, index: int, preprocessing: Preprocessing) -> np.ndarray:
    return np.asarray(preprocessing.frame(images.read(index)))


Read = Callable[[Tensor, Tensor], Tensor]


def reader_of_maps(maps: np.ndarray, views: int) -> Read:
    """Read batches of stored maps, row ``photo * views + view``."""

    def read(photos: Tensor, mirrored: Tensor) -> Tensor:
        return _gathered(maps, (photos * views + mirrored.long()).numpy()).float()

    return read


def reader_of_frames(frames: np.ndarray, preprocessing: Preprocessing) -> Read:
    """Read batches of stored frames as the network's input."""

    def read(photos: Tensor, mirrored: Tensor) -> Tensor:
        shown = _gathered(frames, photos.numpy())
        shown[mirrored] = shown[mirrored].flip(2)
        return preprocessing.of_bytes(shown)

    return read


def _gathered(array: np.ndarray, rows: np.ndarray) -> Tensor:
    """Read rows in the file's order, which a memory map serves best, and put them back in the order asked."""
    order = np.argsort(rows, kind="stable")
    read = torch.from_numpy(np.asarray(array[rows[order]]))
    return read[torch.from_numpy(np.argsort(order, kind="stable"))]


def prepared_batches(read: Read, photos: Tensor, mirrored: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the photos of each batch and its input, read a little ahead of the network."""
    parts = deque(zip(photos.split(batch_size), mirrored.split(batch_size), strict=True))
    waiting: deque[tuple[Tensor, Future[Tensor]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="partlens-batch") as pool:
        while parts or waiting:
            while parts and len(waiting) < _AHEAD:
                part, flags = parts.popleft()
                waiting.append((part, pool.submit(read, part, flags)))
            part, future = waiting.popleft()
            yield part, future.result()
