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
    from partlens.attribution.backprop import guided_backprop
    from partlens.attribution.record import ExplanationConfig
    from partlens.data.annotations import PartTruth
    from partlens.data.check import check_data
    from partlens.data.flowers import generated_flowers, render_flower
    from partlens.data.images import ImageSet
    from partlens.errors import PartlensError
    from partlens.explainer.config import ExplainerConfig
    from partlens.explainer.filter_loss import filter_loss
    from partlens.explainer.network import Explainer
    from partlens.network.performer import Performer
    from partlens.network.preprocessing import Preprocessing
    from partlens.network.zoo import load_performer
    from partlens.object_parts.record import PartsConfig
    from partlens.selection.lasso import LassoSolution, mu_lasso
    from partlens.selection.record import DescriptorConfig
    from partlens.verbs.demo import demo
    from partlens.verbs.evaluate import evaluate
    from partlens.verbs.explain import explain
    from partlens.verbs.fit_explainer import FittedExplainer, fit_explainer, load_explainer
    from partlens.verbs.inspection import inspect
    from partlens.verbs.parts import parts
    from partlens.verbs.runs import layers, report
    from partlens.verbs.select_features import SelectedFeatures, load_selection, select_features

_HOMES = {
    "DescriptorConfig": "partlens.selection.record",
    "Explainer": "partlens.explainer.network",
    "ExplainerConfig": "partlens.explainer.config",
    "ExplanationConfig": "partlens.attribution.record",
    "FittedExplainer": "partlens.verbs.fit_explainer",
    "ImageSet": "partlens.data.images",
    "LassoSolution": "partlens.selection.lasso",
    "PartTruth": "partlens.data.annotations",
    "PartlensError": "partlens.errors",
    "PartsConfig": "partlens.object_parts.record",
    "Performer": "partlens.network.performer",
    "Preprocessing": "partlens.network.preprocessing",
    "SelectedFeatures": "partlens.verbs.select_features",
    "check_data": "partlens.data.check",
    "demo": "partlens.verbs.demo",
    "evaluate": "partlens.verbs.evaluate",
    "explain": "partlens.verbs.explain",
    "filter_loss": "partlens.explainer.filter_loss",
    "fit_explainer": "partlens.verbs.fit_explainer",
    "generated_flowers": "partlens.data.flowers",
    "guided_backprop": "partlens.attribution.backprop",
    "inspect": "partlens.verbs.inspection",
    "layers": "partlens.verbs.runs",
    "load_explainer": "partlens.verbs.fit_explainer",
    "load_performer": "partlens.network.zoo",
    "load_selection": "partlens.verbs.select_features",
    "mu_lasso": "partlens.selection.lasso",
    "parts": "partlens.verbs.parts",
    "render_flower": "partlens.data.flowers",
    "report": "partlens.verbs.runs",
    "select_features": "partlens.verbs.select_features",
}

__all__ = [
    "DescriptorConfig",
    "Explainer",
    "ExplainerConfig",
    "ExplanationConfig",
    "FittedExplainer",
    "ImageSet",
    "LassoSolution",
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
    "generated_flowers",
    "guided_backprop",
    "inspect",
    "layers",
    "load_explainer",
    "load_performer",
    "load_selection",
    "mu_lasso",
    "parts",
    "render_flower",
    "report",
    "select_features",
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
