"""Parts that are found without training."""

from __future__ import annotations

import torch
from torch import Tensor

from partlens.explainer.teachers import places_in_view
from partlens.explainer.views import view_windows
from partlens.object_parts.finding import PartFinder, find_parts
from partlens.object_parts.inspection import FindingConfig

PHOTOS, SIDE = 40, 10


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


WINDOWS = view_windows(PHOTOS, 4, draws(1), 0.6)
PLACES = 0.25 + 0.5 * torch.rand(PHOTOS, 2, 2, generator=draws(2))


def layer_with_two_parts(photos: Tensor, view: int) -> tuple[Tensor]:
    """Filters 0 and 1 are bumps at parts that move with the photo, 2 is a bump that stays."""
    places = places_in_view(PLACES[photos], WINDOWS[photos, view])
    both = torch.cat([places, torch.full_like(places[:, :1], 0.5)], 1)
    cells = (torch.arange(SIDE) + 0.5) / SIDE
    row, col = ((cells - both[..., axis, None]) * SIDE for axis in (0, 1))
    return (torch.exp(-(row.square()[..., :, None] + col.square()[..., None, :]) / 2),)


def test_two_parts_that_move_with_the_photo_are_found_and_stable() -> None:
    found = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(parts_max=2), draws())
    distance = (found.places[:, :, None] - PLACES[:, None]).norm(dim=-1).mean(0)
    assert float(distance.amin(0).max()) < 0.05
    assert found.movement.max() < 0.2
    assert found.stability.min() > 0.9


def test_a_found_part_is_located_in_further_photos_and_after_it_was_saved() -> None:
    found = find_parts(layer_with_two_parts, WINDOWS, FindingConfig(parts_max=2), draws())
    maps = layer_with_two_parts(torch.arange(5), 0)
    again = PartFinder.of(found.finder.tensors())
    assert torch.equal(again(maps), found.finder(maps))
    assert float((again(maps) - found.places[:5]).abs().max()) < 0.05
