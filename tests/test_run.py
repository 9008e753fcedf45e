"""A run directory: one writer, one identity, refusals that say what differs."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from partlens.errors import AtWorkError, RunError
from partlens.records import Settings, content_hash
from partlens.run import DataInfo, PerformerInfo, Run, RunRecord, UsedPhotos, command, differences, versions


class Made(Settings):
    """What a made-up verb can be told."""

    eta: float = 1e6
    seed: int = 0


class MadeRun(RunRecord):
    """The record of a made-up verb."""

    FILE = "run.json"
    SCHEMA = "made/1"
    AGAIN = "Run make again"
    SETTINGS = ("config", "count")
    RESULTS = ("made.bin", "seeds/*/made.bin")

    config: Made = Made()
    count: int = 2
    result: float | None = None


def asked(**fields: Any) -> MadeRun:
    weights = fields.pop("weights", "ab" * 32)
    info = PerformerInfo(name="net", spec=None, weights_sha256=weights, preprocessing={"size_px": [8, 8]})
    data = DataInfo(name="d", path=None, fingerprint=fields.pop("photos", "f"), categories=("fox",))
    return MadeRun(**{"created": "now", "command": "", "versions": {}, "performer": info, "data": data, **fields})


def test_a_run_is_begun_gone_on_with_and_finished(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.begun(asked()) as record:
        assert record.status == "running"
        with pytest.raises(AtWorkError, match="run is locked by another process. Wait for it"), run.writing():
            pass
    with pytest.raises(RunError, match="Expected a finished run in .*, got running. Run make again with the same"):
        run.read(MadeRun)
    with run.begun(asked(created="later")) as record:
        assert record.created == "now"
        run.finish(record.changed(seconds=5.0), time.monotonic() - 2, result=0.5)
    found = run.read(MadeRun)
    assert (found.status, found.result) == ("finished", 0.5)
    assert 7 <= found.seconds < 8
    with run.writing(), run.begun(asked()) as record:  # a finished run is not held
        assert record == found
    with pytest.raises(RunError, match="Expected run.json in .*none, got nothing there. Run make first"):
        Run(tmp_path / "none").read(MadeRun)
    (tmp_path / "inspect.json").write_text("{}")
    with pytest.raises(RunError, match="Expected run.json in .*, got inspect.json. Run make first"):
        Run(tmp_path).read(MadeRun)


def test_a_refusal_names_the_setting_that_differs(tmp_path: Path) -> None:
    run = Run(tmp_path / "fox")
    with run.begun(asked(config=Made(eta=400.0))) as record:
        assert record.settings()["config.eta"] == 400.0
    text = "fox holds a run with eta = 400, not 7. Choose another --out or delete it."
    with pytest.raises(RunError, match=text), run.begun(asked(config=Made(eta=7.0))):
        pass
    with pytest.raises(RunError, match=r"eta = 400, not 7; seed = 0, not 1 and 1 more"):
        run.earlier(asked(config=Made(eta=7.0, seed=1), count=3, weights="cd" * 32))
    (run.folder / "selection.json").write_text("{}")
    with pytest.raises(RunError, match="or delete run.json in it"):
        run.earlier(asked(count=3))


def test_a_damaged_record_is_refused_with_what_helps_and_a_deleted_one_begun_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "fox")
    with run.begun(asked()):
        (run.folder / "made.bin").write_text("")
    (run.folder / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"Expected JSON in .*run\.json, got .*\. Choose another --out or delete it\.$"):
        run.earlier(asked())
    (run.folder / "run.json").unlink()
    with run.begun(asked()) as record:
        assert record.status == "running"
        assert not (run.folder / "made.bin").exists()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"weights": "cd" * 32}, "weights = abababababab, not cdcdcdcdcdcd"),
        ({"photos": "g"}, "photos = f, not g"),
        ({"count": 3}, "count = 2, not 3"),
        ({"config": Made(eta=1.5)}, "eta = 1e+06, not 1.5"),
    ],
)
def test_every_setting_decides_which_run_it_is(fields: dict[str, Any], text: str) -> None:
    assert differences(asked(), asked(**fields)) == [text]
    assert asked().identity != asked(**fields).identity


def test_times_results_and_names_do_not_decide_which_run_it_is() -> None:
    other = asked(created="then", command="c", versions={"torch": "1"}, seconds=3.0, status="finished", result=1.0)
    assert differences(asked(), other) == []
    assert asked().identity == other.identity == content_hash(asked().settings())


def test_other_folders_are_refused_and_leftovers_removed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="a folder at .*file, got a file"):
        Run(tmp_path / "file").earlier(asked())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("")
    with pytest.raises(RunError, match="a folder with other files"):
        Run(tmp_path / "photos").earlier(asked())
    run = Run(tmp_path / "run")
    (run.folder / "seeds" / "1").mkdir(parents=True)
    for name in (
        f".{'0' * 16}.tmp",
        f"seeds/1/.{'a' * 16}.tmp",
        ".tmpU3TJYG",
        "made.bin",
        "seeds/1/made.bin",
        "selection.json",
    ):
        (run.folder / name).write_text("{}")
    with run.begun(asked()):
        left = sorted(str(p.relative_to(run.folder)) for p in run.folder.rglob("*") if p.is_file())
    assert left == [".writing.lock", "run.json", "selection.json"]


def test_what_another_process_leaves_before_the_lock_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, hold = Run(tmp_path), Run.writing

    def late(self: Run) -> Any:
        asked(count=9).write(self.folder)
        return hold(self)

    monkeypatch.setattr(Run, "writing", late)
    with pytest.raises(RunError, match="count = 9, not 2"), run.begun(asked()):
        pass


def test_photos_of_a_fit_are_known_under_other_names_and_cuts() -> None:
    used = UsedPhotos.of(["9:ab@(0, 0, 5, 5)+0.0", "9:ab@(1, 1, 2, 2)+0.0"])
    assert len(used.photos) == 1
    assert used.count(("9:ab@(1, 2, 3, 4)+0.1", "9:cd@(0, 0, 5, 5)+0.0", "9:ab")) == 2


def test_the_command_is_that_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(Path("bin") / "partlens"), "report", "a b"])
    assert command() == "partlens report 'a b'"
    monkeypatch.setattr(sys, "argv", [str(Path("bin") / "partlens-papers"), "reproduce", "p"])
    assert command() == "partlens-papers reproduce p"
    monkeypatch.setattr(sys, "argv", ["pytest", "report"])
    assert command() == ""
    assert {"partlens", "torch", "python", "platform"} <= set(versions())


@pytest.mark.parametrize("place", ["gallery", "explanations", "seeds/1"])
def test_nothing_is_written_or_deleted_through_a_link_in_a_run(tmp_path: Path, place: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / f".{'0' * 16}.tmp").write_text("mine")
    link = tmp_path / "run" / place
    link.parent.mkdir(parents=True)
    link.symlink_to(mine)
    text = f"a folder at .*{place}, got a link to .*mine. Delete the link"
    with pytest.raises(RunError, match=text), Run(tmp_path / "run").writing():
        pass
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]
    (tmp_path / "elsewhere").symlink_to(tmp_path / "run")
    link.unlink()
    with Run(tmp_path / "elsewhere").writing():  # the run itself may be reached by one
        pass


def test_only_our_own_temporary_files_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".notes.tmp").write_text("mine")
    with Run(tmp_path).writing():
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".notes.tmp"]
