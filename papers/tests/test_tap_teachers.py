"""Parts that the tap's own features vote for: planted ones are found, and they teach."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import Explainer
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.teachers import places_in_view
from partlens.explainer.views import TrainingMaps, view_windows
from partlens.object_parts.finding import found_places
from partlens_papers.tap_teachers import part_candidates, tap_places, voted_parts


def test_a_planted_part_is_found() -> None:
    """One feature marks a part that moves; candidates must find it among features that fire anywhere."""
    generator = torch.Generator().manual_seed(2)
    photos, views = 40, 3
    windows = view_windows(photos, views, generator, 0.6).transpose(0, 1)
    windows[2] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])  # mirrors only, which cells can follow exactly
    maps = 0.3 * torch.rand(views, photos, 12, 8, 8, generator=generator)
    place = torch.randint(1, 7, (photos, 2), generator=generator)
    for i, (row, col) in enumerate(place.tolist()):
        maps[0, i, 4, row, col] += 4
        for v in (1, 2):
            maps[v, i, 4, row, 7 - col] += 4
    others = 0.3 * torch.rand(30, 12, 8, 8, generator=generator)
    parts = voted_parts(maps, windows, others, generator, voters=12, parts=12, candidates=96, votes=64)
    assert parts.found["movement_error_cells"] < 1.5
    assert parts.votes.sum(1).tolist() == pytest.approx([1.0] * 12)
    peaks = parts.maps(maps[0]).flatten(2).argmax(-1)
    distance = torch.maximum((peaks // 8 - place[:, :1]).abs(), (peaks % 8 - place[:, 1:]).abs())
    assert float((distance <= 1).float().mean(0).median()) > 0.9


def test_candidates_are_as_many_as_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    detectors, mean = part_candidates(torch.rand(9, 5, 6, 6), torch.zeros(0, 5, 6, 6), 50, generator)
    assert detectors.shape[0] >= 50
    assert torch.isfinite(detectors).all()
    assert mean.shape == (5,)


def test_the_tap_teaches_what_it_shows_and_the_later_layer_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("partlens_papers.tap_teachers._CANDIDATES", 64)
    generator = torch.Generator().manual_seed(5)
    windows = view_windows(40, 3, generator, 0.6)
    part = 0.25 + 0.5 * torch.rand(40, 2, generator=generator)
    cells = (torch.arange(10) + 0.5) / 10
    tap = 0.05 * torch.rand(40, 3, 4, 10, 10, generator=generator)
    for view in range(3):
        place = places_in_view(part[:, None], windows[:, view])[:, 0]
        row, col = ((cells - place[:, k, None]) * 10 for k in (0, 1))
        tap[:, view, 1] += torch.exp(-(row.square()[:, :, None] + col.square()[:, None, :]) / 2)
    later = 0.05 * torch.rand(40 * 3, 4, 10, 10, generator=generator).numpy()
    labels = torch.zeros(40, dtype=torch.long)
    data = TrainingMaps(tap.flatten(0, 1).numpy(), (later,), windows, labels, np.arange(0), (later,))
    config = ExplainerConfig(teachers=1, views=3, warmup_epochs=1)
    structure = ExplainerStructure("tap", ("upper",), 4, 8, (10, 10), None, "tap")
    explainer = Explainer(structure, config, torch.nn.Identity(), generator=generator)
    missed = [
        float((source(explainer, data, 0)[:, 0] - part).norm(dim=-1).mean()) for source in (tap_places, found_places)
    ]
    assert missed[0] < 0.08 < missed[1]
