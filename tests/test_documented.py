"""``docs/evaluation.md`` and ``docs/records.md`` are written from the records and the registry of scores.

After a change that is meant: ``python tests/test_documented.py``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from docstring_parser import parse

from partlens.attribution.record import ExplanationRecord
from partlens.evaluation.results import Evaluation, Gallery
from partlens.explainer.record import ExplainerRun, History
from partlens.metrics.scores import LOCALISATION, SCORES
from partlens.object_parts.inspection import InspectRecord
from partlens.object_parts.record import PartsFile
from partlens.records import Record, Value
from partlens.selection.record import SelectionRecord

DOCS = Path(__file__).parents[1] / "docs"
EVALUATION_HEAD = """# What an evaluation measures

`partlens evaluate RUN` writes two files into the run directory. `partlens.evaluate` returns the first as an object; its
attributes have the names below. An estimate is `{"value", "interval": [low, high], "n", "unit"}`; `null` where it is
undefined. Intervals are 95 %: a percentile bootstrap over photos for scores of peaks and errors, Wilson's for shares of
photos, Student's t over seeds for `p`. `n` counts photos, filters or seeds; crops of one photo count once.

Instability is never read alone: a peak that never leaves the image centre has a low one. The `nulls` say what filters
have that see nothing, and the other scores say what such filters cannot have.
"""
RECORDS_HEAD = """# What the other files hold

Every file is one record: written whole or not at all, read with validation, refused with the command that makes it
anew where its schema is another. `evaluation.md` describes the files of an evaluation. An estimate is
`{"value", "interval": [low, high], "n", "unit"}`; undefined numbers are `null`.
"""


def nested(kind: Any) -> list[type[Value]]:
    """Return the records inside a field's kind."""
    if isinstance(kind, type) and issubclass(kind, Value):
        return [kind]
    return [found for part in get_args(kind) for found in nested(part)]


def records(kind: type[Value]) -> list[type[Value]]:
    """Return a record and all that it holds, each once, in the order in which they are met."""
    found = [kind]
    for record in found:
        hints = get_type_hints(record)
        found += [r for name in record.model_fields for r in nested(hints[name]) if r not in found]
    return list(dict.fromkeys(found))


def kind_of(kind: Any) -> str:
    text = str(kind) if get_args(kind) else kind.__name__
    text = re.sub(r"\b(?:partlens|typing|pydantic)\.(?:\w+\.)*", "", text)
    text = re.sub(r"Optional\[(.*)\]", r"\1 or None", text)
    return text.replace("Annotated[float, BeforeValidator", "Number[").partition("[[")[0].replace("|", "or")


def described(record: type[Value]) -> dict[str, str]:
    """Return what the docstrings of a record and its bases say of each field."""
    found: dict[str, str] = {}
    for kind in reversed(record.__mro__):
        said = parse(kind.__doc__ or "")
        found |= {
            p.arg_name: " ".join((p.description or "").split())
            for p in said.params
            if p.args[0] in {"attribute", "param"}
        }
    return found


def table(record: type[Value]) -> list[str]:
    texts, hints = described(record), get_type_hints(record)
    said = parse(record.__doc__ or "")
    lines = [
        f"## {record.__name__}",
        "",
        said.short_description or "",
        "",
        "| field | kind | meaning |",
        "|---|---|---|",
    ]
    for name in record.model_fields:
        text = LOCALISATION[name].words if name in LOCALISATION else texts[name]
        lines.append(f"| `{name}` | {kind_of(hints[name])} | {text.replace('``', '`')} |")
    return [*lines, ""]


def scores() -> list[str]:
    lines = ["## Scores", "", "| score | name | better | meaning |", "|---|---|---|---|"]
    for name, score in SCORES.items():
        unit = f" ({score.unit})" if score.unit and score.unit not in score.direction else ""
        lines.append(f"| `{name}` | {score.title}{unit} | {score.direction or '–'} | {score.words} |")
    return [*lines, ""]


EVALUATED: dict[type[Record], str] = {Evaluation: "evaluation.json", Gallery: "gallery/gallery.json"}
WRITTEN: dict[type[Record], str] = {
    InspectRecord: "inspect.json",
    ExplainerRun: "run.json",
    History: "history.json",
    PartsFile: "parts.json",
    SelectionRecord: "selection.json",
    ExplanationRecord: "explanation.json",
}


def page(head: list[str], roots: dict[type[Record], str]) -> str:
    lines = list(head)
    told: list[type[Value]] = []
    for root, file in roots.items():
        lines += [f"# `{file}`", "", f"Schema `{root.SCHEMA}`.", ""]
        for record in records(root):
            if record not in told:  # a record that several files hold is described in the first of them
                lines += table(record)
                told.append(record)
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    return {
        "evaluation.md": page([EVALUATION_HEAD, *scores()], EVALUATED),
        "records.md": page([RECORDS_HEAD], WRITTEN),
    }


@pytest.mark.parametrize("name", ["evaluation.md", "records.md"])
def test_the_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name], "run python tests/test_documented.py"


@pytest.mark.parametrize("root", [*EVALUATED, *WRITTEN])
def test_every_field_is_described(root: type[Record]) -> None:
    for record in records(root):
        assert set(record.model_fields) <= {*described(record), *LOCALISATION}, record


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")
