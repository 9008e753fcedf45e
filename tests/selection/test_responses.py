"""The streaming pass: what it keeps, how it resumes, what it leaves alone."""

from __future__ import annotations

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, RunError
from partlens.network.performer import weights_sha256
from partlens.network.taps import forward_taps
from partlens.rows import RowRecord
from partlens.selection import responses
from partlens.selection.descriptors import energy, normalised
from partlens.selection.record import DescriptorConfig, FeatureIndex
from partlens.selection.responses import TopPhotos, image_descriptors, stream_responses

MADE = runpy.run_path(str(Path(__file__).with_name("made_networks.py")))
as_performer, Residual = MADE["as_performer"], MADE["Residual"]
PLAIN = DescriptorConfig(layers="convolutions")


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "SHARD", 4)


def test_a_dead_layer_gives_zeros_and_is_counted(images, tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3), nn.Flatten(), nn.Linear(288, 2)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)
    for top in ((3, 11), (0, 0)):
        found = stream_responses(as_performer(net), images, top=top)
        rows = found.index.rows("1")
        assert found.dead_layers == 11
        assert np.isfinite(found.descriptor).all()
        assert not found.descriptor[:, rows].any()
        assert np.allclose(np.linalg.norm(found.descriptor, axis=1), 1, atol=1e-6)

    def kill(done: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        stream_responses(as_performer(net), images, out=tmp_path, progress=kill)
    assert stream_responses(as_performer(net), images, out=tmp_path).dead_layers == 11
    silent = normalised(torch.zeros(2, 3), FeatureIndex(("a",), (3,)))[0]
    assert silent.tolist() == [[0.0] * 3] * 2


def test_one_pass_gives_descriptors_peaks_and_scores(tiny, images, tmp_path) -> None:
    seen = []
    found = stream_responses(tiny, images, out=tmp_path, top=(5, 9), progress=lambda *a: seen.append(a))
    assert seen == [(4,), (8,), (11,)]
    batch = tiny.preprocessing([images.read(i) for i in range(11)])
    output, taps = forward_taps(tiny, batch, found.index.layers)
    assert found.keys == tuple(images.keys)
    assert found.index.layers == (
        "conv1",
        "relu1",
        "conv2",
        "relu2",
        "conv3",
        "relu3",
        "pool3",
        "conv4",
        "relu4",
    )
    energies = torch.cat([energy(taps[layer]) for layer in found.index.layers], 1)
    assert np.allclose(found.descriptor, normalised(energies, found.index)[0], atol=1e-6)
    assert np.allclose(found.logits, output, atol=1e-5)
    assert isinstance(found.descriptor, np.memmap)
    for layer in found.index.layers:
        rows, flat = found.index.rows(layer), taps[layer][:9].flatten(2)
        peak, order = flat.amax(2).sort(dim=0, descending=True, stable=True)
        assert np.array_equal(found.top.photo[:, rows], order[:5])
        assert np.allclose(found.top.peak[:, rows], peak[:5], atol=1e-5)
        cells = torch.from_numpy(found.top.cell[:, rows].astype(int))
        at = cells[..., 0] * taps[layer].shape[3] + cells[..., 1]
        there = flat[order[:5], torch.arange(flat.shape[1])].gather(2, at[:, :, None])[:, :, 0]
        assert torch.allclose(there, peak[:5], atol=1e-5)
    some = found.top.of([7, 2]).first(3)
    assert np.array_equal(some.photo, found.top.photo[:3][:, [7, 2]])
    assert np.array_equal(some.cell, found.top.cell[:3][:, [7, 2]])
    light = stream_responses(tiny, images)
    assert light.top.photo.shape == (0, found.index.size)
    assert np.allclose(light.descriptor, found.descriptor, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_merged_photos_are_those_of_one_stable_sort(photos: int, count: int, step: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    peak = generator.integers(0, 4, (photos, 3)).astype(np.float32)  # few values: ties everywhere
    cell = generator.integers(0, 9, (photos, 3, 2)).astype(np.int16)
    top = TopPhotos.none(min(count, photos), 3)
    for first in range(0, photos, step):
        top = top.merged(peak[first : first + step], cell[first : first + step], first)
    order = np.argsort(-peak, axis=0, kind="stable")[:count]
    assert np.array_equal(top.photo, order)
    assert np.array_equal(top.peak, np.take_along_axis(peak, order, 0))
    assert np.array_equal(top.cell, np.take_along_axis(cell, order[:, :, None], 0))


def test_a_killed_pass_goes_on_with_the_next_batch(tiny, images, tmp_path) -> None:
    def kill(done: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        stream_responses(tiny, images, out=tmp_path / "a", top=(3, 11), progress=kill)
    assert json.loads((tmp_path / "a" / RowRecord.FILE).read_text())["rows_done"] == 8
    whole = stream_responses(tiny, images, out=tmp_path / "b", top=(3, 11))
    seen: list[int] = []
    again = {"out": tmp_path / "a", "top": (3, 11), "progress": seen.append}
    resumed = stream_responses(tiny, images, **again)
    assert seen == [11]
    for part in ("descriptor", "logits"):
        assert np.array_equal(getattr(resumed, part), getattr(whole, part))
    for name, values in vars(whole.top).items():
        assert np.array_equal(getattr(resumed.top, name), values)
    assert resumed.dead_layers == whole.dead_layers
    seen.clear()
    stream_responses(tiny, images, **again)
    assert not seen


def test_responses_of_another_configuration_are_refused(tiny, images, tmp_path) -> None:
    stream_responses(tiny, images, out=tmp_path)
    before = (tmp_path / RowRecord.FILE).read_text()
    for change in (
        {"config": PLAIN},
        {"images": images.take([0, 1])},
        {"top": (2, 5)},
        {"performer": dataclasses.replace(tiny, weights_sha256="0" * 64)},
    ):
        with pytest.raises(RunError, match="delete this one"):
            stream_responses(**{"performer": tiny, "images": images, "out": tmp_path, **change})
    assert (tmp_path / RowRecord.FILE).read_text() == before


def test_a_corrupt_image_is_named_and_finished_batches_stay(tiny, tmp_path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index}.png")
    (folder / "4.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"4\.png"):
        stream_responses(tiny, ImageSet.from_folder(folder), out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / RowRecord.FILE).read_text())["rows_done"] == 4


def test_the_performer_is_left_as_it_was(images, tmp_path) -> None:
    net = Residual()
    net.train()
    net.drop.eval()
    net.fc.weight.requires_grad = False
    net.stem.weight.grad = torch.ones_like(net.stem.weight)
    net.stem.register_forward_hook(lambda *_: None)
    performer = as_performer(net)

    def state() -> tuple:
        return (
            weights_sha256(net),
            [m.training for m in net.modules()],
            [getattr(m, "inplace", None) for m in net.modules()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()],
            [(p.requires_grad, id(p.grad), p.data_ptr()) for p in net.parameters()],
            torch.get_rng_state().tolist(),
            float(net.stem.weight.grad.sum()),
        )

    before = state()
    found = stream_responses(performer, images)
    image_descriptors(performer, torch.randn(1, 3, 16, 16, generator=torch.Generator()), found.index)
    assert state() == before
    with pytest.raises(InputError, match="finite"):
        image_descriptors(performer, torch.full((1, 3, 16, 16), torch.nan), found.index)
    with pytest.raises(Killed):
        stream_responses(performer, images, out=tmp_path, progress=lambda *_: (_ for _ in ()).throw(Killed))
    assert state() == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4000, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16000, 2)).eval()
    images = ImageSet.from_arrays(np.zeros((800, 4, 4, 3), dtype=np.uint8))
    seen: list[int] = []

    def watch(*_: int) -> None:
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    found = stream_responses(as_performer(net, 4), images, out=tmp_path, top=(9, 800), progress=watch)
    assert found.descriptor.nbytes > 20e6
    third = len(seen) // 3
    assert max(seen[-third:]) - max(seen[:third]) < 20e6
