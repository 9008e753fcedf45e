"""What the verb parts measures: the filters' peaks on photos, their parts, and what each part adds to the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from partlens.attribution.pictures import save_picture, strip
from partlens.data.images import ImageSet
from partlens.evaluation.gallery import region_px
from partlens.evaluation.places import landmarks_in_input, photo_numbers
from partlens.explainer.network import Explainer, performer_head
from partlens.explainer.record import ExplainerRun
from partlens.metrics.localisation import peaks_from_cells
from partlens.network.performer import Performer
from partlens.network.receptive_field import grid_of
from partlens.network.stream import stream
from partlens.object_parts.record import (
    Contributions,
    FoundPart,
    PartsConfig,
    PartsFile,
    renamed,
    with_edits,
)
from partlens.object_parts.rules import SeenPhotos, chosen_rule, find_parts
from partlens.object_parts.shares import mean_contributions, part_shares
from partlens.object_parts.trust import assignment_stability
from partlens.progress import Progress
from partlens.run import Run, command, versions
from partlens.shards import Device
from partlens.verbs.fit_explainer import load_explainer
from partlens.verbs.runs import enough_photos, labels_of, open_photos, sampled

_BATCH = 16
_STRIP_FILTERS = 4
_STRIP_PHOTOS = 3
_STRIP_PX = 112


@dataclass(frozen=True)
class _Opened:
    """A finished explainer, its performer, and the photos that its parts are found on."""

    run: Path  # the run directory
    explainer: Explainer  # in eval mode
    performer: Performer  # the network it explains
    head: nn.Module  # the performer from the last target on
    images: ImageSet  # the data set
    rows: tuple[int, ...]  # photos of the categories
    split: str  # of the photos
    categories: tuple[str, ...]  # an empty name means all photos as one
    how: PartsConfig  # the settings


def opened_explainer(
    run: Path,
    data: str | Path | ImageSet | None,
    model: str | nn.Module | Performer | None,
    where: Device,
    split: str,
    how: PartsConfig,
    show: Progress,
) -> _Opened:
    """Open a run and choose its photos.

    Raises:
        ImageError: fewer than two photos of the categories.
        RunError: the run is missing or unfinished, or its performer or photos are not found.
    """
    explainer, performer = load_explainer(run, model, where.device)
    record = Run(run).read(ExplainerRun)
    performer = performer.computing(record.performer.passes)
    images, _ = open_photos(data, record, show)
    categories = record.data.categories
    rows = sampled(enough_photos(images, categories, split)[0], how.photos_max, how.seed)
    head = performer_head(performer, explainer.structure)
    return _Opened(run, explainer, performer, head, images, tuple(rows), split, categories, how)


def measured_parts(opened: _Opened, earlier: PartsFile | None, rename: Sequence[str], show: Progress) -> PartsFile:
    """Find the parts, measure what they add, and draw them."""
    how, seen = opened.how, _seen(opened, show)
    generator = torch.Generator().manual_seed(how.seed)
    found = find_parts(chosen_rule(how.rule, seen), seen, opened.categories, how, generator)
    stability = assignment_stability(
        found.assign, seen.photos, generator=generator, rounds=how.rounds, matched=found.rule == "clusters"
    )
    parts, unplaced = (found.parts, ()) if earlier is None else with_edits(found.parts, earlier)
    for row in unplaced:
        show.say(f"the name {row.name!r} fits no part found now; it is kept under unplaced_names")
    shown = (~seen.landmarks.isnan().any(-1)).sum(0).tolist()
    file = PartsFile(
        rule=found.rule,
        config=how,
        split=opened.split,
        photos=len(opened.rows),
        categories=opened.categories,
        landmarks=dict(zip(seen.names, shown, strict=True)),
        data=opened.images.name,
        evidence=found.evidence,
        stability=stability,
        parts=parts,
        filters=found.filters,
        unplaced_names=unplaced,
        command=command(),
        versions=versions(),
    )
    file = renamed(file, rename)
    contributions = _contributions(opened, seen, file, show)
    return file.changed(contributions=contributions, parts=_drawn(opened, seen, file.parts, show))


def _filter_categories(opened: _Opened, show: Progress) -> Tensor:
    """Return the category of each filter, as an evaluation does: whose training photos activate it most on average."""
    structure = opened.explainer.structure
    if len(opened.categories) == 1:
        return torch.zeros(structure.channels_out, dtype=torch.long)
    train = [opened.images.rows_of((name,), "train")[0] for name in opened.categories]
    means, done = [], 0
    with show.task("finding the filters' categories", sum(map(len, train))) as advance, torch.no_grad():
        for own in train:
            total = torch.zeros(structure.channels_out, dtype=torch.float64)
            for batch in stream(opened.performer, opened.images, own, (structure.tap,), batch_size=_BATCH):
                total += opened.explainer.interpret(batch.maps[structure.tap])[1].cpu().double().sum((0, 2, 3))
                done += len(batch.rows)
                advance(done)
            means.append(total / max(len(own), 1))
    return torch.stack(means).argmax(0)


def _seen(opened: _Opened, show: Progress) -> SeenPhotos:
    """Run the photos through the performer and the explainer once."""
    explainer, performer, structure = opened.explainer, opened.performer, opened.explainer.structure
    assigned = _filter_categories(opened, show)
    maps, cells, scores, outputs, done = [], [], [], [], 0
    taps = (structure.read, structure.targets[-1])
    with show.task("reading photos", len(opened.rows)) as advance, torch.no_grad():
        for batch in stream(performer, opened.images, opened.rows, taps, batch_size=_BATCH):
            activations = explainer.interpret(batch.maps[structure.read])[1]
            maps.append(batch.maps[structure.read].cpu())
            scores.append(activations.flatten(2).amax(-1).cpu())
            cells.append(explainer.places(activations).cpu())
            outputs.append(opened.head(batch.maps[structure.targets[-1]])[0].cpu())
            done += len(batch.rows)
            advance(done)
    grid = grid_of(performer.field(structure.tap))
    names, landmarks = landmarks_in_input(opened.images, opened.rows, performer)
    return SeenPhotos(
        maps=torch.cat(maps),
        peaks=peaks_from_cells(torch.cat(cells), torch.cat(scores), structure.side_cells, *grid),
        outputs=torch.cat(outputs),
        landmarks=landmarks,
        names=names,
        photos=photo_numbers(opened.images, opened.rows),
        labels=labels_of(opened.images, opened.categories, opened.rows),
        assigned=assigned,
        grid=grid,
        size_px=performer.preprocessing.size_px,
    )


def _contributions(opened: _Opened, seen: SeenPhotos, file: PartsFile, show: Progress) -> Contributions:
    """Measure what each part adds to the performer's own answer to each photo."""
    chosen, batches = seen.outputs.argmax(1), []
    with show.task("measuring parts", len(chosen)) as advance:
        for first in range(0, len(chosen), _BATCH):
            rows = slice(first, first + _BATCH)
            maps, classes = seen.maps[rows], chosen[rows]
            batches.append(part_shares(opened.explainer, opened.head, maps, classes, file.named, opened.how.seed))
            advance(min(first + _BATCH, len(chosen)))
    return mean_contributions(batches, file.named, seen.outputs, seen.photos, opened.how.seed)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _drawn(opened: _Opened, seen: SeenPhotos, parts: Sequence[FoundPart], show: Progress) -> tuple[FoundPart, ...]:
    """Draw for each part what its most active filters peak at."""
    # What the norm layer passes on is comparable between filters; a raw peak is not.
    activity = (seen.peaks.scores / opened.explainer.norm_interp.divisor.cpu().double()).mean(0)
    size, field = seen.size_px, opened.performer.field(opened.explainer.structure.tap)
    result, prepare = [], opened.performer.preprocessing
    with show.task("drawing parts", len(parts)) as advance:
        for number, part in enumerate(parts, start=1):
            pictures, strongest = [], _strongest(seen, part.filters, activity)
            for k, photo in strongest:
                row = opened.rows[photo]
                box = region_px(seen.peaks.positions_px[photo, k], field, size)
                frame = prepare.frame(opened.images.read(row, prepare.scaled_size))
                left, top, right, bottom = box
                pictures.append(np.asarray(frame.crop((round(left), round(top), round(right), round(bottom)))))
            file = f"parts/{number}.png" if pictures else None
            if file is not None:
                save_picture(opened.run / file, strip(pictures, _STRIP_PX))
            shown = tuple(dict.fromkeys(k for k, _ in strongest))
            result.append(part.changed(strip=file, shown=shown))
            advance(number)
    return tuple(result)


def _strongest(seen: SeenPhotos, filters: Sequence[int], activity: Tensor) -> list[tuple[int, int]]:
    """Return (filter, photo) of the most active filters on the photos of their category where they peak highest."""
    found: list[tuple[int, int]] = []
    used: set[int] = set()
    for k in sorted(filters, key=lambda k: (-float(activity[k]), k))[:_STRIP_FILTERS]:
        order = seen.peaks.scores[:, k].argsort(descending=True, stable=True).tolist()
        own = [i for i in order if seen.labels[i] == seen.assigned[k]]
        # Each photo once in a strip, while there are others.
        chosen = [*(i for i in own if i not in used), *(i for i in own if i in used)][:_STRIP_PHOTOS]
        used.update(chosen)
        found += [(k, photo) for photo in chosen]
    return found
