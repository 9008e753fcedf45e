"""Where the μ-lasso's inner products come from: the responses or their Gram matrix.

Two ways to the same numbers: from the responses, where only the working features' inner products are ever formed
(``m`` features, ``C`` classes, ``N`` images: about ``4 N m C`` operations a round, 4 to 10 rounds), or from the Gram
matrix ``AᵀA`` (``N m²`` operations once, then the images are no longer needed), which suits data that are streamed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from partlens.errors import InputError, expected
from partlens.selection.lasso_input import ROW_BLOCK, Array, check_matrix, check_same_images, refuse_bad, to_double

_TILE = 1024  # features of one tile of the Gram matrix
KEPT_BYTES = 2 << 30  # responses up to this size are kept in float64


@runtime_checkable
class Products(Protocol):
    """Inner products of features, for a solver that looks at few of them.

    ``cross[j, k] = <a_k, l_j>`` and ``energy[k] = ||a_k||²``.
    """

    cross: Tensor
    energy: Tensor
    label_energy: Tensor

    def enter(self, features: Tensor) -> Tensor:
        """Take in features; return their inner products with all taken in so far, new ones last."""
        ...

    def forget(self) -> None:
        """Forget the features taken in."""
        ...

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Half the gradient ``Aᵀ(A w - l)`` ``[class, feature]`` and the objective ``[class]``.

        ``weights[class, taken]`` belong to the features in the order in which they were taken in.
        """
        ...


class FromGram:
    """Inner products read from the Gram matrix."""

    def __init__(self, gram: Tensor, cross: Tensor, label_energy: Tensor) -> None:
        self.gram = gram
        self.cross = cross.T.contiguous()
        self.energy = gram.diagonal()
        self.label_energy = label_energy
        self.forget()

    def forget(self) -> None:
        """See `Products.forget`."""
        self.features = torch.zeros(0, dtype=torch.int64, device=self.gram.device)
        self.rows: list[Tensor] = []

    def enter(self, features: Tensor) -> Tensor:
        """See `Products.enter`."""
        self.features = torch.cat([self.features, features])
        rows = self.gram.index_select(0, features)
        self.rows.append(rows)
        return rows.index_select(1, self.features)

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """See `Products.slope`."""
        half = -self.cross[classes]
        start = 0
        for rows in self.rows:
            half.addmm_(weights[:, start : start + len(rows)], rows)
            start += len(rows)
        # w'Gw - 2b'w + |l|² = w'(Gw - b) - b'w + |l|²
        at = half[:, self.features] - self.cross[classes][:, self.features]
        return half, (weights * at).sum(1) + self.label_energy[classes]


class FromResponses:
    """Inner products computed from the responses, only where they are asked for."""

    def __init__(self, responses: Array, labels: Tensor, device: torch.device) -> None:
        images, features = responses.shape
        self.labels = labels.T.contiguous()
        self.label_energy = self.labels.square().sum(1)
        self.device = device
        keep = images * features * 8 <= KEPT_BYTES
        self.kept: Tensor | None = None
        self.source = responses
        self.cross = torch.zeros(len(self.labels), features, dtype=torch.float64, device=device)
        self.energy = torch.zeros(features, dtype=torch.float64, device=device)
        whole = (
            torch.empty(images, features, dtype=torch.float64, device=device)
            if keep and responses.dtype not in {torch.float64, np.dtype(np.float64)}
            else None
        )
        for start, block in self._blocks():
            if whole is not None:
                whole[start : start + len(block)] = block
            self.cross.addmm_(self.labels[:, start : start + len(block)], block)
            self.energy += block.square().sum(0)
        if not bool(torch.isfinite(self.energy).all()):
            refuse_bad(responses, "responses", ("image", "feature"))
        if keep:
            self.kept = whole if whole is not None else to_double(responses, device)
        self.forget()

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        if self.kept is not None:
            yield 0, self.kept
            return
        for start in range(0, self.source.shape[0], ROW_BLOCK):
            yield start, to_double(self.source[start : start + ROW_BLOCK], self.device)

    def forget(self) -> None:
        """See `Products.forget`."""
        self.columns: list[Tensor] = []

    def enter(self, features: Tensor) -> Tensor:
        """See `Products.enter`."""
        if self.kept is not None:
            taken = self.kept.index_select(1, features)
        elif isinstance(self.source, Tensor):
            taken = to_double(self.source.index_select(1, features.to(self.source.device)), self.device)
        else:
            taken = torch.empty(self.source.shape[0], len(features), dtype=torch.float64, device=self.device)
            chosen = features.cpu().numpy()
            for start in range(0, len(taken), ROW_BLOCK):
                block = np.asarray(self.source[start : start + ROW_BLOCK])[:, chosen]
                taken[start : start + len(block)] = to_double(block, self.device)
        self.columns.append(taken)
        return torch.cat([taken.T @ block for block in self.columns], dim=1)

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """See `Products.slope`."""
        rest = -self.labels[classes]
        start = 0
        for block in self.columns:
            rest.addmm_(weights[:, start : start + block.shape[1]], block.T)
            start += block.shape[1]
        half = torch.zeros(len(classes), self.cross.shape[1], dtype=torch.float64, device=self.device)
        for start, block in self._blocks():
            half.addmm_(rest[:, start : start + len(block)], block)
        return half, rest.square().sum(1)


class GramAccumulator:
    """Inner products of features and labels, summed batch by batch in float64.

    Only the upper triangle is updated, in tiles, so that a batch costs half a matrix product and no copy of the matrix;
    small batches are collected to blocks of rows first. Memory is ``8 m²`` bytes for ``m`` features (0.13 GB at 4,096,
    3 GB at 19,456) and does not depend on the number of images.

    Args:
        features: ``m``.
        classes: number of label columns.
        device: where to keep and compute.

    Raises:
        InputError: less than one feature or class.

    Example:
        >>> sums = GramAccumulator(2, 1)
        >>> sums.add(np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([[1], [0]]))
        >>> sums.gram.tolist(), sums.cross.tolist(), sums.label_energy.tolist(), sums.images
        ([[1.0, 2.0], [2.0, 5.0]], [[1.0], [2.0]], [1.0], 2)
    """

    def __init__(self, features: int, classes: int, device: torch.device | str = "cpu") -> None:
        if features < 1 or classes < 1:
            raise InputError(
                expected("at least 1 feature and 1 class", f"{features} and {classes}", "Correct the counts")
            )
        self._device = torch.device(device)
        self._gram = torch.zeros(features, features, dtype=torch.float64, device=self._device)
        self._cross = torch.zeros(features, classes, dtype=torch.float64, device=self._device)
        self._label_energy = torch.zeros(classes, dtype=torch.float64, device=self._device)
        self._waiting: list[Tensor] = []
        self._mirrored = True
        self._images = 0

    @property
    def images(self) -> int:
        """Number of images added."""
        return self._images

    @property
    def cross(self) -> Float[Tensor, "feature class"]:
        """``Aᵀ L``: the inner product of each feature with each class's labels."""
        return self._cross

    @property
    def label_energy(self) -> Float[Tensor, " class"]:
        """``||l_j||²``; for one-hot labels the number of images of the class."""
        return self._label_energy

    @property
    def gram(self) -> Float[Tensor, "feature feature"]:
        """``AᵀA``; the matrix itself, not a copy. It is complete until the next `add`."""
        self._flush()
        if not self._mirrored:
            size = len(self._gram)
            for start in range(0, size, _TILE):
                stop = min(start + _TILE, size)
                tile = self._gram[start:stop, start:stop]
                tile.copy_(tile.triu() + tile.triu(1).T)
                self._gram[stop:, start:stop] = self._gram[start:stop, stop:].T
            self._mirrored = True
        return self._gram

    def add(self, responses: Array, labels: Array) -> None:
        """Take in a batch.

        Args:
            responses: ``[image, feature]``, any real type.
            labels: ``[image, class]``, any real type.

        Raises:
            InputError: shapes that do not fit, or a value that is not finite (its image, counted over all batches, and
                feature are named); nothing of that batch is added.
            InputTypeError: neither an array nor a tensor.
        """
        check_matrix(responses, "responses", "image, feature")
        check_matrix(labels, "labels", "image, class")
        features, classes = self._cross.shape
        for name, value, wanted in (("responses", responses, features), ("labels", labels, classes)):
            if value.shape[1] != wanted:
                raise InputError(
                    expected(f"{wanted} columns in {name}", value.shape[1], "Keep the columns of the first batch")
                )
        check_same_images(responses, labels)
        parts = []
        for start in range(0, len(responses), ROW_BLOCK):
            # A copy always, because the rows wait here while the caller may reuse its buffer.
            block = to_double(responses[start : start + ROW_BLOCK], self._device).clone()
            target = to_double(labels[start : start + ROW_BLOCK], self._device)
            if not math.isfinite(float(block.abs().max())):
                refuse_bad(responses, "responses", ("image", "feature"), self._images)
            if not math.isfinite(float(target.abs().max())):
                refuse_bad(labels, "labels", ("image", "class"), self._images)
            parts.append((block, target))
        for block, target in parts:
            self._cross.addmm_(block.T, target)
            self._label_energy += target.square().sum(0)
            self._waiting.append(block)
            if sum(map(len, self._waiting)) >= ROW_BLOCK // 2:
                self._flush()
        self._images += len(responses)

    def _flush(self) -> None:
        if not self._waiting:
            return
        block = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting = []
        self._mirrored = False
        for start in range(0, block.shape[1], _TILE):
            self._gram[start : start + _TILE, start:].addmm_(block[:, start : start + _TILE].T, block[:, start:])


def refuse_asymmetric(gram: Tensor) -> None:
    """Refuse a Gram matrix that is not symmetric, naming the entries furthest apart in the first block with any."""
    largest = float(gram.diagonal().max())
    for start in range(0, len(gram), _TILE):
        rows = gram[start : start + _TILE]
        apart = (rows - gram[:, start : start + _TILE].T).abs()
        if float(apart.max()) > 1e-6 * largest:
            row, col = divmod(int(apart.argmax()), len(gram))
            raise InputError(
                expected(
                    "a symmetric gram",
                    f"{float(rows[row, col]):g} at {start + row}, {col} and "
                    f"{float(gram[col, start + row]):g} at {col}, {start + row}",
                    "Give AᵀA",
                )
            )
