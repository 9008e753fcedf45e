from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from partlens.cli import main
from partlens.data.check import check_data
from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError
from partlens_papers.data.joined import PhotoSource, join_data, write_joined


def folder(path: Path, colours: dict[str, tuple[int, int, int]]) -> Path:
    for name, colour in colours.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), colour).save(path / name)
    return path


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    found = folder(tmp_path / "birds", {"crow/a.png": (1, 2, 3), "wren/b.png": (4, 5, 6), "wren/c.png": (7, 8, 9)})
    rows = ["image,landmark,x,y", "crow/a.png,beak,1,2", "wren/c.png,beak,3,1"]
    (found / "landmarks.csv").write_text("\n".join(rows) + "\n")
    return found


@pytest.fixture
def others(tmp_path: Path) -> Path:
    return folder(tmp_path / "others", {"fox/a.png": (10, 0, 0), "cat/b.png": (20, 0, 0)})


def test_two_sets_open_as_one(birds: Path, others: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.json"
    assert join_data(out, birds, others, category="bird") == {"background": 2, "bird": 3}
    images = ImageSet.open(out)
    alone = ImageSet.open(birds)
    assert images.path == out.resolve()
    assert images.keys == (*alone.keys, "background/cat/b.png", "background/fox/a.png")
    assert images.splits[:3] == alone.splits
    assert images.photos[3:] == images.keys[3:]
    assert [images.read(row).getpixel((0, 0)) for row in (1, 4)] == [(4, 5, 6), (10, 0, 0)]
    assert images.size_px(4) == (6, 4)
    truth, own = images.part_truth, alone.part_truth
    assert truth is not None
    assert own is not None
    assert truth.count() == own.count() == {"beak": 2}
    assert images.take([4, 0]).read(0).getpixel((0, 0)) == (10, 0, 0)


def test_the_fingerprint_follows_content_and_order(birds: Path, others: Path, tmp_path: Path) -> None:
    join_data(tmp_path / "a.json", birds, others)
    join_data(tmp_path / "b.json", others, birds)
    first = ImageSet.open(tmp_path / "a.json").fingerprint()
    assert first == ImageSet.open(tmp_path / "a.json").fingerprint()
    assert first != ImageSet.open(tmp_path / "b.json").fingerprint()
    Image.new("RGB", (6, 4), (11, 0, 0)).save(others / "fox/a.png")
    assert first != ImageSet.open(tmp_path / "a.json").fingerprint()


def test_check_says_what_it_is_and_finds_the_same_photo_in_both_sets(birds: Path, others: Path, tmp_path: Path) -> None:
    (others / "fox" / "a.png").write_bytes((birds / "wren" / "b.png").read_bytes())
    join_data(tmp_path / "a.json", birds, others, category="bird")
    found = check_data(tmp_path / "a.json")
    assert (found.layout, found.title) == ("joined", "several sets as one")
    assert found.duplicates == (("wren/b.png", "background/fox/a.png"),)
    assert found.landmarks == {"beak": {"bird": 2}}


def test_a_single_set_keeps_its_names_and_an_image_that_cannot_be_read_is_dropped(birds: Path, tmp_path: Path) -> None:
    (birds / "crow" / "d.png").write_bytes(b"no image")
    out = tmp_path / "one.json"
    write_joined(out, [PhotoSource(birds)])
    images, dropped = ImageSet.open(out).readable()
    assert images.category_counts() == {"crow": 1, "wren": 2}
    assert [image.key for image in dropped] == ["crow/d.png"]
    assert images.path == out.resolve()
    both = join_data(tmp_path / "two.json", birds, birds, category="bird")
    assert both == {"background": 4, "bird": 4}
    kept, lost = ImageSet.open(tmp_path / "two.json").readable()
    assert len(kept) == 6
    assert {image.key for image in lost} == {"crow/d.png", "background/crow/d.png"}


def test_only_what_was_opened_as_a_whole_has_a_path(birds: Path) -> None:
    images = ImageSet.open(birds)
    assert images.path == birds.resolve()
    assert images.take([0]).path is None
    assert images.select("wren").path is None
    assert ImageSet.open(birds, crop=None).path is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sets": []}, '"schema": "partlens.photos/1" and a list "sets" in .*, got no schema'),
        ([1], "got list"),
        ({"schema": "partlens.photos/1", "sets": []}, "at least one set to join"),
        ({"schema": "partlens.photos/1", "sets": [{"file": "x"}]}, "a path in set 1"),
        ({"schema": "partlens.photos/1", "sets": [{"path": "birds", "margin": 1}]}, "fields among .*, got margin"),
        ({"schema": "partlens.photos/1", "sets": [{"path": "birds", "category": 3}]}, "a category's name in set 1"),
        ({"schema": "partlens.photos/1", "sets": [{"path": "nowhere"}]}, "nowhere"),
        ({"schema": "partlens.photos/1", "sets": [{"path": "birds", "crop": "half"}]}, "half"),
    ],
)
def test_a_wrong_file_has_one_clear_error(content: object, message: str, birds: Path, tmp_path: Path) -> None:
    assert birds.is_dir()
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    with pytest.raises((ImageError, InputError), match=message):
        ImageSet.open(tmp_path / "wrong.json")


def test_wrong_requests_say_what_is_missing(birds: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got no --photos"):
        join_data(tmp_path / "a.json", None)
    with pytest.raises(InputError, match=r"NAME.json"):
        join_data(tmp_path / "a.csv", birds)
    with pytest.raises(ImageError, match="nothing at"):
        ImageSet.open(tmp_path / "absent.json")
    join_data(tmp_path / "a.json", birds)
    with pytest.raises(InputError, match="Write them into it"):
        ImageSet.open(tmp_path / "a.json", crop=None)
    with pytest.raises(ImageError, match="1 prefixes"):
        ImageSet.from_sets([ImageSet.open(birds)] * 2, [], name="x")


def test_the_command_writes_the_file_and_says_what_is_in_it(
    birds: Path, others: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "all.json")
    assert main(["data", "join", out, "--photos", str(birds), "--category", "bird", "--background", str(others)]) == 0
    said = capsys.readouterr().out
    assert "2 background" in said
    assert "3 bird" in said
    assert ImageSet.open(out).category_counts() == {"background": 2, "bird": 3}
    assert main(["data", "join", out]) != 0
    assert "got no --photos" in capsys.readouterr().err
