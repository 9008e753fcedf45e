"""The scores: how each is called, what it means, which way is better, and how it is written. No other list has them.

This module imports no tensor library, so that pages and records read it at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from partlens.estimate import Estimate, Number
from partlens.records import Value

LOWER, HIGHER = "lower is better", "higher is better"


class Score(NamedTuple):
    """One score."""

    title: str  # its name for people
    words: str  # what it means, in one or two sentences
    direction: str = ""  # which way is better; empty where neither is
    unit: str = ""  # what the number counts; empty for shares and pure numbers
    is_share: bool = False  # it is written as a percentage, 100 times the number in the file


LOCALISATION: Mapping[str, Score] = {
    "instability": Score(
        "Location instability",
        "How much the distance from a filter's peak to a landmark varies between photos, as a share of the photo's "
        "diagonal. A peak that never moves also scores low, so it is never read without the rows below it.",
        LOWER,
    ),
    "instability_all": Score(
        "… on all photos",
        "The published score takes, for each filter, the hundred photos on which it activates most. Which these are "
        "depends on what activates it; here every photo counts.",
        LOWER,
    ),
    "consistency": Score(
        "Consistency",
        "Share of a landmark's position variance that a filter's peak predicts on photos the fit has not seen: "
        "1 for a perfect tracker, about 0 for a peak that is random or fixed.",
        HIGHER,
    ),
    "peak_spread_cells": Score(
        "Peak spread",
        "How far a filter's peak moves between photos, in cells of the layer's map.",
        "cells; near 0 is collapse",
        "cells",
    ),
    "border_frac": Score(
        "Peaks on the border",
        "Share of peaks that lie in the outermost ring of cells, where masked filters hide.",
        LOWER,
        is_share=True,
    ),
    "dead_frac": Score("Dead filters", "Share of filters that activate on no photo at all.", LOWER, is_share=True),
    "silent_frac": Score(
        "Empty maps",
        "Share of photos on which a filter does not activate at all, over all filters. It has no place there; what "
        "counts is the first cell, the corner.",
        LOWER,
        is_share=True,
    ),
    "filter_correlation": Score(
        "Filter correlation",
        "Mean correlation of peak positions between two filters: near 1, every filter follows the same part.",
        LOWER,
    ),
    "distinct_parts": Score(
        "Distinct parts",
        "Effective number of different places that the filters hold; 1 when all are the same.",
        HIGHER,
    ),
}
"""Where filters peak, of one layer on one set of photos, in the order of tables; instability is never shown alone."""

FIDELITY: Mapping[str, Score] = {
    "p": Score("p", "learned weight of part filters against the ordinary ones: a price, not a share of anything"),
    "agreement_top1": Score(
        "Top-1 agreement", "photos whose strongest class stays the same; higher is better", HIGHER, is_share=True
    ),
    "agreement_top1_background": Score(
        "Top-1 agreement on other photos",
        "photos of other categories whose strongest class stays the same; higher is better",
        HIGHER,
        is_share=True,
    ),
    "error_increase_points": Score("Error increase", "in percentage points; lower is better", LOWER, "points"),
    "performer_error_percent": Score("Error on the performer", "on the performer's own features", LOWER, "%"),
    "explainer_error_percent": Score("Error on what replaces it", "on the features in their place", LOWER, "%"),
    "variance_kept": Score(
        "Variance kept",
        "share of the target's variance: 100 % is all of it, 0 % what the constant mean map keeps",
        HIGHER,
        is_share=True,
    ),
}
"""How much of the performer is left when something is fed back to it in place of its own features."""

SCORES: Mapping[str, Score] = {
    **LOCALISATION,
    **FIDELITY,
    "part_interpretability": Score(
        "Part interpretability",
        "share of photos on which a filter's region overlaps a part by more than 0.2 of their union, for the part "
        "that it meets most often; mean over filters",
        HIGHER,
    ),
    "concentration_frac": Score(
        "Share of the photo that holds half",
        "smallest share of the photo that holds half of a map; mean over photos",
        is_share=True,
    ),
}
"""Every score by its name in files."""


REGION_READINGS: Mapping[str, str] = {
    "round": "round field in theory, as in print",
    "part_sized": "disc as large as the median part",
    "scaled": "the map scaled up",
}
"""What a filter's valid cell means in part interpretability, by its name in files; the printed way first."""


class LocalisationScores(Value):
    """Everything that instability must not be shown without, for one layer on one set of photos.

    Attributes:
        instability: see :data:`LOCALISATION`, for each of them.
        instability_all: over all photos with the landmark, not only the ``TOP_IMAGES`` with the highest peaks.
        peak_spread_cells: median over filters.
        dead_frac: of filters.
        silent_frac: of pairs of a filter and a photo.
        border_frac: of peaks.
        consistency: mean over live filters.
        filter_correlation: mean over pairs of live filters.
        distinct_parts: effective number.
        landmark_shares: share of the live filters that predict each landmark best.
    """

    instability: Estimate
    instability_all: Estimate
    peak_spread_cells: Estimate
    dead_frac: Estimate
    silent_frac: Estimate
    border_frac: Estimate
    consistency: Estimate
    filter_correlation: Estimate
    distinct_parts: Estimate
    landmark_shares: dict[str, Number]

    def of(self, name: str) -> Estimate:
        """Return the score of a name in :data:`LOCALISATION`."""
        found: Estimate = getattr(self, name)
        return found
