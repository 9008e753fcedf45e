"""The nulls of the reproduction: peaks that follow a part are steadier than those that miss it; all have intervals."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

STUDY = Path(__file__).parents[1] / "studies" / "reproduction.py"


def test_nulls_have_intervals_and_grow_with_the_noise() -> None:
    instability = runpy.run_path(str(STUDY))["_instability"]
    places = 40 + 144 * torch.rand(60, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places[:10, 2] = torch.nan  # a landmark that is not there says nothing of the others
    places[:5, 0] = torch.nan
    anywhere = 224 * torch.rand(60, 32, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    on, near, wide = (instability(places[:, :1], places, noise) for noise in (0.0, 1.0, 4.0))
    random = instability(anywhere, places, 0.0)
    assert (on.n, random.n) == (55, 60)
    assert on.value < near.value < wide.value
    assert on.high < random.low
    for found in (on, near, wide, random):
        assert found.low <= found.value <= found.high
