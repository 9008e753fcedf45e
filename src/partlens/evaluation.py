"""Measure a finished run on photos it has not seen: one streaming pass, every score beside its nulls."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.explainer.assembly import performer_head
from partlens.explainer.network import Explainer
from partlens.metrics.estimate import Estimate, bootstrap
from partlens.metrics.faithfulness import ReconstructionSums, agreement_top1, category_error_increase
from partlens.metrics.localisation import (
    LocalisationScores,
    Peaks,
    consistency_per_filter,
    dead_filters,
    instability_per_filter,
    localisation_scores,
    null_peaks,
    peaks_from_cells,
    spread_per_filter,
)
from partlens.performer.receptive_field import ReceptiveField, cell_centre_px, receptive_field
from partlens.performer.taps import forward_taps, list_layers
from partlens.performer.zoo import Performer

SCHEMA = "partlens.evaluation/1"
BATCH = 32
NULL_FILTERS = 256
ROUNDS = 100


@dataclass
class _Layer:
    """Peaks of one layer, collected batch by batch."""

    cells: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    side: tuple[int, int] = (0, 0)

    def add(self, maps: Float[Tensor, "image filter row col"]) -> None:
        score, index = maps.flatten(2).max(-1)
        self.cells.append(torch.stack([index // maps.shape[3], index % maps.shape[3]], -1))
        self.scores.append(score.double())
        self.side = (int(maps.shape[2]), int(maps.shape[3]))

    def peaks(self, receptive: ReceptiveField) -> Peaks:
        start, stride = grid_of(receptive)
        return peaks_from_cells(torch.cat(self.cells), torch.cat(self.scores), self.side, start, stride)


@dataclass(frozen=True)
class FedBack:
    """Outputs and features of photos, the performer's own and from the reconstruction.

    Attributes:
        outputs: the performer's outputs (image, class).
        fed_outputs: its outputs when the reconstruction is fed back.
        features: the last target, averaged over cells (image, filter).
        fed_features: the same of the reconstruction.
    """

    outputs: Tensor
    fed_outputs: Tensor
    features: Tensor
    fed_features: Tensor


def grid_of(receptive: ReceptiveField) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return centre (row, col) of cell (0, 0) and the stride, in input pixels."""
    x, y = cell_centre_px(receptive, [0, 0]).tolist()
    return (y, x), (float(receptive.stride_px[0]), float(receptive.stride_px[1]))


def top_layer(performer: Performer) -> str:
    """Return the performer's last layer with maps larger than 1x1 and a local receptive field.

    Location instability of the papers' performers is that of the top convolution; for a residual network it is the
    output of the last block.
    """
    spatial = [layer for layer in list_layers(performer) if min(layer.shape[1:]) > 1]
    blocks = [layer.name for layer in spatial if "pool" not in layer.kind.lower()]
    return blocks[-1] if blocks else spatial[-1].name


def _vector(features: Tensor) -> Tensor:
    return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


@dataclass
class _Pass:
    """One streaming pass of some photos through performer and explainer."""

    performer: Performer
    explainer: Explainer
    head: nn.Module
    layers: dict[str, _Layer]
    sums: dict[str, ReconstructionSums]
    per_photo: dict[str, list[Tensor]]
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def take(self, batch: Tensor, *, localise: bool) -> None:
        """Process a preprocessed batch."""
        structure = self.explainer.structure
        names = list(dict.fromkeys([structure.tap, *structure.targets, *self.layers]))
        names = [n for n in names if n != "explainer"]
        _, taps = forward_taps(self.performer, batch, names)
        maps = {name: value.cpu() for name, value in taps.items()}
        output = self.explainer(maps[structure.tap])
        last = structure.targets[-1]
        own, fed = maps[last], output.reconstructions[-1]
        if localise:
            for name, layer in self.layers.items():
                layer.add(output.interp2 if name == "explainer" else maps[name])
            for name, value in zip(structure.targets, output.reconstructions, strict=True):
                self.sums[name].add(value, maps[name])
                self.per_photo[name].append((value - maps[name]).double().square().flatten(1).sum(1))
        for name, value in (
            ("outputs", self.head(own)[0]),
            ("fed_outputs", self.head(fed)[0]),
            ("features", _vector(own)),
            ("fed_features", _vector(fed)),
        ):
            self.kept.setdefault(name, []).append(value)

    def fed_back(self) -> FedBack:
        """Return what was kept, and forget it."""
        result = FedBack(**{name: torch.cat(values) for name, values in self.kept.items()})
        self.kept = {}
        return result


def _stream(
    stage: _Pass, images: ImageSet, rows: Sequence[int], advance: Callable[[int], None], *, localise: bool
) -> FedBack:
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        stage.take(stage.performer.preprocessing([images.read(i) for i in chosen]), localise=localise)
        advance(len(chosen))
    return stage.fed_back()


def landmarks_in_input(
    images: ImageSet, rows: Sequence[int], performer: Performer
) -> tuple[tuple[str, ...], Float[Tensor, "image landmark 2"]]:
    """Return landmark names and positions in input pixels; NaN where absent or cropped away."""
    truth = images.part_truth
    if truth is None:
        return (), torch.full((len(rows), 0, 2), math.nan, dtype=torch.float64)
    chosen = truth.for_keys([images.keys[i] for i in rows])
    moved = np.full(chosen.positions_px.shape, np.nan)
    for index, row in enumerate(rows):
        if not np.isnan(chosen.positions_px[index]).all():
            moved[index] = performer.preprocessing.to_input_px(chosen.positions_px[index], images.size_px(row))
    height, width = performer.preprocessing.size_px
    outside = (moved < 0).any(-1) | (moved[..., 0] > width) | (moved[..., 1] > height)
    moved[outside] = np.nan
    return tuple(truth.landmarks), torch.from_numpy(moved)


def photo_numbers(images: ImageSet, rows: Sequence[int]) -> Int[Tensor, " image"]:
    """Return an integer per row, equal for crops of one photo."""
    names = sorted({images.photos[i] for i in rows})
    number = {name: k for k, name in enumerate(names)}
    return torch.tensor([number[images.photos[i]] for i in rows])


def filter_table(
    peaks: Peaks, landmarks: Tensor, names: Sequence[str], size: tuple[int, int], photos: Tensor
) -> list[dict[str, Any]]:
    """Return one record per filter: instability, consistency and its landmark, spread, dead or not."""
    instability = instability_per_filter(peaks, landmarks, size)
    consistency, landmark = consistency_per_filter(peaks, landmarks, photos)
    spread, dead = spread_per_filter(peaks), dead_filters(peaks)

    def number(value: Tensor) -> float | None:
        return None if math.isnan(float(value)) else round(float(value), 5)

    return [
        {
            "filter": k,
            "instability": number(instability[k]),
            "consistency": number(consistency[k]),
            "landmark": names[int(landmark[k])] if names and number(consistency[k]) is not None else None,
            "spread_cells": number(spread[k]),
            "dead": bool(dead[k]),
        }
        for k in range(peaks.scores.shape[1])
    ]


def _relative_error(per_photo: Tensor, sums: ReconstructionSums, generator: torch.Generator) -> Estimate:
    """Share of the target's variance that is lost, with a bootstrap over photos of the numerator."""
    if not math.isfinite(sums.relative_error):
        return Estimate.undefined()
    mean_scatter = sums.scatter / sums.count
    return bootstrap(lambda i: float(per_photo[i].mean()) / mean_scatter, sums.count, generator=generator, rounds=1000)


def share_estimate(shares: Sequence[float]) -> Estimate:
    """Return p of the kept explainer with a 95 % t-interval of the seeds' mean; undefined ends for a single seed."""
    count = len(shares)
    if count < 2:
        return Estimate(shares[0], (math.nan, math.nan), count, "seeds")
    t_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    mean = sum(shares) / count
    deviation = math.sqrt(sum((s - mean) ** 2 for s in shares) / (count - 1))
    half = t_95.get(count - 1, 1.96) * deviation / math.sqrt(count)
    return Estimate(shares[0], (max(0.0, mean - half), min(1.0, mean + half)), count, "seeds")


def warnings_for(scores: Mapping[str, Any], agreement: Estimate) -> list[str]:
    """Name the ways in which a low instability would mean nothing."""
    found = []
    checks = (
        ("filter_correlation", lambda v: v > 0.9, "every filter follows the same part"),
        ("dead_frac", lambda v: v >= 0.05, "many filters are dead"),
        ("peak_spread_cells", lambda v: v < 1.0, "peaks barely move"),
        ("border_frac", lambda v: v > 0.5, "most peaks stand on the border"),
    )
    for name, bad, text in checks:
        value = scores[name]["value"]
        if value is not None and bad(value):
            found.append(f"{text} ({name} = {value:.3g})")
    if agreement.n and agreement.value < 0.5:
        found.append(f"the reconstruction loses most decisions (agreement_top1 = {agreement.value:.3g})")
    return found


@dataclass(frozen=True)
class EvaluationRows:
    """Positions of the photos an evaluation uses.

    Attributes:
        held: held-out photos of the category: every score is of these.
        held_others: held-out photos of other categories, for the error increase.
        train: training photos of the category, on which the logistic head is fitted.
        train_others: training photos of other categories.
    """

    held: Sequence[int]
    held_others: Sequence[int]
    train: Sequence[int]
    train_others: Sequence[int]

    @property
    def total(self) -> int:
        """Number of photos that are streamed."""
        return len(self.held) + len(self.held_others) + len(self.train) + len(self.train_others)


def evaluate_explainer(
    explainer: Explainer,
    performer: Performer,
    images: ImageSet,
    rows: EvaluationRows,
    shares: Sequence[float],
    *,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], dict[str, Peaks]]:
    """Measure an explainer on held-out photos.

    Args:
        explainer: in eval mode.
        performer: the network it explains.
        images: the data set.
        rows: which photos to use for what.
        shares: p of every seed, the kept explainer's first.
        seed: of the nulls and the bootstrap.
        advance: called with the number of photos just done.

    Returns:
        The evaluation in the documented JSON schema, and the peaks per layer (``explainer``, tap, top layer).
    """
    structure = explainer.structure
    top = top_layer(performer)
    names = list(dict.fromkeys(["explainer", structure.tap, top]))
    stage = _Pass(
        performer,
        explainer.eval(),
        performer_head(performer, structure),
        {name: _Layer() for name in names},
        {name: ReconstructionSums() for name in structure.targets},
        {name: [] for name in structure.targets},
    )
    generator = torch.Generator().manual_seed(seed)
    held = _stream(stage, images, rows.held, advance, localise=True)
    size = performer.preprocessing.size_px
    landmark_names, landmarks = landmarks_in_input(images, rows.held, performer)
    photos = photo_numbers(images, rows.held)
    tap_field = receptive_field(performer, structure.tap)
    # Convolutions with padding 1 and stride 1 leave the grid of cell centres as it is.
    fields = {"explainer": tap_field, structure.tap: tap_field, top: receptive_field(performer, top)}
    peaks = {name: stage.layers[name].peaks(fields[name]) for name in names}

    def scores(of: Peaks, *, fixed: bool = False, rounds: int = ROUNDS) -> LocalisationScores:
        return localisation_scores(
            of,
            landmarks,
            size,
            landmark_names=landmark_names,
            photos=photos,
            generator=generator,
            rounds=rounds,
            fixed_null=fixed,
        )

    start, stride = grid_of(tap_field)
    nulls = {
        kind: scores(
            null_peaks(
                kind,
                len(rows.held),
                structure.side_cells,
                start,
                stride,
                input_size_px=size,
                filters=NULL_FILTERS,
                generator=generator,
            ),
            fixed=kind != "random",
        ).to_dict()
        for kind in ("random", "centre", "corner")
    }
    explained = scores(peaks["explainer"]).to_dict()
    agreement = agreement_top1(held.fed_outputs, held.outputs)
    reconstruction: dict[str, Any] = {
        "agreement_top1": agreement.to_dict(),
        "relative_error": {
            name: _relative_error(torch.cat(stage.per_photo[name]), stage.sums[name], generator).to_dict()
            for name in structure.targets
        },
    }
    if rows.held_others and rows.train and rows.train_others:
        held_others = _stream(stage, images, rows.held_others, advance, localise=False)
        train = _stream(stage, images, rows.train, advance, localise=False)
        train_others = _stream(stage, images, rows.train_others, advance, localise=False)
        errors = category_error_increase(
            torch.cat([train.features, train_others.features]),
            torch.cat([torch.ones(len(rows.train)), torch.zeros(len(rows.train_others))]).long(),
            torch.cat([held.features, held_others.features]),
            torch.cat([held.fed_features, held_others.fed_features]),
            torch.cat([torch.ones(len(rows.held)), torch.zeros(len(rows.held_others))]).long(),
            generator=generator,
        )
        reconstruction |= {
            "performer_error_percent": errors.performer_error_percent.to_dict(),
            "explainer_error_percent": errors.explainer_error_percent.to_dict(),
            "error_increase_points": errors.error_increase_points.to_dict(),
            "agreement_top1_background": agreement_top1(held_others.fed_outputs, held_others.outputs).to_dict(),
        }
    result = {
        "schema": SCHEMA,
        "photos": len(rows.held),
        "landmarks": {name: int((~landmarks[:, k].isnan().any(-1)).sum()) for k, name in enumerate(landmark_names)},
        "explainer": explained,
        "performer": {
            "tap": scores(peaks[structure.tap]).to_dict(),
            "top": scores(peaks[top]).to_dict(),
            "top_layer": top,
        },
        "nulls": nulls,
        "p": share_estimate(shares).to_dict(),
        "reconstruction": reconstruction,
        "filters": {
            "explainer": filter_table(peaks["explainer"], landmarks, landmark_names, size, photos),
            "performer": filter_table(peaks[structure.tap], landmarks, landmark_names, size, photos),
        },
        "warnings": warnings_for(explained, agreement),
    }
    return result, peaks
