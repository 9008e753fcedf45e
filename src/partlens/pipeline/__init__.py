"""The verbs that join the layers: each a Python function and a sub-command of the same name and defaults."""

from __future__ import annotations

from partlens.pipeline.evaluation_run import evaluate
from partlens.pipeline.explainer_run import (
    DEFAULT_SEEDS,
    MOST_BACKGROUND,
    FittedExplainer,
    fit_explainer,
    load_explainer,
)
from partlens.pipeline.explanation_run import explain
from partlens.pipeline.parts_run import parts
from partlens.pipeline.performer_run import read_training, train_performer
from partlens.pipeline.runs import layers, report
from partlens.pipeline.selection_run import (
    DEFAULT_MU,
    OpenedSelection,
    SelectedFeatures,
    load_selection,
    select_features,
)

__all__ = [
    "DEFAULT_MU",
    "DEFAULT_SEEDS",
    "MOST_BACKGROUND",
    "FittedExplainer",
    "OpenedSelection",
    "SelectedFeatures",
    "evaluate",
    "explain",
    "fit_explainer",
    "layers",
    "load_explainer",
    "load_selection",
    "parts",
    "read_training",
    "report",
    "select_features",
    "train_performer",
]
