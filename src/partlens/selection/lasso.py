"""The μ-lasso: for each class the few features whose weighted sum best tells the class, with a certificate.

With responses ``A`` (image, feature), labels ``l_j`` (image) of class ``j`` and a bound ``μ``:

    w_j = argmin_w ||A w - l_j||²   subject to   ||w||_1 <= μ   (and w >= 0 unless ``nonnegative=False``)

There is no bias, no centring and no scaling of features. In the paper's letters ``A = Xᵀ``, ``labels = Lᵀ`` and the
``w_j`` are the columns of ``W``.

**Certificate.** The problem is convex, so at any point ``w`` of the feasible set ``S``, with the gradient
``g = 2 Aᵀ(A w - l)``, the Frank-Wolfe gap

    gap(w) = max_{s in S} <g, w - s> = <g, w> + μ max(0, max_k -g_k)     (with |g_k| for -g_k where w may be negative)

bounds how far the objective at ``w`` is above the optimum. (It equals the duality gap with the residual as dual point.)
It is evaluated at the point that is returned, over all features, in float64.

**Algorithm.** Each class keeps a working set of features. On it, an exact active-set method solves the small problem
(normal equations of the free features, a multiplier for ``||w||_1 = μ``, steps cut at the first feature that reaches
zero); all classes take each step together as one batched Cholesky solve. Then one pass over all features gives the gap,
and the features that violate optimality most enter the working sets. A signed problem is the same one with a sign per
working feature. Exactly dependent features (copies; layer blocks that sum to the same constant) make the normal
equations singular; a proximal term of 1e-11 of each feature's energy around the current point decides between equally
good solutions, always in the same way, and leaves the optimum where it is.

Two ways to the same numbers: from the responses, where only the working features' inner products are ever formed
(``m`` features, ``C`` classes, ``N`` images: about ``4 N m C`` operations a round, 4 to 10 rounds), or from the Gram
matrix ``AᵀA`` (``N m²`` operations once, then the images are no longer needed), which suits data that are streamed.

Source: Oramas, Wang & Tuytelaars, ICLR 2019 (arXiv 1712.06302), the μ-lasso of their section on relevant features. The
constraint form is that of the solvers they name (SPGL1's ``tau``, mode 0 of SPAMS). Their released demo divides by
``sum(w)`` and keeps positive products, which makes sense for ``w >= 0`` only, and their group's later code asks for it:
non-negative weights are our default, for that reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.vocabulary import InputError, InputTypeError, PartlensError, expected, listed

Array = Tensor | npt.NDArray[Any]
Method = Literal["auto", "responses", "gram"]
OnFailure = Literal["raise", "return"]

OBJECTIVE_FLOOR = 1e-3
"""Share of ``||l_j||²`` below which an objective counts as this share in the relative gap (an exact fit has 0)."""

_PROXIMAL = 1e-11  # of each feature's own energy; far below what matters, far above rounding
_ROW_BLOCK = 2048  # images converted to float64 at a time
_TILE = 1024  # features of one tile of the Gram matrix
_KEPT_BYTES = 2 << 30  # responses up to this size are kept in float64
_GATHER_BYTES = 256 << 20  # inner products of the working sets of one group of classes
_ENTER = 32  # features that enter a working set per round
_ENTER_SMALL = 8  # features that become free at once inside a working set
_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the way to the free optimum that are tried, clipped at zero
_STALLED_STEPS = 10  # fruitless tries on a working set before rounding is what is left
_STALLED_ROUNDS = 3  # the same for looks at all features
_WIDE = 512  # working features above which those without weight are let go
_TINY = torch.finfo(torch.float64).tiny


class NotConvergedError(PartlensError, ArithmeticError):
    """The μ-lasso stopped before its gap was small enough; ``solution`` holds where it stood."""

    def __init__(self, message: str, solution: LassoSolution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True)
class LassoSolution:
    """Weights of all classes and the proof of how good they are. Tensors are on the CPU.

    Args:
        weights: ``W``; a column per class, exactly 0 where a feature is not relevant.
        mu: the bound ``μ``.
        nonnegative: whether weights had to be at least 0.
        objective: ``||A w_j - l_j||²``.
        gap: upper bound on ``objective - optimum``, at least 0 up to rounding (see the module's text).
        relative_gap: ``gap / max(objective, OBJECTIVE_FLOOR · ||l_j||²)``; 0 for a class without images.
        norm: ``||w_j||_1``, at most ``μ (1 + 1e-6)``.
        nonzeros: number of weights that are not 0.
        iterations: batched linear solves.
        converged: whether ``relative_gap`` is at most the tolerance.
        constraint_active: whether ``||w_j||_1`` reaches ``μ`` (to 1e-9); where not, the solution is that of
            (non-negative) least squares and a larger ``μ`` changes nothing.
    """

    weights: Float[Tensor, "feature class"]
    mu: float
    nonnegative: bool
    objective: Float[Tensor, " class"]
    gap: Float[Tensor, " class"]
    relative_gap: Float[Tensor, " class"]
    norm: Float[Tensor, " class"]
    nonzeros: Int[Tensor, " class"]
    iterations: int
    converged: Bool[Tensor, " class"]
    constraint_active: Bool[Tensor, " class"]


# Checks


def _kind(value: object, name: str) -> None:
    if not isinstance(value, (Tensor, np.ndarray)):
        raise InputTypeError(
            expected(f"{name} as a NumPy array or a torch tensor", type(value).__name__, "Convert it, as np.asarray")
        )
    if value.dtype in {torch.complex64, torch.complex128} or (
        isinstance(value, np.ndarray) and value.dtype.kind not in "fiub"
    ):
        raise InputTypeError(expected(f"real numbers in {name}", str(value.dtype), "Convert them to float"))


def _double(value: Array, device: torch.device) -> Tensor:
    """Give float64 on the device; a copy only where the kind changes or the array cannot be written."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64)
    ready = np.asarray(value, dtype=np.float64)
    if not ready.flags.writeable or any(stride < 0 for stride in ready.strides):
        ready = ready.copy()
    return torch.from_numpy(ready).to(device)


def _matrix(value: Array, name: str, axes: str) -> None:
    _kind(value, name)
    if value.ndim != 2:
        raise InputError(expected(f"{name} with axes {axes}", f"shape {tuple(value.shape)}", "Add or drop an axis"))
    if 0 in value.shape:
        raise InputError(
            expected(f"at least one entry on each axis of {name} ({axes})", f"shape {tuple(value.shape)}", "Add data")
        )


def _first_bad(value: Array, first: int = 0) -> tuple[int, int] | None:
    """Find the first entry (row, column) that is not finite; rows are looked at in blocks."""
    for start in range(0, value.shape[0], _ROW_BLOCK):
        bad = ~torch.isfinite(_double(value[start : start + _ROW_BLOCK], torch.device("cpu")))
        if bool(bad.any()):
            row, col = (int(v) for v in bad.nonzero()[0])
            return first + start + row, col
    return None


def _refuse_bad(value: Array, name: str, axes: tuple[str, str], first: int = 0) -> None:
    place = _first_bad(value, first)
    if place is None:
        got, remedy = "values so large that their squares overflow", "Scale them down"
    else:
        number = value[place[0] - first, place[1]]
        got, remedy = f"{float(number)} at {axes[0]} {place[0]}, {axes[1]} {place[1]}", "Correct or drop it"
    raise InputError(expected(f"finite values in {name}", got, remedy))


def _check_options(mu: object, tolerance: float, max_iterations: int, on_failure: str) -> float:
    if isinstance(mu, bool) or not isinstance(mu, (int, float, np.integer, np.floating)):
        raise InputTypeError(expected("mu as a number", type(mu).__name__, "Give one bound for all classes"))
    if not (math.isfinite(mu) and mu > 0):
        raise InputError(expected("a finite mu above 0", float(mu), "The paper's value is 10"))
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise InputError(expected("a finite tolerance above 0", tolerance, "Leave it out for 1e-6"))
    if max_iterations < 1:
        raise InputError(expected("max_iterations of at least 1", max_iterations, "Leave it out"))
    if on_failure not in {"raise", "return"}:
        raise InputError(expected("on_failure raise or return", on_failure, "Leave it out to get an error"))
    return float(mu)


# Where inner products come from


@runtime_checkable
class _Products(Protocol):
    """Inner products of features, for a solver that looks at few of them.

    ``cross[j, k] = <a_k, l_j>`` and ``energy[k] = ||a_k||²``.
    """

    cross: Tensor
    energy: Tensor
    label_energy: Tensor

    def enter(self, features: Tensor) -> Tensor:
        """Take in features; return their inner products with all taken in so far, new ones last."""
        ...

    def forget(self) -> None:
        """Forget the features taken in."""
        ...

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Half the gradient ``Aᵀ(A w - l)`` ``[class, feature]`` and the objective ``[class]``.

        ``weights[class, taken]`` belong to the features in the order in which they were taken in.
        """
        ...


class _FromGram:
    """Inner products read from the Gram matrix."""

    def __init__(self, gram: Tensor, cross: Tensor, label_energy: Tensor) -> None:
        self.gram = gram
        self.cross = cross.T.contiguous()
        self.energy = gram.diagonal()
        self.label_energy = label_energy
        self.forget()

    def forget(self) -> None:
        self.features = torch.zeros(0, dtype=torch.int64, device=self.gram.device)
        self.rows: list[Tensor] = []

    def enter(self, features: Tensor) -> Tensor:
        self.features = torch.cat([self.features, features])
        rows = self.gram.index_select(0, features)
        self.rows.append(rows)
        return rows.index_select(1, self.features)

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        half = -self.cross[classes]
        start = 0
        for rows in self.rows:
            half.addmm_(weights[:, start : start + len(rows)], rows)
            start += len(rows)
        # w'Gw - 2b'w + |l|² = w'(Gw - b) - b'w + |l|²
        at = half[:, self.features] - self.cross[classes][:, self.features]
        return half, (weights * at).sum(1) + self.label_energy[classes]


class _FromResponses:
    """Inner products computed from the responses, only where they are asked for."""

    def __init__(self, responses: Array, labels: Tensor, device: torch.device) -> None:
        images, features = responses.shape
        self.labels = labels.T.contiguous()
        self.label_energy = self.labels.square().sum(1)
        self.device = device
        keep = images * features * 8 <= _KEPT_BYTES
        self.kept: Tensor | None = None
        self.source = responses
        self.cross = torch.zeros(len(self.labels), features, dtype=torch.float64, device=device)
        self.energy = torch.zeros(features, dtype=torch.float64, device=device)
        whole = (
            torch.empty(images, features, dtype=torch.float64, device=device)
            if keep and responses.dtype not in {torch.float64, np.dtype(np.float64)}
            else None
        )
        for start, block in self._blocks():
            if whole is not None:
                whole[start : start + len(block)] = block
            self.cross.addmm_(self.labels[:, start : start + len(block)], block)
            self.energy += block.square().sum(0)
        if not bool(torch.isfinite(self.energy).all()):
            _refuse_bad(responses, "responses", ("image", "feature"))
        if keep:
            self.kept = whole if whole is not None else _double(responses, device)
        self.forget()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        if self.kept is not None:
            yield 0, self.kept
            return
        for start in range(0, self.source.shape[0], _ROW_BLOCK):
            yield start, _double(self.source[start : start + _ROW_BLOCK], self.device)

    def forget(self) -> None:
        self.columns: list[Tensor] = []

    def enter(self, features: Tensor) -> Tensor:
        if self.kept is not None:
            taken = self.kept.index_select(1, features)
        elif isinstance(self.source, Tensor):
            taken = _double(self.source.index_select(1, features.to(self.source.device)), self.device)
        else:
            taken = torch.empty(self.source.shape[0], len(features), dtype=torch.float64, device=self.device)
            chosen = features.cpu().numpy()
            for start in range(0, len(taken), _ROW_BLOCK):
                block = np.asarray(self.source[start : start + _ROW_BLOCK])[:, chosen]
                taken[start : start + len(block)] = _double(block, self.device)
        self.columns.append(taken)
        return torch.cat([taken.T @ block for block in self.columns], dim=1)

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        rest = -self.labels[classes]
        start = 0
        for block in self.columns:
            rest.addmm_(weights[:, start : start + block.shape[1]], block.T)
            start += block.shape[1]
        half = torch.zeros(len(classes), self.cross.shape[1], dtype=torch.float64, device=self.device)
        for start, block in self._blocks():
            half.addmm_(rest[:, start : start + len(block)], block)
        return half, rest.square().sum(1)


class GramAccumulator:
    """Inner products of features and labels, summed batch by batch in float64.

    Only the upper triangle is updated, in tiles, so that a batch costs half a matrix product and no copy of the matrix;
    small batches are collected to blocks of rows first. Memory is ``8 m²`` bytes for ``m`` features (0.13 GB at 4,096,
    3 GB at 19,456) and does not depend on the number of images.

    Args:
        features: ``m``.
        classes: number of label columns.
        device: where to keep and compute.

    Raises:
        InputError: less than one feature or class.

    Example:
        >>> sums = GramAccumulator(2, 1)
        >>> sums.add(np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[1], [0]]))
        >>> sums.gram.tolist(), sums.cross.tolist(), sums.label_energy.tolist(), sums.images
        ([[1.0, 2.0], [2.0, 5.0]], [[1.0], [2.0]], [1.0], 2)
    """

    def __init__(self, features: int, classes: int, device: torch.device | str = "cpu") -> None:
        if features < 1 or classes < 1:
            raise InputError(
                expected("at least 1 feature and 1 class", f"{features} and {classes}", "Correct the counts")
            )
        self._device = torch.device(device)
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=self._device)
        self._cross = torch.zeros(features, classes, dtype=torch.float64, device=self._device)
        self._label_energy = torch.zeros(classes, dtype=torch.float64, device=self._device)
        self._waiting: list[Tensor] = []
        self._mirrored = True
        self._images = 0

    @property
    def images(self) -> int:
        """Number of images added."""
        return self._images

    @property
    def cross(self) -> Float[Tensor, "feature class"]:
        """``Aᵀ L``: the inner product of each feature with each class's labels."""
        return self._cross

    @property
    def label_energy(self) -> Float[Tensor, " class"]:
        """``||l_j||²``; for one-hot labels the number of images of the class."""
        return self._label_energy

    @property
    def gram(self) -> Float[Tensor, "feature feature"]:
        """``AᵀA``; the matrix itself, not a copy. It is complete until the next `add`."""
        self._flush()
        if not self._mirrored:
            size = len(self._gram)
            for start in range(0, size, _TILE):
                stop = min(start + _TILE, size)
                tile = self._gram[start:stop, start:stop]
                tile.copy_(tile.triu() + tile.triu(1).T)
                self._gram[stop:, start:stop] = self._gram[start:stop, stop:].T
            self._mirrored = True
        return self._gram

    def add(self, responses: Array, labels: Array) -> None:
        """Take in a batch.

        Args:
            responses: ``[image, feature]``, any real type.
            labels: ``[image, class]``, any real type.

        Raises:
            InputError: shapes that do not fit, or a value that is not finite (its image, counted over all batches, and
                feature are named); nothing of that batch is added.
            InputTypeError: neither an array nor a tensor.
        """
        _matrix(responses, "responses", "image, feature")
        _matrix(labels, "labels", "image, class")
        features, classes = self._cross.shape
        for name, value, wanted in (("responses", responses, features), ("labels", labels, classes)):
            if value.shape[1] != wanted:
                raise InputError(
                    expected(f"{wanted} columns in {name}", value.shape[1], "Keep the columns of the first batch")
                )
        _same_images(responses, labels)
        parts = []
        for start in range(0, len(responses), _ROW_BLOCK):
            # A copy always, because the rows wait here while the caller may reuse its buffer.
            block = _double(responses[start : start + _ROW_BLOCK], self._device).clone()
            target = _double(labels[start : start + _ROW_BLOCK], self._device)
            if not math.isfinite(float(block.abs().max())):
                _refuse_bad(responses, "responses", ("image", "feature"), self._images)
            if not math.isfinite(float(target.abs().max())):
                _refuse_bad(labels, "labels", ("image", "class"), self._images)
            parts.append((block, target))
        for block, target in parts:
            self._cross.addmm_(block.T, target)
            self._label_energy += target.square().sum(0)
            self._waiting.append(block)
            if sum(map(len, self._waiting)) >= _ROW_BLOCK // 2:
                self._flush()
        self._images += len(responses)

    def _flush(self) -> None:
        if not self._waiting:
            return
        block = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting = []
        self._mirrored = False
        for start in range(0, block.shape[1], _TILE):
            self._gram[start : start + _TILE, start:].addmm_(block[:, start : start + _TILE].T, block[:, start:])


def _same_images(responses: Array, labels: Array) -> None:
    if len(responses) != len(labels):
        raise InputError(
            expected(
                "as many rows of labels as of responses",
                f"{len(labels)} and {len(responses)}",
                "Give one row per image in both",
            )
        )


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
    check = rows  # classes that stand at the optimum of their free features
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

    def __init__(self, products: _Products, group: Tensor) -> None:
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


def _solve_group(
    products: _Products, group: Tensor, mu: float, nonnegative: bool, tolerance: float, limit: int
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
        count = min(max(_ENTER, used // 2), features)
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


def _solve(products: _Products, mu: float, nonnegative: bool, tolerance: float, limit: int) -> LassoSolution:
    """Solve group by group of classes and put the certificate together."""
    classes, features = products.cross.shape
    per_class = 8 * (8 * _ENTER) ** 2  # inner products of a working set after some rounds
    size = max(1, _GATHER_BYTES // per_class)
    weights = torch.zeros(features, classes, dtype=torch.float64)
    objective = torch.zeros(classes, dtype=torch.float64)
    gap, converged = torch.zeros_like(objective), torch.zeros(classes, dtype=torch.bool)
    iterations = 0
    for group in torch.arange(classes, device=products.cross.device).split(size):
        found = _solve_group(products, group, mu, nonnegative, tolerance, limit)
        here = group.cpu()
        weights[:, here] = found.weights.T.cpu()
        objective[here], gap[here] = found.objective.cpu(), found.gap.cpu()
        converged[here] = found.converged.cpu()
        iterations += found.iterations
    energy = products.label_energy.cpu()
    scale = torch.maximum(objective, OBJECTIVE_FLOOR * energy)
    norm = weights.abs().sum(0)
    return LassoSolution(
        weights=weights,
        mu=mu,
        nonnegative=nonnegative,
        objective=objective,
        gap=gap,
        relative_gap=torch.where(scale > 0, gap / scale, torch.zeros_like(gap)),
        norm=norm,
        nonzeros=(weights != 0).sum(0),
        iterations=iterations,
        converged=converged,
        constraint_active=norm >= mu * (1 - 1e-9),
    )


def _settled(solution: LassoSolution, tolerance: float, on_failure: str) -> LassoSolution:
    if on_failure == "return" or bool(solution.converged.all()):
        return solution
    open_ = (~solution.converged).nonzero()[:, 0].tolist()
    worst = max(open_, key=lambda j: float(solution.relative_gap[j]))
    raise NotConvergedError(
        expected(
            f"a relative gap of at most {tolerance:g} for every class",
            f"{float(solution.relative_gap[worst]):.3g} for class {worst} after {solution.iterations} iterations"
            f" ({len(open_)} of {len(solution.converged)} classes: {listed([str(j) for j in open_])})",
            "Raise max_iterations or tolerance, or take on_failure='return' and look at .converged",
        ),
        solution,
    )


def mu_lasso(
    responses: Array,
    labels: Array,
    mu: float | int = 10.0,  # noqa: PYI041 - the shape checks of the tests do not take an int for a float
    nonnegative: bool = True,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 20_000,
    on_failure: OnFailure = "raise",
    method: Method = "auto",
) -> LassoSolution:
    """Solve the μ-lasso for all classes: minimise ``||A w_j - l_j||²`` subject to ``||w_j||_1 <= μ``.

    Args:
        responses: ``A``, ``[image, feature]``, any real type, a memory map too (`relevance.descriptor`).
        labels: ``[image, class]``, any real type; one-hot in the papers, 1 for the images of the class. A column of
            zeros gives weights of zero.
        mu: ``μ``, above 0. The authors' demo: 10 for all data sets, 5 for an8Flower. Where `constraint_active` is
            false, every larger ``μ`` gives the same.
        nonnegative: whether weights must be at least 0 (our default; see the module's text).
        tolerance: largest relative gap (`LassoSolution.relative_gap`) that counts as solved.
        max_iterations: limit on the batched linear solves, per group of classes.
        on_failure: ``"raise"``, or ``"return"`` what was reached.
        method: ``"responses"`` never forms the Gram matrix, ``"gram"`` does, ``"auto"`` takes what needs fewer
            operations and at most some gigabytes.

    Returns:
        Weights and certificate. With exactly dependent features any optimum may come back, always the same for the
        same input; copies of a feature share its weight or one of them has it.

    Raises:
        InputError: shapes that do not fit, NaN or infinity (image and feature are named), ``mu`` not above 0.
        InputTypeError: neither arrays nor tensors.
        NotConvergedError: a class missed the tolerance, with the solution in ``.solution``.

    Example:
        >>> found = mu_lasso(np.eye(3), np.array([[1], [1], [0]]), mu=1.0)
        >>> found.weights[:, 0].tolist(), float(found.objective[0]), bool(found.constraint_active[0])
        ([0.5, 0.5, 0.0], 0.5, True)
    """
    mu = _check_options(mu, tolerance, max_iterations, on_failure)
    _matrix(responses, "responses", "image, feature")
    _matrix(labels, "labels", "image, class")
    _same_images(responses, labels)
    if method not in {"auto", "responses", "gram"}:
        raise InputError(expected("method auto, responses or gram", method, "Leave it out"))
    device = responses.device if isinstance(responses, Tensor) else torch.device("cpu")
    target = _double(labels, device)
    if not math.isfinite(float(target.square().sum())):
        _refuse_bad(labels, "labels", ("image", "class"))
    if method == "auto":
        method = _cheaper(responses.shape[0], responses.shape[1], target.shape[1])
    products: _Products
    if method == "gram":
        sums = GramAccumulator(responses.shape[1], target.shape[1], device)
        for start in range(0, len(responses), _ROW_BLOCK):
            sums.add(responses[start : start + _ROW_BLOCK], target[start : start + _ROW_BLOCK])
        products = _FromGram(sums.gram, sums.cross, sums.label_energy)
    else:
        products = _FromResponses(responses, target, device)
    return _settled(_solve(products, mu, nonnegative, tolerance, max_iterations), tolerance, on_failure)


def _cheaper(images: int, features: int, classes: int) -> Method:
    """Choose by operations, unless the responses or their working columns are too large to go over again and again."""
    rounds = 10
    direct = 4.0 * rounds * images * features * classes
    gram = 1.0 * images * features * features
    columns = 8.0 * images * min(features, _ENTER * classes)
    data = 8.0 * images * features
    large = max(columns, data) > 8 * _KEPT_BYTES and 8.0 * features * features < max(columns, data)
    return "gram" if gram < direct or large else "responses"


def mu_lasso_gram(
    gram: Array,
    cross: Array,
    label_energy: Array,
    mu: float | int = 10.0,  # noqa: PYI041 - the shape checks of the tests do not take an int for a float
    nonnegative: bool = True,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 20_000,
    on_failure: OnFailure = "raise",
) -> LassoSolution:
    """Solve the μ-lasso from inner products alone (`GramAccumulator`), as `mu_lasso` otherwise.

    Args:
        gram: ``AᵀA`` (``X Xᵀ`` in the paper's letters), ``[feature, feature]``, symmetric; read, not changed. Float64
            is used as it is.
        cross: ``AᵀL``, ``[feature, class]``.
        label_energy: ``||l_j||²``, ``[class]``.
        mu: as in `mu_lasso`.
        nonnegative: as in `mu_lasso`.
        tolerance: as in `mu_lasso`. Inner products lose about ``1e-16 ||l_j||²`` of the objective.
        max_iterations: as in `mu_lasso`.
        on_failure: as in `mu_lasso`.

    Returns:
        As `mu_lasso`.

    Raises:
        InputError: as `mu_lasso`; also a matrix that is not symmetric or has a negative diagonal.
        InputTypeError: neither arrays nor tensors.
        NotConvergedError: as `mu_lasso`.
    """
    mu = _check_options(mu, tolerance, max_iterations, on_failure)
    _matrix(gram, "gram", "feature, feature")
    _matrix(cross, "cross", "feature, class")
    _kind(label_energy, "label_energy")
    if gram.shape[0] != gram.shape[1]:
        raise InputError(expected("a square gram", f"shape {tuple(gram.shape)}", "Give AᵀA"))
    if cross.shape[0] != gram.shape[0]:
        raise InputError(
            expected(f"{gram.shape[0]} rows in cross, one per feature", cross.shape[0], "Give AᵀL of the same features")
        )
    if tuple(label_energy.shape) != (cross.shape[1],):
        raise InputError(
            expected(
                f"label_energy of shape {(cross.shape[1],)}", f"{tuple(label_energy.shape)}", "Give one value per class"
            )
        )
    device = gram.device if isinstance(gram, Tensor) else torch.device("cpu")
    ready, target, energy = _double(gram, device), _double(cross, device), _double(label_energy, device)
    for value, name, axes in (
        (ready, "gram", ("feature", "feature")),
        (target, "cross", ("feature", "class")),
        (energy[:, None], "label_energy", ("class", "column")),
    ):
        if not math.isfinite(float(value.sum())):
            _refuse_bad(value, name, axes)
    if float(ready.diagonal().min()) < 0 or float(energy.min()) < 0:
        raise InputError(expected("energies of at least 0", "a negative one", "Give sums of squares"))
    _refuse_asymmetric(ready)
    return _settled(
        _solve(_FromGram(ready, target, energy), mu, nonnegative, tolerance, max_iterations), tolerance, on_failure
    )


def _refuse_asymmetric(gram: Tensor) -> None:
    largest = float(gram.diagonal().max())
    for start in range(0, len(gram), _TILE):
        rows = gram[start : start + _TILE]
        apart = (rows - gram[:, start : start + _TILE].T).abs()
        if float(apart.max()) > 1e-6 * largest:
            row, col = divmod(int(apart.argmax()), len(gram))
            raise InputError(
                expected(
                    "a symmetric gram",
                    f"{float(rows[row, col]):g} at {start + row}, {col} and "
                    f"{float(gram[col, start + row]):g} at {col}, {start + row}",
                    "Give AᵀA",
                )
            )
