"""Images from files, tables, arrays or a generator, as one immutable list with categories and splits.

Nothing is decoded before it is read. Every image comes back as 8-bit RGB, whatever it was stored as.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from partlens.data.annotations import PartTruth
from partlens.data.cuts import Cuts, CutTruth
from partlens.data.files import Arrays, ByteArray, Chained, Files, Generated, Source, as_bytes, parallel
from partlens.data.folders import categories_and_splits, image_files
from partlens.data.listing import Crop, Landmarks, LeftOut, Listing
from partlens.data.splits import filled_splits
from partlens.data.tables import CATEGORY_COLUMNS, IMAGE_TABLE, read_table
from partlens.errors import ImageError, InputError, expected, listed, nearest


@dataclass(frozen=True)
class UnreadableImage:
    """An image that could not be decoded: its key, and the reason in words."""

    key: str
    reason: str


def _first_truth(first: ImageSet, keys: tuple[str, ...]) -> PartTruth:
    truth = first.part_truth
    assert truth is not None
    return truth.for_keys(keys)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An ordered, immutable list of images; made by one of the constructors below, never empty.

    Attributes:
        keys: unique names: the path relative to the folder or table, or a number for arrays.
        categories: what each image shows, ``""`` where unknown.
        splits: ``"train"``, ``"test"`` or the name that a table gives; filled by
            :func:`~partlens.data.splits.split_of` where not given.
        photos: the photo that each image was cut from (its own key where not given); a split never cuts a
            group.
        root: the folder of the files, None for arrays and generated images.
        name: what to call the set in reports.
        left_out: what a data set's reader did not list, such as objects without a box, and why.
        path: what :meth:`open` opened, with nothing else said; None for every other set, and for a choice of images.

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
    left_out: tuple[LeftOut, ...] = field(default=(), repr=False)
    path: Path | None = None

    def __post_init__(self) -> None:
        if not self.keys:
            raise ImageError(expected(f"at least one image in {self.name}", "none", "Add images"))
        if len(set(self.keys)) < len(self.keys):
            twice = [key for key, times in Counter(self.keys).items() if times > 1]
            raise ImageError(
                expected(
                    f"every image once in {self.name}",
                    f"{listed(twice)} more than once",
                    "Remove the repeated rows",
                )
            )

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
    ) -> ImageSet:
        count = len(keys)
        for what, values in (("categories", categories), ("splits", splits), ("photos", photos)):
            if values is not None and len(values) != count:
                raise ImageError(
                    expected(f"{count} {what}, one for each image", len(values), f"Give {what} in image order")
                )
        photo_of = [photo or key for photo, key in zip(photos or keys, keys, strict=True)]
        return cls(
            keys=tuple(keys),
            categories=tuple(categories or [""] * count),
            splits=filled_splits(splits or [""] * count, photo_of),
            photos=tuple(photo_of),
            root=root,
            name=name,
            _source=source,
            _rows=tuple(range(count)),
            _truth=truth,
        )

    @classmethod
    def open(
        cls, path: Path | str, *, crop: Crop = "box", margin_frac: float = 0.0, landmarks: Landmarks = "all"
    ) -> ImageSet:
        """Open a table, a data set in its own layout, a folder of images or a joined set, whichever ``path`` is.

        A ``.json`` file joins several sets (:mod:`partlens_papers.data.joined`); a ``.csv`` or ``.parquet`` file is
        read
        by :meth:`from_table`; a folder that holds ``images.csv`` by that table; a folder in one of
        :data:`partlens_papers.data.layouts.LAYOUTS` (CUB-200-2011, ILSVRC Animal-Part, Pascal-Part) by its reader and
        :meth:`from_listing`; any other folder by :meth:`from_folder`.
        ``landmarks.csv`` in the folder (beside ``images.csv``) becomes :attr:`part_truth`.

        Args:
            path: the table or folder.
            crop: in a data set with boxes, ``"box"`` gives one image per object, the content of its box, as
                the papers show objects to their networks; None gives whole photos. Tables and plain folders
                have no boxes: their images stay as they are.
            margin_frac: share of the box's width and height to add on each side, 0 or more; the photo ends it.
            landmarks: in a data set with its own parts, ``"all"`` of them or those that the ``"paper"``
                measures (head, back, tail of CUB; head, neck, torso of Pascal-Part).

        Raises:
            ImageError: nothing is there, the file is of another kind, or the content breaks a rule of the
                constructor or reader; also when not one landmark belongs to an image of the set.
            InputError: a value of ``crop``, ``margin_frac`` or ``landmarks`` that does not exist.
        """
        from partlens.data.opening import open_images  # it opens sets by the constructors below

        return open_images(path, crop, margin_frac, landmarks)

    @classmethod
    def from_listing(cls, listing: Listing, margin_frac: float = 0.0) -> ImageSet:
        """Use what a data set's reader has listed.

        Images are cut when they are read, and annotated parts move with them: a part whose centre the cut
        leaves outside becomes ``nan`` and stands in ``part_truth.unused``. No EXIF orientation is applied,
        since boxes and parts were measured on the pixels as stored.

        Args:
            listing: from a reader of :data:`partlens_papers.data.layouts.LAYOUTS`.
            margin_frac: share of the box's width and height to add on each side, 0 or more; the photo ends it.

        Raises:
            ImageError: repeated names, or crops of one photo in several splits.
            InputError: a margin below 0, or a margin around whole photos.
        """
        if not 0 <= margin_frac < float("inf"):
            raise InputError(expected("margin_frac >= 0", margin_frac, "Leave it out for boxes as annotated"))
        if margin_frac and not listing.cut:
            raise InputError(expected("margin_frac 0 with crop=None", margin_frac, 'Use crop="box" or no margin'))
        source = Cuts(Files(listing.files, turn=False), listing.windows(), margin_frac)
        images = cls._build(
            listing.keys,
            source,
            categories=listing.categories,
            splits=listing.splits,
            photos=listing.photos,
            root=listing.root,
            name=listing.root.resolve().name,
            truth=None if listing.truth is None else CutTruth(listing, source),
        )
        return images._replaced(left_out=listing.left_out)  # noqa: SLF001 -- same class

    @classmethod
    def from_folder(cls, path: Path | str) -> ImageSet:
        """List the images below a folder, in alphabetical order of folders and files.

        When every image lies in a sub-folder, the first sub-folder's name is the category; else all are
        ``""``. When the first sub-folders are called ``train`` and ``test`` (or ``val``, ``valid``,
        ``validation``, which count as test where there is no ``test``), they give the split, and the next
        level gives the categories. Hidden files and files with other endings than
        :data:`~partlens.data.folders.SUFFIXES` are passed over.

        Raises:
            ImageError: the folder does not exist or holds no image.
        """
        path = Path(path)
        files = image_files(path)
        parts = [file.relative_to(path).parts for file in files]
        categories, splits = categories_and_splits(parts)
        return cls._build(
            ["/".join(names) for names in parts],
            Files(files),
            categories=categories,
            splits=splits,
            root=path,
            name=path.resolve().name,
        )

    @classmethod
    def from_files(cls, paths: Iterable[Path | str]) -> ImageSet:
        """Read the given files, in their order; keys are the paths as given.

        Args:
            paths: image files; a repeated one is read once.

        Raises:
            ImageError: no path.
        """
        keys = list(dict.fromkeys(str(path) for path in paths))
        return cls._build(keys, Files(tuple(Path(key) for key in keys)), name="files")

    @classmethod
    def from_table(cls, path: Path | str, root: Path | str | None = None) -> ImageSet:
        """List the images that a CSV or Parquet table names.

        Args:
            path: table with a column ``image`` (path relative to ``root``), and optionally ``category`` (or
                ``class``, ``label`` or ``class_index``: the first of these that exists), ``split`` and
                ``photo``. Other columns are ignored. An empty cell is the same as a missing column.
            root: folder of the images; that of the table when left out.

        Raises:
            ImageError: the table is missing or of another kind, lacks the column ``image``, has no rows,
                names an image twice, or puts the crops of one photo into several splits.
        """
        path = Path(path)
        columns = read_table(path)
        keys = [key.replace("\\", "/") if os.sep == "\\" else key for key in columns["image"]]
        if "" in keys:
            raise ImageError(
                expected(f"a path in every row of {path}", f"none in row {keys.index('') + 2}", "Fill in the cell")
            )
        folder = Path(root) if root is not None else path.parent
        category = next((name for name in CATEGORY_COLUMNS if name in columns), None)
        return cls._build(
            keys,
            Files(tuple(folder / key for key in keys)),
            categories=columns[category] if category else None,
            splits=columns.get("split"),
            photos=columns.get("photo"),
            root=folder,
            name=folder.resolve().name if path.name == IMAGE_TABLE else path.stem,
        )

    @classmethod
    def from_arrays(
        cls,
        images: npt.NDArray[Any] | Sequence[npt.NDArray[Any]],
        categories: Sequence[str] | None = None,
        splits: Sequence[str] | None = None,
        photos: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> ImageSet:
        """Use arrays in memory.

        Args:
            images: ``[image, row, col, 3]``, or a list of ``[row, col, 3]`` of any sizes; uint8, or float
                from 0 to 1. One colour, ``[row, col]`` or ``[row, col, 1]``, is grey. uint8 arrays are kept,
                not copied.
            categories: what each image shows.
            splits: the side of each image, ``""`` where :func:`~partlens.data.splits.split_of` shall decide.
            photos: the photo that each image was cut from.
            name: what to call the set in reports.

        Raises:
            ImageError: a wrong shape or type, values outside 0 to 1 or ``nan`` among floats, lists of
                different lengths, or no image at all.
        """
        if isinstance(images, np.ndarray) and images.ndim < 3:
            raise ImageError(
                expected("shape [image, row, col, 3] for the images", str(images.shape), "Stack the images first")
            )
        ready = [as_bytes(np.asarray(image), f"image {index}") for index, image in enumerate(images)]
        return cls._build(
            [f"{index:06d}" for index in range(len(ready))],
            Arrays(ready),
            categories=None if categories is None else [str(category) for category in categories],
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
            recipe: text from which all images follow (with their positions); it stands for their content in
                :meth:`fingerprint`. When left out, the images are drawn and hashed.
            truth: gives the annotated parts of the images with these keys; called once, when first needed.
            name: what to call the set in reports.

        Raises:
            ImageError: lists of different lengths, repeated keys, or no image at all.
        """
        return cls._build(keys, Generated(draw, recipe), categories=categories, splits=splits, truth=truth, name=name)

    @classmethod
    def from_sets(cls, sets: Sequence[ImageSet], prefixes: Sequence[str], *, name: str) -> ImageSet:
        """Use several sets as one.

        Splits and photo groups stay as they are. Parts are those of the first set; images of the others have none.

        Args:
            sets: the sets, at least one.
            prefixes: what stands before the names of each further set's images and photos.
            name: what to call the set in reports.

        Raises:
            ImageError: no set, a number of prefixes that is not one less, or names that occur twice.
        """
        if len(sets) != len(prefixes) + 1:
            raise ImageError(
                expected(f"{len(sets) - 1} prefixes, one for each further set", len(prefixes), "Give them")
            )
        marked = list(zip(["", *prefixes], sets, strict=True))
        return cls._build(
            [mark + key for mark, images in marked for key in images.keys],
            Chained(tuple((images._source, images._rows) for images in sets)),  # noqa: SLF001 -- same class
            categories=[category for images in sets for category in images.categories],
            splits=[split for images in sets for split in images.splits],
            photos=[mark + photo for mark, images in marked for photo in images.photos],
            name=name,
            truth=partial(_first_truth, sets[0]) if sets[0]._truth is not None else None,  # noqa: SLF001 -- same class
        )

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

    def indices(
        self, category: str | None = None, split: str | None = None, exclude_category: str | None = None
    ) -> tuple[int, ...]:
        """Return the positions of the images that fulfil all the given conditions, possibly none.

        Args:
            category: keep only images of this category.
            split: keep only images of this split.
            exclude_category: leave out images of this category.

        Raises:
            ImageError: no image of the set has that category or split; the text names the nearest that
                exists.
        """
        for what, wanted, have in (
            ("category", category, self.categories),
            ("category", exclude_category, self.categories),
            ("split", split, self.splits),
        ):
            if wanted is not None and wanted not in have:
                options = sorted(set(have) - {""})
                raise ImageError(
                    expected(
                        f"a {what} of {self.name}",
                        f"{wanted!r}",
                        f"Choose one of {listed(nearest(wanted, options, 5))}"
                        if options
                        else "Sort the images into sub-folders, or add a column to the table",
                    )
                )
        return tuple(
            index
            for index in range(len(self))
            if (category is None or self.categories[index] == category)
            and (split is None or self.splits[index] == split)
            and (exclude_category is None or self.categories[index] != exclude_category)
        )

    def select(
        self, category: str | None = None, split: str | None = None, exclude_category: str | None = None
    ) -> ImageSet:
        """Return the images that fulfil all the given conditions, in the same order.

        Args:
            category: keep only images of this category.
            split: keep only images of this split.
            exclude_category: leave out images of this category.

        Raises:
            ImageError: no image of the set has that category or split, or none fulfils all conditions
                together (ask :meth:`indices` where that may happen).
        """
        chosen = self.indices(category, split, exclude_category)
        if not chosen:
            conditions = {"category": category, "split": split, "exclude_category": exclude_category}
            wanted = ", ".join(f"{name}={value!r}" for name, value in conditions.items() if value is not None)
            raise ImageError(expected(f"images of {self.name} with {wanted}", "none", "Add such images"))
        return self.take(chosen)

    def take(self, indices: Iterable[int]) -> ImageSet:
        """Return the images at these positions, in this order.

        Raises:
            ImageError: a position outside the set, one that stands twice, or no position at all.
        """
        chosen = [self._checked(index) for index in indices]
        return self._replaced(
            keys=tuple(self.keys[index] for index in chosen),
            categories=tuple(self.categories[index] for index in chosen),
            splits=tuple(self.splits[index] for index in chosen),
            photos=tuple(self.photos[index] for index in chosen),
            _rows=tuple(self._rows[index] for index in chosen),
            path=None,
        )

    def with_parts(self, truth: PartTruth) -> ImageSet:
        """Return the same images with other annotated parts.

        Args:
            truth: by the images' names; images that it lacks have no known parts.

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
        if not set(self.keys) & set(truth.keys):
            names = f"{listed(truth.keys)} for {listed(self.keys)}"
            raise ImageError(expected("parts of at least one of the images", names, "Use the images' own names"))
        return self._replaced(_truth=truth.for_keys)

    def _replaced(self, **changes: Any) -> ImageSet:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return ImageSet(**{**values, **changes})

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise ImageError(expected(f"a position from 0 to {len(self) - 1} in {self.name}", index, "Count from 0"))
        return int(index) % len(self)

    # Reading

    def read(self, index: int) -> Image.Image:
        """Decode one image to 8-bit RGB.

        The EXIF orientation is applied. Transparent pixels are composited on white. 16-bit values are divided
        by 257; 32-bit integer and float images are scaled from 0–1 (float), 0–255 or 0–65535, whichever range
        holds all their values, and are stretched from minimum to maximum otherwise. Colour profiles are not
        applied.

        Raises:
            ImageError: the position does not exist, or the file is missing or cannot be decoded; the text
                names it.
        """
        return self._source.read(self._rows[self._checked(index)])

    def size_px(self, index: int) -> tuple[int, int]:
        """Return width and height of one image as :meth:`read` gives it, from the file's header alone.

        Raises:
            ImageError: as :meth:`read`.
        """
        return self._source.size_px(self._rows[self._checked(index)])

    def readable(self, workers: int | None = None) -> tuple[ImageSet, tuple[UnreadableImage, ...]]:
        """Decode every image once and drop those that cannot be decoded.

        The cost is one decoding of each file, in a thread pool; nothing is kept. Arrays are not decoded.

        Args:
            workers: threads; one per core, at most 8, when left out.

        Returns:
            The readable images in the same order, and each dropped image with the reason.

        Raises:
            ImageError: not one image can be decoded.
        """
        if not self._source.may_fail():
            return self, ()

        def reason(index: int) -> str:
            try:
                self.read(index)
            except Exception as error:  # noqa: BLE001 -- a caller's generator may raise anything
                return str(error) or type(error).__name__
            return ""

        reasons = list(parallel(reason, range(len(self)), workers))
        good = [index for index, text in enumerate(reasons) if not text]
        bad = tuple(UnreadableImage(self.keys[index], text) for index, text in enumerate(reasons) if text)
        if not good:
            raise ImageError(
                expected(
                    f"at least one readable image in {self.name}",
                    f"{len(bad)} unreadable ones ({listed([image.key for image in bad])}; {bad[0].reason})",
                    "Give other images",
                )
            )
        return (self, ()) if not bad else (replace(self.take(good), path=self.path), bad)

    def digests(self, workers: int | None = None) -> tuple[str, ...]:
        """Return a text per image that is equal for equal content (of the file, and the box that is cut out).

        Args:
            workers: threads that read the files; one per core, at most 8, when left out.

        Raises:
            ImageError: a file is missing; the text names it.
        """
        return tuple(parallel(self._source.digest, self._rows, workers))

    def fingerprint(self, workers: int | None = None, *, contents: Sequence[str] | None = None) -> str:
        """Hash keys, categories, splits, photo groups, and the size and content of every image.

        Two sets have the same fingerprint when they list the same images in the same order, wherever the
        files lie.

        Args:
            workers: threads that read the files; one per core, at most 8, when left out.
            contents: what :meth:`digests` gave, where it was called already; no file is then read again.

        Returns:
            64 hexadecimal digits (SHA-256).

        Raises:
            ImageError: a file is missing; the text names it.
        """
        digest = hashlib.sha256()
        contents = self.digests(workers) if contents is None else contents
        for *texts, content in zip(self.keys, self.categories, self.splits, self.photos, contents, strict=True):
            for text in (*texts, content):
                encoded = text.encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()
