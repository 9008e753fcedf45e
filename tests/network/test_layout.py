"""Maps, maps with the channels last, tokens: partlens reads all of them as filters with rows and columns."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import pytest
import torch
from torch import Tensor, nn

from partlens.attribution.backprop import backward_signals, guided_backprop
from partlens.attribution.grad_cam import layer_grad_cam
from partlens.errors import LayerError
from partlens.network.layout import Layout
from partlens.network.performer import Performer
from partlens.network.taps import forward_taps
from partlens.selection.measured_layers import feature_index

MADE = run_path(str(Path(__file__).parent / "families.py"))
FAMILIES, performer_of, network_of = MADE["FAMILIES"], MADE["performer_of"], MADE["network_of"]

LAYOUTS = {
    "relu": ("two", "maps", (8, 16, 16)),
    "convnext": ("two.up", "channels last", (24, 8, 8)),
    "vit": ("blocks.1", "4x4 + 1 tokens", (16, 4, 4)),
    "registers": ("blocks.1.up", "4x4 + 3 tokens", (32, 4, 4)),
    "vit without class token": ("blocks.1", "4x4 tokens", (16, 4, 4)),
    "swin": ("two", "channels last", (16, 4, 4)),
}


def photos(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", LAYOUTS)
def test_layers_tell_filters_rows_and_columns_of_every_layout(family: str) -> None:
    tap, layout, shape = LAYOUTS[family]
    layer = performer_of(family).layer(tap)
    assert (layer.layout, layer.shape) == (layout, shape)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_has_the_wrong_axes(family: str) -> None:
    performer = performer_of(family)
    widths = {
        name: module.out_features
        if isinstance(module, nn.Linear)
        else module.out_channels
        if isinstance(module, nn.Conv2d)
        else module.normalized_shape[0]
        for name, module in performer.module.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm))
    }
    known = {layer.name: layer.shape[0] for layer in performer.layers if layer.layout != "unknown"}
    assert {name: known[name] for name in widths if name in known} == {n: w for n, w in widths.items() if n in known}
    index = feature_index(performer)
    assert all(widths.get(name, count) == count for name, count in zip(index.layers, index.channels, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bare", [False, True])
def test_a_layer_is_read_as_maps_whether_by_its_performer_or_as_a_bare_network(family: str, bare: bool) -> None:
    performer = performer_of(family)
    tap = LAYOUTS.get(family, ("two", "", ()))[0]
    maps = forward_taps(performer.module if bare else performer, photos(), [tap])[1][tap]
    assert tuple(maps.shape[1:]) == performer.layer(tap).shape
    # A place of the photo is found again at its place: the first cells see the upper left corner.
    changed = photos()
    changed[:, :, :4, :4] += 3
    early = {"vit": "blocks.0.norm1", "registers": "blocks.0.norm1", "swin": "norm", "convnext": "one.norm"}.get(family)
    if early is not None:
        before, after = (forward_taps(performer, x, [early])[1][early] for x in (photos(), changed))
        moved = (before - after).abs().sum((0, 1))
        assert moved[0, 0] > 0
        assert moved[2:, 2:].max() == 0


def test_tokens_go_to_maps_and_back_bit_for_bit_with_those_that_have_no_place() -> None:
    layout = Layout("tokens", (2, 3), before=1, after=4)
    values = torch.randn(2, 11, 5)
    maps = layout.to_maps(values)
    assert maps.shape == (2, 5, 2, 3)
    assert torch.equal(maps[:, :, 1, 2], values[:, 6])
    assert torch.equal(layout.from_maps(layout.to_maps(values, whole=True)), values)
    with pytest.raises(LayerError, match="NAME:whole"):
        layout.from_maps(maps)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_above_a_tap_give_the_networks_own_answer(family: str) -> None:
    performer = performer_of(family)
    for tap in [performer.tap, *(layer.name for layer in performer.layers if not layer.reason)]:
        output, taps = forward_taps(performer, photos(), [performer.whole(tap)])
        (again,) = performer.upper(tap)(taps[performer.whole(tap)])
        assert torch.equal(again, output), tap


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_a_layers_filters_start_at_that_filter_alone(family: str) -> None:
    performer = performer_of(family)
    tap = LAYOUTS.get(family, ("two", "", ()))[0]
    picture = guided_backprop(performer, photos(), layer=tap, filters=2, rule="gradient", fix_strides=False)
    leaf = photos().requires_grad_()
    # The same by hand: the gradient of half the sum of the filter's squares.
    kept: list[Tensor] = []
    handle = performer.module.get_submodule(tap).register_forward_hook(lambda _m, _i, output: kept.append(output))
    performer.module(leaf)
    handle.remove()
    maps = performer.layout(tap).to_maps(kept[0])
    (by_hand,) = torch.autograd.grad(0.5 * maps[:, 2].square().sum(), leaf)
    assert torch.allclose(picture, by_hand, atol=1e-6)
    weights = torch.zeros(2, maps.shape[1])
    weights[:, 2] = 1
    assert torch.allclose(
        backward_signals(performer, photos(), [{tap: weights}], "gradient", False)[0], by_hand, atol=1e-6
    )


@pytest.mark.parametrize("family", ["vit", "swin", "convnext"])
def test_grad_cam_works_on_tokens_and_on_channels_last(family: str) -> None:
    performer = performer_of(family)
    found = layer_grad_cam(performer, photos(), performer.tap, torch.tensor([0, 1]))
    assert found.shape == (2, 32, 32)
    assert bool(torch.isfinite(found).all())


class Odd(nn.Module):
    """Groups the tokens of a grid in a wild order, or so that they have no places."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.patches, self.mix, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8), nn.Linear(8, 4)
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.kind == "order":
            return self.head(self.mix(x[:, self.order]).mean(1))
        if self.kind == "sequence first":
            return self.head(self.mix(x.transpose(0, 1)).mean(0))
        if self.kind == "windows":
            return self.head(self.mix(x.reshape(-1, 16, 8)).reshape(len(x), 64, 8).mean(1))
        return self.head(self.mix(x.reshape(len(x), 4, 16, 8)).mean((1, 2)))


class OwnAttention(nn.Module):
    """Tokens of a grid that attend to one another: their matrix is as large as another grid of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 2, stride=2), nn.Conv2d(8, 8, 4, stride=4)
        self.softmax, self.head = nn.Softmax(dim=-1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.second(self.first(x)).flatten(2).unflatten(1, (4, 2))  # image, head, width, token
        mixed = heads @ self.softmax(heads.transpose(2, 3) @ heads)
        return self.head(mixed.flatten(1, 2).mean(2))


def test_a_matrix_of_attention_is_no_map() -> None:
    performer = performer_of(OwnAttention().eval())
    (matrix,) = [layer for layer in performer.layers if layer.name == "softmax"]
    assert matrix.shape[1:] == (16, 16)
    assert not matrix.has_maps


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("order", "not in the order of their places"),
        ("sequence first", "first axis is not that of the images"),
        ("windows", "first axis is not that of the images"),
        ("heads", "no places of the image"),
    ],
)
def test_a_tensor_whose_layout_cannot_be_told_is_refused_by_name(kind: str, reason: str) -> None:
    performer = performer_of(Odd(kind).eval())
    (mix,) = [layer for layer in performer.layers if layer.name == "mix"]
    assert reason in mix.reason
    assert "mix" not in feature_index(performer).layers
    with pytest.raises(LayerError, match=f"mix to give maps or vectors.*{reason}"):
        guided_backprop(performer, photos(), layer="mix", filters=0)


def test_two_networks_of_one_photo_size_agree_on_another_size_too() -> None:
    module = network_of("swin")
    larger = torch.randn(1, 3, 64, 32)
    maps = forward_taps(module, larger, ["two"])[1]["two"]
    assert tuple(maps.shape) == (1, 16, 8, 4)
    assert isinstance(performer_of("swin"), Performer)
