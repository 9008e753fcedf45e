"""What holds for any images, annotations and flowers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partlens.data.annotations import PartTruth
from partlens.data.flowers import PARTS, PETAL_CATEGORIES, render_flower
from partlens.data.folders import split_of
from partlens.data.images import ImageSet
from partlens.errors import ImageError

names = st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=12, unique=True)


@given(
    photos=st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_no_photo_is_on_both_sides_whatever_the_order(photos, order):
    order.shuffle(photos)
    images = ImageSet.from_arrays(np.zeros((len(photos), 1, 1, 3), np.uint8), photos=photos)
    assert images.splits == tuple(split_of(photo) for photo in photos)


@given(st.lists(st.sampled_from(["", "cat", "fox"]), min_size=1, max_size=20))
def test_selections_part_the_set(categories):
    images = ImageSet.from_arrays(np.zeros((len(categories), 1, 1, 3), np.uint8), categories=categories)
    counts = images.category_counts()
    assert sum(counts.values()) == len(images)
    for category, count in counts.items():
        inside = images.indices(category)
        assert len(inside) == count
        assert [name for row, name in enumerate(images.categories) if row not in inside].count(category) == 0
        assert images.select(category).categories == (category,) * count


@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([np.uint8, np.float32, np.float64]),
    st.integers(0, 2**32 - 1),
)
def test_arrays_survive_reading(rows, cols, dtype, seed):
    array = np.random.default_rng(seed).integers(0, 256, (2, rows, cols, 3), dtype=np.uint8)
    given_images = array if dtype is np.uint8 else (array / 255).astype(dtype)
    images = ImageSet.from_arrays(given_images)
    for index in range(2):
        np.testing.assert_array_equal(np.asarray(images.read(index)), array[index])


@given(names, st.data())
def test_rows_of_truth_follow_the_keys(keys, data):
    count = len(keys)
    position = np.arange(count * 4, dtype=np.float32).reshape(count, 2, 2)
    truth = PartTruth(("a", "b"), tuple(keys), position, position, position[:, 0])
    wanted = data.draw(st.permutations([*keys, "elsewhere"]))
    again = truth.for_keys(wanted).for_keys(keys)
    np.testing.assert_array_equal(again.positions_px, position)
    assert np.isnan(truth.for_keys(wanted).positions_px[wanted.index("elsewhere")]).all()
    assert truth.for_keys(wanted).count() == {"a": count, "b": count}


@given(names)
def test_a_repeated_key_is_refused(keys):
    with pytest.raises(ImageError, match="every image once"):
        ImageSet.from_generator(lambda _: np.zeros((1, 1, 3), np.uint8), [*keys, keys[0]])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**64),
    category=st.sampled_from(PETAL_CATEGORIES),
    size=st.integers(48, 97),
)
def test_any_flower_shows_stem_petals_and_centre_once(seed, category, size):
    flower = render_flower(seed, category, size)
    assert flower.image.shape == (size, size, 3)
    assert np.sum([flower.masks[part] for part in PARTS], axis=0).max() == 1
    for part in ("petal", "centre", "stem"):
        x, y = flower.landmarks[part]
        assert flower.masks[part].any()
        assert 0 < x < size
        assert 0 < y < size
