"""Where the μ-lasso's inner products come from: the responses or their Gram matrix.

Two ways to the same numbers: from the responses, where only the working features' inner products are ever formed
(``m`` features, ``C`` classes, ``N`` images: about ``4 N m C`` operations a round, 4 to 10 rounds), or from the Gram
matrix ``AᵀA`` (``N m²`` operations once, then the images are no longer needed). Either goes over the images in blocks
and keeps sums alone, so that memory does not grow with them.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from partlens.errors import InputError, InputTypeError, expected

BLOCK_BYTES = 2 << 20  # of the images that are converted to float64 at a time
_FEWEST_ROWS = 64  # of a block, so that products of blocks stay products of matrices
_TILE = 1024  # features of one tile of the Gram matrix
GRAM_BYTES = 1 << 30  # largest Gram matrix that is chosen: 11,585 features


class Rows:
    """Some rows of an array, read when they are needed; a memory map's pages are let go of again.

    Example:
        >>> Rows(np.arange(8).reshape(4, 2), [3, 0])[:].tolist()
        [[6, 7], [0, 1]]
    """

    ndim = 2

    def __init__(self, source: npt.NDArray[Any], chosen: Sequence[int] | npt.NDArray[np.integer] | Tensor) -> None:
        self.source, self.chosen = source, np.asarray(chosen, dtype=np.int64)
        self.shape, self.dtype = (len(self.chosen), source.shape[1]), source.dtype

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: slice | tuple[int | slice, Any]) -> npt.NDArray[Any]:
        rows, *columns = place if isinstance(place, tuple) else (place,)
        read: npt.NDArray[Any] = np.asarray(self.source[self.chosen[rows]])
        held = getattr(self.source, "_mmap", None)  # pages that were read would count as the process's memory
        if held is not None and hasattr(mmap, "MADV_DONTNEED"):
            held.madvise(mmap.MADV_DONTNEED)
        return read[..., columns[0]] if columns else read

    def take(self, chosen: Tensor) -> Rows:
        """Return some of these rows: their positions, or whether each is taken."""
        return Rows(self.source, self.chosen[chosen.numpy()])


Array = Tensor | npt.NDArray[Any] | Rows


def blocks(value: Array, device: torch.device, columns: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Read an array in float64 block by block of rows, whole or some columns; the blocks depend on its shape alone."""
    size = max(_FEWEST_ROWS, BLOCK_BYTES // (8 * value.shape[1]))
    for start in range(0, value.shape[0], size):
        rows = slice(start, min(start + size, value.shape[0]))
        block = value[rows]
        if columns is not None:
            block = block[:, columns.to(block.device) if isinstance(block, Tensor) else columns.cpu().numpy()]
        yield rows, to_double(block, device)


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
    if not isinstance(value, (Tensor, np.ndarray, Rows)):
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


def check_energy(energy: Tensor, value: Array, name: str, column: str) -> None:
    """Refuse values whose summed squares are not finite, naming the first that is not."""
    if bool(torch.isfinite(energy).all()):
        return
    got, remedy = "values so large that their squares overflow", "Scale them down"
    for rows, block in blocks(value, torch.device("cpu")):
        if len(bad := (~torch.isfinite(block)).nonzero()):
            row, col = bad[0].tolist()
            got, remedy = f"{float(block[row, col])} at image {rows.start + row}, {column} {col}", "Correct or drop it"
            break
    raise InputError(expected(f"finite values in {name}", got, remedy))


class FromGram:
    """Inner products read from the Gram matrix ``AᵀA``, which is summed from blocks of images.

    ``cross[j, k] = <a_k, l_j>`` and ``energy[k] = ||a_k||²`` of features k and classes j.

    Only the upper triangle is summed, in tiles, so that a block costs half a matrix product and no copy of the matrix.
    Memory is ``8 m²`` bytes for ``m`` features, whatever the number of images; `GRAM_BYTES` is the most of it.
    """

    def __init__(self, responses: Array, labels: Tensor, device: torch.device) -> None:
        features = responses.shape[1]
        self.gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        cross = torch.zeros(features, labels.shape[1], dtype=torch.float64, device=device)
        self.label_energy = torch.zeros(labels.shape[1], dtype=torch.float64, device=device)
        for rows, block in blocks(responses, device):
            target = labels[rows]
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
        check_energy(self.energy, responses, "responses", "feature")
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
    """Inner products computed from the responses, only where they are asked for.

    Each question is one pass over blocks of images, whose sums are all that is kept: memory does not grow with the
    number of images.
    """

    def __init__(self, responses: Array, labels: Tensor, device: torch.device) -> None:
        self.source, self.labels, self.device = responses, labels, device
        features = responses.shape[1]
        self.label_energy = labels.square().sum(0)
        self.cross = torch.zeros(labels.shape[1], features, dtype=torch.float64, device=device)
        self.energy = torch.zeros(features, dtype=torch.float64, device=device)
        for rows, block in blocks(responses, device):
            self.cross.addmm_(labels[rows].T, block)
            self.energy += block.square().sum(0)
        check_energy(self.energy, responses, "responses", "feature")
        self.forget()

    def forget(self) -> None:
        """Forget the features taken in."""
        self.features = torch.zeros(0, dtype=torch.int64, device=self.device)

    def enter(self, features: Tensor) -> Tensor:
        """As `FromGram.enter`."""
        self.features = torch.cat([self.features, features])
        inner = torch.zeros(len(features), len(self.features), dtype=torch.float64, device=self.device)
        for _, block in blocks(self.source, self.device, self.features):
            inner.addmm_(block[:, -len(features) :].T, block)
        return inner

    def slope(self, weights: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """As `FromGram.slope`."""
        half = torch.zeros(len(classes), self.cross.shape[1], dtype=torch.float64, device=self.device)
        objective = torch.zeros(len(classes), dtype=torch.float64, device=self.device)
        for rows, block in blocks(self.source, self.device):
            rest = block[:, self.features] @ weights.T - self.labels[rows][:, classes]
            half.addmm_(rest.T, block)
            objective += rest.square().sum(0)
        return half, objective


Products = FromGram | FromResponses
