"""The photos a performer is trained on: which an epoch shows, what is computed once, and how batches are read."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.explainer.views import viewed_images
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream_maps
from partlens.progress import Progress
from partlens.rows import row_store
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.networks.finetune_network import copied

OTHER = -1
"""Label of a photo that shows none of the categories."""

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
        share = config.positive_share  # groups are in the order others, category
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
    views = 2 if config.mirror else 1
    photos = np.repeat(np.arange(len(images)), views)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0, float(mirrored)] for mirrored in range(views)])
    drawn, framed = viewed_images(images, performer, photos, whole.repeat(len(images), 1))
    module = performer.module if device.type == "cpu" else copied(performer).to(device)
    with progress.task(f"computing {source} once", len(drawn)) as advance:
        maps = stream_maps(
            replace(framed, module=module),
            drawn,
            [source],
            folder,
            dtype=config.cache_precision,
            progress=advance,
        )
    return maps[source]


def kept_frames(images: ImageSet, preprocessing: Preprocessing, folder: Path, progress: Progress) -> np.ndarray:
    """Decode each photo once and keep what the network sees of it as bytes on disk."""
    identity = {"images": images.fingerprint(), "preprocessing": preprocessing.to_dict()}
    with (
        row_store(folder / "frames", identity, len(images)) as store,
        ThreadPoolExecutor(4, thread_name_prefix="partlens-decode") as pool,
        progress.task("reading photos", len(images)) as advance,
    ):
        while store.done < store.rows:
            part = range(store.done, min(store.done + _READ_AT_ONCE, store.rows))
            store.append({"frames": np.stack(list(pool.map(lambda i: _frame(images, i, preprocessing), part)))})
            advance(store.done)
        return store.read("frames")


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
