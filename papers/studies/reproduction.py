"""The papers' photos as partlens reads them, and what their layers up to the tap give, computed once.

    python papers/studies/reproduction.py photos ../shared/data runs/reproduction
    python papers/studies/reproduction.py maps ../shared/weights/vgg16_convs.safetensors runs/reproduction [CATEGORY …]
    python papers/studies/reproduction.py performers runs/reproduction papers/results/reproduction/performers.json
    python papers/studies/reproduction.py nulls runs/reproduction papers/results/reproduction/nulls.json

``photos`` writes the tables ``voc`` (five categories of Pascal-Part with the papers' head, neck and torso) and ``cub``
(birds), each with the papers' thousand whole photos of anything else as background. ``maps`` shows every photo and its
mirror to VGG-16's convolutions (:mod:`partlens_papers.networks.remembered`); the jobs of ``reproduce`` in that folder
read them. ``nulls`` says how unstable peaks are that follow one part or stay at the centre, with noise.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.evaluation.places import landmarks_in_input
from partlens.explainer.views import viewed_images
from partlens.metrics.localisation import instability_per_filter, peaks_from_cells
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream
from partlens.network.zoo import load_performer
from partlens.records import write_json
from partlens_papers.data.convert import convert
from partlens_papers.networks.remembered import remembering
from partlens_papers.networks.train_performer import read_training

PAPER_PARTS = ("head", "neck", "torso")
CATEGORIES = ("cat", "cow", "dog", "horse", "sheep")
SIDE_PX, CELL_PX = 224, 16  # VGG-16's input and its cells at the tap
NOISE_CELLS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 100.0)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows([header, *rows])


def photos(data: Path, out: Path) -> None:
    """Write the tables."""
    header = ("image", "file", "category", "split", "photo")
    voc, animals = data / "voc-part", data / "animal-part"

    def rows(folder: Path, kept: set[str]) -> list[tuple[str, ...]]:
        found = []
        for row in rows_of(folder / "images.csv"):
            if (category := row["category"]) in kept:
                file = os.path.relpath(folder / row["image"], out / "voc")
                found.append((row["image"].removeprefix("images/"), file, category, row["split"], row["photo"]))
        return found

    others = rows(animals, {"background"})
    write(out / "voc" / "images.csv", header, [*rows(voc, set(CATEGORIES)), *others])
    places = [
        (row["image"].removeprefix("images/"), row["part"], row["x"], row["y"], row["width"], row["height"], "1")
        for row in rows_of(voc / "paper_parts.csv")
        if row["part"] in PAPER_PARTS
    ]
    write(out / "voc" / "landmarks.csv", ("image", "landmark", "x", "y", "width", "height", "instances"), places)
    write(out / "background" / "images.csv", header, others)  # as deep in the folders, so its files are named alike
    cub = data / "CUB_200_2011"
    convert("cub", cub, out / "cub", landmarks="paper", category="bird", background=out / "background")


def maps(weights: Path, out: Path, categories: Sequence[str]) -> None:
    """Compute what is remembered of every photo and its mirror."""
    performer = remembering(load_performer(f"partlens_papers.performers:vgg16@{weights}"), out / "maps")
    for category in categories or (*CATEGORIES, "background", "bird"):
        images = ImageSet.open(out / ("cub" if category == "bird" else "voc"))
        for split, views in (("train", 2), ("test", 1)):  # held-out photos are not mirrored
            own = images.rows_of((category,), split)[0]
            whole = torch.tensor([[0.0, 0.0, 1.0, 1.0, float(mirrored)] for mirrored in range(views)])
            drawn, viewing = viewed_images(images, performer, np.repeat(own, views), whole.repeat(len(own), 1))
            for batch in stream(viewing, drawn, range(len(drawn)), ["features.30"], batch_size=16):
                if batch.rows[0] % 160 == 0:
                    print(category, split, batch.rows[-1] + 1, "of", len(drawn), flush=True)


def performers(folder: Path, out: Path) -> None:
    """Collect the held-out errors of the performers that ``reproduce`` trained."""
    found = {}
    for path in sorted((folder / "performers").glob("*.safetensors")):
        header = read_training(path)
        kept = ("error", "baseline_error", "balanced_error", "decision_error")
        errors = {name: header["held_out"][name] for name in kept if name in header["held_out"]}
        photos = {name: header["data"][name] for name in ("train_photos", "held_photos")}
        found[path.stem] = {**errors, **photos, "config": header["config"]}
    write_json(out, found)


def nulls(data: Path, out: Path) -> None:
    """Score peaks that see nothing, follow one part, or stay at the centre, with noise of some cells; all photos."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for category in (*CATEGORIES, "bird"):
        images = ImageSet.open(data / ("cub" if category == "bird" else "voc"))
        performer = Performer(nn.Identity(), "", Preprocessing(resize="squash"), "")
        names, places = landmarks_in_input(images, images.indices(category), performer)
        middle = torch.full((len(places), 2), SIDE_PX / 2, dtype=torch.float64)
        corner = torch.full((len(places), 2), CELL_PX / 2, dtype=torch.float64)
        spots = {name: places[:, k] for k, name in enumerate(names)}
        spots |= {"centre": middle, "middle of the landmarks": places.mean(1)}
        found[category] = {"corner": {"0": _instability(corner, places, 0.0)}}
        for name, place in spots.items():
            found[category][name] = {f"{noise:g}": _instability(place, places, noise) for noise in NOISE_CELLS}
    mean = {k: {n: round(fmean(found[c][k][n] for c in CATEGORIES), 4) for n in v} for k, v in found["cat"].items()}
    content = {"photos": "all of a category", "noise": "Gaussian, cells of 16 px, each axis", "voc mean": mean}
    write_json(out, {**content, **found})


def _instability(place: Tensor, landmarks: Tensor, noise: float, filters: int = 32) -> float:
    """Score filters that peak in the cell of a place, off by some noise, on the photos where the place is known."""
    known = ~place.isnan().any(-1)
    draw = torch.Generator().manual_seed(0)
    shape = (int(known.sum()), filters, 2)
    spots = place[known][:, None] + CELL_PX * noise * torch.randn(shape, generator=draw, dtype=torch.float64)
    cells = (spots / CELL_PX).floor().clamp(0, SIDE_PX // CELL_PX - 1).flip(-1)
    middle = ((CELL_PX - 1) / 2, (CELL_PX - 1) / 2)
    scores = torch.rand(shape[:2], generator=draw, dtype=torch.float64)
    peaks = peaks_from_cells(cells, scores, (SIDE_PX // CELL_PX,) * 2, middle, (CELL_PX, CELL_PX))
    return round(float(instability_per_filter(peaks, landmarks[known], (SIDE_PX, SIDE_PX)).nanmean()), 4)


if __name__ == "__main__":
    verb, source, folder, *only = sys.argv[1:]
    given, made = Path(source).resolve(), Path(folder).resolve()
    if verb == "maps":
        maps(given, made, only)
    else:
        {"photos": photos, "nulls": nulls, "performers": performers}[verb](given, made)
