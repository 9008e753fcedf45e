"""What filters read and Grad-CAM on the page: words, numbers with their nulls, pictures, and runs without them."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

from partlens.page import collect_page, render_page

HERE = Path(__file__).parent
BUILD = runpy.run_path(str(HERE.parent / "gold" / "test_report_gold.py"))["build"]
Page = runpy.run_path(str(HERE / "page_reader.py"))["Page"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return BUILD(tmp_path / "run")


def changed(run: Path, change) -> Path:
    path = run / "gallery" / "gallery.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return run


def test_the_page_says_what_filters_read_beside_what_they_could(run):
    text = Page(render_page(collect_page(run))).text
    assert "the explainer's 32 px [30, 34] (n = 12, in theory up to 275 px)" in text
    assert "the performer's 48 px [41, 55] (n = 12, in theory up to 211 px)" in text
    assert "a square of 33 px at 121 places, 18 px apart, on 8 photos, 4 for each filter" in text
    assert "below 23 px nothing can be told apart" in text
    assert "reads 33 px" in text


def test_a_picture_of_what_is_read_takes_the_place_of_the_box(run):
    pictures = collect_page(run).explainer.gallery.explainer[0].pictures
    assert [p.box_px is None for p in pictures] == [False, True, False]
    assert pictures[1].uri != pictures[0].uri
    assert pictures[1].peak_px == (104.0, 88.0)
    (run / "gallery" / "region.jpg").unlink()  # then the photo and its box are shown
    pictures = collect_page(run).explainer.gallery.explainer[0].pictures
    assert pictures[1].box_px is not None
    assert pictures[1].uri is not None


def test_attention_stands_beside_its_null_with_its_count(run):
    html = render_page(collect_page(run))
    section = re.search(r'<section id="attention".*?</section>', html, re.DOTALL)[0]
    rows = [re.sub(r"<[^>]+>|\s+", " ", row) for row in re.findall(r"<tr role=.*?</tr>", section, re.DOTALL)][1:]
    assert len(rows) == 3
    for row, words in zip(
        rows,
        (
            ("conv-interp-2 at layer3", "5.20", "[4.20, 6.20]", "35.0", "24 photos"),
            ("layer3", "21.0", "23 photos"),
            ("layer4", "–"),
        ),
        strict=True,
    ):
        assert all(word in row for word in words), row
    assert "1 empty map left out" in rows[1]
    assert section.count("<svg") == 4
    assert section.count("for red fox &amp; co") >= 3
    assert '<a href="#attention"' in html


def test_one_layer_that_is_tap_and_top_has_one_row(run):
    changed(run, lambda c: c["attention"]["layers"].update(top="layer3"))
    section = re.search(r'<section id="attention".*?</section>', render_page(collect_page(run)), re.DOTALL)[0]
    assert section.count("<tr role=") == 3


def test_galleries_of_earlier_versions_are_shown_as_they_were(run):
    def older(content):
        del content["occlusion"], content["attention"]
        for layer in content["layers"].values():
            for one in layer:
                one.pop("reads_px")
                for photo in one["photos"]:
                    photo.pop("region_file", None)

    data = collect_page(changed(run, older))
    assert (data.explainer.gallery.reading, data.explainer.gallery.attention) == (None, None)
    text = Page(render_page(data)).text
    assert "the bright region what it looks at there" in text
    assert "Found by covering" not in text
    assert "Grad-CAM of both networks comes with" in text
    assert " reads " not in text.split("The photos that a filter answers to most")[1].split("Attention")[0]


def test_values_of_the_wrong_kind_count_as_missing(run):
    def wrong(content):
        content["occlusion"] |= {"places": "many", "reads_px": {"explainer": None}, "theoretical_px": [3]}
        content["attention"] |= {"size_px": [0, 1], "layers": None, "random_frac": "x"}
        content["attention"]["concentration_frac"] = {"tap": 7}
        content["attention"]["photos"] = [None, {"key": 3, "maps": ["x"], "file": "../run.json"}]

    Page(render_page(collect_page(changed(run, wrong))))


def test_every_picture_counts_towards_the_pages_size(run):
    gallery = collect_page(run).explainer.gallery
    assert len(gallery.uris) == 2 * 2 + 4
    assert all(uri.startswith("data:image/jpeg") for uri in gallery.uris)


def test_feature_maps_stand_under_the_photos_where_there_are_any(run):
    before = collect_page(run)
    assert "feature map" not in render_page(before)
    plain = len(before.explainer.gallery.uris)

    def with_maps(content):
        for one in content["layers"]["explainer"]:
            for photo in one["photos"]:
                photo["map_file"] = photo["file"]

    data = collect_page(changed(run, with_maps))
    html = render_page(data)
    assert "below each stands its feature map, bright where it answers" in html
    rows = re.findall(r'<div class="photos feature-maps">(.*?)</div>', html, re.DOTALL)
    assert len(rows) == len(data.explainer.gallery.explainer)
    assert "feature map of explainer filter" in rows[0]
    drawn = [p for one in data.explainer.gallery.explainer for p in one.pictures if p.map_uri]
    assert len(drawn) == 2  # the third photo's file is missing
    assert len(data.explainer.gallery.uris) == plain + len(drawn)


def test_round_fields_are_said_to_be_the_theory(run):
    def analytic(content):
        content["analytic"] = {"theoretical_px": content.pop("occlusion")["theoretical_px"]}

    text = Page(render_page(collect_page(changed(run, analytic)))).text
    assert "Nothing was covered: round fields as wide as filters could read in theory" in text
    assert "the explainer's 275 px, the performer's 211 px" in text
