"""How an explainer is built and learned: what a user may change, with range and source.

The defaults of the fields are the papers' values (preset ``paper``). Where the papers are silent the value is ours, and
the docstring says so. The preset ``partlens``, which the verbs use, changes the fields in ``ExplainerConfig.PRESETS``.
What nobody should change is a constant next to the code that uses it.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from partlens.errors import InputError, expected
from partlens.records import PresetSettings

Preset = Literal["partlens", "paper"]


class ExplainerConfig(PresetSettings):
    """How one explainer is built and learned.

    Attributes:
        score_scale_nats: maps are scaled, per filter and by a running mean, so that the best template scores this many
            nats before the filter loss; 0 leaves the maps as they are (paper).
        gradient: ``exact`` over all templates or the paper's ``approximate`` single template (CVPR 2018, Eq. (4)).
        eta: weight of -log p; 1e6 for AlexNet, VGG-M and VGG-S, 1.5e5 for VGG-16 and ResNets (ICLR 2020, Sec. 4).
        filter_ratio: E|lambda_f dLoss_f/dx| over E|dLoss_rec/dx| in epoch 1 (ICLR 2020: 1/300, as we read it).
        filter_decay: the ratio is divided by epoch ** filter_decay (paper: 1).
        filter_mix: apply the loss of conv-interp-2 to p x_f + (1 - p) x_ordin, the ordinary track detached (ICLR
            2020, App. I).
        filter_background: photos of other categories enter the filter loss, too; with the approximate gradient they
            take the negative template (CVPR 2018, Eq. (4)). Otherwise they serve the reconstruction only.
        objective: ``reconstruction`` of the targets, or ``classification``: the loss of the fed-back reconstruction
            against labels replaces it (Explainer+cls of ICLR 2020, Table 10).
        peak: where the part of a filter is, which decides where the mask of conv-interp-2 is put: the ``largest`` cell
            of its map (papers), or the ``centroid``, which does not jump where a map has two peaks.
        teachers: most parts of each category that are found before and teach, shared out among the filters of
            conv-interp-2, which learn to be where theirs is; 0 in the papers. An inspection's parts are taken as they
            are.
        hidden_filters: filters of conv-interp-1, at most; 0 for as many as the tap has (papers), which for a tap of a
            thousand filters is most of the work.
        standardise: conv-interp-1 reads the tap's maps less their mean and over their deviation, measured once on the
            category's photos (paper silent).
        dropout: share of channels that are dropped in the warm-up, of the tap's maps and of conv-interp-1's.
        p_init: p at the start (paper silent).
        learning_rate: Adam, interpretable track (paper silent on the optimiser and all rates).
        learning_rate_joint: Adam, interpretable track after the warm-up, where the reconstruction teaches it too; 0
            leaves the track as the warm-up made it.
        learning_rate_ordinary: Adam, ordinary track; 0 leaves it the copy that it starts as.
        learning_rate_decoder: Adam, decoder.
        decoder_step_max: the decoder's rate is at most this share of the root mean square of its kernels, since Adam
            moves every weight by about the rate: what suits a convolution destroys a wide fully connected layer
            (AlexNet, VGG). 0 sets no limit.
        learning_rate_p: Adam, w_p.
        weight_decay: of the interpretable track, decoupled.
        batch_size: photos of the category in a step; the filter loss compares them.
        background_batch: other photos in a step, for the reconstruction only.
        epochs: passes over the category's photos, each in one view.
        warmup_epochs: passes before them in which only the interpretable track learns.
        views: views of each photo in the cache: the photo, its mirror, then random crops, half of them mirrored.
        patience: epochs without improvement of the smoothed objective before training stops; 0 never stops early.
        precision: number type of convolutions in training; sums, losses and weights stay float32. By default
            ``fit_explainer`` takes float32 on a processor without bfloat16 units.
        seed: seed of every random draw.

    Class attributes:
        PRESETS: what each changes in the papers' values; ``partlens`` teaches parts before and while it reconstructs.

    Example:
        >>> ExplainerConfig.preset("paper", epochs=3).epochs
        3
    """

    score_scale_nats: float = Field(0.0, ge=0)
    gradient: Literal["exact", "approximate"] = "approximate"
    eta: float = Field(1.5e5, ge=0)
    filter_ratio: float = Field(1 / 300, ge=0)
    filter_decay: float = Field(1.0, ge=0)
    filter_mix: bool = True
    filter_background: bool = True
    objective: Literal["reconstruction", "classification"] = "reconstruction"
    peak: Literal["largest", "centroid"] = "largest"
    teachers: int = Field(0, ge=0)
    hidden_filters: int = Field(0, ge=0)
    standardise: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    p_init: float = Field(0.5, gt=0, lt=1)
    learning_rate: float = Field(1e-3, gt=0)
    learning_rate_joint: float = Field(1e-3, ge=0)
    learning_rate_ordinary: float = Field(1e-4, ge=0)
    learning_rate_decoder: float = Field(1e-4, gt=0)
    decoder_step_max: float = Field(0.0, ge=0)
    learning_rate_p: float = Field(3e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(32, ge=2)
    background_batch: int = Field(16, ge=0)
    epochs: int = Field(50, ge=1)
    warmup_epochs: int = Field(0, ge=0)
    views: int = Field(2, ge=1)
    patience: int = Field(10, ge=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "partlens": {
            "score_scale_nats": 8.0,
            "gradient": "exact",
            "eta": 1e6,
            "filter_ratio": 10.0,
            "filter_decay": 0.0,
            "filter_mix": False,
            "filter_background": False,
            "peak": "centroid",
            "teachers": 8,
            "hidden_filters": 256,
            "standardise": True,
            "dropout": 0.3,
            "p_init": 0.4,
            "learning_rate_ordinary": 0.0,
            "learning_rate_decoder": 1e-3,
            "decoder_step_max": 0.01,
            "learning_rate_p": 2e-2,
            "weight_decay": 0.05,
            "epochs": 15,
            "warmup_epochs": 15,
            "views": 4,
            "precision": "bfloat16",
        },
        "paper": {},
    }

    @model_validator(mode="after")
    def _teachable(self) -> ExplainerConfig:
        if self.teachers and not self.warmup_epochs:
            raise InputError(
                expected("a warm-up for teachers to teach in", 0, "Raise warmup_epochs, or set teachers to 0")
            )
        if self.teachers and self.views < 2:
            rule = "at least 2 views to choose teachers by how they move"
            raise InputError(expected(rule, self.views, "Raise views, or set teachers to 0"))
        return self
