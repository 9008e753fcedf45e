"""Figures of a selection: where in the network the filters are that the classes are read from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from partlens.page.figures import WIDTH, tick_values
from partlens.page.svg import Scale, lettering, line, svg, tag
from partlens.selection.record import SelectedClass, SelectionFound

LABELS = 40
"""So many layers are named at most; of more, every second or third."""


@dataclass(frozen=True)
class LayerShare:
    """One layer of the figure.

    Attributes:
        layer: its name.
        share: its part of a class's weight (0 to 1), mean over the classes.
        even: its part of all filters: what it would have if weights were spread evenly.
    """

    layer: str
    share: float
    even: float


def class_shares(one: SelectedClass) -> dict[str, float]:
    """Return a class's share of weight in each layer that has any."""
    shares: dict[str, float] = {}
    for each in one.filters:
        shares[each.layer] = shares.get(each.layer, 0.0) + each.share
    return shares


def layer_shares(found: SelectionFound) -> tuple[LayerShare, ...]:
    """Return every measured layer's share, mean over the classes that are read from anything."""
    shares = [has for has in map(class_shares, found.classes) if has]
    return tuple(
        LayerShare(layer, sum(has.get(layer, 0.0) for has in shares) / max(len(shares), 1), channels / found.index.size)
        for layer, channels in zip(found.index.layers, found.index.channels, strict=True)
    )


def layers_width(count: int) -> float:
    """Return the width of the figure in its own units, which are about pixels."""
    return max(float(WIDTH), 60.0 + 26.0 * min(count, LABELS))


def layers_chart(title: str, layers: Sequence[LayerShare]) -> str:
    """Draw each layer's share of the weight as a bar, and as a ring what even spreading would give.

    Args:
        title: of the figure.
        layers: in the network's order, from left to right.

    Returns:
        An ``<svg>``, or an empty string when no layer has any weight.
    """
    if not any(layer.share > 0 for layer in layers):
        return ""
    width, left, top, bottom = layers_width(len(layers)), 40.0, 8.0, 190.0
    right = width - 14.0
    high = max(max(layer.share, layer.even) for layer in layers)
    scale = Scale(0.0, high * 1.08, bottom, top)
    parts = []
    for tick in tick_values(0.0, high * 1.08):
        parts.append(line(left, scale(tick), right, scale(tick), "axis" if tick == 0 else "grid"))
        parts.append(lettering(left - 6, scale(tick) + 4, f"{100 * tick:g} %", "end", "soft"))
    step = (right - left) / len(layers)
    every = math.ceil(len(layers) / LABELS)
    for position, layer in enumerate(layers):
        x, wide = left + step * (position + 0.5), min(step * 0.62, 34.0)
        words = f"{layer.layer}: {100 * layer.share:.1f} % of the weight, {100 * layer.even:.1f} % of the filters"
        bar = {"x": x - wide / 2, "y": scale(layer.share), "width": wide, "height": bottom - scale(layer.share)}
        parts.append(tag("rect", tag("title", escape(words)), class_="fill-explainer", **bar))
        ring = {"cx": x, "cy": scale(layer.even), "r": min(4.0, step / 3)}
        parts.append(tag("circle", class_="hollow stroke-null", **ring))
        if position % every == 0:
            name = layer.layer if len(layer.layer) <= 14 else f"…{layer.layer[-13:]}"
            turn = f"rotate(-40 {x:.1f} {bottom + 14:.1f})"
            parts.append(tag("text", escape(name), x=x, y=bottom + 14, text_anchor="end", transform=turn))
    used = sorted((layer for layer in layers if layer.share > 0), key=lambda layer: -layer.share)
    spoken = "; ".join(f"{layer.layer} {100 * layer.share:.1f} %" for layer in used[:8])
    if len(used) > 8:
        spoken += f"; {len(used) - 8} more"
    longest = max(min(len(layer.layer), 14) for layer in layers)
    return svg((width, bottom + 26 + 4.2 * longest), "chart", title, spoken, *parts)
