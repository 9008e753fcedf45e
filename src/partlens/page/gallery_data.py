"""What the page shows of a gallery, as data: ``gallery/gallery.json`` and its pictures read once into frozen values."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partlens.page.reading import Measure, count, group, groups, items, measure, number, numbers, text
from partlens.records import read_json

ATTENTION_LAYERS = ("interpretable", "tap", "top")
"""Whose Grad-CAM stands on the page: the explainer's part filters, the performer's tap and its top layer."""

_PICTURE_KINDS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png"}


@dataclass(frozen=True)
class Picture:
    """A gallery photo with the place where a filter peaks, in pixels of ``size_px`` (x to the right, y down).

    Attributes:
        key: the photo's name in the data set.
        score: the filter's peak value.
        peak_px: x, y of the peak cell's centre, or ``None``.
        box_px: left, top, right, bottom of the filter's region; ``None`` where there is none, or where the picture
            itself shows what the filter reads.
        size_px: width and height that the coordinates refer to.
        uri: the picture as a ``data:`` address; ``None`` where the file is missing or is no picture.
        map_uri: the same photo with the filter's feature map over it.
    """

    key: str
    score: float
    peak_px: tuple[float, float] | None
    box_px: tuple[float, float, float, float] | None
    size_px: tuple[float, float]
    uri: str | None
    map_uri: str | None = None


@dataclass(frozen=True)
class GalleryFilter:
    """One filter with the photos that it answers to most; ``reads_px`` is the side of what it reads."""

    filter: int
    instability: float
    consistency: float
    landmark: str
    pictures: tuple[Picture, ...]
    reads_px: float = math.nan


@dataclass(frozen=True)
class Reading:
    """How it was found out what filters read, and how much that is.

    Attributes:
        occluder_px: side of the square that covered pieces of photos.
        stride_px: step between its places.
        places: number of places on a photo.
        photos: photos that were covered.
        photos_per_filter: of these, how many each filter used.
        median_px: side of what the shown filters read, by ``explainer`` and ``performer``.
        theoretical_px: side of what they could read, likewise.
        covered: photos were covered; else the fields are the round ones in theory, and nothing but their side is known.
    """

    occluder_px: int
    stride_px: int
    places: int
    photos: int
    photos_per_filter: int
    median_px: Mapping[str, Measure]
    theoretical_px: Mapping[str, tuple[float, float]]
    covered: bool


@dataclass(frozen=True)
class AttentionPhoto:
    """A photo with Grad-CAM maps laid over it.

    Attributes:
        key: the photo's name in the data set.
        label: the class that the performer gives it, and that the maps explain.
        uri: the photo as a ``data:`` address; ``None`` where it is missing.
        maps: by ``interpretable``, ``tap`` and ``top``, the pictures likewise.
    """

    key: str
    label: str
    uri: str | None
    maps: Mapping[str, str | None]


@dataclass(frozen=True)
class Attention:
    """Grad-CAM of the explainer's part filters and of the performer's layers.

    Attributes:
        layers: names by ``interpretable``, ``tap`` and ``top``.
        photos: shown.
        size_px: width and height of the network's input.
        concentration: smallest share of the photo that holds half of a map, mean over photos, likewise.
        random: the same of random maps on each layer's grid.
        empty: photos whose map is all zeros and that the share leaves out.
    """

    layers: Mapping[str, str]
    photos: tuple[AttentionPhoto, ...]
    size_px: tuple[float, float]
    concentration: Mapping[str, Measure]
    random: Mapping[str, Measure]
    empty: Mapping[str, int]


@dataclass(frozen=True)
class Gallery:
    """Chosen filters of the explainer and of the performer's tap; runs of earlier versions have no more than these."""

    explainer: tuple[GalleryFilter, ...]
    performer: tuple[GalleryFilter, ...]
    reading: Reading | None = None
    attention: Attention | None = None

    @property
    def uris(self) -> tuple[str, ...]:
        """Every picture's address."""
        pictures = [picture for one in (*self.explainer, *self.performer) for picture in one.pictures]
        found = [uri for picture in pictures for uri in (picture.uri, picture.map_uri)]
        for photo in self.attention.photos if self.attention else ():
            found += [photo.uri, *photo.maps.values()]
        return tuple(uri for uri in found if uri)


def _data_uri(run: Path, name: str) -> str | None:
    """Return a picture as a ``data:`` address; ``None`` when it is missing, outside the run or no picture."""
    path = (run / name).resolve()
    if not name or not path.is_relative_to(run.resolve()) or not path.is_file():
        return None
    content = path.read_bytes()
    kind = next((kind for magic, kind in _PICTURE_KINDS.items() if content.startswith(magic)), None)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if kind else None


def _picture(run: Path, value: Any) -> Picture:
    photo = group(value)
    peak, box, size = (numbers(photo.get(k), n) for k, n in (("peak_px", 2), ("box_px", 4), ("size_px", 2)))
    usable = size is not None and min(size) > 0
    region = _data_uri(run, text(photo.get("region_file")))
    return Picture(
        key=text(photo.get("key")),
        score=number(photo.get("score")),
        peak_px=(peak[0], peak[1]) if peak and usable else None,
        box_px=(box[0], box[1], box[2], box[3]) if box and usable and region is None else None,
        size_px=(size[0], size[1]) if size and usable else (1.0, 1.0),
        uri=region or _data_uri(run, text(photo.get("file"))),
        map_uri=_data_uri(run, text(photo.get("map_file"))),
    )


def _gallery_filters(run: Path, value: Any) -> tuple[GalleryFilter, ...]:
    return tuple(
        GalleryFilter(
            filter=count(row.get("filter")),
            instability=number(row.get("instability")),
            consistency=number(row.get("consistency")),
            landmark=text(row.get("landmark")),
            pictures=tuple(_picture(run, photo) for photo in items(row.get("photos"))),
            reads_px=number(row.get("reads_px")),
        )
        for row in groups(value)
    )


def _measures(value: Any) -> dict[str, Measure]:
    return {text(k): measure(v) for k, v in group(value).items()}


def _reading(value: Any, *, covered: bool) -> Reading | None:
    found = group(value)
    if not found:
        return None
    sides = {text(k): numbers(v, 2) for k, v in group(found.get("theoretical_px")).items()}
    return Reading(
        occluder_px=count(found.get("occluder_px")),
        stride_px=count(found.get("stride_px")),
        places=count(found.get("places")),
        photos=count(found.get("photos")),
        photos_per_filter=count(found.get("photos_per_filter")),
        median_px=_measures(found.get("reads_px")),
        theoretical_px={name: (side[0], side[1]) for name, side in sides.items() if side},
        covered=covered,
    )


def _attention(run: Path, value: Any) -> Attention | None:
    found = group(value)
    layers = {name: text(group(found.get("layers")).get(name)) for name in ATTENTION_LAYERS}
    size = numbers(found.get("size_px"), 2)
    photos = tuple(
        AttentionPhoto(
            key=text(photo.get("key")),
            label=text(photo.get("class")) + (" (answer: no)" if photo.get("denied") is True else ""),
            uri=_data_uri(run, text(photo.get("file"))),
            maps={name: _data_uri(run, text(group(photo.get("maps")).get(name))) for name in ATTENTION_LAYERS},
        )
        for photo in groups(found.get("photos"))
    )
    if not photos:
        return None
    shares = group(found.get("concentration_frac"))
    return Attention(
        layers=layers,
        photos=photos,
        size_px=(size[0], size[1]) if size and min(size) > 0 else (1.0, 1.0),
        concentration=_measures(shares),
        random=_measures(found.get("random_frac")),
        empty={text(k): count(group(v).get("empty")) for k, v in shares.items()},
    )


def read_gallery(run: Path) -> Gallery | None:
    """Read a run's gallery; ``None`` where there is none."""
    path = run / "gallery" / "gallery.json"
    if not path.exists():
        return None
    content = read_json(path)
    layers = group(content.get("layers"))
    gallery = Gallery(
        _gallery_filters(run, layers.get("explainer")),
        _gallery_filters(run, layers.get("performer")),
        _reading(content.get("occlusion"), covered=True) or _reading(content.get("analytic"), covered=False),
        _attention(run, content.get("attention")),
    )
    return gallery if gallery.explainer or gallery.performer or gallery.attention else None
