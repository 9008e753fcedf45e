"""The explained images of a run on its page, and the page of one explained image: records with their pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from partlens.attribution.record import Contribution, ExplainedByParts, ExplanationRecord
from partlens.errors import RunError, expected
from partlens.page import figures
from partlens.page.views import Chapter, Embedded, Pictures, environment, pairs
from partlens.records import plain, write_text
from partlens.selection.record import SelectionRecord

_PAGE_BYTES = 13_500_000  # room for the pictures of one image's own page, in characters


@dataclass(frozen=True)
class ExplanationData:
    """One explained image."""

    record: ExplanationRecord  # its record
    pictures: Mapping[str, Embedded]  # by their names in the record; an average that is out of reach is missing
    anchor: str = "image-1"  # its id on the page

    @property
    def top(self) -> float:
        """The largest contribution, which bars are drawn against."""
        return max((f.contribution for one in self.record.explained for f in one.filters), default=0.0)

    @staticmethod
    def top_share(one: ExplainedByParts) -> float:
        """Return the largest share of a part without its sign; 0 where no share is defined."""
        return max((abs(part.share) for part in one.parts if math.isfinite(part.share)), default=0.0)

    @property
    def has_averages(self) -> bool:
        """Whether any average of a filter is shown."""
        return any(f.average in self.pictures for one in self.record.explained for f in one.filters)


@dataclass(frozen=True)
class Explanations:
    """The explained images of a run: those on the page, folders that have no room there, and unfinished folders."""

    shown: tuple[ExplanationData, ...] = field(default=())
    without_room: tuple[str, ...] = ()
    incomplete: tuple[str, ...] = ()

    @classmethod
    def read(cls, run: Path, pictures: Pictures, limit_bytes: int) -> Self:
        """Read every explained image of a run, in the order of their folders' names.

        From the first image on whose pictures would go beyond ``limit_bytes``, no more are read; the first of all is
        always shown.
        """
        whole, unfinished = _folders(run)
        now = getattr(SelectionRecord.read_if_there(run), "identity", None)
        shown: list[ExplanationData] = []
        for path in whole:
            before = pictures.spent_bytes
            one = _read(path, pictures, len(shown), now)
            if shown and pictures.spent_bytes > limit_bytes:
                pictures.spent_bytes = before
                break
            shown.append(one)
        return cls(tuple(shown), tuple(path.name for path in whole[len(shown) :]), unfinished)

    def chapter(self) -> Chapter:
        """Describe the chapter for the contents."""
        many = len(self.shown) > 1
        return Chapter(
            kind="explanation",
            anchor="explanation",
            title="Single predictions" if many else "One prediction",
            sections=tuple((one.anchor, one.record.image) for one in self.shown) if many else (),
        )


def _files(record: ExplanationRecord) -> Iterator[str]:
    yield "input.png"
    for one in record.explained:
        yield from (one.combined, one.heat, *filter(None, [one.difference]), *(f.overlay for f in one.filters))
    yield from (one.picture for one in record.windows)
    for shared in record.parts:
        yield from (part.heat for part in shared.parts)


def _average(each: Contribution, folder: Path, pictures: Pictures, *, alone: bool) -> Embedded | None:
    if alone and each.average is not None:
        # The averages are the run's. Away from it they are shown where the path still leads to a run's pictures.
        home = (folder / each.average).resolve().parent
        if home.name != "pictures" or not (home.parent / "selection.json").is_file():
            return None
        pictures.admit(home)
    return pictures.read(folder, each.average)


def _read(
    folder: Path, pictures: Pictures, position: int = 0, now: str | None = None, *, alone: bool = False
) -> ExplanationData:
    """Read the folder of one explained image; ``alone`` outside a run, where averages may be out of reach.

    Averages are those of the run's selection, ``now``: of an earlier one there are none.
    """
    record = ExplanationRecord.read(folder)
    known = record.explained if now in {None, record.selection} else ()
    found = {name: pictures.read(folder, name) for name in _files(record)}
    for each in (f for one in known for f in one.filters if f.average is not None):
        found[each.average or ""] = _average(each, folder, pictures, alone=alone)
    shown = {name: picture for name, picture in found.items() if picture}
    return ExplanationData(record, shown, f"image-{position + 1}")


def _folders(run: Path) -> tuple[list[Path], tuple[str, ...]]:
    """Return the folders of explained images, and the names of those that are not finished."""
    found = sorted(path for path in (run / "explanations").glob("[!.]*") if path.is_dir())
    whole = [path for path in found if (path / ExplanationRecord.FILE).exists()]
    return whole, tuple(path.name for path in found if path not in whole)


def write_explanation_page(folder: Path) -> Path:
    """Write the page of one explained image, ``explanation.html`` in its folder; return the file.

    It is one file that loads nothing, written whole or not at all. Inside a run's ``explanations/`` the averages of the
    run's ``pictures/`` are shown too.

    Raises:
        RunError: the folder is missing, or ``explanation.json`` or a picture is missing, damaged or of another version.
        StorageError: the file could not be written.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        remedy = "Give a folder that partlens explain wrote"
        raise RunError(expected("the folder of an explanation", folder.as_posix(), remedy))
    within = folder.parent.name == "explanations" and (folder.parent.parent / "selection.json").is_file()
    pictures = Pictures(folder.parent.parent if within else folder, ExplanationRecord.AGAIN, _PAGE_BYTES)
    data = _read(folder, pictures, alone=not within)
    method = pairs(plain(data.record.method)) if data.record.method else []
    template = environment().get_template("explanation_page.html.j2")
    target = folder / "explanation.html"
    write_text(target, template.render(view=data, method=method, figure_css=figures.FIGURE_CSS))
    return target
