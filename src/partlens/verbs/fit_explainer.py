"""The verb fit-explainer, a function and a sub-command of the same name, and how its run is opened again.

Torch is imported when a verb runs, not when this module is read, so that help texts answer at once.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import ImageError, InputError, RunError, expected, listed
from partlens.explainer.config import REVISION, ExplainerConfig, Preset
from partlens.progress import Progress
from partlens.records import SCHEMA, content_hash, read_json, read_tensors, write_json, write_tensors
from partlens.verbs.runs import (
    EVALUATION,
    PHOTOS,
    RUN,
    category_rows,
    check_answer,
    device_of,
    loaded,
    manifest_head,
    on_device,
    opened,
    performer_of,
    rows_of,
    run_folder,
    sampled,
    several,
    write_photos,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from partlens.data.images import ImageSet
    from partlens.explainer.network import Explainer, ExplainerStructure
    from partlens.explainer.training import Head
    from partlens.explainer.training_maps import TrainingMaps
    from partlens.network.zoo import Performer

WEIGHTS = "explainer.safetensors"
MOST_BACKGROUND = 1500
DEFAULT_SEEDS = 3
BACKGROUND_VIEWS = 2
_EVIDENCE_BATCH = 64


@dataclass(frozen=True)
class FittedExplainer:
    """A finished run.

    Attributes:
        path: the run directory.
        manifest: content of ``run.json``.
        history: one record per epoch.
    """

    path: Path
    manifest: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...]


def _cached_maps(
    performer: Performer,
    images: ImageSet,
    photos: Sequence[int],
    background: Sequence[int],
    structure: ExplainerStructure,
    config: ExplainerConfig,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> TrainingMaps:
    """Stream the views of all photos once and keep tap and targets on disk."""
    import numpy as np
    import torch

    from partlens.explainer.training_maps import TrainingMaps
    from partlens.explainer.views import view_windows, viewed_images
    from partlens.network.stream import stream_maps

    generator = torch.Generator().manual_seed(config.seed)
    windows = view_windows(len(photos), config.views, config.crop_area_min, generator)
    others = view_windows(len(background), 1 + BACKGROUND_VIEWS, config.crop_area_min, generator)[:, [0, 2]]
    rows = np.concatenate(
        [np.repeat(np.array(photos), config.views), np.repeat(np.array(background), BACKGROUND_VIEWS)]
    ).astype(np.int64)
    table = torch.cat([windows.flatten(0, 1), others.flatten(0, 1)])
    drawn, viewing = viewed_images(images, performer, rows, table)
    taps = [structure.tap, *structure.targets]
    with progress.task("caching maps", len(rows)) as advance:
        shown = on_device(viewing, device)
        arrays = stream_maps(shown, drawn, taps, folder, progress=lambda done, _: advance(done))
    first = len(photos) * config.views
    evidence = None
    if config.evidence_weight > 0:
        evidence = _cached_evidence(performer, structure.tap, arrays[structure.tap], first, folder, device, progress)
    return TrainingMaps(
        tap=arrays[structure.tap],
        targets=tuple(arrays[t] for t in structure.targets),
        windows=windows,
        background_rows=np.arange(first, len(rows)),
        evidence=evidence,
    )


def _cached_evidence(
    performer: Performer,
    tap: str,
    maps: np.ndarray,
    count: int,
    folder: Path,
    device: torch.device,
    progress: Progress,
) -> np.ndarray:
    """Return the evidence of the first ``count`` rows of cached maps, computed once per cache."""
    import numpy as np
    import torch

    from partlens.explainer.evidence import evidence_maps

    path = folder / "evidence.safetensors"
    if path.exists():
        kept: np.ndarray = read_tensors(path)["evidence"].numpy()
        if kept.shape == (count, *maps.shape[2:]):
            return kept
    upper = performer.graph.cut(tap, ["output"]).to(device).float()
    found = np.empty((count, *maps.shape[2:]), np.float32)
    with progress.task("reading evidence", count) as advance:
        for start in range(0, count, _EVIDENCE_BATCH):
            part = torch.from_numpy(np.array(maps[start : min(start + _EVIDENCE_BATCH, count)])).float()
            found[start : start + len(part)] = evidence_maps(upper, part.to(device)).cpu().numpy()
            advance(start + len(part))
    write_tensors(path, {"evidence": torch.from_numpy(found)})
    return found


def _single(category: str | Sequence[str] | None) -> str | None:
    """Return the one category that is meant, however it was given."""
    if category is None or isinstance(category, str):
        return category
    return category[0] if category else None


def _head_of(
    performer: Performer, structure: ExplainerStructure, config: ExplainerConfig, categories: Sequence[str]
) -> Head | None:
    """Return what classifies the reconstruction for Explainer+cls; ``None`` for the other objective.

    Raises:
        InputError: the performer has no output for a category.
    """
    if config.objective != "classification":
        return None
    from partlens.explainer.assembly import performer_head
    from partlens.explainer.training import Head

    known = performer.class_names or ()
    missing = [name for name in categories if name not in known]
    if missing or not categories:
        raise InputError(
            expected(
                "a performer with an output for each category (objective=classification learns from labels)",
                f"outputs {', '.join(known[:8]) or 'without names'} for {', '.join(categories) or 'no category'}",
                "Train one with partlens train-performer, or leave the objective as it is",
            )
        )
    return Head(performer_head(performer, structure), tuple(known.index(name) for name in categories))


def _say_dropped(dropped: Sequence[Mapping[str, str]], show: Progress) -> None:
    if dropped:
        show.say(f"{len(dropped)} photos could not be read and are left out: {listed([d['key'] for d in dropped])}")


def _example_batch(performer: Performer, images: ImageSet, row: int) -> Any:
    return performer.preprocessing([images.read(row)])


def fit_explainer(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    *,
    out: str | Path,
    category: str | Sequence[str] | None = None,
    tap: str | None = None,
    targets: Sequence[str] | None = None,
    preset: Preset = "partlens",
    config: ExplainerConfig | Mapping[str, Any] | None = None,
    seeds: int = DEFAULT_SEEDS,
    background: int = MOST_BACKGROUND,
    cache: str | Path | None = None,
    keep_cache: bool = False,
    device: str = "cpu",
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
            category whose photos excite it most. All photos as one category when left out.
        tap: the layer to explain; the model's default tap when left out.
        targets: layers to reconstruct; chosen after the tap when left out.
        preset: ``partlens``, ``held``, ``candidates`` or ``paper``, which also takes tap, targets and eta from the
            papers where the network is theirs and these are not named.
        config: a whole configuration, or fields to change in the preset.
        seeds: explainers learned with different seeds; the first is the one that is kept, all of them give p's spread.
        background: most photos of other categories that are used.
        cache: folder for the cached maps, kept afterwards; runs of the same photos, layers, ``views`` and ``seed`` may
            share it, one after the other.
            ``cache`` in the run directory when left out.
        keep_cache: keep the run directory's cached maps, too.
        device: where maps are computed and the explainer learns: ``cpu``, ``cuda``, ``cuda:1``. Not part of what makes
            a run the same.
        progress: how to show progress; silent when left out.

    Returns:
        The finished run.

    Raises:
        ImageError: no photos, too few, or an unknown category.
        LayerError: a tap that is unknown or cannot be explained.
        RunError: ``out`` holds another run.
        StorageError: the disk is full; what was finished stays.
    """
    import torch

    from partlens.explainer.assembly import explainer_structure

    started = time.monotonic()
    show = progress or Progress.silent()
    out = Path(out)
    where = device_of(device)
    if background < 0:
        raise InputError(expected("background of at least 0", background, "Set --background to 0 or more"))
    if seeds < 1:
        raise InputError(expected("at least 1 seed", seeds, "Set --seeds to 1 or more"))
    performer = loaded(model)
    changes = {} if isinstance(config, ExplainerConfig) else dict(config or {})
    settings = config if isinstance(config, ExplainerConfig) else ExplainerConfig.preset(preset, **changes)
    images, dropped = opened(data)
    joint = several(category, images.category_counts())
    category = None if joint else _single(category)
    photos, others = rows_of(images, joint, "train") if joint else category_rows(images, category, "train")
    named = f" of {', '.join(joint) or category}" if joint or category else ""
    if len(photos) < 2:
        raise ImageError(
            expected(
                f"at least 2 training photos{named}",
                len(photos),
                "Add photos, or rows with split train",
            )
        )
    others = tuple(sampled(others, background, settings.seed))
    tap = tap or performer.tap
    performer.layer(tap)
    example = _example_batch(performer, images, photos[0])
    check_answer(performer, example, scores=True)
    structure = explainer_structure(performer, example, tap, targets)
    contents = images.digests()
    fingerprint = images.fingerprint()
    identity = content_hash(
        {
            "performer": performer.weights_sha256,
            "preprocessing": performer.preprocessing.to_dict(),
            "data": fingerprint,
            "category": list(joint) if joint else category,
            "structure": structure.to_dict(),
            "config": settings.to_dict(),
            "revision": REVISION,
            "seeds": seeds,
            "background": len(others),
        }
    )
    with run_folder(out, RUN, identity) as earlier:
        manifest = earlier
        if manifest is not None and manifest["status"] == "finished":
            show.say(f"{out} is finished already; nothing to do")
            return FittedExplainer(out, manifest, tuple(read_json(out / "history.json")["epochs"]))
        field = performer.field(tap)
        if manifest is None:
            for stale in (out / WEIGHTS, out / EVALUATION, out / PHOTOS, *out.glob(f"seeds/*/{WEIGHTS}")):
                stale.unlink(missing_ok=True)  # of a run whose run.json was deleted
            manifest = {
                **manifest_head(SCHEMA, "explainer", identity, performer, model),
                "data": {
                    "name": images.name,
                    "path": None if images.path is None else str(images.path),
                    "fingerprint": fingerprint,
                    "category": category or "",
                    "categories": list(joint),
                    "train_photos": len(photos),
                    "background_photos": len(others),
                    "unreadable": dropped,
                },
                "structure": structure.to_dict(),
                "preset": preset if not isinstance(config, ExplainerConfig) else "custom",
                "config": settings.to_dict(),
                "seeds": seeds,
                "receptive_field": {
                    "stride_px": list(field.stride_px),
                    "size_px": list(field.size_px),
                    "start_px": list(field.start_px),
                },
                "status": "running",
                "seconds": 0.0,
            }
            write_json(out / RUN, manifest)
        if not (out / PHOTOS).exists():
            write_photos(out, (contents[i] for i in (*photos, *others)))
        show.say(
            f"{performer.name} · {tap} → {', '.join(structure.targets)} · "
            f"{len(photos)} photos{named}, {len(others)} others"
        )
        _say_dropped(dropped, show)
        shares: list[float] = []
        head = _head_of(performer, structure, settings, joint or ((category,) if category else ()))
        folder_of_maps = out / "cache" if cache is None else Path(cache)
        for number in range(seeds):
            seeded = dataclasses.replace(settings, seed=settings.seed + number)
            folder = out if number == 0 else out / "seeds" / str(seeded.seed)
            maps = _cached_maps(performer, images, photos, others, structure, settings, folder_of_maps, where, show)
            if joint:
                labels = torch.tensor([joint.index(images.categories[i]) for i in photos])
                maps = dataclasses.replace(maps, labels=labels)
            shares.append(_fit_one(performer, structure, seeded, maps, folder, show, head, where))
        del maps  # some systems remove no file that is mapped
        if cache is None and not keep_cache:
            shutil.rmtree(folder_of_maps)
        seconds = round(float(manifest["seconds"]) + time.monotonic() - started, 1)
        manifest |= {"status": "finished", "seconds": seconds, "p_by_seed": shares}
        write_json(out / RUN, manifest)
        show.say(f"wrote {out / WEIGHTS} in {seconds:.0f} s; p = {shares[0]:.3f}")
        return FittedExplainer(out, manifest, tuple(read_json(out / "history.json")["epochs"]))


def _fit_one(
    performer: Performer,
    structure: ExplainerStructure,
    config: ExplainerConfig,
    maps: TrainingMaps,
    folder: Path,
    progress: Progress,
    head: Head | None,
    device: torch.device,
) -> float:
    """Train one explainer in a folder and return its p; a finished one is only read."""
    import torch

    from partlens.explainer.assembly import build_explainer
    from partlens.explainer.training import CHECKPOINT_STATE, train_explainer

    explainer = build_explainer(performer, structure, config)
    if (folder / WEIGHTS).exists():
        explainer.load_state_dict(read_tensors(folder / WEIGHTS))
        return float(explainer.p.detach())
    total = config.warmup_epochs + config.epochs
    with progress.task(f"learning (seed {config.seed})", total) as advance:
        result = train_explainer(
            explainer,
            maps,
            folder,
            head=head,
            device=device,
            report=lambda record: advance(record["epoch"], progress.summary(record)),
        )
    with torch.no_grad():
        share = float(explainer.p)
    write_tensors(folder / WEIGHTS, explainer.state_dict(), {"schema": SCHEMA})
    for leftover in (CHECKPOINT_STATE, "checkpoint-0.safetensors", "checkpoint-1.safetensors"):
        (folder / leftover).unlink(missing_ok=True)
    progress.say(f"seed {config.seed}: {result.stopped} after {len(result.history)} epochs, p = {share:.3f}")
    return share


def load_explainer(run: str | Path, model: str | nn.Module | Performer | None = None) -> tuple[Explainer, Performer]:
    """Open a finished run.

    Args:
        run: the run directory.
        model: the performer; loaded by the name in the manifest when left out.

    Returns:
        The explainer in eval mode and the performer.

    Raises:
        RunError: the run is missing or unfinished, or the performer's weights are not those of the run.
    """
    from partlens.explainer.assembly import build_explainer
    from partlens.explainer.network import ExplainerStructure

    run = Path(run)
    manifest = read_json(run / RUN)
    if manifest.get("kind") != "explainer" or manifest.get("status") != "finished":
        raise RunError(
            expected(
                f"a finished explainer run in {run}",
                str(manifest.get("status", "another kind of run")),
                "Run fit-explainer again with the same arguments; it goes on where it stopped",
            )
        )
    performer = performer_of(manifest, run, model)
    values = manifest["structure"]
    structure = ExplainerStructure(
        **{**values, "targets": tuple(values["targets"]), "side_cells": tuple(values["side_cells"])}
    )
    explainer = build_explainer(performer, structure, ExplainerConfig.from_dict(manifest["config"]))
    explainer.load_state_dict(read_tensors(run / WEIGHTS))
    return explainer.eval(), performer
