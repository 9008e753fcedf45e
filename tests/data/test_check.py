"""What ``check_data`` finds in folders and tables."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from partlens.data.check import check_data
from partlens.data.files import window_px
from partlens.data.images import ImageSet
from partlens.errors import ImageError
from partlens.records import plain


def photo(path, seed, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def table(path, header, rows):
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])


def test_a_plain_folder(tmp_path):
    for index in range(3):
        photo(tmp_path / "train" / "cat" / f"{index}.png", index)
    photo(tmp_path / "train" / "fox" / "0.png", 9, (30, 40))
    photo(tmp_path / "test" / "cat" / "copy.png", 1)
    (tmp_path / "test" / "cat" / "bad.png").write_text("no image")
    found = check_data(tmp_path, few=2)
    assert (found.kind, found.images) == ("folder", 5)
    assert found.categories == {"cat": 4, "fox": 1}
    assert found.splits == {"train": {"cat": 3, "fox": 1}, "test": {"cat": 1}}
    assert (found.smallest_px, found.largest_px) == ((12, 9), (30, 40))
    assert [item.key for item in found.unreadable] == ["test/cat/bad.png"]
    assert found.duplicates == (("test/cat/copy.png", "train/cat/1.png"),)
    assert found.warnings[0].startswith("the same photo is on both sides of the split (1 times: test/cat/copy.png")
    assert found.warnings[1] == "fewer than 2 images: fox in train (1), cat in test (1), fox in test (0)"
    assert (found.landmarks, found.sized, found.boxes, found.masks, found.notes) == ({}, {}, 0, False, ())
    assert found.fingerprint == ImageSet.open(tmp_path).readable()[0].fingerprint()
    text = "\n".join(found.lines())
    for piece in (
        "a folder of 5 images",
        "no landmarks",
        "unreadable: test/cat/bad.png",
        "warning: fewer",
    ):
        assert piece in text
    assert "box" not in text
    assert json.loads(json.dumps(plain(found)))["categories"] == {"cat": 4, "fox": 1}
    assert plain(found)["unreadable"][0]["key"] == "test/cat/bad.png"


def test_a_table_with_landmarks(tmp_path):
    for index in range(4):
        photo(tmp_path / f"{index}.png", min(index, 2))
    rows = [[f"{index}.png", kind, "train", name] for index, kind, name in zip(range(4), "aabb", "pqrr", strict=True)]
    rows = [[*row, 1, 2, left] for row, left in zip(rows, ("", 0, "", 0), strict=True)]
    table(tmp_path / "images.csv", ["image", "category", "split", "photo", "xmin", "id", "left"], rows)
    with pytest.raises(ImageError, match="no top and no right and no bottom"):
        check_data(tmp_path)
    rows = [row if row[-1] == "" else [*row, 0, 12, 9] for row in rows]
    rows = [row if row[-1] != "" else [*row, "", "", ""] for row in rows]
    header = ["image", "category", "split", "photo", "xmin", "id", "left", "top", "right", "bottom"]
    table(tmp_path / "images.csv", header, rows)
    marks = [["0.png", "head", 3, 4, 1, 5, 6], ["1.png", "head", 13, 4, 1, 5, ""], ["2.png", "tail", 3, 4, 2, "", ""]]
    table(tmp_path / "landmarks.csv", ["image", "landmark", "x", "y", "instances", "width", "height"], marks)
    found = check_data(tmp_path, few=0)
    assert (found.kind, found.boxes, found.masks) == ("table", 2, False)
    assert found.sized == {"head": 1, "tail": 0}
    assert [(part.key, part.reason) for part in found.unused_parts] == [("2.png", "it is there 2 times")]
    lines = found.lines()
    assert "  width 12 to 12 px, height 9 to 9 px; 2 cut to the boxes of the table" in lines
    assert "  columns of images.csv that are not used: xmin, id" in lines
    assert "  head                2          1" in lines
    assert "  part not used: 2.png, tail: it is there 2 times" in lines
    assert found.landmarks == {"head": {"a": 2}, "tail": {}}
    assert found.duplicates == ()  # both copies are named as one photo
    assert found.warnings == (
        "every image is in the split 'train'; nothing is held out to measure on",
        "landmarks outside their image: 1.png head",
        "landmarks without a single position: tail",
    )


def test_one_photo_in_two_categories(tmp_path):
    photo(tmp_path / "cat" / "0.png", 1)
    photo(tmp_path / "fox" / "0.png", 1)
    warnings = check_data(tmp_path, few=0).warnings
    assert any(text == "the same photo is in several categories: cat/0.png = fox/0.png" for text in warnings)


def test_long_lists_are_cut_and_counted(tmp_path):
    photo(tmp_path / "cat00" / "good.png", 1)
    for index in range(45):
        photo(tmp_path / f"cat{index:02d}" / "a.png", index)
    for index in range(7):
        (tmp_path / "cat00" / f"bad{index}.png").touch()
    lines = check_data(tmp_path, few=0).lines()
    assert "  5 more categories" in lines
    assert "  unreadable: 2 more" in lines


def test_class_index_is_the_category_where_there_is_no_other(tmp_path):
    photo(tmp_path / "a.png", 1)
    table(tmp_path / "images.csv", ["image", "class_index"], [["a.png", 305]])
    assert ImageSet.open(tmp_path).categories == ("305",)
    table(tmp_path / "images.csv", ["image", "class_index", "category"], [["a.png", 305, "fox"]])
    assert ImageSet.open(tmp_path).categories == ("fox",)


def test_enough_images_and_landmarks_at_the_border_are_no_warning(tmp_path):
    for name in ("train/a/0.png", "train/a/1.png", "test/a/2.png", "test/a/3.png"):
        photo(tmp_path / name, int(name[-5]))
    places = [("train/a/0.png", 0, 9), ("train/a/1.png", 12, 0), ("test/a/2.png", 3, -0.5), ("test/a/3.png", 3, 9.5)]
    table(tmp_path / "landmarks.csv", ["image", "landmark", "x", "y"], [[key, "eye", x, y] for key, x, y in places])
    found = check_data(tmp_path, few=2)
    assert found.warnings == ("landmarks outside their image: test/a/2.png eye, test/a/3.png eye",)
    assert check_data(tmp_path, few=3).warnings[0] == "fewer than 3 images: a in train (2), a in test (2)"


def test_nothing_there(tmp_path):
    with pytest.raises(ImageError, match="nothing there"):
        check_data(tmp_path / "none")


@given(
    box=st.tuples(*[st.floats(-50, 150, width=32)] * 4),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
)
def test_windows_stay_inside_and_hold_every_pixel_whose_middle_the_box_holds(box, size):
    box = (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
    left, top, right, bottom = window_px(box, size)
    assert 0 <= left <= right <= size[0]
    assert 0 <= top <= bottom <= size[1]
    assert [col for col in range(size[0]) if box[0] < col + 0.5 <= box[2]] == [*range(left, right)]
    assert [row for row in range(size[1]) if box[1] < row + 0.5 <= box[3]] == [*range(top, bottom)]


@pytest.mark.data
def test_the_real_folders(shared):
    images = ImageSet.open(shared / "data" / "imagenet-compatible")
    assert images.categories[:3] == ("305", "883", "243")
    digits = np.load(shared / "data" / "mnist-sample.npz")
    small = ImageSet.from_arrays(digits["x_test"][:5], categories=digits["y_test"][:5])
    assert (small.categories, small.read(0).size) == (("7", "2", "1", "0", "4"), (28, 28))


@pytest.mark.data
def test_the_real_tables_are_described_as_they_are(shared, tmp_path):
    lines = check_data(some_of(shared / "data" / "voc-part", tmp_path, 40)).lines()
    assert "  columns of images.csv that are not used: object, xmin, ymin, xmax, ymax" in lines
    assert not any("none" in line for line in lines)
    assert any(line.split()[:1] == ["head"] and line.split()[1] == line.split()[2] for line in lines)


def some_of(folder, out, count):
    """A table of the first images of another."""
    rows = (folder / "images.csv").read_text().splitlines()
    header, *rows = (line.split(",") for line in rows[: count + 1])
    table(out / "images.csv", ["file", *header], [[folder / row[0], *row] for row in rows])
    (out / "landmarks.csv").symlink_to(folder / "landmarks.csv")
    return out
