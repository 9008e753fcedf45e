"""The verbs select-features and explain, each a function and a sub-command of the same name.

A selection lives in a run directory, beside the explainer of the same network if there is one: ``selection.json``
(what, with which versions, hashes and settings), ``selection.safetensors`` (the weights), ``pictures/`` and
``explanations/``.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partlens.pipeline.runs import (
    SELECTION,
    command,
    described,
    loaded,
    opened,
    performer_of,
    prepare_folder,
    spec,
    versions,
)
from partlens.progress import Progress
from partlens.store import content_hash, file_sha256, read_json, read_tensors, write_json, write_tensors
from partlens.vocabulary import ImageError, InputError, RunError, expected, listed, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from partlens.artefacts.explanation import ExplanationConfig, Explanations
    from partlens.data.images import ImageSet
    from partlens.performer.zoo import Performer
    from partlens.selection.relevance import DescriptorConfig, FeatureIndex, Responses, Selection

SCHEMA_SELECTION = "partlens.selection/1"
SCHEMA_EXPLANATION = "partlens.explanation/1"
SELECTION_WEIGHTS = "selection.safetensors"
DEFAULT_MU = 10.0
TOP_PHOTOS = 100
MOST_PICTURES = 400
_PICTURE_PX = 96
_SHOWN_PX = 448
_NO_PICTURES = {"receptive_field_px": None, "average": None, "control": None, "crops": None, "sharpness": None}
_BATCH = 8

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
    held = list(images.indices(split="test")) if split != "test" else []
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
    from partlens.selection.relevance import DescriptorConfig

    started = time.monotonic()
    show = progress or Progress.silent()
    out = Path(out)
    settings = descriptor if isinstance(descriptor, DescriptorConfig) else DescriptorConfig(**dict(descriptor or {}))
    if labels not in ("data", "predictions"):
        raise InputError(expected("labels data or predictions", labels, "Choose one of them (--labels)"))
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
    manifest = prepare_folder(out, SELECTION, identity)
    if manifest is not None and manifest["status"] == "finished":
        show.say(f"{out} holds this selection already; nothing to do")
        return SelectedFeatures(out, manifest)
    if manifest is None:
        manifest = {
            "schema": SCHEMA_SELECTION,
            "kind": "selection",
            "identity": identity,
            "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "command": command(),
            "versions": versions(),
            "performer": described(performer, spec(model)),
            "data": {
                "name": images.name,
                "path": str(Path(data).resolve()) if isinstance(data, (str, Path)) else None,
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
    from partlens.selection.relevance import stream_responses

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

    from partlens.metrics.estimate import Estimate, proportion
    from partlens.selection.relevance import class_of_category, select_relevant

    fit, test = len(rows), len(held)
    logits = torch.from_numpy(np.array(responses.logits))
    if config["labels"] == "data":
        names = sorted({images.categories[i] for i in rows})
        outputs: tuple[int | None, ...] = tuple(class_of_category(performer, name) for name in names)
        truth = [names.index(c) if (c := images.categories[i]) in names else -1 for i in [*rows, *held]]
        names = _readable(performer, names, outputs)
    else:
        decided = logits.argmax(1).tolist()
        known = sorted(set(decided[:fit]))
        outputs = tuple(known)
        names = _readable(performer, [str(o) for o in known], outputs)
        truth = [known.index(o) if o in known else -1 for o in decided]
    if len(names) < 2:
        raise ImageError(
            expected("at least 2 classes", listed(names), "Add photos of another class, or use --labels data")
        )
    target = torch.tensor(truth)
    x = torch.from_numpy(np.array(responses.descriptor))
    onehot = torch.nn.functional.one_hot(target[:fit], len(names)).double()
    selection = select_relevant(
        x[:fit], onehot, config["mu"], nonnegative=config["nonnegative"], index=responses.index, classes=tuple(names)
    )
    generator = torch.Generator().manual_seed(config["seed"])
    shuffled = select_relevant(
        x[:fit],
        onehot[torch.randperm(fit, generator=generator)],
        config["mu"],
        nonnegative=config["nonnegative"],
        index=responses.index,
        classes=tuple(names),
    )

    def readout(weights: Tensor) -> dict[str, Any]:
        if not test:
            return Estimate.undefined().to_dict()
        scores = x[fit:].double() @ weights
        return proportion((scores.argmax(1) == target[fit:]).double()).to_dict()

    right = Estimate.undefined().to_dict()
    if test and all(o is not None for o in outputs) and config["labels"] == "data":
        wanted = torch.tensor([-1 if t < 0 else int(outputs[t] or 0) for t in truth[fit:]])
        right = proportion((logits[fit:].argmax(1) == wanted).double()).to_dict()
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
                "accuracy": readout(selection.weights),
                "shuffled": readout(shuffled.weights),
                "chance": 1 / len(names),
                "model_accuracy": right,
            },
            "counts": onehot.sum(0).int().tolist(),
        },
    )


def _readable(performer: Performer, names: Sequence[str], outputs: Sequence[int | None]) -> list[str]:
    """Name classes that are numbers as the performer does; outputs that share a name keep their number beside it."""
    labels = [
        _output_name(performer, output) if output is not None and name.isdigit() else name
        for name, output in zip(names, outputs, strict=True)
    ]
    return [
        f"{label} ({output})" if labels.count(label) > 1 and output is not None else label
        for label, output in zip(labels, outputs, strict=True)
    ]


def _output_name(performer: Performer, output: int) -> str:
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

    from partlens.artefacts.interpretation import average_pictures
    from partlens.artefacts.pictures import picture_of, save_png, stretched, strip

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

    from partlens.artefacts.interpretation import strongest

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
    from partlens.selection.relevance import DescriptorConfig, FeatureIndex

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


def explain(
    run: str | Path,
    images: str | Path | Sequence[str | Path] | ImageSet,
    *,
    model: str | nn.Module | Performer | None = None,
    classes: Sequence[str] | None = None,
    count: int = 2,
    config: ExplanationConfig | Mapping[str, Any] | None = None,
    style: Literal["glow", "jet"] = "glow",
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Explain predictions: which relevant filters contributed most, and where each of them acted.

    Args:
        run: a run directory with a selection.
        images: files, folders of files, or an :class:`~partlens.data.images.ImageSet`.
        model: the performer; the one of the selection when left out.
        classes: names of the classes to explain; the most likely ones when left out.
        count: how many of the most likely classes.
        config: how to explain, or fields to change; the default of partlens when left out.
        style: colours of the overlays; ``jet`` as in the authors' figures.
        out: folder for the explanations; ``explanations`` in the run directory when left out.
        progress: how to show progress; silent when left out.

    Returns:
        One folder per image: ``explanation.json``, ``arrays.safetensors``, PNGs and a page.

    Raises:
        ImageError: no image, or one that cannot be read.
        InputError: an unknown class.
        RunError: no finished selection, or another performer.
    """
    import torch

    from partlens.artefacts.explanation import ExplanationConfig, choose_top, explain_batch
    from partlens.reporting import write_explanation_page

    show = progress or Progress.silent()
    opened_run = load_selection(run, model)
    how = config if isinstance(config, ExplanationConfig) else ExplanationConfig.preset(**dict(config or {}))
    found = _image_files(images)
    target = Path(out) if out is not None else opened_run.path / "explanations"
    names = _folder_names(found.keys)
    if count < 1:
        raise InputError(expected("at least 1 class to explain", count, "Set --count to 1 or more"))
    chosen = None if classes is None else [_class_column(opened_run, name) for name in classes]
    choose = choose_top(opened_run.outputs, min(count, len(opened_run.classes)))
    folders = []
    with show.task("explaining", len(found)) as advance:
        for first in range(0, len(found), _BATCH):
            part = range(first, min(first + _BATCH, len(found)))
            pictures = [found.read(i) for i in part]
            batch = opened_run.performer.preprocessing(pictures)
            wanted = None if chosen is None else torch.tensor([chosen] * len(part))
            arguments = (opened_run.performer, batch, opened_run.weights, opened_run.index, opened_run.descriptor)
            result = explain_batch(*arguments, wanted, how, choose=choose)
            unfixed = (
                explain_batch(*arguments, result.classes, dataclasses.replace(how, fix_strides=False))
                if how.fix_strides
                else None
            )
            for i, row in enumerate(part):
                folder = target / names[row]
                key = found.keys[row]
                _write_explanation(
                    opened_run, folder, key, pictures[i], result, unfixed, i, how, style, named=classes is not None
                )
                write_explanation_page(folder)
                folders.append(folder)
            advance(first + len(part))
    show.say(f"wrote {len(folders)} explanation{'s' if len(folders) != 1 else ''} to {target}")
    return folders


def _image_files(images: str | Path | Sequence[str | Path] | ImageSet) -> ImageSet:
    """Return the images to explain; folders mean the files in them."""
    from partlens.data.images import ImageSet

    if isinstance(images, ImageSet):
        return images
    given = [images] if isinstance(images, (str, Path)) else list(images)
    files: list[Path] = []
    for path in map(Path, given):
        files += [path / key for key in ImageSet.from_folder(path).keys] if path.is_dir() else [path]
    if not files:
        raise ImageError(expected("at least 1 image to explain", 0, "Name image files or a folder"))
    return ImageSet.from_files(files)


def _folder_names(names: Sequence[str]) -> list[str]:
    """Return a folder name for each image, the same names told apart by a number."""
    taken: dict[str, int] = {}
    result = []
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).stem) or "image"
        taken[plain] = taken.get(plain, 0) + 1
        result.append(plain if taken[plain] == 1 else f"{plain}-{taken[plain]}")
    return result


def _class_column(opened_run: OpenedSelection, name: str) -> int:
    if name in opened_run.classes:
        return opened_run.classes.index(name)
    for column, output in enumerate(opened_run.outputs):
        if output is not None and (str(output) == name or _output_name(opened_run.performer, output) == name):
            return column
    raise InputError(
        expected(
            f"a class of the selection in {opened_run.path}",
            name,
            f"Nearest: {', '.join(nearest(name, opened_run.classes))}",
        )
    )


def _rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two maps; ``nan`` where one is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(first.flatten().numpy()), rankdata(second.flatten().numpy())
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale > 0 else math.nan


def _lattice(signals: Tensor, performer: Performer) -> float:
    """Lattice index of one signal for the first strided convolution; ``nan`` where there is none."""
    from torch import nn

    from partlens.artefacts.lattice import lattice_index

    strides = (m.stride[0] for m in performer.module.modules() if isinstance(m, nn.Conv2d))
    stride = next((s for s in strides if s > 1), 1)
    if stride < 2 or min(signals.shape[-2:]) < 9 * stride:
        return math.nan
    return float(lattice_index(signals[None], stride)[0])


def _write_explanation(
    opened_run: OpenedSelection,
    folder: Path,
    key: str,
    picture: Image.Image,
    result: Explanations,
    unfixed: Explanations | None,
    i: int,
    how: ExplanationConfig,
    style: Literal["glow", "jet"],
    *,
    named: bool,
) -> None:
    """Write one image's explanation: numbers, arrays and pictures."""
    import torch

    from partlens.artefacts.pictures import coloured, overlay, picture_of, save_png

    performer = opened_run.performer
    probability = result.output[i].double().softmax(0)
    top = probability.argsort(descending=True, stable=True)[:5].tolist()
    rank_of = {output: r for r, output in enumerate(probability.argsort(descending=True, stable=True).tolist(), 1)}
    frame = performer.preprocessing.frame(picture)
    shown = frame
    if max(frame.size) < _SHOWN_PX:
        scale = _SHOWN_PX / max(frame.size)
        shown = frame.resize((round(frame.width * scale), round(frame.height * scale)))
    notes = list(performer.notes)
    outputs = set(opened_run.outputs)
    if not named and None not in outputs and top[0] not in outputs:
        notes.append(
            f"the prediction {_output_name(performer, top[0])} has no photo in the selection; the most likely class "
            "that has is explained"
        )
    if outputs == {None}:
        notes.append("the classes of the selection are not outputs of the performer; their linear scores rank them")
    records = []
    pictured = {
        (f["layer"], f["channel"]): f.get("average") for c in opened_run.manifest["classes"] for f in c["features"]
    }
    for k in range(result.classes.shape[1]):
        column = int(result.classes[i, k])
        output = opened_run.outputs[column]
        save_png(folder / f"combined-{k + 1}.png", overlay(shown, result.combined[i, k].numpy(), style))
        save_png(folder / f"heat-{k + 1}.png", picture_of(coloured(result.combined[i, k].numpy(), style)))
        features = []
        for r in range(result.features.shape[2]):
            feature = int(result.features[i, k, r])
            if feature < 0:
                continue
            layer, channel = opened_run.index.place(feature)
            file = f"feature-{k + 1}-{r + 1}.png"
            save_png(folder / file, overlay(shown, result.maps[i, k, r].numpy(), style))
            contribution = float(result.contributions[i, k, r])
            average = pictured.get((layer, channel))
            features.append(
                {
                    "layer": layer,
                    "channel": channel,
                    "feature": feature,
                    "weight": float(opened_run.weights[feature, column]),
                    "response": float(result.responses[i, k, r]),
                    "contribution": contribution,
                    "share": contribution / float(result.positive[i, k]),
                    "overlay": file,
                    "average": None if average is None else _relative(opened_run.path / average, folder),
                }
            )
        lattice = None
        if unfixed is not None and features:
            before = _lattice(unfixed.signals[i, k, 0], performer)
            if math.isfinite(before):
                lattice = {"before": before, "after": _lattice(result.signals[i, k, 0], performer)}
        records.append(
            {
                "class": opened_run.classes[column],
                "output": output,
                "probability": None if output is None else float(probability[output]),
                "rank": None if output is None else rank_of[output],
                "score": float(result.scores[i, k]),
                "combined": f"combined-{k + 1}.png",
                "heat": f"heat-{k + 1}.png",
                "features": features,
                "lattice_index": lattice,
                "rank_correlation_with_first": None
                if k == 0
                else _rank_correlation(result.combined[i, 0], result.combined[i, k]),
            }
        )
    save_png(folder / "input.png", shown)
    write_tensors(
        folder / "arrays.safetensors",
        {
            "maps": result.maps[i],
            "combined": result.combined[i],
            "features": result.features[i],
            "contributions": result.contributions[i],
            "responses": result.responses[i],
            "classes": result.classes[i],
            "output": torch.as_tensor(result.output[i]),
        },
        {"schema": SCHEMA_EXPLANATION},
    )
    write_json(
        folder / "explanation.json",
        {
            "schema": SCHEMA_EXPLANATION,
            "image": {"name": Path(key).name, "path": key, "size_px": list(picture.size)},
            "method": how.to_dict(),
            "performer": {"name": performer.name, "weights_sha256": performer.weights_sha256},
            "selection": {"identity": opened_run.manifest["identity"]},
            "input": "input.png",
            "prediction": {
                "classes": [
                    {"name": _output_name(performer, o), "output": o, "probability": float(probability[o])} for o in top
                ]
            },
            "explained": records,
            "notes": notes,
        },
    )


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
