"""The features file: reads it with all checks, and writes it whole from batches.

The original writes `features` float32 [N, D], `coords` int32 [N, 2] and `contour_index` int32 [N]. This package adds
the patches that could not be read (`failed_index`, `failed_coords`, `failed_reason`) and attributes that state how the
features were made. Features may be stored as float16 (attribute `feature_dtype`); they are read as float32.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError
from exaonepath.files.artifact import Kind
from exaonepath.files.feature_rows import open_features
from exaonepath.files.hdf5 import StoredFile
from exaonepath.files.hdf5_output import atomic_h5

Rows = tuple[np.ndarray, np.ndarray]  # indices int64 [b], features [b, D]

_STORED = {"float32": "<f4", "float16": "<f2"}

KIND = Kind(("features", "coords", "contour_index"), others=("slide_embedding",))

# The attributes that `write_features` stores; no other attribute of a file is read.
ATTRIBUTES = (
    "slide_fingerprint",
    "patch_size",
    "preprocessing",
    "weights_fingerprint",
    "dtype",
    "feature_dtype",
    "patches_settings_hash",
    "settings_hash",
    "slide_path",
    "slide_mtime_ns",
    "weights",
    "reader",
    "exaonepath_version",
    "n_features",
    "n_failed",
    "n_partly_missing",
    "batch_size",
    "compiled",
    "mpp",
    "imported_from",
    "fragments",
    "complete",
)


@dataclass(frozen=True)
class PatchFailure:
    """A patch that could not be read, not even through a new handle: row in the patches file, location, error."""

    index: int
    x: int
    y: int
    reason: str


@dataclass(frozen=True)
class FeatureSet:
    """The contents of a features file.

    Attributes:
        features: float32 [N, D], one row per patch.
        coords: int32 [N, 2], (x, y) at level 0 in pixels; None if the file has none and the caller allows that.
        contour_index: int32 [N], the tissue fragment of each patch; zeros if the file has none.
        attrs: those of `ATTRIBUTES` that the file has (none in a file of the original).
        failures: the patches that have no row because they could not be read.
    """

    features: np.ndarray
    coords: np.ndarray | None
    contour_index: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)
    failures: tuple[PatchFailure, ...] = ()


def read_features(
    path: str | os.PathLike[str], *, expected_dim: int | None = None, require_coords: bool = True
) -> FeatureSet:
    """Read a features file, ours or the original's.

    Args:
        path: the HDF5 file.
        expected_dim: the width that the caller needs; None: any.
        require_coords: if False, a file without `coords` is accepted, and `coords` is None.

    Raises:
        DataFileError: the file is missing, damaged or incomplete, lacks a dataset, its datasets have invalid shapes or
            different lengths, a feature is NaN or infinite, or the width is not `expected_dim`.
    """
    with open_features(path, expected_dim=expected_dim, require_coords=require_coords) as file:
        features = file.read().astype(np.float32, copy=False)
        attrs = file.stored.attributes(ATTRIBUTES)
        failures = read_failures(file.path, file.stored)
        return FeatureSet(features, file.coords, file.contour_index, attrs, failures)


def write_features(
    path: Path,
    blocks: Iterable[Rows],
    coords: np.ndarray,
    contour_index: np.ndarray,
    dim: int,
    failures: Iterable[PatchFailure],
    attrs: Mapping[str, Any],
) -> int:
    """Write a features file, whole or not at all; one block of rows at a time is in memory.

    Args:
        path: the output.
        blocks: (indices int64 [b], features [b, dim]) by increasing index; together they contain every patch
            that did not fail, exactly once.
        coords: int32 [N, 2] of all patches, failed ones too.
        contour_index: int32 [N] of all patches, failed ones too.
        dim: width of a row.
        failures: the patches without a row.
        attrs: file attributes; `feature_dtype` is the dtype that features are stored in (default: float32).

    Returns:
        Number of rows written.

    Raises:
        OutputError: the file cannot be written.
        DataFileError: the blocks do not cover the patches (the partial file was changed during the run).
    """
    failures = sorted(failures, key=lambda failure: failure.index)
    kept = np.setdiff1d(np.arange(len(coords), dtype=np.int64), [failure.index for failure in failures])
    with atomic_h5(path) as file:
        features = file.rows("features", (len(kept), dim), _STORED[attrs.get("feature_dtype", "float32")])
        written = 0
        for indices, rows in blocks:
            if not np.array_equal(indices, kept[written : written + len(indices)]):
                raise DataFileError(f"{path}: feature rows are missing or twice after row {written}; run it again")
            features.append(rows)
            written += len(indices)
        if written != len(kept):
            raise DataFileError(f"{path}: {written} feature rows for {len(kept)} readable patches; run it again")
        features.finish()
        file.array("coords", coords[kept].astype("<i4"))
        file.array("contour_index", contour_index[kept].astype("<i4"))
        file.array("failed_index", np.array([failure.index for failure in failures], "<i8"))
        file.array("failed_coords", np.array([(f.x, f.y) for f in failures], "<i4").reshape(-1, 2))
        file.strings("failed_reason", [f.reason for f in failures])
        file.attributes({**attrs, "n_features": len(kept), "n_failed": len(failures), "complete": True})
    return len(kept)


def merge_by_index(first: Iterator[Rows], second: Iterator[Rows]) -> Iterator[Rows]:
    """Merge two streams of (increasing indices, rows) by index; blocks are split where the streams alternate."""
    streams = (first, second)
    waiting = [next(stream, None) for stream in streams]
    while (a := waiting[0]) is not None and (b := waiting[1]) is not None:
        lead = 1 if len(a[0]) and (not len(b[0]) or b[0][0] < a[0][0]) else 0
        (indices, rows), (limit, _) = (b, a) if lead else (a, b)
        cut = int(np.searchsorted(indices, limit[0])) if len(limit) else len(indices)
        if cut:
            yield indices[:cut], rows[:cut]
        waiting[lead] = (indices[cut:], rows[cut:]) if cut < len(indices) else next(streams[lead], None)
    for stream, rest in zip(streams, waiting, strict=True):
        if rest is not None:
            yield rest
            yield from stream


def read_partly_missing(file: StoredFile) -> int:
    """Number of patches of an open features file that have pixels without data; 0 if the file does not state it."""
    count = file.attribute("n_partly_missing", 0)
    return count if isinstance(count, int) and count > 0 else 0


def read_failures(path: Path, file: StoredFile) -> tuple[PatchFailure, ...]:
    """The unreadable patches that an open features file lists, by increasing index; none in a file of the original."""
    names = ("failed_index", "failed_coords", "failed_reason")
    if not all(name in file for name in names):
        return ()
    index = file.dataset(names[0], "iu", (None,)).read()
    coords = file.dataset(names[1], "iu", (None, 2)).read()
    if len(index) != len(coords):
        raise DataFileError(f"{path}: the lists of failed patches have different lengths")
    reasons = file.strings(names[2], len(index))
    return tuple(
        PatchFailure(int(i), int(x), int(y), reason) for i, (x, y), reason in zip(index, coords, reasons, strict=True)
    )
