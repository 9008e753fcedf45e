"""Concepts of a layer, and what each is said to be worth: CRAFT (Fel et al., CVPR 2023), and the same of other units.

CRAFT enlarges crops of photos to the network's input and factorises the means of the layer over the cells of each
crop, ``A ≈ U W`` (:func:`~partlens_papers.rivals.factors.fit_nmf`). Every cell of a whole photo gets its codes under
the same ``W``. A concept's importance is the total Sobol index of the score when all codes of a concept are multiplied
by a number from 0 to 1: quasi-random numbers (Halton), Jansen's estimator, the mean over photos. Crops of 64 of 224
pixels, steps of 0.8 of that and 32 designs are CRAFT's.

Any units whose maps add up can be asked in the same way: what stays (``base``) and the maps of every unit (``parts``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

DESIGNS = 32
CROP = 64 / 224
STEP = 0.8

Upper = Callable[[Tensor], Tensor]
"""From the layer's maps to scores (image, output)."""


def crops(inputs: Float[Tensor, "image channel row col"]) -> Float[Tensor, "crop channel row col"]:
    """Cut square inputs into overlapping crops, image by image, each enlarged to the input's size.

    Example:
        >>> crops(torch.zeros(2, 3, 224, 224)).shape
        torch.Size([32, 3, 224, 224])
    """
    side = inputs.shape[3]
    crop = round(CROP * side)
    step = max(1, int(STEP * crop))
    cut = inputs.unfold(2, crop, step).unfold(3, crop, step).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
    return F.interpolate(cut, size=(side, side), mode="bilinear", align_corners=False)


def sobol_masks(units: int, designs: int = DESIGNS) -> Float[Tensor, "mask unit"]:
    """Return the factors at which a score is needed: two samples, then the first with one column of the second each."""
    from scipy.stats import qmc

    both = torch.from_numpy(qmc.Halton(2 * units, scramble=False).random(designs)).float()
    first, second = both[:, :units], both[:, units:]
    own = torch.eye(units, dtype=torch.bool)
    exchanged = [torch.where(own[unit], second, first) for unit in range(units)]
    return torch.cat([first, second, *exchanged])


def total_sobol(scores: Float[Tensor, "photo mask"], designs: int = DESIGNS) -> Float[Tensor, "photo unit"]:
    """Return Jansen's estimates of the total Sobol indices from scores at :func:`sobol_masks`; 0 for a constant score.

    The share of the score's variance that is lost when a unit's factor is known no more. Indices of units that act
    together count what they do together for each.
    """
    first, _, *exchanged = scores.double().split(designs, 1)
    variance = first.var(1)
    differences = torch.stack([(first - other).square().mean(1) / 2 for other in exchanged], 1)
    return torch.where(variance[:, None] > 0, differences / variance[:, None], 0.0)


@torch.no_grad()
def scores_at(
    upper: Upper,
    base: Float[Tensor, "photo filter row col"],
    parts: Float[Tensor, "photo unit filter row col"],
    factors: Float[Tensor, "variant unit"],
    classes: Int[Tensor, " photo"],
) -> Float[Tensor, "photo variant"]:
    """Return each photo's class score where its units are multiplied by the factors of each variant.

    What is below 0 then is set to 0: the layer follows a ReLU.
    """
    found = []
    for own, units, wanted in zip(base, parts, classes, strict=True):
        maps = own + torch.einsum("vu,ufrc->vfrc", factors, units)
        found.append(upper(maps.clamp_(min=0))[:, wanted])
    return torch.stack(found)


def losses(
    upper: Upper,
    maps: Float[Tensor, "photo filter row col"],
    parts: Float[Tensor, "photo unit filter row col"],
    classes: Int[Tensor, " photo"],
) -> Float[Tensor, "photo unit"]:
    """Return what is really lost of each photo's score when one unit is taken out of the network's own maps.

    As a share of what there is to lose down to a layer of zeros; NaN where zeros score as much.
    """
    units = parts.shape[1]
    wholes = torch.cat([torch.ones(1, units), 1 - torch.eye(units)])
    scores = scores_at(upper, maps - parts.sum(1), parts, wholes, classes).double()
    nothing = upper(torch.zeros_like(maps[:1])).detach().double()[0, classes]
    reach = scores[:, 0] - nothing
    return (scores[:, :1] - scores[:, 1:]) / torch.where(reach > 0, reach, torch.nan)[:, None]
