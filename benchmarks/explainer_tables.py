"""Write the tables of docs/tables.md, and of both defaults in docs/study.md, from the committed results of
`partlens reproduce`.

    uv run python benchmarks/explainer_tables.py

Everything above the marker line is written by hand; results come from the commands beside them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from partlens.experiments.tables_page import TITLES, table_lines

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "tables.md"
MARKER = "<!-- below: made by benchmarks/explainer_tables.py -->"
STUDY = PAGE.parent / "study.md"
STUDY_BEGIN, STUDY_END = "<!-- begin: both defaults -->", "<!-- end: both defaults -->"
RESULTS = HERE / "results" / "tables"
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "alexnet": "AlexNet"}
DEFAULT_COLUMNS = (
    *("network", "category", "instability", "consistency", "correlation", "spread, cells", "centre null"),
    *("instability − null, same photos", "agreement", "error increase, points", "p"),
)


FORMER = "Made when `candidates` was the default; today it takes `--preset candidates`."


def section(path: Path) -> list[str]:
    content = json.loads(path.read_text())
    network = path.stem.split("-", 1)[0]
    former = "-candidates-" in path.stem
    which = ", candidates" if former else ", teachers from the tap" if "-teachers-from-tap-" in path.stem else ""
    title = f"## {network}{which}: {TITLES[content['table']].lower()}"
    lines = [title, "", "```", content["command"], "```", "", *([FORMER, ""] if former else [])]
    return [
        *lines,
        *(line.replace("### ", "**", 1) + "**" if line.startswith("### ") else line for line in table_lines(content)),
        "",
    ]


def evaluations(name: str) -> dict[str, Any]:
    """The first seed's evaluation of every category in a committed table; empty where there is none."""
    path = RESULTS / f"{name}.json"
    jobs = json.loads(path.read_text())["jobs"] if path.exists() else []
    return {j["category"]: j["scores"]["evaluation"] for j in jobs if j["kind"] == "explainer" and j["seed"] == 0}


def both_defaults() -> list[str]:
    """A row per network and category: the former default → the present one (in brackets, read as the former one is)."""
    lines = ["| " + " | ".join(DEFAULT_COLUMNS) + " |", "|---" * len(DEFAULT_COLUMNS) + "|"]

    def pair(before: dict[str, Any] | None, now: float, digits: int, path: tuple[str, str]) -> str:
        was = f"{before[path[0]][path[1]]['value']:.{digits}f} → " if before else ""
        return f"{was}{now:.{digits}f}"

    for network, title in NETWORKS.items():
        for kind in ("instability", "cub-instability"):
            former = evaluations(f"{network}-candidates-{kind}")
            for category, found in evaluations(f"{network}-{kind}").items():
                before = former.get(category)
                alike = found["same_peak"]["largest"]["explainer"]
                cells = [title, category.replace("_", " ")]
                for score, digits in (("instability", 3), ("consistency", 2), ("filter_correlation", 2)):
                    value = found["explainer"][score]["value"]
                    shown = pair(before, value, digits, ("explainer", score))
                    cells.append(f"{shown} ({alike[score]['value']:.{digits}f})")
                spread = found["explainer"]["peak_spread_cells"]["value"]
                cells.append(pair(before, spread, 1, ("explainer", "peak_spread_cells")))
                cells.append(f"{found['nulls']['centre']['instability']['value']:.3f}")
                apart = found["instability_minus_null"]["centre"]
                low, high = apart["interval"]
                cells.append(f"{apart['value']:.3f} [{low:.3f}, {high:.3f}]")
                for score, digits in (("agreement_top1", 2), ("error_increase_points", 1)):
                    cells.append(
                        pair(before, found["reconstruction"][score]["value"], digits, ("reconstruction", score))
                    )
                was = f"{before['p']['value']:.2f} → " if before else ""
                cells.append(f"{was}{found['p']['value']:.2f}")
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    before, rest = STUDY.read_text().split(STUDY_BEGIN)
    after = rest.split(STUDY_END)[1]
    STUDY.write_text("\n".join([before + STUDY_BEGIN, "", *both_defaults(), "", STUDY_END + after]))
    head = PAGE.read_text().split(MARKER)[0].rstrip()
    found = sorted(RESULTS.glob("*.json"))
    body = "\n".join(line for path in found for line in section(path))
    PAGE.write_text(f"{head}\n\n{MARKER}\n\n{body.rstrip()}\n")
    print(f"wrote {PAGE.name} from {len(found)} results")


if __name__ == "__main__":
    main()
