"""How templates are filled: every text is escaped, an unknown name is an error."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from partlens.estimate import Estimate
from partlens.page import notation


def count_of(measure: Estimate) -> str:
    """Say how many units a number was measured on."""
    return f"n = {measure.n:,} {measure.unit}"


def pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a mapping of a manifest as (key, written value)."""
    return [(str(key), notation.plain(value)) for key, value in values.items()]


@cache
def environment() -> Environment:
    """Return the templates of this package with the filters they use."""
    made = Environment(
        loader=PackageLoader("partlens.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        number=notation.number,
        plain=notation.plain,
        counted=notation.counted,
        rate=notation.rate,
        percent=notation.percent,
        percent_digits=notation.percent_digits,
        short_name=notation.short_name,
        count_of=count_of,
    )
    return made
