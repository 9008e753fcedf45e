"""Generated flowers: exact masks, equal bytes, and a class that only the petals' colour gives away."""

import hashlib
import math
import pickle

import numpy as np
import pytest

from partlens.data import flowers as flowers_module
from partlens.data.flowers import PARTS, PETAL_CATEGORIES, generated_flowers, render_flower
from partlens.data.folders import split_of
from partlens.errors import InputError, InputTypeError


def test_the_same_seed_gives_the_same_bytes():
    want = ("47cad9e53169e3e3", "3b7376d3a590eee7", "9fac36e04825c489")
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
    x, y = flower.landmarks["leaf"]
    rows, cols = np.nonzero(flower.masks["leaf"])
    assert min(abs(cols + 0.5 - x) + abs(rows + 0.5 - y)) < 3  # inside one of the leaves, not between them
    assert flower.sizes["leaf"][0] < np.ptp(cols)


def test_the_leaf_is_that_of_which_most_is_seen():
    for seed in range(12):
        flower, labels = render_flower(seed, "petal-red", 64), np.zeros((64, 64), int)
        for number, (window, cover, _) in enumerate(flowers_module._plant(flowers_module._dice(seed, 1), 64), start=1):
            labels[window][cover > 0.5] = number
        rows, cols = np.nonzero(labels == max((2, 3), key=lambda number: np.count_nonzero(labels == number)))
        assert flower.landmarks["leaf"] == pytest.approx((cols.mean() + 0.5, rows.mean() + 0.5))


def test_the_category_changes_the_colour_of_the_petals_only():
    for seed in range(12):
        red, blue = render_flower(seed, "petal-red"), render_flower(seed, "petal-blue")
        changed = np.any(red.image != blue.image, axis=2)
        for part in PARTS:
            np.testing.assert_array_equal(red.masks[part], blue.masks[part])
        assert changed[red.masks["petal"]].mean() > 0.99
        # pixels that petals cover to less than a half belong to another part or to none
        near = red.masks["petal"].copy()
        for axis in (0, 1):
            near = near | np.roll(near, 1, axis) | np.roll(near, -1, axis)
        assert not changed[~near].any()


def test_the_scene_does_not_depend_on_the_size():
    small, large = render_flower(11, "petal-pink", size=64), render_flower(11, "petal-pink", size=128)
    halved = large.image.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - small.image).mean() < 3
    for part in PARTS:
        assert np.abs(np.subtract(large.landmarks[part], np.multiply(small.landmarks[part], 2))).max() < 3


def test_place_size_and_tilt_vary():
    flowers = [render_flower(seed, "petal-red", size=64) for seed in range(60)]
    places = np.array([flower.landmarks["centre"] for flower in flowers])
    sizes = np.array([flower.sizes["petal"] for flower in flowers])
    assert (np.ptp(places, axis=0) > (30, 18)).all()
    assert sizes.max() > 1.6 * sizes.min()
    assert (sizes[:, 0] / sizes[:, 1]).max() > 1.2 > 1 / 1.2 > (sizes[:, 0] / sizes[:, 1]).min()


def test_the_category_is_drawn_from_the_seed():
    drawn = [render_flower(seed, size=32).category for seed in range(40)]
    assert set(drawn) == set(PETAL_CATEGORIES)
    assert render_flower(5, drawn[5], size=32).image.tobytes() == render_flower(5, size=32).image.tobytes()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: render_flower(0, "petal-rde"), r"a flower category, got 'petal-rde'. Choose one of petal-red"),
        (lambda: render_flower(-1), "seed >= 0, got -1"),
        (lambda: render_flower(0, size=16), "size >= 32, got 16"),
        (lambda: generated_flowers(0), "count >= 1, got 0"),
        (lambda: generated_flowers(2, seed=-3), "seed >= 0, got -3"),
        (lambda: generated_flowers(2, size=31), "size >= 32, got 31"),
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
    prints = {generated_flowers(240, **{"size": 48, "seed": 4, **other}).fingerprint() for other in OTHERS}
    assert len(prints | {flowers.fingerprint()}) == 4
    assert pickle.loads(pickle.dumps(flowers)).read(7).tobytes() == flowers.read(7).tobytes()


OTHERS = ({"seed": 5}, {"size": 49}, {"categories": PETAL_CATEGORIES[::-1]})


def test_every_part_is_seen_and_known():
    flowers = generated_flowers(120, seed=1, size=64)
    truth = flowers.part_truth
    assert truth.landmarks == PARTS
    assert truth.count() == dict.fromkeys(PARTS, 120)
    assert truth.keys == flowers.keys
    assert (truth.positions_px > 0).all()
    assert (truth.positions_px < 64).all()
    assert (truth.image_size_px == 64).all()
    chosen = flowers.take([8])
    np.testing.assert_array_equal(chosen.part_truth.positions_px[0], truth.positions_px[8])
    mask = truth.masks(flowers.keys[8])["centre"]
    row, col = np.argwhere(mask).mean(axis=0) + 0.5
    assert truth.positions_px[8, PARTS.index("centre")] == pytest.approx([col, row], abs=1e-3)
    rows, cols = np.nonzero(mask)
    assert truth.sizes_px[8, PARTS.index("centre")].tolist() == [np.ptp(cols) + 1, np.ptp(rows) + 1]


def test_a_hidden_part_has_no_place(monkeypatch):
    drawn = flowers_module._plant

    def hidden(draw, size):
        layers = drawn(draw, size)
        return [(window, cover * (number != 4), shade) for number, (window, cover, shade) in enumerate(layers)]

    monkeypatch.setattr(flowers_module, "_plant", hidden)
    flower = render_flower(1, "petal-red", 48)
    assert all(math.isnan(value) for value in (*flower.landmarks["centre"], *flower.sizes["centre"]))
    assert not flower.masks["centre"].any()
    assert math.isfinite(flower.landmarks["petal"][0])
    assert np.isnan(generated_flowers(2, size=48).part_truth.positions_px[:, PARTS.index("centre")]).all()


@pytest.mark.slow
def test_the_class_needs_the_petals():
    flowers = generated_flowers(900, size=64)
    truth = flowers.part_truth
    coarse, amount, hue = [], [], []
    for index, key in enumerate(flowers.keys):
        image = np.asarray(flowers.read(index), dtype=np.float64) / 255
        coarse.append(image.reshape(16, 4, 16, 4, 3).mean(axis=(1, 3)).ravel())
        amount.append(np.bincount(((image * 3.999).astype(int) @ [16, 4, 1]).ravel(), minlength=64) / 4096)
        colour = image[truth.masks(key)["petal"]].mean(axis=0)
        hue.append(colour / colour.sum())
    label = np.arange(900) % len(PETAL_CATEGORIES)
    assert centroid_accuracy(np.array(coarse), label) < 0.5
    assert max(ridge_accuracy(np.array(coarse), label, weight) for weight in (1, 10, 100)) < 0.6
    assert max(ridge_accuracy(np.array(amount), label, weight) for weight in (0.01, 0.1, 1)) < 0.6
    assert centroid_accuracy(np.array(hue), label) > 0.95


def centroid_accuracy(features: np.ndarray, label: np.ndarray) -> float:
    """Share of the last 300 nearest to the right class's mean over the first 600."""
    means = np.stack([features[:600][label[:600] == c].mean(axis=0) for c in range(label.max() + 1)])
    distance = ((features[600:, None] - means) ** 2).sum(axis=2)
    return float((distance.argmin(axis=1) == label[600:]).mean())


def ridge_accuracy(features: np.ndarray, label: np.ndarray, weight: float) -> float:
    """The same for a linear classifier by penalised least squares."""
    centred = features - features[:600].mean(axis=0)
    target = np.eye(label.max() + 1)[label[:600]]
    target -= target.mean(axis=0)
    kernel = centred[:600] @ centred[:600].T
    scores = centred[600:] @ (centred[:600].T @ np.linalg.solve(kernel + weight * np.eye(600), target))
    return float((scores.argmax(axis=1) == label[600:]).mean())


@pytest.mark.parametrize(
    "call",
    [
        lambda: render_flower(None),
        lambda: render_flower(1.5),
        lambda: render_flower(True),
        lambda: render_flower(1, 3),
        lambda: render_flower(1, size=None),
        lambda: generated_flowers("3"),
        lambda: generated_flowers(3, categories="petal-red"),
        lambda: generated_flowers(3, categories=(None,)),
    ],
)
def test_arguments_of_another_kind_are_refused(call) -> None:
    with pytest.raises(InputTypeError, match="^Expected .*, got "):
        call()
