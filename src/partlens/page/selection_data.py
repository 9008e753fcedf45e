"""What the page says of a selection, as data: which features each class is read from. Nothing here draws.

A selection's run holds ``selection.json`` and, where they were made, ``pictures/``. Absent and undefined numbers are
``nan``. A picture that the file names has to be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from partlens.errors import RunError, expected
from partlens.page.reading import (
    Embedded,
    Measure,
    Pictures,
    count,
    group,
    groups,
    index_of,
    items,
    measure,
    named_reasons,
    number,
    numbers,
    text,
    texts,
)
from partlens.records import read_json

SELECTION_SCHEMA = "partlens.selection/1"
SELECT_AGAIN = "Run partlens select-features again"

OPEN_CLASSES = 12
"""So many classes are shown open."""

DRAWN_CLASSES = 60
"""So many classes are shown with pictures; the others stand in a table."""

Place = Literal["open", "folded", "table"]


@dataclass(frozen=True)
class Sharpness:
    """How much structure an average picture has, beside that of the average of random crops; ``nan`` if undefined."""

    value: float
    control: float


@dataclass(frozen=True)
class RelevantFeature:
    """One feature that a class is read from: a filter of a layer.

    Attributes:
        feature: its position among all features.
        layer: the layer's name.
        channel: its position in the layer.
        weight: its entry in the class's solution.
        share: its part of the class's total weight (0 to 1).
        field_px: height and width of what one cell sees, or ``None`` for the whole image.
        strongest: names of the photos with the strongest answers.
        average: average of the crops around its strongest answers.
        control: average of as many random crops of the same photos.
        crops: the strongest crops side by side.
        sharpness: of the average and its control, or ``None``.
    """

    feature: int
    layer: str
    channel: int
    weight: float
    share: float
    field_px: tuple[int, int] | None
    strongest: tuple[str, ...]
    average: Embedded | None
    control: Embedded | None
    crops: Embedded | None
    sharpness: Sharpness | None


@dataclass(frozen=True)
class ClassRead:
    """One class and what it is read from.

    Attributes:
        name: of the class.
        output: its position among the performer's outputs, or ``None``.
        photos: photos of it that were learned from.
        norm: sum of absolute weights.
        objective: the squared error that is left.
        relative_gap: upper bound of what is left to gain, as a share of the objective.
        nonzeros: how many features have a weight.
        features: those that were recorded, in the file's order.
        place: whether the page shows it open, folded, or in the table only.
    """

    name: str
    output: int | None
    photos: int
    norm: float
    objective: float
    relative_gap: float
    nonzeros: int
    features: tuple[RelevantFeature, ...]
    place: Place

    @property
    def has_pictures(self) -> bool:
        """Whether any feature has a picture."""
        return any(f.average or f.control or f.crops for f in self.features)


@dataclass(frozen=True)
class SelectionData:
    """Everything that the page says of a selection; drawing it needs nothing else.

    Attributes:
        identity: hash of the selection's configuration.
        performer: the performer's name as it was given.
        weights_sha256: hash of its weights.
        preprocessing: how a photo becomes the performer's input.
        performer_notes: what the performer's reader remarked.
        data_name: name of the data set.
        fingerprint: hash of the data set's content.
        split: the split that was learned from.
        photos: photos learned from.
        unreadable: name and reason of each photo that could not be read.
        created: when the run was started (ISO 8601).
        command: the command line.
        versions: of partlens and what it stands on.
        config: every field of the configuration.
        status: ``finished`` or what else was recorded.
        seconds: duration; ``nan`` where unknown.
        layers: name and number of filters of each measured layer, in the network's order.
        relative_gap: largest over the classes.
        nonzeros_mean: features with a weight, mean over the classes.
        constraint_active: classes whose weights reach the bound.
        iterations: of the solver.
        accuracy: of the linear read-out on held-out photos.
        shuffled: the same, fitted to shuffled labels.
        chance: accuracy of guessing.
        model_accuracy: of the performer itself on the same photos.
        classes: in the order of the page, explained ones first.
    """

    identity: str
    performer: str
    weights_sha256: str
    preprocessing: Mapping[str, Any]
    performer_notes: tuple[str, ...]
    data_name: str
    fingerprint: str
    split: str
    photos: int
    unreadable: tuple[tuple[str, str], ...]
    created: str
    command: str
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    status: str
    seconds: float
    layers: tuple[tuple[str, int], ...]
    relative_gap: float
    nonzeros_mean: float
    constraint_active: int | None
    iterations: int | None
    accuracy: Measure
    shuffled: Measure
    chance: float
    model_accuracy: Measure
    classes: tuple[ClassRead, ...]

    @property
    def features(self) -> int:
        """How many features there are in all layers together."""
        return sum(channels for _, channels in self.layers)

    @property
    def of_predictions(self) -> bool:
        """Whether the classes are the performer's own answers instead of the data's labels."""
        return self.config.get("labels") == "predictions"

    def at(self, place: Place) -> tuple[ClassRead, ...]:
        """Return the classes that the page shows in one place."""
        return tuple(c for c in self.classes if c.place == place)


def _layers(path: Path, content: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    index = group(content.get("index"))
    names, channels = texts(index.get("layers")), [count(c) for c in items(index.get("channels"))]
    if not names or len(names) != len(channels):
        got = f"{len(names)} layers and {len(channels)} counts"
        raise RunError(expected(f"one number of filters per layer in {path}", got, SELECT_AGAIN))
    if sum(channels) != count(content.get("features")):
        rule = f"{sum(channels)} features in {path}, as its layers have together"
        raise RunError(expected(rule, content.get("features"), SELECT_AGAIN))
    return tuple(zip(names, channels, strict=True))


def _feature(row: Mapping[str, Any], read: Pictures | None) -> RelevantFeature:
    field = numbers(row.get("receptive_field_px"), 2)
    sharp = row.get("sharpness")
    average, control, crops = (
        read.read(read.root, row.get(name)) if read else None for name in ("average", "control", "crops")
    )
    return RelevantFeature(
        feature=count(row.get("feature")),
        layer=text(row.get("layer")),
        channel=count(row.get("channel")),
        weight=number(row.get("weight")),
        share=number(row.get("share")),
        field_px=(int(field[0]), int(field[1])) if field else None,
        strongest=texts(row.get("strongest")),
        average=average,
        control=control,
        crops=crops,
        sharpness=Sharpness(number(sharp.get("value")), number(sharp.get("control")))
        if isinstance(sharp, Mapping)
        else None,
    )


def _class(row: Mapping[str, Any], place: Place, pictures: Pictures) -> ClassRead:
    read = None if place == "table" else pictures
    return ClassRead(
        name=text(row.get("name")),
        output=index_of(row.get("output")),
        photos=count(row.get("photos")),
        norm=number(row.get("norm")),
        objective=number(row.get("objective")),
        relative_gap=number(row.get("relative_gap")),
        nonzeros=count(row.get("nonzeros")),
        features=tuple(_feature(feature, read) for feature in groups(row.get("features"))),
        place=place,
    )


def _classes(rows: Sequence[Mapping[str, Any]], pictures: Pictures, first: Iterable[str]) -> tuple[ClassRead, ...]:
    """Read the classes, explained ones first; from the first whose pictures find no room on, all go to the table."""
    order = {name: position for position, name in reversed(list(enumerate(first)))}
    ordered = sorted(rows, key=lambda row: order.get(text(row.get("name")), len(order)))
    made: list[ClassRead] = []
    for position, row in enumerate(ordered):
        place: Place = "open" if position < OPEN_CLASSES else "folded"
        named = [f.get(name) for f in groups(row.get("features")) for name in ("average", "control", "crops")]
        full = bool(made) and made[-1].place == "table"
        if full or position >= DRAWN_CLASSES or not pictures.fit(pictures.root, named):
            place = "table"
        made.append(_class(row, place, pictures))
    return tuple(made)


def is_begun(content: Mapping[str, Any]) -> bool:
    """Tell whether a selection was begun and holds no result yet, so that its command has to be run again."""
    return (
        content.get("schema") == SELECTION_SCHEMA and content.get("status") != "finished" and "classes" not in content
    )


def collect_selection(run: Path, pictures: Pictures, first: Iterable[str] = ()) -> SelectionData | None:
    """Read what the page says of a selection.

    Args:
        run: the folder of a run.
        pictures: reads the pictures and knows how many have room.
        first: names of classes to show first.

    Returns:
        The content, or ``None`` where the folder has no ``selection.json`` or one that has no result yet.

    Raises:
        RunError: ``selection.json`` is damaged, incomplete, or of another kind or version; a picture is missing or
            damaged.
    """
    path = run / "selection.json"
    if not path.exists():
        return None
    content = read_json(path)
    if is_begun(content):
        return None
    for key, wanted, remedy in (
        ("schema", SELECTION_SCHEMA, "Use the partlens version that wrote the run"),
        ("kind", "selection", SELECT_AGAIN),
    ):
        if content.get(key) != wanted:
            raise RunError(expected(f'{key} "{wanted}" in {path}', content.get(key), remedy))
    performer, data, solution = (group(content.get(key)) for key in ("performer", "data", "solution"))
    name = performer.get("name")
    if not isinstance(name, str) or not name:
        raise RunError(expected(f"the performer's name in {path}", name, SELECT_AGAIN))
    layers, rows = _layers(path, content), groups(content.get("classes"))
    if not rows:
        raise RunError(expected(f"at least one class in {path}", "none", SELECT_AGAIN))
    known = {layer for layer, _ in layers}
    stray = next((f.get("layer") for r in rows for f in groups(r.get("features")) if f.get("layer") not in known), None)
    if stray is not None:
        raise RunError(expected(f"features of the indexed layers in {path}", text(stray), SELECT_AGAIN))
    readout = group(content.get("readout"))
    return SelectionData(
        identity=text(content.get("identity")),
        performer=name,
        weights_sha256=text(performer.get("weights_sha256")),
        preprocessing=group(performer.get("preprocessing")),
        performer_notes=texts(performer.get("notes")),
        data_name=text(data.get("name")),
        fingerprint=text(data.get("fingerprint")),
        split=text(data.get("split")),
        photos=count(data.get("photos")),
        unreadable=named_reasons(data.get("unreadable")),
        created=text(content.get("created")),
        command=text(content.get("command")),
        versions={text(k): text(v) for k, v in group(content.get("versions")).items()},
        config=group(content.get("config")),
        status=text(content.get("status")),
        seconds=number(content.get("seconds")),
        layers=layers,
        relative_gap=number(solution.get("relative_gap")),
        nonzeros_mean=number(solution.get("nonzeros_mean")),
        constraint_active=index_of(solution.get("constraint_active")),
        iterations=index_of(solution.get("iterations")),
        accuracy=measure(readout.get("accuracy")),
        shuffled=measure(readout.get("shuffled")),
        chance=number(readout.get("chance")),
        model_accuracy=measure(readout.get("model_accuracy")),
        classes=_classes(rows, pictures, first),
    )
