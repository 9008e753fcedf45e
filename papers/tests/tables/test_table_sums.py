"""Means over categories and seeds against plain loops, and their intervals."""

from __future__ import annotations

import random
from statistics import fmean, quantiles

import pytest

from partlens.errors import InputError
from partlens_papers.tables.table_sums import (
    difference_cell,
    mean_cell,
    ratio_cell,
    seeds_cell,
    t_cell,
    undefined,
)

RAGGED = [[0.1, 0.2, 0.4], [0.9], [0.5, 0.3]]


def test_the_interval_is_that_of_a_bootstrap_written_as_loops() -> None:
    draw = random.Random(1)
    ragged = [[draw.random() for _ in range(count)] for count in (3, 1, 2, 3, 3, 2)]
    cell = mean_cell(ragged, rounds=20_000)
    assert cell["value"] == pytest.approx(fmean(map(fmean, ragged)))
    assert (cell["n"], cell["unit"]) == (6, "categories")
    means = []
    for _ in range(20_000):
        chosen = [draw.choice(ragged) for _ in ragged]
        means.append(fmean(fmean(draw.choice(seeds) for _ in seeds) for seeds in chosen))
    ends = quantiles(means, n=40)
    assert cell["interval"] == pytest.approx([ends[0], ends[-1]], abs=0.01)


def test_a_ratio_is_drawn_together() -> None:
    doubled = [[2 * value for value in seeds] for seeds in RAGGED]
    cell = ratio_cell(doubled, RAGGED)
    assert cell["value"] == pytest.approx(2)
    assert cell["interval"] == pytest.approx([2, 2])
    gap = difference_cell([[v + 0.25 for v in seeds] for seeds in RAGGED], RAGGED)
    assert gap["interval"] == pytest.approx([0.25, 0.25])
    with pytest.raises(InputError, match="equally many seeds"):
        ratio_cell(RAGGED, RAGGED[:2])


def test_one_value_has_no_interval_and_none_is_undefined() -> None:
    assert mean_cell([[0.5]]) == {"value": 0.5, "interval": [None, None], "n": 1, "unit": "categories"} | {
        "unit": "seeds"
    }
    assert mean_cell([]) == undefined()
    assert t_cell([]) == undefined("seeds")
    assert t_cell([0.5])["interval"] == [None, None]
    assert mean_cell([[1.0, 3.0]])["unit"] == "seeds"


def test_seeds_of_one_category_keep_the_interval_over_photos() -> None:
    cells = [
        {"value": 0.2, "interval": [0.1, 0.3], "n": 9, "unit": "photos"},
        {"value": None, "interval": [None, None], "n": 0, "unit": "photos"},
        {"value": 0.4, "interval": [0.3, 0.7], "n": 9, "unit": "photos"},
    ]
    joined = seeds_cell(cells)
    assert joined["value"] == pytest.approx(0.3)
    assert joined["interval"] == pytest.approx([0.2, 0.5])
    assert joined["n"] == 9
    assert seeds_cell(cells[1:2]) == undefined("photos")
