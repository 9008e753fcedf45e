"""How a network answers images: the descriptors and class scores of a batch, or of a data set in one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, RunError, StorageError, expected, failed
from partlens.network.stream import RowFile, batches
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer
from partlens.records import SCHEMA, read_json, write_json
from partlens.selection.descriptors import DescriptorConfig, FeatureIndex, energy, energy_and_peak, normalised
from partlens.selection.measured_layers import feature_index

RESPONSES = "responses.json"
Progress = Callable[[int, int], None]


# One batch


def _scores(output: Any) -> Tensor:
    """Find the class scores ``[image, class]`` in a network's output."""
    values = list(output.values()) if isinstance(output, Mapping) else output
    options = [output] if isinstance(output, Tensor) else values if isinstance(values, (list, tuple)) else []
    for value in options:
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.ndim == 2:
                return value
            if value.ndim == 4 and value.shape[2:] == (1, 1):
                return value[:, :, 0, 0]
    shown = str(tuple(output.shape)) if isinstance(output, Tensor) else type(output).__name__
    raise LayerError(
        expected("a network that returns class scores (image, class)", shown, "Wrap it so that it returns them")
    )


def _check_index(values: Mapping[str, Tensor], index: FeatureIndex) -> None:
    for layer, channels in zip(index.layers, index.channels, strict=True):
        if values[layer].shape[1] != channels:
            raise LayerError(
                expected(
                    f"{channels} channels in {layer}", values[layer].shape[1], "Use the index of this network and input"
                )
            )


def image_descriptors(
    performer: Performer,
    batch: Float[Tensor, "image channel row col"],
    index: FeatureIndex,
    config: DescriptorConfig | None = None,
) -> tuple[Float[Tensor, "image feature"], Float[Tensor, "image output"]]:
    """Run a batch and return its descriptors and class scores.

    Args:
        performer: the network; left as it was.
        batch: its input.
        index: the layers (`feature_index`).
        config: how descriptors are made.

    Returns:
        Descriptors and scores, float32 on the CPU.

    Raises:
        LayerError: a layer of the index is not there or has another number of channels, or the network does not return
            class scores.
        InputError: values that are not finite.
    """
    output, values = forward_taps(performer, batch, index.layers, energy)
    _check_index(values, index)
    x, _ = normalised(torch.cat([values[layer] for layer in index.layers], dim=1), index, config or DescriptorConfig())
    return x.cpu(), _scores(output).cpu()


# One pass over a data set


@dataclass(frozen=True)
class Responses:
    """Descriptors of a data set; a row per image. Arrays are read-only memory maps when a folder was given.

    Args:
        keys: names of the images.
        index: layer and channel of every feature.
        config: how the descriptors were made.
        descriptor: ``[image, feature]`` float32.
        peak: ``[image, feature]`` float32: the largest value of each channel; ``None`` where not asked for.
        peak_cell: ``[image, feature, 2]`` int16: where it stands (row, col), the first of equal ones; likewise.
        logits: ``[image, class]`` float32: the network's class scores.
        dead_layers: pairs of an image and a layer that did not answer at all; their features are 0.
        path: the folder; ``None`` when in memory.
    """

    keys: tuple[str, ...]
    index: FeatureIndex
    config: DescriptorConfig
    descriptor: np.ndarray
    peak: np.ndarray | None
    peak_cell: np.ndarray | None
    logits: np.ndarray
    dead_layers: int
    path: Path | None


_FILES = {"descriptor": "float32", "logits": "float32", "peak": "float32", "peak_cell": "int16"}


def _same_manifest(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    found = read_json(path)
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        raise RunError(
            expected(
                f"responses of this configuration in {path.parent}",
                f"another {', '.join(different)}",
                "Choose another folder, or give resume=False to start again",
            )
        )
    return found


def _open_rows(out: Path | None, images: int, features: int, classes: int, *, peaks: bool) -> dict[str, RowFile]:
    shapes: dict[str, tuple[int, ...]] = {"descriptor": (images, features), "logits": (images, classes)}
    if peaks:
        shapes |= {"peak": (images, features), "peak_cell": (images, features, 2)}
    return {
        name: RowFile(out / f"{name}.npy" if out is not None else None, shape, _FILES[name])
        for name, shape in shapes.items()
    }


def stream_responses(
    performer: Performer,
    images: ImageSet,
    config: DescriptorConfig | None = None,
    *,
    out: Path | None = None,
    batch_size: int = 32,
    resume: bool = True,
    peaks: bool = True,
    progress: Progress | None = None,
) -> Responses:
    """Run every image through the performer once and keep its descriptor, peaks and scores.

    Each layer is reduced to a few numbers per channel while the pass is there; the maps of all layers are never in
    memory together. With a folder, rows are written as they come, and a killed run goes on with the next batch.

    Args:
        performer: the network; left as it was.
        images: the photos.
        config: which layers, and how descriptors are made.
        out: folder for ``descriptor.npy``, ``logits.npy``, ``peak.npy``, ``peak_cell.npy`` and the manifest
            ``responses.json``, made when missing; ``None`` keeps all in memory.
        batch_size: images per forward pass; also the granularity at which a killed run resumes.
        resume: go on with what is found in ``out``; ``False`` starts again.
        peaks: keep where and how strongly each channel answers most.
        progress: called as ``progress(images_done, images)`` after each batch.

    Returns:
        The responses.

    Raises:
        ImageError: no images, or one that cannot be read (with its name); finished batches stay on disk.
        LayerError: no such layers, or a network without class scores.
        InputError: values that are not finite, or ``batch_size`` below 1.
        RunError: ``out`` holds responses of another configuration.
        StorageError: not enough space, or no permission.
    """
    config = config or DescriptorConfig()
    if batch_size < 1:
        raise InputError(expected("batch_size of at least 1", batch_size, "Correct the value"))
    if len(images) == 0:
        raise ImageError(expected("at least 1 image", 0, "Choose a folder with photos"))
    index = feature_index(performer, config)
    wanted: dict[str, Any] = {
        "schema": SCHEMA,
        "performer": performer.weights_sha256,
        "images": images.fingerprint(),
        "preprocessing": performer.preprocessing.to_dict(),
        "descriptor": config.to_dict(),
        "index": index.to_dict(),
        "rows": len(images),
        "peaks": peaks,
    }
    try:
        return _stream(performer, images, index, config, out, batch_size, resume, progress, wanted)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(
            failed(f"write responses in {out}", error, "Free space and run the same command again")
        ) from error


def _stream(
    performer: Performer,
    images: ImageSet,
    index: FeatureIndex,
    config: DescriptorConfig,
    out: Path | None,
    batch_size: int,
    resume: bool,
    progress: Progress | None,
    wanted: dict[str, Any],
) -> Responses:
    rows, peaks = len(images), bool(wanted["peaks"])
    manifest = out / RESPONSES if out is not None else None
    done, dead = 0, 0
    files: dict[str, RowFile] = {}
    if out is not None and manifest is not None:
        out.mkdir(parents=True, exist_ok=True)
        if manifest.exists() and resume:
            found = _same_manifest(manifest, wanted)
            done, dead = int(found["rows_done"]), int(found["dead_layers"])
            files = _open_rows(out, rows, index.size, int(found["classes"]), peaks=peaks)
        else:
            manifest.unlink(missing_ok=True)
            for name in _FILES:
                (out / f"{name}.npy").unlink(missing_ok=True)
    try:
        for start, batch in batches(performer, images, range(done, rows), batch_size):
            output, values = forward_taps(performer, batch, index.layers, energy_and_peak if peaks else energy)
            _check_index(values, index)
            scores = _scores(output).cpu().numpy()
            kept = torch.cat([values[layer] for layer in index.layers], dim=1)
            x, lost = normalised(kept[:, :, 0] if peaks else kept, index, config)
            files = files or _open_rows(out, rows, index.size, scores.shape[1], peaks=peaks)
            files["descriptor"].write(start, x.cpu().numpy())
            files["logits"].write(start, scores)
            if peaks:
                files["peak"].write(start, kept[:, :, 1].cpu().numpy())
                files["peak_cell"].write(start, kept[:, :, 2:].to(torch.int16).cpu().numpy())
            done, dead = start + len(batch), dead + int(lost.sum())
            if manifest is not None:
                for each in files.values():
                    each.settle()
                write_json(
                    manifest,
                    {
                        **wanted,
                        "performer_name": performer.name,
                        "classes": scores.shape[1],
                        "dead_layers": dead,
                        "rows_done": done,
                    },
                )
            if progress is not None:
                progress(done, rows)
        return Responses(
            keys=tuple(images.keys),
            index=index,
            config=config,
            descriptor=files["descriptor"].read(),
            peak=files["peak"].read() if peaks else None,
            peak_cell=files["peak_cell"].read() if peaks else None,
            logits=files["logits"].read(),
            dead_layers=dead,
            path=out,
        )
    finally:
        for each in files.values():
            each.close()
