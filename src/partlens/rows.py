"""Rows on disk: named arrays that grow batch by batch, survive a kill, and are read as memory maps.

One folder holds one store: a plain ``NAME.npy`` per array, and ``rows.json``, which says what the rows belong to and
how many are complete. `row_store` fills one, and goes on with it where a killed run stopped.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field

from partlens.errors import RunError, StorageError, expected, failed
from partlens.records import Record, file_sha256, plain, sole_writer, write_atomically

_SETTLE_SECONDS = 15.0
_BLOCK_BYTES = 1 << 24
_STATE = "state-{}.npz"  # by the rows that it belongs to

_Kind = Annotated[str, Field(pattern=r"^[<>|=][biufc]\d+$")]  # plain numbers: no objects, no texts


class RowRecord(Record):
    """What the rows of a folder belong to, how many are complete, kind and shape of a row, the writer's state."""

    FILE: ClassVar[str] = "rows.json"
    SCHEMA: ClassVar[str] = "partlens/rows/2"
    AGAIN: ClassVar[str] = "Delete its folder and run the command again"
    SEALED: ClassVar[bool] = True

    identity: dict[str, Any]
    rows: Annotated[int, Field(ge=0)]
    rows_done: Annotated[int, Field(ge=0)]
    arrays: dict[str, tuple[_Kind, tuple[Annotated[int, Field(ge=0)], ...]]]
    checksums: dict[str, int]  # of the finished rows of each
    state_sha256: str  # of the file of the state; empty where there is none


class _Array:
    """One ``.npy`` file that grows, or an array in memory."""

    # Rows are written, not mapped: mapped pages would count as the process's memory, and a full disk would kill the
    # process instead of raising an error. The header names all rows from the start; the file's size says how many are
    # there, so that a file that was cut or deleted is never taken for one with zeros.

    def __init__(self, folder: Path | None, name: str, rows: int, kind: str, shape: tuple[int, ...]) -> None:
        self.rows, self.kind, self.shape = rows, np.dtype(kind), shape
        self.row_bytes = self.kind.itemsize * math.prod(shape)
        self.path = None if folder is None else folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}.npy"
        self.held = np.zeros((rows if folder is None else 0, *shape), self.kind)
        self.handle: BinaryIO | None = None
        self.offset = 0
        self.checksum = 0

    def create(self) -> None:
        if self.path is not None:
            header = {"descr": self.kind.str, "fortran_order": False, "shape": (self.rows, *self.shape)}
            self.path.unlink(missing_ok=True)  # through a link a file elsewhere would be written over
            with self.path.open("xb") as file:
                np.lib.format.write_array_header_1_0(file, header)
            self.open(0, 0, to_write=True)

    def open(self, done: int, checksum: int, *, to_write: bool) -> None:
        """Check that the finished rows are those that were written, and drop what a killed run left behind them."""
        if self.path is None:
            return
        try:
            with self.path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, kind = np.lib.format.read_array_header_1_0(file)
                self.offset = file.tell()
                size = file.seek(0, 2)
        except FileNotFoundError as error:
            raise self._damaged("no such file") from error
        except OSError as error:
            raise RunError(failed(f"read {self.path}", error, RowRecord.AGAIN)) from error
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        if (shape, kind) != ((self.rows, *self.shape), self.kind):
            raise self._damaged(f"{shape} {kind}")
        if size < self.offset + done * self.row_bytes:
            raise self._damaged(f"{(size - self.offset) // max(self.row_bytes, 1)} rows")
        self.checksum = self._summed(done * self.row_bytes)
        if self.checksum != checksum:
            raise self._damaged("other numbers")
        if to_write:
            if self.path.is_symlink():
                raise self._damaged("a link")
            self.handle = self.path.open("r+b", buffering=0)
            self.handle.truncate(self.offset + done * self.row_bytes)
            self.handle.seek(0, 2)

    def _summed(self, size: int) -> int:
        """Return the checksum of the first bytes of the rows."""
        checksum, left = 0, size
        with cast("Path", self.path).open("rb") as file:
            file.seek(self.offset)
            while left and (block := file.read(min(left, _BLOCK_BYTES))):
                checksum, left = zlib.crc32(block, checksum), left - len(block)
        return checksum

    def _damaged(self, got: str) -> RunError:
        rule = f"the finished rows {RowRecord.FILE} names in {self.path}"
        return RunError(expected(rule, got, RowRecord.AGAIN))

    def write(self, start: int, rows: np.ndarray) -> None:
        if self.handle is None:
            self.held[start : start + len(rows)] = rows
            return
        left = memoryview(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        self.checksum = zlib.crc32(left, self.checksum)
        while left:  # an unbuffered write may take a part only
            left = left[self.handle.write(left) :]

    def read(self, done: int) -> np.ndarray:
        if self.path is None:
            return self.held
        if done == 0 or self.row_bytes == 0:  # an empty file cannot be mapped
            return np.zeros((done, *self.shape), self.kind)
        return np.memmap(self.path, self.kind, "r", self.offset, (done, *self.shape))


class RowStore:
    """Named arrays of one folder, filled row by row: ``done`` of ``rows`` are complete; made by `row_store`."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], rows: int) -> None:
        self.rows, self.done = rows, 0
        self.state: dict[str, np.ndarray] = {}
        self._folder, self._identity = folder, plain(identity)
        self._arrays: dict[str, _Array] = {}
        self._settled = (0, 0.0)  # rows and time

    def append(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, npt.ArrayLike] | None = None) -> None:
        """Add rows: by name arrays with as many rows each, of the same names, kinds and shapes each time.

        ``state``, optional, is what `state` holds from now on, for the run that goes on: numbers and arrays.

        Raises:
            StorageError: no room on the disk, or no permission; the rows of before are complete.
        """
        given = {name: (array.dtype, array.shape[1:]) for name, array in arrays.items()}
        if not self._arrays:
            self._create({name: (kind.str, shape) for name, (kind, shape) in given.items()})
        count, *others = set(map(len, arrays.values()))
        known = self._kinds()
        if others or given != known:
            raise RunError(expected(f"rows of {known}", str(given), "Give the same arrays each time"))
        if self.done + count > self.rows:
            raise RunError(expected(f"at most {self.rows} rows", self.done + count, "Give the right number of rows"))
        with _written(self._folder):
            for name, array in arrays.items():
                self._arrays[name].write(self.done, array)
        self.done += count
        self._remember(self.state if state is None else state)
        if time.monotonic() - self._settled[1] > _SETTLE_SECONDS:
            self._settle()

    def _remember(self, state: Mapping[str, npt.ArrayLike]) -> None:
        self.state = {name: np.asarray(value) for name, value in state.items()}

    def read(self, name: str) -> np.ndarray:
        """Return the complete rows of an array, a read-only memory map where there is a folder."""
        return self._arrays[name].read(self.done)

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays that are there."""
        return tuple(self._arrays)

    def _kinds(self) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        return {name: (each.kind, each.shape) for name, each in self._arrays.items()}

    def _create(self, arrays: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self._arrays = {name: _Array(self._folder, name, self.rows, *each) for name, each in arrays.items()}
        if self._folder is None:
            return
        needed = sum(self.rows * each.row_bytes for each in self._arrays.values())
        if needed > (free := shutil.disk_usage(self._folder).free):
            rule = f"{needed / 1e6:,.1f} MB free for the rows in {self._folder}"
            remedy = "Free space, choose another folder, or fewer images or layers"
            raise StorageError(expected(rule, f"{free / 1e6:,.1f} MB", remedy))
        with _written(self._folder):
            for each in self._arrays.values():
                each.create()

    def _resume(self, found: RowRecord) -> None:
        wanted = self._identity | {"rows": self.rows}
        got = found.identity | {"rows": found.rows}
        if different := [name for name in {**wanted, **got} if wanted.get(name) != got.get(name)]:
            first = different[0]
            said = f"another {', '.join(different)} ({first}: {got.get(first)!r} instead of {wanted.get(first)!r})"
            remedy = "Choose another folder, or delete this one"
            raise RunError(expected(f"rows of this configuration in {self._folder}", said, remedy))
        self.done, self.state = found.rows_done, _read_state(cast("Path", self._folder), found)
        self._settled = (self.done, time.monotonic())
        self._arrays = {name: _Array(self._folder, name, self.rows, *each) for name, each in found.arrays.items()}
        for name, each in self._arrays.items():
            each.open(self.done, found.checksums.get(name, 0), to_write=self.done < self.rows)

    def _settle(self) -> None:
        """Bring the rows to the disk first and then the record that vouches for them."""
        if self._folder is None or self._settled[0] == self.done:
            return
        with _written(self._folder):
            for each in self._arrays.values():
                if each.handle is not None:
                    os.fsync(each.handle.fileno())
        arrays = {name: (kind.str, shape) for name, (kind, shape) in self._kinds().items()}
        state = self._folder / _STATE.format(self.done)
        if self.state:
            write_atomically(state, self._write_state)
        RowRecord(
            identity=self._identity,
            rows=self.rows,
            rows_done=self.done,
            arrays=arrays,
            checksums={name: each.checksum for name, each in self._arrays.items()},
            state_sha256=file_sha256(state) if self.state else "",
        ).write(self._folder)
        for path in {*self._folder.glob(_STATE.format("*"))} - {state}:
            path.unlink()
        self._settled = (self.done, time.monotonic())

    def _write_state(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **self.state)  # type: ignore[arg-type]

    def _close(self) -> None:
        for each in self._arrays.values():
            if each.handle is not None:
                each.handle.close()


def _read_state(folder: Path, found: RowRecord) -> dict[str, np.ndarray]:
    path = folder / _STATE.format(found.rows_done)
    if not found.state_sha256:
        return {}
    if not path.exists() or file_sha256(path) != found.state_sha256:
        raise RunError(expected(f"the state {RowRecord.FILE} names in {path}", "another", RowRecord.AGAIN))
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@contextlib.contextmanager
def _written(folder: Path | None) -> Iterator[None]:
    """Say which folder could not be written."""
    try:
        yield
    except OSError as error:
        remedy = "Free space and run the same command again"
        raise StorageError(failed(f"write rows in {folder}", error, remedy)) from error


@contextlib.contextmanager
def row_store(folder: Path | None, identity: Mapping[str, Any], rows: int) -> Iterator[RowStore]:
    """Open the rows of a folder to fill or to finish them; this process is their only writer meanwhile.

    Rows are complete once they are on the disk, every quarter of a minute and at the end of the block, also after an
    exception or Ctrl-C. A killed process loses at most what it did since.

    Args:
        folder: of this store alone, made when missing; ``None`` keeps the rows in memory.
        identity: everything that the rows depend on, as plain values by name.
        rows: how many there will be.

    Raises:
        AtWorkError: another process writes there.
        RunError: the folder holds rows of another identity (the text says which entry differs), or an array that was
            deleted, cut or replaced.
        StorageError: no room on the disk, or no permission.

    Example:
        >>> with row_store(None, {"what": "squares"}, 3) as store:
        ...     store.append({"square": np.array([0, 1])})
        ...     store.append({"square": np.array([4])})
        ...     store.read("square").tolist()
        [0, 1, 4]
    """
    store = RowStore(folder, identity, rows)
    with contextlib.nullcontext() if folder is None else sole_writer(folder, "rows"):
        try:
            if folder is not None and (folder / RowRecord.FILE).exists():
                store._resume(RowRecord.read(folder))  # noqa: SLF001
            yield store
        finally:
            try:
                store._settle()  # noqa: SLF001
            finally:
                store._close()  # noqa: SLF001
