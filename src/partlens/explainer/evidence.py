"""Where the performer's decision hangs on the tap's maps: evidence that asks for no labels.

For the maps ``x`` at the tap and the score ``S`` of the performer's own decision on the photo,

    e(i, j) = |dS/dx_ij| * |x_ij|       (Euclidean norms over the filters of a cell)

averaged over a box of cells. It is large where something is present that the decision would miss. Unlike the signed sum
of gradient times activation, in which filters of one cell cancel, its largest cell follows the same part of the object
from photo to photo in some categories (``docs/study.md`` has the figures, and the categories in which it does not).
The use as a guide for part filters is ours; the papers have no such term.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from partlens.errors import InputError, expected


def decision_scores(outputs: Float[Tensor, "image output"]) -> Float[Tensor, " image"]:
    """Return the score of each image's decision: the largest output, or the distance from 0 of a single one."""
    return outputs.abs()[:, 0] if outputs.shape[1] == 1 else outputs.amax(1)


def evidence_maps(upper: nn.Module, maps: Float[Tensor, "image filter row col"]) -> Float[Tensor, "image row col"]:
    """Return the evidence of every cell, not smoothed.

    Args:
        upper: the performer from the tap to its output; returns a tensor or a tuple whose first is the output.
        maps: the performer's maps at the tap.

    Returns:
        Non-negative values; only their relation within a photo has a meaning.

    Example:
        >>> upper = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        >>> tuple(evidence_maps(upper, torch.rand(4, 3, 5, 5)).shape)
        (4, 5, 5)
    """
    leaf = maps.detach().requires_grad_()
    with torch.enable_grad():
        outputs = upper(leaf)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        (gradient,) = torch.autograd.grad(decision_scores(outputs).sum(), leaf)
    found: Tensor = gradient.norm(dim=1) * leaf.detach().norm(dim=1)
    return found


def sharpened(
    evidence: Float[Tensor, "image row col"], smooth_cells: int, power: float
) -> Float[Tensor, "image row col"]:
    """Average evidence over a box, scale each photo's largest cell to 1, and raise it to a power.

    A photo without any evidence gets 1 everywhere: it says nothing about where to look.

    Raises:
        InputError: an even box.

    Example:
        >>> sharpened(torch.tensor([[[0.0, 1.0], [2.0, 4.0]]]), 1, 2.0).tolist()
        [[[0.0, 0.0625], [0.25, 1.0]]]
    """
    if smooth_cells % 2 == 0:
        raise InputError(expected("an odd evidence_smooth_cells", smooth_cells, "Set it to 1, 3, 5 or 7"))
    smooth = F.avg_pool2d(evidence[:, None], smooth_cells, 1, padding=smooth_cells // 2, count_include_pad=False)[:, 0]
    largest = smooth.flatten(1).amax(1)[:, None, None]
    return torch.where(largest > 0, smooth / largest.clamp(min=torch.finfo(smooth.dtype).tiny), 1.0).pow(power)
