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

The algorithm is told in :mod:`partlens.selection.working_sets`, the two ways to the inner products it needs in
:mod:`partlens.selection.inner_products`.

Source: Oramas, Wang & Tuytelaars, ICLR 2019 (arXiv 1712.06302), the μ-lasso of their section on relevant features. The
constraint form is that of the solvers they name (SPGL1's ``tau``, mode 0 of SPAMS). Their released demo divides by
``sum(w)`` and keeps positive products, which makes sense for ``w >= 0`` only, and their group's later code asks for it:
non-negative weights are our default, for that reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from partlens.errors import InputError, PartlensError, checked, expected, listed, usual_modes
from partlens.selection.inner_products import (
    GRAM_BYTES,
    Array,
    FromGram,
    FromResponses,
    Products,
    check_energy,
    check_matrix,
    to_double,
)
from partlens.selection.working_sets import ENTER, OBJECTIVE_FLOOR, solve_group

Method = Literal["auto", "responses", "gram"]
OnFailure = Literal["raise", "return"]
_MAX_ITERATIONS = 20_000  # batched linear solves per group of classes; some tens are usual
_LARGE_BYTES = 16 << 30
_GATHER_BYTES = 256 << 20  # inner products of the working sets of one group of classes


class NotConvergedError(PartlensError, ArithmeticError):
    """The μ-lasso stopped before its gap was small enough; ``solution`` holds its last point."""

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
        iterations: batched linear solves.
        converged: whether ``relative_gap`` is at most the tolerance.
    """

    weights: Float[Tensor, "feature class"]
    mu: float
    nonnegative: bool
    objective: Float[Tensor, " class"]
    gap: Float[Tensor, " class"]
    relative_gap: Float[Tensor, " class"]
    norm: Float[Tensor, " class"]
    iterations: int
    converged: Bool[Tensor, " class"]

    @property
    def constraint_active(self) -> Bool[Tensor, " class"]:
        """Whether ``||w_j||_1`` reaches ``μ`` (to 1e-9).

        Where not, the solution is that of (non-negative) least squares and a larger ``μ`` changes nothing.
        """
        return self.norm >= self.mu * (1 - 1e-9)


def _check_options(mu: Any, tolerance: Any) -> float:
    if not (math.isfinite(mu) and mu > 0):
        raise InputError(expected("a finite mu above 0", float(mu), "The paper's value is 10"))
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise InputError(expected("a finite tolerance above 0", tolerance, "The default is 1e-6"))
    return float(mu)


def _solve(products: Products, mu: float, nonnegative: bool, tolerance: float) -> LassoSolution:
    """Solve group by group of classes and put the certificate together."""
    classes, features = products.cross.shape
    per_class = 8 * (8 * ENTER) ** 2  # inner products of a working set after some rounds
    size = max(1, _GATHER_BYTES // per_class)
    weights = torch.zeros(features, classes, dtype=torch.float64)
    objective = torch.zeros(classes, dtype=torch.float64)
    gap, converged = torch.zeros_like(objective), torch.zeros(classes, dtype=torch.bool)
    iterations = 0
    for group in torch.arange(classes, device=products.cross.device).split(size):
        found = solve_group(products, group, mu, nonnegative, tolerance, _MAX_ITERATIONS)
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
        iterations=iterations,
        converged=converged,
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
            "Raise tolerance, or take on_failure='return' and look at .converged",
        ),
        solution,
    )


@usual_modes()
@checked
def mu_lasso(
    responses: Array,
    labels: Array,
    mu: float | int = 10.0,  # noqa: PYI041 - the shape checks of the tests do not take an int for a float
    nonnegative: bool = True,
    *,
    tolerance: float = 1e-6,
    on_failure: OnFailure = "raise",
    method: Method = "auto",
) -> LassoSolution:
    """Solve the μ-lasso for all classes: minimise ``||A w_j - l_j||²`` subject to ``||w_j||_1 <= μ``.

    Args:
        responses: ``A``, ``[image, feature]``, any real type; a memory map (`Responses.descriptor`) or some of its rows
            (`Rows`) are read in blocks.
        labels: ``[image, class]``, any real type; one-hot in the papers, 1 for the images of the class. A column of
            zeros gives weights of zero.
        mu: ``μ``, above 0. The authors' demo: 10 for all data sets, 5 for an8Flower. Where `constraint_active` is
            false, every larger ``μ`` gives the same.
        nonnegative: whether weights must be at least 0 (our default; see the module's text).
        tolerance: largest relative gap (`LassoSolution.relative_gap`) that counts as solved.
        on_failure: ``"raise"``, or ``"return"`` what was reached.
        method: ``"responses"`` never forms the Gram matrix, ``"gram"`` does, ``"auto"`` takes what needs fewer
            operations, a Gram matrix up to 1 GiB alone.

    Returns:
        Weights and certificate. With exactly dependent features any optimum may come back, always the same for the
        same input; copies of a feature share its weight or one of them has it.

    Raises:
        InputError: shapes that do not fit, NaN or infinity (image and feature are named), ``mu`` not above 0.
        InputTypeError: neither arrays nor tensors.
        NotConvergedError: a class missed the tolerance, with the solution in ``.solution``.

    Example:
        >>> import numpy as np
        >>> found = mu_lasso(np.eye(3), np.array([[1], [1], [0]]), mu=1.0)
        >>> found.weights[:, 0].tolist(), float(found.objective[0]), bool(found.constraint_active[0])
        ([0.5, 0.5, 0.0], 0.5, True)
    """
    mu = _check_options(mu, tolerance)
    check_matrix(responses, "responses", "image, feature")
    check_matrix(labels, "labels", "image, class")
    if len(responses) != len(labels):
        got, remedy = f"{len(labels)} and {len(responses)}", "Give one row per image in both"
        raise InputError(expected("as many rows of labels as of responses", got, remedy))
    device = responses.device if isinstance(responses, Tensor) else torch.device("cpu")
    target = to_double(labels, device)
    check_energy(target.square().sum(0), labels, "labels", "class")
    if method == "auto":
        method = _cheaper(responses.shape[0], responses.shape[1], target.shape[1])
    made = FromGram if method == "gram" else FromResponses
    products: Products = made(responses, target, device)
    return _settled(_solve(products, mu, nonnegative, tolerance), tolerance, on_failure)


def _cheaper(images: int, features: int, classes: int) -> Method:
    """Choose by operations, or one pass over responses too large to stay in memory; never a large Gram matrix."""
    rounds = 10
    direct, gram = 4.0 * rounds * images * features * classes, 1.0 * images * features * features
    wanted = gram < direct or 8 * images * features > _LARGE_BYTES
    return "gram" if wanted and 8 * features * features <= GRAM_BYTES else "responses"
