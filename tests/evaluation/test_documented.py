"""``docs/evaluation.md`` is written from the records and the registry of scores. After a change that is meant::

python tests/evaluation/test_documented.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from docstring_parser import parse

from partlens.evaluation.results import Evaluation, Gallery
from partlens.metrics.scores import LOCALISATION, SCORES
from partlens.records import Value

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
HEAD = """# What an evaluation measures

`partlens evaluate RUN` writes two files into the run directory. `partlens.evaluate` returns the first as an object; its
attributes have the names below. An estimate is `{"value", "interval": [low, high], "n", "unit"}`; `null` where it is
undefined. Intervals are 95 %: a percentile bootstrap over photos for scores of peaks and errors, Wilson's for shares of
photos, Student's t over seeds for `p`. `n` counts photos, filters or seeds; crops of one photo count once.

Instability is never read alone: a peak that never leaves the image centre has a low one. The `nulls` say what filters
have that see nothing, and the other scores say what such filters cannot have.
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
    for module in ("partlens.evaluation.results.", "partlens.estimate.", "partlens.run.", "typing."):
        text = text.replace(module, "")
    text = re.sub(r"Optional\[(.*)\]", r"\1 or None", text)
    return text.replace("Annotated[float, BeforeValidator", "Number[").partition("[[")[0].replace("|", "or")


def described(record: type[Value]) -> dict[str, str]:
    """Return what the docstrings of a record and its bases say of each field."""
    found: dict[str, str] = {}
    for kind in reversed(record.__mro__):
        said = parse(kind.__doc__ or "")
        found |= {p.arg_name: " ".join((p.description or "").split()) for p in said.params if p.args[0] == "attribute"}
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


def page() -> str:
    lines = [HEAD, "## Scores", "", "| score | name | better | meaning |", "|---|---|---|---|"]
    for name, score in SCORES.items():
        unit = f" ({score.unit})" if score.unit and score.unit not in score.direction else ""
        lines.append(f"| `{name}` | {score.title}{unit} | {score.direction or '–'} | {score.words} |")
    lines.append("")
    for root, file in ((Evaluation, "evaluation.json"), (Gallery, "gallery/gallery.json")):
        lines += [f"# `{file}`", "", f"Schema `{root.SCHEMA}`.", ""]
        for record in records(root):
            lines += table(record)
    return "\n".join(lines).rstrip() + "\n"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/evaluation/test_documented.py"


def test_every_field_and_every_score_is_described() -> None:
    text = page()
    for record in (*records(Evaluation), *records(Gallery)):
        assert all(text.count(f"| `{name}` |") for name in record.model_fields), record
        assert set(record.model_fields) <= {*described(record), *LOCALISATION}, record


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
