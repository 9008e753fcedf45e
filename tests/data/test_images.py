"""Image sets from folders, tables, arrays and generators, and what reading does to every kind of file."""

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from partlens.data.annotations import PartTruth
from partlens.data.folders import split_of
from partlens.data.images import ImageSet
from partlens.errors import ImageError
from partlens.network.preprocessing import Preprocessing
from partlens.run import Unreadable

DATA = Path(__file__).parents[3] / "shared" / "data" / "animal-part"


def save(path: Path, colour=(200, 30, 40), size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def table(path: Path, columns: dict[str, list[str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


def pixels(images: ImageSet, index: int = 0) -> np.ndarray:
    return np.asarray(images.read(index))


# Folders


def test_sub_folders_are_categories(tmp_path):
    for name in ("fox/b.png", "cat/deep/a.JPG", "cat/c.webp", "cat/.hidden.png", ".git/x.png"):
        save(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    images = ImageSet.open(tmp_path)
    assert images.keys == ("cat/c.webp", "cat/deep/a.JPG", "fox/b.png")
    assert images.categories == ("cat", "cat", "fox")
    assert images.category_counts() == {"cat": 2, "fox": 1}
    assert images.photos == images.keys
    assert images.splits == tuple(split_of(key) for key in images.keys)
    assert (images.root, images.name, images.part_truth) == (tmp_path, tmp_path.name, None)


def test_a_loose_image_means_no_categories(tmp_path):
    save(tmp_path / "fox/b.png")
    save(tmp_path / "a.png")
    assert ImageSet.open(tmp_path).categories == ("", "")


@pytest.mark.parametrize(("second", "split"), [("test", "test"), ("val", "test")])
def test_train_and_test_folders_are_splits(tmp_path, second, split):
    save(tmp_path / "train/cat/a.png")
    save(tmp_path / f"{second}/fox/a.png")
    images = ImageSet.from_folder(tmp_path)
    by_key = dict(zip(images.keys, zip(images.categories, images.splits, strict=True), strict=True))
    assert by_key == {"train/cat/a.png": ("cat", "train"), f"{second}/fox/a.png": ("fox", split)}


def test_a_circle_of_links_ends(tmp_path):
    save(tmp_path / "cat/a.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert ImageSet.open(tmp_path).keys == ("cat/a.png",)


def test_missing_paths_and_empty_folders(tmp_path):
    with pytest.raises(ImageError, match="nothing there"):
        ImageSet.open(tmp_path / "none")
    with pytest.raises(ImageError, match=r"images in .*, got none.*\.jpg"):
        ImageSet.open(tmp_path)
    with pytest.raises(ImageError, match="got a file"):
        ImageSet.from_folder(save(tmp_path / "a.png"))
    with pytest.raises(ImageError, match=r"ending in \.csv or \.parquet, got 'a\.png'"):
        ImageSet.open(tmp_path / "a.png")


# Tables


def test_a_tables_validation_split_is_the_test_split_where_there_is_no_other(tmp_path):
    """Else results were measured on the training photos, although others were there."""
    names = ["1.png", "2.png", "3.png"]
    path = table(tmp_path / "list.csv", {"image": names, "split": ["train", "Val", "validation"]})
    assert ImageSet.open(path).splits == ("train", "test", "test")
    path = table(tmp_path / "both.csv", {"image": names, "split": ["train", "val", "test"]})
    assert ImageSet.open(path).splits == ("train", "val", "test")


def test_a_table_gives_categories_splits_and_photos(tmp_path):
    save(tmp_path / "x/1.png", colour=(1, 2, 3))
    path = table(
        tmp_path / "list.csv",
        {
            "image": ["x/1.png", "x/2.png", "x/3.png", "x/4.png"],
            "class": ["cat", "", "fox", "fox"],
            "split": ["held", "", "extra", ""],
            "photo": ["p", "p", "q", ""],
            "other": ["1", "2", "3", "4"],
        },
    )
    images = ImageSet.open(path)
    assert images.categories == ("cat", "", "fox", "fox")
    assert images.photos == ("p", "p", "q", "x/4.png")
    assert images.splits == ("held", "held", "extra", split_of("x/4.png"))
    assert images.name == "list"
    assert pixels(images)[0, 0].tolist() == [1, 2, 3]


def test_a_parquet_table_and_another_root(tmp_path):
    save(tmp_path / "photos/1.png")
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"image": ["1.png"], "label": [7], "split": pa.array([None], pa.string())}), path)
    images = ImageSet.from_table(path, root=tmp_path / "photos")
    assert (images.categories, images.splits) == (("7",), (split_of("1.png"),))
    assert images.read(0).size == (6, 4)


def test_a_folder_with_a_table_and_landmarks(tmp_path):
    save(tmp_path / "a.png", size=(30, 20))
    save(tmp_path / "b.png")
    table(tmp_path / "images.csv", {"image": ["b.png", "a.png"], "category": ["fox", "cat"]})
    table(
        tmp_path / "landmarks.csv",
        {"image": ["a.png", "gone.png"], "landmark": ["head"] * 2, "x": [3, 1], "y": [4, 1]},
    )
    images = ImageSet.open(tmp_path)
    assert images.categories == ("fox", "cat")
    truth = images.part_truth
    assert truth is not None
    assert truth.keys == images.keys
    np.testing.assert_array_equal(truth.positions_px[:, 0], [[np.nan, np.nan], [3, 4]])
    np.testing.assert_array_equal(truth.image_size_px, [[np.nan, np.nan], [30, 20]])
    chosen = images.select("cat").part_truth
    assert chosen is not None
    assert chosen.positions_px.tolist() == [[[3, 4]]]


def test_landmarks_of_other_images_are_refused(tmp_path):
    save(tmp_path / "a.png")
    table(tmp_path / "landmarks.csv", {"image": ["b/a.png"], "landmark": ["head"], "x": [3], "y": [4]})
    with pytest.raises(ImageError, match=r"got only others, such as 'b/a.png'. Write names like 'a.png'"):
        ImageSet.open(tmp_path)


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"file": ["a"], "class": ["b"]}, r"the column image in .*, got the columns file, class. Add or rename image"),
        ({"image": []}, r"at least one image"),
        ({"image": ["a", "b", "a"]}, r"every image once in list, got a more than once"),
        ({"image": ["a", ""]}, r"a name in column 'image' of .*list.csv, row 3, got an empty cell"),
        (
            {"image": ["a", "b"], "split": ["train", "test"], "photo": ["p", "p"]},
            r"crops in several splits of p",
        ),
    ],
)
def test_bad_tables(tmp_path, columns, text):
    with pytest.raises(ImageError, match=text):
        ImageSet.open(table(tmp_path / "list.csv", columns))


def test_boxes_cut_the_photo_and_its_orientation_is_as_stored(tmp_path):
    ramp = np.zeros((20, 30, 3), np.uint8)
    ramp[:, :, 0], ramp[:, :, 1] = np.arange(30) * 8, np.arange(20)[:, None] * 10
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp).save(tmp_path / "a.png", exif=exif)
    path = table(
        tmp_path / "images.csv",
        {
            "image": ["a.png", "head", "edge", "outside"],
            "file": ["", "a.png", "a.png", "a.png"],
            "left": ["", "3.5", "-4", "40"],
            "top": ["", "2.4", "15", "0"],
            "right": ["", "9.2", "12", "50"],
            "bottom": ["", "7", "99", "9"],
        },
    )
    table(tmp_path / "landmarks.csv", {"image": ["head"], "landmark": ["eye"], "x": ["1"], "y": ["2"]})
    images = ImageSet.open(tmp_path)
    assert images.boxes_px == (None, (3.5, 2.4, 9.2, 7), (-4, 15, 12, 99), (40, 0, 50, 9))
    assert set(images.files) == {tmp_path / "a.png"}
    assert images.size_px(0) == images.read(0).size == (20, 30)  # upright
    np.testing.assert_array_equal(pixels(images, 1), ramp[2:7, 4:9])
    np.testing.assert_array_equal(pixels(images, 2), ramp[15:20, 0:12])
    assert [images.size_px(index) for index in (1, 2)] == [(5, 5), (12, 5)]
    for act in (images.read, images.size_px):
        with pytest.raises(ImageError, match=r"a box inside the 30x20 photo .*a\.png, got \(40"):
            act(3)
    assert images.part_truth.image_size_px[1].tolist() == [5, 5]
    good, bad = images.readable()
    assert [image.key for image in bad] == ["outside"]
    assert len(set(good.digests())) == 3
    assert len({digest.partition("@")[0] for digest in good.digests()}) == 1
    assert ImageSet.open(path).fingerprint() == images.fingerprint()
    assert images.take([1, 0]).boxes_px == ((3.5, 2.4, 9.2, 7), None)
    assert ImageSet.from_arrays(ramp[None]).boxes_px == (None,)
    assert ImageSet.from_arrays(ramp[None]).files == ()


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        ({"left": "1", "top": "2", "right": "3"}, r"row 2 of .*images\.csv, or none, got no bottom"),
        ({"left": "1", "top": "", "right": "3", "bottom": ""}, "got no top and no bottom"),
        ({"left": "1", "top": "2", "right": "x", "bottom": "3"}, r"a number in column 'right' of .*row 2, got 'x'"),
        ({"left": "1", "top": "2", "right": "inf", "bottom": "3"}, r"column 'right' of .*row 2, got 'inf'"),
        ({"left": "1", "top": "nan", "right": "2", "bottom": "3"}, r"column 'top' of .*row 2, got 'nan'"),
    ],
)
def test_bad_boxes(tmp_path, columns, text):
    path = table(tmp_path / "images.csv", {"image": ["a.png"], **{name: [cell] for name, cell in columns.items()}})
    with pytest.raises(ImageError, match=text):
        ImageSet.open(path)


def test_masks_of_landmarks(tmp_path):
    save(tmp_path / "x/a.png", size=(6, 4))
    save(tmp_path / "x/b.png", size=(6, 4))
    table(
        tmp_path / "landmarks.csv",
        {"image": ["x/a.png", "x/a.png"], "landmark": ["head", "tail"], "x": ["1"] * 2, "y": ["2"] * 2},
    )
    assert ImageSet.open(tmp_path).part_truth.masks is None
    (tmp_path / "masks/cat").mkdir(parents=True)  # of no landmark
    assert ImageSet.open(tmp_path).part_truth.masks is None
    drawn = np.zeros((4, 6), np.uint8)
    drawn[1:3, 2] = 1
    (tmp_path / "masks/head/x").mkdir(parents=True)
    Image.fromarray(drawn).save(tmp_path / "masks/head/x/a.png.png")
    images = ImageSet.open(tmp_path)
    assert images.keys == ("x/a.png", "x/b.png")  # masks are no images
    masks = images.take([1, 0]).part_truth.masks
    np.testing.assert_array_equal(masks("x/a.png")["head"], drawn > 0)
    assert masks("x/a.png")["tail"].shape == (4, 6)
    assert not masks("x/a.png")["tail"].any()
    assert not masks("x/b.png")["head"].any()
    Image.new("L", (4, 6)).save(tmp_path / "masks/head/x/a.png.png")
    with pytest.raises(ImageError, match=r"a mask of 6x4 pixels at .*a\.png\.png, got 4x6"):
        masks("x/a.png")
    (tmp_path / "masks/head/x/a.png.png").write_text("no image")
    with pytest.raises(ImageError, match=r"a mask that can be read at .*a\.png\.png"):
        masks("x/a.png")


def test_ragged_and_broken_tables(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("image,category\na.png,cat,small\n")
    with pytest.raises(ImageError, match=r"2 cells in row 2 of .*, got 3"):
        ImageSet.open(path)
    (tmp_path / "list.parquet").write_bytes(b"not parquet")
    with pytest.raises(ImageError, match="a table at"):
        ImageSet.open(tmp_path / "list.parquet")


# Arrays and generators


def test_arrays_keep_their_bytes(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    images = ImageSet.from_arrays(array, categories=["a", "b", "a"], splits=["train", "test", "train"])
    assert images.keys == ("000000", "000001", "000002")
    assert images.splits == ("train", "test", "train")
    np.testing.assert_array_equal(pixels(images, 1), array[1])
    assert images.size_px(1) == (7, 5)
    same, bad = images.readable()
    assert (same.keys, bad) == (images.keys, ())


def test_floats_and_grey_and_lists_of_sizes():
    images = ImageSet.from_arrays(
        [np.full((2, 3), 0.5), np.full((4, 4, 1), 1, np.float32), np.zeros((1, 1, 3), np.uint8)]
    )
    assert [images.read(index).size for index in range(3)] == [(3, 2), (4, 4), (1, 1)]
    assert pixels(images, 0)[0, 0].tolist() == [128, 128, 128]
    assert pixels(images, 1)[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((2, 3, 8, 8), np.uint8), r"got \(3, 8, 8\). Move the colours to the last axis"),
        (np.zeros((2, 8, 8, 4), np.uint8), r"shape \[row, col, 3\] for image 0, got \(8, 8, 4\)"),
        (np.zeros((8, 8), np.uint8), r"\[image, row, col, 3\] for the images, got \(8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.int64), r"uint8 .* for image 0, got int64"),
        (np.full((1, 8, 8, 3), 200.0), r"from 0 to 1 for image 0, got values from 200 to 200"),
        (np.full((1, 8, 8, 3), np.nan), r"from 0 to 1 for image 0, got 192 nan values"),
        (np.zeros((0, 8, 8, 3), np.uint8), r"at least one image"),
        (np.zeros((1, 0, 8, 3), np.uint8), r"got \(0, 8, 3\)"),
    ],
)
def test_bad_arrays(array, text):
    with pytest.raises(ImageError, match=text):
        ImageSet.from_arrays(array)


def test_lists_of_another_length_are_refused():
    with pytest.raises(ImageError, match="2 categories, one for each image, got 1"):
        ImageSet.from_arrays(np.zeros((2, 4, 4, 3), np.uint8), categories=["a"])


def test_generated_images_and_their_failures():
    def draw(index):
        if index == 1:
            raise RuntimeError("no paint")
        return np.full((4, 4, 3), index, np.uint8)

    images = ImageSet.from_generator(draw, ["a", "b", "c"])
    assert images.take([2]).read(0).getpixel((0, 0)) == (2, 2, 2)
    assert images.take([0, 2]).take([1]).read(0).getpixel((0, 0)) == (2, 2, 2)
    good, bad = images.readable()
    assert good.keys == ("a", "c")
    assert bad == (Unreadable(key="b", reason="no paint"),)
    with pytest.raises(ImageError, match=r"uint8 arrays \[row, col, 3\] from the generator, got float64 \(2,\)"):
        ImageSet.from_generator(lambda _: np.zeros(2), ["a"]).read(0)


# Selecting


def labelled() -> ImageSet:
    return ImageSet.from_arrays(
        np.zeros((4, 4, 4, 3), np.uint8),
        categories=["fox", "cat", "fox", ""],
        splits=["train", "train", "test", "test"],
    )


def test_select_and_indices():
    images = labelled()
    assert images.indices("fox") == (0, 2)
    assert images.select("fox", "test").keys == ("000002",)
    assert images.take([3, -4]).keys == ("000003", "000000")
    assert images.take(np.array([2, 3])).take([1]).keys == ("000003",)


def test_rows_of_several_categories():
    images = labelled()
    assert images.rows_of(["fox"], "train") == ((0,), (1,))
    assert images.rows_of(["cat", "fox"], "train") == ((0, 1), ())
    assert images.rows_of(["fox"], "test") == ((2,), (3,))
    assert images.rows_of([""], "test") == ((2, 3), ())
    with pytest.raises(ImageError, match=r"a category of arrays, got 'foxx'. Choose one of fox"):
        images.rows_of(["cat", "foxx"], "train")
    assert images.rows_of(["cat"], "test") == ((), (2, 3))
    with pytest.raises(ImageError, match="photos of cat in the split test, got none"):
        images.rows_of(["fox", "cat"], "test")
    with pytest.raises(ImageError, match="a split of arrays, got 'tset'"):
        images.rows_of([""], "tset")


def test_unknown_names_and_empty_choices():
    images = labelled()
    with pytest.raises(ImageError, match=r"a category of arrays, got 'foxx'. Choose one of fox"):
        images.select("foxx")
    with pytest.raises(ImageError, match=r"a split of arrays, got 'tset'. Choose one of test"):
        images.select(split="tset")
    with pytest.raises(ImageError, match="sub-folders"):
        ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8)).select("fox")
    assert images.indices("cat", "test") == ()
    with pytest.raises(ImageError, match=r"with category='cat', split='test', got none"):
        images.select("cat", "test")
    with pytest.raises(ImageError, match="at least one image"):
        images.take([])
    with pytest.raises(ImageError, match="from 0 to 3 in arrays, got 4"):
        images.read(4)
    with pytest.raises(ImageError, match="every image once"):
        images.take([1, 1])


# Reading


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    image = Image.new("RGB", (6, 4), (255, 255, 255))
    image.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    images = ImageSet.open(tmp_path)
    size, corner = ((6, 4), (4, 6))[orientation > 4], ["lt", "rt", "rb", "lb", "lt", "rt", "rb", "lb"][orientation - 1]
    assert images.read(0).size == images.size_px(0) == size
    place = (0 if corner[0] == "l" else size[0] - 1, 0 if corner[1] == "t" else size[1] - 1)
    assert images.read(0).getpixel(place) == (0, 0, 0)


def grey(values, dtype) -> Image.Image:
    return Image.fromarray(np.array([values], dtype=dtype))


@pytest.mark.parametrize(
    ("name", "image", "want"),
    [
        ("l.png", grey([0, 77], np.uint8), [0, 77]),
        ("bit.png", Image.new("1", (2, 1), 1), [255, 255]),
        ("sixteen.png", grey([257 * 200, 65535], np.uint16), [200, 255]),
        ("sixteen.tif", grey([257 * 200, 65535], np.uint16), [200, 255]),
        ("int-8.tif", grey([0, 200], np.int32), [0, 200]),
        ("int-16.tif", grey([257 * 200, 65535], np.int32), [200, 255]),
        ("int-wide.tif", grey([-1000, 1000], np.int32), [0, 255]),
        ("float-unit.tif", grey([0, 0.6], np.float32), [0, 153]),
        ("float-8.tif", grey([0, 90], np.float32), [0, 90]),
        ("float-low.tif", grey([0, 2], np.float32), [0, 2]),
        ("float-wide.tif", grey([-3, 1], np.float32), [0, 255]),
        ("float-flat.tif", grey([-3, -3], np.float32), [0, 0]),
    ],
)
def test_grey_depths(tmp_path, name, image, want):
    image.save(tmp_path / name)
    got = pixels(ImageSet.open(tmp_path))
    assert got.shape == (1, 2, 3)
    assert got[0].tolist() == [[value] * 3 for value in want]


def palette() -> Image.Image:
    image = Image.new("P", (1, 1), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("name", "image", "options", "want"),
    [
        ("rgba.png", Image.new("RGBA", (1, 1), (0, 0, 0, 0)), {}, [255, 255, 255]),
        ("half.png", Image.new("RGBA", (1, 1), (255, 0, 0, 51)), {}, [255, 204, 204]),
        ("la.png", Image.new("LA", (1, 1), (0, 51)), {}, [204, 204, 204]),
        ("p.png", palette(), {}, [10, 20, 30]),
        ("p-clear.png", palette(), {"transparency": 1}, [255, 255, 255]),
        ("p-bytes.png", palette(), {"transparency": b"\xff\x00"}, [255, 255, 255]),
        ("key.png", Image.new("RGB", (1, 1), (1, 2, 3)), {"transparency": (1, 2, 3)}, [255, 255, 255]),
        ("cmyk.tif", Image.new("CMYK", (1, 1), (0, 255, 255, 0)), {}, [255, 0, 0]),
    ],
)
def test_colour_modes(tmp_path, name, image, options, want):
    image.save(tmp_path / name, **options)
    images = ImageSet.open(tmp_path)
    assert images.read(0).mode == "RGB"
    assert pixels(images)[0, 0].tolist() == want


def test_unreadable_files_are_named(tmp_path):
    save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("no image")
    whole = save(tmp_path / "short.png", size=(64, 64)).read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    grey([0, np.nan], np.float32).save(tmp_path / "nan.tif")
    images = ImageSet.open(tmp_path)
    for index, key in enumerate(images.keys):
        if key != "good.png":
            with pytest.raises(ImageError, match=key):
                images.read(index)
    good, bad = images.readable()
    assert good.keys == ("good.png",)
    assert [image.key for image in bad] == ["nan.tif", "short.png", "text.jpg"]
    assert "nan or infinity" in bad[0].reason
    assert good.readable() == (good, ())
    with pytest.raises(ImageError, match=r"at least one readable image .* 3 unreadable ones \(nan.tif, short.png"):
        images.take([1, 2, 3]).readable()
    assert "text.jpg, got the content of another kind of file" in bad[2].reason


def test_missing_files_of_a_table(tmp_path):
    images = ImageSet.open(table(tmp_path / "list.csv", {"image": ["none.png"]}))
    for act in (lambda: images.read(0), images.fingerprint, lambda: images.size_px(0)):
        with pytest.raises(ImageError, match=r"an image file .*none\.png, got nothing there"):
            act()


# Fingerprints


def test_a_fingerprint_follows_the_content_not_the_place(tmp_path):
    for folder in ("one", "two"):
        save(tmp_path / folder / "cat" / "a.png")
        save(tmp_path / folder / "fox" / "b.png")
    one, two = ImageSet.open(tmp_path / "one"), ImageSet.open(tmp_path / "two")
    assert one.fingerprint() == two.fingerprint()
    assert one.take([1, 0]).fingerprint() != one.fingerprint()
    save(tmp_path / "two" / "fox" / "b.png", colour=(200, 30, 41))
    assert one.fingerprint() == two.fingerprint()  # a set stands for its images as they were
    assert one.fingerprint() != ImageSet.open(tmp_path / "two").fingerprint()


def test_files_are_read_once_for_decoding_and_hashing(tmp_path, monkeypatch):
    for name in ("cat/a.png", "cat/b.png", "fox/c.png"):
        save(tmp_path / name, colour=(ord(name[4]), 2, 3))
    (tmp_path / "fox/bad.png").write_text("no image")
    want = ImageSet.open(tmp_path).select("cat").fingerprint(), ImageSet.open(tmp_path).digests()
    reads = []
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path.name) or real(path))
    images, bad = ImageSet.open(tmp_path).readable()
    assert sorted(reads) == ["a.png", "b.png", "bad.png", "c.png"]
    assert [image.key for image in bad] == ["fox/bad.png"]
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} is read again"))
    assert images.select("cat").fingerprint() == want[0]
    assert images.take([1, 2]).digests() == (want[1][1], want[1][3])
    assert images.path == tmp_path.resolve()
    assert images.readable() == (images, ())
    assert images.with_parts(PartTruth(("a",), ("fox/c.png",), *(np.zeros((1, 1, 2)),) * 2, np.ones((1, 2)))).digests()


def test_only_what_was_opened_as_a_whole_has_a_path(tmp_path):
    save(tmp_path / "cat/a.png")
    images = ImageSet.open(tmp_path)
    assert images.path == tmp_path.resolve()
    assert images.take([0]).path is None
    assert images.select("cat").path is None
    assert ImageSet.from_folder(tmp_path).path is None


def test_a_fingerprint_follows_categories_and_splits():
    array = np.zeros((1, 4, 4, 3), np.uint8)
    prints = {
        ImageSet.from_arrays(array, categories=[category], splits=[split]).fingerprint()
        for category in ("a", "b")
        for split in ("train", "test")
    }
    assert len(prints) == 4
    drawn = {
        ImageSet.from_generator(lambda _, v=v: np.full((4, 4, 3), v, np.uint8), ["a"]).fingerprint() for v in (0, 0, 1)
    }
    assert len(drawn) == 2
    told = {ImageSet.from_generator(lambda _: array[0], ["a"], recipe=text).fingerprint() for text in ("r", "s")}
    assert len(told) == 2


def test_the_default_split_is_about_a_quarter_and_goes_by_photo():
    share = sum(split_of(f"photo-{index}") == "test" for index in range(4000)) / 4000
    assert 0.23 < share < 0.27
    images = ImageSet.from_arrays(np.zeros((40, 2, 2, 3), np.uint8), photos=[f"p{index // 4}" for index in range(40)])
    assert {images.splits[index : index + 4] for index in range(0, 40, 4)} == {("train",) * 4, ("test",) * 4}


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="the animal-part photos are not beside the checkout")
def test_animal_part():
    images = ImageSet.open(DATA)
    assert len(images) == 3676
    assert images.category_counts()["fox"] == 286
    fox = images.select("fox")
    truth = fox.part_truth
    assert truth is not None
    assert truth.count()["head"] > 100
    known = np.isfinite(truth.positions_px[:, 0, 0])
    assert (truth.image_size_px[known] == 224).all()
    assert fox.read(0).size == (224, 224)


# Reduced decoding


def camera_photo(path: Path, size=(2048, 1536), noise=8, **options) -> Path:
    """A photo with edges, texture and a camera's noise."""
    draw = np.random.default_rng(0)
    rows, cols = np.mgrid[: size[1], : size[0]]
    waves = [127 + 90 * np.sin(cols / period + rows / 90) for period in (37.0, 11.0, 200.0)]
    pixels = np.stack(waves, axis=2) + draw.normal(0, noise, (size[1], size[0], 3))
    pixels[300:900, 500:1100] = (200, 40, 30)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, **options)
    return path


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 97}])
def test_a_large_photo_decoded_reduced_gives_the_same_input(tmp_path, orientation, resize, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    images = ImageSet.from_files([camera_photo(tmp_path / "a.jpg", exif=exif, **options)])
    prepare = Preprocessing(resize=resize, resize_px=256 if resize == "crop" else None)
    small, whole = images.read(0, prepare.scaled_size), images.read(0)
    assert small.size == (whole.width // 2, whole.height // 2)
    change = np.abs(np.asarray(prepare.frame(small), int) - np.asarray(prepare.frame(whole), int))
    assert change.mean() < 0.5
    assert change.max() <= 6


def test_the_worst_that_reduced_decoding_changes(tmp_path):
    dots = np.kron(np.random.default_rng(0).integers(0, 2, (308, 410, 3)) * 255, np.ones((5, 5, 1)))
    Image.fromarray(dots[:1536, :2048].astype(np.uint8)).save(tmp_path / "a.jpg", quality=90)
    images, prepare = ImageSet.open(tmp_path), Preprocessing(resize_px=256)
    small, whole = (prepare.frame(images.read(0, scaled)) for scaled in (prepare.scaled_size, None))
    assert np.abs(np.asarray(small, int) - np.asarray(whole, int)).mean() < 6


@pytest.mark.parametrize(
    ("name", "size", "box"),
    [
        ("a.png", (2048, 1536), ""),
        ("a.jpg", (1000, 750), ""),
        ("a.jpg", (2047, 1536), ""),
        ("a.jpg", (2048, 1536), "0"),
    ],
    ids=["png", "less than four times", "odd side", "cut to a box"],
)
def test_other_photos_are_decoded_whole(tmp_path, name, size, box):
    camera_photo(tmp_path / name, size)
    table(
        tmp_path / "images.csv",
        {"image": [name], "left": [box], "top": [box], "right": [box and "2000"], "bottom": [box and "1500"]},
    )
    images = ImageSet.open(tmp_path)
    small, whole = images.read(0, Preprocessing(resize_px=256).scaled_size), images.read(0)
    np.testing.assert_array_equal(small, whole)


@pytest.mark.parametrize("size", [(1, 1), (6, 4), (8, 7), (9, 40)])
def test_the_smallest_photos_are_readable(tmp_path, size):
    Image.new("RGB", size, (9, 90, 200)).save(tmp_path / "a.jpg")
    assert ImageSet.open(tmp_path).readable()[1] == ()


def test_a_damaged_photo_is_found_though_an_eighth_of_it_is_decoded(tmp_path):
    whole = camera_photo(tmp_path / "whole.jpg", (640, 480)).read_bytes()
    for cut in (2, 5, len(whole) // 2):
        (tmp_path / f"cut{cut}.jpg").write_bytes(whole[:-cut])
    images = ImageSet.open(tmp_path)
    readable = set()
    for row, key in enumerate(images.keys):
        try:
            images.read(row)
            readable.add(key)
        except ImageError:
            pass
    assert set(images.readable()[0].keys) == readable
    assert "whole.jpg" in readable
    assert len(readable) < len(images)
