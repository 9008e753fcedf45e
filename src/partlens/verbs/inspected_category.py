"""One category of an inspection: its parts are found, accounted for, drawn, and written as a record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.estimate import Estimate, bootstrap
from partlens.evaluation.places import landmarks_in_input
from partlens.explainer.teachers import mean_correlation
from partlens.network.performer import Performer
from partlens.object_parts.account import Account, Truth, account_of, nearest_landmarks, ranking_photos
from partlens.object_parts.finding import FoundParts, find_parts, places_of_views
from partlens.object_parts.inspection import (
    Comparison,
    DecidedClass,
    InspectConfig,
    InspectedCategory,
    InspectedPart,
    InspectedPhoto,
    Numbers,
)
from partlens.object_parts.reading import Read
from partlens.object_parts.regions import AREAS, TapMaps, Upper
from partlens.object_parts.verdict import SAID_AREA, curve, sentence, told
from partlens.verbs.inspected_pictures import draw_gallery, draw_parts

SHOWN_PHOTOS = 4
TAUGHT = "searched."
"""Before the names of the tensors that locate what an explainer is taught by."""

_GALLERY_PHOTOS = 6
_DECIDED = 5
_LITTLE_SHARE = 0.02


@dataclass(frozen=True)
class Stage:
    """What all categories share."""

    performer: Performer  # the network
    images: ImageSet  # all photos
    upper: Upper  # its layers above the tap
    nothing: Tensor  # what a cell is set to
    found: Read  # what was read of the photos that parts are found on
    measured: Read  # what was read of the photos that regions are measured on
    decisions: Mapping[int, int]  # the network's on all photos that were read, by row
    config: InspectConfig  # of the inspection
    folder: Path  # of the run


@dataclass(frozen=True)
class CategoryPhotos:
    """The photos of one category: positions in what was read of :attr:`Stage.found` and :attr:`Stage.measured`.

    ``held_out`` says whether the measured ones are others than the found ones; where not, they are among the found.
    """

    name: str
    slug: str
    found: tuple[int, ...]
    measured: tuple[int, ...]
    held_out: bool


def inspect_category(stage: Stage, photos: CategoryPhotos) -> tuple[InspectedCategory, dict[str, Tensor]]:
    """Inspect one category; return its record and the tensors that locate its parts in further photos."""
    generator = torch.Generator().manual_seed(stage.config.seed)
    own = torch.tensor(photos.found)
    windows = stage.found.windows[own]
    later, finer = stage.found.views_of(own)
    found = find_parts(later, windows, stage.config.finding, generator, stage.performer.precision, finer)
    read = stage.measured if photos.held_out else stage.found
    chosen = torch.tensor(photos.measured)
    rows = [read.rows[i] for i in photos.measured]
    later, finer = read.views_of(chosen)
    seen = ranking_photos(len(own))
    truth = _truth(stage, rows)
    account = account_of(
        TapMaps(stage.upper, stage.found.tap(own[seen]), stage.nothing),
        found.places[seen],
        TapMaps(stage.upper, read.tap(chosen), stage.nothing),
        places_of_views(found.finder, read.windows[chosen, :1], later, finer),
        found.supported,
        truth,
        generator,
    )
    ordered = found.finder.only(account.order)
    strength = ordered.codes(later(torch.arange(len(chosen)), 0)).flatten(2).amax(2)
    logits = torch.from_numpy(np.array(read.arrays["logits"][chosen.numpy()]))
    account = replace(account, verdict=account.verdict.knowing(_told(stage, photos.name, generator)))
    drawn = _Drawn(stage, photos, rows, account, strength)
    taught = {f"{TAUGHT}{name}": each for name, each in found.finder.tensors().items()}
    return _record(stage, photos, found, account, truth, logits, drawn), ordered.tensors() | taught


def _told(stage: Stage, name: str, generator: torch.Generator) -> Comparison | None:
    """Return what the network's decisions say about being of a category."""
    own = [stage.images.categories[row] == name for row in stage.decisions]
    return told(torch.tensor([*stage.decisions.values()]), torch.tensor(own), generator)


# --- annotations ------------------------------------------------------------------------------------------------------


def _truth(stage: Stage, rows: Sequence[int]) -> Truth:
    """Bring the annotations of photos to the network's frame."""
    chosen = stage.images.take(rows)
    known = chosen.part_truth
    if known is None:
        return Truth()
    high, wide = stage.performer.preprocessing.size_px
    names, places = landmarks_in_input(chosen, range(len(chosen)), stage.performer)
    annotated = (places / torch.tensor([wide, high])).flip(-1).float()
    objects = None if known.masks is None else _objects(stage, chosen.keys, known.masks)
    return Truth(None if bool(annotated.isnan().all()) else annotated, objects, names)


def _objects(stage: Stage, keys: Sequence[str], masks: Any) -> Tensor | None:
    """Return how much of each cell of the tap is the object: the union of the masks of its parts."""
    rows, cols = stage.nothing.shape[1:]
    found: list[Any] = []
    for key in keys:
        union = np.logical_or.reduce(list(masks(key).values()))
        if not union.any():
            found.append(np.full((rows, cols), np.nan, np.float32))
            continue
        seen = stage.performer.preprocessing.frame(Image.fromarray((union * 255).astype(np.uint8)))
        small = seen.convert("L").resize((cols, rows), Image.Resampling.BOX)
        found.append(np.asarray(small, dtype=np.float32) / 255)
    objects = torch.from_numpy(np.stack(found))
    return None if bool(objects.isnan().all()) else objects


# --- record -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """Draws the pictures of a category."""

    stage: Stage
    photos: CategoryPhotos
    rows: Sequence[int]
    account: Account
    strength: Tensor  # photo, part

    def frame(self, photo: int) -> Image.Image:
        prepare = self.stage.performer.preprocessing
        return prepare.frame(self.stage.images.read(self.rows[photo], prepare.scaled_size))

    def gallery(self, part: int) -> str:
        """Draw a part in the photos that hold it most strongly."""
        best = self.strength[:, part].argsort(descending=True, stable=True)[:_GALLERY_PHOTOS].tolist()
        places = [self.account.places[photo, part].tolist() for photo in best]
        file = f"inspect/{self.photos.slug}/part-{part + 1}.jpg"
        draw_gallery(self.stage.folder / file, [self.frame(photo) for photo in best], places)
        return file

    def photo(self, photo: int) -> str:
        """Draw a photo with the windows of its parts."""
        file = f"inspect/{self.photos.slug}/photo-{photo + 1}.jpg"
        grid = self.stage.nothing.shape[1:]
        draw_parts(self.stage.folder / file, self.frame(photo), self.account.places[photo], grid)
        return file


def _record(
    stage: Stage,
    photos: CategoryPhotos,
    found: FoundParts,
    account: Account,
    truth: Truth,
    logits: Tensor,
    drawn: _Drawn,
) -> InspectedCategory:
    verdict, kept = account.verdict, {kind: one.score for kind, one in account.kept.items()}
    measured = len(photos.measured)
    undefined = int(account.whole.range.isnan().sum())
    return InspectedCategory(
        name=photos.name,
        verdict=verdict.kind,
        sentence=sentence(photos.name, verdict, kept, account.windows),
        reason=verdict.reason,
        advantage=verdict.advantage,
        best_null=verdict.best_null,
        against=dict(verdict.against),
        kept=_curves(kept | {"ceiling": account.grid.amax(2)}, curve),
        decisions=_curves({kind: one.decision for kind, one in account.kept.items()}, lambda each: each.mean(0)),
        windows=account.windows,
        parts=_parts(stage, found, account, truth, drawn),
        elsewhere=_mean_share(account, len(account.order), stage.config.seed),
        correlation=mean_correlation(found.places[:, : found.supported]),
        photos=len(photos.found),
        measured=measured,
        shared=int((~account.shares.players.isnan().any(1)).sum()),
        undefined=undefined,
        held_out=photos.held_out,
        decided=_decided(stage.performer, logits),
        shown=_shown(stage, drawn, logits),
        told=verdict.told,
        notes=_notes(photos, measured, undefined, alone=verdict.told is None),
    )


def _notes(photos: CategoryPhotos, measured: int, undefined: int, *, alone: bool) -> tuple[str, ...]:
    notes = ["whether the network tells these photos from others is not known: there are no others"] if alone else []
    if not photos.held_out:
        notes.append("measured on the photos that the parts were found on: there are too few held-out ones")
    if undefined:
        notes.append(
            f"{undefined} of {measured} photos are not counted: with no cell at all the network's score is as high"
        )
    return tuple(notes)


def _curves(values: Mapping[str, Tensor], over_photos: Callable[[Tensor], Tensor]) -> dict[str, Numbers]:
    return {"area": AREAS} | {kind: tuple(over_photos(each).tolist()) for kind, each in values.items()}


def _mean_share(account: Account, player: int, seed: int) -> Estimate:
    """Return a player's mean share over photos with its interval."""
    values = account.shares.players[:, player]
    values = values[~values.isnan()]
    if not len(values):
        return Estimate.undefined()
    generator = torch.Generator().manual_seed(seed)
    return bootstrap(lambda rows: float(values[rows].mean()), len(values), generator=generator)


def _parts(stage: Stage, found: FoundParts, account: Account, truth: Truth, drawn: _Drawn) -> tuple[InspectedPart, ...]:
    names = _names(account, truth)
    made = []
    for place, number in enumerate(account.order):
        share = _mean_share(account, place, stage.config.seed)
        where = account.places[:, place]
        made.append(
            InspectedPart(
                id=f"part-{place + 1}",
                name=names[place],
                share=share.value,
                share_interval=share.interval,
                loss=float(account.shares.loss[:, place].nanmean()),
                alone=float(account.alone[:, place].nanmedian()),
                movement=float(found.movement[number]),
                stability=float(found.stability[number]),
                place=_pair(where.mean(0)),
                spread=float(where.var(0).sum().sqrt()) if len(where) > 1 else math.nan,
                on_object=_on_object(where, truth.objects),
                gallery=drawn.gallery(place),
            )
        )
    return tuple(made)


def _pair(values: Tensor) -> tuple[float, float]:
    first, second = values.tolist()
    return first, second


def _names(account: Account, truth: Truth) -> list[str]:
    """Name the parts by the landmarks that they stand for; two of one landmark are told apart by a number."""
    plain = [f"part {place + 1}" for place in range(len(account.order))]
    if truth.annotated is None:
        return plain
    landmarks = nearest_landmarks(account.places, truth.annotated)
    named = [truth.landmarks[k].replace("_", " ") if k is not None else "" for k in landmarks]
    times: Counter[str] = Counter()
    for place, name in enumerate(named):
        times[name] += 1
        if name:
            plain[place] = name if times[name] == 1 else f"{name} {times[name]}"
    return plain


def _on_object(places: Tensor, objects: Tensor | None) -> float:
    """Return the share of places whose cell holds something of the object."""
    if objects is None:
        return math.nan
    grid = torch.tensor(objects.shape[1:])
    cells = (places.clamp(0, 1 - 1e-6) * grid).long()
    held = objects[torch.arange(len(places)), cells[:, 0], cells[:, 1]]
    known = ~held.isnan()
    return float((held[known] > 0).double().mean()) if bool(known.any()) else math.nan


def _decided(performer: Performer, logits: Tensor) -> tuple[DecidedClass, ...]:
    counts = Counter(performer.outputs.decisions(logits).argmax(1).tolist())
    return tuple(
        DecidedClass(name=performer.output_name(output), output=output, share=number / len(logits))
        for output, number in counts.most_common(_DECIDED)
        if number / len(logits) >= _LITTLE_SHARE
    )


def _shown(stage: Stage, drawn: _Drawn, logits: Tensor) -> tuple[InspectedPhoto, ...]:
    """Record and draw the first of the photos whose scores were shared."""
    account, at = drawn.account, AREAS.index(SAID_AREA)
    outputs = stage.performer.outputs
    chances = outputs.probabilities(outputs.decisions(logits))
    made = []
    for photo in range(min(SHOWN_PHOTOS, len(account.shares.players))):
        output = int(account.whole.classes[photo])
        made.append(
            InspectedPhoto(
                image=stage.images.keys[drawn.rows[photo]],
                predicted=stage.performer.output_name(output),
                probability=float(chances[photo, output]),
                shares=tuple(account.shares.players[photo].tolist()),
                standard_error=tuple(account.shares.standard_error[photo].tolist()),
                losses=tuple(account.shares.loss[photo].tolist()),
                kept=float(account.kept["parts"].score[photo, at]),
                kept_other=float(account.kept["other_photos"].score[photo, at]),
                places=tuple(_pair(place) for place in account.places[photo]),
                picture=drawn.photo(photo),
            )
        )
    return tuple(made)
