"""The parts of a generated flower, its colours, and the categories they make."""

from __future__ import annotations

from partlens.data.flowers import COLOURS, PETAL_CATEGORIES
from partlens.errors import InputError, expected, listed, nearest
from partlens_papers.flowers.canvas import Colour

STEM_CATEGORIES = tuple(f"stem-{colour}" for colour in COLOURS)
# Two colours that are neighbours on the wheel, and which part bears which: 6 pairs x 2 ways. Every petal colour meets
# two stem colours and the reverse, so that one part alone leaves two classes open.
_WHEEL = tuple(zip(COLOURS, (*tuple(COLOURS)[1:], next(iter(COLOURS))), strict=True))
DOUBLE_CATEGORIES = tuple(
    f"petal-{petal}-stem-{stem}" for pair in _WHEEL for petal, stem in (pair, tuple(reversed(pair)))
)

WHITE: Colour = (0.96, 0.95, 0.92)
CENTRES: tuple[Colour, ...] = (
    (0.28, 0.16, 0.09),
    (0.45, 0.30, 0.12),
    (0.62, 0.62, 0.22),
    (0.86, 0.80, 0.62),
    *COLOURS.values(),
)


def checked_category(category: str) -> tuple[Colour | None, Colour | None]:
    """Return the colour of petals and of the stem, None for the natural one."""
    known = (*PETAL_CATEGORIES, *STEM_CATEGORIES, *DOUBLE_CATEGORIES)
    if category not in known:
        raise InputError(
            expected("a flower category", f"{category!r}", f"Choose one of {listed(nearest(category, known, 5))}")
        )
    words = category.split("-")
    coloured = {part: COLOURS[colour] for part, colour in zip(words[::2], words[1::2], strict=True)}
    return coloured.get("petal"), coloured.get("stem")
