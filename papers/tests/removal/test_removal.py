"""Removing filters: exactly the named output, in the named call, per image; nothing of it stays."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

from partlens.errors import InputError, LayerError
from partlens.network.performer import Performer
from partlens_papers.removal.removal import channel_effects, removed, scores_without


class Pair(NamedTuple):
    maps: Tensor
    rest: object


class Reused(nn.Module):
    """One ReLU, called twice, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.relu = nn.ReLU(inplace=True)
        self.classes = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        return self.classes(x.mean((2, 3)))


class Packed(nn.Module):
    """A block that hands over its maps in a container."""

    def __init__(self, pack: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.pack = pack

    def forward(self, x: Tensor) -> object:
        maps = self.conv(x)
        return self.pack(maps)


class Unpacked(nn.Module):
    def __init__(self, pack: object, take: object) -> None:
        super().__init__()
        self.block, self.take = Packed(pack), take

    def forward(self, x: Tensor) -> Tensor:
        return self.take(self.block(x)).mean((2, 3))


def _resnet() -> nn.Module:
    torch.manual_seed(1)
    network = torchvision.models.resnet18(num_classes=5)
    for child in network.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.running_mean.normal_(0, 0.1)
            child.running_var.uniform_(0.5, 2.0)
    return network


def _everything(module: nn.Module) -> list[object]:
    """All that must be the same afterwards, hooks and gradients by identity."""
    state: list[object] = [torch.get_rng_state().tolist()]
    for name, child in module.named_modules():
        state += [name, child.training, len(child._forward_hooks), len(child._forward_pre_hooks)]
        state += [getattr(child, "inplace", None)]
    for name, p in module.named_parameters():
        state += [name, p.detach().numpy().tobytes(), p.requires_grad, id(p.grad)]
    state += [b.numpy().tobytes() for b in module.buffers()]
    return state


def test_zeroed_filters_are_exactly_zero_and_the_others_untouched(tiny: Performer) -> None:
    batch = torch.randn(3, 3, 32, 32)
    seen = {}
    with torch.no_grad():
        tiny.module.relu2.register_forward_hook(lambda _m, _i, o: seen.update(intact=o.clone()))
        intact = tiny.module(batch)
        with removed(tiny, {"relu2": [1, 5]}) as network:
            network.conv3.register_forward_pre_hook(lambda _m, i: seen.update(without=i[0].clone()))
            scores = network(batch)
    tiny.module.relu2._forward_hooks.clear()
    kept = [k for k in range(12) if k not in {1, 5}]
    assert float(seen["without"][:, [1, 5]].abs().max()) == 0.0
    assert torch.equal(seen["without"][:, kept], seen["intact"][:, kept])
    assert not torch.allclose(scores, intact)


def test_the_same_as_zeroing_by_hand(tiny: Performer) -> None:
    net, batch = tiny.module, torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        maps = net.relu1(net.conv1(batch))
        maps[:, 3] = 0
        maps = net.conv2(maps)
        maps[:, 7] = 0
        x = net.relu2(maps)
        for name in ("conv3", "relu3", "pool3", "conv4", "relu4", "pool4", "flatten", "classes"):
            x = getattr(net, name)(x)
    assert torch.equal(scores_without(tiny, batch, {"relu1": [3], "conv2": [7]}), x)


def test_before_the_normalisation_is_not_after_it() -> None:
    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 2, 1), norm=nn.BatchNorm2d(2), relu=nn.ReLU())).eval()
    with torch.no_grad():
        network.norm.bias.copy_(torch.tensor([1.5, 0.5]))
    batch = torch.rand(1, 3, 4, 4)
    with torch.no_grad(), removed(network, {"conv": [0]}) as without:
        assert without(batch)[0, 0].unique().tolist() == [1.5]
    with torch.no_grad(), removed(network, {"norm": [0]}) as without:
        assert without(batch)[0, 0].unique().tolist() == [0.0]


def test_each_image_has_its_own_removal() -> None:
    network = _resnet().eval()
    batch = torch.randn(3, 3, 32, 32)
    sets = [{"layer1.0.relu": [3, 4], "layer4.1.bn2": [7]}, {"layer4.1.bn2": [0]}, {}]
    masks = {
        "layer1.0.relu": torch.zeros(3, 64, dtype=torch.bool),
        "layer4.1.bn2": torch.zeros(3, 512, dtype=torch.bool),
    }
    for row, each in enumerate(sets):
        for tap, channels in each.items():
            masks[tap][row, channels] = True
    together = scores_without(network, batch, masks)
    for row, each in enumerate(sets):
        alone = scores_without(network, batch[row : row + 1], each)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], scores_without(network, batch, {})[0])
    for_all = torch.zeros(1, 512, dtype=torch.bool)
    for_all[0, 7] = True
    assert torch.equal(
        scores_without(network, batch, {"layer4.1.bn2": for_all}),
        scores_without(network, batch, {"layer4.1.bn2": [7]}),
    )


def test_only_the_named_call_of_a_module_is_changed() -> None:
    network, batch = Reused().eval(), torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        first = network.conv1(batch).relu()
        first[:, 2] = 0
        by_hand = network.classes(network.conv2(first).relu().mean((2, 3)))
        second = network.conv2(network.conv1(batch).relu()).relu()
        second[:, 2] = 0
        by_hand_2 = network.classes(second.mean((2, 3)))
    assert torch.equal(scores_without(network, batch, {"relu": [2]}), by_hand)
    assert torch.equal(scores_without(network, batch, {"relu_1": [2]}), by_hand_2)
    # The count starts anew with each pass.
    with torch.no_grad(), removed(network, {"relu_1": [2]}) as without:
        assert torch.equal(without(batch), without(batch))


@pytest.mark.parametrize(
    ("pack", "take", "tap"),
    [
        (lambda m: (m, 1), lambda o: o[0], "block"),
        (lambda m: [m.mean(), m], lambda o: o[1], "block"),
        (lambda m: Pair(m, None), lambda o: o.maps, "block:maps"),
        (lambda m: OrderedDict(out=m, other=m + 1), lambda o: o["out"], "block:out"),
    ],
)
def test_outputs_in_containers(pack: object, take: object, tap: str) -> None:
    network, batch = Unpacked(pack, take).eval(), torch.randn(2, 3, 5, 5)
    scores = scores_without(network, batch, {tap: [1]})
    assert scores[:, 1].tolist() == [0.0, 0.0]
    assert torch.allclose(scores[:, 0], network.block.conv(batch)[:, 0].mean((1, 2)))


def test_fully_connected_layers_have_filters_too(tiny: Performer) -> None:
    batch = torch.randn(2, 3, 32, 32)
    intact, without = scores_without(tiny, batch, {}), scores_without(tiny, batch, {"flatten": [4]})
    with torch.no_grad():
        pooled = tiny.module[:-1](batch)
        expected = intact - pooled[:, 4:5] * tiny.module.classes.weight[:, 4]
    torch.testing.assert_close(without, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_comes_back_bit_for_bit(fails: bool) -> None:
    network = _resnet().train()
    network.fc.weight.grad = torch.ones_like(network.fc.weight)
    network.conv1.weight.requires_grad_(False)
    before = _everything(network)
    batch = torch.randn(2, 3, 32, 32) if not fails else torch.randn(2, 4, 32, 32)
    before[0] = torch.get_rng_state().tolist()
    for call in (
        lambda: scores_without(network, batch, {"layer2.0.relu_1": [0]}),
        lambda: channel_effects(network, batch, ["conv1", "layer3.1.relu"], torch.tensor([0, 1])),
    ):
        if fails:
            with pytest.raises(RuntimeError, match="channels"):
                call()
        else:
            call()
        assert _everything(network) == before


def test_errors_say_what_to_do(tiny: Performer) -> None:
    batch = torch.randn(2, 3, 32, 32)
    with pytest.raises(LayerError, match="relu9"):
        scores_without(tiny, batch, {"relu9": [0]})
    with pytest.raises(InputError, match="filters of relu2 from 0 to 11, got 12"):
        scores_without(tiny, batch, {"relu2": [12]})
    with (
        removed(tiny, {"relu2": torch.zeros(3, 12, dtype=torch.bool)}) as network,
        pytest.raises(InputError, match=r"2 \(or 1\) images and 12 filters for relu2, got \(3, 12\)"),
    ):
        network(batch)
    with pytest.raises(LayerError, match="relu2_1 to take part"):
        scores_without(tiny, batch, {"relu2_1": [0]})
    with pytest.raises(InputError, match="targets from 0 to 3"):
        channel_effects(tiny, batch, ["relu2"], torch.tensor([0, 4]))


def _scores_with_factor(network: nn.Module, batch: Tensor, tap: str, channel: int, factor: float) -> Tensor:
    """Multiply one filter in one call, with a hook of the test's own."""
    wanted, calls = int(tap.endswith("_1")), [0]

    def hook(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor:
        calls[0] += 1
        changed = out.clone()
        changed[:, channel] *= factor
        return changed if calls[0] - 1 == wanted else out

    handle = network.get_submodule(tap.removesuffix("_1")).register_forward_hook(hook)
    with torch.no_grad():
        scores = network(batch)
    handle.remove()
    return scores


def test_the_effect_is_the_slope_of_the_score_along_the_filter() -> None:
    network = _resnet().double().eval()
    batch, step = torch.randn(2, 3, 32, 32, dtype=torch.float64), 1e-7
    targets = torch.tensor([3, 0])
    chosen = {"relu": 5, "layer2.0.conv2": 9, "layer3.0.relu_1": 100, "fc": 3}
    found = channel_effects(network, batch, list(chosen), targets)
    for tap, channel in chosen.items():
        more, less = (_scores_with_factor(network, batch, tap, channel, 1 + sign * step) for sign in (1, -1))
        slope = ((more - less) / (2 * step)).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(found.effect[tap][:, channel].double(), slope, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        maps = network.relu(network.bn1(network.conv1(batch)))
    torch.testing.assert_close(found.activation["relu"].double(), maps.mean((2, 3)), atol=1e-6, rtol=1e-5)


def test_a_layer_the_score_does_not_use_has_no_effect(tiny: Performer) -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.aside = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.conv(x).mean((2, 3))

    found = channel_effects(Aside().eval(), torch.randn(1, 3, 5, 5), ["aside", "conv"], torch.tensor([0]))
    assert found.effect["aside"].tolist() == [[0.0, 0.0]]
    assert found.effect["conv"][0, 0] != 0
