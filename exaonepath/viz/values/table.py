"""Columns of a CSV or Parquet file as values of patches: a score, a label, whatever another program computed."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import SettingsError
from exaonepath.files.slide_vectors import require_pyarrow

_SLIDE_COLUMNS = ("slide", "slide_id", "id", "wsi_id")
_X_COLUMNS, _Y_COLUMNS = ("x", "coord_x", "x_coord"), ("y", "coord_y", "y_coord")
_ROW_COLUMNS = ("patch", "index", "patch_index")
_LARGEST_FILE = 1 << 30
_MOST_CELLS = 20_000_000  # of a Parquet file, which is much larger in memory than on disk
_MISSING = {"", "na", "nan", "n/a", "null", "none"}
MOST_CATEGORIES = 40


@dataclass(frozen=True)
class Column:
    """One column for the patches of one slide.

    Attributes:
        values: float32 [N]; NaN where the table has no value. Of a column of text, the number of the category.
        categories: the texts of a column of text, sorted; empty for a column of numbers.
    """

    values: np.ndarray
    categories: tuple[str, ...]


class PatchTable:
    """A CSV, TSV or Parquet file with a row for each patch.

    A row belongs to the patch whose corner it states (columns x and y, level-0 pixels), or whose number (patch, from
    0). With the column slide, the file may hold several slides.

    Raises:
        SettingsError: the file cannot be read, or does not state which patch a row is of.
        MissingDependencyError: it is a Parquet file, and pyarrow is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        header, self._rows = (_read_parquet if _is_parquet(self.path) else _read)(self.path)
        lower = [name.strip().lower() for name in header]
        duplicates = sorted({name for name in lower if lower.count(name) > 1})
        if duplicates:
            raise SettingsError(f"{self.path} has several columns called {', '.join(duplicates)}")

        def find(names: tuple[str, ...]) -> int | None:
            return next((lower.index(name) for name in names if name in lower), None)

        self._slide, self._x, self._y, self._row = map(find, (_SLIDE_COLUMNS, _X_COLUMNS, _Y_COLUMNS, _ROW_COLUMNS))
        if (self._x is None or self._y is None) and self._row is None:
            raise SettingsError(
                f"{self.path} does not state which patch a row is of: it needs columns x and y (the corner in level-0 "
                f"pixels) or patch (its number from 0); it has {', '.join(header)}"
            )
        keys = {self._slide, self._x, self._y, self._row}
        self._columns = {header[at].strip(): at for at in range(len(header)) if at not in keys and header[at].strip()}
        self.names = tuple(self._columns)
        if not self.names:
            raise SettingsError(f"{self.path} has no column besides those that name the patch")
        # Whether a column is text is decided over the whole file, so that it means the same on every slide.
        self._categories = {name: self._texts(at) for name, at in self._columns.items()}

    def described(self) -> list[dict[str, Any]]:
        """Name and categories of every column; a column of numbers has no categories."""
        return [{"name": name, "categories": list(self._categories[name])} for name in self.names]

    def column(self, name: str, slide: str, coords: np.ndarray) -> Column | None:
        """A column for the patches of a slide; None if there is no such column, or no row of the slide in it.

        Args:
            name: name of the column.
            slide: id of the slide.
            coords: int32 [N, 2], corners of the patches.
        """
        at = self._columns.get(name)
        if at is None:
            return None
        categories = self._categories[name]
        number = {text: float(index) for index, text in enumerate(categories)}
        values = np.full(len(coords), np.nan, np.float32)
        by_corner = {(int(x), int(y)): index for index, (x, y) in enumerate(coords)}
        found = False
        for row in self._rows:
            if self._slide is not None and not _same_slide(row[self._slide], slide):
                continue
            index = self._patch(row, by_corner, len(coords))
            if index is not None:
                found = True
                text = row[at].strip()
                if text.lower() not in _MISSING:
                    values[index] = number[text] if categories else float(text)
        return Column(values, categories) if found else None

    def _patch(self, row: list[str], by_corner: dict[tuple[int, int], int], count: int) -> int | None:
        try:
            if self._x is not None and self._y is not None:
                return by_corner.get((round(float(row[self._x])), round(float(row[self._y]))))
            assert self._row is not None
            index = int(row[self._row])
        except (ValueError, OverflowError):
            return None
        return index if 0 <= index < count else None

    def _texts(self, at: int) -> tuple[str, ...]:
        values = {row[at].strip() for row in self._rows}
        values = {text for text in values if text.lower() not in _MISSING}
        if all(_is_number(text) for text in values):
            return ()
        if len(values) > MOST_CATEGORIES:
            name = next(name for name, column in self._columns.items() if column == at)
            raise SettingsError(
                f"{self.path}: the column {name} has {len(values)} different texts; up to {MOST_CATEGORIES} can be "
                "shown as colours. Leave the column out"
            )
        return tuple(sorted(values))


def _read(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise SettingsError(f"{path} has more than 1 GB, which is too much for a table of patches")
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=first.count)
            rows = [row for row in csv.reader(file, delimiter=delimiter) if any(cell.strip() for cell in row)]
    except OSError as exc:
        raise SettingsError(f"{path} cannot be read: {exc.strerror}") from exc
    except (UnicodeDecodeError, csv.Error) as exc:
        raise SettingsError(f"{path} is not a CSV file in UTF-8: {exc}") from exc
    if len(rows) < 2:
        raise SettingsError(f"{path} holds no rows")
    header = rows[0]
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise SettingsError(f"{path}: row {number} has {len(row)} columns, the header has {len(header)}")
    return header, rows[1:]


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False  # the reader of CSV files says what is wrong


def _read_parquet(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows as texts; columns of lists or other nested values (vectors) are left out."""
    pyarrow = require_pyarrow()
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise SettingsError(f"{path} has more than 1 GB, which is too much for a table of patches")
        stored = pyarrow.parquet.ParquetFile(path)
        plain = [field.name for field in stored.schema_arrow if not pyarrow.types.is_nested(field.type)]
        if stored.metadata.num_rows * len(plain) > _MOST_CELLS:
            raise SettingsError(
                f"{path} has {stored.metadata.num_rows:,} rows of {len(plain)} columns, which is too much for a table "
                "of patches; leave columns or slides out"
            )
        table = stored.read(columns=plain)
        columns = [["" if value is None else str(value) for value in column.to_pylist()] for column in table.columns]
        header = list(table.column_names)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as exc:
        raise SettingsError(f"{path} is not a Parquet file that can be read: {exc}") from exc
    rows = [list(row) for row in zip(*columns, strict=True)]
    if not rows:
        raise SettingsError(f"{path} holds no rows")
    return header, rows


def _same_slide(text: str, slide: str) -> bool:
    return text.strip() in (slide, f"{slide}.svs") or Path(text.strip()).stem == slide


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
