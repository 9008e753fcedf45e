"""The page: what it says of complete, partial and hostile runs, and that it stands alone."""

from __future__ import annotations

import itertools
import json
import math
import re
import runpy
from html import unescape
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from partlens.errors import InputError, RunError, StorageError
from partlens.estimate import Estimate
from partlens.page.explainer import ExplainerData, judge
from partlens.page.notation import number, short_name
from partlens.page.page import collect_page, render_page, write_report
from partlens.page.views import Pictures

HOSTILE = "<script>alert(1)</script>\"'&"
HERE = Path(__file__).parent
Page = runpy.run_path(str(HERE / "page_reader.py"))["Page"]
MADE = SimpleNamespace(**runpy.run_path(str(HERE / "made_explainer.py")))
estimate, evaluation, scores, write_run = MADE.estimate, MADE.evaluation, MADE.scores, MADE.write_run


def page_of(run: Path):
    return Page(render_page(collect_page(run)))


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def everything_hostile(path: Path) -> None:
    """Replace every free text of a record by markup, keys of free mappings too."""
    kept = {
        "schema",
        "status",
        "split",
        "unit",
        "file",
        "region_file",
        "map_file",
        "maps",
        "regions",
        "errors_by",
        "kind",
    }
    kept |= {"fields", "preset", "config", "side_cells"}
    free = {"landmarks", "landmark_shares", "variance_kept", "versions", "preprocessing"}

    def hostile(value: Any, name: str = "") -> Any:
        if name in kept:
            return value
        if isinstance(value, dict):
            return {HOSTILE if name in free else k: hostile(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [hostile(v) for v in value]
        return HOSTILE if isinstance(value, str) else value

    path.write_text(json.dumps(hostile(json.loads(path.read_text()))))


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
    epochs = MADE.history().epochs
    trained = MADE.history(epochs=({**epochs[0], "phase": HOSTILE, HOSTILE: 1.0}, *epochs[1:]))
    run = write_run(tmp_path / "run", trained=trained)
    for name in ("run.json", "evaluation.json", "gallery/gallery.json"):
        everything_hostile(run / name)
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


def test_what_was_explained_is_on_the_page(run):
    text = page_of(run).text
    for words in (
        "torchvision:resnet18@weights/resnet18.safetensors",
        "layer3, decoded to layer4.0, layer4.1",
        "223 photos of fox and 1,500 others",
        "2026-11-20 12:00 UTC",
        "9 min",
        "5c106cde",
        "9b1f0c6b",
        "partlens fit-explainer torchvision:resnet18 photos --category fox",
        "a note",
        "few photos show legs",
        "1 file could not be read and was skipped",
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
    assert len(re.findall(r'<tr role="row" class="score-', html)) == 9
    assert html.index("score-consistency") > html.index("score-instability")


def test_instability_on_all_photos_is_below_the_published_one(run):
    html = render_page(collect_page(run))
    row = re.search(r'class="score-instability_all">(.*?)</tr>', html, re.DOTALL)[1]
    assert "on all photos" in row
    assert "0.0900" in row
    assert html.index("score-instability") < html.index("score-instability_all") < html.index("score-consistency")


def test_counts_that_differ_are_in_their_cells(tmp_path):
    nulls = evaluation().nulls
    nulls["random"] = scores(instability=estimate(0.158, n=40))
    html = render_page(collect_page(write_run(tmp_path / "run", measured=evaluation(nulls=nulls))))
    row = re.search(r'class="score-instability">(.*?)</tr>', html, re.DOTALL)[1]
    assert row.count("n = 63 photos") == 5
    assert row.count("n = 40 photos") == 1


def without_landmarks():
    none = scores(instability=None, instability_all=None, consistency=None, landmark_shares={})
    performer = evaluation().performer
    return evaluation(
        explainer=none,
        performer=type(performer)(tap=none, top=none, top_layer="layer4"),
        nulls=dict.fromkeys(("random", "centre", "corner"), none),
        landmarks={},
        filters={"explainer": (), "performer": ()},
    )


def test_undefined_numbers_are_dashes_that_say_so(tmp_path):
    html = render_page(collect_page(write_run(tmp_path / "run", measured=without_landmarks())))
    numbers = html[html.index('id="numbers"') : html.index('id="fidelity"')]
    assert numbers.count('<span class="undefined" title="not defined">–</span>') == 3 * 6
    text = Page(html).text
    assert "No chart." in text
    assert "The photos have no landmarks" in text
    assert "Not measured: it needs photos with landmarks." in text
    assert "nan" not in text.lower().split()


def test_instability_is_never_drawn_alone(tmp_path):
    whole = render_page(collect_page(write_run(tmp_path / "whole")))
    assert ">Location instability: lower is better<" in whole
    assert ">Consistency: higher is better<" in whole
    part = evaluation()
    alone = scores(consistency=None)
    part = evaluation(
        explainer=alone,
        performer=type(part.performer)(tap=alone, top=alone, top_layer="layer4"),
        nulls=dict.fromkeys(part.nulls, alone),
    )
    assert ">Location instability: lower is better<" not in render_page(
        collect_page(write_run(tmp_path / "part", measured=part))
    )


def test_a_bare_run_says_what_is_not_measured(tmp_path):
    data = collect_page(write_run(tmp_path / "run", bare=True))
    explainer = data.explainer
    assert (explainer.evaluation, explainer.gallery, explainer.epochs) == (None, None, ())
    assert (data.selection, data.explanations.shown) == (None, ())
    text = Page(render_page(data)).text
    assert text.count("Not measured.") == 6
    assert text.count("partlens evaluate RUN DATA") == 6
    assert "Not recorded." in text
    assert "Nothing has been measured on held-out photos yet" in text


def test_an_unfinished_fit_is_announced(tmp_path):
    page = page_of(write_run(tmp_path / "run", run=MADE.explainer_run(status="running"), bare=True))
    assert "Unfinished. The fit's status is “running”" in page.text
    assert "Unfinished." not in page_of(write_run(tmp_path / "done", bare=True)).text


def test_pictures_are_embedded(run):
    page = page_of(run)
    assert len({u for u in page.attributes("href") if u.startswith("data:image/jpeg")}) == 7
    assert "Filter 12" in page.text
    assert "instability 0.0700, consistency 0.710; best on head" in page.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../../secret.jpg", "a picture inside"),
        ("none.jpg", "a picture .*none.jpg, got nothing there. Run evaluate again"),
        ("notes.txt", "a PNG or JPEG picture in .*notes.txt"),
    ],
)
def test_only_pictures_of_the_run_are_embedded(tmp_path, name, message):
    run = write_run(tmp_path / "run")
    path = run / "gallery" / "gallery.json"
    path.write_text(path.read_text().replace('"region.jpg"', json.dumps(name)))
    (tmp_path / "secret.jpg").write_bytes((run / "gallery" / "0.jpg").read_bytes())
    (run / "gallery" / "notes.txt").write_text("no picture")
    with pytest.raises(RunError, match=message):
        collect_page(run)


@pytest.mark.parametrize(
    ("name", "old", "new", "field"),
    [
        ("run.json", '"train_photos": 223', '"train_photos": "many"', "train_photos to be a valid integer"),
        ("evaluation.json", '"value": 0.42', '"value": "much"', "p.value to be a valid number"),
        ("evaluation.json", '"warnings"', '"warning"', "the field warnings of Evaluation"),
        ("history.json", '"epochs": [', '"epochs": [1, ', "epochs.0 to be an object"),
        ("gallery/gallery.json", '"peak_px": [', '"peak_px": [1, ', "peak_px"),
    ],
)
def test_a_damaged_value_is_one_error_that_names_file_and_field(run, name, old, new, field):
    text = (run / name).read_text(encoding="utf-8")
    assert old in text
    (run / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(RunError, match=rf"{re.escape(field)}.* in .*{name}.* again"):
        collect_page(run)


# --- words ------------------------------------------------------------------------------------------------------------


def headline(folder: Path, **records: Any) -> str:
    data = ExplainerData.read(write_run(folder, **records), Pictures(folder, "", 1_000_000))
    return plain(unescape(data.headline))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_headline(tmp_path):
    assert headline(tmp_path) == (
        "At layer3, fed back to resnet18 on 63 held-out photos of fox, the explainer's both tracks keep 83 % of its "
        "top-1 answers, the part filters alone 37 % (those of another photo 5 %); their weight p = 0.420 is the price "
        "at which they were learned, no share."
    )


@pytest.mark.parametrize(
    ("changes", "said", "not_said"),
    [
        ({"data": {"split": "train"}}, "63 training photos of fox", "held-out"),
        ({"data": {"split": "all"}}, "on 63 photos of fox", "held-out"),
        ({"data": {"photos": 1}}, "1 held-out photo of fox", "photos"),
        ({"p": estimate(0.42, 0.03, 3, "seeds")}, "p = 0.420 is the price", "42 %"),
        ({"kept": {"agreement_top1": estimate(0.38)}}, "too little to describe the performer by", "83"),
        ({"kept": {"agreement_top1": estimate(0.5)}}, "keep 50 %", "too little"),
    ],
)
def test_the_headline_claims_only_what_was_measured(tmp_path, changes, said, not_said):
    text = headline(tmp_path, measured=evaluation(**changes))
    assert said in text
    assert not_said not in text


@pytest.mark.parametrize(
    ("categories", "said"),
    [(("",), "63 held-out photos from animal-part,"), (("cat", "fox"), "63 held-out photos of cat, fox,")],
)
def test_the_headline_names_the_categories(tmp_path, categories, said):
    text = headline(tmp_path, run=MADE.explainer_run(data={"categories": categories}))
    assert said in text


def test_the_headline_before_evaluation(tmp_path):
    assert headline(tmp_path / "run", trained=MADE.history(), bare=True) == (
        "At layer3, an explainer of resnet18 was learned on 223 photos of fox. Nothing has been measured on held-out "
        "photos yet."
    )
    assert "%" not in headline(tmp_path / "bare", bare=True)


def verdicts(folder: Path, **changes: Any) -> dict[str, tuple[str, str]]:
    """Return title and words of every verdict on the page, by its state."""
    html = plain(render_page(collect_page(write_run(folder, measured=evaluation(**changes)))))
    found = re.search(r'<ul class="verdicts">(.*?)</ul>', html, re.DOTALL)[1]
    row = r'<li class="(\w+)"><strong><span[^>]*>.</span>(.*?) <span.*?</strong> (.*?)</li>'
    return {title: (state, unescape(words)) for state, title, words in re.findall(row, found, re.DOTALL)}


def test_a_sound_explainer_is_judged_by_consistency(tmp_path):
    found = verdicts(tmp_path)
    state, words = found.pop("Stable, but so is a fixed peak")
    assert state == "caution"
    assert "better than random cells (0.158) and a peak fixed in the corner (0.130)" in words
    assert "but worse than a peak fixed at the centre (0.0550)" in words
    assert {state for state, _ in found.values()} == {"good"}
    assert len(found) == 6


def test_beating_every_null_is_said(tmp_path):
    found = verdicts(tmp_path, explainer=scores(instability=0.02))
    assert found["Beats every null"][0] == "good"


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
    gaps = evaluation().instability_minus_null
    gaps["centre"] = Estimate((low + high) / 2, (low, high), 60)
    found = verdicts(tmp_path, explainer=scores(instability=0.056), instability_minus_null=gaps)
    title = "Beats every null" if state == "good" else "Stable, but so is a fixed peak"
    assert found[title][0] == state
    assert said in found[title][1]
    assert "(0.0550, difference on the same photos" in found[title][1]


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
        ({"instability": 0.155}, "instability", "chance"),
        ({"instability": 0.2}, "instability", "chance"),
        ({"instability": None}, "instability", "unknown"),
    ],
)
def test_each_limit(change, key, state):
    assert judge(evaluation(explainer=scores(**change)))[key] == state


@pytest.mark.parametrize(("agreement", "state"), [(0.49, "warning"), (0.5, "good"), (None, "unknown")])
def test_the_limit_on_agreement(agreement, state):
    assert judge(evaluation(kept={"agreement_top1": estimate(agreement)}))["agreement"] == state


@pytest.mark.parametrize("collapse", [{"filter_correlation": 0.95}, {"peak_spread_cells": 0.2}, {"border_frac": 0.8}])
def test_collapse_takes_the_praise_from_instability(tmp_path, collapse):
    found = verdicts(tmp_path, explainer=scores(instability=0.02, **collapse))
    state, words = found["Stable by collapse"]
    assert state == "warning"
    assert "collapsed" in words


def test_dead_filters_alone_are_no_collapse():
    assert judge(evaluation(explainer=scores(instability=0.02, dead_frac=0.3)))["instability"] == "good"


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
    with pytest.raises(RunError, match=r"^Expected a file .*run\.json or selection\.json in .*, got none there\."):
        collect_page(tmp_path)


@pytest.mark.parametrize("name", ["run.json", "history.json", "evaluation.json", "gallery/gallery.json"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=f"JSON in .*{name}"):
        collect_page(run)


def test_an_evaluation_of_another_version_is_refused(tmp_path):
    run = write_run(tmp_path / "run")
    text = (run / "evaluation.json").read_text()
    (run / "evaluation.json").write_text(text.replace("partlens.evaluation/3", "partlens.evaluation/1"))
    with pytest.raises(RunError, match=r"schema partlens.evaluation/3 in .*, got partlens.evaluation/1. Run evaluate"):
        collect_page(run)


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
    with pytest.raises(StorageError, match="no space left"):
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


def test_layers_read_alike_are_in_one_table(tmp_path):
    """Centroids move less than largest cells: the page compares each layer with what was read as it was."""
    assert "Read alike" not in page_of(write_run(tmp_path / "largest")).text
    same = {
        "explainer_largest": scores(instability=0.0912),
        "tap_centroid": scores(instability=0.1223),
        "top_centroid": scores(instability=0.1334),
    }
    html = render_page(collect_page(write_run(tmp_path / "centroid", measured=evaluation(same_peak=same))))
    table = re.search(r'aria-label="Scores of layers read alike".*?</table>', html, re.DOTALL)[0]
    row = r'class="whole">([^<]+)</th><td role="cell">([^<]+)</td><td role="cell"><span class="value">([^<]+)<'
    assert re.findall(row, table) == [
        ("explainer", "centroid", "0.0800"),
        ("performer, layer3", "centroid", "0.122"),
        ("performer, layer4", "centroid", "0.133"),
        ("explainer", "largest cell", "0.0912"),
        ("performer, layer3", "largest cell", "0.154"),
        ("performer, layer4", "largest cell", "0.149"),
    ]


def test_several_categories_are_shown_apart(tmp_path):
    two = scores()
    two = two.__class__(**{**dict(two), "by_category": dict.fromkeys(("cat", "fox"), two.by_category["fox"])})
    assert 'aria-label="Scores per category"' not in render_page(collect_page(write_run(tmp_path / "one")))
    measured = evaluation(explainer=two, data={"categories": ("cat", "fox")})
    html = render_page(collect_page(write_run(tmp_path / "two", measured=measured)))
    table = re.search(r'aria-label="Scores per category".*?</table>', html, re.DOTALL)[0]
    cat, fox = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
    assert "–</td>" in cat  # neither the null nor the performer has filters of it here
    assert fox.count('class="value"') == 4
