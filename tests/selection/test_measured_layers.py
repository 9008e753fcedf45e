"""Which layers a descriptor measures, in the papers' networks and in awkward ones."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from partlens.errors import LayerError
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import DescriptorConfig, FeatureIndex
from partlens.selection.responses import image_descriptors
from partlens_papers.networks.paper_networks import PaperNet


def descriptor_layers(performer, config=None):
    return feature_index(performer, config).layers


MADE = runpy.run_path(str(Path(__file__).with_name("made_networks.py")))
as_performer, matconvnet_lenet, Residual = MADE["as_performer"], MADE["matconvnet_lenet"], MADE["Residual"]


def test_T3_the_papers_networks_have_the_papers_descriptors() -> None:
    vgg = as_performer(PaperNet("vgg-f", num_classes=3).eval(), 224)
    index = feature_index(vgg)
    assert index.size == 19456
    early = [f"{kind}{number}" for number in (1, 2) for kind in ("conv", "relu", "norm", "pool")]
    late = ["conv3", "relu3", "conv4", "relu4", "conv5", "relu5", "pool5", "fc6", "relu6", "fc7", "relu7"]
    assert index.layers == (*early, *late)
    lenet = as_performer(matconvnet_lenet(), 28, channels=1)
    small = feature_index(lenet)
    assert small.layers == ("conv1", "pool1", "conv2", "pool2", "conv3", "relu")
    assert small.channels == (20, 20, 50, 50, 500, 500)
    for each in (small, index):
        places = [each.place(feature) for feature in range(each.size)]
        assert [each.feature(*place) for place in places] == list(range(each.size))
        assert [layer for layer in each.layers for _ in range(each.rows(layer).start, each.rows(layer).stop)] == [
            layer for layer, _ in places
        ]
    assert descriptor_layers(lenet, DescriptorConfig(layers="convolutions")) == ("conv1", "conv2", "conv3")
    assert descriptor_layers(lenet, DescriptorConfig(layers="activations")) == ("relu",)


def test_blocks_stand_for_operations_and_repeated_modules_count_every_call() -> None:
    performer = as_performer(Residual().eval())
    index = feature_index(performer)
    assert index.layers == ("stem", "block.relu", "block.conv", "block.relu_1", "block")
    assert descriptor_layers(performer, DescriptorConfig(layers="activations")) == (
        "block.relu",
        "block.relu_1",
        "block",
    )
    x, logits = image_descriptors(performer, torch.randn(2, 3, 16, 16), index)
    assert x.shape == (2, 20)
    assert logits.shape == (2, 3)


class Tokens(nn.Module):
    """Has outputs that are neither maps nor vectors: tokens, and groups of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 4), nn.Linear(4, 2)
        self.pair = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.mix(self.conv(x).flatten(2).transpose(1, 2))
        return self.fc(self.pair(tokens.unflatten(1, (98, 2)).flatten(2)).mean(1).unflatten(1, (2, 4)).mean(1))


def test_other_shapes_and_the_result_itself_are_left_out() -> None:
    assert descriptor_layers(as_performer(Tokens().eval())) == ("conv", "mix")
    assert descriptor_layers(as_performer(nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)))) == ("0",)
    shrinking = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(14), nn.AdaptiveAvgPool2d(2), nn.Conv2d(4, 2, 2))
    assert descriptor_layers(as_performer(shrinking)) == ("0", "2")  # 16 px give 14x14 cells: the first pooling is idle


def test_layers_by_name_and_unknown_ones() -> None:
    performer = as_performer(Residual().eval())
    assert feature_index(performer, DescriptorConfig(layers=("block", "stem"))) == FeatureIndex(
        ("block", "stem"), (4, 4)
    )
    with pytest.raises(LayerError, match=r"Nearest: .*stem"):
        feature_index(performer, DescriptorConfig(layers=("stam",)))
    linear = as_performer(nn.Sequential(nn.Flatten(), nn.Linear(768, 2)))
    for layers in ("outputs", "activations", "convolutions"):
        with pytest.raises(LayerError, match=f"{layers} with modules"):
            feature_index(linear, DescriptorConfig(layers=layers))
    with pytest.raises(LayerError, match="class scores"):
        image_descriptors(
            as_performer(nn.Sequential(nn.Conv2d(3, 2, 3))), torch.zeros(1, 3, 9, 9), FeatureIndex(("0",), (2,))
        )
    with pytest.raises(LayerError, match="5 channels in stem, got 4"):
        image_descriptors(performer, torch.zeros(1, 3, 9, 9), FeatureIndex(("stem",), (5,)))


def test_a_pooled_copy_of_whole_maps_is_no_layer_of_its_own() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    performer = as_performer(nn.Sequential(*layers).eval(), 8)
    assert feature_index(performer).layers == ("0", "1")


def test_a_convolution_that_only_its_normalisation_reads_is_no_layer_of_its_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
            self.twice, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.norm(self.first(x)))
            y = self.twice(x)  # read by the normalisation and by the sum
            return self.fc((self.norm2(y) + y).mean((2, 3)))

    performer = as_performer(Net().eval(), 12)
    assert descriptor_layers(performer) == ("norm", "relu", "twice", "norm2")
    assert descriptor_layers(performer, DescriptorConfig(layers="convolutions")) == ("first", "twice")
