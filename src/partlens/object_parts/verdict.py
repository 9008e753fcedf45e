"""What the network knows a category by: its parts, texture or the whole, or something beside the object.

Every threshold comes from a null distribution. Let ``A(k)`` be the *advantage* of the windows at the parts over windows
of a kind ``k`` for comparison: the mean over areas from 0.1 to 0.4 of the difference of the median kept scores. Were it
all the same where windows stand, the two curves of a photo could be exchanged. So curves are exchanged photo by photo
at random, and an advantage counts where it is above the 95 % quantile of what comes out then. The rule, in this order:

- *undecided* where fewer than eight photos can be measured, or where the network's decisions say no more about being of
  the category than they say when the photos are shuffled: then whatever carries them is not of it;
- *elsewhere* where one window at the same place of all photos, chosen on other photos, keeps more than the windows at
  the parts, than random windows and than one in the centre: what stands still while objects move is no part of them;
  or, where masks or boxes say where the object is, where windows beside it keep more than windows on it;
- *parts* where the windows at the parts keep more than each kind for comparison: the same windows laid on other
  photos, random ones, one in the centre, and one at the best of nine places on the object; and where 30 % of the image
  at the parts keep more than the other 70 %. Where the object is not known, there must be parts in two places at least:
  what stands in one place alone may as well be the whole object;
- *texture*, or the whole, where one of these fails, although the photos are enough to tell the best single window of
  each photo from random ones;
- *undecided* where they are not enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.estimate import Estimate, bootstrap
from partlens.object_parts.inspection import Comparison
from partlens.object_parts.regions import AREAS, NULLS, grid_places

Kind = Literal["parts", "texture", "elsewhere", "undecided"]
Reason = Literal["", "few", "untold", "unsure", "fixed", "off_object", "one_place", "rest"]

LEAST_PHOTOS = 8
SAID_AREA = 0.3
_EXCHANGES = 1000
_LEVEL = 0.95
_ROUNDS = 200

Curve = Float[Tensor, "photo area"]
Kept = Mapping[str, Curve]
"""Kept scores by the kind of windows."""


@dataclass(frozen=True)
class Verdict:
    """What the network knows a category by."""

    kind: Kind  # the verdict
    advantage: Estimate  # of the parts over the best kind for comparison
    best_null: str  # that kind
    against: Mapping[str, Comparison]  # the parts compared with each kind
    # place (row, col) of the window that keeps most at one place of all photos, as shares of the sides
    fixed: tuple[float, float]
    fixed_kept: float  # what it keeps at the smallest area, the median
    photos: int  # that could be measured
    reason: Reason  # what makes it undecided, elsewhere, or texture in spite of an advantage; else empty
    # what the network's decisions say about being of the category (:func:`told`); ``None`` without others
    told: Comparison | None = None

    def knowing(self, told: Comparison | None) -> Verdict:
        """Return the verdict where it is known what the decisions say about being of the category."""
        if told is None or told.counts or self.reason == "few":
            return replace(self, told=told)
        return replace(self, told=told, kind="undecided", reason="untold")


def told(
    decisions: Int[Tensor, " photo"], own: Bool[Tensor, " photo"], generator: torch.Generator
) -> Comparison | None:
    """Return what decisions say about being ``own``, their mutual information in bits, beside its chance level.

    The threshold is the 95 % quantile when photos are shuffled. ``None`` where all photos are own.

    Example:
        >>> own = torch.arange(20) < 10
        >>> found = told(own.long(), own, torch.Generator().manual_seed(0))
        >>> found.advantage, found.counts, told(own.long(), own | True, torch.Generator())
        (1.0, True, None)
    """
    if bool(own.all()):
        return None
    number = decisions.unique(return_inverse=True)[1]
    total = number.bincount()
    here = number[own].bincount(minlength=len(total))
    # Which decisions fall on as many photos when these are shuffled: drawn without shuffling, however many there are.
    source = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
    drawn = source.multivariate_hypergeometric(total.numpy(), int(own.sum()), size=_EXCHANGES)
    mine = torch.cat([here[None], torch.from_numpy(drawn)]).double()
    counts = torch.stack([mine, total - mine], 1)  # draw, own or not, decision
    share = counts / len(own)
    chance = share.sum(2, keepdim=True) * share.sum(1, keepdim=True)
    bits = torch.special.xlogy(share, share / chance).sum((1, 2)) / math.log(2)
    return Comparison(advantage=float(bits[0]), threshold=float(bits[1:].quantile(_LEVEL)))


def curve(score: Curve) -> Float[Tensor, " area"]:
    """Return the median over photos at each area."""
    return score.nanmedian(0).values


def _area_between(one: Float[Tensor, "*set photo area"], other: Float[Tensor, "*set photo area"]) -> Tensor:
    return (one.nanmedian(-2).values - other.nanmedian(-2).values).mean(-1)


def compared(one: Curve, other: Curve, generator: torch.Generator) -> Comparison:
    """Compare two kinds of windows on the photos on which both are known.

    The threshold is the 95 % quantile of the area between the curves when the two curves of each photo are exchanged
    at random.
    """
    known = ~(one.isnan() | other.isnan()).any(1)
    one, other = one[known], other[known]
    if not len(one):
        return Comparison(advantage=math.nan, threshold=math.nan)
    swap = torch.rand(_EXCHANGES, len(one), 1, generator=generator) < 0.5
    drawn = _area_between(torch.where(swap, other, one), torch.where(swap, one, other))
    return Comparison(advantage=float(_area_between(one, other)), threshold=float(drawn.quantile(_LEVEL)))


def _advantage_of(kept: Kept, nulls: tuple[str, ...], generator: torch.Generator) -> tuple[Estimate, str]:
    """Return the advantage of the parts over the best null, with an interval over photos, and which null it is.

    The best null is found anew in every draw of the photos, so the interval knows that it was chosen.
    """
    known = torch.stack([~kept[kind].isnan().any(1) for kind in ("parts", *nulls)]).all(0)
    parts = kept["parts"][known]
    others = {kind: kept[kind][known] for kind in nulls}
    if not len(parts):
        return Estimate.undefined(), nulls[0]

    def smallest(rows: Tensor) -> float:
        return min(float(_area_between(parts[rows], each[rows])) for each in others.values())

    best = min(nulls, key=lambda kind: float(_area_between(parts, others[kind])))
    return bootstrap(smallest, len(parts), generator=generator, rounds=_ROUNDS), best


def best_place(grid: Float[Tensor, "photo area window"]) -> int:
    """Return which window keeps most at the same place of all photos; what it keeps is to be asked of other photos."""
    return int(grid.nanmedian(0).values.nan_to_num(-math.inf).mean(0).argmax())


def _in_several_places(places: Float[Tensor, "photo part 2"]) -> bool:
    """Tell whether two parts are, on average, as far apart as the smallest window reaches."""
    apart = (places[:, :, None] - places[:, None]).norm(dim=-1).mean(0)
    return float(apart.max()) >= math.sqrt(AREAS[0] / math.pi)


def judged(
    kept: Kept,
    grid: Float[Tensor, "gridded area window"],
    fixed: Curve,
    places: Float[Tensor, "photo part 2"],
    generator: torch.Generator,
) -> Verdict:
    """Return the verdict.

    Args:
        kept: what windows of each kind keep.
        grid: what single windows over the whole image keep on the first of the photos.
        fixed: what the best of these keeps on the other photos, NaN on the first.
        places: of the parts in the measured photos.
        generator: source of the exchanges.
    """
    parts = kept["parts"]
    nulls = (*NULLS, *(("object",) if "object" in kept else ()))
    against = {kind: compared(parts, kept[kind], generator) for kind in nulls}
    advantage, best = _advantage_of(kept, nulls, generator)
    photos = int((~parts.isnan().any(1)).sum())
    kind, reason = _kind(kept, grid, fixed, against, photos, generator)
    if kind == "parts" and not _more_than_the_rest(kept, generator):
        kind, reason = "texture", "rest"
    elif kind == "parts" and "object" not in kept and not _in_several_places(places):
        kind, reason = "texture", "one_place"
    row, col = grid_places(round(grid.shape[2] ** 0.5))[best_place(grid)].tolist()
    return Verdict(kind, advantage, best, against, (row, col), float(fixed[:, 0].nanmedian()), photos, reason)


def _more_than_the_rest(kept: Kept, generator: torch.Generator) -> bool:
    """Tell whether the windows at the parts keep more than everything outside them, at the area of the sentence."""
    at = slice(AREAS.index(SAID_AREA), AREAS.index(SAID_AREA) + 1)
    return compared(kept["parts"][:, at], kept["rest"][:, at], generator).counts


def _kind(
    kept: Kept,
    grid: Tensor,
    fixed: Curve,
    against: Mapping[str, Comparison],
    photos: int,
    generator: torch.Generator,
) -> tuple[Kind, Reason]:
    """Apply the rule of the module's text."""
    if photos < LEAST_PHOTOS:
        return "undecided", "few"
    if all(compared(fixed, kept[kind], generator).counts for kind in ("parts", "random", "centre")):
        return "elsewhere", "fixed"
    if "object" in kept and compared(kept["off_object"], kept["object"], generator).counts:
        return "elsewhere", "off_object"
    if all(one.counts for one in against.values() if math.isfinite(one.advantage)):
        return "parts", ""
    ceiling = grid.amax(2)
    if compared(ceiling, kept["random"][: len(grid)], generator).counts:
        return "texture", ""
    return "undecided", "unsure"


def sentence(name: str, verdict: Verdict, kept: Kept, windows: Sequence[int]) -> str:
    """Say the verdict with its numbers and n; ``name`` is empty where all photos are one category.

    ``windows`` says at how many parts the windows of each area stand. Of parts the area is told at which they are
    furthest above the best kind for comparison, else what they fail most.
    """
    what = name or "these photos"
    failed = {one.advantage - one.threshold: k for k, one in verdict.against.items() if one.advantage <= one.threshold}
    null = failed[min(failed)] if failed else verdict.best_null
    at = AREAS.index(SAID_AREA)
    if verdict.kind == "parts":
        at = int((curve(kept["parts"]) - curve(kept[null])).nan_to_num(-1.0).argmax())
    mine, theirs = (float(curve(kept[kind])[at]) for kind in ("parts", null))
    around = "one part" if windows[at] == 1 else f"{windows[at]} parts"
    numbers = f"{AREAS[at]:.0%} of the image around {around} keeps {_percent(mine)} of the score"
    other = f"{_NAMES[null]} {_percent(theirs)}"
    told = f"{numbers}; {other} (n = {verdict.photos})."
    if verdict.kind == "parts":
        return f"The network knows {what} by parts: {told}"
    if verdict.kind == "elsewhere":
        return _elsewhere(what, verdict, kept)
    if verdict.kind == "undecided":
        few = f"the photos of {what} are too few to tell parts from chance: {told}"
        return f"Undecided: {_undecided(what, verdict) or few}"
    head = f"The network knows {what} by texture or the whole:"
    if verdict.reason == "one_place":
        return f"{head} what carries it stands in one place, where {told}"
    if verdict.reason == "rest":
        theirs = float(curve(kept["rest"])[at])
        numbers, other = f"{numbers} ({other})", f"everything outside keeps {_percent(theirs)}"
    chance = ", a difference that may be chance" if round(100 * mine) > round(100 * theirs) else ""
    return f"{head} {numbers}, but {other}{chance} (n = {verdict.photos})."


_NAMES = {
    "other_photos": "the same windows of other photos keep",
    "random": "random windows keep",
    "centre": "a window in the centre keeps",
    "object": "the best of nine places on the object keeps",
}


def _undecided(what: str, verdict: Verdict) -> str:
    if verdict.reason == "few":
        return f"{what} has {verdict.photos} photos that can be measured, {LEAST_PHOTOS} are needed."
    if verdict.reason != "untold" or verdict.told is None:
        return ""
    return (
        f"the network decides on {what} as on the other photos, so that what carries its decisions is not of it "
        f"({verdict.told.advantage:.2f} bits about it, shuffled photos up to {verdict.told.threshold:.2f}; "
        f"n = {verdict.photos})."
    )


def _elsewhere(what: str, verdict: Verdict, kept: Kept) -> str:
    n = f"n = {verdict.photos}"
    head = f"The network knows {what} by something beside the object:"
    if verdict.reason == "fixed":
        parts, mine = _percent(float(curve(kept["parts"])[0])), _percent(verdict.fixed_kept)
        return (
            f"{head} {AREAS[0]:.0%} of the image, always {_where(*verdict.fixed)}, keeps {mine} of the score; "
            f"as much at the parts keeps {parts} ({n})."
        )
    at = AREAS.index(SAID_AREA)
    off, on = (_percent(float(curve(kept[kind])[at])) for kind in ("off_object", "object"))
    return f"{head} {SAID_AREA:.0%} of the image beside it keeps {off} of the score, as much on it keeps {on} ({n})."


def _where(row: float, col: float) -> str:
    """Name a place of the image.

    Example:
        >>> _where(0.9, 0.1), _where(0.1, 0.5)
        ('at the bottom left', 'at the top')
    """
    names = [("top", "", "bottom")[min(2, int(3 * row))], ("left", "", "right")[min(2, int(3 * col))]]
    return f"at the {' '.join(filter(None, names))}" if any(names) else "in the middle"


def _percent(share: float) -> str:
    return f"{share:.0%}" if math.isfinite(share) else "–"
