"""Figures of the page as SVG text, written by hand: small, deterministic and free of any drawing state.

Every chart is a pure function that returns one ``<svg>`` with a title and a description for people who cannot see it,
or an empty string where there is nothing to draw. Colours are classes, set by :data:`FIGURE_CSS` from the page's own
variables, so that one figure is right in light and in dark; what colour says, a dash or a label says too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, pairwise

from partlens.page.svg import Scale, coordinate, lettering, limits, line, polyline, shortened, svg, tag

# Width of a chart in its own units; a page shows it at about this many pixels, so that text keeps its size.
WIDTH = 360

FIGURE_CSS = """
svg.chart { display: block; width: 100%; height: auto; overflow: visible; font: 11px/1 var(--sans, sans-serif); }
.chart text { fill: var(--ink, currentColor); font-variant-numeric: tabular-nums; }
.chart text.soft { fill: var(--soft, currentColor); }
.chart text.strong { font-weight: 650; }
.chart .grid { stroke: var(--line, #8884); stroke-width: 1; fill: none; }
.chart .axis { stroke: var(--soft, #888); stroke-width: 1; fill: none; }
.chart .guide { stroke: var(--explainer, currentColor); stroke-width: 1; stroke-dasharray: 2 3; fill: none; }
.chart .phase { fill: var(--shade, #8882); }
.chart .interval { stroke-width: 2.5; stroke-linecap: round; fill: none; opacity: .55; }
.chart .curve { stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; fill: none; }
.chart .second { stroke-dasharray: 5 4; }
.chart .stroke-explainer { stroke: var(--explainer, currentColor); }
.chart .stroke-performer { stroke: var(--performer, currentColor); }
.chart .stroke-null { stroke: var(--soft, currentColor); }
.chart .fill-explainer { fill: var(--explainer, currentColor); }
.chart .fill-performer { fill: var(--performer, currentColor); }
.chart .fill-null { fill: var(--soft, currentColor); }
.chart .faint { fill-opacity: .45; }
.chart .hollow { fill: var(--paper, none); stroke-width: 2; }
svg.photo { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--shade, #8882); }
.photo .dim { fill: #000; fill-opacity: .5; }
.photo .under { fill: none; stroke: #000; stroke-opacity: .55; }
.photo .over { fill: none; stroke: #fff; }
.photo .peak { fill: #ffd23f; stroke: #000; }
.photo text { fill: var(--soft, currentColor); font-family: var(--sans, sans-serif); }
"""


@dataclass(frozen=True)
class ScoreRow:
    """One row of a score chart; all numbers may be ``nan``.

    ``role`` is ``explainer``, ``performer`` or ``null``; ``text`` is the value as it is written; ``band`` is a range
    for comparison.
    """

    label: str
    role: str
    value: float
    low: float
    high: float
    text: str
    band: tuple[float, float] = (math.nan, math.nan)

    @property
    def spoken(self) -> str:
        """The row in words."""
        return f"{self.label} {self.text if math.isfinite(self.value) else 'not defined'}"

    @property
    def finite(self) -> list[float]:
        """The value, its ends and the band, as far as they are defined."""
        return [v for v in (self.value, self.low, self.high, *self.band) if math.isfinite(v)]


Curve = tuple[str, Sequence[tuple[float, float]]]
"""A label and points (epoch, value), any value ``nan`` where nothing was logged."""

Dot = tuple[str, str, float, float]
"""A filter in a scatter of two scores: label, role, x and y."""


def tick_values(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers from 1, 2 and 5 times a power of ten that lie within an interval.

    Example:
        >>> tick_values(0, 0.17), tick_values(-0.1, 1)
        ([0.0, 0.05, 0.1, 0.15], [0.0, 0.5, 1.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def _tick_text(value: float) -> str:
    """Write an axis value shortly.

    Example:
        >>> [_tick_text(v) for v in (0.05, -1.0, 12000, 2_100_000)]
        ['0.05', '−1', '12k', '2.1M']
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def _columns(scale: Scale, top: float, bottom: float, count: int = 4, zero: str = "axis", unit: str = "") -> list[str]:
    """Draw vertical lines at round values with their labels below; the one at 0 has the class ``zero``."""
    parts = []
    for tick in tick_values(scale.low, scale.high, count):
        parts.append(line(scale(tick), top, scale(tick), bottom, zero if tick == 0 else "grid"))
        parts.append(lettering(scale(tick), bottom + 15, _tick_text(tick) + unit, "middle", "soft"))
    return parts


def levels(
    scale: Scale, left: float, right: float, ticks: Sequence[float], text: Callable[[float], str], zero: str = "axis"
) -> list[str]:
    """Draw horizontal lines at some values with their labels on the left; the one at 0 has the class ``zero``."""
    parts = []
    for tick in ticks:
        parts.append(line(left, scale(tick), right, scale(tick), zero if tick == 0 else "grid"))
        parts.append(lettering(left - 6, scale(tick) + 4, text(tick), "end", "soft"))
    return parts


def _rows(scale: Scale, left: float, right: float, count: int = 4, zero: str = "grid") -> list[str]:
    """Draw horizontal lines at round values."""
    return levels(scale, left, right, tick_values(scale.low, scale.high, count), _tick_text, zero)


def scores_chart(title: str, direction: str, rows: Sequence[ScoreRow], unit: str = "") -> str:
    """Draw one score as a dot with its interval per row, from top to bottom, nulls hollow; an undefined one says so.

    ``direction`` says which way is better and may be empty; ``unit`` is written after the values of the axis.
    """
    defined = [r for r in rows if math.isfinite(r.value)]
    if not defined:
        return ""
    top, step = 8.0, 26.0
    bottom = top + step * len(rows)
    scale = Scale(*limits(list(chain(*(r.finite for r in rows))), zero=True), 118.0, WIDTH - 52.0)
    parts = _columns(scale, top, bottom, unit=unit)
    lead = next((r for r in defined if r.role == "explainer"), None)
    if lead and any(r.role != "explainer" for r in rows):
        parts.append(line(scale(lead.value), top, scale(lead.value), bottom, "guide"))
    for index, row in enumerate(rows):
        parts += _score_row(row, top + step * (index + 0.5), scale)
    named = f"{title}, {direction}" if direction else title
    return svg((WIDTH, bottom + 20), "chart", named, "; ".join(r.spoken for r in rows), *parts)


def _score_row(row: ScoreRow, y: float, scale: Scale) -> list[str]:
    weight = "strong" if row.role == "explainer" else ""
    parts = [lettering(0, y + 4, shortened(row.label, 20), "start", weight)]
    if not math.isfinite(row.value):
        return [*parts, lettering(WIDTH, y + 4, "not defined", "end", "soft")]
    if all(map(math.isfinite, row.band)):
        start, end = map(scale, row.band)
        band = {"x": start, "width": max(end - start, 1.0), "y": y - 8, "height": 16.0}
        parts.append(tag("rect", class_="fill-null", fill_opacity="0.22", **band))
    if math.isfinite(row.low) and math.isfinite(row.high):
        parts.append(line(scale(row.low), y, scale(row.high), y, f"interval stroke-{row.role}"))
    radius, look = (4.0, "hollow stroke-null") if row.role == "null" else (5.0, f"fill-{row.role}")
    parts.append(tag("circle", cx=scale(row.value), cy=y, r=radius, class_=look))
    return [*parts, lettering(WIDTH, y + 4, row.text, "end", weight)]


def filters_chart(title: str, dots: Sequence[Dot]) -> str:
    """Draw every filter by location instability (x) and consistency (y); the good corner is the upper left.

    A filter with an undefined score is not drawn; the description counts such filters.
    """
    shown = [dot for dot in dots if all(map(math.isfinite, dot[2:]))]
    if not shown:
        return ""
    left, right, top, bottom = 38.0, WIDTH - 8.0, 8.0, 240.0
    x_scale = Scale(*limits([x for *_, x, _ in shown], zero=True), left, right)
    y_scale = Scale(*limits([0.0, *(y for *_, y in shown)]), bottom, top)
    parts = _columns(x_scale, top, bottom, 5, zero="grid") + _rows(y_scale, left, right, 5, zero="axis")
    # The performer's dots come first, so that the explainer's are drawn over them.
    for label, role, x, y in sorted(shown, key=lambda dot: dot[1] != "performer"):
        place = {"cx": x_scale(x), "cy": y_scale(y), "r": {"explainer": 3.0}.get(role, 2.5)}
        parts.append(tag("circle", tag("title", escape(label)), class_=f"fill-{role} faint", **place))
    parts.append(lettering((left + right) / 2, bottom + 32, "location instability (lower is better)", "middle", "soft"))
    roles = [role for _, role, _, _ in shown]
    spoken = f"{roles.count('explainer')} filters of the explainer and {roles.count('performer')} of the performer"
    if len(shown) < len(dots):
        spoken += f"; {len(dots) - len(shown)} without a defined score are not shown"
    return svg((WIDTH, bottom + 38), "chart", title, spoken, *parts)


_SHAPES = 6  # parts that get a mark of their own; later ones share the last


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

    ``series`` are (part, predicted, lost) with one value per photo; on the line both are equal.
    """
    pairs = [
        (min(order, _SHAPES - 1), name, x, y)
        for order, (name, predicted, lost) in enumerate(series)
        for x, y in zip(predicted, lost, strict=False)
        if math.isfinite(x + y)
    ]
    if not pairs:
        return ""
    keys = 16.0 * ((len(series) + 1) // 2)
    left, right, top = 40.0, WIDTH - 8.0, keys + 6.0
    bottom = top + 232.0
    x_scale = Scale(*limits([x for _, _, x, _ in pairs], zero=True), left, right)
    y_scale = Scale(*limits([y for *_, y in pairs], zero=True), bottom, top)
    parts = _columns(x_scale, top, bottom, 5) + _rows(y_scale, left, right, 5, zero="axis")
    low, high = max(x_scale.low, y_scale.low), min(x_scale.high, y_scale.high)
    if low < high:
        parts.append(line(x_scale(low), y_scale(low), x_scale(high), y_scale(high), "guide"))
    parts += [_mark(shape, x_scale(x), y_scale(y), f"{escape(name)}: {x:.2f}, {y:.2f}") for shape, name, x, y in pairs]
    for order, (name, _, _) in enumerate(series):
        x, y = left + 160.0 * (order % 2), 10 + 16.0 * (order // 2)
        parts.append(_mark(min(order, _SHAPES - 1), x, y - 4, escape(name)))
        parts.append(lettering(x + 9, y, shortened(name, 22), "start", "soft"))
    parts.append(lettering((left + right) / 2, bottom + 32, "predicted by the Shapley value", "middle", "soft"))
    spoken = f"{len(pairs)} pairs of {len(series)} parts; the dotted line is where both are equal"
    return svg((WIDTH, bottom + 38), "chart", title, spoken, *parts)


def parts_chart(title: str, shares: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    """Draw which landmarks the filters follow: for each landmark one bar per subject.

    ``shares`` are (label, role, {landmark: share from 0 to 1}) per subject; the first one orders the landmarks.
    """
    known = [(label, role, finite) for label, role, share in shares if (finite := _finite(share))]
    if not known:
        return ""
    every = [share for *_, share in known]
    names = sorted(dict.fromkeys(chain(*every)), key=lambda name: tuple(-share.get(name, 0.0) for share in every))
    bar, gap = 14.0, 12.0
    scale = Scale(0.0, max(max(share.values()) for share in every) or 1.0, 104.0, WIDTH - 44.0)
    parts, y = [], 4.0
    for name in names:
        parts.append(lettering(0, y + bar * len(known) / 2 + 4, shortened(name.replace("_", " "), 17)))
        for order, (_, role, share) in enumerate(known):
            parts += _bar(share.get(name, 0.0), y + order * bar, bar, scale, f"fill-{role}" + " faint" * (order > 1))
        y += bar * len(known) + gap
    spoken = "; ".join(f"{label}: {_said(share, names)}" for label, _, share in known)
    return svg((WIDTH, y - gap + 6), "chart parts", title, spoken, *parts)


def _finite(share: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in share.items() if math.isfinite(value)}


def _said(share: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{name} {100 * share.get(name, 0.0):.0f} %" for name in names)


def _bar(value: float, top: float, height: float, scale: Scale, look: str) -> list[str]:
    wide = max(scale(value) - scale.start, 1.0)
    return [
        tag("rect", x=scale.start, y=top, width=wide, height=height - 4, class_=look),
        lettering(scale(value) + 5, top + height - 5, f"{100 * value:.0f} %", "start", "soft"),
    ]


def curves_chart(title: str, curves: Sequence[Curve], shaded: tuple[float, float] | None = None) -> str:
    """Draw one or two quantities logged per epoch, the second dashed; ``shaded`` is the warm-up, a band."""
    every, logged = zip(*chain(*(points for _, points in curves)), strict=True) if curves else ((), ())
    values = list(filter(math.isfinite, logged))
    if not values:
        return ""
    left, right, top, bottom = 40.0, WIDTH - 8.0, 22.0 if len(curves) > 1 else 6.0, 150.0
    x_scale = Scale(min(every) - 0.5, max(every) + 0.5, left, right)
    y_scale = Scale(*limits(values), bottom, top)
    parts = []
    if shaded:
        parts += _warm_up(shaded, x_scale, top, bottom)
    parts += _rows(y_scale, left, right)
    parts += _epochs(min(every), max(every), x_scale, bottom)
    for order, (label, points) in enumerate(curves):
        role, dash = ("performer", " second") if order else ("explainer", "")
        parts += _curve(points, role, dash, x_scale, y_scale)
        if len(curves) > 1:
            x = left + 4 + 130 * order
            parts.append(line(x, 9, x + 22, 9, f"curve stroke-{role}{dash}"))
            parts.append(lettering(x + 28, 13, label, "start", "soft"))
    return svg((WIDTH, bottom + 20), "chart", title, "; ".join(filter(None, map(_spoken, curves))), *parts)


def _warm_up(shaded: tuple[float, float], scale: Scale, top: float, bottom: float) -> list[str]:
    start, end = max(shaded[0] - 0.5, scale.low), min(shaded[1] + 0.5, scale.high)
    span = {"x": scale(start), "width": scale(end) - scale(start)}
    return [
        tag("rect", y=top, height=bottom - top, class_="phase", **span),
        lettering(scale(start) + 4, bottom - 6, "warm-up", "start", "soft"),
    ]


def _epochs(first: float, last: float, scale: Scale, bottom: float) -> list[str]:
    """Label the first and last epoch, and round ones between whose labels would touch neither."""
    between = [t for t in tick_values(first, last) if t == int(t)] if last > first else []
    clear = [t for t in between if min(scale(t) - scale(first), scale(last) - scale(t)) > 26]
    return [lettering(scale(t), bottom + 15, _tick_text(t), "middle", "soft") for t in sorted({first, *clear, last})]


def _curve(points: Sequence[tuple[float, float]], role: str, dash: str, x_scale: Scale, y_scale: Scale) -> list[str]:
    logged = [index for index, (_, y) in enumerate(points) if math.isfinite(y)]
    kept = [(x_scale(points[index][0]), y_scale(points[index][1])) for index in logged]
    parts = []
    if len(kept) > 1:
        parts.append(polyline(kept, f"curve stroke-{role}{dash}"))
    # A line alone would hide that epochs in between were not logged, and a single point has no line.
    if len(logged) == 1 or any(after - before > 1 for before, after in pairwise(logged)):
        parts += [tag("circle", cx=x, cy=y, r=2.5, class_=f"fill-{role}") for x, y in kept]
    return parts


def _spoken(curve: Curve) -> str:
    label, points = curve
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return ""
    (x0, y0), (x1, y1) = finite[0], finite[-1]
    return f"{label} from {y0:.3g} in epoch {x0:g} to {y1:.3g} in epoch {x1:g}"


def warm_up_span(phases: Sequence[tuple[float, str]]) -> tuple[float, float] | None:
    """Return the first and last epoch of the first piece of the warm-up, or ``None`` where there is none.

    Example:
        >>> warm_up_span([(1, "warmup"), (2, "warmup"), (3, "joint")])
        (1, 2)
    """
    inside = [epoch for epoch, phase in phases if phase == "warmup"]
    if not inside:
        return None
    gap = next((before for before, after in pairwise(inside) if after - before > 1), inside[-1])
    return inside[0], gap


def photo_with_region(
    uri: str,
    size_px: tuple[float, float],
    box_px: tuple[float, float, float, float] | None,
    peak_px: tuple[float, float] | None,
    label: str,
) -> str:
    """Draw a photo (a ``data:`` address) with a filter's region bright, the rest dimmed, and a dot on the peak (x, y).

    The coordinates, and left, top, right and bottom of the region, which is cut at the photo's edges, are in pixels of
    ``size_px``, width and height, to which the picture is stretched.
    """
    width, height = size_px
    unit = max(width, height) / 100
    parts = [tag("image", href=uri, width=width, height=height, preserveAspectRatio="none")]
    if box_px is not None:
        parts += _dimmed(box_px, width, height, unit)
    if peak_px is not None:
        parts.append(tag("circle", cx=peak_px[0], cy=peak_px[1], r=3.2 * unit, stroke_width=unit, class_="peak"))
    return svg(size_px, "photo", label, "", *parts)


def _dimmed(box_px: tuple[float, float, float, float], width: float, height: float, unit: float) -> list[str]:
    """Dim a photo outside a box with round corners, and draw the box's edge; nothing for a box outside the photo."""
    left, right = (min(max(v, 0.0), width) for v in (box_px[0], box_px[2]))
    top, bottom = (min(max(v, 0.0), height) for v in (box_px[1], box_px[3]))
    wide, high = right - left, bottom - top
    if wide <= 0 or high <= 0:
        return []
    r, c = min(6 * unit, wide / 2, high / 2), coordinate
    w, h = wide - 2 * r, high - 2 * r
    arc = f"a{c(r)},{c(r)} 0 0 1"
    hole = (
        f"M{c(left + r)},{c(top)} h{c(w)} {arc} {c(r)},{c(r)} v{c(h)} {arc} {c(-r)},{c(r)} "
        f"h{c(-w)} {arc} {c(-r)},{c(-r)} v{c(-h)} {arc} {c(r)},{c(-r)} Z"
    )
    frame = f"M0,0 h{c(width)} v{c(height)} h{c(-width)} Z"
    edge = {"x": left, "y": top, "width": wide, "height": high, "rx": r}
    return [
        # With even-odd filling the box is a hole in the frame.
        tag("path", d=f"{frame} {hole}", fill_rule="evenodd", class_="dim"),
        tag("rect", stroke_width=2.6 * unit, class_="under", **edge),
        tag("rect", stroke_width=1.3 * unit, class_="over", **edge),
    ]
