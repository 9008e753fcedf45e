"""Our parts beside other ways to divide a layer, on the same photos and layer: what they carry, foretell and cost.

    our parts         those that `partlens inspect` accounts for: the ones the photos support, and the ones of the
                      eight found that carry most, at which the windows stand; foretold is the Shapley value
    our eight         all eight that are found, as many units as the rivals have: the landmark error
    CRAFT             eight factors of crops, foretold is the total Sobol index (`partlens_papers.rivals.concepts`)
    TopK-SAE          the eight most active of 32 units; foretold as of CRAFT
    raw filters       the eight most active; foretold as of CRAFT
    Grad-CAM          of each photo, as its own cells; foretold is its sum in the windows of our parts

All find on the training split's photos and are measured on held-out ones. Places are the centroids of the units' codes.

    python papers/studies/part_rivals.py ANIMAL_PART resnet18=FILE --categories fox cat giant_panda

Measured: kept score of windows at the units' places at four areas (`partlens.object_parts.regions`), and for CRAFT and
Grad-CAM also of the cells where their own map is largest; rank correlation over units of foretold and measured loss
when a unit is taken away, by its own means (a part's window at the tap; a concept from the layer) and by windows for
all; error of ridge regression from places to head and front legs; CPU time, as ratios to our parts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from partlens.attribution.grad_cam import layer_grad_cam
from partlens.data.images import ImageSet
from partlens.estimate import Estimate, bootstrap
from partlens.explainer.views import view_windows, viewed_images
from partlens.metrics.likeness import rank_correlation
from partlens.network.performer import Performer
from partlens.network.stream import stream
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer
from partlens.object_parts.account import ranking_photos
from partlens.object_parts.candidates import centroids
from partlens.object_parts.finding import PartFinder, find_parts, finding_layers
from partlens.object_parts.inspection import FindingConfig, InspectConfig
from partlens.object_parts.regions import (
    AREAS,
    TapMaps,
    Whole,
    carrying_order,
    cells_of,
    kept,
    kept_by_kind,
    nearest_cells,
    part_cells,
    shapley_shares,
    upper_of,
    whole_photos,
)
from partlens.object_parts.verdict import SAID_AREA
from partlens_papers.part_discovery import landmark_errors
from partlens_papers.rivals.concepts import crops, losses, scores_at, sobol_masks, total_sobol
from partlens_papers.rivals.factors import Nmf, fit_nmf
from partlens_papers.rivals.sparse import TopKSae, fit_topk_sae

UNITS, SAE_UNITS, VIEWS = 8, 32, InspectConfig().views
FOUND, HELD, FORETOLD = 80, 40, 20  # photos of a category
DRAWS, RIDGE = 2, 0.1
RESULT = Path(__file__).parents[1] / "results" / "part-rivals.json"

Divide = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the layer's maps to the codes (photo, unit, row, col) and maps (photo, unit, filter, row, col) of units."""


@dataclass
class Photos:
    """Photos of a category: network inputs, maps at tap and layer, landmarks (row, col) as shares of the sides."""

    images: ImageSet
    inputs: Tensor
    tap: TapMaps
    whole: Whole
    layer: Tensor
    finer: Tensor  # of the layer on which places are sharpened
    landmarks: Tensor


@dataclass
class Measured:
    """What was measured of one method on one category, by photo; CPU seconds by step."""

    kept: dict[str, Tensor] = field(default_factory=dict)  # kind: photo, area
    per_photo: dict[str, Tensor] = field(default_factory=dict)
    foretold: dict[str, Tensor] = field(default_factory=dict)  # unit, the mean over training photos
    lost: dict[str, Tensor] = field(default_factory=dict)  # photo, unit
    landmark: Tensor | None = None  # photo, landmark
    seconds: dict[str, float] = field(default_factory=dict)


class Clock:
    """Adds CPU seconds of steps to what was measured."""

    def __init__(self, into: dict[str, float], step: str) -> None:
        self.into, self.step = into, step

    def __enter__(self) -> None:
        self.start = time.process_time()

    def __exit__(self, *_: object) -> None:
        self.into[self.step] = self.into.get(self.step, 0.0) + time.process_time() - self.start


class Bench:
    """One category's photos and the network around its layers."""

    def __init__(self, performer: Performer, images: ImageSet, category: str) -> None:
        self.performer, (self.name, self.finer) = performer, finding_layers(performer)
        self.upper = upper_of(performer, self.name)
        self.passes = 0.0  # CPU seconds of a photo
        self.found = self._photos(images, category, "train", FOUND)
        self.held = self._photos(images, category, "test", HELD)
        self.few = torch.arange(FORETOLD) * len(self.found.inputs) // FORETOLD

    def _photos(self, images: ImageSet, category: str, split: str, most: int) -> Photos:
        """Take the annotated photos first."""
        rows = [i for i in range(len(images)) if (images.categories[i], images.splits[i]) == (category, split)]
        truth = images.part_truth
        assert truth is not None
        marked = {truth.keys[i]: not np.isnan(truth.positions_px[i]).all() for i in range(len(truth.keys))}
        rows = sorted(rows, key=lambda i: not marked[images.keys[i]])[:most]
        own = images.take(rows)
        preparing = self.performer.preprocessing
        inputs = torch.cat([preparing([own.read(i)]) for i in range(len(own))])
        start = time.process_time()
        tap, layer, finer = (torch.cat(maps) for maps in zip(*map(self.read, inputs.split(32)), strict=True))
        self.passes = (time.process_time() - start) / len(inputs)
        taps = TapMaps(upper_of(self.performer, self.performer.tap), tap, torch.zeros(tap.shape[1:]))
        known = own.part_truth
        assert known is not None
        sides = torch.tensor(known.image_size_px[:, ::-1].copy())
        landmarks = torch.from_numpy(known.positions_px[..., ::-1].copy()) / sides[:, None]
        return Photos(own, inputs, taps, whole_photos(taps), layer, finer, landmarks.float())

    def read(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        names = (self.performer.tap, self.name, self.finer)
        _, maps = forward_taps(self.performer, inputs, list(dict.fromkeys(names)))
        tap, layer, finer = (maps[name].float() for name in names)
        return tap, layer.clamp(min=0), finer


# --- methods ----------------------------------------------------------------------------------------------------------


def our_parts(bench: Bench) -> tuple[Measured, PartFinder, PartFinder]:
    """Find the parts; return the time, those that are accounted for and all that were found."""
    seconds: dict[str, float] = {}
    with Clock(seconds, "find"):
        images = bench.found.images
        windows = view_windows(len(images), VIEWS, torch.Generator().manual_seed(0))
        repeated = np.repeat(np.arange(len(images)), VIEWS)
        drawn, viewing = viewed_images(images, bench.performer, repeated, windows.flatten(0, 1))
        names = [bench.name, bench.finer]
        batches = [batch.maps for batch in stream(viewing, drawn, range(len(drawn)), names, batch_size=32)]
        later, finer = (torch.cat([m[name] for m in batches]).unflatten(0, (len(images), VIEWS)) for name in names)
        found = find_parts(
            lambda some, view: later[some, view],
            windows,
            FindingConfig(),
            torch.Generator().manual_seed(0),
            finer=lambda some, view: finer[some, view],
        )
    seen = ranking_photos(len(images))
    photos = bench.found
    carrying, counts = carrying_order(*taken(photos, seen), found.finder(photos.layer[seen], photos.finer[seen]))
    accounted = [part for rank, part in enumerate(carrying) if rank < max(counts) or part < found.supported]
    return Measured(seconds=seconds), found.finder.only(accounted), found.finder


def shared(bench: Bench, measured: Measured, finder: PartFinder) -> None:
    """Foretell by Shapley values of the parts' windows; measure what is lost without each."""
    for photos, some, held in ((bench.found, bench.few, False), (bench.held, torch.arange(FORETOLD), True)):
        taps, whole = taken(photos, some)
        with Clock(measured.seconds, "foretell"):
            cells = part_cells(finder(photos.layer[some], photos.finer[some]), taps.grid, SAID_AREA)
            shares = shapley_shares(taps, whole, cells, generator=torch.Generator().manual_seed(0))
        foretold = {"own": shares.players[:, :-1], "alone": shares.alone[:, :-1]}
        for how, values in foretold.items():
            measured.per_photo[how] = values
            if not held:
                measured.foretold[how] = values.nanmean(0)
        if held:
            measured.lost["own"] = measured.lost["windows"] = shares.loss[:, :-1]


def taken(photos: Photos, some: Tensor) -> tuple[TapMaps, Whole]:
    whole = photos.whole
    return photos.tap.take(some), Whole(whole.classes[some], whole.score[some], whole.nothing[some])


def craft(bench: Bench) -> tuple[Measured, Divide]:
    measured = Measured()
    with Clock(measured.seconds, "find"):
        means = [bench.read(crops(few))[1].mean((2, 3)) for few in bench.found.inputs.split(2)]
        rival = fit_nmf(torch.cat(means)[:, :, None, None], UNITS)
    return measured, lambda maps: _of_directions(rival, maps, torch.arange(UNITS))


def _of_directions(rival: Nmf | TopKSae, maps: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    codes = rival.maps(maps)[:, units]
    directions = rival.parts if isinstance(rival, Nmf) else rival.decoder
    return codes, codes[:, :, None] * directions[units][None, :, :, None, None]


def sparse(bench: Bench) -> tuple[Measured, Divide]:
    measured = Measured()
    with Clock(measured.seconds, "find"):
        rival = fit_topk_sae(bench.found.layer, SAE_UNITS)
        units = rival.maps(bench.found.layer).mean((0, 2, 3)).argsort(descending=True)[:UNITS]
    measured.seconds["find"] += bench.passes * len(bench.found.inputs)
    return measured, lambda maps: _of_directions(rival, maps, units)


def filters(bench: Bench) -> tuple[Measured, Divide]:
    measured = Measured()
    with Clock(measured.seconds, "find"):
        units = bench.found.layer.mean((0, 2, 3)).argsort(descending=True)[:UNITS]
    measured.seconds["find"] += bench.passes * len(bench.found.inputs)
    one = torch.nn.functional.one_hot(units, bench.found.layer.shape[1]).float()
    return measured, lambda maps: (maps[:, units], maps[:, units][:, :, None] * one[None, :, :, None, None])


def indices(bench: Bench, measured: Measured, divide: Divide, rest: bool) -> None:
    """Foretell by total Sobol indices, of the units' own sum or of all with what they leave; measure what is lost."""
    for photos, some, held in ((bench.found, bench.few, False), (bench.held, torch.arange(FORETOLD), True)):
        maps, classes = photos.layer[some], photos.whole.classes[some]
        with Clock(measured.seconds, "foretell"):
            _, parts = divide(maps)
            base = maps - parts.sum(1) if rest else torch.zeros_like(maps)
            values = total_sobol(scores_at(bench.upper, base, parts, sobol_masks(UNITS), classes))
        measured.per_photo["own"] = values
        if not held:
            measured.foretold["own"] = values.mean(0)
        else:
            measured.lost["own"] = losses(bench.upper, maps, parts, classes)


# --- measures ---------------------------------------------------------------------------------------------------------


def windows_of(bench: Bench, measured: Measured, places_of: Callable[[Photos], Tensor]) -> None:
    """Measure windows at the units' places, what is lost without each, and how far landmarks are foretold."""
    found, held = bench.found, bench.held
    places, there = places_of(found), places_of(held)
    seen = ranking_photos(len(places))
    order, counts = carrying_order(*taken(found, seen), places[seen])
    generator = torch.Generator().manual_seed(0)
    by_kind = kept_by_kind(held.tap, held.whole, there[:, list(order)], generator, counts=counts, draws=DRAWS)
    measured.kept.update({kind: one.score for kind, one in by_kind.items()})
    if "windows" not in measured.lost:
        some = torch.arange(FORETOLD)
        taps, whole = taken(held, some)
        cells = part_cells(there[some], taps.grid, SAID_AREA)[:, :-1]
        measured.lost["windows"] = 1 - kept(taps, whole, ~cells).score
    measured.landmark = landmarks_missed(bench, places_of)


def landmarks_missed(bench: Bench, places_of: Callable[[Photos], Tensor]) -> Tensor:
    """Return how far the held-out photos' landmarks are from where the units' places foretell them."""
    places = torch.cat([places_of(photos) for photos in (bench.found, bench.held)])
    train = torch.arange(len(places)) < len(bench.found.layer)
    marks = torch.cat([bench.found.landmarks, bench.held.landmarks])
    return landmark_errors(places.flatten(1), marks, train, ridge=RIDGE)


def cells_with_most(bench: Bench, heat: Tensor) -> dict[str, Tensor]:
    """Return what the cells of the largest values keep, and what those of other photos do."""
    taps = bench.held.tap
    fine = F.interpolate(heat[:, None], size=taps.grid, mode="bilinear", align_corners=False)[:, 0]
    masks = [nearest_cells(-each, cells_of(taps.grid, a)) for each in (fine, fine.roll(1, 0)) for a in AREAS]
    score = kept(taps, bench.held.whole, torch.stack(masks, 1)).score
    return {"parts": score[:, : len(AREAS)], "other_photos": score[:, len(AREAS) :]}


def cams(bench: Bench, photos: Photos) -> Tensor:
    """Return Grad-CAM of the layer, for the class that the network decides for, cell by cell."""
    wide = layer_grad_cam(bench.performer, photos.inputs, bench.name, photos.whole.classes)
    return F.adaptive_avg_pool2d(wide, photos.layer.shape[2:])


def grad_cam_in_windows(bench: Bench, finder: PartFinder, lost: Tensor) -> Measured:
    """Measure Grad-CAM's own cells, and its sum in the windows of our parts against what is lost without them."""
    measured = Measured()
    for photos, some, held in ((bench.found, bench.few, False), (bench.held, torch.arange(FORETOLD), True)):
        with Clock(measured.seconds, "foretell"):
            heat = cams(bench, photos)
        taps, _ = taken(photos, some)
        cells = part_cells(finder(photos.layer[some], photos.finer[some]), taps.grid, SAID_AREA)[:, :-1]
        fine = F.interpolate(heat[some, None], size=taps.grid, mode="bilinear", align_corners=False)
        values = (fine * cells).sum((2, 3)) / fine.sum((2, 3)).clamp(min=1e-12)
        measured.per_photo["own"] = values
        if not held:
            measured.foretold["own"] = values.mean(0)
        else:
            measured.kept.update(cells_with_most(bench, heat))
    measured.lost["own"] = measured.lost["windows"] = lost
    return measured


def measure(performer: Performer, images: ImageSet, category: str) -> dict[str, Measured]:
    bench = Bench(performer, images, category)
    result: dict[str, Measured] = {}
    measured, finder, eight = our_parts(bench)
    shared(bench, measured, finder)
    windows_of(bench, measured, lambda photos: finder(photos.layer, photos.finer))
    result["our parts"] = measured
    result["our eight"] = Measured(landmark=landmarks_missed(bench, lambda photos: eight(photos.layer, photos.finer)))
    for name, make in {"CRAFT": craft, "TopK-SAE": sparse, "raw filters": filters}.items():
        measured, divide = make(bench)
        indices(bench, measured, divide, rest=name != "CRAFT")
        windows_of(bench, measured, lambda photos, divide=divide: centroids(divide(photos.layer)[0]))
        result[name] = measured
        if name == "CRAFT":
            worth = measured.foretold["own"].float()
            heat = torch.einsum("u,purc->prc", worth, divide(bench.held.layer)[0])
            result["CRAFT, its own cells"] = Measured(kept=cells_with_most(bench, heat))
    result["Grad-CAM"] = grad_cam_in_windows(bench, finder, result["our parts"].lost["own"])
    still = torch.full((len(bench.found.layer) + len(bench.held.layer), 2), 0.5)
    train = torch.arange(len(still)) < len(bench.found.layer)
    marks = torch.cat([bench.found.landmarks, bench.held.landmarks])
    result["a constant"] = Measured(landmark=landmark_errors(still, marks, train))
    for name, measured in result.items():
        print(category, name, {k: round(v, 1) for k, v in measured.seconds.items()}, flush=True)
    return result


# --- numbers ----------------------------------------------------------------------------------------------------------


def over_categories(values: list[Any], count: Callable[[Any], int], statistic: Callable[[Any, Tensor], float]) -> Any:
    """Return the mean over categories of a statistic of photos, with an interval over the photos of each."""
    of = torch.repeat_interleave(torch.arange(len(values)), torch.tensor([count(each) for each in values]))
    first = [int((of < c).sum()) for c in range(len(values))]

    def mean(rows: Tensor) -> float:
        own = [rows[of[rows] == c] - first[c] for c in range(len(values))]
        return float(np.mean([statistic(value, some) for value, some in zip(values, own, strict=True)]))

    found: Estimate = bootstrap(mean, len(of), generator=torch.Generator().manual_seed(0), rounds=1000)
    return found.to_dict()


def agreement(foretold: Tensor, lost: Tensor) -> Tensor:
    return rank_correlation(foretold[:, None].float(), lost[:, None].float())


def numbers(several: list[Measured]) -> dict[str, Any]:
    """Return the figures of one method over categories."""
    row: dict[str, Any] = {}
    for kind in several[0].kept:
        curves = [each.kept[kind] for each in several]
        row.setdefault("kept", {})[kind] = over_categories(
            curves, len, lambda c, rows: float(c[rows].nanmedian(0).values.mean())
        ) | {"curve": [float(np.mean([float(c[:, a].nanmedian()) for c in curves])) for a in range(len(AREAS))]}
    for how, against in (("own", "own"), ("own", "windows"), ("alone", "own")):
        if how not in several[0].per_photo or against not in several[0].lost:
            continue
        pairs = [(each.per_photo[how], each.lost[against]) for each in several]
        row[f"{how} foretells {against}"] = {
            "photos": over_categories(
                [agreement(*pair) for pair in pairs], len, lambda c, rows: float(c[rows].nanmean())
            ),
            "of other photos": over_categories(
                [agreement(one.roll(1, 0), other) for one, other in pairs], len, lambda c, r: float(c[r].nanmean())
            ),
            "mean": over_categories(
                [(each.foretold[how], each.lost[against]) for each in several],
                lambda pair: len(pair[1]),
                lambda pair, rows: float(agreement(pair[0][None], pair[1][rows].nanmean(0)[None])),
            ),
            "units": [each.lost[against].shape[1] for each in several],
        }
    if several[0].landmark is not None:
        row["landmark error"] = over_categories(
            [each.landmark for each in several], len, lambda c, rows: float(c[rows].nanmean())
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("network", help="NAME=FILE")
    parser.add_argument("--categories", nargs="+", default=["fox", "cat", "giant_panda", "elephant"])
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    network, _, weights = given.network.partition("=")
    performer, images = load_performer(f"torchvision:{network}@{weights}"), ImageSet.open(given.photos)
    measured: dict[str, dict[str, Measured]] = {}
    for category in given.categories:
        measured[category] = measure(performer, images, category)
        result = {"network": network, "categories": list(measured), "areas": AREAS, "methods": rows_of(measured)}
        given.out.write_text(json.dumps(result, indent=1) + "\n")


def rows_of(measured: dict[str, dict[str, Measured]]) -> dict[str, Any]:
    """Return the figures of every method over the categories that are done."""
    rows = {}
    for name in next(iter(measured.values())):
        rows[name] = numbers([each[name] for each in measured.values()])
        for step in ("find", "foretell"):
            mine, ours = (
                sum(each[which].seconds.get(step, 0.0) for each in measured.values()) for which in (name, "our parts")
            )
            if mine:
                rows[name].setdefault("CPU time over ours", {})[step] = round(mine / ours, 3)
    return rows


if __name__ == "__main__":
    main()
