from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(scope="session")
def network() -> Callable[[str], nn.Module]:
    """A fresh random network by name, in eval mode, with batch statistics that are not the identity."""

    def make(name: str) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
            module = torchvision.models.get_model(name, weights=None, num_classes=7, **extra)
            for child in module.modules():
                if isinstance(child, nn.BatchNorm2d):
                    child.running_mean.normal_(0, 0.1)
                    child.running_var.uniform_(0.5, 2.0)
        return module.eval()

    return make


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the project's photos and weights are not at {SHARED}")
    return SHARED
