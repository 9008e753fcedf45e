"""How an image becomes a descriptor: the energies of all channels of all layers, normalised.

A *feature* is one channel of one layer's output. The descriptor of an image is made in four steps (Oramas et al. 2019,
in the order of the authors' code):

    e_lk = sum over cells of a_lk²        energy of channel k of layer l: no square root
    d_lk = e_lk / sum_k' |e_lk'|          every layer sums to 1
    d    = all layers one after another, in execution order (``FeatureIndex``)
    x    = d / ||d||_2

Source: the paper (arXiv 1712.06302) for the idea; the authors' MATLAB demo for the squared energies, both
normalisations and the layers measured. Where a layer has no activation at all (0/0 in the demo) its features are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from partlens.errors import LayerError, expected
from partlens.selection.record import FeatureIndex

_BLOCK = 1 << 19  # numbers that are squared at a time

# Energies


def channels_only(values: Tensor) -> Tensor:
    """Keep one zero per channel, so that shapes can be read; refuse what has no channels."""
    return _checked(values).new_zeros(values.shape[:2], dtype=torch.float32)


def _checked(values: Tensor) -> Tensor:
    """Return maps or vectors as float32, or in half of it: their sums are float32 all the same."""
    if values.ndim not in {2, 4}:
        rule = "layers that give maps (image, filter, row, col) or vectors (image, filter)"
        raise LayerError(expected(rule, f"one of shape {tuple(values.shape)}", "Choose other layers"))
    return values.detach() if values.element_size() == 2 else values.detach().float()


def _channels_last(values: Tensor) -> bool:
    """Whether the channels of a cell lie side by side in a CPU's memory, where sums over cells need another way."""
    last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    return last and not values.is_contiguous() and values.device.type == "cpu"


def _squares(values: Tensor) -> Tensor:
    """Sum the squares of each channel over its cells in float32."""
    if _channels_last(values):
        return _squares_by_blocks(values.permute(0, 2, 3, 1).flatten(1, 2))
    flat = values.flatten(2) if values.ndim == 4 else values[:, :, None]
    norm: Tensor = torch.linalg.vector_norm(flat, dim=2, dtype=torch.float32)  # makes no squared copy of the maps
    return norm.square()


def _squares_by_blocks(cells: Tensor) -> Tensor:
    """Do the same for ``[image, cell, channel]``, some cells at a time: what is squared stays in the cache."""
    sums = torch.zeros(cells.shape[0], cells.shape[2])
    images, rows = max(1, _BLOCK // max(1, cells[0].numel())), max(1, _BLOCK // cells.shape[2])
    for first in range(0, len(cells), images):
        for block in cells[first : first + images].split(rows, dim=1):
            squared = block.square() if block.dtype == torch.float32 else block.float().square_()
            sums[first : first + images] += squared.sum(1)
    return sums


def _peaks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of each channel and the number of its cell, the first of equal ones."""
    if _channels_last(values):
        largest, place = F.max_pool2d(values, values.shape[2:], return_indices=True)
        return largest[:, :, 0, 0].float(), place[:, :, 0, 0]
    largest, place = (values.flatten(2) if values.ndim == 4 else values[:, :, None]).max(dim=2)
    return largest.float(), place


def energy(
    values: Float[Tensor, "image filter row col"] | Float[Tensor, "image filter"],
) -> Float[Tensor, "image filter"]:
    """Sum the squares of each channel over its cells: ``e_k = sum a_k²``, no root, float32; a vector has one cell.

    Example:
        >>> energy(torch.tensor([[[[3.0, -4.0]], [[1.0, 0.0]]]])).tolist()
        [[25.0, 1.0]]
    """
    return _squares(_checked(values))


def energy_and_peak(values: Tensor) -> Tensor:
    """Energy, largest value and its row and column, ``[image, channel, 4]`` float32 (cells stay exact below 2^24)."""
    peak, place = _peaks(_checked(values))
    cols = values.shape[3] if values.ndim == 4 else 1
    return torch.stack([energy(values), peak, place // cols, place % cols], dim=2)


def normalised(energies: Tensor, index: FeatureIndex) -> tuple[Tensor, Tensor]:
    """Do steps 2 to 4 on all layers together; return the number of dead layers of each image too.

    Example:
        >>> index = FeatureIndex(("a", "b"), (2, 1))
        >>> x, dead = normalised(torch.tensor([[3.0, 1.0, 5.0], [0.0, 0.0, 2.0]]), index)
        >>> [[round(value, 3) for value in row] for row in x.tolist()], dead.tolist()
        ([[0.588, 0.196, 0.784], [0.0, 0.0, 1.0]], [0, 1])
    """
    values = energies.double()
    dead = torch.zeros(len(values), dtype=torch.int64, device=values.device)
    for layer in index.layers:
        rows = index.rows(layer)
        total = values[:, rows].sum(1, keepdim=True)
        dead += total[:, 0] == 0
        values[:, rows] /= torch.where(total > 0, total, torch.ones_like(total))
    norm = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return (values / torch.where(norm > 0, norm, torch.ones_like(norm))).float(), dead
