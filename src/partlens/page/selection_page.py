"""What the page draws of a selection: rows, figures and words, ready for its template."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from partlens.page import figures, notation, selection_words, wording
from partlens.page.environment import pairs
from partlens.page.reading import Embedded, Measure
from partlens.page.selection_data import ClassRead, RelevantFeature, SelectionData
from partlens.page.selection_figures import class_shares, layer_shares, layers_chart, layers_width
from partlens.page.views import Chapter, Figure, Origin, Remarks

TABLE_CLASSES = 30
"""Up to so many classes are shown as a table of classes by layers."""


@dataclass(frozen=True)
class Shown:
    """A picture with its words; ``small`` ones are drawn without smoothing."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str

    @property
    def small(self) -> bool:
        """Whether the picture has fewer pixels than it is shown with."""
        return max(self.width, self.height) < 64


def shown(picture: Embedded | None, alt: str, caption: str) -> Shown | None:
    """Put a picture and its words together, ``None`` where there is no picture."""
    return Shown(picture.uri, picture.width_px, picture.height_px, alt, caption) if picture else None


@dataclass(frozen=True)
class _Feature:
    """One feature of a class."""

    name: str
    sees: str
    weight: float
    share: float
    bar_percent: float
    sharpness: str
    average: Shown | None
    control: Shown | None
    crops: Shown | None


@dataclass(frozen=True)
class _Class:
    """One class as it is shown; ``explained`` holds (anchor, image) of its explanations on the page."""

    anchor: str
    data: ClassRead
    features: tuple[_Feature, ...]
    unlisted: int
    explained: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class _HeatRow:
    """One class's shares by layer in percent, in the order of the columns; ``None`` where it has none."""

    anchor: str
    name: str
    cells: tuple[float | None, ...]


@dataclass(frozen=True)
class _Fact:
    """One number of the selection that has no null: what it is, what it means, its value."""

    name: str
    words: str
    value: str


@dataclass(frozen=True)
class SelectionView:
    """Everything that the selection's template shows; ``data`` holds what is written as it is."""

    data: SelectionData
    verdicts: tuple[wording.Verdict, ...]
    readouts: tuple[tuple[str, str, Measure], ...]
    readout_figure: Figure | None
    numbers: tuple[_Fact, ...]
    layers_figure: Figure | None
    layers_width: int
    heat_columns: tuple[str, ...]
    heat_rows: tuple[_HeatRow, ...]
    classes: tuple[_Class, ...]
    rest: tuple[_Class, ...]
    has_pictures: bool
    left_out: str


def _sees(field: tuple[int, int] | None) -> str:
    return "sees the whole image" if field is None else f"sees {field[0]} × {field[1]} px"


def _feature(one: ClassRead, feature: RelevantFeature, top: float) -> _Feature:
    name = selection_words.filter_name(feature.layer, feature.channel)
    sharp = feature.sharpness
    said = ""
    if sharp and math.isfinite(sharp.value):
        beside = f", random crops {notation.number(sharp.control)}" if math.isfinite(sharp.control) else ""
        said = f"sharpness {notation.number(sharp.value)}{beside}"
    strongest = f": {', '.join(feature.strongest[:8])}" if feature.strongest else ""
    return _Feature(
        name=name,
        sees=_sees(feature.field_px),
        weight=feature.weight,
        share=feature.share,
        bar_percent=100 * abs(feature.weight) / top if top and math.isfinite(feature.weight) else 0.0,
        sharpness=said,
        average=shown(feature.average, f"Average of what {name} answers to most, for the class {one.name}", "average"),
        control=shown(feature.control, f"Average of random crops of the same photos, for {name}", "random crops"),
        crops=shown(feature.crops, f"Crops where {name} answers most{strongest}", "strongest crops"),
    )


def class_anchor(position: int) -> str:
    """Return the id of a class on the page."""
    return f"class-{position + 1}"


def _class(position: int, one: ClassRead, explained: Iterable[tuple[str, str, str]]) -> _Class:
    weights = [abs(f.weight) for f in one.features if math.isfinite(f.weight)]
    return _Class(
        anchor=class_anchor(position),
        data=one,
        features=tuple(_feature(one, f, max(weights, default=0.0)) for f in one.features),
        unlisted=max(one.nonzeros - len(one.features), 0),
        explained=tuple((anchor, image) for name, anchor, image in explained if name == one.name),
    )


def _readouts(data: SelectionData) -> tuple[tuple[str, str, Measure], ...]:
    """Return (label, role, measure) of every accuracy, nulls last; none where the read-out was not measured."""
    if not data.accuracy.defined:
        return ()
    rows = (
        ("linear read-out", "explainer", data.accuracy),
        ("the network itself", "performer", data.model_accuracy),
        ("null: shuffled", "null", data.shuffled),
        ("null: chance", "null", Measure(data.chance)),
    )
    return tuple(row for row in rows if row[2].defined or row[1] != "performer")


def _readout_figure(rows: Iterable[tuple[str, str, Measure]], *, of_predictions: bool) -> Figure | None:
    drawn = [
        figures.ScoreRow(label, role, m.value, m.low, m.high, notation.rate(m.value).replace(notation.GAP, " "))
        for label, role, m in rows
    ]
    title = "Held-out photos with the network's own answer" if of_predictions else "Held-out photos that are right"
    svg = figures.scores_chart(title, "higher is better", drawn) if drawn else ""
    return Figure(f"{title}: higher is better", svg) if svg else None


def _numbers(data: SelectionData) -> tuple[_Fact, ...]:
    def whole(value: int | None) -> str:
        return notation.UNDEFINED if value is None else f"{value:,}"

    return (
        _Fact(
            "Filters per class",
            f"features with a weight, mean over the classes, of {data.features:,} in {len(data.layers)} layers",
            notation.number(data.nonzeros_mean),
        ),
        _Fact(
            "Largest relative gap",
            "upper bound of what any class's solution could still gain; 0 is exactly solved",
            notation.number(data.relative_gap),
        ),
        _Fact(
            "Classes at the bound",
            f"whose weights reach μ = {notation.plain(data.config.get('mu'))}, of {len(data.classes):,}",
            whole(data.constraint_active),
        ),
        _Fact("Iterations", "of the solver", whole(data.iterations)),
    )


def _heat(data: SelectionData) -> tuple[tuple[str, ...], tuple[_HeatRow, ...]]:
    if len(data.classes) > TABLE_CLASSES:
        return (), ()
    shares = [class_shares(one) for one in data.classes]
    columns = tuple(layer for layer, _ in data.layers if any(layer in found for found in shares))
    rows = tuple(
        _HeatRow(class_anchor(i), one.name, tuple(100 * found[c] if c in found else None for c in columns))
        for i, (one, found) in enumerate(zip(data.classes, shares, strict=True))
    )
    return columns, rows if columns else ()


def _left_out(data: SelectionData) -> str:
    rest = len(data.at("table"))
    if not rest:
        return ""
    drawn = len(data.classes) - rest
    return (
        f"Pictures are shown for {drawn:,} of {len(data.classes):,} classes, so that the page stays small; "
        f"{notation.counted(rest, 'others')} stand in the table below, their pictures in the run's folder."
    )


def selection_view(data: SelectionData, explained: Iterable[tuple[str, str, str]] = ()) -> SelectionView:
    """Draw what the template needs.

    Args:
        data: the selection.
        explained: (class name, anchor, image) of the explanations on the same page.
    """
    explained = tuple(explained)
    classes = tuple(_class(position, one, explained) for position, one in enumerate(data.classes))
    columns, rows = _heat(data)
    title = "Share of a class's weight by layer"
    layers = layer_shares(data)
    svg = layers_chart(title, layers)
    readouts = _readouts(data)
    return SelectionView(
        data=data,
        verdicts=selection_words.selection_verdicts(data),
        readouts=readouts,
        readout_figure=_readout_figure(readouts, of_predictions=data.of_predictions),
        numbers=_numbers(data),
        layers_figure=Figure(f"{title}, mean over the classes", svg) if svg else None,
        layers_width=round(layers_width(len(layers))),
        heat_columns=columns,
        heat_rows=rows,
        classes=tuple(c for c in classes if c.data.place != "table"),
        rest=tuple(c for c in classes if c.data.place == "table"),
        has_pictures=any(c.has_pictures for c in data.classes),
        left_out=_left_out(data),
    )


# --- the chapter ------------------------------------------------------------------------------------------------------


def selection_title(data: SelectionData) -> str:
    """Return the title of a page that shows only this selection."""
    return f"What {notation.short_name(data.performer)} reads each class from"


def _facts(data: SelectionData) -> tuple[tuple[str, str], ...]:
    labels = {"data": "the data's labels", "predictions": "the network's own answers"}.get(
        str(data.config.get("labels")), ""
    )
    learned = notation.counted(data.photos, f"{notation.SPLITS.get(data.split, data.split)} photos".strip())
    facts = (
        ("Performer", data.performer),
        ("Layers", f"{len(data.layers)}, with {data.features:,} filters"),
        ("Data", data.data_name),
        ("Learned from", learned + (f", with {labels}" if labels else "")),
        ("Selected", notation.moment(data.created)),
        ("Duration", notation.duration(data.seconds) if math.isfinite(data.seconds) else ""),
    )
    return tuple((name, value) for name, value in facts if value)


def selection_chapter(data: SelectionData) -> Chapter:
    """Describe the chapter for the contents."""
    return Chapter(
        kind="selection",
        anchor="selection",
        title="What each class is read from",
        headline=selection_words.selection_headline(data),
        facts=_facts(data),
        sections=(
            ("selection-verdict", "Verdict"),
            ("readout", "Read-out"),
            ("layers", "Layers"),
            ("classes", "Classes"),
        ),
    )


def selection_origin(data: SelectionData) -> Origin:
    """Say how the selection is made again."""
    return Origin(
        title="The selection",
        command=data.command,
        hashes=(
            ("weights (SHA-256)", data.weights_sha256),
            ("data fingerprint", data.fingerprint),
            ("identity", data.identity),
        ),
        details=(
            ("Versions", pairs(data.versions)),
            ("Configuration", pairs(data.config)),
            ("Layers (filters)", [(name, f"{channels:,}") for name, channels in data.layers]),
            ("Preprocessing", pairs(data.preprocessing)),
        ),
    )


def selection_remarks(data: SelectionData) -> Remarks:
    """Return the selection's notes."""
    return Remarks("The selection", data.performer_notes, data.unreadable)
