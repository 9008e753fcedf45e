"""Pictures of filters for the page: the photos on which a filter peaks highest, with its region."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.metrics.localisation import Peaks, dead_filters
from partlens.performer.receptive_field import ReceptiveField
from partlens.performer.zoo import Performer
from partlens.store import SCHEMA, write_atomically, write_json

FILTERS = 12
PHOTOS = 6
SIDE_PX = 176
_REGION_CELLS = 4.5


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


def _save_photo(path: Path, frame: Image.Image) -> None:
    small = frame.copy()
    small.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "JPEG", quality=82)
    write_atomically(path, lambda p: p.write_bytes(content.getvalue()))


def write_gallery(
    run: Path,
    performer: Performer,
    images: ImageSet,
    rows: Sequence[int],
    layers: Mapping[str, tuple[Peaks, Sequence[Mapping[str, Any]]]],
    receptive: ReceptiveField,
) -> None:
    """Write ``gallery/gallery.json`` and its small JPEGs.

    Args:
        run: the run directory.
        performer: for the frame the network sees.
        images: the data set.
        rows: the photos the peaks were measured on, in order.
        layers: ``explainer`` and ``performer`` with their peaks and filter tables.
        receptive: of the tap.
    """
    folder = run / "gallery"
    size = performer.preprocessing.size_px
    content: dict[str, list[dict[str, Any]]] = {}
    written: set[int] = set()
    for layer, (peaks, table) in layers.items():
        entries = []
        for k in chosen_filters(peaks, table):
            best = peaks.scores[:, k].argsort(descending=True, stable=True)[:PHOTOS]
            photos = []
            for index in best.tolist():
                name = f"photo-{index}.jpg"
                if index not in written:
                    _save_photo(folder / name, performer.preprocessing.frame(images.read(rows[index])))
                    written.add(index)
                at = peaks.positions_px[index, k]
                photos.append(
                    {
                        "file": f"gallery/{name}",
                        "key": images.keys[rows[index]],
                        "score": round(float(peaks.scores[index, k]), 4),
                        "peak_px": [round(float(v), 1) for v in at],
                        "box_px": [round(v, 1) for v in region_px(at, receptive, size)],
                        "size_px": [size[1], size[0]],
                    }
                )
            known = {name: table[k][name] for name in ("instability", "consistency", "landmark")}
            entries.append({"filter": k, **known, "photos": photos})
        content[layer] = entries
    write_json(folder / "gallery.json", {"schema": SCHEMA, "layers": content})
