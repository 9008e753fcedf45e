"""Fitting on a tiny network and generated flowers, killed anywhere, and every error a user can meet."""

from __future__ import annotations

import io
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from rich.console import Console
from torch import nn

import partlens
from partlens.data.images import ImageSet
from partlens.errors import AtWorkError, ImageError, InputError, LayerError, RunError
from partlens.evaluation.results import PriceCurve, PricePoint
from partlens.explainer.teachers import find_teachers
from partlens.network.performer import Performer
from partlens.network.watched import watch
from partlens.object_parts.finding import found_places
from partlens.progress import Progress
from partlens.records import sole_writer, write_json, write_tensors
from partlens.run import UsedPhotos
from partlens.verbs import fit_explainer as verb
from partlens.verbs.evaluate import evaluate
from partlens.verbs.fit_explainer import fit_explainer, load_explainer
from partlens.verbs.inspection import inspect
from partlens.verbs.runs import layers, report

SMALL: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 1,
    "views": 3,
    "batch_size": 8,
    "background_batch": 4,
    "precision": "float32",
}
RED = "petal-red"


def test_the_performer_is_untouched_by_every_verb_and_watched_once(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any
) -> None:
    watched: list[nn.Module] = []
    monkeypatch.setattr("partlens.network.layers.watch", lambda module, _: watched.append(module) or watch(module, _))
    tiny.module.train()
    next(iter(tiny.module.parameters())).requires_grad_(requires_grad=False)
    before = state(tiny.module, python=False)
    fit_explainer(tiny, few_flowers, out=tmp_path / "a", category=RED, config=SMALL, seeds=1)
    assert state(tiny.module, python=False) == before
    evaluate(tmp_path / "a", few_flowers, model=tiny, rounds=5)
    assert watched == [tiny.module]
    layers(tiny)
    assert state(tiny.module, python=False) == before
    with pytest.raises(ValueError, match="a layer"):
        fit_explainer(tiny, few_flowers, out=tmp_path / "b", category=RED, tap="relu9", config=SMALL)
    assert state(tiny.module, python=False) == before


def test_a_finished_run_is_returned_and_another_configuration_refused(
    run: Path, tiny: Performer, few_flowers: ImageSet
) -> None:
    stamp = (run / "explainer.safetensors").stat().st_mtime_ns
    again = fit_explainer(tiny, few_flowers, out=run, category=RED, config=SMALL, seeds=2)
    assert (run / "explainer.safetensors").stat().st_mtime_ns == stamp
    assert len(again.history) == 3
    with pytest.raises(ValueError, match=r"holds a run with eta = 1e\+06, not 7\. Choose another --out or delete it\."):
        fit_explainer(tiny, few_flowers, out=run, category=RED, config={**SMALL, "eta": 7.0}, seeds=2)


def test_two_fits_never_write_one_folder_or_one_cache(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    out, cache = tmp_path / "run", tmp_path / "maps"
    given: dict[str, Any] = {"out": out, "category": RED, "config": SMALL, "seeds": 1}
    with sole_writer(out), pytest.raises(AtWorkError, match="run is locked"):
        fit_explainer(tiny, few_flowers, **given)
    assert not [path for path in out.iterdir() if path.suffix != ".lock"]
    with sole_writer(cache, "rows"), pytest.raises(AtWorkError, match="maps is locked"):
        fit_explainer(tiny, few_flowers, **given, cache=cache)
    assert fit_explainer(tiny, few_flowers, **given, cache=cache).path == out


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
    def task(_self: Progress, name: str, _total: int, _shorter: str = "") -> Any:
        def advance(done: int, _remark: str = "") -> None:
            if name == "caching maps" and done > 32:
                interrupt()

        yield advance

    return task


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    with monkeypatch.context() as patched, pytest.raises(OSError, match="MB free for the rows .* Free space"):
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
        patch.setattr(UsedPhotos, "write", killed)
        fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1)
    fit_explainer(tiny, few_flowers, out=out, category=RED, config=SMALL, seeds=1)
    assert len(json.loads((out / "photos.json").read_text())["photos"]) == len(few_flowers.indices(split="train"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tap": "relu22"}, r"relu2"),
        ({"tap": "pool4"}, "1x1"),
        ({"category": "petal-rot"}, "Choose one of petal-red"),
        ({"seeds": 0}, "at least 1 seed, got 0"),
        ({"config": {"epoch": 2}}, "Did you mean epochs"),
        ({"preset": "best"}, "preset as one of partlens, paper, got .best."),
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
    with pytest.raises(partlens.PartlensError, match="at least 2 photos in the split train, got 1"):
        fit_explainer(tiny, folder, out=tmp_path / "run", config=SMALL)
    for index in range(10):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{index}.png")
    (folder / "train" / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    fitted = fit_explainer(tiny, folder, out=tmp_path / "run", config=SMALL, seeds=1)
    assert [photo.key for photo in fitted.record.data.unreadable] == ["train/broken.jpg"]


def test_too_few_photos_to_find_parts_in_are_refused_before_maps_are_cached(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    few = few_flowers.take([*few_flowers.indices(RED, "train")[:3], *few_flowers.indices("petal-blue")])
    with pytest.raises(ImageError, match=r"at least 4 photos of each category in .* to find parts in, got 3 petal-red"):
        fit_explainer(tiny, few, out=tmp_path / "run", category=[RED, "petal-blue"], config=SMALL)
    assert not (tmp_path / "run").exists()


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
    assert result.reconstruction.errors_by == "performer"
    assert not (tmp_path / "cls" / "curve.json").exists()  # prices are those of a reconstruction
    nameless = Performer(tiny.module, "nameless", tiny.preprocessing, "x", "relu2")
    with pytest.raises(ValueError, match="a performer with an output for each category"):
        fit_explainer(nameless, few_flowers, out=tmp_path / "no", category=RED, config=settings, seeds=1)


def test_in_a_shared_folder_one_of_two_can_be_begun_again(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    """An explainer of another configuration may be begun again where a selection stays, and leaves nothing behind."""
    out, alone = tmp_path / "shared", tmp_path / "alone"
    given: dict[str, Any] = {"category": RED, "seeds": 2}
    fit_explainer(tiny, few_flowers, out=out, config=SMALL, **given)
    for name in ("selection", "evaluation"):
        write_json(out / f"{name}.json", {"identity": "of a selection"})
    other = SMALL | {"epochs": 3}
    with pytest.raises(RunError, match=r"delete run\.json in it\.$"):
        fit_explainer(tiny, few_flowers, out=out, config=other, **given)
    (out / "run.json").unlink()
    again = fit_explainer(tiny, few_flowers, out=out, config=other, **given).record.p_by_seed
    assert again == fit_explainer(tiny, few_flowers, out=alone, config=other, **given).record.p_by_seed
    assert (out / "selection.json").exists()
    assert not (out / "evaluation.json").exists()
    with pytest.raises(RunError, match=r"delete it\.$"):
        fit_explainer(tiny, few_flowers, out=alone, config=SMALL, **given)


class _Answers(nn.Module):
    """A network that answers in another form."""

    def __init__(self, inner: nn.Module, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: torch.Tensor) -> Any:
        scores = self.inner(x)
        return {"logits": scores} if self.kind == "dict" else scores[:, :, None, None]


@pytest.mark.parametrize("kind", ["dict", "maps"])
def test_scores_in_another_form_are_explained_all_the_same(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, kind: str
) -> None:
    odd = Performer(_Answers(tiny.module, kind).eval(), "odd", tiny.preprocessing, "odd-weights", "inner.relu2")
    given: dict[str, Any] = {"category": RED, "config": SMALL, "seeds": 1}
    found = fit_explainer(odd, few_flowers, out=tmp_path / kind, **given).record.p_by_seed
    assert found == fit_explainer(tiny, few_flowers, out=tmp_path / "plain", **given).record.p_by_seed


def test_a_network_of_one_channel_is_told_what_to_give(few_flowers: ImageSet, tiny: Performer, tmp_path: Path) -> None:
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 30 * 30, 2)).eval()
    performer = Performer(grey, "grey", tiny.preprocessing, "grey-weights", "1")
    with pytest.raises(LayerError, match=r"grey to take images of shape \(1, 3, 32, 32\).*Preprocessing\(channels="):
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
    assert {*run.record.structure.targets} <= {"fc1", "fc2"}
    assert evaluate(run.path, few_flowers, model=performer, gallery="none", rounds=5).data.photos > 1
    with pytest.raises(LayerError, match="at least one target, got none"):
        fit_explainer(performer, few_flowers, out=tmp_path / "no", category=RED, config=small, seeds=1, targets=[])


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


def test_the_refusal_names_what_differs(run: Path, tiny: Performer, few_flowers: ImageSet) -> None:
    given: dict[str, Any] = {"out": run, "category": RED, "config": SMALL, "seeds": 2}
    for changes, message in (
        ({"seeds": 3}, "seeds = 2, not 3"),
        ({"category": "petal-blue"}, "categories = petal-red, not petal-blue"),
        ({"config": SMALL | {"views": 4}}, "views = 3, not 4"),
        ({"background": 5}, r"background = \d+, not 5"),
        ({"targets": ["relu4"]}, "targets = .*, not relu4"),
        ({"places_of": found_places}, "places = found, not partlens.object_parts.finding:found_places"),
    ):
        with pytest.raises(RunError, match=f"holds a run with {message}"):
            fit_explainer(tiny, few_flowers, **(given | changes))


def test_weights_of_another_run_or_damaged_ones_are_refused(
    run: Path, tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    other = fit_explainer(tiny, few_flowers, out=tmp_path / "b", category=RED, config=SMALL | {"seed": 5}, seeds=1)
    mine, theirs = (path / "explainer.safetensors" for path in (run, other.path))
    kept = mine.read_bytes()
    mine.write_bytes(theirs.read_bytes())
    with pytest.raises(RunError, match="the tensors that this run wrote in .*safetensors, got others"):
        load_explainer(run, tiny)
    mine.write_bytes(kept)
    explainer, _ = load_explainer(run, tiny)
    assert not explainer.training
    record = json.loads((run / "run.json").read_text())
    record["structure"]["channels_out"] = 5
    write_json(run / "run.json", record)
    with pytest.raises(RunError, match=r"in .*explainer.safetensors to be float32 .*, got .*Restore the file"):
        load_explainer(run, tiny)


def test_a_record_that_names_code_does_not_run_it(
    run: Path, tiny: Performer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "holiday.py").write_text("raise SystemExit('this module was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    record = json.loads((run / "run.json").read_text())
    record["performer"]["spec"] = "holiday:photos"
    write_json(run / "run.json", record)
    with pytest.raises(RunError, match=r"names the code holiday:photos, got none\. If you trust it, give --model"):
        load_explainer(run)
    with pytest.raises(RunError, match="names the code"):
        evaluate(run)
    assert load_explainer(run, tiny)[1] is tiny


def test_a_fit_reads_a_photo_twice_hashes_it_once_and_caches_its_maps_once(
    tiny: Performer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to see whether it can be decoded, which hashes it too, and once for all its views, whatever the seeds."""
    folder = tmp_path / "photos" / "train"
    folder.mkdir(parents=True)
    for index in range(8):
        pixels = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    decoded: list[str] = []
    load = PngImageFile.load

    def counted(self: PngImageFile) -> Any:
        if self.fp is not None and self.tile:
            decoded.append(Path(str(self.filename or getattr(self.fp, "name", ""))).name)
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", counted)
    fit_explainer(tiny, folder.parent, out=tmp_path / "run", config=SMALL | {"views": 6}, seeds=3)
    assert len(decoded) <= 8 * 2 + 1  # and one photo to look at the network's answer


def test_teachers_may_come_from_elsewhere(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    asked: list[int] = []

    def middle(_: Any, data: Any, category: int) -> Any:
        asked.append(category)
        return torch.rand(data.photos, 20, 2, generator=torch.Generator().manual_seed(0))

    given: dict[str, Any] = {"category": RED, "config": SMALL, "seeds": 1}
    fitted = fit_explainer(tiny, few_flowers, out=tmp_path / "run", places_of=middle, **given)
    assert asked == [0]
    assert fitted.record.places.endswith("middle")


def test_the_parts_that_an_inspection_found_teach(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are taken as they are, by their finder, and nothing is searched again."""
    inspected = inspect(tiny, few_flowers, out=tmp_path / "seen", config={"photos": 12, "views": 2, "background": 4})
    taught: list[torch.Tensor] = []

    def watched(explainer: Any, data: Any, places_of: Any) -> Any:
        taught.append(places_of(explainer, data, 0))
        return find_teachers(explainer, data, places_of)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("searched again")

    monkeypatch.setattr("partlens.explainer.training.find_teachers", watched)
    monkeypatch.setattr("partlens.object_parts.finding.search", never)
    given: dict[str, Any] = {"category": RED, "config": SMALL, "inspection": tmp_path / "seen"}
    fitted = fit_explainer(tiny, few_flowers, out=tmp_path / "run", **given)
    assert fitted.record.places == f"inspection {inspected.tensors_sha256[:12]}"
    (found,) = (one for one in inspected.categories if one.name == RED)
    assert taught[0].shape[1] == 8  # what the search chose, of which the inspection keeps what the photos support
    mean = taught[0].mean(0)
    for part in found.parts:
        assert float((mean - torch.tensor(part.place)).norm(dim=1).min()) < 0.1
    # In the inspection's own folder it is taken without being named.
    again = fit_explainer(tiny, few_flowers, out=tmp_path / "seen", category=RED, config=SMALL)
    assert again.record.places == fitted.record.places


def test_an_inspection_without_the_category_is_refused(tiny: Performer, few_flowers: ImageSet, tmp_path: Path) -> None:
    config = {"photos": 12, "views": 2, "background": 4}
    inspect(tiny, few_flowers, out=tmp_path / "seen", category=RED, config=config)
    with pytest.raises(RunError, match=r"an inspection of petal-blue in .*seen, got petal-red\. Inspect these"):
        fit_explainer(
            tiny, few_flowers, out=tmp_path / "b", category="petal-blue", config=SMALL, inspection=tmp_path / "seen"
        )


def test_beside_p_a_fit_says_what_part_filters_keep_alone(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    told = io.StringIO()
    show = Progress(Console(file=told, width=600))
    run = tmp_path / "run"
    fitted = fit_explainer(tiny, few_flowers, out=run, category=RED, config=SMALL, progress=show)
    curve = PriceCurve.read(run)
    assert fitted.record.seeds == 1
    assert curve.points[0].p == pytest.approx(fitted.record.p_by_seed[0])
    assert [point.eta for point in curve.points] == pytest.approx([1e6, 3e6, 1e7, 3e7])
    assert [point.p for point in curve.points] == sorted(point.p for point in curve.points)
    held = len(few_flowers.indices(RED, "test"))
    for point in curve.points:
        for kept in (point.reconstruction, point.parts_alone.parts, point.parts_alone.other_photo):
            assert kept.agreement_top1.n == curve.photos == held
            assert kept.errors_by == "logistic head"
    assert "a price: with the ordinary track silent the part filters keep" in told.getvalue()
    assert not (run / "cache").exists()


def test_runs_that_share_a_cache_learn_prices_of_their_own(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    """The second one took the first one's prices for its own where only the fit before them differed."""

    def points(name: str, cache: str, **changes: Any) -> list[PricePoint]:
        out, config = tmp_path / name, {**SMALL, **changes}
        fit_explainer(tiny, few_flowers, out=out, category=RED, config=config, cache=tmp_path / cache)
        assert not (out / "price").exists()
        return list(PriceCurve.read(out).points)

    points("first", "shared", learning_rate_joint=1e-2)
    dearer = points("dearer", "shared", eta=2e6)
    assert [point.eta for point in dearer] == pytest.approx([2e6, 6e6, 2e7, 6e7])
    assert points("second", "shared", learning_rate_joint=1e-4) == points("alone", "its-own", learning_rate_joint=1e-4)


def test_a_long_fit_says_beforehand_how_long_it_takes_and_what_is_faster(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path
) -> None:
    told = io.StringIO()
    clock = itertools.count(0.0, 20.0)  # every look at the clock is 20 seconds later
    show = Progress(Console(file=told, width=200), clock=lambda: next(clock))
    fit_explainer(tiny, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1, progress=show)
    text = told.getvalue()
    assert re.search(r"learning takes about \d+ min \(fewer --seeds, --explainer.epochs", text), text
    assert re.search(r"caching maps takes about \d+ min \(fewer --background", text), text


@pytest.mark.parametrize(
    ("units", "given", "precision"),
    [(True, {}, "bfloat16"), (False, {}, "float32"), (False, {"precision": "bfloat16"}, "bfloat16")],
)
def test_without_bfloat16_units_the_default_is_float32(
    units: bool, given: dict[str, str], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("partlens.network.precision.has_bfloat16_units", lambda _: units)
    assert verb._settings("partlens", given, torch.device("cpu"), seeds=1, background=0).precision == precision


def test_a_run_of_another_machine_asks_where_the_weights_are(run: Path, tiny: Performer) -> None:
    record = json.loads((run / "run.json").read_text())
    record["performer"]["spec"] = "partlens:flower-demo@/home/somebody/flowers.safetensors"
    write_json(run / "run.json", record)
    with pytest.raises(RunError, match=r"/home/somebody/flowers\.safetensors.*Say where its weights are now \(--model"):
        load_explainer(run)
    load_explainer(run, tiny)


@pytest.mark.parametrize("name", ["explainer.safetensors", "seeds/1/explainer.safetensors"])
def test_weights_of_another_shape_in_a_fit_that_goes_on_are_named(
    run: Path, tiny: Performer, few_flowers: ImageSet, name: str
) -> None:
    record = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", record | {"status": "running"})
    write_tensors(run / name, {"gain": torch.zeros(2)})
    with pytest.raises(RunError, match=rf"in .*{name} to be float32.*Delete it and run the command again"):
        fit_explainer(tiny, few_flowers, out=run, category=RED, config=SMALL, seeds=2)
    (run / name).unlink()
    assert fit_explainer(tiny, few_flowers, out=run, category=RED, config=SMALL, seeds=2).record.finished


def test_a_training_that_fails_leaves_no_thread_behind(
    tiny: Performer, few_flowers: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("partlens.explainer.training._Training._step", failing)
    before = set(threading.enumerate())
    with pytest.raises(MemoryError):
        fit_explainer(tiny, few_flowers, out=tmp_path / "run", category=RED, config=SMALL, seeds=1)
    assert set(threading.enumerate()) == before


FIRST_CALL = """
import os, random, sys, warnings
import torch
from torch import nn
from partlens.data.flowers import generated_flowers
from partlens.verbs.fit_explainer import fit_explainer
from partlens.network.performer import Performer
from partlens.network.preprocessing import Preprocessing
from partlens.verbs.parts import parts
flowers = generated_flowers(48, seed=3, size=32, categories=("petal-red", "petal-blue"))
head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
network = nn.Sequential(nn.Conv2d(3, 6, 3, 4, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU(), *head).eval()
tiny = Performer(network, "tiny", Preprocessing(size_px=(32, 32), resize="squash"), "tiny", "1")
def state():
    return random.getstate(), dict(os.environ), list(warnings.filters), os.getcwd(), torch.get_num_threads()
before = state()
settings = {"epochs": 1, "warmup_epochs": 1, "views": 2, "batch_size": 4, "precision": "float32"}
fit_explainer(tiny, flowers, out=sys.argv[1], category="petal-red", config=settings, seeds=1)
assert state() == before, "fit"
parts(sys.argv[1], flowers, model=tiny, config={"rounds": 2, "photos_max": 2})
assert state() == before, "parts"
assert "sklearn" in sys.modules and "torch._dynamo" in sys.modules  # what changes the process when it is imported
"""


@pytest.mark.slow
def test_the_first_call_in_a_process_leaves_it_as_it_was(tmp_path: Path) -> None:
    code = [sys.executable, "-c", FIRST_CALL, str(tmp_path / "run")]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
