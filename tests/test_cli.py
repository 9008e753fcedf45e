from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from partlens.cli import COMMANDS, main
from partlens.data.flowers import generated_flowers
from partlens_papers.networks.paper_networks import PaperNet


def test_help_answers_at_once_and_without_torch() -> None:
    code = "import sys; from partlens.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    best = 9.0
    for _ in range(3):
        started = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        best = min(best, time.monotonic() - started)
    assert best < 1
    assert "fit-explainer" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_parameter_of_a_verb_is_an_option_with_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    module, _, name = COMMANDS[command].function.partition(":")
    function = getattr(importlib.import_module(module), name)
    assert f"partlens {command}" in shown
    assert "%%" not in shown
    for parameter in inspect.signature(function).parameters:
        # A function cannot be typed in a shell.
        if parameter in ("progress", "places_of") or parameter in COMMANDS[command].settings:
            continue
        (text,) = re.findall(rf"^  (?:--)?{parameter.replace('_', '-')}\b(?: [^\n]*)?\n? +(\S.*)$", shown, re.MULTILINE)
        assert text.strip(), parameter


def test_where_to_compute_is_typed_by_its_own_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from partlens.verbs import select_features as module

    given: list[dict] = []
    real = module.select_features

    @functools.wraps(real)
    def noted(*_: object, **options: object) -> str:
        given.append(options)
        return ""

    monkeypatch.setattr(module, "select_features", noted)
    monkeypatch.setattr("partlens.verbs.printed.print_path", lambda _: None)
    words = ["select-features", "torchvision:resnet18", "photos", "--out", "run"]
    assert main(words) == 0
    assert main([*words, "--workers", "3", "--device", "cuda:1", "--descriptor.precision", "float32"]) == 0
    assert [each["compute"] for each in given] == [{}, {"device": "cuda:1", "workers": 3}]
    assert [each["descriptor"] for each in given] == [{}, {"precision": "float32"}]


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["explian"]) == 2
    assert "did you mean" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["layers"])
    assert stopped.value.code == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize("option", ["--photos", "--photos=3", "--parts_max"])
def test_an_option_without_its_group_is_told_the_whole_name(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", "net", "photos", "--out", "run", option])
    assert stopped.value.code == 2
    known = option.split("=", maxsplit=1)[0]
    whole = known.replace("--", "--inspect.")
    assert f"unknown option {known}; did you mean {whole}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("inspect net photos --out run --inspect.views x", "Expected views to be a valid integer, got 'x'."),
        (
            "inspect net photos --out run --inspect.fill none",
            "Expected fill to be 'auto', 'zero' or 'mean', got 'none'.",
        ),
        ("select-features net photos --out run --descriptor.layers conv1", "a list of layer names, got 'conv1'."),
    ],
)
def test_a_wrong_value_of_a_field_is_one_sentence(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_our_errors_exit_with_1_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "torchvision:resnet19"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("partlens: Expected")
    assert shown.count("\n") == 1
    assert "resnet18" in shown
    with pytest.raises(ValueError, match="resnet19"):
        main(["--debug", "layers", "torchvision:resnet19"])


def test_layers_lists_shapes_and_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "torchvision:squeezenet1_1@random:0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(layer["is_default"] for layer in found) == 1
    assert found[0]["shape"] == [64, 111, 111]
    assert main(["layers", "torchvision:squeezenet1_1@random:0"]) == 0
    assert "features.11" in capsys.readouterr().out


def test_a_missing_weights_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = PaperNet("vgg-f", num_classes=3).state_dict()
    del state["conv3.weight"]
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    assert main(["layers", f"partlens_papers.performers:vgg_f@{tmp_path / 'w.safetensors'}"]) == 1
    assert "conv3.weight" in capsys.readouterr().err


def write_flowers(folder: Path) -> None:
    flowers = generated_flowers(40, seed=1, size=64, categories=("petal-red", "petal-blue"))
    for index in range(len(flowers)):
        place = folder / flowers.splits[index] / flowers.categories[index]
        place.mkdir(parents=True, exist_ok=True)
        flowers.read(index).save(place / f"{index}.png")


def test_the_whole_way_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photos in a folder, a torchvision network with random weights in a file, every verb."""
    write_flowers(tmp_path / "photos")
    torch.manual_seed(0)
    import torchvision

    weights = torchvision.models.squeezenet1_1(weights=None).state_dict()
    header = {"input": "RGB, 0-1, mean 0.5 0.5 0.5, std 0.25 0.25 0.25, 64x64"}
    save_file(weights, tmp_path / "w.safetensors", metadata=header)
    run = tmp_path / "run"
    fit = [
        "fit-explainer",
        f"torchvision:squeezenet1_1@{tmp_path / 'w.safetensors'}",
        str(tmp_path / "photos"),
        "--category=petal-red",
        "--tap=features.5",
        f"--out={run}",
        "--seeds=1",
        "--explainer.epochs=1",
        "--explainer.warmup_epochs=1",
        "--explainer.views=2",
        "--explainer.batch_size=8",
    ]
    assert main(fit) == 0
    assert json.loads((run / "run.json").read_text())["config"]["epochs"] == 1
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["schema"] == "partlens.evaluation/3"
    assert main(["evaluate", str(run), str(tmp_path / "photos")]) == 0
    assert "instability" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_the_help_of_a_field_says_its_range_and_its_default_in_each_preset(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit-explainer", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: centroid; paper: largest)" in text
    assert "(at least 1; default: 4; paper: 2)" in text
    assert "(above 0; default: 0.02; paper: 0.003)" in text


@pytest.mark.parametrize(
    ("arguments", "preset", "changes"),
    [
        ([], "partlens", {}),
        (["--preset", "paper"], "paper", {}),
        (["--preset", "paper", "--explainer.eta", "1.5e5"], "paper", {"eta": 1.5e5}),
        (["--config", "CONFIG"], "paper", {"epochs": 7}),
        (["--config", "CONFIG", "--explainer.eta", "3"], "paper", {"epochs": 7, "eta": 3.0}),
    ],
)
def test_only_what_the_user_gave_reaches_the_verb(
    arguments: list[str], preset: str, changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preset and changes are merged once, in the verb; the command line adds nothing of its own."""
    from partlens.verbs import fit_explainer as verb

    given: dict[str, object] = {}

    def fit(**values: object) -> object:
        given.update(values)
        return type("Fitted", (), {"path": tmp_path})()

    fit.__signature__ = inspect.signature(verb.fit_explainer)  # type: ignore[attr-defined]
    fit.__doc__, fit.__module__ = verb.fit_explainer.__doc__, verb.__name__
    monkeypatch.setattr(verb, "fit_explainer", fit)
    (tmp_path / "options.yaml").write_text("preset: paper\nseeds: 2\nexplainer:\n  epochs: 7\n")
    named = [str(tmp_path / "options.yaml") if a == "CONFIG" else a for a in arguments]
    assert main(["fit-explainer", "torchvision:resnet18", "photos", "--out", "x", "--category", "a", "b", *named]) == 0
    assert given["preset"] == preset
    assert given["config"] == changes
    assert given["category"] == ["a", "b"]
    assert given["seeds"] == (2 if "CONFIG" in arguments else 1)
    assert given["keep_cache"] is False


def in_console(encoding: str, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line as a console or pipe of another encoding would."""
    code = "import sys; from partlens.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=environment, check=False)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "cp437", "cp932"])
def test_a_console_that_lacks_a_sign_ends_no_command(encoding: str, tmp_path: Path) -> None:
    for name in ("Käfer", "猫"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    done = in_console(encoding, "data", "check", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, b"")
    done = in_console(encoding, "data", "check", str(tmp_path), "--json")
    assert list(json.loads(done.stdout.decode(encoding))["categories"]) == ["Käfer", "猫"]
    failed = in_console(encoding, "data", "check", str(tmp_path / "→"))
    assert failed.returncode == 1
    assert failed.stderr.decode(encoding).startswith("partlens: Expected an image folder")


def test_signs_that_a_console_lacks_have_a_like(capsys: pytest.CaptureFixture[str]) -> None:
    done = in_console("cp1252", "layers", "partlens:flower-demo@random:0")
    assert done.returncode == 0
    assert "-> is the layer that fit-explainer taps" in done.stdout.decode("cp1252")


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_photos_whose_names_are_not_utf_8_go_through_a_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d\udce9"
    for number, name in enumerate(("cat", "d\udcf6g")):
        (data / name).mkdir(parents=True)
        for index in range(8):
            pixels = np.random.default_rng(9 * number + index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / name / f"caf\udce9{index}.png")
    for arguments in (["data", "check", str(data)], ["data", "check", str(data), "--json"]):
        assert main(arguments) == 0
    select = ["select-features", "partlens:flower-demo@random:0", str(data)]
    assert main([*select, "--out", str(tmp_path / "out\udce9")]) == 1
    assert "its name is not in UTF-8. Choose another folder" in capsys.readouterr().err
    assert main([*select, "--out", str(tmp_path / "out")]) == 0
    assert main(["explain", str(tmp_path / "out"), str(data / "cat")]) == 0
    assert main(["report", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError(), "Could not go on: not enough memory. Close other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "not enough memory"),
        (OSError(36, "File name too long", "runs/x"), "Could not go on with runs/x: file name too long. What is done"),
        (OSError(5, "Input/output error"), "Could not go on: input/output error"),
        (PermissionError(13, "Permission denied", "photos/a.png"), "with photos/a.png: permission denied"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: Exception, said: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr("partlens.page.page.write_report", refuse)
    assert main(["report", "run"]) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1
    with pytest.raises(type(raised)):
        main(["--debug", "report", "run"])


def test_an_error_of_the_program_itself_is_no_fault_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("partlens.page.page.write_report", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["report", "run"])


def test_a_folder_whose_name_is_too_long_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_flowers(tmp_path / "photos")
    model = "partlens:flower-demo@random:0"
    code = main(["select-features", model, str(tmp_path / "photos"), "--out", str(tmp_path / ("n" * 300))])
    assert code == 1
    assert "ile name too long" in capsys.readouterr().err


def test_ctrl_c_while_the_program_starts_is_one_line() -> None:
    code = """
import builtins, sys
real = builtins.__import__
def stopped(name, *rest, **named):
    if name == "argparse":
        raise KeyboardInterrupt
    return real(name, *rest, **named)
from partlens.__main__ import start
builtins.__import__ = stopped
start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "partlens: stopped\n")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep what is freed")
def test_the_program_and_its_workers_keep_freed_memory_for_the_next_batch() -> None:
    count = """
import resource
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    b"x" * (40 << 20)
known = faults()
for _ in range(10):
    b"x" * (40 << 20)
print(faults() - known)
"""
    keep = "from partlens.__main__ import keep_freed_memory\nkeep_freed_memory()\n"
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {count!r}], check=True)"

    def counted(program: str) -> int:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        return int(done.stdout)

    usual = counted(count)
    assert counted(keep + count) < usual / 4
    assert counted(keep + child) < usual / 4
