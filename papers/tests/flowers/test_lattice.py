"""The grid that strides leave in a signal, as a number."""

from __future__ import annotations

import pytest
import torch

from partlens.errors import InputError
from partlens_papers.flowers.lattice import lattice_energy_frac, lattice_index


def test_lattice_index_of_noise_and_of_a_grid() -> None:
    noise = torch.randn(8, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    control = lattice_index(noise, 4)
    assert 0.3 < float(control.mean()) < 0.8
    grid = noise.clone()
    grid[..., ::4, ::4] += 3
    assert float(lattice_index(grid, 4).min()) > 1.5
    # A scale changes nothing, however small.
    torch.testing.assert_close(lattice_index(1e-30 * grid, 4), lattice_index(grid, 4), atol=1e-3, rtol=0)
    # A slope of the spectrum, and the cross that unlike borders draw in it, are no grid.
    assert float(lattice_index(noise.cumsum(2).cumsum(3), 4).mean()) < 1
    flat = torch.ones(1, 1, 40, 40)
    assert bool(lattice_index(flat, 2).isnan())
    assert bool(lattice_energy_frac(flat, 2).isnan())
    share = lattice_energy_frac(noise, 4)
    assert float((share - 15 / (224**2 - 1)).abs().max()) < 5e-4


def test_lattice_refuses() -> None:
    for signal, stride in (
        (torch.rand(1, 1, 40, 40), 1),
        (torch.rand(1, 1, 30, 40), 4),
        (torch.full((1, 1, 40, 40), torch.nan), 4),
    ):
        with pytest.raises(InputError, match="Expected"):
            lattice_index(signal, stride)
