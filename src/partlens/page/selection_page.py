"""The chapter of a selection: its record with the pictures that have room, its figures, and what the template needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

from partlens.estimate import Estimate, wilson_interval
from partlens.page import figures, notation
from partlens.page.explanation_page import ExplanationData
from partlens.page.svg import Scale, svg, tag
from partlens.page.views import Chapter, Embedded, Figure, Pictures, environment, origin
from partlens.progress import duration
from partlens.selection.record import RelevantFilter, SelectedClass, SelectionFound, SelectionRecord

_OPEN_CLASSES = 12  # shown open
_DRAWN_CLASSES = 60  # shown with pictures; the others are listed in a table
_TABLE_CLASSES = 30  # most of a table of classes by layers
_GAP_LIMIT = 1e-4
_GAP_BAD = 1e-2
_FEW_FILTERS = 16

Place = Literal["open", "folded", "table"]
State = Literal["good", "caution", "warning", "unknown"]


@dataclass(frozen=True)
class _ShownClass:
    """One class on the page: its id, what was found, where it is shown, and pictures of each filter.

    The pictures are average, control and crops; ``None`` where a filter has none or they have no room.
    """

    anchor: str
    data: SelectedClass
    place: Place
    pictures: tuple[tuple[Embedded | None, ...] | None, ...]

    @property
    def top(self) -> float:
        """The largest absolute weight."""
        return max((abs(each.weight) for each in self.data.filters), default=0.0)


@dataclass(frozen=True)
class SelectionData:
    """A finished selection with the pictures of its page; classes of explained images come first."""

    record: SelectionRecord
    found: SelectionFound
    classes: tuple[_ShownClass, ...]

    def at(self, place: Place) -> tuple[_ShownClass, ...]:
        """Return the classes that the page shows in one place."""
        return tuple(one for one in self.classes if one.place == place)

    @classmethod
    def read(cls, run: Path, pictures: Pictures, first: Iterable[str] = ()) -> Self | None:
        """Read a selection for the page, some classes first; ``None`` where a run has none or an unfinished one."""
        record = SelectionRecord.read_if_there(run)
        if record is None or record.found is None:
            return None
        return cls(record, record.found, _classes(record.found, pictures, first))

    @property
    def headline(self) -> str:
        """From how much each class is read and how right that is; markup that is already escaped."""
        words = environment().get_template("selection_words.html.j2").module
        said: str = words.headline(self.record, self.found, _above_nulls(self.found))  # type: ignore[attr-defined]
        return said.strip()

    def view(self, images: Iterable[ExplanationData] = ()) -> dict[str, Any]:
        """Return what the template shows; classes are linked to the explained images on the page."""
        found = self.found
        links: dict[str, list[tuple[str, str]]] = {}
        for image in images:
            for one in image.record.explained:
                links.setdefault(one.name, []).append((image.anchor, image.record.image))
        columns, rows = _heat_table(self)
        title = "Share of a class's weight by layer"
        layers = _layer_shares(found)
        hits, total = _sharper(found)
        sharp = Estimate.undefined("filters")
        if total:
            sharp = Estimate(hits / total, wilson_interval(hits / total, total), total, "filters")
        readouts = _readouts(found)
        return {
            "data": self,
            "explained": links,  # (anchor, image) by class
            "states": _states(found, sharp),
            "sharper": (hits, total),
            "sharper_share": sharp,
            "readouts": readouts,
            "readout_figure": _readout_figure(readouts, of_predictions=self.record.config.labels == "predictions"),
            "layers_figure": Figure.of(f"{title}, mean over the classes", _layers_chart(title, layers)),
            "layers_width": round(_layers_width(len(layers))),
            "heat_columns": columns,
            "heat_rows": rows,  # anchor, class, and its share by layer in percent
        }

    def chapter(self) -> Chapter:
        """Describe the chapter for the contents."""
        record, index = self.record, self.found.index
        of = {"data": "the data's labels", "predictions": "the network's own predictions"}[record.config.labels]
        split = notation.SPLITS.get(record.config.split, record.config.split)
        facts = (
            ("Performer", record.performer.name),
            ("Layers", f"{len(index.layers)}, with {index.size:,} filters"),
            ("Data", record.data.name),
            ("Learned from", f"{notation.counted(record.photos, f'{split} photos')}, with {of}"),
            ("Selected", notation.moment(record.created)),
            ("Duration", duration(record.seconds)),
        )
        layers = [(name, f"{count:,}") for name, count in zip(index.layers, index.channels, strict=True)]
        return Chapter(
            kind="selection",
            anchor="selection",
            title="What each class is read from",
            headline=self.headline,
            page_title=f"What {notation.short_name(record.performer.name)} reads each class from",
            facts=tuple((name, value) for name, value in facts if value),
            sections=(
                ("selection-verdict", "Verdict"),
                ("readout", "Read-out"),
                ("layers", "Layers"),
                ("classes", "Classes"),
            ),
            origin=origin("The selection", record, record.config, ("Layers (filters)", layers)),
        )


# --- reading ----------------------------------------------------------------------------------------------------------


def _files(each: RelevantFilter) -> tuple[str, ...]:
    one = each.picture
    return () if one is None else (one.average, one.control, one.crops)


def _read(each: RelevantFilter, pictures: Pictures) -> tuple[Embedded | None, ...] | None:
    return tuple(pictures.read(pictures.root, file) for file in _files(each)) or None


def _classes(found: SelectionFound, pictures: Pictures, first: Iterable[str]) -> tuple[_ShownClass, ...]:
    """Place the classes, explained ones first; from the first whose pictures have no room on, all go to the table."""
    wanted = list(dict.fromkeys(first))
    ordered = sorted(found.classes, key=lambda one: wanted.index(one.name) if one.name in wanted else len(wanted))
    made: list[_ShownClass] = []
    room = True
    for position, one in enumerate(ordered):
        files = chain.from_iterable(map(_files, one.filters))
        room = room and position < _DRAWN_CLASSES and pictures.fit(pictures.root, files)
        place: Place = "table" if not room else "open" if position < _OPEN_CLASSES else "folded"
        read = tuple(_read(each, pictures) if room else None for each in one.filters)
        made.append(_ShownClass(f"class-{position + 1}", one, place, read))
    return tuple(made)


# --- judging ----------------------------------------------------------------------------------------------------------


def _sharper(found: SelectionFound) -> tuple[int, int]:
    """Count filters whose average picture is sharper than that of random crops, and those where both are known."""
    known = {
        (each.layer, each.channel): each.picture
        for one in found.classes
        for each in one.filters
        if each.picture and math.isfinite(each.picture.sharpness + each.picture.control_sharpness)
    }
    return sum(p.sharpness > p.control_sharpness for p in known.values()), len(known)


def _above_nulls(found: SelectionFound) -> bool:
    """Tell whether the read-out is right more often than by chance and after shuffling, intervals apart."""
    return found.accuracy.interval[0] > max(found.shuffled.interval[1], found.chance)


def _states(found: SelectionFound, sharp: Estimate) -> dict[str, State]:
    """Judge a selection; what was not measured is ``unknown``."""
    gap = found.relative_gap
    states: dict[str, State] = {
        "readout": "unknown" if not found.accuracy.defined else "good" if _above_nulls(found) else "warning",
        "few": "caution" if found.mean_filters > _FEW_FILTERS else "good",
        "solved": "warning" if gap > _GAP_BAD else "caution" if gap > _GAP_LIMIT else "good",
    }
    low, high = sharp.interval
    apart: State = "good" if low > 0.5 else "warning" if high < 0.5 else "caution"
    return states | {"sharp": apart if sharp.defined else "unknown"}


# --- drawing ----------------------------------------------------------------------------------------------------------


def _readouts(found: SelectionFound) -> tuple[tuple[str, str, Estimate], ...]:
    if not found.accuracy.defined:
        return ()
    chance = Estimate(found.chance, (math.nan, math.nan), 0)
    rows = (
        ("linear read-out", "explainer", found.accuracy),
        ("the network itself", "performer", found.model_accuracy),
        ("null: shuffled", "null", found.shuffled),
        ("null: chance", "null", chance),
    )
    return tuple(row for row in rows if row[2].defined)


def _readout_figure(rows: Iterable[tuple[str, str, Estimate]], *, of_predictions: bool) -> Figure | None:
    drawn = [
        figures.ScoreRow(label, role, one.value, *one.interval, notation.rate(one.value).replace(notation.GAP, " "))
        for label, role, one in rows
    ]
    title = "Held-out photos with the network's own prediction" if of_predictions else "Held-out photos that are right"
    chart = figures.scores_chart(title, "higher is better", drawn)
    return Figure.of(f"{title}: higher is better", chart)


def _heat_table(data: SelectionData) -> tuple[tuple[str, ...], tuple[tuple[str, str, tuple[float | None, ...]], ...]]:
    """Return the layers with weight, and each class's share by layer in percent; nothing for many classes."""
    shares = [_class_shares(one.data) for one in data.classes]
    columns = tuple(layer for layer in data.found.index.layers if any(layer in has for has in shares))
    if not columns or len(shares) > _TABLE_CLASSES:
        return (), ()
    rows = []
    for one, has in zip(data.classes, shares, strict=True):
        rows.append((one.anchor, one.data.name, tuple(100 * has[c] if c in has else None for c in columns)))
    return columns, tuple(rows)


# --- where in the network the filters are ---------------------------------------------------------------------------

_LABELS = 40
"""So many layers are named at most; of more, every second or third."""


_LayerShare = tuple[str, float, float]
"""A layer, its part of a class's weight (0 to 1), mean over the classes, and its part of all filters: what it would
have if weights were spread evenly."""


def _class_shares(one: SelectedClass) -> dict[str, float]:
    """Return a class's share of weight in each layer that has any."""
    shares: dict[str, float] = {}
    for each in one.filters:
        shares[each.layer] = shares.get(each.layer, 0.0) + each.share
    return shares


def _layer_shares(found: SelectionFound) -> tuple[_LayerShare, ...]:
    """Return every measured layer's share, mean over the classes that are read from anything."""
    shares = [has for has in map(_class_shares, found.classes) if has]
    return tuple(
        (layer, sum(has.get(layer, 0.0) for has in shares) / max(len(shares), 1), channels / found.index.size)
        for layer, channels in zip(found.index.layers, found.index.channels, strict=True)
    )


def _layers_width(count: int) -> float:
    """Return the width of the figure in its own units, which are about pixels."""
    return max(float(figures.WIDTH), 60.0 + 26.0 * min(count, _LABELS))


def _shortened(layer: str) -> str:
    return layer if len(layer) <= 14 else f"…{layer[-13:]}"


def _layers_chart(title: str, layers: Sequence[_LayerShare]) -> str:
    """Draw each layer's share of the weight as a bar, and as a ring what even spreading would give."""
    used = sorted(((name, share) for name, share, _ in layers if share > 0), key=lambda each: -each[1])
    if not used:
        return ""
    width, left, top, bottom = _layers_width(len(layers)), 40.0, 8.0, 190.0
    right = width - 14.0
    high = max(max(share, even) for _, share, even in layers)
    scale = Scale(0.0, high * 1.08, bottom, top)
    ticks = figures.tick_values(0.0, high * 1.08)
    parts = figures.levels(scale, left, right, ticks, lambda tick: f"{100 * tick:g} %")
    step = (right - left) / len(layers)
    every = math.ceil(len(layers) / _LABELS)
    for position, (layer, share, even) in enumerate(layers):
        x, wide = left + step * (position + 0.5), min(step * 0.62, 34.0)
        words = f"{layer}: {100 * share:.1f} % of the weight, {100 * even:.1f} % of the filters"
        bar = {"x": x - wide / 2, "y": scale(share), "width": wide, "height": bottom - scale(share)}
        parts.append(tag("rect", tag("title", escape(words)), class_="fill-explainer", **bar))
        ring = {"cx": x, "cy": scale(even), "r": min(4.0, step / 3)}
        parts.append(tag("circle", class_="hollow stroke-null", **ring))
        if position % every == 0:
            turn = f"rotate(-40 {x:.1f} {bottom + 14:.1f})"
            parts.append(tag("text", escape(_shortened(layer)), x=x, y=bottom + 14, text_anchor="end", transform=turn))
    spoken = "; ".join(f"{layer} {100 * share:.1f} %" for layer, share in used[:8])
    if len(used) > 8:
        spoken += f"; {len(used) - 8} more"
    longest = max(len(_shortened(layer)) for layer, _, _ in layers)
    return svg((width, bottom + 26 + 4.2 * longest), "chart", title, spoken, *parts)
