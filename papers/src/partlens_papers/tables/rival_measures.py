"""Measure what is no explainer as an explainer is measured: rivals on the tap's maps, and interpretable CNNs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from partlens.metrics.scores import REGION_READINGS
from partlens.records import plain
from partlens_papers.tables.scores import LARGEST

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.estimate import Estimate
    from partlens.explainer.record import ExplainerStructure
    from partlens.metrics.localisation import Peaks
    from partlens.network.performer import Performer
    from partlens_papers.rivals.cells import Rival
    from partlens_papers.rivals.interpretable_cnn import InterpretableCNN

BATCH = 32


@dataclass
class MeasuredLayer:
    """What is collected of one way to explain the tap, batch by batch; of maps, the largest cells and centroids."""

    cells: list[Tensor] = field(default_factory=list)
    centroids: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    side: tuple[int, int] = (0, 0)
    wrong: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: {"held": [], "others": []})
    features: dict[str, list[Tensor]] = field(default_factory=lambda: {"held": [], "others": []})

    def add(self, maps: Tensor, power: float | None = None) -> None:
        """Take in the peaks of a batch of maps: largest cells and, with a power, centroids of the maps raised to it."""
        import torch

        from partlens.explainer.templates import centroid_cells

        score, index = maps.flatten(2).max(-1)
        self.cells.append(torch.stack([index // maps.shape[3], index % maps.shape[3]], -1))
        if power is not None:
            self.centroids.append(centroid_cells(maps, power))
        self.scores.append(score)
        self.side = (int(maps.shape[2]), int(maps.shape[3]))

    def peaks(self, start_px: tuple[float, float], stride_px: tuple[float, float], power: float | None = None) -> Peaks:
        """Return all peaks in input pixels: with a power, the centroids."""
        import torch

        from partlens.metrics.localisation import peaks_from_cells

        cells = torch.cat(self.cells if power is None else self.centroids)
        return peaks_from_cells(cells, torch.cat(self.scores), self.side, start_px, stride_px)


@dataclass(frozen=True)
class RivalBench:
    """The performer around its tap: what rivals are measured with.

    Attributes:
        performer: the network, borrowed.
        structure: tap and targets of the explainer that the rivals are compared with.
        decoder: the performer's own layers from the tap to the targets.
        head: its layers after the last target.
        power: rivals' maps peak at centroids with this power, where the explainer's do, and their largest cells are
            measured beside (``NAME_largest``); ``None`` for largest cells alone.
    """

    performer: Performer
    structure: ExplainerStructure
    decoder: nn.Module
    head: nn.Module
    power: float | None = None

    @staticmethod
    def of(performer: Performer, structure: ExplainerStructure, power: float | None = None) -> RivalBench:
        """Cut the performer at tap and targets."""
        from partlens.explainer.network import performer_head

        decoder = performer.upper(structure.tap, structure.targets).cpu().float().requires_grad_(requires_grad=False)
        return RivalBench(performer, structure, decoder, performer_head(performer, structure), power)


def _as_vector(features: Tensor) -> Tensor:
    return features.mean((2, 3)) if features.dim() == 4 else features.flatten(1)


def measure_rivals(
    bench: RivalBench,
    rivals: Mapping[str, Rival],
    images: ImageSet,
    rows: Mapping[str, Sequence[int]],
    *,
    category: str | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Measure other ways to explain a tap with the explainer's own measures.

    A rival's maps give peaks, its reconstruction of the tap goes through the performer's own upper layers. So its
    figures are of the same photos, landmarks, targets and outputs as those of an evaluation.

    Args:
        bench: performer, tap and targets.
        rivals: name to rival; each gives ``maps`` and ``reconstruct`` of the tap's maps.
        images: the photos.
        rows: positions of the ``held`` photos of the category, on which everything is measured, and of
            ``held_others``, ``train`` and ``train_others``, which the error increase needs (see
            :class:`~partlens.evaluation.explainer_evaluation.EvaluationRows`); any of the last three may be empty.
        category: of the held photos; where the performer has an output of that name, errors are its own, as in an
            evaluation, else those of a logistic head on the last target.
        seed: of the bootstrap.

    Returns:
        By name: the scores of :func:`~partlens.metrics.localisation.localisation_scores`, ``variance_explained`` of the
        last target (1 is perfect, 0 what the mean over photos gives, below 0 is worse), ``agreement_top1``, and, with
        all rows, ``error_increase_points``.
    """
    import torch

    from partlens.estimate import Estimate, bootstrap
    from partlens.evaluation.part_regions import PartRegions, RegionPass
    from partlens.evaluation.places import landmarks_in_input, photo_numbers
    from partlens.metrics.faithfulness import LostVariance, agreement_top1, class_outputs
    from partlens.metrics.localisation import localisation_scores
    from partlens.network.receptive_field import grid_of
    from partlens.network.taps import forward_taps

    performer, structure = bench.performer, bench.structure
    last = structure.targets[-1]
    measured = {name: MeasuredLayer() for name in rivals}
    regions = PartRegions.of(images, rows["held"], performer.preprocessing)
    met = None if regions is None else RegionPass(regions, list(rivals), _together(rows["held"]))
    own = LostVariance()  # for the scatter of the target over photos
    own_outputs: dict[str, list[Tensor]] = {"held": [], "others": []}
    own_features: dict[str, list[Tensor]] = {name: [] for name in ("held", "held_others", "train", "train_others")}
    for part, features in own_features.items():
        chosen = rows.get(part, ())
        for start in range(0, len(chosen), BATCH):
            batch = performer.preprocessing([images.read(row) for row in chosen[start : start + BATCH]])
            with torch.no_grad():
                _, taps = forward_taps(performer, batch, list(dict.fromkeys([structure.tap, last])))
                maps, target = taps[structure.tap].cpu().float(), taps[last].cpu().float()
                features.append(_as_vector(target))
                if part.startswith("train"):
                    continue
                side = "held" if part == "held" else "others"
                own_outputs[side].append(class_outputs(bench.head(target)[0]))
                if part == "held":
                    own.add(target, target)
                for name, rival in rivals.items():
                    into = measured[name]
                    fed = bench.decoder(rival.reconstruct(maps))[-1]
                    into.features[side].append(_as_vector(fed))
                    into.outputs[side].append(class_outputs(bench.head(fed)[0]))
                    if part != "held":
                        continue
                    units = rival.maps(maps)
                    into.add(units, bench.power)
                    if met is not None:
                        met.add(name, units)
                    into.wrong.append((fed - target).double().square().flatten(1).sum(1))
    held = list(rows["held"])
    both = photo_numbers(images, [*held, *rows.get("held_others", ())])
    names, landmarks = landmarks_in_input(images, held, performer)
    tap_field = performer.field(structure.tap)
    groups, grid = photo_numbers(images, held), grid_of(tap_field)
    fields, roles = dict.fromkeys(rivals, tap_field), {name: name for name in rivals}
    interpretability = None if met is None else met.scores(fields, {}, groups, roles, seed)
    scatter = own.scatter / max(own.count, 1)

    def located(found: MeasuredLayer, power: float | None, generator: torch.Generator) -> dict[str, Any]:
        places = localisation_scores(
            found.peaks(*grid, power),
            landmarks,
            performer.preprocessing.size_px,
            landmark_names=names,
            photos=groups,
            generator=generator,
        )
        return dict(plain(places))

    results: dict[str, dict[str, Any]] = {}
    for name, found in measured.items():
        generator = torch.Generator().manual_seed(seed)
        scores = located(found, bench.power, generator)
        wrong = torch.cat(found.wrong)
        explained = (
            Estimate.undefined()
            if scatter <= 0
            else bootstrap(
                lambda i, wrong=wrong: 1 - float(wrong[i].mean()) / scatter,  # type: ignore[misc]
                len(held),
                generator=generator,
                rounds=1000,
                groups=groups,
            )
        )
        scores |= {
            "variance_explained": explained.to_dict(),
            "agreement_top1": agreement_top1(
                torch.cat(found.outputs["held"]), torch.cat(own_outputs["held"]), groups
            ).to_dict(),
        }
        if all(own_features.values()):
            errors = _errors(
                performer, category, own_outputs, found.outputs, own_features, found.features, both, generator
            )
            scores["error_increase_points"] = errors["error_increase_points"].to_dict()
        if interpretability is not None:
            scores |= {
                f"regions_{reading}": plain(interpretability.readings[reading].layers[name])
                for reading in REGION_READINGS
            }
        results[name] = scores
        if bench.power is not None:
            results[f"{name}{LARGEST}"] = located(found, None, generator)
    return results


def _together(rows: Sequence[int]) -> Tensor:
    """Return that all photos count as one category."""
    import torch

    return torch.zeros(len(rows), dtype=torch.long)


def _errors(
    performer: Performer,
    category: str | None,
    own_outputs: Mapping[str, Sequence[Tensor]],
    fed_outputs: Mapping[str, Sequence[Tensor]],
    own_features: Mapping[str, Sequence[Tensor]],
    fed_features: Mapping[str, Sequence[Tensor]],
    photos: Tensor,
    generator: torch.Generator,
) -> dict[str, Estimate]:
    """Return errors of category against background, as an evaluation does: by the performer's own output, or by a head.

    Outputs and fed features have the parts ``held`` and ``others``, the performer's features ``held``, ``held_others``,
    ``train`` and ``train_others``; ``photos`` has an integer per row of ``held`` and
    ``held_others``, equal for crops of one photo.
    """
    import torch

    from partlens.evaluation.fidelity import own_columns
    from partlens.metrics.faithfulness import decision_errors, logistic_head

    def labels(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.ones(sum(map(len, first))), torch.zeros(sum(map(len, second)))]).long()

    truth = labels(own_features["held"], own_features["held_others"])
    columns = None if category is None else own_columns(performer, [category])
    if columns is not None:
        own, fed = (
            (torch.cat([*found["held"], *found["others"]]).argmax(1) == columns[0]).long()
            for found in (own_outputs, fed_outputs)
        )
        return decision_errors(own, fed, truth, photos=photos, generator=generator)
    head = logistic_head(
        torch.cat([*own_features["train"], *own_features["train_others"]]),
        labels(own_features["train"], own_features["train_others"]),
    )
    own = head(torch.cat([*own_features["held"], *own_features["held_others"]]))
    fed = head(torch.cat([*fed_features["held"], *fed_features["others"]]))
    return decision_errors(own, fed, truth, photos=photos, generator=generator)


def measure_interpretable(
    network: InterpretableCNN,
    performer: Performer,
    structure: ExplainerStructure,
    images: ImageSet,
    rows: Mapping[str, Sequence[int]],
    category: str,
    seed: int,
) -> dict[str, Any]:
    """Measure the inserted layer where an explainer's would be, and the error of the output."""
    import torch

    from partlens.estimate import Estimate, proportion
    from partlens.evaluation.part_regions import PartRegions, RegionPass
    from partlens.evaluation.places import NULL_FILTERS, landmarks_in_input, photo_numbers, top_layer
    from partlens.explainer.network import performer_head
    from partlens.metrics.faithfulness import class_outputs
    from partlens.metrics.localisation import localisation_scores, null_peaks
    from partlens.network.receptive_field import grid_of, widened
    from partlens.network.taps import forward_taps

    top, last = top_layer(performer), structure.targets[-1]
    layers = {"interpretable": MeasuredLayer(), "top": MeasuredLayer()}
    regions = PartRegions.of(images, rows["held"], performer.preprocessing)
    met = None if regions is None else RegionPass(regions, list(layers), _together(rows["held"]))
    head = performer_head(performer, structure)
    logits: dict[str, list[Tensor]] = {"held": [], "others": []}
    outputs: dict[str, list[Tensor]] = {"held": [], "others": []}
    features: dict[str, list[Tensor]] = {part: [] for part in rows}
    for part, chosen in rows.items():
        for start in range(0, len(chosen), BATCH):
            batch = performer.preprocessing([images.read(row) for row in chosen[start : start + BATCH]])
            with torch.no_grad():
                _, taps = forward_taps(performer, batch, list(dict.fromkeys([structure.tap, last, top])))
            tapped, target = taps[structure.tap].cpu().float(), taps[last].cpu().float()
            features[part].append(_as_vector(target))
            if part.startswith("held"):
                side = "held" if part == "held" else "others"
                logits[side].append(network.outputs(tapped)[:, 0])
                with torch.no_grad():
                    outputs[side].append(class_outputs(head(target)[0]))
            if part == "held":
                for name, maps in (("interpretable", network.maps(tapped)), ("top", taps[top].cpu().float())):
                    layers[name].add(maps)
                    if met is not None:
                        met.add(name, maps)
    held = list(rows["held"])
    names, landmarks = landmarks_in_input(images, held, performer)
    groups, size = photo_numbers(images, held), performer.preprocessing.size_px
    generator = torch.Generator().manual_seed(seed)
    # The inserted convolution of 3x3 cells reaches one cell further on every side.
    fields = {"interpretable": widened(performer.field(structure.tap), 1)}
    fields["top"] = performer.field(top)
    grids = {name: grid_of(of) for name, of in fields.items()}
    grid = grids["interpretable"]

    def scores(of: Peaks, *, fixed: bool = False) -> dict[str, Any]:
        found = localisation_scores(
            of, landmarks, size, landmark_names=names, photos=groups, generator=generator, fixed_null=fixed
        )
        return dict(plain(found))

    measured = {name: scores(layer.peaks(*grids[name])) for name, layer in layers.items()}
    nulls = {
        kind: scores(
            null_peaks(
                kind,
                len(held),
                structure.side_cells,
                *grid,
                input_size_px=size,
                filters=NULL_FILTERS,
                generator=generator,
            ),
            fixed=kind != "random",
        )
        for kind in ("random", "centre", "corner")
    }
    found: dict[str, Any] = {
        "photos": len(held),
        "interpretable": measured["interpretable"],
        "performer": {"top": measured["top"], "top_layer": top},
        "nulls": nulls,
    }
    if met is not None:
        found["part_interpretability"] = plain(met.scores(fields, {}, groups, {name: name for name in layers}, seed))
    if all(len(chosen) for chosen in rows.values()):
        own, other = torch.cat(logits["held"]), torch.cat(logits["others"])
        both = photo_numbers(images, [*held, *rows["held_others"]])
        wrong = proportion(torch.cat([own <= 0, other > 0]).double(), groups=both)
        interval = (100 * wrong.interval[0], 100 * wrong.interval[1])
        same = {"held": features["held"], "others": features["held_others"]}
        ordinary = _errors(performer, category, outputs, outputs, features, same, both, generator)
        found["error_percent"] = Estimate(100 * wrong.value, interval, wrong.n).to_dict()
        found["performer_error_percent"] = ordinary["performer_error_percent"].to_dict()
    return found
