"""Part teachers: what is found in a later layer, and what it costs not to stand where a teacher does."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from partlens.explainer import teachers
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer, ExplainerStructure
from partlens.explainer.starting import find_teachers
from partlens.explainer.teachers import (
    BLUR_CELLS,
    LaterParts,
    centroids,
    in_step,
    matched_teachers,
    nonnegative_parts,
    part_codes,
    part_teachers,
    place_posterior,
    places_in_photo,
    places_in_view,
    teacher_cost,
)
from partlens.explainer.training_maps import TrainingMaps
from partlens.explainer.views import view_windows

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
        self.windows = view_windows(photos, views, 0.6, draws(1))
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
    windows = view_windows(40, 4, 0.5, draws())
    places = torch.rand(40, 3, 2, generator=draws(1))
    for number in range(4):
        there = places_in_view(places, windows[:, number])
        assert torch.allclose(places_in_photo(there, windows[:, number]), places, atol=1e-5)
    crop = torch.tensor([[0.5, 0.25, 0.5, 0.5, 0.0]])
    assert places_in_view(torch.tensor([[[0.5, 0.75]]]), crop).tolist() == [[[0.5, 0.5]]]


def test_planted_factors_are_found() -> None:
    truth = torch.block_diag(*[torch.rand(1, 5, generator=draws(k)) + 0.2 for k in range(3)])
    cells = torch.rand(600, 3, generator=draws(5)).pow(3) @ truth
    found = nonnegative_parts(cells, 3, draws(6))
    assert bool((found >= 0).all())
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    likeness = (found @ torch.nn.functional.normalize(truth, dim=1).t()).amax(0)
    assert float(likeness.min()) > 0.98


def test_parts_compete_for_a_cell() -> None:
    parts = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    maps = torch.tensor([3.0, 3.0])[None, :, None, None]
    codes = part_codes(maps, parts)[0, :, 0, 0]
    assert float(codes[1]) == pytest.approx(3 * math.sqrt(2), rel=0.05)
    assert float(codes[0]) < 0.15 * float(codes[1])


def test_the_part_that_moves_with_the_photo_teaches_first() -> None:
    photos = Photos()
    found = part_teachers([photos.later()], photos.windows, 3, 0.0)
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
    found = part_teachers([photos.later()], photos.windows, 30, 0.0)
    assert float(found.places[:, 0].std(0).mean()) > 0.1
    still = found.places.std(0).mean(-1) < 0.01
    assert bool((found.movement[still] > 0.5).all())


def test_photos_are_read_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    photos, asked = Photos(), []

    def view(some: Tensor, number: int) -> Tensor:
        asked.append(len(some))
        return photos.view(some, number)

    whole = part_teachers([photos.later()], photos.windows, 2, 0.3)
    monkeypatch.setattr(teachers, "PHOTOS_AT_ONCE", 12)
    parted = part_teachers([LaterParts(view, 30, draws())], photos.windows, 2, 0.3)
    assert max(asked) == 12
    assert sum(asked) == 12 + 5 * 30
    assert float(parted.movement[0]) < 0.1
    assert parted.places.shape == whole.places.shape


def test_variety_chooses_parts_that_move_apart() -> None:
    photos = Photos()
    alike = part_teachers([photos.later()], photos.windows, 6, 0.0)
    varied = part_teachers([photos.later()], photos.windows, 6, 2.0)
    assert varied.correlation < alike.correlation - 0.1
    assert torch.equal(varied.places[:, 0], alike.places[:, 0])


def test_the_better_source_teaches() -> None:
    photos = Photos()

    def truth(number: int) -> Tensor:
        return places_in_view(torch.stack([photos.part, photos.other], 1), photos.windows[:, number])

    def nowhere(number: int) -> Tensor:
        return photos.jumps[number][:, None].expand(-1, 3, -1)

    found = part_teachers([nowhere, photos.later(), truth], photos.windows, 2, 0.0)
    assert float(found.movement.max()) < 1e-4
    for place in (photos.part, photos.other):
        assert float((found.places - place[:, None]).abs().amax((0, 2)).min()) < 1e-5


def moving_together(photos: int, parts: int, noise: float) -> tuple[Tensor, Tensor]:
    """Places that follow one displacement of the object, each by its own share, and the same with noise."""
    share = torch.rand(parts, 2, generator=draws(8)) + 0.5
    truth = 0.5 + 0.1 * torch.randn(photos, 1, 1, generator=draws(5)) * share
    return truth, truth + noise * torch.randn(truth.shape, generator=draws(6))


def test_parts_in_step_lose_what_is_theirs_alone() -> None:
    truth, seen = moving_together(80, 12, 0.04)
    certain = torch.full((12,), 0.1)
    kept = in_step(seen, certain, 1)
    assert float((kept - truth).norm()) < 0.5 * float((seen - truth).norm())
    # A projection: what has one mode stays as it is, as do places with as many modes as are kept.
    assert torch.allclose(in_step(kept, certain, 1), kept, atol=1e-5)
    assert torch.allclose(in_step(truth, certain, 1), truth, atol=1e-5)
    assert torch.equal(in_step(seen, certain, 24), seen)


def test_what_follows_no_crop_has_no_say_in_the_modes() -> None:
    truth, seen = moving_together(80, 12, 0.01)
    seen[:, 0] = 4 * torch.rand(80, 2, generator=draws(7))  # moves more than all others together
    movement = torch.full((12,), 0.05)
    alike = in_step(seen, movement, 1)
    movement[0] = 1.0
    weighted = in_step(seen, movement, 1)
    missed = [float((places[:, 1:] - truth[:, 1:]).norm()) for places in (weighted, alike)]
    assert missed[0] < 0.2 * missed[1]


def test_a_part_with_ways_of_its_own_does_not_teach_in_step() -> None:
    photos = Photos()
    _, together = moving_together(30, 5, 0.01)

    def seen(number: int) -> Tensor:
        alone = places_in_view(photos.part[:, None], photos.windows[:, number])
        shaken = 0.005 * torch.randn(together.shape, generator=draws(number + 10))
        return torch.cat([alone, places_in_view(together, photos.windows[:, number]) + shaken], 1)

    for modes, taken in ((0, True), (1, False)):
        found = part_teachers([seen], photos.windows, 1, 0.0, modes)
        assert (found.chosen == (0,)) is taken


@pytest.mark.parametrize(
    ("photos", "maps", "message"),
    [(3, 1.0, "at least 4 photos to find parts in, got 3"), (8, 0.0, "a later layer that answers")],
)
def test_what_cannot_teach_is_refused(photos: int, maps: float, message: str) -> None:
    windows = view_windows(photos, 2, 0.6, draws())
    with pytest.raises(ValueError, match=message):
        later = LaterParts(lambda some, _: torch.full((len(some), 2, 4, 4), maps), photos, draws())
        part_teachers([later], windows, 2, 0.3)


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
                        math.exp(-((a - wanted[i, f, 0]) ** 2 + (b - wanted[i, f, 1]) ** 2) / (2 * BLUR_CELLS**2))
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
    assert torch.allclose(place_posterior(maps.relu().detach())[1], wanted, atol=0.35)


def test_teachers_come_from_where_they_are_sought() -> None:
    """The tap shows one part and the later layer another; each is taught where its source is asked for."""
    photos = Photos(photos=40)
    structure = ExplainerStructure("tap", ("upper",), 4, 8, (SIDE, SIDE), None, "tap")

    def rows(of: Tensor) -> np.ndarray:
        noise = 0.05 * torch.rand(40 * 5, 4, SIDE, SIDE, generator=draws(8))
        seen = [places_in_view(of[:, None], photos.windows[:, number])[:, 0] for number in range(5)]
        noise[:, 1] += torch.stack([blob(places) for places in seen], 1).flatten(0, 1)
        return noise.numpy()

    data = TrainingMaps(rows(photos.part), (rows(photos.other),), photos.windows, np.arange(0))
    missed = {}
    for sources in ("later", "tap", "both"):
        config = ExplainerConfig(
            teachers=1, views=5, warmup_epochs=1, teacher_sources=sources, candidates_per_filter=1, votes=8
        )
        explainer = Explainer(structure, config, torch.nn.Identity(), generator=draws())
        places = find_teachers(explainer, data)[0]["teachers"][:, 0]
        missed[sources] = [float((places - of).norm(dim=-1).mean()) for of in (photos.part, photos.other)]
    assert missed["later"][1] < 0.08 < missed["later"][0]
    assert missed["tap"][0] < 0.08 < missed["tap"][1]
    assert min(missed["both"]) < 0.08


def test_filters_get_the_teacher_at_whose_place_their_channel_answers() -> None:
    photos = Photos(photos=40)
    where = torch.stack([photos.part, photos.other], 1)
    kinds = torch.tensor([1, 0, 0, 1, 1, 0])
    bumps = torch.stack([blob(photos.part), blob(photos.other)], 1)
    channels = 0.2 * torch.rand(40, 6, SIDE, SIDE, generator=draws(9)) + bumps[:, kinds]
    assert matched_teachers(channels, where).tolist() == kinds.tolist()
    # A channel that answers to both goes to the teacher with a seat left; dead channels are seated, too.
    channels[:, 2] += 3 * bumps.sum(1)
    channels[:, 5] = 0
    found = matched_teachers(channels, where)
    assert found.bincount().tolist() == [3, 3]
    assert found[[0, 1, 3, 4]].tolist() == kinds[[0, 1, 3, 4]].tolist()


@pytest.mark.parametrize("match", [False, True])
def test_teachers_are_matched_only_where_it_is_asked_for(match: bool) -> None:
    photos = Photos(photos=40, views=3)
    structure = ExplainerStructure("tap", ("upper",), 4, 4, (SIDE, SIDE), None, "tap")
    seen = torch.stack([photos.shown(v) for v in range(3)], 1).flatten(0, 1)
    config = ExplainerConfig(teachers=2, views=3, warmup_epochs=1, teacher_match=match, learning_rate_ordinary=0.0)
    explainer = Explainer(structure, config, torch.nn.Identity(), generator=draws())
    data = TrainingMaps(seen.numpy(), (seen.numpy(),), photos.windows, np.arange(0))
    state, _ = find_teachers(explainer, data)
    own = seen.unflatten(0, (40, 3))[:, 0]
    wanted = matched_teachers(own.relu(), state["teachers"])
    assert state["teacher_of"][:, 0].tolist() == (wanted.tolist() if match else [0, 1, 0, 1])
    assert wanted.tolist() != [0, 1, 0, 1]


@pytest.mark.parametrize("modes", [0, 1])
def test_teachers_move_in_step_only_where_it_is_asked_for(modes: int) -> None:
    """The parts of these photos move independently: no mode holds two of them, four coordinates need four."""
    photos = Photos(photos=40, views=3)
    structure = ExplainerStructure("tap", ("upper",), 4, 4, (SIDE, SIDE), None, "tap")
    seen = torch.stack([photos.shown(v) for v in range(3)], 1).flatten(0, 1)
    config = ExplainerConfig(teachers=4, views=3, warmup_epochs=1, teacher_modes=modes)
    explainer = Explainer(structure, config, torch.nn.Identity(), generator=draws())
    data = TrainingMaps(seen.numpy(), (seen.numpy(),), photos.windows, np.arange(0))
    places = find_teachers(explainer, data)[0]["teachers"]
    rank = int(torch.linalg.matrix_rank((places - places.mean(0)).flatten(1), rtol=1e-3))
    assert rank == 1 if modes else rank > 3


@pytest.mark.parametrize("sources", ["later", "both"])
def test_every_category_has_teachers_of_its_own(sources: Literal["later", "both"]) -> None:
    photos = Photos(photos=24, views=3)
    structure = ExplainerStructure("tap", ("upper",), 4, 8, (SIDE, SIDE), None, "tap")
    config = ExplainerConfig(teachers=2, views=3, warmup_epochs=1, teacher_sources=sources, candidates_per_filter=1)
    explainer = Explainer(structure, config, torch.nn.Identity(), generator=draws())
    tap = torch.stack([photos.shown(v) for v in range(3)], 1).flatten(0, 1).numpy()
    labels = torch.arange(24) % 2
    data = TrainingMaps(tap, (tap,), photos.windows, np.arange(0), labels=labels)
    state, found = find_teachers(explainer, data)
    places, of = state["teachers"], state["teacher_of"]
    assert places.shape == (24, 4, 2)
    # Filters change category: each has a teacher in every one.
    assert of.tolist() == [[0, 2], [1, 3]] * 4
    for category in (0, 1):
        others = labels != category
        mine = slice(2 * category, 2 * category + 2)
        assert bool(places[others, mine].isnan().all())
        assert not bool(places[~others, mine].isnan().any())
    assert 0 <= found["teacher_movement"] < 1
