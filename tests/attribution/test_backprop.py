from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from partlens.attribution.backprop import backward_signals, guided_backprop, heat_map
from partlens.attribution.rules import rewritten
from partlens.attribution.strides import strided_gradient
from partlens.errors import InputError, InputTypeError, LayerError
from partlens.network.performer import Performer
from partlens_papers.flowers.lattice import lattice_energy_frac, lattice_index


class Small(nn.Module):
    """Strides, a re-used in-place ReLU, a functional one, a branch, pooling, a norm with statistics, a head."""

    def __init__(self, *, strided: bool = True) -> None:
        super().__init__()
        torch.manual_seed(5)
        step = 2 if strided else 1
        self.conv1 = nn.Conv2d(3, 6, 3, step, 1)
        self.norm = nn.BatchNorm2d(6)
        self.norm.running_mean.normal_(0, 0.2)
        self.norm.running_var.uniform_(0.5, 2)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, step, 1)
        self.conv2 = nn.Conv2d(6, 8, 3, step, 1, groups=2)
        self.short = nn.Conv2d(6, 8, 1, step)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv1(x))))
        x = self.relu(self.conv2(x) + self.short(x))
        x = F.relu(self.fc(self.drop(x).mean((2, 3))))
        return self.head(x)


@pytest.fixture
def small() -> nn.Module:
    return Small().eval()


def images(count: int = 2, size: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, size, size, dtype=dtype)


# Forms of call


def test_forms_of_call(small) -> None:
    x = images(3)
    assert guided_backprop(small, x).shape == (3, 3, 20, 20)
    assert guided_backprop(small, x, target=torch.tensor([0, 3, 1])).shape == (3, 3, 20, 20)
    assert guided_backprop(small, x, layer="conv2", filters=1).shape == (3, 3, 20, 20)
    many = guided_backprop(small, x, layer="conv2", filters=(4, 1))
    assert many.shape == (3, 2, 3, 20, 20)
    assert torch.equal(many[:, 1], guided_backprop(small, x, layer="conv2", filters=1))
    assert guided_backprop(small, x, layer="fc", filters=[2]).shape == (3, 1, 3, 20, 20)


def test_no_target_means_the_highest_score(small) -> None:
    x = images(4)
    best = small(x).argmax(1)
    assert torch.equal(guided_backprop(small, x), guided_backprop(small, x, target=best))
    assert torch.equal(guided_backprop(small, x, target=2), guided_backprop(small, x, target=torch.full((4,), 2)))


def test_a_performer_and_data_parallel(small, tiny: Performer) -> None:
    x = images(2, 32)
    assert torch.equal(guided_backprop(tiny, x, 1), guided_backprop(tiny.module, x, 1))
    assert torch.equal(guided_backprop(nn.DataParallel(small), x, 1), guided_backprop(small, x, 1))


def test_second_call_of_a_module_and_entries_of_its_output(small) -> None:
    x = images()
    first = guided_backprop(small, x, layer="relu", filters=0)
    second = guided_backprop(small, x, layer="relu_1", filters=0)
    assert not torch.equal(first, second)

    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": x, "b": 2 * x}

    network = nn.Sequential(nn.Conv2d(3, 2, 3), Two())
    twice = guided_backprop(network, x, layer="1:b", filters=0, start="ones")
    assert torch.equal(twice, 2 * guided_backprop(network, x, layer="1:a", filters=0, start="ones"))


@pytest.mark.parametrize("wrap", [lambda s: (s, None), lambda s: {"x": s[..., None], "logits": s}, lambda s: [s[0], s]])
def test_scores_inside_another_output(small, wrap: Callable[[Tensor], object]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small

        def forward(self, x: Tensor) -> object:
            return wrap(self.inner(x))

    x = images()
    assert torch.equal(guided_backprop(Wrapped(), x, 1), guided_backprop(small, x, 1))


# T11: the rule by hand, the start


def test_t11_guided_rule_by_hand() -> None:
    first, second = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([[2.0], [-1.0]])[..., None, None])
        second.weight.copy_(torch.tensor([[1.0, -3.0], [-2.0, 1.0]])[..., None, None])
    network = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    x = torch.tensor([[[[3.0, -4.0]]]])
    # x = 3: a = (6, 0), b = (6, -12) -> relu (6, 0). Filter 0 starts with 6, 6 times (1, -3) -> (6, -18); the ReLU
    # lets 6 pass (positive, a > 0) and stops -18; 6 times 2 = 12.
    # x = -4: a = (0, 4), b = (-12, 4) -> relu (0, 4). Filter 0 is 0.
    start_zero = guided_backprop(network, x, layer="3", filters=0)
    assert start_zero.flatten().tolist() == [12.0, 0.0]
    # Filter 1 at x = -4 starts with 4: times (-2, 1) -> (-8, 4); 4 passes; times -1 = -4.
    assert guided_backprop(network, x, layer="3", filters=1).flatten().tolist() == [0.0, -4.0]
    # The deconvnet lets every positive signal pass, whatever the activation was: a 1 at filter 1 everywhere.
    ones = {"start": "ones", "layer": "3", "filters": 1}
    assert guided_backprop(network, x, rule="deconvnet", **ones).flatten().tolist() == [-1.0, -1.0]
    assert guided_backprop(network, x, rule="guided", **ones).flatten().tolist() == [0.0, -1.0]
    assert guided_backprop(network, x, rule="gradient", **ones).flatten().tolist() == [0.0, -1.0]
    # Score-like start at both filters of the first convolution's output: 2 and -1.
    assert guided_backprop(network, x, layer="0", filters=1, start="ones").flatten().tolist() == [-1.0, -1.0]


def test_t11_the_start_is_the_activation_map_of_one_filter(small) -> None:
    x = images(2)
    for layer, filters in (("conv2", 3), ("relu", 2), ("fc", 7)):
        weights = torch.zeros(2, {"conv2": 8, "relu": 6, "fc": 10}[layer])
        weights[:, filters] = 1
        ours = guided_backprop(small, x, layer=layer, filters=filters, rule="gradient", fix_strides=False)
        network = copy.deepcopy(small)
        network.relu = nn.ReLU()  # out of place, so that a plain hook can hold the map
        leaf, held = x.clone().requires_grad_(), []
        module = network.get_submodule(layer)
        module.register_forward_hook(lambda _m, _i, out, held=held: held.append(out))
        network(leaf)
        start = torch.zeros_like(held[0])
        start[:, filters] = held[0][:, filters].detach()
        (theirs,) = torch.autograd.grad(held[0], leaf, start)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            backward_signals(small, x, [{layer: weights}], rule="gradient", fix_strides=False)[0], ours
        )


def test_starts(small) -> None:
    x = images(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU())
    maps = network[0](x).detach()[0, 2]
    ones = guided_backprop(network, x, layer="0", filters=2, start="ones")
    weight = network[0].weight.detach()[2, :, 0, 0]
    torch.testing.assert_close(ones[0], weight[:, None, None].expand(3, 20, 20))
    peak = guided_backprop(network, x, layer="0", filters=2, start="peak")
    assert int((peak[0].abs().sum(0) > 0).sum()) == 1
    assert int(peak[0].abs().sum(0).argmax()) == int(maps.argmax())
    torch.testing.assert_close(peak[0].sum((1, 2)), weight)


# Rounds


def test_rounds_equal_single_calls(small) -> None:
    x = images(3)
    weights = {"relu_1": torch.zeros(3, 8), "relu": torch.zeros(3, 6), "fc": torch.zeros(3, 10)}
    weights["relu_1"][0, 4] = weights["relu"][1, 2] = 1
    weights["fc"][2, 5] = 0.5
    second = {"relu": torch.zeros(3, 6)}
    second["relu"][:, 1] = 1
    nothing = {"fc": torch.zeros(3, 10)}
    result = backward_signals(small, x, [weights, second, nothing])
    assert result.shape == (3, 3, 3, 20, 20)
    for image, layer, k, scale in ((0, "relu_1", 4, 1), (1, "relu", 2, 1), (2, "fc", 5, 0.5)):
        single = guided_backprop(small, x[image : image + 1], layer=layer, filters=k)
        torch.testing.assert_close(result[0, image], scale * single[0])
    torch.testing.assert_close(result[1], guided_backprop(small, x, layer="relu", filters=1))
    assert not result[2].any()


def test_forward_stops_after_the_deepest_layer(small) -> None:
    calls = []
    small.head.register_forward_hook(lambda *_: calls.append("head"))
    small.conv2.register_forward_hook(lambda *_: calls.append("conv2"))
    guided_backprop(small, images(), layer="relu", filters=0)
    assert calls == []
    guided_backprop(small, images(), layer="relu_1", filters=0)
    assert calls == ["conv2"]
    guided_backprop(small, images())
    assert calls == ["conv2", "conv2", "head"]


def test_images_of_a_round_take_their_own_weights(small) -> None:
    x, weights = images(5), torch.rand(5, 6)
    whole = backward_signals(small, x, [{"relu": weights}, {"relu": 1 - weights}])
    parts = [
        backward_signals(small, x[i : i + 1], [{"relu": w}, {"relu": 1 - w}]) for i, w in enumerate(weights.split(1))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_batches_equal_single_images(small) -> None:
    x = images(5)
    target = torch.tensor([0, 1, 2, 3, 0])
    whole = guided_backprop(small, x, target)
    one = torch.cat([guided_backprop(small, x[i : i + 1], int(target[i])) for i in range(5)])
    torch.testing.assert_close(one, whole)
    filters = guided_backprop(small, x, layer="conv2", filters=[0, 5])
    each = torch.cat([guided_backprop(small, one, layer="conv2", filters=[0, 5]) for one in x.split(2)])
    torch.testing.assert_close(each, filters)


# T12: strides


@pytest.mark.parametrize("rule", ["guided", "deconvnet", "gradient"])
def test_t12_identity_where_all_strides_are_one(rule: str) -> None:
    network, x = Small(strided=False).eval(), images(2, 11)
    plain = guided_backprop(network, x, 1, rule=rule, fix_strides=False)
    for fix in (True, "nearest", "aligned"):
        for pooling in ("route", "resample"):
            assert torch.equal(guided_backprop(network, x, 1, rule=rule, fix_strides=fix, pooling=pooling), plain)


@given(
    size=st.tuples(st.integers(7, 17), st.integers(7, 17)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    strides=st.sampled_from(["nearest", "aligned"]),
)
def test_t12_size_of_any_layer(size, kernel, stride, padding, dilation, groups, mode, strides) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, padding_mode=mode),
    )
    x = torch.rand(1, 3, *size)
    out = network(x)
    signal = guided_backprop(network, x, layer="2", filters=1, fix_strides=strides, start="ones", rule="gradient")
    assert signal.shape == x.shape
    true = guided_backprop(network, x, layer="2", filters=1, fix_strides=False, start="ones", rule="gradient")
    if max(stride) == 1:
        assert torch.equal(signal, true)
    elif mode == "zeros" and padding == (0, 0) and out.shape[2:] == (1, 1):
        # One window: its signal is spread over the dense windows, the total kept.
        first = guided_backprop(network[2:], network[:2](x).detach(), layer="0", filters=1, start="ones")
        whole = guided_backprop(
            network[2:], network[:2](x).detach(), layer="0", filters=1, start="ones", fix_strides=False
        )
        torch.testing.assert_close(first.sum(), whole.sum(), rtol=1e-4, atol=1e-4)


@given(
    size=st.tuples(st.integers(5, 12), st.integers(5, 12)),
    kernel=st.integers(1, 4),
    padding=st.integers(0, 2),
    groups=st.sampled_from([1, 2]),
)
def test_t12_adjoint_of_the_stride_one_convolution(size, kernel, padding, groups) -> None:
    conv = nn.Conv2d(2, 4, kernel, 1, padding, groups=groups, bias=False).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    dy = torch.randn_like(conv(x))
    back = strided_gradient(
        dy, conv.weight.detach(), size, stride=(1, 1), padding=(padding,) * 2, dilation=(1, 1), groups=groups
    )
    torch.testing.assert_close((conv(x) * dy).sum(), (x * back).sum())


@pytest.mark.parametrize("strides", ["nearest", "aligned"])
@pytest.mark.parametrize("cells", [(3, 4), (6,), (3, 4, 2)])
def test_constant_signals_keep_their_total(cells: tuple[int, ...], strides: str) -> None:
    count = len(cells)
    size = [3 * (c - 1) + 1 + (i % 3) for i, c in enumerate(cells)]
    weight = torch.randn(2, 3, *[1] * count, dtype=torch.float64)
    back = strided_gradient(
        torch.ones(1, 2, *cells, dtype=torch.float64),
        weight,
        size,
        stride=(3,) * count,
        padding=(0,) * count,
        dilation=(1,) * count,
        strides=strides,
    )
    assert tuple(back.shape[2:]) == tuple(size)
    total = weight.sum(0).flatten() * float(np.prod(cells))
    torch.testing.assert_close(back.sum(tuple(range(2, 2 + count)))[0], total)


def test_aligned_signals_stay_where_they_are() -> None:
    """Nearest moves a structure by about (stride - 1) / 2 cells in each strided layer, aligned does not."""
    layers = [nn.Conv2d(1, 1, 3, 2, 1, bias=False) for _ in range(4)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    network = nn.Sequential(*layers)
    x = torch.rand(1, 1, 128, 128)
    places = torch.arange(128.0)

    def middle(fix: object) -> float:
        weight = guided_backprop(network, x, layer="3", filters=0, rule="gradient", start="peak", fix_strides=fix)[0, 0]
        return float((weight.sum(1) * places).sum() / weight.sum())

    # The peak must lie inside, or the border cuts the windows.
    x[..., 60:68, 60:68] += 5
    true = middle(False)
    assert abs(middle("aligned") - true) < 0.01
    assert abs(middle("nearest") - true) > 4


def test_transposed_convolutions_and_other_dimensions() -> None:
    network = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.ReLU())
    x = images(1, 6)
    kwargs = {"layer": "1", "filters": 0}
    assert torch.equal(guided_backprop(network, x, **kwargs), guided_backprop(network, x, fix_strides=False, **kwargs))

    class Volume(nn.Module):
        """A video-like network inside: strided 3-d and 1-d convolutions and poolings."""

        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Conv3d(1, 2, (1, 3, 3), (1, 2, 2))
            self.flat = nn.Conv1d(2, 3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool3d(self.deep(x[:, None]).relu(), (1, 2, 2))
            y = F.avg_pool3d(y, (1, 2, 1))
            return F.avg_pool1d(F.max_pool1d(self.flat(y.flatten(2)), 2), 2).mean(2)

    for pooling in ("route", "overwrite", "resample"):
        for fix in ("nearest", "aligned"):
            signal = guided_backprop(Volume(), images(2), 0, pooling=pooling, fix_strides=fix)
            assert signal.shape == (2, 3, 20, 20)
            assert signal.any()


# T13: the lattice


def gabor_bank() -> Tensor:
    """64 Gabor filters of 11x11 in three colours."""
    place = torch.arange(11.0) - 5
    y, x = torch.meshgrid(place, place, indexing="ij")
    bank = []
    for angle in range(16):
        turn = torch.tensor(angle * torch.pi / 16)
        across = x * turn.cos() + y * turn.sin()
        for period in (4.0, 5.5, 7.5, 10.0):
            bank.append((-(x**2 + y**2) / 18).exp() * (2 * torch.pi * across / period + angle).cos())
    grey = torch.stack(bank)
    return grey[:, None] * torch.tensor([1.0, 0.8, 0.6])[None, :, None, None]


def smoothed(signal: Tensor) -> Tensor:
    return F.avg_pool2d(F.avg_pool2d(signal, 9, 1, 4), 9, 1, 4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strides", ["nearest", "aligned"])
def test_t13_the_lattice_goes_and_the_picture_stays(seed: int, strides: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    conv = nn.Conv2d(3, 64, 11, 4, bias=False)
    with torch.no_grad():
        conv.weight.copy_(gabor_bank())
    signal = smoothed(torch.randn(1, 64, 54, 54, generator=generator)).relu()
    true = F.conv_transpose2d(signal, conv.weight.detach(), stride=4, output_padding=1)
    fixed = strided_gradient(
        signal,
        conv.weight.detach(),
        (224, 224),
        stride=(4, 4),
        padding=(0, 0),
        dilation=(1, 1),
        strides=strides,
    )
    assert true.shape == fixed.shape == (1, 3, 224, 224)
    assert float(lattice_energy_frac(true, 4)) > 0.05
    assert float(lattice_energy_frac(fixed, 4)) < 0.002
    assert float(lattice_index(true, 4)) > 1.5
    assert float(lattice_index(fixed, 4)) < 1
    low = torch.stack([smoothed(true).flatten(), smoothed(fixed).flatten()])
    assert float(torch.corrcoef(low)[0, 1]) > 0.95


# T14: pooling


def test_t14_overlapping_windows_add_up_by_default() -> None:
    network = nn.Sequential(nn.MaxPool2d(3, 2))
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 7  # the maximum of all four windows
    route = guided_backprop(network, x, layer="0", filters=0)
    assert float(route[0, 0, 2, 2]) == 28
    assert float(route.sum()) == 28
    overwrite = guided_backprop(network, x, layer="0", filters=0, pooling="overwrite")
    assert float(overwrite[0, 0, 2, 2]) == 7
    assert float(overwrite.sum()) == 7
    resample = guided_backprop(network, x, layer="0", filters=0, pooling="resample")
    torch.testing.assert_close(float(resample[0, 0, 2, 2]), 28.0)
    # A strided average pooling is resampled too, and only then.
    mean = nn.Sequential(nn.AvgPool2d(3, 2))
    even = torch.ones(1, 1, 5, 5)
    plain = guided_backprop(mean, even, layer="0", filters=0, pooling="overwrite")
    assert torch.equal(plain, guided_backprop(mean, even, layer="0", filters=0))
    dense = guided_backprop(mean, even, layer="0", filters=0, pooling="resample")
    assert not torch.equal(plain, dense)
    torch.testing.assert_close(dense.sum(), plain.sum())


def test_t14_the_last_window_wins() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.MaxPool2d(3, 2))
    nn.init.ones_(network[0].weight)
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 1, 2] = 1
    maps = torch.tensor([3.0, 5.0])
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        out = network(leaf)
    for pooling, value in (("route", 8.0), ("overwrite", 5.0)):
        with rewritten([out], "gradient", None, pooling):
            (signal,) = torch.autograd.grad(out, leaf, maps.reshape(1, 1, 1, 2), retain_graph=True)
        assert float(signal[0, 0, 1, 2]) == value
    assert float(torch.autograd.grad(out, leaf, maps.reshape(1, 1, 1, 2))[0][0, 0, 1, 2]) == 8  # hooks are gone


def test_pooling_of_one_image_without_its_axis() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([F.avg_pool2d(F.max_pool2d(one, 2), 2) for one in x])

    network = nn.Sequential(Odd())
    for pooling in ("overwrite", "resample"):
        assert guided_backprop(network, images(2), layer="0", filters=0, pooling=pooling).shape == (2, 3, 20, 20)


# T15: heat maps


def test_t15_heat_maps_by_hand() -> None:
    signal = torch.tensor([[[3.0, -1.0, 2.0, 0.0]], [[4.0, -2.0, -2.0, 0.0]]])
    # Heights 5, 0, (2 but the channels' sum is exactly 0, so) 0, 0.
    assert heat_map(signal).tolist() == [[1.0, 0.0, 0.0, 0.0]]
    raised = torch.tensor([[[3.0, 1.0, 5.0]]])
    torch.testing.assert_close(heat_map(raised), torch.tensor([[0.5, 0.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_t15_constant_maps_are_zero_and_all_lie_between_0_and_1(dtype: torch.dtype) -> None:
    for value in (0.0, 1.0, -1.0, 6e-5):
        assert not heat_map(torch.full((2, 3, 4, 4), value, dtype=dtype)).any()
    smallest = torch.finfo(dtype).tiny
    for scale in (1.0, smallest * 50, torch.finfo(dtype).max / 10):
        signal = (torch.randn(2, 4, 3, 6, 6, dtype=torch.float64).clamp(-3, 3) * scale).to(dtype)
        maps = heat_map(signal)
        assert maps.dtype == dtype
        assert maps.shape == (2, 4, 6, 6)
        assert bool(torch.isfinite(maps).all())
        assert float(maps.min()) == 0
        assert float(maps.max()) == 1
        torch.testing.assert_close(maps.amax((-2, -1)), torch.ones(2, 4, dtype=dtype))


# Leaving no trace


def unsettled() -> nn.Module:
    network = Small().train()
    for index, child in enumerate(network.modules()):
        child.training = index % 3 != 0
    for index, parameter in enumerate(network.parameters()):
        parameter.requires_grad = index % 2 == 0
        parameter.grad = torch.full_like(parameter, 0.5) if index % 3 == 0 else None
    network.conv1.register_forward_hook(lambda *_: None)
    network.conv2.register_full_backward_hook(lambda *_: None)
    network.fc.register_full_backward_pre_hook(lambda *_: None)
    return network


class _Stop(RuntimeError):
    pass


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_left_behind(state) -> None:
    network, x = unsettled(), images()
    kept, before = x.clone(), state(network)
    for use in (
        lambda: guided_backprop(network, x),
        lambda: guided_backprop(network, x, layer="relu", filters=[0, 1], pooling="resample", rule="deconvnet"),
        lambda: backward_signals(network, x, [{"fc": torch.ones(2, 10)}]),
    ):
        use()
        assert state(network) == before
    for fail in (
        lambda: guided_backprop(network, x, layer="nowhere", filters=0),
        lambda: guided_backprop(network, x, layer="relu", filters=6),
        lambda: guided_backprop(network, x, target=9),
        lambda: guided_backprop(network, torch.full_like(x, torch.nan), 0),
        lambda: backward_signals(network, x, [{"fc": torch.ones(2, 9)}]),
    ):
        with pytest.raises(InputError):
            fail()
        assert state(network) == before
    assert torch.equal(x, kept)
    assert x.grad is None
    assert not x.requires_grad


@pytest.mark.usefixtures("unchecked")
def test_nothing_is_left_behind_after_an_exception(state) -> None:
    network, x = unsettled(), images()

    def fail(*_: object) -> None:
        raise _Stop

    network.head.register_forward_hook(fail)
    before = state(network)
    with pytest.raises(_Stop):
        guided_backprop(network, x)
    assert state(network) == before


def test_modes_of_the_network_do_not_matter(small) -> None:
    """Train mode, frozen weights, foreign backward hooks, no_grad and inference_mode: the same result."""
    x = images()
    expected = guided_backprop(small, x, 1)
    hooked = unsettled()
    hooked.fc.register_full_backward_hook(lambda _m, grads, _o: (grads[0] * 100,))
    assert torch.equal(guided_backprop(hooked, x, 1), expected)
    small.requires_grad_(requires_grad=False)
    assert torch.equal(guided_backprop(small, x, 1), expected)
    with torch.no_grad():
        assert torch.equal(guided_backprop(small, x, 1), expected)
    with torch.inference_mode():
        result = guided_backprop(small, x.clone(), 1)
    assert torch.equal(result, expected)
    assert not result.is_inference()
    assert torch.equal(guided_backprop(small, x.clone().requires_grad_(), 1), expected)


def test_types_and_memory_formats(small) -> None:
    x = images()
    expected = guided_backprop(small, x, 1)
    last = guided_backprop(small, x.to(memory_format=torch.channels_last), 1)
    torch.testing.assert_close(last, expected)
    last = guided_backprop(copy.deepcopy(small).to(memory_format=torch.channels_last), x, 1, pooling="resample")
    torch.testing.assert_close(last, guided_backprop(small, x, 1, pooling="resample"))
    double = guided_backprop(copy.deepcopy(small).double(), x, 1)
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), expected)
    torch.testing.assert_close(guided_backprop(small, x.double(), 1), expected)
    for dtype in (torch.float16, torch.bfloat16):
        for pooling in ("route", "overwrite", "resample"):
            for fix in ("nearest", "aligned"):
                half = copy.deepcopy(small).to(dtype)
                rounded = guided_backprop(half, x, 1, pooling=pooling, fix_strides=fix)
                assert rounded.dtype == dtype
                exact = guided_backprop(small, x, 1, pooling=pooling, fix_strides=fix)
                both = torch.stack([rounded.float().flatten(), exact.flatten()])
                assert float(torch.corrcoef(both)[0, 1]) > 0.9


def test_a_network_that_writes_into_its_input(small) -> None:
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return small(x.mul_(2).relu_())

    x = images()
    kept = x.clone()
    assert guided_backprop(Careless(), x, 0).shape == x.shape
    assert torch.equal(x, kept)


def test_nothing_is_kept_in_memory(small) -> None:
    import gc
    import weakref

    x = images()
    seen: list[weakref.ref[Tensor]] = []
    small.conv2.register_forward_hook(lambda _m, inputs, _o: seen.append(weakref.ref(inputs[0].untyped_storage())))
    for pooling in ("route", "overwrite", "resample"):
        guided_backprop(small, x, 0, pooling=pooling)
    gc.collect()
    assert len(seen) == 3
    assert all(ref() is None for ref in seen)


# Refusals


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"rule": "guide"}, "rule as one of guided, deconvnet, gradient, got 'guide'"),
        ({"pooling": "max"}, "pooling as one of route, overwrite, resample"),
        ({"fix_strides": "yes"}, "fix_strides as True or False or one of nearest, aligned"),
        ({"start": "one"}, "start as one of activation, ones, peak"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_unknown_words_are_refused(small, setting: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        guided_backprop(small, images(), **setting)


@pytest.mark.usefixtures("unchecked")
def test_refused_calls(small) -> None:
    x = images()
    cases: list[tuple[dict[str, object], str]] = [
        ({"layer": "conv2"}, "filters=7"),
        ({"filters": 3}, "a layer for the filters"),
        ({"layer": "conv2", "filters": 1, "target": 0}, "either a target or a layer"),
        ({"layer": "conv2", "filters": []}, "at least one filter"),
        ({"layer": "conv2", "filters": 8}, "from 0 to 7"),
        ({"layer": "conv2", "filters": -1}, "from 0 to 7"),
        ({"layer": "conv9", "filters": 1}, "conv"),
        ({"target": 4}, "from 0 to 3"),
        ({"target": -1}, "from 0 to 3"),
        ({"target": torch.tensor([1])}, "one target for each of 2"),
    ]
    for arguments, words in cases:
        with pytest.raises(InputError, match=words):
            guided_backprop(small, x, **arguments)
    with pytest.raises(InputError, match="axes image, channel"):
        guided_backprop(small, x[0])
    with pytest.raises(InputError, match="at least one image"):
        guided_backprop(small, x[:0])
    with pytest.raises(InputTypeError, match="floating"):
        guided_backprop(small, x.long())
    with pytest.raises(InputError, match="at least one round"):
        backward_signals(small, x, [])
    with pytest.raises(InputError, match="weights of 2 images and 8 filters"):
        backward_signals(small, x, [{"conv2": torch.ones(2, 7)}])


def test_refused_networks(small) -> None:
    x = images()
    with pytest.raises(InputTypeError, match="plain module"):
        guided_backprop(nn.Sequential(torch.compile(small)), x)
    with torch.inference_mode():
        made = Small()
    with pytest.raises(InputTypeError, match="outside inference_mode"):
        guided_backprop(made, x)
    compiled = Small().eval()
    compiled.compile()
    with pytest.raises(InputTypeError, match="plain module"):
        guided_backprop(compiled, x)

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2)

    with pytest.raises(LayerError, match="to give maps"):
        guided_backprop(nn.Sequential(Tokens()), x, layer="0", filters=0)
    with pytest.raises(LayerError, match="scores with axes"):
        guided_backprop(nn.Sequential(nn.Conv2d(3, 4, 3)), x)

    class Cut(nn.Module):
        def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.cut = cut
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return self.cut(x) * self.weight

    with pytest.raises(LayerError, match="connects"):
        guided_backprop(nn.Sequential(Cut(torch.detach), small), x, 0)

    class Closed(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return small(x)

    with pytest.raises(LayerError, match="Remove no_grad"):
        guided_backprop(Closed(), x, 0)

    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            x += 1
            return small(x)

    with pytest.raises(LayerError, match="x = x"):
        guided_backprop(Overwrites(), x, 0)


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> Tensor:
        return dy


def test_operations_that_cannot_be_seen_are_refused_not_passed_through(small) -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return small(_Own.apply(x))

    x = images()
    with pytest.raises(LayerError, match="_OwnBackward"):
        guided_backprop(Opaque(), x, 0)
    plain = guided_backprop(Opaque(), x, 0, rule="gradient", fix_strides=False)
    torch.testing.assert_close(plain, guided_backprop(small, x.relu(), 0, rule="gradient", fix_strides=False))
    # Where no signal passes, nothing needs to be seen.
    assert guided_backprop(nn.Sequential(nn.Conv2d(3, 3, 1), Opaque()), x, layer="0", filters=0).any()


def test_checkpointed_parts_are_seen(small) -> None:
    from torch.utils.checkpoint import checkpoint

    class Saving(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(small, x, use_reentrant=False)

    x = images()
    plain = guided_backprop(small, x, 1, fix_strides=False)
    assert torch.equal(guided_backprop(Saving(), x, 1, fix_strides=False), plain)
    # What a checkpoint has taken away cannot be exchanged in the record: equal but for rounding.
    torch.testing.assert_close(guided_backprop(Saving(), x, 1), guided_backprop(small, x, 1))


@pytest.mark.data
def test_a_trained_network_has_no_lattice(shared) -> None:
    from partlens.network.zoo import load_performer

    performer = load_performer(f"torchvision:resnet18@{shared / 'weights' / 'resnet18.safetensors'}")
    files = sorted((shared / "data" / "animal-part").rglob("*.jpg"))[:2]
    x = performer.preprocessing([Image.open(f) for f in files])
    true = lattice_index(guided_backprop(performer, x, fix_strides=False), 4)
    fixed = lattice_index(guided_backprop(performer, x, fix_strides="aligned", pooling="resample"), 4)
    assert float(true.mean()) > 1.2
    assert float(fixed.mean()) < 0.9


def test_mobilenet_and_efficientnet_run() -> None:
    for name in ("mobilenet_v3_small", "efficientnet_b0"):
        network = torchvision.models.get_model(name, weights=None, num_classes=3)
        assert guided_backprop(network, images(1, 40), pooling="resample").shape == (1, 3, 40, 40)
