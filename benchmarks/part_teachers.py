"""Which label-free sign tells a good part teacher: candidates of a later layer, scored by signs and by landmarks.

For every candidate that `partlens.explainer.teachers` would choose among, on the category's training photos and their
views: how well its place moves with crops and mirrors, over the variance of the place (what teachers are chosen by) or
in plain squared distance; and how much more strongly it answers to the category than to background photos (area under
the curve). On the held-out photos: consistency and instability by the landmarks, which nothing above has seen. The
figures are rank correlations (Spearman) of sign and consistency, and the mean scores of the sixteen best by each sign;
"landmarks" chooses by the held-out consistency itself, the most that any sign could give.

    uv run python benchmarks/part_teachers.py DATA LAYER=MODEL [LAYER=MODEL ...]
    uv run python benchmarks/part_teachers.py --table
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from part_ceiling import maps_at
from partlens.data.images import ImageSet
from partlens.evaluation import landmarks_in_input, photo_numbers
from partlens.explainer.seeding import _areas
from partlens.explainer.teachers import (
    MOST_CELLS,
    PARTS,
    ROUNDS,
    SHARE_OF_PHOTOS,
    centroids,
    nonnegative_parts,
    part_codes,
    places_in_view,
)
from partlens.explainer.views import view_windows, viewed_images
from partlens.metrics.localisation import (
    Peaks,
    consistency_per_filter,
    instability_per_filter,
    mean_pairwise,
    null_peaks,
    peak_correlation,
)
from partlens.performer.zoo import load_performer

HERE = Path(__file__).parent
VIEWS = 6
CHOSEN = 16
CATEGORIES = ("fox", "elephant", "giant_panda", "cat", "cattle", "zebra")
BACKGROUND = 300


def candidates(views: list[torch.Tensor], windows: torch.Tensor, others: torch.Tensor, held: torch.Tensor) -> Any:
    """Places on the held-out photos and the signs of every candidate."""
    generator = torch.Generator().manual_seed(0)
    places, strength, signs = [], [], {"over variance": [], "distance": [], "area": []}
    for count in PARTS:
        for _ in range(ROUNDS):
            chosen = torch.rand(len(windows), generator=generator) < SHARE_OF_PHOTOS
            cells = views[0][chosen].float().permute(0, 2, 3, 1).flatten(0, 2)
            parts = nonnegative_parts(
                cells[torch.randperm(len(cells), generator=generator)[:MOST_CELLS]], count, generator
            )
            codes = part_codes(views[0].float(), parts)
            first, error = centroids(codes), torch.zeros(count)
            for number in range(1, VIEWS):
                seen = centroids(part_codes(views[number].float(), parts))
                wanted = places_in_view(first, windows[:, number])
                inside = ((wanted > 0) & (wanted < 1)).all(-1).float()
                missed = ((seen - wanted).square().sum(-1) * inside).sum(0) / inside.sum(0).clamp(min=1)
                error += missed / (VIEWS - 1)
            of_held = part_codes(held.float(), parts)
            places.append(centroids(of_held))
            strength.append(of_held.flatten(2).amax(-1))
            signs["over variance"].append(error / first.var(0).sum(-1).clamp(min=1e-8))
            signs["distance"].append(error)
            signs["area"].append(
                -_areas(codes.flatten(2).amax(-1), part_codes(others.float(), parts).flatten(2).amax(-1))
            )
    return torch.cat(places, 1), torch.cat(strength, 1), {name: torch.cat(found) for name, found in signs.items()}


def measured(layer: str, spec: str, data: Path) -> dict[str, Any]:
    performer = load_performer(spec)
    images = ImageSet.open(data)
    size = performer.preprocessing.size_px
    result: dict[str, Any] = {"model": performer.name, "weights_sha256": performer.weights_sha256, "categories": {}}
    others = maps_at(performer, images, images.indices(category="background", split="train")[:BACKGROUND], layer)
    for category in CATEGORIES:
        train, held = (images.indices(category=category, split=s) for s in ("train", "test"))
        windows = view_windows(len(train), VIEWS, 0.55, torch.Generator().manual_seed(0))
        rows = np.repeat(np.array(train), VIEWS).astype(np.int64)
        drawn, viewing = viewed_images(images, performer, rows, windows.flatten(0, 1))
        seen = maps_at(viewing, drawn, np.arange(len(rows)), layer)
        views = list(seen.reshape(len(train), VIEWS, *seen.shape[1:]).transpose(0, 1))
        places, strength, signs = candidates(views, windows, others, maps_at(performer, images, held, layer))
        xy = places.flip(-1).double() * torch.tensor([size[1], size[0]])
        side = tuple(seen.shape[2:])
        peaks = Peaks(places.double() * torch.tensor(side) - 0.5, xy, strength.double(), side)
        landmarks = landmarks_in_input(images, held, performer)[1]
        consistency = consistency_per_filter(peaks, landmarks, photo_numbers(images, held))[0]
        instability = instability_per_filter(peaks, landmarks, size)
        entry: dict[str, Any] = {"candidates": len(consistency), "held_out_photos": len(held), "signs": {}}
        for name, cost in (signs | {"landmarks": -consistency}).items():
            best = cost.argsort()[:CHOSEN]
            correlation = peak_correlation(peaks.filters(best), torch.ones(CHOSEN, dtype=torch.bool))
            entry["signs"][name] = {
                "rank_correlation": round(float(spearmanr(-cost, consistency).statistic), 3),
                "consistency": round(float(consistency[best].mean()), 3),
                "instability": round(float(instability[best].mean()), 4),
                "correlation": round(mean_pairwise(correlation), 3),
            }
        centre = null_peaks(
            "centre",
            len(held),
            side,
            (0.0, 0.0),
            (1.0, 1.0),
            input_size_px=size,
            filters=1,
            generator=torch.Generator().manual_seed(0),
        )
        entry["centre_null"] = round(float(instability_per_filter(centre, landmarks, size)), 4)
        result["categories"][category] = entry
        print(layer, category, json.dumps(entry), flush=True)
    return result


def table() -> str:
    lines = [
        "| layer | category | over variance | distance | area under the curve | best by landmarks |",
        "|---|---|---|---|---|---|",
    ]

    def cell(found: dict[str, float]) -> str:
        return f"{found['rank_correlation']:.2f}; {found['consistency']:.2f}, {found['instability']:.3f}"

    for layer, content in json.loads((HERE / "part_teachers.json").read_text()).items():
        for category, entry in content["categories"].items():
            signs = entry["signs"]
            cells = [cell(signs[name]) for name in ("over variance", "distance", "area")]
            best = signs["landmarks"]
            cells.append(f"{best['consistency']:.2f}, {best['instability']:.3f}")
            lines.append("| " + " | ".join([layer, category.replace("_", " "), *cells]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        sys.stdout.write(table())
        return
    torch.set_num_threads(1)
    path = HERE / "part_teachers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for given in sys.argv[2:]:
        layer, spec = given.split("=", 1)
        found = measured(layer, spec, Path(sys.argv[1]))
        short = spec.partition("@")[0].partition(":")[2]
        known[f"{short} {layer}"] = found
        path.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
