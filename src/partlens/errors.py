"""The errors and their two sentences: a value that is wrong (:func:`expected`), an event that failed (:func:`failed`).

Words of the whole package: axes are in the order ``image, filter, row, col``. A *performer* is the network under study,
a *tap* one of its layers by name, a *map* one filter's output on one image, a *cell* one position of a map, a
*template* an ideal map with one peak, a *part* what a filter responds to, a *track* one path through the explainer's
encoder.

This module imports nothing of the package and no tensor library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

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
