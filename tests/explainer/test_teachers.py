"""Part teachers: what is found in a later layer, and what it costs not to stand where a teacher does."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from partlens.explainer import teachers
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.teachers import (
    PlaceSource,
    _place_posterior,
    find_teachers,
    matched_teachers,
    places_in_photo,
    places_in_view,
    teacher_cost,
)
from partlens.explainer.views import TrainingMaps, view_windows

MADE = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "explainer" / "made_photos.py")))
SIDE, blob, draws = MADE.SIDE, MADE.blob, MADE.draws
Photos = MADE.Photos


def test_a_place_goes_to_the_view_and_back() -> None:
    windows = view_windows(40, 4, draws(), 0.5)
    places = torch.rand(40, 3, 2, generator=draws(1))
    for number in range(4):
        there = places_in_view(places, windows[:, number])
        assert torch.allclose(places_in_photo(there, windows[:, number]), places, atol=1e-5)
    crop = torch.tensor([[0.5, 0.25, 0.5, 0.5, 0.0]])
    assert places_in_view(torch.tensor([[[0.5, 0.75]]]), crop).tolist() == [[[0.5, 0.5]]]


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


def told(photos: Photos) -> PlaceSource:
    """Both parts of the photos of a category, each a little more to the right in each next one."""

    def places(_: Explainer, data: TrainingMaps, category: int) -> Tensor:
        own = data.own(category)
        return torch.stack([photos.part, photos.other], 1)[own] + 0.01 * category

    return places


def test_every_filter_gets_a_teacher_of_its_channel() -> None:
    photos = Photos(photos=40, views=3)
    seen = torch.stack([photos.shown(v) for v in range(3)], 1).flatten(0, 1)
    state, found = find_teachers(explainer_of(4, teachers=2), data_of(photos, seen, seen), told(photos))
    own = seen.unflatten(0, (40, 3))[:, 0]
    assert torch.equal(state["teachers"], torch.stack([photos.part, photos.other], 1))
    assert state["teacher_of"][:, 0].tolist() == matched_teachers(own.relu(), state["teachers"]).tolist()
    assert abs(found["teacher_correlation"]) < 0.5


def test_every_category_has_teachers_of_its_own() -> None:
    photos = Photos(photos=24, views=3)
    tap = torch.stack([photos.shown(v) for v in range(3)], 1).flatten(0, 1)
    labels = torch.arange(24) % 2
    explainer = explainer_of(4, teachers=2)
    state, _ = find_teachers(explainer, data_of(photos, tap, tap, labels), told(photos))
    places, of = state["teachers"], state["teacher_of"]
    assert places.shape == (24, 4, 2)
    # Filters change category: each has a teacher in every one.
    for category in (0, 1):
        others = labels != category
        mine = slice(2 * category, 2 * category + 2)
        assert sorted(set(of[:, category].tolist())) == [2 * category, 2 * category + 1]
        assert bool(places[others, mine].isnan().all())
        assert not bool(places[~others, mine].isnan().any())
