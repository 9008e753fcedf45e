"""ILSVRC Animal-Part in its own layout: MATLAB files of both kinds, and the same crops as the table of it."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from partlens.data.images import ImageSet
from partlens.errors import ImageError
from partlens_papers.data.convert import convert
from partlens_papers.data.layouts import layout_of
from partlens_papers.data.listing import Choice


def converted(folder, **options):
    """The result of a conversion."""
    out = folder.parent / f"{folder.name}-converted"
    shutil.rmtree(out, ignore_errors=True)
    return convert("animal-part", folder, out, **options)


def opened(folder, **options):
    """What partlens opens after a conversion."""
    return ImageSet.open(converted(folder, **options).path)


def struct_array(rows: list[dict]) -> np.ndarray:
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in rows[0]])
    for column, row in enumerate(rows):
        array[0, column] = tuple(row.values())
    return array


def box(xmin, ymin, xmax, ymax, form=float) -> dict:
    return {"bndbox": {"xmin": form(xmin), "xmax": form(xmax), "ymin": form(ymin), "ymax": form(ymax)}}


def mark(centres, scales, obj=()) -> dict:
    return {"pHW_center": np.array(centres, float), "pHW_scale": np.array(scales, float), "obj": obj}


NONE = mark(np.zeros((0, 0)), np.zeros((0, 0)), np.zeros((0, 0)))
BOXES = [box(11, 5, 30, 14), box(1, 1, 40, 30), box(21, 1, 40, 30)]
HEADS = [mark([[112], [56]], [[22.4], [44.8]]), mark([[1, 2], [3, 4]], [[5, 6], [7, 8]]), NONE]


@pytest.fixture
def animals(tmp_path):
    photos = tmp_path / "det" / "n02118333_obj" / "img" / "img"
    photos.mkdir(parents=True)
    for index, shade in ((1, 30), (2, 200), (3, 200)):  # 2 and 3 are objects of one photo
        Image.new("RGB", (40, 30), (shade, 0, 0)).save(photos / f"{index:05d}.jpg")
    savemat(photos.parent / "data.mat", {"samples": struct_array([{"class": 1.0, "obj": entry} for entry in BOXES])})
    save_truth(tmp_path, 1, HEADS)
    save_truth(tmp_path, 2, [mark([[224], [224]], [[10], [10]]), NONE, mark([[56], [112]], [[1], [2]])])
    return tmp_path


def save_truth(folder: Path, part: int, rows: list[dict], number="n02118333") -> None:
    path = folder / "code" / "truth" / number / f"truth_part{part:02d}.mat"
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, {"truth": struct_array(rows)})


def test_objects_are_cut_and_copies_of_a_photo_are_one_group(animals):
    assert layout_of(animals).name == "animal-part"
    images = opened(animals)
    assert images.keys == tuple(f"det/n02118333_obj/img/img/{i:05d}.jpg" for i in (1, 2, 3))
    assert images.categories == ("fox",) * 3
    assert [images.size_px(i) for i in range(3)] == [(20, 10), (40, 30), (20, 30)]
    assert images.photos[1] == images.photos[2] != images.photos[0]
    assert images.splits[1] == images.splits[2]
    assert converted(animals).left_out == ()


def test_marks_return_from_the_square_to_the_crop(animals):
    truth = opened(animals).part_truth
    assert truth.landmarks == ("front_legs", "head")
    # row 112, column 56 of 224 in a box of 20x10 pixels
    np.testing.assert_allclose(truth.positions_px[0, 1], [5, 5], rtol=1e-6)
    np.testing.assert_allclose(truth.sizes_px[0, 1], [4, 1], rtol=1e-6)
    assert truth.positions_px[0, 0].tolist() == [20, 10]
    assert np.isnan(truth.positions_px[1]).all()
    assert truth.count() == {"head": 1, "front_legs": 2}
    assert [(part.key[-9:], part.landmark, part.reason) for part in converted(animals).unused_parts] == [
        ("00002.jpg", "head", "it is there 2 times")
    ]


def test_whole_photos_stand_once(animals):
    whole = opened(animals, crop="photo")
    assert [key[-9:] for key in whole.keys] == ["00001.jpg", "00002.jpg"]
    assert whole.size_px(1) == (40, 30)
    np.testing.assert_allclose(whole.part_truth.positions_px[0, 1], [15, 9], rtol=1e-6)
    np.testing.assert_allclose(whole.part_truth.positions_px[1, 0], [30, 7.5], rtol=1e-6)  # of the second object


def test_without_data_mat_the_truth_files_give_the_boxes(animals):
    (animals / "det/n02118333_obj/img/data.mat").unlink()
    rows = [{**row, "obj": entry} for row, entry in zip(HEADS, (box(0, 5, 30, 14, str), NONE["obj"], NONE["obj"]))]  # noqa: B905
    save_truth(animals, 1, rows)
    save_truth(animals, 2, [NONE, NONE, {**NONE, "obj": box(21, 1, 40, 30, str)}])
    images = opened(animals)
    assert [images.size_px(i) for i in range(2)] == [(30, 10), (20, 30)]
    assert [(item.key[-9:], item.reason) for item in converted(animals).left_out] == [
        ("00002.jpg", "no annotation file holds its box")
    ]
    assert "no data.mat" in layout_of(animals).read(animals, Choice()).notes[0]


def test_unknown_numbers_background_and_photos_alone(animals):
    (animals / "det/n02118333_obj").rename(animals / "det/n99999999_obj")
    (animals / "neg").mkdir()
    Image.new("RGB", (9, 8)).save(animals / "neg" / "00001.JPEG")
    images = opened(animals)
    assert images.category_counts() == {"background": 1, "n99999999": 3}
    assert images.size_px(3) == (9, 8)
    assert images.part_truth.count() == {"head": 0, "front_legs": 0}
    notes = layout_of(animals).read(animals, Choice()).notes
    assert "n99999999 is none of the data set's thirty categories" in notes[0]
    assert notes[1] == "n99999999: no truth_part files, so no landmarks"
    assert opened(animals / "det").part_truth is None


def test_objects_without_photo_and_empty_boxes_are_named(animals):
    (animals / "det/n02118333_obj/img/img/00001.jpg").unlink()
    boxes = [*BOXES[:2], box(9, 9, 8, 20)]
    path = animals / "det/n02118333_obj/img/data.mat"
    savemat(path, {"samples": struct_array([{"class": 1.0, "obj": entry} for entry in boxes])})
    listing = layout_of(animals).read(animals, Choice())
    assert [key[-9:] for key in listing.keys] == ["00002.jpg"]
    assert listing.notes == ("n02118333: boxes of 1 objects without a photo (00001.jpg)",)
    assert "is empty" in listing.left_out[0].reason


def test_damaged_annotations_are_errors(animals):
    data = animals / "det/n02118333_obj/img/data.mat"
    whole = data.read_bytes()
    data.write_bytes(whole[:200])
    with pytest.raises(ImageError, match=r"can be read at .*data\.mat"):
        opened(animals)
    savemat(data, {"other": 1.0})
    with pytest.raises(ImageError, match=r"structs 'samples' in .*data\.mat, got the variables other"):
        opened(animals)
    savemat(data, {"samples": struct_array([{"obj": {"box": 1.0}}])})
    with pytest.raises(ImageError, match=r"obj\.bndbox .* in samples\(1\) of .*data\.mat, got KeyError"):
        opened(animals)
    data.write_bytes(whole)
    save_truth(animals, 1, [mark([[1], [2]], [[1, 2], [3, 4]])])
    with pytest.raises(ImageError, match=r"equal size in truth\(1\) of .*truth_part01\.mat"):
        opened(animals)
    Image.new("RGB", (4, 4)).save(animals / "det/n02118333_obj/img/img/cover.jpg")
    with pytest.raises(ImageError, match=r"named by numbers.*got cover\.jpg"):
        opened(animals)


def test_a_second_copy_below_the_folder_is_an_error(animals):
    (animals / "copy/n02118333_obj/img/img").mkdir(parents=True)
    with pytest.raises(ImageError, match="one folder n02118333_obj in .*got several"):
        opened(animals)
    (animals / "copy/n02118333_obj/img/img").rmdir()
    (animals / "copy/n02118333").mkdir()
    (animals / "copy/n02118333/truth_part01.mat").touch()
    with pytest.raises(ImageError, match=r"one truth_part01\.mat of n02118333"):
        opened(animals)


@pytest.mark.data
def test_the_raw_sample_equals_the_table_of_it(shared, tmp_path):
    pytest.importorskip("h5py")
    convert("animal-part", shared / "data" / "animal-part-raw-sample", tmp_path)
    raw, table = ImageSet.open(tmp_path), ImageSet.open(shared / "data" / "animal-part")
    assert len(raw) == 12
    rows = [table.keys.index(f"images/fox/{key[-9:]}") for key in raw.keys]
    assert raw.photos == tuple(table.photos[row] for row in rows)
    assert raw.categories == tuple(table.categories[row] for row in rows)
    listed = table.take(rows).part_truth
    truth = raw.part_truth
    order = [listed.landmarks.index(name) for name in truth.landmarks]
    scale = 224 / truth.image_size_px[:, None]
    np.testing.assert_allclose(truth.positions_px * scale, listed.positions_px[:, order], atol=1e-3)
    np.testing.assert_allclose(truth.sizes_px * scale, listed.sizes_px[:, order], atol=1e-3)
    with (shared / "data/animal-part/landmarks.csv").open() as handle:
        assert sum(row["image"] in {table.keys[r] for r in rows} for row in csv.DictReader(handle)) == 18
    assert sum(truth.count().values()) == 18
    for index, row in enumerate(rows):
        mine = np.asarray(raw.read(index).resize((224, 224), Image.Resampling.BILINEAR), float)
        theirs = np.asarray(table.read(row), float)
        assert np.abs(mine - theirs).mean() < 4  # what saving as JPEG changes; a box off by a pixel gives 4 to 20
