"""What the page draws of one explained image, and the stand-alone page of one explanation folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from partlens.errors import InputError, RunError, expected
from partlens.page import figures, selection_words
from partlens.page.environment import environment, pairs
from partlens.page.explanation_data import (
    EXPLAIN_AGAIN,
    Contribution,
    Explained,
    ExplainedByParts,
    ExplanationData,
    Explanations,
    read_explanation,
)
from partlens.page.notation import percent
from partlens.page.page_data import PICTURES_BYTES
from partlens.page.reading import Pictures
from partlens.page.selection_page import Shown, shown
from partlens.page.views import Chapter
from partlens.records import write_text

_RULES: Mapping[str, str] = {
    "guided": "guided backpropagation",
    "deconvnet": "deconvnet",
    "gradient": "plain gradient",
}


@dataclass(frozen=True)
class _Feature:
    """One feature of an explained class."""

    name: str
    contribution: float
    share: float
    bar_percent: float
    overlay: Shown | None
    average: Shown | None


@dataclass(frozen=True)
class _Column:
    """One explained class."""

    name: str
    kind: str
    probability: float
    score: float
    combined: Shown | None
    heat: Shown | None
    features: tuple[_Feature, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Answer:
    """One of the performer's answers."""

    name: str
    probability: float
    bar_percent: float
    explained: bool


@dataclass(frozen=True)
class _OfParts:
    """One class whose score is shared among parts, with the heat map of each."""

    data: ExplainedByParts
    kind: str
    said: str
    maps: tuple[tuple[Shown | None, float], ...]


@dataclass(frozen=True)
class ExplanationView:
    """Everything that the template of one image shows; ``data`` holds what is written as it is."""

    anchor: str
    data: ExplanationData
    headline: str
    method: str
    input: Shown | None
    answers: tuple[_Answer, ...]
    columns: tuple[_Column, ...]
    rows: tuple[tuple[Explained, Contribution], ...]
    has_averages: bool
    warning: str
    parts: tuple[_OfParts, ...] = ()


def _feature(one: Explained, feature: Contribution, top: float) -> _Feature:
    name = selection_words.filter_name(feature.layer, feature.channel)
    known = top > 0 and math.isfinite(feature.contribution)
    return _Feature(
        name=name,
        contribution=feature.contribution,
        share=feature.share,
        bar_percent=100 * max(feature.contribution, 0.0) / top if known else 0.0,
        overlay=shown(feature.overlay, f"Where {name} acts for the class {one.name}", "here"),
        average=shown(feature.average, f"Average of what {name} answers to most in training photos", "in training"),
    )


def _column(one: Explained, first: Explained, top: float) -> _Column:
    kind = "predicted class" if one.rank == 1 else f"{selection_words.ordinal(one.rank)} of the answers"
    return _Column(
        name=one.name,
        kind=kind if one.rank > 0 else "",
        probability=one.probability,
        score=one.score,
        combined=shown(one.combined, f"The image with the combined map for the class {one.name}", "all features"),
        heat=shown(one.heat, f"The combined map alone for the class {one.name}", "map alone"),
        features=tuple(_feature(one, feature, top) for feature in one.features),
        remarks=selection_words.explained_remarks(one, first),
    )


def _of_parts(one: ExplainedByParts) -> _OfParts:
    kind = "predicted class" if one.rank == 1 else f"{selection_words.ordinal(one.rank)} of the answers"
    top = max((abs(part.share) for part in one.parts if math.isfinite(part.share)), default=0.0)
    return _OfParts(
        data=one,
        kind=kind if one.rank > 0 else "",
        said=f"{one.name}: {one.headline}",
        maps=tuple(
            (
                shown(part.heat, f"Where the part {part.name} acts for the class {one.name}", part.name),
                100 * abs(part.share) / top if top > 0 and math.isfinite(part.share) else 0.0,
            )
            for part in one.parts
        ),
    )


def method_words(method: Mapping[str, object]) -> str:
    """Say how an image was explained.

    Example:
        >>> method_words({"rule": "guided", "fix_strides": True, "features": 3})
        'guided backpropagation from the 3 strongest features, stride artefacts removed'
    """
    rule, features, fixed = (method.get(key) for key in ("rule", "features", "fix_strides"))
    said = _RULES.get(str(rule), str(rule or ""))
    if isinstance(features, int) and not isinstance(features, bool):
        said += f" from the {features} strongest features" if features != 1 else " from the strongest feature"
    if isinstance(fixed, (bool, str)):
        said += ", stride artefacts removed" if fixed else ", strides as they are"
    if isinstance(smooth := method.get("smooth_frac"), float) and smooth > 0:
        said += f", smoothed with {percent(smooth)} of the side"
    return said.strip().removeprefix(", ")


def explanation_view(data: ExplanationData, anchor: str = "image-1", weights_sha256: str = "") -> ExplanationView:
    """Draw what the template needs.

    Args:
        data: one explained image.
        anchor: its id on the page.
        weights_sha256: of the performer that the rest of the page is about; another one is warned of.
    """
    first = data.explained[0] if data.explained else None
    contributions = [f.contribution for one in data.explained for f in one.features if math.isfinite(f.contribution)]
    top = max(contributions, default=0.0)
    names = {one.name for one in data.explained} | {one.name for one in data.parts}
    outputs = {one.output for one in data.explained} - {None}
    other = weights_sha256 and data.weights_sha256 and data.weights_sha256 != weights_sha256
    return ExplanationView(
        anchor=anchor,
        data=data,
        headline=selection_words.explanation_headline(data),
        method=method_words(data.method),
        input=shown(data.input, f"The explained image {data.image}", "the image as the network sees it"),
        answers=tuple(
            _Answer(
                answer.name,
                answer.probability,
                100 * answer.probability if math.isfinite(answer.probability) else 0.0,
                answer.name in names or answer.output in outputs,
            )
            for answer in data.answers
        ),
        columns=tuple(_column(one, first, top) for one in data.explained) if first else (),
        parts=tuple(map(_of_parts, data.parts)),
        rows=tuple((one, feature) for one in data.explained for feature in one.features),
        has_averages=any(f.average for one in data.explained for f in one.features),
        warning="This image was explained with other weights than the rest of the page is about." if other else "",
    )


def explanation_chapter(found: Explanations) -> Chapter:
    """Describe the chapter for the contents."""
    many = len(found.shown) > 1
    return Chapter(
        kind="explanation",
        anchor="explanation",
        title="Single predictions" if many else "One prediction",
        headline="",
        facts=(),
        sections=tuple((image_anchor(i), one.image) for i, one in enumerate(found.shown)) if many else (),
    )


def image_anchor(position: int) -> str:
    """Return the id of an explained image on the page."""
    return f"image-{position + 1}"


def write_explanation_page(folder: Path, out: Path | None = None) -> Path:
    """Write the page of one explained image.

    Args:
        folder: holds ``explanation.json`` and its pictures; inside a run's ``explanations/`` the averages of the
            run's ``pictures/`` are shown too.
        out: the HTML file; ``explanation.html`` in the folder when left out.

    Returns:
        The file that was written. It is one file that loads nothing, written whole or not at all.

    Raises:
        RunError: the folder is missing, ``explanation.json`` is missing, damaged or of another version, or a picture
            is missing or damaged.
        InputError: ``out`` is a folder.
        StorageError: the file could not be written.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise RunError(
            expected("the folder of an explanation", folder.as_posix(), "Give a folder that partlens explain wrote")
        )
    target = folder / "explanation.html" if out is None else Path(out)
    if target.is_dir():
        raise InputError(expected("a file name for the page", target.as_posix(), "Give a path that ends in .html"))
    within = folder.parent.name == "explanations" and (folder.parent.parent / "selection.json").is_file()
    pictures = Pictures(folder.parent.parent if within else folder, EXPLAIN_AGAIN, PICTURES_BYTES)
    data = read_explanation(folder, pictures, alone=not within)
    page = (
        environment()
        .get_template("explanation_page.html.j2")
        .render(view=explanation_view(data), method=pairs(data.method), figure_css=figures.FIGURE_CSS)
    )
    write_text(target, page)
    return target
