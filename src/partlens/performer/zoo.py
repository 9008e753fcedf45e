"""Performers by name: networks, their weights and the preprocessing that belongs to them.

A performer is written as one string:

========================================  ===========================================================
``torchvision:resnet18``                  torchvision's network with its default weights
``torchvision:vgg16@IMAGENET1K_V1``       the same with a named set of weights
``torchvision:resnet18@my.safetensors``   weights from a file (``.safetensors``, ``.pt``, ``.pth``)
``torchvision:resnet18@random:0``         random weights from seed 0; for tests and null models
``timm:convnext_tiny``                    timm's network (extra ``zoo``)
``partlens:alexnet-caffe@my.safetensors`` one of the papers' networks defined here
``partlens:flower-net@my.safetensors``    the flower benchmark's network; ``flower-demo`` is the demo's
``package.module:factory``                your own callable that returns a module or a `Performer`
========================================  ===========================================================

Pixel coordinates are continuous throughout: pixel ``i`` covers ``[i, i + 1)`` and its middle is ``i + 0.5``.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import json
import math
import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from partlens.performer.flower_network import FLOWER_NETWORKS, flower_preprocessing
from partlens.vocabulary import InputError, InputTypeError, LayerError, WeightsError, expected, listed, nearest

Resize = Literal["squash", "crop"]
ChannelOrder = Literal["RGB", "BGR"]
Interpolation = Literal["bilinear", "bicubic"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
OUTPUT_LAYER = "output_layer"
"""Entry of a safetensors header: which layer was replaced to change the number of outputs."""

_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_CAFFE_MEAN_BGR = (104.0, 117.0, 123.0)
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the network's input.

    The value at a pixel of channel ``c`` is ``(scale · v - mean[c]) / std[c]`` with ``v`` in 0-255.

    Args:
        size_px: rows and columns of the input.
        resize: ``"squash"`` stretches the whole image to ``size_px`` (the explainer papers do this with
            object crops); ``"crop"`` scales the shorter side to ``resize_px`` and takes the middle.
        resize_px: shorter side before the crop, in pixels; ``None`` with ``"squash"``, where it is not used.
        channel_order: order of the channels of the input; ``mean`` and ``std`` stand in this order, so that
            Caffe's ``104 117 123`` are blue, green, red.
        scale: factor on the byte values, 1/255 or 1.
        mean: per channel, after scaling.
        std: per channel, after scaling; above 0.
        interpolation: Pillow's filter, which smooths when it shrinks.

    Raises:
        InputError: a size below 1, a ``std`` of 0, or a ``resize_px`` that is missing or smaller than the
            crop.

    Example:
        >>> prepare = Preprocessing(size_px=(8, 8), resize="squash")
        >>> tuple(prepare([Image.new("RGB", (20, 10))]).shape)
        (1, 3, 8, 8)
        >>> prepare.to_input_px((10, 5), image_size=(20, 10)).tolist()
        [4.0, 4.0]
    """

    size_px: tuple[int, int] = (224, 224)
    resize: Resize = "crop"
    resize_px: int | None = None
    channel_order: ChannelOrder = "RGB"
    scale: float = 1 / 255
    mean: tuple[float, float, float] = _IMAGENET_MEAN
    std: tuple[float, float, float] = _IMAGENET_STD
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if len(self.size_px) != 2 or min(self.size_px) < 1:
            raise InputError(expected("size_px as (rows, columns) of at least 1", self.size_px, "Correct the size"))
        for name, value, options in (
            ("resize", self.resize, ("squash", "crop")),
            ("channel_order", self.channel_order, ("RGB", "BGR")),
            ("interpolation", self.interpolation, tuple(_FILTERS)),
        ):
            if value not in options:
                raise InputError(expected(f"{name} to be one of {', '.join(options)}", value, f"Choose {options[0]}"))
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise InputError(
                expected(
                    "three means and three positive standard deviations",
                    f"mean {self.mean}, std {self.std}",
                    "Give one value per channel",
                )
            )
        if self.resize == "crop" and self.resize_px is None:
            object.__setattr__(self, "resize_px", max(self.size_px))
        if self.resize == "crop" and cast("int", self.resize_px) < max(self.size_px):
            raise InputError(
                expected(
                    f"resize_px of at least {max(self.size_px)} px, the crop's longer side",
                    self.resize_px,
                    "Raise resize_px or choose resize squash",
                )
            )

    def _scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after scaling, before the crop (torchvision's rounding)."""
        rows, cols = self.size_px
        if self.resize == "squash":
            return cols, rows
        short = cast("int", self.resize_px)
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short

    def box_in_input(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Say where the whole original image lies in the input's coordinates.

        Args:
            width: of the original image, pixels.
            height: of the original image, pixels.

        Returns:
            ``x0, y0, x1, y1`` in input pixels; what was cropped away lies outside the input (``x0`` below 0).

        Raises:
            InputError: a side below 1 pixel.
        """
        if width < 1 or height < 1:
            raise InputError(expected("an image of at least 1x1 px", f"{width}x{height}", "Check the image file"))
        rows, cols = self.size_px
        wide, high = self._scaled_size(width, height)
        left, top = round((wide - cols) / 2.0), round((high - rows) / 2.0)
        return float(-left), float(-top), float(wide - left), float(high - top)

    def to_input_px(self, xy: Any, image_size: tuple[int, int]) -> np.ndarray:
        """Map points of the original image to the input.

        Args:
            xy: points ``[..., 2]`` as (x, y) in continuous pixels of the original image.
            image_size: width and height of the original image.

        Returns:
            Float64 array ``[..., 2]`` in input pixels.
        """
        x0, y0, x1, y1 = self.box_in_input(*image_size)
        factor = np.array([(x1 - x0) / image_size[0], (y1 - y0) / image_size[1]])
        mapped: np.ndarray = np.asarray(xy, dtype=np.float64) * factor + np.array([x0, y0])
        return mapped

    def to_image_px(self, xy: Any, image_size: tuple[int, int]) -> np.ndarray:
        """Map points of the input back to the original image: the inverse of `to_input_px`.

        Args:
            xy: points ``[..., 2]`` as (x, y) in continuous pixels of the input.
            image_size: width and height of the original image.

        Returns:
            Float64 array ``[..., 2]`` in pixels of the original image.
        """
        x0, y0, x1, y1 = self.box_in_input(*image_size)
        factor = np.array([(x1 - x0) / image_size[0], (y1 - y0) / image_size[1]])
        mapped: np.ndarray = (np.asarray(xy, dtype=np.float64) - np.array([x0, y0])) / factor
        return mapped

    def frame(self, image: Image.Image) -> Image.Image:
        """Return what the network sees of an image, as an RGB image of the input's size."""
        rows, cols = self.size_px
        scaled = image.convert("RGB").resize(self._scaled_size(*image.size), _FILTERS[self.interpolation])
        x0, y0, _, _ = self.box_in_input(*image.size)
        left, top = int(-x0), int(-y0)
        return scaled.crop((left, top, left + cols, top + rows))

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "image 3 row col"]:
        """Turn images into one float32 batch on the CPU.

        Args:
            images: Pillow images of any mode and size.

        Returns:
            Batch in the order of ``images``; an empty sequence gives a batch of length 0.
        """
        rows, cols = self.size_px
        batch = np.empty((len(images), rows, cols, 3), dtype=np.float32)
        for index, image in enumerate(images):
            batch[index] = np.asarray(self.frame(image), dtype=np.float32)
        return self._normalised(batch)

    def of_bytes(self, frames: UInt8[Tensor, "image row col 3"]) -> Float[Tensor, "image 3 row col"]:
        """Turn what `frame` gave, kept as bytes, into a float32 batch on the CPU.

        Args:
            frames: RGB, of the input's size.

        Returns:
            The same batch, bit for bit, as calling this object with the images.
        """
        return self._normalised(frames.numpy().astype(np.float32))

    def _normalised(self, batch: np.ndarray) -> Tensor:
        """Scale and centre float32 RGB values ``[image, row, col, 3]``, in place."""
        if self.channel_order == "BGR":
            batch = batch[..., ::-1]
        batch *= np.float32(self.scale)
        batch -= np.array(self.mean, dtype=np.float32)
        batch /= np.array(self.std, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a manifest; `from_dict` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Preprocessing:
        """Build from plain values.

        Raises:
            InputError: a field that does not exist, or a value that is not allowed.

        Example:
            >>> Preprocessing.from_dict(Preprocessing().to_dict()) == Preprocessing()
            True
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(content) - known):
            raise InputError(
                expected(
                    f"preprocessing fields among {', '.join(sorted(known))}",
                    listed(unknown),
                    "Remove the others",
                )
            )
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**values)

    def to_metadata(self) -> dict[str, str]:
        """Return the entries of a safetensors header that `from_metadata` reads back.

        Raises:
            InputError: a ``scale`` other than 1 and 1/255, which the header has no words for.

        Example:
            >>> Preprocessing.from_metadata(Preprocessing().to_metadata()) == Preprocessing()
            True
        """
        spans = {1.0: "0-255", 1 / 255: "0-1"}
        if self.scale not in spans:
            raise InputError(expected("a scale of 1 or 1/255", self.scale, "Move the factor into mean and std"))
        mean, std = (" ".join(repr(float(value)) for value in values) for values in (self.mean, self.std))
        crop = f", crop {self.resize_px}" if self.resize == "crop" else ""
        shrunk = "" if self.interpolation == "bilinear" else f", {self.interpolation}"
        return {
            "input": f"{self.channel_order}, {spans[self.scale]}, mean {mean}, std {std}{crop}{shrunk}",
            "input_size": f"{self.size_px[0]}x{self.size_px[1]}",
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing | None:
        """Read the ``input`` and ``input_size`` entries of a safetensors header.

        Args:
            metadata: the header, e.g. ``{"input": "BGR, 0-255, mean 104 117 123, std 1", "input_size":
                "227x227"}``.

        Returns:
            The preprocessing, ``None`` without ``input``. A header that names a size alone gets the whole image
            squashed to it, so that an image of that size goes in as it is and nothing of an object's crop is cut
            away; ``crop 256`` in the header asks for torchvision's way instead (shorter side 256, centre crop).

        Raises:
            WeightsError: the entry is there but cannot be understood.
        """
        text = metadata.get("input")
        if text is None:
            return None
        sizes = re.search(r"(\d+)\s*x\s*(\d+)", metadata.get("input_size", "")) or re.search(r"(\d+)\s*x\s*(\d+)", text)
        order = re.search(r"\b(RGB|BGR)\b", text)
        span = re.search(r"\b0-(1|255)\b", text)
        crop = re.search(r"\bcrop (\d+)\b", text)
        mean, std = _numbers(text, "mean"), _numbers(text, "std")
        if order is None or span is None or mean is None:
            raise WeightsError(
                expected(
                    'metadata such as "RGB, 0-1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, 224x224"',
                    text,
                    "Correct the header or give the preprocessing yourself",
                )
            )
        size = (int(sizes[1]), int(sizes[2])) if sizes else (224, 224)
        unit = span[1] == "1"
        return cls(
            size_px=size,
            resize="squash" if crop is None else "crop",
            resize_px=None if crop is None else int(crop[1]),
            channel_order=cast("ChannelOrder", order[1]),
            scale=1 / 255 if unit else 1.0,
            mean=mean,
            std=std or (1.0, 1.0, 1.0),
            interpolation="bicubic" if re.search(r"\bbicubic\b", text) else "bilinear",
        )


def _numbers(text: str, word: str) -> tuple[float, float, float] | None:
    """Read one or three numbers after a word."""
    found = re.search(rf"\b{word}((?:\s+[-+.\deE]+)+)", text)
    if found is None:
        return None
    values = [float(v) for v in found[1].split()]
    if len(values) == 1:
        values *= 3
    return (values[0], values[1], values[2]) if len(values) == 3 else None


@dataclass(frozen=True)
class Performer:
    """The network under study with all that belongs to it.

    Args:
        module: the network; partlens borrows it and never changes it.
        name: how reports call it.
        preprocessing: how images become its input.
        weights_sha256: hash of its weights and buffers (`weights_sha256`).
        default_tap: the layer to explain when none is named; ``None`` lets
            `partlens.performer.taps.default_tap` choose.
        class_names: names of its outputs, where known.
        notes: what a reader of results must know, such as layers without trained weights.
        untrained_layers: layers that the weights file lacks and that stand at their random start.
    """

    module: nn.Module
    name: str
    preprocessing: Preprocessing
    weights_sha256: str
    default_tap: str | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    untrained_layers: tuple[str, ...] = ()


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, its kind where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the network inside ``DataParallel`` wrappers, after refusing compiled ones.

    Raises:
        InputTypeError: not a module, a TorchScript module, or one compiled by ``torch.compile``.
    """
    if not isinstance(module, nn.Module):
        raise InputTypeError(
            expected("a torch.nn.Module", type(module).__name__, "Pass the network itself, or its name as a string")
        )
    while isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        module = module.module
    if isinstance(module, torch.jit.ScriptModule):
        raise InputTypeError(
            expected(
                "a network in Python, whose layers can be read",
                f"a TorchScript module ({type(module).__name__})",
                "Pass the original module that was scripted or traced",
            )
        )
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        raise InputTypeError(
            expected(
                "a network whose layers can be read",
                f"one compiled by torch.compile ({type(module).__name__})",
                "Pass the original module (module._orig_mod)",
            )
        )
    return module


def module_of(performer: Performer | nn.Module) -> nn.Module:
    """Return the readable network of a performer, or of a module that is passed as such.

    Raises:
        InputTypeError: neither, or a compiled network.
    """
    return unwrapped(performer.module if isinstance(performer, Performer) else performer)


def weights_sha256(module: nn.Module) -> str:
    """Hash a network's weights and buffers.

    Args:
        module: any network; wrappers such as ``DataParallel`` do not change the hash, nor does the device.

    Returns:
        64 hexadecimal digits over names, types, shapes and bytes, in the order of the state dict.

    Example:
        >>> a = nn.Linear(2, 2)
        >>> weights_sha256(a) == weights_sha256(copy.deepcopy(a))
        True
    """
    digest = hashlib.sha256()
    for name, value in unwrapped(module).state_dict().items():
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()


# The papers' networks


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


_PLANS = {
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
        if net not in _PLANS:
            raise InputError(
                expected(
                    f"one of {', '.join(_PLANS)}",
                    net,
                    f"Did you mean {nearest(net, _PLANS, 1)[0]}?".rstrip("?"),
                )
            )
        plan = _PLANS[net]
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
        return tuple((c.filters, c.kernel, c.stride, c.padding, c.groups) for c in _PLANS[net].convs)

    def forward(self, x: Float[Tensor, "image 3 row col"]) -> Float[Tensor, "image output"]:
        """Score a batch of inputs."""
        for name, layer in self.named_children():
            x = layer(torch.flatten(x, 1) if name == "fc6" else x)
        return x


# Weights


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a weights file: float32 tensors by name and the header, without running code from the file."""
    if not path.is_file():
        raise WeightsError(expected(f"a weights file {path}", "nothing there", "Check the path after @"))
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as handle:
                metadata = dict(handle.metadata() or {})
                content: Any = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise WeightsError(
                expected(f"safetensors in {path.name}", str(error), "Download or convert the file again")
            ) from error
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise WeightsError(
                expected(
                    f"only tensors in {path.name}",
                    "a pickle that would run code when opened, or that is damaged",
                    "Convert its state dict to safetensors where you trust the file: "
                    "safetensors.torch.save_file(module.state_dict(), 'weights.safetensors')",
                )
            ) from error
        except (RuntimeError, EOFError, ValueError, OSError) as error:
            raise WeightsError(
                expected(f"PyTorch weights in {path.name}", first_line(error), "Save the state dict again")
            ) from error
        for wrapper in ("state_dict", "model_state_dict", "model"):
            if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            expected(
                f"a state dict (names and tensors) in {path.name}",
                type(content).__name__,
                "Save module.state_dict() as safetensors",
            )
        )
    weights = {str(name): value for name, value in content.items()}
    if weights and all(name.startswith("module.") for name in weights):  # saved from DataParallel
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return {n: v.float() if v.is_floating_point() else v for n, v in weights.items()}, metadata


def _check_finite(weights: Mapping[str, Tensor], where: str) -> None:
    """Refuse weights that are not numbers."""
    for name, value in weights.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = int((~torch.isfinite(value)).sum())
            raise WeightsError(
                expected(
                    f"finite weights in {where}",
                    f"{bad} NaN or infinite values in {name}",
                    "Use weights from a run that did not diverge",
                )
            )


def _load_into(
    module: nn.Module, weights: Mapping[str, Tensor], where: str, may_lack: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Fill a network strictly; return the names that were absent and allowed to be."""
    own = module.state_dict()
    # Batch counters are bookkeeping that old files lack; everything else must be there.
    missing = [n for n in own if n not in weights and not n.endswith("num_batches_tracked")]
    absent = tuple(n for n in missing if n.startswith(may_lack)) if may_lack else ()
    missing = [n for n in missing if n not in absent]
    surplus = [n for n in weights if n not in own]
    if missing or surplus:
        parts = ([f"missing {listed(missing, 4)}"] if missing else []) + (
            [f"unexpected {listed(surplus, 4)}"] if surplus else []
        )
        raise WeightsError(
            expected(
                f"the {len(own)} tensors of {type(module).__name__} in {where}",
                "; ".join(parts),
                "Give the weights of this network, or rename them to its layer names",
            )
        )
    for name, value in weights.items():
        if value.shape != own[name].shape:
            raise WeightsError(
                expected(
                    f"{name} of shape {tuple(own[name].shape)} in {where}",
                    str(tuple(value.shape)),
                    "Give the weights of this network",
                )
            )
    _check_finite(weights, where)
    module.load_state_dict(dict(weights), strict=False)
    return absent


def with_outputs(module: nn.Module, layer: str, outputs: int) -> None:
    """Put a new last layer with another number of outputs into a network, in place.

    Args:
        module: the network, changed.
        layer: its last layer with weights, by name: a linear layer or a convolution.
        outputs: of the new layer, whose weights stand at torch's random start.

    Raises:
        LayerError: the layer is missing or of another kind.
    """
    owner, _, name = layer.rpartition(".")
    old = dict(module.named_modules()).get(layer)
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = nn.Linear(old.in_features, outputs, bias=old.bias is not None)
    elif isinstance(old, nn.Conv2d) and old.groups == 1 and not isinstance(old.padding, str):
        new = nn.Conv2d(
            old.in_channels,
            outputs,
            cast("tuple[int, int]", old.kernel_size),
            cast("tuple[int, int]", old.stride),
            cast("tuple[int, int]", old.padding),
            cast("tuple[int, int]", old.dilation),
            bias=old.bias is not None,
        )
    else:
        got = "none of that name" if old is None else type(old).__name__
        raise LayerError(
            expected(f"{layer} to be a linear layer or a convolution without groups", got, "Use another network")
        )
    new.to(device=old.weight.device, dtype=old.weight.dtype).train(old.training)
    setattr(module.get_submodule(owner), name, new)


def _output_count(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int | None:
    """Number of classes in a file whose only difference is the size of the last layer."""
    different = [n for n, v in weights.items() if n in own and own[n].shape != v.shape]
    owners = {n.rpartition(".")[0] for n in different}
    if len(owners) != 1 or not different:
        return None
    shapes = {weights[n].shape[0] for n in different if weights[n].ndim}
    return shapes.pop() if len(shapes) == 1 else None


def _seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a network from a seed, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build()


def _seed_of(weights: str, spec: str) -> int:
    """Read SEED of ``random:SEED``."""
    text = weights.partition(":")[2]
    if not text.isdigit():
        raise InputError(expected("a seed such as random:0", spec, "Write a whole number after random:"))
    return int(text)


def _is_file(weights: str) -> bool:
    return "/" in weights or "\\" in weights or weights.lower().endswith(_FILE_SUFFIXES)


def _no_download(name: str, error: Exception) -> WeightsError:
    return WeightsError(
        expected(
            f"to download the weights of {name}",
            f"{type(error).__name__}: {first_line(error)}",
            f"Fetch them on a connected machine and give {name.partition('@')[0]}@weights.safetensors",
        )
    )


def _number_in(value: Any, default: int) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value) if value is not None else default


def _torchvision_preprocessing(weights: Any) -> Preprocessing:
    """Read torchvision's ``ImageClassification`` preset."""
    preset = weights.transforms()
    crop = _number_in(getattr(preset, "crop_size", None), 224)
    name = getattr(getattr(preset, "interpolation", None), "value", "bilinear")
    return Preprocessing(
        size_px=(crop, crop),
        resize="crop",
        resize_px=max(_number_in(getattr(preset, "resize_size", None), 256), crop),
        mean=_three(getattr(preset, "mean", _IMAGENET_MEAN)),
        std=_three(getattr(preset, "std", _IMAGENET_STD)),
        interpolation="bicubic" if name == "bicubic" else "bilinear",
    )


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


@dataclass
class _Loaded:
    module: nn.Module
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    untrained_layers: tuple[str, ...] = ()


def _load_torchvision(name: str, weights: str | None, spec: str) -> _Loaded:
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise InputError(
            expected("the name of a torchvision classifier", name, f"Nearest: {', '.join(nearest(name, names))}")
        )
    enum = torchvision.models.get_model_weights(name)
    default = getattr(enum, "DEFAULT", None)
    preprocessing = _torchvision_preprocessing(default) if default is not None else Preprocessing(resize_px=256)
    classes = tuple(default.meta["categories"]) if default is not None and "categories" in default.meta else None

    def build(**options: Any) -> nn.Module:
        if name in {"googlenet", "inception_v3"}:
            options = {"init_weights": False, "aux_logits": False, **options}
        return cast("nn.Module", torchvision.models.get_model(name, weights=None, **options))

    if weights is not None and weights.startswith("random:"):
        seed = _seed_of(weights, spec)
        return _Loaded(_seeded(build, seed), preprocessing, None, (f"random weights, seed {seed}",))
    if weights is None or not _is_file(weights):
        chosen = default
        if weights is not None and weights != "DEFAULT":
            members = list(enum.__members__)
            if weights not in members:
                raise InputError(
                    expected(
                        f"weights of {name} among {', '.join(members)}",
                        weights,
                        "Choose one, or give the path of a file",
                    )
                )
            chosen = enum[weights]
        if chosen is None:
            raise WeightsError(
                expected(f"published weights of {name}", "none", f"Give a file: {name}@weights.safetensors")
            )
        try:
            module = torchvision.models.get_model(name, weights=chosen, progress=False)
        except (OSError, RuntimeError) as error:
            raise _no_download(spec, error) from error
        return _Loaded(module, _torchvision_preprocessing(chosen), tuple(chosen.meta.get("categories", ())) or None)
    state, metadata = _read_weights(Path(weights))
    options: dict[str, Any] = {}
    if name in {"googlenet", "inception_v3"} and any(n.startswith(("aux", "AuxLogits")) for n in state):
        options["aux_logits"] = True
    module = _seeded(lambda: build(**options), 0)
    if (outputs := _output_count(module.state_dict(), state)) is not None:
        module = _seeded(lambda: build(num_classes=outputs, **options), 0)
    _load_into(module, state, Path(weights).name)
    preprocessing = Preprocessing.from_metadata(metadata) or preprocessing
    if (named := _class_names(metadata, outputs, Path(weights).name)) is not None:
        return _Loaded(module, preprocessing, named)
    return _Loaded(
        module,
        preprocessing,
        classes if outputs is None else None,
        ("class names assumed to be torchvision's ImageNet list",) if outputs is None and classes else (),
    )


def _load_timm(name: str, weights: str | None, spec: str) -> _Loaded:
    try:
        import timm
        import timm.data
    except ImportError as error:
        raise InputError(
            expected("the package timm for this performer", "not installed", "Run: pip install 'partlens[zoo]'")
        ) from error
    if not timm.is_model(name.partition(".")[0]):
        raise InputError(
            expected("the name of a timm network", name, f"Nearest: {', '.join(nearest(name, timm.list_models()))}")
        )
    metadata: dict[str, str] = {}
    outputs: int | None = None
    notes: tuple[str, ...] = ()
    if weights is not None and weights.startswith("random:"):
        seed = _seed_of(weights, spec)
        module = _seeded(lambda: cast("nn.Module", timm.create_model(name, pretrained=False)), seed)
        notes = (f"random weights, seed {seed}",)
    elif weights is not None and _is_file(weights):
        state, metadata = _read_weights(Path(weights))
        module = _seeded(lambda: cast("nn.Module", timm.create_model(name, pretrained=False)), 0)
        if (outputs := _output_count(module.state_dict(), state)) is not None:
            module = _seeded(lambda: cast("nn.Module", timm.create_model(name, num_classes=outputs)), 0)
        _load_into(module, state, Path(weights).name)
    else:
        full = name if weights in {None, "DEFAULT"} else f"{name}.{weights}"
        try:
            module = timm.create_model(full, pretrained=True)
        except Exception as error:  # the hub's client has its own error types
            raise _no_download(spec, error) from error
    config = timm.data.resolve_model_data_config(module)
    rows, cols = (int(v) for v in config["input_size"][1:])
    preprocessing = Preprocessing.from_metadata(metadata) or Preprocessing(
        size_px=(rows, cols),
        resize="crop",
        resize_px=max(rows, cols, math.floor(max(rows, cols) / float(config.get("crop_pct") or 1.0))),
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        interpolation="bicubic" if config.get("interpolation") == "bicubic" else "bilinear",
    )
    return _Loaded(module, preprocessing, _class_names(metadata, outputs, str(weights)), notes)


def _own_weights(name: str, weights: str | None) -> str:
    """Insist on a file or a seed for a network of ours."""
    if weights is None or not (weights.startswith("random:") or _is_file(weights)):
        raise WeightsError(
            expected(
                f"a weights file for partlens:{name}",
                weights or "none",
                f"Write partlens:{name}@weights.safetensors, or @random:0 for random weights",
            )
        )
    return weights


def _load_flower_network(name: str, weights: str | None, spec: str) -> _Loaded:
    """Load the demo's or the flower benchmark's network; classes and input stand in the file's header."""
    build = FLOWER_NETWORKS[name]
    weights = _own_weights(name, weights)
    if weights.startswith("random:"):
        seed = _seed_of(weights, spec)
        module = _seeded(lambda: build(6), seed)
        return _Loaded(module, flower_preprocessing(), None, (f"random weights, seed {seed}",))
    state, metadata = _read_weights(Path(weights))
    outputs = int(state["classes.bias"].shape[0]) if "classes.bias" in state else 6
    module = _seeded(lambda: build(outputs), 0)
    _load_into(module, state, Path(weights).name)
    preprocessing = Preprocessing.from_metadata(metadata) or flower_preprocessing()
    return _Loaded(module, preprocessing, _class_names(metadata, outputs, Path(weights).name))


def _class_names(metadata: Mapping[str, str], outputs: int | None, where: str) -> tuple[str, ...] | None:
    """Read ``class_names`` of a header, a JSON list with one name per output (``None``: as many as the network has)."""
    text = metadata.get("class_names")
    if text is None:
        return None
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = None
    listed_names = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not listed_names or (outputs is not None and len(names) != outputs):
        count = "" if outputs is None else f"{outputs} "
        raise WeightsError(
            expected(f"{count}class names as a JSON list in the header of {where}", text, "Correct the header")
        )
    return tuple(names)


def _load_own(name: str, weights: str | None, spec: str) -> _Loaded:
    known = (*_PLANS, *FLOWER_NETWORKS)
    if name not in known:
        raise InputError(
            expected(
                f"partlens: followed by one of {', '.join(known)}",
                name,
                f"Nearest: {nearest(name, known, 1)[0]}",
            )
        )
    if name in FLOWER_NETWORKS:
        return _load_flower_network(name, weights, spec)
    size = _PLANS[name].input_px
    preprocessing = Preprocessing(
        size_px=(size, size),
        resize="squash",
        channel_order="BGR",
        scale=1.0,
        mean=_CAFFE_MEAN_BGR,
        std=(1.0, 1.0, 1.0),
    )
    weights = _own_weights(name, weights)
    if weights.startswith("random:"):
        seed = _seed_of(weights, spec)
        return _Loaded(_seeded(lambda: PaperNet(name), seed), preprocessing, None, (f"random weights, seed {seed}",))
    state, metadata = _read_weights(Path(weights))
    preprocessing = Preprocessing.from_metadata(metadata) or preprocessing
    outputs = int(state["fc8.bias"].shape[0]) if "fc8.bias" in state else 1000
    hidden = int(state["fc6.bias"].shape[0]) if "fc6.bias" in state else 4096
    side = preprocessing.size_px[0]
    module = _seeded(lambda: PaperNet(name, num_classes=outputs, input_px=side, hidden=hidden), 0)
    may_lack = ("fc6.", "fc7.", "fc8.") if not any(n.startswith("fc") for n in state) else ()
    absent = _load_into(module, state, Path(weights).name, may_lack)
    if not absent:
        return _Loaded(module, preprocessing, _class_names(metadata, outputs, Path(weights).name))
    note = (
        "fc6, fc7 and fc8 are absent from the file and stand at their random start; train them (partlens "
        "train-performer)"
    )
    return _Loaded(module, preprocessing, None, (note,), ("fc6", "fc7", "fc8"))


def _load_factory(package: str, name: str, spec: str) -> nn.Module | Performer:
    try:
        found = getattr(importlib.import_module(package), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            expected(
                "torchvision:NAME, timm:NAME, partlens:NAME or package.module:factory",
                f"{spec} ({error})",
                "Check the spelling, and that Python can import the package (PYTHONPATH)",
            )
        ) from error
    made = found() if callable(found) and not isinstance(found, nn.Module) else found
    if not isinstance(made, (nn.Module, Performer)):
        raise InputTypeError(
            expected(
                f"{spec} to give a torch.nn.Module or a Performer",
                type(made).__name__,
                "Return the network from it",
            )
        )
    return made


def load_performer(
    spec: str | nn.Module, preprocessing: Preprocessing | None = None, weights: str | Path | None = None
) -> Performer:
    """Load the network to be explained.

    Args:
        spec: its name (see the top of this module), or the network itself.
        preprocessing: how images become its input; when ``None``, what the weights say, else ImageNet's
            usual.
        weights: what else would stand after ``@``: a file, the name of a set of weights, or ``random:SEED``.
            With a module as ``spec``, a file to load into a copy of it.

    Returns:
        The performer in eval mode (a module that you pass in is left in the mode it has).

    Raises:
        InputError: an unknown name, with the nearest ones.
        InputTypeError: something that is not a readable module (TorchScript, ``torch.compile``).
        WeightsError: weights that are absent, not finite, do not fit or are not safe to open.

    Example:
        >>> performer = load_performer("torchvision:squeezenet1_1@random:0")
        >>> performer.preprocessing.size_px
        (224, 224)
    """
    if not isinstance(spec, str):
        module = unwrapped(spec)
        notes: tuple[str, ...] = ()
        loaded = _Loaded(module, Preprocessing(resize_px=256))
        if weights is not None:
            state, metadata = _read_weights(Path(weights))
            loaded.module = copy.deepcopy(module)
            outputs = _output_count(module.state_dict(), state)
            if outputs is not None and OUTPUT_LAYER in metadata:
                with_outputs(loaded.module, metadata[OUTPUT_LAYER], outputs)
            _load_into(loaded.module, state, Path(weights).name)
            loaded.preprocessing = Preprocessing.from_metadata(metadata) or loaded.preprocessing
            loaded.class_names = _class_names(metadata, outputs, Path(weights).name)
        return _finish(loaded, type(module).__name__, preprocessing, notes)
    body, _, tail = spec.partition("@")
    source, colon, name = body.partition(":")
    wanted = str(weights) if weights is not None else (tail or None)
    if not colon or not source or not name:
        raise InputError(
            expected(
                "a performer such as torchvision:resnet18 or package.module:factory",
                spec,
                "Write the source, a colon and the name",
            )
        )
    label = body + (f"@{Path(wanted).name if _is_file(wanted) else wanted}" if wanted else "")
    loaders = {"torchvision": _load_torchvision, "timm": _load_timm, "partlens": _load_own}
    if source in loaders:
        loaded = loaders[source](name, wanted, spec)
        loaded.module.eval()
        return _finish(loaded, label, preprocessing)
    made = _load_factory(source, name, spec)
    if isinstance(made, Performer):
        return dataclasses.replace(made, preprocessing=preprocessing) if preprocessing is not None else made
    performer = load_performer(made, preprocessing, Path(wanted) if wanted else None)
    performer.module.eval()
    return dataclasses.replace(performer, name=label)


def _finish(loaded: _Loaded, name: str, preprocessing: Preprocessing | None, notes: tuple[str, ...] = ()) -> Performer:
    _check_finite(loaded.module.state_dict(), name)
    return Performer(
        module=loaded.module,
        name=name,
        preprocessing=preprocessing or loaded.preprocessing,
        weights_sha256=weights_sha256(loaded.module),
        class_names=loaded.class_names,
        notes=loaded.notes + notes,
        untrained_layers=loaded.untrained_layers,
    )
