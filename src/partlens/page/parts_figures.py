"""Figures of the chapter on parts: shares with their null for comparison, and predicted against measured loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from partlens.page.figures import WIDTH, tick_text, tick_values
from partlens.page.svg import Scale, lettering, limits, line, shortened, svg, tag

SHAPES = 6
"""Parts that get a mark of their own in the scatter; later ones share the last."""


@dataclass(frozen=True)
class ShareRow:
    """One part: its share with interval, and the range of as many filters drawn at random; all in percent or NaN."""

    label: str
    value: float
    low: float
    high: float
    null_low: float
    null_high: float
    text: str


def shares_chart(title: str, rows: Sequence[ShareRow]) -> str:
    """Draw what each part adds as a dot with its interval over a band of the null.

    Returns:
        An ``<svg>``, or an empty string when no row has a value.
    """
    known = [r for r in rows if math.isfinite(r.value)]
    if not known:
        return ""
    finite = [v for r in known for v in (r.value, r.low, r.high, r.null_low, r.null_high) if math.isfinite(v)]
    left, right, top, step = 104.0, WIDTH - 52.0, 8.0, 28.0
    bottom = top + step * len(rows)
    low, high = limits(finite, zero=True)
    scale = Scale(low, high, left, right)
    parts = []
    for tick in tick_values(low, high):
        parts.append(line(scale(tick), top, scale(tick), bottom, "axis" if tick == 0 else "grid"))
        parts.append(lettering(scale(tick), bottom + 15, f"{tick_text(tick)} %", "middle", "soft"))
    for index, row in enumerate(rows):
        y = top + step * (index + 0.5)
        parts.append(lettering(0, y + 4, shortened(row.label, 17)))
        if not math.isfinite(row.value):
            parts.append(lettering(WIDTH, y + 4, "not defined", "end", "soft"))
            continue
        if math.isfinite(row.null_low) and math.isfinite(row.null_high):
            band = {"x": scale(row.null_low), "width": max(scale(row.null_high) - scale(row.null_low), 1.0)}
            parts.append(tag("rect", y=y - 8, height=16.0, fill_opacity="0.22", class_="fill-null", **band))
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(line(scale(row.low), y, scale(row.high), y, "interval stroke-explainer"))
        parts.append(tag("circle", cx=scale(row.value), cy=y, r=5.0, class_="fill-explainer"))
        parts.append(lettering(WIDTH, y + 4, row.text, "end"))
    spoken = "; ".join(f"{r.label} {r.text if math.isfinite(r.value) else 'not defined'}" for r in rows)
    return svg((WIDTH, bottom + 20), "chart", title, spoken, *parts)


def _mark(shape: int, x: float, y: float, label: str) -> str:
    """Return a mark; its shape says the part where colours cannot."""
    common = {"class_": "fill-explainer faint" if shape % 2 == 0 else "fill-performer faint"}
    name = tag("title", label)
    if shape in {0, 1}:
        return tag("circle", name, cx=x, cy=y, r=3.2, **common)
    if shape in {2, 3}:
        return tag("rect", name, x=x - 3, y=y - 3, width=6.0, height=6.0, **common)
    return tag("path", name, d=f"M{x:.2f},{y - 4:.2f} l4,7 h-8 Z", **common)


def removal_chart(title: str, series: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """Draw for each photo and part what a measure predicts (right) and what is lost without the part (up).

    Args:
        title: of the figure.
        series: (part, predicted, lost) with one value per photo.

    Returns:
        An ``<svg>`` with the line on which both are equal, or an empty string without a finite pair.
    """
    pairs = [
        (min(order, SHAPES - 1), name, x, y)
        for order, (name, predicted, lost) in enumerate(series)
        for x, y in zip(predicted, lost, strict=False)
        if math.isfinite(x) and math.isfinite(y)
    ]
    if not pairs:
        return ""
    keys = 16.0 * ((len(series) + 1) // 2)
    left, right, top = 40.0, WIDTH - 8.0, keys + 6.0
    bottom = top + 232.0
    x_scale = Scale(*limits([x for _, _, x, _ in pairs], zero=True), left, right)
    y_scale = Scale(*limits([y for *_, y in pairs], zero=True), bottom, top)
    parts = []
    for tick in tick_values(x_scale.low, x_scale.high, 5):
        parts.append(line(x_scale(tick), top, x_scale(tick), bottom, "axis" if tick == 0 else "grid"))
        parts.append(lettering(x_scale(tick), bottom + 15, tick_text(tick), "middle", "soft"))
    for tick in tick_values(y_scale.low, y_scale.high, 5):
        parts.append(line(left, y_scale(tick), right, y_scale(tick), "axis" if tick == 0 else "grid"))
        parts.append(lettering(left - 6, y_scale(tick) + 4, tick_text(tick), "end", "soft"))
    low, high = max(x_scale.low, y_scale.low), min(x_scale.high, y_scale.high)
    if low < high:
        parts.append(line(x_scale(low), y_scale(low), x_scale(high), y_scale(high), "guide"))
    parts += [_mark(shape, x_scale(x), y_scale(y), f"{escaped(name)}: {x:.2f}, {y:.2f}") for shape, name, x, y in pairs]
    for order, (name, _, _) in enumerate(series):
        x, y = left + 160.0 * (order % 2), 10 + 16.0 * (order // 2)
        parts.append(_mark(min(order, SHAPES - 1), x, y - 4, escaped(name)))
        parts.append(lettering(x + 9, y, shortened(name, 22), "start", "soft"))
    parts.append(lettering((left + right) / 2, bottom + 32, "predicted by the Shapley value", "middle", "soft"))
    spoken = f"{len(pairs)} pairs of {len(series)} parts; the dotted line is where both are equal"
    return svg((WIDTH, bottom + 38), "chart", title, spoken, *parts)


def escaped(name: str) -> str:
    """Return a name as it may occur inside an element."""
    return escape(name)
