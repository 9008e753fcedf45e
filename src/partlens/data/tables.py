"""Tables of images and of landmarks, as CSV or Parquet, read as columns of text.

People write them with many programs, so a column is known in upper and lower case, cells may be separated by commas,
semicolons, tabs or bars, and the text may be in UTF-8 or UTF-16. What is not used is said (:attr:`Table.unused`).
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from partlens.data.files import Box, foreign_kind
from partlens.errors import ImageError, expected

IMAGE_TABLE, LANDMARK_TABLE, MASK_FOLDER = "images.csv", "landmarks.csv", "masks"
_CATEGORY_COLUMNS = ("category", "class", "label", "class_index")
BOX_COLUMNS = ("left", "top", "right", "bottom")
_IMAGE_COLUMNS = ("image", "file", *_CATEGORY_COLUMNS, "split", "photo", *BOX_COLUMNS)
_SAME_AS = {"file_name": "image", "filename": "image"}  # as others call a column, where ours is missing
_SEPARATORS = ",;\t|"
_MARKS = (  # the longer marks first: that of UTF-32 begins as that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class Table:
    """The cells of a table by column, without the blanks around them."""

    path: Path  # the file
    columns: dict[str, list[str]]  # the cells of each column that is known, by our name of it
    lines: list[int]  # the line of each row in the file
    written: dict[str, str]  # how the file calls these columns
    unused: tuple[str, ...]  # the other columns
    decimal: str = "."  # the sign between whole and decimal digits

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def where(self, column: str, row: int) -> str:
        """Name a cell, for texts."""
        return f"column {self.written[column]!r} of {self.path}, row {self.lines[row]}"

    def remarks(self) -> tuple[str, ...]:
        """Say which columns were read under another name than ours, and which were not used."""
        renamed = [f"{name} from {written!r}" for name, written in self.written.items() if name != written]
        found = [f"{self.path.name} gives {', '.join(renamed)}"] if renamed else []
        unused = [name for name in self.unused if name]
        return (*found, *([f"columns of {self.path.name} that are not used: {', '.join(unused)}"] if unused else ()))

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

    def numbers(
        self, column: str, *, optional: bool = False, least: float = -math.inf, rows: Sequence[bool] | None = None
    ) -> list[float]:
        """Return the cells of a column as finite numbers, none below ``least``.

        Where ``optional``, an empty cell, or each of a missing column, is ``nan``; so is every row that ``rows`` leaves
        out, whatever its cell holds.

        Raises:
            ImageError: a cell holds no such number.
        """
        if optional and column not in self.columns:
            return [math.nan] * len(self)
        wanted = rows or [True] * len(self)
        return [
            self.number(column, row, optional=optional, least=least) if wanted[row] else math.nan
            for row in range(len(self))
        ]

    def number(self, column: str, row: int, *, optional: bool = False, least: float = -math.inf) -> float:
        """Return one cell as :meth:`numbers` does."""
        cell = self.columns[column][row]
        if not cell and optional:
            return math.nan
        try:
            value = float(cell.replace(self.decimal, "."))
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


def _text_of(path: Path) -> str:
    """Decode a table: UTF-8, or UTF-16 and UTF-32 where a mark or the zeros of ASCII letters show it."""
    content = path.read_bytes()
    if content and (foreign := foreign_kind(content)):
        raise ImageError(expected(f"a table in {path}", *foreign))
    encoding = next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in content[:2]:
        encoding = "utf-16-be" if content[:1] == b"\0" else "utf-16-le"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        row = content[: error.start].count(b"\n") + 1
        rule, got = f"text in UTF-8 or UTF-16 in {path}", f"other bytes in row {row}"
        raise ImageError(expected(rule, got, "Save the table as CSV with the encoding UTF-8")) from error


def _folded(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().casefold())


def _our_name(written: str, known: Sequence[str], *, same: bool) -> str | None:
    """Return our name of a column, None where it is not known; ``same`` admits what others call it."""
    folded = _folded(written)
    named = folded if folded in known or not same else _SAME_AS.get(folded)
    return named if named in known else None


def _place_of(path: Path, header: Sequence[str], ours: Sequence[str | None], name: str) -> int:
    """Return the place of a column in the header; of several the one that is written exactly so."""
    places = [place for place, each in enumerate(ours) if each == name]
    exact = [place for place in places if header[place] == name] or places
    if len(exact) > 1:
        got = " and ".join(header[place] for place in exact)
        raise ImageError(expected(f"one column {name} in {path}", got, "Rename or delete one of them"))
    return exact[0]


def _our_names(path: Path, header: Sequence[str], known: Sequence[str]) -> dict[int, str]:
    """Return our name of each column of a header that is known; one that is written exactly so comes first."""
    plain = [_our_name(name, known, same=False) for name in header]
    same = [_our_name(name, known, same=True) for name in header]
    ours = [first or (second if second not in plain else None) for first, second in zip(plain, same, strict=True)]
    found = {name: _place_of(path, header, ours, name) for name in dict.fromkeys(ours) if name is not None}
    spare = [name for name in _CATEGORY_COLUMNS if name in found][1:]  # the first one says what an image shows
    return {place: name for name, place in found.items() if name not in spare}


def _separator(text: str, known: Sequence[str]) -> str:
    """Return the sign that separates cells: the one that gives the header most of the columns that are known."""

    def hits(sign: str) -> int:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=sign), [])
        return len({_SAME_AS.get(_folded(name), _folded(name)) for name in header} & set(known))

    return max(_SEPARATORS, key=hits)  # the first of equal ones


def _from_csv(path: Path, known: Sequence[str]) -> Table:
    text = _text_of(path)
    # Excel writes the separator into a line of its own before the header.
    said = re.match(r'"?sep=(.)"?[,;\t]*\r?\n', text)
    if said:
        text = text[said.end() :]
    sign = said[1] if said else _separator(text, known)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=sign)
    header = [name.strip() for name in next(reader, [])]
    ours = _our_names(path, header, known)
    columns: dict[str, list[str]] = {name: [] for name in ours.values()}
    lines = []
    for cells in reader:
        if not cells or (len(cells) > 1 and not any(map(str.strip, cells))):
            continue  # a blank line, as spreadsheets leave them at the end
        line = reader.line_num + bool(said)
        if len(cells) != len(header):
            rule = f"{len(header)} cells in row {line} of {path}"
            remedy = f"Quote cells that hold the separator {sign!r}, or fill the row up"
            raise ImageError(expected(rule, len(cells), remedy))
        lines.append(line)
        for place, name in ours.items():
            columns[name].append(cells[place].strip())
    # Where semicolons separate cells, a comma is the decimal sign; after other separators it might mean thousands.
    return _table(path, header, ours, columns, lines, "," if sign == ";" else ".")


def _table(
    path: Path,
    header: Sequence[str],
    ours: dict[int, str],
    columns: dict[str, list[str]],
    lines: list[int],
    decimal: str,
) -> Table:
    written = {name: header[place] for place, name in ours.items()}
    unused = tuple(name for place, name in enumerate(header) if place not in ours)
    return Table(path, columns, lines, written, unused, decimal)


def _cell(value: object) -> str:
    if isinstance(value, (dict, list, bytes)):
        got = f"{type(value).__name__} in a cell"
        remedy = "Save the photos as files, and their names in the table"
        raise ImageError(expected("a table of texts and numbers", got, remedy))
    return (
        "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
    )  # nan is how pandas writes an empty cell


def _from_parquet(path: Path, known: Sequence[str]) -> Table:
    try:
        from pyarrow import parquet
    except ImportError as error:
        remedy = 'Install it with pip install "partlens[table]"'
        raise ImageError(expected(f"pyarrow to read {path}", "no such package", remedy)) from error
    content = parquet.read_table(path)
    ours = _our_names(path, content.column_names, known)
    columns = {name: list(map(_cell, content.column(place).to_pylist())) for place, name in ours.items()}
    return _table(path, content.column_names, ours, columns, list(range(1, content.num_rows + 1)), ".")


def read_table(path: Path, required: tuple[str, ...] = ("image",), known: tuple[str, ...] = _IMAGE_COLUMNS) -> Table:
    """Read the ``known`` columns of a CSV or Parquet file as text; the others are named in ``unused``.

    Raises:
        ImageError: the table is missing, of another kind or damaged, or lacks a required column.
    """
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        raise ImageError(expected(f"an image folder or table at {path}", got, "Check the path"))
    reader = {".csv": _from_csv, ".tsv": _from_csv, ".parquet": _from_parquet}.get(path.suffix.lower())
    if reader is None:
        remedy = "Give the folder that holds the images, or save the table as CSV"
        raise ImageError(expected("a folder, or a table ending in .csv or .parquet", f"{path.name!r}", remedy))
    try:
        table = reader(path, known)
    except ImageError:
        raise
    except Exception as error:  # a damaged file makes the readers raise whatever comes up
        raise ImageError(expected(f"a table at {path}", str(error), "Save the table again")) from error
    missing = [name for name in required if name not in table.columns]
    if missing:
        rule = f"the column{'s' * (len(required) > 1)} {', '.join(required)} in {path}"
        got = f"the columns {', '.join((*table.written.values(), *table.unused)) or '(none)'}"
        remedy = f"Add or rename {', '.join(missing)}; separate cells by commas"
        raise ImageError(expected(rule, got, remedy))
    return table


def category_cells(table: Table) -> list[str] | None:
    """Return what the column for categories says, None where there is none.

    Whole numbers that pandas wrote as 1.0, since another cell was empty, are read as 1.
    """
    column = next((name for name in _CATEGORY_COLUMNS if name in table.columns), None)
    if column is None:
        return None
    cells = table.columns[column]
    floats = all(re.fullmatch(r"\d+\.0", cell) for cell in cells if cell)
    return [cell.removesuffix(".0") for cell in cells] if floats else cells


def with_slashes(names: Sequence[str], there: Callable[[str], bool]) -> list[str]:
    """Turn the backslashes of Windows in names of files into slashes; not where a file is called so here."""
    return [name.replace("\\", "/") if "\\" in name and (os.sep == "\\" or not there(name)) else name for name in names]


def table_in(folder: Path, name: str) -> Path:
    """Return the table of a name in a folder, in upper or lower case."""
    if (folder / name).exists() or not folder.is_dir():
        return folder / name
    found = (other for other in sorted(folder.iterdir()) if other.name.casefold() == name)
    return next(found, folder / name)
