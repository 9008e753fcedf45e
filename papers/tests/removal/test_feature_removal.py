"""Feature removal on a network whose relevant filters are known (T16-T18, T8)."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partlens.data.images import ImageSet
from partlens.errors import ImageError, InputError, RunError
from partlens.network.performer import Performer
from partlens.network.zoo import load_performer
from partlens.records import read_tensors, write_tensors
from partlens.selection.measured_layers import feature_index
from partlens.selection.record import DescriptorConfig, FeatureIndex
from partlens_papers.removal.digits import digit_performer, digit_preprocessing, digit_set, lenet, train_digits
from partlens_papers.removal.feature_removal import decided, feature_removal
from partlens_papers.removal.plan import (
    RemovalConfig,
    divide,
    masks_of,
    per_layer,
    random_features,
    ranked_features,
    ring_of,
)
from partlens_papers.removal.removal_tables import curve_table, table

QUICK = {
    "rounds": 20,
    "batch_size": 7,
    "random_seeds": (0, 1, 2),
    "curve": (1, 2),
    "descriptor": {"layers": "activations"},
}
INDEX = FeatureIndex(("conv", "relu", "fc"), (6, 6, 20))


@pytest.fixture(scope="module")
def folder(planted: Performer, blobs: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("removal") / "run"
    feature_removal(planted, blobs, out, config=QUICK)
    return out


@pytest.fixture(scope="module")
def result(folder: Path) -> dict:
    return json.loads((folder / "removal.json").read_text())


def test_T16_the_relevant_filter_costs_the_class_and_random_ones_do_not(result: dict) -> None:
    assert result["protocol"] == "split"
    assert result["intact"]["accuracy"]["value"] == 1.0
    ours, random = (result["conditions"][name]["drop"]["accuracy"] for name in ("ours", "random"))
    assert ours["value"] >= 0.5  # without its detector a class is at chance
    assert ours["value"] >= 5 * random["value"]
    assert ours["n"] == 20
    assert ours["interval"][0] > random["interval"][1]
    ours, random = (result["conditions"][name]["drop"]["log_odds"] for name in ("ours", "random"))
    assert ours["value"] >= 5 * random["value"]
    assert (
        result["conditions"]["gradient"]["drop"]["log_odds"]["value"]
        >= 0.9 * (result["conditions"]["ours"]["drop"]["log_odds"]["value"])
    )
    assert result["against"]["random"]["log_odds"]["difference"]["interval"][0] > 0
    # The first feature of each class is its detector.
    assert result["conditions"]["ours-top-1"]["drop"]["accuracy"]["value"] >= 0.5
    assert set(result["counts"]["layers"]) == {"relu"}


def test_T18_a_class_is_hurt_most_by_its_own_features(result: dict) -> None:
    matrix = torch.tensor(result["matrix"]["drop"]["log_odds"])
    assert tuple(matrix.shape) == (4, 4)
    assert bool((matrix.argmax(1) == torch.arange(4)).all())
    share = result["dominance"]["log_odds"]
    assert (share["share"]["value"], share["share"]["n"], share["share"]["unit"], share["null"]) == (
        1.0,
        4,
        "classes",
        0.25,
    )
    assert result["conditions"]["others"]["drop"]["accuracy"]["value"] < 0.2


def test_every_number_of_the_matrix_by_hand(result: dict, folder: Path, planted: Performer, blobs: ImageSet) -> None:
    weights = read_tensors(folder / "weights-0.safetensors")["weights"]
    net = planted.module
    for tested, name in enumerate(planted.class_names or ()):
        batch = planted.preprocessing([blobs.read(row) for row in blobs.indices(category=name, split="test")])
        with torch.no_grad():
            maps = net.relu(net.detect(batch))
        for lost in range(4):
            odds = []
            for keep in (torch.ones(40), (weights[:, lost] == 0).float()):
                with torch.no_grad():
                    p = net.classes((maps * keep[:, None, None]).mean((2, 3))).double().softmax(1)[:, tested]
                odds.append((p / (1 - p)).log())
            by_hand = float((odds[0] - odds[1]).mean())
            assert math.isclose(result["matrix"]["drop"]["log_odds"][lost][tested], by_hand, rel_tol=1e-4, abs_tol=1e-4)


def test_two_fold_tests_every_photo_once_and_leaves_the_network_as_it_was(
    planted: Performer, blobs: ImageSet, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in planted.module.state_dict().items()}
    planted.module.train()
    found = feature_removal(
        planted, blobs, tmp_path, config={**QUICK, "protocol": "two-fold", "others": 1, "labels": "predictions"}
    )
    assert all(m.training for m in planted.module.modules())
    planted.module.eval()
    assert all(torch.equal(before[name], value) for name, value in planted.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in planted.module.modules())
    assert all(p.grad is None and p.requires_grad for p in planted.module.parameters())
    photos = json.loads((tmp_path / "conditions" / "intact.json").read_text())["photos"]
    assert sorted(photos) == list(range(80))
    assert found["counts"]["fit_photos"] == [40, 40]
    assert found["matrix"]["drop"] is None
    assert found["dominance"]["accuracy"]["null"] == 0.5
    assert found["conditions"]["ours"]["drop"]["accuracy"]["value"] >= 0.5
    assert [len(c["features"]) for c in found["classes"]] == [2] * 4


def test_T8_shuffled_labels_tell_nothing(planted: Performer, blobs: ImageSet, tmp_path: Path, result: dict) -> None:
    found = feature_removal(planted, blobs, tmp_path, config={**QUICK, "shuffled": True})
    low, high = found["readout"]["accuracy"]["interval"]
    assert low <= 0.25 + 0.15
    assert high < 0.9
    assert result["readout"]["accuracy"]["value"] > 0.9


def test_it_goes_on_where_it_was_stopped(planted: Performer, blobs: ImageSet, tmp_path: Path) -> None:
    write_tensors(tmp_path / "network.safetensors", planted.module.state_dict())
    first = feature_removal(planted, blobs, tmp_path, config=QUICK)
    assert first["status"] == "finished"  # beside the weights, which are not its own
    stored = tmp_path / "conditions" / "ours.json"
    kept = stored.read_text()
    for path in (tmp_path / "conditions").glob("*.json"):
        if path.name != "intact.json":
            path.unlink()
    running = json.loads((tmp_path / "removal.json").read_text()) | {"status": "running"}
    (tmp_path / "removal.json").write_text(json.dumps(running))
    again = feature_removal(planted, blobs, tmp_path, config=QUICK)
    assert stored.read_text() == kept
    assert {k: v for k, v in again.items() if k != "seconds"} == {k: v for k, v in first.items() if k != "seconds"}
    before = stored.stat().st_mtime_ns
    assert feature_removal(planted, blobs, tmp_path, config=QUICK) == again
    assert stored.stat().st_mtime_ns == before
    with pytest.raises(RunError, match="another configuration"):
        feature_removal(planted, blobs, tmp_path, config={**QUICK, "mu": 3.0})


def test_tables(result: dict) -> None:
    lines = table([result])
    assert lines[2].startswith("| planted, blobs | 4, 20 | 1.000 [1.000, 1.000] |")
    assert all(line.count("|") == 9 for line in lines)
    assert "0.487" in lines[3]
    curve = curve_table(result)
    assert [line.split(" | ")[0] for line in curve[2:4]] == ["| top 1", "| top 2"]


def test_errors_say_what_to_do(planted: Performer, blobs: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="labels to be 'data' or 'predictions'"):
        RemovalConfig(labels="truth")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="curve_rankings"):
        RemovalConfig(curve_rankings=("ours", "lucky"))
    with pytest.raises(InputError, match="curve.0 to be greater than or equal to 1"):
        RemovalConfig(curve=(0,))
    strange = ImageSet.from_arrays(np.zeros((4, 16, 16, 3), np.uint8), categories=["a", "a", "b", "b"])
    with pytest.raises(InputError, match="outputs of planted, got a, b"):
        feature_removal(planted, strange, tmp_path / "a", config=QUICK)
    with pytest.raises(ImageError, match="at least 2 classes"):
        feature_removal(planted, blobs.select("red"), tmp_path / "b", config={**QUICK, "protocol": "two-fold"})
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="other files"):
        feature_removal(planted, blobs, tmp_path / "c", config=QUICK)


# The plan


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=20, max_size=60),
    st.integers(0, 3),
    st.sampled_from([None, 2]),
)
def test_T17_no_photo_is_tested_with_features_that_saw_it(
    rows: list[tuple[int, int]], seed: int, most: int | None
) -> None:
    labels = [label for label, _ in rows]
    photos = [f"{label}-{photo}" for label, photo in rows]  # crops of one photo share its class
    config = RemovalConfig(protocol="two-fold", seed=seed, photos_per_class=most)
    try:
        sides = divide(labels, ["train"] * len(rows), photos, config)
    except ImageError:
        return
    assert len(sides.sides) == 2
    for side in sides.sides:
        assert not {photos[r] for r in side.fit} & {photos[r] for r in side.test}
        for label in sides.classes:
            assert any(labels[r] == label for r in side.fit)
            tested = sum(labels[r] == label for r in side.test)
            assert 1 <= tested <= (most or len(rows))
    assert not set(sides.sides[0].test) & set(sides.sides[1].test)
    assert set(sides.sides[0].fit) | set(sides.sides[1].fit) == set(range(len(rows)))


def test_auto_takes_the_split_where_there_are_photos_enough() -> None:
    labels = [0, 1] * 15
    many = ["train"] * 24 + ["test"] * 6
    few = ["train"] * 16 + ["test"] * 14
    assert divide(labels, many, [str(i) for i in range(30)], RemovalConfig()).protocol == "split"
    assert divide(labels, few, [str(i) for i in range(30)], RemovalConfig()).protocol == "two-fold"


@given(st.integers(0, 100), st.integers(0, 6), st.integers(0, 20))
def test_random_features_match_the_layers(seed: int, conv: int, fc: int) -> None:
    counts = {name: n for name, n in (("conv", conv), ("fc", fc)) if n}
    drawn = random_features(counts, INDEX, torch.Generator().manual_seed(seed))
    assert len(set(drawn)) == len(drawn)
    assert per_layer(drawn, INDEX) == counts


def test_random_features_are_drawn_evenly() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = Counter(f for _ in range(600) for f in random_features({"relu": 2}, INDEX, generator))
    assert set(drawn) == set(range(6, 12))
    assert all(150 < count < 250 for count in drawn.values())


def test_ranked_features_are_the_highest_of_each_layer() -> None:
    values = torch.arange(32.0)
    values[7] = 100
    assert ranked_features({"relu": 2, "fc": 1}, INDEX, values) == (7, 11, 31)
    assert ranked_features({"conv": 2}, INDEX, torch.zeros(32)) == (0, 1)


def test_masks_name_layer_and_channel() -> None:
    masks = masks_of([(1, 12), (), (12, 31)], INDEX)
    assert {layer: mask.nonzero().tolist() for layer, mask in masks.items()} == {
        "conv": [[0, 1]],
        "fc": [[0, 0], [2, 0], [2, 19]],
    }


def test_the_ring_meets_every_other_class_once_or_some_of_them() -> None:
    shifts, ring = ring_of(5, RemovalConfig())
    assert (sorted(ring), shifts) == (list(range(5)), [1, 2, 3, 4])
    shifts, _ = ring_of(40, RemovalConfig())
    assert len(set(shifts)) == 3
    assert all(1 <= shift < 40 for shift in shifts)


def test_log_odds_are_those_of_the_softmax() -> None:
    scores = torch.randn(6, 5, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    right, odds = decided(scores, target)
    p = scores.softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(odds, (p / (1 - p)).log())
    torch.testing.assert_close(odds.sigmoid(), p)
    assert right.tolist() == (scores.argmax(1) == target).double().tolist()


# Digits


def test_T3_the_lenet_has_1140_features() -> None:
    index = feature_index(load_performer(lenet().eval(), digit_preprocessing()), DescriptorConfig())
    assert index.size == 1140
    assert index.channels == (20, 20, 50, 50, 500, 500)


def test_digits_are_read_trained_and_loaded_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 10
    digits = rng.integers(0, 40, size=(120, 28, 28), dtype=np.uint8)
    for image, label in zip(digits, labels, strict=True):
        image[2 * label : 2 * label + 4] = 255
    arrays = {"x_train": digits[:80], "y_train": labels[:80], "x_test": digits[80:], "y_test": labels[80:]}
    np.savez(tmp_path / "digits.npz", **arrays)
    images = digit_set(tmp_path / "digits.npz")
    assert (len(images), images.categories[3], images.splits[79:81]) == (120, "3", ("train", "test"))
    performer, facts = train_digits(images, tmp_path / "lenet.safetensors", epochs=6, seed=0)
    assert facts["accuracy"]["value"] > 0.8
    again = digit_performer(tmp_path / "lenet.safetensors")
    assert again.weights_sha256 == performer.weights_sha256
    assert again.class_names == tuple("0123456789")
    np.savez(tmp_path / "bad.npz", x=digits)
    with pytest.raises(ImageError, match="x_train"):
        digit_set(tmp_path / "bad.npz")
    np.savez(tmp_path / "wide.npz", **{**arrays, "x_test": digits[80:, :20]})
    with pytest.raises(ImageError, match="test digits of 28x28 px"):
        digit_set(tmp_path / "wide.npz")
