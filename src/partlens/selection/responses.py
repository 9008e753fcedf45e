"""How a network responds to images: descriptors and class scores of a batch, or of a data set in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import ImageError, LayerError, expected
from partlens.network.performer import Performer
from partlens.network.stream import BATCH, Batch, PhotoReader, stream
from partlens.network.taps import forward_taps
from partlens.progress import Advance
from partlens.rows import row_store
from partlens.selection.descriptors import energy, energy_and_peak, normalised
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import DescriptorConfig, FeatureIndex
from partlens.shards import SHARD, Compute, in_shards

_COLUMNS = 4096  # features whose photos are ordered at a time
_TOP = ("photo", "peak", "cell")


def _joined(values: Mapping[str, Tensor], index: FeatureIndex) -> Tensor:
    for layer, channels in zip(index.layers, index.channels, strict=True):
        if values[layer].shape[1] != channels:
            remedy = "Use the index of this network and input"
            raise LayerError(expected(f"{channels} channels in {layer}", values[layer].shape[1], remedy))
    return torch.cat([values[layer] for layer in index.layers], dim=1)


def image_descriptors(
    performer: Performer,
    batch: Float[Tensor, "image channel row col"],
    index: FeatureIndex,
) -> tuple[Float[Tensor, "image feature"], Float[Tensor, "image output"]]:
    """Run a batch and return its descriptors and class scores, float32 on the CPU; the network stays as it was."""
    output, values = forward_taps(performer, batch, index.layers, energy)
    x, _ = normalised(_joined(values, index), index)
    return x.cpu(), performer.outputs.scores(output, len(batch)).cpu()


@dataclass(frozen=True)
class TopPhotos:
    """The photos that activate each feature most, best first; of equal peaks the one that comes first in the list.

    They are merged photo by photo, so that they take the same room however many photos there are.

    Example:
        >>> peak, cell = np.array([[1.0, 5.0], [3.0, 5.0], [3.0, 7.0]], np.float32), np.zeros((3, 2, 2), np.int16)
        >>> TopPhotos.none(2, 2).merged(peak[:2], cell[:2], 0).merged(peak[2:], cell[2:], 2).photo.tolist()
        [[1, 2], [2, 0]]
    """

    photo: np.ndarray  # ``[rank, feature]`` int64: positions in the list; -1 where there are fewer photos than ranks
    peak: np.ndarray  # ``[rank, feature]`` float32: the largest value of the feature's map
    cell: np.ndarray  # ``[rank, feature, 2]`` int16: its place (row, col), the first of equal ones

    @classmethod
    def none(cls, count: int, features: int) -> TopPhotos:
        """Return ranks that no photo has taken."""
        shape = (count, features)
        return cls(np.full(shape, -1), np.full(shape, -np.inf, np.float32), np.zeros((*shape, 2), np.int16))

    def merged(self, peak: np.ndarray, cell: np.ndarray, first: int) -> TopPhotos:
        """Take in further photos, ``[photo, feature]`` and ``[photo, feature, 2]``, the first of them ``first``."""
        count = len(self.photo)
        better = np.flatnonzero(peak.max(0) > self.peak[-1])
        made = TopPhotos(*(values.copy() for values in (self.photo, self.peak, self.cell)))
        number = np.broadcast_to(np.arange(first, first + len(peak))[:, None], peak.shape)
        for columns in np.array_split(better, max(1, len(better) // _COLUMNS)):
            held = np.concatenate([self.peak[:, columns], peak[:, columns]])
            order = np.argsort(-held, axis=0, kind="stable")[:count]
            made.peak[:, columns] = np.take_along_axis(held, order, 0)
            both = np.concatenate([self.photo[:, columns], number[:, columns]])
            made.photo[:, columns] = np.take_along_axis(both, order, 0)
            cells = np.concatenate([self.cell[:, columns], cell[:, columns]])
            made.cell[:, columns] = np.take_along_axis(cells, order[:, :, None], 0)
        return made

    def of(self, features: Sequence[int]) -> TopPhotos:
        """Return those of some features."""
        return TopPhotos(self.photo[:, features], self.peak[:, features], self.cell[:, features])

    def first(self, count: int) -> TopPhotos:
        """Return the best."""
        return TopPhotos(self.photo[:count], self.peak[:count], self.cell[:count])


@dataclass(frozen=True)
class Responses:
    """Descriptors of a data set; a row per image. Arrays are read-only memory maps when a folder was given."""

    keys: tuple[str, ...]  # names of the images
    index: FeatureIndex  # layer and channel of every feature
    descriptor: np.ndarray  # ``[image, feature]`` float32
    logits: np.ndarray  # ``[image, class]`` float32: the network's class scores (`partlens.network.outputs`)
    dead_layers: int  # pairs of an image and a layer without any activation; their features are 0
    top: TopPhotos  # the images that activate each feature most, as many as were asked for


def stream_responses(
    performer: Performer,
    images: ImageSet,
    config: DescriptorConfig | None = None,
    *,
    out: Path | None = None,
    top: tuple[int, int] = (0, 0),
    compute: Compute = Compute(),  # noqa: B008 - frozen
    progress: Advance = lambda _: None,
) -> Responses:
    """Run every image through the performer once; keep its descriptor and scores, and the images with the top peaks.

    Each layer is reduced to a few numbers per channel while the pass is there; the maps of all layers are never in
    memory together. With a folder ``out``, rows are written as they come, and a killed run goes on with the next shard.

    Args:
        performer: the network.
        images: what it sees.
        config: what is measured.
        out: where rows are kept; without, in memory.
        top: how many images are kept per feature, and of the first how many.
        compute: where.
        progress: called with the images done.

    Raises:
        ImageError: no images, or one that cannot be read (with its name); finished shards stay on disk.
        LayerError: no such layers, or a network without class scores.
        InputError: values that are not finite.
        RunError: ``out`` holds responses of another configuration.
    """
    config = config or DescriptorConfig()
    if len(images) == 0:
        raise ImageError(expected("at least 1 image", 0, "Choose a folder with photos"))
    index = feature_index(performer, config)
    count, among = min(top), top[1]
    read = _Reading(performer, images, SHARD, index, peaks=count > 0)
    identity = read.identity(descriptor=config, index=index, top=top)
    with row_store(out, identity, len(images)) as store:
        kept = (
            TopPhotos(**{name: store.state[name] for name in _TOP}) if store.done else TopPhotos.none(count, index.size)
        )
        for arrays, lost in in_shards(read, range(store.done, store.rows), compute):
            kept = _seen(kept, arrays, store.done, among)
            state = {"dead_layers": store.state.get("dead_layers", 0) + lost, **vars(kept)}
            store.append({name: arrays[name] for name in ("descriptor", "logits")}, state)
            progress(store.done)
        return Responses(
            keys=tuple(images.keys),
            index=index,
            descriptor=store.read("descriptor"),
            logits=store.read("logits"),
            dead_layers=int(store.state["dead_layers"]),
            top=kept,
        )


def _seen(kept: TopPhotos, arrays: Mapping[str, np.ndarray], first: int, among: int) -> TopPhotos:
    if not len(kept.photo) or first >= among:
        return kept
    return kept.merged(arrays["peak"][: among - first], arrays["cell"][: among - first], first)


@dataclass(frozen=True, eq=False)
class _Reading(PhotoReader):
    """Reads descriptors."""

    index: FeatureIndex
    peaks: bool

    def __call__(self, rows: Sequence[int]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """Yield of each shard its arrays, a row per image, and the number of dead layers."""
        reduce = energy_and_peak if self.peaks else energy
        held: list[dict[str, np.ndarray]] = []
        dead = 0
        size = math.gcd(BATCH, self.shard)
        for batch in stream(self.performer, self.images, rows, self.index.layers, batch_size=size, reduce=reduce):
            arrays, lost = self._of_batch(batch)
            held.append(arrays)
            dead += lost
            if len(held) * size >= self.shard or batch.rows[-1] == rows[-1]:
                yield {name: np.concatenate([each[name] for each in held]) for name in arrays}, dead
                held, dead = [], 0

    def _of_batch(self, batch: Batch) -> tuple[dict[str, np.ndarray], int]:
        kept = _joined(batch.maps, self.index)
        kept = kept if self.peaks else kept[:, :, None]
        x, lost = normalised(kept[:, :, 0], self.index)
        found = {"descriptor": x, "logits": self.performer.outputs.scores(batch.outputs, len(batch.rows))}
        if self.peaks:
            found |= {"peak": kept[:, :, 1], "cell": kept[:, :, 2:].to(torch.int16)}
        return {name: values.cpu().numpy() for name, values in found.items()}, int(lost.sum())
