"""Which layers a network has, which of them can be explained and why the others cannot, and which are chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn

from partlens.errors import LayerError, expected, listed, usual_modes
from partlens.network.borrowed import borrowed, hooked, like_weights
from partlens.network.layout import Layout, layouts_of
from partlens.network.receptive_field import ReceptiveField, receptive_fields
from partlens.network.watched import Call, Operation, Record, refused_size, three_images, watch

# fmt: off
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.PReLU,
)
# fmt: on
_ACTIVATION_NAMES = {"relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "tanh", "sigmoid"}
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

    order: int  # of execution; -1 where it does not lie between images and answer
    cut: bool = False  # everything passes it
    activation: bool = False
    block: bool = False  # what a block with convolutions or linear layers returns
    result: bool = False  # what the network returns
    normalised: bool = False  # a batch normalisation alone reads it
    label: str = ""  # the name to show


@dataclass(frozen=True)
class Found:
    """A layer in a watched pass; ``before`` is the shape of what it was given."""

    name: str
    module: nn.Module
    layout: Layout | str
    shape: tuple[int, ...]
    lowest: float
    place: _Place
    before: tuple[int, ...]

    @property
    def has_maps(self) -> bool:
        """Whether it gives maps."""
        return isinstance(self.layout, Layout) and len(self.shape) == 3

    @property
    def weighted(self) -> bool:
        """Whether it is a convolution or a fully connected layer."""
        return isinstance(self.module, (nn.Conv2d, nn.Linear))


class Layers:
    """The layers of a network in execution order, and which of them are chosen.

    What everything passes and what cells see is read from the operations of a pass.

    Attributes:
        found: every layer that can be read.
        cut_points: names of what everything passes; an operation without a layer has its own name and number.
    """

    def __init__(self, module: nn.Module, channels: int, size: tuple[int, int]) -> None:
        self._size = size
        with _watched(module, channels, size) as (calls, record):
            layouts = layouts_of(calls, size)
            places = _places(calls, record)
            self._found = {call.name: _found(call, layouts[call.name], places[call.maker]) for call in calls}
            passed = enumerate(filter(record.cut.get, record.cut))
            named = [places[each].label if each in places else f"{each.name}_{k}" for k, each in passed]
            self.cut_points = list(dict.fromkeys(named))
            self.found = tuple(self._found.values())
            fields = receptive_fields(record, size)
            self._fields = {
                call.name: fields[call.maker]
                for call in calls
                if call.maker in fields and self._found[call.name].has_maps
            }

    def listed(self, default: str | None) -> tuple[LayerInfo, ...]:
        """Say of every layer what is known, with the layer that is explained when none is named."""
        return tuple(self._info(found, default) for found in self._found.values())

    def _info(self, found: Found, default: str | None) -> LayerInfo:
        field = self._fields.get(found.name)
        stride, size = (None, None) if field is None else (field.stride_px, field.size_px)
        layout = found.layout.name if isinstance(found.layout, Layout) else UNKNOWN
        kind, is_default = type(found.module).__name__, found.name == default
        return LayerInfo(found.name, kind, found.shape, stride, size, is_default, self._reason(found), layout)

    def _reason(self, found: Found) -> str:
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

    def _cut(self) -> list[Found]:
        """Return the layers that everything passes, one for each value, in execution order."""
        by_order = {found.place.order: found for found in reversed(self._found.values()) if found.place.cut}
        return [by_order[order] for order in sorted(by_order)]

    def _after(self, start: Found) -> list[Found]:
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
        """Return what the cells of a layer see, where the operations tell."""
        return self._fields.get(name)

    def lowest(self, name: str) -> float:
        """Return the smallest value that a layer gave for made images."""
        return self._found[name].lowest

    def maker_of(self, name: str) -> str:
        """Return the innermost layer that gives the same value, whatever the owner's hooks change."""
        found = self._found[name]
        same = [n for n, f in self._found.items() if f.place.order == found.place.order and f.shape == found.shape]
        inner = same[: same.index(name) + 1]
        return next((n for n in reversed(inner) if hooked(self._found[n].module)), inner[0])

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

    def _hidden(self, start: Found) -> list[Found]:
        """Activations of the fully connected layers after a layer, but for the last layer; cut points only."""
        found, after_linear = [], False
        for layer in self._after(start):
            if isinstance(layer.module, nn.Linear):
                after_linear = True
            elif after_linear and layer.place.activation:
                found.append(layer)
                after_linear = False  # the first activation after each linear layer is its own
        return found

    def _judging(self, start: Found) -> Iterator[list[Found]]:
        """Layers by which a reconstruction can be judged, the best kind first."""
        # The output itself leaves nothing to judge the reconstruction by, where there is anything else.
        later = [found for found in self._after(start) if not found.place.result] or self._after(start)
        maps = [found for found in later if found.has_maps and found.shape[1] * found.shape[2] > 1]
        yield [*filter(attrgetter("place.block"), maps)]
        yield [*filter(attrgetter("place.activation"), maps)]
        yield maps
        yield [*filter(attrgetter("place.activation"), later)]
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

    def _candidates(self) -> list[Found]:
        """The activations and blocks that the second rule of `default` allows; those that see too little come last."""
        found = self._followed_by(2)
        seeing = [layer for layer in found if self._sees_enough(layer)]
        return seeing or [layer for layer in self._followed_by(1) if found and self._sees_enough(layer)] or found

    def _followed_by(self, count: int) -> list[Found]:
        """The activations and blocks with so many convolutions or linear layers after them, without bottlenecks."""
        weighted = [found.place.order for found in self._found.values() if found.weighted]
        found: list[Found] = []
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

    def _sees_enough(self, found: Found) -> bool:
        field = self._fields.get(found.name)
        return field is None or min(field.size_px) >= _LEAST_SEEN * min(self._size)

    def _before_last_convolution(self) -> Found | None:
        """Activation between the last two convolutions of a chain that ends in three or more linear layers."""
        convolutions, linear = (
            [found for found in self._found.values() if isinstance(found.module, kind)]
            for kind in (nn.Conv2d, nn.Linear)
        )
        if len(linear) < 3 or len(convolutions) < 2:
            return None
        if not all(found.place.cut for found in (*convolutions[-2:], *linear)):
            return None
        first, last = (found.place.order for found in convolutions[-2:])
        between = [found for found in self._cut() if first < found.place.order < last and found.has_maps]
        return next(filter(attrgetter("place.activation"), between), None)


@contextlib.contextmanager
def _watched(module: nn.Module, channels: int, size: tuple[int, int]) -> Iterator[tuple[list[Call], Record]]:
    """Watch one pass of a network (`partlens.network.watched`)."""
    with usual_modes(), torch.no_grad(), borrowed(module, copy_weights=False) as network:
        with refused_size(network, channels, size):
            watched = watch(network, like_weights(network, three_images(channels, size)))
        yield watched


def found_layouts(module: nn.Module, channels: int, size: tuple[int, int]) -> dict[str, Layout | str]:
    """Infer the layout of every layer's output (`partlens.network.layout.layouts_of`).

    Raises:
        LayerError: the network does not accept the input.
    """
    with _watched(module, channels, size) as (calls, _):
        return layouts_of(calls, size)


def _found(call: Call, layout: Layout | str, place: _Place) -> Found:
    shape = call.output.shape[1:]
    if isinstance(layout, Layout):
        shape = layout.to_maps(call.output).shape[1:]
    before = tuple(call.given[0].shape) if call.given else ()
    return Found(call.name, call.module, layout, tuple(shape), call.lowest, place, before)


def _places(calls: Sequence[Call], record: Record) -> dict[Operation | None, _Place]:
    """Say where the value of each operation that made a layer's output is among all values."""
    same: dict[Operation | None, list[Call]] = {}
    for call in calls:
        same.setdefault(call.maker, []).append(call)
    orders: dict[Operation | None, int] = {operation: order for order, operation in enumerate(record.cut, 1)}
    return {maker: _place(maker, orders.get(maker, -1), same, record) for maker in same}


def _place(
    maker: Operation | None, order: int, same: Mapping[Operation | None, Sequence[Call]], record: Record
) -> _Place:
    if maker is None or order < 0:
        return _Place(-1)
    (reader, *others), alike = record.readers.get(maker, [maker]), same[maker]
    shown = _shown(alike)
    return _Place(
        order,
        record.cut[maker],
        activation=maker.name in _ACTIVATION_NAMES or any(isinstance(one.module, ACTIVATIONS) for one in alike),
        block=_is_block(shown.module),
        result=record.last == {maker},
        label=shown.name,
        # What derives from it may do more.
        normalised=not others and any(type(one.module) is nn.BatchNorm2d for one in same.get(reader, ())),
    )


def _shown(alike: Sequence[Call]) -> Call:
    """Choose whose name is shown of layers that give the same value: the innermost block, else the innermost layer.

    Blocks with convolutions or linear layers come first, so that an activation of one's own hides no block. Plain
    ``Sequential`` containers are none, so that ``features.30`` is not called ``features``; what derives from them
    (torchvision's ConvNormActivation) is one where nothing else ends.
    """
    ends = [one for one in alike if not _is_plain(one.module)]
    blocks = [one for one in ends if not isinstance(one.module, _PLAIN)] or ends
    weighted = [one for one in blocks if _is_block(one.module)]
    return max(weighted or blocks or alike, key=lambda one: len(one.name))


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is a plain container or a layer of torch."""
    own = not type(module).__module__.startswith("torch.nn") or next(module.children(), None) is not None
    return type(module) in _PLAIN or not own


def _is_block(module: nn.Module) -> bool:
    """Whether a module is a block with convolutions or linear layers of its own."""
    inside = (each for each in module.modules() if each is not module)
    return type(module) not in _PLAIN and any(isinstance(each, (nn.Conv2d, nn.Linear)) for each in inside)
