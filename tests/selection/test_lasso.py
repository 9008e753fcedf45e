"""The μ-lasso: certificate, hard designs, the Gram form, errors."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from partlens.errors import InputError, InputTypeError
from partlens.selection import inner_products, lasso, working_sets
from partlens.selection.inner_products import Rows
from partlens.selection.lasso import LassoSolution, NotConvergedError, mu_lasso
from partlens.selection.working_sets import OBJECTIVE_FLOOR


def referee(x: np.ndarray, labels: np.ndarray, weights: np.ndarray, mu: float, *, nonnegative: bool) -> tuple:
    """Objective and Frank-Wolfe gap of each class, from the definition."""
    x, labels = x.astype(np.float64), labels.astype(np.float64)
    rest = x @ weights - labels
    slope = 2 * x.T @ rest
    steepest = np.maximum(0, (-slope).max(0)) if nonnegative else np.abs(slope).max(0)
    return (rest**2).sum(0), (slope * weights).sum(0) + mu * steepest


def check(x: np.ndarray, labels: np.ndarray, mu: float, *, nonnegative: bool, found: LassoSolution) -> None:
    """The returned certificate is true, and says solved."""
    weights = found.weights.numpy()
    objective, gap = referee(x, labels, weights, mu, nonnegative=nonnegative)
    energy = (labels.astype(np.float64) ** 2).sum(0)
    scale = np.maximum(objective, OBJECTIVE_FLOOR * energy)
    assert found.converged.all()
    assert np.allclose(found.objective, objective, rtol=1e-9, atol=1e-12 * energy.max())
    assert np.allclose(found.gap, gap, atol=1e-9 * scale.max())
    assert (gap <= 1.01e-6 * scale + 1e-300).all()
    assert (np.abs(weights).sum(0) <= mu * (1 + 1e-6)).all()
    assert not nonnegative or weights.min() >= 0
    assert np.allclose(found.norm, np.abs(weights).sum(0))


def design(images: int, features: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sparse positive responses in five layers that sum to one, features planted for each class in three of them."""
    rng = np.random.default_rng(seed)
    energy = rng.gamma(0.4, 1.0, (images, features))
    kind = rng.integers(0, classes, images)
    blocks = np.array_split(np.arange(features), 5)
    for j in range(classes):
        for block in blocks[:3]:
            energy[kind == j, block[j % len(block)]] += rng.gamma(9.0, 4.0, int((kind == j).sum()))
    for block in blocks:
        energy[:, block] /= energy[:, block].sum(1, keepdims=True)
    return energy / np.linalg.norm(energy, axis=1, keepdims=True), np.eye(classes)[kind]


@pytest.mark.parametrize("method", ["responses", "gram"])
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("mu", [0.01, 1.0, 10.0, 300.0])
def test_the_certificate_is_true(mu, nonnegative, method) -> None:
    x, labels = design(300, 120, 4)
    found = mu_lasso(x, labels, mu, nonnegative, method=method)
    check(x, labels, mu, nonnegative=nonnegative, found=found)


def test_T6_the_objective_falls_as_mu_grows_until_the_bound_is_inactive() -> None:
    x, labels = design(300, 120, 4)
    found = [mu_lasso(x, labels, mu) for mu in (0.1, 0.5, 1, 2, 5, 10, 50)]
    for small, large in itertools.pairwise(found):
        assert (large.objective <= small.objective + 1e-9).all()
    assert found[0].constraint_active.all()
    assert not found[-1].constraint_active.any()
    assert torch.allclose(found[-1].weights, found[-2].weights, atol=1e-9)
    assert int((found[-1].weights != 0).sum(0).max()) <= 16  # a handful per class, as the authors saw


def test_T7_planted_features_have_the_weight() -> None:
    x, labels = design(1200, 272, 6)
    found = mu_lasso(x, labels, 10.0)
    for j in range(6):
        weights = found.weights[:, j]
        planted = [int(block[j]) for block in np.array_split(np.arange(272), 5)[:3]]
        assert sorted(weights.topk(3).indices.tolist()) == planted
        assert float(weights[planted].sum() / weights.sum()) >= 0.95


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("method", ["responses", "gram"])
def test_copies_and_dead_features(nonnegative, method) -> None:
    x, labels = design(200, 150, 3)
    hard = np.concatenate([x, x[:, :100], np.zeros((200, 300))], axis=1)[:, np.random.default_rng(0).permutation(550)]
    plain, found = (mu_lasso(each, labels, 5.0, nonnegative, method=method) for each in (x, hard))
    check(hard, labels, 5.0, nonnegative=nonnegative, found=found)
    assert torch.allclose(plain.objective, found.objective, rtol=2e-6)
    assert float(found.weights[~hard.any(0)].abs().max()) == 0
    again = mu_lasso(hard, labels, 5.0, nonnegative, method=method)
    assert torch.equal(found.weights, again.weights)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_exactly_collinear_layers(nonnegative) -> None:
    rng = np.random.default_rng(1)
    x = rng.gamma(0.5, 1.0, (90, 60))
    for start in range(0, 60, 20):  # without the last normalisation every layer sums to exactly 1
        x[:, start : start + 20] /= x[:, start : start + 20].sum(1, keepdims=True)
    assert np.linalg.matrix_rank(x) == 58
    labels = np.eye(3)[rng.integers(0, 3, 90)]
    for mu in (0.3, 3.0, 1000.0):
        check(x, labels, mu, nonnegative=nonnegative, found=mu_lasso(x, labels, mu, nonnegative))


@pytest.mark.parametrize(("images", "features"), [(12, 200), (200, 12), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("nonnegative", [True, False])
def test_any_shape(images, features, nonnegative) -> None:
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((images, features)), rng.integers(0, 2, (images, 3))
    for mu in (0.05, 4.0):
        check(x, labels, mu, nonnegative=nonnegative, found=mu_lasso(x, labels, mu, nonnegative))


@pytest.mark.parametrize("nonnegative", [True, False])
def test_wild_scales(nonnegative) -> None:
    rng = np.random.default_rng(3)
    x = rng.gamma(0.5, 1.0, (150, 80)) * 10.0 ** rng.uniform(-4, 4, 80)
    labels = np.eye(4)[rng.integers(0, 4, 150)]
    for mu in (0.01, 10.0):
        check(x, labels, mu, nonnegative=nonnegative, found=mu_lasso(x, labels, mu, nonnegative))


def test_many_nonzeros_are_found_and_working_sets_are_narrowed(monkeypatch) -> None:
    monkeypatch.setattr(working_sets, "_WIDE", 40)
    rng = np.random.default_rng(4)
    x, labels = rng.standard_normal((120, 300)), np.eye(2)[rng.integers(0, 2, 120)]
    found = mu_lasso(x, labels, 3.0, nonnegative=False)
    check(x, labels, 3.0, nonnegative=False, found=found)
    assert int((found.weights != 0).sum(0).max()) > 60


def test_groups_of_classes_give_the_same(monkeypatch) -> None:
    x, labels = design(200, 60, 7)
    whole = mu_lasso(x, labels, 2.0)
    monkeypatch.setattr(lasso, "_GATHER_BYTES", 1)
    assert torch.allclose(mu_lasso(x, labels, 2.0).weights, whole.weights, atol=1e-7)


def test_a_class_without_images_has_no_features() -> None:
    x, labels = design(100, 40, 3)
    labels[:, 1] = 0
    found = mu_lasso(x, labels, 10.0)
    assert float(found.weights[:, 1].abs().max()) == 0
    assert float(found.objective[1]) == float(found.gap[1]) == float(found.relative_gap[1]) == 0
    assert bool(found.converged[1])
    assert not bool(found.constraint_active[1])
    nothing = mu_lasso(np.zeros((4, 3)), np.ones((4, 2)), 1.0)
    assert float(nothing.weights.abs().max()) == 0
    assert nothing.objective.tolist() == [4.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_kinds_of_numbers(dtype) -> None:
    x, labels = design(80, 30, 2)
    rounded = torch.from_numpy(x).to(dtype)
    found = mu_lasso(rounded, torch.from_numpy(labels).bool(), 2.0)
    check(rounded.double().numpy(), labels, 2.0, nonnegative=True, found=found)
    same = mu_lasso(rounded.double().numpy(), labels.astype(np.int64), 2.0)
    assert torch.equal(found.weights, same.weights)


def test_a_memory_map_is_read_in_blocks_and_left_alone(tmp_path, monkeypatch) -> None:
    x, labels = design(90, 50, 3)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    kept = mu_lasso(mapped, labels, 2.0, method="responses")
    monkeypatch.setattr(inner_products, "BLOCK_BYTES", 1)
    monkeypatch.setattr(inner_products, "_FEWEST_ROWS", 16)
    for source in (mapped, torch.from_numpy(np.array(mapped)), Rows(mapped, range(90))):
        streamed = mu_lasso(source, labels, 2.0, method="responses")
        assert torch.allclose(streamed.weights, kept.weights, atol=1e-9)
    gram = mu_lasso(mapped, labels, 2.0, method="gram")
    assert torch.allclose(gram.weights, kept.weights, atol=1e-7)


def test_inputs_are_not_changed() -> None:
    x, labels = design(60, 30, 2)
    before = x.copy(), labels.copy()
    for method in ("responses", "gram"):
        mu_lasso(x, labels, 1.0, nonnegative=False, method=method)
    assert np.array_equal(x, before[0])
    assert np.array_equal(labels, before[1])


@pytest.mark.parametrize("tile", [1024, 7])
def test_the_gram_matrix_is_summed_in_blocks_and_tiles(tile, monkeypatch) -> None:
    monkeypatch.setattr(inner_products, "_TILE", tile)
    monkeypatch.setattr(inner_products, "BLOCK_BYTES", 1)
    monkeypatch.setattr(inner_products, "_FEWEST_ROWS", 16)
    x, labels = design(75, 33, 3)
    sums = inner_products.FromGram(x, torch.from_numpy(labels), torch.device("cpu"))
    assert np.allclose(sums.gram, x.T @ x, atol=1e-12)
    assert torch.equal(sums.gram, sums.gram.T)
    assert np.allclose(sums.cross, labels.T @ x, atol=1e-12)
    assert np.allclose(sums.label_energy, labels.sum(0))
    assert np.allclose(sums.energy, (x**2).sum(0))


def test_failure_is_an_error_unless_asked_otherwise(monkeypatch) -> None:
    x, labels = design(200, 100, 3)
    best = mu_lasso(x, labels, 0.5).objective
    monkeypatch.setattr(lasso, "_MAX_ITERATIONS", 1)
    with pytest.raises(NotConvergedError, match=r"relative gap of at most 1e-06.*class \d after 1 iterations") as error:
        mu_lasso(x, labels, 0.5)
    stopped = error.value.solution
    assert not stopped.converged.all()
    assert (stopped.norm <= 0.5 * (1 + 1e-6)).all()
    _, gap = referee(x, labels, stopped.weights.numpy(), 0.5, nonnegative=True)
    assert np.allclose(stopped.gap, gap)
    assert (stopped.objective - best <= stopped.gap + 1e-9).all()
    returned = mu_lasso(x, labels, 0.5, on_failure="return")
    assert torch.equal(returned.weights, stopped.weights)


def test_a_sharper_tolerance_is_met() -> None:
    x, labels = design(300, 120, 4)
    assert float(mu_lasso(x, labels, 10.0, tolerance=1e-11).relative_gap.max()) <= 1e-11


def test_solutions_are_frozen() -> None:
    found = mu_lasso(np.eye(2), np.eye(2), 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.mu = 2.0


def test_bad_inputs_are_named() -> None:
    x, labels = design(20, 6, 2)
    for value, shown in ((np.nan, "nan"), (np.inf, "inf")):
        bad = x.copy()
        bad[13, 4] = value
        for method in ("responses", "gram"):
            with pytest.raises(InputError, match=f"{shown} at image 13, feature 4"):
                mu_lasso(bad, labels, 1.0, method=method)
    wide = np.zeros((100, 5000))  # read in two blocks
    wide[90, 4999] = np.nan
    with pytest.raises(InputError, match="nan at image 90, feature 4999"):
        mu_lasso(wide, np.ones((100, 1)), 1.0, method="responses")
    bad = labels.copy()
    bad[3, 1] = np.nan
    with pytest.raises(InputError, match="nan at image 3, class 1"):
        mu_lasso(x, bad, 1.0)
    with pytest.raises(InputError, match="overflow"):
        mu_lasso(x * 1e200, labels, 1.0, method="responses")
    for mu in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="mu above 0"):
            mu_lasso(x, labels, mu)
    with pytest.raises(InputError, match="rows of labels"):
        mu_lasso(x, labels[:-1], 1.0)
    with pytest.raises(InputError, match="axes image, feature"):
        mu_lasso(x[0], labels, 1.0)
    with pytest.raises(InputError, match="at least one entry"):
        mu_lasso(x[:0], labels[:0], 1.0)
    for method in ("responses", "gram"):
        with pytest.raises(InputError, match="so large that their squares overflow. Scale them down"):
            mu_lasso(1e200 * np.ones((4, 2)), np.eye(4), 1.0, method=method)
    with pytest.raises(InputTypeError, match="real numbers"):
        mu_lasso(x.astype(complex), labels, 1.0)
    with pytest.raises(InputTypeError, match="torch tensor, got list"):
        inner_products.check_matrix([[1.0]], "responses", "image, feature")


def test_the_certificate_is_put_together_by_hand(monkeypatch) -> None:
    """The gap is a share of the objective, or of a thousandth of the labels' energy where the objective is smaller."""
    outcome = working_sets._Outcome(
        weights=torch.tensor([[0.5, -0.25, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64),
        objective=torch.tensor([2.0, 1e-9, 0.0], dtype=torch.float64),
        gap=torch.tensor([0.5, 0.018, 0.0], dtype=torch.float64),
        converged=torch.tensor([False, False, True]),
        iterations=7,
    )
    monkeypatch.setattr(lasso, "solve_group", lambda *_: outcome)
    labels = np.array([[2.0, 3.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = mu_lasso(np.eye(3), labels, 1.0, nonnegative=False, on_failure="return")
    assert found.relative_gap.tolist() == pytest.approx([0.5 / 2.0, 0.018 / (1e-3 * 9.0), 0.0])
    assert found.weights.tolist() == outcome.weights.T.tolist()
    assert found.norm.tolist() == [0.75, 1.0, 0.0]
    assert (found.weights != 0).sum(0).tolist() == [2, 1, 0]
    assert found.constraint_active.tolist() == [False, True, False]
    assert found.iterations == 7
    with pytest.raises(NotConvergedError, match=r"got 2 for class 1 after 7 iterations \(2 of 3 classes: 0, 1\)"):
        mu_lasso(np.eye(3), labels, 1.0)


@pytest.mark.parametrize(
    ("images", "features", "classes", "method"),
    [
        (100, 1000, 5, "responses"),
        (2000, 40, 10, "gram"),
        (10_000_000, 4000, 2, "gram"),
        (100_000, 20_000, 10, "responses"),
    ],
)
def test_the_cheaper_way_is_taken(images, features, classes, method) -> None:
    assert lasso._cheaper(images, features, classes) == method
