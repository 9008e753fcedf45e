"""Where the parts of the objects are: landmark positions, part sizes and masks, one row per image.

Positions are in the image's own pixels (x to the right, y downwards, the top left corner of the image is 0,
0). What is not known is ``nan``, never zero, and :meth:`PartTruth.count` says how much is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from partlens.data.files import Source, parallel
from partlens.data.tables import MASK_FOLDER, Table, read_table, with_slashes
from partlens.errors import ImageError, InputTypeError, expected, listed, nearest

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]

_REQUIRED = ("image", "landmark", "x", "y")
_SHOWN = ("visible", "visibility", "v", "vis", "is_visible", "present")  # 0 for a part that cannot be seen
_HIDDEN = ("occluded", "is_occluded", "hidden")  # 1 for one
_KNOWN = (*_REQUIRED, "width", "height", "instances", *_SHOWN, *_HIDDEN)
_NAMED = 3  # images that a warning names
_COMPARED = 2000  # images among which a like name is looked for; comparing is slow
_NO, _YES = ("false", "no", "n", "f"), ("true", "yes", "y", "t")


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
        warnings: what is odd about the annotations as a whole, one sentence each.

    Raises:
        ImageError: an array whose shape does not follow from ``keys`` and ``landmarks``, a name that occurs twice, an
            infinite number, or a size below 0.
        InputTypeError: names or numbers of another kind.

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
    warnings: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for what, names in (("landmark", self.landmarks), ("image", self.keys)):
            _check_names(what, names)
        images, landmarks = len(self.keys), len(self.landmarks)
        parts = (images, landmarks, 2)
        shapes = {"positions_px": parts, "sizes_px": parts, "image_size_px": (images, 2)}
        for name, shape in shapes.items():
            array = _numbers(getattr(self, name), name)
            if array.shape != shape:
                rule = f"{name} of shape {shape} for {images} images and {landmarks} landmarks"
                remedy = "Give one row per key and one column per landmark"
                raise ImageError(expected(rule, str(array.shape), remedy))
            least = -np.inf if name == "positions_px" else 0
            bad = array[np.isinf(array) | (array < least)]
            if bad.size:
                rule = f"finite {name}" + (" of at least 0" if least == 0 else "")
                raise ImageError(expected(f"{rule}, nan where unknown", f"{bad[0]:g}", "Correct the numbers"))
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    def for_keys(self, keys: Sequence[str]) -> PartTruth:
        """Return the same truth with one row for each of ``keys``, in that order; ``nan`` for unknown images."""
        row_of = _numbered(self.keys)
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


def _check_names(what: str, names: object) -> None:
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise InputTypeError(expected(f"{what} names as a tuple of texts", repr(names), "Give one name each"))
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise ImageError(expected(f"every {what} name once", listed(twice), "Remove the repeated names"))


def _numbers(given: object, name: str) -> FloatArray:
    try:
        return np.asarray(given, dtype=np.float32)
    except (TypeError, ValueError) as error:
        got = type(given).__name__
        raise InputTypeError(expected(f"numbers for {name}", got, "Give an array of float32")) from error


def _visible(table: Table) -> list[bool]:
    """Whether each row's part can be seen; where nothing says so it can."""
    seen = [True] * len(table)
    for name in (name for name in (*_SHOWN, *_HIDDEN) if name in table.columns):
        for row, cell in enumerate(table.columns[name]):
            if cell not in {"", "nan"} and _flag(table, name, row) == (name in _HIDDEN):
                seen[row] = False
    return seen


def _flag(table: Table, column: str, row: int) -> bool:
    """Read a cell that says yes or no, in words or as a number: COCO's 2 and a confidence above 0 mean yes."""
    cell = table.columns[column][row].casefold()
    if cell in {*_NO, *_YES}:
        return cell in _YES
    return table.number(column, row) > 0


def _warnings(table: Table, at: Sequence[Sequence[float]]) -> tuple[str, ...]:
    """Name columns that were not used, and count positions that stand for "not known"."""
    corner = sum(x == 0 and y == 0 for x, y in zip(*at, strict=True))
    found = table.remarks()
    if corner > 1:
        remedy = f"delete these rows of {table.path.name}, or add a column 'visible' that is 0 there"
        found += (f"{corner} landmarks stand at exactly 0,0, as hidden parts are often written: {remedy}",)
    known = [edge for edges in at for edge in edges if not math.isnan(edge)]
    if any(edge % 1 for edge in known) and all(0 <= edge <= 1 for edge in known):
        found += (f"all positions in {table.path.name} are from 0 to 1: they are read as pixels, not as shares",)
    return found


def _instances(table: Table) -> list[int]:
    """How many parts of its kind each row means, 1 where the table does not say."""
    if "instances" not in table.columns:
        return [1] * len(table)
    found = table.numbers("instances", least=0)
    broken = next((row for row, number in enumerate(found) if number != int(number)), None)
    if broken is not None:
        rule = f"a whole number in {table.where('instances', broken)}"
        raise ImageError(expected(rule, found[broken], "Correct the cell"))
    return list(map(int, found))


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _read_landmark_table(path: Path | str, images: Collection[str] | None = None) -> PartTruth:
    r"""Read part positions from a table with one row per image and landmark.

    Columns: ``image`` (the key), ``landmark``, ``x``, ``y`` (centre of the part in pixels of that image, after it is
    cut to its box), and optionally ``width`` and ``height`` (of the part's box), ``instances`` (how many such parts
    the image shows; 1 where the column is missing) and ``visible`` or ``occluded``. A landmark is used only where the
    image shows it exactly once: hidden ones, other numbers of instances, and pairs of image and landmark in several
    rows, become ``nan``. What the x and y of a hidden part are does not matter.

    Images come in the order of their first row, landmarks in alphabetical order; those that an image shows more than
    once are named in ``unused``.

    Args:
        path: the table.
        images: optional, the images that there are: backslashes in other names are turned.

    Raises:
        ImageError: the file is missing, lacks a column, has no rows, or holds a cell that is not a number;
            the text names the row.

    Example:
        >>> import tempfile, pathlib
        >>> table = pathlib.Path(tempfile.mkdtemp()) / "landmarks.csv"
        >>> _ = table.write_text("image,landmark,x,y,width,height,instances\na.jpg,head,190,52.5,70,91,1\n")
        >>> _read_landmark_table(table).positions_px.tolist()
        [[[190.0, 52.5]]]
    """
    table = read_table(Path(path), _REQUIRED, _KNOWN)
    if not len(table):
        raise ImageError(expected(f"at least one landmark in {path}", "no rows", "Add a row per image and landmark"))
    files = with_slashes(table.words("image"), lambda name: images is None or name in images)
    names, seen = table.words("landmark"), _visible(table)
    values = [table.numbers("x", rows=seen), table.numbers("y", rows=seen)]
    warnings = _warnings(table, values)
    values += [table.numbers(side, optional=True, least=0, rows=seen) for side in ("width", "height")]
    instances = [number if here else 0 for number, here in zip(_instances(table), seen, strict=True)]
    keys, landmarks = tuple(dict.fromkeys(files)), tuple(sorted(set(names)))
    row_of, column_of = _numbered(keys), _numbered(landmarks)
    found = np.full((len(keys), len(landmarks), 4), np.nan, dtype=np.float32)
    times: Counter[tuple[str, str]] = Counter()
    for image, name, number, *place in zip(files, names, instances, *values, strict=True):
        times[image, name] += number
        if number:
            found[row_of[image], column_of[name]] = place
    several = {pair: number for pair, number in times.items() if number > 1}
    for image, name in several:
        found[row_of[image], column_of[name]] = np.nan
    unused = tuple(UnusedPart(*pair, f"it is there {number} times") for pair, number in several.items())
    unknown = np.full((len(keys), 2), np.nan, dtype=np.float32)
    return PartTruth(landmarks, keys, found[:, :, :2], found[:, :, 2:], unknown, unused=unused, warnings=warnings)


def _likest(name: str, keys: Sequence[str]) -> str:
    """Return the image that is probably meant: of the same file name in another case or folder, else the likest."""
    file = name.casefold().rpartition("/")[2]
    same = (key for key in keys if key.casefold().rpartition("/")[2] == file)
    return next(same, None) or nearest(name, keys[:_COMPARED], 1)[0]


@dataclass(frozen=True, eq=False)
class FolderParts:
    """The parts of a folder with ``landmarks.csv``, and where ``masks/`` holds them their pixels.

    ``masks/LANDMARK/IMAGE.png`` has a folder for each landmark and a file for each image, named as the image with
    ``.png`` behind the whole name; pixels above 0 belong to the part. An image without a file does not show the part.
    """

    truth: PartTruth  # what the table says
    row_of: Mapping[str, int]  # the row of each image in ``source``
    source: Source  # the images, which say how large they are
    masks: Path | None  # the folder of the masks, None where no landmark has any

    @classmethod
    def of(cls, path: Path, keys: Sequence[str], source: Source) -> FolderParts:
        """Read a table of landmarks, and look for masks beside it.

        Raises:
            ImageError: see :func:`_read_landmark_table`; also when no landmark belongs to an image of the set.
        """
        masks, row_of = path.parent / MASK_FOLDER, _numbered(keys)
        truth = _read_landmark_table(path, row_of)
        strangers = [key for key in truth.keys if key not in row_of]
        if len(strangers) == len(truth.keys):
            got = f"only others, such as {truth.keys[0]!r}"
            remedy = f"Write names like {_likest(truth.keys[0], keys)!r}"
            raise ImageError(expected(f"images of the set in {path}", got, remedy))
        if strangers:
            like = [f"{key} (nearest: {_likest(key, keys)})" for key in strangers[:_NAMED]]
            shown = listed([*like, *strangers[_NAMED:]], _NAMED)
            said = f"{path.name} has landmarks of {len(strangers)} images that are not there: {shown}"
            truth = replace(truth, warnings=(*truth.warnings, said))
        drawn = any((masks / name).is_dir() for name in truth.landmarks)
        return cls(truth, row_of, source, masks if drawn else None)

    def __call__(self, keys: Sequence[str]) -> PartTruth:
        """Return the parts of some images, with the size of every image that has one."""
        rows = self.truth.for_keys(keys)
        marked = np.flatnonzero(np.isfinite(rows.positions_px).any(axis=(1, 2))).tolist()
        for index, size in zip(marked, parallel(lambda index: self._size_px(keys[index]), marked), strict=True):
            rows.image_size_px[index] = size
        return rows if self.masks is None else replace(rows, masks=self.masks_of)

    def _size_px(self, key: str) -> tuple[float, float]:
        try:
            return self.source.size_px(self.row_of[key])
        except ImageError:  # a file that cannot be read has no known size; readable() reports it by name
            return np.nan, np.nan

    def masks_of(self, key: str) -> dict[str, BoolArray]:
        """Return the pixels of every part of one image, boolean ``[row, col]``.

        Raises:
            ImageError: a mask cannot be read, or is of another size than the image.
        """
        width, height = self.source.size_px(self.row_of[key])
        found = {}
        for name in self.truth.landmarks:
            path = (self.masks or Path()) / name / f"{key}.png"
            if not path.is_file():
                found[name] = np.zeros((height, width), dtype=np.bool_)
                continue
            try:
                with Image.open(path) as picture:
                    found[name] = np.asarray(picture.convert("L")) > 0
            except OSError as error:
                raise ImageError(expected(f"a mask that can be read at {path}", str(error), "Draw it again")) from error
            if found[name].shape != (height, width):
                got = f"{found[name].shape[1]}x{found[name].shape[0]}"
                raise ImageError(expected(f"a mask of {width}x{height} pixels at {path}", got, "Draw it at that size"))
        return found
