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
    from partlens.data.annotations import PartTruth
    from partlens.data.flowers import generated_flowers, render_flower
    from partlens.data.images import ImageSet
    from partlens.demonstration import demo
    from partlens.explainer.config import ExplainerConfig
    from partlens.explainer.filter_loss import filter_loss
    from partlens.explainer.network import Explainer
    from partlens.performer.zoo import Performer, Preprocessing, load_performer
    from partlens.pipeline import FittedExplainer, evaluate, fit_explainer, layers, load_explainer, report
    from partlens.vocabulary import PartlensError

_HOMES = {
    "Explainer": "partlens.explainer.network",
    "ExplainerConfig": "partlens.explainer.config",
    "FittedExplainer": "partlens.pipeline",
    "ImageSet": "partlens.data.images",
    "PartTruth": "partlens.data.annotations",
    "PartlensError": "partlens.vocabulary",
    "Performer": "partlens.performer.zoo",
    "Preprocessing": "partlens.performer.zoo",
    "demo": "partlens.demonstration",
    "evaluate": "partlens.pipeline",
    "filter_loss": "partlens.explainer.filter_loss",
    "fit_explainer": "partlens.pipeline",
    "generated_flowers": "partlens.data.flowers",
    "layers": "partlens.pipeline",
    "load_explainer": "partlens.pipeline",
    "load_performer": "partlens.performer.zoo",
    "render_flower": "partlens.data.flowers",
    "report": "partlens.pipeline",
}

__all__ = [
    "Explainer",
    "ExplainerConfig",
    "FittedExplainer",
    "ImageSet",
    "PartTruth",
    "PartlensError",
    "Performer",
    "Preprocessing",
    "__version__",
    "demo",
    "evaluate",
    "filter_loss",
    "fit_explainer",
    "generated_flowers",
    "layers",
    "load_explainer",
    "load_performer",
    "render_flower",
    "report",
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
