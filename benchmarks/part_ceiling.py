"""What the tap's features could give: linear part detectors learned from the landmarks, and the performer's evidence.

Two bounds to read the explainer's scores against, on held-out photos of every category:

- *supervised*: for each landmark the linear discriminant between the cell that shows it and all cells, learned on
  training photos from the landmarks (3x3 cells averaged or not, three strengths of shrinkage; the best of the six on
  the held-out photos is shown, so it flatters). An explainer learns without landmarks.
- *evidence*: the largest cell of |dS/dx| |x|, with the performer's own decision as the only guide
  (partlens.explainer.evidence).

    uv run python benchmarks/part_ceiling.py DATA LAYER=MODEL [LAYER=MODEL ...]
    uv run python benchmarks/part_ceiling.py --table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from partlens.data.images import ImageSet
from partlens.evaluation import grid_of, landmarks_in_input, photo_numbers
from partlens.explainer.evidence import evidence_maps, sharpened
from partlens.metrics.localisation import (
    Peaks,
    consistency_per_filter,
    instability_per_filter,
    null_peaks,
    peaks_from_maps,
    spread_per_filter,
)
from partlens.performer.receptive_field import receptive_field
from partlens.performer.surgery import cut
from partlens.performer.taps import forward_taps
from partlens.performer.zoo import load_performer

HERE = Path(__file__).parent
SHRINKAGE = (0.03, 0.3, 3.0)
BOXES = (1, 3, 5)


def maps_at(performer: Any, images: ImageSet, rows: tuple[int, ...], tap: str) -> torch.Tensor:
    parts = []
    for start in range(0, len(rows), 32):
        batch = performer.preprocessing([images.read(i) for i in rows[start : start + 32]])
        parts.append(forward_taps(performer, batch, [tap])[1][tap])
    return torch.cat(parts)


def detectors(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Linear discriminants (landmark * shrinkage, filter); cells is (image, landmark, 2), NaN where absent."""
    everything = maps.permute(0, 2, 3, 1).flatten(0, 2)
    mean = everything.mean(0)
    covariance = (everything - mean).t() @ (everything - mean) / len(everything)
    found = []
    for landmark in range(cells.shape[1]):
        here = ~cells[:, landmark].isnan().any(-1)
        row, col = cells[here, landmark].round().long().unbind(-1)
        row, col = row.clamp(0, maps.shape[2] - 1), col.clamp(0, maps.shape[3] - 1)
        shift = maps[here, :, row, col].mean(0) - mean
        for strength in SHRINKAGE:
            ridge = strength * covariance.diagonal().mean() * torch.eye(len(covariance))
            found.append(torch.linalg.solve(covariance + ridge, shift))
    return torch.stack(found)


def measured(
    peaks: Peaks, landmarks: torch.Tensor, photos: torch.Tensor, size: tuple[int, int]
) -> list[dict[str, float]]:
    instability = instability_per_filter(peaks, landmarks, size)
    consistency = consistency_per_filter(peaks, landmarks, photos)[0]
    spread = spread_per_filter(peaks)
    return [
        {"instability": round(float(i), 4), "consistency": round(float(c), 3), "spread_cells": round(float(s), 2)}
        for i, c, s in zip(instability, consistency, spread, strict=True)
    ]


def ceiling(spec: str, tap: str, data: Path) -> dict[str, Any]:
    performer = load_performer(spec)
    images = ImageSet.open(data)
    size = performer.preprocessing.size_px
    start, stride = grid_of(receptive_field(performer, tap))
    upper = cut(performer, tap, ["output"]).float() if not performer.untrained_layers else None
    result: dict[str, Any] = {"model": performer.name, "weights_sha256": performer.weights_sha256, "categories": {}}
    names = images.part_truth.landmarks if images.part_truth is not None else ()
    for category in sorted(images.category_counts()):
        train, held = (images.indices(category=category, split=s) for s in ("train", "test"))
        _, known = landmarks_in_input(images, train, performer)
        if bool(known.isnan().all()):
            continue
        _, landmarks = landmarks_in_input(images, held, performer)
        photos = photo_numbers(images, held)
        learned, tested = maps_at(performer, images, train, tap), maps_at(performer, images, held, tap)
        # Landmarks are x, y in input pixels; cells are row, col.
        cells = (known.flip(-1) - torch.tensor(start)) / torch.tensor(stride)
        supervised: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for box in (1, 3):
            smooth = [F.avg_pool2d(m, box, 1, padding=box // 2) for m in (learned, tested)]
            answers = torch.einsum("kf,ifrc->ikrc", detectors(smooth[0], cells.float()), smooth[1])
            scores = measured(peaks_from_maps(answers - answers.min(), start, stride), landmarks, photos, size)
            for k, name in enumerate(names):
                supervised[name] += scores[k * len(SHRINKAGE) : (k + 1) * len(SHRINKAGE)]
        generator = torch.Generator().manual_seed(0)
        centre = null_peaks(
            "centre",
            len(held),
            tuple(tested.shape[2:]),
            start,
            stride,
            input_size_px=size,
            filters=1,
            generator=generator,
        )
        entry: dict[str, Any] = {
            "held_out_photos": len(held),
            "centre_null": round(float(instability_per_filter(centre, landmarks, size)), 4),
            "supervised": {
                name: {
                    "lowest_instability": min(s["instability"] for s in scores),
                    "highest_consistency": max(s["consistency"] for s in scores),
                }
                for name, scores in supervised.items()
            },
        }
        if upper is not None:
            raw = torch.cat([evidence_maps(upper, part) for part in tested.split(32)])
            entry["evidence"] = {
                f"{box}x{box} cells": measured(
                    peaks_from_maps(sharpened(raw, box, 1.0)[:, None], start, stride), landmarks, photos, size
                )[0]
                for box in BOXES
            }
        result["categories"][category] = entry
        print(tap, category, json.dumps(entry))
    return result


def table() -> str:
    lines = [
        "| layer | category | photos | centre null | head, supervised | legs, supervised | evidence (and its spread) |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer, content in json.loads((HERE / "part_ceiling.json").read_text()).items():
        for category, entry in content["categories"].items():
            head, legs = (entry["supervised"][name] for name in ("head", "front_legs"))
            found = entry.get("evidence", {}).get("5x5 cells")
            cells = [
                layer.partition("@")[0].partition(":")[2] + " " + layer.rpartition(" ")[2],
                category,
                str(entry["held_out_photos"]),
                f"{entry['centre_null']:.3f}",
                f"{head['lowest_instability']:.3f}, {head['highest_consistency']:.2f}",
                f"{legs['lowest_instability']:.3f}, {legs['highest_consistency']:.2f}",
                "–"
                if found is None
                else f"{found['instability']:.3f}, {found['consistency']:.2f}, {found['spread_cells']:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        sys.stdout.write(table())
        return
    torch.set_num_threads(1)
    data = Path(sys.argv[1])
    path = HERE / "part_ceiling.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for given in sys.argv[2:]:
        tap, spec = given.split("=", 1)
        found = ceiling(spec, tap, data)
        known[f"{found['model']} {tap}"] = found
        path.write_text(json.dumps(known, indent=2, default=lambda x: float(np.asarray(x))) + "\n")


if __name__ == "__main__":
    main()
