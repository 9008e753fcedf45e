"""The verb explain: one folder per image with numbers, arrays, pictures and a page."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from partlens.errors import ImageError, InputError, RunError, expected, nearest
from partlens.progress import Progress
from partlens.records import read_json, write_json, write_tensors
from partlens.verbs.fit_explainer import WEIGHTS as EXPLAINER_WEIGHTS
from partlens.verbs.runs import SELECTION
from partlens.verbs.select_features import OpenedSelection, load_selection, output_name

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from partlens.attribution.explanation import ExplanationConfig, Explanations
    from partlens.data.images import ImageSet
    from partlens.network.zoo import Performer
    from partlens.verbs.explained_parts import ExplainedParts, OpenedParts

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
    """Explain predictions: what each part adds, which relevant filters contributed most, and where each acted.

    A run with a selection tells the relevant filters, one with an explainer what its parts add to the score (see
    :func:`partlens.parts`), one with both tells both.

    Args:
        run: a run directory with a selection, an explainer or both.
        images: files, folders of files, or an :class:`~partlens.data.images.ImageSet`.
        model: the performer; the one of the run when left out.
        classes: names of the classes to explain; the most likely ones when left out (of parts: the predicted one).
        count: how many of the most likely classes of the selection.
        config: how relevant filters are explained, or fields to change; the default of partlens when left out.
        style: colours of the overlays; ``jet`` as in the authors' figures.
        out: folder for the explanations; ``explanations`` in the run directory when left out.
        progress: how to show progress; silent when left out.

    Returns:
        One folder per image: ``explanation.json``, ``arrays.safetensors``, PNGs and a page.

    Raises:
        ImageError: no image, or one that cannot be read.
        InputError: an unknown class.
        RunError: neither a finished selection nor an explainer, another performer, or a wrong ``parts.json``.
    """
    from partlens.attribution.explanation import ExplanationConfig
    from partlens.page import write_explanation_page

    show = progress or Progress.silent()
    if count < 1:
        raise InputError(expected("at least 1 class to explain", count, "Set --count to 1 or more"))
    how = config if isinstance(config, ExplanationConfig) else ExplanationConfig.preset(**dict(config or {}))
    stage = _opened(Path(run), model, classes, count, how, style)
    found, left_out = _image_files(images)
    for line in left_out:
        show.say(line)
    target = Path(out) if out is not None else Path(run) / "explanations"
    names = _folder_names(found.keys, target)
    folders = []
    with show.task("explaining", len(found)) as advance:
        for first in range(0, len(found), _BATCH):
            part = range(first, min(first + _BATCH, len(found)))
            for row, written in zip(part, stage.explained([found.read(i) for i in part]), strict=True):
                folder = target / names[row]
                said = stage.write(folder, found.keys[row], *written)
                write_explanation_page(folder)
                folders.append(folder)
                for line in said:
                    show.say(f"{names[row]}: {line}")
            advance(first + len(part))
    show.say(f"wrote {len(folders)} explanation{'s' if len(folders) != 1 else ''} to {target}")
    return folders


@dataclasses.dataclass(frozen=True)
class _Explained:
    """One batch: where an image stands in it, and what was found for the whole batch."""

    position: int
    selected: Explanations | None
    unfixed: Explanations | None
    parts: ExplainedParts | None


@dataclasses.dataclass(frozen=True)
class _Stage:
    """What of a run explains: its selection, its explainer, or both."""

    selection: OpenedSelection | None
    parts: OpenedParts | None
    classes: Sequence[str] | None
    part_classes: Sequence[str] | None
    count: int
    how: ExplanationConfig
    style: Literal["glow", "jet"]
    notes: tuple[str, ...]

    @property
    def performer(self) -> Performer:
        """The network that is explained."""
        opened = self.selection if self.selection is not None else self.parts
        assert opened is not None
        return opened.performer

    def explained(self, pictures: Sequence[Image.Image]) -> list[tuple[Image.Image, _Explained]]:
        """Explain a batch of pictures."""
        import torch

        from partlens.attribution.explanation import choose_top, explain_batch

        batch = self.performer.preprocessing(list(pictures))
        selected = unfixed = parts = None
        if self.selection is not None:
            run = self.selection
            wanted = None
            if self.classes is not None:
                wanted = torch.tensor([[_class_column(run, name) for name in self.classes]] * len(pictures))
            choose = choose_top(run.outputs, min(self.count, len(run.classes)))
            arguments = (run.performer, batch, run.weights, run.index, run.descriptor)
            selected = explain_batch(*arguments, wanted, self.how, choose=choose)
            if self.how.fix_strides:
                plain = dataclasses.replace(self.how, fix_strides=False)
                unfixed = explain_batch(*arguments, selected.classes, plain)
        if self.parts is not None:
            from partlens.verbs.explained_parts import explain_parts

            parts = explain_parts(self.parts, batch, self.part_classes)
        return [(picture, _Explained(i, selected, unfixed, parts)) for i, picture in enumerate(pictures)]

    def write(self, folder: Path, key: str, picture: Image.Image, one: _Explained) -> list[str]:
        """Write the folder of one image; return what its parts add, a line per class."""
        from partlens.attribution.pictures import save_png

        performer, i = self.performer, one.position
        frame = performer.preprocessing.frame(picture)
        shown = frame
        if max(frame.size) < _SHOWN_PX:
            scale = _SHOWN_PX / max(frame.size)
            shown = frame.resize((round(frame.width * scale), round(frame.height * scale)))
        save_png(folder / "input.png", shown)
        notes = [*performer.notes, *self.notes]
        records: list[dict[str, Any]] = []
        tensors: dict[str, Tensor] = {}
        output = None
        if self.selection is not None and one.selected is not None:
            output = one.selected.output[i]
            named = self.classes is not None
            records, more = _selection_records(self.selection, folder, shown, one, self.style, named=named)
            notes += more
            tensors |= _selection_tensors(one.selected, i)
        of_parts: list[dict[str, Any]] = []
        if self.parts is not None and one.parts is not None:
            from partlens.verbs.explained_parts import part_records, part_tensors

            output = one.parts.outputs[i] if output is None else output
            of_parts = part_records(self.parts, one.parts, i, folder, shown, self.style)
            tensors |= part_tensors(one.parts, i)
            notes += self.parts.notes
        assert output is not None
        write_tensors(folder / "arrays.safetensors", tensors, {"schema": SCHEMA_EXPLANATION})
        write_json(
            folder / "explanation.json",
            {
                "schema": SCHEMA_EXPLANATION,
                "image": {"name": Path(key).name, "path": key, "size_px": list(picture.size)},
                "method": self.how.to_dict() if self.selection is not None else {},
                "performer": {"name": performer.name, "weights_sha256": performer.weights_sha256},
                "selection": {"identity": self.selection.manifest["identity"]} if self.selection is not None else None,
                "input": "input.png",
                "prediction": {"classes": _answers(performer, output)},
                "explained": records,
                "parts": of_parts,
                "notes": notes,
            },
        )
        return [f"{record['class']}: {record['headline']}" for record in of_parts]


def _opened(
    run: Path,
    model: str | nn.Module | Performer | None,
    classes: Sequence[str] | None,
    count: int,
    how: ExplanationConfig,
    style: Literal["glow", "jet"],
) -> _Stage:
    """Open what a run has to explain with, and check the classes before any image is read."""
    has_explainer = (run / EXPLAINER_WEIGHTS).exists()
    selection = None
    notes: list[str] = []
    if (run / SELECTION).exists():
        if has_explainer and read_json(run / SELECTION).get("status") != "finished":
            notes.append("the selection of this run is not finished: only parts are explained")
        else:
            selection = load_selection(run, model)
    if selection is None and not has_explainer:
        raise RunError(
            expected(f"a selection or an explainer in {run}", "none", "Run select-features or fit-explainer first")
        )
    parts = None
    of_parts = classes
    if has_explainer:
        from partlens.verbs.explained_parts import load_parts

        # A network is loaded once, but an explainer of other weights has to be told.
        parts = load_parts(run, selection.performer if selection is not None and model is None else model)
    if selection is not None and classes is not None:
        outputs = [selection.outputs[_class_column(selection, name)] for name in classes]
        known = [str(output) for output in outputs if output is not None]
        if parts is not None and len(known) < len(outputs):
            notes.append("a class that is no output of the performer has no score that parts could share")
        of_parts = known
        parts = parts if known else None
    elif parts is not None and classes is not None:
        from partlens.verbs.explained_parts import output_called, output_count

        for name in classes:
            output_called(parts.performer, output_count(parts), name)
    return _Stage(selection, parts, classes, of_parts, count, how, style, tuple(notes))


def _answers(performer: Performer, output: Tensor) -> list[dict[str, Any]]:
    """Return the performer's strongest answers to one image."""
    import torch

    from partlens.verbs.explained_parts import probabilities

    chance = probabilities(torch.as_tensor(output)[None])[0]
    top = chance.argsort(descending=True, stable=True)[:5].tolist()
    return [{"name": output_name(performer, o), "output": o, "probability": float(chance[o])} for o in top]


def _image_files(images: str | Path | Sequence[str | Path] | ImageSet) -> tuple[ImageSet, list[str]]:
    """Return the images to explain, and what is left out: folders mean the readable files in them."""
    from partlens.data.images import ImageSet

    if isinstance(images, ImageSet):
        return images, []
    left_out: list[str] = []
    given = [images] if isinstance(images, (str, Path)) else list(images)
    files: list[Path] = []
    for path in map(Path, given):
        if not path.is_dir():
            files.append(path)  # one that was named has to be there
            continue
        readable, dropped = ImageSet.from_folder(path).readable()
        files += [path / key for key in readable.keys]
        left_out += [f"{path / one.key} is left out: {one.reason}" for one in dropped]
    if not files:
        raise ImageError(expected("at least 1 image to explain", 0, "Name image files or a folder"))
    return ImageSet.from_files(files), left_out


def _explains(folder: Path, name: str) -> bool:
    """Whether a folder is free for an image: none is there, or it holds an explanation of the same one."""
    file = folder / "explanation.json"
    if not file.is_file():
        return True
    try:
        return bool(read_json(file)["image"]["path"] == name)
    except (RunError, KeyError, TypeError):
        return False


def _folder_names(names: Sequence[str], target: Path) -> list[str]:
    """Return a folder name for each image, the same names told apart by a number.

    A folder that holds the explanation of another image, from an earlier call, is left alone.
    """
    plain = [re.sub(r"[^\w.-]", "_", Path(name).stem) or "image" for name in names]
    own = {name.casefold() for name in plain}  # some file systems take A and a for one name
    taken: set[str] = set()
    result = []
    for name, whole in zip(plain, names, strict=True):
        free = name
        if name.casefold() in taken or not _explains(target / name, whole):
            # A number that neither another image's own name has nor one given before.
            numbered = (f"{name}-{number}" for number in itertools.count(2))
            free = next(n for n in numbered if n.casefold() not in taken | own and _explains(target / n, whole))
        taken.add(free.casefold())
        result.append(free)
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

    from partlens.attribution.lattice import lattice_index

    strides = (m.stride[0] for m in performer.module.modules() if isinstance(m, nn.Conv2d))
    stride = next((s for s in strides if s > 1), 1)
    if stride < 2 or min(signals.shape[-2:]) < 9 * stride:
        return math.nan
    return float(lattice_index(signals[None], stride)[0])


def _selection_tensors(result: Explanations, i: int) -> dict[str, Tensor]:
    import torch

    return {
        "maps": result.maps[i],
        "combined": result.combined[i],
        "features": result.features[i],
        "contributions": result.contributions[i],
        "responses": result.responses[i],
        "classes": result.classes[i],
        "output": torch.as_tensor(result.output[i]),
    }


def _selection_records(
    opened_run: OpenedSelection,
    folder: Path,
    shown: Image.Image,
    one: _Explained,
    style: Literal["glow", "jet"],
    *,
    named: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Draw one image's relevant filters; return a record per class, and notes."""
    from partlens.attribution.pictures import coloured, overlay, picture_of, save_png
    from partlens.metrics.likeness import rank_correlation
    from partlens.verbs.explained_parts import answer_ranks, probabilities

    assert one.selected is not None
    result, unfixed, i = one.selected, one.unfixed, one.position
    performer = opened_run.performer
    probability = probabilities(result.output[i][None])[0]
    rank_of = answer_ranks(probability)
    strongest = min(rank_of, key=lambda output: rank_of[output])
    notes = []
    outputs = set(opened_run.outputs)
    if not named and None not in outputs and strongest not in outputs:
        notes.append(
            f"the prediction {output_name(performer, strongest)} has no photo in the selection; the most likely class "
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
    return records, notes


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
