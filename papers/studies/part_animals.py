"""Parts without training on five animals of VOC and on birds: landmarks, consistency, the share on the animal.

The parts are those of `partlens.inspect` with its defaults, found on up to 120 photos of the training split (birds: all
of it) and located on the test split; places are the mean of the photo and its mirror. K = 4 and 8 are the first parts
chosen, *supported* those that count. Beside them K plain factors, a constant place, a random cell a photo, and ridge
regression on the layer itself (ceiling).

    python papers/studies/part_animals.py VOC_PART CUB_200_2011 MAPS resnet18=FILE

Landmark regression, NMI and ARI (`partlens_papers.part_discovery`) use the keypoints of Animal-Pose and the fifteen
parts of CUB; consistency and instability (`partlens.metrics.localisation`) use head, neck and torso, the papers' parts,
and of birds forehead, back and tail.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from part_discovery import RIDGE_FEATURES, Maps, birds, located, maps_of
from PIL import Image
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.estimate import bootstrap
from partlens.metrics.localisation import Peaks, localisation_scores
from partlens.object_parts.candidates import LaterParts
from partlens.object_parts.finding import find_parts, places_of_views
from partlens.object_parts.inspection import FindingConfig
from partlens_papers.data.cub import PAPER_LANDMARKS
from partlens_papers.part_discovery import label_agreement, landmark_error

ANIMALS = ("cat", "cow", "dog", "horse", "sheep")
COUNTS, MOST, SIDE_PX = (4, 8), 120, 224
RESULT = Path(__file__).parents[1] / "results" / "part-animals.json"


@dataclass(frozen=True)
class Animal:
    """Photos of one category; places (row, col) as shares of the sides, NaN where unknown.

    ``keypoints`` are regressed on, ``papers`` are the landmarks of consistency and instability; ``masks`` of the test
    photos say which pixels are the animal.
    """

    name: str
    images: ImageSet
    train: Tensor
    keypoints: Tensor
    papers: Tensor
    masks: Tensor | None


def column(path: Path, name: str, keys: tuple[str, ...], only: tuple[str, ...] = ()) -> Tensor:
    """Read the centres of a table of landmarks, those inside the photo."""
    with path.open() as handle:
        rows = [row for row in csv.DictReader(handle) if not only or row[name] in only]
    names = sorted({row[name] for row in rows})
    at = {key: number for number, key in enumerate(keys)}
    places = torch.full((len(keys), len(names), 2), torch.nan)
    for row in rows:
        if row["image"] in at:
            place = torch.tensor([float(row["y"]), float(row["x"])]) / SIDE_PX
            if bool(((place >= 0) & (place <= 1)).all()):
                places[at[row["image"]], names.index(row[name])] = place
    return places


def animals(folder: Path, names: list[str]) -> Iterator[Animal]:
    images = ImageSet.open(folder)
    for name in names:
        rows = {
            split: [i for i in range(len(images)) if (images.categories[i], images.splits[i]) == (name, split)]
            for split in ("train", "test")
        }
        chosen = [*rows["train"][:MOST], *rows["test"]]
        own = images.take(chosen)
        train = torch.arange(len(own)) < len(rows["train"][:MOST])
        masks = []
        for row in (~train).nonzero()[:, 0].tolist():
            file = folder / "masks" / Path(own.keys[row]).relative_to("images").with_suffix(".png")
            with Image.open(file) if file.is_file() else Image.new("1", (SIDE_PX, SIDE_PX)) as mask:
                masks.append(torch.from_numpy(np.asarray(mask.convert("L")) > 0))
        keypoints = column(folder / "keypoints.csv", "keypoint", own.keys)
        papers = column(folder / "paper_parts.csv", "part", own.keys, ("head", "neck", "torso"))
        yield Animal(name, own, train, keypoints, papers, torch.stack(masks))


def all_birds(folder: Path) -> Animal:
    given = birds(folder)
    papers = given.landmarks[:, [given.names.index(name) for name in PAPER_LANDMARKS]]
    return Animal("bird", given.images, given.train, given.landmarks, papers, None)


def places(given: Animal, maps: Maps, seed: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each kind of parts, their places in all photos, and how strong they are there."""
    own = given.train.nonzero()[:, 0]
    values, windows = maps.values, maps.windows
    everyone = torch.arange(len(windows))
    later, finer = maps.later_of(everyone), maps.finer_of(everyone)
    generator = torch.Generator().manual_seed(seed)
    found = find_parts(maps.later_of(own), windows[own], FindingConfig(), generator, maps.precision, maps.finer_of(own))
    for kind, finder in {"first": found.finder, "supported": found.finder.only(range(found.supported))}.items():
        where = places_of_views(finder, windows, later, finer)
        strength = torch.cat([finder.codes(later(some, 0)).amax((2, 3)) for some in everyone.split(100)])
        for count in COUNTS if kind == "first" else [where.shape[1]]:
            yield f"first {count}" if kind == "first" else kind, where[:, :count], strength[:, :count]
    for count in COUNTS:
        source = LaterParts(maps.later_of(own), len(own), generator, (count,), maps.precision)
        plain = located(later, source.dictionaries[:1], len(values), 0)
        yield f"{count} plain factors", plain, torch.ones(plain.shape[:2])
    side = values.shape[-1]
    cells = torch.randint(side, (len(values), 8, 2), generator=generator)
    yield "random cell", (cells + 0.5) / side, torch.rand(len(values), 8, generator=generator)
    still = torch.full((len(values), 1, 2), 0.5)
    yield "centre", still, torch.rand(len(values), 1, generator=generator)


def figures(given: Animal, where: Tensor, strength: Tensor, side: int, fixed: bool) -> dict[str, Any]:
    test = ~given.train
    generator = torch.Generator().manual_seed(0)
    error = landmark_error(where.flatten(1), given.keypoints, given.train, generator)
    peaks = Peaks(
        where[test].double() * side - 0.5,
        where[test].flip(-1).double() * SIDE_PX,
        strength[test].double(),
        (side, side),
    )
    scores = localisation_scores(
        peaks,
        given.papers[test].flip(-1).double() * SIDE_PX,
        (SIDE_PX, SIDE_PX),
        landmark_names=tuple(map(str, range(given.papers.shape[1]))),
        generator=generator,
        fixed_null=fixed,
    )
    found: dict[str, Any] = {"parts": where.shape[1], "error": error.to_dict()}
    found |= label_agreement(where[test], given.keypoints[test])
    found |= {
        name: getattr(scores, name).to_dict()
        for name in ("consistency", "filter_correlation", "instability_all", "distinct_parts")
    }
    return found | on_mask(given, where[test])


def on_mask(given: Animal, where: Tensor) -> dict[str, Any]:
    """Return the share of places on a pixel of the animal, of photos that have a mask."""
    if given.masks is None or not len(where):
        return {}
    known = given.masks.flatten(1).any(1)
    at = (where[known] * SIDE_PX).long().clamp(0, SIDE_PX - 1)
    on = given.masks[known][torch.arange(int(known.sum()))[:, None], at[..., 0], at[..., 1]].double().mean(1)
    draws = torch.Generator().manual_seed(0)
    return {"on_mask": bootstrap(lambda rows: float(on[rows].mean()), len(on), generator=draws, rounds=1000).to_dict()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("voc", type=Path)
    parser.add_argument("cub", type=Path)
    parser.add_argument("maps", type=Path)
    parser.add_argument("networks", nargs="+", help="NAME=FILE")
    parser.add_argument("--categories", nargs="*", default=list(ANIMALS))
    parser.add_argument("--no-birds", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    for network, _, weights in (text.partition("=") for text in args.networks):
        birds_too = [] if args.no_birds else [all_birds(args.cub)]
        for given in (*animals(args.voc, args.categories), *birds_too):
            place = args.maps / f"{'cub' if given.name == 'bird' else given.name}-{network}-{SIDE_PX}"
            maps = maps_of(given.images, network, weights, SIDE_PX, place)
            rows = result.setdefault(network, {})[given.name] = {}
            for kind, where, strength in places(given, maps, 0):
                rows[kind] = figures(given, where, strength, maps.values.shape[-1], kind == "centre")
            values = torch.from_numpy(np.array(maps.values[:, 0])).float().flatten(1)
            draws = torch.Generator().manual_seed(0)
            ceiling = landmark_error(values, given.keypoints, given.train, draws, ridge=RIDGE_FEATURES)
            rows["ceiling: features"] = {"parts": maps.values.shape[2], "error": ceiling.to_dict()}
            args.out.write_text(json.dumps(result, indent=1) + "\n")
            print(
                network, given.name, {kind: round(row["error"]["value"], 1) for kind, row in rows.items()}, flush=True
            )


if __name__ == "__main__":
    main()
