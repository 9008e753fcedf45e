"""How much of the performer is left when the reconstruction, or the part filters alone, are fed back to it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from scipy.special import stdtrit
from torch import Tensor

from partlens.estimate import Estimate
from partlens.evaluation.places import ROUNDS
from partlens.evaluation.results import ErrorsBy, Fidelity
from partlens.explainer.network import Explainer, NormedTracks
from partlens.metrics.faithfulness import LostVariance, agreement_top1, decision_errors
from partlens.network.performer import Performer

FedIn = Literal["reconstruction", "parts", "other_photo", "nothing"]
"""What replaces the performer's features: both tracks, the part filters alone, and their nulls."""


def fed_back(
    explainer: Explainer, tracks: NormedTracks, before: Tensor | None = None
) -> dict[FedIn, tuple[Tensor, ...]]:
    """Return what the decoder makes of each target (image, ...) of what replaces both tracks, by kind.

    Where the ordinary track is silent, the interpretable one has the weight of both: each is normed to the same
    magnitude, and the decoder has learned from that. ``before`` is the interpretable track of the photo that came
    before the batch: each photo gets that of the one before it, the very first its own.
    """
    parts = tracks.interpretable
    # Its own for the first photo of all, so that nothing has to be read twice for a null.
    first = parts[:1] if before is None else before
    own: dict[FedIn, Tensor] = {"reconstruction": explainer.encoded(tracks), "parts": parts}
    if tracks.passing is not None:  # tokens without a place are each photo's own, whatever is fed in
        nulls: dict[FedIn, Tensor] = {
            "other_photo": torch.cat([first, parts[:-1]]),
            "nothing": torch.zeros_like(parts),
        }
        return {kind: explainer.decode(given, tracks.passing) for kind, given in (own | nulls).items()}
    found = {kind: explainer.decode(given) for kind, given in own.items()}
    # A decoder takes each photo by itself, so that nulls repeat what is decoded already.
    other, nothing = explainer.decode(first), explainer.decode(torch.zeros_like(first))
    found["other_photo"] = tuple(torch.cat([v, rest[:-1]]) for v, rest in zip(other, found["parts"], strict=True))
    found["nothing"] = tuple(v.expand(len(parts), *v.shape[1:]) for v in nothing)
    return found


@dataclass(frozen=True)
class FedBack:
    """The performer's outputs (image, class) and its last target averaged over cells (image, filter), of photos.

    ``fed`` has the same two of each kind of what replaces its features.
    """

    outputs: Tensor
    features: Tensor
    fed: Mapping[FedIn, tuple[Tensor, Tensor]]


def own_columns(performer: Performer, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the column of :func:`class_outputs` of each category; ``None`` where the performer does not know one."""
    known = performer.class_names
    if known is None or not names or any(name not in known for name in names):
        return None
    return tuple(known.index(name) + (1 if len(known) == 1 else 0) for name in names)


@dataclass(frozen=True)
class Answers:
    """What both networks say of all photos that errors are measured with."""

    held: FedBack  # held-out photos of the categories
    labels: Int[Tensor, " image"]  # of these, an index into the categories
    # an integer per row of ``held`` and of ``others`` after it, equal for crops of one photo
    photos: Int[Tensor, " row"]
    # of :func:`class_outputs` for each category (:func:`own_columns`); ``None`` where a head has to tell
    columns: tuple[int, ...] | None = None
    others: FedBack | None = None  # held-out photos of other categories, or ``None``
    # tells the categories by the last target, or ``None`` where there is nothing to fit one on
    head: Callable[[Tensor], Tensor] | None = None
    categories: int = 1  # how many there are


def _measure_errors(of: Answers, kind: FedIn, generator: torch.Generator, rounds: int) -> dict[str, Estimate] | None:
    """Return the errors of both networks; ``None`` where there is nothing to tell the categories from.

    A single category is told from everything else, several from each other: by the performer's own outputs where these
    are the categories, else by a logistic head that is fitted on training photos.
    """
    sides, truth = [of.held], of.labels
    if of.categories == 1:
        if of.others is None:
            return None
        sides = [of.held, of.others]
        truth = torch.cat([torch.ones(len(of.held.outputs)), torch.zeros(len(of.others.outputs))]).long()
    decide = of.head if of.columns is None else _by_outputs(of.columns)
    if decide is None:
        return None
    column = 1 if of.columns is None else 0  # a head reads features, the performer's decision its outputs
    own = torch.cat([(one.outputs, one.features)[column] for one in sides])
    fed = torch.cat([one.fed[kind][column] for one in sides])
    photos = of.photos[: len(truth)]
    return decision_errors(decide(own), decide(fed), truth, photos=photos, generator=generator, rounds=rounds)


def _by_outputs(columns: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Return what tells the categories by the performer's own outputs: of one, yes or no; else its number, or none."""

    def decide(outputs: Tensor) -> Tensor:
        named = outputs.argmax(1)[:, None] == torch.tensor(columns)
        return named[:, 0].long() if len(columns) == 1 else torch.where(named.any(1), named.long().argmax(1), -1)

    return decide


def measure_fidelity(
    of: Answers,
    kind: FedIn,
    lost: Mapping[str, LostVariance],
    *,
    generator: torch.Generator,
    rounds: int = 10 * ROUNDS,
) -> Fidelity:
    """Measure what is left of the performer, given what both networks say and what each target lost."""
    count = len(of.labels)
    agreement = agreement_top1(of.held.fed[kind][0], of.held.outputs, of.photos[:count])
    kept = {name: one.kept(generator, of.photos[:count], rounds) for name, one in lost.items()}
    background = Estimate.undefined()
    if of.others is not None:
        background = agreement_top1(of.others.fed[kind][0], of.others.outputs, of.photos[count:])
    errors = _measure_errors(of, kind, generator, rounds)
    by: ErrorsBy | None = None if errors is None else "performer" if of.columns is not None else "logistic head"
    kinds = ("performer_error_percent", "explainer_error_percent", "error_increase_points")
    return Fidelity(
        agreement_top1=agreement,
        agreement_top1_background=background,
        variance_kept=kept,
        errors_by=by,
        **(errors or dict.fromkeys(kinds, Estimate.undefined())),
    )


def share_estimate(shares: Sequence[float]) -> Estimate:
    """Return p of the kept explainer with a 95 % t-interval of the seeds' mean; undefined ends for a single seed."""
    # The value is of the explainer that is kept, the interval of the mean: seeds are few, hence Student's t.
    count = len(shares)
    if count < 2:
        return Estimate(shares[0], (math.nan, math.nan), count, "seeds")
    mean, half = statistics.mean(shares), stdtrit(count - 1, 0.975) * statistics.stdev(shares) / math.sqrt(count)
    return Estimate(shares[0], (max(0.0, mean - half), min(1.0, mean + half)), count, "seeds")
