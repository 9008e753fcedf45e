"""The share p: at which value the objective is least, and whether it could be had for nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from partlens.estimate import Estimate, bootstrap
from partlens.explainer.network import Explainer
from partlens.metrics.faithfulness import best_share

SHARES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.95)


@dataclass
class ShareCurve:
    """The objective of each photo at several shares p, everything else held.

    Attributes:
        eta: weight of -log p.
        costs: per photo and share: ``sum_l |x_l - x_l*|²`` of each target, times ``1 / E|max(x*, 0)|`` when read out.
    """

    eta: float
    reconstruction_weight: float
    costs: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    worst_rescaling: float = math.nan

    @torch.no_grad()
    def add(self, explainer: Explainer, maps: Tensor, targets: Sequence[Tensor]) -> None:
        """Decode a batch at every share."""
        tracks = explainer.normed_tracks(maps)
        cost = maps.new_empty(len(maps), len(SHARES), len(targets))
        for column, share in enumerate(SHARES):
            for row, (value, target) in enumerate(
                zip(
                    explainer.decode(share * tracks.interpretable + (1 - share) * tracks.ordinary), targets, strict=True
                )
            ):
                cost[:, column, row] = (value - target).square().flatten(1).sum(1)
        self.costs.append(cost.double())
        self.norms.append(torch.stack([t.clamp(min=0).flatten(1).norm(dim=1) for t in targets], 1).double())
        if math.isnan(self.worst_rescaling):
            self.worst_rescaling = rescaling_error(explainer, maps)

    def optimum(self, generator: torch.Generator, photos: Tensor, rounds: int = 1000) -> Estimate:
        """Return the p at which these photos' objective is least, with a bootstrap over photos (an integer per row)."""
        weights = self.reconstruction_weight / torch.cat(self.norms).mean(0).clamp(min=1e-12)
        costs = (torch.cat(self.costs) * weights).sum(2)
        shares = torch.tensor(SHARES, dtype=torch.float64)
        return bootstrap(
            lambda i: best_share(costs[i].mean(0), shares, self.eta),
            len(costs),
            generator=generator,
            rounds=rounds,
            groups=photos,
        )


def rescaling_error(explainer: Explainer, maps: Tensor, factor: float = 10.0) -> float:
    """Return how far the encoder's output moves when conv-interp-2 is scaled and its norm layer measured again.

    A share p could be had for nothing if the interpretable track could be made large or small by its weights alone; the
    norm layer is there to prevent it. 0 means it does: the largest change, relative to the largest value.
    """
    scaled = copy.deepcopy(explainer)
    outcome = []
    with torch.no_grad():
        for times in (1.0, factor):
            for parameter, original in zip(
                scaled.conv_interp_2.parameters(), explainer.conv_interp_2.parameters(), strict=True
            ):
                parameter.copy_(original * times)
            masked = scaled.pool(scaled.masked(scaled.interpret(maps)[1]))
            scaled.norm_interp.started.fill_(value=False)
            scaled.norm_interp.update(masked)
            outcome.append(scaled.norm_interp.eval()(masked))
    largest = float(outcome[0].abs().max())
    return float((outcome[1] - outcome[0]).abs().max()) / largest if largest > 0 else 0.0


def share_estimate(shares: Sequence[float]) -> Estimate:
    """Return p of the kept explainer with a 95 % t-interval of the seeds' mean; undefined ends for a single seed."""
    count = len(shares)
    if count < 2:
        return Estimate(shares[0], (math.nan, math.nan), count, "seeds")
    t_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    mean = sum(shares) / count
    deviation = math.sqrt(sum((s - mean) ** 2 for s in shares) / (count - 1))
    half = t_95.get(count - 1, 1.96) * deviation / math.sqrt(count)
    return Estimate(shares[0], (max(0.0, mean - half), min(1.0, mean + half)), count, "seeds")
