"""Several threads explain with one network, as a web service does, and the owner goes on using it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import partlens
from partlens.errors import InputError
from partlens.network.borrowed import borrowed, random_state_kept
from partlens.network.preprocessing import Preprocessing
from partlens.network.taps import forward_taps

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SECONDS = 20


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        return nn.Sequential(*body, nn.Conv2d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()


def state(module: nn.Module) -> list[Any]:
    """Everything of a network that a call could disturb, in a form that can be compared."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found: list[Any] = [(name, m.training, [list(getattr(m, h)) for h in hooks]) for name, m in module.named_modules()]
    found += [(name, p.requires_grad, p.grad is None or p.grad.tolist()) for name, p in module.named_parameters()]
    return [*found, [(name, value.tolist()) for name, value in module.state_dict().items()]]


def explained(module: nn.Module) -> Callable[[], torch.Tensor]:
    performer = partlens.load_performer(module, preprocessing=Preprocessing(size_px=(16, 16)))
    return lambda: torch.tensor([float(layer.shape[0]) for layer in partlens.layers(performer)])


CALLS: dict[str, Callable[[nn.Module], torch.Tensor]] = {
    "filters of a layer": lambda m: partlens.guided_backprop(m, IMAGES, layer="5", filters=[1, 2]),
    "the score": lambda m: partlens.guided_backprop(m, IMAGES),
    "deconvnet": lambda m: partlens.guided_backprop(m, IMAGES, 1, rule="deconvnet"),
    "maps": lambda m: forward_taps(m, IMAGES, ["2", "5"])[1]["5"],
    "layers": lambda m: explained(m)(),
}


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_many_threads_explain_with_one_network(call: Callable[[nn.Module], torch.Tensor], threads: int) -> None:
    module = network()
    module(IMAGES).sum().backward()
    wanted, before = call(module), state(module)
    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(lambda _: call(module), range(5 * threads)):
            assert torch.equal(found, wanted)
    assert state(module) == before
    assert module(IMAGES).shape == (2, 6)


def test_threads_share_the_layers_above_a_tap() -> None:
    performer = partlens.load_performer(network(), preprocessing=Preprocessing(size_px=(16, 16)))
    upper = performer.upper("2")
    given = [torch.rand(3, 4, 16, 16, generator=torch.Generator().manual_seed(number)) for number in range(8)]
    wanted = [upper(maps)[0] for maps in given]
    with ThreadPoolExecutor(4) as pool:
        for found, own in zip(pool.map(lambda maps: upper(maps)[0], given * 20), wanted * 20, strict=True):
            assert torch.equal(found, own)


def test_threads_that_call_different_functions_on_one_network() -> None:
    module = network()
    wanted, before = {name: call(module) for name, call in CALLS.items()}, state(module)
    with ThreadPoolExecutor(5) as pool:
        jobs = [(name, pool.submit(call, module)) for _ in range(6) for name, call in CALLS.items()]
        for name, job in jobs:
            assert torch.equal(job.result(), wanted[name])
    assert state(module) == before


def test_a_call_that_fails_in_one_thread_leaves_the_others_alone() -> None:
    module = network()
    wanted, before = CALLS["filters of a layer"](module), state(module)
    with ThreadPoolExecutor(4) as pool:
        wrong = [pool.submit(partlens.guided_backprop, module, IMAGES, layer="5", filters=[99]) for _ in range(10)]
        right = [pool.submit(CALLS["filters of a layer"], module) for _ in range(10)]
        assert all(isinstance(job.exception(), InputError) for job in wrong)
        assert all(torch.equal(job.result(), wanted) for job in right)
    assert state(module) == before


def test_the_owner_runs_the_network_while_another_thread_explains() -> None:
    module = network().eval()
    wanted = module(IMAGES)
    done = threading.Event()

    def explain() -> None:
        for _ in range(30):
            CALLS["filters of a layer"](module)
        done.set()

    worker = threading.Thread(target=explain)
    worker.start()
    passes = 0
    while not done.is_set() or passes < 10:
        assert torch.equal(module(IMAGES), wanted)  # met a private exception of ours, or lost its end
        passes += 1
    worker.join()


def test_what_the_owner_runs_meanwhile_is_not_taken_for_what_was_asked() -> None:
    module, other = network().eval(), torch.zeros(1, 3, 16, 16)

    class Waiting(nn.Module):
        """In its first pass, runs the whole network with another image in another thread."""

        ran = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.ran:
                self.ran = True
                thread = threading.Thread(target=lambda: module(other))
                thread.start()
                thread.join()
            return x

    module.append(Waiting())
    _, maps = forward_taps(module, IMAGES, ["5"])
    assert torch.equal(maps["5"], forward_taps(module, IMAGES, ["5"])[1]["5"])


def together(first: nn.Module, second: nn.Module) -> bool:
    """Whether two networks are borrowed by two threads at once."""
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with borrowed(first):
            inside.set()
            leave.wait(SECONDS)

    def try_it() -> None:
        with borrowed(second):
            entered.set()

    entered = threading.Event()
    holder, other = threading.Thread(target=hold), threading.Thread(target=try_it)
    holder.start()
    inside.wait(SECONDS)
    other.start()
    both = entered.wait(0.3)
    leave.set()
    holder.join(SECONDS)
    other.join(SECONDS)
    assert entered.is_set()
    return both


def test_threads_wait_for_the_same_network_alone() -> None:
    backbone = network()
    assert together(network(), network())
    assert not together(backbone, backbone)
    assert not together(nn.Sequential(backbone, nn.Linear(6, 2)), nn.Sequential(backbone, nn.Linear(6, 3)))
    assert not together(backbone, backbone[0])
    assert not together(nn.DataParallel(backbone), backbone)


def test_networks_that_share_a_weight_wait_for_each_other() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    two.weight = one.weight
    assert not together(one, two)


def test_one_thread_borrows_a_network_within_itself() -> None:
    module = network()
    before = state(module)
    with borrowed(module) as outer, borrowed(outer) as inner, borrowed(inner[0]):
        assert not inner.training
    assert state(module) == before


def test_two_networks_in_two_threads_keep_the_random_state() -> None:
    first, second = network(), network()
    before, numpy = torch.get_rng_state(), str(np.random.get_state())  # noqa: NPY002
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with borrowed(first):
            torch.rand(3)
            inside.set()
            leave.wait(SECONDS)

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait(SECONDS)
    with borrowed(second):  # comes in after the other has drawn, and stays longer
        np.random.rand()  # noqa: NPY002
        leave.set()
        holder.join(SECONDS)
    assert torch.equal(torch.get_rng_state(), before)
    assert str(np.random.get_state()) == numpy  # noqa: NPY002


def test_the_random_state_is_kept_within_itself() -> None:
    torch.manual_seed(3)
    with random_state_kept():
        torch.rand(2)
        between = torch.get_rng_state()
        with random_state_kept():
            torch.manual_seed(9)
        assert torch.equal(torch.get_rng_state(), between)
    again = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), again)
