"""What is left of the performer: errors by hand, their photos, and the share p."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from partlens.estimate import Estimate
from partlens.evaluation.explainer_evaluation import _warnings_for
from partlens.evaluation.fidelity import (
    SHARES,
    Answers,
    FedBack,
    LostVariance,
    ShareCurve,
    _measure_errors,
    measure_fidelity,
    own_columns,
    share_estimate,
)
from partlens.evaluation.results import EvaluatedData, Fidelity
from partlens.metrics.scores import LOCALISATION, LocalisationScores
from partlens.network.performer import Performer


def fed(own: list[int], after: list[int], features: list[list[float]] | None = None) -> FedBack:
    """Answers of three classes, and features that are the same before and after unless given."""
    eye = torch.eye(3)
    of = torch.tensor(features or [[float(k)] for k in own])
    return FedBack(eye[torch.tensor(own)], eye[torch.tensor(after)], of, of)


def percent(errors: Any) -> tuple[float, float, float]:
    return (
        errors.performer_error_percent.value,
        errors.explainer_error_percent.value,
        errors.error_increase_points.value,
    )


def test_one_category_is_told_from_everything_else_by_its_own_output(generator: torch.Generator) -> None:
    """Class 1 is the category; held photos are of it, others are not, whichever other class they are given."""
    held, others = fed([1, 1, 0, 1], [1, 2, 0, 1]), fed([0, 2, 1, 2], [2, 0, 1, 1])
    labels, photos = torch.zeros(4, dtype=torch.long), torch.arange(8)
    answers = Answers(held, labels, photos, columns=(1,), others=others)
    errors = _measure_errors(answers, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((100 * 2 / 8, 100 * 4 / 8, 25.0))
    assert errors.error_increase_points.n == 8
    assert _measure_errors(dataclasses.replace(answers, others=None), generator, 5) is None
    crops = dataclasses.replace(answers, photos=torch.tensor([0, 0, 1, 2, 3, 4, 5, 5]))
    assert _measure_errors(crops, generator, 5).error_increase_points.n == 6  # type: ignore[union-attr]


def test_several_categories_are_told_from_each_other(generator: torch.Generator) -> None:
    """Their outputs are columns 2 and 0; others are not counted, though they are there."""
    held, others = fed([2, 2, 0, 0], [2, 1, 0, 2]), fed([1], [1])
    answers = Answers(held, torch.tensor([0, 0, 1, 1]), torch.arange(5), columns=(2, 0), others=others, categories=2)
    errors = _measure_errors(answers, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((0.0, 50.0, 50.0))
    assert errors.error_increase_points.n == 4


def test_a_head_learns_from_training_photos_alone(generator: torch.Generator) -> None:
    """The category has features above 0; two held-out photos move below when the reconstruction is fed back."""
    above, below = [[1.0], [2.0], [1.5], [1.2]], [[-1.0], [-2.0], [-1.5], [-1.2]]
    moved = torch.tensor([[1.0], [2.0], [-1.5], [-1.2]])
    held = dataclasses.replace(fed([0] * 4, [0] * 4, above), fed_features=moved)
    answers = Answers(
        held,
        torch.zeros(4, dtype=torch.long),
        torch.arange(8),
        others=fed([0] * 4, [0] * 4, below),
        train=fed([0] * 4, [0] * 4, above),
        train_labels=torch.zeros(4, dtype=torch.long),
        train_others=fed([0] * 4, [0] * 4, below),
    )
    errors = _measure_errors(answers, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((0.0, 25.0, 25.0))
    assert _measure_errors(dataclasses.replace(answers, train=None), generator, 5) is None
    assert _measure_errors(dataclasses.replace(answers, train_others=None), generator, 5) is None
    two = dataclasses.replace(answers, categories=2, labels=torch.tensor([0, 0, 1, 1]))
    taught = dataclasses.replace(two, train=fed([0] * 4, [0] * 4, [[1.0], [2.0], [-1.5], [-1.2]]))
    taught = dataclasses.replace(taught, train_labels=torch.tensor([0, 0, 1, 1]), others=None, train_others=None)
    errors = _measure_errors(taught, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((50.0, 0.0, -50.0))


def test_fidelity_says_whose_errors_and_counts_other_photos_apart(generator: torch.Generator) -> None:
    held, others = fed([1, 1, 0, 1], [1, 2, 0, 1]), fed([0, 2], [2, 2])
    lost, target = LostVariance(), torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    lost.add(target[:2] + 1, target[:2])
    lost.add(target[2:], target[2:])
    answers = Answers(held, torch.zeros(4, dtype=torch.long), torch.arange(6), columns=(1,), others=others)
    found = measure_fidelity(answers, {"top": lost}, generator=generator, rounds=5)
    assert found.agreement_top1.value == 0.75
    assert found.agreement_top1.n == 4
    assert found.agreement_top1_background.value == 0.5
    assert found.agreement_top1_background.n == 2
    assert found.relative_error["top"].value == pytest.approx(2 / 20)  # variance around the mean 3: 9 + 1 + 1 + 9
    assert found.errors_by == "performer"
    alone = measure_fidelity(dataclasses.replace(answers, others=None), {}, generator=generator, rounds=5)
    assert alone.errors_by is None
    assert alone.agreement_top1_background.n == alone.error_increase_points.n == 0


@pytest.mark.parametrize(
    ("known", "names", "columns"),
    [
        (("cat", "fox"), ["fox"], (1,)),
        (("cat", "fox"), ["fox", "cat"], (1, 0)),
        (("fox",), ["fox"], (1,)),  # a single logistic output: column 0 is "not the category"
        (("cat", "fox"), ["dog"], None),
        (("cat", "fox"), [""], None),
        (None, ["fox"], None),
    ],
)
def test_columns_of_the_categories(tiny: Performer, known: Any, names: list[str], columns: Any) -> None:
    assert own_columns(dataclasses.replace(tiny, class_names=known), names) == columns


def test_the_share_has_students_interval_over_seeds() -> None:
    found = share_estimate([0.4, 0.5, 0.6])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found.value == 0.4  # of the explainer that is kept; the interval is of the mean
    assert found.interval == pytest.approx((0.5 - half, 0.5 + half))
    assert (found.n, found.unit) == (3, "seeds")
    assert share_estimate([0.05, 0.4]).interval == (0.0, 1.0)
    alone = share_estimate([0.3])
    assert (alone.value, alone.n, alone.has_interval) == (0.3, 1, False)


@pytest.mark.parametrize(("norms", "best"), [((1.0, 1.0), 0.3), ((1.0, 20.0), 0.2), ((20.0, 1.0), 0.4)])
def test_the_best_share_divides_each_target_by_its_norm(
    norms: tuple[float, float], best: float, generator: torch.Generator
) -> None:
    """Costs are quadratic around 0.2 for one target and 0.4 for the other."""
    curve, grid = ShareCurve(eta=1e-9, reconstruction_weight=2.0), torch.tensor(SHARES, dtype=torch.float64)
    costs = torch.stack([(grid - 0.2) ** 2, (grid - 0.4) ** 2], 1)
    for _ in range(2):
        curve.costs.append(costs.expand(3, -1, -1))
        curve.norms.append(torch.tensor(norms, dtype=torch.float64).expand(3, -1))
    found = curve.optimum(generator, torch.tensor([0, 0, 1, 2, 3, 4]), 3)
    assert found.value == pytest.approx(best, abs=0.02)
    assert found.n == 5
    curve.eta = 10.0
    dear = curve.optimum(generator, torch.arange(6), 3)
    assert dear.value == pytest.approx(0.95, abs=0.01)


def flat(**changes: float) -> LocalisationScores:
    values = dict.fromkeys(LOCALISATION, 0.0) | {"peak_spread_cells": 3.0} | changes
    return LocalisationScores(**{k: Estimate(v, (v, v), 9) for k, v in values.items()}, landmark_shares={})


@pytest.mark.parametrize(
    ("name", "silent", "said"),
    [
        ("filter_correlation", 0.9, 0.91),
        ("dead_frac", 0.049, 0.05),
        ("silent_frac", 0.049, 0.05),
        ("peak_spread_cells", 1.0, 0.99),
        ("border_frac", 0.5, 0.51),
        ("agreement_top1", 0.5, 0.49),
    ],
)
def test_each_warning_has_its_limit(name: str, silent: float, said: float) -> None:
    def warned(value: float, **of_data: Any) -> tuple[str, ...]:
        agreement = value if name == "agreement_top1" else 1.0
        none = Estimate.undefined()
        fidelity = Fidelity(
            agreement_top1=Estimate(agreement, (0, 1), 9),
            agreement_top1_background=none,
            relative_error={},
            errors_by=None,
            performer_error_percent=none,
            explainer_error_percent=none,
            error_increase_points=none,
        )
        fields = {"split": "test", "same_as_fit": True, "used_in_fit": 0, **of_data}
        data = EvaluatedData(name="d", photos=9, categories=("",), unreadable=(), **fields)
        return _warnings_for(flat(**({} if name == "agreement_top1" else {name: value})), fidelity, data)

    assert warned(silent) == ()
    assert len(found := warned(said)) == 1
    assert f"({name} = " in found[0]
    assert "photos of the fit" in warned(silent, split="train")[0]
    assert warned(silent, split="train", same_as_fit=False) == ()
    assert warned(silent, same_as_fit=False, used_in_fit=2)[0].startswith("2 of the 9 photos were used in the fit")
