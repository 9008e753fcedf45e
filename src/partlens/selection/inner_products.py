"""Where the μ-lasso's inner products come from: the responses or their Gram matrix.

Two ways to the same numbers: from the responses, where only the working features' inner products are ever formed
(``m`` features, ``C`` classes, ``N`` images: about ``4 N m C`` operations a round, 4 to 10 rounds), or from the Gram
matrix ``AᵀA`` (``N m²`` operations once, then the images are no longer needed), which suits data that are streamed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from partlens.errors import InputError, InputTypeError, expected

Array = Tensor | npt.NDArray[Any]
ROW_BLOCK = 2048  # images converted to float64 at a time
_TILE = 1024  # features of one tile of the Gram matrix
KEPT_BYTES = 2 << 30  # responses up to this size are kept in float64


def to_double(value: Array, device: torch.device) -> Tensor:
    """Give float64 on the device; a copy only where the kind changes or the array cannot be written."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64)
    ready = np.asarray(value, dtype=np.float64)
    if not ready.flags.writeable or any(stride < 0 for stride in ready.strides):
        ready = ready.copy()
    return torch.from_numpy(ready).to(device)


def check_matrix(value: object, name: str, axes: str) -> None:
    """Refuse what is no array of real numbers with two axes and an entry along each."""
    if not isinstance(value, (Tensor, np.ndarray)):
        remedy = "Use its toarray()" if hasattr(value, "toarray") else "Convert it, as np.asarray"
        raise InputTypeError(expected(f"{name} as a NumPy array or a torch tensor", type(value).__name__, remedy))
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_meta or value.is_quantized):
        kind = "a tensor without values" if value.is_meta else f"{value.dtype} in layout {value.layout}"
        raise InputTypeError(expected(f"an ordinary tensor of {name}", kind, "Convert it, as to_dense()"))
    whole = value.is_complex() if isinstance(value, Tensor) else value.dtype.kind not in "fiub"
    if whole:
        raise InputTypeError(expected(f"real numbers in {name}", str(value.dtype), "Convert them to float"))
    shape = f"shape {tuple(value.shape)}"
    if value.ndim != 2:
        raise InputError(expected(f"{name} with axes {axes}", shape, "Add or drop an axis"))
    if 0 in value.shape:
        raise InputError(expected(f"at least one entry on each axis of {name} ({axes})", shape, "Add data"))


def _first_bad(value: Array) -> tuple[int, int] | None:
    """Find the first entry (row, column) that is not finite; rows are looked at in blocks."""
    for start in range(0, value.shape[0], ROW_BLOCK):
        bad = ~torch.isfinite(to_double(value[start : start + ROW_BLOCK], torch.device("cpu")))
        if bool(bad.any()):
            row, col = (int(v) for v in bad.nonzero()[0])
            return start + row, col
    return None


def refuse_bad(value: Array, name: str, axes: tuple[str, str]) -> None:
    """Raise the error about values that are not finite, naming the first."""
    place = _first_bad(value)
    if place is None:
        got, remedy = "values so large that their squares overflow", "Scale them down"
    else:
        got, remedy = f"{float(value[place])} at {axes[0]} {place[0]}, {axes[1]} {place[1]}", "Correct or drop it"
    raise InputError(expected(f"finite values in {name}", got, remedy))


class FromGram:
    """Inner products read from the Gram matrix ``AᵀA``, which is summed from blocks of images.

    ``cross[j, k] = <a_k, l_j>`` and ``energy[k] = ||a_k||²`` of features k and classes j.

    Only the upper triangle is summed, in tiles, so that a block costs half a matrix product and no copy of the matrix.
    Memory is ``8 m²`` bytes for ``m`` features (0.13 GB at 4,096, 3 GB at 19,456), whatever the number of images.
    """

    def __init__(self, responses: Array, labels: Tensor, device: torch.device) -> None:
        images, features = responses.shape
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        cross = torch.zeros(features, labels.shape[1], dtype=torch.float64, device=device)
        self.label_energy = torch.zeros(labels.shape[1], dtype=torch.float64, device=device)
        for start in range(0, images, ROW_BLOCK):
            block, target = to_double(responses[start : start + ROW_BLOCK], device), labels[start : start + ROW_BLOCK]
            if not math.isfinite(float(block.abs().max())):
                refuse_bad(responses, "responses", ("image", "feature"))
            cross.addmm_(block.T, target)
            self.label_energy += target.square().sum(0)
            for left in range(0, features, _TILE):
                self.gram[left : left + _TILE, left:].addmm_(block[:, left : left + _TILE].T, block[:, left:])
        for left in range(0, features, _TILE):
            right = min(left + _TILE, features)
            tile = self.gram[left:right, left:right]
            tile.copy_(tile.triu() + tile.triu(1).T)
            self.gram[right:, left:right] = self.gram[left:right, right:].T
        self.cross = cross.T.contiguous()
        self.energy = self.gram.diagonal()
        self.forget()

    def forget(self) -> None:
        """Forget the features taken in."""
        self.features = torch.zeros(0, dtype=torch.int64, device=self.gram.device)
        self.rows: list[Tensor] = []

    def enter(self, features: Tensor) -> Tensor:
        """Take in features; return their inner products with all taken in so far, new ones last."""
        self.features = torch.cat([self.features, features])
        rows = self.gram.index_select(0, features)
        self.rows.append(rows)
        return rows.index_select(1, self.features)

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Half the gradient ``Aᵀ(A w - l)`` ``[class, feature]`` and the objective ``[class]``.

        ``weights[class, taken]`` belong to the features in the order in which they were taken in.
        """
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
        self.whole = images * features * 8 <= KEPT_BYTES
        self.source = to_double(responses, device) if self.whole else responses
        self.cross = torch.zeros(len(self.labels), features, dtype=torch.float64, device=device)
        self.energy = torch.zeros(features, dtype=torch.float64, device=device)
        # In blocks of rows, so that the sums are the same numbers whether the responses are kept or not.
        for start in range(0, images, ROW_BLOCK):
            block = to_double(self.source[start : start + ROW_BLOCK], device)
            self.cross.addmm_(self.labels[:, start : start + len(block)], block)
            self.energy += block.square().sum(0)
        if not bool(torch.isfinite(self.energy).all()):
            refuse_bad(responses, "responses", ("image", "feature"))
        self.forget()

    def forget(self) -> None:
        """Forget the features taken in."""
        self.columns: list[Tensor] = []

    def enter(self, features: Tensor) -> Tensor:
        """As `FromGram.enter`."""
        if isinstance(self.source, Tensor):
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
        """As `FromGram.slope`."""
        rest = -self.labels[classes]
        start = 0
        for block in self.columns:
            rest.addmm_(weights[:, start : start + block.shape[1]], block.T)
            start += block.shape[1]
        half = torch.zeros(len(classes), self.cross.shape[1], dtype=torch.float64, device=self.device)
        step = len(self.source) if self.whole else ROW_BLOCK
        for start in range(0, len(self.source), step):
            block = to_double(self.source[start : start + step], self.device)
            half.addmm_(rest[:, start : start + len(block)], block)
        return half, rest.square().sum(1)


Products = FromGram | FromResponses
