"""The printed figures: their averages, and where they are found."""

from __future__ import annotations

from statistics import fmean

import pytest

from partlens_papers.tables.published import (
    ANIMALS,
    CUB,
    P_ORDER,
    VOC,
    all_published,
    published,
    published_data,
    published_network,
)

WIDE = {  # printed averages that are not the rounded mean of the printed values, though within both roundings
    ("CVPR 2018, Table 3", "VGG-16", "interpretable"),
    ("CVPR 2018, Table 4", "AlexNet", "interpretable"),
}


def test_printed_averages_are_the_means_of_the_printed_values() -> None:
    beyond = set()
    checked = 0
    for row in all_published():
        if not row.values:
            continue
        unit = 0.001 if row.measure == "instability" else 0.01
        gap = abs(fmean(row.values.values()) - row.average)
        assert gap <= unit + 1e-9, row  # half a unit from the values, half from the average
        if gap > unit / 2 + 1e-9:
            beyond.add((row.source, row.network, row.subject))
        checked += 1
    assert checked == 8 + 20 + 6 + 4
    assert beyond == WIDE


def test_rows_are_complete_and_in_range() -> None:
    assert all(len(row.values) in ({0, 30} if row.data == ANIMALS else {0, 6}) for row in all_published())
    assert len(all_published()) == len(
        {(r.source, r.data, r.setting, r.network, r.subject, r.measure) for r in all_published()}
    )
    limits = {"instability": (0.03, 0.2), "p": (0.5, 1.0), "error_percent": (0.0, 13.0), "accuracy_percent": (75, 100)}
    for row in all_published():
        low, high = limits.get(row.measure, (0.2, 1.0))
        assert all(low <= value <= high for value in (row.average, *row.values.values())), row


def test_errors_are_what_the_other_paper_prints_as_accuracy() -> None:
    """The explainer's performers are the ordinary CNNs of CVPR 2018."""
    for error in published("error_percent", subject="performer", setting=None):
        if error.source != "ICLR 2020, Table 10":
            continue
        of = {"network": error.network, "data": error.data, "setting": error.setting}
        (accuracy,) = published("accuracy_percent", subject="performer", **of)  # type: ignore[arg-type]
        assert error.average == pytest.approx(100 - accuracy.average), error


def test_figures_of_single_categories() -> None:
    (row,) = published("instability", network="VGG-16", subject="interpretable", data=ANIMALS)
    assert (row.values["fox"], row.values["giant_panda"]) == (0.069, 0.063)
    assert row.mean_over(["fox", "elephant", "flower"]) == pytest.approx((0.069 + 0.084) / 2)
    assert row.mean_over(["flower"]) is None
    (explainer,) = published("instability", network="VGG-16", subject="explainer", data=CUB)
    assert explainer.average == 0.049
    p = {r.network: r.average for r in published("p", data=VOC)}
    means = [fmean(p[name] for name in names) for names in P_ORDER]
    assert means == sorted(means)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("partlens_papers.performers:alexnet_caffe@file.safetensors", "AlexNet"),
        ("train:torchvision:vgg16", "VGG-16"),
        ("torchvision:resnet152@a=b", "ResNet-152"),
        ("torchvision:resnet18", None),
        ("my.package:build", None),
    ],
)
def test_networks_by_their_names_here(spec: str, name: str | None) -> None:
    assert published_network(spec) == name


def test_data_sets_by_their_categories() -> None:
    assert published_data(["fox", "cat", "background"]) == ANIMALS
    assert published_data(["bird", "cat", "cow"]) == VOC
    assert published_data(["bird", "background"]) == CUB
    assert published_data(["001.Black_footed_Albatross", "002.Laysan_Albatross", "background"]) == CUB
    assert published_data([], "pascal-part") == VOC
