"""The jobs of the explainer tables: train a performer, explain it, measure its rivals, train an interpretable CNN.

Each function takes a :class:`~partlens.experiments.sweep.Job` and its folder, keeps everything it makes there, goes on
where it was stopped, and returns plain values.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.pipeline.runs import category_rows, loaded, opened, sampled
from partlens.store import read_json
from partlens.vocabulary import InputError, expected, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.experiments.sweep import Job
    from partlens.explainer.network import ExplainerStructure
    from partlens.metrics.faithfulness import HeadErrors
    from partlens.metrics.localisation import Peaks
    from partlens.performer.zoo import Performer
    from partlens.rivals.cells import Rival
    from partlens.rivals.interpretable_cnn import InterpretableCNN

MODULE = "partlens.experiments.explainer_jobs"
TRAINED = "train:"
"""Prefix of a performer that is trained on each category before it is explained."""

BATCH = 32
EXPLAINER, CLASSIFIED, RIVALS, TRAINING = "explainer", "explainer-cls", "rivals", "performer"
"""Kinds of jobs; those of interpretable CNNs are called ``icnn-published`` and ``icnn-released``."""


# Photos


@cache
def open_photos(data: str) -> ImageSet:
    """Return the readable photos of a data set; the same one again costs nothing."""
    from partlens.data.images import ImageSet

    return opened(ImageSet.open(Path(data)))[0]


def photos_of(job: Job) -> ImageSet:
    """Return the photos of a job."""
    return open_photos(job.places["data"])


def performer_spec(job: Job) -> str:
    """Return how to load a job's performer, with an absolute path."""
    return str(job.places["spec"])


def job_device() -> str:
    """Return where a job's networks are trained: the GPU that its process sees, or the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# Training a performer


def train(job: Job, folder: Path) -> dict[str, Any]:
    """Train a performer on one category, by the recipe of ``train-performer``."""
    from partlens.pipeline.performer_run import train_performer

    out = Path(job.places["weights"])
    out.parent.mkdir(parents=True, exist_ok=True)
    train_performer(
        job.places["base"],
        photos_of(job),
        out=out,
        category=job.category,
        config={"seed": job.seed, **job.settings["train"]},
        device=job_device(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    trained = loaded(performer_spec(job))
    return {"weights_sha256": trained.weights_sha256, "notes": list(trained.notes)}


# An explainer


@dataclass(frozen=True)
class _Choice:
    """What is tapped and reconstructed, and what the papers change for this network."""

    tap: str | None
    targets: tuple[str, ...] | None
    changes: Mapping[str, Any]
    note: str


def choose_layers(performer: Performer, settings: Mapping[str, Any]) -> _Choice:
    """Find tap, targets and eta: the papers' with ``preset: paper``, ours otherwise; what is named comes first."""
    named = settings.get("targets")
    tap, targets = settings.get("tap"), None if named is None else tuple(named)
    if settings["preset"] != "paper":
        return _Choice(tap, targets, {}, "")
    from partlens.performer.papers import paper_setting

    setting = paper_setting(performer)
    if setting is None:
        return _Choice(tap, targets, {}, "the papers did not study this network; its default tap is used")
    if tap is not None and tap != setting.tap:
        return _Choice(tap, targets, {"eta": setting.eta}, f"the papers tap {setting.tap}")
    return _Choice(setting.tap, targets or setting.targets, {"eta": setting.eta}, setting.note)


def explain(job: Job, folder: Path) -> dict[str, Any]:
    """Fit an explainer with one seed and measure it on held-out photos."""
    from partlens.pipeline import evaluate, fit_explainer

    settings, images = job.settings, photos_of(job)
    spec = performer_spec(job)
    chosen = choose_layers(loaded(spec), settings)
    run = folder / job.kind
    fitted = fit_explainer(
        spec,
        images,
        out=run,
        category=job.category,
        tap=chosen.tap,
        targets=chosen.targets,
        preset=settings["preset"],
        config={**chosen.changes, **settings["explainer"], "seed": job.seed},
        seeds=1,
        background=settings["background"],
        device=job_device(),
    )
    found = evaluate(run, images, split=settings["split"], seed=job.seed, gallery="none")
    manifest = fitted.manifest
    return {
        "network": manifest["performer"]["name"],
        "weights_sha256": manifest["performer"]["weights_sha256"],
        "structure": manifest["structure"],
        "epochs": len(fitted.history),
        "device": job_device(),
        "note": chosen.note,
        "photos": {"train": manifest["data"]["train_photos"], "background": manifest["data"]["background_photos"]},
        "evaluation": {name: value for name, value in found.items() if name != "filters"},
    }


# Rivals


@dataclass
class _Measured:
    """What is collected of one way to explain the tap, batch by batch."""

    cells: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    side: tuple[int, int] = (0, 0)
    wrong: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: {"held": [], "others": []})
    features: dict[str, list[Tensor]] = field(default_factory=lambda: {"held": [], "others": []})

    def add(self, maps: Tensor, power: float | None = None) -> None:
        """Take in the peaks of a batch of maps: largest cells, or centroids of the maps raised to a power."""
        import torch

        from partlens.explainer.templates import centroid_cells

        score, index = maps.flatten(2).max(-1)
        largest = torch.stack([index // maps.shape[3], index % maps.shape[3]], -1)
        self.cells.append(largest if power is None else centroid_cells(maps, power))
        self.scores.append(score)
        self.side = (int(maps.shape[2]), int(maps.shape[3]))

    def peaks(self, start_px: tuple[float, float], stride_px: tuple[float, float]) -> Peaks:
        """Return all peaks in input pixels."""
        import torch

        from partlens.metrics.localisation import peaks_from_cells

        return peaks_from_cells(torch.cat(self.cells), torch.cat(self.scores), self.side, start_px, stride_px)


@dataclass(frozen=True)
class RivalBench:
    """The performer around its tap: what rivals are measured with.

    Attributes:
        performer: the network, borrowed.
        structure: tap and targets of the explainer that the rivals stand beside.
        decoder: the performer's own layers from the tap to the targets.
        head: its layers after the last target.
        power: rivals' maps peak at centroids with this power, where the explainer's do; ``None`` for largest cells.
    """

    performer: Performer
    structure: ExplainerStructure
    decoder: nn.Module
    head: nn.Module
    power: float | None = None

    @staticmethod
    def of(performer: Performer, structure: ExplainerStructure, power: float | None = None) -> RivalBench:
        """Cut the performer at tap and targets."""
        from partlens.explainer.assembly import performer_head, reference_decoder

        decoder, head = reference_decoder(performer, structure), performer_head(performer, structure)
        return RivalBench(performer, structure, decoder, head, power)


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
    batch_size: int = BATCH,
) -> dict[str, dict[str, Any]]:
    """Measure other ways to explain a tap with the explainer's own measures.

    A rival's maps give peaks, its reconstruction of the tap goes through the performer's own upper layers. So its
    figures stand on the same photos, landmarks, targets and outputs as those of an evaluation.

    Args:
        bench: performer, tap and targets.
        rivals: name to rival; each gives ``maps`` and ``reconstruct`` of the tap's maps.
        images: the photos.
        rows: positions of the ``held`` photos of the category, on which everything is measured, and of
            ``held_others``, ``train`` and ``train_others``, which the error increase needs (see
            :class:`~partlens.evaluation.EvaluationRows`); any of the last three may be empty.
        category: of the held photos; where the performer has an output of that name, errors are its own, as in an
            evaluation, else those of a logistic head on the last target.
        seed: of the bootstrap.
        batch_size: photos at a time.

    Returns:
        By name: the scores of :func:`~partlens.metrics.localisation.localisation_scores`, ``variance_explained`` of the
        last target (1 is perfect, 0 what the mean over photos gives, below 0 is worse), ``agreement_top1``, and, with
        all rows, ``error_increase_points``.
    """
    import torch

    from partlens.evaluation import class_outputs, grid_of, landmarks_in_input, photo_numbers
    from partlens.metrics.estimate import Estimate, bootstrap
    from partlens.metrics.faithfulness import ReconstructionSums, agreement_top1
    from partlens.metrics.localisation import localisation_scores
    from partlens.performer.receptive_field import receptive_field
    from partlens.performer.taps import forward_taps

    performer, structure = bench.performer, bench.structure
    last = structure.targets[-1]
    measured = {name: _Measured() for name in rivals}
    own = ReconstructionSums()  # for the scatter of the target over photos
    own_outputs: dict[str, list[Tensor]] = {"held": [], "others": []}
    own_features: dict[str, list[Tensor]] = {name: [] for name in ("held", "held_others", "train", "train_others")}
    for part, features in own_features.items():
        chosen = rows.get(part, ())
        for start in range(0, len(chosen), batch_size):
            batch = performer.preprocessing([images.read(row) for row in chosen[start : start + batch_size]])
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
                    into.add(rival.maps(maps), bench.power)
                    into.wrong.append((fed - target).double().square().flatten(1).sum(1))
    held = list(rows["held"])
    names, landmarks = landmarks_in_input(images, held, performer)
    groups, grid = photo_numbers(images, held), grid_of(receptive_field(performer, structure.tap))
    scatter = own.scatter / max(own.count, 1)
    results: dict[str, dict[str, Any]] = {}
    for name, found in measured.items():
        generator = torch.Generator().manual_seed(seed)
        scores = localisation_scores(
            found.peaks(*grid),
            landmarks,
            performer.preprocessing.size_px,
            landmark_names=names,
            photos=groups,
            generator=generator,
        ).to_dict()
        wrong = torch.cat(found.wrong)
        explained = (
            Estimate.undefined()
            if scatter <= 0
            else bootstrap(
                lambda i, wrong=wrong: 1 - float(wrong[i].mean()) / scatter,  # type: ignore[misc]
                len(held),
                generator=generator,
                rounds=1000,
            )
        )
        scores |= {
            "variance_explained": explained.to_dict(),
            "agreement_top1": agreement_top1(
                torch.cat(found.outputs["held"]), torch.cat(own_outputs["held"])
            ).to_dict(),
        }
        if all(own_features.values()):
            errors = _errors(performer, category, own_outputs, found.outputs, own_features, found.features, generator)
            scores["error_increase_points"] = errors.error_increase_points.to_dict()
        results[name] = scores
    return results


def _errors(
    performer: Performer,
    category: str | None,
    own_outputs: Mapping[str, Sequence[Tensor]],
    fed_outputs: Mapping[str, Sequence[Tensor]],
    own_features: Mapping[str, Sequence[Tensor]],
    fed_features: Mapping[str, Sequence[Tensor]],
    generator: torch.Generator,
) -> HeadErrors:
    """Return errors of category against background, as an evaluation does: by the performer's own output, or by a head.

    Outputs and fed features have the parts ``held`` and ``others``, the performer's features those of
    :class:`~partlens.evaluation.EvaluationRows`.
    """
    import torch

    from partlens.evaluation import own_columns
    from partlens.metrics.faithfulness import category_error_increase, decision_errors

    def labels(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        return torch.cat([torch.ones(sum(map(len, first))), torch.zeros(sum(map(len, second)))]).long()

    truth = labels(own_features["held"], own_features["held_others"])
    columns = None if category is None else own_columns(performer, [category])
    if columns is not None:
        own, fed = (
            (torch.cat([*found["held"], *found["others"]]).argmax(1) == columns[0]).long()
            for found in (own_outputs, fed_outputs)
        )
        return decision_errors(own, fed, truth, generator=generator)
    return category_error_increase(
        torch.cat([*own_features["train"], *own_features["train_others"]]),
        labels(own_features["train"], own_features["train_others"]),
        torch.cat([*own_features["held"], *own_features["held_others"]]),
        torch.cat([*fed_features["held"], *fed_features["others"]]),
        truth,
        generator=generator,
    )


RIVAL_SETTINGS: dict[str, Any] = {
    "methods": ["nmf", "kmeans", "topk-sae"],
    "units": [32, "filters"],
    "background": 0,
    "options": {},
}
"""Rivals that are fitted, with how many units (``filters``: as many as the explainer has), on how many photos of the
background beside the category's (concept methods are fitted on the category alone), and options by method."""

RIVAL_NAMES = {"nmf": "NMF", "kmeans": "k-means", "topk-sae": "TopK SAE"}


def _fitters() -> dict[str, Any]:
    from partlens.rivals.factors import fit_kmeans, fit_nmf
    from partlens.rivals.sparse import fit_topk_sae

    return {"nmf": fit_nmf, "kmeans": fit_kmeans, "topk-sae": fit_topk_sae}


def _evaluation_rows(images: ImageSet, category: str, split: str, seed: int) -> dict[str, list[int]]:
    """Return the photos that :func:`partlens.evaluate` takes for the same category, split and seed."""
    held, held_others = category_rows(images, category, split)
    train_rows, train_others = category_rows(images, category, "train")
    most = 3 * max(len(train_rows), len(held))
    return {
        "held": list(held),
        "held_others": sampled(held_others, most, seed),
        "train": list(train_rows),
        "train_others": sampled(train_others, most, seed),
    }


def compare(job: Job, folder: Path) -> dict[str, Any]:
    """Fit the rivals on the tap's maps of the explainer's training photos and measure them beside it."""
    from partlens.explainer.config import ExplainerConfig
    from partlens.explainer.network import ExplainerStructure
    from partlens.performer.activations import open_maps, stream_maps

    settings = RIVAL_SETTINGS | dict(job.settings["rivals"])
    images, performer = photos_of(job), loaded(performer_spec(job))
    manifest = read_json(folder / EXPLAINER / "run.json")
    values, how = manifest["structure"], ExplainerConfig.from_dict(manifest["config"])
    structure = ExplainerStructure(
        **{**values, "targets": tuple(values["targets"]), "side_cells": tuple(values["side_cells"])}
    )
    power = how.peak_power if how.peak == "centroid" else None  # rivals are read as the explainer is
    fitters = _fitters()
    strange = [name for name in settings["methods"] if name not in fitters]
    if strange:
        rule = f"rivals among {', '.join(fitters)}"
        raise InputError(expected(rule, strange[0], f"Did you mean {nearest(strange[0], fitters)[0]}?"))
    photos, others = category_rows(images, job.category, "train")
    rows = [*photos, *sampled(others, int(settings["background"]), job.seed)]
    cached = folder / "rivals-maps"
    stream_maps(performer, images.take(rows), [structure.tap], cached)
    maps = open_maps(cached)[structure.tap]
    fitted: dict[str, Any] = {}
    for method in settings["methods"]:
        for units in settings["units"]:
            count = structure.channels_out if units == "filters" else int(units)
            options = settings["options"].get(method, {})
            name = f"{RIVAL_NAMES[method]}, {count} units"
            fitted[name] = fitters[method](maps, count, seed=job.seed, **options)
    split = job.settings["split"]
    measured = measure_rivals(
        RivalBench.of(performer, structure, power),
        fitted,
        images,
        _evaluation_rows(images, job.category, split, job.seed),
        category=job.category,
        seed=job.seed,
    )
    shutil.rmtree(cached)
    return {"rivals": measured, "peak": how.peak, "fit_photos": len(rows), "background": len(rows) - len(photos)}


# Interpretable CNNs


def interpret(job: Job, folder: Path) -> dict[str, Any]:
    """Train an interpretable CNN on one category and measure it beside the performer and the nulls.

    The layers below the tap stay as they are, see :mod:`partlens.rivals.interpretable_cnn`.
    """
    from partlens.explainer.assembly import explainer_structure
    from partlens.performer.taps import default_tap
    from partlens.rivals.interpretable_cnn import InterpretableConfig, build_interpretable_cnn
    from partlens.rivals.interpretable_training import labelled_maps, train_interpretable_cnn
    from partlens.store import write_tensors

    settings, images, performer = job.settings, photos_of(job), loaded(performer_spec(job))
    chosen = choose_layers(performer, settings)
    tap = chosen.tap or performer.default_tap or default_tap(performer)
    photos, others = category_rows(images, job.category, "train")
    example = performer.preprocessing([images.read(photos[0])])
    structure = explainer_structure(performer, example, tap, chosen.targets)
    config = InterpretableConfig(**{"method": settings["loss"], "seed": job.seed, **settings["icnn"]})
    run = folder / job.kind
    rows = [*photos, *sampled(others, settings["background"], job.seed)]
    maps = labelled_maps(performer, images.take(rows), [job.category], structure.tap, run / "maps")
    network = build_interpretable_cnn(performer, structure, config, 1)
    history = train_interpretable_cnn(network, maps, run).history
    write_tensors(run / "network.safetensors", network.state_dict())
    held = _evaluation_rows(images, job.category, settings["split"], job.seed)
    found = _measure_interpretable(network, performer, structure, images, held, job.category, job.seed)
    del maps
    shutil.rmtree(run / "maps")
    return {
        "network": performer.name,
        "weights_sha256": performer.weights_sha256,
        "structure": structure.to_dict(),
        "config": config.to_dict(),
        "epochs": len(history),
        "note": chosen.note,
        "evaluation": found,
    }


def _measure_interpretable(
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

    from partlens.evaluation import (
        NULL_FILTERS,
        class_outputs,
        grid_of,
        landmarks_in_input,
        photo_numbers,
        top_layer,
    )
    from partlens.explainer.assembly import performer_head
    from partlens.metrics.estimate import Estimate, proportion
    from partlens.metrics.localisation import localisation_scores, null_peaks
    from partlens.performer.receptive_field import receptive_field
    from partlens.performer.taps import forward_taps

    top, last = top_layer(performer), structure.targets[-1]
    layers = {"interpretable": _Measured(), "top": _Measured()}
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
                layers["interpretable"].add(network.maps(tapped))
                layers["top"].add(taps[top].cpu().float())
    held = list(rows["held"])
    names, landmarks = landmarks_in_input(images, held, performer)
    groups, size = photo_numbers(images, held), performer.preprocessing.size_px
    generator = torch.Generator().manual_seed(seed)
    grid = grid_of(receptive_field(performer, structure.tap))
    grids = {"interpretable": grid, "top": grid_of(receptive_field(performer, top))}

    def scores(of: Peaks, *, fixed: bool = False) -> dict[str, Any]:
        found = localisation_scores(
            of, landmarks, size, landmark_names=names, photos=groups, generator=generator, fixed_null=fixed
        )
        return found.to_dict()

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
    if all(len(chosen) for chosen in rows.values()):
        own, other = torch.cat(logits["held"]), torch.cat(logits["others"])
        wrong = proportion(torch.cat([own <= 0, other > 0]).double())
        interval = (100 * wrong.interval[0], 100 * wrong.interval[1])
        same = {"held": features["held"], "others": features["held_others"]}
        ordinary = _errors(performer, category, outputs, outputs, features, same, generator)
        found["error_percent"] = Estimate(100 * wrong.value, interval, wrong.n).to_dict()
        found["performer_error_percent"] = ordinary.performer_error_percent.to_dict()
    return found
