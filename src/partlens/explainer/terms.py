"""The explainer's objective, term by term.

    Loss = sum_l lambda_l |x_l - x_l*|² - eta log p + sum_f lambda_f Loss_f(x_f)        (ICLR 2020, Eq. (1))

Beyond the papers, and off in the ``paper`` preset, three terms act on the *expected peak* of a map, the mean cell under
the softmax of its template scores (differentiable, and the same posterior the filter loss uses):

- *diversity*: the filters' expected peaks correlate over photos by at most ``diversity_target`` on average;
- *equivariance*: a part filter must move with the image: the peak in a crop or mirror is where the crop or mirror takes
  the peak of the photo;
- *evidence*: a part that matters stands where the performer's decision hangs on the maps
  (:mod:`partlens.explainer.evidence`).

A fourth acts on the map of conv-interp-2 itself: a filter stands where its *teacher* does
(:mod:`partlens.explainer.teachers`).

Without diversity, or teachers that differ, "every filter follows the same part" is an optimum of the filter loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.errors import InputError, expected
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.filter_loss import RunningNormaliser, filter_loss_of_scores, single_templates, template_scores
from partlens.explainer.network import Explainer, ExplainerOutput
from partlens.explainer.teachers import places_in_view, teacher_cost
from partlens.explainer.templates import cell_grid, part_templates, shuffled

TERMS = (
    "reconstruction",
    "share",
    "filter_1",
    "filter_2",
    "correlation",
    "equivariance",
    "evidence",
    "teacher",
    "classification",
    "p",
)
_MEASURE_EVERY = 8
_MEASURE_MOMENTUM = 0.7
_ACTIVITY_MOMENTUM = 0.9


class ViewPair(NamedTuple):
    """Rows of a batch that show the same photos, and how the second view was cut from the first.

    ``windows`` is (pair, 5): left, top, width and height of the crop as shares of the first view, and 1 where the
    crop was then mirrored.
    """

    first: slice
    second: slice
    windows: Float[Tensor, "pair 5"]


class BatchFacts(NamedTuple):
    """What is known of a batch's images beyond their maps.

    Attributes:
        positives: the first so many are of the category, or of one of the categories.
        pair: which of these show the same photos.
        evidence: where the performer's decision hangs on their maps.
        labels: their categories, for an explainer of several; the filters are then assigned to categories.
        taught: the cell (row, col) at which each part teacher stands, NaN where it is cut off or of another category.
    """

    positives: int
    pair: ViewPair | None = None
    evidence: Float[Tensor, "positive row col"] | None = None
    labels: Int[Tensor, " positive"] | None = None
    taught: Float[Tensor, "positive teacher 2"] | None = None


class _Group(NamedTuple):
    """Photos of one category in a batch and the filters that are theirs."""

    category: int
    rows: Tensor
    filters: Tensor
    pair: ViewPair | None
    evidence: Tensor | None
    taught: Tensor | None


def expected_peaks(
    scores: Float[Tensor, "image filter template"], rows: int, cols: int
) -> Float[Tensor, "image filter 2"]:
    """Return the mean (row, col) of each map's peak under the softmax of its positive templates' scores."""
    weight = scores[..., :-1].softmax(-1)
    return weight @ cell_grid(rows, cols, weight)


def mean_peak_correlation(peaks: Float[Tensor, "image filter 2"]) -> Float[Tensor, " axis"]:
    """Return the mean correlation over photos of the peaks of two different filters, for rows and for columns.

    Computed as ``(F |mean_f z_f|² - 1) / (F - 1)`` on standardised peaks ``z_f``, which needs no matrix of pairs. A
    tenth of a cell is added to each deviation, so that a peak that never moves correlates with nothing.
    """
    filters = peaks.shape[1]
    standard = (peaks - peaks.mean(0)) / (peaks.std(0) + 0.1)
    power = standard.mean(1).square().mean(0)
    return (filters * power - 1) / max(1, filters - 1)


def equivariance_cost(
    first: Float[Tensor, "pair filter 2"],
    second: Float[Tensor, "pair filter 2"],
    windows: Float[Tensor, "pair 5"],
    rows: int,
    cols: int,
) -> Float[Tensor, ""]:
    """Return the sum over filters of the mean distance (cells) between a peak and where the crop should have put it.

    Peaks that the crop cuts off are left out. The distance is Huber-like (``sqrt(1 + d²) - 1``).
    """
    side = torch.tensor([rows, cols], dtype=first.dtype, device=first.device)
    y, x = places_in_view((first + 0.5) / side, windows).unbind(-1)
    margin = 0.02
    inside = ((x > margin) & (x < 1 - margin) & (y > margin) & (y < 1 - margin)).detach().to(x.dtype)
    d2 = ((second[..., 1] + 0.5) - x * cols).square() + ((second[..., 0] + 0.5) - y * rows).square()
    distance = (1 + d2).sqrt() - 1
    return ((distance * inside).sum(0) / inside.sum(0).clamp(min=1)).sum()


def evidence_cost(
    scores: Float[Tensor, "image filter template"], evidence: Float[Tensor, "image row col"]
) -> Float[Tensor, " filter"]:
    """Return ``mean_x -log sum_mu q(mu|x) e(mu)`` in nats, ``q`` the posterior of the positive templates."""
    weight = scores[..., :-1].softmax(-1)
    met = torch.einsum("ift,it->if", weight, evidence.flatten(1).to(weight.dtype))
    return -met.clamp(min=1e-6).log().mean(0)


@dataclass
class Objective:
    """The objective with its running measurements; all of them are part of a checkpoint.

    Attributes:
        config: the weights.
        explainer: the network it is computed for.
        target_norms: E|max(x*, 0)| of each target.
        categories: how many categories the filters are shared among.
        head: the performer from the last target to its output, for ``objective="classification"``.
        outputs: the performer's output of each category, for the same.
        epoch: number N of the running epoch, from 1; the filter loss weighs ``filter_ratio / N ** filter_decay``.
        state: running tensors by name.
    """

    config: ExplainerConfig
    explainer: Explainer
    target_norms: tuple[float, ...]
    categories: int = 1
    head: nn.Module | None = None
    outputs: tuple[int, ...] = (0,)
    epoch: int = 1
    step: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the templates."""
        rows, cols = self.explainer.structure.side_cells
        templates = part_templates(rows, cols, beta=self.config.beta, tau=self.config.tau_cells / (rows * cols))
        self._templates = shuffled(templates, self.config.seed) if self.config.templates == "shuffled" else templates

    def to(self, device: torch.device) -> None:
        """Move what the objective holds; the explainer is moved by its owner."""
        self._templates = self._templates.to(device)
        self.state = {name: value.to(device) for name, value in self.state.items()}
        if self.head is not None:
            self.head.to(device)

    def reconstruction(self, output: ExplainerOutput, targets: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        """Return ``sum_l lambda_l |x_l - x_l*|²``, the mean over images, ``lambda_l = 5e4 / E|max(x*, 0)|``."""
        total = output.p.new_zeros(())
        for value, target, norm in zip(output.reconstructions, targets, self.target_norms, strict=True):
            weight = self.config.reconstruction_weight / max(norm, 1e-12)
            total = total + weight * (value.float() - target).square().flatten(1).sum(1).mean()
        return total

    def share(self, output: ExplainerOutput) -> Float[Tensor, ""]:
        """Return ``-eta log p``."""
        return -self.config.eta * output.p.log()

    def _scale(self, scores: Tensor, name: str, filters: Tensor) -> Tensor:
        """Return what to multiply each filter's scores by, so that its best template scores ``score_scale_nats``.

        The mean over the filter's own photos, running over batches. Scores are linear in the maps, so this is the
        same as scaling the maps.
        """
        if self.config.score_scale_nats == 0:
            return scores.new_ones(scores.shape[1])
        with torch.no_grad():
            largest = scores.amax(-1)
            # The best score of a map without a peak is negative; a tenth of the scores' range stands in for it, or the
            # factor would be without bounds.
            best = torch.maximum(largest, 0.1 * (largest - scores.amin(-1))).mean(0)
            key = f"scale.{name}"
            if key not in self.state:
                self.state[key] = best.new_full((self._filters(name),), math.nan)
            past = self.state[key][filters]
            running = torch.where(past.isnan(), best, 0.9 * past + 0.1 * best)
            self.state[key] = self.state[key].index_copy(0, filters, running)
            return self.config.score_scale_nats / running.clamp(min=1e-6 * float(running.mean()) + 1e-12)

    def _filters(self, layer: str) -> int:
        """Return how many filters an interpretable layer has."""
        return (self.explainer.conv_interp_1 if layer == "1" else self.explainer.conv_interp_2).out_channels

    def _normaliser(self, scores: Tensor, name: str, filters: Tensor) -> RunningNormaliser | None:
        if self.config.normaliser == "batch":
            return None
        key = f"normaliser.{name}"
        if key not in self.state:
            self.state[key] = scores.new_full((self._filters(name), scores.shape[2]), math.nan)
        past = self.state[key][filters]
        started = RunningNormaliser.started(scores)
        # A filter that has just come to this category starts afresh.
        known = ~past.isnan().any(1, keepdim=True)
        mixed = RunningNormaliser(torch.where(known, past, started.log_mean)).updated(scores).log_mean
        fresh = torch.where(known, mixed, started.log_mean)
        self.state[key] = self.state[key].index_copy(0, filters, fresh)
        return RunningNormaliser(fresh)

    def assigned(self, layer: str) -> Int[Tensor, " filter"]:
        """Return the category of each filter of a layer: the one whose photos excite it most (CVPR 2018, Sec. 3.1).

        ``argmax_c mean over photos of c of sum_ij x_ij``, the means running over batches and so re-assigned with each.
        """
        # A category that no batch has shown yet excites no filter.
        return self.state[f"activity.{layer}"].nan_to_num(nan=-1.0).argmax(1)

    @torch.no_grad()
    def _follow_activity(self, layer: str, maps: Tensor, labels: Tensor) -> None:
        """Mix a batch into the running mean of ``sum_ij x_ij`` per filter and category (EMA 0.9, as released)."""
        total = maps[: len(labels)].detach().float().sum((2, 3))
        count = int(labels.max()) + 1
        key = f"activity.{layer}"
        past = self.state.get(key)
        width = max(count, self.categories)
        means = total.new_zeros(maps.shape[1], width)
        seen = torch.bincount(labels, minlength=width)
        means.index_add_(1, labels, total.t())
        means = means / seen.clamp(min=1)
        past = torch.full_like(means, math.nan) if past is None else past
        mixed = torch.where(past.isnan(), means, _ACTIVITY_MOMENTUM * past + (1 - _ACTIVITY_MOMENTUM) * means)
        self.state[key] = torch.where(seen > 0, mixed, past)

    def _groups(self, layer: str, maps: Tensor, batch: BatchFacts) -> list[_Group]:
        """Split a batch by category: which photos are positive for which filters."""
        positives = batch.positives
        if batch.labels is None:
            everything = torch.arange(maps.shape[1], device=maps.device)
            rows = torch.arange(positives, device=maps.device)
            return [_Group(0, rows, everything, batch.pair, batch.evidence, batch.taught)]
        self._follow_activity(layer, maps, batch.labels)
        assigned = self.assigned(layer)
        found = []
        for category in range(self.categories):
            rows = (batch.labels == category).nonzero()[:, 0]
            filters = (assigned == category).nonzero()[:, 0]
            if len(rows) < 2 or not len(filters):
                continue
            pair = batch.pair
            if pair is not None:
                # Both halves of the batch show the same photos in the same order.
                kept = rows[rows < len(pair.windows)]
                half = len(kept)
                pair = ViewPair(slice(0, half), slice(half, 2 * half), pair.windows[kept])
            evidence, taught = (None if t is None else t[rows] for t in (batch.evidence, batch.taught))
            found.append(_Group(category, rows, filters, pair, evidence, taught))
        return found

    def _layer_cost(self, name: str, maps: Tensor, batch: BatchFacts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cost per filter of one interpretable layer and its logged terms."""
        config = self.config
        positives = batch.positives
        used = maps.float() if config.filter_background else maps[:positives].float()
        scores = template_scores(used, self._templates)
        total = scores.new_zeros(scores.shape[1])
        logged: dict[str, list[Tensor]] = {}
        for group in self._groups(name, maps, batch):
            rows = torch.arange(len(used), device=used.device) if config.filter_background else group.rows
            whole = len(rows) == len(used) and len(group.filters) == scores.shape[1]
            own = scores if whole else scores[rows][:, group.filters]
            positive = own[: len(group.rows)] if whole else scores[group.rows][:, group.filters]
            factor = self._scale(positive.detach(), name, group.filters)[:, None]
            own, positive = own * factor, positive * factor
            chosen = None
            if config.gradient == "approximate":
                present = torch.isin(rows, group.rows)
                chosen = single_templates(used if whole else used[rows][:, group.filters], present)
            loss = filter_loss_of_scores(
                own, normaliser=self._normaliser(own.detach(), name, group.filters), chosen=chosen
            )
            logged.setdefault(f"filter_{name}", []).append(loss.detach())
            extra, terms = self._beyond_the_papers(positive, group)
            if name == "2" and group.taught is not None:
                own_maps = maps[group.rows][:, group.filters].float()
                missed = teacher_cost(
                    own_maps, group.taught[:, self.state["teacher_of"][group.filters, group.category]]
                )
                extra = extra + config.teacher_weight * missed
                terms["teacher"] = missed.detach().mean()
            total = total.index_add(0, group.filters, loss + extra)
            if name == "2":
                for term, value in terms.items():
                    logged.setdefault(term, []).append(value.expand(len(group.filters)))
        return total, {term: torch.cat(values).mean() for term, values in logged.items()}

    def _beyond_the_papers(self, scores: Tensor, group: _Group) -> tuple[Tensor, dict[str, Tensor]]:
        """Return diversity, equivariance and evidence of a group's photos and filters, per filter."""
        config = self.config
        rows, cols = self.explainer.structure.side_cells
        extra = scores.new_zeros(scores.shape[1])
        terms: dict[str, Tensor] = {}
        if config.diversity_weight > 0 or config.equivariance_weight > 0:
            peaks = expected_peaks(scores, rows, cols)
            correlation = mean_peak_correlation(peaks)
            terms["correlation"] = correlation.detach().mean()
            extra = extra + config.diversity_weight * (correlation - config.diversity_target).clamp(min=0).sum()
            if config.equivariance_weight > 0 and group.pair is not None:
                pair = group.pair
                moved = equivariance_cost(peaks[pair.first], peaks[pair.second], pair.windows, rows, cols)
                extra = extra + config.equivariance_weight * moved / len(extra)
                terms["equivariance"] = moved.detach() / len(extra)
        if config.evidence_weight > 0 and group.evidence is not None:
            missed = evidence_cost(scores, group.evidence)
            extra = extra + config.evidence_weight * missed
            terms["evidence"] = missed.detach().mean()
        return extra, terms

    def interpretable(
        self, output: ExplainerOutput, batch: BatchFacts, *, mix: bool
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Return the logged terms and, for each interpretable layer, the cost per filter in nats.

        Args:
            output: of a batch whose first ``batch.positives`` images are of the category, or of the categories.
            batch: what is known of its images.
            mix: apply the second layer's loss to ``p x_f + (1 - p) x_ordin``.
        """
        second = self.explainer.mixed_maps(output.interp2, output.ordin) if mix else output.interp2
        first_cost, logged = self._layer_cost("1", output.interp1, batch)
        second_cost, terms = self._layer_cost("2", second, batch)
        return logged | terms, (first_cost, second_cost)

    def _measure(self, reconstruction: Tensor, output: ExplainerOutput, costs: tuple[Tensor, Tensor]) -> None:
        """Measure ``E|dLoss_rec/dx_f| / E|dLoss_f/dx_f|`` per filter of both layers (ICLR 2020, App. I)."""
        layers = (output.interp1, output.interp2)
        pulled = torch.autograd.grad(reconstruction, layers, retain_graph=True)
        for name, maps, pull, cost in zip("12", layers, pulled, costs, strict=True):
            (push,) = torch.autograd.grad(cost.sum(), maps, retain_graph=True)
            ratio_parts = (pull, push)
            for label, gradient in zip(("pull", "push"), ratio_parts, strict=True):
                size = gradient.detach().float().flatten(2).norm(dim=2).mean(0)
                past = self.state.get(f"{label}.{name}")
                mixed = size if past is None else _MEASURE_MOMENTUM * past + (1 - _MEASURE_MOMENTUM) * size
                self.state[f"{label}.{name}"] = mixed

    def filter_weights(self, layer: str) -> Float[Tensor, " filter"]:
        """Return lambda_f of a layer: ``filter_ratio / N^decay * E|dLoss_rec/dx_f| / E|dLoss_f/dx_f|``."""
        pull, push = self.state[f"pull.{layer}"], self.state[f"push.{layer}"]
        # Filters whose loss has no gradient (dead on this data) would get an unbounded weight for nothing.
        push = push.clamp(min=1e-3 * float(push.mean()) + 1e-30)
        strength: float = self.config.filter_ratio / self.epoch**self.config.filter_decay
        return strength * pull / push

    def warmup(self, output: ExplainerOutput, batch: BatchFacts) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the interpretable track's own cost, for passes in which nothing else learns."""
        logged, costs = self.interpretable(output, batch, mix=False)
        self.step += 1
        return costs[0].sum() + costs[1].sum(), logged

    def decision(self, output: ExplainerOutput, batch: BatchFacts) -> Float[Tensor, ""]:
        """Return the weighted classification loss of the fed-back reconstruction, the mean over images in nats.

        Explainer+cls (ICLR 2020, Table 10): it takes the reconstruction's place and needs labels. The loss is that
        of the performers: logistic per output. A batch's background is no category.

        Raises:
            InputError: no layers after the targets are known, or outputs that are not the categories.
        """
        if self.head is None:
            raise InputError(
                expected("the performer's upper layers for objective=classification", "none", "Give head= to training")
            )
        scores = self.head(output.reconstructions[-1].float())  # in training the decoder may run in bfloat16
        scores = (scores[0] if isinstance(scores, tuple) else scores).float()
        wanted = torch.zeros_like(scores)
        own = torch.zeros(batch.positives, dtype=torch.long, device=scores.device)
        columns = torch.tensor(self.outputs, device=scores.device)[own if batch.labels is None else batch.labels]
        wanted[torch.arange(batch.positives, device=scores.device), columns] = 1
        losses = F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")[:, list(self.outputs)].sum(1)
        return self.config.classification_weight * losses.mean()

    def joint(
        self, output: ExplainerOutput, targets: tuple[Tensor, ...], batch: BatchFacts
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the whole objective divided by 1e6 (Adam does not see the scale; logs stay readable)."""
        reconstruction = self.reconstruction(output, targets)
        fidelity = self.decision(output, batch) if self.config.objective == "classification" else reconstruction
        share = self.share(output)
        logged, costs = self.interpretable(output, batch, mix=self.config.filter_mix)
        total = fidelity + share
        if output.interp1.requires_grad:  # a track that is held has nothing to learn from its own terms
            if self.step % _MEASURE_EVERY == 0 or "pull.1" not in self.state:
                self._measure(fidelity, output, costs)
            for layer, cost in zip("12", costs, strict=True):
                total = total + (self.filter_weights(layer) * cost).sum()
        logged |= {
            "reconstruction": reconstruction.detach(),
            "share": share.detach(),
            "p": output.p.detach(),
        }
        if self.config.objective == "classification":
            logged["classification"] = fidelity.detach()
        self.step += 1
        return total / 1e6, logged


def target_norm(target: Float[Tensor, "image ..."]) -> float:
    """Return ``E|max(x*, 0)|``, the mean over images of the Euclidean norm of the target's positive part."""
    norm = float(target.clamp(min=0).flatten(1).norm(dim=1).mean())
    return norm if math.isfinite(norm) else math.nan
