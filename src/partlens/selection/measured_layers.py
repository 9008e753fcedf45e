"""Which layers of a network a descriptor measures, and how many channels each has.

The layers are found in the network's graph (:mod:`partlens.network.graph`); a network without one is run on a blank
image, and its modules are seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from partlens.errors import LayerError, expected, first_line
from partlens.network.borrowed import borrowed
from partlens.network.graph import ACTIVATIONS, Graph
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer, module_of
from partlens.selection.descriptors import channels_only
from partlens.selection.record import DescriptorConfig, FeatureIndex

# Modules that hand on what they got: at test time, or in another shape. Their channels would be counted twice.
_SAME_VALUES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
)
_WEIGHTED = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class _Output:
    """A layer whose output can be read: its tap name, what it is, and the shape of its output."""

    name: str
    kind: Literal["activation", "convolution", "weights", "same", "other"]
    shape: tuple[int, ...]


def _kind_of(
    module: nn.Module | None, *, activation: bool
) -> Literal["activation", "convolution", "weights", "same", "other"]:
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
    last = traced.last
    live = traced.ancestors([last])
    weighted = [
        n for n in traced.nodes if n in live and n.op == "call_module" and isinstance(traced.leaf(n), _WEIGHTED)
    ]
    after = traced.descendants(weighted[-1]) if weighted else set()
    after |= {last}
    containers: dict[Any, str] = {}
    for name, node in traced.containers.items():  # the innermost module stands for the operation that it returns
        if node not in containers or len(name) > len(containers[node]):
            containers[node] = name
    found = []
    for node in traced.nodes:
        if node not in live or node in after or node is traced.input:
            continue
        shape = shapes.get(node)
        if not isinstance(shape, torch.Size) or len(shape) not in {2, 4}:
            continue
        if node.op == "call_module":
            name, module = traced.names[node], traced.leaf(node)
            if _unchanged(module, shapes.get(node.all_input_nodes[0]) if node.all_input_nodes else None, shape):
                continue
        elif node in containers:
            name, module = containers[node], None
        else:
            continue
        found.append(_Output(name, _kind_of(module, activation=traced.is_activation(node)), tuple(shape)))
    return found


def _hooked_outputs(module: nn.Module, size: tuple[int, int]) -> list[_Output]:
    """List the outputs of modules without submodules, by running a blank image; for networks without a graph."""
    noted: list[_Output] = []
    calls: dict[str, int] = {}
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    blank = torch.zeros(
        1, first.in_channels if first is not None else 3, *size, dtype=weight.dtype, device=weight.device
    )
    with borrowed(module, copy_weights=False) as network, torch.no_grad():
        handles = []
        for path, child in network.named_modules():
            if not path or next(child.children(), None) is not None:
                continue

            def hook(owner: nn.Module, inputs: Any, output: Any, path: str = path) -> None:
                call = calls.get(path, 0)
                calls[path] = call + 1
                if isinstance(output, Tensor) and output.ndim in {2, 4}:
                    if _unchanged(owner, getattr(inputs[0], "shape", None) if inputs else None, output.shape):
                        return
                    kind = _kind_of(owner, activation=isinstance(owner, ACTIVATIONS))
                    noted.append(_Output(path if call == 0 else f"{path}_{call}", kind, tuple(output.shape)))

            handles.append(child.register_forward_hook(hook))
        try:
            network(blank)
        except Exception as error:
            raise LayerError(
                expected(
                    f"an input size that {type(network).__name__} accepts",
                    f"{size[0]}x{size[1]} px ({first_line(error)})",
                    "Give the preprocessing of the network",
                )
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    weighted = [i for i, output in enumerate(noted) if output.kind in {"convolution", "weights"}]
    return noted[: weighted[-1]] if weighted else noted


def _outputs(performer: Performer) -> list[_Output]:
    module = module_of(performer)
    try:
        traced = performer.graph
    except LayerError:
        return _hooked_outputs(module, performer.preprocessing.size_px)
    return _traced_outputs(traced, performer.preprocessing.size_px)


def feature_index(performer: Performer, config: DescriptorConfig | None = None) -> FeatureIndex:
    """Choose the layers to measure and count their channels, as `descriptor_layers` says.

    Args:
        performer: the network; left as it was.
        config: which layers.

    Returns:
        The index of the descriptor.

    Raises:
        LayerError: as `descriptor_layers`.
    """
    config = config or DescriptorConfig()
    if isinstance(config.layers, tuple):
        names = tuple(dict.fromkeys(config.layers))
        rows, cols = performer.preprocessing.size_px
        first = next((m for m in module_of(performer).modules() if isinstance(m, nn.Conv2d)), None)
        blank = torch.zeros(1, first.in_channels if first is not None else 3, rows, cols)
        _, values = forward_taps(performer, blank, names, channels_only)
        shapes = {name: (1, values[name].shape[1]) for name in names}
        chosen = [(name, shapes[name][1]) for name in names]
    else:
        wanted = {
            "outputs": {"activation", "convolution", "weights", "other"},
            "activations": {"activation"},
            "convolutions": {"convolution"},
        }[config.layers]
        chosen = [(output.name, output.shape[1]) for output in _outputs(performer) if output.kind in wanted]
        if not chosen:
            raise LayerError(
                expected(
                    f"{config.layers} with modules of their own before the class scores of {performer.name}",
                    "none",
                    "Choose outputs, or name layers in a tuple",
                )
            )
    return FeatureIndex(tuple(name for name, _ in chosen), tuple(channels for _, channels in chosen))


def descriptor_layers(performer: Performer, config: DescriptorConfig | None = None) -> tuple[str, ...]:
    """Name the layers that a descriptor measures, in execution order.

    ``"outputs"`` means: the output of every module without submodules (convolution, rectifier, normalisation, pooling,
    fully connected layer), each call of it; and where an operation is written in ``forward``, what the innermost module
    around it returns, if that is the operation's result (the sum of a residual block, the concatenation of an Inception
    block, the ``F.relu`` at the end of a block). So a convolution, its rectifier, its normalisation and its pooling are
    separate layers. Left out are the last layer with weights (the class scores) and all that follows it; what does not
    reach the output; dropout, identity, flattening and adaptive pooling to the size that is there, which hand on the
    same values; outputs other than maps ``(image, filter, row, col)`` and vectors ``(image, filter)``; and operations
    inside a ``forward`` that no module returns. VGG-F has 19 such layers with 19,456 channels, MatConvNet's LeNet six
    with 1,140.

    Of a network that torch.fx cannot trace, the modules without submodules are seen, no operation of a ``forward``.

    Args:
        performer: the network; left as it was. Shapes are those at its preprocessing's input size.
        config: which layers; names given by the user stay in the user's order.

    Returns:
        Tap names.

    Raises:
        LayerError: an unknown layer (with the nearest names), or no such layer.
    """
    return feature_index(performer, config).layers
