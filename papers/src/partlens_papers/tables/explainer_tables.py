"""The tables themselves: which numbers are compared with which, and what the papers lead to expect of them.

``instability``: where filters peak; ``p``: the share of part filters; ``errors``: what feeding the reconstruction back
costs, and an explainer that learns from the classification loss; ``interpretable-cnn``: the network that is trained to
have part filters; ``rivals``: other ways to take the tap apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import correlation, fmean
from typing import Any

from partlens.estimate import Estimate
from partlens.metrics.scores import REGION_READINGS
from partlens_papers.tables.blocks import (
    Block,
    Cell,
    Column,
    Get,
    Line,
    Spec,
    Study,
    Subjects,
    Verdict,
    cell,
    expect,
    here,
    long,
    printed,
    printed_cell,
    wide,
)
from partlens_papers.tables.explainer_jobs import CLASSIFIED, EXPLAINER, LOSSES, RIVALS
from partlens_papers.tables.published import (
    ANIMALS,
    CUB,
    P_ORDER,
    RERUN_OF_RELEASED_CODE,
    VOC,
    Measure,
    PublishedRow,
    published,
)
from partlens_papers.tables.scores import INTERVALS, LARGEST, Of, combined, t_interval

SUBJECTS = {
    "explainer": ("explainer", "explainer"),
    "explainer_largest": ("explainer, largest cells", "explainer"),
    "top": ("performer, top layer", "performer"),
    "tap": ("performer, tap", "performer"),
    "tap_centroid": ("performer, tap, centroids", "performer"),
    "random": ("null: random", "null"),
    "centre": ("null: centre", "null"),
    "corner": ("null: corner", "null"),
}
"""Subject to its name and role."""
PLACES = {
    "instability": ("instability", "lower"),
    "instability_all": ("… on all photos", "lower"),
    "peak_spread_cells": ("spread of peaks, cells", "0 is stuck"),
    "consistency": ("consistency", "higher"),
    "filter_correlation": ("correlation of filters", "lower"),
    "distinct_parts": ("distinct parts", ""),
    "dead_frac": ("dead filters, share", "lower"),
    "silent_frac": ("empty maps, share", "lower"),
}
"""What instability is never shown without: score, its name, and which way is better."""
FAITHFUL = {
    "variance_explained": ("variance of the target explained", "higher"),
    "agreement_top1": ("agreement of decisions", "higher"),
    "error_increase_points": ("error increase, points", "lower"),
}
REGIONS = {f"regions_{key}": (name, "higher") for key, name in REGION_READINGS.items()}
_REGIONS_LEAD = (
    "Share of photos on which a filter's region overlaps a part by more than 0.2 of their union, for the part that it "
    "meets most often; mean over filters. Higher is better, if what knows nothing has less: a region that never leaves "
    "the centre, or the same filters' regions on other photos. Print has masks of parts."
)
_BESIDE = "What instability cannot see"

Built = tuple[list[Block], list[Verdict], Sequence[PublishedRow]]


def _of(subject: str, score: str = "instability", kind: str = EXPLAINER) -> Of:
    return Of(kind, subject, score)


def _as_printed(study: Study, label: str) -> Of:
    """Read the explainer as print and performers are read, by largest cells, where that was measured.

    An explainer that is read by centroids must not win by how it is read.
    """
    largest = _of("explainer_largest")
    return largest if math.isfinite(study.number(label, largest)) else _of("explainer")


def _named(*subjects: str) -> list[tuple[str, str, str]]:
    return [(EXPLAINER, subject, SUBJECTS[subject][0]) for subject in subjects]


def region_block(study: Study, kind: str, main: tuple[str, str], others: Subjects) -> Block:
    """Return part interpretability (CVPR 2018, Tables 1 and 2) of layers, nulls and print; no rows where not measured.

    Args:
        study: the numbers.
        kind: of the jobs.
        main: subject and name of the layer whose regions are also measured on other photos.
        others: further layers and rivals.
    """
    moved = (kind, "other_photo", f"… {main[1]}: its regions on other photos")
    nulls = [(kind, "random", "null: random cells"), (kind, "centre", "null: centre")]
    texts = ("Part interpretability", _REGIONS_LEAD)
    found = long(study, f"regions-{kind}", texts, [(kind, *main), moved, *others, *nulls], REGIONS)
    rows: list[Line] = []
    for label in dict.fromkeys(row.group for row in found.rows):
        rows += [row for row in found.rows if row.group == label]
        network = study.networks.get(label)
        for line in published("part_interpretability", network=network, setting=None) if network else ():
            name = f"{line.subject}, printed, {line.setting}, {line.data}"
            cells = {"regions_round": printed_cell(line.average, line.source)}
            rows.append(Line(label=name, group=label, strong=False, cells=cells))
    return found.model_copy(update={"rows": tuple(rows)})


# Location instability


def instability_table(study: Study) -> Built:
    """Return location instability with nulls, printed figures and what it cannot see."""
    specs = {key: Spec(key, name, here(_of(key)), role) for key, (name, role) in SUBJECTS.items()}
    names = {"performer": "performer, printed", "interpretable": "interpretable CNN, printed"}
    names |= {} if study.data == ANIMALS else {"explainer": "explainer, printed"}
    for subject, name in names.items():
        specs[f"t_{subject}"] = Spec(f"t_{subject}", name, printed("instability", subject), "printed")
    specs["ratio"] = Spec(
        "ratio",
        "explainer / top layer, both by largest cells",
        lambda s, label, category: s.ratio(label, category, _as_printed(s, label), _of("top")),
    )
    order = "explainer t_explainer t_interpretable explainer_largest top t_performer ratio tap tap_centroid random"
    lead = "Of held-out photos; a share of the input's diagonal. Lower is more stable, and means nothing without the "
    chosen = [specs[key] for key in (*order.split(), "centre", "corner") if key in specs]
    main = wide(study, "instability", ("Location instability", f"{lead}next table."), EXPLAINER, chosen)
    shown = _named("explainer", "explainer_largest", "top", "tap", "tap_centroid", "random", "centre")
    texts = (_BESIDE, "Means over categories and seeds, on the same photos.")
    places = long(study, "beside", texts, shown, PLACES).model_copy(update={"charted": ("consistency",)})
    regions = region_block(study, EXPLAINER, ("explainer", "explainer"), _named("top", "tap"))
    verdicts = []
    _, highest = printed_range("instability", "explainer", lambda a, b: a / b)
    for label in study.tidy.performers(EXPLAINER):
        verdicts += _performer_verdicts(study, label)
        verdicts += stability_verdicts(study, label, EXPLAINER, "explainer")
        ratio = study.ratio(label, None, _as_printed(study, label), _of("top")).value
        what = "largest printed ratio to the performer, by largest cells"
        verdicts += expect("Explainer against its performer", label, ratio, highest, what)
    blocks = [main, places, regions, _printed_explainers(study)]
    return blocks, verdicts, published("instability", setting=study.setting)


def _printed_explainers(study: Study) -> Block:
    rows = []
    for label in study.tidy.performers(EXPLAINER):
        ours = _as_printed(study, label)
        cells = {
            "performer": cell(study.tidy.number(label, None, _of("top"))),
            "explainer": cell(study.tidy.number(label, None, ours)),
            "ratio": cell(study.ratio(label, None, ours, _of("top"))),
        }
        rows.append(Line(label=f"{label}, here", group="", strong=True, cells=cells))
    for line, performer in _printed_pairs("instability", "explainer", study.setting):
        values = (performer.average, line.average, line.average / performer.average)
        keys = ("performer", "explainer", "ratio")
        cells = {key: printed_cell(value, line.source) for key, value in zip(keys, values, strict=True)}
        rows.append(Line(label=f"{line.network}, {line.data}", group="", strong=False, cells=cells))
    names = {"performer": "performer, top layer", "explainer": "explainer", "ratio": "explainer / performer"}
    columns = tuple(Column(key=key, label=name, better="lower") for key, name in names.items())
    lead = "Other photos, other categories: what can be compared is the ratio, all by largest cells. As printed."
    title = "The papers' explainers on their data"
    return Block(key="printed", title=title, lead=lead, columns=columns, rows=tuple(rows))


def _printed_pairs(measure: Measure, subject: str, setting: str) -> list[tuple[PublishedRow, PublishedRow]]:
    """Return printed rows (of the subject, of the performer) of the same source, data and network."""
    return [
        (line, of)
        for data in (VOC, CUB)
        for line in published(measure, subject=subject, data=data, setting=setting)
        for of in published(measure, network=line.network, subject="performer", data=data, setting=setting)
        if of.source == line.source
    ]


def printed_range(measure: Measure, subject: str, compare: Callable[[float, float], float]) -> tuple[float, float]:
    """Return the smallest and the largest printed comparison of a subject with its performer, one category each.

    Example:
        >>> low, high = printed_range("instability", "explainer", lambda explainer, performer: explainer / performer)
        >>> round(low, 3), round(high, 3)
        (0.357, 0.688)
    """
    found = [compare(line.average, of.average) for line, of in _printed_pairs(measure, subject, "single")]
    return min(found), max(found)


def _performer_verdicts(study: Study, label: str) -> list[Verdict]:
    top = study.number(label, _of("top"))
    found = expect("Performer as printed", label, top, 0.155, "0.13 to 0.15 per category in print", 0.125)
    network = study.networks[label] or "AlexNet"
    for line in published("instability", network=network, subject="performer", data=study.data)[:1]:
        ours = {name: study.tidy.number(label, name, _of("top")).value for name in study.categories}
        both = [(value, line.values[c]) for c, value in ours.items() if math.isfinite(value) and c in line.values]
        if len(both) > 3 and all(len(set(side)) > 1 for side in zip(*both, strict=True)):
            what = f"correlation with {network} over {len(both)} categories, {line.source}"
            r = correlation(*zip(*both, strict=True))
            found += expect("Order of the categories", label, r, math.inf, what, 0.8)
    return found


def stability_verdicts(study: Study, label: str, kind: str, subject: str) -> list[Verdict]:
    """Say whether low instability is real, and how it compares with the printed figures."""
    value, centre, corner = (study.number(label, _of(s, kind=kind)) for s in (subject, "centre", "corner"))
    if math.isnan(value):
        words = f"{label}: no photo has landmarks, so it cannot be measured."
        return [Verdict(met=None, title="Instability unknown", words=words)]
    spread = study.number(label, _of(subject, "peak_spread_cells", kind))
    found = expect("Not in the corner", label, value, corner, "a peak that never leaves the corner")
    found += expect("Not stuck", label, spread, math.inf, "spread of peaks, cells", 1.0)
    found += expect("Against the centre", label, value, centre, "a peak that never leaves the centre")
    line = study.printed(label, None, "instability", "interpretable")
    read = study.number(label, _as_printed(study, label)) if subject == "explainer" else value
    what = f"printed for the interpretable CNN on the same categories, by largest cells, {line.source}"
    return found + expect("Against the interpretable CNN", label, read, line.value, what)


# p and errors


def _p(study: Study, label: str, category: str | None) -> Estimate:
    of = _of("explainer", "p")
    seeds = study.tidy.seeds(label, of)
    if category is None and len(seeds) > 1:
        return study.tidy.number(label, None, of)
    found = seeds.get(category or study.categories[0], {})
    return t_interval([found[seed].value for seed in sorted(found)])


def _printed_p(data: str) -> Get:
    def get(study: Study, label: str, category: str | None) -> Estimate:
        for row in study.lines("p", label, "explainer", data):
            return printed_cell(row.average if category is None else row.values.get(category), row.source)
        return printed_cell(None)

    return get


def share_table(study: Study) -> Built:
    """Return the share p of each network, and the fidelity of the reconstruction."""
    specs = [
        Spec("p", "p, share of part filters", _p, "explainer"),
        Spec("voc", "p, VOC, printed", _printed_p(VOC), "printed"),
        Spec("cub", "p, CUB, printed", _printed_p(CUB), "printed"),
        Spec("agreement", "agreement of decisions", here(_of("explainer", "agreement_top1")), "", "higher"),
        Spec("error", "relative error, last target", here(_of("explainer", "relative_error")), "", "lower"),
        Spec("increase", "error increase, points", here(_of("explainer", "error_increase_points")), "", "lower"),
        Spec("instability", "instability of the parts", here(_of("explainer")), "", "lower"),
    ]
    lead = (
        "p is a learned weight: it says something only as far as the reconstruction is faithful and filters are parts."
    )
    main = wide(study, "p", ("How much part filters carry", lead), EXPLAINER, specs)
    means = {row.label: row.cells["p"].value for row in main.rows if row.strong and row.cells["p"].defined}
    return [main], [_order_verdict(study, means)], published("p", setting=None)


def _order_verdict(study: Study, means: dict[str, float]) -> Verdict:
    """Say whether p rises over the networks as printed."""
    steps = {
        "/".join(networks): [value for label, value in means.items() if study.networks[label] in networks]
        for networks in P_ORDER
    }
    found = [(name, fmean(values)) for name, values in steps.items() if values]
    words = f"Printed: {' < '.join(steps)}. Here: {', '.join(f'{n} {value:.3f}' for n, value in found) or 'none'}."
    met = all(low[1] < high[1] for low, high in pairwise(found)) if len(found) > 1 else None
    return Verdict(met=met, title="Order of p", words=words)


def _increase(study: Study, label: str, category: str | None) -> Estimate:
    if category is not None:
        return study.tidy.number(label, category, _of("explainer", "error_increase_points"))
    both = _of("explainer", "error_percent"), _of("performer", "error_percent")
    return combined(study.tidy.groups(label, *both), lambda a, b: a - b, seed=study.tidy.seed)


def _printed_error(subject: str) -> Get:
    def get(study: Study, label: str, category: str | None) -> Cell:
        rows = study.lines("error_percent", label, subject, CUB if study.data == CUB else VOC)
        return printed_cell(rows[0].average, rows[0].source) if rows and category is None else printed_cell(None)

    return get


def error_table(study: Study) -> Built:
    """Return errors of performer, explainer and explainer + cls."""
    specs = []
    for key, name, kind in (
        ("performer", "performer", EXPLAINER),
        ("explainer", "explainer", EXPLAINER),
        ("explainer+cls", "explainer + cls", CLASSIFIED),
    ):
        subject = key.removesuffix("+cls")
        specs.append(Spec(key, name, here(_of(subject, "error_percent", kind)), subject))
        specs.append(Spec(f"t_{key}", f"{name}, printed", _printed_error(key), "printed"))
    specs += [
        Spec("increase", "explainer − performer, points", _increase),
        Spec("always", "always the more frequent", here(_of("always", "error_percent")), "null"),
        Spec("agreement", "agreement of decisions", here(_of("explainer", "agreement_top1")), "", "higher"),
    ]
    what = "category against background" if study.setting == "single" else "several categories told apart"
    lead = "By the performer's own output where it knows the category, else by a logistic head on its features. "
    lead += "Explainer + cls learned from the classification loss instead of the reconstruction. Printed figures are "
    lead += "averages over other categories."
    main = wide(study, "errors", (f"Errors, {what}, in per cent", lead), EXPLAINER, specs)
    verdicts = []
    for row in (row for row in main.rows if row.strong):
        cls = row.cells["explainer+cls"].value - row.cells["performer"].value
        for subject, gap in (("explainer", row.cells["increase"].value), ("explainer+cls", cls)):
            _, most = printed_range("error_percent", subject, lambda error, performer: error - performer)
            title = "What the reconstruction costs" if subject == "explainer" else "Explainer + cls near the performer"
            verdicts += expect(title, row.label, gap, most, "largest printed increase, points")
    return [main], verdicts, published("error_percent", setting=None)


# Interpretable CNNs and rivals


def _printed_cnn_error(subject: str) -> Get:
    def get(study: Study, label: str, category: str | None) -> Cell:
        line = study.printed(label, None, "accuracy_percent", subject)
        return printed_cell(100 - line.value if category is None else None, line.source)

    return get


def _cnn_specs(kind: str) -> list[Spec]:
    def of(subject: str, score: str = "instability") -> Get:
        return here(_of(subject, score, kind))

    return [
        Spec("interpretable", "interpretable CNN", of("interpretable"), "explainer"),
        Spec("t_icnn", "interpretable, printed", printed("instability", "interpretable"), "printed"),
        Spec("top", "ordinary, top layer", of("top"), "performer"),
        Spec("t_top", "ordinary, printed", printed("instability", "performer"), "printed"),
        *(Spec(key, SUBJECTS[key][0], of(key), "null") for key in ("random", "centre", "corner")),
        Spec("error", "error %, interpretable", of("interpretable", "error_percent")),
        Spec("t_error", "error %, interpretable, printed", _printed_cnn_error("interpretable")),
        Spec("own_error", "error %, ordinary", of("performer", "error_percent")),
        Spec("t_own_error", "error %, ordinary, printed", _printed_cnn_error("performer")),
    ]


def interpretable_table(study: Study) -> Built:
    """Return instability and errors of interpretable CNNs, by either loss."""
    lead = "Location instability of the inserted layer before its mask, and the error, category against background: "
    lead += "lower is better in all columns."
    mains: list[Block] = []
    blocks: list[Block] = []
    verdicts: list[Verdict] = []
    for loss in LOSSES:
        kind, name = f"icnn-{loss}", f"{loss} loss"
        mains.append(wide(study, "icnn", ("Interpretable CNNs", lead), kind, _cnn_specs(kind), f", {name}"))
        for label in study.tidy.performers(kind):
            found = stability_verdicts(study, label, kind, "interpretable")
            verdicts += [one.model_copy(update={"title": f"{one.title}, {name}"}) for one in found]
        layers = [(kind, "interpretable", "interpretable CNN"), (kind, "top", "ordinary, top layer")]
        texts = (f"{_BESIDE}: {name}", "On the same photos.")
        blocks.append(long(study, f"beside-{kind}", texts, [*layers, (kind, "random", "null: random")], PLACES))
        regions = region_block(study, kind, ("interpretable", "interpretable CNN"), layers[1:])
        blocks.append(regions.model_copy(update={"title": f"{regions.title}: {name}"}))
    main = mains[0].model_copy(update={"rows": tuple(row for block in mains for row in block.rows)})
    return [main, *blocks], verdicts, published("instability", subject="interpretable", setting=None)


def rival_table(study: Study) -> Built:
    """Return how rivals on the same maps compare with the explainer."""
    found = dict.fromkeys(row.subject for row in study.tidy.rows if row.kind == RIVALS)
    rivals = [name for name in found if not name.endswith(LARGEST)]
    others = [(RIVALS, name, name) for name in rivals]
    largest = [(RIVALS, name, name.replace(LARGEST, ", largest cells")) for name in found if name not in rivals]
    first, *layers = _named(*SUBJECTS)
    lead = "Rivals are fitted on the tap's maps of the category's training photos; all are measured on the same "
    lead += "held-out photos, and every reconstruction of the tap goes through the performer's own upper layers."
    texts = ("Other ways to take the layer apart", lead)
    main = long(study, "rivals", texts, [first, *others, *largest, *layers], PLACES | FAITHFUL)
    main = main.model_copy(update={"charted": ("instability", "consistency", "variance_explained")})
    verdicts = []
    for label in study.tidy.performers(RIVALS):
        cells = {row.label: row.cells for row in main.rows if row.group == label}
        for score, sign in (("instability", -1), ("consistency", 1), ("variance_explained", 1)):
            values = {n: cells[n][score].value for n in rivals if n in cells and cells[n][score].defined}
            if values and "explainer" in cells:
                best = max(values, key=lambda name: sign * values[name])
                own, what = cells["explainer"][score].value, f"the best rival, {best}"
                bounds = (values[best], -math.inf) if sign < 0 else (math.inf, values[best])
                verdicts += expect((PLACES | FAITHFUL)[score][0].capitalize(), label, own, bounds[0], what, bounds[1])
    regions = region_block(study, EXPLAINER, ("explainer", "explainer"), [*_named("top", "tap"), *others])
    return [main, regions], verdicts, ()


TABLES: dict[str, Callable[[Study], Built]] = {
    "instability": instability_table,
    "p": share_table,
    "errors": error_table,
    "interpretable-cnn": interpretable_table,
    "rivals": rival_table,
}


def build(study: Study) -> dict[str, Any]:
    """Make the ``blocks, verdicts, remarks, published`` of a table's record; missing jobs leave gaps."""
    blocks, verdicts, rows = TABLES[study.table](study)
    strangers = [label for label, network in study.networks.items() if network is None]
    remarks = [INTERVALS]
    remarks += [f"The papers did not study {name}: there is nothing printed to compare it with." for name in strangers]
    if study.table == "interpretable-cnn":
        again = RERUN_OF_RELEASED_CODE
        remarks.append(
            f"Others ran the released code on {again['category']} with {again['network']} and got instability "
            f"{again['instability']} and an error of {again['error_percent']} %, where the paper prints 0.069."
        )
    return {
        "blocks": tuple(block for block in blocks if block.rows),
        "verdicts": tuple(verdicts),
        "remarks": tuple(remarks),
        "published": tuple({**row._asdict(), "values": dict(row.values)} for row in rows),
    }
