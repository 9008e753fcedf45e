"""The part interpretability of CVPR 2018, Sec. 5.3, written out with loops over filters, photos, cells and pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from partlens.errors import InputError
from partlens.metrics.part_regions import (
    VALID_SHARE,
    ValidCells,
    _interpretability_per_filter,
    cell_cover,
    meets_parts,
    part_interpretability,
    random_cells,
    round_cover,
    same_cell,
)

STRIDE = 4.0
SIDE = 5
POINTS = torch.tensor([[x + 0.5, y + 0.5] for y in range(20) for x in range(20)])
CENTRES = torch.tensor([[2 + STRIDE * col, 2 + STRIDE * row] for row in range(SIDE) for col in range(SIDE)])


def by_loops(maps: Tensor, parts: Tensor, share: float, radius: float | None) -> list[float]:
    """Return P_f of every filter; ``parts`` is (photo, part, 20, 20), ``radius`` None for the map scaled up."""
    photos, filters = maps.shape[:2]
    found = []
    for f in range(filters):
        values = sorted(maps[:, f].flatten().tolist(), reverse=True)
        threshold = values[max(1, int(share * len(values))) - 1]
        met = [0] * parts.shape[1]
        for i in range(photos):
            region = set()
            for row, col in itertools.product(range(SIDE), range(SIDE)):
                value = float(maps[i, f, row, col])
                if value < threshold or value <= 0:
                    continue
                centre = 2 + STRIDE * col, 2 + STRIDE * row
                for y, x in itertools.product(range(20), range(20)):
                    dx, dy = x + 0.5 - centre[0], y + 0.5 - centre[1]
                    near = max(abs(dx), abs(dy)) <= STRIDE / 2 if radius is None else dx * dx + dy * dy <= radius**2
                    if near:
                        region.add((y, x))
            for k in range(parts.shape[1]):
                part = {(y, x) for y, x in itertools.product(range(20), range(20)) if parts[i, k, y, x]}
                union = len(region | part)
                met[k] += bool(union and len(region & part) / union > 0.2)
        shown = parts.flatten(2).any(-1).sum(0)
        found.append(max(met[k] / int(shown[k]) for k in range(parts.shape[1]) if shown[k]))
    return found


def _case(seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    maps = torch.from_numpy(rng.normal(size=(6, 4, SIDE, SIDE)))
    maps[:, 3] = -1.0  # a filter that answers nowhere
    parts = torch.zeros(6, 2, 20, 20, dtype=torch.bool)
    for i, k in itertools.product(range(6), range(2)):
        y, x, high, wide = rng.integers([0, 0, 3, 3], [12, 12, 9, 9])
        parts[i, k, y : y + high, x : x + wide] = True
    parts[2, 1] = False
    return maps, parts


@pytest.mark.parametrize("radius", [None, 3.0, 6.5])
@pytest.mark.parametrize("batch", [1, 4, 6])
def test_loops_agree(radius: float | None, batch: int) -> None:
    maps, parts = _case(3)
    cells = ValidCells(6, 0.08)
    for chunk in maps.split(batch):
        cells.add(chunk)
    cover = cell_cover(CENTRES, POINTS, (STRIDE, STRIDE)) if radius is None else round_cover(CENTRES, POINTS, radius)
    truth = [part.flatten(1) for part in parts]
    met = meets_parts(cells.on, 4, truth, cover)
    present = parts.flatten(2).any(-1)
    expected = by_loops(maps, parts, 0.08, radius)
    assert _interpretability_per_filter(met, present).tolist() == pytest.approx(expected)
    assert expected[3] == 0
    assert max(expected) > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), photos=st.integers(1, 7), batch=st.integers(1, 7), share=st.floats(0.01, 0.5))
def test_streamed_cells_are_the_highest_of_all(seed: int, photos: int, batch: int, share: float) -> None:
    maps = torch.randn(photos, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    cells = ValidCells(photos, share)
    for chunk in maps.split(batch):
        cells.add(chunk)
    keep = max(1, int(share * photos * 16))
    for f in range(3):
        threshold = maps[:, f].flatten().sort(descending=True).values[keep - 1]
        expected = [
            (i, c) for i in range(photos) for c in range(16) if maps[i, f].flatten()[c] >= max(threshold, 1e-30)
        ]
        kept = [(i, int(c)) for i in range(photos) for of, c in zip(*cells.on(i), strict=True) if int(of) == f]
        assert sorted(kept) == expected


def test_a_filter_on_its_part_has_1_and_on_other_photos_less() -> None:
    """A part that moves: a filter that follows it meets it always, its cells of other photos meet it by chance."""
    generator = torch.Generator().manual_seed(1)
    photos = 60
    where = torch.randint(1, SIDE - 1, (photos, 2), generator=generator)
    maps = torch.zeros(photos, 1, SIDE, SIDE)
    truth = []
    for i, (row, col) in enumerate(where.tolist()):
        maps[i, 0, row, col] = 1 + i / 100
        part = torch.zeros(1, 20, 20, dtype=torch.bool)
        part[0, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = True
        truth.append(part.flatten(1))
    cells = ValidCells(photos, 1 / SIDE**2)
    cells.add(maps)
    cover = cell_cover(CENTRES, POINTS, (STRIDE, STRIDE))
    present = torch.ones(photos, 1, dtype=torch.bool)

    def score(met: Tensor) -> float:
        return part_interpretability(met, present, photos=torch.arange(photos), generator=generator, rounds=20).value

    assert score(meets_parts(cells.on, 1, truth, cover)) == 1
    strangers = [(i + 7) % photos for i in range(photos)]
    same = float((where == where[strangers]).all(1).double().mean())
    assert score(meets_parts(cells.on, 1, truth, cover, photos=strangers)) == pytest.approx(same)
    assert same < 0.3
    random = random_cells(photos, SIDE**2, 200, generator, share=1 / SIDE**2)
    assert score(meets_parts(random, 200, truth, cover)) == pytest.approx(1 / SIDE**2, abs=0.01)
    middle = cell_cover(torch.tensor([[10.0, 10.0]]), POINTS, (STRIDE, STRIDE))
    assert score(meets_parts(same_cell, 1, truth, middle)) == pytest.approx(float((where == 2).all(1).double().mean()))


def test_rare_parts_and_crops_of_one_photo() -> None:
    met = torch.ones(12, 3, 2, dtype=torch.bool)
    met[:, :, 0] = False
    present = torch.ones(12, 2, dtype=torch.bool)
    present[3:, 1] = False  # on three photos only, where every filter meets it
    generator = torch.Generator().manual_seed(0)
    found = part_interpretability(met, present, photos=torch.arange(12), generator=generator)
    assert (found.value, found.n) == (0, 12)
    crops = part_interpretability(met, present, photos=torch.arange(12) // 2, generator=generator)
    assert crops.n == 0  # six photos are too few
    assert np.isnan(crops.value)
    assert torch.isnan(_interpretability_per_filter(met, torch.zeros(12, 2, dtype=torch.bool))).all()


def test_what_is_announced_has_to_come() -> None:
    cells = ValidCells(3, VALID_SHARE)
    cells.add(torch.rand(2, 1, 4, 4))
    with pytest.raises(InputError, match="all 3 photos, got 2 so far"):
        cells.on(0)
    with pytest.raises(InputError, match="the maps of 3 photos, got 4"):
        cells.add(torch.rand(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"maps of \(4, 4\) cells"):
        cells.add(torch.rand(1, 1, 5, 5))
    with pytest.raises(InputError, match="at least 1 photo"):
        ValidCells(0)
