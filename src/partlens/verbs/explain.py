"""The verb explain: one folder per image with numbers, arrays, pictures and a page."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from partlens.attribution.record import (
    Answer,
    Contribution,
    ExplainedByParts,
    ExplainedByWindows,
    ExplainedClass,
    ExplanationConfig,
    ExplanationRecord,
    Preset,
)
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, InputTypeError, RunError, expected, listed, nearest
from partlens.explainer.record import WEIGHTS as EXPLAINER_WEIGHTS
from partlens.explainer.record import ExplainerRun
from partlens.object_parts.inspection import InspectRecord
from partlens.object_parts.record import PartsFile
from partlens.page.explanation_page import write_explanation_page
from partlens.progress import Progress
from partlens.records import remove_leftovers, sole_writer, write_tensors
from partlens.run import SELECTION, Run, RunRecord
from partlens.selection.record import SelectionRecord
from partlens.shards import Device
from partlens.verbs.runs import open_performer, verb
from partlens.verbs.select_features import OpenedSelection, load_selection, output_name

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from partlens.attribution.explanation import Explanations
    from partlens.network.performer import Performer
    from partlens.verbs.explained_parts import ExplainedParts, OpenedParts
    from partlens.verbs.explained_windows import ExplainedWindows, OpenedInspection

Style = Literal["glow", "jet"]
_SHOWN_PX = 448
_BATCH = 8
_ANSWERS = 5
_ALIKE = 0.85  # rank correlation above which two maps are nearly the same


@verb
def explain(
    run: str | Path,
    images: str | Path | Image.Image | np.ndarray | Sequence[str | Path | Image.Image | np.ndarray] | ImageSet,
    *,
    model: str | nn.Module | Performer | None = None,
    classes: Sequence[str] | None = None,
    count: int = 2,
    preset: Preset = "partlens",
    config: ExplanationConfig | Mapping[str, Any] | None = None,
    style: Style = "glow",
    out: str | Path | None = None,
    compute: Device | Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Explain predictions: what each part adds, which relevant filters contributed most, and where each acted.

    A run with an inspection tells what each part carries of the network's own score (see :func:`partlens.inspect`), one
    with a selection the relevant filters, one with an explainer what its parts add (see :func:`partlens.parts`); a run
    with several of them tells all.

    Args:
        run: a run directory with an inspection, a selection, an explainer or several of them.
        images: files, folders of files, or an :class:`~partlens.data.images.ImageSet`; in Python also images of Pillow
            or arrays.
        model: the performer; optional where the run can load it by its name.
        classes: names of the classes to explain; by default the most likely ones (of parts: the predicted one, where
            the explainer knows its parts).
        count: how many of the most likely classes of the selection.
        preset: how relevant filters are explained: ``partlens``, or ``paper`` as printed.
        config: a whole configuration, or fields to change in the preset.
        style: colours of the overlays; ``jet`` as in the authors' figures.
        out: folder for the explanations; by default ``explanations`` in the run directory.
        compute: on which device the network computes.
        progress: how to show progress; optional.

    Returns:
        One folder per image: ``explanation.json``, ``arrays.safetensors``, PNGs and a page.

    Raises:
        AtWorkError: another process writes there.
        ImageError: no image, or one that cannot be read.
        InputError: an unknown class.
        RunError: neither a finished selection nor an explainer, another performer, or a wrong ``parts.json``.
    """
    show = progress or Progress.silent()
    if count < 1:
        raise InputError(expected("at least 1 class to explain", count, "Set --count to 1 or more"))
    where, how = Device.of(compute), _settings(preset, config)
    stage = _opened(Path(run), model, where, classes, count, how, style)
    found = _image_files(images, show)
    target = Path(out or Path(run) / "explanations")
    with Run(Path(run)).writing() if out is None else sole_writer(target):
        folders = [target / name for name in _folder_names(found.keys, target)]
        for folder in folders:
            remove_leftovers(folder)
        _write(stage, found, folders, show)
    show.say(f"wrote {len(folders)} explanation{'s' if len(folders) != 1 else ''} to {target}")
    return folders


def _write(stage: _Stage, found: ImageSet, folders: Sequence[Path], show: Progress) -> None:
    """Explain the images in batches, and write a folder for each."""
    from partlens.network.stream import naming_photos

    with show.task("explaining", len(found)) as advance:
        for first in range(0, len(found), _BATCH):
            part = range(first, min(first + _BATCH, len(found)))
            pictures = [found.read(i, stage.performer.preprocessing.scaled_size) for i in part]
            keys = [found.keys[i] for i in part]
            again = functools.partial(stage.performer.preprocessing, pictures)
            with naming_photos(stage.performer, keys, again):
                batch = stage.explained(pictures)
            for position, row in enumerate(part):
                record = stage.write(folders[row], found, row, pictures[position], batch, position)
                write_explanation_page(folders[row])
                for line in stage.said(record):
                    show.say(f"{folders[row].name}: {line}")
            advance(first + len(part))


def _settings(preset: Preset, config: ExplanationConfig | Mapping[str, Any] | None) -> ExplanationConfig:
    if isinstance(config, ExplanationConfig):
        return config
    return ExplanationConfig.preset(preset, **dict(config or {}))


@dataclass(frozen=True)
class _Batch:
    """What was found for a batch of images; ``parts`` is of the images at ``shared`` alone."""

    outputs: Tensor
    selected: Explanations | None
    parts: ExplainedParts | None
    shared: tuple[int, ...]
    windows: Sequence[ExplainedWindows] = ()


@dataclass(frozen=True)
class _Stage:
    """What of a run explains, and how.

    ``known`` are the outputs of the categories whose parts the explainer has learned, by category; it is empty where
    they are not outputs of the performer, and any prediction is then explained by the parts.
    """

    performer: Performer
    selection: OpenedSelection | None
    parts: OpenedParts | None
    known: Mapping[str, int]
    classes: Sequence[str] | None
    part_classes: Sequence[str] | None
    count: int
    how: ExplanationConfig
    style: Style
    notes: tuple[str, ...]
    inspection: OpenedInspection | None = None

    def explained(self, pictures: Sequence[Image.Image]) -> _Batch:
        """Explain a batch of pictures."""
        import torch

        from partlens.attribution.explanation import choose_top, explain_batch

        batch = self.performer.preprocessing(list(pictures))
        selected = parts = None
        if (run := self.selection) is not None:
            wanted: Any = choose_top(run.found.outputs, min(self.count, len(run.classes)))
            if self.classes is not None:
                wanted = torch.tensor([[_class_column(run, name) for name in self.classes]] * len(pictures))
            selected = explain_batch(self.performer, batch, run.weights, run.found.index, wanted, self.how)
        windows: Sequence[ExplainedWindows] = ()
        if self.inspection is not None:
            from partlens.verbs.explained_windows import explain_windows

            windows = explain_windows(self.inspection, batch)
        outputs = _outputs(self.performer, batch) if selected is None else selected.output
        shared = tuple(
            i for i, row in enumerate(outputs) if self.part_classes is not None or self._foreign(row) is None
        )
        if self.parts is not None and shared:
            from partlens.verbs.explained_parts import explain_parts

            parts = explain_parts(self.parts, batch, self.part_classes, shared)
        return _Batch(outputs, selected, parts, shared, windows)

    def _foreign(self, outputs: Tensor) -> str | None:
        """Name the prediction where its parts are not those that the explainer has learned."""
        from partlens.verbs.explained_parts import answer_ranks

        ranks = answer_ranks(self.performer.outputs.probabilities(outputs[None])[0])
        first = min(ranks, key=lambda output: ranks[output])
        if not self.known or (first in self.known.values() and ranks[first] == 1):
            return None
        return output_name(self.performer, first) if ranks[first] == 1 else "something else"

    def write(
        self, folder: Path, images: ImageSet, row: int, picture: Image.Image, batch: _Batch, i: int
    ) -> ExplanationRecord:
        """Write the folder of one image, number ``i`` of a batch; ``picture`` may be a reduced one."""
        from partlens.attribution.pictures import save_png

        performer = self.performer
        tensors: dict[str, Tensor] = {}
        notes = [*performer.notes, *performer.outputs.notes, *self.notes]
        shown = _enlarged(performer.preprocessing.frame(picture))
        save_png(folder / "input.png", shown)
        explained: tuple[ExplainedClass, ...] = ()
        parts: tuple[ExplainedByParts, ...] = ()
        if self.selection is not None and batch.selected is not None:
            notes += _prediction_notes(self.selection, batch.outputs[i]) if self.classes is None else []
            notes += batch.selected.notes
            explained = _by_filters(self.selection, batch.selected, i, folder, shown, self.style)
            tensors |= _selection_tensors(batch.selected, i)
        if self.parts is not None:
            if batch.parts is not None and i in batch.shared:
                from partlens.verbs.explained_parts import part_records, part_tensors

                place = batch.shared.index(i)
                parts = part_records(self.parts, batch.parts, place, folder, shown, self.style)
                tensors |= part_tensors(batch.parts, place)
            else:
                notes.append(self._not_shared(batch.outputs[i]))
        windows: tuple[ExplainedByWindows, ...] = ()
        if self.inspection is not None:
            from partlens.verbs.explained_windows import window_records

            windows = window_records(self.inspection, batch.windows[i], folder, performer.preprocessing.frame(picture))
            if not windows:
                name = output_name(performer, int(batch.outputs[i].argmax()))
                notes.append(f"no inspected category is taken for {name}: its score is not shared among parts")
        write_tensors(folder / "arrays.safetensors", tensors, {"schema": ExplanationRecord.SCHEMA})
        record = ExplanationRecord(
            image=Path(images.keys[row]).name,
            path=images.keys[row],
            size_px=images.size_px(row),
            method=None if self.selection is None else self.how,
            performer=performer.name,
            weights_sha256=performer.weights_sha256,
            selection=None if self.selection is None else self.selection.record.identity,
            input="input.png",
            answers=_answers(performer, batch.outputs[i]),
            explained=explained,
            parts=parts,
            notes=tuple(notes),
            windows=windows,
            unselected=_unselected(self.selection, batch.outputs[i]) if self.classes is None else "",
        )
        record.write(folder)
        return record

    def _not_shared(self, outputs: Tensor) -> str:
        names = listed(sorted(self.known))
        return (
            f"the network takes this image for {self._foreign(outputs)}, and the explainer knows the parts of {names}: "
            f"the score is not shared among parts (--classes {names} shares the score of that class)"
        )

    def said(self, record: ExplanationRecord) -> list[str]:
        """Return a line for each class that is shared among parts, on the performer first, or why none is."""
        if self.parts is not None and not record.parts:
            return [record.notes[-1]]
        by_windows = [f"{one.name}: {one.headline}" for one in record.windows]
        return by_windows + [f"{one.name}: {one.headline}" for one in record.parts]


def _enlarged(frame: Image.Image) -> Image.Image:
    if max(frame.size) >= _SHOWN_PX:
        return frame
    scale = _SHOWN_PX / max(frame.size)
    return frame.resize((round(frame.width * scale), round(frame.height * scale)))


def _outputs(performer: Performer, batch: Tensor) -> Tensor:
    from partlens.network.taps import forward_taps

    return performer.outputs.scores(forward_taps(performer, batch, [])[0], len(batch)).cpu()


# --- opening ----------------------------------------------------------------------------------------------------------


def _opened(
    run: Path,
    model: str | nn.Module | Performer | None,
    where: Device,
    classes: Sequence[str] | None,
    count: int,
    how: ExplanationConfig,
    style: Style,
) -> _Stage:
    """Open what a run has to explain with, and check the classes before any image is read."""
    has_explainer = (run / EXPLAINER_WEIGHTS).exists()
    kinds: tuple[type[RunRecord], ...] = (SelectionRecord, ExplainerRun, InspectRecord)
    if (first := next(filter(None, (kind.read_if_there(run) for kind in kinds)), None)) is not None:
        # Loaded once; a record of another network says so.
        model = open_performer(first, model, where.device)
    selection, notes = _open_selection(run, model, classes, has_explainer)
    parts: OpenedParts | None = None
    known: dict[str, int] = {}
    of_parts = classes
    if has_explainer and (selection is None or (run / PartsFile.FILE).exists()):
        parts, known, of_parts, more = _open_parts(run, model, selection, classes)
        notes += more
    elif has_explainer:
        notes.append(f"the filters have no parts yet: run partlens parts {run}, then explain again")
    inspection = _open_inspection(run, model)
    opened = selection or parts or inspection
    if opened is None:
        rule = f"an inspection, a selection or an explainer in {run}"
        raise RunError(expected(rule, "none", "Run inspect, select-features or fit-explainer first"))
    return _Stage(
        opened.performer, selection, parts, known, classes, of_parts, count, how, style, tuple(notes), inspection
    )


def _open_inspection(run: Path, model: str | nn.Module | Performer | None) -> OpenedInspection | None:
    """Open the inspection of a run where it has a finished one."""
    record = InspectRecord.read_if_there(run)
    if record is None or not record.finished:
        return None
    from partlens.verbs.explained_windows import load_inspection

    return load_inspection(run, model)


def _open_selection(
    run: Path, model: str | nn.Module | Performer | None, classes: Sequence[str] | None, has_explainer: bool
) -> tuple[OpenedSelection | None, list[str]]:
    """Open the selection of a run where it has one; with an explainer, an unfinished one is only noted."""
    if not (run / SELECTION).exists():
        return None, []
    if has_explainer and not SelectionRecord.read(run).finished:
        return None, ["the selection of this run is not finished: only parts are explained"]
    selection = load_selection(run, model)
    for name in classes or ():
        _class_column(selection, name)  # an unknown class is refused before any image is read
    return selection, []


def _open_parts(
    run: Path,
    model: str | nn.Module | Performer | None,
    selection: OpenedSelection | None,
    classes: Sequence[str] | None,
) -> tuple[OpenedParts | None, dict[str, int], Sequence[str] | None, list[str]]:
    """Open the parts of a run; return the outputs they explain, those of ``classes`` among them, and what to note.

    There are no parts where a selection explains all of the classes that are asked for.
    """
    from partlens.verbs.explained_parts import load_parts

    parts = load_parts(run, model)
    known = _known_outputs(run, parts.performer)
    if classes is None:
        return parts, known, None, []
    shared, notes = _part_classes(selection, parts, known, classes)
    if not shared and selection is None:
        raise InputError(expected(f"a class among {listed(sorted(known))}", listed(list(classes)), notes[-1]))
    return (parts if shared else None), known, shared, notes


def _known_outputs(run: Path, performer: Performer) -> dict[str, int]:
    """Return the performer's output of each category of an explainer; nothing where one is no output."""
    names = [name for name in Run(run).read(ExplainerRun).data.categories if name]
    outputs = performer.matched(names).outputs
    found = {name: output for name, output in outputs.items() if output is not None}
    return found if len(found) == len(outputs) else {}


def _part_classes(
    selection: OpenedSelection | None, parts: OpenedParts, known: Mapping[str, int], classes: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return those of the named classes whose score parts can share, and why others cannot."""
    outputs: list[int | None] = []
    for name in classes:
        if selection is not None:
            outputs.append(selection.found.outputs[_class_column(selection, name)])
        else:
            outputs.append(parts.performer.output(name))
    notes = []
    if None in outputs:
        notes.append("a class that is no output of the performer has no score that parts could share")
    shared = [output for output in outputs if output is not None and (not known or output in known.values())]
    if len(shared) < len(outputs) - outputs.count(None):
        notes.append(
            f"the explainer knows the parts of {listed(sorted(known))} alone: the score of no other class is shared"
        )
    return [str(output) for output in shared], notes


def _one_by_one(images: Any) -> list[Any]:
    """Return what is to be explained as a list: one file, picture or array, or several of them."""
    if isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4:
        return [images]
    if not isinstance(images, Iterable):
        raise InputTypeError(expected("images to explain", type(images).__name__, "Give files, a folder or arrays"))
    return list(images)


def _folder_files(folder: Path, show: Progress) -> tuple[Path, ...]:
    readable, dropped = ImageSet.from_folder(folder).readable()
    for text in (*(f"skipped {folder / each.key}: {each.reason}" for each in dropped), *readable.notes):
        show.say(text)
    return readable.files


def _image_files(images: Any, show: Progress) -> ImageSet:
    """Return the images to explain; of folders the files that can be read, the others are told."""
    if isinstance(images, ImageSet):
        return images
    given = _one_by_one(images)
    named = [isinstance(each, (str, os.PathLike)) for each in given]
    if given and not any(named):
        return ImageSet.from_arrays(given)
    if not all(named):
        kinds = listed(sorted({type(each).__name__ for each in given}))
        raise InputTypeError(expected("files alone or pictures alone to explain", kinds, "Explain them in two calls"))
    files: list[Path] = []
    for path in map(Path, given):
        files += _folder_files(path, show) if path.is_dir() else [path]  # one that was named has to be there
    if not files:
        raise ImageError(expected("at least 1 image to explain", 0, "Name image files or a folder"))
    return ImageSet.from_files(files)


def _explains(folder: Path, name: str) -> bool:
    """Whether a folder is free for an image: none is there, or it holds an explanation of the same one."""
    if not (folder / ExplanationRecord.FILE).is_file():
        return True
    try:
        return ExplanationRecord.read(folder).path == name
    except RunError:
        return False


def _folder_names(names: Sequence[str], target: Path) -> list[str]:
    """Return a folder name for each image, the same names told apart by a number.

    A folder that holds the explanation of another image, from an earlier call, is kept.
    """
    plain = [re.sub(r"[^\w.-]", "_", Path(name).stem) or "image" for name in names]
    own = {name.casefold() for name in plain}  # some file systems take A and a for one name
    result: list[str] = []
    for name, whole in zip(plain, names, strict=True):
        taken = {each.casefold() for each in result}
        free, number = name, 1
        # A number that neither another image's own name has nor one given before.
        while free.casefold() in (taken if number == 1 else taken | own) or not _explains(target / free, whole):
            number += 1
            free = f"{name}-{number}"
        result.append(free)
    return result


def _class_column(opened_run: OpenedSelection, name: str) -> int:
    if name in opened_run.classes:
        return opened_run.classes.index(name)
    for column, output in enumerate(opened_run.found.outputs):
        if output is not None and (str(output) == name or output_name(opened_run.performer, output) == name):
            return column
    rule, remedy = f"a class of the selection in {opened_run.path}", ", ".join(nearest(name, opened_run.classes))
    raise InputError(expected(rule, name, f"Nearest: {remedy}"))


# --- one image --------------------------------------------------------------------------------------------------------


def _answers(performer: Performer, outputs: Tensor) -> tuple[Answer, ...]:
    """Return the performer's strongest outputs for one image."""
    chance = performer.outputs.probabilities(outputs[None])[0]
    top = chance.argsort(descending=True, stable=True)[:_ANSWERS].tolist()
    return tuple(Answer(name=output_name(performer, o), output=o, probability=float(chance[o])) for o in top)


def _selection_tensors(result: Explanations, i: int) -> dict[str, Tensor]:
    names = ("maps", "combined", "features", "contributions", "responses", "classes", "output")
    return {name: getattr(result, name)[i] for name in names}


def _prediction_notes(opened_run: OpenedSelection, outputs: Tensor) -> list[str]:
    """Say why the classes that are explained may not be the predicted one."""
    from partlens.verbs.explained_parts import answer_ranks

    rank_of = answer_ranks(opened_run.performer.outputs.probabilities(outputs[None])[0])
    strongest, known = min(rank_of, key=lambda output: rank_of[output]), set(opened_run.found.outputs)
    if known == {None}:
        return ["the classes of the selection are not outputs of the performer; their linear scores rank them"]
    if None not in known and strongest not in known:
        name = output_name(opened_run.performer, strongest)
        return [f"the prediction {name} has no photo in the selection; the most likely class that has is explained"]
    return []


def _unselected(opened_run: OpenedSelection | None, outputs: Tensor) -> str:
    """Name the predicted class where it has no photos in the selection although its classes are outputs."""
    from partlens.verbs.explained_parts import answer_ranks

    if opened_run is None:
        return ""
    performer, known = opened_run.performer, set(opened_run.found.outputs)
    rank_of = answer_ranks(performer.outputs.probabilities(outputs[None])[0])
    strongest = min(rank_of, key=lambda output: rank_of[output])
    return "" if None in known or strongest in known else output_name(performer, strongest)


def _by_filters(
    opened_run: OpenedSelection, result: Explanations, i: int, folder: Path, shown: Image.Image, style: Style
) -> tuple[ExplainedClass, ...]:
    """Draw one image's relevant filters; return a record per class."""
    from partlens.attribution.pictures import coloured, overlay, picture_of, save_png
    from partlens.metrics.likeness import rank_correlation
    from partlens.verbs.explained_parts import answer_ranks

    probability = opened_run.performer.outputs.probabilities(result.output[i][None])[0]
    rank_of = answer_ranks(probability)
    combined, records = result.combined[i], []
    for k, column in enumerate(result.classes[i].tolist()):
        one = opened_run.found.classes[column]
        heat = combined[k].numpy()
        save_png(folder / f"combined-{k + 1}.png", overlay(shown, heat, style))
        save_png(folder / f"heat-{k + 1}.png", picture_of(coloured(heat, style)))
        alike = {} if k == 0 else {"rank_correlation": float(rank_correlation(combined[:1], combined[k : k + 1])[0])}
        records.append(
            ExplainedClass(
                name=one.name,
                output=one.output,
                probability=float("nan") if one.output is None else float(probability[one.output]),
                rank=None if one.output is None else rank_of[one.output],
                score=float(result.scores[i, k]),
                combined=f"combined-{k + 1}.png",
                heat=f"heat-{k + 1}.png",
                difference=_difference(combined, k, alike, folder, shown),
                filters=_contributions(opened_run, result, (i, k), folder, shown, style),
                **alike,
            )
        )
    return tuple(records)


def _difference(combined: Tensor, k: int, alike: Mapping[str, float], folder: Path, shown: Image.Image) -> str:
    """Draw what sets a class's map apart from the first one's where the two are nearly the same."""
    from partlens.attribution.pictures import difference, save_png

    if alike.get("rank_correlation", 0.0) <= _ALIKE:
        return ""
    file = f"difference-{k + 1}.png"
    save_png(folder / file, difference(shown, combined[0].numpy(), combined[k].numpy()))
    return file


def _contributions(
    opened_run: OpenedSelection,
    result: Explanations,
    place: tuple[int, int],
    folder: Path,
    shown: Image.Image,
    style: Style,
) -> tuple[Contribution, ...]:
    """Draw the filters of one class in one image, given which of the batch these are."""
    from partlens.attribution.pictures import overlay, save_png

    pictured = {(f.layer, f.channel): f.picture for one in opened_run.found.classes for f in one.filters}
    made = []
    for r, feature in enumerate(result.features[place].tolist()):
        if feature < 0:  # fewer filters contribute than are asked for
            continue
        layer, channel = opened_run.found.index.place(feature)
        file = f"feature-{place[1] + 1}-{r + 1}.png"
        save_png(folder / file, overlay(shown, result.maps[place][r].numpy(), style))
        contribution, picture = float(result.contributions[place][r]), pictured.get((layer, channel))
        made.append(
            Contribution(
                layer=layer,
                channel=channel,
                weight=float(opened_run.weights[feature, int(result.classes[place])]),
                response=float(result.responses[place][r]),
                contribution=contribution,
                share=contribution / float(result.positive[place]),
                overlay=file,
                average=None if picture is None else _relative(opened_run.path / picture.average, folder),
            )
        )
    return tuple(made)


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()
