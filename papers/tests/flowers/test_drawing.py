"""Generated flowers: exact masks, equal bytes, and a class that only one part's colour gives away."""

import hashlib
import pickle

import numpy as np
import pytest

from partlens.data.flowers import COLOURS, PARTS, PETAL_CATEGORIES
from partlens.data.folders import split_of
from partlens.errors import InputError
from partlens_papers.flowers.categories import STEM_CATEGORIES
from partlens_papers.flowers.drawing import generated_flowers, render_flower


def test_the_same_seed_gives_the_same_bytes():
    want = ("be11a90f717c5ac0", "643b2fbe223439d7", "906a8b17cec91adc")
    got = tuple(hashlib.sha256(render_flower(seed, size=64).image.tobytes()).hexdigest()[:16] for seed in (0, 1, 2))
    assert got == want


def test_a_flower_is_complete():
    flower = render_flower(3, "petal-blue", size=96)
    assert flower.image.shape == (96, 96, 3)
    assert flower.image.dtype == np.uint8
    assert flower.category == "petal-blue"
    assert tuple(flower.masks) == tuple(flower.landmarks) == tuple(flower.sizes) == PARTS
    assert np.sum(list(flower.masks.values()), axis=0).max() == 1
    for part in ("stem", "petal", "centre"):
        rows, cols = np.nonzero(flower.masks[part])
        assert flower.landmarks[part] == pytest.approx((cols.mean() + 0.5, rows.mean() + 0.5))
        assert flower.sizes[part] == (np.ptp(cols) + 1, np.ptp(rows) + 1)


def test_the_category_changes_the_colour_of_one_part_only():
    for seed in range(12):
        red, blue = render_flower(seed, "petal-red"), render_flower(seed, "petal-blue")
        changed = np.any(red.image != blue.image, axis=2)
        for part in PARTS:
            np.testing.assert_array_equal(red.masks[part], blue.masks[part])
        rows, cols = np.nonzero(red.masks["petal"] | red.masks["centre"])
        away = np.ones_like(changed)
        away[max(0, rows.min() - 8) : rows.max() + 9, max(0, cols.min() - 8) : cols.max() + 9] = False
        assert changed[red.masks["petal"]].mean() > 0.99
        assert not changed[away].any()


def test_the_scene_does_not_depend_on_the_size():
    small, large = render_flower(11, "petal-pink", size=64), render_flower(11, "petal-pink", size=128)
    halved = large.image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small.image).mean() < 6
    for part in PARTS:
        assert np.abs(np.subtract(large.landmarks[part], np.multiply(small.landmarks[part], 2))).max() < 3


def test_the_category_is_drawn_from_the_seed():
    drawn = [render_flower(seed, size=32).category for seed in range(40)]
    assert set(drawn) == set(PETAL_CATEGORIES)
    assert render_flower(5, drawn[5], size=32).image.tobytes() == render_flower(5, size=32).image.tobytes()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: render_flower(0, "petal-rde"),
            r"a flower category, got 'petal-rde'. Choose one of petal-red",
        ),
        (lambda: render_flower(-1), "a seed >= 0, got -1"),
        (lambda: render_flower(0, size=16), "at least 32 px, got 16"),
        (lambda: generated_flowers(0), "count >= 1, got 0"),
        (lambda: generated_flowers(4, categories=()), r"different categories, at least one, got \[\]"),
        (lambda: generated_flowers(4, categories=["petal-red"] * 2), "different categories"),
        (lambda: generated_flowers(4, categories=["rose"]), "a flower category, got 'rose'"),
    ],
)
def test_bad_arguments(call, text):
    with pytest.raises(InputError, match=text):
        call()


def test_a_set_is_lazy_balanced_and_repeatable():
    flowers = generated_flowers(240, seed=4, size=48)
    assert set(flowers.category_counts().values()) == {40}
    assert flowers.splits == tuple(split_of(key) for key in flowers.keys)
    assert 0.15 < flowers.splits.count("test") / 240 < 0.35
    longer = generated_flowers(300, seed=4, size=48)
    assert longer.read(239).tobytes() == flowers.read(239).tobytes() == flowers.take([239]).read(0).tobytes()
    assert generated_flowers(240, seed=5, size=48).read(0).tobytes() != flowers.read(0).tobytes()
    assert flowers.fingerprint() == generated_flowers(240, seed=4, size=48).fingerprint()
    assert flowers.fingerprint() != generated_flowers(240, seed=5, size=48).fingerprint()
    assert pickle.loads(pickle.dumps(flowers)).read(7).tobytes() == flowers.read(7).tobytes()


def test_every_part_is_seen_and_known_without_drawing_the_picture():
    flowers = generated_flowers(300, seed=1)
    truth = flowers.part_truth
    assert truth is not None
    assert truth.count() == dict.fromkeys(PARTS, 300)
    assert truth.keys == flowers.keys
    assert (truth.positions_px > 0).all()
    assert (truth.positions_px < 128).all()
    assert (truth.image_size_px == 128).all()
    assert truth.masks is not None
    chosen = flowers.take([8])
    assert chosen.part_truth is not None
    np.testing.assert_array_equal(chosen.part_truth.positions_px[0], truth.positions_px[8])
    mask = truth.masks(flowers.keys[8])
    row, col = np.argwhere(mask["centre"]).mean(axis=0) + 0.5
    assert truth.positions_px[8, PARTS.index("centre")] == pytest.approx([col, row], abs=1e-3)


def test_outlines_without_colours_equal_those_of_the_picture():
    from partlens_papers.flowers.drawing import _Garden

    garden = _Garden(2, 64, PETAL_CATEGORIES)
    for index in range(12):
        drawn = render_flower(garden.seed_of(index), garden.category_of(index), 64)
        outlined = garden.masks(f"flower-{index:06d}")
        for part in PARTS:
            np.testing.assert_array_equal(drawn.masks[part], outlined[part])
        np.testing.assert_array_equal(drawn.image, garden(index))


FLOWERS, TRAIN = 360, 240


@pytest.mark.slow
@pytest.mark.parametrize(("categories", "part"), [(PETAL_CATEGORIES, "petal"), (STEM_CATEGORIES, "stem")])
def test_the_class_needs_the_part(categories, part):
    flowers = generated_flowers(FLOWERS, categories=categories)
    truth = flowers.part_truth
    assert truth is not None
    assert truth.masks is not None
    coarse, hue = [], []
    for index, key in enumerate(flowers.keys):
        image = np.asarray(flowers.read(index), dtype=np.float64) / 255
        coarse.append(image.reshape(16, 8, 16, 8, 3).mean(axis=(1, 3)).ravel())
        colour = image[truth.masks(key)[part]].mean(axis=0)
        hue.append(colour / colour.sum())
    label = np.arange(FLOWERS) % len(COLOURS)
    assert set(flowers.categories) == set(categories)
    assert centroid_accuracy(np.array(coarse), label) < 0.5
    assert max(ridge_accuracy(np.array(coarse), label, weight) for weight in (1, 10, 100)) < 0.6
    assert centroid_accuracy(np.array(hue), label) > 0.95


def centroid_accuracy(features: np.ndarray, label: np.ndarray) -> float:
    """Share of the last flowers nearest to the right class's mean over those for training."""
    means = np.stack([features[:TRAIN][label[:TRAIN] == c].mean(axis=0) for c in range(label.max() + 1)])
    distance = ((features[TRAIN:, None] - means) ** 2).sum(axis=2)
    return float((distance.argmin(axis=1) == label[TRAIN:]).mean())


def ridge_accuracy(features: np.ndarray, label: np.ndarray, weight: float) -> float:
    """The same for a linear classifier by penalised least squares."""
    centred = features - features[:TRAIN].mean(axis=0)
    target = np.eye(label.max() + 1)[label[:TRAIN]]
    target -= target.mean(axis=0)
    kernel = centred[:TRAIN] @ centred[:TRAIN].T
    scores = centred[TRAIN:] @ (centred[:TRAIN].T @ np.linalg.solve(kernel + weight * np.eye(TRAIN), target))
    return float((scores.argmax(axis=1) == label[TRAIN:]).mean())
