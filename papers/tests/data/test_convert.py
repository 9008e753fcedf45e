"""Sets that are used as one, and what the converters write: boxes, margins, file names, masks and what is printed."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partlens.data.annotations import PartTruth
from partlens.data.check import check_data
from partlens.data.images import ImageSet
from partlens.errors import ImageError
from partlens_papers.cli import main
from partlens_papers.data.convert import _cut_truth, convert, join


def folder(path: Path, colours: dict[str, tuple[int, int, int]]) -> Path:
    for name, colour in colours.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), colour).save(path / name)
    return path


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    found = folder(tmp_path / "birds", {"crow/a.png": (1, 2, 3), "wren/b.png": (4, 5, 6), "wren/c.png": (7, 8, 9)})
    rows = ["image,landmark,x,y,width,height", "crow/a.png,beak,1,2,3,4", "wren/c.png,beak,3.1,1,,"]
    (found / "landmarks.csv").write_text("\n".join(rows) + "\n")
    (found / "masks/beak/crow").mkdir(parents=True)
    Image.fromarray(np.eye(4, 6, dtype=bool)).save(found / "masks/beak/crow/a.png.png")
    return found


@pytest.fixture
def others(tmp_path: Path) -> Path:
    return folder(tmp_path / "others", {"fox/a.png": (10, 0, 0), "cat/b.png": (20, 0, 0)})


def test_two_sets_open_as_one(birds: Path, others: Path, tmp_path: Path) -> None:
    out = tmp_path / "all"
    assert join(out, birds, background=others, category="bird").categories == {"background": 2, "bird": 3}
    images, alone = ImageSet.open(out), ImageSet.open(birds)
    assert images.path == out.resolve()
    assert images.keys == (*alone.keys, "background/cat/b.png", "background/fox/a.png")
    assert images.splits == alone.splits + ImageSet.open(others).splits
    assert images.photos[3:] == images.keys[3:]
    assert [images.read(row).getpixel((0, 0)) for row in (1, 4)] == [(4, 5, 6), (10, 0, 0)]
    truth, own = images.part_truth, alone.part_truth
    assert truth is not None
    assert own is not None
    assert truth.masks is not None
    np.testing.assert_array_equal(truth.positions_px[:3], own.positions_px)
    np.testing.assert_array_equal(truth.sizes_px[:3], own.sizes_px)
    assert truth.count() == {"beak": 2}
    np.testing.assert_array_equal(truth.masks("crow/a.png")["beak"], np.eye(4, 6, dtype=bool))
    assert not truth.masks("wren/b.png")["beak"].any()
    assert images.take([4, 0]).read(0).getpixel((0, 0)) == (10, 0, 0)


def test_the_folder_moves_with_its_photos(birds: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    shutil.move(birds, tmp_path / "here" / "birds")
    join(tmp_path / "here" / "table", tmp_path / "here" / "birds")
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert ImageSet.open(tmp_path / "there" / "table").readable()[1] == ()


def test_without_background_categories_and_parts_stay(birds: Path, others: Path, tmp_path: Path) -> None:
    assert join(tmp_path / "a", birds).categories == {"crow": 1, "wren": 2}
    assert join(tmp_path / "a", others).landmarks == {}
    assert ImageSet.open(tmp_path / "a").part_truth is None  # those of the earlier call are gone


def test_check_finds_the_same_photo_in_both_sets(birds: Path, others: Path, tmp_path: Path) -> None:
    (others / "fox" / "a.png").write_bytes((birds / "wren" / "b.png").read_bytes())
    join(tmp_path / "a", birds, background=others, category="bird")
    found = check_data(tmp_path / "a")
    assert found.duplicates == (("wren/b.png", "background/fox/a.png"),)
    assert found.landmarks == {"beak": {"bird": 2}}


def test_a_name_that_occurs_twice_is_refused(birds: Path, tmp_path: Path) -> None:
    folder(birds, {"background/x.png": (0, 0, 0)})
    with pytest.raises(ImageError, match=r"name once, got background/x\.png more than once"):
        join(tmp_path / "a", birds, background=folder(tmp_path / "b", {"x.png": (1, 1, 1)}))


def test_parts_move_with_the_cut_and_those_outside_are_named() -> None:
    position = np.array([[[4, 5], [12, 5]], [[4, 5], [1, 1]], [[4, 5], [np.nan, np.nan]]])
    size = np.ones((3, 2, 2))
    marked = np.array([[20, 10], [np.nan, np.nan], [9, 9]])
    truth = PartTruth(("head", "tail"), ("a", "b", "c"), position, size, marked)
    boxes = ((2.6, 1.4, 11.0, 9.0), (4.0, 5.0, 5.0, 6.0), (0.0, 0.0, 9.0, 9.0))
    moved = _cut_truth(truth, boxes, ((20, 10), (20, 10), (10, 9)))
    assert moved.positions_px[:, 0].tolist()[:2] == [[1, 4], [0, 0]]
    assert np.isnan(moved.positions_px[:, 1]).all()
    assert np.isnan(moved.positions_px[2]).all()
    assert moved.image_size_px.tolist()[:2] == [[8, 8], [1, 1]]
    assert [(part.key, part.landmark, part.reason) for part in moved.unused] == [
        ("a", "tail", "its centre (9, 4) is outside the image of 8x8 pixels"),
        ("b", "tail", "its centre (-3, -4) is outside the image of 1x1 pixels"),
        ("c", "head", "it was marked in 9x9 pixels, the photo has 10x9"),
    ]
    assert np.isnan(moved.sizes_px[0, 1]).all()
    assert moved.sizes_px[0, 0].tolist() == [1, 1]


def test_the_commands_say_what_they_wrote(
    birds: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "all")
    assert main(["join", out, str(birds), "--category", "bird", "--background", str(others)]) == 0
    said = capsys.readouterr().out
    for line in (f"{out}: 5 images", "  2 background", "  3 bird", "  landmark beak: 2"):
        assert line in said.splitlines()
    assert main(["convert", "cub", str(birds), out]) == 1
    assert "Expected CUB-200-2011 in" in capsys.readouterr().err


@pytest.mark.data
def test_a_real_data_set_as_background_is_shown_whole(shared: Path, birds: Path, tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    join(tmp_path / "a", birds, background=shared / "data" / "animal-part-raw-sample")
    images = ImageSet.open(tmp_path / "a")
    assert images.category_counts() == {"background": 12, "crow": 1, "wren": 2}
    with Image.open(images.files[-1]) as whole:
        assert images.size_px(14) == whole.size
    with (tmp_path / "a" / "images.csv").open() as handle:
        assert not any(Path(row["file"]).is_absolute() for row in csv.DictReader(handle))


def test_converted_again_and_converted_elsewhere_are_equal(birds: Path, tmp_path: Path) -> None:
    first = ImageSet.open(join(tmp_path / "a", birds).path)
    assert first.fingerprint() == ImageSet.open(join(tmp_path / "b/c", tmp_path / "a").path).fingerprint()
    with pytest.raises(ImageError, match=r"got no images\.txt and no images"):
        convert("cub", tmp_path / "none", tmp_path / "c")
