"""How well heat maps show a known region: overlap over thresholds, recall per part, pointing, insertion and deletion.

Every score is one value per image, so that means, folds and bootstrap intervals can be taken afterwards
(:mod:`partlens.estimate`). A method's scores are compared with those of the null maps at the end of this module:
a random map, a box in the centre and an edge detector know nothing of the network.

A heat map has values from 0 to 1, higher where the image speaks more for the class. What is 0 is never part of an
explanation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected

# The middles of 20 equal intervals: their mean is the midpoint rule for the area between 0 and 1.
THRESHOLDS = tuple((2 * step + 1) / 40 for step in range(20))
COVERED_SHARE = 0.25


def _checked(maps: Tensor, masks: Tensor | None = None) -> None:
    if maps.numel() == 0:
        raise InputError(expected("at least one image with pixels", f"shape {tuple(maps.shape)}", "Give heat maps"))
    low, high = float(maps.min()), float(maps.max())
    if not (low >= 0 and high <= 1):  # nan passes neither
        raise InputError(
            expected("heat maps from 0 to 1", f"values from {low:g} to {high:g}", "Scale each map by its largest value")
        )
    if masks is not None and (len(masks) != len(maps) or masks.shape[-2:] != maps.shape[-2:]):
        raise InputError(
            expected(
                f"masks of {len(maps)} images with {maps.shape[-2]}x{maps.shape[-1]} px",
                f"shape {tuple(masks.shape)}",
                "Bring masks and maps to the network's input size",
            )
        )


def normalised(maps: Float[Tensor, "image row col"]) -> Float[Tensor, "image row col"]:
    """Stretch each map to 0 … 1; a map of one value becomes zeros.

    Example:
        >>> normalised(torch.tensor([[[1.0, 3.0]], [[2.0, 2.0]]])).tolist()
        [[[0.0, 1.0]], [[0.0, 0.0]]]
    """
    low = maps.amin(dim=(1, 2), keepdim=True)
    span = maps.amax(dim=(1, 2), keepdim=True) - low
    return ((maps - low) / span.where(span > 0, 1)).clamp(0, 1)


# Overlap with the region


def iou_per_image(
    maps: Float[Tensor, "image row col"],
    masks: Bool[Tensor, "image row col"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Float[Tensor, "image threshold"]:
    r"""Measure intersection over union of thresholded maps and masks.

    With map ``h`` and region ``M`` of one image, ``IoU(t) = |{h > t} ∩ M| / |{h > t} ∪ M|``.

    Args:
        maps: 0 to 1.
        masks: the region of each image.
        thresholds: in ascending order, from 0 up to below 1.

    Returns:
        0 to 1, higher is better; float64. ``nan`` where both map and region are empty.

    Raises:
        InputError: maps outside 0 to 1, masks of another size, thresholds out of order.

    Source:
        Oramas et al., ICLR 2019 (thresholds are not known; ours are :data:`THRESHOLDS`).

    Example:
        >>> mask = torch.tensor([[[True, True, False, False]]])
        >>> iou_per_image(torch.tensor([[[1.0, 0.4, 0.4, 0.0]]]), mask, [0.0, 0.5]).tolist()
        [[0.6666666666666666, 0.5]]
    """
    _checked(maps, masks)
    levels = torch.as_tensor(tuple(thresholds), dtype=torch.float64)
    if not levels.numel() or not bool((levels.diff() > 0).all()) or not 0 <= float(levels[0]) <= float(levels[-1]) < 1:
        raise InputError(
            expected("ascending thresholds from 0 to below 1", list(thresholds), "Leave thresholds out for the default")
        )
    images, steps = len(maps), len(levels)
    # How many thresholds a pixel exceeds; counting pixels by that number, from the top, is thresholding at all at once.
    exceeded = torch.bucketize(maps.detach().double().flatten(1).cpu(), levels, right=False)
    region = masks.flatten(1).cpu()
    bins = exceeded + (steps + 1) * torch.arange(images)[:, None]

    def above(weight: Tensor | None) -> Tensor:
        counts = torch.bincount(bins.flatten(), weight, minlength=images * (steps + 1)).view(images, steps + 1)
        return counts.double().flip(1).cumsum(1).flip(1)[:, 1:]

    inside = above(region.double().flatten())
    union = above(None) + region.sum(1, keepdim=True) - inside
    return inside / union  # 0/0 is nan, as stated


def iou_curve(
    maps: Float[Tensor, "image row col"],
    masks: Bool[Tensor, "image row col"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Float[Tensor, " threshold"]:
    """Return the mean of :func:`iou_per_image` over the images at each threshold; undefined values are excluded."""
    return iou_per_image(maps, masks, thresholds).nanmean(0)


def iou_auc(
    maps: Float[Tensor, "image row col"],
    masks: Bool[Tensor, "image row col"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> Float[Tensor, " image"]:
    """Return the area under the curve of IoU over the threshold, in percent.

    The mean over equally spaced thresholds. With the default, the middles of 20 equal intervals between 0 and 1, it is
    the midpoint rule for the integral: a map that is 1 in the region and 0 outside scores exactly 100, one of zeros 0,
    a map of ones the region's share of the image.

    Args:
        maps: 0 to 1.
        masks: the region of each image.
        thresholds: equally spaced.

    Returns:
        0 to 100, higher is better; ``nan`` where map and region are empty at some threshold.

    Raises:
        InputError: as :func:`iou_per_image`.

    Source:
        Oramas et al., ICLR 2019: the area in percent, mean and standard deviation over five folds.

    Example:
        >>> mask = torch.tensor([[[True, True, False, False]]])
        >>> iou_auc(mask.float(), mask).item(), iou_auc(torch.ones(1, 1, 4), mask).item()
        (100.0, 50.0)
    """
    return 100 * iou_per_image(maps, masks, thresholds).mean(1)


# Recall of each part


def part_recall(
    maps: Float[Tensor, "image row col"], parts: Bool[Tensor, "image part row col"], budget: float = 1.0
) -> Float[Tensor, "image part"]:
    """Measure which share of each part lies among the highest pixels of the map.

    As many pixels are spent as the parts together have, times ``budget``: all methods get the same number, whatever
    the scale of their maps. Pixels of equal value that do not all fit count with the share that does (the expected
    value of a random choice among them). Pixels of value 0 are never spent.

    Args:
        maps: 0 to 1.
        parts: where each part is seen; no pixel in two parts.
        budget: pixels spent for each pixel of the parts, above 0.

    Returns:
        0 to 1, higher is better; ``nan`` for a part that is not seen.

    Raises:
        InputError: maps outside 0 to 1, masks of another size, a budget that is not positive.

    Example:
        >>> parts = torch.tensor([[[[True, True, False, False]], [[False, False, True, False]]]])
        >>> part_recall(torch.tensor([[[0.9, 0.8, 0.0, 0.1]]]), parts).tolist()
        [[1.0, 0.0]]
    """
    _checked(maps, parts)
    if not budget > 0:
        raise InputError(expected("a budget above 0", budget, "Leave budget out for as many pixels as the parts have"))
    flat = maps.detach().double().flatten(1)
    seen = parts.flatten(2)
    pixels = flat.shape[1]
    count = (budget * seen.sum((1, 2)).double()).round().long().clamp(0, pixels)
    ranked = flat.sort(dim=1, descending=True).values
    limit = ranked.gather(1, (count - 1).clamp(min=0)[:, None])
    above, level = flat > limit, (flat == limit) & (flat > 0)
    room = count[:, None] - above.sum(1, keepdim=True)
    tied = level.sum(1, keepdim=True)
    spent = above.double() + level.double() * (room / tied.clamp(min=1)).clamp(0, 1)
    spent[count == 0] = 0
    return (spent[:, None] * seen).sum(2) / seen.sum(2)


def both_parts_covered(
    maps: Float[Tensor, "image row col"],
    parts: Bool[Tensor, "image part row col"],
    share: float = COVERED_SHARE,
    budget: float = 1.0,
) -> Float[Tensor, " image"]:
    """Say whether a map covers every part: 1 where :func:`part_recall` of each part is at least ``share``.

    Args:
        maps: 0 to 1.
        parts: where each part is seen.
        share: of a part's pixels that have to be covered. A choice: a quarter is well above what a random map reaches,
            and a thin part is rarely covered whole.
        budget: as for :func:`part_recall`.

    Returns:
        1 or 0; ``nan`` where a part is not seen.

    Raises:
        InputError: as :func:`part_recall`, or a share outside 0 to 1.
    """
    if not 0 < share <= 1:
        raise InputError(expected("a share above 0, up to 1", share, f"Leave share out for {COVERED_SHARE}"))
    least = part_recall(maps, parts, budget).amin(1)  # nan wins
    return (least >= share).double().where(~least.isnan(), torch.nan)


# Pointing


def pointing_game(
    maps: Float[Tensor, "image row col"], masks: Bool[Tensor, "image row col"], tolerance_px: float = 0.0
) -> Float[Tensor, " image"]:
    """Say whether the map's peak lies in the region.

    Where several pixels share the highest value, the share of them that hits counts: the expected value of a random
    choice, so a map without a peak scores what chance would.

    Args:
        maps: 0 to 1.
        masks: the region of each image.
        tolerance_px: how far from the region (Euclidean, between pixel centres) a peak still counts.

    Returns:
        0 to 1, higher is better; ``nan`` where the region is empty.

    Raises:
        InputError: maps outside 0 to 1, masks of another size, a negative tolerance.

    Source:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016 (there 15 px on photos).

    Example:
        >>> mask = torch.tensor([[[True, False, False]]])
        >>> pointing_game(torch.tensor([[[0.0, 1.0, 0.0]]]), mask).item()
        0.0
        >>> pointing_game(torch.tensor([[[0.0, 1.0, 0.0]]]), mask, tolerance_px=1.0).item()
        1.0
    """
    _checked(maps, masks)
    if not tolerance_px >= 0:
        raise InputError(expected("a tolerance of at least 0 px", tolerance_px, "Leave tolerance_px out for none"))
    near = masks
    if tolerance_px >= 1:
        reach = int(tolerance_px)
        steps = torch.arange(-reach, reach + 1, device=masks.device)
        disc = (steps[:, None].square() + steps.square() <= tolerance_px**2).float()
        near = F.conv2d(masks.float()[:, None], disc[None, None], padding=reach)[:, 0] > 0.5
    peak = maps == maps.amax(dim=(1, 2), keepdim=True)
    hits = (peak & near).sum((1, 2)).double() / peak.sum((1, 2))
    return hits.where(masks.any(dim=2).any(dim=1), torch.nan)


# Insertion and deletion


@torch.no_grad()
def insertion_deletion(
    forward: Callable[[Tensor], Tensor],
    images: Float[Tensor, "image channel row col"],
    maps: Float[Tensor, "image row col"],
    classes: Int[Tensor, " image"],
    baseline: Float[Tensor, "#image channel #row #col"],
    *,
    steps: int = 16,
    generator: torch.Generator,
) -> tuple[Float[Tensor, " image"], Float[Tensor, " image"]]:
    """Measure how fast the class appears when the map's highest pixels are put in, and goes when they are taken out.

    Pixels are ranked by the map, ``k/steps`` of them are exchanged at step ``k`` from 0 to ``steps``; the mean of the
    class's probability over the steps by the trapezoidal rule is the score. Insertion starts from ``baseline`` and puts
    in pixels of the image; deletion starts from the image and puts in pixels of ``baseline``.

    Args:
        forward: gives the class scores (image, class) before the softmax; called ``2 · (steps + 1)`` times with the
            whole batch.
        images: preprocessed.
        maps: the heat map of each image, 0 to 1.
        classes: whose probability is followed.
        baseline: what replaces a missing pixel: a value per channel, or a blurred copy of the images.
        steps: at least 1.
        generator: ranks pixels of equal value by chance, in the same order for both scores.

    Returns:
        Insertion (0 to 1, higher is better) and deletion (0 to 1, lower is better).

    Raises:
        InputError: maps outside 0 to 1 or of another size, no steps.

    Source:
        Petsiuk et al., "RISE", BMVC 2018, section 4.3.
    """
    _checked(maps)
    if steps < 1:
        raise InputError(expected("steps >= 1", steps, "Leave steps out for 16"))
    if maps.shape != (len(images), *images.shape[-2:]):
        raise InputError(
            expected(
                f"maps of shape {(len(images), *images.shape[-2:])}",
                f"{tuple(maps.shape)}",
                "Bring the maps to the input's size",
            )
        )
    flat = maps.flatten(1)
    chance = torch.rand(flat.shape, generator=generator, device=generator.device).argsort(1).to(flat.device)
    # Sorting shuffled values stably ranks by value, then by chance.
    order = chance.gather(1, flat.gather(1, chance).argsort(dim=1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    rank = rank.view_as(maps)[:, None]
    curves = []
    for step in range(steps + 1):
        first = rank < step / steps * flat.shape[1]
        for there, elsewhere in ((images, baseline), (baseline, images)):
            scores = forward(torch.where(first, there, elsewhere))
            curves.append(scores.softmax(1).gather(1, classes[:, None])[:, 0].double())
    inserted, deleted = torch.stack(curves[0::2]), torch.stack(curves[1::2])
    return torch.trapezoid(inserted, dim=0) / steps, torch.trapezoid(deleted, dim=0) / steps


# Maps that know nothing


def random_maps(images: int, size_px: tuple[int, int], *, generator: torch.Generator) -> Float[Tensor, "image row col"]:
    """Return maps of independent uniform values.

    Args:
        images: how many.
        size_px: rows and columns.
        generator: source of the draws.
    """
    return torch.rand(images, *size_px, generator=generator)


def centre_box_maps(images: int, size_px: tuple[int, int], side_frac: float = 0.5) -> Float[Tensor, "image row col"]:
    """Return maps that are 1 in a box in the middle and 0 outside.

    Args:
        images: how many.
        size_px: rows and columns.
        side_frac: sides of the box as a share of the image's, above 0 up to 1.

    Raises:
        InputError: a share out of range.

    Example:
        >>> centre_box_maps(1, (4, 4))[0].sum().item()
        4.0
    """
    if not 0 < side_frac <= 1:
        raise InputError(expected("side_frac above 0, up to 1", side_frac, "Leave side_frac out for 0.5"))
    inside = [
        (torch.arange(side) + 0.5 - side / 2).abs() < max(side * side_frac / 2, 0.6)  # at least one pixel
        for side in size_px
    ]
    box = (inside[0][:, None] & inside[1]).float()
    return box.expand(images, *size_px).clone()


def edge_maps(images: Float[Tensor, "image channel row col"]) -> Float[Tensor, "image row col"]:
    """Return an edge detector's maps: the length of the gradient by Sobel's filters, over all channels, 0 to 1.

    Args:
        images: preprocessed; their edges are continued by their border values.

    Returns:
        Maps stretched to 0 … 1; zeros for an image of one colour.
    """
    ramp, smooth = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])
    kernels = torch.stack([smooth[:, None] * ramp, ramp[:, None] * smooth])[:, None].to(images)
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(padded.flatten(0, 1)[:, None], kernels).unflatten(0, images.shape[:2])
    return normalised(slopes.square().sum((1, 2)).sqrt())
