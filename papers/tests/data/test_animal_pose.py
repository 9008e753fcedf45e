"""Animal-Pose is read as it is: one image per animal, its keypoints moved with the cut."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from partlens.data.images import ImageSet
from partlens.errors import ImageError
from partlens_papers.data.convert import convert


@pytest.fixture
def poses(tmp_path: Path) -> Path:
    folder = tmp_path / "poses"
    (folder / "images").mkdir(parents=True)
    for name in ("one.jpg", "two.jpg"):
        Image.new("RGB", (100, 60)).save(folder / "images" / name)
    animals = [
        {"image_id": 1, "bbox": [10, 20, 50, 60], "category_id": 2, "keypoints": [[20, 30, 1], [0, 0, 0]]},
        {"image_id": 2, "bbox": [0, 0, 30, 30], "category_id": 2, "keypoints": [[5, 6, 1], [90, 50, 1]]},
        {"image_id": 2, "bbox": [40, 0, 90, 60], "category_id": 1, "keypoints": [[45, 10, 1], [80, 50, 1]]},
    ]
    kinds = [{"id": k, "name": n, "keypoints": ["nose", "tail"]} for k, n in ((1, "dog"), (2, "cat"))]
    content = {"images": {"1": "one.jpg", "2": "two.jpg"}, "annotations": animals, "categories": kinds}
    (folder / "keypoints.json").write_text(json.dumps(content))
    return folder


def test_every_animal_is_an_image_with_its_own_keypoints(poses, tmp_path):
    made = convert("animal-pose", poses, tmp_path / "table")
    images = ImageSet.open(tmp_path / "table")
    assert images.categories == ("cat", "cat", "dog")
    assert images.photos == ("one", "two", "two")
    assert images.read(0).size == (40, 40)
    truth = images.part_truth
    assert truth.landmarks == ("nose", "tail")
    np.testing.assert_allclose(truth.positions_px[:, 0], [[10, 10], [5, 6], [5, 10]])
    assert np.isnan(truth.positions_px[:2, 1]).all()  # not marked; marked outside the box
    np.testing.assert_allclose(truth.positions_px[2, 1], [40, 50])
    assert [part.landmark for part in made.unused_parts] == ["tail"]


def test_whole_photos_are_those_of_one_animal(poses, tmp_path):
    made = convert("animal-pose", poses, tmp_path / "table", crop="photo")
    assert made.categories == {"cat": 1}
    assert {item.reason for item in made.left_out} == {"two.jpg shows 2 animals"}


@pytest.mark.parametrize("text", ["{", '{"images": {}}', "[]"])
def test_a_damaged_file_is_one_error(poses, tmp_path, text):
    (poses / "keypoints.json").write_text(text)
    with pytest.raises(ImageError, match=r"annotations of Animal-Pose in .*keypoints\.json"):
        convert("animal-pose", poses, tmp_path / "table")


@pytest.mark.data
def test_the_raw_sample_equals_the_keypoints_of_pascal_s_objects(shared, tmp_path):
    convert("animal-pose", shared / "data" / "animal-pose-raw-sample", tmp_path, crop="box")
    raw, voc = ImageSet.open(tmp_path), shared / "data" / "voc-part"
    assert len(raw) == 66
    with (voc / "images.csv").open() as handle:
        objects = [row for row in csv.DictReader(handle) if row["photo"] in raw.photos]
    with (voc / "keypoints.csv").open() as handle:
        wanted = {(row["image"], row["keypoint"]): (float(row["x"]), float(row["y"])) for row in csv.DictReader(handle)}
    truth, compared = raw.part_truth, 0
    shrunk = 320 / 500  # the sample's photos
    for row, box in enumerate(np.array(raw.boxes_px) / shrunk):
        for one in (each for each in objects if each["photo"] == raw.photos[row]):
            first, last = (np.array([float(one[f"x{end}"]), float(one[f"y{end}"])]) for end in ("min", "max"))
            if np.abs(box - [*first, *last]).max() > 4:
                continue  # another animal, or one of which both data sets draw boxes of their own
            for column, name in enumerate(truth.landmarks):
                place = wanted.get((one["image"], name), (np.nan, np.nan))
                mine = (truth.positions_px[row, column] / shrunk + box[:2] - first) * 224 / (last - first)
                if np.isfinite(mine).all() and np.isfinite(place).all():
                    assert np.abs(mine - place).max() < 3 * 224 / (last - first).min()
                    compared += 1
    assert compared > 100
