"""How much of the performer is left when the reconstruction is fed back to it, and what the share p is worth."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.places import ROUNDS
from partlens.evaluation.results import ErrorsBy, Fidelity
from partlens.explainer.network import Explainer
from partlens.metrics.faithfulness import (
    HeadErrors,
    ReconstructionSums,
    agreement_top1,
    best_share,
    category_error_increase,
    decision_errors,
)
from partlens.network.performer import Performer

SHARES = (0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 0.95)


@dataclass(frozen=True)
class FedBack:
    """The performer's outputs (image, class) and its last target averaged over cells (image, filter), of photos.

    ``fed_`` is what they are when the reconstruction is fed back.
    """

    outputs: Tensor
    fed_outputs: Tensor
    features: Tensor
    fed_features: Tensor


def own_columns(performer: Performer, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return the column of :func:`class_outputs` of each category; ``None`` where the performer does not know one."""
    known = performer.class_names
    if known is None or not names or any(name not in known for name in names):
        return None
    return tuple(known.index(name) + (1 if len(known) == 1 else 0) for name in names)


@dataclass(frozen=True)
class Answers:
    """What both networks say of all photos that errors are measured with.

    Attributes:
        held: held-out photos of the categories.
        labels: of these, an index into the categories.
        photos: an integer per row of ``held`` and of ``others`` after it, equal for crops of one photo.
        columns: of :func:`class_outputs` for each category (:func:`own_columns`); ``None`` where a head has to tell.
        others: held-out photos of other categories, or ``None``.
        train: training photos of the categories, on which a head is fitted, or ``None``.
        train_labels: of these.
        train_others: training photos of other categories, or ``None``.
        categories: how many there are.
    """

    held: FedBack
    labels: Int[Tensor, " image"]
    photos: Int[Tensor, " row"]
    columns: tuple[int, ...] | None = None
    others: FedBack | None = None
    train: FedBack | None = None
    train_labels: Int[Tensor, " photo"] | None = None
    train_others: FedBack | None = None
    categories: int = 1


def _measure_errors(of: Answers, generator: torch.Generator, rounds: int) -> HeadErrors | None:
    """Return the errors of both networks; ``None`` where there is nothing to tell the categories from.

    A single category is told from everything else, several from each other: by the performer's own outputs where these
    are the categories, else by a logistic head that is fitted on training photos.
    """
    if of.categories > 1:
        sides, truth = [of.held], of.labels
    elif of.others is not None:
        sides, truth = [of.held, of.others], _one_and_zero(of.held, of.others)
    else:
        return None
    photos = of.photos[: len(truth)]
    if of.columns is not None:
        own, fed = (torch.cat([getattr(one, name) for one in sides]).argmax(1) for name in ("outputs", "fed_outputs"))
        if of.categories > 1:
            truth = torch.tensor(of.columns)[of.labels]
        else:  # category against everything else: the other outputs are one class
            own, fed = (own == of.columns[0]).long(), (fed == of.columns[0]).long()
        return decision_errors(own, fed, truth, photos=photos, generator=generator, rounds=rounds)
    if (lesson := _lesson(of)) is None:
        return None
    features, fed_features = (torch.cat([getattr(one, name) for one in sides]) for name in ("features", "fed_features"))
    return category_error_increase(
        *lesson, features, fed_features, truth, photos=photos, generator=generator, rounds=rounds
    )


def _one_and_zero(of: FedBack, others: FedBack) -> Int[Tensor, " row"]:
    return torch.cat([torch.ones(len(of.outputs)), torch.zeros(len(others.outputs))]).long()


def _lesson(of: Answers) -> tuple[Tensor, Tensor] | None:
    """Return features and labels that a logistic head is fitted on, ``None`` where there are no photos for it."""
    if of.train is None:
        return None
    if of.categories > 1:
        return None if of.train_labels is None else (of.train.features, of.train_labels)
    if of.train_others is None:
        return None
    return torch.cat([of.train.features, of.train_others.features]), _one_and_zero(of.train, of.train_others)


def measure_fidelity(
    of: Answers,
    lost: Mapping[str, LostVariance],
    *,
    generator: torch.Generator,
    rounds: int = 10 * ROUNDS,
) -> Fidelity:
    """Measure what is left of the performer, given what both networks say and what each target lost."""
    count = len(of.labels)
    agreement = agreement_top1(of.held.fed_outputs, of.held.outputs, of.photos[:count])
    relative = {name: one.estimate(generator, of.photos[:count], rounds) for name, one in lost.items()}
    background = Estimate.undefined()
    if of.others is not None:
        background = agreement_top1(of.others.fed_outputs, of.others.outputs, of.photos[count:])
    errors = _measure_errors(of, generator, rounds)
    by: ErrorsBy | None = None if errors is None else "performer" if of.columns is not None else "logistic head"
    unknown = HeadErrors(Estimate.undefined(), Estimate.undefined(), Estimate.undefined())
    return Fidelity(
        agreement_top1=agreement,
        agreement_top1_background=background,
        relative_error=relative,
        errors_by=by,
        **(errors or unknown).__dict__,
    )


class LostVariance:
    """The reconstruction of one target, collected batch by batch."""

    def __init__(self) -> None:
        self.sums, self.per_photo = ReconstructionSums(), list[Tensor]()

    def add(self, value: Tensor, target: Tensor) -> None:
        """Take one batch of a reconstruction and of what it should be."""
        self.sums.add(value, target)
        self.per_photo.append((value - target).double().square().flatten(1).sum(1))

    def estimate(self, generator: torch.Generator, photos: Int[Tensor, " image"], rounds: int) -> Estimate:
        """Return the share of the target's variance that is lost, with a bootstrap over photos of the numerator."""
        if not math.isfinite(self.sums.relative_error):
            return Estimate.undefined()
        scatter, errors = self.sums.scatter / self.sums.count, torch.cat(self.per_photo)
        return bootstrap(
            lambda i: float(errors[i].mean()) / scatter,
            self.sums.count,
            generator=generator,
            rounds=rounds,
            groups=photos,
        )


class ShareCurve:
    """The objective of each photo at several shares p, everything else held.

    Args:
        eta: weight of -log p.
        reconstruction_weight: of the costs, ``sum_l |x_l - x_l*|²`` of each target, each over ``E|max(x*, 0)|``.
    """

    def __init__(self, eta: float, reconstruction_weight: float) -> None:
        self.eta, self.reconstruction_weight = eta, reconstruction_weight
        self.costs, self.norms = list[Tensor](), list[Tensor]()
        self.worst_rescaling = math.nan

    @torch.no_grad()
    def add(self, explainer: Explainer, maps: Tensor, targets: Sequence[Tensor]) -> None:
        """Decode a batch at every share."""
        tracks = explainer.normed_tracks(maps)
        cost = maps.new_empty(len(maps), len(SHARES), len(targets))
        for column, share in enumerate(SHARES):
            mixed = share * tracks.interpretable + (1 - share) * tracks.ordinary
            decoded = explainer.decode(mixed, tracks.passing)
            for row, (value, target) in enumerate(zip(decoded, targets, strict=True)):
                cost[:, column, row] = (value - target).square().flatten(1).sum(1)
        self.costs.append(cost.double())
        self.norms.append(torch.stack([t.clamp(min=0).flatten(1).norm(dim=1) for t in targets], 1).double())
        if math.isnan(self.worst_rescaling):
            self.worst_rescaling = _rescaling_error(explainer, maps)

    def optimum(self, generator: torch.Generator, photos: Tensor, rounds: int = 10 * ROUNDS) -> Estimate:
        """Return the p at which these photos' objective is least, with a bootstrap over photos (an integer per row)."""
        weights = self.reconstruction_weight / torch.cat(self.norms).mean(0).clamp(min=1e-12)
        costs = (torch.cat(self.costs) * weights).sum(2)
        shares = torch.tensor(SHARES, dtype=torch.float64)
        return bootstrap(
            lambda i: best_share(costs[i].mean(0), shares, self.eta),
            len(costs),
            generator=generator,
            rounds=rounds,
            groups=photos,
        )


def _rescaling_error(explainer: Explainer, maps: Tensor, factor: float = 10.0) -> float:
    """Return how far the encoder's output moves, at most, when conv-interp-2 is scaled and its norm measured again."""
    # If the track could be made large or small by its weights alone, a share p could be had for nothing. The norm
    # layer is there to prevent it, and 0 means it does.
    scaled = copy.deepcopy(explainer)
    outcome = []
    with torch.no_grad():
        for times in (1.0, factor):
            for parameter, original in zip(
                scaled.conv_interp_2.parameters(), explainer.conv_interp_2.parameters(), strict=True
            ):
                parameter.copy_(original * times)
            masked = scaled.pool(scaled.masked(scaled.interpret(maps)[1]))
            scaled.norm_interp.started.fill_(value=False)
            scaled.norm_interp.update(masked)
            outcome.append(scaled.norm_interp.eval()(masked))
    largest = float(outcome[0].abs().max())
    return float((outcome[1] - outcome[0]).abs().max()) / largest if largest > 0 else 0.0


def share_estimate(shares: Sequence[float]) -> Estimate:
    """Return p of the kept explainer with a 95 % t-interval of the seeds' mean; undefined ends for a single seed."""
    # The value is of the explainer that is kept, the interval of the mean: seeds are few, hence Student's t.
    count = len(shares)
    if count < 2:
        return Estimate(shares[0], (math.nan, math.nan), count, "seeds")
    t_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
    mean = sum(shares) / count
    deviation = math.sqrt(sum((s - mean) ** 2 for s in shares) / (count - 1))
    half = t_95.get(count - 1, 1.96) * deviation / math.sqrt(count)
    return Estimate(shares[0], (max(0.0, mean - half), min(1.0, mean + half)), count, "seeds")
