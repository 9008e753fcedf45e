"""Draw the page of a run: :class:`~partlens.page.page_data.PageData` becomes one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

from partlens.errors import InputError, expected
from partlens.page import figures, notation
from partlens.page.environment import environment
from partlens.page.explainer import (
    explainer_chapter,
    explainer_origin,
    explainer_remarks,
    explainer_title,
    explainer_view,
)
from partlens.page.explanation_page import explanation_chapter, explanation_view, image_anchor
from partlens.page.page_data import PageData, collect_page
from partlens.page.parts_page import parts_chapter, parts_view
from partlens.page.selection_page import (
    selection_chapter,
    selection_origin,
    selection_remarks,
    selection_title,
    selection_view,
)
from partlens.page.views import Chapter
from partlens.records import write_text

__all__ = ["PageData", "collect_page", "render_page", "write_report"]


def _chapters(data: PageData) -> tuple[Chapter, ...]:
    """Return the chapters from wide to narrow: the whole network, one prediction, one layer, its parts."""
    chapters = [selection_chapter(data.selection)] if data.selection else []
    if data.selection or data.explanations.shown:
        chapters.append(explanation_chapter(data.explanations))
    if data.explainer:
        chapters.append(explainer_chapter(data.explainer))
    if data.named_parts:
        explained = any(one.record.parts for one in data.explanations.shown)
        chapters.append(parts_chapter(data.named_parts, explained=explained))
    return tuple(chapters)


def _title(data: PageData) -> str:
    if data.selection and data.explainer:
        return f"Inside {notation.short_name(data.selection.performer)}"
    if data.selection:
        return selection_title(data.selection)
    return explainer_title(data.explainer) if data.explainer else ""


def _made_by(data: PageData) -> str:
    versions = data.selection.versions if data.selection else data.explainer.run.versions if data.explainer else {}
    return versions.get("partlens", "")


def _banners(data: PageData) -> tuple[tuple[str, str], ...]:
    """Return (head, words) of what a reader must know before anything else."""
    banners = [("Unfinished.", notation.unfinished(data.explainer.run.status, "fit"))] if data.explainer else []
    if data.pending:
        banners.append(("Selection not finished.", f"It was begun and has no result yet. Go on with: {data.pending}"))
    if len(set(filter(None, data.weights))) > 1:
        banners.append(("Two networks.", "The selection and the explainer were made with different weights."))
    return tuple((head, words) for head, words in banners if words)


def render_page(data: PageData) -> str:
    """Draw the page.

    Args:
        data: what it says, from :func:`collect_page`.

    Returns:
        A whole HTML document: styles, figures and pictures are inside, there is no script and no reference to any
        other file or host. The same data gives the same text. Every text of the data is escaped.
    """
    chapters = _chapters(data)
    mains = [chapter for chapter in chapters if chapter.kind != "explanation"]
    sha256 = next(iter(data.weights), "")
    images = tuple(
        explanation_view(one, image_anchor(position), sha256) for position, one in enumerate(data.explanations.shown)
    )
    explained = [(column.name, view.anchor, view.data.record.image) for view in images for column in view.columns]
    in_photos = [
        (view.data.record.image, view.anchor, f"{of.name}: {of.headline}") for view in images for of in view.parts
    ]
    origins = [selection_origin(data.selection)] if data.selection else []
    remarks = [selection_remarks(data.selection)] if data.selection else []
    if data.explainer:
        origins.append(explainer_origin(data.explainer))
        remarks.append(explainer_remarks(data.explainer))
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            title=_title(data),
            brand="report" if data.selection else "explainer report",
            chapters=chapters,
            mains=mains,
            banners=_banners(data),
            level=3 if len(chapters) > 1 else 2,
            selection=selection_view(data.selection, explained) if data.selection else None,
            explainer=explainer_view(data.explainer) if data.explainer else None,
            images=images,
            parts=parts_view(data.named_parts, in_photos) if data.named_parts else None,
            explanations=data.explanations,
            origins=origins,
            remarks=remarks,
            made_by=_made_by(data),
            figure_css=figures.FIGURE_CSS,
        )
    )


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: the folder of a fitted explainer, of a selection, or of both.
        out: the HTML file; ``report.html`` in the run when left out.

    Returns:
        The file that was written. It is written whole or not at all.

    Raises:
        RunError: the run is missing, incomplete or of another kind, or a picture of it is missing or damaged.
        InputError: ``out`` is a folder.
        StorageError: the file could not be written.
    """
    run = Path(run)
    target = run / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise InputError(expected("a file name for the page", target.as_posix(), "Give a path that ends in .html"))
    write_text(target, render_page(collect_page(run)))
    return target
