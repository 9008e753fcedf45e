"""One checkpoint of a training, written after every epoch, from which a killed run goes on.

A trainer keeps two things in it: plain values (epochs done, history, counters) and named groups of tensors (weights,
moments of the optimiser)::

    checkpoint = Checkpoint(folder, content_hash({"config": config, "photos": 63}))
    if (found := checkpoint.load()) is not None:
        network.load_state_dict(found.tensors["network"])
        restore_moments(optimiser, found.tensors["optimiser"])
        history = found.values["history"]
    for number in range(len(history) + 1, epochs + 1):
        ...
        checkpoint.save({"history": history}, network=network.state_dict(), optimiser=moments(optimiser))
    checkpoint.remove()  # once the result is written

Tensors are written first, by turns to one of two files, and then the record that names the file: a kill at any moment
leaves one whole checkpoint.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from partlens.errors import RunError, expected
from partlens.records import Record, file_sha256, read_tensors, write_tensors


class _State(Record):
    FILE: ClassVar[str] = "checkpoint.json"
    SCHEMA: ClassVar[str] = "partlens.checkpoint/1"
    AGAIN: ClassVar[str] = "Delete its folder and run the command again"
    SEALED: ClassVar[bool] = True

    identity: str
    tensors: Literal["checkpoint-0.safetensors", "checkpoint-1.safetensors"]
    sha256: str  # of the tensors' file
    values: dict[str, Any]


_FILES = get_args(_State.model_fields["tensors"].annotation)


class Found(NamedTuple):
    """What a checkpoint holds."""

    values: dict[str, Any]  # as they were saved
    tensors: Mapping[str, dict[str, Tensor]]  # groups by name, on the CPU; a group that was empty is empty again


@dataclass(frozen=True)
class Checkpoint:
    """The checkpoint of one training."""

    folder: Path  # where it is kept; one training at a time
    identity: str  # hash of everything the training depends on

    def save(self, values: Mapping[str, Any], **tensors: Mapping[str, Tensor]) -> None:
        """Replace the checkpoint, whole or not at all.

        Args:
            values: plain values for JSON; infinities and NaN become ``None``.
            tensors: groups of tensors by name.

        Raises:
            StorageError: it could not be written; the one before is untouched.
        """
        before = _State.read_if_there(self.folder)
        first, second = _FILES
        name = second if before is not None and before.tensors == first else first
        flat = {f"{group}.{key}": value for group, content in tensors.items() for key, value in content.items()}
        write_tensors(self.folder / name, flat)
        sha256 = file_sha256(self.folder / name)
        _State(identity=self.identity, tensors=name, sha256=sha256, values=dict(values)).write(self.folder)

    def load(self) -> Found | None:
        """Read the checkpoint; ``None`` where there is none yet.

        Raises:
            RunError: it is of another configuration, or damaged.
        """
        state = _State.read_if_there(self.folder)
        if state is None:
            return None
        if state.identity != self.identity:
            rule = f"a checkpoint of this configuration in {self.folder}"
            raise RunError(expected(rule, "one of another", "Choose another --out folder, or delete this one"))
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        tensors = read_tensors(self.folder / state.tensors, sha256=state.sha256, remedy=_State.AGAIN)
        for name, value in tensors.items():
            group, _, key = name.partition(".")
            groups[group][key] = value
        return Found(state.values, groups)

    def remove(self) -> None:
        """Delete the files: the training is over."""
        for name in (_State.FILE, *_FILES):
            (self.folder / name).unlink(missing_ok=True)


def moments(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser remembers of its parameters, by the parameter's number and the moment's name."""
    state = optimiser.state_dict()["state"]
    return {f"{k}.{name}": v for k, kept in state.items() for name, v in kept.items() if isinstance(v, Tensor)}


def restore_moments(optimiser: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Give an optimiser of the same parameters the moments that :func:`moments` returned."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in kept.items():
        number, _, moment = name.partition(".")
        state.setdefault(int(number), {})[moment] = value.clone()  # the optimiser would change the given one
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
