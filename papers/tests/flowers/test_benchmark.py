"""The flower benchmark on few flowers: its numbers, what stands beside them, and going on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from partlens.errors import InputError, RunError
from partlens.network.performer import Performer, weights_sha256
from partlens.network.zoo import load_performer
from partlens_papers.flowers import benchmark as module
from partlens_papers.flowers.baselines import BASELINES, upsampled_activation
from partlens_papers.flowers.benchmark import RECALLED, FlowersConfig, flower_benchmark, train_network
from partlens_papers.flowers.heat_maps import centre_box_maps, edge_maps, iou_auc, part_recall, pointing_game
from partlens_papers.flowers.sets import FlowerSet, flower_set

SINGLE, DOUBLE = "flowers-single-6c", "flowers-double-12c"


@pytest.fixture(scope="module")
def performer() -> Performer:
    return load_performer("partlens_papers.performers:flower_net@random:1")


def quick(performer: Performer, images: Tensor, classes: Tensor) -> Tensor:
    return upsampled_activation(performer, images, classes)


def run(out: Path, performer: Performer, **changes: object) -> dict:
    how = {"set_name": DOUBLE, "images_per_class": 20, "folds": 2, "perturbed": 0}
    given = {"methods": {"quick": quick}, "ours": None}
    how |= {name: value for name, value in changes.items() if name not in given}
    given |= {name: value for name, value in changes.items() if name in given}
    return flower_benchmark(out, performer=performer, config=how, **given)  # type: ignore[arg-type]


def test_numbers_are_those_of_the_metrics_on_the_held_out_flowers(tmp_path: Path, performer: Performer) -> None:
    result = run(tmp_path, performer, perturbed=2)
    flowers = flower_set(DOUBLE, 20)
    areas, recalls, hits = [], [], []
    for fold in range(2):
        rows = flowers.rows("test", fold)
        images = performer.preprocessing([flowers.images.read(row) for row in rows])
        parts = torch.from_numpy(flowers.part_regions(rows))
        maps = edge_maps(images)
        areas.append(iou_auc(maps, parts.any(1)))
        recalls.append(part_recall(maps, parts))
        hits.append(pointing_game(centre_box_maps(len(rows), (112, 112)), parts.any(1)))
    edges = result["nulls"]["edges"]
    area = edges["iou_auc_percent"]
    assert area["value"] == pytest.approx(float(torch.cat(areas).mean()))
    means = torch.stack([fold.mean() for fold in areas])
    assert area["fold_means"] == pytest.approx(means.tolist())
    assert (area["fold_mean"], area["fold_sd"]) == pytest.approx((float(means.mean()), float(means.std())))
    assert area["interval"][0] < area["value"] < area["interval"][1]
    assert (area["n"], area["unit"]) == (24, "flowers")
    assert [edges["recall_petal"]["value"], edges["recall_stem"]["value"]] == pytest.approx(
        torch.cat(recalls).mean(0).tolist()
    )
    assert result["nulls"]["centre box"]["pointing"]["value"] == pytest.approx(float(torch.cat(hits).mean()))
    assert edges["insertion"]["n"] == 4
    assert len(edges["iou_curve"]) == 20
    assert sum(edges["iou_curve"].values()) * 5 == pytest.approx(area["value"], rel=1e-6)


def test_T19_everything_that_must_stand_beside_a_score_does(tmp_path: Path, performer: Performer) -> None:
    result = run(tmp_path, performer, ours=lambda p, f: {"ours": quick}, perturbed=1)
    assert set(result["nulls"]) == {"random", "centre box", "edges"}
    assert set(result["methods"]) == set(result["random_weights"]) == {"quick", "ours"}
    scores = {
        "iou_auc_percent",
        "recall_petal",
        "recall_stem",
        "both_parts_covered",
        "pointing",
        "insertion",
        "deletion",
    }
    for group in ("nulls", "methods", "random_weights"):
        for method in result[group].values():
            assert scores <= set(method)
    assert result["methods"]["ours"]["iou_auc_percent"] == result["methods"]["quick"]["iou_auc_percent"]
    assert (
        result["random_weights"]["quick"]["iou_auc_percent"]["value"]
        != result["methods"]["quick"]["iou_auc_percent"]["value"]
    )
    assert result["recalled"]["iou_auc_percent"]["ours"] == list(RECALLED["ours"][1])
    assert json.loads((tmp_path / "benchmark.json").read_text()) == json.loads(json.dumps(result))
    single = run(tmp_path / "single", performer, set_name=SINGLE, folds=1)
    assert "both_parts_covered" not in single["methods"]["quick"]
    assert "insertion" not in single["methods"]["quick"]
    kept = json.loads((tmp_path / "single" / "benchmark.json").read_text())
    assert kept["methods"]["quick"]["pointing"]["fold_sd"] is None  # one fold has no spread


def test_the_difference_to_the_reference_is_taken_flower_by_flower(tmp_path: Path, performer: Performer) -> None:
    methods = {module.REFERENCE: quick, "copy": quick}
    result = run(tmp_path, performer, methods=methods)
    assert result["methods"]["copy"]["minus_reference"]["value"] == 0
    assert result["methods"]["copy"]["minus_reference"]["interval"] == [0, 0]
    gap = result["nulls"]["random"]["minus_reference"]["value"]
    areas = [result[g][m]["iou_auc_percent"]["value"] for g, m in (("nulls", "random"), ("methods", "copy"))]
    assert gap == pytest.approx(areas[0] - areas[1])


def test_it_goes_on_where_it_stopped(tmp_path: Path, performer: Performer) -> None:
    calls: list[str] = []

    def counting(explained: Performer, images: Tensor, classes: Tensor) -> Tensor:
        calls.append(explained.weights_sha256)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return quick(explained, images, classes)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, performer, methods={"counting": counting})
    result = run(tmp_path, performer, methods={"counting": counting})
    assert len(calls) == 3 + 2  # two networks and two folds make four; the first two were kept
    assert len(set(calls)) == 2
    assert run(tmp_path, performer, methods={"counting": counting}) == result
    assert len(calls) == 5
    fresh = run(tmp_path / "fresh", performer, methods={"counting": quick})
    assert fresh["methods"] == result["methods"]
    run(tmp_path, performer, methods={"counting": counting}, seed=1)
    assert len(calls) == 9  # other flowers


def test_ours_is_made_for_either_network_and_gets_the_flowers(tmp_path: Path, performer: Performer) -> None:
    seen = []

    def ours(explained: Performer, flowers: FlowerSet) -> dict[str, module.Method]:  # type: ignore[name-defined]
        seen.append((explained.weights_sha256, weights_sha256(explained.module), flowers.name))
        return {"ours": quick}

    run(tmp_path, performer, methods={}, ours=ours, folds=1)
    assert [a == b for a, b, _ in seen] == [True, True]
    assert seen[0][0] == performer.weights_sha256 != seen[1][0]
    assert weights_sha256(performer.module) == performer.weights_sha256


def test_training_writes_a_network_that_can_be_named(tmp_path: Path) -> None:
    few = FlowersConfig(images_per_class=20, epochs=1)
    trained = train_network(tmp_path, few)
    notes = json.loads((tmp_path / "network.json").read_text())
    assert notes["accuracy"]["n"] == 30
    assert notes["weights_sha256"] == trained.weights_sha256
    assert trained.class_names == flower_set(SINGLE, 20).classes
    assert not any("norm" in name for name, _ in trained.module.named_modules())
    before = (tmp_path / "network.safetensors").stat().st_mtime_ns
    assert train_network(tmp_path, few).weights_sha256 == trained.weights_sha256
    assert (tmp_path / "network.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RunError, match="'epochs': 2.*Choose another --out folder"):
        train_network(tmp_path, few.changed({"epochs": 2}))


@pytest.mark.slow
def test_the_network_learns_the_petals_colour(tmp_path: Path) -> None:
    """A small share of the work of the real training: far above the chance of 1/6."""
    train_network(tmp_path, FlowersConfig(images_per_class=48, epochs=6))
    accuracy = json.loads((tmp_path / "network.json").read_text())["accuracy"]
    assert accuracy["interval"][0] > 0.3


def test_the_published_methods_are_the_default() -> None:
    assert set(BASELINES) == set(RECALLED) - {"ours"}


def test_refusals(tmp_path: Path, performer: Performer) -> None:
    with pytest.raises(InputError, match="folds to be less than or equal to 5, got 6"):
        run(tmp_path, performer, folds=6)
    with pytest.raises(InputError, match="images_per_class to be greater than or equal to 20, got 19"):
        run(tmp_path, performer, images_per_class=19)
    with pytest.raises(InputError, match="perturbed to be greater than or equal to 0, got -1"):
        run(tmp_path, performer, perturbed=-1)
    with pytest.raises(InputError, match="set_name to be 'flowers-single-6c' or"):
        run(tmp_path, performer, set_name="flowers")
    with pytest.raises(InputError, match="methods of different names, got 'quick' twice"):
        run(tmp_path, performer, ours=lambda p, f: {"quick": quick})
    assert not (tmp_path / "benchmark.json").exists()
