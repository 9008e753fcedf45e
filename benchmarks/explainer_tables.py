"""Write the tables of docs/tables.md from the committed results of `partlens reproduce`.

    uv run python benchmarks/explainer_tables.py

Everything above the marker line is written by hand; results come from the commands beside them.
"""

from __future__ import annotations

import json
from pathlib import Path

from partlens.experiments.tables_page import TITLES, table_lines

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "tables.md"
MARKER = "<!-- below: made by benchmarks/explainer_tables.py -->"


FORMER = "Made when `candidates` was the default; today it takes `--preset candidates`."


def section(path: Path) -> list[str]:
    content = json.loads(path.read_text())
    network = path.stem.split("-", 1)[0]
    former = "-candidates-" in path.stem
    title = f"## {network}{', candidates' if former else ''}: {TITLES[content['table']].lower()}"
    lines = [title, "", "```", content["command"], "```", "", *([FORMER, ""] if former else [])]
    return [
        *lines,
        *(line.replace("### ", "**", 1) + "**" if line.startswith("### ") else line for line in table_lines(content)),
        "",
    ]


def main() -> None:
    head = PAGE.read_text().split(MARKER)[0].rstrip()
    found = sorted((HERE / "results" / "tables").glob("*.json"))
    body = "\n".join(line for path in found for line in section(path))
    PAGE.write_text(f"{head}\n\n{MARKER}\n\n{body.rstrip()}\n")
    print(f"wrote {PAGE.name} from {len(found)} results")


if __name__ == "__main__":
    main()
