"""Fitting on a tiny network and generated flowers, killed anywhere, and every error a user can meet."""

from __future__ import annotations

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
from partlens.data.images import ImageSet
from partlens.errors import AtWorkError, InputError, LayerError, RunError
from partlens.explainer.config import ExplainerConfig
from partlens.network.graph import trace
from partlens.network.zoo import Performer
from partlens.progress import Progress
from partlens.records import sole_writer, write_json
from partlens.verbs import fit_explainer as fitting
from partlens.verbs.evaluate import evaluate
from partlens.verbs.fit_explainer import fit_explainer, load_explainer
from partlens.verbs.runs import layers, report, run_folder
from partlens_papers.networks.finetune_config import FinetuneConfig

SMALL: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 1,
    "views": 3,
    "batch_size": 8,
    "background_batch": 4,
    "precision": "float32",
}
RED = "petal-red"


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


def test_the_performer_is_untouched_by_every_verb_and_traced_once(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[nn.Module] = []
    monkeypatch.setattr("partlens.network.performer.trace", lambda module: traced.append(module) or trace(module))
    tiny.module.train()
    next(iter(tiny.module.parameters())).requires_grad_(requires_grad=False)
    before = snapshot(tiny.module)
    fit_explainer(tiny, few_flowers, out=tmp_path / "a", category=RED, config=SMALL, seeds=1)
    assert_same(before, snapshot(tiny.module))
    evaluate(tmp_path / "a", few_flowers, model=tiny, rounds=5)
    layers(tiny)
    assert_same(before, snapshot(tiny.module))
    with pytest.raises(ValueError, match="a layer"):
        fit_explainer(tiny, few_flowers, out=tmp_path / "b", category=RED, tap="relu9", config=SMALL)
    assert_same(before, snapshot(tiny.module))
    assert traced == [tiny.module]


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


def test_a_run_killed_before_it_kept_its_photos_goes_on(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fitting, "write_photos", killed)
        fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1)
    fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1)
    assert len(json.loads((out / "photos.json").read_text())["photos"]) == len(few_flowers.indices(split="train"))


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


def test_explainer_cls_learns_from_the_performers_own_classes(
    flower_judge: Performer, few_flowers: ImageSet, tiny: Performer, tmp_path: Path
) -> None:
    settings = {**SMALL, "objective": "classification"}
    fitted = fit_explainer(flower_judge, few_flowers, out=tmp_path / "cls", category=RED, config=settings, seeds=1)
    assert all("classification" in record for record in fitted.history if record["phase"] == "joint")
    result = evaluate(tmp_path / "cls", few_flowers, model=flower_judge, gallery="none", rounds=5)
    assert not result.p_optimum.defined
    nameless = Performer(tiny.module, "nameless", tiny.preprocessing, "x", "relu2")
    with pytest.raises(ValueError, match="a performer with an output for each category"):
        fit_explainer(nameless, few_flowers, out=tmp_path / "no", category=RED, config=settings, seeds=1)


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
    monkeypatch.setattr(fitting, "REVISION", 1)
    old = fit_explainer(tiny, few_flowers, out=tmp_path / "old", category=RED, config=SMALL, seeds=1).path
    monkeypatch.undo()
    with pytest.raises(RunError, match="one of another configuration"):
        fit_explainer(tiny, few_flowers, out=old, category=RED, config=SMALL, seeds=1)
    assert evaluate(old, few_flowers, model=tiny, gallery="none", rounds=5).data.photos  # it can still be measured


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
    assert evaluate(run.path, few_flowers, model=performer, gallery="none", rounds=5).data.photos > 1
    with pytest.raises(LayerError, match="at least one target, got none"):
        fit_explainer(performer, few_flowers, out=tmp_path / "no", category=RED, config=small, seeds=1, targets=[])


@pytest.mark.parametrize(
    ("config", "name", "value", "message"),
    [
        (ExplainerConfig(), "mask", "false", "mask to be true or false, got 'false'"),
        (ExplainerConfig(), "epochs", True, "epochs to be a whole number, got True"),
        (ExplainerConfig(), "eta", "much", "eta to be a number, got 'much'"),
        (ExplainerConfig(), "kernel", "round", "kernel to be one of full, box, got 'round'"),
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
