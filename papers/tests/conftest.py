"""A network whose relevant filters are known: four of forty filters tell four colours, the rest is noise."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from partlens.data.images import ImageSet
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing

COLOURS = {"blue": (30, 30, 220), "green": (30, 220, 30), "red": (220, 30, 30), "white": (220, 220, 220)}
SIDE = 16
FILTERS = 40


def planted_network() -> nn.Sequential:
    """Filters 0 to 3 of ``detect`` answer to one colour each, ``classes`` reads them; the others are noise."""
    torch.manual_seed(3)
    network = nn.Sequential(
        OrderedDict(
            detect=nn.Conv2d(3, FILTERS, 1),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            classes=nn.Linear(FILTERS, 4),
        )
    )
    with torch.no_grad():
        network.detect.weight[4:] *= 0.3
        for k, colour in enumerate(COLOURS.values()):
            bright = torch.tensor(colour) > 128
            network.detect.weight[k, :, 0, 0] = torch.where(bright, 4.0, -4.0)
            network.detect.bias[k] = -4.0 * float(bright.sum()) + 2.0
        network.classes.weight.copy_(0.02 * torch.randn(4, FILTERS))
        network.classes.weight[:, :4] += 20 * torch.eye(4)
        network.classes.bias.zero_()
    return network.eval()


@pytest.fixture(scope="module")
def planted() -> Performer:
    module = planted_network()
    preprocessing = Preprocessing(size_px=(SIDE, SIDE), resize="squash", mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return Performer(module, "planted", preprocessing, weights_sha256(module), "relu", tuple(COLOURS))


@pytest.fixture(scope="module")
def blobs() -> ImageSet:
    """Grey noise with a blob of a colour; of every eight photos of a class two are held out."""
    rng = np.random.default_rng(0)
    names = list(COLOURS) * 20
    photos = rng.integers(60, 120, size=(len(names), SIDE, SIDE, 3), dtype=np.uint8)
    for photo, name in zip(photos, names, strict=True):
        row, col = rng.integers(0, SIDE - 6, size=2)
        photo[row : row + 6, col : col + 6] = COLOURS[name]
    splits = ["test" if index // 4 % 4 == 3 else "train" for index in range(len(names))]
    return ImageSet.from_arrays(photos, categories=names, splits=splits, name="blobs")
