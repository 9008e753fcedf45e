"""The explainer papers' tables over performers, categories and seeds, each beside the printed figures.

``instability``: where filters peak; ``p``: the share of part filters; ``errors``: what feeding the reconstruction back
costs, with an explainer that learns from the classification loss beside it; ``interpretable-cnn``: the network that is
trained to have part filters; ``rivals``: other ways to take the tap apart.

Tables that need the same explainers share them: made in one ``out`` folder, they are fitted once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from partlens.data.tables import IMAGE_TABLE
from partlens.errors import BACKGROUND, ImageError, InputError, expected, listed, nearest
from partlens.explainer.config import PRESETS, REVISION, ExplainerConfig
from partlens.progress import Progress
from partlens.records import content_hash, file_sha256, write_json
from partlens.verbs.runs import command, spec, versions
from partlens_papers.data.convert import convert, join
from partlens_papers.data.layouts import LayoutName, layout_of
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.tables.explainer_jobs import (
    CLASSIFIED,
    EXPLAINER,
    MODULE,
    RIVAL_SETTINGS,
    RIVALS,
    TRAINED,
    TRAINING,
    open_photos,
)
from partlens_papers.tables.fidelity_tables import error_table, share_table
from partlens_papers.tables.instability_table import instability_table
from partlens_papers.tables.published import DIFFERENCES, published_data, published_network
from partlens_papers.tables.rival_tables import interpretable_table, rival_table
from partlens_papers.tables.study import Study
from partlens_papers.tables.sweep import Executor, Job, JobResult, run_sweep

SCHEMA = "partlens.explainer-table/1"
Table = Literal["instability", "p", "errors", "interpretable-cnn", "rivals"]
EXPLAINER_TABLES: tuple[str, ...] = get_args(Table)
PHOTOS = "photos"
LOSSES = ("published", "released")
_JOINT_TABLES = ("instability", "p", "errors")
_SETTINGS = ("explainer", "targets", "background", "split", "train", "rivals", "interpretable_cnn")


@dataclass(frozen=True)
class TablePlan:
    """What a table is made of.

    Attributes:
        table: which.
        data: folder or table of photos.
        performers: label to how it is loaded; ``train:SPEC`` is trained on each category first.
        categories: which; all that have landmarks when empty.
        seeds: how many explainers of each category.
        first_seed: the seeds are this one and the next.
        tap: layer to explain; the preset's choice when left out.
        preset: ``partlens``, ``held``, ``candidates`` or ``paper``: the last has the papers' tap, targets and eta,
            where they studied the network.
        background: folder or table of photos that count as background, beside the data's own.
        settings: ``explainer`` (fields of its configuration), ``targets``, ``background`` (most photos of others),
            ``split`` (measured on), ``train`` (arguments of ``train_performer``), ``rivals`` (see
            :data:`~partlens_papers.tables.explainer_jobs.RIVAL_SETTINGS`), ``interpretable_cnn``.
        joint: all categories in one performer and one explainer, as in the papers' multi-category rows.
    """

    table: str
    data: str
    performers: Mapping[str, str]
    categories: tuple[str, ...] = ()
    seeds: int = 3
    first_seed: int = 0
    tap: str | None = None
    preset: str = "partlens"
    background: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    joint: bool = False

    def __post_init__(self) -> None:
        """Check every field once."""
        if self.table not in EXPLAINER_TABLES:
            raise InputError(expected(f"a table among {', '.join(EXPLAINER_TABLES)}", self.table, "Choose one of them"))
        if not self.performers:
            raise InputError(expected("at least one performer", "none", "Give --performers LABEL=MODEL"))
        if self.seeds < 1:
            raise InputError(expected("at least 1 seed", self.seeds, "Set --seeds to 1 or more"))
        if self.joint and self.table not in _JOINT_TABLES:
            rule = f"a table among {', '.join(_JOINT_TABLES)} of several categories together"
            raise InputError(expected(rule, self.table, "Leave --joint out"))
        if self.joint and len(self.categories) == 1:
            raise InputError(expected("two categories or more together", self.categories[0], "Leave --joint out"))
        if self.preset not in PRESETS:
            raise InputError(expected(f"preset {', '.join(PRESETS)}", self.preset, "Choose one of them"))
        for name in self.settings:
            if name not in _SETTINGS:
                near = nearest(name, _SETTINGS)[0]
                raise InputError(expected(f"settings among {', '.join(_SETTINGS)}", name, f"Did you mean {near}?"))
        for name, value in self.settings.items():
            counted = name == "background"
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if counted and not fits:
                raise InputError(expected("settings.background of at least 0", repr(value), "Give a whole number"))
            if name in ("explainer", "train", "rivals", "interpretable_cnn") and not isinstance(value, Mapping):
                raise InputError(expected(f"settings.{name} to be a mapping of fields", repr(value), "Write {...}"))
        ExplainerConfig.preset(self.preset, **self.settings.get("explainer", {}))
        for label, text in self.performers.items():
            if not label or set(label) & set("/\\ ") or label.startswith("."):
                raise InputError(expected("labels that can name a folder", repr(label), "Leave out / and spaces"))
            if not text.removeprefix(TRAINED):
                raise InputError(expected(f"a model for {label}", "none", f"Give {label}=MODEL"))


def performers_of(given: Sequence[str]) -> dict[str, str]:
    """Read ``LABEL=MODEL`` from the command line; without a label the model's short name is taken.

    Raises:
        InputError: a label stands twice.

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
    return found


# Planning


def _layout(data: str) -> LayoutName | None:
    path = Path(data)
    found = layout_of(path) if path.is_dir() and not (path / IMAGE_TABLE).is_file() else None
    return None if found is None else found.name


def _annotated(images: Any) -> list[str]:
    """Return the categories with at least two photos that have a landmark, background left out."""
    import numpy as np

    truth = images.part_truth
    if truth is None:
        return []
    known = np.isfinite(truth.positions_px).all(2).any(1)
    counts: dict[str, int] = {}
    for category, has in zip(images.categories, known, strict=True):
        counts[category] = counts.get(category, 0) + int(has)
    return sorted(name for name, count in counts.items() if count > 1 and name != BACKGROUND)


@dataclass(frozen=True)
class Prepared:
    """A plan with its photos looked at: jobs, and what the result says of the data."""

    plan: TablePlan
    categories: tuple[str, ...]
    jobs: tuple[Job, ...]
    data: Mapping[str, Any]


def prepare(plan: TablePlan, out: Path) -> Prepared:
    """Open the photos, choose the categories and list the jobs.

    Raises:
        ImageError: unknown categories, or none that has landmarks.
        WeightsError: a weights file that is not there.
    """
    layout = _layout(plan.data)
    joined = "bird" if layout == "cub" else None
    data = str(Path(plan.data).resolve())
    background = None if plan.background is None else str(Path(plan.background).resolve())
    if layout is not None or background is not None:
        # The papers measure some of a data set's own parts, and show its objects among other photos.
        # A name of its own, so that two tables in one folder never read each other's; workers may stand elsewhere.
        own = content_hash({"data": data, "background": background, "joined": joined})
        opened_as = (out / f"{PHOTOS}-{own}").resolve()
        if layout is None:
            join(opened_as, data, background=background)
        else:
            convert(layout, data, opened_as, category=joined, landmarks="paper", background=background)
    else:
        opened_as = Path(data)  # absolute
    images = open_photos(str(opened_as))
    known = sorted(set(images.categories) - {BACKGROUND})
    annotated = _annotated(images)
    for name in plan.categories:
        if name not in known:
            near = nearest(name, known)[0]
            raise ImageError(expected(f"categories among {listed(known, 40)}", name, f"Did you mean {near}?"))
    categories = plan.categories or tuple(annotated)
    if not categories:
        raise ImageError(
            expected(
                f"categories with landmarks in {plan.data}", "none", "Add landmarks.csv, or name --categories without"
            )
        )
    together = tuple(sorted(categories)) if plan.joint else ()
    if plan.joint and len(together) < 2:
        raise ImageError(expected(f"two categories with landmarks in {plan.data}", listed(together), "Add photos"))
    fingerprint = images.fingerprint()
    common = {
        "preset": plan.preset,
        "tap": plan.tap,
        "targets": plan.settings.get("targets"),
        "explainer": dict(plan.settings.get("explainer", {})),
        "background": int(plan.settings.get("background", 1500)),
        "split": plan.settings.get("split", "test"),
        "data": fingerprint,
        "joined": joined,
        **({"joint": list(together)} if together else {}),
    }
    places = {"data": str(opened_as)}
    jobs: list[Job] = []
    for label, text in plan.performers.items():
        for category in (_joint_label(together),) if together else categories:
            jobs += _jobs_of(plan, out, label, text, category, common, places)
    facts = {
        "name": images.name,
        "path": data,
        "background_path": background,
        "fingerprint": fingerprint,
        "layout": layout,
        "joined": joined,
        "published_as": published_data(known, layout),
        "photos": len(images),
        "categories": list(categories),
        "setting": _setting_of(plan),
        "without_landmarks": [name for name in categories if name not in annotated],
    }
    return Prepared(plan, categories, tuple(jobs), facts)


def _joint_label(names: Sequence[str]) -> str:
    """Name several categories together, short enough for a folder.

    Example:
        >>> _joint_label(["cat", "fox"]), _joint_label([f"animal-{k}" for k in range(30)])
        ('cat+fox', '30-categories')
    """
    joined = "+".join(names)
    return joined if len(joined) <= 60 else f"{len(names)}-categories"


def _setting_of(plan: TablePlan) -> str:
    """Return what the papers call a plan's setting: one category against the rest, or several with either loss."""
    if not plan.joint:
        return "single"
    softmax = dict(plan.settings.get("train", {})).get("loss") == "softmax"
    return "multi softmax" if softmax else "multi"


def _without_seed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "seed"}


def _jobs_of(
    plan: TablePlan,
    out: Path,
    label: str,
    text: str,
    category: str,
    common: Mapping[str, Any],
    places: Mapping[str, Any],
) -> list[Job]:
    """Return the jobs of one performer and one category, those that others need first."""
    base = text.removeprefix(TRAINED)
    located = spec(base) or base
    weights = located.partition("@")[2]
    content = file_sha256(Path(weights)) if weights and Path(weights).is_file() else weights
    settings = {**common, "model": located.partition("@")[0], "weights": content}
    jobs: list[Job] = []
    first: tuple[str, ...] = ()
    where = {**places, "spec": located}
    if text.startswith(TRAINED):
        file = out / "performers" / f"{label}-{category}.safetensors"
        recipe: dict[str, Any] = {
            key: settings[key] for key in ("model", "weights", "data", "joined", "joint") if key in settings
        }
        recipe["train"] = dict(plan.settings.get("train", {}))
        recipe["fields"] = _without_seed(FinetuneConfig.from_dict(recipe["train"]).to_dict())
        where = {**places, "base": located, "weights": str(file), "spec": f"{settings['model']}@{file}"}
        scratch = {"scratch": [str(file.with_suffix(".work"))]}
        training = Job(f"{MODULE}:train", TRAINING, label, category, plan.first_seed, recipe, where | scratch)
        jobs.append(training)
        first = (training.key,)
        settings = {**settings, "train": recipe["train"]}

    def explained(changes: Mapping[str, Any]) -> dict[str, Any]:
        # A preset is only a name: with its fields noted, a result is not taken for one of other defaults.
        fields = ExplainerConfig.preset(plan.preset, **changes).to_dict()
        return {**settings, "explainer": dict(changes), "fields": _without_seed(fields), "revision": REVISION}

    for seed in range(plan.first_seed, plan.first_seed + plan.seeds):
        own = explained(settings["explainer"])
        explainer = Job(f"{MODULE}:explain", EXPLAINER, label, category, seed, own, where, first)
        if plan.table != "interpretable-cnn":
            jobs.append(explainer)
        if plan.table == "errors":
            chosen = explained({**settings["explainer"], "objective": "classification"})
            jobs.append(dataclasses.replace(explainer, kind=CLASSIFIED, settings=chosen))
        if plan.table == "rivals":
            chosen = {**own, "rivals": RIVAL_SETTINGS | dict(plan.settings.get("rivals", {}))}
            jobs.append(Job(f"{MODULE}:compare", RIVALS, label, category, seed, chosen, where, (explainer.key,)))
        if plan.table == "interpretable-cnn":
            for loss in LOSSES:
                chosen = {**settings, "loss": loss, "icnn": dict(plan.settings.get("interpretable_cnn", {}))}
                jobs.append(Job(f"{MODULE}:interpret", f"icnn-{loss}", label, category, seed, chosen, where, first))
    return jobs


# The table


def build(study: Study) -> dict[str, Any]:
    """Make a table of what the jobs gave.

    Args:
        study: the scores; missing ones leave gaps.

    Returns:
        ``blocks`` (title, lead, columns, rows of cells), ``charts``, ``verdicts`` (met or not, in words), ``remarks``
        and the ``published`` rows.
    """
    makers: dict[str, Callable[[Study], dict[str, Any]]] = {
        "instability": instability_table,
        "p": share_table,
        "errors": error_table,
        "interpretable-cnn": interpretable_table,
        "rivals": rival_table,
    }
    return makers[study.table](study)


def explainer_table(
    plan: TablePlan,
    out: str | Path,
    *,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Do a table's jobs and write ``OUT/TABLE.json`` and ``OUT/TABLE.html``.

    Interrupted, it goes on with the jobs that are missing. A job that fails is named in the table, which then is
    ``incomplete``.

    Args:
        plan: what to make.
        out: folder for the table, ``jobs`` and ``performers``.
        executor: where the jobs run.
        progress: how to show progress.

    Returns:
        The content of the JSON file: ``schema, table, status`` (``complete`` or ``incomplete``), ``command, versions,
        data, plan, jobs, blocks, charts, verdicts, remarks, published``. A number is ``{value, interval, n, unit}``.

    Raises:
        ImageError: unknown categories, or none with landmarks.
        RunError: results of other settings stand in the folder.
    """
    from partlens_papers.tables.tables_page import write_table_page

    show, out = progress or Progress.silent(), Path(out).resolve()
    prepared = prepare(plan, out)
    results = run_sweep(prepared.jobs, out, executor=executor, progress=show)
    study = Study.of(
        plan.table,
        results,
        {label: published_network(text) for label, text in plan.performers.items()},
        (prepared.jobs[0].category,) if plan.joint else prepared.categories,
        str(prepared.data["published_as"]),
        plan.first_seed,
        str(prepared.data["setting"]),
    )
    built = build(study)
    missing = [result for result in results if result.status != "finished"]
    content = {
        "schema": SCHEMA,
        "table": plan.table,
        "status": "incomplete" if missing else "complete",
        "command": command(),
        "versions": versions(),
        "data": dict(prepared.data),
        "plan": dataclasses.asdict(plan) | {"categories": list(prepared.categories)},
        "jobs": [_listed_job(result, out) for result in results],
        **built,
        "remarks": [*built["remarks"], *_versions_remark(results), *DIFFERENCES],
    }
    path = out / f"{plan.table}.json"
    write_json(path, content)
    page = write_table_page(path)
    show.say(f"wrote {path} and {page}")
    return content


def _versions_remark(results: Sequence[JobResult]) -> list[str]:
    """Say so where the results of one table were made by several versions."""
    found = sorted({result.made_with or "an earlier one" for result in results if result.status == "finished"})
    return [f"Made by several versions of partlens: {', '.join(found)}."] if len(found) > 1 else []


def _listed_job(result: JobResult, out: Path) -> dict[str, Any]:
    job = result.job
    return {
        "key": job.key,
        "kind": job.kind,
        "performer": job.performer,
        "category": job.category,
        "seed": job.seed,
        "identity": job.identity,
        "partlens": result.made_with,
        "status": result.status,
        "error": result.error,
        "seconds": result.seconds,
        "file": job.result_file(out).relative_to(out).as_posix(),
        "scores": dict(result.content),
    }
