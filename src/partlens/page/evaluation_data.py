"""What the page says of an evaluation, as data: ``evaluation.json`` read once into frozen values.

An absent or undefined number gives ``nan``, and the page says "not measured" in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partlens.errors import REGION_READINGS, RunError, expected
from partlens.page.reading import Measure, count, group, groups, measure, number, text, texts
from partlens.records import read_json

EVALUATION_SCHEMA = "partlens.evaluation/1"

SCORES = (
    "instability",
    "instability_all",
    "consistency",
    "peak_spread_cells",
    "border_frac",
    "dead_frac",
    "silent_frac",
    "filter_correlation",
    "distinct_parts",
)
"""Scores of one subject, in the order of the page; consistency stands beside instability."""
SINCE = ("instability_all", "silent_frac")
"""Scores that evaluations of earlier versions lack; their row stands where it has a value."""


@dataclass(frozen=True)
class Subject:
    """One thing that was scored: the explainer, a layer of the performer, or a null.

    Attributes:
        key: ``explainer``, ``tap``, ``top``, ``random``, ``centre`` or ``corner``.
        label: how the page calls it.
        role: ``explainer``, ``performer`` or ``null``.
        scores: by the names in :data:`SCORES`; each one is there, perhaps undefined.
        landmark_shares: share of its filters that follow each landmark best (0 to 1).
    """

    key: str
    label: str
    role: str
    scores: Mapping[str, Measure]
    landmark_shares: Mapping[str, float]


@dataclass(frozen=True)
class FilterScore:
    """One filter's own scores; ``nan`` where undefined."""

    filter: int
    instability: float
    consistency: float
    landmark: str
    spread_cells: float
    dead: bool


@dataclass(frozen=True)
class Fidelity:
    """How much of the performer is left when the reconstruction is fed back to it."""

    agreement_top1: Measure = field(default_factory=Measure)
    error_increase_points: Measure = field(default_factory=Measure)
    performer_error_percent: Measure = field(default_factory=Measure)
    explainer_error_percent: Measure = field(default_factory=Measure)
    relative_error: Mapping[str, Measure] = field(default_factory=dict)
    by_performer: bool = False
    p_optimum: Measure = field(default_factory=Measure)
    p_rescaling_error: float = math.nan


@dataclass(frozen=True)
class CategoryScore:
    """Filters of one category of an explainer of several, measured on its photos."""

    name: str
    filters: int
    instability: Measure
    centre: Measure
    consistency: Measure
    performer: Measure


@dataclass(frozen=True)
class RegionScore:
    """Part interpretability by one way of laying a filter's valid cells into the photo.

    Attributes:
        reading: ``round``, ``part_sized`` or ``scaled``.
        radius_px: of the explainer's discs; ``nan`` where cells are rectangles.
        layers: by ``explainer``, ``tap`` and ``top``.
        other_photo: the same with each photo's regions laid on another photo's parts.
        random: of random cells.
        centre: of one region that never leaves the centre.
    """

    reading: str
    radius_px: float
    layers: Mapping[str, Measure]
    other_photo: Mapping[str, Measure]
    random: Measure
    centre: Measure


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one split of the photos.

    ``beyond_nulls`` is the explainer's instability minus that of each null on the same photos. ``read_alike`` holds
    layers whose peaks were read in one way, which their ``role`` names; empty where all are read by largest cells.
    ``regions`` holds part interpretability where the photos have ``region_kind`` (masks or boxes) of parts.
    """

    split: str
    photos: int
    landmarks: Mapping[str, int]
    subjects: tuple[Subject, ...]
    p: Measure
    fidelity: Fidelity
    explainer_filters: tuple[FilterScore, ...]
    performer_filters: tuple[FilterScore, ...]
    warnings: tuple[str, ...]
    by_category: tuple[CategoryScore, ...] = ()
    read_alike: tuple[Subject, ...] = ()
    beyond_nulls: Mapping[str, Measure] = field(default_factory=dict)
    region_kind: str = ""
    regions: tuple[RegionScore, ...] = ()

    def subject(self, key: str) -> Subject:
        """Return the subject called ``key``."""
        return next(s for s in self.subjects if s.key == key)


def _subject(key: str, label: str, role: str, value: Any) -> Subject:
    scores = group(value)
    shares = {text(k): number(v) for k, v in group(scores.get("landmark_shares")).items()}
    return Subject(key, label, role, {name: measure(scores.get(name)) for name in SCORES}, shares)


def _read_alike(content: Mapping[str, Any], tap: str, top_layer: str) -> tuple[Subject, ...]:
    """Read what compares an explainer whose parts stand at centroids with layers read by their largest cells."""
    same = group(content.get("same_peak"))
    if not same:
        return ()
    largest, centroid, performer = (group(v) for v in (same.get("largest"), same.get("centroid"), content["performer"]))
    return (
        _subject("explainer", "explainer", "centroid", content.get("explainer")),
        _subject("tap", f"performer, {tap}", "centroid", centroid.get("tap")),
        _subject("top", f"performer, {top_layer or 'top layer'}", "centroid", centroid.get("top")),
        _subject("explainer", "explainer", "largest cell", largest.get("explainer")),
        _subject("tap", f"performer, {tap}", "largest cell", performer.get("tap")),
        _subject("top", f"performer, {top_layer or 'top layer'}", "largest cell", performer.get("top")),
    )


def _by_category(content: Mapping[str, Any]) -> tuple[CategoryScore, ...]:
    """Read the scores per category of an explainer of several."""

    def of(*path: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = content
        for name in path:
            found = group(found.get(name))
        return found

    centre, performer = of("nulls", "centre", "by_category"), of("performer", "tap", "by_category")
    return tuple(
        CategoryScore(
            text(name),
            count(group(scores).get("filters")),
            measure(group(scores).get("instability")),
            measure(group(centre.get(name)).get("instability")),
            measure(group(scores).get("consistency")),
            measure(group(performer.get(name)).get("instability")),
        )
        for name, scores in of("explainer", "by_category").items()
    )


def _regions(value: Any) -> tuple[RegionScore, ...]:
    found = group(value)
    return tuple(
        RegionScore(
            reading,
            number(group(one.get("radius_px")).get("explainer")),
            {text(k): measure(v) for k, v in group(one.get("layers")).items()},
            {text(k): measure(v) for k, v in group(one.get("other_photo")).items()},
            measure(one.get("random")),
            measure(one.get("centre")),
        )
        for reading in REGION_READINGS
        if (one := group(found.get(reading)))
    )


def _filter_scores(value: Any) -> tuple[FilterScore, ...]:
    return tuple(
        FilterScore(
            filter=count(row.get("filter")),
            instability=number(row.get("instability")),
            consistency=number(row.get("consistency")),
            landmark=text(row.get("landmark")),
            spread_cells=number(row.get("spread_cells")),
            dead=row.get("dead") is True,
        )
        for row in groups(value)
    )


def read_evaluation(path: Path, tap: str) -> tuple[Evaluation | None, str]:
    """Read ``evaluation.json``; also return the name of the performer's top layer."""
    if not path.exists():
        return None, ""
    content = read_json(path)
    if content.get("schema") != EVALUATION_SCHEMA:
        raise RunError(
            expected(f'schema "{EVALUATION_SCHEMA}" in {path}', content.get("schema"), "Run partlens evaluate again")
        )
    performer, nulls = group(content.get("performer")), group(content.get("nulls"))
    top_layer = text(performer.get("top_layer"))
    fed_back, filters = group(content.get("reconstruction")), group(content.get("filters"))
    evaluation = Evaluation(
        split=text(content.get("split")),
        photos=count(content.get("photos")),
        landmarks={text(k): count(v) for k, v in group(content.get("landmarks")).items()},
        subjects=(
            _subject("explainer", "explainer", "explainer", content.get("explainer")),
            _subject("tap", f"performer, {tap}", "performer", performer.get("tap")),
            _subject("top", f"performer, {top_layer or 'top layer'}", "performer", performer.get("top")),
            _subject("random", "null: random cell", "null", nulls.get("random")),
            _subject("centre", "null: centre", "null", nulls.get("centre")),
            _subject("corner", "null: corner", "null", nulls.get("corner")),
        ),
        p=measure(content.get("p")),
        fidelity=Fidelity(
            agreement_top1=measure(fed_back.get("agreement_top1")),
            error_increase_points=measure(fed_back.get("error_increase_points")),
            performer_error_percent=measure(fed_back.get("performer_error_percent")),
            explainer_error_percent=measure(fed_back.get("explainer_error_percent")),
            relative_error={text(k): measure(v) for k, v in group(fed_back.get("relative_error")).items()},
            by_performer=fed_back.get("errors_by") == "performer",
            p_optimum=measure(content.get("p_optimum")),
            p_rescaling_error=number(content.get("p_rescaling_error")),
        ),
        explainer_filters=_filter_scores(filters.get("explainer")),
        performer_filters=_filter_scores(filters.get("performer")),
        warnings=texts(content.get("warnings")),
        by_category=_by_category(content),
        read_alike=_read_alike(content, tap, top_layer),
        beyond_nulls={
            text(kind): measure(value) for kind, value in group(content.get("instability_minus_null")).items()
        },
        region_kind=text(group(content.get("part_interpretability")).get("regions")),
        regions=_regions(content.get("part_interpretability")),
    )
    return evaluation, top_layer
