"""What is wrong with the tables that a command names, as far as their first lines tell, before much is imported.

Importing torch and transformers takes seconds, and a column of another name needs none. Whatever cannot be judged here
(an option, a file of settings) is left to the command itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from exaonepath.errors import ExaonePathError
from exaonepath.text import printable

_TABLES = ("slides", "labels")
_USUAL_NAMES = {"mudata": "cohort.h5mu", "slides": "slides.csv", "labels": "labels.csv"}
_NO_TEXT = (".h5ad", ".h5mu", ".parquet", ".pq")


def tell_problems(arguments: Sequence[str]) -> bool:
    """Say on standard error what is wrong with the tables that `train` or `evaluate` was given; whether anything is."""
    try:
        data = _data_settings(arguments)
        lines = () if data is None else _problems(data)
    # A look ahead: what it cannot make sense of, the command reads again and reports.
    except Exception:  # noqa: BLE001
        return False
    for line in lines:
        sys.stderr.write(printable(line) + "\n")
    return bool(lines)


def _problems(data: Mapping[str, Any]) -> tuple[str, ...]:
    from exaonepath.alignment.data.report import CohortError, CohortReport

    report = CohortReport()
    for name in _TABLES:
        if data.get(name):
            _look(report, name, Path(data[name]), data.get("id_column"))
    for name, source in dict(data.get("tables") or {}).items():
        if isinstance(source, Mapping) and source.get("path"):
            _look(report, name, Path(source["path"]), None)
    if not report.errors:
        return ()
    first, *others = CohortError(report).lines
    return f"error: {first}", *others


def _look(report: Any, name: str, path: Path, id_column: str | None) -> None:
    """Whether a table is there, of text, and has the columns that slides and labels need."""
    from exaonepath.alignment.data.dialect import sample_of
    from exaonepath.alignment.data.id_columns import patient_column
    from exaonepath.alignment.data.names import clean_name
    from exaonepath.alignment.data.text_files import UNREADABLE, check_file, refuse_foreign

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


def _data_settings(arguments: Sequence[str]) -> Mapping[str, Any] | None:
    """The table `data` of the settings that a command line stands for; None where it names no cohort."""
    if not arguments or arguments[0] not in ("train", "evaluate"):
        return None
    import typer
    from typer.main import get_command

    from exaonepath.alignment.training.settings_file import read_tables
    from exaonepath.cli.alignment_commands import evaluate
    from exaonepath.cli.train import flags_of, train

    app = typer.Typer(add_completion=False)
    for command in (train, evaluate):
        app.command()(command)
    name, *rest = arguments
    given = get_command(app).commands[name].make_context(name, rest, resilient_parsing=True).params  # type: ignore[attr-defined]
    if name == "train":
        tables = read_tables(given["config"], given["settings"] or (), values=flags_of(given))
        return tables.get("data")
    cohort = given["cohort"]
    if cohort is None:
        stored = json.loads((given["model"] / "settings.json").read_text(encoding="utf-8"))
        data = dict(stored["settings"]["data"])
    elif cohort.is_dir():
        data = {key: str(cohort / file) for key, file in _USUAL_NAMES.items() if (cohort / file).is_file()}
    else:
        data = dict(read_tables(cohort).get("data") or {})
    return {**data, **({} if given["id_column"] is None else {"id_column": given["id_column"]})}
