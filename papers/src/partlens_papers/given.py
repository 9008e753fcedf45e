"""Settings as they come from Python, from the command line or from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from partlens.records import Settings

S = TypeVar("S", bound=Settings)


def settings_of(kind: type[S], given: S | Mapping[str, Any] | None, **more: Any) -> S:
    """Return settings of a kind: as they are, or from fields by name; lists replace tuples.

    Args:
        kind: the class.
        given: settings, some of their fields, or ``None`` for the defaults.
        more: fields that the given ones come before.

    Raises:
        InputError: an unknown field, or a value of another kind or out of range.
    """
    if isinstance(given, kind):
        return given
    fields = {**more, **dict(given or {})}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
