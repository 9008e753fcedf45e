"""Removal experiments as Markdown tables, with the published figures for comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PUBLISHED = (
    # network, intact, ten random filters, relevant filters, features a class
    ("VGG-16, ImageNet val", 0.7159, 0.7139, 0.4871, 5.90),
    ("ResNet-50, ImageNet val, last block", 0.7613, 0.7608, 0.6974, 4.52),
)
"""Mean class accuracies computed from the files that the follow-up released (fitted on the images it tested)."""


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return Markdown lines: accuracy intact and without features, with the published figures for comparison.

    Args:
        results: what `feature_removal` returned, one row each.

    Returns:
        Lines of a table; intervals are 95 %.
    """
    lines = [
        "| network, data | classes, photos | intact | relevant | random | activation | gradient | features a class |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [
            f"{result['performer']['name']}, {result['data']['name']}"
            + (" (shuffled labels)" if result["config"]["shuffled"] else ""),
            f"{result['counts']['classes']}, {result['counts']['tested_photos']}",
            shown(result["intact"]["accuracy"]),
        ]
        cells += [shown(result["conditions"][n]["accuracy"]) for n in ("ours", "random", "activation", "gradient")]
        lines.append(f"| {' | '.join(cells)} | {result['conditions']['ours']['features']:.1f} |")
    for name, intact, random, ours, features in PUBLISHED:
        lines.append(
            f"| {name} (published) | 1000, 50000 | {intact:.3f} | {ours:.3f} | {random:.3f} | – | – | {features} |"
        )
    return lines


def curve_table(result: Mapping[str, Any]) -> list[str]:
    """Return Markdown lines: the accuracy lost when only the features with the largest weights are removed.

    Args:
        result: what `feature_removal` returned.
    """
    rankings = result["config"]["curve_rankings"]
    lines = [f"| removed | {' | '.join(rankings)} |", "|---" * (len(rankings) + 1) + "|"]
    for most in result["config"]["curve"]:
        cells = [shown(result["conditions"][f"{ranking}-top-{most}"]["drop"]["accuracy"]) for ranking in rankings]
        lines.append(f"| top {most} | {' | '.join(cells)} |")
    cells = [shown(result["conditions"][ranking]["drop"]["accuracy"]) for ranking in rankings]
    lines.append(f"| all relevant ({result['conditions']['ours']['features']:.1f}) | {' | '.join(cells)} |")
    return lines


def removal_lines(result: Mapping[str, Any]) -> list[str]:
    """Return Markdown lines of one experiment: its row and its curve."""
    return [*table([result]), "", *curve_table(result)]


def shown(estimate: Mapping[str, Any], digits: int = 3) -> str:
    """Write an estimate as ``0.487 [0.470, 0.505]``; a dash where it is undefined.

    Example:
        >>> shown({"value": 0.5, "interval": [0.25, 0.75], "n": 4, "unit": "photos"}, 2)
        '0.50 [0.25, 0.75]'
    """
    if estimate["value"] is None:
        return "–"
    low, high = estimate["interval"]
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{estimate['value']:.{digits}f}{ends}"
