"""Write a run's gallery: its pictures and ``gallery.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn

from partlens.attribution.pictures import overlay
from partlens.attribution.receptive_pictures import OcclusionConfig, occluder_places, region_picture
from partlens.data.images import ImageSet
from partlens.errors import StorageError, failed
from partlens.evaluation.gallery.attention import attention
from partlens.evaluation.gallery.common import (
    EFFORTS,
    PHOTOS,
    FieldKind,
    Frames,
    GalleryKind,
    JoinedMaps,
    check_gallery,
    occlusion_settings,
    save_photo,
    small,
)
from partlens.evaluation.gallery.filters import (
    FILTERS,
    Shown,
    chosen_filters,
    covered_pool,
    looked_at,
    median_side,
    region_px,
    theoretical_px,
)
from partlens.explainer.network import Explainer
from partlens.metrics.localisation import Peaks
from partlens.network.receptive_field import ReceptiveField, grid_of
from partlens.network.zoo import Performer
from partlens.object_parts.assignment import upsampled
from partlens.records import SCHEMA, write_json


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
        raise StorageError(failed(f"write in {folder}", error, "Make the run directory writable")) from error
    if gallery == "none":
        return
    effort = EFFORTS[gallery]
    frames, joined = Frames(performer, images, rows), JoinedMaps(performer, explainer.eval())
    shown = [
        Shown(layer, k, joined.first[layer] + k, tuple(best.tolist()))
        for layer, (peaks, table) in layers.items()
        for k in chosen_filters(peaks, table, filters)
        for best in [peaks.scores[:, k].argsort(descending=True, stable=True)[:PHOTOS]]
    ]
    config = occlusion_settings(gallery, size, occlusion)
    places = len(occluder_places(size, config.occluder_px, config.stride_px))
    pool = covered_pool(shown, effort.covered) if fields == "occlusion" else []
    total = len(pool) * (1 + places) + len({p for one in shown for p in one.photos}) + min(effort.attention, len(rows))
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        advance(min(1.0, done / total))

    content: dict[str, Any] = {"schema": SCHEMA, "kind": gallery, "fields": fields}
    looked = looked_at(joined, frames, shown, pool, receptive, config, fields, more) if shown else None
    start, stride = grid_of(receptive)
    entries: dict[str, list[dict[str, Any]]] = {layer: [] for layer in layers}
    pictures: dict[int, Image.Image] = {}
    for n, one in enumerate(shown):
        peaks, table = layers[one.layer]
        shown_on = []
        for index in one.photos:
            if index not in pictures:
                pictures[index] = small(frames.picture(index))
                save_photo(folder / f"photo-{index}.jpg", pictures[index])
            assert looked is not None
            region = looked.regions[n, index]
            name = f"gallery/region-{one.layer}-{one.filter}-{index}.jpg"
            if region.any():
                save_photo(run / name, region_picture(pictures[index], region))
            heat = upsampled(looked.maps[n, index][None, None], start, stride, size)[0, 0].clamp(min=0)
            drawn = f"gallery/map-{one.layer}-{one.filter}-{index}.jpg"
            save_photo(run / drawn, overlay(pictures[index], (heat / (float(heat.max()) or 1.0)).numpy()))
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
                layer: median_side(looked.reads_px[[n for n, one in enumerate(shown) if one.layer == layer]], generator)
                for layer in layers
            },
        }
    content["attention"] = attention(folder, joined, head, frames, photos, top, effort, generator, more)
    write_json(folder / "gallery.json", {**content, "layers": entries})
