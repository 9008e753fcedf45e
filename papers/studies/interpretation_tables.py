"""Write the tables of docs/interpretation.md from the committed results.

    uv run python benchmarks/interpretation_tables.py

Results come from the commands that the page names; this script only formats them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from partlens.experiments.flower_benchmark import benchmark_table
from partlens.experiments.removal_tables import curve_table, table
from partlens.experiments.sanity_tables import tables

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "interpretation.md"


def load(name: str) -> dict[str, Any]:
    return json.loads((HERE / name).read_text())


def flowers(name: str) -> list[str]:
    result = load(f"results/{name}.json")
    accuracy = result["network"].get("accuracy")
    n = next(iter(result["methods"].values()))["iou_auc_percent"]["n"]
    known = "" if accuracy is None else f"accuracy {accuracy['value']:.1%} on {accuracy['n']} held-out flowers; "
    return [f"Network: {known}{n} of them measured.", "", *benchmark_table(result)]


def lasso() -> list[str]:
    result = load("mu_lasso.json")
    head = [
        "problem",
        "solver",
        "CPU s a class",
        "times ours",
        "relative gap at the returned point",
        "right",
        "peak MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for problem, content in result.items():
        size = (
            f"{problem}: {content['features']:,} features, {content['images']:,} images, {content['classes']} classes"
        )
        for name, row in content["contestants"].items():
            gap = "–" if row["relative_gap"] is None else f"{row['relative_gap']:.1e}"
            right = "yes" if row["right"] else "**no**"
            cells = [f"{row['cpu_s_per_class']:.3f}", f"{row['times_ours_per_class']:.1f}", gap, right]
            lines.append(f"| {size} | {name} | " + " | ".join(cells) + f" | {row['peak_mb']:,} |")
    return lines


def removal() -> list[str]:
    found = [json.loads(path.read_text()) for path in sorted(HERE.glob("results/removal-*.json"))]
    lines = table(found)
    for each in found:
        lines += ["", f"**{each['performer']['name']}**, accuracy lost by the number of features removed:", ""]
        lines += curve_table(each)
    return lines


def sanity() -> list[str]:
    lines: list[str] = []
    for path in sorted(HERE.glob("results/sanity-*.json")):
        lines += [f"### {path.stem.removeprefix('sanity-')}", "", *tables(json.loads(path.read_text())), ""]
    return lines


def guided() -> list[str]:
    result = load("guided_backprop.json")
    tools = ["partlens", "captum", "zennit", "grad-cam"]
    lines = ["| network | " + " | ".join(f"{t}: error, time" for t in tools) + " |", "|---" * 5 + "|"]
    for network, row in result["correctness"].items():
        cells = []
        for tool in tools:
            each = row.get(tool)
            if each is None:
                cells.append("–")
                continue
            error = f"**{each['error']:.2g}**" if each["error"] > 1e-5 else f"{each['error']:.1g}"
            left = " (leaves the model changed)" if each["side_effects"] else ""
            cells.append(f"{error}, {each['cpu_time_over_plain_gradient']['median']:.2f}×{left}")
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return lines


def lattice() -> list[str]:
    result = load("stride_lattice.json")
    names = list(next(iter(result["networks"].values()))["lattice"])
    lines = ["| network (stride 4, " + f"{result['photos']} photos) | " + " | ".join(names) + " | pixels permuted |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for network, row in result["networks"].items():
        cells = [
            f"{row['lattice'][n]['4']['index']['mean']:.2f} ± {row['lattice'][n]['4']['index']['interval_half']:.2f}"
            for n in names
        ]
        control = row["lattice"][names[0]]["4"]["permuted_index"]["mean"]
        lines.append(f"| {network} | " + " | ".join(cells) + f" | {control:.2f} |")
    return lines


def planted() -> list[str]:
    result = load("relevant_filters.json")
    lines = ["| method | F1 of the best five | F1 of its own set | features in it | CPU s |", "|---|---|---|---|---|"]
    for name, row in result["methods"].items():

        def cell(key: str, row: dict[str, Any] = row) -> str:
            value = row.get(key)
            return "–" if value is None else f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

        keys = ("f1_at_5", "f1_of_set", "set_size", "cpu_s")
        lines.append(f"| {name} | " + " | ".join(cell(k) for k in keys) + " |")
    return lines


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "flowers-single-6c": lambda: flowers("flowers-single-6c"),
    "flowers-double-12c": lambda: flowers("flowers-double-12c"),
    "removal": removal,
    "sanity": sanity,
    "guided": guided,
    "lattice": lattice,
    "planted": planted,
    "lasso": lasso,
}


def main() -> None:
    text = PAGE.read_text()
    for name, make in SECTIONS.items():
        start, end = f"<!-- table: {name} -->", "<!-- end -->"
        if start not in text:
            continue
        head, rest = text.split(start, 1)
        _, tail = rest.split(end, 1)
        text = head + start + "\n\n" + "\n".join(make()) + "\n\n" + end + tail
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
