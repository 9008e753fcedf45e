"""The tidy table: one row per performer, category, seed, kind of job, subject and score; and groups of its rows.

A job gives its scores as rows of (subject, score, estimate). Subjects: ``explainer``, ``explainer_largest`` (read by
largest cells where the explainer is read by centroids), ``top`` and ``tap`` of the performer, ``tap_centroid``, the
nulls ``random``, ``centre`` and ``corner``, ``other_photo`` (the main layer's regions on another), ``interpretable``
(CNN), ``always`` (the more frequent answer), and rivals by name, read as the explainer is, and ``NAME_largest``. Scores
have the names of evaluations; ``variance_explained`` is 1 minus the relative error of the last target,
``regions_READING`` is part interpretability.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from partlens.errors import InputError, expected
from partlens.estimate import Estimate
from partlens.metrics.scores import REGION_READINGS
from partlens.records import Value, write_text

LARGEST = "_largest"
ROUNDS = 2000
INTERVALS = (
    "The interval of a mean is a 95 % percentile bootstrap over categories and, within each drawn category, seeds; "
    "with a single category over its seeds. The interval of one category is the one over its photos, the mean of both "
    "ends over the seeds."
)


class Score(Value):
    """One number that a job measured.

    Attributes:
        subject: of what; see the module.
        score: its name.
        estimate: the number.
    """

    subject: str
    score: str
    estimate: Estimate


class Row(NamedTuple):
    """A row of the tidy table."""

    performer: str
    category: str
    seed: int
    kind: str
    subject: str
    score: str
    estimate: Estimate


class Of(NamedTuple):
    """Which number: of which kind of job, which subject, which score."""

    kind: str
    subject: str
    score: str


COLUMNS = ("performer", "category", "seed", "kind", "subject", "score", "value", "low", "high", "n", "unit")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the tidy table as CSV; undefined numbers are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for *key, found in rows:
        ends = [format(v, ".7g") if math.isfinite(v) else "" for v in (found.value, *found.interval)]
        writer.writerow([*key, *ends, found.n, found.unit])
    write_text(path, buffer.getvalue())


# What an evaluation says, as scores


def scores_of(evaluation: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the scores of an evaluation, of an explainer or an interpretable CNN."""
    same = evaluation.get("same_peak") or {}
    layers = {
        "explainer": evaluation.get("explainer"),
        "interpretable": evaluation.get("interpretable"),
        **{name: evaluation["performer"].get(name) for name in ("top", "tap")},
        **evaluation["nulls"],
        f"explainer{LARGEST}": same.get("explainer_largest"),
        "tap_centroid": same.get("tap_centroid"),
    }
    for subject, found in layers.items():
        yield from _estimates(subject, found or {})
    yield from _estimates("explainer", {"p": evaluation.get("p")})
    fed = evaluation.get("reconstruction", {})
    yield from _estimates("explainer", {name: fed.get(name) for name in ("agreement_top1", "error_increase_points")})
    errors = {
        "performer": fed.get("performer_error_percent") or evaluation.get("performer_error_percent"),
        "explainer": fed.get("explainer_error_percent"),
        "interpretable": evaluation.get("error_percent"),
    }
    for subject, error in errors.items():
        yield from _estimates(subject, {"error_percent": error})
    if (of := fed.get("performer_error_percent")) and of["n"]:
        # Category against background: the share of the more frequent of both.
        share = evaluation["data"]["photos"] / of["n"]
        yield Score(
            subject="always",
            score="error_percent",
            estimate=Estimate(100 * min(share, 1 - share), (math.nan, math.nan), of["n"]),
        )
    if kept := list(fed.get("variance_kept", {}).values()):
        yield from _estimates("explainer", {"variance_explained": kept[-1]})
        yield Score(subject="explainer", score="relative_error", estimate=_one_minus(estimate_of(kept[-1])))
    for reading in REGION_READINGS if evaluation.get("part_interpretability") else ():
        found, name = evaluation["part_interpretability"]["readings"][reading], f"regions_{reading}"
        for subject, layer in found["layers"].items():
            yield from _estimates(subject, {name: layer})
        yield from _estimates("other_photo", {name: next(iter(found["other_photo"].values()))})
        yield from (score for null in ("random", "centre") for score in _estimates(null, {name: found.get(null)}))


def _estimates(subject: str, found: Mapping[str, Any]) -> Iterator[Score]:
    for name, value in found.items():
        if isinstance(value, Mapping) and {"value", "interval", "n", "unit"} <= set(value):
            yield Score(subject=subject, score=name, estimate=estimate_of(value))


def estimate_of(content: Mapping[str, Any]) -> Estimate:
    """Read ``{value, interval, n, unit}``; ``None`` is undefined."""
    value, low, high = (math.nan if v is None else float(v) for v in (content["value"], *content["interval"]))
    return Estimate(value, (low, high), content["n"], content["unit"])


def _one_minus(found: Estimate) -> Estimate:
    low, high = found.interval
    return replace(found, value=1 - found.value, interval=(1 - high, 1 - low))


# Means


def mean_of(groups: Sequence[Sequence[float]], *, seed: int = 0, rounds: int = ROUNDS) -> Estimate:
    """Return the mean over categories of the mean over seeds.

    Args:
        groups: one list of seeds' values per category; categories may have different numbers of seeds, none empty.
        seed: of the bootstrap.
        rounds: bootstrap rounds.

    Returns:
        The mean; ``n`` counts categories, or seeds of the single category. Without an interval for a single value.

    Example:
        >>> found = mean_of([[0.1, 0.2], [0.3]])
        >>> round(found.value, 3), found.n, found.unit
        (0.225, 2, 'categories')
    """
    return combined([groups], lambda mean: mean, seed=seed, rounds=rounds)


def combined(
    groups: Sequence[Sequence[Sequence[float]]], combine: Callable[..., Any], *, seed: int = 0, rounds: int = ROUNDS
) -> Estimate:
    """Return a ratio, difference, … of such means over the same categories and seeds, drawn together.

    Args:
        groups: ``[quantity][category][seed]``.
        combine: takes the mean of each quantity.
        seed: of the bootstrap.
        rounds: bootstrap rounds.
    """
    if not groups[0] or any(not seeds for seeds in groups[0]):
        return Estimate.undefined("categories")
    arrays, counts = _packed(groups)
    value = float(combine(*(np.array([float(np.nanmean(row)) for row in array]).mean() for array in arrays)))
    categories, most = len(counts), int(counts.max())
    n, unit = (categories, "categories") if categories > 1 else (most, "seeds")
    if categories * most == 1:
        return Estimate(value, (math.nan, math.nan), n, unit)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(categories, size=(rounds, categories))
    taken = counts[drawn]  # as many seeds as the drawn category has
    picked = np.floor(generator.random((rounds, categories, most)) * taken[..., None]).astype(np.intp)
    weight = (np.arange(most) < taken[..., None]) / taken[..., None]
    means = [(np.nan_to_num(array[drawn[..., None], picked]) * weight).sum(-1).mean(-1) for array in arrays]
    with np.errstate(divide="ignore", invalid="ignore"):
        results = np.asarray(combine(*means), dtype=np.float64)
    finite = results[np.isfinite(results)]
    low, high = np.quantile(finite, (0.025, 0.975)) if finite.size else (math.nan, math.nan)
    return Estimate(value if math.isfinite(value) else math.nan, (float(low), float(high)), n, unit)


def _packed(groups: Sequence[Sequence[Sequence[float]]]) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.intp]]:
    """Pack ragged ``[quantity][category][seed]`` into arrays with the defined seeds first, and count them."""
    counts = np.array([len(seeds) for seeds in groups[0]], dtype=np.intp)
    arrays = []
    for group in groups:
        if [len(seeds) for seeds in group] != counts.tolist():
            raise InputError(expected("equally many seeds of both quantities", "others", "Pair them first"))
        packed = np.full((len(group), int(counts.max())), np.nan)
        for row, seeds in enumerate(group):
            packed[row, : len(seeds)] = seeds
        arrays.append(packed)
    return arrays, counts


def over_seeds(found: Sequence[Estimate]) -> Estimate:
    """Join one category's seeds: the mean value, the mean ends of the interval, n of one of them."""
    found = [one for one in found if one.defined]
    if not found:
        return Estimate.undefined()
    low, high = (
        fmean(ends) if all(map(math.isfinite, ends)) else math.nan
        for ends in zip(*(one.interval for one in found), strict=True)
    )
    return replace(found[0], value=fmean(one.value for one in found), interval=(low, high))


def t_interval(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with a 95 % t-interval; without one for a single seed.

    Example:
        >>> found = t_interval([0.5, 0.6])
        >>> round(found.value, 2), [round(end, 2) for end in found.interval]
        (0.55, [-0.09, 1.19])
    """
    if not values:
        return Estimate.undefined("seeds")
    half = math.nan
    if len(values) > 1:
        from scipy.stats import t

        half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    mean = fmean(values)
    return Estimate(mean, (mean - half, mean + half), len(values), "seeds")


# Groups of the tidy table


@dataclass(frozen=True)
class Tidy:
    """The tidy table with its groups.

    Attributes:
        rows: all rows.
        seed: of the intervals.
    """

    rows: Sequence[Row]
    seed: int = 0

    def seeds(self, performer: str, of: Of) -> dict[str, dict[int, Estimate]]:
        """Return the defined numbers by category and seed."""
        found: dict[str, dict[int, Estimate]] = {}
        for row in self.rows:
            if row.performer == performer and (row.kind, row.subject, row.score) == of and row.estimate.defined:
                found.setdefault(row.category, {})[row.seed] = row.estimate
        return found

    def groups(self, performer: str, *quantities: Of) -> list[list[list[float]]]:
        """Return ``[quantity][category][seed]`` of the seeds where all quantities are defined; no empty category."""
        found = [self.seeds(performer, of) for of in quantities]
        groups: list[list[list[float]]] = [[] for _ in quantities]
        for category in found[0]:
            each = [by_category.get(category, {}) for by_category in found]
            both = [seed for seed in sorted(each[0]) if all(seed in one for one in each)]
            if both:
                for group, one in zip(groups, each, strict=True):
                    group.append([one[seed].value for seed in both])
        return groups

    def number(self, performer: str, category: str | None, of: Of) -> Estimate:
        """Return a category's number over its seeds, or with ``None`` the mean over all categories and seeds.

        The mean of a single result is that result with its interval over photos.
        """
        found = self.seeds(performer, of)
        if category is not None:
            return over_seeds(list(found.get(category, {}).values()))
        all_of_them = [one for seeds in found.values() for one in seeds.values()]
        if len(all_of_them) == 1:
            return all_of_them[0]
        return mean_of(self.groups(performer, of)[0], seed=self.seed)

    def performers(self, *kinds: str) -> list[str]:
        """Return the performers that have results of a kind, in their order."""
        return list(dict.fromkeys(row.performer for row in self.rows if row.kind in kinds))
