"""What a run directory says of an explainer: its structure, its record, its history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator

from partlens.explainer.config import ExplainerConfig
from partlens.records import Record, Value
from partlens.run import EXPLAINER, RunRecord

WEIGHTS = "explainer.safetensors"
LESSON = "lesson.safetensors"
"""Features of training photos at the last target, averaged over cells, and which category each shows."""


@dataclass(frozen=True)
class ExplainerStructure:
    """What an explainer is made of, all of it found in the performer."""

    tap: str  # layer whose maps go in
    targets: tuple[str, ...]  # layers whose features are reconstructed, the last one fed back
    channels_in: int  # filters of the tap
    channels_out: int  # filters of the encoder's output
    side_cells: tuple[int, int]  # rows and columns of the tap's maps
    # name of the performer's convolution that the tracks replace; ``None`` where they are inserted
    replaced: str | None
    decoder_from: str  # layer whose output the encoder's output replaces
    signed: bool = False  # whether the tap has values below 0; the ordinary track then has no ReLU
    # of the tap and of each target, rows below the maps that hold tokens without a place, such as a class token; they
    # pass by the explainer
    spare_rows: tuple[int, ...] = ()

    @property
    def read(self) -> str:
        """Name under which the tap is read for the explainer, its spare rows included."""
        return f"{self.tap}:whole" if self.read_cells != self.side_cells else self.tap

    @property
    def read_cells(self) -> tuple[int, int]:
        """Rows and columns that are read at the tap."""
        rows, cols = self.side_cells
        return rows + (self.spare_rows[0] if self.spare_rows else 0), cols


class Grid(Value):
    """Where the cells of the tap's maps are in the input, (row, col) in pixels.

    Attributes:
        stride_px: from one cell's receptive field to the next one's.
        size_px: of a receptive field.
        start_px: of the first cell's.
    """

    stride_px: tuple[float, float]
    size_px: tuple[float, float]
    start_px: tuple[float, float]


class ExplainerRun(RunRecord):
    """A fitted explainer.

    Attributes:
        train_photos: photos of the categories that it learned from.
        background: other photos that it learned from.
        structure: what it is made of.
        preset: the one its configuration began with, or ``custom``.
        config: how it was built and learned.
        seeds: explainers that were learned.
        places: where the parts that teach come from: ``found`` as an inspection finds them, ``inspection`` with the
            first digits of its tensors' hash, the name of a function, or nothing where nothing teaches.
        grid: where the tap's cells are in the input.
        p_by_seed: the share of the interpretable track in each.
        weights_sha256: of the weights of the first.
        lesson_sha256: of ``lesson.safetensors``, by which an evaluation tells the categories.
    """

    FILE: ClassVar[str] = EXPLAINER
    SCHEMA: ClassVar[str] = "partlens.explainer/4"
    AGAIN: ClassVar[str] = "Run fit-explainer again"
    SETTINGS: ClassVar[tuple[str, ...]] = ("structure", "config", "seeds", "background", "places")
    RESULTS: ClassVar[tuple[str, ...]] = (
        WEIGHTS,
        LESSON,
        "curve.json",
        "evaluation.json",
        "photos.json",
        f"seeds/*/{WEIGHTS}",
        "price/*/*",
    )

    train_photos: int
    background: int
    structure: ExplainerStructure
    preset: str
    config: ExplainerConfig
    seeds: int
    places: str = ""
    grid: Grid
    p_by_seed: tuple[float, ...] = ()
    weights_sha256: str = ""
    lesson_sha256: str = ""


def _epoch(values: dict[str, Any]) -> dict[str, Any]:
    """Check that an epoch has its number and phase, and that all else is numbers."""
    if not isinstance(values.get("phase"), str) or type(values.get("epoch")) is not int:
        raise ValueError("an epoch with its number and phase")
    for name, value in values.items():
        if name != "phase" and (isinstance(value, bool) or not isinstance(value, (int, float, type(None)))):
            raise ValueError(f"an epoch whose {name} is a number")
    return values


class History(Record):
    """What training logged.

    Attributes:
        epochs: logged terms by name, one mapping per epoch.
    """

    FILE: ClassVar[str] = "history.json"
    SCHEMA: ClassVar[str] = "partlens.history/1"
    AGAIN: ClassVar[str] = "Run fit-explainer again"

    epochs: tuple[Annotated[dict[str, Any], AfterValidator(_epoch)], ...] = ()
