"""A cohort: patients, their molecular tables, their slides and labels, checked as a whole before training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from exaonepath.cohort.checks import check_table
from exaonepath.cohort.config import MODALITIES, OMICS, WSI, CohortConfig, ModalitySource
from exaonepath.cohort.formats import read_anndata, read_gistic, read_maf, read_mudata, sparse_where_smaller
from exaonepath.cohort.patient_ids import tcga_patient, to_patients
from exaonepath.cohort.report import CohortReport, some
from exaonepath.cohort.slides import SlideTable, read_slides
from exaonepath.cohort.tables import ModalityTable, read_frame, read_matrix
from exaonepath.errors import ExaonePathError, SettingsError


@dataclass(frozen=True, eq=False)
class Cohort:
    """Patients and what is known of each.

    Attributes:
        patients: sorted ids, every one with at least the asked number of modalities.
        modalities: tables of those of `OMICS` that are there; their patients are a sorted part of `patients`.
        slides: slides of these patients.
        labels: one row a patient, in the order of `patients`; NaN where nothing is known.
        report: what the checks found.
    """

    patients: tuple[str, ...]
    modalities: dict[str, ModalityTable]
    slides: SlideTable
    labels: pd.DataFrame
    report: CohortReport = field(default_factory=CohortReport, compare=False)

    def availability(self) -> np.ndarray:
        """bool [P, 5]: which of `MODALITIES` a patient has."""
        index = {patient: at for at, patient in enumerate(self.patients)}
        out = np.zeros((len(self.patients), len(MODALITIES)), bool)
        for column, name in enumerate(MODALITIES):
            table = self.slides if name == WSI else self.modalities.get(name)
            for patient in () if table is None else table.patients:
                out[index[patient], column] = True
        return out

    def subset(self, patients: Iterable[str]) -> Cohort:
        """The cohort of these patients (sorted, each once).

        Raises:
            SettingsError: a patient is not of this cohort.
        """
        wanted = set(patients)
        unknown = sorted(wanted - set(self.patients))
        if unknown:
            raise SettingsError(f"{len(unknown)} patient(s) are not in the cohort: {some(unknown)}")
        keep = [at for at, patient in enumerate(self.patients) if patient in wanted]
        return Cohort(
            tuple(self.patients[at] for at in keep),
            {name: _rows_of(table, wanted) for name, table in self.modalities.items()},
            SlideTable(tuple(slide for slide in self.slides.slides if slide.patient in wanted)),
            self.labels.iloc[keep],
            self.report,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of ids, feature names, values and slide names: equal cohorts have equal ones, wherever they lie.

        Patch features count by their number and width only: reading them all would take as long as an epoch.
        """
        digest = hashlib.sha256()
        for name in sorted(self.modalities):
            table = self.modalities[name]
            digest.update("\n".join((name, table.scale, *table.patients, "", *table.features, "")).encode())
            for _, block in table.row_blocks():
                digest.update(np.ascontiguousarray(block).tobytes())
        for slide in self.slides.slides:
            digest.update(f"{slide.patient}\t{slide.slide}\t{slide.n_patches}\t{slide.dim}\n".encode())
        digest.update(self.labels.to_csv().encode())
        return digest.hexdigest()


def load_cohort(config: CohortConfig) -> Cohort:
    """Read and check a cohort.

    Every check runs, whatever the others found, so one call tells all there is to mend. Warnings and notes go to the
    log and stay in `Cohort.report`.

    Raises:
        CohortError: it cannot be used; the message lists every reason with the ids concerned, and how many more.
    """
    report = CohortReport()
    tables, labels = _read_tables(config, report)
    checked: dict[str, ModalityTable] = {}
    for name, table in tables.items():
        source = config.modalities.get(name)
        table = to_patients(table, config.patient_ids, name, report)
        table = check_table(
            name,
            table,
            report,
            scale=config.scales.get(name) if source is None else source.scale,
            missing=config.missing,
            duplicate_features="error" if source is None else source.duplicate_features,
        )
        checked[name] = sparse_where_smaller(table)
    slides = SlideTable()
    if config.slides is not None:
        slides = read_slides(
            config.slides,
            report,
            patient_ids=config.patient_ids,
            expected_dim=config.feature_dim,
            check=config.check_features,
        )
    labels = _add_labels(labels, config, report)
    cohort = _assemble(checked, slides, labels, config.min_modalities, report)
    report.log()
    report.raise_errors()
    return cohort


def _read_tables(config: CohortConfig, report: CohortReport) -> tuple[dict[str, ModalityTable], pd.DataFrame]:
    tables: dict[str, ModalityTable] = {}
    labels = pd.DataFrame()
    if config.mudata is not None:
        try:
            found, labels = read_mudata(config.mudata)
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
    known = frozenset(labels.index.astype(str)).union(*(table.patients for table in tables.values()), _ids(config))

    def is_patient(name: str) -> bool:
        return name in known or (config.patient_ids == "tcga" and tcga_patient(name) is not None)

    for name, source in config.modalities.items():
        try:
            tables[name] = _read_source(name, source, is_patient, report)
        except ExaonePathError as exc:
            report.add("error", "unreadable", name, str(exc))
            tables.pop(name, None)
    return {name: tables[name] for name in OMICS if name in tables}, labels


def _read_source(
    name: str, source: ModalitySource, is_patient: Callable[[str], bool], report: CohortReport
) -> ModalityTable:
    kind = source.format if source.format != "auto" else _format(Path(source.path))
    if kind == "maf":
        return read_maf(source.path, report)
    if kind == "gistic":
        return read_gistic(source.path)
    if kind == "anndata":
        return read_anndata(source.path, source.key or name)
    table, told = read_matrix(source.path, source.orientation, is_patient)
    report.add("note", "read", name, f"{source.path}: {told}")
    return table


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
        if frame is not None and "patient" in frame.columns:
            ids.update(frame["patient"].astype(str).str.strip())
    return ids


def _add_labels(labels: pd.DataFrame, config: CohortConfig, report: CohortReport) -> pd.DataFrame:
    labels = labels.copy()
    labels.index = labels.index.astype(str)
    if config.labels is not None:
        try:
            frame = read_frame(config.labels)
        except ExaonePathError as exc:
            report.add("error", "unreadable", "labels", str(exc))
            return labels
        if "patient" not in frame.columns:
            report.add(
                "error", "no-column", "labels", f"{config.labels} lacks the column patient; it has {list(frame)}"
            )
            return labels
        frame = _numbers_where_all(frame.set_index(frame.pop("patient").astype(str).str.strip()))
        labels = frame.combine_first(labels)
    if config.patient_ids == "tcga":
        parsed = {name: tcga_patient(name) for name in labels.index}
        labels.index = pd.Index([(parsed[name] or (name, 0))[0] for name in labels.index])
        labels = labels.groupby(level=0).first()
    twice = sorted(set(labels.index[labels.index.duplicated()]))
    if twice:
        report.add(
            "error",
            "duplicate-patients",
            "labels",
            f"{len(twice)} patient id(s) occur more than once: {some(twice)}",
            patients=twice,
        )
        labels = labels[~labels.index.duplicated()]
    return labels


def _numbers_where_all(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns whose every filled cell is a number as numbers; empty cells as missing."""
    out = {}
    for name in frame.columns:
        column = frame[name].replace("", np.nan).infer_objects()
        numbers = pd.to_numeric(column, errors="coerce")
        out[name] = numbers if numbers.notna().equals(column.notna()) else column
    return pd.DataFrame(out, index=frame.index)


def _assemble(
    tables: dict[str, ModalityTable],
    slides: SlideTable,
    labels: pd.DataFrame,
    min_modalities: int,
    report: CohortReport,
) -> Cohort:
    owners = {name: frozenset(table.patients) for name, table in tables.items()}
    if len(slides):
        owners = {WSI: frozenset(slides.patients), **owners}
    everyone = sorted(frozenset().union(*owners.values()))
    count = {patient: sum(patient in ids for ids in owners.values()) for patient in everyone}
    patients = tuple(patient for patient in everyone if count[patient] >= min_modalities)
    few = [patient for patient in everyone if count[patient] < min_modalities]
    if not patients:
        shown = "; ".join(
            f"{name}: {len(ids)} patients, such as {some(sorted(ids), 2)}" for name, ids in owners.items()
        )
        barcodes = any(tcga_patient(patient) for patient in everyone)
        advice = (
            "; if these are barcodes of samples, `patient_ids: tcga` takes the patient from them" if barcodes else ""
        )
        report.add(
            "error",
            "no-common-patients",
            "cohort",
            f"no patient has {min_modalities} modalities or more ({shown or 'nothing was read'}){advice}",
        )
    elif few:
        report.add(
            "note",
            "too-few-modalities",
            "cohort",
            f"{len(few)} patient(s) have fewer than {min_modalities} modalities and were left out: {some(few)}",
            patients=few,
        )
    kept = frozenset(patients)
    unused = [name for name, ids in owners.items() if patients and not ids & kept]
    for name in unused:
        report.add("warning", "unused-modality", name, "none of its patients has another modality; left out")
    return Cohort(
        patients,
        {name: _rows_of(table, kept) for name, table in tables.items() if name not in unused},
        SlideTable(tuple(slide for slide in slides.slides if slide.patient in kept)),
        labels.reindex(list(patients)),
        report,
    )


def _rows_of(table: ModalityTable, patients: Iterable[str]) -> ModalityTable:
    """Rows of these patients, sorted by id: nothing later depends on the order of a file."""
    wanted = patients if isinstance(patients, (set, frozenset)) else set(patients)
    order = sorted((patient, row) for row, patient in enumerate(table.patients) if patient in wanted)
    return replace(table.take([row for _, row in order]))
