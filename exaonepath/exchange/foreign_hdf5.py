"""HDF5 files of other tools: a few datasets with attributes, written in parts, and read through the usual checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import DataFileError
from exaonepath.exchange.slide_patches import Matrix, part_rows
from exaonepath.files.hdf5 import StoredFile
from exaonepath.files.hdf5_output import atomic_h5_tree, encodable
from exaonepath.files.stored_array import StoredArray


def write_datasets(
    path: Path,
    datasets: Mapping[str, Matrix | np.ndarray],
    attrs: Mapping[str, Mapping[str, Any]],
    *,
    batch_axis: bool = False,
) -> None:
    """Write a file of datasets, whole or not at all; of a matrix, one part at a time is in memory.

    Args:
        path: the file, in an existing folder.
        datasets: by name.
        attrs: attributes of the datasets.
        batch_axis: a matrix is written as [1, N, D].

    Raises:
        OutputError: the file cannot be written.
        DataFileError: a vector cannot be written.
    """
    with atomic_h5_tree(path) as file:
        for name, values in datasets.items():
            if isinstance(values, np.ndarray):
                dataset = file.create_dataset(name, data=values)
            else:
                shape = (1, *values.shape) if batch_axis else values.shape
                dataset = file.create_dataset(name, shape, values.dtype)
                for start, part in values.parts():
                    if part.size:
                        at = slice(start, start + len(part))
                        dataset[(0, at) if batch_axis else at] = part
            for key, value in attrs.get(name, {}).items():
                dataset.attrs[key] = encodable(value) if isinstance(value, str) else value


def read_coords(file: StoredFile) -> np.ndarray:
    """`coords` as int32 [N, 2].

    Raises:
        DataFileError: it is missing, has another shape, or holds numbers beyond 32 bits.
    """
    shape = file.shape("coords")
    if len(shape) == 3 and shape[0] == 1:  # a batch of one slide
        values = file.dataset("coords", "iu", (1, None, 2)).read()[0]
    elif shape == (0,) and "coords" in file:  # TRIDENT and CLAM write an empty list so
        return np.empty((0, 2), np.int32)
    else:
        values = file.dataset("coords", "iu", (None, 2)).read()
    return checked_coords(values, str(file.path))


def checked_coords(values: np.ndarray, where: str) -> np.ndarray:
    """Integer coordinates [N, 2] as int32.

    Raises:
        DataFileError: they are no integers [N, 2], or beyond 32 bits.
    """
    limits = np.iinfo(np.int32)
    if values.ndim != 2 or values.shape[1] != 2 or values.dtype.kind not in "iu":
        raise DataFileError(f"{where}: coordinates must be integers [N, 2], got {values.dtype} {list(values.shape)}")
    if values.size and (values.min() < limits.min or values.max() > limits.max):
        raise DataFileError(f"{where}: coordinates are beyond 32 bits")
    return values.astype(np.int32)


def coords_of_columns(x: np.ndarray, y: np.ndarray, where: str) -> np.ndarray:
    """Two columns of integers [N] as coordinates int32 [N, 2].

    Raises:
        DataFileError: see `checked_coords`; the columns are of different lengths.
    """
    if x.ndim != 1 or x.shape != y.shape:
        raise DataFileError(f"{where}: x and y must be of one length, got {list(x.shape)} and {list(y.shape)}")
    # One after another: numpy joins signed and unsigned numbers as floating-point ones, and truth values as numbers.
    parts = [checked_coords(np.stack([column, column], axis=1), where)[:, 0] for column in (x, y)]
    return np.stack(parts, axis=1)


def stored_features(file: StoredFile, name: str = "features") -> Matrix:
    """The features of an open file: [N, D], or [1, N, D] with a batch axis.

    Raises:
        DataFileError: they are missing or have another shape.
    """
    shape = file.shape(name)
    if len(shape) == 3 and shape[0] == 1:
        return _WithoutBatchAxis(file.dataset(name, "f", (1, None, None)))
    return file.dataset(name, "f", (None, None))


class _WithoutBatchAxis:
    """A dataset [1, N, D] as [N, D]."""

    def __init__(self, dataset: StoredArray) -> None:
        self._dataset = dataset
        self.shape: tuple[int, ...] = dataset.shape[1:]
        self.dtype: np.dtype = dataset.dtype

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """See `Matrix.parts`."""
        step = part_rows(self.shape, self.dtype)
        for start in range(0, max(1, self.shape[0]), step):
            yield start, self._dataset.within(0, start, start + step)
