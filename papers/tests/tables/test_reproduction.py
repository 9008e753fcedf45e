"""The verb reproduce finds its experiment, and our methods have the benchmark's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from partlens.attribution.record import ExplanationConfig
from partlens.cli import main as partlens
from partlens.errors import InputError
from partlens.network.zoo import load_performer
from partlens_papers import reproduction
from partlens_papers.cli import main
from partlens_papers.flowers.benchmark import benchmark_table
from partlens_papers.flowers.methods import (
    explanation_method,
    relevant_feature_methods,
    select_on_training,
    smoothed_baselines,
)
from partlens_papers.flowers.sets import flower_set
from partlens_papers.reproduction import reproduce_flowers, reproduce_removal


def test_our_methods_give_one_map_per_image() -> None:
    performer = load_performer("partlens_papers.performers:flower_net@random:0")
    flowers = flower_set("flowers-single-6c", 20, 0, 112)
    selection = select_on_training(performer, flowers, images_per_class=4)
    assert selection.classes == flowers.classes
    batch = performer.preprocessing([flowers.images.read(i) for i in range(3)])
    classes = torch.tensor([0, 1, 0])
    methods = relevant_feature_methods(
        {"sharp": ExplanationConfig(), "soft": ExplanationConfig.preset()}, images_per_class=4
    )(performer, flowers)
    assert set(methods) == {"sharp", "soft", "upsampled relevant activations"}
    for name, method in methods.items():
        maps = method(performer, batch, classes)
        assert maps.shape == (3, 112, 112), name
        assert float(maps.min()) >= 0
        assert float(maps.max()) <= 1
    # The class decides which features are shown.
    method = explanation_method(selection, ExplanationConfig())
    assert not torch.equal(method(performer, batch, classes), method(performer, batch, torch.tensor([1, 0, 1])))


def test_smoothed_baselines_are_the_guided_ones_smoothed() -> None:
    performer = load_performer("partlens_papers.performers:flower_net@random:0")
    batch = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    soft = smoothed_baselines()
    assert all(name.endswith(", smoothed") and "guided" in name for name in soft)
    name = next(n for n in soft if n.startswith("deconvnet"))
    maps = soft[name](performer, batch, torch.tensor([0, 1]))
    assert maps.shape == (2, 112, 112)
    step = (maps[:, 1:] - maps[:, :-1]).abs().mean() / maps.mean()
    assert float(step) < 0.1


def test_reproduce_flowers_measures_ours_and_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def benchmark(out: Path, **given: Any) -> dict[str, Any]:
        seen.update(given, out=out)
        return {}

    monkeypatch.setattr(reproduction, "flower_benchmark", benchmark)
    flowers = {"set_name": "flowers-double-12c", "images_per_class": 40, "seed": 3}
    reproduce_flowers(out=tmp_path, flowers=flowers)
    assert seen["config"] == flowers
    assert "grad-cam" in seen["methods"]
    assert any(name.endswith("smoothed") for name in seen["methods"])


def test_missing_arguments_have_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="Expected a model to remove features from, got none. Give --model"):
        reproduce_removal(tmp_path, out=tmp_path)
    with pytest.raises(SystemExit):
        main(["reproduce", "poems", str(tmp_path), "--out", str(tmp_path), "--performers", "a=torchvision:resnet18"])
    shown = capsys.readouterr().err
    assert "instability" in shown
    assert "rivals" in shown


def test_the_table_puts_the_best_first_and_the_published_figure_last() -> None:
    def scores(area: float) -> dict[str, Any]:
        one = {"value": area, "interval": [area - 1, area + 1], "n": 5, "fold_mean": area, "fold_sd": 0.5}
        return {"iou_auc_percent": one, "pointing": {"value": 0.5}}

    result = {
        "deciding_parts": ["petal"],
        "methods": {"grad-cam": scores(10.0), "ours": scores(20.0)},
        "nulls": {"random": scores(1.0)},
        "random_weights": {"ours": scores(2.0)},
        "recalled": {"iou_auc_percent": {"grad-cam": [17.5, 0.25]}},
    }
    lines = benchmark_table(result)
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| ours",
        "| grad-cam",
        "| null: random",
        "| random weights: ours",
    ]
    assert lines[3].endswith("| 17.5 ± 0.25 |")
    assert "20.0 ± 0.50" in lines[2]


def test_the_command_line_makes_flowers_and_checks_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "flowers"
    arguments = ["flowers-single-6c", "--out", str(folder), "--images-per-class", "20", "--size", "48"]
    assert main(["make-flowers", *arguments]) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert partlens(["data", "check", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "120 images" in shown
    assert "petal" in shown
