"""Which layers there are, which can be explained and why the others cannot, and which are chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from partlens.errors import LayerError
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing


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
    assert of(module, (16, 16)).targets("1") == ("3", "5")
    assert of(module, (16, 16)).targets("3") == ("5",)
    with pytest.raises(LayerError, match="none"):
        of(module, (16, 16)).targets("6")


def chain(*stages: tuple[int, int], head: int = 2) -> nn.Sequential:
    """Convolutions with a ReLU each (filters, stride), then a classifier of one layer."""
    layers: list[nn.Module] = []
    channels = 3
    for filters, stride in stages:
        layers += [nn.Conv2d(channels, filters, 1, stride), nn.ReLU()]
        channels = filters
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, head))


def test_a_bottleneck_is_not_the_default_tap() -> None:
    # The candidates are those with two layers after them: all but the last activation.
    assert of(chain((8, 1), (4, 1), (8, 1)), (16, 16)).tap == "3"  # half of the widest before it is enough
    assert of(chain((8, 1), (3, 1), (8, 1)), (16, 16)).tap == "1"
    assert of(chain((3, 1), (8, 1), (8, 1)), (16, 16)).tap == "3"  # only what comes earlier makes it narrow
    assert of(chain((8, 1), (3, 1), (4, 1), (8, 1)), (16, 16)).tap == "5"  # a bottleneck is no measure itself


def test_the_default_tap_is_the_last_that_is_fine_enough() -> None:
    stages = ((4, 1), (4, 2), (4, 2), (4, 1))
    assert of(chain(*stages), (24, 24)).tap == "3"  # 12 rows, then 6
    assert of(chain(*stages), (22, 22)).tap == "1"  # 22 rows, then 11
    assert of(chain(*stages), (11, 11)).tap == "1"  # nothing has 12: the last with the most rows
    assert of(chain((4, 1), (4, 1), (4, 1)), (8, 8)).tap == "3"
    with pytest.raises(LayerError, match="larger than 1x1 and two layers after it, got none"):
        _ = of(chain((4, 1)), (16, 16)).tap
    with pytest.raises(LayerError, match="larger than 1x1"):
        _ = of(chain((4, 1), (4, 1), (4, 1)), (1, 1)).tap


class Branches(nn.Module):
    """The only layers that everything passes are the stem, whose cells see 3 px, and the one before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3), nn.ReLU()
        self.fine, self.coarse, self.last = nn.Conv2d(8, 8, 16, 8), nn.Conv2d(8, 8, 16, 8), nn.ReLU()
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        return self.head(self.last(self.fine(x) + self.coarse(x)).mean((2, 3)))


@pytest.mark.parametrize(("side", "tap"), [(64, "last"), (32, "relu")])
def test_a_layer_that_sees_no_part_of_an_object_is_not_the_default_tap(side: int, tap: str) -> None:
    shape = Preprocessing(size_px=(side, side), resize="squash")
    assert Performer(Branches().eval(), "branches", shape, "").tap == tap


def test_hidden_linear_layers_ask_for_the_activation_before_the_last_convolution() -> None:
    def network(linears: int) -> nn.Sequential:
        head = [layer for _ in range(linears) for layer in (nn.Linear(4, 4), nn.ReLU())][:-1]
        convs = [layer for filters in (3, 4, 4) for layer in (nn.Conv2d(filters, 4, 1), nn.ReLU())]
        return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)

    assert of(network(3), (16, 16)).tap == "3"
    assert of(network(2), (16, 16)).tap == "5"
    assert of(network(3), (16, 16)).targets("3") == ("9", "11")  # the papers' fc6 and fc7, after their activation


class Reasons(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.relu = nn.ReLU()
        self.inner = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d((1, 4))
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(16, 2)
        self.tokens = nn.Unflatten(1, (2, 8))
        self.maps = nn.Identity()

    def forward(self, x):
        x = self.relu(self.conv(x))
        x = self.pool(x + self.inner(x))
        return self.maps(self.fc(self.tokens(self.flatten(x)).flatten(1))[:, :, None, None].expand(-1, -1, 2, 2).relu())


def test_every_layer_says_why_no_explainer_can_be_fitted_to_it() -> None:
    assert {layer.name: layer.reason for layer in of(Reasons(), (8, 8)).layers} == {
        "conv": "",
        "relu": "",
        "inner": "a shortcut goes around it",
        "pool": "maps of one row or column",
        "flatten": "gives vectors, no maps",
        "tokens": "the 2 tokens fit no grid of places",
        "fc": "gives vectors, no maps",
        "maps": "no layer after it",
    }
    assert [layer.name for layer in of(Reasons(), (8, 8)).layers if layer.has_places] == [
        "conv",
        "relu",
        "inner",
        "maps",
    ]

    class Branching(Reasons):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    assert of(Branching(), (8, 8)).layers == of(Reasons(), (8, 8)).layers


def test_what_is_computed_without_gradients_and_written_in_place_is_followed() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.side, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 1, 3), nn.Conv2d(4, 2, 3, stride=2)

        def forward(self, x):
            with torch.no_grad():
                maps = self.conv(x)
                maps.relu_()
            maps *= self.side(x)
            mask = torch.zeros_like(x)  # of sizes alone: no way around
            return self.last(maps) + mask.sum()

    layers = {layer.name: layer for layer in of(Frozen(), (8, 8)).layers}
    assert [layers[name].reason for name in ("conv", "side")] == ["a shortcut goes around it"] * 2
    assert layers["last"].reason == "no layer after it"
    assert (layers["last"].stride_px, layers["last"].receptive_field_px) == ((2, 2), (5, 5))


def test_outputs_of_several_tensors_and_repeated_calls_are_listed() -> None:
    class Pair(nn.Module):
        def forward(self, x):
            return {"flat": x.mean((2, 3)), "map": x}

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.relu, self.conv = Pair(), nn.ReLU(), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return self.relu(self.conv(self.relu(self.pair(x)["map"])))

    layers = {layer.name: layer for layer in dataclasses.replace(of(Twice(), (4, 4)), default_tap="relu_1").layers}
    assert list(layers) == ["pair", "relu", "conv", "relu_1"]
    assert layers["pair"].shape == (3, 4, 4)
    assert layers["relu_1"].is_default
    assert not layers["relu"].is_default


def test_the_output_is_a_target_only_where_there_is_no_other() -> None:
    convs = [layer for filters in (3, 4, 4) for layer in (nn.Conv2d(filters, 4, 1), nn.ReLU())]
    module = nn.Sequential(*convs)
    assert of(module, (8, 8)).targets("1") == ("3",)
    assert of(module, (8, 8)).targets("3") == ("4",)
    assert of(module, (8, 8)).targets("4") == ("5",)
