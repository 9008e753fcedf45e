"""Our heat maps for the flower benchmark: relevant features of the training flowers, explained in several variants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from partlens.attribution.backprop import scaled
from partlens.attribution.explanation import explain_batch, smoothed
from partlens.attribution.record import ExplanationConfig
from partlens.selection.relevance import label_matrix, select_relevant
from partlens.selection.responses import stream_responses
from partlens_papers.flowers.baselines import BASELINES, Method, upsampled_activation

if TYPE_CHECKING:
    from partlens.network.performer import Performer
    from partlens.selection.relevance import Selection
    from partlens_papers.flowers.sets import FlowerSet

MU = 5.0  # the authors' bound for an8Flower
SMOOTH_FRAC = 0.05  # of the side, as in our default
_BATCH = 32

VARIANTS: dict[str, ExplanationConfig] = {
    "ours (paper)": ExplanationConfig.preset("paper"),
    "ours (paper), strides as they are": ExplanationConfig.preset("paper", fix_strides=False),
    "ours (default)": ExplanationConfig.preset("partlens"),
}
"""The published configuration, the same without its stride fix, and the default."""


def smoothed_baselines() -> dict[str, Method]:
    """Return the guided baselines with the smoothing of our default, so that it alone decides no comparison."""

    def soft(method: Method) -> Method:
        def smooth(performer: Performer, batch: Tensor, classes: Tensor) -> Tensor:
            return scaled(smoothed(method(performer, batch, classes), SMOOTH_FRAC * min(batch.shape[-2:])))

        return smooth

    return {f"{name}, smoothed": soft(method) for name, method in BASELINES.items() if "guided" in name.lower()}


def select_on_training(performer: Performer, flowers: FlowerSet, *, images_per_class: int = 250) -> Selection:
    """Fit the relevant features on training flowers, whose columns are the performer's outputs in order.

    Args:
        performer: with one output per class.
        flowers: the set.
        images_per_class: training flowers used of each class, the first ones.
    """
    rows: list[int] = []
    for name in flowers.classes:
        rows += flowers.images.indices(category=name, split="train")[:images_per_class]
    images = flowers.images.take(sorted(rows))
    responses = stream_responses(performer, images)
    labels = label_matrix(images.categories, lambda _: None, flowers.classes)
    return select_relevant(torch.from_numpy(np.array(responses.descriptor)), labels, responses.index, MU)


def explanation_method(selection: Selection, config: ExplanationConfig) -> Method:
    """Return a heat map of the benchmark's form: the combined map of the class's relevant features."""

    def method(performer: Performer, batch: Tensor, classes: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(batch), _BATCH):
            part = slice(start, start + _BATCH)
            found = explain_batch(
                performer,
                batch[part],
                selection.weights,
                selection.index,
                classes[part, None],
                config,
            )
            parts.append(found.combined[:, 0])
        return torch.cat(parts)

    return method


def relevant_feature_methods(
    variants: Mapping[str, ExplanationConfig] | None = None, *, images_per_class: int = 250
) -> Callable[[Performer, FlowerSet], Mapping[str, Method]]:
    """Return the maker of our methods that :func:`partlens_papers.flowers.benchmark.flower_benchmark` takes.

    Args:
        variants: configurations by name; :data:`VARIANTS` by default.
        images_per_class: training flowers of each class the features are selected on.
    """

    def make(performer: Performer, flowers: FlowerSet) -> Mapping[str, Method]:
        selection = select_on_training(performer, flowers, images_per_class=images_per_class)
        made: dict[str, Method] = {
            name: explanation_method(selection, config) for name, config in (variants or VARIANTS).items()
        }
        made["upsampled relevant activations"] = _upsampled(selection)
        return made

    return make


def _upsampled(selection: Selection) -> Method:
    """Return the later ports' map: the relevant features' activations, enlarged, without a backward pass."""
    chosen: dict[int, Sequence[tuple[str, int]]] = {
        column: [(layer, channel) for layer, channel, _ in selection.relevant(column)]
        for column in range(len(selection.classes))
    }

    def method(performer: Performer, batch: Tensor, classes: Tensor) -> Tensor:
        return upsampled_activation(performer, batch, classes, chosen=chosen)

    return method
