"""Parts of an explainer of several categories: each filter is measured on the photos of its own category only.

As an evaluation does (ICLR 2020 submission, Sec. 4): a filter belongs to the category whose training photos excite it
most, and where its part stands on photos of another means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partlens.verbs.parts_file import OTHER_ID
from partlens.verbs.parts_rules import AssignedParts, SeenPhotos, chosen_rule, record_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from partlens.network.zoo import Performer
    from partlens.object_parts.assignment import PartsConfig

_FEWEST_PHOTOS = 2
_APART = 1000
"""Labels of different categories never meet."""

Rule = Callable[["SeenPhotos", "Performer", "PartsConfig", "torch.Generator"], "AssignedParts"]


@dataclass(frozen=True)
class SharedFilters:
    """Which photo and which filter is of which category.

    Attributes:
        names: of the categories.
        labels: of each photo seen, an index into ``names``.
        assigned: of each filter, likewise.
    """

    names: tuple[str, ...]
    labels: Tensor
    assigned: Tensor

    def photos(self, category: int) -> Tensor:
        """Return the positions of a category's photos."""
        return (self.labels == category).nonzero()[:, 0]

    def filters(self, category: int) -> Tensor:
        """Return a category's filters."""
        return (self.assigned == category).nonzero()[:, 0]

    def of(self, seen: SeenPhotos, category: int) -> SeenPhotos:
        """Return what was seen of a category's filters on its photos."""
        rows = self.photos(category)
        return SeenPhotos(
            maps=seen.maps[rows],
            peaks=seen.peaks.rows(rows).filters(self.filters(category)),
            outputs=seen.outputs[rows],
            landmarks=seen.landmarks[rows],
            names=seen.names,
            photos=seen.photos[rows],
        )


def rule_of_all(rule: str, seen: SeenPhotos, shared: SharedFilters) -> str:
    """Return one rule for all categories: with ``auto`` landmarks where every category shows one often enough."""
    found = {chosen_rule(rule, shared.of(seen, c)) for c in range(len(shared.names)) if len(shared.filters(c))}
    return found.pop() if len(found) == 1 else "clusters"


def by_category(
    rule: Rule,
    shared: SharedFilters,
    seen: SeenPhotos,
    performer: Performer,
    how: PartsConfig,
    generator: torch.Generator,
) -> AssignedParts:
    """Find the parts of each category's filters on its photos, by one rule.

    Parts are called ``CATEGORY: PART``. Filters of a category without two photos are its "other".
    """
    import torch

    from partlens.metrics.localisation import dead_filters

    found: dict[int, AssignedParts] = {}
    parts: list[dict[str, Any]] = []
    records: dict[int, dict[str, Any]] = {}
    for category, name in enumerate(shared.names):
        own = shared.filters(category).tolist()
        if not own:
            continue
        here = shared.of(seen, category)
        if len(here.photos) < _FEWEST_PHOTOS:
            part = record_of(here, performer, f"{name}: {OTHER_ID}", torch.ones(len(own), dtype=torch.bool), {})
            parts.append({**part, "filters": own, "category": name})
            dead = dead_filters(seen.peaks)
            records |= {k: {"filter": k, "part": part["id"], "category": name, "dead": bool(dead[k])} for k in own}
            continue
        found[category] = one = rule(here, performer, how, generator)
        for part in one.parts:
            id_of = f"{name}: {part['id']}"
            parts.append(
                {**part, "id": id_of, "name": id_of, "category": name, "filters": [own[k] for k in part["filters"]]}
            )
        for k, row in zip(own, one.filters, strict=True):
            records[k] = {**row, "filter": k, "part": f"{name}: {row['part']}", "category": name}

    def assign(rows: Tensor) -> Tensor:
        labels = torch.full((len(shared.assigned),), -1, dtype=torch.long)
        for category, one in found.items():
            chosen = rows[shared.labels[rows] == category]
            if len(chosen.unique()) < _FEWEST_PHOTOS:
                continue
            own = torch.searchsorted(shared.photos(category), chosen)
            inside = one.assign(own)
            labels[shared.filters(category)] = torch.where(inside >= 0, inside + _APART * category, inside)
        return labels

    if not found:
        return AssignedParts("none", parts, _in_order(records), {}, {}, assign, matched=True)
    one = next(iter(found.values()))
    names = {category: shared.names[category] for category in found}
    return AssignedParts(
        rule=one.rule,
        parts=parts,
        filters=_in_order(records),
        thresholds={"by_category": {names[c]: each.thresholds for c, each in found.items()}},
        null=_joined_null([each.null for each in found.values()])
        | {"by_category": {names[c]: each.null for c, each in found.items()}},
        assign=assign,
        matched=one.matched,
    )


def _in_order(records: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[k] for k in sorted(records)]


def _joined_null(nulls: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean over categories of what random peaks reach, for the table of all parts."""
    first = nulls[0]
    joined: dict[str, Any] = {"kind": first["kind"], "filters": first["filters"]}
    for name, value in first.items():
        if isinstance(value, float):
            known = [null[name] for null in nulls if math.isfinite(null[name])]
            joined[name] = sum(known) / len(known) if known else math.nan
    return joined
