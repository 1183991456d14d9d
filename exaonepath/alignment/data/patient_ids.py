"""Patient ids: as written, or extracted from TCGA barcodes if the user chooses this."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

import numpy as np
from scipy import sparse

from exaonepath.alignment.data.report import CohortReport
from exaonepath.alignment.data.tables import ModalityTable
from exaonepath.text import few

PatientIds = Literal["as_is", "tcga"]

# TCGA-XX-YYYY[-SSv...]: project, site, participant, then sample type and vial. R turns the hyphens into dots.
_BARCODE = re.compile(r"^(TCGA)[-.](\w{2})[-.](\w{4})(?:[-.](\d{2})[A-Z]?(?:[-.].*)?)?$", re.IGNORECASE)
_NORMAL = range(10, 30)  # sample types of normal tissue and of controls
_NO_TYPE = 0


def tcga_patient(barcode: str) -> tuple[str, int] | None:
    """(patient id, sample type code; 0 if the barcode has none), or None if it is no TCGA barcode."""
    match = _BARCODE.match(barcode.strip())
    if match is None:
        return None
    return "-".join(match.group(1, 2, 3)).upper(), int(match.group(4) or _NO_TYPE)


def to_patients(table: ModalityTable, ids: PatientIds, where: str, report: CohortReport) -> ModalityTable:
    """The table with one row per patient; samples that are left out, and errors, are added to the report.

    With "tcga", samples of normal tissue are left out. Of the tumour samples of a patient, those with the lowest sample
    type code are kept (01, the primary tumour, before 02, recurrent, and 06, metastatic). Rows of mutations of one
    patient are merged; in any other modality, two rows of one patient are an error.
    """
    rows = list(range(len(table.patients)))
    names = [name.strip() for name in table.patients]
    if ids == "tcga":
        parsed = [tcga_patient(name) for name in names]
        strange = [name for name, entry in zip(names, parsed, strict=True) if entry is None]
        if strange:
            report.add(
                "error",
                "no-tcga-barcode",
                where,
                f"{len(strange)} id(s) are no TCGA barcodes: {few(strange)}; drop `patient_ids: tcga` or correct them",
                patients=strange,
            )
        types = {row: entry[1] for row, entry in enumerate(parsed) if entry is not None}
        names = [name if entry is None else entry[0] for name, entry in zip(names, parsed, strict=True)]
        rows = tumour_rows(table.patients, names, types, where, report)
    names = [names[row] for row in rows]
    if any(not name for name in names):
        report.add("error", "empty-patient-id", where, f"{sum(not name for name in names)} row(s) have no patient id")
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice and table.scale == "indicator" and table.is_sparse:
        return _unite(table.take(rows), names)
    if twice:
        report.add(
            "error",
            "duplicate-patients",
            where,
            f"{len(twice)} patient id(s) occur more than once: {few(twice)}; keep one row per patient",
            patients=twice,
        )
        first = {name: at for at, name in reversed(list(enumerate(names)))}
        rows, names = [rows[at] for at in sorted(first.values())], [names[at] for at in sorted(first.values())]
    part = table.take(rows)
    return ModalityTable(tuple(names), part.features, part.values, part.scale, part.source)


def tumour_rows(
    samples: tuple[str, ...], names: list[str], types: dict[int, int], where: str, report: CohortReport
) -> list[int]:
    """Rows without normal tissue, and of each patient only those of the lowest sample type; notes name the other rows.

    Args:
        samples: ids as written; names: patient of each row; types: row to sample type code, for rows that have one.
    """
    normal = [row for row, code in types.items() if code in _NORMAL]
    if normal:
        report.add(
            "note",
            "normal-samples",
            where,
            f"{len(normal)} sample(s) of normal tissue left out: {few([samples[row] for row in normal])}",
            patients=[samples[row] for row in normal],
        )
    kept = [row for row in range(len(names)) if types.get(row, _NO_TYPE) not in _NORMAL]
    lowest: dict[str, int] = {}
    for row in kept:
        code = types.get(row, _NO_TYPE)
        lowest[names[row]] = min(code, lowest.get(names[row], code))
    others = [row for row in kept if types.get(row, _NO_TYPE) != lowest[names[row]]]
    if others:
        report.add(
            "note",
            "further-samples",
            where,
            f"{len(others)} further tumour sample(s) of patients with an earlier sample type left out: "
            f"{few([samples[row] for row in others])}",
            patients=[samples[row] for row in others],
        )
    dropped = set(others)
    return [row for row in kept if row not in dropped]


def _unite(table: ModalityTable, names: list[str]) -> ModalityTable:
    """Merge the mutations of several samples of a patient: a gene is mutated if it is in any sample."""
    patients = sorted(set(names))
    at = {name: i for i, name in enumerate(patients)}
    ones = np.ones(len(names), np.float32)
    fold = sparse.csr_matrix((ones, ([at[name] for name in names], range(len(names)))), (len(patients), len(names)))
    values = (fold @ table.values).tocsr().astype(np.float32)
    values.data[:] = 1
    return ModalityTable(tuple(patients), table.features, values, table.scale, table.source)
