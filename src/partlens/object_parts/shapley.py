"""Shapley values: the mean gain of a player over all orders in which the players may join (Shapley 1953).

They sum to what everyone has and nobody lacks, whatever the players have together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from partlens.errors import InputError, expected

Values = Callable[[Bool[Tensor, "coalition player"]], Float[Tensor, "image coalition"]]
"""Says what each coalition of the players is worth, on every image."""


@dataclass(frozen=True)
class Shapley:
    """What each player is worth, on every image."""

    players: Float[Tensor, "image player"]  # they sum to everyone - nobody
    standard_error: Float[Tensor, "image player"]  # 0 where the values are exact
    loss: Float[Tensor, "image player"]  # what is lost when the player alone is taken away
    alone: Float[Tensor, "image player"]  # what the player alone is worth
    nobody: Float[Tensor, " image"]
    everyone: Float[Tensor, " image"]


def exact_shapley(values: Values, players: int) -> Shapley:
    """Share among players by the values of all ``2 ** players`` coalitions.

    Example:
        >>> each = torch.tensor([1.0, 2.0])
        >>> exact_shapley(lambda coalitions: (coalitions.float() @ each)[None], 2).players.tolist()
        [[1.0, 2.0]]
    """
    found = values(torch.tensor(list(itertools.product((False, True), repeat=players))))
    cube = found.view(len(found), *([2] * players))
    # A coalition of s other players precedes a player in s! (n - 1 - s)! of the n! orders.
    orders = [math.factorial(s) * math.factorial(players - 1 - s) / math.factorial(players) for s in range(players)]
    size = torch.tensor([sum(others) for others in itertools.product((0, 1), repeat=players - 1)])
    weight = torch.tensor(orders, dtype=found.dtype)[size]
    gains = [(cube.select(1 + p, 1) - cube.select(1 + p, 0)).reshape(len(found), -1) for p in range(players)]
    shares = torch.stack([(gain * weight).sum(1) for gain in gains], 1)
    place = 2 ** torch.arange(players - 1, -1, -1)  # of the coalition of one player
    everyone = found[:, -1]
    loss = everyone[:, None] - found[:, 2**players - 1 - place]
    return Shapley(shares, torch.zeros_like(shares), loss, found[:, place], found[:, 0], everyone)


def sampled_shapley(values: Values, players: int, *, pairs: int, generator: torch.Generator) -> Shapley:
    """Estimate Shapley values from random orders in which the players join, for any number of players.

    Each order is used forwards and backwards (antithetic pairs: a player that joins early in one joins late in the
    other), so that the pairs are independent of each other and their spread gives the standard error: the sample
    standard deviation over pairs (N - 1) over the root of their number. In every order the gains sum to what all are
    worth, so that the estimates do, too; ``loss`` and ``alone`` are exact. Coalitions that occur twice are asked for
    once.

    Raises:
        InputError: fewer than 2 pairs of orders.
    """
    if pairs < 2:
        raise InputError(expected("at least 2 pairs of orders", pairs, "Raise it"))
    orders = torch.stack([torch.randperm(players, generator=generator) for _ in range(pairs)])
    orders = torch.stack([orders, orders.flip(1)], 1).flatten(0, 1)
    rank = orders.argsort(1)
    # After the step at which a player joins, everybody of a lower or the same rank is there.
    after = rank[:, None, :] <= torch.arange(players)[None, :, None]
    one = torch.eye(players, dtype=torch.bool)
    asked = torch.cat([torch.zeros(1, players, dtype=torch.bool), after.flatten(0, 1), ~one, one])
    known, number = asked.unique(dim=0, return_inverse=True)
    found = values(known)[:, number]
    nobody, without, alone = found[:, 0], found[:, -2 * players : -players], found[:, -players:]
    steps = found[:, 1 : 1 + len(orders) * players].view(-1, len(orders), players)
    before = torch.cat([nobody[:, None, None].expand(-1, len(orders), 1), steps[..., :-1]], 2)
    gains = (steps - before).gather(2, rank.expand(len(found), -1, -1))
    of_pair = gains.unflatten(1, (pairs, 2)).mean(2)
    everyone = steps[:, 0, -1]
    error = of_pair.std(1) / math.sqrt(pairs)
    return Shapley(of_pair.mean(1), error, everyone[:, None] - without, alone, nobody, everyone)
