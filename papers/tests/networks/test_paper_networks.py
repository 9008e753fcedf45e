"""The papers' networks: their sizes, their cells, how they are loaded, and what is chosen in them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from partlens.errors import WeightsError
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import cell_centre_px
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer
from partlens_papers.networks.paper_networks import PaperNet


def small_alexnet(default_tap: str | None = None) -> Performer:
    torch.manual_seed(0)
    module = PaperNet("alexnet-caffe", num_classes=5, input_px=96, hidden=16).eval()
    return Performer(module, "x", Preprocessing(size_px=(96, 96)), weights_sha256(module), default_tap)


def test_the_papers_layers_are_chosen_and_the_copy_behind_them_is_exact() -> None:
    performer = small_alexnet()
    assert performer.tap == "relu4"
    assert performer.targets("relu4") == ("relu6", "relu7")
    assert small_alexnet("relu3").tap == "relu3"
    output, values = forward_taps(performer, torch.randn(2, 3, 96, 96), ["relu4", "relu6", "relu7"])
    with torch.no_grad():
        made = performer.upper("relu4", ["relu6", "relu7", "output"])(values["relu4"])
    for got, wanted in zip(made, (values["relu6"], values["relu7"], output), strict=True):
        assert torch.equal(got, wanted)
    assert weights_sha256(performer.module) == performer.weights_sha256


def test_own_networks_need_weights() -> None:
    with pytest.raises(WeightsError, match="@random:0 for random weights"):
        load_performer("partlens_papers.performers:vgg_m")


@pytest.mark.parametrize(("net", "first", "stride"), [("alexnet-caffe", 18, 16), ("vgg-m", 18, 16), ("vgg-s", 21, 12)])
def test_the_papers_grid_of_cell_centres(net: str, first: int, stride: int) -> None:
    module = PaperNet(net, hidden=2)
    field = Performer(module, "", Preprocessing(size_px=(module.input_px, module.input_px)), "").field("relu4")
    one_based = cell_centre_px(field, [[0, 0], [1, 3]]) + 0.5
    assert one_based.tolist() == [[first, first], [first + 3 * stride, first + stride]]


@pytest.mark.parametrize(
    ("net", "relu4", "pool5"),
    [
        ("alexnet-caffe", (384, 13, 13), (256, 6, 6)),
        ("vgg-m", (512, 13, 13), (512, 6, 6)),
        ("vgg-s", (512, 17, 17), (512, 6, 6)),
        ("vgg-f", (256, 13, 13), (256, 6, 6)),
    ],
)
def test_the_papers_networks_have_the_papers_sizes(net: str, relu4: tuple, pool5: tuple) -> None:
    module = PaperNet(net, hidden=4)
    seen = {}
    for name, layer in module.named_children():
        layer.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        module(torch.zeros(1, 3, module.input_px, module.input_px))
    assert seen["relu4"] == relu4
    assert seen["pool5"] == pool5
    assert list(seen)[-7:] == ["fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]


def test_local_response_norm_is_caffes() -> None:
    norm = PaperNet("alexnet-caffe", input_px=96, hidden=2).norm1
    x = torch.full((1, 96, 1, 1), 100.0)
    scale = 1 + 1e-4 / 5 * 5 * 100.0**2  # five neighbours inside the map: (alpha / n) sum of squares
    assert float(norm(x)[0, 50, 0, 0]) == pytest.approx(100 / scale**0.75)


def test_caffe_alexnet_without_its_head(tmp_path) -> None:
    module = PaperNet("alexnet-caffe", hidden=2)
    convs = {n: v for n, v in module.state_dict().items() if n.startswith("conv")}
    save_file(convs, tmp_path / "convs.safetensors", metadata={"input": "BGR, 0-255, mean 104 117 123, std 1"})
    performer = load_performer(f"partlens_papers.performers:alexnet_caffe@{tmp_path}/convs.safetensors")
    assert "fc6, fc7 and fc8 are absent" in performer.notes[0]
    assert torch.equal(performer.module.conv5.weight, module.conv5.weight)
    assert performer.preprocessing.channel_order == "BGR"
    again = load_performer(f"partlens_papers.performers:alexnet_caffe@{tmp_path}/convs.safetensors")
    assert again.weights_sha256 == performer.weights_sha256
    del convs["conv5.bias"]
    save_file(convs, tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match=r"conv5\.bias"):
        load_performer(f"partlens_papers.performers:alexnet_caffe@{tmp_path}/less.safetensors")


def test_narrow_networks_of_the_papers_and_their_classes_come_from_the_file(tmp_path) -> None:
    module = PaperNet("vgg-f", num_classes=2, input_px=67, hidden=6).eval()
    header = Preprocessing(size_px=(67, 67), resize="squash").to_metadata() | {"class_names": '["fox", "cat"]'}
    save_file(module.state_dict(), tmp_path / "w.safetensors", metadata=header)
    performer = load_performer(f"partlens_papers.performers:vgg_f@{tmp_path}/w.safetensors")
    assert performer.class_names == ("fox", "cat")
    assert performer.weights_sha256 == weights_sha256(module)
    assert performer.untrained_layers == ()
    save_file(module.state_dict(), tmp_path / "x.safetensors", metadata=header | {"class_names": '["fox"]'})
    with pytest.raises(WeightsError, match="2 class names"):
        load_performer(f"partlens_papers.performers:vgg_f@{tmp_path}/x.safetensors")
