"""Cut a performer open: copies of its layers between a tap and later ones.

The explainer's decoder starts as such a copy, and its reconstruction goes back into the performer through
another.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from partlens.errors import LayerError, expected, listed
from partlens.network.tracing import Traced, is_size, trace
from partlens.network.zoo import Performer, module_of

ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Tanh,
    nn.Sigmoid,
    nn.Softplus,
    nn.PReLU,
)
_ACTIVATION_FUNCTIONS = (
    torch.relu,
    F.relu,
    F.relu6,
    F.leaky_relu,
    F.elu,
    F.gelu,
    F.silu,
    F.hardswish,
    torch.tanh,
)
_COPIED_WITHOUT = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def cut_points(performer: Performer | nn.Module) -> list[str]:
    """List the layers through which everything passes.

    Args:
        performer: the network.

    Returns:
        Tap names in execution order; a block that ends there gives its name (``layer4.0``), else the layer
        itself. A network can be cut at these and nowhere else.

    Raises:
        LayerError: the network cannot be traced.

    Example:
        >>> cut_points(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()))
        ['0', '1', '2']
    """
    traced = trace(module_of(performer))
    return list(dict.fromkeys(traced.label(node) for node in traced.cut_nodes()))


def _batch_of(node: fx.Node) -> fx.Node | None:
    """Return ``x`` when a node is the number of images of ``x``: ``x.size(0)``, ``x.shape[0]``."""
    if node.op == "call_method" and node.target == "size" and tuple(node.args[1:]) == (0,):
        return node.all_input_nodes[0]
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem" and node.args[1] == 0:
        sizes = node.args[0]
        if isinstance(sizes, fx.Node) and (
            (sizes.op == "call_method" and sizes.target == "size" and len(sizes.args) == 1)
            or (sizes.op == "call_function" and sizes.target is getattr and sizes.args[1] == "shape")
        ):
            return sizes.all_input_nodes[0]
    return None


def _refuse_bypass(traced: Traced, source: str, source_node: fx.Node, target: str) -> LayerError:
    here = traced.index(source_node)
    cuts = traced.cut_nodes()
    before = [n for n in cuts if traced.index(n) < here][-2:]
    after = [n for n in cuts if traced.index(n) > here][:2]
    readable = _readable(traced)
    near = list(dict.fromkeys(traced.label(n) for n in before + after if n in readable))
    return LayerError(
        expected(
            f"a layer through which everything that {target} reads must pass",
            f"{source}, which a shortcut goes around",
            f"Nearest layers that can be cut: {', '.join(near) or 'none'}",
        )
    )


def _needed(
    traced: Traced, source: str, start: fx.Node, name: str, target: fx.Node, after: set[fx.Node]
) -> set[fx.Node]:
    """Nodes between source and target; refuses paths around the source."""
    seen: set[fx.Node] = set()
    waiting = [target]
    while waiting:
        node = waiting.pop()
        if node in seen or node is start:
            continue
        if node is traced.input:
            raise _refuse_bypass(traced, source, start, name)
        seen.add(node)
        base = _batch_of(node)
        if base is None or base in after:
            waiting.extend(node.all_input_nodes)
    return seen


def cut(performer: Performer | nn.Module, source: str, targets: Sequence[str]) -> nn.Module:
    """Copy the layers between a tap and later ones.

    Args:
        performer: the network; it stays as it is.
        source: tap whose output the copy takes, as `partlens.network.taps.read_taps` names it; a module
            with submodules stands for what it returns.
        targets: taps whose outputs the copy returns; ``"output"`` is the network's own output.

    Returns:
        A module in eval mode. It takes the map of ``source`` and returns a tuple with one entry per target,
        equal bit for bit to what the performer computes. Its parameters are copies with ``requires_grad`` on,
        under the performer's names; it works out of place, so that neither its input nor its outputs are
        overwritten.

    Raises:
        LayerError: an unknown layer; a target that is not after the source; a source that a shortcut goes
            around; a network that cannot be traced.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
        >>> head = cut(network, "1", ["output"])
        >>> image = torch.ones(1, 3, 8, 8)
        >>> bool((head(network[:2](image))[0] == network(image)).all())
        True
    """
    module = module_of(performer)
    traced = trace(module)
    if not targets:
        raise LayerError(expected("at least one target layer", "none", 'Name one, or "output"'))
    start = traced.find(source)
    after = traced.descendants(start)
    ends: list[Any] = []
    needed: set[fx.Node] = set()
    for name in targets:
        end = traced.find(name) if name != "output" or traced.result is not None else None
        returned = next(n for n in traced.graph.nodes if n.op == "output")
        nodes = [end] if end is not None else returned.all_input_nodes
        for node in nodes:
            if node is start or node not in after:
                raise LayerError(
                    expected(
                        f"a target after {source}",
                        f"{name}, which does not depend on it",
                        f"Choose among {listed(_later(traced, start), 6)}",
                    )
                )
            needed |= _needed(traced, source, start, name, node, after)
        ends.append(end if end is not None else returned.args[0])

    graph = fx.Graph()
    given = graph.placeholder("source_map")
    made: dict[fx.Node, fx.Node] = {start: given}
    parts: dict[str, Any] = {}
    for node in traced.graph.nodes:
        if node not in needed:
            continue
        base = _batch_of(node)
        if base is not None and base not in after:
            made[node] = graph.call_method("size", (given, 0))
            continue
        made[node] = graph.node_copy(node, made.__getitem__)
        if node.op == "call_module":
            parts[str(node.target)] = traced.leaf(node)
        elif node.op == "get_attr":
            parts[str(node.target)] = traced.attribute(node)
    graph.output(tuple(fx.node.map_arg(end, made.__getitem__) for end in ends))
    return _assemble(parts, graph, module)


def _assemble(parts: dict[str, Any], graph: fx.Graph, module: nn.Module) -> nn.Module:
    """Deep-copy the layers, without the hooks that watch them, and join them by the graph."""
    memo: dict[int, Any] = {}
    for part in parts.values():
        for each in part.modules() if isinstance(part, nn.Module) else ():
            memo.update({id(each.__dict__[n]): OrderedDict() for n in _COPIED_WITHOUT if n in each.__dict__})
    try:
        copies = copy.deepcopy(parts, memo)
    except RuntimeError as error:
        raise LayerError(
            expected(
                f"layers of {type(module).__name__} that can be copied",
                str(error).splitlines()[0],
                "Remove weight normalisation first (torch.nn.utils.remove_weight_norm)",
            )
        ) from error
    made = fx.GraphModule(copies, graph, class_name="Cut")
    for each in made.modules():
        if getattr(each, "inplace", False):
            each.inplace = False  # type: ignore[assignment]
    for parameter in made.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad = True
    return made.eval()


def _readable(traced: Traced) -> set[fx.Node]:
    """Return the nodes that a module gives: what a function gives (``F.relu(x)``, ``a + b``) no hook can read."""
    ends = {node for name, node in traced.containers.items() if name}
    return {node for node in traced.names if node.op == "call_module"} | ends


def _later(traced: Traced, start: fx.Node) -> list[str]:
    readable = _readable(traced)
    later = [n for n in traced.cut_nodes() if traced.index(n) > traced.index(start) and n in readable]
    return list(dict.fromkeys(traced.label(n) for n in later)) or ["output"]


def is_activation(traced: Traced, node: fx.Node) -> bool:
    """Whether a node is an activation function: a module, a function or a tensor method."""
    if node.op == "call_module":
        return isinstance(traced.leaf(node), ACTIVATIONS)
    if node.op == "call_method":
        return node.target in {"relu", "tanh", "sigmoid"}
    return node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS


def _hidden_layers(traced: Traced, start: fx.Node) -> list[fx.Node]:
    """Activations of the fully connected layers after a node, but for the last layer; cut points only."""
    cuts = [n for n in traced.cut_nodes() if traced.index(n) > traced.index(start)]
    found = []
    for place, node in enumerate(cuts):
        if node.op != "call_module" or not isinstance(traced.leaf(node), nn.Linear):
            continue
        for follower in cuts[place + 1 :]:
            if is_activation(traced, follower):
                found.append(follower)
                break
            if follower.op == "call_module" and isinstance(traced.leaf(follower), nn.Linear):
                break
    return found


def default_targets(
    performer: Performer | nn.Module, source: str, input_size: tuple[int, int] | None = None
) -> tuple[str, ...]:
    """Choose the layers whose values a reconstruction at ``source`` is held against.

    - Two or more hidden fully connected layers after the source (AlexNet, VGG): the outputs of the first two
      after their activation, which are the papers' fc6 and fc7.
    - Otherwise (ResNet and other heads with one linear layer): the last two blocks after the source that are
      cut points with maps of more than one cell; for ResNet-18 cut at ``layer3`` these are ``layer4.0`` and
      ``layer4.1``. Where there are no blocks, the last two such layers, activations first.

    Args:
        performer: the network.
        source: the tap that is reconstructed.
        input_size: rows and columns of the input; the performer's own, else 224x224.

    Returns:
        Two names in execution order, or one where the network has only one.

    Raises:
        LayerError: nothing to compare after the source, or the source is not a cut point.

    Source:
        arXiv 1805.07468, section 3.1 and appendix H (fc6 and fc7). For residual networks the published text
        contradicts itself; this reading is the one whose dimensions agree.
    """
    module = module_of(performer)
    traced = trace(module)
    start = traced.find(source)
    cuts = traced.cut_nodes()
    if start not in cuts:
        raise _refuse_bypass(traced, source, start, "the output")
    readable = _readable(traced)
    hidden = [node for node in _hidden_layers(traced, start) if node in readable]
    if len(hidden) >= 2:
        return tuple(traced.label(node) for node in hidden[:2])
    size = input_size or (performer.preprocessing.size_px if isinstance(performer, Performer) else (224, 224))
    shapes = traced.shapes(size)
    later = [n for n in cuts if traced.index(n) > traced.index(start) and not is_size(n) and n in readable]
    # The output itself leaves nothing to judge the reconstruction by, where there is anything else.
    later = [n for n in later if n is not traced.result] or later
    maps = [n for n in later if isinstance(s := shapes.get(n), torch.Size) and len(s) == 4 and s[2] * s[3] > 1]
    for choice in (
        [n for n in maps if traced.is_block(n)],
        [n for n in maps if is_activation(traced, n)],
        maps,
        [n for n in later if is_activation(traced, n)],
        [n for n in later if isinstance(shapes.get(n), torch.Size)],
    ):
        if choice:
            return tuple(traced.label(node) for node in choice[-2:])
    raise LayerError(
        expected(
            f"layers after {source}",
            "none",
            f"Choose an earlier tap, among {listed([traced.label(n) for n in cuts][-6:], 6)}",
        )
    )
