"""The chapter of an inspection: what it says first, what it leaves out, and how large it gets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partlens.errors import RunError
from partlens.estimate import Estimate
from partlens.object_parts.inspection import (
    Comparison,
    DecidedClass,
    InspectConfig,
    InspectedCategory,
    InspectedPart,
    InspectedPhoto,
    InspectRecord,
)
from partlens.page.inspection_page import _KINDS, _kept_chart, _shares_bar
from partlens.page.page import collect_page, render_page, write_report
from partlens.run import DataInfo, PerformerInfo

AREAS = (0.1, 0.2, 0.3, 0.4)
CURVES = {
    "area": AREAS,
    "parts": (0.3, 0.5, 0.75, 0.8),
    "other_photos": (0.2, 0.4, 0.61, 0.7),
    "random": (0.1, 0.2, 0.3, 0.4),
    "centre": (0.2, 0.3, 0.5, 0.6),
    "rest": (0.0, 0.1, 0.1, 0.2),
    "ceiling": (0.4, 0.6, 0.8, 0.9),
}


def picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(str(path))).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path, quality=82)


def category(folder: Path, name: str, verdict: str = "parts", size: tuple[int, int] = (60, 20)) -> InspectedCategory:
    parts = []
    for number in (1, 2):
        file = f"inspect/{name}/part-{number}.jpg"
        picture(folder / file, size)
        parts.append(
            InspectedPart(
                id=f"part-{number}",
                name=f"part {number}",
                share=0.4,
                share_interval=(0.3, 0.5),
                loss=0.2,
                alone=0.3,
                movement=0.1,
                stability=0.9,
                place=(0.5, 0.5),
                spread=0.1,
                on_object=float("nan"),
                gallery=file,
            )
        )
    picture(folder / f"inspect/{name}/photo-1.jpg", size)
    photo = InspectedPhoto(
        image="a<b>.jpg",
        predicted="red fox",
        probability=0.9,
        shares=(0.4, 0.4, 0.2),
        standard_error=(0.0, 0.0, 0.0),
        losses=(0.1, 0.3, 0.2),
        kept=0.75,
        kept_other=0.61,
        places=((0.5, 0.5), (0.2, 0.2)),
        picture=f"inspect/{name}/photo-1.jpg",
    )
    return InspectedCategory(
        name=name,
        verdict=verdict,
        sentence=f"The network knows {name} by parts: 30% of the image around 2 parts keeps 75% of the score.",
        reason="",
        advantage=Estimate(0.12, (0.08, 0.15), 40),
        best_null="other_photos",
        against={kind: Comparison(advantage=0.12, threshold=0.04) for kind in ("other_photos", "random", "centre")},
        kept=CURVES,
        decisions=CURVES,
        windows=(1, 2, 2, 2),
        parts=tuple(parts),
        elsewhere=Estimate(0.2, (0.1, 0.3), 40),
        correlation=0.3,
        photos=60,
        measured=40,
        shared=40,
        undefined=0,
        held_out=True,
        decided=(DecidedClass(name="red fox", output=277, share=0.8),),
        shown=(photo,),
        notes=("something could not be done",),
    )


def inspection(folder: Path, categories: tuple[InspectedCategory, ...], status: str = "finished") -> Path:
    InspectRecord(
        created="2026-11-30T02:00:00+00:00",
        command="partlens inspect",
        versions={"partlens": "0.1.0"},
        performer=PerformerInfo(name="net", spec=None, weights_sha256="0" * 64, preprocessing={}),
        data=DataInfo(name="photos", path=None, fingerprint="1" * 64),
        status=status,
        config=InspectConfig(),
        split="train",
        tap="layer3",
        finding=("layer4",),
        fill="zero",
        categories=categories,
    ).write(folder)
    return folder


def test_the_page_leads_with_the_sentence_and_says_what_could_not_be_done(tmp_path: Path) -> None:
    text = render_page(collect_page(inspection(tmp_path, (category(tmp_path, "fox"),))))
    sentence = "30% of the image around 2 parts keeps 75% of the score"
    assert text.index(sentence) < text.index("Numbers and their nulls")
    assert text.index("Verdicts") < text.index("inspection-photos-title") < text.index("Numbers and their nulls")
    assert "something could not be done" in text
    assert "a&lt;b&gt;.jpg" in text
    assert "red fox (80" in text
    # Each figure says of how many photos it is, of which windows, and what it is compared with.
    plain = text.replace("\N{NO-BREAK SPACE}", " ")
    assert "mean of 40 photos, 95 % interval" in plain
    assert "40 % [30 %, 50 %]" in plain
    assert "30 % of the image around the first 2 parts keeps 75 % of the score, around those of another photo" in plain
    assert "<td>75 % (61 %)</td>" in plain


def test_a_photo_of_which_nothing_could_be_shared_says_so_in_place_of_dashes(tmp_path: Path) -> None:
    one = category(tmp_path, "fox")
    undefined = (float("nan"),) * 3
    lost = {"shares": undefined, "losses": undefined, "kept": float("nan"), "kept_other": float("nan")}
    photo = one.shown[0].model_copy(update=lost)
    text = render_page(collect_page(inspection(tmp_path, (one.model_copy(update={"shown": (photo,)}),))))
    assert "With no cell at all the score is as high, so there is nothing to share." in text
    assert "of the image around the first" not in text


def test_a_hundred_categories_stay_below_fifteen_megabytes(tmp_path: Path) -> None:
    many = tuple(category(tmp_path, f"kind-{number:03d}", size=(447, 200)) for number in range(100))
    page = write_report(inspection(tmp_path, many))
    text = page.read_text()
    assert len(text.encode()) < 15_000_000
    assert "Not all pictures." in text
    for one in many:
        assert one.sentence in text
    assert text.count("<details") > 100


def test_verdicts_of_several_categories_are_counted_in_the_headline(tmp_path: Path) -> None:
    both = (
        category(tmp_path, "fox"),
        category(tmp_path, "elephant", "texture"),
        category(tmp_path, "cow", "undecided"),
    )
    text = render_page(collect_page(inspection(tmp_path, both)))
    assert "net knows fox by parts; elephant by texture or the whole. Undecided: cow.</p>" in text.replace("\n", "")
    none = tuple(category(tmp_path, name, "undecided") for name in ("cow", "fox"))
    assert "Undecided: cow, fox." in render_page(collect_page(inspection(tmp_path, none)))


def test_an_inspection_that_was_only_begun_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="Go on with: partlens inspect"):
        collect_page(inspection(tmp_path, (), "running"))


def test_the_chart_names_each_curve_and_says_its_figures() -> None:
    chart = _kept_chart("Score kept", CURVES)
    for words in ("parts", "other photos", "random", "centre", "best window", "all the rest"):
        assert f">{words}</text>" in chart
    assert "parts 75 %" in chart
    looks = [class_ for _, _, class_ in _KINDS]
    assert len(set(looks)) == len(looks)  # no two curves look the same
    lowest = dict.fromkeys(CURVES, (0.0,) * 4) | {"area": AREAS}
    names = re.findall(r'y="([\d.]+)" text-anchor="start"', _kept_chart("Score kept", lowest))
    assert max(map(float, names)) < 150  # above the figures of the axis
    nothing = (float("nan"),) * 4
    assert _kept_chart("Score kept", dict.fromkeys(CURVES, nothing)) == ""


def test_a_bar_of_shares_has_a_slice_for_each_and_leaves_negative_ones_out() -> None:
    bar = _shares_bar("Shares", ["ear", "elsewhere"], [0.75, 0.25])
    assert 'width="224"' in bar
    assert 'class="rest"' in bar
    assert _shares_bar("Shares", ["ear"], [-0.1]) == ""
