"""What must hold for any maps, not for chosen ones."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from partlens.explainer.filter_loss import filter_loss
from partlens.explainer.network import NormLayer
from partlens.explainer.templates import (
    centroid_cells,
    mask_around,
    mask_at_peak,
    part_templates,
    peak_cells,
    peak_masks,
)
from partlens.metrics.localisation import Peaks, distinct_parts, instability_per_filter, spread_per_filter

sides = st.integers(2, 7)
seeds = st.integers(0, 10_000)


def maps_of(seed: int, count: int, side: int, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, 2, side, side, generator=generator, dtype=torch.float64) * scale).clamp(min=0)


@given(seeds, st.integers(1, 9), sides, st.sampled_from([0.1, 10.0, 1000.0, 1e5]))
def test_filter_loss_stays_within_its_bounds(seed: int, count: int, side: int, scale: float) -> None:
    loss = filter_loss(maps_of(seed, count, side, scale), part_templates(side, dtype=torch.float64))
    assert bool((loss <= 1e-9).all())
    assert bool((loss >= -math.log(min(count, side * side + 1)) - 1e-9).all())


@given(seeds, st.integers(2, 6), sides)
def test_filter_loss_does_not_care_for_the_order_of_images(seed: int, count: int, side: int) -> None:
    maps = maps_of(seed, count, side, 50.0)
    family = part_templates(side, dtype=torch.float64)
    assert torch.allclose(filter_loss(maps, family), filter_loss(maps.flip(0), family), atol=1e-12)


@given(seeds, st.integers(2, 5), sides)
def test_mirroring_all_maps_keeps_the_loss(seed: int, count: int, side: int) -> None:
    maps = maps_of(seed, count, side, 50.0)
    family = part_templates(side, dtype=torch.float64)
    assert torch.allclose(filter_loss(maps, family), filter_loss(maps.flip(3), family), atol=1e-10)


@given(seeds, sides)
def test_masking_keeps_the_peak_and_never_adds(seed: int, side: int) -> None:
    maps = maps_of(seed, 3, side, 1.0)
    masked = mask_at_peak(maps, peak_masks(side, dtype=torch.float64))
    assert torch.equal(masked.flatten(2).amax(-1), maps.flatten(2).amax(-1))
    assert bool((masked <= maps).all())
    assert bool((masked >= 0).all())


@given(seeds, sides)
def test_a_mask_around_the_largest_cell_is_the_papers(seed: int, side: int) -> None:
    maps = maps_of(seed, 3, side, 1.0)
    index = peak_cells(maps)
    places = torch.stack([index // side, index % side], -1).double()
    paper = mask_at_peak(maps, peak_masks(side, dtype=torch.float64))
    assert torch.allclose(mask_around(maps, places), paper, atol=1e-12)


@given(seeds, sides, st.floats(1, 8), st.floats(1e-3, 1e3))
def test_a_centroid_lies_in_the_map_moves_with_it_and_ignores_its_scale(
    seed: int, side: int, power: float, scale: float
) -> None:
    maps = maps_of(seed, 3, side, 1.0)
    places = centroid_cells(maps, power)
    assert bool(((places >= -1e-4) & (places <= side - 1 + 1e-4)).all())
    assert torch.allclose(centroid_cells(maps * scale, power), places, atol=1e-3)
    shifted = torch.nn.functional.pad(maps, (2, 1, 1, 3))
    answers = maps.flatten(2).amax(-1) > 0
    moved = centroid_cells(shifted, power)[answers] - places[answers]
    assert torch.allclose(moved, torch.tensor([1.0, 2.0]).expand_as(moved), atol=1e-3)


@given(seeds, sides)
def test_a_centroid_of_a_high_power_is_the_largest_cell(seed: int, side: int) -> None:
    maps = maps_of(seed, 3, side, 1.0)
    top = maps.flatten(2).topk(2, -1).values
    clear = top[..., 1] < 0.9 * top[..., 0]
    index = peak_cells(maps)
    largest = torch.stack([index // side, index % side], -1).float()
    assert torch.allclose(centroid_cells(maps, 200.0)[clear], largest[clear], atol=1e-3)


@given(seeds, st.floats(0.01, 100))
def test_norm_layer_undoes_any_scale(seed: int, scale: float) -> None:
    maps = maps_of(seed, 6, 5, 1.0).float() + 0.01
    results = []
    for factor in (1.0, scale):
        norm = NormLayer(2, floor=0.0).train()
        results.append(norm(maps * factor))
    assert torch.allclose(results[0], results[1], rtol=1e-4)


@given(seeds, st.integers(3, 30), st.integers(1, 6))
def test_localisation_scores_are_within_their_ranges(seed: int, images: int, filters: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randint(0, 9, (images, filters, 2), generator=generator).double()
    peaks = Peaks(cells, cells.flip(-1) * 16 + 8, torch.rand(images, filters, generator=generator).double(), (9, 9))
    truth = torch.rand(images, 2, 2, generator=generator) * 144
    instability = instability_per_filter(peaks, truth, (144, 144))
    assert bool(((instability >= 0) & (instability <= 1)).all())
    assert bool((spread_per_filter(peaks) >= 0).all())
    parts = distinct_parts(peaks, torch.ones(filters, dtype=torch.bool))
    assert 1 - 1e-9 <= parts <= filters + 1e-9
