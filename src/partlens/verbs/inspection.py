"""The verb inspect: from a network and photos to what each category is known by, in one pass over the photos."""

from __future__ import annotations

import itertools
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import ImageError, expected, listed
from partlens.object_parts.inspection import TENSORS, CategoryFile, InspectConfig, InspectedCategory, InspectRecord
from partlens.page.page import PAGE, write_report
from partlens.progress import Progress
from partlens.records import file_sha256, read_tensors, write_tensors
from partlens.run import PassPrecision, Run
from partlens.selection.record import DescriptorConfig, SelectionConfig, SelectionRecord
from partlens.shards import Compute
from partlens.verbs.explain import explain
from partlens.verbs.runs import (
    category_names,
    data_info,
    loaded,
    open_photos,
    performer_info,
    sampled,
    verb,
    with_precision,
)
from partlens.verbs.select_features import MOST_PICTURES, Chosen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer
    from partlens.object_parts.reading import Read, Wanted
    from partlens.object_parts.regions import Upper
    from partlens.verbs.inspected_category import CategoryPhotos, Stage

_CACHE = "cache-inspect"
_RESPONSES = ("descriptor", "logits", "peak", "peak_cell")
_LEAST_MEASURED = 8
_EXPLAINED = 2


@verb
def inspect(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    *,
    out: str | Path,
    category: str | Sequence[str] | None = None,
    tap: str | None = None,
    split: str = "train",
    mu: float | Chosen = "auto",
    config: InspectConfig | Mapping[str, Any] | None = None,
    keep_cache: bool = False,
    compute: Compute | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> InspectRecord:
    """Tell what a network knows each category by: its parts, texture, or something beside the object.

    Parts are found without training on the network's own later layer. What they carry is read off the network itself:
    the cells of a layer outside windows around the parts are set to nothing, and its own upper layers go on. Two of the
    photos shown are explained (:func:`explain`). Run again with the same arguments, it goes on where it was stopped; a
    finished run is returned as it is, and its page made again where it is lost.

    Args:
        model: the performer; see :func:`layers`. It is not changed.
        data: a folder, a table or an :class:`~partlens.data.images.ImageSet`. Photos without categories are one.
        out: the run directory.
        category: which categories to inspect, a list, or names with commas; by default all. Photos of the others serve
            for comparison.
        tap: the layer whose cells are set to nothing; by default the model's own.
        split: photos that parts are found on; what they carry is measured on photos of the split ``test``.
        mu: bound of the relevant filters (see :func:`select_features`); ``auto`` lets held-out folds choose.
        config: a whole configuration, or fields to change in the default.
        keep_cache: keep what was read of the photos.
        compute: on which device and on how many processes.
        progress: how to show progress; optional.

    Returns:
        The content of ``inspect.json``.

    Raises:
        ImageError: no photos, an unknown category, or too few photos of every category.
        InputError: a value out of its range.
        LayerError: a tap that is unknown or that a shortcut goes around.
        RunError: ``out`` holds another run; the text names the setting that differs.
        StorageError: the disk is full; what was finished stays.
    """
    from partlens.object_parts.finding import finding_layers
    from partlens.object_parts.regions import upper_of

    started, show, run = time.monotonic(), progress or Progress.silent(), Run(Path(out))
    settings = InspectConfig.of(config)
    where = Compute.of(compute)
    performer = loaded(model, where.device)
    images, unreadable = open_photos(data, show=show)
    chosen = _chosen(images, category, split, settings)
    tap = tap or performer.tap
    performer.layer(tap)  # refuses one that is unknown
    upper_of(performer, tap)  # refuses one that a shortcut goes around, before a photo is read
    asked = InspectRecord.asked(
        performer_info(performer),
        data_info(images, unreadable, images.fingerprint(), tuple(one.name for one in chosen.categories)),
        config=settings,
        split=split,
        mu=mu if isinstance(mu, str) else float(mu),
        tap=tap,
        finding=finding_layers(performer),
    )
    with run.begun(asked) as begun:
        finished = begun
        if not begun.finished:
            quick, record = with_precision(
                performer, begun, run.folder, lambda: _precision(performer, images, chosen, begun), show
            )
            work = _Work(quick, images, chosen, record, upper_of(quick, tap), run, show)
            finished = work.finished(started, where)
            if not keep_cache:
                shutil.rmtree(run.folder / _CACHE)
    if begun.finished and (run.folder / PAGE).exists():
        show.say(f"{out} holds this inspection already; nothing to do")
        return begun
    _explained(finished, performer, images, run.folder, where, show)
    page = write_report(run.folder)
    show.say(f"wrote {run.folder / finished.FILE} in {finished.seconds:.0f} s; look at {page}")
    return finished


def _explained(
    found: InspectRecord, performer: Performer, images: ImageSet, folder: Path, where: Compute, show: Progress
) -> None:
    """Explain some of the photos that the page shows, category by category: the first of each, then the second, ..."""
    by_rank = itertools.zip_longest(*(one.shown for one in found.categories))
    if shown := [*filter(None, itertools.chain.from_iterable(by_rank))][:_EXPLAINED]:
        some = images.take([images.keys.index(photo.image) for photo in shown])
        explain(folder, some, model=performer, compute={"device": where.device}, progress=show)


# --- photos -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chosen:
    """Which photos are read for what: rows of the image set, in the order in which they are read."""

    found: tuple[int, ...]
    measured: tuple[int, ...]
    others: tuple[int, ...]
    categories: tuple[CategoryPhotos, ...]
    notes: tuple[str, ...]


def _chosen(images: ImageSet, category: str | Sequence[str] | None, split: str, config: InspectConfig) -> _Chosen:
    """Choose the photos of each category, at most as many as the configuration says."""
    from partlens.verbs.inspected_category import CategoryPhotos

    names, least = _names(images, category), config.LEAST_PHOTOS
    made: list[CategoryPhotos] = []
    few: list[str] = []
    found: list[int] = []
    measured: list[int] = []
    for name in names:
        own, held = _rows(images, name, split, config)
        if len(own) < least:
            few.append(f"{name or 'all'} ({len(own)})")
            continue
        on = range(len(found), len(found) + len(own))
        held_out = len(held) >= _LEAST_MEASURED
        of = range(len(measured), len(measured) + len(held)) if held_out else on[: config.measured]
        slug = f"{len(made) + 1:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:40] or 'photos'}"
        made.append(CategoryPhotos(name, slug, tuple(on), tuple(of), held_out))
        found += own
        measured += held if held_out else []
    if not made:
        raise ImageError(expected(f"at least {least} photos of a category in {split}", listed(few), "Add photos"))
    notes = [f"not inspected, with fewer than {least} photos to find parts on: {listed(few)}"] if few else []
    rest = [row for row, own in enumerate(images.categories) if own not in names]
    others = sampled(rest, config.background, config.seed)
    content_of = images.digests().__getitem__
    if copies := sum(map({*map(content_of, found)}.__contains__, map(content_of, measured))):
        notes.append(f"{copies} of the held-out photos are copies of photos that parts were found on: see data check")
    return _Chosen(tuple(found), tuple(measured), tuple(others), tuple(made), tuple(notes))


def _names(images: ImageSet, category: str | Sequence[str] | None) -> list[str]:
    known = images.category_counts()
    if category is None:
        return sorted(filter(None, known)) or [""]
    return [name for name in sorted(category_names(category, known)) if images.indices(name)]  # refuses an unknown one


def _rows(images: ImageSet, name: str, split: str, config: InspectConfig) -> tuple[list[int], list[int]]:
    """Return the photos of a category to find parts on and those to measure on."""
    own, _ = images.rows_of([name], split)
    held, _ = images.rows_of([name], "test") if "test" in {*images.splits} - {split} else ((), ())
    return sampled(own, config.photos, config.seed), sampled(held, config.measured, config.seed)


def _wanted(performer: Performer, tap: str | None, finding: tuple[str, ...]) -> Wanted:
    from partlens.object_parts.reading import Wanted
    from partlens.selection.measured_layers import feature_index

    descriptor = DescriptorConfig()
    return Wanted(tap, finding, feature_index(performer, descriptor), descriptor)


def _precision(performer: Performer, images: ImageSet, chosen: _Chosen, record: InspectRecord) -> PassPrecision:
    """Choose the precision of the passes: whatever is read must agree."""
    from partlens.network.precision import chosen_precision

    wanted = _wanted(performer, performer.whole(record.tap), record.finding)
    return chosen_precision(
        performer,
        images,
        chosen.found,
        wanted.read,
        passes=len(chosen.found) * record.config.views + len(chosen.measured) + len(chosen.others),
        reduce=wanted.compared,
        wanted=record.config.precision,
    )


# --- work -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Work:
    """An inspection under way."""

    performer: Performer
    images: ImageSet
    chosen: _Chosen
    record: InspectRecord
    upper: Upper
    run: Run
    show: Progress

    def finished(self, started: float, where: Compute) -> InspectRecord:
        """Read, find parts, account for them and select filters; write the record."""
        reads = self.reads(where)
        stage = self.stage(reads)
        categories = self.categories(stage)
        notes = (*self.chosen.notes, *self.filters(reads))
        return self.run.finish(
            self.record,
            started,
            categories=categories,
            fill="zero" if not bool(stage.nothing.any()) else "mean",
            tensors_sha256=file_sha256(self.run.folder / TENSORS),
            notes=notes,
        )

    def reads(self, where: Compute) -> tuple[Read, Read, Read]:
        """Run all photos through the performer once: those that parts are found on in all views."""
        import torch

        from partlens.explainer.views import view_windows
        from partlens.object_parts.reading import read_photos

        chosen, config = self.chosen, self.record.config
        generator = torch.Generator().manual_seed(config.seed)
        read = self.performer.whole(self.record.tap)
        kinds = (
            ("found", chosen.found, config.views, read),
            ("measured", chosen.measured, 1, read),
            ("others", chosen.others, 1, None),
        )
        total = sum(len(rows) * views for _, rows, views, _ in kinds)
        made: list[Read] = []
        before = 0
        with self.show.task("reading photos", total, "fewer --inspect.photos or --inspect.views") as advance:
            for name, rows, views, tap in kinds:
                windows = view_windows(len(rows), views, generator)
                made.append(
                    read_photos(
                        self.performer,
                        self.images,
                        rows,
                        windows,
                        _wanted(self.performer, tap, self.record.finding),
                        self.run.folder / _CACHE / name,
                        where,
                        lambda photos, before=before, views=views: advance(before + photos * views),
                    )
                )
                before += len(rows) * views
        return made[0], made[1], made[2]

    def filters(self, reads: Sequence[Read]) -> tuple[str, ...]:
        """Select the relevant filters from what was read, unless the run holds a selection; return what to note."""
        if (held := SelectionRecord.read_if_there(self.run.folder)) is not None:
            own = held.created >= self.record.created  # of this inspection, which was stopped after it
            return () if own else ("the relevant filters are those of the selection that the run held already",)
        rows = [row for read in reads for row in read.rows]
        if len({self.images.categories[row] for row in rows} - {""}) < 2:
            return ("relevant filters were not selected: that needs photos of two categories at least",)
        _selection(self, reads, rows).write(self.run.folder)
        return ()

    def stage(self, reads: Sequence[Read]) -> Stage:
        """Return what all categories share."""
        import numpy as np
        import torch

        from partlens.verbs.inspected_category import Stage

        found, measured, _ = reads
        decided: dict[int, int] = {}
        for read in filter(lambda each: each.rows, reads):
            scores = self.performer.outputs.decisions(torch.from_numpy(np.array(read.arrays["logits"])))
            decided |= dict(zip(read.rows, scores.argmax(1).tolist(), strict=True))
        config = self.record.config
        nothing = _nothing(found, self.performer.layer(self.record.tap).shape[1], config)
        return Stage(
            self.performer, self.images, self.upper, nothing, found, measured, decided, config, self.run.folder
        )

    def categories(self, stage: Stage) -> tuple[InspectedCategory, ...]:
        """Inspect category by category; a finished one is only read."""
        from partlens.verbs.inspected_category import inspect_category

        made: list[InspectedCategory] = []
        tensors: dict[str, Tensor] = {"nothing": stage.nothing}
        with self.show.task("finding parts and what they carry", len(self.chosen.categories)) as advance:
            for number, photos in enumerate(self.chosen.categories):
                advance(number, photos.name)
                folder = self.run.folder / _CACHE / "categories" / photos.slug
                if (kept := CategoryFile.read_if_there(folder)) is None:
                    found, locating = inspect_category(stage, photos)
                    write_tensors(folder / TENSORS, locating)
                    CategoryFile(found=found).write(folder)
                else:
                    found = kept.found
                tensors |= {f"{number}.{name}": each for name, each in read_tensors(folder / TENSORS).items()}
                made.append(found)
            advance(len(made))
        write_tensors(self.run.folder / TENSORS, tensors)
        return tuple(made)


def _selection(work: _Work, reads: Sequence[Read], rows: Sequence[int]) -> SelectionRecord:
    """Select from what was read: photos to fit on come first, then those held out."""
    import numpy as np

    from partlens.selection.responses import Responses, TopPhotos
    from partlens.verbs.selected_features import SelectionPhotos, select_from

    record, images = work.record, work.images
    config = SelectionConfig(
        split=record.split,
        mu=record.mu,
        labels="data",
        nonnegative=True,
        descriptor=DescriptorConfig(),
        top_photos=50,
        pictures=MOST_PICTURES,
        seed=record.config.seed,
    )
    splits = [images.splits[row] if images.categories[row] else "" for row in rows]
    fitted, held = ([k for k, each in enumerate(splits) if each == split] for split in (record.split, "test"))
    order = [*dict.fromkeys((*fitted, *held))]
    chosen = images.take(rows[k] for k in order)
    arrays = {n: np.concatenate([read.arrays[n] for read in reads if read.rows]) for n in _RESPONSES}
    index, lost = _wanted(work.performer, None, record.finding).index, sum(read.dead_layers for read in reads)
    top = TopPhotos.none(min(config.ranks, len(fitted)), index.size)
    top = top.merged(arrays["peak"][fitted], arrays["peak_cell"][fitted], 0)
    responses = Responses(chosen.keys, index, arrays["descriptor"][order], arrays["logits"][order], lost, top)
    data = data_info(images, record.data.unreadable, chosen.fingerprint())
    asked = SelectionRecord.asked(record.performer, data, config=config, photos=len(fitted))
    matched = work.performer.matched(sorted(set(chosen.categories)))
    photos = SelectionPhotos(work.performer, chosen, len(fitted), config, matched)
    return asked.changed(found=select_from(photos, responses, work.run.folder, work.show), status="finished")


def _nothing(found: Read, rows: int, config: InspectConfig) -> Tensor:
    """Return what a cell of the tap is set to: zero where the tap has no negative values, else the mean map.

    ``rows`` are those of cells, without what is read below them (`Performer.whole`).
    """
    import torch

    some = found.tap(torch.arange(len(found.rows))[:: max(1, len(found.rows) // 256)])[:, :, :rows]
    if config.fill == "zero" or (config.fill == "auto" and float(some.min()) >= 0):
        return torch.zeros(some.shape[1:])
    return some.mean(0)
