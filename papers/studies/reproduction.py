"""The papers' photos as partlens reads them, and what their layers up to the tap give, computed once.

    python papers/studies/reproduction.py photos ../shared/data runs/reproduction
    python papers/studies/reproduction.py maps ../shared/weights/vgg16_convs.safetensors runs/reproduction [CATEGORY …]

``photos`` writes the tables ``voc`` (five categories of Pascal-Part with the papers' head, neck and torso) and ``cub``
(birds), each with the papers' thousand whole photos of anything else as background. ``maps`` shows every photo and its
mirror to VGG-16's convolutions (:mod:`partlens_papers.networks.remembered`); the jobs of ``reproduce`` in that folder
read them.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from partlens.data.images import ImageSet
from partlens.explainer.views import viewed_images
from partlens.network.stream import stream
from partlens.network.zoo import load_performer
from partlens_papers.data.convert import convert
from partlens_papers.networks.remembered import remembering

PAPER_PARTS = ("head", "neck", "torso")
CATEGORIES = ("cat", "cow", "dog", "horse", "sheep")


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


if __name__ == "__main__":
    verb, source, folder, *only = sys.argv[1:]
    if verb == "photos":
        photos(Path(source).resolve(), Path(folder).resolve())
    else:
        maps(Path(source).resolve(), Path(folder).resolve(), only)
