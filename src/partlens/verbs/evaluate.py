"""The verb evaluate, a function and a sub-command of the same name.

Torch is imported when a verb runs, not when this module is read, so that help texts answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import ImageError, expected
from partlens.progress import Progress
from partlens.records import read_json, write_json
from partlens.verbs.fit_explainer import load_explainer
from partlens.verbs.runs import (
    EVALUATION,
    RUN,
    category_rows,
    photos_of_run,
    photos_seen,
    rows_of,
    sampled,
    versions,
)

if TYPE_CHECKING:
    from torch import nn

    from partlens.attribution.receptive_pictures import OcclusionConfig
    from partlens.data.images import ImageSet
    from partlens.evaluation.gallery import FieldKind, GalleryKind
    from partlens.network.zoo import Performer


def evaluate(
    run: str | Path,
    data: str | Path | ImageSet | None = None,
    *,
    model: str | nn.Module | Performer | None = None,
    split: str = "test",
    seed: int = 0,
    gallery: GalleryKind = "quick",
    fields: FieldKind = "occlusion",
    occlusion: OcclusionConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a finished run on photos that were not used in the fit, and write ``evaluation.json`` and the gallery.

    Args:
        run: the run directory.
        data: the data set; the one of the fit when left out.
        model: the performer; the one of the fit when left out.
        split: which photos to measure on.
        seed: of the nulls and the bootstrap intervals.
        gallery: ``quick`` or ``full`` pictures of filters (`partlens.evaluation.gallery.write_gallery`), or ``none``.
        fields: what filters read: found by ``occlusion``, or ``analytic``, the round field in theory.
        occlusion: how photos are covered to find what filters read; fields to change in
            :class:`~partlens.attribution.receptive_pictures.OcclusionConfig`.
        progress: how to show progress; silent when left out.

    Returns:
        The evaluation; its schema is documented in ``docs/evaluation.md``. Every score is
        ``{value, interval, n, unit}``.

    Raises:
        ImageError: no photos in the split, or a single one.
        RunError: the run is missing or unfinished, or model or data are not found.
    """
    import torch

    from partlens.evaluation.explainer_evaluation import EvaluationRows, evaluate_explainer
    from partlens.evaluation.fed_back import own_columns
    from partlens.evaluation.gallery import check_gallery, write_gallery
    from partlens.evaluation.places import photo_numbers, top_layer
    from partlens.evaluation.scoring import Categories
    from partlens.explainer.assembly import performer_head

    show = progress or Progress.silent()
    run = Path(run)
    explainer, performer = load_explainer(run, model)
    check_gallery(gallery, fields, performer.preprocessing.size_px, occlusion)
    manifest = read_json(run / RUN)
    images, dropped = photos_of_run(run, manifest, data, "measure")
    category = manifest["data"]["category"] or None
    joint = tuple(manifest["data"].get("categories", ()))

    def rows_in(part: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return rows_of(images, joint, part) if joint else category_rows(images, category, part)

    held, held_others = rows_in(split)
    if len(held) < 2:
        raise ImageError(
            expected(
                f"at least 2 photos{f' of {category}' if category else ''} in the split {split}",
                len(held),
                "Add photos, or name another split (--split)",
            )
        )
    # Other photos than the fit's may have no training split; the error of a head is then left out.
    train, train_others = rows_in("train") if joint or "train" in images.splits else ((), ())
    most = 3 * max(len(train), len(held))
    rows = EvaluationRows(held, sampled(held_others, most, seed), train, sampled(train_others, most, seed))
    shares = [float(p) for p in manifest["p_by_seed"]]
    done = 0
    own_outputs = own_columns(performer, joint or ((category,) if category else ())) is not None
    total = rows.streamed(own_outputs=own_outputs, several=bool(joint))
    categories = None
    if joint:
        numbers = [torch.tensor([joint.index(images.categories[i]) for i in part]) for part in (held, train)]
        categories = Categories(joint, numbers[0], numbers[1])
    with show.task("measuring", total) as advance:

        def more(count: int) -> None:
            nonlocal done
            done += count
            advance(done)

        result, peaks = evaluate_explainer(
            explainer,
            performer,
            images,
            rows,
            shares,
            category=category,
            categories=categories,
            seed=seed,
            advance=more,
        )
    result = {"schema": result.pop("schema"), "split": split, **result}
    same = images.fingerprint() == manifest["data"]["fingerprint"]
    if split == "train" and same:
        result["warnings"].append("these are the photos of the fit: the scores say nothing about others")
    elif not same and (seen := photos_seen(run, images.take(held).digests())):
        result["warnings"].append(f"{seen} of the {len(held)} photos were used in the fit: the scores flatter")
    result |= {"data": {"name": images.name, "same_as_fit": same, "unreadable": dropped}, "versions": versions()}
    tap = explainer.structure.tap
    with show.task("drawing filters, %", 100) as advance:
        write_gallery(
            run,
            performer,
            images,
            rows.held,
            photo_numbers(images, rows.held),
            {
                "explainer": (peaks["explainer"], result["filters"]["explainer"]),
                "performer": (peaks[tap], result["filters"]["performer"]),
            },
            performer.field(tap),
            explainer=explainer,
            head=performer_head(performer, explainer.structure),
            top=top_layer(performer),
            gallery=gallery,
            fields=fields,
            occlusion=occlusion,
            seed=seed,
            advance=lambda share: advance(round(100 * share)),
        )
    write_json(run / EVALUATION, result)
    show.say(f"wrote {run / EVALUATION} ({len(held)} photos of the split {split})")
    return result
