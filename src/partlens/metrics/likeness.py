"""How alike two heat maps of the same image are."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from partlens.errors import InputError, expected


def same_shape(first: Tensor, second: Tensor) -> None:
    """Refuse maps of different shapes."""
    if first.shape != second.shape:
        raise InputError(
            expected("two maps of one shape", f"{tuple(first.shape)} and {tuple(second.shape)}", "Resize one of them")
        )


def ranks(values: Float[Tensor, "row entry"]) -> Float[Tensor, "row entry"]:
    """Rank each row from 0, equal values by the mean of their ranks.

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

    Returns:
        -1 to 1 for each image, float64; ``nan`` where a map is constant.

    Raises:
        InputError: maps of different shapes.

    Example:
        >>> rank_correlation(torch.tensor([[[0.0, 1.0, 2.0]]]), torch.tensor([[[5.0, 7.0, 6.0]]])).item()
        0.5
    """
    same_shape(first, second)
    a, b = (ranks(maps.flatten(1)) for maps in (first, second))
    a, b = (r - r.mean(1, keepdim=True) for r in (a, b))
    return (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1)).sqrt()  # 0/0 is nan, as stated
