"""The jobs of the explainer tables: train a performer, explain it, measure its rivals, train an interpretable CNN.

Each function takes a :class:`~partlens_papers.tables.jobs.Job`, its folder and where to show progress, keeps everything
it makes in the folder, goes on where it was stopped, and returns its scores and further facts.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from partlens.errors import BACKGROUND, RunError, expected
from partlens.records import Settings, plain
from partlens.run import EXPLAINER as RUN
from partlens.verbs import runs
from partlens.verbs.runs import loaded, sampled
from partlens_papers.given import settings_of
from partlens_papers.tables.jobs import Job, Made
from partlens_papers.tables.scores import Score, estimate_of, scores_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from partlens.data.images import ImageSet
    from partlens.explainer.record import ExplainerStructure
    from partlens.network.performer import Performer
    from partlens.progress import Progress
    from partlens_papers.networks.settings import PublishedChoice
    from partlens_papers.rivals.cells import Rival

MODULE = "partlens_papers.tables.explainer_jobs"
TRAINED = "train:"
"""Prefix of a performer that is trained on each category before it is explained."""

EXPLAINER, CLASSIFIED, RIVALS, TRAINING = "explainer", "explainer-cls", "rivals", "performer"
LOSSES = ("published", "released")
"""Kinds of jobs; those of interpretable CNNs are called ``icnn-LOSS``."""

_OPENED: dict[tuple[str, str], ImageSet] = {}
"""The photos opened last in this process, by path and fingerprint: the jobs of a sweep share them."""


class RivalsConfig(Settings):
    """Rivals of an explainer on the same maps.

    Attributes:
        methods: which.
        units: how many units each has; ``filters``: as many as the explainer has.
        background: photos of the background that they are fitted on with the category's (concept methods are fitted on
            the category alone).
        options: arguments of the fit, by method.
    """

    methods: tuple[Literal["nmf", "kmeans", "topk-sae"], ...] = ("nmf", "kmeans", "topk-sae")
    units: tuple[int | Literal["filters"], ...] = (32, "filters")
    background: int = 0
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)


def open_photos(data: str) -> ImageSet:
    """Open the readable photos of a data set, and keep them for :func:`photos_of`."""
    images = runs.open_photos(data)[0]
    _OPENED.clear()
    _OPENED[data, images.fingerprint()] = images
    return images


def photos_of(job: Job) -> ImageSet:
    """Return the photos of a job; those that this process has opened already cost nothing.

    Raises:
        RunError: the photos at the job's path are no longer those it was planned for.
    """
    place, wanted = str(job.places["data"]), str(job.settings["data"])
    if (place, wanted) not in _OPENED:
        found = open_photos(place).fingerprint()
        if found != wanted:
            rule, got = f"the photos {wanted[:12]} at {place}", f"others ({found[:12]})"
            raise RunError(expected(rule, got, "Make the table again from these"))
    images = _OPENED[place, wanted]
    if job.settings.get("against") != BACKGROUND:
        return images
    kept = {*(job.settings.get("joint") or (job.category,)), BACKGROUND}
    return images.take([row for row, name in enumerate(images.categories) if name in kept])


def performer_of(job: Job, spec: str = "spec") -> Performer:
    """Load a job's performer; what the papers' VGG-16 has in common for all categories is computed once."""
    from partlens_papers.networks.remembered import remembering

    return remembering(loaded(str(job.places[spec])), Path(job.places["maps"]))


def job_device() -> str:
    """Return where a job's networks are trained: the GPU that its process sees, or the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


# Training a performer


def train(job: Job, folder: Path, progress: Progress) -> Made:  # noqa: ARG001 -- every job gets its folder
    """Train a performer on one category, or on several together, by the recipe of ``train-performer``."""
    from partlens_papers.networks.train_performer import train_performer

    out = Path(job.places["weights"])
    out.parent.mkdir(parents=True, exist_ok=True)
    joint = job.settings.get("joint")
    train_performer(
        performer_of(job, "base"),
        photos_of(job),
        out=out,
        category=None if joint else job.category,
        categories=joint,
        config={"seed": job.seed, **job.settings["train"]},
        device=job_device(),
        progress=progress,
    )
    trained = performer_of(job)
    return (), {"weights_sha256": trained.weights_sha256, "notes": list(trained.notes)}


# An explainer


def choose_layers(performer: Performer, settings: Mapping[str, Any]) -> PublishedChoice:
    """Find tap, targets and eta: the papers' with ``preset: paper``, ours otherwise; what is named comes first."""
    from partlens_papers.networks.settings import PublishedChoice, as_published

    named = settings.get("targets")
    tap, targets = settings.get("tap"), None if named is None else tuple(named)
    if settings["preset"] != "paper":
        return PublishedChoice(tap, targets, None, "")
    return as_published(performer, tap, targets)


BOOTSTRAP_ROUNDS = 100


def explain(job: Job, folder: Path, progress: Progress) -> Made:
    """Fit an explainer with one seed and measure it on held-out photos."""
    from partlens.verbs.evaluate import evaluate
    from partlens.verbs.fit_explainer import fit_explainer
    from partlens_papers.tap_teachers import tap_places

    settings, images = job.settings, photos_of(job)
    performer = performer_of(job)
    chosen = choose_layers(performer, settings)
    run = folder / "run"
    fitted = fit_explainer(
        performer,
        images,
        out=run,
        category=settings.get("joint") or job.category,
        tap=chosen.tap,
        targets=chosen.targets,
        preset=settings["preset"],
        config={**({} if chosen.eta is None else {"eta": chosen.eta}), **settings["explainer"], "seed": job.seed},
        seeds=1,
        background=settings["background"],
        compute={"device": job_device()},
        places_of=tap_places if settings["teachers"] == "tap" else None,
        progress=progress,
    )
    how: dict[str, Any] = {"split": settings["split"], "seed": job.seed, "rounds": BOOTSTRAP_ROUNDS}
    found = evaluate(run, images, model=performer, gallery="none", progress=progress, **how)
    record = fitted.record
    facts = {
        "network": record.performer.name,
        "weights_sha256": record.performer.weights_sha256,
        "structure": plain(record.structure),
        "epochs": len(fitted.history),
        "device": job_device(),
        "note": chosen.note,
        "photos": {"train": record.train_photos, "background": record.background},
        "warnings": [text.partition(" (")[0] for text in found.warnings],
        "errors_by": found.reconstruction.errors_by,
    }
    return tuple(scores_of(plain(found))), facts


# Rivals


def _evaluation_rows(images: ImageSet, category: str, split: str, seed: int) -> dict[str, list[int]]:
    """Return the photos that :func:`partlens.evaluate` takes for the same category, split and seed."""
    held, held_others = images.rows_of((category,), split)
    train_rows, train_others = images.rows_of((category,), "train")
    most = 3 * max(len(train_rows), len(held))
    return {
        "held": list(held),
        "held_others": sampled(held_others, most, seed),
        "train": list(train_rows),
        "train_others": sampled(train_others, most, seed),
    }


def compare(job: Job, folder: Path, progress: Progress) -> Made:
    """Fit the rivals on the tap's maps of the explainer's training photos and measure them as the explainer is."""
    from partlens.explainer.record import ExplainerRun
    from partlens.explainer.templates import PEAK_POWER
    from partlens_papers.tables.rival_measures import RivalBench, measure_rivals

    images, performer = photos_of(job), performer_of(job)
    run = folder.parent / EXPLAINER / "run" / RUN
    if not run.is_file():
        remedy = f"Delete {folder.parent / EXPLAINER} as well, and the explainer is fitted again"
        raise RunError(expected(f"the explainer's run at {run.parent}", "only its result", remedy))
    record = ExplainerRun.read(run.parent)
    structure, how = record.structure, record.config
    fitted, facts = _fitted_rivals(job, images, performer, structure, folder / "maps", progress)
    measured = measure_rivals(
        RivalBench.of(performer, structure, PEAK_POWER if how.peak == "centroid" else None),
        fitted,
        images,
        _evaluation_rows(images, job.category, job.settings["split"], job.seed),
        category=job.category,
        seed=job.seed,
    )
    shutil.rmtree(folder / "maps")
    scores = [
        Score(subject=rival, score=name, estimate=estimate_of(found))
        for rival, of in measured.items()
        for name, found in of.items()
        if "value" in found
    ]
    return scores, {**facts, "peak": how.peak}


def _fitted_rivals(
    job: Job, images: ImageSet, performer: Performer, structure: ExplainerStructure, folder: Path, progress: Progress
) -> tuple[dict[str, Rival], dict[str, Any]]:
    """Fit every rival with every number of units; also say on how many photos."""
    from partlens.network.stream import stream_maps
    from partlens_papers.rivals.factors import fit_kmeans, fit_nmf
    from partlens_papers.rivals.sparse import fit_topk_sae

    fitters: dict[str, tuple[str, Callable[..., Rival]]] = {
        "nmf": ("NMF", fit_nmf),
        "kmeans": ("k-means", fit_kmeans),
        "topk-sae": ("TopK SAE", fit_topk_sae),
    }
    settings = settings_of(RivalsConfig, job.settings["rivals"])
    photos, others = images.rows_of((job.category,), "train")
    rows = [*photos, *sampled(others, settings.background, job.seed)]
    with progress.task("caching maps", len(rows)) as advance:
        maps = stream_maps(performer, images.take(rows), [structure.tap], folder, progress=advance)[structure.tap]
    fitted = {}
    with progress.task("fitting rivals", len(settings.methods) * len(settings.units)) as advance:
        for method, units in product(settings.methods, settings.units):
            name, fit = fitters[method]
            count = structure.channels_out if units == "filters" else units
            fitted[f"{name}, {count} units"] = fit(maps, count, seed=job.seed, **settings.options.get(method, {}))
            advance(len(fitted), f"{name}, {count} units")
    return fitted, {"fit_photos": len(rows), "background": len(rows) - len(photos)}


# Interpretable CNNs


def interpret(job: Job, folder: Path, progress: Progress) -> Made:
    """Train an interpretable CNN on one category and measure it, its performer and the nulls.

    The layers below the tap stay as they are, see :mod:`partlens_papers.rivals.interpretable_cnn`.
    """
    from partlens.explainer.network import explainer_structure
    from partlens.records import write_tensors
    from partlens_papers.rivals.interpretable_cnn import build_interpretable_cnn
    from partlens_papers.rivals.interpretable_config import InterpretableConfig
    from partlens_papers.rivals.interpretable_training import labelled_maps, train_interpretable_cnn
    from partlens_papers.tables.rival_measures import measure_interpretable

    settings, images, performer = job.settings, photos_of(job), performer_of(job)
    chosen = choose_layers(performer, settings)
    tap = chosen.tap or performer.tap
    photos, others = images.rows_of((job.category,), "train")
    example = performer.preprocessing([images.read(photos[0])])
    structure = explainer_structure(performer, example, tap, chosen.targets)
    config = InterpretableConfig(**{"method": settings["loss"], "seed": job.seed, **settings["icnn"]})
    run = folder / "run"
    rows = [*photos, *sampled(others, settings["background"], job.seed)]
    with progress.task("caching maps", 2 * len(rows)) as advance:  # each photo and its mirror
        maps = labelled_maps(performer, images.take(rows), [job.category], structure.tap, run / "maps", advance)
    network = build_interpretable_cnn(performer, structure, config, 1)
    with progress.task("training, epochs", config.epochs) as advance:
        history = train_interpretable_cnn(network, maps, run, report=lambda record: advance(record["epoch"]))
    write_tensors(run / "network.safetensors", network.state_dict())
    held = _evaluation_rows(images, job.category, settings["split"], job.seed)
    found = measure_interpretable(network, performer, structure, images, held, job.category, job.seed)
    del maps
    shutil.rmtree(run / "maps")
    facts = {
        "network": performer.name,
        "weights_sha256": performer.weights_sha256,
        "structure": plain(structure),
        "config": dict(config),
        "epochs": len(history),
        "note": chosen.note,
    }
    return tuple(scores_of(plain(found))), facts
