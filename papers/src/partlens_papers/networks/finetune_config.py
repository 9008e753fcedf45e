"""How a performer is trained for categories: every choice a field, with its source. It imports no tensor library."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from partlens.records import Settings


class FinetuneConfig(Settings):
    """Configuration of one training.

    "Papers" are CVPR 2018 (arXiv 1710.00935), Sec. 5, and the code its authors released; the explainer papers use the
    same performers. Where they are silent the value is our choice.

    Attributes:
        loss: ``logistic``: one output per category, the sum over outputs of ``log(1 + exp(-y s))`` with y = 1 for the
            photo's category and -1 for the others (papers: single and multi-category); ``softmax``: cross-entropy
            over the categories (papers: a variant of multi-category).
        new_layers: which layers are drawn anew, N(0, 0.01²) with bias 0. ``auto``: all fully connected layers of
            networks that end in three of them (AlexNet, VGG: the papers' way), else the last layer.
        train_from: first layer that is trained; all layers before it stay as they are, and their output is computed
            once. ``None`` trains all layers (papers).
        epochs: passes with ``train_from``; papers: 50 for a single category, 80 for several.
        epochs_all: further passes in which all layers are trained at ``rate_all`` times the rates.
        batch_size: photos per step (papers: 32 to 512, by network).
        learning_rate: of new layers in the first epoch, for the mean loss of a batch (released code: 3e-3 for AlexNet
            and VGG-M, 1e-3 for VGG-S, 1e-4 for VGG-16). AlexNet on photos of foxes diverged in places at 1e-2.
        rate_kept: rate of layers with given weights over that of new layers (ours: Caffe's usual tenth).
        rate_all: factor on all rates in ``epochs_all``.
        rate_fall: rate of the last epoch over that of the first, falling geometrically (released code: 1e-4 to 1e-5).
        momentum: of SGD (released code).
        weight_decay: of weights; biases of new layers are not decayed (released code).
        positive_share: share of the category's photos in an epoch of a single category; its photos, or the others,
            are repeated to reach it. Released code: 0.75, which comes of 3,000 repeated crops against 1,000 frames.
            Ours is 0.5, where a score of 0 favours neither answer, because here all other photos are negatives.
        mirror: draw every other photo mirrored, at random.
        precision: of the arithmetic; weights and sums stay float32.
        cache_precision: of the cached maps at ``train_from``.
        seed: of the new layers, the order, the mirrors and dropout.

    Raises:
        InputError: a value out of its range.

    Example:
        >>> FinetuneConfig(epochs=3).loss
        'logistic'
    """

    loss: Literal["logistic", "softmax"] = "logistic"
    new_layers: Literal["auto", "last", "fully-connected"] = "auto"
    train_from: str | None = None
    epochs: int = Field(20, ge=1)
    epochs_all: int = Field(0, ge=0)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(0.001, gt=0)
    rate_kept: float = Field(0.1, ge=0)
    rate_all: float = Field(0.1, gt=0)
    rate_fall: float = Field(0.1, gt=0, le=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    positive_share: float = Field(0.5, gt=0, lt=1)
    mirror: bool = True
    precision: Literal["float32", "bfloat16"] = "float32"
    cache_precision: Literal["float16", "float32"] = "float16"
    seed: int = 0

    @property
    def total_epochs(self) -> int:
        """Passes of both phases."""
        return self.epochs + self.epochs_all

    def rate_of_epoch(self, number: int) -> float:
        """Return the learning rate of new layers in an epoch.

        Args:
            number: from 1; those after ``epochs`` train all layers.

        Example:
            >>> config = FinetuneConfig(epochs=3, epochs_all=1)
            >>> [round(config.rate_of_epoch(n), 5) for n in (1, 2, 3, 4)]
            [0.001, 0.00032, 0.0001, 0.0001]
        """
        late = number > self.epochs
        place, length = (number - self.epochs, self.epochs_all) if late else (number, self.epochs)
        fall = math.exp(math.log(self.rate_fall) * (place - 1) / max(1, length - 1))
        return self.learning_rate * (self.rate_all if late else 1.0) * fall
