"""What an evaluation writes: ``evaluation.json`` and ``gallery/gallery.json``, typed from measuring to drawing.

This module imports no tensor library. Every estimate has a value, a 95 % interval and ``n``; undefined numbers are
``nan``, in the files ``null``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from partlens.estimate import Estimate, Number
from partlens.metrics.scores import LocalisationScores
from partlens.records import Record, Value
from partlens.run import Unreadable

AGAIN = "Run evaluate again"

ErrorsBy = Literal["performer", "logistic head"]
GalleryKind = Literal["quick", "full", "none"]
FieldKind = Literal["mask", "occlusion"]
"""What is outlined around a peak: cells that the mask keeps, or what a filter reads, found by covering photos."""


OtherPeak = Literal["explainer_largest", "tap_centroid", "top_centroid"]
"""A layer by the peaks that the scores of the others are of."""


class CategoryScores(LocalisationScores):
    """Scores of the filters that belong to one category, on its photos.

    Attributes:
        filters: how many there are; of a null, how many of the explainer's it is weighed by.
    """

    filters: int


class LayerScores(LocalisationScores):
    """Scores of one layer, or of a null: the mean over filters, each measured on the photos of its category.

    Attributes:
        by_category: the same per category; the only one where there is one.
    """

    by_category: dict[str, CategoryScores]


class FilterScores(Value):
    """One filter.

    Attributes:
        filter: its number.
        category: the category that it belongs to; empty where all photos count as one.
        instability: its own; ``nan`` without landmarks, as consistency.
        consistency: of its best landmark.
        landmark: that landmark.
        spread_cells: how far its peak moves.
        dead: it activates on no photo.
    """

    filter: int
    category: str
    instability: Number
    consistency: Number
    landmark: str | None
    spread_cells: Number
    dead: bool


class PerformerScores(Value):
    """The performer's own layers.

    Attributes:
        tap: the explained layer.
        top: its last layer with maps.
        top_layer: name of that layer.
    """

    tap: LayerScores
    top: LayerScores
    top_layer: str


class Fidelity(Value):
    """What is left of the performer when its features at the targets are replaced and it goes on with them.

    Attributes:
        agreement_top1: photos whose strongest class stays the same.
        agreement_top1_background: the same of photos of other categories.
        variance_kept: per target, the share of its variance that is kept: 1 is all of it, 0 what the constant mean
            keeps, less than that what is worse than the mean.
        errors_by: whose errors the next three are; ``None`` where there is nothing to tell the categories from.
        performer_error_percent: on the performer's own features.
        explainer_error_percent: on what replaces them.
        error_increase_points: the difference, by a paired bootstrap.
    """

    agreement_top1: Estimate
    agreement_top1_background: Estimate
    variance_kept: dict[str, Estimate]
    errors_by: ErrorsBy | None
    performer_error_percent: Estimate
    explainer_error_percent: Estimate
    error_increase_points: Estimate


class PartsAlone(Value):
    """What the part filters hold by themselves: the explainer's ordinary track is silent and the decoder goes on.

    Attributes:
        parts: the part filters of each photo.
        other_photo: a null, the part filters of another photo.
        nothing: a null, both tracks silent.
    """

    parts: Fidelity
    other_photo: Fidelity
    nothing: Fidelity


class PricePoint(Value):
    """One point of the curve of p.

    Attributes:
        eta: price of the ordinary track.
        p: learned under it.
        reconstruction: what is left of the performer with both tracks.
        parts_alone: the same with the ordinary track silent, and its nulls.
    """

    eta: float
    p: float
    reconstruction: Fidelity
    parts_alone: PartsAlone


class PriceCurve(Record):
    """What a rising p costs: the fitted explainer, then others learned from it, measured on held-out photos.

    Attributes:
        photos: of the categories, of the split ``test``.
        others: photos of other categories.
        points: the fitted one first.
    """

    FILE = "curve.json"
    SCHEMA = "partlens.curve/1"
    AGAIN = "Delete the run and run fit-explainer again"

    photos: int
    others: int
    points: tuple[PricePoint, ...]


class RegionScores(Value):
    """Part interpretability by one way of laying a filter's valid cells into the photo.

    Attributes:
        radius_px: of the discs, by layer; ``None`` where cells are rectangles.
        layers: of ``explainer``, ``tap`` and ``top``.
        other_photo: the same with each photo's regions laid on the parts of another photo.
        random: of random cells.
        centre: of one region that never leaves the centre.
    """

    radius_px: dict[str, float] | None
    layers: dict[str, Estimate]
    other_photo: dict[str, Estimate]
    random: Estimate
    centre: Estimate


class PartInterpretability(Value):
    """How often filters' regions overlap parts (CVPR 2018).

    Attributes:
        regions: what is known of the parts.
        photos: with each part.
        readings: by ``round``, ``part_sized`` and ``scaled``.
    """

    regions: Literal["masks", "boxes"]
    photos: dict[str, int]
    readings: dict[str, RegionScores]


class EvaluatedData(Value):
    """The photos that were measured on.

    Attributes:
        name: as reports call them.
        split: of these photos.
        photos: how many of the categories.
        categories: those of the explainer; ``("",)`` means all photos as one.
        same_as_fit: the fit had the same data set.
        used_in_fit: how many of the photos the fit used.
        unreadable: photos that could not be decoded.
    """

    name: str
    split: str
    photos: int
    categories: tuple[str, ...]
    same_as_fit: bool
    used_in_fit: int
    unreadable: tuple[Unreadable, ...]


class Evaluation(Record):
    """An explainer measured on photos that were not used in the fit.

    Attributes:
        data: the photos.
        landmarks: photos with each landmark.
        explainer: the part filters.
        performer: the performer's own layers, for comparison.
        nulls: filters that see nothing: ``random`` cells, always the ``centre``, always the ``corner``.
        instability_minus_null: the explainer's instability minus each null's, on the same photos.
        same_peak: the explainer by its largest cells and the performer's layers by centroids, so that peaks read in one
            way can be compared; elsewhere it is the other way round. ``None`` where all are read in one way.
        p: learned weight of part filters against the ordinary ones; interval over seeds.
        reconstruction: what is left of the performer when the reconstruction of both tracks is fed back to it.
        parts_alone: the same of the part filters by themselves, with its nulls; ``p`` is not read without it.
        part_interpretability: where the photos have regions of parts.
        filters: each filter of ``explainer`` and ``performer``.
        warnings: ways in which a low instability would mean nothing.
        versions: of what the figures depend on.
    """

    FILE = "evaluation.json"
    SCHEMA = "partlens.evaluation/3"
    AGAIN = AGAIN

    data: EvaluatedData
    landmarks: dict[str, int]
    explainer: LayerScores
    performer: PerformerScores
    nulls: dict[str, LayerScores]
    instability_minus_null: dict[str, Estimate]
    same_peak: dict[OtherPeak, LayerScores] | None
    p: Estimate
    reconstruction: Fidelity
    parts_alone: PartsAlone
    part_interpretability: PartInterpretability | None
    filters: dict[str, tuple[FilterScores, ...]]
    warnings: tuple[str, ...]
    versions: dict[str, str]

    def subjects(self) -> Iterator[tuple[str, LayerScores]]:
        """Give everything that was scored, by name: the explainer, the performer's layers, the nulls."""
        yield "explainer", self.explainer
        yield "tap", self.performer.tap
        yield "top", self.performer.top
        yield from self.nulls.items()


class GalleryPhoto(Value):
    """A photo with the place where a filter peaks, in pixels of ``size_px`` (x to the right, y down).

    Attributes:
        key: the photo's name in the data set.
        file: the photo itself; files are in the folder of the record.
        region_file: what the filter reads there, drawn; ``None`` where that is nothing.
        map_file: the filter's map over the photo.
        score: the peak's value.
        peak_px: x, y of the peak.
        box_px: left, top, right and bottom of the cells that the mask keeps.
        size_px: width and height that the coordinates refer to.
    """

    key: str
    file: str
    region_file: str | None
    map_file: str
    score: float
    peak_px: tuple[float, float]
    box_px: tuple[float, float, float, float]
    size_px: tuple[int, int]


class GalleryFilter(Value):
    """A filter with the photos on which it activates most.

    Attributes:
        scores: as measured.
        reads_px: side of what it reads; ``nan`` where nothing was found.
        photos: the highest peak first.
    """

    scores: FilterScores
    reads_px: Number
    photos: tuple[GalleryPhoto, ...]


class Covering(Value):
    """How photos were covered to find what filters read.

    Attributes:
        settings: of the occlusion, in pixels of the input.
        places: of the covering square on a photo.
        photos: that were covered.
        photos_per_filter: of these, how many each filter used.
        reads_px: median side of what the shown filters read, by ``explainer`` and ``performer``.
    """

    settings: dict[str, Any]
    places: int
    photos: int
    photos_per_filter: int
    reads_px: dict[str, Estimate]


class AttentionPhoto(Value):
    """A photo with Grad-CAM maps.

    Attributes:
        key: the photo's name in the data set.
        label: the class that the performer gives it, which the maps explain; of a single output the answer no is said.
        file: the photo.
        maps: by ``interpretable``, ``tap`` and ``top``.
    """

    key: str
    label: str
    file: str
    maps: dict[str, str]


class Attention(Value):
    """Grad-CAM of the explainer's part filters and of the performer's layers.

    Attributes:
        layers: names by ``interpretable``, ``tap`` and ``top``, as everything here.
        size_px: width and height of the input.
        photos: that are shown.
        concentration_frac: smallest share of the photo that holds half of a map, mean over photos.
        random_frac: the same of random maps on each layer's grid.
        empty: photos whose map is all zeros, which the mean does not count.
    """

    layers: dict[str, str]
    size_px: tuple[int, int]
    photos: tuple[AttentionPhoto, ...]
    concentration_frac: dict[str, Estimate]
    random_frac: dict[str, Estimate]
    empty: dict[str, int]


class Gallery(Record):
    """Pictures of filters, and of where class scores come from.

    Attributes:
        kind: how much was spent on it.
        fields: how it was found what filters read.
        covering: of photos; ``None`` where nothing was covered.
        theoretical_px: rows and columns that filters can read, by ``explainer`` and ``performer``.
        layers: chosen filters of both.
        attention: Grad-CAM of both networks.
    """

    FILE = "gallery.json"
    SCHEMA = "partlens.gallery/2"
    AGAIN = AGAIN

    kind: GalleryKind
    fields: FieldKind
    covering: Covering | None
    theoretical_px: dict[str, tuple[int, int]]
    layers: dict[str, tuple[GalleryFilter, ...]]
    attention: Attention
