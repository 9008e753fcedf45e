"""The verb parts: which part each filter of the explainer holds, what each part adds, and pictures to name it by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.pipeline.explainer_run import load_explainer
from partlens.pipeline.parts_file import (
    OTHER_ID,
    PARTS,
    SCHEMA_PARTS,
    grouping,
    named_parts,
    read_parts,
    renamed,
    with_edits,
)
from partlens.pipeline.runs import RUN, category_rows, command, photos_of_run, rows_of, sampled, versions
from partlens.progress import Progress
from partlens.store import read_json, write_json
from partlens.vocabulary import ImageError, expected

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from partlens.artefacts.parts import PartsConfig, Rule
    from partlens.data.images import ImageSet
    from partlens.explainer.network import Explainer
    from partlens.metrics.localisation import Peaks
    from partlens.performer.receptive_field import ReceptiveField
    from partlens.performer.zoo import Performer

_BATCH = 16
_AUTO_PHOTOS = 20
_STRIP_FILTERS = 4
_STRIP_PHOTOS = 3
_STRIP_PX = 112
_ROUNDS = 1000
_SILHOUETTE_DRAWS = 10


@dataclass(frozen=True)
class _Seen:
    """What one pass over the photos leaves.

    Attributes:
        maps: of the tap (image, filter, row, col).
        peaks: of conv-interp-2.
        outputs: the performer's outputs (image, class).
        landmarks: x, y in the input (image, landmark, 2), NaN where absent.
        names: of the landmarks.
        photos: an integer per image, equal for crops of one photo.
    """

    maps: Tensor
    peaks: Peaks
    outputs: Tensor
    landmarks: Tensor
    names: tuple[str, ...]
    photos: Tensor


@dataclass(frozen=True)
class _Assigned:
    """Parts as a rule found them: records without pictures, a record per filter, and what speaks for them."""

    rule: str
    parts: list[dict[str, Any]]
    filters: list[dict[str, Any]]
    thresholds: dict[str, Any]
    null: dict[str, Any]
    assign: Callable[[Tensor], Tensor]
    matched: bool


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

    from partlens.artefacts.parts import PartsConfig
    from partlens.explainer.assembly import performer_head
    from partlens.metrics.parts import assignment_stability
    from partlens.performer.receptive_field import receptive_field

    changes = {} if rule is None else {"rule": rule}
    how = config if isinstance(config, PartsConfig) else PartsConfig(**{**dict(config or {}), **changes})
    explainer, performer = load_explainer(run, model)
    images, rows, manifest = _photos(run, data, split, how)
    head = performer_head(performer, explainer.structure)
    field = receptive_field(performer, explainer.structure.tap)
    seen = _observed(explainer, performer, head, images, rows, field, show)
    generator = torch.Generator().manual_seed(how.seed)
    chosen = _chosen_rule(how.rule, seen)
    found = (_by_landmarks if chosen == "landmarks" else _by_clusters)(seen, performer, how, generator)
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
    _draw_strips(run, content["parts"], explainer, performer, images, rows, seen.peaks, field, show)
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


def _observed(
    explainer: Explainer,
    performer: Performer,
    head: nn.Module,
    images: ImageSet,
    rows: Sequence[int],
    field: ReceptiveField,
    show: Progress,
) -> _Seen:
    import torch

    from partlens.evaluation import grid_of, landmarks_in_input, photo_numbers
    from partlens.metrics.localisation import peaks_from_cells
    from partlens.performer.taps import forward_taps

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
    return _Seen(
        maps=torch.cat(maps),
        peaks=peaks_from_cells(torch.cat(cells), torch.cat(scores), structure.side_cells, start, stride),
        outputs=torch.cat(outputs),
        landmarks=landmarks,
        names=names,
        photos=photo_numbers(images, rows),
    )


def _chosen_rule(rule: str, seen: _Seen) -> str:
    shown = (~seen.landmarks.isnan().any(-1)).sum(0)
    most = int(shown.max()) if len(shown) else 0
    if rule == "auto":
        return "landmarks" if most >= _AUTO_PHOTOS else "clusters"
    return rule


# --- the two rules ----------------------------------------------------------------------------------------------------


def _consistency(peaks: Peaks, landmarks: Tensor, photos: Tensor) -> Tensor:
    """Return (filter, landmark) cross-validated R², NaN for landmarks that too few photos show."""
    import torch

    from partlens.metrics.localisation import consistency_per_filter

    each = [consistency_per_filter(peaks, landmarks[:, k : k + 1], photos)[0] for k in range(landmarks.shape[1])]
    return torch.stack(each, 1) if each else torch.empty(peaks.scores.shape[1], 0, dtype=torch.float64)


def _null(seen: _Seen, performer: Performer, how: PartsConfig, generator: torch.Generator) -> Peaks:
    from partlens.metrics.localisation import null_peaks

    peaks = seen.peaks
    # The grid of the real peaks: two cells of different row and column give start and stride.
    start, stride = _grid(peaks)
    return null_peaks(
        "random",
        len(peaks.scores),
        peaks.side_cells,
        start,
        stride,
        input_size_px=performer.preprocessing.size_px,
        filters=how.null_filters,
        generator=generator,
    )


def _grid(peaks: Peaks) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return start and stride (rows, cols) of the grid that the peaks stand on."""
    ends = []
    for axis in (0, 1):
        cells, place = peaks.cells[..., axis].flatten(), peaks.positions_px[..., 1 - axis].flatten()
        low, high = int(cells.argmin()), int(cells.argmax())
        span = float(cells[high] - cells[low])
        stride = float(place[high] - place[low]) / span if span else 1.0
        ends.append((float(place[low]) - float(cells[low]) * stride, stride))
    return (ends[0][0], ends[1][0]), (ends[0][1], ends[1][1])


def _by_landmarks(seen: _Seen, performer: Performer, how: PartsConfig, generator: torch.Generator) -> _Assigned:
    import torch

    from partlens.artefacts.parts import OTHER, landmark_distances, nearest_landmark, parts_by_landmark
    from partlens.metrics.localisation import dead_filters

    diagonal = math.hypot(*performer.preprocessing.size_px)
    live = ~dead_filters(seen.peaks)

    def measured(peaks: Peaks, landmarks: Tensor, photos: Tensor) -> tuple[Any, Tensor]:
        return landmark_distances(peaks.positions_px, landmarks, diagonal), _consistency(peaks, landmarks, photos)

    distances, consistency = measured(seen.peaks, seen.landmarks, seen.photos)
    usable = ~consistency.isnan().all(0)
    nearest = nearest_landmark(distances.mean_frac, usable)
    drawn = _null(seen, performer, how, generator)
    null_distances, null_consistency = measured(drawn, seen.landmarks, seen.photos)
    null_nearest = nearest_landmark(null_distances.mean_frac, usable)
    row = torch.arange(len(null_nearest))
    null_r2 = null_consistency[row, null_nearest]
    least = float(torch.quantile(null_r2, how.null_level)) if how.consistency_min is None else how.consistency_min
    limits = {"distance_max_frac": how.distance_max_frac, "consistency_min": least}
    labels = parts_by_landmark(distances, consistency, live, **limits)
    null_labels = parts_by_landmark(null_distances, null_consistency, torch.ones_like(null_nearest) > 0, **limits)

    def assign(rows: Tensor) -> Tensor:
        far, follows = measured(seen.peaks.rows(rows), seen.landmarks[rows], seen.photos[rows])
        if bool(follows.isnan().all()):
            return torch.full_like(labels, OTHER)
        return parts_by_landmark(far, follows, live, **limits)

    index = torch.arange(len(labels))
    mean, deviation = distances.mean_frac[index, nearest], distances.deviation_frac[index, nearest]
    own = consistency[index, nearest]
    filters = [
        {
            "filter": k,
            "part": seen.names[int(labels[k])] if int(labels[k]) >= 0 else OTHER_ID,
            "nearest": seen.names[int(nearest[k])],
            "distance_frac": round(float(mean[k]), 5),
            "distance_deviation_frac": round(float(deviation[k]), 5),
            "consistency": round(float(own[k]), 5),
            "dead": not bool(live[k]),
        }
        for k in range(len(labels))
    ]
    order = sorted(range(len(seen.names)), key=lambda k: (-int((labels == k).sum()), k))
    records = [
        _record(seen, performer, seen.names[k], labels == k, {"distance_frac": mean, "consistency": own})
        for k in order
        if bool(usable[k])
    ]
    records.append(_record(seen, performer, OTHER_ID, labels == OTHER, {"distance_frac": mean, "consistency": own}))
    level = torch.tensor([1 - how.null_level, how.null_level], dtype=torch.float64)
    nearest_null = null_distances.mean_frac[row, null_nearest]
    return _Assigned(
        rule="landmarks",
        parts=records,
        filters=filters,
        thresholds={**limits, "consistency_is_measured": how.consistency_min is None},
        null={
            "kind": "random cell per photo",
            "filters": how.null_filters,
            "distance_frac_p05": float(torch.quantile(nearest_null, level[0])),
            "distance_frac_mean": float(nearest_null.mean()),
            "consistency_p95": float(torch.quantile(null_r2, level[1])),
            "kept": float((null_labels >= 0).double().mean()),
        },
        assign=assign,
        matched=False,
    )


def _by_clusters(seen: _Seen, performer: Performer, how: PartsConfig, generator: torch.Generator) -> _Assigned:
    import torch

    from partlens.artefacts.parts import (
        OTHER,
        Clusters,
        agreement_thresholds,
        agreement_with_group,
        by_size,
        clustered,
        filter_vectors,
        peak_features,
        place_vectors,
    )
    from partlens.metrics.localisation import dead_filters

    live = ~dead_filters(seen.peaks)
    drawn = _null(seen, performer, how, generator)

    def grouped(rows: Tensor, fewest: int, most: int) -> tuple[Clusters, Tensor, Tensor, Tensor]:
        cells = seen.peaks.cells[rows]
        vectors = filter_vectors(cells, peak_features(seen.maps[rows], cells), place_weight=how.place_weight)
        groups = clustered(vectors, live, fewest=fewest, most=most)
        place = place_vectors(cells)
        agreement = agreement_with_group(place, groups.labels)
        least = agreement_thresholds(place, groups.labels, place_vectors(drawn.cells[rows]), how.null_level)
        return groups, by_size(torch.where(agreement > least, groups.labels, OTHER)), agreement, least

    every = torch.arange(len(seen.photos))
    groups, labels, agreement, least = grouped(every, how.clusters_min, how.clusters_max)

    def assign(rows: Tensor) -> Tensor:
        return grouped(rows, groups.count, groups.count)[1] if groups.count else labels

    names = [f"part {k + 1}" for k in range(int(labels.max()) + 1)]
    filters = [
        {
            "filter": k,
            "part": names[int(labels[k])] if int(labels[k]) >= 0 else OTHER_ID,
            "agreement": _rounded(agreement[k]),
            "agreement_min": _rounded(least[k]),
            "dead": not bool(live[k]),
        }
        for k in range(len(labels))
    ]
    records = [_record(seen, performer, n, labels == k, {"agreement": agreement}) for k, n in enumerate(names)]
    records.append(_record(seen, performer, OTHER_ID, labels == OTHER, {"agreement": agreement}))
    shuffled = _silhouettes_of_chance(seen, live, groups.count, how, generator) if groups.count else []
    low, high = (
        torch.quantile(torch.tensor(shuffled), torch.tensor([0.025, 0.975])).tolist() if shuffled else (math.nan,) * 2
    )
    return _Assigned(
        rule="clusters",
        parts=records,
        filters=filters,
        thresholds={
            "clusters": groups.count,
            "silhouette": groups.silhouette.get(groups.count, math.nan),
            "silhouette_by_count": {str(k): round(v, 5) for k, v in groups.silhouette.items()},
            "agreement_min_level": how.null_level,
        },
        null={
            "kind": "random cell per photo; for the silhouette every filter's photos shuffled",
            "filters": how.null_filters,
            "silhouette": {
                "value": sum(shuffled) / len(shuffled) if shuffled else math.nan,
                "interval": [low, high],
                "n": len(shuffled),
                "unit": "draws",
            },
        },
        assign=assign,
        matched=True,
    )


def _silhouettes_of_chance(
    seen: _Seen, live: Tensor, count: int, how: PartsConfig, generator: torch.Generator
) -> list[float]:
    """Return the silhouette of as many groups when no filter's peaks belong to the photo they were found in."""
    import torch

    from partlens.artefacts.parts import clustered, filter_vectors, peak_features

    found = []
    for _ in range(_SILHOUETTE_DRAWS):
        order = torch.rand(seen.peaks.scores.shape, generator=generator).argsort(0)
        cells = seen.peaks.cells.gather(0, order[..., None].expand_as(seen.peaks.cells))
        vectors = filter_vectors(cells, peak_features(seen.maps, cells), place_weight=how.place_weight)
        found.append(clustered(vectors, live, fewest=count, most=count).silhouette[count])
    return found


def _rounded(value: Tensor) -> float:
    return round(float(value), 5)


def _record(
    seen: _Seen, performer: Performer, name: str, inside: Tensor, scores: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Describe one part: its filters, where they peak, and its mean scores."""
    size = performer.preprocessing.size_px
    place = seen.peaks.positions_px[:, inside].flatten(0, 1)
    means = {k: _rounded(v[inside].nanmean()) if bool(inside.any()) else math.nan for k, v in scores.items()}
    return {
        "id": name,
        "name": name,
        "filters": inside.nonzero()[:, 0].tolist(),
        "n": int(inside.sum()),
        "mean_place_frac": [_rounded(place[:, a].mean() / size[1 - a]) if len(place) else None for a in (0, 1)],
        **means,
    }


# --- what the parts add -----------------------------------------------------------------------------------------------


def _contributions(
    explainer: Explainer, head: nn.Module, seen: _Seen, content: Mapping[str, Any], how: PartsConfig, show: Progress
) -> dict[str, Any]:
    """Measure what each part adds to the performer's own answer to each photo, and whether its removal agrees."""
    import torch

    from partlens.metrics.estimate import bootstrap
    from partlens.metrics.faithfulness import agreement_top1
    from partlens.metrics.parts import removal_agreement
    from partlens.pipeline.part_shares import part_labels, part_shares

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
        return bootstrap(lambda i: float(values[i].mean()), count, generator=generator, rounds=_ROUNDS).to_dict()

    def ratio(part: Tensor, whole: Tensor) -> dict[str, Any]:
        def share(i: Tensor) -> float:
            below = float(whole[i].sum())
            return float(part[i].sum()) / below if below > 0 else math.nan

        return bootstrap(share, count, generator=generator, rounds=_ROUNDS).to_dict()

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
        "score_of": "the performer's own answer to each photo",
        "baseline": "both tracks silent (x_enc = 0)",
        "method": batches[0].method,
        "score": {
            "performer": mean(seen.outputs.gather(1, answers[:, None])[:, 0].double()),
            "fed_back": mean(joined("score")),
            "baseline": mean(joined("baseline")),
            "agreement_top1": agreement_top1(torch.cat([b.fed_outputs for b in batches]), seen.outputs).to_dict(),
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
            name: removal_agreement(predicted, removal, generator=generator).to_dict()
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
    show: Progress,
) -> None:
    """Draw for each part what its most active filters peak at, and note file and filters in its record."""
    import numpy as np

    from partlens.artefacts.pictures import save_png, strip
    from partlens.gallery import region_px

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
