"""What a removal experiment measured, as estimates: drops, their ratios to baselines, who is hurt by whose features.

See :mod:`partlens_papers.removal.feature_removal`.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from partlens_papers.removal.plan import FeatureSet, RemovalConfig, Sides, ring_of

if TYPE_CHECKING:
    from torch import Tensor

    from partlens.estimate import Estimate
    from partlens.selection.record import FeatureIndex

MEASURES = ("accuracy", "probability", "log_odds")


def scored(
    sides: Sides,
    names: Sequence[str],
    outputs: Sequence[int],
    labels: Sequence[int],
    index: FeatureIndex,
    fits: Sequence[Tensor],
    plans: Mapping[str, Sequence[tuple[int, FeatureSet]]],
    measured: Mapping[str, Mapping[str, list[float]]],
    how: RemovalConfig,
) -> dict[str, Any]:
    """Turn what was measured into estimates."""
    import torch

    from partlens.estimate import bootstrap

    order = [row for row, _ in plans["intact"]]
    place = {label: column for column, label in enumerate(sides.classes)}
    owner = torch.tensor([place[labels[row]] for row in order])
    count = len(sides.classes)

    def values(name: str) -> dict[str, Tensor]:
        odds = torch.tensor(measured[name]["log_odds"], dtype=torch.float64)
        right = torch.tensor(measured[name]["right"], dtype=torch.float64)
        return {"accuracy": right, "probability": odds.sigmoid(), "log_odds": odds}

    intact = values("intact")

    def drop(name: str) -> dict[str, Tensor]:
        return {measure: intact[measure] - without for measure, without in values(name).items()}

    def mean(each: Tensor, rows: Tensor) -> float:
        """Average over classes of the average over the photos of each."""
        photos = torch.bincount(owner[rows], minlength=count)
        sums = torch.bincount(owner[rows], each[rows], minlength=count)
        return float((sums / photos)[photos > 0].mean())

    def estimate(statistic: Callable[[Tensor], float]) -> Estimate:
        return bootstrap(statistic, len(order), generator=torch.Generator().manual_seed(how.seed), rounds=how.rounds)

    def scores(name: str, drops: Mapping[str, Tensor]) -> dict[str, Any]:
        accuracy = intact["accuracy"] - drops["accuracy"]
        return {
            "features": _removed(plans, name),
            "accuracy": estimate(partial(mean, accuracy)).to_dict(),
            "drop": {m: estimate(partial(mean, d)).to_dict() for m, d in drops.items()},
        }

    seeds = {seed: drop(f"random-seed-{seed}") for seed in how.random_seeds}
    others = [name for name in plans if name.startswith("other-")]
    drops = {name: drop(name) for name in plans if not name.startswith(("intact", "random-seed-", "other-"))}
    drops["random"] = _average(list(seeds.values()))
    drops["others"] = _average([drop(name) for name in others])
    conditions = {name: scores(name, each) for name, each in drops.items()}
    against = {
        baseline: {
            measure: {
                "difference": estimate(partial(mean, drops["ours"][measure] - drops[baseline][measure])).to_dict(),
                "ratio": _ratio(
                    partial(mean, drops["ours"][measure]), partial(mean, drops[baseline][measure]), estimate
                ),
            }
            for measure in MEASURES
        }
        for baseline in ("random", "activation", "gradient", "others")
    }
    shifts, ring = ring_of(count, how)
    matrix = _matrix(drops["ours"], [drop(f"other-{shift}") for shift in shifts], owner, shifts, ring)
    ours = values("ours")["accuracy"]
    layers: Counter[str] = Counter()
    for weights in fits:
        layers.update(index.place(int(f))[0] for f in weights.nonzero()[:, 0])
    records = []
    for column, name in enumerate(names):
        own = owner == column
        records.append(
            {
                "name": name,
                "output": outputs[column],
                "photos": int(own.sum()),
                "features": [int((weights[:, column] != 0).sum()) for weights in fits],
                "accuracy": float(intact["accuracy"][own].mean()),
                "accuracy_without": float(ours[own].mean()),
            }
        )
    return {
        "classes": records,
        "counts": {
            "classes": count,
            "tested_photos": len(order),
            "fit_photos": [len(side.fit) for side in sides.sides],
            "features": index.size,
            "layers": dict(layers.most_common()),
        },
        "intact": {m: estimate(partial(mean, v)).to_dict() for m, v in intact.items()},
        "conditions": conditions,
        "random_seeds": {
            str(seed): estimate(partial(mean, each["accuracy"])).to_dict() for seed, each in seeds.items()
        },
        "against": against,
        "dominance": {m: _dominance(matrix[m], len(shifts)) for m in MEASURES},
        "matrix": {
            "classes": list(names),
            "drop": {m: v.tolist() for m, v in matrix.items()} if len(shifts) == count - 1 else None,
        },
    }


def _average(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    import torch

    return {measure: torch.stack([part[measure] for part in parts]).mean(0) for measure in MEASURES}


def _removed(plans: Mapping[str, Sequence[tuple[int, FeatureSet]]], name: str) -> float:
    """Average the number of features removed from a photo."""
    same = {"random": "random-seed-", "others": "other-"}
    prefix = same.get(name)
    plan = [s for n, p in plans.items() if (n == name if prefix is None else n.startswith(prefix)) for _, s in p]
    return sum(map(len, plan)) / len(plan)


def _ratio(
    above: Callable[[Tensor], float], below: Callable[[Tensor], float], estimate: Callable[..., Estimate]
) -> dict[str, Any]:
    """Estimate a ratio of drops; undefined unless nearly every resampled baseline drop is above 0."""
    drawn = {"rounds": 0, "defined": 0}

    def statistic(rows: Tensor) -> float:
        bottom = below(rows)
        drawn["rounds"] += 1
        drawn["defined"] += bottom > 0
        return above(rows) / bottom if bottom > 0 else math.nan

    found = estimate(statistic)
    share = drawn["defined"] / drawn["rounds"]
    if share < 0.975:  # the interval would reach through infinity
        found = dataclasses.replace(found, interval=(math.nan, math.nan))
    return found.to_dict() | {"rounds_defined": share}


def _matrix(
    own: Mapping[str, Tensor],
    others: Sequence[Mapping[str, Tensor]],
    owner: Tensor,
    shifts: Sequence[int],
    ring: Sequence[int],
) -> dict[str, Tensor]:
    """Average the drops by removed and tested class: ``[removed, tested]``, ``nan`` where not measured."""
    import torch

    count = len(ring)
    at = torch.empty(count, dtype=torch.int64)
    at[torch.tensor(ring)] = torch.arange(count)
    photos = torch.bincount(owner, minlength=count)
    result = {}
    for measure in MEASURES:
        matrix = torch.full((count, count), torch.nan, dtype=torch.float64)
        for shift, drops in zip((0, *shifts), (own, *others), strict=True):
            mean = torch.bincount(owner, drops[measure], minlength=count) / photos
            tested = torch.arange(count)
            matrix[torch.tensor(ring)[(at + shift) % count], tested] = mean
        result[measure] = matrix
    return result


def _dominance(matrix: Tensor, others: int) -> dict[str, Any]:
    """Return the share of removals that hurt their own class more than each other class measured."""
    from partlens.estimate import proportion

    own = matrix.diagonal()
    rest = matrix.clone()
    rest.fill_diagonal_(-math.inf)
    most = rest.nan_to_num(nan=-math.inf).amax(1)
    share = dataclasses.replace(proportion((own > most).double()), unit="classes")
    return {"share": share.to_dict(), "null": 1 / (1 + others)}
