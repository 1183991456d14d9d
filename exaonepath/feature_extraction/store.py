"""The features file: reading it with every check, and writing it whole from batches.

`features` float32 [N, D], `coords` int32 [N, 2] and `contour_index` int32 [N] are what the original writes; ours adds
the patches that could not be read (`failed_index`, `failed_coords`, `failed_reason`) and, as attributes, what made it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from exaonepath.errors import DataFileError
from exaonepath.feature_extraction.reader import PatchFailure
from exaonepath.files.hdf5 import atomic_h5, open_h5

_CHECK_ROWS = 8192  # rows looked at together: 24 MiB at width 768


@dataclass(frozen=True)
class FeatureSet:
    """The contents of a features file.

    Attributes:
        features: float32 [N, D], one row per patch.
        coords: int32 [N, 2], (x, y) at level 0 in pixels; None where the file has none and that was allowed.
        contour_index: int32 [N], the tissue fragment of each patch; zeros where the file has none.
        attrs: the file's attributes (empty for a file of the original).
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
        expected_dim: the width the caller needs; None: any.
        require_coords: False: a file without `coords` is taken, and `coords` is None.

    Raises:
        DataFileError: the file is missing, corrupt or half written, lacks a dataset, its datasets have impossible
            shapes or different lengths, a feature is NaN or infinite, or the width is not `expected_dim`.
    """
    path = Path(path)
    with open_h5(path, ("features", "coords") if require_coords else ("features",)) as file:
        attrs = {key: _plain(value) for key, value in file.attrs.items()}
        if not attrs.get("complete", True):
            raise DataFileError(f"{path} is marked as not complete; run the features stage again")
        features = _features(path, file["features"], expected_dim)
        n = len(features)
        coords = _integers(path, file["coords"], (n, 2)) if "coords" in file else None
        contours = _integers(path, file["contour_index"], (n,)) if "contour_index" in file else None
        failures = read_failures(path, file)
    return FeatureSet(features, coords, np.zeros(n, np.int32) if contours is None else contours, attrs, failures)


def write_features(
    path: Path,
    blocks: Iterable[tuple[np.ndarray, np.ndarray]],
    coords: np.ndarray,
    contour_index: np.ndarray,
    dim: int,
    failures: Iterable[PatchFailure],
    attrs: Mapping[str, Any],
) -> int:
    """Write a features file, whole or not at all, holding one block of rows at a time.

    Args:
        path: the output.
        blocks: (indices int64 [b], features float32 [b, dim]); together every patch that did not fail, once.
        coords: int32 [N, 2] of all patches, failed ones too.
        contour_index: int32 [N], likewise.
        dim: width of a row.
        failures: the patches without a row.
        attrs: file attributes.

    Returns:
        Number of rows written.

    Raises:
        OutputError: the file cannot be written.
        DataFileError: the blocks do not cover the patches (the partial file was changed while in use).
    """
    failures = sorted(failures, key=lambda failure: failure.index)
    kept = np.setdiff1d(np.arange(len(coords), dtype=np.int64), [failure.index for failure in failures])
    with atomic_h5(path) as file:
        features = file.create_dataset("features", (len(kept), dim), "<f4")
        written = 0
        for indices, rows in blocks:
            at = np.searchsorted(kept, indices)
            written += len(indices)
            # Slices are what HDF5 is fast at; a block falls apart only where recovered patches go in between.
            for run in np.split(np.arange(len(at)), np.flatnonzero(np.diff(at) != 1) + 1):
                if len(run):
                    features[at[run[0]] : at[run[0]] + len(run)] = rows[run[0] : run[-1] + 1]
        if written != len(kept):
            raise DataFileError(f"{path}: {written} feature rows for {len(kept)} readable patches; run it again")
        file["coords"] = coords[kept].astype("<i4")
        file["contour_index"] = contour_index[kept].astype("<i4")
        file["failed_index"] = np.array([failure.index for failure in failures], "<i8")
        file["failed_coords"] = np.array([(f.x, f.y) for f in failures], "<i4").reshape(-1, 2)
        file.create_dataset("failed_reason", data=[f.reason for f in failures], dtype=h5py.string_dtype())
        file.attrs.update({**attrs, "n_features": len(kept), "n_failed": len(failures), "complete": True})
    return len(kept)


def _features(path: Path, dataset: h5py.Dataset, expected_dim: int | None) -> np.ndarray:
    if dataset.ndim != 2 or dataset.dtype.kind != "f":
        raise DataFileError(f"{path}: features must be floating point [N, D], got {_describe(dataset)}")
    if expected_dim is not None and dataset.shape[1] != expected_dim:
        raise DataFileError(
            f"{path}: features are {dataset.shape[1]} wide, the model takes {expected_dim}; "
            "they come from another patch encoder"
        )
    features = np.empty(dataset.shape, np.float32)
    bad: list[int] = []
    for start in range(0, len(features), _CHECK_ROWS):
        part = features[start : start + _CHECK_ROWS]
        part[:] = dataset[start : start + _CHECK_ROWS]
        bad += (start + np.flatnonzero(~np.isfinite(part).all(axis=1))).tolist()
    if bad:
        raise DataFileError(
            f"{path}: {len(bad)} of {len(features)} feature rows hold NaN or infinity (row {_first(bad)}); "
            "extract them again"
        )
    return features


def _integers(path: Path, dataset: h5py.Dataset, shape: tuple[int, ...]) -> np.ndarray:
    name = dataset.name.lstrip("/")
    if dataset.ndim != len(shape) or dataset.shape[1:] != shape[1:] or dataset.dtype.kind not in "iu":
        wanted = "[N, 2]" if len(shape) == 2 else "[N]"
        raise DataFileError(f"{path}: {name} must be integers {wanted}, got {_describe(dataset)}")
    if len(dataset) != shape[0]:
        raise DataFileError(f"{path}: {len(dataset)} rows in {name} but {shape[0]} in features; they must be equal")
    values = dataset[:]
    limits = np.iinfo(np.int32)
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise DataFileError(f"{path}: {name} holds values beyond 32 bits")
    return values.astype(np.int32)


def read_failures(path: Path, file: h5py.File) -> tuple[PatchFailure, ...]:
    """The unreadable patches an open features file lists, by increasing index; none in a file of the original."""
    names = ("failed_index", "failed_coords", "failed_reason")
    if not all(name in file for name in names):
        return ()
    index, coords, reasons = file[names[0]][:], file[names[1]][:], file[names[2]].asstr()[:]
    if not len(index) == len(coords) == len(reasons):
        raise DataFileError(f"{path}: the lists of failed patches have different lengths")
    return tuple(
        PatchFailure(int(i), int(x), int(y), str(reason))
        for i, (x, y), reason in zip(index, coords, reasons, strict=True)
    )


def _describe(dataset: h5py.Dataset) -> str:
    return f"{dataset.dtype} {list(dataset.shape)}"


def _first(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
