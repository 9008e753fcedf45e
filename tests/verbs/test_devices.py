"""Every verb on another device gives what it gives on the CPU; the device is one that only refuses what a GPU would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from partlens.errors import InputError
from partlens.shards import Compute
from partlens.verbs.evaluate import evaluate
from partlens.verbs.explain import explain
from partlens.verbs.parts import parts

VERBS = ("inspect", "fit", "evaluate", "parts", "explain")


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What all verbs wrote on both devices, and how much was computed on the other one."""
    pytest.importorskip("torch.utils.backend_registration", reason="needs devices that are written in Python")
    out, here = tmp_path_factory.mktemp("devices"), Path(__file__)
    paths = [str(here.parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(here.with_name("far_device.py")), str(out)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    return out, list(map(json.loads, done.stdout.splitlines()))


def read(file: Path) -> Any:
    """Return what a file says, without where and when it was made."""
    if file.suffix == ".safetensors":
        return {name: value.tolist() for name, value in load_file(file).items()}
    drop = {"created", "command", "seconds", "device", "path"}
    return json.loads(file.read_text(), object_hook=lambda one: {k: v for k, v in one.items() if k not in drop})


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_on_another_device_gives_the_same(verb: str, ran: tuple[Path, list[dict[str, Any]]]) -> None:
    out, said = ran
    assert next(each["convolutions"] for each in said if each.get("verb") == verb) > 0
    here, there = out / "cpu" / verb, out / "far" / verb
    files = [file.relative_to(here) for file in here.rglob("*") if file.suffix in {".json", ".safetensors"}]
    assert files
    for file in files:
        assert read(here / file) == read(there / file), file


def test_an_explainer_is_where_its_performer_is(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    assert ran[1][-2] == {"explainer": "far:0"}


def test_the_other_device_refuses_what_a_gpu_would(ran: tuple[Path, list[dict[str, Any]]]) -> None:
    assert ran[1][-1]["refused"] == ["RuntimeError", "RuntimeError"]


@pytest.mark.parametrize("verb", [evaluate, parts, explain], ids=lambda verb: verb.__name__)
def test_verbs_of_one_process_refuse_several(verb: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="workers"):
        verb(tmp_path, tmp_path, compute=Compute(workers=2))
