"""Change how a recorded forward pass runs backwards: the rule at activations, strides, pooling.

PyTorch records every differentiable operation of a forward pass as a node of a graph, whatever its spelling in the
network's code: ``nn.ReLU``, in-place, used twice, ``F.relu``, ``x.relu_()`` and ``x.clamp(min=0)`` all leave the same
kind of node. The rules hang on those nodes, by hooks that are gone when the block ends. So the network's modules are
never touched, the forward pass is the network's own bit for bit, and no spelling of an activation is missed.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from partlens.attribution.activations import Activation, Activations, activations, kind_of, nodes_behind
from partlens.errors import LayerError, expected

Rule = Literal["guided", "deconvnet", "gradient"]
Pooling = Literal["route", "overwrite", "resample"]
Strides = Literal["nearest", "aligned"]

RULES: tuple[Rule, ...] = ("guided", "deconvnet", "gradient")
POOLINGS: tuple[Pooling, ...] = ("route", "overwrite", "resample")
STRIDES: tuple[Strides, ...] = ("nearest", "aligned")

_MAX_POOLS = {"MaxPool2DWithIndicesBackward": 2, "MaxPool3DWithIndicesBackward": 3}
_MEAN_POOLS = {"AvgPool2DBackward": 2, "AvgPool3DBackward": 3}
_HARMLESS = frozenset({"BackwardHookFunctionBackward"})  # the identity that full backward hooks put into the graph

_Grads = tuple[Tensor | None, ...]
_Replacement = Callable[[_Grads, _Grads], _Grads]


def _positive_in(grads: _Grads) -> _Grads:
    """Keep the positive part of what arrives."""
    return tuple(g.clamp(min=0) if g is not None else None for g in grads)


def _positive_through(grads_in: _Grads, grads_out: _Grads) -> _Grads:
    """Hand on the positive part of what arrived, whatever the forward values were."""
    arrived = grads_out[0]
    # The operand that varies: the first, or the second of a maximum whose first is the constant zero.
    place = next((i for i, g in enumerate(grads_in) if g is not None), None)
    if arrived is None or place is None:
        return grads_in
    shape = grads_in[place].shape  # type: ignore[union-attr]  # not None by the line above
    return (*grads_in[:place], arrived.clamp(min=0).sum_to_size(shape), *grads_in[place + 1 :])


def _through_product(activation: Activation) -> _Replacement:
    """Do the same at an activation that a product spells: all of it goes the way of the activation's input."""

    def replace(grads_in: _Grads, grads_out: _Grads) -> _Grads:
        arrived, place = grads_out[0], activation.operand
        if arrived is None or place is None:
            return grads_in
        handed = arrived.clamp(min=0) / activation.factor
        return tuple(
            handed if i == place else None if g is None else torch.zeros_like(g) for i, g in enumerate(grads_in)
        )

    return replace


def stretched(signal: Tensor, size: Sequence[int], stride: Sequence[int], strides: Strides = "nearest") -> Tensor:
    """Resize a signal from a strided operation's output to what it would be with stride 1, its total kept.

    ``"nearest"`` is the authors' way: cell ``j`` takes the value of cell ``floor((j + 0.5) · n / size)``, as MATLAB's
    ``imresize`` does and PyTorch calls ``nearest-exact``. ``"aligned"``: cell ``j`` lies at ``j / stride`` between the
    windows that were really computed, and takes its value by linear interpolation.
    """
    for axis, (wanted, have, step) in enumerate(zip(size, signal.shape[2:], stride, strict=True), start=2):
        spread = _stretching(have, wanted, step, strides).to(signal)
        if axis == signal.ndim - 1:
            signal = signal @ spread.T
        elif axis == signal.ndim - 2:
            signal = spread @ signal
        else:
            signal = (signal.movedim(axis, -1) @ spread.T).movedim(-1, axis)
    return signal


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


def _axes(value: Any, count: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value)
    return values * count if len(values) == 1 else values


class _Strided:
    """What is known of the strided convolution of a node."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.weight = node._saved_weight.detach()  # noqa: SLF001
        count = self.weight.ndim - 2
        self.stride = _axes(node._saved_stride, count)  # noqa: SLF001
        self.padding = _axes(node._saved_padding, count)  # noqa: SLF001
        self.dilation = _axes(node._saved_dilation, count)  # noqa: SLF001
        self.groups = int(node._saved_groups)  # noqa: SLF001

    @classmethod
    def of(cls, node: Any, kind: str) -> _Strided | None:
        """Return it where a stride leaves a lattice."""
        if kind != "ConvolutionBackward" or node._saved_transposed or max(node._saved_stride) == 1:  # noqa: SLF001
            return None
        made = cls(node)
        # Windows that lie side by side (patch embeddings) leave no lattice. Those with gaps between them do.
        return None if tuple(made.weight.shape[2:]) == made.stride and max(made.dilation) == 1 else made

    def kernel(self) -> Tensor | None:
        """Return the kernel with which the strided data gradient itself is that of a nearest-stretched signal.

        Repeating each cell ``s`` times and then sliding the kernel over them is sliding, in steps of ``s``, the sum of
        ``s`` kernels that lie a cell apart. That holds where each cell is repeated equally often.
        """
        sizes = zip(self.node._saved_input.shape[2:], self.weight.shape[2:], strict=True)  # noqa: SLF001
        dense = [cells + 2 * pad - kernel + 1 for (cells, kernel), pad in zip(sizes, self.padding, strict=True)]
        if max(self.dilation) > 1 or any(size % step for size, step in zip(dense, self.stride, strict=True)):
            return None
        exact = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        box = exact.new_full((1, 1, *self.stride), 1 / math.prod(self.stride))
        summed = _transposed(len(self.stride))(exact.flatten(0, 1)[:, None], box)
        return summed.reshape(*self.weight.shape[:2], *summed.shape[2:]).to(self.weight.dtype)

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
    """The kernel of a strided convolution, exchanged in the record while it is on; takes itself off."""

    def __init__(self, weight: Tensor, kernel: Tensor) -> None:
        self.weight, self.kernel, self.on = weight, kernel, True

    def unpacked(self, _held: Any) -> Tensor:
        return self.kernel if self.on else self.weight

    def remove(self) -> None:
        self.on = False


def _at_stride(strided: _Strided, strides: Strides) -> Any:
    """Hang the treatment on a strided convolution; return what takes it off."""
    kernel = strided.kernel() if strides == "nearest" else None
    if kernel is not None:
        exchanged = _Exchanged(strided.node._saved_weight, kernel)  # noqa: SLF001
        try:  # so that autograd computes one gradient instead of two
            strided.node._raw_saved_weight.register_hooks(lambda held: held, exchanged.unpacked)  # noqa: SLF001
        except RuntimeError:  # what is saved has hooks already, of a checkpoint or of an earlier treatment
            pass
        else:
            return exchanged
    return strided.node.register_hook(strided.replaces(strides))


def _scattered(signal: Tensor, indices: Tensor, size: Sequence[int], *, add: bool) -> Tensor:
    """Bring a signal to the cells that ``indices`` name, adding up or letting the last window win."""
    flat, where = signal.flatten(2), indices.flatten(2)
    cells = 1
    for length in size:
        cells *= length
    if add:
        spread = flat.new_zeros(*flat.shape[:2], cells).scatter_add(2, where, flat)
    else:
        order = torch.arange(flat.shape[2], device=flat.device).expand_as(where)
        nobody = torch.full((*flat.shape[:2], cells), -1, dtype=torch.long, device=flat.device)
        last = nobody.scatter_reduce(2, where, order, "amax")
        spread = torch.where(last >= 0, flat.gather(2, last.clamp(min=0)), flat.new_zeros(()))
    return spread.reshape(*signal.shape[:2], *size)


def _window(node: Any, count: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Kernel, stride and padding of a pooling, per axis."""
    kernel = _axes(node._saved_kernel_size, count)  # noqa: SLF001
    return kernel, _axes(node._saved_stride or kernel, count), _axes(node._saved_padding, count)  # noqa: SLF001


def _with_images(maps: Tensor, count: int) -> Tensor:
    """Add the image axis where a network pools one image's maps without it."""
    return maps if maps.ndim == count + 2 else maps[None]


def _max_pool(node: Any, count: int, pooling: Pooling, strides: Strides) -> _Replacement | None:
    """Return what replaces the backward pass of a max pooling."""
    kernel, stride, padding = _window(node, count)
    if pooling == "resample" and max(stride) == 1:
        return None
    dilation = _axes(node._saved_dilation, count)  # noqa: SLF001
    given, indices = node._saved_self.detach(), node._saved_result1  # noqa: SLF001

    @functools.cache
    def dense() -> tuple[torch.Size, Tensor]:
        """Pool in steps of one cell, once for all rounds; return the size of the result and where each value lies."""
        pool: Callable[..., Any] = F.max_pool2d if count == 2 else F.max_pool3d
        values, places = pool(_with_images(given, count), kernel, 1, padding, dilation, return_indices=True)
        return values.shape[2:], places

    def replace(grads_in: _Grads, grads_out: _Grads) -> _Grads:
        arrived = grads_out[0]
        if grads_in[0] is None or arrived is None:
            return grads_in
        size, arrived = _with_images(given, count).shape[2:], _with_images(arrived, count)
        if pooling == "overwrite":
            signal = _scattered(arrived, _with_images(indices, count), size, add=False)
        else:
            cells, places = dense()
            signal = _scattered(stretched(arrived, cells, stride, strides), places, size, add=True)
        return (signal.reshape(given.shape), *grads_in[1:])

    return replace


def _mean_pool(node: Any, count: int, strides: Strides) -> _Replacement | None:
    """Return what replaces the backward pass of a strided average pooling."""
    kernel, stride, padding = _window(node, count)
    if max(stride) == 1:
        return None
    shape = node._saved_self.shape  # noqa: SLF001
    counted, divisor = bool(node._saved_count_include_pad), node._saved_divisor_override  # noqa: SLF001

    def replace(grads_in: _Grads, grads_out: _Grads) -> _Grads:
        arrived = grads_out[0]
        if grads_in[0] is None or arrived is None:
            return grads_in
        pool: Callable[..., Tensor] = F.avg_pool2d if count == 2 else F.avg_pool3d
        with torch.enable_grad():
            blank = _with_images(arrived.new_zeros(shape), count).requires_grad_()
            dense = pool(
                blank, kernel, 1, padding, ceil_mode=False, count_include_pad=counted, divisor_override=divisor
            )
        signal = stretched(_with_images(arrived, count), dense.shape[2:], stride, strides)
        return (torch.autograd.grad(dense, blank, signal)[0].reshape(shape), *grads_in[1:])

    return replace


def _resampled(node: Any, kind: str, strides: Strides | None, pooling: Pooling) -> _Replacement | None:
    """Return what replaces the backward pass of a pooling, if anything does."""
    if pooling != "route" and kind in _MAX_POOLS:
        return _max_pool(node, _MAX_POOLS[kind], pooling, strides or "nearest")
    if pooling == "resample" and kind in _MEAN_POOLS:
        return _mean_pool(node, _MEAN_POOLS[kind], strides or "nearest")
    return None


def _refuse(kind: str) -> Callable[[_Grads], None]:
    """Stop a signal that would pass an operation which cannot be looked into."""

    def stop(_grads: _Grads) -> None:
        raise LayerError(
            expected(
                "operations that autograd records one by one",
                f"{kind}, whose inside (an activation, a stride) cannot be seen",
                "Pass the plain module, without torch.compile, TorchScript, re-entrant checkpoints or "
                "autograd.Function, or ask for rule gradient with fix_strides=False",
            )
        )

    return stop


def _opaque(node: Any, kind: str) -> bool:
    return kind not in _HARMLESS and (
        isinstance(node, BackwardCFunction)
        or kind in {"DifferentiableGraphBackward", "CppNode"}
        or ("Conv" in kind and kind != "ConvolutionBackward")
    )


@contextlib.contextmanager
def rewritten(
    tensors: Sequence[Tensor], rule: Rule = "guided", strides: Strides | None = "nearest", pooling: Pooling = "route"
) -> Iterator[str]:
    """Run backward passes through a recorded graph by other rules while the block lasts.

    With ``x`` an activation's input, ``f`` the activation and ``dy`` the signal that arrives at its output:

    ===========  ===================================  ==================================
    rule         ReLU                                 any other rectifying activation
    ===========  ===================================  ==================================
    guided       ``dx = dy · [x > 0] · [dy > 0]``     ``dx = f'(x) · max(dy, 0)``
    deconvnet    ``dx = dy · [dy > 0]``               the same
    gradient     ``dx = dy · [x > 0]``                ``dx = f'(x) · dy``
    ===========  ===================================  ==================================

    Rectifying are ReLU and clamps or maxima at zero (ReLU6), threshold, leaky and parametric ReLU, ELU, SELU, CELU,
    GELU, SiLU, Mish, softplus and hardswish, also where they are written in Python as a product of a value and its
    gate. Gates (sigmoid, softmax) and functions symmetric about zero (tanh) keep their true derivative under every
    rule; so does an activation spelt as a product with a mask, which no record tells from a gate.

    Args:
        tensors: where signals will start; everything behind them is covered.
        rule: at activations.
        strides: how strided convolutions (`strided_gradient`) and resampled poolings resize a signal; ``None`` for
            the true gradient of convolutions. Transposed convolutions are left as they are.
        pooling: ``"route"``, the true gradient (overlapping windows add up); ``"overwrite"``, the authors' variant
            for max pooling (a later window in reading order replaces an earlier one); ``"resample"``, strided max
            and average pooling treated like strided convolutions.

    Yields:
        What a reader of the signals must know: that no activation was found, or perhaps not every one.

    Raises:
        LayerError: during the backward pass, when a signal reaches an operation that cannot be looked into.
    """
    handles = []
    nodes = nodes_behind(tensors)
    known = activations(nodes) if rule != "gradient" else Activations((), frozenset(), "")
    ruled = {activation.node for activation in known.found} | known.inside
    looked_into = rule != "gradient" or strides is not None
    try:
        handles += [_at_activation(activation, rule) for activation in known.found]
        for node in nodes:
            kind = kind_of(node)
            if node in ruled:
                continue
            if looked_into and _opaque(node, kind):
                handles.append(node.register_prehook(_refuse(kind)))
            elif strides and (strided := _Strided.of(node, kind)) is not None:
                handles.append(_at_stride(strided, strides))
            elif (replace := _resampled(node, kind, strides, pooling)) is not None:
                handles.append(node.register_hook(replace))
        yield known.note
    finally:
        for handle in handles:
            handle.remove()


def _at_activation(activation: Activation, rule: Rule) -> Any:
    """Hang a rule on an activation; return what takes it off."""
    if rule == "guided" or (activation.spelt and activation.operand is None):
        return activation.node.register_prehook(_positive_in)
    return activation.node.register_hook(_through_product(activation) if activation.spelt else _positive_through)
