"""The page of a run: its records are read once, then drawn as one self-contained HTML file.

A run holds an inspection (``inspect.json``), an explainer (``run.json``), a selection (``selection.json``) or several
of them, and perhaps ``parts.json`` and ``explanations/``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partlens.attribution.record import ExplanationRecord
from partlens.errors import InputError, RunError, expected
from partlens.evaluation.results import AGAIN as EVALUATE_AGAIN
from partlens.object_parts.inspection import InspectRecord
from partlens.page import figures, notation
from partlens.page.explainer import ExplainerData
from partlens.page.explanation_page import Explanations
from partlens.page.inspection_page import InspectionData
from partlens.page.parts_page import PartsData
from partlens.page.selection_page import SelectionData
from partlens.page.views import Chapter, Pictures, environment
from partlens.records import write_text
from partlens.run import EXPLAINER, INSPECTION, SELECTION, RunRecord
from partlens.selection.record import SelectionRecord

PAGE = "report.html"
# Room for pictures on one page, in characters; with its texts the page stays below about 15 MB.
PICTURES_BYTES = 13_500_000
# The explained images take at most this part of the room.
EXPLANATIONS_SHARE = 0.4
# The parts of an inspection at most this part of it.
INSPECTION_SHARE = 0.6


@dataclass(frozen=True)
class _PageData:
    """Everything that one page says; drawing it needs nothing else."""

    explainer: ExplainerData | None = None  # the chapter of an explained layer, or ``None``
    selection: SelectionData | None = None  # the chapter of the classes' features, or ``None``
    explanations: Explanations = field(default_factory=Explanations)  # the chapter of explained images; may be empty
    pending: str = ""  # command line of a selection that was begun and has no result yet; else empty
    named_parts: PartsData | None = None  # the chapter of the explainer's parts, or ``None``
    inspection: InspectionData | None = None  # the chapter of what each category is known by, or ``None``

    @property
    def runs(self) -> tuple[RunRecord, ...]:
        """The records of the runs that the page is about."""
        found = (self.inspection and self.inspection.record, self.selection and self.selection.record)
        return tuple(one for one in (*found, self.explainer and self.explainer.run) if one)


def _begun(kind: type[RunRecord], run: Path, verb: str) -> str:
    """Return the command of a run that was begun and has no result yet, else an empty string."""
    record = kind.read_if_there(run)
    return (record.command or f"partlens {verb}") if record and not record.finished else ""


def collect_page(run: Path) -> _PageData:
    """Read a run directory into what its page says; what the run does not hold is ``None`` or empty.

    Raises:
        RunError: ``run`` is no folder, holds none of the three records, or a file of it is damaged.
    """
    run = Path(run)
    remedy = "Give the folder that partlens inspect, fit-explainer or select-features wrote"
    if not run.is_dir():
        raise RunError(expected("the folder of a run", run.as_posix(), remedy))
    if not any((run / name).exists() for name in (INSPECTION, EXPLAINER, SELECTION)):
        rule = f"a file {INSPECTION}, {EXPLAINER} or {SELECTION} in {run}"
        raise RunError(expected(rule, "none there", remedy))
    lost = "Restore it, or delete {0.FILE} first. {0.AGAIN}".format
    of_categories = Pictures(run, lost(InspectRecord), int(INSPECTION_SHARE * PICTURES_BYTES))
    inspection = InspectionData.read(run, of_categories)
    of_filters = Pictures(run, EVALUATE_AGAIN, PICTURES_BYTES - of_categories.spent_bytes)
    explainer, pending = ExplainerData.read(run, of_filters), _begun(SelectionRecord, run, "select-features")
    of_filters.check_room()
    begun = "" if inspection else _begun(InspectRecord, run, "inspect")
    if command := begun or (explainer is None and inspection is None and pending):
        rule = f"a finished {'inspection' if begun else 'selection'} in {run}"
        raise RunError(expected(rule, "one that was only begun", f"Go on with: {command}"))
    room = max(of_filters.limit_bytes - of_filters.spent_bytes, 0)
    of_parts = Pictures(run, "Run partlens parts again", room)
    named_parts = PartsData.read(run, of_parts) if explainer else None
    of_parts.check_room()
    room = max(room - of_parts.spent_bytes, 0)
    of_images = Pictures(run, ExplanationRecord.AGAIN, room)
    explanations = Explanations.read(run, of_images, int(EXPLANATIONS_SHARE * room))
    explained = (one.name for image in explanations.shown for one in image.record.explained)
    of_classes = Pictures(run, lost(SelectionRecord), max(room - of_images.spent_bytes, 0))
    selection = SelectionData.read(run, of_classes, explained)
    return _PageData(explainer, selection, explanations, pending, named_parts, inspection)


def _chapters(data: _PageData) -> tuple[Chapter, ...]:
    """Return the chapters: verdicts, single predictions, filters; then one layer and its parts."""
    chapters = [data.inspection.chapter()] if data.inspection else []
    selection = [data.selection.chapter()] if data.selection else []
    single = [data.explanations.chapter()] if data.selection or data.explanations.shown else []
    # Where there are verdicts, the predictions follow them; without, the filters they rest on come first.
    chapters += [*single, *selection] if data.inspection else [*selection, *single]
    if data.explainer:
        chapters.append(data.explainer.chapter())
    if data.named_parts:
        explained = any(one.record.parts for one in data.explanations.shown)
        chapters.append(data.named_parts.chapter(explained=explained))
    return tuple(chapters)


def _title(data: _PageData, chapters: Sequence[Chapter]) -> str:
    if data.selection and data.explainer and not data.inspection:
        return f"Inside {notation.short_name(data.selection.record.performer.name)}"
    return next((chapter.page_title for chapter in chapters if chapter.page_title), "")


def _banners(data: _PageData) -> tuple[tuple[str, str], ...]:
    """Return (head, words) of what a reader must know before anything else."""
    banners = []
    if data.explainer and not data.explainer.run.finished:
        banners.append(("Unfinished.", "The fit's status is “running”; this page may still change."))
    if data.pending:
        banners.append(("Selection not finished.", f"It was begun and has no result yet. Go on with: {data.pending}"))
    if len({run.performer.weights_sha256 for run in data.runs} - {""}) > 1:
        banners.append(("Two networks.", "The selection and the explainer were made with different weights."))
    return tuple(banners)


def render_page(data: _PageData) -> str:
    """Draw the page: a whole HTML document without a script or a reference to any other file or host.

    The same data gives the same text. Every text of the data is escaped.
    """
    chapters = _chapters(data)
    first = next(iter(data.runs))
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=_title(data, chapters),
            brand="report" if data.selection or data.inspection else "explainer report",
            chapters=chapters,
            mains=[chapter for chapter in chapters if chapter.kind != "explanation"],
            banners=_banners(data),
            level=3 if len(chapters) > 1 else 2,
            explanations=data.explanations,
            made_by=first.versions.get("partlens", ""),
            weights=first.performer.weights_sha256,
            selected=data.selection.record.identity if data.selection else "",
            figure_css=figures.FIGURE_CSS,
            **_views(data),
            origins=[chapter.origin for chapter in chapters if chapter.origin],
        )
    )


def _views(data: _PageData) -> dict[str, Any]:
    """Return what each chapter's template shows."""
    images = data.explanations.shown
    return {
        "images": images,
        "inspection": data.inspection,
        "selection": data.selection.view(images) if data.selection else None,
        "explainer": data.explainer.view() if data.explainer else None,
        "parts": data.named_parts.view(images) if data.named_parts else None,
    }


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run whole or not at all, by default as ``report.html`` in the run; return the file.

    Raises:
        RunError: the run is missing, incomplete or of another kind, or a picture of it is missing or damaged.
        InputError: ``out`` is a folder.
        StorageError: the file could not be written.
    """
    run = Path(run)
    target = run / PAGE if out is None else Path(out)
    if target.is_dir():
        raise InputError(expected("a file name for the page", target.as_posix(), "Give a path that ends in .html"))
    write_text(target, render_page(collect_page(run)))
    return target
