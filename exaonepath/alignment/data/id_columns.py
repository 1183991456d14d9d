"""Find the column of patient ids in a table: the one that the user names, or one with a usual name."""

from __future__ import annotations

import re
from collections.abc import Sequence

from exaonepath.errors import DataFileError

_NAMES = """
    patient patients patientid patientids patientidentifier patientbarcode bcrpatientbarcode tcgapatientbarcode
    participant participantid subject subjectid case caseid casesubmitterid submitterid pid
"""


def patient_column(columns: Sequence[str], source: str, wanted: str | None = None) -> str:
    """Name of the column of patient ids.

    Args:
        columns: all names of the table.
        source: name of the table, for messages.
        wanted: the name that the user gives; case, blanks and punctuation are ignored if only one column matches.

    Raises:
        DataFileError: no column or several columns match; the message names the option.
    """
    if wanted is not None:
        if wanted in columns:
            return wanted
        found = [name for name in columns if _plain(name) == _plain(wanted)]
        if len(found) == 1:
            return found[0]
        raise DataFileError(f"{source} has no column {wanted!r} (`id_column`); it has {_shown(columns)}")
    if "patient" in columns:
        return "patient"
    found = [name for name in columns if _plain(name) in _NAMES.split()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataFileError(
            f"{source}: {' and '.join(map(repr, found))} may both be the column of patient ids; name one with "
            "`id_column` (--patient-column), or rename it to patient"
        )
    raise DataFileError(
        f"{source} lacks the column patient; it has {_shown(columns)}; name the column of patient ids with `id_column` "
        "(--patient-column), or rename it to patient"
    )


def patient_column_of_slides(columns: Sequence[str], source: str, wanted: str | None) -> str:
    """The same for a table of slides: the name that the user gives for the labels counts where the table has it."""
    has = wanted is not None and any(_plain(name) == _plain(wanted) for name in columns)
    return patient_column(columns, source, wanted if has else None)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", str(name).lower())


def _shown(columns: Sequence[str]) -> str:
    shown = ", ".join(repr(str(name)) for name in columns[:12])
    return shown if len(columns) <= 12 else f"{shown}, ... ({len(columns)} in all)"
