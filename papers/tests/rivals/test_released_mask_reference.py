"""The released interpretable CNN's mask layer against its description as slow loops, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from partlens_papers.rivals.masks import ReleasedMask

A = 0.5


def mask_by_loops(x: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the spread of every map, cell by cell, with indices that begin at 1."""
    images, filters, rows, cols = x.shape
    mask, spread = np.zeros_like(x), np.zeros((images, filters))
    row_at, col_at = np.linspace(-1, 1, rows), np.linspace(-1, 1, cols)
    for b in range(images):
        for c in range(filters):
            total = max(float(x[b, c].sum()), 1e-9)
            mu_row = sum((i + 1) * x[b, c, i, j] for i in range(rows) for j in range(cols)) / total
            mu_col = sum((j + 1) * x[b, c, i, j] for i in range(rows) for j in range(cols)) / total
            mu_row, mu_col = max(math.floor(mu_row + 0.5), 1), max(math.floor(mu_col + 0.5), 1)
            square = 0.0
            for i in range(rows):
                for j in range(cols):
                    square += x[b, c, i, j] * ((i + 1 - mu_row) ** 2 + (j + 1 - mu_col) ** 2)
                    distance = abs(row_at[i] - row_at[mu_row - 1]) + abs(col_at[j] - col_at[mu_col - 1])
                    mask[b, c, i, j] = max(1 - radius[c] * distance, -1)
            spread[b, c] = math.sqrt(square / total)
    return mask, spread


def normalised(strength: dict[int, float], epoch: int) -> dict[int, float]:
    """Divide by the mean and by epoch / 0.1; what is not a number is 0."""
    mean = sum(strength.values()) / len(strength)
    return {b: 0.0 if mean == 0 else value / (mean * epoch / 0.1) for b, value in strength.items()}


def layer_by_loops(
    x: np.ndarray,
    radius: np.ndarray,
    upstream: np.ndarray,
    positive: np.ndarray,
    weight: tuple[np.ndarray, np.ndarray],
    epoch: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the output, the gradient of the maps and that of the radius."""
    images, filters = x.shape[:2]
    mask, spread = mask_by_loops(x, radius)
    flipped = mask[::-1, ::-1]
    gradient = upstream * np.maximum(mask, 0)
    pull = np.zeros(filters)
    for c in range(filters):
        s = [float((x[b, c] * mask[b, c]).mean()) for b in range(images)]
        u = [float(x[b, c].mean()) for b in range(images)]
        a_positive = A * math.log(sum(math.exp((x[b, c] * flipped[b, c]).mean() / A) for b in range(images)) / images)
        a_negative = A * math.log(sum(math.exp(-u[b] / A) for b in range(images)) / images)
        inside = [b for b in range(images) if positive[b, c]]
        outside = [b for b in range(images) if not positive[b, c]]
        if inside:
            strength = normalised({b: math.exp(s[b] / A) * (s[b] - a_positive + A) for b in inside}, epoch)
            for b in inside:
                gradient[b, c] -= 1e-5 * weight[0][c] * strength[b] * mask[b, c]
        if outside:
            strength = normalised({b: math.exp(-u[b] / A) * (-u[b] - a_negative + A) for b in outside}, epoch)
            for b in outside:
                gradient[b, c] += 1e-5 * weight[1][c] * strength[b]
        weighed = sum(s[b] for b in inside)
        if weighed == 0:
            target = 3.0
        else:
            distance = sum(s[b] * spread[b, c] for b in inside) / weighed
            target = 3.0 if distance == 0 else min(max(3 / distance, 1.5), 3.0)
        pull[c] = -1e4 * (target - radius[c])
    return np.maximum(x * mask, 0), gradient, pull


def some_maps(images: int = 6, filters: int = 5, side: tuple[int, int] = (7, 6)) -> torch.Tensor:
    maps = (torch.randn(images, filters, *side, dtype=torch.float64) * 4).clamp(min=0)
    maps[:, 0] = 0  # a filter that never answers
    maps[2, 1] = 0  # and one that is silent on one image
    maps[3, 1] = 0
    maps[3, 1, :2, 1:3] = 2.0  # its centroid lies between two cells: 1.5 and 2.5, of which MATLAB makes 2 and 3
    return maps


def layer(maps: torch.Tensor) -> ReleasedMask:
    made = ReleasedMask(maps.shape[1], (maps.shape[2], maps.shape[3])).double()
    with torch.no_grad():
        made.radius.copy_(torch.linspace(1.2, 3.1, maps.shape[1]))
    return made


@pytest.mark.parametrize("side", [(7, 6), (13, 13), (2, 3)])
def test_forward_and_backward_equal_the_loops(side: tuple[int, int]) -> None:
    maps = some_maps(side=side)
    made = layer(maps)
    positive = torch.rand(6, 5) < 0.5
    positive[:, 3], positive[:, 4] = True, False
    weight = (torch.rand(5, dtype=torch.float64) + 0.5, torch.rand(5, dtype=torch.float64) + 0.5)
    upstream = torch.randn(6, 5, *side, dtype=torch.float64) * 1e-6
    leaf = maps.clone().requires_grad_()
    out = made.penalised(leaf, positive, 3, weight=weight)
    out.backward(upstream)
    wanted = layer_by_loops(
        maps.numpy(),
        made.radius.detach().numpy(),
        upstream.numpy(),
        positive.numpy(),
        (weight[0].numpy(), weight[1].numpy()),
        3,
    )
    assert leaf.grad is not None
    assert made.radius.grad is not None
    assert np.abs(out.detach().numpy() - wanted[0]).max() < 1e-10
    assert np.abs(made(maps).detach().numpy() - wanted[0]).max() < 1e-10
    scale = np.abs(wanted[1]).max()
    assert np.abs(leaf.grad.numpy() - wanted[1]).max() < 1e-10 * scale
    assert np.abs(made.radius.grad.numpy() - wanted[2]).max() < 1e-10 * 1e4


def test_the_coefficient_is_a_millionth_over_the_epoch() -> None:
    """Acceptance test 17: the mean over positives of |added gradient at mu| is 1e-6 / epoch for w_pos = 1."""
    maps = some_maps(images=12, filters=7, side=(9, 9))
    made = layer(maps)
    positive = torch.rand(12, 7) < 0.6
    for epoch in (1, 4):
        leaf = maps.clone().requires_grad_()
        made.penalised(leaf, positive, epoch).backward(torch.zeros_like(maps))
        assert leaf.grad is not None
        template, _ = made.template(maps)
        assert torch.equal(template.amax((2, 3)), torch.ones(12, 7, dtype=torch.float64))
        at_mu = torch.where(template == 1, leaf.grad, 0.0).sum((2, 3))
        for c in range(1, 7):
            # A strength may be negative for a map that fits badly: the mean is of the signed values, as in the code.
            assert float(-at_mu[positive[:, c], c].mean()) == pytest.approx(1e-6 / epoch, rel=1e-9)
            outside = leaf.grad[~positive[:, c], c]
            assert float(outside.mean()) == pytest.approx(1e-6 / epoch, rel=1e-9)


def test_huge_maps_do_not_overflow() -> None:
    """Where exp overflows in the released code, this is the limit: the best fitting map takes all of the strength."""
    maps = some_maps().float() * 1e4
    leaf = maps.clone().requires_grad_()
    made = ReleasedMask(5, (7, 6))
    made.penalised(leaf, torch.ones(6, 5, dtype=torch.bool), 1).backward(torch.zeros_like(maps))
    assert leaf.grad is not None
    assert bool(torch.isfinite(leaf.grad).all())
    largest = leaf.grad.abs().amax((2, 3))[:, 1:].amax(0)
    assert torch.allclose(largest, torch.full((4,), 6e-6), rtol=1e-3)
