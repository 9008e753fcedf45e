"""Candidates for parts: what is found in a later layer, and which of it moves with the photo."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from partlens.explainer.teachers import place_correlations
from partlens.explainer.views import view_windows
from partlens.object_parts import candidates
from partlens.object_parts.candidates import LaterParts, _factorised, centroids, chosen_parts, part_codes

MADE = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "explainer" / "made_photos.py")))
SIDE, blob, draws = MADE.SIDE, MADE.blob, MADE.draws
SIZES = (3, 4, 5, 6, 8, 10, 12, 16)


class Photos(MADE.Photos):
    """These photos as the search reads them."""

    def view(self, photos: Tensor, number: int) -> Tensor:
        return self.shown(number)[photos]

    def later(self) -> LaterParts:
        return LaterParts(self.view, len(self.part), draws(), SIZES)


def test_centroid_of_squared_codes_by_hand() -> None:
    codes = torch.zeros(1, 2, 4, 4)
    codes[0, 0, 1, 0], codes[0, 0, 1, 2] = 1.0, 2.0
    # Squares weigh 1 and 4: column 0.5 * 1/5 + 2.5 * 4/5 = 2.1 of 4, row 1.5 of 4; an empty map stands in the middle.
    assert centroids(codes).flatten().tolist() == pytest.approx([0.375, 0.525, 0.5, 0.5])


def test_planted_factors_are_found() -> None:
    truth = torch.block_diag(*[torch.rand(1, 5, generator=draws(k)) + 0.2 for k in range(3)])
    cells = torch.rand(600, 3, generator=draws(5)).pow(3) @ truth
    cells[300:, 0] = 9.0  # what the second time does not use
    used = torch.ones(2, 600, dtype=torch.bool)
    used[1, 300:] = False
    more, found = _factorised(cells, used, [4, 3], draws(6))
    assert more.shape == (4, cells.shape[1])
    assert bool((found >= 0).all())
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    likeness = (found @ torch.nn.functional.normalize(truth, dim=1).t()).amax(0)
    assert float(likeness.min()) > 0.98


def test_dictionaries_do_not_compete() -> None:
    maps, parts = torch.rand(2, 6, 3, 3, generator=draws(1)), torch.rand(5, 6, generator=draws(2))
    alone = torch.cat([part_codes(maps, parts[:2]), part_codes(maps, parts[2:])], 1)
    assert torch.allclose(part_codes(maps, parts[:2], parts[2:]), alone, atol=1e-5)


def test_parts_compete_for_a_cell() -> None:
    parts = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    maps = torch.tensor([3.0, 3.0])[None, :, None, None]
    codes = part_codes(maps, parts)[0, :, 0, 0]
    assert float(codes[1]) == pytest.approx(3 * math.sqrt(2), rel=0.05)
    assert float(codes[0]) < 0.15 * float(codes[1])


def test_the_part_that_moves_with_the_photo_teaches_first() -> None:
    photos = Photos()
    found = chosen_parts(photos.later(), photos.windows, 3, 0.0)
    assert bool((found.movement.diff() >= 0).all())
    assert float(found.movement[0]) < 0.1
    missed = [float((found.places[:, 0] - truth).norm(dim=-1).mean()) for truth in (photos.part, photos.other)]
    assert min(missed) < 0.05
    # A place that never moves is no part, though its distance to where the crop takes it is small.
    still = found.places.std(0).mean(-1) < 0.02
    assert not bool(still[0])


def test_a_place_that_never_moves_does_not_teach() -> None:
    """Under mirrors alone a place in the middle misses nothing; the plain distance would choose it first."""
    photos = Photos(views=2)
    found = chosen_parts(photos.later(), photos.windows, 30, 0.0)
    assert float(found.places[:, 0].std(0).mean()) > 0.1
    still = found.places.std(0).mean(-1) < 0.01
    assert bool((found.movement[still] > 0.5).all())


def test_photos_are_read_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    photos, asked = Photos(), []

    def view(some: Tensor, number: int) -> Tensor:
        asked.append(len(some))
        return photos.view(some, number)

    whole = chosen_parts(photos.later(), photos.windows, 2, 0.3)
    monkeypatch.setattr(candidates, "_PHOTOS_AT_ONCE", 12)
    parted = chosen_parts(LaterParts(view, 30, draws(), SIZES), photos.windows, 2, 0.3)
    assert max(asked) == 12
    assert sum(asked) == 12 + 5 * 30
    assert float(parted.movement[0]) < 0.1
    assert parted.places.shape == whole.places.shape


def test_variety_chooses_parts_that_move_apart() -> None:
    photos = Photos()
    alike = chosen_parts(photos.later(), photos.windows, 6, 0.0)
    varied = chosen_parts(photos.later(), photos.windows, 6, 2.0)
    among = [float(place_correlations(found.places).fill_diagonal_(0.0).mean()) for found in (alike, varied)]
    assert among[1] < among[0] - 0.1
    assert torch.equal(varied.places[:, 0], alike.places[:, 0])


@pytest.mark.parametrize(
    ("photos", "maps", "message"),
    [(3, 1.0, "at least 4 photos to find parts in, got 3"), (8, 0.0, "a later layer that activates")],
)
def test_what_cannot_teach_is_refused(photos: int, maps: float, message: str) -> None:
    windows = view_windows(photos, 2, draws(), 0.6)
    with pytest.raises(ValueError, match=message):
        later = LaterParts(lambda some, _: torch.full((len(some), 2, 4, 4), maps), photos, draws(), SIZES)
        chosen_parts(later, windows, 2, 0.3)
