"""Receptive fields by occlusion against loops written from the released code's description (one filter at a time)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partlens.attribution.receptive_pictures import (
    activation_thresholds,
    occlusion_receptive_fields,
    regions,
    smoothed,
)
from partlens.attribution.record import OcclusionConfig
from partlens.network.receptive_field import ReceptiveField

SIZE = (24, 28)
FIELD = ReceptiveField(stride_px=(4, 4), size_px=(7, 7), start_px=(-2, -2))  # centres at 1.5 + 4 i
CONFIG = OcclusionConfig(occluder_px=5, stride_px=3, strongest=4, images=3, smoothing_px=6, smoothing_sigma_px=3.0)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 5, 4, stride=4), nn.Conv2d(5, 5, 3, padding=1)).double()


@pytest.fixture
def batch(generator: torch.Generator) -> Tensor:
    return torch.randn(5, 3, *SIZE, generator=generator, dtype=torch.float64)


def slow_field(network: nn.Module, batch: Tensor, k: int, config: OcclusionConfig) -> tuple[np.ndarray, float]:
    """Return one filter's field before and after smoothing, pixel by pixel."""

    def answer(image: Tensor) -> np.ndarray:
        with torch.no_grad():
            return np.maximum(network(image[None])[0, k].float().numpy().astype(np.float64), 0)

    def peak_px(x: np.ndarray) -> tuple[int, int]:
        row, col = np.unravel_index(x.argmax(), x.shape)
        return tuple(
            min(max(math.floor(FIELD.start_px[a] + FIELD.size_px[a] / 2 + FIELD.stride_px[a] * n), 0), SIZE[a] - 1)
            for a, n in enumerate((int(row), int(col)))
        )  # type: ignore[return-value]

    peaks = [answer(image).max() for image in batch]
    used = sorted(range(len(batch)), key=lambda n: (-peaks[n], n))[: config.images]
    canvas = np.zeros((2 * SIZE[0], 2 * SIZE[1]))
    for n in used:
        own = answer(batch[n])
        tried = []
        for top in range(0, SIZE[0] - config.occluder_px + 1, config.stride_px):
            for left in range(0, SIZE[1] - config.occluder_px + 1, config.stride_px):
                hidden = batch[n].clone()
                hidden[:, top : top + config.occluder_px, left : left + config.occluder_px] = 0
                x = answer(hidden)
                tried.append((x.sum(), len(tried), top, left))
        for total, _, top, left in sorted(tried)[: config.strongest]:
            at = peak_px(own)
            for row in range(top, top + config.occluder_px):
                for col in range(left, left + config.occluder_px):
                    canvas[row - at[0] + SIZE[0], col - at[1] + SIZE[1]] += max(own.sum() - total, 0)
    held, pixels = 0.0, 0
    for value in sorted(canvas.ravel(), reverse=True):
        held, pixels = held + value, pixels + 1
        if held >= 0.5 * canvas.sum() * (1 - 1e-9):
            break
    return canvas, math.sqrt(pixels)


def test_fields_are_those_of_the_loops(network: nn.Module, batch: Tensor) -> None:
    config = CONFIG.changed({"smoothing_px": 0})
    found = occlusion_receptive_fields(network, batch, FIELD, config=config, batch_size=7)
    for k in range(5):
        canvas, side = slow_field(network, batch, k, config)
        torch.testing.assert_close(found.fields[k].double(), torch.from_numpy(canvas), atol=1e-4, rtol=1e-4)
        assert float(found.effective_px[k]) == pytest.approx(side, rel=1e-5)


def test_smoothing_is_a_cut_gaussian_with_borders_repeated(generator: torch.Generator) -> None:
    picture = torch.rand(1, 6, 5, generator=generator)
    got = smoothed(picture, 4, 1.3)[0]
    weights = [math.exp(-((i - 1.5) ** 2) / (2 * 1.3**2)) for i in range(4)]
    for row in range(6):
        for col in range(5):
            total = 0.0
            for i in range(4):
                for j in range(4):
                    r, c = min(max(row + i - 1, 0), 5), min(max(col + j - 1, 0), 4)
                    total += weights[i] * weights[j] / sum(weights) ** 2 * float(picture[0, r, c])
            assert float(got[row, col]) == pytest.approx(total, rel=1e-5)


def test_thresholds_by_sorting(generator: torch.Generator) -> None:
    maps = torch.rand(7, 3, 6, 6, generator=generator)
    for share, images in ((0.02, 4), (0.3, 4), (0.001, 7)):
        got = activation_thresholds(maps, top_share=share, images=images)
        for k in range(3):
            values = sorted(maps[:, k].flatten().tolist(), reverse=True)
            peaks = sorted((float(maps[n, k].max()) for n in range(7)), reverse=True)
            want = min(values[max(1, round(share * len(values))) - 1], peaks[min(images, 7) - 1])
            assert float(got[k]) == pytest.approx(want)


def test_regions_are_those_of_the_loops(generator: torch.Generator) -> None:
    fields = torch.rand(2, 2 * SIZE[0], 2 * SIZE[1], generator=generator) ** 4
    maps = torch.rand(3, 6, 7, generator=generator) ** 3
    maps[2] = 0
    of, thresholds = torch.tensor([1, 0, 1]), torch.tensor([0.3, 5.0, 0.1])
    got = regions(maps, fields, of, thresholds, FIELD)
    for n in range(3):
        peak = float(maps[n].max())
        weight = np.zeros(SIZE)
        for i in range(6):
            for j in range(7):
                x = float(maps[n, i, j])
                value = min(1.5 * x / peak, 1) if peak and x >= min(float(thresholds[n]), peak) else 0.0
                top, left = math.floor(1.5 + 4 * i), math.floor(1.5 + 4 * j)
                for row in range(SIZE[0]):
                    for col in range(SIZE[1]):
                        there = float(fields[of[n], row - top + SIZE[0], col - left + SIZE[1]])
                        weight[row, col] = max(weight[row, col], there * value)
        want = (weight >= np.float32(0.5) * weight.max()) & (weight.max() > 0)
        assert (got[n].numpy() == want).mean() > 0.998  # float32 at the edge of the threshold
