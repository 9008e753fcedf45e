"""The explainer's objective, term by term.

    Loss = sum_l lambda_l |x_l - x_l*|² - eta log p + sum_f lambda_f Loss_f(x_f)        (ICLR 2020, Eq. (1))

Beyond the papers, and off in the ``paper`` preset, two terms act on the *expected peak* of a map, the mean cell under
the softmax of its template scores (differentiable, and the same posterior the filter loss uses):

- *diversity*: the filters' expected peaks correlate over photos by at most ``diversity_target`` on average;
- *equivariance*: a part filter must move with the image: the peak in a crop or mirror is where the crop or mirror takes
  the peak of the photo.

Without the first, "every filter follows the same part" is an optimum of the filter loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.filter_loss import RunningNormaliser, filter_loss_of_scores, single_templates, template_scores
from partlens.explainer.network import Explainer, ExplainerOutput
from partlens.explainer.templates import part_templates

TERMS = ("reconstruction", "share", "filter_1", "filter_2", "correlation", "equivariance", "p")
_MEASURE_EVERY = 8
_MEASURE_MOMENTUM = 0.7


class ViewPair(NamedTuple):
    """Rows of a batch that show the same photos, and how the second view was cut from the first.

    ``windows`` is (pair, 5): left, top, width and height of the crop as shares of the first view, and 1 where the
    crop was then mirrored.
    """

    first: slice
    second: slice
    windows: Float[Tensor, "pair 5"]


def expected_peaks(
    scores: Float[Tensor, "image filter template"], rows: int, cols: int
) -> Float[Tensor, "image filter 2"]:
    """Return the mean (row, col) of each map's peak under the softmax of its positive templates' scores."""
    weight = scores[..., :-1].softmax(-1)
    row = torch.arange(rows, dtype=weight.dtype, device=weight.device).repeat_interleave(cols)
    col = torch.arange(cols, dtype=weight.dtype, device=weight.device).repeat(rows)
    return weight @ torch.stack([row, col], -1)


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
    left, top, width, height, mirrored = (windows[:, None, k] for k in range(5))
    x = ((first[..., 1] + 0.5) / cols - left) / width
    x = torch.where(mirrored > 0.5, 1 - x, x)
    y = ((first[..., 0] + 0.5) / rows - top) / height
    margin = 0.02
    inside = ((x > margin) & (x < 1 - margin) & (y > margin) & (y < 1 - margin)).detach().to(x.dtype)
    d2 = ((second[..., 1] + 0.5) - x * cols).square() + ((second[..., 0] + 0.5) - y * rows).square()
    distance = (1 + d2).sqrt() - 1
    return ((distance * inside).sum(0) / inside.sum(0).clamp(min=1)).sum()


@dataclass
class Objective:
    """The objective with its running measurements; all of them are part of a checkpoint.

    Attributes:
        config: the weights.
        explainer: the network it is computed for.
        target_norms: E|max(x*, 0)| of each target.
        epoch: number N of the running epoch, from 1; the filter loss weighs ``filter_ratio / N ** filter_decay``.
        state: running tensors by name.
    """

    config: ExplainerConfig
    explainer: Explainer
    target_norms: tuple[float, ...]
    epoch: int = 1
    step: int = 0
    state: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Build the templates."""
        rows, cols = self.explainer.structure.side_cells
        self._templates = part_templates(rows, cols, beta=self.config.beta, tau=self.config.tau_cells / (rows * cols))

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

    def _scaled(self, scores: Tensor, name: str) -> Tensor:
        """Scale each filter's scores so that its best template scores ``score_scale_nats`` on average.

        Scores are linear in the maps, so this is the same as scaling the maps.
        """
        if self.config.score_scale_nats == 0:
            return scores
        with torch.no_grad():
            best = scores.amax(-1).mean(0)
            past = self.state.get(f"scale.{name}")
            self.state[f"scale.{name}"] = best if past is None else 0.9 * past + 0.1 * best
            running = self.state[f"scale.{name}"]
            factor = self.config.score_scale_nats / running.clamp(min=1e-6 * float(running.mean()) + 1e-12)
        return scores * factor[:, None]

    def _normaliser(self, scores: Tensor, name: str) -> RunningNormaliser | None:
        if self.config.normaliser == "batch":
            return None
        past = self.state.get(f"normaliser.{name}")
        fresh = RunningNormaliser.started(scores) if past is None else RunningNormaliser(past).updated(scores)
        self.state[f"normaliser.{name}"] = fresh.log_mean
        return fresh

    def interpretable(
        self, output: ExplainerOutput, positives: int, pair: ViewPair | None, *, mix: bool
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Return the logged terms and, for each interpretable layer, the cost per filter in nats.

        Args:
            output: of a batch whose first ``positives`` images are of the category.
            positives: these have parts.
            pair: which of them show the same photos.
            mix: apply the second layer's loss to ``p x_f + (1 - p) x_ordin``.
        """
        config = self.config
        rows, cols = self.explainer.structure.side_cells
        second = self.explainer.mixed_maps(output.interp2, output.ordin) if mix else output.interp2
        present = torch.arange(len(second)) < positives
        logged: dict[str, Tensor] = {}
        costs = []
        for name, maps in (("1", output.interp1), ("2", second)):
            used = maps.float() if config.filter_background else maps[:positives].float()
            scores = self._scaled(template_scores(used, self._templates), name)
            loss = filter_loss_of_scores(
                scores,
                normaliser=self._normaliser(scores.detach(), name),
                chosen=single_templates(used, present[: len(used)]) if config.gradient == "approximate" else None,
            )
            logged[f"filter_{name}"] = loss.detach().mean()
            filters = loss.shape[0]
            if config.diversity_weight > 0 or config.equivariance_weight > 0:
                peaks = expected_peaks(scores[:positives], rows, cols)
                correlation = mean_peak_correlation(peaks)
                if name == "2":
                    logged["correlation"] = correlation.detach().mean()
                    excess = (correlation - config.diversity_target).clamp(min=0).sum()
                    loss = loss + config.diversity_weight * excess
                if config.equivariance_weight > 0 and pair is not None:
                    moved = equivariance_cost(peaks[pair.first], peaks[pair.second], pair.windows, rows, cols)
                    loss = loss + config.equivariance_weight * moved / filters
                    if name == "2":
                        logged["equivariance"] = moved.detach() / filters
            costs.append(loss)
        return logged, (costs[0], costs[1])

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

    def warmup(
        self, output: ExplainerOutput, positives: int, pair: ViewPair | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the interpretable track's own cost, for passes in which nothing else learns."""
        logged, costs = self.interpretable(output, positives, pair, mix=False)
        self.step += 1
        return costs[0].sum() + costs[1].sum(), logged

    def joint(
        self, output: ExplainerOutput, targets: tuple[Tensor, ...], positives: int, pair: ViewPair | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the whole objective divided by 1e6 (Adam does not see the scale; logs stay readable)."""
        reconstruction = self.reconstruction(output, targets)
        share = self.share(output)
        logged, costs = self.interpretable(output, positives, pair, mix=self.config.filter_mix)
        if self.step % _MEASURE_EVERY == 0 or "pull.1" not in self.state:
            self._measure(reconstruction, output, costs)
        total = reconstruction + share
        for layer, cost in zip("12", costs, strict=True):
            total = total + (self.filter_weights(layer) * cost).sum()
        logged |= {
            "reconstruction": reconstruction.detach(),
            "share": share.detach(),
            "p": output.p.detach(),
        }
        self.step += 1
        return total / 1e6, logged


def target_norm(target: Float[Tensor, "image ..."]) -> float:
    """Return ``E|max(x*, 0)|``, the mean over images of the Euclidean norm of the target's positive part."""
    norm = float(target.clamp(min=0).flatten(1).norm(dim=1).mean())
    return norm if math.isfinite(norm) else math.nan
