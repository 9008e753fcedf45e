"""README and docs are true: links resolve, the code runs, the documented schema is the schema."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from partlens.cli import COMMANDS
from partlens.explainer import config
from partlens.metrics.scores import SCORES

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"epochs": 1, "warmup_epochs": 1, "views": 2, "batch_size": 8}
    monkeypatch.setattr(config, "PARTLENS_CHANGES", config.PARTLENS_CHANGES | small)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "generated_flowers(300)" in code
    exec(compile(code.replace("generated_flowers(300)", "generated_flowers(110)"), "README.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "'value'" in shown
    assert (tmp_path / "runs" / "red" / "report.html").exists()


def test_readme_shows_existing_commands_and_the_two_to_start_with() -> None:
    text = (ROOT / "README.md").read_text()
    assert "uv run partlens demo" in text
    assert "uv run pytest" in text
    for command in re.findall(r"^partlens ([a-z-]+)", text, re.MULTILINE):
        assert command in COMMANDS


def test_documented_scores_are_the_scores() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert set(SCORES) <= documented


def test_every_changed_default_is_documented_with_its_field() -> None:
    docstring = config.ExplainerConfig.__doc__ or ""
    for name in config.ExplainerConfig.__dataclass_fields__:
        assert re.search(rf"^        {name}: ", docstring, re.MULTILINE), name


def test_method_page_names_real_functions() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    for module, name in re.findall(r"`(templates|filter_loss|network|localisation|faithfulness)\.(\w+)`", text):
        package = "metrics" if module in {"localisation", "faithfulness"} else "explainer"
        source = (ROOT / "src" / "partlens" / package / f"{module}.py").read_text()
        assert re.search(rf"^(def|class) {name}\b", source, re.MULTILINE), f"{module}.{name}"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr("partlens.verbs.demo.EPOCHS", 1)
    example = runpy.run_path(str(ROOT / "examples" / "own_network.py"))
    scores = example["main"](tmp_path / "run", 80, epochs=1, warmup_epochs=1, views=2, batch_size=8)
    assert set(scores) == {"instability", "consistency"}
