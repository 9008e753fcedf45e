"""Crops at peaks, their averages, and the random control (T23, T24)."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from partlens.attribution import average_pictures as module
from partlens.attribution.average_pictures import STRIP_PHOTOS, _crop_of, average_pictures
from partlens.data.images import ImageSet
from partlens.errors import InputError
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream
from partlens.selection.responses import TopPhotos

SIDE = 40


def top(peaks: np.ndarray, cells: np.ndarray, count: int = 100) -> TopPhotos:
    return TopPhotos.none(min(count, len(peaks)), peaks.shape[1]).merged(peaks, cells, 0)


def _performer(module: nn.Module) -> Performer:
    preprocessing = Preprocessing(size_px=(SIDE, SIDE), resize="squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Performer(module.eval(), "pattern", preprocessing, weights_sha256(module))


def _pattern_network(pattern: np.ndarray) -> nn.Module:
    """One filter that activates on a pattern, centred so that flat colour gives nothing."""
    conv = nn.Conv2d(3, 1, pattern.shape[0], bias=False)
    kernel = torch.from_numpy(pattern - pattern.mean()).float().permute(2, 0, 1)
    conv.weight = nn.Parameter(kernel[None])
    return nn.Sequential(OrderedDict(conv=conv, relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))


def responses(performer: Performer, images: ImageSet, tap: str) -> tuple[np.ndarray, np.ndarray]:
    """Peak and its cell of every filter on every image."""
    peaks, cells = [], []
    for batch in stream(performer, images, range(len(images)), [tap]):
        maps = batch.maps[tap].reshape(
            len(batch.rows), batch.maps[tap].shape[1], *(batch.maps[tap].shape[2:] or (1, 1))
        )
        peak, place = maps.flatten(2).max(2)
        peaks.append(peak.numpy())
        cells.append(np.stack([place // maps.shape[3], place % maps.shape[3]], 2))
    return np.concatenate(peaks), np.concatenate(cells)


@pytest.fixture
def pattern() -> np.ndarray:
    return np.random.default_rng(1).random((9, 9, 3))


@pytest.fixture
def planted(pattern: np.ndarray) -> tuple[ImageSet, np.ndarray]:
    """Noise with the pattern somewhere in every photo, and where."""
    rng = np.random.default_rng(0)
    photos = rng.random((120, SIDE, SIDE, 3)) * 0.6 + 0.2
    corners = rng.integers(0, SIDE - 9, size=(120, 2))
    for photo, (row, col) in zip(photos, corners, strict=True):
        photo[row : row + 9, col : col + 9] = 0.75 * pattern + 0.25 * photo[row : row + 9, col : col + 9]
    return ImageSet.from_arrays((photos * 255).astype(np.uint8)), corners


def test_T23_the_peak_is_the_middle_of_the_crop_and_the_crop_is_the_receptive_field() -> None:
    # One bright pixel; a filter that sums 5x5 pixels after a stride-2 layer peaks where it stands.
    network = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 1, 3, stride=2, padding=1, bias=False),
            relu=nn.ReLU(),
            conv2=nn.Conv2d(1, 1, 3, padding=1, bias=False),
            relu2=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )
    kernel = torch.tensor([[1.0, 2.0, 1.0], [2.0, 5.0, 2.0], [1.0, 2.0, 1.0]])
    for conv in (network.conv, network.conv2):
        conv.weight = nn.Parameter(kernel.expand_as(conv.weight).clone())
    performer = _performer(network)
    photo = np.zeros((1, SIDE, SIDE, 3), np.uint8)
    photo[0, 20, 16] = 255
    images = ImageSet.from_arrays(photo)
    peaks, cells = responses(performer, images, "relu2")
    (picture,) = average_pictures(performer, images, [("relu2", 0)], top(peaks, cells))
    size = performer.field("relu2").size_px
    assert picture.average.shape[:2] == size == (7, 7)
    assert picture.receptive_field_px == size
    brightest = np.unravel_index(picture.average.sum(axis=2).argmax(), size)
    assert brightest == (3, 3)
    # The analytic field is what moves the cell: brute force over the gradient.
    image = torch.rand(1, 3, SIDE, SIDE, requires_grad=True)
    maps = network.relu2(network.conv2(network.relu(network.conv(image))))
    maps[0, 0, 10, 8].backward()
    rows, cols = torch.nonzero(image.grad[0].abs().sum(0), as_tuple=True)
    assert (int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1) == size


def test_T24_the_average_shows_the_planted_pattern_and_random_crops_do_not(
    pattern: np.ndarray, planted: tuple[ImageSet, np.ndarray]
) -> None:
    images, corners = planted
    performer = _performer(_pattern_network(pattern))
    peaks, cells = responses(performer, images, "relu")
    (picture,) = average_pictures(performer, images, [("relu", 0)], top(peaks, cells))
    assert len(picture.rows) == 100
    found = cells[list(picture.rows), 0]
    assert (found == corners[list(picture.rows)]).all(axis=1).mean() > 0.9

    def likeness(average: np.ndarray) -> float:
        return float(np.corrcoef(average.ravel(), pattern.ravel())[0, 1])

    assert likeness(picture.average) > 0.8
    assert abs(likeness(picture.control)) < 0.35
    assert picture.contrast > 3 * picture.control_contrast
    assert picture.crops.shape == (STRIP_PHOTOS, 9, 9, 3)


def test_padding_is_left_out_of_the_mean() -> None:
    # A white photo stays white at the border: padding would make it grey.
    network = _pattern_network(np.random.default_rng(2).random((9, 9, 3)))
    network.conv.padding = (4, 4)
    performer = _performer(network)
    white = ImageSet.from_arrays(np.full((3, SIDE, SIDE, 3), 255, np.uint8))
    cells = np.zeros((3, 1, 2), np.int32)  # the upper left corner: most of the crop is outside
    (picture,) = average_pictures(performer, white, [("relu", 0)], top(np.ones((3, 1), np.float32), cells))
    assert picture.valid_frac.min() == 0
    assert picture.valid_frac[4:, 4:].min() == 1
    assert np.allclose(picture.average[picture.valid_frac > 0], 1)
    assert np.allclose(picture.average[picture.valid_frac == 0], 0.5)


def test_fully_connected_layers_average_whole_photos() -> None:
    network = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(3, 2, 3), relu=nn.ReLU(), flatten=nn.Flatten(), fc=nn.Linear(2 * 38 * 38, 4))
    )
    performer = _performer(network)
    rng = np.random.default_rng(0)
    images = ImageSet.from_arrays(rng.integers(0, 256, (5, SIDE, SIDE, 3), dtype=np.uint8))
    peaks, cells = responses(performer, images, "fc")
    (picture,) = average_pictures(performer, images, [("fc", 1)], top(peaks[:, 1:2], cells[:, 1:2], 5))
    assert picture.receptive_field_px is None
    whole = np.mean([np.asarray(images.read(i), np.float32) / 255 for i in range(5)], axis=0)
    assert np.allclose(picture.average, whole, atol=1e-6)
    assert np.allclose(picture.control, whole, atol=1e-6)


def test_equal_peaks_keep_the_order_of_the_photos() -> None:
    peaks = np.array([[1.0, 0.0], [1.0, 2.0], [1.0, 2.0]])
    assert top(peaks, np.zeros((3, 2, 2)), 2).photo.T.tolist() == [[0, 1], [1, 2]]


def test_scaled_pictures_have_the_wanted_side(
    pattern: np.ndarray, planted: tuple[ImageSet, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = planted
    performer = _performer(_pattern_network(pattern))
    peaks, cells = responses(performer, images, "relu")
    arguments = (performer, images, [("relu", 0)], top(peaks, cells))
    monkeypatch.setattr(module, "PICTURE_PX", 6)
    (small,) = average_pictures(*arguments)
    assert small.average.shape == (6, 6, 3)
    assert small.receptive_field_px == (9, 9)


def test_random_control_follows_the_seed(pattern: np.ndarray, planted: tuple[ImageSet, np.ndarray]) -> None:
    images, _ = planted
    performer = _performer(_pattern_network(pattern))
    peaks, cells = responses(performer, images, "relu")
    arguments = (performer, images, [("relu", 0)], top(peaks, cells))
    first, again, other = (average_pictures(*arguments, seed=s)[0].control for s in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_bad_input_says_what_is_wrong(tiny: Performer, few_flowers: ImageSet) -> None:
    others = top(np.ones((81, 1)), np.zeros((81, 1, 2)))
    with pytest.raises(InputError, match=r"Expected photos among 80 for 2 filters, got number 80 for 1"):
        average_pictures(tiny, few_flowers, [("relu2", 0), ("relu2", 1)], others)


def test_a_field_larger_than_the_input_is_cut_to_a_share_of_it(
    tiny: Performer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _crop_of(tiny, ["relu4"])["relu4"].side_px == (16, 16)
    monkeypatch.setattr(module, "LARGEST_FRAC", 1.0)
    crop = _crop_of(tiny, ["relu4"])["relu4"]
    assert crop.field is not None
    assert crop.field.size_px[0] > 32
    assert crop.side_px == (32, 32)


def test_crops_are_centred_and_moved_to_the_border_by_hand() -> None:
    """Corners are counted in the padded photo: that of a crop of 4 around the middle of 10 is 4 + 5 - 2."""
    centres = np.array([[5.0, 5.0], [0.0, 10.0], [-7.0, 99.0], [5.5, 4.49]])
    corners = module._clipped(centres, np.array([4, 4]), np.array([10, 10]))
    assert corners.tolist() == [[7, 7], [2, 12], [2, 12], [8, 6]]


def test_the_strip_shows_the_best_photos_first_and_grey_beyond_them() -> None:
    network = _pattern_network(np.random.default_rng(2).random((9, 9, 3)))
    network.conv.padding = (4, 4)
    levels = np.arange(10, dtype=np.uint8) * 20
    images = ImageSet.from_arrays(np.repeat(levels, SIDE * SIDE * 3).reshape(10, SIDE, SIDE, 3))
    cells = np.zeros((10, 1, 2), np.int32)  # the upper left corner: the middle of the crop is the photo's first pixel
    peaks = np.array([3, 1, 4, 1.5, 5, 9, 2, 6, 5.5, 0], np.float32)[:, None]
    (picture,) = average_pictures(_performer(network), images, [("relu", 0)], top(peaks, cells, 9))
    assert picture.rows == (5, 7, 8, 4, 2, 0, 6, 3, 1)
    assert picture.crops.shape == (STRIP_PHOTOS, 9, 9, 3)
    assert picture.crops[:, 8, 8, 0].tolist() == [levels[i] for i in picture.rows[:8]]
    assert (picture.crops[:, 0, 0] == round(0.9 * 255)).all()
    assert np.allclose(picture.average[8, 8], np.mean(levels[list(picture.rows)]) / 255)
    assert picture.contrast == pytest.approx(0.0, abs=1e-6)


def test_few_photos_make_a_short_strip() -> None:
    network = _pattern_network(np.random.default_rng(2).random((9, 9, 3)))
    images = ImageSet.from_arrays(np.full((3, SIDE, SIDE, 3), 9, np.uint8))
    seen: list[tuple[int, int]] = []
    cells = np.zeros((3, 1, 2), np.int32)
    found = average_pictures(
        _performer(network), images, [("relu", 0)], top(np.ones((3, 1)), cells), advance=lambda *a: seen.append(a)
    )
    assert found[0].crops.shape[0] == 3
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_crops_stay_on_the_peak_in_a_scaled_photo_and_random_ones_reach_all_of_it(
    pattern: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PICTURE_PX", 6)
    performer = _performer(_pattern_network(pattern))
    layers = {"relu": module._Layer(_crop_of(performer, ["relu"])["relu"], [0])}
    assert layers["relu"].side == (6, 6)
    cells = np.tile(np.array([20, 10]), (200, 1, 1))
    found = top(np.ones((200, 1)), cells, 200)
    corner, at_random = module._corners(performer, [("relu", 0)], found, layers, 0)
    # A kernel of 9 at cell (20, 10) has its middle at (24.5, 14.5) px; two thirds of that is (16.33, 9.67), a crop of 6
    # around it begins at (13, 7), and the photo behind a border of 6.
    assert corner[0, 0].tolist() == [13 + 6, 7 + 6]
    assert at_random.min() <= 4
    assert at_random.max() >= 6 + 27 - 3 - 2
