"""What holds for any responses, labels and bound."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from partlens.selection.descriptors import energy, normalised
from partlens.selection.lasso import mu_lasso
from partlens.selection.record import FeatureIndex


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float, bool]:
    """Responses of several kinds with copies and dead features, labels of classes that may be empty, a bound."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    images, features = draw(st.integers(1, 30)), draw(st.integers(1, 40))
    classes = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["normal", "energy", "counts", "thin"]))
    if kind == "normal":
        x = rng.standard_normal((images, features))
    elif kind == "energy":
        x = rng.gamma(0.4, 1.0, (images, features))
        x /= x.sum(1, keepdims=True) + 1e-12
    elif kind == "counts":
        x = rng.integers(0, 3, (images, features)).astype(float)
    else:
        x = rng.standard_normal((images, 2)) @ rng.standard_normal((2, features))
    if draw(st.booleans()):
        x[:, rng.integers(0, features, features // 2)] = x[:, rng.integers(0, features, features // 2)]
    if draw(st.booleans()):
        x[:, rng.random(features) < 0.3] = 0
    labels = np.eye(classes)[rng.integers(0, classes, images)]
    mu = 10.0 ** draw(st.floats(-3, 2))
    return x, labels, mu, draw(st.booleans())


def objective(x: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return ((x @ weights - labels) ** 2).sum(0)


@given(problems(), st.integers(0, 2**32 - 1))
def test_no_feasible_point_is_below_the_optimum_by_more_than_the_gap(problem, seed) -> None:
    x, labels, mu, nonnegative = problem
    found = mu_lasso(x, labels, mu, nonnegative)
    energy = labels.sum(0)
    assert (found.norm <= mu * (1 + 1e-6)).all()
    assert not nonnegative or float(found.weights.min()) >= 0
    assert (found.gap.numpy() >= -1e-9 * np.maximum(energy, 1)).all()
    assert np.allclose(found.objective, objective(x, labels, found.weights.numpy()), atol=1e-9 * len(x))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        other = rng.dirichlet(np.full(x.shape[1], 0.2), labels.shape[1]).T * mu * rng.random()
        if not nonnegative:
            other *= rng.choice([-1, 1], other.shape)
        near = found.weights.numpy() + rng.random() * (other - found.weights.numpy())
        for point in (other, near):
            below = found.objective.numpy() - objective(x, labels, point)
            assert (below <= found.gap.numpy() + 1e-9 * np.maximum(energy, 1)).all()


@given(problems(), st.floats(1.01, 10))
def test_a_larger_bound_is_never_worse(problem, factor) -> None:
    x, labels, mu, nonnegative = problem
    small, large = (mu_lasso(x, labels, bound, nonnegative) for bound in (mu, mu * factor))
    assert (large.objective <= small.objective + large.gap + 1e-9 * len(x)).all()
    signed = mu_lasso(x, labels, mu, nonnegative=False)
    assert (signed.objective <= small.objective + signed.gap + 1e-9 * len(x)).all()


@given(problems(), st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(problem, random) -> None:
    x, labels, mu, nonnegative = problem
    order = list(range(len(x)))
    random.shuffle(order)
    a, b = mu_lasso(x, labels, mu, nonnegative), mu_lasso(x[order], labels[order], mu, nonnegative)
    assert torch.allclose(a.objective, b.objective, rtol=3e-6, atol=3e-6 * len(x))
    assert np.allclose(x @ a.weights.numpy(), x @ b.weights.numpy(), atol=2e-3)  # fitted values are unique


@given(problems())
def test_copies_change_nothing_that_is_unique(problem) -> None:
    x, labels, mu, nonnegative = problem
    once, twice = (mu_lasso(each, labels, mu, nonnegative) for each in (x, np.concatenate([x, x], axis=1)))
    assert torch.allclose(once.objective, twice.objective, rtol=3e-6, atol=3e-6 * len(x))
    again = mu_lasso(np.concatenate([x, x], axis=1), labels, mu, nonnegative)
    assert torch.equal(again.weights, twice.weights)


@given(problems())
def test_the_gram_matrix_gives_the_same_as_the_responses(problem) -> None:
    x, labels, mu, nonnegative = problem
    gram, whole = (mu_lasso(x, labels, mu, nonnegative, method=method) for method in ("gram", "responses"))
    assert torch.allclose(gram.objective, whole.objective, rtol=3e-6, atol=3e-6 * len(x))


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
)
def test_descriptors_do_not_depend_on_the_scale_of_a_layer(channels, images, seed) -> None:
    rng = np.random.default_rng(seed)
    index = FeatureIndex(tuple(f"layer{i}" for i in range(len(channels))), tuple(channels))
    assert [index.feature(*index.place(i)) for i in range(index.size)] == list(range(index.size))
    maps = {
        name: torch.from_numpy(rng.standard_normal((images, count, 2, 3)) * (rng.random((images, count, 1, 1)) < 0.7))
        for name, count in zip(index.layers, channels, strict=True)
    }
    energies = torch.cat([energy(values) for values in maps.values()], 1)
    x, _ = normalised(energies, index)
    assert bool(torch.isfinite(x).all())
    assert float(x.min()) >= 0
    length = x.norm(dim=1)
    assert bool(((length - 1).abs() < 1e-5)[length > 0].all())
    energies[:, index.rows(index.layers[0])] *= 49
    assert torch.allclose(normalised(energies, index)[0], x, atol=1e-6)
