"""Pieces that every chapter of the page is put together from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from partlens.page.environment import pairs
from partlens.records import Settings, plain
from partlens.run import RunRecord, Unreadable


@dataclass(frozen=True)
class Figure:
    """A drawn figure with its caption; ``svg`` is markup that is already escaped."""

    caption: str
    svg: str


@dataclass(frozen=True)
class Origin:
    """How to make a chapter's results again, and what its notes say.

    Attributes:
        title: of the chapter.
        command: the command line; empty where the run was made from Python.
        hashes: (name, value) of what identifies the inputs.
        details: (title, pairs) of versions and settings.
        notes: remarks.
        unreadable: photos that could not be read.
    """

    title: str
    command: str
    hashes: tuple[tuple[str, str], ...]
    details: tuple[tuple[str, list[tuple[str, str]]], ...]
    notes: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]


def origin(
    title: str,
    record: RunRecord,
    config: Settings,
    *further: tuple[str, list[tuple[str, str]]],
    identity: tuple[str, str] | None = None,
    notes: Iterable[str] = (),
) -> Origin:
    """Say how a run is made again; ``further`` details and notes are the chapter's own."""
    return Origin(
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
    """A chapter of the page.

    Attributes:
        kind: ``inspection``, ``selection``, ``explanation``, ``explainer`` or ``parts``; which template draws it.
        anchor: its id.
        title: its heading.
        sections: (anchor, title) for the table of contents.
        headline: its result in a sentence or two; may be empty.
        page_title: of a page that has no other chapter.
        facts: (name, value) of what it is about.
        origin: how its results are made again, where it has a run of its own.
    """

    kind: str
    anchor: str
    title: str
    sections: tuple[tuple[str, str], ...]
    headline: str = ""
    page_title: str = ""
    facts: tuple[tuple[str, str], ...] = ()
    origin: Origin | None = None
