"""The explainer's objective, a list of terms.

    Loss = sum_l lambda_l |x_l - x_l*|² - eta log p + sum_f lambda_f Loss_f(x_f)        (ICLR 2020, Eq. (1))

A *whole* term costs a batch one number: the reconstruction (or the classification that replaces it) and the price of
the ordinary track. A *filter* term costs each filter of an interpretable layer a number in nats: the filter loss and,
beyond the papers, the distance to the filter's teacher (:mod:`partlens.explainer.teachers`). In the warm-up the filter
terms are summed as they are; later their sum is weighted by lambda_f, which balances its gradient with that of the
reconstruction.

A new term is a class here and a line in :meth:`Objective.of`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.filter_loss import filter_loss_of_scores, single_templates, template_scores
from partlens.explainer.network import Explainer, ExplainerOutput
from partlens.explainer.processes import batch_mean, from_all
from partlens.explainer.teachers import places_in_view, teacher_cost
from partlens.explainer.templates import part_templates

RECONSTRUCTION_WEIGHT = 5e4  # numerator of lambda_l = 5e4 / E|max(x*, 0)| (ICLR 2020, Sec. 4)
_CLASSIFICATION_WEIGHT = 1e6  # of Explainer+cls, in the units of the reconstruction (paper silent)
_UNIT = 1e6  # Adam does not see the scale; logs stay readable
_MEASURE_EVERY = 8
_MEASURE_MOMENTUM = 0.7
_ACTIVITY_MOMENTUM = 0.9
_SCALE_MOMENTUM = 0.9

State = dict[str, Tensor]
"""Running measurements by name, all of them part of a checkpoint."""


class BatchFacts(NamedTuple):
    """What is known of a batch's images beyond their maps; the explained photos come first."""

    labels: Int[Tensor, " positive"]  # the category of each explained photo
    photos: Int[Tensor, " positive"]
    windows: Float[Tensor, "positive 5"]  # how the views that are seen were cut from them


class Group(NamedTuple):
    """The photos of one category in a batch and the filters that belong to it, in one interpretable layer.

    Maps and scores (of every template) are of all filters and of the images that the filter loss reads.
    """

    layer: str
    category: int
    rows: Int[Tensor, " row"]
    filters: Int[Tensor, " filter"]
    maps: Float[Tensor, "image all row col"]
    scores: Float[Tensor, "image all template"]


class _FilterTerm(ABC):
    """A cost of every filter of the interpretable layers ``LAYERS``, in units of the filter loss times ``WEIGHT``."""

    NAME: ClassVar[str]
    LAYERS: ClassVar[str]
    WEIGHT: ClassVar[float]

    @abstractmethod
    def cost(self, group: Group, facts: BatchFacts) -> Float[Tensor, " filter"]:
        """Return the cost of each filter of a group in nats."""


class _WholeTerm(ABC):
    """A cost of a batch as a whole, ``NAME`` in the log."""

    NAME: ClassVar[str]

    @abstractmethod
    def cost(self, output: ExplainerOutput, targets: tuple[Tensor, ...], facts: BatchFacts) -> Float[Tensor, ""]:
        """Return the weighted cost, the mean over images."""


def _picked(values: Tensor, rows: Tensor, filters: Tensor) -> Tensor:
    """Return ``values[rows][:, filters]``, the tensor itself where that is all of it."""
    if len(rows) == len(values) and len(filters) == values.shape[1]:
        return values
    return values[rows][:, filters]


@dataclass(frozen=True)
class FilterLoss(_FilterTerm):
    """The filter loss of the papers (:mod:`partlens.explainer.filter_loss`)."""

    NAME: ClassVar[str] = "filter"
    LAYERS: ClassVar[str] = "12"
    WEIGHT: ClassVar[float] = 1.0

    config: ExplainerConfig
    state: State

    def _scale(self, scores: Tensor, group: Group) -> Float[Tensor, " filter"]:
        """Return what to multiply each filter's scores by, so that its best template scores ``score_scale_nats``.

        The mean over the filter's own photos, running over batches. Scores are linear in the maps, so this is the
        same as scaling the maps.
        """
        if self.config.score_scale_nats == 0:
            return scores.new_ones(scores.shape[1])
        largest = scores.amax(-1)
        # The best score of a map without a peak is negative; a tenth of the scores' range replaces it, or the factor
        # would be without bounds.
        best = batch_mean(torch.maximum(largest, 0.1 * (largest - scores.amin(-1))))
        key = f"scale.{group.layer}"
        if key not in self.state:
            self.state[key] = best.new_full((group.scores.shape[1],), math.nan)
        past = self.state[key][group.filters]
        running = torch.where(past.isnan(), best, _SCALE_MOMENTUM * past + (1 - _SCALE_MOMENTUM) * best)
        self.state[key] = self.state[key].index_copy(0, group.filters, running)
        return self.config.score_scale_nats / running.clamp(min=1e-6 * float(running.mean()) + 1e-12)

    def cost(self, group: Group, facts: BatchFacts) -> Float[Tensor, " filter"]:  # noqa: ARG002
        """Return the loss of the group's filters over its photos, or over all images where background counts."""
        with torch.no_grad():
            factor = self._scale(_picked(group.scores, group.rows, group.filters), group)[:, None]
        everyone = torch.arange(len(group.maps), device=group.rows.device)
        rows = everyone if self.config.filter_background else group.rows
        chosen = None
        if self.config.gradient == "approximate":
            maps = _picked(group.maps, rows, group.filters)
            chosen = single_templates(maps, torch.isin(rows, group.rows))
        return filter_loss_of_scores(_picked(group.scores, rows, group.filters) * factor, chosen=chosen)


@dataclass(frozen=True)
class TeacherDistance(_FilterTerm):
    """How far filters of conv-interp-2 are from their teachers (:func:`partlens.explainer.teachers.teacher_cost`)."""

    NAME: ClassVar[str] = "teacher"
    LAYERS: ClassVar[str] = "2"
    WEIGHT: ClassVar[float] = 100.0

    state: State

    def cost(self, group: Group, facts: BatchFacts) -> Float[Tensor, " filter"]:
        """Return the distance over the photos in which the filter's teacher is seen."""
        teacher = self.state["teacher_of"][group.filters, group.category]
        places = self.state["teachers"][facts.photos[group.rows]][:, teacher]
        shares = places_in_view(places, facts.windows[group.rows])
        side = torch.tensor(group.maps.shape[2:], device=shares.device)
        # A share of 0 is the left border of the first cell, whose centre is cell 0.
        cells = torch.where(((shares > 0) & (shares < 1)).all(-1, keepdim=True), shares * side - 0.5, math.nan)
        return teacher_cost(group.maps[group.rows][:, group.filters].float(), cells)


@dataclass(frozen=True)
class Reconstruction(_WholeTerm):
    """``sum_l lambda_l |x_l - x_l*|²`` with ``lambda_l = 5e4 / E|max(x*, 0)|``, the norm of each target."""

    NAME: ClassVar[str] = "reconstruction"

    target_norms: tuple[float, ...]

    def cost(self, output: ExplainerOutput, targets: tuple[Tensor, ...], facts: BatchFacts) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the mean over images."""
        total = output.p.new_zeros(len(targets[0]))
        for value, target, norm in zip(output.reconstructions, targets, self.target_norms, strict=True):
            weight = RECONSTRUCTION_WEIGHT / max(norm, 1e-12)
            total = total + weight * (value.float() - target).square().flatten(1).sum(1)
        return batch_mean(total)


@dataclass(frozen=True)
class Share(_WholeTerm):
    """``-eta log p``."""

    NAME: ClassVar[str] = "share"

    eta: float

    def cost(self, output: ExplainerOutput, targets: tuple[Tensor, ...], facts: BatchFacts) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the price of the ordinary track."""
        return batch_mean((-self.eta * output.p.log()).expand(len(output.interp1)))  # each process pays for its images


@dataclass(frozen=True)
class Classification(_WholeTerm):
    """The logistic loss of the performer's outputs for the reconstruction that is fed back (ICLR 2020, Table 10).

    It replaces the reconstruction and needs labels; background shows none of the categories. ``head`` is the performer
    from the last target on, ``outputs`` has the output of each category.
    """

    NAME: ClassVar[str] = "classification"

    head: nn.Module
    outputs: tuple[int, ...]

    def cost(self, output: ExplainerOutput, targets: tuple[Tensor, ...], facts: BatchFacts) -> Float[Tensor, ""]:  # noqa: ARG002
        """Return the mean over images, summed over the categories' outputs."""
        scores = self.head(output.reconstructions[-1].float())  # in training the decoder may run in bfloat16
        scores = (scores[0] if isinstance(scores, tuple) else scores).float()
        wanted = torch.zeros_like(scores)
        columns = torch.tensor(self.outputs, device=scores.device)[facts.labels]
        wanted[torch.arange(len(columns), device=scores.device), columns] = 1
        losses = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")[:, list(self.outputs)].sum(1)
        return _CLASSIFICATION_WEIGHT * batch_mean(losses)


@dataclass
class Objective:
    """The objective with its running measurements; all of them are part of a checkpoint."""

    explainer: Explainer  # the network it is computed for
    fidelity: _WholeTerm  # what the filter terms are balanced with: the reconstruction, or the classification
    others: tuple[_WholeTerm, ...]  # further terms of the whole batch
    filter_terms: tuple[_FilterTerm, ...]  # terms of every filter
    categories: int  # how many categories the filters are shared among
    state: State  # running tensors by name, shared with the terms
    watched: tuple[_WholeTerm, ...] = ()  # terms that are logged and cost nothing
    epoch: int = 1  # number N of the running epoch, from 1; the filter terms weigh ``filter_ratio / N ** filter_decay``
    step: int = 0  # steps so far
    _templates: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Build the templates."""
        self._templates = part_templates(*self.explainer.structure.side_cells)

    @classmethod
    def of(
        cls,
        explainer: Explainer,
        target_norms: tuple[float, ...],
        categories: int = 1,
        classification: Classification | None = None,
    ) -> Objective:
        """Return the objective that an explainer's configuration asks for."""
        config, state = explainer.config, State()
        reconstruction = Reconstruction(target_norms)
        terms: tuple[_FilterTerm, ...] = (FilterLoss(config, state),)
        if config.teachers:
            terms += (TeacherDistance(state),)
        fidelity: _WholeTerm = reconstruction if classification is None else classification
        watched = () if classification is None else (reconstruction,)
        return cls(explainer, fidelity, (Share(config.eta),), terms, categories, state, watched)

    def to(self, device: torch.device) -> None:
        """Move what the objective holds; the explainer is moved by its owner."""
        self._templates = self._templates.to(device)
        self.state.update({name: value.to(device) for name, value in self.state.items()})
        if isinstance(self.fidelity, Classification):
            self.fidelity.head.to(device)

    def assigned(self, layer: str) -> Int[Tensor, " filter"]:
        """Return the category of each filter of a layer: the one whose photos activate it most (CVPR 2018, Sec. 3.1).

        ``argmax_c mean over photos of c of sum_ij x_ij``, the means running over batches and so re-assigned with each.
        """
        # A category that no batch has shown yet activates no filter.
        return self.state[f"activity.{layer}"].nan_to_num(nan=-1.0).argmax(1)

    @torch.no_grad()
    def _follow_activity(self, layer: str, maps: Tensor, labels: Tensor) -> Tensor:
        """Mix a batch into the running mean of ``sum_ij x_ij`` per filter and category (EMA 0.9, as released).

        Returns:
            How many photos of each category the batch has.
        """
        total = F.pad(maps[: len(labels)].detach().float().sum((2, 3)), (0, 1), value=1.0)  # each photo counts as 1
        sums = from_all(total.new_zeros(total.shape[1], self.categories).index_add_(1, labels, total.t())).sum(0)
        seen = sums[-1]
        means = sums[:-1] / seen.clamp(min=1)
        past = self.state.get(f"activity.{layer}", torch.full_like(means, math.nan))
        mixed = torch.where(past.isnan(), means, _ACTIVITY_MOMENTUM * past + (1 - _ACTIVITY_MOMENTUM) * means)
        self.state[f"activity.{layer}"] = torch.where(seen > 0, mixed, past)
        return seen

    def groups(self, layer: str, maps: Tensor, labels: Tensor) -> list[Group]:
        """Split a batch by category: which photos are positive for which filters."""
        compared = (self._follow_activity(layer, maps, labels) > 1).tolist()  # the filter loss compares photos
        assigned = self.assigned(layer)
        used = maps if self.explainer.config.filter_background else maps[: len(labels)]
        scores = template_scores(used.float(), self._templates)
        found = []
        for category in range(self.categories):
            rows = (labels == category).nonzero()[:, 0]
            filters = (assigned == category).nonzero()[:, 0]
            if compared[category] and len(filters):
                found.append(Group(layer, category, rows, filters, used, scores))
        return found

    def layer_cost(self, layer: str, maps: Tensor, facts: BatchFacts) -> tuple[Float[Tensor, " filter"], State]:
        """Return the cost of each filter of one interpretable layer in nats, and the terms for the log."""
        total = maps.new_zeros(maps.shape[1], dtype=torch.float32)
        seen: dict[str, list[Tensor]] = {}
        terms = [term for term in self.filter_terms if layer in term.LAYERS]
        for group in self.groups(layer, maps, facts.labels):
            costs = [term.cost(group, facts) for term in terms]
            weighted = [cost * term.WEIGHT for term, cost in zip(terms, costs, strict=True)]
            total = total.index_add(0, group.filters, torch.stack(weighted).sum(0))
            for term, cost in zip(terms, costs, strict=True):
                name = f"{term.NAME}_{layer}" if len(term.LAYERS) > 1 else term.NAME
                seen.setdefault(name, []).append(cost.detach())
        return total, {name: torch.cat(values).mean() for name, values in seen.items()}

    def _measure(self, fidelity: Tensor, layers: tuple[Tensor, Tensor], costs: Sequence[Tensor]) -> None:
        """Measure ``E|dLoss_rec/dx_f| / E|dLoss_f/dx_f|`` per filter of both layers (ICLR 2020, App. I)."""
        pulled = torch.autograd.grad(fidelity, layers, retain_graph=True)
        for layer, maps, pull, cost in zip("12", layers, pulled, costs, strict=True):
            (push,) = torch.autograd.grad(cost.sum(), maps, retain_graph=True)
            for label, gradient in (("pull", pull), ("push", push)):
                size = batch_mean(gradient.detach().float().flatten(2).norm(dim=2))
                past = self.state.get(f"{label}.{layer}")
                mixed = size if past is None else _MEASURE_MOMENTUM * past + (1 - _MEASURE_MOMENTUM) * size
                self.state[f"{label}.{layer}"] = mixed

    def filter_weights(self, layer: str) -> Float[Tensor, " filter"]:
        """Return lambda_f of a layer: ``filter_ratio / N^decay * E|dLoss_rec/dx_f| / E|dLoss_f/dx_f|``."""
        config = self.explainer.config
        pull, push = self.state[f"pull.{layer}"], self.state[f"push.{layer}"]
        # Filters whose loss has no gradient (dead on this data) would get an unbounded weight for nothing.
        push = push.clamp(min=1e-3 * float(push.mean()) + 1e-30)
        strength: float = config.filter_ratio / self.epoch**config.filter_decay
        return strength * pull / push

    def warmup(self, interp1: Tensor, interp2: Tensor, facts: BatchFacts) -> tuple[Float[Tensor, ""], State]:
        """Return the interpretable track's own cost, for passes in which nothing else learns, and its terms."""
        first, logged = self.layer_cost("1", interp1, facts)
        second, more = self.layer_cost("2", interp2, facts)
        self.step += 1
        return first.sum() + second.sum(), logged | more

    def joint(
        self, output: ExplainerOutput, targets: tuple[Tensor, ...], facts: BatchFacts
    ) -> tuple[Float[Tensor, ""], State]:
        """Return the whole objective divided by 1e6, and its terms for the log."""
        explainer = self.explainer
        fidelity = total = self.fidelity.cost(output, targets, facts)
        logged = {self.fidelity.NAME: fidelity.detach(), "p": output.p.detach()}
        for term in self.others:
            cost = term.cost(output, targets, facts)
            total = total + cost
            logged[term.NAME] = cost.detach()
        with torch.no_grad():
            logged |= {term.NAME: term.cost(output, targets, facts) for term in self.watched}
        if output.interp1.requires_grad:  # a track that is held has nothing to learn from its own terms
            mixed = (
                explainer.mixed_maps(output.interp2, output.ordin) if explainer.config.filter_mix else output.interp2
            )
            costs = []
            for layer, maps in (("1", output.interp1), ("2", mixed)):
                cost, terms = self.layer_cost(layer, maps, facts)
                costs.append(cost)
                logged |= terms
            if self.step % _MEASURE_EVERY == 0 or "pull.1" not in self.state:
                self._measure(fidelity, (output.interp1, output.interp2), costs)
            for layer, cost in zip("12", costs, strict=True):
                total = total + (self.filter_weights(layer) * cost).sum()
        self.step += 1
        return total / _UNIT, logged


def target_norm(target: Float[Tensor, "image ..."]) -> float:
    """Return ``E|max(x*, 0)|``, the mean over images of the Euclidean norm of the target's positive part.

    Of a target without any value above 0, that of the whole.
    """
    positive = target.clamp(min=0)
    norm = float((positive if bool(positive.any()) else target).flatten(1).norm(dim=1).mean())
    return norm if math.isfinite(norm) else math.nan
