"""The file ``parts.json``: which filters each part has, what the parts add, and the names that a person gives them.

A person may edit the ``name`` of a part (parts of one name count as one) and move filters between the lists
``filters``. Reading the file names what is wrong with an edit. When the parts are found again, :func:`with_edits` gives
names and moved filters to the new parts that hold the same filters.

This module imports no tensor library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator

from partlens.errors import InputError, RunError, expected, listed, nearest
from partlens.estimate import Estimate, Number
from partlens.records import Record, Settings, Value

OTHER_ID = "other"
"""The part of filters that fit none."""

_LEAST_OVERLAP = 0.25  # Jaccard index from which a name goes to a part that was found again

Rule = Literal["landmarks", "clusters"]


class PartsConfig(Settings):
    """How filters get their parts.

    Attributes:
        rule: ``landmarks``, ``clusters``, or ``auto``: landmarks where 20 photos of each category show one.
        distance_max_frac: with landmarks, the largest mean distance to the nearest one, as a share of the input's
            diagonal; beyond it a filter is "other". ``null_distance_mean_frac`` in the file says what random
            peaks reach.
        consistency_min: with landmarks, the least cross-validated R² with which the peak predicts the nearest
            landmark; by default the value that 95 % of random peaks do not reach on the same photos.
        clusters_min: fewest groups tried.
        clusters_max: most groups tried; the number with the highest silhouette is taken.
        null_filters: filters with random peaks that are drawn for comparison.
        rounds: halvings of the photos that measure how stable the parts are.
        photos_max: most photos used; drawn by seed where there are more.
        seed: seed of every random draw.
    """

    rule: Literal["auto", "landmarks", "clusters"] = "auto"
    distance_max_frac: float = Field(default=0.2, ge=0, le=1)
    consistency_min: float | None = Field(default=None, ge=-1, le=1)
    clusters_min: int = Field(default=3, ge=2)
    clusters_max: int = Field(default=8, validate_default=True)
    null_filters: int = Field(default=1000, ge=20)
    rounds: int = Field(default=50, ge=2)
    photos_max: int = Field(default=300, ge=2)
    seed: int = 0

    @field_validator("clusters_max")
    @classmethod
    def _not_below_the_fewest(cls, most: int, info: Any) -> int:
        if most < info.data.get("clusters_min", most):
            raise ValueError(f"at least clusters_min, {info.data['clusters_min']}")
        return most


class FoundPart(Value):
    """One part of the file.

    Attributes:
        id: as it was found.
        name: as a person calls it; the id at first.
        category: whose filters it has; empty where all photos count as one.
        filters: their numbers.
        strip: picture of what the most active of them peak at; ``None`` for a part without filters.
        shown: the filters in the picture.
    """

    id: str
    name: str
    category: str = ""
    filters: tuple[int, ...]
    strip: str | None = None
    shown: tuple[int, ...] = ()


class FilterPart(Value):
    """Why a filter has its part; what the rule does not use is undefined.

    Attributes:
        filter: its number.
        part: id of the part that the rule gave it.
        dead: whether it activates on no photo.
        nearest: the landmark its peak is nearest to on average.
        distance_frac: mean distance to that landmark, as a share of the input's diagonal.
        consistency: cross-validated R² with which the peak predicts that landmark.
        agreement: mean correlation of its movements with those of its group.
        agreement_min: what 95 % of random peaks do not reach.
    """

    filter: int
    part: str
    dead: bool
    nearest: str = ""
    distance_frac: Number = math.nan
    consistency: Number = math.nan
    agreement: Number = math.nan
    agreement_min: Number = math.nan


class Evidence(Value):
    """What the rule went by on the photos of one category; what it does not use is undefined.

    Attributes:
        category: empty where all photos count as one.
        photos: of the category.
        null_consistency_p95: R² that 95 % of random peaks do not reach.
        null_distance_mean_frac: the same distance, mean over random peaks.
        null_kept_frac: share of filters with random peaks that would get a part.
        clusters: number of groups.
        silhouettes: mean silhouette by number of groups tried.
        null_silhouette: with each filter's photos shuffled.
    """

    category: str
    photos: int
    null_consistency_p95: Number = math.nan
    null_distance_mean_frac: Number = math.nan
    null_kept_frac: Number = math.nan
    clusters: int = 0
    silhouettes: dict[str, Number] = Field(default_factory=dict)
    null_silhouette: Estimate = Estimate.undefined("draws")


class Stability(Value):
    """How far two halves of the photos give the same assignment.

    Attributes:
        adjusted_rand: adjusted Rand index (Hubert & Arabie 1985): 1 for the same groups, about 0 for unrelated ones.
        kept: share of filters that keep their part; groups are matched so that as many as possible do.
        null_adjusted_rand: the index when one half's labels are shuffled.
        null_kept: the share then.
    """

    adjusted_rand: Estimate
    kept: Estimate
    null_adjusted_rand: Estimate
    null_kept: Estimate


class RemovalAgreement(Value):
    """How well contributions predict what is lost when parts are taken away.

    Attributes:
        correlation: Pearson correlation of predicted and measured loss over photos and parts.
        slope: least squares slope of the measured on the predicted loss; 1 where the size is right too.
        null_correlation: correlation with the parts of each photo shuffled: mean and 95 % range.
    """

    correlation: Estimate
    slope: Estimate
    null_correlation: Estimate


class PartContribution(Value):
    """What one part adds to the score, mean over photos; a share is undefined where the whole is not positive.

    Attributes:
        name: of the part when it was measured.
        filters: of what counted as this part.
        shapley: Shapley value.
        share: of what all parts add (Shapley).
        gradient_activation_share: share of the parts' sum by gradient × activation.
        integrated_share: share of the parts' sum by integrated gradients.
        integrated_null: the same of as many random filters: a share counts filters as well as parts.
        removal: how much the score falls when the part is taken away.
        predicted: the Shapley value on each photo.
        measured: the fall on each photo.
    """

    name: str
    filters: tuple[int, ...]
    shapley: Estimate
    share: Estimate
    gradient_activation_share: Estimate
    integrated_share: Estimate
    integrated_null: Estimate
    removal: Estimate
    predicted: tuple[Number, ...]
    measured: tuple[Number, ...]


class Contributions(Value):
    """What the parts add to the performer's own predictions, from the score with both tracks silent (``x_enc = 0``).

    Attributes:
        method: how the Shapley values were made.
        performer_score: of the performer itself.
        fed_back: of the explainer's reconstruction.
        baseline: with both tracks silent.
        interpretable_share: share of the rise that the parts add together.
        ordinary_share: share of the rise that the ordinary track adds.
        standard_error: of the Shapley values, mean; 0 where they are exact.
        parts: in the order of the file.
        removal_check: by measure.
    """

    method: str
    performer_score: Estimate
    fed_back: Estimate
    baseline: Estimate
    interpretable_share: Estimate
    ordinary_share: Estimate
    standard_error: Number
    parts: tuple[PartContribution, ...]
    removal_check: dict[str, RemovalAgreement]


class UnplacedName(Value):
    """A name that a person gave and that fits no part found now; it is tried again the next time.

    Attributes:
        name: as the person gave it.
        filters: the part's, when it was named.
    """

    name: str
    filters: tuple[int, ...]


class NamedPart(NamedTuple):
    """What counts as one part: every part of the file that has this name, with their filters in ascending order."""

    name: str
    ids: tuple[str, ...]
    filters: tuple[int, ...]


class PartsFile(Record):
    """Which part each filter of an explainer has, and what each part adds to the performer's answers.

    Attributes:
        rule: by which the parts were found.
        config: how.
        split: of the photos.
        photos: how many were used.
        categories: those that are explained; an empty name means all photos as one.
        landmarks: photos that show each landmark.
        data: name of the data set.
        evidence: by category.
        stability: of the assignment.
        parts: a person may edit their names, and move filters.
        filters: as the rule assigned them.
        unplaced_names: names that fit no part found now.
        contributions: of the parts; ``None`` where they were not measured.
        command: that made the file.
        versions: of what its figures depend on.
    """

    FILE = "parts.json"
    SCHEMA = "partlens.parts/3"
    AGAIN = "Correct it, or delete it and run partlens parts again"

    rule: Rule
    config: PartsConfig
    split: str
    photos: int
    categories: tuple[str, ...]
    landmarks: dict[str, int]
    data: str
    evidence: tuple[Evidence, ...]
    stability: Stability
    parts: tuple[FoundPart, ...]
    filters: tuple[FilterPart, ...]
    unplaced_names: tuple[UnplacedName, ...] = ()
    contributions: Contributions | None = None
    command: str
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file and check what a person may have edited.

        Raises:
            RunError: it is missing, damaged or of another version, or an edit is wrong: a part without id or name, an
                id twice, a filter that does not exist, is in two parts or in none.
        """
        found = super().read(folder)
        if fault := _wrong_edit(found):
            rule, got, remedy = fault
            raise RunError(expected(f"{rule} in {folder / cls.FILE}", got, remedy or cls.AGAIN))
        return found

    @property
    def named(self) -> tuple[NamedPart, ...]:
        """What counts as one part, in the order of the file; only parts with filters."""
        found: dict[str, tuple[list[str], list[int]]] = {}
        for part in self.parts:
            ids, filters = found.setdefault(part.name.strip(), ([], []))
            ids.append(part.id)
            filters += part.filters
        return tuple(NamedPart(n, tuple(i), tuple(sorted(f))) for n, (i, f) in found.items() if f)

    def measured(self) -> dict[tuple[int, ...], PartContribution] | None:
        """Return what each part adds, by its filters; ``None`` where it was measured on other parts than these."""
        found = {part.filters: part for part in self.contributions.parts} if self.contributions else {}
        return found if set(found) == {part.filters for part in self.named} else None

    def mean_place(self, filters: Sequence[int]) -> tuple[float, float]:
        """Return the mean distance of filters from their nearest landmarks, as a share of the diagonal, and mean R²."""
        of = {row.filter: row for row in self.filters}
        rows = [of[k] for k in filters if k in of]
        if not rows:
            return math.nan, math.nan
        return sum(r.distance_frac for r in rows) / len(rows), sum(r.consistency for r in rows) / len(rows)


def _wrong_edit(file: PartsFile) -> tuple[str, str, str] | None:
    """Return of the first wrong edit what is expected, what was found, and what to do if it is something special."""
    ids: set[str] = set()
    for part in file.parts:
        if not part.id.strip():
            return "an id for every part", repr(part.id), ""
        if part.id in ids:
            return "every id once", f"{part.id} twice", ""
        ids.add(part.id)
        if not part.name.strip():
            return f"a name for part {part.id}", repr(part.name), "Write a name, or its id"
    return _wrong_filter(file)


def _wrong_filter(file: PartsFile) -> tuple[str, str, str] | None:
    total, home = len(file.filters), dict[int, str]()
    for part in file.parts:
        for number in part.filters:
            if not 0 <= number < total:
                return f"filters from 0 to {total - 1} in part {part.id}", repr(number), "Remove it"
            if number in home:
                return "every filter in one part", f"{number} in {home[number]} and {part.id}", "Keep one"
            home[number] = part.id
    missing = [str(k) for k in range(total) if k not in home]
    return ("every filter in a part", f"{listed(missing)} in none", f"Add it, e.g. to {OTHER_ID}") if missing else None


def renamed(file: PartsFile, renames: Sequence[str]) -> PartsFile:
    """Return the file with other names.

    Raises:
        InputError: a text without ``=``, an unknown part, or an empty name.
    """
    parts = list(file.parts)
    for text in renames:
        old, mark, new = (piece.strip() for piece in text.partition("="))
        if not mark or not old or not new:
            raise InputError(expected("a new name as OLD=NEW", repr(text), 'Write --rename "part 1=head"'))
        hits = _called(old, parts)
        parts = [p.changed(name=new) if p.id in hits else p for p in parts]
    return file.changed(parts=tuple(parts))


def _called(name: str, parts: Sequence[FoundPart]) -> set[str]:
    """Return the ids of the parts meant: of an id that part alone, of a name all that have it."""
    hits = {p.id for p in parts if p.id == name} or {p.id for p in parts if p.name.strip() == name}
    if not hits:
        known = [called for p in parts for called in (p.id, p.name)]
        rule = f"a part among {listed(list(dict.fromkeys(known)), 12)}"
        raise InputError(expected(rule, name, f"Did you mean {nearest(name, known)[0]}?"))
    return hits


def _overlap(first: Sequence[int], second: Sequence[int]) -> float:
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else 0.0


class _Edited(NamedTuple):
    """A part of the earlier file, or a name that waits: its id or none, its name, filters, and those moved by hand."""

    id: str | None
    name: str
    filters: tuple[int, ...]
    moved: frozenset[int]


def _edits(earlier: PartsFile) -> list[_Edited]:
    assigned = {row.filter: row.part for row in earlier.filters}
    found = [
        _Edited(p.id, p.name, p.filters, frozenset(k for k in p.filters if assigned.get(k, p.id) != p.id))
        for p in earlier.parts
    ]
    return found + [_Edited(None, row.name, row.filters, frozenset()) for row in earlier.unplaced_names]


def with_edits(
    parts: Sequence[FoundPart], earlier: PartsFile
) -> tuple[tuple[FoundPart, ...], tuple[UnplacedName, ...]]:
    """Apply the edits of an earlier file to parts that were found again.

    An edited name (one that is not the part's id) goes to the new part that shares most filters with the old one, one
    to one and by the greatest total Jaccard index; a name whose best part shares less than a quarter is not dropped but
    returned as unplaced, and tried again the next time. A filter that was moved by hand (its list is not the part it
    was assigned to) is moved again, to the new part that took over its list's part; where none did, the part is
    unplaced too.

    Returns:
        The parts with names and moved filters, and the unplaced names.
    """
    from scipy.optimize import linear_sum_assignment

    result, unplaced = list(parts), []
    edits = _edits(earlier)
    # Parts that keep their id stay together wherever the overlap does not speak against it.
    table = [[_overlap(e.filters, p.filters) + 1e-6 * (e.id == p.id) for p in result] for e in edits]
    match = {int(i): int(j) for i, j in zip(*linear_sum_assignment(table, maximize=True), strict=True)}
    for i, edit in enumerate(edits):
        place = match.get(i)
        if place is not None and table[i][place] >= _LEAST_OVERLAP:
            _place(edit, place, result)
        elif edit.moved or edit.name.strip() != edit.id:
            unplaced.append(UnplacedName(name=edit.name, filters=edit.filters))
    return tuple(result), tuple(unplaced)


def _place(edit: _Edited, place: int, parts: list[FoundPart]) -> None:
    """Give the part at a place the edited name and the filters that were moved to it."""
    if edit.moved:
        parts[:] = [p.changed(filters=tuple(k for k in p.filters if k not in edit.moved)) for p in parts]
        parts[place] = parts[place].changed(filters=tuple(sorted({*parts[place].filters, *edit.moved})))
    if edit.name.strip() != edit.id:
        parts[place] = parts[place].changed(name=edit.name)
