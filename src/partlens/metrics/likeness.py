"""How alike two heat maps of the same image are, and how much of a map lies in a region."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from partlens.errors import InputError, expected

TOP_SHARE = 0.1


def _same_shape(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise InputError(
            expected("two maps of one shape", f"{tuple(first.shape)} and {tuple(second.shape)}", "Resize one of them")
        )


def ranks(values: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
    """Rank each row from 0, equal values by the mean of their ranks.

    Args:
        values: ``[row, entry]``.

    Returns:
        Ranks of the same shape, float64.

    Example:
        >>> ranks(torch.tensor([[3.0, 1.0, 3.0, 0.0]])).tolist()
        [[2.5, 1.0, 2.5, 0.0]]
    """
    ordered = values.sort(dim=1).values
    first = torch.searchsorted(ordered, values.contiguous())
    last = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (first + last - 1).double() / 2


def rank_correlation(
    first: Float[Tensor, "image row col"], second: Float[Tensor, "image row col"]
) -> Float[Tensor, " image"]:
    """Return Spearman's rank correlation of two maps for each image.

    Args:
        first: ``[image, row, col]``.
        second: likewise.

    Returns:
        -1 to 1 for each image, float64; ``nan`` where a map is constant.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> rank_correlation(torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[[5.0, 7.0, 6.0]]])).item()
        0.5
    """
    _same_shape(first, second)
    a, b = (ranks(maps.flatten(1)) for maps in (first, second))
    a, b = (r - r.mean(1, keepdim=True) for r in (a, b))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()  # 0/0 is nan, as stated


def top_overlap(
    first: Float[Tensor, "image row col"], second: Float[Tensor, "image row col"], share: float = TOP_SHARE
) -> Float[Tensor, " image"]:
    """Return the share of the highest pixels that two maps have in common, for each image.

    Pixels of equal value at the limit count with the share of them that fits; two maps that know nothing of one
    another have ``share`` in common on average.

    Args:
        first: ``[image, row, col]``.
        second: likewise.
        share: of the pixels that count as highest.

    Returns:
        0 to 1, float64.

    Raises:
        InputError: maps of different shapes, a share out of range.

    Example:
        >>> top_overlap(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), torch.tensor([[[0.0, 3.0, 0.0, 1.0]]]), 0.5).item()
        0.5
    """
    _same_shape(first, second)
    if not 0 < share < 1:
        raise InputError(expected("a share above 0 and below 1", share, f"Leave share out for {TOP_SHARE}"))

    def weights(maps: Tensor) -> Tensor:
        flat = maps.flatten(1).double()
        count = max(1, round(share * flat.shape[1]))
        limit = flat.topk(count, dim=1).values[:, -1:]
        above, level = (flat > limit).double(), (flat == limit).double()
        return above + level * (count - above.sum(1, keepdim=True)) / level.sum(1, keepdim=True)

    a, b = weights(first), weights(second)
    return (a * b).sum(1) / a.sum(1)


def energy_share(
    maps: Float[Tensor, "image row col"], regions: Bool[Tensor, "image row col"]
) -> Float[Tensor, " image"]:
    """Return the share of each map's sum that lies in the region; ``nan`` for a map of zeros."""
    inside: Tensor = (maps.double() * regions).sum((1, 2)) / maps.double().sum((1, 2))
    return inside
