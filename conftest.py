"""Shared set-up: shape checks on, few threads, the tiny networks."""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from jaxtyping import install_import_hook

# Every annotated tensor of the tensor modules is checked at run time, here and only here.
# The performer's modules stay out: their tests hand over wrong kinds of objects on purpose, to see our own errors.
install_import_hook(
    [
        "partlens.explainer",
        "partlens.selection",
        "partlens.attribution",
        "partlens.metrics",
        "partlens_papers.rivals",
        "partlens.evaluation",
    ],
    "beartype.beartype",
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402
from torch import nn  # noqa: E402

from partlens.data.flowers import generated_flowers  # noqa: E402
from partlens.data.images import ImageSet  # noqa: E402
from partlens.network.performer import Performer, weights_sha256  # noqa: E402
from partlens.network.preprocessing import Preprocessing  # noqa: E402

torch.set_num_threads(1)
settings.register_profile(
    "partlens", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("partlens")

SHARED = Path(os.environ.get("PARTLENS_SHARED", Path(__file__).parent.parent / "shared"))


@pytest.fixture
def shared() -> Path:
    """Folder of real photos and weights; the test is skipped where it is absent."""
    if not (SHARED / "data" / "animal-part" / "images.csv").exists():
        pytest.skip(f"no photos at {SHARED}; set PARTLENS_SHARED to their folder")
    return SHARED


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state itself is what is reset
    random.seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def tiny_network() -> nn.Sequential:
    """A trained-looking network of the papers' kind: 8x8 cells at the tap ``relu2``, residual-free, seeded."""
    torch.manual_seed(7)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 3, stride=2, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 12, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(12, 12, 3, padding=1),
            relu3=nn.ReLU(),
            pool3=nn.MaxPool2d(2),
            conv4=nn.Conv2d(12, 16, 3, padding=1),
            relu4=nn.ReLU(),
            pool4=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classes=nn.Linear(16, 4),
        )
    ).eval()


def tiny_performer() -> Performer:
    """A performer small enough for whole runs in a test, for 32 px images."""
    module = tiny_network()
    preprocessing = Preprocessing(size_px=(32, 32), resize="squash", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return Performer(module, "tiny", preprocessing, weights_sha256(module), "relu2")


@pytest.fixture
def tiny() -> Performer:
    """The tiny performer, the test's own."""
    return tiny_performer()


@pytest.fixture(scope="session")
def tiny_once() -> Performer:
    """The tiny performer of fixtures that live as long as the session."""
    return tiny_performer()


def everything_of(module: nn.Module, *, python: bool = True) -> dict[str, object]:
    """What a function that borrows a network must hand back, found independently of the library.

    Without Python's random state where the shape checks of the tests draw from it.
    """
    found: dict[str, object] = {"weights": weights_sha256(module)}
    for name, p in module.named_parameters():
        grad = None if p.grad is None else (id(p.grad), float(p.grad.sum()), float(p.grad.norm()))
        found["p " + name] = (id(p), p.data_ptr(), p.requires_grad, grad, p._backward_hooks)  # noqa: SLF001
    for name, buffer in module.named_buffers():
        found["b " + name] = (id(buffer), buffer.data_ptr())
    for name, child in module.named_modules():
        hooks = [list(v.items()) for k, v in sorted(child.__dict__.items()) if "hooks" in k]
        found["m " + name] = (id(child), child.training, getattr(child, "inplace", None), hooks, sorted(child.__dict__))
    found["random"] = (torch.get_rng_state().tolist(), str(np.random.get_state()))  # noqa: NPY002
    return found | ({"python": random.getstate()} if python else {})


@pytest.fixture
def state() -> Callable[..., dict[str, object]]:
    """Gives `everything_of` a network."""
    return everything_of


@pytest.fixture
def few_flowers() -> ImageSet:
    """Generated flowers of two categories, with landmarks and both splits."""
    return generated_flowers(80, seed=3, size=48, categories=("petal-red", "petal-blue"))
