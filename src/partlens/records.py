"""Files: typed records in JSON, safetensors and text, each written whole or not at all.

A :class:`Record` is one kind of file: it writes, reads, validates and documents itself. :class:`Settings` are checked
the same way. Both refuse a wrong value with one sentence that names the field.

Nothing is pickled. A write goes to a temporary file in the same folder, is flushed to the disk and then renamed over
the target, so that a kill or a full disk leaves the previous version untouched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError

from partlens.errors import AtWorkError, InputError, RunError, StorageError, expected, failed, nearest, printable, shown

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "partlens/1"
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp|\.tmp[A-Za-z0-9]{6}")  # ours, and those of safetensors
_LARGEST = 2**63  # from it on no array, seed or index can hold a whole number


def write_atomically(path: Path, write: Callable[[Path], object], *, flush: bool = True) -> None:
    """Let ``write`` fill a temporary file and move it into place in one step.

    Args:
        path: the final file; its folder is made when missing.
        write: gets the temporary path and must leave a complete file there.
        flush: wait until the disk has it; without, a power cut may leave an empty file.

    Raises:
        StorageError: the file could not be written; ``path`` keeps its previous content.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made like any file of the user's, so that the umask decides who may read it.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        rights = temporary.stat().st_mode
        write(temporary)
        if flush:
            with temporary.open("rb+") as written:  # Windows flushes only what may be written to
                os.fsync(written.fileno())
        temporary.chmod(rights)  # a writer may have put a file of its own there, as safetensors does
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            failed(f"write {path}", error, "Free space and run the same command again, or choose another --out folder")
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of killed processes; nobody else may be writing in the folder."""
    for path in folder.glob(".*"):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):  # it is in nobody's way
                path.unlink()


@contextlib.contextmanager
def sole_writer(folder: Path, name: str = "writing") -> Iterator[None]:
    """Keep other processes from writing the same thing in a folder meanwhile.

    The lock goes when its process ends, however it ends; the file that a killed one leaves behind locks nothing.

    Args:
        folder: made when missing.
        name: of what is written there; things of other names may be written at the same time.

    Raises:
        AtWorkError: another process, or another thread of this one, is at it.
        StorageError: the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    if str(folder) != printable(str(folder)):  # the libraries that write tensors and events cannot
        raise StorageError(failed(f"write in {folder}", "its name is not in UTF-8", "Choose another folder"))
    lock = FileLock(folder / f".{name}.lock", timeout=0, thread_local=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise AtWorkError(f"{folder} is locked by another process. Wait for it or use another folder.") from error
    except NotImplementedError:
        # The lock guards against a mistake; where the file system has none, work goes on, and says so.
        warnings.warn(f"no file locks in {folder}: do not write to it from two processes at once", stacklevel=3)
    except OSError as error:
        raise StorageError(failed(f"write in {folder}", error, "Choose another folder")) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # whoever finds it later can lock it all the same
            Path(lock.lock_file).unlink()
        lock.release()


def plain(value: Any) -> Any:
    """Turn paths, tuples and non-finite floats into what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, BaseModel):
        schema = {"schema": value.SCHEMA} if isinstance(value, Record) else {}
        return schema | json.loads(value.model_dump_json())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    return _plain_leaf(value)


def _plain_leaf(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as strict JSON; undefined numbers (``nan``) become ``null``."""
    write_text(path, json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "Delete the file and run the command again") -> dict[str, Any]:
    """Read a JSON object; ``remedy`` says what to do about one that cannot be read.

    Raises:
        RunError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_bounded)
    except FileNotFoundError as error:
        raise RunError(expected(f"a file {path}", "nothing there", "Give the folder of a finished run")) from error
    except OSError as error:
        raise RunError(failed(f"read {path}", error, remedy)) from error
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number too large, or nested too deeply
        raise RunError(expected(f"JSON in {path}", str(error), remedy)) from error
    if not isinstance(content, dict):
        raise RunError(expected(f"a JSON object in {path}", type(content).__name__, remedy))
    return content


def _bounded(digits: str) -> int:
    """Read a whole number of a file; one that no array or seed can hold is none of ours."""
    if len(digits) > len(str(_LARGEST)) or abs(int(digits)) >= _LARGEST:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _our_error(error: ValidationError) -> InputError | None:
    """Return what a check of ours said, a sentence of its own."""
    ours = error.errors(include_url=False)[0].get("ctx", {}).get("error")
    return ours if isinstance(ours, InputError) else None


def _fault(error: ValidationError, kind: type[BaseModel]) -> tuple[str, str, str]:
    """Return of the first wrong field: what is expected, what came, and what to do."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(step) for step in first["loc"])
    if first["type"] == "extra_forbidden":
        options = " or ".join(nearest(str(first["loc"][-1]), kind.model_fields))
        return f"a field of {kind.__name__}", place, f"Did you mean {options}?"
    if first["type"] == "missing":
        return f"the field {place} of {kind.__name__}", "nothing", f"Give {place}"
    if first["type"] == "json_invalid":
        return "JSON", first["ctx"]["error"], "Correct it"
    rule = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"{place or kind.__name__} to be {rule}", shown(first["input"]), f"Correct {place or 'it'}"


class Value(BaseModel):
    """Frozen, typed values that refuse what they do not know.

    Raises:
        InputError: a field that is unknown, missing, or of another kind or range; the text names it.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_inf_nan="null", arbitrary_types_allowed=True
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            if (ours := _our_error(error)) is not None:
                raise ours from None
            raise InputError(expected(*_fault(error, type(self)))) from error

    def changed(self, changes: Mapping[str, Any] = MappingProxyType({}), /, **fields: Any) -> Self:
        """Return the same with some fields changed, checked like new ones."""
        return type(self)(**{**dict(self), **changes, **fields})

    @field_validator("*", check_fields=False)
    @classmethod
    def _of_bounded_size(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise ValueError("a number below 2**63")
        return value

    # Without this mark pydantic would build values inside records through __init__, where a file's kinds are not known.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


class Settings(Value):
    """How something is done: every field with its default, range and source; numbers are finite."""

    model_config = ConfigDict(allow_inf_nan=False)

    @classmethod
    def of(cls, given: Self | Mapping[str, Any] | None) -> Self:
        """Return settings as they are given, or the defaults with some fields changed."""
        # Fields that a subclass of these settings has would go unseen.
        return given if type(given) is cls else cls(**dict(given or {}))


class PresetSettings(Settings):
    """Settings that come in presets.

    Class attributes:
        PRESETS: by name, what each changes in the defaults.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str = "partlens", **changes: Any) -> Self:
        """Return a preset with further changes."""
        if not isinstance(name, str) or name not in cls.PRESETS:
            raise InputError(expected(f"preset {' or '.join(cls.PRESETS)}", name, "Choose one of them"))
        return cls(**{**cls.PRESETS[name], **changes})


class Record(Value):
    """One kind of file of a run.

    Class attributes:
        FILE: its name in the run directory.
        SCHEMA: name and number of its layout; raised where a reader of before would err.
        AGAIN: what makes a file of this kind anew, for texts.
        SEALED: nobody edits it, so that it carries a hash of its content, and a change is damage.
    """

    FILE: ClassVar[str]
    SCHEMA: ClassVar[str]
    AGAIN: ClassVar[str]
    SEALED: ClassVar[bool] = False

    def write(self, folder: Path) -> Path:
        """Write the file whole or not at all, and return its path.

        Raises:
            StorageError: it could not be written; an earlier one is untouched.
        """
        path = folder / self.FILE
        content = {"schema": self.SCHEMA, **json.loads(self.model_dump_json())}
        content |= {"seal": content_hash(content)} if self.SEALED else {}
        write_json(path, content)
        return path

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the file.

        Raises:
            RunError: it is missing, damaged, or of another version of partlens; the text names file and field.
        """
        path = folder / cls.FILE
        content = read_json(path, cls.AGAIN)
        seal = content.pop("seal", None) if cls.SEALED else None
        if cls.SEALED and seal != content_hash(content):
            raise RunError(expected(f"{path} as it was written", "a file that was changed", cls.AGAIN))
        if (schema := content.pop("schema", None)) != cls.SCHEMA:
            raise RunError(expected(f"schema {cls.SCHEMA} in {path}", schema or "none", cls.AGAIN))
        try:
            return cls.model_validate_json(json.dumps(content))
        except ValidationError as error:
            if (ours := _our_error(error)) is not None:
                place = ".".join(str(step) for step in error.errors(include_url=False)[0]["loc"])
                raise RunError(f"{path}{place and f' at {place}'}: {ours} {cls.AGAIN}.") from error
            rule, got, _ = _fault(error, cls)
            raise RunError(expected(f"{rule} in {path}", got, cls.AGAIN)) from error
        except RecursionError as error:
            raise RunError(expected(f"{cls.__name__} in {path}", str(error), cls.AGAIN)) from error

    @classmethod
    def read_if_there(cls, folder: Path) -> Self | None:
        """Read the file, ``None`` where there is none; errors as :meth:`read`."""
        return cls.read(folder) if (folder / cls.FILE).exists() else None


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as safetensors (contiguous copies on the CPU; shared storage is split).

    Several entries of metadata have no fixed order in the file; a file that has to be the same byte for byte each
    time takes one.
    """
    from safetensors.torch import save_file

    ready = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        try:
            save_file(ready, str(temporary), metadata=dict(metadata or {}))
        except SafetensorError as error:  # a full disk is none of Python's own errors there
            raise OSError(str(error)) from error

    write_atomically(path, save)


def read_tensors(
    path: Path,
    like: Mapping[str, Tensor] | None = None,
    *,
    sha256: str | None = None,
    remedy: str = "Delete it and run the command again",
) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file onto the CPU.

    Args:
        path: the file.
        like: optional, tensors of the names, kinds and shapes that the file must have; its numbers are then finite.
        sha256: optional, hash of the file that is meant.
        remedy: what to do about one that cannot be used.

    Raises:
        RunError: the file is missing, is not safetensors, or holds other tensors; the text names it.
    """
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(str(path))
        same = sha256 is None or file_sha256(path) == sha256
    except FileNotFoundError as error:
        raise RunError(expected(f"a file {path}", "nothing there", remedy)) from error
    except OSError as error:
        raise RunError(failed(f"read {path}", error, remedy)) from error
    except SafetensorError as error:
        raise RunError(expected(f"safetensors in {path}", str(error), remedy)) from error
    if not same:
        raise RunError(expected(f"the tensors that this run wrote in {path}", "others", remedy))
    for name in sorted({*tensors, *like} if like is not None else ()):
        wanted, got = (_described(of.get(name)) for of in (like or {}, tensors))
        if wanted != got:
            raise RunError(expected(f"{name} in {path} to be {wanted}", got, remedy))
        if tensors[name].isfinite().logical_not().any():
            raise RunError(expected(f"finite numbers in {name} of {path}", "NaN or infinite ones", remedy))
    return tensors


def _described(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def file_sha256(path: Path) -> str:
    """Hash a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def content_hash(content: Mapping[str, Any]) -> str:
    """Hash a mapping by its canonical JSON, so that equal configurations have equal hashes.

    Example:
        >>> content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
        True
    """
    canonical = json.dumps(plain(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
