"""CUB-200-2011 in its own layout: the official split, boxes, fifteen parts, and what is wrong with a copy."""

import shutil

import numpy as np
import pytest
from PIL import Image

from partlens.data.check import check_data
from partlens.data.folders import split_of
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError
from partlens_papers.data.convert import convert
from partlens_papers.data.layouts import layout_of
from partlens_papers.data.listing import Choice


def converted(folder, **options):
    """The result of a conversion."""
    out = folder.parent / f"{folder.name}-converted"
    shutil.rmtree(out, ignore_errors=True)
    return convert("cub", folder, out, **options)


def opened(folder, **options):
    """What partlens opens after a conversion."""
    return ImageSet.open(converted(folder, **options).path)


FILES = {
    "images.txt": "1 001.A/x.jpg\n2 001.A/y.jpg\n3 002.B/z.jpg\n",
    "classes.txt": "1 001.A\n2 002.B\n",
    "image_class_labels.txt": "1 1\n2 1\n3 2\n",
    "bounding_boxes.txt": "1 10.0 4.0 20.0 10.0\n2 0.0 0.0 40.0 30.0\n3 2.4 1.6 10.2 9.8\n",
    "train_test_split.txt": "1 1\n2 0\n3 1\n",
    "parts/parts.txt": "1 back\n6 forehead\n7 left eye\n14 tail\n",
    "parts/part_locs.txt": "1 1 15.0 9.0 1\n1 6 12.0 5.0 1\n1 7 11.0 5.0 0\n1 14 35.0 9.0 1\n2 6 1.0 2.0 1\n",
}


@pytest.fixture
def cub(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, colour in (("001.A/x", 10), ("001.A/y", 90), ("002.B/z", 170)):
        path = tmp_path / "images" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        ramp = np.full((30, 40, 3), colour, np.uint8)
        ramp[:, :, 0] = np.arange(40) * 6
        Image.fromarray(ramp).save(path, quality=98, subsampling=0)
    return tmp_path


def test_species_split_and_crops(cub):
    assert layout_of(cub).name == "cub"
    images = opened(cub)
    assert images.keys == ("images/001.A/x.jpg", "images/001.A/y.jpg", "images/002.B/z.jpg")
    assert images.categories == ("001.A", "001.A", "002.B")
    assert images.splits == ("train", "test", "train")
    assert [images.size_px(i) for i in range(3)] == [(20, 10), (40, 30), (11, 9)]
    assert [images.read(i).size for i in range(3)] == [(20, 10), (40, 30), (11, 9)]
    assert abs(int(np.asarray(images.read(0))[5, 0, 0]) - 60) <= 6  # the crop starts at column 10
    assert converted(cub).left_out == ()


def test_parts_follow_the_crop_and_the_unseen_is_nan(cub):
    truth = opened(cub).part_truth
    assert truth.landmarks == ("back", "forehead", "left eye", "tail")
    assert truth.positions_px[0, :2].tolist() == [[5, 5], [2, 1]]
    assert np.isnan(truth.positions_px[0, 2]).all()  # marked as not visible
    assert np.isnan(truth.positions_px[0, 3]).all()  # outside the box
    unused = converted(cub).unused_parts
    assert [(part.key, part.landmark) for part in unused] == [("images/001.A/x.jpg", "tail")]
    assert "(25, 5) is outside the image of 20x10" in unused[0].reason
    assert truth.image_size_px[0].tolist() == [20, 10]
    assert truth.count() == {"back": 1, "forehead": 2, "left eye": 0, "tail": 0}
    one = opened(cub).select(split="test")
    assert one.part_truth.positions_px[0, 1].tolist() == [1, 2]


def test_whole_photos_margins_and_the_papers_parts(cub):
    whole = opened(cub, crop="photo")
    assert whole.size_px(0) == (40, 30)
    assert whole.part_truth.positions_px[0, 3].tolist() == [35, 9]
    wide = opened(cub, margin_frac=0.5, landmarks="paper")
    assert wide.size_px(0) == (40, 19)  # 10-10..30+10 and 4-5..14+5, ended by the photo
    assert wide.part_truth.landmarks == ("back", "head", "tail")
    assert wide.part_truth.positions_px[0].tolist() == [[15, 9], [12, 5], [35, 9]]
    assert len({opened(cub).fingerprint(), whole.fingerprint(), wide.fingerprint()}) == 3
    for wrong in ({"margin_frac": -1}, {"crop": "photo", "margin_frac": 0.1}, {"margin_frac": float("nan")}):
        with pytest.raises(InputError, match="margin_frac"):
            opened(cub, **wrong)
    with pytest.raises(InputError, match="a layout among cub, animal-part, pascal-part, animal-pose, got birds"):
        convert("birds", cub, cub)
    with pytest.raises(ImageError, match=r"Pascal-Part \(VOC 2010\) in .*no folder Annotations_Part"):
        convert("pascal-part", cub, cub)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.txt", None, r"a file .*classes\.txt, got nothing there"),
        ("bounding_boxes.txt", None, r"bounding_boxes\.txt, got nothing there.*--crop photo"),
        ("bounding_boxes.txt", "1 a 4 20 10\n", r"numbers in line 1 of .*bounding_boxes\.txt, got 'a 4 20 10'"),
        ("bounding_boxes.txt", "1 4 20 10\n", r"5 values in line 1 of .*bounding_boxes"),
        ("images.txt", "1 001.A/x.jpg\n1 001.A/y.jpg\n", "every number once in .*1 again in line 2"),
        ("image_class_labels.txt", "1 9\n", r"annotated photos in .*its class 9 is not in classes\.txt"),
        ("classes.txt", b"1 \xff\n", r"a text file .*classes\.txt"),
    ],
)
def test_damaged_copies_are_errors(cub, name, text, message):
    (cub / name).unlink()
    if text is not None:
        (cub / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ImageError, match=message):
        opened(cub)


def test_an_unknown_part_is_an_error(cub):
    (cub / "parts/part_locs.txt").write_text("1 15 3 4 1\n")
    with pytest.raises(ImageError, match=r"a part of parts/parts\.txt in line 1 of .*got 15"):
        _ = opened(cub).part_truth


def test_photos_that_cannot_be_listed_are_named(cub):
    (cub / "image_class_labels.txt").write_text("1 1\n2 9\n")
    result = converted(cub)
    assert ImageSet.open(result.path).keys == ("images/001.A/x.jpg",)
    assert [(item.key, item.reason) for item in result.left_out] == [
        ("images/001.A/y.jpg", "its class 9 is not in classes.txt"),
        ("images/002.B/z.jpg", "image_class_labels.txt does not name it"),
    ]
    (cub / "image_class_labels.txt").write_text(FILES["image_class_labels.txt"])
    (cub / "bounding_boxes.txt").write_text("1 10.0 4.0 20.0 10.0\n2 5 5 0 9\n")
    assert [item.reason for item in converted(cub).left_out] == [
        "its box in bounding_boxes.txt is empty",
        "bounding_boxes.txt does not name it",
    ]
    assert len(opened(cub, crop="photo")) == 3


def test_files_beside_the_lists_are_noted(cub):
    Image.new("RGB", (4, 4)).save(cub / "images" / "001.A" / "new.jpg")
    (cub / "train_test_split.txt").write_text("1 1\n2 0\n")
    (cub / "parts/parts.txt").unlink()
    listing = layout_of(cub).read(cub, Choice())
    assert [note.split(",")[0] for note in listing.notes] == [
        "train_test_split.txt does not name images/002.B/z.jpg; the hash of the name splits them",
        "1 photo in images/ without a line in images.txt",
        "parts/parts.txt or parts/part_locs.txt is missing",
    ]
    images = opened(cub)
    assert images.part_truth is None
    assert images.splits[2] == split_of(images.keys[2])
    (cub / "train_test_split.txt").unlink()
    assert "train_test_split.txt is missing" in layout_of(cub).read(cub, Choice()).notes[0]


def test_missing_photos_and_boxes_beside_the_photo_are_reported_by_name(cub):
    (cub / "images/001.A/x.jpg").unlink()
    (cub / "bounding_boxes.txt").write_text("1 1 1 5 5\n2 50 2 9 9\n3 1 1 5 5\n")
    images = opened(cub)
    good, bad = images.readable()
    assert good.keys == ("images/002.B/z.jpg",)
    assert [item.key for item in bad] == ["images/001.A/x.jpg", "images/001.A/y.jpg"]
    assert "nothing there" in bad[0].reason
    assert "a box inside the 40x30 photo" in bad[1].reason
    assert np.isnan(images.part_truth.image_size_px[:2]).all()


def test_pixels_are_taken_as_stored(cub):
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (40, 30), (9, 9, 9)).save(cub / "images/001.A/x.jpg", exif=exif)
    images = opened(cub)
    assert (images.size_px(0), images.read(0).size) == ((20, 10), (20, 10))
    assert opened(cub, crop="photo").read(0).size == (40, 30)


def test_the_check_sees_one_photo_behind_two_boxes(cub):
    (cub / "images/002.B/z.jpg").write_bytes((cub / "images/001.A/y.jpg").read_bytes())
    result = converted(cub)
    found = check_data(result.path, few=0)
    assert (found.kind, found.boxes, found.images) == ("table", 3, 3)
    assert "all cut to the boxes of the table" in "\n".join(found.lines())
    assert found.duplicates == (("images/001.A/y.jpg", "images/002.B/z.jpg"),)
    said = [text.split(" (")[0].partition(":")[0] for text in found.warnings]
    assert said == [
        "the same photo is on both sides of the split",
        "the same photo is in several categories",
        "landmarks without a single position",
        "2 landmarks stand at exactly 0,0, as hidden parts are often written",
    ]
    assert "part not used: images/001.A/x.jpg, tail: its centre" in "\n".join(result.lines())


@pytest.mark.data
def test_the_real_birds(shared, tmp_path):
    result = convert("cub", shared / "data" / "CUB_200_2011", tmp_path, landmarks="paper")
    birds = ImageSet.open(tmp_path)
    assert (len(birds), len(birds.category_counts()), result.left_out) == (779, 14, ())
    truth = birds.part_truth
    assert truth.count() == {"back": 595, "head": 767, "tail": 659}
    lines = (shared / "data/CUB_200_2011/bounding_boxes.txt").read_text().split("\n")[0].split()
    assert birds.size_px(0) == (round(float(lines[1]) + float(lines[3])) - 38, round(17.3 + float(lines[4])) - 17)
    frac = truth.positions_px / truth.image_size_px[:, None]
    assert np.nanmin(frac) >= 0
    assert np.nanmax(frac) <= 1
