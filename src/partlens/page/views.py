"""What every chapter of the page is put together from: its head, its figures, filled templates, pictures."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from partlens.errors import RunError, expected
from partlens.estimate import Estimate
from partlens.page import notation
from partlens.records import Settings, plain
from partlens.run import RunRecord, Unreadable

LONGEST_PX = 1400
"""Longer side of an embedded picture; larger files are made smaller for the page and stay as they are in the run."""

LOSSLESS_BYTES = 24_000
"""Files up to this size are embedded byte for byte; larger ones as JPEG, so that many pictures make no huge page."""

JPEG_QUALITY = 88


@dataclass(frozen=True)
class Figure:
    """A drawn figure with its caption; ``svg`` is markup that is already escaped."""

    caption: str
    svg: str

    @classmethod
    def of(cls, caption: str, svg: str) -> Self | None:
        """Return the figure, ``None`` where nothing was drawn."""
        return cls(caption, svg) if svg else None


@dataclass(frozen=True)
class _Origin:
    """How to make a chapter's results again, and what its notes say."""

    title: str  # of the chapter
    command: str  # the command line; empty where the run was made from Python
    hashes: tuple[tuple[str, str], ...]  # (name, value) of what identifies the inputs
    details: tuple[tuple[str, list[tuple[str, str]]], ...]  # (title, pairs) of versions and settings
    notes: tuple[str, ...]  # remarks
    unreadable: tuple[Unreadable, ...]  # photos that could not be read


def origin(
    title: str,
    record: RunRecord,
    config: Settings,
    *further: tuple[str, list[tuple[str, str]]],
    identity: tuple[str, str] | None = None,
    notes: Iterable[str] = (),
) -> _Origin:
    """Say how a run is made again; ``further`` details and notes are the chapter's own."""
    return _Origin(
        title=title,
        command=record.command,
        hashes=(
            ("weights (SHA-256)", record.performer.weights_sha256),
            ("data fingerprint", record.data.fingerprint),
            identity or ("identity", record.identity),
        ),
        details=(
            ("Versions", pairs(record.versions)),
            ("Configuration", pairs(plain(config))),
            *further,
            ("Preprocessing", pairs(record.performer.preprocessing)),
        ),
        notes=(*record.performer.notes, *notes),
        unreadable=record.data.unreadable,
    )


@dataclass(frozen=True)
class Chapter:
    """A chapter of the page."""

    kind: str  # ``inspection``, ``selection``, ``explanation``, ``explainer`` or ``parts``; which template draws it
    anchor: str  # its id
    title: str  # its heading
    sections: tuple[tuple[str, str], ...]  # (anchor, title) for the table of contents
    headline: str = ""  # its result in a sentence or two; may be empty
    page_title: str = ""  # of a page that has no other chapter
    facts: tuple[tuple[str, str], ...] = ()  # (name, value) of what it is about
    origin: _Origin | None = None  # how its results are made again, where it has a run of its own


def count_of(measure: Estimate) -> str:
    """Say how many units a number was measured on."""
    return f"n = {measure.n:,} {measure.unit}"


def pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a mapping of a manifest as (key, written value)."""
    return [(str(key), notation.plain(value)) for key, value in values.items()]


@cache
def environment() -> Environment:
    """Return the templates of this package: every text is escaped, an unknown name is an error."""
    made = Environment(
        loader=PackageLoader("partlens.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        number=notation.number,
        plain=notation.plain,
        counted=notation.counted,
        rate=notation.rate,
        percent=notation.percent,
        percent_digits=notation.percent_digits,
        short_name=notation.short_name,
        count_of=count_of,
    )
    return made


@dataclass(frozen=True)
class Embedded:
    """A picture as a page carries it."""

    uri: str  # the whole picture as a ``data:`` address
    width_px: int  # width in the file, before it was made smaller for the page
    height_px: int  # height likewise


class Pictures:
    """The pictures of one page, read from one folder and counted.

    Args:
        root: no picture is read from outside this folder, nor from outside those admitted later.
        remedy: what to do where a picture is missing or damaged.
        limit_bytes: how many characters of ``data:`` addresses the page may hold.
    """

    def __init__(self, root: Path, remedy: str, limit_bytes: int) -> None:
        self.root = root.resolve()
        self.remedy = remedy
        self.limit_bytes = limit_bytes
        self.spent_bytes = 0
        self._roots = {self.root}
        self._kept: dict[Path, Embedded] = {}

    def admit(self, root: Path) -> None:
        """Allow pictures of another folder too."""
        self._roots.add(root.resolve())

    def path(self, folder: Path, name: str) -> Path:
        """Return a picture's path.

        Raises:
            RunError: it is missing, or lies outside the root.
        """
        path = (folder / name).resolve()
        if not any(path.is_relative_to(root) for root in self._roots):
            raise RunError(expected(f"a picture inside {self.root}", name, self.remedy))
        if not path.is_file():
            raise RunError(expected(f"a picture {path}", "nothing there", self.remedy))
        return path

    def read(self, folder: Path, name: Any) -> Embedded | None:
        """Return a picture, ``None`` where none is named.

        Raises:
            RunError: it is missing, damaged, no PNG or JPEG, or lies outside the root.
        """
        if not isinstance(name, str) or not name:
            return None
        path = self.path(folder, name)
        if path not in self._kept:
            self._kept[path] = _embedded(path, self.remedy)
        picture = self._kept[path]
        self.spent_bytes += len(picture.uri)
        return picture

    def check_room(self) -> None:
        """Refuse pictures that are together too large for a page.

        Raises:
            RunError: they are; pictures that partlens drew never come near it.
        """
        if self.spent_bytes > self.limit_bytes:
            rule = f"pictures of at most {self.limit_bytes / 1e6:.0f} MB for the page of {self.root}"
            raise RunError(expected(rule, f"{self.spent_bytes / 1e6:.0f} MB", self.remedy))

    def fit(self, folder: Path, names: Iterable[Any]) -> bool:
        """Tell whether more pictures have room; each is read for it, as what counts is their size on the page.

        Raises:
            RunError: as :meth:`read`.
        """
        before = self.spent_bytes
        for name in names:
            self.read(folder, name)
        fits, self.spent_bytes = self.spent_bytes <= self.limit_bytes, before
        return fits


def _embedded(path: Path, remedy: str) -> Embedded:
    try:
        content = path.read_bytes()
        # A picture of more pixels than Pillow's limit is none of ours; it would only warn, and take gigabytes.
        with (
            warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image,
        ):
            kind = "image/png" if image.format == "PNG" else "image/jpeg"
            image.load()
            width, height = image.size
            loaded = image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RunError(expected(f"a PNG or JPEG picture in {path}", str(error), remedy)) from error
    if max(width, height) > LONGEST_PX or len(content) > LOSSLESS_BYTES:
        content, kind = _smaller(loaded)
    return Embedded(f"data:{kind};base64,{base64.b64encode(content).decode()}", width, height)


def _smaller(shown: Any) -> tuple[bytes, str]:
    """Return a picture's bytes for the page: no side above the limit; JPEG, or PNG where it is transparent."""
    shown.thumbnail((LONGEST_PX, LONGEST_PX))
    buffer = io.BytesIO()
    if shown.mode in {"RGBA", "LA", "PA"} or "transparency" in shown.info:
        shown.save(buffer, "PNG", optimize=True)
        return buffer.getvalue(), "image/png"
    shown.convert("RGB").save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue(), "image/jpeg"
