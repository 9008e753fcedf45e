"""A run directory: who may write into it, what its record says, and whether it is the run that is asked for.

Every verb that writes holds the folder (:meth:`Run.writing`), so that two of them never mix their files.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

from partlens.errors import RunError, expected, listed, printable
from partlens.estimate import Number
from partlens.records import Record, Value, content_hash, plain, remove_leftovers, sole_writer

PHOTOS = "photos.json"
EXPLAINER = "run.json"
SELECTION = "selection.json"
INSPECTION = "inspect.json"
_TEMPORARY = (".lock", ".tmp")
_MOST_NAMED = 3


def versions() -> dict[str, str]:
    """Return the versions that a figure depends on."""
    found = {}
    for name in ("partlens", "torch", "torchvision", "numpy", "pillow", "safetensors", "scikit-learn"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"python": platform.python_version(), "platform": platform.platform()}


def command() -> str:
    """Return the command line of this process; empty where partlens is called from Python."""
    program = Path(sys.argv[0])
    name = "partlens" if program.parts[-2:] == ("partlens", "__main__.py") else program.stem  # or partlens-papers
    return printable(shlex.join([name, *sys.argv[1:]])) if name.startswith("partlens") else ""


def now() -> str:
    """Return the time as it is written in records."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


class Unreadable(Value):
    """A photo that could not be decoded.

    Attributes:
        key: its name in the data set.
        reason: what went wrong.
    """

    key: str
    reason: str


Precision = Literal["auto", "float32", "float32-channels-last", "bfloat16"]
"""How passes over photos compute; ``auto`` takes the fastest whose answers agree with float32."""


class PassPrecision(Value):
    """How passes over photos compute, and how far that was from float32 on the photos that it was tried on.

    Attributes:
        used: the precision; ``bfloat16`` has channels last, too.
        photos: that it was tried on; 0 where nothing was tried, because it was asked for or too little is read.
        error: the norm of the difference over the norm, the largest of the scores and the layers read.
        agreement: share of photos with the same decision.
        faster: how many times as fast as float32.
        notes: what was tried and not used, and why.
    """

    used: Precision
    photos: int = 0
    error: Number = 0.0
    agreement: Number = 1.0
    faster: Number = 1.0
    notes: tuple[str, ...] = ()


class PerformerInfo(Value):
    """The network of a run.

    Attributes:
        name: as reports call it.
        spec: how to load it again; ``None`` for a network object of Python.
        weights_sha256: hash of its weights and buffers.
        preprocessing: how images become its input.
        notes: what a reader of results must know.
        precision: of passes over photos, ``None`` until it is chosen.
        device: where it computed.
    """

    name: str
    spec: str | None
    weights_sha256: str
    preprocessing: dict[str, Any]
    notes: tuple[str, ...] = ()
    precision: PassPrecision | None = None
    device: str = "cpu"

    @property
    def passes(self) -> Precision:
        """In which precision passes over photos compute."""
        return "float32" if self.precision is None else self.precision.used


class DataInfo(Value):
    """The photos of a run.

    Attributes:
        name: as reports call them.
        path: what opens them again; ``None`` for photos that came from Python.
        fingerprint: hash of names, categories, splits and content.
        categories: those that are explained, at least one; ``("",)`` means all photos as one.
        unreadable: photos that could not be decoded; they are not used.
    """

    name: str
    path: str | None
    fingerprint: str
    categories: tuple[str, ...] = ("",)
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def of(self) -> str:
        """The categories for a sentence: empty, ``of fox`` or ``of cat, fox``."""
        named = ", ".join(name for name in self.categories if name)
        return f"of {named}" if named else ""


class RunRecord(Record):
    """What every record of a run says; an explainer's and a selection's extend it.

    Attributes:
        created: when it was begun.
        command: the command line that made it.
        versions: of what its figures depend on.
        performer: the network.
        data: the photos.
        status: whether it is finished.
        seconds: working time so far.

    Class attributes:
        SETTINGS: further fields that the result depends on, with performer and data; they decide which run it is.
        RESULTS: patterns of the files that belong to this kind of run; a new start deletes those of an older one.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = ()
    RESULTS: ClassVar[tuple[str, ...]] = ()

    created: str
    command: str
    versions: dict[str, str]
    performer: PerformerInfo
    data: DataInfo
    status: Literal["running", "finished"] = "running"
    seconds: float = 0.0

    @classmethod
    def asked(cls, performer: PerformerInfo, data: DataInfo, **fields: Any) -> Self:
        """Return the record of a run that is begun now, by this process."""
        return cls(created=now(), command=command(), versions=versions(), performer=performer, data=data, **fields)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.status == "finished"

    @classmethod
    def finished_in(cls, folder: Path) -> Self | None:
        """Read the record in a folder; ``None`` where there is none, or one that is not finished."""
        found = cls.read_if_there(folder)
        return found if found is not None and found.finished else None

    def settings(self) -> dict[str, Any]:
        """Return everything that the result depends on, by name; nested names are joined by dots."""
        found = {
            "weights": self.performer.weights_sha256,
            "preprocessing": self.performer.preprocessing,
            "photos": self.data.fingerprint,
            "categories": ", ".join(self.data.categories) or "all",
            **{name: getattr(self, name) for name in self.SETTINGS},
        }
        return dict(_flat(plain(found)))

    @property
    def identity(self) -> str:
        """Hash of everything that the result depends on: equal for runs that have the same result."""
        return content_hash(self.settings())


_R = TypeVar("_R", bound=RunRecord)


def _flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == hashlib.sha256().digest_size * 2:
        return value[:12]
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(found: RunRecord, asked: RunRecord) -> list[str]:
    """Return how the settings of two runs differ, as ``eta = 4e5, not 1e6``."""
    its, wanted = found.settings(), asked.settings()
    names = [name for name in wanted | its if its.get(name) != wanted.get(name)]
    return [f"{n.rpartition('.')[2]} = {_shown(its.get(n))}, not {_shown(wanted.get(n))}" for n in names]


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix in _TEMPORARY


def _few(differing: list[str]) -> str:
    more = f" and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
    return "; ".join(differing[:_MOST_NAMED]) + more


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    folder: Path  # an explainer, a selection and an inspection of the same network may share one

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder as its only writer.

        Raises:
            AtWorkError: another process writes there.
            RunError: a folder in it is a link.
            StorageError: the folder cannot be written to.
        """
        with sole_writer(self.folder):
            for place, folders, _ in os.walk(self.folder):
                remove_leftovers(Path(place))
                # The run may be a stranger's; through a link we would write, and delete, elsewhere.
                if links := [name for name in folders if (Path(place) / name).is_symlink()]:
                    path = Path(place) / links[0]
                    remedy = "Delete the link, or put the folder itself there"
                    raise RunError(expected(f"a folder at {path}", f"a link to {path.readlink()}", remedy))
            yield

    def _sharing(self, asked: RunRecord) -> int:
        """Return how many runs share the folder; 0 for a new one, or one whose record was deleted."""
        out, records = self.folder, {EXPLAINER, SELECTION, INSPECTION}
        if out.exists() and not out.is_dir():
            raise RunError(expected(f"a folder at {out}", "a file", "Choose another --out"))
        there = {path.name for path in out.glob("*") if not _is_temporary(path)}
        if there and there.isdisjoint({*records, *asked.RESULTS[:1]}):
            rule = f"a new or partlens folder at {out}"
            raise RunError(expected(rule, "a folder with other files", "Choose another --out"))
        return len(there & records)

    def earlier(self, asked: _R) -> _R | None:
        """Return the record of an earlier start of the same run, ``None`` where there is none.

        Raises:
            RunError: the folder holds other files, a damaged record or a run of other settings; the text names what
                differs.
        """
        # An explainer, a selection and an inspection may share the folder: deleting it would lose the others.
        which = f"{asked.FILE} in it" if self._sharing(asked) > 1 else "it"
        remedy = f"Choose another --out or delete {which}"
        try:
            found = type(asked).read_if_there(self.folder)
        except RunError as error:
            raise RunError(f"{str(error).removesuffix(f'{asked.AGAIN}.')}{remedy}.") from error
        if found is not None and (differing := differences(found, asked)):
            raise RunError(f"{self.folder} holds a run with {_few(differing)}. {remedy}.")
        return found

    @contextlib.contextmanager
    def begun(self, asked: _R) -> Iterator[_R]:
        """Hold the folder while a run is made, and give its record: that of an earlier start, or the one asked for.

        A finished run is given without holding the folder, which may then be read-only.

        Raises:
            AtWorkError: another process writes there.
            RunError: see :meth:`earlier`.
        """
        found = self.earlier(asked)
        if found is not None and found.finished:
            yield found
            return
        with self.writing():
            # What was found before the folder was held may be out of date.
            found = self.earlier(asked)
            if found is None:
                for stale in (path for pattern in asked.RESULTS for path in self.folder.glob(pattern)):
                    stale.unlink(missing_ok=True)  # of a run whose record was deleted
                asked.write(self.folder)
            yield asked if found is None else found

    def finish(self, record: _R, started: float, **results: Any) -> _R:
        """Fill in results and write the record; ``started`` is ``time.monotonic()`` when this process took it up."""
        seconds = round(record.seconds + time.monotonic() - started, 1)
        finished = record.changed(**results, status="finished", seconds=seconds)
        finished.write(self.folder)
        return finished

    def read(self, kind: type[_R]) -> _R:
        """Return the record of a finished run.

        Raises:
            RunError: there is none, it is damaged or it is unfinished.
        """
        if not (self.folder / kind.FILE).exists():
            others = listed(sorted(path.name for path in self.folder.glob("*.json"))) or "nothing there"
            raise RunError(expected(f"{kind.FILE} in {self.folder}", others, kind.AGAIN.replace(" again", " first")))
        record = kind.read(self.folder)
        if not record.finished:
            remedy = f"{kind.AGAIN} with the same arguments; it goes on where it stopped"
            raise RunError(expected(f"a finished run in {self.folder}", record.status, remedy))
        return record


class UsedPhotos(Record):
    """The photos that a fit used, so that they are known under other names.

    Attributes:
        photos: a text per photo that is equal for equal files, sorted.
    """

    FILE = PHOTOS
    SCHEMA = "partlens.photos/1"
    AGAIN = "Run fit-explainer again"

    photos: tuple[str, ...]

    @classmethod
    def of(cls, digests: Iterable[str]) -> Self:
        """Return what is kept of photos, given what their set's ``digests`` say."""
        return cls(photos=tuple(sorted(set(map(_mark, digests)))))

    def count(self, digests: Iterable[str]) -> int:
        """Return how many of the photos, or of the photos that they are cut from, the fit used."""
        used = set(self.photos)
        return sum(_mark(digest) in used for digest in digests)


def _mark(digest: str) -> str:
    whole = digest.partition("@")[0]  # whatever is cut out of the file
    return hashlib.sha256(whole.encode()).hexdigest()[:16]
