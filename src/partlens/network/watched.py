"""One forward pass, watched: every call of a module, with what went in and what came out.

Three made images run together: two that differ everywhere, and the first again with one place changed. So the pass
shows not only shapes, but also which axis is that of the images, which tokens do not depend on the image, and where a
place of the image is found again. `partlens.network.layout` and `partlens.network.layers` conclude from it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from partlens.errors import LayerError, expected, first_line, nearest
from partlens.network.borrowed import in_this_thread
from partlens.network.outputs import entries_of

_N = TypeVar("_N")

IMAGES = 3
"""How many images a watched pass has."""

_MOST_CHANGED = 4
_STANDS_OUT = 10  # a place is found again where it changed this many times as much as the others usually did


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a function of torch in a watched pass, of those that depend on the images."""

    name: str  # of the function or method, without underscores
    args: Sequence[Any]  # what it was called with
    kwargs: Mapping[str, Any]  # likewise, by name
    # those of the tensors that depend on the images, and the operations that made them
    read: Sequence[tuple[Tensor, Operation]]
    made: Sequence[Tensor]  # the tensors that it gave or wrote into

    @property
    def sources(self) -> list[Operation]:
        """The operations that made what it reads."""
        return [source for _, source in self.read]


class Record(TorchFunctionMode):
    """Every operation of a pass that depends on the images, in execution order.

    It is of what is computed: gradients need not be on, and branches and loops are those that are taken. Functions of
    TorchScript are not seen. What is written into a view of a tensor the tensor itself does not know.

    Attributes:
        operations: all of them, the images first.
        cut: of those that lead to the network's answer, in execution order, whether everything passes them.
        readers: of these, which read what each gives.
        last: those that made the answer.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.operations = [Operation("images", (), {}, (), (images,))]
        self.cut: dict[Operation, bool] = {}
        self.readers: dict[Operation, list[Operation]] = {}
        self.last: set[Operation] = set()
        self._makers = {id(images): self.operations[0]}  # their tensors are kept, so that no number is used twice

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a call."""
        kwargs = kwargs or {}
        answer = function(*args, **kwargs)
        name = getattr(function, "__name__", "").strip("_")
        read = [(t, self._makers[id(t)]) for t in tensors_in((args, kwargs)) if id(t) in self._makers]
        made = list(tensors_in(args[0] if name == "setitem" else answer))
        if read and made and name not in _OF_SIZES:
            self.operations.append(Operation(name, args, kwargs, read, made))
            self._makers.update({id(tensor): self.operations[-1] for tensor in made})
        return answer

    def maker(self, tensor: Tensor) -> Operation | None:
        """Return the operation that gave a tensor its values; ``None`` where they do not depend on the images."""
        return self._makers.get(id(tensor))

    def lead_to(self, answer: Any) -> None:
        """Find which operations lead to the network's answer, and which of them everything passes."""
        tensors = (answer,) if isinstance(answer, Tensor) else entries_of(answer).values()
        self.last = {maker for tensor in tensors if (maker := self.maker(tensor)) is not None}
        live = reached(self.last, lambda operation: operation.sources)
        path = [operation for operation in self.operations if operation in live]
        for operation in path:
            for source in {*operation.sources}:
                self.readers.setdefault(source, []).append(operation)
        ends = self.last if len(self.last) > 1 else ()  # several results are joined behind them all
        passed = bottlenecks(path, lambda each: [*self.readers.get(each, ()), *([None] if each in ends else [])])
        self.cut = dict(zip(path[1:], passed[1:], strict=True))


# What they give has the size of a tensor, not its values.
_OF_SIZES = frozenset(
    ("new_zeros", "new_ones", "new_full", "new_empty", "zeros_like", "ones_like", "empty_like", "full_like")
)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Give the tensors inside an argument or an answer, in any nesting."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module."""

    name: str  # tap name: the module's path, with ``_1``, ``_2`` … for its second, third … call
    module: nn.Module  # the module
    given: tuple[Tensor, ...]  # the tensors it was called with
    output: Tensor  # the tensor that a tap reads
    lowest: float  # the smallest value of it
    alike: tuple[bool, ...]  # of tokens, which of them are the same for both images
    changed: tuple[int, ...]  # of tokens, those that the change of a place altered most, as far as they stand out
    maker: Operation | None  # the operation that made it; ``None`` where it does not depend on the images
    loop: int = 0  # how often the module is called for each image, where the network runs its images one by one


def read_entry(output: Any) -> Tensor | None:
    """Return the tensor that a tap reads: the answer itself, or of several the first maps, else the first tokens."""
    if isinstance(output, Tensor):
        return output
    given = [value for value in entries_of(output).values() if value.is_floating_point()]
    return next((value for dimensions in (4, 3) for value in given if value.ndim == dimensions), None)


@dataclass(frozen=True)
class Place:
    """Where a tap is read: the module, which of its calls, and the entry of its answer."""

    path: str
    call: int
    key: str | None


def paths_of(module: nn.Module) -> frozenset[str]:
    """Return the names of all modules in a network."""
    return frozenset(path for path, _ in module.named_modules() if path)


def place_of(module: nn.Module, tap: str, known: frozenset[str] | None = None) -> Place:
    """Find the module, the call and the output entry that a tap name means; ``known`` are its `paths_of`, if there."""
    name, _, key = tap.partition(":")
    paths = paths_of(module) if known is None else known
    if name in paths:
        return Place(name, 0, key or None)
    repeated = re.fullmatch(r"(.+)_(\d+)", name)
    if repeated and repeated[1] in paths:
        return Place(repeated[1], int(repeated[2]), key or None)
    raise LayerError(
        expected(f"a layer of {type(module).__name__}", name, f"Nearest: {', '.join(nearest(name, paths))}")
    )


def changed_place(size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns that the third image has changed: neither on the diagonal nor in the middle."""
    rows, cols = size
    return slice(rows // 8, max(3 * rows // 8, 1)), slice(5 * cols // 8, max(7 * cols // 8, 1))


def three_images(channels: int, size: tuple[int, int]) -> Tensor:
    """Return the images of a watched pass."""
    draws = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, channels, *size, generator=draws)
    place = (slice(None), *changed_place(size))
    third = first.clone()
    third[place] = other[place]
    return torch.stack([first, other, third])


def _tokens_facts(output: Tensor) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """Compare the tokens of the three images (`Call.alike`, `Call.changed`)."""
    if output.ndim != 3 or len(output) != IMAGES or not output.is_floating_point() or output.numel() == 0:
        return (), ()
    first, other, third = output.detach().float()
    moved = (first - third).abs().sum(1)
    most = moved.argsort(descending=True)[:_MOST_CHANGED]
    standing_out = most[moved[most] > _STANDS_OUT * moved.median()]
    return tuple((first == other).all(1).tolist()), tuple(standing_out.tolist())


def watch(module: nn.Module, images: Tensor) -> tuple[list[Call], Record]:
    """Run a borrowed network on `three_images`; return every call of a module, as they end, and all operations.

    Where the network runs its images one by one, the calls for one image stand for all, with the tensors of all, and
    the operations are those for the first. Tensors are kept while these are: drop them when conclusions are drawn.
    """
    whole = _one_pass(module, images)
    calls = whole[0]
    if not any(len(call.output) == 1 and call.name.endswith("_2") for call in calls):
        return whole
    passes = [_one_pass(module, image) for image in images.split(1)]
    shapes = {tuple((call.name, call.output.shape) for call in of_image) for of_image, _ in passes}
    return whole if len(shapes) > 1 else (_joined(calls, [each for each, _ in passes]), passes[0][1])


def _joined(calls: Sequence[Call], passes: Sequence[Sequence[Call]]) -> list[Call]:
    """Join the calls of passes of one image each; of the batch's own pass where a module serves all images at once."""
    of_all, of_one = _times_called(calls), _times_called(passes[0])
    whole = {call.name: call for call in calls}
    joined: dict[int, Tensor] = {}  # by the first image's tensor: what one call gave is what the next one was given

    def join(pieces: Sequence[Tensor]) -> Tensor:
        return joined.setdefault(id(pieces[0]), torch.cat(tuple(pieces)).detach())

    found = []
    for same in zip(*passes, strict=True):
        first = same[0]
        once = of_one[id(first.module)]
        loop = once if of_all[id(first.module)] == len(passes) * once else 0
        output = join([call.output for call in same]) if loop else whole[first.name].output
        joined[id(first.output)] = output
        given = (join([call.given[0] for call in same]),) if first.given and first.given[0].ndim else ()
        lowest, facts = min(call.lowest for call in same), _tokens_facts(output)
        found.append(Call(first.name, first.module, given, output, lowest, *facts, first.maker, loop))
    return found


def _times_called(calls: Sequence[Call]) -> Counter[int]:
    return Counter(id(call.module) for call in calls)


def _one_pass(module: nn.Module, images: Tensor) -> tuple[list[Call], Record]:
    calls: list[Call] = []
    record = Record(images)
    counts: Counter[str] = Counter()

    def watcher(path: str) -> Any:
        def hook(owner: nn.Module, args: Any, kwargs: Any, answer: Any) -> None:
            count = counts[path]
            counts[path] += 1
            output = read_entry(answer)
            if output is None or output.ndim < 2 or output.is_quantized:
                return
            name = path if count == 0 else f"{path}_{count}"
            given = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            lowest = float(output.min()) if output.numel() and not output.is_complex() else 0.0
            calls.append(Call(name, owner, given, output, lowest, *_tokens_facts(output), record.maker(output)))

        return hook

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(record)
        for path, child in module.named_modules():
            child._forward_hooks.clear()  # noqa: SLF001 - the owner's would see made images; they come back
            if path:
                hook = in_this_thread(watcher(path))
                hooks.callback(child.register_forward_hook(hook, with_kwargs=True).remove)
        answer = module(images)
    record.lead_to(answer)
    return calls, record


@contextlib.contextmanager
def refused_size(module: nn.Module, channels: int, size: tuple[int, int]) -> Iterator[None]:
    """Say that a network does not accept an input, whatever it raises."""
    try:
        yield
    except Exception as error:  # a network may raise anything
        rule = f"an input that {type(module).__name__} accepts"
        got = f"{channels} channels of {size[0]}x{size[1]} px ({first_line(error)})"
        remedy = "Give the channels and the size it was made for (Preprocessing), or wrap it to take images alone"
        if size[1] in {1, 3, 4} and channels not in {1, 3, 4}:
            remedy = "Put the channels first, as images.permute(0, 3, 1, 2) does"
        raise LayerError(expected(rule, got, remedy)) from error


def reached(start: Iterable[_N], steps: Callable[[_N], Iterable[_N]]) -> set[_N]:
    """Return the nodes of a graph that steps lead to, those at the start included."""
    seen, waiting = set[_N](), list(start)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(steps(node))
    return seen


def bottlenecks(path: Sequence[_N], readers: Callable[[_N], Iterable[_N | None]]) -> list[bool]:
    """Say of nodes in execution order which everything passes; readers that are none of them come behind them all.

    Example:
        >>> bottlenecks("abcd", {"a": "bc", "b": "c", "c": "d", "d": ""}.__getitem__)  # a shortcut goes around b
        [True, False, True, True]
    """
    places: dict[_N | None, int] = {node: place for place, node in enumerate(path)}
    found, reach = [], -1  # reach: the furthest reader of anything before a node
    for place, node in enumerate(path):
        found.append(reach <= place)
        reach = max([reach, *(places.get(reader, len(path)) for reader in readers(node))])
    return found
