"""Which label-free sign tells a good part teacher, and which layer has it: candidates scored by landmarks.

*Signs.* For every candidate of a later layer that `partlens.explainer.teachers` would choose among, on the category's
training photos and their views: how well its place moves with crops and mirrors, over the variance of the place (what
teachers are chosen by) or in plain squared distance; and how much more strongly it answers to the category than to
background photos (area under the curve). On the held-out photos: consistency and instability by the landmarks, which
nothing above has seen. The figures are rank correlations (Spearman) of sign and consistency, and the mean scores of the
sixteen best by each sign; "landmarks" chooses by the held-out consistency itself, the most that any sign could give.

*Sources.* The sixteen teachers that are chosen, with variety, from regions of the later layer, from parts that the
tap's own features vote for, and from both together; scored on the held-out photos in the same way.

    uv run python benchmarks/part_teachers.py DATA TAP,LAYER=MODEL [TAP,LAYER=MODEL ...]
    uv run python benchmarks/part_teachers.py --table

DATA is the folder of the animals, or the file that `partlens data join` writes for birds and other photos.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from part_ceiling import maps_at
from partlens.performer.zoo import load_performer
from scipy.stats import spearmanr

from partlens.data.images import ImageSet
from partlens.evaluation.places import landmarks_in_input, photo_numbers
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.seeding import MOST_PHOTOS, VotedParts, _areas, voted_parts
from partlens.explainer.starting import _SEED_VIEWS, _VOTED_POWER, _VOTERS
from partlens.explainer.teachers import LaterParts, Source, centroids, part_codes, part_teachers, places_in_view
from partlens.explainer.views import view_windows, viewed_images
from partlens.metrics.localisation import (
    Peaks,
    consistency_per_filter,
    instability_per_filter,
    mean_pairwise,
    null_peaks,
    peak_correlation,
)

HERE = Path(__file__).parent
CONFIG = ExplainerConfig.preset("partlens")
VIEWS = CONFIG.views
CHOSEN = CONFIG.teachers
CATEGORIES = ("fox", "elephant", "giant_panda", "cat", "cattle", "zebra", "bird")
BACKGROUND = 300
SIDE = 14  # cells in which the spread would be told; no figure here depends on it


def signs_of(first: torch.Tensor, later: Source, windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is known of every candidate of the later layer without labels; lower is better."""
    error = torch.zeros(first.shape[1])
    for number in range(1, VIEWS):
        wanted = places_in_view(first, windows[:, number])
        inside = ((wanted > 0) & (wanted < 1)).all(-1).float()
        missed = ((later(number) - wanted).square().sum(-1) * inside).sum(0) / inside.sum(0).clamp(min=1)
        error += missed / (VIEWS - 1)
    return {"over variance": error / first.var(0).sum(-1).clamp(min=1e-8), "distance": error}


def answers(maps: torch.Tensor, later: LaterParts) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and strength of every candidate of the later layer."""
    codes = [part_codes(maps.float(), parts) for parts in later.dictionaries]
    return torch.cat([centroids(c) for c in codes], 1), torch.cat([c.flatten(2).amax(-1) for c in codes], 1)


class Scored:
    """Consistency and instability of candidates on held-out photos."""

    def __init__(
        self, places: torch.Tensor, strength: torch.Tensor, landmarks: torch.Tensor, photos: Any, size: Any
    ) -> None:
        xy = places.flip(-1).double() * torch.tensor([size[1], size[0]])
        self.peaks = Peaks(places.double() * SIDE - 0.5, xy, strength.double(), (SIDE, SIDE))
        self.consistency = consistency_per_filter(self.peaks, landmarks, photos)[0]
        self.instability = instability_per_filter(self.peaks, landmarks, size)

    def of(self, best: torch.Tensor) -> dict[str, float]:
        live = torch.ones(len(best), dtype=torch.bool)
        return {
            "consistency": round(float(self.consistency[best].mean()), 3),
            "instability": round(float(self.instability[best].mean()), 4),
            "correlation": round(mean_pairwise(peak_correlation(self.peaks.filters(best), live)), 3),
        }


def rank_correlation(cost: torch.Tensor, consistency: torch.Tensor) -> float:
    return round(float(spearmanr(-cost, consistency).statistic), 3)


def centre_null(landmarks: torch.Tensor, size: tuple[int, int]) -> float:
    """Instability of filters that never leave the centre, each on photos of its own draw."""
    generator = torch.Generator().manual_seed(0)
    shape = ((SIDE, SIDE), (0.0, 0.0), (1.0, 1.0))
    peaks = null_peaks("centre", len(landmarks), *shape, input_size_px=size, filters=256, generator=generator)
    return round(float(instability_per_filter(peaks, landmarks, size).mean()), 4)


def measured(
    tap: str, layer: str, spec: str, data: Path, about: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    performer = load_performer(spec)
    images = ImageSet.open(data)
    size = performer.preprocessing.size_px
    about |= {"model": performer.name, "weights_sha256": performer.weights_sha256}
    background = images.indices(category="background", split="train")[:BACKGROUND]
    others = {name: maps_at(performer, images, background, name) for name in (tap, layer)}
    for category in [c for c in CATEGORIES if c in images.categories]:
        train, held = (images.indices(category=category, split=s) for s in ("train", "test"))
        windows = view_windows(len(train), VIEWS, 0.55, torch.Generator().manual_seed(0))
        rows = np.repeat(np.array(train), VIEWS).astype(np.int64)
        drawn, viewing = viewed_images(images, performer, rows, windows.flatten(0, 1))
        views, shown = {}, {}
        for name in (tap, layer):
            seen = maps_at(viewing, drawn, tuple(range(len(rows))), name)
            views[name] = seen.reshape(len(train), VIEWS, *seen.shape[1:]).transpose(0, 1)
            shown[name] = maps_at(performer, images, held, name)
        later = LaterParts(
            lambda some, number, maps=views[layer]: maps[number][some], len(train), torch.Generator().manual_seed(0)
        )
        some = torch.arange(min(len(train), MOST_PHOTOS))
        voted = voted_parts(
            views[tap][:_SEED_VIEWS, some],
            windows[some, :_SEED_VIEWS].transpose(0, 1),
            others[tap],
            torch.Generator().manual_seed(0),
            voters=_VOTERS,
            parts=_VOTERS,
            candidates=CONFIG.candidates_per_filter * _VOTERS,
            votes=CONFIG.votes,
        )

        @functools.cache
        def voted_places(number: int, maps: torch.Tensor = views[tap], parts: VotedParts = voted) -> torch.Tensor:
            return torch.cat([centroids(parts.maps(batch), _VOTED_POWER) for batch in maps[number].split(256)])

        landmarks = landmarks_in_input(images, held, performer)[1]
        photos = photo_numbers(images, held)
        own = Scored(*answers(shown[layer], later), landmarks, photos, size)
        held_votes = voted.maps(shown[tap])
        later_places = functools.cache(later)  # asked for the signs and for two pools
        pools = {
            "later": [(later_places, own)],
            "tap": [
                (
                    voted_places,
                    Scored(
                        centroids(held_votes, _VOTED_POWER), held_votes.flatten(2).amax(-1), landmarks, photos, size
                    ),
                )
            ],
        }
        pools["both"] = pools["later"] + pools["tap"]
        first, strength = answers(views[layer][0], later)
        signs = signs_of(first, later_places, windows)
        signs["area"] = -_areas(strength, answers(others[layer], later)[1])
        entry: dict[str, Any] = {
            "candidates": len(own.consistency),
            "held_out_photos": len(held),
            "signs": {
                name: {"rank_correlation": rank_correlation(cost, own.consistency)} | own.of(cost.argsort()[:CHOSEN])
                for name, cost in (signs | {"landmarks": -own.consistency}).items()
            },
            "sources": {},
        }
        for name, pool in pools.items():
            chosen = torch.tensor(
                part_teachers([source for source, _ in pool], windows, CHOSEN, CONFIG.teacher_variety).chosen
            )
            joined = pool[0][1] if len(pool) == 1 else together(*(scored for _, scored in pool))
            entry["sources"][name] = joined.of(chosen) | {
                "mean": round(float(joined.consistency.mean()), 3),
                "from_tap": int((chosen >= len(own.consistency)).sum()) if name == "both" else None,
            }
        entry["centre_null"] = centre_null(landmarks, size)
        print(layer, category, json.dumps(entry), flush=True)
        yield category, entry


def together(first: Scored, second: Scored) -> Scored:
    joined = copy.copy(first)
    joined.peaks = Peaks(
        *(
            torch.cat([getattr(s.peaks, name) for s in (first, second)], 1)
            for name in ("cells", "positions_px", "scores")
        ),
        first.peaks.side_cells,
    )
    joined.consistency = torch.cat([first.consistency, second.consistency])
    joined.instability = torch.cat([first.instability, second.instability])
    return joined


def table() -> str:
    lines = [
        "| layer | category | over variance | distance | area under the curve | best by landmarks |",
        "|---|---|---|---|---|---|",
    ]
    sources = ["| layer | category | later | tap | both | of them from the tap |", "|---|---|---|---|---|---|"]

    def cell(found: dict[str, float]) -> str:
        return f"{found['rank_correlation']:.2f}; {found['consistency']:.2f}, {found['instability']:.3f}"

    for layer, content in json.loads((HERE / "part_teachers.json").read_text()).items():
        for category, entry in content["categories"].items():
            first = f"| {layer} | {category.replace('_', ' ')} | "
            signs = entry["signs"]
            cells = [cell(signs[name]) for name in ("over variance", "distance", "area")]
            best = signs["landmarks"]
            cells.append(f"{best['consistency']:.2f}, {best['instability']:.3f}")
            lines.append(first + " | ".join(cells) + " |")
            if "sources" in entry:
                found = [entry["sources"][name] for name in ("later", "tap", "both")]
                cells = [f"{s['consistency']:.2f}, {s['instability']:.3f}, {s['correlation']:.2f}" for s in found]
                sources.append(first + " | ".join([*cells, str(found[2]["from_tap"])]) + " |")
    return "\n".join([*lines, "", *sources]) + "\n"


def main() -> None:
    if sys.argv[1:] == ["--table"]:
        sys.stdout.write(table())
        return
    torch.set_num_threads(1)
    path = HERE / "part_teachers.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for given in sys.argv[2:]:
        layers, spec = given.split("=", 1)
        tap, layer = layers.split(",")
        entry = known.setdefault(f"{spec.partition('@')[0].partition(':')[2]} {layer}", {"categories": {}})
        for category, found in measured(tap, layer, spec, Path(sys.argv[1]), entry):
            entry["categories"][category] = found
            path.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
