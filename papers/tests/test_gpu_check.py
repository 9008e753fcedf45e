"""The check of a GPU checks itself where there is none."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

CHECK = runpy.run_path(str(Path(__file__).parents[1] / "gpu_check.py"))


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_runs_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert CHECK["main"](["--device", "cpu"]) == 0
    said, _, text = capsys.readouterr().out.partition("\n")
    assert said.startswith("No GPU is at hand")
    found = json.loads(text)
    assert found["compared"]["pass"]["error"] == 0
    assert {"select-features", "fit-explainer", "evaluate", "parts", "explain"} < set(found["compared"])
    assert found["photos_per_second"] > 0
    assert 0 < found["epoch_share_of_peak"] < 1
    assert found["missed"] == []


def test_what_is_too_far_apart_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CHECK["apart"](np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(0.1)
    scope = CHECK["checked"].__globals__
    monkeypatch.setitem(
        scope, "compared", lambda *_, **__: {"pass": {"error": 0.1, "faster": 1.0}, "fit": {"apart": 0.01}}
    )
    monkeypatch.setitem(scope, "photos_per_second", lambda *_: 1.0)
    monkeypatch.setitem(scope, "share_of_peak", lambda *_, **__: 0.3)
    assert CHECK["checked"]("cpu", tiny=True)[1] == ["pass: error 0.1"]
