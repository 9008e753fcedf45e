from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from partlens.explainer.config import ExplainerConfig


def test_paper_preset_is_the_papers() -> None:
    paper = ExplainerConfig.preset("paper")
    assert paper == ExplainerConfig()
    assert paper.eta == 1.5e5
    assert paper.filter_ratio == pytest.approx(1 / 300)
    assert paper.filter_decay == 1
    assert paper.filter_mix
    assert paper.filter_background
    assert (paper.gradient, paper.peak) == ("approximate", "largest")
    assert (paper.teachers, paper.warmup_epochs, paper.score_scale_nats) == (0, 0, 0)


def test_presets_differ_in_the_named_fields_only() -> None:
    ours, paper = dict(ExplainerConfig.preset("partlens")), dict(ExplainerConfig())
    assert {k for k in ours if ours[k] != paper[k]} == set(ExplainerConfig.PRESETS["partlens"])
    assert len(ours) <= 30


def test_round_trip_and_changes() -> None:
    config = ExplainerConfig.preset("partlens", epochs=3, seed=9)
    assert ExplainerConfig.model_validate_json(config.model_dump_json()) == config
    assert (config.epochs, config.seed) == (3, 9)
    assert config.changed({"epochs": 4}).epochs == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs to be greater than or equal to 1, got 0"),
        ({"eta": float("nan")}, "eta to be .*finite number, got nan"),
        ({"eta": -1.0}, "eta to be greater than or equal to 0, got -1.0"),
        ({"p_init": 1.0}, "p_init to be less than 1, got 1.0"),
        ({"p_init": 0.0}, "p_init to be greater than 0, got 0.0"),
        ({"batch_size": 1}, "batch_size to be greater than or equal to 2"),
        ({"dropout": 1.0}, "dropout to be less than 1, got 1.0"),
        ({"learning_rate": 0.0}, "learning_rate to be greater than 0"),
        ({"teachers": 4}, "a warm-up for teachers to teach in, got 0"),
        ({"teachers": 4, "warmup_epochs": 2, "views": 1}, "at least 2 views to choose teachers"),
        ({"epoch": 3}, "a field of ExplainerConfig, got epoch. Did you mean epochs"),
        ({"mask": False}, "a field of ExplainerConfig, got mask"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplainerConfig.preset("paper", **changes)


@pytest.mark.parametrize("name", ["papers", "held", "candidates"])
def test_unknown_preset(name: str) -> None:
    with pytest.raises(ValueError, match=f"preset partlens or paper, got {name}"):
        ExplainerConfig.preset(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("peak='x'", "peak to be 'largest' or 'centroid', got 'x'"),
        ("epochs=True", "epochs to be a valid integer, got True"),
        ("eta='much'", "eta to be a valid number, got 'much'"),
        ("filter_mix='false'", "filter_mix to be a valid boolean, got 'false'"),
    ],
)
def test_values_of_another_kind_are_refused(given: str, message: str) -> None:
    """In a process of its own: here the tests' own type checks would come first."""
    code = f"from partlens.explainer.config import ExplainerConfig; ExplainerConfig({given})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"InputError: Expected {message}" in ran.stderr
