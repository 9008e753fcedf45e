"""The papers' photos as partlens reads them, and what their layers up to the tap give, computed once.

    python papers/studies/reproduction.py photos ../shared/data runs/reproduction
    python papers/studies/reproduction.py maps ../shared/weights/vgg16_convs.safetensors runs/reproduction [CATEGORY …]
    python papers/studies/reproduction.py performers runs/reproduction papers/results/reproduction/performers.json
    python papers/studies/reproduction.py nulls runs/reproduction papers/results/reproduction/nulls.json
    python papers/studies/reproduction.py parts runs/reproduction papers/results/reproduction/parts.json [JOB …]
    python papers/studies/reproduction.py prices runs/reproduction papers/results/reproduction/prices.json
    python papers/studies/reproduction.py kept runs/reproduction papers/results/reproduction/kept.json ../shared/weights

``photos`` writes the tables ``voc`` (five categories of Pascal-Part with the papers' head, neck and torso) and ``cub``
(birds), each with the papers' thousand whole photos of anything else as background. ``maps`` shows every photo and its
mirror to VGG-16's convolutions (:mod:`partlens_papers.networks.remembered`); the jobs of ``reproduce`` in that folder
read them. ``nulls`` says how unstable peaks are at random, at the centre or on one part, with noise. ``parts`` finds
the parts of every performer's category without training, as :func:`partlens.inspect` does, and scores their places on
the held-out photos as filters are scored. ``prices`` collects what p and the part filters are worth in the explainers
that ``reproduce`` fitted, and which parts their filters hold, where ``partlens parts`` was run on them. ``kept`` says
how far the tap's maps that are kept are from those of a float32 pass.
"""

from __future__ import annotations

import csv
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.places import MeasuredPhotos, landmarks_in_input, mean_of, measure_maps, measure_nulls
from partlens.explainer.views import view_windows, viewed_images
from partlens.metrics.localisation import Peaks, instability_per_filter, peaks_from_cells
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import grid_of
from partlens.network.stream import stream
from partlens.network.zoo import load_performer
from partlens.object_parts.candidates import centroids
from partlens.object_parts.finding import PartFinder, find_parts, finding_layers, places_of_views
from partlens.object_parts.inspection import FindingConfig
from partlens.records import plain, write_json
from partlens_papers.data.convert import convert
from partlens_papers.networks.remembered import remembering
from partlens_papers.networks.settings import paper_setting
from partlens_papers.networks.train_performer import read_training

PAPER_PARTS = ("head", "neck", "torso")
CATEGORIES = ("cat", "cow", "dog", "horse", "sheep")
SIDE_PX, CELL_PX = 224, 16  # VGG-16's input and its cells at the tap
FILTERS = 32  # of a null
PHOTOS_COMPARED = 64
NOISE_CELLS = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
ROUNDS = 200
ADDED = ("share", "integrated_null")
KEPT = ("instability", "peak_spread_cells", "consistency", "filter_correlation", "distinct_parts")
MODELS = {"alexnet": "partlens_papers.performers:alexnet_caffe", "vgg16": "partlens_papers.performers:vgg16"}


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


@torch.no_grad()
def kept(folder: Path, out: Path, weights: Path) -> None:
    """Compare the kept maps of the tap with a float32 pass: relative error, and the share of live filters' peaks."""
    images, found = ImageSet.open(folder / "voc"), {}
    rows = np.random.default_rng(0).choice(len(images), PHOTOS_COMPARED, replace=False)
    for network, file in (("alexnet", "alexnet_caffe_convs"), ("vgg16", "vgg16_convs")):
        plain_one = load_performer(f"{MODELS[network]}@{weights / file}.safetensors")
        setting = paper_setting(plain_one)
        assert setting is not None
        with tempfile.TemporaryDirectory() as new:  # not what an earlier version kept
            remembered = remembering(plain_one, Path(new))
            maps = [
                torch.cat([b.maps[setting.tap] for b in stream(of, images, rows.tolist(), [setting.tap], batch_size=8)])
                for of in (plain_one, remembered)
            ]
        true, own = (found_maps.float().flatten(2) for found_maps in maps)
        live = true.amax(2) > 0
        error = (own - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
        peaks = ((true.argmax(2) == own.argmax(2)) & live).sum(1) / live.sum(1)
        draw = torch.Generator().manual_seed(0)
        scores = {"relative_error": error, "peaks_equal": peaks}
        found[network] = {
            name: bootstrap(lambda rows, v=values: float(v[rows].mean()), len(values), generator=draw, rounds=ROUNDS)
            for name, values in scores.items()
        }
        write_json(out, plain(found))


def performers(folder: Path, out: Path) -> None:
    """Collect the held-out errors of the performers that ``reproduce`` trained."""
    found = {}
    for path in sorted((folder / "performers").glob("*.safetensors")):
        header = read_training(path)
        kept = ("error", "baseline_error", "balanced_error", "decision_error", "baseline_decision_error")
        errors = {name: header["held_out"][name] for name in kept if name in header["held_out"]}
        photos = {name: header["data"][name] for name in ("train_photos", "held_photos")}
        found[path.stem] = {**errors, **photos, "config": header["config"]}
    write_json(out, found)


def prices(folder: Path, out: Path) -> None:
    """Collect curves of p, and filters by part, of finished explainers; what is collected already stays."""
    found = json.loads(out.read_text()) if out.is_file() else {}
    wanted = ("agreement_top1", "agreement_top1_background", "error_increase_points")
    for run in sorted(folder.glob("jobs/*/explainer/run")):
        if not (run / "curve.json").is_file():
            continue
        curve, points = json.loads((run / "curve.json").read_text()), []
        for point in curve["points"]:
            measured = {"mixed": point["reconstruction"], **point["parts_alone"]}
            kept = {name: {key: of[key] for key in wanted} for name, of in measured.items() if name != "nothing"}
            points.append({"eta": point["eta"], "p": point["p"], **kept})
        name = run.parents[1].name
        found[name] = {"photos": curve["photos"], "others": curve["others"], "points": points}
        if (run / "parts.json").is_file():
            said = json.loads((run / "parts.json").read_text())
            shares = {each["name"]: len(each["filters"]) for each in said["parts"]}
            adds = {each["name"]: {k: each[k] for k in ADDED} for each in said["contributions"]["parts"]}
            found[name]["parts"] = {"filters": shares, "adds": adds, "stability": said["stability"]}
    write_json(out, found)


def nulls(data: Path, out: Path) -> None:
    """Score peaks that see nothing, follow one part, or stay at the centre, with noise of some cells; all photos."""
    found: dict[str, dict[str, dict[str, Estimate]]] = {}
    for category in (*CATEGORIES, "bird"):
        images = ImageSet.open(data / ("cub" if category == "bird" else "voc"))
        performer = Performer(nn.Identity(), "", Preprocessing(resize="squash"), "")
        names, places = landmarks_in_input(images, images.indices(category), performer)
        middle = torch.full((len(places), 2), SIDE_PX / 2, dtype=torch.float64)
        corner = torch.full((len(places), 2), CELL_PX / 2, dtype=torch.float64)
        anywhere = SIDE_PX * torch.rand(len(places), FILTERS, 2, generator=torch.Generator().manual_seed(0)).double()
        spots = {name: places[:, k] for k, name in enumerate(names)}
        spots |= {"centre": middle, "middle of the landmarks": places.mean(1)}
        still = {"random cells": anywhere, "corner": corner[:, None]}
        found[category] = {name: {"0": _instability(place, places, 0.0)} for name, place in still.items()}
        for name, place in spots.items():
            found[category][name] = {f"{n:g}": _instability(place[:, None], places, n) for n in NOISE_CELLS}
    one = [1] * len(CATEGORIES)
    mean = {k: {n: mean_of([found[c][k][n] for c in CATEGORIES], one) for n in v} for k, v in found["cat"].items()}
    content = {"photos": "all of a category", "noise": "Gaussian, cells of 16 px, each axis", "voc mean": mean}
    write_json(out, plain({**content, **found}))


def _instability(place: Tensor, landmarks: Tensor, noise: float) -> Estimate:
    """Score filters that peak in the cell of a place, off by some noise, on the photos where the place is known.

    The place is (image, filter or 1, x and y) in pixels.
    """
    known = ~place.isnan().flatten(1).any(1)
    draw = torch.Generator().manual_seed(0)
    shape = (int(known.sum()), FILTERS, 2)
    spots = place[known] + CELL_PX * noise * torch.randn(shape, generator=draw, dtype=torch.float64)
    cells = (spots / CELL_PX).floor().clamp(0, SIDE_PX // CELL_PX - 1).flip(-1)
    middle = ((CELL_PX - 1) / 2, (CELL_PX - 1) / 2)
    scores = torch.rand(shape[:2], generator=draw, dtype=torch.float64)
    of, size, stride = landmarks[known], (SIDE_PX, SIDE_PX), (float(CELL_PX), float(CELL_PX))

    def instability(rows: Tensor) -> float:
        peaks = peaks_from_cells(cells[rows], scores[rows], (SIDE_PX // CELL_PX,) * 2, middle, stride)
        return float(instability_per_filter(peaks, of[rows], size).nanmean())

    return bootstrap(instability, len(of), generator=draw, rounds=ROUNDS)


def parts(folder: Path, out: Path, only: Sequence[str]) -> None:
    """Find parts on training photos, and score their places on the held-out ones; nulls on the same photos."""
    found = json.loads(out.read_text()) if out.is_file() else {}
    for path in sorted((folder / "performers").glob("*.safetensors")):
        network, _, category = path.stem.rpartition("-")
        if (only and path.stem not in only) or "+" in category:  # a performer of several categories
            continue
        performer = remembering(load_performer(f"{MODELS[network]}@{path}"), folder / "maps")
        images = ImageSet.open(folder / ("cub" if category == "bird" else "voc"))
        own, held = (images.rows_of((category,), split)[0] for split in ("train", "test"))
        generator = torch.Generator().manual_seed(0)
        windows = view_windows(len(own), 4, generator)  # those of the explainer of the same seed
        seen = _seen(performer, images, own, windows)
        parts = find_parts(seen, windows, FindingConfig(), generator)
        found[path.stem] = _scored(performer, images, category, held, parts.finder.only(range(parts.supported)))
        write_json(out, found)
        print(path.stem, found[path.stem]["parts"]["instability"], flush=True)


def _seen(performer: Performer, images: ImageSet, rows: Sequence[int], windows: Tensor) -> Callable[..., Tensor]:
    """Return what gives the finding layer's maps of some of the photos in a view."""
    layer, (photos, views) = finding_layers(performer)[0], windows.shape[:2]
    drawn, viewing = viewed_images(images, performer, np.repeat(np.asarray(rows), views), windows.flatten(0, 1))
    maps = [batch.maps[layer].half() for batch in stream(viewing, drawn, range(len(drawn)), [layer], batch_size=16)]
    kept = torch.cat(maps).unflatten(0, (photos, views))
    return lambda some, view: kept[some, view].float()


def _scored(
    performer: Performer, images: ImageSet, category: str, held: Sequence[int], finder: PartFinder
) -> dict[str, object]:
    """Score the places of parts as an evaluation scores filters.

    A place is the mean of a photo and its mirror. Beside stand the largest cells of the same parts, the finding layer's
    own filters read as the parts are, and the nulls.
    """
    layer, whole = finding_layers(performer)[0], view_windows(len(held), 2, torch.Generator())
    seen = _seen(performer, images, held, whole)
    maps = seen(torch.arange(len(held)), 0)
    codes = finder.codes(maps)
    side, grid = (int(codes.shape[2]), int(codes.shape[3])), grid_of(performer.field(layer))

    def peaks(located: Callable[[Tensor, Tensor | None], Tensor], values: Tensor) -> Peaks:
        places = places_of_views(located, whole, seen)  # type: ignore[arg-type]
        return peaks_from_cells(places * torch.tensor(side) - 0.5, values.amax((2, 3)), side, *grid)

    best, cell = codes.flatten(2).max(-1)
    largest = peaks_from_cells(torch.stack([cell // side[1], cell % side[1]], -1), best, side, *grid)
    on = MeasuredPhotos.of(images, held, performer, (category,), torch.zeros(len(held)).long(), seed=0)
    read = {"parts": peaks(finder, codes), "parts, largest cells": largest}
    read["filters, read alike"] = peaks(lambda given, _: centroids(given.clamp(min=0)), maps)
    belongs = {name: torch.zeros(of.scores.shape[1], dtype=torch.long) for name, of in read.items()}
    scores = {name: measure_maps(on, of, belongs[name]) for name, of in read.items()}
    scores |= measure_nulls(on, read["parts"], belongs["parts"], grid)[0]
    return {"count": codes.shape[1], **{name: {k: plain(dict(v))[k] for k in KEPT} for name, v in scores.items()}}


if __name__ == "__main__":
    verb, source, folder, *only = sys.argv[1:]
    given, made = Path(source).resolve(), Path(folder).resolve()
    if verb == "kept":
        kept(given, made, Path(only[0]))
    elif verb in ("maps", "parts"):
        {"maps": maps, "parts": parts}[verb](given, made, only)
    else:
        {"photos": photos, "nulls": nulls, "performers": performers, "prices": prices}[verb](given, made)
