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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.network.watched import Operation, Record


@dataclass(frozen=True)
class ReceptiveField:
    """Where the cells of a map look; pairs are (rows, columns)."""

    stride_px: tuple[int, int]  # input pixels from one cell to the next; 0 where every cell sees the whole image
    size_px: tuple[int, int]  # pixels one cell sees, counted beyond the image's border too
    start_px: tuple[int, int]  # first pixel of cell 0; negative where padding reaches out
    # whether the map is also scaled or normalised by numbers taken from the whole image (squeeze and excitation,
    # instance norm). The field describes the local path alone, since that decides where a cell is located
    gated: bool = False


@dataclass(frozen=True)
class _Field(ReceptiveField):
    """What is known on the way through the graph, too."""

    channels_last: bool = False

    @property
    def whole(self) -> bool:
        """Whether every value sees the whole image."""
        return 0 in self.stride_px


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
# By name: torch offers the same function in torch, torch.nn.functional and as a tensor method.
_POINTWISE_NAMES = frozenset((
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "prelu", "rrelu", "threshold", "logsigmoid", "softsign",
    "tanhshrink", "dropout", "dropout2d", "alpha_dropout", "feature_dropout", "batch_norm", "local_response_norm",
    "add", "sub", "mul", "div", "truediv", "true_divide", "pow", "square", "sqrt", "rsqrt", "abs", "neg", "exp",
    "log", "clamp", "clamp_min", "clamp_max", "clip", "contiguous", "clone", "detach", "float", "half", "double",
    "to", "type", "stochastic_depth", "maximum", "minimum", "cat", "concat", "concatenate", "channel_shuffle",
    "native_channel_shuffle", "where", "rsub", "rdiv", "radd", "rmul", "rtruediv", "iadd", "isub", "imul", "itruediv",
    "hardshrink", "softshrink", "softmax2d",
))
_RESHAPES = frozenset((
    "view", "reshape", "transpose", "permute", "unsqueeze", "squeeze", "chunk", "split", "flatten", "getitem",
    "movedim", "stack",
))
# fmt: on
_JOINS = _POINTWISE_NAMES | {"stack"}
_NORMS = frozenset(("layer_norm", "group_norm", "instance_norm"))


class _Calculator:
    """Carry receptive fields through the operations of a pass."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.fields: dict[Operation, _Field] = {}

    def run(self, operations: Sequence[Operation]) -> None:
        """Fill `fields`, in order; operations that are not known and what comes after them have none."""
        self.fields[operations[0]] = _Field((1, 1), (1, 1), (0, 0))
        for operation in operations[1:]:
            known = all(source in self.fields for source in operation.sources)
            if known and (field := self.step(operation)) is not None:
                self.fields[operation] = field

    def step(self, operation: Operation) -> _Field | None:
        name, field = operation.name, self.fields[operation.sources[0]]
        if len({id(tensor) for tensor, _ in operation.read}) > 1 or name in _POINTWISE_NAMES:
            return self.joined(operation) if name in _JOINS else None
        # Resizing what sees everything makes cells of it, whose places are not known.
        if field.whole and name not in {"interpolate", "upsample"}:
            return field
        before, after = operation.read[0][0].shape, operation.made[0].shape
        if name in _RESHAPES:
            return self.reshaped(operation, field, before, after)
        if name == "linear":
            return field if field.channels_last and len(before) == 4 else self.whole(gated=field.gated)
        if name in _NORMS:  # over the whole image, but for a layer norm over the channels of channels-last maps
            axes = _argument(operation, 1, "normalized_shape", ())
            return field if field.channels_last and len(axes) == 1 else replace(field, gated=True)
        return None if field.channels_last else self.spread(operation, field, before[-2:], after[-2:])

    def spread(self, operation: Operation, field: _Field, before: Sequence[int], after: Sequence[int]) -> _Field | None:
        """An operation over rows and columns."""
        if operation.name.startswith("adaptive_"):
            return self.adaptive(field, before, after)
        if operation.name == "mean":
            return self.whole(gated=field.gated)
        if operation.name in _WINDOWS:
            return _window(operation, field)
        edges = _padded(operation) if operation.name == "pad" else None
        return None if edges is None else _slide(field, 1, padding=edges)

    def adaptive(self, field: _Field, before: Sequence[int], after: Sequence[int]) -> _Field:
        """Adaptive pooling: windows of one size where they divide evenly, else the whole image."""
        if any(b % a for b, a in zip(before, after, strict=True)) or tuple(after) == (1, 1):
            return field if before == after else self.whole(gated=field.gated)
        window = tuple(int(b // a) for b, a in zip(before, after, strict=True))
        return _slide(field, window, window)

    def joined(self, operation: Operation) -> _Field | None:
        """Pointwise functions and joins: the union of what the operands see."""
        every = [(self.fields[source], tensor) for tensor, source in operation.read]
        gated = any(field.gated for field, _ in every)
        placed = [(field, _cells(field, tensor)) for field, tensor in every if not field.whole]
        # A factor of one cell per channel is a gate: it scales the map and adds no place of its own.
        local = [field for field, cells in placed if cells != (1, 1)] or [field for field, _ in placed]
        if not local:
            return self.whole(gated=gated)
        if len({field.stride_px for field in local}) > 1:
            return None
        starts, sizes = np.array([f.start_px for f in local]), np.array([f.size_px for f in local])
        start = starts.min(axis=0)
        size = _pair(((starts + sizes).max(axis=0) - start).tolist())
        gated = gated or len(local) < len(every)
        return replace(local[0], start_px=_pair(start.tolist()), size_px=size, gated=gated)

    def reshaped(self, operation: Operation, field: _Field, before: torch.Size, after: torch.Size) -> _Field | None:
        """Keep the field where rows and columns stay apart; where they mix, the whole image is seen."""
        name, given = operation.name, list(operation.args[1:])
        axes = list(given[0]) if given and isinstance(given[0], (list, tuple)) else given  # a list or several
        # Channels moved to the last place or back: cells stay cells.
        if name == "permute" and tuple(axes) == ((0, 3, 1, 2) if field.channels_last else (0, 2, 3, 1)):
            return replace(field, channels_last=not field.channels_last)
        if not field.channels_last and _keeps_cells(name, axes, before, after):
            return field
        return self.whole(gated=field.gated) if name in {"flatten", "view", "reshape", "squeeze"} else None

    def whole(self, *, gated: bool) -> _Field:
        return _Field((0, 0), self.size, (0, 0), gated=gated)


_WINDOWS = {"conv2d": 3, "max_pool2d": 2, "max_pool2d_with_indices": 2, "avg_pool2d": 2, "lp_pool2d": 3}
"""Place of the stride among the arguments."""


def _argument(operation: Operation, place: int, name: str, default: Any = None) -> Any:
    """Return an argument of a function."""
    given = operation.args[place] if len(operation.args) > place else default
    return operation.kwargs.get(name, given)


def _window(operation: Operation, field: _Field) -> _Field:
    """Convolution and pooling."""
    name, place = operation.name, _WINDOWS[operation.name]
    convolution, sums = name == "conv2d", name in {"avg_pool2d", "lp_pool2d"}  # sums have no padding or no dilation
    given = _argument(operation, 1 if convolution else place - 1, "weight" if convolution else "kernel_size")
    kernel = tuple(given.shape[-2:]) if convolution else given
    stride = _argument(operation, place, "stride") or (1 if convolution else kernel)
    padding = 0 if name == "lp_pool2d" else _argument(operation, place + 1, "padding", 0)
    return _slide(field, kernel, stride, padding, 1 if sums else _argument(operation, place + 2, "dilation", 1))


def _padded(operation: Operation) -> tuple[int, int] | None:
    """Rows above and columns to the left that constant padding adds; other padding repeats cells."""
    pad = _argument(operation, 1, "pad")
    if len(pad) not in {2, 4} or _argument(operation, 2, "mode", "constant") != "constant":
        return None
    return (int(pad[2]) if len(pad) == 4 else 0), int(pad[0])


def _cells(field: _Field, tensor: Tensor) -> tuple[int, ...]:
    """Rows and columns of a map."""
    return () if tensor.ndim < 4 else tuple(tensor.shape[1:3] if field.channels_last else tensor.shape[-2:])


def _keeps_cells(name: str, axes: Sequence[int], before: torch.Size, after: torch.Size) -> bool:
    if len(after) < 3 or before[-2:] != after[-2:]:
        return False
    if name not in {"transpose", "permute", "movedim"}:
        return True
    moved, last = [axis % len(before) for axis in axes], len(before) - 2
    # Equal sizes do not show that square maps were turned; the axes do.
    return moved[last:] == [last, last + 1] if name == "permute" else max(moved) < last


def receptive_fields(record: Record, size: tuple[int, int]) -> dict[Operation | None, ReceptiveField]:
    """Compute what the cells of each operation's maps see, from images of a size.

    A window of ``k`` cells with stride ``s``, padding ``p`` and dilation ``d`` over cells that start at pixel
    ``a``, see ``n`` pixels and lie ``j`` pixels apart gives cells with ``a' = a - j p``, ``n' = n + j d (k - 1)``,
    ``j' = j s``. Sums and concatenations take the union; pooling of everything and linear layers see the whole
    image; adaptive pooling whose windows differ in size counts as the whole image. Operations whose field is not known
    (transposed convolution, resizing, attention), and what reads them, are absent.
    """
    calculator = _Calculator(size)
    calculator.run(record.operations)
    found = calculator.fields.items()
    return {each: ReceptiveField(f.stride_px, f.size_px, f.start_px, f.gated) for each, f in found}


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
