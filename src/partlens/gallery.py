"""Pictures for the page: the photos on which a filter peaks highest with what it reads there, and Grad-CAM.

What a filter reads is found by covering pieces of photos (`partlens.artefacts.receptive_pictures`); where a class score
comes from, by Grad-CAM of both networks (`partlens.artefacts.track_cam`).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from partlens.artefacts.backprop import class_scores
from partlens.artefacts.parts import upsampled
from partlens.artefacts.pictures import overlay
from partlens.artefacts.receptive_pictures import (
    OcclusionConfig,
    OcclusionFields,
    activation_thresholds,
    occluder_places,
    occlusion_receptive_fields,
    region_picture,
    regions,
    round_fields,
)
from partlens.artefacts.track_cam import concentration_frac, layer_grad_cam, random_grad_cam, track_grad_cam
from partlens.data.images import ImageSet
from partlens.explainer.network import TRACK_REACH_CELLS, Explainer
from partlens.metrics.estimate import Estimate, bootstrap
from partlens.metrics.localisation import Peaks, dead_filters
from partlens.performer.receptive_field import ReceptiveField, grid_of, widened
from partlens.performer.taps import forward_taps
from partlens.performer.zoo import Performer
from partlens.store import SCHEMA, write_atomically, write_json
from partlens.vocabulary import InputError, StorageError, check_names, expected

FILTERS = 12
PHOTOS = 6
SIDE_PX = 176
_REGION_CELLS = 4.5
_BATCH = 32

GalleryKind = Literal["quick", "full", "none"]
FieldKind = Literal["occlusion", "analytic"]
"""What a filter reads: found by covering pieces of photos, or the round field that it has in theory."""


@dataclass(frozen=True)
class _Effort:
    """How much is spent on pictures: settings of the occlusion, photos covered, photos of Grad-CAM."""

    occlusion: OcclusionConfig
    covered: int
    attention: int


EFFORTS: Mapping[str, _Effort] = {
    # Twice the released stride and fewer photos: 121 places on 8 photos at 224 px.
    "quick": _Effort(OcclusionConfig(stride_px=18, images=4), 8, 24),
    # As released: 484 places, 10 photos a filter, chosen out of 24 for all filters.
    "full": _Effort(OcclusionConfig(), 24, 100),
}
"""What ``quick`` and ``full`` mean, for inputs of 224 px; other sizes are scaled."""


def chosen_filters(peaks: Peaks, table: Sequence[Mapping[str, Any]], count: int = FILTERS) -> list[int]:
    """Choose filters that show the variety of a layer, not only its best.

    Half of them are the most consistent ones, taken greedily so that none follows another (peak correlation at most
    0.8 while that is possible); the other half are spread evenly over the ranking that remains. Without landmarks the
    ranking is by mean peak score.

    Args:
        peaks: of every filter.
        table: one record per filter, as in the evaluation.
        count: filters wanted.

    Returns:
        Filter numbers, the chosen best first.
    """
    live = [k for k in range(peaks.scores.shape[1]) if not bool(dead_filters(peaks)[k])]
    strength = peaks.scores.mean(0)

    def rank(k: int) -> float:
        value = table[k]["consistency"]
        return float(value) if value is not None else -10 + float(strength[k] / strength.max().clamp(min=1e-9))

    order = sorted(live, key=rank, reverse=True)
    cells = peaks.cells - peaks.cells.mean(0)
    unit = cells / cells.norm(dim=0).clamp(min=1e-9)
    best: list[int] = []
    for k in order:
        if len(best) == count // 2:
            break
        if all(float((unit[:, k] * unit[:, j]).sum(0).mean()) <= 0.8 for j in best):
            best.append(k)
    rest = [k for k in order if k not in best]
    wanted = min(count - len(best), len(rest))
    spread = [rest[round(i * (len(rest) - 1) / max(1, wanted - 1))] for i in range(wanted)]
    return best + list(dict.fromkeys(spread))


def region_px(
    peak: Float[Tensor, " 2"], receptive: ReceptiveField, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Return the box drawn around a peak: the part of the receptive field that the mask keeps.

    The theoretical field of a deep layer covers most of the image; what a masked filter reads is centred on its peak.
    The box is 4.5 cells wide (the mask's half height on both sides), clipped to the image.
    """
    half_x = _REGION_CELLS * max(1, receptive.stride_px[1]) / 2
    half_y = _REGION_CELLS * max(1, receptive.stride_px[0]) / 2
    x, y = float(peak[0]), float(peak[1])
    return max(0.0, x - half_x), max(0.0, y - half_y), min(float(size[1]), x + half_x), min(float(size[0]), y + half_y)


def _save_photo(path: Path, picture: Image.Image) -> None:
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=82)
    write_atomically(path, lambda p: p.write_bytes(content.getvalue()))


def _small(frame: Image.Image) -> Image.Image:
    small = frame.copy()
    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    return small


@dataclass(frozen=True)
class _Shown:
    """A filter on the page: the layer, its number, its place in the joined maps, and its best photos."""

    layer: str
    filter: int
    joined: int
    photos: tuple[int, ...]


def _covered_pool(shown: Sequence[_Shown], count: int) -> list[int]:
    """Return the photos that most of the shown filters answer to, the first of equals first."""
    votes: dict[int, int] = {}
    for one in shown:
        for photo in one.photos:
            votes[photo] = votes.get(photo, 0) + 1
    return sorted(sorted(votes), key=lambda photo: -votes[photo])[:count]


class _Joined:
    """The masked maps of conv-interp-2 and the tap's maps of the same forward pass, one behind the other."""

    def __init__(self, performer: Performer, explainer: Explainer) -> None:
        self.performer = performer
        self.explainer = explainer
        self.tap = explainer.structure.tap
        self.first = {"explainer": 0, "performer": explainer.structure.channels_out}

    @torch.no_grad()
    def __call__(self, batch: Tensor) -> Tensor:
        maps = forward_taps(self.performer, batch.contiguous(memory_format=torch.channels_last), [self.tap])[1]
        tapped = maps[self.tap].cpu()
        interp2 = self.explainer.interpret(tapped)[1]
        return torch.cat([self.explainer.masked(interp2), tapped], dim=1)


@dataclass(frozen=True)
class _Frames:
    """The photos as the network sees them."""

    performer: Performer
    images: ImageSet
    rows: Sequence[int]

    def picture(self, index: int) -> Image.Image:
        return self.performer.preprocessing.frame(self.images.read(self.rows[index]))

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.performer.preprocessing([self.images.read(self.rows[i]) for i in indices])


def theoretical_px(receptive: ReceptiveField) -> dict[str, tuple[int, int]]:
    """Return how many rows and columns a filter of either network can read in theory."""
    return {"explainer": widened(receptive, TRACK_REACH_CELLS).size_px, "performer": receptive.size_px}


def occlusion_settings(
    gallery: GalleryKind, size_px: tuple[int, int], changes: OcclusionConfig | Mapping[str, Any] | None
) -> OcclusionConfig:
    """Return how photos are covered: as the gallery says, scaled to the input, with changes in pixels of the input.

    Raises:
        InputError: a field that does not exist, or a value out of range.
    """
    if isinstance(changes, OcclusionConfig):
        return changes
    config = EFFORTS[gallery].occlusion.scaled(size_px)
    check_names(config, changes or {})
    return replace(config, **(changes or {}))


def check_gallery(
    gallery: GalleryKind,
    fields: FieldKind,
    size_px: tuple[int, int],
    occlusion: OcclusionConfig | Mapping[str, Any] | None,
) -> None:
    """Refuse what no gallery can be made of, before anything is measured.

    Raises:
        InputError: see :func:`write_gallery`.
    """
    if gallery not in ("quick", "full", "none"):
        raise InputError(expected("gallery to be quick, full or none", f"{gallery!r}", "Choose quick"))
    if fields not in ("occlusion", "analytic"):
        raise InputError(expected("fields to be occlusion or analytic", f"{fields!r}", "Choose occlusion"))
    if gallery != "none":
        occlusion_settings(gallery, size_px, occlusion)


@dataclass(frozen=True)
class _Looked:
    """What the shown filters read, by (position in shown, photo) where a photo is meant.

    Attributes:
        reads_px: side of each filter's field; NaN where nothing was found.
        fields: how it was found by covering; ``None`` for analytic fields.
        regions: where they look on their photos.
        maps: their maps there.
    """

    reads_px: Float[Tensor, " shown"]
    fields: OcclusionFields | None
    regions: dict[tuple[int, int], np.ndarray]
    maps: dict[tuple[int, int], Float[Tensor, "row col"]]


def _looked(
    joined: _Joined,
    frames: _Frames,
    shown: Sequence[_Shown],
    pool: Sequence[int],
    receptive: ReceptiveField,
    config: OcclusionConfig,
    kind: FieldKind,
    advance: Callable[[int], None],
) -> _Looked:
    """Find the fields of the shown filters, and their maps and regions on their photos."""
    numbers = [one.joined for one in shown]
    if kind == "analytic":
        sides = {layer: math.sqrt(rows * cols) for layer, (rows, cols) in theoretical_px(receptive).items()}
        reads, found = torch.tensor([sides[one.layer] for one in shown]), None
        fields = round_fields(frames.performer.preprocessing.size_px, reads)
    else:
        found = occlusion_receptive_fields(
            joined, frames.batch(pool), receptive, numbers, config=config, batch_size=_BATCH, advance=advance
        )
        reads, fields = found.effective_px, found.fields
    photos = sorted({photo for one in shown for photo in one.photos})
    pieces = []
    for start in range(0, len(photos), _BATCH):
        part = photos[start : start + _BATCH]
        pieces.append(joined(frames.batch(part))[:, numbers])
        advance(len(part))
    maps = torch.cat(pieces)
    thresholds = activation_thresholds(maps, top_share=config.top_share, images=config.images)
    pairs = [(n, photo) for n, one in enumerate(shown) for photo in one.photos]
    of = torch.tensor([n for n, _ in pairs])
    where = torch.tensor([photos.index(photo) for _, photo in pairs])
    own = maps[where, of]
    drawn = regions(
        own,
        fields,
        of,
        thresholds[of],
        receptive,
        gain=config.gain,
        region_share=config.region_share,
    )
    return _Looked(
        reads,
        found,
        {pair: region.numpy() for pair, region in zip(pairs, drawn, strict=True)},
        dict(zip(pairs, own, strict=True)),
    )


def _median_side(sides: Float[Tensor, " filter"], generator: torch.Generator) -> dict[str, Any]:
    """Return the median effective side of the shown filters, with an interval over filters."""
    known = sides[~sides.isnan()].double()
    if not len(known):
        return Estimate.undefined("filters").to_dict()
    return bootstrap(
        lambda i: float(known[i].quantile(0.5)), len(known), generator=generator, rounds=300, unit="filters"
    ).to_dict()


def _attention(
    folder: Path,
    joined: _Joined,
    head: nn.Module,
    frames: _Frames,
    photos_of: Int[Tensor, " image"],
    top: str,
    effort: _Effort,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Draw Grad-CAM of both networks for the class that the performer gives each photo, and count how concentrated."""
    performer, tap = frames.performer, joined.tap
    size = performer.preprocessing.size_px
    layers = {"interpretable": tap, "tap": tap, "top": top}
    chosen = list(range(min(effort.attention, len(frames.rows))))
    maps: dict[str, list[Tensor]] = {name: [] for name in layers}
    classes: list[Tensor] = []
    denied: list[bool] = []
    sides: dict[str, tuple[int, int]] = {}
    for start in range(0, len(chosen), _BATCH):
        part = chosen[start : start + _BATCH]
        batch = frames.batch(part)
        output, taps = forward_taps(performer, batch, list(dict.fromkeys([tap, top])))
        scores = class_scores(output).cpu()
        of = scores.argmax(1)
        classes.append(of)
        denied += [scores.shape[1] == 1 and float(score) <= 0 for score in scores[:, 0]]
        sides |= {name: (int(taps[at].shape[2]), int(taps[at].shape[3])) for name, at in layers.items()}
        maps["interpretable"].append(track_grad_cam(joined.explainer, head, taps[tap].cpu(), of, size_px=size))
        maps["tap"].append(layer_grad_cam(performer, batch, tap, of))
        maps["top"].append(maps["tap"][-1] if top == tap else layer_grad_cam(performer, batch, top, of))
        advance(len(part))
    joined_maps = {name: torch.cat(pieces) for name, pieces in maps.items()}
    names = performer.class_names
    photos = []
    for position, index in enumerate(chosen[:PHOTOS]):
        frame = _small(frames.picture(index))
        files = {}
        for name, heat in joined_maps.items():
            path = f"gallery/attention-{name}-{index}.jpg"
            peak = float(heat[position].max())
            _save_photo(folder.parent / path, overlay(frame, (heat[position] / (peak or 1.0)).numpy()))
            files[name] = path
        number = int(torch.cat(classes)[position])
        photos.append(
            {
                "key": frames.images.keys[frames.rows[index]],
                "class": names[number] if names else str(number),
                # A single output has one class to draw, whatever the answer was.
                "denied": denied[position],
                "file": f"gallery/photo-{index}.jpg",
                "maps": files,
            }
        )
        _save_photo(folder / f"photo-{index}.jpg", frame)

    def shares(of: Tensor, photos: Tensor) -> dict[str, Any]:
        """Mean over photos of how concentrated the maps are; photos whose map is all zeros are counted apart."""
        values = concentration_frac(of).double()
        defined = values[~values.isnan()]
        if not len(defined):
            return {**Estimate.undefined().to_dict(), "empty": len(values)}
        found = bootstrap(
            lambda i: float(defined[i].mean()),
            len(defined),
            generator=generator,
            rounds=300,
            groups=photos[~values.isnan()],
        )
        return {**found.to_dict(), "empty": len(values) - len(defined)}

    return {
        "layers": {"interpretable": f"conv-interp-2 at {tap}", "tap": tap, "top": top},
        "size_px": [size[1], size[0]],
        "photos": photos,
        "concentration_frac": {name: shares(of, photos_of[: len(chosen)]) for name, of in joined_maps.items()},
        "random_frac": {
            name: shares(random_grad_cam(len(chosen), side, size, generator), torch.arange(len(chosen)))
            for name, side in sides.items()
        },
    }


def write_gallery(
    run: Path,
    performer: Performer,
    images: ImageSet,
    rows: Sequence[int],
    photos: Int[Tensor, " image"],
    layers: Mapping[str, tuple[Peaks, Sequence[Mapping[str, Any]]]],
    receptive: ReceptiveField,
    *,
    explainer: Explainer,
    head: nn.Module,
    top: str,
    gallery: GalleryKind = "quick",
    fields: FieldKind = "occlusion",
    occlusion: OcclusionConfig | Mapping[str, Any] | None = None,
    filters: int = FILTERS,
    seed: int = 0,
    advance: Callable[[float], None] = lambda _: None,
) -> None:
    """Write ``gallery/gallery.json`` and its small JPEGs; what an earlier gallery left is removed.

    Args:
        run: the run directory.
        performer: for the frame the network sees; borrowed.
        images: the data set.
        rows: the photos the peaks were measured on, in order.
        photos: an integer per row, equal for crops of one photo.
        layers: ``explainer`` and ``performer`` with their peaks and filter tables.
        receptive: of the tap.
        explainer: whose part filters are shown; borrowed.
        head: the performer's layers after the last target; borrowed.
        top: the performer's top layer, for Grad-CAM.
        gallery: ``quick`` covers 8 photos at 121 places each (224 px, about 1,000 forward passes) and joins Grad-CAM
            of 24 photos; ``full`` does as the released code does, 24 photos at 484 places and Grad-CAM of 100 photos;
            ``none`` writes no gallery.
        fields: ``occlusion`` finds what a filter reads by covering; ``analytic`` lays the round field that it has in
            theory at each active cell, as the papers' appendix does, and covers nothing.
        occlusion: a whole configuration, or fields to change in the gallery's, in pixels of the input.
        filters: shown of each network.
        seed: of the intervals and of the null.
        advance: called with the share that is done, from 0 to 1.

    Raises:
        InputError: another kind of gallery or of fields, or settings of the occlusion that do not exist.
    """
    size = performer.preprocessing.size_px
    check_gallery(gallery, fields, size, occlusion)
    folder = run / "gallery"
    try:
        for kind in ("photo-*.jpg", "region-*.jpg", "map-*.jpg", "attention-*.jpg", "gallery.json"):
            for earlier in folder.glob(kind):
                earlier.unlink()
    except OSError as error:
        raise StorageError(
            expected(f"to write in {folder}", error.strerror or str(error), "Make the run directory writable")
        ) from error
    if gallery == "none":
        return
    effort = EFFORTS[gallery]
    frames, joined = _Frames(performer, images, rows), _Joined(performer, explainer.eval())
    shown = [
        _Shown(layer, k, joined.first[layer] + k, tuple(best.tolist()))
        for layer, (peaks, table) in layers.items()
        for k in chosen_filters(peaks, table, filters)
        for best in [peaks.scores[:, k].argsort(descending=True, stable=True)[:PHOTOS]]
    ]
    config = occlusion_settings(gallery, size, occlusion)
    places = len(occluder_places(size, config.occluder_px, config.stride_px))
    pool = _covered_pool(shown, effort.covered) if fields == "occlusion" else []
    total = len(pool) * (1 + places) + len({p for one in shown for p in one.photos}) + min(effort.attention, len(rows))
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        advance(min(1.0, done / total))

    content: dict[str, Any] = {"schema": SCHEMA, "kind": gallery, "fields": fields}
    looked = _looked(joined, frames, shown, pool, receptive, config, fields, more) if shown else None
    start, stride = grid_of(receptive)
    entries: dict[str, list[dict[str, Any]]] = {layer: [] for layer in layers}
    pictures: dict[int, Image.Image] = {}
    for n, one in enumerate(shown):
        peaks, table = layers[one.layer]
        shown_on = []
        for index in one.photos:
            if index not in pictures:
                pictures[index] = _small(frames.picture(index))
                _save_photo(folder / f"photo-{index}.jpg", pictures[index])
            assert looked is not None
            region = looked.regions[n, index]
            name = f"gallery/region-{one.layer}-{one.filter}-{index}.jpg"
            if region.any():
                _save_photo(run / name, region_picture(pictures[index], region))
            heat = upsampled(looked.maps[n, index][None, None], start, stride, size)[0, 0].clamp(min=0)
            drawn = f"gallery/map-{one.layer}-{one.filter}-{index}.jpg"
            _save_photo(run / drawn, overlay(pictures[index], (heat / (float(heat.max()) or 1.0)).numpy()))
            at = peaks.positions_px[index, one.filter]
            shown_on.append(
                {
                    "file": f"gallery/photo-{index}.jpg",
                    "region_file": name if region.any() else None,
                    "map_file": drawn,
                    "key": images.keys[rows[index]],
                    "score": round(float(peaks.scores[index, one.filter]), 4),
                    "peak_px": [round(float(v), 1) for v in at],
                    "box_px": [round(v, 1) for v in region_px(at, receptive, size)],
                    "size_px": [size[1], size[0]],
                }
            )
        known = {name: table[one.filter][name] for name in ("instability", "consistency", "landmark")}
        reads = None if looked is None or bool(looked.reads_px[n].isnan()) else round(float(looked.reads_px[n]), 1)
        entries[one.layer].append({"filter": one.filter, **known, "reads_px": reads, "photos": shown_on})
    generator = torch.Generator().manual_seed(seed)
    theory = {layer: list(sides) for layer, sides in theoretical_px(receptive).items()}
    if looked is not None and looked.fields is None:
        content["analytic"] = {"theoretical_px": theory}
    elif looked is not None and looked.fields is not None:
        content["occlusion"] = {
            "occluder_px": config.occluder_px,
            "stride_px": config.stride_px,
            "places": places,
            "photos": len(looked.fields.images.unique()),
            "photos_per_filter": int(looked.fields.images.shape[1]),
            "settings": dict(config.__dict__),
            "theoretical_px": theory,
            "reads_px": {
                layer: _median_side(
                    looked.reads_px[[n for n, one in enumerate(shown) if one.layer == layer]], generator
                )
                for layer in layers
            },
        }
    content["attention"] = _attention(folder, joined, head, frames, photos, top, effort, generator, more)
    write_json(folder / "gallery.json", {**content, "layers": entries})
