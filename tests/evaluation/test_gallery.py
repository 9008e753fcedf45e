"""The gallery of a run: what is written, what it costs, and what is left untouched."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from partlens.data.images import ImageSet
from partlens.errors import InputError, StorageError
from partlens.evaluation import frames, gallery
from partlens.evaluation.frames import Frames, GalleryPlan
from partlens.evaluation.gallery import write_gallery
from partlens.evaluation.places import MeasuredPhotos, filter_scores
from partlens.evaluation.results import Gallery, GalleryKind
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, explainer_structure
from partlens.metrics.localisation import peaks_from_cells
from partlens.network import stream
from partlens.network.performer import Performer, weights_sha256
from partlens.network.receptive_field import grid_of
from partlens.network.taps import forward_taps
from partlens.records import plain

COARSE = {"stride_px": 11}


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
    labels = torch.zeros(len(rows), dtype=torch.long)
    on = MeasuredPhotos.of(few_flowers, rows, tiny, ("",), labels, seed=0)
    layers = {}
    with torch.no_grad():
        for name, maps in (("explainer", explainer.interpret(tapped)[1]), ("performer", tapped)):
            score, at = maps.flatten(2).max(-1)
            cells = torch.stack([at // maps.shape[3], at % maps.shape[3]], -1)
            peaks = peaks_from_cells(cells, score.double(), tuple(maps.shape[2:]), *grid_of(field))
            layers[name] = (peaks, filter_scores(on, peaks, torch.zeros(maps.shape[1], dtype=torch.long)))
    return {"frames": Frames(tiny, few_flowers, rows), "explainer": explainer, "layers": layers, "filters": 4}


def written(run: Path, made: Mapping[str, Any], kind: GalleryKind = "quick", **changes: Any) -> Gallery:
    plan = GalleryPlan.of(kind, changes.pop("fields", "occlusion"), (32, 32), changes.pop("occlusion", COARSE))
    made_now = write_gallery(run, plan=plan, **{**made, **changes})
    read = Gallery.read(run / "gallery")
    assert plain(read) == plain(made_now)
    return read


def test_everything_that_is_named_is_there(made: dict[str, Any], tmp_path: Path) -> None:
    content, folder = written(tmp_path, made), tmp_path / "gallery"
    assert content.kind == "quick"
    for layer in ("explainer", "performer"):
        assert 1 <= len(content.layers[layer]) <= 4
        for one in content.layers[layer]:
            assert math.isnan(one.reads_px) or one.reads_px > 0
            assert one.scores == made["layers"][layer][1][one.scores.filter]
            for photo in one.photos:
                for name in (photo.file, photo.region_file):
                    with Image.open(folder / str(name)) as picture:
                        assert picture.size == (32, 32)
    attention = content.attention
    assert len(attention.photos) == 6
    for photo in attention.photos:
        assert set(photo.maps) == {"interpretable", "tap", "top"}
        assert all((folder / name).exists() for name in (photo.file, *photo.maps.values()))
    for name, share in attention.concentration_frac.items():
        null = attention.random_frac[name]
        assert share.n + attention.empty[name] == null.n == min(24, len(made["frames"].rows))
        assert not share.defined or 0 < share.value <= 0.5
        assert null.interval[0] <= null.value <= null.interval[1]
    assert content.covering is not None
    side = content.covering.settings["occluder_px"]
    assert content.covering.places == math.ceil((32 - side + 1) / content.covering.settings["stride_px"]) ** 2
    assert content.theoretical_px == {"explainer": (23, 23), "performer": (7, 7)}
    assert content.covering.reads_px["explainer"].unit == "filters"
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]


def test_a_region_holds_its_peak_and_pictures_differ(made: dict[str, Any], tmp_path: Path) -> None:
    content, folder = written(tmp_path, made), tmp_path / "gallery"
    seen = set()
    for layer in ("explainer", "performer"):
        for one in content.layers[layer]:
            for photo in one.photos:
                plainly = np.asarray(Image.open(folder / photo.file).convert("L")).astype(int)
                drawn = np.asarray(Image.open(folder / str(photo.region_file)).convert("L")).astype(int)
                assert (drawn < plainly - 20).any()
                seen.add(drawn.tobytes())
    assert len(seen) > 3


def test_the_work_is_what_is_stated_and_shared_by_filters(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []
    forward = frames.forward_taps

    def counted(performer: Performer, batch: torch.Tensor, *rest: Any) -> Any:
        run.append(len(batch))
        return forward(performer, batch, *rest)

    monkeypatch.setattr(frames, "forward_taps", counted)
    monkeypatch.setattr(stream, "forward_taps", counted)
    done: list[float] = []
    content = written(tmp_path, made, advance=done.append)
    photos = {p.key for layer in content.layers.values() for f in layer for p in f.photos}
    covering = content.covering
    assert covering is not None
    attended = min(24, len(made["frames"].rows))
    assert sum(run) == 8 + covering.photos * covering.places + len(photos) + attended
    assert done == sorted(done)
    assert 0.5 < done[-1] <= 1
    run.clear()
    written(tmp_path, made, filters=2)
    fewer = sum(run)
    assert fewer < 1.01 * (8 + 8 * covering.places + len(photos) + attended)


def test_each_networks_filters_are_looked_up_in_its_own_maps(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    find = gallery.occlusion_receptive_fields

    def noted(map_of: Any, batch: torch.Tensor, receptive: Any, numbers: list[int], **settings: Any) -> Any:
        asked.extend(numbers)
        joined = map_of(batch[:2])
        tapped = forward_taps(made["frames"].performer, batch[:2], ["relu2"])[1]["relu2"]
        with torch.no_grad():
            masked = made["explainer"].masked(made["explainer"].interpret(tapped)[1])
        torch.testing.assert_close(joined, torch.cat([masked, tapped], 1), atol=1e-5, rtol=1e-4)
        return find(map_of, batch, receptive, numbers, **settings)

    monkeypatch.setattr(gallery, "occlusion_receptive_fields", noted)
    layers = written(tmp_path, made).layers
    ours, theirs = ([one.scores.filter for one in layers[name]] for name in ("explainer", "performer"))
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
    write_gallery(tmp_path, plan=GalleryPlan.of("none", "occlusion", (32, 32)), **made)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    write_gallery(tmp_path, plan=GalleryPlan.of("none", "occlusion", (32, 32)), **made)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stopped_gallery_leaves_the_earlier_one_whole(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any
) -> None:
    written(tmp_path, made, filters=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "gallery").iterdir()}

    def stop(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(gallery, "attention", stop)
        with pytest.raises((KeyboardInterrupt, StorageError)):
            written(tmp_path, made)
    assert {p.name: p.read_bytes() for p in (tmp_path / "gallery").iterdir()} == before
    (tmp_path / "gallery").rename(tmp_path / ".gallery-old")  # as a kill between the two steps of the swap leaves it
    assert len(written(tmp_path, made, filters=1).layers["explainer"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["gallery"]


def test_the_same_seed_gives_the_same_gallery_and_networks_are_borrowed(made: dict[str, Any], tmp_path: Path) -> None:
    performer, explainer = made["frames"].performer, made["explainer"]
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
        layers[name] = (replace(peaks, scores=torch.zeros_like(peaks.scores)), table)
    content = written(tmp_path, made, layers=layers)
    assert content.layers == {"explainer": (), "performer": ()}
    assert content.covering is None
    assert content.attention.photos


def test_feature_maps_peak_where_the_filter_does(made: dict[str, Any], tmp_path: Path) -> None:
    content, folder = written(tmp_path, made), tmp_path / "gallery"
    found = []
    for one in content.layers["performer"]:
        for photo in one.photos:
            plainly = np.asarray(Image.open(folder / photo.file).convert("RGB")).astype(int)
            drawn = np.asarray(Image.open(folder / photo.map_file).convert("RGB")).astype(int)
            brighter = (drawn - plainly).max(2)
            row, col = np.unravel_index(brighter.argmax(), brighter.shape)
            found.append(math.dist((col, row), photo.peak_px))
    assert np.median(found) < 8  # two cells of 4 px
    assert content.fields == "occlusion"


def test_nothing_is_covered_for_the_mask_and_settings_may_be_changed(made: dict[str, Any], tmp_path: Path) -> None:
    masked = written(tmp_path, made, fields="mask")
    assert masked.covering is None
    assert masked.theoretical_px == {"explainer": (23, 23), "performer": (7, 7)}
    assert all(math.isnan(one.reads_px) for one in masked.layers["performer"])
    assert {photo.region_file for one in masked.layers["explainer"] for photo in one.photos} == {None}
    changed = written(tmp_path, made, occlusion={"occluder_px": 9, "stride_px": 6}).covering
    assert changed is not None
    assert (changed.settings["occluder_px"], changed.settings["stride_px"]) == (9, 6)
    assert changed.places == math.ceil((32 - 9 + 1) / 6) ** 2
    with pytest.raises(InputError, match="Did you mean stride_px"):
        written(tmp_path, made, occlusion={"stride": 6})
