"""Means over categories and seeds with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

from partlens.errors import InputError, expected

ROUNDS = 2000
INTERVALS = (
    "The interval of a mean is a 95 % percentile bootstrap over categories and, within each drawn category, seeds; "
    "with a single category over its seeds. The interval of one category is the one over its photos, the mean of both "
    "ends over the seeds."
)

Cell = dict[str, Any]
"""A number of a table: ``{value, interval, n, unit}``, undefined numbers as ``None``."""


def undefined(unit: str = "categories") -> Cell:
    """Return a cell without a number."""
    return {"value": None, "interval": [None, None], "n": 0, "unit": unit}


def printed(value: float | None, source: str) -> Cell:
    """Return a published figure; it has no interval."""
    return {"value": value, "interval": [None, None], "n": 0, "unit": "published", "source": source}


def _grid(groups: Sequence[Sequence[Sequence[float]]]) -> tuple[list[npt.NDArray[np.float64]], npt.NDArray[np.intp]]:
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


def mean_cell(groups: Sequence[Sequence[float]], *, seed: int = 0, rounds: int = ROUNDS) -> Cell:
    """Return the mean over categories of the mean over seeds.

    Args:
        groups: one list of seeds' values per category; categories may have different numbers of seeds, none empty.
        seed: of the bootstrap.
        rounds: bootstrap rounds.

    Returns:
        The cell; ``n`` counts categories, or seeds of the single category. Without an interval for a single value.

    Example:
        >>> cell = mean_cell([[0.1, 0.2], [0.3]])
        >>> round(cell["value"], 3), cell["n"], cell["unit"]
        (0.225, 2, 'categories')
    """
    return _resampled([groups], lambda means: means[0], seed, rounds)


def ratio_cell(
    above: Sequence[Sequence[float]], below: Sequence[Sequence[float]], *, seed: int = 0, rounds: int = ROUNDS
) -> Cell:
    """Return the ratio of two such means over the same categories and seeds, drawn together."""
    return _resampled([above, below], lambda means: means[0] / means[1], seed, rounds)


def difference_cell(
    first: Sequence[Sequence[float]], second: Sequence[Sequence[float]], *, seed: int = 0, rounds: int = ROUNDS
) -> Cell:
    """Return the difference of two such means over the same categories and seeds, drawn together."""
    return _resampled([first, second], lambda means: means[0] - means[1], seed, rounds)


def _resampled(groups: Sequence[Sequence[Sequence[float]]], combine: Any, seed: int, rounds: int) -> Cell:
    if not groups[0] or any(not seeds for seeds in groups[0]):
        return undefined()
    arrays, counts = _grid(groups)
    plain = [np.array([float(np.nanmean(row)) for row in array]).mean() for array in arrays]
    value = float(combine(plain))
    categories, most = len(counts), int(counts.max())
    n, unit = (categories, "categories") if categories > 1 else (most, "seeds")
    if categories * most == 1:
        return {"value": value, "interval": [None, None], "n": n, "unit": unit}
    generator = np.random.default_rng(seed)
    drawn = generator.integers(categories, size=(rounds, categories))
    taken = counts[drawn]  # as many seeds as the drawn category has
    picked = np.floor(generator.random((rounds, categories, most)) * taken[..., None]).astype(np.intp)
    weight = (np.arange(most) < taken[..., None]) / taken[..., None]
    means = [(np.nan_to_num(array[drawn[..., None], picked]) * weight).sum(-1).mean(-1) for array in arrays]
    with np.errstate(divide="ignore", invalid="ignore"):
        results = np.asarray(combine(means), dtype=np.float64)
    finite = results[np.isfinite(results)]
    ends = [None, None] if not finite.size else [float(end) for end in np.quantile(finite, (0.025, 0.975))]
    return {"value": value if math.isfinite(value) else None, "interval": ends, "n": n, "unit": unit}


def seeds_cell(cells: Sequence[Mapping[str, Any]]) -> Cell:
    """Join the cells of one category's seeds: the mean value, the mean ends of the interval, n of one of them."""
    defined = [cell for cell in cells if cell["value"] is not None]
    if not defined:
        return undefined("photos")
    ends = [
        fmean(found) if len(found) == len(defined) else None
        for found in ([c["interval"][end] for c in defined if c["interval"][end] is not None] for end in (0, 1))
    ]
    first = defined[0]
    return {"value": fmean(c["value"] for c in defined), "interval": ends, "n": first["n"], "unit": first["unit"]}


def t_cell(values: Sequence[float]) -> Cell:
    """Return the mean over seeds with a 95 % t-interval; without one for a single seed.

    Example:
        >>> cell = t_cell([0.5, 0.6])
        >>> round(cell["value"], 2), [round(end, 2) for end in cell["interval"]]
        (0.55, [-0.09, 1.19])
    """
    if not values:
        return undefined("seeds")
    if len(values) < 2:
        return {"value": values[0], "interval": [None, None], "n": 1, "unit": "seeds"}
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return {
        "value": fmean(values),
        "interval": [fmean(values) - half, fmean(values) + half],
        "n": len(values),
        "unit": "seeds",
    }
