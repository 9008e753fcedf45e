"""The page: what it says of complete, partial and hostile runs, and that it stands alone."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import runpy
from importlib.resources import files
from pathlib import Path

import pytest

from partlens.errors import InputError, RunError, StorageError
from partlens.page import collect_page, render_page, write_report
from partlens.page.explainer_data import ExplainerData
from partlens.page.notation import number, short_name
from partlens.page.wording import headline, verdicts

HOSTILE = "<script>alert(1)</script>\"'&"
JPEG = b"\xff\xd8\xff\xe0 not really a picture"
Page = runpy.run_path(str(Path(__file__).with_name("page_reader.py")))["Page"]


def estimate(value, half=0.01, n=63, unit="photos"):
    interval = [None, None] if value is None or half is None else [value - half, value + half]
    return {"value": value, "interval": interval, "n": n, "unit": unit}


def scores(instability=0.08, consistency=0.6, **changes):
    values = {
        "instability": instability,
        "consistency": consistency,
        "peak_spread_cells": 3.0,
        "border_frac": 0.05,
        "dead_frac": 0.01,
        "filter_correlation": 0.4,
        "distinct_parts": 12.0,
    } | changes
    return {k: estimate(v) for k, v in values.items()} | {"landmark_shares": {"head": 0.8, "front_legs": 0.2}}


def manifest():
    return {
        "schema": "partlens/1",
        "kind": "explainer",
        "created": "2026-11-20T12:00:00+00:00",
        "command": "partlens fit-explainer torchvision:resnet18 photos --category fox",
        "versions": {"partlens": "0.1.0", "torch": "2.15.0"},
        "performer": {
            "name": "torchvision:resnet18@weights/resnet18.safetensors",
            "weights_sha256": "5c106cde",
            "preprocessing": {"mean": [0.485, 0.456, 0.406]},
            "notes": ["a note"],
        },
        "data": {
            "name": "animal-part",
            "fingerprint": "9b1f0c6b",
            "category": "fox",
            "train_photos": 223,
            "background_photos": 1500,
            "unreadable": [{"key": "images/fox/00031.jpg", "reason": "truncated"}],
        },
        "structure": {"tap": "layer3", "targets": ["layer4.0", "layer4.1"], "replaced": None},
        "preset": "partlens",
        "config": {"beta": 4.0, "views": 10},
        "receptive_field": {"stride_px": [16, 16]},
        "status": "finished",
        "seconds": 512.3,
    }


def evaluation():
    return {
        "schema": "partlens.evaluation/1",
        "split": "test",
        "photos": 63,
        "landmarks": {"head": 47, "front_legs": 35},
        "explainer": scores(),
        "performer": {"tap": scores(0.154, 0.06), "top": scores(0.149, 0.1), "top_layer": "layer4"},
        "nulls": {"random": scores(0.158, -0.01), "centre": scores(0.055, 0.0), "corner": scores(0.13, 0.0)},
        "p": estimate(0.42, 0.03),
        "reconstruction": {
            "agreement_top1": estimate(0.83, 0.05),
            "error_increase_points": estimate(1.6, 1.0),
            "performer_error_percent": estimate(0.8, 0.5),
            "explainer_error_percent": estimate(2.4, 1.0),
            "relative_error": {"layer4.0": estimate(0.21), "layer4.1": estimate(0.17)},
        },
        "filters": {
            "explainer": [
                {"filter": 0, "instability": 0.08, "consistency": 0.6, "landmark": "head", "dead": False},
                {"filter": 1, "instability": None, "consistency": None, "landmark": None, "dead": True},
            ],
            "performer": [{"filter": 0, "instability": 0.15, "consistency": 0.05, "landmark": "head", "dead": False}],
        },
        "warnings": ["few photos show legs"],
    }


def history():
    joint = {"phase": "joint", "seconds": 9.0, "filter_1": -3.0, "filter_2": -4.0, "correlation": 0.4, "p": 0.4217}
    return {
        "epochs": [
            {"epoch": 1, "phase": "warmup", "seconds": 5.0, "filter_1": -2.0, "filter_2": -2.5, "correlation": 0.2},
            {"epoch": 2, "reconstruction": 2.1e6, "share": 3e5, **joint},
            {"epoch": 3, "reconstruction": 1.9e6, "share": 3e5, "relative_error": 0.2, **joint},
        ]
    }


def gallery():
    def one(kind, index, size):
        photo = {"key": "images/fox/1.jpg", "score": 3.2, "peak_px": [104.0, 88.0], "box_px": [60, 44, 148, 132]}
        shots = [photo | {"file": f"gallery/{kind}-{index}-{i}.jpg", "size_px": [224, 224]} for i in range(size)]
        return {"filter": index, "instability": 0.07, "consistency": 0.71, "landmark": "head", "photos": shots}

    return {"layers": {"explainer": [one("explainer", 12, 6), one("explainer", 13, 6)], "performer": [one("p", 7, 6)]}}


def write_run(folder: Path, run=None, measured=None, trained=None, pictures=None, *, bare=False) -> Path:
    """Write a fake run; ``bare`` leaves every optional file out, so that it holds only what is handed over."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "run.json": run or manifest(),
        "evaluation.json": measured or (None if bare else evaluation()),
        "history.json": trained or (None if bare else history()),
        "gallery/gallery.json": pictures or (None if bare else gallery()),
    }
    for name, content in contents.items():
        if content is not None:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content), encoding="utf-8")
    listed = (contents["gallery/gallery.json"] or {"layers": {}})["layers"]
    for photo in (p for layer in listed.values() for f in layer for p in f["photos"]):
        if photo["file"].startswith("gallery/"):
            (folder / photo["file"]).write_bytes(JPEG)
    return folder


def page_of(run: Path):
    return Page(render_page(collect_page(run)))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def everything_hostile(value):
    """Replace every free text of a JSON value, keys of free mappings too, by markup."""
    kept = {"schema", "kind", "status", "tap", "phase", "split", "unit", "file"}
    if isinstance(value, dict):
        return {k: v if k in kept else everything_hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [everything_hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_the_page_is_one_closed_document(run):
    page = page_of(run)
    assert [t for t, _ in page.tags].count("h1") == 1
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    assert page.tags[0] == ("html", {"lang": "en"})


@pytest.mark.parametrize("bare", [False, True])
def test_the_page_loads_nothing(tmp_path, bare):
    text = render_page(collect_page(write_run(tmp_path / "run", bare=bare)))
    page = Page(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & {t for t, _ in page.tags}
    assert all(s.startswith("data:image/") for s in page.attributes("src"))
    assert all(h.startswith(("#", "data:image/")) for h in page.attributes("href"))
    assert any("default-src 'none'" in c for c in page.attributes("content"))


@pytest.mark.parametrize("bare", [False, True])
def test_every_link_and_label_resolves(tmp_path, bare):
    page = page_of(write_run(tmp_path / "run", bare=bare))
    links = {h[1:] for h in page.attributes("href") if h.startswith("#")}
    assert len(links) >= 8
    assert links <= page.ids
    assert {i for label in page.attributes("aria-labelledby") for i in label.split()} <= page.ids


def test_every_figure_has_words(run):
    page = page_of(run)
    figures = [a for t, a in page.tags if t == "svg"]
    assert len(figures) >= 18 + 4
    assert all(a.get("role") == "img" and a.get("aria-label") for a in figures)


def test_hostile_texts_stay_texts(tmp_path):
    measured = everything_hostile(evaluation())
    measured["landmarks"] = {HOSTILE: 4}
    measured["explainer"]["landmark_shares"] = {HOSTILE: 1.0}
    measured["reconstruction"]["relative_error"] = {HOSTILE: estimate(0.1)}
    info = everything_hostile(manifest())
    info["structure"]["tap"] = info["status"] = HOSTILE
    info["versions"] = info["config"] = {HOSTILE: HOSTILE}
    trained = history()
    trained["epochs"][0]["phase"] = HOSTILE
    trained["epochs"][0][HOSTILE] = 1.0
    run = write_run(tmp_path / "run", info, measured, trained, everything_hostile(gallery()))
    text = render_page(collect_page(run))
    page = Page(text)
    assert "<script" not in text
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 25
    assert "alert(1)" in " ".join(page.attributes("aria-label"))


def test_the_same_run_gives_the_same_page(run, tmp_path):
    copied = write_run(tmp_path / "elsewhere")
    assert render_page(collect_page(run)) == render_page(collect_page(copied))
    assert str(tmp_path) not in render_page(collect_page(run))


def test_what_was_explained_stands_on_the_page(run):
    text = page_of(run).text
    for words in (
        "torchvision:resnet18@weights/resnet18.safetensors",
        "layer3, decoded to layer4.0, layer4.1",
        "223 photos of fox and 1,500 others",
        "2026-11-20 12:00 UTC",
        "8 min 32 s",
        "5c106cde",
        "9b1f0c6b",
        "partlens fit-explainer torchvision:resnet18 photos --category fox",
        "a note",
        "few photos show legs",
        "1 file could not be read and was left out",
        "truncated",
        "head (47), front legs (35)",
    ):
        assert words in text, words


def test_the_score_table_holds_every_number(run):
    html = render_page(collect_page(run))
    row = re.search(r'<tr role="row" class="score-instability">(.*?)</tr>', html, re.DOTALL)[1]
    cells = re.findall(r'data-label="([^"]+)"><span><span class="value">([^<]+)</span>', row)
    assert cells == [
        ("explainer", "0.0800"),
        ("performer, layer3", "0.154"),
        ("performer, layer4", "0.149"),
        ("null: random cell", "0.158"),
        ("null: centre", "0.0550"),
        ("null: corner", "0.130"),
    ]
    assert "[0.0700, 0.0900]" in row
    assert "n = 63 photos" in row
    assert len(re.findall(r'<tr role="row" class="score-', html)) == 7
    assert html.index("score-consistency") > html.index("score-instability")


def test_instability_on_all_photos_stands_below_the_published_one(tmp_path):
    measured = evaluation()
    measured["explainer"]["instability_all"] = estimate(0.123)
    html = render_page(collect_page(write_run(tmp_path / "run", measured=measured)))
    assert len(re.findall(r'<tr role="row" class="score-', html)) == 8
    row = re.search(r'class="score-instability_all">(.*?)</tr>', html, re.DOTALL)[1]
    assert "on all photos" in row
    assert "0.123" in row
    assert html.index("score-instability_all") < html.index("score-consistency")


def test_counts_that_differ_stand_in_their_cells(tmp_path):
    measured = evaluation()
    measured["nulls"]["random"]["instability"]["n"] = 40
    html = render_page(collect_page(write_run(tmp_path / "run", measured=measured)))
    row = re.search(r'class="score-instability">(.*?)</tr>', html, re.DOTALL)[1]
    assert row.count("n = 63 photos") == 5
    assert row.count("n = 40 photos") == 1


def test_undefined_numbers_are_dashes_that_say_so(tmp_path):
    measured = evaluation()
    for group in (measured["explainer"], measured["performer"]["tap"], *measured["nulls"].values()):
        group["instability"] = estimate(None, n=0)
        group["consistency"] = None
        group["landmark_shares"] = {}
    measured["performer"] = {"tap": measured["performer"]["tap"], "top": None}
    measured["landmarks"] = {}
    measured["filters"] = None
    html = render_page(collect_page(write_run(tmp_path / "run", measured=measured)))
    assert html.count('<span class="undefined" title="not defined">–</span>') == 6 + 6 + 5
    text = Page(html).text
    assert "No chart." in text
    assert "The photos have no landmarks" in text
    assert "performer, top layer" in text
    assert "nan" not in text.lower().split()


def test_instability_is_never_drawn_alone(tmp_path):
    whole = render_page(collect_page(write_run(tmp_path / "whole")))
    assert ">Location instability: lower is better<" in whole
    assert ">Consistency: higher is better<" in whole
    measured = evaluation()
    for group in (measured["explainer"], *measured["performer"].values(), *measured["nulls"].values()):
        if isinstance(group, dict):
            group["consistency"] = None
    part = render_page(collect_page(write_run(tmp_path / "part", measured=measured)))
    assert ">Location instability: lower is better<" not in part


def test_a_bare_run_says_what_is_not_measured(tmp_path):
    data = collect_page(write_run(tmp_path / "run", bare=True))
    explainer = data.explainer
    assert (explainer.evaluation, explainer.gallery, explainer.history) == (None, None, ())
    assert (data.selection, data.explanations.shown) == (None, ())
    text = Page(render_page(data)).text
    assert text.count("Not measured.") == 6
    assert text.count("partlens evaluate RUN DATA") == 6
    assert "Not recorded." in text
    assert "Nothing has been measured on held-out photos yet" in text


def test_an_unfinished_fit_is_announced(tmp_path):
    page = page_of(write_run(tmp_path / "run", manifest() | {"status": "interrupted"}, bare=True))
    assert "Unfinished. The fit's status is “interrupted”" in page.text
    assert "Unfinished." not in page_of(write_run(tmp_path / "done", bare=True)).text


def test_pictures_are_embedded(run):
    page = page_of(run)
    uri = "data:image/jpeg;base64," + base64.b64encode(JPEG).decode()
    assert page.attributes("href").count(uri) == 18
    assert "Filter 12" in page.text
    assert "instability 0.0700, consistency 0.710; best on head" in page.text


@pytest.mark.parametrize("name", ["../secret.jpg", "gallery/none.jpg", "gallery/notes.txt", "", "gallery"])
def test_only_pictures_of_the_run_are_embedded(tmp_path, name):
    pictures = gallery()
    pictures["layers"]["explainer"][0]["photos"][0]["file"] = name
    run = write_run(tmp_path / "run", pictures=pictures)
    (tmp_path / "secret.jpg").write_bytes(JPEG)
    (run / "gallery" / "notes.txt").write_text("no picture")
    (run / "gallery" / "none.jpg").unlink(missing_ok=True)
    data = collect_page(run)
    found = [p.uri is None for p in data.explainer.gallery.explainer[0].pictures]
    assert found == [True] + [False] * 5
    assert "picture missing" in Page(render_page(data)).text


def test_values_of_the_wrong_kind_count_as_missing(tmp_path):
    measured = evaluation()
    measured["p"] = "much"
    measured["explainer"]["instability"] = {"value": True, "interval": [1, 2, 3], "n": "many"}
    measured["nulls"] = []
    measured["reconstruction"] = None
    measured["warnings"] = "none"
    pictures = gallery()
    pictures["layers"]["explainer"][0]["photos"][0] |= {"peak_px": [1], "box_px": "x", "size_px": [0, 0]}
    info = manifest() | {"versions": None, "config": [], "seconds": "long", "receptive_field": None}
    page = collect_page(write_run(tmp_path / "run", info, measured, {"epochs": [None, {"p": "x"}]}, pictures))
    data = page.explainer
    assert math.isnan(data.evaluation.p.value)
    assert math.isnan(data.evaluation.subject("explainer").scores["instability"].value)
    assert data.evaluation.subject("explainer").scores["instability"].has_interval is False
    assert data.evaluation.warnings == ()
    assert data.gallery.explainer[0].pictures[0].peak_px is None
    assert [e.number for e in data.history] == [1, 2]
    Page(render_page(page))


# --- words ------------------------------------------------------------------------------------------------------------


def data_with(tmp_path, *, category="fox", **changes) -> ExplainerData:
    info = manifest()
    info["data"]["category"] = category
    return collect_page(write_run(tmp_path / "run", info, evaluation() | changes)).explainer


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_headline(tmp_path):
    assert plain(headline(data_with(tmp_path))) == (
        "At layer3, 42 % [39, 45] of the information of resnet18 on 63 held-out photos of fox is carried by part "
        "filters; fed back, the reconstruction keeps 83 % of its top-1 answers."
    )


@pytest.mark.parametrize(
    ("changes", "said", "not_said"),
    [
        ({"category": ""}, "63 held-out photos from animal-part", "of fox"),
        ({"split": "train"}, "63 training photos of fox", "held-out"),
        ({"split": "all"}, "on 63 photos of fox", "held-out"),
        ({"photos": 1}, "1 held-out photo of fox", "photos"),
        ({"p": estimate(0.42, None)}, "42 % of the information", "["),
        ({"p": estimate(0.42, 0.03, 3, "seeds")}, "42 % [39, 45 over 3 seeds]", "[39, 45]"),
        ({"p": None}, "the share carried by part filters was not measured", "is carried"),
        ({"reconstruction": None}, "keeps of the performer's answers was not measured", "fed back, the"),
        ({"reconstruction": {"agreement_top1": estimate(0.38)}}, "too little for the share to describe", "83"),
    ],
)
def test_the_headline_claims_only_what_was_measured(tmp_path, changes, said, not_said):
    text = plain(headline(data_with(tmp_path, **changes)))
    assert said in text
    assert not_said not in text


def test_the_headline_before_evaluation(tmp_path):
    trained = plain(headline(collect_page(write_run(tmp_path / "run", trained=history(), bare=True)).explainer))
    assert trained == (
        "At layer3, an explainer of resnet18 was learned on 223 photos of fox and came to carry 42 % of the layer's "
        "information by part filters. Nothing has been measured on held-out photos yet."
    )
    bare = headline(collect_page(write_run(tmp_path / "bare", bare=True)).explainer)
    assert "%" not in bare


def states(tmp_path, **changes):
    return {v.key: (v.state, v.title, plain(v.words)) for v in verdicts(data_with(tmp_path, **changes))}


def test_a_sound_explainer_is_judged_by_consistency(tmp_path):
    found = states(tmp_path)
    state, _, words = found.pop("instability")
    assert state == "caution"
    assert "better than random cells (0.158) and a peak fixed in the corner (0.130)" in words
    assert "worse than a peak fixed at the centre (0.0550)" in words
    assert {k: v[0] for k, v in found.items()} == dict.fromkeys(found, "good")
    assert len(found) == 6


def test_beating_every_null_is_said(tmp_path):
    state, title, _ = states(tmp_path, explainer=scores(instability=0.02))["instability"]
    assert (state, title) == ("good", "Beats every null")


@pytest.mark.parametrize(
    ("low", "high", "state", "said"),
    [
        (-0.009, -0.001, "good", "better than"),
        (-0.009, 0.001, "caution", "level with a peak fixed at the centre"),
        (0.001, 0.009, "caution", "worse than a peak fixed at the centre"),
    ],
)
def test_the_same_photos_decide_against_a_null(tmp_path, low, high, state, said):
    """Whatever the two intervals say, the interval of the difference is what counts."""
    gap = {"value": (low + high) / 2, "interval": [low, high], "n": 60, "unit": "photos"}
    changes = {"explainer": scores(instability=0.056), "instability_minus_null": {"centre": gap}}
    found, _, words = states(tmp_path, **changes)["instability"]
    assert found == state
    assert said in words
    assert "(0.0550, difference on the same photos" in words


@pytest.mark.parametrize(
    ("change", "key", "state"),
    [
        ({"filter_correlation": 0.91}, "filter_correlation", "warning"),
        ({"filter_correlation": 0.90}, "filter_correlation", "caution"),
        ({"filter_correlation": 0.50}, "filter_correlation", "good"),
        ({"filter_correlation": None}, "filter_correlation", "unknown"),
        ({"dead_frac": 0.05}, "dead_frac", "warning"),
        ({"dead_frac": 0.049}, "dead_frac", "good"),
        ({"peak_spread_cells": 0.99}, "peak_spread_cells", "warning"),
        ({"peak_spread_cells": 1.0}, "peak_spread_cells", "good"),
        ({"border_frac": 0.51}, "border_frac", "warning"),
        ({"border_frac": 0.5}, "border_frac", "good"),
        ({"consistency": 0.0}, "consistency", "warning"),
        ({"consistency": None}, "consistency", "unknown"),
        ({"instability": 0.155}, "instability", "warning"),
        ({"instability": 0.2}, "instability", "warning"),
        ({"instability": None}, "instability", "unknown"),
    ],
)
def test_each_limit(tmp_path, change, key, state):
    assert states(tmp_path, explainer=scores(**change))[key][0] == state


@pytest.mark.parametrize(("agreement", "state"), [(0.49, "warning"), (0.5, "good"), (None, "unknown")])
def test_the_limit_on_agreement(tmp_path, agreement, state):
    found = states(tmp_path, reconstruction={"agreement_top1": estimate(agreement)})
    assert found["agreement"][0] == state


@pytest.mark.parametrize("collapse", [{"filter_correlation": 0.95}, {"peak_spread_cells": 0.2}, {"border_frac": 0.8}])
def test_collapse_takes_the_praise_from_instability(tmp_path, collapse):
    state, title, words = states(tmp_path, explainer=scores(instability=0.02, **collapse))["instability"]
    assert (state, title) == ("warning", "Stable by collapse")
    assert "collapsed" in words


def test_without_nulls_instability_is_not_judged(tmp_path):
    state, _, words = states(tmp_path, nulls={})["instability"]
    assert state == "unknown"
    assert "nulls were not measured" in words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.08, "0.0800"),
        (99.96, "100"),
        (256.0, "256"),
        (1234.0, "1230"),
        (99_949.0, "99900"),
        (99_999.0, "1.00 × 10⁵"),
        (2.1e6, "2.10 × 10⁶"),
        (-1.5e-5, "−1.50 × 10⁻⁵"),
        (-0.5, "−0.500"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("torchvision:vgg16@IMAGENET1K_V1", "vgg16"),
        ("my.nets:build", "build"),
        ("TinyNet", "TinyNet"),
        ("odd@C:/x.pt", "odd"),
        ("net:", "net:"),
    ],
)
def test_short_names(name, short):
    assert short_name(name) == short


# --- errors and files -------------------------------------------------------------------------------------------------


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match=r"^Expected the folder of a run, got .*nowhere\. Give the folder .*\.$"):
        collect_page(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"^Expected a file run\.json or selection\.json in .*, got none there\."):
        collect_page(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "selection"}, r'Expected kind "explainer" in .*run\.json, got selection'),
        ({"schema": "partlens/9"}, r'Expected schema "partlens/1" in .*, got partlens/9'),
        ({"performer": {}}, r"Expected the performer's name in .*, got None"),
        ({"structure": {"tap": 3}}, r"Expected the explained layer \(tap\) in .*, got 3"),
    ],
)
def test_runs_that_cannot_be_shown(tmp_path, change, message):
    with pytest.raises(RunError, match=message):
        collect_page(write_run(tmp_path / "run", manifest() | change))


@pytest.mark.parametrize("name", ["run.json", "history.json", "evaluation.json", "gallery/gallery.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=f"JSON in .*{name}"):
        collect_page(run)


def test_an_evaluation_of_another_version_is_refused(tmp_path):
    measured = evaluation() | {"schema": "partlens.evaluation/9"}
    with pytest.raises(RunError, match="Run partlens evaluate again"):
        collect_page(write_run(tmp_path / "run", measured=measured))


def test_the_page_is_written_beside_the_run_or_where_one_says(run, tmp_path):
    assert write_report(run) == run / "report.html"
    other = write_report(run, tmp_path / "deep" / "fox.html")
    assert other.read_text(encoding="utf-8") == (run / "report.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="Expected a file name for the page"):
        write_report(run, tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, monkeypatch):
    target = write_report(run)
    target.write_text("old", encoding="utf-8")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="No space left"):
        write_report(run)
    assert target.read_bytes() == b"old"
    assert not list(run.glob("*.tmp"))


# --- looks ------------------------------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_text_is_legible_in_light_and_in_dark():
    css = (files("partlens.page") / "templates" / "page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", b)) for b in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )
    assert light["paper"] != dark["paper"]
    for theme in (light, dark):
        for ink in ("ink", "soft", "explainer", "performer", "good", "caution", "warning"):
            for ground in ("paper", "raised"):
                bright, dim = sorted((luminance(theme[ink]), luminance(theme[ground])), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, (ink, ground)


def test_layers_read_alike_stand_beside_each_other(tmp_path):
    """Centroids move less than largest cells: the page compares each layer with what was read as it was."""
    assert "Read alike" not in page_of(write_run(tmp_path / "largest")).text
    same = {
        "largest": {"explainer": scores(0.0912, 0.51)},
        "centroid": {"tap": scores(0.1223, 0.07), "top": scores(0.1334, 0.11)},
    }
    run = write_run(tmp_path / "centroid", measured=evaluation() | {"same_peak": same})
    rows = [(s.label, s.role, s.scores["instability"].value) for s in collect_page(run).explainer.evaluation.read_alike]
    assert rows == [
        ("explainer", "centroid", 0.08),
        ("performer, layer3", "centroid", 0.1223),
        ("performer, layer4", "centroid", 0.1334),
        ("explainer", "largest cell", 0.0912),
        ("performer, layer3", "largest cell", 0.154),
        ("performer, layer4", "largest cell", 0.149),
    ]
    text = page_of(run).text
    assert "Read alike" in text
    assert "0.0912" in text
