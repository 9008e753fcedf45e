"""Which layers there are, which can be explained and why the others cannot, and which are chosen."""

from __future__ import annotations

import pytest
from torch import nn

from partlens.errors import LayerError
from partlens.network.graph import trace
from partlens.network.layers import default_targets
from partlens.network.preprocessing import Preprocessing
from partlens.network.zoo import Performer


def of(module: nn.Module, size: tuple[int, int]) -> Performer:
    """A performer with an input of this size."""
    return Performer(module, "x", Preprocessing(size_px=size), "")


@pytest.mark.parametrize(
    ("name", "size", "tap"),
    [
        ("resnet18", 224, "layer3"),
        ("vgg16", 224, "features.27"),
        ("alexnet", 224, "features.9"),
        ("squeezenet1_1", 224, "features.11"),
        ("googlenet", 224, "inception4e"),
    ],
)
def test_default_taps(network, name: str, size: int, tap: str) -> None:
    module = network(name)
    assert of(module, (size, size)).tap == tap
    layers = of(module, (size, size)).layers
    assert [layer.name for layer in layers if layer.is_default] == [tap]


def test_layers_are_listed_in_order_with_their_sizes(network) -> None:
    layers = of(network("resnet18"), (64, 64)).layers
    by_name = {layer.name: layer for layer in layers}
    assert [layer.name for layer in layers[:3]] == ["conv1", "bn1", "relu"]
    assert (by_name["conv1"].shape, by_name["conv1"].stride_px, by_name["conv1"].kind) == (
        (64, 32, 32),
        (2, 2),
        "Conv2d",
    )
    assert by_name["maxpool"].receptive_field_px == (11, 11)
    assert "layer1.0.relu_1" in by_name
    assert (by_name["fc"].shape, by_name["fc"].reason) == ((7,), "gives vectors, no maps")


def test_layers_of_a_network_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.conv(x) if x.sum() > -1 else x

    (layer,) = of(Branching(), (8, 8)).layers
    assert (layer.shape, layer.stride_px, layer.is_default) == ((4, 6, 6), None, False)


def test_maps_of_one_cell_are_refused(network) -> None:
    module = network("resnet18")
    with pytest.raises(LayerError, match=r"1x1 maps.*layer"):
        of(module, (64, 64)).layer("avgpool")
    with pytest.raises(LayerError, match="another output"):
        of(module, (64, 64)).layer("fc")
    with pytest.raises(LayerError, match="Nearest: layer3"):
        of(module, (64, 64)).layer("layr3")
    assert of(module, (64, 64)).layer("layer3").shape == (256, 4, 4)


def test_default_targets_without_blocks() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
    )
    assert default_targets(trace(module), "1", (16, 16)) == ("3", "5")
    assert default_targets(trace(module), "3", (16, 16)) == ("5",)
    with pytest.raises(LayerError, match="none"):
        default_targets(trace(module), "6", (16, 16))
