"""Read named layers of a network and leave no trace.

A *tap* is a layer by name, as ``torchvision.models.feature_extraction`` names it: the path of the module,
with ``_1``, ``_2`` … for its second, third … call (``layer1.0.relu_1``). Operations written in ``forward``
(``flatten``, ``layer1.0.add``) have no module and cannot be tapped here; the block around them can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlens.errors import InputError, InputTypeError, LayerError, expected
from partlens.network.borrowed import borrowed, in_this_thread, like_weights, unwrapped
from partlens.network.layers import found_layouts
from partlens.network.layout import WHOLE, Layout, tap_layout
from partlens.network.outputs import entries_of
from partlens.network.performer import Performer, module_of
from partlens.network.watched import Place, paths_of, place_of, read_entry, tensors_in
from partlens.run import Precision

_AGAINST_OVERFLOW = "Use float32 weights (module.float())"

Reduce = Callable[[Tensor], Tensor]
"""Turns a layer's output into what is kept of it; it must not keep the output itself, which may be overwritten."""

Reduces = Reduce | Mapping[str, Reduce]
"""The same for every layer, or by tap; a layer that is not named is copied whole."""


def tensor_at(tap: str, output: Any, key: str | None) -> Tensor:
    """Choose the tensor of a layer's output: by key, else the first with four dimensions, else with three."""
    found = read_entry(output) if key in {None, WHOLE} else entries_of(output).get(key)
    if found is None:
        wanted = f"an entry {key}" if key else "a tensor of 4 dimensions"
        tensors = entries_of(output)
        got = f"{type(output).__name__} with {', '.join(tensors) or 'no tensors'}"
        remedy = "Name an entry, as in layer:key" if tensors else "Choose another layer"
        raise LayerError(expected(f"the output of {tap.partition(':')[0]} to hold {wanted}", got, remedy))
    return found


class _Taps(Mapping[str, Tensor]):
    """What the taps held in the latest forward pass: a read-only mapping from name to tensor."""

    def __init__(self, names: Sequence[str], reduce: Reduces | None, layouts: Mapping[str, Layout]) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._layouts = layouts
        # A copy where nothing else is asked for, because a later layer may write into this tensor.
        of_tap = reduce if isinstance(reduce, Mapping) else dict.fromkeys(names, reduce or torch.clone)
        self._reduce = {name: of_tap.get(name, torch.clone) for name in names}
        self._lock = threading.Lock()  # DataParallel runs its replicas in threads
        self._calls: dict[tuple[str, torch.device | None], int] = {}
        self._held: dict[str, dict[torch.device, list[Tensor]]] = {}
        self._last: tuple[Any, ...] = ()
        self._images = 1

    def begin(self, inputs: Sequence[Any]) -> None:
        """Forget what was read of an earlier pass."""
        with self._lock:
            self._calls.clear()
            self._held.clear()
            self._last = ()
            self._images = next((len(value) for value in inputs if isinstance(value, Tensor) and value.ndim), 1)

    def _loop(self, tap: str) -> int:
        return self._layouts[tap].loop if tap in self._layouts else 0

    @property
    def complete(self) -> bool:
        """Whether every tap has been read in this pass."""
        return len(self._held) == len(self._names) and all(
            sum(map(len, pieces.values())) >= self._images for tap, pieces in self._held.items() if self._loop(tap)
        )

    def record(self, places: Mapping[str, Place], path: str, device: torch.device | None, output: Any) -> None:
        with self._lock:
            call = self._calls.get((path, device), 0)
            self._calls[path, device] = call + 1
            for tap, place in places.items():
                loop = self._loop(tap)
                if place.call == (call % loop if loop else call):
                    value = tensor_at(tap, output, place.key)
                    if (layout := self._layouts.get(tap)) is not None:
                        value = layout.to_maps(value, whole=place.key == WHOLE)
                    pieces = self._held.setdefault(tap, {}).setdefault(value.device, [])
                    pieces.append(self._reduced(value, self._reduce[tap]))

    def _reduced(self, value: Tensor, reduce: Reduce) -> Tensor:
        """Reduce an output; a block gives what its last layer gave, which is then not reduced once more."""
        if reduce is torch.clone or value.is_inference():
            return reduce(value)
        same = (id(value), value._version, reduce)  # noqa: SLF001
        if self._last[:3] != same:
            self._last = (*same, reduce(value), value)  # kept, so that no other tensor gets its identity
        kept: Tensor = self._last[3]
        return kept

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise LayerError(expected(f"one of the taps {', '.join(self._names)}", name, "Ask for it in read_taps"))
        pieces = self._held.get(name)
        if not pieces:
            rule = f"{name} to take part in the forward pass"
            remedy = "Run the network inside the with block, or choose a layer that its forward calls"
            raise LayerError(expected(rule, "a pass in which it was not called that often", remedy))
        # The replicas of DataParallel finish in any order; their batches were dealt in that of the devices.
        ordered = [each for d in sorted(pieces, key=lambda d: (d.type, d.index or 0)) for each in pieces[d]]
        return ordered[0] if len(ordered) == 1 else torch.cat([p.to(ordered[0].device) for p in ordered])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextlib.contextmanager
def read_taps(
    module: nn.Module,
    names: Sequence[str],
    reduce: Reduces | None = None,
    layouts: Mapping[str, Layout] = MappingProxyType({}),
) -> Iterator[_Taps]:
    """Read layers while a network runs.

    Args:
        module: the network; ``DataParallel`` may wrap it.
        names: taps; ``name:key`` chooses an entry of an output that is a tuple, list or dictionary, which
            otherwise gives its first tensor with four dimensions, else with three.
        reduce: called with each output, for all taps or by tap, while the pass is at that layer; its result is held
            instead of a copy, so
            that the outputs of many layers are never in memory together.
        layouts: of the taps, which are then read as maps ``[image, filter, row, col]`` (`tap_layouts`); without one, a
            tap is read as it is.

    Yields:
        A mapping that after each ``module(x)`` holds the outputs of that pass: copies, which stay attached to
        the autograd graph when gradients are on. The hooks are gone when the block ends.

    Raises:
        LayerError: an unknown layer, or (on reading) one that was not called.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
        >>> with read_taps(network, ["0", "1"]) as taps:
        ...     _ = network(torch.randn(1, 3, 5, 5))
        >>> bool((taps["0"].relu() == taps["1"]).all())
        True
    """
    inner = unwrapped(module)
    taps = _Taps(names, reduce, layouts)
    by_path: dict[str, dict[str, Place]] = {}
    known = paths_of(inner)
    for name in names:
        place = place_of(inner, name, known)
        by_path.setdefault(place.path, {})[name] = place

    def hook_of(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            device = next((value.device for value in inputs if isinstance(value, Tensor)), None)
            taps.record(by_path[path], path, device, output)

        return hook

    with contextlib.ExitStack() as hooks:
        hooks.callback(module.register_forward_pre_hook(in_this_thread(lambda _, inputs: taps.begin(inputs))).remove)
        for path in by_path:
            hooks.callback(inner.get_submodule(path).register_forward_hook(in_this_thread(hook_of(path))).remove)
        yield taps


def _first_bad_layer(module: nn.Module, batch: Tensor) -> str:
    """Name the first layer whose output is not finite."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not _finite(output):
                found.append(name)

        return hook

    # Layers finish before the modules that contain them, so the first one found is the innermost.
    with contextlib.ExitStack() as hooks:
        for name, each in module.named_modules():
            hooks.callback(each.register_forward_hook(in_this_thread(hook_of(name))).remove)
        module(batch)
    return next(iter(found), "") or "the output"


def as_float(value: Any) -> Any:
    """Detach and convert floating tensors to float32, in any nesting; what has named entries becomes a dictionary."""
    if isinstance(value, Tensor):
        return value.detach().float() if value.is_floating_point() else value.detach()
    if isinstance(value, Mapping):
        return {k: as_float(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return {name: as_float(entry) for name, entry in entries_of(value).items()}
    if isinstance(value, (list, tuple)):
        return tuple(as_float(v) for v in value)
    return value


def _finite(*values: Any) -> bool:
    """Whether all tensors in any nesting are finite, with one wait for a GPU in all."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors_in(values)]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())


def tap_layouts(performer: Performer | nn.Module, batch: Tensor, names: Sequence[str]) -> dict[str, Layout]:
    """Return the layouts of taps for a batch's size; a network without its performer is watched for them."""
    size = (batch.shape[2], batch.shape[3])
    if isinstance(performer, Performer) and performer.preprocessing.size_px == size:
        return {name: performer.layout(name) for name in names}
    module = module_of(performer)
    if all(isinstance(module.get_submodule(place_of(module, name).path), nn.Conv2d) for name in names):
        return dict.fromkeys(names, Layout("maps"))  # nothing to find out
    found = found_layouts(module, batch.shape[1], size)
    return {name: tap_layout(module, found, name) for name in names}


def in_precision(precision: Precision, batch: Tensor) -> tuple[Tensor, torch.autocast]:
    """Return a batch as layers that compute in a precision take it, and the block in which they do.

    The memory order is that of the batch alone: convolutions hand it on, and the weights stay as they are.
    """
    if precision != "float32":
        batch = batch.contiguous(memory_format=torch.channels_last)
    return batch, torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bfloat16")


def forward_taps(
    performer: Performer | nn.Module,
    batch: Float[Tensor, "image channel row col"],
    names: Sequence[str],
    reduce: Reduces | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Run a network in eval mode without gradients and read its taps.

    The batch is moved to the network's device and floating type, and computed in the performer's precision. The output
    and the taps, as maps whatever the layout of the layer (`partlens.network.layout`), come as float32 on the network's
    device; ``reduce`` is given what the layer gave. Gradients are off by ``no_grad``: tensors of ``inference_mode``
    could neither enter a later training step nor be kept by a network that caches values.

    Raises:
        LayerError: an unknown layer or one that is not called.
        InputTypeError: a batch that is not a tensor.
        InputError: a batch without four dimensions, or values that are not finite, with the first bad layer.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> _, taps = forward_taps(network, torch.zeros(2, 3, 8, 8), ["1"])
        >>> tuple(taps["1"].shape)
        (2, 4, 6, 6)
    """
    module = module_of(performer)
    if not isinstance(batch, Tensor):
        raise InputTypeError(
            expected("a tensor of images", type(batch).__name__, "Use performer.preprocessing to make the batch")
        )
    if batch.ndim != 4:
        rule = "a batch with axes image, channel, row, col"
        raise InputError(expected(rule, f"shape {tuple(batch.shape)}", "Add the missing axis"))
    ready = like_weights(module, batch)
    layouts = tap_layouts(performer, ready, names)
    ready, computing = in_precision(getattr(performer, "precision", "float32"), ready)
    with borrowed(module, copy_weights=False) as network, torch.no_grad(), computing:
        with read_taps(network, names, reduce, layouts) as taps:
            output = as_float(network(ready.clone()))  # a network may write into its input
            held = {name: taps[name].detach().float() for name in names}
        if not _finite(output, held):
            cause = "the batch itself" if not _finite(ready) else _first_bad_layer(network, ready)
            remedy = _AGAINST_OVERFLOW if ready.dtype == torch.float16 else "Check the weights and the images"
            raise InputError(expected("finite values in the network", f"NaN or infinity first in {cause}", remedy))
    return output, held
