"""The graph of a network: which operation feeds which, under the names that taps use; and copies cut out of it.

Names are those of ``torchvision.models.feature_extraction``: the path of the module (``layer1.0.relu``), with
``_1``, ``_2`` … for its second, third … call; operations written in ``forward`` carry the path of their
module and their own name (``flatten``, ``layer1.0.add``). A module that contains others (``layer3``) names
what it returns.

The explainer's decoder starts as a copy of the layers behind a tap, and its reconstruction goes back into the performer
through another.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import operator
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from partlens.errors import LayerError, expected, first_line, listed, nearest
from partlens.network.borrowed import borrowed, unwrapped
from partlens.network.kept_hooks import HookedCalls, is_hooks, kept_by_reference
from partlens.network.watched import bottlenecks, reached

# fmt: off
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardtanh,
    nn.Tanh, nn.Sigmoid, nn.Softplus, nn.PReLU,
)
_ACTIVATION_FUNCTIONS = (
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, torch.tanh,
)
# Kept whole while tracing: torchvision's operators with loops or data-dependent shapes.
_LEAVES = frozenset((
    "DeformConv2d", "DropBlock2d", "FeaturePyramidNetwork", "MultiScaleRoIAlign", "RoIAlign", "RoIPool", "PSRoIAlign",
    "PSRoIPool", "StochasticDepth",
))
# fmt: on
_COPIED_WITHOUT = ("_backward_hooks", "_backward_pre_hooks")


_OUTPUT = "output"


def is_of_torchvision(module: nn.Module, names: frozenset[str]) -> bool:
    """Whether a module is one of torchvision's operators, by name: torchvision is not imported to find out."""
    return any(
        kind.__name__ in names and kind.__module__.startswith("torchvision.ops.") for kind in type(module).__mro__
    )


class _Tracer(fx.Tracer):
    """Trace a network and give every node its tap name.

    The naming follows torchvision's ``NodePathTracer``, without its mistake of dropping the number of a
    module that is itself called ``conv_1``.
    """

    def __init__(self) -> None:
        # A network that uses torchvision's or timm's functions has imported them by now.
        operators = sys.modules.get("torchvision.ops")
        timm = sys.modules.get("timm.models._features_fx")
        whole = () if timm is None else tuple(timm.get_notrace_functions())
        super().__init__((math,) if operators is None else (math, operators), whole)
        self.kept_whole = () if timm is None else tuple(timm.get_notrace_modules())
        self.path = ""
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = set()
        self.calls: dict[str, int] = {}
        self.containers: dict[str, fx.Node] = {}
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
        whole = isinstance(m, self.kept_whole) or is_of_torchvision(m, _LEAVES)
        return whole or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:  # noqa: ARG002
        before, path = self.path, self.path_of_module(m)
        count = self.calls.get(path, 0)
        self.calls[path] = count + 1
        name = path if count == 0 else f"{path}_{count}"
        self.path = path
        try:
            if self.is_leaf_module(m, path):
                result = self.create_proxy("call_module", path, args, kwargs)
                self.names[result.node] = name
                self.taken.add(name)
                return result
            # Not `forward`, which would call hooks with proxies.
            result = self.hooked.call(self, m, path, m.forward, (args, kwargs))
            if isinstance(result, fx.Proxy):
                self.containers[name] = result.node
            return result
        finally:
            self.path = before

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind != "call_module" and not is_hooks(proxy.node):
            own = re.sub(r"_\d+$", "", proxy.node.name)
            base = f"{self.path}.{own}" if self.path else own
            name, count = base, 0
            while name in self.taken:
                count += 1
                name = f"{base}_{count}"
            self.taken.add(name)
            self.names[proxy.node] = name
        return proxy


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


def is_size(node: fx.Node) -> bool:
    """Whether a node holds sizes, not values."""
    if node.op == "call_method" and node.target in {"size", "dim", "numel", "new_zeros", "new_ones"}:
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in {"shape", "device", "dtype", "ndim"}
    return node.op == "call_function" and bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))


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
    try:
        copies = copy.deepcopy(parts, memo)
    except RuntimeError as error:
        rule = f"layers of {type(module).__name__} that can be copied"
        remedy = "Remove weight normalisation first (torch.nn.utils.remove_weight_norm)"
        raise LayerError(expected(rule, first_line(error), remedy)) from error
    made = fx.GraphModule(copies, graph, class_name="Cut")
    for each in made.modules():
        if getattr(each, "inplace", False):
            each.inplace = False  # type: ignore[assignment]
    for parameter in filter(torch.is_floating_point, made.parameters()):
        parameter.requires_grad = True
    return made.eval()


_CONTAINERS = (nn.Sequential, nn.ModuleList)


def _has_weights(block: nn.Module | None) -> bool:
    return block is not None and any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in block.modules())


class Graph:
    """A network's graph in eval mode, in execution order and without in-place operations; made by `trace`.

    Attributes:
        root: the network (borrowed, not a copy).
        nodes: of torch.fx, in execution order; leaf modules are found in ``root``.
        names: tap name of every node.
        containers: what each module with submodules returns, by tap name.
        input: the image batch.
        result: the node that the network returns; ``None`` when it returns several.
        constants: tensors made in ``forward`` from numbers.
        channels: of its images.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        tracer: _Tracer,
        source: fx.Node,
        constants: Mapping[str, Any],
        channels: int,
    ) -> None:
        self.root, self.channels = root, channels
        self.nodes = list(graph.nodes)
        self.names = {node: name for node, name in tracer.names.items() if node.graph is graph}
        self.containers = {name: node for name, node in tracer.containers.items() if name}
        self.input = source
        self.fx_graph, self.constants, self.hooked = graph, constants, tracer.hooked
        self._order = {node: index for index, node in enumerate(self.nodes)}
        self._end = next(node for node in self.nodes if node.op == "output")
        returned = self._end.args[0]
        self.result = returned if isinstance(returned, fx.Node) else None

    def index(self, node: fx.Node) -> int:
        """Place of a node in execution order."""
        return self._order[node]

    def all_names(self) -> list[str]:
        """Every name `find` accepts, in execution order."""
        found = [(self.index(node), 0, name) for node, name in self.names.items() if node is not self.input]
        found += [(self.index(node), 1, name) for name, node in self.containers.items()]
        return [name for _, _, name in sorted(found)] + [_OUTPUT]

    def find(self, name: str) -> fx.Node:
        """Return the node of a tap name.

        Raises:
            LayerError: no such layer, with the nearest names.
        """
        if name in self.containers:
            return self.containers[name]
        inside: fx.Node | None = None
        for node, own in self.names.items():
            if own == name and node is not self.input:
                return node
            if own.startswith(f"{name}."):
                inside = node
        if inside is not None:
            return inside
        if name == _OUTPUT and self.result is not None:
            return self.result
        remedy = f"Nearest: {', '.join(nearest(name, self.all_names()))}"
        raise LayerError(expected(f"a layer of {type(self.root).__name__}", name, remedy))

    def label(self, node: fx.Node) -> str:
        """Return the name to show: the block that ends in this node, else the layer itself.

        A block is the innermost module with submodules that returns the node, those with convolutions or linear layers
        first, so that an activation of one's own hides no block; plain ``Sequential`` containers do not count, so that
        ``features.30`` is not called ``features``.
        """
        # Subclasses of containers (torchvision's ConvNormActivation) are blocks only where nothing else ends.
        ends = {name: self._module_of(name) for name, end in self.containers.items() if end is node}
        for plain in (_CONTAINERS, ()):
            blocks = [n for n, m in ends.items() if not isinstance(m, plain) and type(m) not in _CONTAINERS]
            if blocks:
                weighted = [name for name in blocks if _has_weights(ends[name])]
                return max(weighted or blocks, key=len)
        if node is self.result and node not in self.names:
            return _OUTPUT
        return self.names.get(node, node.name)

    def _module_of(self, name: str) -> nn.Module | None:
        try:
            return self.root.get_submodule(name)
        except AttributeError:  # the name carries a call number
            return self.root.get_submodule(re.sub(r"_\d+$", "", name))

    def is_block(self, node: fx.Node) -> bool:
        """Whether a node is what a block with convolutions or linear layers returns (see `label`)."""
        name = self.label(node)
        if self.containers.get(name) is not node:
            return False
        return _has_weights(self._module_of(name))

    def ancestors(self, targets: Iterable[fx.Node]) -> set[fx.Node]:
        """Return all nodes that the targets need, themselves included."""
        return reached(targets, lambda node: node.all_input_nodes)

    def descendants(self, source: fx.Node) -> set[fx.Node]:
        """Return all nodes that depend on the source, itself included."""
        return reached([source], lambda node: node.users)

    @functools.cached_property
    def cut_nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that every path from the input to the output passes, in execution order.

        Nodes that read only sizes are not paths.
        """
        live = {n for n in self.ancestors([self.last]) & self.descendants(self.input) if not is_size(n)}
        path = [n for n in self.nodes if n in live and n is not self._end]
        passed = bottlenecks(path, lambda node: live.intersection(node.users))
        return tuple(node for node, all_pass in zip(path, passed, strict=True) if all_pass)[1:]  # but for the input

    @property
    def last(self) -> fx.Node:
        """The node that the network returns, or the one that joins the several that it returns."""
        return self.result if self.result is not None else self._end

    @functools.cached_property
    def readable(self) -> set[fx.Node]:
        """The nodes that a module gives: what a function gives (``F.relu(x)``, ``a + b``) no hook can read."""
        return {node for node in self.names if node.op == "call_module"} | set(self.containers.values())

    def cut_points(self) -> list[str]:
        """Return the layers through which everything passes.

        In execution order; a block that ends there gives its name (``layer4.0``), else the layer itself. A network can
        be cut at these and nowhere else.

        Example:
            >>> trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())).cut_points()
            ['0', '1', '2']
        """
        return list(dict.fromkeys(self.label(node) for node in self.cut_nodes))

    def after(self, node: fx.Node) -> list[fx.Node]:
        """Return the cut nodes behind a node that a hook can read."""
        return [n for n in self.cut_nodes if self.index(n) > self.index(node) and n in self.readable]

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node is an activation function: a module, a function or a tensor method."""
        if node.op == "call_module":
            return isinstance(self.leaf(node), ACTIVATIONS)
        if node.op == "call_method":
            return node.target in {"relu", "tanh", "sigmoid"}
        return node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS

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
                    raise self._not_behind(source, start, name)
                between = self._between(start, node, after)
                if self.input in between:
                    raise self.bypassed(source, start, name)
                needed |= between
        return self._copied(start, after, needed, ends)

    def _not_behind(self, source: str, start: fx.Node, target: str) -> LayerError:
        later = list(dict.fromkeys(map(self.label, self.after(start)))) or [_OUTPUT]
        got, remedy = f"{target}, which does not depend on it", f"Choose among {listed(later, 6)}"
        return LayerError(expected(f"a target after {source}", got, remedy))

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

    def bypassed(self, source: str, start: fx.Node, target: str) -> LayerError:
        """Build the error of a layer that not everything passes."""
        before = [n for n in self.cut_nodes if self.index(n) < self.index(start)][-2:]
        behind = [n for n in self.cut_nodes if self.index(n) > self.index(start)][:2]
        near = list(dict.fromkeys(self.label(n) for n in before + behind if n in self.readable))
        rule = f"a layer through which everything that {target} reads must pass"
        remedy = f"Nearest layers that can be cut: {', '.join(near) or 'none'}"
        return LayerError(expected(rule, f"{source}, which a shortcut goes around", remedy))

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

    def shapes(self, input_size: tuple[int, int], upto: Iterable[fx.Node] | None = None) -> dict[fx.Node, Any]:
        """Run the graph once on a zero image and note the size of each tensor, and other values as they are.

        Raises:
            LayerError: the network does not accept this input size.
        """
        wanted = self.ancestors(upto) if upto is not None else None
        weight = next((p for p in self.root.parameters() if p.is_floating_point()), torch.zeros(()))
        image = torch.zeros(1, self.channels, *input_size, dtype=weight.dtype, device=weight.device)
        with borrowed(self.root, copy_weights=False) as root, torch.no_grad():
            runner = _ShapeRunner(root, self, wanted)
            with refused_size(root, self.channels, input_size):
                runner.run(image)
        return runner.noted


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


class _ShapeRunner(fx.Interpreter):
    """Interpret a graph, noting shapes."""

    def __init__(self, root: nn.Module, graph: Graph, wanted: set[fx.Node] | None) -> None:
        # Hooks read values that no node after them names.
        super().__init__(root, garbage_collect_values=not graph.hooked.inputs, graph=graph.fx_graph)
        self.known = graph
        self.wanted = wanted
        self.noted: dict[fx.Node, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        return self.known.constants[target] if target in self.known.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        if self.wanted is not None and n not in self.wanted:
            return None
        value = self.known.hooked.run(n, self.env) if n in self.known.hooked.inputs else super().run_node(n)
        if isinstance(value, Tensor):
            self.noted[n] = value.shape
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            self.noted[n] = [v.shape if isinstance(v, Tensor) else v for v in value]
        else:
            self.noted[n] = value
        return value


def trace(module: nn.Module, channels: int = 3) -> Graph:
    """Trace a network in eval mode; ``channels`` are those of the images that `Graph.shapes` makes.

    Raises:
        InputTypeError: not a readable network.
        LayerError: its ``forward`` cannot be traced (it branches on values, or has several inputs).

    Example:
        >>> trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())).all_names()
        ['0', '1', 'output']
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
    return Graph(inner, graph, tracer, source, constants, channels)


def _required(module: nn.Module) -> list[str]:
    """Return the arguments that a network has to be given."""
    given = list(inspect.signature(module.forward).parameters.values())
    return [p.name for p in given if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
