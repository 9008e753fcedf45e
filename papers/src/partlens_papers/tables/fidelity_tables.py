"""The tables of the share p and of the errors: how much part filters carry, and what feeding them back costs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

from partlens_papers.tables.explainer_jobs import CLASSIFIED, EXPLAINER
from partlens_papers.tables.instability_table import printed_pairs
from partlens_papers.tables.published import CUB, P_ORDER, VOC, Subject, published
from partlens_papers.tables.study import Content, Study, fidelity, localisation
from partlens_papers.tables.table_blocks import (
    cell_of,
    chart,
    column,
    defined,
    digits,
    mean_and_category_rows,
    present,
    table,
    verdict,
)
from partlens_papers.tables.table_sums import Cell, difference_cell, mean_cell, printed, t_cell, undefined


def share_table(study: Study) -> dict[str, Any]:
    """Return the share p of each network, with the fidelity of the reconstruction beside it."""

    def share(content: Content) -> Cell | None:
        found: Cell | None = content["evaluation"].get("p")
        return found

    def cells(label: str, category: str | None) -> Mapping[str, Cell | None]:
        network = study.networks[label]
        if category is None:
            groups = study.groups(label, EXPLAINER, share)[0]
            p = t_cell(groups[0]) if len(groups) == 1 else mean_cell(groups, seed=study.seed)
        else:
            p = t_cell([float(cell["value"]) for cell in study.cells(label, category, EXPLAINER, share)])
        theirs = {}
        for data, key in ((VOC, "voc"), (CUB, "cub")):
            rows = study.rows("p", network, None, data)
            name = category if category is None or category in (rows[0].values if rows else ()) else ""
            value = None if not rows or name == "" else rows[0].average if name is None else rows[0].values[name]
            theirs[key] = printed(value, rows[0].source) if rows else undefined("published")
        return {
            "p": p,
            "optimum": cell_of(study, label, category, EXPLAINER, fidelity("p_optimum")),
            "agreement": cell_of(study, label, category, EXPLAINER, fidelity("reconstruction", "agreement_top1")),
            "error": cell_of(study, label, category, EXPLAINER, fidelity("reconstruction", "relative_error", "last")),
            "increase": cell_of(study, label, category, EXPLAINER, fidelity("reconstruction", "error_increase_points")),
            "instability": cell_of(study, label, category, EXPLAINER, localisation("explainer", "instability")),
            **theirs,
        }

    columns = [
        column("p", "p, share of part filters", "explainer"),
        column("voc", "p, VOC, printed", "printed"),
        column("cub", "p, CUB, printed", "printed"),
        column("optimum", "p with the least objective, everything else held"),
        column("agreement", "agreement of decisions", "", "higher"),
        column("error", "relative error, last target", "", "lower"),
        column("increase", "error increase, points", "", "lower"),
        column("instability", "instability of the parts", "", "lower"),
    ]
    lead = (
        "p is a learned weight: it says something only as far as the reconstruction is faithful and filters are parts."
    )
    main = {
        "key": "p",
        "title": "How much part filters carry",
        "lead": lead,
        "columns": columns,
        "rows": list(mean_and_category_rows(study, EXPLAINER, cells)),
    }
    means = {label: cells(label, None)["p"] for label in present(study, EXPLAINER)}
    lines = [(label, "explainer", cell) for label, cell in means.items() if cell is not None and defined(cell)]
    known = {name for name in study.networks.values() if name}
    lines += [
        (f"{r.network}, printed", "null", printed(r.average, r.source))
        for r in published("p", data=VOC, setting=study.setting)
        if r.network in known or not known
    ]
    charts = [chart("p", "with its interval", lines)]
    return table([main], charts, [_order_verdict(study, means)], study, published("p", setting=None))


def _order_verdict(study: Study, means: Mapping[str, Cell | None]) -> dict[str, Any]:
    """Say whether p rises over the networks as printed."""
    found = []
    for networks in P_ORDER:
        values = [
            float(cell["value"])
            for label, cell in means.items()
            if study.networks[label] in networks and cell is not None and cell["value"] is not None
        ]
        if values:
            found.append(("/".join(networks), fmean(values)))
    order = "AlexNet < VGG-M < VGG-16, VGG-S < ResNet-101, ResNet-152"
    if len(found) < 2:
        return verdict(None, "Order of p", f"Printed: {order}. It takes performers of at least two of these steps.")
    rising = all(low[1] < high[1] for low, high in pairwise(found))
    words = ", ".join(f"{name} {digits(value)}" for name, value in found)
    return verdict(rising, "Order of p", f"Printed: {order}. Here: {words}.")


def _printed_increase(subject: Subject) -> tuple[float, float]:
    """Return the smallest and the largest printed difference to the performer, in points."""
    gaps = [error - performer for error, performer in printed_pairs("error_percent", subject)]
    return min(gaps), max(gaps)


def _always(content: Content) -> Cell | None:
    """Return the error of always answering the more frequent of category and background."""
    measured = fidelity("reconstruction", "performer_error_percent")(content)
    if measured is None or not measured["n"]:
        return None
    share = content["evaluation"]["photos"] / measured["n"]
    return {"value": 100 * min(share, 1 - share), "interval": [None, None], "n": measured["n"], "unit": "photos"}


def error_table(study: Study) -> dict[str, Any]:
    """Return errors of performer, explainer and explainer + cls."""
    performer, explained = (
        fidelity("reconstruction", "performer_error_percent"),
        fidelity("reconstruction", "explainer_error_percent"),
    )
    theirs: dict[str, Subject] = {"t_performer": "performer", "t_explainer": "explainer", "t_cls": "explainer+cls"}

    def cells(label: str, category: str | None) -> Mapping[str, Cell | None]:
        if category is None:
            pair = study.groups(label, EXPLAINER, explained, performer)
            increase = difference_cell(*pair, seed=study.seed)
        else:
            increase = cell_of(study, label, category, EXPLAINER, fidelity("reconstruction", "error_increase_points"))
        found = {
            "performer": cell_of(study, label, category, EXPLAINER, performer),
            "explainer": cell_of(study, label, category, EXPLAINER, explained),
            "cls": cell_of(study, label, category, CLASSIFIED, explained),
            "increase": increase,
            "always": cell_of(study, label, category, EXPLAINER, _always),
            "agreement": cell_of(study, label, category, EXPLAINER, fidelity("reconstruction", "agreement_top1")),
        }
        network = study.networks[label]
        data = CUB if study.data == CUB else VOC
        for key, subject in theirs.items():
            rows = study.rows("error_percent", network, subject, data)
            whole = category is None and rows
            found[key] = printed(rows[0].average, rows[0].source) if whole else undefined("published")
        return found

    columns = [
        column("performer", "performer", "performer"),
        column("t_performer", "performer, printed", "printed"),
        column("explainer", "explainer", "explainer"),
        column("t_explainer", "explainer, printed", "printed"),
        column("cls", "explainer + cls", "explainer"),
        column("t_cls", "explainer + cls, printed", "printed"),
        column("increase", "explainer − performer, points"),
        column("always", "always the more frequent", "null"),
        column("agreement", "agreement of decisions", "", "higher"),
    ]
    main = {
        "key": "errors",
        "title": "Errors, category against background, in per cent"
        if study.setting == "single"
        else "Errors, several categories told apart, in per cent",
        "lead": "By the performer's own output where it knows the category, else by a logistic head on its "
        "features. Explainer + cls learned from the classification loss instead of the reconstruction. Printed figures "
        "are averages over other categories.",
        "columns": columns,
        "rows": list(mean_and_category_rows(study, EXPLAINER, cells)),
    }
    charts, verdicts = [], []
    for label in present(study, EXPLAINER):
        found = cells(label, None)
        names = {"performer": "performer", "explainer": "explainer", "cls": "explainer + cls"}
        roles = {"performer": "performer", "explainer": "explainer", "cls": "explainer"}
        lines = [(name, roles[key], found[key]) for key, name in names.items()]
        lines += [(f"{names[key]}, printed", "null", found[f"t_{key}"]) for key in names]
        shown = [(name, role, cell) for name, role, cell in lines if cell is not None and defined(cell)]
        charts.append(chart(f"{label}: error, %", "lower is better", shown))
        more, cls = found["increase"], found["cls"]
        if more is not None and more["value"] is not None:
            low, high = _printed_increase("explainer")
            words = f"{label}: {more['value']:+.2f} points; printed {low:+.2f} to {high:+.2f} (one category each)."
            words += " Worse than printed." if more["value"] > high else ""
            verdicts.append(verdict(more["value"] <= high, "What the reconstruction costs", words))
        own = found["performer"]
        if cls is not None and own is not None and cls["value"] is not None and own["value"] is not None:
            gap = cls["value"] - own["value"]
            low, high = _printed_increase("explainer+cls")
            words = f"{label}: {gap:+.2f} points against the performer; printed {low:+.2f} to {high:+.2f}."
            words += " Worse than printed." if gap > high else ""
            verdicts.append(verdict(gap <= high, "Explainer + cls near the performer", words))
    printed_rows = published("error_percent", setting=None)
    return table([main], charts, verdicts, study, printed_rows)
