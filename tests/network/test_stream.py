from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, RunError, StorageError
from partlens.network import stream as module
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream, stream_maps
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer
from partlens.rows import RowRecord


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 4)


@pytest.fixture
def performer() -> Performer:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(245, 4))
    return load_performer(module, Preprocessing(size_px=(16, 16), resize="squash"))


@pytest.fixture
def images() -> ImageSet:
    return ImageSet.from_arrays(np.random.default_rng(0).integers(0, 256, (11, 20, 24, 3), dtype=np.uint8))


def maps_at_once(performer: Performer, images: ImageSet, tap: str) -> torch.Tensor:
    batch = performer.preprocessing([images.read(i) for i in range(len(images))])
    return forward_taps(performer, batch, [tap])[1][tap]


def test_batches_come_in_the_order_asked_with_maps_and_outputs(performer, images) -> None:
    rows = (7, 0, 10, 3, 3)
    found = list(stream(performer, images, rows, ["1"], batch_size=2))
    assert [batch.rows for batch in found] == [(7, 0), (10, 3), (3,)]
    inputs = performer.preprocessing([images.read(i) for i in rows])
    assert torch.equal(torch.cat([batch.inputs for batch in found]), inputs)
    for start, batch in zip((0, 2, 4), found, strict=True):  # numbers are those of the same batch by hand
        output, maps = forward_taps(performer, inputs[start : start + 2], ["1"])
        assert torch.equal(batch.outputs, output)
        assert torch.equal(batch.maps["1"], maps["1"])
    (light,) = stream(performer, images, [4])
    assert light.maps == {}
    assert list(stream(performer, images, [], ["1"])) == []
    (reduced,) = stream(performer, images, [1, 2], ["1"], reduce=lambda maps: maps.flatten(2).amax(2))
    assert reduced.maps["1"].shape == (2, 5)


def test_the_network_is_the_callers_between_batches(performer, images) -> None:
    performer.module.train()
    for _ in stream(performer, images, range(4), ["1"]):
        assert performer.module.training
        assert not any(m._forward_hooks for m in performer.module.modules())


def test_one_pass_keeps_the_maps(performer, images, tmp_path) -> None:
    seen = []
    maps = stream_maps(performer, images, ["1", "4", "1"], tmp_path, "float32", progress=lambda *a: seen.append(a))
    assert seen == [(4,), (8,), (11,)]
    assert list(maps) == ["1", "4"]
    assert np.allclose(maps["1"], maps_at_once(performer, images, "1"), atol=1e-6)
    assert maps["4"].shape == (11, 4)
    assert np.array_equal(np.load(tmp_path / "1-4.maps.npy"), maps["4"])
    with pytest.raises(ValueError, match="read-only"):
        maps["4"][0] = 1


def test_float16_maps_are_the_nearest_float16(performer, images, tmp_path) -> None:
    maps = stream_maps(performer, images, ["1"], tmp_path)
    wanted = maps_at_once(performer, images, "1").numpy()
    assert maps["1"].dtype == np.float16
    assert np.array_equal(maps["1"], wanted.astype(np.float16))


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_the_next_batch(performer, images, tmp_path) -> None:
    def kill(done: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        stream_maps(performer, images, ["1"], tmp_path / "a", "float32", progress=kill)
    assert RowRecord.read(tmp_path / "a").rows_done == 8
    read, whole = [], stream_maps(performer, images, ["1"], tmp_path / "b", "float32")

    @dataclasses.dataclass(frozen=True)
    class Counting:
        keys: tuple = tuple(images.keys)

        def __len__(self) -> int:
            return len(images)

        def read(self, index: int, scaled: object = None) -> Image.Image:
            read.append(index)
            return images.read(index)

        def fingerprint(self) -> str:
            return images.fingerprint()

    resumed = stream_maps(performer, Counting(), ["1"], tmp_path / "a", "float32")
    assert sorted(read) == [8, 9, 10]
    assert np.array_equal(resumed["1"], whole["1"])
    read.clear()
    stream_maps(performer, Counting(), ["1"], tmp_path / "a", "float32")
    assert not read


def test_maps_of_another_configuration_are_refused(performer, images, tmp_path) -> None:
    stream_maps(performer, images, ["1"], tmp_path, "float32")
    before = (tmp_path / RowRecord.FILE).read_text()
    for change in (
        {"dtype": "float16"},
        {"taps": ["0"]},
        {"images": images.take([0, 1])},
        {"performer": dataclasses.replace(performer, weights_sha256="0" * 64)},
    ):
        given = {"performer": performer, "images": images, "taps": ["1"], "folder": tmp_path, "dtype": "float32"}
        with pytest.raises(RunError, match="delete this one"):
            stream_maps(**{**given, **change})
    assert (tmp_path / RowRecord.FILE).read_text() == before


def test_a_corrupt_image_is_named_and_finished_batches_stay(performer, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"4\.png"):
        stream_maps(performer, ImageSet.from_folder(folder), ["1"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / RowRecord.FILE).read_text())["rows_done"] == 4


def test_values_too_large_for_float16(performer, images, tmp_path) -> None:
    performer.module[0].bias.data.fill_(1e5)
    with pytest.raises(InputError, match=r"float16 maps of 1.*000000.*another tap or targets"):
        stream_maps(performer, images, ["1"], tmp_path)
    assert stream_maps(performer, images, ["1"], tmp_path, "float32")["1"].min() > 65504


def test_arguments_are_checked(performer, images, tmp_path) -> None:
    with pytest.raises(InputError, match="float16 or float32"):
        stream_maps(performer, images, ["1"], tmp_path, "int8")
    with pytest.raises(LayerError, match="at least one tap"):
        stream_maps(performer, images, [], tmp_path)
    with pytest.raises(LayerError, match="Nearest"):
        stream_maps(performer, images, ["9"], tmp_path)
    assert not (tmp_path / RowRecord.FILE).exists()


def test_a_full_disk_is_said_before_the_work(performer, images, tmp_path, monkeypatch) -> None:
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("partlens.rows.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="MB free"):
        stream_maps(performer, images, ["1"], tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 64, 1))
    performer = load_performer(module, Preprocessing(size_px=(48, 48), resize="squash"))
    images = ImageSet.from_arrays(np.zeros((320, 8, 8, 3), dtype=np.uint8))
    seen: list[int] = []
    stream_maps(performer, images, ["0"], tmp_path, "float32", progress=lambda *_: seen.append(resident_bytes()))
    assert (tmp_path / "0-0.maps.npy").stat().st_size > 180e6
    third = len(seen) // 3
    assert max(seen[-third:]) - max(seen[:third]) < 40e6  # the allocator breathes; the maps do not pile up


class Standardised(nn.Module):
    """Divides each image by its own deviation: one of a single colour gives nan."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean((1, 2, 3), keepdim=True)
        return self.conv(centred / x.std((1, 2, 3), keepdim=True)).mean((2, 3))


def test_the_photo_whose_values_are_not_finite_is_named() -> None:
    grey = Preprocessing(size_px=(16, 16), resize="squash", mean=(0.5,) * 3, std=(0.5,) * 3)
    performer = load_performer(Standardised(), grey)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    pixels[3] = 128
    images = ImageSet.from_generator(lambda row: pixels[row], [f"p{row}.png" for row in range(5)])
    with pytest.raises(InputError, match=r"^Photo p3\.png: .*NaN or infinity first in conv"):
        list(stream(performer, images, range(5), ["conv"]))
    pixels[:] = 128  # then it is no fault of a photo
    with pytest.raises(InputError, match="^Expected finite values"):
        list(stream(performer, images, range(5), ["conv"]))
