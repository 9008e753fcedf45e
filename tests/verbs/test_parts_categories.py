"""Parts of explainers of several categories: a filter is measured on the photos of its own."""

from __future__ import annotations

import pytest
import torch

from partlens.metrics.localisation import peaks_from_cells
from partlens.metrics.parts import assignment_stability
from partlens.network.zoo import Performer
from partlens.object_parts.assignment import PartsConfig
from partlens.verbs.parts_categories import SharedFilters, by_category, rule_of_all
from partlens.verbs.parts_rules import SeenPhotos, by_clusters, by_landmarks

SIDE = 8
HOW = PartsConfig(null_filters=200, rounds=4, clusters_min=2, clusters_max=3)


@pytest.fixture
def seen(generator: torch.Generator) -> SeenPhotos:
    """Filters 0 to 3 stand on the head in photos of category 0 and anywhere in those of category 1, 4 to 7 on the tail
    in photos of category 1 and anywhere in those of category 0."""
    photos = 60
    marks = torch.randint(0, SIDE, (photos, 2, 2), generator=generator)
    cells = torch.randint(0, SIDE, (photos, 8, 2), generator=generator)
    labels = torch.arange(photos) % 2
    cells[labels == 0, :4] = marks[labels == 0, :1]
    cells[labels == 1, 4:] = marks[labels == 1, 1:]
    peaks = peaks_from_cells(
        cells, torch.rand(photos, 8, generator=generator) + 0.1, (SIDE, SIDE), (2.0, 2.0), (4.0, 4.0)
    )
    landmarks = marks.flip(-1).double() * 4 + 2
    maps = torch.rand(photos, 5, SIDE, SIDE, generator=generator)
    return SeenPhotos(maps, peaks, torch.rand(photos, 3), landmarks, ("head", "tail"), torch.arange(photos))


@pytest.fixture
def shared() -> SharedFilters:
    return SharedFilters(("cat", "fox"), torch.arange(60) % 2, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))


def test_filters_get_the_part_that_they_hold_on_their_own_category(
    seen: SeenPhotos, shared: SharedFilters, tiny: Performer, generator: torch.Generator
) -> None:
    found = by_category(by_landmarks, shared, seen, tiny, HOW, generator)
    assert [row["part"] for row in found.filters] == ["cat: head"] * 4 + ["fox: tail"] * 4
    assert [row["category"] for row in found.filters] == ["cat"] * 4 + ["fox"] * 4
    held = {part["id"]: part["filters"] for part in found.parts}
    assert held == {
        "cat: head": [0, 1, 2, 3],
        "cat: tail": [],
        "cat: other": [],
        "fox: tail": [4, 5, 6, 7],
        "fox: head": [],
        "fox: other": [],
    }
    assert set(found.thresholds["by_category"]) == {"cat", "fox"}
    assert 0 < found.null["distance_frac_mean"] < 1
    stability = assignment_stability(found.assign, seen.photos, generator=generator, rounds=4, matched=found.matched)
    assert stability.adjusted_rand.value == 1
    assert stability.kept.value > 0.8  # in a half with fewer than ten photos of a category nothing is known
    # On the photos of both, none of them follows anything closely.
    mixed = by_landmarks(seen, tiny, HOW, generator)
    assert max(row["consistency"] for row in mixed.filters) < 0.8 < min(row["consistency"] for row in found.filters)


def test_groups_are_found_within_categories(
    seen: SeenPhotos, shared: SharedFilters, tiny: Performer, generator: torch.Generator
) -> None:
    found = by_category(by_clusters, shared, seen, tiny, HOW, generator)
    for part in found.parts:
        assert {found.filters[k]["category"] for k in part["filters"]} <= {part["category"]}
    assert sorted(k for part in found.parts for k in part["filters"]) == list(range(8))
    assert "cat: part 1" in {part["id"] for part in found.parts}


def test_a_category_without_photos_or_filters_says_so(
    seen: SeenPhotos, tiny: Performer, generator: torch.Generator
) -> None:
    labels = torch.zeros(60, dtype=torch.long)
    labels[0] = 2
    shared = SharedFilters(("cat", "dog", "fox"), labels, torch.tensor([0, 0, 0, 0, 2, 2, 2, 2]))
    found = by_category(by_landmarks, shared, seen, tiny, HOW, generator)
    assert [row["part"] for row in found.filters[4:]] == ["fox: other"] * 4
    assert not any(row["category"] == "dog" for row in found.filters)
    assert set(found.assign(torch.arange(60)).tolist()[4:]) == {-1}


def test_landmarks_are_the_rule_only_where_every_category_has_them(seen: SeenPhotos, shared: SharedFilters) -> None:
    assert rule_of_all("auto", seen, shared) == "landmarks"
    seen.landmarks[shared.labels == 1] = torch.nan
    assert rule_of_all("auto", seen, shared) == "clusters"
    assert rule_of_all("landmarks", seen, shared) == "landmarks"
