"""The verb explain: one folder per image with numbers, arrays, pictures and a page."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partlens.pipeline.selection_run import OpenedSelection, load_selection, output_name
from partlens.progress import Progress
from partlens.store import write_json, write_tensors
from partlens.vocabulary import ImageError, InputError, expected, nearest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from partlens.artefacts.explanation import ExplanationConfig, Explanations
    from partlens.data.images import ImageSet
    from partlens.performer.zoo import Performer

SCHEMA_EXPLANATION = "partlens.explanation/1"
_SHOWN_PX = 448
_BATCH = 8


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
        if output is not None and (str(output) == name or output_name(opened_run.performer, output) == name):
            return column
    raise InputError(
        expected(
            f"a class of the selection in {opened_run.path}",
            name,
            f"Nearest: {', '.join(nearest(name, opened_run.classes))}",
        )
    )


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
    from partlens.metrics.likeness import rank_correlation

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
            f"the prediction {output_name(performer, top[0])} has no photo in the selection; the most likely class "
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
                else float(rank_correlation(result.combined[i, :1], result.combined[i, k : k + 1])[0]),
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
                    {"name": output_name(performer, o), "output": o, "probability": float(probability[o])} for o in top
                ]
            },
            "explained": records,
            "notes": notes,
        },
    )


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
