"""One forward pass, watched: every call of a module, with what went in and what came out.

Three made images run together: two that differ everywhere, and the first again with one place changed. So the pass
shows not only shapes, but also which axis is that of the images, which tokens do not depend on the image, and where a
place of the image is found again. `partlens.network.layout` and `partlens.network.layers` conclude from it.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from partlens.errors import LayerError, expected, nearest
from partlens.network.borrowed import in_this_thread
from partlens.network.outputs import entries_of

_N = TypeVar("_N")

IMAGES = 3
"""How many images a watched pass has."""

_MOST_CHANGED = 4
_STANDS_OUT = 10  # a place is found again where it changed this many times as much as the others usually did


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: tap name: the module's path, with ``_1``, ``_2`` … for its second, third … call.
        module: the module.
        given: the tensors it was called with.
        output: the tensor that a tap reads.
        lowest: the smallest value of it.
        alike: of tokens, which of them are the same for both images.
        changed: of tokens, those that the change of a place altered most, as far as they stand out.
        maker: the node of autograd's graph that made it; ``None`` in a pass without gradients.
        loop: how often the module is called for each image, where the network runs its images one by one.
    """

    name: str
    module: nn.Module
    given: tuple[Tensor, ...]
    output: Tensor
    lowest: float
    alike: tuple[bool, ...]
    changed: tuple[int, ...]
    maker: Any
    loop: int = 0


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


def three_images(channels: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Return the images of a watched pass, in the type and on the device of a tensor."""
    draws = torch.Generator().manual_seed(0)
    first, other = torch.randn(2, channels, *size, generator=draws)
    place = (slice(None), *changed_place(size))
    third = first.clone()
    third[place] = other[place]
    return torch.stack([first, other, third]).to(device=like.device, dtype=like.dtype)


def _tokens_facts(output: Tensor) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """Compare the tokens of the three images (`Call.alike`, `Call.changed`)."""
    if output.ndim != 3 or len(output) != IMAGES or not output.is_floating_point() or output.numel() == 0:
        return (), ()
    first, other, third = output.detach().float()
    moved = (first - third).abs().sum(1)
    most = moved.argsort(descending=True)[:_MOST_CHANGED]
    standing_out = most[moved[most] > _STANDS_OUT * moved.median()]
    return tuple((first == other).all(1).tolist()), tuple(standing_out.tolist())


def watch(module: nn.Module, images: Tensor) -> tuple[list[Call], Any]:
    """Run a borrowed network on `three_images`; return every call of a module, as they end, and the network's answer.

    Where the network runs its images one by one, the calls for one image stand for all, with the tensors of all, and
    the answer is that for the first. Tensors are kept while the list is: drop it when the conclusions are drawn.
    """
    calls, answer = _one_pass(module, images)
    if not any(len(call.output) == 1 and call.name.endswith("_2") for call in calls):
        return calls, answer
    passes = [_one_pass(module, image) for image in images.split(1)]
    shapes = {tuple((call.name, call.output.shape) for call in of_image) for of_image, _ in passes}
    return (calls, answer) if len(shapes) > 1 else (_joined(calls, [each for each, _ in passes]), passes[0][1])


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


def _one_pass(module: nn.Module, images: Tensor) -> tuple[list[Call], Any]:
    calls: list[Call] = []
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
            calls.append(Call(name, owner, given, output, lowest, *_tokens_facts(output), output.grad_fn))

        return hook

    with contextlib.ExitStack() as hooks:
        for path, child in module.named_modules():
            child._forward_hooks.clear()  # noqa: SLF001 - the owner's would see made images; they come back
            if path and not isinstance(child, torch.jit.ScriptModule):  # scripted parts take no hooks
                hook = in_this_thread(watcher(path))
                hooks.callback(child.register_forward_hook(hook, with_kwargs=True).remove)
        answer = module(images)
    return calls, answer


@dataclass(frozen=True)
class _Makers:
    """The nodes of autograd's graph that lie between an image and results.

    Attributes:
        cut: of each node, in execution order, whether everything passes it.
        last: the nodes that made the results.
    """

    cut: dict[Any, bool]
    last: frozenset[Any]

    def order(self, node: Any) -> int:
        """Place of a node in execution order; -1 where it does not lie between image and results."""
        return int(node._sequence_nr()) if node in self.cut else -1  # noqa: SLF001 - autograd tells no other order


def makers(answer: Any, image: Tensor) -> _Makers:
    """Read autograd's graph: it knows every path from the image that gradients take, and no other.

    A mask that is computed from the image, or a network's own ``no_grad``, is no path.
    """
    results = (answer,) if isinstance(answer, Tensor) else entries_of(answer).values()
    last = frozenset(value.grad_fn for value in results if value.grad_fn is not None)
    readers: dict[Any, list[Any]] = {}
    for node in reached(last, sources_of):
        for source in sources_of(node):
            readers.setdefault(source, []).append(node)
    leaf = next((node for node in readers if getattr(node, "variable", None) is image), None)
    if leaf is None:
        return _Makers({}, last)
    order = lambda node: int(node._sequence_nr())  # noqa: E731, SLF001
    path = [leaf, *sorted(reached([leaf], lambda node: readers.get(node, ())) - {leaf}, key=order)]
    ends = last if len(last) > 1 else ()  # several results are joined behind them all
    passed = bottlenecks(path, lambda node: [*readers.get(node, ()), *([None] if node in ends else [])])
    return _Makers(dict(zip(path[1:], passed[1:], strict=True)), last)


def sources_of(node: Any) -> list[Any]:
    """Return the nodes of autograd's graph that a node reads."""
    return [source for source, _ in node.next_functions if source is not None]


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
