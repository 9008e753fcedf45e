"""The gallery of a run: what is written, what it costs, and what is left untouched."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from partlens.data.images import ImageSet
from partlens.errors import InputError
from partlens.evaluation.gallery import GalleryKind, attention, common, filters, write_gallery
from partlens.evaluation.places import filter_table, landmarks_in_input, photo_numbers
from partlens.explainer.assembly import build_explainer, explainer_structure, performer_head
from partlens.explainer.config import ExplainerConfig
from partlens.metrics.localisation import peaks_from_cells
from partlens.network.receptive_field import grid_of
from partlens.network.taps import forward_taps
from partlens.network.zoo import Performer, weights_sha256


@pytest.fixture
def made(tiny: Performer, few_flowers: ImageSet) -> dict[str, Any]:
    """Everything `write_gallery` takes, of an explainer that was not trained."""
    rows = few_flowers.indices(split="test")
    batch = tiny.preprocessing([few_flowers.read(i) for i in rows])
    structure = explainer_structure(tiny, batch, "relu2")
    explainer = build_explainer(tiny, structure, ExplainerConfig.preset("partlens", p_init=0.4))
    tapped = forward_taps(tiny, batch, ["relu2"])[1]["relu2"]
    explainer.start_norms(tapped)
    explainer.eval()
    field = tiny.field("relu2")
    names, landmarks = landmarks_in_input(few_flowers, rows, tiny)
    numbers = photo_numbers(few_flowers, rows)
    layers = {}
    with torch.no_grad():
        for name, maps in (("explainer", explainer.interpret(tapped)[1]), ("performer", tapped)):
            score, at = maps.flatten(2).max(-1)
            cells = torch.stack([at // maps.shape[3], at % maps.shape[3]], -1)
            peaks = peaks_from_cells(cells, score.double(), tuple(maps.shape[2:]), *grid_of(field))
            layers[name] = (peaks, filter_table(peaks, landmarks, names, (32, 32), numbers))
    return {
        "performer": tiny,
        "images": few_flowers,
        "rows": rows,
        "photos": numbers,
        "layers": layers,
        "receptive": field,
        "explainer": explainer,
        "head": performer_head(tiny, structure),
        "top": "relu4",
        "filters": 4,
    }


def written(run: Path, made: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    write_gallery(run, **{**made, **changes})
    content: dict[str, Any] = json.loads((run / "gallery" / "gallery.json").read_text(encoding="utf-8"))
    return content


def test_everything_that_is_named_is_there(made: dict[str, Any], tmp_path: Path) -> None:
    content = written(tmp_path, made)
    assert content["kind"] == "quick"
    for layer in ("explainer", "performer"):
        assert 1 <= len(content["layers"][layer]) <= 4
        for one in content["layers"][layer]:
            assert one["reads_px"] is None or one["reads_px"] > 0
            for photo in one["photos"]:
                for name in (photo["file"], photo["region_file"]):
                    with Image.open(tmp_path / name) as picture:
                        assert picture.size == (32, 32)
    attention = content["attention"]
    assert len(attention["photos"]) == 6
    for photo in attention["photos"]:
        assert set(photo["maps"]) == {"interpretable", "tap", "top"}
        assert all((tmp_path / name).exists() for name in (photo["file"], *photo["maps"].values()))
    for name, share in attention["concentration_frac"].items():
        null = attention["random_frac"][name]
        assert share["n"] + share["empty"] == null["n"] == min(24, len(made["rows"]))
        assert share["value"] is None or 0 < share["value"] <= 0.5
        assert null["interval"][0] <= null["value"] <= null["interval"][1]
    occlusion = content["occlusion"]
    side = occlusion["occluder_px"]
    assert occlusion["places"] == math.ceil((32 - side + 1) / occlusion["stride_px"]) ** 2
    assert occlusion["theoretical_px"] == {"explainer": [23, 23], "performer": [7, 7]}
    assert occlusion["reads_px"]["explainer"]["unit"] == "filters"
    left = {p.name for p in (tmp_path / "gallery").iterdir()}
    assert len([n for n in left if n.endswith(".tmp")]) == 0


def test_a_region_holds_its_peak_and_pictures_differ(made: dict[str, Any], tmp_path: Path) -> None:
    content = written(tmp_path, made)
    seen = set()
    for layer in ("explainer", "performer"):
        for one in content["layers"][layer]:
            for photo in one["photos"]:
                plain = np.asarray(Image.open(tmp_path / photo["file"]).convert("L")).astype(int)
                drawn = np.asarray(Image.open(tmp_path / photo["region_file"]).convert("L")).astype(int)
                assert (drawn < plain - 20).any()
                seen.add(drawn.tobytes())
    assert len(seen) > 3


def test_the_work_is_what_is_stated_and_shared_by_filters(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []
    forward = common.forward_taps

    def counted(performer: Performer, batch: torch.Tensor, names: list[str]) -> Any:
        run.append(len(batch))
        return forward(performer, batch, names)

    monkeypatch.setattr(common, "forward_taps", counted)
    monkeypatch.setattr(attention, "forward_taps", counted)
    done: list[float] = []
    content = written(tmp_path, made, advance=done.append)
    photos = {p["key"] for layer in content["layers"].values() for f in layer for p in f["photos"]}
    occlusion = content["occlusion"]
    attended = min(24, len(made["rows"]))
    assert sum(run) == 8 + occlusion["photos"] * occlusion["places"] + len(photos) + attended
    assert done == sorted(done)
    assert 0.5 < done[-1] <= 1
    run.clear()
    written(tmp_path, made, filters=2)
    fewer = sum(run)
    assert fewer < 1.01 * (8 + 8 * occlusion["places"] + len(photos) + attended)


def test_each_networks_filters_are_looked_up_in_its_own_maps(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    find = filters.occlusion_receptive_fields

    def noted(map_of: Any, batch: torch.Tensor, receptive: Any, numbers: list[int], **settings: Any) -> Any:
        asked.extend(numbers)
        joined = map_of(batch[:2])
        tapped = forward_taps(made["performer"], batch[:2], ["relu2"])[1]["relu2"]
        with torch.no_grad():
            masked = made["explainer"].masked(made["explainer"].interpret(tapped)[1])
        torch.testing.assert_close(joined, torch.cat([masked, tapped], 1), atol=1e-5, rtol=1e-4)
        return find(map_of, batch, receptive, numbers, **settings)

    monkeypatch.setattr(filters, "occlusion_receptive_fields", noted)
    layers = written(tmp_path, made)["layers"]
    ours, theirs = ([one["filter"] for one in layers[name]] for name in ("explainer", "performer"))
    assert asked == ours + [12 + k for k in theirs]


def test_an_earlier_gallery_goes_and_other_files_stay(made: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    folder.mkdir()
    for name in ("photo-99.jpg", "region-explainer-1-2.jpg", "notes.txt"):
        (folder / name).write_text("old")
    written(tmp_path, made)
    assert not (folder / "photo-99.jpg").exists()
    assert not (folder / "region-explainer-1-2.jpg").exists()
    assert (folder / "notes.txt").read_text() == "old"
    write_gallery(tmp_path, **made, gallery="none")
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_the_same_seed_gives_the_same_gallery_and_networks_are_borrowed(made: dict[str, Any], tmp_path: Path) -> None:
    performer, explainer = made["performer"], made["explainer"]
    performer.module.train()
    before = weights_sha256(performer.module), weights_sha256(explainer), torch.get_rng_state()
    written(tmp_path / "a", made)
    written(tmp_path / "b", made)
    files = sorted(p.name for p in (tmp_path / "a" / "gallery").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "b" / "gallery").iterdir())
    for name in files:
        assert (tmp_path / "a" / "gallery" / name).read_bytes() == (tmp_path / "b" / "gallery" / name).read_bytes()
    assert performer.module.training
    assert not any(m._forward_hooks for m in performer.module.modules())
    assert (weights_sha256(performer.module), weights_sha256(explainer)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_layer_without_live_filters_leaves_attention_alone(made: dict[str, Any], tmp_path: Path) -> None:
    layers = {}
    for name, (peaks, table) in made["layers"].items():
        layers[name] = (
            peaks._replace(scores=torch.zeros_like(peaks.scores))
            if hasattr(peaks, "_replace")
            else type(peaks)(**{**peaks.__dict__, "scores": torch.zeros_like(peaks.scores)}),
            table,
        )
    content = written(tmp_path, made, layers=layers)
    assert content["layers"] == {"explainer": [], "performer": []}
    assert "occlusion" not in content
    assert content["attention"]["photos"]


@pytest.mark.parametrize("kind", ["best", ""])
def test_other_kinds_are_refused(made: dict[str, Any], tmp_path: Path, kind: GalleryKind) -> None:
    with pytest.raises(InputError, match="quick, full or none"):
        write_gallery(tmp_path, **made, gallery=kind)


def test_feature_maps_peak_where_the_filter_does(made: dict[str, Any], tmp_path: Path) -> None:
    content = written(tmp_path, made)
    found = []
    for one in content["layers"]["performer"]:
        for photo in one["photos"]:
            plain = np.asarray(Image.open(tmp_path / photo["file"]).convert("RGB")).astype(int)
            drawn = np.asarray(Image.open(tmp_path / photo["map_file"]).convert("RGB")).astype(int)
            brighter = (drawn - plain).max(2)
            row, col = np.unravel_index(brighter.argmax(), brighter.shape)
            found.append(math.dist((col, row), photo["peak_px"]))
    assert np.median(found) < 8  # two cells of 4 px
    assert content["fields"] == "occlusion"


def test_fields_may_be_the_theory_and_settings_may_be_changed(made: dict[str, Any], tmp_path: Path) -> None:
    analytic = written(tmp_path, made, fields="analytic")
    assert "occlusion" not in analytic
    assert analytic["analytic"]["theoretical_px"] == {"explainer": [23, 23], "performer": [7, 7]}
    assert {one["reads_px"] for one in analytic["layers"]["performer"]} == {7.0}
    covered = {}
    for fields in ("analytic", "occlusion"):
        photo = written(tmp_path, made, fields=fields)["layers"]["explainer"][0]["photos"][0]
        covered[fields] = Image.open(tmp_path / photo["region_file"]).tobytes()
    assert covered["analytic"] != covered["occlusion"]
    changed = written(tmp_path, made, occlusion={"occluder_px": 9, "stride_px": 6})["occlusion"]
    assert (changed["settings"]["occluder_px"], changed["settings"]["stride_px"]) == (9, 6)
    assert changed["places"] == math.ceil((32 - 9 + 1) / 6) ** 2
    with pytest.raises(InputError, match="Did you mean stride_px"):
        written(tmp_path, made, occlusion={"stride": 6})
    with pytest.raises(InputError, match="fields to be occlusion or analytic, got 'round'"):
        written(tmp_path, made, fields="round")
