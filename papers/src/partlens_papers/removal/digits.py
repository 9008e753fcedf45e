"""Handwritten digits: MatConvNet's LeNet, trained here, and MNIST from a file of arrays."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partlens.errors import ImageError, expected
from partlens.progress import Progress

if TYPE_CHECKING:
    from torch import nn

    from partlens.data.images import ImageSet
    from partlens.network.performer import Performer
    from partlens.network.preprocessing import Preprocessing

SIDE_PX = 28
CLASSES = tuple(str(digit) for digit in range(10))
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def lenet(outputs: int = 10) -> nn.Sequential:
    """Return MatConvNet's LeNet, untrained: 5x5x20, pool, 5x5x50, pool, 4x4x500, ReLU, 1x1 to the scores.

    There is one ReLU, after the third convolution, as in the original. The first convolution has three input planes
    instead of one, because the performer's input is RGB; on grey images the three planes of a kernel act as their sum.

    Args:
        outputs: number of classes.

    Returns:
        A sequential network for 28 px images. Without the flattening and the scores its layers have
        20 + 20 + 50 + 50 + 500 + 500 = 1,140 filters.

    Example:
        >>> import torch
        >>> tuple(lenet()(torch.zeros(1, 3, 28, 28)).shape)
        (1, 10)
    """
    from torch import nn

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            conv3=nn.Conv2d(50, 500, 4),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(500, outputs, 1),
            flatten=nn.Flatten(),
        )
    )


def digit_preprocessing() -> Preprocessing:
    """Return how digits become the network's input: 28 px, brightness 0 to 1, centred by MNIST's mean and deviation."""
    from partlens.network.preprocessing import Preprocessing

    return Preprocessing(size_px=(SIDE_PX, SIDE_PX), resize="squash", mean=(0.1307,) * 3, std=(0.3081,) * 3)


def digit_set(path: str | Path) -> ImageSet:
    """Read digits from a ``.npz`` file with ``x_train, y_train, x_test, y_test`` (Keras' layout of MNIST).

    Args:
        path: the file; images uint8 ``[image, row, col]``, labels 0 to 9.

    Returns:
        The set with categories ``"0"`` to ``"9"`` and the splits ``train`` and ``test``.

    Raises:
        ImageError: the file is missing, not of that layout, or its arrays do not fit together.
    """
    import numpy as np

    from partlens.data.images import ImageSet

    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(
            expected(
                f"digits as {', '.join(_ARRAYS)} in {path}",
                f"{type(error).__name__}: {error}",
                "Give Keras' mnist.npz or a part of it",
            )
        ) from error
    for split in ("train", "test"):
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if images.shape[1:] != (SIDE_PX, SIDE_PX) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise ImageError(
                expected(
                    f"{split} digits of 28x28 px with one label from 0 to 9 each",
                    f"images {images.shape}, labels {labels.shape}",
                    "Correct the file",
                )
            )
    return ImageSet.from_arrays(
        np.concatenate([arrays["x_train"], arrays["x_test"]]),
        categories=[str(label) for split in ("train", "test") for label in arrays[f"y_{split}"]],
        splits=[split for split in ("train", "test") for _ in arrays[f"y_{split}"]],
        name="digits",
    )


def digit_performer(weights: str | Path) -> Performer:
    """Load a LeNet that `train_digits` wrote.

    Raises:
        WeightsError: the file is missing or holds another network.
    """
    from partlens.network.zoo import load_performer

    performer = load_performer(lenet().eval(), digit_preprocessing(), weights=weights)
    return dataclasses.replace(performer, name="lenet", class_names=CLASSES)


def train_digits(
    images: ImageSet, out: str | Path, *, epochs: int = 8, seed: int = 0, progress: Progress | None = None
) -> tuple[Performer, dict[str, Any]]:
    """Train the LeNet on digits, or load the one of an earlier call.

    AdamW with one cycle of the learning rate instead of MatConvNet's plain gradient descent over 20 epochs: on the
    sample of 10,000 digits it needs fewer passes.

    Args:
        images: from `digit_set`.
        out: the weights file (``.safetensors``); an existing one is loaded and measured, not trained again.
        epochs: passes over the training digits.
        seed: of weights and order.
        progress: how to show progress.

    Returns:
        The performer, and ``{"accuracy": Estimate, "epochs", "seed", "test_digits"}`` on the held-out digits.

    Raises:
        WeightsError: ``out`` holds another network.
        StorageError: the file could not be written.
    """
    import torch

    from partlens.estimate import proportion
    from partlens.network.fitting import frames, right_answers, save_classifier, train_classifier

    out = Path(out)
    prepare = digit_preprocessing()
    if not out.exists():
        fitted = train_classifier(
            lenet, images, prepare, epochs=epochs, batch_size=64, mirror=False, seed=seed, progress=progress
        )
        save_classifier(out, fitted.network, prepare, CLASSES)
    performer = digit_performer(out)
    rows = images.indices(split="test")
    labels = torch.tensor([int(images.categories[row]) for row in rows])
    right = right_answers(performer.module, frames(images, rows, prepare), labels, prepare)
    return performer, {
        "accuracy": proportion(right.float()).to_dict(),
        "epochs": epochs,
        "seed": seed,
        "test_digits": len(rows),
    }
