"""Parts that are found without training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from partlens.explainer.teachers import places_in_view
from partlens.explainer.views import view_windows
from partlens.network.zoo import load_performer
from partlens.object_parts.finding import PartFinder, added, find_parts, finding_layers, places_of_views
from partlens.object_parts.inspection import FindingConfig

PHOTOS, SIDE = 40, 10


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WINDOWS = view_windows(PHOTOS, 4, draws(1), 0.6)
PLACES = 0.25 + 0.5 * torch.rand(PHOTOS, 2, 2, generator=draws(2))


def bumps(places: Tensor) -> Tensor:
    cells = (torch.arange(SIDE) + 0.5) / SIDE
    row, col = ((cells - places[..., axis, None]) * SIDE for axis in (0, 1))
    return torch.exp(-(row.square()[..., :, None] + col.square()[..., None, :]) / 2)


def layer_of(places: Tensor, noise: float = 0.0) -> Callable[[Tensor, int], Tensor]:
    """Each filter is a bump at a part that moves with the photo, the last one a bump that stays."""

    def view(photos: Tensor, number: int) -> Tensor:
        moved = places_in_view(places[photos], WINDOWS[photos, number])
        maps = bumps(torch.cat([moved, torch.full_like(moved[:, :1], 0.5)], 1))
        drawn = torch.rand(PHOTOS, *maps.shape[1:], generator=draws(7 + number))
        return maps + noise * drawn[photos]

    return view


layer_with_two_parts = layer_of(PLACES)


def distances(found: Tensor, planted: Tensor) -> Tensor:
    """Mean distance over photos of each planted part (column) from each found one (row)."""
    return (found[:, :, None] - planted[:, None]).norm(dim=-1).mean(0)


def test_two_parts_that_move_with_the_photo_are_found_and_stable() -> None:
    found = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(parts_max=2), draws())
    assert float(distances(found.places, PLACES).amin(0).max()) < 0.05
    assert found.movement.max() < 0.2
    assert found.stability.min() > 0.9


def test_a_found_part_is_located_in_further_photos_and_after_it_was_saved() -> None:
    found = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(parts_max=2), draws())
    maps = layer_with_two_parts(torch.arange(5), 0)
    again = PartFinder.of(found.finder.tensors())
    assert torch.equal(again(maps), found.finder(maps))
    assert float((again(maps) - found.places[:5]).abs().max()) < 0.05


@pytest.mark.parametrize("planted", [2, 3, 4])
def test_as_many_parts_are_kept_as_move_independently(planted: int) -> None:
    places = 0.2 + 0.6 * torch.rand(PHOTOS, planted, 2, generator=draws(3))
    found = find_parts(layer_of(places), WINDOWS, FindingConfig(), draws())
    assert found.supported == planted
    assert float(distances(found.places[:, :planted], places).amin(0).max()) < 0.06


def test_of_a_rigid_object_whose_parts_foretell_each_other_only_the_fewest_are_kept() -> None:
    object_at = 0.3 + 0.4 * torch.rand(PHOTOS, 1, 2, generator=draws(4))
    places = object_at + torch.tensor([[-0.15, -0.15], [0.15, -0.15], [-0.15, 0.15], [0.15, 0.15]])
    found = find_parts(layer_of(places), WINDOWS, FindingConfig(), draws())
    assert found.supported <= 3
    assert find_parts(layer_of(places), WINDOWS, FindingConfig(parts_min=5), draws()).supported == 5


def test_noise_supports_no_part() -> None:
    def noise(photos: Tensor, number: int) -> Tensor:
        return torch.rand(PHOTOS, 6, SIDE, SIDE, generator=draws(number))[photos]

    found = find_parts(noise, WINDOWS, FindingConfig(parts_min=1), draws())
    assert found.supported == 1
    assert found.movement[0] > 0.9


def test_few_photos_give_the_fewest_parts_and_no_stability() -> None:
    few = WINDOWS[:6]
    found = find_parts(layer_with_two_parts, few, FindingConfig(parts_min=1), draws())
    assert found.supported == 1
    assert bool(found.stability.isnan().all())


def test_a_filter_that_is_a_hundred_times_as_strong_changes_no_part() -> None:
    def stronger(photos: Tensor, number: int) -> Tensor:
        return layer_with_two_parts(photos, number) * torch.tensor([100.0, 1.0, 1.0])[:, None, None]

    one = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(), draws())
    other = find_parts(stronger, WINDOWS, FindingConfig(), draws())
    assert torch.allclose(one.places, other.places, atol=1e-4)


def test_the_same_seed_finds_the_same_and_another_seed_or_order_the_same_parts() -> None:
    one = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(), draws())
    assert torch.equal(one.places, find_parts(layer_with_two_parts, WINDOWS, FindingConfig(), draws()).places)
    order = torch.randperm(PHOTOS, generator=draws(5))
    turned = find_parts(
        lambda photos, number: layer_with_two_parts(order[photos], number), WINDOWS[order], FindingConfig(), draws(6)
    )
    assert float(distances(turned.places, one.places[order]).amin(0).max()) < 0.05


def test_places_are_the_mean_of_the_photo_and_its_mirror() -> None:
    found = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(parts_max=2), draws())
    everyone = torch.arange(PHOTOS)
    whole, mirror = (found.finder(layer_with_two_parts(everyone, view)) for view in (0, 1))
    mirror = torch.stack([mirror[..., 0], 1 - mirror[..., 1]], -1)
    assert torch.allclose(found.places, (whole + mirror) / 2)


def test_places_of_a_coarse_layer_are_sharpened_on_a_finer_one() -> None:
    """The coarse layer smears the bumps over half of the side; the finer one shows them, and noise."""
    finer = layer_of(PLACES, 0.1)

    def coarse(photos: Tensor, number: int) -> Tensor:
        return F.avg_pool2d(layer_with_two_parts(photos, number), 5, 2, 2)

    config = FindingConfig(parts_max=2)
    plain, sharp = (find_parts(coarse, WINDOWS, config, draws(), finer=each) for each in (None, finer))
    errors = [float(distances(each.places, PLACES).amin(0).max()) for each in (plain, sharp)]
    assert errors[1] < 0.6 * errors[0]
    assert torch.equal(plain.movement, sharp.movement)  # the same parts
    some = torch.arange(5)
    again = PartFinder.of(sharp.finder.tensors()).only([1])
    maps = coarse(some, 0), finer(some, 0)
    assert torch.allclose(again(*maps), sharp.finder(*maps)[:, [1]])
    assert torch.equal(sharp.finder(maps[0]), plain.finder(maps[0]))


def test_places_of_many_photos_are_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(parts_max=2), draws())
    asked: list[int] = []

    def later(photos: Tensor, view: int) -> Tensor:
        asked.append(len(photos))
        return layer_with_two_parts(photos, view)

    monkeypatch.setattr("partlens.object_parts.finding._PHOTOS_AT_ONCE", 16)
    assert torch.allclose(places_of_views(found.finder, WINDOWS, later), found.places, atol=1e-3)
    assert asked == [16, 16, 8] * 2


def test_where_a_finer_layer_shows_nothing_places_are_those_of_the_later_layer() -> None:
    later = layer_with_two_parts
    found = find_parts(later, WINDOWS, FindingConfig(parts_max=2), draws(), finer=lambda *view: 0 * later(*view))
    assert torch.equal(found.places, find_parts(later, WINDOWS, FindingConfig(parts_max=2), draws()).places)


@pytest.mark.parametrize(("name", "layers"), [("resnet50", ("layer4", "layer3")), ("squeezenet1_1", ("classifier.1",))])
def test_only_a_coarse_layer_has_a_finer_one_beside_it(name: str, layers: tuple[str, ...]) -> None:
    assert finding_layers(load_performer(f"torchvision:{name}@random:0")) == layers


def test_a_finder_of_some_parts_is_that_of_all_without_the_others() -> None:
    found = find_parts(layer_of(PLACES, 0.1), WINDOWS, FindingConfig(parts_min=4), draws())
    maps = layer_with_two_parts(torch.arange(3), 0)
    assert torch.equal(found.finder.only([2, 0])(maps), found.finder(maps)[:, [2, 0]])


def test_what_a_place_adds_is_what_the_others_do_not_foretell() -> None:
    free = torch.randn(4000, 2, 2, generator=draws(8)).double()
    follower = 0.6 * free[:, 0] @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double() + 0.8 * free[:, 1]
    adds = added(torch.cat([free, follower[:, None]], 1), [0])
    assert adds.tolist() == pytest.approx([0, 1, 0.64], abs=0.03)
    assert added(free, []).tolist() == pytest.approx([1, 1])


def test_as_many_numbers_as_photos_leave_nothing_to_add() -> None:
    assert added(torch.rand(5, 3, 2, generator=draws()), [0, 1]).tolist() == [0, 0, 0]
    chance = torch.stack([added(torch.randn(20, 5, 2, generator=draws(n)), [0, 1, 2, 3])[4] for n in range(200)])
    assert float(chance.mean()) == pytest.approx(1, abs=0.1)
