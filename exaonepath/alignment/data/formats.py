"""Formats that carry molecular profiles under names of their own: MAF, GISTIC gene tables, MuData and AnnData."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.io import read_elem
from scipy import sparse

from exaonepath.alignment.data.report import CohortReport, some
from exaonepath.alignment.data.tables import (
    BLOCK_VALUES,
    UNREADABLE,
    ModalityTable,
    check_file,
    open_text,
    read_annotated_matrix,
    short_reason,
)
from exaonepath.errors import DataFileError
from exaonepath.files.hdf5 import open_h5_tree

# Variant classes of the MAF specification that change the protein (or its splicing), as maftools takes them.
NON_SILENT = frozenset(
    {
        "Frame_Shift_Del",
        "Frame_Shift_Ins",
        "In_Frame_Del",
        "In_Frame_Ins",
        "Missense_Mutation",
        "Nonsense_Mutation",
        "Nonstop_Mutation",
        "Splice_Site",
        "Translation_Start_Site",
    }
)
_SILENT = frozenset(
    {
        "3'Flank",
        "3'UTR",
        "5'Flank",
        "5'UTR",
        "De_novo_Start_InFrame",
        "De_novo_Start_OutOfFrame",
        "IGR",
        "Intron",
        "RNA",
        "Silent",
        "Splice_Region",
        "Targeted_Region",
        "Start_Codon_SNP",
        "lincRNA",
    }
)
_MAF_COLUMNS = ("Hugo_Symbol", "Tumor_Sample_Barcode", "Variant_Classification")
_GISTIC_ANNOTATION = ("gene symbol", "gene id", "locus id", "cytoband")

# Above this share of zeros a CSR matrix (a value and a column number each) is the smaller of the two.
_SPARSE_FROM = 0.6


def read_maf(path: str | os.PathLike[str], report: CohortReport) -> ModalityTable:
    """Non-silent mutations of a MAF file: patients x genes, 1 where the gene has one, CSR.

    A sample that has silent mutations only is there, with zeros; one without any row is not in a MAF, and hence absent.

    Raises:
        DataFileError: not a table, or it lacks a column of the MAF specification.
    """
    path = Path(path)
    check_file(path)
    try:
        # "#version 2.4" lines come first; other "#" characters may stand inside a field, so comment="#" will not do.
        with open_text(path) as file:
            skip = 0
            while file.readline().startswith("#"):
                skip += 1
        # The format has no quoting: a quote that begins a field would swallow what follows. R writes some in pairs.
        frame = pd.read_csv(
            path,
            sep="\t",
            skiprows=skip,
            dtype=str,
            keep_default_na=False,
            usecols=lambda name: name.strip('"') in _MAF_COLUMNS,
            quoting=csv.QUOTE_NONE,
            encoding="utf-8-sig",
        )
        frame = frame.rename(columns=lambda name: name.strip('"')).apply(lambda column: column.str.strip('"'))
    except UNREADABLE as exc:
        raise DataFileError(f"{path} cannot be read as a MAF ({short_reason(exc)})") from exc
    missing = [name for name in _MAF_COLUMNS if name not in frame.columns]
    if missing:
        raise DataFileError(f"{path} lacks the MAF column(s) {', '.join(missing)}")
    classes = set(frame["Variant_Classification"])
    unknown = sorted(classes - NON_SILENT - _SILENT)
    if unknown:
        report.add(
            "warning",
            "unknown-variant-class",
            "snp",
            f"{path}: variant class(es) {some(unknown)} are not of the MAF specification; counted as silent",
        )
    samples = sorted(set(frame["Tumor_Sample_Barcode"]))
    hits = frame[frame["Variant_Classification"].isin(list(NON_SILENT))]
    genes = sorted(set(hits["Hugo_Symbol"]) - {"", "Unknown"})
    hits = hits[hits["Hugo_Symbol"].isin(genes)]
    rows = pd.Index(samples).get_indexer(hits["Tumor_Sample_Barcode"])
    columns = pd.Index(genes).get_indexer(hits["Hugo_Symbol"])
    values = sparse.csr_matrix((np.ones(len(hits), np.float32), (rows, columns)), (len(samples), len(genes)))
    values.data[:] = 1  # several mutations of one gene were added up
    report.add(
        "note",
        "read",
        "snp",
        f"{path}: {len(samples)} samples x {len(genes)} genes with a non-silent mutation; {len(frame) - len(hits)} of "
        f"{len(frame)} rows left out as silent",
    )
    return ModalityTable(tuple(samples), tuple(genes), values, "indicator", str(path))


def read_gistic(path: str | os.PathLike[str]) -> ModalityTable:
    """A GISTIC gene table (`all_thresholded.by_genes.txt`, `all_data_by_genes.txt`): patients x genes.

    Columns `Gene Symbol`, then `Locus ID` or `Gene ID`, and `Cytoband`, then one a sample.

    Raises:
        DataFileError: not such a table, or a cell is no number.
    """
    table = read_annotated_matrix(path, _GISTIC_ANNOTATION)
    return ModalityTable(table.patients, table.features, table.values, "copy-number", table.source)


def read_mudata(path: str | os.PathLike[str]) -> tuple[dict[str, ModalityTable], pd.DataFrame]:
    """All modalities of a MuData file and the table of its patients (`obs`), indexed by patient.

    `X` of every modality is read a block at a time as float32, or kept sparse. Nothing else of the file is read.

    Raises:
        DataFileError: not HDF5, not MuData, or a modality that cannot be read.
    """
    path = Path(path)
    with _open(path) as file:
        if "mod" not in file or "obs" not in file:
            raise DataFileError(f"{path} is no MuData file: it has no `mod` and `obs`; an .h5ad holds one modality")
        tables = {name: _annotated(path, name, file["mod"][name]) for name in file["mod"]}
        return tables, _frame(file["obs"])


def read_anndata(path: str | os.PathLike[str], key: str | None = None) -> ModalityTable:
    """One modality: an .h5ad file, or modality `key` of an .h5mu file.

    Raises:
        DataFileError: not such a file, or no such modality in it.
    """
    path = Path(path)
    with _open(path) as file:
        if "mod" not in file:
            return _annotated(path, path.stem, file)
        if key is None or key not in file["mod"]:
            raise DataFileError(f"{path} holds the modalities {sorted(file['mod'])}; say which with `key`, not {key!r}")
        return _annotated(path, key, file["mod"][key])


def _annotated(path: Path, name: str, group: h5py.Group) -> ModalityTable:
    missing = [part for part in ("X", "obs", "var") if part not in group]
    if missing:
        raise DataFileError(f"{path}: modality {name!r} lacks {', '.join(missing)}")
    patients, features = (tuple(str(i).strip() for i in _frame(group[part]).index) for part in ("obs", "var"))
    x = group["X"]
    values = read_dense(x) if isinstance(x, h5py.Dataset) else _sparse(x)
    if values.shape != (len(patients), len(features)):
        raise DataFileError(
            f"{path}: X of modality {name!r} is {list(values.shape)} for {len(patients)} patients and "
            f"{len(features)} features"
        )
    return ModalityTable(patients, features, values, source=f"{path}:{name}")


def read_dense(dataset: h5py.Dataset) -> np.ndarray:
    """float32 [P, F] of an HDF5 dataset of numbers, without holding it in its stored, wider type."""
    if dataset.ndim != 2 or dataset.dtype.kind not in "fiub":
        kind = f"{dataset.dtype} {list(dataset.shape)}"
        raise DataFileError(f"{dataset.file.filename}: {dataset.name} is {kind}, not a matrix of numbers")
    values = np.empty(dataset.shape, np.float32)
    step = max(1, BLOCK_VALUES // max(1, dataset.shape[1]))
    for start in range(0, len(values), step):
        values[start : start + step] = dataset[start : start + step]
    return values


def sparse_where_smaller(table: ModalityTable) -> ModalityTable:
    """The table with its values in whichever of dense and CSR takes less memory."""
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
    """`open_h5` for files that come from elsewhere: they cannot be made again by a stage of ours."""
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
    # What anndata makes of a damaged or foreign part is of many types, some private.
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
        # Indices that point outside would be followed by any further step, into memory that is not the matrix's.
        values.check_format(full_check=True)
    except ValueError as exc:
        raise DataFileError(f"{group.file.filename}: {group.name} is a damaged sparse matrix ({exc})") from exc
    return sparse.csr_matrix(values, dtype=np.float32)


def _frame(group: Any) -> pd.DataFrame:
    frame = _element(group)
    if not isinstance(frame, pd.DataFrame):
        raise DataFileError(f"{group.file.filename}: {group.name} is not a table")
    return frame
