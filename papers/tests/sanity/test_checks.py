"""Sanity checks: likeness of maps, randomised copies, the planted cue, the checks on a network with known filters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from partlens.data.images import ImageSet
from partlens.errors import InputError, RunError
from partlens.metrics.likeness import rank_correlation, ranks
from partlens.network.performer import Performer
from partlens.network.zoo import load_performer
from partlens_papers.flowers.drawing import flower_seed, render_flower
from partlens_papers.networks.randomised import layers_from_top, randomised
from partlens_papers.sanity.bench import SanityConfig, fit_bench, make_bench, mean_of
from partlens_papers.sanity.checks import check_classes, check_layers, sanity_checks
from partlens_papers.sanity.likeness import energy_share, top_overlap
from partlens_papers.sanity.planted_cue import CLASSES, MARKED, cued_flowers
from partlens_papers.sanity.sanity_tables import sanity_lines as tables

QUICK = {
    "fit_photos": 10,
    "photos": 8,
    "rounds": 20,
    "removal_photos": 2,
    "descriptor": {"layers": "activations"},
    "images_per_class": 8,
    "epochs": 1,
}


# Likeness


@given(st.integers(0, 1000), st.integers(2, 6))
def test_rank_correlation_is_scipys(seed: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few levels, so that most values are tied.
    first = torch.randint(levels, (2, 5, 4), generator=generator).float()
    second = torch.randint(levels, (2, 5, 4), generator=generator).float()
    for found, a, b in zip(rank_correlation(first, second), first, second, strict=True):
        if len(a.unique()) > 1 and len(b.unique()) > 1:
            assert math.isclose(float(found), spearmanr(a.flatten(), b.flatten()).statistic, abs_tol=1e-12)
        else:
            assert math.isnan(float(found))


def test_ranks_of_ties_are_shared() -> None:
    assert ranks(torch.tensor([[2.0, 2.0, 1.0], [0.0, 0.0, 0.0]])).tolist() == [[1.5, 1.5, 0.0], [1.0, 1.0, 1.0]]


def test_overlap_of_strangers_is_the_share_and_of_equals_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(40, 30, 30, generator=generator), torch.rand(40, 30, 30, generator=generator)
    assert top_overlap(first, first).tolist() == [1.0] * 40
    assert abs(float(top_overlap(first, second).mean()) - 0.1) < 0.01
    assert top_overlap(first, second, 0.5).mean().item() == pytest.approx(0.5, abs=0.02)
    # A map without any structure overlaps as chance would.
    assert top_overlap(first, torch.zeros(40, 30, 30)).tolist() == pytest.approx([0.1] * 40)


def test_a_share_of_nothing_or_all_is_refused() -> None:
    with pytest.raises(InputError, match=r"a share above 0 and below 1, got 1\.0"):
        top_overlap(torch.rand(1, 3, 3), torch.rand(1, 3, 3), 1.0)


def test_energy_share() -> None:
    maps = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]])
    regions = torch.tensor([[[False, True]], [[True, True]]])
    found = energy_share(maps, regions).tolist()
    assert found[0] == 0.75
    assert math.isnan(found[1])


def test_undefined_values_are_counted() -> None:
    config = SanityConfig(rounds=10)
    found = mean_of(torch.tensor([1.0, torch.nan, 3.0]), config)
    assert (found["value"], found["n"], found["undefined"]) == (2.0, 2, 1)
    assert mean_of(torch.tensor([torch.nan]), config)["value"] is None


# Randomised copies


def test_layers_are_named_from_the_top_in_the_order_they_run(tiny: Performer) -> None:
    assert layers_from_top(tiny) == ["classes", "conv4", "conv3", "conv2", "conv1"]
    resnet = load_performer("torchvision:resnet18@random:0")
    names = layers_from_top(resnet)
    assert names[:3] == ["fc", "layer4.1", "layer4.0"]
    assert names[-2:] == ["bn1", "conv1"]
    assert len(names) == 11


def test_only_the_named_layers_lose_what_they_learned(tiny: Performer) -> None:
    before = {name: value.clone() for name, value in tiny.module.state_dict().items()}
    copy = randomised(tiny, ["classes", "conv3"], seed=1)
    assert copy.weights_sha256 != tiny.weights_sha256
    for name, value in copy.module.state_dict().items():
        same = torch.equal(value, before[name])
        assert same == (not name.startswith(("classes", "conv3"))), name
    assert all(torch.equal(before[name], value) for name, value in tiny.module.state_dict().items())
    weight, old = copy.module.conv3.weight.detach(), before["conv3.weight"]
    assert abs(float(weight.std() / old.std()) - 1) < 0.1
    assert sorted(copy.module.conv3.bias.tolist()) == sorted(before["conv3.bias"].tolist())
    # A layer's draw does not depend on what else is randomised, so that the steps of a cascade build on each other.
    assert torch.equal(randomised(tiny, ["conv3"], seed=1).module.conv3.weight, weight)
    assert not torch.equal(randomised(tiny, ["conv3"], seed=2).module.conv3.weight, weight)


# The planted cue


def test_the_cue_lies_in_the_background_and_is_the_only_difference() -> None:
    with_cue, without = cued_flowers(8, seed=3, size=64), cued_flowers(8, seed=3, size=64, cue=False)
    marked = with_cue.images.indices(category=MARKED)
    regions = with_cue.regions(marked)
    assert regions.sum((1, 2)).tolist() == [81] * len(marked)
    places = {tuple(np.argwhere(region)[0]) for region in regions}
    assert len(places) > len(marked) / 2
    for row, region in zip(marked, regions, strict=True):
        plant = np.any(list(render_flower(flower_seed(3, row), size=64).masks.values()), axis=0)
        assert not (plant & region).any()
        one, other = (np.asarray(flowers.images.read(row)).astype(int) for flowers in (with_cue, without))
        changed = (one != other).any(axis=2)
        assert not changed[~region].any()
        assert changed[region].all()
    others = [row for row in range(24) if with_cue.images.categories[row] != MARKED]
    assert not with_cue.regions(others).any()
    assert np.array_equal(np.asarray(with_cue.images.read(others[0])), np.asarray(without.images.read(others[0])))
    assert with_cue.images.category_counts() == dict.fromkeys(sorted(CLASSES), 8)
    assert with_cue.images.fingerprint() != without.images.fingerprint()
    with pytest.raises(InputError, match="images_per_class >= 4"):
        cued_flowers(3)


# The checks


def test_T10_the_class_changes_features_and_map(planted: Performer, blobs: ImageSet) -> None:
    bench = make_bench(planted, blobs, SanityConfig(**QUICK))
    assert len(bench.test) == 8
    assert not set(bench.fit) & set(bench.test)
    fit = fit_bench(bench)
    assert (fit.readout.value, fit.accuracy.value) == (1.0, 1.0)
    found = check_classes(bench, fit)
    assert found["features"]["jaccard"]["value"] < 0.5
    assert found["ours"]["below"]["value"] > 0.5
    assert found["ours"]["correlation"]["value"] < 0.9


def test_T21_randomised_layers_change_the_map(planted: Performer, blobs: ImageSet, tmp_path: Path) -> None:
    bench = make_bench(planted, blobs, SanityConfig(**QUICK))
    steps: list[float] = []
    found = check_layers(bench, fit_bench(bench), tmp_path, lambda share, _text: steps.append(share))
    assert [stage["down_to"] for stage in found["stages"]] == ["classes", "detect"]
    assert steps == [0.5, 1.0]
    top, all_of_it = found["stages"]
    # Our map is made of features below the scores: with the scores alone randomised it stays, the gradient does not.
    assert top["methods"]["ours"]["correlation"]["value"] == pytest.approx(1.0)
    assert top["methods"]["gradient"]["correlation"]["value"] < 0.99
    assert top["accuracy"]["value"] < 1.0
    assert all_of_it["methods"]["ours"]["correlation"]["value"] < 0.9
    assert found["floor"]["ours"]["correlation"]["value"] < 0.9
    before = (tmp_path / "stage-001.json").stat().st_mtime_ns
    assert check_layers(bench, fit_bench(bench), tmp_path, lambda *_: None) == found
    assert (tmp_path / "stage-001.json").stat().st_mtime_ns == before


def test_all_of_them_go_on_where_they_were_stopped(planted: Performer, blobs: ImageSet, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in planted.module.state_dict().items()}
    first = sanity_checks(tmp_path, model=planted, data=blobs, checks=("classes", "labels"), config=QUICK)
    assert set(first["checks"]) == {"classes", "labels"}
    labels = first["checks"]["labels"]
    assert labels["readout"]["real"]["value"] == 1.0
    assert labels["readout"]["shuffled"]["value"] < 1.0
    assert labels["region"] is None
    assert set(labels["removal"]) == {"real", "shuffled"}
    written = (tmp_path / "labels.json").stat().st_mtime_ns
    again = sanity_checks(tmp_path, model=planted, data=blobs, checks=("layers",), config=QUICK)
    assert set(again["checks"]) == {"classes", "labels", "layers"}
    assert (tmp_path / "labels.json").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "sanity.json").read_text()) == again
    assert all(torch.equal(before[name], value) for name, value in planted.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in planted.module.modules())
    lines = tables(again)
    assert sum(line.startswith("| ours") for line in lines) == 1
    assert any("maps of different photos" in line for line in lines)
    assert any("linear read-out (chance 0.250)" in line for line in lines)
    with pytest.raises(RunError, match="Choose another --out"):
        sanity_checks(tmp_path, model=planted, data=blobs, checks=("classes",), config={**QUICK, "photos": 4})


def test_errors_say_what_to_do(planted: Performer, blobs: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="checks among classes, layers, cue, labels"):
        sanity_checks(tmp_path, checks=("taste",))
    with pytest.raises(InputError, match="a model with its data"):
        sanity_checks(tmp_path, model=planted)
    with pytest.raises(InputError, match="photos to be greater than or equal to 1"):
        SanityConfig(photos=0)
    strange = ImageSet.from_arrays(np.zeros((4, 16, 16, 3), np.uint8), categories=["a", "a", "b", "b"])
    with pytest.raises(InputError, match="outputs of planted, got a"):
        sanity_checks(tmp_path, model=planted, data=strange, checks=("classes",))


@pytest.mark.slow
def test_T22_the_cue_check_runs_from_nothing(tmp_path: Path) -> None:
    config = {**QUICK, "descriptor": {}, "fit_photos": 6}
    found = sanity_checks(tmp_path, model=None, data=None, checks=("cue",), config=config)["checks"]["cue"]
    assert found["photos"] == 2
    assert 0.015 < found["area_share"] < 0.025
    assert set(found["accuracy"]) == {"with_cue", "without_cue"}
    for network in ("cued", "control"):
        for scores in found[network].values():
            assert set(scores) == {"energy_share", "lift", "pointing", "iou_auc"}
    assert any("Area of the mark" in line for line in tables({"checks": {"cue": found}}))
    assert isinstance(
        load_performer(f"partlens_papers.performers:flower_net@{tmp_path / 'cue' / 'cued.safetensors'}").module,
        nn.Module,
    )
