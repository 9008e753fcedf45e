"""Rules that give filters their parts: by hand, by loops, and on peaks whose parts are known."""

from __future__ import annotations

import math

import pytest
import torch

from partlens.errors import InputError
from partlens.object_parts.assignment import (
    OTHER,
    agreement_thresholds,
    agreement_with_group,
    by_size,
    clustered,
    filter_vectors,
    landmark_distances,
    nearest_landmark,
    parts_by_landmark,
    peak_features,
    place_vectors,
    upsampled,
)


def test_distances_equal_the_loop(generator: torch.Generator) -> None:
    peaks = torch.rand(9, 4, 2, generator=generator, dtype=torch.float64) * 100
    truth = torch.rand(9, 3, 2, generator=generator, dtype=torch.float64) * 100
    truth[2:5, 0] = math.nan
    truth[1:, 1] = math.nan
    truth[:, 2] = math.nan
    found = landmark_distances(peaks, truth, 141.0)
    for f in range(4):
        for k in range(3):
            apart = [
                math.dist(peaks[i, f].tolist(), truth[i, k].tolist()) / 141.0
                for i in range(9)
                if not math.isnan(float(truth[i, k, 0]))
            ]
            if not apart:
                assert math.isnan(float(found[f, k]))
                continue
            assert float(found[f, k]) == pytest.approx(sum(apart) / len(apart))
    with pytest.raises(InputError, match="landmarks of 9 images like the peaks, got 2"):
        landmark_distances(peaks, truth[:2], 141.0)


def test_a_filter_is_other_when_it_is_dead_far_or_follows_nothing() -> None:
    mean = torch.tensor([[0.1, 0.3], [0.3, 0.1], [0.1, 0.3], [0.1, 0.3], [0.25, 0.3]], dtype=torch.float64)
    follows = torch.tensor([[0.5, 0.9], [0.9, 0.5], [0.5, 0.9], [0.01, 0.9], [0.5, 0.9]], dtype=torch.float64)
    live = torch.tensor([True, True, False, True, True])
    limits = {"distance_max_frac": 0.2, "consistency_min": 0.05}
    assert parts_by_landmark(mean, follows, live, **limits).tolist() == [0, 1, OTHER, OTHER, OTHER]
    follows[:, 1] = math.nan  # too few photos of the second landmark: it is no candidate
    assert parts_by_landmark(mean, follows, live, **limits).tolist() == [0, OTHER, OTHER, OTHER, OTHER]
    with pytest.raises(InputError, match="a landmark that enough photos show, got none. Use rule clusters"):
        nearest_landmark(mean, torch.tensor([False, False]))


def _moving(generator: torch.Generator, images: int = 40) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Return peaks of three groups of filters that follow three parts, and maps with other features at each."""
    centres = torch.randint(3, 11, (images, 3, 2), generator=generator)
    group = [0] * 9 + [1] * 6 + [2] * 5
    noise = torch.randint(-1, 2, (images, len(group), 2), generator=generator)
    cells = (centres[:, group] + noise).double()
    maps = 0.1 * torch.rand(images, 6, 14, 14, generator=generator)
    for i in range(images):
        for part in range(3):
            row, col = centres[i, part].tolist()
            maps[i, 2 * part, row - 1 : row + 2, col - 1 : col + 2] += 1.0
    return cells, maps, group


def test_groups_that_move_together_are_found(generator: torch.Generator) -> None:
    cells, maps, group = _moving(generator)
    live = torch.ones(20, dtype=torch.bool)
    live[3] = False
    found = clustered(filter_vectors(cells, peak_features(maps, cells)), live, fewest=2, most=8)
    assert found.count == 3
    wanted = torch.tensor(group)
    wanted[3] = OTHER
    assert torch.equal(found.labels, wanted)
    assert max(found.silhouette, key=found.silhouette.__getitem__) == 3
    assert clustered(torch.rand(20, 4), torch.zeros(20, dtype=torch.bool)).labels.tolist() == [OTHER] * 20


def test_a_random_peak_does_not_agree_with_a_group(generator: torch.Generator) -> None:
    cells, _, group = _moving(generator)
    cells[:, 0] = torch.randint(0, 14, (40, 2), generator=generator).double()
    cells[:, 10] = 5.0  # a peak that never moves
    place, labels = place_vectors(cells), torch.tensor(group)
    drawn = torch.randint(0, 14, (40, 500, 2), generator=generator).double()
    agrees = agreement_with_group(place, labels) > agreement_thresholds(place, labels, place_vectors(drawn), 0.998)
    assert (~agrees).nonzero()[:, 0].tolist() == [0, 10]
    assert math.isnan(float(agreement_with_group(place, torch.tensor([0] + [OTHER] * 19))[0]))


def test_agreement_is_the_mean_correlation_with_the_others(generator: torch.Generator) -> None:
    cells = torch.rand(12, 3, 2, generator=generator, dtype=torch.float64)
    found = agreement_with_group(place_vectors(cells), torch.tensor([0, 0, 0]))
    flat = (cells - cells.mean(0)).permute(1, 0, 2).flatten(1)
    wanted = [float(torch.nn.functional.cosine_similarity(flat[0], flat[k], dim=0)) for k in (1, 2)]
    assert float(found[0]) == pytest.approx(sum(wanted) / 2)


def test_features_at_peaks_equal_the_loop(generator: torch.Generator) -> None:
    maps = torch.rand(4, 5, 3, 6, generator=generator)
    cells = torch.stack(
        [torch.randint(0, 3, (4, 7), generator=generator), torch.randint(0, 6, (4, 7), generator=generator)], -1
    )
    found = peak_features(maps, cells.double())
    for f in range(7):
        wanted = sum(maps[i, :, int(cells[i, f, 0]), int(cells[i, f, 1])] for i in range(4)) / 4
        assert torch.allclose(found[f].float(), wanted, atol=1e-6)
    between = cells.double() + 0.4 * (2 * torch.rand(4, 7, 2, generator=generator) - 1)
    assert torch.equal(peak_features(maps, between), found)


def test_groups_are_numbered_by_size() -> None:
    assert by_size(torch.tensor([5, 2, 2, OTHER, 5, 2])).tolist() == [1, 0, 0, OTHER, 1, 0]
    assert by_size(torch.tensor([OTHER])).tolist() == [OTHER]


def test_a_cell_stands_at_the_middle_of_its_field() -> None:
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 1, 2] = 1
    large = upsampled(maps, (0.5, 0.5), (16.0, 16.0), (64, 64))
    assert large.shape == (1, 1, 64, 64)
    assert divmod(int(large.argmax()), 64) == (16, 32)
    assert float(large[0, 0, 24, 32]) == pytest.approx(0.5)
