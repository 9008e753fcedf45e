"""What the page says, as data: a run directory is read once into frozen values, and nothing here draws.

A run holds an explainer (``run.json``), a selection (``selection.json``) or both, and perhaps ``parts.json`` and
``explanations/``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from partlens.attribution.record import ExplanationRecord
from partlens.errors import RunError, expected
from partlens.evaluation.results import AGAIN as EVALUATE_AGAIN
from partlens.page.explainer import ExplainerData, collect_explainer
from partlens.page.explanation_page import Explanations, collect_explanations
from partlens.page.parts_page import PartsData, collect_parts
from partlens.page.reading import Pictures
from partlens.page.selection_page import SelectionData, collect_selection, pending_command
from partlens.selection.record import SelectionRecord

PICTURES_BYTES = 13_500_000
"""Room for pictures on one page, in characters; with its texts the page stays below about 15 MB."""

EXPLANATIONS_SHARE = 0.4
"""The explained images take at most this part of the room."""


@dataclass(frozen=True)
class PageData:
    """Everything that one page says; drawing it needs nothing else.

    Attributes:
        explainer: the chapter of an explained layer, or ``None``.
        selection: the chapter of the classes' features, or ``None``.
        explanations: the chapter of explained images; may be empty.
        pending: command line of a selection that was begun and has no result yet; else empty.
        named_parts: the chapter of the explainer's parts, or ``None``.
    """

    explainer: ExplainerData | None = None
    selection: SelectionData | None = None
    explanations: Explanations = field(default_factory=Explanations)
    pending: str = ""
    named_parts: PartsData | None = None

    @property
    def weights(self) -> tuple[str, ...]:
        """Hashes of the performer's weights, of the selection first, as far as they are there."""
        found = [self.selection.weights_sha256] if self.selection else []
        return (*found, *([self.explainer.run.performer.weights_sha256] if self.explainer else []))


def _explained_names(explanations: Explanations) -> Iterable[str]:
    return dict.fromkeys(e.name for one in explanations.shown for e in one.record.explained)


def collect_page(run: Path) -> PageData:
    """Read a run directory into what its page says.

    Args:
        run: the folder of a fitted explainer, of a selection, or of both.

    Returns:
        The page's content; what the run does not hold is ``None`` or empty.

    Raises:
        RunError: ``run`` is no folder, holds neither ``run.json`` nor ``selection.json``, or a file of it is damaged.
    """
    run = Path(run)
    remedy = "Give the folder that partlens fit-explainer or partlens select-features wrote"
    if not run.is_dir():
        raise RunError(expected("the folder of a run", run.as_posix(), remedy))
    if not any((run / name).exists() for name in ("run.json", "selection.json")):
        raise RunError(expected(f"a file run.json or selection.json in {run}", "none there", remedy))
    of_filters = Pictures(run, EVALUATE_AGAIN, PICTURES_BYTES)
    explainer, pending = collect_explainer(run, of_filters), pending_command(run)
    if pending and explainer is None:
        raise RunError(expected(f"a finished selection in {run}", "one that was only begun", f"Go on with: {pending}"))
    room = max(PICTURES_BYTES - of_filters.spent_bytes, 0)
    of_parts = Pictures(run, "Run partlens parts again", room)
    named_parts = collect_parts(run, of_parts) if explainer else None
    room = max(room - of_parts.spent_bytes, 0)
    of_images = Pictures(run, ExplanationRecord.AGAIN, room)
    explanations = collect_explanations(run, of_images, int(EXPLANATIONS_SHARE * room))
    of_classes = Pictures(run, SelectionRecord.AGAIN, max(room - of_images.spent_bytes, 0))
    selection = collect_selection(run, of_classes, _explained_names(explanations))
    return PageData(explainer, selection, explanations, pending, named_parts)
