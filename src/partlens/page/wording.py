"""From numbers to words: the headline sentence and the verdicts on an explainer.

Texts here are plain; the template escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from partlens.errors import REGION_READINGS
from partlens.page.evaluation_data import Evaluation, RegionScore
from partlens.page.explainer_data import ExplainerData
from partlens.page.notation import SPLITS, counted, number, percent, percent_digits, short_name
from partlens.page.reading import Measure

State = Literal["good", "caution", "warning", "unknown"]

DEAD_LIMIT = 0.05
CORRELATION_LIMIT = 0.9
CORRELATION_NOTICE = 0.5
SPREAD_LIMIT_CELLS = 1.0
BORDER_LIMIT = 0.5
AGREEMENT_LIMIT = 0.5

SCORE_WORDS: Mapping[str, tuple[str, str, str]] = {
    "instability": (
        "Location instability",
        "lower is better",
        (
            "How much the distance from a filter's peak to a landmark varies between photos, as a share of the photo's "
            "diagonal. A peak that never moves also scores low, so it is never read without the rows below it."
        ),
    ),
    "instability_all": (
        "… on all photos",
        "lower is better",
        (
            "The published score takes, for each filter, the hundred photos that it answers to most. Which these are "
            "depends on what makes it answer; here every photo counts."
        ),
    ),
    "consistency": (
        "Consistency",
        "higher is better",
        (
            "Share of a landmark's position variance that a filter's peak predicts on photos the fit has not seen: "
            "1 for a perfect tracker, about 0 for a peak that is random or fixed."
        ),
    ),
    "peak_spread_cells": (
        "Peak spread",
        "cells; near 0 is collapse",
        "How far a filter's peak moves between photos, in cells of the layer's map.",
    ),
    "border_frac": (
        "Peaks on the border",
        "lower is better",
        "Share of peaks that lie in the outermost ring of cells, where masked filters hide.",
    ),
    "dead_frac": ("Dead filters", "lower is better", "Share of filters that answer to no photo at all."),
    "silent_frac": (
        "Empty maps",
        "lower is better",
        (
            "Share of photos on which a filter does not answer at all, over all filters. It has no place there; what "
            "counts is the first cell, the corner."
        ),
    ),
    "filter_correlation": (
        "Filter correlation",
        "lower is better",
        "Mean correlation of peak positions between two filters: near 1, every filter follows the same part.",
    ),
    "distinct_parts": (
        "Distinct parts",
        "higher is better",
        "Effective number of different places that the filters hold; 1 when all are the same.",
    ),
}
"""Name, direction and explanation of each score."""

PERCENT_SCORES = frozenset({"border_frac", "dead_frac", "silent_frac"})


@dataclass(frozen=True)
class Verdict:
    """One thing that a reader must know before believing the numbers.

    Attributes:
        key: a stable name.
        state: ``good``, ``caution``, ``warning`` or ``unknown``.
        title: two or three words.
        words: one or two plain sentences.
    """

    key: str
    state: State
    title: str
    words: str


# --- the headline -----------------------------------------------------------------------------------------------------


def subject_matter(data: ExplainerData) -> str:
    """Say what the photos show: the category, else the data set, else nothing."""
    if data.category:
        return f" of {data.category}"
    return f" from {data.data_name}" if data.data_name else ""


def photos_measured(data: ExplainerData, evaluation: Evaluation) -> str:
    """Say on which photos it was measured, and never call training photos held out."""
    kind = f"{SPLITS[evaluation.split]} " if evaluation.split in SPLITS else ""
    photos = "photo" if evaluation.photos == 1 else "photos"
    return f"{evaluation.photos:,} {kind}{photos}{subject_matter(data)}"


def _final_p(data: ExplainerData) -> float:
    return next((e.logged["p"] for e in reversed(data.history) if "p" in e.logged), math.nan)


def _bracket(measure: Measure) -> str:
    if not measure.has_interval:
        return ""
    # Intervals over anything but photos say so, for a reader takes photos for granted here.
    over = "" if measure.unit == "photos" else f" over {counted(measure.n, measure.unit)}"
    return f" [{percent_digits(measure.low)}, {percent_digits(measure.high)}{over}]"


def headline(data: ExplainerData) -> str:
    """Say the result in one or two sentences, claiming nothing that was not measured."""
    name, evaluation = short_name(data.performer), data.evaluation
    if evaluation is None:
        learned = f"At {data.tap}, an explainer of {name} was learned on {counted(data.train_photos, 'photos')}"
        share = _final_p(data)
        says = (
            f" and came to carry {percent(share)} of the layer's information by part filters"
            if math.isfinite(share)
            else ""
        )
        return f"{learned}{subject_matter(data)}{says}. Nothing has been measured on held-out photos yet."
    p, agreement = evaluation.p, evaluation.fidelity.agreement_top1
    where = photos_measured(data, evaluation)
    if p.defined:
        first = (
            f"At {data.tap}, {percent(p.value)}{_bracket(p)} of the information of {name} on {where} "
            "is carried by part filters"
        )
    else:
        first = f"At {data.tap} of {name}, on {where}, the share carried by part filters was not measured"
    if not agreement.defined:
        return f"{first}; what the reconstruction keeps of the performer's answers was not measured."
    keeps = f"{first}; fed back, the reconstruction keeps {percent(agreement.value)} of its top-1 answers."
    if agreement.value < AGREEMENT_LIMIT:
        keeps += " That is too little for the share to describe the performer."
    return keeps


# --- the verdicts -----------------------------------------------------------------------------------------------------

_NULLS = (
    ("random", "random cells"),
    ("centre", "a peak fixed at the centre"),
    ("corner", "a peak fixed in the corner"),
)


def _joined(parts: list[str], word: str = "and") -> str:
    """Join two parts by the word, more by commas and the word."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


def compare(measure: Measure, null: Measure, *, lower_is_better: bool) -> str:
    """Compare a score with its null: return ``better``, ``worse`` or ``level``; intervals that overlap are level."""
    if (
        measure.has_interval and null.has_interval and max(measure.low, null.low) <= min(measure.high, null.high)
    ) or measure.value == null.value:
        return "level"
    return "better" if (measure.value < null.value) == lower_is_better else "worse"


def _against_nulls(evaluation: Evaluation, score: str, *, lower_is_better: bool) -> tuple[str, dict[str, str]]:
    """Say how the explainer's score stands to each null that was measured; also return the comparisons."""
    measure = evaluation.subject("explainer").scores[score]
    nulls = {key: evaluation.subject(key).scores[score] for key, _ in _NULLS}
    paired = evaluation.beyond_nulls if score == "instability" else {}
    nothing = Measure(0.0, 0.0, 0.0, 0, "")
    found = {
        # What was drawn on the same photos is compared on the same photos; two intervals of one score each say less.
        key: compare(paired[key], nothing, lower_is_better=lower_is_better)
        if key in paired and paired[key].defined
        else compare(measure, null, lower_is_better=lower_is_better)
        for key, null in nulls.items()
        if null.defined
    }

    def value_of(key: str) -> str:
        gap = paired.get(key)
        if key != "centre" or gap is None or not gap.has_interval:
            return number(nulls[key].value)
        shown = f"{number(gap.value)} [{number(gap.low)}, {number(gap.high)}]"
        return f"{number(nulls[key].value)}, difference on the same photos {shown}"

    clauses = []
    for outcome, words in (("better", "better than"), ("level", "level with"), ("worse", "worse than")):
        named = [f"{label} ({value_of(key)})" for key, label in _NULLS if found.get(key) == outcome]
        if named:
            clauses.append(f"{words} {_joined(named)}")
    if not clauses:
        return f"{number(measure.value)}; its nulls were not measured.", found
    return f"{number(measure.value)} is {_joined(clauses, 'but')}.", found


def region_name(score: RegionScore) -> str:
    """Say what a valid cell stands for."""
    radius = "" if math.isnan(score.radius_px) else f", radius {score.radius_px:.0f} px"
    return f"{REGION_READINGS[score.reading]}{radius}"


def region_words(score: RegionScore) -> str:
    """Say what a part interpretability is worth beside regions that know nothing of the photo."""
    own = score.layers.get("explainer", Measure())
    if not own.defined or not score.centre.defined:
        return "Not defined."
    if score.centre.value >= own.value:
        return "Says nothing here: one region that never leaves the centre meets parts as often, or more often."
    other = score.other_photo.get("explainer", Measure())
    if compare(own, other, lower_is_better=False) != "better":
        return "Level with the same filters' regions of other photos."
    return "Above the same filters' regions of other photos, and above the centre."


def _collapse(evaluation: Evaluation) -> list[Verdict]:
    """Return the verdicts on whether the filters have collapsed; each is a limit on one score."""
    scores = evaluation.subject("explainer").scores
    verdicts: list[Verdict] = []

    def add(key: str, question: str, words: str, *, bad: tuple[bool, str], good: str) -> None:
        if not scores[key].defined:
            verdicts.append(Verdict(key, "unknown", question, "Not measured."))
            return
        verdicts.append(Verdict(key, "warning" if bad[0] else "good", bad[1] if bad[0] else good, words))

    together = scores["filter_correlation"].value
    if CORRELATION_NOTICE < together <= CORRELATION_LIMIT:
        words = (
            f"The peaks of two filters correlate by {number(together)} on average; near 1 they would all be one part."
        )
        verdicts.append(Verdict("filter_correlation", "caution", "Filters move together", words))
    else:
        add(
            "filter_correlation",
            "Different parts?",
            f"The peaks of two filters correlate by {number(together)} on average.",
            bad=(together > CORRELATION_LIMIT, "Every filter follows the same part"),
            good="Filters hold different parts",
        )
    spread, border, dead = (scores[key].value for key in ("peak_spread_cells", "border_frac", "dead_frac"))
    add(
        "peak_spread_cells",
        "Do peaks move?",
        f"A peak moves by {number(spread)} cells between photos.",
        bad=(spread < SPREAD_LIMIT_CELLS, "Peaks barely move"),
        good="Peaks move",
    )
    add(
        "border_frac",
        "On the border?",
        f"{percent(border)} of the peaks lie in the outermost ring of cells.",
        bad=(border > BORDER_LIMIT, "Peaks sit on the border"),
        good="Peaks lie inside",
    )
    add(
        "dead_frac",
        "Dead filters?",
        f"{percent(dead)} of the filters answer to no photo.",
        bad=(dead >= DEAD_LIMIT, "Dead filters"),
        good="Filters are alive",
    )
    return verdicts


def _instability(evaluation: Evaluation, *, collapsed: bool) -> Verdict:
    """Judge instability by its nulls, and never praise it beside a collapse."""
    if not evaluation.subject("explainer").scores["instability"].defined:
        return Verdict("instability", "unknown", "Stable?", "Not measured: it needs photos with landmarks.")
    words, found = _against_nulls(evaluation, "instability", lower_is_better=True)
    if not found:
        return Verdict("instability", "unknown", "Stable?", words)
    if found.get("random") in {"level", "worse"}:
        return Verdict("instability", "warning", "No more stable than chance", words)
    if collapsed:
        words += " But the filters have collapsed, which lowers it by itself: it says nothing here."
        return Verdict("instability", "warning", "Stable by collapse", words)
    if set(found.values()) == {"better"}:
        return Verdict("instability", "good", "Beats every null", words)
    words += " A peak that never moves is always stable, so consistency has to decide."
    return Verdict("instability", "caution", "Stable, but so is a fixed peak", words)


def _consistency(evaluation: Evaluation) -> Verdict:
    if not evaluation.subject("explainer").scores["consistency"].defined:
        return Verdict("consistency", "unknown", "Follows parts?", "Not measured: it needs photos with landmarks.")
    words, found = _against_nulls(evaluation, "consistency", lower_is_better=False)
    if not found:
        return Verdict("consistency", "unknown", "Follows parts?", words)
    if set(found.values()) == {"better"}:
        return Verdict("consistency", "good", "Peaks follow parts", words)
    return Verdict("consistency", "warning", "Peaks do not follow parts", words)


def _agreement(evaluation: Evaluation) -> Verdict:
    agreement = evaluation.fidelity.agreement_top1
    if not agreement.defined:
        return Verdict("agreement", "unknown", "Faithful?", "Not measured.")
    words = f"Fed back, the reconstruction keeps {percent(agreement.value)} of the performer's top-1 answers."
    if agreement.value < AGREEMENT_LIMIT:
        return Verdict("agreement", "warning", "Not faithful", words)
    return Verdict("agreement", "good", "Faithful", words)


def verdicts(data: ExplainerData) -> tuple[Verdict, ...]:
    """Judge an evaluation in plain words: the nulls, signs of collapse, and faithfulness.

    Returns:
        Seven verdicts in the order of the page, or none where there is no evaluation. What was not measured has the
        state ``unknown``; a good instability is not called good where a sign of collapse stands beside it.
    """
    if data.evaluation is None:
        return ()
    collapse = _collapse(data.evaluation)
    collapsed = any(v.state == "warning" and v.key != "dead_frac" for v in collapse)
    return (
        _instability(data.evaluation, collapsed=collapsed),
        _consistency(data.evaluation),
        *collapse,
        _agreement(data.evaluation),
    )
