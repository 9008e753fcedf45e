"""Read named layers of a network and leave no trace.

A *tap* is a layer by name, as ``torchvision.models.feature_extraction`` names it: the path of the module,
with ``_1``, ``_2`` … for its second, third … call (``layer1.0.relu_1``). Operations written in ``forward``
(``flatten``, ``layer1.0.add``) have no module and cannot be tapped here; the block around them can.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlens.errors import InputError, InputTypeError, LayerError, expected, first_line, nearest
from partlens.network.borrowed import borrowed
from partlens.network.receptive_field import receptive_fields
from partlens.network.surgery import is_activation
from partlens.network.tracing import Traced, trace
from partlens.network.zoo import Performer, module_of, unwrapped

__all__ = [
    "LayerInfo",
    "Reduce",
    "Taps",
    "borrowed",
    "check_tap",
    "default_tap",
    "forward_taps",
    "list_layers",
    "read_taps",
]

_MIN_ROWS = 12

Reduce = Callable[[Tensor], Tensor]
"""Turns a layer's output into what is kept of it; it must not keep the output itself, which may be overwritten."""


@dataclass(frozen=True)
class _Place:
    path: str
    call: int
    key: str | None


def place_of(module: nn.Module, tap: str) -> _Place:
    """Find the module, the call and the output entry that a tap name means."""
    name, _, key = tap.partition(":")
    paths = {path for path, _ in module.named_modules() if path}
    if name in paths:
        return _Place(name, 0, key or None)
    repeated = re.fullmatch(r"(.+)_(\d+)", name)
    if repeated and repeated[1] in paths:
        return _Place(repeated[1], int(repeated[2]), key or None)
    raise LayerError(
        expected(f"a layer of {type(module).__name__}", name, f"Nearest: {', '.join(nearest(name, paths))}")
    )


def tensor_at(tap: str, output: Any, key: str | None) -> Tensor:
    """Choose the tensor of a layer's output: by key, else the first with four dimensions."""
    if isinstance(output, Tensor) and key is None:
        return output
    if isinstance(output, Mapping):
        entries = {str(k): v for k, v in output.items()}
    elif isinstance(output, (list, tuple)):
        entries = {str(i): v for i, v in enumerate(output)}
        entries |= dict(zip(getattr(output, "_fields", ()), output, strict=False))
    else:
        entries = {}
    tensors: dict[str, Tensor] = {k: v for k, v in entries.items() if isinstance(v, Tensor)}
    if key is not None and key in tensors:
        return tensors[key]
    if key is None:
        for value in tensors.values():
            if value.ndim == 4:
                return value
    raise LayerError(
        expected(
            f"the output of {tap.partition(':')[0]} to hold "
            + (f"an entry {key}" if key else "a tensor of 4 dimensions"),
            f"{type(output).__name__} with {', '.join(tensors) or 'no tensors'}",
            "Name an entry, as in layer:key" if tensors else "Choose another layer",
        )
    )


class Taps(Mapping[str, Tensor]):
    """What the taps held in the latest forward pass: a read-only mapping from name to tensor."""

    def __init__(self, names: Sequence[str], reduce: Reduce | None = None) -> None:
        self._names = tuple(dict.fromkeys(names))
        self._reduce = reduce or torch.clone  # a copy, because a later layer may write into this tensor
        self._lock = threading.Lock()  # DataParallel runs its replicas in threads
        self._calls: dict[tuple[str, torch.device | None], int] = {}
        self._held: dict[str, dict[torch.device, Tensor]] = {}

    def clear(self) -> None:
        """Forget what was read."""
        with self._lock:
            self._calls.clear()
            self._held.clear()

    @property
    def complete(self) -> bool:
        """Whether every tap has been read in this pass."""
        return len(self._held) == len(self._names)

    def _record(self, places: Mapping[str, _Place], path: str, device: torch.device | None, output: Any) -> None:
        with self._lock:
            call = self._calls.get((path, device), 0)
            self._calls[path, device] = call + 1
            for tap, place in places.items():
                if place.call == call:
                    value = tensor_at(tap, output, place.key)
                    self._held.setdefault(tap, {})[value.device] = self._reduce(value)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise LayerError(expected(f"one of the taps {', '.join(self._names)}", name, "Ask for it in read_taps"))
        pieces = self._held.get(name)
        if not pieces:
            raise LayerError(
                expected(
                    f"{name} to take part in the forward pass",
                    "a pass in which it was not called that often",
                    "Run the network inside the with block, or choose a layer that its forward calls",
                )
            )
        ordered = [pieces[d] for d in sorted(pieces, key=lambda d: (d.type, d.index or 0))]
        return ordered[0] if len(ordered) == 1 else torch.cat([p.to(ordered[0].device) for p in ordered])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _first_device(inputs: Any) -> torch.device | None:
    for value in inputs:
        if isinstance(value, Tensor):
            return value.device
    return None


@contextlib.contextmanager
def read_taps(module: nn.Module, names: Sequence[str], reduce: Reduce | None = None) -> Iterator[Taps]:
    """Read layers while a network runs.

    Args:
        module: the network; ``DataParallel`` may wrap it.
        names: taps; ``name:key`` chooses an entry of an output that is a tuple, list or dictionary, which
            otherwise gives its first tensor with four dimensions.
        reduce: called with each output while the pass is at that layer; its result is held instead of a copy, so
            that the outputs of many layers are never in memory together.

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
    places = {name: place_of(inner, name) for name in names}
    taps = Taps(names, reduce)
    by_path: dict[str, dict[str, _Place]] = {}
    for name, place in places.items():
        by_path.setdefault(place.path, {})[name] = place
    handles = []
    try:
        handles.append(module.register_forward_pre_hook(lambda _module, _inputs: taps.clear()))
        for path, wanted in by_path.items():

            def hook(
                _module: nn.Module,
                inputs: Any,
                output: Any,
                path: str = path,
                wanted: Mapping[str, _Place] = wanted,
            ) -> None:
                taps._record(wanted, path, _first_device(inputs), output)  # noqa: SLF001

            handles.append(inner.get_submodule(path).register_forward_hook(hook))
        yield taps
    finally:
        for handle in handles:
            handle.remove()


def _first_bad_layer(module: nn.Module, batch: Tensor) -> str:
    """Name the first layer whose output is not finite."""
    found: list[str] = []
    handles = []

    def watch(name: str) -> None:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        handles.append(module.get_submodule(name).register_forward_hook(hook))

    try:
        for name, _ in module.named_modules():
            watch(name)
        module(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found and found[0] else "the output"


def _as_float(value: Any) -> Any:
    """Detach and convert floating tensors to float32, in any nesting."""
    if isinstance(value, Tensor):
        return value.detach().float() if value.is_floating_point() else value.detach()
    if isinstance(value, Mapping):
        return {k: _as_float(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_as_float(v) for v in value)
    return value


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(v) for v in value.values())
    return all(_finite(v) for v in value) if isinstance(value, (list, tuple)) else True


def forward_taps(
    performer: Performer | nn.Module,
    batch: Float[Tensor, "image channel row col"],
    names: Sequence[str],
    reduce: Reduce | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Run a network in eval mode without gradients and read its taps.

    Args:
        performer: the network; left as it was.
        batch: its input; moved to the network's device and floating type, memory format kept.
        names: taps to read.
        reduce: what to keep of each output instead of the whole (`read_taps`); values that are not finite must show
            in its result.

    Returns:
        The output and the taps, as float32 on the network's device. They are ordinary tensors: gradients are
        off by ``no_grad`` rather than ``inference_mode``, whose tensors could neither enter a later training
        step nor be kept by a network that caches values.

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
        raise InputError(
            expected(
                "a batch with axes image, channel, row, col",
                f"shape {tuple(batch.shape)}",
                "Add the missing axis",
            )
        )
    weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    ready = batch.to(device=weight.device, dtype=weight.dtype) if weight is not None else batch
    with borrowed(module, copy_weights=False) as network, torch.no_grad():
        with read_taps(network, names, reduce) as taps:
            output = network(ready)
            held = {name: taps[name].detach().float() for name in names}
        if not (_finite(output) and _finite(held)):
            cause = "the batch itself" if not _finite(ready) else _first_bad_layer(network, ready)
            half = weight is not None and weight.dtype == torch.float16
            raise InputError(
                expected(
                    "finite values in the network",
                    f"NaN or infinity first in {cause}",
                    "Use float32 weights (module.float())" if half else "Check the weights and the images",
                )
            )
    return _as_float(output), held


@dataclass(frozen=True)
class LayerInfo:
    """A layer that can be tapped.

    Args:
        name: tap name.
        kind: class of the module.
        shape: filters, rows, columns of its maps at the performer's input size.
        stride_px: input pixels from one cell to the next (rows, columns); ``None`` where it cannot be
            derived.
        receptive_field_px: pixels one cell sees (rows, columns), beyond the image's border too; ``None``
            likewise.
        is_default: whether it is the layer explained when none is named.
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    stride_px: tuple[int, int] | None
    receptive_field_px: tuple[int, int] | None
    is_default: bool


def _input_size(performer: Performer | nn.Module, input_size: tuple[int, int] | None) -> tuple[int, int]:
    if input_size is not None:
        return input_size
    return performer.preprocessing.size_px if isinstance(performer, Performer) else (224, 224)


def _blank(module: nn.Module, size: tuple[int, int]) -> Tensor:
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d)), None)
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    channels = first.in_channels if first is not None else 3
    return torch.zeros(1, channels, *size, dtype=weight.dtype, device=weight.device)


def _map_shapes(module: nn.Module, size: tuple[int, int]) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """Run a blank image and note every layer with a 4-d output, in execution order."""
    noted: dict[str, tuple[str, tuple[int, int, int]]] = {}
    calls: dict[str, int] = {}
    with borrowed(module, copy_weights=False) as network, torch.no_grad():
        handles = []
        for path, child in network.named_modules():
            if not path:
                continue

            def hook(owner: nn.Module, _inputs: Any, output: Any, path: str = path) -> None:
                call = calls.get(path, 0)
                calls[path] = call + 1
                entries = output.values() if isinstance(output, Mapping) else output
                if not isinstance(output, Tensor):
                    many = isinstance(entries, (list, tuple)) or isinstance(output, Mapping)
                    output = next((v for v in entries if isinstance(v, Tensor) and v.ndim == 4), None) if many else None
                if output is not None and output.ndim == 4:
                    name = path if call == 0 else f"{path}_{call}"
                    noted[name] = (type(owner).__name__, (output.shape[1], output.shape[2], output.shape[3]))

            handles.append(child.register_forward_hook(hook))
        try:
            network(_blank(network, size))
        except Exception as error:
            raise LayerError(
                expected(
                    f"an input size that {type(network).__name__} accepts",
                    f"{size[0]}x{size[1]} px ({first_line(error)})",
                    "Give the size the network was made for",
                )
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    return noted


def list_layers(performer: Performer | nn.Module, input_size: tuple[int, int] | None = None) -> list[LayerInfo]:
    """List every layer with maps that can be tapped, in execution order.

    Args:
        performer: the network; left as it was.
        input_size: rows and columns of the input; the performer's own, else 224x224.

    Returns:
        One entry per tap; strides and receptive fields are ``None`` where the network cannot be traced or
        uses an operation whose receptive field is not known.

    Raises:
        LayerError: the network does not accept the input size.

    Example:
        >>> [(layer.name, layer.shape) for layer in list_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), (8, 8))]
        [('0', (4, 6, 6))]
    """
    module = module_of(performer)
    size = _input_size(performer, input_size)
    noted = _map_shapes(module, size)
    try:
        traced: Traced | None = trace(module)
    except LayerError:
        traced = None
    fields = receptive_fields(traced, list(noted), size) if traced is not None else {}
    try:
        chosen = _default_tap(performer, noted, traced)
    except LayerError:
        chosen = None
    layers = []
    for name, (kind, shape) in noted.items():
        seen = fields.get(name)
        layers.append(
            LayerInfo(
                name=name,
                kind=kind,
                shape=shape,
                stride_px=seen.stride_px if seen else None,
                receptive_field_px=seen.size_px if seen else None,
                is_default=name == chosen,
            )
        )
    return layers


def default_tap(performer: Performer | nn.Module, input_size: tuple[int, int] | None = None) -> str:
    """Choose the layer to explain when the user names none.

    1. The performer's own ``default_tap`` when it is set.
    2. Networks with two or more hidden fully connected layers (AlexNet, VGG-M, VGG-S, VGG-16): the activation
       after the last convolution but one, which is the papers' choice: relu4, relu5_2 in VGG-16
       (``features.27``), ``features.9`` in torchvision's AlexNet.
    3. Otherwise the last activation or block output that everything passes, whose map has at least 12 rows,
       with two convolutions or linear layers after it, and that is no bottleneck (half the filters of an
       earlier one at least); ``layer3`` in a ResNet at 224 px. Where no map is that fine, the last one with
       the most rows.

    Args:
        performer: the network; left as it was.
        input_size: rows and columns of the input; the performer's own, else 224x224.

    Returns:
        The tap's name.

    Raises:
        LayerError: no layer has maps larger than 1x1 with two layers after it.

    Source:
        arXiv 1805.07468, section 4 (taps of AlexNet, VGG-M, VGG-S, VGG-16); the rule for other networks is
        ours.
    """
    module = module_of(performer)
    if isinstance(performer, Performer) and performer.default_tap is not None:
        return performer.default_tap
    return _default_tap(performer, _map_shapes(module, _input_size(performer, input_size)), trace(module))


def _default_tap(
    performer: Performer | nn.Module,
    noted: Mapping[str, tuple[str, tuple[int, int, int]]],
    traced: Traced | None,
) -> str:
    if isinstance(performer, Performer) and performer.default_tap is not None:
        return performer.default_tap
    if traced is None:
        raise LayerError(
            expected(
                "a network that can be traced, to choose a layer",
                "one that cannot",
                "Name the layer yourself",
            )
        )
    nodes = list(traced.graph.nodes)
    leaves = {n: traced.leaf(n) for n in nodes if n.op == "call_module"}
    convs = [n for n in nodes if isinstance(leaves.get(n), nn.Conv2d)]
    linears = [n for n in nodes if isinstance(leaves.get(n), nn.Linear)]
    cuts = traced.cut_nodes()
    tappable: dict[Any, list[str]] = {}
    for name in noted:
        tappable.setdefault(_finds(traced, name), []).append(name)
    if len(linears) >= 3 and len(convs) >= 2 and all(n in cuts for n in (*convs[-2:], *linears)):
        between = nodes[nodes.index(convs[-2]) : nodes.index(convs[-1])]
        for node in between:
            if is_activation(traced, node) and tappable.get(node):
                return tappable[node][0]
    candidates: list[tuple[int, int, list[str]]] = []
    for node in cuts:
        names = tappable.get(node, [])
        if not names or not (is_activation(traced, node) or traced.is_block(node)):
            continue
        following = [n for n in (*convs, *linears) if traced.index(n) > traced.index(node)]
        shape = noted[names[0]][1]
        if len(following) >= 2 and min(shape[1:]) > 1:
            widest = max([shape[0], *(filters for _, filters, _ in candidates)])
            if 2 * shape[0] >= widest:  # not a bottleneck
                candidates.append((shape[1], shape[0], names))
    if not candidates:
        raise LayerError(
            expected(
                f"a layer of {type(traced.root).__name__} with maps larger than 1x1 and two layers after it",
                "none",
                "Name a layer yourself, or use a larger input",
            )
        )
    enough = min(_MIN_ROWS, max(rows for rows, _, _ in candidates))
    names = [names for rows, _, names in candidates if rows >= enough][-1]
    # The same values often have several names; the shortest is the stage (layer3 rather than layer3.1).
    return min(names, key=lambda n: (n.count("."), len(n)))


def _finds(traced: Traced, name: str) -> Any:
    try:
        return traced.find(name)
    except LayerError:
        return None


def check_tap(performer: Performer | nn.Module, tap: str, input_size: tuple[int, int] | None = None) -> LayerInfo:
    """Return a tap's entry of `list_layers`, refusing layers without maps.

    Args:
        performer: the network; left as it was.
        tap: the layer's name.
        input_size: rows and columns of the input; the performer's own, else 224x224.

    Raises:
        LayerError: an unknown layer (with the nearest names), one without maps, or one whose maps have a
            single cell.
    """
    layers = {layer.name: layer for layer in list_layers(performer, input_size)}
    if tap not in layers:
        place_of(module_of(performer), tap)
        raise LayerError(
            expected(
                f"{tap} to give maps (image, filter, row, col)",
                "another output",
                f"Choose among {', '.join(nearest(tap, layers))}",
            )
        )
    if layers[tap].shape[1:] == (1, 1):
        finer = [name for name, layer in layers.items() if min(layer.shape[1:]) > 1]
        raise LayerError(
            expected(
                f"{tap} to have maps of more than one cell",
                "1x1 maps, in which nothing has a place",
                f"Choose an earlier layer such as {finer[-1]}" if finer else "Use a larger input",
            )
        )
    return layers[tap]
