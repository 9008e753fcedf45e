"""Train an interpretable CNN from cached maps: epochs, checkpoints, resumption.

As in :mod:`partlens.explainer.training`, everything drawn in an epoch comes from (seed, epoch) and a checkpoint holds
all that the next epoch needs; a killed run ends, on the same machine with the same threads, with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from PIL import ImageOps
from torch import Tensor, nn

from partlens.checkpoint import Checkpoint, moments, restore_moments
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, expected
from partlens.network.borrowed import random_state_kept
from partlens.network.performer import Performer
from partlens.network.stream import stream_maps
from partlens.records import content_hash
from partlens_papers.rivals.interpretable_cnn import InterpretableCNN
from partlens_papers.rivals.masks import ReleasedMask

_BIAS_RATE = 2.0
_TOP_BIAS_RATE = 5.0
_RADIUS_RATE = 0.05


@dataclass(frozen=True)
class LabelledMaps:
    """What training reads.

    Attributes:
        tap: maps at the tap, ``[row, filter, row, col]``; memory maps are read batch by batch.
        labels: which rows show which category.
    """

    tap: np.ndarray
    labels: Bool[Tensor, "row category"]

    def read(self, rows: np.ndarray) -> Tensor:
        """Read maps of some rows as float32, in the order asked; the file is read in its own."""
        order = np.argsort(rows, kind="stable")
        back = np.argsort(order, kind="stable")
        return torch.from_numpy(np.asarray(self.tap[rows[order]])).float()[torch.from_numpy(back)]


@dataclass(frozen=True)
class _PhotoOrMirror:
    """Draws row ``2 photo`` as the photo and row ``2 photo + 1`` as its mirror image, the released code's two views."""

    images: ImageSet

    def __call__(self, row: int) -> np.ndarray:
        image = self.images.read(row // 2).convert("RGB")
        return np.asarray(ImageOps.mirror(image) if row % 2 else image)


def photos_and_mirrors(images: ImageSet) -> ImageSet:
    """Return every photo and, behind it, its mirror image as images of their own."""
    keys = [key for photo in images.keys for key in (photo, f"{photo}#mirror")]
    recipe = f"photos and mirrors {images.fingerprint()}"
    return ImageSet.from_generator(_PhotoOrMirror(images), keys, recipe=recipe)


def labelled_maps(
    performer: Performer,
    images: ImageSet,
    categories: Sequence[str],
    tap: str,
    folder: Path,
    progress: Callable[[int], None] = lambda _: None,
) -> LabelledMaps:
    """Compute the tap's maps of all photos and their mirrors once, on disk, and say what each shows.

    As released, every photo is learned from in both ways; row ``2 photo + 1`` is the mirror.

    Args:
        performer: the network; left as it was.
        images: photos with categories, of the training split.
        categories: what the outputs mean; photos of other categories are negative for all.
        tap: the layer.
        folder: where the maps are kept; a killed pass goes on there.
        progress: called with the number of images done.

    Raises:
        ImageError: a category without photos.
        RunError: the folder holds other maps.
    """
    for name in categories:
        if name not in images.categories:
            raise ImageError(expected("photos of every category", f"none of {name}", "Add photos or drop the category"))
    maps = stream_maps(performer, photos_and_mirrors(images), [tap], folder, progress=progress)[tap]
    shown = torch.tensor([[category == name for name in categories] for category in images.categories])
    return LabelledMaps(maps, shown.repeat_interleave(2, 0))


def _optimiser(network: InterpretableCNN) -> torch.optim.SGD:
    """SGD with the released code's multipliers: biases twice (of the top convolution five times) without decay."""
    config = network.config
    groups = []
    for name, parameter in network.named_parameters():
        bias = name.endswith("bias")
        factor = 1.0
        if name.endswith(".radius"):
            factor = _RADIUS_RATE
        elif bias:
            factor = _TOP_BIAS_RATE if name.startswith("top.") else _BIAS_RATE
        decay = 0.0 if bias or name.endswith(".radius") else config.weight_decay
        groups.append({"params": [parameter], "factor": factor, "weight_decay": decay})
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum)


class _Run:
    """One training run with its state on disk."""

    def __init__(self, network: InterpretableCNN, data: LabelledMaps, folder: Path) -> None:
        self.network, self.data, self.folder = network, data, folder
        self.config = network.config
        self.optimiser = _optimiser(network)
        self.density = data.labels.float().mean(0)
        self.history: list[dict[str, Any]] = []
        identity = {
            "config": dict(self.config),
            "weights": {name: list(value.shape) for name, value in network.state_dict().items()},
            "rows": len(data.labels),
            "positives": data.labels.sum(0).tolist(),
        }
        self.checkpoint = Checkpoint(folder, content_hash(identity))

    def restore(self) -> None:
        """Continue from a checkpoint if there is one.

        Raises:
            RunError: the checkpoint belongs to another configuration.
        """
        if (found := self.checkpoint.load()) is not None:
            self.network.load_state_dict(found.tensors["network"])
            restore_moments(self.optimiser, found.tensors["optimiser"])
            self.history = list(found.values["history"])

    def save(self) -> None:
        """Write a checkpoint."""
        values = {"history": self.history}
        self.checkpoint.save(values, network=self.network.state_dict(), optimiser=moments(self.optimiser))

    def epoch(self, number: int) -> dict[str, Any]:
        """Run one epoch and return its logged means."""
        network, config = self.network, self.config
        for each in network.modules():
            each.training = isinstance(each, nn.Dropout)  # copies of the performer's norm layers stay as they are
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(number) * group["factor"]
        seed = (config.seed * 1_000_003 + number * 7_919 + 29) % (2**63)
        order = torch.randperm(len(self.data.labels), generator=torch.Generator().manual_seed(seed))
        # The last batch is filled up from the start of the order, so that all batches have one size.
        size = min(config.batch_size, len(order))
        steps = -(-len(order) // size)
        order = torch.cat([order, order[: steps * size - len(order)]])
        sums: dict[str, float] = {}
        started = time.monotonic()
        with random_state_kept():
            torch.manual_seed(seed)  # dropout draws from the global state
            for rows in order.split(size):
                for name, value in self._step(rows, number).items():
                    sums[name] = sums.get(name, 0.0) + float(value)
        network.eval()
        means = {name: value / steps for name, value in sums.items()}
        for name, mask in network.masks.items():
            if isinstance(mask, ReleasedMask):
                means[f"radius_{name}"] = float(mask.radius.detach().mean())
        return {"epoch": number, "seconds": round(time.monotonic() - started, 3), **means}

    def _step(self, rows: Tensor, number: int) -> dict[str, Tensor]:
        network = self.network
        device = network.inserted.weight.device
        maps = self.data.read(rows.numpy()).to(device)
        labels = self.data.labels[rows].to(device)
        passed = network.training_pass(maps, labels, number, self.density)
        sign = labels.to(maps) * 2 - 1
        task = F.softplus(-sign * passed.outputs).sum(1).mean()
        loss = task + passed.penalty
        if not bool(torch.isfinite(loss.detach())):
            raise InputError(
                expected("a finite objective", float(loss.detach()), "Lower the learning rate or check the photos")
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        network.follow(passed.watched, labels)
        wrong = ((passed.outputs.detach() > 0) != labels).float().mean()
        return {"task": task.detach(), "error": wrong, **passed.terms}


def train_interpretable_cnn(
    network: InterpretableCNN,
    data: LabelledMaps,
    folder: Path,
    *,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[dict[str, Any], ...]:
    """Train an interpretable CNN; continue where a killed run stopped.

    The loss of a batch is the mean over images of ``sum_c log(1 + exp(-y_c out_c))``, ``y_c`` 1 or -1, plus the filter
    loss of the method (:class:`~partlens_papers.rivals.masks.PublishedMask`,
    :class:`~partlens_papers.rivals.masks.ReleasedMask`).

    Args:
        network: from :func:`~partlens_papers.rivals.interpretable_cnn.build_interpretable_cnn`; it is changed.
        data: cached maps of the training photos and what they show.
        folder: where a checkpoint is written after every epoch.
        report: gets each epoch's record; an exception from it ends training with the last checkpoint intact.

    Returns:
        The history: per epoch ``task`` (the logistic loss), ``error`` (share of wrong outputs in training, dropout on),
        ``kept_LAYER``, ``filter_LAYER`` or ``radius_LAYER``.

    Raises:
        ImageError: fewer than two rows, or labels of another number.
        InputError: another number of categories than outputs, or an objective that is not finite.
        RunError: ``folder`` holds a checkpoint of another configuration.
    """
    if len(data.labels) < 2 or len(data.labels) != len(data.tap):
        raise ImageError(
            expected(
                "at least 2 rows of maps and as many labels", f"{len(data.tap)} and {len(data.labels)}", "Add photos"
            )
        )
    outputs = int(network.outputs(data.read(np.arange(1)).to(network.inserted.weight.device)).shape[1])
    if outputs != data.labels.shape[1]:
        raise InputError(
            expected(f"labels of {outputs} categories", int(data.labels.shape[1]), "Build the network for as many")
        )
    run = _Run(network, data, folder)
    run.restore()
    for number in range(len(run.history) + 1, network.config.epochs + 1):
        record = run.epoch(number)
        run.history.append(record)
        run.save()
        if report is not None:
            report(record)
    network.eval()
    return tuple(run.history)
