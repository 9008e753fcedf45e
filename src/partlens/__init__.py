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
    name: f"partlens.{home}"
    for home, names in {
        "attribution.backprop": "guided_backprop",
        "attribution.record": "ExplanationConfig",
        "data.annotations": "PartTruth",
        "data.check": "check_data",
        "data.flowers": "generated_flowers render_flower",
        "data.images": "ImageSet",
        "errors": "PartlensError",
        "explainer.config": "ExplainerConfig",
        "explainer.filter_loss": "filter_loss",
        "explainer.network": "Explainer",
        "network.performer": "Performer",
        "network.preprocessing": "Preprocessing",
        "network.zoo": "load_performer",
        "object_parts.record": "PartsConfig",
        "selection.lasso": "LassoSolution mu_lasso",
        "selection.record": "DescriptorConfig",
        "verbs.demo": "demo",
        "verbs.evaluate": "evaluate",
        "verbs.explain": "explain",
        "verbs.fit_explainer": "FittedExplainer fit_explainer load_explainer",
        "verbs.inspection": "inspect",
        "verbs.parts": "parts",
        "verbs.runs": "layers report",
        "verbs.select_features": "SelectedFeatures load_selection select_features",
    }.items()
    for name in names.split()
}

# fmt: off
__all__ = [
    "DescriptorConfig", "Explainer", "ExplainerConfig", "ExplanationConfig", "FittedExplainer", "ImageSet",
    "LassoSolution", "PartTruth", "PartlensError", "PartsConfig", "Performer", "Preprocessing", "SelectedFeatures",
    "__version__", "check_data", "demo", "evaluate", "explain", "filter_loss", "fit_explainer", "generated_flowers",
    "guided_backprop", "inspect", "layers", "load_explainer", "load_performer", "load_selection", "mu_lasso", "parts",
    "render_flower", "report", "select_features",
]
# fmt: on


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
