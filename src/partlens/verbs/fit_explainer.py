"""The verb fit-explainer, a function and a sub-command of the same name, and how its run is opened again.

Torch is imported when a verb runs, not when this module is read, so that help is shown at once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import ImageError, InputError, RunError, expected, listed
from partlens.explainer.config import ExplainerConfig, Preset
from partlens.explainer.record import WEIGHTS, ExplainerRun, ExplainerStructure, Grid, History
from partlens.object_parts.inspection import FindingConfig, InspectRecord
from partlens.progress import Progress
from partlens.records import read_tensors
from partlens.run import Run
from partlens.shards import Compute
from partlens.verbs.runs import data_info, labels_of, loaded, open_performer, performer_info, verb

if TYPE_CHECKING:
    import torch
    from torch import nn

    from partlens.data.images import ImageSet
    from partlens.explainer.network import Explainer
    from partlens.explainer.teachers import PlaceSource
    from partlens.explainer.terms import Classification
    from partlens.network.performer import Performer
    from partlens.verbs.fitted_explainer import Photos


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
    seeds: int = 1,
    background: int = 1500,
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
    from partlens.verbs.fitted_explainer import Fit, Photos

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
        photos = Photos.chosen(data, category, background, settings.seed, show)
        structure, grid = _opened(performer, photos, tap, targets)
        inspected = inspection or (folder if InspectRecord.finished_in(folder) else None)
        places, teacher, finding = _teaching(performer, photos, settings, places_of, inspected)
        asked = ExplainerRun.asked(
            info,
            data_info(photos.images, photos.unreadable, photos.images.fingerprint(), photos.categories),
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
        fit = Fit(performer, photos, asked, folder, maps, finding, extras, show, where)
        record = fit.finished(since, keep_cache=keep_cache or cache is not None)
        processes.shared()  # the others end, too
    return FittedExplainer(folder, record, History.read(folder).epochs)


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


def _opened(
    performer: Performer, photos: Photos, tap: str | None, targets: Sequence[str] | None
) -> tuple[ExplainerStructure, Grid]:
    """Say what an explainer of the tap consists of, and refuse a network that cannot be explained before any work."""
    from partlens.explainer.network import explainer_structure

    tap = tap or performer.tap
    performer.layer(tap)  # refuses one that is unknown
    example = performer.preprocessing([photos.images.read(photos.own[0])])
    structure = explainer_structure(performer, example, tap, targets)
    field = performer.field(tap)
    return structure, Grid(stride_px=field.stride_px, size_px=field.size_px, start_px=field.start_px)


def _teaching(
    performer: Performer,
    photos: Photos,
    config: ExplainerConfig,
    places_of: PlaceSource | None,
    inspection: str | Path | None,
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
        counts = labels_of(photos.images, photos.categories, photos.own).bincount(minlength=len(photos.categories))
        if (fewest := int(counts.min())) < FindingConfig.LEAST_PHOTOS:
            rule = f"at least {FindingConfig.LEAST_PHOTOS} photos of each category in the split train to find parts in"
            got = f"{fewest} {photos.categories[int(counts.argmin())]}".rstrip()
            raise ImageError(expected(rule, got, "Add photos, or give an inspection's run (--inspection)"))
        return "found", found_places, finding_layers(performer)[:1]
    opened = load_inspection(Path(inspection), performer)
    if missing := [name for name in photos.categories if name not in opened.finders]:
        rule = f"an inspection of {listed(missing)} in {inspection}"
        got = listed(sorted(opened.finders)) or "none"
        raise RunError(expected(rule, got, "Inspect these categories too, or give another run (--inspection)"))
    finders = [opened.searched[name] for name in photos.categories]
    name = f"inspection {opened.record.tensors_sha256[:12]}"
    return name, known_places(finders), opened.record.finding[:1]


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
