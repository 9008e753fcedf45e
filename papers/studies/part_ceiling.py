"""What the tap's features could give: linear part detectors learned from the landmarks, and the performer's evidence.

Bounds to read the explainer's scores against, on held-out photos of every category:

- *truth*: peaks that stand on the annotated head, or on the annotated legs. Both have the same instability, half the
  standard deviation of their distance; and the correlation of the two says how alike two perfect filters are.
- *two layers*: a network of two 3x3 convolutions (128 units) on the same maps, learned from the landmarks of the
  training photos and their mirrors, three seeds. It is what the explainer's own two layers could be with labels.
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
from partlens.performer.receptive_field import grid_of, receptive_field
from partlens.performer.surgery import cut
from partlens.performer.taps import forward_taps
from partlens.performer.zoo import load_performer
from torch import nn

from partlens.data.images import ImageSet
from partlens.evaluation.places import landmarks_in_input, photo_numbers
from partlens.explainer.evidence import evidence_maps, sharpened
from partlens.metrics.localisation import (
    Peaks,
    consistency_per_filter,
    instability_per_filter,
    mean_pairwise,
    null_peaks,
    peak_correlation,
    peaks_from_maps,
    spread_per_filter,
)

HERE = Path(__file__).parent
SHRINKAGE = (0.03, 0.3, 3.0)
BOXES = (1, 3, 5)
HIDDEN = 128
EPOCHS = 25
SEEDS = 3
BLUR_CELLS = 0.8


def maps_at(
    performer: Any, images: ImageSet, rows: tuple[int, ...], tap: str, *, mirrored: bool = False
) -> torch.Tensor:
    parts = []
    for start in range(0, len(rows), 32):
        batch = performer.preprocessing([images.read(i) for i in rows[start : start + 32]])
        batch = batch.flip(-1) if mirrored else batch
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


def two_layers(maps: torch.Tensor, cells: torch.Tensor, tested: torch.Tensor, seed: int) -> torch.Tensor:
    """Answers (image, landmark, row, col) of a two-layer network taught to put each landmark on its cell."""
    torch.manual_seed(seed)
    mean, spread = maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True) + 1e-3
    known = ~cells.isnan().any(-1)
    row, col = (torch.arange(float(n)) for n in maps.shape[2:])
    far = (row[:, None] - cells[..., 0, None, None]).square() + (col - cells[..., 1, None, None]).square()
    wanted = torch.exp(-far.nan_to_num() / (2 * BLUR_CELLS**2)).flatten(2)
    wanted = wanted / wanted.sum(-1, keepdim=True)
    first, second = nn.Conv2d(maps.shape[1], HIDDEN, 3, padding=1), nn.Conv2d(HIDDEN, cells.shape[1], 3, padding=1)
    network = nn.Sequential(nn.Dropout2d(0.3), first, nn.ReLU(), nn.Dropout2d(0.3), second)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(maps)).split(64):
            answers = F.log_softmax(network((maps[batch] - mean) / spread).flatten(2), -1)
            loss = -(wanted[batch] * answers).sum(-1)[known[batch]].mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    with torch.no_grad():
        return network.eval()((tested - mean) / spread)


def truth(landmarks: torch.Tensor, size: tuple[int, int], stride: tuple[float, float]) -> dict[str, float]:
    """Scores of two filters whose peaks stand on the two landmarks of the photos that show both."""
    both = landmarks[~landmarks.isnan().any(-1).any(-1)].double()
    cells = both.flip(-1) / torch.tensor(stride)
    peaks = Peaks(cells, both, torch.ones(both.shape[:2], dtype=torch.float64), size)
    correlation = peak_correlation(peaks, torch.ones(2, dtype=torch.bool))
    return {
        "photos": len(both),
        "instability": round(float(instability_per_filter(peaks, both, size).mean()), 4),
        "correlation": round(float(mean_pairwise(correlation)), 3),
    }


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
        mirror = maps_at(performer, images, train, tap, mirrored=True)
        flipped = cells.float().clone()
        # Column 0 of a mirrored input is the last pixel.
        flipped[..., 1] = (size[1] - 1 - known[..., 0] - start[1]) / stride[1]
        deep: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        seen = ~known.isnan().all(-1).all(-1)
        for seed in range(SEEDS):
            pairs = torch.cat([learned[seen], mirror[seen]]), torch.cat([cells.float()[seen], flipped[seen]])
            answers = two_layers(*pairs, tested, seed)
            scores = measured(peaks_from_maps(answers - answers.min(), start, stride), landmarks, photos, size)
            for name, score in zip(names, scores, strict=True):
                deep[name].append(score)
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
            "truth": truth(landmarks, size, stride) if len(names) == 2 else None,
            "two_layers": {
                name: {key: round(float(np.mean([s[key] for s in scores])), 4) for key in scores[0]}
                for name, scores in deep.items()
            },
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
    header = (
        "| layer | category | photos | centre null | truth | head, 2 layers | legs, 2 layers | head, linear "
        "| legs, linear | evidence (and its spread) |"
    )
    lines = [header, "|---|---|---|---|---|---|---|---|---|---|"]
    for layer, content in json.loads((HERE / "part_ceiling.json").read_text()).items():
        for category, entry in content["categories"].items():
            head, legs = (entry["supervised"][name] for name in ("head", "front_legs"))
            deep = [entry["two_layers"][name] for name in ("head", "front_legs")]
            found = entry.get("evidence", {}).get("5x5 cells")
            cells = [
                layer.partition("@")[0].partition(":")[2] + " " + layer.rpartition(" ")[2],
                category,
                str(entry["held_out_photos"]),
                f"{entry['centre_null']:.3f}",
                f"{entry['truth']['instability']:.3f}",
                *(f"{d['instability']:.3f}, {d['consistency']:.2f}" for d in deep),
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
