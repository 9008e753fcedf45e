"""The table of location instability: beside its nulls, beside what it cannot see, and beside the printed figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from partlens_papers.tables.explainer_jobs import EXPLAINER
from partlens_papers.tables.published import ANIMALS, CUB, VOC, Measure, Subject, published
from partlens_papers.tables.region_block import region_block
from partlens_papers.tables.study import Study, as_printed, localisation
from partlens_papers.tables.table_blocks import (
    BESIDE,
    ROLES,
    SUBJECTS,
    beside_block,
    cell_of,
    chart,
    column,
    defined,
    digits,
    mean_and_category_rows,
    present,
    ratio_of,
    row,
    table,
    verdict,
)
from partlens_papers.tables.table_sums import Cell, printed, ratio_cell

RATIO = "explainer / top layer, both by largest cells"


def _printed_explainers(study: Study) -> dict[str, Any]:
    rows = []
    for label in present(study, EXPLAINER):
        top, explained = localisation("top", "instability"), as_printed
        cells = {
            "performer": study.mean(label, EXPLAINER, top),
            "explainer": study.mean(label, EXPLAINER, explained),
            "ratio": ratio_of(study, label, None, EXPLAINER, explained, top),
        }
        rows.append(row(f"{label}, here", cells, strong=True))
    for data in (VOC, CUB):
        for explainer in published("instability", subject="explainer", data=data, setting=study.setting):
            of = published(
                "instability", network=explainer.network, subject="performer", data=data, setting=study.setting
            )
            performer = next(r for r in of if r.source == explainer.source)
            cells = {
                "performer": printed(performer.average, performer.source),
                "explainer": printed(explainer.average, explainer.source),
                "ratio": printed(explainer.average / performer.average, explainer.source),
            }
            rows.append(row(f"{explainer.network}, {data}", cells))
    columns = [
        column("performer", "performer, top layer", "performer", "lower"),
        column("explainer", "explainer", "explainer", "lower"),
        column("ratio", "explainer / performer", "", "lower"),
    ]
    lead = (
        "Other photos, other categories: what can be compared is the ratio, all by largest cells. Averages as printed."
    )
    return {
        "key": "printed",
        "title": "The papers' explainers on their data",
        "lead": lead,
        "columns": columns,
        "rows": rows,
    }


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Return Pearson's correlation of at least four pairs."""
    if len(pairs) < 4:
        return None
    a, b = (fmean(column) for column in zip(*pairs, strict=True))
    above = sum((x - a) * (y - b) for x, y in pairs)
    below = (sum((x - a) ** 2 for x, _ in pairs) * sum((y - b) ** 2 for _, y in pairs)) ** 0.5
    return above / below if below else None


def _performer_verdicts(study: Study, label: str, kind: str) -> list[dict[str, Any]]:
    top = study.number(label, kind, localisation("top", "instability"))
    found = []
    if top is not None:
        words = f"{label}: {digits(top)}; the papers' performers have 0.13 to 0.15 per category."
        found.append(verdict(0.125 <= top <= 0.155, "Performer as printed", words))
    network = study.networks[label] or "AlexNet"
    for line in published("instability", network=network, subject="performer", data=study.data):
        ours = {g: study.one(label, g, kind, localisation("top", "instability"))["value"] for g in study.categories}
        pairs = [(value, line.values[g]) for g, value in ours.items() if value is not None and g in line.values]
        r = _correlation(pairs)
        if r is not None:
            words = f"{label}: correlation {digits(r, 2)} with {network} over {len(pairs)} categories ({line.source})."
            found.append(verdict(r > 0.8, "Order of the categories", f"{words} Expected above 0.8."))
            break
    return found


def stability_verdicts(study: Study, label: str, kind: str, subject: str, name: str) -> list[dict[str, Any]]:
    """Say whether low instability is real, and how it stands beside the printed figures."""

    def of(which: str, score: str = "instability") -> float | None:
        return study.number(label, kind, localisation(which, score))

    value, spread, centre, corner = of(subject), of(subject, "peak_spread_cells"), of("centre"), of("corner")
    found = []
    if value is None:
        return [verdict(None, "Instability unknown", f"{label}: no photo has landmarks, so it cannot be measured.")]
    if corner is not None and spread is not None:
        met = value < corner and spread > 1
        words = f"{label}: instability {digits(value)} against {digits(corner)} of the corner null, "
        words += f"peaks spread by {digits(spread, 2)} cells (more than 1 expected)."
        found.append(verdict(met, "Neither stuck nor in the corner", words))
    if centre is not None:
        words = f"{label}: a filter that never leaves the centre scores {digits(centre)}, the {name} {digits(value)}. "
        words += "Below the centre, too." if value < centre else "Instability alone proves nothing; see what is beside."
        found.append(verdict(value < centre, "Against the centre null", words))
    line = study.printed(label, "instability", "interpretable")
    if line["value"] is not None:
        alike = of("explainer_largest") if subject == "explainer" else None
        read = value if alike is None else alike  # as in as_printed
        better = read <= line["value"]
        words = f"{label}: {digits(read)} here{'' if alike is None else ' by largest cells'}, {digits(line['value'])} "
        words += f"printed for the interpretable CNN on the same categories ({line['source']})."
        words += "" if better else f" The {name} here is worse."
        found.append(verdict(better, "Beside the interpretable CNN", words))
    return found


def printed_pairs(measure: Measure, subject: Subject) -> list[tuple[float, float]]:
    """Return the printed averages (subject, performer) of the same source, data and network, one category each.

    Example:
        >>> ratios = [explainer / performer for explainer, performer in printed_pairs("instability", "explainer")]
        >>> round(min(ratios), 3), round(max(ratios), 3)
        (0.357, 0.688)
    """
    return [
        (line.average, of.average)
        for line in published(measure, subject=subject)
        for of in published(measure, network=line.network, subject="performer", data=line.data)
        if of.source == line.source
    ]


def _ratio_verdict(study: Study, label: str) -> dict[str, Any]:
    below = localisation("top", "instability")
    ratio = ratio_cell(*study.groups(label, EXPLAINER, as_printed, below), seed=study.seed)["value"]
    theirs = [explainer / performer for explainer, performer in printed_pairs("instability", "explainer")]
    words = f"{label}: {digits(ratio, 2)} by largest cells; printed {min(theirs):.2f} to {max(theirs):.2f}."
    if ratio is not None and ratio > max(theirs):
        words += " Worse than every printed explainer."
    return verdict(None if ratio is None else ratio <= max(theirs), "Explainer against its performer", words)


def instability_table(study: Study) -> dict[str, Any]:
    """Return location instability with nulls, printed figures and what it cannot see."""
    printed_of: dict[str, tuple[Subject, str]] = {
        "printed_performer": ("performer", "performer, printed"),
        "printed_interpretable": ("interpretable", "interpretable CNN, printed"),
    }
    if study.data != ANIMALS:
        printed_of["printed_explainer"] = ("explainer", "explainer, printed")

    def cells(label: str, category: str | None) -> Mapping[str, Cell | None]:
        ours = {
            subject: cell_of(study, label, category, EXPLAINER, localisation(subject, "instability"))
            for subject in SUBJECTS
        }
        below = localisation("top", "instability")
        theirs = {k: study.printed(label, "instability", of, category) for k, (of, _) in printed_of.items()}
        return ours | {"ratio": ratio_of(study, label, category, EXPLAINER, as_printed, below)} | theirs

    order = ("explainer", *(["printed_explainer"] if "printed_explainer" in printed_of else []))
    order += ("printed_interpretable", "explainer_largest", "top", "printed_performer", "ratio", "tap", "tap_centroid")
    order += ("random", "centre", "corner")
    named = SUBJECTS | {key: name for key, (_, name) in printed_of.items()} | {"ratio": RATIO}
    roles = ROLES | dict.fromkeys(printed_of, "printed") | {"ratio": ""}
    columns = [column(key, named[key], roles.get(key, "null")) for key in order]
    main = {
        "key": "instability",
        "title": "Location instability",
        "lead": "Of held-out photos; a share of the input's diagonal. Lower is more stable, and means nothing without "
        "the next table.",
        "columns": columns,
        "rows": list(mean_and_category_rows(study, EXPLAINER, cells)),
    }
    shown = ("explainer", "explainer_largest", "top", "tap", "tap_centroid", "random", "centre")
    subjects = {key: SUBJECTS[key] for key in shown}
    beside = beside_block(
        study,
        EXPLAINER,
        subjects,
        "What instability cannot see",
        "Means over categories and seeds, on the same photos.",
        localisation,
    )
    layers = {key: SUBJECTS[key] for key in ("explainer", "top", "tap")}
    printed_regions: dict[Subject, str] = {
        "performer": "performer, printed",
        "interpretable": "interpretable CNN, printed",
    }
    regions = region_block(study, EXPLAINER, layers, printed_of=printed_regions)
    charts, verdicts = [], []
    for label in present(study, EXPLAINER):
        # Consistency needs ten photos of a landmark; instability does not stand alone where there are fewer.
        has = defined(study.mean(label, EXPLAINER, localisation("explainer", "consistency")))
        for score in ("instability", "consistency" if has else "peak_spread_cells"):
            name, better = BESIDE[score]
            lines = [
                (text, ROLES.get(key, "null"), study.mean(label, EXPLAINER, localisation(key, score)))
                for key, text in SUBJECTS.items()
            ]
            if score == "instability":
                lines += [(text, "null", study.printed(label, "instability", of)) for of, text in printed_of.values()]
            direction = f"{better} is better" if score != "peak_spread_cells" else better
            charts.append(chart(f"{label}: {name}", direction, [c for c in lines if defined(c[2])]))
        verdicts += _performer_verdicts(study, label, EXPLAINER)
        verdicts += stability_verdicts(study, label, EXPLAINER, "explainer", "explainer")
        verdicts.append(_ratio_verdict(study, label))
    return table(
        [main, beside, regions, _printed_explainers(study)],
        charts,
        verdicts,
        study,
        published("instability", setting=study.setting),
    )
