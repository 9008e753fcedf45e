"""The precision of passes over photos: what is measured, what is chosen, and that the network is as it was."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.errors import InputError, RunError
from partlens.network import layout, precision
from partlens.network.performer import Performer, weights_sha256
from partlens.network.precision import TOLERANCE, chosen_precision
from partlens.network.preprocessing import Preprocessing
from partlens.network.stream import stream, stream_maps
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer
from partlens.run import PassPrecision
from partlens.selection.descriptors import energy_and_peak


class Split(nn.Module):
    """Views its input in a way that channels-last memory does not allow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1)


def small(*last: nn.Module) -> Performer:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *(last or (nn.Flatten(),)), nn.Linear(1568, 4)]
    return load_performer(nn.Sequential(*layers).eval(), Preprocessing(size_px=(16, 16), resize="squash"))


@pytest.fixture
def images() -> ImageSet:
    return ImageSet.from_arrays(np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Made-up seconds a pass, in the order of the tried precisions, two passes each."""
    given = [9.0, 1.0, 4.0]  # float32, bfloat16, channels last
    ticks = itertools.count()

    def clock() -> float:
        tick = next(ticks)
        return given[tick // 4] * (tick % 2)

    monkeypatch.setattr(precision.time, "perf_counter", clock)
    monkeypatch.setattr(precision, "_WORTH_SECONDS", 0)
    monkeypatch.setattr(precision, "has_bfloat16_units", lambda _: True)
    return given


def test_the_fastest_that_agrees_is_chosen(images: ImageSet, seconds: list[float]) -> None:
    performer = small()
    found = chosen_precision(performer, images, range(40), ["2"])
    assert (found.used, found.photos, found.agreement, found.notes) == ("bfloat16", 16, 1, ())
    assert found.faster == pytest.approx(9)
    assert 0 < found.error < TOLERANCE
    # The error is that of the layer or the scores, whichever is larger, by hand.
    photos = performer.preprocessing([images.read(k * 40 // 16) for k in range(16)])
    batches = [forward_taps(each, photos, ["2"]) for each in (performer, performer.computing("bfloat16"))]
    by_hand = max(float((b - a).norm() / a.norm()) for a, b in zip(*((o, m["2"]) for o, m in batches), strict=True))
    assert found.error == pytest.approx(by_hand, rel=0.05)


def test_one_that_is_off_or_slow_is_not_chosen(
    images: ImageSet, seconds: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "TOLERANCE", 1e-5)
    found = chosen_precision(small(), images, range(40), ["2"])
    assert found.used == "float32-channels-last"
    assert "bfloat16 is" in found.notes[0]


def test_no_gain_leaves_float32(images: ImageSet, seconds: list[float]) -> None:
    seconds[:] = [1.0, 0.95, 1.0]
    assert chosen_precision(small(), images, range(40)).used == "float32"


def test_a_network_that_refuses_is_left_in_float32_with_the_reason(images: ImageSet, seconds: list[float]) -> None:
    found = chosen_precision(small(Split()), images, range(40))
    assert found.used == "float32"
    assert len(found.notes) == 2
    assert "view size is not compatible" in found.notes[0]


def test_little_work_is_not_probed(images: ImageSet) -> None:
    assert chosen_precision(small(), images, range(40)) == PassPrecision(used="float32")
    assert chosen_precision(small(), images, range(40), wanted="bfloat16") == PassPrecision(used="bfloat16")


def test_bfloat16_needs_float32_weights(images: ImageSet) -> None:
    performer = small()
    performer.module.double()
    with pytest.raises(InputError, match="float32 weights for passes in bfloat16, got float64"):
        chosen_precision(performer, images, range(40), wanted="bfloat16")
    assert chosen_precision(performer, images, range(40)).used == "float32"


@pytest.mark.parametrize("used", ["float32-channels-last", "bfloat16"])
def test_what_a_pass_gives_is_float32_and_the_network_as_it_was(images: ImageSet, used: str) -> None:
    performer = small().computing(used)
    before, strides = weights_sha256(performer.module), [p.stride() for p in performer.module.parameters()]
    (batch,) = stream(performer, images, range(5), ["0", "2"])
    assert {value.dtype for value in (batch.outputs, *batch.maps.values())} == {torch.float32}
    (plain,) = stream(performer.computing("float32"), images, range(5), ["0", "2"])
    for name, value in batch.maps.items():
        assert not torch.equal(value, plain.maps[name]) or used != "bfloat16"
        assert torch.allclose(value, plain.maps[name], rtol=0.03, atol=0.03)
    assert weights_sha256(performer.module) == before
    assert [p.stride() for p in performer.module.parameters()] == strides


def test_what_was_computed_is_kept() -> None:
    performer = small()
    known = performer.layers, performer.outputs
    other = performer.computing("bfloat16")
    assert (other.layers, other.outputs) == known
    assert other.layers is known[0]
    assert performer.precision == "float32"


def test_layouts_of_a_pass_are_found_once(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    performer, asked = small(), []
    whole = layout.tap_layout
    monkeypatch.setattr("partlens.network.performer.tap_layout", lambda *given: asked.append(given[2]) or whole(*given))
    list(stream(performer, images, range(12), ["0", "2"], batch_size=4))
    assert asked == ["0", "2"]


def test_maps_of_another_precision_are_another_cache(images: ImageSet, tmp_path) -> None:
    performer = small()
    stream_maps(performer, images, ["2"], tmp_path)
    with pytest.raises(RunError, match="precision"):
        stream_maps(performer.computing("bfloat16"), images, ["2"], tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_energies_and_peaks_do_not_depend_on_the_memory_order(dtype: torch.dtype) -> None:
    maps = torch.randint(-3, 4, (3, 5, 4, 6), generator=torch.Generator().manual_seed(0)).to(dtype)
    maps[0, 0] = 0
    found = energy_and_peak(maps.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(found, energy_and_peak(maps.float()))
