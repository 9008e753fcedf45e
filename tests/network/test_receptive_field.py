from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from partlens.errors import InputError
from partlens.network.borrowed import like_weights
from partlens.network.receptive_field import ReceptiveField, cell_centre_px, grid_of, receptive_fields, widened
from partlens.network.watched import three_images, watch


def field_at(module: nn.Module, tap: str, size: tuple[int, int], channels: int = 3) -> ReceptiveField | None:
    """What cells of a layer, or of the output, see; ``None`` where that is not known."""
    with torch.no_grad():
        calls, record = watch(module.eval(), like_weights(module, three_images(channels, size)))
    (last,) = record.last
    maker = {call.name: call.maker for call in calls}.get(tap, last)
    return receptive_fields(record, size).get(maker)


def positive(module: nn.Module) -> nn.Module:
    """Weights above 0, so that no influence cancels."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        parameter.data.uniform_(0.5, 1.0)
    return module.double().eval()


def box_of(field: ReceptiveField, cell: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last row and column that a cell sees, beyond the border too."""
    low = [start + stride * at for start, stride, at in zip(field.start_px, field.stride_px, cell, strict=True)]
    return (*low, *(at + size - 1 for at, size in zip(low, field.size_px, strict=True)))  # type: ignore[return-value]


def brute_force(module: nn.Module, cell: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last row and column whose pixels change a cell, found by changing them one by one."""
    ramp = torch.rand(1, 1, *size, dtype=torch.float64) + 1
    with torch.no_grad():
        changed = []
        for row in range(size[0]):
            for col in range(size[1]):
                # A large rise lets the pixel win every maximum that it takes part in.
                other = ramp.clone()
                other[0, 0, row, col] += 1e3
                changed.append(bool((module(other)[0, :, *cell] != module(ramp)[0, :, *cell]).any()))
    where = np.argwhere(np.array(changed).reshape(size))
    return (*where.min(0), *where.max(0))  # type: ignore[return-value]


layers = st.one_of(
    st.tuples(st.just("conv"), st.integers(1, 3), st.integers(1, 2), st.integers(0, 1), st.integers(1, 2)),
    st.tuples(st.just("max"), st.integers(2, 3), st.integers(1, 3), st.integers(0, 1), st.just(1)),
    st.tuples(st.just("avg"), st.integers(2, 3), st.integers(1, 3), st.integers(0, 1), st.just(1)),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(layers, min_size=1, max_size=3), st.booleans(), st.data())
def test_fields_are_the_pixels_that_change_a_cell(stack: list, ceil: bool, data: st.DataObject) -> None:
    parts: list[nn.Module] = []
    for kind, kernel, stride, padding, dilation in stack:
        edge = min(padding, kernel // 2)
        if kind == "conv":
            parts.append(nn.Conv2d(1, 1, kernel, stride, edge, dilation))
        elif kind == "max":
            parts.append(nn.MaxPool2d(kernel, stride, edge, ceil_mode=ceil))
        else:
            parts.append(nn.AvgPool2d(kernel, stride, edge, ceil_mode=ceil))
    module, size = positive(nn.Sequential(*parts)), (13, 11)
    try:
        rows, cols = module(torch.rand(1, 1, *size, dtype=torch.float64)).shape[-2:]
    except RuntimeError:
        return
    cell = (data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1)))
    field = field_at(module, str(len(parts) - 1), size, 1)
    found = brute_force(module, cell, size)
    y0, x0, y1, x1 = box_of(field, cell)
    for first, last, low, high, length in (
        (found[0], found[2], y0, y1, size[0]),
        (found[1], found[3], x0, x1, size[1]),
    ):
        # Beyond the border padding stands for pixels, and a stride may leave the last pixels unread.
        assert first == low if low >= 0 else first >= 0
        assert last == high if high < length else last < length


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 5, stride=2, padding=2)
        self.b = nn.Conv2d(1, 2, (1, 3), stride=2, padding=(0, 1))
        self.c = nn.Conv2d(4, 1, 1)
        self.last = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        x = torch.cat([F.relu(self.a(x)), self.b(x)], dim=1)
        x = F.max_pool2d(self.c(x), 2, padding=1)
        return self.last(F.pad(x, (1, 0, 0, 0))) + F.avg_pool2d(F.pad(x, (1, 0, 0, 0)), 1)


@pytest.mark.parametrize("cell", [(0, 0), (1, 2), (3, 1)])
def test_functions_joins_and_uneven_padding(cell: tuple[int, int]) -> None:
    module, size = positive(Joined()), (14, 13)
    y0, x0, y1, x1 = box_of(field_at(module, "output", size, 1), cell)
    clipped = max(y0, 0), max(x0, 0), min(y1, size[0] - 1), min(x1, size[1] - 1)
    assert brute_force(module, cell, size) == clipped


def test_the_papers_grid_of_vgg16(network) -> None:
    field = field_at(network("vgg16"), "features.29", (224, 224))
    assert (cell_centre_px(field, [[0, 0], [2, 1]]) + 0.5).tolist() == [[8.5, 8.5], [24.5, 40.5]]
    assert field.size_px == (196, 196)  # published size of the field of VGG-16's conv5_3


def test_resnet50_by_hand(network) -> None:
    # 7/2 and 3/2, then 3x3 windows: 3 at 4 px, one of stride 2 and 3, 5, 2 at 8, 16 and 32 px.
    size = 1 + 6 + 2 * 2 + 3 * 2 * 4 + (2 * 4 + 3 * 2 * 8) + (2 * 8 + 5 * 2 * 16) + (2 * 16 + 2 * 2 * 32)
    field = field_at(network("resnet50"), "layer4", (224, 224))
    assert (field.size_px, field.stride_px) == ((size, size), (32, 32))


def test_layers_that_see_everything() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for tap in ("1", "3"):
        field = field_at(module, tap, (9, 7))
        assert (field.stride_px, field.size_px, field.start_px) == ((0, 0), (9, 7), (0, 0))


def test_adaptive_pooling_that_divides_is_pooling() -> None:
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.AdaptiveAvgPool2d((4, 3)))
    assert field_at(module, "1", (8, 9), 1).stride_px == (2, 3)
    assert field_at(module, "1", (4, 3), 1).size_px == (1, 1)
    assert field_at(module, "1", (9, 9), 1).size_px == (9, 9)


def test_gates_keep_the_local_path(network) -> None:
    gated = field_at(network("mobilenet_v3_small"), "features.4", (96, 96))
    assert gated.gated
    assert gated.stride_px == (16, 16)
    assert not field_at(network("resnet18"), "layer4", (96, 96)).gated


@pytest.mark.parametrize("module", [nn.Upsample(scale_factor=2), nn.ConvTranspose2d(4, 4, 2, 2), nn.PixelShuffle(2)])
def test_of_unknown_operations_no_field_is_made_up(module: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), module)
    assert field_at(network, "1", (8, 8)) is None
    assert field_at(network, "0", (8, 8)).size_px == (3, 3)


def test_a_join_of_strides_that_do_not_match_has_no_field() -> None:
    class Crooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 1, 1, stride=2), nn.Conv2d(1, 1, 5)

        def forward(self, x):
            return self.a(x) + self.b(x)

    assert field_at(Crooked(), "output", (8, 8), 1) is None


def test_centres_of_cells() -> None:
    field = ReceptiveField((16, 12), (100, 90), (-40, -30))
    assert cell_centre_px(field, [[0, 0], [2, 3]]).tolist() == [[15.0, 10.0], [51.0, 42.0]]
    assert grid_of(field) == ((10.0, 15.0), (16.0, 12.0))
    assert grid_of(widened(field, 2)) == grid_of(field)
    with pytest.raises(InputError, match=r"\(3,\)"):
        cell_centre_px(field, (0, 1, 2))


class Of(nn.Module):
    """Two modules and a function between them."""

    def __init__(self, function, *layers: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList(layers)
        self.function = function

    def forward(self, x):
        return self.function(self.first(x), *self.layers)


def field_of(function, *layers: nn.Module) -> ReceptiveField | None:
    return field_at(Of(function, *layers), "output", (12, 10))


def channels_last_block(x, norm, linear):
    return linear(norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


LOCAL = ReceptiveField((1, 1), (3, 3), (0, 0))  # of a 3x3 convolution without padding
WHOLE = ReceptiveField((0, 0), (12, 10), (0, 0))
GATED = ReceptiveField((1, 1), (3, 3), (0, 0), gated=True)


@pytest.mark.parametrize(
    ("function", "layers", "wanted"),
    [
        (lambda x, c: c(x), [nn.Conv2d(4, 2, 3, padding="same", dilation=(1, 2))], ((1, 1), (5, 7), (-1, -2))),
        (lambda x, c: c(x), [nn.Conv2d(4, 2, 3, padding="valid")], ((1, 1), (5, 5), (0, 0))),
        (lambda x, p: p(x), [nn.ZeroPad2d((2, 0, 1, 0))], ((1, 1), (3, 3), (-1, -2))),
        (lambda x, p: p(x), [nn.AvgPool2d(2, padding=1)], ((2, 2), (4, 4), (-1, -1))),
        (lambda x, p: p(x), [nn.LPPool2d(2, 2, 3)], ((3, 3), (4, 4), (0, 0))),
        (lambda x, p: p(x), [nn.MaxPool2d(2, 1, dilation=2)], ((1, 1), (5, 5), (0, 0))),
        (lambda x: F.conv2d(x, torch.ones(2, 4, 3, 3), None, 2, 1, 2), [], ((2, 2), (7, 7), (-1, -1))),
        (lambda x: F.max_pool2d(x, 3, dilation=2), [], ((3, 3), (7, 7), (0, 0))),
        (lambda x: F.avg_pool2d(x, 2, 3, 1), [], ((3, 3), (4, 4), (-1, -1))),
        (lambda x: F.adaptive_avg_pool2d(x, (5, 4)), [], ((2, 2), (4, 4), (0, 0))),
    ],
)
def test_windows_by_hand(function, layers: list, wanted: tuple) -> None:
    assert field_of(function, *layers) == ReceptiveField(*wanted)


@pytest.mark.parametrize(
    ("function", "layers", "wanted"),
    [
        (channels_last_block, [nn.LayerNorm(4), nn.Linear(4, 5)], LOCAL),
        (lambda x, n: n(x), [nn.LayerNorm([4, 10, 8])], GATED),
        (lambda x, n: n(x), [nn.GroupNorm(2, 4)], GATED),
        (lambda x, n: n(x), [nn.InstanceNorm2d(4)], GATED),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2), [], LOCAL),
        (lambda x: F.layer_norm(x, (4, 10, 8)), [], GATED),
        (lambda x: F.group_norm(x, 2), [], GATED),
        (lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(), [], GATED),
        (lambda x: x + x.flatten(1).mean(1)[:, None, None, None], [], GATED),
        (lambda x, p: x * p(x), [nn.AdaptiveAvgPool2d(1)], GATED),
        (lambda x: x.mean((2, 3)), [], WHOLE),
        (lambda x: x.flatten(2), [], WHOLE),
        (lambda x, lin: lin(x.flatten(1)), [nn.Linear(320, 2)], WHOLE),
        (lambda x, lin: lin(x), [nn.Linear(8, 2)], WHOLE),
        (lambda x: x.view(-1, 2, 2, 10, 8).transpose(1, 2).reshape(-1, 4, 10, 8), [], LOCAL),
        (lambda x: x.chunk(2, 1)[0] + x.split(2, 1)[1], [], LOCAL),
        (lambda x: x[:, :2], [], LOCAL),
    ],
)
def test_norms_gates_and_shapes_by_hand(function, layers: list, wanted: ReceptiveField) -> None:
    assert field_of(function, *layers) == wanted


@pytest.mark.parametrize(
    ("function", "layers"),
    [
        (lambda x: x.transpose(2, 3), []),
        (lambda x: x.transpose(1, -1), []),
        (lambda x: x.permute(0, 1, 3, 2), []),
        (lambda x, c: c(x.permute(0, 2, 3, 1)), [nn.Conv2d(10, 2, 1)]),
        (lambda x: F.avg_pool2d(x.permute(0, 2, 3, 1), 2), []),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), []),
        (lambda x: F.interpolate(x.mean((2, 3), keepdim=True), scale_factor=2), []),
        (lambda x: x @ x.transpose(2, 3), []),
        (lambda x: torch.matmul(x, torch.ones(8, 8)), []),
    ],
)
def test_what_mixes_cells_in_an_unknown_way_has_no_field(function, layers: list) -> None:
    assert field_of(function, *layers) is None


def test_a_layer_without_the_image_has_no_field() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1, 3, 1, 1))
            self.relu = nn.ReLU()

        def forward(self, x):
            return x * self.relu(self.scale)

    assert field_at(Constant(), "relu", (8, 8)) is None
