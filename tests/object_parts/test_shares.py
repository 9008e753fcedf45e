"""The mean over photos of what parts add: every number of a made-up batch by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from partlens.object_parts import shares
from partlens.object_parts.record import Contributions, NamedPart
from partlens.object_parts.shapley import Shapley
from partlens.object_parts.shares import PartShares, _part_labels, mean_contributions

PARTS = (NamedPart("head", ("a",), (0, 3)), NamedPart("rest", ("b",), (1,)), NamedPart("leg", ("c",), (2,)))
SHAPLEY = torch.tensor([[2.0, 1.0, 0.5], [4.0, 1.0, 1.5], [3.0, -1.0, 1.0]])
REMOVAL = torch.tensor([[3.0, 1.0, 0.5], [5.0, 2.0, 1.0], [4.0, -1.0, 0.0]])
ORDINARY = torch.tensor([1.0, 2.0, 3.0])
BASELINE = torch.tensor([-1.0, 0.0, 1.0])
GRADIENT = torch.tensor([[1.0, 1.0, 2.0], [2.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
OUTPUTS = torch.tensor([[5.0, 0.0], [1.0, 8.0], [7.0, 2.0]])


def _batch(rows: slice, sign: float = 1.0) -> PartShares:
    shapley = sign * torch.cat([SHAPLEY[rows], ORDINARY[rows, None]], 1)
    loss = torch.cat([REMOVAL[rows], ORDINARY[rows, None]], 1)
    score = BASELINE[rows] + shapley.sum(1)
    parts = Shapley(shapley, 0 * shapley + 0.25, loss, loss, BASELINE[rows], score)
    drawn = torch.stack([GRADIENT[rows], GRADIENT[rows].flip(1)], 1)
    fed = torch.tensor([[1.0, 0.0]] * 3)[rows]
    filters, heat = torch.zeros(len(shapley), 4), torch.zeros(len(shapley), 3, 1, 1)
    return PartShares(parts, filters, GRADIENT[rows], 2 * GRADIENT[rows], drawn, heat, fed, "exact")


def _found(monkeypatch: pytest.MonkeyPatch, sign: float = 1.0) -> Contributions:
    monkeypatch.setattr(shares, "_ROUNDS", 10)
    batches = [_batch(slice(0, 2), sign), _batch(slice(2, 3), sign)]
    return mean_contributions(batches, PARTS, OUTPUTS, torch.arange(3), seed=0)


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    x, y = x.flatten() - x.mean(), y.flatten() - y.mean()
    return float((x * y).sum() / (x.norm() * y.norm())), float((x * y).sum() / (x * x).sum())


def test_every_number_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _found(monkeypatch)
    rise = SHAPLEY.sum(1) + ORDINARY
    assert found.performer_score.value == pytest.approx((5 + 8 + 7) / 3)
    assert found.fed_back.value == pytest.approx(float((BASELINE + rise).mean()))
    assert found.baseline.value == 0
    assert found.ordinary_share.value == pytest.approx(6 / 19)
    assert found.standard_error == 0.25
    head, rest, leg = found.parts
    assert [p.name for p in found.parts] == ["head", "rest", "leg"]
    assert [p.filters for p in found.parts] == [(0, 3), (1,), (2,)]
    assert head.shapley.value == 3
    assert (head.share.value, rest.share.value, leg.share.value) == pytest.approx((9 / 13, 1 / 13, 3 / 13))
    assert head.gradient_activation_share.value == pytest.approx(0.4)
    assert (head.integrated_share.value, rest.integrated_share.value) == pytest.approx((0.4, 0.2))
    assert head.removal.value == 4
    assert head.predicted == (2.0, 4.0, 3.0)
    assert head.measured == (3.0, 5.0, 4.0)
    # Two draws of the filters: as they are, and with the first and last part swapped, over all photos together.
    assert head.integrated_null.value == pytest.approx((0.4 + 0.4) / 2)
    assert rest.integrated_null.value == pytest.approx(0.2)
    assert (head.integrated_null.n, head.integrated_null.unit) == (2, "draws")


def test_each_measure_is_checked_against_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _found(monkeypatch).removal_check
    sizes = torch.tensor([2.0, 1.0, 1.0])
    for name, predicted in (
        ("shapley", SHAPLEY),
        ("integrated_gradients", GRADIENT),
        ("gradient_activation", 2 * GRADIENT),
        ("part_size", SHAPLEY.sum(1, keepdim=True) * sizes / 4),
    ):
        correlation, slope = _line(predicted, REMOVAL)
        assert found[name].correlation.value == pytest.approx(correlation)
        assert found[name].slope.value == pytest.approx(slope)


def test_a_share_of_a_whole_that_is_not_positive_is_undefined(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _found(monkeypatch, sign=-1.0)
    assert found.parts[0].shapley.value == -3
    for share in (found.interpretable_share, found.ordinary_share, found.parts[0].share):
        assert math.isnan(share.value)


def test_the_only_output_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "_ROUNDS", 2)
    batch = _batch(slice(0, 3))
    single = PartShares(**{**batch.__dict__, "fed_outputs": torch.tensor([[1.0], [1.0], [-1.0]])})
    found = mean_contributions([single], PARTS, torch.tensor([[2.0], [-1.0], [-3.0]]), torch.arange(3), seed=0)
    assert found.performer_score.value == pytest.approx(-2 / 3)


def test_every_filter_gets_the_position_of_its_part() -> None:
    assert _part_labels(PARTS, 4).tolist() == [0, 1, 2, 0]
