"""Which output of a network a category of photos means: by name, or as a number where the range fits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from partlens.errors import listed

_SHOWN = 6
_FEW_RIGHT = 0.1  # of the photos, below which the match is doubted whatever else the network says of them


def key_of(name: str) -> str:
    """Fold case, underscores and runs of spaces."""
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


@dataclass(frozen=True)
class Match:
    """Categories and the outputs that they mean."""

    outputs: Mapping[str, int | None]  # by category, ``None`` where it is no output, or more than one
    how: str  # in which way, as a phrase

    def said(self) -> str:
        """Say what was matched with what; nothing where no category is an output."""
        found = [f"{name} → {output}" for name, output in self.outputs.items() if output is not None]
        if not found:
            return ""
        lost = [name for name, output in self.outputs.items() if output is None]
        without = f"; no output: {listed(lost, _SHOWN)}" if lost else ""
        return f"categories and outputs, {self.how}: {listed(found, _SHOWN)}{without}"


def match(categories: Sequence[str], names: Sequence[str] | None, count: int) -> Match:
    """Match categories with the outputs of a network.

    1. By name, where the outputs have names: case, underscores and spaces do not matter.
    2. Categories that are numbers: the outputs of these numbers where all are below ``count``; else labels that start
       at 1 where the largest is ``count``; else, where there are as many as outputs, their places when they are sorted
       as text, as ImageFolder numbers its folders. No number goes past the last output.

    Example:
        >>> dict(match(["1", "10", "2"], None, 3).outputs), dict(match(["1", "2"], None, 2).outputs)
        ({'1': 0, '10': 1, '2': 2}, {'1': 0, '2': 1})
    """
    wanted = [name for name in dict.fromkeys(categories) if name]
    named = {name: _named(name, (names or ())[:count]) for name in wanted}
    numbers = {name: int(name) for name in wanted if named[name] is None and re.fullmatch(r"\d+", name.strip())}
    if not numbers:
        return Match(named, "by name")
    if len(numbers) < len(wanted):  # some are names, so the numbers are no labels of a data set
        inside = {name: value if value < count else None for name, value in numbers.items()}
        return Match(named | inside, "by name and number")
    by_number, how = _numbered(numbers, count)
    return Match(named | by_number, how)


def _named(category: str, names: Sequence[str]) -> int | None:
    places = [place for place, name in enumerate(names) if key_of(name) == key_of(category)]
    return places[0] if len(places) == 1 else None


def _numbered(numbers: Mapping[str, int], count: int) -> tuple[dict[str, int | None], str]:
    """Return the outputs of categories that are all numbers, and in which way."""
    highest = max(numbers.values())
    if highest < count:
        return dict(numbers), "by number"
    if highest == count and min(numbers.values()) >= 1:
        return {name: value - 1 for name, value in numbers.items()}, "labels that start at 1"
    if len(numbers) == count:
        return {name: place for place, name in enumerate(sorted(numbers))}, "in the order of the names as text"
    return {name: value if value < count else None for name, value in numbers.items()}, "by number"


def disagreement(categories: Sequence[str], decided: Sequence[int], outputs: Mapping[str, int | None]) -> str:
    """Say where a match of categories with outputs is not what the network predicts (``decided``) on the photos."""
    known = [(name, said) for name, said in zip(categories, decided, strict=True) if outputs.get(name) is not None]
    if not known:
        return ""
    right = sum(outputs[name] == said for name, said in known) / len(known)
    by_category = {name: Counter(said for other, said in known if other == name) for name in dict(known)}
    usual = {name: said.most_common(1)[0][0] for name, said in by_category.items()}
    fits = sum(usual[name] == said for name, said in known) / len(known)
    if len(set(usual.values())) == len(usual) > 1 and fits > max(0.5, 2 * right):
        seen = listed([f"{name} for output {output}" for name, output in usual.items()], _SHOWN)
        return (
            f"the network takes most photos of {seen}, and {100 * right:.0f} % of them for what they were matched "
            "with: its outputs may be in another order than the categories"
        )
    if right < _FEW_RIGHT:
        return f"the network takes {100 * right:.0f} % of the photos for the outputs that their categories mean"
    return ""
