"""Reader of a matrix with ids in its first column and its header, from text or Parquet, by blocks of rows."""

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
    """A matrix as in its file: `values` float32 [rows, columns], and ids of rows and columns.

    Attributes:
        left_out: columns of annotation, not in `columns`.
        dialect: the format of the text in words, if it is not the usual one.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    source: str
    left_out: tuple[str, ...] = ()
    dialect: str = ""

    def table(self, transposed: bool) -> ModalityTable:
        """The table whose patients are the rows, or the columns if `transposed`."""
        if transposed:
            return ModalityTable(self.columns, self.rows, self.values.T, source=self.source)
        return ModalityTable(self.rows, self.columns, self.values, source=self.source)


def read_matrix(path: str | os.PathLike[str], *, decimal: str = "auto", annotation: Collection[str] = ()) -> RawMatrix:
    """A matrix with ids in its first column and its header, from CSV, TSV or Parquet (`.gz` too for text).

    Args:
        path: the file. Its column separator is inferred; see `sample_of`.
        decimal: "." or ","; "auto": inferred from the numbers, with an error if they are ambiguous.
        annotation: additional columns that are no values; those with known names are always left out.

    Raises:
        DataFileError: the file is no table, a cell is no number (the first one is named), or there are no numbers.
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
            f"{path} has {len(matrix.rows)} rows and {len(matrix.columns)} columns of values: nothing to read"
        )
    return matrix


def read_annotated_matrix(
    path: str | os.PathLike[str], annotation: Collection[str], *, decimal: str = "auto"
) -> ModalityTable:
    """A features x patients text matrix whose columns with names in `annotation` (lower case) are no values.

    Raises:
        DataFileError: as `read_matrix`, or the first column is not one of `annotation`.
    """
    path = Path(path)
    check_file(path)
    try:
        # Formats with annotation columns have no quoting: with quoting, a quote at the start of a field would include
        # all following lines.
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
        # A converter, because pandas would convert names such as "NA" or "nan" to missing values.
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
    while blocks:  # each block is freed after its copy, so that the table is never twice in memory
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
        _dialect(path, sample, numbers),
    )


def _dialect(path: Path, sample: Sample, numbers: Numbers) -> str:
    expected = "," if ".csv" in path.name.lower() else "\t"
    words = [] if sample.separator == expected else [f"separated by {SEPARATOR_NAMES[sample.separator]}"]
    return ", ".join([*words, *filter(None, [numbers.description])])


def _cells(sample: Sample, kept: Sequence[int]) -> Iterable[str]:
    return (row[at] for row in sample.rows for at in kept if at < len(row))


def _plain(cell: Any, numbers: Numbers) -> Any:
    """A number without thousands separators, or the cell itself, for which an error is raised later."""
    if not isinstance(cell, str):
        return cell
    text = plain_number(cell, numbers)
    try:
        return cell if text is None else float(text)
    except ValueError:
        return cell


def _unquoted(name: str, quoting: int) -> str:
    """The name without surrounding blanks, and in formats without quoting also without the quotes that R writes."""
    name = clean_name(name)
    return clean_name(name.strip('"')) if quoting == csv.QUOTE_NONE else name


def not_swallowed(path: Path, cells: Iterable[str]) -> None:
    """Raise `DataFileError` if a cell contains a line break, which is the effect of a quote that is not closed."""
    for cell in cells:
        if "\n" in cell:
            raise DataFileError(
                f"{path}: a double quote before {cell[:30]!r} is not closed in its line, so it includes the following "
                "lines; remove it"
            )


def _column_names(path: Path, sample: Sample) -> list[str]:
    """Names of the columns after the first, as written: pandas would rename the second of two equal names."""
    names = [_unquoted(name, sample.quoting) for name in sample.header]
    first = sample.rows[0] if sample.rows else ()
    if len(first) < 2:
        blanks = any(len(name.split()) > 1 for name in (*sample.header[:1], *first[:1]))
        raise DataFileError(
            f"{path}: ids in the first column and values in the others are expected, separated by "
            f"{SEPARATOR_NAMES[sample.separator]}; its first row has {len(first)} column(s)"
            + ("; blanks are no column separators: use tabs" if blanks else "")
        )
    # With row names, R writes one name less than there are columns. Then every name belongs to a column of values.
    columns = names if len(names) == len(first) - 1 else names[1:]
    if len(columns) != len(first) - 1:
        split = len(names) > 1 and len(first) == 2 * len(names) - 1 and sample.separator == ","
        raise DataFileError(
            f"{path}: {len(names)} names in the header for {len(first)} columns"
            + ("; commas are decimal separators and column separators: use semicolons" if split else "")
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
        # The index of a data frame is an ordinary column here; if it has no name, pandas has given it a special one.
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
        return "if it is a decimal comma, set `decimal` to ','; otherwise remove the thousands separators"
    if all_of_it:
        return f"if it is annotation, set `annotation: [{name!r}]`; for MAF and GISTIC, set `format`"
    return "correct the cell, or leave it empty if nothing was measured"
