from __future__ import annotations

import math

import pytest
import torch

from partlens.errors import InputError
from partlens.metrics.faithfulness import (
    LostVariance,
    agreement_top1,
    class_outputs,
    decision_errors,
    logistic_head,
)


def kept(lost: LostVariance, count: int) -> float:
    return lost.kept(torch.Generator(), torch.arange(count), 2).value


def test_variance_kept_in_batches_equals_the_whole() -> None:
    target, value = torch.randn(50, 3, 4) + 7, torch.randn(50, 3, 4) + 7
    lost = LostVariance()
    for part in (slice(0, 7), slice(7, 30), slice(30, 50)):
        lost.add(value[part], target[part])
    whole = (value - target).double().square().sum() / (target - target.mean(0)).double().square().sum()
    assert kept(lost, 50) == pytest.approx(1 - float(whole), rel=1e-9)


def test_perfect_and_constant_reconstructions() -> None:
    target = torch.randn(40, 5)
    perfect, constant = LostVariance(), LostVariance()
    perfect.add(target, target)
    constant.add(target.mean(0).expand(40, 5), target)
    assert kept(perfect, 40) == 1
    assert kept(constant, 40) == pytest.approx(0, abs=1e-6)
    assert math.isnan(kept(LostVariance(), 0))


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 3\), got \(4, 2\)"):
        LostVariance().add(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="outputs of shape"):
        agreement_top1(torch.zeros(4, 2), torch.zeros(4, 3))


def test_agreement() -> None:
    own = torch.eye(4)
    fed = own.clone()
    fed[0] = torch.tensor([0.0, 9, 0, 0])
    assert agreement_top1(fed, own).value == 0.75
    assert agreement_top1(fed, own).n == 4


def test_error_increase_of_a_reconstruction_that_lost_the_category(generator: torch.Generator) -> None:
    labels = torch.arange(200) % 2
    features = torch.randn(200, 6, generator=generator) + 3 * labels[:, None]
    lost = torch.randn(200, 6, generator=generator) + 1.5
    head = logistic_head(features, labels)
    errors = decision_errors(head(features), head(lost), labels, generator=generator, rounds=200)
    assert errors["performer_error_percent"].value < 5
    assert errors["error_increase_points"].value > 30
    low, high = errors["error_increase_points"].interval
    assert low < errors["error_increase_points"].value < high
    same = decision_errors(head(features), head(features), labels, generator=generator, rounds=20)
    assert same["error_increase_points"].value == 0
    assert same["error_increase_points"].interval == (0, 0)


def test_a_head_needs_both_classes() -> None:
    one = torch.ones(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"or several categories, among the training photos, got labels \[1\]"):
        logistic_head(torch.rand(5, 2), one)


def test_agreement_of_a_single_output_has_to_be_read_as_yes_or_no() -> None:
    own, fed = torch.tensor([[3.0], [-2.0], [1.0], [4.0]]), torch.tensor([[-3.0], [-2.0], [1.0], [-4.0]])
    with pytest.raises(InputError, match=r"outputs of at least 2 classes, got outputs of shape \(4, 1\)"):
        agreement_top1(fed, own)
    assert agreement_top1(class_outputs(fed), class_outputs(own)).value == 0.5
