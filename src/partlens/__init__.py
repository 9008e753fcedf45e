"""partlens: open trained convolutional networks.

Every verb of the command line is a function here, with the same name and defaults::

    import partlens

    partlens.fit_explainer("torchvision:resnet18", "photos/", category="fox", out="runs/fox")
    scores = partlens.evaluate("runs/fox")
    page = partlens.report("runs/fox")

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from partlens.artefacts.backprop import guided_backprop
    from partlens.artefacts.explanation import ExplanationConfig
    from partlens.artefacts.parts import PartsConfig
    from partlens.data.annotations import PartTruth
    from partlens.data.check import check_data
    from partlens.data.flower_sets import flower_set, make_flowers
    from partlens.data.flowers import generated_flowers, render_flower
    from partlens.data.images import ImageSet
    from partlens.demonstration import demo
    from partlens.experiments.reproduction import reproduce
    from partlens.explainer.config import ExplainerConfig
    from partlens.explainer.filter_loss import filter_loss
    from partlens.explainer.network import Explainer
    from partlens.performer.finetune_config import FinetuneConfig
    from partlens.performer.papers import PaperSetting, paper_setting
    from partlens.performer.preprocessing import Preprocessing
    from partlens.performer.zoo import Performer, load_performer
    from partlens.pipeline import (
        FittedExplainer,
        SelectedFeatures,
        evaluate,
        explain,
        fit_explainer,
        layers,
        load_explainer,
        load_selection,
        parts,
        read_training,
        report,
        select_features,
        train_performer,
    )
    from partlens.selection.descriptors import DescriptorConfig
    from partlens.selection.lasso import LassoSolution, mu_lasso
    from partlens.vocabulary import PartlensError

_HOMES = {
    "DescriptorConfig": "partlens.selection.descriptors",
    "Explainer": "partlens.explainer.network",
    "ExplainerConfig": "partlens.explainer.config",
    "ExplanationConfig": "partlens.artefacts.explanation",
    "FinetuneConfig": "partlens.performer.finetune_config",
    "FittedExplainer": "partlens.pipeline",
    "ImageSet": "partlens.data.images",
    "LassoSolution": "partlens.selection.lasso",
    "PaperSetting": "partlens.performer.papers",
    "PartTruth": "partlens.data.annotations",
    "PartlensError": "partlens.vocabulary",
    "PartsConfig": "partlens.artefacts.parts",
    "Performer": "partlens.performer.zoo",
    "Preprocessing": "partlens.performer.preprocessing",
    "SelectedFeatures": "partlens.pipeline",
    "check_data": "partlens.data.check",
    "demo": "partlens.demonstration",
    "evaluate": "partlens.pipeline",
    "explain": "partlens.pipeline",
    "filter_loss": "partlens.explainer.filter_loss",
    "fit_explainer": "partlens.pipeline",
    "flower_set": "partlens.data.flower_sets",
    "generated_flowers": "partlens.data.flowers",
    "guided_backprop": "partlens.artefacts.backprop",
    "layers": "partlens.pipeline",
    "load_explainer": "partlens.pipeline",
    "load_performer": "partlens.performer.zoo",
    "load_selection": "partlens.pipeline",
    "make_flowers": "partlens.data.flower_sets",
    "mu_lasso": "partlens.selection.lasso",
    "paper_setting": "partlens.performer.papers",
    "parts": "partlens.pipeline",
    "read_training": "partlens.pipeline",
    "render_flower": "partlens.data.flowers",
    "report": "partlens.pipeline",
    "reproduce": "partlens.experiments.reproduction",
    "select_features": "partlens.pipeline",
    "train_performer": "partlens.pipeline",
}

__all__ = [
    "DescriptorConfig",
    "Explainer",
    "ExplainerConfig",
    "ExplanationConfig",
    "FinetuneConfig",
    "FittedExplainer",
    "ImageSet",
    "LassoSolution",
    "PaperSetting",
    "PartTruth",
    "PartlensError",
    "PartsConfig",
    "Performer",
    "Preprocessing",
    "SelectedFeatures",
    "__version__",
    "check_data",
    "demo",
    "evaluate",
    "explain",
    "filter_loss",
    "fit_explainer",
    "flower_set",
    "generated_flowers",
    "guided_backprop",
    "layers",
    "load_explainer",
    "load_performer",
    "load_selection",
    "make_flowers",
    "mu_lasso",
    "paper_setting",
    "parts",
    "read_training",
    "render_flower",
    "report",
    "reproduce",
    "select_features",
    "train_performer",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its module."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'partlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted([*globals(), *__all__])
