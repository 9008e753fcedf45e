"""Which features of a network indicate each class: the μ-lasso over the descriptors of all layers.

A *feature* is one channel of one layer's output, and the descriptor ``x`` of an image has an entry for each
(:mod:`partlens.selection.descriptors`). The weights ``w_j`` of class ``j`` come from the μ-lasso
(:mod:`partlens.selection.lasso`); the relevant features of a class are those whose weight is not 0, and the
contribution of each to one image's class is ``w_j · x``, elementwise.

Source: the paper (arXiv 1712.06302).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import InputError, expected, nearest
from partlens.selection.descriptors import FeatureIndex
from partlens.selection.labels import LabelMatrix
from partlens.selection.lasso import LassoSolution, OnFailure, mu_lasso
from partlens.selection.responses import Responses


@dataclass(frozen=True)
class Selection:
    """The relevant features of each class.

    Args:
        weights: ``W``; exactly 0 where a feature is not relevant.
        index: layer and channel of every feature.
        classes: name of each column.
        solution: the solver's certificate.
    """

    weights: Float[Tensor, "feature class"]
    index: FeatureIndex
    classes: tuple[str, ...]
    solution: LassoSolution

    def column(self, name: int | str) -> int:
        """Return the column of a class, given by name or number.

        Raises:
            InputError: no such class, with the nearest names.
        """
        if isinstance(name, str):
            if name not in self.classes:
                raise InputError(
                    expected("a class of the selection", name, f"Nearest: {', '.join(nearest(name, self.classes))}")
                )
            return self.classes.index(name)
        if not 0 <= name < len(self.classes):
            raise InputError(expected(f"a class from 0 to {len(self.classes) - 1}", name, "Count from 0"))
        return int(name)

    def relevant(self, name: int | str) -> list[tuple[str, int, float]]:
        """Return layer, channel and weight of all features of a class whose weight is not 0, the largest first.

        Equal weights stand in the order of the descriptor. No other threshold is applied, as in the authors' code.
        """
        weights = self.weights[:, self.column(name)]
        chosen = weights.nonzero()[:, 0]
        order = weights[chosen].abs().argsort(descending=True, stable=True)
        return [(*self.index.place(int(feature)), float(weights[feature])) for feature in chosen[order]]

    def contribution(self, x: Float[Tensor, "image feature"], name: int | str) -> Float[Tensor, "image feature"]:
        """Return ``r = w_j · x``, elementwise: how much each feature of each image speaks for a class."""
        return self.weights[:, self.column(name)].to(x.dtype) * x


def _rows_of(responses: Responses | Tensor | npt.NDArray[Any]) -> Tensor | npt.NDArray[Any]:
    return responses.descriptor if isinstance(responses, Responses) else responses


def select_relevant(
    responses: Responses | Tensor | npt.NDArray[Any],
    labels: LabelMatrix | Tensor | npt.NDArray[Any],
    mu: float | int = 10.0,  # noqa: PYI041 - the shape checks of the tests do not take an int for a float
    *,
    nonnegative: bool = True,
    index: FeatureIndex | None = None,
    classes: Sequence[str] | None = None,
    tolerance: float = 1e-6,
    on_failure: OnFailure = "raise",
) -> Selection:
    """Find the few features that indicate each class.

    Args:
        responses: descriptors ``[image, feature]``, or what `stream_responses` gave.
        labels: one-hot ``[image, class]``, or what `label_matrix` gave.
        mu: bound on the sum of a class's absolute weights; the authors' demo has 10 for all data sets, 5 for an8Flower.
        nonnegative: whether weights must be at least 0; see :mod:`partlens.selection.lasso`.
        index: layer and channel of every feature; taken from ``responses`` where it has one.
        classes: names of the columns; taken from ``labels`` where it has them, else numbers.
        tolerance: as in `mu_lasso`.
        on_failure: as in `mu_lasso`.

    Returns:
        The selection.

    Raises:
        InputError: no index, or one that does not fit; as `mu_lasso`.
        NotConvergedError: as `mu_lasso`.
    """
    rows = _rows_of(responses)
    index = index or (responses.index if isinstance(responses, Responses) else None)
    matrix = labels.matrix if isinstance(labels, LabelMatrix) else labels
    if classes is None:
        classes = labels.classes if isinstance(labels, LabelMatrix) else [str(j) for j in range(matrix.shape[-1])]
    if index is None:
        raise InputError(expected("index=, to name the features", "none", "Give a FeatureIndex"))
    if rows.ndim != 2 or rows.shape[1] != index.size:
        raise InputError(
            expected(
                f"responses of {index.size} features, as in the index", str(tuple(rows.shape)), "Use its own index"
            )
        )
    if matrix.ndim != 2 or matrix.shape[1] != len(classes):
        raise InputError(
            expected(f"labels of {len(classes)} classes", str(tuple(matrix.shape)), "Give one name per column")
        )
    solution = mu_lasso(rows, matrix, mu, nonnegative, tolerance=tolerance, on_failure=on_failure)
    return Selection(solution.weights, index, tuple(classes), solution)


@dataclass(frozen=True)
class Readout:
    """How well the weights alone tell the classes: the class with the largest ``w_j · x`` (sum over features).

    Args:
        correct: per image, whether that is its class.
        shuffled: the same with weights fitted to shuffled labels: the null. ``None`` when it was not asked for.
        chance: one over the number of classes.
        majority: share of the most frequent class among these images.
    """

    correct: Bool[Tensor, " image"]
    shuffled: Bool[Tensor, " image"] | None
    chance: float
    majority: float

    @property
    def accuracy(self) -> float:
        """Share of images that are told right."""
        return float(self.correct.double().mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy; ``n`` is the number of images."""
        n, z = len(self.correct), 1.96
        share = self.accuracy
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)


def _told(weights: Tensor, rows: Tensor | npt.NDArray[Any], block: int = 4096) -> Int[Tensor, " image"]:
    parts = []
    for start in range(0, rows.shape[0], block):
        here = rows[start : start + block]
        values = here.detach().cpu() if isinstance(here, Tensor) else torch.from_numpy(np.array(here))
        parts.append((values.double() @ weights).argmax(1))
    return torch.cat(parts)


def readout(
    selection: Selection,
    responses: Responses | Tensor | npt.NDArray[Any],
    labels: LabelMatrix | Tensor | npt.NDArray[Any],
    *,
    fitted: tuple[Responses | Tensor | npt.NDArray[Any], LabelMatrix | Tensor | npt.NDArray[Any]] | None = None,
    generator: torch.Generator | None = None,
) -> Readout:
    """Measure how far the selected features alone tell the classes, beside the same after shuffling the labels.

    Args:
        selection: the fitted weights.
        responses: descriptors of images that were not fitted on.
        labels: their one-hot labels; images without a class (a row of zeros) are left out.
        fitted: descriptors and labels that the selection was fitted on; with them the null is measured.
        generator: draws the shuffled order; needed with ``fitted``.

    Returns:
        The read-out.

    Raises:
        InputError: ``fitted`` without a generator, or no image with a class.
    """
    matrix = labels.matrix if isinstance(labels, LabelMatrix) else torch.as_tensor(np.asarray(labels))
    known = matrix.sum(1) > 0
    if not bool(known.any()):
        raise InputError(expected("at least 1 image of a class", 0, "Give labelled images"))
    truth = matrix.argmax(1)
    rows = _rows_of(responses)
    correct = (_told(selection.weights, rows) == truth)[known]
    shuffled: Tensor | None = None
    if fitted is not None:
        if generator is None:
            raise InputError(expected("a generator, to shuffle labels", "none", "Give generator="))
        target = fitted[1].matrix if isinstance(fitted[1], LabelMatrix) else torch.as_tensor(np.asarray(fitted[1]))
        order = torch.randperm(len(target), generator=generator)
        null = select_relevant(
            fitted[0],
            target[order],
            selection.solution.mu,
            nonnegative=selection.solution.nonnegative,
            index=selection.index,
            classes=selection.classes,
            on_failure="return",
        )
        shuffled = (_told(null.weights, rows) == truth)[known]
    counts = matrix[known].sum(0)
    return Readout(correct, shuffled, 1 / matrix.shape[1], float(counts.max() / counts.sum()))
