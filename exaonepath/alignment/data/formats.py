"""Readers of molecular profiles in special formats: MAF, GISTIC gene tables, MuData and AnnData."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from exaonepath.alignment.data.dialect import sample_of
from exaonepath.alignment.data.matrices import read_annotated_matrix
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import BLOCK_VALUES, ModalityTable
from exaonepath.alignment.data.text_files import UNREADABLE, check_file, short_reason
from exaonepath.alignment.data.variants import sort_terms
from exaonepath.errors import DataFileError
from exaonepath.files.hdf5 import open_h5_tree
from exaonepath.text import few

_MAF_COLUMNS = ("Hugo_Symbol", "Tumor_Sample_Barcode", "Variant_Classification")
_GISTIC_ANNOTATION = ("gene symbol", "gene id", "locus id", "cytoband")

# Above this share of zeros, a CSR matrix (a value and a column number per entry) is smaller than a dense one.
_SPARSE_FROM = 0.6


def read_maf(path: str | os.PathLike[str], report: CohortReport) -> ModalityTable:
    """Non-silent mutations of a MAF file: patients x genes, 1 where the gene has one, CSR.

    A sample with only silent mutations has a row of zeros. A sample without mutations has no row in a MAF, so it is
    absent.

    Raises:
        DataFileError: the file is no table, or lacks a column of the MAF specification.
    """
    path = Path(path)
    check_file(path)
    try:
        # The format has no quoting: with quoting, a quote at the start of a field would include all following lines.
        # R writes quotes in pairs; they are removed below.
        sample = sample_of(path, csv.QUOTE_NONE)
        named = [_maf_column(name) for name in sample.header]
        missing = [name for name in _MAF_COLUMNS if name not in named]
        if missing:
            raise DataFileError(f"{path} lacks the MAF column(s) {', '.join(missing)}")
        at = {named.index(name): name for name in _MAF_COLUMNS}
        frame = pd.read_csv(
            path,
            sep=sample.separator,
            # Skips "#version 2.4" lines. comment="#" cannot be used, because "#" may occur inside a field.
            skiprows=sample.skip + 1,
            header=None,
            dtype=str,
            keep_default_na=False,
            usecols=sorted(at),
            quoting=csv.QUOTE_NONE,
            encoding="utf-8-sig",
        )
        frame = frame.rename(columns=at).apply(lambda column: column.str.strip('"').map(clean_name))
    except UNREADABLE as exc:
        raise DataFileError(f"{path} cannot be read as a MAF ({short_reason(exc)})") from exc
    changing, unknown = sort_terms(frame["Variant_Classification"])
    if unknown:
        counted = few([f"{term or 'nothing'} ({count})" for term, count in unknown.items()])
        problem = f"{path}: variant class(es) {counted} are neither of the MAF specification nor terms of VEP"
        if sum(unknown.values()) == len(frame):
            raise DataFileError(f"{problem}, and there are no others: it is unknown which variants change a protein")
        report.add("warning", "unknown-variant-class", "snp", f"{problem}; counted as silent")
    samples = sorted(set(frame["Tumor_Sample_Barcode"]))
    hits = frame[frame["Variant_Classification"].isin(list(changing))]
    genes = sorted(set(hits["Hugo_Symbol"]) - {"", "Unknown"})
    hits = hits[hits["Hugo_Symbol"].isin(genes)]
    rows = pd.Index(samples).get_indexer(hits["Tumor_Sample_Barcode"])
    columns = pd.Index(genes).get_indexer(hits["Hugo_Symbol"])
    values = sparse.csr_matrix((np.ones(len(hits), np.float32), (rows, columns)), (len(samples), len(genes)))
    values.data[:] = 1  # the constructor added several mutations of one gene
    report.add(
        "note",
        "read",
        "snp",
        f"{path}: {len(samples)} samples x {len(genes)} genes with a non-silent mutation; {len(frame) - len(hits)} of "
        f"{len(frame)} rows left out as silent",
    )
    return ModalityTable(tuple(samples), tuple(genes), values, "indicator", str(path))


def _maf_column(name: str) -> str:
    """The name of a MAF column as in the specification, ignoring case; other names unchanged."""
    name = clean_name(clean_name(name).strip('"'))
    return {known.lower(): known for known in _MAF_COLUMNS}.get(name.lower(), name)


def format_of_header(names: Sequence[str]) -> str | None:
    """ "maf" or "gistic" if the header of a text table has the columns of that format, for any file name."""
    lower = {clean_name(clean_name(name).strip('"')).lower() for name in names}
    if len({"tumor_sample_barcode", "variant_classification"} & lower) == 2:
        return "maf"
    return "gistic" if {"gene symbol", "cytoband"} <= lower and {"locus id", "gene id"} & lower else None


def read_gistic(path: str | os.PathLike[str], *, decimal: str = "auto") -> ModalityTable:
    """A GISTIC gene table (`all_thresholded.by_genes.txt`, `all_data_by_genes.txt`): patients x genes.

    Columns `Gene Symbol`, then `Locus ID` or `Gene ID`, and `Cytoband`, then one per sample.

    Raises:
        DataFileError: it is not such a table, or a cell is no number.
    """
    table = read_annotated_matrix(path, _GISTIC_ANNOTATION, decimal=decimal)
    return ModalityTable(table.patients, table.features, table.values, "copy-number", table.source)


def read_mudata(path: str | os.PathLike[str]) -> tuple[dict[str, ModalityTable], pd.DataFrame]:
    """All modalities of a MuData file and the table of its patients (`obs`), indexed by patient.

    `X` of every modality is read a block at a time as float32, or kept sparse. Nothing else of the file is read.

    Raises:
        DataFileError: the file is not HDF5, not MuData, or a modality cannot be read.
    """
    path = Path(path)
    with _open(path) as file:
        if "mod" not in file or "obs" not in file:
            raise DataFileError(f"{path} is no MuData file: it has no `mod` and `obs`; an .h5ad holds one modality")
        tables = {name: _annotated(path, name, file["mod"][name]) for name in file["mod"]}
        return tables, _frame(file["obs"])


def modalities_of_mudata(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the modalities of a MuData file; raises `DataFileError` if it is not HDF5."""
    with _open(Path(path)) as file:
        return tuple(file["mod"]) if "mod" in file else ()


def read_anndata(path: str | os.PathLike[str], key: str | None = None) -> ModalityTable:
    """One modality: an .h5ad file, or modality `key` of an .h5mu file.

    Raises:
        DataFileError: it is not such a file, or has no such modality.
    """
    path = Path(path)
    with _open(path) as file:
        if "mod" not in file:
            return _annotated(path, path.stem, file)
        if key is None or key not in file["mod"]:
            raise DataFileError(f"{path} has the modalities {sorted(file['mod'])}; name one with `key`, not {key!r}")
        return _annotated(path, key, file["mod"][key])


def _annotated(path: Path, name: str, group: h5py.Group) -> ModalityTable:
    missing = [part for part in ("X", "obs", "var") if part not in group]
    if missing:
        raise DataFileError(f"{path}: modality {name!r} lacks {', '.join(missing)}")
    patients, features = (tuple(clean_name(i) for i in _frame(group[part]).index) for part in ("obs", "var"))
    x = group["X"]
    values = read_dense(x) if isinstance(x, h5py.Dataset) else _sparse(x)
    if values.shape != (len(patients), len(features)):
        raise DataFileError(
            f"{path}: X of modality {name!r} is {list(values.shape)} for {len(patients)} patients and "
            f"{len(features)} features"
        )
    return ModalityTable(patients, features, values, source=f"{path}:{name}")


def read_dense(dataset: h5py.Dataset) -> np.ndarray:
    """float32 [P, F] of an HDF5 dataset of numbers, without loading all of it in its stored, wider dtype."""
    if dataset.ndim != 2 or dataset.dtype.kind not in "fiub":
        kind = f"{dataset.dtype} {list(dataset.shape)}"
        raise DataFileError(f"{dataset.file.filename}: {dataset.name} is {kind}, not a matrix of numbers")
    values = np.empty(dataset.shape, np.float32)
    step = max(1, BLOCK_VALUES // max(1, dataset.shape[1]))
    for start in range(0, len(values), step):
        values[start : start + step] = dataset[start : start + step]
    return values


def sparse_where_smaller(table: ModalityTable) -> ModalityTable:
    """The table with its values as a dense array or CSR matrix, whichever needs less memory."""
    if table.is_sparse:
        density = table.values.nnz / max(1, len(table.patients) * len(table.features))
        if density <= 1 - _SPARSE_FROM:
            return table
        return ModalityTable(table.patients, table.features, table.values.toarray(), table.scale, table.source)
    zeros = sum(int((block == 0).sum()) for _, block in table.row_blocks())
    if zeros < _SPARSE_FROM * max(1, table.values.size):
        return table
    return ModalityTable(table.patients, table.features, sparse.csr_matrix(table.values), table.scale, table.source)


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """`open_h5_tree` for files of other programs: the advice in the message is to download them again."""
    ours: DataFileError | None = None
    try:
        with open_h5_tree(path) as file:
            try:
                yield file
            except DataFileError as exc:
                ours = exc
                raise
    except DataFileError as exc:
        if exc is ours or exc.__cause__ is None:
            raise
        raise DataFileError(
            f"{path} cannot be read as HDF5 ({short_reason(exc.__cause__)}); it is corrupt or half written: copy or "
            "download it again"
        ) from exc.__cause__


def _element(group: Any) -> Any:
    try:
        return read_elem(group)
    except MemoryError:
        raise
    # anndata raises errors of many types for a damaged or unknown element, and some of them are private.
    except Exception as exc:
        raise DataFileError(
            f"{group.file.filename}: {group.name} cannot be read as a part of AnnData ({short_reason(exc)}); write the "
            "file again with anndata or mudata"
        ) from exc


def _sparse(group: h5py.Group) -> sparse.csr_matrix:
    values = _element(group)
    if not sparse.issparse(values) or values.format not in ("csr", "csc"):
        raise DataFileError(f"{group.file.filename}: {group.name} is neither a dense nor a CSR or CSC matrix")
    try:
        # Without this check, later steps would use indices outside the matrix to access other memory.
        values.check_format(full_check=True)
    except ValueError as exc:
        raise DataFileError(f"{group.file.filename}: {group.name} is a damaged sparse matrix ({exc})") from exc
    return sparse.csr_matrix(values, dtype=np.float32)


def _frame(group: Any) -> pd.DataFrame:
    frame = _element(group)
    if not isinstance(frame, pd.DataFrame):
        raise DataFileError(f"{group.file.filename}: {group.name} is not a table")
    return frame
