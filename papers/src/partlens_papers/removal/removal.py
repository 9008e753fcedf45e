"""Remove filters while the network runs: what the network still says without them.

A removed filter's output is 0 everywhere, exactly at the layer that is named: removing a convolution's filter before
its batch normalisation leaves the normalisation's constant, removing the ReLU's leaves nothing. Each image of a batch
may have its own removal, so that many different removals share one forward pass.

Multiplying a filter's output by a factor ``m`` also says what a small change of it would do: the derivative of a score
with respect to ``m`` at ``m = 1`` is the sum over cells of gradient times activation, the first-order estimate of what
the filter adds to the score (`channel_effects`).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from partlens.errors import InputError, InputTypeError, LayerError, expected, listed
from partlens.network.borrowed import borrowed
from partlens.network.outputs import class_scores as scores_of
from partlens.network.performer import Performer, module_of
from partlens.network.taps import read_taps, tensor_at
from partlens.network.watched import place_of

__all__ = ["ChannelEffects", "channel_effects", "removed", "scores_without"]


def _put_back(output: Any, old: Tensor, new: Tensor) -> Any:
    """Return a layer's output with one tensor exchanged; the container itself is not written to."""
    if output is old:
        return new
    if isinstance(output, Mapping):
        changed = copy.copy(output)
        if not isinstance(changed, MutableMapping):
            changed = dict(changed)
        for key, value in output.items():
            if value is old:
                changed[key] = new
        return changed
    entries = [new if value is old else value for value in output]
    if isinstance(output, list):
        return entries
    return type(output)(*entries) if hasattr(output, "_fields") else tuple(entries)


def _from_list(tap: str, channels: Sequence[int], filters: int) -> Tensor:
    """Return factors for all images, 0 at the listed filters."""
    wrong = [k for k in channels if not 0 <= k < filters]
    if wrong:
        raise InputError(expected(f"filters of {tap} from 0 to {filters - 1}", wrong[0], "Name an existing filter"))
    factors = torch.ones(1, filters)
    factors[:, list(channels)] = 0
    return factors


class _Scaling:
    """The hooks of one block: what each tap is multiplied with, and what has been met in this pass."""

    def __init__(self, module: nn.Module, factors: Mapping[str, Tensor | Sequence[int]], *, observe: bool) -> None:
        self.factors = factors
        self.by_path: dict[str, list[tuple[str, int, str | None]]] = {}
        for tap in factors:
            place = place_of(module, tap)
            self.by_path.setdefault(place.path, []).append((tap, place.call, place.key))
        self.calls: dict[str, int] = {}
        self.met: set[str] = set()
        self.means: dict[str, Tensor] | None = {} if observe else None

    def begin(self, _module: nn.Module, _inputs: Any) -> None:
        self.calls.clear()
        self.met.clear()

    def end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        missed = [tap for tap in self.factors if tap not in self.met]
        if missed:
            raise LayerError(
                expected(
                    f"{listed(missed)} to take part in the forward pass",
                    "a pass in which it was not called that often",
                    "Choose layers that the network's forward calls",
                )
            )

    def hook(self, path: str) -> Any:
        wanted = self.by_path[path]

        def act(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            now = self.calls.get(path, 0)
            self.calls[path] = now + 1
            for tap, call, key in wanted:
                if call == now:
                    value = tensor_at(tap, output, key)
                    output = _put_back(output, value, self.changed(tap, value))
            return output

        return act

    def changed(self, tap: str, value: Tensor) -> Tensor:
        self.met.add(tap)
        if value.ndim not in {2, 4}:
            raise LayerError(
                expected(
                    f"{tap} to give maps (image, filter, row, col) or one value a filter",
                    f"shape {tuple(value.shape)}",
                    "Choose another layer",
                )
            )
        given = self.factors[tap]
        factor = given if isinstance(given, Tensor) else _from_list(tap, given, value.shape[1])
        if factor.shape[1] != value.shape[1] or len(factor) not in {1, len(value)}:
            raise InputError(
                expected(
                    f"{len(value)} (or 1) images and {value.shape[1]} filters for {tap}",
                    f"{tuple(factor.shape)}",
                    "Give every image of the batch and every filter of the layer an entry",
                )
            )
        if self.means is not None:
            self.means[tap] = value.detach().flatten(2).mean(2) if value.ndim == 4 else value.detach().clone()
        ready = factor.to(device=value.device, dtype=value.dtype)
        return value * (ready[..., None, None] if value.ndim == 4 else ready)


@contextlib.contextmanager
def _scaled(
    module: nn.Module, factors: Mapping[str, Tensor | Sequence[int]], *, observe: bool = False
) -> Iterator[_Scaling]:
    """Multiply the named outputs while the block runs; the hooks are gone afterwards."""
    scaling = _Scaling(module, factors, observe=observe)
    handles = [module.register_forward_pre_hook(scaling.begin), module.register_forward_hook(scaling.end)]
    try:
        handles.extend(module.get_submodule(path).register_forward_hook(scaling.hook(path)) for path in scaling.by_path)
        yield scaling
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def removed(
    performer: Performer | nn.Module,
    features: Mapping[str, Sequence[int]] | Mapping[str, Bool[Tensor, "#image filter"]],
) -> Iterator[nn.Module]:
    """Run a network without some of its filters.

    Args:
        performer: the network; borrowed: in eval mode inside the block, afterwards bit for bit as it was.
        features: by tap (`partlens.network.taps`), the filters whose output is set to 0: their numbers, the same for
            every image, or a mask with a row for each image of the batch (or one row for all). Of a module that is
            called several times, only the named call is changed (``relu`` the first, ``relu_1`` the second).

    Yields:
        The network. Gradients are as the caller has them.

    Raises:
        LayerError: an unknown layer; while it runs, one that is not called, or gives neither maps nor vectors.
        InputError: while it runs, a filter that does not exist or a mask that does not fit the batch.
        InputTypeError: a mask that is not boolean.

    Source:
        Oramas et al., ICLR 2019: the relevant filters of a class are set to zero at test time. The protocol, forward
        hooks that zero the listed channels of each layer, is that of the same group's later code.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> with removed(network, {"1": [0, 2]}) as without:
        ...     maps = without(torch.rand(1, 3, 5, 5) + 1)
        >>> maps[:, [0, 2]].abs().sum().item()
        0.0
    """
    factors: dict[str, Tensor | Sequence[int]] = {}
    for tap, wanted in features.items():
        if not isinstance(wanted, Tensor):
            factors[tap] = [int(k) for k in wanted]
        elif wanted.dtype == torch.bool and wanted.ndim == 2:
            factors[tap] = (~wanted).float()
        else:
            raise InputTypeError(
                expected(
                    f"a boolean mask with axes image, filter for {tap}",
                    f"{wanted.dtype} {tuple(wanted.shape)}",
                    "Set True where a filter is removed",
                )
            )
    with borrowed(module_of(performer), copy_weights=False) as network, _scaled(network, factors):
        yield network


def _ready(module: nn.Module, batch: Tensor) -> Tensor:
    """Bring a batch to the network's device and floating type."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    return batch if weight is None else batch.to(device=weight.device, dtype=weight.dtype)


def scores_without(
    performer: Performer | nn.Module,
    batch: Float[Tensor, "image channel row col"],
    features: Mapping[str, Sequence[int]] | Mapping[str, Bool[Tensor, "#image filter"]],
) -> Float[Tensor, "image output"]:
    """Return the scores of a batch without some filters, without gradients.

    Args:
        performer: the network; left as it was.
        batch: its input.
        features: what is removed, as in `removed`; nothing gives the intact scores.

    Returns:
        Scores before the softmax, float32.

    Raises:
        LayerError: as `removed`, or a network without scores.
        InputError: as `removed`, or scores that are not finite.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> each_its_own = torch.tensor([[True, False], [False, True]])
        >>> scores = scores_without(network, torch.rand(2, 3, 5, 5), {"1": each_its_own})
        >>> scores[0, 0].item(), scores[1, 1].item()
        (0.0, 0.0)
    """
    module = module_of(performer)
    with torch.no_grad(), removed(module, features) as network:
        scores = scores_of(network(_ready(network, batch)), len(batch)).float()
    _refuse_infinite(scores)
    return scores


def _refuse_infinite(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise InputError(
            expected("finite scores", "NaN or infinity", "Check the weights and the images, or use float32 weights")
        )


@dataclass(frozen=True)
class ChannelEffects:
    """How active each filter is, and what it adds to a score to first order.

    Attributes:
        activation: by tap, the mean of each map over its cells.
        effect: by tap, the sum over the cells of gradient times activation: about how much the score falls when the
            filter is removed.
    """

    activation: Mapping[str, Float[Tensor, "image filter"]]
    effect: Mapping[str, Float[Tensor, "image filter"]]


def channel_effects(
    performer: Performer | nn.Module,
    batch: Float[Tensor, "image channel row col"],
    taps: Sequence[str],
    targets: Int[Tensor, " image"],
) -> ChannelEffects:
    """Measure every filter's mean activation and first-order effect on a score, in one forward and one backward pass.

    With activations ``a[n, k]`` of one tap and the score ``s[n]`` of the target, the effect is
    ``sum over cells of a[n, k] * ds[n] / da[n, k]``.

    Args:
        performer: the network; left as it was.
        batch: its input.
        taps: layers to measure.
        targets: the output of each image whose score is followed.

    Returns:
        Both, float32 on the CPU; an effect of 0 where the score does not depend on a layer.

    Raises:
        LayerError: an unknown layer, one that is not called, one that gives neither maps nor vectors.
        InputError: targets that do not exist or do not fit the batch, effects that are not finite.

    Source:
        Molchanov et al., "Pruning convolutional neural networks for resource efficient inference", ICLR 2017 (the
        first-order Taylor criterion; theirs takes the absolute mean, ours is the signed sum).

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> found = channel_effects(network, torch.rand(1, 3, 5, 5), ["0"], torch.tensor([1]))
        >>> bool(torch.isclose(found.effect["0"][0, 1], found.activation["0"][0, 1])), found.effect["0"][0, 0].item()
        (True, 0.0)
    """
    module = module_of(performer)
    if tuple(targets.shape) != (len(batch),):
        raise InputError(
            expected(f"one target for each of {len(batch)} images", f"shape {tuple(targets.shape)}", "Give one each")
        )
    with (
        borrowed(module, copy_weights=False) as network,
        torch.inference_mode(mode=False),
        torch.enable_grad(),
    ):
        ready = _ready(network, batch.detach())
        filters = _filter_counts(network, ready[:1], taps)
        factors = {
            tap: torch.ones(len(batch), count, dtype=ready.dtype, device=ready.device, requires_grad=True)
            for tap, count in filters.items()
        }
        with _scaled(network, factors, observe=True) as scaling:
            scores = scores_of(network(ready.clone()), len(ready))
        if len(targets) and (int(targets.min()) < 0 or int(targets.max()) >= scores.shape[1]):
            raise InputError(
                expected(f"targets from 0 to {scores.shape[1] - 1}", targets.tolist(), "Name existing outputs")
            )
        chosen = scores.gather(1, targets.to(scores.device)[:, None]).sum()
        slopes = torch.autograd.grad(chosen, list(factors.values()), allow_unused=True)
    effect = {
        tap: (torch.zeros(len(batch), filters[tap]) if slope is None else slope.detach().float().cpu())
        for tap, slope in zip(factors, slopes, strict=True)
    }
    for values in effect.values():
        _refuse_infinite(values)
    means = scaling.means or {}
    return ChannelEffects({tap: means[tap].float().cpu() for tap in taps}, effect)


def _filter_counts(network: nn.Module, image: Tensor, taps: Sequence[str]) -> dict[str, int]:
    """Run one image to learn how many filters each tap has."""
    with torch.no_grad(), read_taps(network, taps) as found:
        network(image.clone())
        return {tap: found[tap].shape[1] for tap in dict.fromkeys(taps)}
