"""MATLAB files of both kinds as plain Python values.

Up to version 7 a ``.mat`` file has MATLAB's own format (read by SciPy); from 7.3 on it is HDF5 (read by h5py).
Both come back alike: a struct is a dict, an array of structs or a cell array is a list in MATLAB's order, text is
``str``, numbers are arrays ``[row, col]`` as MATLAB shows them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from partlens.errors import ImageError, expected


class MissingPackageError(ImageError):
    """The package that reads this kind of file is not installed."""


_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_STARTS = (0, 512, 1024, 2048)  # MATLAB writes 512 bytes of its own before the HDF5 part


def read_matlab(path: Path | str, fields: Collection[str] | None = None) -> dict[str, Any]:
    """Read every variable of a MATLAB file.

    Args:
        path: a ``.mat`` file of version 4 to 7.3.
        fields: of variables that are structs, the fields to read (others cost time in HDF5); all when None.

    Returns:
        Variables by name; see the head of this module for how values come back. An empty array of structs is
        an empty list.

    Raises:
        ImageError: there is no such file or it is damaged; the text names it.
        MissingPackageError: the package that reads its kind is not installed (also an ImageError).

    Example:
        >>> import tempfile, pathlib
        >>> from scipy.io import savemat
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.mat"
        >>> savemat(path, {"anno": {"name": "bird", "box": [[1.0, 2.0]]}})
        >>> read_matlab(path)
        {'anno': {'name': 'bird', 'box': array([[1., 2.]])}}
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            head = handle.read(_HDF5_STARTS[-1] + len(_HDF5))
    except OSError as error:
        got = "nothing there" if isinstance(error, FileNotFoundError) else str(error)
        raise ImageError(expected(f"a MATLAB file {path}", got, "Complete the data set")) from error
    read: Callable[[Any, Path, Collection[str] | None], dict[str, Any]]
    if any(head[start : start + len(_HDF5)] == _HDF5 for start in _HDF5_STARTS):
        package, command, read = "h5py", 'pip install "partlens[matlab]"', _read_hdf5
    else:
        package, command, read = "scipy.io", "pip install scipy", _read_level_5
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        remedy = f"Install it with {command}"
        raise MissingPackageError(expected(f"{name} to read {path}", "no such package", remedy)) from error
    try:
        return read(module, path, fields)
    except Exception as error:  # damaged files make both packages raise whatever comes up
        reason = f"{type(error).__name__}: {error}".replace(str(path), path.name)
        rule = f"a MATLAB file that can be read at {path}"
        raise ImageError(expected(rule, reason, "Copy the file again from the data set")) from error


def _read_level_5(scipy_io: Any, path: Path, fields: Collection[str] | None) -> dict[str, Any]:
    content = scipy_io.loadmat(str(path), chars_as_strings=True, mat_dtype=False)
    return {name: _plain(value, fields) for name, value in content.items() if not name.startswith("__")}


def _plain(value: Any, fields: Collection[str] | None = None) -> Any:
    """Turn what SciPy makes of a variable into plain values."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.names is not None:
        names = [name for name in value.dtype.names if fields is None or name in fields]
        rows = [{name: _plain(row[name]) for name in names} for row in value.ravel(order="F")]
        return rows[0] if value.size == 1 else rows
    if value.dtype.kind in "US":
        return str(value.ravel()[0]) if value.size else ""
    if value.dtype.kind == "O":
        return [_plain(item) for item in value.ravel(order="F")]
    return value


def _read_hdf5(h5py: Any, path: Path, fields: Collection[str] | None) -> dict[str, Any]:
    with h5py.File(path, "r") as file:
        return {name: _from_hdf5(h5py, file, file[name], fields) for name in file if not name.startswith("#")}


def _from_hdf5(h5py: Any, file: Any, item: Any, fields: Collection[str] | None = None) -> Any:
    """Turn one HDF5 object into plain values."""
    return _struct(h5py, file, item, fields) if isinstance(item, h5py.Group) else _values(h5py, file, item)


def _struct(h5py: Any, file: Any, item: Any, fields: Collection[str] | None) -> Any:
    """One struct as a dict, an array of them as a list."""
    members = {name: value for name, value in item.items() if fields is None or name in fields}
    plain = {name: _from_hdf5(h5py, file, value) for name, value in members.items()}
    # An array of structs is stored as one array of references per field, which itself has no MATLAB class.
    if members and all(
        isinstance(v, h5py.Dataset) and v.dtype.kind == "O" and "MATLAB_class" not in v.attrs for v in members.values()
    ):
        return [dict(zip(plain, row, strict=True)) for row in zip(*plain.values(), strict=True)]
    return plain


def _values(h5py: Any, file: Any, item: Any) -> Any:
    """Numbers, text, or what an array of references points to; MATLAB's axes are there in reverse order."""
    values = item[()]
    if values.dtype.kind == "f":  # neither text nor empty: both are stored as whole numbers
        return values.T
    attributes = dict(item.attrs)
    kind = attributes.get("MATLAB_class", b"")
    if attributes.get("MATLAB_empty", 0):  # then the values are the size of what is empty
        empty = np.zeros(tuple(int(n) for n in values.ravel()))
        return {b"char": "", b"struct": [], b"cell": []}.get(kind, empty)
    if values.dtype.kind == "O":
        return [_from_hdf5(h5py, file, file[reference]) for reference in values.ravel()]
    return "".join(map(chr, values.ravel())) if kind == b"char" else values.T


def numbers(value: Any) -> npt.NDArray[np.float64]:
    """Return a value of a MATLAB file as float64 numbers in one row, text such as ``'35'`` included.

    Raises:
        ValueError: it holds something else.

    Example:
        >>> numbers("35").tolist(), numbers(np.array([[1], [2]], np.uint8)).tolist(), numbers([]).tolist()
        ([35.0], [1.0, 2.0], [])
    """
    if isinstance(value, str):
        return np.array([float(value)])
    return np.asarray(value, dtype=np.float64).ravel(order="F")


def structs(value: Any) -> list[dict[str, Any]]:
    """Return an array of structs as a list, also where it has one element or none.

    Raises:
        ValueError: it is something else.

    Example:
        >>> structs({"class": "bird"}), structs([]), structs(np.zeros((0, 0)))
        ([{'class': 'bird'}], [], [])
    """
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    if isinstance(value, np.ndarray) and value.size == 0:
        return []
    raise ValueError(f"an array of structs was expected, not {type(value).__name__}")
