"""Which layers of a network a descriptor measures, and how many channels each has.

The layers are found in the network's graph (:mod:`partlens.network.graph`); a network without one is run on a blank
image, and its modules are seen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from partlens.errors import LayerError, expected, first_line
from partlens.network.borrowed import borrowed, in_this_thread
from partlens.network.graph import ACTIVATIONS, Graph
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.selection.descriptors import channels_only
from partlens.selection.record import DescriptorConfig, FeatureIndex

# Modules that hand on what they got: at test time, or in another shape. Their channels would be counted twice.
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_SAME_VALUES = (*_DROPOUTS, nn.Identity, nn.Flatten, nn.Unflatten)
_WEIGHTED = (nn.Linear, nn.Conv2d)


_Kind = Literal["activation", "convolution", "weights", "same", "other"]


@dataclass(frozen=True)
class _Output:
    """A layer whose output can be read: its tap name, what it is, and the shape of its output."""

    name: str
    kind: _Kind
    shape: tuple[int, ...]


def _kind_of(module: nn.Module | None, *, activation: bool) -> _Kind:
    if activation:
        return "activation"
    if isinstance(module, nn.Conv2d):
        return "convolution"
    if isinstance(module, nn.Linear):
        return "weights"
    return "same" if isinstance(module, _SAME_VALUES) else "other"


def _unchanged(module: nn.Module, before: Any, after: Any) -> bool:
    """Whether an adaptive pooling has nothing to do at this input size."""
    return isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)) and before == after


def _traced_outputs(traced: Graph, size: tuple[int, int]) -> list[_Output]:
    """List outputs before the class scores, from the network's graph."""
    shapes = traced.shapes(size)
    live, containers = traced.ancestors([traced.last]) - _scores_on(traced), _containers(traced)
    found = []
    for node in traced.nodes:
        shape = shapes.get(node)
        if node not in live or node is traced.input or not isinstance(shape, torch.Size) or len(shape) not in {2, 4}:
            continue
        module = None
        name = containers.get(node)
        if node.op == "call_module":
            name, module = traced.names[node], traced.leaf(node)
            if _unchanged(module, shapes.get(node.all_input_nodes[0]) if node.all_input_nodes else None, shape):
                continue
        if name is not None:
            found.append(_Output(name, _kind_of(module, activation=traced.is_activation(node)), tuple(shape)))
    return found


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


def _blank(performer: Performer) -> Tensor:
    """Return a blank image of the network's input size, channels and kind."""
    module = performer.module
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    channels = first.in_channels if first is not None else 3
    return torch.zeros(1, channels, *performer.preprocessing.size_px, dtype=weight.dtype, device=weight.device)


def _hooked_outputs(performer: Performer) -> list[_Output]:
    """List the outputs of modules without submodules, by running a blank image; for networks without a graph."""
    noted: list[_Output] = []
    calls: Counter[str] = Counter()

    def note(path: str, owner: nn.Module, inputs: Any, output: Any) -> None:
        call = calls[path]
        calls[path] += 1
        if not isinstance(output, Tensor) or output.ndim not in {2, 4}:
            return
        if not _unchanged(owner, getattr(inputs[0], "shape", None) if inputs else None, output.shape):
            kind = _kind_of(owner, activation=isinstance(owner, ACTIVATIONS))
            noted.append(_Output(path if call == 0 else f"{path}_{call}", kind, tuple(output.shape)))

    with borrowed(performer.module, copy_weights=False) as network, torch.no_grad():
        leaves = [(path, child) for path, child in network.named_modules() if path and not [*child.children()]]
        handles = [child.register_forward_hook(in_this_thread(partial(note, path))) for path, child in leaves]
        try:
            network(_blank(performer))
        except (RuntimeError, ValueError) as error:
            rows, cols = performer.preprocessing.size_px
            rule = f"an input size that {type(network).__name__} accepts"
            remedy = "Give the preprocessing of the network"
            raise LayerError(expected(rule, f"{rows}x{cols} px ({first_line(error)})", remedy)) from error
        finally:
            for handle in handles:
                handle.remove()
    weighted = [i for i, output in enumerate(noted) if output.kind in {"convolution", "weights"}]
    return noted[: weighted[-1]] if weighted else noted


def _outputs(performer: Performer) -> list[_Output]:
    try:
        traced = performer.graph
    except LayerError:
        return _hooked_outputs(performer)
    return _traced_outputs(traced, performer.preprocessing.size_px)


def feature_index(performer: Performer, config: DescriptorConfig | None = None) -> FeatureIndex:
    """Choose the layers that a descriptor measures, in execution order, and count their channels.

    ``"outputs"`` means: the output of every module without submodules (convolution, rectifier, normalisation, pooling,
    fully connected layer), each call of it; and where an operation is written in ``forward``, what the innermost module
    around it returns, if that is the operation's result (the sum of a residual block, the concatenation of an Inception
    block, the ``F.relu`` at its end). So a convolution, its rectifier, its normalisation and its pooling are
    separate layers. Not measured are the last layer with weights (the class scores) and all that follows it; what does
    not reach the output; dropout, identity, flattening and adaptive pooling to the same size, which hand on the same
    values; outputs other than maps ``(image, filter, row, col)`` and vectors ``(image, filter)``; and operations
    inside a ``forward`` that no module returns. VGG-F has 19 such layers with 19,456 channels, MatConvNet's LeNet six
    with 1,140.

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
        _, values = forward_taps(performer, _blank(performer), names, channels_only)
        return FeatureIndex(names, tuple(values[name].shape[1] for name in names))
    wanted = {"activations": {"activation"}, "convolutions": {"convolution"}}.get(config.layers)
    found = _outputs(performer)
    chosen = [one for one in found if (one.kind in wanted if wanted else one.kind != "same")]
    if not chosen:
        rule = f"{config.layers} with modules of their own before the class scores of {performer.name}"
        raise LayerError(expected(rule, "none", "Choose outputs, or name layers in a list"))
    return FeatureIndex(tuple(one.name for one in chosen), tuple(one.shape[1] for one in chosen))
