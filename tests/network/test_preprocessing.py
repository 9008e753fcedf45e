"""What becomes of an image on its way into a network, and how the header of a weights file says it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from partlens.errors import InputError, WeightsError
from partlens.network.preprocessing import Preprocessing


def test_caffe_preprocessing_by_hand() -> None:
    prepare = Preprocessing(
        size_px=(2, 2), resize="squash", channel_order="BGR", scale=1.0, mean=(104, 117, 123), std=(1, 2, 1)
    )
    out = prepare([Image.new("RGB", (2, 2), (10, 20, 30))])
    assert out.dtype == torch.float32
    assert out[0, :, 0, 0].tolist() == [30 - 104, (20 - 117) / 2, 10 - 123]


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_points_map_to_where_the_pixels_go(resize: str) -> None:
    prepare = Preprocessing(size_px=(40, 60), resize=resize, resize_px=64 if resize == "crop" else None, mean=(0, 0, 0))
    pixels = np.zeros((100, 160, 3), dtype=np.uint8)
    pixels[40:50, 70:80] = 255
    seen = prepare([Image.fromarray(pixels)])[0, 0].numpy()
    rows, cols = np.indices(seen.shape)
    centre = [
        float((seen * (cols + 0.5)).sum() / seen.sum()),
        float((seen * (rows + 0.5)).sum() / seen.sum()),
    ]
    assert prepare.to_input_px((75.0, 45.0), (160, 100)) == pytest.approx(centre, abs=0.1)


def test_mapping_there_and_back() -> None:
    prepare = Preprocessing(size_px=(224, 200), resize="crop", resize_px=256)
    points = np.random.default_rng(0).uniform(0, 300, (5, 2))
    there = prepare.to_input_px(points, (333, 517))
    assert np.abs(there - points).max() > 1
    assert np.allclose(prepare.to_image_px(there, (333, 517)), points)


@pytest.mark.parametrize(
    "wrong", [{"resize_px": 100}, {"std": (1, 0, 1)}, {"size_px": (0, 5)}, {"channel_order": "GRB"}]
)
def test_preprocessing_refuses(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="Expected"):
        Preprocessing(**wrong)


def test_metadata() -> None:
    caffe = Preprocessing.from_metadata({"input": "BGR, 0-255, mean 104 117 123, std 1", "input_size": "227x227"})
    assert caffe == Preprocessing(
        size_px=(227, 227),
        resize="squash",
        channel_order="BGR",
        scale=1.0,
        mean=(104, 117, 123),
        std=(1, 1, 1),
    )
    usual = Preprocessing.from_metadata({"input": "RGB, 0-1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, 224x224"})
    assert usual == Preprocessing(resize="squash")
    text = "RGB, 0-1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, crop 256, 224x224"
    assert Preprocessing.from_metadata({"input": text}) == Preprocessing(resize_px=256)
    assert Preprocessing.from_metadata({}) is None
    with pytest.raises(WeightsError, match="grey"):
        Preprocessing.from_metadata({"input": "grey"})


def test_bicubic_stands_in_the_header() -> None:
    asked = Preprocessing(interpolation="bicubic")
    assert Preprocessing.from_metadata(asked.to_metadata()) == asked
