"""Change how a recorded forward pass runs backwards: the rule at activations, strides, pooling.

PyTorch records every differentiable operation of a forward pass as a node of a graph, whatever its spelling in the
network's code: ``nn.ReLU``, in-place, used twice, ``F.relu``, ``x.relu_()`` and ``x.clamp(min=0)`` all leave the same
kind of node. The rules hang on those nodes, by hooks that are gone when the block ends. So the network's modules are
never touched, the forward pass is the network's own bit for bit, and no spelling of an activation is missed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from partlens.attribution.activations import Activation, Activations, activations, kind_of, nodes_behind
from partlens.attribution.strides import Strided, Strides, at_stride, axes, stretched
from partlens.errors import LayerError, expected

Rule = Literal["guided", "deconvnet", "gradient"]
Pooling = Literal["route", "overwrite", "resample"]


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
    kernel = axes(node._saved_kernel_size, count)  # noqa: SLF001
    return kernel, axes(node._saved_stride or kernel, count), axes(node._saved_padding, count)  # noqa: SLF001


def _with_images(maps: Tensor, count: int) -> Tensor:
    """Add the image axis where a network pools one image's maps without it."""
    return maps if maps.ndim == count + 2 else maps[None]


def _max_pool(node: Any, count: int, pooling: Pooling, strides: Strides) -> _Replacement | None:
    """Return what replaces the backward pass of a max pooling."""
    kernel, stride, padding = _window(node, count)
    if pooling == "resample" and max(stride) == 1:
        return None
    dilation = axes(node._saved_dilation, count)  # noqa: SLF001
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
            elif strides and (strided := Strided.of(node, kind)) is not None:
                handles.append(at_stride(strided, strides))
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
