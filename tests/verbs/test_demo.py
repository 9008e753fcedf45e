from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from partlens.estimate import Estimate
from partlens.object_parts import rules, shares
from partlens.verbs import demo as demonstration
from partlens.verbs.demo import demo


def test_the_demo_makes_everything_and_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few flowers: the held-out ones of the category are too few for some scores, which are then a dash."""
    for name, value in (("_EPOCHS", 1), ("_ROUNDS", 2), ("_HALVINGS", 2)):
        monkeypatch.setattr(demonstration, name, value)
    monkeypatch.setattr(shares, "_ROUNDS", 5)
    monkeypatch.setattr(rules, "_SILHOUETTE_DRAWS", 2)
    monkeypatch.setattr(demonstration, "_INSPECT", {"photos": 12, "measured": 8, "views": 2, "parts_max": 2})
    short = {"epochs": 1, "warmup_epochs": 1, "views": 2}
    monkeypatch.setattr(demonstration, "_EXPLAINER", demonstration._EXPLAINER | short)
    page = demo(out=tmp_path / "demo", flowers=120)
    assert page.exists()
    assert len(list((tmp_path / "demo" / "run" / "explanations").glob("*/explanation.json"))) == 2
    text = page.read_text()
    assert text.index("What each category is known by") < text.index("What each class is read from")
    assert text.index("What each class is read from") < text.index('class="chapter" id="explainer"')
    assert "Single predictions" in text
    weights = tmp_path / "demo" / "run" / "explainer.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    page.unlink()
    assert demo(out=tmp_path / "demo", flowers=120).exists()
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before


def test_too_few_flowers() -> None:
    with pytest.raises(ValueError, match="at least 120 flowers, got 5"):
        demo(flowers=5)


def test_the_summary_shows_a_dash_for_what_is_undefined() -> None:
    def known(value: float) -> Estimate:
        return Estimate(value, (value, value), 9)

    layer = SimpleNamespace(instability=Estimate.undefined(), consistency=Estimate.undefined())
    scores = SimpleNamespace(
        explainer=layer,
        performer=SimpleNamespace(tap=layer),
        nulls={"random": layer},
        p=known(0.25),
        reconstruction=SimpleNamespace(agreement_top1=known(1.0)),
        parts_alone=SimpleNamespace(
            parts=SimpleNamespace(agreement_top1=known(0.5)), other_photo=SimpleNamespace(agreement_top1=known(0.25))
        ),
    )
    text = demonstration._summary(scores)
    assert "a weight of p = 0.25, a price: alone they keep 50% of the decisions (those of another photo 25%)" in text
    assert "instability is – (the layer's own filters: –, random: –)" in text
    assert "both tracks keep 100% of" in text
