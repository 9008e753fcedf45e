"""Which layers of a network a descriptor measures, and how many channels each has.

The layers are found in the network's graph (:mod:`partlens.network.graph`), or, where it has none, among the modules
that its forward pass calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from partlens.errors import LayerError, expected
from partlens.network.graph import ACTIVATIONS, Graph
from partlens.network.layers import UNKNOWN
from partlens.network.performer import Performer, module_of
from partlens.network.taps import forward_taps
from partlens.network.watched import place_of
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


@dataclass(frozen=True)
class _Output:
    """A layer whose output can be read: its tap name and what it is."""

    name: str
    kind: _Kind


def _kind_of(module: nn.Module | None, *, activation: bool) -> _Kind:
    if activation:
        return "activation"
    if isinstance(module, nn.Conv2d):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "weights"
    return "same" if isinstance(module, _SAME_VALUES) else "other"


def _copied(module: nn.Module, before: Any, after: Any) -> bool:
    """Whether a pooling hands on what is measured already: the same maps, or each map as one number."""
    whole = bool(before) and len(after) >= 3 and tuple(after[-2:]) == (1, 1)
    return isinstance(module, _POOLINGS) and (before == after or whole)


def _traced_outputs(performer: Performer) -> list[_Output]:
    """List outputs before the class scores, from the network's graph."""
    traced = performer.graph
    shapes = traced.shapes(performer.preprocessing.size_px)
    live, containers = traced.ancestors([traced.last]) - _scores_on(traced), _containers(traced)
    found = []
    for node in traced.nodes:
        if node not in live or node is traced.input:
            continue
        module = None
        name = containers.get(node)
        if node.op == "call_module":
            name, module = traced.names[node], traced.leaf(node)
            if _copied(module, shapes.get(node.all_input_nodes[0]) if node.all_input_nodes else None, shapes[node]):
                continue
        if name is not None:
            kind = _kind_of(module, activation=traced.is_activation(node))
            normalised = kind == "convolution" and _normalised_alone(traced, node)
            found.append(_Output(name, "normalised" if normalised else kind))
    return found


def _normalised_alone(traced: Graph, node: Any) -> bool:
    """Whether a convolution is read by its batch normalisation alone, which gives the same maps, scaled and shifted."""
    reader = next(iter(node.users)) if len(node.users) == 1 else node
    # Those that derive from it may do more.
    return reader.op == "call_module" and type(traced.leaf(reader)) is nn.BatchNorm2d


def _scores_on(traced: Graph) -> set[Any]:
    """Return the nodes after the last layer with weights, itself and the output of the network included."""
    live = traced.ancestors([traced.last])
    weighted = [n for n in traced.nodes if n in live and n.op == "call_module"]
    weighted = [n for n in weighted if isinstance(traced.leaf(n), _WEIGHTED)]
    return {traced.last, *(traced.descendants(weighted[-1]) if weighted else ())}


def _containers(traced: Graph) -> dict[Any, str]:
    """Return the name of the innermost module that returns each operation."""
    found: dict[Any, str] = {}
    for name, node in traced.containers.items():
        if node not in found or len(name) > len(found[node]):
            found[node] = name
    return found


def _called_outputs(performer: Performer) -> list[_Output]:
    """List the outputs of modules without submodules before the class scores; for networks without a graph."""
    network = module_of(performer)
    noted: list[_Output] = []
    before: tuple[int, ...] = ()
    for layer in performer.layers:
        module = network.get_submodule(place_of(network, layer.name).path)
        if next(module.children(), None) is not None:
            continue
        if not _copied(module, before, layer.shape):
            noted.append(_Output(layer.name, _kind_of(module, activation=isinstance(module, ACTIVATIONS))))
        before = layer.shape
    weighted = [i for i, output in enumerate(noted) if output.kind in {"convolution", "weights"}]
    return noted[: weighted[-1]] if weighted else noted


def _outputs(performer: Performer) -> list[tuple[_Output, int]]:
    """List outputs and their channels; only those of a known layout."""
    try:
        found = _traced_outputs(performer)
    except LayerError:
        found = _called_outputs(performer)
    channels = {layer.name: layer.shape[0] for layer in performer.layers if layer.layout != UNKNOWN}
    return [(one, channels[one.name]) for one in found if one.name in channels]


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

    Of a network that torch.fx cannot trace, the modules without submodules are seen, no operation of a ``forward``.

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
    chosen = [(one, count) for one, count in found if (one.kind in wanted if wanted else one.kind not in _TWICE)]
    if not chosen:
        rule = f"{config.layers} with modules of their own before the class scores of {performer.name}"
        raise LayerError(expected(rule, *performer.without_layers("Choose outputs, or name layers in a list")))
    return FeatureIndex(tuple(one.name for one, _ in chosen), tuple(count for _, count in chosen))
