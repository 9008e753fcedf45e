"""Borrow a network: use it, and hand it back as it was."""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from partlens.errors import InputError, InputTypeError, expected

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_DICTIONARIES = ("_parameters", "_buffers", "_modules", *_HOOKS)
# Plain attributes that code around a network switches: modes, in-place flags, batch statistics.
_FLAGS = ("training", "inplace", "track_running_stats", "momentum", "ceil_mode", "_is_full_backward_hook")

_FAULTS: tuple[tuple[Callable[[Any], bool], str, str], ...] = (  # of weights, and what to do first
    (is_lazy, "none", "Run the network once on an image first"),
    (lambda held: held.is_meta, "none", "Load its weights (to_empty, then load) first"),
    (Tensor.is_inference, "inference tensors", "Load the network outside inference_mode (only that, not partlens)"),
)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside ``DataParallel`` wrappers, after refusing what cannot be read or computed with.

    Raises:
        InputTypeError: not a module; one that is compiled, scripted, exported or quantised, or has such a part; one
            whose weights hold no values yet.
    """
    if not isinstance(module, nn.Module):
        raise InputTypeError(
            expected("a torch.nn.Module", type(module).__name__, "Pass the network itself, or its name as a string")
        )
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    for path, each in module.named_modules():
        if (refused := _unreadable(each)) is not None:
            what, remedy = refused
            where = f"{path} ({type(each).__name__})" if path else type(each).__name__
            rule = "a network in Python whose layers can be read and differentiated"
            raise InputTypeError(expected(rule, f"{what}, {where}", remedy))
        for name, held in (*each._parameters.items(), *each._buffers.items()):  # noqa: SLF001
            for faulty, got, remedy in _FAULTS if held is not None else ():
                if faulty(held):
                    where = f"{got} in {f'{path}.{name}'.lstrip('.')}"
                    raise InputTypeError(expected("weights with values that autograd can use", where, remedy))
    return module


def _unreadable(module: nn.Module) -> tuple[str, str] | None:
    """Say what is wrong with a module and what to pass instead; nothing where it can be used."""
    content = vars(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module", "Pass the plain module that was scripted or traced"
    if isinstance(content.get("_modules", {}).get("_orig_mod"), nn.Module):
        return "one compiled by torch.compile", "Pass the plain module that was compiled (module._orig_mod)"
    if content.get("_compiled_call_impl") is not None:
        return "one compiled in place", "Pass the plain module that was compiled, without calling its compile()"
    if isinstance(module, fx.GraphModule) and "train" in content:  # torch.export replaces the method
        return "a module of torch.export", "Pass the plain module that was exported"
    if ".quantized" in type(module).__module__:
        return "a quantised layer", "Pass the network before quantisation"
    return None


# Who is inside blocks that keep the random state, by thread, and what it was before the first of them came in.
_RANDOM = threading.Lock()
_INSIDE: Counter[int] = Counter()
_BEFORE: list[Callable[[], None]] = []


def _random_state() -> Callable[[], None]:
    """Return what puts the random state back as it is now."""
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002 - the legacy global state is what must be kept
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return put_back


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random state of Python, NumPy and torch (CPU, CUDA) as it was.

    The state belongs to all threads. So a thread puts its own back while it is alone inside, and the last of several
    puts back what the first of them found.
    """
    me = threading.get_ident()
    with _RANDOM:
        own = _random_state()
        if not _INSIDE:
            _BEFORE[:] = [own]
        _INSIDE[me] += 1
    try:
        yield
    finally:
        with _RANDOM:
            _INSIDE[me] -= 1
            if not _INSIDE[me]:
                del _INSIDE[me]
            if not _INSIDE:
                _BEFORE.pop()()
            elif set(_INSIDE) == {me}:
                own()


# What is borrowed, by identity: the thread that has it, and how often. Entries live as long as their block, which
# holds the objects, so that no identity is given to another object meanwhile.
_FREE = threading.Condition()
_HOLDERS: dict[int, tuple[int, int]] = {}


@contextlib.contextmanager
def alone(module: nn.Module) -> Iterator[None]:
    """Have a network, its submodules and its tensors to oneself; a thread may come in again."""
    # Submodules and tensors, too: two networks that share a backbone or tied weights disturb each other's.
    held = [*module.modules(), *module.parameters(), *module.buffers()]
    things, me = list(map(id, held)), threading.get_ident()
    with _FREE:
        _FREE.wait_for(lambda: all(_HOLDERS.get(thing, (me, 0))[0] == me for thing in things))
        for thing in things:
            _HOLDERS[thing] = me, _HOLDERS.get(thing, (me, 0))[1] + 1
    try:
        yield
    finally:
        with _FREE:
            for thing in things:
                holder, count = _HOLDERS.pop(thing)
                if count > 1:
                    _HOLDERS[thing] = holder, count - 1
            _FREE.notify_all()


def like_weights(module: nn.Module, images: Tensor) -> Tensor:
    """Return images in the type and on the device of a network's weights."""
    weight = next(filter(torch.is_floating_point, module.parameters()), None)
    return images if weight is None else images.to(device=weight.device, dtype=weight.dtype)


def hooked(module: nn.Module) -> bool:
    """Whether a module has hooks of its own in its forward pass."""
    return bool(module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward hook that acts in the thread that makes it alone.

    The owner may run the network in another thread while it is borrowed, and such a pass is none of ours. The copies
    that ``DataParallel`` makes of a network run in threads of their own and are ours.
    """
    thread = threading.get_ident()

    def acting(module: nn.Module, *given: Any) -> Any:
        ours = threading.get_ident() == thread or getattr(module, "_is_replica", False)
        return hook(module, *given) if ours else None

    return acting


def _restore_mapping(target: MutableMapping[Any, Any], saved: tuple[tuple[Any, Any], ...]) -> None:
    """Give a dictionary back its entries, by identity and in order."""
    if len(target) == len(saved) and all(
        a[0] == b[0] and a[1] is b[1] for a, b in zip(target.items(), saved, strict=True)
    ):
        return
    target.clear()
    target.update(saved)


def _rewrite(pairs: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    """Write values of before where they changed (NaN equals NaN), with one wait for a GPU in all."""
    kept = [(now, before) for now, before in pairs if before is not None]
    flags = [(now.ne(before) & (now.eq(now) | before.eq(before))).any() for now, before in kept]
    if flags and bool(torch.stack([flag.to(flags[0].device) for flag in flags]).any()):
        for (now, before), flag in zip(kept, flags, strict=True):
            if bool(flag):
                now.copy_(before)


class _Snapshot:
    """All of a network's state that code around it could disturb."""

    def __init__(self, module: nn.Module, *, copy_weights: bool) -> None:
        self.module = module
        # Of each module its dictionaries, by owner and name, with their entries; most are empty (hooks).
        self.dictionaries: list[tuple[dict[str, Any], str, Any, tuple[tuple[Any, Any], ...]]] = []
        self.flags: list[tuple[dict[str, Any], str, Any]] = []
        for content in (each.__dict__ for each in module.modules()):
            for name in filter(content.__contains__, _DICTIONARIES):
                self.dictionaries.append((content, name, content[name], tuple((content[name] or {}).items())))
            self.flags += [(content, name, content[name]) for name in _FLAGS if name in content]
        # A version that has grown shows that values were written to, without a copy to compare with.
        self.parameters = [_kept(p, copy_weights=copy_weights) for p in module.parameters()]
        self.buffers = [(b, b.data, b.detach().clone()) for b in module.buffers()]
        for p, *_ in self.parameters:
            p.grad = None  # gradients made while borrowed must not be added to the owner's

    def restore(self) -> list[str]:
        """Put everything back; return the names of weights that were changed and could not be put back."""
        self.module.train(self.flags[0][2] if self.flags else self.module.training)
        for content, name, mapping, saved in self.dictionaries:
            content[name] = mapping  # nn.Sequential puts another one in its place when it loses a layer
            if mapping or saved:
                _restore_mapping(mapping, saved)
        for content, name, value in self.flags:
            content[name] = value
        return self._restore_tensors()

    def _restore_tensors(self) -> list[str]:
        with torch.no_grad():
            lost = {id(each[0]) for each in self.parameters if not _restored(*each)}
            for buffer, data, _ in self.buffers:
                _own(buffer, data)
            _rewrite([(each[0].data, each[2]) for each in (*self.parameters, *self.buffers)])
        return [name for name, p in self.module.named_parameters() if id(p) in lost] if lost else []


def _kept(p: nn.Parameter, *, copy_weights: bool) -> tuple[Any, ...]:
    return p, p.data, p.data.clone() if copy_weights else None, p.requires_grad, p.grad, p._version  # noqa: SLF001


def _own(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor its storage."""
    if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype or tensor.shape != data.shape:
        tensor.data = data


def _restored(
    p: nn.Parameter, data: Tensor, before: Tensor | None, requires_grad: bool, grad: Tensor | None, version: int
) -> bool:
    """Put a weight back; say whether its values are surely those of before."""
    _own(p, data)
    unchanged = before is not None or p._version == version  # noqa: SLF001
    p.requires_grad_(requires_grad)
    p.grad = grad
    return unchanged


@contextlib.contextmanager
def borrowed(module: nn.Module, *, copy_weights: bool = True) -> Iterator[nn.Module]:
    """Use a network in eval mode and hand it back bit for bit as it was, after an exception too.

    Kept: weights, buffers, ``requires_grad``, ``.grad`` (the same objects with the same values), train/eval
    mode and in-place flags of every submodule, hooks, the submodules themselves, the device, and the global
    random state of torch, NumPy and Python. Inside the block ``.grad`` is ``None``, so that a backward pass
    cannot add to the owner's gradients. Other threads that want to borrow it, a part of it or a network that shares
    a part of it wait until the block ends; other networks are not held up.

    A forward pass that the owner runs meanwhile in another thread meets no hook of ours, but it runs in eval mode. So
    do not train a network while it is borrowed.

    Args:
        module: the network; ``DataParallel`` is unwrapped.
        copy_weights: keep a copy of the weights to restore from. Without it (cheaper for one forward pass,
            which does not write weights) a changed weight cannot be restored and is an error.

    Yields:
        The unwrapped network in eval mode.

    Raises:
        InputTypeError: not a readable network.
        InputError: the network changed its own weights and ``copy_weights`` was off.

    Example:
        >>> layer = nn.Sequential(nn.BatchNorm2d(3)).train()
        >>> with borrowed(layer) as network:
        ...     network.training
        False
        >>> layer.training
        True
    """
    inner = unwrapped(module)
    with alone(inner), random_state_kept():
        snapshot = _Snapshot(inner, copy_weights=copy_weights)
        lost: list[str] = []
        try:
            inner.eval()
            yield inner
        finally:
            lost = snapshot.restore()
    if lost:
        got = f"{type(inner).__name__}, which changed {lost[0]}"
        remedy = "Wrap it so that its forward pass does not write weights"
        raise InputError(expected("a network that leaves its weights alone in eval mode", got, remedy))
