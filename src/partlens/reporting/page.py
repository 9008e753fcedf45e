"""Draw the page of a run: :class:`~partlens.reporting.page_data.PageData` becomes one self-contained HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from partlens.reporting import figures, wording
from partlens.reporting.page_data import (
    SCORES,
    Evaluation,
    GalleryFilter,
    Measure,
    PageData,
    Subject,
    collect_page,
)
from partlens.store import write_text
from partlens.vocabulary import InputError, expected

__all__ = ["PageData", "collect_page", "render_page", "write_report"]

CURVES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Reconstruction loss", (("reconstruction", "reconstruction"),)),
    ("Relative error of the reconstruction", (("relative_error", "relative error"),)),
    ("p, the share of part filters", (("p", "p"),)),
    ("Filter loss, nats per filter", (("filter_1", "conv-interp-1"), ("filter_2", "conv-interp-2"))),
    ("Correlation between filters", (("correlation", "correlation"),)),
    ("Equivariance error, cells", (("equivariance", "equivariance"),)),
)
"""Panels of training curves: title, and (logged key, label) of each curve."""


@dataclass(frozen=True)
class _Figure:
    """A drawn figure with its caption; ``svg`` is markup that is already escaped."""

    caption: str
    svg: str


@dataclass(frozen=True)
class _Row:
    """A row of the score table: one score over all subjects."""

    key: str
    name: str
    direction: str
    words: str
    is_percent: bool
    cells: tuple[tuple[Subject, Measure], ...]
    common_n: str


@dataclass(frozen=True)
class _Drawn:
    """A gallery filter with its photos drawn."""

    number: int
    scores: str
    photos: tuple[str, ...]


def _count_of(measure: Measure) -> str:
    return f"n = {measure.n:,} {measure.unit}"


def _score_rows(evaluation: Evaluation) -> tuple[_Row, ...]:
    rows = []
    for key in SCORES:
        name, direction, words = wording.SCORE_WORDS[key]
        cells = tuple((subject, subject.scores[key]) for subject in evaluation.subjects)
        counts = {_count_of(measure) for _, measure in cells if measure.defined}
        # One count for the whole row is said once; different ones stand in their cells.
        common = counts.pop() if len(counts) == 1 else ""
        rows.append(_Row(key, name, direction, words, key in wording.PERCENT_SCORES, cells, common))
    return tuple(rows)


def _score_figures(evaluation: Evaluation) -> tuple[_Figure, ...]:
    drawn = []
    for key in ("instability", "consistency"):
        name, direction, _ = wording.SCORE_WORDS[key]
        rows = [
            figures.ScoreRow(s.label, s.role, m.value, m.low, m.high, wording.number(m.value))
            for s, m in ((s, s.scores[key]) for s in evaluation.subjects)
        ]
        drawn.append(_Figure(f"{name}: {direction}", figures.scores_chart(name, direction, rows)))
    # Instability never stands alone: the pair is shown whole or not at all.
    return tuple(drawn) if all(f.svg for f in drawn) else ()


def _filter_figure(evaluation: Evaluation) -> _Figure | None:
    dots = [
        figures.Dot(
            f"{role} filter {f.filter}: instability {wording.number(f.instability)}, "
            f"consistency {wording.number(f.consistency)}" + (f", {f.landmark}" if f.landmark else ""),
            role,
            f.instability,
            f.consistency,
        )
        for role, scored in (
            ("explainer", evaluation.explainer_filters),
            ("performer", evaluation.performer_filters),
        )
        for f in scored
        if not f.dead
    ]
    title = "Consistency and instability of every filter"
    svg = figures.filters_chart(title, dots)
    return _Figure("Every filter: consistency (up) against instability (right)", svg) if svg else None


def _parts_figure(evaluation: Evaluation) -> _Figure | None:
    shares = [
        (s.label, s.role, s.landmark_shares) for s in (evaluation.subject(k) for k in ("explainer", "tap", "top"))
    ]
    svg = figures.parts_chart("Share of filters by landmark", shares)
    return _Figure("Share of filters by the landmark that their peak predicts best", svg) if svg else None


def _curve_figures(data: PageData) -> tuple[_Figure, ...]:
    shaded = figures.phase_span([(e.number, e.phase) for e in data.history])
    drawn = []
    for title, curves in CURVES:
        series = [
            figures.Series(label, [(e.number, e.logged.get(key, math.nan)) for e in data.history])
            for key, label in curves
            if any(key in e.logged for e in data.history)
        ]
        svg = figures.curves_chart(title, series, shaded)
        if svg:
            drawn.append(_Figure(title, svg))
    return tuple(drawn)


def _drawn_filter(kind: str, one: GalleryFilter | None) -> _Drawn | None:
    if one is None:
        return None
    # Both scores or neither: instability is not shown alone, here too.
    scores = []
    if math.isfinite(one.instability) or math.isfinite(one.consistency):
        scores.append(f"instability {wording.number(one.instability)}, consistency {wording.number(one.consistency)}")
    if one.landmark:
        scores.append(f"best on {one.landmark.replace('_', ' ')}")
    photos = []
    for picture in one.pictures:
        label = f"{picture.key}: {kind} filter {one.filter}"
        if picture.peak_px is not None:
            label += f" peaks at ({picture.peak_px[0]:.0f}, {picture.peak_px[1]:.0f}) px"
        if math.isfinite(picture.score):
            label += f", score {wording.number(picture.score)}"
        photos.append(figures.photo_with_region(picture.uri, picture.size_px, picture.box_px, picture.peak_px, label))
    return _Drawn(one.filter, "; ".join(scores), tuple(photos))


def _gallery_rows(data: PageData) -> tuple[tuple[_Drawn | None, _Drawn | None], ...]:
    if data.gallery is None:
        return ()
    return tuple(
        (_drawn_filter("explainer", ours), _drawn_filter("performer", theirs))
        for ours, theirs in zip_longest(data.gallery.explainer, data.gallery.performer)
    )


def _history_table(data: PageData) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return column names and rows of the training log, in the order in which the columns first appear."""
    keys = tuple(dict.fromkeys(key for e in data.history for key in e.logged))
    rows = tuple(
        (str(e.number), e.phase, *(wording.number(e.logged.get(key, math.nan)) for key in keys)) for e in data.history
    )
    return ("epoch", "phase", *keys), rows


def _pairs(values: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[tuple[str, str]]:
    chosen = values if keys is None else [k for k in keys if k in values]
    return [(str(k), wording.plain(values[k])) for k in chosen]


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("partlens.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=wording.number, plain=wording.plain, counted=wording.counted, count_of=_count_of)
    return environment


def _facts(data: PageData) -> list[tuple[str, str]]:
    """Return what was explained, in the order of the page; unknown things are left out."""
    photos = wording.counted(data.train_photos, "photos") + (f" of {data.category}" if data.category else "")
    if data.background_photos:
        photos += f" and {data.background_photos:,} others"
    targets = data.structure.get("targets")
    facts = [
        ("Performer", data.performer),
        ("Layer", data.tap + (f", decoded to {wording.plain(targets)}" if targets else "")),
        ("Data", data.data_name),
        ("Learned from", photos),
        ("Fitted", wording.moment(data.created)),
        ("Duration", wording.duration(data.seconds) if math.isfinite(data.seconds) else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _landmarks(landmarks: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} ({count:,})" for name, count in landmarks.items())


def _unfinished(data: PageData) -> str:
    """Return a warning where the fit did not end, else an empty string."""
    if data.status == "finished":
        return ""
    return f"The fit's status is “{data.status or 'unknown'}”; what stands here may still change."


def render_page(data: PageData) -> str:
    """Draw the page.

    Args:
        data: what it says, from :func:`collect_page`.

    Returns:
        A whole HTML document: styles, figures and pictures are inside, there is no script and no reference to any
        other file or host. The same data gives the same text. Every text of the data is escaped.
    """
    evaluation = data.evaluation
    columns, log = _history_table(data)
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            data=data,
            evaluation=evaluation,
            name=wording.short_name(data.performer),
            headline=wording.headline(data),
            facts=_facts(data),
            verdicts=wording.verdicts(data),
            measured_on=wording.photos_measured(data, evaluation) if evaluation else "",
            landmarks=_landmarks(evaluation.landmarks) if evaluation else "",
            score_rows=_score_rows(evaluation) if evaluation else (),
            score_figures=_score_figures(evaluation) if evaluation else (),
            filter_figure=_filter_figure(evaluation) if evaluation else None,
            dead_left_out=sum(f.dead for f in evaluation.explainer_filters) if evaluation else 0,
            parts_figure=_parts_figure(evaluation) if evaluation else None,
            gallery=_gallery_rows(data),
            curves=_curve_figures(data),
            log_columns=columns,
            log_rows=log,
            versions=_pairs(data.versions),
            config=_pairs(data.config),
            preprocessing=_pairs(data.preprocessing),
            structure=_pairs(data.structure),
            receptive_field=_pairs(data.receptive_field),
            unfinished=_unfinished(data),
            notes=data.performer_notes,
            figure_css=figures.FIGURE_CSS,
        )
    )


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of a run.

    Args:
        run: the folder of a fitted explainer.
        out: the HTML file; ``report.html`` in the run when left out.

    Returns:
        The file that was written. It is written whole or not at all.

    Raises:
        RunError: the run is missing, incomplete or of another kind.
        InputError: ``out`` is a folder.
        StorageError: the file could not be written.
    """
    run = Path(run)
    target = run / "report.html" if out is None else Path(out)
    if target.is_dir():
        raise InputError(expected("a file name for the page", target.as_posix(), "Give a path that ends in .html"))
    write_text(target, render_page(collect_page(run)))
    return target
