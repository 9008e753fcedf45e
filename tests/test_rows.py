"""Rows on disk: filled in batches, gone on with after a kill, and refused when they were deleted, cut or are others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from partlens.errors import AtWorkError, InputError, RunError, StorageError
from partlens.rows import RowRecord, row_store

WHAT = {"network": "abc", "layers": ("a", "b")}


def fill(folder: Path | None, upto: int = 10, rows: int = 10, **changes: object) -> dict[str, np.ndarray]:
    """Rows of two kinds, two at a time: maps of float16 and a number each."""
    with row_store(folder, {**WHAT, **changes}, rows) as store:
        while store.done < upto:
            first = store.done
            maps = (np.arange(first, first + 2)[:, None, None] + np.zeros((2, 3, 4))).astype(np.float16)
            store.append({"0-a b": maps, "id": np.arange(first, first + 2)}, {"last": first + 1})
        assert store.state == {"last": store.done - 1}
        return {name: store.read(name) for name in ("0-a b", "id")}


@pytest.mark.parametrize("stop", [2, 6, 10])
def test_rows_go_on_where_they_stopped(tmp_path: Path, stop: int) -> None:
    fill(tmp_path, stop)
    assert RowRecord.read(tmp_path).rows_done == stop
    found = fill(tmp_path)
    assert found["id"].tolist() == list(range(10))
    assert found["0-a b"].dtype == np.float16
    assert (found["0-a b"] == np.arange(10)[:, None, None]).all()
    assert {path.name for path in tmp_path.iterdir()} == {"0-a_b.npy", "id.npy", "rows.json", "state-10.npz"}
    for name, array in fill(tmp_path).items():
        assert np.array_equal(array, found[name])
        assert not array.flags.writeable
    assert np.array_equal(np.load(tmp_path / "id.npy"), found["id"])  # a plain file, for any reader


def test_in_memory_the_same_rows(tmp_path: Path) -> None:
    for name, array in fill(None).items():
        assert np.array_equal(array, fill(tmp_path)[name])


def test_what_a_killed_write_left_is_dropped(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    with (tmp_path / "id.npy").open("ab") as file:
        file.write(b"half a row and more")
    assert fill(tmp_path)["id"].tolist() == list(range(10))


def test_rows_before_an_exception_are_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), row_store(tmp_path, WHAT, 3) as store:
        store.append({"x": np.zeros(1)})
        store.append({"x": np.ones(1)})  # too soon after the first for a record of its own
        raise KeyboardInterrupt
    with row_store(tmp_path, WHAT, 3) as store:
        assert store.done == 2
        assert store.read("x").tolist() == [0, 1]


@pytest.mark.parametrize("stop", [4, 10])
@pytest.mark.parametrize("harm", ["deleted", "cut", "zeroed", "numbers zeroed", "another shape"])
def test_damaged_rows_are_never_taken_for_zeros(tmp_path: Path, stop: int, harm: str) -> None:
    fill(tmp_path, stop)
    path = tmp_path / "0-a_b.npy"
    if harm == "deleted":
        path.unlink()
    elif harm == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif harm == "numbers zeroed":
        whole = path.read_bytes()
        path.write_bytes(whole[:128] + bytes(len(whole) - 128))
    elif harm == "zeroed":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        np.save(path, np.zeros((10, 4, 3), np.float16))
    with pytest.raises(RunError, match=r"0-a_b\.npy.*Delete its folder and run the command again"):
        fill(tmp_path)


def test_the_refusal_names_what_differs(tmp_path: Path) -> None:
    fill(tmp_path)
    before = (tmp_path / "rows.json").read_bytes()
    with pytest.raises(RunError, match=r"another network \(network: 'abc' instead of 'xyz'\)"):
        fill(tmp_path, network="xyz")
    with pytest.raises(RunError, match=r"another seed \(seed: None instead of 3\)"):
        fill(tmp_path, seed=3)
    with pytest.raises(RunError, match=r"another rows \(rows: 10 instead of 12\)"):
        fill(tmp_path, rows=12)
    assert (tmp_path / "rows.json").read_bytes() == before


def test_wrong_rows_are_refused_and_leave_the_store_whole(tmp_path: Path) -> None:
    with row_store(tmp_path, WHAT, 3) as store:
        store.append({"x": np.zeros((2, 2))})
        for wrong in ({"x": np.zeros((1, 3))}, {"x": np.zeros((1, 2), int)}, {"y": np.zeros((1, 2))}):
            with pytest.raises(RunError, match="the same arrays each time"):
                store.append(wrong)
        with pytest.raises(RunError, match="at most 3 rows, got 4"):
            store.append({"x": np.zeros((2, 2))})
        assert store.done == 2
    with pytest.raises(RunError, match="the same arrays"), row_store(None, WHAT, 3) as store:
        store.append({"x": np.zeros(2), "y": np.zeros(1)})


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with row_store(tmp_path, WHAT, 1), pytest.raises(AtWorkError), row_store(tmp_path, WHAT, 1):
        pass


def test_a_failed_write_is_one_sentence_and_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 4)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("partlens.rows.os.fsync", full)
    with pytest.raises(StorageError, match="Could not write rows in .*: no space left on device. Free space"):
        fill(tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / RowRecord.FILE).read_text())["rows_done"] == 4
    assert fill(tmp_path)["id"].tolist() == list(range(10))


def test_an_empty_row_is_a_row(tmp_path: Path) -> None:
    with row_store(tmp_path, {}, 2) as store:
        store.append({"nothing": np.zeros((2, 0))})
    with row_store(tmp_path, {}, 2) as store:
        assert store.read("nothing").shape == (2, 0)


def test_a_link_among_the_rows_is_not_written_through(tmp_path: Path) -> None:
    mine = tmp_path / "thesis.npy"
    mine.write_text("mine")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "id.npy").symlink_to(mine)
    fill(tmp_path / "cache", 4)
    (tmp_path / "cache" / "id.npy").rename(mine.with_name("moved.npy"))
    (tmp_path / "cache" / "id.npy").symlink_to(mine.with_name("moved.npy"))
    with pytest.raises(RunError, match=r"id\.npy, got a link"):
        fill(tmp_path / "cache")
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("kind", ["|O", "<U5", "nonsense", "<f", ""])
def test_rows_of_objects_or_of_no_kind_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="arrays"):
        RowRecord(identity={}, rows=1, rows_done=0, arrays={"a": (kind, (2,))}, checksums={}, state={})
