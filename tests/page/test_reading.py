"""Pictures that a page carries: what is embedded, what is refused, and how large it gets."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from partlens.errors import RunError
from partlens.page.views import LONGEST_PX, LOSSLESS_BYTES, Pictures


def noise(path, width=40, height=20, mode="RGB", seed=0):
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    values = np.random.default_rng(seed).integers(0, 255, (height, width, *channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def opened(uri: str) -> Image.Image:
    head, _, content = uri.partition(",")
    assert head in {"data:image/png;base64", "data:image/jpeg;base64"}
    return Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.fixture
def pictures(tmp_path):
    return Pictures(tmp_path, "Run it again", 10_000_000)


def test_a_small_picture_is_embedded_byte_for_byte(tmp_path, pictures):
    path = noise(tmp_path / "a" / "small.png")
    found = pictures.read(tmp_path, "a/small.png")
    assert base64.b64decode(found.uri.partition(",")[2]) == path.read_bytes()
    assert (found.width_px, found.height_px) == (40, 20)
    assert pictures.spent_bytes == len(found.uri)


def test_a_large_picture_is_made_smaller_but_keeps_its_shape(tmp_path, pictures):
    path = noise(tmp_path / "large.png", LONGEST_PX * 2, 90)
    found = pictures.read(tmp_path, "large.png")
    shown = opened(found.uri)
    assert (shown.format, shown.size) == ("JPEG", (LONGEST_PX, 45))
    assert (found.width_px, found.height_px) == (LONGEST_PX * 2, 90)
    assert len(found.uri) < path.stat().st_size


def test_a_large_transparent_picture_stays_transparent(tmp_path, pictures):
    path = noise(tmp_path / "glass.png", 200, 100, "RGBA")
    assert path.stat().st_size > LOSSLESS_BYTES
    shown = opened(pictures.read(tmp_path, "glass.png").uri)
    assert (shown.format, shown.mode) == ("PNG", "RGBA")


def test_a_picture_shown_twice_counts_twice(tmp_path, pictures):
    noise(tmp_path / "one.png")
    first = pictures.read(tmp_path, "one.png")
    assert pictures.read(tmp_path, "one.png") == first
    assert pictures.spent_bytes == 2 * len(first.uri)


def test_what_fits_is_asked_without_spending(tmp_path):
    noise(tmp_path / "one.png")
    size = len(Pictures(tmp_path, "", 0).read(tmp_path, "one.png").uri)
    pictures = Pictures(tmp_path, "Run it again", 2 * size)
    assert pictures.fit(tmp_path, ["one.png", "one.png", None])
    assert not pictures.fit(tmp_path, ["one.png"] * 3)
    assert pictures.spent_bytes == 0


@pytest.mark.parametrize("name", [None, "", 3, ["x"]])
def test_no_name_is_no_picture(tmp_path, pictures, name):
    assert pictures.read(tmp_path, name) is None


def test_a_missing_picture_is_named_with_the_remedy(tmp_path, pictures):
    with pytest.raises(RunError, match=r"^Expected a picture .*none\.png, got nothing there\. Run it again\.$"):
        pictures.read(tmp_path, "none.png")


def test_a_picture_outside_the_folder_is_refused_until_it_is_admitted(tmp_path):
    noise(tmp_path / "secret" / "x.png")
    (tmp_path / "run").mkdir()
    pictures = Pictures(tmp_path / "run", "Run it again", 10**6)
    with pytest.raises(RunError, match=r"Expected a picture inside .*run, got \.\./secret/x\.png\. Run it again"):
        pictures.read(tmp_path / "run", "../secret/x.png")
    pictures.admit(tmp_path / "secret")
    assert pictures.read(tmp_path / "run", "../secret/x.png").width_px == 40


@pytest.mark.parametrize("damage", ["cut", "text", "gif", "empty"])
def test_a_damaged_picture_is_refused(tmp_path, pictures, damage):
    path = noise(tmp_path / "bad.png", 120, 80)
    whole = path.read_bytes()
    gif = io.BytesIO()
    Image.new("P", (4, 4)).save(gif, "GIF")
    path.write_bytes(
        {"cut": whole[: len(whole) // 2], "text": b"no picture", "gif": gif.getvalue(), "empty": b""}[damage]
    )
    with pytest.raises(RunError, match=r"Expected a PNG or JPEG picture in .*bad\.png, got .*\. Run it again\.$"):
        pictures.read(tmp_path, "bad.png")


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_read(tmp_path, pictures, monkeypatch):
    noise(tmp_path / "bomb.png", 120, 80)
    for limit in (100 * 80, 50 * 80):  # Pillow warns above its limit, and refuses above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(RunError, match=r"Expected a PNG or JPEG picture in .*bomb\.png, got .*Run it again"):
            pictures.read(tmp_path, "bomb.png")


def test_pictures_that_are_too_large_together_are_refused(tmp_path):
    noise(tmp_path / "one.png")
    pictures = Pictures(tmp_path, "Run it again", 5000)
    pictures.read(tmp_path, "one.png")
    pictures.check_room()
    for _ in range(3):
        pictures.read(tmp_path, "one.png")
    with pytest.raises(RunError, match=r"pictures of at most 0 MB for the page of .*, got 0 MB. Run it again"):
        pictures.check_room()
