"""Tables of one modality, and reading them: patients x features, dense float32 or sparse, one block at a time."""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from exaonepath.errors import DataFileError

# What a text or Parquet file that is damaged, cut off or of another kind is met with: cut-off gzip raises EOFError.
UNREADABLE = (ValueError, OSError, EOFError, zlib.error, csv.Error)
BLOCK_VALUES = 1 << 22  # values held at once beside the table itself: 16 MiB in float32, 32 in the float64 of a parser


@dataclass(frozen=True, eq=False)
class ModalityTable:
    """Measurements of one modality.

    Attributes:
        patients: P patient ids, one a row.
        features: F feature names, one a column.
        values: float32 [P, F]; a scipy CSR matrix where most values are zero. NaN is a value that was not measured.
        scale: what the numbers are ("counts", "tpm", "log", "indicator", "copy-number", "beta", "m-value", "any").
        source: where the table came from, for messages.
    """

    patients: tuple[str, ...]
    features: tuple[str, ...]
    values: Any
    scale: str = "any"
    source: str = ""

    @property
    def is_sparse(self) -> bool:
        """Whether `values` is a CSR matrix."""
        return bool(sparse.issparse(self.values))

    def rows(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 [len(rows), F], dense, of the given rows."""
        part = self.values[np.asarray(rows, dtype=np.intp)]
        return part.toarray() if sparse.issparse(part) else np.ascontiguousarray(part)

    def take(self, rows: Sequence[int] | np.ndarray) -> ModalityTable:
        """The table of the given rows, in that order."""
        rows = np.asarray(rows, dtype=np.intp)
        if np.array_equal(rows, np.arange(len(self.patients))):
            return self
        return replace(self, patients=tuple(self.patients[i] for i in rows), values=self.values[rows])

    def row_blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, float32 [rows, F]) over the whole table, dense, some 16 MiB at a time."""
        step = max(1, BLOCK_VALUES // max(1, len(self.features)))
        for start in range(0, len(self.patients), step):
            rows = slice(start, min(start + step, len(self.patients)))
            part = self.values[rows]
            yield rows, part.toarray() if sparse.issparse(part) else part


def read_frame(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A small table of text (slides, labels) from CSV, TSV or Parquet, every column as it is, ids left as text.

    Raises:
        DataFileError: the file is missing, empty or not a table.
    """
    path = Path(path)
    check_file(path)
    try:
        if _is_parquet(path):
            return pd.read_parquet(path)
        # Ids such as "0012" or "NA" stay what they are: nothing is turned into a number or a missing value here.
        separator = _separator(path)
        frame = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except UNREADABLE as exc:
        raise DataFileError(
            f"{path} cannot be read as a table ({short_reason(exc)}); CSV, TSV or Parquet is expected"
        ) from exc
    if separator == "\t":
        for name in frame.columns:
            _not_swallowed(path, (cell for cell in frame[name] if isinstance(cell, str) and "\t" in cell))
    return frame


@dataclass(frozen=True, eq=False)
class RawMatrix:
    """A matrix as it lies in its file: `values` float32 [rows, columns], and ids of either side."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    source: str

    def table(self, transposed: bool) -> ModalityTable:
        """The table whose patients are the rows, or the columns where `transposed`."""
        if transposed:
            return ModalityTable(self.columns, self.rows, self.values.T, source=self.source)
        return ModalityTable(self.rows, self.columns, self.values, source=self.source)


def read_matrix(path: str | os.PathLike[str]) -> RawMatrix:
    """A matrix with ids in its first column and its header, from CSV, TSV or Parquet (`.gz` too for text).

    Raises:
        DataFileError: not a table, a cell that is no number (the first ones are named), or no column of numbers.
    """
    path = Path(path)
    check_file(path)
    try:
        rows, columns, values = _parquet_matrix(path) if _is_parquet(path) else _text_matrix(path)
    except UNREADABLE as exc:
        raise DataFileError(f"{path} cannot be read as a matrix ({short_reason(exc)})") from exc
    if not rows or not columns:
        raise DataFileError(f"{path} holds {len(rows)} rows and {len(columns)} columns of values: nothing to read")
    return RawMatrix(tuple(rows), tuple(columns), values, str(path))


def read_annotated_matrix(path: str | os.PathLike[str], annotation: Collection[str]) -> ModalityTable:
    """A features x patients matrix of text whose columns of the names in `annotation` (lower case) are not values.

    Raises:
        DataFileError: as `read_matrix`, or the first column is not one of `annotation`.
    """
    path = Path(path)
    check_file(path)
    try:
        rows, columns, values = _text_matrix(path, annotation)
    except UNREADABLE as exc:
        raise DataFileError(f"{path} cannot be read as a matrix ({short_reason(exc)})") from exc
    return ModalityTable(tuple(columns), tuple(rows), values.T, source=str(path))


def _text_matrix(path: Path, annotation: Collection[str] = ()) -> tuple[list[str], list[str], np.ndarray]:
    separator = _separator(path)
    # Formats with annotation columns have no quoting: a quote that begins a field would swallow what follows.
    quoting = csv.QUOTE_NONE if annotation else csv.QUOTE_MINIMAL
    columns = _column_names(path, separator, annotation, quoting)
    kept = [at for at, name in enumerate(columns, 1) if name.lower() not in annotation]
    columns = [columns[at - 1] for at in kept]
    if not columns:
        raise DataFileError(f"{path} has no column of values")
    blocks: list[np.ndarray] = []
    ids: list[str] = []
    reader = pd.read_csv(
        path,
        sep=separator,
        header=None,
        skiprows=1,
        usecols=[0, *kept],
        dtype={0: str},
        chunksize=max(1, BLOCK_VALUES // len(columns)),
        encoding="utf-8-sig",
        quoting=quoting,
    )
    with reader:
        for frame in reader:
            names = ["" if pd.isna(i) else _unquoted(str(i), quoting) for i in frame.iloc[:, 0]]
            _not_swallowed(path, names)
            part = frame.iloc[:, 1:].set_axis(names, axis=0)
            _numbers_only(path, part, columns)
            ids += names
            blocks.append(part.to_numpy(np.float32))
    values = np.empty((len(ids), len(columns)), np.float32)
    start = 0
    while blocks:  # each goes as soon as it is copied, so that the table is not held twice
        part = blocks.pop(0)
        values[start : start + len(part)] = part
        start += len(part)
    return ids, columns, values


def _unquoted(name: str, quoting: int) -> str:
    """The name without blanks around it, and without the quotes that R puts around it where they are no quoting."""
    return name.strip().strip('"') if quoting == csv.QUOTE_NONE else name.strip()


def _not_swallowed(path: Path, cells: Iterable[str]) -> None:
    for cell in cells:
        if "\n" in cell:
            raise DataFileError(
                f"{path}: a double quote before {cell[:30]!r} is not closed in its line and swallows the lines that "
                "follow; remove it"
            )


def _column_names(path: Path, separator: str, annotation: Collection[str], quoting: Any) -> list[str]:
    """Names of the columns after the first, as written: pandas would rename the second of two equal ones."""
    with open_text(path) as file:
        lines = csv.reader(file, delimiter=separator, quoting=quoting)
        names, first = next(lines, []), next(lines, [])
    names = [_unquoted(name, quoting) for name in names]
    if len(first) < 2:
        raise DataFileError(
            f"{path}: ids in the first column and values in the others are expected, separated by "
            f"{'commas' if separator == ',' else 'tabs'}; its first row has {len(first)} column(s)"
        )
    if annotation and (not names or names[0].lower() not in annotation):
        raise DataFileError(f"{path}: the first column is {names[:1]}, one of {sorted(annotation)} is expected")
    # R writes one name fewer than there are columns where row names are kept: then every name is of a value column.
    columns = names if len(names) == len(first) - 1 else names[1:]
    if len(columns) != len(first) - 1:
        raise DataFileError(f"{path}: {len(names)} names in the header for {len(first)} columns")
    return columns


def open_text(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parquet_matrix(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    frame_index = file.schema_arrow.pandas_metadata or {}
    index_names = [name for name in frame_index.get("index_columns", []) if isinstance(name, str)]
    names = [name for name in file.schema_arrow.names if name not in index_names]
    id_column = index_names[0] if index_names else names.pop(0)
    values = np.empty((file.metadata.num_rows, len(names)), np.float32)
    ids: list[str] = []
    start = 0
    for batch in file.iter_batches(batch_size=max(1, BLOCK_VALUES // max(1, len(names)))):
        # A frame's index is a column like any other here: without a name of its own it has an odd one.
        frame = pa.Table.from_batches([batch]).to_pandas(ignore_metadata=True)
        ids += ["" if pd.isna(i) else str(i).strip() for i in frame[id_column]]
        part = frame[names]
        _numbers_only(path, part, names)
        values[start : start + len(part)] = part.to_numpy(np.float32)
        start += len(part)
    return ids, names, values


def _numbers_only(path: Path, part: pd.DataFrame, columns: Sequence[str]) -> None:
    for at, (name, dtype) in enumerate(zip(columns, part.dtypes, strict=True)):
        if pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
            continue
        column = part.iloc[:, at]
        wrong = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        if len(wrong):
            raise DataFileError(
                f"{path}: {wrong.iloc[0]!r} in row {wrong.index[0]!r}, column {name!r} is not a number; annotation "
                "columns must be removed, or the format given (maf, gistic)"
            )


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _separator(path: Path) -> str:
    suffixes = [s.lower() for s in path.suffixes if s.lower() != ".gz"]
    return "," if suffixes and suffixes[-1] == ".csv" else "\t"


def check_file(path: Path) -> None:
    if not path.is_file():
        raise DataFileError(f"{path}: no such file")


def short_reason(exc: BaseException) -> str:
    """What an exception says, in one line of 200 characters at most."""
    return " ".join(str(exc).split())[:200] or type(exc).__name__
