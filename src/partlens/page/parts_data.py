"""What the page says of parts, as data: ``parts.json`` is read once into frozen values, and nothing here draws.

What counts as one part is its name: parts of the file with one name are joined here as every verb joins them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partlens.errors import RunError, expected
from partlens.page.reading import (
    Embedded,
    Measure,
    Pictures,
    count,
    group,
    groups,
    items,
    measure,
    number,
    text,
)
from partlens.records import read_json

PARTS_SCHEMA = "partlens.parts/1"
PARTS_AGAIN = "Run partlens parts again"


@dataclass(frozen=True)
class Strip:
    """What one found part looks at.

    Attributes:
        id: of the part in the file.
        filters: how many it has.
        picture: crops around peaks, or ``None`` for a part without filters.
        shown: numbers of the filters in the picture, in order.
        distance_frac: mean distance of its filters' peaks from their nearest landmark, as a share of the diagonal; NaN
            without landmarks.
        consistency: mean R² with which they foretell that landmark; likewise.
    """

    id: str
    filters: int
    picture: Embedded | None
    shown: tuple[int, ...]
    distance_frac: float
    consistency: float


@dataclass(frozen=True)
class Part:
    """What counts as one part.

    Attributes:
        name: as a person named it.
        filters: how many it has.
        strips: of the parts that have this name.
        share: of what all parts add to the score (Shapley).
        share_of_score: of the score's whole rise.
        integrated: the share by integrated gradients.
        null: the same of as many filters drawn by lot.
        removal: fall of the score when the part is taken away.
        predicted: what the Shapley value says is lost, per photo.
        measured: what is lost, per photo.
    """

    name: str
    filters: int
    strips: tuple[Strip, ...]
    share: Measure
    share_of_score: Measure
    integrated: Measure
    null: Measure
    removal: Measure
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


@dataclass(frozen=True)
class Check:
    """How well one measure foretells what is lost."""

    name: str
    correlation: Measure
    slope: Measure
    null: Measure


@dataclass(frozen=True)
class PartsData:
    """Everything that the page says of parts; drawing it needs nothing else.

    Attributes:
        rule: ``landmarks`` or ``clusters``.
        photos: used.
        split: of the photos.
        thresholds: of the rule.
        null: what random peaks reach.
        parts: with filters, in the order of the file.
        empty: names of parts without a filter.
        unplaced: names that fit no part found now.
        kept: share of filters that keep their part on halves of the photos.
        kept_null: the same by lot.
        rand: adjusted Rand index of the halves.
        rand_null: the same by lot.
        measured: whether contributions were measured on the parts as they are now.
        interpretable: share of the score's rise that the parts add together.
        fed_back: score of the reconstruction.
        performer_score: score of the performer itself.
        baseline: score of nothing.
        remainder: share that the integrated gradients miss.
        method: how Shapley values were made.
        checks: of the measures.
    """

    rule: str
    photos: int
    split: str
    thresholds: Mapping[str, Any]
    null: Mapping[str, Any]
    parts: tuple[Part, ...]
    empty: tuple[str, ...]
    unplaced: tuple[str, ...]
    kept: Measure
    kept_null: Measure
    rand: Measure
    rand_null: Measure
    measured: bool
    interpretable: Measure
    fed_back: Measure
    performer_score: Measure
    baseline: Measure
    remainder: float
    method: str
    checks: tuple[Check, ...]


def mean_place(filters: Sequence[int], found: Mapping[int, Mapping[str, Any]]) -> tuple[float, float]:
    """Return how far filters stand from their nearest landmark, as a share of the diagonal, and their R², on average.

    Args:
        filters: of a part.
        found: what ``parts.json`` says of each filter, by its number.

    Returns:
        NaN for what is unknown of a filter or, without landmarks, of all.

    Example:
        >>> mean_place([0, 1], {0: {"distance_frac": 0.1, "consistency": 0.5}, 1: {"distance_frac": 0.2}})
        (0.15000000000000002, nan)
    """
    rows = [found.get(k, {}) for k in filters]
    far, follows = (
        sum(number(row.get(name)) for row in rows) / len(rows) if rows else math.nan
        for name in ("distance_frac", "consistency")
    )
    return far, follows


def _strip(row: Mapping[str, Any], found: Mapping[int, Mapping[str, Any]], run: Path, pictures: Pictures) -> Strip:
    filters = [count(k) for k in items(row.get("filters"))]
    distance, consistency = mean_place(filters, found)
    return Strip(
        id=text(row.get("id")),
        filters=len(filters),
        picture=pictures.read(run, row.get("strip")),
        shown=tuple(dict.fromkeys(count(s.get("filter")) for s in groups(row.get("shown")))),
        distance_frac=distance,
        consistency=consistency,
    )


def _part(name: str, strips: tuple[Strip, ...], found: Mapping[str, Any]) -> Part:
    pairs = group(found.get("removal_pairs"))
    return Part(
        name=name,
        filters=sum(strip.filters for strip in strips),
        strips=strips,
        share=measure(found.get("share")),
        share_of_score=measure(found.get("share_of_score")),
        integrated=measure(found.get("integrated_share")),
        null=measure(found.get("integrated_null")),
        removal=measure(found.get("removal")),
        predicted=tuple(number(v) for v in items(pairs.get("predicted"))),
        measured=tuple(number(v) for v in items(pairs.get("measured"))),
    )


def collect_parts(run: Path, pictures: Pictures) -> PartsData | None:
    """Read what the page says of parts.

    Args:
        run: the folder of a run.
        pictures: reads the strips.

    Returns:
        The content, or ``None`` where the run has no ``parts.json``.

    Raises:
        RunError: the file is damaged or of another version, or a strip is missing.
    """
    path = run / "parts.json"
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("schema") != PARTS_SCHEMA:
        raise RunError(expected(f'schema "{PARTS_SCHEMA}" in {path}', content.get("schema"), PARTS_AGAIN))
    named: dict[str, list[Mapping[str, Any]]] = {}
    for row in groups(content.get("parts")):
        named.setdefault(text(row.get("name")).strip(), []).append(row)
    full = {name: rows for name, rows in named.items() if any(items(row.get("filters")) for row in rows)}
    found, stability = group(content.get("contributions")), group(content.get("stability"))
    now = sorted(sorted(int(k) for row in rows for k in items(row.get("filters"))) for rows in full.values())
    fits = bool(found) and found.get("grouping") == now
    by_ids = {tuple(map(text, items(row.get("ids")))): row for row in groups(found.get("parts"))} if fits else {}
    scores = {count(row.get("filter")): row for row in groups(content.get("filters"))}
    score, checks = group(found.get("score")), group(found.get("removal_check"))
    return PartsData(
        rule=text(content.get("rule")),
        photos=count(content.get("photos")),
        split=text(content.get("split")),
        thresholds=group(content.get("thresholds")),
        null=group(content.get("null")),
        parts=tuple(
            _part(
                name,
                tuple(_strip(row, scores, run, pictures) for row in rows),
                by_ids.get(tuple(text(r.get("id")) for r in rows), {}),
            )
            for name, rows in full.items()
        ),
        empty=tuple(name for name in named if name not in full),
        unplaced=tuple(text(row.get("name")) for row in groups(content.get("unplaced_names"))),
        kept=measure(stability.get("kept")),
        kept_null=measure(stability.get("null_kept")),
        rand=measure(stability.get("adjusted_rand")),
        rand_null=measure(stability.get("null_adjusted_rand")),
        measured=fits,
        interpretable=measure(found.get("interpretable_share")),
        fed_back=measure(score.get("fed_back")),
        performer_score=measure(score.get("performer")),
        baseline=measure(score.get("baseline")),
        remainder=number(group(found.get("remainder_frac")).get("integrated_gradients")),
        method=text(found.get("method")),
        checks=tuple(
            Check(
                name, *(measure(group(checks.get(name)).get(k)) for k in ("correlation", "slope", "null_correlation"))
            )
            for name in ("shapley", "integrated_gradients", "gradient_activation", "part_size")
            if name in checks and fits
        ),
    )
