"""The errors and their two sentences: a value that is wrong (:func:`expected`), an event that failed (:func:`failed`).

Words of the whole package: axes are in the order ``image, filter, row, col``. A *performer* is the network under study,
a *tap* one of its layers by name, a *map* one filter's output on one image, a *cell* one position of a map, a
*template* an ideal map with one peak, a *part* what a filter responds to, a *track* one path through the explainer's
encoder.

This module imports nothing of the package and no tensor library.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin

_P = ParamSpec("_P")
_T = TypeVar("_T")

_LONGEST_SHOWN = 120  # characters of a wrong value in a sentence

BACKGROUND = "background"
"""The category of photos that show something else."""


class PartlensError(Exception):
    """Any error that partlens raises on purpose; its text is one sentence a user can act on."""


class InputError(PartlensError, ValueError):
    """A value that breaks a stated rule."""


class InputTypeError(PartlensError, TypeError):
    """An object of a kind that cannot be used here."""


class LayerError(InputError):
    """A layer that is unknown, cannot be tapped or cannot be explained."""


class ImageError(InputError):
    """Images or annotations that are missing, unreadable or too few."""


class WeightsError(InputError):
    """A weights file that does not fit the network, or is not safe to open."""


class RunError(InputError):
    """A run directory that is missing, incomplete, or belongs to another configuration."""


class AtWorkError(RunError):
    """A folder that another process is writing to."""


class PartlensWarning(UserWarning):
    """Something that a reader of the result must know, and that is no error."""


class StorageError(PartlensError, OSError):
    """Results could not be written (disk full, no permission); what was complete before is untouched."""


def _is_flag(value: object) -> bool:
    return type(value).__name__ in {"bool", "bool_"}  # NumPy's, too


def _is_number(value: object, kind: type) -> bool:
    if not isinstance(value, kind) or _is_flag(value):
        return False
    return not isinstance(value, int) or abs(value) < 2**64


def _are_texts(value: Any) -> bool:
    several = isinstance(value, Collection) and not isinstance(value, (str, bytes, Mapping))
    return several and getattr(value, "ndim", 1) == 1 and all(isinstance(each, str) for each in value)


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "None": ("None", lambda value: value is None),
    "bool": ("True or False", _is_flag),
    "int": ("a whole number", lambda value: _is_number(value, Integral)),
    "float": ("a number", lambda value: _is_number(value, Real)),
    "str": ("a text", lambda value: isinstance(value, str)),
    "Path": ("a path", lambda value: isinstance(value, os.PathLike)),
    "Mapping[str, Any]": ("a dictionary", lambda value: isinstance(value, Mapping)),
    "Sequence[str]": ("a list of texts", _are_texts),
}
_CLASSES = {  # known by name where not imported
    "ImageSet": "a partlens.ImageSet",
    "Module": "a torch.nn.Module",
    "Performer": "a Performer",
    "Preprocessing": "a partlens.Preprocessing",
    "Progress": "a Progress",
}


def _kind(annotation: Any, names: Mapping[str, Any]) -> tuple[str, Callable[[object], bool]] | None:
    """Return how one alternative of an annotation is called and recognised; ``None`` for what is not checked here."""
    meant = annotation if get_origin(annotation) is Literal else names.get(annotation)
    if get_origin(meant) is Literal:
        words = get_args(meant)
        return f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words
    if annotation.rpartition(".")[2] in _CLASSES or (isinstance(meant, type) and annotation not in _KINDS):
        name = annotation.rpartition(".")[2]
        return _CLASSES.get(name, f"a {name}"), lambda value: any(each.__name__ == name for each in type(value).__mro__)
    return _KINDS.get(annotation)


def _alternatives(annotation: Any) -> list[Any]:
    if isinstance(annotation, str):
        return annotation.split(" | ")
    kinds = get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)
    named = (kind if get_origin(kind) is Literal else getattr(kind, "__name__", str(kind)) for kind in kinds)
    return ["None" if kind == "NoneType" else kind for kind in named]


def checked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Make a public function refuse arguments of another kind than its annotations say, each in one sentence.

    Alternatives that are more than a kind, such as a tensor with its axes, are left to the function.

    Example:
        >>> @checked
        ... def twice(number: int, loud: bool = False) -> int:
        ...     return 2 * number
        >>> twice(3, loud="yes")
        Traceback (most recent call last):
            ...
        partlens.errors.InputTypeError: Expected loud as True or False, got 'yes'. Give that, or leave loud out.
    """
    signature, names = inspect.signature(function), inspect.unwrap(function).__globals__

    @functools.wraps(function)
    def at_the_door(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _check_kind(signature.parameters[name], value, names)
        return function(*args, **kwargs)

    return at_the_door


@contextlib.contextmanager
def usual_modes() -> Iterator[None]:
    """Leave the modes of a caller: without gradients, autocast, another default device, NumPy's warnings as errors."""
    import numpy as np

    with contextlib.ExitStack() as modes:
        modes.enter_context(np.errstate(divide="warn", over="warn", under="ignore", invalid="warn"))
        if "torch" in sys.modules:  # else nobody has set any of its modes
            import torch

            kind = str(torch.get_default_dtype())
            if kind != "torch.float32":  # one for all threads, so not ours to change
                remedy = "Call torch.set_default_dtype(torch.float32) first"
                raise InputError(expected("torch.float32 as torch's default type", kind, remedy))
            modes.enter_context(torch.inference_mode(mode=False))  # with gradients, too
            for device in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
                # What autocast has rounded is kept until the outermost one ends, whatever weights learn meanwhile.
                modes.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
            if torch.get_default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
        yield


def _check_kind(parameter: inspect.Parameter, value: object, names: dict[str, Any]) -> None:
    kinds = [_kind(each, names) for each in _alternatives(parameter.annotation)]
    known = list(filter(None, kinds))
    if len(known) == len(kinds) and not any(fits(value) for _, fits in known):
        rule = f"{parameter.name} as {' or '.join(dict.fromkeys(words for words, _ in known))}"
        optional = "" if parameter.default is parameter.empty else f", or leave {parameter.name} out"
        text = expected(rule, shown(value), f"Give that{optional}")
        raise InputError(text) if isinstance(value, str) and "one of " in rule else InputTypeError(text)


def expected(rule: str, got: object, remedy: str) -> str:
    """Build the sentence of a wrong value: what was expected, what came instead, and what to do.

    Args:
        rule: what would have been right, without the word "expected".
        got: the offending value; shown as it is when a string, else by ``repr``.
        remedy: what the user can do, an imperative sentence.

    Returns:
        The sentence, ending in one full stop.

    Example:
        >>> expected("at least 2 images", 1, "Add photos to the folder")
        'Expected at least 2 images, got 1. Add photos to the folder.'
    """
    return f"Expected {rule}, got {got if isinstance(got, str) else shown(got)}. {_ended(remedy)}"


def shown(value: object) -> str:
    """Return a value as a sentence can hold it: its ``repr``, cut where it is long, its kind where it has none.

    Example:
        >>> shown("a"), shown(10**5000)
        ("'a'", 'a value of kind int')
    """
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - nested too deeply, thousands of digits, or an object that cannot show itself
        return f"a value of kind {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _ended(sentence: str) -> str:
    return sentence if sentence.endswith(("?", "!", ".")) else f"{sentence}."


def failed(action: str, reason: OSError | str, remedy: str) -> str:
    """Build the sentence of an event that failed: what was tried, why it could not be, and what to do.

    Args:
        action: what was tried, an infinitive without "to".
        reason: why it failed; of an error of the operating system its own words.
        remedy: what the user can do, an imperative sentence.

    Example:
        >>> failed("write runs/x.json", OSError(28, "No space left on device"), "Free space")
        'Could not write runs/x.json: no space left on device. Free space.'
    """
    why = reason if isinstance(reason, str) else reason.strerror or str(reason) or type(reason).__name__
    why = why[:1].lower() + why[1:] if why[1:2].islower() else why
    return f"Could not {action}: {_ended(why)} {_ended(remedy)}"


def nearest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """Return the options most like a misspelt name, best first.

    Args:
        name: what the user wrote.
        options: what exists.
        count: how many to return at most.

    Returns:
        Up to ``count`` names; when nothing is similar, the first ``count`` options.

    Example:
        >>> nearest("layer9", ["conv1", "layer3", "layer4"], count=2)
        ['layer4', 'layer3']
    """
    pool = list(dict.fromkeys(options))
    return difflib.get_close_matches(name, pool, n=count, cutoff=0.5) or pool[:count]


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Join names for a sentence, with the number of those beyond the limit.

    Example:
        >>> listed(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    shown = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def printable(text: str) -> str:
    r"""Return a name as text that can be written: bytes of it that are not UTF-8 become escapes.

    Example:
        >>> printable("caf\udce9.png"), printable("café.png")
        ('caf\\udce9.png', 'café.png')
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
