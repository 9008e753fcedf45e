"""What the verbs print for a person: scores beside their nulls, parts and what they add."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from partlens.estimate import Estimate
from partlens.evaluation.results import Evaluation, PartInterpretability
from partlens.metrics.scores import FIDELITY, LOCALISATION, Score


def _shown(estimate: dict[str, Any] | None, digits: str = ".3g", factor: float = 1.0, unit: str = "") -> str:
    if estimate is None or estimate["value"] is None:
        return "–"
    ends = [format(factor * end, digits) for end in estimate["interval"] if end is not None]
    interval = f" [{', '.join(ends)}]" if len(ends) == 2 else ""
    return f"{factor * estimate['value']:{digits}}{unit}{interval}"


def _percent(estimate: dict[str, Any] | None) -> str:
    return _shown(estimate, ".1f", 100, " %")


def _written(estimate: Estimate, score: Score | None = None) -> str:
    """Write an estimate and its interval; a share as a percentage."""
    if not estimate.defined:
        return "–"
    share = score is not None and score.is_share
    value, *ends = (100 * v if share else v for v in (estimate.value, *estimate.interval))
    shown = f" [{', '.join(f'{end:.3g}' for end in ends)}]" if estimate.has_interval else ""
    return f"{value:.3g}{' %' if share else ''}{shown}"


def _regions(found: PartInterpretability) -> Any:
    from rich.table import Table

    headings = ("explainer", "its regions on other photos", "performer tap", "top layer", "random", "centre")
    table = Table(f"parts met ({found.regions})", *headings, box=None)
    for reading, of in found.readings.items():
        other = of.other_photo["explainer"]
        cells = (of.layers["explainer"], other, of.layers["tap"], of.layers["top"], of.random, of.centre)
        table.add_row(reading.replace("_", "-"), *map(_written, cells))
    return table


def _fidelity(result: Evaluation) -> Any:
    from rich.table import Table

    table, kept = Table("fidelity", "value", "n", box=None), result.reconstruction
    rows = [("p", result.p), ("p_optimum", result.p_optimum)]
    rows += [(name, getattr(kept, name)) for name in FIDELITY if hasattr(kept, name) and name != "relative_error"]
    rows += [(f"relative_error {target}", of) for target, of in kept.relative_error.items()]
    for name, of in rows:
        if of.n:
            title = name if kept.errors_by is None or "error_" not in name else f"{name} (by the {kept.errors_by})"
            table.add_row(title, _written(of, FIDELITY.get(name)), f"{of.n} {of.unit}")
    return table


def print_scores(result: Evaluation) -> None:
    """Print an evaluation."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    names = {"tap": "performer tap", "top": result.performer.top_layer}
    subjects = dict(result.subjects())
    for heading in ("score", *(names.get(key, key) for key in subjects)):
        table.add_column(heading, no_wrap=heading == "score")
    for name, score in LOCALISATION.items():
        table.add_row(name, *(_written(scores.of(name), score) for scores in subjects.values()))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # in a file or a pipe nothing needs to be broken
    console.print(table)
    console.print(_fidelity(result))
    if result.part_interpretability is not None:
        console.print(_regions(result.part_interpretability))
    for warning in result.warnings:
        console.print(f"warning: {warning}", markup=False)


def print_parts(found: dict[str, Any]) -> None:
    """Print the parts of a run's filters, and what each adds."""
    from rich.console import Console
    from rich.table import Table

    from partlens.page.parts_data import mean_place
    from partlens.verbs.parts_file import grouping, named_parts

    measured = found["contributions"]
    fits = measured is not None and measured["grouping"] == grouping(found)
    rows = {tuple(row["ids"]): row for row in measured["parts"]} if fits else {}
    table = Table(box=None)
    headings = (
        "part",
        "filters",
        "from landmark, R²",
        "adds (Shapley)",
        "same by integrated gradients",
        "as many filters by lot",
        "removed",
    )
    for heading in headings:
        table.add_column(heading, no_wrap=heading == "part")
    by_filter = {row["filter"]: row for row in found["filters"]}
    for part in named_parts(found):
        row = rows.get(part.ids, {})
        place = ", ".join("–" if math.isnan(v) else f"{v:.2f}" for v in mean_place(part.filters, by_filter))
        shown = (_percent(row.get(k)) for k in ("share", "integrated_share", "integrated_null"))
        ids = "" if part.ids == (part.name,) else f" ({', '.join(part.ids)})"
        table.add_row(f"{part.name}{ids}", str(len(part.filters)), place, *shown, _shown(row.get("removal")))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # in a file or a pipe nothing needs to be broken
    console.print(table)
    stability = found["stability"]
    console.print(
        f"by {found['rule']} on {found['photos']} photos; on halves of them {_percent(stability['kept'])} of the "
        f"filters keep their part (by lot {_percent(stability['null_kept'])}), adjusted Rand index "
        f"{_shown(stability['adjusted_rand'])}"
    )
    if not fits:
        console.print("parts were joined or filters moved: run partlens parts again to measure what they add")
        return
    check = measured["removal_check"]
    console.print(
        f"the parts together add {_percent(measured['interpretable_share'])} of the score; foretold and measured loss "
        f"correlate by {_shown(check['shapley']['correlation'])} (Shapley), "
        f"{_shown(check['gradient_activation']['correlation'])} (gradient × activation), "
        f"{_shown(check['part_size']['correlation'])} (number of filters alone)"
    )
    for row in found["unplaced_names"]:
        console.print(f"the name {row['name']!r} fits no part found now", markup=False)


def print_path(result: Any) -> None:
    """Print where the result lies."""
    sys.stdout.write(f"{result.path}\n")


def print_paths(result: Sequence[Any]) -> None:
    """Print one folder a line."""
    sys.stdout.write("".join(f"{folder}\n" for folder in result))


def print_check(result: Any) -> None:
    """Print what a data set holds."""
    sys.stdout.write("\n".join(result.lines()) + "\n")


def print_layers(found: Sequence[Any]) -> None:
    """Print the layers of a model, the default tap marked."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=None)
    for heading in ("layer", "kind", "filters", "cells", "stride px", "receptive field px", "fit-explainer"):
        table.add_column(heading, no_wrap=heading in {"layer", "kind"})
    for layer in found:
        whole = layer.stride_px == (0, 0) or len(layer.shape) == 1
        field = "whole image" if whole else "unknown" if layer.receptive_field_px is None else layer.receptive_field_px
        stride = "–" if whole or layer.stride_px is None else str(layer.stride_px)
        filters, *cells = map(str, layer.shape)
        mark = "→" if layer.is_default else ""
        suits = f"no: {layer.reason}" if layer.reason else "yes"
        table.add_row(mark, layer.name, layer.kind, filters, "x".join(cells), stride, str(field), suits)
    console = Console()
    if not console.is_terminal:
        console.width = 200  # in a file or a pipe nothing needs to be cut
    console.print(table)
    if any(layer.is_default for layer in found):
        sys.stdout.write("→ is the layer that fit-explainer taps without --tap\n")
    else:
        sys.stdout.write("no layer here suits fit-explainer without --tap\n")
