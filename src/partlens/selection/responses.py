"""How a network responds to images: descriptors and class scores of a batch, or of a data set in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, expected
from partlens.network.performer import Performer
from partlens.network.stream import stream
from partlens.network.taps import forward_taps
from partlens.records import plain
from partlens.rows import row_store
from partlens.selection.descriptors import energy, energy_and_peak, normalised
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import DescriptorConfig, FeatureIndex

Progress = Callable[[int, int], None]


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
    config: DescriptorConfig | None = None,
) -> tuple[Float[Tensor, "image feature"], Float[Tensor, "image output"]]:
    """Run a batch and return its descriptors and class scores, float32 on the CPU; the network stays as it was."""
    output, values = forward_taps(performer, batch, index.layers, energy)
    x, _ = normalised(_joined(values, index), index, config or DescriptorConfig())
    return x.cpu(), performer.outputs.scores(output, len(batch)).cpu()


@dataclass(frozen=True)
class Responses:
    """Descriptors of a data set; a row per image. Arrays are read-only memory maps when a folder was given.

    Args:
        keys: names of the images.
        index: layer and channel of every feature.
        descriptor: ``[image, feature]`` float32.
        peak: ``[image, feature]`` float32: the largest value of each channel; ``None`` where not asked for.
        peak_cell: ``[image, feature, 2]`` int16: its place (row, col), the first of equal ones; likewise.
        logits: ``[image, class]`` float32: the network's class scores (`partlens.network.outputs`).
        dead_layers: pairs of an image and a layer without any activation; their features are 0.
    """

    keys: tuple[str, ...]
    index: FeatureIndex
    descriptor: np.ndarray
    peak: np.ndarray | None
    peak_cell: np.ndarray | None
    logits: np.ndarray
    dead_layers: int

    def peaks(self, features: Sequence[int], photos: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the peaks of some features on the first photos, and their cells."""
        if self.peak is None or self.peak_cell is None:
            raise InputError(expected("responses with peaks", "none", "Stream them with peaks=True"))
        return np.asarray(self.peak[:photos])[:, features], np.asarray(self.peak_cell[:photos])[:, features]


def stream_responses(
    performer: Performer,
    images: ImageSet,
    config: DescriptorConfig | None = None,
    *,
    out: Path | None = None,
    batch_size: int = 32,
    peaks: bool = True,
    progress: Progress = lambda *_: None,
) -> Responses:
    """Run every image through the performer once and keep its descriptor, peaks and scores.

    Each layer is reduced to a few numbers per channel while the pass is there; the maps of all layers are never in
    memory together. With a folder ``out``, rows are written as they come, and a killed run goes on with the next batch.

    Raises:
        ImageError: no images, or one that cannot be read (with its name); finished batches stay on disk.
        LayerError: no such layers, or a network without class scores.
        InputError: values that are not finite, or ``batch_size`` below 1.
        RunError: ``out`` holds responses of another configuration.
    """
    config = config or DescriptorConfig()
    if batch_size < 1:
        raise InputError(expected("batch_size of at least 1", batch_size, "Correct the value"))
    if len(images) == 0:
        raise ImageError(expected("at least 1 image", 0, "Choose a folder with photos"))
    index = feature_index(performer, config)
    identity = {
        "performer": performer.weights_sha256,
        "images": images.fingerprint(),
        "preprocessing": performer.preprocessing.to_dict(),
        "precision": performer.precision,
        "descriptor": plain(config),
        "index": plain(index),
        "peaks": peaks,
    }
    with row_store(out, identity, len(images)) as store:
        reduce = energy_and_peak if peaks else energy
        rows, scores = range(store.done, store.rows), performer.outputs.scores
        for batch in stream(performer, images, rows, index.layers, batch_size=batch_size, reduce=reduce):
            kept = _joined(batch.maps, index)
            x, lost = normalised(kept[:, :, 0] if peaks else kept, index, config)
            arrays = {"descriptor": x.cpu().numpy(), "logits": scores(batch.outputs, len(batch.rows)).cpu().numpy()}
            if peaks:
                arrays |= {
                    "peak": kept[:, :, 1].cpu().numpy(),
                    "peak_cell": kept[:, :, 2:].cpu().numpy().astype(np.int16),
                }
            store.append(arrays, {"dead_layers": store.state.get("dead_layers", 0) + int(lost.sum())})
            progress(store.done, store.rows)
        return Responses(
            keys=tuple(images.keys),
            index=index,
            descriptor=store.read("descriptor"),
            peak=store.read("peak") if peaks else None,
            peak_cell=store.read("peak_cell") if peaks else None,
            logits=store.read("logits"),
            dead_layers=int(store.state["dead_layers"]),
        )
