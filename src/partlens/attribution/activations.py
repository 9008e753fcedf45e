"""Find the rectifying activations in a record of autograd: one operation by name, or several that spell one.

PyTorch names the operations of a forward pass, not what they are for. An activation that a network writes in Python,
such as ``x * sigmoid(x)`` or ``x * relu6(x + 3) / 6``, is seen by its form: a product of a value with a gate that is
computed from that same value, cell by cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from partlens.network.watched import reached

# Gates (sigmoid, hard sigmoid, softmax) and odd or symmetric squashing functions (tanh, softsign, hardtanh around 0,
# shrinkage) are not rectifiers: they keep their true derivative.
_BY_NAME = frozenset(
    {
        "ReluBackward",
        "ThresholdBackward",
        "LeakyReluBackward",
        "PreluKernelBackward",
        "RreluWithNoiseBackward",
        "EluBackward",
        "CeluBackward",
        "GeluBackward",
        "SiluBackward",
        "MishBackward",
        "SoftplusBackward",
        "HardswishBackward",
    }
)
_CLAMPS = {"HardtanhBackward": "min_val", "ClampBackward": "min", "ClampMinBackward": "min"}
_MAXIMA = frozenset({"MaximumBackward", "FmaxBackward"})
_PRODUCTS = frozenset({"MulBackward", "DivBackward"})
# Operations on each cell by itself, of which gates are made; those that make a gate of its own.
_SQUASHING = ("Sigmoid", "Hardsigmoid", "Erf", "Hardtanh", "Clamp", "Exp", "Softplus", "Relu")
_CELLWISE = re.compile(
    rf"({'|'.join(_SQUASHING)}|Tanh|Add|Sub|Rsub|Mul|Div|Neg|Pow|Reciprocal|Log|Log1P|Expm1|ClampMin|ClampMax|Clone|"
    r"ToCopy|Alias)Backward"
)
_MOST_STEPS = 16  # operations of one activation; the longest known, GELU with tanh, has ten
_WEIGHTED = frozenset({"ConvolutionBackward", "AddmmBackward", "MmBackward", "BmmBackward", "LinearBackward"})
_UNCLEAR = frozenset({"WhereBackward", "AbsBackward"})

_Edge = tuple[Any, int]


def kind_of(node: Any) -> str:
    """Name of the operation without the overload's number: ``ReluBackward0`` gives ``ReluBackward``."""
    return re.sub(r"\d+$", "", str(node.name()).rpartition("::")[2])


def nodes_behind(tensors: Sequence[Tensor]) -> list[Any]:
    """Every node of the record behind some tensors, once each."""
    sources = lambda node: [source for source, _ in node.next_functions if source is not None]  # noqa: E731
    return list(reached([t.grad_fn for t in tensors if t.grad_fn is not None], sources))


@dataclass(frozen=True)
class Activation:
    """One activation."""

    node: Any  # the operation that gives its value, but for a constant factor
    spelt: bool = False  # whether it is a product that several operations spell
    # of such a product, the place of the operand that is the activation's input, times a constant
    operand: int | None = None
    factor: float = 1.0  # that constant, times a constant factor behind the product


@dataclass(frozen=True)
class Activations:
    """All activations of a record."""

    found: tuple[Activation, ...]  # the activations
    inside: frozenset[Any]  # operations inside those that several operations spell
    note: str  # what a reader of the picture must know; empty where every activation is found


def activations(nodes: Sequence[Any]) -> Activations:
    """Find the activations among the nodes of a record."""
    readers: dict[Any, list[Any]] = {}
    for node in nodes:
        for behind, _ in node.next_functions:
            readers.setdefault(behind, []).append(node)
    found, inside = [], set[Any]()
    # From the last operation on: a part of an activation's spelling is none of its own.
    for node in sorted((n for n in nodes if hasattr(n, "_sequence_nr")), key=lambda n: -n._sequence_nr()):  # noqa: SLF001
        if node in inside:
            continue
        kind = kind_of(node)
        if _named(node, kind):
            found.append(Activation(node))
        elif kind in _PRODUCTS and (gated := _gated(node, readers)) is not None:
            found.append(gated[0])
            inside |= gated[1]
    return Activations(tuple(found), frozenset(inside), _note(nodes, len(found), inside))


def _note(nodes: Iterable[Any], found: int, inside: set[Any]) -> str:
    kinds = [(node, kind_of(node)) for node in nodes if node not in inside]
    unclear = sum(kind in _UNCLEAR or _masks(node, kind) for node, kind in kinds)
    perhaps = f"{unclear} operations (masks, torch.where, abs) may spell some in a way that the record does not tell"
    # Behind a single layer with weights none is expected.
    if not found and sum(kind in _WEIGHTED for _, kind in kinds) > 1:
        why = f": {perhaps}" if unclear else ""
        return f"no activation was found, so that this is the plain gradient{why}"
    return (
        f"{found} activations were found, and {perhaps}; those keep their true derivative" if found and unclear else ""
    )


def _masks(node: Any, kind: str) -> bool:
    """Whether an operation multiplies maps by zeros and ones that do not depend on the images."""
    if kind != "MulBackward":
        return False
    constants = [place for place, (behind, _) in enumerate(node.next_functions) if behind is None]
    if len(constants) != 1:
        return False
    mask = node._saved_other if constants[0] else node._saved_self  # noqa: SLF001
    if not isinstance(mask, Tensor) or mask.ndim < 2 or len(mask) == 1 == mask.numel():
        return False
    return bool(((mask == 0) | (mask == 1)).all()) and not bool(mask.all())


def _is_zero(bound: Any) -> bool:
    if isinstance(bound, Tensor):
        return not bound.requires_grad and not bool(bound.any())
    return bound is not None and float(bound) == 0


def _named(node: Any, kind: str) -> bool:
    """Whether a node is a rectifying activation by itself: one by name, or a clamp or maximum at zero."""
    if kind in _BY_NAME:
        return True
    if kind in _CLAMPS:
        return _is_zero(getattr(node, "_saved_" + _CLAMPS[kind]))
    if kind in _MAXIMA:
        constants = [i for i, (behind, _) in enumerate(node.next_functions) if behind is None]
        # The node keeps its operands only where it needs them for a derivative.
        return len(constants) == 1 and _is_zero(node._saved_other if constants[0] else node._saved_self)  # noqa: SLF001
    return False


def _gated(node: Any, readers: dict[Any, list[Any]]) -> tuple[Activation, set[Any]] | None:
    """Return the activation that ends in a product, and the operations it is made of."""
    operands = _operands(node)
    if len(operands) != 2:
        return None
    open_ends, seen = set(operands), set[Any]()
    while len(open_ends) > 1:
        # The latest first, so that an operation is taken apart after all that read it.
        last = max(open_ends, key=_order)
        if len(seen) > _MOST_STEPS or not _CELLWISE.fullmatch(kind_of(last[0])):
            return None
        open_ends.remove(last)
        open_ends |= set(_operands(last[0]))
        seen.add(last[0])
    kinds = {kind_of(each).removesuffix("Backward") for each in seen}
    if not kinds & set(_SQUASHING) and not ("Tanh" in kinds and "Add" in kinds):
        return None
    source = next(iter(open_ends))
    scales = [(place, scale) for place, edge in enumerate(operands) if (scale := _scale(edge, source)) is not None]
    place, scale = scales[0] if scales else (None, 1.0)
    return Activation(node, True, place, scale * _scale_behind(node, kinds, readers)), seen  # noqa: FBT003


def _operands(node: Any) -> list[_Edge]:
    return [(behind, index) for behind, index in node.next_functions if behind is not None]


def _order(edge: _Edge) -> int:
    number: int = edge[0]._sequence_nr()  # noqa: SLF001
    return number


def _constant(node: Any) -> float | None:
    """Return the positive number that a product or quotient multiplies its only operand by, if it does."""
    kind = kind_of(node)
    if kind not in _PRODUCTS or len(_operands(node)) != 1 or node.next_functions[0][0] is None:
        return None
    other = node._saved_other  # noqa: SLF001
    if not isinstance(other, Tensor) or other.numel() != 1 or float(other) <= 0:
        return None
    return float(other) if kind == "MulBackward" else 1 / float(other)


def _scale(edge: _Edge, source: _Edge) -> float | None:
    """Return what the source is multiplied by on the way to an operand; ``None`` where more is done on it."""
    scale = 1.0
    while edge != source:
        times = _constant(edge[0])
        if times is None:
            return None
        scale *= times
        edge = _operands(edge[0])[0]
    return scale


def _scale_behind(node: Any, kinds: set[str], readers: dict[Any, list[Any]]) -> float:
    """Return the constant behind a product that belongs to its activation: the sixth of ``x * relu6(x + 3) / 6``."""
    behind = readers.get(node, [])
    if len(behind) != 1 or not kinds & {"Hardtanh", "Clamp", "Relu", "Erf"}:
        return 1.0
    return _constant(behind[0]) or 1.0
