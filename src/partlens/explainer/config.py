"""How an explainer is built and learned: every weight a field, with its source.

The defaults of the fields are the papers' values ("paper" preset). Where the papers are silent the docstring says so,
and the value is our choice; what has been compared so far is in ``docs/study.md``. The ``partlens`` preset, which the
verbs use, changes the fields listed in :data:`PARTLENS_CHANGES`; ``held`` and ``candidates``, which were the defaults
before it, change those in :data:`HELD_CHANGES` and :data:`CANDIDATES_CHANGES`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from partlens.errors import InputError, check_names, check_types, expected

Preset = Literal["partlens", "held", "candidates", "paper"]


_POSITIVE = (
    "beta",
    "tau_cells",
    "reconstruction_weight",
    "classification_weight",
    "learning_rate",
    "learning_rate_decoder",
    "learning_rate_p",
    "batch_size",
    "epochs",
    "views",
    "candidates_per_filter",
    "votes",
    "evidence_power",
    "evidence_smooth_cells",
    "teacher_weight",
    "peak_power",
)
_NOT_NEGATIVE = (
    "learning_rate_joint",
    "learning_rate_ordinary",
    "decoder_step_max",
    "score_scale_nats",
    "eta",
    "filter_ratio",
    "filter_decay",
    "diversity_weight",
    "equivariance_weight",
    "evidence_weight",
    "teachers",
    "teacher_variety",
    "teacher_modes",
    "dropout",
    "norm_floor",
    "hidden_filters",
    "weight_decay",
    "background_batch",
    "warmup_epochs",
    "patience",
)

_OURS: dict[str, Any] = {
    "score_scale_nats": 8.0,
    "gradient": "exact",
    "eta": 4e5,
    "filter_ratio": 10.0,
    "filter_decay": 0.0,
    "filter_mix": False,
    "filter_background": False,
    "p_init": 0.2,
    "learning_rate_ordinary": 0.0,
    "learning_rate_decoder": 2e-4,
    "learning_rate_p": 2e-2,
    "precision": "bfloat16",
}

_TAUGHT: dict[str, Any] = _OURS | {
    "peak": "centroid",
    "teachers": 16,
    "hidden_filters": 256,
    "votes": 128,
    "standardise": True,
    "dropout": 0.3,
    "weight_decay": 0.05,
    "views": 6,
    "warmup_epochs": 30,
}

PARTLENS_CHANGES: dict[str, Any] = _TAUGHT | {
    "teacher_match": True,
    "eta": 1e6,
    "p_init": 0.4,
    "learning_rate_decoder": 1e-3,
    "decoder_step_max": 0.01,
    "epochs": 30,
}
"""What the ``partlens`` preset changes; what has been compared is in ``docs/study.md``."""

HELD_CHANGES: dict[str, Any] = _TAUGHT | {"learning_rate_joint": 0.0, "epochs": 16}
"""What the ``held`` preset changes: parts are taught in the warm-up and held from then on, so they say where and hardly
how much, and decisions stay the performer's at a small p. It was the default before parts went on learning."""

CANDIDATES_CHANGES: dict[str, Any] = _OURS | {
    "diversity_weight": 8.0,
    "diversity_target": 0.25,
    "equivariance_weight": 8.0,
    "initialisation": "parts",
    "votes": 128,
    "learning_rate": 1e-4,
    "learning_rate_joint": 1e-5,
    "views": 10,
    "batch_size": 64,
    "background_batch": 32,
    "epochs": 24,
    "warmup_epochs": 16,
}
"""What the ``candidates`` preset changes: parts are sought in the tap alone and stand at the largest cell. It was the
default before there were teachers, and is better on AlexNet's birds (``docs/study.md``)."""

PRESETS: dict[str, dict[str, Any]] = {
    "partlens": PARTLENS_CHANGES,
    "held": HELD_CHANGES,
    "candidates": CANDIDATES_CHANGES,
    "paper": {},
}
"""By name: what differs from the papers' values."""

REVISION = 2
"""Raised where the same fields give another explainer, so that runs and tables of before are not taken for it.

2: the interpretable track's norm layer is measured again after the warm-up; every category has a teacher for a filter.
"""


@dataclass(frozen=True)
class ExplainerConfig:
    """Configuration of one explainer.

    Attributes:
        beta: fall-off of templates and masks (CVPR 2018, Sec. 3.1: 4).
        tau_cells: template scale times L² (CVPR 2018, Sec. 3.1: 0.5, i.e. tau = 0.5 / L²).
        templates: ``peaks``, the paper's, or ``shuffled``: the cells of every template in an order of its own, which
            takes from the loss what makes it ask for one place. An ablation.
        mask: mask both interpretable layers around their peaks (ICLR 2020, Sec. 3.1); off is an ablation.
        peak: where a filter's part stands, and so where the mask of conv-interp-2 is put and what is measured: the
            ``largest`` cell of its map (the papers), or the ``centroid`` of the map raised to ``peak_power``, which
            does not jump where a map answers in two places
            (:func:`partlens.explainer.templates.centroid_cells`).
        peak_power: for ``centroid``.
        score_scale_nats: maps are scaled, per filter and by a running mean, so that the score of the best template is
            this many nats before the filter loss; 0 leaves the maps as they are (paper).
        gradient: ``exact`` over all templates or the paper's ``approximate`` single template (CVPR 2018, Eq. (4)).
        normaliser: ``batch`` or ``running`` Z_T (CVPR 2018, footnote 2; the released code uses the batch).
        objective: ``reconstruction`` of the targets, or ``classification``: the loss of the fed-back reconstruction
            against labels takes its place (Explainer+cls of ICLR 2020, Table 10, a baseline).
        classification_weight: of that loss, in the units of the reconstruction loss (paper silent).
        reconstruction_weight: numerator of lambda_l = 5e4 / E|max(x*, 0)| (ICLR 2020, Sec. 4).
        eta: weight of -log p; 1e6 for AlexNet, VGG-M and VGG-S, 1.5e5 for VGG-16 and ResNets (ICLR 2020, Sec. 4).
        filter_ratio: E|lambda_f dLoss_f/dx| over E|dLoss_rec/dx| in epoch 1 (ICLR 2020: 1/300, as we read it).
        filter_decay: the ratio is divided by epoch ** filter_decay (paper: 1).
        filter_mix: apply the loss of conv-interp-2 to p x_f + (1 - p) x_ordin, the ordinary track detached (ICLR
            2020, App. I).
        filter_background: photos of other categories enter the filter loss, too; with the approximate gradient they
            take the negative template (CVPR 2018, Eq. (4)). Otherwise they serve the reconstruction only.
        diversity_weight: weight of the mean pairwise correlation of the filters' expected peaks above
            ``diversity_target``, per filter and in units of the filter loss; 0 in the papers, which report that filters
            spread over parts but have no term that makes them.
        diversity_target: mean pairwise correlation that is left alone.
        equivariance_weight: weight of the distance (cells) between a peak and where a crop or mirror of the photo
            should have put it, per filter and in units of the filter loss; 0 in the papers.
        evidence_weight: weight of ``-log sum_mu q(mu|x) e(mu)``, per filter and in units of the filter loss, where
            ``q`` is the posterior of the templates and ``e`` the performer's evidence (see
            :func:`partlens.explainer.evidence.evidence_maps`); 0 in the papers.
        evidence_power: evidence is raised to this power after it was scaled to a maximum of 1 in each photo.
        evidence_smooth_cells: side of the box (cells, odd) by which evidence is averaged first.
        teachers: part teachers (:mod:`partlens.explainer.teachers`) for each category, shared out among the filters of
            conv-interp-2, which learn to stand where their teacher does: in the warm-up from nothing else, then, unless
            the track is held, beside the reconstruction, which teaches them how strongly to answer; 0 in the papers.
        teacher_sources: what teachers are chosen from: regions of the performer's ``later`` layer, parts that the
            ``tap``'s own features vote for (:mod:`partlens.explainer.seeding`), or ``both``.
        teacher_match: give a filter the teacher at whose place its channel of the ordinary track answers most, so that
            the part paraphrases the channel it is added to; off, teachers are dealt out in turns.
        teacher_weight: of the teachers' cost, per filter and in units of the filter loss.
        teacher_variety: what a teacher pays for moving like those already chosen, per unit of correlation.
        teacher_modes: ways in which all teachers move together (:func:`partlens.explainer.teachers.in_step`); 0 leaves
            every teacher to itself.
        norm_momentum: weight of the past in the norm layers' running magnitudes (paper silent).
        norm_floor: magnitudes below this share of the layer's mean are raised to it, so that a dead channel does not
            divide by nearly nothing (paper silent).
        norm_positives_only: estimate magnitudes on photos of the category only (ICLR 2020, App. H).
        kernel: of conv-interp-1/2: ``full``, nine free taps (the papers), or ``box``, one weight for all nine: a ninth
            of the weights, which a few hundred photos teach at thirty times the rate without overfitting. Which is
            better depends on the network (``docs/study.md``).
        hidden_filters: of conv-interp-1, at most; 0 for as many as the tap has (the papers), which for a tap of a
            thousand filters is most of the work.
        initialisation: of conv-interp-1/2: ``random`` (He), ``identity`` plus a little noise, or ``parts`` (see
            :mod:`partlens.explainer.seeding`); the papers are silent.
        standardise: conv-interp-1 reads the tap's maps less their mean and over their deviation, measured once on the
            category's photos and kept; the same function of the maps as without, but for the borders, with weights of
            one scale for every tap (paper silent).
        dropout: share of channels left out at random in the warm-up, of the tap's maps and of conv-interp-1's.
        candidates_per_filter: for ``parts``: part candidates per filter of conv-interp-1; the best are kept. For
            teachers from the tap: per one of the 256 that are kept.
        votes: for ``parts``: filters of conv-interp-1 that vote for one filter of conv-interp-2; likewise of the tap's
            candidates for one that may teach.
        p_init: p at the start (paper silent).
        p_max: the largest p that training may reach, 1 in the paper.
        learning_rate: Adam, interpretable track (paper silent on the optimiser and all rates).
        learning_rate_joint: Adam, interpretable track after the warm-up, where the reconstruction pulls on it too; 0
            holds the track as the warm-up left it.
        learning_rate_ordinary: Adam, ordinary track; 0 holds the track at the perfect copy it starts as.
        learning_rate_decoder: Adam, decoder.
        decoder_step_max: the decoder's rate is at most this share of the root mean square of its kernels, since Adam
            moves every weight by about the rate: what suits a convolution destroys a wide fully connected layer
            (AlexNet, VGG). 0 sets no limit.
        learning_rate_p: Adam, w_p.
        weight_decay: decoupled, of the interpretable track.
        batch_size: photos of the category in a step.
        background_batch: other photos in a step, for the reconstruction only.
        epochs: passes over the category's photos, each in one view.
        warmup_epochs: passes in which only the interpretable track learns.
        views: views of each photo in the cache: the photo, its mirror, then random crops, half of them mirrored.
        crop_area_min: smallest share of the photo's area in a crop.
        patience: epochs without improvement of the smoothed objective before training stops; 0 never stops early.
        precision: of convolutions in training; sums, losses and weights stay float32.
        seed: of everything drawn.
    """

    beta: float = 4.0
    tau_cells: float = 0.5
    templates: Literal["peaks", "shuffled"] = "peaks"
    mask: bool = True
    peak: Literal["largest", "centroid"] = "largest"
    peak_power: float = 6.0
    score_scale_nats: float = 0.0
    gradient: Literal["exact", "approximate"] = "approximate"
    normaliser: Literal["batch", "running"] = "batch"
    objective: Literal["reconstruction", "classification"] = "reconstruction"
    classification_weight: float = 1e6
    reconstruction_weight: float = 5e4
    eta: float = 1.5e5
    filter_ratio: float = 1 / 300
    filter_decay: float = 1.0
    filter_mix: bool = True
    filter_background: bool = True
    diversity_weight: float = 0.0
    diversity_target: float = 1.0
    equivariance_weight: float = 0.0
    evidence_weight: float = 0.0
    evidence_power: float = 4.0
    evidence_smooth_cells: int = 5
    teachers: int = 0
    teacher_sources: Literal["later", "tap", "both"] = "later"
    teacher_match: bool = False
    teacher_weight: float = 100.0
    teacher_variety: float = 0.5
    teacher_modes: int = 0
    norm_momentum: float = 0.95
    norm_floor: float = 0.1
    norm_positives_only: bool = True
    kernel: Literal["full", "box"] = "full"
    hidden_filters: int = 0
    initialisation: Literal["random", "identity", "parts"] = "random"
    standardise: bool = False
    dropout: float = 0.0
    candidates_per_filter: int = 16
    votes: int = 64
    p_init: float = 0.5
    p_max: float = 1.0
    learning_rate: float = 1e-3
    learning_rate_joint: float = 1e-3
    learning_rate_ordinary: float = 1e-4
    learning_rate_decoder: float = 1e-4
    decoder_step_max: float = 0.0
    learning_rate_p: float = 3e-3
    weight_decay: float = 0.0
    batch_size: int = 32
    background_batch: int = 16
    epochs: int = 50
    warmup_epochs: int = 0
    views: int = 2
    crop_area_min: float = 0.55
    patience: int = 10
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field once."""
        check_types(self)
        for name in _POSITIVE + _NOT_NEGATIVE:
            value = getattr(self, name)
            low_enough = value > 0 if name in _POSITIVE else value >= 0
            if not (math.isfinite(value) and low_enough):
                rule = "positive" if name in _POSITIVE else "at least 0"
                raise InputError(expected(f"{name} {rule} and finite", value, f"Set {name} to a usable value"))
        if self.batch_size < 2:
            raise InputError(expected("batch_size at least 2", self.batch_size, "The filter loss compares photos"))
        for name in ("p_init", "norm_momentum", "crop_area_min"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(expected(f"{name} between 0 and 1", getattr(self, name), f"Choose {name} in (0, 1)"))
        if not 0 <= self.dropout < 1:
            raise InputError(expected("dropout in [0, 1)", self.dropout, "Set 0 to leave no channel out"))
        if self.peak_power < 1:
            raise InputError(expected("peak_power of at least 1", self.peak_power, "Leave it out for 6"))
        if self.hidden_filters and self.initialisation == "identity":
            raise InputError(
                expected(
                    "hidden_filters 0 (as many as the tap has) to start from the identity",
                    self.hidden_filters,
                    "Set hidden_filters to 0",
                )
            )
        if self.teachers and not self.warmup_epochs:
            raise InputError(
                expected("a warm-up for teachers to teach in", 0, "Raise warmup_epochs, or set teachers to 0")
            )
        if self.teachers and self.views < 2:
            raise InputError(
                expected(
                    "at least 2 views to choose teachers by how they move",
                    self.views,
                    "Raise views, or set teachers to 0",
                )
            )
        if not 0 < self.p_max <= 1 or self.p_init >= self.p_max:
            raise InputError(
                expected("p_init < p_max <= 1", f"{self.p_init} and {self.p_max}", "Lower p_init or raise p_max")
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ExplainerConfig:
        """Build a configuration from plain values.

        Raises:
            InputError: a field that does not exist.
        """
        check_names(cls, values)
        return cls(**values)

    @classmethod
    def preset(cls, name: str = "partlens", **changes: Any) -> ExplainerConfig:
        """Return a preset with changes.

        Args:
            name: ``partlens`` (ours), ``held`` (ours, parts held after the warm-up), ``candidates`` (ours, from the tap
                alone) or ``paper``.
            changes: fields to set after the preset.

        Example:
            >>> ExplainerConfig.preset("paper", epochs=3).epochs
            3
        """
        if name not in PRESETS:
            raise InputError(expected(f"preset {', '.join(PRESETS)}", name, "Choose one of them"))
        check_names(cls, changes)
        return replace(cls(), **{**PRESETS[name], **changes})
