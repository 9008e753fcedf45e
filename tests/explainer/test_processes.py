"""Several processes learn what one learns: as threads that meet in a room, and as torchrun starts them."""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from partlens.data.flowers import generated_flowers
from partlens.errors import InputError, RunError
from partlens.explainer import processes
from partlens.explainer.config import ExplainerConfig
from partlens.explainer.network import build_explainer, performer_head
from partlens.explainer.processes import Processes, _raise_ended, _told_to_end, batch_mean, from_all
from partlens.explainer.record import ExplainerStructure
from partlens.explainer.terms import Classification
from partlens.explainer.training import Extras, follow, train_explainer
from partlens.explainer.views import TrainingMaps, view_windows
from partlens.network.performer import Performer
from partlens.object_parts.finding import found_places
from partlens.records import read_json, read_tensors
from partlens.verbs.fit_explainer import fit_explainer

STRUCTURE = ExplainerStructure("relu2", ("relu3", "relu4"), 12, 12, (8, 8), None, "relu2")
SMALL: dict[str, Any] = {
    "epochs": 2,
    "warmup_epochs": 2,
    "views": 3,
    "batch_size": 7,
    "background_batch": 4,
    "precision": "float32",
}
# Sums over images are taken in another order, which moves float32 by 1e-7; Adam divides a gradient by its own size, so
# that weights whose gradients are nearly 0 move further. What is left out of a sum, or counted twice, moves both far
# more.
TERMS, WEIGHTS = 2e-5, 1e-4


class Room:
    """Processes as threads: torch.distributed's calls, each a meeting of all."""

    def __init__(self, count: int) -> None:
        self.barrier, self.slots = threading.Barrier(count, timeout=60), [None] * count
        self.number = threading.local()

    def meet(self, value: Any) -> list[Any]:
        self.slots[self.number.value] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def all_gather(self, parts: list[Tensor], part: Tensor) -> None:
        for mine, given in zip(parts, self.meet(part.clone()), strict=True):
            mine.copy_(given)

    def all_reduce(self, value: Tensor) -> None:
        value.copy_(torch.stack(self.meet(value.clone())).sum(0))

    def broadcast_object_list(self, given: list[Any]) -> None:
        sent = self.meet(pickle.dumps(given[0]) if self.number.value == 0 else None)[0]
        given[0] = pickle.loads(sent)


def together(count: int, work: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return what ``work(process)`` gives in each of ``count`` processes."""
    room = Room(count)
    monkeypatch.setattr(processes, "dist", room)
    found: list[Any] = [None] * count

    def one(number: int) -> None:
        room.number.value = number
        try:
            found[number] = work(Processes(number, count))
        except BaseException as error:  # noqa: BLE001 - it is raised below
            found[number] = error
            room.barrier.abort()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors := [each for each in found if isinstance(each, BaseException)]:
        raise min(errors, key=lambda error: isinstance(error, RunError))  # which others see as a process that ended
    return found


def maps_of(tiny: Performer, photos: int, categories: int) -> TrainingMaps:
    generator = torch.Generator().manual_seed(5)
    tap = torch.rand(photos * 3 + 6, 12, 8, 8, generator=generator)
    targets = tiny.upper("relu2", ["relu3", "relu4"])(tap)
    arrays = tuple(t.detach().numpy().astype(np.float16) for t in targets)
    labels = torch.arange(photos) % categories
    others = np.arange(photos * 3, photos * 3 + 6)
    windows = view_windows(photos, 3, generator, 0.5)
    return TrainingMaps(tap.numpy().astype(np.float16), arrays, windows, labels, others, arrays[-1:])


def learned(tiny: Performer, data: TrainingMaps, config: ExplainerConfig, folder: Path, process: Processes) -> Any:
    """Return the logged epochs and the weights, of the first process."""
    places = found_places if config.teachers else None
    extras = Extras(places_of=places, processes=process)
    if process.number:
        return follow(tiny, tiny.weights_sha256, extras)
    if config.objective == "classification":
        extras = Extras(places, Classification(performer_head(tiny, STRUCTURE), (0,)), processes=process)
    explainer = build_explainer(tiny, STRUCTURE, config)
    history = train_explainer(explainer, data, folder, extras=extras).history
    process.shared()
    return history, explainer.state_dict()


def assert_equal_within_rounding(found: Any, wanted: Any) -> None:
    for mine, epoch in zip(found[0], wanted[0], strict=True):
        assert mine.keys() == epoch.keys()
        for name in epoch.keys() - {"phase", "seconds", "processes"}:
            assert mine[name] == pytest.approx(epoch[name], rel=TERMS, abs=1e-7), (epoch["epoch"], name)
    for name, value in wanted[1].items():
        assert float((found[1][name].float() - value.float()).norm()) <= WEIGHTS * float(value.float().norm()) + 1e-9, (
            name
        )


@pytest.mark.parametrize(
    ("preset", "changes", "categories", "count"),
    [
        ("partlens", {}, 1, 2),
        ("partlens", {"learning_rate_ordinary": 1e-3, "filter_background": True}, 3, 3),
        ("paper", {"warmup_epochs": 0}, 2, 3),
        ("partlens", {"batch_size": 2, "background_batch": 1}, 1, 2),
        ("paper", {"objective": "classification", "score_scale_nats": 8.0}, 1, 2),
    ],
    ids=["ours", "several categories", "paper", "one photo each", "classification"],
)
def test_processes_learn_what_one_learns(
    tiny: Performer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    preset: str,
    changes: dict[str, Any],
    categories: int,
    count: int,
) -> None:
    """Of 17 photos in batches of 7, no part is as large as another and the last batch is filled up."""
    data = maps_of(tiny, 17, categories)
    config = ExplainerConfig.preset(preset, **{**SMALL, **changes})
    alone = learned(tiny, data, config, tmp_path / "alone", Processes())
    work = functools.partial(learned, tiny, data, config, tmp_path / "several")
    found = together(count, work, monkeypatch)[0]
    assert [epoch["processes"] for epoch in found[0]] == [count] * len(alone[0])
    assert_equal_within_rounding(found, alone)


def test_sums_are_over_all_processes_within_a_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(10.0).reshape(5, 2)

    def work(process: Processes) -> Any:
        own = process.own(values).clone().requires_grad_()
        outside = batch_mean(own.detach())
        with process.step(len(values)):
            mean, parts = batch_mean(own), from_all(own.detach().sum(0))
            (slope,) = torch.autograd.grad((mean * torch.tensor([1.0, 10.0])).sum(), own)
        return outside, mean.detach(), parts, slope

    for number, (outside, mean, parts, slope) in enumerate(together(2, work, monkeypatch)):
        assert torch.equal(outside, values[number::2].mean(0))
        assert torch.equal(mean, values.mean(0))
        assert torch.equal(parts, torch.stack([values[0::2].sum(0), values[1::2].sum(0)]))
        assert torch.allclose(slope, torch.tensor([0.2, 2.0]).expand(len(slope), 2))  # of all five, not of its own


def test_more_processes_than_photos_of_a_batch_are_refused(
    tiny: Performer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ExplainerConfig.preset("partlens", **{**SMALL, "batch_size": 2})
    work = functools.partial(learned, tiny, maps_of(tiny, 17, 1), config, tmp_path)
    with pytest.raises(InputError, match="Expected at most 2 processes for batches of 2 photos, got 3. Start fewer"):
        together(3, work, monkeypatch)


def test_a_process_with_another_network_is_refused(tiny: Performer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RunError, match="Expected the first process's performer .*Give all processes the same model"):
        follow(tiny, "0" * 64, Extras(processes=Processes(1, 2)))


ASKED = {"category": "petal-red", "tap": "relu2", "targets": ["relu3", "relu4"], "background": 6}
FITTED = {**SMALL, "teachers": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flowers = generated_flowers(32, seed=3, size=48, categories=("petal-red", "petal-blue"))
    folder = tmp_path_factory.mktemp("photos")
    for row, category in enumerate(flowers.categories):
        (folder / category).mkdir(exist_ok=True)
        Image.fromarray(np.asarray(flowers.read(row))).save(folder / category / f"{row}.png")
    return folder


@pytest.fixture(scope="module")
def alone(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Tensor]]:
    """What one process learns."""
    out = tmp_path_factory.mktemp("alone") / "run"
    fit_explainer("learning_along:network", photos, out=out, config=FITTED, **ASKED)
    return of_run(out)


@pytest.fixture(autouse=True, scope="module")
def _network_for_command_lines() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parent))
        yield


def of_run(out: Path) -> tuple[Any, dict[str, Tensor]]:
    return read_json(out / "history.json")["epochs"], read_tensors(out / "explainer.safetensors")


def torchrun(photos: Path, out: Path, *program: str) -> subprocess.CompletedProcess[str]:
    """Fit with two processes that meet on this machine."""
    options = [f"--explainer.{name}={value}" for name, value in FITTED.items()]
    for name, value in ASKED.items():
        options += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *program]
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    arguments = [*launch, "fit-explainer", "learning_along:network", str(photos), "--out", str(out), *options]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=240, check=False)


def test_two_processes_of_torchrun_write_the_run_of_one(photos: Path, alone: Any, tmp_path: Path) -> None:
    done = torchrun(photos, tmp_path / "run", "-m", "partlens")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "run")]  # the first one speaks, once
    assert done.stderr.count("seed 0: finished") == 1
    found = of_run(tmp_path / "run")
    assert {epoch["processes"] for epoch in found[0]} == {2}
    assert_equal_within_rounding(found, alone)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["command"].startswith("partlens fit-explainer")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_when_one_is_killed_the_other_says_so_and_one_alone_goes_on(photos: Path, alone: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    steps = 5  # two an epoch: the second process dies in the third
    done = torchrun(photos, out, str(Path(__file__).with_name("learning_along.py")), "1", str(steps))
    assert done.returncode != 0
    assert "partlens: Could not learn with several processes: another one has ended" in done.stderr, done.stderr
    assert "it goes on after the last epoch" in done.stderr
    assert len(read_json(out / "history.json")["epochs"]) == 2
    fit_explainer("learning_along:network", photos, out=out, config=FITTED, **ASKED)
    found = of_run(out)
    assert [epoch["processes"] for epoch in found[0]] == [2, 2, 1, 1]
    assert_equal_within_rounding(found, alone)


def test_the_signal_by_which_torchrun_ends_the_others_is_an_error_that_says_so() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match="another one has ended.*it goes on after the last epoch"), _told_to_end():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_signal_that_comes_after_the_error_does_not_silence_it() -> None:
    late = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(RunError, match="another one has ended"), _told_to_end():
        late.start()
        _raise_ended("nothing comes from it")
    late.join()
