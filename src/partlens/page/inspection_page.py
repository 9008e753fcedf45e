"""The chapter of an inspection: verdicts first, then single photos, then the numbers with their nulls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from partlens.object_parts.inspection import InspectedCategory, InspectedPhoto, InspectRecord
from partlens.page import notation
from partlens.page.inspection_figures import kept_chart, shares_bar
from partlens.page.reading import Embedded, Pictures
from partlens.page.views import Chapter, Figure, origin

_OPEN = 12  # categories that are shown open
_WITH_PHOTOS = 24  # categories whose photos are shown
_ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class _ShownPhoto:
    """One photo: its record, its picture and its shares as a bar."""

    data: InspectedPhoto
    picture: Embedded | None
    shares: str


@dataclass(frozen=True)
class _ShownCategory:
    """One category on the page: its id, whether it is open, its record, figures, and pictures as far as they fit.

    Attributes:
        galleries: one picture a part, ``None`` where there is no room.
    """

    anchor: str
    is_open: bool
    data: InspectedCategory
    curve: Figure | None
    shares: str
    galleries: tuple[Embedded | None, ...]
    photos: tuple[_ShownPhoto, ...]

    @property
    def title(self) -> str:
        """How the category is called."""
        return self.data.name or "All photos"


@dataclass(frozen=True)
class InspectionData:
    """An inspection with the pictures of its page."""

    record: InspectRecord
    categories: tuple[_ShownCategory, ...]

    @property
    def without_room(self) -> int:
        """Categories whose galleries have no room on the page."""
        return sum(not any(one.galleries) for one in self.categories if one.data.parts)


# --- reading ----------------------------------------------------------------------------------------------------------


def collect_inspection(run: Path, pictures: Pictures) -> InspectionData | None:
    """Read the inspection of a run; ``None`` where there is none or it is not finished."""
    record = InspectRecord.read_if_there(run)
    if record is None or not record.finished:
        return None
    made: list[_ShownCategory] = []
    room = True
    # The galleries of all categories come before the photos of any: they are what a category is told by.
    for position, one in enumerate(record.categories):
        files = [part.gallery for part in one.parts]
        room = room and pictures.fit(pictures.root, files)
        galleries = tuple(pictures.read(pictures.root, file) if room else None for file in files)
        made.append(_category(one, position, galleries, len(record.categories)))
    with_photos = [_with_photos(one, pictures) if position < _WITH_PHOTOS else one for position, one in enumerate(made)]
    return InspectionData(record, tuple(with_photos))


def _category(
    one: InspectedCategory, position: int, galleries: tuple[Embedded | None, ...], count: int
) -> _ShownCategory:
    curve = kept_chart(f"Score kept, {one.name or 'all photos'}", one.kept)
    names = [*(part.name for part in one.parts), _ELSEWHERE]
    shares = [*(part.share for part in one.parts), one.elsewhere.value]
    return _ShownCategory(
        anchor=f"category-{position + 1}",
        is_open=count <= _OPEN or position < _OPEN // 2,
        data=one,
        curve=Figure("Score kept, %", curve) if curve else None,
        shares=shares_bar(f"Shares of the score, {one.name}", names, shares),
        galleries=galleries,
        photos=(),
    )


def _with_photos(one: _ShownCategory, pictures: Pictures) -> _ShownCategory:
    files = [photo.picture for photo in one.data.shown if photo.picture]
    if not pictures.fit(pictures.root, files):
        return one
    names = [*(part.name for part in one.data.parts), _ELSEWHERE]
    shown = tuple(
        _ShownPhoto(photo, pictures.read(pictures.root, photo.picture), shares_bar(photo.image, names, photo.shares))
        for photo in one.data.shown
    )
    return replace(one, photos=shown)


# --- the chapter ------------------------------------------------------------------------------------------------------


def _headline(record: InspectRecord) -> str:
    """Say how many categories there are of each verdict, or the only one's sentence."""
    categories = record.categories
    if len(categories) == 1:
        return categories[0].sentence
    words = {
        "parts": "by parts",
        "texture": "by texture or the whole",
        "elsewhere": "by something beside the object",
        "undecided": "undecided",
    }
    told = [(words[kind], [one.name for one in categories if one.verdict == kind]) for kind in words]
    name = notation.short_name(record.performer.name)
    said = "; ".join(f"{_named(names)} {how}" for how, names in told if names)
    return f"{name} knows {said}."


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed) if len(listed) <= 4 else f"{len(listed)} categories"


def inspection_chapter(data: InspectionData) -> Chapter:
    """Describe the chapter for the contents."""
    record = data.record
    searched, measured = (sum(getattr(one, of) for one in record.categories) for of in ("photos", "measured"))
    facts = (
        ("Performer", record.performer.name),
        ("Layer", f"cells of {record.tap}, parts from {', '.join(record.finding)}"),
        ("Data", record.data.name),
        ("Photos", f"{searched:,} searched, {measured:,} measured"),
        ("Inspected", notation.moment(record.created)),
        ("Duration", notation.duration(record.seconds)),
    )
    of_categories = (f"{one.name or 'all photos'}: {note}" for one in record.categories for note in one.notes)
    return Chapter(
        kind="inspection",
        anchor="inspection",
        title="What each category is known by",
        headline=_headline(record),
        page_title=f"What {notation.short_name(record.performer.name)} knows its categories by",
        facts=facts,
        sections=(
            ("inspection-verdicts", "Verdicts"),
            ("inspection-photos", "Photos"),
            ("inspection-numbers", "Numbers"),
        ),
        origin=origin("The inspection", record, record.config, notes=(*record.notes, *of_categories)),
    )
