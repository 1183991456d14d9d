"""What is wrong with the tables of a cohort, as far as their first lines show it, before much is imported.

Importing torch and transformers takes seconds, and finding a column of another name needs neither. What cannot be
judged here is left to those who read the whole table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exaonepath.alignment.data.dialect import sample_of
from exaonepath.alignment.data.id_columns import patient_column
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.report import CohortError, CohortReport
from exaonepath.alignment.data.text_files import UNREADABLE, check_file, refuse_foreign
from exaonepath.errors import ExaonePathError

_TABLES = ("slides", "labels")
_USUAL_NAMES = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
_NO_TEXT = (".h5ad", ".h5mu", ".parquet", ".pq")


def check_headers(data: object) -> None:
    """Look at the first lines of the tables that settings name.

    Args:
        data: the table `data` of the settings, not checked yet: what is of another type is left to those checks.

    Raises:
        CohortError: a table is missing, of another kind of file, or lacks a column that is needed; every reason.
    """
    if not isinstance(data, Mapping):
        return
    report = CohortReport()
    column = data.get("id_column")
    for name in _TABLES:
        if data.get(name) and isinstance(data[name], str):
            _look(report, name, Path(data[name]), column if isinstance(column, str) and column else None)
    sources = data.get("tables")
    for name, source in sources.items() if isinstance(sources, Mapping) else ():
        if isinstance(source, Mapping) and source.get("path") and isinstance(source["path"], str):
            _look(report, name, Path(source["path"]), None)
    if report.errors:
        raise CohortError(report)


def tables_of_evaluation(model: Path, cohort: Path | None, id_column: str | None) -> Mapping[str, Any] | None:
    """The table `data` that stands for a cohort to evaluate on (see `open_subject`); None where it cannot be told."""
    from exaonepath.alignment.training.settings_file import read_tables

    try:
        if cohort is None:
            data = dict(json.loads((model / "settings.json").read_text(encoding="utf-8"))["settings"]["data"])
        elif cohort.is_dir():
            data = {key: str(cohort / file) for key, file in _USUAL_NAMES.items() if (cohort / file).is_file()}
        else:
            data = dict(read_tables(cohort).get("data") or {})
    except (ExaonePathError, OSError, ValueError, LookupError, TypeError):
        return None  # reported by whoever opens the cohort
    return {**data, **({} if id_column is None else {"id_column": id_column})}


def _look(report: Any, name: str, path: Path, id_column: str | None) -> None:
    """Whether a table is there, of text, and has the columns that slides and labels need."""

    try:
        check_file(path)
        if path.suffix.lower() in _NO_TEXT:
            return
        if name not in _TABLES:
            refuse_foreign(path)
            return
        columns = [clean_name(column) for column in sample_of(path).header]
        if name == "slides":
            columns = [column.lower() for column in columns]
            if "features" not in columns:
                report.add("error", "no-column", name, f"{path} lacks the column features; it has {columns}")
                return
        patient_column(columns, str(path), id_column if name == "labels" else None)
    except ExaonePathError as exc:
        report.add("error", "unreadable", name, str(exc))
    except UNREADABLE:
        return  # told better by whoever reads all of it
