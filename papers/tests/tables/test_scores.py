"""Means over categories and seeds against plain loops, their intervals, and groups of the tidy table."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path
from statistics import fmean, quantiles

import pytest

from partlens.errors import InputError
from partlens.estimate import Estimate
from partlens_papers.tables.scores import (
    Of,
    Row,
    Tidy,
    combined,
    estimate_of,
    mean_of,
    over_seeds,
    scores_of,
    t_interval,
    write_rows,
)

RAGGED = [[0.1, 0.2, 0.4], [0.9], [0.5, 0.3]]
UNKNOWN = (math.nan, math.nan)


def number(value: float, low: float = math.nan, high: float = math.nan, n: int = 9) -> Estimate:
    return Estimate(value, (low, high), n, "photos")


def row(value: float, category: str = "fox", seed: int = 0, subject: str = "explainer", score: str = "p") -> Row:
    return Row("net", category, seed, "explainer", subject, score, number(value, value - 1, value + 1))


def test_the_interval_is_that_of_a_bootstrap_written_as_loops() -> None:
    draw = random.Random(1)
    ragged = [[draw.random() for _ in range(count)] for count in (3, 1, 2, 3, 3, 2)]
    found = mean_of(ragged, rounds=20_000)
    assert found.value == pytest.approx(fmean(map(fmean, ragged)))
    assert (found.n, found.unit) == (6, "categories")
    means = []
    for _ in range(20_000):
        chosen = [draw.choice(ragged) for _ in ragged]
        means.append(fmean(fmean(draw.choice(seeds) for _ in seeds) for seeds in chosen))
    ends = quantiles(means, n=40)
    assert found.interval == pytest.approx([ends[0], ends[-1]], abs=0.01)


def test_a_ratio_is_drawn_together() -> None:
    doubled = [[2 * value for value in seeds] for seeds in RAGGED]
    found = combined([doubled, RAGGED], lambda a, b: a / b)
    assert found.value == pytest.approx(2)
    assert found.interval == pytest.approx([2, 2])
    gap = combined([[[v + 0.25 for v in seeds] for seeds in RAGGED], RAGGED], lambda a, b: a - b)
    assert gap.interval == pytest.approx([0.25, 0.25])
    with pytest.raises(InputError, match="equally many seeds"):
        combined([RAGGED, RAGGED[:2]], lambda a, b: a / b)


def test_one_value_has_no_interval_and_none_is_undefined() -> None:
    one = mean_of([[0.5]])
    assert (one.value, one.n, one.unit, one.has_interval) == (0.5, 1, "seeds", False)
    assert not mean_of([]).defined
    assert not t_interval([]).defined
    assert not t_interval([0.5]).has_interval
    assert mean_of([[1.0, 3.0]]).unit == "seeds"


def test_seeds_of_one_category_keep_the_interval_over_photos() -> None:
    joined = over_seeds([number(0.2, 0.1, 0.3), number(math.nan, n=0), number(0.4, 0.3, 0.7)])
    assert joined.value == pytest.approx(0.3)
    assert joined.interval == pytest.approx((0.2, 0.5))
    assert joined.n == 9
    assert not over_seeds([number(math.nan)]).defined
    assert math.isnan(over_seeds([number(0.2, 0.1, 0.3), number(0.4)]).interval[0])


def test_groups_pair_what_is_defined_and_keep_the_order() -> None:
    rows = [row(1, "fox", 0), row(2, "fox", 1), row(3, "cat", 0), row(math.nan, "cat", 1)]
    rows += [row(10, "fox", 0, "tap"), row(30, "cat", 0, "tap"), row(31, "cat", 1, "tap")]
    tidy = Tidy(rows)
    p, tap = Of("explainer", "explainer", "p"), Of("explainer", "tap", "p")
    assert tidy.groups("net", p) == [[[1, 2], [3]]]
    assert tidy.groups("net", p, tap) == [[[1], [3]], [[10], [30]]]
    assert tidy.number("net", "fox", p).value == 1.5
    assert tidy.number("net", "fox", p).interval == (0.5, 2.5)
    assert tidy.number("net", None, p).value == (1.5 + 3) / 2
    assert not tidy.number("other", None, p).defined
    # A single result keeps its own interval.
    assert Tidy(rows[:1]).number("net", None, p) == rows[0].estimate
    assert tidy.performers("explainer") == ["net"]
    assert tidy.performers("rivals") == []


def test_the_tidy_table_is_a_file_of_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "scores.csv", [row(0.5), row(math.nan)])
    found = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines()))
    assert [(r["performer"], r["value"], r["low"], r["n"]) for r in found] == [
        ("net", "0.5", "-0.5", "9"),
        ("net", "", "", "9"),
    ]


def test_scores_of_an_evaluation_are_rows() -> None:
    def cell(value: float | None, n: int = 20) -> dict[str, object]:
        return {"value": value, "interval": [None, None], "n": n, "unit": "photos"}

    evaluation = {
        "data": {"photos": 5},
        "explainer": {"instability": cell(0.1), "landmarks": ["a"]},
        "performer": {"top": {"instability": cell(0.2)}, "top_layer": "x"},
        "nulls": {"centre": {"instability": cell(0.3)}},
        "same_peak": {"explainer_largest": {"instability": cell(0.4)}},
        "p": cell(0.7),
        "reconstruction": {
            "variance_kept": {"first": cell(0.1), "last": cell(0.75)},
            "performer_error_percent": cell(4.0),
            "explainer_error_percent": cell(6.0),
        },
        "part_interpretability": {
            "readings": {
                reading: {
                    "layers": {"explainer": cell(0.5)},
                    "other_photo": {"explainer": cell(0.6)},
                    "centre": cell(0.1),
                }
                for reading in ("round", "part_sized", "scaled")
            },
        },
    }
    found = {(one.subject, one.score): one.estimate.value for one in scores_of(evaluation)}
    assert found["explainer", "instability"] == 0.1
    assert found["explainer_largest", "instability"] == 0.4
    assert found["top", "instability"] == 0.2
    assert found["centre", "instability"] == 0.3
    assert found["explainer", "relative_error"] == 0.25
    assert found["explainer", "variance_explained"] == 0.75
    assert found["always", "error_percent"] == 25.0  # 5 photos of the category among 20
    assert (found["performer", "error_percent"], found["explainer", "error_percent"]) == (4.0, 6.0)
    assert (found["explainer", "regions_round"], found["other_photo", "regions_round"]) == (0.5, 0.6)
    assert found["centre", "regions_scaled"] == 0.1
    assert math.isnan(estimate_of(cell(None)).value)
