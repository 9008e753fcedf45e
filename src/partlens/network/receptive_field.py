"""Which input pixels a cell of a map can see, and where on the image a cell is located.

Coordinates are continuous: pixel ``i`` covers ``[i, i + 1)``. A cell's receptive field from pixel ``a``
through pixel ``b`` is the interval ``[a, b + 1)`` and its centre is ``(a + b + 1) / 2``. MATLAB tables that
count pixel middles from 1 (VGG-16: ``8.5 + 16 (i - 1)``) are larger by one half: the same centre is ``8.0``
here.

The field is *theoretical*: every pixel that the operations allow, weights aside, and it goes on beyond the
image where padding does. Cell ``i`` along an axis sees pixels ``start_px + stride_px · i`` to ``start_px +
stride_px · i + size_px - 1``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from partlens.errors import InputError, LayerError, expected
from partlens.network.graph import Graph, is_of_torchvision, is_size
from partlens.network.kept_hooks import KEPT_HOOKS


@dataclass(frozen=True)
class ReceptiveField:
    """Where the cells of a map look; pairs are (rows, columns).

    Args:
        stride_px: input pixels from one cell to the next; 0 where every cell sees the whole image.
        size_px: pixels one cell sees, counted beyond the image's border too.
        start_px: first pixel of cell 0; negative where padding reaches out.
        gated: whether the map is also scaled or normalised by numbers taken from the whole image (squeeze and
            excitation, instance norm). The field describes the local path alone, since that decides where a
            cell is located.
    """

    stride_px: tuple[int, int]
    size_px: tuple[int, int]
    start_px: tuple[int, int]
    gated: bool = False


@dataclass(frozen=True)
class _Field(ReceptiveField):
    """What is known on the way through the graph, too."""

    whole: bool = False  # every value sees the whole image
    channels_last: bool = False


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[-1])) if isinstance(value, (list, tuple)) else (int(value), int(value))


def _slide(field: _Field, kernel: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> _Field:
    """Slide a window over the cells."""
    jump, steps = field.stride_px, _pair(stride)
    reach = [d * (k - 1) for k, d in zip(_pair(kernel), _pair(dilation), strict=True)]
    before = [r // 2 for r in reach] if padding == "same" else _pair(0 if padding == "valid" else padding)
    return replace(
        field,
        stride_px=(jump[0] * steps[0], jump[1] * steps[1]),
        size_px=(field.size_px[0] + jump[0] * reach[0], field.size_px[1] + jump[1] * reach[1]),
        start_px=(field.start_px[0] - jump[0] * before[0], field.start_px[1] - jump[1] * before[1]),
    )


# fmt: off
_POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    nn.BatchNorm2d, nn.CELU, nn.ChannelShuffle, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU,
    nn.LocalResponseNorm, nn.CrossMapLRN2d, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU,
    nn.SiLU, nn.Sigmoid, nn.Softmax2d, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink,
    nn.Threshold,
)
# By name, because torch offers the same function in torch, torch.nn.functional and as a tensor method.
_POINTWISE_NAMES = frozenset((
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "prelu", "rrelu", "threshold", "logsigmoid", "softsign",
    "tanhshrink", "dropout", "dropout2d", "alpha_dropout", "feature_dropout", "batch_norm", "local_response_norm",
    "add", "sub", "mul", "div", "truediv", "true_divide", "pow", "square", "sqrt", "rsqrt", "abs", "neg", "exp",
    "log", "clamp", "clamp_min", "clamp_max", "clip", "contiguous", "clone", "detach", "float", "half", "double",
    "to", "type", "stochastic_depth", "maximum", "minimum", "cat", "concat", "concatenate", "channel_shuffle",
    "native_channel_shuffle", "where", KEPT_HOOKS,
))
_RESHAPES = frozenset((
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "chunk", "split", "flatten", "getitem",
    "movedim", "stack",
))
# fmt: on
_POINTWISE_TORCHVISION = frozenset(("StochasticDepth", "FrozenBatchNorm2d"))
_JOINS = _POINTWISE_NAMES | {"stack"}
_NORMS = frozenset(("layer_norm", "group_norm", "instance_norm"))
# Modules that do what a function does; their attributes carry the names of its arguments.
_FUNCTION_OF: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.Linear, "linear"),
    (nn.Flatten, "flatten"),
    (nn.LayerNorm, "layer_norm"),
    (nn.GroupNorm, "group_norm"),
    (nn.InstanceNorm2d, "instance_norm"),
    (nn.AdaptiveAvgPool2d, "adaptive_avg_pool2d"),
    (nn.AdaptiveMaxPool2d, "adaptive_max_pool2d"),
    (nn.ZeroPad2d, "pad"),
    (nn.ConstantPad2d, "pad"),
    (nn.Conv2d, "conv2d"),
    (nn.MaxPool2d, "max_pool2d"),
    (nn.AvgPool2d, "avg_pool2d"),
    (nn.LPPool2d, "avg_pool2d"),
)


class _Calculator:
    """Carry receptive fields through a graph."""

    def __init__(self, graph: Graph, nodes: Iterable[fx.Node], input_size: tuple[int, int]) -> None:
        self.graph = graph
        self.wanted = graph.ancestors(nodes)
        self.shapes = graph.shapes(input_size, self.wanted)
        self.size = input_size
        self.fields: dict[fx.Node, _Field] = {}
        self.errors: dict[fx.Node, LayerError] = {}

    def run(self) -> None:
        """Fill `fields` for the wanted nodes, in order; `errors` for unknown operations and what comes after them."""
        for node in self.graph.nodes:
            if node is self.graph.input:
                self.fields[node] = _Field((1, 1), (1, 1), (0, 0))
            elif node in self.wanted and not is_size(node) and node.op not in {"get_attr", "placeholder", "output"}:
                unknown = next((n for n in node.all_input_nodes if n in self.errors), None)
                sources = [n for n in node.all_input_nodes if n in self.fields]
                if unknown is not None:
                    self.errors[node] = self.errors[unknown]
                elif sources:
                    try:
                        self.fields[node] = self.step(node, sources)
                    except LayerError as error:
                        self.errors[node] = error

    def step(self, node: fx.Node, sources: list[fx.Node]) -> _Field:
        field = self.fields[sources[0]]
        if node.op == "call_module":
            module = self.graph.leaf(node)
            name = next((name for kind, name in _FUNCTION_OF if isinstance(module, kind)), "")
            if field.whole or _is_pointwise(module):
                return field
            return self.moved(node, name, type(module).__name__, field, sources[0])
        return self.function_step(node, _name_of(node), field, sources)

    def function_step(self, node: fx.Node, name: str, field: _Field, sources: list[fx.Node]) -> _Field:
        if len(sources) > 1 or name in _POINTWISE_NAMES:
            if name not in _JOINS:
                raise self.unknown(node, name)
            return self.joined(node, sources)
        # Resizing what sees everything makes cells of it, whose places are not known.
        if field.whole and name not in {"interpolate", "upsample"}:
            return field
        return self.moved(node, name, name, field, sources[0])

    def moved(self, node: fx.Node, name: str, shown: str, field: _Field, source: fx.Node) -> _Field:
        """An operation on one map that is not pointwise."""
        if name in _RESHAPES:
            return self.reshaped(node, name, field, source)
        if name == "linear":
            per_cell = field.channels_last and len(self.cells(source)) == 2
            return field if per_cell else self.whole(gated=field.gated)
        if name in _NORMS:  # over the whole image, but for a layer norm over the channels of channels-last maps
            axes = self.argument(node, 1, "normalized_shape", ())
            per_cell = name == "layer_norm" and field.channels_last and len(axes) == 1
            return field if per_cell else replace(field, gated=True)
        return self.spread(node, name, shown, field, source)

    def spread(self, node: fx.Node, name: str, shown: str, field: _Field, source: fx.Node) -> _Field:
        """An operation over rows and columns."""
        if field.channels_last:
            raise self.unknown(node, f"{shown} on channels-last maps")
        if name.startswith("adaptive_"):
            return self.adaptive(node, field, source)
        if name == "mean":
            return self.whole(gated=field.gated)
        if name in {"conv2d", "max_pool2d", "avg_pool2d"}:
            return self.window(node, name, field)
        if name == "pad" and (edges := self.padded(node)) is not None:
            return _slide(field, 1, padding=edges)
        raise self.unknown(node, shown)

    def window(self, node: fx.Node, name: str, field: _Field) -> _Field:
        """Convolution and pooling."""
        place, module = (3 if name == "conv2d" else 2), node.op == "call_module"
        if name == "conv2d" and not module:
            weight: Any = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            kernel = tuple(self.shapes[weight][-2:])
        else:
            kernel = self.argument(node, 1, "kernel_size")
        stride = self.argument(node, place, "stride") or (1 if name == "conv2d" else kernel)
        padding = self.argument(node, place + 1, "padding", 0)
        # The argument in this place is ``ceil_mode`` in average pooling, which has no dilation.
        dilation = 1 if name == "avg_pool2d" else self.argument(node, place + 2, "dilation", 1)
        if module and type(self.graph.leaf(node)).__module__.partition(".")[0] != "torch":
            padding = self.same_padding(node, kernel, stride, dilation)
        return _slide(field, kernel, stride, padding, dilation)

    def same_padding(self, node: fx.Node, kernel: Any, stride: Any, dilation: Any) -> tuple[int, int]:
        """Return rows above and columns to the left that a layer adds by itself, as TensorFlow's do; from its sizes."""
        sizes = zip(self.shapes[node.all_input_nodes[0]][-2:], self.shapes[node][-2:], strict=True)
        windows = zip(_pair(kernel), _pair(stride), _pair(dilation), strict=True)
        added = [
            (after - 1) * s + d * (k - 1) + 1 - before
            for (before, after), (k, s, d) in zip(sizes, windows, strict=True)
        ]
        return max(added[0], 0) // 2, max(added[1], 0) // 2

    def padded(self, node: fx.Node) -> tuple[int, int] | None:
        """Rows above and columns to the left that constant padding adds; other padding repeats cells."""
        pad = self.argument(node, 1, "padding" if node.op == "call_module" else "pad")
        if len(pad) not in {2, 4} or self.argument(node, 2, "mode", "constant") != "constant":
            return None
        return (int(pad[2]) if len(pad) == 4 else 0), int(pad[0])

    def adaptive(self, node: fx.Node, field: _Field, source: fx.Node) -> _Field:
        """Adaptive pooling: windows of one size where they divide evenly, else the whole image."""
        before, after = tuple(self.shapes[source][-2:]), tuple(self.shapes[node][-2:])
        if any(b % a for b, a in zip(before, after, strict=True)) or after == (1, 1):
            return field if before == after else self.whole(gated=field.gated)
        window = tuple(int(b // a) for b, a in zip(before, after, strict=True))
        return _slide(field, window, window)

    def joined(self, node: fx.Node, sources: list[fx.Node]) -> _Field:
        """Pointwise functions and joins: the union of what the operands see."""
        placed = [n for n in sources if not self.fields[n].whole]
        # A factor of one cell per channel is a gate: it scales the map and adds no place of its own.
        local = [n for n in placed if self.cells(n) != (1, 1)] or placed
        gated = any(self.fields[n].gated for n in sources)
        if not local:
            return self.whole(gated=gated)
        gated = gated or len(local) < len(sources)
        return replace(self.union(node, [self.fields[n] for n in local]), gated=gated)

    def union(self, node: fx.Node, fields: list[_Field]) -> _Field:
        strides = [f.stride_px for f in fields]
        if len(set(strides)) > 1:
            raise self.unknown(node, f"a join of maps with strides {strides}")
        starts, sizes = np.array([f.start_px for f in fields]), np.array([f.size_px for f in fields])
        start = starts.min(axis=0)
        size = (starts + sizes).max(axis=0) - start
        return replace(fields[0], start_px=_pair(start.tolist()), size_px=_pair(size.tolist()))

    def reshaped(self, node: fx.Node, name: str, field: _Field, source: fx.Node) -> _Field:
        """Keep the field where rows and columns stay apart; where they mix, the whole image is seen."""
        before, after = _first(self.shapes.get(source)), _first(self.shapes.get(node))
        if field.whole or not isinstance(before, torch.Size) or not isinstance(after, torch.Size):
            return field
        # Channels moved to the last place or back: cells stay cells.
        if name == "permute" and tuple(self.axes(node)) == ((0, 3, 1, 2) if field.channels_last else (0, 2, 3, 1)):
            return replace(field, channels_last=not field.channels_last)
        if not field.channels_last and self.keeps_cells(node, name, before, after):
            return field
        if name in {"flatten", "view", "reshape", "squeeze"}:
            return self.whole(gated=field.gated)
        raise self.unknown(node, f"{name} of rows or columns")

    def keeps_cells(self, node: fx.Node, name: str, before: torch.Size, after: torch.Size) -> bool:
        if len(after) < 3 or before[-2:] != after[-2:]:
            return False
        if name not in {"transpose", "permute", "movedim"}:
            return True
        axes, last = [axis % len(before) for axis in self.axes(node)], len(before) - 2
        # Equal sizes do not show that square maps were turned; the axes do.
        return axes[last:] == [last, last + 1] if name == "permute" else max(axes) < last

    def axes(self, node: fx.Node) -> list[int]:
        """Axes given as one list or as several arguments."""
        given = self.value(list(node.args[1:]))
        return list(given[0]) if isinstance(given[0], (list, tuple)) else given

    def whole(self, *, gated: bool) -> _Field:
        return _Field((0, 0), self.size, (0, 0), gated=gated, whole=True)

    def cells(self, node: fx.Node) -> tuple[int, ...]:
        """Rows and columns of a map."""
        shape = self.shapes.get(node)
        if not isinstance(shape, torch.Size) or len(shape) < 4:
            return ()
        return tuple(shape[1:3] if self.fields[node].channels_last else shape[-2:])

    def value(self, node: Any) -> Any:
        """Return an argument's value; sizes computed in the graph are known from the shape run."""
        if isinstance(node, fx.Node):
            return self.shapes.get(node)
        return type(node)(self.value(v) for v in node) if isinstance(node, (list, tuple)) else node

    def argument(self, node: fx.Node, place: int, name: str, default: Any = None) -> Any:
        """Return an argument of a function, or the attribute of that name of a module."""
        if node.op == "call_module":
            return getattr(self.graph.leaf(node), name, default)
        if name in node.kwargs:
            return self.value(node.kwargs[name])
        return self.value(node.args[place]) if len(node.args) > place else default

    def unknown(self, node: fx.Node, what: str) -> LayerError:
        rule = "operations whose receptive field is known (convolution, pooling, pointwise, joins)"
        return LayerError(expected(rule, f"{what} at {self.graph.label(node)}", "Choose a layer before it"))


def _is_pointwise(module: nn.Module) -> bool:
    return isinstance(module, _POINTWISE_MODULES) or is_of_torchvision(module, _POINTWISE_TORCHVISION)


def _name_of(node: fx.Node) -> str:
    """Name a function or method; torch's pooling functions are dispatchers with names of their own."""
    if node.target is F.max_pool2d or node.target is getattr(torch, "max_pool2d", None):
        return "max_pool2d"
    if node.target is F.adaptive_max_pool2d:
        return "adaptive_max_pool2d"
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    return name.strip("_")


def _first(shape: Any) -> Any:
    """One entry of what chunk or split gave."""
    return shape[0] if isinstance(shape, list) else shape


def _publish(field: _Field) -> ReceptiveField:
    return ReceptiveField(field.stride_px, field.size_px, field.start_px, field.gated)


def receptive_fields(graph: Graph, taps: Sequence[str], input_size: tuple[int, int]) -> dict[str, ReceptiveField]:
    """Compute the receptive fields of many taps at once; those that cannot be computed are absent."""
    nodes = {}
    for name in taps:
        with contextlib.suppress(LayerError):  # a layer that the graph does not pass has no field
            nodes[name] = graph.find(name)
    calculator = _Calculator(graph, nodes.values(), input_size)
    calculator.run()
    return {name: _publish(calculator.fields[node]) for name, node in nodes.items() if node in calculator.fields}


def receptive_field(graph: Graph, tap: str, input_size: tuple[int, int]) -> ReceptiveField:
    """Compute what the cells of a tap see, from the network's operations.

    A window of ``k`` cells with stride ``s``, padding ``p`` and dilation ``d`` over cells that start at pixel
    ``a``, see ``n`` pixels and lie ``j`` pixels apart gives cells with ``a' = a - j p``, ``n' = n + j d (k - 1)``,
    ``j' = j s``. Sums and concatenations take the union; pooling of everything and linear layers see the whole
    image; adaptive pooling whose windows differ in size counts as the whole image.

    Raises:
        LayerError: an unknown layer, or an operation whose field is not known (transposed convolution, resizing,
            attention).

    Example:
        >>> from partlens.network.graph import trace
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2))
        >>> field = receptive_field(trace(network), "1", (8, 8))
        >>> field.stride_px, field.size_px, field.start_px
        ((2, 2), (4, 4), (-1, -1))
    """
    node = graph.find(tap)
    calculator = _Calculator(graph, [node], input_size)
    calculator.run()
    if node in calculator.errors:
        raise calculator.errors[node]
    if node not in calculator.fields:
        rule = f"{tap} to depend on the image"
        raise LayerError(expected(rule, "a layer that does not", "Choose a layer on the image's path"))
    return _publish(calculator.fields[node])


def spread_evenly(cells: tuple[int, int], size: tuple[int, int]) -> ReceptiveField:
    """Return a field for cells of which nothing is known but their grid: spread over the image, seeing all of it.

    So the cells of a transformer are located: the token of a patch sees everything, but comes from its patch.

    Example:
        >>> spread_evenly((14, 14), (224, 224))
        ReceptiveField(stride_px=(16, 16), size_px=(224, 224), start_px=(-104, -104), gated=True)
    """
    stride = [round(side / count) for side, count in zip(size, cells, strict=True)]
    # The middle of the grid is that of the image.
    start = [-(step * (count - 1) // 2) for step, count in zip(stride, cells, strict=True)]
    return ReceptiveField((stride[0], stride[1]), size, (start[0], start[1]), gated=True)


def cell_centre_px(field: ReceptiveField, cells: Any) -> np.ndarray:
    """Return the middle of each cell's receptive field, which is where location instability places a peak.

    Args:
        field: of the tap.
        cells: ``[..., 2]`` as (row, col).

    Returns:
        Float64 ``[..., 2]`` as (x, y) in continuous input pixels; beyond the border where most of the field
        is.

    Raises:
        InputError: the last axis is not 2.

    Example:
        >>> vgg16 = ReceptiveField(stride_px=(16, 16), size_px=(196, 196), start_px=(-90, -90))
        >>> cell_centre_px(vgg16, [[0, 1]]).tolist()
        [[24.0, 8.0]]
    """
    places = np.asarray(cells, dtype=np.float64)
    if places.ndim < 1 or places.shape[-1] != 2:
        rule = "cells as (row, col) in the last axis"
        raise InputError(expected(rule, f"shape {places.shape}", "Stack rows and columns last"))
    centre = np.array(field.start_px) + np.array(field.size_px) / 2.0 + places * np.array(field.stride_px)
    return np.ascontiguousarray(centre[..., ::-1])


def grid_of(receptive: ReceptiveField) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return centre (row, col) of cell (0, 0) and the stride, in input pixels."""
    x, y = cell_centre_px(receptive, [0, 0]).tolist()
    return (y, x), (float(receptive.stride_px[0]), float(receptive.stride_px[1]))


def widened(receptive: ReceptiveField, cells: int) -> ReceptiveField:
    """Return what cells see that read ``cells`` more of the given map's cells on every side.

    Example:
        >>> widened(ReceptiveField((16, 16), (100, 100), (-10, -10)), 2)
        ReceptiveField(stride_px=(16, 16), size_px=(164, 164), start_px=(-42, -42), gated=False)
    """
    by = [cells * stride for stride in receptive.stride_px]
    size = receptive.size_px[0] + 2 * by[0], receptive.size_px[1] + 2 * by[1]
    start = receptive.start_px[0] - by[0], receptive.start_px[1] - by[1]
    return replace(receptive, size_px=size, start_px=start)
