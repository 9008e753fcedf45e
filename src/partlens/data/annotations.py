"""Where the parts of the objects are: landmark positions, part sizes and masks, row by row beside the images.

Positions are in the image's own pixels (x to the right, y downwards, the top left corner of the image is 0,
0). What is not known is ``nan``, never zero, and :meth:`PartTruth.count` says how much is known.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from partlens.errors import ImageError, expected, listed, nearest

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

LANDMARK_TABLE = "landmarks.csv"

_REQUIRED = ("image", "landmark", "x", "y")


@dataclass(frozen=True)
class UnusedPart:
    """An annotated part whose position is not used: the image, the landmark, and the reason in words."""

    key: str
    landmark: str
    reason: str


@dataclass(frozen=True, eq=False)
class PartTruth:
    """Annotated parts of a set of images.

    Attributes:
        landmarks: names of the parts, the second axis of every array.
        keys: the images, the first axis of every array.
        positions_px: float32 ``[image, landmark, 2]``, x and y in the image's own pixels; ``nan`` where the
            part is absent or where the image shows more than one instance of it.
        sizes_px: float32 ``[image, landmark, 2]``, width and height of the part's box; ``nan`` where unknown.
        image_size_px: float32 ``[image, 2]``, width and height of the image; ``nan`` where unknown.
        masks: gives, for a key, one boolean array ``[row, col]`` per part; None where there are no masks.
        unused: annotations that a reader could not use, such as positions outside the image.

    Raises:
        ImageError: an array whose shape does not follow from ``keys`` and ``landmarks``, or a name that
            stands twice.

    Example:
        >>> import numpy as np
        >>> position = np.array([[[4.0, 5.0]]])
        >>> unknown = np.full((1, 1, 2), np.nan)
        >>> truth = PartTruth(("head",), ("a.jpg",), position, unknown, np.array([[9.0, 9.0]]))
        >>> truth.for_keys(["b.jpg", "a.jpg"]).positions_px[:, 0].tolist()
        [[nan, nan], [4.0, 5.0]]
        >>> truth.count()
        {'head': 1}
    """

    landmarks: tuple[str, ...]
    keys: tuple[str, ...]
    positions_px: FloatArray
    sizes_px: FloatArray
    image_size_px: FloatArray
    masks: Callable[[str], dict[str, BoolArray]] | None = field(default=None, repr=False)
    unused: tuple[UnusedPart, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for what, names in (("landmark", self.landmarks), ("image", self.keys)):
            twice = [name for name, times in Counter(names).items() if times > 1]
            if twice:
                raise ImageError(expected(f"every {what} name once", listed(twice), "Remove the repeated names"))
        images, landmarks = len(self.keys), len(self.landmarks)
        shapes = {
            "positions_px": (images, landmarks, 2),
            "sizes_px": (images, landmarks, 2),
            "image_size_px": (images, 2),
        }
        for name, shape in shapes.items():
            array = np.asarray(getattr(self, name), dtype=np.float32)
            if array.shape != shape:
                raise ImageError(
                    expected(
                        f"{name} of shape {shape} for {images} images and {landmarks} landmarks",
                        str(array.shape),
                        "Give one row per key and one column per landmark",
                    )
                )
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def for_keys(self, keys: Sequence[str]) -> PartTruth:
        """Return the same truth with one row for each of ``keys``, in that order.

        Args:
            keys: images; those without an annotation get rows of ``nan``.

        Returns:
            A truth whose ``keys`` are exactly ``keys``.
        """
        row_of = {key: row for row, key in enumerate(self.keys)}
        rows = np.array([row_of.get(key, -1) for key in keys], dtype=np.intp)
        known = rows >= 0
        asked = set(keys)

        def pick(array: FloatArray) -> FloatArray:
            picked = np.full((len(rows), *array.shape[1:]), np.nan, dtype=np.float32)
            picked[known] = array[rows[known]]
            return picked

        return replace(
            self,
            keys=tuple(keys),
            positions_px=pick(self.positions_px),
            sizes_px=pick(self.sizes_px),
            image_size_px=pick(self.image_size_px),
            unused=tuple(part for part in self.unused if part.key in asked),
        )

    def count(self) -> dict[str, int]:
        """Return, for each landmark, the number of images in which its position is known."""
        known = np.isfinite(self.positions_px).all(axis=2).sum(axis=0)
        return {name: int(number) for name, number in zip(self.landmarks, known, strict=True)}


def _number(row: Mapping[str, str], column: str, where: str) -> float:
    """Return one cell as a finite number."""
    text = (row.get(column) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ImageError(
            expected(f"a number in column {column!r} of {where}", repr(text), "Correct the cell or delete the row")
        )
    return value


def _optional_number(row: Mapping[str, str], column: str, where: str) -> float:
    """Return one cell as a number that is not negative, ``nan`` where the column or the value is missing."""
    if not (row.get(column) or "").strip():
        return math.nan
    value = _number(row, column, where)
    if value < 0:
        raise ImageError(
            expected(f"a number >= 0 in column {column!r} of {where}", value, "Correct the cell or leave it empty")
        )
    return value


def _rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Read a landmark table as (line number, cells) and check its columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, restkey="", restval="")
            columns = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            missing = [name for name in _REQUIRED if name not in columns]
            if missing:
                raise ImageError(
                    expected(
                        f"the columns {', '.join(_REQUIRED)} in {path}",
                        f"the columns {', '.join(columns) or '(none)'}",
                        f"Add or rename {', '.join(missing)} (optional: width, height, instances)",
                    )
                )
            return [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise ImageError(expected(f"a file {path}", "nothing there", "Check the path of the table")) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ImageError(expected(f"a CSV table in UTF-8 at {path}", str(error), "Save the table as CSV")) from error


def read_landmark_table(path: Path | str, image_sizes: Mapping[str, tuple[int, int]] | None = None) -> PartTruth:
    r"""Read part positions from a CSV table with one row per image and landmark.

    Columns: ``image`` (the key), ``landmark``, ``x``, ``y`` (centre of the part in pixels of that image), and
    optionally ``width`` and ``height`` (of the part's box) and ``instances`` (how many such parts the image
    shows; 1 where the column is missing). A landmark is used only where the image shows it exactly once: rows
    with another number of instances, and pairs of image and landmark that stand in several rows, become
    ``nan``.

    Args:
        path: the table.
        image_sizes: width and height of each image in pixels, by key, where known.

    Returns:
        The truth, images in the order of their first row, landmarks in alphabetical order.

    Raises:
        ImageError: the file is missing, lacks a column, has no rows, or holds a cell that is not a number;
            the text names the row.

    Example:
        >>> import tempfile, pathlib
        >>> table = pathlib.Path(tempfile.mkdtemp()) / "landmarks.csv"
        >>> _ = table.write_text("image,landmark,x,y,width,height,instances\na.jpg,head,190,52.5,70,91,1\n")
        >>> read_landmark_table(table).positions_px.tolist()
        [[[190.0, 52.5]]]
    """
    path = Path(path)
    rows = _rows(path)
    if not rows:
        raise ImageError(expected(f"at least one landmark in {path}", "no rows", "Add a row per image and landmark"))
    found: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
    for line, row in rows:
        where = f"{path}, row {line}"
        image, landmark = (row["image"] or "").strip(), (row["landmark"] or "").strip()
        for column, text in (("image", image), ("landmark", landmark)):
            if not text:
                raise ImageError(expected(f"a name in column {column!r} of {where}", "an empty cell", "Fill it in"))
        x, y = _number(row, "x", where), _number(row, "y", where)
        width, height = _optional_number(row, "width", where), _optional_number(row, "height", where)
        instances = _number(row, "instances", where) if "instances" in row else 1.0
        if instances < 0 or instances != int(instances):
            raise ImageError(
                expected(f"a whole number >= 0 in column 'instances' of {where}", instances, "Correct the cell")
            )
        entries = found.setdefault((image, landmark), [])
        # An empty list stays "absent"; two entries mean "more than one", whatever their positions are.
        entries.extend([(x, y, width, height)] * min(int(instances), 2))
    keys = tuple(dict.fromkeys(image for image, _ in found))
    landmarks = tuple(sorted({landmark for _, landmark in found}))
    row_of = {key: index for index, key in enumerate(keys)}
    column_of = {name: index for index, name in enumerate(landmarks)}
    positions = np.full((len(keys), len(landmarks), 2), np.nan, dtype=np.float32)
    sizes = positions.copy()
    for (image, landmark), entries in found.items():
        if len(entries) == 1:
            positions[row_of[image], column_of[landmark]] = entries[0][:2]
            sizes[row_of[image], column_of[landmark]] = entries[0][2:]
    known_sizes = image_sizes or {}
    if image_sizes and not any(key in known_sizes for key in keys):
        raise ImageError(
            expected(
                f"images named as in the image table in {path}",
                f"{keys[0]!r}",
                f"Write names like {nearest(keys[0], known_sizes, 1)[0]!r}",
            )
        )
    image_size = np.array([known_sizes.get(key, (np.nan, np.nan)) for key in keys], dtype=np.float32)
    return PartTruth(landmarks, keys, positions, sizes, image_size.reshape(len(keys), 2))
