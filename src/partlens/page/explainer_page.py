"""What the page draws of an explainer: rows, figures and words, ready for its template."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest

from partlens.page import figures, notation, wording
from partlens.page.environment import count_of, pairs
from partlens.page.evaluation_data import SCORES, SINCE, Evaluation, Subject
from partlens.page.explainer_data import ExplainerData
from partlens.page.gallery_data import GalleryFilter
from partlens.page.reading import Measure
from partlens.page.views import Chapter, Figure, Origin, Remarks

CURVES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Reconstruction loss", (("reconstruction", "reconstruction"),)),
    ("Relative error of the reconstruction", (("relative_error", "relative error"),)),
    ("p, the share of part filters", (("p", "p"),)),
    ("Filter loss, nats per filter", (("filter_1", "conv-interp-1"), ("filter_2", "conv-interp-2"))),
    ("Cost of not standing where the teacher does", (("teacher", "teachers"),)),
    ("Correlation between filters", (("correlation", "correlation"),)),
    ("Equivariance error, cells", (("equivariance", "equivariance"),)),
)
"""Panels of training curves: title, and (logged key, label) of each curve."""


@dataclass(frozen=True)
class _Row:
    """A row of the score table: one score over all subjects."""

    key: str
    name: str
    direction: str
    words: str
    is_percent: bool
    cells: tuple[tuple[Subject, Measure], ...]
    common_n: str


@dataclass(frozen=True)
class _Drawn:
    """A gallery filter with its photos drawn."""

    number: int
    scores: str
    photos: tuple[str, ...]
    maps: tuple[str, ...]


@dataclass(frozen=True)
class _AttentionRow:
    """One network's Grad-CAM: its maps drawn, and how concentrated they are beside random ones."""

    role: str
    name: str
    words: str
    share: Measure
    random: Measure
    photos: tuple[str, ...]


@dataclass(frozen=True)
class _AttentionView:
    """Grad-CAM as it is shown: the photos themselves and a row for each network."""

    photos: tuple[str, ...]
    classes: str
    rows: tuple[_AttentionRow, ...]


def _score_rows(evaluation: Evaluation) -> tuple[_Row, ...]:
    rows = []
    for key in SCORES:
        name, direction, words = wording.SCORE_WORDS[key]
        cells = tuple((subject, subject.scores[key]) for subject in evaluation.subjects)
        if key in SINCE and not any(measure.defined for _, measure in cells):
            continue
        counts = {count_of(measure) for _, measure in cells if measure.defined}
        # One count for the whole row is said once; different ones stand in their cells.
        common = counts.pop() if len(counts) == 1 else ""
        rows.append(_Row(key, name, direction, words, key in wording.PERCENT_SCORES, cells, common))
    return tuple(rows)


def _region_rows(data: ExplainerData, evaluation: Evaluation) -> tuple[tuple[str, tuple[Measure, ...]], ...]:
    """Return a row for whatever has regions, with a score for each way of laying cells into the photo."""
    unknown, scores = Measure(), evaluation.regions
    if not scores:
        return ()
    return (
        ("explainer", tuple(one.layers.get("explainer", unknown) for one in scores)),
        ("… on other photos", tuple(one.other_photo.get("explainer", unknown) for one in scores)),
        (f"performer, {data.tap}", tuple(one.layers.get("tap", unknown) for one in scores)),
        (f"performer, {data.top_layer}", tuple(one.layers.get("top", unknown) for one in scores)),
        ("null: random cells", tuple(one.random for one in scores)),
        ("null: centre", tuple(one.centre for one in scores)),
    )


def _score_figures(evaluation: Evaluation) -> tuple[Figure, ...]:
    drawn = []
    for key in ("instability", "consistency"):
        name, direction, _ = wording.SCORE_WORDS[key]
        rows = [
            figures.ScoreRow(s.label, s.role, m.value, m.low, m.high, notation.number(m.value))
            for s, m in ((s, s.scores[key]) for s in evaluation.subjects)
        ]
        drawn.append(Figure(f"{name}: {direction}", figures.scores_chart(name, direction, rows)))
    # Instability never stands alone: the pair is shown whole or not at all.
    return tuple(drawn) if all(f.svg for f in drawn) else ()


def _filter_figure(evaluation: Evaluation) -> Figure | None:
    dots = [
        figures.Dot(
            f"{role} filter {f.filter}: instability {notation.number(f.instability)}, "
            f"consistency {notation.number(f.consistency)}" + (f", {f.landmark}" if f.landmark else ""),
            role,
            f.instability,
            f.consistency,
        )
        for role, scored in (
            ("explainer", evaluation.explainer_filters),
            ("performer", evaluation.performer_filters),
        )
        for f in scored
        if not f.dead
    ]
    title = "Consistency and instability of every filter"
    svg = figures.filters_chart(title, dots)
    return Figure("Every filter: consistency (up) against instability (right)", svg) if svg else None


def _parts_figure(evaluation: Evaluation) -> Figure | None:
    shares = [
        (s.label, s.role, s.landmark_shares) for s in (evaluation.subject(k) for k in ("explainer", "tap", "top"))
    ]
    svg = figures.parts_chart("Share of filters by landmark", shares)
    return Figure("Share of filters by the landmark that their peak predicts best", svg) if svg else None


def _curve_figures(data: ExplainerData) -> tuple[Figure, ...]:
    shaded = figures.phase_span([(e.number, e.phase) for e in data.history])
    drawn = []
    for title, curves in CURVES:
        series = [
            figures.Series(label, [(e.number, e.logged.get(key, math.nan)) for e in data.history])
            for key, label in curves
            if any(key in e.logged for e in data.history)
        ]
        svg = figures.curves_chart(title, series, shaded)
        if svg:
            drawn.append(Figure(title, svg))
    return tuple(drawn)


def _drawn_filter(kind: str, one: GalleryFilter | None) -> _Drawn | None:
    if one is None:
        return None
    # Both scores or neither: instability is not shown alone, here too.
    scores = []
    if math.isfinite(one.instability) or math.isfinite(one.consistency):
        scores.append(f"instability {notation.number(one.instability)}, consistency {notation.number(one.consistency)}")
    if one.landmark:
        scores.append(f"best on {one.landmark.replace('_', ' ')}")
    if math.isfinite(one.reads_px):
        scores.append(f"reads {one.reads_px:.0f} px")
    photos = []
    for picture in one.pictures:
        label = f"{picture.key}: {kind} filter {one.filter}"
        if picture.peak_px is not None:
            label += f" peaks at ({picture.peak_px[0]:.0f}, {picture.peak_px[1]:.0f}) px"
        if math.isfinite(picture.score):
            label += f", score {notation.number(picture.score)}"
        photos.append(figures.photo_with_region(picture.uri, picture.size_px, picture.box_px, picture.peak_px, label))
    maps = tuple(
        figures.photo_with_region(
            picture.map_uri, picture.size_px, None, None, f"{picture.key}: feature map of {kind} filter {one.filter}"
        )
        for picture in one.pictures
        if picture.map_uri is not None
    )
    return _Drawn(one.filter, "; ".join(scores), tuple(photos), maps)


def _gallery_rows(data: ExplainerData) -> tuple[tuple[_Drawn | None, _Drawn | None], ...]:
    if data.gallery is None:
        return ()
    return tuple(
        (_drawn_filter("explainer", ours), _drawn_filter("performer", theirs))
        for ours, theirs in zip_longest(data.gallery.explainer, data.gallery.performer)
    )


def _reading_words(data: ExplainerData) -> tuple[str, str]:
    """Say how much the shown filters read, and how that was found out; empty where it was not."""
    reading = data.gallery.reading if data.gallery else None
    if reading is None:
        return "", ""
    if not reading.covered:
        sides = [
            f"{whose} {max(reading.theoretical_px[key]):.0f} px"
            for key, whose in (("explainer", "the explainer's"), ("performer", "the performer's"))
            if key in reading.theoretical_px
        ]
        return "", f"Nothing was covered: round fields as wide as filters could read in theory, {', '.join(sides)}."
    said = []
    for key, whose in (("explainer", "the explainer's"), ("performer", "the performer's")):
        median, theory = reading.median_px.get(key, Measure()), reading.theoretical_px.get(key)
        if not median.defined:
            continue
        ends = f" [{median.low:.0f}, {median.high:.0f}]" if median.has_interval else ""
        could = f", in theory up to {max(theory):.0f} px" if theory else ""
        said.append(f"{whose} {median.value:.0f} px{ends} (n = {median.n}{could})")
    amount = f"Of the filters shown, the median reads: {'; '.join(said)}." if said else ""
    floor = reading.occluder_px / math.sqrt(2)
    made = (
        f"Found by covering: a square of {reading.occluder_px} px at {reading.places} places, {reading.stride_px} px "
        f"apart, on {notation.counted(reading.photos, 'photos')}, {reading.photos_per_filter} for each filter. The "
        f"size is the side of the smallest area that holds half of the drops; below {floor:.0f} px nothing can be told "
        "apart."
    )
    return amount, made


def _attention_view(data: ExplainerData) -> _AttentionView | None:
    attention = data.gallery.attention if data.gallery else None
    if attention is None:
        return None
    rows = []
    for name, role, words in (
        ("interpretable", "explainer", "part filters, masked at their peaks"),
        ("tap", "performer", "the explained layer's own filters"),
        ("top", "performer", "the performer's last maps"),
    ):
        layer = attention.layers[name]
        if name == "top" and layer == attention.layers["tap"]:
            continue  # one layer, one row
        empty = attention.empty.get(name, 0)
        drawn = tuple(
            figures.photo_with_region(
                photo.maps[name], attention.size_px, None, None, f"{photo.key}: Grad-CAM of {layer} for {photo.label}"
            )
            for photo in attention.photos
        )
        rows.append(
            _AttentionRow(
                role,
                layer,
                words + (f"; {notation.counted(empty, 'empty maps')} left out" if empty else ""),
                attention.concentration.get(name, Measure()),
                attention.random.get(name, Measure()),
                drawn,
            )
        )
    photos = tuple(
        figures.photo_with_region(photo.uri, attention.size_px, None, None, f"{photo.key}: {photo.label}")
        for photo in attention.photos
    )
    return _AttentionView(photos, ", ".join(photo.label for photo in attention.photos), tuple(rows))


def _history_table(data: ExplainerData) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return column names and rows of the training log, in the order in which the columns first appear."""
    keys = tuple(dict.fromkeys(key for e in data.history for key in e.logged))
    rows = tuple(
        (str(e.number), e.phase, *(notation.number(e.logged.get(key, math.nan)) for key in keys)) for e in data.history
    )
    return ("epoch", "phase", *keys), rows


def _facts(data: ExplainerData) -> tuple[tuple[str, str], ...]:
    """Return what was explained, in the order of the page; unknown things are left out."""
    photos = notation.counted(data.train_photos, "photos") + (f" of {data.category}" if data.category else "")
    if data.background_photos:
        photos += f" and {data.background_photos:,} others"
    targets = data.structure.get("targets")
    facts = [
        ("Performer", data.performer),
        ("Layer", data.tap + (f", decoded to {notation.plain(targets)}" if targets else "")),
        ("Data", data.data_name),
        ("Learned from", photos),
        ("Fitted", notation.moment(data.created)),
        ("Duration", notation.duration(data.seconds) if math.isfinite(data.seconds) else ""),
    ]
    return tuple((name, value) for name, value in facts if value)


def _landmarks(landmarks: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} ({count:,})" for name, count in landmarks.items())


@dataclass(frozen=True)
class ExplainerView:
    """Everything that the explainer's template shows; ``data`` holds what is written as it is."""

    data: ExplainerData
    evaluation: Evaluation | None
    verdicts: tuple[wording.Verdict, ...]
    measured_on: str
    landmarks: str
    score_rows: tuple[_Row, ...]
    region_columns: tuple[tuple[str, str], ...]
    region_rows: tuple[tuple[str, tuple[Measure, ...]], ...]
    score_figures: tuple[Figure, ...]
    filter_figure: Figure | None
    dead_left_out: int
    parts_figure: Figure | None
    gallery: tuple[tuple[_Drawn | None, _Drawn | None], ...]
    reads: str
    reading: str
    attention: _AttentionView | None
    curves: tuple[Figure, ...]
    log_columns: tuple[str, ...]
    log_rows: tuple[tuple[str, ...], ...]


def explainer_view(data: ExplainerData) -> ExplainerView:
    """Draw what the template needs."""
    evaluation = data.evaluation
    columns, log = _history_table(data)
    reads, reading = _reading_words(data)
    return ExplainerView(
        data=data,
        evaluation=evaluation,
        verdicts=wording.verdicts(data),
        measured_on=wording.photos_measured(data, evaluation) if evaluation else "",
        landmarks=_landmarks(evaluation.landmarks) if evaluation else "",
        score_rows=_score_rows(evaluation) if evaluation else (),
        region_columns=tuple((wording.region_name(one), wording.region_words(one)) for one in evaluation.regions)
        if evaluation
        else (),
        region_rows=_region_rows(data, evaluation) if evaluation else (),
        score_figures=_score_figures(evaluation) if evaluation else (),
        filter_figure=_filter_figure(evaluation) if evaluation else None,
        dead_left_out=sum(f.dead for f in evaluation.explainer_filters) if evaluation else 0,
        parts_figure=_parts_figure(evaluation) if evaluation else None,
        gallery=_gallery_rows(data),
        reads=reads,
        reading=reading,
        attention=_attention_view(data),
        curves=_curve_figures(data),
        log_columns=columns,
        log_rows=log,
    )


def explainer_title(data: ExplainerData) -> str:
    """Return the title of a page that shows only this explainer."""
    return f"{data.tap} of {notation.short_name(data.performer)}" + (f": {data.category}" if data.category else "")


def explainer_chapter(data: ExplainerData) -> Chapter:
    """Describe the chapter for the contents."""
    return Chapter(
        kind="explainer",
        anchor="explainer",
        title=f"What {data.tap} holds" + (f" of {data.category}" if data.category else ""),
        headline=wording.headline(data),
        facts=_facts(data),
        sections=(
            ("verdict", "Verdict"),
            ("numbers", "Numbers"),
            ("fidelity", "Fidelity"),
            ("parts", "Parts"),
            ("filters", "Filters"),
            ("attention", "Attention"),
            ("training", "Training"),
        ),
    )


def explainer_origin(data: ExplainerData) -> Origin:
    """Say how the explainer is made again."""
    return Origin(
        title=f"The explainer of {data.tap}",
        command=data.command,
        hashes=(
            ("weights (SHA-256)", data.weights_sha256),
            ("data fingerprint", data.fingerprint),
            ("preset", data.preset),
        ),
        details=(
            ("Versions", pairs(data.versions)),
            ("Configuration", pairs(data.config)),
            ("Structure", pairs(data.structure)),
            ("Receptive field (rows, cols)", pairs(data.receptive_field)),
            ("Preprocessing", pairs(data.preprocessing)),
        ),
    )


def explainer_remarks(data: ExplainerData) -> Remarks:
    """Return the explainer's notes."""
    return Remarks(f"The explainer of {data.tap}", data.performer_notes, data.unreadable)
