"""How an image file becomes a network's input, and where its pixels go.

Pixel coordinates are continuous throughout: pixel ``i`` covers ``[i, i + 1)`` and its middle is ``i + 0.5``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from partlens.errors import InputError, WeightsError, expected
from partlens.records import Settings

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_MOST_PIXELS = 2**24  # that a photo is scaled to before the crop
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_OF_CHANNELS = {  # usual mean and deviation: of luminance; of colours; of colours and an opaque alpha
    1: ((0.449,), (0.226,)),
    3: (IMAGENET_MEAN, IMAGENET_STD),
    4: ((*IMAGENET_MEAN, 0.0), (*IMAGENET_STD, 1.0)),
}
_ORDERS = {1: ("L", "L"), 3: ("RGB", "BGR"), 4: ("RGBA", "BGRA")}  # as a weights file's header calls them


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


_Side = Annotated[int, Field(ge=1)]
_Sides = Annotated[tuple[_Side, _Side], BeforeValidator(_as_tuple)]
_PerChannel = Annotated[tuple[float, ...], BeforeValidator(_as_tuple)]


class Preprocessing(Settings):
    """How an image file becomes the network's input.

    The value at a pixel of channel ``c`` is ``(scale · v - mean[c]) / std[c]`` with ``v`` in 0-255.

    Attributes:
        size_px: rows and columns of the input.
        resize: ``"squash"`` stretches the whole image to ``size_px`` (the explainer papers do this with
            object crops); ``"crop"`` scales the shorter side to ``resize_px`` and takes the middle.
        resize_px: shorter side before the crop, in pixels; ``None`` with ``"squash"``, where it is not used.
        channel_order: order of the channels of the input; ``mean`` and ``std`` have this order, so that
            Caffe's ``104 117 123`` are blue, green, red.
        scale: factor on the byte values, 1/255 or 1.
        mean: per channel, after scaling; ImageNet's unless given.
        std: per channel, after scaling; above 0.
        interpolation: Pillow's filter, which smooths when it shrinks.
        channels: of the input: 3 colours; 1, their luminance as Pillow computes it; or 4, the colours and alpha, which
            is opaque, because photos are read without it.

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

    size_px: _Sides = (224, 224)
    resize: Literal["squash", "crop"] = "crop"
    resize_px: int | None = None
    channel_order: Literal["RGB", "BGR"] = "RGB"
    scale: float = 1 / 255
    mean: _PerChannel = IMAGENET_MEAN
    std: _PerChannel = IMAGENET_STD
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    channels: int = 3

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.channels not in _OF_CHANNELS:
            raise InputError(expected("channels of 1, 3 or 4", self.channels, "Wrap a network that takes others"))
        if (self.mean, self.std) == _OF_CHANNELS[3]:
            for name, usual in zip(("mean", "std"), _OF_CHANNELS[self.channels], strict=True):
                object.__setattr__(self, name, usual)
        if not len(self.mean) == len(self.std) == self.channels or not all(s > 0 for s in self.std):
            got = f"mean {self.mean}, std {self.std}"
            count = {1: "one", 3: "three", 4: "four"}[self.channels]
            rule = f"{count} means and {count} positive standard deviations"
            raise InputError(expected(rule, got, "Give one value per channel"))
        with np.errstate(all="ignore"):
            largest = np.float32(255 * self.scale) / np.array(self.std, dtype=np.float32)
        if np.isinf(largest).any():
            got = f"scale {self.scale}, std {self.std}"
            raise InputError(expected("a finite input", got, "Correct the standard deviation"))
        longer = max(self.size_px)
        if self.resize != "crop":
            return self
        if self.resize_px is None:
            object.__setattr__(self, "resize_px", longer)
        elif self.resize_px < longer:
            rule = f"resize_px of at least {longer} px, the crop's longer side"
            raise InputError(expected(rule, self.resize_px, "Raise resize_px or choose resize squash"))
        return self

    def scaled_size(self, width: int, height: int) -> tuple[int, int]:
        """Return width and height after scaling, before the crop (torchvision's rounding)."""
        rows, cols = self.size_px
        if self.resize == "squash":
            return cols, rows
        short = cast("int", self.resize_px)
        if width <= height:
            return short, int(short * height / width)
        return int(short * width / height), short

    def box_in_input(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Say where the whole original image lies in the input's coordinates, as ``x0, y0, x1, y1``.

        What was cropped away lies outside the input (``x0`` below 0).

        Raises:
            InputError: a side below 1 pixel.
        """
        if width < 1 or height < 1:
            raise InputError(expected("an image of at least 1x1 px", f"{width}x{height}", "Check the image file"))
        rows, cols = self.size_px
        wide, high = self.scaled_size(width, height)
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
        factor, offset = self._mapping(image_size)
        return np.asarray(np.asarray(xy, dtype=np.float64) * factor + offset)

    def to_image_px(self, xy: Any, image_size: tuple[int, int]) -> np.ndarray:
        """Map points of the input back to the original image: the inverse of `to_input_px`."""
        factor, offset = self._mapping(image_size)
        return np.asarray((np.asarray(xy, dtype=np.float64) - offset) / factor)

    def _mapping(self, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        x0, y0, x1, y1 = self.box_in_input(*image_size)
        return np.array([(x1 - x0) / image_size[0], (y1 - y0) / image_size[1]]), np.array([x0, y0])

    def frame(self, image: Image.Image) -> Image.Image:
        """Return what the network sees of an image, as an RGB image of the input's size."""
        rows, cols = self.size_px
        wide, high = self.scaled_size(*image.size)
        x0, y0, _, _ = self.box_in_input(*image.size)
        left, top = int(-x0), int(-y0)
        if wide * high > _MOST_PIXELS:
            # A long strip would be scaled to gigabytes, of which a crop is kept: scale that part alone.
            across, down = image.width / wide, image.height / high
            box = (left * across, top * down, (left + cols) * across, (top + rows) * down)
            return image.convert("RGB").resize((cols, rows), _FILTERS[self.interpolation], box)
        scaled = image.convert("RGB").resize((wide, high), _FILTERS[self.interpolation])
        return scaled.crop((left, top, left + cols, top + rows))

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "image channel row col"]:
        """Turn images of any mode and size into one float32 batch on the CPU, in their order."""
        rows, cols = self.size_px
        batch = np.empty((len(images), rows, cols, 3), dtype=np.float32)
        for index, image in enumerate(images):
            batch[index] = np.asarray(self.frame(image), dtype=np.float32)
        return self._normalised(batch)

    def of_bytes(self, frames: UInt8[Tensor, "image row col 3"]) -> Float[Tensor, "image channel row col"]:
        """Turn what `frame` gave, kept as bytes, into the same batch, bit for bit, as calling this object gives."""
        return self._normalised(frames.numpy().astype(np.float32))

    def _normalised(self, batch: np.ndarray) -> Tensor:
        """Scale and centre float32 RGB values ``[image, row, col, 3]``, in place where the channels stay."""
        if self.channels == 1:
            batch = _luminance(batch)
        elif self.channel_order == "BGR":
            batch = batch[..., ::-1]
        if self.channels == 4:
            batch = np.concatenate([batch, np.full_like(batch[..., :1], 255)], axis=-1)
        batch *= np.float32(self.scale)
        batch -= np.array(self.mean, dtype=np.float32)
        batch /= np.array(self.std, dtype=np.float32)
        return torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a manifest, of which ``Preprocessing(**values)`` is made again."""
        return self.model_dump(mode="json")

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
        order = _ORDERS[self.channels][self.channel_order == "BGR"]
        return {
            "input": f"{order}, {spans[self.scale]}, mean {mean}, std {std}{crop}{shrunk}",
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
        order, span = re.search(r"\b(L|RGB|BGR|RGBA|BGRA)\b", text), re.search(r"\b0-(1|255)\b", text)
        crop = re.search(r"\bcrop (\d+)\b", text)
        channels = next((count for count, names in _ORDERS.items() if order and order[1] in names), 3)
        mean, std = _numbers(text, "mean", channels), _numbers(text, "std", channels)
        if order is None or span is None or mean is None:
            rule = 'metadata such as "RGB, 0-1, mean 0.485 0.456 0.406, std 0.229 0.224 0.225, 224x224"'
            raise WeightsError(expected(rule, text, "Correct the header or give the preprocessing yourself"))
        return cls(
            size_px=_size(f"{metadata.get('input_size', '')} {text} 224x224"),
            channel_order="BGR" if order[1].startswith("BGR") else "RGB",
            scale=1 / 255 if span[1] == "1" else 1.0,
            mean=mean,
            std=std or (1.0,) * channels,
            interpolation="bicubic" if "bicubic" in text else "bilinear",
            resize="squash" if crop is None else "crop",
            resize_px=crop and int(crop[1]),
            channels=channels,
        )


def _size(text: str) -> tuple[int, int]:
    """Read the first rows and columns such as 224x224."""
    rows, cols = re.findall(r"(\d+)\s*x\s*(\d+)", text)[0]
    return int(rows), int(cols)


def _numbers(text: str, word: str, channels: int) -> tuple[float, ...] | None:
    """Read one number or one of each channel after a word."""
    found = re.search(rf"\b{word}((?:\s+[-+.\deE]+)+)", text)
    values = [] if found is None else [float(v) for v in found[1].split()]
    if len(values) == 1:
        values *= channels
    return tuple(values) if len(values) == channels else None


def _luminance(batch: np.ndarray) -> np.ndarray:
    """Return the luminance of RGB bytes ``[image, row, col, 3]``, one channel, rounded as Pillow's mode L is."""
    red, green, blue = (batch[..., channel].astype(np.int64) for channel in range(3))
    grey = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return np.asarray(grey[..., None], dtype=np.float32)
