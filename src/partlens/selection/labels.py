"""Which class each image is of: one-hot labels from the data's categories or from the network's own decisions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, expected, listed
from partlens.network.zoo import Performer

LabelSource = Literal["data", "predictions"]


@dataclass(frozen=True)
class LabelMatrix:
    """One-hot labels of images.

    Args:
        matrix: ``L`` transposed: 1 where an image is of a class, float64.
        classes: name of each column.
        outputs: the performer's output of each column where it is known, else ``None``.
        absent: classes without an image, which have no column.
    """

    matrix: Float[Tensor, "image class"]
    classes: tuple[str, ...]
    outputs: tuple[int | None, ...]
    absent: tuple[str, ...]


def _key(name: str) -> str:
    """Fold case, underscores and runs of spaces."""
    return re.sub(r"[\s_]+", " ", name).strip().casefold()


def class_of_category(performer: Performer, category: str) -> int | None:
    """Find the performer's output that a category of the data means.

    Args:
        performer: its ``class_names`` are asked.
        category: a whole number such as ``"281"``, which is that output; or a class name, where case, underscores and
            spaces do not matter.

    Returns:
        The output, ``None`` where the category is neither (or its name stands for several outputs).
    """
    names = performer.class_names
    if re.fullmatch(r"\d+", category.strip()):
        output = int(category)
        return output if names is None or output < len(names) else None
    places = [place for place, name in enumerate(names or ()) if _key(name) == _key(category)]
    return places[0] if len(places) == 1 else None


def label_matrix(
    images: ImageSet | None = None,
    *,
    source: LabelSource = "data",
    logits: npt.NDArray[Any] | Tensor | None = None,
    performer: Performer | None = None,
    classes: Sequence[str] | None = None,
) -> LabelMatrix:
    """Make one-hot labels from the data's categories or from the network's own decisions.

    Args:
        images: the photos; needed for ``"data"``.
        source: ``"data"``, the true categories (the paper's, as a survey of it says); ``"predictions"``, the output
            with the largest score (the group's later ports).
        logits: ``[image, class]`` scores; needed for ``"predictions"``.
        performer: names the outputs.
        classes: the classes to make columns for, in this order; all that occur, sorted, when ``None``. An image of none
            of them has a row of zeros.

    Returns:
        Labels; classes without an image are left out and named in ``absent``.

    Raises:
        InputError: what ``source`` needs is missing.
        ImageError: an image without a category, or no class with an image.
    """
    if source == "data":
        if images is None:
            raise InputError(expected("images, to read their categories", "none", "Give images="))
        empty = [key for key, category in zip(images.keys, images.categories, strict=True) if not category]
        if empty:
            raise ImageError(
                expected("a category for every image", f"none for {listed(empty)}", "Sort the images into sub-folders")
            )
        found = list(images.categories)
    elif source == "predictions":
        if logits is None:
            raise InputError(expected("logits, to see what the network decides", "none", "Give logits="))
        scores = logits.detach().cpu().numpy() if isinstance(logits, Tensor) else np.asarray(logits)
        known = performer.class_names if performer is not None else None
        found = [known[o] if known is not None and o < len(known) else str(o) for o in scores.argmax(1).tolist()]
        decided = dict(zip(found, scores.argmax(1).tolist(), strict=True))
    else:
        raise InputError(expected("source data or predictions", source, "Choose data"))
    wanted = list(dict.fromkeys(classes)) if classes is not None else sorted(set(found))
    present = [name for name in wanted if name in set(found)]
    if not present:
        raise ImageError(expected(f"an image of {listed(wanted)}", "none", "Check the names of the classes"))
    if source == "predictions":
        outputs = tuple(cast("int | None", decided[name]) for name in present)
    else:
        outputs = tuple(class_of_category(performer, name) if performer is not None else None for name in present)
    column = {name: place for place, name in enumerate(present)}
    matrix = torch.zeros(len(found), len(present), dtype=torch.float64)
    for row, name in enumerate(found):
        if name in column:
            matrix[row, column[name]] = 1.0
    return LabelMatrix(matrix, tuple(present), outputs, tuple(name for name in wanted if name not in column))
