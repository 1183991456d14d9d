"""A cohort: patients with their molecular tables, slides and labels, checked as a whole before training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd

from exaonepath.alignment.data.checks import check_table
from exaonepath.alignment.data.config import CohortConfig
from exaonepath.alignment.data.formats import sparse_where_smaller
from exaonepath.alignment.data.labels import read_labels
from exaonepath.alignment.data.patient_ids import tcga_patient, to_patients
from exaonepath.alignment.data.reading import read_tables
from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.slides import SlideTable, read_slides
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.alignment.modalities import WSI, columns_of
from exaonepath.errors import SettingsError
from exaonepath.text import few


@dataclass(frozen=True, eq=False)
class Cohort:
    """Patients and their data.

    Attributes:
        patients: sorted ids; each patient has at least the required number of modalities.
        modalities: tables of the available molecular modalities, in order; their patients are a sorted subset of
            `patients`.
        slides: slides of these patients.
        labels: one row per patient, in the order of `patients`; NaN for unknown values.
        report: findings of the checks.
    """

    patients: tuple[str, ...]
    modalities: dict[str, ModalityTable]
    slides: SlideTable
    labels: pd.DataFrame
    report: CohortReport = field(default_factory=CohortReport, compare=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of `availability`: the five modalities of the paper, then further ones of this cohort."""
        return columns_of(self.modalities)

    def availability(self) -> np.ndarray:
        """bool [P, M]: which of the modalities of `columns` a patient has."""
        index = {patient: at for at, patient in enumerate(self.patients)}
        out = np.zeros((len(self.patients), len(self.columns)), bool)
        for column, name in enumerate(self.columns):
            table = self.slides if name == WSI else self.modalities.get(name)
            for patient in () if table is None else table.patients:
                out[index[patient], column] = True
        return out

    def subset(self, patients: Iterable[str]) -> Cohort:
        """The cohort of these patients (sorted, each once).

        Raises:
            SettingsError: a patient is not in this cohort.
        """
        wanted = set(patients)
        unknown = sorted(wanted - set(self.patients))
        if unknown:
            raise SettingsError(f"{len(unknown)} patient(s) are not in the cohort: {few(unknown)}")
        keep = [at for at, patient in enumerate(self.patients) if patient in wanted]
        return Cohort(
            tuple(self.patients[at] for at in keep),
            {name: _rows_of(table, wanted) for name, table in self.modalities.items()},
            SlideTable(tuple(slide for slide in self.slides.slides if slide.patient in wanted)),
            self.labels.iloc[keep],
            self.report,
        )

    @property
    def held(self) -> tuple[str, ...]:
        """Names of the available modalities, the slide first."""
        return (*((WSI,) if len(self.slides) else ()), *self.modalities)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of ids, feature names, values and slide names: equal for equal cohorts, in any folder.

        Only the number and width of patch features are included: reading them all would take as long as an epoch.
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

    All checks run, so one call reports all problems. Warnings and notes are logged and stored in `Cohort.report`.

    Raises:
        CohortError: the cohort cannot be used; the message lists every reason, with some of the affected ids and their
            number.
    """
    report = CohortReport()
    tables, obs = read_tables(config, report)
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
            id_column=config.id_column,
            check=config.check_features,
        )
    labels = read_labels(obs, config, report)
    cohort = _assemble(checked, slides, labels.frame, config, report)
    labels.check(cohort.patients, report)
    report.log()
    report.raise_errors()
    return cohort


def _assemble(
    tables: dict[str, ModalityTable],
    slides: SlideTable,
    labels: pd.DataFrame,
    config: CohortConfig,
    report: CohortReport,
) -> Cohort:
    min_modalities = config.min_modalities
    owners = {name: frozenset(table.patients) for name, table in tables.items()}
    if len(slides):
        owners = {WSI: frozenset(slides.patients), **owners}
    everyone = sorted(frozenset().union(*owners.values()))
    count = {patient: sum(patient in ids for ids in owners.values()) for patient in everyone}
    patients = tuple(patient for patient in everyone if count[patient] >= min_modalities)
    sparse = [patient for patient in everyone if count[patient] < min_modalities]
    if not patients:
        shown = "; ".join(f"{name}: {len(ids)} patients, such as {few(sorted(ids), 2)}" for name, ids in owners.items())
        barcodes = any(tcga_patient(patient) for patient in everyone)
        advice = (
            "; if these are barcodes of samples, set `patient_ids: tcga` to extract the patients" if barcodes else ""
        )
        report.add(
            "error",
            "no-common-patients",
            "cohort",
            f"no patient has {min_modalities} modalities or more ({shown or 'nothing was read'}){advice}",
        )
    elif sparse:
        report.add(
            "note",
            "too-few-modalities",
            "cohort",
            f"{len(sparse)} patient(s) have fewer than {min_modalities} modalities and were left out: {few(sparse)}",
            patients=sparse,
        )
    kept = frozenset(patients)
    unused = [name for name, ids in owners.items() if patients and not ids & kept]
    for name in unused:
        others = sorted(frozenset().union(*(ids for other, ids in owners.items() if other != name)))
        # A modality that the user named must be usable. An additional one in a file may be of other patients.
        named = name in config.modalities or name == WSI
        report.add(
            "error" if named else "warning",
            "unused-modality",
            name,
            f"none of its {len(owners[name])} patients ({few(sorted(owners[name]), 3)}) has another modality; the "
            f"others have patients such as {few(others, 3)}; "
            + ("correct the ids, or remove it from the settings" if named else "left out"),
            patients=sorted(owners[name]),
        )
    return Cohort(
        patients,
        {name: _rows_of(table, kept) for name, table in tables.items() if name not in unused},
        SlideTable(tuple(slide for slide in slides.slides if slide.patient in kept)),
        labels.reindex(list(patients)),
        report,
    )


def _rows_of(table: ModalityTable, patients: Iterable[str]) -> ModalityTable:
    """Rows of these patients, sorted by id, so that no result depends on the order of a file."""
    wanted = patients if isinstance(patients, (set, frozenset)) else set(patients)
    order = sorted((patient, row) for row, patient in enumerate(table.patients) if patient in wanted)
    return replace(table.take([row for _, row in order]))
