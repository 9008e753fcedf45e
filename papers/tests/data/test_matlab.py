"""MATLAB files of both kinds come back alike, and every way of failing says what to do."""

import importlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from partlens.errors import ImageError
from partlens_papers.data.matlab import MissingPackageError, numbers, read_matlab, structs

STRUCTS = [
    {"name": "bird", "box": np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), "obj": {"xmin": "35"}, "none": []},
    {"name": "", "box": np.zeros((0, 0)), "obj": {"xmin": "7"}, "none": []},
]


def save_level_5(path: Path, name: str, rows: list[dict]) -> Path:
    array = np.empty((1, len(rows)), dtype=[(field, object) for field in rows[0]])
    for column, row in enumerate(rows):
        array[0, column] = tuple(row.values())
    savemat(path, {name: array}, do_compression=True)
    return path


def save_level_7_3(path: Path, name: str, rows: list[dict]) -> Path:
    """Write an array of structs as MATLAB 7.3 does: references per field, axes reversed, text as numbers."""
    h5py = pytest.importorskip("h5py")
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w", userblock_size=512) as file:
        store = file.create_group("#refs#")

        def put(where, label, value):
            if isinstance(value, dict):
                group = where.create_group(label)
                group.attrs["MATLAB_class"] = np.bytes_("struct")
                for key, item in value.items():
                    put(group, key, item)
                return
            text = isinstance(value, str)
            kind = "char" if text else "struct" if isinstance(value, list) else "double"
            array = np.array([[ord(c)] for c in value], np.uint16) if text else np.asarray(value, float).T
            if array.size == 0:
                array = np.zeros(2, np.uint64)
            made = where.create_dataset(label, data=array)
            made.attrs["MATLAB_class"] = np.bytes_(kind)
            if array.dtype == np.uint64:
                made.attrs["MATLAB_empty"] = np.uint8(1)

        group = file.create_group(name)
        group.attrs["MATLAB_class"] = np.bytes_("struct")
        for field in rows[0]:
            references = group.create_dataset(field, (len(rows), 1), h5py.ref_dtype)
            for row, content in enumerate(rows):
                label = f"{field}{row}"
                put(store, label, content[field])
                references[row, 0] = store[label].ref
    with path.open("r+b") as handle:
        handle.write(b"MATLAB 7.3 MAT-file".ljust(512, b" "))
    return path


@pytest.mark.parametrize("save", [save_level_5, save_level_7_3])
def test_both_kinds_come_back_alike(tmp_path, save):
    content = read_matlab(save(tmp_path / "a.mat", "truth", STRUCTS))
    assert list(content) == ["truth"]
    first, second = structs(content["truth"])
    assert (first["name"], second["name"]) == ("bird", "")
    assert first["box"].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert numbers(first["box"]).tolist() == [1, 3, 5, 2, 4, 6]
    assert numbers(second["box"]).size == 0
    assert numbers(first["obj"]["xmin"]).tolist() == [35]
    assert structs(first["none"]) == []


@pytest.mark.parametrize("save", [save_level_5, save_level_7_3])
def test_only_the_fields_asked_for(tmp_path, save):
    rows = structs(read_matlab(save(tmp_path / "a.mat", "truth", STRUCTS), ["name"])["truth"])
    assert rows == [{"name": "bird"}, {"name": ""}]


def test_a_missing_and_a_damaged_file(tmp_path):
    with pytest.raises(ImageError, match=r"MATLAB file .*a\.mat, got nothing there"):
        read_matlab(tmp_path / "a.mat")
    path = save_level_5(tmp_path / "a.mat", "truth", STRUCTS)
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(ImageError, match=r"can be read at .*a\.mat, got .*Copy the file again"):
        read_matlab(path)
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 90)
    pytest.importorskip("h5py")
    with pytest.raises(ImageError, match=r"can be read at .*a\.mat"):
        read_matlab(path)


@pytest.mark.parametrize(
    ("content", "package", "remedy"),
    [(b"\x89HDF\r\n\x1a\n", "h5py", r"partlens\[matlab\]"), (b"MATLAB 5.0 MAT-file", "scipy", "pip install scipy")],
)
def test_a_missing_package_names_the_remedy(tmp_path, monkeypatch, content, package, remedy):
    (tmp_path / "a.mat").write_bytes(content)

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingPackageError, match=rf"{package} to read .*a\.mat, got no such package.*{remedy}"):
        read_matlab(tmp_path / "a.mat")


def test_what_is_no_array_of_structs():
    with pytest.raises(ValueError, match="not ndarray"):
        structs(np.ones(3))
