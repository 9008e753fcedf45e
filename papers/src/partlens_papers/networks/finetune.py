"""Train a performer for categories of photos: a copy with new last layers, learned as the explainer papers did.

What stays fixed is computed once: with ``train_from`` the maps of each photo and its mirror lie on disk, and an epoch
reads batches. Everything drawn in an epoch comes from (seed, epoch), and a checkpoint holds weights and momentum, so
that a run which was killed ends, on the same machine and with the same number of threads, with the same bits as one
that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from partlens.checkpoint import Checkpoint, moments, restore_moments
from partlens.data.images import ImageSet
from partlens.errors import InputError, expected, listed
from partlens.network.borrowed import borrowed, random_state_kept
from partlens.network.performer import Performer, module_of
from partlens.network.stream import batches
from partlens.progress import Progress
from partlens.records import content_hash
from partlens_papers.networks.finetune_config import FinetuneConfig
from partlens_papers.networks.finetune_network import Prepared, run_blank, upper
from partlens_papers.networks.finetune_photos import (
    OTHER,
    Read,
    epoch_photos,
    fixed_maps,
    kept_frames,
    prepared_batches,
    reader_of_frames,
    reader_of_maps,
)

_HELD_BATCH = 64
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, eq=False)
class Finetuned:
    """A trained network.

    Attributes:
        module: in eval mode, on the CPU.
        history: one mapping per epoch: number, phase, mean loss, share of wrong answers in training, rate, seconds.
    """

    module: nn.Module
    history: tuple[dict[str, Any], ...]


def _scores(trained: nn.Module, batch: Tensor) -> Tensor:
    result = trained(batch)
    scores: Tensor = result[0] if isinstance(result, tuple) else result
    return scores


def category_loss(scores: Float[Tensor, "image output"], labels: Int[Tensor, " image"], loss: str) -> Float[Tensor, ""]:
    """Return the mean loss of a batch.

    Logistic: ``sum_c log(1 + exp(-y_c s_c))`` with ``y_c`` = 1 where the photo shows category c, else -1; softmax:
    cross-entropy in nats.

    Args:
        scores: the network's outputs.
        labels: number of each photo's category, :data:`OTHER` for none (logistic only).
        loss: ``logistic`` or ``softmax``.

    Returns:
        Mean over the images, at least 0.

    Source:
        CVPR 2018, Sec. 5; MatConvNet's ``logistic`` and ``softmaxlog``.

    Example:
        >>> round(float(category_loss(torch.tensor([[0.0], [0.0]]), torch.tensor([0, -1]), "logistic")), 4)
        0.6931
    """
    if loss == "softmax":
        return F.cross_entropy(scores, labels)
    signs = 2.0 * (labels[:, None] == torch.arange(scores.shape[1], device=labels.device)).to(scores.dtype) - 1
    return F.softplus(-signs * scores).sum(1).mean()


def wrong_answers(scores: Float[Tensor, "image output"], labels: Int[Tensor, " image"]) -> Bool[Tensor, " image"]:
    """Say for each image whether the answer is wrong.

    With one output the answer is its sign (0 counts as "no"), with several the largest one.

    Example:
        >>> wrong_answers(torch.tensor([[2.0], [2.0]]), torch.tensor([0, -1])).tolist()
        [False, True]
    """
    if scores.shape[1] == 1:
        return (scores[:, 0] > 0) != (labels == 0)
    return scores.argmax(1) != labels


def _groups(trained: nn.Module, new_layers: Sequence[str], config: FinetuneConfig) -> list[dict[str, Any]]:
    """Sort parameters by rate and decay; what has no rate needs no gradient."""
    new = tuple(f"{name}." for name in new_layers)
    chosen: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.named_parameters():
        fresh = name.startswith(new)
        share = 1.0 if fresh else config.rate_kept
        parameter.requires_grad_(share > 0)
        if share > 0:
            decay = 0.0 if fresh and parameter.ndim == 1 else config.weight_decay
            chosen.setdefault((share, decay), []).append(parameter)
    return [{"params": p, "share": share, "weight_decay": decay} for (share, decay), p in chosen.items()]


def _learning(trained: nn.Module) -> None:
    """Switch dropout layers on and nothing else: running statistics of norm layers stay those of the given weights."""
    trained.eval()
    for each in trained.modules():
        if isinstance(each, _DROPOUT):
            each.train()


class _Run:
    """One training with its state on disk."""

    def __init__(
        self,
        performer: Performer,
        prepared: Prepared,
        images: ImageSet,
        labels: Tensor,
        outputs: int,
        config: FinetuneConfig,
        folder: Path,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.performer, self.prepared, self.images, self.labels = performer, prepared, images, labels
        self.outputs, self.config, self.folder, self.device, self.progress = outputs, config, folder, device, progress
        self.history: list[dict[str, Any]] = []
        identity = {
            "performer": performer.weights_sha256,
            "preprocessing": performer.preprocessing.to_dict(),
            "images": images.fingerprint(),
            "labels": labels.tolist(),
            "outputs": outputs,
            "config": dict(config),
        }
        self.checkpoint = Checkpoint(folder, content_hash(identity))
        self.late = False
        self.begin(late=False)

    def begin(self, *, late: bool) -> None:
        """Start a phase: only the layers from ``train_from`` on, or all."""
        if late and not self.late:
            self.close()
        self.late = late
        source = None if late else self.prepared.source
        self.trained, self.layers = upper(self.prepared.module, source, self.performer.preprocessing)
        self.trained.to(self.device)
        self.optimiser = torch.optim.SGD(
            _groups(self.layers, self.prepared.new_layers, self.config),
            lr=self.config.learning_rate,
            momentum=self.config.momentum,
            fused=True,
        )

    def close(self) -> None:
        """Bring what was learned back into the network, on the CPU."""
        learned = {name: value.cpu() for name, value in self.layers.state_dict().items()}
        self.prepared.module.cpu().load_state_dict(learned, strict=False)

    def phase(self, *, late: bool) -> Read:
        """Enter a phase, if it is not the present one, and open its cache, filling it first."""
        if late and not self.late:
            self.begin(late=True)
        source = None if self.late else self.prepared.source
        preprocessing = self.performer.preprocessing
        if source is None:
            return reader_of_frames(kept_frames(self.images, preprocessing, self.folder, self.progress), preprocessing)
        maps = fixed_maps(
            self.performer, source, self.images, self.config, self.folder / "maps", self.device, self.progress
        )
        return reader_of_maps(maps, 2 if self.config.mirror else 1)

    def restore(self) -> None:
        """Continue from a checkpoint if there is one.

        Raises:
            RunError: the checkpoint belongs to another configuration.
        """
        if (found := self.checkpoint.load()) is None:
            return
        self.history = list(found.values["history"])
        if len(self.history) > self.config.epochs:
            self.begin(late=True)
        self.trained.load_state_dict(found.tensors["network"])
        restore_moments(self.optimiser, found.tensors["optimiser"])

    def save(self) -> None:
        """Write a checkpoint."""
        values = {"history": self.history}
        self.checkpoint.save(values, network=self.trained.state_dict(), optimiser=moments(self.optimiser))

    def epoch(self, number: int, read: Read) -> dict[str, Any]:
        """Run one epoch and return its record."""
        photos, mirrored = epoch_photos(self.labels, self.outputs, self.config, number)
        rate = self.config.rate_of_epoch(number)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["share"]
        started = time.monotonic()
        total, wrong = 0.0, 0
        _learning(self.trained)
        with random_state_kept():
            torch.manual_seed(self.config.seed * 7_919 + number)  # dropout draws from the global state
            for part, batch in prepared_batches(read, photos, mirrored, self.config.batch_size):
                loss, missed = self._step(batch.to(self.device), self.labels[part].to(self.device))
                total += loss * len(part)
                wrong += missed
        return {
            "epoch": number,
            "phase": "all" if self.late or self.prepared.source is None else "upper",
            "loss": total / len(photos),
            "wrong_frac": wrong / len(photos),
            "draws": len(photos),
            "learning_rate": rate,
            "seconds": round(time.monotonic() - started, 3),
        }

    def _step(self, batch: Tensor, labels: Tensor) -> tuple[float, int]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            scores = _scores(self.trained, batch)
        scores = scores.float()
        loss = category_loss(scores, labels, self.config.loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                expected("a finite loss", f"{value} in epoch {len(self.history) + 1}", "Lower the learning rate")
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        return value, int(wrong_answers(scores.detach(), labels).sum())


def finetune(
    performer: Performer,
    prepared: Prepared,
    images: ImageSet,
    labels: Int[Tensor, " photo"],
    config: FinetuneConfig,
    folder: Path,
    *,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Finetuned:
    """Train a prepared network; continue where a killed run stopped.

    SGD with momentum. Dropout layers are on; norm layers keep the running statistics of the given weights, of which
    small batches would make a worse estimate, and only their scale and shift are learned.

    Args:
        performer: the network that was copied; it computes the maps that stay fixed and is left as it was.
        prepared: from :func:`~partlens_papers.networks.finetune_network.prepare_network`; its ``module`` is trained
        in place.
        images: training photos. They are decoded once, to bytes on disk, and read batch by batch.
        labels: number of each photo's category, :data:`OTHER` for none.
        config: the training.
        folder: for caches and checkpoints.
        device: where it is trained: ``cpu``, ``cuda``, ``cuda:1``.
        progress: how to show progress; silent by default.

    Returns:
        The network and its history.

    Raises:
        ImageError: a photo that cannot be read.
        InputError: labels that do not fit, or a loss that is not finite.
        RunError: ``folder`` holds a checkpoint of another configuration.
        StorageError: the disk is full; the last checkpoint stays.
    """
    outputs = int(run_blank(prepared.module, performer.preprocessing.size_px).shape[1])
    lowest = 0 if config.loss == "softmax" else OTHER
    if len(labels) != len(images) or not len(labels):
        raise InputError(expected(f"{len(images)} labels, one per photo", len(labels), "Give one label per photo"))
    if int(labels.min()) < lowest or int(labels.max()) >= outputs or len(labels.unique()) < 2:
        raise InputError(
            expected(
                f"labels of at least two kinds from {lowest} to {outputs - 1}",
                listed([str(int(v)) for v in labels.unique()]),
                "Add photos of another category",
            )
        )
    show = progress or Progress.silent()
    run = _Run(performer, prepared, images, labels, outputs, config, folder, torch.device(device), show)
    run.restore()
    for late, first, last in ((False, 1, config.epochs), (True, config.epochs + 1, config.total_epochs)):
        numbers = range(max(first, len(run.history) + 1), last + 1)
        if not numbers:
            continue
        read = run.phase(late=late)
        with show.task("training all layers" if late else "training", last) as advance:
            for number in numbers:
                record = run.epoch(number, read)
                run.history.append(record)
                run.save()
                remark = f"loss {record['loss']:.3f}  wrong {record['wrong_frac']:.1%}  {record['seconds']:.1f} s"
                advance(number, remark)
    run.close()
    module = prepared.module.eval()
    for parameter in module.parameters():
        parameter.requires_grad = True
        parameter.grad = None
    return Finetuned(module, tuple(run.history))


@torch.no_grad()
def category_scores(
    performer: Performer, images: ImageSet, *, device: str | torch.device = "cpu", progress: Progress | None = None
) -> Float[Tensor, "image output"]:
    """Return a network's outputs for photos, read in a stream.

    Args:
        performer: the network; left as it was.
        images: the photos.
        device: where it runs.
        progress: how to show progress; silent by default.

    Returns:
        The outputs on the CPU, photos in their order.

    Raises:
        ImageError: a photo that cannot be read.
    """
    show = progress or Progress.silent()
    found: list[Tensor] = []
    with (
        borrowed(module_of(performer), copy_weights=False) as network,
        show.task("scoring held-out photos", len(images)) as advance,
    ):
        network.to(device)
        for rows, batch in batches(performer, images, range(len(images)), _HELD_BATCH):
            found.append(network(batch.to(device)).float().cpu())
            advance(rows[-1] + 1)
    return torch.cat(found)
