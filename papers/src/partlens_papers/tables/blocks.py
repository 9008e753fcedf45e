"""What a table is made of: blocks of rows and columns, expectations; and how its cells are found in the tidy table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from partlens.estimate import Estimate
from partlens.records import Record, Value
from partlens_papers.tables.published import Measure, PublishedRow, published
from partlens_papers.tables.scores import Of, Tidy, combined

NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True)
class Cell(Estimate):
    """A number of a table; ``source`` is the printed table it comes from, empty for ours."""

    source: str = ""


def printed_cell(value: float | None, source: str = "") -> Cell:
    """Return a published figure; it has no interval."""
    return Cell(math.nan if value is None else value, NO_INTERVAL, 0, "published", source)


class Column(Value):
    """A column: its name, whose numbers (``explainer``, ``performer``, ``null``, ``printed``), which way is better."""

    key: str
    label: str
    role: str = ""
    better: str = ""


class Line(Value):
    """A row: its name, the performer it belongs to, whether it is printed strong, its cells by column."""

    label: str
    group: str
    strong: bool
    cells: dict[str, Cell]


class Block(Value):
    """One table; ``charted`` columns are drawn over the rows, without such the columns with a role over each mean."""

    key: str
    title: str
    lead: str
    columns: tuple[Column, ...]
    rows: tuple[Line, ...]
    charted: tuple[str, ...] = ()


class Verdict(Value):
    """An expectation that the papers raise: met, not met, or ``None`` where it cannot be said."""

    met: bool | None
    title: str
    words: str


class TableRecord(Record):
    """A table; the numbers of its jobs are in ``scores.csv`` in the same folder.

    Attributes:
        table: its name.
        status: ``incomplete`` where a job has no result.
        command: that made it; empty from Python.
        versions: of the packages.
        data: the photos: name, path, fingerprint, categories, the papers' name, …
        plan: what was asked for.
        jobs: by key: status, error, seconds, the version that did it, and what it reports besides its scores.
        blocks: the numbers.
        verdicts: how the papers' expectations fared.
        remarks: what a reader must know.
        published: printed rows for comparison.
    """

    FILE: ClassVar[str] = "table.json"
    SCHEMA: ClassVar[str] = "partlens-papers.table/1"
    AGAIN: ClassVar[str] = "Run the command of the table again; finished jobs are kept"

    table: str
    status: Literal["complete", "incomplete"]
    command: str
    versions: dict[str, str]
    data: dict[str, Any]
    plan: dict[str, Any]
    jobs: dict[str, dict[str, Any]]
    blocks: tuple[Block, ...]
    verdicts: tuple[Verdict, ...]
    remarks: tuple[str, ...]
    published: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Study:
    """The tidy table with what it is compared with.

    Attributes:
        table: its name.
        tidy: the scores.
        networks: by performer, its name in the papers; ``None`` where they did not study it.
        categories: in their order; of several together their joint name alone.
        data: the papers' name of the data set.
        setting: the papers': ``single``, ``multi`` or ``multi softmax``.
    """

    table: str
    tidy: Tidy
    networks: Mapping[str, str | None]
    categories: tuple[str, ...]
    data: str
    setting: str = "single"

    def lines(self, measure: Measure, label: str, subject: str, data: str | None = None) -> tuple[PublishedRow, ...]:
        """Return the printed rows of a performer's network in this setting; none where it was not studied."""
        if (network := self.networks.get(label)) is None:
            return ()
        return published(measure, network=network, subject=subject, data=data or self.data, setting=self.setting)

    def printed(self, label: str, category: str | None, measure: Measure, subject: str) -> Cell:
        """Return the papers' figure for the same network and data: of a category, or of the mean over ours."""
        for row in self.lines(measure, label, subject):
            names = self.categories if category is None else (category,)
            mean = row.average if category is None and not row.values else row.mean_over(names)
            if mean is not None:
                return printed_cell(mean, row.source)
        return printed_cell(None)

    def number(self, label: str, of: Of) -> float:
        """Return the mean over categories and seeds."""
        return self.tidy.number(label, None, of).value

    def ratio(self, label: str, category: str | None, above: Of, below: Of) -> Estimate:
        """Return the ratio of two numbers of one category, or of all for ``None``."""
        if category is None:
            return combined(self.tidy.groups(label, above, below), lambda a, b: a / b, seed=self.tidy.seed)
        first, second = (self.tidy.number(label, category, of) for of in (above, below))
        count = len(self.tidy.seeds(label, above).get(category, ()))
        return Estimate(first.value / second.value if second.value else math.nan, NO_INTERVAL, count, "seeds")


Get = Callable[[Study, str, str | None], Estimate]
"""How a cell is found: of the study, a performer, and a category or ``None`` for all."""


class Spec(NamedTuple):
    """A column and how its cells are found."""

    key: str
    label: str
    get: Get
    role: str = ""
    better: str = ""


def here(of: Of) -> Get:
    """Find our own numbers."""
    return lambda study, label, category: study.tidy.number(label, category, of)


def printed(measure: Measure, subject: str) -> Get:
    """Find printed numbers."""
    return lambda study, label, category: study.printed(label, category, measure, subject)


def cell(found: Estimate) -> Cell:
    """Take an estimate into a table."""
    return found if isinstance(found, Cell) else Cell(**vars(found))


def wide(study: Study, key: str, texts: tuple[str, str], kind: str, specs: Sequence[Spec], name: str = "") -> Block:
    """Return a block with a row for each performer's mean and, of several categories, one for each."""
    rows = []
    for label in study.tidy.performers(kind):
        group = f"{label}{name}"
        for category in (None, *(study.categories if len(study.categories) > 1 else ())):
            cells = {spec.key: cell(spec.get(study, label, category)) for spec in specs}
            title = group if category is None else category.replace("_", " ")
            rows.append(Line(label=title, group=group, strong=category is None, cells=cells))
    columns = tuple(Column(key=s.key, label=s.label, role=s.role, better=s.better) for s in specs)
    return Block(key=key, title=texts[0], lead=texts[1], columns=columns, rows=tuple(rows))


Subjects = Sequence[tuple[str, str, str]]
"""Kind of job, subject and name of each row of a block."""


def long(
    study: Study, key: str, texts: tuple[str, str], subjects: Subjects, scores: Mapping[str, tuple[str, str]]
) -> Block:
    """Return a block with a row per performer and subject and a column per score; the first subject is strong."""
    rows = []
    for label in study.tidy.performers(*(kind for kind, _, _ in subjects)):
        for number, (kind, subject, name) in enumerate(subjects):
            cells = {score: cell(study.tidy.number(label, None, Of(kind, subject, score))) for score in scores}
            if any(found.defined for found in cells.values()):
                rows.append(Line(label=name, group=label, strong=number == 0, cells=cells))
    columns = tuple(Column(key=score, label=name, better=better) for score, (name, better) in scores.items())
    return Block(key=key, title=texts[0], lead=texts[1], columns=columns, rows=tuple(rows))


def expect(title: str, label: str, value: float, high: float, what: str, low: float = -math.inf) -> list[Verdict]:
    """Say whether a number is between two bounds; nothing where it was not measured.

    Example:
        >>> expect("Instability", "resnet18", 0.1234, 0.1, "printed")[0].words
        'resnet18: 0.123; expected at most 0.100 (printed).'
    """
    if math.isnan(value) or math.isnan(high):
        return []
    bounds = [f"at least {low:.3f}"] if math.isfinite(low) else []
    bounds += [f"at most {high:.3f}"] if math.isfinite(high) else []
    words = f"{label}: {value:.3f}; expected {' and '.join(bounds)} ({what})."
    return [Verdict(met=low <= value <= high, title=title, words=words)]
