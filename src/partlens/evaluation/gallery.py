"""Pictures for the page: the photos on which a filter peaks highest with what it reads there, and Grad-CAM.

What a filter reads is found by covering pieces of photos (`partlens.attribution.receptive_pictures`); where a class
score comes from, by Grad-CAM of both networks (`partlens.attribution.grad_cam`).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from partlens.attribution.pictures import overlay, save_picture
from partlens.attribution.receptive_pictures import (
    OcclusionFields,
    activation_thresholds,
    occluder_places,
    occlusion_receptive_fields,
    region_picture,
    regions,
)
from partlens.errors import StorageError, expected
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.attention import attention
from partlens.evaluation.frames import BATCH, PHOTOS, Frames, GalleryPlan, JoinedMaps, small
from partlens.evaluation.results import Covering, FilterScores, Gallery, GalleryFilter, GalleryPhoto
from partlens.explainer.network import TRACK_REACH_CELLS, Explainer
from partlens.metrics.localisation import Peaks, dead_filters
from partlens.network.receptive_field import ReceptiveField, grid_of, widened
from partlens.object_parts.assignment import upsampled
from partlens.progress import counting

FOLDER = "gallery"
FILTERS = 12
_REGION_CELLS = 4.5  # the mask's half height, on both sides of the peak
_OURS = ("photo-*.jpg", "region-*.jpg", "map-*.jpg", "attention-*.jpg", Gallery.FILE)

Layers = Mapping[str, tuple[Peaks, Sequence[FilterScores]]]


def _distinct(peaks: Peaks, order: Sequence[int], count: int) -> list[int]:
    """Return the first filters in an order, at most so many, none of which follows an earlier one."""
    cells = peaks.cells - peaks.cells.mean(0)
    unit = cells / cells.norm(dim=0).clamp(min=1e-9)
    found: list[int] = []
    for k in order:
        if len(found) == count:
            break
        if all(float((unit[:, k] * unit[:, j]).sum(0).mean()) <= 0.8 for j in found):
            found.append(k)
    return found


def _chosen_filters(peaks: Peaks, table: Sequence[FilterScores], count: int = FILTERS) -> list[int]:
    """Choose filters that show the variety of a layer, not only its best.

    Half of them are the most consistent ones, taken greedily so that none follows another (peak correlation at most
    0.8 while that is possible); the other half are spread evenly over the ranking that remains.
    """
    dead, strength = dead_filters(peaks).tolist(), peaks.scores.mean(0)

    # Without landmarks nothing is consistent: such filters rank by mean peak score, below all that are.
    def rank(k: int) -> float:
        value = table[k].consistency
        return -10 + float(strength[k] / strength.max().clamp(min=1e-9)) if math.isnan(value) else value

    order = sorted((k for k in range(len(dead)) if not dead[k]), key=rank, reverse=True)
    best = _distinct(peaks, order, count // 2)
    rest = [k for k in order if k not in best]
    wanted = min(count - len(best), len(rest))
    spread = [rest[round(i * (len(rest) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    return best + list(dict.fromkeys(spread))


def region_px(
    peak: Float[Tensor, " 2"], receptive: ReceptiveField, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the box drawn around a peak: what the mask keeps of the receptive field, clipped to the image."""
    # The theoretical field of a deep layer covers most of the image; what a masked filter reads is near its peak.
    half_x = _REGION_CELLS * max(1, receptive.stride_px[1]) / 2
    half_y = _REGION_CELLS * max(1, receptive.stride_px[0]) / 2
    x, y = float(peak[0]), float(peak[1])
    return max(0.0, x - half_x), max(0.0, y - half_y), min(float(size[1]), x + half_x), min(float(size[0]), y + half_y)


@dataclass(frozen=True)
class _Shown:
    """A filter on the page: the layer, its number, its place in the joined maps, and its best photos."""

    layer: str
    filter: int
    joined: int
    photos: tuple[int, ...]


def _covered_pool(shown: Sequence[_Shown], count: int) -> list[int]:
    """Return the photos that most of the shown filters peak on, the first of equals first."""
    votes: dict[int, int] = {}
    for one in shown:
        for photo in one.photos:
            votes[photo] = votes.get(photo, 0) + 1
    return sorted(sorted(votes), key=lambda photo: -votes[photo])[:count]


@dataclass(frozen=True)
class _Looked:
    """What the shown filters read, by (position in shown, photo) where a photo is meant."""

    reads_px: Float[Tensor, " shown"]  # side of each filter's field; NaN where nothing was found
    covered: OcclusionFields | None  # by covering
    regions: dict[tuple[int, int], np.ndarray]
    maps: dict[tuple[int, int], Float[Tensor, "row col"]]


class _Drawing:
    """One gallery while it is drawn into a folder."""

    def __init__(
        self, folder: Path, frames: Frames, explainer: Explainer, layers: Layers, plan: GalleryPlan, filters: int
    ) -> None:
        self.folder, self.frames, self.plan, self.layers = folder, frames, plan, layers
        self.joined = JoinedMaps(frames.performer, explainer)
        self.receptive = frames.performer.field(self.joined.tap)
        self.size = frames.performer.preprocessing.size_px
        self.theory = {
            "explainer": widened(self.receptive, TRACK_REACH_CELLS).size_px,
            "performer": self.receptive.size_px,
        }
        self.shown = [
            _Shown(layer, k, self.joined.first[layer] + k, tuple(best.tolist()))
            for layer, (peaks, table) in layers.items()
            for k in _chosen_filters(peaks, table, filters)
            for best in [peaks.scores[:, k].argsort(descending=True, stable=True)[:PHOTOS]]
        ]
        self.pool = _covered_pool(self.shown, plan.covered) if plan.fields == "occlusion" else []
        self.places = len(occluder_places(self.size, plan.occlusion.occluder_px, plan.occlusion.stride_px))
        self.photos = sorted({photo for one in self.shown for photo in one.photos})
        self._pictures: dict[int, Image.Image] = {}

    @property
    def work(self) -> int:
        """How many images go through the network."""
        attended = min(self.plan.attention, len(self.frames.rows))
        return len(self.pool) * (1 + self.places) + len(self.photos) + attended

    def _maps(self, numbers: Sequence[int], advance: Callable[[int], None]) -> Float[Tensor, "photo filter row col"]:
        pieces = []
        for start in range(0, len(self.photos), BATCH):
            part = self.photos[start : start + BATCH]
            pieces.append(self.joined(self.frames.batch(part)).cpu()[:, numbers])
            advance(len(part))
        return torch.cat(pieces)

    def look(self, advance: Callable[[int], None]) -> _Looked:
        """Find the fields of the shown filters, and their maps and regions on their photos."""
        numbers = [one.joined for one in self.shown]
        covered = None
        if self.plan.fields == "occlusion":
            batch, config = self.frames.batch(self.pool), self.plan.occlusion
            covered = occlusion_receptive_fields(
                self.joined, batch, self.receptive, numbers, config=config, batch_size=BATCH, advance=advance
            )
        maps = self._maps(numbers, advance)
        pairs = [(n, photo) for n, one in enumerate(self.shown) for photo in one.photos]
        own = {(n, photo): maps[self.photos.index(photo), n] for n, photo in pairs}
        if covered is None:
            return _Looked(torch.full((len(self.shown),), math.nan), None, {}, own)
        of = torch.tensor([n for n, _ in pairs])
        thresholds = activation_thresholds(maps, images=self.plan.occlusion.images)
        drawn = regions(torch.stack(list(own.values())), covered.fields, of, thresholds[of], self.receptive)
        read = {pair: region.numpy() for pair, region in zip(pairs, drawn, strict=True)}
        return _Looked(covered.effective_px, covered, read, own)

    def photo(self, looked: _Looked, n: int, index: int) -> GalleryPhoto:
        """Draw a filter on one photo."""
        one, peaks = self.shown[n], self.layers[self.shown[n].layer][0]
        if index not in self._pictures:  # several filters may peak on one photo
            self._pictures[index] = small(self.frames.picture(index))
            save_picture(self.folder / f"photo-{index}.jpg", self._pictures[index])
        picture, region = self._pictures[index], looked.regions.get((n, index))
        place = f"{one.layer}-{one.filter}-{index}.jpg"
        region_file = None
        if region is not None and region.any():
            region_file = save_picture(self.folder / f"region-{place}", region_picture(picture, region))
        start, stride = grid_of(self.receptive)
        heat = upsampled(looked.maps[n, index][None, None], start, stride, self.size)[0, 0].clamp(min=0)
        drawn = overlay(picture, (heat / (float(heat.max()) or 1.0)).numpy())
        at = peaks.positions_px[index, one.filter]
        left, top, right, bottom = (round(v, 1) for v in region_px(at, self.receptive, self.size))
        return GalleryPhoto(
            key=self.frames.key(index),
            file=f"photo-{index}.jpg",
            region_file=region_file,
            map_file=save_picture(self.folder / f"map-{place}", drawn),
            score=round(float(peaks.scores[index, one.filter]), 4),
            peak_px=(round(float(at[0]), 1), round(float(at[1]), 1)),
            box_px=(left, top, right, bottom),
            size_px=(self.size[1], self.size[0]),
        )

    def covering(self, looked: _Looked, generator: torch.Generator) -> Covering | None:
        """Say how photos were covered."""
        if looked.covered is None:
            return None
        sides = {
            layer: looked.reads_px[[n for n, one in enumerate(self.shown) if one.layer == layer]]
            for layer in self.layers
        }
        return Covering(
            settings=dict(self.plan.occlusion),
            places=self.places,
            photos=len(looked.covered.images.unique()),
            photos_per_filter=int(looked.covered.images.shape[1]),
            reads_px={layer: _median_side(of, generator) for layer, of in sides.items()},
        )

    def draw(self, advance: Callable[[int], None]) -> Gallery:
        """Draw everything."""
        entries: dict[str, list[GalleryFilter]] = {layer: [] for layer in self.layers}
        generator, covering = torch.Generator().manual_seed(self.plan.seed), None
        if self.shown:
            looked = self.look(advance)
            for n, one in enumerate(self.shown):
                photos = tuple(self.photo(looked, n, index) for index in one.photos)
                reads = round(float(looked.reads_px[n]), 1)
                scores = self.layers[one.layer][1][one.filter]
                entries[one.layer].append(GalleryFilter(scores=scores, reads_px=reads, photos=photos))
            covering = self.covering(looked, generator)
        return Gallery(
            kind=self.plan.kind,
            fields=self.plan.fields,
            covering=covering,
            theoretical_px=self.theory,
            layers={layer: tuple(found) for layer, found in entries.items()},
            attention=attention(self.folder, self.joined, self.frames, self.plan, generator, advance),
        )


def _median_side(sides: Float[Tensor, " filter"], generator: torch.Generator) -> Estimate:
    """Return the median effective side of the shown filters, with an interval over filters."""
    known = sides[~sides.isnan()].double()
    if not len(known):
        return Estimate.undefined("filters")
    return bootstrap(
        lambda i: float(known[i].quantile(0.5)), len(known), generator=generator, rounds=300, unit="filters"
    )


def write_gallery(
    run: Path,
    frames: Frames,
    explainer: Explainer,
    layers: Layers,
    plan: GalleryPlan,
    *,
    filters: int = FILTERS,
    advance: Callable[[float], None] = lambda _: None,
) -> Gallery | None:
    """Draw a gallery into a new folder that then replaces the earlier one, which is untouched until then.

    Args:
        run: the run directory; the gallery is its folder ``gallery``.
        frames: the photos that the peaks were measured on.
        explainer: whose part filters are shown.
        layers: ``explainer`` and ``performer`` with their peaks and the scores of their filters.
        plan: how much is drawn; of the kind ``none`` only the earlier gallery is removed.
        filters: shown of each network.
        advance: called with the share that is done, from 0 to 1.

    Raises:
        StorageError: the folder cannot be written to.
    """
    new, gallery = run / f".{FOLDER}-new", None
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        if plan.kind != "none":
            drawing = _Drawing(new, frames, explainer, layers, plan, filters)
            gallery = drawing.draw(counting(lambda done: advance(min(1.0, done / drawing.work))))
            gallery.write(new)
        _swap(run / FOLDER, new)
    except StorageError:
        raise
    except OSError as error:
        rule = f"to write in {run / FOLDER}"
        raise StorageError(expected(rule, error.strerror or str(error), "Make the run directory writable")) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return gallery


def _swap(folder: Path, new: Path) -> None:
    """Put a new gallery in an earlier one's place; files that are none of a gallery's stay."""
    old = folder.with_name(f".{FOLDER}-old")
    if old.exists() and not folder.exists():
        old.rename(folder)  # an earlier swap was killed in between
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        for path in old.iterdir():
            if not any(path.match(pattern) for pattern in _OURS):
                path.rename(folder / path.name)
        shutil.rmtree(old)
    if not any(folder.iterdir()):
        folder.rmdir()
