"""A table for people: its record as one HTML file that loads nothing, and as Markdown lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from partlens.page import figures, notation
from partlens.records import write_text
from partlens_papers.tables.blocks import Block, Cell, Line, TableRecord

TITLES = {
    "instability": "Location instability and the printed tables",
    "p": "The share of part filters and the printed tables",
    "errors": "What feeding parts back costs",
    "interpretable-cnn": "Interpretable CNNs and the printed tables",
    "rivals": "Other ways to take a layer apart",
}
MARKS = {True: "met", False: "not met", None: "open"}


def shown(cell: Cell | None) -> str:
    """Write a number with its interval; a dash where it is undefined."""
    if cell is None or not cell.defined:
        return notation.UNDEFINED
    ends = f" [{notation.number(cell.interval[0])}, {notation.number(cell.interval[1])}]" if cell.has_interval else ""
    return notation.number(cell.value) + ends


def shown_columns(block: Block) -> list[tuple[str, str]]:
    """Return key and label of the columns, printed ones only where a row has a number."""
    return [
        (column.key, column.label)
        for column in block.columns
        if column.role != "printed"
        or any(row.cells[column.key].defined for row in block.rows if column.key in row.cells)
    ]


def table_lines(record: TableRecord) -> list[str]:
    """Return a table as Markdown lines: the blocks, the expectations, and what is missing."""
    lines: list[str] = []
    for block in record.blocks:
        columns = shown_columns(block)
        several = len({row.group for row in block.rows}) > 1
        lines += [f"### {block.title}", "", f"| | {' | '.join(label for _, label in columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in block.rows:
            label = f"{row.group}: {row.label}" if several and row.label != row.group else row.label
            lines.append(f"| {label} | {' | '.join(shown(row.cells.get(key)) for key, _ in columns)} |")
        lines.append("")
    lines += [f"- {MARKS[one.met]}: {one.title}. {one.words}" for one in record.verdicts]
    lines += [f"- missing: {key}: {error}" for key, error in missing(record).items()]
    return lines


def missing(record: TableRecord) -> dict[str, str]:
    """Return the jobs without a result and why."""
    return {key: job["error"] or "not begun" for key, job in record.jobs.items() if job["status"] != "finished"}


def charts(block: Block) -> Iterator[str]:
    """Draw a block: its charted columns over the rows of each performer, or without such each mean over its columns."""

    def bar(label: str, role: str, cell: Cell) -> figures.ScoreRow:
        low, high = cell.interval
        return figures.ScoreRow(label, role, cell.value, low, high, notation.number(cell.value))

    def role_of(row: Line) -> str:
        return "explainer" if row.strong else "null" if row.label.startswith("null") else "performer"

    for label, group in groupby(block.rows, key=lambda row: row.group):
        rows = list(group)
        for column in block.columns:
            if column.key in block.charted:
                bars = [bar(row.label, role_of(row), row.cells[column.key]) for row in rows if column.key in row.cells]
                yield figures.scores_chart(f"{label}: {column.label}", column.better, _defined(bars))
        roles = {"printed": "null"}
        for row in rows if not block.charted else ():
            named = [column for column in block.columns if column.role and row.strong]
            bars = [bar(column.label, roles.get(column.role, column.role), row.cells[column.key]) for column in named]
            yield figures.scores_chart(f"{row.label}: {block.title}", "", _defined(bars))


def _defined(bars: list[figures.ScoreRow]) -> list[figures.ScoreRow]:
    return [bar for bar in bars if math.isfinite(bar.value)]


@cache
def _template() -> Environment:
    return Environment(loader=PackageLoader("partlens_papers.tables", "."), autoescape=True, undefined=StrictUndefined)


def table_page(record: TableRecord, path: Path) -> Path:
    """Write the page of a table; the same record gives the same text."""
    judged = [one.met for one in record.verdicts if one.met is not None]
    headline = f"{sum(judged)} of {len(judged)} expectations are met." if judged else "No expectation could be judged."
    text = (
        _template()
        .get_template("page.html.j2")
        .render(
            title=TITLES[record.table],
            headline=headline,
            record=record,
            blocks=[
                (
                    block,
                    shown_columns(block),
                    [svg for svg in charts(block) if svg],
                    [(name, list(rows)) for name, rows in groupby(block.rows, key=lambda row: row.group)],
                )
                for block in record.blocks
            ],
            marks=MARKS,
            missing=missing(record),
            shown=shown,
            details={"Settings": record.plan, "Data": record.data, "Versions": record.versions, "Jobs": record.jobs},
            as_json=lambda content: json.dumps(content, indent=1, ensure_ascii=False, default=list),
            css=figures.FIGURE_CSS,
        )
    )
    write_text(path, text)
    return path
