"""Part interpretability from the photos' masks or boxes to the evaluation and its page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from partlens.data.annotations import PartTruth
from partlens.data.images import ImageSet
from partlens.errors import ImageError
from partlens.estimate import Estimate
from partlens.evaluation.part_regions import PartRegions, RegionPass, _strangers
from partlens.evaluation.results import RegionScores
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.network.receptive_field import ReceptiveField
from partlens.page.explainer import _judge_regions
from partlens.verbs.evaluate import evaluate
from partlens.verbs.fit_explainer import fit_explainer
from partlens.verbs.runs import report

FIELD = ReceptiveField((16, 16), (30, 30), (-7, -7))
ROLES = {"explainer": "explainer"}


def of_arrays(masks: dict[str, np.ndarray] | None, truth: PartTruth | None = None) -> tuple[ImageSet, Any]:
    """One photo 60 px wide and 40 high."""
    nothing = np.full((1, 1, 2), np.nan)
    given = truth or PartTruth(("head",), ("000000",), nothing, nothing, np.array([[60.0, 40.0]]))
    if masks is not None:
        given = dataclasses.replace(given, masks=lambda _: masks)
    return ImageSet.from_arrays([np.zeros((40, 60, 3), np.uint8)]).with_parts(given), given


def test_masks_go_through_the_performers_own_preprocessing() -> None:
    """A mask warped point by point is the mask seen as a picture, cropped and scaled as photos are."""
    mask = np.zeros((40, 60), dtype=bool)
    mask[5:30, 12:40] = True
    images, _ = of_arrays({"head": mask, "unasked": mask})
    for preprocessing in (
        Preprocessing(size_px=(56, 56), resize="crop", resize_px=64),
        Preprocessing(size_px=(112, 56), resize="squash"),
    ):
        regions = PartRegions.of(images, [0], preprocessing)
        assert regions is not None
        assert (regions.kind, regions.names) == ("masks", ("head",))
        rows, cols = preprocessing.size_px
        picture = preprocessing.frame(Image.fromarray(mask.astype(np.uint8) * 255))
        seen = torch.from_numpy(np.asarray(picture)[..., 0] > 127)
        own = regions.parts[0][0].reshape(rows, cols)
        assert float((seen == own).double().mean()) > 0.98
        assert 0.1 < float(own.double().mean()) < 0.9


def test_a_mask_of_another_size_is_refused() -> None:
    images, _ = of_arrays({"head": np.ones((60, 40), dtype=bool)})
    with pytest.raises(ImageError, match="a mask of head as large as 000000, 60x40 px, got 40x60"):
        PartRegions.of(images, [0], Preprocessing(size_px=(56, 56), resize="squash"))


def test_parts_for_other_images_are_refused() -> None:
    images, truth = of_arrays(None)
    with pytest.raises(ImageError, match="parts of at least one of the images, got b for 000000"):
        images.with_parts(dataclasses.replace(truth, keys=("b",)))


def test_boxes_stand_in_for_masks_and_what_is_unknown_is_absent() -> None:
    position, size = np.full((2, 2, 2), np.nan), np.full((2, 2, 2), np.nan)
    position[0, 0], size[0, 0] = (30.0, 20.0), (30.0, 10.0)
    position[0, 1] = (30.0, 20.0)  # a point without a size
    truth = PartTruth(("head", "tail"), ("000000", "000001"), position, size, np.tile([60.0, 40.0], (2, 1)))
    images = ImageSet.from_arrays([np.zeros((40, 60, 3), np.uint8)] * 2).with_parts(truth)
    regions = PartRegions.of(images, [0, 1], Preprocessing(size_px=(40, 60), resize="squash"))
    assert regions is not None
    assert regions.kind == "boxes"
    assert regions.present.tolist() == [[True, False], [False, False]]
    own = regions.parts[0][0].reshape(40, 60)
    assert own.nonzero()[:, 0].unique().tolist() == list(range(15, 25))
    assert own.nonzero()[:, 1].unique().tolist() == list(range(15, 45))
    assert regions.median_radius_px == pytest.approx((300 / np.pi) ** 0.5)
    points = dataclasses.replace(truth, sizes_px=np.full((2, 2, 2), np.nan))
    only_points = images.with_parts(points)
    assert PartRegions.of(only_points, [0, 1], Preprocessing(size_px=(40, 60), resize="squash")) is None


@pytest.mark.parametrize("photos", [[0, 1, 2, 3, 4], [7, 7, 7, 2, 2, 9, 4, 4], [3, 1]])
def test_regions_of_other_photos_are_of_other_photos(photos: list[int]) -> None:
    numbers = torch.tensor(photos)
    order = _strangers(numbers, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(len(photos)))
    assert not bool((numbers[order] == numbers).any())


def made_regions(photos: int, generator: torch.Generator) -> tuple[PartRegions, torch.Tensor]:
    """Photos of 64 px whose part is one of sixteen squares, and maps that peak on it."""
    where = torch.randint(4, (photos, 2), generator=generator)
    points = torch.tensor([[x + 0.5, y + 0.5] for y in range(64) for x in range(64)], dtype=torch.float64)
    parts, maps = [], torch.zeros(photos, 2, 4, 4)
    for i, (row, col) in enumerate(where.tolist()):
        part = torch.zeros(1, 64, 64, dtype=torch.bool)
        part[0, 16 * row : 16 * row + 16, 16 * col : 16 * col + 16] = True
        parts.append(part.flatten(1))
        maps[i, 0, row, col] = 1.0
        maps[i, 1] = torch.rand(4, 4, generator=generator)
    return PartRegions("masks", ("head",), tuple(parts), points, (64, 64)), maps


def test_a_followed_part_stands_out_and_categories_are_measured_apart() -> None:
    generator = torch.Generator().manual_seed(4)
    regions, maps = made_regions(48, generator)
    photos = torch.arange(48)
    one = RegionPass(regions, ["explainer"], torch.zeros(48, dtype=torch.long), 1, 1 / 16)
    for start in range(0, 48, 10):
        one.add("explainer", maps[start : start + 10])
    found = one.scores({"explainer": FIELD}, {}, photos, ROLES, seed=0)
    assert found.regions == "masks"
    assert found.photos == {"head": 48}
    assert found.readings["round"].radius_px == {"explainer": 15.0}
    assert found.readings["part_sized"].radius_px == {"explainer": 9.0}  # 16 x 16 px
    assert found.readings["scaled"].radius_px is None
    for score in found.readings.values():
        own, other = score.layers["explainer"].value, score.other_photo["explainer"].value
        assert own > 0.5 > 2 * other
        assert own > score.random.value
    labels = (photos >= 20).long()
    assigned = {"explainer": torch.tensor([1, 0])}
    both = RegionPass(regions, ["explainer"], labels, 2, 1 / 16)
    for start in range(0, 48, 16):  # photos of both categories in one batch
        both.add("explainer", maps[start : start + 16])
    joint = both.scores({"explainer": FIELD}, assigned, photos, ROLES, seed=0)
    apart = []
    for number, filters in ((0, 1), (1, 0)):
        rows = (labels == number).nonzero()[:, 0]
        part = dataclasses.replace(regions, parts=tuple(regions.parts[i] for i in rows))
        alone = RegionPass(part, ["explainer"], torch.zeros(len(rows), dtype=torch.long), 1, 1 / 16)
        alone.add("explainer", maps[rows][:, [filters]])
        apart.append(alone.scores({"explainer": FIELD}, {}, photos[rows], ROLES, seed=0))
    for reading in ("round", "scaled"):
        values = [one.readings[reading].layers["explainer"].value for one in apart]
        assert joint.readings[reading].layers["explainer"].value == pytest.approx(sum(values) / 2)
        assert values[1] > values[0]


def test_an_evaluation_has_it_where_parts_have_regions(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    small = {"epochs": 2, "warmup_epochs": 1, "views": 3, "batch_size": 8, "background_batch": 4}
    run = fit_explainer(tiny, few_flowers, out=tmp_path / "run", config=small, seeds=1).path
    found = evaluate(run, few_flowers, model=tiny, gallery="none", rounds=5).part_interpretability
    assert found is not None
    assert found.regions == "masks"
    assert set(found.photos) == set(few_flowers.part_truth.landmarks)
    tap = tiny.field(str(tiny.default_tap))
    radii = found.readings["round"].radius_px
    assert radii is not None
    assert radii["tap"] == pytest.approx((tap.size_px[0] * tap.size_px[1]) ** 0.5 / 2, abs=0.06)
    assert radii["explainer"] == pytest.approx(radii["tap"] + 2 * tap.stride_px[0], abs=0.06)
    for one in found.readings.values():
        for score in (*one.layers.values(), *one.other_photo.values(), one.random, one.centre):
            assert 0 <= score.value <= 1
            assert score.interval[0] <= score.value <= score.interval[1]
            assert score.unit == "photos"
        assert set(one.layers) == {"explainer", "tap", "top"}
    assert one.random.n == len(few_flowers.indices(split="test"))
    page = report(run).read_text()
    assert "Part interpretability (CVPR 2018)" in page
    assert f"round field in theory, as in print, radius {radii['explainer']:.0f} px" in page
    points = dataclasses.replace(
        few_flowers.part_truth, masks=None, sizes_px=np.full_like(few_flowers.part_truth.sizes_px, np.nan)
    )
    bare = evaluate(run, few_flowers.with_parts(points), model=tiny, gallery="none", rounds=5)
    assert bare.part_interpretability is None
    assert "Part interpretability (CVPR 2018)" not in report(run).read_text()


def score(own: float, other: float, centre: float, half: float = 0.02) -> RegionScores:
    def measured(value: float) -> Estimate:
        return Estimate(value, (value - half, value + half), 50)

    return RegionScores(
        radius_px={"explainer": 20.0},
        layers={"explainer": measured(own)},
        other_photo={"explainer": measured(other)},
        random=measured(0.1),
        centre=measured(centre),
    )


@pytest.mark.parametrize(
    ("given", "worth"),
    [
        (score(0.3, 0.1, 0.6), "nothing"),
        (score(0.3, 0.29, 0.1), "level"),
        (score(0.3, 0.1, 0.1), "above"),
        (score(float("nan"), 0.1, 0.1), "undefined"),
    ],
)
def test_what_a_score_is_worth(given: RegionScores, worth: str) -> None:
    assert _judge_regions(given) == worth
