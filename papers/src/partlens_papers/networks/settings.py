"""The networks the explainer papers studied, and where they were tapped: layer names, targets and eta.

A network is recognised by its layers, not by the name under which it was loaded, so that a fine-tuned copy, a narrower
head or a module built by hand gets the same setting.

Source: ICLR 2020 submission "Quantitatively Disentangling and Understanding Part Information in CNNs", Sec. 4 and
App. A; arXiv 1805.07468. VGG-M and VGG-S are those of Chatfield et al., BMVC 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from partlens.errors import InputTypeError, expected
from partlens.network.performer import Performer
from partlens_papers.networks.paper_networks import PaperNet

ETA_SHALLOW = 1.0e6
ETA_DEEP = 1.5e5

_HEAD = ("relu6", "relu7")
_OUTSIDE = "not among the papers' networks; read as their ResNet-101 and ResNet-152"
_READING = (
    "the published text names the last residual block as input and as target; read so that all sizes agree: the "
    "targets are the last two blocks, the tap is the block before them"
)


@dataclass(frozen=True)
class PaperSetting:
    """Where the papers tap a network, what they reconstruct, and how much p weighs.

    Attributes:
        network: the network's name here.
        tap: layer whose maps are explained, as :func:`partlens.network.taps.list_layers` names it.
        targets: the two layers that are reconstructed, in execution order.
        eta: weight of ``-log p``: 1.0e6 for AlexNet, VGG-M and VGG-S, 1.5e5 for VGG-16 and ResNets.
        side_cells: rows (and columns) of the tap's maps at ``input_px``.
        input_px: side of the papers' square input.
        note: what a reader must know of the choice; empty where the papers say all.
    """

    network: str
    tap: str
    targets: tuple[str, str]
    eta: float
    side_cells: int
    input_px: int
    note: str = ""


_SETTINGS = {
    setting.network: setting
    for setting in (
        PaperSetting("alexnet-caffe", "relu4", _HEAD, ETA_SHALLOW, 13, 227),
        PaperSetting("vgg-m", "relu4", _HEAD, ETA_SHALLOW, 13, 224),
        PaperSetting("vgg-s", "relu4", _HEAD, ETA_SHALLOW, 17, 224),
        PaperSetting("vgg16", "features.27", ("classifier.1", "classifier.4"), ETA_DEEP, 14, 224),
        PaperSetting("resnet18", "layer3", ("layer4.0", "layer4.1"), ETA_DEEP, 14, 224, f"{_OUTSIDE}; {_READING}"),
        PaperSetting("resnet34", "layer4.0", ("layer4.1", "layer4.2"), ETA_DEEP, 7, 224, f"{_OUTSIDE}; {_READING}"),
        PaperSetting("resnet50", "layer4.0", ("layer4.1", "layer4.2"), ETA_DEEP, 7, 224, f"{_OUTSIDE}; {_READING}"),
        PaperSetting("resnet101", "layer4.0", ("layer4.1", "layer4.2"), ETA_DEEP, 7, 224, _READING),
        PaperSetting("resnet152", "layer4.0", ("layer4.1", "layer4.2"), ETA_DEEP, 7, 224, _READING),
    )
}

_VGG16_FILTERS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pooling
_RESNETS = {
    (2, (2, 2, 2, 2)): "resnet18",
    (2, (3, 4, 6, 3)): "resnet34",
    (3, (3, 4, 6, 3)): "resnet50",
    (3, (3, 4, 23, 3)): "resnet101",
    (3, (3, 8, 36, 3)): "resnet152",
}
_SHORTCUTS_AND_RATES = frozenset({"downsample", "drop_path"})


def _convolution(layer: nn.Module | None) -> tuple[int, ...] | None:
    """Filters, kernel side, stride, padding and groups of a square convolution."""
    if not isinstance(layer, nn.Conv2d) or isinstance(layer.padding, str):
        return None
    return layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0], layer.groups


def _caffe_named(children: dict[str, nn.Module]) -> str | None:
    """Recognise AlexNet, VGG-M and VGG-S by their five convolutions and Caffe's layer names."""
    if not {"relu4", "pool5", "fc6", "fc7", "fc8", *_HEAD} <= children.keys():
        return None
    own = [_convolution(children.get(f"conv{number}")) for number in range(1, 6)]
    for name in ("alexnet-caffe", "vgg-m", "vgg-s"):
        if own == list(PaperNet.convolutions(name)):
            return name
    return None


def _vgg16(children: dict[str, nn.Module]) -> str | None:
    """Recognise torchvision's VGG-16 without batch normalisation; the width of its fully connected layers is free."""
    features, classifier = children.get("features"), children.get("classifier")
    if not isinstance(features, nn.Sequential) or not isinstance(classifier, nn.Sequential):
        return None
    layers: list[tuple[type[nn.Module], int]] = []
    for filters in _VGG16_FILTERS:
        layers += [(nn.Conv2d, filters), (nn.ReLU, 0)] if filters else [(nn.MaxPool2d, 0)]
    if len(features) != len(layers):
        return None
    for layer, (kind, filters) in zip(features, layers, strict=True):
        if not isinstance(layer, kind) or (filters and _convolution(layer) != (filters, 3, 1, 1, 1)):
            return None
    kinds = [type(layer) for layer in classifier]
    return "vgg16" if kinds[:2] == [nn.Linear, nn.ReLU] and kinds[3:5] == [nn.Linear, nn.ReLU] else None


def _resnet(children: dict[str, nn.Module]) -> str | None:
    """Recognise plain ResNets (torchvision's, timm's): no groups, no wide blocks, nothing between the layers."""
    stages = [children.get(f"layer{number}") for number in range(1, 5)]
    if _convolution(children.get("conv1")) != (64, 7, 2, 3, 1) or "fc" not in children:
        return None
    if not all(isinstance(stage, nn.Sequential) and len(stage) for stage in stages):
        return None
    depths: list[int] = []
    blocks: list[nn.Module] = []
    for width, stage in zip((64, 128, 256, 512), stages, strict=True):
        assert isinstance(stage, nn.Sequential)
        depths.append(len(stage))
        blocks.extend(stage)
        first = _convolution(dict(stage[0].named_children()).get("conv1"))
        if first is None or first[0] != width:
            return None
    counts: set[int] = set()
    for block in blocks:
        parts = dict(block.named_children())
        convolutions = [layer for layer in parts.values() if isinstance(layer, nn.Conv2d)]
        known = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Identity)
        extra = [n for n, layer in parts.items() if not isinstance(layer, known) and n not in _SHORTCUTS_AND_RATES]
        if extra or any(layer.groups != 1 for layer in convolutions):
            return None
        counts.add(len(convolutions))
    return _RESNETS.get((counts.pop(), (depths[0], depths[1], depths[2], depths[3]))) if len(counts) == 1 else None


def _named(spec: str) -> str | None:
    """Read the network's name from ``torchvision:vgg16@FILE``, ``partlens_papers.performers:vgg_m`` or ``vgg-m``."""
    source, colon, rest = spec.partition("@")[0].rpartition(":")
    name = rest.replace("_", "-")
    if not colon:
        return name if name in _SETTINGS else None
    owner = "partlens_papers.performers" if name in {"alexnet-caffe", "vgg-m", "vgg-s"} else "torchvision"
    return name if name in _SETTINGS and source == owner else None


def _recognised(module: nn.Module) -> str | None:
    children = dict(module.named_children())
    return _caffe_named(children) or _vgg16(children) or _resnet(children)


def paper_setting(performer: Performer | nn.Module | str) -> PaperSetting | None:
    """Say where the papers tap a network.

    Args:
        performer: a performer, a network, or a name such as ``vgg-m`` or ``torchvision:vgg16@weights.safetensors``. A
            performer or network is recognised by its layers alone: the width of the fully connected layers, the number
            of outputs and the input's size are free.

    Returns:
        The setting, ``None`` for a network that the papers did not study. ResNet-18, 34 and 50 are given as the papers'
        deeper ones would be; ``note`` says so. ``side_cells`` holds at ``input_px``.

    Raises:
        InputTypeError: neither a name nor a readable network.

    Source:
        ICLR 2020 submission, Sec. 4 (taps and eta); the taps of ResNets are our reading, see ``note``.

    Example:
        >>> setting = paper_setting("vgg-s")
        >>> setting.tap, setting.targets, setting.side_cells
        ('relu4', ('relu6', 'relu7'), 17)
        >>> paper_setting("torchvision:googlenet") is None
        True
    """
    name = _named(performer) if isinstance(performer, str) else _recognised(_layers_of(performer))
    return None if name is None else _SETTINGS[name]


def _layers_of(performer: Performer | nn.Module) -> nn.Module:
    """Return the network; its layers alone are asked for, so weights without values do as well."""
    module = performer.module if isinstance(performer, (Performer, nn.DataParallel)) else performer
    if not isinstance(module, nn.Module):
        raise InputTypeError(expected("a network or its name", type(module).__name__, "Pass a performer or a module"))
    return module


@dataclass(frozen=True)
class PublishedChoice:
    """What is tapped and reconstructed under the papers' preset, and what they say for this network.

    Attributes:
        tap: layer, ``None`` for the network's default.
        targets: layers, ``None`` for those after the tap.
        eta: the papers' weight of ``-log p`` for this network; ``None`` where they did not study it.
        note: what a reader must know; empty where the papers say all.
    """

    tap: str | None
    targets: tuple[str, ...] | None
    eta: float | None
    note: str


def as_published(performer: Performer, tap: str | None, targets: Sequence[str] | None) -> PublishedChoice:
    """Choose tap, targets and eta as the papers did; what is named comes first.

    Args:
        performer: the network.
        tap: named by the user, or ``None``.
        targets: named by the user, or ``None``.
    """
    named = None if targets is None else tuple(targets)
    setting = paper_setting(performer)
    if setting is None:
        return PublishedChoice(tap, named, None, "the papers did not study this network; its default tap is used")
    if tap is not None and tap != setting.tap:
        return PublishedChoice(tap, named, setting.eta, f"the papers tap {setting.tap}")
    return PublishedChoice(setting.tap, named or setting.targets, setting.eta, setting.note)
