"""Receptive fields by occlusion: networks whose field is known, what does not change the result, and pictures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from partlens.attribution.receptive_pictures import (
    OcclusionFields,
    covered,
    occluder_places,
    occlusion_receptive_fields,
    pixels_of_half,
    region_picture,
    regions,
)
from partlens.attribution.record import OcclusionConfig
from partlens.errors import InputError
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import ReceptiveField
from partlens.network.taps import forward_taps

SIDE = 32
OFFSETS = ((-4, -4), (4, 0), (0, 0), (2, -3))


def looking_at(offsets: tuple[tuple[int, int], ...]) -> nn.Sequential:
    """A stack of four 3x3 convolutions; filter k copies the pixel at offset k from its cell."""
    layers = []
    for depth in range(4):
        conv = nn.Conv2d(1 if depth == 0 else len(offsets), len(offsets), 3, padding=1, bias=False)
        nn.init.zeros_(conv.weight)
        for k, offset in enumerate(offsets):
            # Each layer takes its part of the way: at most one pixel along each axis.
            step = [max(-1, min(1, o - math.copysign(min(abs(o), depth), o))) for o in offset]
            with torch.no_grad():
                conv.weight[k, 0 if depth == 0 else k, int(step[0]) + 1, int(step[1]) + 1] = 1.0
        layers.append(conv)
    return nn.Sequential(*layers)


def field_of(network: nn.Module, tap: str, size: tuple[int, int]) -> ReceptiveField:
    return Performer(network, "", Preprocessing(size_px=size, channels=1), "").field(tap)


def dotted(places: list[tuple[int, int]]) -> Tensor:
    """Photos that are black but for one bright pixel each."""
    images = torch.zeros(len(places), 1, SIDE, SIDE)
    for image, (row, col) in zip(images, places, strict=True):
        image[0, row, col] = 1.0
    return images


EXACT = OcclusionConfig(occluder_px=5, stride_px=1, strongest=25, images=2, smoothing_px=0)


def centroid(field: Tensor) -> tuple[float, float]:
    rows, cols = (torch.arange(-side // 2, side // 2).double() for side in field.shape)
    total = field.double().sum()
    return float((field.sum(1) * rows).sum() / total), float((field.sum(0) * cols).sum() / total)


def test_a_filter_that_reads_one_pixel_has_its_field_there() -> None:
    network = looking_at(OFFSETS)
    field = field_of(network, "3", (SIDE, SIDE))
    assert field.size_px == (9, 9)
    found = occlusion_receptive_fields(network, dotted([(14, 15), (18, 13)]), field, config=EXACT)
    for k, offset in enumerate(OFFSETS):
        assert centroid(found.fields[k]) == pytest.approx(offset, abs=1e-6)
        peak = int(found.fields[k].argmax())
        assert (peak // 64 - SIDE, peak % 64 - SIDE) == offset
        # All 25 squares cover the pixel: the field is the pyramid (5-|r|)(5-|c|), nothing beyond it.
        assert torch.count_nonzero(found.fields[k]) == 81
        assert float(found.fields[k].max()) == 50.0


def test_the_place_is_that_of_the_peak_on_the_uncovered_photo() -> None:
    network = looking_at(((0, 0),))
    images = dotted([(14, 15), (18, 13)])
    images[:, 0, 3, 3] = 0.9  # where the peak goes when the bright pixel is covered
    field = field_of(network, "3", (SIDE, SIDE))
    here = occlusion_receptive_fields(network, images, field, config=EXACT).fields[0]
    assert centroid(here) == pytest.approx((0, 0), abs=1e-6)


def test_wider_filters_have_wider_fields(generator: torch.Generator) -> None:
    network = nn.Conv2d(1, 3, 15, padding=7, bias=False)
    with torch.no_grad():
        network.weight.zero_()
        for k, half in enumerate((1, 3, 7)):
            network.weight[k, 0, 7 - half : 8 + half, 7 - half : 8 + half] = 1 / (2 * half + 1) ** 2
    field = field_of(nn.Sequential(network), "0", (SIDE, SIDE))
    images = torch.zeros(1, 1, SIDE, SIDE)
    images[0, 0, 12:20, 12:20] = 1 + torch.rand(8, 8, generator=generator)
    config = OcclusionConfig(occluder_px=3, stride_px=1, strongest=60, images=1, smoothing_px=0)
    # Only the middle cell is read, so that the drop says what this one cell sees.
    found = occlusion_receptive_fields(
        lambda batch: network(batch) * (torch.arange(1024) == 15 * 32 + 15).reshape(32, 32),
        images,
        field,
        config=config,
    )
    sides = found.effective_px.tolist()
    assert sides[0] < sides[1] < sides[2] < 15
    assert sides[0] == pytest.approx(3, abs=1.1)


def fields_equal(a: OcclusionFields, b: OcclusionFields, rows: list[int] | None = None) -> None:
    chosen = slice(None) if rows is None else rows
    torch.testing.assert_close(a.fields, b.fields[chosen], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a.effective_px, b.effective_px[chosen], equal_nan=True)
    assert torch.equal(a.images, b.images[chosen])


def test_batches_and_other_filters_change_nothing_and_the_network_is_borrowed(
    tiny: Performer, generator: torch.Generator, state: Any
) -> None:
    batch = torch.randn(4, 3, 32, 32, generator=generator)
    tiny.module.train()
    for parameter in tiny.module.parameters():
        parameter.grad = torch.ones_like(parameter)
    kept, before = batch.clone(), state(tiny.module, python=False)
    field = tiny.field("relu2")
    config = OcclusionConfig(images=3).scaled((32, 32)).changed({"stride_px": 5})

    def map_of(images: Tensor) -> Tensor:
        return forward_taps(tiny, images, ["relu2"])[1]["relu2"]

    seen: list[int] = []
    whole = occlusion_receptive_fields(map_of, batch, field, config=config, advance=seen.append)
    places = len(occluder_places((32, 32), config.occluder_px, config.stride_px))
    assert sum(seen) == len(batch) + len(whole.images.unique()) * places
    fields_equal(occlusion_receptive_fields(map_of, batch, field, config=config, batch_size=3), whole)
    some = occlusion_receptive_fields(map_of, batch, field, [9, 2], config=config)
    fields_equal(some, whole, [9, 2])
    assert state(tiny.module, python=False) == before
    assert torch.equal(batch, kept)

    def breaks(images: Tensor) -> Tensor:
        forward_taps(tiny, images, ["relu9"])
        return images

    with pytest.raises(InputError, match="relu9"):
        occlusion_receptive_fields(breaks, batch, field)
    assert state(tiny.module, python=False) == before


def test_photos_that_no_filter_uses_are_not_covered() -> None:
    network = looking_at(((0, 0),))
    images = dotted([(14, 15), (18, 13), (8, 9)]) * torch.tensor([1.0, 3.0, 2.0])[:, None, None, None]
    field, run = field_of(network, "3", (SIDE, SIDE)), list[int]()
    found = occlusion_receptive_fields(network, images, field, config=EXACT, advance=run.append)
    assert found.images.tolist() == [[1, 2]]
    assert sum(run) == 3 + 2 * 28 * 28
    assert float(found.fields[0].max()) == 25 * (3 + 2)  # each photo's own drops, at the peak
    assert centroid(found.fields[0]) == pytest.approx((0, 0), abs=1e-6)


def test_a_dead_filter_has_an_empty_field_and_no_size() -> None:
    network = looking_at(((0, 0), (1, 1)))
    with torch.no_grad():
        network[0].weight[1] = 0
    found = occlusion_receptive_fields(network, dotted([(14, 15)]), field_of(network, "3", (SIDE, SIDE)), config=EXACT)
    assert float(found.fields[1].abs().max()) == 0
    assert math.isnan(float(found.effective_px[1]))
    assert not math.isnan(float(found.effective_px[0]))
    shown = regions(
        torch.ones(1, 32, 32),
        found.fields,
        torch.tensor([1]),
        torch.ones(1),
        field_of(network, "3", (32, 32)),
    )
    assert not shown.any()


def test_places_lie_inside_and_squares_are_zero(generator: torch.Generator) -> None:
    places = occluder_places((224, 224))
    assert len(places) == 22 * 22
    assert int(places.max()) + 33 <= 224
    images = torch.rand(2, 3, 20, 24, generator=generator) + 1
    hidden = covered(images, torch.tensor([[0, 0], [13, 20]]), 7)
    assert float(hidden[0, :, :7, :7].max()) == 0
    assert float(hidden[1, :, 13:, 20:].max()) == 0
    assert int((hidden == 0).sum()) == 3 * (49 + 7 * 4)
    assert float(images.min()) >= 1


def test_one_place_gives_the_smallest_size_that_can_be_told() -> None:
    square = torch.zeros(1, 448, 448)
    square[0, 10:43, 100:133] = 2.0
    assert float(pixels_of_half(square).sqrt()) == pytest.approx(33 / math.sqrt(2), rel=0.001)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"occluder_px": 0}, "occluder_px"),
        ({"stride_px": 0}, "stride_px to be greater than or equal to 1, got 0"),
        ({"images": "x"}, "images to be a valid integer, got 'x'"),
        ({"smoothing_px": -1}, "smoothing_px"),
        ({"smoothing_sigma_px": 0.0}, "smoothing_sigma_px"),
        ({"gain": 1.0}, "a field of OcclusionConfig, got gain"),
    ],
)
def test_settings_are_checked(values: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        OcclusionConfig(**values)  # type: ignore[arg-type]


def test_inputs_are_checked() -> None:
    network = looking_at(((0, 0),))
    field = field_of(network, "3", (SIDE, SIDE))
    images = dotted([(14, 15)])
    with pytest.raises(InputError, match="at least one image"):
        occlusion_receptive_fields(network, images[:0], field)
    with pytest.raises(InputError, match="filters from 0 to 0"):
        occlusion_receptive_fields(network, images, field, [1])
    with pytest.raises(InputError, match="filters from 0 to 0"):
        occlusion_receptive_fields(network, images, field, [])
    with pytest.raises(InputError, match="map_of to return maps"):
        occlusion_receptive_fields(lambda b: network(b)[0], images, field)
    with pytest.raises(InputError, match="occluder of 1 to 32"):
        occlusion_receptive_fields(network, images, field, config=OcclusionConfig())
    with pytest.raises(InputError, match="batch_size"):
        occlusion_receptive_fields(network, images, field, batch_size=0)


def test_a_region_is_drawn_bright_with_a_border() -> None:
    photo = Image.new("RGB", (100, 80), (120, 60, 200))
    region = np.zeros((40, 50), dtype=bool)
    region[10:30, 10:30] = True
    drawn = np.asarray(region_picture(photo, region))
    assert drawn.shape == (80, 100, 3)
    assert drawn[40, 40].tolist() == [120, 60, 200]
    assert drawn[5, 90].tolist() == [60, 30, 100]
    assert (drawn[40] == 255).all(axis=1).sum() == 2  # the line, left and right
    assert np.asarray(region_picture(photo, np.zeros((40, 50), dtype=bool))).max() == 100
