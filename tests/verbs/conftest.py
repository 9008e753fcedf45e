"""One fitted run for all tests of the verbs: fitted once, copied for each test that asks for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from partlens.data.flowers import generated_flowers
from partlens.network.performer import Performer
from partlens.verbs.fit_explainer import fit_explainer

SMALL: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 1,
    "views": 3,
    "batch_size": 8,
    "background_batch": 4,
    "precision": "float32",
}


@pytest.fixture(scope="session")
def fitted_once(tmp_path_factory: pytest.TempPathFactory, tiny_once: Performer) -> Path:
    flowers = generated_flowers(80, seed=3, size=48, categories=("petal-red", "petal-blue"))
    out = tmp_path_factory.mktemp("fitted") / "run"
    return fit_explainer(tiny_once, flowers, out=out, category="petal-red", config=SMALL, seeds=2).path


@pytest.fixture
def run(fitted_once: Path, tmp_path: Path) -> Path:
    """A finished run of two seeds on the red flowers, the test's own copy."""
    return Path(shutil.copytree(fitted_once, tmp_path / "run"))


@pytest.fixture
def flower_judge(tiny: Performer) -> Performer:
    """A performer whose outputs are the two categories."""
    tiny.module.classes = nn.Linear(16, 2)
    return Performer(
        tiny.module, "judge", tiny.preprocessing, "judge-weights", "relu2", class_names=("petal-blue", "petal-red")
    )
