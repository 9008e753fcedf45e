"""A network for command lines, and the command line in a process that kills itself: what torchrun starts in tests."""

from __future__ import annotations

import os
import signal
import sys
from collections import OrderedDict

import torch
from torch import nn


def network() -> nn.Sequential:
    """14x14 cells at the tap ``relu2`` of 224 px images."""
    torch.manual_seed(7)
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 8, 5, stride=4, padding=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 12, 5, stride=4, padding=2),
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(12, 12, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(12, 16, 3, padding=1),
            relu4=nn.ReLU(),
            pool4=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classes=nn.Linear(16, 4),
        )
    ).eval()


def killed_in(step: int) -> None:
    """Let this process die in a step, as a full memory or a broken machine would have it."""
    from partlens.explainer.training import _Training

    took, steps = _Training._step, iter(range(step))

    def step_or_die(self, batch, *, warm):
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return took(self, batch, warm=warm)

    _Training._step = step_or_die


if __name__ == "__main__":
    who, step, *arguments = sys.argv[1:]
    if os.environ["RANK"] == who:
        killed_in(int(step))
    from partlens.cli import main

    raise SystemExit(main(arguments))
