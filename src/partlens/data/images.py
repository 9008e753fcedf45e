"""Images from files, tables, arrays or a generator, as one immutable list with categories and splits.

Nothing is decoded before it is read. Every image comes back as 8-bit RGB, whatever it was stored as.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from partlens.data.annotations import FolderParts, PartTruth
from partlens.data.files import Arrays, Box, ByteArray, Files, Generated, Scaled, Source, as_bytes, parallel, pictures
from partlens.data.folders import filled_splits, image_files, split_names
from partlens.data.tables import IMAGE_TABLE, LANDMARK_TABLE, category_cells, read_table, table_in, with_slashes
from partlens.errors import ImageError, InputTypeError, expected, listed, nearest, printable
from partlens.run import Unreadable


def _checked_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputTypeError(expected("a path", type(path).__name__, "Give a text or a pathlib.Path"))
    return Path(path)


def _listed(values: Any, what: str) -> Sequence[Any]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__") or not hasattr(values, "__getitem__"):
        raise InputTypeError(expected(f"a list of {what}, one for each image", repr(values), "Give a list of names"))
    return list(values)


def _check_names(what: str, values: Any, count: int) -> None:
    if values is None:
        return
    wrong = [value for value in _listed(values, what) if not isinstance(value, str)]
    if wrong:
        raise InputTypeError(expected(f"texts as {what}", repr(wrong[0]), "Write each as a text"))
    if len(values) != count:
        rule = f"{count} {what}, one for each image"
        raise ImageError(expected(rule, len(values), f"Give {what} in image order"))


def _gathered(remarks: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Return a sentence for each remark that was made of images, with their number and some of their names."""
    of: dict[str, list[str]] = {}
    for text, key in remarks:
        of.setdefault(text, []).append(key)
    return tuple(f"{len(keys)} images {text}: {listed(keys, 3)}" for text, keys in of.items() if text)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An ordered, immutable list of images; made by one of the constructors below, never empty.

    Attributes:
        keys: unique names: the path relative to the folder or table, or a number for arrays.
        categories: what each image shows, ``""`` where unknown.
        splits: ``"train"``, ``"test"`` or the name that a table gives; filled by
            :func:`~partlens.data.folders.split_of` where not given.
        photos: the photo that each image was cut from (its own key where not given); a split never cuts a
            group.
        root: the folder of the files, None for arrays and generated images.
        name: what to call the set in reports.
        path: what :meth:`open` opened; None for every other set, and for a choice of images.
        notes: what of the folder or table is not used, one sentence each.

    Example:
        >>> import numpy as np
        >>> images = ImageSet.from_arrays(np.zeros((3, 8, 9, 3), np.uint8), categories=["cat", "cat", "fox"])
        >>> images.keys, len(images.select("cat")), images.read(0).size
        (('000000', '000001', '000002'), 2, (9, 8))
    """

    keys: tuple[str, ...]
    categories: tuple[str, ...]
    splits: tuple[str, ...]
    photos: tuple[str, ...]
    root: Path | None
    name: str
    _source: Source = field(repr=False)
    _rows: tuple[int, ...] = field(repr=False)
    _truth: Callable[[tuple[str, ...]], PartTruth] | None = field(default=None, repr=False)
    path: Path | None = None
    notes: tuple[str, ...] = ()
    _known_digests: tuple[str, ...] | None = field(default=None, repr=False)  # set once every image was decoded

    def __post_init__(self) -> None:
        if not self.keys:
            raise ImageError(expected(f"at least one image in {self.name}", "none", "Add images"))
        if len(set(self.keys)) < len(self.keys):
            twice = [key for key, times in Counter(self.keys).items() if times > 1]
            got = f"{listed(twice)} more than once"
            raise ImageError(expected(f"every image once in {self.name}", got, "Remove the repeated rows"))

    # Constructors

    @classmethod
    def _build(
        cls,
        keys: Sequence[str],
        source: Source,
        *,
        categories: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
        photos: Sequence[str] | None = None,
        root: Path | None = None,
        name: str,
        truth: Callable[[tuple[str, ...]], PartTruth] | None = None,
        notes: tuple[str, ...] = (),
    ) -> ImageSet:
        keys, count = [printable(key) for key in keys], len(keys)
        for what, values in (("categories", categories), ("splits", splits), ("photos", photos)):
            _check_names(what, values, count)
        photo_of = [photo or key for photo, key in zip(photos or keys, keys, strict=True)]
        return cls(
            keys=tuple(keys),
            categories=tuple(map(printable, categories or [""] * count)),
            splits=filled_splits(splits or [""] * count, photo_of),
            photos=tuple(photo_of),
            root=root,
            name=printable(name),
            _source=source,
            _rows=tuple(range(count)),
            _truth=truth,
            notes=notes,
        )

    @classmethod
    def open(cls, path: Path | str) -> ImageSet:
        """Open a table or a folder of images, whichever ``path`` is.

        A ``.csv``, ``.tsv`` or ``.parquet`` file is read by :meth:`from_table`; a folder that holds ``images.csv`` by
        that table; any other folder by :meth:`from_folder`. ``landmarks.csv`` in the folder becomes :attr:`part_truth`,
        with the parts' pixels where its folder ``masks/`` holds them
        (:class:`~partlens.data.annotations.FolderParts`).

        Args:
            path: the table or folder.

        Raises:
            ImageError: nothing is there, the file is of another kind, or the content breaks a rule of the
                constructor; also when not one landmark belongs to an image of the set.
        """
        path = _checked_path(path)
        table = table_in(path, IMAGE_TABLE) if path.is_dir() else path
        images = cls.from_table(table) if table.is_file() or not path.is_dir() else cls.from_folder(path)
        landmarks = table_in(table.parent, LANDMARK_TABLE)
        if landmarks.is_file() and (path.is_dir() or path.name.casefold() == IMAGE_TABLE):
            images = replace(images, _truth=FolderParts.of(landmarks, images.keys, images._source))  # noqa: SLF001
        elif landmarks.is_file():
            said = f"{landmarks.name} is not read, since the table beside it is not called {IMAGE_TABLE}"
            images = replace(images, notes=(*images.notes, said))
        return replace(images, path=path.resolve())

    @classmethod
    def from_folder(cls, path: Path | str) -> ImageSet:
        """List the images below a folder, in alphabetical order of folders and files.

        When every image lies in a sub-folder, the first sub-folder's name is the category; else all are
        ``""``. When the first sub-folders are called ``train`` and ``test`` (or ``val``, ``valid``,
        ``validation``, which count as test where there is no ``test``) in any case, they give the split, and the next
        level gives the categories. Hidden files, files with other endings than
        :data:`~partlens.data.folders.SUFFIXES`, folders of partlens's own results and, next to ``landmarks.csv``, the
        folder ``masks`` are passed over; :attr:`notes` says what.

        Raises:
            ImageError: the folder does not exist or holds no image.
        """
        path = _checked_path(path)
        found = image_files(path)
        return cls._build(
            [file.relative_to(path).as_posix() for file in found.files],
            Files(found.files, (None,) * len(found.files)),
            categories=found.categories,
            splits=found.splits,
            root=path,
            name=path.resolve().name,
            notes=found.notes,
        )

    @classmethod
    def from_files(cls, paths: Iterable[Path | str]) -> ImageSet:
        """Read the given files, in their order; keys are the paths as given.

        Args:
            paths: image files; a repeated one is read once.

        Raises:
            ImageError: no path.
        """
        keys = list(dict.fromkeys(str(_checked_path(path)) for path in paths))
        return cls._build(keys, Files(tuple(Path(key) for key in keys), (None,) * len(keys)), name="files")

    @classmethod
    def from_table(cls, path: Path | str, root: Path | str | None = None) -> ImageSet:
        """List the images that a CSV or Parquet table names.

        =====================================  ===================================================================
        ``image``                              the image's name, and its file relative to ``root``
        ``file``                               its file, where several images are cut out of one
        ``left``, ``top``, ``right``,          the box to which the photo is cut, in pixels as stored, from the top
        ``bottom``                             left corner; no EXIF orientation is then applied
        ``category``                           what it shows (or ``class``, ``label``, ``class_index``: the first of
                                               these that exists)
        ``split``                              ``train`` or ``test``; validation counts as ``test`` where there is none
        ``photo``                              the photo that it was cut from; a split never cuts a group
        =====================================  ===================================================================

        Only ``image`` is needed (``file_name`` does as well). An empty cell is the same as a missing column; other
        columns are not used, and :attr:`notes` names them. Names of columns and of ``train`` and ``test`` are taken in
        any case.

        Args:
            path: the table.
            root: folder of the images; by default that of the table.

        Raises:
            ImageError: the table is missing or of another kind, lacks the column ``image``, has no rows, names an
                image twice, has half a box, or puts the crops of one photo into several splits.
        """
        path = _checked_path(path)
        table = read_table(path)
        folder = Path(root) if root is not None else path.parent

        def there(name: str) -> bool:
            return (folder / name).exists()

        keys = with_slashes(table.words("image"), there)
        files = with_slashes(table.columns.get("file", keys), there)
        splits = table.columns.get("split")
        return cls._build(
            keys,
            Files(tuple(folder / (file or key) for file, key in zip(files, keys, strict=True)), table.boxes()),
            categories=category_cells(table),
            splits=None if splits is None else split_names(splits),
            photos=table.columns.get("photo"),
            root=folder,
            name=folder.resolve().name if path.name.casefold() == IMAGE_TABLE else path.stem,
            notes=table.remarks(),
        )

    @classmethod
    def from_arrays(
        cls,
        images: npt.NDArray[Any] | Sequence[npt.NDArray[Any] | Image.Image],
        categories: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
        photos: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> ImageSet:
        """Use arrays in memory.

        Args:
            images: ``[image, row, col, 3]``, or a list of ``[row, col, 3]`` of any sizes; uint8, or float
                from 0 to 1. One colour, ``[row, col]`` or ``[row, col, 1]``, is grey. uint8 arrays are kept,
                not copied. Pillow's images of any mode may be among the list.
            categories: what each image shows.
            splits: the side of each image, ``""`` where :func:`~partlens.data.folders.split_of` shall decide.
            photos: the photo that each image was cut from.
            name: what to call the set in reports.

        Raises:
            ImageError: a wrong shape or type, values outside 0 to 1 or ``nan`` among floats, lists of
                different lengths, or no image at all.
            InputTypeError: something that is no images, or names that are no texts.
        """
        ready = [as_bytes(image, f"image {index}") for index, image in enumerate(pictures(images))]
        return cls._build(
            [f"{index:06d}" for index in range(len(ready))],
            Arrays(ready),
            categories=None
            if categories is None
            else [str(category) for category in _listed(categories, "categories")],
            splits=splits,
            photos=photos,
            name=name,
        )

    @classmethod
    def from_generator(
        cls,
        draw: Callable[[int], ByteArray],
        keys: Sequence[str],
        categories: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
        *,
        recipe: str = "",
        truth: Callable[[tuple[str, ...]], PartTruth] | None = None,
        name: str = "generated",
    ) -> ImageSet:
        """Use images that a function draws when they are read.

        Args:
            draw: gives, for a position in ``keys``, a uint8 array ``[row, col, 3]``; the same one every time.
                Make it a picklable object if worker processes shall read the images.
            keys: one name per image.
            categories: what each image shows.
            splits: the side of each image.
            recipe: text from which all images follow (with their positions); it replaces their content in
                :meth:`fingerprint`. Without it, the images are drawn and hashed.
            truth: gives the annotated parts of the images with these keys; called once, when first needed.
            name: what to call the set in reports.

        Raises:
            ImageError: lists of different lengths, repeated keys, or no image at all.
        """
        return cls._build(keys, Generated(draw, recipe), categories=categories, splits=splits, truth=truth, name=name)

    # Looking at the list

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.keys)

    @cached_property
    def part_truth(self) -> PartTruth | None:
        """Annotated parts, one row per image of this set and in its order; None where the set has none."""
        return None if self._truth is None else self._truth(self.keys).for_keys(self.keys)

    def category_counts(self) -> dict[str, int]:
        """Return the number of images of each category, categories in alphabetical order."""
        return dict(sorted(Counter(self.categories).items()))

    @property
    def files(self) -> tuple[Path, ...]:
        """The file of each image; empty for arrays and generated images."""
        return tuple(self._source.paths[row] for row in self._rows) if isinstance(self._source, Files) else ()

    @property
    def boxes_px(self) -> tuple[Box | None, ...]:
        """Left, top, right and bottom edge to which each image's file is cut, None where it is shown whole."""
        if not isinstance(self._source, Files):
            return (None,) * len(self)
        return tuple(self._source.boxes[row] for row in self._rows)

    def indices(self, category: str | None = None, split: str | None = None) -> tuple[int, ...]:
        """Return the positions of the images that fulfil all the given conditions, possibly none.

        Raises:
            ImageError: no image of the set has that category or split; the text names the nearest that exists.
        """
        for what, wanted, have in (("category", category, self.categories), ("split", split, self.splits)):
            if wanted is not None and wanted not in have:
                options = sorted(set(have) - {""})
                remedy = "Sort the images into sub-folders, or add a column to the table"
                if wanted in {"train", "test"} and what == "split":
                    remedy = f"There are {listed(options)}: write train and test in the column split, or as folders"
                elif options:
                    remedy = f"Choose one of {listed(nearest(wanted, options, 5))}"
                raise ImageError(expected(f"a {what} of {self.name}", repr(wanted), remedy))
        return tuple(
            index
            for index, (own, side) in enumerate(zip(self.categories, self.splits, strict=True))
            if category in {None, own} and split in {None, side}
        )

    def rows_of(self, categories: Sequence[str], split: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the positions of the photos of some categories in a split, and those of all others there.

        ``""`` alone means all photos as one, without others.

        Raises:
            ImageError: an unknown split or category, or one of several categories without photos in the split.

        Example:
            >>> import numpy as np
            >>> kinds, sides = ["cat", "fox", "cow", "cat"], ["test", "test", "test", "train"]
            >>> photos = ImageSet.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), kinds, sides)
            >>> photos.rows_of(["cat", "cow"], "test"), photos.rows_of([""], "test")
            (((0, 2), (1,)), ((0, 1, 2), ()))
        """
        inside = self.indices(split=split)
        if tuple(categories) == ("",):
            return inside, ()
        there = {self.categories[row] for row in inside}
        for name in categories:
            self.indices(name)  # refuses an unknown category
            if len(categories) > 1 and name not in there:
                remedy = "Add photos of it or choose other categories"
                raise ImageError(expected(f"photos of {name} in the split {split}", "none", remedy))
        own = tuple(row for row in inside if self.categories[row] in categories)
        return own, tuple(sorted({*inside} - {*own}))

    def select(self, category: str | None = None, split: str | None = None) -> ImageSet:
        """Return the images that fulfil all the given conditions, in the same order.

        Raises:
            ImageError: no image of the set has that category or split, or none fulfils all conditions
                together (ask :meth:`indices` where that may happen).
        """
        chosen = self.indices(category, split)
        if not chosen:  # each of the two has some
            rule = f"images of {self.name} with category={category!r}, split={split!r}"
            raise ImageError(expected(rule, "none", "Add such images"))
        return self.take(chosen)

    def take(self, indices: Iterable[int]) -> ImageSet:
        """Return the images at these positions, in this order.

        Raises:
            ImageError: a position outside the set, one that occurs twice, or no position at all.
        """
        chosen = [self._checked(index) for index in indices]
        known = self._known_digests
        return replace(
            self,
            keys=tuple(self.keys[index] for index in chosen),
            categories=tuple(self.categories[index] for index in chosen),
            splits=tuple(self.splits[index] for index in chosen),
            photos=tuple(self.photos[index] for index in chosen),
            _rows=tuple(self._rows[index] for index in chosen),
            path=None,
            _known_digests=None if known is None else tuple(known[index] for index in chosen),
        )

    def with_parts(self, truth: PartTruth) -> ImageSet:
        """Return the same images with other annotated parts.

        Images that ``truth`` lacks have no known parts.

        Raises:
            ImageError: no image of the set is in it.

        Example:
            >>> import numpy as np
            >>> position, unknown = np.array([[[4.0, 5.0]]]), np.full((1, 1, 2), np.nan)
            >>> truth = PartTruth(("head",), ("000001",), position, unknown, unknown[:, 0])
            >>> photos = ImageSet.from_arrays(np.zeros((2, 8, 8, 3), np.uint8)).with_parts(truth)
            >>> photos.part_truth.count()
            {'head': 1}
        """
        if not isinstance(truth, PartTruth):
            raise InputTypeError(expected("a PartTruth", type(truth).__name__, "Build one, or read landmarks.csv"))
        if not set(self.keys) & set(truth.keys):
            names = f"{listed(truth.keys)} for {listed(self.keys)}"
            raise ImageError(expected("parts of at least one of the images", names, "Use the images' own names"))
        return replace(self, _truth=truth.for_keys)

    def _checked(self, index: int) -> int:
        if not isinstance(index, (int, np.integer)):
            raise InputTypeError(expected("a position as a whole number", repr(index), "Count from 0"))
        if not -len(self) <= index < len(self):
            raise ImageError(expected(f"a position from 0 to {len(self) - 1} in {self.name}", index, "Count from 0"))
        return int(index) % len(self)

    # Reading

    def read(self, index: int, scaled: Scaled | None = None) -> Image.Image:
        """Decode one image to 8-bit RGB.

        Args:
            index: its position.
            scaled: optional, to which size an image of a size will be scaled
                (:meth:`~partlens.network.preprocessing.Preprocessing.scaled_size`). A JPEG that is at least four times
                as large is then decoded at a half, quarter or eighth of its size, at least twice that size. The scaled
                image of a photograph differs by less than half a level of 255 on average, by at most 6 anywhere; that
                of random dots in full colours by up to 6 on average.

        The EXIF orientation is applied. Transparent pixels are composited on white. Grey images of 16 and 32 bits
        are scaled from 0–1 (float alone), 0–255, 0–1023, 0–4095 or 0–65535, the least range that holds all their
        values, and are stretched from minimum to maximum otherwise; :meth:`readable` notes the range. Colour profiles
        are not applied.

        Raises:
            ImageError: the position does not exist, or the file is missing or cannot be decoded; the text
                names it.
        """
        return self._source.read(self._rows[self._checked(index)], scaled)

    def size_px(self, index: int) -> tuple[int, int]:
        """Return width and height of one image as :meth:`read` gives it, from the file's header alone.

        Raises:
            ImageError: as :meth:`read`.
        """
        return self._source.size_px(self._rows[self._checked(index)])

    def readable(self) -> tuple[ImageSet, tuple[Unreadable, ...]]:
        """Decode and hash every image once, each file read once, and drop those that cannot be decoded.

        The set that comes back knows its images' :meth:`digests`, as do choices of it, so no verb reads the files
        again to hash them; asked again, it answers at once. No pixels are kept.

        Returns:
            The readable images in the same order, and each dropped image with the reason.

        Raises:
            ImageError: not one image can be decoded.
        """
        if self._known_digests is not None:
            return self, ()

        def seen(row: int) -> tuple[str, str, str]:
            try:
                return *self._source.checked(row), ""
            except Exception as error:  # noqa: BLE001 -- a caller's generator may raise anything
                return "", "", str(error) or type(error).__name__

        found = list(parallel(seen, self._rows))
        good = [index for index, (digest, _, _) in enumerate(found) if digest]
        bad = tuple(Unreadable(key=self.keys[k], reason=found[k][2]) for k in sorted({*range(len(found))} - {*good}))
        if not good:
            got = f"{len(bad)} unreadable ones ({listed([image.key for image in bad])}; {bad[0].reason})"
            raise ImageError(expected(f"at least one readable image in {self.name}", got, "Give other images"))
        said = _gathered((found[index][1], self.keys[index]) for index in good)
        known = tuple(found[index][0] for index in good)
        readable = self.take(good) if bad else self
        return replace(readable, path=self.path, notes=(*self.notes, *said), _known_digests=known), bad

    @cached_property
    def _digests(self) -> tuple[str, ...]:
        return self._known_digests or tuple(parallel(self._source.digest, self._rows))

    def digests(self) -> tuple[str, ...]:
        """Return a text per image that is equal for equal content (of the file, and the box that is cut out).

        The files are read once, here or in :meth:`readable`: a set holds its images as they were then.

        Raises:
            ImageError: a file is missing; the text names it.
        """
        return self._digests

    def fingerprint(self) -> str:
        """Hash keys, categories, splits, photo groups, and the size and content of every image.

        Two sets have the same fingerprint when they list the same images in the same order, wherever the
        files lie.

        Returns:
            64 hexadecimal digits (SHA-256).

        Raises:
            ImageError: a file is missing; the text names it.
        """
        digest = hashlib.sha256()
        for texts in zip(self.keys, self.categories, self.splits, self.photos, self._digests, strict=True):
            for text in texts:
                encoded = text.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()
