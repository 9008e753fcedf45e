"""The chapter on what each class is read from: what it says of complete, partial, huge and hostile selections."""

from __future__ import annotations

import html
import itertools
import json
import math
import re
import runpy
from pathlib import Path

import pytest

from partlens.errors import RunError
from partlens.page.page import PICTURES_BYTES, collect_page, render_page, write_report
from partlens.page.selection_page import _layer_shares, _layers_chart, _sharper

HERE = Path(__file__).parent
MADE = runpy.run_path(str(HERE / "made_runs.py"))
Page = runpy.run_path(str(HERE / "page_reader.py"))["Page"]
HOSTILE = "<script>alert(1)</script>\"'&"
LAYERS = MADE["LAYERS"]


def changed(run: Path, **changes) -> Path:
    """Change values of ``selection.json``; a name like ``readout__accuracy`` reaches inside."""
    content = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = content
        for key in outer:
            place = place[int(key) if key.isdigit() else key]
        place[int(last) if last.isdigit() else last] = value
    MADE["write"](run / "selection.json", content)
    return run


@pytest.fixture
def run(tmp_path):
    return MADE["write_selection"](tmp_path / "run", classes=3, features=2)


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def headline(run: Path) -> str:
    return plain(html.unescape(collect_page(run).selection.headline))


def states(run: Path) -> dict:
    return dict(collect_page(run).selection.view()["states"])


def said(run: Path) -> str:
    return plain(Page(render_page(collect_page(run))).text)


def test_the_page_is_one_closed_document_that_loads_nothing(run):
    MADE["write_explanation"](run)
    text = render_page(collect_page(run))
    page = Page(text)
    assert [t for t, _ in page.tags].count("h1") == 1
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & {t for t, _ in page.tags}
    assert all(s.startswith("data:image/") for s in page.attributes("src"))
    links = {h[1:] for h in page.attributes("href")}
    assert links <= page.ids
    assert {i for label in page.attributes("aria-labelledby") for i in label.split()} <= page.ids


def test_every_picture_has_words_and_a_size(run):
    MADE["write_explanation"](run)
    images = [a for t, a in Page(render_page(collect_page(run))).tags if t == "img"]
    assert len(images) == 3 * 2 * 3 + 1 + 2 * (2 + 3 * 2)
    assert all(a["alt"] and int(a["width"]) > 0 and int(a["height"]) > 0 for a in images)


def test_the_headline(run):
    assert headline(run) == (
        "3 classes of flower-net are read from 2.0 filters each, of 1,090 in 8 layers; the linear read-out of these "
        "alone is right on 96.1 % [94.1, 98.1] of 300 held-out photos (shuffled labels: 8 %, chance 33.3 %)."
    )


NOT_MEASURED = {f"found__{name}": MADE["estimate"](None, n=0) for name in ("accuracy", "shuffled", "model_accuracy")}


@pytest.mark.parametrize(
    ("changes", "said", "not_said"),
    [
        (NOT_MEASURED, "has not been measured on held-out photos.", "right on"),
        (
            {"found__accuracy": MADE["estimate"](0.3)},
            "no better than chance, so these filters say nothing",
            "alone tell",
        ),
        ({"found__shuffled": MADE["estimate"](0.95)}, "no better than chance", "alone tell"),
        ({"config__labels": "predictions"}, "agrees with it on 96.1 %", "right on"),
    ],
)
def test_the_headline_claims_only_what_was_measured(run, changes, said, not_said):
    text = headline(changed(run, **changes))
    assert said in text
    assert not_said not in text
    assert "nan" not in text


def test_a_sound_selection_is_good(tmp_path):
    run = MADE["write_selection"](tmp_path / "run")
    assert states(run) == dict.fromkeys(("readout", "few", "sharp", "solved"), "good")
    assert "reached in 0 of 12 classes; it is not the bound" in said(run)
    assert "52 of 60 filters (86.7 % [75.8, 93.1])" in said(run)


@pytest.mark.parametrize(
    ("changes", "key", "state"),
    [
        (NOT_MEASURED, "readout", "unknown"),
        ({"found__accuracy": MADE["estimate"](0.3)}, "readout", "warning"),
        ({"found__accuracy": MADE["estimate"](0.355)}, "readout", "good"),
        ({"found__shuffled": MADE["estimate"](0.925)}, "readout", "warning"),
        ({"found__classes__2__relative_gap": 1e-4}, "solved", "good"),
        ({"found__classes__2__relative_gap": 1.1e-4}, "solved", "caution"),
        ({"found__classes__1__relative_gap": 0.011}, "solved", "warning"),
    ],
)
def test_each_limit(run, changes, key, state):
    assert states(changed(run, **changes))[key] == state


@pytest.mark.parametrize(("filters", "state"), [(16, "good"), (17, "caution")])
def test_few_filters_are_sixteen(tmp_path, filters, state):
    run = MADE["write_selection"](tmp_path / "run", classes=2, features=filters, pictures=False)
    assert states(run)["few"] == state


def test_a_class_without_filters_is_a_warning(run):
    changed(run, found__classes__0__filters=[])
    assert "Classes read from nothing (warning) 1 class has no filter: petal-red." in said(run)
    assert "No filter has a weight for this class" in said(run)


def test_classes_at_the_bound_are_counted(run):
    changed(run, found__classes__0__norm=10.0, found__classes__1__norm=10.0 * (1 - 2e-9))
    assert "The bound μ = 10 is reached in 1 of 3 classes." in said(run)


@pytest.mark.parametrize(("value", "state"), [(0.1, "warning"), (0.21, "warning"), (0.3, "good")])
def test_averages_are_judged_by_their_control(tmp_path, value, state):
    run = MADE["write_selection"](tmp_path / "run", classes=6, features=2)
    content = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    for each in (f for c in content["found"]["classes"] for f in c["filters"]):
        each["picture"]["sharpness"] = value
    MADE["write"](run / "selection.json", content)
    assert states(run)["sharp"] == state


def test_a_majority_that_may_be_luck_is_no_praise(tmp_path):
    run = MADE["write_selection"](tmp_path / "run", classes=6, features=2)
    content = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    for position, each in enumerate(f for c in content["found"]["classes"] for f in c["filters"]):
        each["picture"] |= {"sharpness": 0.3 if position < 8 else 0.1, "control_sharpness": 0.2}
    MADE["write"](run / "selection.json", content)
    assert states(run)["sharp"] == "caution"
    assert "for 8 of 12 filters (66.7 % [39.1, 86.2])" in said(run)


def test_a_filter_of_two_classes_is_counted_once(run):
    content = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    content["found"]["classes"][1]["filters"] = content["found"]["classes"][0]["filters"]
    MADE["write"](run / "selection.json", content)
    assert _sharper(collect_page(run).selection.found)[1] == 2 + 2


def test_the_numbers_stand_in_the_table(run):
    text = plain(Page(render_page(collect_page(run))).text)
    for words in (
        "96.1 % [94.1, 98.1]",
        "98.5 % [97.5, 99.5]",
        "8.00 % [6.00, 10.0]",
        "33.3 %",
        "300 photos",
        "3.00 × 10⁻⁶",
        "1,200 training photos, with the data's labels",
        "partlens select-features flowers.py:network flowers --out runs/flowers",
        "aa11",
        "f00d",
        "Dropout is off.",
        "sees 6 × 6 px",
        "sharpness 0.200, random crops 0.210",
        "weight 2.00; 66.7 % of the class's total",
    ):
        assert words in text, words


def test_a_feature_that_sees_everything_says_so(tmp_path):
    run = MADE["write_selection"](tmp_path / "run", classes=4, features=1)
    assert "Filter 43 of fc sees the whole image" in Page(render_page(collect_page(run))).text


def test_negative_weights_are_said(run):
    content = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    content["found"]["classes"][0]["filters"][0]["weight"] = -2.0
    MADE["write"](run / "selection.json", content)
    html = render_page(collect_page(run))
    assert "weight −2.00, speaks against the class" in Page(html).text
    assert '<span class="bar against" aria-hidden="true"><i style="width:100.0%"></i></span>' in html


def test_layer_shares_are_means_over_classes_beside_the_share_of_filters(run):
    layers, shares, even = zip(*_layer_shares(collect_page(run).selection.found), strict=True)
    assert list(layers) == list(LAYERS)
    assert math.isclose(sum(shares), 1.0)
    assert math.isclose(sum(even), 1.0)
    assert math.isclose(shares[layers.index("conv1")], (2 / 3) / 3)
    assert math.isclose(even[layers.index("conv1")], 20 / 1090)


def test_the_layer_figure(run):
    shares = _layer_shares(collect_page(run).selection.found)
    svg = _layers_chart("Shares", shares)
    heights = [float(h) for h in re.findall(r'<rect [^>]*height="([\d.]+)"', svg)]
    assert len(heights) == len(LAYERS) == svg.count("<circle")
    for (_, share, _), height in zip(shares, heights, strict=True):
        assert height / max(heights) == pytest.approx(share / max(s for _, s, _ in shares), abs=0.01)
    assert _layers_chart("Shares", [(layer, 0.0, even) for layer, _, even in shares]) == ""


def test_many_layers_are_named_sparsely():
    svg = _layers_chart("Shares", [(f"features.{i}.block.conv", 0.01, 0.01) for i in range(90)])
    assert svg.count("rotate(") == 30
    assert ">….0.block.conv<" in svg


def test_the_table_of_classes_by_layers(run, tmp_path):
    view = collect_page(run).selection.view()
    assert view["heat_columns"] == tuple(
        c for c in LAYERS if any(c == f.layer for k in view["data"].found.classes for f in k.filters)
    )
    for *_, cells in view["heat_rows"]:
        assert sum(cell or 0.0 for cell in cells) == pytest.approx(100)
    many = MADE["write_selection"](tmp_path / "many", classes=31, features=1, pictures=False)
    assert collect_page(many).selection.view()["heat_rows"] == ()


def test_explained_classes_come_first_and_link_to_their_image(tmp_path):
    run = MADE["write_selection"](tmp_path / "run", classes=4, features=1, pictures=False)
    MADE["write_explanation"](run, names=("centre-red", "leaf-red"))
    page = collect_page(run)
    assert [c.data.name for c in page.selection.classes] == ["centre-red", "leaf-red", "petal-red", "stem-red"]
    html = render_page(page)
    assert html.count('Explained in <a href="#image-1">tulip_3.jpg</a>') == 2
    assert 'id="image-1"' in html


def test_a_selection_without_pictures_or_explanations_says_what_to_run(tmp_path):
    run = MADE["write_selection"](tmp_path / "run", classes=3, pictures=False)
    changed(run, **NOT_MEASURED)
    page = Page(render_page(collect_page(run)))
    assert (
        "No pictures were made. They come with partlens select-features MODEL DATA --out RUN --pictures 200"
        in page.text
    )
    assert "No prediction explained yet." in page.text
    assert "partlens explain RUN PHOTO" in page.text
    assert "needs photos of the split test" in page.text
    assert not page.attributes("src")


def test_hundreds_of_classes_stay_readable_and_say_what_is_left_out(tmp_path):
    run = MADE["write_selection"](tmp_path / "run", classes=430, features=5, pictures=False)
    selection = collect_page(run).selection
    assert [len(selection.at(place)) for place in ("open", "folded", "table")] == [12, 48, 370]
    path = write_report(run)
    page = Page(path.read_text(encoding="utf-8"))
    assert sum(t == "details" and a.get("class") == "class" for t, a in page.tags) == 60
    assert sum(t == "details" and a.get("class") == "class" and "open" in a for t, a in page.tags) == 12
    assert "Pictures are shown for 60 of 430 classes" in page.text
    assert "370 others are in the table below" in page.text
    assert {f"class-{i}" for i in range(1, 431)} <= page.ids
    assert path.stat().st_size < 1_500_000


def test_pictures_beyond_the_room_are_left_out(tmp_path, monkeypatch):
    run = MADE["write_selection"](tmp_path / "run", classes=8, features=2)
    one = sum(len(p.uri) for files in collect_page(run).selection.classes[0].pictures for p in files)
    monkeypatch.setattr("partlens.page.page.PICTURES_BYTES", int(3.5 * one))
    selection = collect_page(run).selection
    assert [c.place for c in selection.classes] == ["open"] * 3 + ["table"] * 5
    assert not any(any(c.pictures) for c in selection.at("table"))
    assert "Pictures are shown for 3 of 8 classes" in Page(render_page(collect_page(run))).text
    assert PICTURES_BYTES < 15_000_000 * 0.95


def hostile(value):
    """Replace every free text by markup; what names files, layers or kinds stays."""
    kept = {"schema", "status", "labels", "descriptor", "method", "layer", "layers", "average", "control", "crops"}
    kept |= {"input", "combined", "heat", "overlay", "unit"}
    if isinstance(value, dict):
        return {k: v if k in kept else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_texts_stay_texts(run):
    folder = MADE["write_explanation"](run)
    for path in (run / "selection.json", folder / "explanation.json"):
        content = hostile(json.loads(path.read_text(encoding="utf-8")))
        if "found" in content:
            content["data"]["unreadable"] = [{"key": HOSTILE, "reason": HOSTILE}]
            content["found"]["index"]["layers"][0] = HOSTILE
            for each in (f for c in content["found"]["classes"] for f in c["filters"] if f["layer"] == "conv1"):
                each["layer"] = HOSTILE
        MADE["write"](path, content)
    text = render_page(collect_page(run))
    page = Page(text)
    assert "<script" not in text
    assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") > 25
    assert "alert(1)" in " ".join(page.attributes("alt"))


def test_the_same_run_gives_the_same_page(run, tmp_path):
    again = MADE["write_selection"](tmp_path / "again", classes=3, features=2)
    assert render_page(collect_page(run)) == render_page(collect_page(again))
    assert str(tmp_path) not in render_page(collect_page(run))


# --- runs that cannot be shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "partlens.selection/1"}, r"Expected schema partlens\.selection/2 in .*, got partlens\.selection/1"),
        (
            {"performer": {}},
            r"Expected the field performer\.name of .*selection\.json, got nothing\. Run partlens select",
        ),
        ({"found__classes": []}, r"Expected found\.classes to be .* at least 1 item"),
        (
            {"found__classes__1__norm": "much"},
            r"Expected found\.classes\.1\.norm to be a valid number in .*, got 'much'",
        ),
        ({"found__index__layers": ["a"] * 8}, r"selection\.json at found\.index: Expected each layer once"),
        ({"found__index__channels": [1] * 7}, r"one number of channels for each"),
        ({"found__classes__0__filters__0__layer": "conv9"}, r"filters of the measured layers, not of conv9"),
    ],
)
def test_selections_that_cannot_be_shown(run, changes, message):
    with pytest.raises(RunError, match=message):
        collect_page(changed(run, **changes))


def test_a_damaged_file_is_named(run):
    (run / "selection.json").write_text('{"schema": ', encoding="utf-8")
    with pytest.raises(RunError, match=r"JSON in .*selection\.json"):
        collect_page(run)


@pytest.mark.parametrize("damage", ["missing", "cut", "outside"])
def test_a_picture_that_is_named_has_to_be_there(run, damage):
    picture = next((run / "pictures").glob("*-average.png"))
    if damage == "missing":
        picture.unlink()
    elif damage == "cut":
        picture.write_bytes(picture.read_bytes()[:60])
    else:
        content = json.loads((run / "selection.json").read_text(encoding="utf-8"))
        content["found"]["classes"][0]["filters"][0]["picture"]["average"] = "../elsewhere.png"
        MADE["write"](run / "selection.json", content)
    with pytest.raises(
        RunError, match="Restore it, or delete selection.json first. Run partlens select-features again"
    ):
        collect_page(run)


def test_a_selection_that_was_only_begun_says_how_to_go_on(run):
    changed(run, status="running", found=None, command="partlens x")
    with pytest.raises(RunError, match=r"Expected a finished selection in .*, got .* begun\. Go on with: partlens x\."):
        collect_page(run)
