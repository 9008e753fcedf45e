"""Figures of an inspection: what windows keep of the score, by their area."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from partlens.object_parts.inspection import KeptCurves
from partlens.page.notation import percent_digits
from partlens.page.svg import Scale, lettering, line, svg, tag

_SIZE = (300.0, 168.0)
_LEFT, _RIGHT, _TOP, _BOTTOM = 34.0, 300.0 - 92.0, 8.0, 168.0 - 30.0
_STEP = 12.0  # between labels at the end of curves
_KINDS = (
    ("parts", "parts", "curve stroke-explainer"),
    ("ceiling", "best window", "curve second stroke-null"),
    ("annotated", "annotated", "curve second stroke-performer"),
    ("other_photos", "other photos", "curve thin stroke-performer"),
    ("centre", "centre", "curve thin stroke-null"),
    ("random", "random", "curve thin stroke-null"),
    ("object", "on the object", "curve thin second stroke-performer"),
    ("rest", "all the rest", "curve thin dots stroke-null"),
)


def kept_chart(title: str, kept: KeptCurves) -> str:
    """Draw what each kind of windows keeps over the area, its name at the end of its curve."""
    curves = {kind: getattr(kept, kind) for kind, _, _ in _KINDS}
    known = {k: v for k, v in curves.items() if v and all(map(math.isfinite, v))}
    if "parts" not in known:
        return ""
    top = max(1.0, *(max(values) for values in known.values()))
    across = Scale(0.0, max(kept.area), _LEFT, _RIGHT)
    up = Scale(min(0.0, *(min(values) for values in known.values())), top, _BOTTOM, _TOP)
    drawn = [*_axes(across, up, kept.area)]
    shown = [(known[kind], class_) for kind, _, class_ in reversed(_KINDS) if kind in known]
    drawn += [_curve(across, up, kept.area, values, class_) for values, class_ in shown]
    drawn += _labels(up, {words: known[kind][-1] for kind, words, _ in _KINDS if kind in known})
    at = len(kept.area) - 2
    said = "; ".join(f"{words} {percent_digits(known[kind][at])} %" for kind, words, _ in _KINDS if kind in known)
    return svg(_SIZE, "chart", title, f"Kept at {kept.area[at]:.0%} of the image: {said}.", *drawn)


def _axes(across: Scale, up: Scale, areas: Sequence[float]) -> list[str]:
    found = []
    for value in (0.0, 0.5, 1.0):
        found.append(line(_LEFT, up(value), _RIGHT, up(value), "axis" if value == 0 else "grid"))
        found.append(lettering(_LEFT - 6, up(value) + 4, f"{100 * value:.0f}", "end", "soft"))
    found += [lettering(across(area), _BOTTOM + 15, f"{100 * area:.0f}", "middle", "soft") for area in areas]
    found.append(lettering((_LEFT + _RIGHT) / 2, _BOTTOM + 28, "% of the image", "middle", "soft"))
    return found


def _curve(across: Scale, up: Scale, areas: Sequence[float], values: Sequence[float], class_: str) -> str:
    points = list(zip(areas, values, strict=True))
    if "dots" not in class_:  # no window keeps nothing; the rest of no window is everything
        points.insert(0, (0.0, 0.0))
    text = " ".join(f"{across(area):.1f},{up(value):.1f}" for area, value in points)
    return tag("polyline", points=text, class_=class_)


def _labels(up: Scale, ends: dict[str, float]) -> list[str]:
    """Put the names at the ends of the curves, moved apart where they would overlap."""
    placed: list[tuple[float, str]] = []
    lowest = _TOP - _STEP
    for words, value in sorted(ends.items(), key=lambda each: -each[1]):
        lowest = max(lowest + _STEP, up(value))
        placed.append((lowest, words))
    over = max(0.0, placed[-1][0] - (_SIZE[1] - 4))
    return [
        lettering(_RIGHT + 6, y - over + 4, words, "start", "strong" if words == "parts" else "soft")
        for y, words in placed
    ]


def shares_bar(title: str, names: Sequence[str], shares: Sequence[float]) -> str:
    """Draw shares side by side as one bar; negative ones are left out and said in words."""
    shown = [(name, share) for name, share in zip(names, shares, strict=True) if math.isfinite(share)]
    total = sum(max(share, 0.0) for _, share in shown)
    if total <= 0:
        return ""
    drawn, x = [], 0.0
    for number, (name, share) in enumerate(shown):
        width = 300.0 * max(share, 0.0) / total
        kind = "rest" if name == "elsewhere" else f"part-{number % 8}"
        words = tag("title", escape(f"{name} {percent_digits(share)} %"))
        drawn.append(tag("rect", words, x=x, y=0, width=max(width - 1, 0.5), height=14, class_=kind))
        x += width
    said = ", ".join(f"{name} {percent_digits(share)} %" for name, share in shown)
    # A slice is as wide as its share wherever the bar is shown, so it is stretched without keeping its form.
    return svg((300.0, 14.0), "chart shares", title, said, *drawn).replace(
        'role="img"', 'preserveAspectRatio="none" role="img"', 1
    )
