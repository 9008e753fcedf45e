"""What the page draws of parts: rows, figures and words, ready for its template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from partlens.page import figures
from partlens.page.notation import counted, number, percent
from partlens.page.parts_data import Part, PartsData, Strip
from partlens.page.parts_figures import ShareRow, removal_chart, shares_chart
from partlens.page.reading import Measure
from partlens.page.views import Chapter, Figure, Shown, shown

_MEASURES = {
    "shapley": "Shapley value",
    "integrated_gradients": "integrated gradients",
    "gradient_activation": "gradient × activation (the papers)",
    "part_size": "baseline: by the number of filters alone",
}


@dataclass(frozen=True)
class _Strip:
    """One found part for a person to name."""

    caption: str
    picture: Shown | None


@dataclass(frozen=True)
class PartsView:
    """Everything that the template of the chapter shows; ``data`` holds what is written as it is."""

    data: PartsData
    found_by: str
    size_figure: Figure | None
    share_figure: Figure | None
    null_figure: Figure | None
    removal_figure: Figure | None
    strips: tuple[tuple[Part, tuple[_Strip, ...]], ...]
    checks: tuple[tuple[str, Measure, Measure, Measure], ...]
    remarks: tuple[str, ...]
    explained: tuple[tuple[str, str, str], ...]


def _percent_text(measure: Measure) -> str:
    return f"{100 * measure.value:.1f} %".replace("-", "−")


def _row(part: Part, measure: Measure, null: Measure | None) -> ShareRow:
    low, high = (math.nan, math.nan) if null is None else (100 * null.low, 100 * null.high)
    return ShareRow(
        part.name, 100 * measure.value, 100 * measure.low, 100 * measure.high, low, high, _percent_text(measure)
    )


def _found_by(data: PartsData) -> str:
    """Say how the parts were found."""
    photos = f"{counted(data.photos, 'photos')} of the split {data.split}"
    if "by_category" in data.thresholds:
        photos += ", each filter on those of its own category"
    if data.rule == "landmarks":
        near, follows = (data.thresholds.get(k) for k in ("distance_max_frac", "consistency_min"))
        said = f"Each filter has the landmark that its peak is nearest to on average over {photos}"
        if isinstance(near, float) and isinstance(follows, float):
            said += (
                f", if it is nearer than {percent(near)} of the diagonal and predicts the landmark's position with "
                f"R² above {number(follows)}"
            )
        kept = data.null.get("kept")
        tail = f" Of filters with random peaks {percent(kept)} would get a part." if isinstance(kept, float) else ""
        return f"{said}; else it is “other”.{tail}"
    groups, found = (data.thresholds.get(k) for k in ("clusters", "silhouette"))
    said = f"Filters whose peaks move together over {photos} and that answer to similar features are one part"
    if isinstance(groups, int) and isinstance(found, float):
        chance = data.null.get("silhouette")
        by_lot = chance.get("value") if isinstance(chance, dict) else None
        said += f": {groups} groups, silhouette {number(found)}"
        said += f" (with shuffled photos {number(by_lot)})" if isinstance(by_lot, float) else ""
    return f"{said}. A filter that moves with its group no better than a random peak is “other”."


def _remarks(data: PartsData) -> tuple[str, ...]:
    said = []
    if data.empty:
        said.append(f"No filter has the part {', '.join(data.empty)}.")
    if data.unplaced:
        said.append(f"Names that fit no part found now, kept in parts.json: {', '.join(data.unplaced)}.")
    if not data.measured:
        said.append("What the parts add was measured on other parts than these: run partlens parts again.")
    inside = [p.name for p in data.parts if p.null.has_interval and p.null.low <= p.integrated.value <= p.null.high]
    if inside:
        said.append(
            f"By integrated gradients {', '.join(inside)} {'add' if len(inside) > 1 else 'adds'} no more and no less "
            "than as many filters drawn by lot."
        )
    return tuple(said)


def parts_view(data: PartsData, explained: Sequence[tuple[str, str, str]]) -> PartsView:
    """Draw what the template needs.

    Args:
        data: what the chapter says.
        explained: (image, anchor, what its parts add) of explained photos.
    """
    total = sum(p.filters for p in data.parts)
    sizes = figures.parts_chart(
        "Share of filters by part", [("filters", "explainer", {p.name: p.filters / total for p in data.parts})]
    )
    shares = shares_chart("Share of what the parts add", [_row(p, p.share, None) for p in data.parts])
    nulls = shares_chart("Share by integrated gradients", [_row(p, p.integrated, p.null) for p in data.parts])
    removal = removal_chart("Foretold and measured loss", [(p.name, p.predicted, p.measured) for p in data.parts])
    return PartsView(
        data=data,
        found_by=_found_by(data),
        size_figure=Figure("Share of the filters by part", sizes) if sizes else None,
        share_figure=Figure("Share of what all parts add to the score (Shapley), mean over photos", shares)
        if shares
        else None,
        null_figure=Figure("The same by integrated gradients; grey: as many filters drawn by lot", nulls)
        if nulls
        else None,
        removal_figure=Figure("Loss of the score without a part (up) against what was foretold (right)", removal)
        if removal
        else None,
        strips=tuple((part, _strips(part, data.null)) for part in data.parts),
        checks=tuple((_MEASURES[c.name], c.correlation, c.slope, c.null) for c in data.checks),
        remarks=_remarks(data),
        explained=tuple(explained),
    )


def _stands(strip: Strip, null: Mapping[str, Any]) -> str:
    """Say how near to its landmark a part is, and how well it foretells it: a name alone promises more."""
    if math.isnan(strip.distance_frac):
        return ""
    chance = null.get("distance_frac_mean")
    by_lot = f" (random peaks {percent(chance)})" if isinstance(chance, float) else ""
    follows = "" if math.isnan(strip.consistency) else f", R² {number(strip.consistency)}"
    return f"{percent(strip.distance_frac)} of the diagonal from the nearest landmark on average{by_lot}{follows}"


def _strips(part: Part, null: Mapping[str, Any]) -> tuple[_Strip, ...]:
    made = []
    for strip in part.strips:
        if strip.picture is None:
            continue
        title = f"{'filter' if len(strip.shown) == 1 else 'filters'} {', '.join(map(str, strip.shown))}"
        if strip.id != part.name:
            title = f"{strip.id}: {title}"
        picture = shown(strip.picture, f"What the part {part.name} looks at", title)
        made.append(_Strip("; ".join(filter(None, (title, _stands(strip, null)))), picture))
    return tuple(made)


def parts_headline(data: PartsData) -> str:
    """Say what each part adds, and how much all of them do."""
    if not data.parts:
        return ""
    if not data.measured or not all(p.share.defined for p in data.parts):
        named = ", ".join(f"{p.name} {counted(p.filters, 'filters')}" for p in data.parts)
        return f"The filters by part: {named}."
    adds = ", ".join(f"{p.name} {_percent_text(p.share)} ({counted(p.filters, 'filters')})" for p in data.parts)
    together = (
        f" Together they add {percent(data.interpretable.value)} of the score" if data.interpretable.defined else ""
    )
    return (
        f"Of what parts add to the score: {adds}.{together}{'; the ordinary track adds the rest.' if together else ''}"
    )


def parts_chapter(data: PartsData, *, explained: bool) -> Chapter:
    """Describe the chapter for the contents."""
    sections = [("which-parts", "Which parts"), ("part-contributions", "What they add"), ("removal", "Taken away")]
    return Chapter(
        kind="parts",
        anchor="named-parts",
        title="Parts of filters",
        headline=parts_headline(data),
        facts=(),
        sections=(*sections, *([("part-photos", "In photos")] if explained else [])),
    )
