"""The graph of a network: which operation feeds which, under the names that taps use.

Names are those of ``torchvision.models.feature_extraction``: the path of the module (``layer1.0.relu``), with
``_1``, ``_2`` … for its second, third … call; operations written in ``forward`` carry the path of their
module and their own name (``flatten``, ``layer1.0.add``). A module that contains others (``layer3``) stands
for what it returns.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from partlens.errors import LayerError, expected, first_line, nearest
from partlens.network.borrowed import borrowed
from partlens.network.zoo import unwrapped

_OUTPUT = "output"
# Kept whole while tracing: torchvision's operators with loops or data-dependent shapes.
_LEAVES = (
    torchvision.ops.DeformConv2d,
    torchvision.ops.DropBlock2d,
    torchvision.ops.FeaturePyramidNetwork,
    torchvision.ops.MultiScaleRoIAlign,
    torchvision.ops.RoIAlign,
    torchvision.ops.RoIPool,
    torchvision.ops.PSRoIAlign,
    torchvision.ops.PSRoIPool,
    torchvision.ops.StochasticDepth,
)


class _Tracer(fx.Tracer):
    """Trace a network and give every node its tap name.

    The naming follows torchvision's ``NodePathTracer``, without its mistake of dropping the number of a
    module that is itself called ``conv_1``.
    """

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, torchvision.ops))
        self.path = ""
        self.names: dict[fx.Node, str] = {}
        self.taken: set[str] = set()
        self.calls: dict[str, int] = {}
        self.containers: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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
            result = forward(*args, **kwargs)
            if isinstance(result, fx.Proxy):
                self.containers[name] = result.node
            return result
        finally:
            self.path = before

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(kind, *args, **kwargs)
        if kind != "call_module":
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


def _make_out_of_place(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite in-place operations so that no node's value is overwritten.

    Later readers of the overwritten tensor are redirected to the new value, which keeps the meaning.
    Overwriting through a view of another tensor is not followed.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        overwrites = False
        if node.op == "call_module":
            overwrites = bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
        elif node.op == "call_function":
            if node.kwargs.get("inplace") is True:
                node.update_kwarg("inplace", False)  # noqa: FBT003
                overwrites = True
            elif node.target in _OUT_OF_PLACE:
                node.target = _OUT_OF_PLACE[node.target]
                overwrites = True
            else:
                name = getattr(node.target, "__name__", "")
                plain = getattr(F, name[:-1], getattr(torch, name[:-1], None)) if name.endswith("_") else None
                if callable(plain) and not name.endswith("__"):
                    node.target = plain
                    overwrites = True
        elif node.op == "call_method":
            name = str(node.target)
            if name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name[:-1]):
                node.target = name[:-1]
                overwrites = True
        if overwrites and node.args and isinstance(node.args[0], fx.Node):
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


@dataclass(frozen=True)
class Traced:
    """A network's graph in eval mode, in execution order and without in-place operations.

    Args:
        root: the network (borrowed, not a copy).
        graph: torch.fx graph whose leaf modules are found in ``root``.
        names: tap name of every node.
        containers: what each module with submodules returns, by tap name.
        input: the image batch.
        result: the node that the network returns; ``None`` when it returns several.
        constants: tensors made in ``forward`` from numbers.
    """

    root: nn.Module
    graph: fx.Graph
    names: dict[fx.Node, str]
    containers: dict[str, fx.Node]
    input: fx.Node
    result: fx.Node | None
    constants: dict[str, Any] = field(default_factory=dict)
    _order: dict[fx.Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._order.update({node: index for index, node in enumerate(self.graph.nodes)})

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
        raise LayerError(
            expected(
                f"a layer of {type(self.root).__name__}",
                name,
                f"Nearest: {', '.join(nearest(name, self.all_names()))}",
            )
        )

    def label(self, node: fx.Node) -> str:
        """Return the name to show: the block that ends in this node, else the layer itself.

        A block is the innermost module with submodules that returns the node; plain ``Sequential`` containers
        do not count, so that ``features.30`` is not called ``features``.
        """
        ends = [name for name, end in self.containers.items() if end is node]
        kinds = {name: self._module_of(name) for name in ends}
        blocks = [name for name in ends if not isinstance(kinds[name], (nn.Sequential, nn.ModuleList))]
        blocks = blocks or [name for name in ends if type(kinds[name]) not in {nn.Sequential, nn.ModuleList}]
        if blocks:
            return max(blocks, key=len)
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
        block = self._module_of(name)
        return block is not None and any(isinstance(m, (nn.Conv2d, nn.Linear)) for m in block.modules())

    def ancestors(self, targets: Iterable[fx.Node], stop: fx.Node | None = None) -> set[fx.Node]:
        """Return all nodes that the targets need, themselves included; nothing behind ``stop``."""
        seen: set[fx.Node] = set()
        waiting = list(targets)
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node is not stop:
                waiting.extend(node.all_input_nodes)
        return seen

    def descendants(self, source: fx.Node) -> set[fx.Node]:
        """Return all nodes that depend on the source, itself included."""
        seen: set[fx.Node] = set()
        waiting = [source]
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting.extend(node.users)
        return seen

    def cut_nodes(self) -> list[fx.Node]:
        """Return the nodes that every path from the input to the output passes, in execution order.

        Nodes that read only sizes are not paths.
        """
        last = self.result if self.result is not None else next(n for n in self.graph.nodes if n.op == "output")
        live = self.ancestors([last]) & self.descendants(self.input)
        path = [n for n in self.graph.nodes if n in live and not is_size(n) and n.op != "output"]
        places = {node: place for place, node in enumerate(path)}
        found, reach = [], -1  # reach: the furthest reader of anything before this node
        for place, node in enumerate(path):
            if reach <= place and node is not self.input:
                found.append(node)
            readers = (user for user in node.users if user in live and not is_size(user))
            reach = max([reach, *(places.get(user, len(path)) for user in readers)])
        return found

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

    def shapes(self, input_size: tuple[int, int], upto: Iterable[fx.Node] | None = None) -> dict[fx.Node, Any]:
        """Run the graph once on a zero image and note what each node gives.

        Args:
            input_size: rows and columns of the input.
            upto: run only what these nodes need.

        Returns:
            For a tensor its ``torch.Size``, for a list of tensors a list of sizes, for other values the
            value.

        Raises:
            LayerError: the network does not accept this input size.
        """
        wanted = self.ancestors(upto) if upto is not None else None
        first = next((p for p in self.root.parameters() if p.is_floating_point()), torch.zeros(()))
        with borrowed(self.root, copy_weights=False) as root, torch.no_grad():
            channels = _input_channels(self)
            image = torch.zeros(1, channels, *input_size, dtype=first.dtype, device=first.device)
            runner = _ShapeRunner(root, self, wanted)
            try:
                runner.run(image)
            except Exception as error:
                raise LayerError(
                    expected(
                        f"an input size that {type(self.root).__name__} accepts",
                        f"{input_size[0]}x{input_size[1]} px ({first_line(error)})",
                        "Give the size the network was made for",
                    )
                ) from error
        return runner.noted


def _input_channels(traced: Traced) -> int:
    """Channels of the input, read from the first convolution."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and isinstance(module := traced.root.get_submodule(str(node.target)), nn.Conv2d):
            return module.in_channels
    return 3


class _ShapeRunner(fx.Interpreter):
    """Interpret a graph, noting shapes."""

    def __init__(self, root: nn.Module, traced: Traced, wanted: set[fx.Node] | None) -> None:
        super().__init__(root, garbage_collect_values=True, graph=traced.graph)
        self.traced = traced
        self.wanted = wanted
        self.noted: dict[fx.Node, Any] = {}

    def fetch_attr(self, target: str) -> Any:
        return self.traced.constants[target] if target in self.traced.constants else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        if self.wanted is not None and n not in self.wanted:
            return None
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.noted[n] = value.shape
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
            self.noted[n] = [v.shape if isinstance(v, Tensor) else v for v in value]
        else:
            self.noted[n] = value
        return value


def trace(module: nn.Module) -> Traced:
    """Trace a network in eval mode.

    Args:
        module: the network; left as it was.

    Returns:
        Its graph.

    Raises:
        InputTypeError: not a readable network.
        LayerError: its ``forward`` cannot be traced (it branches on values, or has several inputs).

    Example:
        >>> traced = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
        >>> [traced.label(node) for node in traced.cut_nodes()]
        ['0', '1']
    """
    inner = unwrapped(module)
    tracer = _Tracer()
    attributes = set(inner.__dict__)
    constants: dict[str, Any] = {}
    with borrowed(inner, copy_weights=False) as network:
        try:
            graph = tracer.trace(network)
        except Exception as error:
            raise LayerError(
                expected(
                    "a network that torch.fx can trace",
                    f"{type(inner).__name__} ({first_line(error)})",
                    "Rewrite its forward without branches on values, or explain a part that has none",
                )
            ) from error
        finally:  # the tracer hangs tensor constants on the network
            constants = {name: inner.__dict__.pop(name) for name in set(inner.__dict__) - attributes}
        _make_out_of_place(graph, network)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    needed = [node for node in placeholders if not node.args]
    if len(needed) != 1 and len(placeholders) != 1:
        raise LayerError(
            expected(
                "a network with one input, the images",
                f"{type(inner).__name__} with {len(needed)}",
                "Wrap it in a module whose forward takes only the images",
            )
        )
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    names = {node: name for node, name in tracer.names.items() if node.graph is graph}
    return Traced(
        root=inner,
        graph=graph,
        names=names,
        containers={k: v for k, v in tracer.containers.items() if k},
        input=(needed or placeholders)[0],
        result=returned if isinstance(returned, fx.Node) else None,
        constants=constants,
    )
