"""Whole runs on a tiny network and generated flowers, and every error a user can meet."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import namedtuple
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import partlens
from partlens.attribution.receptive_pictures import OcclusionConfig
from partlens.data.images import ImageSet
from partlens.errors import AtWorkError, InputError, LayerError, RunError
from partlens.evaluation.explainer_evaluation import EvaluationRows
from partlens.explainer.config import ExplainerConfig
from partlens.network.zoo import Performer
from partlens.object_parts.assignment import PartsConfig
from partlens.progress import Progress
from partlens.records import sole_writer, write_json
from partlens.verbs import explainer_run, runs
from partlens.verbs.evaluate import evaluate
from partlens.verbs.fit_explainer import fit_explainer, load_explainer
from partlens.verbs.parts import parts
from partlens.verbs.runs import layers, report, run_folder
from partlens_papers.networks import settings as papers
from partlens_papers.networks.finetune_config import FinetuneConfig

SMALL: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 1,
    "views": 3,
    "batch_size": 8,
    "background_batch": 4,
    "candidates_per_filter": 2,
    "votes": 4,
    "precision": "float32",
}
RED = "petal-red"
SCORES = ("instability", "consistency", "filter_correlation")


@pytest.fixture
def run(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> Path:
    fitted = fit_explainer(tiny, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=2)
    return fitted.path


def snapshot(module: nn.Module) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "flags": [(p.requires_grad, p.grad) for p in module.parameters()],
        "modes": [m.training for m in module.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in module.modules()],
        # Python's own generator is left out: the shape checks that run in the tests draw from it.
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy()),  # noqa: NPY002
    }


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    assert first["flags"] == second["flags"]
    assert first["modes"] == second["modes"]
    assert first["hooks"] == second["hooks"]
    assert torch.equal(first["random"][0], second["random"][0])
    assert (first["random"][1] == second["random"][1]).all()


def test_fit_evaluate_report(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    manifest = json.loads((run / "run.json").read_text())
    assert manifest["status"] == "finished"
    assert len(manifest["p_by_seed"]) == 2
    assert manifest["p_by_seed"][0] != manifest["p_by_seed"][1]
    assert not (run / "cache").exists()
    assert not list(run.glob("checkpoint*"))
    scores = evaluate(run, few_flowers, model=tiny)
    held = len(few_flowers.select(category=RED, split="test"))
    assert scores["photos"] == held
    for layer in (
        scores["explainer"],
        scores["performer"]["tap"],
        scores["performer"]["top"],
        *scores["nulls"].values(),
    ):
        for name in (
            "instability",
            "peak_spread_cells",
            "instability_all",
            "dead_frac",
            "consistency",
            "filter_correlation",
            "distinct_parts",
        ):
            assert set(layer[name]) == {"value", "interval", "n", "unit"}
            assert layer[name]["value"] is None or np.isfinite(layer[name]["value"])
    for kind, gap in scores["instability_minus_null"].items():
        own, its = scores["explainer"]["instability"], scores["nulls"][kind]["instability"]
        assert gap["value"] == pytest.approx(own["value"] - its["value"])
        assert gap["interval"][0] <= gap["value"] <= gap["interval"][1]
    # What is read alike: the explainer by its largest cells, the performer by centroids.
    same = scores["same_peak"]
    assert set(same) == {"largest", "centroid"}
    for layer in (same["largest"]["explainer"], same["centroid"]["tap"], same["centroid"]["top"]):
        assert np.isfinite(layer["instability"]["value"])
    read_twice = (
        (same["largest"]["explainer"], scores["explainer"]),
        (scores["performer"]["tap"], same["centroid"]["tap"]),
    )
    for by_largest, by_centroid in read_twice:
        # A centroid lies within its map's answers, so it moves no further than the largest cell.
        assert by_centroid["peak_spread_cells"]["value"] < by_largest["peak_spread_cells"]["value"]
    assert scores["p"]["n"] == 2
    assert scores["p"]["unit"] == "seeds"
    assert 0 <= scores["reconstruction"]["agreement_top1"]["value"] <= 1
    assert scores["reconstruction"]["error_increase_points"]["n"] > held
    assert scores["data"]["same_as_fit"]
    assert json.loads((run / "evaluation.json").read_text())["explainer"] == json.loads(json.dumps(scores["explainer"]))
    gallery = json.loads((run / "gallery" / "gallery.json").read_text())
    assert all((run / photo["file"]).exists() for f in gallery["layers"]["explainer"] for photo in f["photos"])
    page = report(run)
    assert page == run / "report.html"
    assert "data:image/jpeg" in page.read_text()


def test_the_performer_is_untouched_by_every_verb(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    tiny.module.train()
    next(iter(tiny.module.parameters())).requires_grad_(requires_grad=False)
    before = snapshot(tiny.module)
    fit_explainer(tiny, few_flowers, out=tmp_path / "a", category=RED, config=SMALL, seeds=1)
    assert_same(before, snapshot(tiny.module))
    evaluate(tmp_path / "a", few_flowers, model=tiny)
    layers(tiny)
    assert_same(before, snapshot(tiny.module))
    with pytest.raises(ValueError, match="a layer"):
        fit_explainer(tiny, few_flowers, out=tmp_path / "b", category=RED, tap="relu9", config=SMALL)
    assert_same(before, snapshot(tiny.module))


def test_a_finished_run_is_returned_and_another_configuration_refused(
    run: Path, tiny: Performer, few_flowers: ImageSet
) -> None:
    stamp = (run / "explainer.safetensors").stat().st_mtime_ns
    again = fit_explainer(tiny, few_flowers, out=run, category=RED, config=SMALL, seeds=2)
    assert (run / "explainer.safetensors").stat().st_mtime_ns == stamp
    assert len(again.history) == 3
    with pytest.raises(ValueError, match="one of another configuration. Choose another --out folder"):
        fit_explainer(tiny, few_flowers, out=run, category=RED, config={**SMALL, "eta": 7.0}, seeds=2)


def test_two_fits_never_write_one_folder_or_one_cache(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "maps"
    with sole_writer(out, "run"), pytest.raises(AtWorkError, match="run is locked"):
        fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1)
    assert list(out.iterdir()) == []
    # What another process leaves between the look at the folder and the lock counts.
    with run_folder(out, "run.json", "mine") as manifest:
        assert manifest is None

    def other_run(folder: Path, name: str) -> AbstractContextManager[None]:
        write_json(folder / "run.json", {"identity": "theirs", "status": "running"})
        return sole_writer(folder, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("partlens.verbs.runs.sole_writer", other_run)
        with pytest.raises(RunError, match="another configuration"), run_folder(out, "run.json", "mine"):
            pass
    (out / "run.json").unlink()
    with sole_writer(cache, "maps"), pytest.raises(AtWorkError, match="maps is locked"):
        fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1, cache=cache)
    assert fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1, cache=cache).path == out
    assert not list(tmp_path.rglob(".*.lock"))


@pytest.mark.parametrize("where", ["cache", 1, 2, 4])
def test_killing_anywhere_and_running_again_gives_the_same_explainer(
    run: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path, where: str | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the cache, after an epoch, or in the second seed."""
    seen = 0

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def count(record: Any) -> str:
        nonlocal seen
        seen += 1
        if seen == where:
            interrupt()
        return ""

    out = tmp_path / "killed"
    arguments: dict[str, Any] = {"out": out, "category": RED, "config": SMALL, "seeds": 2}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        if where == "cache":
            patched.setattr(Progress, "task", _interrupting_task(interrupt))
        else:
            patched.setattr(Progress, "summary", staticmethod(count))
        fit_explainer(tiny, few_flowers, progress=Progress.silent(), **arguments)
    fit_explainer(tiny, few_flowers, **arguments)
    first, second = (load_explainer(r, tiny)[0].state_dict() for r in (run, out))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    shares = [json.loads((r / "run.json").read_text())["p_by_seed"] for r in (run, out)]
    assert shares[0] == shares[1]


def _interrupting_task(interrupt: Any) -> Any:
    from contextlib import contextmanager

    @contextmanager
    def task(_self: Progress, name: str, _total: int) -> Any:
        def advance(done: int, _remark: str = "") -> None:
            if name == "caching maps" and done > 32:
                interrupt()

        yield advance

    return task


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    with monkeypatch.context() as patched, pytest.raises(OSError, match="GB free for the maps .* Free space"):
        patched.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1))
        fit_explainer(tiny, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1)
    assert fit_explainer(tiny, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1).history


def test_without_a_category_all_photos_are_explained(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    fit_explainer(tiny, few_flowers, out=tmp_path / "run", config=SMALL, seeds=1)
    scores = evaluate(tmp_path / "run", few_flowers, model=tiny)
    assert "error_increase_points" not in scores["reconstruction"]
    assert scores["p"]["interval"] == [None, None]
    assert report(tmp_path / "run").stat().st_size > 10_000


def test_photos_without_landmarks_still_give_fidelity(tiny: Performer, tmp_path: Path) -> None:
    pictures = [np.random.default_rng(k).integers(0, 255, (40, 40, 3), dtype=np.uint8) for k in range(24)]
    images = ImageSet.from_arrays(pictures, splits=["train"] * 12 + ["test"] * 12)
    fit_explainer(tiny, images, out=tmp_path / "run", config=SMALL, seeds=1)
    scores = evaluate(tmp_path / "run", images, model=tiny)
    assert scores["explainer"]["instability"]["value"] is None
    assert scores["explainer"]["peak_spread_cells"]["value"] is not None
    report(tmp_path / "run")


def test_photos_of_the_fit_are_known_under_other_names(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    """Training photos in another folder, called test photos there, are no held-out photos."""
    pixels = [np.asarray(few_flowers.read(i)) for i in range(len(few_flowers))]
    photos = ImageSet.from_arrays(pixels, few_flowers.categories, few_flowers.splits)
    run = fit_explainer(tiny, photos, out=tmp_path / "run", category=RED, config=SMALL, seeds=1).path
    train, test = (photos.indices(category=RED, split=split) for split in ("train", "test"))
    chosen = [pixels[i] for i in (*train[:3], *test[:4])]
    others = ImageSet.from_arrays(chosen, [RED] * 7, ["test"] * 7)
    found = evaluate(run, others, model=tiny, gallery="none")
    assert "3 of the 7 photos were used in the fit: the scores flatter" in found["warnings"]
    strangers = ImageSet.from_arrays(chosen[3:], [RED] * 4, ["test"] * 4)
    for held in (strangers, photos):
        found = evaluate(run, held, model=tiny, gallery="none")
        assert not any("used in the fit" in text for text in found["warnings"])
    (run / "photos.json").unlink()  # a run of an earlier version
    assert evaluate(run, others, model=tiny, gallery="none")["photos"] == 7


def test_a_run_killed_before_it_kept_its_photos_goes_on(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(explainer_run, "write_photos", killed)
        fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1)
    fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1)
    assert len(json.loads((out / "photos.json").read_text())["photos"]) == len(few_flowers.indices(split="train"))


def test_another_crop_of_a_training_photo_is_that_photo(tmp_path: Path) -> None:
    runs.write_photos(tmp_path, ["9:ab@(0, 0, 5, 5)+0.0"])
    assert runs.photos_seen(tmp_path, ("9:ab@(1, 2, 3, 4)+0.1", "9:cd@(0, 0, 5, 5)+0.0", "9:ab")) == 2


def test_measuring_on_the_training_photos_warns(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    assert any("photos of the fit" in w for w in evaluate(run, few_flowers, model=tiny, split="train")["warnings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tap": "relu22"}, r"relu2"),
        ({"tap": "pool4"}, "1x1"),
        ({"category": "petal-rot"}, "Did you mean petal-red"),
        ({"seeds": 0}, "at least 1 seed, got 0"),
        ({"config": {"epoch": 2}}, "Did you mean epochs"),
        ({"preset": "best"}, "preset partlens, held, candidates, paper, got best"),
        ({"targets": ["relu1"]}, "relu1"),
    ],
)
def test_wrong_arguments_name_value_and_remedy(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"out": tmp_path / "run", "category": RED, "config": SMALL, **arguments}
    with pytest.raises(partlens.PartlensError, match=message):
        fit_explainer(tiny, few_flowers, **given)
    assert not (tmp_path / "run").exists()


def test_models_that_cannot_be_used(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        scripted = torch.jit.trace(tiny.module, torch.rand(1, 3, 32, 32))
    with pytest.raises(partlens.PartlensError, match=r"(?i)script|traced"):
        fit_explainer(scripted, few_flowers, out=tmp_path / "run", config=SMALL)
    broken = tiny.module
    with torch.no_grad():
        broken.get_submodule("conv2").weight[0] = float("nan")
    with pytest.raises(partlens.PartlensError, match=r"(?i)nan"):
        fit_explainer(Performer(broken, "x", tiny.preprocessing, "0", "relu2"), few_flowers, out=tmp_path / "run")


def test_one_photo_none_and_corrupt_ones(tiny: Performer, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    (folder / "train").mkdir(parents=True)
    with pytest.raises(partlens.PartlensError, match="image"):
        fit_explainer(tiny, folder, out=tmp_path / "run", config=SMALL)
    Image.new("RGB", (32, 32), "red").save(folder / "train" / "a.png")
    with pytest.raises(partlens.PartlensError, match="at least 2 training photos, got 1"):
        fit_explainer(tiny, folder, out=tmp_path / "run", config=SMALL)
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{index}.png")
    (folder / "train" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    fitted = fit_explainer(tiny, folder, out=tmp_path / "run", config=SMALL, seeds=1)
    assert [d["key"] for d in fitted.manifest["data"]["unreadable"]] == ["train/broken.jpg"]


def test_other_folders_are_not_run_directories(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(partlens.PartlensError, match="a folder with other files"):
        fit_explainer(tiny, few_flowers, out=tmp_path / "mine", category=RED, config=SMALL)
    with pytest.raises(partlens.PartlensError, match="nothing there"):
        evaluate(tmp_path / "none")
    with pytest.raises(partlens.PartlensError):
        report(tmp_path / "none")


def test_a_run_remembers_its_performer(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    with pytest.raises(partlens.PartlensError, match="made with a network object"):
        evaluate(run, few_flowers)
    with pytest.raises(partlens.PartlensError, match="Give them again"):
        evaluate(run, model=tiny)
    other = tiny.module
    with torch.no_grad():
        other.get_submodule("conv1").weight.add_(1)
    with pytest.raises(partlens.PartlensError, match="the performer of the run"):
        evaluate(run, few_flowers, model=other)


def test_public_names_load_lazily() -> None:
    for name in partlens.__all__:
        assert getattr(partlens, name) is not None
    assert set(partlens.__all__) <= set(dir(partlens))
    with pytest.raises(AttributeError, match="no attribute 'explain_everything'"):
        partlens.explain_everything
    assert callable(partlens.report)
    assert partlens.ExplainerConfig is ExplainerConfig


@pytest.fixture
def flower_judge(tiny: Performer) -> Performer:
    """A performer whose outputs are the two categories."""
    tiny.module.classes = nn.Linear(16, 2)
    return Performer(
        tiny.module, "judge", tiny.preprocessing, "judge-weights", "relu2", class_names=("petal-blue", "petal-red")
    )


def test_an_explainer_of_several_categories_shares_its_filters_out(
    flower_judge: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    path = tmp_path / "run"
    fitted = fit_explainer(flower_judge, few_flowers, out=path, category="petal-red,petal-blue", config=SMALL, seeds=1)
    assert fitted.manifest["data"]["categories"] == ["petal-blue", "petal-red"]
    assert fitted.manifest["data"]["category"] == ""
    result = evaluate(path, few_flowers, model=flower_judge)
    shared = result["filter_categories"]
    assert sum(shared.values()) == 12
    assert {r["category"] for r in result["filters"]["explainer"]} == {n for n, count in shared.items() if count}
    each = result["explainer"]["by_category"].values()
    mean = sum(one["instability"]["value"] * one["filters"] for one in each) / sum(one["filters"] for one in each)
    assert result["explainer"]["instability"]["value"] == pytest.approx(mean)
    gap = result["instability_minus_null"]["corner"]
    assert gap["value"] == pytest.approx(mean - result["nulls"]["corner"]["instability"]["value"])
    # Two categories that are outputs of the performer: the errors are its own, on the photos of both.
    assert result["reconstruction"]["errors_by"] == "performer"
    held = len(few_flowers.indices(split="test"))
    assert result["reconstruction"]["performer_error_percent"]["n"] == held
    found = parts(path, few_flowers, model=flower_judge, config={"photos_max": 12, "rounds": 2, "random_parts": 2})
    assert found["photos"] == min(12, held)
    # Every filter has the category that the evaluation gives it, and a part of that category.
    evaluated = {row["filter"]: row["category"] for row in result["filters"]["explainer"]}
    assert {row["filter"]: row["category"] for row in found["filters"]} == evaluated
    assert all(part["id"].startswith(f"{part['category']}: ") for part in found["parts"])
    assert {k: part["category"] for part in found["parts"] for k in part["filters"]} == evaluated
    page = report(path).read_text()
    assert "petal-blue, petal-red" in page
    assert "a filter belongs to the one whose photos excite it most" in page


def test_explainer_cls_learns_from_the_performers_own_classes(
    flower_judge: Performer, few_flowers: ImageSet, tiny: Performer, tmp_path: Path
) -> None:
    settings = {**SMALL, "objective": "classification"}
    fitted = fit_explainer(flower_judge, few_flowers, out=tmp_path / "cls", category=RED, config=settings, seeds=1)
    assert all("classification" in record for record in fitted.history if record["phase"] == "joint")
    result = evaluate(tmp_path / "cls", few_flowers, model=flower_judge)
    assert result["p_optimum"]["value"] is None
    nameless = Performer(tiny.module, "nameless", tiny.preprocessing, "x", "relu2")
    with pytest.raises(ValueError, match="a performer with an output for each category"):
        fit_explainer(nameless, few_flowers, out=tmp_path / "no", category=RED, config=settings, seeds=1)


def test_errors_of_a_single_logistic_output_are_of_its_sign(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    tiny.module.classes = nn.Linear(16, 1)
    judge = Performer(tiny.module, "judge", tiny.preprocessing, "judge-weights", "relu2", class_names=(RED,))
    fit_explainer(judge, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1)
    result = evaluate(tmp_path / "run", few_flowers, model=judge)
    rows = few_flowers.indices(split="test")
    with torch.no_grad():
        outputs = judge.module(judge.preprocessing([few_flowers.read(i) for i in rows]))[:, 0]
    wrong = [(float(s) > 0) != (few_flowers.categories[i] == RED) for s, i in zip(outputs, rows, strict=True)]
    assert result["reconstruction"]["errors_by"] == "performer"
    everything = EvaluationRows(range(3), range(5), range(7), range(11))
    assert everything.streamed(own_outputs=True, several=False) == 8
    assert everything.streamed(own_outputs=False, several=False) == 26
    assert everything.streamed(own_outputs=True, several=True) == 15
    assert EvaluationRows(range(3), (), range(7), ()).streamed(own_outputs=False, several=False) == 3
    assert result["reconstruction"]["performer_error_percent"]["value"] == pytest.approx(100 * np.mean(wrong))


def test_p_of_least_objective_and_rescaling_stand_beside_p(run: Path, few_flowers: ImageSet, tiny: Performer) -> None:
    result = evaluate(run, few_flowers, model=tiny)
    low, high = result["p_optimum"]["interval"]
    assert 0 < low <= result["p_optimum"]["value"] <= high < 1
    assert result["p_rescaling_error"] < 1e-4


def test_evidence_is_cached_once_and_guides_the_fit(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    fitted = fit_explainer(
        tiny,
        few_flowers,
        out=tmp_path / "run",
        category=RED,
        config={**SMALL, "initialisation": "parts", "teachers": 0, "evidence_weight": 4.0},
        seeds=1,
        cache=tmp_path / "cache",
    )
    assert (tmp_path / "cache" / "evidence.safetensors").exists()
    assert all("evidence" in record for record in fitted.history)
    assert "evidence_at_peak" in fitted.history[0]


def test_intervals_range_over_photos_not_crops(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    kinds = list(zip(few_flowers.categories, few_flowers.splits, strict=True))
    half = dataclasses.replace(
        few_flowers, photos=tuple(f"{kind}-{kinds[:k].count(kind) // 2}" for k, kind in enumerate(kinds))
    )
    whole = evaluate(run, few_flowers, model=tiny, gallery="none")
    pairs = evaluate(run, half, model=tiny, gallery="none")
    held = [
        k
        for k, (c, s) in enumerate(zip(few_flowers.categories, few_flowers.splits, strict=True))
        if c == RED and s == "test"
    ]
    photos = len({half.photos[k] for k in held})
    assert photos < len(held) == pairs["photos"]
    assert whole["explainer"]["dead_frac"]["n"] == len(held)
    for found in (
        pairs["explainer"]["dead_frac"],
        pairs["explainer"]["silent_frac"],
        pairs["nulls"]["random"]["border_frac"],
        pairs["reconstruction"]["agreement_top1"],
        pairs["p_optimum"],
        *pairs["reconstruction"]["relative_error"].values(),
    ):
        assert found["n"] == photos
    assert pairs["reconstruction"]["error_increase_points"]["n"] < whole["reconstruction"]["error_increase_points"]["n"]
    content = parts(run, half, model=tiny, rule="clusters", config={"null_filters": 50, "rounds": 4})
    assert content["contributions"]["interpretable_share"]["n"] == photos
    assert content["contributions"]["score"]["agreement_top1"]["n"] == photos
    assert content["contributions"]["removal_check"]["shapley"]["correlation"]["n"] == photos


def test_photos_without_a_training_split_can_be_measured(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    elsewhere = dataclasses.replace(few_flowers, splits=("test",) * len(few_flowers))
    found = evaluate(run, elsewhere, model=tiny, gallery="none")
    assert found["photos"] == few_flowers.category_counts()[RED]
    assert "error_increase_points" not in found["reconstruction"]


def test_the_papers_preset_takes_what_the_papers_say_of_a_network(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = papers.PaperSetting("tiny", "relu2", ("relu3", "relu4"), 7.0e5, 8, 32, "read so")
    monkeypatch.setattr(papers, "paper_setting", lambda _: known)
    changes = {k: v for k, v in SMALL.items() if k not in ("views", "candidates_per_filter", "votes")}
    made = fit_explainer(
        tiny, few_flowers, out=tmp_path / "a", category=RED, preset="paper", config=changes, seeds=1
    ).manifest
    assert made["config"]["eta"] == 7.0e5
    assert (made["structure"]["tap"], made["structure"]["targets"]) == ("relu2", ["relu3", "relu4"])
    assert made["preset_note"] == "read so"
    own = fit_explainer(
        tiny,
        few_flowers,
        out=tmp_path / "b",
        category=RED,
        preset="paper",
        config={**changes, "eta": 3.0},
        targets=["relu4"],
        seeds=1,
    ).manifest
    assert own["config"]["eta"] == 3.0
    assert own["structure"]["targets"] == ["relu4"]
    plain = fit_explainer(tiny, few_flowers, out=tmp_path / "c", category=RED, config=SMALL, seeds=1).manifest
    assert plain["config"]["eta"] == ExplainerConfig.preset("partlens").eta
    assert plain["preset_note"] == ""


def test_in_a_shared_folder_one_of_two_can_be_begun_again(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    """An explainer of another configuration may go without the selection beside it, and leaves nothing behind."""
    out, alone = tmp_path / "shared", tmp_path / "alone"
    given: dict[str, Any] = {"category": RED, "seeds": 2}
    fit_explainer(tiny, few_flowers, out=out, config=SMALL, **given)
    for name in ("selection", "evaluation"):
        write_json(out / f"{name}.json", {"identity": "of a selection"})
    other = SMALL | {"epochs": 3}
    with pytest.raises(RunError, match=r"delete run\.json in it\.$"):
        fit_explainer(tiny, few_flowers, out=out, config=other, **given)
    (out / "run.json").unlink()
    again = fit_explainer(tiny, few_flowers, out=out, config=other, **given).manifest["p_by_seed"]
    assert again == fit_explainer(tiny, few_flowers, out=alone, config=other, **given).manifest["p_by_seed"]
    assert (out / "selection.json").exists()
    assert not (out / "evaluation.json").exists()
    with pytest.raises(RunError, match=r"delete this one\.$"):
        fit_explainer(tiny, few_flowers, out=alone, config=SMALL, **given)


def test_what_a_killed_write_left_is_no_other_run(tmp_path: Path) -> None:
    left = tmp_path / ".run.json.abcd.tmp"
    left.write_text("half")
    with run_folder(tmp_path, "run.json", "one") as found:
        assert found is None
        assert left.exists()  # another kind of run may be writing it now
    os.utime(left, (0, 0))
    with run_folder(tmp_path, "run.json", "one"):
        assert not left.exists()


def test_what_an_earlier_revision_made_is_not_taken_for_this_ones(
    run: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explainer_run, "REVISION", 1)
    old = fit_explainer(tiny, few_flowers, out=tmp_path / "old", category=RED, config=SMALL, seeds=1).path
    monkeypatch.undo()
    with pytest.raises(RunError, match="one of another configuration"):
        fit_explainer(tiny, few_flowers, out=old, category=RED, config=SMALL, seeds=1)
    assert evaluate(old, few_flowers, model=tiny, gallery="none")["photos"]  # it can still be measured


class _Answers(nn.Module):
    """A network that answers in another form."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.inner(x)
        return {"dict": {"logits": scores}, "flat": scores[:, 0], "maps": scores[:, :, None, None]}[self.kind]


@pytest.mark.parametrize(
    ("kind", "got"), [("dict", "dict"), ("flat", r"shape \(1,\)"), ("maps", r"shape \(1, \d+, 1, 1\)")]
)
def test_a_network_that_answers_otherwise_is_refused_before_the_work(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, kind: str, got: str
) -> None:
    module = _Answers(tiny.module, kind).eval()
    odd = Performer(module, "odd", tiny.preprocessing, "odd-weights", "inner.relu2")
    with pytest.raises(LayerError, match=rf"scores \(image, output\) from odd, got {got}. Wrap the network"):
        fit_explainer(odd, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1)
    assert not (tmp_path / "run").exists()


def test_a_network_of_one_channel_is_told_how_to_wrap_it(
    few_flowers: ImageSet, tiny: Performer, tmp_path: Path
) -> None:
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval()
    performer = Performer(grey, "grey", tiny.preprocessing, "grey-weights", "1")
    with pytest.raises(LayerError, match=r"grey to take images of shape \(1, 3, 32, 32\).* net\(x.mean\(1, keepdim"):
        fit_explainer(performer, few_flowers, out=tmp_path / "run", config=SMALL, seeds=1)


class _Functional(nn.Module):
    """Activations as functions, which no hook can read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.pool = nn.MaxPool2d(2)
        self.fc1, self.fc2 = nn.Linear(8 * 8 * 8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        return self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))


def test_targets_that_are_chosen_can_be_read(few_flowers: ImageSet, tiny: Performer, tmp_path: Path) -> None:
    performer = Performer(_Functional().eval(), "functional", tiny.preprocessing, "f-weights", "pool")
    small = {**SMALL, "epochs": 1}
    run = fit_explainer(performer, few_flowers, out=tmp_path / "run", category=RED, config=small, seeds=1)
    assert {*run.manifest["structure"]["targets"]} <= {"fc1", "fc2"}
    assert evaluate(run.path, few_flowers, model=performer, gallery="none")["photos"] > 1
    with pytest.raises(LayerError, match="at least one target, got none"):
        fit_explainer(performer, few_flowers, out=tmp_path / "no", category=RED, config=small, seeds=1, targets=[])


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (ExplainerConfig(), "mask", "false", "mask to be true or false, got 'false'"),
        (ExplainerConfig(), "epochs", True, "epochs to be a whole number, got True"),
        (ExplainerConfig(), "eta", "much", "eta to be a number, got 'much'"),
        (ExplainerConfig(), "kernel", "round", "kernel to be one of full, box, got 'round'"),
        (PartsConfig(), "rounds", 1.5, "rounds to be a whole number, got 1.5"),
        (PartsConfig(), "consistency_min", "a", "consistency_min to be a number or nothing, got 'a'"),
        (OcclusionConfig(), "images", "x", "images to be a whole number, got 'x'"),
        (FinetuneConfig(), "epochs", "3", "epochs to be .*a whole number.*, got '3'"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(config: Any, name: str, value: object, message: str) -> None:
    """The checks of the tests themselves would refuse such a call first: the field is changed behind their back."""
    object.__setattr__(config, name, value)
    with pytest.raises(InputError, match=message):
        config.__post_init__()


def test_a_file_is_no_run_directory_and_pictures_are_checked_first(
    run: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="a folder at .*file, got a file"):
        fit_explainer(tiny, few_flowers, out=tmp_path / "file", category=RED, config=SMALL, seeds=1)
    with pytest.raises(InputError, match="background of at least 0, got -1"):
        fit_explainer(tiny, few_flowers, out=tmp_path / "b", category=RED, config=SMALL, seeds=1, background=-1)
    with pytest.raises(InputError, match="Did you mean images"):
        evaluate(run, few_flowers, model=tiny, occlusion={"image": 3})
    assert not (run / "evaluation.json").exists()
