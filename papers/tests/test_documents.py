"""The papers' pages are true: links resolve, commands are commands with options that exist, tables are the results'."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from partlens_papers.cli import COMMANDS, main

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


def _commands() -> list[list[str]]:
    texts = "\n".join(page.read_text() for page in PAGES)
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


def test_tables_on_the_pages_are_of_the_committed_results() -> None:
    filled = runpy.run_path(str(PAPERS / "studies" / "tables.py"))["filled"]
    for page in (PAPERS / "docs").glob("*.md"):
        assert filled(page.read_text()) == page.read_text(), page.name
