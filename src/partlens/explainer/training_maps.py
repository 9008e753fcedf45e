"""What training reads: cached maps of views of photos, and how an epoch draws from them.

Everything drawn in an epoch comes from a generator seeded by (seed, epoch).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.explainer.config import ExplainerConfig
from partlens.explainer.evidence import sharpened
from partlens.explainer.terms import ViewPair

NORM_SAMPLE = 256
"""Photos that norms and target norms are measured on, at most."""


@dataclass(frozen=True)
class TrainingMaps:
    """What training reads: cached maps of views of photos.

    Attributes:
        tap: maps at the tap, ``[row, filter, row, col]``; memory maps are read batch by batch.
        targets: features to reconstruct, one array per target.
        windows: how each view of the category's photos was cut (photo, view, 5), see
            :func:`partlens.explainer.views.view_windows`; row ``photo * views + view`` of the arrays.
        background_rows: rows of the arrays that hold other photos; may be empty.
        evidence: the performer's evidence at the tap, ``[row, row, col]``, for the rows of the category's photos.
        labels: the category of each photo, from 0, for an explainer of several categories.
    """

    tap: np.ndarray
    targets: tuple[np.ndarray, ...]
    windows: Float[Tensor, "photo view 5"]
    background_rows: Int[np.ndarray, " background"]
    evidence: np.ndarray | None = None
    labels: Int[Tensor, " photo"] | None = None

    @property
    def categories(self) -> int:
        """Number of categories that filters are shared among."""
        return 1 if self.labels is None else int(self.labels.max()) + 1

    @property
    def photos(self) -> int:
        """Number of photos of the category."""
        return int(self.windows.shape[0])

    @property
    def views(self) -> int:
        """Views of each photo."""
        return int(self.windows.shape[1])

    def rows(self, photos: Tensor, view: Tensor) -> np.ndarray:
        """Return the array rows of photos in views."""
        found: np.ndarray = (photos * self.views + view).numpy()
        return found

    def read(self, rows: np.ndarray) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Read maps and targets of some rows as float32."""
        return gather(self.tap, rows), tuple(gather(t, rows) for t in self.targets)


def gather(array: np.ndarray, rows: np.ndarray) -> Tensor:
    """Read rows in the file's order, which a memory map serves best, and put them back in the order asked."""
    order = np.argsort(rows, kind="stable")
    read = torch.from_numpy(np.asarray(array[rows[order]])).float()
    return read[torch.from_numpy(np.argsort(order, kind="stable"))]


@dataclass(frozen=True)
class Batch:
    """Rows of one step.

    Attributes:
        rows: of the arrays: photos of the category first, then background.
        positives: how many are of the category.
        pair: which of them are two views of one photo, where the objective compares views.
        labels: the category of each positive, for an explainer of several.
    """

    rows: np.ndarray
    positives: int
    pair: ViewPair | None
    labels: Tensor | None


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of an epoch; what is drawn before the first one takes epochs of 0 and below."""
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch * 7_919 + 17) % (2**63))


def epoch_batches(data: TrainingMaps, config: ExplainerConfig, epoch: int) -> Iterator[Batch]:
    """Draw an epoch: every photo once or twice, each time in a drawn view, beside background photos.

    With equivariance a batch is half photos as they are and half another view of the same photos.
    """
    generator = epoch_generator(config.seed, epoch)
    paired = config.equivariance_weight > 0 and data.views > 1
    size = min(config.batch_size, data.photos * (2 if paired else 1))
    per_batch = max(2, size // 2) if paired else size
    order = torch.randperm(data.photos, generator=generator)
    steps = max(1, math.ceil(data.photos / per_batch))
    for step in range(steps):
        # The last batch is filled up from the start of the order, so that all batches have one size.
        photos = order[(torch.arange(per_batch) + step * per_batch) % data.photos]
        pair: ViewPair | None = None
        if paired:
            view = torch.randint(1, data.views, (per_batch,), generator=generator)
            rows = np.concatenate([data.rows(photos, torch.zeros_like(view)), data.rows(photos, view)])
            pair = ViewPair(slice(0, per_batch), slice(per_batch, 2 * per_batch), data.windows[photos, view])
        else:
            rows = data.rows(photos, torch.randint(0, data.views, (per_batch,), generator=generator))
        positives = len(rows)
        labels = None if data.labels is None else data.labels[photos].repeat(positives // per_batch)
        if len(data.background_rows) and config.background_batch:
            drawn = torch.randint(len(data.background_rows), (config.background_batch,), generator=generator)
            rows = np.concatenate([rows, data.background_rows[drawn.numpy()]])
        yield Batch(rows, positives, pair, labels)


def read_evidence(data: TrainingMaps, config: ExplainerConfig, rows: np.ndarray) -> Tensor | None:
    """Read the evidence of some rows as the objective wants it; ``None`` where it is not used."""
    if data.evidence is None or config.evidence_weight == 0:
        return None
    return sharpened(gather(data.evidence, rows), config.evidence_smooth_cells, config.evidence_power)


def norm_sample(data: TrainingMaps) -> Tensor:
    """Return the photos that norms and target norms are measured on: with several categories, some of each."""
    count = min(data.photos, NORM_SAMPLE)
    if data.labels is None:
        return torch.arange(count)
    return torch.arange(count) * data.photos // count


def own_photos(data: TrainingMaps, category: int) -> Tensor:
    """Return the photos of one category."""
    return torch.arange(data.photos) if data.labels is None else (data.labels == category).nonzero()[:, 0]
