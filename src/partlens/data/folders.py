"""Folders of images: which files they hold, what the sub-folders say, and what is passed over."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from partlens.data.tables import LANDMARK_TABLE, MASK_FOLDER, read_table, table_in
from partlens.errors import ImageError, expected, listed
from partlens.run import EXPLAINER, INSPECTION, SELECTION

_PHOTOS = (".apng", ".avif", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".tif", ".tiff", ".webp")
_RARER = (".bmp", ".dib", ".j2k", ".jp2", ".jpf", ".jpx", ".pbm", ".pgm", ".pnm", ".ppm", ".tga")
SUFFIXES = frozenset((*_PHOTOS, *_RARER))

_SPLITS = {"training": "train", "testing": "test"}
_VALIDATION_FOLDERS = frozenset({"val", "valid", "validation"})
_SPLIT_FOLDERS = _VALIDATION_FOLDERS | {"train", "test"}
_TABLES = (".csv", ".tsv", ".parquet")
# What a folder of results holds; each begins with its schema.
_RECORDS = (EXPLAINER, SELECTION, INSPECTION, "explanation.json", "parts.json", "evaluation.json")
_OF_THE_SYSTEM = frozenset({"thumbs.db", "desktop.ini"})
_SHOWN = 3  # names of a kind in a remark
_KINDS = 8


def split_names(texts: Iterable[str]) -> list[str]:
    """Return our names of splits: ``train`` and ``test`` in any case, also as training and testing; others as written.

    What is called validation counts as ``test`` where there is no ``test``.

    Example:
        >>> split_names(["Train", "TESTING", "Extra", "val"]), split_names(["train", "Val"])
        (['train', 'test', 'Extra', 'val'], ['train', 'test'])
    """
    given = [(text, _SPLITS.get(text.casefold(), text.casefold())) for text in texts]
    found = [folded if folded in _SPLIT_FOLDERS else text for text, folded in given]
    rename = {} if "test" in found else dict.fromkeys(_VALIDATION_FOLDERS, "test")
    return [rename.get(name, name) for name in found]


def _is_result(folder: Path) -> bool:
    """Whether partlens wrote its results here, whose pictures are no photos of a category."""
    for name in _RECORDS:
        try:
            with (folder / name).open("rb") as file:
                if b'"partlens.' in file.read(200):
                    return True
        except OSError:
            continue
    return False


@dataclass
class _Walk:
    """What lies below a folder."""

    root: Path
    images: list[Path] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by ending
    results: list[str] = field(default_factory=list)
    parents: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        known = {table_in(self.root, LANDMARK_TABLE)}
        for parent, names in self._folders():
            self.parents.add(parent)
            for name in names:
                path = parent / name
                if path.suffix.lower() in SUFFIXES:
                    self.images.append(path)
                elif name.lower() not in _OF_THE_SYSTEM and path not in known:
                    self.others[path.suffix.lower() or "without ending"].append(path.relative_to(self.root).as_posix())

    def _folders(self) -> Iterator[tuple[Path, list[str]]]:
        """Yield folders and the files in them in a fixed order, following links but no circle of links."""
        seen: set[str] = set()
        masks = self.root / MASK_FOLDER if table_in(self.root, LANDMARK_TABLE).is_file() else None
        for where, folders, names in os.walk(self.root, followlinks=True):
            real, parent = os.path.realpath(where), Path(where)
            result = parent != self.root and _is_result(parent)
            if result:
                self.results.append(parent.relative_to(self.root).as_posix())
            if real in seen or parent == masks or result:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
            yield parent, sorted(name for name in names if not name.startswith("."))

    def remarks(self) -> tuple[str, ...]:
        """Say what is passed over."""
        found = [f"passed over the folders of results {listed(self.results, _SHOWN)}"] if self.results else []
        kinds = [f"{len(names)} {ending} ({listed(names, _SHOWN)})" for ending, names in sorted(self.others.items())]
        if kinds:
            found.append(f"passed over {listed(kinds, _KINDS)}")
        if converted := sorted({".heic", ".heif"} & set(self.others)):
            found.append(f"{', '.join(converted)} files are not read: save them as JPEG")
        if bare := self._bare():
            found.append(f"folders without an image that is read: {listed(bare)}")
        return (*found, *self._tables())

    def _bare(self) -> list[str]:
        """Name the folders below which no image lies, the outermost ones."""
        holding = {above for folder in {path.parent for path in self.images} for above in (folder, *folder.parents)}
        bare = [path for path in sorted(self.parents) if path not in holding and path.parent in holding]
        return [path.relative_to(self.root).as_posix() for path in bare]

    def _tables(self) -> Iterator[str]:
        """Name tables of images that are not read, such as that of a hub."""
        for name in (name for ending in _TABLES for name in self.others.get(ending, ()) if "/" not in name):
            try:
                read_table(self.root / name)
            except ImageError:
                continue  # of something else
            yield f"{name} names images and is not read: give {self.root / name} instead of the folder"


@dataclass(frozen=True)
class _FolderFiles:
    """The images below a folder, what their paths say of them, and remarks on what is not read."""

    files: tuple[Path, ...]  # in alphabetical order of folders and files
    categories: list[str] | None  # one for each file, None where the folders do not say them
    splits: list[str] | None  # likewise
    notes: tuple[str, ...]  # one sentence each


def image_files(path: Path) -> _FolderFiles:
    """List the images below a folder.

    Raises:
        ImageError: the folder does not exist or holds no image.
    """
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        raise ImageError(expected(f"a folder of images at {path}", got, "Check the path"))
    walk = _Walk(path)
    if not walk.images:
        got = "; ".join(("none", *walk.remarks()))
        remedy = f"Add files ending in {', '.join(sorted(SUFFIXES))}, or give another folder"
        raise ImageError(expected(f"images in {path}", got, remedy))
    parts = [file.relative_to(path).parts for file in walk.images]
    categories, splits = _categories_and_splits(parts)
    notes = (*walk.remarks(), *_doubts(path, parts, categories, splits))
    return _FolderFiles(tuple(walk.images), categories, splits, notes)


def _categories_and_splits(parts: Sequence[tuple[str, ...]]) -> tuple[list[str] | None, list[str] | None]:
    """Read category and split of each image off its path below the folder, None where it does not say them."""
    top = _top_folders(parts)
    sides = None if top is None else split_names(top)
    if sides is None or not {"train"} <= set(sides) <= _SPLIT_FOLDERS:
        return top, None
    return _top_folders([names[1:] for names in parts]), sides


def _top_folders(parts: Sequence[tuple[str, ...]]) -> list[str] | None:
    """Return the first folder of each path, None where a file lies in none."""
    return [names[0] for names in parts] if all(len(names) > 1 for names in parts) else None


def _doubts(
    path: Path, parts: Sequence[tuple[str, ...]], categories: list[str] | None, splits: list[str] | None
) -> Iterator[str]:
    """Say where folders may mean something else than what they are taken for."""
    if splits is None:
        yield from _sides_as_categories(Counter(categories or ()))
        yield from _inner_categories(path, parts)
    loose = sum(len(names) == 1 for names in parts)
    if 0 < loose < len(parts):
        there = sorted({names[0] for names in parts if len(names) > 1})
        yield f"no categories, since {loose} images lie beside the folders {listed(there)}: move them into folders"


def _sides_as_categories(tops: Iterable[str]) -> Iterator[str]:
    """Say that folders called train or test give no splits."""
    sides = [name for name in tops if split_names([name, "test"])[0] in {"train", "test"}]
    others = [name for name in tops if name not in sides]
    if sides:
        beside = f", since {listed(others)} lies beside" if others else ", since not both are there"
        yield f"the folders {listed(sides)} are taken for categories, not for splits{beside}"


def _inner_categories(path: Path, parts: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Say that all images lie in one folder, where it holds several that look like categories."""
    folder, rest = path, [*parts]
    while len({names[0] for names in rest}) == 1 and min(map(len, rest)) > 1:
        folder, rest = folder / rest[0][0], [names[1:] for names in rest]
    inner = {names[0] for names in rest if len(names) > 1}
    if folder != path and len(inner) > 1:
        yield f"all images lie in {folder}: give that folder for the categories {listed(sorted(inner))}"


_TEST_SHARE = 0.25


def split_of(photo: str) -> str:
    """Return the side on which a photo falls where no split was given.

    The first eight bytes of the SHA-256 of the name, read as a fraction of their range, decide: below 0.25
    the photo is for testing. So the side depends on the name alone, never on the order or number of the
    images, and all crops of one photo are on the same side.

    Example:
        >>> [split_of(name) for name in ("cat.jpg", "dog.jpg", "fox.jpg")]
        ['test', 'train', 'train']
    """
    digest = hashlib.sha256(photo.encode("utf-8", "surrogatepass")).digest()
    return "test" if int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64 else "train"


def filled_splits(splits: Sequence[str], photos: Sequence[str]) -> tuple[str, ...]:
    """Give every image without a split that of its photo group, by name where no crop of it has one."""
    given: dict[str, str] = {}
    crossing: list[str] = []
    for split, photo in zip(splits, photos, strict=True):
        if split and given.setdefault(photo, split) != split:
            crossing.append(photo)
    if crossing:
        got = f"crops in several splits of {listed(list(dict.fromkeys(crossing)))}"
        remedy = "Give every crop of a photo the same split, or omit the photo groups"
        raise ImageError(expected("all crops of a photo in one split", got, remedy))
    return tuple(split or given.get(photo) or split_of(photo) for split, photo in zip(splits, photos, strict=True))
