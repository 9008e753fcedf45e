"""Where in one image a filter or a score gets its value from: guided backpropagation and deconvnet.

`guided_backprop` is for one filter or score, `backward_signals` for any mixture of filters of any layers in one pass.
Both change only how signals run backwards (`partlens.attribution.rules`); the network is borrowed and its forward pass
is its own.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from partlens.attribution.rules import Pooling, Rule, rewritten
from partlens.attribution.strides import Strides
from partlens.errors import (
    InputError,
    InputTypeError,
    LayerError,
    PartlensError,
    PartlensWarning,
    checked,
    expected,
    first_line,
    usual_modes,
)
from partlens.network.borrowed import borrowed, in_this_thread, like_weights
from partlens.network.layout import Layout
from partlens.network.outputs import class_scores
from partlens.network.performer import Performer, module_of
from partlens.network.taps import read_taps, tap_layouts

__all__ = ["Pooling", "Rule", "Start", "Strides", "backward_signals", "guided_backprop", "heat_map", "scaled"]

Start = Literal["activation", "ones", "peak"]

_Round = Sequence[tuple[Tensor, Tensor]]  # outputs and the signals that start at them


class _ReadEnough(BaseException):
    """Every layer that was asked for has been read; the rest of the forward pass is not needed."""


def _treated(fix_strides: bool | Strides) -> Strides | None:
    """Return how strides are treated, ``None`` for not at all."""
    return "nearest" if fix_strides is True else fix_strides or None


def _checked(module: nn.Module, images: Tensor) -> Tensor:
    """Return the images in the network's type and place, after refusing what cannot be used."""
    remedy = "Use performer.preprocessing to make the batch"
    if not isinstance(images, Tensor) or not images.is_floating_point():
        kind = str(images.dtype) if isinstance(images, Tensor) else type(images).__name__
        raise InputTypeError(expected("a floating-point tensor of images", kind, remedy))
    if images.layout != torch.strided or images.is_meta:
        kind = "a tensor without values" if images.is_meta else f"layout {images.layout}"
        raise InputTypeError(expected("an ordinary tensor of images", kind, f"{remedy}, or images.to_dense()"))
    if images.ndim != 4 or images.numel() == 0:
        rule = "a batch of at least one image with axes image, channel, row, col"
        raise InputError(expected(rule, f"shape {tuple(images.shape)}", "Add the missing axis or image"))
    return like_weights(module, images)


def _ran(network: nn.Module, images: Tensor) -> Any:
    """Run a network, whatever it raises being one sentence."""
    try:
        return network(images)
    except PartlensError:
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        if type(error).__module__ != "builtins":
            raise  # the owner's own kind, which some code around us may wait for
        shape = tuple(images.shape)
        remedy = "Use performer.preprocessing; wrap a network of other inputs in one that takes the images alone"
        if shape[3] in {1, 3, 4} and shape[1] not in {1, 3, 4}:
            remedy = "Put the channels first, as images.permute(0, 3, 1, 2) does"
        rule = f"images that {type(network).__name__} takes"
        raise InputError(expected(rule, f"shape {shape} ({first_line(error)})", remedy)) from error


@contextlib.contextmanager
def _recorded(
    network: nn.Module, batch: Tensor, layers: Mapping[str, Layout]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Run the network forward with gradients on, as far as the layers need it.

    Yields the leaf in the images' place, and the layers' outputs as maps by name; the scores under ``""``.
    """
    # The snapshot of `borrowed` puts these back: the owner's backward hooks must not act on our signals.
    for child in network.modules():
        child._backward_hooks.clear()  # noqa: SLF001
        child._backward_pre_hooks.clear()  # noqa: SLF001
    with torch.enable_grad():
        leaf = batch.detach().clone().requires_grad_()
        # A copy, because a network may write into its input, which is forbidden on a leaf.
        given = leaf.clone()
        found = _read(network, given, layers) if layers else {"": class_scores(_ran(network, given), len(batch))}
        for name, value in found.items():
            if not value.requires_grad:
                rule = f"{name or 'the scores'} to depend on the images through recorded operations"
                remedy = "Remove no_grad, inference_mode or detach from its forward"
                raise LayerError(expected(rule, "a network that runs it without gradients", remedy))
            _check_finite(value, f"the values of {name or 'the scores'}")
        yield leaf, found


def _read(network: nn.Module, batch: Tensor, layers: Mapping[str, Layout]) -> dict[str, Tensor]:
    """Return the outputs of layers; what of the network comes after them is not run."""
    with read_taps(network, list(layers), layouts=layers) as taps:
        leave = in_this_thread(lambda *_: _leave(taps.complete))
        stops = [m.register_forward_hook(leave) for m in network.modules()]
        try:
            _ran(network, batch)
        except _ReadEnough:
            pass
        finally:
            for stop in stops:
                stop.remove()
        return {name: taps[name] for name in layers}


def _leave(enough: bool) -> None:
    if enough:
        raise _ReadEnough


def _maps(name: str, output: Tensor) -> Tensor:
    """Return a layer's output as maps; fully connected layers have maps of one cell."""
    if output.ndim == 2:
        return output[..., None, None]
    if output.ndim != 4:
        rule = f"{name} to give maps (image, filter, row, col) or one value a filter"
        raise LayerError(expected(rule, f"shape {tuple(output.shape)}", "Choose another layer"))
    return output


@contextlib.contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Take numbers near the smallest for zero in this thread, and go back to what it did before.

    Signals that fade over many layers become denormal, and a processor computes ten times slower with those.
    """
    # There is no way to ask; half of the smallest normal number is zero where they are flushed already.
    tiny = torch.tensor(torch.finfo(torch.float32).tiny)
    flushed = float(tiny / 2) == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


def _run(leaf: Tensor, rounds: Sequence[_Round]) -> Tensor:
    """Send the starts of every round to the images, one backward pass each, on one record."""
    signals = []
    for number, starts in enumerate(rounds):
        if not starts:
            signals.append(torch.zeros_like(leaf))
            continue
        try:
            (signal,) = torch.autograd.grad(
                [output for output, _ in starts],
                [leaf],
                [start for _, start in starts],
                retain_graph=number + 1 < len(rounds),
                allow_unused=True,
            )
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            got = f"one that overwrites a value it needs ({first_line(error)})"
            remedy = "Replace the in-place operation after an activation (x += y) by x = x + y"
            raise LayerError(expected("a network whose gradient can be computed", got, remedy)) from error
        if signal is None:
            raise LayerError(
                expected(
                    "a layer that depends on the images",
                    "one that no recorded operation connects with them",
                    "Choose another layer, or remove detach from the network's forward",
                )
            )
        signals.append(signal)
    result = torch.stack(signals)
    _check_finite(result, "the signals")
    return result


def _check_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        remedy = "Check the weights and the images; half precision overflows, so use float32 weights"
        raise InputError(expected(f"{what} to be finite", "NaN or infinity", remedy))


@checked
def backward_signals(
    model: nn.Module | Performer,
    images: Float[Tensor, "image channel row col"],
    starts: Sequence[Mapping[str, Float[Tensor, "image _"]]],
    rule: Rule = "guided",
    fix_strides: bool | Strides = True,
    *,
    pooling: Pooling = "route",
    tell: Callable[[str], None] | None = None,
) -> Float[Tensor, "round image channel row col"]:
    """Send weighted activation maps of several layers back to the images.

    The signal that starts at layer ``l`` is ``weights[l][n, k] · a_l[n, k]``, with ``a_l`` the layer's activation
    maps. Everything in one round starts together: images do not mix, so each image may have its own layer and filter
    in the same backward pass. There is one forward pass, as far as the deepest layer, and one backward pass a round.

    Args:
        model: the network; borrowed.
        images: preprocessed.
        starts: one mapping a round, from layer name to a weight for every image and filter (mostly 0).
        rule: as the other settings and errors, see `guided_backprop`.
        fix_strides: likewise.
        pooling: likewise.
        tell: takes what a reader of the signals must know, as `guided_backprop` warns of it; by default a warning.

    Source:
        Oramas et al., ICLR 2019, section 3 and its released code: the start is the activation map of the filter.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
        >>> second_filter = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        >>> tuple(backward_signals(network, torch.rand(1, 3, 8, 8), [{"1": second_filter}]).shape)
        (1, 1, 3, 8, 8)
    """
    module = module_of(model)
    ready = _checked(module, images)
    if not starts or not any(starts):
        raise InputError(expected("at least one round with a layer", "none", "Give a mapping from layer to weights"))
    layers = tap_layouts(model, ready, list(dict.fromkeys(name for each in starts for name in each)))

    def rounds(found: Mapping[str, Tensor]) -> list[_Round]:
        maps = {name: _maps(name, output) for name, output in found.items()}
        return [_round(each, maps, len(ready)) for each in starts]

    signals, note = _sent_back(module, ready, layers, rounds, (rule, _treated(fix_strides), pooling))
    if note:
        (tell or _warn)(note)
    return signals


def _sent_back(
    module: nn.Module,
    images: Tensor,
    layers: Mapping[str, Layout],
    rounds_of: Callable[[Mapping[str, Tensor]], Sequence[_Round]],
    how: tuple[Rule, Strides | None, Pooling],
) -> tuple[Tensor, str]:
    """Run the network once and send back what starts at its layers; return the signals and what to know of them."""
    with (
        torch.inference_mode(mode=False),
        borrowed(module, copy_weights=False) as network,
        _recorded(network, images, layers) as (leaf, found),
    ):
        rounds = rounds_of(found)
        with rewritten(list(found.values()), *how) as note, _denormals_flushed():
            return _run(leaf, rounds), note


def _warn(note: str) -> None:
    warnings.warn(f"{note[0].upper()}{note[1:]}.", PartlensWarning, stacklevel=3)


def _round(weights: Mapping[str, Tensor], maps: Mapping[str, Tensor], images: int) -> list[tuple[Tensor, Tensor]]:
    """Return where the signals of one round start; a layer whose weights are all 0 would only send zeros down."""
    for name, given in weights.items():
        if tuple(given.shape) != (images, maps[name].shape[1]):
            rule = f"weights of {images} images and {maps[name].shape[1]} filters for {name}"
            raise InputError(expected(rule, f"shape {tuple(given.shape)}", "Give every image and filter a weight"))
    return [
        (maps[name], given.to(maps[name])[..., None, None] * maps[name].detach())
        for name, given in weights.items()
        if bool(given.any())
    ]


def _targets(scores: Tensor, wanted: int | list[int] | None) -> Tensor:
    """Return the output to explain for every image."""
    if wanted is None:
        return scores.detach().argmax(dim=1)
    chosen = torch.tensor(wanted if isinstance(wanted, list) else [wanted] * len(scores), device=scores.device)
    if chosen.min() < 0 or chosen.max() >= scores.shape[1]:
        rule = f"targets from 0 to {scores.shape[1] - 1}"
        raise InputError(expected(rule, f"{chosen.tolist()}", "Name an existing output"))
    return chosen


def _started(maps: Tensor, chosen: int, start: Start) -> Tensor:
    """Return the signal that starts at one filter, all others exactly 0."""
    signal = torch.zeros_like(maps)
    own = maps.detach()[:, chosen]
    if start == "activation":
        signal[:, chosen] = own
    elif start == "ones":
        signal[:, chosen] = 1
    else:
        peak = own.flatten(1).argmax(dim=1, keepdim=True)
        signal[:, chosen] = torch.zeros_like(own).flatten(1).scatter(1, peak, 1.0).reshape(own.shape)
    return signal


@usual_modes()
@checked
def guided_backprop(
    model: nn.Module | Performer,
    images: Float[Tensor, "image channel row col"],
    target: int | Sequence[int] | Int[Tensor, " image"] | Int[np.ndarray, " image"] | None = None,
    layer: str | None = None,
    filters: int | Sequence[int] | Int[Tensor, " filter"] | Int[np.ndarray, " filter"] | None = None,
    rule: Rule = "guided",
    fix_strides: bool | Strides = True,
    *,
    start: Start = "activation",
    pooling: Pooling = "route",
) -> Float[Tensor, ...]:
    """Show where in each image a score or a filter gets its value from.

    Args:
        model: the network; borrowed. Any spelling of its activations is seen.
        images: preprocessed, moved to the network's device and type.
        target: the output to explain, one for all images or one each; the highest score when ``None``. The signal
            starts with 1 at that score. Only without ``layer``.
        layer: a tap (`partlens.network.taps`), to explain filters instead of a score.
        filters: one filter of ``layer``, or several (a list, an array, a tensor). Fully connected layers have maps of
            one cell.
        rule: ``"guided"``, ``"deconvnet"`` or ``"gradient"``, see `partlens.attribution.rules.rewritten`.
        fix_strides: whether strided convolutions leave no lattice (`partlens.attribution.strides.strided_gradient`):
            ``True`` or ``"nearest"`` as the authors do, which moves structures by about half a stride in every
            strided layer; ``"aligned"``, linear between the true places of the windows, which does not; ``False``
            for the true gradient. With strides of 1 the result is the same bit for bit.
        start: the signal at the filter's output: ``"activation"``, its map itself (the authors' choice);
            ``"ones"``; or ``"peak"``, 1 at its highest cell, the first of equals.
        pooling: how signals pass poolings, see `partlens.attribution.rules.rewritten`.

    Returns:
        Signals on the images with axes image, channel, row, col; with several filters image, filter, channel, row,
        col. In the network's type and on its device; positive where more of the pixel raises the value.

    Raises:
        LayerError: an unknown layer, one without maps, one that does not depend on the images, or an operation that
            cannot be looked into (an ``autograd.Function``).
        InputError: images that the network does not take, a filter or target that does not exist, both a target and a
            layer, signals that are not finite.
        InputTypeError: images that are not floating point, numbers that are none, a compiled or scripted network.

    Warns:
        PartlensWarning: no activation was found, so that the rule made no difference; or perhaps not every one.

    Source:
        Springenberg et al., arXiv 1412.6806 (guided); Zeiler and Fergus, arXiv 1311.2901 (deconvnet); Oramas et al.,
        ICLR 2019, released code (start at the activation map, strides).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> images = torch.rand(2, 3, 8, 8)
        >>> tuple(guided_backprop(network, images, target=1).shape)
        (2, 3, 8, 8)
        >>> tuple(guided_backprop(network, images, layer="1", filters=[0, 2]).shape)
        (2, 2, 3, 8, 8)
    """
    module = module_of(model)
    ready = _checked(module, images)
    wanted = _wanted(layer, filters, target, len(ready))
    layers = {} if layer is None else tap_layouts(model, ready, [layer])

    def rounds(found: Mapping[str, Tensor]) -> list[_Round]:
        if layer is None:
            scores = found[""]
            return [[(scores, torch.zeros_like(scores).scatter(1, _targets(scores, wanted)[:, None], 1.0))]]
        maps, several = _maps(layer, found[layer]), _listed(wanted)
        _check_filters(layer, several, maps.shape[1])
        return [[(maps, _started(maps, k, start))] for k in several]

    signals, note = _sent_back(module, ready, layers, rounds, (rule, _treated(fix_strides), pooling))
    if note:
        _warn(note)
    return signals.transpose(0, 1) if layer is not None and isinstance(wanted, list) else signals[0]


def _numbers(what: str, given: object, example: str) -> int | list[int]:
    """Return a whole number, or those of a list, an array or a tensor with one axis."""
    values: Any = given.tolist() if isinstance(given, (Tensor, np.ndarray, np.generic)) else given
    entries = list(values) if isinstance(values, (list, tuple, range)) else [values]
    plain: list[Any] = [
        each.item() if isinstance(each, (Tensor, np.generic)) and each.ndim == 0 else each for each in entries
    ]
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in plain):
        rule = f"{what} as a whole number or as several on one axis"
        raise InputTypeError(expected(rule, f"{type(given).__name__} {given!r}"[:80], f"Give {example}"))
    whole: int | list[int] = plain if isinstance(values, (list, tuple, range)) else plain[0]
    return whole


def _listed(numbers: int | list[int] | None) -> list[int]:
    return [] if numbers is None else numbers if isinstance(numbers, list) else [numbers]


def _wanted(layer: str | None, filters: object, target: object, images: int) -> int | list[int] | None:
    """Return the filters, or the targets without a layer, after refusing contradictory requests."""
    if layer is None:
        if filters is not None:
            raise InputError(expected("a layer for the filters", "none", "Name the layer, or give no filters"))
        wanted = None if target is None else _numbers("target", target, "target=7, or one for each image")
        if isinstance(wanted, list) and len(wanted) != images:
            rule = f"one target for each of {images} images"
            raise InputError(expected(rule, f"{len(wanted)}", "Give one per image"))
        return wanted
    if target is not None:
        raise InputError(expected("either a target or a layer", f"both ({layer})", "Give one of them"))
    if filters is None:
        raise InputError(expected(f"the filters of {layer} to explain", "none", "Give filters=7 or filters=[3, 7, 12]"))
    wanted = _numbers("filters", filters, "filters=7 or filters=[3, 7, 12]")
    if wanted == []:
        raise InputError(expected("at least one filter", "an empty sequence", "Give filters=[3, 7, 12]"))
    return wanted


def _check_filters(layer: str, wanted: Sequence[int], count: int) -> None:
    for k in wanted:
        if not 0 <= k < count:
            raise InputError(expected(f"filters of {layer} from 0 to {count - 1}", k, "Name an existing filter"))


def heat_map(signal: Float[Tensor, "*any channel row col"]) -> Float[Tensor, "*any row col"]:
    """Turn each signal ``g`` on an image into a map from 0 to 1; a constant map becomes zeros.

    ``h = ‖max(g, 0)‖₂`` over the colour channels, 0 where the channels' sum is exactly 0, then
    ``(h - min h) / (max h - min h)`` for each map by itself.

    Source:
        Oramas et al., ICLR 2019, released code (normalizeHeatmap).

    Example:
        >>> heat_map(torch.tensor([[[0.0, 3.0]], [[0.0, 4.0]]])).tolist()
        [[0.0, 1.0]]
    """
    _check_finite(signal, "the signals")
    exact = signal if signal.dtype == torch.float64 else signal.float()
    largest = exact.abs().amax(dim=(-3, -2, -1), keepdim=True)
    # Scaled first: the square of a small value would vanish.
    height = (exact.clamp(min=0) / largest.where(largest > 0, 1)).norm(dim=-3)
    height = height.where(exact.sum(dim=-3) != 0, 0)
    bounded: Tensor = scaled(height).clamp(0, 1).to(signal.dtype)
    return bounded


def scaled(maps: Float[Tensor, "*batch row col"]) -> Float[Tensor, "*batch row col"]:
    """Scale each map to [0, 1] by its own range; a constant map becomes zeros."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return (maps - low) / span.where(span > 0, 1)
