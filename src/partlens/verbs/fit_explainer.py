"""The verb fit-explainer, a function and a sub-command of the same name, and how its run is opened again.

Torch is imported when a verb runs, not when this module is read, so that help is shown at once.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import ImageError, InputError, RunError, expected, listed
from partlens.evaluation.results import PriceCurve, PricePoint
from partlens.explainer.config import ExplainerConfig, Preset
from partlens.explainer.record import LESSON, WEIGHTS, ExplainerRun, ExplainerStructure, Grid, History
from partlens.object_parts.inspection import InspectRecord
from partlens.progress import Progress
from partlens.records import file_sha256, read_tensors, write_tensors
from partlens.run import PHOTOS, PassPrecision, Precision, Run, Unreadable, UsedPhotos, command, now, versions
from partlens.shards import Compute
from partlens.verbs.runs import (
    chosen_categories,
    data_info,
    labels_of,
    loaded,
    open_performer,
    open_photos,
    performer_info,
    sampled,
    verb,
    with_precision,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.evaluation.explainer_evaluation import Lesson
    from partlens.explainer.network import Explainer
    from partlens.explainer.teachers import PlaceSource
    from partlens.explainer.terms import Classification
    from partlens.explainer.training import Extras
    from partlens.explainer.views import TrainingMaps
    from partlens.network.performer import Performer

_MOST_BACKGROUND = 1500
_DEFAULT_SEEDS = 1
_MOST_PRICED = 100
_SHORTER = "fewer --seeds, --explainer.epochs or --explainer.warmup_epochs"


@dataclass(frozen=True)
class FittedExplainer:
    """A finished run.

    Attributes:
        path: the run directory.
        record: what ``run.json`` says.
        history: one mapping of logged terms per epoch, of the explainer that is kept.
    """

    path: Path
    record: ExplainerRun
    history: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class _Photos:
    """What is learned from: rows of the categories and of others."""

    images: ImageSet
    categories: tuple[str, ...]
    own: tuple[int, ...]
    others: tuple[int, ...]
    unreadable: tuple[Unreadable, ...]


@dataclass(frozen=True)
class _Fit:
    """Everything a fit reads; nothing of it changes."""

    performer: Performer
    photos: _Photos
    asked: ExplainerRun
    out: Path
    cache: Path
    finding: tuple[str, ...]  # layers that the parts that teach are found on
    extras: Extras
    show: Progress
    where: Compute


@verb
def fit_explainer(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    *,
    out: str | Path,
    category: str | Sequence[str] | None = None,
    tap: str | None = None,
    targets: Sequence[str] | None = None,
    inspection: str | Path | None = None,
    preset: Preset = "partlens",
    config: ExplainerConfig | Mapping[str, Any] | None = None,
    seeds: int = _DEFAULT_SEEDS,
    background: int = _MOST_BACKGROUND,
    cache: str | Path | None = None,
    keep_cache: bool = False,
    compute: Compute | Mapping[str, Any] | None = None,
    places_of: PlaceSource | None = None,
    progress: Progress | None = None,
) -> FittedExplainer:
    """Learn an explainer of one layer without labels of parts, and write a run directory.

    Run again with the same arguments, it goes on where it was stopped; a finished run is returned as it is.

    Args:
        model: the performer; see :func:`layers`. It is not changed.
        data: a folder, a table or an :class:`~partlens.data.images.ImageSet`; photos of the split ``train`` are used.
        out: the run directory.
        category: the category to explain; the other photos then serve as background for the reconstruction. Several (a
            list, or names with commas) make one explainer whose filters are shared among them: each belongs to the
            category whose photos activate it most. By default all photos are one category.
        tap: the layer to explain; by default the model's own.
        targets: layers to reconstruct; by default two after the tap.
        inspection: a finished run of :func:`inspect` of the same network, whose parts teach, with those that its search
            chose and did not keep; by default the one in ``out``, and where there is none, the same search is made.
        preset: ``partlens`` or ``paper``.
        config: a whole configuration, or fields to change in the preset.
        seeds: explainers learned with different seeds; the first is the one that is kept, several give p's spread.
        background: most photos of other categories that are used.
        cache: folder for the cached maps, kept afterwards; runs of the same photos, layers, ``views`` and ``seed`` may
            share it, one after the other. By default ``cache`` in the run directory.
        keep_cache: keep the run directory's cached maps, too.
        compute: on which device maps are computed and the explainer learns, and how many processes read photos. Those
            that torchrun starts learn together, each its part of every batch, equal to one up to rounding; the
            arguments of the first count, it alone reads photos and writes, the others find ``out`` by the same path.
        places_of: where the parts that teach are (:data:`partlens.explainer.teachers.PlaceSource`), instead.
        progress: how to show progress; by default it is not shown.

    Returns:
        The finished run.

    Raises:
        AtWorkError: another process writes to ``out`` or ``cache``.
        ImageError: no photos, too few, or an unknown category.
        LayerError: a tap that is unknown or cannot be explained.
        RunError: ``out`` holds another run (the text names the setting that differs), or the inspection is unfinished,
            of another network, or without one of the categories; or another process ended.
        StorageError: the disk is full; what was finished stays.
    """
    from partlens.explainer.processes import started
    from partlens.explainer.training import Extras, follow
    from partlens.network.performer import device_of

    since, show, folder = time.monotonic(), progress or Progress.silent(), Path(out)
    where, performer = Compute.of(compute), loaded(model)
    with started() as processes:
        device = device_of(where.device, performer.device, processes.of_machine)
        known = processes.shared(performer.weights_sha256)
        if processes.number:
            follow(performer, known, Extras(device=device, processes=processes))
            return FittedExplainer(folder, Run(folder).read(ExplainerRun), History.read(folder).epochs)
        settings = _settings(preset, config, device, seeds=seeds, background=background)
        info = performer_info(performer, device)  # refuses a network without scores before a photo is read
        photos = _chosen(data, category, background, settings.seed, show)
        structure, grid = _opened(performer, photos, tap, targets)
        places, teacher, finding = _teaching(
            performer, photos.categories, settings, places_of, _inspection(folder, inspection)
        )
        asked = ExplainerRun(
            created=now(),
            command=command(),
            versions=versions(),
            performer=info,
            data=data_info(photos.images, photos.unreadable, photos.images.fingerprint(), photos.categories),
            train_photos=len(photos.own),
            background=len(photos.others),
            structure=structure,
            preset="custom" if isinstance(config, ExplainerConfig) else preset,
            config=settings,
            seeds=seeds,
            places=places,
            grid=grid,
        )
        maps = folder / "cache" if cache is None else Path(cache)
        extras = Extras(teacher, _classification(performer, asked), device, processes)
        fit = _Fit(performer, photos, asked, folder, maps, finding, extras, show, where)
        record = _fitted(fit, since, keep_cache=keep_cache or cache is not None)
        processes.shared()  # the others end, too
    return FittedExplainer(folder, record, History.read(folder).epochs)


def _fitted(fit: _Fit, since: float, *, keep_cache: bool) -> ExplainerRun:
    """Do what is left of a run and return its record."""
    show, folder = fit.show, fit.out
    with Run(folder).begun(fit.asked) as begun:
        if begun.finished:
            show.say(f"{folder} is finished already; nothing to do")
            return begun
        reading, record = with_precision(fit.performer, begun, folder, lambda: _precision(fit), show)
        shares = _learned(replace(fit, performer=reading))
        said = _price(PriceCurve.read(folder)) if (folder / PriceCurve.FILE).exists() else ""
        if not keep_cache:
            shutil.rmtree(fit.cache)
        sealed = {"weights_sha256": file_sha256(folder / WEIGHTS), "lesson_sha256": file_sha256(folder / LESSON)}
        record = Run(folder).finish(record, since, p_by_seed=shares, **sealed)
        show.say(f"wrote {folder / WEIGHTS} in {record.seconds:.0f} s; p = {shares[0]:.3f}{said}")
        return record


def _settings(
    preset: Preset,
    config: ExplainerConfig | Mapping[str, Any] | None,
    device: torch.device,
    *,
    seeds: int,
    background: int,
) -> ExplainerConfig:
    """Check the numbers and return the configuration; what the preset leaves to the machine is settled here."""
    if background < 0:
        raise InputError(expected("background of at least 0", background, "Set --background to 0 or more"))
    if seeds < 1:
        raise InputError(expected("at least 1 seed", seeds, "Set --seeds to 1 or more"))
    from partlens.network.precision import has_bfloat16_units

    if isinstance(config, ExplainerConfig):
        return config
    changes = dict(config or {})
    if "precision" not in changes and not has_bfloat16_units(device):
        # Emulated, a convolution in bfloat16 takes ten times as long as one in float32. The record says which it was.
        changes["precision"] = "float32"
    return ExplainerConfig.preset(preset, **changes)


def _chosen(
    data: str | Path | ImageSet, category: str | Sequence[str] | None, background: int, seed: int, show: Progress
) -> _Photos:
    """Open the photos and choose those of the training split."""
    images, unreadable = open_photos(data, show=show)
    categories = chosen_categories(category, images.category_counts())
    own, others = images.rows_of(categories, "train")
    if len(own) < 2:
        named = ", ".join(filter(None, categories))
        rule = f"at least 2 training photos{f' of {named}' if named else ''}"
        raise ImageError(expected(rule, len(own), "Add photos, or rows with split train"))
    return _Photos(images, categories, own, tuple(sampled(others, background, seed)), unreadable)


def _opened(
    performer: Performer, photos: _Photos, tap: str | None, targets: Sequence[str] | None
) -> tuple[ExplainerStructure, Grid]:
    """Say what an explainer of the tap consists of, and refuse a network that cannot be explained before any work."""
    from partlens.explainer.network import explainer_structure

    tap = tap or performer.tap
    performer.layer(tap)  # refuses one that is unknown
    example = performer.preprocessing([photos.images.read(photos.own[0])])
    structure = explainer_structure(performer, example, tap, targets)
    field = performer.field(tap)
    return structure, Grid(stride_px=field.stride_px, size_px=field.size_px, start_px=field.start_px)


def _inspection(out: Path, given: str | Path | None) -> Path | None:
    """Return the run of the inspection whose parts teach, if there is one."""
    if given is not None:
        return Path(given)
    there = InspectRecord.read_if_there(out)
    return out if there is not None and there.finished else None


def _teaching(
    performer: Performer,
    categories: tuple[str, ...],
    config: ExplainerConfig,
    places_of: PlaceSource | None,
    inspection: Path | None,
) -> tuple[str, PlaceSource | None, tuple[str, ...]]:
    """Say where the parts that teach come from, as the record says it, and which layers they are found on.

    Nothing where the configuration has no teachers.
    """
    from partlens.object_parts.finding import finding_layers, found_places, known_places
    from partlens.verbs.explained_windows import load_inspection

    if not config.teachers:
        return "", None, ()  # the papers' preset
    if places_of is not None:
        return f"{places_of.__module__}:{places_of.__qualname__}", places_of, ()
    if inspection is None:
        return "found", found_places, finding_layers(performer)
    opened = load_inspection(inspection, performer)
    if missing := [name for name in categories if name not in opened.finders]:
        rule = f"an inspection of {listed(missing)} in {inspection}"
        got = listed(sorted(opened.finders)) or "none"
        raise RunError(expected(rule, got, "Inspect these categories too, or give another run (--inspection)"))
    finders = [opened.searched[name] for name in categories]
    name = f"inspection {opened.record.tensors_sha256[:12]}"
    return name, known_places(finders), opened.record.finding


def _classification(performer: Performer, asked: ExplainerRun) -> Classification | None:
    """Return the classification, where the configuration asks for it.

    Raises:
        InputError: the performer has no output for a category.
    """
    from partlens.explainer.network import performer_head
    from partlens.explainer.terms import Classification

    if asked.config.objective != "classification":
        return None
    known, categories = performer.class_names or (), asked.data.categories
    if not set(categories) <= set(known):
        rule = "a performer with an output for each category (objective=classification learns from labels)"
        outputs = ", ".join(known[:8]) or "without names"
        got = f"outputs {outputs} for {', '.join(filter(None, categories)) or 'no category'}"
        raise InputError(expected(rule, got, "Use another network, or leave the objective as it is"))
    return Classification(performer_head(performer, asked.structure), tuple(known.index(name) for name in categories))


def _precision(fit: _Fit) -> PassPrecision:
    """Choose the precision of the pass that caches maps: of maps that are there already, theirs."""
    import torch

    from partlens.network.precision import chosen_precision
    from partlens.rows import RowRecord

    found = RowRecord.read_if_there(fit.cache)
    wanted: Precision = "float32" if fit.asked.config.precision == "float32" else "auto"
    structure, photos = fit.asked.structure, fit.photos
    return chosen_precision(
        fit.performer.on(torch.device(fit.extras.device)),
        photos.images,
        photos.own,
        [structure.read, *structure.targets, *fit.finding],
        passes=len(photos.own) * fit.asked.config.views + len(photos.others) * _views_of_others(fit.asked.config),
        wanted=wanted if found is None else found.identity.get("precision", wanted),
    )


def _views_of_others(config: ExplainerConfig) -> int:
    """Return views of a photo of others: the photo, and its mirror where the category's are only mirrored."""
    return 2 if config.views <= 2 else 1


def _cached_maps(fit: _Fit) -> TrainingMaps:
    """Stream the views of all photos once and keep tap and targets on disk."""
    import numpy as np
    import torch

    from partlens.explainer.views import TrainingMaps, view_windows, viewed_images
    from partlens.network.stream import stream_maps

    photos, config, structure = fit.photos, fit.asked.config, fit.asked.structure
    generator = torch.Generator().manual_seed(config.seed)
    windows = view_windows(len(photos.own), config.views, generator)
    others = view_windows(len(photos.others), _views_of_others(config), generator)
    counts = [config.views] * len(photos.own) + [others.shape[1]] * len(photos.others)
    rows = np.repeat(np.array([*photos.own, *photos.others], dtype=np.int64), counts)
    table = torch.cat([windows.flatten(0, 1), others.flatten(0, 1)])
    drawn, viewing = viewed_images(photos.images, fit.performer, rows, table)
    with fit.show.task("caching maps", len(rows), "fewer --background or --explainer.views") as advance:
        arrays = stream_maps(
            viewing.on(torch.device(fit.extras.device)),
            drawn,
            [structure.read, *structure.targets, *fit.finding],
            fit.cache,
            compute=fit.where,
            progress=lambda done, _: advance(done),
        )
    return TrainingMaps(
        tap=arrays[structure.read],
        targets=tuple(arrays[target] for target in structure.targets),
        windows=windows,
        labels=labels_of(photos.images, photos.categories, photos.own),
        background_rows=np.arange(len(windows.flatten(0, 1)), len(rows)),
        finding=tuple(arrays[layer] for layer in fit.finding),
    )


def _learned(fit: _Fit) -> tuple[float, ...]:
    """Learn the explainers of all seeds that are not there yet, and return their shares p."""
    photos, asked, show = fit.photos, fit.asked, fit.show
    if not (fit.out / PHOTOS).exists():
        digests = photos.images.digests()
        UsedPhotos.of(digests[i] for i in (*photos.own, *photos.others)).write(fit.out)
    layers = f"{asked.structure.tap} → {', '.join(asked.structure.targets)}"
    counted = f"{len(photos.own)} photos {asked.data.of}".rstrip()
    show.say(f"{fit.performer.name} · {layers} · {counted}, {len(photos.others)} others")
    for note in fit.performer.outputs.notes:
        show.say(note)
    maps = _cached_maps(fit)
    epochs = asked.config.warmup_epochs + asked.config.epochs
    with show.task("learning", asked.seeds * epochs, _SHORTER) as advance:
        shares = tuple(
            _learned_once(fit, maps, number, lambda done, text, before=number * epochs: advance(before + done, text))
            for number in range(asked.seeds)
        )
    lesson = _lesson(maps, _views_of_others(asked.config))
    write_tensors(fit.out / LESSON, {"features": lesson[0], "labels": lesson[1]})
    if not (fit.out / PriceCurve.FILE).exists():
        _priced(fit, maps, lesson)
    return shares


def _lesson(maps: TrainingMaps, views: int) -> Lesson:
    """Return what tells the categories, and others from them: features of the whole photos at the last target."""
    import torch

    from partlens.explainer.views import gather

    rows = (maps.rows(torch.arange(maps.photos)), maps.background_rows[::views])
    features = torch.cat([_pooled(gather(maps.targets[-1], each)) for each in rows])
    # Of one category against others that category is 1; several come in their order, and others are none of them.
    if maps.categories > 1:
        return features[: maps.photos], maps.labels
    return features, (torch.arange(len(features)) < maps.photos).long()


def _pooled(values: Tensor) -> Tensor:
    return values.mean((2, 3)) if values.dim() == 4 else values.flatten(1)


def _priced(fit: _Fit, maps: TrainingMaps, lesson: Lesson) -> None:
    """Measure what p is worth, as learned and at higher prices, on held-out photos; without any there is no curve."""
    import torch

    from partlens.evaluation.explainer_evaluation import EvaluationRows, price_point
    from partlens.evaluation.fidelity import own_columns
    from partlens.explainer.network import build_explainer
    from partlens.explainer.training import FACTORS, along_the_price
    from partlens.metrics.faithfulness import logistic_head
    from partlens.network.stream import stream_maps

    photos, config, none = fit.photos, fit.asked.config, torch.zeros(0, dtype=torch.long)
    # What the fit learned from would flatter: prices are those of photos that it has not seen.
    held, others = (sampled(rows, _MOST_PRICED, config.seed) for rows in _held_out(photos))
    if len(held) < 2 or config.objective != "reconstruction":
        return
    own = own_columns(fit.performer, photos.categories)
    head = logistic_head(*lesson) if own is None and len(lesson[1].unique()) > 1 else None
    others = others[: len(held)] if own is not None or head is not None else []
    images = photos.images.take([*held, *others])
    rows = EvaluationRows(
        range(len(held)), range(len(held), len(images)), (), labels_of(photos.images, photos.categories, held), none
    )
    structure, folder = fit.asked.structure, fit.out / "price"  # not in the cache, which other runs may share
    on_device, layers = fit.performer.on(torch.device(fit.extras.device)), [structure.read, *structure.targets]
    known = stream_maps(on_device, images, layers, fit.cache / "held-out", compute=fit.where)
    explainer = build_explainer(fit.performer, fit.asked.structure, config)
    explainer.load_state_dict(read_tensors(fit.out / WEIGHTS, explainer.state_dict()))
    points: list[PricePoint] = []
    # Measured as they are learned, since decoders of many layers are too large to be kept for each price.
    with fit.show.task("the price of p", 1 + len(FACTORS)) as advance:
        for each in itertools.chain([explainer], along_the_price(explainer, maps, folder, fit.extras)):
            each.to(on_device.device)
            points.append(price_point(each, on_device, images, known, rows, photos.categories, head))
            each.cpu()
            advance(len(points))
    PriceCurve(photos=len(held), others=len(others), points=tuple(points)).write(fit.out)
    shutil.rmtree(folder)


def _held_out(photos: _Photos) -> tuple[list[int], list[int]]:
    """Return the photos of the split ``test``: of the categories, and others."""
    whole, images = photos.categories == ("",), photos.images
    test = [row for row, split in enumerate(images.splits) if split == "test"]
    own = [row for row in test if whole or images.categories[row] in photos.categories]
    return own, sorted({*test} - {*own})


def _price(curve: PriceCurve) -> str:
    """Say beside p what the part filters alone keep."""
    alone = curve.points[0].parts_alone
    target, kept = list(alone.parts.variance_kept.items())[-1]
    null = alone.other_photo.variance_kept[target]
    return (
        f", a price: with the ordinary track silent the part filters keep {kept.value:.0%} of the variance of {target} "
        f"and {alone.parts.agreement_top1.value:.0%} of the decisions (those of another photo {null.value:.0%} and "
        f"{alone.other_photo.agreement_top1.value:.0%}) on {curve.photos} held-out photos"
    )


def _learned_once(fit: _Fit, maps: TrainingMaps, number: int, advance: Callable[..., None]) -> float:
    """Learn one explainer and return its p; a finished one is only read."""
    from partlens.checkpoint import Checkpoint
    from partlens.explainer.network import build_explainer
    from partlens.explainer.training import train_explainer

    config = fit.asked.config.changed({"seed": fit.asked.config.seed + number})
    folder = fit.out if number == 0 else fit.out / "seeds" / str(config.seed)
    explainer = build_explainer(fit.performer, fit.asked.structure, config)
    if (folder / WEIGHTS).exists():
        explainer.load_state_dict(read_tensors(folder / WEIGHTS, explainer.state_dict()))
        return float(explainer.p.detach())
    result = train_explainer(
        explainer,
        maps,
        folder,
        extras=fit.extras,
        report=lambda record: advance(record["epoch"], fit.show.summary(record)),
    )
    share = float(explainer.p.detach())
    write_tensors(folder / WEIGHTS, explainer.state_dict())
    Checkpoint(folder, "").remove()
    fit.show.say(f"seed {config.seed}: {result.stopped} after {len(result.history)} epochs, p = {share:.3f}")
    return share


@verb
def load_explainer(
    run: str | Path, model: str | nn.Module | Performer | None = None, device: str | None = None
) -> tuple[Explainer, Performer]:
    """Open a finished run.

    Args:
        run: the run directory.
        model: the performer; by default it is loaded by its name, unless that would run somebody's code.
        device: where both shall be (:class:`partlens.shards.Device`).

    Returns:
        The explainer in eval mode and the performer.

    Raises:
        RunError: the run is missing or unfinished, the performer's weights are not those of the run, or the explainer's
            were changed.
    """
    from partlens.explainer.network import build_explainer

    folder = Path(run)
    record = Run(folder).read(ExplainerRun)
    performer = open_performer(record, model, device)
    explainer = build_explainer(performer, record.structure, record.config)
    remedy = "Restore the file, or delete the folder and fit again"
    weights = read_tensors(folder / WEIGHTS, explainer.state_dict(), sha256=record.weights_sha256, remedy=remedy)
    explainer.load_state_dict(weights)
    return explainer.eval().to(performer.device), performer
