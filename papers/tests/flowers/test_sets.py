"""The benchmark's two sets: bytes, classes that need both parts, folds, regions, and the folder."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partlens.data.flowers import PARTS
from partlens.data.images import ImageSet
from partlens.errors import AtWorkError, InputError, RunError
from partlens.records import sole_writer
from partlens_papers.flowers import sets as flower_sets
from partlens_papers.flowers.categories import DOUBLE_CATEGORIES
from partlens_papers.flowers.drawing import flower_labels, render_flower
from partlens_papers.flowers.sets import FLOWER_SETS, FlowerSet, flower_set, make_flowers, open_flower_set

SINGLE, DOUBLE = FLOWER_SETS


def digest(flowers: FlowerSet, rows: range) -> str:
    pixels = b"".join(flowers.images.read(row).tobytes() for row in rows)
    return hashlib.sha256(pixels + flowers.labels(rows).tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "want"), [(SINGLE, "d6c16eff9c3af375"), (DOUBLE, "67f5a07b67b902b0")])
def test_pixels_and_labels_are_the_same_everywhere(name: str, want: str) -> None:
    assert digest(flower_set(name, 2), range(6)) == want


@pytest.mark.parametrize(("name", "classes"), [(SINGLE, 6), (DOUBLE, 12)])
def test_classes_splits_and_folds_are_balanced(name: str, classes: int) -> None:
    flowers = flower_set(name, 40, size=32)
    cells = Counter(zip(flowers.images.categories, flowers.images.splits, flowers.folds, strict=True))
    assert len(flowers.classes) == classes
    assert {cell: n for cell, n in cells.items() if cell[1] == "test"} == {
        (c, "test", fold): 2 for c in flowers.classes for fold in range(5)
    }
    assert {n for cell, n in cells.items() if cell[1] == "train"} == {6}
    assert flowers.classes == tuple(sorted(flowers.classes))
    held = flowers.rows("test", fold=3)
    assert len(held) == 2 * classes
    assert all(flowers.folds[row] == 3 and flowers.images.splits[row] == "test" for row in held)
    assert sorted(sum((flowers.rows(fold=k) for k in range(5)), ())) == list(range(40 * classes))


def test_a_larger_set_begins_with_a_smaller_one() -> None:
    small, large = (flower_set(DOUBLE, n, seed=3, size=32) for n in (5, 9))
    assert large.folds[:60] == small.folds
    assert large.images.splits[:60] == small.images.splits
    assert large.images.read(59) == small.images.read(59)
    assert flower_set(DOUBLE, 5, seed=4, size=32).images.read(59) != small.images.read(59)


def test_one_part_of_the_double_set_never_settles_the_class() -> None:
    petals, stems = (Counter(name.split("-")[k] for name in DOUBLE_CATEGORIES) for k in (1, 3))
    assert set(petals.values()) == set(stems.values()) == {2}
    pairs = Counter(frozenset((name.split("-")[1], name.split("-")[3])) for name in DOUBLE_CATEGORIES)
    assert len(pairs) == 6
    assert set(pairs.values()) == {2}  # nor do the two colours without their places


def test_the_colours_stand_where_the_category_says() -> None:
    red_on_blue = render_flower(5, "petal-red-stem-blue", size=96)
    blue_on_red = render_flower(5, "petal-blue-stem-red", size=96)
    for flower, petal, stem in ((red_on_blue, 0, 2), (blue_on_red, 2, 0)):
        assert flower.image[flower.masks["petal"]].mean(0).argmax() == petal
        assert flower.image[flower.masks["stem"]].mean(0).argmax() == stem
    changed = (red_on_blue.image != blue_on_red.image).any(-1)
    named = red_on_blue.masks["petal"] | red_on_blue.masks["stem"] | red_on_blue.masks["centre"]
    grown = np.zeros_like(named)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            grown |= np.roll(named, (dy, dx), (0, 1))
    assert changed[named].mean() > 0.95
    assert not changed[~grown].any()  # nothing else in the picture knows the class


def test_the_region_is_the_visible_deciding_parts() -> None:
    for name, parts in ((SINGLE, ("petal",)), (DOUBLE, ("petal", "stem"))):
        flowers = flower_set(name, 2, seed=1, size=64)
        assert flowers.parts == parts
        assert flowers.images.part_truth is not None
        assert flowers.images.part_truth.masks is not None
        for row in (0, 7):
            masks = flowers.images.part_truth.masks(flowers.images.keys[row])
            np.testing.assert_array_equal(flowers.part_regions([row])[0], np.stack([masks[p] for p in parts]))
            np.testing.assert_array_equal(flowers.regions([row])[0], np.any([masks[p] for p in parts], axis=0))
    labels = flower_labels(9, "petal-red", 64)
    for number, part in enumerate(PARTS, start=1):
        np.testing.assert_array_equal(labels == number, render_flower(9, "petal-red", 64).masks[part])


def test_the_folder_holds_the_same_set(tmp_path: Path) -> None:
    made = make_flowers(DOUBLE, out=tmp_path / "set", images_per_class=10, seed=2, size=32)
    files, drawn = open_flower_set(made), flower_set(DOUBLE, 10, seed=2, size=32)
    assert (files.name, files.parts, files.folds, files.classes) == (
        drawn.name,
        drawn.parts,
        drawn.folds,
        drawn.classes,
    )
    assert files.images.splits == drawn.images.splits
    assert files.images.categories == drawn.images.categories
    assert all(files.images.read(row) == drawn.images.read(row) for row in range(0, 120, 17))
    np.testing.assert_array_equal(files.part_regions(range(120)), drawn.part_regions(range(120)))
    key = files.images.keys[13]
    with Image.open(made / key.replace("images/", "masks/")) as mask:
        assert mask.mode == "L"
        np.testing.assert_array_equal(np.asarray(mask), drawn.regions([13])[0] * 255)
    opened = ImageSet.open(made)
    assert opened.keys == files.images.keys
    assert opened.part_truth is not None
    assert drawn.images.part_truth is not None
    order = [opened.part_truth.landmarks.index(part) for part in PARTS]
    np.testing.assert_allclose(
        opened.part_truth.positions_px[:, order], drawn.images.part_truth.positions_px, atol=6e-4, equal_nan=True
    )
    np.testing.assert_array_equal(opened.part_truth.sizes_px[:, order], drawn.images.part_truth.sizes_px)
    assert not list(made.rglob("*.tmp"))
    assert sorted(p.name for p in made.iterdir()) == sorted(
        ["images", "masks", "parts", "images.csv", "landmarks.csv", "flowers.json"]
    )


def test_the_manifest_vouches_for_the_pixels(tmp_path: Path) -> None:
    made = make_flowers(SINGLE, out=tmp_path / "set", images_per_class=4, size=32)
    manifest = json.loads((made / "flowers.json").read_text())
    digests = [
        hashlib.sha256(np.asarray(image).tobytes() + labels.tobytes()).hexdigest()
        for s in [open_flower_set(made)]
        for image, labels in ((s.images.read(row), s.labels([row])[0]) for row in range(24))
    ]
    assert manifest["pixels_sha256"] == hashlib.sha256("".join(digests).encode()).hexdigest()
    assert manifest["pixels_sha256"].startswith("ebcfa2a1979986e4")
    assert (manifest["images"], manifest["splits"]) == (24, {"test": 6, "train": 18})
    again = make_flowers(SINGLE, out=tmp_path / "again", images_per_class=4, size=32)
    for file in sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file()):
        assert (made / file).read_bytes() == (again / file).read_bytes()


def test_a_stopped_call_begins_again_and_a_finished_one_draws_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_flowers(SINGLE, out=tmp_path / "whole", images_per_class=20, size=32)
    real, drawn = flower_sets.render_flower, []

    def failing(seed: int, category: str, size: int) -> object:
        drawn.append(seed)
        if len(drawn) == 70:
            raise KeyboardInterrupt
        return real(seed, category, size)

    monkeypatch.setattr(flower_sets, "render_flower", failing)
    with pytest.raises(KeyboardInterrupt):
        make_flowers(SINGLE, out=tmp_path / "set", images_per_class=20, size=32)
    with pytest.raises(RunError, match="a finished flower set in .*, got an unfinished one. Run make-flowers"):
        open_flower_set(tmp_path / "set")
    made = make_flowers(SINGLE, out=tmp_path / "set", images_per_class=20, size=32)
    assert len(drawn) == 70 + 120
    assert (made / "flowers.json").read_text() == (whole / "flowers.json").read_text()
    assert (made / "images.csv").read_text() == (whole / "images.csv").read_text()
    make_flowers(SINGLE, out=tmp_path / "set", images_per_class=20, size=32)
    assert len(drawn) == 190


@pytest.mark.parametrize("moment", range(12))
def test_a_call_that_was_killed_anywhere_is_made_good_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    out, calls, real = tmp_path / "set", [], Path.replace

    def killed(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == moment + 1:
            Path(out / f".{'0' * 16}.tmp").write_text("")  # nothing is cleaned up after a kill
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make_flowers(SINGLE, out=out, images_per_class=2, size=32)
    monkeypatch.undo()
    made = make_flowers(SINGLE, out=out, images_per_class=2, size=32)
    assert len(open_flower_set(made).images) == 12
    assert not list(made.rglob(".*"))


def test_a_folder_made_by_hand_for_the_set_may_be_empty_and_a_second_caller_waits(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with sole_writer(tmp_path / "set"), pytest.raises(AtWorkError, match="set is locked by another process"):
        make_flowers(SINGLE, out=tmp_path / "set", images_per_class=1, size=32)
    make_flowers(SINGLE, out=tmp_path / "set", images_per_class=1, size=32)
    with sole_writer(tmp_path / "set"):  # a finished set is only read
        make_flowers(SINGLE, out=tmp_path / "set", images_per_class=1, size=32)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="flowers-single-6c, flowers-double-12c, got 'flowers'. Choose"):
        flower_set("flowers")
    with pytest.raises(InputError, match="images_per_class >= 1, got 0"):
        flower_set(SINGLE, 0)
    with pytest.raises(InputError, match="a fold from 0 to 4, got 5"):
        flower_set(SINGLE, 20).rows("test", fold=5)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="an empty folder at .*, got a folder with other files"):
        make_flowers(SINGLE, out=tmp_path / "other", images_per_class=1)
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["notes.txt"]
    make_flowers(SINGLE, out=tmp_path / "set", images_per_class=1, size=32)
    with pytest.raises(RunError, match="'seed': 1"):
        make_flowers(SINGLE, out=tmp_path / "set", images_per_class=1, seed=1, size=32)
