"""Which column of a table holds the ids of patients: the one the user names, or one whose name says so."""

from __future__ import annotations

import re
from collections.abc import Sequence

from exaonepath.errors import DataFileError

_NAMES = """
    patient patients patientid patientids patientidentifier patientbarcode bcrpatientbarcode tcgapatientbarcode
    participant participantid subject subjectid case caseid casesubmitterid submitterid pid
"""


def patient_column(columns: Sequence[str], source: str, told: str | None = None) -> str:
    """Name of the column of patient ids.

    Args:
        columns: all names of the table.
        source: of the table, for messages.
        told: the name the user gives; capitals, blanks and marks may differ where only one column is meant.

    Raises:
        DataFileError: there is none, or several could be it; the message names the option.
    """
    if told is not None:
        if told in columns:
            return told
        found = [name for name in columns if _plain(name) == _plain(told)]
        if len(found) == 1:
            return found[0]
        raise DataFileError(f"{source} has no column {told!r} (`id_column`); it has {_shown(columns)}")
    if "patient" in columns:
        return "patient"
    found = [name for name in columns if _plain(name) in _NAMES.split()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataFileError(
            f"{source}: {' and '.join(map(repr, found))} may both hold the patients' ids; say which with `id_column` "
            "(--id-column), or call it patient"
        )
    raise DataFileError(
        f"{source} lacks the column patient; it has {_shown(columns)}; say which holds the patients' ids with "
        "`id_column` (--id-column), or call it patient"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", str(name).lower())


def _shown(columns: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name)) for name in columns[:12])
    return shown if len(columns) <= 12 else f"{shown}, ... ({len(columns)} in all)"
