"""What the verbs print for a person: scores with their nulls, parts and what they add.

The command line imports this module after the verb has run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from partlens.estimate import Estimate
from partlens.evaluation.results import Evaluation, PartInterpretability
from partlens.metrics.scores import FIDELITY, HIGHER, LOCALISATION, LOWER, Score
from partlens.object_parts.inspection import InspectedCategory, InspectRecord
from partlens.object_parts.record import PartContribution, PartsFile

_WIDE = 240
_ARROWS = {LOWER: " ↓", HIGHER: " ↑"}


def _console() -> Console:
    """Return standard output, where names stand as they are; in a file or a pipe no line is broken."""
    plain = Console(markup=False, emoji=False, highlight=False)
    return plain if plain.is_terminal else Console(width=_WIDE, soft_wrap=True, markup=False, emoji=False)


def _table(*headings: str) -> Table:
    """Return a table without lines whose first column is never broken."""
    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, no_wrap=heading == headings[0])
    return table


def _written(estimate: Estimate, digits: str = ".3g", unit: str = "") -> str:
    """Write an estimate and its interval; undefined is a dash."""
    if not estimate.defined:
        return "–"
    value, *ends = (format(v, digits) for v in (estimate.value, *estimate.interval))
    return f"{value}{unit}" + (f" [{', '.join(ends)}]" if estimate.has_interval else "")


def _percent(estimate: Estimate) -> str:
    return _written(estimate.scaled(100), ".1f", " %")


def _scored(estimate: Estimate, score: Score) -> str:
    """Write an estimate as its score is written."""
    return _written(estimate.scaled(100), unit=" %") if score.is_share else _written(estimate)


def _titled(score: Score) -> str:
    return score.title + _ARROWS.get(score.direction, "")


def _regions(found: PartInterpretability) -> Table:
    headings = ("explainer", "its regions on other photos", "performer tap", "top layer", "random", "centre")
    table = _table(f"parts met ({found.regions})", *headings)
    for reading, of in found.readings.items():
        other = of.other_photo["explainer"]
        cells = (of.layers["explainer"], other, of.layers["tap"], of.layers["top"], of.random, of.centre)
        table.add_row(reading.replace("_", "-"), *map(_written, cells))
    return table


def _fidelity(result: Evaluation) -> Table:
    """Write p beside what both tracks and the part filters alone keep, with the nulls of the latter."""
    alone = result.parts_alone
    kinds = (result.reconstruction, alone.parts, alone.other_photo, alone.nothing)
    headings = ("both tracks", "part filters alone", "those of another photo", "nothing", "n")
    table = _table("fidelity", *headings)
    by = f" (by the {result.reconstruction.errors_by})"
    rows = [
        (FIDELITY["variance_kept"], f" of {t}", [one.variance_kept[t] for one in kinds]) for t in kinds[0].variance_kept
    ]
    for name, of in (("agreement_top1", ""), ("agreement_top1_background", ""), ("error_increase_points", by)):
        rows.append((FIDELITY[name], of, [getattr(one, name) for one in kinds]))
    for score, of, values in rows:
        if values[0].n:
            cells = (_scored(value, score) for value in values)
            table.add_row(_titled(score) + of, *cells, f"{values[0].n} {values[0].unit}")
    return table


def print_scores(result: Evaluation) -> None:
    """Print an evaluation."""
    names = {"tap": "performer tap", "top": result.performer.top_layer}
    subjects = dict(result.subjects())
    table = _table("score", *(names.get(key, key) for key in subjects))
    for name, score in LOCALISATION.items():
        table.add_row(_titled(score), *(_scored(scores.of(name), score) for scores in subjects.values()))
    console = _console()
    console.print(
        "Each row is one score of where filters peak on held-out photos (↓ lower is better, ↑ higher): of the "
        "explainer, of two layers of the performer, and of three baselines that know nothing; 95 % intervals in "
        "brackets."
    )
    console.print(table)
    console.print(
        f"p = {_scored(result.p, FIDELITY['p'])} is the weight of part filters that the price of the ordinary track "
        "was worth, no share of anything. Fidelity is how much of the performer is left when its features are "
        "replaced: by both tracks, or by part filters alone, with two nulls."
    )
    console.print(_fidelity(result))
    if result.part_interpretability is not None:
        console.print(_regions(result.part_interpretability))
    for warning in result.warnings:
        console.print(f"warning: {warning}")


def _adds(part: PartContribution | None) -> tuple[str, ...]:
    """Write what a part adds; dashes where that was not measured."""
    if part is None:
        return ("–",) * 4
    return *map(_percent, (part.share, part.integrated_share, part.integrated_null)), _written(part.removal)


def print_parts(found: PartsFile) -> None:
    """Print the parts of a run's filters, and what each adds."""
    measured = found.measured()
    headings = ("part", "filters", "from landmark, R²", "adds (Shapley)", "same by integrated gradients")
    table = _table(*headings, "as many random filters", "removed")
    for part in found.named:
        place = ", ".join("–" if math.isnan(v) else f"{v:.2f}" for v in found.mean_place(part.filters))
        ids = "" if part.ids == (part.name,) else f" ({', '.join(part.ids)})"
        adds = _adds((measured or {}).get(part.filters))
        table.add_row(f"{part.name}{ids}", str(len(part.filters)), place, *adds)
    console = _console()
    console.print(
        "Through the explainer: what each part's filters add to the network's score when the reconstruction is fed "
        "back. A share counts filters as well as parts: as many random filters say what the count alone gives."
    )
    console.print(table)
    kept = found.stability
    console.print(
        f"by {found.rule} on {found.photos} photos; on halves of them {_percent(kept.kept)} of the filters keep their "
        f"part (with shuffled parts {_percent(kept.null_kept)}), adjusted Rand index {_written(kept.adjusted_rand)}"
    )
    if measured is None or found.contributions is None:
        console.print("parts were joined or filters moved: run partlens parts again to measure what they add")
        return
    check = found.contributions.removal_check
    console.print(
        f"the parts together add {_percent(found.contributions.interpretable_share)} of the fed-back score, which "
        f"follows p, a price (see evaluate for what they keep alone); predicted and "
        f"measured loss correlate by {_written(check['shapley'].correlation)} (Shapley), "
        f"{_written(check['gradient_activation'].correlation)} (gradient × activation), "
        f"{_written(check['part_size'].correlation)} (number of filters alone)"
    )
    for row in found.unplaced_names:
        console.print(f"the name {row.name!r} fits no part found now")


def _shares(one: InspectedCategory) -> str:
    shares = [*((part.name, part.share) for part in one.parts), ("elsewhere", one.elsewhere.value)]
    return ", ".join(f"{name}: {share:z.0%}" for name, share in shares if math.isfinite(share))


def print_verdicts(found: InspectRecord) -> None:
    """Print what the network knows each category by, the parts with their shares, and what could not be done."""
    console = _console()
    table = _table("category", "verdict", "advantage", "parts and elsewhere", "n")
    for one in found.categories:
        advantage = _written(one.advantage, "z.2f")
        table.add_row(one.name or "all photos", one.verdict, advantage, _shares(one), str(one.advantage.n))
    console.print(table)
    notes = (f"{one.name or 'all photos'}: {note}" for one in found.categories for note in one.notes)
    for sentence in (*(one.sentence for one in found.categories), *notes, *found.performer.notes, *found.notes):
        console.print(sentence)


def print_path(result: Any) -> None:
    """Print where the result lies, or a folder a line."""
    folders = result if isinstance(result, Sequence) else [result.path]
    sys.stdout.write("".join(f"{folder}\n" for folder in folders))


def print_check(result: Any) -> None:
    """Print what a data set holds."""
    sys.stdout.write("\n".join(result.lines()) + "\n")


def _layer_row(layer: Any) -> tuple[str, ...]:
    field, stride = layer.receptive_field_px or "unknown", layer.stride_px or "–"
    if layer.stride_px == (0, 0) or len(layer.shape) == 1:
        field, stride = "whole image", "–"
    filters, *cells = map(str, layer.shape)
    suits = f"no: {layer.reason}" if layer.reason else "yes"
    return layer.name, layer.kind, filters, "x".join(cells), layer.layout, str(stride), str(field), suits


def print_layers(found: Sequence[Any]) -> None:
    """Print the layers of a model, the default tap marked."""
    headings = ("", "layer", "kind", "filters", "cells", "layout", "stride px", "receptive field px", "fit-explainer")
    table = _table(*headings)
    for column in table.columns[1:3]:
        column.no_wrap = True
    for layer in found:
        table.add_row("→" if layer.is_default else "", *_layer_row(layer))
    console = _console()
    console.print(table)
    has_default = any(layer.is_default for layer in found)
    subject = "→ is the layer that fit-explainer taps" if has_default else "no layer here suits fit-explainer"
    sys.stdout.write(f"{subject} without --tap\n")
