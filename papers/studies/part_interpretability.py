"""Measure the part interpretability of finished explainers, beside what knows nothing of the photo.

    uv run python benchmarks/part_interpretability.py RESULT.json LABEL=RUN [LABEL=RUN ...]
    uv run python benchmarks/part_interpretability.py --table

Runs are folders of `partlens fit-explainer`, or of the jobs of `partlens reproduce instability`. A result that is there
already goes on. `--table` writes the table in docs/study.md from the committed result.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from partlens.pipeline.runs import versions
from partlens.store import write_json

import partlens

RESULT = Path(__file__).parent / "results" / "part-interpretability.json"
STUDY = Path(__file__).parents[1] / "docs" / "study.md"
BEGIN, END = "<!-- begin: part interpretability -->", "<!-- end: part interpretability -->"
READINGS = {"round": "field in theory", "part_sized": "part-sized disc"}


def measured(run: Path) -> dict[str, Any]:
    """Evaluate a copy of a run: its own evaluation stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "run"
        copy.mkdir()
        for name in ("run.json", "explainer.safetensors"):
            (copy / name).symlink_to(run.resolve() / name)
        found: dict[str, Any] = partlens.evaluate(copy, gallery="none")["part_interpretability"]
    return found


def table() -> list[str]:
    """A row per run: explainer, its regions on other photos, tap, random cells, centre; round and part-sized."""
    heads = ("explainer", "… on other photos", "performer's tap", "random cells", "centre")
    columns = [f"{head}, {words}" for words in READINGS.values() for head in heads]
    lines = ["| run | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for label, found in json.loads(RESULT.read_text())["runs"].items():
        cells = []
        for reading in READINGS:
            one = found[reading]
            scores = (
                one["layers"]["explainer"],
                one["other_photo"]["explainer"],
                one["layers"]["tap"],
                one["random"],
                one["centre"],
            )
            cells += [f"{score['value']:.2f}" for score in scores]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str]) -> None:
    if arguments == ["--table"]:
        before, rest = STUDY.read_text().split(BEGIN)
        STUDY.write_text("\n".join([before + BEGIN, "", *table(), "", END + rest.split(END)[1]]))
        return
    out = Path(arguments[0])
    content = json.loads(out.read_text()) if out.exists() else {"versions": versions(), "runs": {}}
    for pair in arguments[1:]:
        label, _, run = pair.partition("=")
        if label not in content["runs"]:
            content["runs"][label] = measured(Path(run))
            write_json(out, content)
        print(f"{label} done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
