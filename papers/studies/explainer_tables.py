"""Write the tables of docs/tables.md and docs/tables-earlier.md, and of the defaults in docs/study.md.

They are of the committed results of `partlens reproduce`.

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
EARLIER = PAGE.parent / "tables-earlier.md"
MARKER = "<!-- below: made by benchmarks/explainer_tables.py -->"
STUDY = PAGE.parent / "study.md"
STUDY_BEGIN, STUDY_END = "<!-- begin: the defaults -->", "<!-- end: the defaults -->"
RESULTS = HERE / "results" / "tables"
NETWORKS = {"resnet18": "ResNet-18", "resnet50": "ResNet-50", "alexnet": "AlexNet"}
DEFAULT_COLUMNS = (
    *("network", "category", "instability", "consistency", "correlation", "spread, cells", "centre null"),
    *("instability − null, same photos", "agreement", "error increase, points", "p", "p of least objective"),
)
FORMER = ("candidates", "held", "revision1")
"""What was the default before, the first first: two presets, and the present one as the code before its second revision
had it. Results made with them say so in their names."""
FIRST = "Made before the norm layer was measured again after the warm-up; today's code gives other figures."


def preset_of(path: Path) -> str:
    """Which former default a result was made with; empty for the present one and where nothing changed."""
    return next((name for name in FORMER if f"-{name}-" in path.stem), "")


def section(path: Path) -> list[str]:
    content = json.loads(path.read_text())
    network, preset = path.stem.split("-", 1)[0], preset_of(path)
    shown = "revision 1" if preset == "revision1" else preset
    said = {
        "-cub-": "birds",
        "-joint-": "fox and giant panda together",
        "-from-tap-": "teachers from the tap",
        "-paper-preset-": "--preset paper",
    }
    which = "".join(
        f", {words}" for words in (shown, *(text for part, text in said.items() if part in path.stem)) if words
    )
    takes = f"Made when `{preset}` was the default; today it takes `--preset {preset}`."
    note = FIRST if preset == "revision1" else takes
    title = f"## {NETWORKS[network]}{which}: {TITLES[content['table']].lower()}"
    lines = [title, "", "```", content["command"], "```", "", *([note, ""] if preset else [])]
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


def chained(found: list[dict[str, Any] | None], digits: int, *path: str) -> str:
    """A score of each default, the first first; a dash where it was not run."""
    shown = []
    for evaluation in found:
        value: Any = evaluation
        for name in path:
            value = None if value is None else value[name]
        shown.append("–" if value is None else f"{value['value']:.{digits}f}")
    return " → ".join(shown)


def the_defaults() -> list[str]:
    """A row per network and category: ``candidates`` → ``held`` → revision 1 → the present default."""
    lines = ["| " + " | ".join(DEFAULT_COLUMNS) + " |", "|---" * len(DEFAULT_COLUMNS) + "|"]
    for network, title in NETWORKS.items():
        for kind in ("instability", "cub-instability"):
            runs = [evaluations(f"{network}-{name}") for name in (*(f"{p}-{kind}" for p in FORMER), kind)]
            for category in dict.fromkeys(name for run in reversed(runs) for name in run):
                found = [run.get(category) for run in runs]
                last = [evaluation for evaluation in found if evaluation][-1]
                apart = last["instability_minus_null"]["centre"]
                low, high = apart["interval"]
                cells = [
                    title,
                    category.replace("_", " "),
                    chained(found, 3, "explainer", "instability"),
                    chained(found, 2, "explainer", "consistency"),
                    chained(found, 2, "explainer", "filter_correlation"),
                    chained(found, 1, "explainer", "peak_spread_cells"),
                    f"{last['nulls']['centre']['instability']['value']:.3f}",
                    f"{apart['value']:.3f} [{low:.3f}, {high:.3f}]",
                    chained(found, 2, "reconstruction", "agreement_top1"),
                    chained(found, 1, "reconstruction", "error_increase_points"),
                    chained(found, 2, "p"),
                    chained(found, 2, "p_optimum"),
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    before, rest = STUDY.read_text().split(STUDY_BEGIN)
    after = rest.split(STUDY_END)[1]
    STUDY.write_text("\n".join([before + STUDY_BEGIN, "", *the_defaults(), "", STUDY_END + after]))
    results = sorted(RESULTS.glob("*.json"))
    for page, found in (
        (PAGE, [path for path in results if not preset_of(path)]),
        (EARLIER, [path for path in results if preset_of(path)]),
    ):
        head = page.read_text().split(MARKER)[0].rstrip()
        body = "\n".join(line for path in found for line in section(path))
        page.write_text(f"{head}\n\n{MARKER}\n\n{body.rstrip()}\n")
        print(f"wrote {page.name} from {len(found)} results")


if __name__ == "__main__":
    main()
