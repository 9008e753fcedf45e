"""How much two heat maps of one image have in common, and how much of a map lies in a region."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.metrics.likeness import same_shape

TOP_SHARE = 0.1


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
        >>> import torch
        >>> top_overlap(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), torch.tensor([[[0.0, 3.0, 0.0, 1.0]]]), 0.5).item()
        0.5
    """
    same_shape(first, second)
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
