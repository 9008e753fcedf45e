"""Explanation of one prediction: the relevant features that contributed most, and where each of them acted.

The descriptor ``x`` of the image (:mod:`partlens.selection.descriptors`) and the weights ``w`` of the explained class
give each feature's contribution ``r = w * x``, elementwise. The features with the largest positive contributions are
propagated back to the image, each from the activation map of its own channel alone, by guided backpropagation with
strides resampled (:mod:`partlens.attribution.backprop`); the maps are scaled to [0, 1] each and joined by their
pixelwise maximum (Oramas et al. 2019; the order of the steps is that of the authors' code, which shows three features).

All images, all explained classes and all features of one rank travel in one backward pass: images do not touch each
other in a network in eval mode, so each may start from another layer and channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from partlens.attribution.backprop import backward_signals, heat_map, scaled
from partlens.attribution.record import ExplanationConfig
from partlens.errors import InputError, expected
from partlens.network.performer import Performer
from partlens.selection.record import FeatureIndex
from partlens.selection.responses import image_descriptors

_Chooser = Callable[[Tensor, Tensor], Tensor]  # output [image, output], scores [image, class] -> classes


@dataclass(frozen=True)
class Explanations:
    """Explanations of a batch.

    Attributes:
        classes: ``[image, explained]`` the classes that were explained, as columns of the weights.
        features: ``[image, explained, rank]`` chosen features, largest contribution first; -1 where fewer contribute.
        responses: their entries of the descriptor ``x``.
        contributions: their ``w * x``; 0 where there is none.
        scores: ``[image, explained]`` the whole of ``w . x``.
        positive: ``[image, explained]`` the sum of all positive contributions, which shares refer to.
        maps: ``[image, explained, rank, row, col]`` in [0, 1]; zeros where there is no feature.
        combined: ``[image, explained, row, col]``, the pixelwise maximum of the maps (authors).
        output: the performer's scores, ``[image, output]``.
        notes: what a reader of the maps must know.
    """

    classes: Int[Tensor, "image explained"]
    features: Int[Tensor, "image explained rank"]
    responses: Float[Tensor, "image explained rank"]
    contributions: Float[Tensor, "image explained rank"]
    scores: Float[Tensor, "image explained"]
    positive: Float[Tensor, "image explained"]
    maps: Float[Tensor, "image explained rank row col"]
    combined: Float[Tensor, "image explained row col"]
    output: Float[Tensor, "image output"]
    notes: tuple[str, ...] = ()


def contributions(
    descriptor: Float[Tensor, "image feature"],
    weights: Float[Tensor, "feature class"],
    classes: Int[Tensor, "image explained"],
) -> Float[Tensor, "image explained feature"]:
    """Return what each feature adds to the score of each explained class: ``w * x``, elementwise.

    The authors divide by the sum of ``w``, which changes no order and no share.
    """
    return weights.T.to(descriptor.dtype)[classes] * descriptor[:, None, :]


def smoothed(maps: Float[Tensor, "*batch row col"], sigma_px: float) -> Float[Tensor, "*batch row col"]:
    """Smooth maps with a Gaussian, renormalised at the border; the maps as they are for a sigma of 0."""
    if sigma_px <= 0:
        return maps
    reach = max(1, round(3 * sigma_px))
    steps = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-(steps**2) / (2 * sigma_px**2))
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    ones = torch.ones_like(flat[:1])

    def blur(values: Tensor) -> Tensor:
        rows = F.conv2d(values, kernel.view(1, 1, -1, 1), padding=(reach, 0))
        return F.conv2d(rows, kernel.view(1, 1, 1, -1), padding=(0, reach))

    return (blur(flat) / blur(ones)).reshape(maps.shape)


def _rounds(
    features: Int[Tensor, "image explained rank"], index: FeatureIndex
) -> list[dict[str, Float[Tensor, "image filter"]]]:
    """Return one start per explained class and rank: by layer, a one for each image's channel."""
    images, explained, ranks = features.shape
    rounds = []
    for column in range(explained):
        for rank in range(ranks):
            start: dict[str, Tensor] = {}
            for image, feature in enumerate(features[:, column, rank].tolist()):
                if feature < 0:
                    continue
                layer, channel = index.place(feature)
                if layer not in start:
                    start[layer] = torch.zeros(images, index.channels[index.layers.index(layer)])
                start[layer][image, channel] = 1.0
            rounds.append(start)
    return rounds


def explain_batch(
    performer: Performer,
    batch: Float[Tensor, "image channel row col"],
    weights: Float[Tensor, "feature class"],
    index: FeatureIndex,
    classes: Int[Tensor, "image explained"] | _Chooser,
    config: ExplanationConfig | None = None,
) -> Explanations:
    """Explain a batch of images.

    Args:
        performer: the network; left as it was.
        batch: its input.
        weights: relevance of each feature for each class, as the μ-lasso gave them.
        index: which layer and channel each feature is.
        classes: columns of ``weights`` to explain, per image; or what chooses them, such as :func:`choose_top`.
        config: how to explain; the authors' way by default.
    """
    config = config or ExplanationConfig()
    if weights.shape[0] != index.size:
        rule = f"weights of {index.size} features"
        raise InputError(expected(rule, f"{weights.shape[0]}", "Use the weights' own feature index"))
    x, output = image_descriptors(performer, batch, index)
    chosen_classes = classes if isinstance(classes, Tensor) else classes(output, x.double() @ weights.double())
    parts = contributions(x.double(), weights.double(), chosen_classes)
    positive = parts.clamp(min=0)
    # A stable order makes ties deterministic: the earlier feature wins.
    order = positive.argsort(dim=2, descending=True, stable=True)[..., : min(config.features, index.size)]
    chosen = positive.gather(2, order)
    features = torch.where(chosen > 0, order, -1)
    notes: list[str] = []
    maps = heat_map(_signals(performer, batch, features, index, config, notes.append))
    if config.smooth_frac > 0:
        maps = scaled(smoothed(maps, config.smooth_frac * min(batch.shape[-2:])))
    return Explanations(
        classes=chosen_classes,
        features=features,
        responses=x.gather(1, order.flatten(1)).view(order.shape).to(torch.float64) * (chosen > 0),
        contributions=chosen,
        scores=parts.sum(2),
        positive=positive.sum(2),
        maps=maps,
        combined=maps.amax(dim=2),
        output=output,
        notes=tuple(notes),
    )


def _signals(
    performer: Performer,
    batch: Tensor,
    features: Int[Tensor, "image explained rank"],
    index: FeatureIndex,
    config: ExplanationConfig,
    tell: Callable[[str], None],
) -> Float[Tensor, "image explained rank channel row col"]:
    """Propagate every chosen feature back; classes without one get zeros."""
    _, explained, ranks = features.shape
    rounds = _rounds(features, index)
    signals = torch.zeros(len(rounds), *batch.shape, dtype=torch.float32)
    live = [i for i, start in enumerate(rounds) if start]
    if live:
        signals[live] = backward_signals(
            performer,
            batch,
            [rounds[i] for i in live],
            rule=config.rule,
            fix_strides=config.fix_strides,
            pooling=config.pooling,
            tell=tell,
        ).to(signals)
    return signals.view(explained, ranks, *batch.shape).permute(2, 0, 1, 3, 4, 5)


def choose_top(
    outputs: Sequence[int | None], count: int, decisions: Callable[[Tensor], Tensor] = lambda output: output
) -> _Chooser:
    """Return a chooser of the classes that an image is most likely of, the most likely first.

    These are the classes of the largest outputs. Where the image is taken for an output that is none of them, and a
    class is no output, such as ``fox`` beside ``red fox``, the largest scores ``w . x`` decide.

    Args:
        outputs: the output of each class, ``None`` of one that is none.
        count: how many classes are chosen.
        decisions: scores of which the largest is the decision (`partlens.network.outputs.Outputs.decisions`).
    """
    columns = [column for column, output in enumerate(outputs) if output is not None]
    at = torch.tensor([output for output in outputs if output is not None], dtype=torch.long)

    def choose(output: Tensor, scores: Tensor) -> Tensor:
        likely = torch.full_like(scores, -torch.inf)
        likely[:, columns] = output[:, at].to(scores)
        ours = torch.isin(decisions(output).argmax(1), at) | (None not in outputs)
        values = torch.where(ours[:, None], likely, scores)
        by_scores = scores.argsort(dim=1, descending=True, stable=True)
        ranked = values.gather(1, by_scores).argsort(dim=1, descending=True, stable=True)
        return by_scores.gather(1, ranked)[:, :count]

    return choose
