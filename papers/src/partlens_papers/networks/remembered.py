"""Layers that stay as they are, computed once for each input: performers with one set of convolutions share them.

The papers' performers of one network differ in their fully connected layers here; training, explaining and measuring
each of them shows the same photos to the same convolutions. What the tap gives is therefore kept on disk under the hash
of the layers up to it and of the input, and is read for every later performer, list of photos and process.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from partlens.network.performer import Performer, weights_sha256
from partlens_papers.networks.paper_networks import PaperNet
from partlens_papers.networks.settings import paper_setting

_DIGITS = 24  # of an input's hash in its file's name: 96 bits


class Memory:
    """What a chain of fixed layers gives, kept on disk for every input.

    It is kept in float16.

    Args:
        layers: the chain; the last one leaves its own output unchanged (ReLU), so that a network can call it on what is
            read here, and it can be tapped. Layers before it are not called as modules and cannot.
        folder: for what is kept; processes may share it.
        bfloat16: compute it in bfloat16, on a processor that has units for it; ``papers/docs/reproduction.md`` says how
            far that is from float32.

    Example:
        >>> import tempfile
        >>> layers, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.rand(2, 3, 8, 8)
        >>> memory = Memory(layers, Path(tempfile.mkdtemp()))
        >>> bool((memory(x) == memory(x)).all()), bool((memory(x) - layers(x)).abs().max() < 0.02)
        (True, True)
    """

    def __init__(self, layers: Sequence[nn.Module], folder: Path, *, bfloat16: bool = False) -> None:
        self.layers = tuple(layers)
        self.folder = folder / weights_sha256(nn.Sequential(*layers))[:_DIGITS]
        self.bfloat16 = bfloat16 and bool(torch.cpu._is_avx512_bf16_supported())  # noqa: SLF001

    @staticmethod
    def serves(x: Tensor) -> bool:
        """Whether a pass can do without the layers: it is not watched and asks for no gradient of its input."""
        # Who looks at what is computed is shown all of it.
        watched = torch._C._is_torch_function_mode_enabled()  # noqa: SLF001
        return not watched and not (torch.is_grad_enabled() and x.requires_grad)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Return the last layer's output, read, or computed and kept."""
        names = [hashlib.sha256(image.tobytes()).hexdigest()[:_DIGITS] for image in x.cpu().numpy()]
        files = [self.folder / name[:2] / f"{name}.npy" for name in names]
        missing = [row for row, file in enumerate(files) if not file.is_file()]
        if missing:
            given = x[missing].to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16 and x.device.type == "cpu"):
                for layer in self.layers:
                    given = layer.forward(given)  # hooks are for passes that every layer takes part in
            for row, found in zip(missing, given.half().cpu().contiguous().numpy(), strict=True):
                _write(files[row], found)
        return torch.from_numpy(np.stack([np.load(file) for file in files])).to(x)


def _write(file: Path, maps: np.ndarray) -> None:
    """Write a file whole or not at all, also where several processes write it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as handle:
        np.save(handle, maps)
    unfinished.replace(file)


class _Chain(nn.Sequential):
    """A chain of layers, those up to ``last`` remembered."""

    def __init__(self, layers: nn.Sequential, last: int, folder: Path) -> None:
        super().__init__(*layers)
        self.last, self.memory = last, Memory(list(layers)[: last + 1], folder, bfloat16=True)

    def forward(self, x: Tensor) -> Tensor:
        if not Memory.serves(x):
            return cast("Tensor", super().forward(x))
        maps = self.memory(x)
        for layer in list(self)[self.last :]:
            maps = layer(maps)
        return maps


class _Net(PaperNet):
    """One of the papers' smaller networks, its layers up to ``last`` remembered."""

    last: str
    memory: Memory

    def forward(self, x: Tensor) -> Tensor:
        """Score a batch of inputs."""
        return self.run_from(self.last, self.memory(x)) if Memory.serves(x) else super().forward(x)


def remembering(performer: Performer, folder: Path) -> Performer:
    """Return one of the papers' networks with its layers up to their tap remembered; any other as it is.

    Args:
        performer: its layers are shared, not copied; names and weights stay the same.
        folder: for what is kept.
    """
    setting, module = paper_setting(performer), copy.copy(performer.module)
    module._modules = dict(module._modules)  # noqa: SLF001 - so that the given network keeps its own layers
    if setting is not None and setting.network == "vgg16":
        last = int(setting.tap.rpartition(".")[2])
        module.features = _Chain(cast("nn.Sequential", module.features), last, folder)
    elif setting is not None and isinstance(module, PaperNet):
        before = [layer for _, layer in module.until(setting.tap)]
        module.__class__ = _Net
        remembered = cast("_Net", module)
        remembered.last, remembered.memory = setting.tap, Memory(before, folder)
    else:
        return performer
    # Layers before it are not called, so that the performer's own choice of a tap would see too few of them.
    return dataclasses.replace(performer, module=module, default_tap=performer.default_tap or setting.tap)
