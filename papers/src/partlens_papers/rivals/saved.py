"""A rival as a file."""

from __future__ import annotations

from pathlib import Path

from partlens.errors import WeightsError, expected
from partlens.records import SCHEMA, read_tensors, write_tensors
from partlens_papers.rivals.cells import Rival
from partlens_papers.rivals.factors import KMeans, Nmf
from partlens_papers.rivals.sparse import TopKSae

KINDS: tuple[type[Rival], ...] = (Nmf, KMeans, TopKSae)
"""Every rival that can be read back."""


def save_rival(path: Path, rival: Rival) -> None:
    """Write a rival as safetensors, whole or not at all.

    Raises:
        StorageError: the file could not be written.
    """
    write_tensors(path, rival.to_tensors(), {"schema": SCHEMA})


def load_rival(path: Path) -> Rival:
    """Read what :func:`save_rival` wrote; the names of the tensors say which rival it is.

    Raises:
        RunError: no such file, or not safetensors.
        WeightsError: the tensors are not those of a rival.
    """
    tensors = read_tensors(path)
    prefixes = {name.partition(".")[0] for name in tensors}
    for kind in KINDS:
        if kind.name in prefixes:
            return kind.from_tensors(tensors)
    names = ", ".join(kind.name for kind in KINDS)
    raise WeightsError(expected(f"tensors of one of {names} in {path}", ", ".join(sorted(prefixes)), "Fit it again"))
