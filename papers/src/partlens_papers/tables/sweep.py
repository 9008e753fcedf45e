"""The verb reproduce for tables over performers, categories and seeds: what is asked for, its jobs, the table's files.

Tables that need the same explainers share them: made in one ``out`` folder, they are fitted once.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from partlens.data.tables import IMAGE_TABLE
from partlens.errors import BACKGROUND, ImageError, InputError, expected, listed, nearest
from partlens.explainer.config import ExplainerConfig
from partlens.progress import Progress
from partlens.records import Settings, content_hash, file_sha256
from partlens.run import command, versions
from partlens.verbs.runs import loaded
from partlens_papers.data.convert import convert, join
from partlens_papers.data.layouts import layout_of
from partlens_papers.given import settings_of
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.rivals.interpretable_config import InterpretableConfig
from partlens_papers.tables.blocks import Study, TableRecord
from partlens_papers.tables.explainer_jobs import (
    CLASSIFIED,
    EXPLAINER,
    LOSSES,
    MODULE,
    RIVALS,
    TRAINED,
    TRAINING,
    RivalsConfig,
    open_photos,
)
from partlens_papers.tables.explainer_tables import build
from partlens_papers.tables.jobs import Executor, Job, JobRecord, run_sweep
from partlens_papers.tables.page import table_page
from partlens_papers.tables.published import DIFFERENCES, published_data, published_network
from partlens_papers.tables.scores import Row, Tidy, write_rows

Table = Literal["instability", "p", "errors", "interpretable-cnn", "rivals"]
JOINT_TABLES = ("instability", "p", "errors")
SCORES, PAGE = "scores.csv", "table.html"


class SweepConfig(Settings):
    """What a table is made of.

    Attributes:
        categories: which; all that have landmarks when empty.
        joint: all categories in one performer and one explainer, as in the papers' rows of several categories.
        seeds: explainers of each category.
        seed: the first of the seeds.
        tap: layer to explain; by default the preset's choice.
        targets: layers that are reconstructed; by default the preset's choice.
        preset: ``partlens`` or ``paper``, which has the papers' tap, targets and eta where they studied the network.
        teachers: places of the part teachers: the performer's ``later`` layer, or the ``tap``'s own features, which is
            better on AlexNet's birds (:mod:`partlens_papers.tap_teachers`).
        background: folder or table of photos that count as background, with the data's own.
        against: what a category is told from: ``all`` other photos, or the ``background`` alone, as in the papers.
        others: most photos of other categories in a fit.
        split: what is measured.
        workers: processes that do jobs; 0 does them in this one.
        cluster: address of a dask scheduler whose workers see the same files.
    """

    categories: tuple[str, ...] = ()
    joint: bool = False
    seeds: int = Field(3, ge=1)
    seed: int = 0
    tap: str | None = None
    targets: tuple[str, ...] | None = None
    preset: Literal["partlens", "paper"] = "partlens"
    teachers: Literal["later", "tap"] = "later"
    background: str | None = None
    against: Literal["all", "background"] = "all"
    others: int = Field(1500, ge=0)
    split: str = "test"
    workers: int = Field(0, ge=0)
    cluster: str | None = None


class MethodsConfig(Settings):
    """Settings of what a table compares, each by its own fields.

    Attributes:
        explainer: of :class:`~partlens.explainer.config.ExplainerConfig`.
        train: of :class:`~partlens_papers.networks.finetune_config.FinetuneConfig`, for performers ``train:MODEL``.
        rivals: of :class:`~partlens_papers.tables.explainer_jobs.RivalsConfig`.
        interpretable_cnn: of :class:`~partlens_papers.rivals.interpretable_config.InterpretableConfig`.
    """

    explainer: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    rivals: dict[str, Any] = Field(default_factory=dict)
    interpretable_cnn: dict[str, Any] = Field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A table that is asked for, checked."""

    table: str
    data: str
    performers: Mapping[str, str]
    sweep: SweepConfig
    methods: MethodsConfig

    def __post_init__(self) -> None:
        """Check what the fields cannot say alone."""
        joint, categories = self.sweep.joint, self.sweep.categories
        if joint and self.table not in JOINT_TABLES:
            rule = f"a table among {', '.join(JOINT_TABLES)} of several categories together"
            raise InputError(expected(rule, self.table, "Make it without joint"))
        if joint and len(categories) == 1:
            raise InputError(expected("two categories or more together", categories[0], "Make it without joint"))
        ExplainerConfig.preset(self.sweep.preset, **self.methods.explainer)
        settings_of(RivalsConfig, self.methods.rivals)
        settings_of(InterpretableConfig, self.methods.interpretable_cnn)
        for label, text in self.performers.items():
            if not label or set(label) & set("/\\ ") or label.startswith("."):
                raise InputError(expected("labels that can name a folder", repr(label), "Use no / and no spaces"))
            if not text.removeprefix(TRAINED):
                raise InputError(expected(f"a model for {label}", "none", f"Give {label}=MODEL"))

    @property
    def setting(self) -> str:
        """What the papers call it: one category against the rest, or several with either loss."""
        if not self.sweep.joint:
            return "single"
        return "multi softmax" if self.methods.train.get("loss") == "softmax" else "multi"


def performers_of(given: Sequence[str]) -> dict[str, str]:
    """Read ``LABEL=MODEL``; without a label the model's short name is taken.

    Raises:
        InputError: none, or a label twice.

    Example:
        >>> performers_of(["small=torchvision:resnet18", "train:own.nets:mine@convs.safetensors"])
        {'small': 'torchvision:resnet18', 'mine': 'train:own.nets:mine@convs.safetensors'}
    """
    found: dict[str, str] = {}
    for text in given:
        label, mark, model = text.partition("=")
        if not mark:
            label, model = text.partition("@")[0].rpartition(":")[2], text
        if label in found:
            raise InputError(expected("every label once", f"{label} twice", "Name them apart: LABEL=MODEL"))
        found[label] = model
    if not found:
        raise InputError(expected("at least one performer", "none", "Give --performers LABEL=MODEL"))
    return found


# The photos


@dataclasses.dataclass(frozen=True)
class Photos:
    """The photos of a table: where every worker opens them, the categories, and what the record says of them."""

    path: str
    categories: tuple[str, ...]
    joined: str | None
    facts: Mapping[str, Any]


def find_photos(plan: Plan, out: Path) -> Photos:
    """Open the photos and choose the categories.

    Raises:
        ImageError: unknown categories, none that has landmarks, none in the split, or no background to tell them from.
    """
    path = Path(plan.data).resolve()
    found = layout_of(path) if path.is_dir() and not (path / IMAGE_TABLE).is_file() else None
    layout = None if found is None else found.name
    joined = "bird" if layout == "cub" else None
    background = None if plan.sweep.background is None else str(Path(plan.sweep.background).resolve())
    opened_as = path
    if layout is not None or background is not None:
        # The papers measure some of a data set's own parts, and show its objects among other photos.
        # A name of its own, so that two tables in one folder never read each other's; workers may run elsewhere.
        own = content_hash({"data": str(path), "background": background, "joined": joined})
        opened_as = (out / f"photos-{own}").resolve()
        if layout is None:
            join(opened_as, path, background=background)
        else:
            convert(layout, path, opened_as, category=joined, landmarks="paper", background=background)
    images = open_photos(str(opened_as))
    known = sorted(set(images.categories) - {BACKGROUND})
    for name in plan.sweep.categories:
        if name not in known:
            remedy = f"Did you mean {nearest(name, known)[0]}?"
            raise ImageError(expected(f"categories among {listed(known, 40)}", name, remedy))
    if plan.sweep.against == BACKGROUND and BACKGROUND not in images.categories:
        remedy = "Give --sweep.background FOLDER, or --sweep.against all"
        raise ImageError(expected(f"photos of the category {BACKGROUND} in {plan.data}", "none", remedy))
    annotated = _annotated(images)
    categories = plan.sweep.categories or tuple(annotated)
    if len(categories) < 1 + plan.sweep.joint:
        rule = f"{'two categories' if plan.sweep.joint else 'categories'} with landmarks in {plan.data}"
        raise ImageError(expected(rule, listed(categories) or "none", "Add landmarks.csv, or name categories without"))
    for name in categories:
        if not images.rows_of((name,), plan.sweep.split)[0]:
            rule = f"photos of {name} in the split {plan.sweep.split}"
            raise ImageError(expected(rule, "none", "Choose another --sweep.split, or leave the category out"))
    facts = {
        "name": images.name,
        "path": str(path),
        "background_path": background,
        "fingerprint": images.fingerprint(),
        "layout": layout,
        "published_as": published_data(known, layout),
        "setting": plan.setting,
        "photos": len(images),
        "categories": list(categories),
        "without_landmarks": [name for name in categories if name not in annotated],
    }
    return Photos(str(opened_as), categories, joined, facts)


def _annotated(images: Any) -> list[str]:
    """Return the categories, other than background, with at least two photos that have a landmark."""
    truth = images.part_truth
    if truth is None:
        return []
    known = np.isfinite(truth.positions_px).all(2).any(1)
    counts = Counter(category for category, has in zip(images.categories, known, strict=True) if has)
    return sorted(name for name, count in counts.items() if count > 1 and name != BACKGROUND)


# The jobs


def joint_label(names: Sequence[str]) -> str:
    """Name several categories together, short enough for a folder.

    Example:
        >>> joint_label(["cat", "fox"]), joint_label([f"animal-{k}" for k in range(30)])
        ('cat+fox', '30-categories')
    """
    joined = "+".join(names)
    return joined if len(joined) <= 60 else f"{len(names)}-categories"


def jobs_of(plan: Plan, photos: Photos, out: Path) -> list[Job]:
    """Return all jobs of a table, those that others need first."""
    together = tuple(sorted(photos.categories)) if plan.sweep.joint else ()
    common = {
        "preset": plan.sweep.preset,
        "tap": plan.sweep.tap,
        "targets": plan.sweep.targets,
        "teachers": plan.sweep.teachers,
        "explainer": plan.methods.explainer,
        "background": plan.sweep.others,
        "split": plan.sweep.split,
        "data": photos.facts["fingerprint"],
        "joined": photos.joined,
        **({"joint": list(together)} if together else {}),
        **({"against": plan.sweep.against} if plan.sweep.against != "all" else {}),
    }
    jobs: list[Job] = []
    for label, text in plan.performers.items():
        for category in (joint_label(together),) if together else photos.categories:
            training, point = _point(plan, out, label, text, Job("", "", label, category, 0, common))
            places = {"data": photos.path, "maps": str(out / "maps")}
            point = dataclasses.replace(point, places={**places, **point.places})
            jobs += [dataclasses.replace(job, places={**places, **job.places}) for job in training]
            for seed in range(plan.sweep.seed, plan.sweep.seed + plan.sweep.seeds):
                jobs += _explainer_jobs(plan, dataclasses.replace(point, seed=seed))
    return jobs


def _check_layers(sweep: SweepConfig, model: str) -> None:
    """Refuse a tap or targets that the network lacks, before hours of training.

    Raises:
        LayerError: no such layer.
    """
    if sweep.tap is not None or sweep.targets:
        performer = loaded(model)
        tap = sweep.tap or performer.tap
        performer.upper(performer.layer(tap).name, sweep.targets or ("output",))


def _located(model: str) -> str:
    """Return a model's name with its weights file by an absolute path."""
    name, mark, weights = model.partition("@")
    return f"{name}@{Path(weights).resolve()}" if mark and Path(weights).is_file() else model


def _point(plan: Plan, out: Path, label: str, text: str, point: Job) -> tuple[list[Job], Job]:
    """Add the performer to a point of performer and category, and give the job that trains it, if it is trained."""
    base = text.removeprefix(TRAINED)
    located = _located(base)
    _check_layers(plan.sweep, located)
    model, _, weights = located.partition("@")
    content = file_sha256(Path(weights)) if weights and Path(weights).is_file() else weights
    settings = {**point.settings, "model": model, "weights": content}
    if not text.startswith(TRAINED):
        return [], dataclasses.replace(point, settings=settings, places={"spec": located})
    file = out / "performers" / f"{label}-{point.category}.safetensors"
    kept = ("model", "weights", "data", "joined", "joint", "against")
    recipe: dict[str, Any] = {key: value for key, value in settings.items() if key in kept}
    recipe["train"] = plan.methods.train
    recipe["fields"] = _without_seed(dict(settings_of(FinetuneConfig, plan.methods.train)))
    places = {"spec": f"{model}@{file}", "base": located, "weights": str(file)}
    training = dataclasses.replace(
        point,
        work=f"{MODULE}:train",
        kind=TRAINING,
        seed=plan.sweep.seed,
        settings=recipe,
        places=places | {"scratch": [str(file.with_suffix(".work"))]},
    )
    settings["train"] = plan.methods.train
    return [training], dataclasses.replace(point, settings=settings, places=places, after=(training.key,))


def _explainer_jobs(plan: Plan, point: Job) -> list[Job]:
    """Return the jobs of one performer, category and seed."""

    def job(work: str, kind: str, changes: Mapping[str, Any], **more: Any) -> Job:
        settings = {**point.settings, **changes}
        return dataclasses.replace(point, work=f"{MODULE}:{work}", kind=kind, settings=settings, **more)

    def explained(changes: Mapping[str, Any]) -> dict[str, Any]:
        # A preset is only a name: with its fields noted, a result is not taken for one of other defaults.
        fields = dict(ExplainerConfig.preset(plan.sweep.preset, **changes))
        return {"explainer": dict(changes), "fields": _without_seed(fields)}

    if plan.table == "interpretable-cnn":
        cnn = plan.methods.interpretable_cnn
        return [job("interpret", f"icnn-{loss}", {"loss": loss, "icnn": cnn}) for loss in LOSSES]
    given = plan.methods.explainer
    explainer = job("explain", EXPLAINER, explained(given))
    if plan.table == "errors":
        return [explainer, job("explain", CLASSIFIED, explained({**given, "objective": "classification"}))]
    if plan.table == "rivals":
        rivals = dict(settings_of(RivalsConfig, plan.methods.rivals))
        return [explainer, job("compare", RIVALS, {**explained(given), "rivals": rivals}, after=(explainer.key,))]
    return [explainer]


def _without_seed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "seed"}


# The table


def reproduce(
    table: Table,
    data: str | Path,
    *,
    performers: Sequence[str] | Mapping[str, str],
    out: str | Path,
    sweep: SweepConfig | Mapping[str, Any] | None = None,
    methods: MethodsConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> TableRecord:
    """Make one of the explainer papers' tables, with the printed figures for comparison.

    Interrupted, it goes on with the jobs that are missing. A job that fails is named in the table, which then is
    ``incomplete``. ``OUT/TABLE`` gets ``table.json``, ``table.html`` and ``scores.csv``, the tidy table of all scores.

    Args:
        table: ``instability``: where filters peak; ``p``: the share of part filters; ``errors``: what feeding the
            reconstruction back costs; ``interpretable-cnn``: networks trained to have part filters; ``rivals``: other
            ways to take the layer apart.
        data: folder or table of photos, which every process can open.
        performers: ``LABEL=MODEL`` each, or by label; ``LABEL=train:MODEL`` is trained on each category first.
        out: folder for the table, ``jobs`` and ``performers``.
        sweep: categories, seeds, preset, where jobs run.
        methods: settings of explainer, training, rivals and interpretable CNNs.
        progress: how to show progress; silent by default.

    Returns:
        The record.

    Raises:
        InputError: no performer, or settings that do not exist.
        ImageError: unknown categories, or none with landmarks.
        RunError: results of other settings are in the folder.
    """
    show, out = progress or Progress.silent(), Path(out).resolve()
    named = dict(performers) if isinstance(performers, Mapping) else performers_of(performers)
    chosen, settings = settings_of(SweepConfig, sweep), settings_of(MethodsConfig, methods)
    plan = Plan(table, str(data), named, chosen, settings)
    photos = find_photos(plan, out)
    jobs = jobs_of(plan, photos, out)
    results = run_sweep(jobs, out, executor=Executor(chosen.workers, chosen.cluster), progress=show)
    record, rows = table_record(plan, photos, jobs, results)
    folder = out / table
    write_rows(folder / SCORES, rows)
    path = record.write(folder)
    page = table_page(record, folder / PAGE)
    show.say(f"wrote {path} and {page}")
    return record


def table_record(
    plan: Plan, photos: Photos, jobs: Sequence[Job], results: Sequence[JobRecord]
) -> tuple[TableRecord, list[Row]]:
    """Make the record of a table, and the tidy table, of what its jobs gave."""
    rows = [
        Row(job.performer, job.category, job.seed, job.kind, score.subject, score.score, score.estimate)
        for job, result in zip(jobs, results, strict=True)
        for score in result.scores
    ]
    study = Study(
        plan.table,
        Tidy(rows, plan.sweep.seed),
        {label: published_network(text) for label, text in plan.performers.items()},
        (jobs[0].category,) if plan.sweep.joint else photos.categories,
        str(photos.facts["published_as"]),
        plan.setting,
    )
    built = build(study)
    told = [*built.pop("remarks"), *_warnings(jobs, results), *_versions_remark(results), *DIFFERENCES]
    record = TableRecord(
        table=plan.table,
        status="complete" if all(result.status == "finished" for result in results) else "incomplete",
        command=command(),
        versions=versions(),
        data=dict(photos.facts),
        plan={"performers": dict(plan.performers), **dict(plan.sweep), **dict(plan.methods)},
        jobs={
            job.key: {
                "status": result.status,
                "error": result.error,
                "seconds": result.seconds,
                "partlens": result.partlens,
                **result.facts,
            }
            for job, result in zip(jobs, results, strict=True)
        },
        remarks=tuple(told),
        **built,
    )
    return record, rows


def _warnings(jobs: Sequence[Job], results: Sequence[JobRecord]) -> list[str]:
    """Return the evaluations' own warnings, joined over categories and seeds."""
    found: dict[tuple[str, str], list[str]] = {}
    for job, result in zip(jobs, results, strict=True):
        for text in result.facts.get("warnings", ()) if job.kind == EXPLAINER else ():
            found.setdefault((job.performer, text), []).append(f"{job.category.replace('_', ' ')} (seed {job.seed})")
    return [f"{label}: {text}, in {', '.join(where)}." for (label, text), where in found.items()]


def _versions_remark(results: Sequence[JobRecord]) -> list[str]:
    """Say so where the results of one table were made by several versions."""
    found = sorted({result.partlens for result in results if result.status == "finished"})
    return [f"Made by several versions of partlens: {', '.join(found)}."] if len(found) > 1 else []
