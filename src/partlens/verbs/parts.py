"""The verb parts: which part each filter of the explainer holds, what each part adds, and pictures to name it by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import ImageError, expected
from partlens.progress import Progress
from partlens.records import read_json, write_json
from partlens.verbs.fit_explainer import load_explainer
from partlens.verbs.parts_categories import SharedFilters, by_category, rule_of_all
from partlens.verbs.parts_file import (
    PARTS,
    SCHEMA_PARTS,
    grouping,
    named_parts,
    read_parts,
    renamed,
    with_edits,
)
from partlens.verbs.parts_rules import SeenPhotos, by_clusters, by_landmarks, chosen_rule
from partlens.verbs.runs import RUN, category_rows, command, photos_of_run, rows_of, sampled, versions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.explainer.network import Explainer
    from partlens.metrics.localisation import Peaks
    from partlens.network.receptive_field import ReceptiveField
    from partlens.network.zoo import Performer
    from partlens.object_parts.assignment import PartsConfig, Rule

_BATCH = 16
_STRIP_FILTERS = 4
_STRIP_PHOTOS = 3
_STRIP_PX = 112
_ROUNDS = 1000


def parts(
    run: str | Path,
    data: str | Path | ImageSet | None = None,
    *,
    model: str | nn.Module | Performer | None = None,
    rule: Rule | None = None,
    rename: Sequence[str] = (),
    split: str = "test",
    config: PartsConfig | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find the part of every filter of an explainer, and measure what each part adds to the performer's answers.

    Writes ``parts.json`` and pictures in ``parts/`` of the run directory. The ``name`` of a part is a person's to
    edit there: two parts of one name count as one from then on, and finding the parts again keeps the names. With
    ``rename`` alone, names are changed in the file and nothing is measured.

    Args:
        run: the run directory of a finished explainer.
        data: the data set; the one of the fit when left out.
        model: the performer; the one of the fit when left out.
        rule: ``landmarks``, ``clusters``, or ``auto``, which takes landmarks where 20 photos show one.
        rename: texts ``OLD=NEW``.
        split: which photos to use.
        config: thresholds, or fields to change in the default.
        progress: how to show progress; silent when left out.

    Returns:
        The content of ``parts.json``; its schema is documented in ``docs/parts.md``.

    Raises:
        ImageError: fewer than two photos in the split.
        InputError: the rule ``landmarks`` without landmarks, or a wrong name.
        RunError: the run is missing or unfinished, ``parts.json`` was edited wrongly, or model or data are not found.
    """
    run = Path(run)
    show = progress or Progress.silent()
    file = run / PARTS
    earlier = read_parts(file) if file.exists() else None
    if earlier is not None and rename and data is None and rule is None and config is None:
        content = renamed(earlier, rename)
        write_json(file, content)
        if grouping(content) != grouping(earlier):
            show.say("parts were joined: run partlens parts again to measure what they add together")
        return content

    import torch

    from partlens.explainer.assembly import performer_head
    from partlens.metrics.parts import assignment_stability
    from partlens.object_parts.assignment import PartsConfig

    changes = {} if rule is None else {"rule": rule}
    how = config if isinstance(config, PartsConfig) else PartsConfig.from_dict({**dict(config or {}), **changes})
    explainer, performer = load_explainer(run, model)
    images, rows, manifest = _photos(run, data, split, how)
    head = performer_head(performer, explainer.structure)
    field = performer.field(explainer.structure.tap)
    seen = _observed(explainer, performer, head, images, rows, field, show)
    generator = torch.Generator().manual_seed(how.seed)
    joint = tuple(manifest["data"].get("categories") or ())
    shared = _shared(explainer, performer, images, rows, joint, show) if joint else None
    chosen = chosen_rule(how.rule, seen) if shared is None else rule_of_all(how.rule, seen, shared)
    by_rule = by_landmarks if chosen == "landmarks" else by_clusters
    if shared is None:
        found = by_rule(seen, performer, how, generator)
    else:
        found = by_category(by_rule, shared, seen, performer, how, generator)
    stability = assignment_stability(
        found.assign, seen.photos, generator=generator, rounds=how.rounds, matched=found.matched
    )
    records, unplaced = with_edits(found.parts, earlier) if earlier is not None else (found.parts, [])
    content = {
        "schema": SCHEMA_PARTS,
        "rule": found.rule,
        "config": how.to_dict(),
        "thresholds": found.thresholds,
        "null": found.null,
        "filter_count": int(seen.peaks.scores.shape[1]),
        "photos": len(rows),
        "split": split,
        "category": manifest["data"]["category"],
        "categories": list(joint),
        "landmarks": {n: int((~seen.landmarks[:, k].isnan().any(-1)).sum()) for k, n in enumerate(seen.names)},
        "data": {"name": images.name, "same_as_fit": images.fingerprint() == manifest["data"]["fingerprint"]},
        "stability": stability.to_dict(),
        "parts": records,
        "unplaced_names": unplaced,
        "filters": found.filters,
        "command": command(),
        "versions": versions(),
    }
    if rename:
        content = renamed(content, rename)
    for row in unplaced:
        show.say(f"the name {row['name']!r} fits no part found now; it is kept under unplaced_names")
    content["contributions"] = _contributions(explainer, head, seen, content, how, show)
    _draw_strips(run, content["parts"], explainer, performer, images, rows, seen.peaks, field, shared, show)
    write_json(file, content)
    show.say(f"wrote {file} ({len(rows)} photos of the split {split})")
    return content


def _photos(
    run: Path, data: str | Path | ImageSet | None, split: str, how: PartsConfig
) -> tuple[ImageSet, list[int], dict[str, Any]]:
    manifest = read_json(run / RUN)
    images, _ = photos_of_run(run, manifest, data, "find the parts of")
    category = manifest["data"]["category"] or None
    joint = manifest["data"].get("categories") or []
    own = rows_of(images, joint, split)[0] if joint else category_rows(images, category, split)[0]
    rows = sampled(own, how.photos_max, how.seed)
    if len(rows) < 2:
        rule = f"at least 2 photos{f' of {category}' if category else ''} in the split {split}"
        raise ImageError(expected(rule, len(rows), "Add photos, or name another split (--split)"))
    return images, rows, manifest


def _shared(
    explainer: Explainer,
    performer: Performer,
    images: ImageSet,
    rows: Sequence[int],
    categories: tuple[str, ...],
    show: Progress,
) -> SharedFilters:
    """Find the category of each filter, as an evaluation does: whose training photos excite it most on average."""
    import torch

    from partlens.network.taps import forward_taps

    train = [category_rows(images, name, "train")[0] for name in categories]
    means, done = [], 0
    with show.task("finding the filters' categories", sum(map(len, train))) as advance, torch.no_grad():
        for own in train:
            total = torch.zeros(explainer.structure.channels_out, dtype=torch.float64)
            for first in range(0, len(own), _BATCH):
                batch = performer.preprocessing([images.read(i) for i in own[first : first + _BATCH]])
                tapped = forward_taps(performer, batch, [explainer.structure.tap])[1][explainer.structure.tap].cpu()
                total += explainer.interpret(tapped)[1].double().sum((0, 2, 3))
                done += len(batch)
                advance(done)
            means.append(total / max(len(own), 1))
    labels = torch.tensor([categories.index(images.categories[i]) for i in rows])
    return SharedFilters(categories, labels, torch.stack(means).argmax(0))


def _observed(
    explainer: Explainer,
    performer: Performer,
    head: nn.Module,
    images: ImageSet,
    rows: Sequence[int],
    field: ReceptiveField,
    show: Progress,
) -> SeenPhotos:
    import torch

    from partlens.evaluation.places import landmarks_in_input, photo_numbers
    from partlens.metrics.localisation import peaks_from_cells
    from partlens.network.receptive_field import grid_of
    from partlens.network.taps import forward_taps

    structure = explainer.structure
    maps, cells, scores, outputs = [], [], [], []
    with show.task("reading photos", len(rows)) as advance, torch.no_grad():
        for first in range(0, len(rows), _BATCH):
            part = rows[first : first + _BATCH]
            batch = performer.preprocessing([images.read(i) for i in part])
            _, taps = forward_taps(performer, batch, [structure.tap, structure.targets[-1]])
            tapped = taps[structure.tap].cpu()
            answers = explainer.interpret(tapped)[1]
            maps.append(tapped)
            scores.append(answers.flatten(2).amax(-1))
            cells.append(explainer.places(answers))
            outputs.append(head(taps[structure.targets[-1]].cpu())[0])
            advance(first + len(part))
    start, stride = grid_of(field)
    names, landmarks = landmarks_in_input(images, rows, performer)
    return SeenPhotos(
        maps=torch.cat(maps),
        peaks=peaks_from_cells(torch.cat(cells), torch.cat(scores), structure.side_cells, start, stride),
        outputs=torch.cat(outputs),
        landmarks=landmarks,
        names=names,
        photos=photo_numbers(images, rows),
    )


# --- what the parts add -----------------------------------------------------------------------------------------------


def _contributions(
    explainer: Explainer,
    head: nn.Module,
    seen: SeenPhotos,
    content: Mapping[str, Any],
    how: PartsConfig,
    show: Progress,
) -> dict[str, Any]:
    """Measure what each part adds to the performer's own answer to each photo, and whether its removal agrees."""
    import torch

    from partlens.estimate import bootstrap
    from partlens.evaluation.fidelity import class_outputs
    from partlens.metrics.faithfulness import agreement_top1
    from partlens.metrics.parts import removal_agreement
    from partlens.verbs.part_shares import part_labels, part_shares

    named = named_parts(content)
    part_of = part_labels(named, int(content["filter_count"]))
    answers = seen.outputs.argmax(1)
    batches = []
    with show.task("measuring parts", len(answers)) as advance:
        for first in range(0, len(answers), _BATCH):
            rows = slice(first, first + _BATCH)
            batches.append(part_shares(explainer, head, seen.maps[rows], answers[rows], part_of, len(named), how))
            advance(min(first + _BATCH, len(answers)))

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(b, name).double() for b in batches])

    generator = torch.Generator().manual_seed(how.seed)
    shapley, integrated, gradient, removal = map(joined, ("shapley", "integrated", "gradient_activation", "removal"))
    rise = joined("score") - joined("baseline")
    count = len(rise)

    def mean(values: Tensor) -> dict[str, Any]:
        return over_photos(lambda i: float(values[i].mean()))

    def over_photos(statistic: Callable[[Tensor], float]) -> dict[str, Any]:
        return bootstrap(statistic, count, generator=generator, rounds=_ROUNDS, groups=seen.photos).to_dict()

    def ratio(part: Tensor, whole: Tensor) -> dict[str, Any]:
        def share(i: Tensor) -> float:
            below = float(whole[i].sum())
            return float(part[i].sum()) / below if below > 0 else math.nan

        return over_photos(share)

    # The same deals of the filters serve every batch, so that a draw is one assignment over all photos.
    dealt = torch.cat([b.random for b in batches], 1).double().sum(1)
    dealt = dealt / dealt.sum(1, keepdim=True)
    ends = torch.quantile(dealt, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    sizes = torch.tensor([len(p.filters) for p in named], dtype=torch.float64)
    by_size = shapley.sum(1, keepdim=True) * sizes / sizes.sum()
    checks = {"shapley": shapley, "integrated_gradients": integrated, "gradient_activation": gradient}
    return {
        "grouping": grouping(content),
        "photos": count,
        "score_of": "the performer's own answer to each photo"
        if seen.outputs.shape[1] > 1
        else "the performer's only output, whatever the answer",
        "baseline": "both tracks silent (x_enc = 0)",
        "method": batches[0].method,
        "score": {
            "performer": mean(seen.outputs.gather(1, answers[:, None])[:, 0].double()),
            "fed_back": mean(joined("score")),
            "baseline": mean(joined("baseline")),
            "agreement_top1": agreement_top1(
                class_outputs(torch.cat([b.fed_outputs for b in batches])), class_outputs(seen.outputs), seen.photos
            ).to_dict(),
        },
        "interpretable_share": ratio(shapley.sum(1), rise),
        "ordinary_share": ratio(joined("ordinary"), rise),
        "remainder_frac": {
            "shapley": float((rise - shapley.sum(1) - joined("ordinary")).abs().mean() / rise.abs().mean()),
            "integrated_gradients": float(joined("remainder").abs().mean() / rise.abs().mean()),
        },
        "standard_error": float(joined("standard_error").mean()),
        "parts": [
            {
                "name": part.name,
                "ids": list(part.ids),
                "n": len(part.filters),
                "shapley": mean(shapley[:, p]),
                "share": ratio(shapley[:, p], shapley.sum(1)),
                "share_of_score": ratio(shapley[:, p], rise),
                "integrated_share": ratio(integrated[:, p], integrated.sum(1)),
                "integrated_null": {
                    "value": float(dealt[:, p].mean()),
                    "interval": ends[:, p].tolist(),
                    "n": len(dealt),
                    "unit": "draws",
                },
                "gradient_activation": mean(gradient[:, p]),
                "gradient_activation_share": ratio(gradient[:, p], gradient.sum(1)),
                "removal": mean(removal[:, p]),
                "removal_pairs": {
                    "predicted": [round(v, 4) for v in shapley[:, p].tolist()],
                    "measured": [round(v, 4) for v in removal[:, p].tolist()],
                },
            }
            for p, part in enumerate(named)
        ],
        "removal_check": {
            name: removal_agreement(predicted, removal, photos=seen.photos, generator=generator).to_dict()
            for name, predicted in (checks | {"part_size": by_size}).items()
        },
    }


# --- pictures ---------------------------------------------------------------------------------------------------------


def _draw_strips(
    run: Path,
    records: list[dict[str, Any]],
    explainer: Explainer,
    performer: Performer,
    images: ImageSet,
    rows: Sequence[int],
    peaks: Peaks,
    field: ReceptiveField,
    shared: SharedFilters | None,
    show: Progress,
) -> None:
    """Draw for each part what its most active filters peak at, and note file and filters in its record."""
    import numpy as np

    from partlens.attribution.pictures import save_png, strip
    from partlens.evaluation.gallery import region_px

    size = performer.preprocessing.size_px
    # What the norm layer passes on is comparable between filters; a raw peak is not.
    activity = (peaks.scores / explainer.norm_interp.divisor.double()).mean(0)
    frames: dict[int, Any] = {}
    with show.task("drawing parts", len(records)) as advance:
        for number, record in enumerate(records, start=1):
            record["n"] = len(record["filters"])
            active = sorted(record["filters"], key=lambda k: (-float(activity[k]), k))[:_STRIP_FILTERS]
            crops, shown = [], []
            used: set[int] = set()
            for k in active:
                order = peaks.scores[:, k].argsort(descending=True, stable=True).tolist()
                if shared is not None:
                    order = [i for i in order if shared.labels[i] == shared.assigned[k]]
                # Each photo once in a strip, while there are others.
                chosen = [*(i for i in order if i not in used), *(i for i in order if i in used)][:_STRIP_PHOTOS]
                used.update(chosen)
                for photo in chosen:
                    if photo not in frames:
                        frames[photo] = performer.preprocessing.frame(images.read(rows[photo]))
                    box = region_px(peaks.positions_px[photo, k], field, size)
                    crops.append(np.asarray(frames[photo].crop([round(v) for v in box])))
                    shown.append({"filter": k, "key": images.keys[rows[photo]], "box_px": [round(v, 1) for v in box]})
            record["strip"] = None
            record["shown"] = shown
            if crops:
                record["strip"] = f"parts/{number}.png"
                save_png(run / record["strip"], strip(crops, _STRIP_PX))
            advance(number)
