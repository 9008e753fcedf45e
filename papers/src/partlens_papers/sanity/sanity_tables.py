"""The sanity checks as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from partlens_papers.removal.removal_tables import shown

METHODS = ("ours", "guided", "gradient")
ALIKE = 0.9


def sanity_lines(result: Mapping[str, Any]) -> list[str]:
    """Return Markdown lines of every check that was run.

    Args:
        result: what `sanity_checks` returned.
    """
    writers: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
        "classes": _classes_table,
        "layers": _layers_table,
        "cue": _cue_table,
        "labels": _labels_table,
    }
    lines: list[str] = []
    for name, write in writers.items():
        if name in result["checks"]:
            lines += ([""] if lines else []) + write(result["checks"][name])
    return lines


def _classes_table(check: Mapping[str, Any]) -> list[str]:
    lines = [
        f"| two most likely classes of {check['photos']} photos | rank correlation of the maps | share below {ALIKE} |",
        "|---|---|---|",
    ]
    lines += [f"| {m} | {shown(check[m]['correlation'])} | {shown(check[m]['below'])} |" for m in METHODS]
    return [*lines, f"| shown features in common (Jaccard) | {shown(check['features']['jaccard'])} | |"]


def _layers_table(check: Mapping[str, Any]) -> list[str]:
    lines = [
        "| randomised down to | model's accuracy | read-out | "
        + " | ".join(f"{m}, correlation" for m in METHODS)
        + " |",
        "|---" * (3 + len(METHODS)) + "|",
    ]
    for stage in check["stages"]:
        cells = [shown(stage["methods"][m]["correlation"]) for m in METHODS]
        start = f"| {stage['down_to']} | {shown(stage['accuracy'])} | {shown(stage['readout'])} | "
        lines.append(f"{start}{' | '.join(cells)} |")
    cells = [shown(check["floor"][m]["correlation"]) for m in METHODS]
    return [*lines, f"| maps of different photos | – | – | {' | '.join(cells)} |"]


def _cue_table(check: Mapping[str, Any]) -> list[str]:
    lines = [
        "| network | map | energy on the mark | times its area | peak on the mark | IoU area, % |",
        "|---|---|---|---|---|---|",
    ]
    for network, name in (("cued", "needs the mark"), ("control", "never saw it")):
        for m in METHODS:
            scores = check[network][m]
            cells = [shown(scores["energy_share"]), shown(scores["lift"], 1), shown(scores["pointing"])]
            lines.append(f"| {name} | {m} | {' | '.join(cells)} | {shown(scores['iou_auc'], 1)} |")
    with_cue, without = (shown(check["accuracy"][which]) for which in ("with_cue", "without_cue"))
    return [
        *lines,
        "",
        f"Area of the mark {check['area_share']:.3f}; accuracy of its class {with_cue} with it, {without} without.",
    ]


def _labels_table(check: Mapping[str, Any]) -> list[str]:
    real, false = check["removal"]["real"], check["removal"]["shuffled"]
    lines = ["| | real labels | shuffled labels |", "|---|---|---|"]
    read = check["readout"]
    lines.append(
        f"| linear read-out (chance {read['chance']:.3f}) | {shown(read['real'])} | {shown(read['shuffled'])} |"
    )
    lines.append(f"| features removed | {real['features']:.1f} | {false['features']:.1f} |")
    for name, text in (("ours", "relevant features"), ("random", "as many random ones")):
        for measure in ("accuracy", "log_odds"):
            cells = [shown(each["drop"][name][measure]) for each in (real, false)]
            lines.append(f"| {measure.replace('_', '-')} lost without {text} | {' | '.join(cells)} |")
    if check["region"] is not None:
        where = check["region"]
        start = f"| energy of the map in the deciding region (area {where['area_share']:.3f}) | "
        lines.append(f"{start}{shown(where['real'])} | {shown(where['shuffled'])} |")
    return lines
