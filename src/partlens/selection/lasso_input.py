"""What the μ-lasso is given: arrays or tensors of finite real numbers, checked once and made float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from partlens.errors import InputError, InputTypeError, expected

Array = Tensor | npt.NDArray[Any]
ROW_BLOCK = 2048  # images converted to float64 at a time


def check_kind(value: object, name: str) -> None:
    """Refuse what is no array or tensor of real numbers."""
    if not isinstance(value, (Tensor, np.ndarray)):
        raise InputTypeError(
            expected(f"{name} as a NumPy array or a torch tensor", type(value).__name__, "Convert it, as np.asarray")
        )
    if value.dtype in {torch.complex64, torch.complex128} or (
        isinstance(value, np.ndarray) and value.dtype.kind not in "fiub"
    ):
        raise InputTypeError(expected(f"real numbers in {name}", str(value.dtype), "Convert them to float"))


def to_double(value: Array, device: torch.device) -> Tensor:
    """Give float64 on the device; a copy only where the kind changes or the array cannot be written."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64)
    ready = np.asarray(value, dtype=np.float64)
    if not ready.flags.writeable or any(stride < 0 for stride in ready.strides):
        ready = ready.copy()
    return torch.from_numpy(ready).to(device)


def check_matrix(value: Array, name: str, axes: str) -> None:
    """Refuse what has not two axes, or no entry along one of them."""
    check_kind(value, name)
    if value.ndim != 2:
        raise InputError(expected(f"{name} with axes {axes}", f"shape {tuple(value.shape)}", "Add or drop an axis"))
    if 0 in value.shape:
        raise InputError(
            expected(f"at least one entry on each axis of {name} ({axes})", f"shape {tuple(value.shape)}", "Add data")
        )


def _first_bad(value: Array, first: int = 0) -> tuple[int, int] | None:
    """Find the first entry (row, column) that is not finite; rows are looked at in blocks."""
    for start in range(0, value.shape[0], ROW_BLOCK):
        bad = ~torch.isfinite(to_double(value[start : start + ROW_BLOCK], torch.device("cpu")))
        if bool(bad.any()):
            row, col = (int(v) for v in bad.nonzero()[0])
            return first + start + row, col
    return None


def refuse_bad(value: Array, name: str, axes: tuple[str, str], first: int = 0) -> None:
    """Raise the error about values that are not finite, naming the first; rows are counted from ``first``."""
    place = _first_bad(value, first)
    if place is None:
        got, remedy = "values so large that their squares overflow", "Scale them down"
    else:
        number = value[place[0] - first, place[1]]
        got, remedy = f"{float(number)} at {axes[0]} {place[0]}, {axes[1]} {place[1]}", "Correct or drop it"
    raise InputError(expected(f"finite values in {name}", got, remedy))


def check_same_images(responses: Array, labels: Array) -> None:
    """Refuse responses and labels of different numbers of images."""
    if len(responses) != len(labels):
        raise InputError(
            expected(
                "as many rows of labels as of responses",
                f"{len(labels)} and {len(responses)}",
                "Give one row per image in both",
            )
        )
