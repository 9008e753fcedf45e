"""Tables of images, as CSV or Parquet, read as columns of text."""

from __future__ import annotations

import csv
from pathlib import Path

from partlens.errors import ImageError, expected

IMAGE_TABLE = "images.csv"
CATEGORY_COLUMNS = ("category", "class", "label", "class_index")


def _from_csv(path: Path) -> dict[str, list[str]]:
    """Read a CSV table as columns of text."""
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle)
        header = [name.strip() for name in next(reader, [])]
        columns: dict[str, list[str]] = {name: [] for name in header}
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise ImageError(
                    expected(
                        f"{len(header)} cells in row {reader.line_num} of {path}",
                        len(cells),
                        "Quote cells that hold commas, or fill the row up",
                    )
                )
            for name, cell in zip(header, cells, strict=True):
                columns[name].append(cell.strip())
    return columns


def _from_parquet(path: Path) -> dict[str, list[str]]:
    """Read the columns of a Parquet table that matter here, as text."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ImageError(
            expected(f"pyarrow to read {path}", "no such package", 'Install it with pip install "partlens[table]"')
        ) from error
    table = parquet.read_table(path)
    wanted = {"image", "split", "photo", *CATEGORY_COLUMNS}
    return {
        name: ["" if value is None else str(value) for value in table[name].to_pylist()] if name in wanted else []
        for name in table.column_names
    }


def read_table(path: Path) -> dict[str, list[str]]:
    """Read a table of images as columns of text.

    Raises:
        ImageError: the table is missing or of another kind, damaged, or lacks the column ``image``.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise ImageError(expected(f"an image folder or table at {path}", got, "Check the path"))
    readers = {".csv": _from_csv, ".parquet": _from_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ImageError(
            expected(
                "a folder, or a table ending in .csv or .parquet",
                f"{path.name!r}",
                "Give the folder that holds the images, or save the table as CSV",
            )
        )
    try:
        columns = reader(path)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(expected(f"a table at {path}", str(error), "Save the table again")) from error
    if "image" not in columns:
        raise ImageError(
            expected(
                f"a column 'image' in {path}",
                f"the columns {', '.join(columns) or '(none)'}",
                "Rename the column that holds the paths to 'image'",
            )
        )
    return columns
