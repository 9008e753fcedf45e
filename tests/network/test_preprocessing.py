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


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"size_px": (5,)}, "size_px"),
        ({"size_px": (5, 0)}, "size_px.1 to be greater than or equal to 1, got 0"),
        ({"resize": "stretch"}, "resize to be 'squash' or 'crop'"),
        ({"interpolation": "nearest"}, "interpolation to be 'bilinear' or 'bicubic'"),
        ({"mean": (0, 0)}, "three means"),
        ({"std": (1, 1, -1)}, "three positive"),
        ({"size_px": (40, 50), "resize_px": 49}, "at least 50 px"),
    ],
)
def test_each_guard(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Preprocessing(**wrong)


def test_limits_that_are_allowed() -> None:
    assert Preprocessing(size_px=(40, 50), resize_px=50).resize_px == 50
    assert Preprocessing(size_px=(40, 50)).resize_px == 50  # the longer side, where nothing is said
    assert Preprocessing(size_px=(1, 1), resize="squash").resize_px is None
    with pytest.raises(InputError, match="1x1 px, got 0x5"):
        Preprocessing().box_in_input(0, 5)


@pytest.mark.parametrize(
    ("size", "box"), [((20, 10), (-6, 0, 14, 10)), ((10, 25), (-1, -8, 9, 17)), ((9, 9), (-1, 0, 9, 10))]
)
def test_where_the_whole_image_lies(size: tuple[int, int], box: tuple[int, ...]) -> None:
    # By hand: the shorter side becomes 10, and 8 columns and 10 rows are cut from the middle; halves go to the even.
    assert Preprocessing(size_px=(10, 8), resize="crop", resize_px=10).box_in_input(*size) == box


def test_the_headers_numbers() -> None:
    one = Preprocessing.from_metadata({"input": "RGB, 0-1, mean 0.5, std 0.25, 32x48"})
    assert one == Preprocessing(size_px=(32, 48), resize="squash", mean=(0.5,) * 3, std=(0.25,) * 3)
    plain = Preprocessing.from_metadata({"input": "BGR, 0-255, mean 1 2 3"})
    assert plain == Preprocessing(
        size_px=(224, 224), resize="squash", channel_order="BGR", scale=1.0, mean=(1, 2, 3), std=(1, 1, 1)
    )
    for text in ("0-1, mean 0", "RGB, mean 0", "RGB, 0-1", "RGB, 0-1, mean 1 2"):
        with pytest.raises(WeightsError, match="Correct the header"):
            Preprocessing.from_metadata({"input": text})
    with pytest.raises(InputError, match="a scale of 1 or 1/255, got 0.5"):
        Preprocessing(scale=0.5).to_metadata()


def test_interpolation_reaches_the_pixels() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8))
    smooth, sharp = (
        Preprocessing(size_px=(5, 5), resize="squash", interpolation=kind)([image]) for kind in ("bilinear", "bicubic")
    )
    assert not torch.equal(smooth, sharp)
    wanted = np.asarray(image.resize((5, 5), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    wanted = (wanted - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert np.allclose(sharp[0].permute(1, 2, 0), wanted, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"size_px": None},
        {"size_px": (32.5, 32)},
        {"size_px": "ab"},
        {"mean": None},
        {"mean": "abc"},
        {"std": (1, "a", 1)},
        {"std": (True, 1, 1)},
        {"resize_px": "a"},
        {"scale": None},
    ],
)
def test_fields_of_another_kind_are_refused_by_name(fields: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"Expected {next(iter(fields))}"):
        Preprocessing(**fields)


@pytest.mark.parametrize(
    "fields", [{"std": (1e-300,) * 3}, {"std": (1e-45, 1, 1)}, {"mean": (np.inf, 0, 0)}, {"scale": float("nan")}]
)
def test_an_input_that_would_be_infinite_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(InputError, match="finite"):
        Preprocessing(**fields)


def test_plain_values_give_the_same_preprocessing_again() -> None:
    made = Preprocessing(size_px=(32, 48), resize_px=64, mean=(0.1, 0.2, 0.3), interpolation="bicubic")
    assert Preprocessing(**made.to_dict()) == made
    with pytest.raises(InputError, match="a field of Preprocessing, got sizepx. Did you mean size_px"):
        Preprocessing(sizepx=(32, 32))


@pytest.mark.parametrize("size", [(20000, 4), (3, 9000)])
def test_a_long_strip_takes_little_memory_and_looks_as_when_scaled_whole(size: tuple[int, int], monkeypatch) -> None:
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    prepare = Preprocessing(size_px=(28, 28), resize_px=32)
    whole = np.asarray(prepare.frame(strip), dtype=int)
    monkeypatch.setattr("partlens.network.preprocessing._MOST_PIXELS", 28 * 28)
    assert np.abs(np.asarray(prepare.frame(strip), dtype=int) - whole).max() <= 1
