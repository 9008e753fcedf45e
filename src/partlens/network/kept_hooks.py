"""The owner's forward hooks in a traced network and in what is cut out of it: what they change stays changed.

While a network is traced, no hook is called: it would see the proxies of torch.fx, keep them, or fail on them. A module
that stays whole in the graph has its hooks with it in the copy. Around one that is traced through, and around the whole
network, operations are put into the graph that call the hooks with the values of each pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn.modules import module as all_modules

from partlens.errors import LayerError, expected

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Unknown(tuple[str]):
    """What a layer was called with, in a pass that starts behind that: only a hook that looks at it has to know.

    It holds the layer's path alone.
    """

    __slots__ = ()

    def _refuse(self, *_: object) -> Any:
        path = tuple.__getitem__(self, 0)
        got = f"hooks of {path or 'the whole network'} that read what it is called with, behind a tap inside it"
        rule, remedy = "hooks that read a layer's output alone", "Remove the hooks, or tap an earlier layer"
        raise LayerError(expected(rule, got, remedy))

    __getitem__ = __iter__ = __len__ = _refuse


def _listed(module: nn.Module, kind: str) -> list[tuple[Callable[..., Any], bool]]:
    """Return hooks in the order in which torch calls them, and whether each takes keyword arguments."""
    every, own = getattr(all_modules, f"_global_{kind}_hooks"), getattr(module, f"_{kind}_hooks")
    with_names = {
        *getattr(all_modules, f"_global_{kind}_hooks_with_kwargs", ()),
        *getattr(module, f"_{kind}_hooks_with_kwargs"),
    }
    return [(hook, number in with_names) for number, hook in (*every.items(), *own.items())]


def _cloned(value: Any) -> Any:
    """Return a copy, because a hook may write into what it gets, which other layers read, too."""
    return fx.node.map_aggregate(value, lambda v: v.clone() if isinstance(v, Tensor) else v)


def _before(module: nn.Module) -> Callable[..., Any]:
    """Return an operation that calls the pre-hooks of a module; a single argument comes back as such."""
    hooks = _listed(module, "forward_pre")

    def kept_hooks(args: Any, kwargs: Any) -> Any:
        count = len(args)
        args, kwargs = tuple(_cloned(args)), dict(_cloned(kwargs))
        for hook, with_names in hooks:
            given = hook(module, args, kwargs) if with_names else hook(module, args)
            if given is not None and with_names:
                args, kwargs = given
            elif given is not None:
                args = given if isinstance(given, tuple) else (given,)
        if len(args) != count:
            rule = f"pre-hooks of {type(module).__name__} that keep its {count} arguments"
            raise LayerError(expected(rule, len(args), "Remove the hooks"))
        return args[0] if count == 1 and not kwargs else (args, kwargs)

    return kept_hooks


def _after(module: nn.Module, path: str) -> Callable[..., Any]:
    """Return an operation that calls the forward hooks of a module."""
    hooks = _listed(module, "forward")

    def kept_hooks(result: Any, args: Any = None, kwargs: Any = None) -> Any:
        result = _cloned(result)
        args = _Unknown((path,)) if args is None else tuple(args)
        for hook, with_names in hooks:
            names = (cast("Any", _Unknown((path,)) if kwargs is None else dict(kwargs)),) if with_names else ()
            given = hook(module, args, *names, result)
            result = result if given is None else given
        return result

    return kept_hooks


class HookedCalls:
    """The hooks of a traced network that stand in its graph as operations.

    Attributes:
        inputs: of each operation that calls forward hooks, what its module is called with, in nodes. They are no
            arguments of the operation: a hook that reads its output alone opens no path around the module.
    """

    def __init__(self) -> None:
        self.inputs: dict[fx.Node, _Arguments] = {}

    def call(
        self, tracer: fx.Tracer, module: nn.Module, path: str, forward: Callable[..., Any], given: _Arguments
    ) -> Any:
        """Trace through a module, between operations that call its hooks where it has any."""
        args, kwargs = given
        if _listed(module, "forward_pre"):
            made: Any = tracer.create_proxy("call_function", _before(module), (args, kwargs), {})
            if len(args) == 1 and not kwargs:
                args = (made,)
            else:
                args = tuple(made[0][place] for place in range(len(args)))
                kwargs = {name: made[1][name] for name in kwargs}
        result = forward(*args, **kwargs)
        if _listed(module, "forward"):
            named = tracer.create_arg(args), tracer.create_arg(kwargs)
            result = tracer.create_proxy("call_function", _after(module, path), (result,), {})
            self.inputs[result.node] = cast("_Arguments", named)
        return result

    def copied(self, node: fx.Node, graph: fx.Graph, made: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
        """Copy an operation that calls forward hooks, with what its module is called with where the copy has it."""
        if node not in self.inputs:
            return None
        inputs = self.inputs[node]
        read: list[fx.Node] = []
        fx.node.map_arg(inputs, read.append)
        known = inputs if all(each in made for each in read) else ()
        return graph.call_function(node.target, fx.node.map_arg((*node.args, *known), made.__getitem__))  # type: ignore[arg-type]


def kept_by_reference(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """Return what a deep copy of modules must not copy: the hooks' own objects, which their owner goes on using.

    A hook that is a method of a copied module becomes that of the copy.
    """
    copied = list(modules)
    inside = set(map(id, copied))
    memo: dict[int, Any] = {}
    for each in copied:
        for hook in (*each._forward_hooks.values(), *each._forward_pre_hooks.values()):  # noqa: SLF001
            owner = getattr(hook, "__self__", hook)
            if id(owner) not in inside:
                memo[id(owner)] = owner
    return memo


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own in its forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001
