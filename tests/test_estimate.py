"""Estimates: intervals by their definition, draws group by group, and their form in files."""

from __future__ import annotations

import math

import pytest
import torch

from partlens.errors import InputError
from partlens.estimate import Estimate, bootstrap, percentile_interval, proportion, resampler

Z = 1.96


@pytest.mark.parametrize(("successes", "count"), [(3, 4), (1, 9), (5, 10), (0, 7), (7, 7), (49, 50)])
def test_both_ends_of_wilsons_interval_solve_its_equation(successes: int, count: int) -> None:
    found = proportion(torch.tensor([1.0] * successes + [0.0] * (count - successes)))
    share = successes / count
    assert found.value == pytest.approx(share)
    assert found.n == count
    for end, outer in ((found.low, 0.0), (found.high, 1.0)):
        if end != outer:  # the share is Z standard errors of the end away from it
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / count), abs=1e-9)
    assert 0 <= found.low <= share <= found.high <= 1
    assert (found.low < share) == (successes > 0)
    assert (found.high > share) == (successes < count)


def test_crops_of_one_photo_count_by_kishs_number() -> None:
    values = torch.tensor([1.0, 1, 1, 0, 1, 0])
    found = proportion(values, groups=torch.tensor([4, 4, 4, 4, 7, 8]))
    effective = 6**2 / (4**2 + 1 + 1)
    share = 4 / 6
    assert (found.n, found.value) == (3, pytest.approx(share))
    for end in found.interval:
        assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / effective), abs=1e-9)
    with pytest.raises(InputError, match="a group for every row, got 2 for 6"):
        proportion(values, groups=torch.tensor([1, 2]))
    assert math.isnan(proportion(torch.ones(0)).value)


def test_the_bootstrap_draws_as_many_groups_as_there_are(generator: torch.Generator) -> None:
    draw, units = resampler(6, torch.tensor([5, 5, 1, 9, 9, 9]))
    assert units == 3
    sizes = {0: 2, 2: 1, 3: 3}
    for _ in range(20):
        rows = draw(generator).tolist()
        groups = [row for row in rows if row in sizes]
        assert len(groups) == 3
        assert len(rows) == sum(sizes[row] for row in groups)
    with pytest.raises(InputError, match="a group for each of 3 rows, got 2"):
        resampler(3, torch.tensor([1, 2]))
    same = torch.randint(4, (4,), generator=torch.Generator().manual_seed(1))
    for groups in (None, torch.tensor([9, 8, 7, 6])):
        drawn, units = resampler(4, groups)
        assert drawn(torch.Generator().manual_seed(1)).tolist() == same.tolist()
        assert units == 4


def test_a_bootstrap_interval_holds_the_stated_share_of_draws(generator: torch.Generator) -> None:
    values = torch.arange(100, dtype=torch.float64)
    draws: list[float] = []

    def mean(rows: torch.Tensor) -> float:
        draws.append(float(values[rows].mean()))
        return draws[-1]

    found = bootstrap(mean, 100, generator=generator, rounds=200, unit="filters")
    assert (found.value, found.n, found.unit) == (49.5, 100, "filters")
    assert len(draws) == 201
    assert found.interval == pytest.approx(percentile_interval(draws[1:]))
    inside = [found.low <= d <= found.high for d in draws[1:]]
    assert 0.93 <= sum(inside) / 200 <= 0.97
    with pytest.raises(InputError, match="at least 1 photo to measure on, got 0"):
        bootstrap(mean, 0, generator=generator)


def test_rounds_without_a_value_do_not_count() -> None:
    assert percentile_interval([math.nan, 1.0, 3.0], 1.0) == (1.0, 3.0)
    assert all(map(math.isnan, percentile_interval([math.nan, math.inf])))


def test_an_estimate_knows_its_ends_and_whether_it_has_any() -> None:
    some = Estimate(0.5, (0.4, 0.7), 9, "filters")
    assert (some.low, some.high, some.defined, some.has_interval) == (0.4, 0.7, True, True)
    assert some.scaled(100) == Estimate(50.0, (40.0, 70.0), 9, "filters")
    none = Estimate.undefined("draws")
    assert (none.defined, none.has_interval, none.n, none.unit) == (False, False, 0, "draws")
    half = Estimate(1.0, (0.5, math.nan), 1)
    assert half.defined
    assert not half.has_interval
    assert half.to_dict() == {"value": 1.0, "interval": [0.5, None], "n": 1, "unit": "photos"}
