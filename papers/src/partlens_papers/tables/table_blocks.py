"""What tables are made of: columns, rows, charts and verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from partlens_papers.tables.explainer_jobs import EXPLAINER
from partlens_papers.tables.published import PublishedRow
from partlens_papers.tables.study import Getter, Study
from partlens_papers.tables.table_sums import INTERVALS, Cell, ratio_cell

SUBJECTS = {
    "explainer": "explainer",
    "explainer_largest": "explainer, largest cells",
    "top": "performer, top layer",
    "tap": "performer, tap",
    "tap_centroid": "performer, tap, centroids",
    "random": "null: random",
    "centre": "null: centre",
    "corner": "null: corner",
}
ROLES = {
    "explainer": "explainer",
    "explainer_largest": "explainer",
    "top": "performer",
    "tap": "performer",
    "tap_centroid": "performer",
    "interpretable": "explainer",
}
BESIDE = {
    "instability": ("instability", "lower"),
    "instability_all": ("… on all photos", "lower"),
    "peak_spread_cells": ("spread of peaks, cells", "0 is stuck"),
    "consistency": ("consistency", "higher"),
    "filter_correlation": ("correlation of filters", "lower"),
    "distinct_parts": ("distinct parts", ""),
    "dead_frac": ("dead filters, share", "lower"),
    "silent_frac": ("empty maps, share", "lower"),
}
"""What never stands alone: score, its name, and which way is better."""
SINCE = ("instability_all", "silent_frac")
"""Scores that results of earlier versions lack; their column stands where at least one row has it."""


def column(key: str, label: str, role: str = "", better: str = "") -> dict[str, str]:
    """Describe a column."""
    return {"key": key, "label": label, "role": role, "better": better}


def row(label: str, cells: Mapping[str, Cell | None], *, strong: bool = False, group: str = "") -> dict[str, Any]:
    """Describe a row."""
    return {"label": label, "group": group, "strong": strong, "cells": dict(cells)}


def verdict(met: bool | None, title: str, words: str) -> dict[str, Any]:
    """Say whether an expectation is met; ``None`` where it cannot be said."""
    return {"met": met, "title": title, "words": words}


def digits(value: float | None, places: int = 3) -> str:
    """Write a number for a sentence.

    Example:
        >>> digits(0.0714), digits(None)
        ('0.071', '–')
    """
    return "–" if value is None else f"{value:.{places}f}"


def pretty(category: str) -> str:
    """Write a category's name for people."""
    return category.replace("_", " ")


def defined(cell: Cell) -> bool:
    """Say whether a cell holds a number."""
    return cell["value"] is not None


def present(study: Study, kind: str) -> list[str]:
    """Return the performers that have results of a kind."""
    return [label for label in study.networks if any((p, k) == (label, kind) for p, _, _, k in study.scores)]


def mean_and_category_rows(
    study: Study, kind: str, cells: Callable[[str, str | None], Mapping[str, Cell | None]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each performer's mean and, of several categories, one for each."""
    for label in present(study, kind):
        yield row(label, cells(label, None), strong=True, group=label)
        if len(study.categories) > 1:
            for category in study.categories:
                yield row(pretty(category), cells(label, category), group=label)


def cell_of(study: Study, label: str, category: str | None, kind: str, get: Getter) -> Cell:
    """Return a number of one category, or of all for ``None``."""
    return study.mean(label, kind, get) if category is None else study.one(label, category, kind, get)


def ratio_of(study: Study, label: str, category: str | None, kind: str, above: Getter, below: Getter) -> Cell:
    """Return the ratio of two numbers of one category, or of all for ``None``."""
    if category is None:
        return ratio_cell(*study.groups(label, kind, above, below), seed=study.seed)
    first, second = study.one(label, category, kind, above)["value"], study.one(label, category, kind, below)["value"]
    value = first / second if first is not None and second else None
    return {"value": value, "interval": [None, None], "n": len(study.found(label, category, kind)), "unit": "seeds"}


def chart(title: str, direction: str, rows: Sequence[tuple[str, str, Cell]]) -> dict[str, Any]:
    """Describe a chart: a bar of each row."""
    shown = [{"label": label, "role": role, "cell": cell} for label, role, cell in rows]
    return {"title": title, "direction": direction, "rows": shown}


def warnings_of(study: Study, kind: str) -> list[str]:
    """Return the evaluations' own warnings, joined over categories and seeds."""
    found: dict[tuple[str, str], list[str]] = {}
    for (label, category, seed, of), content in sorted(study.scores.items()):
        if of == kind:
            for text in content["evaluation"].get("warnings", ()):
                short = text.partition(" (")[0]
                found.setdefault((label, short), []).append(f"{pretty(category)} (seed {seed})")
    return [f"{label}: {text}, in {', '.join(where)}." for (label, text), where in found.items()]


def known_columns(scores: Mapping[str, tuple[str, str]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Describe the columns of scores; those that only newer results have are left out where no row has them."""
    unknown = {key for key in SINCE if not any(defined(r["cells"][key]) for r in rows if r["cells"].get(key))}
    return [column(key, name, "", better) for key, (name, better) in scores.items() if key not in unknown]


def beside_block(
    study: Study, kind: str, subjects: Mapping[str, str], title: str, lead: str, getter: Callable[[str, str], Getter]
) -> dict[str, Any]:
    """Return the block of scores that instability never stands without."""
    rows = [
        row(
            name,
            {score: study.mean(label, kind, getter(subject, score)) for score in BESIDE},
            strong=ROLES.get(subject) == "explainer",
            group=label,
        )
        for label in present(study, kind)
        for subject, name in subjects.items()
    ]
    columns = known_columns(BESIDE, rows)
    return {"key": "beside", "title": title, "lead": lead, "columns": columns, "rows": rows}


def table(
    blocks: Sequence[Mapping[str, Any]],
    charts: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    study: Study,
    rows: Sequence[PublishedRow],
) -> dict[str, Any]:
    """Join what a table is made of; blocks and charts without rows are left out."""
    strangers = [label for label, network in study.networks.items() if network is None]
    remarks = [INTERVALS]
    remarks += [f"The papers did not study {label}: nothing printed stands beside it." for label in strangers]
    if study.table != "interpretable-cnn":
        remarks += warnings_of(study, EXPLAINER)
    return {
        "blocks": [dict(block) for block in blocks if block["rows"]],
        "charts": [dict(chart) for chart in charts if chart["rows"]],
        "verdicts": [dict(one) for one in verdicts],
        "remarks": remarks,
        "published": [asdict(line) for line in rows],
    }
