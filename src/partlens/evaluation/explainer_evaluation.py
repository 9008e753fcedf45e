"""Measure an explainer on held-out photos: one pass over the photos, then maps, nulls and fidelity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.evaluation.fidelity import (
    Answers,
    FedBack,
    FedIn,
    fed_back,
    measure_fidelity,
    own_columns,
    share_estimate,
)
from partlens.evaluation.frames import Frames
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
    OtherPeak,
    PartInterpretability,
    PartsAlone,
    PerformerScores,
    PricePoint,
)
from partlens.explainer.network import TRACK_REACH_CELLS, Explainer, NormedTracks, performer_head
from partlens.explainer.views import gather
from partlens.metrics.faithfulness import LostVariance, class_outputs, logistic_head
from partlens.metrics.localisation import Peaks, peaks_from_cells
from partlens.metrics.scores import LocalisationScores
from partlens.network.performer import Performer
from partlens.network.receptive_field import ReceptiveField, grid_of, widened
from partlens.network.stream import stream
from partlens.run import versions

BATCH = 32

Head = Callable[[Tensor], Tensor]
"""Tells the category of each photo by its features at the last target."""

Lesson = tuple[Float[Tensor, "photo feature"], Int[Tensor, " photo"]]
"""Features of training photos at the last target, averaged over cells, and their labels from 0."""


@dataclass(frozen=True)
class EvaluationRows:
    """Positions of the photos that an evaluation uses, and the categories of those that are measured."""

    held: Sequence[int]  # held-out photos of the categories: every score is of these
    held_others: Sequence[int]  # held-out photos of other categories, for the error increase
    # training photos of several categories, which decide to which of them a filter belongs; else empty
    train: Sequence[int]
    labels: Int[Tensor, " image"]  # the category of each of ``held``, an index
    train_labels: Int[Tensor, " photo"]  # of each of ``train``

    def words(self, categories: Sequence[str]) -> str:
        """Say what is read and why, in one sentence.

        Example:
            >>> none = torch.zeros(0, dtype=torch.long)
            >>> EvaluationRows(range(4), range(3), (), none, none).words(["fox"])
            'reads 4 held-out photos of fox, 3 others, since the category is classified against them'
        """
        of = f" of {', '.join(categories)}" if any(categories) else ""
        said, why = [f"{len(self.held)} held-out photos{of}"], []
        if self.held_others:
            said.append(f"{len(self.held_others)} others")
            why.append("the category is classified against them")
        if self.train:
            said.append(f"{len(self.train)} training photos")
            why.append("training photos decide to which category a filter belongs")
        return f"reads {', '.join(said)}{', since ' if why else ''}{' and '.join(why)}"


class _Layer:
    """Peaks of one layer, collected batch by batch."""

    def __init__(self) -> None:
        self.cells, self.otherwise, self.scores, self.activity = (list[Tensor]() for _ in range(4))
        self.side = (0, 0)

    def follow(self, maps: Float[Tensor, "image filter row col"]) -> None:
        """Keep ``sum_ij x_ij`` of photos that only decide which category a filter belongs to."""
        self.activity.append(maps.clamp(min=0).sum((2, 3)).cpu())

    def assigned(self, labels: Int[Tensor, " image"], categories: int) -> Int[Tensor, " filter"]:
        """Return each filter's category: the one whose photos activate it most on average (CVPR 2018, Sec. 3.1)."""
        if categories == 1:
            return torch.zeros(self.scores[0].shape[1], dtype=torch.long)
        sums = torch.cat(self.activity)
        return torch.stack([sums[labels == c].mean(0) for c in range(categories)]).argmax(0)

    def add(self, maps: Float[Tensor, "image filter row col"], explainer: Explainer, *, own: bool) -> None:
        """Keep where maps peak: the explainer's ``own`` where it says so, other layers' at their largest cell."""
        score, index = (found.cpu() for found in maps.flatten(2).max(-1))
        largest = torch.stack([index // maps.shape[3], index % maps.shape[3]], -1)
        self.scores.append(score.double())
        self.side = (int(maps.shape[2]), int(maps.shape[3]))
        if explainer.config.peak == "largest":
            self.cells.append(largest)
            return
        # Each is also kept as the other is read, so that like can be compared with like.
        centroid = explainer.places(maps.clamp(min=0)).cpu()  # an empty map's is cell (0, 0), as its largest cell is
        self.cells.append(centroid if own else largest)
        self.otherwise.append(largest if own else centroid)

    def peaks(self, receptive: ReceptiveField, *, otherwise: bool = False) -> Peaks:
        cells = torch.cat(self.otherwise if otherwise else self.cells)
        return peaks_from_cells(cells, torch.cat(self.scores), self.side, *grid_of(receptive))


class _Pass:
    """Photos streaming through performer and explainer.

    Where ``known`` has the performer's maps of all photos, by layer, these are read in the place of the photos, and
    nothing is said of where filters peak.
    """

    def __init__(
        self,
        performer: Performer,
        explainer: Explainer,
        images: ImageSet,
        advance: Callable[[int], None],
        known: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.performer, self.explainer, self.images, self.advance = performer, explainer.eval(), images, advance
        self.known, structure = known, explainer.structure
        self.head: nn.Module = performer_head(performer, structure)
        self.layers = {name: _Layer() for name in (("explainer", structure.tap, self.top) if known is None else ())}
        self.lost = {kind: {name: LostVariance() for name in structure.targets} for kind in get_args(FedIn)}
        self.before: Tensor | None = None
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

    def _maps(self, rows: Sequence[int], names: Sequence[str]) -> Iterator[Mapping[str, Tensor]]:
        """Yield the performer's maps of photos, a batch at a time."""
        if self.known is None:
            for batch in stream(self.performer, self.images, rows, names, batch_size=BATCH):
                yield batch.maps
                self.advance(len(batch.rows))
            return
        for first in range(0, len(rows), BATCH):
            part = np.asarray(rows[first : first + BATCH])
            yield {name: gather(self.known[name], part, self.explainer.device) for name in names}

    @torch.no_grad()
    def read(self, rows: Sequence[int], *, localise: bool = False) -> FedBack:
        """Return what both networks say of photos; keep where filters peak and what targets lose (``localise``)."""
        structure, kept = self.explainer.structure, []
        shown = (structure.tap, self.top) if localise and self.layers else ()
        names = list(dict.fromkeys([structure.read, *structure.targets, *shown]))
        for maps in self._maps(rows, names):
            tracks = self.explainer.normed_tracks(maps[structure.read])
            if localise:
                self._localise({**maps, "explainer": tracks.interp2})
            kept.append(self._fed_back(tracks, [maps[name] for name in structure.targets], lose=localise))
        # Outputs and features are joined apart, each over all batches.
        fed = {kind: (_joined(kept, kind, 0), _joined(kept, kind, 1)) for kind in self.lost}
        return FedBack(torch.cat([one.outputs for one in kept]), torch.cat([one.features for one in kept]), fed)

    def _fed_back(self, tracks: NormedTracks, targets: Sequence[Tensor], *, lose: bool) -> FedBack:
        """Feed each kind of what replaces the features of a batch back; count what the targets lose by it."""
        fed = {}
        for kind, decoded in fed_back(self.explainer, tracks, self.before).items():
            fed[kind] = (class_outputs(self.head(decoded[-1])[0]).cpu(), features_of(decoded[-1]).cpu())
            for lost, value, target in zip(self.lost[kind].values(), decoded, targets, strict=True):
                if lose:
                    lost.add(value, target)
        self.before = tracks.interpretable[-1:]
        return FedBack(class_outputs(self.head(targets[-1])[0]).cpu(), features_of(targets[-1]).cpu(), fed)

    @torch.no_grad()
    def follow(self, rows: Sequence[int]) -> None:
        """Keep how strongly filters activate on photos that decide which category they belong to."""
        structure = self.explainer.structure
        for maps in self._maps(rows, [structure.read, structure.tap, self.top]):
            own = {**maps, "explainer": self.explainer.interpret(maps[structure.read])[1]}
            for name, layer in self.layers.items():
                layer.follow(own[name])

    def _localise(self, maps: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.add(maps[name], self.explainer, own=name == "explainer")
            if self.regions is not None:
                self.regions.add(name, maps[name])

    def answers(self, rows: EvaluationRows, categories: Sequence[str], head: Head | None) -> Answers:
        """Read all photos that are needed."""
        images, columns = self.images, own_columns(self.performer, categories)
        known = PartRegions.of(images, rows.held, self.performer.preprocessing) if self.layers else None
        if known is not None:
            self.regions = RegionPass(known, list(self.layers), rows.labels, len(categories))
        if rows.train:
            self.follow(rows.train)
        return Answers(
            held=self.read(rows.held, localise=True),
            labels=rows.labels,
            photos=photo_numbers(images, [*rows.held, *rows.held_others]),
            columns=columns,
            others=self.read(rows.held_others) if rows.held_others else None,
            head=head,
            categories=len(categories),
        )

    def fidelity(self, answers: Answers, generator: torch.Generator, rounds: int) -> tuple[Fidelity, PartsAlone]:
        """Measure what is left of the performer with both tracks, and with the part filters alone."""
        fed = {
            kind: measure_fidelity(answers, kind, lost, generator=generator, rounds=rounds)
            for kind, lost in self.lost.items()
        }
        return fed.pop("reconstruction"), PartsAlone(**fed)

    def peaks(self, name: str, *, otherwise: bool = False) -> Peaks:
        """Return where a layer's filters peak; ``otherwise`` as the other networks' layers are read."""
        return self.layers[name].peaks(self.fields[name], otherwise=otherwise)

    def part_regions(
        self, roles: Mapping[str, str], assigned: Mapping[str, Tensor], on: MeasuredPhotos, seed: int
    ) -> PartInterpretability | None:
        if self.regions is None:
            return None
        # A cell of conv-interp-2 sees more than the tap's: the track's own convolutions widen it.
        fields = {**self.fields, "explainer": widened(self.fields["explainer"], TRACK_REACH_CELLS)}
        return self.regions.scores(fields, assigned, on.photos, roles, seed, on.rounds)

    def assigned(self, labels: Int[Tensor, " photo"], categories: int) -> dict[str, Int[Tensor, " filter"]]:
        """Return the category of each filter, by layer."""
        return {name: layer.assigned(labels, categories) for name, layer in self.layers.items()}


def _joined(kept: Sequence[FedBack], kind: FedIn, which: int) -> Tensor:
    return torch.cat([one.fed[kind][which] for one in kept])


def features_of(features: Tensor) -> Tensor:
    """Return a target's maps averaged over cells; vectors as they are."""
    return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


def evaluate_explainer(
    explainer: Explainer,
    frames: Frames,
    rows: EvaluationRows,
    data: EvaluatedData,
    shares: Sequence[float],
    *,
    lesson: Lesson | None = None,
    seed: int = 0,
    rounds: int = ROUNDS,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Evaluation, dict[str, Peaks]]:
    """Measure an explainer on held-out photos.

    Args:
        explainer: in eval mode.
        frames: the network it explains, and the data set.
        rows: which photos to use for what.
        data: what the record says of the photos; its categories are those of the explainer.
        shares: p of every seed, the kept explainer's first.
        lesson: what a head learns to tell the categories by, where the performer has no outputs for them.
        seed: of the nulls and the bootstrap.
        rounds: bootstrap rounds of the scores of peaks; those of fidelity have ten times as many.
        advance: called with the number of photos just done.

    Returns:
        The evaluation, and the peaks per layer (``explainer``, tap, top layer).
    """
    images, performer, categories = frames.images, frames.performer, data.categories
    stage = _Pass(performer, explainer, images, advance)
    own = own_columns(performer, categories)
    answers = stage.answers(rows, categories, logistic_head(*lesson) if lesson is not None and own is None else None)
    on = MeasuredPhotos.of(images, rows.held, performer, categories, rows.labels, seed=seed, rounds=rounds)
    assigned = stage.assigned(rows.train_labels, len(categories))
    roles = {"explainer": "explainer", "tap": explainer.structure.tap, "top": stage.top}

    def scores(role: str, *, otherwise: bool = False) -> LayerScores:
        name = roles[role]
        return measure_maps(on, stage.peaks(name, otherwise=otherwise), assigned[name])

    # One generator serves all bootstraps, so the order of what follows decides the intervals.
    peaks, grid = stage.peaks("explainer"), grid_of(stage.fields["explainer"])
    nulls, differences = measure_nulls(on, peaks, assigned["explainer"], grid)
    explained = scores("explainer")
    reconstruction, alone = stage.fidelity(answers, on.generator, 10 * rounds)
    truth = images.part_truth
    others: dict[OtherPeak, str] = {"explainer_largest": "explainer", "tap_centroid": "tap", "top_centroid": "top"}
    evaluation = Evaluation(
        data=data,
        landmarks=on.landmark_counts,
        explainer=explained,
        performer=PerformerScores(tap=scores("tap"), top=scores("top"), top_layer=stage.top),
        nulls=nulls,
        instability_minus_null=differences,
        same_peak={key: scores(role, otherwise=True) for key, role in others.items()}
        if explainer.config.peak == "centroid"
        else None,
        p=share_estimate(shares),
        reconstruction=reconstruction,
        parts_alone=alone,
        part_interpretability=stage.part_regions(roles, assigned, on, seed),
        filters={
            key: filter_scores(on, stage.peaks(roles[role]), assigned[roles[role]])
            for key, role in (("explainer", "explainer"), ("performer", "tap"))
        },
        warnings=_warnings_for(explained, reconstruction, data) + (() if truth is None else truth.warnings),
        versions=versions(),
    )
    return evaluation, {name: stage.peaks(name) for name in stage.layers}


def price_point(
    explainer: Explainer,
    performer: Performer,
    images: ImageSet,
    known: Mapping[str, np.ndarray],
    rows: EvaluationRows,
    categories: Sequence[str],
    head: Head | None,
) -> PricePoint:
    """Measure an explainer's p with what it and its part filters alone keep of the performer on held-out photos.

    ``known`` are the maps of all ``images`` at the explainer's tap and targets, by layer (image, filter, row, col);
    ``head`` tells the categories where the performer has no outputs for them.
    """
    stage = _Pass(performer, explainer, images, lambda _: None, known)
    answers = stage.answers(rows, categories, head)
    reconstruction, alone = stage.fidelity(answers, torch.Generator().manual_seed(explainer.config.seed), ROUNDS)
    return PricePoint(
        eta=explainer.config.eta, p=float(explainer.p.detach()), reconstruction=reconstruction, parts_alone=alone
    )


def _warnings_for(scores: LocalisationScores, fidelity: Fidelity, data: EvaluatedData) -> tuple[str, ...]:
    """Name the ways in which a low instability would mean nothing, or the scores would flatter."""
    # Undefined scores are nan, and every comparison with nan is false: they give no warning.
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
