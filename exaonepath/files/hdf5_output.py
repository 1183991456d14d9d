"""Writes HDF5 files whole or not at all; failed writes are detected; datasets and attributes have checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from exaonepath.errors import OutputError
from exaonepath.files import checksums
from exaonepath.files.atomic import atomic_path, output_error
from exaonepath.files.raw_file import RawFile
from exaonepath.files.signals import signals_held

CHUNK_ROWS = 1 << 16  # rows of a chunk of a compressed dataset


@contextmanager
def atomic_h5(target: str | os.PathLike[str]) -> Iterator[Hdf5Output]:
    """`atomic_path` for an HDF5 file; `Hdf5Output` lists what can be written.

    Raises:
        OutputError: some data could not be written, however late the system reported it.
    """
    with atomic_h5_tree(target) as file:
        output = Hdf5Output(file)
        yield output
        output.finish()


@contextmanager
def atomic_h5_tree(target: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """`atomic_path` for an HDF5 file in the layout of another program, without checksums: h5py's own file is yielded.

    Raises:
        OutputError: as for `atomic_h5`.
    """
    with atomic_path(target) as temporary, signals_held():
        raw = RawFile(os.open(temporary, os.O_RDWR), "r+", target)
        try:
            # No lock is needed: the temporary name belongs to this process only.
            with h5py.File(raw, "w") as file:
                yield file
            raw.sync()
        except (OSError, RuntimeError, ValueError, KeyError) as exc:
            # After a failed write, HDF5 may fail again on the data that it reads back; the failed write is the cause.
            if raw.error is not None and exc is not raw.error:
                raise output_error(Path(target), raw.error) from exc
            if isinstance(exc, RuntimeError) and not isinstance(exc, OutputError):
                raise OutputError(f"cannot write {target}: {exc}") from exc
            raise
        finally:
            raw.close()
        raw.raise_error()


class Hdf5Output:
    """An HDF5 file being written."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file
        self._names: dict[str, list[str]] = {"": []}
        self._checks: dict[str, np.ndarray] = {}

    def attributes(self, values: Mapping[str, Any], of: str = "") -> None:
        """Set attributes of the file, or of the dataset `of`."""
        texts = {name: encodable(value) if isinstance(value, str) else value for name, value in values.items()}
        (self._file[of] if of else self._file).attrs.update(texts)
        self._names.setdefault(of, []).extend(values)

    def array(self, name: str, values: np.ndarray) -> None:
        """Write a complete dataset."""
        values = np.ascontiguousarray(values)
        rows = self.rows(name, values.shape, values.dtype)
        rows.append(values)
        rows.finish()

    def rows(self, name: str, shape: tuple[int, ...], dtype: np.dtype | str, *, compress: bool = False) -> RowsOutput:
        """Create a dataset whose rows are appended in order; `RowsOutput.finish` must be called on the result.

        With `compress`, the values are packed without loss, in chunks of rows; appending whole chunks is fastest.
        """
        self._names.setdefault(name, [])
        packed: dict[str, Any] = {}
        if compress and shape[0]:  # HDF5 has no chunks of zero rows
            chunks = (min(shape[0], CHUNK_ROWS), *shape[1:])
            packed = {"chunks": chunks, "compression": "gzip", "compression_opts": 1, "shuffle": True}
        return RowsOutput(self._file.create_dataset(name, shape, np.dtype(dtype), **packed), name, self._checks)

    def strings(self, name: str, values: Sequence[str]) -> None:
        """Write a dataset of variable-length UTF-8 strings."""
        texts = [encodable(value) for value in values]
        self._file.create_dataset(name, data=texts, shape=(len(texts),), dtype=h5py.string_dtype())
        self._checks[name] = checksums.strings_checksum(name, texts)
        self._names.setdefault(name, [])

    def finish(self) -> None:
        """Write the checksums of the datasets, and of all attributes as they are read back."""
        for name, values in self._checks.items():
            self._file.attrs[checksums.of_dataset(name)] = values
        covered = json.dumps({owner: sorted(set(names)) for owner, names in self._names.items()}, sort_keys=True)
        found = {
            owner: {name: (self._file[owner] if owner else self._file).attrs[name] for name in names}
            for owner, names in self._names.items()
        }
        self._file.attrs[checksums.COVERED] = covered
        self._file.attrs[checksums.ATTRIBUTES] = np.uint32(checksums.attributes_checksum(covered, found))


class RowsOutput:
    """A dataset that is written row by row, in order."""

    def __init__(self, dataset: h5py.Dataset, name: str, results: dict[str, np.ndarray]) -> None:
        self._dataset, self._name, self._results = dataset, name, results
        self._checks = checksums.BlockChecksums(name, dataset.shape, dataset.dtype)
        self._next = 0

    def append(self, values: np.ndarray) -> None:
        """Write the next rows; `ValueError` is raised if there are more than the dataset was created for."""
        values = np.ascontiguousarray(values, self._dataset.dtype)
        end = self._next + len(values)
        if end > len(self._dataset):
            raise ValueError(f"{self._dataset.name} has {len(self._dataset)} rows; {end} were written")
        if values.size:
            self._dataset[self._next : end] = values
        self._checks.add(values)
        self._next = end

    def finish(self) -> None:
        """Store the checksums; `ValueError` is raised if rows are missing."""
        if self._next != len(self._dataset):
            raise ValueError(f"{self._dataset.name} has {len(self._dataset)} rows; {self._next} were written")
        self._results[self._name] = self._checks.result()


def encodable(text: str) -> str:
    """The text as stored in files: characters that UTF-8 cannot encode (from a non-UTF-8 file name) are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
