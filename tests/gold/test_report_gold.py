"""The pages of small runs, compared word for word with the gold pages beside this file.

``report.html`` is the page of an explainer, ``selection.html`` that of a selection, ``joined.html`` that of a run with
both and an explained image, ``explanation.html`` that image's own page. Pictures and styles are left out of the
comparison. After a change that is meant, look at the page in a browser, then write the gold pages anew and review
their differences::

    python tests/gold/test_report_gold.py
"""

from __future__ import annotations

import json
import re
import runpy
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from partlens.page import collect_page, render_page, write_explanation_page

HERE = Path(__file__).parent
MADE = runpy.run_path(str(HERE.parent / "page" / "made_runs.py"))


def estimate(value, half=0.01, n=63, unit="photos"):
    ends = [None, None] if value is None else [round(value - half, 6), round(value + half, 6)]
    return {"value": value, "interval": ends, "n": n, "unit": unit}


def scores(*values):
    names = ("instability", "consistency", "peak_spread_cells", "border_frac", "filter_correlation", "distinct_parts")
    made = {name: estimate(value) for name, value in zip(names, values, strict=True)}
    made["dead_frac"] = estimate(0.0039, 0.003, 256, "filters")
    return made | {"landmark_shares": {"head": 0.75, "front_legs": 0.25}}


def build(run: Path) -> Path:
    photo = {"key": "images/fox/00004.jpg", "score": 3.2, "peak_px": [104.0, 88.0], "size_px": [224, 224]}
    photos = [photo | {"file": f"gallery/{i}.jpg", "box_px": [60 - 40 * i, 44, 148 - 40 * i, 132]} for i in range(3)]
    photos[1] |= {"region_file": "gallery/region.jpg"}  # what the filter reads; the others have a box
    shown = {"filter": 12, "instability": 0.07, "consistency": 0.71, "landmark": "head", "photos": photos}
    shown |= {"reads_px": 33.4}
    names = ("interpretable", "tap", "top")
    attended = {"key": "images/fox/00004.jpg", "class": "red fox & co", "file": "gallery/0.jpg"}
    pictures = {
        "layers": {"explainer": [shown], "performer": [shown | {"filter": 200}]},
        "occlusion": {
            "occluder_px": 33,
            "stride_px": 18,
            "places": 121,
            "photos": 8,
            "photos_per_filter": 4,
            "reads_px": {
                "explainer": estimate(32.4, 2.1, 12, "filters"),
                "performer": estimate(48.0, 7, 12, "filters"),
            },
            "theoretical_px": {"explainer": [275, 275], "performer": [211, 211]},
        },
        "attention": {
            "layers": dict(zip(names, ("conv-interp-2 at layer3", "layer3", "layer4"), strict=True)),
            "size_px": [224, 224],
            "photos": [attended | {"maps": dict.fromkeys(names, "gallery/1.jpg")}],
            "concentration_frac": {
                name: estimate(value, 0.01, 24 - i) | {"empty": i}
                for i, (name, value) in enumerate(zip(names, (0.052, 0.21, None), strict=True))
            },
            "random_frac": {name: estimate(0.35, 0.005, 24) | {"empty": 0} for name in names},
        },
    }
    epochs = [
        {"epoch": 1, "phase": "warmup", "filter_1": -2.1, "filter_2": -2.8, "correlation": 0.2},
        {"epoch": 2, "phase": "joint", "filter_1": -3.1, "filter_2": -3.9, "correlation": 0.41, "p": 0.12}
        | {"reconstruction": 2.1e6},
        {"epoch": 3, "phase": "joint", "filter_1": -3.3, "filter_2": -4.4, "correlation": 0.4, "p": 0.42}
        | {"reconstruction": 1.6e6, "relative_error": 0.2},
    ]
    contents = {
        "run.json": {
            "schema": "partlens/1",
            "kind": "explainer",
            "created": "2026-11-20T12:00:00+00:00",
            "command": "partlens fit-explainer torchvision:resnet18 animal-part --category 'fox & co' --tap layer3",
            "versions": {"partlens": "0.1.0", "torch": "2.15.0", "python": "3.12.1"},
            "performer": {
                "name": "torchvision:resnet18@IMAGENET1K_V1",
                "weights_sha256": "5c106cde386e87d4",
                "preprocessing": {"size_px": [224, 224], "resize": "squash", "mean": [0.485, 0.456, 0.406]},
                "notes": ["Batch normalisation uses its running statistics."],
            },
            "data": {
                "name": "animal-part",
                "fingerprint": "9b1f0c6bd2f0a7c4",
                "category": "fox & co",
                "train_photos": 223,
                "background_photos": 1500,
                "unreadable": [{"key": "images/fox/<31>.jpg", "reason": "truncated JPEG"}],
            },
            "structure": {
                "tap": "layer3",
                "targets": ["layer4.0", "layer4.1"],
                "side_cells": [14, 14],
                "replaced": None,
            },
            "preset": "partlens",
            "config": {"beta": 4.0, "learning_rate": 0.0001, "filter_mix": False},
            "receptive_field": {"stride_px": [16, 16], "size_px": [211, 211], "start_px": [-98, -98]},
            "status": "finished",
            "seconds": 512.3,
        },
        "history.json": {"epochs": epochs},
        "evaluation.json": {
            "schema": "partlens.evaluation/1",
            "split": "test",
            "photos": 63,
            "landmarks": {"head": 47, "front_legs": 35},
            "explainer": scores(0.077, 0.58, 3.1, 0.04, 0.42, 14.2),
            "performer": {
                "tap": scores(0.154, 0.06, 3.9, 0.22, 0.05, 140.0),
                "top": scores(0.149, 0.10, 2.0, 0.30, 0.09, 33.0),
                "top_layer": "layer4",
            },
            "nulls": {
                "random": scores(0.158, -0.01, 4.03, 0.265, 0.0, 256.0),
                "centre": scores(0.065, 0.0, 0.0, 0.0, None, 1.0),
                "corner": scores(0.112, 0.0, 0.0, 1.0, None, 1.0),
            },
            "p": estimate(0.42, 0.03, 3, "seeds"),
            "p_optimum": estimate(0.31, 0.05, 63),
            "p_rescaling_error": 2e-7,
            "reconstruction": {
                "agreement_top1": estimate(0.83, 0.08),
                "error_increase_points": estimate(1.6, 1.2),
                "performer_error_percent": estimate(0.8, 0.6, 563),
                "explainer_error_percent": estimate(None, n=0),
                "relative_error": {"layer4.0": estimate(0.21), "layer4.1": estimate(0.17)},
            },
            "filters": {
                "explainer": [
                    {"filter": 0, "instability": 0.08, "consistency": 0.6, "landmark": "head", "dead": False},
                    {"filter": 1, "instability": None, "consistency": None, "landmark": None, "dead": True},
                ],
                "performer": [{"filter": 0, "instability": 0.15, "consistency": 0.05, "landmark": "head"}],
            },
            "warnings": ["Only 35 photos show the landmark front_legs."],
        },
        "gallery/gallery.json": pictures,
    }
    for name, content in contents.items():
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    for name in ("0", "1", "region"):  # the third photo is missing on purpose
        (run / "gallery" / f"{name}.jpg").write_bytes(b"\xff\xd8\xff" + name.encode())
    return run


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
    (run / "gallery" / "0.jpg").write_bytes(b"\xff\xd8\xff another picture")
    assert comparable(render_page(collect_page(run))) == before
    text = (run / "evaluation.json").read_text(encoding="utf-8")
    (run / "evaluation.json").write_text(text.replace("0.077", "0.078"), encoding="utf-8")
    assert comparable(render_page(collect_page(run))) != before


if __name__ == "__main__":
    for gold, page in PAGES.items():
        with tempfile.TemporaryDirectory() as folder:
            (HERE / gold).write_text(comparable(page(Path(folder) / "run")), encoding="utf-8")
