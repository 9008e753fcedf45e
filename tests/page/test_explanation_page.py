"""One explained image: on the page of its run, on a page of its own, and joined with an explainer."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from partlens.errors import RunError
from partlens.page.explanation_page import write_explanation_page
from partlens.page.page import collect_page, render_page, write_report

HERE = Path(__file__).parent
MADE = runpy.run_path(str(HERE / "made_runs.py"))
EXPLAINER = runpy.run_path(str(HERE / "made_explainer.py"))
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


def said(folder: Path) -> str:
    return plain(Page(write_explanation_page(folder).read_text(encoding="utf-8")).text)


def explainer_run(folder: Path, sha256: str = "aa11") -> Path:
    EXPLAINER["explainer_run"](
        command="partlens fit-explainer flowers.py:network flowers --tap conv3",
        network={"name": "flower-net", "weights_sha256": sha256},
        structure={"tap": "conv3"},
        data={"categories": ("",)},
        train_photos=9,
    ).write(folder)
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
    assert (
        "flower-net takes tulip_3.jpg for “petal-red” (93 %). 3 filters carry 86 % of the evidence for it; "
        "filter 71 of conv3 alone 52 %. "
    ) in said(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 2, "probability": 0.02}, "“petal-red” is the 2nd answer of flower-net to tulip_3.jpg (2 %)."),
        ({"rank": 11, "probability": 0.02}, "“petal-red” is the 11th answer of"),
        ({"rank": 22, "probability": 0.02}, "“petal-red” is the 22nd answer of"),
        ({"rank": 24, "probability": 0.02}, "“petal-red” is the 24th answer of"),
        ({"rank": 3, "probability": 0.02}, "“petal-red” is the 3rd answer of flower-net to tulip_3.jpg (2 %)."),
        ({"rank": None, "probability": None}, "for “petal-red” (93 %), and its filters are read for “petal-red”."),
        ({"filters": []}, "(93 %). No filter that the class is read from is active in it. "),
    ],
)
def test_the_headline_of_other_classes(folder, change, words):
    changed(folder, lambda c: c["explained"][0].update(change))
    assert words in said(folder)


def test_one_filter_carries_the_evidence_alone(folder):
    changed(folder, lambda c: c["explained"][0].update(filters=c["explained"][0]["filters"][:1]))
    assert "(93 %). Filter 71 of conv3 carries 52 % of the evidence. " in said(folder)


def test_an_image_that_nothing_explains_says_what_it_is_taken_for_and_why(folder):
    changed(folder, lambda c: c.update(explained=[], method=None, notes=["its parts are not known"]))
    text = said(folder)
    assert "flower-net takes tulip_3.jpg for “petal-red” (93 %). What it rests on" in text
    assert "its parts are not known" in text
    assert "Settings" not in text


def test_both_classes_share_one_scale(folder):
    html = write_explanation_page(folder).read_text(encoding="utf-8")
    acts = re.findall(r'<div class="acts">.*?width:([\d.]+)%', html, re.DOTALL)
    shares = [0.52, 0.22, 0.12]
    wanted = [100 * share * (0.9 - 0.5 * k) / 0.468 for k in (0, 1) for share in shares]
    assert [float(width) for width in acts] == pytest.approx(wanted, abs=0.06)
    assert "predicted class, 93 %" in said(folder)
    assert "2nd of the answers, 4.4 %" in said(folder)
    assert "is shown next to the first" in render_page(collect_page(folder.parent.parent))


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
        "guided backpropagation from the 3 strongest features, stride artefacts removed",
        "photos/tulip_3.jpg, 640 × 480 px",
        "Dropout is off.",
    ):
        assert words in text, words


@pytest.mark.parametrize(("value", "alike"), [(0.9, False), (0.901, True)])
def test_maps_that_are_nearly_the_same_say_so(folder, value, alike):
    changed(folder, lambda c: c["explained"][1].update(rank_correlation=value))
    assert ("nearly the same, so they say little about the class" in said(folder)) is alike


def test_a_class_that_is_no_output_has_no_probability(folder):
    changed(folder, lambda c: c["explained"][0].update(output=None, rank=None, probability=None))
    text = said(folder)
    assert "petal-red not an output of the network" in text
    assert "nan" not in text.lower().split()


def test_one_class_alone(folder):
    changed(folder, lambda c: c.update(explained=c["explained"][:1]))
    text = write_explanation_page(folder).read_text(encoding="utf-8")
    assert text.count('<article class="column">') == 1
    assert 'class="columns single"' in text
    assert "is shown next to the first" not in text
    assert "is shown next to the first" not in render_page(collect_page(folder.parent.parent))


def test_a_folder_away_from_its_run_has_no_averages_unless_the_path_leads_to_them(folder, tmp_path):
    away = shutil.copytree(folder, tmp_path / "away")
    page = Page(write_explanation_page(away).read_text(encoding="utf-8"))
    assert len(page.attributes("src")) == 1 + 2 * (2 + 3)
    assert "In training" not in page.text

    def elsewhere(content):
        for feature in (f for e in content["explained"] for f in e["filters"]):
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
    monkeypatch.setattr("partlens.page.page.EXPLANATIONS_SHARE", 1e-6)
    page = collect_page(run)
    assert [e.record.image for e in page.explanations.shown] == ["rose.jpg"]
    assert page.explanations.without_room == ("tulip_3",)
    assert (
        "1 more explained image has no room, so that the page stays small; each has a page of its own"
        in Page(render_page(page)).text
    )


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
    changed(folder, lambda c: c.update(weights_sha256="cc33"))
    assert "Other weights." in Page(render_page(collect_page(run))).text


def test_an_image_of_an_earlier_selection_is_shown_without_its_filters_pictures(run, folder):
    assert "An earlier selection." not in Page(render_page(collect_page(run))).text
    path = run / "selection.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    MADE["write"](path, content | {"data": content["data"] | {"fingerprint": "others"}})
    for picture in (run / "pictures").glob("conv3-7?-average.png"):
        picture.unlink()
    assert "An earlier selection." in Page(render_page(collect_page(run))).text


def test_an_explainer_with_a_selection_that_was_only_begun(tmp_path):
    run = explainer_run(MADE["write_selection"](tmp_path / "run", classes=2, features=1))
    content = json.loads((run / "selection.json").read_text(encoding="utf-8"))
    content |= {"status": "running", "found": None, "command": "partlens go"}
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


def test_folders_that_are_none(tmp_path):
    with pytest.raises(RunError, match=r"^Expected the folder of an explanation, got .*nowhere\. Give a folder"):
        write_explanation_page(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"Expected a file .*explanation\.json, got nothing there\."):
        write_explanation_page(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "partlens.explanation/1"}, r"Expected schema partlens\.explanation/4 in .*, got partlens"),
        ({"image": None}, r"Expected image to be a valid string in .*, got None\. Run partlens explain again"),
        ({"explained": [{}]}, r"Expected the field explained\.0\.name of ExplanationRecord in .*explanation\.json"),
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
