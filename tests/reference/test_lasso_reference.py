"""The μ-lasso against slow solvers written from its definition, and against other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, nnls
from sklearn.linear_model import Lasso, LassoLars

from partlens.selection.lasso import mu_lasso


def onto_ball(point: np.ndarray, mu: float, *, nonnegative: bool) -> np.ndarray:
    """Euclidean projection onto {w >= 0, sum w <= mu}, or onto {||w||_1 <= mu}: shift all down, clip at zero."""
    size = np.maximum(point, 0) if nonnegative else np.abs(point)
    if size.sum() > mu:
        ordered = np.sort(size)[::-1]
        shifts = (np.cumsum(ordered) - mu) / np.arange(1, len(size) + 1)
        size = np.maximum(size - shifts[ordered > shifts][-1], 0)
    return size if nonnegative else np.sign(point) * size


def by_projected_gradient(x: np.ndarray, label: np.ndarray, mu: float, *, nonnegative: bool) -> np.ndarray:
    """min ||x w - label||² over the ball, by accelerated projected gradient steps of 1 / lambda_max, restarted."""
    gram, cross = x.T @ x, x.T @ label
    step = 1 / np.linalg.eigvalsh(gram)[-1]
    weights = np.zeros(x.shape[1])
    ahead, momentum = weights, 1.0
    for _ in range(4000):
        moved = onto_ball(ahead - step * (gram @ ahead - cross), mu, nonnegative=nonnegative)
        if (ahead - moved) @ (moved - weights) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = moved + (momentum - 1) / following * (moved - weights)
        weights, momentum = moved, following
    return weights


def cost(x: np.ndarray, label: np.ndarray, weights: np.ndarray) -> float:
    total = 0.0
    for row, wanted in zip(x, label, strict=True):
        total += (float(row @ weights) - wanted) ** 2
    return total


def layered(images: int, features: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors as the paper makes them: squared, layers that sum to one, length one."""
    rng = np.random.default_rng(seed)
    energy = np.maximum(rng.standard_normal((images, 8)) @ rng.standard_normal((8, features)), 0) ** 2
    energy += 0.2 * rng.gamma(0.5, 1.0, energy.shape)
    kind = rng.integers(0, classes, images)
    for j in range(classes):
        energy[kind == j, j] += 20.0
    for start in range(0, features, 20):
        energy[:, start : start + 20] /= energy[:, start : start + 20].sum(1, keepdims=True)
    return energy / np.linalg.norm(energy, axis=1, keepdims=True), np.eye(classes)[kind]


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("mu", [0.5, 2.0, 10.0])
def test_T5_projected_gradient(mu, nonnegative) -> None:
    x, labels = layered(150, 60, 3, seed=0)
    found = mu_lasso(x, labels, mu, nonnegative)
    for j in range(3):
        slow = by_projected_gradient(x, labels[:, j], mu, nonnegative=nonnegative)
        best = cost(x, labels[:, j], slow)
        assert float(found.objective[j]) == pytest.approx(cost(x, labels[:, j], found.weights[:, j].numpy()), rel=1e-9)
        assert float(found.objective[j]) <= best * (1 + 1e-6)  # the slow one is feasible, so it cannot be lower by more
        assert float(found.objective[j]) == pytest.approx(best, rel=1e-4)
        assert float(found.norm[j]) <= mu * (1 + 1e-6)


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0, 5.0, 10.0])
def test_T5_spgl1(mu) -> None:
    spgl1 = pytest.importorskip("spgl1", reason="the constrained solver that the paper's authors name")
    x, labels = layered(200, 80, 3, seed=1)
    found = mu_lasso(x, labels, mu, nonnegative=False)
    for j in range(3):
        theirs, *_ = spgl1.spg_lasso(x, labels[:, j], mu, opt_tol=1e-8, iter_lim=20_000)
        assert np.abs(theirs).sum() <= mu * (1 + 1e-6)
        assert float(found.objective[j]) == pytest.approx(cost(x, labels[:, j], theirs), rel=1e-4)
        assert float(found.norm[j]) <= mu * (1 + 1e-6)


def test_T6_least_squares_where_the_bound_is_inactive() -> None:
    x, labels = layered(200, 60, 3, seed=2)
    found = mu_lasso(x, labels, 1000.0)
    for j in range(3):
        weights, rest = nnls(x, labels[:, j])
        assert weights.sum() < 1000
        assert float(found.objective[j]) == pytest.approx(rest**2, rel=1e-9)
        assert np.allclose(x @ found.weights[:, j].numpy(), x @ weights, atol=1e-6)
        assert not bool(found.constraint_active[j])


@pytest.mark.parametrize("nonnegative", [True, False])
def test_slsqp_on_small_cases(nonnegative) -> None:
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, label = rng.standard_normal((7, 3)), rng.standard_normal((7, 1))
        mu = float(rng.uniform(0.1, 2.0))
        # w = u - v with u, v >= 0 is smooth; w = u where weights may not be negative
        design = x if nonnegative else np.concatenate([x, -x], axis=1)
        best = minimize(
            lambda u, design=design, label=label: float(((design @ u - label[:, 0]) ** 2).sum()),
            np.full(design.shape[1], mu / design.shape[1] / 2),
            jac=lambda u, design=design, label=label: 2 * design.T @ (design @ u - label[:, 0]),
            bounds=[(0, None)] * design.shape[1],
            constraints={"type": "ineq", "fun": lambda u, mu=mu: mu - u.sum(), "jac": lambda u: -np.ones_like(u)},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        found = mu_lasso(x, label, mu, nonnegative)
        assert float(found.objective[0]) == pytest.approx(best.fun, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_scikit_learns_penalty_with_the_multiplier_of_the_bound(nonnegative) -> None:
    """||y - Xw||²/(2N) + alpha ||w||_1 has the same minimiser where alpha N is the multiplier max_k <x_k, rest>."""
    x, labels = layered(180, 60, 3, seed=3)
    for mu in (0.3, 1.0):
        found = mu_lasso(x, labels, mu, nonnegative)
        assert found.constraint_active.all()
        for j in range(3):
            slope = x.T @ (labels[:, j] - x @ found.weights[:, j].numpy())
            multiplier = float(slope.max() if nonnegative else np.abs(slope).max())
            theirs = Lasso(
                alpha=multiplier / len(x), fit_intercept=False, positive=nonnegative, tol=1e-10, max_iter=200_000
            ).fit(x, labels[:, j])
            assert np.abs(theirs.coef_).sum() == pytest.approx(mu, rel=1e-4)
            assert cost(x, labels[:, j], theirs.coef_) == pytest.approx(float(found.objective[j]), rel=1e-5)


def test_the_whole_path_of_lars_gives_the_same_curve() -> None:
    x, labels = layered(120, 40, 2, seed=4)
    path = LassoLars(alpha=1e-12, fit_intercept=False, positive=True, max_iter=500).fit(x, labels[:, 0])
    norms = path.coef_path_.sum(0)
    for knot in range(1, len(norms), 3):
        if norms[knot] <= 0:
            continue
        found = mu_lasso(x, labels[:, :1], float(norms[knot]))
        assert float(found.objective[0]) == pytest.approx(cost(x, labels[:, 0], path.coef_path_[:, knot]), rel=1e-5)


def test_the_optimum_worked_by_hand() -> None:
    """Orthonormal features: the solution is the projection of the correlations, here (0.9, 0.5, 0.1) onto sum 1."""
    x, label = np.eye(3), np.array([[0.9], [0.5], [0.1]])
    found = mu_lasso(x, label, 1.0)
    assert found.weights[:, 0].tolist() == pytest.approx([0.7, 0.3, 0.0])
    assert float(found.objective[0]) == pytest.approx(0.2**2 + 0.2**2 + 0.1**2)
    assert found.weights.dtype == torch.float64
    signed = mu_lasso(x, np.array([[0.9], [-0.5], [0.1]]), 1.0, nonnegative=False)
    assert signed.weights[:, 0].tolist() == pytest.approx([0.7, -0.3, 0.0])
