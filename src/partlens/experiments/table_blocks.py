"""From the jobs' scores to what a table says: rows beside printed figures, charts, and whether expectations are met."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

from partlens.experiments.explainer_jobs import CLASSIFIED, EXPLAINER, RIVALS
from partlens.experiments.published import (
    ANIMALS,
    CUB,
    P_ORDER,
    RERUN_OF_RELEASED_CODE,
    VOC,
    Measure,
    PublishedRow,
    Subject,
    published,
)
from partlens.experiments.sweep import JobResult
from partlens.experiments.table_sums import (
    INTERVALS,
    Cell,
    difference_cell,
    mean_cell,
    printed,
    ratio_cell,
    seeds_cell,
    t_cell,
    undefined,
)

Content = Mapping[str, Any]
Getter = Callable[[Content], Cell | None]

SUBJECTS = {
    "explainer": "explainer",
    "explainer_largest": "explainer, largest cells",
    "top": "performer, top layer",
    "tap": "performer, tap",
    "tap_centroid": "performer, tap, centroids",
    "random": "null: random",
    "centre": "null: centre",
    "corner": "null: corner",
}
ROLES = {
    "explainer": "explainer",
    "explainer_largest": "explainer",
    "top": "performer",
    "tap": "performer",
    "tap_centroid": "performer",
    "interpretable": "explainer",
}
RATIO = "explainer / top layer, both by largest cells"
SAME_PEAK = {"explainer_largest": ("largest", "explainer"), "tap_centroid": ("centroid", "tap")}
"""Where an evaluation keeps what is read otherwise than by default, so that like stands beside like."""
BESIDE = {
    "instability": ("instability", "lower"),
    "peak_spread_cells": ("spread of peaks, cells", "0 is stuck"),
    "consistency": ("consistency", "higher"),
    "filter_correlation": ("correlation of filters", "lower"),
    "distinct_parts": ("distinct parts", ""),
    "dead_frac": ("dead filters, share", "lower"),
}
"""What never stands alone: score, its name, and which way is better."""


def localisation(subject: str, score: str) -> Getter:
    """Return how to find a localisation score of a subject in an evaluation."""

    def get(content: Content) -> Cell | None:
        found = content["evaluation"]
        if subject in SAME_PEAK:
            reading, layer = SAME_PEAK[subject]
            scores = found.get("same_peak", {}).get(reading, {}).get(layer, {})
            otherwise: Cell | None = scores.get(score)
            return otherwise
        if subject in {"tap", "top"}:
            found = found["performer"]
        elif subject in {"random", "centre", "corner"}:
            found = found["nulls"]
        value: Cell | None = found[subject].get(score) if subject in found else None
        return value

    return get


def fidelity(*path: str) -> Getter:
    """Return how to find a number of the reconstruction in an evaluation; one that was not measured is ``None``."""

    def get(content: Content) -> Cell | None:
        found: Any = content["evaluation"]
        for name in path:
            if name == "last" and isinstance(found, Mapping):
                found = list(found.values())[-1] if found else None
            else:
                found = found.get(name) if isinstance(found, Mapping) else None
        cell: Cell | None = found
        return cell

    return get


@dataclass(frozen=True)
class Study:
    """What the jobs of a table gave.

    Attributes:
        table: which.
        scores: by (performer, category, seed, kind).
        networks: by performer, its name in the papers; ``None`` where they did not study it.
        categories: in their order.
        data: the papers' name of the data set.
        seed: of the intervals.
    """

    table: str
    scores: Mapping[tuple[str, str, int, str], Content]
    networks: Mapping[str, str | None]
    categories: tuple[str, ...]
    data: str
    seed: int

    @staticmethod
    def of(
        table: str,
        results: Sequence[JobResult],
        networks: Mapping[str, str | None],
        categories: tuple[str, ...],
        data: str,
        seed: int,
    ) -> Study:
        """Take in what finished."""
        scores = {
            (r.job.performer, r.job.category, r.job.seed, r.job.kind): r.content
            for r in results
            if r.status == "finished"
        }
        return Study(table, scores, networks, categories, data, seed)

    def found(self, performer: str, category: str, kind: str) -> list[Content]:
        """Return the results of all seeds."""
        return [c for (p, g, _, k), c in sorted(self.scores.items()) if (p, g, k) == (performer, category, kind)]

    def cells(self, performer: str, category: str, kind: str, get: Getter) -> list[Cell]:
        """Return a number of every seed, undefined ones left out."""
        found = (get(content) for content in self.found(performer, category, kind))
        return [cell for cell in found if cell is not None and cell["value"] is not None]

    def groups(self, performer: str, kind: str, *getters: Getter) -> list[list[list[float]]]:
        """Return ``[quantity][category][seed]`` of the seeds where all quantities are defined; no empty category."""
        groups: list[list[list[float]]] = [[] for _ in getters]
        for category in self.categories:
            rows = [[get(content) for get in getters] for content in self.found(performer, category, kind)]
            whole = [row for row in rows if all(cell is not None and cell["value"] is not None for cell in row)]
            if whole:
                for group, column in zip(groups, zip(*whole, strict=True), strict=True):
                    group.append([float(cell["value"]) for cell in column if cell is not None])
        return groups

    def mean(self, performer: str, kind: str, get: Getter) -> Cell:
        """Return the mean over categories and seeds; of a single result that result with its interval over photos."""
        (group,) = self.groups(performer, kind, get)
        if len(group) == 1 and len(group[0]) == 1:
            return next(cell for category in self.categories for cell in self.cells(performer, category, kind, get))
        return mean_cell(group, seed=self.seed)

    def number(self, performer: str, kind: str, get: Getter) -> float | None:
        """Return the mean alone."""
        value = self.mean(performer, kind, get)["value"]
        return None if value is None else float(value)

    def one(self, performer: str, category: str, kind: str, get: Getter) -> Cell:
        """Return a category's number over its seeds."""
        return seeds_cell(self.cells(performer, category, kind, get))

    def printed(self, performer: str, measure: Measure, subject: Subject, category: str | None = None) -> Cell:
        """Return the papers' figure for the same network and data: of a category, or of the mean over ours."""
        network = self.networks.get(performer)
        rows = published(measure, network=network, subject=subject, data=self.data) if network else ()
        for row in rows:
            if category is not None:
                if category in row.values:
                    return printed(row.values[category], row.source)
                continue
            mean = row.mean_over(self.categories) if row.values else row.average
            if mean is not None:
                return printed(mean, row.source)
        return undefined("published")


def column(key: str, label: str, role: str = "", better: str = "") -> dict[str, str]:
    """Describe a column."""
    return {"key": key, "label": label, "role": role, "better": better}


def row(label: str, cells: Mapping[str, Cell | None], *, strong: bool = False, group: str = "") -> dict[str, Any]:
    """Describe a row."""
    return {"label": label, "group": group, "strong": strong, "cells": dict(cells)}


def verdict(met: bool | None, title: str, words: str) -> dict[str, Any]:
    """Say whether an expectation is met; ``None`` where it cannot be said."""
    return {"met": met, "title": title, "words": words}


def digits(value: float | None, places: int = 3) -> str:
    """Write a number for a sentence.

    Example:
        >>> digits(0.0714), digits(None)
        ('0.071', '–')
    """
    return "–" if value is None else f"{value:.{places}f}"


def _pretty(category: str) -> str:
    return category.replace("_", " ")


def _present(study: Study, kind: str) -> list[str]:
    return [label for label in study.networks if any((p, k) == (label, kind) for p, _, _, k in study.scores)]


def _rows(
    study: Study, kind: str, cells: Callable[[str, str | None], Mapping[str, Cell | None]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each performer's mean and, of several categories, one for each."""
    for label in _present(study, kind):
        yield row(label, cells(label, None), strong=True, group=label)
        if len(study.categories) > 1:
            for category in study.categories:
                yield row(_pretty(category), cells(label, category), group=label)


def _cell(study: Study, label: str, category: str | None, kind: str, get: Getter) -> Cell:
    return study.mean(label, kind, get) if category is None else study.one(label, category, kind, get)


def as_printed(content: Content) -> Cell | None:
    """Read the explainer's instability as print and performers are read, by largest cells, where both were measured.

    An explainer that is read by centroids must not win by how it is read.
    """
    largest = localisation("explainer_largest", "instability")(content)
    return localisation("explainer", "instability")(content) if largest is None else largest


def _ratio(study: Study, label: str, category: str | None, kind: str, above: Getter, below: Getter) -> Cell:
    if category is None:
        return ratio_cell(*study.groups(label, kind, above, below), seed=study.seed)
    first, second = study.one(label, category, kind, above)["value"], study.one(label, category, kind, below)["value"]
    value = first / second if first is not None and second else None
    return {"value": value, "interval": [None, None], "n": len(study.found(label, category, kind)), "unit": "seeds"}


def _chart(title: str, direction: str, rows: Sequence[tuple[str, str, Cell]]) -> dict[str, Any]:
    shown = [{"label": label, "role": role, "cell": cell} for label, role, cell in rows]
    return {"title": title, "direction": direction, "rows": shown}


def _warnings(study: Study, kind: str) -> list[str]:
    """Return the evaluations' own warnings, joined over categories and seeds."""
    found: dict[tuple[str, str], list[str]] = {}
    for (label, category, seed, of), content in sorted(study.scores.items()):
        if of == kind:
            for text in content["evaluation"].get("warnings", ()):
                short = text.partition(" (")[0]
                found.setdefault((label, short), []).append(f"{_pretty(category)} (seed {seed})")
    return [f"{label}: {text}, in {', '.join(where)}." for (label, text), where in found.items()]


# Location instability


def _beside_block(
    study: Study, kind: str, subjects: Mapping[str, str], title: str, lead: str, getter: Callable[[str, str], Getter]
) -> dict[str, Any]:
    rows = [
        row(
            name,
            {score: study.mean(label, kind, getter(subject, score)) for score in BESIDE},
            strong=ROLES.get(subject) == "explainer",
            group=label,
        )
        for label in _present(study, kind)
        for subject, name in subjects.items()
    ]
    columns = [column(score, name, "", better) for score, (name, better) in BESIDE.items()]
    return {"key": "beside", "title": title, "lead": lead, "columns": columns, "rows": rows}


def _printed_explainers(study: Study) -> dict[str, Any]:
    rows = []
    for label in _present(study, EXPLAINER):
        top, explained = localisation("top", "instability"), as_printed
        cells = {
            "performer": study.mean(label, EXPLAINER, top),
            "explainer": study.mean(label, EXPLAINER, explained),
            "ratio": _ratio(study, label, None, EXPLAINER, explained, top),
        }
        rows.append(row(f"{label}, here", cells, strong=True))
    for data in (VOC, CUB):
        for explainer in published("instability", subject="explainer", data=data):
            of = published("instability", network=explainer.network, subject="performer", data=data)
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


def _stability_verdicts(study: Study, label: str, kind: str, subject: str, name: str) -> list[dict[str, Any]]:
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


def _instability(study: Study) -> dict[str, Any]:
    printed_of: dict[str, tuple[Subject, str]] = {
        "printed_performer": ("performer", "performer, printed"),
        "printed_interpretable": ("interpretable", "interpretable CNN, printed"),
    }
    if study.data != ANIMALS:
        printed_of["printed_explainer"] = ("explainer", "explainer, printed")

    def cells(label: str, category: str | None) -> Mapping[str, Cell | None]:
        ours = {
            subject: _cell(study, label, category, EXPLAINER, localisation(subject, "instability"))
            for subject in SUBJECTS
        }
        below = localisation("top", "instability")
        theirs = {k: study.printed(label, "instability", of, category) for k, (of, _) in printed_of.items()}
        return ours | {"ratio": _ratio(study, label, category, EXPLAINER, as_printed, below)} | theirs

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
        "rows": list(_rows(study, EXPLAINER, cells)),
    }
    shown = ("explainer", "explainer_largest", "top", "tap", "tap_centroid", "random", "centre")
    subjects = {key: SUBJECTS[key] for key in shown}
    beside = _beside_block(
        study,
        EXPLAINER,
        subjects,
        "What instability cannot see",
        "Means over categories and seeds, on the same photos.",
        localisation,
    )
    charts, verdicts = [], []
    for label in _present(study, EXPLAINER):
        # Consistency needs ten photos of a landmark; instability does not stand alone where there are fewer.
        has = _defined(study.mean(label, EXPLAINER, localisation("explainer", "consistency")))
        for score in ("instability", "consistency" if has else "peak_spread_cells"):
            name, better = BESIDE[score]
            lines = [
                (text, ROLES.get(key, "null"), study.mean(label, EXPLAINER, localisation(key, score)))
                for key, text in SUBJECTS.items()
            ]
            if score == "instability":
                lines += [(text, "null", study.printed(label, "instability", of)) for of, text in printed_of.values()]
            direction = f"{better} is better" if score != "peak_spread_cells" else better
            charts.append(_chart(f"{label}: {name}", direction, [c for c in lines if _defined(c[2])]))
        verdicts += _performer_verdicts(study, label, EXPLAINER)
        verdicts += _stability_verdicts(study, label, EXPLAINER, "explainer", "explainer")
        verdicts.append(_ratio_verdict(study, label))
    return _table([main, beside, _printed_explainers(study)], charts, verdicts, study, published("instability"))


def _defined(cell: Cell) -> bool:
    return cell["value"] is not None


# The share p


def _p(study: Study) -> dict[str, Any]:
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
            rows = published("p", network=network, data=data) if network else ()
            name = category if category is None or category in (rows[0].values if rows else ()) else ""
            value = None if not rows or name == "" else rows[0].average if name is None else rows[0].values[name]
            theirs[key] = printed(value, rows[0].source) if rows else undefined("published")
        return {
            "p": p,
            "optimum": _cell(study, label, category, EXPLAINER, fidelity("p_optimum")),
            "agreement": _cell(study, label, category, EXPLAINER, fidelity("reconstruction", "agreement_top1")),
            "error": _cell(study, label, category, EXPLAINER, fidelity("reconstruction", "relative_error", "last")),
            "increase": _cell(study, label, category, EXPLAINER, fidelity("reconstruction", "error_increase_points")),
            "instability": _cell(study, label, category, EXPLAINER, localisation("explainer", "instability")),
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
        "rows": list(_rows(study, EXPLAINER, cells)),
    }
    means = {label: cells(label, None)["p"] for label in _present(study, EXPLAINER)}
    lines = [(label, "explainer", cell) for label, cell in means.items() if cell is not None and _defined(cell)]
    known = {name for name in study.networks.values() if name}
    lines += [
        (f"{r.network}, printed", "null", printed(r.average, r.source))
        for r in published("p", data=VOC)
        if r.network in known or not known
    ]
    charts = [_chart("p", "with its interval", lines)]
    return _table([main], charts, [_order_verdict(study, means)], study, published("p", setting=None))


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


# Errors


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


def _errors(study: Study) -> dict[str, Any]:
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
            increase = _cell(study, label, category, EXPLAINER, fidelity("reconstruction", "error_increase_points"))
        found = {
            "performer": _cell(study, label, category, EXPLAINER, performer),
            "explainer": _cell(study, label, category, EXPLAINER, explained),
            "cls": _cell(study, label, category, CLASSIFIED, explained),
            "increase": increase,
            "always": _cell(study, label, category, EXPLAINER, _always),
            "agreement": _cell(study, label, category, EXPLAINER, fidelity("reconstruction", "agreement_top1")),
        }
        network = study.networks[label]
        data = CUB if study.data == CUB else VOC
        for key, subject in theirs.items():
            rows = published("error_percent", network=network, subject=subject, data=data) if network else ()
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
        "title": "Errors, category against background, in per cent",
        "lead": "By the performer's own output where it knows the category, else by a logistic head on its "
        "features. Explainer + cls learned from the classification loss instead of the reconstruction. Printed figures "
        "are averages over other categories.",
        "columns": columns,
        "rows": list(_rows(study, EXPLAINER, cells)),
    }
    charts, verdicts = [], []
    for label in _present(study, EXPLAINER):
        found = cells(label, None)
        names = {"performer": "performer", "explainer": "explainer", "cls": "explainer + cls"}
        roles = {"performer": "performer", "explainer": "explainer", "cls": "explainer"}
        lines = [(name, roles[key], found[key]) for key, name in names.items()]
        lines += [(f"{names[key]}, printed", "null", found[f"t_{key}"]) for key in names]
        shown = [(name, role, cell) for name, role, cell in lines if cell is not None and _defined(cell)]
        charts.append(_chart(f"{label}: error, %", "lower is better", shown))
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
    return _table([main], charts, verdicts, study, printed_rows)


# Interpretable CNNs


def _interpretable(study: Study) -> dict[str, Any]:
    kinds = {"icnn-published": "published loss", "icnn-released": "released loss"}
    accuracy: dict[str, Subject] = {"t_ordinary": "performer", "t_interpretable": "interpretable"}
    blocks, charts, verdicts = [], [], []
    rows = []
    for kind, name in kinds.items():
        for label in _present(study, kind):
            for category in (None, *(study.categories if len(study.categories) > 1 else ())):
                cells: dict[str, Cell | None] = {
                    key: _cell(study, label, category, kind, localisation(key, "instability"))
                    for key in ("interpretable", "top", "random", "centre", "corner")
                }
                cells["t_top"] = study.printed(label, "instability", "performer", category)
                cells["t_icnn"] = study.printed(label, "instability", "interpretable", category)
                cells["error"] = _cell(study, label, category, kind, fidelity("error_percent"))
                cells["own_error"] = _cell(study, label, category, kind, fidelity("performer_error_percent"))
                for key, subject in accuracy.items():
                    line = study.printed(label, "accuracy_percent", subject)
                    value = None if line["value"] is None or category else 100 - float(line["value"])
                    cells[key] = printed(value, line.get("source", ""))
                title = f"{label}, {name}" if category is None else _pretty(category)
                rows.append(row(title, cells, strong=category is None, group=f"{label}, {name}"))
            verdicts += _stability_verdicts(study, label, kind, "interpretable", f"interpretable CNN ({name})")
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
            shown = [line for line in lines if _defined(line[2])]
            charts.append(_chart(f"{label}, {name}: instability", "lower is better", shown))
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
        if _present(study, kind):
            subjects = {"interpretable": "interpretable CNN", "top": "ordinary, top layer", "random": "null: random"}
            block = _beside_block(
                study, kind, subjects, f"What instability cannot see: {name}", "On the same photos.", localisation
            )
            blocks.append(block | {"key": f"beside-{kind}"})
    built = _table(blocks, charts, verdicts, study, published("instability", subject="interpretable", setting=None))
    again = RERUN_OF_RELEASED_CODE
    built["remarks"].append(
        f"Others ran the released code on {again['category']} with {again['network']} and got instability "
        f"{again['instability']} and an error of {again['error_percent']} %, where the paper prints 0.069."
    )
    return built


# Rivals


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


FAITHFUL = {
    "variance_explained": ("variance of the target explained", "higher"),
    "agreement_top1": ("agreement of decisions", "higher"),
    "error_increase_points": ("error increase, points", "lower"),
}


def _rivals(study: Study) -> dict[str, Any]:
    blocks, charts, verdicts = [], [], []
    for label in _present(study, RIVALS):
        contents = [content for (p, _, _, kind), content in study.scores.items() if (p, kind) == (label, RIVALS)]
        names = list(dict.fromkeys(name for content in contents for name in content["rivals"]))
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
        columns = [column(score, name, "", better) for score, (name, better) in (BESIDE | FAITHFUL).items()]
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
            shown = [(name, role, cell) for name, role, cell in lines if cell is not None and _defined(cell)]
            charts.append(_chart(f"{label}: {title}", f"{better} is better", shown))
        verdicts += _rival_verdicts(label, rows, names)
    return _table(blocks, charts, verdicts, study, ())


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


# All together


def _table(
    blocks: Sequence[Mapping[str, Any]],
    charts: Sequence[Mapping[str, Any]],
    verdicts: Sequence[Mapping[str, Any]],
    study: Study,
    rows: Sequence[PublishedRow],
) -> dict[str, Any]:
    strangers = [label for label, network in study.networks.items() if network is None]
    remarks = [INTERVALS]
    remarks += [f"The papers did not study {label}: nothing printed stands beside it." for label in strangers]
    if study.table != "interpretable-cnn":
        remarks += _warnings(study, EXPLAINER)
    return {
        "blocks": [dict(block) for block in blocks if block["rows"]],
        "charts": [dict(chart) for chart in charts if chart["rows"]],
        "verdicts": [dict(one) for one in verdicts],
        "remarks": remarks,
        "published": [asdict(line) for line in rows],
    }


def build(study: Study) -> dict[str, Any]:
    """Make a table of what the jobs gave.

    Args:
        study: the scores; missing ones leave gaps.

    Returns:
        ``blocks`` (title, lead, columns, rows of cells), ``charts``, ``verdicts`` (met or not, in words), ``remarks``
        and the ``published`` rows.
    """
    makers: dict[str, Callable[[Study], dict[str, Any]]] = {
        "instability": _instability,
        "p": _p,
        "errors": _errors,
        "interpretable-cnn": _interpretable,
        "rivals": _rivals,
    }
    return makers[study.table](study)
