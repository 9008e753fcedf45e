"""How far an assignment of filters to parts can be trusted: does it come back, and does it predict what is lost?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.estimate import Estimate, bootstrap, percentile_interval
from partlens.object_parts.record import RemovalAgreement, Stability

_FEWEST_PHOTOS = 4
_MOST_SHUFFLES = 200
_SCORES = ("adjusted_rand", "kept", "null_adjusted_rand", "null_kept")


def _kept_share(first: Int[Tensor, " filter"], second: Int[Tensor, " filter"], *, matched: bool = True) -> float:
    """Return the share of filters with the same label in both assignments.

    Example:
        >>> _kept_share(torch.tensor([0, 0, 1, -1]), torch.tensor([1, 1, 0, 0]))
        0.75
    """
    if not matched:
        return float((first == second).double().mean())
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
) -> Stability:
    """Assign filters on one half of the photos and again on the other, and compare.

    In every round as many photos as there are are drawn with replacement and the different ones among them halved, all
    crops and repeats of a photo in one half; so the rounds' percentiles are a bootstrap interval, and the value is
    their mean. It is a little strict: each half holds about a third of the different photos. Labels of the two halves
    are ``matched`` first where they are groups without names. Undefined for fewer than four photos.
    """
    names = photos.unique()
    count = len(names)
    if count < _FEWEST_PHOTOS:
        return Stability(**dict.fromkeys(_SCORES, Estimate.undefined()))
    found: list[tuple[float, ...]] = []
    rows_of = [(photos == name).nonzero()[:, 0] for name in names]
    while len(found) < rounds:
        drawn, halves = _halves(count, generator)
        if len(halves[0]) == 0:  # a single photo was drawn, again and again
            continue
        first, second = (assign(torch.cat([rows_of[p] for p in drawn if p in half])) for half in halves)
        shuffled = second[torch.randperm(len(second), generator=generator)]
        found.append((*_likeness(first, second, matched), *_likeness(first, shuffled, matched)))
    return Stability(
        **{name: _over_rounds(values, count) for name, values in zip(_SCORES, zip(*found, strict=True), strict=True)}
    )


def _likeness(first: Tensor, second: Tensor, matched: bool) -> tuple[float, float]:
    """Return the adjusted Rand index of two assignments and the share of filters that keep their part."""
    return float(adjusted_rand_score(first, second)), _kept_share(first, second, matched=matched)


def _halves(count: int, generator: torch.Generator) -> tuple[list[int], tuple[set[int], set[int]]]:
    """Draw photos with replacement and halve the different ones among them."""
    drawn = torch.randint(count, (count,), generator=generator)
    different = drawn.unique()
    order = different[torch.randperm(len(different), generator=generator)].tolist()
    return drawn.tolist(), (set(order[: len(order) // 2]), set(order[len(order) // 2 :]))


def _over_rounds(values: Sequence[float], count: int) -> Estimate:
    drawn = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(drawn.mean()), percentile_interval(values), count)


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

    Intervals range over photos. NaN where nothing varies, as for a single part on one photo.

    Raises:
        InputError: tables of different shapes, or without a photo.
    """
    if predicted.shape != measured.shape or not predicted.shape[0]:
        got = f"{tuple(predicted.shape)} and {tuple(measured.shape)}"
        raise InputError(expected("two tables (image, part) of one shape", got, "Measure both on the same photos"))
    x, y = predicted.double(), measured.double()

    def over_photos(which: int) -> Estimate:
        statistic = lambda i: _line(x[i], y[i])[which]  # noqa: E731
        return bootstrap(statistic, len(x), generator=generator, rounds=rounds, groups=photos)

    correlation, slope = over_photos(0), over_photos(1)
    orders = (torch.rand(x.shape, generator=generator).argsort(1) for _ in range(min(rounds, _MOST_SHUFFLES)))
    finite = [r for r in (_line(x.gather(1, order), y)[0] for order in orders) if math.isfinite(r)]
    null = _over_rounds(finite, correlation.n) if finite else Estimate.undefined()
    return RemovalAgreement(correlation=correlation, slope=slope, null_correlation=null)
