"""Which layers of a network a descriptor measures, and how many channels each has.

The layers are found among the modules that a forward pass calls (:mod:`partlens.network.layers`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from partlens.errors import LayerError, expected
from partlens.network.layers import ACTIVATIONS, Found
from partlens.network.layout import Layout
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.selection.descriptors import channels_only
from partlens.selection.record import DescriptorConfig, FeatureIndex

# Modules that hand on what they got: at test time, or in another shape. Their channels would be counted twice.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SAME_VALUES = (*_DROPOUTS, nn.Identity, nn.Flatten, nn.Unflatten)
_POOLINGS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d)
_WEIGHTED = (nn.Linear, nn.Conv2d)


_Kind = Literal["activation", "convolution", "normalised", "weights", "same", "other"]
_TWICE = {"same", "normalised"}
"""What another layer beside it shows as well."""


def _kind_of(layer: Found, *, activation: bool) -> _Kind:
    module = layer.module
    empty = isinstance(module, nn.Sequential) and not len(module)
    idle = empty or type(module).__name__ == "DropPath" or isinstance(module, _SAME_VALUES)
    if idle or _copied(module, layer.before[1:], layer.shape):
        return "same"
    if activation:
        return "activation"
    if isinstance(module, nn.Conv2d):
        return "normalised" if layer.place.normalised else "convolution"
    return "weights" if isinstance(module, nn.Linear) else "other"


def _shows(block: Found, named: Sequence[Found], acting: Sequence[Found]) -> bool:
    """Whether a block gives something of its own: not what one of its layers gave, but for a norm with idle layers."""
    if isinstance(block.module, nn.BatchNorm2d):
        return not acting
    return not any(one.name.startswith(f"{block.name}.") for one in named)


def _copied(module: nn.Module, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a pooling hands on what is measured already: the same maps, or each map as one number."""
    whole = bool(before) and len(after) >= 2 and after[-2:] == (1, 1)
    return isinstance(module, _POOLINGS) and (before == after or whole)


def _outputs(performer: Performer) -> list[tuple[str, _Kind, int]]:
    """List outputs before the class scores, as they are made, with their channels; only those of a known layout."""
    made: dict[int, list[Found]] = {}
    for layer in performer.found:
        if layer.place.order > 0 and not layer.place.result and isinstance(layer.layout, Layout):
            made.setdefault(layer.place.order, []).append(layer)
    weighted = (layer.place.order for layer in performer.found if isinstance(layer.module, _WEIGHTED))
    scores = max(weighted, default=math.inf)
    return [each for order in sorted(made) if order < scores for each in _named(made[order])]


def _named(alike: Sequence[Found]) -> Iterator[tuple[str, _Kind, int]]:
    """Name the outputs among layers that give the same value: those without submodules, else the innermost one."""
    named = [layer for layer in alike if not [*layer.module.children()]]
    acting = [layer for layer in named if isinstance(layer.module, ACTIVATIONS)]
    around = [layer for layer in alike if layer not in named and _shows(layer, named, acting)]
    for layer in (*named, *sorted(around, key=lambda layer: -len(layer.name))[:1]):
        activation = layer in acting if acting else layer.place.activation
        yield layer.name, _kind_of(layer, activation=activation), layer.shape[0]


def feature_index(performer: Performer, config: DescriptorConfig | None = None) -> FeatureIndex:
    """Choose the layers that a descriptor measures, in execution order, and count their channels.

    ``"outputs"`` means: the output of every module without submodules (convolution, rectifier, normalisation, pooling,
    fully connected layer), each call of it; and where an operation is written in ``forward``, what the innermost module
    around it returns, if that is the operation's result (the sum of a residual block, the concatenation of an Inception
    block, the ``F.relu`` at its end). So a convolution, its rectifier, its normalisation and its pooling are
    separate layers. Not measured are the last layer with weights (the class scores) and all that follows it; what does
    not reach the output; dropout, identity, flattening and adaptive pooling to the same size, which hand on the same
    values; pooling of whole maps (``avgpool`` of ResNets) and convolutions that only a batch normalisation reads, which
    would show each filter of the layer beside it twice; outputs whose layout is not known
    (:mod:`partlens.network.layout`); and operations inside a ``forward`` that no module returns. VGG-F has 19 such
    layers with 19,456 channels, MatConvNet's LeNet six with 1,140.

    Args:
        performer: the network; left as it was. Shapes are those at its preprocessing's input size.
        config: which layers; names given by the user stay in the user's order.

    Raises:
        LayerError: an unknown layer (with the nearest names), or no such layer.
    """
    config = config or DescriptorConfig()
    if isinstance(config.layers, tuple):
        names = tuple(dict.fromkeys(config.layers))
        blank = torch.zeros(1, performer.preprocessing.channels, *performer.preprocessing.size_px)
        _, values = forward_taps(performer, blank, names, channels_only)
        return FeatureIndex(names, tuple(values[name].shape[1] for name in names))
    wanted = {"activations": {"activation"}, "convolutions": {"convolution", "normalised"}}.get(config.layers)
    found = _outputs(performer)
    chosen = [(name, count) for name, kind, count in found if (kind in wanted if wanted else kind not in _TWICE)]
    if not chosen:
        rule = f"{config.layers} with modules of their own before the class scores of {performer.name}"
        raise LayerError(expected(rule, *performer.without_layers("Choose outputs, or name layers in a list")))
    return FeatureIndex(tuple(name for name, _ in chosen), tuple(count for _, count in chosen))
