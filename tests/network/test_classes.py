"""A category means the output of its name; a number means one where the range fits."""

from __future__ import annotations

import pytest

from partlens.network.classes import disagreement, match

CASES: dict[str, tuple[list[str], list[str] | None, int, dict[str, int | None]]] = {
    "names, whatever their case": (
        ["Red fox", "TABBY_CAT"],
        ["tabby cat", "red_fox"],
        2,
        {"Red fox": 1, "TABBY_CAT": 0},
    ),
    "a name that two outputs have": (["crane"], ["crane", "crane"], 2, {"crane": None}),
    "a name that no output has": (["dog", "fox"], ["fox", "cat"], 2, {"dog": None, "fox": 0}),
    "names without class names": (["cat", "dog"], None, 2, {"cat": None, "dog": None}),
    "digits that are class names": (["1", "0"], ["1", "0"], 2, {"1": 0, "0": 1}),
    "digits, some of them class names": (["3", "5"], ["3", "5", "8"], 3, {"3": 0, "5": 1}),
    "numbers of outputs": (["0", "1"], None, 2, {"0": 0, "1": 1}),
    "numbers of named outputs": (["2", "0"], ["fox", "cat", "cow"], 3, {"2": 2, "0": 0}),
    "some numbers": (["1", "3"], None, 4, {"1": 1, "3": 3}),
    "labels from 1": (["1", "2"], None, 2, {"1": 0, "2": 1}),
    "labels from 1, not all there": (["2", "3"], None, 3, {"2": 1, "3": 2}),
    "labels from 1, with zeros before": (["01", "02", "03"], None, 3, {"01": 0, "02": 1, "03": 2}),
    "labels from 1, of named outputs": (["1", "2"], ["fox", "cat"], 2, {"1": 0, "2": 1}),
    "the order of folders": (["1", "10", "2"], None, 3, {"1": 0, "10": 1, "2": 2}),
    "the order of folders, with 0": (["0", "7", "30"], None, 3, {"0": 0, "30": 1, "7": 2}),
    "numbers past the end": (["0", "5", "9"], None, 2, {"0": 0, "5": None, "9": None}),
    "a number beside names": (["fox", "1", "9"], ["fox", "cat"], 2, {"fox": 0, "1": 1, "9": None}),
    "more names than outputs": (["cow"], ["fox", "cat", "cow"], 2, {"cow": None}),
    "one output": (["1"], None, 1, {"1": 0}),
    "no category": (["", ""], None, 2, {}),
}


@pytest.mark.parametrize(("categories", "names", "count", "wanted"), CASES.values(), ids=list(CASES))
def test_categories_are_matched_with_outputs(
    categories: list[str], names: list[str] | None, count: int, wanted: dict[str, int | None]
) -> None:
    found = match(categories, names, count)
    assert dict(found.outputs) == wanted
    assert all(output is None or output < count for output in found.outputs.values())


def test_the_match_is_said() -> None:
    assert match(["1", "10", "2"], None, 3).said() == (
        "categories and outputs, in the order of the names as text: 1 → 0, 10 → 1, 2 → 2"
    )
    assert match(["fox", "yeti"], ["fox"], 1).said() == "categories and outputs, by name: fox → 0; no output: yeti"
    assert not match(["yeti"], ["fox"], 1).said()


def test_what_the_network_says_otherwise_is_said() -> None:
    truth = ["1"] * 10 + ["2"] * 10
    turned = disagreement(truth, [1] * 9 + [0] + [0] * 10, {"1": 0, "2": 1})
    assert turned.startswith(
        "the network takes most photos of 1 for output 1, 2 for output 0, and 5 % of them for what"
    )
    assert not disagreement(truth, [0] * 9 + [1] + [1] * 10, {"1": 0, "2": 1})
    assert not disagreement(truth, [0] * 20, {"1": 0, "2": 1})
    assert disagreement(truth, [7] * 20, {"1": 0, "2": 1}).startswith("the network takes 0 % of the photos")
    assert not disagreement(truth, [0] * 20, {"1": None, "2": None})
