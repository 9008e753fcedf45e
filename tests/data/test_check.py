"""What ``check_data`` finds in every layout, and how layouts are told apart."""

import csv
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from partlens.data.check import check_data
from partlens.data.images import ImageSet
from partlens.data.listing import window_px
from partlens.errors import ImageError, InputError
from partlens_papers.data.layouts import LAYOUTS, layout_of


def photo(path, seed, size=(12, 9)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def table(path, header, rows):
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])


def test_a_plain_folder_and_why_it_is_no_data_set(tmp_path):
    for index in range(3):
        photo(tmp_path / "train" / "cat" / f"{index}.png", index)
    photo(tmp_path / "train" / "fox" / "0.png", 9, (30, 40))
    photo(tmp_path / "test" / "cat" / "copy.png", 1)
    (tmp_path / "test" / "cat" / "bad.png").write_text("no image")
    found = check_data(tmp_path, few=2)
    assert (found.layout, found.images) == ("folder", 5)
    assert found.categories == {"cat": 4, "fox": 1}
    assert found.splits == {"train": {"cat": 3, "fox": 1}, "test": {"cat": 1}}
    assert (found.smallest_px, found.largest_px) == ((12, 9), (30, 40))
    assert [item.key for item in found.unreadable] == ["test/cat/bad.png"]
    assert found.duplicates == (("test/cat/copy.png", "train/cat/1.png"),)
    assert found.warnings[0].startswith("the same photo stands on both sides of the split (1 times: test/cat/copy.png")
    assert found.warnings[1] == "fewer than 2 images: fox in train (1), cat in test (1), fox in test (0)"
    assert set(found.not_in_layout) == {layout.name for layout in LAYOUTS}
    assert all(found.not_in_layout.values())
    assert (found.landmarks, found.boxes, found.masks) == ({}, 0, False)
    assert found.fingerprint == ImageSet.open(tmp_path).readable()[0].fingerprint()
    text = "\n".join(found.lines())
    for piece in (
        "5 images",
        "not cub: no images.txt",
        "no landmarks",
        "unreadable: test/cat/bad.png",
        "warning: fewer",
    ):
        assert piece in text
    assert json.loads(json.dumps(found.to_dict()))["categories"] == {"cat": 4, "fox": 1}


def test_a_table_with_landmarks(tmp_path):
    for index in range(4):
        photo(tmp_path / f"{index}.png", min(index, 2))
    rows = [[f"{index}.png", kind, "train", name] for index, kind, name in zip(range(4), "aabb", "pqrr", strict=True)]
    table(tmp_path / "images.csv", ["image", "category", "split", "photo"], rows)
    marks = [["0.png", "head", 3, 4, 1], ["1.png", "head", 13, 4, 1], ["2.png", "tail", 3, 4, 2]]
    table(tmp_path / "landmarks.csv", ["image", "landmark", "x", "y", "instances"], marks)
    found = check_data(tmp_path, few=0)
    assert (found.layout, found.not_in_layout) == ("table", {})
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
    assert any(text == "the same photo stands in several categories: cat/0.png = fox/0.png" for text in warnings)


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


def test_a_margin_needs_boxes(tmp_path):
    photo(tmp_path / "a.png", 1)
    with pytest.raises(InputError, match="margin_frac 0 for images without boxes"):
        ImageSet.open(tmp_path, margin_frac=0.1)
    with pytest.raises(ImageError, match="nothing there"):
        check_data(tmp_path / "none")
    assert layout_of(tmp_path) is None


@given(
    box=st.tuples(*[st.floats(-50, 150)] * 4),
    size=st.tuples(st.integers(1, 100), st.integers(1, 100)),
    margin=st.floats(0, 2),
)
def test_windows_stay_inside_and_grow_with_the_margin(box, size, margin):
    box = (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
    left, top, right, bottom = window_px(box, size, margin)
    assert 0 <= left <= right <= size[0]
    assert 0 <= top <= bottom <= size[1]
    narrow = window_px(box, size)
    assert left <= narrow[0]
    assert right >= narrow[2]


@pytest.mark.data
def test_the_real_folders(shared):
    birds = check_data(shared / "data" / "CUB_200_2011")
    assert (birds.layout, birds.images, birds.boxes, birds.unreadable, birds.duplicates) == ("cub", 779, 779, (), ())
    assert {name: sum(counts.values()) for name, counts in birds.splits.items()} == {"train": 420, "test": 359}
    images = ImageSet.open(shared / "data" / "imagenet-compatible")
    assert images.categories[:3] == ("305", "883", "243")
    digits = np.load(shared / "data" / "mnist-sample.npz")
    small = ImageSet.from_arrays(digits["x_test"][:5], categories=digits["y_test"][:5])
    assert (small.categories, small.read(0).size) == (("7", "2", "1", "0", "4"), (28, 28))
