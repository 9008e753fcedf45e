"""Measure an explainer on held-out photos: one pass over the photos, then maps, nulls and fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.estimate import Estimate
from partlens.evaluation.fidelity import (
    Answers,
    FedBack,
    LostVariance,
    ShareCurve,
    measure_fidelity,
    own_columns,
    share_estimate,
)
from partlens.evaluation.part_regions import PartRegions, RegionPass
from partlens.evaluation.places import (
    ROUNDS,
    MeasuredPhotos,
    filter_scores,
    measure_maps,
    measure_nulls,
    photo_numbers,
    top_layer,
)
from partlens.evaluation.results import (
    EvaluatedData,
    Evaluation,
    Fidelity,
    LayerScores,
    PerformerScores,
    SamePeak,
)
from partlens.explainer.network import TRACK_REACH_CELLS, Explainer, performer_head
from partlens.explainer.terms import RECONSTRUCTION_WEIGHT
from partlens.metrics.faithfulness import class_outputs
from partlens.metrics.localisation import Peaks, peaks_from_cells
from partlens.metrics.scores import LocalisationScores
from partlens.network.performer import Performer
from partlens.network.receptive_field import ReceptiveField, grid_of, widened
from partlens.network.taps import forward_taps
from partlens.run import versions

BATCH = 32


@dataclass(frozen=True)
class EvaluationRows:
    """Positions of the photos that an evaluation uses, and the categories of those that are measured.

    Attributes:
        held: held-out photos of the categories: every score is of these.
        held_others: held-out photos of other categories, for the error increase.
        train: training photos of the categories; on them a logistic head is fitted, and they decide which of several
            categories a filter belongs to.
        train_others: training photos of other categories, for the head.
        labels: the category of each of ``held``, an index.
        train_labels: of each of ``train``.
    """

    held: Sequence[int]
    held_others: Sequence[int]
    train: Sequence[int]
    train_others: Sequence[int]
    labels: Int[Tensor, " image"]
    train_labels: Int[Tensor, " photo"]


@dataclass(frozen=True)
class Need:
    """Which photos an evaluation reads, and why: no training photos where nothing is fitted on them.

    Attributes:
        others: held-out photos of other categories: one category is told from them.
        head: training photos: a logistic head is fitted on them, since the performer has no output of the category.
        share: training photos of the categories: they decide to which of several a filter belongs.
    """

    others: bool
    head: bool
    share: bool

    @classmethod
    def of(cls, rows: EvaluationRows, performer: Performer, categories: Sequence[str]) -> Need:
        """Return what is needed for some rows."""
        several, own = len(categories) > 1, own_columns(performer, categories) is not None
        others = bool(rows.held_others and rows.train and rows.train_others)
        return cls(others, not own and (several or others), several)

    def photos(self, rows: EvaluationRows) -> int:
        """Return how many photos are read."""
        count = len(rows.held) + (len(rows.held_others) if self.others else 0)
        count += len(rows.train) if self.head or self.share else 0
        return count + (len(rows.train_others) if self.head and not self.share else 0)

    def words(self, rows: EvaluationRows, categories: Sequence[str]) -> str:
        """Say what is read and why, in one sentence."""
        of = f" of {', '.join(categories)}" if any(categories) else ""
        said = [f"{len(rows.held)} held-out photos{of}"]
        why = []
        if self.others:
            said.append(f"{len(rows.held_others)} others")
            why.append("it is told from them")
        if self.head or self.share:
            count = len(rows.train) + (len(rows.train_others) if self.head and not self.share else 0)
            said.append(f"{count} training photos")
        if self.share:
            why.append("training photos decide to which category a filter belongs")
        if self.head:
            why.append("the logistic head that measures errors is fitted on training photos")
        return f"reads {', '.join(said)}{', since ' if why else ''}{' and '.join(why)}"


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
        """Return each filter's category: the one whose photos activate it most on average (CVPR 2018, Sec. 3.1)."""
        if categories == 1:
            return torch.zeros(self.scores[0].shape[1], dtype=torch.long)
        sums = torch.cat(self.activity)
        return torch.stack([sums[labels == c].mean(0) for c in range(categories)]).argmax(0)

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
        cells = torch.cat(self.otherwise if otherwise else self.cells)
        return peaks_from_cells(cells, torch.cat(self.scores), self.side, *grid_of(receptive))


class _Pass:
    """Photos streaming through performer and explainer."""

    def __init__(
        self, performer: Performer, explainer: Explainer, images: ImageSet, advance: Callable[[int], None]
    ) -> None:
        self.performer, self.explainer, self.images, self.advance = performer, explainer.eval(), images, advance
        structure, config = explainer.structure, explainer.config
        self.head: nn.Module = performer_head(performer, structure)
        self.layers = {name: _Layer() for name in ("explainer", structure.tap, self.top)}
        self.lost = {name: LostVariance() for name in structure.targets}
        self.curve = ShareCurve(config.eta, RECONSTRUCTION_WEIGHT)
        self.regions: RegionPass | None = None

    @cached_property
    def top(self) -> str:
        return top_layer(self.performer)

    @cached_property
    def fields(self) -> dict[str, ReceptiveField]:
        """What each layer's cells see, in theory."""
        tap = self.performer.field(self.explainer.structure.tap)
        # Convolutions with padding 1 and stride 1 leave the grid of cell centres as it is.
        return {
            "explainer": tap,
            self.explainer.structure.tap: tap,
            self.top: self.performer.field(self.top),
        }

    @torch.no_grad()
    def read(self, rows: Sequence[int], *, localise: bool = False, follow: bool = False) -> FedBack:
        """Read photos and return what both networks say of them.

        Args:
            rows: the photos.
            localise: keep peaks and reconstructions, too.
            follow: keep how much each filter activates.
        """
        structure, kept = self.explainer.structure, []
        names = list(dict.fromkeys([structure.tap, *structure.targets, self.top]))
        for start in range(0, len(rows), BATCH):
            chosen = rows[start : start + BATCH]
            batch = self.performer.preprocessing([self.images.read(i) for i in chosen])
            maps = {name: value.cpu() for name, value in forward_taps(self.performer, batch, names)[1].items()}
            output = self.explainer(maps[structure.tap])
            maps["explainer"] = output.interp2
            if follow:
                for name, layer in self.layers.items():
                    layer.follow(maps[name])
            if localise:
                self._localise(maps, output.reconstructions)
            own, fed = maps[structure.targets[-1]], output.reconstructions[-1]
            said = (class_outputs(self.head(of)[0]) for of in (own, fed))
            kept.append((*said, _vector(own), _vector(fed)))
            self.advance(len(chosen))
        return FedBack(*map(torch.cat, zip(*kept, strict=True)))

    def _localise(self, maps: dict[str, Tensor], reconstructions: Sequence[Tensor]) -> None:
        targets = [maps[name] for name in self.explainer.structure.targets]
        self.curve.add(self.explainer, maps[self.explainer.structure.tap], targets)
        for name, layer in self.layers.items():
            layer.add(maps[name], self.explainer, own=name == "explainer")
            if self.regions is not None:
                self.regions.add(name, maps[name])
        for lost, value, target in zip(self.lost.values(), reconstructions, targets, strict=True):
            lost.add(value, target)


def _vector(features: Tensor) -> Tensor:
    return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


def evaluate_explainer(
    explainer: Explainer,
    performer: Performer,
    images: ImageSet,
    rows: EvaluationRows,
    data: EvaluatedData,
    shares: Sequence[float],
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Evaluation, dict[str, Peaks]]:
    """Measure an explainer on held-out photos.

    Args:
        explainer: in eval mode.
        performer: the network it explains.
        images: the data set.
        rows: which photos to use for what.
        data: what the record says of the photos; its categories are those of the explainer.
        shares: p of every seed, the kept explainer's first.
        seed: of the nulls and the bootstrap.
        rounds: bootstrap rounds of the scores of peaks; those of fidelity have ten times as many.
        advance: called with the number of photos just done.

    Returns:
        The evaluation, and the peaks per layer (``explainer``, tap, top layer).
    """
    structure, categories = explainer.structure, data.categories
    need = Need.of(rows, performer, categories)
    stage = _Pass(performer, explainer, images, advance)
    top, fields = stage.top, stage.fields
    known = PartRegions.of(images, rows.held, performer.preprocessing)
    if known is not None:
        stage.regions = RegionPass(known, list(stage.layers), rows.labels, len(categories))
    held = stage.read(rows.held, localise=True)
    train = stage.read(rows.train, follow=need.share) if need.head or need.share else None
    others = stage.read(rows.held_others) if need.others else None
    answers = Answers(
        held=held,
        labels=rows.labels,
        photos=photo_numbers(images, [*rows.held, *(rows.held_others if need.others else ())]),
        columns=own_columns(performer, categories),
        others=others,
        train=train,
        train_labels=rows.train_labels,
        train_others=stage.read(rows.train_others) if need.head and not need.share else None,
        categories=len(categories),
    )
    on = MeasuredPhotos.of(images, rows.held, performer, categories, rows.labels, seed=seed, rounds=rounds)
    peaks = {name: layer.peaks(fields[name]) for name, layer in stage.layers.items()}
    assigned = {name: layer.assigned(rows.train_labels, len(categories)) for name, layer in stage.layers.items()}

    def scores(name: str, *, otherwise: bool = False) -> LayerScores:
        of = stage.layers[name].peaks(fields[name], otherwise=True) if otherwise else peaks[name]
        return measure_maps(on, of, assigned[name])

    # One generator serves all bootstraps, so the order below decides the intervals.
    nulls, differences = measure_nulls(on, peaks["explainer"], assigned["explainer"], grid_of(fields[structure.tap]))
    explained = scores("explainer")
    fidelity = measure_fidelity(answers, stage.lost, generator=on.generator, rounds=10 * rounds)
    optimum = Estimate.undefined()
    if explainer.config.objective == "reconstruction":
        optimum = stage.curve.optimum(on.generator, on.photos, 10 * rounds)
    performers = PerformerScores(tap=scores(structure.tap), top=scores(top), top_layer=top)
    same = None
    if explainer.config.peak == "centroid":
        largest, tap_centroid, top_centroid = (
            scores(name, otherwise=True) for name in ("explainer", structure.tap, top)
        )
        same = SamePeak(explainer_largest=largest, tap_centroid=tap_centroid, top_centroid=top_centroid)
    regions = None
    if stage.regions is not None:
        reach = {**fields, "explainer": widened(fields["explainer"], TRACK_REACH_CELLS)}
        roles = {"explainer": "explainer", "tap": structure.tap, "top": top}
        regions = stage.regions.scores(reach, assigned, on.photos, roles, seed, rounds)
    tables = {"explainer": "explainer", "performer": structure.tap}
    evaluation = Evaluation(
        data=data,
        landmarks={name: int((~on.landmarks[:, k].isnan().any(-1)).sum()) for k, name in enumerate(on.names)},
        explainer=explained,
        performer=performers,
        nulls=nulls,
        instability_minus_null=differences,
        same_peak=same,
        p=share_estimate(shares),
        p_optimum=optimum,
        p_rescaling_error=stage.curve.worst_rescaling,
        reconstruction=fidelity,
        part_interpretability=regions,
        filters={role: filter_scores(on, peaks[name], assigned[name]) for role, name in tables.items()},
        warnings=warnings_for(explained, fidelity, data),
        versions=versions(),
    )
    return evaluation, peaks


def warnings_for(scores: LocalisationScores, fidelity: Fidelity, data: EvaluatedData) -> tuple[str, ...]:
    """Name the ways in which a low instability would mean nothing, or the scores would flatter."""
    checks = (
        ("filter_correlation", lambda v: v > 0.9, "every filter follows the same part"),
        ("dead_frac", lambda v: v >= 0.05, "many filters are dead"),
        ("silent_frac", lambda v: v >= 0.05, "many maps are empty, whose peaks are in the corner"),
        ("peak_spread_cells", lambda v: v < 1.0, "peaks barely move"),
        ("border_frac", lambda v: v > 0.5, "most peaks are on the border"),
    )
    found = [
        f"{text} ({name} = {scores.of(name).value:.3g})" for name, bad, text in checks if bad(scores.of(name).value)
    ]
    agreement = fidelity.agreement_top1
    if agreement.n and agreement.value < 0.5:
        found.append(f"the reconstruction loses most decisions (agreement_top1 = {agreement.value:.3g})")
    if data.split == "train" and data.same_as_fit:
        found.append("these are the photos of the fit: the scores say nothing about others")
    elif data.used_in_fit:
        found.append(f"{data.used_in_fit} of the {data.photos} photos were used in the fit: the scores flatter")
    return tuple(found)
