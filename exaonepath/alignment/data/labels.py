"""Labels of patients, from the `obs` of a MuData file and from a table with one row per patient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from exaonepath.alignment.data.config import CohortConfig
from exaonepath.alignment.data.dialect import numbers_of, plain_number
from exaonepath.alignment.data.frames import read_frame
from exaonepath.alignment.data.id_columns import patient_column
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.patient_ids import PatientIds, tcga_patient, tumour_rows
from exaonepath.alignment.data.report import CohortReport
from exaonepath.errors import ExaonePathError
from exaonepath.text import few

# Missing values as written by R, spreadsheets and the clinical tables of TCGA. In a column of ids, these are ids.
_NOT_AVAILABLE = ("NA", "N/A", "#N/A", "nan", "NaN", "[Not Available]", "[Not Applicable]")
_SHOWN = _NOT_AVAILABLE[:2]


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels, one row per patient.

    Attributes:
        frame: labels; index: patient ids, each once.
        source: the table of labels; empty if there is none.
        named: patients that have a row in `source`.
    """

    frame: pd.DataFrame
    source: str = ""
    named: frozenset[str] = frozenset()

    def check(self, patients: Sequence[str], report: CohortReport) -> None:
        """Report patients of a cohort that are not in `source`; if none is, this is an error."""
        if not self.source or not patients:
            return
        lacking = [patient for patient in patients if patient not in self.named]
        if len(lacking) == len(patients):
            report.add(
                "error",
                "no-common-labels",
                "labels",
                f"{self.source} names none of the cohort's {len(patients)} patients (such as {few(patients[:3])}); "
                f"it names {few(sorted(self.named), 3) or 'nobody'}; correct the ids, or remove the labels",
            )
        elif lacking:
            report.add(
                "warning",
                "lacking-labels",
                "labels",
                f"{len(lacking)} of {len(patients)} patients have no row in {self.source}, their labels are missing: "
                f"{few(lacking)}",
                patients=lacking,
            )


def read_labels(obs: pd.DataFrame, config: CohortConfig, report: CohortReport) -> Labels:
    """The table of labels of `config`, with values of `obs` for its missing cells; problems are added to the report."""
    obs = obs.set_axis(obs.index.map(clean_name))
    obs = _one_row_a_patient(obs, config.patient_ids, f"the obs of {config.mudata}", report)
    held = Labels(obs, f"the obs of {config.mudata}", frozenset(obs.index)) if len(obs.columns) else Labels(obs)
    if config.labels is None:
        return held
    try:
        frame = read_frame(config.labels)
    except ExaonePathError as exc:
        report.add("error", "unreadable", "labels", str(exc))
        return held
    try:
        ids = frame.pop(patient_column(list(map(str, frame.columns)), str(config.labels), config.id_column))
    except ExaonePathError as exc:
        report.add("error", "no-column", "labels", str(exc))
        return held
    frame = _numbers_where_all(frame.set_axis(ids.where(ids.notna(), "").map(clean_name)), str(config.labels), report)
    frame = _one_row_a_patient(frame, config.patient_ids, str(config.labels), report)
    return Labels(frame.combine_first(obs), str(config.labels), frozenset(frame.index) - {""})


def _one_row_a_patient(frame: pd.DataFrame, ids: PatientIds, source: str, report: CohortReport) -> pd.DataFrame:
    """One row per patient. With barcodes: the rows of the same samples as in a molecular table, merged if they
    agree."""
    if ids == "tcga":
        samples = tuple(frame.index)
        parsed = [tcga_patient(name) for name in samples]
        names = [name if entry is None else entry[0] for name, entry in zip(samples, parsed, strict=True)]
        types = {row: entry[1] for row, entry in enumerate(parsed) if entry is not None}
        kept = tumour_rows(samples, names, types, "labels", report)
        frame = frame.iloc[kept].set_axis([names[row] for row in kept])
    twice = sorted(set(frame.index[frame.index.duplicated()]))
    if not twice:
        return frame
    if ids == "tcga":
        groups = frame.loc[frame.index.isin(twice)].groupby(level=0)
        differ = groups.nunique(dropna=True) > 1
        for column in differ.columns[differ.any()]:
            who = sorted(differ.index[differ[column]])
            values = sorted(map(str, frame.loc[[who[0]], column].dropna().unique()))
            report.add(
                "error",
                "conflicting-labels",
                "labels",
                f"{source}: {len(who)} patient(s) have rows that differ in {column!r}: {few(who)} (of {who[0]}: "
                f"{few(values, 3)}); keep one value a patient",
                patients=who,
            )
        return frame.groupby(level=0).first()
    report.add(
        "error",
        "duplicate-patients",
        "labels",
        f"{source}: {len(twice)} patient id(s) occur more than once: {few(twice)}; keep one row a patient",
        patients=twice,
    )
    return frame[~frame.index.duplicated()]


def _numbers_where_all(frame: pd.DataFrame, source: str, report: CohortReport) -> pd.DataFrame:
    """Convert columns of numbers to numbers, and empty cells, "NA" and similar to missing values."""
    out = {}
    absent: dict[str, int] = {}
    for name in frame.columns:
        column = frame[name].replace("", np.nan).infer_objects()
        gone = column.isin(_NOT_AVAILABLE)
        if gone.any():
            absent[str(name)] = int(gone.sum())
            column = column.where(~gone, np.nan)
        numbers = pd.to_numeric(column, errors="coerce")
        if not numbers.notna().equals(column.notna()):
            numbers = _marked_numbers(str(name), column, source, report)
        out[name] = column if numbers is None else numbers
    if absent:
        counted = few([f"{name} ({count})" for name, count in absent.items()])
        report.add(
            "note", "na-labels", "labels", f"cells with {' or '.join(_SHOWN)} or similar count as missing, in {counted}"
        )
    return pd.DataFrame(out, index=frame.index)


def _marked_numbers(name: str, column: pd.Series, source: str, report: CohortReport) -> pd.Series | None:
    """The numbers of a text column with decimal commas or thousands separators; None if it is text."""
    cells = [cell for cell in column.dropna() if isinstance(cell, str)]
    if not any("," in cell for cell in cells):
        return None
    try:
        marks = numbers_of(Path(source), cells)
    except ExaonePathError:
        marked = next(cell for cell in cells if "," in cell)
        report.add(
            "warning",
            "numbers",
            "labels",
            f"column {name!r} is taken as text: its numbers, such as {marked!r}, are ambiguous; write them with a "
            "decimal point and without thousands separators",
        )
        return None
    plain = column.map(lambda cell: plain_number(cell, marks) if isinstance(cell, str) else cell)
    numbers = pd.to_numeric(plain, errors="coerce")
    if not marks.description or not numbers.notna().equals(column.notna()):
        return None
    report.add("note", "numbers", "labels", f"column {name!r} is taken as numbers with {marks.description}")
    return numbers
