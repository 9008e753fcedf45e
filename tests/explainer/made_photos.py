"""A later layer that is drawn: parts that move with the photo, one that stays, one that jumps."""

from __future__ import annotations

import torch
from torch import Tensor

from partlens.explainer.teachers import places_in_view
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
        self.windows = view_windows(photos, views, draws(1), 0.6)
        self.part = 0.25 + 0.5 * torch.rand(photos, 2, generator=draws(2))
        self.other = 0.25 + 0.5 * torch.rand(photos, 2, generator=draws(4))
        self.jumps = torch.rand(views, photos, 2, generator=draws(3))

    def shown(self, number: int) -> Tensor:
        both = places_in_view(torch.stack([self.part, self.other], 1), self.windows[:, number])
        still = torch.full_like(self.part, 0.5)
        shown = [blob(both[:, 0]), 0.9 * blob(both[:, 1]), blob(still), blob(self.jumps[number])]
        return torch.stack(shown, 1)
