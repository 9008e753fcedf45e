"""Maps and nulls on photos of several categories, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from partlens.data.annotations import PartTruth
from partlens.data.images import ImageSet
from partlens.estimate import Estimate
from partlens.evaluation.explainer_evaluation import _Layer
from partlens.evaluation.frames import GalleryPlan
from partlens.evaluation.gallery import _chosen_filters, _covered_pool, _Shown, region_px
from partlens.evaluation.places import (
    MeasuredPhotos,
    filter_scores,
    landmarks_in_input,
    mean_of,
    measure_maps,
    measure_nulls,
)
from partlens.evaluation.results import FilterScores
from partlens.metrics.localisation import Peaks, peaks_from_cells
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import ReceptiveField

GRID = ((8.0, 8.0), (16.0, 16.0))
SIZE = (64, 64)


def photos(categories: tuple[str, ...], labels: torch.Tensor, landmark: torch.Tensor) -> MeasuredPhotos:
    count = torch.arange(len(labels))
    return MeasuredPhotos(
        landmark[:, None], ("head",), count, SIZE, categories, labels, torch.Generator().manual_seed(0), rounds=3
    )


@pytest.fixture
def seen() -> tuple[Peaks, torch.Tensor]:
    """Three filters on 40 photos: the first two are where the landmark is, the third anywhere; 4x4 cells."""
    draws = torch.Generator().manual_seed(2)
    cells = torch.randint(0, 4, (40, 2), generator=draws)
    anywhere = torch.randint(0, 4, (40, 2), generator=draws)
    landmark = 8 + 16 * cells.flip(-1).double()
    scores = torch.rand(40, 3, generator=draws).double()
    return peaks_from_cells(torch.stack([cells, cells, anywhere], 1), scores, (4, 4), *GRID), landmark


def test_one_category_is_the_mean_over_its_filters(seen: tuple[Peaks, torch.Tensor]) -> None:
    peaks, landmark = seen
    zeros = torch.zeros(40, dtype=torch.long)
    found = measure_maps(photos(("fox",), zeros, landmark), peaks, zeros[:3])
    distance = (peaks.positions_px[:, 2] - landmark).norm(dim=-1) / math.hypot(*SIZE)
    assert found.instability.value == pytest.approx(float(distance.std()) / 3)
    assert dict(found.by_category["fox"])["instability"] == found.instability
    assert found.by_category["fox"].filters == 3


def test_filters_are_measured_on_photos_of_their_category_and_weigh_alike(seen: tuple[Peaks, torch.Tensor]) -> None:
    peaks, landmark = seen
    labels = (torch.arange(40) >= 25).long()
    on = photos(("cat", "fox"), labels, landmark)
    assigned = torch.tensor([0, 1, 1])
    found = measure_maps(on, peaks, assigned)
    fox = labels == 1
    distance = (peaks.positions_px[fox, 2] - landmark[fox]).norm(dim=-1) / math.hypot(*SIZE)
    each = {"cat": 0.0, "fox": float(distance.std()) / 2}
    for name, value in each.items():
        assert found.by_category[name].instability.value == pytest.approx(value, abs=1e-12)
    assert {name: one.filters for name, one in found.by_category.items()} == {"cat": 1, "fox": 2}
    assert found.instability.value == pytest.approx((1 * each["cat"] + 2 * each["fox"]) / 3)
    assert found.instability.n == 40
    rows = filter_scores(on, peaks, assigned)
    assert [r.category for r in rows] == ["cat", "fox", "fox"]
    assert [r.instability for r in rows] == pytest.approx([0.0, 0.0, 2 * each["fox"]], abs=1e-5)
    assert rows[0].landmark == "head"
    assert rows[0].consistency == pytest.approx(1, abs=1e-3)
    nulls, less = measure_nulls(on, peaks, assigned, GRID)
    assert list(nulls) == ["random", "centre", "corner"]
    for kind, null in nulls.items():
        # Every null is measured in both categories, which weigh as they do in the layer.
        by = [null.by_category[name].instability.value for name in ("cat", "fox")]
        assert null.instability.value == pytest.approx((by[0] + 2 * by[1]) / 3)
        assert less[kind].value == pytest.approx(found.instability.value - null.instability.value)
    corner = (torch.tensor([8.0, 8.0]) - landmark[~fox]).norm(dim=-1) / math.hypot(*SIZE)
    assert nulls["corner"].by_category["cat"].instability.value == pytest.approx(float(corner.std()))
    assert not nulls["corner"].distinct_parts.defined
    assert nulls["random"].distinct_parts.value > 5  # many random filters; one of them has 1


def test_categories_without_filters_or_with_one_photo_are_skipped(seen: tuple[Peaks, torch.Tensor]) -> None:
    peaks, landmark = seen
    labels = torch.zeros(40, dtype=torch.long)
    labels[0], labels[1:9] = 1, 2
    found = measure_maps(photos(("cat", "dog", "fox"), labels, landmark), peaks, torch.tensor([0, 1, 0]))
    assert list(found.by_category) == ["cat"]
    assert found.instability == found.by_category["cat"].instability


def test_means_of_estimates_add_their_ends_in_squares() -> None:
    a, b = Estimate(1.0, (0.7, 1.5), 10), Estimate(4.0, (3.6, 4.2), 6)
    found = mean_of([a, b, Estimate.undefined(), Estimate(9.0, (9.0, 9.0), 3)], [1, 3, 2, 0])
    assert found.value == pytest.approx(13 / 4)
    assert found.low == pytest.approx(13 / 4 - math.hypot(0.3 / 4, 0.4 * 3 / 4))
    assert found.high == pytest.approx(13 / 4 + math.hypot(0.5 / 4, 0.2 * 3 / 4))
    assert found.n == 16
    assert mean_of([a, b], [5, 0]) == a
    assert not mean_of([], []).defined


def test_a_filter_belongs_to_the_category_that_excites_it_most_on_average() -> None:
    """One photo of the first category and three of the second: means decide, not sums."""
    layer = _Layer()
    layer.follow(torch.tensor([[[[3.0, -9.0]], [[0.0, 1.0]]]]))
    layer.follow(torch.tensor([[[[2.0, 0.0]], [[2.0, 0.0]]]]).expand(3, -1, -1, -1))
    assert layer.assigned(torch.tensor([0, 1, 1, 1]), 2).tolist() == [0, 1]


def table(*consistency: float) -> list[FilterScores]:
    return [
        FilterScores(filter=k, category="", instability=0.1, consistency=c, landmark=None, spread_cells=1.0, dead=False)
        for k, c in enumerate(consistency)
    ]


def test_shown_filters_are_the_most_consistent_and_an_even_choice_of_the_rest() -> None:
    draws = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 14, (60, 9, 2), generator=draws)
    cells[:, 1] = cells[:, 0]  # filter 1 follows filter 0
    scores = torch.ones(60, 9).double()
    scores[:, 8] = 0  # dead
    peaks = peaks_from_cells(cells, scores, (14, 14), *GRID)
    rows = table(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 1.0)
    assert _chosen_filters(peaks, rows, 4) == [0, 2, 1, 7]
    assert _chosen_filters(peaks, rows, 99) == [0, 2, 3, 4, 5, 6, 7, 1]
    weaker = peaks_from_cells(cells, scores * torch.arange(1, 10), (14, 14), *GRID)
    assert _chosen_filters(weaker, table(*[math.nan] * 9), 2) == [7, 6]


def test_boxes_are_four_and_a_half_cells_wide_inside_the_image() -> None:
    field = ReceptiveField((8, 16), (30, 30), (-7, -7))
    assert region_px(torch.tensor([100.0, 50.0]), field, (64, 200)) == (64.0, 32.0, 136.0, 64.0)
    assert region_px(torch.tensor([2.0, 3.0]), field, (64, 200)) == (0.0, 0.0, 38.0, 21.0)


def test_the_photos_that_most_filters_peak_on_are_covered() -> None:
    shown = [_Shown("explainer", k, k, best) for k, best in enumerate([(5, 1), (5, 2), (2, 5), (7, 1)])]
    assert _covered_pool(shown, 3) == [5, 1, 2]


@pytest.mark.parametrize(
    ("kind", "expected"), [("quick", (18, 4, 8, 24)), ("none", (18, 4, 8, 24)), ("full", (9, 10, 24, 100))]
)
def test_a_full_gallery_covers_as_released_and_a_quick_one_less(kind: Any, expected: tuple[int, ...]) -> None:
    plan = GalleryPlan.of(kind, "occlusion", (224, 224))
    assert (plan.occlusion.stride_px, plan.occlusion.images, plan.covered, plan.attention) == expected
    assert GalleryPlan.of(kind, "occlusion", (112, 112)).occlusion.occluder_px == 16


@pytest.mark.parametrize(
    ("at", "inside"),
    [((20, 20), True), ((2, 20), False), ((38, 20), False), ((20, 2), False), ((20, 38), False)],
)
def test_landmarks_that_are_cropped_away_are_absent(tiny: Performer, at: tuple[int, int], inside: bool) -> None:
    """Of 40 x 40 px the middle 32 are seen."""
    nothing = np.full((1, 1, 2), np.nan)
    truth = PartTruth(("head",), ("000000",), np.array([[at]], float), nothing, np.array([[40.0, 40.0]]))
    images = ImageSet.from_arrays([np.zeros((40, 40, 3), np.uint8)]).with_parts(truth)
    seen = replace(tiny, preprocessing=Preprocessing(size_px=(32, 32), resize="crop", resize_px=40))
    names, found = landmarks_in_input(images, [0], seen)
    assert names == ("head",)
    assert bool(found.isfinite().all()) == inside
    if inside:
        assert found[0, 0].tolist() == pytest.approx([16, 16])
