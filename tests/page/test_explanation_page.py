"""One explained image: on the page of its run, on a page of its own, and joined with an explainer."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from partlens.errors import InputError, RunError
from partlens.page import collect_page, render_page, selection_words, write_explanation_page, write_report
from partlens.page.explanation_page import explanation_view

HERE = Path(__file__).parent
MADE = runpy.run_path(str(HERE / "made_runs.py"))
Page = runpy.run_path(str(HERE / "page_reader.py"))["Page"]


def changed(folder: Path, change) -> Path:
    content = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))
    change(content)
    MADE["write"](folder / "explanation.json", content)
    return folder


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture
def run(tmp_path):
    return MADE["write_selection"](tmp_path / "run", classes=3, features=1)


@pytest.fixture
def folder(run):
    return MADE["write_explanation"](run)


def one(folder: Path):
    return collect_page(folder.parent.parent).explanations.shown[0]


def explainer_run(folder: Path, sha256: str = "aa11") -> Path:
    manifest = {
        "schema": "partlens/1",
        "kind": "explainer",
        "status": "finished",
        "command": "partlens fit-explainer flowers.py:network flowers --tap conv3",
        "performer": {"name": "flower-net", "weights_sha256": sha256},
        "structure": {"tap": "conv3"},
        "data": {"train_photos": 9},
    }
    MADE["write"](folder / "run.json", manifest)
    return folder


def test_the_page_of_one_image_stands_alone(folder):
    path = write_explanation_page(folder)
    assert path == folder.resolve() / "explanation.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe", "object"} & {t for t, _ in page.tags}
    images = [a for t, a in page.tags if t == "img"]
    assert len(images) == 1 + 2 * (2 + 3 * 2)
    assert all(a["alt"] and a["src"].startswith("data:image/") for a in images)
    assert {h[1:] for h in page.attributes("href")} <= page.ids


def test_the_headline(folder):
    assert plain(selection_words.explanation_headline(one(folder))) == (
        "flower-net takes tulip_3.jpg for “petal-red” (93 %). 3 filters carry 86 % of the evidence for it; "
        "filter 71 of conv3 alone 52 %."
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank": 3, "probability": 0.02}, "“petal-red” is the 3rd answer of flower-net to tulip_3.jpg (2 %)."),
        ({"rank": None, "probability": None}, "tulip_3.jpg in flower-net is read for “petal-red”."),
        ({"features": []}, "No feature that the class is read from answers to it."),
    ],
)
def test_the_headline_of_other_classes(folder, change, said):
    changed(folder, lambda c: c["explained"][0].update(change))
    assert said in plain(selection_words.explanation_headline(one(folder)))
    Page(write_explanation_page(folder).read_text(encoding="utf-8"))


def test_both_classes_stand_on_one_scale(folder):
    view = explanation_view(one(folder))
    widths = [[f.bar_percent for f in column.features] for column in view.columns]
    assert widths[0][0] == 100.0
    assert widths[1][0] == pytest.approx(100 * 0.208 / 0.468)
    assert [c.kind for c in view.columns] == ["predicted class", "2nd of the answers"]
    assert "stands beside the first" in render_page(collect_page(folder.parent.parent))


def test_every_number_stands_in_the_table(folder):
    text = plain(Page(write_explanation_page(folder).read_text(encoding="utf-8")).text)
    for words in (
        "0.468",
        "0.312",
        "52 %",
        "93 %",
        "4.4 %",
        "linear read-out w · x over all its filters 0.800",
        "Rank correlation with the map of “petal-red”: 0.410.",
        "1 is ten times its surroundings): −0.12, without the stride correction 2.41.",
        "guided backpropagation from the 3 strongest features, stride artefacts removed",
        "photos/tulip_3.jpg, 640 × 480 px",
        "Dropout is off.",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rank_correlation_with_first": 0.95}, "nearly the same, so they say little about the class"),
        ({"lattice_index": {"before": 2.0, "after": 2.0}}, "Stripes in the map may come from the strides."),
    ],
)
def test_what_takes_worth_from_a_map_is_said(folder, change, said):
    assert said not in Page(write_explanation_page(folder).read_text(encoding="utf-8")).text
    changed(folder, lambda c: c["explained"][1].update(change))
    assert said in Page(write_explanation_page(folder).read_text(encoding="utf-8")).text


def test_undefined_numbers_are_dashes(folder):
    def change(content):
        content["prediction"] = None
        content["explained"][0] |= {"score": None, "probability": None, "lattice_index": None}
        content["explained"][0]["features"][0] |= {"share": None, "contribution": None}

    text = Page(write_explanation_page(changed(folder, change)).read_text(encoding="utf-8")).text
    assert "None were recorded." in text
    assert "not an output of the network" in text
    assert "contribution –, – of all" in text
    assert "nan" not in text.lower().split()


def test_one_class_alone(folder):
    changed(folder, lambda c: c.update(explained=c["explained"][:1]))
    text = write_explanation_page(folder).read_text(encoding="utf-8")
    assert text.count('<article class="column">') == 1
    assert 'class="columns single"' in text
    assert "stands beside the first" not in text
    assert "stands beside the first" not in render_page(collect_page(folder.parent.parent))


def test_a_folder_away_from_its_run_has_no_averages_unless_the_path_leads_to_them(folder, tmp_path):
    away = shutil.copytree(folder, tmp_path / "away")
    page = Page(write_explanation_page(away).read_text(encoding="utf-8"))
    assert len(page.attributes("src")) == 1 + 2 * (2 + 3)
    assert "In training" not in page.text

    def elsewhere(content):
        for feature in (f for e in content["explained"] for f in e["features"]):
            feature["average"] = feature["average"].replace("../../", "../run/")

    page = Page(write_explanation_page(changed(away, elsewhere)).read_text(encoding="utf-8"))
    assert len(page.attributes("src")) == 1 + 2 * (2 + 3 * 2)


def test_several_images_have_anchors_in_the_contents(run, folder):
    MADE["write_explanation"](run, "rose.jpg", seed=5)
    (run / "explanations" / "half").mkdir()
    (run / "explanations" / ".hidden").mkdir()
    html = render_page(collect_page(run))
    assert '<li><a href="#image-1">rose.jpg</a></li><li><a href="#image-2">tulip_3.jpg</a></li>' in html
    text = Page(html).text
    assert "Single predictions" in text
    assert "Without explanation.json, so not shown: half ." in text


def test_images_beyond_the_room_are_named(run, folder, monkeypatch):
    MADE["write_explanation"](run, "rose.jpg", seed=5)
    monkeypatch.setattr("partlens.page.page_data.EXPLANATIONS_SHARE", 1e-6)
    page = collect_page(run)
    assert [e.image for e in page.explanations.shown] == ["rose.jpg"]
    assert page.explanations.left_out == ("tulip_3",)
    assert "1 more explained image, so that the page stays small." in Page(render_page(page)).text


# --- joined with an explainer -----------------------------------------------------------------------------------------


def test_a_joined_page_has_all_chapters_in_the_contents(run, folder):
    html = render_page(collect_page(explainer_run(run)))
    page = Page(html)
    contents = re.search(r'<nav aria-label="Contents".*?</nav>', html, re.DOTALL)[0]
    assert re.findall(r'<li><a href="#([\w-]+)">', re.sub(r"<ul>.*?</ul>", "", contents)) == [
        "selection",
        "explanation",
        "explainer",
        "reproduce",
        "notes",
    ]
    assert {h[1:] for h in page.attributes("href") if h.startswith("#")} <= page.ids
    levels = [int(t[1]) for t, _ in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
    assert "partlens select-features flowers.py:network flowers --out runs/flowers" in page.text
    assert "partlens fit-explainer flowers.py:network flowers --tap conv3" in page.text
    assert "Two networks." not in page.text


def test_other_weights_are_announced(run, folder):
    assert "Two networks." in Page(render_page(collect_page(explainer_run(run, "bb22")))).text
    changed(folder, lambda c: c["performer"].update(weights_sha256="cc33"))
    assert "Other weights." in Page(render_page(collect_page(run))).text


def test_an_explainer_beside_a_selection_that_was_only_begun(tmp_path):
    run = explainer_run(tmp_path / "run")
    content = {"schema": "partlens.selection/1", "kind": "selection", "status": "running", "command": "partlens go"}
    MADE["write"](run / "selection.json", content)
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "Selection not finished. It was begun and has no result yet. Go on with: partlens go" in text


def test_an_explainer_with_an_explained_image_only(tmp_path):
    run = explainer_run(tmp_path / "run")
    MADE["write_explanation"](run)
    page = Page(render_page(collect_page(run)))
    assert "One prediction" in page.text
    assert len(page.attributes("src")) == 1 + 2 * (2 + 3)


# --- folders that cannot be shown -------------------------------------------------------------------------------------


def test_folders_that_are_none(tmp_path, folder):
    with pytest.raises(RunError, match=r"^Expected the folder of an explanation, got .*nowhere\. Give a folder"):
        write_explanation_page(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"Expected a file explanation\.json in .*, got none there\."):
        write_explanation_page(tmp_path)
    with pytest.raises(InputError, match="Expected a file name for the page"):
        write_explanation_page(folder, tmp_path)
    assert write_explanation_page(folder, tmp_path / "deep" / "x.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "partlens.explanation/9"}, r'Expected schema "partlens\.explanation/1" in .*, got partlens'),
        ({"image": {}}, r"Expected the image's name in .*, got None\. Run partlens explain again"),
        ({"performer": None}, r"Expected the performer's name in .*, got None"),
        ({"input": None}, r"Expected the input picture's name in .*, got None"),
        ({"explained": []}, r"Expected at least one explained class in .*, got none"),
    ],
)
def test_explanations_that_cannot_be_shown(run, folder, change, message):
    changed(folder, lambda c: c.update(change))
    with pytest.raises(RunError, match=message):
        write_explanation_page(folder)
    with pytest.raises(RunError, match=message):
        collect_page(run)
    assert not (folder / "explanation.html").exists()


@pytest.mark.parametrize("name", ["input.png", "combined-2.png", "heat-1.png", "feature-2-3.png"])
def test_a_missing_or_damaged_picture_is_named(folder, name):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=rf"PNG or JPEG picture in .*{name}, got .*Run partlens explain again"):
        write_explanation_page(folder)
    (folder / name).unlink()
    with pytest.raises(RunError, match=rf"Expected a picture .*{name}, got nothing there\. Run partlens explain again"):
        write_explanation_page(folder)


def test_pictures_from_outside_the_run_are_refused(folder, tmp_path):
    MADE["draw"](tmp_path / "secret.png", 20, 20, 1)
    changed(folder, lambda c: c["explained"][0].update(combined="../../../secret.png"))
    with pytest.raises(RunError, match=r"Expected a picture inside .*, got \.\./\.\./\.\./secret\.png"):
        write_explanation_page(folder)
