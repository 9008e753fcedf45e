"""One pass over photos that serves all of an inspection: parts, regions, relevant filters and pictures.

Photos go through the performer in a few views. Of the whole photo are kept the tap's maps, the class scores, and of
every measured layer energies and peaks; of every view the maps of the layers that parts are found on. All of it goes to
disk batch by batch, so that memory does not grow with the photos and a killed run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.explainer.views import gather, viewed_images
from partlens.network.performer import Performer
from partlens.network.stream import PhotoReader, batches
from partlens.network.taps import Reduces, forward_taps
from partlens.progress import Advance
from partlens.records import content_hash
from partlens.rows import row_store
from partlens.selection.descriptors import energy, energy_and_peak, normalised
from partlens.selection.record import DescriptorConfig, FeatureIndex
from partlens.shards import Compute, in_shards

_PHOTOS_AT_ONCE = 16  # 32 take 1.05 times the CPU time, and more where freed memory is not kept
_TAP = "tap"
_LATER = "later-{}"

View = Callable[[Int[Tensor, " photo"], int], Tensor]
"""Returns a layer's maps of some photos in a view; view 0 is the whole photo."""


@dataclass(frozen=True)
class Wanted:
    """What is read of each photo: the tap, the layers that parts are found on, the layers whose energies are measured.

    ``tap`` is ``None`` for photos that are not inspected: neither its maps nor those of the finding layers are kept.
    """

    tap: str | None
    finding: tuple[str, ...]
    index: FeatureIndex
    descriptor: DescriptorConfig

    @property
    def maps(self) -> tuple[str, ...]:
        """Layers whose maps are kept."""
        return () if self.tap is None else tuple(dict.fromkeys((self.tap, *self.finding)))

    @property
    def read(self) -> tuple[str, ...]:
        """All layers that are read of a whole photo."""
        return tuple(dict.fromkeys((*self.index.layers, *self.maps)))

    @property
    def reduce(self) -> Reduces:
        """What is kept of each layer that is not kept whole."""
        return {name: energy_and_peak for name in self.index.layers if name not in self.maps}

    @property
    def compared(self) -> Reduces:
        """What of these must be alike in two precisions: energies, not the places of peaks that are nearly equal."""
        return {name: energy for name in self.index.layers if name not in self.maps}


@dataclass(frozen=True)
class Read:
    """What was read of some photos; arrays are memory maps, a row per photo."""

    rows: tuple[int, ...]  # positions of the photos in their set
    windows: Float[Tensor, "photo view 5"]  # how each view was cut
    # by name ``descriptor``, ``peak``, ``peak_cell``, ``logits``, ``tap`` and ``later-N``
    arrays: Mapping[str, np.ndarray]
    dead_layers: int  # pairs of a photo and a layer without any activation

    def tap(self, photos: Sequence[int] | Tensor) -> Float[Tensor, "photo filter row col"]:
        """Return the tap's maps of some of the photos."""
        return gather(self.arrays[_TAP], np.asarray(photos))

    def views_of(self, photos: Int[Tensor, " chosen"]) -> tuple[View, View | None]:
        """Return what gives the maps of some of the photos in a view, by their numbers among the chosen ones.

        Of the layer that parts are found on, and of the finer one that sharpens their places, where there is one.
        """

        def of(name: str) -> View:
            return lambda some, view: gather(self.arrays[name][:, view], photos[some].numpy())

        finer = _LATER.format(1)
        return of(_LATER.format(0)), of(finer) if finer in self.arrays else None


def read_photos(
    performer: Performer,
    images: ImageSet,
    rows: Sequence[int],
    windows: Float[Tensor, "photo view 5"],
    wanted: Wanted,
    folder: Path,
    compute: Compute = Compute(),  # noqa: B008 - frozen
    advance: Advance = lambda _: None,
) -> Read:
    """Run photos in their views through the performer once and keep on disk what an inspection needs.

    ``advance`` is called with the number of photos done. It goes on with rows found in ``folder``.

    Raises:
        ImageError: an image that cannot be read, with its name.
        RunError: ``folder`` holds rows of other photos or layers.
        StorageError: not enough space.
    """
    read = _Reading(performer, images, _PHOTOS_AT_ONCE, tuple(rows), windows, wanted)
    identity = read.identity(
        images=content_hash({"keys": [images.keys[row] for row in rows], "set": images.fingerprint()}),
        windows=content_hash({"windows": windows.tolist()}),
        wanted=wanted,
    )
    with row_store(folder, identity, len(rows)) as store:
        for arrays, lost in in_shards(read, range(store.done, store.rows), compute):
            store.append(arrays, {"dead_layers": store.state.get("dead_layers", 0) + lost})
            advance(store.done)
        arrays = {name: store.read(name) for name in store.names}
        return Read(tuple(rows), windows, arrays, int(store.state.get("dead_layers", 0)))


@dataclass(frozen=True, eq=False)
class _Reading(PhotoReader):
    """Reads photos in their views."""

    rows: tuple[int, ...]
    windows: Tensor
    wanted: Wanted

    def __call__(self, rows: Sequence[int]) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """Yield of each shard its arrays and the number of dead layers."""
        if rows:
            yield from _read(
                self.performer, self.images, [self.rows[k] for k in rows], self.windows[list(rows)], self.wanted
            )


def _read(
    performer: Performer, images: ImageSet, rows: Sequence[int], windows: Tensor, wanted: Wanted
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Read chunk by chunk: all views of some photos one after another, so that a photo is decoded once."""
    photos, views = windows.shape[:2]
    order = np.concatenate(
        [
            np.arange(first, min(first + _PHOTOS_AT_ONCE, photos)) * views + view
            for first in range(0, photos, _PHOTOS_AT_ONCE)
            for view in range(views)
        ]
    )
    drawn, viewing = viewed_images(images, performer, np.repeat(np.asarray(rows), views), windows.flatten(0, 1))
    arrays: dict[str, np.ndarray] = {}
    lost = 0
    for part, inputs in _equal_batches(viewing, drawn, order, photos, views):
        view = part[0] % views
        if view == 0:
            arrays, lost = _whole(viewing, inputs, wanted, views)
        else:
            _, maps = forward_taps(viewing, inputs, wanted.finding if wanted.tap else ())
            for number, layer in enumerate(wanted.finding):
                if view < _views_kept(number, views):
                    arrays[_LATER.format(number)][:, view] = _half(maps[layer])
        if view == views - 1:
            yield arrays, lost


def _equal_batches(
    performer: Performer, drawn: ImageSet, order: np.ndarray, photos: int, views: int
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Decode ahead; the last photos, fewer than the others, make batches of their own."""
    whole = photos // _PHOTOS_AT_ONCE * _PHOTOS_AT_ONCE * views
    yield from batches(performer, drawn, order[:whole].tolist(), _PHOTOS_AT_ONCE)
    if rest := photos % _PHOTOS_AT_ONCE:
        yield from batches(performer, drawn, order[whole:].tolist(), rest)


def _whole(performer: Performer, inputs: Tensor, wanted: Wanted, views: int) -> tuple[dict[str, np.ndarray], int]:
    """Run whole photos: scores, energies and peaks of all measured layers, maps of the layers that are kept."""
    index, kept = wanted.index, wanted.maps
    output, held = forward_taps(performer, inputs, wanted.read, wanted.reduce)
    measured = torch.cat([energy_and_peak(held[n]) if n in kept else held[n] for n in index.layers], dim=1)
    x, lost = normalised(measured[:, :, 0], index)
    arrays: dict[str, Any] = {
        "descriptor": x.cpu().numpy(),
        "peak": measured[:, :, 1].cpu().numpy(),
        "peak_cell": measured[:, :, 2:].cpu().numpy().astype(np.int16),
        "logits": performer.outputs.scores(output, len(inputs)).cpu().numpy(),
    }
    if wanted.tap is not None:
        arrays[_TAP] = _half(held[wanted.tap])
        for number, layer in enumerate(wanted.finding):
            first = _half(held[layer])
            shape = (len(first), _views_kept(number, views), *first.shape[1:])
            arrays[_LATER.format(number)] = np.zeros(shape, first.dtype)
            arrays[_LATER.format(number)][:, 0] = first
    return arrays, int(lost.sum())


def _views_kept(finding: int, views: int) -> int:
    return min(2, views) if finding else views  # places are sharpened in the photo and its mirror alone


def _half(values: Tensor) -> np.ndarray:
    # Clamped: one number beyond float16 in one map must not stop an inspection, and keeps its place as the largest.
    return values.clamp(-65504, 65504).cpu().numpy().astype(np.float16)
