"""The papers' pages are true: links resolve, commands are commands with options that exist, tables are the results'."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from partlens.explainer.config import ExplainerConfig
from partlens.object_parts.inspection import FindingConfig
from partlens.records import read_json
from partlens_papers.cli import COMMANDS, main
from partlens_papers.flowers.benchmark import FlowersConfig
from partlens_papers.removal.plan import RemovalConfig
from partlens_papers.sanity.bench import SanityConfig

PAPERS = Path(__file__).parents[1]
PAGES = [PAPERS / "README.md", *(PAPERS / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_pages_stay_short_and_results_small() -> None:
    lines = [line for page in (PAPERS / "docs").glob("*.md") for line in page.read_text().splitlines()]
    assert (
        sum(len(line.split()) for line in lines if not line.startswith("|")) <= 5_600
    )  # tables are looked up, not read
    assert all(path.stat().st_size <= 300_000 for path in (PAPERS / "results").rglob("*") if path.is_file())


@pytest.mark.parametrize("study", sorted((PAPERS / "studies").glob("*.py")), ids=lambda p: p.stem)
def test_studies_still_find_what_they_use(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(study.parent))
    runpy.run_path(str(study))


def _commands_of(page: str) -> list[list[str]]:
    return _words((PAPERS / "docs" / page).read_text())


def _commands() -> list[list[str]]:
    return _words("\n".join(page.read_text() for page in PAGES))


def _words(texts: str) -> list[list[str]]:
    found = re.findall(r"^partlens-papers ([^`\n]+)$", texts, re.MULTILINE)
    found += re.findall(r"`partlens-papers ([^`\n]+)`", texts)
    return [shlex.split(text) for text in found]


def _help(name: str, shown: dict[str, str], capsys: pytest.CaptureFixture[str]) -> str:
    if name not in shown:
        with pytest.raises(SystemExit):
            main([*name.split(), "--help"])
        shown[name] = capsys.readouterr().out
    return shown[name]


def test_commands_on_the_pages_exist_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, str] = {}
    for words in _commands():
        if words in (["--help"], ["reproduce", "…"]):
            continue
        name = next((" ".join(words[:n]) for n in (2, 1) if " ".join(words[:n]) in COMMANDS), "")
        assert name, words
        for word in words:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word)}\b", _help(name, shown, capsys)), (name, word)


def test_a_study_asked_for_help_does_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    study = str(PAPERS / "studies" / "relevant_filters.py")
    monkeypatch.setattr("sys.argv", [study, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(study, run_name="__main__")
    assert ended.value.code == 0


def _given(words: list[str], group: str) -> dict[str, Any]:
    """Return the settings of a group that a command gives."""
    pairs = pairwise(words)
    given = {word.partition(".")[2]: value for word, value in pairs if word.startswith(f"--{group}.")}
    return {name: json.loads(value) if value[0] in "[0123456789" else value for name, value in given.items()}


def test_commands_beside_results_make_these_results() -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for words in _commands_of("interpretation.md"):
        found.setdefault(words[1], []).append(_given(words, words[1]))
    for name, file, config in (
        ("sanity", "sanity-flowers", SanityConfig),
        ("removal", "removal-resnet18", RemovalConfig),
    ):
        made = read_json(PAPERS / "results" / f"{file}.json")["config"]
        given, wanted = (config.model_validate_json(json.dumps(one)) for one in (*found[name], made))
        assert given == wanted, name
    recipes = [FlowersConfig(**given) for given in found["flowers"]]
    for name in ("flowers-single-6c", "flowers-double-12c"):
        made = read_json(PAPERS / "results" / f"{name}.json")["recipe"]
        assert (name, made["images_per_class"]) in [(one.set_name, one.images_per_class) for one in recipes], name


def test_the_page_says_how_far_kept_maps_are_off() -> None:
    page = (PAPERS / "docs" / "reproduction.md").read_text()
    for network, of in read_json(PAPERS / "results" / "reproduction" / "kept.json").items():
        error, equal = of["relative_error"], of["peaks_equal"]
        assert f"{error['value']:.1g}, {100 * equal['value']:.1f} %" in page, network
        assert f"n {error['n']}" in page


def test_ideas_with_a_field_have_it() -> None:
    text = (PAPERS / "docs" / "study.md").read_text()
    table = text.split("| idea | field |")[1].split("\n\n")[0]
    fields = re.findall(r"^\|[^|]*\| `([a-z_]+)`", table, re.MULTILINE)
    assert len(fields) > 5
    assert set(fields) <= {*ExplainerConfig.model_fields, *FindingConfig.model_fields}


def test_tables_on_the_pages_are_of_the_committed_results() -> None:
    filled = runpy.run_path(str(PAPERS / "studies" / "tables.py"))["filled"]
    for page in (PAPERS / "docs").glob("*.md"):
        assert filled(page.read_text()) == page.read_text(), page.name
