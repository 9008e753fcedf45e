"""The verb evaluate, a function and a sub-command of the same name.

Torch is imported when a verb runs, not when this module is read, so that help is shown at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import InputError, expected
from partlens.evaluation.results import EvaluatedData, Evaluation, FieldKind, GalleryKind
from partlens.explainer.record import LESSON, ExplainerRun
from partlens.progress import Progress, counting
from partlens.records import read_tensors
from partlens.run import Run, UsedPhotos
from partlens.shards import Device
from partlens.verbs.fit_explainer import load_explainer
from partlens.verbs.runs import enough_photos, labels_of, open_photos, sampled, verb

if TYPE_CHECKING:
    from torch import nn

    from partlens.attribution.record import OcclusionConfig
    from partlens.data.images import ImageSet
    from partlens.evaluation.explainer_evaluation import EvaluationRows, Lesson
    from partlens.network.performer import Performer


@verb
def evaluate(
    run: str | Path,
    data: str | Path | ImageSet | None = None,
    *,
    model: str | nn.Module | Performer | None = None,
    split: str = "test",
    seed: int = 0,
    rounds: int = 100,
    gallery: GalleryKind = "quick",
    fields: FieldKind = "mask",
    occlusion: OcclusionConfig | Mapping[str, Any] | None = None,
    compute: Device | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a finished run on photos that were not used in the fit, and write ``evaluation.json`` and the gallery.

    Args:
        run: the run directory.
        data: the data set; optional, by default the one of the fit.
        model: the performer; optional where it can be loaded by its name.
        split: which photos to measure on.
        seed: seed of the nulls and the bootstrap intervals.
        rounds: bootstrap rounds for scores of peaks; those of fidelity have ten times as many.
        gallery: ``quick`` or ``full`` pictures of filters, or ``none``; see
            :class:`~partlens.evaluation.frames.GalleryPlan`.
        fields: what is outlined around a peak: the cells that the ``mask`` keeps, or what filters read, found by
            ``occlusion``, which takes a thousand forward passes.
        occlusion: how photos are covered to find what filters read; fields to change in
            :class:`~partlens.attribution.record.OcclusionConfig`.
        compute: on which device the network computes.
        progress: how to show progress; silent by default.

    Returns:
        The evaluation, as documented in ``docs/evaluation.md``.

    Raises:
        AtWorkError: another process writes to the run directory.
        ImageError: no photos in the split, or a single one.
        RunError: the run is missing or unfinished, or model or data are not found.
    """
    from partlens.evaluation.explainer_evaluation import evaluate_explainer
    from partlens.evaluation.fidelity import own_columns
    from partlens.evaluation.frames import Frames, GalleryPlan
    from partlens.evaluation.gallery import write_gallery

    show, handle = progress or Progress.silent(), Run(Path(run))
    if rounds < 1:
        raise InputError(expected("rounds of at least 1", rounds, "Set --rounds to 1 or more"))
    (explainer, performer), record = load_explainer(run, model, Device.of(compute).device), handle.read(ExplainerRun)
    performer = performer.computing(record.performer.passes)
    plan = GalleryPlan.of(gallery, fields, performer.preprocessing.size_px, occlusion, seed)
    images, unreadable = open_photos(data, record, show)
    rows = _rows(images, record.data.categories, split, seed)
    used = UsedPhotos.read_if_there(handle.folder)
    described = EvaluatedData(
        name=images.name,
        split=split,
        photos=len(rows.held),
        categories=record.data.categories,
        same_as_fit=images.fingerprint() == record.data.fingerprint,
        used_in_fit=0 if used is None else used.count(images.take(rows.held).digests()),
        unreadable=unreadable,
    )
    frames = Frames(performer, images, rows.held)
    lesson = _lesson(handle.folder, record)
    if lesson is None and own_columns(performer, record.data.categories) is None:
        # There is nothing to tell the category from: others would be read for nothing.
        rows = dataclasses.replace(rows, held_others=())
    show.say(rows.words(record.data.categories))
    with handle.writing():
        with show.task("measuring", len(rows.held) + len(rows.held_others) + len(rows.train)) as done:
            result, peaks = evaluate_explainer(
                explainer,
                frames,
                rows,
                described,
                record.p_by_seed,
                lesson=lesson,
                seed=seed,
                rounds=rounds,
                advance=counting(done),
            )
        names = {"explainer": "explainer", "performer": explainer.structure.tap}
        layers = {role: (peaks[name], result.filters[role]) for role, name in names.items()}
        with show.task("drawing filters, %", 100) as advance:
            write_gallery(handle.folder, frames, explainer, layers, plan, advance=lambda s: advance(round(100 * s)))
        path = result.write(handle.folder)
    show.say(f"wrote {path} ({len(rows.held)} photos of the split {split})")
    return result


def _rows(images: ImageSet, categories: tuple[str, ...], split: str, seed: int) -> EvaluationRows:
    """Choose the photos that are measured on, and at most three times as many others."""
    from partlens.evaluation.explainer_evaluation import EvaluationRows

    held, held_others = enough_photos(images, categories, split)
    own = images.rows_of(categories, "train")[0] if "train" in images.splits else ()
    train = own if len(categories) > 1 else ()
    return EvaluationRows(
        held,
        sampled(held_others, 3 * max(len(own), len(held)), seed),
        train,
        labels_of(images, categories, held),
        labels_of(images, categories, train),
    )


def _lesson(folder: Path, record: ExplainerRun) -> Lesson | None:
    """Read the features of the fit's photos; ``None`` where they show one category alone."""
    remedy = "Restore the file, or delete the folder and fit again"
    held = read_tensors(folder / LESSON, sha256=record.lesson_sha256, remedy=remedy)
    return (held["features"], held["labels"]) if len(held["labels"].unique()) > 1 else None
