"""Scores of layers and nulls on the same photos: per category where filters belong to categories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from partlens.estimate import Estimate
from partlens.evaluation.places import filter_table
from partlens.metrics.localisation import Peaks, instability_differences, localisation_scores
from partlens.metrics.scores import LOCALISATION, LocalisationScores
from partlens.records import plain

ROUNDS = 100


@dataclass(frozen=True)
class Categories:
    """The categories that an explainer's filters are shared among.

    Attributes:
        names: at least two.
        labels: of the held-out photos, an index into ``names``.
        train_labels: of the training photos; they decide which category a filter belongs to.
    """

    names: tuple[str, ...]
    labels: Int[Tensor, " image"]
    train_labels: Int[Tensor, " photo"]


def mean_of(values: Sequence[Estimate], weights: Sequence[int]) -> Estimate:
    """Return a weighted mean of independent estimates; each end of the interval adds up in squares."""
    usable = [(v, w) for v, w in zip(values, weights, strict=True) if w > 0 and not math.isnan(v.value)]
    total = sum(w for _, w in usable)
    if not usable:
        return Estimate.undefined()
    mean = sum(v.value * w for v, w in usable) / total
    low = math.sqrt(sum(((v.value - v.interval[0]) * w / total) ** 2 for v, w in usable))
    high = math.sqrt(sum(((v.interval[1] - v.value) * w / total) ** 2 for v, w in usable))
    return Estimate(mean, (mean - low, mean + high), sum(v.n for v, _ in usable), usable[0][0].unit)


def joined_scores(scores: Sequence[LocalisationScores], filters: Sequence[int]) -> LocalisationScores:
    """Return the mean over filters of scores that were measured per category, each on its own photos."""
    joined = {name: mean_of([s.of(name) for s in scores], list(filters)) for name in LOCALISATION}
    shares: dict[str, float] = {}
    for landmark in dict.fromkeys(name for s in scores for name in s.landmark_shares):
        parts = [(s.landmark_shares[landmark], n) for s, n in zip(scores, filters, strict=True)]
        known = [(v, n) for v, n in parts if not math.isnan(v) and n]
        shares[landmark] = sum(v * n for v, n in known) / sum(n for _, n in known) if known else math.nan
    return LocalisationScores(**joined, landmark_shares=shares)


@dataclass(frozen=True)
class Scoring:
    """The photos that layers and nulls are scored on.

    Attributes:
        landmarks: x, y in the input, NaN where absent.
        names: of the landmarks.
        photos: an integer per image, equal for crops of one photo.
        size_px: height and width of the input.
        generator: of every bootstrap, one after the other.
        categories: where filters are shared among several; each is then scored on the photos of its own.
        assigned: per layer, the category of each filter; empty without categories.
    """

    landmarks: Float[Tensor, "image landmark 2"]
    names: tuple[str, ...]
    photos: Int[Tensor, " image"]
    size_px: tuple[int, int]
    generator: torch.Generator
    categories: Categories | None
    assigned: Mapping[str, Int[Tensor, " filter"]]

    def _images(self, number: int) -> Tensor:
        assert self.categories is not None
        return (self.categories.labels == number).nonzero()[:, 0]

    def _filters(self, layer: str, number: int) -> Tensor:
        return (self.assigned[layer] == number).nonzero()[:, 0]

    def _of_photos(self, of: Peaks, index: Tensor | None, *, fixed: bool) -> LocalisationScores:
        return localisation_scores(
            of,
            self.landmarks if index is None else self.landmarks[index],
            self.size_px,
            landmark_names=self.names,
            photos=self.photos if index is None else self.photos[index],
            generator=self.generator,
            rounds=ROUNDS,
            fixed_null=fixed,
        )

    def scores(self, of: Peaks, layer: str | None, *, fixed: bool = False) -> dict[str, Any]:
        """Return the scores of a layer, or of a null (no layer), which is measured on every category alike.

        Args:
            of: peaks.
            layer: whose filters they are.
            fixed: the peaks stand still, so that nothing but instability is defined.
        """
        if self.categories is None:
            return dict(plain(self._of_photos(of, None, fixed=fixed)))
        found, counts, by_category = [], [], {}
        for number, name in enumerate(self.categories.names):
            index = self._images(number)
            own = None if layer is None else self._filters(layer, number)
            # A null weighs as much in each category as the explainer that it stands beside.
            count = len(self._filters("explainer", number) if own is None else own)
            if (own is not None and not len(own)) or len(index) < 2:
                continue
            part = of.rows(index) if own is None else of.rows(index).filters(own)
            counts.append(count)
            found.append(self._of_photos(part, index, fixed=fixed))
            by_category[name] = {"filters": count, **plain(found[-1])}
        return dict(plain(joined_scores(found, counts))) | {"by_category": by_category}

    def differences(self, nulls: Mapping[str, Peaks], own: Peaks, generator: torch.Generator) -> dict[str, Estimate]:
        """Return the explainer's instability minus each null's, on the same photos."""

        def of_photos(part: Peaks, its: Mapping[str, Peaks], landmarks: Tensor, photos: Tensor) -> dict[str, Estimate]:
            return dict(
                instability_differences(
                    part, its, landmarks, self.size_px, photos=photos, generator=generator, rounds=ROUNDS
                )
            )

        if self.categories is None:
            return of_photos(own, nulls, self.landmarks, self.photos)
        each, counts = [], []
        for number in range(len(self.categories.names)):
            index, chosen = self._images(number), self._filters("explainer", number)
            if len(index) < 2 or not len(chosen):
                continue
            counts.append(len(chosen))
            its = {kind: of.rows(index) for kind, of in nulls.items()}
            each.append(of_photos(own.rows(index).filters(chosen), its, self.landmarks[index], self.photos[index]))
        return {kind: mean_of([found[kind] for found in each], counts) for kind in nulls}

    def table(self, of: Peaks, layer: str) -> list[dict[str, Any]]:
        """Return a record per filter of a layer."""
        if self.categories is None:
            return filter_table(of, self.landmarks, self.names, self.size_px, self.photos)
        records: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(self.categories.names):
            index, own = self._images(number), self._filters(layer, number)
            if not len(own):
                continue
            part = of.rows(index).filters(own)
            found = filter_table(part, self.landmarks[index], self.names, self.size_px, self.photos[index])
            records |= {
                k: {**record, "filter": k, "category": name} for k, record in zip(own.tolist(), found, strict=True)
            }
        return [records[k] for k in sorted(records)]
