"""The chapter of an inspection: verdicts first, then single photos, then the numbers with their nulls."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Self

from partlens.object_parts.inspection import InspectedCategory, InspectedPhoto, InspectRecord
from partlens.page import notation
from partlens.page.figures import levels
from partlens.page.svg import Scale, lettering, line, polyline, svg, tag
from partlens.page.views import Chapter, Embedded, Figure, Pictures, origin
from partlens.progress import duration

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
    """One category on the page: its id, whether it is open, its record, figures, and pictures as far as they fit."""

    anchor: str
    is_open: bool
    data: InspectedCategory
    curve: Figure | None
    shares: str
    galleries: tuple[Embedded | None, ...]  # one picture a part, ``None`` where there is no room
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

    @classmethod
    def read(cls, run: Path, pictures: Pictures) -> Self | None:
        """Read the inspection of a run; ``None`` where there is none or it is not finished."""
        record = InspectRecord.finished_in(run)
        if record is None:
            return None
        made: list[_ShownCategory] = []
        room = True
        # The galleries of all categories come before the photos of any: they are what a category is told by.
        for position, one in enumerate(record.categories):
            files = [part.gallery for part in one.parts]
            room = room and pictures.fit(pictures.root, files)
            galleries = tuple(pictures.read(pictures.root, file) if room else None for file in files)
            made.append(_category(one, position, galleries, len(record.categories)))
        with_photos = [
            _with_photos(one, pictures) if position < _WITH_PHOTOS else one for position, one in enumerate(made)
        ]
        return cls(record, tuple(with_photos))

    def chapter(self) -> Chapter:
        """Describe the chapter for the contents."""
        record = self.record
        searched, measured = (sum(getattr(one, of) for one in record.categories) for of in ("photos", "measured"))
        facts = (
            ("Performer", record.performer.name),
            ("Layer", f"cells of {record.tap}, parts from {', sharpened on '.join(record.finding)}"),
            ("Data", record.data.name),
            ("Photos", f"{searched:,} searched, {measured:,} measured"),
            ("Inspected", notation.moment(record.created)),
            ("Duration", duration(record.seconds)),
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


def _category(
    one: InspectedCategory, position: int, galleries: tuple[Embedded | None, ...], count: int
) -> _ShownCategory:
    curve = _kept_chart(f"Score kept, {one.name or 'all photos'}", one.kept)
    names = [*(part.name for part in one.parts), _ELSEWHERE]
    shares = [*(part.share for part in one.parts), one.elsewhere.value]
    return _ShownCategory(
        anchor=f"category-{position + 1}",
        is_open=count <= _OPEN or position < _OPEN // 2,
        data=one,
        curve=Figure.of("Score kept, %", curve),
        shares=_shares_bar(f"Shares of the score, {one.name}", names, shares),
        galleries=galleries,
        photos=(),
    )


def _with_photos(one: _ShownCategory, pictures: Pictures) -> _ShownCategory:
    files = [photo.picture for photo in one.data.shown]
    if not pictures.fit(pictures.root, files):
        return one
    names = [*(part.name for part in one.data.parts), _ELSEWHERE]
    shown = tuple(
        _ShownPhoto(photo, pictures.read(pictures.root, photo.picture), _shares_bar(photo.image, names, photo.shares))
        for photo in one.data.shown
    )
    return replace(one, photos=shown)


def _headline(record: InspectRecord) -> str:
    """Say how many categories there are of each verdict, or the only one's sentence."""
    categories = record.categories
    if len(categories) == 1:
        return categories[0].sentence
    words = {"parts": "by parts", "texture": "by texture or the whole", "elsewhere": "by something beside the object"}
    names = {kind: [one.name for one in categories if one.verdict == kind] for kind in (*words, "undecided")}
    known = "; ".join(f"{_named(names[kind])} {how}" for kind, how in words.items() if names[kind])
    said = [f"{notation.short_name(record.performer.name)} knows {known}."] * bool(known)
    return " ".join(said + [f"Undecided: {_named(names['undecided'])}."] * bool(names["undecided"]))


def _named(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed) if len(listed) <= 4 else f"{len(listed)} categories"


# --- figures ----------------------------------------------------------------------------------------------------------

_SIZE = (300.0, 168.0)
_LEFT, _RIGHT, _TOP, _BOTTOM = 34.0, 300.0 - 92.0, 8.0, 168.0 - 30.0
_STEP = 12.0  # between labels at the end of curves
_KINDS = (
    ("parts", "parts", "curve stroke-explainer"),
    ("ceiling", "best window", "curve second stroke-null"),
    ("annotated", "annotated", "curve second stroke-performer"),
    ("other_photos", "other photos", "curve thin stroke-performer"),
    ("centre", "centre", "curve thin stroke-null"),
    ("random", "random", "curve thin second stroke-null"),
    ("object", "on the object", "curve thin second stroke-performer"),
    ("rest", "all the rest", "curve thin dots stroke-null"),
)


def _kept_chart(title: str, kept: Mapping[str, Sequence[float]]) -> str:
    """Draw what each kind of windows keeps over the area, its name at the end of its curve."""
    areas, at = kept["area"], len(kept["area"]) - 2
    every = [(kept.get(kind, [math.nan]), words, class_) for kind, words, class_ in _KINDS]
    known = [each for each in every if all(map(math.isfinite, each[0]))]
    if every[0] not in known:  # without the parts there is nothing to compare
        return ""
    values = [value for each, _, _ in known for value in each]
    across = Scale(0.0, max(areas), _LEFT, _RIGHT)
    up = Scale(min(0.0, *values), max(1.0, *values), _BOTTOM, _TOP)
    drawn = [*_axes(across, up, areas)]
    drawn += [_curve(across, up, areas, each, class_) for each, _, class_ in reversed(known)]
    drawn += _labels(up, known)
    said = "; ".join(f"{words} {notation.percent_digits(each[at])} %" for each, words, _ in known)
    return svg(_SIZE, "chart", title, f"Kept at {areas[at]:.0%} of the image: {said}.", *drawn)


def _axes(across: Scale, up: Scale, areas: Sequence[float]) -> list[str]:
    found = levels(up, _LEFT, _RIGHT, (0.0, 0.5, 1.0), lambda value: f"{100 * value:.0f}")
    found += [lettering(across(area), _BOTTOM + 15, f"{100 * area:.0f}", "middle", "soft") for area in areas]
    found.append(lettering((_LEFT + _RIGHT) / 2, _BOTTOM + 28, "% of the image", "middle", "soft"))
    return found


def _curve(across: Scale, up: Scale, areas: Sequence[float], values: Sequence[float], class_: str) -> str:
    points = list(zip(areas, values, strict=True))
    if "dots" not in class_:  # no window keeps nothing; the rest of no window is everything
        points.insert(0, (0.0, 0.0))
    return polyline(((across(area), up(value)) for area, value in points), class_)


def _labels(up: Scale, known: Iterable[tuple[Sequence[float], str, str]]) -> list[str]:
    """Put the names next to the ends of the curves, apart where they would overlap, each with its kind of line."""
    placed: list[tuple[float, str, str]] = []
    lowest = _TOP - _STEP
    for values, words, class_ in sorted(known, key=lambda each: -each[0][-1]):
        lowest = max(lowest + _STEP, up(values[-1]))
        placed.append((lowest, words, class_))
    over = max(0.0, lowest - _BOTTOM)
    drawn: list[str] = []
    for y, words, class_ in placed:
        drawn.append(line(_RIGHT + 6, y - over, _RIGHT + 20, y - over, class_))
        drawn.append(lettering(_RIGHT + 24, y - over + 4, words, "start", "strong" if words == "parts" else "soft"))
    return drawn


def _shares_bar(title: str, names: Sequence[str], shares: Sequence[float]) -> str:
    """Draw shares side by side as one bar; negative ones are left out and said in words."""
    shown = [(name, share) for name, share in zip(names, shares, strict=True) if math.isfinite(share)]
    total = sum(max(share, 0.0) for _, share in shown)
    if total <= 0:
        return ""
    drawn, x = [], 0.0
    for number, (name, share) in enumerate(shown):
        width = 300.0 * max(share, 0.0) / total
        kind = "rest" if name == "elsewhere" else f"part-{number % 8}"
        words = tag("title", escape(f"{name} {notation.percent_digits(share)} %"))
        drawn.append(tag("rect", words, x=x, y=0, width=max(width - 1, 0.5), height=14, class_=kind))
        x += width
    said = ", ".join(f"{name} {notation.percent_digits(share)} %" for name, share in shown)
    # A slice is as wide as its share wherever the bar is shown, so it is stretched without keeping its form.
    return svg((300.0, 14.0), "chart shares", title, said, *drawn).replace(
        'role="img"', 'preserveAspectRatio="none" role="img"', 1
    )
