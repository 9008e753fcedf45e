"""Elements of the page's SVG figures: escaped tags, texts and lines, and a linear scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


def coordinate(value: float) -> str:
    """Write a number with at most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in {"-0", ""} else text


def tag(name: str, *children: str, **attributes: float | str) -> str:
    """Return an element; attributes are escaped, ``children`` already are elements or escaped text."""
    parts = [name]
    for key, value in attributes.items():
        shown = value if isinstance(value, str) else coordinate(value)
        parts.append(f'{key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    head = " ".join(parts)
    return f"<{head}>{''.join(children)}</{name}>" if children else f"<{head}/>"


def lettering(x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> str:
    """Return a text element; the text is escaped."""
    kind = {"class_": class_} if class_ else {}
    return tag("text", escape(text), x=x, y=y, text_anchor=anchor, **kind)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """Return a line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Iterable[tuple[float, float]], class_: str) -> str:
    """Return a line through points."""
    return tag("polyline", points=" ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points), class_=class_)


def svg(size: tuple[float, float], class_: str, title: str, description: str, *children: str) -> str:
    """Return a whole figure with a title and a description for people who cannot see it."""
    return tag(
        "svg",
        tag("title", escape(title)),
        *([tag("desc", escape(description))] if description else []),
        *children,
        viewBox=f"0 0 {coordinate(size[0])} {coordinate(size[1])}",
        class_=class_,
        role="img",
        aria_label=f"{title}. {description}" if description else title,
    )


def shortened(text: str, limit: int) -> str:
    """Cut a text to ``limit`` signs, the last of them an ellipsis."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@dataclass(frozen=True)
class Scale:
    """A linear map from values to a side of the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return a value's place."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def limits(values: Sequence[float], *, zero: bool = False) -> tuple[float, float]:
    """Return limits around finite values, never empty; with ``zero`` they include 0 and leave no margin next to it."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room), (high if zero and high == 0 else high + room)
