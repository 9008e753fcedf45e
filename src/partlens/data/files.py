"""Where pixels come from: files, arrays or a function that draws; every image as 8-bit RGB."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from partlens.errors import ImageError, InputTypeError, expected

_Result = TypeVar("_Result")
ByteArray = npt.NDArray[np.uint8]

_EXIF_ORIENTATION = 0x0112
_TURNED = frozenset({5, 6, 7, 8})
_REDUCTIONS = (8, 4, 2)  # at which JPEG can be decoded
_WAITING = 1024  # rows that are handed to threads at a time
_WHITES = (255, 1023, 4095, 65535)  # the brightest value of 8, 10, 12 and 16 bits

# What files of another kind begin with, what that is, and what to do.
_FOREIGN = (
    (b"version https://git-lfs", "the pointer of git-lfs to it", "Run git lfs pull in its folder"),
    (b"<", "a web page or XML", "Download the file itself: a link may lead to a page about it"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it"),
    (b"\x89HDF", "an HDF5 file, as Keras writes it", "Save it again from the program that it is for"),
    (b"{", "a JSON text", "Give the file that it describes"),
)


def foreign_kind(content: bytes) -> tuple[str, str] | None:
    """Say what a file is that was saved under the name of another kind, and what to do; None where it is not known."""
    start = content[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not content:
        return "an empty file", "Download or save it again"
    return next(((kind, remedy) for mark, kind, remedy in _FOREIGN if start.startswith(mark)), None)


Scaled = Callable[[int, int], tuple[int, int]]
"""Says to which width and height a photo of a width and height will be scaled."""


class Source(ABC):
    """Where pixels come from; rows are counted from 0 in the order in which the source was made."""

    @abstractmethod
    def read(self, row: int, scaled: Scaled | None = None) -> Image.Image:
        """Return an image as 8-bit RGB; it may be smaller where it is known to which size it will be scaled."""

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height as :meth:`read` gives them."""
        return self.read(row).size

    @abstractmethod
    def digest(self, row: int) -> str:
        """Return a text that is equal for equal content."""

    def checked(self, row: int) -> tuple[str, str]:
        """Decode an image as :meth:`read` does; return its digest and a remark on its pixels, mostly empty."""
        return self.digest(row), ""  # nothing is to be decoded


def _white(image: Image.Image, values: npt.NDArray[np.float64]) -> float | None:
    """Return the value that is white in an image of more than 8 bits; None where its own range is stretched.

    Such files do not say what white is, so the values do: the least of 1 (float alone), 255, 1023, 4095 and 65535 (8,
    10, 12 and 16 bits) that holds them all.
    """
    low, high = float(values.min()), float(values.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        return 1.0
    return None if low < 0 else next((float(white) for white in _WHITES if high <= white), None)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Bring 16-bit, 32-bit integer and float pixels to 8 bits (mode L)."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its pixels hold nan or infinity")
    white = _white(image, values)
    if white is None:
        low = values.min()
        scaled = (values - low) * (255 / max(values.max() - low, 1e-30))  # one value alone becomes black
    else:
        scaled = values / 257 if white == _WHITES[-1] else values * (255 / white)
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8))


def _is_deep(image: Image.Image) -> bool:
    return image.mode in {"I", "F"} or image.mode.startswith("I;")


def _has_16_bit_colours(image: Image.Image) -> bool:
    """Whether an opened, not yet loaded file has colours of 16 bits, of which Pillow keeps the upper 8."""
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())) and not _is_deep(image)


def _remark(image: Image.Image, *, cut: bool) -> str:
    """Say how the values of a decoded image of more than 8 bits are read, where that is a guess or goes wrong."""
    if _is_deep(image):
        white = _white(image, np.asarray(image).astype(np.float64))
        said = "stretched from the darkest to the brightest value" if white is None else f"read with {white:g} as white"
        return "" if white in {1, _WHITES[-1]} else said
    if cut and 0 < np.asarray(image.convert("RGB")).max() < 16:
        return "nearly black: their 16-bit colours hold 12 bits at most; save them with 8 bits"
    return ""


def _to_rgb(image: Image.Image) -> Image.Image:
    """Turn any of Pillow's modes into RGB, transparent pixels composited on white."""
    if _is_deep(image):
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


def _upright_px(image: Image.Image) -> tuple[int, int]:
    """Return width and height of an opened file after turning; a TIFF's Pillow gives so already."""
    turned = image.format != "TIFF" and image.getexif().get(_EXIF_ORIENTATION, 1) in _TURNED
    return (image.height, image.width) if turned else (image.width, image.height)


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
class Files(Source):
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

    @contextlib.contextmanager
    def _named(self, row: int) -> Iterator[None]:
        """Say of what goes wrong inside which file it was."""
        path = self.paths[row]
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            rule, remedy = f"an image file {path}", "Correct the table, or remove it from the folder"
            raise ImageError(expected(rule, "a folder, a pipe or a device", remedy))
        try:
            yield
        except ImageError:
            raise
        except FileNotFoundError as error:
            text = expected(f"an image file {path}", "nothing there", "Correct the table or the folder")
            raise ImageError(text) from error
        except Exception as error:  # Pillow raises anything on damaged files
            foreign = self._foreign(row) if isinstance(error, UnidentifiedImageError) else None
            reason = f"{type(error).__name__}: {error}".replace(str(path), path.name)
            got, remedy = foreign or (reason, "Replace or remove the file")
            raise ImageError(expected(f"an image that can be decoded at {path}", got, remedy)) from error

    def _foreign(self, row: int) -> tuple[str, str]:
        """Say what a file is that Pillow does not know."""
        with self.paths[row].open("rb") as file:
            return foreign_kind(file.read(64)) or ("the content of another kind of file", "Replace or remove the file")

    def _reduce(self, row: int, image: Image.Image, scaled: Scaled) -> None:
        """Let an opened JPEG be decoded at a half, quarter or eighth of its size, at least twice what it is scaled to.

        Sides that do not divide are left: the places of pixels stay exactly what they were.
        """
        if image.format != "JPEG" or self.boxes[row] is not None:
            return
        wide, high = _upright_px(image)
        least = [2 * side for side in scaled(wide, high)]
        for factor in _REDUCTIONS:
            if wide % factor == high % factor == 0 and wide >= factor * least[0] and high >= factor * least[1]:
                image.draft(None, (image.width // factor, image.height // factor))
                return

    def _pixels(self, row: int, image: Image.Image) -> Image.Image:
        """Load an opened image, turn it upright or cut it, and convert it."""
        image.load()
        window = self._window(row, image.size)
        return _to_rgb(_upright(image)) if window is None else _to_rgb(image).crop(window)

    def read(self, row: int, scaled: Scaled | None = None) -> Image.Image:
        """Return an image as 8-bit RGB, of a large JPEG a reduced one where ``scaled`` says that this is enough."""
        with self._named(row), Image.open(self.paths[row]) as image:
            if scaled is not None:
                self._reduce(row, image, scaled)
            return self._pixels(row, image)

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height as :meth:`read` gives them."""
        with self._named(row), Image.open(self.paths[row]) as image:
            window = self._window(row, image.size)
            if window is not None:
                return window[2] - window[0], window[3] - window[1]
            return _upright_px(image)

    def digest(self, row: int) -> str:
        """Return a text that is equal for equal content."""
        with self._named(row):
            return self._marked(row, self.paths[row].read_bytes())

    def _marked(self, row: int, content: bytes) -> str:
        box = self.boxes[row]
        return f"{len(content)}:{hashlib.sha256(content).hexdigest()}" + (f"@{box}" if box else "")

    def checked(self, row: int) -> tuple[str, str]:
        """Decode an image; return its digest and a remark. The file is read once."""
        with self._named(row):
            content = self.paths[row].read_bytes()
            with Image.open(BytesIO(content)) as image:
                cut = _has_16_bit_colours(image)
                if image.format == "JPEG":
                    # An eighth of the pixels takes all of the stream: whatever is wrong with it is found.
                    self._window(row, image.size)
                    image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
                    image.load()
                else:
                    self._pixels(row, image)
                return self._marked(row, content), _remark(image, cut=cut)


_COLOURS_LAST = {
    False: "Give colours in the last axis (or leave that axis out for grey)",
    True: "Move the colours to the last axis, as with images.transpose(0, 2, 3, 1)",
}


def pictures(given: Any) -> list[Any]:
    """Return images of Python one by one: a list or an array of arrays or of Pillow's images."""
    if isinstance(given, (str, bytes, Mapping, Image.Image)) or not hasattr(given, "__len__"):
        rule = "a list of images, or an array [image, row, col, 3]"
        raise InputTypeError(expected(rule, type(given).__name__, "Give arrays; ImageSet.open reads files"))
    shape = tuple(getattr(given, "shape", (1, 1, 1, 1)))
    # Pictures three pixels wide do not occur; one picture in colour does.
    if len(shape) < 3 or (len(shape) == 3 and shape[2] in {3, 4}):
        rule = "shape [image, row, col, 3] for the images"
        raise ImageError(expected(rule, str(shape), "Stack the images first, as with images[None] for one"))
    return list(given)


def as_bytes(given: Any, where: str) -> ByteArray:
    """Check one array or image of Pillow and bring it to uint8 ``[row, col]`` or ``[row, col, 3]``."""
    image = np.asarray(_to_rgb(_upright(given)) if isinstance(given, Image.Image) else given)
    if image.dtype.kind not in "biuf" or not image.ndim:
        rule = f"an array of numbers for {where}"
        raise InputTypeError(expected(rule, type(given).__name__, "Give pixels; ImageSet.from_files reads files"))
    if image.shape[2:] == (1,):
        image = image[:, :, 0]
    if image.ndim not in {2, 3} or image.shape[2:] not in {(), (3,)} or 0 in image.shape:
        turned = (image.ndim, image.shape[0]) in {(3, 1), (3, 3)}
        raise ImageError(expected(f"shape [row, col, 3] for {where}", str(image.shape), _COLOURS_LAST[turned]))
    return image if image.dtype == np.uint8 else _from_floats(image, where)


def _from_floats(image: npt.NDArray[Any], where: str) -> ByteArray:
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
class Arrays(Source):
    """Arrays in memory."""

    images: Sequence[ByteArray]

    def read(self, row: int, scaled: Scaled | None = None) -> Image.Image:  # noqa: ARG002 -- nothing is to be decoded
        """Return an image as 8-bit RGB."""
        return Image.fromarray(self.images[row]).convert("RGB")

    def size_px(self, row: int) -> tuple[int, int]:
        """Return width and height as :meth:`read` gives them."""
        height, width = self.images[row].shape[:2]
        return width, height

    def digest(self, row: int) -> str:
        """Return a text that is equal for equal content."""
        image = np.ascontiguousarray(self.images[row])
        return f"{image.shape}:{hashlib.sha256(image.tobytes()).hexdigest()}"


@dataclass(frozen=True, eq=False)
class Generated(Source):
    """A function that draws; a recipe identifies the content of all it draws."""

    draw: Callable[[int], ByteArray]
    recipe: str

    def read(self, row: int, scaled: Scaled | None = None) -> Image.Image:  # noqa: ARG002 -- it draws at its own size
        """Return an image as 8-bit RGB."""
        image: object = self.draw(row)  # a user's function may give anything
        if not isinstance(image, np.ndarray):
            rule = "uint8 arrays [row, col, 3] from the generator"
            raise InputTypeError(expected(rule, type(image).__name__, "Change the function that draws"))
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            rule, got = "uint8 arrays [row, col, 3] from the generator", f"{image.dtype} {image.shape}"
            raise ImageError(expected(rule, got, "Change the function that draws"))
        return Image.fromarray(image)

    def digest(self, row: int) -> str:
        """Return a text that is equal for equal content; a recipe is trusted, so nothing is drawn for it."""
        if self.recipe:
            return f"{self.recipe}#{row}"
        return Arrays([np.asarray(self.read(row))]).digest(0)


def parallel(work: Callable[[int], _Result], rows: Iterable[int]) -> Iterator[_Result]:
    """Map over rows in at most eight threads, results in order (decoding and hashing release the lock)."""
    left = iter(rows)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while some := list(islice(left, _WAITING)):  # all at once, a million would wait in memory
            yield from pool.map(work, some)
