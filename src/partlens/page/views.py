"""Pieces that every chapter of the page is put together from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from partlens.page.reading import Embedded


@dataclass(frozen=True)
class Figure:
    """A drawn figure with its caption; ``svg`` is markup that is already escaped."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Origin:
    """How to make a chapter's results again.

    Attributes:
        title: of the chapter.
        command: the command line; empty where the run was made from Python.
        hashes: (name, value) of what identifies the inputs.
        details: (title, pairs) of versions and settings.
    """

    title: str
    command: str
    hashes: tuple[tuple[str, str], ...]
    details: tuple[tuple[str, list[tuple[str, str]]], ...]


@dataclass(frozen=True)
class Remarks:
    """What a chapter's notes say: remarks, and (key, reason) of photos that could not be read."""

    title: str
    notes: tuple[str, ...]
    unreadable: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Chapter:
    """A chapter of the page.

    Attributes:
        kind: ``selection``, ``explanation``, ``explainer`` or ``parts``; which template draws it.
        anchor: its id.
        title: its heading.
        headline: its result in a sentence or two; may be empty.
        facts: (name, value) of what it is about.
        sections: (anchor, title) for the table of contents.
    """

    kind: str
    anchor: str
    title: str
    headline: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Shown:
    """A picture with its words; ``small`` ones are drawn without smoothing."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str

    @property
    def small(self) -> bool:
        """Whether the picture has fewer pixels than it is shown with."""
        return max(self.width, self.height) < 64


def shown(picture: Embedded | None, alt: str, caption: str) -> Shown | None:
    """Put a picture and its words together, ``None`` where there is no picture."""
    return Shown(picture.uri, picture.width_px, picture.height_px, alt, caption) if picture else None


State = Literal["good", "caution", "warning", "unknown"]


@dataclass(frozen=True)
class Verdict:
    """One thing that a reader must know before believing the numbers.

    Attributes:
        key: a stable name.
        state: ``good``, ``caution``, ``warning`` or ``unknown``.
        title: two or three words.
        words: one or two plain sentences.
    """

    key: str
    state: State
    title: str
    words: str
