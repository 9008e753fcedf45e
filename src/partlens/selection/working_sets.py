"""How the μ-lasso is solved for some classes together: working sets of features, and an exact solver inside them.

**Algorithm.** Each class keeps a working set of features. On it, an exact active-set method solves the small problem
(normal equations of the free features, a multiplier for ``||w||_1 = μ``, steps cut at the first feature that reaches
zero); all classes take each step together as one batched Cholesky solve. Then one pass over all features gives the gap,
and the features that violate optimality most enter the working sets. A signed problem is the same one with a sign per
working feature. Exactly dependent features (copies; layer blocks that sum to the same constant) make the normal
equations singular; a proximal term of 1e-11 of each feature's energy around the current point decides between equally
good solutions, always in the same way, and leaves the optimum where it is.

The letters and the gap are those of :mod:`partlens.selection.lasso`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from partlens.selection.inner_products import Products

OBJECTIVE_FLOOR = 1e-3
"""Share of ``||l_j||²`` below which an objective counts as this share in the relative gap (an exact fit has 0)."""

_PROXIMAL = 1e-11  # of each feature's own energy; far below what matters, far above rounding
ENTER = 32  # features that enter a working set per round
_ENTER_SMALL = 8  # features that become free at once inside a working set
_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the way to the free optimum that are tried, clipped at zero
_STALLED_STEPS = 10  # fruitless tries on a working set before rounding is what is left
_STALLED_ROUNDS = 3  # the same for looks at all features
_WIDE = 512  # working features above which those without weight are let go
_TINY = torch.finfo(torch.float64).tiny


# The small problems


@dataclass
class _Small:
    """The problems on the working sets: min u'Hu - 2b'u, u >= 0, sum u <= μ, for each class; padded, batched.

    ``reach`` is what half the gap must come down to.
    """

    products: Tensor  # class, entry, entry
    target: Tensor  # class, entry
    valid: Tensor  # class, entry
    weights: Tensor  # class, entry
    reach: Tensor  # class
    mu: float


def _free_optimum(small: _Small, rows: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Minimise over the free entries, signs ignored; return the point and half the multiplier of the bound.

    With the scaled problem ``H' = D H D``, ``D = diag(H)^-1/2`` and the proximal term δ around the current point ``y``,
    ``(H' + δ) z = D b + δ y - ν D 1`` where ν >= 0 is 0 or such that the weights sum to μ.
    """
    width = max(1, int(free.sum(1).max()))
    order = free.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    on = free.gather(1, order)
    products = small.products[rows[:, None, None], order[:, :, None], order[:, None, :]]
    scale = products.diagonal(dim1=1, dim2=2).clamp_min(_TINY).rsqrt() * on
    scaled = products * scale[:, :, None] * scale[:, None, :]
    now = torch.where(on, small.weights[rows].gather(1, order) / scale.where(on, torch.ones_like(scale)), 0.0)
    target = small.target[rows].gather(1, order) * scale
    proximal = _PROXIMAL
    while True:
        scaled.diagonal(dim1=1, dim2=2).copy_(1.0 + proximal * on.double())
        factor, trouble = torch.linalg.cholesky_ex(scaled)
        if not bool(trouble.any()):
            break
        proximal *= 100
    solved = torch.cholesky_solve(torch.stack([target + proximal * now, scale], dim=2), factor) * scale[:, :, None]
    plain, toll = solved[..., 0], solved[..., 1]
    bound = ((plain.sum(1) - small.mu) / toll.sum(1).clamp_min(_TINY)).clamp_min(0.0)
    point = torch.zeros_like(small.weights[rows]).scatter(1, order, plain - bound[:, None] * toll)
    return point.where(free, torch.zeros_like(point)), bound


class _Progress:
    """Counts, per class, tries in a row that neither lowered the objective nor brought the gap down by a tenth."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.objective = torch.full((count,), math.inf, dtype=torch.float64, device=device)
        self.gap = self.objective.clone()
        self.fruitless = torch.zeros(count, dtype=torch.int64, device=device)

    def note(self, classes: Tensor, objective: Tensor, gap: Tensor) -> None:
        before = self.objective[classes]
        idle = (objective >= before - 1e-14 * objective.abs()) & (gap >= 0.9 * self.gap[classes])
        self.fruitless[classes] = torch.where(idle, self.fruitless[classes] + 1, 0)
        self.objective[classes] = torch.minimum(before, objective)
        self.gap[classes] = torch.minimum(self.gap[classes], gap)


def _blocked_step(small: _Small, rows: Tensor, now: Tensor, point: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """Go towards the free optimum as far as weights stay at least 0; return the weights and which became blocked."""
    falling = free & (point <= 0)
    share = torch.where(falling, now / (now - point).clamp_min(_TINY), math.inf)
    step = share.amin(1).clamp_max(1.0)
    moved = (now + step[:, None] * (point - now)).clamp_min(0.0)
    blocked = falling & (share <= step[:, None] * (1 + 1e-12))
    moved = moved.masked_fill(blocked, 0.0)
    short = falling.any(1).nonzero()[:, 0]
    if len(short):  # further along the same line, clipped at zero: several features can leave at once
        at, old = rows[short], now[short][:, :, None]
        shares = torch.tensor(_SHARES, device=now.device, dtype=now.dtype)
        tries = (old + shares * (point[short][:, :, None] - old)).clamp_min(0.0)
        tries = tries * (small.mu / tries.sum(1, keepdim=True).clamp_min(small.mu))
        tries = torch.cat([moved[short][:, :, None], tries], dim=2)
        cost = (tries * (small.products[at] @ tries - 2 * small.target[at][:, :, None])).sum(1)
        best = cost.argmin(1)[:, None, None].expand(-1, tries.shape[1], 1)
        moved[short] = tries.gather(2, best)[:, :, 0]
        blocked[short] |= falling[short] & (moved[short] == 0)
    return moved, blocked


def _solve_small(small: _Small, limit: int) -> int:
    """Bring ``small.weights`` to the optimum of each class; return the number of batched solves."""
    count, device = len(small.weights), small.weights.device
    rows = torch.arange(count, device=device)  # classes that still move
    check = rows  # classes that are at the optimum of their free features
    free = small.weights > 0
    root = small.products.diagonal(dim1=1, dim2=2).clamp_min(_TINY).rsqrt()
    bound = torch.zeros(count, dtype=torch.float64, device=device)
    progress = _Progress(count, device)
    steps = 0
    while True:
        if len(check):
            now = small.weights[check]
            half = (small.products[check] @ now[:, :, None])[:, :, 0] - small.target[check]
            steepest = torch.where(small.valid[check], -half, -math.inf).amax(1).clamp_min(0.0)
            gap = (half * now).sum(1) + small.mu * steepest
            progress.note(check, (now * (half - small.target[check])).sum(1), gap)
            done = (gap <= small.reach[check]) | (progress.fruitless[check] >= _STALLED_STEPS)
            # The features that would gain most become free; only one after a try that gained nothing.
            enter = (free[check].sum(1) // 2).clamp_min(_ENTER_SMALL)
            enter = torch.where(progress.fruitless[check] > 0, 1, enter)
            excess = torch.where(small.valid[check] & ~free[check], -half - bound[check, None], -math.inf)
            wanted = excess > 0.25 * small.reach[check, None] / small.mu
            rank = torch.where(wanted, excess * root[check], -math.inf)
            place = rank.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            free[check] |= wanted & (place < enter[:, None]) & ~done[:, None]
            rows = rows[~torch.isin(rows, check[done])]
        if not len(rows) or steps >= limit:
            return steps
        steps += 1
        point, bound[rows] = _free_optimum(small, rows, free[rows])
        moved, blocked = _blocked_step(small, rows, small.weights[rows], point, free[rows])
        check = rows[~(free[rows] & (point <= 0)).any(1)]
        small.weights[rows] = moved
        free[rows] &= ~blocked


# The whole problem


@dataclass
class _Outcome:
    weights: Tensor  # class, feature
    objective: Tensor
    gap: Tensor
    converged: Tensor
    iterations: int


class _WorkingSets:
    """The features that each class works with, padded with -1, and the inner products of all of them.

    A weight that may be negative is kept as a sign and a magnitude, so that the small problems are non-negative.
    """

    def __init__(self, products: Products, group: Tensor) -> None:
        self.source, self.group = products, group
        products.forget()
        device, count = products.cross.device, len(group)
        self.position = torch.full((products.cross.shape[1],), -1, dtype=torch.int64, device=device)
        self.inner = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.features = torch.full((count, 0), -1, dtype=torch.int64, device=device)
        self.signs = torch.ones(count, 0, dtype=torch.float64, device=device)
        self.weights = torch.zeros(count, 0, dtype=torch.float64, device=device)

    def slopes(self, half: Tensor, moving: Tensor) -> Tensor:
        """Half the gradient along each working feature of these classes; 0 where padded."""
        held = self.features[moving]
        return half.gather(1, held.clamp_min(0)) * (held >= 0)

    def turn(self, half: Tensor, moving: Tensor) -> None:
        """Give working features at zero the sign in which they descend."""
        slopes = self.slopes(half, moving)
        falling = 1.0 - 2.0 * (slopes > 0).double()
        self.signs[moving] = torch.where(self.weights[moving] == 0, falling, self.signs[moving])

    def add(self, fresh: Tensor, moving: Tensor, signs: Tensor) -> None:
        """Take in features (-1 for none) of the moving classes."""
        new = torch.unique(fresh[fresh >= 0])
        new = new[self.position[new] < 0]
        if len(new):
            rows = self.source.enter(new)
            known, total = len(self.inner), len(self.inner) + len(new)
            grown = torch.empty(total, total, dtype=torch.float64, device=rows.device)
            grown[:known, :known] = self.inner
            grown[known:] = rows
            grown[:known, known:] = rows[:, :known].T
            self.inner = grown
            self.position[new] = torch.arange(known, total, device=rows.device)
        if self.features.shape[1] > _WIDE:
            self._narrow()
        shape = (len(self.group), fresh.shape[1])
        features = torch.full(shape, -1, dtype=torch.int64, device=fresh.device)
        start = torch.ones(shape, dtype=torch.float64, device=fresh.device)
        features[moving], start[moving] = fresh, signs
        self.features = torch.cat([self.features, features], dim=1)
        self.signs = torch.cat([self.signs, start], dim=1)
        self.weights = torch.cat([self.weights, torch.zeros_like(start)], dim=1)

    def _narrow(self) -> None:
        """Keep only the features with weight; others come back when they violate optimality again."""
        used = self.weights > 0
        order = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, : max(1, int(used.sum(1).max()))]
        self.features = self.features.where(used, torch.full_like(self.features, -1)).gather(1, order)
        self.signs, self.weights = self.signs.gather(1, order), self.weights.gather(1, order)

    def solve(self, moving: Tensor, mu: float, reach: Tensor, limit: int) -> tuple[Tensor, Tensor, int]:
        """Solve the small problems; return weights by taken-in feature and by feature, and the number of solves."""
        held = self.features[moving]
        place = self.position[held.clamp_min(0)].clamp_min(0)
        signs = self.signs[moving] * (held >= 0)
        small = _Small(
            products=self.inner[place[:, :, None], place[:, None, :]] * signs[:, :, None] * signs[:, None, :],
            target=self.source.cross[self.group[moving]].gather(1, held.clamp_min(0)) * signs,
            valid=held >= 0,
            weights=self.weights[moving],
            reach=reach,
            mu=mu,
        )
        steps = _solve_small(small, limit)
        total = small.weights.sum(1, keepdim=True)
        self.weights[moving] = weights = small.weights * (mu / total.clamp_min(mu))
        taken = torch.zeros(len(moving), len(self.inner), dtype=torch.float64, device=held.device)
        whole = torch.zeros(len(moving), len(self.position), dtype=torch.float64, device=held.device)
        return (
            taken.scatter_add(1, place, weights * signs),
            whole.scatter_add(1, held.clamp_min(0), weights * signs),
            steps,
        )


def solve_group(
    products: Products, group: Tensor, mu: float, nonnegative: bool, tolerance: float, limit: int
) -> _Outcome:
    """Solve some classes together: working sets, exact small problems, a look at all features, repeat."""
    device, features = products.cross.device, products.cross.shape[1]
    sets = _WorkingSets(products, group)
    root = products.energy.clamp_min(_TINY).rsqrt()
    energy = products.label_energy[group]
    objective, half = energy.clone(), -products.cross[group]
    weights = torch.zeros(len(group), features, dtype=torch.float64, device=device)
    gap, bound = torch.zeros_like(objective), torch.zeros_like(objective)
    sharper = torch.ones_like(objective)
    progress = _Progress(len(group), device)
    moving = torch.arange(len(group), device=device)
    iterations = 0
    while True:
        descent = -half if nonnegative else half.abs()
        gap[moving] = 2 * ((half * weights[moving]).sum(1) + mu * descent.amax(1).clamp_min(0.0))
        reach = tolerance * torch.maximum(objective[moving], OBJECTIVE_FLOOR * energy[moving])
        progress.note(moving, objective[moving], gap[moving])
        going = (gap[moving] > reach) & (progress.fruitless[moving] < _STALLED_ROUNDS)
        moving, half, descent, reach = moving[going], half[going], descent[going], reach[going]
        if not len(moving) or iterations >= limit:
            break
        held = sets.features[moving]
        if held.shape[1]:
            inside = torch.zeros(len(held), features + 1, dtype=torch.bool, device=device)  # padding goes to the last
            inside.scatter_(1, held.where(held >= 0, torch.full_like(held, features)), value=True)
            descent = descent.masked_fill(inside[:, :features], -math.inf)
            if not nonnegative:
                sets.turn(half, moving)
        excess = descent - bound[moving, None]
        wanted = excess > 0.25 * 0.5 * reach[:, None] / mu
        used = int((sets.weights[moving] > 0).sum(1).max()) if held.shape[1] else 0
        count = min(max(ENTER, used // 2), features)
        picked = []
        for rank in (excess * root, excess):  # by what a feature alone could gain, and by what the gap counts
            top = torch.where(wanted, rank, -math.inf).topk(count, dim=1)
            picked.append(torch.where(top.values > -math.inf, top.indices, -1))
        fresh = _distinct(torch.cat(picked, dim=1))
        # Where no feature outside is wanted, the small problem must be solved more exactly.
        sharper[moving] *= 1.0 - 0.9 * (fresh < 0).all(1).double()
        sets.add(fresh, moving, 1.0 - 2.0 * ((half.gather(1, fresh.clamp_min(0)) > 0) & (not nonnegative)).double())
        taken, weights[moving], steps = sets.solve(moving, mu, 0.05 * sharper[moving] * reach, limit - iterations)
        iterations += steps
        half, objective[moving] = products.slope(taken, group[moving])
        falling = -sets.slopes(half, moving) * sets.signs[moving]
        bound[moving] = torch.where(sets.weights[moving] > 0, falling, -math.inf).amax(1).clamp_min(0.0)
    final = tolerance * torch.maximum(objective, OBJECTIVE_FLOOR * energy)
    return _Outcome(weights, objective, gap, gap <= final, iterations)


def _distinct(picked: Tensor) -> Tensor:
    """Drop repeats within each row (set to -1) and columns that hold nothing."""
    ordered = picked.sort(dim=1, descending=True).values
    repeated = torch.zeros_like(ordered, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    clean = ordered.masked_fill(repeated, -1).sort(dim=1, descending=True).values
    return clean[:, : int((clean >= 0).sum(1).max())]
