"""Which features of a network indicate each class: labels, the μ-lasso over all layers, and the linear read-out.

A *feature* is one channel of one layer's output, and the descriptor ``x`` of an image has an entry for each
(:mod:`partlens.selection.descriptors`). The weights ``w_j`` of class ``j`` come from the μ-lasso
(:mod:`partlens.selection.lasso`); the relevant features of a class are those whose weight is not 0, and the
contribution of each to one image's class is ``w_j · x``, elementwise.

Source: the paper (arXiv 1712.06302).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlens.errors import ImageError, InputError, expected, listed
from partlens.network.performer import Performer
from partlens.selection.lasso import LassoSolution, OnFailure, mu_lasso
from partlens.selection.record import DEFAULT_MU, FeatureIndex

_READ_ROWS = 4096  # descriptors that are read out at a time


@dataclass(frozen=True)
class LabelMatrix:
    """One-hot labels of images.

    Args:
        matrix: ``L`` transposed: 1 where an image is of a class, float64; zeros for an image of none.
        classes: name of each column.
        outputs: the performer's output of each column where it is known, else ``None``.
    """

    matrix: Float[Tensor, "image class"]
    classes: tuple[str, ...]
    outputs: tuple[int | None, ...]


def _key(name: str) -> str:
    """Fold case, underscores and runs of spaces."""
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


def class_of_category(performer: Performer, category: str) -> int | None:
    """Find the performer's output that a category of the data means.

    Args:
        performer: its ``class_names`` are searched.
        category: a whole number such as ``"281"``, which is that output; or a class name, where case, underscores and
            spaces do not matter.

    Returns:
        The output, ``None`` where the category is neither, or names several outputs.
    """
    names = performer.class_names
    if re.fullmatch(r"\d+", category.strip()):
        output = int(category)
        return output if names is None or output < len(names) else None
    places = [place for place, name in enumerate(names or ()) if _key(name) == _key(category)]
    return places[0] if len(places) == 1 else None


def label_matrix(
    names: Sequence[str], output_of: Callable[[str], int | None], classes: Sequence[str] | None = None
) -> LabelMatrix:
    """Make one-hot labels from the class of each image.

    Args:
        names: the class of each image: its category, or the output that the network decides for.
        output_of: the performer's output of a class.
        classes: the classes to make columns for, in this order; by default all that occur, sorted. An image of none
            of them has a row of zeros.

    Returns:
        Labels; a class without an image has no column.

    Raises:
        ImageError: an image without a class, or no class with an image.
    """
    if empty := [str(place) for place, name in enumerate(names) if not name]:
        rule, remedy = "a category for every image", "Sort the images into sub-folders"
        raise ImageError(expected(rule, f"none for images {listed(empty)}", remedy))
    wanted = sorted(set(names)) if classes is None else list(dict.fromkeys(classes))
    present = [name for name in wanted if name in set(names)]
    if not present:
        raise ImageError(expected(f"an image of {listed(wanted)}", "none", "Check the names of the classes"))
    column = {name: place for place, name in enumerate(present)}
    matrix = torch.zeros(len(names), len(present), dtype=torch.float64)
    for row, name in enumerate(names):
        if name in column:
            matrix[row, column[name]] = 1.0
    return LabelMatrix(matrix, tuple(present), tuple(map(output_of, present)))


@dataclass(frozen=True)
class Selection:
    """The relevant features of each class.

    Args:
        solution: weights and certificate.
        index: layer and channel of every feature.
        classes: name of each column.
    """

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
    descriptors: Float[Tensor, "image feature"],
    labels: LabelMatrix,
    index: FeatureIndex,
    mu: float | int = DEFAULT_MU,  # noqa: PYI041 - the shape checks of the tests do not take an int for a float
    *,
    nonnegative: bool = True,
    on_failure: OnFailure = "raise",
) -> Selection:
    """Find the few features that indicate each class.

    Args:
        descriptors: ``x`` of every image.
        labels: the class of every image.
        index: layer and channel of every feature.
        mu: bound on the sum of a class's absolute weights; the authors' demo has 10 for all data sets, 5 for an8Flower.
        nonnegative: whether weights must be at least 0; see :mod:`partlens.selection.lasso`.
        on_failure: as in `mu_lasso`.

    Raises:
        InputError: an index of other features, or as `mu_lasso`.
        NotConvergedError: as `mu_lasso`.
    """
    if descriptors.shape[1] != index.size:
        rule = f"descriptors of the {index.size} features of the index"
        raise InputError(expected(rule, descriptors.shape[1], "Use the index of the same pass"))
    solution = mu_lasso(descriptors, labels.matrix, mu, nonnegative, on_failure=on_failure)
    return Selection(solution, index, labels.classes)


def with_shuffled_labels(
    selection: Selection,
    descriptors: Float[Tensor, "image feature"],
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


def told_right(
    selection: Selection, descriptors: Float[Tensor, "image feature"], truth: Int[Tensor, " image"]
) -> Bool[Tensor, " image"]:
    """Tell for each image whether its class is the one with the largest ``w_j · x``, the sum over all features.

    Args:
        selection: the fitted weights.
        descriptors: of images that were not fitted.
        truth: the column of each image's class.
    """
    told = [(rows.double() @ selection.weights).argmax(1) for rows in descriptors.split(_READ_ROWS)]
    return torch.cat(told) == truth
