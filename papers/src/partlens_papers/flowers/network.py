"""The flower benchmark's network, of the papers' size."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from partlens.errors import InputTypeError, expected
from partlens.network.fitting import flower_preprocessing
from partlens.network.performer import Performer, weights_sha256
from partlens.network.preprocessing import Preprocessing
from partlens.network.weights import load_into, read_weights, seed_of, seeded
from partlens.network.zoo import class_names_of, own_weights

_CELLS = 7
_SPEC = "partlens_papers.performers:flower_net"


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


def flower_net(weights: str | None = None) -> Performer:
    """Return the benchmark's performer with weights from a file, or ``random:SEED``."""
    weights = own_weights(_SPEC, weights)
    if weights.startswith("random:"):
        seed = seed_of(weights, _SPEC)
        module, preprocessing, names = seeded(lambda: benchmark_network(6), seed), flower_preprocessing(), None
        notes: tuple[str, ...] = (f"random weights, seed {seed}",)
    else:
        state, metadata = read_weights(Path(weights))
        outputs, notes = int(state["classes.bias"].shape[0]) if "classes.bias" in state else 6, ()
        module = seeded(lambda: benchmark_network(outputs), 0)
        load_into(module, state, Path(weights).name)
        preprocessing = Preprocessing.from_metadata(metadata) or flower_preprocessing()
        names = class_names_of(metadata, outputs, Path(weights).name)
    module.eval()
    return Performer(module, "flower-net", preprocessing, weights_sha256(module), class_names=names, notes=notes)
