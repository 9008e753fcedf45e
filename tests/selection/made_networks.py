"""Networks whose layers are known, as performers, for the tests of several modules."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing


def as_performer(
    module: nn.Module, size: int = 16, names: tuple[str, ...] | None = None, channels: int = 3
) -> Performer:
    return Performer(
        module,
        "net",
        Preprocessing(size_px=(size, size), resize="squash", channels=channels),
        weights_sha256(module),
        None,
        names,
    )


def matconvnet_lenet() -> nn.Sequential:
    """MatConvNet's MNIST network: 28 px, no rectifier but the last."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(50, 500, 4),
            relu=nn.ReLU(),
            conv4=nn.Conv2d(500, 10, 1),
            softmax=nn.Softmax(dim=1),
        )
    ).eval()


class Block(nn.Module):
    """A residual block whose last rectifier is a function, and whose sum no module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.relu(self.conv(self.relu(x))))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = Block()
        self.drop = nn.Dropout()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.aside = nn.Conv2d(4, 9, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        self.aside(x)
        return self.fc(torch.flatten(self.pool(self.drop(x)), 1)).softmax(1)
