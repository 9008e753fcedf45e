from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from partlens.explainer.config import PRESETS, ExplainerConfig


def test_paper_preset_is_the_papers() -> None:
    paper = ExplainerConfig.preset("paper")
    assert paper == ExplainerConfig()
    assert (paper.beta, paper.tau_cells, paper.eta, paper.reconstruction_weight) == (4.0, 0.5, 1.5e5, 5e4)
    assert paper.filter_ratio == pytest.approx(1 / 300)
    assert paper.filter_decay == 1
    assert paper.filter_mix
    assert paper.gradient == "approximate"


@pytest.mark.parametrize("name", ["partlens", "held", "candidates"])
def test_presets_differ_in_the_documented_fields_only(name: str) -> None:
    ours, paper = ExplainerConfig.preset(name).to_dict(), ExplainerConfig().to_dict()
    assert {k for k in ours if ours[k] != paper[k]} == set(PRESETS[name])


def test_round_trip_and_changes() -> None:
    config = ExplainerConfig.preset("partlens", epochs=3, seed=9)
    assert ExplainerConfig.from_dict(config.to_dict()) == config
    assert (config.epochs, config.seed) == (3, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs positive and finite, got 0"),
        ({"eta": float("nan")}, "eta at least 0 and finite, got nan"),
        ({"p_init": 1.0}, "p_init between 0 and 1, got 1.0"),
        ({"p_init": 0.5, "p_max": 0.4}, "p_init < p_max"),
        ({"batch_size": 1}, "batch_size at least 2"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), got 1.0"),
        ({"peak_power": 0.5}, "peak_power of at least 1, got 0.5"),
        ({"teachers": 4}, "a warm-up for teachers to teach in, got 0"),
        ({"teachers": 4, "warmup_epochs": 2, "views": 1}, "at least 2 views to choose teachers"),
        ({"hidden_filters": 9, "initialisation": "identity"}, "to start from the identity, got 9"),
        ({"epoch": 3}, "a field of ExplainerConfig, got epoch. Did you mean epochs"),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExplainerConfig.preset("paper", **changes)


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="preset partlens, held, candidates, paper, got papers"):
        ExplainerConfig.preset("papers")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("teacher_sources", "teacher_sources to be one of later, tap, both, got 'x'"),
        ("kernel", "kernel to be one of full, box, got 'x'"),
    ],
)
def test_unknown_choices_are_refused(field: str, message: str) -> None:
    """In a process of its own: here the tests' own type checks would come first."""
    code = f"from partlens.explainer.config import ExplainerConfig; ExplainerConfig({field}='x')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert f"InputError: Expected {message}" in ran.stderr
