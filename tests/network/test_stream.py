from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, LayerError, RunError, StorageError
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import MANIFEST, open_maps, stream_maps
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer, load_performer


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


def test_one_pass_gives_maps_responses_and_top_images(performer, images, tmp_path) -> None:
    seen = []
    result = stream_maps(
        performer, images, ["1", "4"], tmp_path, "float32", 4, progress=lambda *a: seen.append(a), top_k=3
    )
    assert seen == [(4, 11), (8, 11), (11, 11)]
    wanted = maps_at_once(performer, images, "1")
    maps = result.maps()
    assert np.allclose(maps["1"], wanted, atol=1e-6)
    assert maps["4"].shape == (11, 4)
    flat = maps["1"].reshape(11, 5, -1)
    assert np.array_equal(result.peak["1"], flat.max(2))
    rows, cols = np.unravel_index(flat.argmax(2), (14, 14))
    assert np.array_equal(result.peak_cell["1"], np.stack([rows, cols], 2))
    assert np.allclose(result.mean["1"], flat.mean(2), atol=1e-6)
    assert np.array_equal(result.top["1"], np.argsort(-flat.max(2), axis=0, kind="stable")[:3].T)
    assert result.keys == tuple(images.keys)


def test_without_a_folder_only_responses_are_kept(performer, images, tmp_path) -> None:
    stored = stream_maps(performer, images, ["1"], tmp_path, "float32", 4)
    light = stream_maps(performer, images, ["1"], None, "float32", 4)
    assert np.array_equal(light.peak["1"], stored.peak["1"])
    assert np.array_equal(light.top["1"], stored.top["1"])
    with pytest.raises(RunError, match="out="):
        light.maps()


def test_float16_maps_are_near_and_responses_exact(performer, images, tmp_path) -> None:
    result = stream_maps(performer, images, ["1"], tmp_path)
    wanted = maps_at_once(performer, images, "1")
    assert result.maps()["1"].dtype == np.float16
    assert np.allclose(result.maps()["1"], wanted, atol=2e-3)
    assert np.allclose(result.peak["1"], wanted.flatten(2).amax(2), atol=1e-6)


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_with_the_next_batch(performer, images, tmp_path) -> None:
    def kill(done: int, _rows: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        stream_maps(performer, images, ["1"], tmp_path / "a", "float32", 4, progress=kill)
    with pytest.raises(RunError, match="11 finished rows"):
        open_maps(tmp_path / "a")
    read, whole = [], stream_maps(performer, images, ["1"], tmp_path / "b", "float32", 4, top_k=4)

    @dataclasses.dataclass(frozen=True)
    class Counting:
        keys: tuple = tuple(images.keys)

        def __len__(self) -> int:
            return len(images)

        def read(self, index: int) -> Image.Image:
            read.append(index)
            return images.read(index)

        def fingerprint(self) -> str:
            return images.fingerprint()

    resumed = stream_maps(performer, Counting(), ["1"], tmp_path / "a", "float32", 4, top_k=4)
    assert sorted(read) == [8, 9, 10]
    assert np.array_equal(resumed.maps()["1"], whole.maps()["1"])
    for part in ("peak", "peak_cell", "mean", "top"):
        assert np.array_equal(getattr(resumed, part)["1"], getattr(whole, part)["1"])
    read.clear()
    stream_maps(performer, Counting(), ["1"], tmp_path / "a", "float32", 4)
    assert not read


def test_maps_of_another_configuration_are_refused(performer, images, tmp_path) -> None:
    stream_maps(performer, images, ["1"], tmp_path, "float32")
    before = (tmp_path / MANIFEST).read_text()
    for change in (
        {"dtype": "float16"},
        {"taps": ["0"]},
        {"images": images.take([0, 1])},
        {"performer": dataclasses.replace(performer, weights_sha256="0" * 64)},
    ):
        given = {"performer": performer, "images": images, "taps": ["1"], "out": tmp_path, "dtype": "float32"}
        with pytest.raises(RunError, match="resume=False"):
            stream_maps(**{**given, **change})
    assert (tmp_path / MANIFEST).read_text() == before
    fresh = stream_maps(performer, images, ["0"], tmp_path, "float32", resume=False)
    assert list(fresh.maps()) == ["0"]


def test_views_of_each_image(performer, images, tmp_path) -> None:
    result = stream_maps(
        performer,
        images,
        ["1"],
        tmp_path,
        "float32",
        3,
        augment=lambda image, view: ImageOps.mirror(image) if view else image,
        views=2,
    )
    maps = result.maps()["1"]
    assert maps.shape[0] == 22
    assert np.allclose(maps[0::2], maps_at_once(performer, images, "1"), atol=1e-6)
    mirrored = performer.preprocessing([ImageOps.mirror(images.read(4))])
    assert np.allclose(maps[9], forward_taps(performer, mirrored, ["1"])[1]["1"][0], atol=1e-6)
    assert not np.allclose(maps[8], maps[9])


def test_a_corrupt_image_is_named_and_finished_batches_stay(performer, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"4\.png"):
        stream_maps(performer, ImageSet.from_folder(folder), ["1"], tmp_path / "out", batch_size=2)
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["rows_done"] == 4


def test_values_too_large_for_float16(performer, images, tmp_path) -> None:
    performer.module[0].bias.data.fill_(1e5)
    with pytest.raises(InputError, match=r"float16 maps of 1.*000000.*float32"):
        stream_maps(performer, images, ["1"], tmp_path)
    assert stream_maps(performer, images, ["1"], tmp_path, "float32").peak["1"].min() > 65504


def test_arguments_are_checked(performer, images, tmp_path) -> None:
    with pytest.raises(InputError, match="augment"):
        stream_maps(performer, images, ["1"], None, views=2)
    with pytest.raises(InputError, match="float16 or float32"):
        stream_maps(performer, images, ["1"], None, "int8")
    with pytest.raises(LayerError, match="at least one tap"):
        stream_maps(performer, images, [], None)
    with pytest.raises(LayerError, match="Nearest"):
        stream_maps(performer, images, ["9"], None)
    with pytest.raises(RunError, match=r"maps\.json"):
        open_maps(tmp_path)


def test_a_full_disk_is_said_before_the_work(performer, images, tmp_path, monkeypatch) -> None:
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("partlens.network.stream.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match="GB free"):
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
    stream_maps(performer, images, ["0"], tmp_path, "float32", 16, progress=lambda *_: seen.append(resident_bytes()))
    assert open_maps(tmp_path)["0"].nbytes > 180e6
    third = len(seen) // 3
    assert max(seen[-third:]) - max(seen[:third]) < 40e6  # the allocator breathes; the maps do not pile up
