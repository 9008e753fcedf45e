"""Which layers a network has, which of them can be explained and why the others cannot, and which are chosen."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from partlens.errors import LayerError, expected, listed
from partlens.network.borrowed import borrowed
from partlens.network.graph import ACTIVATIONS, Graph, refused_size
from partlens.network.layout import Layout, layouts_of
from partlens.network.receptive_field import ReceptiveField, receptive_fields
from partlens.network.upper import copied
from partlens.network.watched import Call, makers, three_images, watch

_MIN_ROWS = 12
_LEAST_SEEN = 1 / 12  # of the input's side: in a smaller field no part of an object is seen
UNKNOWN = "unknown"
"""The layout of a layer whose filters and places cannot be told."""

_PLAIN = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class LayerInfo:
    """What is known of a layer, by the name it can be read under.

    Args:
        name: tap name.
        kind: class of the module.
        shape: of what is read of it for one image: filters, rows, columns of maps, or the length of a vector.
        stride_px: input pixels from one cell to the next (rows, columns), as in
            `partlens.network.receptive_field.ReceptiveField`; ``None`` where it cannot be derived.
        receptive_field_px: pixels one cell sees (rows, columns); ``None`` likewise.
        is_default: whether it is the layer explained when none is named.
        reason: why no explainer can be fitted to it; empty where one can.
        layout: where its own output has filters and places (`partlens.network.layout.Layout`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride_px: tuple[int, int] | None
    receptive_field_px: tuple[int, int] | None
    is_default: bool
    reason: str
    layout: str

    @property
    def has_maps(self) -> bool:
        """Whether it gives maps."""
        return len(self.shape) == 3 and self.layout != UNKNOWN

    @property
    def has_places(self) -> bool:
        """Whether it gives maps of more than one row and column, in which a peak has a place."""
        return self.has_maps and min(self.shape[1:]) > 1


@dataclass(frozen=True)
class _Place:
    """Where a layer's value is among all values: layers that give the same value share it."""

    order: int  # of execution; -1 where the graph does not know the layer
    cut: bool = False  # everything passes it
    activation: bool = False
    block: bool = False  # what a block with convolutions or linear layers returns
    result: bool = False  # what the network returns
    label: str = ""  # the name to show


@dataclass(frozen=True)
class _Found:
    name: str
    module: nn.Module
    layout: Layout | str
    shape: tuple[int, ...]
    lowest: float
    place: _Place

    @property
    def has_maps(self) -> bool:
        return isinstance(self.layout, Layout) and len(self.shape) == 3

    @property
    def weighted(self) -> bool:
        return isinstance(self.module, (nn.Conv2d, nn.Linear))


class Layers:
    """The layers of a network in execution order, and which of them are chosen.

    What is a cut point is read from the graph of torch.fx, or, where the network cannot be traced, from autograd's.
    """

    def __init__(self, module: nn.Module, graph: Graph | None, channels: int, size: tuple[int, int]) -> None:
        self._size = size
        with _watched(module, channels, size, gradients=graph is None) as (calls, answer, image):
            layouts = layouts_of(calls, size)
            places = _in_graph(graph, calls) if graph is not None else _in_autograd(calls, answer, image)
            self._found = {
                call.name: _found(call, layouts[call.name], place) for call, place in zip(calls, places, strict=True)
            }
        maps = [found.name for found in self._found.values() if found.has_maps]
        self._fields = {} if graph is None else receptive_fields(graph, maps, size)

    def listed(self, default: str | None) -> tuple[LayerInfo, ...]:
        """Say of every layer what is known, with the layer that is explained when none is named."""
        return tuple(self._info(found, default) for found in self._found.values())

    def _info(self, found: _Found, default: str | None) -> LayerInfo:
        field = self._fields.get(found.name)
        stride, size = (None, None) if field is None else (field.stride_px, field.size_px)
        layout = found.layout.name if isinstance(found.layout, Layout) else UNKNOWN
        kind, is_default = type(found.module).__name__, found.name == default
        return LayerInfo(found.name, kind, found.shape, stride, size, is_default, self._reason(found), layout)

    def _reason(self, found: _Found) -> str:
        """Say why no explainer can be fitted to a layer."""
        if isinstance(found.layout, str):
            return found.layout
        if len(found.shape) != 3:
            return "gives vectors, no maps"
        if min(found.shape[1:]) < 2:
            return "maps of one row or column"
        if not found.place.cut:
            return "a shortcut goes around it"
        return "" if self._after(found) else "no layer after it"

    def _cut(self) -> list[_Found]:
        """Return the layers that everything passes, one for each value, in execution order."""
        by_order = {found.place.order: found for found in reversed(self._found.values()) if found.place.cut}
        return [by_order[order] for order in sorted(by_order)]

    def _after(self, start: _Found) -> list[_Found]:
        return [found for found in self._cut() if found.place.order > start.place.order]

    def targets(self, source: str) -> tuple[str, ...]:
        """Choose the layers by whose values a reconstruction at ``source`` is judged.

        - Two or more hidden fully connected layers after the source (AlexNet, VGG): the outputs of the first two
          after their activation, which are the papers' fc6 and fc7.
        - Otherwise (ResNet and other heads with one linear layer): the last two blocks after the source that are
          cut points with maps of more than one cell; for ResNet-18 cut at ``layer3`` these are ``layer4.0`` and
          ``layer4.1``. Where there are no blocks, the last two such layers, activations first.

        Two names in execution order, or one where the network has only one.

        Raises:
            LayerError: nothing to compare after the source, or the source is not a cut point.

        Source:
            arXiv 1805.07468, section 3.1 and appendix H (fc6 and fc7). For residual networks the published text
            contradicts itself; this reading is the one whose dimensions agree.
        """
        start = self._found[source]
        if not start.place.cut:
            raise self.bypassed(source)
        hidden = self._hidden(start)
        judged = hidden[:2] if len(hidden) >= 2 else next(filter(None, self._judging(start)), [])[-2:]
        if not judged:
            earlier = listed([found.place.label for found in self._cut()][-6:], 6)
            raise LayerError(expected(f"layers after {source}", "none", f"Choose an earlier tap, among {earlier}"))
        return tuple(found.place.label for found in judged)

    def field(self, name: str) -> ReceptiveField | None:
        """Return what the cells of a layer see, where the graph tells."""
        return self._fields.get(name)

    def lowest(self, name: str) -> float:
        """Return the smallest value that a layer gave for made images."""
        return self._found[name].lowest

    def cut_points(self) -> list[str]:
        """Return the layers through which everything passes, in execution order."""
        return [found.place.label for found in self._cut()]

    def maker_of(self, name: str) -> str:
        """Return the innermost layer that gives the same value."""
        found = self._found[name]
        return next(n for n, f in self._found.items() if f.place.order == found.place.order and f.shape == found.shape)

    def is_cut(self, name: str) -> bool:
        """Whether everything passes a layer."""
        return self._found[name].place.cut

    def check_cut(self, source: str, targets: Sequence[str]) -> None:
        """Refuse a layer that not everything passes, and targets that are not behind it."""
        if not self._found[source].place.cut:
            raise self.bypassed(source)
        later = [found.place.label for found in self._after(self._found[source])]
        for name in targets:
            found = self._found.get(name)
            if found is None or found.place.order <= self._found[source].place.order:
                got = f"{name}, which does not depend on it"
                remedy = f"Choose among {listed(later or ['output'], 6)}"
                raise LayerError(expected(f"a target after {source}", got, remedy))

    def bypassed(self, source: str) -> LayerError:
        """Build the error of a layer that not everything passes."""
        order = self._found[source].place.order
        before = [found.place.label for found in self._cut() if found.place.order < order][-2:]
        behind = [found.place.label for found in self._cut() if found.place.order > order][:2]
        remedy = f"Nearest layers that can be cut: {', '.join(before + behind) or 'none'}"
        rule = "a layer through which everything that the output reads must pass"
        return LayerError(expected(rule, f"{source}, which a shortcut goes around", remedy))

    def _hidden(self, start: _Found) -> list[_Found]:
        """Activations of the fully connected layers after a layer, but for the last layer; cut points only."""
        found, after_linear = [], False
        for layer in self._after(start):
            if isinstance(layer.module, nn.Linear):
                after_linear = True
            elif after_linear and layer.place.activation:
                found.append(layer)
                after_linear = False  # the first activation after each linear layer is its own
        return found

    def _judging(self, start: _Found) -> Iterator[list[_Found]]:
        """Layers by which a reconstruction can be judged, the best kind first."""
        # The output itself leaves nothing to judge the reconstruction by, where there is anything else.
        later = [found for found in self._after(start) if not found.place.result] or self._after(start)
        maps = [found for found in later if found.has_maps and found.shape[1] * found.shape[2] > 1]
        yield [found for found in maps if found.place.block]
        yield [found for found in maps if found.place.activation]
        yield maps
        yield [found for found in later if found.place.activation]
        yield [found for found in later if isinstance(found.layout, Layout)]

    def default(self) -> str | None:
        """Choose the layer to explain when the user names none; ``None`` where no layer suits.

        1. Networks with two or more hidden fully connected layers (AlexNet, VGG-M, VGG-S, VGG-16): the activation
           after the last convolution but one, which is the papers' choice: relu4, relu5_2 in VGG-16
           (``features.27``), ``features.9`` in torchvision's AlexNet.
        2. Otherwise the last activation or block output that everything passes, whose map has at least 12 rows,
           with two convolutions or linear layers after it, and that is no bottleneck (half the filters of an
           earlier one at least); ``layer3`` in a ResNet at 224 px. Where no map is that fine, the last one with
           the most rows. A layer whose cells see less than a twelfth of the input's side comes last, also after those
           with one convolution or linear layer behind them (HRNet: ``final_layer`` rather than ``layer1``).

        Source:
            arXiv 1805.07468, section 4 (taps of AlexNet, VGG-M, VGG-S, VGG-16); the rule for other networks is
            ours.
        """
        chosen = self._before_last_convolution()
        if chosen is None:
            candidates = self._candidates()
            if not candidates:
                return None
            rows = [found.shape[1] for found in candidates]
            enough = min(_MIN_ROWS, max(rows))
            chosen = [found for found in candidates if found.shape[1] >= enough][-1]
        # The same values often have several names; the shortest is the stage (layer3 rather than layer3.1).
        names = [name for name, found in self._found.items() if found.place.order == chosen.place.order]
        return min(names, key=lambda name: (name.count("."), len(name)))

    def _candidates(self) -> list[_Found]:
        """The activations and blocks that the second rule of `default` allows; those that see too little come last."""
        found = self._followed_by(2)
        seeing = [layer for layer in found if self._sees_enough(layer)]
        return seeing or [layer for layer in self._followed_by(1) if found and self._sees_enough(layer)] or found

    def _followed_by(self, count: int) -> list[_Found]:
        """The activations and blocks with so many convolutions or linear layers after them, without bottlenecks."""
        weighted = [found.place.order for found in self._found.values() if found.weighted]
        found: list[_Found] = []
        widest = 0
        for layer in self._cut():
            place = layer.place
            if not layer.has_maps or not (place.activation or place.block) or min(layer.shape[1:]) < 2:
                continue
            if sum(order > place.order for order in weighted) < count:
                continue
            if 2 * layer.shape[0] >= widest:  # no bottleneck
                found.append(layer)
                widest = max(widest, layer.shape[0])
        return found

    def _sees_enough(self, found: _Found) -> bool:
        field = self._fields.get(found.name)
        return field is None or min(field.size_px) >= _LEAST_SEEN * min(self._size)

    def _before_last_convolution(self) -> _Found | None:
        """Activation between the last two convolutions of a chain that ends in three or more linear layers."""
        convolutions = [found for found in self._found.values() if isinstance(found.module, nn.Conv2d)]
        linear = [found for found in self._found.values() if isinstance(found.module, nn.Linear)]
        if len(linear) < 3 or len(convolutions) < 2:
            return None
        if not all(found.place.cut for found in (*convolutions[-2:], *linear)):
            return None
        first, last = (found.place.order for found in convolutions[-2:])
        between = [found for found in self._cut() if first < found.place.order < last and found.has_maps]
        return next((found for found in between if found.place.activation), None)


@contextlib.contextmanager
def _watched(
    module: nn.Module, channels: int, size: tuple[int, int], *, gradients: bool
) -> Iterator[tuple[list[Call], Any, Tensor]]:
    """Watch one pass of a network (`partlens.network.watched`): its calls, its answer and the images."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
    with (
        torch.inference_mode(mode=False),
        borrowed(module, copy_weights=False) as lent,
        torch.set_grad_enabled(gradients),
    ):
        network = lent
        if gradients:  # a network that caches values must not keep any that gradients hang on
            with contextlib.suppress(LayerError):  # one that cannot be copied is refused when it is to be cut
                network = copied(lent)
        images = three_images(channels, size, weight).requires_grad_(gradients)
        with refused_size(network, channels, size), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a network that asks for a value is told so where gradients are on
            calls, answer = watch(network, images.clone())
        yield calls, answer, images


def found_layouts(module: nn.Module, channels: int, size: tuple[int, int]) -> dict[str, Layout | str]:
    """Infer the layout of every layer's output (`partlens.network.layout.layouts_of`).

    Raises:
        LayerError: the network does not accept the input.
    """
    with _watched(module, channels, size, gradients=False) as (calls, _, _):
        return layouts_of(calls, size)


def _found(call: Call, layout: Layout | str, place: _Place) -> _Found:
    shape = call.output.shape[1:]
    if isinstance(layout, Layout):
        shape = layout.to_maps(call.output).shape[1:]
    return _Found(call.name, call.module, layout, tuple(shape), call.lowest, place)


def _in_graph(graph: Graph, calls: Sequence[Call]) -> Iterator[_Place]:
    cut = set(graph.cut_nodes)
    for call in calls:
        node = _known(graph, call.name)
        if node is None:
            yield _Place(-1)
            continue
        facts = (node in cut, graph.is_activation(node), graph.is_block(node), node is graph.result)
        yield _Place(graph.index(node), *facts, graph.label(node))


def _known(graph: Graph, name: str) -> fx.Node | None:
    try:
        return graph.find(name)
    except LayerError:
        return None


def _in_autograd(calls: Sequence[Call], answer: Any, image: Tensor) -> Iterator[_Place]:
    found = makers(answer, image)
    same: dict[Hashable, list[Call]] = {}
    for call in calls:
        same.setdefault(call.maker, []).append(call)
    for call in calls:
        alike = same[call.maker]
        blocks = [one for one in alike if _is_block(one.module)]
        label = min(blocks or alike, key=lambda one: -len(one.name)).name
        activation = any(isinstance(one.module, ACTIVATIONS) for one in alike)
        cut, result = found.cut.get(call.maker, False), found.last == {call.maker}
        yield _Place(found.order(call.maker), cut, activation, bool(blocks), result, label)


def _is_block(module: nn.Module) -> bool:
    """Whether a module is a block with convolutions or linear layers of its own."""
    inside = (each for each in module.modules() if each is not module)
    return type(module) not in _PLAIN and any(isinstance(each, (nn.Conv2d, nn.Linear)) for each in inside)
