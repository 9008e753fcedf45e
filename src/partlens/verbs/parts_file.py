"""The file ``parts.json``: which filters each part has, and the names a person gives them.

A person may edit the ``name`` of a part (two parts of one name count as one) and move filters between the lists
``filters``; every verb reads the file through :func:`read_parts`, which names what is wrong with an edit. When the
parts are found again, :func:`with_edits` carries names and moved filters over to the new parts that hold the same
filters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partlens.errors import InputError, RunError, expected, listed, nearest
from partlens.records import read_json

PARTS = "parts.json"
SCHEMA_PARTS = "partlens.parts/1"
OTHER_ID = "other"
LEAST_OVERLAP = 0.25
"""Least Jaccard index at which a name goes over to a part that was found again."""


@dataclass(frozen=True)
class NamedPart:
    """What counts as one part: every part of the file that has this name.

    Attributes:
        name: as edited.
        ids: of the file's parts.
        filters: their filters, ascending.
    """

    name: str
    ids: tuple[str, ...]
    filters: tuple[int, ...]


def _refuse(path: Path, rule: str, got: object, remedy: str) -> RunError:
    return RunError(expected(f"{rule} in {path}", got, remedy))


def read_parts(path: Path) -> dict[str, Any]:
    """Read and check ``parts.json``.

    Raises:
        RunError: the file is missing, of another version, or an edit is wrong: a part without id or name, an id twice,
            a filter that does not exist, stands in two parts or in none.
    """
    content = read_json(path, "Correct it there, or take back the last edit")
    again = "Correct the file, or delete it and run partlens parts again"
    if content.get("schema") != SCHEMA_PARTS:
        raise _refuse(path, f'schema "{SCHEMA_PARTS}"', content.get("schema"), "Use the partlens version that wrote it")
    total = content.get("filter_count")
    parts = content.get("parts")
    if not isinstance(total, int) or not isinstance(parts, list) or not parts:
        raise _refuse(path, "a filter_count and a list of parts", "none", again)
    seen: set[str] = set()
    home: dict[int, str] = {}
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("id"), str) or not part["id"].strip():
            raise _refuse(path, "an id for every part", part.get("id") if isinstance(part, dict) else part, again)
        name = part["id"]
        if name in seen:
            raise _refuse(path, "every id once", f"{name} twice", again)
        seen.add(name)
        if not isinstance(part.get("name"), str) or not part["name"].strip():
            raise _refuse(path, f"a name for part {name}", repr(part.get("name")), "Write a name, or its id")
        if not isinstance(part.get("filters"), list):
            raise _refuse(path, f"a list of filters for part {name}", repr(part.get("filters")), again)
        for number in part["filters"]:
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < total:
                raise _refuse(path, f"filters from 0 to {total - 1} in part {name}", repr(number), "Remove it")
            if number in home:
                raise _refuse(path, "every filter in one part", f"{number} in {home[number]} and {name}", "Keep one")
            home[number] = name
    missing = [str(k) for k in range(total) if k not in home]
    if missing:
        raise _refuse(path, "every filter in a part", f"{listed(missing)} in none", f"Add it, to {OTHER_ID} perhaps")
    return content


def named_parts(content: Mapping[str, Any]) -> tuple[NamedPart, ...]:
    """Return what counts as one part, in the order of the file; parts without a filter are left out.

    Example:
        >>> rows = [{"id": "a", "name": "head", "filters": [1]}, {"id": "b", "name": "head ", "filters": [0]}]
        >>> named_parts({"parts": rows})
        (NamedPart(name='head', ids=('a', 'b'), filters=(0, 1)),)
    """
    found: dict[str, tuple[list[str], list[int]]] = {}
    for part in content["parts"]:
        ids, filters = found.setdefault(part["name"].strip(), ([], []))
        ids.append(part["id"])
        filters += part["filters"]
    return tuple(NamedPart(n, tuple(i), tuple(sorted(f))) for n, (i, f) in found.items() if f)


def grouping(content: Mapping[str, Any]) -> list[list[int]]:
    """Return the filters of what counts as one part: contributions measured on another grouping do not hold."""
    return sorted(list(part.filters) for part in named_parts(content))


def renamed(content: Mapping[str, Any], renames: Sequence[str]) -> dict[str, Any]:
    """Return the file's content with other names.

    Args:
        content: from :func:`read_parts`.
        renames: texts ``OLD=NEW``; OLD is a part's id or its name.

    Raises:
        InputError: a text without ``=``, an unknown part, or an empty name.
    """
    parts = [dict(part) for part in content["parts"]]
    for text in renames:
        old, mark, new = (piece.strip() for piece in text.partition("="))
        if not mark or not old or not new:
            raise InputError(expected("a new name as OLD=NEW", repr(text), 'Write --rename "part 1=head"'))
        hits = [p for p in parts if p["id"] == old] or [p for p in parts if p["name"].strip() == old]
        if not hits:
            known = [name for p in parts for name in (p["id"], p["name"])]
            rule = f"a part among {listed(list(dict.fromkeys(known)), 12)}"
            raise InputError(expected(rule, old, f"Did you mean {nearest(old, known)[0]}?"))
        for part in hits:
            part["name"] = new
    return {**content, "parts": parts}


def _overlap(first: Sequence[int], second: Sequence[int]) -> float:
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else 0.0


def with_edits(
    parts: Sequence[Mapping[str, Any]], earlier: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Carry the edits of an earlier file over to parts that were found again.

    An edited name (one that is not the part's id) goes to the new part that shares most filters with the old one, one
    to one and by the greatest total Jaccard index; a name whose best part shares less than :data:`LEAST_OVERLAP` is not
    dropped but returned as unplaced, and tried again the next time. A filter that was moved by hand (its list is not
    the part it was assigned to) is moved again, to the new part that took over its list's part; where none did, the
    part is unplaced too.

    Args:
        parts: new parts with ``id``, ``name``, ``filters``; "other" last.
        earlier: the earlier file, from :func:`read_parts`.

    Returns:
        The parts with names and moved filters, and the unplaced names as ``{name, filters, best_overlap}``.
    """
    from scipy.optimize import linear_sum_assignment

    result = [dict(part) for part in parts]
    old: list[Mapping[str, Any]] = list(earlier["parts"])
    waiting = [
        {"id": None, "name": row["name"], "filters": row["filters"]} for row in earlier.get("unplaced_names", [])
    ]
    every = [*old, *waiting]
    table = [[_overlap(o["filters"], n["filters"]) for n in result] for o in every]
    # Parts that keep their id stay together wherever the overlap does not speak against it.
    for i, o in enumerate(every):
        for j, n in enumerate(result):
            table[i][j] += 1e-6 * (o["id"] == n["id"])
    rows, cols = linear_sum_assignment(table, maximize=True)
    match = {int(i): int(j) for i, j in zip(rows, cols, strict=True) if table[i][j] >= LEAST_OVERLAP}
    unplaced: list[dict[str, Any]] = []
    assigned = {row["filter"]: row["part"] for row in earlier.get("filters", [])}
    for i, part in enumerate(every):
        edited = part["name"].strip() != part["id"]
        moved = (
            set() if part["id"] is None else {k for k in part["filters"] if assigned.get(k, part["id"]) != part["id"]}
        )
        if i not in match:
            if edited or moved:
                row = {"name": part["name"], "filters": list(part["filters"])}
                unplaced.append(row | {"best_overlap": round(max(table[i], default=0.0), 3)})
            continue
        home = result[match[i]]
        if edited:
            home["name"] = part["name"]
        if moved:
            for other in result:
                other["filters"] = [k for k in other["filters"] if k not in moved]
            home["filters"] = sorted([*home["filters"], *moved])
    return result, unplaced
