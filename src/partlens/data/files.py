"""Where pixels come from: files, arrays or a function that draws; every image as 8-bit RGB."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from partlens.errors import ImageError, expected

_Result = TypeVar("_Result")
ByteArray = npt.NDArray[np.uint8]

_EXIF_ORIENTATION = 0x0112


class Source(Protocol):
    """Where pixels come from; rows are counted from 0 in the order in which the source was made."""

    def read(self, row: int) -> Image.Image:
        """Return an image as 8-bit RGB."""
        ...

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height as :meth:`read` gives them."""
        ...

    def digest(self, row: int, *, decode: bool = False) -> str:
        """Return a text that is equal for equal content; where asked, decode the image too, as :meth:`read` does."""
        ...


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Bring 16-bit, 32-bit integer and float pixels to 8 bits (mode L).

    16-bit modes are divided by 257. The 32-bit modes do not say what white is, so the values do: within 0–1
    (float only), 0–255 or 0–65535 that range is used, and any other range is stretched from its minimum to
    its maximum.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its pixels hold nan or infinity")
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16"):
        scaled = values / 257
    elif image.mode == "F" and low >= 0 and high <= 1:
        scaled = values * 255
    elif low >= 0 and high <= 255:
        scaled = values
    elif low >= 0 and high <= 65535:
        scaled = values / 257
    else:
        scaled = (values - low) * (255 / max(high - low, 1e-30))  # one value alone becomes black
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn any of Pillow's modes into RGB, transparent pixels composited on white."""
    if image.mode in {"I", "F"} or image.mode.startswith("I;"):
        image = _to_8_bit(image)
    elif image.has_transparency_data or image.mode in {"La", "RGBa"}:
        if image.mode in {"La", "RGBa"}:
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, opaque)
    return image if image.mode == "RGB" else image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block leaves the image as stored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 -- the parser raises anything on damaged metadata; the pixels are fine
        return image


Box = tuple[float, float, float, float]


def window_px(box: Box, size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixels of a photo that a box covers.

    Box edges are left, top, right, bottom in pixels from the photo's top left corner. Halves are rounded upwards, and
    cut off at the photo's edges; right <= left or bottom <= top where nothing of the box lies in the photo.

    Example:
        >>> window_px((34, 128, 216, 271), (500, 334)), window_px((5.5, -3, 25, 45), (25, 25))
        ((34, 128, 216, 271), (6, 0, 25, 25))
    """
    left, top, right, bottom = (
        int(min(max(math.floor(edge + 0.5), 0), size_px[axis % 2])) for axis, edge in enumerate(box)
    )
    return left, top, right, bottom


@dataclass(frozen=True)
class Files:
    """Image files, each opened when it is read, and cut to a box where it has one.

    A box was measured on the pixels as they are stored, so no EXIF orientation is applied to such a photo.
    """

    paths: tuple[Path, ...]
    boxes: tuple[Box | None, ...]

    def _window(self, row: int, size_px: tuple[int, int]) -> tuple[int, int, int, int] | None:
        box = self.boxes[row]
        if box is None:
            return None
        window = window_px(box, size_px)
        if window[2] <= window[0] or window[3] <= window[1]:
            rule = f"a box inside the {size_px[0]}x{size_px[1]} photo {self.paths[row]}"
            raise ImageError(expected(rule, str(box), "Correct the box or remove the row"))
        return window

    def _failed(self, row: int, error: Exception) -> ImageError:
        path = self.paths[row]
        if isinstance(error, ImageError):
            return error
        if isinstance(error, FileNotFoundError):
            return ImageError(expected(f"an image file {path}", "nothing there", "Correct the table or the folder"))
        reason = f"{type(error).__name__}: {error}".replace(str(path), path.name)
        if isinstance(error, UnidentifiedImageError):
            reason = "the content of another kind of file"
        return ImageError(expected(f"an image that can be decoded at {path}", reason, "Replace or remove the file"))

    def _decoded(self, row: int, file: Path | BytesIO) -> Image.Image:
        try:
            with Image.open(file) as image:
                image.load()
                window = self._window(row, image.size)
                return _to_rgb(_upright(image)) if window is None else _to_rgb(image).crop(window)
        except Exception as error:
            raise self._failed(row, error) from error

    def read(self, row: int) -> Image.Image:
        """Return an image as 8-bit RGB."""
        return self._decoded(row, self.paths[row])

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height as :meth:`read` gives them."""
        try:
            with Image.open(self.paths[row]) as image:
                window = self._window(row, image.size)
                if window is not None:
                    return window[2] - window[0], window[3] - window[1]
                turned = image.getexif().get(_EXIF_ORIENTATION, 1) in {5, 6, 7, 8}
                return (image.height, image.width) if turned else (image.width, image.height)
        except Exception as error:
            raise self._failed(row, error) from error

    def digest(self, row: int, *, decode: bool = False) -> str:
        """Return a text that is equal for equal content; the file is read once, also where it is decoded."""
        try:
            content = self.paths[row].read_bytes()
        except OSError as error:
            raise self._failed(row, error) from error
        if decode:
            self._decoded(row, BytesIO(content))
        box = self.boxes[row]
        return f"{len(content)}:{hashlib.sha256(content).hexdigest()}" + (f"@{box}" if box else "")


_COLOURS_LAST = {
    False: "Give colours in the last axis (or leave that axis out for grey)",
    True: "Move the colours to the last axis, as with images.transpose(0, 2, 3, 1)",
}


def as_bytes(image: npt.NDArray[Any], where: str) -> ByteArray:
    """Check one array and bring it to uint8 ``[row, col]`` or ``[row, col, 3]``."""
    if image.shape[2:] == (1,):
        image = image[:, :, 0]
    if image.ndim not in {2, 3} or image.shape[2:] not in {(), (3,)} or 0 in image.shape:
        turned = (image.ndim, image.shape[0]) in {(3, 1), (3, 3)}
        raise ImageError(expected(f"shape [row, col, 3] for {where}", str(image.shape), _COLOURS_LAST[turned]))
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating):
        rule = f"uint8 (0–255) or float (0–1) values for {where}"
        raise ImageError(expected(rule, str(image.dtype), 'Convert them, as with images.astype("uint8")'))
    low, high = float(image.min()), float(image.max())
    if not 0 <= low <= high <= 1:  # also catches nan, which neither min nor max lets pass
        got = f"{np.count_nonzero(np.isnan(image))} nan values" if np.isnan(low) else f"values from {low:g} to {high:g}"
        rule = f"float values from 0 to 1 for {where}"
        raise ImageError(expected(rule, got, "Scale the images, or give them as uint8"))
    scaled: ByteArray = np.rint(image * 255).astype(np.uint8)
    return scaled


@dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays in memory."""

    images: Sequence[ByteArray]

    def read(self, row: int) -> Image.Image:
        """Return an image as 8-bit RGB."""
        return Image.fromarray(self.images[row]).convert("RGB")

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height as :meth:`read` gives them."""
        height, width = self.images[row].shape[:2]
        return width, height

    def digest(self, row: int, *, decode: bool = False) -> str:  # noqa: ARG002 -- arrays are decoded already
        """Return a text that is equal for equal content."""
        image = np.ascontiguousarray(self.images[row])
        return f"{image.shape}:{hashlib.sha256(image.tobytes()).hexdigest()}"


@dataclass(frozen=True, eq=False)
class Generated:
    """A function that draws; a recipe identifies the content of all it draws."""

    draw: Callable[[int], ByteArray]
    recipe: str

    def read(self, row: int) -> Image.Image:
        """Return an image as 8-bit RGB."""
        image = self.draw(row)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            rule, got = "uint8 arrays [row, col, 3] from the generator", f"{image.dtype} {image.shape}"
            raise ImageError(expected(rule, got, "Change the function that draws"))
        return Image.fromarray(image)

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height as :meth:`read` gives them."""
        return self.read(row).size

    def digest(self, row: int, *, decode: bool = False) -> str:  # noqa: ARG002 -- what is hashed has been drawn
        """Return a text that is equal for equal content; a recipe is trusted, so nothing is drawn for it."""
        if self.recipe:
            return f"{self.recipe}#{row}"
        return Arrays([np.asarray(self.read(row))]).digest(0)


def parallel(work: Callable[[int], _Result], rows: Iterable[int]) -> Iterator[_Result]:
    """Map over rows in at most eight threads, results in order (decoding and hashing release the lock)."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(work, rows)
