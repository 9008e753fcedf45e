"""The verbs that join the layers: each a Python function and a sub-command of the same name and defaults."""

from __future__ import annotations

from partlens.pipeline.explainer_run import (
    DEFAULT_SEEDS,
    MOST_BACKGROUND,
    FittedExplainer,
    evaluate,
    fit_explainer,
    load_explainer,
)
from partlens.pipeline.runs import layers, report

__all__ = [
    "DEFAULT_SEEDS",
    "MOST_BACKGROUND",
    "FittedExplainer",
    "evaluate",
    "fit_explainer",
    "layers",
    "load_explainer",
    "report",
]
