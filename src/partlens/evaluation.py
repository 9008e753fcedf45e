"""Measure a finished run on photos it has not seen: one streaming pass, every score beside its nulls."""

from __future__ import annotations

import copy
import dataclasses
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
from partlens.metrics.faithfulness import (
    HeadErrors,
    ReconstructionSums,
    agreement_top1,
    best_share,
    category_error_increase,
    decision_errors,
)
from partlens.metrics.localisation import (
    LocalisationScores,
    Peaks,
    consistency_per_filter,
    dead_filters,
    instability_differences,
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
SHARES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.95)


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
        centroid = explainer.places(maps.clamp(min=0))
        self.cells.append(centroid if own else largest)
        self.otherwise.append(largest if own else centroid)

    def peaks(self, receptive: ReceptiveField, *, otherwise: bool = False) -> Peaks:
        start, stride = grid_of(receptive)
        cells = torch.cat(self.otherwise if otherwise else self.cells)
        return peaks_from_cells(cells, torch.cat(self.scores), self.side, start, stride)


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


def class_outputs(outputs: Float[Tensor, "image output"]) -> Float[Tensor, "image class"]:
    """Return outputs whose largest is the decision: a single logistic output gets a 0 for "not the category" before it.

    Example:
        >>> class_outputs(torch.tensor([[2.0], [-1.0]])).argmax(1).tolist()
        [1, 0]
    """
    return torch.cat([torch.zeros_like(outputs), outputs], 1) if outputs.shape[1] == 1 else outputs


@dataclass
class ShareCurve:
    """The objective of each photo at several shares p, everything else held.

    Attributes:
        eta: weight of -log p.
        costs: per photo and share: ``sum_l |x_l - x_l*|²`` of each target, times ``1 / E|max(x*, 0)|`` when read out.
    """

    eta: float
    reconstruction_weight: float
    costs: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    worst_rescaling: float = math.nan

    @torch.no_grad()
    def add(self, explainer: Explainer, maps: Tensor, targets: Sequence[Tensor]) -> None:
        """Decode a batch at every share."""
        tracks = explainer.normed_tracks(maps)
        cost = maps.new_empty(len(maps), len(SHARES), len(targets))
        for column, share in enumerate(SHARES):
            for row, (value, target) in enumerate(
                zip(
                    explainer.decode(share * tracks.interpretable + (1 - share) * tracks.ordinary), targets, strict=True
                )
            ):
                cost[:, column, row] = (value - target).square().flatten(1).sum(1)
        self.costs.append(cost.double())
        self.norms.append(torch.stack([t.clamp(min=0).flatten(1).norm(dim=1) for t in targets], 1).double())
        if math.isnan(self.worst_rescaling):
            self.worst_rescaling = rescaling_error(explainer, maps)

    def optimum(self, generator: torch.Generator, rounds: int = 1000) -> Estimate:
        """Return the p at which these photos' objective is least, with a bootstrap over photos."""
        weights = self.reconstruction_weight / torch.cat(self.norms).mean(0).clamp(min=1e-12)
        costs = (torch.cat(self.costs) * weights).sum(2)
        shares = torch.tensor(SHARES, dtype=torch.float64)
        return bootstrap(
            lambda i: best_share(costs[i].mean(0), shares, self.eta), len(costs), generator=generator, rounds=rounds
        )


def rescaling_error(explainer: Explainer, maps: Tensor, factor: float = 10.0) -> float:
    """Return how far the encoder's output moves when conv-interp-2 is scaled and its norm layer measured again.

    A share p could be had for nothing if the interpretable track could be made large or small by its weights alone; the
    norm layer is there to prevent it. 0 means it does: the largest change, relative to the largest value.
    """
    scaled = copy.deepcopy(explainer)
    outcome = []
    with torch.no_grad():
        for times in (1.0, factor):
            for parameter, original in zip(
                scaled.conv_interp_2.parameters(), explainer.conv_interp_2.parameters(), strict=True
            ):
                parameter.copy_(original * times)
            masked = scaled.pool(scaled.masked(scaled.interpret(maps)[1]))
            scaled.norm_interp.started.fill_(value=False)
            scaled.norm_interp.update(masked)
            outcome.append(scaled.norm_interp.eval()(masked))
    largest = float(outcome[0].abs().max())
    return float((outcome[1] - outcome[0]).abs().max()) / largest if largest > 0 else 0.0


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


@dataclass(frozen=True)
class Categories:
    """The categories that an explainer's filters are shared among.

    Attributes:
        names: at least two.
        labels: of the held-out photos, an index into ``names``.
        train_labels: of the training photos; they decide which category a filter belongs to.
    """

    names: tuple[str, ...]
    labels: Int[Tensor, " image"]
    train_labels: Int[Tensor, " photo"]


def _mean_of(values: Sequence[Estimate], weights: Sequence[int]) -> Estimate:
    """Return a weighted mean of independent estimates; each end of the interval adds up in squares."""
    usable = [(v, w) for v, w in zip(values, weights, strict=True) if w > 0 and not math.isnan(v.value)]
    total = sum(w for _, w in usable)
    if not usable:
        return Estimate.undefined()
    mean = sum(v.value * w for v, w in usable) / total
    low = math.sqrt(sum(((v.value - v.interval[0]) * w / total) ** 2 for v, w in usable))
    high = math.sqrt(sum(((v.interval[1] - v.value) * w / total) ** 2 for v, w in usable))
    return Estimate(mean, (mean - low, mean + high), sum(v.n for v, _ in usable), usable[0][0].unit)


def joined_scores(scores: Sequence[LocalisationScores], filters: Sequence[int]) -> LocalisationScores:
    """Return the mean over filters of scores that were measured per category, each on its own photos."""
    names = [f.name for f in dataclasses.fields(LocalisationScores) if f.name != "landmark_shares"]
    joined = {name: _mean_of([getattr(s, name) for s in scores], list(filters)) for name in names}
    shares: dict[str, float] = {}
    for landmark in dict.fromkeys(name for s in scores for name in s.landmark_shares):
        parts = [(s.landmark_shares[landmark], n) for s, n in zip(scores, filters, strict=True)]
        known = [(v, n) for v, n in parts if not math.isnan(v) and n]
        shares[landmark] = sum(v * n for v, n in known) / sum(n for _, n in known) if known else math.nan
    return LocalisationScores(**joined, landmark_shares=shares)


def _own_errors(
    performer: Performer,
    names: Sequence[str],
    held: FedBack,
    others: FedBack | None,
    labels: Tensor,
    seed: torch.Generator,
) -> HeadErrors | None:
    """Return errors by the performer's own outputs, where these are the categories; ``None`` where they are not."""
    columns = own_columns(performer, names)
    if columns is None:
        return None
    own, fed, truth = held.outputs.argmax(1), held.fed_outputs.argmax(1), torch.tensor(columns)[labels]
    if len(names) == 1 and others is not None:
        # Category against everything else: the other outputs are one class.
        own = (torch.cat([own, others.outputs.argmax(1)]) == columns[0]).long()
        fed = (torch.cat([fed, others.fed_outputs.argmax(1)]) == columns[0]).long()
        truth = torch.cat([torch.ones(len(labels)), torch.zeros(len(others.outputs))]).long()
    return decision_errors(own, fed, truth, generator=seed)


def own_columns(performer: Performer, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the column of :func:`class_outputs` of each category; ``None`` where the performer does not know one."""
    known = performer.class_names
    if known is None or not names or any(name not in known for name in names):
        return None
    return tuple(known.index(name) + (1 if len(known) == 1 else 0) for name in names)


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
    stage = _Pass(
        performer,
        explainer.eval(),
        performer_head(performer, structure),
        {name: _Layer() for name in names},
        {name: ReconstructionSums() for name in structure.targets},
        {name: [] for name in structure.targets},
        ShareCurve(explainer.config.eta, explainer.config.reconstruction_weight),
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
    tap_field = receptive_field(performer, structure.tap)
    # Convolutions with padding 1 and stride 1 leave the grid of cell centres as it is.
    fields = {"explainer": tap_field, structure.tap: tap_field, top: receptive_field(performer, top)}
    peaks = {name: stage.layers[name].peaks(fields[name]) for name in names}
    assigned = (
        {}
        if categories is None
        else {n: stage.layers[n].assigned(categories.train_labels, len(categories.names)) for n in names}
    )

    def of_photos(of: Peaks, index: Tensor | None, *, fixed: bool = False) -> LocalisationScores:
        return localisation_scores(
            of,
            landmarks if index is None else landmarks[index],
            size,
            landmark_names=landmark_names,
            photos=photos if index is None else photos[index],
            generator=generator,
            rounds=ROUNDS,
            fixed_null=fixed,
        )

    def scores(of: Peaks, layer: str | None, *, fixed: bool = False) -> dict[str, Any]:
        """Scores of a layer, or of a null (no layer), which is measured on every category alike."""
        if categories is None:
            return of_photos(of, None, fixed=fixed).to_dict()
        found, counts, by_category = [], [], {}
        for number, name in enumerate(categories.names):
            index = (categories.labels == number).nonzero()[:, 0]
            own = None if layer is None else (assigned[layer] == number).nonzero()[:, 0]
            # A null weighs as much in each category as the explainer that it stands beside.
            counts.append(len(own) if own is not None else int((assigned["explainer"] == number).sum()))
            if (own is not None and not len(own)) or len(index) < 2:
                counts.pop()
                continue
            part = of.rows(index) if own is None else of.rows(index).filters(own)
            found.append(of_photos(part, index, fixed=fixed))
            by_category[name] = {"filters": counts[-1], **found[-1].to_dict()}
        return joined_scores(found, counts).to_dict() | {"by_category": by_category}

    def table(layer: str) -> list[dict[str, Any]]:
        if categories is None:
            return filter_table(peaks[layer], landmarks, landmark_names, size, photos)
        records: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(categories.names):
            index = (categories.labels == number).nonzero()[:, 0]
            own = (assigned[layer] == number).nonzero()[:, 0]
            if len(own):
                part = peaks[layer].rows(index).filters(own)
                found = filter_table(part, landmarks[index], landmark_names, size, photos[index])
                records |= {
                    k: {**record, "filter": k, "category": name} for k, record in zip(own.tolist(), found, strict=True)
                }
        return [records[k] for k in sorted(records)]

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
    nulls = {kind: scores(of, None, fixed=kind != "random") for kind, of in of_nulls.items()}
    explained = scores(peaks["explainer"], "explainer")

    own, draws = peaks["explainer"], torch.Generator().manual_seed(seed)
    if categories is None:
        differences = instability_differences(own, of_nulls, landmarks, size, generator=draws, rounds=ROUNDS)
    else:
        each, counts = [], []
        for number in range(len(categories.names)):
            index = (categories.labels == number).nonzero()[:, 0]
            chosen = (assigned["explainer"] == number).nonzero()[:, 0]
            if len(index) < 2 or not len(chosen):
                continue
            counts.append(len(chosen))
            part, its = own.rows(index).filters(chosen), {kind: of.rows(index) for kind, of in of_nulls.items()}
            each.append(instability_differences(part, its, landmarks[index], size, generator=draws, rounds=ROUNDS))
        differences = {kind: _mean_of([found[kind] for found in each], counts) for kind in of_nulls}
    agreement = agreement_top1(held.fed_outputs, held.outputs)
    reconstruction: dict[str, Any] = {
        "agreement_top1": agreement.to_dict(),
        "relative_error": {
            name: _relative_error(torch.cat(stage.per_photo[name]), stage.sums[name], generator).to_dict()
            for name in structure.targets
        },
    }
    held_others = None
    errors = None
    if others:
        held_others = _stream(stage, images, rows.held_others, advance)
        reconstruction["agreement_top1_background"] = agreement_top1(
            held_others.fed_outputs, held_others.outputs
        ).to_dict()
    if wanted and (held_others is not None or categories is not None):
        errors = _own_errors(performer, wanted, held, held_others, labels, generator)
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
        optimum = stage.curve.optimum(generator)
    result = {
        "schema": SCHEMA,
        "photos": len(rows.held),
        "landmarks": {name: int((~landmarks[:, k].isnan().any(-1)).sum()) for k, name in enumerate(landmark_names)},
        "explainer": explained,
        "performer": {
            "tap": scores(peaks[structure.tap], structure.tap),
            "top": scores(peaks[top], top),
            "top_layer": top,
        },
        "nulls": nulls,
        "instability_minus_null": {kind: found.to_dict() for kind, found in differences.items()},
        "p": share_estimate(shares).to_dict(),
        "p_optimum": optimum.to_dict(),
        "p_rescaling_error": stage.curve.worst_rescaling,
        "reconstruction": reconstruction,
        "filters": {
            "explainer": table("explainer"),
            "performer": table(structure.tap),
        },
        "warnings": warnings_for(explained, agreement),
    }
    if explainer.config.peak == "centroid":
        found = {name: scores(stage.layers[name].peaks(fields[name], otherwise=True), name) for name in names}
        result["same_peak"] = {
            "largest": {"explainer": found["explainer"]},
            "centroid": {"tap": found[structure.tap], "top": found[top]},
        }
    if categories is not None:
        result["filter_categories"] = {
            name: int((assigned["explainer"] == number).sum()) for number, name in enumerate(categories.names)
        }
    return result, peaks
