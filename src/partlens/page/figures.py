"""Figures of the page as SVG text, written by hand: small, deterministic and free of any drawing state.

Every function is pure and returns one ``<svg>`` element with a title and a description for people who cannot see it.
Colours are classes, set by :data:`FIGURE_CSS` from the page's own variables, so that one figure is right in light and
in dark; what colour says, a dash or a label says too. All text and every attribute is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from partlens.page.svg import Scale, coordinate, lettering, limits, line, shortened, svg, tag

WIDTH = 360
"""Width of a chart in its own units; a page shows it at about this many pixels, so that text keeps its size."""

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
    """One row of a score chart; ``value``, ``low`` and ``high`` may be ``nan``.

    ``role`` is ``explainer``, ``performer`` or ``null``; ``text`` is the value as it is written.
    """

    label: str
    role: str
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Series:
    """One curve: points (epoch, value), any of them ``nan`` where nothing was logged."""

    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Dot:
    """One filter in a scatter of two scores."""

    label: str
    role: str
    x: float
    y: float


def tick_values(low: float, high: float, count: int = 4) -> list[float]:
    """Return round numbers from 1, 2 and 5 times a power of ten that lie within an interval.

    Args:
        low: lower end.
        high: upper end, above ``low``.
        count: about how many steps.

    Returns:
        Ascending values, at least one where the interval is not empty.

    Example:
        >>> tick_values(0, 0.17), tick_values(-0.1, 1)
        ([0.0, 0.05, 0.1, 0.15], [0.0, 0.5, 1.0])
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def tick_text(value: float) -> str:
    """Write an axis value shortly.

    Example:
        >>> [tick_text(v) for v in (0.05, -1.0, 12000, 2_100_000)]
        ['0.05', '−1', '12k', '2.1M']
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


# --- scores against nulls ---------------------------------------------------------------------------------------------


def scores_chart(title: str, direction: str, rows: Sequence[ScoreRow]) -> str:
    """Draw one score as a dot with its interval per row, the explainer first, nulls hollow.

    Args:
        title: name of the score.
        direction: which way is better.
        rows: from top to bottom; a row whose value is undefined says so.

    Returns:
        An ``<svg>``, or an empty string when no row has a value.
    """
    finite = [v for r in rows for v in (r.value, r.low, r.high) if math.isfinite(v)]
    if not any(math.isfinite(r.value) for r in rows):
        return ""
    left, right, top, step = 118.0, WIDTH - 52.0, 8.0, 26.0
    bottom = top + step * len(rows)
    low, high = limits(finite, zero=True)
    scale = Scale(low, high, left, right)
    parts = []
    for tick in tick_values(low, high):
        parts.append(line(scale(tick), top, scale(tick), bottom, "axis" if tick == 0 else "grid"))
        parts.append(lettering(scale(tick), bottom + 15, tick_text(tick), "middle", "soft"))
    lead = next((r for r in rows if r.role == "explainer" and math.isfinite(r.value)), None)
    if lead:
        parts.append(line(scale(lead.value), top, scale(lead.value), bottom, "guide"))
    for index, row in enumerate(rows):
        y = top + step * (index + 0.5)
        weight = "strong" if row.role == "explainer" else ""
        parts.append(lettering(0, y + 4, shortened(row.label, 20), "start", weight))
        if not math.isfinite(row.value):
            parts.append(lettering(WIDTH, y + 4, "not defined", "end", "soft"))
            continue
        if math.isfinite(row.low) and math.isfinite(row.high):
            parts.append(line(scale(row.low), y, scale(row.high), y, f"interval stroke-{row.role}"))
        look = f"hollow stroke-{row.role}" if row.role == "null" else f"fill-{row.role}"
        parts.append(tag("circle", cx=scale(row.value), cy=y, r=4.0 if row.role == "null" else 5.0, class_=look))
        parts.append(lettering(WIDTH, y + 4, row.text, "end", weight))
    spoken = "; ".join(f"{r.label} {r.text if math.isfinite(r.value) else 'not defined'}" for r in rows)
    return svg((WIDTH, bottom + 20), "chart", f"{title}, {direction}", spoken, *parts)


def filters_chart(title: str, dots: Sequence[Dot]) -> str:
    """Draw every filter by location instability (x) and consistency (y); the good corner is the upper left.

    Args:
        title: of the figure.
        dots: one per filter; a filter with an undefined score is left out and counted in the description.

    Returns:
        An ``<svg>``, or an empty string when no filter has both scores.
    """
    shown = [d for d in dots if math.isfinite(d.x) and math.isfinite(d.y)]
    if not shown:
        return ""
    left, right, top, bottom = 38.0, WIDTH - 8.0, 8.0, 240.0
    x_scale = Scale(*limits([d.x for d in shown], zero=True), left, right)
    y_scale = Scale(*limits([*(d.y for d in shown), 0.0]), bottom, top)
    parts = []
    for tick in tick_values(x_scale.low, x_scale.high, 5):
        parts.append(line(x_scale(tick), top, x_scale(tick), bottom, "grid"))
        parts.append(lettering(x_scale(tick), bottom + 15, tick_text(tick), "middle", "soft"))
    for tick in tick_values(y_scale.low, y_scale.high, 5):
        parts.append(line(left, y_scale(tick), right, y_scale(tick), "axis" if tick == 0 else "grid"))
        parts.append(lettering(left - 6, y_scale(tick) + 4, tick_text(tick), "end", "soft"))
    for dot in sorted(shown, key=lambda d: d.role != "performer"):
        attributes = {"cx": x_scale(dot.x), "cy": y_scale(dot.y), "r": 3.0 if dot.role == "explainer" else 2.5}
        parts.append(tag("circle", tag("title", escape(dot.label)), class_=f"fill-{dot.role} faint", **attributes))
    parts.append(lettering((left + right) / 2, bottom + 32, "location instability (lower is better)", "middle", "soft"))
    roles = {role: sum(d.role == role for d in shown) for role in ("explainer", "performer")}
    spoken = f"{roles['explainer']} filters of the explainer and {roles['performer']} of the performer"
    if len(shown) < len(dots):
        spoken += f"; {len(dots) - len(shown)} without a defined score are left out"
    return svg((WIDTH, bottom + 38), "chart", title, spoken, *parts)


# --- parts ------------------------------------------------------------------------------------------------------------


def parts_chart(title: str, shares: Sequence[tuple[str, str, Mapping[str, float]]]) -> str:
    """Draw which landmarks the filters follow: for each landmark one bar per subject.

    Args:
        title: of the figure.
        shares: (label, role, {landmark: share from 0 to 1}) per subject; the first one orders the landmarks.

    Returns:
        An ``<svg>``, or an empty string when no share is known.
    """
    known = [(label, role, {k: v for k, v in s.items() if math.isfinite(v)}) for label, role, s in shares]
    known = [row for row in known if row[2]]
    names = list(dict.fromkeys(name for _, _, s in known for name in s))
    if not names:
        return ""
    names.sort(key=lambda name: tuple(-s.get(name, 0.0) for _, _, s in known))
    left, right, bar, gap = 104.0, WIDTH - 44.0, 14.0, 12.0
    scale = Scale(0.0, max(v for _, _, s in known for v in s.values()) or 1.0, left, right)
    parts, y = [], 4.0
    for name in names:
        height = bar * len(known)
        parts.append(lettering(0, y + height / 2 + 4, shortened(name.replace("_", " "), 17)))
        for order, (_, role, share) in enumerate(known):
            value = share.get(name, 0.0)
            top = y + order * bar
            look = f"fill-{role}" + (" faint" if order > 1 else "")
            parts.append(tag("rect", x=left, y=top, width=max(scale(value) - left, 1.0), height=bar - 4, class_=look))
            parts.append(lettering(scale(value) + 5, top + bar - 5, f"{100 * value:.0f} %", "start", "soft"))
        y += height + gap
    spoken = "; ".join(
        f"{label}: " + ", ".join(f"{name} {100 * share.get(name, 0.0):.0f} %" for name in names)
        for label, _, share in known
    )
    return svg((WIDTH, y - gap + 6), "chart parts", title, spoken, *parts)


# --- training ---------------------------------------------------------------------------------------------------------


def curves_chart(title: str, series: Sequence[Series], shaded: tuple[float, float] | None = None) -> str:
    """Draw quantities logged per epoch.

    Args:
        title: of the figure.
        series: one or two curves on one axis; the second is dashed. Where epochs in between were not logged, dots
            mark those that were.
        shaded: first and last epoch of the warm-up, drawn as a shaded band.

    Returns:
        An ``<svg>``, or an empty string when nothing finite was logged.
    """
    points = [(x, y) for s in series for x, y in s.points if math.isfinite(y)]
    if not points:
        return ""
    left, right, top, bottom = 40.0, WIDTH - 8.0, 22.0 if len(series) > 1 else 6.0, 150.0
    every = [x for s in series for x, _ in s.points]
    first, last = min(every), max(every)
    x_scale = Scale(first - 0.5, last + 0.5, left, right)
    y_scale = Scale(*limits([y for _, y in points]), bottom, top)
    parts = []
    if shaded:
        start, end = max(shaded[0] - 0.5, x_scale.low), min(shaded[1] + 0.5, x_scale.high)
        span = {"x": x_scale(start), "width": x_scale(end) - x_scale(start)}
        parts.append(tag("rect", y=top, height=bottom - top, class_="phase", **span))
        parts.append(lettering(x_scale(start) + 4, bottom - 6, "warm-up", "start", "soft"))
    for tick in tick_values(y_scale.low, y_scale.high):
        parts.append(line(left, y_scale(tick), right, y_scale(tick), "grid"))
        parts.append(lettering(left - 6, y_scale(tick) + 4, tick_text(tick), "end", "soft"))
    epochs = sorted({first, last, *(t for t in tick_values(first, last) if t == int(t))}) if last > first else [first]
    # Round epochs whose label would touch that of the first or the last one are left out.
    parts += [
        lettering(x_scale(epoch), bottom + 15, tick_text(epoch), "middle", "soft")
        for epoch in epochs
        if epoch in {first, last} or min(x_scale(epoch) - x_scale(first), x_scale(last) - x_scale(epoch)) > 26
    ]
    for order, one in enumerate(series):
        look = "stroke-performer second" if order else "stroke-explainer"
        kept = [(x_scale(x), y_scale(y)) for x, y in one.points if math.isfinite(y)]
        inside = [math.isfinite(y) for _, y in one.points]
        sparse = sum(inside) == 1 or any(
            not logged and any(inside[:i]) and any(inside[i:]) for i, logged in enumerate(inside)
        )
        if len(kept) > 1:
            path = " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in kept)
            parts.append(tag("polyline", points=path, class_=f"curve {look}"))
        if sparse:
            fill = "fill-performer" if order else "fill-explainer"
            parts += [tag("circle", cx=x, cy=y, r=2.5, class_=fill) for x, y in kept]
        if len(series) > 1:
            x = left + 4 + 130 * order
            parts.append(line(x, 9, x + 22, 9, f"curve {look}"))
            parts.append(lettering(x + 28, 13, one.label, "start", "soft"))
    spoken = []
    for one in series:
        finite = [(x, y) for x, y in one.points if math.isfinite(y)]
        if finite:
            (x0, y0), (x1, y1) = finite[0], finite[-1]
            spoken.append(f"{one.label} from {y0:.3g} in epoch {x0:g} to {y1:.3g} in epoch {x1:g}")
    return svg((WIDTH, bottom + 20), "chart", title, "; ".join(spoken), *parts)


def phase_span(phases: Sequence[tuple[float, str]], name: str = "warmup") -> tuple[float, float] | None:
    """Return the first and last epoch of a phase that stands in one piece, or ``None`` where there is none.

    Example:
        >>> phase_span([(1, "warmup"), (2, "warmup"), (3, "joint")])
        (1, 2)
    """
    inside = [epoch for epoch, phase in phases if phase == name]
    if not inside:
        return None
    first = last = inside[0]
    for before, after in pairwise(inside):
        if after - before > 1:
            break
        last = after
    return first, last


# --- photos -----------------------------------------------------------------------------------------------------------


def photo_with_region(
    uri: str | None,
    size_px: tuple[float, float],
    box_px: tuple[float, float, float, float] | None,
    peak_px: tuple[float, float] | None,
    label: str,
) -> str:
    """Draw a photo with a filter's region bright, the rest dimmed, and a dot on the peak.

    Args:
        uri: the picture as a ``data:`` address; ``None`` draws an empty frame that says so.
        size_px: width and height that the coordinates refer to; the picture is stretched to it.
        box_px: left, top, right, bottom of the region; what lies outside the photo is cut.
        peak_px: x, y of the peak.
        label: what the picture shows, in words.

    Returns:
        An ``<svg>``; nothing is drawn for a region or a peak that is absent.
    """
    width, height = size_px
    unit = max(width, height) / 100
    parts = []
    if uri is None:
        parts.append(
            tag("text", "picture missing", x=width / 2, y=height / 2, text_anchor="middle", font_size=9 * unit)
        )
        return svg(size_px, "photo", label, "The picture is missing", *parts)
    parts.append(tag("image", href=uri, width=width, height=height, preserveAspectRatio="none"))
    if box_px is not None:
        left, right = (min(max(v, 0.0), width) for v in (box_px[0], box_px[2]))
        top, bottom = (min(max(v, 0.0), height) for v in (box_px[1], box_px[3]))
        wide, high = right - left, bottom - top
        if wide > 0 and high > 0:
            r = min(6 * unit, wide / 2, high / 2)
            arc = f"a{coordinate(r)},{coordinate(r)} 0 0 1"
            w, h, c = wide - 2 * r, high - 2 * r, coordinate
            hole = (
                f"M{c(left + r)},{c(top)} h{c(w)} {arc} {c(r)},{c(r)} v{c(h)} {arc} {c(-r)},{c(r)} "
                f"h{c(-w)} {arc} {c(-r)},{c(-r)} v{c(-h)} {arc} {c(r)},{c(-r)} Z"
            )
            frame = f"M0,0 h{c(width)} v{c(height)} h{c(-width)} Z"
            parts.append(tag("path", d=f"{frame} {hole}", fill_rule="evenodd", class_="dim"))
            edge = {"x": left, "y": top, "width": wide, "height": high, "rx": r}
            parts.append(tag("rect", stroke_width=2.6 * unit, class_="under", **edge))
            parts.append(tag("rect", stroke_width=1.3 * unit, class_="over", **edge))
    if peak_px is not None:
        parts.append(tag("circle", cx=peak_px[0], cy=peak_px[1], r=3.2 * unit, stroke_width=unit, class_="peak"))
    return svg(size_px, "photo", label, "", *parts)
