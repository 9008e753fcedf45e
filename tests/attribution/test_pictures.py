"""Overlays, strips and average pictures as images."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partlens.attribution.pictures import coloured, overlay, picture_of, save_picture, stretched, strip


def test_glow_gets_lighter_with_the_value() -> None:
    heat = np.linspace(0, 1, 101)[None]
    lightness = coloured(heat)[0].astype(float) @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness) >= 0).all()


def test_jet_runs_from_blue_to_red() -> None:
    ends = coloured(np.array([[0.0, 0.5, 1.0]]), "jet")[0]
    assert ends.tolist() == [[0, 0, 128], [128, 255, 128], [128, 0, 0]]


def test_an_overlay_keeps_the_photo_where_there_is_no_heat() -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8))
    heat = np.zeros((10, 15))
    heat[:, 8:] = 1
    drawn = np.asarray(overlay(photo, heat), dtype=float)
    assert drawn.shape == (20, 30, 3)
    grey = np.asarray(photo, dtype=float).mean(axis=2)
    assert np.corrcoef(drawn[:, :14].mean(axis=2).ravel(), grey[:, :14].ravel())[0, 1] > 0.99
    assert drawn[:, 18:, 0].mean() > drawn[:, :12, 0].mean() + 60


def test_jet_covers_evenly_with_three_quarters() -> None:
    photo = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    drawn = np.asarray(overlay(photo, np.ones((4, 4)), "jet"))
    assert drawn[0, 0].tolist() == [round(0.75 * c + 0.25 * 200) for c in (128, 0, 0)]


def test_undefined_heat_is_drawn_as_none() -> None:
    assert coloured(np.array([[np.nan]])).tolist() == coloured(np.array([[0.0]])).tolist()


def test_stretching_uses_valid_pixels_only() -> None:
    average = np.full((4, 4, 3), 0.5)
    average[1:3, 1:3] = np.linspace(0.4, 0.6, 12).reshape(2, 2, 3)
    valid = np.zeros((4, 4))
    valid[1:3, 1:3] = 1
    wide = stretched(average, valid)[1:3, 1:3]
    assert wide.min() < 0.02
    assert wide.max() > 0.98
    assert np.array_equal(stretched(average, np.zeros((4, 4))), average)


def test_a_strip_places_crops_side_by_side() -> None:
    crops = [np.full((8, 4, 3), value, np.uint8) for value in (0, 100)]
    sheet = np.asarray(strip(crops, 16, gap_px=2))
    assert sheet.shape == (16, 34, 3)
    assert sheet[8, 8].tolist() == [0, 0, 0]
    assert sheet[8, 26].tolist() == [100, 100, 100]
    assert sheet[8, 0].tolist() == [255, 255, 255]  # tall crops stand in the middle of their square


def test_png_is_written_and_read_back(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((5, 6, 3))
    save_picture(tmp_path / "a" / "x.png", picture_of(values))
    read = np.asarray(Image.open(io.BytesIO((tmp_path / "a" / "x.png").read_bytes())))
    assert np.array_equal(read, np.rint(values * 255).astype(np.uint8))


@pytest.mark.parametrize("grey", [0, 90, 255])
def test_a_glow_darkens_the_photo_and_shines_in_its_light_where_the_heat_is(grey: int) -> None:
    photo = Image.fromarray(np.full((4, 4, 3), grey, np.uint8))
    cold = np.asarray(overlay(photo, np.zeros((4, 4))))
    assert (cold == round(0.72 * grey + 22)).all()
    hot = np.asarray(overlay(photo, np.ones((4, 4))), dtype=float)
    shining = coloured(np.ones((4, 4)), "glow") * (0.55 + 0.45 * grey / 255)
    assert np.abs(hot - (0.92 * shining + 0.08 * cold)).max() <= 1
