"""The small network of the demo, for generated flowers of 112 px."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from partlens.network.preprocessing import Preprocessing

FLOWER_DEMO = "flower-demo"
"""Its name after ``partlens:``."""
SIDE_PX = 112
_MEAN = (0.45, 0.45, 0.4)
_STD = (0.25, 0.25, 0.25)


def flower_preprocessing() -> Preprocessing:
    """Return how flowers become the input: squashed to 112 px, RGB, roughly centred."""
    return Preprocessing(size_px=(SIDE_PX, SIDE_PX), resize="squash", resize_px=None, mean=_MEAN, std=_STD)


def flower_network(outputs: int = 6) -> nn.Sequential:
    """Return the demo's performer, untrained: six convolutions, 14x14 cells at the tap ``relu4``.

    Args:
        outputs: number of categories.

    Returns:
        A sequential network for 112 px images.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    plan = ((3, 24, 2, False), (24, 32, 1, True), (32, 48, 1, True), (48, 64, 1, False), (64, 64, 1, True))
    for number, (inputs, filters, stride, pooled) in enumerate(plan, start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm2d(filters)
        layers[f"relu{number}"] = nn.ReLU()
        if pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["conv6"] = nn.Conv2d(64, 96, 3, 1, 1)
    layers["relu6"] = nn.ReLU()
    layers["pool6"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classes"] = nn.Linear(96, outputs)
    return nn.Sequential(layers)
