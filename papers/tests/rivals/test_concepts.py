"""Importance of concepts as in CRAFT: indices of a score that is known, and what is lost without a unit."""

from __future__ import annotations

import pytest
import torch

from partlens_papers.rivals.concepts import crops, losses, scores_at, sobol_masks, total_sobol

DRAWS = torch.Generator().manual_seed(0)
MAPS = torch.rand(2, 4, 3, 3, generator=DRAWS)
PARTS = torch.stack([MAPS * 0.5, MAPS * 0.3, MAPS * 0.2], 1)
CLASSES = torch.tensor([1, 0])


def upper(maps: torch.Tensor) -> torch.Tensor:
    return torch.stack([maps.sum((1, 2, 3)), 3 * maps[:, 0].sum((1, 2)) + 1], 1)


def test_indices_of_a_sum_are_the_shares_of_its_variance() -> None:
    weights = torch.tensor([3.0, 1.0, 0.0])
    found = total_sobol((sobol_masks(3, 2048) @ weights)[None], 2048)[0]
    assert found.tolist() == pytest.approx([0.9, 0.1, 0.0], abs=0.02)


def test_what_acts_together_counts_for_each() -> None:
    masks = sobol_masks(2, 4096)
    found = total_sobol((masks[:, 0] * masks[:, 1])[None], 4096)[0]
    assert found.tolist() == pytest.approx([4 / 7, 4 / 7], abs=0.02)  # 1/36 of a variance of 7/144


def test_a_constant_score_gives_no_unit_an_index() -> None:
    assert total_sobol(torch.ones(1, 32 * 5)).tolist() == [[0.0, 0.0, 0.0]]


def test_scores_are_those_of_the_weighted_units() -> None:
    found = scores_at(upper, torch.zeros_like(MAPS), PARTS, torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), CLASSES)
    assert torch.allclose(found[:, 0], upper(MAPS)[[0, 1], CLASSES])
    assert torch.allclose(found[:, 1], upper(MAPS / 2)[[0, 1], CLASSES])


def test_a_unit_of_a_fifth_of_a_linear_score_is_a_fifth_of_the_loss() -> None:
    assert torch.allclose(losses(upper, MAPS, PARTS, CLASSES), torch.tensor([[0.5, 0.3, 0.2]]).double(), atol=1e-6)


def test_crops_are_windows_of_the_input() -> None:
    image = torch.arange(224.0).expand(1, 1, 224, 224)
    found = crops(image)
    assert found.shape == (16, 1, 224, 224)
    assert [float(found[0].min()), float(found[0].max())] == [0, 63]
    assert [float(found[3].min()), float(found[3].max())] == [153, 216]
