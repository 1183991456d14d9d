"""Early checks of the first lines of a cohort's tables, before large packages are imported.

The import of torch and transformers takes seconds, but a check for missing columns needs neither. All other checks are
made when the whole table is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exaonepath.alignment.data.dialect import sample_of
from exaonepath.alignment.data.id_columns import patient_column, patient_column_of_slides
from exaonepath.alignment.data.names import clean_name
from exaonepath.alignment.data.report import CohortError, CohortReport
from exaonepath.alignment.data.text_files import UNREADABLE, check_file, refuse_foreign
from exaonepath.errors import ExaonePathError, SettingsError
from exaonepath.text import few

_TABLES = ("slides", "labels")
_USUAL_NAMES = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
_NO_TEXT = (".h5ad", ".h5mu", ".parquet", ".pq")


def check_headers(data: object, labels: Sequence[str] = ()) -> None:
    """Check the first lines of the tables in the settings.

    Args:
        data: the table `data` of the settings, not checked yet: values of a wrong type are ignored here.
        labels: columns that the labels must have.

    Raises:
        CohortError: a table is missing, is another kind of file, or lacks a required column; it lists all problems.
    """
    if not isinstance(data, Mapping):
        return
    report = CohortReport()
    column = data.get("id_column")
    for name in _TABLES:
        if data.get(name) and isinstance(data[name], str):
            _check(report, name, Path(data[name]), column if isinstance(column, str) and column else None, labels)
    sources = data.get("tables")
    for name, source in sources.items() if isinstance(sources, Mapping) else ():
        if isinstance(source, Mapping) and source.get("path") and isinstance(source["path"], str):
            _check(report, name, Path(source["path"]), None)
    if report.errors:
        raise CohortError(report)


def tables_of_evaluation(model: Path, cohort: Path | None, id_column: str | None) -> Mapping[str, Any] | None:
    """The table `data` for the cohort of an evaluation (see `open_subject`); None if it cannot be read."""
    from exaonepath.alignment.training.settings_file import read_tables

    try:
        if cohort is None:
            data = dict(json.loads((model / "settings.json").read_text(encoding="utf-8"))["settings"]["data"])
        elif cohort.is_dir():
            data = {key: str(cohort / file) for key, file in _USUAL_NAMES.items() if (cohort / file).is_file()}
        else:
            data = dict(read_tables(cohort).get("data") or {})
    except (ExaonePathError, OSError, ValueError, LookupError, TypeError):
        return None  # the error is reported when the cohort is opened
    return {**data, **({} if id_column is None else {"id_column": id_column})}


def check_folders(model: Path, cohort: Path | None) -> None:
    """Check that the model, or the run, and the cohort of an evaluation exist.

    Raises:
        SettingsError: one does not, or the folder of the model has neither a model nor a run.
    """
    if not model.is_dir():
        raise SettingsError(f"{model}: no such folder; name the folder of a run or of a trained model")
    if not any((model / name).is_file() for name in ("settings.json", "config.json")):
        raise SettingsError(f"{model} holds neither a run (settings.json) nor a model (config.json)")
    if cohort is not None and not cohort.exists():
        raise SettingsError(f"{cohort}: no such folder or settings file")


def _check(report: Any, name: str, path: Path, id_column: str | None, labels: Sequence[str] = ()) -> None:
    """Report an error if a table does not exist, is no text file, or lacks the columns of slides or labels."""

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
        (patient_column if name == "labels" else patient_column_of_slides)(columns, str(path), id_column)
        if name == "labels" and (missing := [label for label in labels if label not in columns]):
            report.add("error", "no-column", name, f"{path} has no column {few(missing)}; it has {few(columns, 12)}")
    except ExaonePathError as exc:
        report.add("error", "unreadable", name, str(exc))
    except UNREADABLE:
        return  # the reader of the whole file gives a better message
