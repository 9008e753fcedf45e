"""Where things stand in the input: cells of a layer, landmarks of photos, and a record of each filter's peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.metrics.localisation import (
    Peaks,
    consistency_per_filter,
    dead_filters,
    instability_per_filter,
    spread_per_filter,
)
from partlens.network.zoo import Performer


def top_layer(performer: Performer) -> str:
    """Return the performer's last layer with maps larger than 1x1 and a local receptive field.

    Location instability of the papers' performers is that of the top convolution; for a residual network it is the
    output of the last block.
    """
    spatial = [layer for layer in performer.layers if layer.has_places]
    blocks = [layer.name for layer in spatial if "pool" not in layer.kind.lower()]
    return blocks[-1] if blocks else spatial[-1].name


def landmarks_in_input(
    images: ImageSet, rows: Sequence[int], performer: Performer
) -> tuple[tuple[str, ...], Float[Tensor, "image landmark 2"]]:
    """Return landmark names and positions in input pixels; NaN where absent or cropped away."""
    truth = images.part_truth
    if truth is None:
        return (), torch.full((len(rows), 0, 2), math.nan, dtype=torch.float64)
    chosen = truth.for_keys([images.keys[i] for i in rows])
    moved = np.full(chosen.positions_px.shape, np.nan)
    for index, row in enumerate(rows):
        if not np.isnan(chosen.positions_px[index]).all():
            moved[index] = performer.preprocessing.to_input_px(chosen.positions_px[index], images.size_px(row))
    height, width = performer.preprocessing.size_px
    outside = (moved < 0).any(-1) | (moved[..., 0] > width) | (moved[..., 1] > height)
    moved[outside] = np.nan
    return tuple(truth.landmarks), torch.from_numpy(moved)


def photo_numbers(images: ImageSet, rows: Sequence[int]) -> Int[Tensor, " image"]:
    """Return an integer per row, equal for crops of one photo."""
    names = sorted({images.photos[i] for i in rows})
    number = {name: k for k, name in enumerate(names)}
    return torch.tensor([number[images.photos[i]] for i in rows])


def filter_table(
    peaks: Peaks, landmarks: Tensor, names: Sequence[str], size: tuple[int, int], photos: Tensor
) -> list[dict[str, Any]]:
    """Return one record per filter: instability, consistency and its landmark, spread, dead or not."""
    instability = instability_per_filter(peaks, landmarks, size)
    consistency, landmark = consistency_per_filter(peaks, landmarks, photos)
    spread, dead = spread_per_filter(peaks), dead_filters(peaks)

    def number(value: Tensor) -> float | None:
        return None if math.isnan(float(value)) else round(float(value), 5)

    return [
        {
            "filter": k,
            "instability": number(instability[k]),
            "consistency": number(consistency[k]),
            "landmark": names[int(landmark[k])] if names and number(consistency[k]) is not None else None,
            "spread_cells": number(spread[k]),
            "dead": bool(dead[k]),
        }
        for k in range(peaks.scores.shape[1])
    ]
