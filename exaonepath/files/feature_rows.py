"""Reads a features file in parts: coordinates and fragments first, then all rows of the features, or some of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from exaonepath.errors import DataFileError, ForeignFileError, UnfinishedFileError
from exaonepath.files.hdf5 import StoredFile, open_h5
from exaonepath.files.stored_array import StoredArray
from exaonepath.text import few

# Name to type and shape, as `StoredFile.dataset` takes them.
_DATASETS: dict[str, tuple[str, tuple[int | None, ...]]] = {
    "features": ("f", (None, None)),
    "coords": ("iu", (None, 2)),
    "contour_index": ("iu", (None,)),
}
_HALF = np.dtype(np.float16)
_HALF_INFINITY = 0x7C00
_CACHED_BYTES = 1 << 21  # a part of this size stays in the processor's cache


@contextmanager
def open_features(
    path: str | os.PathLike[str], *, expected_dim: int | None = None, require_coords: bool = True
) -> Iterator[OpenFeatures]:
    """Open a features file, ours or the original's; see `read_features` for arguments and errors."""
    path = Path(path)
    with open_h5(path) as file:
        _check_layout(path, file)
        if require_coords and "coords" not in file:
            raise DataFileError(f"{path} lacks coords; it holds {file.names}")
        if not file.attribute("complete", True):
            raise UnfinishedFileError(f"{path} is marked as not complete; run the features stage again")
        yield OpenFeatures(path, file, expected_dim)


class OpenFeatures:
    """A features file that is open for reading. Every value that is returned was compared with its checksum.

    Attributes:
        path: path of the file.
        stored: its attributes and other datasets.
        shape: [N, D].
        dtype: type in which features are returned: float16 if they are stored as such, else float32.
    """

    def __init__(self, path: Path, file: StoredFile, expected_dim: int | None = None) -> None:
        self.path, self.stored = path, file
        self._arrays: dict[str, StoredArray] = {}
        self._features = self._array("features")
        self.shape: tuple[int, int] = (self._features.shape[0], self._features.shape[1])
        if expected_dim is not None and self.shape[1] != expected_dim:
            raise DataFileError(
                f"{path}: features are {self.shape[1]} wide, the model takes {expected_dim}; "
                "they come from another patch encoder"
            )
        self.dtype = _HALF if self._features.dtype == _HALF else np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def is_half(self) -> bool:
        """Whether features are stored, and returned, as float16."""
        return self.dtype == _HALF

    def _array(self, name: str) -> StoredArray:
        if name not in self._arrays:
            found = self._arrays[name] = self.stored.dataset(name, *_DATASETS[name])
            if len(found) != len(self._arrays["features"]):
                raise DataFileError(
                    f"{self.path}: {len(found)} rows in {name} but {len(self)} in features; they must be equal"
                )
        return self._arrays[name]

    @cached_property
    def coords(self) -> np.ndarray | None:
        """int32 [N, 2]; None if the file has none."""
        return self._integers("coords") if "coords" in self.stored else None

    @cached_property
    def contour_index(self) -> np.ndarray:
        """int32 [N]; zeros if the file has none."""
        if "contour_index" not in self.stored:
            return np.zeros(len(self), np.int32)
        return self._integers("contour_index")

    @cached_property
    def header(self) -> str:
        """Hex digest of shapes, types and checksums.

        It is equal for equal content, and (by chance, once in 2^32) for other content, if the file has checksums. For
        files without checksums, it shows shapes and types only.
        """
        digest = hashlib.sha256()
        for name in _DATASETS:
            if name in self.stored:
                digest.update(self._array(name).summary() + b"\n")
        return digest.hexdigest()

    def read(self) -> np.ndarray:
        """All features [N, D].

        Raises:
            DataFileError: a feature is NaN or infinite.
        """
        values = np.empty(self.shape, self.dtype)
        self.read_into(values)
        return values

    def read_into(self, values: np.ndarray) -> None:
        """`read` into an array [N, D] of `dtype`, or of float32."""
        if self._features.dtype == values.dtype:
            self._features.read_into(values)
        else:
            for start, part in self._features.parts():
                values[start : start + len(part)] = part
        self._check_finite(values, None)

    def check(self) -> None:
        """Read everything, as `read`, without keeping it.

        Raises:
            DataFileError: see `read_features`.
        """
        bad: list[int] = []
        for start, part in self._features.parts():
            values = part if part.dtype == self.dtype else part.astype(self.dtype)
            bad += (start + _not_finite(values)).tolist()
        self._raise_if(bad, len(self))
        _ = self.coords, self.contour_index

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Features [n, D] of these rows, increasing int64 [n]; only the blocks of the file with these rows are read.

        Args:
            rows: the rows.
            out: array [n, D] of `dtype` to return them in.

        Raises:
            DataFileError: a feature of these rows is NaN or infinite.
        """
        if self._features.dtype == self.dtype:
            values = self._features.take(rows, out)
        else:
            values = self._features.take(rows).astype(self.dtype)
            if out is not None:
                out[:] = values
        self._check_finite(values, rows)
        return values

    def _check_finite(self, values: np.ndarray, rows: np.ndarray | None) -> None:
        bad = _not_finite(values)
        self._raise_if((bad if rows is None else rows[bad]).tolist(), len(values))

    def _raise_if(self, bad: list[int], of: int) -> None:
        if bad:
            raise DataFileError(
                f"{self.path}: {len(bad)} of {of} feature rows hold NaN or infinity (row {few(bad)}); "
                "extract them again"
            )

    def _integers(self, name: str) -> np.ndarray:
        values = self._array(name).read()
        limits = np.iinfo(np.int32)
        if values.size and (values.min() < limits.min or values.max() > limits.max):
            raise DataFileError(f"{self.path}: {name} holds values beyond 32 bits")
        return values.astype(np.int32, copy=False)


def _not_finite(values: np.ndarray) -> np.ndarray:
    """Rows int64 [n] with NaN or infinity."""
    step = max(1, _CACHED_BYTES // max(1, values.shape[1] * values.itemsize))
    bad = [np.empty(0, np.int64)]
    for start in range(0, len(values), step):
        part = values[start : start + step]
        if not _all_finite(part):
            bad.append(start + np.flatnonzero(~np.isfinite(part).all(axis=1)))
    return np.concatenate(bad)


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype != _HALF:
        return bool(np.isfinite(values).all())
    # Without the sign, bits of infinity and NaN are the largest ones. numpy's isfinite is ten times slower for float16.
    return bool((values.view(np.uint16) & 0x7FFF).max(initial=0) < _HALF_INFINITY)


def _check_layout(path: Path, file: StoredFile) -> None:
    """Raise an error that names the layout of another program, if "features" is missing or has another shape."""
    if "features" not in file:
        if "feats" in file:
            raise ForeignFileError(f"{path} holds STAMP's layout (feats); features [N, D] and coords [N, 2] are read")
        raise DataFileError(f"{path} lacks features; it holds {file.names or 'nothing'}")
    shape = file.shape("features")
    if len(shape) == 3 and shape[0] == 1:
        raise ForeignFileError(
            f"{path} holds features {list(shape)}, one slide as a batch; features [N, D] and coords [N, 2] are read"
        )
