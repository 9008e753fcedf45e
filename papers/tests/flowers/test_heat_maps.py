"""Scores of heat maps: cases worked by hand, what they must not depend on, and what they refuse."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn

from partlens.errors import InputError
from partlens_papers.flowers.heat_maps import (
    THRESHOLDS,
    both_parts_covered,
    centre_box_maps,
    edge_maps,
    insertion_deletion,
    iou_auc,
    iou_curve,
    iou_per_image,
    normalised,
    part_recall,
    pointing_game,
    random_maps,
)


def left_half(images: int = 1, side: int = 8) -> Tensor:
    mask = torch.zeros(images, side, side, dtype=torch.bool)
    mask[:, :, : side // 2] = True
    return mask


def test_a_perfect_map_scores_100_and_others_what_is_worked_out_by_hand() -> None:
    mask = left_half()
    assert iou_auc(mask.float(), mask).item() == 100
    assert iou_auc(torch.ones(1, 8, 8), mask).item() == 50
    assert iou_auc(torch.zeros(1, 8, 8), mask).item() == 0
    assert iou_auc((~mask).float(), mask).item() == 0
    half_in = torch.zeros(1, 8, 8)
    half_in[:, :, 2:6] = 1  # 16 pixels in, 16 out, 16 missed
    assert iou_auc(half_in, mask).item() == pytest.approx(100 / 3)


def test_a_ramp_gives_the_integral() -> None:
    """h = 1 - x over a region of all pixels: IoU(t) = 1 - t, its integral is a half."""
    ramp = ((torch.arange(1000) + 0.5) / 1000).expand(1, 1, 1000)
    everything = torch.ones(1, 1, 1000, dtype=torch.bool)
    assert iou_auc(ramp, everything).item() == pytest.approx(50, abs=0.1)
    curve = iou_curve(ramp, everything)
    assert curve.tolist() == pytest.approx([1 - t for t in THRESHOLDS], abs=2e-3)
    assert len(curve) == 20
    assert THRESHOLDS[0] == 0.025
    assert THRESHOLDS[-1] == 0.975


def test_scores_are_per_image_whatever_else_is_in_the_batch() -> None:
    maps, masks = torch.rand(6, 8, 8), torch.rand(6, 8, 8) < 0.3
    parts = torch.stack([masks, ~masks], 1)
    for score in (
        lambda i: iou_auc(maps[i], masks[i]),
        lambda i: iou_per_image(maps[i], masks[i]),
        lambda i: part_recall(maps[i], parts[i]),
        lambda i: pointing_game(maps[i], masks[i], 2.0),
    ):
        torch.testing.assert_close(score(slice(0, 6)), torch.cat([score(slice(k, k + 1)) for k in range(6)]))
        torch.testing.assert_close(score([3, 1]), score(slice(0, 6))[[3, 1]])


def test_an_empty_mask_is_undefined_only_under_an_empty_map() -> None:
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    assert iou_auc(torch.zeros(1, 4, 4), nothing).isnan().all()
    assert iou_auc(torch.ones(1, 4, 4), nothing).item() == 0
    assert pointing_game(torch.ones(1, 4, 4), nothing).isnan().all()


def test_a_map_of_one_part_alone_does_not_cover_both() -> None:
    """T20: the petals alone miss the stem; the union covers both."""
    petal, stem = torch.zeros(8, 8, dtype=torch.bool), torch.zeros(8, 8, dtype=torch.bool)
    petal[:3], stem[3:, 4] = True, True
    parts = torch.stack([petal, stem]).expand(3, 2, 8, 8)
    maps = torch.stack([petal, stem, petal | stem]).float()
    assert part_recall(maps, parts).tolist() == [[1, 0], [0, 1], [1, 1]]
    assert both_parts_covered(maps, parts).tolist() == [0, 0, 1]


def test_recall_counts_ties_by_their_share_and_spends_nothing_on_zeros() -> None:
    parts = left_half()[:, None]
    assert part_recall(torch.full((1, 8, 8), 0.5), parts).item() == pytest.approx(0.5)
    assert part_recall(torch.zeros(1, 8, 8), parts).item() == 0
    assert part_recall(torch.rand(1, 8, 8) * 0.5, parts, budget=2.0).item() == 1
    noise = random_maps(1, (256, 256), generator=torch.Generator().manual_seed(0))
    assert part_recall(noise, left_half(side=256)[:, None]).item() == pytest.approx(0.5, abs=0.02)


def test_recall_does_not_depend_on_the_maps_scale() -> None:
    maps, parts = torch.rand(5, 8, 8), left_half(5)[:, None]
    torch.testing.assert_close(part_recall(maps**3, parts), part_recall(maps, parts))


def test_pointing_with_ties_and_tolerance() -> None:
    mask = left_half()
    point = torch.zeros(1, 8, 8)
    point[0, 4, 6] = 1  # three columns to the right of the region
    assert [pointing_game(point, mask, t).item() for t in (0.0, 1.0, 2.9, 3.0)] == [0, 0, 0, 1]
    assert pointing_game(torch.zeros(1, 8, 8), mask).item() == 0.5
    point[0, 0, 0] = 1
    assert pointing_game(point, mask).item() == 0.5


def test_insertion_and_deletion_of_a_network_that_looks_at_one_pixel() -> None:
    class First(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images[:, 0, 0, 0] * 100 - 50, torch.zeros(len(images))], 1)

    images, classes = torch.ones(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    maps = torch.zeros(2, 4, 4)
    maps[0, 0, 0] = 1  # finds it at once
    maps[1] = 1
    maps[1, 0, 0] = 0  # finds it last
    inserted, deleted = insertion_deletion(
        First(), images, maps, classes, torch.zeros(1, 1, 1, 1), steps=16, generator=torch.Generator().manual_seed(0)
    )
    assert inserted.tolist() == pytest.approx([1 - 1 / 32, 1 / 32])
    assert deleted.tolist() == pytest.approx([1 / 32, 1 - 1 / 32])


def test_equal_pixels_are_ranked_by_chance_from_the_seed() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    images, maps = torch.rand(3, 1, 4, 4), torch.zeros(3, 4, 4)

    def score(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        zeros = torch.zeros(1, 1, 1, 1)
        return insertion_deletion(network, images, maps, torch.zeros(3).long(), zeros, generator=generator)[0]

    assert torch.equal(score(1), score(1))
    assert not torch.equal(score(1), score(2))


def test_null_maps() -> None:
    generator = torch.Generator().manual_seed(5)
    first = random_maps(2, (6, 7), generator=generator)
    assert first.shape == (2, 6, 7)
    assert not torch.equal(first, random_maps(2, (6, 7), generator=generator))
    assert torch.equal(first, random_maps(2, (6, 7), generator=torch.Generator().manual_seed(5)))
    box = centre_box_maps(2, (8, 12))
    assert box.sum((1, 2)).tolist() == [24, 24]
    assert box[0, 2:6, 3:9].all()
    assert centre_box_maps(1, (9, 9), 0.01).sum() == 1
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    found = edge_maps(edge)[0]
    assert found[:, 3:5].min() == 1
    assert found[:, :3].max() == found[:, 5:].max() == 0
    assert edge_maps(torch.ones(1, 3, 5, 5)).sum() == 0
    assert normalised(torch.tensor([[[-1.0, 1.0]], [[7.0, 7.0]]])).tolist() == [[[0, 1]], [[0, 0]]]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m, k: iou_auc(m * 2, k), "heat maps from 0 to 1, got values from 0 to 2. Scale each map"),
        (lambda m, k: iou_auc(m * math.nan, k), "heat maps from 0 to 1, got values from nan to nan"),
        (lambda m, k: iou_auc(m[:0], k[:0]), "at least one image"),
        (lambda m, k: iou_auc(m, k, [0.5, 0.1]), "ascending thresholds"),
        (lambda m, k: iou_auc(m, k, [0.5, 1.0]), "ascending thresholds"),
        (lambda m, k: iou_auc(m, k, []), "ascending thresholds"),
        (lambda m, k: part_recall(m, k[:, None], 0.0), "a budget above 0, got 0.0"),
        (lambda m, k: both_parts_covered(m, k[:, None], 0.0), "a share above 0, up to 1, got 0.0"),
        (lambda m, k: pointing_game(m, k, -1.0), "a tolerance of at least 0 px, got -1.0"),
        (lambda m, k: centre_box_maps(1, (4, 4), 0.0), "side_frac above 0"),
    ],
)
def test_refusals(call: object, text: str) -> None:
    maps = torch.ones(2, 4, 4)
    maps[:, 0] = 0
    masks = torch.ones(2, 4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match=text):
        call(maps, masks)  # type: ignore[operator]


def test_other_shapes_are_refused_by_name_where_annotations_are_not_checked() -> None:
    unchecked = inspect.unwrap(iou_per_image)
    with pytest.raises(InputError, match=r"masks of 2 images with 4x4 px, got shape \(2, 3, 4\)"):
        unchecked(torch.rand(2, 4, 4), torch.ones(2, 3, 4, dtype=torch.bool))


def test_insertion_refusals() -> None:
    images, maps, classes = torch.rand(2, 1, 4, 4), torch.rand(2, 4, 4), torch.zeros(2).long()
    zeros, generator = torch.zeros(1, 1, 1, 1), torch.Generator()
    with pytest.raises(InputError, match="steps >= 1, got 0"):
        insertion_deletion(nn.Flatten(), images, maps, classes, zeros, steps=0, generator=generator)
    unchecked = inspect.unwrap(insertion_deletion)
    with pytest.raises(InputError, match=r"maps of shape \(2, 4, 4\), got \(2, 3, 3\)"):
        unchecked(nn.Flatten(), images, torch.rand(2, 3, 3), classes, zeros, generator=generator)
