"""Labels, the selection of relevant features, and its linear read-out."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from partlens.errors import ImageError, InputError
from partlens.selection import inner_products, relevance
from partlens.selection.descriptors import normalised
from partlens.selection.lasso import mu_lasso
from partlens.selection.record import FeatureIndex
from partlens.selection.relevance import (
    LabelMatrix,
    Selection,
    label_matrix,
    select_relevant,
    told_right,
    with_shuffled_labels,
)
from partlens.selection.responses import stream_responses

as_performer = runpy.run_path(str(Path(__file__).with_name("made_networks.py")))["as_performer"]
NAMES = ("fox", "cat", "cow")


def nothing(_: str) -> None:
    return None


def planted(images: int, seed: int) -> tuple[Tensor, LabelMatrix, FeatureIndex]:
    """Three classes, two features planted for each, in descriptors of 3 layers."""
    rng = np.random.default_rng(seed)
    index = FeatureIndex(("a", "b", "c"), (20, 20, 30))
    kind = rng.integers(0, 3, images)
    energy = rng.gamma(0.5, 1.0, (images, index.size))
    for j in range(3):
        for feature in (index.feature("a", j), index.feature("c", 5 + j)):
            energy[kind == j, feature] += rng.gamma(9.0, 2.0, int((kind == j).sum()))
    x, _ = normalised(torch.from_numpy(energy), index)
    return x, LabelMatrix(torch.from_numpy(np.eye(3)[kind]), NAMES, (2, None, 0)), index


def test_labels_have_a_column_for_every_class_that_occurs() -> None:
    outputs = {"cow": 2, "cat": 1}
    found = label_matrix(["cat", "cow", "fox", "cow"], outputs.get, ("cow", "cat", "emu", "cow"))
    assert found.classes == ("cow", "cat")
    assert found.outputs == (2, 1)
    assert found.matrix.tolist() == [[0, 1], [1, 0], [0, 0], [1, 0]]
    assert label_matrix(["cow", "cat"], nothing).classes == ("cat", "cow")
    assert label_matrix(["10", "2"], int).outputs == (10, 2)  # numbers are sorted as names
    with pytest.raises(ImageError, match="an image of emu"):
        label_matrix(["cat"], nothing, ("emu",))
    with pytest.raises(ImageError, match="a category for every image, got none for images 1"):
        label_matrix(["cat", ""], nothing)


def test_the_selection_names_the_planted_features() -> None:
    x, labels, index = planted(400, 0)
    found = select_relevant(x, labels, index, 10.0)
    assert found.classes == NAMES
    for j in range(3):
        relevant = found.relevant(j)
        assert {place[:2] for place in relevant[:2]} == {("a", j), ("c", 5 + j)}
        assert [w for *_, w in relevant] == sorted((w for *_, w in relevant), reverse=True)
        assert len(relevant) == int((found.solution.weights[:, j] != 0).sum())
    assert torch.equal(found.weights, found.solution.weights)
    with pytest.raises(InputError, match="70 features of the index, got 69"):
        select_relevant(x[:, 1:], labels, index)


def test_signed_weights_are_ordered_by_their_size_and_equal_ones_by_their_place() -> None:
    index = FeatureIndex(("a", "b"), (3, 3))
    solution = mu_lasso(np.eye(6), np.eye(6)[:, :1], 1.0)
    weights = torch.tensor([[0.5, -2.0, 0.0, 2.0, -0.5, 1.0]], dtype=torch.float64).T
    found = Selection(replace(solution, weights=weights), index, ("x",))
    assert found.relevant(0) == [("a", 1, -2.0), ("b", 0, 2.0), ("b", 2, 1.0), ("a", 0, 0.5), ("b", 1, -0.5)]


def test_signs_reach_the_solver() -> None:
    x, labels, index = planted(200, 0)
    assert float(select_relevant(x, labels, index, 3.0).weights.min()) >= 0
    assert float(select_relevant(x, labels, index, 3.0, nonnegative=False).weights.min()) < 0
    assert float(select_relevant(x, labels, index, 0.5).solution.norm.max()) == pytest.approx(0.5)


def test_the_readout_takes_the_largest_sum() -> None:
    """Worked by hand: the sums are (2, 3), (2, 1) and (0, 0), where the first of equals wins."""
    index = FeatureIndex(("a",), (2,))
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = Selection(replace(mu_lasso(np.eye(2), np.eye(2)), weights=weights), index, ("x", "y"))
    x = torch.tensor([[2.0, 3.0], [2.0, 1.0], [0.0, 0.0]])
    assert told_right(found, x, torch.tensor([1, 1, 0])).tolist() == [True, False, True]


def test_many_images_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, index = planted(50, 0)
    found, truth = select_relevant(x, labels, index), labels.matrix.argmax(1)
    whole = told_right(found, x, truth)
    monkeypatch.setattr(inner_products, "BLOCK_BYTES", 1)
    monkeypatch.setattr(inner_products, "_FEWEST_ROWS", 7)
    assert torch.equal(told_right(found, x, truth), whole)


def test_T8_shuffled_labels_fall_to_chance() -> None:
    x, labels, index = planted(600, 0)
    held, truth, _ = planted(600, 1)
    found = select_relevant(x, labels, index, 10.0)
    null = with_shuffled_labels(found, x, labels, torch.Generator().manual_seed(0))
    columns = truth.matrix.argmax(1)
    assert float(told_right(found, held, columns).double().mean()) > 0.95
    assert abs(float(told_right(null, held, columns).double().mean()) - 1 / 3) < 0.08
    again = with_shuffled_labels(found, x, labels, torch.Generator().manual_seed(0))
    other = with_shuffled_labels(found, x, labels, torch.Generator().manual_seed(1))
    assert torch.equal(null.weights, again.weights)
    assert not torch.equal(null.weights, other.weights)


def test_the_null_has_the_bound_and_the_signs_of_the_selection() -> None:
    x, labels, index = planted(120, 0)
    found = select_relevant(x, labels, index, 0.7, nonnegative=False)
    null = with_shuffled_labels(found, x, labels, torch.Generator().manual_seed(0)).solution
    assert (null.mu, null.nonnegative) == (0.7, False)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    assert torch.equal(null.weights, mu_lasso(x, labels.matrix[order], 0.7, nonnegative=False).weights)


def test_from_images_to_relevant_features(tiny, few_flowers, tmp_path) -> None:
    responses = stream_responses(tiny, few_flowers, out=tmp_path)
    labels = label_matrix(few_flowers.categories, nothing)
    x = torch.from_numpy(np.array(responses.descriptor))
    found = select_relevant(x, labels, responses.index)
    assert found.classes == labels.classes == ("petal-blue", "petal-red")
    assert found.solution.converged.all()
    assert float(told_right(found, x, labels.matrix.argmax(1)).double().mean()) > 0.8


def test_held_out_folds_choose_the_smallest_bound_that_tells_the_classes() -> None:
    x, labels, index = planted(120, 3)
    mu, tried = relevance.choose_mu(x, labels, index, torch.Generator().manual_seed(0))
    accuracy = dict(tried)
    best = max(accuracy.values())
    assert accuracy[mu] >= best - (best * (1 - best) / 120) ** 0.5
    assert all(accuracy[other] < accuracy[mu] or other >= mu for other in accuracy)
    again = relevance.choose_mu(x, labels, index, torch.Generator().manual_seed(0))
    assert again == (mu, tried)
