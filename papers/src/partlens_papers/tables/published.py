"""The papers' printed figures of explainer networks and interpretable CNNs, from ``published.csv``.

CVPR 2018: "Interpretable Convolutional Neural Networks" (arXiv 1710.00935). ICLR 2020: "Quantitatively Disentangling
and Understanding Part Information in CNNs" (submission; the explainer network of arXiv 1805.07468).

A line of the file is one printed number: its table, the data set, the setting (``single``: one category against the
rest; ``multi``: several, logistic; ``multi softmax``), the network as printed, whose figure it is (the ``performer``'s
top convolution, its ``tap``, the ``explainer``, the ``explainer+cls`` that learned from the classification loss, the
``interpretable`` CNN), the measure (instability as a share of the diagonal, errors and accuracies in per cent) and the
category; the line without a category is the printed average, which need not be the mean of the printed values.

The p of ICLR 2020 are of its Table 7 (its Table 3 and AAAI 2019, Table 4 swap two column heads). Table 5's caption says
several categories; its performers' errors are the averages over single categories of Table 6.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from statistics import fmean
from typing import Literal, NamedTuple

Subject = Literal["performer", "tap", "explainer", "interpretable", "explainer+cls"]
Measure = Literal["instability", "p", "error_percent", "accuracy_percent", "part_interpretability"]

ANIMALS, VOC, CUB = "ILSVRC Animal-Part", "VOC Part", "CUB-200-2011"

DIFFERENCES = (
    "The papers trained their performers on each category; a network trained on ImageNet is another performer.",
    "They measured all annotated photos of a category, those of the training among them; here photos are held out.",
    "The explainer papers print no table on ILSVRC Animal-Part, only on VOC Part and CUB.",
)
"""Why the printed figures and ours are neighbours and not twins."""

P_ORDER = (("AlexNet",), ("VGG-M",), ("VGG-16", "VGG-S"), ("ResNet-101", "ResNet-152"))
"""Rising order of p over single-category performers of VOC (ICLR 2020, Table 7); VGG-16 and VGG-S are level."""

RERUN_OF_RELEASED_CODE = {"category": "fox", "network": "VGG-16", "instability": 0.0977, "error_percent": 5.72}
"""What others got from the released code for the interpretable CNN after 50 epochs; the paper prints .069 for it."""

_NETWORKS = {
    "alexnet-caffe": "AlexNet",
    "alexnet": "AlexNet",
    "vgg-m": "VGG-M",
    "vgg-s": "VGG-S",
    "vgg16": "VGG-16",
    "vgg16-bn": "VGG-16",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
}
_LAYOUTS = {"animal-part": ANIMALS, "pascal-part": VOC, "cub": CUB}


class PublishedRow(NamedTuple):
    """One printed row; see the module for the fields. ``values`` are by category, where printed."""

    source: str
    data: str
    setting: str
    network: str
    subject: str
    measure: str
    average: float
    values: Mapping[str, float]

    def mean_over(self, categories: Iterable[str]) -> float | None:
        """Return the mean over those of the categories that were printed; ``None`` where there is none of them."""
        found = [self.values[name] for name in categories if name in self.values]
        return fmean(found) if found else None


@cache
def all_published() -> tuple[PublishedRow, ...]:
    """Return every printed row of the file."""
    averages: dict[tuple[str, str, str, str, str, str], float] = {}
    values: dict[tuple[str, ...], dict[str, float]] = {}
    text = resources.files("partlens_papers").joinpath("published.csv").read_text(encoding="utf-8")
    for source, data, setting, network, subject, measure, category, value in list(csv.reader(text.splitlines()))[1:]:
        of = (source, data, setting, network, subject, measure)
        if category:
            values.setdefault(of, {})[category] = float(value)
        else:
            averages[of] = float(value)
    return tuple(PublishedRow(*of, average, values.get(of, {})) for of, average in averages.items())


def published(
    measure: Measure,
    *,
    network: str | None = None,
    subject: str | None = None,
    data: str | None = None,
    setting: str | None = "single",
) -> tuple[PublishedRow, ...]:
    """Return the printed rows that fulfil all the given conditions.

    Example:
        >>> row = published("instability", network="AlexNet", subject="performer", data=ANIMALS)[0]
        >>> row.source, row.values["fox"], row.average
        ('CVPR 2018, Table 3', 0.143, 0.146)
    """
    wanted = {"network": network, "subject": subject, "data": data, "setting": setting, "measure": measure}
    asked = {name: value for name, value in wanted.items() if value is not None}
    return tuple(row for row in all_published() if all(getattr(row, n) == value for n, value in asked.items()))


def published_network(spec: str) -> str | None:
    """Return under which name the papers measured a network, ``None`` where they did not.

    Args:
        spec: as in ``--performers``; torchvision's AlexNet (other widths) and batch-normalised VGG-16 count as their
            namesakes.

    Example:
        >>> published_network("train:partlens_papers.performers:alexnet_caffe@convs.safetensors")
        'AlexNet'
    """
    return _NETWORKS.get(spec.partition("@")[0].rpartition(":")[2].replace("_", "-"))


def published_data(categories: Iterable[str], layout: str | None = None) -> str:
    """Return which of the papers' data sets a set of categories is of.

    Args:
        categories: names in the data.
        layout: name of the recognised layout, if any (:mod:`partlens_papers.data.layouts`).
    """
    if layout in _LAYOUTS:
        return _LAYOUTS[str(layout)]
    names = set(categories) - {"background"}
    species = [name for name in names if name[:3].isdecimal() and name[3:4] == "."]  # 001.Black_footed_Albatross
    if names and (names == {"bird"} or len(species) == len(names)):
        return CUB
    printed = {name for row in published("instability", data=VOC) for name in row.values}
    return VOC if "cow" in names and names <= printed else ANIMALS
