"""How an interpretable CNN is built and trained: every choice a field, with its source. No tensor library is read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from partlens.records import Settings

Method = Literal["published", "released"]


class InterpretableConfig(Settings):
    """How an interpretable CNN is built and trained.

    Attributes:
        method: ``published`` (CVPR 2018) or ``released`` (the MATLAB code, whose second mask comes after the pooling).
        strength: factor on the filter loss; 1 is the released code's own weight and, for the published method, whose
            paper leaves a factor open, about as much. 0 trains masks without a filter loss.
        inserted: the inserted convolution starts as ``gaussian`` (published) or as the ``identity`` plus such noise.
        head: the fully connected layers are ``new`` (published) or ``copied`` from the performer; the last one is new
            anyway where the number of outputs differs.
        weight_std: of new weights; 0.01 in the released code. 0 takes ``sqrt(2 / fan-in)``, for small networks.
        dropout: rate in the performer's own dropout layers; theirs by default (the authors' demo sets 0.8).
        learning_rate: SGD, first epoch; 1e-4 times 30, 30, 10 and 1 for AlexNet, VGG-M, VGG-S and VGG-16 in the code.
        learning_rate_end: reached after ``decay_epochs``; a tenth of the first in the code.
        decay_epochs: epochs over which the rate falls in equal ratios; in the code 10 for one category and all 80 for
            several.
        momentum: of SGD (code: 0.9).
        weight_decay: of weights, not of biases (code: 5e-4).
        batch_size: 512, 196, 128 and 32 for AlexNet, VGG-M, VGG-S and VGG-16 in the code.
        epochs: in the code 50 for one category, 80 for several.
        seed: of everything drawn.
    """

    method: Method = "published"
    strength: float = Field(1.0, ge=0)
    inserted: Literal["gaussian", "identity"] = "gaussian"
    head: Literal["new", "copied"] = "new"
    weight_std: float = Field(0.01, ge=0)
    dropout: float | None = Field(None, ge=0, lt=1)
    learning_rate: float = Field(3e-3, gt=0)
    learning_rate_end: float = Field(3e-4, gt=0)
    decay_epochs: int = Field(10, ge=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    batch_size: int = Field(128, ge=2)  # the filter loss compares photos
    epochs: int = Field(50, ge=1)
    seed: int = 0

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 1.

        Example:
            >>> config = InterpretableConfig(learning_rate=1e-2, learning_rate_end=1e-4, decay_epochs=3)
            >>> [round(config.rate(epoch), 6) for epoch in (1, 2, 3, 9)]
            [0.01, 0.001, 0.0001, 0.0001]
        """
        done = min(1.0, (epoch - 1) / max(1, self.decay_epochs - 1))
        return float(self.learning_rate * (self.learning_rate_end / self.learning_rate) ** done)
