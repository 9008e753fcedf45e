"""What windows carry of a score: a linear network, where every figure is known by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from partlens.object_parts import regions
from partlens.object_parts.account import Truth, account_of
from partlens.object_parts.regions import (
    AREAS,
    TapMaps,
    _windows_elsewhere,
    carrying_order,
    distances,
    grid_places,
    kept,
    kept_at,
    kept_by_kind,
    nearest_cells,
    part_cells,
    shapley_shares,
    whole_photos,
    windows_at,
)

SIDE, PHOTOS = 10, 12


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def add_up(maps: Tensor) -> Tensor:
    """Class 0 scores the sum of filter 0, class 1 is always at 0.1."""
    total = maps[:, 0].flatten(1).sum(1)
    return torch.stack([total, torch.full_like(total, 0.1)], 1)


def lit(places: Tensor, upper: object = add_up) -> TapMaps:
    """Filter 0 is one at the cell of each place and zero elsewhere."""
    maps = torch.zeros(len(places), 2, SIDE, SIDE)
    for photo, here in enumerate((places * SIDE).long()):
        for row, col in here.tolist():
            maps[photo, 0, row, col] = 1.0
    return TapMaps(upper, maps, torch.zeros(2, SIDE, SIDE))


PLACES = 0.05 + 0.9 * torch.rand(PHOTOS, 2, 2, generator=draws(3))


@pytest.mark.parametrize("area", AREAS)
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_windows_have_exactly_the_area_however_many_they_are(area: float, parts: int) -> None:
    places = torch.rand(7, parts, 2, generator=draws())
    windows = windows_at(places, (SIDE, SIDE), area)
    assert windows.flatten(1).sum(1).tolist() == [round(area * SIDE * SIDE)] * 7
    away = _windows_elsewhere(windows, places, area)
    assert away.flatten(1).sum(1).tolist() == [round(area * SIDE * SIDE)] * 7
    assert not bool((windows & away).any())


def test_equally_far_cells_are_taken_in_their_order() -> None:
    assert nearest_cells(torch.zeros(2, 2), 3).int().tolist() == [[1, 1], [1, 0]]


def test_each_cell_belongs_to_one_player() -> None:
    cells = part_cells(PLACES, (SIDE, SIDE), 0.3)
    assert bool((cells.int().sum(1) == 1).all())
    assert cells[:, :-1].flatten(1).sum(1).tolist() == [30] * PHOTOS


def test_windows_at_the_parts_keep_the_whole_score_and_windows_beside_them_nothing() -> None:
    taps = lit(PLACES)
    found = kept_by_kind(taps, whole_photos(taps), PLACES, draws())
    assert bool((found["parts"].score == 1).all())
    assert bool((found["parts"].decision == 1).all())
    assert bool((found["rest"].score == 0).all())
    assert float(found["random"].score[:, 0].mean()) < 0.4
    assert float(found["other_photos"].score[:, 0].mean()) < 0.4


def test_windows_of_other_photos_are_never_the_photos_own() -> None:
    places = torch.linspace(0.05, 0.95, PHOTOS)[:, None, None].expand(-1, 1, 2)
    taps = lit(places)
    found = kept_by_kind(taps, whole_photos(taps), places, draws(), draws=1)
    own = windows_at(places, taps.grid, 0.1)
    # Where two photos' windows do not overlap, another photo's window keeps nothing at all.
    assert float(found["other_photos"].score[:, 0].mean()) < 1
    assert bool((found["parts"].score[:, 0] == 1).all())
    assert own.shape == (PHOTOS, SIDE, SIDE)


def test_windows_on_and_beside_the_object_stay_there() -> None:
    objects = torch.zeros(PHOTOS, SIDE, SIDE)
    objects[:, :, :5] = 1.0
    objects[0] = torch.nan
    left = TapMaps(add_up, torch.zeros(PHOTOS, 2, SIDE, SIDE), torch.zeros(2, SIDE, SIDE))
    left.maps[:, 0, :, :5] = 1.0
    found = kept_by_kind(left, whole_photos(left), PLACES, draws(), objects=objects)
    # A tenth of the image at the middle of the object, which is half of the image: all of it is on the object.
    assert found["object"].score[1:, 0].tolist() == pytest.approx([0.2] * (PHOTOS - 1))
    assert found["off_object"].score[1:, 0].tolist() == [0.0] * (PHOTOS - 1)
    assert math.isnan(float(found["object"].score[0, 0]))


def test_the_middle_of_an_object_is_known_to_a_part_of_a_cell() -> None:
    # The object's middle lies between two columns of cells, and all that counts is there: a window that stood a
    # quarter of a cell beside it would lose some of it.
    objects = torch.zeros(PHOTOS, SIDE, SIDE)
    objects[:, 2:8, 2:7] = 1.0
    objects[:, 2:8, 7] = 0.4
    middle = torch.tensor([[[0.5, (2 + 2.5 * 5 / 5.4 + 5.5 * 0.4 / 5.4) / SIDE]]]).expand(PHOTOS, -1, -1)
    window = windows_at(middle, (SIDE, SIDE), 0.1)
    maps = torch.zeros(PHOTOS, 2, SIDE, SIDE)
    maps[:, 0] = window.float()
    taps = TapMaps(add_up, maps, torch.zeros(2, SIDE, SIDE))
    found = kept_by_kind(taps, whole_photos(taps), PLACES, draws(), objects=objects)
    assert found["object"].score[:, 0].tolist() == pytest.approx([1.0] * PHOTOS)


def test_windows_stand_where_most_is_carried_also_at_parts_that_the_photos_do_not_support() -> None:
    idle = torch.rand(PHOTOS, 2, 2, generator=draws(9))
    places = torch.cat([idle, PLACES[:, :1]], 1)  # the last one carries all, and is no part of its own
    taps = lit(PLACES[:, :1])
    found = account_of(taps, places, taps, places, 1, Truth(), draws())
    assert found.order == (2, 0)
    assert found.windows[0] == 1
    assert bool((found.kept["parts"].score[:, 0] == 1).all())


def test_a_photo_on_which_nothing_scores_as_much_is_undefined() -> None:
    taps = lit(PLACES, lambda maps: -add_up(maps))
    assert bool(whole_photos(taps).range.isnan().all())


def test_cells_are_set_to_the_mean_map_where_that_stands_for_nothing() -> None:
    taps = lit(PLACES)
    filled = TapMaps(add_up, taps.maps, torch.full((2, SIDE, SIDE), 0.01))
    nobody = kept(filled, whole_photos(filled), torch.zeros(PHOTOS, 1, SIDE, SIDE, dtype=torch.bool))
    assert bool((nobody.score == 0).all())


def test_the_best_of_all_windows_is_a_ceiling() -> None:
    taps = lit(PLACES[:, :1])
    grid = kept_at(taps, whole_photos(taps), grid_places(4))
    assert grid.shape == (PHOTOS, len(AREAS), 16)
    assert bool((grid[:, -1].amax(1) == 1).all())


def test_the_part_that_carries_comes_first_and_gets_the_only_window() -> None:
    idle = torch.rand(PHOTOS, 1, 2, generator=draws(9))
    taps = lit(PLACES[:, :1])
    order, windows = carrying_order(taps, whole_photos(taps), torch.cat([idle, PLACES[:, :1]], 1))
    assert order == (1, 0)
    assert windows[0] == 1


def test_a_part_at_the_place_of_one_before_it_is_left_out() -> None:
    first, second = PLACES[:, :1], torch.rand(PHOTOS, 1, 2, generator=draws(9))
    taps = lit(first)
    order, windows = carrying_order(taps, whole_photos(taps), torch.cat([second, first, first + 0.3 / SIDE, second], 1))
    assert order == (1, 0)
    assert max(windows) <= 2
    # Of two at one place the first found stays, which the photos support, even where the second carries more.
    round_about = torch.exp(-200 * distances(first, (SIDE, SIDE)).square())
    taps = TapMaps(add_up, torch.cat([round_about, 0 * round_about], 1), torch.zeros(2, SIDE, SIDE))
    off = first + torch.tensor([0.0, 0.49 / SIDE])
    assert carrying_order(taps, whole_photos(taps), torch.cat([off, first], 1))[0] == (0,)


def surprising(maps: Tensor) -> Tensor:
    """A score with interactions of its cells."""
    flat = maps[:, 0].flatten(1)
    score = (flat @ torch.linspace(0.2, 1, SIDE * SIDE)) ** 3 + flat.sum(1)
    return torch.stack([score, torch.zeros_like(score)], 1)


def slow_shapley(taps: TapMaps, cells: Tensor) -> Tensor:
    """The mean gain of each player over all orders, one photo."""
    whole = whole_photos(taps)
    players = cells.shape[1]
    gains = torch.zeros(players, dtype=torch.float64)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        keep = torch.zeros(1, 1, SIDE, SIDE, dtype=torch.bool)
        before = 0.0
        for player in order:
            keep = keep | cells[:, player, None]
            now = float(kept(taps, whole, keep).score)
            gains[player] += now - before
            before = now
    return gains / len(orders)


def test_shares_are_those_of_all_orders_and_sum_to_one() -> None:
    taps = lit(PLACES, surprising).take(slice(0, 1))
    cells = part_cells(PLACES[:1], taps.grid, 0.3)
    found = shapley_shares(taps, whole_photos(taps), cells, generator=draws())
    assert found.players[0].tolist() == pytest.approx(slow_shapley(taps, cells).tolist())
    assert float(found.players.sum()) == pytest.approx(1)
    assert bool((found.standard_error == 0).all())


def test_what_is_lost_without_a_part_is_what_the_score_really_loses() -> None:
    taps = lit(PLACES, surprising)
    whole = whole_photos(taps)
    cells = part_cells(PLACES, taps.grid, 0.3)
    found = shapley_shares(taps, whole, cells, generator=draws())
    without = kept(taps, whole, ~cells)
    assert torch.allclose(found.loss, 1 - without.score)
    assert torch.allclose(found.alone, kept(taps, whole, cells).score)


def test_many_players_are_sampled_with_a_standard_error_that_covers_the_exact_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = torch.rand(2, 4, 2, generator=draws(5))
    taps = lit(places, surprising)
    whole, cells = whole_photos(taps), part_cells(places, taps.grid, 0.4)
    exact = shapley_shares(taps, whole, cells, generator=draws(1))
    monkeypatch.setattr(regions, "MOST_EXACT_PLAYERS", 4)
    some = shapley_shares(taps, whole, cells, pairs=64, generator=draws(1))
    assert torch.allclose(some.players.sum(1), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(some.loss, exact.loss)
    assert torch.allclose(some.alone, exact.alone)
    assert bool(((some.players - exact.players).abs() <= 4 * some.standard_error + 1e-9).all())
    many = torch.rand(2, 10, 2, generator=draws())
    taps = lit(many, surprising)
    found = shapley_shares(taps, whole_photos(taps), part_cells(many, taps.grid, 0.4), generator=draws())
    assert bool((found.standard_error > 0).any())
