"""What the owner's hooks change is changed in copies, too, and chooses no layer."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from partlens.errors import LayerError
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, explainer_structure, performer_head
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps
from partlens.network.zoo import load_performer

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Gained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, gain: Any = 1.0) -> Tensor:
        return (self.conv(x) * gain).relu()


class Network(nn.Module):
    """A residual network with a block that is called with a keyword."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
            self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
            self.gained = Gained()
            self.stage = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
            self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        x = self.stage(self.gained(x, gain=2.0))
        return self.head(x.mean((2, 3)))


class Steering:
    def __init__(self, by: float) -> None:
        self.by, self.calls = by, 0

    def after(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        self.calls += 1
        return output + self.by

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self.after(module, inputs, output)


def halved(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
    output[:, 1] *= 0.5


def with_names(_module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return output * kwargs.get("gain", 3.0) + args[0].mean()


def gain_changed(_module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "gain": kwargs["gain"] * 1.5}


HOOKS: dict[str, Callable[[Network], Any]] = {
    "a batch norm": lambda n: n.stem[1].register_forward_hook(lambda _m, _i, o: o * 1.5),
    "a layer, in place": lambda n: n.stage[2].register_forward_hook(halved),
    "the tap itself": lambda n: n.gained.register_forward_hook(lambda _m, _i, o: o * 1.5),
    "a container that reads its input": lambda n: n.stage.register_forward_hook(lambda _m, i, o: o * i[0].max()),
    "the whole network": lambda n: n.register_forward_hook(lambda _m, _i, o: o * 3),
    "a container, before": lambda n: n.stage.register_forward_pre_hook(lambda _m, i: (i[0] * 2,)),
    "with keywords": lambda n: n.stage.register_forward_hook(with_names, with_kwargs=True),
    "with keywords, before": lambda n: n.gained.register_forward_pre_hook(gain_changed, with_kwargs=True),
    "always called": lambda n: n.stage.register_forward_hook(Steering(0.2), always_call=True),
    "a method of an object": lambda n: n.stage[1].register_forward_hook(Steering(0.2).after),
}


def performer_of(module: nn.Module) -> Performer:
    return load_performer(module, preprocessing=Preprocessing(size_px=(32, 32)))


@pytest.fixture(params=HOOKS.values(), ids=list(HOOKS))
def network(request: pytest.FixtureRequest) -> Network:
    made = Network().eval()
    request.param(made)
    return made


@pytest.mark.parametrize("tap", ["stem", "gained"])
def test_what_is_cut_out_gives_the_networks_own_answer(network: Network, tap: str) -> None:
    performer = performer_of(network)
    output, maps = forward_taps(network, IMAGES, [tap, "stage"])
    cut = performer.upper(tap, ["stage", "output"])(maps[tap])
    torch.testing.assert_close(cut[0], maps["stage"], rtol=0, atol=0)
    torch.testing.assert_close(cut[1], output, rtol=0, atol=0)


def test_at_p_0_the_explainer_reproduces_the_network_with_its_hooks(network: Network) -> None:
    performer = performer_of(network)
    output, maps = forward_taps(network, IMAGES, ["gained"])
    structure = explainer_structure(performer, IMAGES, "gained", ["stage"])
    explainer = build_explainer(performer, structure, ExplainerConfig.preset("partlens")).eval()
    explainer.start_norms(maps["gained"])
    explainer.share_logit.data.fill_(-100)
    fed_back = performer_head(performer, structure)(explainer(maps["gained"]).reconstructions[-1])[0]
    torch.testing.assert_close(fed_back, output)


def test_hooks_of_a_replaced_convolution_are_kept() -> None:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    module = nn.Sequential(*body, nn.Flatten(), nn.Linear(2048, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    module[2].register_forward_hook(lambda _m, _i, o: o * 1.5)
    performer = performer_of(module)
    output, maps = forward_taps(module, IMAGES, ["1"])
    structure = explainer_structure(performer, IMAGES, "1", ["7"])
    explainer = build_explainer(performer, structure, ExplainerConfig.preset("partlens")).eval()
    explainer.start_norms(maps["1"])
    explainer.share_logit.data.fill_(-100)
    torch.testing.assert_close(
        performer_head(performer, structure)(explainer(maps["1"]).reconstructions[-1])[0], output
    )


def test_hooks_that_look_on_see_tensors_alone_and_choose_no_layer() -> None:
    module, seen = Network().eval(), []

    def log(_module: nn.Module, inputs: Any, output: Any) -> None:
        seen.extend([*inputs, output])
        float(output.detach().mean()), tuple(output.shape), bool((output > 0).all())

    def log_before(_module: nn.Module, inputs: Any) -> None:
        seen.extend(inputs)
        float(inputs[0].detach().mean())

    handles = [register_module_forward_hook(log), register_module_forward_pre_hook(log_before)]
    for each in module.modules():
        each.register_forward_hook(log)
        if each is not module.gained:  # a pre-hook may make its keyword depend on its input
            each.register_forward_pre_hook(log_before)
    try:
        performer = performer_of(module)
        performer.upper("gained")
    finally:
        for handle in handles:
            handle.remove()
    plain = performer_of(Network())
    assert [(one.name, one.receptive_field_px, one.reason) for one in performer.layers] == [
        (one.name, one.receptive_field_px, one.reason) for one in plain.layers
    ]
    assert performer.tap == plain.tap
    assert performer.cut_points() == plain.cut_points()
    assert all(isinstance(value, Tensor) for value in seen)


def test_an_object_of_the_owner_is_not_copied_with_its_hook() -> None:
    module, steering = Network().eval(), Steering(0.5)
    module.stage[1].register_forward_hook(steering.after)
    cut = performer_of(module).upper("gained", ["output"])
    before, steering.by, steering.calls = cut(torch.ones(1, 8, 32, 32))[0], 1.0, 0
    assert not torch.equal(cut(torch.ones(1, 8, 32, 32))[0], before)
    assert steering.calls == 1


def test_a_method_of_a_layer_becomes_that_of_its_copy() -> None:
    def count(self: nn.Module, *_: Any) -> None:
        self.calls = getattr(self, "calls", 0) + 1

    module = Network().eval()
    module.stage[1].register_forward_hook(types.MethodType(count, module.stage[1]))
    cut = performer_of(module).upper("gained", ["output"])
    copied = cut.get_submodule("network.stage.1")
    before = copied.calls
    cut(torch.ones(1, 8, 32, 32))
    assert not hasattr(module.stage[1], "calls")
    assert copied.calls == before + 1


def test_a_hook_that_needs_what_lies_before_the_tap_is_refused() -> None:
    module = Network().eval()
    module.register_forward_hook(lambda _m, i, o: o + i[0].mean())
    with pytest.raises(LayerError, match=r"hooks that read what comes before gained\. Remove"):
        performer_of(module).upper("gained")
