"""Measure an explainer on held-out photos."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.fed_back import FedBack, class_outputs, own_columns, own_errors
from partlens.evaluation.part_regions import PartRegions, RegionPass
from partlens.evaluation.places import landmarks_in_input, photo_numbers, top_layer
from partlens.evaluation.scoring import Categories, Scoring
from partlens.evaluation.share_curve import ShareCurve, share_estimate
from partlens.explainer.assembly import performer_head
from partlens.explainer.network import TRACK_REACH_CELLS, Explainer
from partlens.metrics.faithfulness import ReconstructionSums, agreement_top1, category_error_increase
from partlens.metrics.localisation import Peaks, null_peaks, peaks_from_cells
from partlens.network.receptive_field import ReceptiveField, grid_of, widened
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer

SCHEMA = "partlens.evaluation/1"
BATCH = 32
NULL_FILTERS = 256


@dataclass
class _Layer:
    """Peaks of one layer, collected batch by batch."""

    cells: list[Tensor] = field(default_factory=list)
    otherwise: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    activity: list[Tensor] = field(default_factory=list)
    side: tuple[int, int] = (0, 0)

    def follow(self, maps: Float[Tensor, "image filter row col"]) -> None:
        """Keep ``sum_ij x_ij`` of photos that only decide which category a filter belongs to."""
        self.activity.append(maps.clamp(min=0).sum((2, 3)))

    def assigned(self, labels: Int[Tensor, " image"], categories: int) -> Int[Tensor, " filter"]:
        """Return each filter's category: the one whose photos excite it most on average (CVPR 2018, Sec. 3.1)."""
        sums = torch.cat(self.activity)
        means = torch.stack([sums[labels == c].mean(0) for c in range(categories)])
        return means.argmax(0)

    def add(self, maps: Float[Tensor, "image filter row col"], explainer: Explainer, *, own: bool) -> None:
        """Keep where maps peak.

        An explainer's maps peak where the explainer says so (``own``), other layers' at their largest cell. Where the
        explainer takes centroids, each is also kept as the other is read, so that like can be compared with like.
        """
        score, index = maps.flatten(2).max(-1)
        largest = torch.stack([index // maps.shape[3], index % maps.shape[3]], -1)
        self.scores.append(score.double())
        self.side = (int(maps.shape[2]), int(maps.shape[3]))
        if explainer.config.peak == "largest":
            self.cells.append(largest)
            return
        centroid = explainer.places(maps.clamp(min=0))  # an empty map's is cell (0, 0), as its largest cell is
        self.cells.append(centroid if own else largest)
        self.otherwise.append(largest if own else centroid)

    def peaks(self, receptive: ReceptiveField, *, otherwise: bool = False) -> Peaks:
        start, stride = grid_of(receptive)
        cells = torch.cat(self.otherwise if otherwise else self.cells)
        return peaks_from_cells(cells, torch.cat(self.scores), self.side, start, stride)


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
    curve: ShareCurve
    regions: RegionPass | None
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def take(self, batch: Tensor, *, localise: bool, follow: bool) -> None:
        """Process a preprocessed batch."""
        structure = self.explainer.structure
        names = list(dict.fromkeys([structure.tap, *structure.targets, *self.layers]))
        names = [n for n in names if n != "explainer"]
        _, taps = forward_taps(self.performer, batch, names)
        maps = {name: value.cpu() for name, value in taps.items()}
        output = self.explainer(maps[structure.tap])
        last = structure.targets[-1]
        own, fed = maps[last], output.reconstructions[-1]
        if follow:
            for name, layer in self.layers.items():
                layer.follow(output.interp2 if name == "explainer" else maps[name])
        if localise:
            self.curve.add(self.explainer, maps[structure.tap], [maps[name] for name in structure.targets])
            for name, layer in self.layers.items():
                ours = name == "explainer"
                layer.add(output.interp2 if ours else maps[name], self.explainer, own=ours)
                if self.regions is not None:
                    self.regions.add(name, output.interp2 if ours else maps[name])
            for name, value in zip(structure.targets, output.reconstructions, strict=True):
                self.sums[name].add(value, maps[name])
                self.per_photo[name].append((value - maps[name]).double().square().flatten(1).sum(1))
        for name, value in (
            ("outputs", class_outputs(self.head(own)[0])),
            ("fed_outputs", class_outputs(self.head(fed)[0])),
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
    stage: _Pass,
    images: ImageSet,
    rows: Sequence[int],
    advance: Callable[[int], None],
    *,
    localise: bool = False,
    follow: bool = False,
) -> FedBack:
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        batch = stage.performer.preprocessing([images.read(i) for i in chosen])
        stage.take(batch, localise=localise, follow=follow)
        advance(len(chosen))
    return stage.fed_back()


def _relative_error(
    per_photo: Tensor, sums: ReconstructionSums, generator: torch.Generator, photos: Tensor
) -> Estimate:
    """Share of the target's variance that is lost, with a bootstrap over photos of the numerator."""
    if not math.isfinite(sums.relative_error):
        return Estimate.undefined()
    mean_scatter = sums.scatter / sums.count
    return bootstrap(
        lambda i: float(per_photo[i].mean()) / mean_scatter,
        sums.count,
        generator=generator,
        rounds=1000,
        groups=photos,
    )


def warnings_for(scores: Mapping[str, Any], agreement: Estimate) -> list[str]:
    """Name the ways in which a low instability would mean nothing."""
    found = []
    checks = (
        ("filter_correlation", lambda v: v > 0.9, "every filter follows the same part"),
        ("dead_frac", lambda v: v >= 0.05, "many filters are dead"),
        ("silent_frac", lambda v: v >= 0.05, "many maps are empty, whose peaks stand in the corner"),
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
    def has_others(self) -> bool:
        """Whether category against background can be measured."""
        return bool(self.held_others and self.train and self.train_others)

    def streamed(self, *, own_outputs: bool, several: bool) -> int:
        """Return how many photos an evaluation reads: no training photos where nothing is fitted on them.

        Args:
            own_outputs: the performer's own outputs are the categories, and no head is fitted.
            several: training photos decide which category a filter belongs to.
        """
        count = len(self.held) + (len(self.held_others) if self.has_others else 0)
        head = self.has_others and not own_outputs
        if several or head:
            count += len(self.train)
        return count + (len(self.train_others) if head and not several else 0)


def evaluate_explainer(
    explainer: Explainer,
    performer: Performer,
    images: ImageSet,
    rows: EvaluationRows,
    shares: Sequence[float],
    *,
    category: str | None = None,
    categories: Categories | None = None,
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
        category: of the held photos; where the performer has an output of that name, errors are its own.
        categories: for an explainer of several. Every filter is then measured on the photos of its category only
            (ICLR 2020, Sec. 4), and a layer's score is the mean over its filters.
        seed: of the nulls and the bootstrap.
        advance: called with the number of photos just done.

    Returns:
        The evaluation in the documented JSON schema, and the peaks per layer (``explainer``, tap, top layer).
    """
    structure = explainer.structure
    top = top_layer(performer)
    names = list(dict.fromkeys(["explainer", structure.tap, top]))
    regions = PartRegions.of(images, rows.held, performer.preprocessing)
    stage = _Pass(
        performer,
        explainer.eval(),
        performer_head(performer, structure),
        {name: _Layer() for name in names},
        {name: ReconstructionSums() for name in structure.targets},
        {name: [] for name in structure.targets},
        ShareCurve(explainer.config.eta, explainer.config.reconstruction_weight),
        None if regions is None else RegionPass(regions, names, categories),
    )
    generator = torch.Generator().manual_seed(seed)
    held = _stream(stage, images, rows.held, advance, localise=True)
    others = rows.has_others
    labels = torch.zeros(len(rows.held), dtype=torch.long) if categories is None else categories.labels
    wanted = ([] if category is None else [category]) if categories is None else list(categories.names)
    own_outputs = own_columns(performer, wanted) is not None
    train = None
    if categories is not None or (others and not own_outputs):
        train = _stream(stage, images, rows.train, advance, follow=categories is not None)
    size = performer.preprocessing.size_px
    landmark_names, landmarks = landmarks_in_input(images, rows.held, performer)
    photos = photo_numbers(images, rows.held)
    tap_field = performer.field(structure.tap)
    # Convolutions with padding 1 and stride 1 leave the grid of cell centres as it is.
    fields = {"explainer": tap_field, structure.tap: tap_field, top: performer.field(top)}
    peaks = {name: stage.layers[name].peaks(fields[name]) for name in names}
    assigned = (
        {}
        if categories is None
        else {n: stage.layers[n].assigned(categories.train_labels, len(categories.names)) for n in names}
    )

    scoring = Scoring(landmarks, landmark_names, photos, size, generator, categories, assigned)
    start, stride = grid_of(tap_field)
    of_nulls = {
        kind: null_peaks(
            kind,
            len(rows.held),
            structure.side_cells,
            start,
            stride,
            input_size_px=size,
            filters=NULL_FILTERS,
            generator=generator,
        )
        for kind in ("random", "centre", "corner")
    }
    nulls = {kind: scoring.scores(of, None, fixed=kind != "random") for kind, of in of_nulls.items()}
    explained = scoring.scores(peaks["explainer"], "explainer")
    differences = scoring.differences(of_nulls, peaks["explainer"], torch.Generator().manual_seed(seed))
    agreement = agreement_top1(held.fed_outputs, held.outputs, photos)
    reconstruction: dict[str, Any] = {
        "agreement_top1": agreement.to_dict(),
        "relative_error": {
            name: _relative_error(torch.cat(stage.per_photo[name]), stage.sums[name], generator, photos).to_dict()
            for name in structure.targets
        },
    }
    held_others = None
    errors = None
    all_photos = photos
    if others:
        all_photos = photo_numbers(images, [*rows.held, *rows.held_others])
        held_others = _stream(stage, images, rows.held_others, advance)
        reconstruction["agreement_top1_background"] = agreement_top1(
            held_others.fed_outputs, held_others.outputs, all_photos[len(rows.held) :]
        ).to_dict()
    if wanted and (held_others is not None or categories is not None):
        errors = own_errors(performer, wanted, held, held_others, labels, all_photos, generator)
        by = "performer"
    if errors is None and categories is None and others:
        assert train is not None
        assert held_others is not None
        train_others = _stream(stage, images, rows.train_others, advance)
        errors = category_error_increase(
            torch.cat([train.features, train_others.features]),
            torch.cat([torch.ones(len(rows.train)), torch.zeros(len(rows.train_others))]).long(),
            torch.cat([held.features, held_others.features]),
            torch.cat([held.fed_features, held_others.fed_features]),
            torch.cat([torch.ones(len(rows.held)), torch.zeros(len(rows.held_others))]).long(),
            photos=all_photos,
            generator=generator,
        )
        by = "logistic head"
    elif errors is None and categories is not None:
        assert train is not None
        errors = category_error_increase(
            train.features,
            categories.train_labels,
            held.features,
            held.fed_features,
            categories.labels,
            photos=photos,
            generator=generator,
        )
        by = "logistic head"
    if errors is not None:
        reconstruction |= {
            "errors_by": by,
            "performer_error_percent": errors.performer_error_percent.to_dict(),
            "explainer_error_percent": errors.explainer_error_percent.to_dict(),
            "error_increase_points": errors.error_increase_points.to_dict(),
        }
    optimum = Estimate.undefined()
    if explainer.config.objective == "reconstruction":
        optimum = stage.curve.optimum(generator, photos)
    result = {
        "schema": SCHEMA,
        "photos": len(rows.held),
        "landmarks": {name: int((~landmarks[:, k].isnan().any(-1)).sum()) for k, name in enumerate(landmark_names)},
        "explainer": explained,
        "performer": {
            "tap": scoring.scores(peaks[structure.tap], structure.tap),
            "top": scoring.scores(peaks[top], top),
            "top_layer": top,
        },
        "nulls": nulls,
        "instability_minus_null": {kind: found.to_dict() for kind, found in differences.items()},
        "p": share_estimate(shares).to_dict(),
        "p_optimum": optimum.to_dict(),
        "p_rescaling_error": stage.curve.worst_rescaling,
        "reconstruction": reconstruction,
        "filters": {
            "explainer": scoring.table(peaks["explainer"], "explainer"),
            "performer": scoring.table(peaks[structure.tap], structure.tap),
        },
        "warnings": warnings_for(explained, agreement),
    }
    if explainer.config.peak == "centroid":
        found = {name: scoring.scores(stage.layers[name].peaks(fields[name], otherwise=True), name) for name in names}
        result["same_peak"] = {
            "largest": {"explainer": found["explainer"]},
            "centroid": {"tap": found[structure.tap], "top": found[top]},
        }
    if stage.regions is not None:
        result["part_interpretability"] = stage.regions.scores(
            {**fields, "explainer": widened(tap_field, TRACK_REACH_CELLS)},
            assigned,
            photos,
            {"explainer": "explainer", "tap": structure.tap, "top": top},
            seed,
        )
    if categories is not None:
        result["filter_categories"] = {
            name: int((assigned["explainer"] == number).sum()) for number, name in enumerate(categories.names)
        }
    return result, peaks
