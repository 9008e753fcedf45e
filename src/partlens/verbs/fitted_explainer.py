"""What fit-explainer does: maps of all photos, cached once; explainers of several seeds; what a higher p costs."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import torch

from partlens.checkpoint import Checkpoint
from partlens.data.images import ImageSet
from partlens.evaluation.explainer_evaluation import EvaluationRows, Lesson, features_of, price_point
from partlens.evaluation.fidelity import own_columns
from partlens.evaluation.results import PriceCurve, PricePoint
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer
from partlens.explainer.record import LESSON, WEIGHTS, ExplainerRun
from partlens.explainer.training import FACTORS, Extras, along_the_price, train_explainer
from partlens.explainer.views import TrainingMaps, gather, view_windows, viewed_images
from partlens.metrics.faithfulness import logistic_head
from partlens.network.performer import Performer
from partlens.network.precision import chosen_precision
from partlens.network.stream import stream_maps
from partlens.progress import Progress
from partlens.records import file_sha256, read_tensors, write_tensors
from partlens.rows import RowRecord
from partlens.run import PHOTOS, PassPrecision, Precision, Run, Unreadable, UsedPhotos
from partlens.shards import Compute
from partlens.verbs.runs import chosen_categories, enough_photos, labels_of, open_photos, sampled, with_precision

_MOST_PRICED = 100
_SHORTER = "fewer --seeds, --explainer.epochs or --explainer.warmup_epochs"


@dataclass(frozen=True)
class Photos:
    """What is learned from: rows of the categories and of others."""

    images: ImageSet
    categories: tuple[str, ...]
    own: tuple[int, ...]
    others: tuple[int, ...]
    unreadable: tuple[Unreadable, ...]

    @classmethod
    def chosen(
        cls,
        data: str | Path | ImageSet,
        category: str | Sequence[str] | None,
        background: int,
        seed: int,
        show: Progress,
    ) -> Self:
        """Open the photos and choose those of the training split."""
        images, unreadable = open_photos(data, show=show)
        categories = chosen_categories(category, images.category_counts())
        own, others = enough_photos(images, categories, "train", "Add photos, or rows with split train")
        return cls(images, categories, own, tuple(sampled(others, background, seed)), unreadable)


@dataclass(frozen=True)
class Fit:
    """Everything a fit reads; nothing of it changes."""

    performer: Performer
    photos: Photos
    asked: ExplainerRun
    out: Path
    cache: Path
    finding: tuple[str, ...]  # layers that the parts that teach are found on
    extras: Extras
    show: Progress
    where: Compute

    def finished(self, since: float, *, keep_cache: bool) -> ExplainerRun:
        """Do what is left of a run and return its record."""
        show, folder = self.show, self.out
        with Run(folder).begun(self.asked) as begun:
            if begun.finished:
                show.say(f"{folder} is finished already; nothing to do")
                return begun
            reading, record = with_precision(self.performer, begun, folder, lambda: _precision(self), show)
            shares = _learned(replace(self, performer=reading))
            said = _price(PriceCurve.read(folder)) if (folder / PriceCurve.FILE).exists() else ""
            if not keep_cache:
                shutil.rmtree(self.cache)
            sealed = {"weights_sha256": file_sha256(folder / WEIGHTS), "lesson_sha256": file_sha256(folder / LESSON)}
            record = Run(folder).finish(record, since, p_by_seed=shares, **sealed)
            show.say(f"wrote {folder / WEIGHTS} in {record.seconds:.0f} s; p = {shares[0]:.3f}{said}")
            return record


def _precision(fit: Fit) -> PassPrecision:
    """Choose the precision of the pass that caches maps: of maps that are there already, theirs."""
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


def _cached_maps(fit: Fit) -> TrainingMaps:
    """Stream the views of all photos once and keep tap and targets on disk."""
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
            progress=advance,
        )
    return TrainingMaps(
        tap=arrays[structure.read],
        targets=tuple(arrays[target] for target in structure.targets),
        windows=windows,
        labels=labels_of(photos.images, photos.categories, photos.own),
        background_rows=np.arange(len(windows.flatten(0, 1)), len(rows)),
        finding=tuple(arrays[layer] for layer in fit.finding),
    )


def _learned(fit: Fit) -> tuple[float, ...]:
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
    rows = (maps.rows(torch.arange(maps.photos)), maps.background_rows[::views])
    features = torch.cat([features_of(gather(maps.targets[-1], each)) for each in rows])
    # Of one category against others that category is 1; several come in their order, and others are none of them.
    if maps.categories > 1:
        return features[: maps.photos], maps.labels
    return features, (torch.arange(len(features)) < maps.photos).long()


def _priced(fit: Fit, maps: TrainingMaps, lesson: Lesson) -> None:
    """Measure what p is worth, as learned and at higher prices, on held-out photos; without any there is no curve."""
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


def _held_out(photos: Photos) -> tuple[list[int], list[int]]:
    """Return the photos of the split ``test``: of the categories, and others."""
    whole, images = photos.categories == ("",), photos.images
    test = images.indices(split="test") if "test" in images.splits else ()
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


def _learned_once(fit: Fit, maps: TrainingMaps, number: int, advance: Callable[..., None]) -> float:
    """Learn one explainer and return its p; a finished one is only read."""
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
