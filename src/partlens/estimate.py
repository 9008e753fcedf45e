"""A number as it is shown: value, interval and how many things it was measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from partlens.errors import InputError, expected

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float, Int
    from torch import Tensor


def _undefined(value: object) -> object:
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_undefined)]
"""A number in a record; ``nan``, where it is undefined, is ``null`` in the file."""


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval.

    Attributes:
        value: the measurement; ``nan`` where it is undefined.
        interval: lower and upper end of the stated interval (95 % unless said otherwise); ``nan`` where undefined.
        n: the number of units the interval ranges over; 0 where nothing was measured.
        unit: what ``n`` counts: ``"photos"``, ``"filters"``, ``"seeds"``.
    """

    value: Number
    interval: tuple[Number, Number]
    n: int
    unit: str = "photos"

    @property
    def defined(self) -> bool:
        """Whether there is a value."""
        return math.isfinite(self.value)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are defined."""
        return all(map(math.isfinite, self.interval))

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.interval[1]

    def scaled(self, factor: float) -> Estimate:
        """Return the same in another unit, e.g. in percent.

        Example:
            >>> Estimate(0.5, (0.25, 0.75), 4).scaled(100).interval
            (25.0, 75.0)
        """
        return Estimate(factor * self.value, (factor * self.low, factor * self.high), self.n, self.unit)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form ``{value, interval, n, unit}``; undefined numbers become ``None``."""
        clean = [None if not math.isfinite(v) else float(v) for v in (self.value, *self.interval)]
        return {"value": clean[0], "interval": clean[1:], "n": self.n, "unit": self.unit}

    @staticmethod
    def undefined(unit: str = "photos") -> Estimate:
        """Return a value that could not be measured."""
        return Estimate(math.nan, (math.nan, math.nan), 0, unit)


def bootstrap(
    statistic: Callable[[Tensor], float],
    count: int,
    *,
    generator: torch.Generator,
    rounds: int = 100,
    unit: str = "photos",
    groups: Int[Tensor, " image"] | None = None,
) -> Estimate:
    """Estimate a statistic of a set of photos with a percentile bootstrap over the photos.

    Args:
        statistic: gets row indices (with repeats) and returns the value; called ``rounds + 1`` times.
        count: number of rows.
        generator: source of the draws.
        rounds: bootstrap rounds; the interval's ends move by about ``1/sqrt(rounds)`` of its width.
        unit: what ``count`` counts.
        groups: an integer per row, equal for crops of one photo: a photo is drawn with all its crops, since these are
            not independent, and ``n`` counts photos. By default every row on its own.

    Returns:
        The value on all photos and the percentile interval; rounds where the statistic is ``nan`` are excluded.

    Raises:
        InputError: no photos, or not a group for every row.
    """
    import torch

    if count < 1:
        raise InputError(expected("at least 1 photo to measure on", count, "Add held-out photos"))
    value = statistic(torch.arange(count))
    draw, units = resampler(count, groups)
    draws = [statistic(draw(generator)) for _ in range(rounds)]
    return Estimate(value, percentile_interval(draws), units, unit)


def resampler(
    count: int, groups: Int[Tensor, " image"] | None = None
) -> tuple[Callable[[torch.Generator], Int[Tensor, " row"]], int]:
    """Return a function that draws rows with replacement, group by group, and the number of groups.

    As many groups as there are are drawn, each with all its rows. Groups count in the order of their first rows, so
    that groups of one row each draw the same rows as no groups do.

    Example:
        >>> import torch
        >>> draw, units = resampler(4, torch.tensor([7, 7, 7, 2]))
        >>> sorted(draw(torch.Generator().manual_seed(1)).tolist()), units
        ([3, 3], 2)
    """
    import torch

    if groups is None:
        return lambda generator: torch.randint(count, (count,), generator=generator), count
    if len(groups) != count:
        raise InputError(expected(f"a group for each of {count} rows", len(groups), "Number the photos of all rows"))
    inverse = groups.unique(return_inverse=True)[1]
    sizes = inverse.bincount()
    units = len(sizes)
    by_group = inverse.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    order = by_group[starts].argsort()  # groups by their first rows

    def draw(generator: torch.Generator) -> Int[Tensor, " row"]:
        drawn = order[torch.randint(units, (units,), generator=generator)]
        length = sizes[drawn]
        first = torch.repeat_interleave(starts[drawn] - (length.cumsum(0) - length), length)
        rows: Tensor = by_group[first + torch.arange(len(first))]
        return rows

    return draw, units


def percentile_interval(draws: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the ends between which a share of the finite draws lies; NaN where no draw is finite.

    Example:
        >>> percentile_interval([0.0, 1.0, 2.0, float("nan")], 0.5)
        (0.5, 1.5)
    """
    import torch

    finite = torch.tensor([d for d in draws if math.isfinite(d)], dtype=torch.float64)
    if not finite.numel():
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = torch.quantile(finite, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's score interval (95 %) of a share of ``n`` things.

    Example:
        >>> [round(end, 3) for end in wilson_interval(0.75, 4)]
        [0.301, 0.954]
    """
    z = 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def proportion(successes: Float[Tensor, " image"], *, groups: Int[Tensor, " image"] | None = None) -> Estimate:
    """Return the mean of zeros and ones with Wilson's score interval (95 %).

    Args:
        successes: a 0 or 1 per row.
        groups: an integer per row, equal for crops of one photo. The interval is then as wide as if crops of one photo
            always had the same result: Wilson's for Kish's effective number ``(sum c)² / sum c²`` of photos with ``c``
            crops each, which errs on the wide side. ``n`` counts photos.

    Example:
        >>> import torch
        >>> e = proportion(torch.tensor([1.0, 1.0, 1.0, 0.0]))
        >>> e.value, round(e.interval[0], 3), round(e.interval[1], 3)
        (0.75, 0.301, 0.954)
    """
    import torch

    if successes.numel() == 0:
        return Estimate.undefined()
    if groups is not None and len(groups) != len(successes):
        got = f"{len(groups)} for {len(successes)}"
        raise InputError(expected("a group for every row", got, "Number the photos of all rows"))
    crops = torch.ones(len(successes)) if groups is None else groups.unique(return_counts=True)[1].double()
    n = float(crops.sum() ** 2 / crops.square().sum())
    share = float(successes.double().mean())
    return Estimate(share, wilson_interval(share, n), len(crops))
