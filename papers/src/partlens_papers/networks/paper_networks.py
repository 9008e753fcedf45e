"""AlexNet and the three networks of Chatfield et al. as the explainer papers used them, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlens.errors import InputError, expected, nearest


@dataclass(frozen=True)
class _Conv:
    filters: int
    kernel: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    norm: bool = False
    pool: tuple[int, int] | None = None  # kernel, stride


@dataclass(frozen=True)
class _Plan:
    input_px: int
    lrn: tuple[int, float, float, float]  # size, alpha, beta, k
    convs: tuple[_Conv, ...]


PLANS = {
    # BVLC AlexNet normalises before it pools; the "reference CaffeNet" does the opposite.
    "alexnet-caffe": _Plan(
        227,
        (5, 1e-4, 0.75, 1.0),
        (
            _Conv(96, 11, 4, norm=True, pool=(3, 2)),
            _Conv(256, 5, padding=2, groups=2, norm=True, pool=(3, 2)),
            _Conv(384, 3, padding=1),
            _Conv(384, 3, padding=1, groups=2),
            _Conv(256, 3, padding=1, groups=2, pool=(3, 2)),
        ),
    ),
    # Chatfield et al., BMVC 2014 (arXiv 1405.3531), table 1; LRN of the released models.
    "vgg-f": _Plan(
        224,
        (5, 5e-4, 0.75, 2.0),
        (
            _Conv(64, 11, 4, norm=True, pool=(3, 2)),
            _Conv(256, 5, padding=2, norm=True, pool=(3, 2)),
            _Conv(256, 3, padding=1),
            _Conv(256, 3, padding=1),
            _Conv(256, 3, padding=1, pool=(3, 2)),
        ),
    ),
    "vgg-m": _Plan(
        224,
        (5, 5e-4, 0.75, 2.0),
        (
            _Conv(96, 7, 2, norm=True, pool=(3, 2)),
            _Conv(256, 5, 2, padding=1, norm=True, pool=(3, 2)),
            _Conv(512, 3, padding=1),
            _Conv(512, 3, padding=1),
            _Conv(512, 3, padding=1, pool=(3, 2)),
        ),
    ),
    "vgg-s": _Plan(
        224,
        (5, 5e-4, 0.75, 2.0),
        (
            _Conv(96, 7, 2, norm=True, pool=(3, 3)),
            _Conv(256, 5, pool=(2, 2)),
            _Conv(512, 3, padding=1),
            _Conv(512, 3, padding=1),
            _Conv(512, 3, padding=1, pool=(3, 3)),
        ),
    ),
}


class PaperNet(nn.Module):
    """AlexNet, VGG-F, VGG-M or VGG-S as the explainer papers used them.

    Layers carry Caffe's names: ``conv1, relu1, norm1, pool1, … pool5, fc6, relu6, drop6, fc7, relu7, drop7,
    fc8``. Pooling rounds up, as Caffe and the MatConvNet models do. At the default input size ``relu4`` gives
    13x13 cells (17x17 for VGG-S) and ``pool5`` 6x6.

    Args:
        net: ``alexnet-caffe``, ``vgg-f``, ``vgg-m`` or ``vgg-s``.
        num_classes: outputs of fc8.
        input_px: side of the square input; the papers' size when ``None``. It fixes the width of fc6.
        hidden: outputs of fc6 and fc7.

    Raises:
        InputError: an unknown name, or an input too small for the five stages.

    Example:
        >>> net = PaperNet("vgg-m", num_classes=2, input_px=64, hidden=8)
        >>> tuple(net(torch.zeros(1, 3, 64, 64)).shape)
        (1, 2)
    """

    def __init__(self, net: str, num_classes: int = 1000, input_px: int | None = None, hidden: int = 4096) -> None:
        super().__init__()
        if net not in PLANS:
            raise InputError(
                expected(
                    f"one of {', '.join(PLANS)}",
                    net,
                    f"Did you mean {nearest(net, PLANS, 1)[0]}?".rstrip("?"),
                )
            )
        plan = PLANS[net]
        self.net = net
        self.num_classes = num_classes
        self.input_px = input_px or plan.input_px
        size, alpha, beta, k = plan.lrn
        channels, cells = 3, self.input_px
        for number, conv in enumerate(plan.convs, start=1):
            self.add_module(
                f"conv{number}",
                nn.Conv2d(channels, conv.filters, conv.kernel, conv.stride, conv.padding, groups=conv.groups),
            )
            self.add_module(f"relu{number}", nn.ReLU(inplace=False))
            cells = (cells + 2 * conv.padding - conv.kernel) // conv.stride + 1
            if conv.norm:
                self.add_module(f"norm{number}", nn.LocalResponseNorm(size, alpha, beta, k))
            if conv.pool:
                self.add_module(f"pool{number}", nn.MaxPool2d(conv.pool[0], conv.pool[1], ceil_mode=True))
                cells = math.ceil((cells - conv.pool[0]) / conv.pool[1]) + 1
            channels = conv.filters
            if cells < 1:
                raise InputError(
                    expected(f"an input large enough for {net}", f"{self.input_px} px", f"Use {plan.input_px} px")
                )
        self.fc6 = nn.Linear(channels * cells * cells, hidden)
        self.relu6 = nn.ReLU(inplace=False)
        self.drop6 = nn.Dropout(0.5)
        self.fc7 = nn.Linear(hidden, hidden)
        self.relu7 = nn.ReLU(inplace=False)
        self.drop7 = nn.Dropout(0.5)
        self.fc8 = nn.Linear(hidden, num_classes)

    @staticmethod
    def convolutions(net: str) -> tuple[tuple[int, int, int, int, int], ...]:
        """Return filters, kernel side, stride, padding and groups of each convolution of a network of this kind.

        Example:
            >>> PaperNet.convolutions("vgg-s")[0]
            (96, 7, 2, 0, 1)
        """
        return tuple((c.filters, c.kernel, c.stride, c.padding, c.groups) for c in PLANS[net].convs)

    def until(self, last: str) -> list[tuple[str, nn.Module]]:
        """Return the layers up to one, that included."""
        layers = list(self.named_children())
        return layers[: [name for name, _ in layers].index(last) + 1]

    def run_from(self, first: str, x: Tensor) -> Tensor:
        """Run the network from a layer on."""
        for name, layer in list(self.named_children())[len(self.until(first)) - 1 :]:
            x = layer(torch.flatten(x, 1) if name == "fc6" else x)
        return x

    def forward(self, x: Float[Tensor, "image 3 row col"]) -> Float[Tensor, "image output"]:
        """Score a batch of inputs."""
        return self.run_from("conv1", x)
