"""The verb select-features, a function and a sub-command of the same name.

A selection lives in a run directory, beside the explainer of the same network if there is one: ``selection.json``
(what, with which versions, hashes and settings), ``selection.safetensors`` (the weights), ``pictures/`` and
``explanations/``.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partlens.errors import ImageError, InputError, RunError, expected, listed
from partlens.progress import Progress
from partlens.records import content_hash, file_sha256, read_json, read_tensors, write_json, write_tensors
from partlens.verbs.runs import (
    SELECTION,
    loaded,
    manifest_head,
    opened,
    performer_of,
    run_folder,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from partlens.data.images import ImageSet
    from partlens.network.zoo import Performer
    from partlens.selection.descriptors import DescriptorConfig, FeatureIndex
    from partlens.selection.relevance import Selection
    from partlens.selection.responses import Responses

SCHEMA_SELECTION = "partlens.selection/1"
SELECTION_WEIGHTS = "selection.safetensors"
DEFAULT_MU = 10.0
TOP_PHOTOS = 100
MOST_PICTURES = 400
_PICTURE_PX = 96
_NO_PICTURES = {"receptive_field_px": None, "average": None, "control": None, "crops": None, "sharpness": None}

Labels = Literal["data", "predictions"]


@dataclass(frozen=True)
class SelectedFeatures:
    """A finished selection.

    Attributes:
        path: the run directory.
        manifest: content of ``selection.json``.
    """

    path: Path
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class OpenedSelection:
    """A selection read back from its run directory.

    Attributes:
        path: the run directory.
        manifest: content of ``selection.json``.
        weights: ``[feature, class]`` float64.
        index: which layer and channel each feature is.
        descriptor: how descriptors are made.
        classes: names, in the order of the weights' columns.
        outputs: the performer's output of each class, ``None`` for classes that are no output.
        performer: the network.
    """

    path: Path
    manifest: Mapping[str, Any]
    weights: Tensor
    index: FeatureIndex
    descriptor: DescriptorConfig
    classes: tuple[str, ...]
    outputs: tuple[int | None, ...]
    performer: Performer


def _split_rows(images: ImageSet, split: str) -> tuple[list[int], list[int]]:
    """Return the photos to fit on and those to measure the read-out on."""
    rows = list(images.indices(split=split))
    if len(rows) < 2:
        raise ImageError(
            expected(
                f"at least 2 photos in the split {split}", len(rows), "Add photos, or name another split (--split)"
            )
        )
    held = list(images.indices(split="test")) if split != "test" and "test" in images.splits else []
    return rows, held


def select_features(
    model: str | nn.Module | Performer,
    data: str | Path | ImageSet,
    *,
    out: str | Path,
    mu: float = DEFAULT_MU,
    labels: Labels = "data",
    nonnegative: bool = True,
    descriptor: DescriptorConfig | Mapping[str, Any] | None = None,
    split: str = "train",
    top_photos: int = TOP_PHOTOS,
    pictures: int = MOST_PICTURES,
    seed: int = 0,
    keep_cache: bool = False,
    progress: Progress | None = None,
) -> SelectedFeatures:
    """Find the few internal filters that indicate each class, and what they answer to; write a run directory.

    The energies of all filters of all layers, gathered in one pass over the photos, are fitted to the classes by the
    μ-lasso (Oramas et al. 2019). Run again with the same arguments, it goes on where it was stopped.

    Args:
        model: the performer; see :func:`layers`. It is not changed.
        data: a folder, a table or an :class:`~partlens.data.images.ImageSet`.
        out: the run directory; that of an explainer of the same data may be given.
        mu: bound on the sum of a class's absolute weights (authors: 10, for their generated flowers 5).
        labels: ``data``: the categories of the photos; ``predictions``: the performer's own decisions.
        nonnegative: weights are at least 0.
        descriptor: which layers are measured and how; the authors' when left out.
        split: photos to fit on; those of the split ``test`` measure the linear read-out.
        top_photos: photos averaged in the picture of a filter.
        pictures: most filters that get pictures, those with the largest weights first.
        seed: of the shuffled labels and the random crops.
        keep_cache: keep the descriptors of all photos.
        progress: how to show progress; silent when left out.

    Returns:
        The finished selection.

    Raises:
        ImageError: no photos, too few, or a single class.
        RunError: ``out`` holds another run.
        StorageError: the disk is full; what was finished stays.
    """
    from partlens.selection.descriptors import DescriptorConfig

    started = time.monotonic()
    show = progress or Progress.silent()
    out = Path(out)
    settings = descriptor if isinstance(descriptor, DescriptorConfig) else DescriptorConfig(**dict(descriptor or {}))
    if labels not in ("data", "predictions"):
        raise InputError(expected("labels data or predictions", labels, "Choose one of them (--labels)"))
    if not (math.isfinite(mu) and mu > 0):
        raise InputError(expected("mu above 0", mu, f"Leave it out for {DEFAULT_MU:g}"))
    for name, value, least in (("top_photos", top_photos, 1), ("pictures", pictures, 0)):
        if value < least:
            raise InputError(expected(f"{name} of at least {least}", value, "Leave it out for the default"))
    performer = loaded(model)
    images, dropped = opened(data)
    rows, held = _split_rows(images, split)
    config = {
        "mu": mu,
        "nonnegative": nonnegative,
        "labels": labels,
        "descriptor": settings.to_dict(),
        "top_photos": top_photos,
        "pictures": pictures,
        "seed": seed,
    }
    fingerprint = images.fingerprint()
    identity = content_hash(
        {
            "performer": performer.weights_sha256,
            "preprocessing": performer.preprocessing.to_dict(),
            "data": fingerprint,
            "split": split,
            "config": config,
        }
    )
    with run_folder(out, SELECTION, identity) as earlier:
        manifest = earlier
        if manifest is not None and manifest["status"] == "finished":
            show.say(f"{out} holds this selection already; nothing to do")
            return SelectedFeatures(out, manifest)
        if manifest is None:
            manifest = {
                **manifest_head(SCHEMA_SELECTION, "selection", identity, performer, model),
                "data": {
                    "name": images.name,
                    "path": None if images.path is None else str(images.path),
                    "fingerprint": fingerprint,
                    "split": split,
                    "photos": len(rows),
                    "unreadable": dropped,
                },
                "config": config,
                "status": "running",
                "seconds": 0.0,
            }
            write_json(out / SELECTION, manifest)
        show.say(f"{performer.name} · {len(rows)} photos to fit on, {len(held)} held out")
        responses = _responses(performer, images.take([*rows, *held]), settings, out / "cache-selection", show)
        selection, outputs, result = _solved(performer, images, responses, rows, held, config)
        show.say(
            f"{result['features']} filters in {len(result['index']['layers'])} layers; "
            f"{result['solution']['nonzeros_mean']:.1f} relevant per class"
        )
        classes = _class_records(selection, outputs, responses, result.pop("counts"))
        _draw(performer, images.take(rows), responses, classes, out, config, show)
        _add_keys(classes, responses, len(rows))
        write_tensors(
            out / SELECTION_WEIGHTS,
            {"weights": selection.weights},
            {"schema": SCHEMA_SELECTION},
        )
        if not keep_cache:
            shutil.rmtree(out / "cache-selection")
        seconds = round(float(manifest["seconds"]) + time.monotonic() - started, 1)
        manifest |= {
            **result,
            "classes": classes,
            "weights_sha256": file_sha256(out / SELECTION_WEIGHTS),
            "status": "finished",
            "seconds": seconds,
        }
        write_json(out / SELECTION, manifest)
        show.say(f"wrote {out / SELECTION} in {seconds:.0f} s")
        return SelectedFeatures(out, manifest)


def _responses(
    performer: Performer, images: ImageSet, descriptor: DescriptorConfig, folder: Path, show: Progress
) -> Responses:
    """Stream the photos once."""
    from partlens.selection.responses import stream_responses

    with show.task("reading all layers", len(images)) as advance:
        return stream_responses(performer, images, descriptor, out=folder, progress=lambda done, _: advance(done))


def _solved(
    performer: Performer,
    images: ImageSet,
    responses: Responses,
    rows: Sequence[int],
    held: Sequence[int],
    config: Mapping[str, Any],
) -> tuple[Selection, tuple[int | None, ...], dict[str, Any]]:
    """Fit the weights, and the same to shuffled labels; measure both linear read-outs on the held-out photos."""
    import numpy as np
    import torch

    from partlens.estimate import Estimate, proportion
    from partlens.selection.labels import label_matrix
    from partlens.selection.relevance import readout, select_relevant

    fit, test = len(rows), len(held)
    logits = torch.from_numpy(np.array(responses.logits))
    source = config["labels"]
    # Outputs may share a name; as classes of their own they are numbered, and named only for people (`_readable`).
    namer = performer if source == "data" else None
    known = label_matrix(images.take(rows), source=source, logits=logits[:fit], performer=namer)
    names, outputs = known.classes, known.outputs
    if len(names) < 2:
        raise ImageError(
            expected(
                "at least 2 classes",
                f"{len(names)} ({listed(names)})",
                "Add photos of another class, or use --labels data",
            )
        )
    x = torch.from_numpy(np.array(responses.descriptor))
    selection = select_relevant(
        x[:fit],
        known,
        config["mu"],
        nonnegative=config["nonnegative"],
        index=responses.index,
        classes=_readable(performer, names, outputs),
    )
    told = null = right = Estimate.undefined()
    there = (
        [images.categories[i] for i in held] if source == "data" else [str(o) for o in logits[fit:].argmax(1).tolist()]
    )
    if {*names} & {*there}:
        truth = label_matrix(images.take(held), source=source, logits=logits[fit:], performer=namer, classes=names)
        columns = [names.index(name) for name in truth.classes]
        labels = torch.zeros(test, len(names), dtype=torch.float64)
        labels[:, columns] = truth.matrix
        found = readout(
            selection,
            x[fit:],
            labels,
            fitted=(x[:fit], known),
            generator=torch.Generator().manual_seed(config["seed"]),
        )
        told = proportion(found.correct.double())
        null = null if found.shuffled is None else proportion(found.shuffled.double())
        if source == "data" and None not in outputs:
            seen = labels.sum(1) > 0
            wanted = torch.tensor([-1 if o is None else o for o in outputs])[labels.argmax(1)]
            right = proportion((logits[fit:].argmax(1) == wanted)[seen].double())
    solution = selection.solution
    return (
        selection,
        outputs,
        {
            "index": responses.index.to_dict(),
            "features": responses.index.size,
            "solution": {
                "relative_gap": float(solution.relative_gap.max()),
                "nonzeros_mean": float(solution.nonzeros.double().mean()),
                "constraint_active": int(solution.constraint_active.sum()),
                "iterations": int(torch.as_tensor(solution.iterations).max()),
                "dead_layers": int(responses.dead_layers),
            },
            "readout": {
                "accuracy": told.to_dict(),
                "shuffled": null.to_dict(),
                "chance": 1 / len(names),
                "model_accuracy": right.to_dict(),
            },
            "counts": known.matrix.sum(0).int().tolist(),
        },
    )


def _readable(performer: Performer, names: Sequence[str], outputs: Sequence[int | None]) -> list[str]:
    """Name classes that are numbers as the performer does; outputs that share a name keep their number beside it."""
    labels = [
        output_name(performer, output) if output is not None and name.isdigit() else name
        for name, output in zip(names, outputs, strict=True)
    ]
    return [
        f"{label} ({output})" if labels.count(label) > 1 and output is not None else label
        for label, output in zip(labels, outputs, strict=True)
    ]


def output_name(performer: Performer, output: int) -> str:
    """Return how the performer calls one of its outputs, its number where it has no names."""
    names = performer.class_names
    return names[output] if names is not None and output < len(names) else str(output)


def _class_records(
    selection: Selection, outputs: Sequence[int | None], responses: Responses, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """Return what the manifest says of each class, its features by weight."""
    solution = selection.solution
    records = []
    for column, name in enumerate(selection.classes):
        total = float(solution.norm[column])
        features = [
            {
                "feature": responses.index.feature(layer, channel),
                "layer": layer,
                "channel": channel,
                "weight": weight,
                "share": abs(weight) / total if total > 0 else math.nan,
            }
            for layer, channel, weight in selection.relevant(column)
        ]
        records.append(
            {
                "name": name,
                "output": outputs[column],
                "photos": counts[column],
                "norm": total,
                "objective": float(solution.objective[column]),
                "relative_gap": float(solution.relative_gap[column]),
                "nonzeros": int(solution.nonzeros[column]),
                "features": features,
            }
        )
    return records


def _picture_name(layer: str, channel: int) -> str:
    return f"pictures/{re.sub(r'[^A-Za-z0-9._-]', '_', layer)}-{channel}"


def _draw(
    performer: Performer,
    images: ImageSet,
    responses: Responses,
    classes: Sequence[dict[str, Any]],
    out: Path,
    config: Mapping[str, Any],
    show: Progress,
) -> None:
    """Draw the relevant filters, the weightiest of each class first, and note the files in the records."""
    import numpy as np

    from partlens.attribution.average_pictures import average_pictures
    from partlens.attribution.pictures import picture_of, save_png, stretched, strip

    ranked = sorted(
        ((rank, -abs(f["weight"]), f["layer"], f["channel"]) for c in classes for rank, f in enumerate(c["features"])),
    )
    wanted = list(dict.fromkeys((layer, channel) for _, _, layer, channel in ranked))[: config["pictures"]]
    for record in classes:
        for feature in record["features"]:
            feature.update(_NO_PICTURES)
    if not wanted:
        return
    columns = [responses.index.feature(layer, channel) for layer, channel in wanted]
    fit = len(images)
    assert responses.peak is not None
    assert responses.peak_cell is not None
    with show.task("drawing filters", fit) as advance:
        drawn = average_pictures(
            performer,
            images,
            wanted,
            np.asarray(responses.peak[:fit])[:, columns],
            np.asarray(responses.peak_cell[:fit])[:, columns],
            top_photos=config["top_photos"],
            most_px=_PICTURE_PX,
            seed=config["seed"],
            advance=lambda done, total: advance(done * fit // total),
        )
    known: dict[tuple[str, int], dict[str, Any]] = {}
    for picture in drawn:
        name = _picture_name(picture.layer, picture.channel)
        save_png(out / f"{name}-average.png", picture_of(stretched(picture.average, picture.valid_frac)))
        save_png(out / f"{name}-control.png", picture_of(stretched(picture.control, picture.valid_frac)))
        save_png(out / f"{name}-crops.png", strip(picture.crops, _PICTURE_PX))
        known[picture.layer, picture.channel] = {
            "receptive_field_px": None if picture.receptive_field_px is None else list(picture.receptive_field_px),
            "average": f"{name}-average.png",
            "control": f"{name}-control.png",
            "crops": f"{name}-crops.png",
            "sharpness": {"value": picture.contrast, "control": picture.control_contrast},
        }
    for record in classes:
        for feature in record["features"]:
            feature.update(known.get((feature["layer"], feature["channel"]), {}))


def _add_keys(classes: Sequence[dict[str, Any]], responses: Responses, fit: int, count: int = 8) -> None:
    """Name the strongest photos of every relevant filter."""
    import numpy as np

    from partlens.attribution.average_pictures import strongest

    columns = sorted({f["feature"] for c in classes for f in c["features"]})
    if not columns:
        return
    assert responses.peak is not None
    top = strongest(np.asarray(responses.peak[:fit])[:, columns], min(count, fit))
    place = {feature: i for i, feature in enumerate(columns)}
    for record in classes:
        for feature in record["features"]:
            feature["strongest"] = [responses.keys[i] for i in top[place[feature["feature"]]]]


def load_selection(run: str | Path, model: str | nn.Module | Performer | None = None) -> OpenedSelection:
    """Open a finished selection.

    Args:
        run: the run directory.
        model: the performer; loaded by the name in the manifest when left out.

    Raises:
        RunError: the selection is missing, unfinished or damaged, or the performer's weights are not those of the run.
    """
    from partlens.selection.descriptors import DescriptorConfig, FeatureIndex

    run = Path(run)
    if not (run / SELECTION).exists():
        raise RunError(expected(f"a selection in {run}", "none", "Run select-features with this --out first"))
    manifest = read_json(run / SELECTION)
    if manifest.get("schema") != SCHEMA_SELECTION or manifest.get("status") != "finished":
        raise RunError(
            expected(
                f"a finished selection in {run}",
                str(manifest.get("status", "another file")),
                "Run select-features again with the same arguments; it goes on where it stopped",
            )
        )
    if file_sha256(run / SELECTION_WEIGHTS) != manifest["weights_sha256"]:
        raise RunError(
            expected(f"the weights of the selection in {run}", "a file that was changed", "Run select-features again")
        )
    performer = performer_of(manifest, run, model)
    return OpenedSelection(
        path=run,
        manifest=manifest,
        weights=read_tensors(run / SELECTION_WEIGHTS)["weights"],
        index=FeatureIndex.from_dict(manifest["index"]),
        descriptor=DescriptorConfig.from_dict(manifest["config"]["descriptor"]),
        classes=tuple(c["name"] for c in manifest["classes"]),
        outputs=tuple(c["output"] for c in manifest["classes"]),
        performer=performer,
    )
