"""How far an assignment of filters to parts can be trusted: does it come back, and does it foretell what is lost?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.estimate import Estimate, bootstrap

_FEWEST_PHOTOS = 4


@dataclass(frozen=True)
class AssignmentStability:
    """How far two halves of the photos give the same assignment.

    Attributes:
        adjusted_rand: adjusted Rand index (Hubert & Arabie 1985): 1 for the same groups, about 0 for unrelated ones.
        kept: share of filters that keep their part; groups are matched so that as many as possible do.
        null_adjusted_rand: the index when one half's labels are dealt to the filters at random.
        null_kept: the share then.
    """

    adjusted_rand: Estimate
    kept: Estimate
    null_adjusted_rand: Estimate
    null_kept: Estimate

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {name: getattr(self, name).to_dict() for name in self.__dataclass_fields__}


def kept_share(first: Int[Tensor, " filter"], second: Int[Tensor, " filter"], *, matched: bool = True) -> float:
    """Return the share of filters with the same label in both assignments.

    Args:
        first: labels.
        second: labels.
        matched: the names of groups mean nothing: match them so that as many filters as possible agree; the label -1
            ("other") only means itself.

    Example:
        >>> kept_share(torch.tensor([0, 0, 1, -1]), torch.tensor([1, 1, 0, 0]))
        0.75
    """
    if not matched:
        return float((first == second).double().mean())
    from scipy.optimize import linear_sum_assignment

    names = [labels[labels >= 0].unique() for labels in (first, second)]
    both_other = int(((first < 0) & (second < 0)).sum())
    if not all(len(n) for n in names):
        return both_other / len(first)
    table = ((first == names[0][:, None]).double() @ (second == names[1][:, None]).double().T).numpy()
    rows, cols = linear_sum_assignment(table, maximize=True)
    return (float(table[rows, cols].sum()) + both_other) / len(first)


def assignment_stability(
    assign: Callable[[Tensor], Tensor],
    photos: Int[Tensor, " image"],
    *,
    generator: torch.Generator,
    rounds: int = 50,
    matched: bool = True,
) -> AssignmentStability:
    """Assign filters on one half of the photos and again on the other, and compare.

    In every round as many photos as there are are drawn with replacement and the different ones among them halved, all
    crops and repeats of a photo in one half; so the rounds' percentiles are a bootstrap interval, and the value is
    their mean. It is a little strict: each half holds about a third of the different photos.

    Args:
        assign: gets rows of images, repeats allowed, and returns a label per filter (-1 for "other").
        photos: an integer per image, equal for crops of one photo.
        generator: draws.
        rounds: halvings.
        matched: labels of the two halves have to be matched first (groups without names).

    Returns:
        The scores over the number of photos; undefined for fewer than four photos.
    """
    from sklearn.metrics import adjusted_rand_score

    names = photos.unique()
    count = len(names)
    if count < _FEWEST_PHOTOS:
        return AssignmentStability(*[Estimate.undefined() for _ in range(4)])
    found: dict[str, list[float]] = {"rand": [], "kept": [], "null_rand": [], "null_kept": []}
    rows_of = [(photos == name).nonzero()[:, 0] for name in names]
    while len(found["rand"]) < rounds:
        drawn = torch.randint(count, (count,), generator=generator)
        different = drawn.unique()
        order = different[torch.randperm(len(different), generator=generator)]
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        if not all(map(len, halves)):
            continue
        first, second = (
            assign(torch.cat([rows_of[p] for p in drawn.tolist() if bool((half == p).any())])) for half in halves
        )
        dealt = second[torch.randperm(len(second), generator=generator)]
        for rand, kept, labels in (("rand", "kept", second), ("null_rand", "null_kept", dealt)):
            found[rand].append(float(adjusted_rand_score(first.numpy(), labels.numpy())))
            found[kept].append(kept_share(first, labels, matched=matched))
    return AssignmentStability(*[_over_rounds(found[k], count) for k in ("rand", "kept", "null_rand", "null_kept")])


def _over_rounds(values: list[float], count: int) -> Estimate:
    drawn = torch.tensor(values, dtype=torch.float64)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(drawn.mean()), (low, high), count)


@dataclass(frozen=True)
class RemovalAgreement:
    """How well contributions foretell what is lost when parts are taken away.

    Attributes:
        correlation: Pearson correlation of predicted and measured loss over photos and parts.
        slope: least squares slope of the measured on the predicted loss; 1 where the size is right too.
        null_correlation: correlation when the parts of each photo change places at random: mean and 95 % range.
        pairs: photos times parts.
    """

    correlation: Estimate
    slope: Estimate
    null_correlation: Estimate
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        values = {name: getattr(self, name).to_dict() for name in ("correlation", "slope", "null_correlation")}
        return values | {"pairs": self.pairs}


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return correlation and slope; NaN where one side does not vary."""
    x, y = x.flatten() - x.mean(), y.flatten() - y.mean()
    sxx, syy, sxy = (float((a * b).sum()) for a, b in ((x, x), (y, y), (x, y)))
    if sxx <= 0 or syy <= 0:
        return math.nan, math.nan
    return sxy / math.sqrt(sxx * syy), sxy / sxx


def removal_agreement(
    predicted: Float[Tensor, "image part"],
    measured: Float[Tensor, "photo player"],
    *,
    photos: Int[Tensor, " image"] | None = None,
    generator: torch.Generator,
    rounds: int = 1000,
) -> RemovalAgreement:
    """Compare the contribution of each part with the fall of the score when the part alone is taken away.

    Args:
        predicted: what an additive measure says is lost, per photo and part.
        measured: what is lost.
        photos: an integer per image, equal for crops of one photo, which are drawn together.
        generator: draws of the bootstrap over photos and of the null.
        rounds: bootstrap rounds, and random deals of the null.

    Returns:
        The scores; their intervals range over photos. NaN where nothing varies, as for a single part on one photo.

    Raises:
        InputError: tables of different shapes, or without a photo.
    """
    if predicted.shape != measured.shape or not predicted.shape[0]:
        got = f"{tuple(predicted.shape)} and {tuple(measured.shape)}"
        raise InputError(expected("two tables (image, part) of one shape", got, "Measure both on the same photos"))
    x, y = predicted.double(), measured.double()
    correlation, slope = (
        bootstrap(
            lambda i, which=which: _line(x[i], y[i])[which],  # type: ignore[misc]
            len(x),
            generator=generator,
            rounds=rounds,
            groups=photos,
        )
        for which in (0, 1)
    )
    deals = [
        _line(x.gather(1, torch.rand(x.shape, generator=generator).argsort(1)), y)[0] for _ in range(min(rounds, 200))
    ]
    finite = [d for d in deals if math.isfinite(d)]
    return RemovalAgreement(
        correlation, slope, _over_rounds(finite, correlation.n) if finite else Estimate.undefined(), x.numel()
    )
