"""Scores of heat maps against their definitions as slow loops over images, thresholds and pixels."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from partlens_papers.flowers.heat_maps import (
    THRESHOLDS,
    both_parts_covered,
    edge_maps,
    insertion_deletion,
    iou_auc,
    iou_curve,
    iou_per_image,
    part_recall,
    pointing_game,
)

SIZE = (7, 9)


def some_maps(images: int = 6) -> Tensor:
    """Values with many ties, among them thresholds themselves."""
    maps = (torch.rand(images, *SIZE) * 20).round() / 20
    maps[0] = 0
    return maps


def some_parts(images: int = 6) -> Tensor:
    owner = torch.randint(0, 4, (images, *SIZE))
    owner[1] = owner[1].where(owner[1] != 2, 0)  # one part unseen
    owner[2] = 0  # no part at all
    return torch.stack([owner == 1, owner == 2], 1)


def pixels() -> list[tuple[int, int]]:
    return [(r, c) for r in range(SIZE[0]) for c in range(SIZE[1])]


def iou_by_loops(heat: Tensor, mask: Tensor, threshold: float) -> float:
    both = either = 0
    for r, c in pixels():
        hot = float(heat[r, c]) > threshold
        both += hot and bool(mask[r, c])
        either += hot or bool(mask[r, c])
    return both / either if either else math.nan


def test_iou() -> None:
    maps, masks = some_maps().double(), some_parts().any(1)
    thresholds = (0.0, 0.25, 0.5, 0.7, 0.95)  # 0.7 and 0.95 are values that occur
    want = [[iou_by_loops(h, m, t) for t in thresholds] for h, m in zip(maps, masks, strict=True)]
    got = iou_per_image(maps, masks, thresholds)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), equal_nan=True, rtol=0, atol=1e-15)
    assert got[2].isnan().sum() < 5  # an empty mask is undefined only where the map is empty too
    torch.testing.assert_close(iou_curve(maps, masks, thresholds), got.nanmean(0))
    area = [
        100 * sum(iou_by_loops(h, m, t) for t in THRESHOLDS) / len(THRESHOLDS) for h, m in zip(maps, masks, strict=True)
    ]
    torch.testing.assert_close(iou_auc(maps, masks), torch.tensor(area, dtype=torch.float64), equal_nan=True)


def recall_by_loops(heat: Tensor, parts: Tensor, budget: float) -> list[float]:
    count = min(round(budget * int(parts.sum())), len(pixels()))
    ranked = sorted((float(heat[p]) for p in pixels()), reverse=True)
    limit = ranked[count - 1] if count else math.inf
    above = [p for p in pixels() if float(heat[p]) > limit]
    tied = [p for p in pixels() if float(heat[p]) == limit and limit > 0]
    share = (count - len(above)) / len(tied) if tied else 0.0
    found = []
    for part in parts:
        seen = int(part.sum())
        spent = sum(bool(part[p]) for p in above) + share * sum(bool(part[p]) for p in tied)
        found.append(spent / seen if seen else math.nan)
    return found


@pytest.mark.parametrize("budget", [1.0, 0.5, 2.0])
def test_part_recall(budget: float) -> None:
    maps, parts = some_maps(), some_parts()
    want = torch.tensor([recall_by_loops(h, p, budget) for h, p in zip(maps, parts, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(part_recall(maps, parts, budget), want, equal_nan=True)
    least = [math.nan if any(map(math.isnan, row)) else float(min(row) >= 0.3) for row in want.tolist()]
    covered = both_parts_covered(maps, parts, 0.3, budget)
    torch.testing.assert_close(covered, torch.tensor(least, dtype=torch.float64), equal_nan=True)
    assert budget != 1 or {0.0, 1.0} <= set(covered.tolist())


@pytest.mark.parametrize("tolerance", [0.0, 1.0, 1.5, 2.0])
def test_pointing_game(tolerance: float) -> None:
    maps = (torch.rand(8, *SIZE) * 4).round() / 4
    masks = torch.rand(8, *SIZE) < 0.06
    masks[3] = False
    want = []
    for heat, mask in zip(maps, masks, strict=True):
        top = [p for p in pixels() if float(heat[p]) == float(heat.max())]
        region = [p for p in pixels() if bool(mask[p])]
        hits = [any(math.dist(p, q) <= tolerance for q in region) for p in top]
        want.append(sum(hits) / len(top) if region else math.nan)
    got = pointing_game(maps, masks, tolerance)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), equal_nan=True)


def test_insertion_and_deletion() -> None:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(2 * 12, 3)).requires_grad_(False)
    images, baseline = torch.rand(4, 2, 3, 4), torch.full((1, 2, 1, 1), 0.3)
    maps = torch.rand(4, 3, 4)  # no ties, so that no chance enters
    classes, steps = torch.tensor([0, 1, 2, 1]), 5
    inserted, deleted = insertion_deletion(
        network, images, maps, classes, baseline, steps=steps, generator=torch.Generator()
    )
    for i in range(4):
        order = sorted(((r, c) for r in range(3) for c in range(4)), key=lambda p: -float(maps[i][p]))
        for got, start, other in ((inserted, baseline[0].expand(2, 3, 4), images[i]),
                                  (deleted, images[i], baseline[0].expand(2, 3, 4))):  # fmt: skip
            curve = []
            for step in range(steps + 1):
                picture = start.clone()
                for rank, (r, c) in enumerate(order):
                    if rank < step / steps * 12:
                        picture[:, r, c] = other[:, r, c]
                curve.append(float(network(picture[None]).softmax(1)[0, classes[i]]))
            area = sum((a + b) / 2 for a, b in itertools.pairwise(curve)) / steps
            assert float(got[i]) == pytest.approx(area, abs=1e-6)


def test_edges() -> None:
    images = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    sobel = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))
    for image, got in zip(images, edge_maps(images), strict=True):
        length = torch.zeros(SIZE, dtype=torch.float64)
        for r, c in pixels():
            total = 0.0
            for channel in image:
                across = down = 0.0
                for i in range(3):
                    for j in range(3):
                        row, col = min(max(r + i - 1, 0), SIZE[0] - 1), min(max(c + j - 1, 0), SIZE[1] - 1)
                        across += sobel[i][j] * float(channel[row, col])
                        down += sobel[j][i] * float(channel[row, col])
                total += across**2 + down**2
            length[r, c] = math.sqrt(total)
        torch.testing.assert_close(got, (length - length.min()) / (length.max() - length.min()))
