"""What each part adds to some predictions, by every measure, and the mean over photos that ``parts.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.estimate import Estimate, bootstrap, percentile_interval
from partlens.explainer.network import Explainer
from partlens.object_parts.contributions import (
    class_score,
    gradient_activation,
    part_contributions,
    part_heat_maps,
    shares_of_random_parts,
    sums_by_part,
    tracks,
)
from partlens.object_parts.record import Contributions, NamedPart, PartContribution
from partlens.object_parts.shapley import Shapley
from partlens.object_parts.trust import removal_agreement

# Up to this many coalitions Shapley values are exact; beyond they are estimated from random orders.
_COALITIONS_MAX = 256
_ORDER_PAIRS = 16
_RANDOM_PARTS = 20
_MIDDLES = (0.125, 0.375, 0.625, 0.875)  # of the line from nothing; filters need no more, parts have Shapley values
_ROUNDS = 1000


@dataclass(frozen=True)
class PartShares:
    """Contributions of parts to one score per image; ``S`` is the performer's score of the fed-back reconstruction."""

    shapley: Shapley  # of parts and, last, the ordinary track; everyone is S, nobody S of nothing
    filters: Float[Tensor, "image filter"]  # integrated gradients of each filter
    integrated: Float[Tensor, "image part"]  # sum of them over each part's filters
    gradient_activation: Float[Tensor, "image part"]  # sum of gradient × activation, the papers' measure
    random: Float[Tensor, "image draw part"]  # the same of parts of the same sizes with random filters, for each draw
    heat: Float[Tensor, "image part row col"]  # where each part's contribution comes from, on the tap's grid
    fed_outputs: Float[Tensor, "image class"]  # all outputs of the fed-back reconstruction
    method: str  # how the Shapley values were made

    @property
    def rise(self) -> Float[Tensor, " image"]:
        """S less S of nothing."""
        return self.shapley.everyone - self.shapley.nobody


def _part_labels(parts: Sequence[NamedPart], filters: int) -> Int[Tensor, " filter"]:
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
    parts: Sequence[NamedPart],
    seed: int,
) -> PartShares:
    """Measure what each part adds to the score of one class per image."""
    count, part_of = len(parts), _part_labels(parts, explainer.structure.channels_out)
    both = tracks(explainer, maps.to(explainer.device))
    score = class_score(explainer, head, classes, both.passing)
    single = gradient_activation(score, both, at=_MIDDLES).cpu()
    exact = 2 ** (count + 1) <= _COALITIONS_MAX
    orders = None if exact else torch.Generator().manual_seed(seed)
    grouped = part_contributions(score, both, part_of, count, pairs=_ORDER_PAIRS, generator=orders)
    draws = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        fed = head(explainer.decode(both.interpretable + both.ordinary, both.passing)[-1])
        masked = explainer.masked(both.interp2).cpu()
    return PartShares(
        shapley=grouped,
        filters=single,
        integrated=sums_by_part(single, part_of, count),
        gradient_activation=sums_by_part(gradient_activation(score, both).cpu(), part_of, count),
        random=shares_of_random_parts(single, part_of, count, draws=_RANDOM_PARTS, generator=draws).transpose(0, 1),
        heat=part_heat_maps(masked, single, part_of, count),
        fed_outputs=(fed[0] if isinstance(fed, tuple) else fed).cpu(),
        method="exact" if exact else f"{2 * _ORDER_PAIRS} random orders, half of them the others reversed",
    )


@dataclass(frozen=True)
class _OverPhotos:
    """Means and ratios over photos, with a bootstrap."""

    photos: Int[Tensor, " image"]
    generator: torch.Generator

    def mean(self, values: Float[Tensor, " image"]) -> Estimate:
        return bootstrap(
            lambda i: float(values[i].mean()),
            len(values),
            generator=self.generator,
            rounds=_ROUNDS,
            groups=self.photos,
        )

    def ratio(self, part: Float[Tensor, " image"], whole: Float[Tensor, " image"]) -> Estimate:
        """Return the ratio of sums; undefined where the whole is not positive."""

        def share(i: Tensor) -> float:
            below = float(whole[i].sum())
            return float(part[i].sum()) / below if below > 0 else math.nan

        return bootstrap(share, len(whole), generator=self.generator, rounds=_ROUNDS, groups=self.photos)


def mean_contributions(
    batches: Sequence[PartShares],
    parts: Sequence[NamedPart],
    outputs: Float[Tensor, "image class"],
    photos: Int[Tensor, " image"],
    seed: int,
) -> Contributions:
    """Join what the parts add to the performer's own predictions for all photos."""
    over = _OverPhotos(photos, torch.Generator().manual_seed(seed))
    found: PartShares = _joined(batches)
    shapley, ordinary, rise = found.shapley.players[:, :-1], found.shapley.players[:, -1], found.rise
    own = outputs.gather(1, outputs.argmax(1, keepdim=True))[:, 0].double()
    # The order of these estimates is the order of their draws.
    performer_score, fed_back, baseline = (over.mean(v) for v in (own, found.shapley.everyone, found.shapley.nobody))
    interpretable_share, ordinary_share = (over.ratio(v, rise) for v in (shapley.sum(1), ordinary))
    rows = tuple(_of_part(part, p, found, over) for p, part in enumerate(parts))
    sizes = torch.tensor([len(p.filters) for p in parts], dtype=torch.float64)
    predicted = {
        "shapley": shapley,
        "integrated_gradients": found.integrated,
        "gradient_activation": found.gradient_activation,
        "part_size": shapley.sum(1, keepdim=True) * sizes / sizes.sum(),  # only counts filters
    }

    return Contributions(
        method=found.method,
        performer_score=performer_score,
        fed_back=fed_back,
        baseline=baseline,
        interpretable_share=interpretable_share,
        ordinary_share=ordinary_share,
        standard_error=float(found.shapley.standard_error[:, :-1].mean()),
        parts=rows,
        removal_check={
            name: removal_agreement(
                values, found.shapley.loss[:, :-1], photos=photos, generator=over.generator, rounds=_ROUNDS
            )
            for name, values in predicted.items()
        },
    )


def _joined(found: Sequence[Any]) -> Any:
    """Join batches: each tensor of each record along its images, in double precision."""
    first = found[0]
    if isinstance(first, Tensor):
        return torch.cat([one.double() for one in found])
    if is_dataclass(first):
        kind: Any = type(first)
        return kind(**{f.name: _joined([getattr(one, f.name) for one in found]) for f in fields(first)})
    return first


def _of_part(part: NamedPart, p: int, found: PartShares, over: _OverPhotos) -> PartContribution:
    shapley, removal = found.shapley.players[:, :-1], found.shapley.loss[:, p]
    # The same draws of the filters serve every batch, so that a draw is one assignment over all photos.
    drawn = found.random.transpose(0, 1).contiguous().sum(1)
    null = (drawn / drawn.sum(1, keepdim=True))[:, p]
    return PartContribution(
        name=part.name,
        filters=part.filters,
        shapley=over.mean(shapley[:, p]),
        share=over.ratio(shapley[:, p], shapley.sum(1)),
        gradient_activation_share=over.ratio(found.gradient_activation[:, p], found.gradient_activation.sum(1)),
        integrated_share=over.ratio(found.integrated[:, p], found.integrated.sum(1)),
        integrated_null=Estimate(float(null.mean()), percentile_interval(null.tolist()), len(null), "draws"),
        removal=over.mean(removal),
        predicted=tuple(round(v, 4) for v in shapley[:, p].tolist()),
        measured=tuple(round(v, 4) for v in removal.tolist()),
    )
