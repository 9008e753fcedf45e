"""Folders and tables as people have them: nothing is silently left out, and what is refused says what to do."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from partlens.data.annotations import PartTruth, _read_landmark_table
from partlens.data.check import check_data
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputTypeError
from partlens.progress import Progress
from partlens.verbs.runs import open_photos


def photo(path: Path, seed: int = 0, size=(6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".jfif": "JPEG", ".jpe": "JPEG", ".apng": "PNG"}.get(path.suffix.lower())
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return path


def folder(root: Path, text: str = "", landmarks: str = "", count: int = 4) -> Path:
    for index in range(count):
        photo(root / f"cat/{index}.png", index)
    if text:
        (root / "images.csv").write_text(text, encoding="utf-8")
    if landmarks:
        (root / "landmarks.csv").write_text(landmarks, encoding="utf-8")
    return root


def said(data) -> str:
    """What a verb says while it opens photos."""
    shown = io.StringIO()
    open_photos(data, show=Progress(Console(file=shown, width=10_000)))
    return shown.getvalue()


# Folders


@pytest.mark.parametrize("ending", [".jfif", ".JPE", ".avif", ".apng", ".tga", ".dib"])
def test_whatever_pillow_opens_is_an_image(tmp_path, ending):
    photo(tmp_path / "cat/a.png")
    photo(tmp_path / f"dog/a{ending}")
    images, bad = ImageSet.open(tmp_path).readable()
    assert (images.category_counts(), bad) == ({"cat": 1, "dog": 1}, ())


def test_files_that_are_passed_over_are_named(tmp_path):
    photo(tmp_path / "cat/a.png")
    for name in ("dog/a.heic", "dog/b.HEIC", "cat/notes.txt", "cat/Thumbs.db", "cat/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    notes = check_data(tmp_path, few=0).notes
    assert notes == (
        "passed over 2 .heic (dog/a.heic, dog/b.HEIC), 1 .txt (cat/notes.txt)",
        ".heic files are not read: save them as JPEG",
        "folders without an image that is read: dog",
    )
    assert f"  {notes[0]}" in check_data(tmp_path, few=0).lines()
    assert "not used of" in said(tmp_path)
    assert "2 .heic" in said(tmp_path)
    assert ImageSet.open(tmp_path).take([0]).notes == notes


def test_a_category_that_yields_nothing_below_its_split_is_named(tmp_path):
    photo(tmp_path / "train/cat/a.png")
    photo(tmp_path / "test/cat/a.png")
    (tmp_path / "train/dog").mkdir()
    assert ImageSet.open(tmp_path).notes == ("folders without an image that is read: train/dog",)


def test_a_folder_with_nothing_but_other_files_says_which(tmp_path):
    (tmp_path / "a.heic").touch()
    with pytest.raises(ImageError, match=r"got none; passed over 1 \.heic \(a\.heic\).*save them as JPEG"):
        ImageSet.open(tmp_path)


@pytest.mark.parametrize("record", ["run.json", "selection.json", "inspect.json", "explanation.json"])
def test_results_inside_the_data_are_no_category(tmp_path, record):
    photo(tmp_path / "cat/a.png")
    photo(tmp_path / "out/run1/pictures/x.png")
    kind = record.removesuffix(".json")
    (tmp_path / "out/run1" / record).write_text(json.dumps({"schema": f"partlens.{kind}/2"}))
    images = ImageSet.open(tmp_path)
    assert images.category_counts() == {"cat": 1}
    assert images.notes[0] == "passed over the folders of results out/run1"


def test_a_file_of_ones_own_called_run_json_hides_no_photos(tmp_path):
    photo(tmp_path / "cat/a.png")
    (tmp_path / "cat/run.json").write_text('{"camera": 3}')
    assert len(ImageSet.open(tmp_path)) == 1


@pytest.mark.parametrize(
    ("first", "second", "splits"),
    [
        ("Train", "TEST", {"train", "test"}),
        ("Training", "Testing", {"train", "test"}),
        ("TRAIN", "Val", {"train", "test"}),
    ],
)
def test_split_folders_in_any_case(tmp_path, first, second, splits):
    photo(tmp_path / first / "cat/a.png")
    photo(tmp_path / second / "cat/b.png")
    images = ImageSet.open(tmp_path)
    assert set(images.splits) == splits
    assert images.category_counts() == {"cat": 2}


def test_folders_that_may_mean_something_else_are_said(tmp_path):
    for name in ("train/cat/a.png", "test/cat/a.png", "extra/cat/a.png"):
        photo(tmp_path / "beside" / name)
    note = "the folders test, train are taken for categories, not for splits, since extra lies beside"
    assert ImageSet.open(tmp_path / "beside").notes == (note,)
    for name in ("cats_and_dogs/images/cat/a.png", "cats_and_dogs/images/dog/a.png"):
        photo(tmp_path / "outer" / name)
    inner = tmp_path / "outer/cats_and_dogs/images"
    assert ImageSet.open(tmp_path / "outer").notes == (
        f"all images lie in {inner}: give that folder for the categories cat, dog",
    )
    assert ImageSet.open(inner).category_counts() == {"cat": 1, "dog": 1}  # the remedy, followed
    photo(tmp_path / "loose/cat/a.png")
    photo(tmp_path / "loose/b.png")
    assert ImageSet.open(tmp_path / "loose").notes == (
        "no categories, since 1 images lie beside the folders cat: move them into folders",
    )


def test_a_table_that_is_not_read_is_named_with_what_to_give_instead(tmp_path):
    root = folder(tmp_path)
    (root / "metadata.csv").write_text("file_name,label\ncat/0.png,fox\ncat/1.png,cow\n")
    (root / "prices.csv").write_text("what,price\nfish,3\n")
    notes = ImageSet.open(root).notes
    assert f"metadata.csv names images and is not read: give {root / 'metadata.csv'} instead of the folder" in notes
    assert not any(note.startswith("prices.csv") for note in notes)
    assert ImageSet.open(root / "metadata.csv").category_counts() == {"cow": 1, "fox": 1}


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_not_utf_8_is_read_and_can_be_written(tmp_path):
    photo(tmp_path / "cat/a.png")
    (tmp_path / "cat/a.png").rename(tmp_path / "cat/caf\udce9.png")
    images, bad = ImageSet.open(tmp_path).readable()
    assert (images.keys, bad) == (("cat/caf\\udce9.png",), ())
    json.dumps([images.keys, images.categories], ensure_ascii=False).encode()
    assert len(images.fingerprint()) == 64


# Tables


@pytest.mark.parametrize(
    "header", ["image,Category,Split", "IMAGE,Label,SPLIT", "Image,Class, split ", "file_name,class index,split"]
)
def test_columns_and_splits_in_any_case(tmp_path, header):
    rows = "".join(f"cat/{index}.png,cat,{'Train' if index else 'TEST'}\n" for index in range(4))
    images = ImageSet.open(folder(tmp_path, f"{header}\n{rows}"))
    assert images.category_counts() == {"cat": 4}
    assert images.splits == ("test", "train", "train", "train")
    assert "images.csv gives" in images.notes[0]


def test_columns_that_are_not_used_are_named(tmp_path):
    root = folder(tmp_path, "image,species,label,category,\ncat/0.png,cat,1,fox,\n")
    assert ImageSet.open(root).notes == ("columns of images.csv that are not used: species, label",)
    assert "species" in said(root)


@pytest.mark.parametrize("header", ["image,Split,SPLIT", "image,category,category", "file_name,filename,split"])
def test_two_columns_of_one_meaning_are_refused(tmp_path, header):
    with pytest.raises(ImageError, match=r"one column \w+ in .*Rename or delete one of them"):
        ImageSet.open(folder(tmp_path, f"{header}\ncat/0.png,a,b\n"))


def test_the_column_that_is_written_exactly_so_counts(tmp_path):
    images = ImageSet.open(folder(tmp_path, "image,Category,category\ncat/0.png,a,b\n"))
    assert (images.categories, images.notes) == (("b",), ("columns of images.csv that are not used: Category",))


@pytest.mark.parametrize("sign", [";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_separators_and_encodings(tmp_path, sign, encoding):
    text = sign.join(["image", "category"]) + "\r\n" + sign.join(["cat/0.png", "Käfer, klein"]) + "\r\n"
    folder(tmp_path)
    (tmp_path / "images.csv").write_bytes(text.encode(encoding))
    assert ImageSet.open(tmp_path).categories == ("Käfer, klein",)


def test_excels_line_with_the_separator(tmp_path):
    rows = "sep=;\nimage;left;top;right;bottom\ncat/0.png;0;0;2,5;2\ncat/1.png;0;0;x;2\n"
    with pytest.raises(ImageError, match=r"column 'right' of .*, row 4, got 'x'"):
        ImageSet.open(folder(tmp_path, rows))
    images = ImageSet.open(folder(tmp_path, rows.replace("x", "3")))
    assert images.boxes_px == ((0, 0, 2.5, 2), (0, 0, 3, 2))  # semicolons stand where the comma is the decimal sign


def test_decimal_commas_after_tabs_might_be_thousands_and_are_refused(tmp_path):
    with pytest.raises(ImageError, match="got '1,5'"):
        ImageSet.open(folder(tmp_path, "image\tleft\ttop\tright\tbottom\ncat/0.png\t0\t0\t1,5\t2\n"))


def test_blank_rows_of_a_spreadsheet_are_no_images(tmp_path):
    assert len(ImageSet.open(folder(tmp_path, "image,category\ncat/0.png,a\n,\n\n,\n"))) == 1


def test_another_encoding_is_refused_with_its_row_and_the_remedy_works(tmp_path):
    text = "image,category\ncat/0.png,fox\ncat/1.png,Käfer\n"
    folder(tmp_path)
    (tmp_path / "images.csv").write_bytes(text.encode("cp1252"))
    with pytest.raises(ImageError, match=r"got other bytes in row 3\. Save the table as CSV with the encoding UTF-8"):
        ImageSet.open(tmp_path)
    (tmp_path / "images.csv").write_text(text, encoding="utf-8")
    assert "Käfer" in ImageSet.open(tmp_path).categories


@pytest.mark.parametrize("column", ["image", "file"])
def test_backslashes_of_windows_are_turned_in_both_tables(tmp_path, column):
    rows = {"image": "image\ncat\\0.png\n", "file": "image,file\nx,cat\\0.png\n"}[column]
    key = "cat\\0.png" if column == "image" else "x"
    images = ImageSet.open(folder(tmp_path, rows, f"image,landmark,x,y\n{key},head,1,2\n"))
    assert images.part_truth.count() == {"head": 1}
    assert images.readable()[1] == ()


@pytest.mark.skipif(os.name == "nt", reason="no name holds a backslash there")
def test_a_file_whose_name_holds_a_backslash_keeps_it(tmp_path):
    photo(tmp_path / "a\\b.png")
    (tmp_path / "images.csv").write_text("image\na\\b.png\n")
    (tmp_path / "landmarks.csv").write_text("image,landmark,x,y\na\\b.png,head,1,2\n")
    images = ImageSet.open(tmp_path)
    assert images.keys == ("a\\b.png",)
    assert images.part_truth.count() == {"head": 1}


def test_tables_in_upper_case_are_found(tmp_path):
    folder(tmp_path)
    (tmp_path / "Images.CSV").write_text("image,category\ncat/0.png,fox\n")
    (tmp_path / "LANDMARKS.csv").write_text("image,landmark,x,y\ncat/0.png,head,1,2\n")
    images = ImageSet.open(tmp_path)
    assert (images.categories, images.part_truth.count()) == (("fox",), {"head": 1})


def test_landmarks_beside_a_table_of_another_name_are_said(tmp_path):
    root = folder(tmp_path, landmarks="image,landmark,x,y\ncat/0.png,head,1,2\n")
    (root / "list.csv").write_text("image\ncat/0.png\n")
    assert "landmarks.csv is not read" in ImageSet.open(root / "list.csv").notes[0]


def test_splits_of_other_names_are_said_with_what_to_write(tmp_path):
    rows = "".join(f"cat/{index}.png,{index % 2}\n" for index in range(4))
    root = folder(tmp_path, f"image,split\n{rows}")
    with pytest.raises(ImageError, match="There are 0, 1: write train and test in the column split"):
        ImageSet.open(root).indices(split="train")
    assert any("no image is in the split 'train'" in text for text in check_data(root, few=0).warnings)


def test_missing_categories_of_pandas(tmp_path):
    root = folder(tmp_path, "image,label\ncat/0.png,1.0\ncat/1.png,\ncat/2.png,2.0\n")
    assert ImageSet.open(root).categories == ("1", "", "2")
    pq.write_table(pa.table({"image": ["cat/0.png", "cat/1.png"], "label": [1.0, float("nan")]}), root / "l.parquet")
    assert ImageSet.open(root / "l.parquet").categories == ("1", "")
    (root / "images.csv").write_text("image,label\ncat/0.png,nan\n")
    assert any("'nan', as pandas writes" in text for text in check_data(root, few=0).warnings)


@pytest.mark.parametrize("content", ["version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "<html></html>", ""])
def test_a_table_that_is_something_else(tmp_path, content):
    folder(tmp_path)
    (tmp_path / "images.csv").write_text(content)
    with pytest.raises(ImageError, match=r"git-lfs|a web page|\(none\)"):
        ImageSet.open(tmp_path)


@pytest.mark.parametrize("end", ["\r\n", "\r", "\n"])
@pytest.mark.parametrize("head", ["image,category", ",image,category,,", '"image","category"'])
def test_tables_as_programs_write_them(tmp_path, end, head):
    row = {"i": "cat/0.png,fox", ",": "0,cat/0.png,fox,,", '"': '"cat/0.png","fox"'}[head[0]]
    folder(tmp_path)
    (tmp_path / "images.csv").write_bytes(f"{head}{end}{row}{end}".encode("utf-8-sig"))
    assert ImageSet.open(tmp_path).categories == ("fox",)
    (tmp_path / "list.tsv").write_bytes(f"{head}{end}{row}{end}".replace(",", "\t").encode())
    assert ImageSet.open(tmp_path / "list.tsv").categories == ("fox",)


def test_a_table_that_holds_the_photos_themselves_is_refused(tmp_path):
    cells = [{"bytes": b"\x89PNG", "path": "a.png"}]
    pq.write_table(pa.table({"image": cells, "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(ImageError, match="got dict in a cell. Save the photos as files"):
        ImageSet.open(tmp_path / "train.parquet")


def test_categories_that_differ_in_case_alone_are_warned_of(tmp_path):
    root = folder(tmp_path, "image,category\ncat/0.png,Fox\ncat/1.png,fox\n")
    text = "categories that differ in upper and lower case alone: Fox = fox"
    assert text in check_data(root, few=0).warnings


# Landmarks


def test_positions_from_0_to_1_are_said_to_be_read_as_pixels(tmp_path):
    root = folder(tmp_path, landmarks="image,landmark,x,y\ncat/0.png,head,0.5,0.25\ncat/1.png,head,0.75,1\n")
    assert any("all positions in landmarks.csv are from 0 to 1" in text for text in check_data(root, few=0).warnings)


@pytest.mark.parametrize(
    ("column", "hidden", "seen"),
    [
        ("visible", "0", "1"),
        ("Visibility", "False", "True"),
        ("v", "0", "2"),
        ("v", "-1", "1"),
        ("v", "0.0", "0.93"),
        ("occluded", "1", "0"),
        ("Hidden", "yes", "no"),
        ("visible", "0", ""),
    ],
)
@pytest.mark.parametrize("place", ["0,0", ",", "nan,nan", "9,9"])
def test_hidden_landmarks_have_no_position(tmp_path, column, hidden, seen, place):
    rows = f"a,head,{place},{hidden}\nb,head,3,4,{seen}\n"
    (tmp_path / "landmarks.csv").write_text(f"image,landmark,x,y,{column}\n{rows}")
    truth = _read_landmark_table(tmp_path / "landmarks.csv")
    assert truth.keys == ("a", "b")
    np.testing.assert_array_equal(truth.positions_px[:, 0], [[np.nan, np.nan], [3, 4]])
    assert not any("0,0" in text for text in truth.warnings)


def test_a_word_for_visible_that_nobody_knows_is_refused_by_its_row(tmp_path):
    (tmp_path / "landmarks.csv").write_text("image,landmark,x,y,visible\na,head,1,2,maybe\n")
    with pytest.raises(ImageError, match="a number in column 'visible' of .*row 2, got 'maybe'"):
        _read_landmark_table(tmp_path / "landmarks.csv")


def test_many_landmarks_in_the_corner_and_unknown_columns_are_warned_of(tmp_path):
    rows = "".join(f"cat/{index}.png,head,{'0,0' if index % 2 else '2,3'},0.5\n" for index in range(4))
    root = folder(tmp_path, landmarks=f"image,landmark,X,y,confidence\n{rows}")
    warnings = check_data(root, few=0).warnings
    assert "columns of landmarks.csv that are not used: confidence" in warnings
    assert any(text.startswith("2 landmarks stand at exactly 0,0") for text in warnings)


def test_landmarks_without_an_image_are_counted_and_named(tmp_path):
    rows = "".join(f"cat/{index}.{'PNG' if index % 2 else 'png'},head,2,3\n" for index in range(4))
    root = folder(tmp_path, landmarks=f"image,landmark,x,y\n{rows}")
    text = "landmarks.csv has landmarks of 2 images that are not there: cat/1.PNG (nearest: cat/1.png), "
    assert any(warning.startswith(text) for warning in check_data(root, few=0).warnings)


# Pixels


def grey(path: Path, values: np.ndarray) -> ImageSet:
    Image.fromarray(values).save(path)
    return ImageSet.from_files([path])


@pytest.mark.parametrize("ending", ["png", "tif"])
@pytest.mark.parametrize(("white", "noted"), [(255, True), (1023, True), (4095, True), (65535, False)])
def test_the_brightest_value_of_16_bit_images(tmp_path, ending, white, noted):
    images = grey(tmp_path / f"x.{ending}", np.linspace(0, white, 1600).reshape(40, 40).astype(np.uint16))
    assert np.asarray(images.read(0)).max() == 255
    assert len(images.readable()[0].notes) == noted
    assert images.readable()[0].notes == ((f"1 images read with {white} as white: {images.keys[0]}",) if noted else ())


def test_colours_of_12_bits_in_16_are_said_to_be_nearly_black(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for name, bright in (("dark.png", 4095), ("full.png", 65535)):
        rows = np.linspace(0, bright, 4 * 5 * 3).reshape(4, 15).astype(">u2")
        head, raw = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0), b"".join(b"\0" + row.tobytes() for row in rows)
        content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert ImageSet.open(tmp_path).readable()[0].notes == (
        "1 images nearly black: their 16-bit colours hold 12 bits at most; save them with 8 bits: dark.png",
    )


@pytest.mark.parametrize("ending", ["tif", "jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 7, 8])
def test_size_and_pixels_agree_however_the_photo_is_turned(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / f"x.{ending}", exif=exif)
    images = ImageSet.from_files([tmp_path / f"x.{ending}"])
    assert images.size_px(0) == images.read(0).size == ((40, 60) if orientation > 4 else (60, 40))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid", "the pointer of git-lfs to it. Run git lfs pull"),
        ("<!DOCTYPE html><html></html>", "a web page"),
        ("", "an empty file"),
        ("whatever", "the content of another kind of file"),
    ],
)
def test_photos_that_are_something_else(tmp_path, content, text):
    (tmp_path / "x.jpg").write_text(content)
    with pytest.raises(ImageError, match=text):
        ImageSet.from_files([tmp_path / "x.jpg"]).read(0)


@pytest.mark.skipif(os.name == "nt", reason="no pipes in folders there")
@pytest.mark.timeout(60)
def test_a_pipe_or_a_folder_called_like_a_photo_is_not_waited_for(tmp_path):
    photo(tmp_path / "cat/a.png")
    os.mkfifo(tmp_path / "cat/pipe.png")
    (tmp_path / "images.csv").write_text("image\ncat/a.png\ncat/pipe.png\ncat\n")
    images, bad = ImageSet.open(tmp_path).readable()
    assert images.keys == ("cat/a.png",)
    assert all("got a folder, a pipe or a device" in each.reason for each in bad)
    assert len(bad) == 2


# Kinds at the door


@pytest.mark.parametrize(
    "call",
    [
        lambda: ImageSet.from_arrays(None),
        lambda: ImageSet.from_arrays(5),
        lambda: ImageSet.from_arrays("photos"),
        lambda: ImageSet.from_arrays(["a.png"]),
        lambda: ImageSet.from_arrays([None]),
        lambda: ImageSet.from_arrays(Image.new("RGB", (4, 4))),
        lambda: ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8), photos=[1]),
        lambda: ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8), splits=[None]),
        lambda: ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8), categories=3),
        lambda: ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8), categories="c"),
        lambda: ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8)).read("0"),
        lambda: ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8)).take(["a"]),
        lambda: ImageSet.from_arrays(np.zeros((1, 4, 4, 3), np.uint8)).with_parts(None),
        lambda: ImageSet.from_generator(lambda _: None, ["a"]).read(0),
        lambda: ImageSet.open(None),
        lambda: ImageSet.from_files([3]),
        lambda: PartTruth(None, (), np.zeros((0, 0, 2)), np.zeros((0, 0, 2)), np.zeros((0, 2))),
        lambda: PartTruth(("a",), (1,), np.zeros((1, 1, 2)), np.zeros((1, 1, 2)), np.zeros((1, 2))),
        lambda: PartTruth(("a",), ("b",), "x", np.zeros((1, 1, 2)), np.zeros((1, 2))),
        lambda: PartTruth(("a",), ("b",), [[[1, 2], [3]]], np.zeros((1, 1, 2)), np.zeros((1, 2))),
    ],
)
def test_wrong_kinds_are_refused_by_name(call):
    with pytest.raises(InputTypeError, match="^Expected .*, got .*"):
        call()


def test_one_colour_picture_is_not_taken_for_many_grey_ones():
    with pytest.raises(ImageError, match=r"got \(40, 30, 3\). Stack the images first, as with images\[None\]"):
        ImageSet.from_arrays(np.zeros((40, 30, 3), np.uint8))


def test_pillows_images_of_any_mode():
    palette = Image.new("RGB", (4, 4), (200, 30, 40)).convert("P")
    images = ImageSet.from_arrays([palette, Image.new("RGBA", (4, 4)), np.zeros((4, 4), np.uint8)])
    assert np.abs(np.asarray(images.read(0), int)[0, 0] - (200, 30, 40)).max() < 30
    assert images.read(1).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("positions", "sizes", "image"),
    [(np.inf, 1, 1), (1, -2, 1), (1, np.inf, 1), (1, 1, -1), (1, 1, np.inf)],
)
def test_infinite_positions_and_sizes_below_0_are_refused(positions, sizes, image):
    with pytest.raises(ImageError, match="finite"):
        PartTruth(("head",), ("a",), np.full((1, 1, 2), positions), np.full((1, 1, 2), sizes), np.full((1, 2), image))
