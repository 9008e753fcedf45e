"""Every verb on another device gives what it gives on the CPU; the device is one that only refuses what a GPU would."""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from partlens.data.flowers import generated_flowers
from partlens.data.images import ImageSet
from partlens.errors import InputError
from partlens.network import performer
from partlens.network.performer import Performer
from partlens.shards import Compute
from partlens.verbs.evaluate import evaluate
from partlens.verbs.explain import explain
from partlens.verbs.fit_explainer import fit_explainer
from partlens.verbs.inspection import inspect
from partlens.verbs.parts import parts

FIT: dict[str, Any] = {"epochs": 1, "warmup_epochs": 1, "views": 2, "batch_size": 8, "precision": "float32"}


@pytest.fixture(scope="module", autouse=True)
def done() -> Iterator[Counter[str]]:
    """What was computed on the device ``far``, by name of the operation."""
    pytest.importorskip("torch.utils.backend_registration")
    spec = importlib.util.spec_from_file_location("far_device", Path(__file__).with_name("far_device.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real, made = performer.device_of, torch.tensor

    def device_of(name: str | None, here: torch.device | None = None, number: int = 0) -> torch.device:
        return torch.device("far:0") if name == "far" else real(name, here, number)

    def tensor(data: Any, *, device: Any = None, **rest: Any) -> torch.Tensor:
        return made(data, **rest) if device is None else made(data, **rest).to(device)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(performer, "device_of", device_of)
        patched.setattr(torch, "tensor", tensor)  # makes no tensors on such devices
        torch.__future__.set_swap_module_params_on_conversion(True)
        yield module.DONE
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_once: Performer) -> Path:
    """A run with an inspection, an explainer and its parts."""
    out = tmp_path_factory.mktemp("device") / "run"
    inspect(tiny_once, flowers(), out=out)
    fit_explainer(tiny_once, flowers(), out=out, category="petal-red", config=FIT)
    parts(out, flowers(), model=tiny_once)
    return out


@functools.cache
def flowers() -> ImageSet:
    return generated_flowers(40, seed=3, size=48, categories=("petal-red", "petal-blue"))


def read(file: Path) -> Any:
    """Return what a file says, without where and when it was made."""
    if file.suffix == ".safetensors":
        return {name: value.tolist() for name, value in load_file(file).items()}
    drop = {"created", "command", "seconds", "device", "path"}
    return json.loads(file.read_text(), object_hook=lambda one: {k: v for k, v in one.items() if k not in drop})


VERBS: dict[str, Callable[..., Any]] = {
    "evaluate": lambda run, **on: evaluate(run, flowers(), rounds=3, fields="occlusion", **on),
    "parts": lambda run, **on: parts(run, flowers(), **on),
    "explain": lambda run, **on: explain(run, flowers().take(range(3)), **on),
    "inspect": lambda run, **on: inspect(on.pop("model"), flowers(), out=run / "again", **on),
    "fit": lambda run, **on: fit_explainer(
        on.pop("model"), flowers(), out=run / "again", category="petal-red", config=FIT, **on
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_another_device_gives_the_same(
    verb: str, finished: Path, tiny: Performer, tmp_path: Path, done: Counter[str]
) -> None:
    before = done["aten::convolution"]
    for where in ("cpu", "far"):
        run = shutil.copytree(finished, tmp_path / where)
        VERBS[verb](run, model=tiny, compute={"device": where})
    assert done["aten::convolution"] > before
    written = (tmp_path / "cpu").rglob("*")
    files = [file.relative_to(tmp_path / "cpu") for file in written if file.suffix in {".json", ".safetensors"}]
    for file in files:
        assert read(tmp_path / "cpu" / file) == read(tmp_path / "far" / file), file


@pytest.mark.parametrize("verb", ["evaluate", "parts", "explain"])
def test_verbs_of_one_process_refuse_several(verb: str, finished: Path, tiny: Performer) -> None:
    with pytest.raises(InputError, match="workers"):
        VERBS[verb](finished, model=tiny, compute=Compute(workers=2))


def test_the_other_device_refuses_what_a_gpu_would() -> None:
    there = torch.ones(2, 3).to("far:0")
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        there + torch.ones(2, 3)
    with pytest.raises((TypeError, RuntimeError)):
        there.numpy()
    assert torch.equal((2 * there).cpu(), torch.full((2, 3), 2.0))
