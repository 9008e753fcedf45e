"""What happens before the first epoch: the tap's scale, seeds, norm layers, and the teachers of the filters."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from partlens.explainer.network import Explainer
from partlens.explainer.seeding import MOST_PHOTOS, VotedParts, seed_parts, voted_parts
from partlens.explainer.teachers import LaterParts, Source, centroids, matched_teachers, part_teachers
from partlens.explainer.training_maps import (
    NORM_SAMPLE,
    TrainingMaps,
    epoch_generator,
    gather,
    norm_sample,
    own_photos,
    read_evidence,
)

_SEED_VIEWS = 5
_LEAST_UPPER_CELLS = 3
_VOTERS = 256
_VOTED_POWER = 6.0


def _voted_parts(
    explainer: Explainer, data: TrainingMaps, category: int, generator: torch.Generator, *, voters: int, parts: int
) -> VotedParts:
    """Find the parts of one category that the tap's own features vote for."""
    config = explainer.config
    own = own_photos(data, category)
    photos = own[torch.randperm(len(own), generator=generator)[:MOST_PHOTOS]].sort().values
    views = min(_SEED_VIEWS, data.views)
    maps = torch.stack([gather(data.tap, data.rows(photos, torch.full_like(photos, v))) for v in range(views)])
    rest = data.background_rows
    if data.labels is not None:
        strangers = (data.labels != category).nonzero()[:, 0]
        rest = np.concatenate([rest, data.rows(strangers, torch.zeros_like(strangers))])
    others = rest[:: max(1, len(rest) // (2 * MOST_PHOTOS))][: 2 * MOST_PHOTOS]
    return voted_parts(
        maps,
        data.windows[photos, :views].transpose(0, 1),
        gather(data.tap, others),
        generator,
        read_evidence(data, config, data.rows(photos, torch.zeros_like(photos))),
        voters=voters,
        parts=parts,
        candidates=config.candidates_per_filter * max(voters, parts),
        votes=config.votes,
    )


def _seed_category(
    explainer: Explainer, data: TrainingMaps, category: int, generator: torch.Generator
) -> dict[str, float]:
    """Seed the filters of one category; with several, each has its share of both layers."""
    first = _share(explainer.conv_interp_1.out_channels, category, data.categories)
    second = _share(explainer.conv_interp_2.out_channels, category, data.categories)
    parts = _voted_parts(explainer, data, category, generator, voters=len(first), parts=len(second))
    seed_parts(explainer, parts, (first, second))
    return parts.found


def _share(filters: int, category: int, categories: int) -> Tensor:
    return torch.arange(category * filters // categories, (category + 1) * filters // categories)


def _upper_view(explainer: Explainer, data: TrainingMaps, own: Tensor, photos: Tensor, number: int) -> Tensor:
    """Return what comes after the tap, for some of a category's ``own`` photos in a view: what teachers are found in.

    Where the tracks take a convolution's place, that convolution's maps; elsewhere the last target that has maps of at
    least 3x3 cells, and the tap itself where none has.
    """
    rows = data.rows(own[photos], torch.full_like(photos, number))
    if explainer.structure.replaced is not None:
        with torch.no_grad():
            parts = [
                explainer.conv_ordin(gather(data.tap, part)).relu() for part in np.array_split(rows, _pieces(rows))
            ]
        return torch.cat(parts)
    mapped = [t for t in data.targets if t.ndim == 4 and min(t.shape[2:]) >= _LEAST_UPPER_CELLS]
    return gather(mapped[-1] if mapped else data.tap, rows)


def _voted_places(parts: VotedParts, data: TrainingMaps, own: Tensor, number: int) -> Tensor:
    """Return where voted parts stand in a view of a category's photos."""
    rows = data.rows(own, torch.full_like(own, number))
    pieces = np.array_split(rows, _pieces(rows))
    with torch.no_grad():
        return torch.cat([centroids(parts.maps(gather(data.tap, some)), _VOTED_POWER) for some in pieces])


def _pieces(rows: np.ndarray) -> int:
    return max(1, math.ceil(len(rows) / NORM_SAMPLE))


def find_teachers(explainer: Explainer, data: TrainingMaps) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Find the part teachers of every category.

    Returns:
        ``teachers``, places (photo, teacher, 2) in shares, NaN for photos of other categories, and ``teacher_of``, the
        teacher of each filter of conv-interp-2 for each category (filter, category), since filters change category; and
        what was found, for the log.
    """
    config, structure = explainer.config, explainer.structure
    places = torch.full((data.photos, config.teachers * data.categories, 2), math.nan)
    teacher_of = torch.zeros(structure.channels_out, data.categories, dtype=torch.long)
    found = {"teacher_movement": 0.0, "teacher_correlation": 0.0}
    for category in range(data.categories):
        generator = epoch_generator(config.seed, -1 - category)
        own = own_photos(data, category)
        views = min(data.views, 1 + _SEED_VIEWS)
        sources: list[Source] = []
        if config.teacher_sources != "tap":
            sources.append(LaterParts(functools.partial(_upper_view, explainer, data, own), len(own), generator))
        if config.teacher_sources != "later":
            voted = _voted_parts(explainer, data, category, generator, voters=_VOTERS, parts=_VOTERS)
            sources.append(functools.partial(_voted_places, voted, data, own))
        teachers = part_teachers(
            sources,
            data.windows[own, :views],
            config.teachers,
            config.teacher_variety,
            config.teacher_modes,
        )
        first, count = category * config.teachers, teachers.places.shape[1]
        places[own, first : first + count] = teachers.places
        turns = torch.arange(structure.channels_out) % count
        if config.teacher_match:
            shown = own[:: max(1, len(own) // NORM_SAMPLE)][:NORM_SAMPLE]
            with torch.no_grad():
                ordinary = explainer.conv_ordin(gather(data.tap, data.rows(shown, torch.zeros_like(shown)))).relu()
            turns = matched_teachers(ordinary, places[shown, first : first + count])
        teacher_of[:, category] = first + turns
        found["teacher_movement"] += float(teachers.movement.mean()) / data.categories
        found["teacher_correlation"] += teachers.correlation / data.categories
    return {"teachers": places, "teacher_of": teacher_of}, found


def start_explainer(explainer: Explainer, data: TrainingMaps) -> dict[str, float]:
    """Initialise what needs data: scale of the tap and part candidates (if configured), norm layers and gain.

    Returns:
        What was found, for the log.
    """
    config = explainer.config
    generator = epoch_generator(config.seed, 0)
    found: dict[str, float] = {}
    if config.standardise:
        photos = norm_sample(data)
        explainer.start_scale(gather(data.tap, data.rows(photos, torch.zeros_like(photos))))
    if config.initialisation == "parts":
        for category in range(data.categories):
            seen = _seed_category(explainer, data, category, generator)
            found |= {name: found.get(name, 0.0) + value / data.categories for name, value in seen.items()}
    photos = norm_sample(data)
    explainer.start_norms(gather(data.tap, data.rows(photos, torch.zeros_like(photos))))
    return found
