"""Pascal-Part in its own layout: silhouettes to boxes, landmarks and masks, and what is wrong with a copy."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from partlens.data.images import ImageSet
from partlens.errors import ImageError
from partlens_papers.data import pascal_part
from partlens_papers.data.animal_part import marked
from partlens_papers.data.convert import convert
from partlens_papers.data.layouts import layout_of
from partlens_papers.data.listing import Choice


def converted(folder, **options):
    """The result of a conversion."""
    out = folder.parent / f"{folder.name}-converted"
    shutil.rmtree(out, ignore_errors=True)
    return convert("pascal-part", folder, out, **options)


def opened(folder, **options):
    """What partlens opens after a conversion."""
    return ImageSet.open(converted(folder, **options).path)


SIZE = (40, 30)  # width, height


def silhouette(left, top, right, bottom, size=SIZE) -> np.ndarray:
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def thing(name, place, parts=(), **more) -> dict:
    array = np.empty((1, len(parts)), dtype=[("part_name", object), ("mask", object)])
    for column, (part, where) in enumerate(parts):
        array[0, column] = (part, where if isinstance(where, np.ndarray) else silhouette(*where))
    mask = place if isinstance(place, np.ndarray) else silhouette(*place)
    return {"class": name, "class_ind": 3.0, "mask": mask, "parts": array if parts else np.zeros((0, 0)), **more}


def annotate(folder: Path, stem: str, things: list[dict], *, photo=True, imname=None) -> None:
    array = np.empty((1, len(things)), dtype=[(field, object) for field in things[0]])
    for column, content in enumerate(things):
        array[0, column] = tuple(content.values())
    for name in ("Annotations_Part", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    path = folder / "Annotations_Part" / f"{stem}.mat"
    savemat(path, {"anno": {"imname": imname or stem, "objects": array}}, do_compression=True)
    if photo:
        Image.new("RGB", SIZE, (90, 120, 10)).save(folder / "JPEGImages" / f"{stem}.jpg")


BIRD = thing(
    "bird", (10, 5, 30, 25), [("head", (10, 5, 14, 11)), ("torso", (14, 10, 30, 20)), ("lleg", (15, 20, 17, 25))]
)
CAT = thing("cat", (0, 0, 8, 8), [("head", (0, 0, 4, 6))])


@pytest.fixture
def voc(tmp_path):
    annotate(tmp_path, "2008_000001", [BIRD, CAT])
    annotate(
        tmp_path,
        "2008_000002",
        [thing("person", (0, 0, 9, 9)), CAT, thing("cat", (20, 0, 30, 9), [("head", (20, 0, 24, 4))])],
    )
    annotate(tmp_path, "2008_000003", [thing("sheep", (4, 4, 12, 12))])
    return tmp_path


def test_objects_are_cut_and_parts_follow(voc):
    assert layout_of(voc).name == "pascal-part"
    images = opened(voc)
    assert images.keys == tuple(
        f"JPEGImages/2008_00000{name}" for name in ("1.jpg#1", "1.jpg#2", "2.jpg#2", "2.jpg#3", "3.jpg#1")
    )
    assert images.categories == ("bird", "cat", "cat", "cat", "sheep")
    assert images.photos == ("2008_000001",) * 2 + ("2008_000002",) * 2 + ("2008_000003",)
    assert images.splits[0] == images.splits[1]
    assert [images.read(i).size for i in range(5)] == [(20, 20), (8, 8), (8, 8), (10, 9), (8, 8)]
    truth = images.part_truth
    assert truth.landmarks == ("head", "lleg", "torso")
    assert truth.positions_px[0].tolist() == [[2, 3], [6, 17.5], [12, 10]]
    assert truth.sizes_px[0].tolist() == [[4, 6], [2, 5], [16, 10]]
    assert truth.positions_px[3, 0].tolist() == [2, 2]
    assert np.isnan(truth.positions_px[4]).all()
    assert truth.count() == {"head": 4, "lleg": 1, "torso": 1}


def test_silhouettes_are_those_of_the_object_in_its_crop(voc):
    images = opened(voc)
    masks = images.part_truth.masks("JPEGImages/2008_000001.jpg#1")
    assert {name: mask.shape for name, mask in masks.items()} == dict.fromkeys(("head", "lleg", "torso"), (20, 20))
    np.testing.assert_array_equal(masks["head"], silhouette(0, 0, 4, 6, (20, 20)).astype(bool))
    other = images.select("cat").part_truth.masks("JPEGImages/2008_000002.jpg#3")
    assert (other["head"].sum(), other["torso"].sum(), other["head"].shape) == (16, 0, (9, 10))


def test_whole_photos_of_one_category(voc):
    whole = opened(voc, crop="photo")
    assert whole.keys == ("JPEGImages/2008_000002.jpg", "JPEGImages/2008_000003.jpg")
    assert [(item.key, item.reason) for item in converted(voc, crop="photo").left_out] == [
        ("JPEGImages/2008_000001.jpg", "it shows bird and cat")
    ]
    assert whole.size_px(0) == SIZE
    assert np.isnan(whole.part_truth.positions_px[0, 0]).all()  # two heads
    assert converted(voc, crop="photo").unused_parts[0].reason == "it is there 2 times"
    assert whole.part_truth.masks(whole.keys[0])["head"].sum() == 24 + 16
    birds = pascal_part.read(voc, Choice("photo"), ["bird"])
    assert birds.keys == ("JPEGImages/2008_000001.jpg",)
    assert birds.truth(birds.keys).positions_px[0, 0].tolist() == [12, 8]


def test_the_papers_parts_and_other_classes(voc):
    truth = opened(voc, landmarks="paper").part_truth
    assert truth.landmarks == ("head", "torso")
    assert set(truth.masks("JPEGImages/2008_000001.jpg#1")) == {"head", "torso"}
    people = pascal_part.read(voc, Choice(), ["person"])
    assert people.keys == ("JPEGImages/2008_000002.jpg#1",)
    assert people.notes == ("objects of other classes, not used: 3 cat, 1 bird, 1 sheep",)
    with pytest.raises(ImageError, match=r"classes of VOC 2010, got brid\. Choose such as bird"):
        pascal_part.read(voc, Choice(), ["brid"])
    with pytest.raises(ImageError, match="got none"):
        pascal_part.read(voc, Choice(), [])


def test_photos_in_a_voc_folder_beside_and_a_box_in_the_file(voc):
    (voc / "VOCdevkit" / "VOC2010").mkdir(parents=True)
    (voc / "JPEGImages").rename(voc / "VOCdevkit" / "VOC2010" / "JPEGImages")
    annotate(voc, "2008_000003", [thing("sheep", (4, 4, 12, 12), bbox=np.array([[3.0, 4.0, 14.0, 13.0]]))], photo=False)
    (voc / "JPEGImages").rmdir()
    images = opened(voc)
    assert images.keys[4] == "VOCdevkit/VOC2010/JPEGImages/2008_000003.jpg#1"
    assert images.size_px(4) == (12, 10)
    (voc / "VOCdevkit").rename(voc / "elsewhere")
    with pytest.raises(ImageError, match=r"folder JPEGImages in .*Copy or link JPEGImages next to Annotations_Part"):
        opened(voc)


def test_everything_unusable_is_named(voc):
    wide = silhouette(0, 0, 4, 4, (50, 30))
    empty = silhouette(0, 0, 0, 0)
    annotate(voc, "2008_000004", [thing("cat", (0, 0, 9, 9))], photo=False)
    annotate(voc, "2008_000005", [thing("unicorn", (0, 0, 9, 9)), thing("cow", empty)])
    annotate(voc, "2008_000006", [thing("dog", (0, 0, 9, 9), [("head", wide)])])
    annotate(voc, "2008_000007", [thing("dog", (0, 0, 9, 9), [("tail", empty)])])
    annotate(voc, "2008_000008", [CAT], imname="2008_000009")
    savemat(voc / "Annotations_Part" / "2008_000010.mat", {"other": 1.0})
    (voc / "Annotations_Part" / "2008_000011.mat").write_bytes(b"MATLAB 5.0 MAT-file" + b"x" * 200)
    annotate(voc, "2008_000012", [{"class": "cat", "mask": silhouette(0, 0, 4, 4)}])
    Image.new("RGB", SIZE).save(voc / "JPEGImages" / "2008_000013.jpg")
    result = converted(voc)
    reasons = {item.key.partition("2008_0000")[2]: item.reason for item in result.left_out}
    assert reasons.pop("11.mat").startswith("Expected a MATLAB file that can be read")
    assert reasons == {
        "04.mat": "no photo 2008_000004.jpg in JPEGImages",
        "05.jpg#1": "its class 'unicorn' is none of VOC's",
        "05.jpg#2": "its silhouette is empty",
        "06.mat": "a mask of shape (30, 50) in a photo of (30, 40)",
        "08.mat": "it belongs to another photo, '2008_000009'",
        "10.mat": "no struct anno with objects in it (variables: other)",
        "12.mat": "no field 'parts' in an object or part",
    }
    assert [(part.key, part.landmark) for part in result.unused_parts] == [("JPEGImages/2008_000007.jpg#1", "tail")]
    assert result.notes[-1] == "1 photos in JPEGImages without an annotation file, not used"


def test_a_folder_without_one_usable_object(tmp_path):
    annotate(tmp_path, "2008_000001", [thing("unicorn", (0, 0, 9, 9))])
    with pytest.raises(ImageError, match=r"objects of bird, cat, .* got none \(1 skipped: .*unicorn"):
        opened(tmp_path)


def test_masks_of_another_size_than_the_photo(voc):
    Image.new("RGB", (20, 15)).save(voc / "JPEGImages" / "2008_000001.jpg")
    images = opened(voc)
    assert images.part_truth.count() == {"head": 2, "lleg": 0, "torso": 0}  # the cats of the other photo
    reasons = {part.reason for part in converted(voc).unused_parts}
    assert reasons == {"it was marked in 40x30 pixels, the photo has 20x15"}
    assert not any(mask.any() for mask in images.part_truth.masks(images.keys[0]).values())


def test_what_large_sets_hold_is_found_out_once(voc, tmp_path, monkeypatch):
    monkeypatch.setattr(pascal_part, "_KEEP_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    fresh = pascal_part.read(voc, Choice())
    (kept,) = (tmp_path / "kept" / "partlens").iterdir()
    monkeypatch.setattr(pascal_part, "_record", lambda _: pytest.fail("a file was read again"))
    again = pascal_part.read(voc, Choice())
    assert again.keys == fresh.keys
    assert np.array_equal(again.boxes_px, fresh.boxes_px)
    assert np.array_equal(again.truth(again.keys).positions_px, fresh.truth(fresh.keys).positions_px, equal_nan=True)
    monkeypatch.undo()
    monkeypatch.setattr(pascal_part, "_KEEP_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    kept.write_text('{"records": {"2008_000001": 3}}')
    assert pascal_part.read(voc, Choice()).keys == fresh.keys  # a damaged file is made again
    annotate(voc, "2008_000003", [thing("horse", (4, 4, 12, 12))])
    assert pascal_part.read(voc, Choice()).categories[-1] == "horse"  # a changed data set is read again
    (tmp_path / "blocked").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert "could not be kept" in pascal_part.read(voc, Choice()).notes[0]


@pytest.mark.data
@pytest.mark.parametrize("category", ["cat", "cow", "dog", "horse", "sheep"])
def test_the_papers_own_parts_equal_the_table_of_them(shared, category):
    with (shared / "data/voc-part/images.csv").open() as handle:
        number = {r["image"]: int(r["object"]) for r in csv.DictReader(handle) if r["category"] == category}
    with (shared / "data/voc-part/paper_parts.csv").open() as handle:
        table = [row for row in csv.DictReader(handle) if row["image"] in number]
    for index, part in enumerate(("head", "neck", "torso"), start=1):
        found = marked(shared / "data/voc-part-raw-sample" / category / f"truth_part0{index}.mat")
        rows = [row for row in table if row["part"] == part]
        assert len(rows) > 80
        for row in rows:
            (mine,) = found[number[row["image"]]]
            np.testing.assert_allclose(mine, [float(row[n]) for n in ("x", "y", "width", "height")], atol=0.06)
