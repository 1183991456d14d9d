"""The table of slide embeddings: one Parquet file with a row a slide. Needs pyarrow (the extra `cohort`)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError, MissingDependencyError, SettingsError
from exaonepath.files.atomic import atomic_path

logger = logging.getLogger(__name__)

FORMAT = 1
NAME, SEPARATED = "slides.parquet", "slides-*.parquet"
VECTOR = "slide_embedding"
_MARK = b"exaonepath"
# Columns besides the vector, in order, and their types in Arrow's words.
COLUMNS: Mapping[str, str] = {
    "id": "string",
    "patient": "string",
    "n_patches": "int64",
    "n_failed": "int64",
    "slide_path": "string",
    "weights": "string",
    "weights_fingerprint": "string",
    "patch_weights_fingerprint": "string",
    "random_weights": "bool_",
    "settings_hash": "string",
    "patches_settings_hash": "string",
    "slide_fingerprint": "string",
    "exaonepath_version": "string",
    "embedding_file": "string",
    "embedding_size": "int64",
    "embedding_mtime_ns": "int64",
}


@dataclass(frozen=True)
class SlideVectors:
    """The slide embeddings of a cohort.

    Attributes:
        ids: of the slides, in the order of the rows.
        vectors: float32 [S, C + E]; zeros for a slide without a patch.
        columns: the other columns by name, a list each: `patient` (None if not known), `n_patches`, `n_failed`,
            `slide_path`, `weights`, `settings_hash`, ... (docs/cohorts.md lists them).
    """

    ids: tuple[str, ...]
    vectors: np.ndarray
    columns: Mapping[str, Sequence[Any]]

    def __len__(self) -> int:
        return len(self.ids)


def require_pyarrow() -> Any:
    """The module pyarrow, with its submodules `compute` and `parquet`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as exc:
        raise MissingDependencyError("Parquet files need pyarrow: pip install 'exaonepath[cohort]'") from exc
    return pyarrow


def read_slide_vectors(path: str | os.PathLike[str], *, weights: str | None = None) -> SlideVectors:
    """Read the slide embeddings that `exaonepath collect` gathered.

    Args:
        path: an output folder, or a table in it.
        weights: of a folder with tables for several weights, the one to read: the weights as they were named, or their
            fingerprint.

    Raises:
        DataFileError: there is no table, or it is damaged or of another kind.
        SettingsError: there are tables for several weights, and `weights` selects none or several.
        MissingDependencyError: pyarrow is not installed.
    """
    place = Path(path)
    files = tables_in(place) if place.is_dir() else [place]
    if not files:
        raise DataFileError(f"{place} has no table of slide embeddings; `exaonepath collect {place}` makes it")
    tables = {file: read_table(file) for file in files}
    if weights is not None:
        names = ("weights", "weights_fingerprint", "patch_weights_fingerprint")
        tables = {
            file: table for file, table in tables.items() if any(weights in table[name].to_pylist() for name in names)
        }
    if len(tables) != 1:
        known = {file.name: sorted(set(map(str, read_table(file)["weights"].to_pylist()))) for file in files}
        listed = "; ".join(f"{name}: {', '.join(used)}" for name, used in known.items())
        raise SettingsError(
            f"{place} has embeddings of several encoders, which cannot be compared with each other; choose one by its "
            f"weights or by its file ({listed})"
            if weights is None
            else f"the weights {weights!r} select {len(tables)} tables of {place} ({listed})"
        )
    (table,) = tables.values()
    columns = {name: table[name].to_pylist() for name in COLUMNS}
    if any(columns["random_weights"]):
        logger.warning("%s: embeddings of random weights contain no information about pathology", place)
    ids = tuple(columns.pop("id"))
    return SlideVectors(ids, vectors_of(table), columns)


def tables_in(folder: Path) -> list[Path]:
    """The tables in an output folder, by name."""
    return [path for path in (folder / NAME, *sorted(folder.glob(SEPARATED))) if path.is_file()]


def read_table(path: Path) -> Any:
    """A table as Arrow reads it, after a check of its columns.

    Raises:
        DataFileError: it is missing, damaged, of another kind, or was written by a later version.
        MissingDependencyError: pyarrow is not installed.
    """
    arrow = require_pyarrow()
    try:
        # One thread: the file is small, and a process of a cluster job has few cores.
        table = arrow.parquet.read_table(path, use_threads=False)
        stated = json.loads((table.schema.metadata or {}).get(_MARK, b"null"))
    except FileNotFoundError as exc:
        raise DataFileError(f"{path}: no such file") from exc
    except (arrow.ArrowException, OSError, ValueError) as exc:
        reason = " ".join(str(exc).split())
        raise DataFileError(
            f"{path} cannot be read as a table ({reason}); `exaonepath collect` makes it again from the embeddings"
        ) from exc
    if not isinstance(stated, dict):
        raise DataFileError(f"{path} is no table of slide embeddings of this package")
    if stated.get("format") != FORMAT:
        raise DataFileError(f"{path} has format {stated.get('format')}; this version reads format {FORMAT}")
    if [field.name for field in table.schema] != [*COLUMNS, VECTOR]:
        raise DataFileError(f"{path} has other columns than a table of slide embeddings")
    return table


def vectors_of(table: Any) -> np.ndarray:
    """float32 [S, C + E]: the vectors of a table."""
    width = table.schema.field(VECTOR).type.list_size
    flat = table[VECTOR].combine_chunks()
    values = flat.flatten() if len(table) else []
    return np.asarray(values, np.float32).reshape(len(table), width)


def make_table(rows: Mapping[str, Sequence[Any]], vectors: np.ndarray) -> Any:
    """A table of columns and vectors float32 [S, C + E]."""
    arrow = require_pyarrow()
    fields = [arrow.field(name, getattr(arrow, kind)()) for name, kind in COLUMNS.items()]
    vector_type = arrow.list_(arrow.float32(), vectors.shape[1])
    schema = arrow.schema([*fields, arrow.field(VECTOR, vector_type)], {_MARK: json.dumps({"format": FORMAT}).encode()})
    flat = arrow.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    arrays = [arrow.array(rows[field.name], field.type) for field in fields]
    return arrow.table([*arrays, arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])], schema=schema)


def write_table(path: Path, table: Any) -> None:
    """Write a table, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    arrow = require_pyarrow()
    with atomic_path(path) as temporary:
        arrow.parquet.write_table(table, temporary, compression="zstd")
