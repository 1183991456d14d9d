"""Gathers the slide embeddings of an output folder in one table, and keeps it up to date.

Embeddings of different encoders cannot be compared with each other, so there is a table for each pair of encoders:
`slides.parquet` if the folder has one, otherwise `slides-<hash>.parquet` for each of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, FileBusyError, OutputCollisionError, OutputError
from exaonepath.files.artifact import settings_hash
from exaonepath.files.embeddings import read_slide_embedding
from exaonepath.files.features import ATTRIBUTES as FEATURES_ATTRIBUTES
from exaonepath.files.hdf5 import open_h5
from exaonepath.files.slide_vectors import (
    COLUMNS,
    NAME,
    make_table,
    read_table,
    require_pyarrow,
    tables_in,
    vectors_of,
    write_table,
)
from exaonepath.slides.outputs import output_paths, stored_ids

logger = logging.getLogger(__name__)

_MOST_ROUNDS = 5
_SETTINGS = ("weights_fingerprint", "patch_weights_fingerprint", "preprocessing", "features_computed_in", "dtype")
_IDENTITY = ("embedding_file", "embedding_size", "embedding_mtime_ns")

Key = tuple[int, str, str]  # width, patch encoder, slide encoder


@dataclass(frozen=True)
class CollectedTable:
    """One table of a folder.

    Attributes:
        path: the Parquet file.
        n_slides: its rows.
        weights: the weights of its rows, as they were named.
        width: of the vectors.
    """

    path: Path
    n_slides: int
    weights: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class Collected:
    """The result of `collect_slide_vectors`.

    Attributes:
        tables: the tables; several if the folder has embeddings of several encoders.
        n_read: embeddings that were read now.
        n_kept: rows that were taken from the earlier tables.
        n_removed: rows of the earlier tables whose embedding is gone.
        problems: embeddings that cannot be read, a line each.
    """

    tables: tuple[CollectedTable, ...]
    n_read: int
    n_kept: int
    n_removed: int
    problems: tuple[str, ...]


@dataclass
class _Rows:
    """The rows of one table."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})
    vectors: list[np.ndarray] = field(default_factory=list)

    def add(self, row: Mapping[str, Any], vector: np.ndarray) -> None:
        for name in COLUMNS:
            self.columns[name].append(row[name])
        self.vectors.append(vector)


def collect_slide_vectors(out: str | os.PathLike[str], patients: Mapping[str, str] | None = None) -> Collected:
    """Gather the slide embeddings of an output folder; embeddings that did not change are not read again.

    Args:
        out: an output folder of `exaonepath encode`.
        patients: patients by id of the slide, in place of those that the embeddings state.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        DataFileError: the folder does not exist, its layout is not known, or it has a table and no embedding any more.
        OutputError: a table cannot be written; OutputCollisionError: a file of this name is no table of this package.
    """
    require_pyarrow()
    folder = Path(out)
    if not folder.is_dir():
        raise DataFileError(f"{folder}: no such folder")
    total: Collected | None = None
    for _ in range(_MOST_ROUNDS):
        found = _embeddings(folder)
        latest = _collect(folder, found, patients or {})
        total = latest if total is None else _summed(total, latest)
        # Of several processes that finish together, each may replace the table of another with an older one. So each
        # looks again after it has written: the last one to write has seen all embeddings.
        if _embeddings(folder) == found and _up_to_date(folder, found, latest):
            break
    assert total is not None
    if len(total.tables) > 1:
        logger.warning(
            "%s has embeddings of several encoders, which cannot be compared; they are in separate tables: %s",
            folder,
            "; ".join(f"{table.path.name} ({table.n_slides} of {', '.join(table.weights)})" for table in total.tables),
        )
    return total


def _embeddings(folder: Path) -> dict[str, tuple[str, int, int]]:
    """(path in the folder, size, modification time) of every embedding by id."""
    found = {}
    for name, path in stored_ids(folder, "embedding"):
        try:
            status = path.stat()
        except OSError:  # removed a moment ago
            continue
        found[name] = (path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)
    return found


def _collect(folder: Path, found: Mapping[str, tuple[str, int, int]], patients: Mapping[str, str]) -> Collected:
    earlier, replaced = _earlier(folder)
    if earlier and not found:
        raise DataFileError(
            f"{folder} has a table of {len(earlier)} slide embeddings, and no embedding any more; the table is kept"
        )
    groups: dict[Key, _Rows] = {}
    problems: list[str] = []
    changed = n_kept = 0
    for name in sorted(found):
        old = earlier.get(name)
        if old is not None and tuple(old[0][column] for column in _IDENTITY) == found[name]:
            row, vector = old
            n_kept += 1
        else:
            changed += 1
            try:
                row, vector = _read(folder, name, found[name])
            except (DataFileError, FileBusyError) as exc:
                problems.append(str(exc))
                continue
        patient = patients.get(name) or row["patient"] or (old[0]["patient"] if old else None)
        if patient != row["patient"]:
            row, changed = {**row, "patient": patient}, changed + 1
        key = (len(vector), row["patch_weights_fingerprint"] or "", row["weights_fingerprint"] or "")
        groups.setdefault(key, _Rows()).add(row, vector)
    n_removed = len(earlier.keys() - found.keys())
    paths = {key: folder / (NAME if len(groups) == 1 else f"slides-{_short(key)}.parquet") for key in groups}
    if changed or n_removed or set(paths.values()) != set(replaced):
        for key, rows in groups.items():
            _refuse_other_tables(paths[key], replaced)
            write_table(paths[key], make_table(rows.columns, np.stack(rows.vectors)))
        for path in set(replaced) - set(paths.values()):
            _remove(path)
    tables = tuple(
        CollectedTable(paths[key], len(rows.vectors), tuple(sorted({str(w) for w in rows.columns["weights"]})), key[0])
        for key, rows in sorted(groups.items(), key=lambda item: paths[item[0]])
    )
    return Collected(tables, len(found) - n_kept - len(problems), n_kept, n_removed, tuple(problems))


def _earlier(folder: Path) -> tuple[dict[str, tuple[dict[str, Any], np.ndarray]], list[Path]]:
    """The rows of the tables in the folder by id, and the paths of these tables."""
    rows: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    files: list[Path] = []
    for path in tables_in(folder):
        try:
            table = read_table(path)
        except DataFileError as exc:
            logger.warning("%s", exc)
            continue
        files.append(path)
        vectors = vectors_of(table)
        columns = {name: table[name].to_pylist() for name in COLUMNS}
        for at, name in enumerate(columns["id"]):
            rows[name] = {column: values[at] for column, values in columns.items()}, vectors[at]
    return rows, files


def _read(folder: Path, name: str, identity: tuple[str, int, int]) -> tuple[dict[str, Any], np.ndarray]:
    vector, attrs = read_slide_embedding(folder / identity[0])
    if "patch_weights_fingerprint" not in attrs:
        attrs |= _stated_by_features(folder, name)
    row: dict[str, Any] = {column: attrs.get(column) for column in COLUMNS}
    settings = {key: str(attrs.get(key, "")) for key in _SETTINGS}
    row |= {
        "id": name,
        "n_patches": int(attrs.get("n_patches", 0)),
        "n_failed": int(attrs.get("n_failed", 0)),
        "random_weights": bool(attrs.get("random_weights", False)),
        "settings_hash": settings_hash({**settings, "feature_dtype": str(attrs.get("feature_dtype", "float32"))}),
    }
    return row | dict(zip(_IDENTITY, identity, strict=True)), vector


def _stated_by_features(folder: Path, name: str) -> dict[str, Any]:
    """For an embedding of a version that did not state it: the patch encoder, from the features file."""
    try:
        with open_h5(output_paths(folder, name).features) as file:
            attrs = file.attributes(FEATURES_ATTRIBUTES)
    except (DataFileError, FileBusyError):
        return {}
    names = {"patch_weights_fingerprint": "weights_fingerprint", "features_computed_in": "dtype"}
    return {to: attrs[of] for to, of in {**names, "preprocessing": "preprocessing"}.items() if of in attrs}


def _up_to_date(folder: Path, found: Mapping[str, tuple[str, int, int]], latest: Collected) -> bool:
    """Whether the tables on disk have a row for every embedding that could be read."""
    rows, _ = _earlier(folder)
    stored = {name: tuple(row[column] for column in _IDENTITY) for name, (row, _) in rows.items()}
    return len(stored) == len(found) - len(latest.problems) and all(
        found.get(name) == one for name, one in stored.items()
    )


def _summed(first: Collected, second: Collected) -> Collected:
    return Collected(
        second.tables,
        first.n_read + second.n_read,
        second.n_kept,
        first.n_removed + second.n_removed,
        second.problems,
    )


def _short(key: Key) -> str:
    return hashlib.sha256(":".join(map(str, key)).encode()).hexdigest()[:8]


def _refuse_other_tables(path: Path, ours: list[Path]) -> None:
    """A damaged file may be ours, and is made from the embeddings again; a sound table of another kind is not."""
    if path in ours or not path.exists():
        return
    if not path.is_file():
        raise OutputCollisionError(f"{path} is a folder or a special file; move it away")
    try:
        with path.open("rb") as file:
            ours_perhaps = file.read(4) == b"PAR1"
    except OSError as exc:
        raise OutputError(f"{path} cannot be read ({exc.strerror}), and is not replaced") from exc
    if not ours_perhaps:
        raise OutputCollisionError(f"{path} is no table of slide embeddings, and is not replaced; move it away")
    try:
        read_table(path)
    except DataFileError as exc:
        if exc.__cause__ is None:  # it was read, and is of another kind or of a later version
            raise OutputCollisionError(f"{exc}; it is not replaced: move it away") from exc


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise OutputError(f"{path} is out of date and cannot be removed: {exc.strerror}") from exc
