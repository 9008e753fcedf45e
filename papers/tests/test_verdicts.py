"""The study of verdicts, one seed of each world with fewer pictures: what is planted is named, and only that."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

STUDY = runpy.run_path(str(Path(__file__).parents[1] / "studies" / "verdicts.py"))


@pytest.mark.parametrize("name", ["watermark", "texture"])
def test_what_is_planted_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = STUDY["WORLDS"][name]
    monkeypatch.setitem(STUDY["verdicts"].__globals__, "CONFIG", {"photos": 40, "measured": 24, "views": 3})
    monkeypatch.setitem(STUDY["verdicts"].__globals__, "PICTURES", 320)
    rows = STUDY["verdicts"](world, 0)
    assert all(row["right"] for row in rows), rows
