from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partlens.errors import LayerError
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps


def of(module: nn.Module, size: tuple[int, int]) -> Performer:
    """A performer with an input of this size."""
    return Performer(module, "x", Preprocessing(size_px=size), "")


CASES = {
    "resnet18": ("layer3", ["layer4.0", "layer4.1"]),
    "vgg11": ("features.17", ["classifier.1", "classifier.4"]),
    "alexnet": ("features.9", ["classifier.2", "classifier.5"]),
    "squeezenet1_1": ("features.11", ["features.12"]),
    "mobilenet_v2": ("features.13", ["features.17", "features.18"]),
    "mobilenet_v3_small": ("features.8", ["features.11", "features.12"]),
    "densenet121": ("features.transition2", ["features.transition3", "features.denseblock4"]),
    "googlenet": ("inception4d", ["inception5a", "inception5b"]),
    "regnet_y_400mf": (
        "trunk_output.block3",
        ["trunk_output.block4.block4-4", "trunk_output.block4.block4-5"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_copy_computes_what_the_performer_computes(network, name: str) -> None:
    module = network(name)
    source, targets = CASES[name]
    assert list(of(module, (96, 96)).targets(source)) == targets
    output, values = forward_taps(module, torch.randn(2, 3, 96, 96), [source, *targets])
    head = of(module, (96, 96)).upper(source, [*targets, "output"])
    given = values[source].clone()
    with torch.no_grad():
        made = head(given)
    assert len(made) == len(targets) + 1
    for got, wanted in zip(made, [*(values[t] for t in targets), output], strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(given, values[source])  # the input is not overwritten


def test_the_copy_is_a_copy(network) -> None:
    module = network("resnet18")
    for parameter in module.parameters():
        parameter.requires_grad = False
    head = of(module, (96, 96)).upper("layer3", ["layer4.0"])
    own = dict(module.named_parameters())
    assert not head.training
    names = [name.removeprefix("network.") for name, _ in head.named_parameters()]
    assert set(names) == {name for name in own if name.startswith("layer4.0.")}
    kept = [name for name in head.state_dict() if name.endswith("conv1.weight")]
    assert kept == ["network.layer4.0.conv1.weight"]
    for name, parameter in zip(names, head.parameters(), strict=True):
        assert parameter.requires_grad
        assert torch.equal(parameter, own[name])
        assert parameter.data_ptr() != own[name].data_ptr()
    head(torch.rand(1, 256, 6, 6))[0].sum().backward()
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in head.parameters())


def test_neither_input_nor_targets_are_overwritten(network) -> None:
    module = network("alexnet")
    _, values = forward_taps(module, torch.randn(1, 3, 96, 96), ["features.8", "features.10"])
    given = values["features.8"].clone()
    (middle, _) = of(module, (96, 96)).upper("features.8", ["features.10", "output"])(given)
    assert torch.equal(given, values["features.8"])  # features.9 works in place
    assert torch.equal(middle, values["features.10"])  # so does features.11


def test_a_shortcut_around_the_source_is_refused(network) -> None:
    module = network("resnet18")
    with pytest.raises(LayerError, match=r"shortcut.*layer3\.0.*layer3\.1"):
        of(module, (64, 64)).upper("layer3.1.conv1")


def test_targets_must_lie_behind_the_source(network) -> None:
    performer = of(network("resnet18"), (64, 64))
    for target in ("layer2", "layer3"):
        with pytest.raises(LayerError, match=f"after layer3, got {target}"):
            performer.upper("layer3", [target])
    with pytest.raises(LayerError, match="layer5.*Choose among layer4"):
        performer.upper("layer3", ["layer5"])
    with pytest.raises(LayerError, match="at least one"):
        performer.upper("layer3", [])


def test_cut_points(network) -> None:
    points = of(network("resnet18"), (64, 64)).cut_points()
    assert points[:4] == ["conv1", "bn1", "relu", "maxpool"]
    sums = [re.fullmatch(r"add_\d+", point) is not None for point in points[4:-3]]
    assert sums == [True, False] * 8  # what a function gives has the function's name
    assert points[5:-3:2] == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert points[-3] == "avgpool"
    assert points[-2].startswith("flatten")
    assert points[-1] == "fc"


class Odd(nn.Module):
    """In-place functions, a value read again after it was overwritten, sizes taken early, names with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv_2 = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.fc = nn.Linear(4 * 36, 3)

    def forward(self, x):
        n = x.shape[0]
        a = self.conv_1(x)
        b = F.relu(a, inplace=True)
        c = self.conv_2(b)
        c += a  # the overwritten value
        c.relu_()
        c = c * self.scale + torch.tensor(0.25)
        return self.fc(c.view(n, -1))


def test_functions_in_place_and_numbered_names() -> None:
    module = Odd().eval()
    image = torch.randn(2, 3, 6, 6)
    output, values = forward_taps(module, image, ["conv_1", "conv_2"])
    points = of(module, (6, 6)).cut_points()
    assert {"conv_1", "fc"} <= {*points}
    assert points[1].startswith("relu")
    before = dict(module.__dict__)
    head = of(module, (6, 6)).upper("conv_1", ["conv_2", "output"])
    with torch.no_grad():
        made = head(values["conv_1"])
    assert torch.equal(made[0], values["conv_2"])
    assert torch.equal(made[1], output)
    assert module.__dict__.keys() == before.keys()
    assert "network.scale" in dict(head.named_parameters())


class Flagged(nn.Module):
    """Optional arguments decide what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.last = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)

    def forward(
        self, x: Tensor, features: bool = False, mask: Tensor | None = None, *, scale: float = 1.0, **more: int
    ):
        x = self.relu(self.conv(x))
        if features:
            return x
        if mask is not None:
            x = x * mask
        if scale != 1.0 or more:
            x = x * scale
        return self.last(x)


def test_optional_arguments_keep_their_defaults() -> None:
    module, image = Flagged().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        maps = module(image, features=True)
        assert torch.equal(of(module, (8, 8)).upper("relu")(maps)[0], module(image))


def test_timms_padding_like_tensorflows_is_followed() -> None:
    timm = pytest.importorskip("timm")
    module = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=3).eval()
    performer = Performer(module, "", Preprocessing(size_px=(64, 64)), "")
    stem = performer.field("conv_stem")
    # At 64 px a 3x3 window of stride 2 needs one row more, which is added below.
    assert (stem.stride_px, stem.size_px, stem.start_px) == ((2, 2), (3, 3), (0, 0))
    output, taps = forward_taps(performer, torch.randn(1, 3, 64, 64), [performer.tap])
    with torch.no_grad():
        assert torch.equal(performer.upper(performer.tap)(taps[performer.tap])[0], output)


class Repeating(nn.Module):
    """Calls one activation below the tap, inside it, and above it; what is above, it computes without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), self.relu, nn.Conv2d(4, 4, 1))
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.relu(self.two(self.block(self.relu(self.one(x)))))
        with torch.no_grad():
            return self.last(maps).mean((2, 3))


def test_a_layer_that_is_called_several_times_is_entered_at_the_right_call() -> None:
    module, images = Repeating().eval(), torch.randn(5, 3, 8, 8)
    output, taps = forward_taps(module, images, ["relu", "relu_2"])
    for tap in taps:
        upper = of(module, (8, 8)).upper(tap)
        maps = taps[tap].clone().requires_grad_()
        found = upper(maps)[0]
        assert torch.equal(found, output)
        found.sum().backward()  # learned through, whatever the network itself does
        assert float(maps.grad.abs().sum()) > 0
    assert {name for name, _ in upper.named_parameters()} == {"network.last.weight", "network.last.bias"}


def test_layers_before_the_tap_and_behind_the_last_target_are_not_computed() -> None:
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    module = nn.Sequential(*layers, nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    seen: list[nn.Module] = []
    _, taps = forward_taps(module, torch.randn(2, 3, 8, 8), ["3", "5"])
    upper = of(module, (8, 8)).upper("3", ["5"])
    for layer in upper.network:
        layer.register_forward_hook(lambda layer, _i, answer: seen.append(layer) if bool(answer.any()) else None)
    assert torch.equal(upper(taps["3"])[0], taps["5"])
    assert seen == [upper.network[4], upper.network[5]]
