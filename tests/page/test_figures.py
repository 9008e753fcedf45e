"""The figures say what they were given: places, lengths, words, and nothing unescaped."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partlens.page.figures import (
    WIDTH,
    ScoreRow,
    _tick_text,
    curves_chart,
    filters_chart,
    parts_chart,
    photo_with_region,
    scores_chart,
    tick_values,
    warm_up_span,
)

NAN = math.nan
HOSTILE = "\"><script>alert('1')</script>&"
URI = "data:image/jpeg;base64,/9j/"


def elements(svg: str, tag: str, class_: str = "") -> list[ET.Element]:
    return [e for e in ET.fromstring(svg).iter(tag) if class_ in e.get("class", "").split() or not class_]


def texts(svg: str) -> list[str]:
    return ["".join(e.itertext()) for e in elements(svg, "text")]


def rows(*values: float) -> list[ScoreRow]:
    roles = ("explainer", "performer", "null")
    return [ScoreRow(f"row {i}", roles[min(i, 2)], v, v - 0.01, v + 0.01, f"{v:.3f}") for i, v in enumerate(values)]


def test_scores_stand_at_their_places():
    svg = scores_chart("Score", "lower is better", rows(0.05, 0.10, 0.15))
    xs = [float(c.get("cx")) for c in elements(svg, "circle")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.02)
    assert xs[0] < xs[1] < xs[2] < WIDTH
    for x, bar in zip(xs, elements(svg, "line", "interval"), strict=True):
        low, high = float(bar.get("x1")), float(bar.get("x2"))
        assert low < x < high
        assert x - low == pytest.approx(high - x, abs=0.02)
    (guide,) = elements(svg, "line", "guide")
    assert float(guide.get("x1")) == xs[0]


def test_a_score_axis_starts_at_zero_and_shows_negative_values():
    svg = scores_chart("Score", "", rows(0.5, -0.2))
    zero = float(elements(svg, "line", "axis")[0].get("x1"))
    positive, negative = (float(c.get("cx")) for c in elements(svg, "circle"))
    assert negative < zero < positive
    assert "0" in texts(svg)


def test_an_undefined_score_says_so_and_a_chart_of_nothing_is_not_drawn():
    mixed = [*rows(0.1), ScoreRow("lost", "null", NAN, NAN, NAN, "–")]
    svg = scores_chart("Score", "", mixed)
    assert "not defined" in texts(svg)
    assert len(elements(svg, "circle")) == 1
    assert "lost not defined" in ET.fromstring(svg).get("aria-label")
    assert scores_chart("Score", "", mixed[1:]) == ""


def test_a_score_without_interval_has_no_bar():
    svg = scores_chart("Score", "", [ScoreRow("one", "explainer", 0.1, NAN, NAN, "0.1")])
    assert len(elements(svg, "circle")) == 1
    assert not elements(svg, "line", "interval")


def test_curves_map_epochs_and_values_linearly():
    svg = curves_chart("Loss", [("loss", [(1, 4.0), (2, 3.0), (3, 2.0)])])
    (line,) = elements(svg, "polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.02)
    assert y2 > y0, "a falling curve must go down the page"
    assert not elements(svg, "circle")
    assert "loss from 4 in epoch 1 to 2 in epoch 3" in ET.fromstring(svg).get("aria-label")


def test_epochs_that_were_not_logged_leave_marked_points():
    lead = curves_chart("Loss", [("loss", [(1, NAN), (2, 3.0), (3, 2.0)])])
    assert not elements(lead, "circle"), "a late start is no gap"
    holes = curves_chart("Loss", [("loss", [(1, 4.0), (2, NAN), (3, 2.0), (4, NAN)])])
    assert len(elements(holes, "circle")) == 2
    single = curves_chart("Loss", [("loss", [(1, 4.0)])])
    assert len(elements(single, "circle")) == 1
    assert curves_chart("Loss", [("loss", [(1, NAN)])]) == ""
    assert curves_chart("Loss", []) == ""


def test_two_curves_are_told_apart_without_colour():
    series = [("first", [(1, 1.0), (2, 2.0)]), ("second", [(1, 2.0), (2, 1.0)])]
    svg = curves_chart("Loss", series)
    assert [len(elements(svg, "polyline", c)) for c in ("curve", "second")] == [2, 1]
    assert {"first", "second"} <= set(texts(svg))


def test_the_warm_up_is_shaded_where_it_was():
    points = [(e, float(e)) for e in range(1, 11)]
    svg = curves_chart("Loss", [("loss", points)], shaded=(1, 4))
    (band,) = elements(svg, "rect", "phase")
    (line,) = elements(svg, "polyline")
    xs = [float(p.split(",")[0]) for p in line.get("points").split()]
    end = float(band.get("x")) + float(band.get("width"))
    assert float(band.get("x")) < xs[0]
    assert xs[3] < end < xs[4]
    assert not elements(curves_chart("Loss", [("loss", points)]), "rect", "phase")


@pytest.mark.parametrize(
    ("phases", "span"),
    [
        ([(1, "warmup"), (2, "warmup"), (3, "joint")], (1, 2)),
        ([(1, "joint")], None),
        ([], None),
        ([(2, "warmup"), (5, "warmup")], (2, 2)),
    ],
)
def test_warm_up_span(phases, span):
    assert warm_up_span(phases) == span


def test_parts_have_bars_in_proportion():
    shares = [("explainer", "explainer", {"head": 0.75, "legs": 0.25}), ("performer", "performer", {"legs": 1.0})]
    svg = parts_chart("Parts", shares)
    head, head_performer, legs, legs_performer = (float(r.get("width")) for r in elements(svg, "rect"))
    assert head == pytest.approx(3 * legs, rel=1e-3)
    assert legs_performer == pytest.approx(4 * legs, rel=1e-3)
    assert head_performer == 1
    assert {"75 %", "25 %", "0 %", "100 %"} <= set(texts(svg))
    assert parts_chart("Parts", [("explainer", "explainer", {}), ("x", "performer", {"head": NAN})]) == ""


def test_filters_without_a_score_are_left_out_and_counted():
    dots = [("a", "explainer", 0.1, 0.5), ("b", "performer", 0.2, NAN), ("c", "performer", 0.2, 0.1)]
    svg = filters_chart("Filters", dots)
    assert len(elements(svg, "circle")) == 2
    assert "1 without a defined score" in ET.fromstring(svg).get("aria-label")
    up = {c.find("title").text: (float(c.get("cx")), float(c.get("cy"))) for c in elements(svg, "circle")}
    assert up["a"][0] < up["c"][0]
    assert up["a"][1] < up["c"][1], "higher consistency stands higher"
    assert filters_chart("Filters", dots[1:2]) == ""


def test_a_photo_is_dimmed_outside_its_region():
    svg = photo_with_region(URI, (200, 100), (50, 20, 90, 60), (70, 40), "a fox")
    (image,) = elements(svg, "image")
    assert (image.get("href"), image.get("width"), image.get("height")) == (URI, "200", "100")
    (dim,) = elements(svg, "path", "dim")
    assert dim.get("fill-rule") == "evenodd"
    assert dim.get("d").startswith("M0,0 h200 v100 h-200 Z")
    box = elements(svg, "rect", "over")[0]
    assert [box.get(k) for k in ("x", "y", "width", "height")] == ["50", "20", "40", "40"]
    peak = elements(svg, "circle", "peak")[0]
    assert (peak.get("cx"), peak.get("cy")) == ("70", "40")
    assert ET.fromstring(svg).get("aria-label") == "a fox"


def test_a_region_is_cut_at_the_photo_and_one_outside_is_not_drawn():
    svg = photo_with_region(URI, (100, 100), (-98, -50, 40, 300), None, "")
    box = elements(svg, "rect", "over")[0]
    assert [box.get(k) for k in ("x", "y", "width", "height")] == ["0", "0", "40", "100"]
    assert not elements(svg, "circle")
    outside = photo_with_region(URI, (100, 100), (120, 0, 150, 50), None, "")
    assert not elements(outside, "rect")
    assert not elements(outside, "path")


def test_hostile_texts_stay_texts():
    drawn = [
        scores_chart(HOSTILE, HOSTILE, [ScoreRow(HOSTILE, "explainer", 1.0, NAN, NAN, HOSTILE)]),
        curves_chart(HOSTILE, [(HOSTILE, [(1, 1.0)]), (HOSTILE, [(1, 2.0)])]),
        parts_chart(HOSTILE, [(HOSTILE, "explainer", {HOSTILE: 1.0})]),
        filters_chart(HOSTILE, [(HOSTILE, "explainer", 1.0, 1.0)]),
        photo_with_region(HOSTILE, (10, 10), None, None, HOSTILE),
    ]
    for svg in drawn:
        assert not elements(svg, "script")
        assert "<script" not in svg
        assert "alert('1')" in ET.fromstring(svg).get("aria-label")


def test_nothing_is_named_by_number_or_time():
    series = [("loss", [(1, 4.0), (2, 3.0)])]
    assert curves_chart("Loss", series) == curves_chart("Loss", series)
    assert not re.search(r'\sid="|url\(', curves_chart("Loss", series)), "ids would collide on one page"


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_lie_inside_and_are_few(low, width):
    high = low + width
    if high - low < 1e-9 * max(abs(low), 1):
        return
    ticks = tick_values(low, high)
    slack = 1e-6 * (high - low) + 1e-11
    assert all(low - slack <= t <= high + slack for t in ticks)
    assert ticks == sorted(ticks)
    assert len(ticks) <= 5


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (1500, "1.5k"), (-2e6, "−2M"), (3e9, "3G"), (0.25, "0.25")])
def test_tick_text(value, text):
    assert _tick_text(value) == text
