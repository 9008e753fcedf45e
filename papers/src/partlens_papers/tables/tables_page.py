"""The page of a table of the papers: its JSON file becomes one self-contained HTML file; and its Markdown lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partlens.page import figures, notation
from partlens.page.environment import count_of, environment, pairs
from partlens.page.reading import Measure, measure
from partlens.page.views import Figure
from partlens.page.wording import State, Verdict
from partlens.records import read_json, write_text

TITLES = {
    "instability": "Location instability beside the printed tables",
    "p": "The share of part filters beside the printed tables",
    "errors": "What feeding parts back costs",
    "interpretable-cnn": "Interpretable CNNs beside the printed tables",
    "rivals": "Other ways to take a layer apart",
}
TABLE_CSS = """
.many tbody th { width: auto; min-width: 118px; }
.many th, .many td { padding-right: 12px; overflow-wrap: normal; }
.many thead th { min-width: 72px; }
.many .interval { font-size: 12px; }
.many thead th .words { margin-top: 0; }
.many tr.mean td .value, .many tr.mean th { font-weight: 700; }
.many tr:not(.mean) tbody th, .many tr:not(.mean) th { font-weight: 400; }
.many tr.group th { padding-top: 22px; font-weight: 650; color: var(--soft); font-size: 12.5px; }
.many td.printed, .many thead th.printed { padding-left: 10px; }
.many td.printed, .many thead th.printed { background: color-mix(in srgb, var(--shade) 55%, transparent); }
.many td.printed .n { white-space: normal; }
.many td.explainer .value { font-weight: inherit; }
.log td:last-child { white-space: normal; }
@media (max-width: 680px) {
  .many tr.group th { padding-top: 14px; }
  .many td.printed { background: none; padding-left: 0; }
}
"""
_STATES: dict[bool | None, State] = {True: "good", False: "warning", None: "unknown"}


@dataclass(frozen=True)
class Column:
    """A column as the template shows it."""

    label: str
    role: str
    better: str


@dataclass(frozen=True)
class Row:
    """A row; ``heading`` stands above it where a group begins, ``common_n`` where all its numbers have one count."""

    label: str
    heading: str
    common_n: str
    strong: bool
    cells: tuple[tuple[Column, Measure, str], ...]


@dataclass(frozen=True)
class Block:
    """One table of the page."""

    anchor: str
    title: str
    lead: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


def _better(text: str) -> str:
    return f"{text} is better" if text in {"lower", "higher"} else text


def _block(content: Mapping[str, Any]) -> Block:
    columns = {
        c["key"]: Column(c["label"], c["role"], _better(c["better"]))
        for c in content["columns"]
        if c["role"] != "printed" or any(measure(row["cells"].get(c["key"])).defined for row in content["rows"])
    }
    rows, before = [], ""
    groups = {row["group"] for row in content["rows"]}
    for row in content["rows"]:
        heading = row["group"] if len(groups) > 1 and row["group"] != before and row["label"] != row["group"] else ""
        before = row["group"]
        cells = tuple(
            (column, measure(row["cells"].get(key)), str((row["cells"].get(key) or {}).get("source", "")))
            for key, column in columns.items()
        )
        counts = {count_of(found) for _, found, _ in cells if found.defined and found.n}
        rows.append(Row(row["label"], heading, counts.pop() if len(counts) == 1 else "", bool(row["strong"]), cells))
    return Block(content["key"], content["title"], content["lead"], tuple(columns.values()), tuple(rows))


def _charts(content: Mapping[str, Any]) -> list[list[Figure]]:
    """Draw the charts, those of one performer together."""
    drawn: dict[str, list[Figure]] = {}
    for chart in content["charts"]:
        rows = []
        for one in chart["rows"]:
            found = measure(one["cell"])
            text = notation.number(found.value)
            rows.append(figures.ScoreRow(one["label"], one["role"], found.value, found.low, found.high, text))
        svg = figures.scores_chart(chart["title"], chart["direction"], rows)
        if svg:
            group = str(chart["title"]).partition(":")[0]
            drawn.setdefault(group, []).append(Figure(f"{chart['title']}, {chart['direction']}", svg))
    return list(drawn.values())


def _headline(content: Mapping[str, Any]) -> str:
    """Say in a sentence or two how the expectations fared."""
    met = [one["met"] for one in content["verdicts"]]
    good, bad, open_ = met.count(True), met.count(False), met.count(None)
    if not met:
        return "No job has finished; nothing can be compared yet." if not content["blocks"] else "Measured as below."
    words = f"{good} of {good + bad} expectations are met" if good + bad else "No expectation could be judged"
    if open_ and good + bad:
        words += f", {notation.counted(open_, 'others')} cannot be judged"
    worse = sum("worse" in one["words"].lower() for one in content["verdicts"])
    return f"{words}." + (f" In {notation.counted(worse, 'comparisons')} the figures here are worse." if worse else "")


def _facts(content: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    data, plan, jobs = content["data"], content["plan"], content["jobs"]
    seconds = sum(float(job["seconds"]) for job in jobs)
    return (
        ("Performers", ", ".join(plan["performers"])),
        ("Categories", ", ".join(name.replace("_", " ") for name in data["categories"])),
        ("Data", f"{data['name']} ({data['photos']:,} photos)"),
        ("Seeds", str(plan["seeds"])),
        ("Preset", plan["preset"]),
        ("Work", f"{notation.counted(len(jobs), 'jobs')}, {notation.duration(seconds)}"),
    )


def _published(content: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            line["source"],
            line["data"],
            line["setting"],
            line["network"],
            line["subject"],
            f"{line['average']:g}",
            ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in line["values"].items()),
        )
        for line in content["published"]
    ]


def _job_details(jobs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(job["key"], f"{job['status']}, {notation.duration(job['seconds'])}, {job['identity']}") for job in jobs]


def table_page(content: Mapping[str, Any]) -> str:
    """Draw the page of a table.

    Args:
        content: of its JSON file (:func:`~partlens_papers.tables.explainer_tables.explainer_table`).

    Returns:
        A whole HTML document without scripts or references to other files; the same content gives the same text.
    """
    plan, data = content["plan"], content["data"]
    settings = {key: value for key, value in plan.items() if key not in {"performers", "categories", "data", "table"}}
    missing = [(job["key"], job["error"] or "not begun") for job in content["jobs"] if job["status"] != "finished"]
    verdicts = [
        Verdict(f"expectation-{number}", _STATES[one["met"]], one["title"], one["words"])
        for number, one in enumerate(content["verdicts"])
    ]
    return (
        environment()
        .get_template("tables.html.j2")
        .render(
            title=TITLES[content["table"]],
            headline=_headline(content),
            facts=_facts(content),
            verdicts=verdicts,
            blocks=[_block(block) for block in content["blocks"]],
            charts=_charts(content),
            missing=missing,
            job_count=len(content["jobs"]),
            published=_published(content),
            command=content["command"],
            hashes=(("data fingerprint", data["fingerprint"]), *sorted(_weights(content["jobs"]).items())),
            details=(
                ("Versions", pairs(content["versions"])),
                ("Performers", pairs(plan["performers"])),
                ("Settings", pairs(settings)),
                ("Jobs", _job_details(content["jobs"])),
            ),
            remarks=content["remarks"],
            made_by=content["versions"].get("partlens", ""),
            figure_css=figures.FIGURE_CSS + TABLE_CSS,
        )
    )


def _weights(jobs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the hash of the weights of each performer, by category where it was trained on each."""
    found: dict[str, dict[str, str]] = {}
    for job in jobs:
        if "weights_sha256" in job["scores"]:
            found.setdefault(job["performer"], {})[job["category"]] = job["scores"]["weights_sha256"]
    named = {}
    for label, by_category in found.items():
        if len(set(by_category.values())) == 1:
            named[f"{label} (weights, SHA-256)"] = next(iter(by_category.values()))
        else:
            named |= {f"{label}, {category} (weights, SHA-256)": sha for category, sha in by_category.items()}
    return named


def write_table_page(path: Path) -> Path:
    """Write the page of a table beside its JSON file and return its path."""
    page = path.with_suffix(".html")
    write_text(page, table_page(read_json(path)))
    return page


def table_lines(content: Mapping[str, Any]) -> list[str]:
    """Return a table as Markdown lines: the blocks, the expectations, and what is missing."""
    lines: list[str] = []
    for block in map(_block, content["blocks"]):
        lines += [f"### {block.title}", "", f"| | {' | '.join(column.label for column in block.columns)} |"]
        lines.append("|---" * (len(block.columns) + 1) + "|")
        for row in block.rows:
            label = f"{row.heading}: {row.label}" if row.heading else row.label
            lines.append(f"| {label} | {' | '.join(_shown(found) for _, found, _ in row.cells)} |")
        lines.append("")
    marks = {True: "met", False: "NOT met", None: "open"}
    lines += [f"- {marks[one['met']]}: {one['title']}. {one['words']}" for one in content["verdicts"]]
    lines += [f"- missing: {j['key']}: {j['error']}" for j in content["jobs"] if j["status"] != "finished"]
    return lines


def _shown(found: Measure) -> str:
    if not found.defined:
        return notation.UNDEFINED
    ends = f" [{notation.number(found.low)}, {notation.number(found.high)}]" if found.has_interval else ""
    return notation.number(found.value) + ends
