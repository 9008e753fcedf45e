"""Tables of images and of landmarks, as CSV or Parquet, read as columns of text."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from partlens.data.files import Box
from partlens.errors import ImageError, expected

IMAGE_TABLE, LANDMARK_TABLE, MASK_FOLDER = "images.csv", "landmarks.csv", "masks"
CATEGORY_COLUMNS = ("category", "class", "label", "class_index")
BOX_COLUMNS = ("left", "top", "right", "bottom")
KNOWN_COLUMNS = ("image", "file", *CATEGORY_COLUMNS, "split", "photo", *BOX_COLUMNS)


@dataclass(frozen=True)
class Table:
    """The cells of a table by column, without the blanks around them; ``lines`` are the rows' lines in the file."""

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def where(self, column: str, row: int) -> str:
        """Name a cell, for texts."""
        return f"column {column!r} of {self.path}, row {self.lines[row]}"

    def words(self, column: str) -> list[str]:
        """Return the cells of a column.

        Raises:
            ImageError: a cell is empty.
        """
        cells = self.columns[column]
        if "" in cells:
            where = self.where(column, cells.index(""))
            raise ImageError(expected(f"a name in {where}", "an empty cell", "Fill in the cell"))
        return cells

    def numbers(self, column: str, *, optional: bool = False, least: float = -math.inf) -> list[float]:
        """Return the cells of a column as finite numbers, none below ``least``.

        Where ``optional``, an empty cell, or each of a missing column, is ``nan``.

        Raises:
            ImageError: a cell holds no such number.
        """
        if optional and column not in self.columns:
            return [math.nan] * len(self)
        return [self._number(column, row, optional, least) for row in range(len(self))]

    def _number(self, column: str, row: int, empty_allowed: bool, least: float) -> float:
        cell = self.columns[column][row]
        if not cell and empty_allowed:
            return math.nan
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and value >= least:
            return value
        rule = "a number" if least == -math.inf else f"a number >= {least:g}"
        remedy = "Correct the cell or delete the row"
        raise ImageError(expected(f"{rule} in {self.where(column, row)}", repr(cell), remedy))

    def boxes(self) -> tuple[Box | None, ...]:
        """Return the box to which each image is cut, None for rows whose four cells are empty.

        Raises:
            ImageError: a row has some of the four numbers only.
        """
        found: list[Box | None] = []
        for row, box in enumerate(zip(*(self.numbers(name, optional=True) for name in BOX_COLUMNS), strict=True)):
            missing = [name for name, edge in zip(BOX_COLUMNS, box, strict=True) if math.isnan(edge)]
            if 0 < len(missing) < len(BOX_COLUMNS):
                rule = f"all of {', '.join(BOX_COLUMNS)} in row {self.lines[row]} of {self.path}, or none"
                raise ImageError(expected(rule, f"no {' and no '.join(missing)}", "Complete the box"))
            found.append(None if missing else box)
        return tuple(found)


def _from_csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.reader(handle)
        header = [name.strip() for name in next(reader, [])]
        columns: dict[str, list[str]] = {name: [] for name in header}
        lines = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                rule = f"{len(header)} cells in row {reader.line_num} of {path}"
                raise ImageError(expected(rule, len(cells), "Quote cells that hold commas, or fill the row up"))
            lines.append(reader.line_num)
            for name, cell in zip(header, cells, strict=True):
                columns[name].append(cell.strip())
    return Table(path, columns, lines)


def _from_parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError as error:
        remedy = 'Install it with pip install "partlens[table]"'
        raise ImageError(expected(f"pyarrow to read {path}", "no such package", remedy)) from error
    content = parquet.read_table(path)
    columns = {
        name: ["" if value is None else str(value) for value in content[name].to_pylist()]
        for name in content.column_names
    }
    return Table(path, columns, list(range(1, content.num_rows + 1)))


def read_table(path: Path, required: tuple[str, ...] = ("image",)) -> Table:
    """Read a CSV file in UTF-8, or a Parquet file, as columns of text.

    Raises:
        ImageError: the table is missing, of another kind or damaged, or lacks a required column.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise ImageError(expected(f"an image folder or table at {path}", got, "Check the path"))
    reader = {".csv": _from_csv, ".parquet": _from_parquet}.get(path.suffix.lower())
    if reader is None:
        remedy = "Give the folder that holds the images, or save the table as CSV"
        raise ImageError(expected("a folder, or a table ending in .csv or .parquet", f"{path.name!r}", remedy))
    try:
        table = reader(path)
    except ImageError:
        raise
    except Exception as error:  # a damaged file makes the readers raise whatever comes up
        raise ImageError(expected(f"a table at {path}", str(error), "Save the table again")) from error
    missing = [name for name in required if name not in table.columns]
    if missing:
        rule = f"the column{'s' * (len(required) > 1)} {', '.join(required)} in {path}"
        got = f"the columns {', '.join(table.columns) or '(none)'}"
        raise ImageError(expected(rule, got, f"Add or rename {', '.join(missing)}"))
    return table
