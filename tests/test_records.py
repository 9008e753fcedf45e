from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Self

import pytest
import torch
from pydantic import model_validator

from partlens.errors import AtWorkError, InputError, RunError, StorageError, expected
from partlens.records import (
    Record,
    Settings,
    content_hash,
    file_sha256,
    read_json,
    read_tensors,
    sole_writer,
    write_atomically,
    write_json,
    write_tensors,
)


class Kept(Record):
    """A made-up file."""

    FILE = "kept.json"
    SCHEMA = "kept/1"
    AGAIN = "Keep again"

    count: int = 0
    share: float = 0.0

    @model_validator(mode="after")
    def _few(self) -> Self:
        if self.count == 7:
            raise InputError(expected("fewer", 7, "Count again"))
        return self


class Sealed(Kept):
    SEALED = True


class Shared(Settings):
    share: float = 0.5


def test_json_round_trip_and_undefined_numbers(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"x": float("nan"), "y": (1, 2), "p": tmp_path, "t": "ü"})
    assert read_json(tmp_path / "deep" / "a.json") == {"x": None, "y": [1, 2], "p": str(tmp_path), "t": "ü"}


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json(target, {"old": 1})

    def full(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"Could not write .*a.json: no space left on device\. Free space"):
        write_atomically(target, full)
    assert read_json(target) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def stopped(_: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a.json", stopped)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_round_trip_with_shared_storage(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    write_tensors(tmp_path / "t.safetensors", {"a": base, "b": base[2:], "c": base.reshape(2, 3).t()})
    back = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(back["b"], base[2:])
    assert torch.equal(back["c"], base.reshape(2, 3).t())


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "l.json").write_text("[]")
    (tmp_path / "t.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"JSON in .*a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="a JSON object in .*, got list"):
        read_json(tmp_path / "l.json")
    with pytest.raises(ValueError, match="nothing there"):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match=r"safetensors in .*t\.safetensors"):
        read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="nothing there"):
        read_tensors(tmp_path / "none.safetensors")


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_sha256(tmp_path / "x").startswith("ba7816bf")
    assert content_hash({"a": {"c": 1, "b": 2}}) == content_hash({"a": {"b": 2, "c": 1}})
    assert content_hash({"a": 1}) != content_hash({"a": 2})


HOLDS = """
import pathlib, sys
from partlens.records import sole_writer
with sole_writer(pathlib.Path(sys.argv[1]), "run"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_folder_has_one_writer_at_a_time_and_a_killed_one_blocks_nobody(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(AtWorkError, match="run is locked by another process. Wait for it or use another folder."),
            sole_writer(tmp_path / "run", "run"),
        ):
            pass
        with sole_writer(tmp_path / "run", "selection"):  # another thing in the same folder
            pass
        other.kill()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".run.lock"]
    with sole_writer(tmp_path / "run", "run"):
        assert (tmp_path / "run" / ".run.lock").exists()
        with pytest.raises(AtWorkError), sole_writer(tmp_path / "run", "run"):  # as from another thread
            pass
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Could not write in"), sole_writer(tmp_path / "file" / "below"):
        pass


def test_without_file_locks_the_work_goes_on_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object, **__: object) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr("filelock.FileLock.acquire", unsupported)
    with pytest.warns(UserWarning, match="no file locks in .*run"), sole_writer(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_tensors_on_a_full_disk_are_one_sentence(tmp_path: Path) -> None:
    """The library that writes them has errors of its own; a limit on file sizes stands for the full disk."""
    write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(3)})
    code = f"""
import resource, signal, sys
from pathlib import Path
import torch
from partlens.records import write_tensors
from partlens.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_tensors(Path({str(tmp_path)!r}) / "t.safetensors", {{"a": torch.ones(100000)}})
except StorageError as error:
    print("StorageError", error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.startswith("StorageError Could not write")
    assert torch.equal(read_tensors(tmp_path / "t.safetensors")["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_the_users_umask_decides_who_may_read_a_file(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {})
        write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)})
        Kept(count=1).write(tmp_path)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {mode}


@pytest.mark.parametrize(
    "content",
    ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": ' + "9" * 30 + "}", "", "\0" * 9, "[1]"],
    ids=["lists", "objects", "5000 digits", "30 digits", "empty", "zeros", "a list"],
)
def test_whatever_a_file_holds_is_one_sentence_that_names_it(tmp_path: Path, content: str) -> None:
    (tmp_path / "kept.json").write_text(content)
    for read in (read_json, lambda path: Kept.read(path.parent)):
        with pytest.raises(RunError, match=r"kept\.json.*again\.$") as caught:
            read(tmp_path / "kept.json")
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("depth", [150, 400, 900])
def test_a_value_that_is_nested_deeply_is_refused_by_field_or_file(tmp_path: Path, depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    (tmp_path / "kept.json").write_text(f'{{"schema": "kept/1", "count": {nested}}}')
    with pytest.raises(RunError, match=r"in .*kept\.json"):
        Kept.read(tmp_path)


def test_a_rule_over_several_fields_is_said_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text('{"schema": "kept/1", "count": 7}')
    with pytest.raises(RunError, match=r"kept\.json: Expected fewer, got 7\. Count again\. Keep again\.$"):
        Kept.read(tmp_path)
    with pytest.raises(InputError, match=r"^Expected fewer, got 7\. Count again\.$"):
        Kept(count=7)


def test_a_folder_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    for name in ("kept.json", "t.safetensors"):
        (tmp_path / name).mkdir()
    with pytest.raises(RunError, match=r"Could not read .*kept\.json"):
        Kept.read(tmp_path)
    with pytest.raises(RunError, match=r"t\.safetensors"):
        read_tensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ({"a": torch.zeros(3)}, r"a in .*t\.safetensors to be float32 \(2,\), got float32 \(3,\)\. Fit again"),
        ({"a": torch.zeros(2, dtype=torch.int8)}, r"to be float32 \(2,\), got int8 \(2,\)"),
        ({"b": torch.zeros(1)}, r"a in .* to be float32 \(2,\), got nothing"),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, r"b in .* to be nothing, got float32"),
        ({"a": torch.tensor([1.0, float("nan")])}, "finite numbers in a of .*, got NaN or infinite ones"),
        ({"a": torch.tensor([1.0, float("inf")])}, "finite numbers in a of"),
    ],
)
def test_tensors_of_other_names_kinds_shapes_or_without_numbers_are_refused(
    tmp_path: Path, written: dict[str, torch.Tensor], text: str
) -> None:
    write_tensors(tmp_path / "t.safetensors", written)
    read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(RunError, match=text):
        read_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(2)}, remedy="Fit again")


def test_tensors_of_another_hash_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.zeros(2)})
    kept = file_sha256(path)
    assert read_tensors(path, {"a": torch.ones(2)}, sha256=kept)["a"].tolist() == [0, 0]
    write_tensors(path, {"a": torch.ones(2)})
    with pytest.raises(RunError, match=r"the tensors that this run wrote in .*t\.safetensors, got others"):
        read_tensors(path, sha256=kept)


def test_a_sealed_file_is_as_it_was_written_or_refused(tmp_path: Path) -> None:
    Sealed(count=1, share=0.1).write(tmp_path)
    assert Sealed.read(tmp_path) == Sealed(count=1, share=0.1)
    whole = (tmp_path / "kept.json").read_text()
    for changed in (whole.replace(": 1,", ": 2,"), whole.replace("0.1", "0.2"), '{"schema": "kept/1", "count": 1}'):
        (tmp_path / "kept.json").write_text(changed)
        with pytest.raises(RunError, match=r"kept\.json as it was written, got a file that was changed\. Keep again"):
            Sealed.read(tmp_path)


class Silent:
    def __repr__(self) -> str:
        raise RuntimeError("nothing to show")


@pytest.mark.parametrize(
    "wrong",
    [10**400, -(10**5000), 2**63, float("nan"), Silent(), [[]] * 9, None],
    ids=["400 digits", "5000 digits", "2**63", "nan", "silent", "lists", "none"],
)
def test_settings_refuse_a_value_that_no_number_type_holds_or_that_cannot_be_shown(wrong: object) -> None:
    with pytest.raises(InputError, match="Expected count to be .*, got .*Correct count"):
        Kept(count=wrong)


def test_settings_are_finite() -> None:
    for wrong in (float("inf"), -float("inf"), float("nan"), 10**400):
        with pytest.raises(InputError, match="Expected share to be"):
            Shared(share=wrong)
