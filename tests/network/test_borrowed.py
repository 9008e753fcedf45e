"""What is borrowed comes back as it was: each kind of state by itself, after an exception and from several threads."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import partlens
from partlens.errors import InputError, InputTypeError
from partlens.network.borrowed import borrowed, random_state_kept, unwrapped
from partlens.network.taps import forward_taps


def network() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    module[0].weight.grad = torch.ones_like(module[0].weight)
    return module.train()


def zeroed(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.zero_()


@pytest.mark.parametrize(
    ("read", "disturb"),
    [
        (lambda m: m[0].weight.sum().item(), lambda m: zeroed(m[0].weight)),
        (lambda m: m[0].weight.data_ptr(), lambda m: setattr(m[0].weight, "data", torch.ones(4, 3, 1, 1))),
        (lambda m: id(m[0].weight), lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 3, 1, 1)))),
        (lambda m: m[0].weight.dtype, lambda m: m.double()),
        (lambda m: m[0].weight.requires_grad, lambda m: m.requires_grad_(requires_grad=False)),
        (lambda m: id(m[0].weight.grad), lambda m: setattr(m[0].weight, "grad", torch.zeros(4, 3, 1, 1))),
        (lambda m: m[0].bias.grad, lambda m: setattr(m[0].bias, "grad", torch.zeros(4))),
        (lambda m: m[1].running_mean.tolist(), lambda m: m[1].running_mean.add_(1)),
        (lambda m: m[1].running_var.data_ptr(), lambda m: setattr(m[1].running_var, "data", torch.zeros(4))),
        (lambda m: m[1].num_batches_tracked.item(), lambda m: m.train()(torch.rand(2, 3, 4, 4))),
        (lambda m: [child.training for child in m.modules()], lambda m: m[1].train()),
        (lambda m: m[2].inplace, lambda m: setattr(m[2], "inplace", False)),
        (lambda m: m[1].momentum, lambda m: setattr(m[1], "momentum", 0.5)),
        (lambda m: m[1].track_running_stats, lambda m: setattr(m[1], "track_running_stats", False)),
        (lambda m: m[3].ceil_mode, lambda m: setattr(m[3], "ceil_mode", True)),
        (lambda m: list(m._modules), lambda m: m.pop(3)),
        (lambda m: id(m[2]), lambda m: m.__setitem__(2, nn.Tanh())),
        (lambda m: len(m[0]._forward_hooks), lambda m: m[0].register_forward_hook(print)),
        (lambda m: len(m[0]._forward_pre_hooks), lambda m: m[0].register_forward_pre_hook(print)),
        (lambda m: len(m._backward_hooks), lambda m: m.register_full_backward_hook(print)),
        (lambda m: m._is_full_backward_hook, lambda m: m.register_full_backward_hook(print)),
        (lambda m: len(m._state_dict_hooks), lambda m: m._register_state_dict_hook(print)),
        (lambda m: sorted(m._buffers), lambda m: m.register_buffer("more", torch.zeros(1))),
        (lambda _: torch.get_rng_state().tolist(), lambda _: torch.rand(1)),
        (lambda _: str(np.random.get_state()), lambda _: np.random.rand()),  # noqa: NPY002
        (lambda _: random.getstate(), lambda _: random.random()),
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_each_kind_of_state_comes_back(read: Callable[[Any], Any], disturb: Callable[[Any], Any], fails: bool) -> None:
    module = network()
    before = read(module)
    with pytest.raises(KeyError) if fails else random_state_kept(), borrowed(module) as inner:
        disturb(inner)
        assert read(inner) != before or read(inner) is not before
        if fails:
            raise KeyError
    assert read(module) == before


def test_the_owners_hooks_stay_and_gradients_are_hidden_meanwhile() -> None:
    module = network()
    calls: list[int] = []
    module[0].register_forward_hook(lambda *_: calls.append(1))
    gradient = module[0].weight.grad
    with borrowed(module) as inner:
        assert not inner.training
        assert inner[0].weight.grad is None
        inner(torch.rand(1, 3, 4, 4)).sum().backward()
    assert calls == [1]
    module(torch.rand(1, 3, 4, 4))
    assert calls == [1, 1]
    assert module[0].weight.grad is gradient
    assert bool((gradient == 1).all())
    assert module.training


def test_nan_weights_are_equal_to_themselves() -> None:
    module = network()
    zeroed(module[0].weight)
    module[0].weight.data[0] = torch.nan
    version = module[0].weight._version
    with borrowed(module):
        pass
    assert module[0].weight._version == version  # nothing was written


def test_without_a_copy_nothing_may_be_written() -> None:
    module = network()
    with pytest.raises(InputError, match=r"Sequential, which changed 0\.bias"), borrowed(module, copy_weights=False):
        zeroed(module[0].bias)
    with borrowed(module, copy_weights=False) as inner:  # buffers are restored all the same
        inner[1].running_mean.add_(1)
    assert module[1].running_mean.tolist() == [0, 0, 0, 0]


def test_only_readable_networks() -> None:
    module = network()
    assert unwrapped(nn.DataParallel(nn.DataParallel(module))) is module
    with pytest.raises(InputTypeError, match=r"a torch\.nn\.Module, got int"):
        unwrapped(3)  # type: ignore[arg-type]


def _compiled_part() -> nn.Module:
    module = network()
    module[0].compile()
    return module


def _quantised() -> nn.Module:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4, 2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(module, {nn.Linear})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.export.export(network().eval(), (torch.rand(1, 3, 4, 4),)).module(), r"torch\.export"),
        (lambda: nn.Sequential(torch.jit.script(nn.ReLU())), r"a TorchScript module, 0 "),
        (lambda: nn.Sequential(torch.compile(nn.ReLU())), r"compiled by torch\.compile, 0 "),
        (_compiled_part, r"compiled in place, 0 "),
        (_quantised, r"a quantised layer, 2 "),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.LazyLinear(2)),
            r"none in 2\.weight\. Run the netw",
        ),
        (lambda: nn.Conv2d(3, 4, 1, device="meta"), r"none in weight\. Load its weights"),
        (torch.inference_mode()(lambda: nn.Conv2d(3, 4, 1)), r"inference tensors in weight\. Load the network outside"),
    ],
)
def test_a_network_that_cannot_be_used_is_refused_by_its_part(make: Callable[[], nn.Module], words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = make()
    for call in (
        lambda: partlens.guided_backprop(module, torch.rand(1, 3, 4, 4)),
        lambda: forward_taps(module, torch.rand(1, 3, 4, 4), []),
        lambda: partlens.load_performer(module, preprocessing=partlens.Preprocessing(size_px=(4, 4))),
    ):
        with pytest.raises(InputTypeError, match=words):
            call()
