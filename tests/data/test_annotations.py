"""Landmark tables and the rows of PartTruth."""

from pathlib import Path

import numpy as np
import pytest

from partlens.data.annotations import PartTruth, UnusedPart, _read_landmark_table
from partlens.errors import ImageError

HEADER = "image,landmark,x,y,width,height,instances\n"
DATA = Path(__file__).parents[3] / "shared" / "data" / "animal-part"


def write(folder: Path, rows: str, header: str = HEADER) -> Path:
    path = folder / "landmarks.csv"
    path.write_text(header + rows, encoding="utf-8")
    return path


def test_positions_sizes_and_order(tmp_path):
    truth = _read_landmark_table(write(tmp_path, "b.jpg,legs,1,2,3,4,1\na.jpg,head,5.5,6,7,8,1\nb.jpg,head,9,10,,,1\n"))
    assert truth.keys == ("b.jpg", "a.jpg")
    assert truth.landmarks == ("head", "legs")
    assert truth.positions_px.dtype == np.float32
    np.testing.assert_array_equal(truth.positions_px, [[[9, 10], [1, 2]], [[5.5, 6], [np.nan, np.nan]]])
    np.testing.assert_array_equal(truth.sizes_px, [[[np.nan, np.nan], [3, 4]], [[7, 8], [np.nan, np.nan]]])
    assert np.isnan(truth.image_size_px).all()
    assert truth.count() == {"head": 2, "legs": 1}


@pytest.mark.parametrize(
    ("rows", "times"),
    [
        ("a.jpg,head,1,2,3,4,2\n", 2),
        ("a.jpg,head,1,2,3,4,0\n", 0),
        ("a.jpg,head,1,2,3,4,1\na.jpg,head,5,6,3,4,1\n", 2),
        ("a.jpg,head,1,2,3,4,1\na.jpg,head,5,6,3,4,3\n", 4),
    ],
    ids=["two-instances", "none", "two-rows", "both"],
)
def test_only_single_instances_are_known(tmp_path, rows, times):
    truth = _read_landmark_table(write(tmp_path, rows + "a.jpg,legs,1,1,1,1,1\n"))
    assert truth.count() == {"head": 0, "legs": 1}
    assert np.isnan(truth.sizes_px[0, 0]).all()
    assert truth.unused == ((UnusedPart("a.jpg", "head", f"it is there {times} times"),) if times else ())


def test_a_row_without_instances_does_not_hide_another(tmp_path):
    truth = _read_landmark_table(write(tmp_path, "a.jpg,head,1,2,3,4,1\na.jpg,head,5,6,3,4,0\n"))
    assert truth.positions_px.tolist() == [[[1, 2]]]


def test_optional_columns_may_be_missing(tmp_path):
    truth = _read_landmark_table(write(tmp_path, "a.jpg,head,1,2\n", header="image,landmark,x,y\n"))
    assert truth.positions_px.tolist() == [[[1, 2]]]
    assert np.isnan(truth.sizes_px).all()


@pytest.mark.parametrize(
    ("header", "rows", "text"),
    [
        (
            "image,part,x,y\n",
            "a,head,1,2\n",
            r"columns image, landmark, x, y in .* got the columns image, x, y, part. Add or rename landmark",
        ),
        (HEADER, "a.jpg,head,1,2,3,4,1\na.jpg,legs,one,2,3,4,1\n", r"column 'x' of .*row 3, got 'one'"),
        (HEADER, "a.jpg,head,1,,3,4,1\n", r"column 'y' of .*row 2, got ''"),
        (HEADER, "a.jpg,head,nan,2,3,4,1\n", r"column 'x' of .*row 2, got 'nan'"),
        (HEADER, "a.jpg,head,1,2,-3,4,1\n", r">= 0 in column 'width' of .*row 2, got '-3'"),
        (HEADER, "a.jpg,head,1,2,3,4,1.5\n", r"whole number .*row 2, got 1.5"),
        (HEADER, ",head,1,2,3,4,1\n", r"a name in column 'image' of .*row 2"),
        (HEADER, "", r"at least one landmark"),
        ("", "", r"columns \(none\)"),
    ],
)
def test_a_bad_table_is_named_by_row_and_column(tmp_path, header, rows, text):
    with pytest.raises(ImageError, match=text):
        _read_landmark_table(write(tmp_path, rows, header))


def test_a_missing_or_binary_table_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match="nothing there"):
        _read_landmark_table(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"image\n\xff\xfe\x80image")
    with pytest.raises(ImageError, match="text in UTF-8 or UTF-16 in .*binary.csv, got other bytes in row 2"):
        _read_landmark_table(tmp_path / "binary.csv")


def test_for_keys_keeps_masks_and_fills_with_nan():
    mask = {"head": np.ones((2, 2), bool)}
    truth = PartTruth(
        ("head",), ("a", "b"), np.ones((2, 1, 2)), np.zeros((2, 1, 2)), np.full((2, 2), 2.0), lambda _: mask
    )
    chosen = truth.for_keys(["c", "b"])
    assert chosen.keys == ("c", "b")
    np.testing.assert_array_equal(chosen.positions_px[:, 0], [[np.nan, np.nan], [1, 1]])
    np.testing.assert_array_equal(chosen.image_size_px, [[np.nan, np.nan], [2, 2]])
    assert chosen.masks is not None
    assert chosen.masks("b") is mask
    assert len(truth.for_keys([])) == 0


def test_wrong_shapes_and_repeated_names_are_refused():
    with pytest.raises(ImageError, match=r"positions_px of shape \(1, 2, 2\)"):
        PartTruth(("head", "leg"), ("a",), np.ones((1, 1, 2)), np.ones((1, 2, 2)), np.ones((1, 2)))
    with pytest.raises(ImageError, match="every image name once, got a"):
        PartTruth(("head",), ("a", "a"), np.ones((2, 1, 2)), np.ones((2, 1, 2)), np.ones((2, 2)))


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the animal-part photos are not beside the checkout")
def test_animal_part_landmarks():
    truth = _read_landmark_table(DATA / "landmarks.csv")
    assert truth.landmarks == ("front_legs", "head")
    assert sum(truth.count().values()) == 1882
