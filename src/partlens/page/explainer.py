"""What the page draws of an explainer: its records, figures and states; the words are the templates'."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Self

from partlens.estimate import Estimate
from partlens.evaluation.results import (
    Attention,
    AttentionPhoto,
    Evaluation,
    Gallery,
    GalleryFilter,
    PriceCurve,
    RegionScores,
)
from partlens.explainer.record import ExplainerRun, History
from partlens.metrics.scores import FIDELITY, LOCALISATION, REGION_READINGS
from partlens.page import figures, notation
from partlens.page.views import Chapter, Figure, Pictures, count_of, environment, origin, pairs
from partlens.progress import duration
from partlens.records import plain

_CORRELATION_NOTICE = 0.5
# Beyond these a low instability would mean nothing, or the reconstruction little.
_LIMITS = {"filter_correlation": 0.9, "peak_spread_cells": 1.0, "border_frac": 0.5, "dead_frac": 0.05}
_AGREEMENT_LIMIT = 0.5

_CURVES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Reconstruction loss", (("reconstruction", "reconstruction"),)),
    ("p, the weight of part filters", (("p", "p"),)),
    ("Filter loss, nats per filter", (("filter_1", "conv-interp-1"), ("filter_2", "conv-interp-2"))),
    ("Cost of not being where the teacher is", (("teacher", "teachers"),)),
    ("Correlation between filters", (("correlation", "correlation"),)),
)
"""Panels of training curves: title, and (logged key, label) of each curve."""

_Comparison = Literal["better", "level", "worse"]


@dataclass(frozen=True)
class ExplainerData:
    """The records of a run, and their pictures."""

    run: ExplainerRun  # ``run.json``
    epochs: tuple[Mapping[str, Any], ...]  # of ``history.json``, in order; only finite numbers
    evaluation: Evaluation | None  # ``None`` where nothing was measured yet
    curve: PriceCurve | None  # what a higher p costs, ``None`` where there were no held-out photos for it
    gallery: Gallery | None  # ``None`` where none was drawn
    pictures: Mapping[str, str]  # of the gallery, as ``data:`` addresses by name

    @property
    def category(self) -> str:
        """The categories with commas; empty where all photos count as one."""
        return ", ".join(filter(None, self.run.data.categories))

    @property
    def tap(self) -> str:
        """The explained layer."""
        return self.run.structure.tap

    @classmethod
    def read(cls, run: Path, pictures: Pictures) -> Self | None:
        """Read what the page says of an explainer; ``None`` where the folder has no ``run.json``.

        Raises:
            RunError: a file of the run is damaged or of another version, or a picture is missing; the text names it.
        """
        record = ExplainerRun.read_if_there(run)
        if record is None:
            return None
        history, gallery = History.read_if_there(run), Gallery.read_if_there(run / "gallery")
        names = _files(gallery) if gallery else []
        return cls(
            run=record,
            epochs=tuple(map(_finite, history.epochs)) if history else (),
            evaluation=Evaluation.read_if_there(run),
            curve=PriceCurve.read_if_there(run),
            gallery=gallery,
            pictures={name: found.uri for name in names if (found := pictures.read(run / "gallery", name))},
        )

    @property
    def headline(self) -> str:
        """The result in a sentence or two, as markup."""
        words: Any = environment().get_template("explainer_words.html.j2").module
        said: str = words.headline(self)
        return said

    def view(self) -> dict[str, Any]:
        """Return what the template shows."""
        return {
            "data": self,
            "run": self.run,
            "evaluation": self.evaluation,
            "curve": self.curve,
            "gallery": self.gallery,
            "scores": LOCALISATION,
            "fidelity": FIDELITY,
            "readings": REGION_READINGS,
            "parts_figure": None,
            "attention": (),
            "curves": _curve_figures(self),
            **_log(self),
            **(_measured(self, self.evaluation) if self.evaluation else {}),
            **(_drawn(self.gallery, self.pictures) if self.gallery else {}),
        }

    def chapter(self) -> Chapter:
        """Describe the chapter for the contents."""
        run = self.run
        of = f" of {self.category}" if self.category else ""
        photos = notation.counted(run.train_photos, "photos") + of
        photos += f" and {run.background:,} others" if run.background else ""
        sections = ("Verdict", "Numbers", "Fidelity", "Parts", "Filters", "Attention", "Training")
        return Chapter(
            kind="explainer",
            anchor="explainer",
            title=f"What {self.tap} holds{of}",
            headline=self.headline,
            page_title=f"{self.tap} of {notation.short_name(run.performer.name)}"
            + (f": {self.category}" if self.category else ""),
            facts=(
                ("Performer", run.performer.name),
                ("Layer", f"{self.tap}, decoded to {', '.join(run.structure.targets)}"),
                ("Data", run.data.name),
                ("Learned from", photos),
                ("Fitted", notation.moment(run.created)),
                ("Duration", duration(run.seconds)),
            ),
            sections=tuple((name.lower(), name) for name in sections),
            origin=origin(
                f"The explainer of {self.tap}",
                run,
                run.config,
                ("Structure", pairs(plain(run.structure))),
                ("Receptive field (rows, cols)", pairs(plain(run.grid))),
                identity=("preset", run.preset),
            ),
        )


def _finite(epoch: Mapping[str, Any]) -> dict[str, Any]:
    """Drop what is undefined, in a file ``null``."""
    return {k: v for k, v in epoch.items() if v is not None and (not isinstance(v, float) or math.isfinite(v))}


def _files(gallery: Gallery) -> list[str]:
    """Return the names of the pictures that are shown, each once."""
    shots = [photo for layer in gallery.layers.values() for one in layer for photo in one.photos]
    found = [name for shot in shots for name in (shot.region_file or shot.file, shot.map_file)]
    found += [name for photo in gallery.attention.photos for name in (photo.file, *photo.maps.values())]
    return list(dict.fromkeys(found))


def _compare(measure: Estimate, null: Estimate, *, lower_is_better: bool) -> _Comparison:
    """Compare a score with its null; intervals that overlap are level."""
    overlap = measure.has_interval and null.has_interval
    if (overlap and max(measure.low, null.low) <= min(measure.high, null.high)) or measure.value == null.value:
        return "level"
    return "better" if (measure.value < null.value) == lower_is_better else "worse"


def _against_nulls(evaluation: Evaluation, score: str, *, lower_is_better: bool) -> dict[str, _Comparison]:
    """Compare the explainer's score with that of each null.

    What was drawn on the same photos is compared on the same photos; two intervals of one score each say less.
    """
    paired = evaluation.instability_minus_null if score == "instability" else {}
    nothing, found = Estimate(0.0, (0.0, 0.0), 0), {}
    for key, null in evaluation.nulls.items():
        gap = paired.get(key, Estimate.undefined())
        measure, other = (gap, nothing) if gap.defined else (evaluation.explainer.of(score), null.of(score))
        if other.defined:
            found[key] = _compare(measure, other, lower_is_better=lower_is_better)
    return found


def judge(evaluation: Evaluation) -> dict[str, str]:
    """Judge an evaluation: the nulls, signs of collapse, and faithfulness.

    Returns:
        By score, in the order of the page, what the template says of it: ``unknown`` where it was not measured,
        ``good``, ``caution``, ``warning``, and for instability ``chance``, ``collapse``, ``good`` or ``fixed``: it is
        never praised where there is a sign of collapse.
    """
    scores = evaluation.explainer

    def limit(name: str, *, bad: bool) -> str:
        return "unknown" if not scores.of(name).defined else "warning" if bad else "good"

    together = scores.filter_correlation.value
    collapse = {
        "filter_correlation": limit("filter_correlation", bad=together > _LIMITS["filter_correlation"]),
        "peak_spread_cells": limit(
            "peak_spread_cells", bad=scores.peak_spread_cells.value < _LIMITS["peak_spread_cells"]
        ),
        "border_frac": limit("border_frac", bad=scores.border_frac.value > _LIMITS["border_frac"]),
    }
    if collapse["filter_correlation"] == "good" and together > _CORRELATION_NOTICE:
        collapse["filter_correlation"] = "caution"
    predictive = _against_nulls(evaluation, "consistency", lower_is_better=False)
    agreement = evaluation.reconstruction.agreement_top1
    faithful = "warning" if agreement.value < _AGREEMENT_LIMIT else "good"
    return {
        "instability": _stability(evaluation, collapsed="warning" in collapse.values()),
        "consistency": limit("consistency", bad=set(predictive.values()) != {"better"}),
        **collapse,
        "dead_frac": limit("dead_frac", bad=scores.dead_frac.value >= _LIMITS["dead_frac"]),
        "agreement": faithful if agreement.defined else "unknown",
    }


def _stability(evaluation: Evaluation, *, collapsed: bool) -> str:
    stable = _against_nulls(evaluation, "instability", lower_is_better=True)
    if not evaluation.explainer.instability.defined or not stable:
        return "unknown"
    if stable.get("random") in {"level", "worse"}:
        return "chance"
    if collapsed:
        return "collapse"
    return "good" if set(stable.values()) == {"better"} else "fixed"


def _judge_regions(score: RegionScores) -> str:
    """Say what a part interpretability is worth: ``undefined``, ``nothing``, ``level`` or ``above``."""
    own = score.layers["explainer"]
    if not own.defined or not score.centre.defined:
        return "undefined"
    if score.centre.value >= own.value:
        return "nothing"
    return "above" if _compare(own, score.other_photo["explainer"], lower_is_better=False) == "better" else "level"


def _subjects(data: ExplainerData, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Return the columns of the table of scores: layers and nulls."""
    labels = {
        "explainer": ("explainer", "explainer"),
        "tap": (f"performer, {data.tap}", "performer"),
        "top": (f"performer, {evaluation.performer.top_layer}", "performer"),
        "random": ("null: random cell", "null"),
        "centre": ("null: centre", "null"),
        "corner": ("null: corner", "null"),
    }
    return [
        {"label": labels[key][0], "role": labels[key][1], "scores": scores} for key, scores in evaluation.subjects()
    ]


def _common_counts(subjects: list[dict[str, Any]]) -> dict[str, str]:
    """Return the count that a whole row of the table has, said once; rows with several say them in their cells."""
    found = {}
    for key in LOCALISATION:
        counts = {count_of(measure) for s in subjects if (measure := s["scores"].of(key)).defined}
        found[key] = counts.pop() if len(counts) == 1 else ""
    return found


def _score_figures(subjects: list[dict[str, Any]]) -> list[Figure]:
    drawn = []
    for key in ("instability", "consistency"):
        score = LOCALISATION[key]
        rows = [
            figures.ScoreRow(s["label"], s["role"], m.value, m.low, m.high, notation.number(m.value))
            for s in subjects
            for m in [s["scores"].of(key)]
        ]
        svg = figures.scores_chart(score.title, score.direction, rows)
        drawn.append(Figure(f"{score.title}: {score.direction}", svg))
    # Instability is never shown alone: the pair is shown whole or not at all.
    return drawn if all(f.svg for f in drawn) else []


def _filter_figure(evaluation: Evaluation) -> Figure | None:
    dots = [
        (
            f"{role} filter {f.filter}: instability {notation.number(f.instability)}, "
            f"consistency {notation.number(f.consistency)}" + (f", {f.landmark}" if f.landmark else ""),
            role,
            f.instability,
            f.consistency,
        )
        for role, scored in evaluation.filters.items()
        for f in scored
        if not f.dead
    ]
    svg = figures.filters_chart("Consistency and instability of every filter", dots)
    return Figure.of("Every filter: consistency (up) against instability (right)", svg)


def _parts_figure(subjects: list[dict[str, Any]]) -> Figure | None:
    shares = [(s["label"], s["role"], s["scores"].landmark_shares) for s in subjects if s["role"] != "null"]
    svg = figures.parts_chart("Share of filters by landmark", shares)
    return Figure.of("Share of filters by the landmark that their peak predicts best", svg)


def _curve_figures(data: ExplainerData) -> list[Figure]:
    shaded = figures.warm_up_span([(e["epoch"], str(e.get("phase", ""))) for e in data.epochs])
    drawn = []
    for title, keys in _CURVES:
        curves = [
            (label, [(e["epoch"], e.get(key, math.nan)) for e in data.epochs])
            for key, label in keys
            if any(key in e for e in data.epochs)
        ]
        drawn.append(Figure.of(title, figures.curves_chart(title, curves, shaded)))
    return list(filter(None, drawn))


def _drawn_filter(kind: str, one: GalleryFilter | None, pictures: Mapping[str, str]) -> dict[str, Any] | None:
    """Return a filter of the gallery with its photos and maps drawn."""
    if one is None:
        return None
    number, photos, maps = one.scores.filter, [], []
    for shot in one.photos:
        x, y = shot.peak_px
        label = (
            f"{shot.key}: {kind} filter {number} peaks at ({x:.0f}, {y:.0f}) px, score {notation.number(shot.score)}"
        )
        # The picture of what is read shows the region itself; the box replaces it where nothing was found.
        uri, box = pictures[shot.region_file or shot.file], None if shot.region_file else shot.box_px
        photos.append(figures.photo_with_region(uri, shot.size_px, box, shot.peak_px, label))
        label = f"{shot.key}: feature map of {kind} filter {number}"
        maps.append(figures.photo_with_region(pictures[shot.map_file], shot.size_px, None, None, label))
    return {"filter": one, "photos": photos, "maps": maps}


def _attention(of: Attention, pictures: Mapping[str, str]) -> dict[str, Any]:
    """Return Grad-CAM of each layer, drawn, and how concentrated it is, with random maps for comparison."""

    def drawn(photo: AttentionPhoto, file: str, label: str) -> str:
        return figures.photo_with_region(pictures[file], of.size_px, None, None, f"{photo.key}: {label}")

    # Where the tap is the top layer, it has one row.
    shown = {kind: layer for kind, layer in of.layers.items() if kind != "top" or layer != of.layers["tap"]}
    rows = [
        {
            "kind": kind,
            "role": "explainer" if kind == "interpretable" else "performer",
            "layer": layer,
            "share": of.concentration_frac[kind],
            "random": of.random_frac[kind],
            "empty": of.empty[kind],
            "photos": [drawn(p, p.maps[kind], f"Grad-CAM of {layer} for {p.label}") for p in of.photos],
        }
        for kind, layer in shown.items()
    ]
    return {"attention_photos": [drawn(p, p.file, p.label) for p in of.photos], "attention": rows}


def _log(data: ExplainerData) -> dict[str, Any]:
    """Return column names and rows of the training log, in the order in which the columns first appear."""
    keys = list(dict.fromkeys(key for e in data.epochs for key in e))
    values = [[e.get(k, math.nan) for k in keys] for e in data.epochs]
    rows = [[str(v) if isinstance(v, (str, int)) else notation.number(v) for v in row] for row in values]
    return {"log_columns": keys, "log_rows": rows}


def _measured(data: ExplainerData, evaluation: Evaluation) -> dict[str, Any]:
    subjects, regions = _subjects(data, evaluation), evaluation.part_interpretability
    return {
        "states": judge(evaluation),
        "found": {
            name: _against_nulls(evaluation, name, lower_is_better=name == "instability")
            for name in ("instability", "consistency")
        },
        "subjects": subjects,
        "common_n": _common_counts(subjects),
        "worth": {name: _judge_regions(one) for name, one in regions.readings.items()} if regions else {},
        "score_figures": _score_figures(subjects),
        "filter_figure": _filter_figure(evaluation),
        "parts_figure": _parts_figure(subjects),
    }


def _drawn(gallery: Gallery, pictures: Mapping[str, str]) -> dict[str, Any]:
    kinds = ("explainer", "performer")
    filters = [
        tuple(_drawn_filter(kind, one, pictures) for kind, one in zip(kinds, pair, strict=True))
        for pair in zip_longest(*(gallery.layers[kind] for kind in kinds))
    ]
    return {"filters": filters, **_attention(gallery.attention, pictures)}
