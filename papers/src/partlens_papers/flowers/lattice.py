"""How much of a picture is a grid: numbers for the artefact that strided operations leave in backward signals.

A convolution with stride ``s`` sends its signal back to every ``s``-th place with other weights than to the places
between. In the signal's spectrum that is energy at the multiples of ``1/s`` cycles a pixel.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from partlens.errors import InputError, expected

_RADIUS = 4  # bins around a lattice frequency that give its background
_CORE = 1  # bins around it that do not, because a peak leaks into them


def _spectrum(
    signal: Float[Tensor, "image channel row col"], stride: int
) -> tuple[Float[Tensor, "image row col"], Bool[Tensor, "row col"]]:
    """Return the energy at each frequency, 0 at frequency zero so that it never counts, and where the lattice is."""
    rows, cols = signal.shape[2] // stride * stride, signal.shape[3] // stride * stride
    least = stride * (2 * _RADIUS + 1)
    if stride < 2 or min(rows, cols) < least:
        raise InputError(
            expected(
                f"a stride of at least 2 and signals of at least {2 * _RADIUS + 1} strides a side",
                f"stride {stride} and {signal.shape[2]}x{signal.shape[3]} px",
                "Use larger images or a smaller stride",
            )
        )
    if not bool(torch.isfinite(signal).all()):
        raise InputError(expected("finite signals", "NaN or infinity", "Check the weights and the images"))
    # Whole strides only: then the lattice falls on single bins of the transform.
    grey = signal[:, :, :rows, :cols].double().sum(dim=1)
    largest = grey.abs().amax(dim=(1, 2), keepdim=True)
    grey = grey / largest.where(largest > 0, 1)  # the square of a small value would vanish
    energy = torch.fft.fft2(grey - grey.mean(dim=(1, 2), keepdim=True)).abs().square()
    energy[:, 0, 0] = 0
    lattice = torch.zeros(rows, cols, dtype=torch.bool, device=signal.device)
    lattice[:: rows // stride, :: cols // stride] = True
    return energy, lattice


def lattice_index(signal: Float[Tensor, "image channel row col"], stride: int) -> Float[Tensor, " image"]:
    """Say how far the grid of a stride rises above a signal's spectrum.

    ``max over lattice frequencies of log10(energy there / background there)``. Lattice frequencies are the multiples
    of 1/stride cycles a pixel along both axes, zero excluded. The background is the highest of three medians: of the
    bins up to 4 away along the row of the spectrum, along its column, and in the square, each without the bins next
    to the middle. It is local because natural signals have more energy at low frequencies, and it follows rows and
    columns because the picture's borders draw a cross through the spectrum; neither is a grid.

    Args:
        signal: signals on the image; channels are added, borders beyond whole strides are excluded.
        stride: of the grid looked for, in pixels: the product of the strides up to a layer, or a part of it.

    Returns:
        One value for each image, float64. Signals without structure (pixels permuted) give 0.1 at stride 2 and 0.5 at
        stride 4 in the mean, as the highest of several random ratios; 1 means ten times the background. NaN where a
        signal is constant, whose spectrum is empty.

    Raises:
        InputError: a stride below 2, signals of fewer than 9 strides, values that are not finite.

    Example:
        >>> grid = torch.zeros(1, 1, 36, 36)
        >>> grid[..., ::4, ::4] = 1
        >>> noisy = grid + torch.rand(1, 1, 36, 36, generator=torch.Generator().manual_seed(0))
        >>> bool(lattice_index(noisy, 4) > 1)
        True
    """
    energy, lattice = _spectrum(signal, stride)
    rows, cols = lattice.nonzero(as_tuple=True)
    steps = torch.arange(-_RADIUS, _RADIUS + 1, device=signal.device)
    down, right = torch.meshgrid(steps, steps, indexing="ij")
    outside = (down.abs() > _CORE) | (right.abs() > _CORE)
    medians = []
    for among in (outside, outside & (right == 0), outside & (down == 0)):
        near_rows = (rows[:, None] + down[among]) % energy.shape[1]
        near_cols = (cols[:, None] + right[among]) % energy.shape[2]
        medians.append(energy[:, near_rows, near_cols].median(dim=-1).values)
    background = torch.stack(medians).amax(dim=0)
    # A pure grid has no background at all; its index is finite all the same.
    floor = energy.sum(dim=(1, 2))[:, None] * torch.finfo(energy.dtype).eps ** 2
    index: Tensor = (energy[:, lattice] / torch.maximum(background, floor)).amax(dim=1).log10()
    return index


def lattice_energy_frac(signal: Float[Tensor, "image channel row col"], stride: int) -> Float[Tensor, " image"]:
    """Return the share of a signal's energy that lies on the grid of a stride.

    Energy at the multiples of 1/stride cycles a pixel over energy at all frequencies, frequency zero excluded from
    both.

    Args:
        signal: signals on the image; channels are added, borders beyond whole strides are excluded.
        stride: of the grid looked for, in pixels.

    Returns:
        One value from 0 to 1 for each image, float64; NaN where a signal is constant, which has no energy to share.

    Raises:
        InputError: a stride below 2, signals of fewer than 9 strides, values that are not finite.

    Example:
        >>> grid = torch.zeros(1, 1, 36, 36)
        >>> grid[..., ::4, ::4] = 1
        >>> round(float(lattice_energy_frac(grid, 4)), 6)
        1.0
    """
    energy, lattice = _spectrum(signal, stride)
    share: Tensor = energy[:, lattice].sum(dim=1) / energy.sum(dim=(1, 2))
    return share
