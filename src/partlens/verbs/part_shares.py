"""What each part adds to some predictions, by every measure: the verbs parts and explain share this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.explainer.network import Explainer
from partlens.object_parts.assignment import PartsConfig
from partlens.object_parts.contributions import (
    MOST_PLAYERS,
    class_score,
    filter_contributions,
    part_contributions,
    part_heat_maps,
    sampled_part_contributions,
    shares_of_random_parts,
    sums_by_part,
    tracks,
)
from partlens.verbs.parts_file import NamedPart


@dataclass(frozen=True)
class PartShares:
    """Contributions of parts to one score per image; ``S`` is the performer's score of the fed-back reconstruction.

    Attributes:
        shapley: Shapley value of each part.
        standard_error: of ``shapley``; 0 where it is exact.
        ordinary: Shapley value of the ordinary track.
        ordinary_standard_error: of ``ordinary``.
        integrated: sum of the integrated gradients of each part's filters.
        integrated_ordinary: integrated gradients of the ordinary track.
        gradient_activation: sum of gradient × activation, the papers' measure.
        removal: how much S falls when the part alone is taken away.
        random: ``integrated`` of parts of the same sizes with filters drawn by lot.
        filters: integrated gradients of each filter.
        score: S.
        baseline: S of nothing: both tracks silent.
        remainder: what the integrated gradients miss of ``score - baseline``.
        heat: where each part's contribution comes from, on the tap's grid.
        fed_outputs: all outputs of the fed-back reconstruction.
        method: how the Shapley values were made.
    """

    shapley: Float[Tensor, "image part"]
    standard_error: Float[Tensor, "image part"]
    ordinary: Float[Tensor, " image"]
    ordinary_standard_error: Float[Tensor, " image"]
    integrated: Float[Tensor, "image part"]
    integrated_ordinary: Float[Tensor, " image"]
    gradient_activation: Float[Tensor, "image part"]
    removal: Float[Tensor, "image part"]
    random: Float[Tensor, "draw image part"]
    filters: Float[Tensor, "image filter"]
    score: Float[Tensor, " image"]
    baseline: Float[Tensor, " image"]
    remainder: Float[Tensor, " image"]
    heat: Float[Tensor, "image part row col"]
    fed_outputs: Float[Tensor, "image class"]
    method: str


def part_labels(parts: Sequence[NamedPart], filters: int) -> Int[Tensor, " filter"]:
    """Return the position of each filter's part among ``parts``."""
    labels = torch.full((filters,), -1, dtype=torch.long)
    for position, part in enumerate(parts):
        labels[list(part.filters)] = position
    return labels


def part_shares(
    explainer: Explainer,
    head: nn.Module,
    maps: Float[Tensor, "image filter row col"],
    classes: Int[Tensor, " image"],
    part_of: Int[Tensor, " filter"],
    count: int,
    config: PartsConfig,
) -> PartShares:
    """Measure what each part adds to the score of one class per image.

    Shapley values are exact up to ``config.coalitions_max`` coalitions, else estimated from random orders.

    Args:
        explainer: in eval mode.
        head: the performer from the last target on.
        maps: of the tap.
        classes: the output whose score is shared, per image.
        part_of: the part of each filter.
        count: number of parts.
        config: draws and seed; the same seed for every batch, so that batches see the same random parts.
    """
    both = tracks(explainer, maps)
    score = class_score(explainer, head, classes)
    single = filter_contributions(score, both, tolerance=config.remainder_max)
    exact = 2 ** (count + 1) <= config.coalitions_max and count < MOST_PLAYERS
    if exact:
        grouped = part_contributions(score, both, part_of, count)
        method = "exact"
    else:
        orders = torch.Generator().manual_seed(config.seed)
        grouped = sampled_part_contributions(score, both, part_of, count, pairs=config.order_pairs, generator=orders)
        method = f"{2 * config.order_pairs} random orders, half of them the others reversed"
    deals = torch.Generator().manual_seed(config.seed + 1)
    with torch.no_grad():
        fed = head(explainer.decode(both.interpretable + both.ordinary)[-1])
        masked = explainer.masked(both.maps)
    return PartShares(
        shapley=grouped.parts,
        standard_error=grouped.standard_error,
        ordinary=grouped.ordinary,
        ordinary_standard_error=grouped.ordinary_standard_error,
        integrated=sums_by_part(single.filters, part_of, count),
        integrated_ordinary=single.ordinary,
        gradient_activation=sums_by_part(single.gradient_activation, part_of, count),
        removal=grouped.removal,
        random=shares_of_random_parts(single.filters, part_of, count, draws=config.random_parts, generator=deals),
        filters=single.filters,
        score=grouped.score,
        baseline=grouped.baseline,
        remainder=single.remainder,
        heat=part_heat_maps(masked, single.filters, part_of, count),
        fed_outputs=fed[0] if isinstance(fed, tuple) else fed,
        method=method,
    )
