"""Train a small classifier on an image set, and keep it as a file that names its input and its classes."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from torch import Tensor, nn

from partlens.data.images import ImageSet
from partlens.errors import InputError, expected
from partlens.network.borrowed import random_state_kept
from partlens.network.preprocessing import Preprocessing
from partlens.progress import Progress
from partlens.records import write_tensors

_READ_AT_ONCE = 256
_HELD_BATCH = 128


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained classifier."""

    network: nn.Module  # in eval mode
    class_names: tuple[str, ...]  # what its outputs mean: the categories in alphabetical order
    right: Bool[Tensor, " image"]  # for each held-out image, whether the largest output is its category's

    @property
    def accuracy(self) -> float:
        """Share of the held-out images that are classified rightly, 0 to 1."""
        return float(self.right.float().mean())


def frames(images: ImageSet, rows: tuple[int, ...], preprocessing: Preprocessing) -> UInt8[Tensor, "image row col 3"]:
    """Read images as bytes at the size of the network's input, a quarter of the memory of the input itself."""
    read = [
        np.stack(
            [
                np.asarray(preprocessing.frame(images.read(i, preprocessing.scaled_size)))
                for i in rows[start : start + _READ_AT_ONCE]
            ]
        )
        for start in range(0, len(rows), _READ_AT_ONCE)
    ]
    return torch.from_numpy(np.concatenate(read))


def train_classifier(
    build: Callable[[int], nn.Module],
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    epochs: int,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-3,
    mirror: bool = True,
    channels_last: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Fitted:
    """Train a network to tell the categories of an image set apart.

    AdamW with one cycle of the learning rate (up for three tenths of the steps, then down) and cross-entropy. The same
    seed gives the same weights on the same machine and library versions.

    ``build`` makes the untrained network for a number of outputs, under the seed. ``mirror`` turns every other batch
    left to right; ``channels_last`` lays tensors out as CPUs like them, which is faster and rounds otherwise.

    Raises:
        InputError: no epochs, or fewer than two categories.
        ImageError: no image in the split ``train`` or ``test``.
    """
    names = tuple(sorted(images.category_counts()))
    if epochs < 1:
        raise InputError(expected("epochs >= 1", epochs, "Train for at least one epoch"))
    if len(names) < 2:
        raise InputError(expected("at least two categories", ", ".join(names), "Add images of another category"))
    show = progress or Progress.silent()
    number = {name: index for index, name in enumerate(names)}
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def load(split: str) -> tuple[Tensor, Tensor]:
        rows = images.indices(split=split)
        return frames(images, rows, preprocessing), torch.tensor([number[images.categories[i]] for i in rows])

    def ready(part: Tensor) -> Tensor:
        return preprocessing.of_bytes(part).contiguous(memory_format=layout)

    with random_state_kept():
        torch.manual_seed(seed)
        network = build(len(names)).to(memory_format=layout)
        with show.task("reading images", 2) as advance:
            pictures, labels = load("train")
            advance(1)
            held, held_labels = load("test")
            advance(2)
        optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        steps = epochs * ((len(labels) + batch_size - 1) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=learning_rate, total_steps=steps)

        def step(rows: Tensor) -> Tensor:
            batch = ready(pictures[rows])
            # The draw comes after that of the order, once per batch: seeded weights depend on it.
            batch = batch.flip(3) if mirror and float(torch.rand(())) < 0.5 else batch
            loss = F.cross_entropy(network(batch), labels[rows])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            return loss.detach()

        network.train()
        with show.task("training the network", epochs) as advance:
            for epoch in range(epochs):
                for rows in torch.randperm(len(labels)).split(batch_size):
                    loss = step(rows)
                advance(epoch + 1, f"loss {float(loss):.2f}")
        network = network.to(memory_format=torch.contiguous_format).eval()
        right = right_answers(network, held, held_labels, preprocessing)
    return Fitted(network, names, right)


@torch.no_grad()
def right_answers(
    network: nn.Module, pictures: UInt8[Tensor, "image row col 3"], labels: Tensor, preprocessing: Preprocessing
) -> Bool[Tensor, " image"]:
    """Say for each image whether the network's largest output is its label."""
    outputs = [network(preprocessing.of_bytes(part)).argmax(1) for part in pictures.split(_HELD_BATCH)]
    return torch.cat(outputs) == labels


def save_classifier(
    path: Path, network: nn.Module, preprocessing: Preprocessing, class_names: tuple[str, ...] = ()
) -> None:
    """Write a network's weights with what :func:`~partlens.network.zoo.load_performer` also has to know.

    The header says the input, and the class names as a JSON list.

    Raises:
        StorageError: the file could not be written.
    """
    metadata = preprocessing.to_metadata()
    if class_names:
        metadata["class_names"] = json.dumps(list(class_names))
    write_tensors(path, network.state_dict(), metadata)


FLOWER_DEMO = "flower-demo"  # the name of the demo's network after ``partlens:``
SIDE_PX = 112
_MEAN = (0.45, 0.45, 0.4)
_STD = (0.25, 0.25, 0.25)


def flower_preprocessing() -> Preprocessing:
    """Return how flowers become the input: squashed to 112 px, RGB, roughly centred."""
    return Preprocessing(size_px=(SIDE_PX, SIDE_PX), resize="squash", resize_px=None, mean=_MEAN, std=_STD)


def flower_network(outputs: int = 6) -> nn.Sequential:
    """Return the demo's performer, untrained: six convolutions, 14x14 cells at the tap ``relu4``.

    Args:
        outputs: number of categories.

    Returns:
        A sequential network for 112 px images.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    plan = ((3, 24, 2, False), (24, 32, 1, True), (32, 48, 1, True), (48, 64, 1, False), (64, 64, 1, True))
    for number, (inputs, filters, stride, pooled) in enumerate(plan, start=1):
        layers[f"conv{number}"] = nn.Conv2d(inputs, filters, 3, stride, 1, bias=False)
        layers[f"norm{number}"] = nn.BatchNorm2d(filters)
        layers[f"relu{number}"] = nn.ReLU()
        if pooled:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
    layers["conv6"] = nn.Conv2d(64, 96, 3, 1, 1)
    layers["relu6"] = nn.ReLU()
    layers["pool6"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classes"] = nn.Linear(96, outputs)
    return nn.Sequential(layers)
