"""README and docs are true: links resolve, commands parse, the code and the example run, what is named exists."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import partlens
from partlens.cli import COMMANDS, Command, _named, _plan
from partlens.explainer.config import ExplainerConfig
from partlens.network.performer import Performer
from partlens_papers.cli import COMMANDS as PAPERS

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "papers/README.md", *ROOT.glob("papers/docs/*.md")]
PROGRAMS = {"partlens": COMMANDS, "partlens-papers": PAPERS}


def commands() -> list[str]:
    """Return the command lines in the fenced blocks of all pages, and those inside sentences that are whole."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
        found += re.findall(r"^(?:uv run )?(partlens(?:-papers)? .+)$", blocks, re.MULTILINE)
        inside = re.findall(
            r"`(partlens(?:-papers)? [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        )
        found += [line for line in inside if "…" not in line]
    return list(dict.fromkeys(found))


def parse(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    known: dict[str, Command] = PROGRAMS[program]
    if words == ["--help"]:
        return
    name, rest = _named(words, known)
    assert name in known, line
    if rest:  # a verb alone is its name in a sentence
        _plan(program, name, known[name]).parser.parse_args(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("line", commands())
def test_commands_parse(line: str) -> None:
    parse(line)


def test_a_command_with_a_wrong_option_does_not_parse() -> None:
    assert "uv run partlens demo" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(commands()) > 30
    with pytest.raises(argparse.ArgumentError, match="unrecognized arguments: --wrong"):
        parse("partlens layers torchvision:resnet18 --wrong 1")
    with pytest.raises(AssertionError):
        parse("partlens lairs torchvision:resnet18")


def test_the_options_file_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "how-to.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
    plan = _plan("partlens", "fit-explainer", COMMANDS["fit-explainer"])
    options = plan.parser.parse_args(["MODEL", "photos", "--out", "run", "--config", str(tmp_path / "options.yaml")])
    assert (options.preset, options.explainer.eta) == ("paper", 1e6)


def test_readme_code_runs(
    tiny: Performer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    preprocessing = tiny.preprocessing.changed({"size_px": (64, 64)})
    small = replace(tiny, preprocessing=preprocessing)
    monkeypatch.setattr(
        "partlens.network.zoo.load_performer", lambda name: replace(small, loaded_as=(name, preprocessing))
    )
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for text, shorter in (
        ("generated_flowers(300)", "generated_flowers(60, size=64, categories=('petal-red', 'petal-blue'))"),
        (
            "seeds=1)",
            'seeds=1, config={"epochs": 1, "warmup_epochs": 1, "views": 2, "batch_size": 8, "precision": "float32"})',
        ),
        ('evaluate("runs/red", photos)', 'evaluate("runs/red", photos, gallery="none", rounds=5)'),
    ):
        assert code.count(text) == 1, text
        code = code.replace(text, shorter)
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert shown.count("Estimate(value=") == 2
    assert (tmp_path / "runs" / "red" / "report.html").exists()


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partlens, "evaluate", partial(partlens.evaluate, gallery="none", rounds=5))
    example = runpy.run_path(str(ROOT / "examples" / "own_network.py"))
    small = {"epochs": 1, "warmup_epochs": 1, "views": 2, "batch_size": 8, "precision": "float32"}
    scores = example["main"](tmp_path / "run", flowers=40, side_px=64, passes=1, **small)
    assert set(scores) == {"instability", "consistency"}


def test_every_field_of_the_configuration_is_documented() -> None:
    for name in ExplainerConfig.model_fields:
        assert re.search(rf"^        {name}: ", ExplainerConfig.__doc__ or "", re.MULTILINE), name


def test_what_the_method_page_names_exists() -> None:
    tests: dict[str, str] = {}
    for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "papers" / "tests").rglob("test_*.py")]:
        tests[path.stem] = tests.get(path.stem, "") + path.read_text(encoding="utf-8")
    rows = [line for line in (ROOT / "docs" / "method.md").read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    named = [name for row in rows for name in re.findall(r"`([\w.:]+)`", row)]
    functions = [name for name in named if re.fullmatch(r"[a-z_]+(\.\w+)+", name)]
    for name in functions:
        path = name if name.startswith("partlens_papers.") else f"partlens.{name}"
        module = re.match(r"[a-z_0-9.]*[a-z_0-9](?=\.)", path)  # methods follow a class, whose name has a capital
        assert module is not None, name
        found: object = importlib.import_module(module[0])
        for piece in path[len(module[0]) + 1 :].split("."):
            found = getattr(found, piece)
        assert callable(found), name
    checks = [name for name in named if name.startswith("test_")]
    for name in checks:
        file, _, test = name.partition("::")
        assert file in tests, name
        assert f"def {test}(" in tests[file] or not test, name
    assert min(len(functions), len(checks)) > 50


def test_pages_stay_short() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in pages) <= 20_000


def test_the_architecture_page_names_every_file() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "partlens"
    there = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if path.name != "__init__.py"}
    rooms = re.findall(r"^### `(\w+)/`\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    named = {f"{room}/{file}" for room, part in rooms for file in re.findall(r"^\| `(\w+\.py)` \|", part, re.MULTILINE)}
    ground = re.findall(r"^### Files above and below the rooms\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    named |= {file for part in ground for file in re.findall(r"^\| `(\w+\.py)` \|", part, re.MULTILINE)}
    assert named == there
