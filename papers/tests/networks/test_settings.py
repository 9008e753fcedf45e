"""The papers' settings against the table of their networks, and how a network is recognised."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torchvision
from torch import nn

from partlens.errors import InputTypeError
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens_papers.networks.paper_networks import PaperNet
from partlens_papers.networks.settings import paper_setting


def of(module: nn.Module, size: tuple[int, int]) -> Performer:
    """A performer with an input of this size."""
    return Performer(module, "x", Preprocessing(size_px=size), "")


PLAIN = ("alexnet-caffe", "vgg-m", "vgg-s", "vgg16")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@cache
def outline(name: str) -> nn.Module:
    """The network at full size without numbers: shapes cost nothing on the meta device."""
    with torch.device("meta"):
        module = PaperNet(name) if name in PLAIN[:3] else torchvision.models.get_model(name, weights=None)
    return module.eval()


def shapes(module: nn.Module, names: list[str], input_px: int) -> dict[str, tuple[int, ...]]:
    seen: dict[str, tuple[int, ...]] = {}
    handles = [
        module.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: tuple(out.shape[1:])})
        )
        for name in names
    ]
    module(torch.zeros(1, 3, input_px, input_px, device="meta"))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("name", "cells", "channels", "conv", "emitted", "pool", "pooled", "decoder"),
    [
        ("alexnet-caffe", 13, 384, "conv5", 256, (3, 2), (256, 6, 6), ("fc6", "fc7")),
        ("vgg-m", 13, 512, "conv5", 512, (3, 2), (512, 6, 6), ("fc6", "fc7")),
        ("vgg-s", 17, 512, "conv5", 512, (3, 3), (512, 6, 6), ("fc6", "fc7")),
        ("vgg16", 14, 512, "features.28", 512, (2, 2), (512, 7, 7), ("classifier.0", "classifier.3")),
    ],
)
def test_plain_networks_have_the_sizes_of_the_papers_table(
    name: str,
    cells: int,
    channels: int,
    conv: str,
    emitted: int,
    pool: tuple[int, int],
    pooled: tuple[int, int, int],
    decoder: tuple[str, str],
) -> None:
    setting, module = paper_setting(name), outline(name)
    assert setting is not None
    last_pool = "features.30" if name == "vgg16" else "pool5"
    seen = shapes(module, [setting.tap, conv, last_pool, *setting.targets], setting.input_px)
    assert setting.side_cells == cells
    order = [layer for layer, _ in module.named_modules()]
    assert order[order.index(setting.tap) + 1] == conv  # relu5_3 of VGG-16 has the size of relu5_2, too
    assert [order[order.index(layer) + 1] for layer in decoder] == list(setting.targets)
    assert seen[setting.tap] == (channels, cells, cells)
    assert seen[conv] == (emitted, cells, cells)  # zero padding keeps the size, the decoder decides the channels
    layer = module.get_submodule(last_pool)
    assert (layer.kernel_size, layer.stride) == pool
    assert seen[last_pool] == pooled
    assert module.get_submodule(decoder[0]).weight.shape == (4096, pooled[0] * pooled[1] * pooled[2])
    assert module.get_submodule(decoder[1]).weight.shape == (4096, 4096)
    assert [seen[target] for target in setting.targets] == [(4096,), (4096,)]
    assert setting.note == ""


@pytest.mark.parametrize(
    ("name", "tap", "size", "targets"),
    [
        ("resnet18", "layer3", (256, 14, 14), (512, 7, 7)),
        ("resnet34", "layer4.0", (512, 7, 7), (512, 7, 7)),
        ("resnet50", "layer4.0", (2048, 7, 7), (2048, 7, 7)),
        ("resnet101", "layer4.0", (2048, 7, 7), (2048, 7, 7)),
        ("resnet152", "layer4.0", (2048, 7, 7), (2048, 7, 7)),
    ],
)
def test_resnets_are_tapped_a_block_before_the_last_two(
    name: str, tap: str, size: tuple[int, int, int], targets: tuple[int, int, int]
) -> None:
    setting, module = paper_setting(outline(name)), outline(name)
    assert setting is not None
    assert (setting.network, setting.tap) == (name, tap)
    seen = shapes(module, [tap, *setting.targets], setting.input_px)
    assert seen[tap] == size
    assert size[1] == setting.side_cells
    assert [seen[t] for t in setting.targets] == [targets, targets]
    blocks = len(module.layer4)
    assert setting.targets == (f"layer4.{blocks - 2}", f"layer4.{blocks - 1}")
    assert "sizes agree" in setting.note
    assert ("not among" in setting.note) == (name not in {"resnet101", "resnet152"})


def test_eta_is_the_papers() -> None:
    etas = {name: paper_setting(name).eta for name in (*PLAIN, *RESNETS)}
    assert etas == {n: 1.0e6 if n in PLAIN[:3] else 1.5e5 for n in (*PLAIN, *RESNETS)}


@pytest.mark.parametrize("name", [*PLAIN, *RESNETS])
def test_a_network_is_recognised_by_its_layers(name: str) -> None:
    module = outline(name)
    assert paper_setting(module) == paper_setting(name)
    assert paper_setting(nn.DataParallel(module)) == paper_setting(name)
    renamed = Performer(module, "my/own network", Preprocessing(), "")
    assert paper_setting(renamed) == paper_setting(name)


def test_width_of_the_head_and_input_are_free() -> None:
    assert paper_setting(PaperNet("vgg-m", num_classes=1, input_px=99, hidden=8)) == paper_setting("vgg-m")


@pytest.mark.parametrize(
    "name",
    ["vgg16_bn", "vgg13", "vgg19", "alexnet", "resnext50_32x4d", "wide_resnet50_2", "googlenet", "convnext_tiny"],
)
def test_other_networks_have_no_setting(name: str) -> None:
    with torch.device("meta"):
        extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
        module = torchvision.models.get_model(name, weights=None, **extra)
    assert paper_setting(module) is None
    assert paper_setting(f"torchvision:{name}") is None


def test_small_changes_of_the_layers_are_seen() -> None:
    assert paper_setting(PaperNet("vgg-f", hidden=4)) is None
    with torch.device("meta"):
        altered = torchvision.models.resnet18(weights=None)
        altered.layer2[0].conv1 = nn.Conv2d(64, 100, 3)
        grouped = torchvision.models.resnet18(weights=None)
        grouped.layer4[1].conv2 = nn.Conv2d(512, 512, 3, padding=1, groups=2)
        watched = torchvision.models.resnet18(weights=None)
        watched.layer4[1].se = nn.Linear(512, 512)
    assert [paper_setting(m) for m in (altered, grouped, watched)] == [None, None, None]


def test_timms_resnet_is_the_same_network() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert paper_setting(timm.create_model("resnet50")) == paper_setting("resnet50")
        assert paper_setting(timm.create_model("seresnet50")) is None


def test_names() -> None:
    assert paper_setting("torchvision:vgg16@weights.safetensors") == paper_setting("vgg16")
    assert paper_setting("partlens_papers.performers:alexnet_caffe@random:0").network == "alexnet-caffe"
    assert paper_setting("timm:vgg16") is None  # its layers have other names
    assert paper_setting("torchvision:vgg-m") is None
    with pytest.raises(InputTypeError):
        paper_setting(7)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "side"), [("alexnet-caffe", 99), ("vgg-m", 99), ("vgg-s", 131)])
def test_the_papers_layers_are_our_defaults_on_plain_networks(name: str, side: int) -> None:
    module = PaperNet(name, num_classes=2, input_px=side, hidden=8).eval()
    setting = paper_setting(module)
    assert of(module, (side, side)).tap == setting.tap
    assert of(module, (side, side)).targets(setting.tap) == setting.targets


def test_the_targets_are_our_defaults_on_resnets_and_their_taps_are_listed() -> None:
    module = torchvision.models.resnet34(weights=None).eval()
    setting = paper_setting(module)
    assert of(module, (64, 64)).targets(setting.tap) == setting.targets
    assert {setting.tap, *setting.targets} <= {layer.name for layer in of(module, (64, 64)).layers}
