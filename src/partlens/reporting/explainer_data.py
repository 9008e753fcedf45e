"""What the page says of an explainer, as data: its files are read once into frozen values, and nothing here draws.

An explainer's run holds ``run.json`` (needed) and, as far as they were made, ``history.json``, ``evaluation.json`` and
``gallery/gallery.json``. What is missing stays visible as missing: an absent file gives ``None`` or an empty tuple, an
absent or undefined number gives ``nan``, and the page says "not measured" in its place.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from partlens.reporting.reading import (
    Measure,
    count,
    group,
    groups,
    items,
    measure,
    named_reasons,
    number,
    numbers,
    text,
    texts,
)
from partlens.store import SCHEMA, read_json
from partlens.vocabulary import RunError, expected

EVALUATION_SCHEMA = "partlens.evaluation/1"

SCORES = (
    "instability",
    "instability_all",
    "consistency",
    "peak_spread_cells",
    "border_frac",
    "dead_frac",
    "silent_frac",
    "filter_correlation",
    "distinct_parts",
)
"""Scores of one subject, in the order of the page; consistency stands beside instability."""
SINCE = ("instability_all", "silent_frac")
"""Scores that evaluations of earlier versions lack; their row stands where it has a value."""

ATTENTION_LAYERS = ("interpretable", "tap", "top")
"""Whose Grad-CAM stands on the page: the explainer's part filters, the performer's tap and its top layer."""

_PICTURE_KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}


@dataclass(frozen=True)
class Subject:
    """One thing that was scored: the explainer, a layer of the performer, or a null.

    Attributes:
        key: ``explainer``, ``tap``, ``top``, ``random``, ``centre`` or ``corner``.
        label: how the page calls it.
        role: ``explainer``, ``performer`` or ``null``.
        scores: by the names in :data:`SCORES`; each one is there, perhaps undefined.
        landmark_shares: share of its filters that follow each landmark best (0 to 1).
    """

    key: str
    label: str
    role: str
    scores: Mapping[str, Measure]
    landmark_shares: Mapping[str, float]


@dataclass(frozen=True)
class FilterScore:
    """One filter's own scores; ``nan`` where undefined."""

    filter: int
    instability: float
    consistency: float
    landmark: str
    spread_cells: float
    dead: bool


@dataclass(frozen=True)
class Fidelity:
    """How much of the performer is left when the reconstruction is fed back to it."""

    agreement_top1: Measure = field(default_factory=Measure)
    error_increase_points: Measure = field(default_factory=Measure)
    performer_error_percent: Measure = field(default_factory=Measure)
    explainer_error_percent: Measure = field(default_factory=Measure)
    relative_error: Mapping[str, Measure] = field(default_factory=dict)
    by_performer: bool = False
    p_optimum: Measure = field(default_factory=Measure)
    p_rescaling_error: float = math.nan


@dataclass(frozen=True)
class CategoryScore:
    """Filters of one category of an explainer of several, measured on its photos."""

    name: str
    filters: int
    instability: Measure
    centre: Measure
    consistency: Measure
    performer: Measure


@dataclass(frozen=True)
class Evaluation:
    """What was measured on one split of the photos.

    ``beyond_nulls`` is the explainer's instability minus that of each null on the same photos. ``read_alike`` holds
    layers whose peaks were read in one way, which their ``role`` names; empty where all are read by largest cells.
    """

    split: str
    photos: int
    landmarks: Mapping[str, int]
    subjects: tuple[Subject, ...]
    p: Measure
    fidelity: Fidelity
    explainer_filters: tuple[FilterScore, ...]
    performer_filters: tuple[FilterScore, ...]
    warnings: tuple[str, ...]
    by_category: tuple[CategoryScore, ...] = ()
    read_alike: tuple[Subject, ...] = ()
    beyond_nulls: Mapping[str, Measure] = field(default_factory=dict)

    def subject(self, key: str) -> Subject:
        """Return the subject called ``key``."""
        return next(s for s in self.subjects if s.key == key)


@dataclass(frozen=True)
class Picture:
    """A gallery photo with the place where a filter peaks, in pixels of ``size_px`` (x to the right, y down).

    Attributes:
        key: the photo's name in the data set.
        score: the filter's peak value.
        peak_px: x, y of the peak cell's centre, or ``None``.
        box_px: left, top, right, bottom of the filter's region; ``None`` where there is none, or where the picture
            itself shows what the filter reads.
        size_px: width and height that the coordinates refer to.
        uri: the picture as a ``data:`` address; ``None`` where the file is missing or is no picture.
        map_uri: the same photo with the filter's feature map over it.
    """

    key: str
    score: float
    peak_px: tuple[float, float] | None
    box_px: tuple[float, float, float, float] | None
    size_px: tuple[float, float]
    uri: str | None
    map_uri: str | None = None


@dataclass(frozen=True)
class GalleryFilter:
    """One filter with the photos that it answers to most; ``reads_px`` is the side of what it reads."""

    filter: int
    instability: float
    consistency: float
    landmark: str
    pictures: tuple[Picture, ...]
    reads_px: float = math.nan


@dataclass(frozen=True)
class Reading:
    """How it was found out what filters read, and how much that is.

    Attributes:
        occluder_px: side of the square that covered pieces of photos.
        stride_px: step between its places.
        places: number of places on a photo.
        photos: photos that were covered.
        photos_per_filter: of these, how many each filter used.
        median_px: side of what the shown filters read, by ``explainer`` and ``performer``.
        theoretical_px: side of what they could read, likewise.
        covered: photos were covered; else the fields are the round ones in theory, and nothing but their side is known.
    """

    occluder_px: int
    stride_px: int
    places: int
    photos: int
    photos_per_filter: int
    median_px: Mapping[str, Measure]
    theoretical_px: Mapping[str, tuple[float, float]]
    covered: bool


@dataclass(frozen=True)
class AttentionPhoto:
    """A photo with Grad-CAM maps laid over it.

    Attributes:
        key: the photo's name in the data set.
        label: the class that the performer gives it, and that the maps explain.
        uri: the photo as a ``data:`` address; ``None`` where it is missing.
        maps: by ``interpretable``, ``tap`` and ``top``, the pictures likewise.
    """

    key: str
    label: str
    uri: str | None
    maps: Mapping[str, str | None]


@dataclass(frozen=True)
class Attention:
    """Grad-CAM of the explainer's part filters and of the performer's layers.

    Attributes:
        layers: names by ``interpretable``, ``tap`` and ``top``.
        photos: shown.
        size_px: width and height of the network's input.
        concentration: smallest share of the photo that holds half of a map, mean over photos, likewise.
        random: the same of random maps on each layer's grid.
        empty: photos whose map is all zeros and that the share leaves out.
    """

    layers: Mapping[str, str]
    photos: tuple[AttentionPhoto, ...]
    size_px: tuple[float, float]
    concentration: Mapping[str, Measure]
    random: Mapping[str, Measure]
    empty: Mapping[str, int]


@dataclass(frozen=True)
class Gallery:
    """Chosen filters of the explainer and of the performer's tap; runs of earlier versions have no more than these."""

    explainer: tuple[GalleryFilter, ...]
    performer: tuple[GalleryFilter, ...]
    reading: Reading | None = None
    attention: Attention | None = None

    @property
    def uris(self) -> tuple[str, ...]:
        """Every picture's address."""
        pictures = [picture for one in (*self.explainer, *self.performer) for picture in one.pictures]
        found = [uri for picture in pictures for uri in (picture.uri, picture.map_uri)]
        for photo in self.attention.photos if self.attention else ():
            found += [photo.uri, *photo.maps.values()]
        return tuple(uri for uri in found if uri)


@dataclass(frozen=True)
class Epoch:
    """One epoch of training: its number, its phase and what was logged (``nan`` never, absent instead)."""

    number: int
    phase: str
    logged: Mapping[str, float]


@dataclass(frozen=True)
class ExplainerData:
    """Everything that the page says of an explainer; drawing it needs nothing else.

    Attributes:
        performer: the performer's name as it was given.
        weights_sha256: hash of its weights.
        preprocessing: how a photo becomes the performer's input.
        performer_notes: what the performer's reader remarked.
        tap: the explained layer.
        top_layer: the performer's last convolution, or an empty string where it was not measured.
        structure: the explainer's structure as recorded.
        receptive_field: stride, size and start (rows, cols) in pixels.
        data_name: name of the data set.
        fingerprint: hash of the data set's content.
        category: the category that was explained, or several with commas; may be empty.
        train_photos: photos of the category learned from.
        background_photos: other photos learned from.
        unreadable: name and reason of each photo that could not be read.
        created: when the run was started (ISO 8601).
        command: the command line.
        versions: of partlens and what it stands on.
        preset: name of the configuration's preset.
        config: every field of the configuration.
        status: ``finished`` or what else the run recorded.
        seconds: duration of the fit; ``nan`` where unknown.
        history: epochs in order.
        evaluation: measurements, or ``None`` where ``evaluation.json`` is absent.
        gallery: pictures, or ``None`` where ``gallery/gallery.json`` is absent.
    """

    performer: str
    weights_sha256: str
    preprocessing: Mapping[str, Any]
    performer_notes: tuple[str, ...]
    tap: str
    top_layer: str
    structure: Mapping[str, Any]
    receptive_field: Mapping[str, Any]
    data_name: str
    fingerprint: str
    category: str
    train_photos: int
    background_photos: int
    unreadable: tuple[tuple[str, str], ...]
    created: str
    command: str
    versions: Mapping[str, str]
    preset: str
    config: Mapping[str, Any]
    status: str
    seconds: float
    history: tuple[Epoch, ...]
    evaluation: Evaluation | None
    gallery: Gallery | None


# --- the parts of a run -----------------------------------------------------------------------------------------------


def _subject(key: str, label: str, role: str, value: Any) -> Subject:
    scores = group(value)
    shares = {text(k): number(v) for k, v in group(scores.get("landmark_shares")).items()}
    return Subject(key, label, role, {name: measure(scores.get(name)) for name in SCORES}, shares)


def _read_alike(content: Mapping[str, Any], tap: str, top_layer: str) -> tuple[Subject, ...]:
    """Read what compares an explainer whose parts stand at centroids with layers read by their largest cells."""
    same = group(content.get("same_peak"))
    if not same:
        return ()
    largest, centroid, performer = (group(v) for v in (same.get("largest"), same.get("centroid"), content["performer"]))
    return (
        _subject("explainer", "explainer", "centroid", content.get("explainer")),
        _subject("tap", f"performer, {tap}", "centroid", centroid.get("tap")),
        _subject("top", f"performer, {top_layer or 'top layer'}", "centroid", centroid.get("top")),
        _subject("explainer", "explainer", "largest cell", largest.get("explainer")),
        _subject("tap", f"performer, {tap}", "largest cell", performer.get("tap")),
        _subject("top", f"performer, {top_layer or 'top layer'}", "largest cell", performer.get("top")),
    )


def _by_category(content: Mapping[str, Any]) -> tuple[CategoryScore, ...]:
    """Read the scores per category of an explainer of several."""

    def of(*path: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = content
        for name in path:
            found = group(found.get(name))
        return found

    centre, performer = of("nulls", "centre", "by_category"), of("performer", "tap", "by_category")
    return tuple(
        CategoryScore(
            text(name),
            count(group(scores).get("filters")),
            measure(group(scores).get("instability")),
            measure(group(centre.get(name)).get("instability")),
            measure(group(scores).get("consistency")),
            measure(group(performer.get(name)).get("instability")),
        )
        for name, scores in of("explainer", "by_category").items()
    )


def _filter_scores(value: Any) -> tuple[FilterScore, ...]:
    return tuple(
        FilterScore(
            filter=count(row.get("filter")),
            instability=number(row.get("instability")),
            consistency=number(row.get("consistency")),
            landmark=text(row.get("landmark")),
            spread_cells=number(row.get("spread_cells")),
            dead=row.get("dead") is True,
        )
        for row in groups(value)
    )


def _evaluation(path: Path, tap: str) -> tuple[Evaluation | None, str]:
    """Read ``evaluation.json``; also return the name of the performer's top layer."""
    if not path.exists():
        return None, ""
    content = read_json(path)
    if content.get("schema") != EVALUATION_SCHEMA:
        raise RunError(
            expected(f'schema "{EVALUATION_SCHEMA}" in {path}', content.get("schema"), "Run partlens evaluate again")
        )
    performer, nulls = group(content.get("performer")), group(content.get("nulls"))
    top_layer = text(performer.get("top_layer"))
    fed_back, filters = group(content.get("reconstruction")), group(content.get("filters"))
    evaluation = Evaluation(
        split=text(content.get("split")),
        photos=count(content.get("photos")),
        landmarks={text(k): count(v) for k, v in group(content.get("landmarks")).items()},
        subjects=(
            _subject("explainer", "explainer", "explainer", content.get("explainer")),
            _subject("tap", f"performer, {tap}", "performer", performer.get("tap")),
            _subject("top", f"performer, {top_layer or 'top layer'}", "performer", performer.get("top")),
            _subject("random", "null: random cell", "null", nulls.get("random")),
            _subject("centre", "null: centre", "null", nulls.get("centre")),
            _subject("corner", "null: corner", "null", nulls.get("corner")),
        ),
        p=measure(content.get("p")),
        fidelity=Fidelity(
            agreement_top1=measure(fed_back.get("agreement_top1")),
            error_increase_points=measure(fed_back.get("error_increase_points")),
            performer_error_percent=measure(fed_back.get("performer_error_percent")),
            explainer_error_percent=measure(fed_back.get("explainer_error_percent")),
            relative_error={text(k): measure(v) for k, v in group(fed_back.get("relative_error")).items()},
            by_performer=fed_back.get("errors_by") == "performer",
            p_optimum=measure(content.get("p_optimum")),
            p_rescaling_error=number(content.get("p_rescaling_error")),
        ),
        explainer_filters=_filter_scores(filters.get("explainer")),
        performer_filters=_filter_scores(filters.get("performer")),
        warnings=texts(content.get("warnings")),
        by_category=_by_category(content),
        read_alike=_read_alike(content, tap, top_layer),
        beyond_nulls={
            text(kind): measure(value) for kind, value in group(content.get("instability_minus_null")).items()
        },
    )
    return evaluation, top_layer


def _data_uri(run: Path, name: str) -> str | None:
    """Return a picture as a ``data:`` address; ``None`` when it is missing, outside the run or no picture."""
    path = (run / name).resolve()
    if not name or not path.is_relative_to(run.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    kind = next((kind for magic, kind in _PICTURE_KINDS.items() if content.startswith(magic)), None)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if kind else None


def _picture(run: Path, value: Any) -> Picture:
    photo = group(value)
    peak, box, size = (numbers(photo.get(k), n) for k, n in (("peak_px", 2), ("box_px", 4), ("size_px", 2)))
    usable = size is not None and min(size) > 0
    region = _data_uri(run, text(photo.get("region_file")))
    return Picture(
        key=text(photo.get("key")),
        score=number(photo.get("score")),
        peak_px=(peak[0], peak[1]) if peak and usable else None,
        box_px=(box[0], box[1], box[2], box[3]) if box and usable and region is None else None,
        size_px=(size[0], size[1]) if size and usable else (1.0, 1.0),
        uri=region or _data_uri(run, text(photo.get("file"))),
        map_uri=_data_uri(run, text(photo.get("map_file"))),
    )


def _gallery_filters(run: Path, value: Any) -> tuple[GalleryFilter, ...]:
    return tuple(
        GalleryFilter(
            filter=count(row.get("filter")),
            instability=number(row.get("instability")),
            consistency=number(row.get("consistency")),
            landmark=text(row.get("landmark")),
            pictures=tuple(_picture(run, photo) for photo in items(row.get("photos"))),
            reads_px=number(row.get("reads_px")),
        )
        for row in groups(value)
    )


def _measures(value: Any) -> dict[str, Measure]:
    return {text(k): measure(v) for k, v in group(value).items()}


def _reading(value: Any, *, covered: bool) -> Reading | None:
    found = group(value)
    if not found:
        return None
    sides = {text(k): numbers(v, 2) for k, v in group(found.get("theoretical_px")).items()}
    return Reading(
        occluder_px=count(found.get("occluder_px")),
        stride_px=count(found.get("stride_px")),
        places=count(found.get("places")),
        photos=count(found.get("photos")),
        photos_per_filter=count(found.get("photos_per_filter")),
        median_px=_measures(found.get("reads_px")),
        theoretical_px={name: (side[0], side[1]) for name, side in sides.items() if side},
        covered=covered,
    )


def _attention(run: Path, value: Any) -> Attention | None:
    found = group(value)
    layers = {name: text(group(found.get("layers")).get(name)) for name in ATTENTION_LAYERS}
    size = numbers(found.get("size_px"), 2)
    photos = tuple(
        AttentionPhoto(
            key=text(photo.get("key")),
            label=text(photo.get("class")) + (" (answer: no)" if photo.get("denied") is True else ""),
            uri=_data_uri(run, text(photo.get("file"))),
            maps={name: _data_uri(run, text(group(photo.get("maps")).get(name))) for name in ATTENTION_LAYERS},
        )
        for photo in groups(found.get("photos"))
    )
    if not photos:
        return None
    shares = group(found.get("concentration_frac"))
    return Attention(
        layers=layers,
        photos=photos,
        size_px=(size[0], size[1]) if size and min(size) > 0 else (1.0, 1.0),
        concentration=_measures(shares),
        random=_measures(found.get("random_frac")),
        empty={text(k): count(group(v).get("empty")) for k, v in shares.items()},
    )


def _gallery(run: Path) -> Gallery | None:
    path = run / "gallery" / "gallery.json"
    if not path.exists():
        return None
    content = read_json(path)
    layers = group(content.get("layers"))
    gallery = Gallery(
        _gallery_filters(run, layers.get("explainer")),
        _gallery_filters(run, layers.get("performer")),
        _reading(content.get("occlusion"), covered=True) or _reading(content.get("analytic"), covered=False),
        _attention(run, content.get("attention")),
    )
    return gallery if gallery.explainer or gallery.performer or gallery.attention else None


def _history(path: Path) -> tuple[Epoch, ...]:
    if not path.exists():
        return ()
    epochs = []
    for position, row in enumerate(groups(read_json(path).get("epochs")), start=1):
        logged = {str(k): number(v) for k, v in row.items() if k not in {"epoch", "phase"}}
        finite = {k: v for k, v in logged.items() if math.isfinite(v)}
        epochs.append(Epoch(count(row.get("epoch")) or position, text(row.get("phase")), finite))
    return tuple(epochs)


def collect_explainer(run: Path) -> ExplainerData | None:
    """Read what the page says of an explainer.

    Args:
        run: the folder of a run.

    Returns:
        The content, or ``None`` where the folder has no ``run.json``. Files that are optional and absent leave
        ``evaluation`` or ``gallery`` at ``None`` and ``history`` empty; absent and undefined numbers are ``nan``.

    Raises:
        RunError: ``run.json`` is of another kind or version, or a file of the run is damaged.
    """
    manifest_path = run / "run.json"
    if not manifest_path.exists():
        return None
    manifest = read_json(manifest_path)
    for key, wanted, remedy in (
        ("schema", SCHEMA, "Use the partlens version that wrote the run"),
        ("kind", "explainer", "Give the folder that partlens fit-explainer wrote"),
    ):
        if manifest.get(key) != wanted:
            raise RunError(expected(f'{key} "{wanted}" in {manifest_path}', manifest.get(key), remedy))
    performer, data, structure = (group(manifest.get(k)) for k in ("performer", "data", "structure"))
    for rule, value in (("performer's name", performer.get("name")), ("explained layer (tap)", structure.get("tap"))):
        if not isinstance(value, str) or not value:
            raise RunError(expected(f"the {rule} in {manifest_path}", value, "Run partlens fit-explainer again"))
    tap = text(structure.get("tap"))
    evaluation, top_layer = _evaluation(run / "evaluation.json", tap)
    return ExplainerData(
        performer=text(performer.get("name")),
        weights_sha256=text(performer.get("weights_sha256")),
        preprocessing=group(performer.get("preprocessing")),
        performer_notes=texts(performer.get("notes")),
        tap=tap,
        top_layer=top_layer,
        structure=structure,
        receptive_field=group(manifest.get("receptive_field")),
        data_name=text(data.get("name")),
        fingerprint=text(data.get("fingerprint")),
        category=text(data.get("category")) or ", ".join(texts(data.get("categories"))),
        train_photos=count(data.get("train_photos")),
        background_photos=count(data.get("background_photos")),
        unreadable=named_reasons(data.get("unreadable")),
        created=text(manifest.get("created")),
        command=text(manifest.get("command")),
        versions={text(k): text(v) for k, v in group(manifest.get("versions")).items()},
        preset=text(manifest.get("preset")),
        config=group(manifest.get("config")),
        status=text(manifest.get("status")),
        seconds=number(manifest.get("seconds")),
        history=_history(run / "history.json"),
        evaluation=evaluation,
        gallery=_gallery(run),
    )
