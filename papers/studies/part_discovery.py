"""Parts found without training, against landmarks that people marked: what each step of the recipe gains.

Boxes of CUB-200-2011 are cut out and stretched to the input, all species are one category. Parts are found on the
training split without labels, and located on the test split by the same directions. The figures are those of
`partlens_papers.part_discovery`: landmark regression (percent of the box's sides, lower is better), and agreement of
the nearest parts with the landmarks' names. Each recipe changes what its name says:

    plain factors   K non-negative factors of all photos, places in the whole photo
    teachers        factors of 3 to 16 parts at a time, chosen by movement (`partlens.object_parts.candidates`)
    fewer at a time candidates are 2 to 8 factors at a time, not 3 to 16
    filters alike   each filter is divided by its standard deviation
    and mirror      places are the mean of the photo and its mirror
    more variety    parts pay 0.7, not 0.5, for moving alike
    sharpened       places are sharpened on a finer layer, where there is one: `partlens.object_parts.finding`, as it is
    as many as supported  of the eight parts so found, those that add more than they repeat and more than they err

Ceilings use the landmarks of the training split: the best four of the last recipe's candidates, ridge regression on all
of these, and on the layer's features themselves.

    uv run python papers/studies/part_discovery.py CUB_200_2011 MAPS resnet18=FILE resnet50=FILE

MAPS is a folder for the layer's maps (some 700 MB for ResNet-50), which are made once.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.explainer.teachers import places_in_photo
from partlens.explainer.views import view_windows, viewed_images
from partlens.network.precision import chosen_precision
from partlens.network.stream import stream
from partlens.network.zoo import load_performer
from partlens.object_parts.candidates import LaterParts, centroids, chosen_parts, followed, part_codes
from partlens.object_parts.finding import PartFinder, finding_layers, places_of_views, supported
from partlens.object_parts.inspection import FindingConfig, InspectConfig
from partlens.object_parts.reading import View
from partlens.run import PassPrecision, Precision
from partlens_papers.data.cub import read
from partlens_papers.data.listing import Choice
from partlens_papers.part_discovery import label_agreement, landmark_error, landmark_errors

COUNTS, VIEWS = (4, 8, 16), InspectConfig().views
LAYERS = {"vgg16": "features.29"}
"""The last maps of a network; ``layer4`` of others."""
TEACHER_SIZES, FEWER = (3, 4, 5, 6, 8, 10, 12, 16), (2, 3, 4, 5, 6, 7, 8)
RIDGE_PLACES, RIDGE_FEATURES = 0.3, 0.1
"""The penalties are the best of 0.1, 0.3, 1 and 10 on folds of the training split of ResNet-18."""


RESULT = Path(__file__).parents[1] / "results" / "part-discovery.json"


@dataclass(frozen=True)
class Birds:
    """Boxes of the birds, their landmarks (row, col) as shares of the box, and which are of the training split."""

    images: ImageSet
    names: tuple[str, ...]
    landmarks: Tensor
    train: Tensor


def birds(folder: Path) -> Birds:
    listing = read(folder, Choice())
    boxes = listing.boxes_px

    def cut(row: int) -> np.ndarray:
        with Image.open(listing.files[row]) as photo:
            return np.asarray(photo.convert("RGB").crop(tuple(boxes[row].round().astype(int))))

    truth = listing.truth(listing.keys)
    shares = (truth.positions_px - boxes[:, None, :2]) / (boxes[:, None, 2:] - boxes[:, None, :2])
    images = ImageSet.from_generator(cut, listing.keys, recipe=str(folder))
    train = torch.tensor([side == "train" for side in listing.splits])
    return Birds(images, truth.landmarks, torch.from_numpy(shares[..., ::-1].copy()).float(), train)


@dataclass(frozen=True)
class Maps:
    """A layer's maps (photo, view, filter, row, col), how views were cut, and in which precision factors are found.

    ``finer`` are those of the layer on which places are sharpened, likewise, of the whole photo and its mirror.
    """

    values: np.ndarray
    windows: Tensor
    precision: Precision
    finer: np.ndarray | None

    def later_of(self, photos: Tensor) -> View:
        """Return what gives the maps of some of these photos in a view."""
        return lambda some, view: torch.from_numpy(np.array(self.values[photos[some].numpy(), view])).float()

    def finer_of(self, photos: Tensor) -> View | None:
        """Return the same of the finer layer, where there is one."""
        finer = self.finer
        if finer is None:
            return None
        return lambda some, view: torch.from_numpy(np.array(finer[photos[some].numpy(), view])).float()


def maps_of(images: ImageSet, network: str, weights: str, side: int, place: Path, wanted: Precision = "auto") -> Maps:
    """Return the layer's maps, made once."""
    place.mkdir(parents=True, exist_ok=True)
    photos, layer = len(images), LAYERS.get(network, "layer4")
    if not (place / "done").exists():
        source = "partlens_papers.performers" if network == "vgg16" else "torchvision"
        performer = load_performer(f"{source}:{network}@{weights}")
        sized = performer.preprocessing.changed({"size_px": (side, side), "resize": "squash", "resize_px": None})
        windows = view_windows(photos, VIEWS, torch.Generator().manual_seed(0))
        np.save(place / "windows.npy", windows.numpy())
        drawn, viewing = viewed_images(
            images,
            replace(performer, preprocessing=sized),
            np.repeat(np.arange(photos), VIEWS),
            windows.flatten(0, 1),
        )
        precision = chosen_precision(viewing, drawn, range(len(drawn)), [layer], wanted=wanted)
        print(place.name, precision, flush=True)
        viewing = viewing.computing(precision.used)
        finer = finding_layers(performer)[1:] if layer == "layer4" else ()
        kept: dict[str, np.ndarray] = {}
        for batch in stream(viewing, drawn, range(len(drawn)), [layer, *finer], batch_size=8):
            for name, file, views in ((layer, "maps.npy", VIEWS), *((each, "finer.npy", 2) for each in finer)):
                values = batch.maps[name].clamp(min=0).half().numpy()
                if name not in kept:
                    shape = (photos, views, *values.shape[1:])
                    kept[name] = np.lib.format.open_memmap(place / file, mode="w+", dtype=np.float16, shape=shape)
                for row, value in zip(batch.rows, values, strict=True):
                    if row % VIEWS < views:
                        kept[name][row // VIEWS, row % VIEWS] = value
        (place / "done").write_text(precision.model_dump_json())
    made = PassPrecision.model_validate_json((place / "done").read_text())
    windows = torch.from_numpy(np.load(place / "windows.npy"))
    sharp = np.load(place / "finer.npy", mmap_mode="r") if layer == "layer4" else None
    return Maps(np.load(place / "maps.npy", mmap_mode="r"), windows, made.used, sharp)


@dataclass(frozen=True)
class Candidates:
    """Where candidates are in all photos in all views, and how they move on the training split."""

    seen: Tensor  # view photo part 2
    movement: Tensor
    mirrored: Tensor
    finder: PartFinder  # of all

    @property
    def whole(self) -> Tensor:
        return self.seen[0]


def read_maps(maps: np.ndarray, scale: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda photos, view: torch.from_numpy(np.array(maps[photos.numpy(), view])).float() / scale[:, None, None]


def candidates(maps: Maps, train: Tensor, scale: Tensor, sizes: Any, seed: int) -> Candidates:
    """Find candidates on the training split and locate them everywhere."""
    own, read_view = train.nonzero()[:, 0], read_maps(maps.values, scale)
    generator = torch.Generator().manual_seed(seed)
    source = LaterParts(lambda some, view: read_view(own[some], view), len(own), generator, sizes, maps.precision)
    seen = torch.stack([located(read_view, source.dictionaries, len(train), view) for view in range(VIEWS)])
    movement = followed(lambda view: seen[view][own], maps.windows[own])[2]
    mirrored = (seen[0] + places_in_photo(seen[1], maps.windows[:, 1])) / 2
    numbered = [(n, row) for n, directions in enumerate(source.dictionaries) for row in range(len(directions))]
    return Candidates(seen, movement, mirrored, PartFinder(scale, tuple(source.dictionaries), tuple(numbered)))


def located(read_view: Callable[[Tensor, int], Tensor], dictionaries: list[Tensor], photos: int, view: int) -> Tensor:
    found = []
    for some in torch.arange(photos).split(100):
        values = read_view(some, view).contiguous(memory_format=torch.channels_last)
        found.append(torch.cat([centroids(part_codes(values, parts)) for parts in dictionaries], 1))
    return torch.cat(found)


def chosen_for(landmarks: Tensor, places: Tensor, train: Tensor, count: int) -> list[int]:
    """Choose, one by one, the candidates by which the training split's landmarks are best foretold there."""
    rows = torch.cat([train.nonzero()[:, 0], train.nonzero()[:, 0]])
    twice = torch.arange(len(rows)) < len(rows) // 2  # fitted and judged on the same photos
    taken: list[int] = []
    for _ in range(count):
        scores = [
            float(landmark_errors(places[rows][:, [*taken, new]].flatten(1), landmarks[rows], twice).nanmean())
            for new in range(places.shape[1])
        ]
        taken.append(int(np.argmin(scores)))
    return taken


def measured(given: Birds, places: Tensor, ridge: float = 0.0, *, labels: bool = True) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    error = landmark_error(places.flatten(1), given.landmarks, given.train, generator, ridge=ridge)
    found: dict[str, Any] = {"error": error.to_dict()}
    if labels:
        found |= label_agreement(places[~given.train], given.landmarks[~given.train])
    return found


def recipes(given: Birds, maps: Maps, seed: int, steps: bool) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield recipe, number of parts and figures."""
    train, filters = given.train, maps.values.shape[2]
    ones = torch.ones(filters)
    spread = torch.from_numpy(np.array(maps.values[train.numpy(), 0])).float().std((0, 2, 3))
    scale = torch.where(spread > 0, spread, 1.0)
    for count in COUNTS:
        plain = candidates(maps, train, ones, (count,), seed)
        yield "plain factors", count, measured(given, plain.whole[:, :count])

    def taught(found: Candidates, count: int, variety: float) -> list[int]:
        own = train.nonzero()[:, 0]
        return list(chosen_parts(lambda view: found.seen[view][own], maps.windows[own], count, variety).chosen)

    variety = FindingConfig().variety
    alike = candidates(maps, train, scale, FEWER, seed)
    for count in COUNTS:
        yield "filters alike", count, measured(given, alike.whole[:, taught(alike, count, 0.5)])
        yield "and mirror", count, measured(given, alike.mirrored[:, taught(alike, count, 0.5)])
        yield "more variety", count, measured(given, alike.mirrored[:, taught(alike, count, variety)])
    most = taught(alike, max(COUNTS), variety)
    where = alike.mirrored[:, most]
    own, everyone = train.nonzero()[:, 0], torch.arange(len(train))
    if (finer := maps.finer_of(own)) is not None:
        finder = alike.finder.only(most).sharpened(alike.whole[own][:, most], finer)
        where = places_of_views(finder, maps.windows, maps.later_of(everyone), maps.finer_of(everyone))
        for count in COUNTS:
            yield "sharpened", count, measured(given, where[:, :count])
    eight = most[: FindingConfig().parts_max]
    few = supported(alike.whole[train][:, eight], alike.movement[eight])
    yield "as many as supported", len(few), measured(given, where[:, few])
    best = chosen_for(given.landmarks, alike.mirrored, train, 4)
    yield "ceiling: best four candidates", 4, measured(given, alike.mirrored[:, best])
    yield (
        "ceiling: all candidates",
        alike.mirrored.shape[1],
        measured(given, alike.mirrored, RIDGE_PLACES, labels=False),
    )
    if not seed:
        features = torch.from_numpy(np.array(maps.values[:, 0])).float()
        yield "ceiling: features", filters, measured(given, features, RIDGE_FEATURES, labels=False)
        yield "constant", 1, measured(given, torch.full((len(train), 1, 2), 0.5))
    for name, sizes in {"teachers": TEACHER_SIZES, "fewer at a time": FEWER}.items() if steps else ():
        found = candidates(maps, train, ones, sizes, seed)
        for count in COUNTS:
            yield name, count, measured(given, found.whole[:, taught(found, count, 0.5)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("maps", type=Path)
    parser.add_argument("networks", nargs="+", help="NAME=FILE, or NAME:SIDE=FILE")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="auto", help="of the passes; auto: what partlens inspect would take")
    parser.add_argument("--steps", action="store_true", help="also the recipe before filters were alike")
    given_args = parser.parse_args()
    torch.set_num_threads(1)
    given = birds(given_args.folder)
    result = json.loads(given_args.out.read_text()) if given_args.out.exists() else {}
    for text in given_args.networks:
        name, _, weights = text.partition("=")
        network, _, side = name.partition(":")
        place = given_args.maps / f"cub-{network}-{side or 224}"
        maps = maps_of(given.images, network, weights, int(side or 224), place, given_args.precision)
        rows = result.setdefault(f"{network}, {side or 224} px", [])
        rows.clear()
        for seed in range(given_args.seeds):
            for recipe, count, figures in recipes(given, maps, seed, given_args.steps):
                rows.append({"recipe": recipe, "parts": count, "seed": seed, **figures})
                print(name, seed, recipe, count, figures, flush=True)
                given_args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
