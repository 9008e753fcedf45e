"""The tables of what else there is: interpretable CNNs, and rivals on the same maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from partlens_papers.tables.explainer_jobs import EXPLAINER, RIVALS
from partlens_papers.tables.instability_table import stability_verdicts
from partlens_papers.tables.published import RERUN_OF_RELEASED_CODE, Subject, published
from partlens_papers.tables.region_block import region_block
from partlens_papers.tables.study import Content, Getter, Study, fidelity, localisation
from partlens_papers.tables.table_blocks import (
    BESIDE,
    SUBJECTS,
    beside_block,
    cell_of,
    chart,
    column,
    defined,
    digits,
    known_columns,
    present,
    pretty,
    row,
    table,
    verdict,
)
from partlens_papers.tables.table_sums import Cell, printed

FAITHFUL = {
    "variance_explained": ("variance of the target explained", "higher"),
    "agreement_top1": ("agreement of decisions", "higher"),
    "error_increase_points": ("error increase, points", "lower"),
}


def interpretable_table(study: Study) -> dict[str, Any]:
    """Return instability and errors of interpretable CNNs, by either loss."""
    kinds = {"icnn-published": "published loss", "icnn-released": "released loss"}
    accuracy: dict[str, Subject] = {"t_ordinary": "performer", "t_interpretable": "interpretable"}
    blocks, charts, verdicts = [], [], []
    rows = []
    for kind, name in kinds.items():
        for label in present(study, kind):
            for category in (None, *(study.categories if len(study.categories) > 1 else ())):
                cells: dict[str, Cell | None] = {
                    key: cell_of(study, label, category, kind, localisation(key, "instability"))
                    for key in ("interpretable", "top", "random", "centre", "corner")
                }
                cells["t_top"] = study.printed(label, "instability", "performer", category)
                cells["t_icnn"] = study.printed(label, "instability", "interpretable", category)
                cells["error"] = cell_of(study, label, category, kind, fidelity("error_percent"))
                cells["own_error"] = cell_of(study, label, category, kind, fidelity("performer_error_percent"))
                for key, subject in accuracy.items():
                    line = study.printed(label, "accuracy_percent", subject)
                    value = None if line["value"] is None or category else 100 - float(line["value"])
                    cells[key] = printed(value, line.get("source", ""))
                title = f"{label}, {name}" if category is None else pretty(category)
                rows.append(row(title, cells, strong=category is None, group=f"{label}, {name}"))
            verdicts += stability_verdicts(study, label, kind, "interpretable", f"interpretable CNN ({name})")
            lines = [
                (
                    "interpretable CNN",
                    "explainer",
                    study.mean(label, kind, localisation("interpretable", "instability")),
                ),
                ("ordinary, top layer", "performer", study.mean(label, kind, localisation("top", "instability"))),
                *(
                    (SUBJECTS[key], "null", study.mean(label, kind, localisation(key, "instability")))
                    for key in ("random", "centre", "corner")
                ),
                ("ordinary, printed", "null", study.printed(label, "instability", "performer")),
                ("interpretable, print", "null", study.printed(label, "instability", "interpretable")),
            ]
            shown = [line for line in lines if defined(line[2])]
            charts.append(chart(f"{label}, {name}: instability", "lower is better", shown))
    columns = [
        column("interpretable", "interpretable CNN", "explainer"),
        column("t_icnn", "interpretable, printed", "printed"),
        column("top", "ordinary, top layer", "performer"),
        column("t_top", "ordinary, printed", "printed"),
        *(column(key, SUBJECTS[key], "null") for key in ("random", "centre", "corner")),
        column("error", "error %, interpretable", "explainer"),
        column("t_interpretable", "error %, interpretable, printed", "printed"),
        column("own_error", "error %, ordinary", "performer"),
        column("t_ordinary", "error %, ordinary, printed", "printed"),
    ]
    lead = "Location instability of the inserted layer before its mask, and the error, category against background: "
    lead += "lower is better in all columns."
    blocks.append(
        {"key": "icnn", "title": "Interpretable CNNs", "lead": lead, "columns": columns, "rows": rows},
    )
    for kind, name in kinds.items():
        if present(study, kind):
            subjects = {"interpretable": "interpretable CNN", "top": "ordinary, top layer", "random": "null: random"}
            block = beside_block(
                study, kind, subjects, f"What instability cannot see: {name}", "On the same photos.", localisation
            )
            blocks.append(block | {"key": f"beside-{kind}"})
            layers = {"interpretable": "interpretable CNN", "top": "ordinary, top layer"}
            printed_of: dict[Subject, str] = {
                "performer": "ordinary, printed",
                "interpretable": "interpretable, printed",
            }
            regions = region_block(study, kind, layers, printed_of=printed_of)
            blocks.append(regions | {"title": f"{regions['title']}: {name}"})
    built = table(blocks, charts, verdicts, study, published("instability", subject="interpretable", setting=None))
    again = RERUN_OF_RELEASED_CODE
    built["remarks"].append(
        f"Others ran the released code on {again['category']} with {again['network']} and got instability "
        f"{again['instability']} and an error of {again['error_percent']} %, where the paper prints 0.069."
    )
    return built


def _rival(name: str, score: str) -> Getter:
    def get(content: Content) -> Cell | None:
        found: Cell | None = content["rivals"].get(name, {}).get(score)
        return found

    return get


def _variance_explained(content: Content) -> Cell | None:
    lost = fidelity("reconstruction", "relative_error", "last")(content)
    if lost is None or lost["value"] is None:
        return None
    low, high = lost["interval"]
    ends = [None if end is None else 1 - end for end in (high, low)]
    return {"value": 1 - lost["value"], "interval": ends, "n": lost["n"], "unit": lost["unit"]}


def rival_table(study: Study) -> dict[str, Any]:
    """Return how rivals on the same maps compare with the explainer."""
    blocks, charts, verdicts = [], [], []
    everyone: list[str] = []
    for label in present(study, RIVALS):
        contents = [content for (p, _, _, kind), content in study.scores.items() if (p, kind) == (label, RIVALS)]
        names = list(dict.fromkeys(name for content in contents for name in content["rivals"]))
        everyone += [name for name in names if name not in everyone]
        of_explainer: dict[str, Getter] = {
            "variance_explained": _variance_explained,
            "agreement_top1": fidelity("reconstruction", "agreement_top1"),
            "error_increase_points": fidelity("reconstruction", "error_increase_points"),
        }
        rows = []
        for subject, name in SUBJECTS.items():
            cells: dict[str, Cell | None] = {
                score: study.mean(label, EXPLAINER, localisation(subject, score)) for score in BESIDE
            }
            if subject == "explainer":
                cells |= {score: study.mean(label, EXPLAINER, get) for score, get in of_explainer.items()}
            rows.append(row(name, cells, strong=subject == "explainer"))
            if subject == "explainer":
                rows += [
                    row(
                        rival,
                        {score: study.mean(label, RIVALS, _rival(rival, score)) for score in (*BESIDE, *FAITHFUL)},
                    )
                    for rival in names
                ]
        columns = known_columns(BESIDE | FAITHFUL, rows)
        lead = "Rivals are fitted on the tap's maps of the category's training photos; all are measured on the same "
        lead += "held-out photos, and every reconstruction of the tap goes through the performer's own upper layers."
        blocks.append({"key": f"rivals-{label}", "title": label, "lead": lead, "columns": columns, "rows": rows})
        for score, title, better in (
            ("instability", "instability", "lower"),
            ("consistency", "consistency", "higher"),
            ("variance_explained", "variance explained", "higher"),
        ):
            lines = [
                (str(r["label"]), "explainer" if r["strong"] else _role(str(r["label"]), names), r["cells"].get(score))
                for r in rows
            ]
            shown = [(name, role, cell) for name, role, cell in lines if cell is not None and defined(cell)]
            charts.append(chart(f"{label}: {title}", f"{better} is better", shown))
        verdicts += _rival_verdicts(label, rows, names)
    layers = {key: SUBJECTS[key] for key in ("explainer", "top", "tap")}
    blocks.append(region_block(study, EXPLAINER, layers, rivals=(RIVALS, everyone)))
    return table(blocks, charts, verdicts, study, ())


def _role(label: str, rivals: Sequence[str]) -> str:
    return "performer" if label in rivals or label.startswith("performer") else "null"


def _rival_verdicts(label: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Say which rival is better than the explainer at what."""
    cells = {str(r["label"]): r["cells"] for r in rows}
    ours = cells["explainer"]
    found = []
    for score, title, sign in (
        ("instability", "Instability", -1),
        ("consistency", "Consistency", 1),
        ("variance_explained", "Fidelity", 1),
    ):
        own = ours.get(score)
        known = {name: cells[name].get(score) for name in names if name in cells}
        values = {name: cell["value"] for name, cell in known.items() if cell is not None and cell["value"] is not None}
        if own is None or own["value"] is None or not values:
            found.append(verdict(None, title, f"{label}: not measured for both."))
            continue
        best = max(values, key=lambda name: sign * values[name])
        better = sign * own["value"] >= sign * values[best]
        words = f"{label}: explainer {digits(own['value'])}, best rival {digits(values[best])} ({best})."
        found.append(verdict(better, title, words + ("" if better else " The explainer is worse.")))
    return found
