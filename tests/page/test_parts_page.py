"""The chapter on parts: what it says, what it leaves undefined, and what is refused."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from partlens.errors import RunError
from partlens.page.figures import ScoreRow, removal_chart, scores_chart
from partlens.page.page import collect_page, render_page

HERE = Path(__file__).parent
MADE = runpy.run_path(str(HERE / "made_runs.py"))
EXPLAINER = runpy.run_path(str(HERE / "made_explainer.py"))
Page = runpy.run_path(str(HERE / "page_reader.py"))["Page"]
estimate = MADE["estimate"]


def contributed(name, filters, share):
    return {
        "name": name,
        "filters": filters,
        "shapley": estimate(share),
        "share": estimate(share),
        "gradient_activation_share": estimate(None),
        "integrated_share": estimate(share + 0.02),
        "integrated_null": estimate(share + 0.3, 0.1, 20, "draws"),
        "removal": estimate(0.2),
        "predicted": [share, 0.5],
        "measured": [share + 0.1, 0.4],
    }


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    EXPLAINER["explainer_run"](
        network={"name": "flower-net", "weights_sha256": "aa11"}, structure={"tap": "conv3"}, data={"categories": ("",)}
    ).write(run)
    for k in (1, 2):
        MADE["draw"](run / "parts" / f"{k}.png", 64, 16, k, "strip")
    check = {"correlation": estimate(0.91), "slope": estimate(1.2), "null_correlation": estimate(0.1)}
    content = {
        "schema": "partlens.parts/3",
        "rule": "landmarks",
        "config": {},
        "photos": 63,
        "split": "test",
        "categories": ["fox"],
        "landmarks": {"head": 60},
        "data": "photos",
        "evidence": [
            {
                "category": "fox",
                "photos": 63,
                "null_consistency_p95": 0.045,
                "null_kept_frac": 0.01,
                "null_distance_mean_frac": 0.305,
            }
        ],
        "stability": {
            "adjusted_rand": estimate(0.88),
            "kept": estimate(0.97),
            "null_adjusted_rand": estimate(0.001),
            "null_kept": estimate(0.6),
        },
        "parts": [
            {"id": "head", "name": "face <b>", "filters": [0, 1], "strip": "parts/1.png", "shown": [4, 7]},
            {"id": "front_legs", "name": "front_legs", "filters": []},
            {"id": "other", "name": "other", "filters": [2, 3, 4], "strip": "parts/2.png", "shown": [4]},
        ],
        "filters": [
            {"filter": k, "part": "head", "dead": False, "distance_frac": far, "consistency": r2}
            for k, (far, r2) in enumerate([(0.1, 0.8), (0.2, 0.6), (0.25, 0.1), (0.25, None), (0.25, 0.1)])
        ],
        "unplaced_names": [{"name": "tail", "filters": [9]}],
        "contributions": {
            "method": "exact",
            "performer_score": estimate(9.5),
            "fed_back": estimate(9.4),
            "baseline": estimate(-5.5),
            "interpretable_share": estimate(0.113),
            "ordinary_share": estimate(0.887),
            "standard_error": 0.0,
            "parts": [contributed("face <b>", [0, 1], 0.72), contributed("other", [2, 3, 4], 0.28)],
            "removal_check": dict.fromkeys(
                ("shapley", "integrated_gradients", "gradient_activation", "part_size"), check
            ),
        },
        "command": "partlens parts run",
        "versions": {},
    }
    MADE["write"](run / "parts.json", content)
    return run


def changed(run, change):
    content = json.loads((run / "parts.json").read_text(encoding="utf-8"))
    change(content)
    MADE["write"](run / "parts.json", content)
    return run


def text_of(run):
    return Page(render_page(collect_page(run))).text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_chapter_says_parts_shares_nulls_and_checks(run):
    text = text_of(run)
    for words in (
        "The explainer's filters by the part where they peak: face <b> 2, other 3.",
        "On the performer itself Not in this run. What the parts carry of the network's own score is measured by",
        "The parts add 11.3 % [",
        "of the rise, which follows p, a price. A share counts filters as well as parts: grey is what as many random",
        "nearer than 20 % of the diagonal and predicts the landmark's position with R² above 0.0450",
        "Of filters with random peaks 1 % would get a part.",
        "No filter has the part front_legs.",
        "Names that fit no part found now, kept in parts.json: tail.",
        "gradient × activation (the papers)",
        "0.910",
        "head: filters 4, 7",
        "filters 4, 7; 15 % of the diagonal from the nearest landmark on average (random peaks 30 %), R² 0.700",
    ):
        assert words in text, words
    # A filter whose R² nobody could measure leaves out the R², not the place.
    assert re.search(r"25 % of the diagonal from the nearest landmark on average \(random peaks 30 %\)(?!,)", text)
    page = Page(render_page(collect_page(run)))
    assert {h[1:] for h in page.attributes("href") if h.startswith("#")} <= page.ids
    assert "<b>" not in re.sub(r"<style>.*?</style>", "", render_page(collect_page(run)), flags=re.DOTALL)


def test_parts_without_landmarks_stand_nowhere_in_words(run):
    def grouped(content):
        content["rule"] = "clusters"
        for row in content["filters"]:
            del row["distance_frac"], row["consistency"]
        null = estimate(0.12, 0.01, 10, "draws")
        clusters = {"clusters": 3, "silhouettes": {"3": 0.5, "4": 0.4}, "null_silhouette": null}
        content["evidence"] = [{"category": name, "photos": 30, **clusters} for name in ("cat", "fox")]
        content["categories"] = ["cat", "fox"]

    text = text_of(changed(run, grouped))
    assert "nearest landmark" not in text
    assert "63 photos of the split test, each filter on those of its own category" in text
    assert ": cat 3 groups, silhouette 0.500 (with shuffled photos 0.120); fox 3 groups" in text


def test_parts_that_were_joined_since_have_no_contributions(run):
    changed(run, lambda c: c["parts"][0].update(name="other"))
    text = text_of(run)
    assert "filters by the part where they peak: other 5." in text
    assert "measured on other parts than these: run partlens parts again" in text
    assert "0.910" not in text


def test_a_name_that_was_edited_keeps_its_contributions(run):
    changed(run, lambda c: c["parts"][0].update(name="snout"))
    assert "snout 72.0 %" in text_of(run)


def test_a_run_without_parts_has_no_chapter(run):
    (run / "parts.json").unlink()
    assert "Parts of the explainer" not in text_of(run)


def test_files_that_cannot_be_shown(run):
    changed(run, lambda c: c.update(schema="partlens.parts/9"))
    with pytest.raises(
        RunError, match=r"schema partlens\.parts/3 in .*, got partlens\.parts/9\. .* run partlens parts again"
    ):
        collect_page(run)
    changed(run, lambda c: c.update(schema="partlens.parts/3"))
    (run / "parts" / "1.png").unlink()
    with pytest.raises(RunError, match="Expected a picture .*1.png, got nothing there. Run partlens parts again"):
        collect_page(run)


def test_figures_without_values_are_empty_and_undefined_rows_say_so():
    nan = float("nan")
    undefined = ScoreRow("c", "explainer", nan, nan, nan, "–")
    assert scores_chart("t", "", [undefined]) == ""
    assert removal_chart("t", [("a", [nan], [1.0])]) == ""
    drawn = scores_chart(
        "t", "", [ScoreRow("a & b", "explainer", 60.0, 50.0, 70.0, "60 %", (10.0, 30.0)), undefined], " %"
    )
    assert "a &amp; b" in drawn
    assert "not defined" in drawn
    assert drawn.count("<rect") == 1
    points = removal_chart("t", [(f"p{k}", [0.1 * k], [0.2 * k]) for k in range(8)])
    assert "8 pairs of 8 parts" in points
