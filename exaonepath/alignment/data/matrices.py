"""Reading a matrix with ids in its first column and its header, from text or Parquet, a block of rows at a time."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from exaonepath.alignment.data import tables
from exaonepath.alignment.data.annotation import is_annotation
from exaonepath.alignment.data.dialect import SEPARATOR_NAMES, Numbers, Sample, numbers_of, plain_number, sample_of
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.alignment.data.text_files import UNREADABLE, check_file, is_parquet, short_reason
from exaonepath.errors import DataFileError


@dataclass(frozen=True, eq=False)
class RawMatrix:
    """A matrix as it lies in its file: `values` float32 [rows, columns], and ids of either side.

    Attributes:
        left_out: columns of annotation, not among `columns`.
        told: how the file is written, where that is not the usual way.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    source: str
    left_out: tuple[str, ...] = ()
    told: str = ""

    def table(self, transposed: bool) -> ModalityTable:
        """The table whose patients are the rows, or the columns where `transposed`."""
        if transposed:
            return ModalityTable(self.columns, self.rows, self.values.T, source=self.source)
        return ModalityTable(self.rows, self.columns, self.values, source=self.source)


def read_matrix(path: str | os.PathLike[str], *, decimal: str = "auto", annotation: Collection[str] = ()) -> RawMatrix:
    """A matrix with ids in its first column and its header, from CSV, TSV or Parquet (`.gz` too for text).

    Args:
        path: the file. What separates its columns is found out; see `sample_of`.
        decimal: "." or ","; "auto" looks at the numbers, and refuses what can be read in two ways.
        annotation: further columns that are no values; those of known names are left out anyway.

    Raises:
        DataFileError: not a table, a cell that is no number (the first ones are named), or no column of numbers.
    """
    path = Path(path)
    check_file(path)
    try:
        if is_parquet(path):
            matrix = _parquet_matrix(path, annotation)
        else:
            sample = sample_of(path)
            columns = _column_names(path, sample)
            kept = [at for at, name in enumerate(columns, 1) if not is_annotation(name, annotation)]
            matrix = _text_matrix(path, sample, columns, kept, decimal)
    except UNREADABLE as exc:
        raise DataFileError(f"{path} cannot be read as a matrix ({short_reason(exc)})") from exc
    if not matrix.rows or not matrix.columns:
        raise DataFileError(
            f"{path} holds {len(matrix.rows)} rows and {len(matrix.columns)} columns of values: nothing to read"
        )
    return matrix


def read_annotated_matrix(
    path: str | os.PathLike[str], annotation: Collection[str], *, decimal: str = "auto"
) -> ModalityTable:
    """A features x patients matrix of text whose columns of the names in `annotation` (lower case) are not values.

    Raises:
        DataFileError: as `read_matrix`, or the first column is not one of `annotation`.
    """
    path = Path(path)
    check_file(path)
    try:
        # Formats with annotation columns have no quoting: a quote that begins a field would swallow what follows.
        sample = sample_of(path, csv.QUOTE_NONE)
        columns = _column_names(path, sample)
        first = _unquoted(sample.header[0], sample.quoting)
        if first.lower() not in annotation:
            raise DataFileError(f"{path}: the first column is {[first]}, one of {sorted(annotation)} is expected")
        kept = [at for at, name in enumerate(columns, 1) if name.lower() not in annotation]
        matrix = _text_matrix(path, sample, columns, kept, decimal)
    except UNREADABLE as exc:
        raise DataFileError(f"{path} cannot be read as a matrix ({short_reason(exc)})") from exc
    return matrix.table(transposed=True)


def _text_matrix(path: Path, sample: Sample, columns: list[str], kept: list[int], decimal: str) -> RawMatrix:
    names = [columns[at - 1] for at in kept]
    if not names:
        raise DataFileError(f"{path} has no column of values")
    numbers = numbers_of(path, _cells(sample, kept), decimal)
    marked = numbers.thousands is not None
    blocks: list[np.ndarray] = []
    ids: list[str] = []
    reader = pd.read_csv(
        path,
        sep=sample.separator,
        header=None,
        skiprows=sample.skip + 1,
        usecols=[0, *kept],
        # A converter, since what pandas takes for missing among values ("NA", "nan") may well be a name.
        converters={0: lambda name: _unquoted(name, sample.quoting)},
        dtype=dict.fromkeys(kept, str) if marked else None,
        decimal="." if marked else numbers.decimal,
        chunksize=max(1, tables.BLOCK_VALUES // len(names)),
        encoding="utf-8-sig",
        quoting=sample.quoting,
    )
    with reader:
        for frame in reader:
            rows = list(frame.iloc[:, 0])
            not_swallowed(path, rows)
            part = frame.iloc[:, 1:].set_axis(rows, axis=0)
            if marked:
                part = part.apply(lambda column: column.map(lambda cell: _plain(cell, numbers)))
            _numbers_only(path, part, names)
            ids += rows
            blocks.append(part.to_numpy(np.float32))
    values = np.empty((len(ids), len(names)), np.float32)
    start = 0
    while blocks:  # each goes as soon as it is copied, so that the table is not held twice
        block = blocks.pop(0)
        values[start : start + len(block)] = block
        start += len(block)
    dropped = set(range(1, len(columns) + 1)).difference(kept)
    return RawMatrix(
        tuple(ids),
        tuple(names),
        values,
        str(path),
        tuple(columns[at - 1] for at in sorted(dropped)),
        _told(path, sample, numbers),
    )


def _told(path: Path, sample: Sample, numbers: Numbers) -> str:
    expected = "," if ".csv" in path.name.lower() else "\t"
    words = [] if sample.separator == expected else [f"separated by {SEPARATOR_NAMES[sample.separator]}"]
    return ", ".join([*words, *filter(None, [numbers.told])])


def _cells(sample: Sample, kept: Sequence[int]) -> Iterable[str]:
    return (row[at] for row in sample.rows for at in kept if at < len(row))


def _plain(cell: Any, numbers: Numbers) -> Any:
    """A number without marks between thousands, or the cell itself, which then is told to be no number."""
    if not isinstance(cell, str):
        return cell
    text = plain_number(cell, numbers)
    try:
        return cell if text is None else float(text)
    except ValueError:
        return cell


def _unquoted(name: str, quoting: int) -> str:
    """The name without blanks around it, and without the quotes that R puts around it where they are no quoting."""
    name = clean_name(name)
    return clean_name(name.strip('"')) if quoting == csv.QUOTE_NONE else name


def not_swallowed(path: Path, cells: Iterable[str]) -> None:
    """Raise `DataFileError` where a cell holds a line break: a quote that was not closed."""
    for cell in cells:
        if "\n" in cell:
            raise DataFileError(
                f"{path}: a double quote before {cell[:30]!r} is not closed in its line and swallows the lines that "
                "follow; remove it"
            )


def _column_names(path: Path, sample: Sample) -> list[str]:
    """Names of the columns after the first, as written: pandas would rename the second of two equal ones."""
    names = [_unquoted(name, sample.quoting) for name in sample.header]
    first = sample.rows[0] if sample.rows else ()
    if len(first) < 2:
        blanks = any(len(name.split()) > 1 for name in (*sample.header[:1], *first[:1]))
        raise DataFileError(
            f"{path}: ids in the first column and values in the others are expected, separated by "
            f"{SEPARATOR_NAMES[sample.separator]}; its first row has {len(first)} column(s)"
            + ("; blanks do not separate columns: write it with tabs" if blanks else "")
        )
    # R writes one name fewer than there are columns where row names are kept: then every name is of a value column.
    columns = names if len(names) == len(first) - 1 else names[1:]
    if len(columns) != len(first) - 1:
        split = len(names) > 1 and len(first) == 2 * len(names) - 1 and sample.separator == ","
        raise DataFileError(
            f"{path}: {len(names)} names in the header for {len(first)} columns"
            + ("; commas stand for decimals as well as between columns: write it with semicolons" if split else "")
        )
    return columns


def _parquet_matrix(path: Path, annotation: Collection[str]) -> RawMatrix:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    frame_index = file.schema_arrow.pandas_metadata or {}
    index_names = [name for name in frame_index.get("index_columns", []) if isinstance(name, str)]
    names = [name for name in file.schema_arrow.names if name not in index_names]
    id_column = index_names[0] if index_names else names.pop(0)
    left_out = [name for name in names if is_annotation(clean_name(name), annotation)]
    names = [name for name in names if name not in left_out]
    values = np.empty((file.metadata.num_rows, len(names)), np.float32)
    ids: list[str] = []
    start = 0
    for batch in file.iter_batches(batch_size=max(1, tables.BLOCK_VALUES // max(1, len(names)))):
        # A frame's index is a column like any other here: without a name of its own it has an odd one.
        frame = pa.Table.from_batches([batch]).to_pandas(ignore_metadata=True)
        ids += ["" if pd.isna(i) else clean_name(i) for i in frame[id_column]]
        part = frame[names]
        _numbers_only(path, part, names)
        values[start : start + len(part)] = part.to_numpy(np.float32)
        start += len(part)
    return RawMatrix(tuple(ids), tuple(map(clean_name, names)), values, str(path), tuple(left_out))


def _numbers_only(path: Path, part: pd.DataFrame, columns: Sequence[str]) -> None:
    for at, (name, dtype) in enumerate(zip(columns, part.dtypes, strict=True)):
        if pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
            continue
        column = part.iloc[:, at]
        wrong = column[pd.to_numeric(column, errors="coerce").isna() & column.notna()]
        if len(wrong):
            raise DataFileError(
                f"{path}: {wrong.iloc[0]!r} in row {wrong.index[0]!r}, column {name!r} is not a number; "
                + _advice(str(wrong.iloc[0]), name, len(wrong) == column.notna().sum())
            )


def _advice(cell: str, name: str, all_of_it: bool) -> str:
    if "," in cell and any(character.isdigit() for character in cell):
        return "where it is a decimal comma, set `decimal` to ','; marks between thousands must be removed otherwise"
    if all_of_it:
        return f"a column of annotation is left out by `annotation: [{name!r}]`; MAF and GISTIC by `format`"
    return "mend the cell, or leave it empty where nothing was measured"
