"""Which layers a network has, which of them can be explained and why the others cannot, and which are chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from partlens.errors import LayerError, expected, listed
from partlens.network.borrowed import borrowed, in_this_thread
from partlens.network.graph import Graph, blank_image, refused_size
from partlens.network.receptive_field import receptive_fields

_MIN_ROWS = 12


@dataclass(frozen=True)
class LayerInfo:
    """What is known of a layer, by the name it can be read under.

    Args:
        name: tap name.
        kind: class of the module.
        shape: of its output for one image: filters, rows, columns of maps, or the length of a vector.
        stride_px: input pixels from one cell to the next (rows, columns), as in
            `partlens.network.receptive_field.ReceptiveField`; ``None`` where it cannot be derived.
        receptive_field_px: pixels one cell sees (rows, columns); ``None`` likewise.
        is_default: whether it is the layer explained when none is named.
        reason: why no explainer can be fitted to it; empty where one can.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    stride_px: tuple[int, int] | None
    receptive_field_px: tuple[int, int] | None
    is_default: bool
    reason: str

    @property
    def has_places(self) -> bool:
        """Whether it gives maps of more than one row and column, in which a peak has a place."""
        return len(self.shape) == 3 and min(self.shape[1:]) > 1


@dataclass(frozen=True)
class _Seen:
    kind: str
    shape: tuple[int, ...]
    lowest: float


def _seen_layers(module: nn.Module, image: Tensor) -> dict[str, _Seen]:
    """Run an image and note every output of a module by tap name, in execution order."""
    seen: dict[str, _Seen] = {}
    calls: dict[str, int] = {}

    def watch(path: str, child: nn.Module) -> Any:
        def hook(owner: nn.Module, _inputs: Any, output: Any) -> None:
            call = calls.get(path, 0)
            calls[path] = call + 1
            output = _first_maps(output)
            if output is not None and output.ndim >= 2:
                lowest = float(output.min()) if output.numel() else 0.0
                seen[f"{path}_{call}" if call else path] = _Seen(type(owner).__name__, tuple(output.shape[1:]), lowest)

        return child.register_forward_hook(in_this_thread(hook))

    handles = [watch(path, child) for path, child in module.named_modules() if path]
    try:
        module(image)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first_maps(output: Any) -> Any:
    """Return the output, or of several the first with four dimensions; ``None`` where there is none."""
    if isinstance(output, Tensor):
        return output
    entries = output.values() if isinstance(output, Mapping) else output
    given = entries if isinstance(entries, Iterable) else ()
    return next((v for v in given if isinstance(v, Tensor) and v.ndim == 4), None)


def list_layers(
    module: nn.Module, graph: Graph | None, input_size: tuple[int, int], default: str | None = None
) -> tuple[LayerInfo, ...]:
    """List every layer that can be read, in execution order.

    Without a graph, strides and receptive fields are not known. `default_tap` chooses the layer to explain where
    ``default`` is ``None``.

    Raises:
        LayerError: the network does not accept the input size.

    Example:
        >>> [(layer.name, layer.shape) for layer in list_layers(nn.Sequential(nn.Conv2d(3, 4, 3)), None, (8, 8))]
        [('0', (4, 6, 6))]
    """
    first = next((graph.leaf(n) for n in graph.leaves_of(nn.Conv2d)), None) if graph is not None else None
    with borrowed(module, copy_weights=False) as network, torch.no_grad(), refused_size(network, input_size):
        blank = blank_image(network, input_size, first)
        # A slope instead of zeros: a convolution without biases shows that its values may be negative.
        slope = torch.linspace(-1, 1, blank.numel(), dtype=blank.dtype, device=blank.device)
        seen = _seen_layers(network, slope.reshape(blank.shape))
    maps = {name: each.shape for name, each in seen.items() if len(each.shape) == 3}
    fields = {} if graph is None else receptive_fields(graph, list(maps), input_size)
    if default is None and graph is not None:
        with contextlib.suppress(LayerError):  # none suits; each says why
            default = default_tap(graph, maps)
    found = []
    for name, each in seen.items():
        field = fields.get(name)
        stride, size = (None, None) if field is None else (field.stride_px, field.size_px)
        reason = _reason(each, graph, name)
        found.append(LayerInfo(name, each.kind, each.shape, stride, size, is_default=name == default, reason=reason))
    return tuple(found)


def _reason(layer: _Seen, graph: Graph | None, name: str) -> str:
    """Say why no explainer can be fitted to a layer."""
    if len(layer.shape) != 3:
        return "gives vectors, no maps" if len(layer.shape) == 1 else "gives no maps"
    if min(layer.shape[1:]) < 2:
        return "maps of one row or column"
    if graph is None:
        return "torch.fx cannot trace the network"
    node = _known(graph, name)
    if node is None or node not in graph.cut_nodes:
        return "a shortcut goes around it"
    if layer.lowest < 0:
        return "values below 0: tap the activation after it"
    return "" if graph.after(node) else "no layer after it"


def _hidden_layers(graph: Graph, start: fx.Node) -> list[fx.Node]:
    """Activations of the fully connected layers after a node, but for the last layer; cut points only."""
    found, after_linear = [], False
    for node in graph.cut_nodes:
        if graph.index(node) <= graph.index(start):
            continue
        if node.op == "call_module" and isinstance(graph.leaf(node), nn.Linear):
            after_linear = True
        elif after_linear and graph.is_activation(node):
            found.append(node)
            after_linear = False  # the first activation after each linear layer is its own
    return found


def default_targets(graph: Graph, source: str, input_size: tuple[int, int]) -> tuple[str, ...]:
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
    start = graph.find(source)
    if start not in graph.cut_nodes:
        raise graph.bypassed(source, start, "the output")
    hidden = [node for node in _hidden_layers(graph, start) if node in graph.readable]
    if len(hidden) >= 2:
        return tuple(graph.label(node) for node in hidden[:2])
    judged = next(filter(None, _judging(graph, start, input_size)), None)
    if judged is None:
        earlier = listed([graph.label(n) for n in graph.cut_nodes][-6:], 6)
        raise LayerError(expected(f"layers after {source}", "none", f"Choose an earlier tap, among {earlier}"))
    return tuple(graph.label(node) for node in judged[-2:])


def _judging(graph: Graph, start: fx.Node, input_size: tuple[int, int]) -> Iterator[list[fx.Node]]:
    """Layers by which a reconstruction can be judged, the best kind first."""
    # The output itself leaves nothing to judge the reconstruction by, where there is anything else.
    later = [n for n in graph.after(start) if n is not graph.result] or graph.after(start)
    shapes = graph.shapes(input_size)
    sizes = {n: shapes[n] for n in later if isinstance(shapes.get(n), torch.Size)}
    maps = [n for n, size in sizes.items() if len(size) == 4 and size[2] * size[3] > 1]
    yield list(filter(graph.is_block, maps))
    yield list(filter(graph.is_activation, maps))
    yield maps
    yield list(filter(graph.is_activation, later))
    yield list(sizes)


def default_tap(graph: Graph, maps: Mapping[str, tuple[int, int, int]]) -> str:
    """Choose the layer to explain when the user names none.

    1. Networks with two or more hidden fully connected layers (AlexNet, VGG-M, VGG-S, VGG-16): the activation
       after the last convolution but one, which is the papers' choice: relu4, relu5_2 in VGG-16
       (``features.27``), ``features.9`` in torchvision's AlexNet.
    2. Otherwise the last activation or block output that everything passes, whose map has at least 12 rows,
       with two convolutions or linear layers after it, and that is no bottleneck (half the filters of an
       earlier one at least); ``layer3`` in a ResNet at 224 px. Where no map is that fine, the last one with
       the most rows.

    ``maps`` are filters, rows and columns of every layer that gives maps.

    Raises:
        LayerError: no layer has maps larger than 1x1 with two layers after it.

    Source:
        arXiv 1805.07468, section 4 (taps of AlexNet, VGG-M, VGG-S, VGG-16); the rule for other networks is
        ours.
    """
    names: dict[fx.Node | None, list[str]] = {}
    for name in maps:
        names.setdefault(_known(graph, name), []).append(name)
    if of_papers := [node for node in _before_last_convolution(graph) if node in names]:
        return names[of_papers[0]][0]
    candidates = _candidates(graph, maps, names)
    if not candidates:
        rule = f"a layer of {type(graph.root).__name__} with maps larger than 1x1 and two layers after it"
        raise LayerError(expected(rule, "none", "Name a layer yourself, or use a larger input"))
    enough = min(_MIN_ROWS, max(rows for rows, _, _ in candidates))
    chosen = [found for rows, _, found in candidates if rows >= enough][-1]
    # The same values often have several names; the shortest is the stage (layer3 rather than layer3.1).
    return min(chosen, key=lambda n: (n.count("."), len(n)))


def _candidates(
    graph: Graph, maps: Mapping[str, tuple[int, int, int]], names: Mapping[fx.Node | None, list[str]]
) -> list[tuple[int, int, list[str]]]:
    """Rows, filters and names of the activations and blocks that the second rule of `default_tap` allows."""
    weighted = [graph.index(n) for n in graph.leaves_of(nn.Conv2d, nn.Linear)]
    found: list[tuple[int, int, list[str]]] = []
    widest = 0
    for node in graph.cut_nodes:
        if node not in names or not (graph.is_activation(node) or graph.is_block(node)):
            continue
        filters, rows, cols = maps[names[node][0]]
        if min(rows, cols) < 2 or sum(place > graph.index(node) for place in weighted) < 2:
            continue
        if 2 * filters >= widest:  # no bottleneck
            found.append((rows, filters, names[node]))
            widest = max(widest, filters)
    return found


def _before_last_convolution(graph: Graph) -> list[fx.Node]:
    """Activations between the last two convolutions of a chain that ends in three or more linear layers."""
    convs, linears = graph.leaves_of(nn.Conv2d), graph.leaves_of(nn.Linear)
    if len(linears) < 3 or len(convs) < 2 or not {*convs[-2:], *linears} <= set(graph.cut_nodes):
        return []
    between = graph.nodes[graph.index(convs[-2]) : graph.index(convs[-1])]
    return [node for node in between if graph.is_activation(node)]


def _known(graph: Graph, name: str) -> fx.Node | None:
    try:
        return graph.find(name)
    except LayerError:
        return None
