"""How numbers, counts, times and names are written on the page. Texts here are plain; the template escapes them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

UNDEFINED = "–"
GAP = "\N{NO-BREAK SPACE}"

SPLITS: Mapping[str, str] = dict.fromkeys(("train", "training"), "training") | dict.fromkeys(
    ("test", "val", "validation", "held-out", "heldout"), "held-out"
)
"""What the photos of a split are; of any other split nothing is claimed."""

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: float) -> str:
    """Write a number with three significant digits; undefined is an en dash.

    Example:
        >>> [number(v) for v in (0.0771, 0.3, 63.0, 2.1e6, -0.01, float("nan"))]
        ['0.0771', '0.300', '63.0', '2.10 × 10⁶', '−0.0100', '–']
    """
    if not math.isfinite(value):
        return UNDEFINED
    if value != 0 and not 1e-4 <= abs(value) < 9.995e4:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}".replace("-", "−", 1)
    text = f"{value:#.3g}"
    if "e" in text:
        text = f"{float(text):.0f}"
    return text.rstrip(".").replace("-", "−")


def percent(share: float) -> str:
    r"""Write a share as a percentage for a sentence: whole, or with one decimal near 0 and 1.

    Example:
        >>> percent(0.421), percent(0.004), percent(-0.004), percent(0.996)
        ('42\xa0%', '0.4\xa0%', '0\xa0%', '99.6\xa0%')
    """
    return UNDEFINED if not math.isfinite(share) else f"{percent_digits(share)}{GAP}%"


def percent_digits(share: float) -> str:
    """Write a share as the digits of a percentage: whole, or with one decimal near 0 and 1."""
    value = 100 * share
    text = f"{value:.1f}" if 0 < value < 1 or 99 < value < 100 else f"{value:z.0f}"
    return text.replace("-", "−")


def rate(share: float) -> str:
    r"""Write a share of photos as a percentage with one decimal where it has one.

    Example:
        >>> rate(0.9613), rate(0.08), rate(0.0001), rate(1e-7)
        ('96.1\xa0%', '8\xa0%', '0.01\xa0%', '<\xa00.01\xa0%')
    """
    if not math.isfinite(share):
        return UNDEFINED
    value = 100 * share
    if 0 < value < 0.01:
        return f"<{GAP}0.01{GAP}%"
    text = f"{value:.1g}" if 0 < value < 0.05 else f"{value:.1f}".removesuffix(".0")
    text = "0" if text == "-0" else text
    return f"{text.replace('-', '−')}{GAP}%"


def counted(count: int, noun: str) -> str:
    """Write a count with its noun, ``noun`` given in the plural.

    Example:
        >>> counted(1, "photos"), counted(1500, "photos")
        ('1 photo', '1,500 photos')
    """
    return f"{count:,} {noun.removesuffix('s') if count == 1 else noun}"


def short_name(performer: str) -> str:
    """Shorten a performer's name for a sentence.

    Example:
        >>> short_name("torchvision:resnet18@weights/resnet18.safetensors"), short_name("my.nets:build")
        ('resnet18', 'build')
    """
    return performer.partition("@")[0].rpartition(":")[2] or performer


def plain(value: Any) -> str:
    """Write a value of a manifest: lists joined, floats in full, nothing for ``None``.

    Example:
        >>> plain([14, 14]), plain(0.0001), plain(None), plain({"mean": [0.5]})
        ('14, 14', '0.0001', '–', 'mean: 0.5')
    """
    if value is None:
        return UNDEFINED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def moment(created: str) -> str:
    """Write an ISO 8601 time to the minute; anything else as it is.

    Example:
        >>> moment("2026-11-20T12:00:00+00:00"), moment("yesterday")
        ('2026-11-20 12:00 UTC', 'yesterday')
    """
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d)(?::\d\d(?:\.\d+)?)?(Z|[+-]\d\d:\d\d)?", created)
    if not found:
        return created
    day, clock, zone = found.groups()
    suffix = {"Z": " UTC", "+00:00": " UTC", None: ""}.get(zone, f" {zone}")
    return f"{day} {clock}{suffix}"
