"""The papers' printed figures of explainer networks and interpretable CNNs, as data.

CVPR 2018: "Interpretable Convolutional Neural Networks" (arXiv 1710.00935). ICLR 2020: "Quantitatively Disentangling
and Understanding Part Information in CNNs" (submission; the explainer network of arXiv 1805.07468). What a row is
compared with here is never exactly what was measured there: see :data:`DIFFERENCES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

Subject = Literal["performer", "tap", "explainer", "interpretable", "explainer+cls"]
Measure = Literal["instability", "p", "error_percent", "accuracy_percent", "part_interpretability"]

ANIMALS, VOC, CUB = "ILSVRC Animal-Part", "VOC Part", "CUB-200-2011"

_ANIMALS = """
goldfish bird frog turtle lizard koala lobster dog fox cat lion tiger bear rabbit hamster squirrel
horse zebra swine hippopotamus cattle sheep antelope camel otter armadillo monkey elephant red_panda giant_panda
"""
ANIMAL_CATEGORIES = tuple(_ANIMALS.split())
VOC_CATEGORIES = ("bird", "cat", "cow", "dog", "horse", "sheep")

DIFFERENCES = (
    "The papers trained their performers on each category; a network trained on ImageNet is another performer.",
    "They measured all annotated photos of a category, those of the training among them; here photos are held out.",
    "The explainer papers print no table on ILSVRC Animal-Part, only on VOC Part and CUB.",
)
"""Why the printed figures and ours are neighbours and not twins."""


@dataclass(frozen=True)
class PublishedRow:
    """One printed row.

    Attributes:
        source: paper and table.
        data: data set.
        setting: ``single`` (one category against the rest), ``multi`` (logistic), ``multi softmax``.
        network: as printed.
        subject: whose figure: the performer's top convolution, its tap (``relu4``, ``relu5_2``), the explainer, the
            interpretable CNN, or the explainer trained on the classification loss.
        measure: what was measured; instability as a share of the diagonal, errors and accuracies in per cent.
        values: per category, where printed.
        average: the printed average, which need not be the mean of the printed values.
    """

    source: str
    data: str
    setting: str
    network: str
    subject: Subject
    measure: Measure
    average: float
    values: Mapping[str, float] = field(default_factory=dict)

    def mean_over(self, categories: Iterable[str]) -> float | None:
        """Return the mean over those of the categories that were printed; ``None`` where there is none of them."""
        found = [self.values[name] for name in categories if name in self.values]
        return fmean(found) if found else None


def _row(
    source: str,
    data: str,
    network: str,
    subject: Subject,
    figures: str,
    *,
    measure: Measure = "instability",
    setting: str = "single",
) -> PublishedRow:
    """Read ``"value value ... | average"`` in the data set's order of categories, or the average alone."""
    printed, _, average = figures.rpartition("|")
    numbers = [float(text) for text in printed.split()]
    names = ANIMAL_CATEGORIES if data == ANIMALS else VOC_CATEGORIES
    values = dict(zip(names, numbers, strict=True)) if numbers else {}
    return PublishedRow(source, data, setting, network, subject, measure, float(average), values)


# Location instability

_CVPR_3: tuple[tuple[str, Subject, str], ...] = (
    (
        "AlexNet",
        "performer",
        """.161 .167 .152 .153 .175 .128 .123 .144 .143 .148 .137 .142 .144 .148 .128 .149 .152 .154 .141 .141 .144 .155
        .147 .153 .159 .160 .139 .125 .140 .125 | .146""",
    ),
    (
        "AlexNet",
        "interpretable",
        """.084 .095 .090 .107 .097 .079 .077 .093 .087 .095 .084 .090 .095 .095 .077 .095 .098 .084 .091 .089 .097 .101
        .085 .102 .104 .095 .090 .085 .084 .073 | .091""",
    ),
    (
        "VGG-16",
        "performer",
        """.153 .156 .144 .150 .170 .127 .126 .143 .137 .148 .139 .144 .143 .146 .125 .150 .150 .153 .141 .140 .140 .150
        .144 .149 .154 .163 .136 .129 .143 .125 | .144""",
    ),
    (
        "VGG-16",
        "interpretable",
        """.076 .099 .086 .115 .113 .070 .084 .077 .069 .086 .067 .097 .081 .079 .066 .065 .106 .077 .094 .083 .102 .097
        .091 .105 .093 .100 .074 .084 .067 .063 | .085""",
    ),
    (
        "VGG-M",
        "performer",
        """.161 .166 .151 .153 .176 .128 .125 .145 .145 .150 .140 .145 .144 .150 .128 .150 .151 .158 .140 .140 .143 .155
        .146 .154 .160 .161 .140 .126 .142 .127 | .147""",
    ),
    (
        "VGG-M",
        "interpretable",
        """.088 .088 .089 .108 .099 .080 .074 .090 .082 .103 .079 .089 .101 .097 .082 .095 .095 .080 .095 .084 .092 .094
        .077 .104 .102 .093 .086 .087 .089 .068 | .090""",
    ),
    (
        "VGG-S",
        "performer",
        """.158 .166 .149 .151 .173 .127 .124 .143 .142 .148 .138 .142 .143 .148 .128 .146 .149 .155 .139 .140 .141 .155
        .143 .154 .158 .157 .140 .125 .139 .125 | .145""",
    ),
    (
        "VGG-S",
        "interpretable",
        """.087 .101 .093 .107 .096 .084 .078 .091 .082 .101 .082 .089 .097 .091 .076 .098 .096 .080 .092 .088 .094 .101
        .077 .102 .105 .094 .090 .086 .078 .072 | .090""",
    ),
)
_VOC_SINGLE: tuple[tuple[str, Subject, str], ...] = (
    ("AlexNet", "performer", ".153 .131 .141 .128 .145 .140 | .140"),
    ("AlexNet", "tap", ".152 .130 .140 .127 .143 .139 | .139"),
    ("AlexNet", "explainer", ".104 .089 .101 .083 .098 .103 | .096"),
    ("AlexNet", "interpretable", ".090 .089 .090 .088 .087 .088 | .088"),
    ("VGG-M", "performer", ".152 .132 .143 .130 .145 .141 | .141"),
    ("VGG-M", "tap", ".148 .127 .138 .126 .140 .137 | .136"),
    ("VGG-M", "explainer", ".106 .088 .101 .088 .097 .101 | .097"),
    ("VGG-M", "interpretable", ".086 .094 .090 .087 .084 .084 | .088"),
    ("VGG-S", "performer", ".152 .131 .141 .128 .144 .141 | .139"),
    ("VGG-S", "tap", ".148 .127 .136 .125 .139 .137 | .135"),
    ("VGG-S", "explainer", ".110 .085 .098 .085 .091 .096 | .094"),
    ("VGG-S", "interpretable", ".089 .092 .092 .087 .086 .088 | .089"),
    ("VGG-16", "performer", ".145 .133 .146 .127 .143 .143 | .139"),
    ("VGG-16", "tap", ".151 .128 .145 .124 .146 .146 | .140"),
    ("VGG-16", "explainer", ".095 .089 .097 .085 .087 .089 | .090"),
    ("VGG-16", "interpretable", ".101 .098 .105 .074 .097 .100 | .096"),
    ("ResNet-101", "performer", ".147 .134 .142 .127 .144 .142 | .139"),
    ("ResNet-101", "explainer", ".098 .088 .099 .088 .088 .093 | .092"),
    ("ResNet-152", "performer", ".148 .134 .143 .128 .145 .142 | .140"),
    ("ResNet-152", "explainer", ".097 .088 .098 .089 .088 .092 | .092"),
)
_VOC_SOURCES: dict[Subject, str] = {
    "performer": "ICLR 2020, Table 2",
    "tap": "ICLR 2020, Table 8",
    "explainer": "ICLR 2020, Table 2",
    "interpretable": "CVPR 2018, Table 4",
}
_VOC_MULTI = (  # ICLR 2020, Table 2: average over categories
    ("VGG-M", ".135", ".097"),
    ("VGG-S", ".138", ".107"),
    ("VGG-16", ".128", ".109"),
)
_CVPR_6 = (  # data, setting, network, ordinary, interpretable
    (VOC, "multi", "VGG-16", ".128", ".073"),
    (VOC, "multi", "VGG-M", ".135", ".083"),
    (VOC, "multi", "VGG-S", ".138", ".078"),
    (VOC, "multi softmax", "VGG-16", ".142", ".075"),
    (VOC, "multi softmax", "VGG-M", ".137", ".087"),
    (VOC, "multi softmax", "VGG-S", ".138", ".082"),
    (ANIMALS, "multi", "VGG-M", ".167", ".096"),
    (ANIMALS, "multi", "VGG-S", ".131", ".083"),
)
_CUB_INSTABILITY = (  # performer, tap, explainer (ICLR 2020, Table 4); ordinary, interpretable (CVPR 2018, Table 5)
    ("AlexNet", ".1502", ".1542", ".0906", ".150", ".070"),
    ("VGG-M", ".1476", ".1484", ".0815", ".148", ".065"),
    ("VGG-S", ".1481", ".1518", ".0704", ".148", ".073"),
    ("VGG-16", ".1373", ".1444", ".0490", ".137", ".076"),
)

# p

_P_SINGLE = (  # ICLR 2020, Table 7; its Table 3 and AAAI 2019, Table 4 swap two column heads
    ("AlexNet", ".75 .72 .69 .72 .70 .70 | .71"),
    ("VGG-M", ".81 .80 .81 .80 .81 .81 | .81"),
    ("VGG-S", ".91 .90 .90 .90 .90 .90 | .90"),
    ("VGG-16", ".88 .89 .87 .87 .86 .88 | .87"),
    ("ResNet-101", ".98 .97 .97 .97 .98 .97 | .97"),
    ("ResNet-152", ".98 .98 .98 .98 .98 .99 | .98"),
)
_P_MULTI = (("VGG-M", ".9012"), ("VGG-S", ".9270"), ("VGG-16", ".8593"))
_P_CUB = (("AlexNet", ".5810"), ("VGG-M", ".8611"), ("VGG-S", ".9533"), ("VGG-16", ".9579"))

P_ORDER = (("AlexNet",), ("VGG-M",), ("VGG-16", "VGG-S"), ("ResNet-101", "ResNet-152"))
"""Rising order of p over single-category performers of VOC (ICLR 2020, Table 7); VGG-16 and VGG-S stand level."""

# Errors

_ERRORS = (  # data, setting, network, performer, explainer, explainer+cls (ICLR 2020, Table 10)
    (VOC, "single", "AlexNet", "4.60", "8.20", "2.88"),
    (VOC, "single", "VGG-M", "3.18", "8.58", "3.40"),
    (VOC, "single", "VGG-S", "2.26", "10.97", "3.86"),
    (VOC, "single", "VGG-16", "1.34", "6.12", "1.76"),
    (VOC, "multi", "VGG-M", "6.12", "6.62", "5.22"),
    (VOC, "multi", "VGG-S", "5.95", "6.97", "5.43"),
    (VOC, "multi", "VGG-16", "2.03", "2.17", "2.49"),
    (CUB, "single", "AlexNet", "4.41", "10.98", "3.57"),
    (CUB, "single", "VGG-M", "2.66", "6.84", "2.54"),
    (CUB, "single", "VGG-S", "2.76", "8.53", "2.72"),
    (CUB, "single", "VGG-16", "1.09", "6.04", "0.90"),
)
_ERRORS_RESNET = (("ResNet-101", "1.67", "3.19"), ("ResNet-152", ".71", "1.55"))
# Table 5's caption says multi-category; its performers' errors are the single-category averages of Table 6.
_ICLR_6: tuple[tuple[str, Subject, str], ...] = (
    ("ResNet-101", "performer", ".50 2.00 .51 1.50 5.00 .51 | 1.67"),
    ("ResNet-101", "interpretable", ".50 2.75 .51 3.00 12.50 8.10 | 4.56"),
    ("ResNet-152", "performer", ".25 .75 0 1.75 1.26 .25 | .71"),
    ("ResNet-152", "interpretable", "2.24 2.25 8.38 2.50 9.09 6.06 | 5.09"),
)
_CVPR_7_SINGLE = (  # network, then ordinary and interpretable on ILSVRC, VOC, CUB
    ("AlexNet", "96.28 95.38", "95.40 93.93", "95.59 95.35"),
    ("VGG-M", "97.34 95.77", "96.82 94.17", "97.34 96.03"),
    ("VGG-S", "97.62 95.64", "97.74 95.47", "97.24 95.82"),
    ("VGG-16", "98.58 96.67", "98.66 95.39", "98.91 96.51"),
)
_CVPR_7_MULTI = (  # data, setting, network, ordinary, interpretable
    (ANIMALS, "multi", "VGG-M", "96.73", "97.99"),
    (ANIMALS, "multi", "VGG-S", "96.98", "98.72"),
    (VOC, "multi", "VGG-M", "93.88", "96.19"),
    (VOC, "multi", "VGG-S", "94.05", "96.78"),
    (VOC, "multi", "VGG-16", "97.97", "98.50"),
    (VOC, "multi softmax", "VGG-M", "81.93", "88.03"),
    (VOC, "multi softmax", "VGG-S", "78.15", "86.13"),
    (VOC, "multi softmax", "VGG-16", "89.71", "91.60"),
)

# Part interpretability: the mean over filters of max_k P(IoU of region and part k > 0.2)

_CVPR_1 = (
    ("AlexNet", ".348", ".654"),
    ("VGG-16", ".495", ".770"),
    ("VGG-M", ".357", ".708"),
    ("VGG-S", ".257", ".390"),
)
_CVPR_2 = (  # network, logistic ordinary and interpretable, softmax ordinary and interpretable
    ("VGG-16", ".710", ".938", ".723", ".897"),
    ("VGG-M", ".478", ".770", ".502", ".734"),
    ("VGG-S", ".479", ".572", ".435", ".601"),
)


_OF_ERRORS: tuple[Subject, ...] = ("performer", "explainer", "explainer+cls")
_OF_CVPR: tuple[Subject, ...] = ("performer", "interpretable")


def _instability() -> list[PublishedRow]:
    rows = [_row("CVPR 2018, Table 3", ANIMALS, net, of, text) for net, of, text in _CVPR_3]
    rows += [_row(_VOC_SOURCES[of], VOC, net, of, text) for net, of, text in _VOC_SINGLE]
    for net, performer, explainer in _VOC_MULTI:
        rows.append(_row("ICLR 2020, Table 2", VOC, net, "performer", performer, setting="multi"))
        rows.append(_row("ICLR 2020, Table 2", VOC, net, "explainer", explainer, setting="multi"))
    for data, setting, net, ordinary, interpretable in _CVPR_6:
        rows.append(_row("CVPR 2018, Table 6", data, net, "performer", ordinary, setting=setting))
        rows.append(_row("CVPR 2018, Table 6", data, net, "interpretable", interpretable, setting=setting))
    for net, performer, tap, explainer, ordinary, interpretable in _CUB_INSTABILITY:
        rows.append(_row("ICLR 2020, Table 4", CUB, net, "performer", performer))
        rows.append(_row("ICLR 2020, Table 4", CUB, net, "tap", tap))
        rows.append(_row("ICLR 2020, Table 4", CUB, net, "explainer", explainer))
        rows.append(_row("CVPR 2018, Table 5", CUB, net, "performer", ordinary))
        rows.append(_row("CVPR 2018, Table 5", CUB, net, "interpretable", interpretable))
    return rows


def _p() -> list[PublishedRow]:
    source = "ICLR 2020, Table 7"
    rows = [_row(source, VOC, net, "explainer", text, measure="p") for net, text in _P_SINGLE]
    rows += [_row(source, VOC, net, "explainer", text, measure="p", setting="multi") for net, text in _P_MULTI]
    return rows + [_row(source, CUB, net, "explainer", text, measure="p") for net, text in _P_CUB]


def _errors() -> list[PublishedRow]:
    rows = []
    for data, setting, net, *figures in _ERRORS:
        for of, text in zip(_OF_ERRORS, figures, strict=True):
            rows.append(_row("ICLR 2020, Table 10", data, net, of, text, measure="error_percent", setting=setting))
    for net, performer, explainer in _ERRORS_RESNET:
        rows.append(_row("ICLR 2020, Table 5", VOC, net, "performer", performer, measure="error_percent"))
        rows.append(_row("ICLR 2020, Table 5", VOC, net, "explainer", explainer, measure="error_percent"))
    for net, of, text in _ICLR_6:
        rows.append(_row("ICLR 2020, Table 6", VOC, net, of, text, measure="error_percent"))
    return rows


def _accuracies() -> list[PublishedRow]:
    pairs = [
        (data, "single", net, *text.split())
        for net, *texts in _CVPR_7_SINGLE
        for data, text in zip((ANIMALS, VOC, CUB), texts, strict=True)
    ]
    rows = []
    for data, setting, net, ordinary, interpretable in (*pairs, *_CVPR_7_MULTI):
        for of, text in zip(_OF_CVPR, (ordinary, interpretable), strict=True):
            rows.append(_row("CVPR 2018, Table 7", data, net, of, text, measure="accuracy_percent", setting=setting))
    return rows


def _interpretability() -> list[PublishedRow]:
    figures = [("CVPR 2018, Table 1", "single", net, a, b) for net, a, b in _CVPR_1]
    for net, ordinary, interpretable, softmax_ordinary, softmax_interpretable in _CVPR_2:
        figures.append(("CVPR 2018, Table 2", "multi", net, ordinary, interpretable))
        figures.append(("CVPR 2018, Table 2", "multi softmax", net, softmax_ordinary, softmax_interpretable))
    rows = []
    for source, setting, net, ordinary, interpretable in figures:
        for of, text in zip(_OF_CVPR, (ordinary, interpretable), strict=True):
            rows.append(_row(source, VOC, net, of, text, measure="part_interpretability", setting=setting))
    return rows


PUBLISHED: tuple[PublishedRow, ...] = (*_instability(), *_p(), *_errors(), *_accuracies(), *_interpretability())
"""Every printed figure that a table here stands beside."""

RERUN_OF_RELEASED_CODE = {"category": "fox", "network": "VGG-16", "instability": 0.0977, "error_percent": 5.72}
"""What others got from the released code for the interpretable CNN after 50 epochs; the paper prints .069 for it."""


def published(
    measure: Measure,
    *,
    network: str | None = None,
    subject: Subject | None = None,
    data: str | None = None,
    setting: str | None = "single",
) -> tuple[PublishedRow, ...]:
    """Return the printed rows that fulfil all the given conditions.

    Example:
        >>> row = published("instability", network="AlexNet", subject="performer", data=ANIMALS)[0]
        >>> row.source, row.values["fox"], row.average
        ('CVPR 2018, Table 3', 0.143, 0.146)
    """
    return tuple(
        row
        for row in PUBLISHED
        if row.measure == measure
        and network in {None, row.network}
        and subject in {None, row.subject}
        and data in {None, row.data}
        and setting in {None, row.setting}
    )


_NETWORKS = {
    "alexnet-caffe": "AlexNet",
    "alexnet": "AlexNet",
    "vgg-m": "VGG-M",
    "vgg-s": "VGG-S",
    "vgg16": "VGG-16",
    "vgg16_bn": "VGG-16",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
}


def published_network(spec: str) -> str | None:
    """Return under which name the papers measured a network, ``None`` where they did not.

    Args:
        spec: as in ``--performers``; torchvision's AlexNet (other widths) and batch-normalised VGG-16 count as their
            namesakes.

    Example:
        >>> published_network("train:partlens_papers.performers:alexnet_caffe@convs.safetensors")
        'AlexNet'
    """
    name = spec.partition("@")[0].rpartition(":")[2]
    return _NETWORKS.get(name) or _NETWORKS.get(name.replace("_", "-"))


def published_data(categories: Iterable[str], layout: str | None = None) -> str:
    """Return which of the papers' data sets a set of categories is of.

    Args:
        categories: names in the data.
        layout: name of the recognised layout, if any (:mod:`partlens_papers.data.layouts`).
    """
    known = {"animal-part": ANIMALS, "pascal-part": VOC, "cub": CUB}
    if layout in known:
        return known[layout]
    names = set(categories) - {"background"}
    species = [name for name in names if name[:3].isdecimal() and name[3:4] == "."]  # 001.Black_footed_Albatross
    if names and (names == {"bird"} or len(species) == len(names)):
        return CUB
    voc_only = {"cow"}
    return VOC if names & voc_only and names <= set(VOC_CATEGORIES) else ANIMALS
