"""Strided convolutions in a backward pass, without the lattice that their stride leaves in the signal.

The signal that arrives at a strided convolution is stretched to what it would be with stride 1 and goes through the
stride-1 data gradient (`strided_gradient`). Where every cell is repeated equally often, the strided gradient itself
does the same with another kernel, which is exchanged in autograd's record: one small gradient instead of two.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from partlens.errors import LayerError, expected

Strides = Literal["nearest", "aligned"]


_Grads = tuple[Tensor | None, ...]
_Replacement = Callable[[_Grads, _Grads], _Grads]


def stretched(signal: Tensor, size: Sequence[int], stride: Sequence[int], strides: Strides = "nearest") -> Tensor:
    """Resize a signal from a strided operation's output to what it would be with stride 1, its total kept.

    ``"nearest"`` is the authors' way: cell ``j`` takes the value of cell ``floor((j + 0.5) · n / size)``, as MATLAB's
    ``imresize`` does and PyTorch calls ``nearest-exact``. ``"aligned"``: cell ``j`` lies at ``j / stride`` between the
    windows that were really computed, and takes its value by linear interpolation.
    """
    for axis, (wanted, have, step) in enumerate(zip(size, signal.shape[2:], stride, strict=True), start=2):
        signal = _along(signal, axis, _stretching(have, wanted, step, strides))
    return signal


def _along(signal: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply one axis of a signal by a matrix."""
    matrix = matrix.to(signal)
    if axis == signal.ndim - 1:
        return signal @ matrix.T
    if axis == signal.ndim - 2 and signal.shape[-1] >= matrix.shape[1]:  # many narrow products take ten times as long
        return matrix @ signal
    return (signal.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


@functools.lru_cache(maxsize=256)
def _stretching(have: int, wanted: int, step: int, strides: Strides) -> Tensor:
    """Return the matrix that stretches one axis of a signal: a row for each of the ``wanted`` cells."""
    one = torch.eye(have, dtype=torch.float64)[None]
    # Divided by the mean number of repeats, branches with different numbers of strided convolutions (one next to a
    # strided pooling, say) still add in the proportions of the true gradient.
    if strides == "nearest":
        return F.interpolate(one, size=wanted, mode="nearest-exact")[0].T * (have / wanted)
    spanned = (have - 1) * step + 1
    between = F.interpolate(one, size=spanned, mode="linear", align_corners=True)[0].T
    # Cells that no strided window reached take the last window's value; with ceil_mode one may lie outside.
    return between[torch.arange(wanted).clamp(max=spanned - 1)] * (have / wanted)


@functools.lru_cache(maxsize=256)
def _part(have: int, wanted: int, step: int, first: int, count: int) -> tuple[int, Tensor]:
    """Return rows of the matrix that stretches to an aligned signal, zeros outside, and the columns they need.

    These are the columns from the number that is returned.
    """
    rows = F.pad(_stretching(have, wanted, step, "aligned"), (0, 0, count, count))[first + count :][:count]
    used = rows.any(0).nonzero()
    return int(used.min()), rows[:, int(used.min()) : int(used.max()) + 1]


def _moving_mean(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the means over windows, added up: pooling and transposed convolutions take ten times as long."""
    for axis, size in enumerate(sizes, start=2):
        count = values.shape[axis] - size + 1
        total = values.narrow(axis, 0, count).clone()
        for apart in range(1, size):
            total += values.narrow(axis, apart, count)
        values = total.div_(size)
    return values


def strided_gradient(
    signal: Float[Tensor, "image filter ..."],
    weight: Float[Tensor, "filter slice ..."],
    input_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    strides: Strides = "nearest",
) -> Float[Tensor, "image channel ..."]:
    """Data gradient of a strided convolution without the lattice that its stride leaves.

    ``S = H + 2·padding - dilation·(kernel - 1)`` cells is what the convolution would give with stride 1, ``H`` its
    input's cells. The signal that arrives at its output is resized to ``S`` (`stretched`), then goes through the
    ordinary stride-1 data gradient with the same weights.

    Source:
        Oramas et al., ICLR 2019, the released code, which computes ``S`` from the *network's* input and is therefore
        right for a first layer without padding only. Here it is computed from each layer's own input. The division
        in `stretched` is ours; in a chain it changes a factor alone.

    Example:
        >>> ones = torch.ones(1, 1, 3, 3)
        >>> pointwise = torch.ones(1, 1, 1, 1)
        >>> grad = strided_gradient(ones, pointwise, (6, 6), stride=(2, 2), padding=(0, 0), dilation=(1, 1))
        >>> grad.unique().tolist()
        [0.25]
    """
    size = [
        cells + 2 * pad - gap * (kernel - 1)
        for cells, pad, gap, kernel in zip(input_size, padding, dilation, weight.shape[2:], strict=True)
    ]
    dense = stretched(signal, size, stride, strides)
    result = _transposed(len(size))(dense, weight, padding=tuple(padding), dilation=tuple(dilation), groups=groups)
    if tuple(result.shape[2:]) != tuple(input_size):
        raise LayerError(
            expected(
                f"a signal of the convolution's input size {tuple(input_size)}",
                f"{tuple(result.shape[2:])}",
                "Use fix_strides=False and report the layer",
            )
        )
    return result


def _transposed(count: int) -> Callable[..., Tensor]:
    """Return the transposed convolution over as many axes."""
    convolutions: tuple[Callable[..., Tensor], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    return convolutions[count - 1]


def axes(value: Any, count: int) -> tuple[int, ...]:
    """Return a setting per axis, where autograd keeps one for all or one each."""
    values = tuple(int(v) for v in value)
    return values * count if len(values) == 1 else values


class Strided:
    """What is known of the strided convolution of a node."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.weight = node._saved_weight.detach()  # noqa: SLF001
        count = self.weight.ndim - 2
        self.stride = axes(node._saved_stride, count)  # noqa: SLF001
        self.padding = axes(node._saved_padding, count)  # noqa: SLF001
        self.dilation = axes(node._saved_dilation, count)  # noqa: SLF001
        self.groups = int(node._saved_groups)  # noqa: SLF001

    @classmethod
    def of(cls, node: Any, kind: str) -> Strided | None:
        """Return it where a stride leaves a lattice."""
        if kind != "ConvolutionBackward" or node._saved_transposed or max(node._saved_stride) == 1:  # noqa: SLF001
            return None
        made = cls(node)
        # Windows that lie side by side (patch embeddings) leave no lattice. Those with gaps between them do.
        return None if tuple(made.weight.shape[2:]) == made.stride and max(made.dilation) == 1 else made

    @property
    def cells(self) -> list[int]:
        """Rows and columns of the input."""
        return list(self.node._saved_input.shape[2:])  # noqa: SLF001

    @property
    def dense(self) -> list[int]:
        """What the convolution would give with stride 1, in rows and columns."""
        axes_of = zip(self.cells, self.weight.shape[2:], self.padding, self.dilation, strict=True)
        return [cells + 2 * pad - gap * (kernel - 1) for cells, kernel, pad, gap in axes_of]

    def kernel(self) -> Tensor | None:
        """Return the kernel with which the strided data gradient itself is that of a nearest-stretched signal.

        Repeating each cell ``s`` times and then sliding the kernel over them is sliding, in steps of ``s``, the sum of
        ``s`` kernels that lie a cell apart. That holds where each cell is repeated equally often.
        """
        if max(self.dilation) > 1 or any(size % step for size, step in zip(self.dense, self.stride, strict=True)):
            return None
        exact = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        around = [step - 1 for step in reversed(self.stride) for _ in range(2)]
        return _moving_mean(F.pad(exact, around), self.stride).to(self.weight.dtype)

    def borders(self) -> list[int] | None:
        """Return for each axis how far from an end an aligned signal is not the mean of nearest-stretched ones.

        ``None`` where that is half of the map.
        """
        found = []
        for cells, kernel, pad, step in zip(self.cells, self.weight.shape[2:], self.padding, self.stride, strict=True):
            first, last = kernel - 1 - pad, kernel - 2 - pad + step
            if first < 0 or 2 * (first + last) > cells:
                return None
            found.append(max(first, last))
        return found

    def smooths(self, borders: Sequence[int]) -> _Replacement:
        """Return what makes of the gradient of a nearest-stretched signal that of an aligned one.

        A line from one cell to the next is the mean of ``s`` neighbours of a nearest-stretched signal, and so is the
        gradient, but for the borders, where cells outside would take part: there it is computed as it is.
        """

        def replace(grads_in: _Grads, grads_out: _Grads) -> _Grads:
            nearest, arrived = grads_in[0], grads_out[0]
            if nearest is None or arrived is None:
                return grads_in
            inside = _moving_mean(nearest, self.stride)
            result = torch.empty_like(nearest)
            result[(slice(None), slice(None), *(slice(size) for size in inside.shape[2:]))] = inside
            for axis, width in filter(operator.itemgetter(1), enumerate(borders)):  # an axis may have none
                for start, found in zip((0, self.cells[axis] - width), self._ends(arrived, axis, width), strict=True):
                    result.narrow(axis + 2, start, width).copy_(found)
            return (result, *grads_in[1:])

        return replace

    def _ends(self, arrived: Tensor, axis: int, width: int) -> Sequence[Tensor]:
        """Return the first and the last rows of the gradient of an aligned signal, or columns."""
        # Both in one convolution: of so few rows it is hardly more than the reading of its kernel.
        starts = (0, self.cells[axis] - width)
        both = torch.cat([self._reached(arrived, axis, start, width) for start in starts])
        for place in range(len(self.stride)):
            if place != axis:
                both = self._reached(both, place, 0, self.cells[place])
        convolutions: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
        return convolutions[len(self.stride) - 1](both, self._turned, groups=self.groups).chunk(2)

    def _reached(self, arrived: Tensor, place: int, start: int, count: int) -> Tensor:
        """Stretch an axis of a signal, as far as the kernel reaches it from some cells of the input."""
        kernel, have = self.weight.shape[place + 2], arrived.shape[place + 2]
        first = start + self.padding[place] - kernel + 1
        low, matrix = _part(have, self.dense[place], self.stride[place], first, count + kernel - 1)
        return _along(arrived.narrow(place + 2, low, matrix.shape[1]), place + 2, matrix)

    @functools.cached_property
    def _turned(self) -> Tensor:
        """The kernel as an ordinary convolution's that does what the transposed one does."""
        count, per_group = self.weight.shape[:2]
        split = self.weight.reshape(self.groups, count // self.groups, per_group, *self.weight.shape[2:])
        turned = split.transpose(1, 2).flatten(0, 1)
        flipped: Tensor = turned.flip(*range(2, turned.ndim))
        return flipped

    def replaces(self, strides: Strides) -> _Replacement:
        """Return what replaces the data gradient."""

        def replace(grads_in: _Grads, grads_out: _Grads) -> _Grads:
            ordinary, arrived = grads_in[0], grads_out[0]
            if ordinary is None or arrived is None:
                return grads_in
            fixed = strided_gradient(
                arrived,
                self.weight,
                ordinary.shape[2:],
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                strides=strides,
            )
            return (fixed, *grads_in[1:])

        return replace


class _Exchanged:
    """The kernel of a strided convolution, exchanged in the record until it is removed; with a hook behind it."""

    def __init__(self, weight: Tensor, kernel: Tensor) -> None:
        self.weight, self.kernel, self.on, self.hook = weight, kernel, True, None

    hook: Any

    def unpacked(self, _held: Any) -> Tensor:
        return self.kernel if self.on else self.weight

    def remove(self) -> None:
        self.on = False
        if self.hook is not None:
            self.hook.remove()


def at_stride(strided: Strided, strides: Strides) -> Any:
    """Hang the treatment on a strided convolution; return what takes it off."""
    kernel, borders = strided.kernel(), strided.borders() if strides == "aligned" else []
    if kernel is not None and borders is not None:
        exchanged = _Exchanged(strided.node._saved_weight, kernel)  # noqa: SLF001
        try:  # so that autograd computes one gradient instead of two
            strided.node._raw_saved_weight.register_hooks(lambda held: held, exchanged.unpacked)  # noqa: SLF001
        except RuntimeError:  # what is saved has hooks already, of a checkpoint or of an earlier treatment
            pass
        else:
            if borders:
                exchanged.hook = strided.node.register_hook(strided.smooths(borders))
            return exchanged
    return strided.node.register_hook(strided.replaces(strides))
