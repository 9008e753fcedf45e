"""What explain opens of a run, and the folder that it writes for each image."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from partlens.attribution.explanation import Explanations, choose_top, explain_batch
from partlens.attribution.pictures import coloured, difference, overlay, picture_of, save_picture
from partlens.attribution.record import (
    Answer,
    Contribution,
    ExplainedByParts,
    ExplainedByWindows,
    ExplainedClass,
    ExplanationConfig,
    ExplanationRecord,
    Style,
)
from partlens.data.images import ImageSet
from partlens.errors import InputError, LayerError, RunError, expected, listed
from partlens.explainer.record import WEIGHTS as EXPLAINER_WEIGHTS
from partlens.explainer.record import ExplainerRun
from partlens.metrics.likeness import rank_correlation
from partlens.network.performer import Performer
from partlens.network.stream import naming_photos
from partlens.network.taps import forward_taps
from partlens.object_parts.inspection import InspectRecord
from partlens.object_parts.record import PartsFile
from partlens.page.explanation_page import write_explanation_page
from partlens.progress import Progress
from partlens.records import write_tensors
from partlens.run import SELECTION, Run, RunRecord
from partlens.selection.record import SelectionRecord
from partlens.shards import Device
from partlens.verbs.explained_parts import (
    ExplainedParts,
    OpenedParts,
    answer_ranks,
    explain_parts,
    load_parts,
    part_records,
    part_tensors,
)
from partlens.verbs.explained_windows import (
    ExplainedWindows,
    OpenedInspection,
    explain_windows,
    load_inspection,
    window_records,
)
from partlens.verbs.runs import open_performer
from partlens.verbs.select_features import OpenedSelection, load_selection

_SHOWN_PX = 448
_BATCH = 8
_ANSWERS = 5
_UNFINISHED = "the selection is not finished: the same select-features goes on with it"
_ALIKE = 0.85  # rank correlation above which two maps are nearly the same


@dataclass(frozen=True)
class _Batch:
    """What was found for a batch of images: ``parts`` at ``shared`` alone, ``unread`` why no filters are."""

    outputs: Tensor
    selected: Explanations | None
    parts: ExplainedParts | None
    shared: tuple[int, ...]
    windows: Sequence[ExplainedWindows] = ()
    unread: str = ""


@dataclass(frozen=True)
class Stage:
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

    @classmethod
    def opened(
        cls,
        run: Path,
        model: str | nn.Module | Performer | None,
        where: Device,
        classes: Sequence[str] | None,
        count: int,
        how: ExplanationConfig,
        style: Style,
    ) -> Self:
        """Open what a run has to explain with, and check the classes before any image is read."""
        kinds: tuple[type[RunRecord], ...] = (SelectionRecord, ExplainerRun, InspectRecord)
        if (first := next(filter(None, (kind.read_if_there(run) for kind in kinds)), None)) is not None:
            # Loaded once; a record of another network says so.
            model = open_performer(first, model, where.device)
        selection, notes = _open_selection(run, model, classes)
        inspection = load_inspection(run, model) if InspectRecord.finished_in(run) else None
        parts, known, of_parts, more = _open_parts(run, model, selection, classes, alone=not (selection or inspection))
        notes += more
        found = selection or parts or inspection
        if found is None:
            rule = f"a finished inspection, selection or explainer in {run}"
            raise RunError(expected(rule, listed(notes) or "none", "Run inspect, select-features or fit-explainer"))
        return cls(
            found.performer, selection, parts, known, classes, of_parts, count, how, style, tuple(notes), inspection
        )

    def write(self, found: ImageSet, folders: Sequence[Path], show: Progress) -> None:
        """Explain the images in batches, and write a folder for each."""
        with show.task("explaining", len(found)) as advance:
            for first in range(0, len(found), _BATCH):
                part = range(first, min(first + _BATCH, len(found)))
                pictures = [found.read(i, self.performer.preprocessing.scaled_size) for i in part]
                keys = [found.keys[i] for i in part]
                again = functools.partial(self.performer.preprocessing, pictures)
                with naming_photos(self.performer, keys, again):
                    batch = self._explained(pictures)
                if batch.unread:
                    show.say(batch.unread)
                for position, row in enumerate(part):
                    record = self._write_one(folders[row], found, row, pictures[position], batch, position)
                    write_explanation_page(folders[row])
                    for line in self._said(record):
                        show.say(f"{folders[row].name}: {line}")
                advance(first + len(part))

    def _explained(self, pictures: Sequence[Image.Image]) -> _Batch:
        """Explain a batch of pictures."""
        batch = self.performer.preprocessing(list(pictures))
        parts, (selected, unread) = None, self._selected(batch)
        windows = () if self.inspection is None else explain_windows(self.inspection, batch)
        outputs = _outputs(self.performer, batch) if selected is None else selected.output
        shared = tuple(
            i for i, row in enumerate(outputs) if self.part_classes is not None or self._foreign(row) is None
        )
        if self.parts is not None and shared:
            parts = explain_parts(self.parts, batch, self.part_classes, shared)
        return _Batch(outputs, selected, parts, shared, windows, unread)

    def _selected(self, batch: Tensor) -> tuple[Explanations | None, str]:
        """Explain a batch by filters, or say why not where parts on the performer, which need no gradients, do."""
        if (run := self.selection) is None:
            return None, ""
        wanted = self._wanted(run, len(batch))
        try:
            return explain_batch(self.performer, batch, run.weights, run.found.index, wanted, self.how), ""
        except LayerError as error:
            if self.inspection is None or self.classes is not None:
                raise
            return None, f"no filters are shown: {error}"

    def _wanted(self, run: OpenedSelection, images: int) -> Any:
        """Return the classes to explain: those that are named, else the most likely ones of each image."""
        if self.classes is None:
            return choose_top(run.found.outputs, self.count, self.performer.outputs.decisions)
        return torch.tensor([[run.column(name) for name in self.classes]] * images)

    def _foreign(self, outputs: Tensor) -> str | None:
        """Name the prediction where its parts are not those that the explainer has learned."""
        first, rank = _first(self.performer, outputs)
        if not self.known or (first in self.known.values() and rank == 1):
            return None
        return self.performer.output_name(first) if rank == 1 else "something else"

    def _write_one(
        self, folder: Path, images: ImageSet, row: int, picture: Image.Image, batch: _Batch, i: int
    ) -> ExplanationRecord:
        """Write the folder of one image, number ``i`` of a batch; ``picture`` may be a reduced one."""
        performer = self.performer
        tensors: dict[str, Tensor] = {}
        notes = [*performer.notes, *performer.outputs.notes, *self.notes, *filter(None, [batch.unread])]
        shown = _enlarged(performer.preprocessing.frame(picture))
        save_picture(folder / "input.png", shown)
        explained: tuple[ExplainedClass, ...] = ()
        unselected = ""
        if self.selection is not None and batch.selected is not None:
            if self.classes is None:
                unselected, said = _prediction_notes(self.selection, batch.outputs[i])
                notes += said
            notes += batch.selected.notes
            explained = _by_filters(self.selection, batch.selected, i, folder, shown, self.style)
            tensors |= _selection_tensors(batch.selected, i)
        parts, own = self._by_parts(batch, i, folder, shown)
        tensors |= own
        if self.parts is not None and not parts:
            notes.append(self._not_shared(batch.outputs[i]))
        windows: tuple[ExplainedByWindows, ...] = ()
        if self.inspection is not None:
            windows = window_records(self.inspection, batch.windows[i], folder, performer.preprocessing.frame(picture))
            if not windows:
                name = performer.output_name(int(batch.outputs[i].argmax()))
                notes.append(f"no inspected category is taken for {name}: its score is not shared among parts")
        write_tensors(folder / "arrays.safetensors", tensors, {"schema": ExplanationRecord.SCHEMA})
        record = ExplanationRecord(
            image=Path(images.keys[row]).name,
            path=images.keys[row],
            content=images.digests()[row],
            size_px=images.size_px(row),
            method=None if batch.selected is None else self.how,
            performer=performer.name,
            weights_sha256=performer.weights_sha256,
            selection=None if self.selection is None else self.selection.record.identity,
            answers=_answers(performer, batch.outputs[i]),
            explained=explained,
            parts=parts,
            notes=tuple(notes),
            windows=windows,
            unselected=unselected,
        )
        record.write(folder)
        return record

    def _by_parts(
        self, batch: _Batch, i: int, folder: Path, shown: Image.Image
    ) -> tuple[tuple[ExplainedByParts, ...], dict[str, Tensor]]:
        """Draw what the explainer's parts say of one image; return records and arrays, none where they do not."""
        if self.parts is None or batch.parts is None or i not in batch.shared:
            return (), {}
        place = batch.shared.index(i)
        records = part_records(self.parts, batch.parts, place, folder, shown, self.style)
        return records, part_tensors(batch.parts, place)

    def _not_shared(self, outputs: Tensor) -> str:
        names = listed(sorted(self.known))
        return (
            f"the network takes this image for {self._foreign(outputs)}, and the explainer knows the parts of {names}: "
            f"the score is not shared among parts (--classes {names} shares the score of that class)"
        )

    def _said(self, record: ExplanationRecord) -> list[str]:
        """Return a line for each class that is shared among parts, on the performer first, or why none is."""
        if self.parts is not None and not record.parts:
            return [record.notes[-1]]
        shared: tuple[ExplainedByWindows | ExplainedByParts, ...] = (*record.windows, *record.parts)
        return [f"{one.name}: {one.headline}" for one in shared]


def _enlarged(frame: Image.Image) -> Image.Image:
    if max(frame.size) >= _SHOWN_PX:
        return frame
    scale = _SHOWN_PX / max(frame.size)
    return frame.resize((round(frame.width * scale), round(frame.height * scale)))


def _outputs(performer: Performer, batch: Tensor) -> Tensor:
    return performer.outputs.scores(forward_taps(performer, batch, [])[0], len(batch)).cpu()


def _open_selection(
    run: Path, model: str | nn.Module | Performer | None, classes: Sequence[str] | None
) -> tuple[OpenedSelection | None, list[str]]:
    """Open the selection of a run where it has one; an unfinished one is noted."""
    if not SelectionRecord.finished_in(run):
        return None, [_UNFINISHED] if (run / SELECTION).exists() else []
    selection = load_selection(run, model)
    for name in classes or ():
        selection.column(name)  # an unknown class is refused before any image is read
    return selection, []


def _open_parts(
    run: Path,
    model: str | nn.Module | Performer | None,
    selection: OpenedSelection | None,
    classes: Sequence[str] | None,
    *,
    alone: bool,
) -> tuple[OpenedParts | None, dict[str, int], Sequence[str] | None, list[str]]:
    """Open the parts of a run; return the outputs they explain, those of ``classes`` among them, and what to note.

    There are none where a selection explains all of the classes that are asked for, nor, where the explainer is not
    ``alone``, before they are found.
    """
    if not (run / EXPLAINER_WEIGHTS).exists():
        return None, {}, classes, []
    if not alone and not (run / PartsFile.FILE).exists():
        return None, {}, classes, [f"the filters have no parts yet: run partlens parts {run}, then explain again"]
    parts = load_parts(run, model)
    known, unmatched = _known_outputs(run, parts.performer)
    if classes is None:
        return parts, known, None, unmatched
    shared, notes = _part_classes(selection, parts, known, classes)
    if not shared and selection is None:
        raise InputError(expected(f"a class among {listed(sorted(known))}", listed(list(classes)), notes[-1]))
    return (parts if shared else None), known, shared, notes


def _known_outputs(run: Path, performer: Performer) -> tuple[dict[str, int], list[str]]:
    """Return the performer's output of each category of an explainer; nothing, and a note, where one is no output."""
    names = [name for name in Run(run).read(ExplainerRun).data.categories if name]
    known = {name: output for name, output in performer.matched(names).outputs.items() if output is not None}
    if lost := sorted({*names} - {*known}):
        said = f"no output of the network is called {listed(lost)}: the explainer's parts share the score of its answer"
        return {}, [f"{said}, whatever that is"]
    return known, []


def _part_classes(
    selection: OpenedSelection | None, parts: OpenedParts, known: Mapping[str, int], classes: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return those of the named classes whose score parts can share, and why others cannot."""
    of = parts.performer.output if selection is None else lambda name: selection.found.outputs[selection.column(name)]
    outputs = [of(name) for name in classes]
    notes = []
    if None in outputs:
        notes.append("a class that is no output of the performer has no score that parts could share")
    shared = [output for output in outputs if output is not None and (not known or output in known.values())]
    if len(shared) < len(outputs) - outputs.count(None):
        notes.append(
            f"the explainer knows the parts of {listed(sorted(known))} alone: the score of no other class is shared"
        )
    return [str(output) for output in shared], notes


def _answers(performer: Performer, outputs: Tensor) -> tuple[Answer, ...]:
    """Return the performer's strongest outputs for one image."""
    chance = performer.outputs.probabilities(outputs[None])[0]
    top = chance.argsort(descending=True, stable=True)[:_ANSWERS].tolist()
    return tuple(Answer(name=performer.output_name(o), output=o, probability=float(chance[o])) for o in top)


def _selection_tensors(result: Explanations, i: int) -> dict[str, Tensor]:
    names = ("maps", "combined", "features", "contributions", "responses", "classes", "output")
    return {name: getattr(result, name)[i] for name in names}


def _first(performer: Performer, outputs: Tensor) -> tuple[int, int]:
    """Return the most probable output of one image with its rank (`answer_ranks`)."""
    ranks = answer_ranks(performer.outputs.probabilities(outputs[None])[0])
    return min(ranks.items(), key=lambda each: each[1])


def _prediction_notes(of: OpenedSelection, outputs: Tensor) -> tuple[str, list[str]]:
    """Name the predicted class where it has no photos; say why the explained classes may not be the predicted one."""
    strongest, known = _first(of.performer, outputs)[0], set(of.found.outputs)
    if known == {None}:
        return "", ["the classes of the selection are not outputs of the performer; their linear scores rank them"]
    if strongest in known:
        return "", []
    name = of.performer.output_name(strongest)
    if None in known:
        why = "is the name of no class of the selection, and some of these are no outputs: linear scores rank them"
        return "", [f"the prediction {name} {why}"]
    return name, [f"the prediction {name} has no photo in the selection; the most likely class that has is explained"]


def _by_filters(
    opened_run: OpenedSelection, result: Explanations, i: int, folder: Path, shown: Image.Image, style: Style
) -> tuple[ExplainedClass, ...]:
    """Draw one image's relevant filters; return a record per class."""
    probability = opened_run.performer.outputs.probabilities(result.output[i][None])[0]
    rank_of = answer_ranks(probability)
    combined, records = result.combined[i], []
    for k, column in enumerate(result.classes[i].tolist()):
        one = opened_run.found.classes[column]
        heat = combined[k].numpy()
        save_picture(folder / f"combined-{k + 1}.png", overlay(shown, heat, style))
        save_picture(folder / f"heat-{k + 1}.png", picture_of(coloured(heat, style)))
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
    if alike.get("rank_correlation", 0.0) <= _ALIKE:
        return ""
    file = f"difference-{k + 1}.png"
    save_picture(folder / file, difference(shown, combined[0].numpy(), combined[k].numpy()))
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
    pictured = {(f.layer, f.channel): f.picture for one in opened_run.found.classes for f in one.filters}
    made = []
    for r, feature in enumerate(result.features[place].tolist()):
        if feature < 0:  # fewer filters contribute than are asked for
            continue
        layer, channel = opened_run.found.index.place(feature)
        file = f"feature-{place[1] + 1}-{r + 1}.png"
        save_picture(folder / file, overlay(shown, result.maps[place][r].numpy(), style))
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
