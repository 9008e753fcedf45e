"""What each part filter adds to one prediction, through the reconstruction that is fed back to the performer.

The encoder's output is a sum of per-filter terms, ``x_enc = z + o`` with the interpretable track
``z = p · norm(masked maps)`` and the ordinary track ``o = (1 - p) · norm(maps)``. The class score is ``S(x_enc)``, the
performer's upper layers on the decoded features. Two ways to share ``S`` among the filters:

- *Shapley values* of parts (groups of filters) and the ordinary track: the mean gain of a part over all orders in which
  the players may join. They sum to ``S(x_enc) - S(0)`` exactly; beyond eleven parts they are estimated from random
  orders, with a standard error.
- *gradient × activation* of every filter at ``x_enc``, the papers' measure (ICLR 2020, Sec. 5), which sums to nothing
  in particular. Along the line from nothing to ``x_enc`` it is integrated gradients (Sundararajan et al. 2017), here in
  four steps: they say where in a photo a part acts, and what as many random filters would add.

Sources: Zhang et al. (ICLR 2020); Shapley 1953. The papers give
percentages of parts without saying what they sum to; the one that sums is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.errors import InputError, expected
from partlens.explainer.network import Explainer, NormedTracks
from partlens.object_parts.shapley import Shapley, Values, exact_shapley, sampled_shapley

MOST_PLAYERS = 12
_CHUNK = 64

Score = Callable[[Tensor], Tensor]


def tracks(explainer: Explainer, maps: Float[Tensor, "image filter row col"]) -> NormedTracks:
    """Run the encoder on the performer's maps at the tap; return its two tracks apart, each with its share p or 1 - p.

    They are ``z`` and ``o``, [image, filter, row, col], whose sum is the encoder's output.
    """
    with torch.no_grad():
        found, p = explainer.normed_tracks(maps), explainer.p
        return found._replace(interpretable=p * found.interpretable, ordinary=(1 - p) * found.ordinary)


def class_score(
    explainer: Explainer, head: nn.Module, classes: Int[Tensor, " image"], passing: Tensor | None = None
) -> Score:
    """Return ``S``: encoder outputs of the images, in order, to the performer's scores of the given classes.

    ``passing`` is what the images' tracks have by that name.
    """

    def score(encoded: Tensor) -> Tensor:
        output = head(explainer.decode(encoded, passing)[-1])
        output = output[0] if isinstance(output, tuple) else output
        rows = classes if len(classes) == len(output) else classes.repeat(len(output) // len(classes))
        chosen: Tensor = output.gather(1, rows.to(output.device)[:, None])[:, 0]
        return chosen

    return score


def gradient_activation(
    score: Score, parts: NormedTracks, *, at: Sequence[float] = (1.0,)
) -> Float[Tensor, "image filter"]:
    """Return gradient × activation of every filter of the interpretable track, summed over its cells.

    The gradient is the mean of those at points of the straight line from nothing (0) to the whole encoding (1, the
    papers' measure). At the middles of equal steps it makes integrated gradients, which sum to the rise of the score,
    with the ordinary track's, but for what so many steps miss.

    Example:
        >>> z, o = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
        >>> linear = lambda x: x.sum((1, 2, 3)) + x[:, 0, 0, 0]
        >>> gradient_activation(linear, NormedTracks(z, z, z, z, o, None)).tolist()
        [[2.0, 1.0]]
    """
    whole, total = parts.interpretable + parts.ordinary, torch.zeros_like(parts.interpretable)
    for share in at:
        leaf = (share * whole).detach().requires_grad_()
        with torch.enable_grad():
            total += torch.autograd.grad(score(leaf).sum(), leaf)[0]
    return (total / len(at) * parts.interpretable).sum((2, 3))


def _values(score: Score, parts: NormedTracks, part_of: Tensor, count: int) -> Values:
    """Say what coalitions of the parts and, last, the ordinary track score on each image."""
    if part_of.shape[0] != parts.interpretable.shape[1] or int(part_of.min()) < 0 or int(part_of.max()) >= count:
        rule = f"a part from 0 to {count - 1} for each of {parts.interpretable.shape[1]} filters"
        got = f"{tuple(part_of.shape)} from {int(part_of.min())} to {int(part_of.max())}"
        raise InputError(expected(rule, got, "Number the parts from 0"))
    images = parts.interpretable.shape[0]
    members = torch.nn.functional.one_hot(part_of, count).T.to(parts.interpretable)  # [part, filter]
    per_pass = max(1, _CHUNK // images)

    def values(coalitions: Tensor) -> Tensor:
        found = []
        for chunk in coalitions.to(parts.interpretable).split(per_pass):
            keep = chunk[:, :count] @ members  # [coalition, filter]
            encoded = keep[:, None, :, None, None] * parts.interpretable + (
                chunk[:, count, None, None, None, None] * parts.ordinary
            )
            with torch.no_grad():
                found.append(score(encoded.flatten(0, 1)).cpu().double().view(len(chunk), images))
        return torch.cat(found).T

    return values


def part_contributions(
    score: Score,
    parts: NormedTracks,
    part_of: Int[Tensor, " filter"],
    count: int,
    *,
    pairs: int = 32,
    generator: torch.Generator | None = None,
) -> Shapley:
    """Share a score among parts and, last, the ordinary track by Shapley values.

    They are exact; with a ``generator`` they are estimated from pairs of random orders in which the players join.

    Raises:
        InputError: more parts than can be enumerated, fewer than 2 pairs, or a part out of range.
    """
    if generator is None and not 1 <= count < MOST_PLAYERS:
        remedy = "Join parts, or estimate with a generator"
        raise InputError(expected(f"1 to {MOST_PLAYERS - 1} parts", count, remedy))
    values = _values(score, parts, part_of, count)
    if generator is None:
        return exact_shapley(values, count + 1)
    return sampled_shapley(values, count + 1, pairs=pairs, generator=generator)


def sums_by_part(
    filters: Float[Tensor, "image filter"], part_of: Int[Tensor, " filter"], count: int
) -> Float[Tensor, "image part"]:
    """Add up what the filters of each part contribute.

    Example:
        >>> sums_by_part(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([0, 1, 0]), 2).tolist()
        [[5.0, 2.0]]
    """
    return filters.new_zeros(filters.shape[0], count).index_add_(1, part_of, filters)


def shares_of_random_parts(
    filters: Float[Tensor, "image filter"],
    part_of: Int[Tensor, " filter"],
    count: int,
    *,
    draws: int = 20,
    generator: torch.Generator,
) -> Float[Tensor, "draw image part"]:
    """Return each part's sum when the filters are shuffled among the parts, the sizes kept: the null of a share.

    A part with many filters adds much whatever it is; a part is of interest where it adds more or less than as many
    random filters. No pass through a network is needed, as each filter keeps its own contribution.
    """
    shuffled = torch.stack([part_of[torch.randperm(len(part_of), generator=generator)] for _ in range(draws)])
    members = torch.nn.functional.one_hot(shuffled, count).to(filters.dtype)  # [draw, filter, part]
    return torch.einsum("if,dfp->dip", filters, members)


def part_heat_maps(
    masked: Float[Tensor, "image filter row col"],
    filters: Float[Tensor, "image filter"],
    part_of: Int[Tensor, " filter"],
    count: int,
) -> Float[Tensor, "image part row col"]:
    """Return where the contribution of each part comes from.

    Each filter's contribution is spread over the cells in proportion to its masked map ``m``:
    ``heat_P(cell) = sum over f in P of c_f · m_f(cell) / sum of m_f``. The cells of a part sum to its contribution;
    a filter that is silent on an image has no contribution to spread.
    """
    total = masked.sum((2, 3))
    weight = torch.where(total > 0, filters / total.clamp(min=torch.finfo(masked.dtype).tiny), 0.0)
    members = torch.nn.functional.one_hot(part_of, count).to(masked.dtype)
    return torch.einsum("ifrc,if,fp->iprc", masked, weight.to(masked.dtype), members)
