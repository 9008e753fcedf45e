"""Does an assignment come back, and does it predict a loss: known answers and nulls."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from partlens.errors import InputError
from partlens.object_parts.trust import _kept_share, assignment_stability, removal_agreement


def test_groups_without_names_are_matched_and_other_is_not() -> None:
    first = torch.tensor([0, 0, 1, 1, -1, -1])
    assert _kept_share(first, torch.tensor([1, 1, 0, 0, -1, -1])) == 1
    assert _kept_share(first, torch.tensor([1, 1, 0, 0, -1, -1]), matched=False) == pytest.approx(1 / 3)
    assert _kept_share(first, torch.full((6,), -1)) == pytest.approx(1 / 3)
    assert _kept_share(first, torch.tensor([0, 1, 2, 3, 4, 5])) == pytest.approx(2 / 6)


def test_an_assignment_that_never_changes_is_stable_and_a_random_one_is_not(generator: torch.Generator) -> None:
    fixed = torch.arange(60) % 3
    photos = torch.arange(20)
    seen: list[Tensor] = []

    def assign(rows: Tensor) -> Tensor:
        seen.append(rows)
        return fixed

    found = assignment_stability(assign, photos, generator=generator, rounds=20)
    assert found.adjusted_rand.value == found.kept.value == 1
    assert found.adjusted_rand.n == 20
    assert abs(found.null_adjusted_rand.value) < 0.05
    assert found.null_kept.value < 0.6
    assert len(seen) == 40
    drawn = assignment_stability(
        lambda _: torch.randint(3, (60,), generator=generator), photos, generator=generator, rounds=20
    )
    assert abs(drawn.adjusted_rand.value) < 0.05


def test_crops_of_one_photo_stay_in_one_half(generator: torch.Generator) -> None:
    photos = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    halves: list[set[int]] = []

    def assign(rows: Tensor) -> Tensor:
        halves.append({int(photos[r]) for r in rows})
        return torch.zeros(4, dtype=torch.long)

    assignment_stability(assign, photos, generator=generator, rounds=10)
    assert all(not (a & b) for a, b in zip(halves[::2], halves[1::2], strict=True))


def test_too_few_photos_leave_stability_undefined(generator: torch.Generator) -> None:
    found = assignment_stability(lambda _: torch.zeros(3), torch.arange(3), generator=generator)
    assert not found.kept.defined
    assert found.kept.n == 0
    four = assignment_stability(
        lambda _: torch.zeros(3, dtype=torch.long), torch.arange(4), generator=generator, rounds=3
    )
    assert four.kept.value == 1
    assert four.kept.n == 4


def test_the_line_between_predicted_and_measured_loss(generator: torch.Generator) -> None:
    predicted = torch.randn(50, 4, generator=generator)
    exact = removal_agreement(predicted, 2 * predicted + 1, generator=generator, rounds=50)
    assert exact.correlation.value == pytest.approx(1)
    assert exact.slope.value == pytest.approx(2)
    assert exact.slope.interval == pytest.approx((2.0, 2.0))
    # Shuffling parts within a photo leaves what photos differ in: a quarter of the variance for four parts.
    assert exact.null_correlation.value == pytest.approx(0.25, abs=0.1)
    noisy = removal_agreement(
        predicted, predicted + torch.randn(50, 4, generator=generator), generator=generator, rounds=200
    )
    assert noisy.correlation.interval[0] < 1 / math.sqrt(2) < noisy.correlation.interval[1]
    assert math.isnan(removal_agreement(torch.ones(3, 1), torch.ones(3, 1), generator=generator, rounds=5).slope.value)
    with pytest.raises(InputError, match="two tables .* of one shape"):
        removal_agreement(predicted, predicted[:3], generator=generator)
