"""What the page says of one explained image, as data: the folder of an explanation is read, and nothing here draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    number,
    numbers,
    text,
    texts,
)
from partlens.records import read_json

EXPLANATION_SCHEMA = "partlens.explanation/1"
EXPLAIN_AGAIN = "Run partlens explain again"


@dataclass(frozen=True)
class Answer:
    """One class among the performer's strongest answers."""

    name: str
    output: int | None
    probability: float


@dataclass(frozen=True)
class Contribution:
    """What one feature adds to a class's score.

    Attributes:
        layer: the layer's name.
        channel: the filter's position in the layer.
        weight: the feature's weight for the class.
        response: the image's response in the feature.
        contribution: weight times response.
        share: its part of all positive contributions to the class (0 to 1).
        overlay: where the feature acts, over the image.
        average: what the feature answers to in the training photos, or ``None``.
    """

    layer: str
    channel: int
    weight: float
    response: float
    contribution: float
    share: float
    overlay: Embedded | None
    average: Embedded | None


@dataclass(frozen=True)
class Explained:
    """One class that was explained in one image.

    Attributes:
        name: of the class.
        output: its position among the performer's outputs, or ``None``.
        probability: the performer's.
        rank: 1 for the predicted class.
        score: the linear read-out of the class.
        combined: all features together, over the image.
        heat: the same map alone.
        features: strongest first.
        lattice: lattice index without and with the stride fix (log10 of energy over surroundings), or ``None``.
        rank_correlation: with the map of the first class; ``nan`` for the first one.
    """

    name: str
    output: int | None
    probability: float
    rank: int
    score: float
    combined: Embedded | None
    heat: Embedded | None
    features: tuple[Contribution, ...]
    lattice: tuple[float, float] | None
    rank_correlation: float


@dataclass(frozen=True)
class PartShare:
    """What one part adds to the score of a class in one image.

    Attributes:
        name: of the part.
        filters: how many it has.
        share: of what all parts add (Shapley); ``nan`` where together they add nothing.
        share_of_score: of the score's rise over nothing.
        shapley: in units of the score.
        standard_error: of it; 0 where exact.
        integrated: by integrated gradients.
        integrated_share: the share by them.
        null: the same of as many filters drawn by lot.
        gradient_activation: by gradient × activation.
        removal: fall of the score without the part.
        heat: where the contribution comes from, over the image.
        top_filters: numbers of the filters that add or take most.
    """

    name: str
    filters: int
    share: float
    share_of_score: float
    shapley: float
    standard_error: float
    integrated: float
    integrated_share: float
    null: Measure
    gradient_activation: float
    removal: float
    heat: Embedded | None
    top_filters: tuple[int, ...]


@dataclass(frozen=True)
class ExplainedByParts:
    """One class whose score is shared among parts.

    Attributes:
        name: of the class.
        probability: the performer's.
        rank: 1 for the predicted class.
        performer_score: of the performer itself.
        fed_back: of the explainer's reconstruction.
        baseline: with both tracks silent.
        same_answer: whether the reconstruction keeps the performer's answer.
        interpretable: share of the rise that the parts add together.
        ordinary: Shapley value of the ordinary track.
        ordinary_share: its share of the rise.
        remainder: what the integrated gradients miss, in units of the score.
        method: how the Shapley values were made.
        parts: in the order of the file.
        headline: what each part adds.
    """

    name: str
    probability: float
    rank: int
    performer_score: float
    fed_back: float
    baseline: float
    same_answer: bool
    interpretable: float
    ordinary: float
    ordinary_share: float
    remainder: float
    method: str
    parts: tuple[PartShare, ...]
    headline: str


@dataclass(frozen=True)
class ExplanationData:
    """Everything that the page says of one image; drawing it needs nothing else.

    Attributes:
        folder: name of the explanation's folder.
        image: name of the image.
        path: where the image was read from.
        size_px: width and height of the image, or ``None``.
        method: how it was explained.
        performer: the performer's name.
        weights_sha256: hash of its weights.
        input: the image as the performer saw it.
        answers: the performer's strongest answers.
        explained: classes that were explained, the predicted one first.
        notes: remarks of the explanation.
        parts: classes whose score is shared among parts; empty where the run has no explainer.
    """

    folder: str
    image: str
    path: str
    size_px: tuple[int, int] | None
    method: Mapping[str, Any]
    performer: str
    weights_sha256: str
    input: Embedded | None
    answers: tuple[Answer, ...]
    explained: tuple[Explained, ...]
    notes: tuple[str, ...]
    parts: tuple[ExplainedByParts, ...] = ()


def _pair(value: Any) -> tuple[float, float] | None:
    ends = group(value)
    before, after = number(ends.get("before")), number(ends.get("after"))
    return (before, after) if math.isfinite(before) and math.isfinite(after) else None


def _contribution(row: Mapping[str, Any], folder: Path, pictures: Pictures, *, alone: bool) -> Contribution:
    name = row.get("average")
    if alone and isinstance(name, str):
        # The averages are the run's. Away from it they are shown where the path still leads to a run's pictures.
        home = (folder / name).resolve().parent
        if home.name == "pictures" and (home.parent / "selection.json").is_file():
            pictures.admit(home)
        else:
            name = None
    return Contribution(
        layer=text(row.get("layer")),
        channel=count(row.get("channel")),
        weight=number(row.get("weight")),
        response=number(row.get("response")),
        contribution=number(row.get("contribution")),
        share=number(row.get("share")),
        overlay=pictures.read(folder, row.get("overlay")),
        average=pictures.read(folder, name),
    )


def _explained(row: Mapping[str, Any], folder: Path, pictures: Pictures, *, alone: bool) -> Explained:
    return Explained(
        name=text(row.get("class")),
        output=index_of(row.get("output")),
        probability=number(row.get("probability")),
        rank=count(row.get("rank")),
        score=number(row.get("score")),
        combined=pictures.read(folder, row.get("combined")),
        heat=pictures.read(folder, row.get("heat")),
        features=tuple(_contribution(f, folder, pictures, alone=alone) for f in groups(row.get("features"))),
        lattice=_pair(row.get("lattice_index")),
        rank_correlation=number(row.get("rank_correlation_with_first")),
    )


def _by_parts(row: Mapping[str, Any], folder: Path, pictures: Pictures) -> ExplainedByParts:
    score, ordinary = group(row.get("score")), group(row.get("ordinary"))
    return ExplainedByParts(
        name=text(row.get("class")),
        probability=number(row.get("probability")),
        rank=count(row.get("rank")),
        performer_score=number(score.get("performer")),
        fed_back=number(score.get("fed_back")),
        baseline=number(score.get("baseline")),
        same_answer=score.get("same_answer") is True,
        interpretable=number(row.get("interpretable_share")),
        ordinary=number(ordinary.get("shapley")),
        ordinary_share=number(ordinary.get("share_of_score")),
        remainder=number(group(row.get("remainder")).get("integrated_gradients")),
        method=text(row.get("method")),
        parts=tuple(
            PartShare(
                name=text(part.get("name")),
                filters=count(part.get("n")),
                share=number(part.get("share")),
                share_of_score=number(part.get("share_of_score")),
                shapley=number(part.get("shapley")),
                standard_error=number(part.get("standard_error")),
                integrated=number(part.get("integrated_gradients")),
                integrated_share=number(part.get("integrated_share")),
                null=measure(part.get("integrated_null")),
                gradient_activation=number(part.get("gradient_activation")),
                removal=number(part.get("removal")),
                heat=pictures.read(folder, part.get("heat")),
                top_filters=tuple(count(f.get("filter")) for f in groups(part.get("top_filters"))),
            )
            for part in groups(row.get("parts"))
        ),
        headline=text(row.get("headline")),
    )


def _content(folder: Path) -> Mapping[str, Any]:
    path = folder / "explanation.json"
    if not path.exists():
        rule = f"a file explanation.json in {folder}"
        raise RunError(expected(rule, "none there", "Give a folder that partlens explain wrote"))
    content = read_json(path)
    if content.get("schema") != EXPLANATION_SCHEMA:
        rule = f'schema "{EXPLANATION_SCHEMA}" in {path}'
        raise RunError(expected(rule, content.get("schema"), "Use the partlens version that wrote it"))
    for what, found in (
        ("the image's name", group(content.get("image")).get("name")),
        ("the performer's name", group(content.get("performer")).get("name")),
        ("the input picture's name", content.get("input")),
    ):
        if not isinstance(found, str) or not found:
            raise RunError(expected(f"{what} in {path}", found, EXPLAIN_AGAIN))
    if not items(content.get("explained")) and not items(content.get("parts")):
        raise RunError(expected(f"at least one explained class in {path}", "none", EXPLAIN_AGAIN))
    return content


def read_explanation(folder: Path, pictures: Pictures, *, alone: bool = False) -> ExplanationData:
    """Read the folder of one explained image.

    Args:
        folder: holds ``explanation.json`` and its pictures.
        pictures: reads the pictures.
        alone: whether the folder stands outside a run, so that averages may be out of reach.

    Raises:
        RunError: ``explanation.json`` is missing, damaged or of another version, or a picture is missing or damaged.
    """
    content = _content(folder)
    image, performer = group(content.get("image")), group(content.get("performer"))
    size = numbers(image.get("size_px"), 2)
    return ExplanationData(
        folder=folder.name,
        image=text(image.get("name")),
        path=text(image.get("path")),
        size_px=(int(size[0]), int(size[1])) if size else None,
        method=group(content.get("method")),
        performer=text(performer.get("name")),
        weights_sha256=text(performer.get("weights_sha256")),
        input=pictures.read(folder, content.get("input")),
        answers=tuple(
            Answer(text(row.get("name")), index_of(row.get("output")), number(row.get("probability")))
            for row in groups(group(content.get("prediction")).get("classes"))
        ),
        explained=tuple(_explained(row, folder, pictures, alone=alone) for row in groups(content.get("explained"))),
        notes=texts(content.get("notes")),
        parts=tuple(_by_parts(row, folder, pictures) for row in groups(content.get("parts"))),
    )


@dataclass(frozen=True)
class Explanations:
    """The explained images of a run.

    Attributes:
        shown: those on the page, by folder name.
        left_out: folders for whose pictures the page has no room.
        incomplete: folders without ``explanation.json``.
    """

    shown: tuple[ExplanationData, ...] = ()
    left_out: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()


def collect_explanations(run: Path, pictures: Pictures, limit_bytes: int) -> Explanations:
    """Read every explained image of a run, in the order of their folders' names.

    Args:
        run: the folder of a run.
        pictures: reads the pictures and counts them.
        limit_bytes: from the first image on whose pictures would go beyond this, images are left out; the first
            image of all is always shown.

    Raises:
        RunError: an explanation is damaged.
    """
    folder = run / "explanations"
    found = sorted(_visible(folder.iterdir())) if folder.is_dir() else []
    whole = [path for path in found if (path / "explanation.json").exists()]
    shown: list[ExplanationData] = []
    for path in whole:
        before = pictures.spent_bytes
        one = read_explanation(path, pictures)
        if shown and pictures.spent_bytes > limit_bytes:
            pictures.spent_bytes = before
            break
        shown.append(one)
    return Explanations(
        tuple(shown),
        tuple(path.name for path in whole[len(shown) :]),
        tuple(path.name for path in found if path not in whole),
    )


def _visible(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if path.is_dir() and not path.name.startswith(".")]
