"""Part teachers: what is found in a later layer, and what it costs not to stand where a teacher does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from partlens.explainer import teachers
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.teachers import (
    LaterParts,
    Source,
    _factorised,
    _place_posterior,
    centroids,
    find_teachers,
    matched_teachers,
    part_codes,
    part_teachers,
    places_in_photo,
    places_in_view,
    teacher_cost,
)
from partlens.explainer.views import TrainingMaps, view_windows

SIDE = 10


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(places: Tensor, width_cells: float = 1.0) -> Tensor:
    """One bump per photo at a place (row, col) in shares; nothing where it is outside."""
    cells = (torch.arange(SIDE) + 0.5) / SIDE
    row = (cells - places[:, 0, None]) * SIDE / width_cells
    col = (cells - places[:, 1, None]) * SIDE / width_cells
    return torch.exp(-(row.square()[:, :, None] + col.square()[:, None, :]) / 2)


class Photos:
    """A later layer of four filters: two parts that move with the photo, one that stays, one that jumps."""

    def __init__(self, photos: int = 30, views: int = 5) -> None:
        self.windows = view_windows(photos, views, draws(1), 0.6)
        self.part = 0.25 + 0.5 * torch.rand(photos, 2, generator=draws(2))
        self.other = 0.25 + 0.5 * torch.rand(photos, 2, generator=draws(4))
        self.jumps = torch.rand(views, photos, 2, generator=draws(3))

    def view(self, photos: Tensor, number: int) -> Tensor:
        return self.shown(number)[photos]

    def later(self) -> LaterParts:
        return LaterParts(self.view, len(self.part), draws())

    def shown(self, number: int) -> Tensor:
        both = places_in_view(torch.stack([self.part, self.other], 1), self.windows[:, number])
        still = torch.full_like(self.part, 0.5)
        shown = [blob(both[:, 0]), 0.9 * blob(both[:, 1]), blob(still), blob(self.jumps[number])]
        return torch.stack(shown, 1)


def test_centroid_of_squared_codes_by_hand() -> None:
    codes = torch.zeros(1, 2, 4, 4)
    codes[0, 0, 1, 0], codes[0, 0, 1, 2] = 1.0, 2.0
    # Squares weigh 1 and 4: column 0.5 * 1/5 + 2.5 * 4/5 = 2.1 of 4, row 1.5 of 4; an empty map stands in the middle.
    assert centroids(codes).flatten().tolist() == pytest.approx([0.375, 0.525, 0.5, 0.5])


def test_a_place_goes_to_the_view_and_back() -> None:
    windows = view_windows(40, 4, draws(), 0.5)
    places = torch.rand(40, 3, 2, generator=draws(1))
    for number in range(4):
        there = places_in_view(places, windows[:, number])
        assert torch.allclose(places_in_photo(there, windows[:, number]), places, atol=1e-5)
    crop = torch.tensor([[0.5, 0.25, 0.5, 0.5, 0.0]])
    assert places_in_view(torch.tensor([[[0.5, 0.75]]]), crop).tolist() == [[[0.5, 0.5]]]


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
    found = part_teachers(photos.later(), photos.windows, 3, 0.0)
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
    found = part_teachers(photos.later(), photos.windows, 30, 0.0)
    assert float(found.places[:, 0].std(0).mean()) > 0.1
    still = found.places.std(0).mean(-1) < 0.01
    assert bool((found.movement[still] > 0.5).all())


def test_photos_are_read_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    photos, asked = Photos(), []

    def view(some: Tensor, number: int) -> Tensor:
        asked.append(len(some))
        return photos.view(some, number)

    whole = part_teachers(photos.later(), photos.windows, 2, 0.3)
    monkeypatch.setattr(teachers, "_PHOTOS_AT_ONCE", 12)
    parted = part_teachers(LaterParts(view, 30, draws()), photos.windows, 2, 0.3)
    assert max(asked) == 12
    assert sum(asked) == 12 + 5 * 30
    assert float(parted.movement[0]) < 0.1
    assert parted.places.shape == whole.places.shape


def test_variety_chooses_parts_that_move_apart() -> None:
    photos = Photos()
    alike = part_teachers(photos.later(), photos.windows, 6, 0.0)
    varied = part_teachers(photos.later(), photos.windows, 6, 2.0)
    assert varied.correlation < alike.correlation - 0.1
    assert torch.equal(varied.places[:, 0], alike.places[:, 0])


@pytest.mark.parametrize(
    ("photos", "maps", "message"),
    [(3, 1.0, "at least 4 photos to find parts in, got 3"), (8, 0.0, "a later layer that activates")],
)
def test_what_cannot_teach_is_refused(photos: int, maps: float, message: str) -> None:
    windows = view_windows(photos, 2, draws(), 0.6)
    with pytest.raises(ValueError, match=message):
        later = LaterParts(lambda some, _: torch.full((len(some), 2, 4, 4), maps), photos, draws())
        part_teachers(later, windows, 2, 0.3)


def slow_cost(maps: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The definition in the docstring, one cell at a time."""
    images, filters, rows, cols = maps.shape
    result = np.zeros(filters)
    for f in range(filters):
        total, known = 0.0, 0
        for i in range(images):
            if np.isnan(wanted[i, f]).any():
                continue
            known += 1
            q = np.exp(maps[i, f] - maps[i, f].max())
            q /= q.sum()
            r = sum(q[a, b] * a for a in range(rows) for b in range(cols))
            c = sum(q[a, b] * b for a in range(rows) for b in range(cols))
            blurred = np.array(
                [
                    [
                        math.exp(
                            -((a - wanted[i, f, 0]) ** 2 + (b - wanted[i, f, 1]) ** 2) / (2 * teachers._BLUR_CELLS**2)
                        )
                        for b in range(cols)
                    ]
                    for a in range(rows)
                ]
            )
            blurred /= blurred.sum()
            total += ((r - wanted[i, f, 0]) ** 2 + (c - wanted[i, f, 1]) ** 2) / 4 - 0.3 * (blurred * np.log(q)).sum()
        result[f] = total / max(known, 1)
    return result


def test_cost_is_the_definition() -> None:
    maps = torch.randn(6, 3, 5, 4, generator=draws(), dtype=torch.float64) * 3
    wanted = torch.rand(6, 3, 2, generator=draws(1), dtype=torch.float64) * 4
    wanted[1, 0] = math.nan
    wanted[:, 2] = math.nan
    found = teacher_cost(maps, wanted)
    assert np.allclose(found.numpy(), slow_cost(maps.numpy(), wanted.numpy()), atol=1e-10)
    assert float(found[2]) == 0


def test_learning_from_the_cost_moves_the_place_to_the_teacher() -> None:
    maps = torch.randn(2, 1, 7, 7, generator=draws()).requires_grad_()
    wanted = torch.tensor([[[1.0, 5.0]], [[4.5, 2.0]]])
    optimiser = torch.optim.Adam([maps], 0.1)
    for _ in range(200):
        optimiser.zero_grad()
        teacher_cost(maps.relu(), wanted).sum().backward()
        optimiser.step()
    assert torch.allclose(_place_posterior(maps.relu().detach())[1], wanted, atol=0.35)


def test_filters_get_the_teacher_at_whose_place_their_channel_answers() -> None:
    photos = Photos(photos=40)
    where = torch.stack([photos.part, photos.other], 1)
    kinds = torch.tensor([1, 0, 0, 1, 1, 0])
    bumps = torch.stack([blob(photos.part), blob(photos.other)], 1)
    channels = 0.2 * torch.rand(40, 6, SIDE, SIDE, generator=draws(9)) + bumps[:, kinds]
    assert matched_teachers(channels, where).tolist() == kinds.tolist()
    # A channel that activates on both goes to the teacher with a seat left; dead channels are seated, too.
    channels[:, 2] += 3 * bumps.sum(1)
    channels[:, 5] = 0
    found = matched_teachers(channels, where)
    assert found.bincount().tolist() == [3, 3]
    assert found[[0, 1, 3, 4]].tolist() == kinds[[0, 1, 3, 4]].tolist()


def data_of(photos: Photos, tap: Tensor, later: Tensor, labels: Tensor | None = None) -> TrainingMaps:
    labels = torch.zeros(len(photos.part), dtype=torch.long) if labels is None else labels
    return TrainingMaps(tap.numpy(), (later.numpy(),), photos.windows, labels, np.arange(0))


def explainer_of(filters: int, **changes: object) -> Explainer:
    structure = ExplainerStructure("tap", ("upper",), 4, filters, (SIDE, SIDE), None, "tap")
    config = ExplainerConfig(**{"views": 3, "warmup_epochs": 1, "learning_rate_ordinary": 0.0, **changes})
    return Explainer(structure, config, torch.nn.Identity(), generator=draws())


def test_teachers_come_from_the_last_target_or_from_where_they_are_sought() -> None:
    """The tap shows one part and the later layer another."""
    photos = Photos(photos=40, views=3)

    def rows(of: Tensor) -> Tensor:
        noise = 0.05 * torch.rand(40 * 3, 4, SIDE, SIDE, generator=draws(8))
        seen = [places_in_view(of[:, None], photos.windows[:, number])[:, 0] for number in range(3)]
        noise[:, 1] += torch.stack([blob(places) for places in seen], 1).flatten(0, 1)
        return noise

    asked: list[tuple[int, int]] = []

    def told(_: Explainer, data: TrainingMaps, category: int, generator: torch.Generator) -> Source:
        asked.append((category, generator.initial_seed()))
        return lambda number: places_in_view(photos.part[:, None], data.windows[:, number])

    data, explainer = data_of(photos, rows(photos.part), rows(photos.other)), explainer_of(4, teachers=1, seed=3)
    missed = []
    for found in (find_teachers(explainer, data), find_teachers(explainer, data, told)):
        places = found[0]["teachers"][:, 0]
        missed.append([float((places - of).norm(dim=-1).mean()) for of in (photos.part, photos.other)])
    assert missed[0][1] < 0.08 < missed[0][0]
    assert missed[1][0] < 1e-5
    assert [category for category, _ in asked] == [0]


def test_every_filter_gets_a_teacher_of_its_channel() -> None:
    photos = Photos(photos=40, views=3)
    seen = torch.stack([photos.shown(v) for v in range(3)], 1).flatten(0, 1)
    state, _ = find_teachers(explainer_of(4, teachers=2), data_of(photos, seen, seen))
    own = seen.unflatten(0, (40, 3))[:, 0]
    assert state["teacher_of"][:, 0].tolist() == matched_teachers(own.relu(), state["teachers"]).tolist()


def test_every_category_has_teachers_of_its_own() -> None:
    photos = Photos(photos=24, views=3)
    tap = torch.stack([photos.shown(v) for v in range(3)], 1).flatten(0, 1)
    labels = torch.arange(24) % 2
    explainer = explainer_of(4, teachers=2)
    state, found = find_teachers(explainer, data_of(photos, tap, tap, labels))
    places, of = state["teachers"], state["teacher_of"]
    assert places.shape == (24, 4, 2)
    # Filters change category: each has a teacher in every one.
    for category in (0, 1):
        others = labels != category
        mine = slice(2 * category, 2 * category + 2)
        assert sorted(set(of[:, category].tolist())) == [2 * category, 2 * category + 1]
        assert bool(places[others, mine].isnan().all())
        assert not bool(places[~others, mine].isnan().any())
    assert 0 <= found["teacher_movement"] < 1
