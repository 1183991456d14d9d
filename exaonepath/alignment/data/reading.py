"""Read the files of a cohort's molecular tables, each by its format, with patients in the rows of all matrices."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from exaonepath.alignment.data.annotation import ask_about_strangers, note_left_out, without_annotation
from exaonepath.alignment.data.config import CohortConfig, ModalitySource
from exaonepath.alignment.data.dialect import sample_of
from exaonepath.alignment.data.formats import format_of_header, read_anndata, read_gistic, read_maf, read_mudata
from exaonepath.alignment.data.frames import read_frame
from exaonepath.alignment.data.id_columns import patient_column, patient_column_of_slides
from exaonepath.alignment.data.matrices import RawMatrix, read_matrix
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.orientation import is_feature_name, orient
from exaonepath.alignment.data.patient_ids import tcga_patient
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.alignment.data.text_files import UNREADABLE, is_parquet
from exaonepath.errors import DataFileError, ExaonePathError
from exaonepath.text import few


def read_tables(config: CohortConfig, report: CohortReport) -> tuple[dict[str, ModalityTable], pd.DataFrame]:
    """Tables by modality, in the order of `CohortConfig.omics`, and the `obs` of the MuData file.

    Errors are added to the report. Ids are as in the files: samples are not yet converted to patients.
    """
    tables: dict[str, ModalityTable] = {}
    obs = pd.DataFrame()
    if config.mudata is not None:
        try:
            found, obs = read_mudata(config.mudata)
        except ExaonePathError as exc:
            report.add("error", "unreadable", "cohort", str(exc))
            found = {}
        tables = {name: found[name] for name in config.omics if name in found}
        others = sorted(set(found) - set(config.omics))
        if others:
            report.add(
                "warning" if tables else "error",
                "unknown-modality",
                "cohort",
                f"{config.mudata} has modalities with other names, which were left out: {few(others)}; known are "
                f"{', '.join(config.omics)} (name one in `further_modalities`, or through `modalities` with its `key`)",
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
    people, labels = _named(config)
    patients = people.union(obs.index.map(clean_name), *(table.patients for table in tables.values()))
    features = frozenset().union(*(table.features for table in tables.values()))
    sources = {name: config.modalities[name] for name in matrices}
    oriented = orient(
        matrices,
        {name: source.orientation for name, source in sources.items()},
        report,
        patients=patients,
        features=features,
    )
    for name, table in oriented.items():
        if matrices[name].left_out:
            note_left_out(name, table.source, matrices[name].left_out, report)
        oriented[name] = without_annotation(name, table, sources[name].annotation or (), report)
    ask_about_strangers(
        oriented,
        {name: source.annotation for name, source in sources.items()},
        report,
        patients=patients,
        features=features,
        labels=[label for label in labels.union(map(str, obs.columns)) if not is_feature_name(label)],
        same=_patient_of_barcode if config.patient_ids == "tcga" else str,
    )
    tables |= oriented
    if absent := [name for name in config.further_modalities if name not in tables and not report.errors]:
        report.add(
            "error",
            "no-modality",
            "cohort",
            f"further_modalities names {', '.join(absent)}, but neither the .h5mu file nor `modalities` has it",
        )
    return {name: tables[name] for name in config.omics if name in tables}, obs


def _patient_of_barcode(sample: str) -> str:
    found = tcga_patient(sample)
    return sample if found is None else found[0]


def _read(name: str, source: ModalitySource, report: CohortReport) -> ModalityTable | RawMatrix:
    kind = source.format if source.format != "auto" else _format(Path(source.path))
    if kind == "maf":
        if name != "snp":
            raise DataFileError(f"{source.path} is a MAF, which contains mutations: it is for snp, not for {name}")
        return read_maf(source.path, report)
    if kind == "gistic":
        return read_gistic(source.path, decimal=source.decimal)
    if kind == "anndata":
        return read_anndata(source.path, source.key or name)
    return read_matrix(source.path, decimal=source.decimal, annotation=source.annotation or ())


def _format(path: Path) -> str:
    """The format, inferred from the file name, or from the header if the name is not specific."""
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".maf") or name.endswith(".maf.txt"):
        return "maf"
    if name.endswith("by_genes.txt"):
        return "gistic"
    if name.endswith((".h5ad", ".h5mu")):
        return "anndata"
    try:
        header = sample_of(path).header if path.is_file() and not is_parquet(path) else ()
    except UNREADABLE:
        header = ()  # the reader of the file raises the error
    return format_of_header(header) or "matrix"


def _named(config: CohortConfig) -> tuple[set[str], set[str]]:
    """Patients in the tables of slides and labels, and columns of the labels.

    They are used to find the orientation and the annotation of a matrix. The tables themselves are checked later.
    """
    ids: set[str] = set()
    columns: set[str] = set()
    for path, column_of in ((config.slides, patient_column_of_slides), (config.labels, patient_column)):
        if path is None:
            continue
        try:
            frame = read_frame(path)
            column = column_of(list(map(str, frame.columns)), str(path), config.id_column)
        except ExaonePathError:
            continue
        ids.update(frame[column].map(clean_name))
        if path == config.labels:
            columns.update(str(name) for name in frame.columns if name != column)
    return ids - {""}, columns
