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
    Answers,
    FedBack,
    FedIn,
    _measure_errors,
    fed_back,
    measure_fidelity,
    own_columns,
    share_estimate,
)
from partlens.evaluation.results import EvaluatedData, Fidelity
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, explainer_structure
from partlens.metrics.faithfulness import LostVariance, logistic_head
from partlens.metrics.scores import LOCALISATION, LocalisationScores
from partlens.network.performer import Performer

KIND: FedIn = "parts"


def fed(own: list[int], after: list[int], features: list[list[float]] | None = None) -> FedBack:
    """Answers of three classes, and features that are the same before and after unless given."""
    eye = torch.eye(3)
    of = torch.tensor(features or [[float(k)] for k in own])
    return FedBack(eye[torch.tensor(own)], of, {KIND: (eye[torch.tensor(after)], of)})


def percent(errors: Any) -> tuple[float, float, float]:
    return (
        errors["performer_error_percent"].value,
        errors["explainer_error_percent"].value,
        errors["error_increase_points"].value,
    )


def test_one_category_is_told_from_everything_else_by_its_own_output(generator: torch.Generator) -> None:
    """Class 1 is the category; held photos are of it, others are not, whichever other class they are given."""
    held, others = fed([1, 1, 0, 1], [1, 2, 0, 1]), fed([0, 2, 1, 2], [2, 0, 1, 1])
    labels, photos = torch.zeros(4, dtype=torch.long), torch.arange(8)
    answers = Answers(held, labels, photos, columns=(1,), others=others)
    errors = _measure_errors(answers, KIND, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((100 * 2 / 8, 100 * 4 / 8, 25.0))
    assert errors["error_increase_points"].n == 8
    assert _measure_errors(dataclasses.replace(answers, others=None), KIND, generator, 5) is None
    crops = dataclasses.replace(answers, photos=torch.tensor([0, 0, 1, 2, 3, 4, 5, 5]))
    assert _measure_errors(crops, KIND, generator, 5)["error_increase_points"].n == 6  # type: ignore[union-attr]


def test_several_categories_are_told_from_each_other(generator: torch.Generator) -> None:
    """Their outputs are columns 2 and 0; others are not counted, though they are there."""
    held, others = fed([2, 2, 0, 0], [2, 1, 0, 2]), fed([1], [1])
    answers = Answers(held, torch.tensor([0, 0, 1, 1]), torch.arange(5), columns=(2, 0), others=others, categories=2)
    errors = _measure_errors(answers, KIND, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((0.0, 50.0, 50.0))
    assert errors["error_increase_points"].n == 4


def test_a_head_learns_from_training_photos_alone(generator: torch.Generator) -> None:
    """The category has features above 0; two held-out photos move below when the reconstruction is fed back."""
    above, below = [[1.0], [2.0], [1.5], [1.2]], [[-1.0], [-2.0], [-1.5], [-1.2]]
    moved = torch.tensor([[1.0], [2.0], [-1.5], [-1.2]])
    held = fed([0] * 4, [0] * 4, above)
    held = dataclasses.replace(held, fed={KIND: (held.outputs, moved)})
    answers = Answers(
        held,
        torch.zeros(4, dtype=torch.long),
        torch.arange(8),
        others=fed([0] * 4, [0] * 4, below),
        head=logistic_head(torch.tensor(above + below), torch.tensor([1] * 4 + [0] * 4)),
    )
    errors = _measure_errors(answers, KIND, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((0.0, 25.0, 25.0))
    assert _measure_errors(dataclasses.replace(answers, head=None), KIND, generator, 5) is None
    two = dataclasses.replace(
        answers,
        categories=2,
        labels=torch.tensor([0, 0, 1, 1]),
        others=None,
        head=logistic_head(torch.tensor([[1.0], [2.0], [-1.5], [-1.2]]), torch.tensor([0, 0, 1, 1])),
    )
    errors = _measure_errors(two, KIND, generator, 5)
    assert errors is not None
    assert percent(errors) == pytest.approx((50.0, 0.0, -50.0))


def test_fidelity_says_whose_errors_and_counts_other_photos_apart(generator: torch.Generator) -> None:
    held, others = fed([1, 1, 0, 1], [1, 2, 0, 1]), fed([0, 2], [2, 2])
    lost, target = LostVariance(), torch.tensor([[0.0], [2.0], [4.0], [6.0]])
    lost.add(target[:2] + 1, target[:2])
    lost.add(target[2:], target[2:])
    answers = Answers(held, torch.zeros(4, dtype=torch.long), torch.arange(6), columns=(1,), others=others)
    found = measure_fidelity(answers, KIND, {"top": lost}, generator=generator, rounds=5)
    assert found.agreement_top1.value == 0.75
    assert found.agreement_top1.n == 4
    assert found.agreement_top1_background.value == 0.5
    assert found.agreement_top1_background.n == 2
    assert found.variance_kept["top"].value == pytest.approx(18 / 20)  # variance around the mean 3: 9 + 1 + 1 + 9
    assert found.errors_by == "performer"
    alone = measure_fidelity(dataclasses.replace(answers, others=None), KIND, {}, generator=generator, rounds=5)
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
    assert found.interval == pytest.approx((0.5 - half, 0.5 + half), abs=1e-4)
    assert (found.n, found.unit) == (3, "seeds")
    assert share_estimate([0.05, 0.4]).interval == (0.0, 1.0)
    alone = share_estimate([0.3])
    assert (alone.value, alone.n, alone.has_interval) == (0.3, 1, False)


def test_each_photo_is_fed_what_its_kind_says(tiny: Performer) -> None:
    """Parts alone have the whole weight; those of another photo come from the one before, across batches, too."""
    structure = explainer_structure(tiny, torch.rand(1, 3, 32, 32), tiny.tap)
    explainer = build_explainer(tiny, structure, ExplainerConfig(seed=1)).eval()
    maps = torch.rand(5, structure.channels_in, *structure.side_cells)
    p = float(explainer.p.detach())
    with torch.no_grad():
        tracks = explainer.normed_tracks(maps)
        first, second = (explainer.normed_tracks(part) for part in (maps[:3], maps[3:]))
        found = fed_back(explainer, tracks)
        parts, mixed, none = (
            explainer.decode(given)
            for given in (
                tracks.interpretable,
                p * tracks.interpretable + (1 - p) * tracks.ordinary,
                torch.zeros_like(tracks.ordinary),
            )
        )
        apart = fed_back(explainer, first), fed_back(explainer, second, first.interpretable[-1:])
    for target in range(len(structure.targets)):
        assert torch.allclose(found["reconstruction"][target], mixed[target], atol=1e-5)
        assert torch.equal(found["parts"][target], parts[target])
        assert torch.allclose(found["nothing"][target], none[target], atol=1e-5)
        others = torch.cat([one["other_photo"][target] for one in apart])
        assert torch.allclose(others[1:], parts[target][:-1], atol=1e-5)
        assert not torch.allclose(others[1:], parts[target][1:], atol=1e-3)


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
            variance_kept={},
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
