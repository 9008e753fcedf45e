"""Which input pixels a cell of a map can see, and where on the image a cell stands.

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
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from partlens.errors import InputError, LayerError, expected
from partlens.network.graph import Graph, is_of_torchvision, is_size


@dataclass(frozen=True)
class ReceptiveField:
    """Where the cells of a map look; pairs are (rows, columns).

    Args:
        stride_px: input pixels from one cell to the next; 0 where every cell sees the whole image.
        size_px: pixels one cell sees, counted beyond the image's border too.
        start_px: first pixel of cell 0; negative where padding reaches out.
        gated: whether the map is also scaled or normalised by numbers taken from the whole image (squeeze and
            excitation, instance norm). The field describes the local path alone, since that decides where a
            cell stands.
    """

    stride_px: tuple[int, int]
    size_px: tuple[int, int]
    start_px: tuple[int, int]
    gated: bool = False


@dataclass(frozen=True)
class _Axis:
    """Cells along one axis: cell ``i`` sees pixels ``low + jump·i`` to ``high + jump·i``."""

    jump: int
    low: int
    high: int

    def slide(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> _Axis:
        """Slide a window over the cells."""
        reach = dilation * (kernel - 1)
        return _Axis(self.jump * stride, self.low - self.jump * padding, self.high + self.jump * (reach - padding))


@dataclass(frozen=True)
class _Field:
    row: _Axis
    col: _Axis
    whole: bool = False  # every value sees the whole image
    gated: bool = False
    channels_last: bool = False


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)):
        return (int(value[0]), int(value[-1]))
    return int(value), int(value)


def _slide(field: _Field, kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> _Field:
    k, s, d = _pair(kernel), _pair(stride), _pair(dilation)
    if padding == "same":
        p = (d[0] * (k[0] - 1) // 2, d[1] * (k[1] - 1) // 2)
    else:
        p = (0, 0) if padding == "valid" else _pair(padding)
    return replace(field, row=field.row.slide(k[0], s[0], p[0], d[0]), col=field.col.slide(k[1], s[1], p[1], d[1]))


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
    "native_channel_shuffle", "where",
))
_RESHAPES = frozenset((
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "chunk", "split", "flatten", "getitem",
    "movedim", "stack",
))
# fmt: on
_POINTWISE_TORCHVISION = frozenset(("StochasticDepth", "FrozenBatchNorm2d"))
_GLOBAL_NORMS = frozenset(["group_norm", "instance_norm"])


class _Calculator:
    """Carry receptive fields through a graph."""

    def __init__(self, graph: Graph, shapes: dict[fx.Node, Any], input_size: tuple[int, int]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.size = input_size
        self.fields: dict[fx.Node, _Field] = {}

    def run(self, wanted: set[fx.Node]) -> None:
        """Fill `fields` for the wanted nodes; a node behind an unknown operation stays absent."""
        for node in self.graph.nodes:
            if node is self.graph.input:
                self.fields[node] = _Field(_Axis(1, 0, 0), _Axis(1, 0, 0))
            elif node in wanted and not is_size(node) and node.op not in {"get_attr", "placeholder", "output"}:
                sources = [n for n in node.all_input_nodes if n in self.fields]
                if sources:
                    self.fields[node] = self.step(node, sources)

    def step(self, node: fx.Node, sources: list[fx.Node]) -> _Field:
        field, source = self.fields[sources[0]], sources[0]
        if node.op == "call_module":
            return self.module_step(node, self.graph.leaf(node), field, source)
        name = _name_of(node)
        if len(sources) > 1 or name in _POINTWISE_NAMES:
            return self.joined(node, name, sources)
        if field.whole and name not in {"interpolate", "upsample"}:
            return field
        return self.function_step(node, name, field, source)

    def module_step(self, node: fx.Node, module: nn.Module, field: _Field, source: fx.Node) -> _Field:
        if field.whole or isinstance(module, _POINTWISE_MODULES) or is_of_torchvision(module, _POINTWISE_TORCHVISION):
            return field
        if isinstance(module, nn.Linear):
            return self.linear(field, source)
        if isinstance(module, nn.Flatten):
            return self.reshaped(node, "flatten", field, source)
        if isinstance(module, nn.LayerNorm):
            return self.layer_norm(field, module.normalized_shape)
        if field.channels_last:
            raise self.unknown(node, f"{type(module).__name__} on channels-last maps")
        if isinstance(module, (nn.GroupNorm, nn.InstanceNorm2d)):
            return replace(field, gated=True)
        if isinstance(module, (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)):
            return self.adaptive(node, field, source)
        if isinstance(module, (nn.ZeroPad2d, nn.ConstantPad2d)):
            left, _, top, _ = module.padding
            return _padded(field, int(left), int(top))
        return self.window_module(node, module, field)

    def window_module(self, node: fx.Node, module: nn.Module, field: _Field) -> _Field:
        """A module that slides a window: convolution or pooling."""
        if isinstance(module, nn.Conv2d):
            return _slide(field, module.kernel_size, module.stride, module.padding, module.dilation)
        if isinstance(module, nn.MaxPool2d):
            stride = module.stride if module.stride is not None else module.kernel_size
            return _slide(field, module.kernel_size, stride, module.padding, module.dilation)
        if isinstance(module, (nn.AvgPool2d, nn.LPPool2d)):
            padding = module.padding if isinstance(module, nn.AvgPool2d) else 0
            return _slide(field, module.kernel_size, module.stride or module.kernel_size, padding)
        raise self.unknown(node, type(module).__name__)

    def function_step(self, node: fx.Node, name: str, field: _Field, source: fx.Node) -> _Field:
        if name in _RESHAPES:
            return self.reshaped(node, name, field, source)
        if name == "linear":
            return self.linear(field, source)
        if name == "layer_norm":
            return self.layer_norm(field, self.argument(node, 1, "normalized_shape", ()))
        if name in _GLOBAL_NORMS:
            return replace(field, gated=True)
        if field.channels_last:
            raise self.unknown(node, f"{name} on channels-last maps")
        if name in {"adaptive_avg_pool2d", "adaptive_max_pool2d"}:
            return self.adaptive(node, field, source)
        if name == "mean":
            return self.whole(gated=field.gated)
        if name == "pad":
            pad = self.argument(node, 1, "pad")
            if len(pad) in {2, 4} and self.argument(node, 2, "mode", "constant") == "constant":
                return _padded(field, int(pad[0]), int(pad[2]) if len(pad) == 4 else 0)
        return self.window_function(node, name, field)

    def window_function(self, node: fx.Node, name: str, field: _Field) -> _Field:
        """A function that slides a window: convolution or pooling."""
        if name == "conv2d":
            weight: Any = node.args[1] if len(node.args) > 1 else node.kwargs["weight"]
            return _slide(
                field,
                tuple(self.shapes[weight][-2:]),
                self.argument(node, 3, "stride", 1),
                self.argument(node, 4, "padding", 0),
                self.argument(node, 5, "dilation", 1),
            )
        if name in {"max_pool2d", "avg_pool2d"}:
            kernel = self.argument(node, 1, "kernel_size")
            stride = self.argument(node, 2, "stride")
            dilation = self.argument(node, 4, "dilation", 1) if name == "max_pool2d" else 1
            return _slide(field, kernel, stride or kernel, self.argument(node, 3, "padding", 0), dilation)
        raise self.unknown(node, name)

    def linear(self, field: _Field, source: fx.Node) -> _Field:
        shape = self.shapes.get(source)
        per_cell = field.channels_last and isinstance(shape, torch.Size) and len(shape) == 4
        return field if per_cell else self.whole(gated=field.gated)

    def layer_norm(self, field: _Field, normalised: Any) -> _Field:
        """Per cell over the channels of channels-last maps, else over the whole image."""
        return field if len(normalised) == 1 and field.channels_last else replace(field, gated=True)

    def adaptive(self, node: fx.Node, field: _Field, source: fx.Node) -> _Field:
        """Adaptive pooling: windows of one size where they divide evenly, else the whole image."""
        before, after = tuple(self.shapes[source][-2:]), tuple(self.shapes[node][-2:])
        if any(b % a for b, a in zip(before, after, strict=True)) or after == (1, 1):
            return field if before == after else self.whole(gated=field.gated)
        window = tuple(int(b // a) for b, a in zip(before, after, strict=True))
        return _slide(field, window, window, 0)

    def joined(self, node: fx.Node, name: str, sources: list[fx.Node]) -> _Field:
        """Pointwise functions and joins: the union of what the operands see."""
        if name not in _POINTWISE_NAMES and name != "stack":
            raise self.unknown(node, name)
        given = [self.fields[n] for n in sources]
        # A factor of one cell per channel is a gate: it scales the map and adds no place of its own.
        local = [f for f, n in zip(given, sources, strict=True) if not f.whole and self.cells(n, f) != (1, 1)]
        local = local or [f for f in given if not f.whole]
        if not local:
            return self.whole(gated=any(f.gated for f in given))
        first = local[0]
        if any((f.row.jump, f.col.jump) != (first.row.jump, first.col.jump) for f in local):
            raise self.unknown(node, f"a join of maps with strides {[(f.row.jump, f.col.jump) for f in local]}")

        def union(axes: list[_Axis]) -> _Axis:
            return _Axis(axes[0].jump, min(a.low for a in axes), max(a.high for a in axes))

        gated = any(f.gated for f in given) or len(local) < len(given)
        return replace(first, row=union([f.row for f in local]), col=union([f.col for f in local]), gated=gated)

    def reshaped(self, node: fx.Node, name: str, field: _Field, source: fx.Node) -> _Field:
        """Keep the field where rows and columns stay apart; where they mix, the whole image is seen."""
        before, after = _first(self.shapes.get(source)), _first(self.shapes.get(node))
        if field.whole or not isinstance(before, torch.Size) or not isinstance(after, torch.Size):
            return field
        if name == "permute" and (turned := self.turned(node, field)) is not None:
            return turned
        kept = len(after) >= 3 and tuple(before[-2:]) == tuple(after[-2:]) and not field.channels_last
        if name in {"transpose", "permute", "movedim"} and kept:
            axes = [axis % len(before) for axis in self.axes(node)]
            last = len(before) - 2
            kept = axes[last:] == [last, last + 1] if name == "permute" else max(axes) < last
        if kept:
            return field
        if name in {"flatten", "view", "reshape", "squeeze"}:
            return self.whole(gated=field.gated)
        raise self.unknown(node, f"{name} of rows or columns")

    def turned(self, node: fx.Node, field: _Field) -> _Field | None:
        """Return the field of maps whose channels moved to the last place or back."""
        order = tuple(self.axes(node))
        if order == ((0, 3, 1, 2) if field.channels_last else (0, 2, 3, 1)):
            return replace(field, channels_last=not field.channels_last)
        return None

    def axes(self, node: fx.Node) -> list[int]:
        """Axes given as one list or as several arguments."""
        given = self.value(list(node.args[1:]))
        return list(given[0]) if isinstance(given[0], (list, tuple)) else given

    def whole(self, *, gated: bool = False) -> _Field:
        rows, cols = self.size
        return _Field(_Axis(0, 0, rows - 1), _Axis(0, 0, cols - 1), whole=True, gated=gated)

    def cells(self, node: fx.Node, field: _Field) -> tuple[int, ...]:
        """Rows and columns of a map."""
        shape = self.shapes.get(node)
        if not isinstance(shape, torch.Size) or len(shape) < 4:
            return ()
        return tuple(shape[1:3] if field.channels_last else shape[-2:])

    def value(self, node: Any) -> Any:
        """Return an argument's value; sizes computed in the graph are known from the shape run."""
        if isinstance(node, fx.Node):
            return self.shapes.get(node)
        if isinstance(node, (list, tuple)):
            return type(node)(self.value(v) for v in node)
        return node

    def argument(self, node: fx.Node, place: int, name: str, default: Any = None) -> Any:
        if name in node.kwargs:
            return self.value(node.kwargs[name])
        return self.value(node.args[place]) if len(node.args) > place else default

    def unknown(self, node: fx.Node, what: str) -> LayerError:
        return LayerError(
            expected(
                "operations whose receptive field is known (convolution, pooling, pointwise, joins)",
                f"{what} at {self.graph.label(node)}",
                "Choose a layer before it",
            )
        )


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


def _padded(field: _Field, left: int, top: int) -> _Field:
    def move(axis: _Axis, by: int) -> _Axis:
        return _Axis(axis.jump, axis.low - axis.jump * by, axis.high - axis.jump * by)

    return replace(field, row=move(field.row, top), col=move(field.col, left))


def _publish(field: _Field) -> ReceptiveField:
    return ReceptiveField(
        stride_px=(field.row.jump, field.col.jump),
        size_px=(field.row.high - field.row.low + 1, field.col.high - field.col.low + 1),
        start_px=(field.row.low, field.col.low),
        gated=field.gated,
    )


def receptive_fields(graph: Graph, taps: Sequence[str], input_size: tuple[int, int]) -> dict[str, ReceptiveField]:
    """Compute the receptive fields of many taps at once; those that cannot be computed are absent.

    Args:
        graph: of the network.
        taps: names of layers.
        input_size: rows and columns of the input.

    Returns:
        Fields by tap name.
    """
    nodes = {}
    for name in taps:
        try:
            nodes[name] = graph.find(name)
        except LayerError:
            continue
    wanted = graph.ancestors(nodes.values())
    calculator = _Calculator(graph, graph.shapes(input_size, nodes.values()), input_size)
    with contextlib.suppress(LayerError):  # what comes before an unknown operation is known
        calculator.run(wanted)
    return {name: _publish(calculator.fields[node]) for name, node in nodes.items() if node in calculator.fields}


def receptive_field(graph: Graph, tap: str, input_size: tuple[int, int]) -> ReceptiveField:
    """Compute what the cells of a tap see, from the network's operations.

    A window of ``k`` cells with stride ``s``, padding ``p`` and dilation ``d`` over cells that start at pixel
    ``a``, end at ``b`` and lie ``j`` pixels apart gives cells with ``a' = a - j p``, ``b' = b + j (d (k - 1)
    - p)``, ``j' = j s``. Sums and concatenations take the union; pooling of everything and linear layers see
    the whole image; adaptive pooling whose windows differ in size counts as the whole image.

    Args:
        graph: of the network.
        tap: name of the layer.
        input_size: rows and columns of the input.

    Returns:
        The field, the same for all filters.

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
    calculator = _Calculator(graph, graph.shapes(input_size, [node]), input_size)
    calculator.run(graph.ancestors([node]))
    if node not in calculator.fields:
        raise LayerError(
            expected(f"{tap} to depend on the image", "a layer that does not", "Choose a layer on the image's path")
        )
    return _publish(calculator.fields[node])


def _cells(cells: Any) -> np.ndarray:
    array = np.asarray(cells, dtype=np.float64)
    if array.ndim < 1 or array.shape[-1] != 2:
        raise InputError(
            expected("cells as (row, col) in the last axis", f"shape {array.shape}", "Stack rows and columns last")
        )
    return array


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
    centre = np.array(field.start_px) + np.array(field.size_px) / 2.0 + _cells(cells) * np.array(field.stride_px)
    flipped: np.ndarray = centre[..., ::-1]
    return np.ascontiguousarray(flipped)


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
