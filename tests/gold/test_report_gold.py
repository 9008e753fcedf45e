"""The pages of small runs, compared word for word with the gold pages beside this file.

``report.html`` is the page of an explainer, ``selection.html`` that of a selection, ``joined.html`` that of a run with
both and an explained image, ``explanation.html`` that image's own page. Pictures and styles are left out of the
comparison. After a change that is meant, look at the page in a browser, then write the gold pages anew and review
their differences::

    python tests/gold/test_report_gold.py
"""

from __future__ import annotations

import re
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from partlens.evaluation.results import PerformerScores
from partlens.page.explanation_page import write_explanation_page
from partlens.page.page import collect_page, render_page
from partlens.run import Unreadable

HERE = Path(__file__).parent
MADE = runpy.run_path(str(HERE.parent / "page" / "made_runs.py"))
EXPLAINER = SimpleNamespace(**runpy.run_path(str(HERE.parent / "page" / "made_explainer.py")))
estimate = EXPLAINER.estimate


def scores(*values):
    names = ("instability", "consistency", "peak_spread_cells", "border_frac", "filter_correlation", "distinct_parts")
    found = dict(zip(names, values, strict=True)) | {"dead_frac": estimate(0.0039, 0.003, 256, "filters")}
    return EXPLAINER.scores(**found, landmark_shares={"head": 0.75, "front_legs": 0.25})


def build(run: Path) -> Path:
    of_run = EXPLAINER.explainer_run(
        command="partlens fit-explainer torchvision:resnet18 animal-part --category 'fox & co' --tap layer3",
        versions={"partlens": "0.1.0", "torch": "2.15.0", "python": "3.12.1"},
        network={
            "name": "torchvision:resnet18@IMAGENET1K_V1",
            "weights_sha256": "5c106cde386e87d4",
            "preprocessing": {"size_px": [224, 224], "resize": "squash", "mean": [0.485, 0.456, 0.406]},
            "notes": ("Batch normalisation uses its running statistics.",),
        },
        data={
            "fingerprint": "9b1f0c6bd2f0a7c4",
            "categories": ("fox & co",),
            "unreadable": (Unreadable(key="images/fox/<31>.jpg", reason="truncated JPEG"),),
        },
    )
    epochs = (
        {"epoch": 1, "phase": "warmup", "filter_1": -2.1, "filter_2": -2.8, "correlation": 0.2},
        {"epoch": 2, "phase": "joint", "filter_1": -3.1, "filter_2": -3.9, "correlation": 0.41, "p": 0.12}
        | {"reconstruction": 2.1e6},
        {"epoch": 3, "phase": "joint", "filter_1": -3.3, "filter_2": -4.4, "correlation": 0.4, "p": 0.42}
        | {"reconstruction": 1.6e6},
    )
    measured = EXPLAINER.evaluation(
        data={"categories": ("fox & co",)},
        explainer=scores(0.077, 0.58, 3.1, 0.04, 0.42, 14.2),
        performer=PerformerScores(
            tap=scores(0.154, 0.06, 3.9, 0.22, 0.05, 140.0),
            top=scores(0.149, 0.10, 2.0, 0.30, 0.09, 33.0),
            top_layer="layer4",
        ),
        nulls={
            "random": scores(0.158, -0.01, 4.03, 0.265, 0.0, 256.0),
            "centre": scores(0.065, 0.0, 0.0, 0.0, None, 1.0),
            "corner": scores(0.112, 0.0, 0.0, 1.0, None, 1.0),
        },
        p=estimate(0.42, 0.03, 3, "seeds"),
        kept={
            "agreement_top1": estimate(0.83, 0.08),
            "error_increase_points": estimate(1.6, 1.2),
            "performer_error_percent": estimate(0.8, 0.6, 563),
            "explainer_error_percent": estimate(None, n=0),
        },
        warnings=("Only 35 photos show the landmark front_legs.",),
    )
    return EXPLAINER.write_run(run, run=of_run, trained=EXPLAINER.history(epochs=epochs), measured=measured)


def comparable(page: str) -> str:
    """Return the page without its pictures and styles."""
    page = re.sub(r"(data:image/\w+;base64,)[^\"]+", r"\1…", page)
    return re.sub(r"<style>.*?</style>", "<style>…</style>", page, flags=re.DOTALL)


def selection_only(run: Path) -> str:
    MADE["write_selection"](run, classes=2, features=2)
    return render_page(collect_page(run))


def joined(run: Path) -> str:
    build(run)
    MADE["write_selection"](run, classes=2, features=2)
    MADE["write_explanation"](run)
    return render_page(collect_page(run))


def explanation_alone(run: Path) -> str:
    MADE["write_selection"](run, classes=2, features=2)
    return write_explanation_page(MADE["write_explanation"](run)).read_text(encoding="utf-8")


PAGES: dict[str, Callable[[Path], str]] = {
    "report.html": lambda run: render_page(collect_page(build(run))),
    "selection.html": selection_only,
    "joined.html": joined,
    "explanation.html": explanation_alone,
}


@pytest.mark.parametrize("name", list(PAGES))
def test_the_page_equals_the_gold_page(tmp_path, name):
    page = comparable(PAGES[name](tmp_path / "run"))
    assert page.splitlines() == (HERE / name).read_text(encoding="utf-8").splitlines()


def test_the_comparison_sees_words_but_not_pictures(tmp_path):
    run = build(tmp_path / "run")
    before = comparable(render_page(collect_page(run)))
    Image.new("RGB", (8, 6), (255, 255, 255)).save(run / "gallery" / "0.jpg")
    assert comparable(render_page(collect_page(run))) == before
    text = (run / "evaluation.json").read_text(encoding="utf-8")
    (run / "evaluation.json").write_text(text.replace("0.077", "0.078"), encoding="utf-8")
    assert comparable(render_page(collect_page(run))) != before


if __name__ == "__main__":
    for gold, page in PAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            (HERE / gold).write_text(comparable(page(Path(folder) / "run")), encoding="utf-8")
