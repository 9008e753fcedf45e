from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from partlens.errors import InputError, InputTypeError, LayerError
from partlens.network.borrowed import borrowed
from partlens.network.layers import found_layouts
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps, read_taps


def of(module: nn.Module, size: tuple[int, int]) -> Performer:
    """A performer with an input of this size."""
    return Performer(module, "x", Preprocessing(size_px=size), "")


NETWORKS = {
    "resnet18": "layer3",
    "vgg11": "features.17",
    "alexnet": "features.9",
    "squeezenet1_1": "features.11",
    "mobilenet_v3_small": "features.8",
    "densenet121": "features.transition2",
}


def unsettle(module: nn.Module) -> None:
    """Give a network a state that is easy to disturb."""
    module.train()
    for index, child in enumerate(module.modules()):
        child.training = index % 3 != 0
    for index, parameter in enumerate(module.parameters()):
        parameter.requires_grad = index % 2 == 0
        parameter.grad = torch.full_like(parameter, 0.5) if index % 3 == 0 else None
    next(iter(module.children())).register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_public_function_leaves_no_trace(network, state, name: str) -> None:
    module, tap, image = network(name), NETWORKS[name], torch.rand(2, 3, 96, 96)
    unsettle(module)
    before = state(module)
    forward_taps(module, image, [tap])
    assert state(module) == before
    for use in (
        lambda: of(module, (96, 96)).upper(tap),
        lambda: of(module, (96, 96)).targets(tap),
        lambda: of(module, (96, 96)).layers,
        lambda: of(module, (96, 96)).field(tap),
    ):
        use()
        assert state(module) == before
    for fail in (
        lambda: forward_taps(module, torch.full((1, 3, 96, 96), float("nan")), [tap]),
        lambda: forward_taps(module, image, [tap, "nowhere"]),
        lambda: found_layouts(module, 3, (0, 0)),
        lambda: of(module, (96, 96)).upper(tap, ["nowhere"]),
    ):
        with pytest.raises(InputError):
            fail()
        assert state(module) == before


@pytest.mark.parametrize("name", NETWORKS)
def test_borrowed_undoes_whatever_happens_inside(network, state, name: str) -> None:
    module = network(name)
    unsettle(module)
    before = state(module)

    def disturb() -> None:
        with borrowed(module) as inner:
            assert not any(m.training for m in inner.modules())
            assert all(p.grad is None for p in inner.parameters())
            inner.train()
            inner.register_forward_hook(lambda *_: None)
            for parameter in inner.parameters():
                parameter.requires_grad = True
            inner(torch.rand(2, 3, 96, 96)).sum().backward()
            with torch.no_grad():
                for tensor in (*inner.parameters(), *inner.buffers()):
                    tensor.zero_()
            for child in inner.modules():
                if hasattr(child, "inplace"):
                    child.inplace = not child.inplace
            inner.double()
            torch.rand(3)
            np.random.rand(3)  # noqa: NPY002
            random.random()
            raise KeyError

    with pytest.raises(KeyError):
        disturb()
    assert state(module) == before


def test_borrowed_without_a_copy_says_that_weights_were_changed() -> None:
    module = nn.Sequential(nn.Conv2d(3, 2, 3))
    with pytest.raises(InputError, match=r"0\.weight"), borrowed(module, copy_weights=False), torch.no_grad():
        module[0].weight.zero_()


@pytest.mark.parametrize(
    ("name", "taps"),
    [
        ("resnet18", ["layer1.0.relu", "layer1.0.relu_1", "layer3", "layer4.1"]),
        ("squeezenet1_1", ["features.11", "features.12.squeeze"]),
        ("googlenet", ["inception4d", "inception4e.branch2.1"]),
        ("densenet121", ["features.denseblock3", "features.transition3.relu"]),
    ],
)
def test_taps_are_those_of_torchvisions_feature_extractor(network, name: str, taps: list[str]) -> None:
    module, image = network(name), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        reference = create_feature_extractor(module, taps)(image)
        with read_taps(module, taps) as held:
            module(image)
    assert list(held) == taps
    for tap in taps:
        assert torch.equal(held[tap], reference[tap]), tap


def test_a_tap_survives_what_overwrites_it_later() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    image = torch.rand(1, 3, 8, 8) - 0.5
    with read_taps(module, ["0"]) as taps, torch.no_grad():
        module(image)
    assert float(taps["0"].min()) < 0
    assert torch.equal(taps["0"], module[0](image))


def test_the_latest_pass_counts_and_calls_start_again() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    with read_taps(module, ["0"]) as taps:
        for size in (8, 6):
            module(torch.rand(1, 3, size, size))
            assert taps["0"].shape[-1] == size - 2
    assert not module[0]._forward_hooks
    assert not module._forward_pre_hooks


class Several(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x):
        first, second = x.mean((2, 3)), x + 1
        return {"dict": {"flat": first, "map": second}, "tuple": (first, second), "list": [first, second]}[self.kind]


@pytest.mark.parametrize(("kind", "key"), [("dict", "flat"), ("tuple", "0"), ("list", "0")])
def test_outputs_of_several_tensors(kind: str, key: str) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Several(kind)

        def forward(self, x):
            out = self.inner(x)
            return out["map"] if kind == "dict" else out[1]

    image = torch.rand(1, 3, 4, 4)
    _, taps = forward_taps(Wrapper(), image, ["inner", f"inner:{key}"])
    assert torch.equal(taps["inner"], image + 1)
    assert torch.equal(taps[f"inner:{key}"], image.mean((2, 3)))
    with pytest.raises(LayerError, match="an entry nothing"):
        forward_taps(Wrapper(), image, ["inner:nothing"])


def test_data_parallel_is_read_by_the_inner_names() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    image = torch.rand(2, 3, 6, 6)
    with read_taps(nn.DataParallel(module), ["0"]) as taps:
        nn.DataParallel(module)(image)
        out = module(image)
    assert torch.equal(taps["0"], out)


def test_unknown_layers_and_layers_not_called() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    module.unused = nn.ReLU()
    module.forward = lambda x: module[0](x)  # noqa: PLW0108 - forward must call the layer, not be it
    with pytest.raises(LayerError, match="Nearest: unused"):
        forward_taps(module, torch.rand(1, 3, 4, 4), ["unuse"])
    with pytest.raises(LayerError, match="not called"):
        forward_taps(module, torch.rand(1, 3, 4, 4), ["0_1"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types_come_back_as_float32(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(dtype)
    image = torch.rand(2, 3, 6, 6)
    out, taps = forward_taps(module, image, ["1"])
    assert out.dtype == taps["1"].dtype == torch.float32
    assert torch.allclose(out, module.float()(image), atol=0.05)


def test_results_can_enter_a_training_step() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    _, taps = forward_taps(module, torch.rand(1, 3, 6, 6), ["0"])
    learner = nn.Conv2d(4, 1, 1)
    learner(taps["0"]).sum().backward()
    assert learner.weight.grad is not None
    assert not taps["0"].requires_grad


def test_channels_last_is_kept() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=torch.channels_last)
    image = torch.rand(2, 3, 6, 6).to(memory_format=torch.channels_last)
    _, taps = forward_taps(module, image, ["0"])
    assert taps["0"].is_contiguous(memory_format=torch.channels_last)


def test_the_first_bad_layer_is_named() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    module[1].running_var.fill_(float("nan"))
    with pytest.raises(InputError, match=r"first in 1\."):
        forward_taps(module, torch.rand(1, 3, 6, 6), ["2"])
    with pytest.raises(InputError, match="the batch itself"):
        forward_taps(module, torch.full((1, 3, 6, 6), float("inf")), ["2"])


def test_wrong_batches() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(InputError, match=r"\(3, 6, 6\)"):
        forward_taps(module, torch.rand(3, 6, 6), ["0"])
    with pytest.raises(InputTypeError, match="list"):
        forward_taps(module, [1], ["0"])


def test_outputs_can_be_reduced_while_they_are_there(state) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    image = torch.randn(3, 3, 9, 9)
    before = state(module)
    whole = forward_taps(module, image, ["0", "1", "2"])[1]
    sizes = []

    def energy(values: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(values.shape))
        return values.square().sum((2, 3))

    output, reduced = forward_taps(module, image, ["0", "1", "2"], energy)
    assert sizes == [(3, 4, 7, 7), (3, 4, 7, 7), (3, 2, 5, 5)]
    for name, values in whole.items():
        assert torch.allclose(reduced[name], values.square().sum((2, 3)), atol=1e-5)
    assert not torch.allclose(reduced["0"], reduced["1"])  # read before the next layer wrote into it
    assert torch.equal(output, forward_taps(module, image, ["2"])[1]["2"])
    with pytest.raises(ValueError, match="finite"):
        forward_taps(module, image * torch.inf, ["1"], energy)
    with pytest.raises(RuntimeError, match="no room"):
        forward_taps(module, image, ["1"], lambda _: (_ for _ in ()).throw(RuntimeError("no room")))
    assert state(module) == before


def test_a_block_that_gives_what_its_last_layer_gave_is_reduced_once() -> None:
    network = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)), nn.Flatten(0, 1))
    seen: list[torch.Tensor] = []

    def reduce(maps: torch.Tensor) -> torch.Tensor:
        seen.append(maps.clone())
        return maps.sum()

    _, taps = forward_taps(network, torch.rand(2, 3, 6, 6), ["0.0", "0.1", "0"], reduce)
    assert len(seen) == 2  # the convolution before its values are overwritten, the rectifier, not the block
    assert float(taps["0"]) == float(taps["0.1"]) != float(taps["0.0"])


def test_a_batch_waits_for_its_device_once_or_twice_however_many_layers_are_read(monkeypatch) -> None:
    """Every look at a number of a GPU waits for it: one for all that must be finite, one for all buffers."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))]
    network = nn.Sequential(nn.Conv2d(3, 4, 3), *layers).eval()
    performer = Performer(network, "net", Preprocessing(size_px=(8, 8)), "")
    names = [str(number) for number in range(13)]
    forward_taps(performer, torch.zeros(2, 3, 8, 8), names)  # finds out the layouts, once
    looked: list[str] = []
    for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real, name=name: looked.append(name) or real(self))
    monkeypatch.setattr(torch, "equal", lambda *_: looked.append("equal") or True)
    _, taps = forward_taps(performer, torch.zeros(2, 3, 8, 8), names)
    assert len(taps) == 13
    assert len(looked) <= 2, looked
    network[2].running_mean.data.fill_(7.0)
    looked.clear()
    with borrowed(network) as inside:
        inside[2].running_mean.data.fill_(8.0)  # past autograd's versions
    assert float(network[2].running_mean[0]) == 7.0
