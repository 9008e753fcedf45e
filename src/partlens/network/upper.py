"""The layers of a performer above a tap as a module of their own."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from partlens.errors import LayerError, expected, first_line
from partlens.network.borrowed import alone
from partlens.network.layout import Layout
from partlens.network.outputs import entries_of
from partlens.network.watched import reached, read_entry, tensors_in

OUTPUT = "output"
_CLOSE = 1e-3
_COPIED_WITHOUT = ("_backward_hooks", "_backward_pre_hooks")
_Place = tuple[str, int]  # of a module's call: its path and the call's number


class LaidOut(nn.Module):
    """Layers that take and give maps, around layers of other layouts.

    Args:
        inner: takes the source's own output and returns a tuple of the targets' own outputs.
        source: layout of the source.
        targets: layout of each target, and whether the tokens beside the grid are wanted, too.
    """

    def __init__(self, inner: nn.Module, source: Layout, targets: Sequence[tuple[Layout, bool]]) -> None:
        super().__init__()
        self.inner, self.source, self.targets = inner, source, tuple(targets)
        self.eval()

    def forward(self, maps: Tensor) -> tuple[Any, ...]:
        """Return the targets' values for the source's maps."""
        found = self.inner(self.source.from_maps(maps))
        return tuple(
            layout.to_maps(value, whole=whole) if isinstance(value, Tensor) else value
            for value, (layout, whole) in zip(found, self.targets, strict=True)
        )


class _Call:
    """One call of a module in a pass: when it began and ended, and the answer's size and type if that is one tensor."""

    def __init__(self, path: str, begun: int, ended: int, answer: Any) -> None:
        self.path, self.begun, self.ended = path, begun, ended
        self.size = tuple(answer.shape) if isinstance(answer, Tensor) else ()
        self.kind = answer.dtype if isinstance(answer, Tensor) else torch.float32

    def is_of_images(self, of_many: _Call, images: int) -> bool:
        """Whether it gives one tensor whose first axis is that of the images, by the same call for many of them."""
        return bool(self.size) and of_many.size == (self.size[0] * images, *self.size[1:])


class Upper(nn.Module):
    """A copy of a network that is entered at a layer: what is given takes the place of the layer's output.

    Layers that lie before it, or behind the last target, are not computed: they give zeros of the right size. So it
    equals the network's own layers only where everything passes that layer (`reproduces`). Its parameters are those
    that the targets depend on, of the others the copy keeps the sizes alone.

    Args:
        network: it is copied.
        source: the module and the number of the call whose output is replaced.
        targets: likewise, ``None`` for what the network returns.
        images: made images, at least two.
        loops: of a module that the network calls image by image, how often for each (`Layout.loop`).

    Raises:
        LayerError: it cannot be copied.
    """

    blank: Tensor

    def __init__(
        self,
        network: nn.Module,
        source: _Place,
        targets: Sequence[_Place | None],
        images: Tensor,
        loops: Mapping[str, int],
    ) -> None:
        super().__init__()
        self.network = _copied(network)
        self.source, self.targets, self.loops = source, tuple(targets), loops
        self.register_buffer("blank", torch.zeros_like(images[:1]), persistent=False)
        self.skipped: dict[str, list[_Call | None]] = {}
        with torch.no_grad():
            own, of_many = self._watched(images)
            of_one = self._watched(images[:1])[1]
        if [call.path for call in of_one] == [call.path for call in of_many]:  # else it runs them one by one
            self.skipped = self._idle(of_one, of_many, len(images))
        try:
            self._keep_used(own[source][:1])
        except Exception:  # noqa: BLE001 - a network may raise anything where it is given zeros
            self.skipped = {}
            self._keep_used(own[source][:1])
        with torch.no_grad():
            again = self.forward(own[source])
        self.reproduces = all(_alike(own[place], other) for place, other in zip(self.targets, again, strict=True))
        """Whether the source's own output gives the network's own values."""
        self.eval()

    def forward(self, given: Tensor) -> tuple[Any, ...]:
        """Return the targets' own values, with ``given`` in the place of the source's output; one thread at a time."""
        with alone(self.network), self._skipping(given):
            found = self._run(self.blank.to(given).expand(len(given), -1, -1, -1), given)
        return tuple(found[place] for place in self.targets)

    @property
    def _wanted(self) -> set[_Place]:
        return {self.source, *(place for place in self.targets if place is not None)}

    def _run(self, images: Tensor, given: Tensor | None = None) -> dict[_Place | None, Any]:
        """Run the network and return what source and targets give, with ``given`` in the source's place."""
        found: dict[_Place | None, Any] = {}
        calls: Counter[str] = Counter()

        def hook_of(path: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, answer: Any) -> Any:
                image, call = divmod(calls[path], self.loops[path]) if self.loops.get(path) else (0, calls[path])
                place = (path, call)
                calls[path] += 1
                value = read_entry(answer)
                if place not in self._wanted or value is None:
                    return None
                if place == self.source and given is not None:
                    value = (given[image : image + 1] if self.loops.get(path) else given).clone()
                    return _with_entry(answer, value)
                found[place] = torch.cat([found[place], value]) if place in found else value.clone()
                return None

            return hook

        with contextlib.ExitStack() as hooks, _Differentiable():
            for path in {path for path, _ in self._wanted}:
                hooks.callback(self.network.get_submodule(path).register_forward_hook(hook_of(path)).remove)
            found[None] = self.network(images)
        return found

    def _watched(self, images: Tensor) -> tuple[dict[_Place | None, Any], list[_Call]]:
        """Run the network; return what source and targets give, and every call of a module, as they end."""
        begun: list[int] = []
        calls: list[_Call] = []

        def begin(*_: Any) -> None:
            begun.append(next(clock))

        def end_of(path: str) -> Any:
            def end(_module: nn.Module, _inputs: Any, answer: Any) -> None:
                calls.append(_Call(path, begun.pop(), next(clock), answer))

            return end

        clock = itertools.count()
        with contextlib.ExitStack() as hooks:
            for path, layer in self.network.named_modules():
                hooks.callback(layer.register_forward_pre_hook(begin, prepend=True).remove)
                hooks.callback(layer.register_forward_hook(end_of(path)).remove)
            found = self._run(images)
        return found, calls

    def _idle(self, of_one: Sequence[_Call], of_many: Sequence[_Call], images: int) -> dict[str, list[_Call | None]]:
        """Return of every layer the calls that are made, in order: itself for one that is skipped, else ``None``.

        The outermost calls before the source or behind the last target are skipped, but for those that give several
        tensors, or one whose first axis is not that of the images.
        """
        first = _end_of(of_one, self.source)
        last = max(_end_of(of_one, place) for place in self.targets)
        wanted = {path for path, _ in self._wanted}
        made: list[tuple[_Call, bool]] = []
        for call, same in zip(of_one, of_many, strict=True):
            inside = [each.path for each, _ in made if each.begun > call.begun]
            outside = call.ended <= first or call.begun > last
            skip = outside and wanted.isdisjoint(inside) and call.is_of_images(same, images)
            if skip:
                del made[len(made) - len(inside) :]
            made.append((call, skip))
        idle: dict[str, list[_Call | None]] = {}
        for call, skip in made:
            idle.setdefault(call.path, []).append(call if skip else None)
        return idle

    @contextlib.contextmanager
    def _skipping(self, given: Tensor) -> Iterator[None]:
        """Let calls that are skipped give zeros, all of the same memory: nobody reads them."""
        layers = [(self.network.get_submodule(path), calls) for path, calls in self.skipped.items() if any(calls)]
        skipped = [call for _, calls in layers for call in calls if call]
        sizes = [math.prod(call.size) * max(call.kind.itemsize, given.itemsize) for call in skipped]
        memory = _zeros(len(given) * max(sizes, default=0), given.device)

        def instead(calls: Iterator[_Call | None], forward: Any) -> Any:
            def zeros(*args: Any, **kwargs: Any) -> Any:
                if (call := next(calls, None)) is None:
                    return forward(*args, **kwargs)
                kind = given.dtype if call.kind.is_floating_point else call.kind
                size = (len(given) * call.size[0], *call.size[1:])
                return memory[: math.prod(size) * kind.itemsize].view(kind).view(size)

            return zeros

        for layer, calls in layers:
            layer.forward = instead(iter(calls), layer.forward)
        try:
            yield
        finally:
            for layer, _ in layers:
                del layer.forward

    def _keep_used(self, given: Tensor) -> None:
        """Make only weights that the targets depend on parameters; of idle layers keep the sizes of weights alone."""
        with torch.enable_grad():
            answers = self.forward(given)
        used = _weights_of(answers)
        for path, layer in self.network.named_modules():
            idle = bool(self.skipped) and None not in self.skipped.get(path, ())
            if idle:  # the owner's hooks would see zeros
                layer._forward_hooks.clear()  # noqa: SLF001
                layer._forward_pre_hooks.clear()  # noqa: SLF001
            weights = layer._parameters  # noqa: SLF001
            for name, weight in [(n, w.detach()) for n, w in weights.items() if w is not None and id(w) not in used]:
                del weights[name]
                kept = weight.new_zeros(()).expand(weight.shape) if idle else weight
                layer.register_buffer(name, kept, persistent=False)


def _end_of(calls: Sequence[_Call], place: _Place | None) -> float:
    return math.inf if place is None else [call.ended for call in calls if call.path == place[0]][place[1]]


def _weights_of(answers: Any) -> set[int]:
    """Return the identities of the weights that gradients of answers reach."""
    ends = [tensor.grad_fn for tensor in tensors_in(answers) if tensor.grad_fn is not None]
    steps = reached(ends, lambda step: [each for each, _ in step.next_functions if each is not None])
    return {id(step.variable) for step in steps if hasattr(step, "variable")}


class _Differentiable(TorchFunctionMode):
    """Keep gradients on where a network turns them off for itself: a reconstruction is learned through it."""

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, but for the one that turns gradients off and on."""
        return None if function is torch._C._set_grad_enabled else function(*args, **(kwargs or {}))  # noqa: SLF001


def _zeros(count: int, device: torch.device) -> Tensor:
    """Return bytes; on the CPU those that nothing reads take no time: NumPy's are filled when they are read."""
    if device.type == "cpu":
        return torch.from_numpy(np.zeros(count, np.uint8))
    return torch.zeros(count, dtype=torch.uint8, device=device)


def _copied(network: nn.Module) -> nn.Module:
    """Copy a network in eval mode, with ``requires_grad`` on; its hooks' own objects stay the owner's."""
    modules = list(network.modules())
    memo = _kept_by_reference(modules)
    for each in modules:
        memo.update({id(each.__dict__[n]): OrderedDict() for n in _COPIED_WITHOUT if n in each.__dict__})
    try:
        made = copy.deepcopy(network, memo)
    except RuntimeError as error:
        rule = f"layers of {type(network).__name__} that can be copied"
        remedy = "Remove weight normalisation first (torch.nn.utils.remove_weight_norm)"
        raise LayerError(expected(rule, first_line(error), remedy)) from error
    for parameter in filter(torch.is_floating_point, made.parameters()):
        parameter.requires_grad = True
    return made.eval()


def _kept_by_reference(modules: Sequence[nn.Module]) -> dict[int, Any]:
    """Return what a deep copy of modules must not copy: the hooks' own objects, which their owner goes on using.

    A hook that is a method of a copied module becomes that of the copy.
    """
    inside = set(map(id, modules))
    memo: dict[int, Any] = {}
    for each in modules:
        for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values()):  # noqa: SLF001
            owner = getattr(hook, "__self__", hook)
            if id(owner) not in inside:
                memo[id(owner)] = owner
    return memo


def _alike(one: Any, other: Any) -> bool:
    """Whether two answers have the same values, up to rounding."""
    pairs = [({"": answer} if isinstance(answer, Tensor) else entries_of(answer)) for answer in (one, other)]
    return pairs[0].keys() == pairs[1].keys() and all(
        bool(torch.allclose(value, pairs[1][name], rtol=_CLOSE, atol=_CLOSE * float(value.abs().max())))
        for name, value in pairs[0].items()
        if value.is_floating_point() and value.numel()
    )


def _with_entry(answer: Any, value: Tensor) -> Any:
    """Return a module's answer with another tensor in the place of the one that a tap reads."""
    read = read_entry(answer)
    if read is answer:
        return value
    if isinstance(answer, Mapping):
        changed = copy.copy(answer)
        for key in [key for key, entry in answer.items() if entry is read]:
            changed[key] = value  # type: ignore[index]
        return changed
    entries = [value if entry is read else entry for entry in answer]
    return type(answer)(*entries) if hasattr(answer, "_fields") else type(answer)(entries)
