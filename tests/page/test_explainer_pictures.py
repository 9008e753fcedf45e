"""What filters read and Grad-CAM on the page: words, numbers with their nulls, pictures."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from partlens.page.page import collect_page, render_page
from partlens.page.views import Pictures

HERE = Path(__file__).parent
MADE = SimpleNamespace(**runpy.run_path(str(HERE / "made_explainer.py")))
Page = runpy.run_path(str(HERE / "page_reader.py"))["Page"]


def page(folder: Path, **changes: Any) -> str:
    """Return the page of a run whose gallery has some fields changed."""
    return render_page(collect_page(MADE.write_run(folder / "run", pictures=MADE.gallery(**changes))))


def attention_of(html: str) -> str:
    return re.search(r'<section id="attention".*?</section>', html, re.DOTALL)[0]


def test_the_page_says_what_filters_read_and_what_they_could(tmp_path):
    text = Page(page(tmp_path)).text
    assert "the explainer's 32 px [30, 34] (n = 12, in theory up to 275 px)" in text
    assert "the performer's 48 px [41, 55] (n = 12, in theory up to 211 px)" in text
    assert "a square of 33 px at 121 places, 18 px apart, on 8 photos, 4 for each filter" in text
    assert "below 23 px nothing can be told apart" in text
    assert "reads 33 px" in text


def test_a_picture_of_what_is_read_takes_the_place_of_the_box(tmp_path):
    html = page(tmp_path)
    photos = re.findall(r'<svg viewBox="0 0 224 224".*?</svg>', html[html.index('class="card explainer"') :], re.DOTALL)
    assert ['class="dim"' in photo for photo in photos[:3]] == [True, False, True]
    assert all('class="peak"' in photo for photo in photos[:3])
    assert photos[0].count("data:image") == photos[1].count("data:image") == 1
    uris = [re.search(r'href="(data:[^"]+)"', photo)[1] for photo in photos[:2]]
    assert uris[0] != uris[1]


def test_attention_has_its_null_and_its_count(tmp_path):
    section = attention_of(page(tmp_path))
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
    assert "1 empty map not counted" in rows[1]
    assert section.count("<svg") == 4
    assert section.count("for red fox &amp; co") >= 3


def test_one_layer_that_is_tap_and_top_has_one_row(tmp_path):
    of = MADE.gallery().attention
    layers = {**of.layers, "top": "layer3"}
    section = attention_of(page(tmp_path, attention=type(of)(**{**dict(of), "layers": layers})))
    assert section.count("<tr role=") == 3


def test_every_picture_counts_towards_the_pages_size(tmp_path):
    run = MADE.write_run(tmp_path / "run")
    pictures = Pictures(run, "", 10**7)
    data = collect_page(run).explainer
    assert set(data.pictures) == {"0.jpg", "region.jpg", "2.jpg", "1.jpg", *(f"map-{i}.jpg" for i in range(3))}
    for name in data.pictures:
        pictures.read(run / "gallery", name)
    assert pictures.spent_bytes == sum(map(len, data.pictures.values()))


def test_feature_maps_are_under_the_photos(tmp_path):
    html = page(tmp_path)
    assert "below each is its feature map, bright where it activates" in html
    rows = re.findall(r'<div class="photos feature-maps">(.*?)</div>', html, re.DOTALL)
    assert len(rows) == 3
    assert "feature map of explainer filter 12" in rows[0]
    assert rows[0].count("<svg") == 3


@pytest.mark.parametrize("numbers", [(1, 2), (0, 1)])
def test_networks_with_fewer_filters_leave_empty_cards(tmp_path, numbers):
    ours, theirs = numbers
    layers = MADE.gallery().layers
    layers = {"explainer": layers["explainer"][:ours], "performer": layers["explainer"][:theirs]}
    assert page(tmp_path, layers=layers).count('<div class="card empty"></div>') == 1


def test_without_covering_the_line_is_round_what_the_mask_keeps(tmp_path):
    text = Page(page(tmp_path, fields="mask", covering=None)).text
    assert "inside the white line lies what the mask keeps around it" in text
    assert "a filter of the explainer could read 275 px, one of the performer 211 px" in text
    assert "Of the filters shown" not in text
