"""Two small networks for generated flowers of 112 px: the demo's, and the flower benchmark's of the papers' size.

Both are made of the layers that the papers' networks have: convolutions, ReLU, max-pooling, fully connected layers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from partlens.performer.preprocessing import Preprocessing
from partlens.vocabulary import InputTypeError, expected

SIDE_PX = 112
_CELLS = 7
_MEAN = (0.45, 0.45, 0.4)
_STD = (0.25, 0.25, 0.25)


def flower_preprocessing() -> Preprocessing:
    """Return how flowers become the input of both networks: squashed to 112 px, RGB, roughly centred."""
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


def benchmark_network(outputs: int = 6, *, normed: bool = False) -> nn.Sequential:
    """Return the flower benchmark's performer, untrained.

    Three times convolution, ReLU, max-pooling, then two fully connected layers: the size of the networks that are
    known to have been used on an8Flower (32, 64 and 64 filters of 5x5, 1,024 hidden units; the authors' own had at
    least eight layers before the softmax). The first convolution has stride 2, so that a backward pass leaves the
    lattice which the stride fix removes.

    Args:
        outputs: number of classes.
        normed: put a batch normalisation behind each convolution, for training; :func:`without_norms` melts them
            into the convolutions afterwards.

    Returns:
        A sequential network for 112 px images with layers ``conv1, (norm1,) relu1, pool1, … pool3, flatten, fc4,
        relu4, classes``; ``relu3`` has 14x14 cells.

    Example:
        >>> import torch
        >>> tuple(benchmark_network(12)(torch.zeros(1, 3, 112, 112)).shape)
        (1, 12)
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inputs, filters, stride) in enumerate(((3, 32, 2), (32, 64, 1), (64, 64, 1)), start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, filters, 5, stride, 2)
        if normed:
            layers[f"norm{number}"] = nn.BatchNorm2d(filters)
        layers[f"relu{number}"] = nn.ReLU()
        layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["flatten"] = nn.Flatten()
    layers["fc4"] = nn.Linear(64 * _CELLS * _CELLS, 1024)
    layers["relu4"] = nn.ReLU()
    layers["classes"] = nn.Linear(1024, outputs)
    return nn.Sequential(layers)


def without_norms(network: nn.Sequential) -> nn.Sequential:
    """Melt each batch normalisation into the convolution before it.

    Args:
        network: a sequential network in eval mode; left as it is.

    Returns:
        A new network with equal outputs up to rounding, in eval mode; layers keep their names.

    Raises:
        InputTypeError: a batch normalisation that does not follow a convolution.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    last = ""
    for name, layer in network.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            before = layers.get(last)
            if not isinstance(before, nn.Conv2d):
                raise InputTypeError(
                    expected(
                        f"a convolution before {name}",
                        "nothing" if before is None else type(before).__name__,
                        "Melt norms only where they follow a convolution",
                    )
                )
            layers[last] = fuse_conv_bn_eval(before.eval(), layer.eval())
        else:
            layers[name], last = layer, name
    return nn.Sequential(layers).eval()


FLOWER_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "flower-demo": flower_network,
    "flower-net": benchmark_network,
}
