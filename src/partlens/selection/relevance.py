"""Which features of a network indicate each class: labels, the μ-lasso over all layers, and the linear read-out.

A *feature* is one channel of one layer's output, and the descriptor ``x`` of an image has an entry for each
(:mod:`partlens.selection.descriptors`). The weights ``w_j`` of class ``j`` come from the μ-lasso
(:mod:`partlens.selection.lasso`); the relevant features of a class are those whose weight is not 0, and the
contribution of each to one image's class is ``w_j · x``, elementwise.

Source: the paper (arXiv 1712.06302).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import ImageError, InputError, expected, listed
from partlens.selection.inner_products import Rows, blocks
from partlens.selection.lasso import LassoSolution, OnFailure, mu_lasso
from partlens.selection.record import DEFAULT_MU, FeatureIndex

_MUS = (1.0, 2.0, 5.0, 10.0, 20.0)
_FOLDS = 3


@dataclass(frozen=True)
class LabelMatrix:
    """One-hot labels, float64, zeros for an image of no class; of each column its name and the performer's output."""

    matrix: Float[Tensor, "image class"]
    classes: tuple[str, ...]
    outputs: tuple[int | None, ...]


def label_matrix(
    names: Sequence[str], output_of: Callable[[str], int | None], classes: Sequence[str] | None = None
) -> LabelMatrix:
    """Make one-hot labels from the class of each image: its category, or the output that the network decides for.

    ``classes`` are the columns in this order, by default all that occur, sorted; one without an image is dropped.
    """
    if empty := [str(place) for place, name in enumerate(names) if not name]:
        rule, remedy = "a category for every image", "Sort the images into sub-folders"
        raise ImageError(expected(rule, f"none for images {listed(empty)}", remedy))
    wanted = sorted(set(names)) if classes is None else list(dict.fromkeys(classes))
    present = tuple(name for name in wanted if name in set(names))
    if not present:
        raise ImageError(expected(f"an image of {listed(wanted)}", "none", "Check the names of the classes"))
    columns = [torch.tensor([one == name for one in names], dtype=torch.float64) for name in present]
    return LabelMatrix(torch.stack(columns, 1), present, tuple(map(output_of, present)))


@dataclass(frozen=True)
class Selection:
    """The relevant features of each class: weights with certificate, the features' layers, a name per column."""

    solution: LassoSolution
    index: FeatureIndex
    classes: tuple[str, ...]

    @property
    def weights(self) -> Float[Tensor, "feature class"]:
        """``W``; exactly 0 where a feature is not relevant."""
        return self.solution.weights

    def relevant(self, column: int) -> list[tuple[str, int, float]]:
        """Return layer, channel and weight of all features of a class whose weight is not 0.

        The largest absolute weight comes first, equal ones in the order of the descriptor. No other threshold is
        applied, as in the authors' code.
        """
        weights = self.weights[:, column]
        chosen = weights.nonzero()[:, 0]
        order = weights[chosen].abs().argsort(descending=True, stable=True)
        return [(*self.index.place(int(feature)), float(weights[feature])) for feature in chosen[order]]


def select_relevant(
    descriptors: Float[Tensor, "image feature"] | Rows,
    labels: LabelMatrix,
    index: FeatureIndex,
    mu: float | int = DEFAULT_MU,  # noqa: PYI041 - the shape checks of the tests do not take an int for a float
    *,
    nonnegative: bool = True,
    on_failure: OnFailure = "raise",
) -> Selection:
    """Find the few features that indicate each class (see :mod:`partlens.selection.lasso`)."""
    if descriptors.shape[1] != index.size:
        rule = f"descriptors of the {index.size} features of the index"
        raise InputError(expected(rule, descriptors.shape[1], "Use the index of the same pass"))
    solution = mu_lasso(descriptors, labels.matrix, mu, nonnegative, on_failure=on_failure)
    return Selection(solution, index, labels.classes)


def choose_mu(
    descriptors: Float[Tensor, "image feature"] | Rows,
    labels: LabelMatrix,
    index: FeatureIndex,
    generator: torch.Generator,
    *,
    nonnegative: bool = True,
) -> tuple[float, tuple[tuple[float, float], ...]]:
    """Choose μ by the read-out on held-out folds: the smallest whose accuracy is within a standard error of the best.

    A smaller bound names fewer filters, so of bounds that tell the classes equally well the smallest is taken.

    Returns:
        The bound, and the accuracy of every bound that was tried.
    """
    fold = torch.randperm(len(descriptors), generator=generator) % _FOLDS
    truth = labels.matrix.argmax(1)
    tried: list[tuple[float, float]] = []
    for mu in _MUS:
        right = torch.zeros(len(descriptors))
        for number in range(_FOLDS):
            inside, out = fold != number, fold == number
            part = LabelMatrix(labels.matrix[inside], labels.classes, labels.outputs)
            fitted, rest = _some(descriptors, inside), _some(descriptors, out)
            found = select_relevant(fitted, part, index, mu, nonnegative=nonnegative, on_failure="return")
            right[out] = told_right(found, rest, truth[out]).float()
        tried.append((mu, float(right.mean())))
    best = max(accuracy for _, accuracy in tried)
    error = math.sqrt(max(best * (1 - best), 0.0) / max(1, len(descriptors)))
    return next(mu for mu, accuracy in tried if accuracy >= best - error), tuple(tried)


def with_shuffled_labels(
    selection: Selection,
    descriptors: Float[Tensor, "image feature"] | Rows,
    labels: LabelMatrix,
    generator: torch.Generator,
) -> Selection:
    """Select again with the labels of the images in random order: the null of every figure about the selection."""
    order = torch.randperm(len(labels.matrix), generator=generator)
    shuffled = LabelMatrix(labels.matrix[order], labels.classes, labels.outputs)
    solved = selection.solution
    return select_relevant(
        descriptors, shuffled, selection.index, solved.mu, nonnegative=solved.nonnegative, on_failure="return"
    )


def _some(descriptors: Tensor | Rows, chosen: Tensor) -> Tensor | Rows:
    return descriptors.take(chosen) if isinstance(descriptors, Rows) else descriptors[chosen]


def told_right(
    selection: Selection, descriptors: Float[Tensor, "image feature"] | Rows, truth: Int[Tensor, " image"]
) -> Bool[Tensor, " image"]:
    """Tell for each image whether its class, a column, is the one with the largest ``w_j · x`` over all features."""
    used = selection.weights.any(1).nonzero()[:, 0]
    read = blocks(descriptors, selection.weights.device, used)
    told = [(block @ selection.weights[used]).argmax(1) for _, block in read]
    return torch.cat(told) == truth
