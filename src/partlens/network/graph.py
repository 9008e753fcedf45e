"""The graph of a network by torch.fx, with the names that taps use; and copies cut out of it.

The explainer's decoder starts as a copy of the layers behind a tap, and its reconstruction goes back into the performer
through another.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import operator
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from partlens.errors import LayerError, expected, first_line, nearest
from partlens.network.borrowed import borrowed, unwrapped
from partlens.network.kept_hooks import HookedCalls, kept_by_reference
from partlens.network.watched import reached

# fmt: off
# Kept whole while tracing: torchvision's operators with loops or data-dependent shapes.
_LEAVES = frozenset((
    "DeformConv2d", "DropBlock2d", "FeaturePyramidNetwork", "MultiScaleRoIAlign", "RoIAlign", "RoIPool", "PSRoIAlign",
    "PSRoIPool", "StochasticDepth",
))
# fmt: on
_COPIED_WITHOUT = ("_backward_hooks", "_backward_pre_hooks")
_OUTPUT = "output"
_Layers = TypeVar("_Layers")


def _is_of_torchvision(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether a module is one of torchvision's operators, by name: torchvision is not imported to find out."""
    return any(
        kind.__name__ in names and kind.__module__.startswith("torchvision.ops.") for kind in type(module).__mro__
    )


class _Tracer(fx.Tracer):
    """Trace a network and note what each layer returns, by tap name."""

    def __init__(self) -> None:
        # A network that uses torchvision's or timm's functions has imported them by now.
        operators = sys.modules.get("torchvision.ops")
        timm = sys.modules.get("timm.models._features_fx")
        whole = () if timm is None else tuple(timm.get_notrace_functions())
        super().__init__((math,) if operators is None else (math, operators), whole)
        self.kept_whole = () if timm is None else tuple(timm.get_notrace_modules())
        self.calls: Counter[str] = Counter()
        self.layers: dict[str, fx.Node] = {}
        self.hooked = HookedCalls()

    def create_args_for_root(
        self,
        root_fn: Any,
        is_module: bool,  # noqa: ARG002 - it always is one
        concrete_args: Any = None,  # noqa: ARG002 - optional arguments keep their defaults
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make the images the only argument: optional ones are not given, so that branches on them can be followed."""
        image = self.create_proxy("placeholder", next(iter(_required(self.root)), "images"), (), {})

        def with_hooks(root: nn.Module, image: Any) -> Any:
            return self.hooked.call(self, root, "", lambda given: root_fn(root, given), ((image,), {}))

        return with_hooks, [self.root, image]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, self.kept_whole) or _is_of_torchvision(m, _LEAVES)
        return whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        path = self.path_of_module(m)
        name = f"{path}_{self.calls[path]}" if path in self.calls else path
        self.calls[path] += 1
        if self.is_leaf_module(m, path):
            result = self.create_proxy("call_module", path, args, kwargs)
        else:  # not `forward`, which would call hooks with proxies
            result = self.hooked.call(self, m, path, m.forward, (args, kwargs))
        if isinstance(result, fx.Proxy):
            self.layers[name] = result.node
        return result


_OUT_OF_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def _plain_name(name: str) -> str | None:
    """Return the name without the underscore that marks an in-place operation of torch."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else None


def _without_overwriting(node: fx.Node, root: nn.Module) -> bool:
    """Rewrite an in-place operation to its counterpart; return whether the node was one."""
    if node.op == "call_module":  # copies are made to work out of place
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        method = _plain_name(str(node.target))
        if method is None or not hasattr(Tensor, method):
            return False
        node.target = method
        return True
    if node.op != "call_function":
        return False
    if node.kwargs.get("inplace") is True:
        node.update_kwarg("inplace", False)  # noqa: FBT003
        return True
    plain = _OUT_OF_PLACE.get(node.target)
    if plain is None and (name := _plain_name(getattr(node.target, "__name__", ""))) is not None:
        plain = getattr(F, name, getattr(torch, name, None))
    if not callable(plain):
        return False
    node.target = plain
    return True


def _make_out_of_place(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite in-place operations so that no node's value is overwritten.

    Later readers of the overwritten tensor are redirected to the new value, which keeps the meaning.
    Overwriting through a view of another tensor is not followed.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if _without_overwriting(node, root) and node.args and isinstance(node.args[0], fx.Node):
            written = node.args[0]
            for user in list(written.users):
                if order[user] > order[node]:
                    user.replace_input_with(written, node)


def _calls(node: Any, op: str, target: str) -> bool:
    """Whether a node is a call of a function or method by name."""
    return isinstance(node, fx.Node) and node.op == op and getattr(node.target, "__name__", node.target) == target


def _batch_of(node: fx.Node) -> fx.Node | None:
    """Return ``x`` when a node is the number of images of ``x``: ``x.size(0)``, ``x.shape[0]``."""
    if _calls(node, "call_method", "size") and node.args[1:] == (0,):
        return node.all_input_nodes[0]
    if not _calls(node, "call_function", "getitem") or node.args[1] != 0:
        return None
    sizes: Any = node.args[0]
    if (_calls(sizes, "call_method", "size") and len(sizes.args) == 1) or (
        _calls(sizes, "call_function", "getattr") and sizes.args[1] == "shape"
    ):
        return cast("fx.Node", sizes.all_input_nodes[0])
    return None


def _assemble(parts: dict[str, Any], graph: fx.Graph, module: nn.Module) -> nn.Module:
    """Deep-copy the layers, with their forward hooks, and join them by the graph."""
    modules = [each for part in parts.values() if isinstance(part, nn.Module) for each in part.modules()]
    memo = kept_by_reference(modules)
    for each in modules:
        memo.update({id(each.__dict__[n]): OrderedDict() for n in _COPIED_WITHOUT if n in each.__dict__})
    return learnable(fx.GraphModule(copied(parts, module, memo), graph, class_name="Cut"))


def copied(layers: _Layers, network: nn.Module, memo: dict[int, Any] | None = None) -> _Layers:
    """Copy layers of a network, or all of it.

    Raises:
        LayerError: they hold what cannot be copied.
    """
    try:
        return copy.deepcopy(layers, memo)
    except RuntimeError as error:
        rule = f"layers of {type(network).__name__} that can be copied"
        remedy = "Remove weight normalisation first (torch.nn.utils.remove_weight_norm)"
        raise LayerError(expected(rule, first_line(error), remedy)) from error


def learnable(module: nn.Module) -> nn.Module:
    """Return a copy in eval mode, made to work out of place, with ``requires_grad`` on."""
    for each in module.modules():
        if getattr(each, "inplace", False):
            each.inplace = False  # type: ignore[assignment]
    for parameter in filter(torch.is_floating_point, module.parameters()):
        parameter.requires_grad = True
    return module.eval()


class Graph:
    """A network's graph in eval mode, in execution order and without in-place operations; made by `trace`.

    Attributes:
        root: the network (borrowed, not a copy).
        nodes: of torch.fx, in execution order; leaf modules are found in ``root``.
        layers: what each module returns, by tap name.
        input: the image batch.
        result: the node that the network returns; ``None`` when it returns several.
        constants: tensors made in ``forward`` from numbers.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        tracer: _Tracer,
        source: fx.Node,
        constants: Mapping[str, Any],
    ) -> None:
        self.root = root
        self.nodes = list(graph.nodes)
        self.layers = {name: node for name, node in tracer.layers.items() if name and node.graph is graph}
        self.input = source
        self.constants, self.hooked = constants, tracer.hooked
        self._end = next(node for node in self.nodes if node.op == "output")
        returned = self._end.args[0]
        self.result = returned if isinstance(returned, fx.Node) else None

    def find(self, name: str) -> fx.Node:
        """Return the node of a tap name; of a module that returns several values, that of its last layer.

        Raises:
            LayerError: no such layer, with the nearest names.
        """
        if name in self.layers:
            return self.layers[name]
        if inside := [node for own, node in self.layers.items() if own.startswith(f"{name}.")]:
            return inside[-1]
        if name == _OUTPUT and self.result is not None:
            return self.result
        remedy = f"Nearest: {', '.join(nearest(name, [*self.layers, _OUTPUT]))}"
        raise LayerError(expected(f"a layer of {type(self.root).__name__}", name, remedy))

    def descendants(self, source: fx.Node) -> set[fx.Node]:
        """Return all nodes that depend on the source, itself included."""
        return reached([source], lambda node: node.users)

    def leaf(self, node: fx.Node) -> nn.Module:
        """Return the module that a ``call_module`` node calls."""
        return self.root.get_submodule(str(node.target))

    def attribute(self, node: fx.Node) -> Any:
        """Return the parameter, buffer or constant that a ``get_attr`` node reads."""
        path = str(node.target)
        if path in self.constants:
            return self.constants[path]
        owner, _, name = path.rpartition(".")
        return getattr(self.root.get_submodule(owner), name)

    def cut(self, source: str, targets: Sequence[str]) -> nn.Module:
        """Copy the layers between a tap and later ones.

        It takes the map of ``source`` and returns a tuple with one entry per target (``"output"`` is the network's
        own), equal bit for bit to what the network computes. Its parameters are copies with ``requires_grad`` on, under
        the network's names; it works out of place, so that neither its input nor its outputs are overwritten.

        Raises:
            LayerError: an unknown layer; a target that is not after the source; a source that a shortcut goes
                around.

        Example:
            >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
            >>> head = trace(network).cut("1", ["output"])
            >>> image = torch.ones(1, 3, 8, 8)
            >>> bool((head(network[:2](image))[0] == network(image)).all())
            True
        """
        if not targets:
            raise LayerError(expected("at least one target layer", "none", 'Name one, or "output"'))
        start = self.find(source)
        after = self.descendants(start)
        ends: list[Any] = []
        needed: set[fx.Node] = set()
        for name in targets:
            whole = name == _OUTPUT and self.result is None  # several outputs, joined by the last node
            ends.append(self._end.args[0] if whole else self.find(name))
            for node in self._end.all_input_nodes if whole else [ends[-1]]:
                if node is start or node not in after:
                    got = f"{name}, which does not depend on it"
                    raise LayerError(expected(f"a target after {source}", got, "Choose a layer behind it"))
                between = self._between(start, node, after)
                if self.input in between:
                    rule = f"a layer through which everything that {name} reads must pass"
                    got = f"{source}, which a shortcut goes around"
                    raise LayerError(expected(rule, got, "Choose a layer before or behind it"))
                needed |= between
        return self._copied(start, after, needed, ends)

    def _between(self, start: fx.Node, target: fx.Node, after: set[fx.Node]) -> set[fx.Node]:
        """Return the nodes that the target needs besides the start: with the input where a path goes around it."""

        def sources(node: fx.Node) -> list[fx.Node]:
            return [] if self._counts_before(node, after) else [n for n in node.all_input_nodes if n is not start]

        return reached([target], sources)

    def _counts_before(self, node: fx.Node, after: set[fx.Node]) -> bool:
        """Whether a node is the number of images, read from what comes before the cut: the cut's maps tell it as well.

        The first side of a weight is no number of images.
        """
        base = _batch_of(node)
        return base is not None and base not in after and base in self._of_images

    @functools.cached_property
    def _of_images(self) -> set[fx.Node]:
        return self.descendants(self.input)

    def _copied(self, start: fx.Node, after: set[fx.Node], needed: set[fx.Node], ends: list[Any]) -> nn.Module:
        """Copy the needed nodes into a graph of their own, and the layers that they call."""
        graph = fx.Graph()
        given = graph.placeholder("source_map")
        made: dict[fx.Node, fx.Node] = {start: given}
        parts: dict[str, Any] = {}
        for node in self.nodes:
            if node not in needed:
                continue
            if self._counts_before(node, after):
                made[node] = graph.call_method("size", (given, 0))
                continue
            made[node] = self.hooked.copied(node, graph, made) or graph.node_copy(node, made.__getitem__)
            if node.op == "call_module":
                parts[str(node.target)] = self.leaf(node)
            elif node.op == "get_attr":
                parts[str(node.target)] = self.attribute(node)
        graph.output(tuple(fx.node.map_arg(end, made.__getitem__) for end in ends))
        return _assemble(parts, graph, self.root)


def trace(module: nn.Module) -> Graph:
    """Trace a network in eval mode.

    Raises:
        InputTypeError: not a readable network.
        LayerError: its ``forward`` cannot be traced (it branches on values, or has several inputs).

    Example:
        >>> list(trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).layers)
        ['0', '1']
    """
    inner = unwrapped(module)
    if len(needed := _required(inner)) > 1:
        got, remedy = f"{type(inner).__name__} with {len(needed)}", "Wrap it in a module that takes only the images"
        raise LayerError(expected("a network with one input, the images", got, remedy))
    tracer = _Tracer()
    attributes = set(inner.__dict__)
    constants: dict[str, Any] = {}
    with borrowed(inner, copy_weights=False) as network:
        try:
            graph = tracer.trace(network)
        except Exception as error:
            got, remedy = (
                f"{type(inner).__name__} ({first_line(error)})",
                "Rewrite its forward without branches on values, or explain a part that has none",
            )
            raise LayerError(expected("a network that torch.fx can trace", got, remedy)) from error
        finally:  # the tracer hangs tensor constants on the network
            constants = {name: inner.__dict__.pop(name) for name in set(inner.__dict__) - attributes}
        _make_out_of_place(graph, network)
    source = next(node for node in graph.nodes if node.op == "placeholder")
    return Graph(inner, graph, tracer, source, constants)


def _required(module: nn.Module) -> list[str]:
    """Return the arguments that a network has to be given."""
    given = list(inspect.signature(module.forward).parameters.values())
    return [p.name for p in given if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
