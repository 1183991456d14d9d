"""The files of a cohort's molecular tables, each by its format, all matrices turned the same way round."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from exaonepath.alignment.data.config import OMICS, CohortConfig, ModalitySource
from exaonepath.alignment.data.formats import read_anndata, read_gistic, read_maf, read_mudata
from exaonepath.alignment.data.orientation import orient
from exaonepath.alignment.data.report import CohortReport, some
from exaonepath.alignment.data.tables import ModalityTable, RawMatrix, read_frame, read_matrix
from exaonepath.errors import ExaonePathError


def read_tables(config: CohortConfig, report: CohortReport) -> tuple[dict[str, ModalityTable], pd.DataFrame]:
    """Tables by modality, in the order of `OMICS`, and the `obs` of the MuData file; what cannot be read is reported.

    Ids are as in the files: samples are not yet patients.
    """
    tables: dict[str, ModalityTable] = {}
    obs = pd.DataFrame()
    if config.mudata is not None:
        try:
            found, obs = read_mudata(config.mudata)
        except ExaonePathError as exc:
            report.add("error", "unreadable", "cohort", str(exc))
            found = {}
        tables = {name: found[name] for name in OMICS if name in found}
        others = sorted(set(found) - set(OMICS))
        if others:
            report.add(
                "warning" if tables else "error",
                "unknown-modality",
                "cohort",
                f"{config.mudata} holds modalities of other names, left out: {some(others)}; known are "
                f"{', '.join(OMICS)} (name one through `modalities` with its `key`)",
            )
    matrices: dict[str, RawMatrix] = {}
    for name, source in config.modalities.items():
        tables.pop(name, None)
        try:
            read = _read(name, source, report)
        except ExaonePathError as exc:
            report.add("error", "unreadable", name, str(exc))
            continue
        if isinstance(read, RawMatrix):
            matrices[name] = read
        else:
            tables[name] = read
    patients = _ids(config).union(obs.index.astype(str), *(table.patients for table in tables.values()))
    features = frozenset().union(*(table.features for table in tables.values()))
    told = {name: config.modalities[name].orientation for name in matrices}
    tables |= orient(matrices, told, report, patients=patients, features=features)
    return {name: tables[name] for name in OMICS if name in tables}, obs


def _read(name: str, source: ModalitySource, report: CohortReport) -> ModalityTable | RawMatrix:
    kind = source.format if source.format != "auto" else _format(Path(source.path))
    if kind == "maf":
        return read_maf(source.path, report)
    if kind == "gistic":
        return read_gistic(source.path)
    if kind == "anndata":
        return read_anndata(source.path, source.key or name)
    return read_matrix(source.path)


def _format(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".maf") or name.endswith(".maf.txt"):
        return "maf"
    if name.endswith("by_genes.txt"):
        return "gistic"
    return "anndata" if name.endswith((".h5ad", ".h5mu")) else "matrix"


def _ids(config: CohortConfig) -> set[str]:
    """Patient ids that the tables of slides and labels name: they tell how a matrix lies (checked later)."""
    ids: set[str] = set()
    for path in (config.slides, config.labels):
        try:
            frame = None if path is None else read_frame(path)
        except ExaonePathError:
            continue
        if frame is None:
            continue
        for column in frame.columns:
            if str(column).strip().lower() == "patient":
                ids.update(frame[column].astype(str).str.strip())
    return ids - {""}
