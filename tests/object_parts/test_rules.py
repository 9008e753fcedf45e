"""The rules of parts, and explainers of several categories: a filter is measured on the photos of its own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from partlens.metrics.localisation import peaks_from_cells
from partlens.object_parts.record import PartsConfig
from partlens.object_parts.rules import SeenPhotos, chosen_rule, find_parts
from partlens.object_parts.trust import assignment_stability

SIDE = 8
HOW = PartsConfig(null_filters=200, rounds=4, clusters_min=2, clusters_max=3)
GRID = ((2.0, 2.0), (4.0, 4.0))
CATEGORIES = ("cat", "fox")


@pytest.fixture
def seen(generator: torch.Generator) -> SeenPhotos:
    """Filters 0 to 3 are on the head in photos of category 0 and anywhere in those of category 1, 4 to 7 on the tail
    in photos of category 1 and anywhere in those of category 0."""
    photos = 60
    marks = torch.randint(0, SIDE, (photos, 2, 2), generator=generator)
    cells = torch.randint(0, SIDE, (photos, 8, 2), generator=generator)
    labels = torch.arange(photos) % 2
    cells[labels == 0, :4] = marks[labels == 0, :1]
    cells[labels == 1, 4:] = marks[labels == 1, 1:]
    peaks = peaks_from_cells(cells, torch.rand(photos, 8, generator=generator) + 0.1, (SIDE, SIDE), *GRID)
    return SeenPhotos(
        maps=torch.rand(photos, 5, SIDE, SIDE, generator=generator),
        peaks=peaks,
        outputs=torch.rand(photos, 3),
        landmarks=marks.flip(-1).double() * 4 + 2,
        names=("head", "tail"),
        photos=torch.arange(photos),
        labels=labels,
        assigned=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
        grid=GRID,
        size_px=(32, 32),
    )


def _one_category(seen: SeenPhotos) -> SeenPhotos:
    return dataclasses.replace(seen, labels=0 * seen.labels, assigned=0 * seen.assigned)


def test_filters_get_the_part_that_they_hold_on_their_own_category(
    seen: SeenPhotos, generator: torch.Generator
) -> None:
    found = find_parts("landmarks", seen, CATEGORIES, HOW, generator)
    assert [row.part for row in found.filters] == ["cat: head"] * 4 + ["fox: tail"] * 4
    assert [row.filter for row in found.filters] == list(range(8))
    assert {part.id: (part.category, part.filters) for part in found.parts} == {
        "cat: head": ("cat", (0, 1, 2, 3)),
        "cat: tail": ("cat", ()),
        "cat: other": ("cat", ()),
        "fox: tail": ("fox", (4, 5, 6, 7)),
        "fox: head": ("fox", ()),
        "fox: other": ("fox", ()),
    }
    assert [(one.category, one.photos) for one in found.evidence] == [("cat", 30), ("fox", 30)]
    for one in found.evidence:
        assert 0 < one.null_distance_mean_frac < 1
        assert one.null_consistency_p95 < 0.8
        assert one.null_kept_frac <= 0.06
        assert one.clusters == 0
    stability = assignment_stability(found.assign, seen.photos, generator=generator, rounds=4, matched=False)
    assert stability.adjusted_rand.value == 1
    assert stability.kept.value > 0.8  # in a half with fewer than ten photos of a category nothing is known
    # On the photos of both, none of them follows anything closely.
    mixed = find_parts("landmarks", _one_category(seen), ("",), HOW, generator)
    assert max(row.consistency for row in mixed.filters) < 0.8 < min(row.consistency for row in found.filters)
    assert {part.id for part in mixed.parts} == {"head", "tail", "other"}


def test_thresholds_that_are_given_decide(seen: SeenPhotos, generator: torch.Generator) -> None:
    strict = HOW.changed({"consistency_min": 1.0})
    assert {row.part for row in find_parts("landmarks", seen, CATEGORIES, strict, generator).filters} == {
        "cat: other",
        "fox: other",
    }
    near = HOW.changed({"distance_max_frac": 0.0, "consistency_min": -1.0})
    found = find_parts("landmarks", seen, CATEGORIES, near, generator)
    # These peaks are on the landmarks themselves: at distance 0, which is still allowed.
    assert [row.part for row in found.filters] == ["cat: head"] * 4 + ["fox: tail"] * 4
    assert {row.distance_frac for row in found.filters} == {0.0}


def test_groups_are_found_within_categories(seen: SeenPhotos, generator: torch.Generator) -> None:
    found = find_parts("clusters", seen, CATEGORIES, HOW, generator)
    assert sorted(k for part in found.parts for k in part.filters) == list(range(8))
    for part in found.parts:
        assert {k < 4 for k in part.filters} <= {part.category == "cat"}
    assert "cat: part 1" in {part.id for part in found.parts}
    for row in found.filters:
        assert (row.agreement > row.agreement_min) == (not row.part.endswith("other")) or math.isnan(row.agreement)
    for one in found.evidence:
        assert one.silhouettes[str(one.clusters)] == max(one.silhouettes.values())
        assert one.null_silhouette.n == 10


def test_groups_of_different_categories_are_different_groups(seen: SeenPhotos, generator: torch.Generator) -> None:
    found = find_parts("clusters", seen, CATEGORIES, HOW, generator)
    labels = found.assign(torch.arange(60))
    assert not set(labels[:4].tolist()) & set(labels[4:].tolist()) - {-1}
    assert int(labels[:4].max()) >= 0
    assert int(labels[4:].max()) >= 0


def test_a_filter_that_moves_alone_is_in_no_part(seen: SeenPhotos, generator: torch.Generator) -> None:
    marks = torch.randint(0, SIDE, (60, 2, 2), generator=generator)
    cells = torch.cat([marks[:, :1].expand(-1, 4, -1), marks[:, 1:].expand(-1, 3, -1)], 1)
    cells = torch.cat([cells, torch.randint(0, SIDE, (60, 1, 2), generator=generator)], 1)
    alone = dataclasses.replace(
        _one_category(seen), peaks=peaks_from_cells(cells, seen.peaks.scores, (SIDE, SIDE), *GRID)
    )
    two = HOW.changed({"clusters_max": 2})
    found = find_parts("clusters", alone, ("",), two, generator)
    assert {part.id: part.filters for part in found.parts} == {
        "part 1": (0, 1, 2, 3),
        "part 2": (4, 5, 6),
        "other": (7,),
    }
    assert found.filters[7].agreement <= found.filters[7].agreement_min


def test_a_category_without_photos_or_filters_says_so(seen: SeenPhotos, generator: torch.Generator) -> None:
    labels = torch.zeros(60, dtype=torch.long)
    labels[0] = 2
    few = dataclasses.replace(seen, labels=labels, assigned=torch.tensor([0, 0, 0, 0, 2, 2, 2, 2]))
    found = find_parts("landmarks", few, ("cat", "dog", "fox"), HOW, generator)
    assert [row.part for row in found.filters[4:]] == ["fox: other"] * 4
    assert {part.category for part in found.parts} == {"cat", "fox"}
    assert [(one.category, one.photos) for one in found.evidence] == [("cat", 59), ("fox", 1)]
    assert set(found.assign(torch.arange(60)).tolist()[4:]) == {-1}


def test_a_dead_filter_has_no_part(seen: SeenPhotos, generator: torch.Generator) -> None:
    seen.peaks.scores[seen.labels == 0, 1] = 0.0  # on the photos of its own category
    for rule in ("landmarks", "clusters"):
        found = find_parts(rule, seen, CATEGORIES, HOW, generator)
        assert found.filters[1].part == "cat: other"
        assert [row.dead for row in found.filters] == [False, True] + [False] * 6


def test_landmarks_are_the_rule_only_where_every_category_has_twenty(seen: SeenPhotos) -> None:
    assert chosen_rule("auto", seen) == "landmarks"
    shown = (seen.labels == 1).nonzero()[:, 0]
    seen.landmarks[shown[20:]] = torch.nan
    assert chosen_rule("auto", seen) == "landmarks"
    seen.landmarks[shown[19:]] = torch.nan
    assert chosen_rule("auto", seen) == "clusters"
    assert chosen_rule("landmarks", seen) == "landmarks"
    none = dataclasses.replace(seen, landmarks=seen.landmarks[:, :0], names=())
    assert chosen_rule("auto", none) == "clusters"
    assert chosen_rule("clusters", seen) == "clusters"
