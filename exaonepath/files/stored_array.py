"""A dataset of an HDF5 file whose rows are compared with their checksums when they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NoReturn

import h5py
import numpy as np

from exaonepath.files import checksums

# Bytes that are read and checked at a time: what stays in the processor's cache. More of a dataset in chunks, so that
# no chunk is unpacked twice.
_READ_BYTES = 1 << 21
_READ_BYTES_IN_CHUNKS = 1 << 25
_ROWS_TOGETHER = 256  # without checksums and chunks: rows with smaller gaps between them are read together


class StoredArray:
    """A dataset of numbers.

    Args:
        name: name of the dataset.
        dataset: the dataset, checked by `StoredFile`.
        crcs: its checksums, one per block of rows; None: it has none.
        damaged: raises the error for damage.
        check_read: raises an error if something could not be read so far: HDF5 gets zeros instead.

    Attributes:
        shape, dtype: as stored.
    """

    def __init__(
        self,
        name: str,
        dataset: h5py.Dataset,
        crcs: np.ndarray | None,
        damaged: Callable[[str], NoReturn],
        check_read: Callable[[], None],
    ) -> None:
        self._name, self._dataset, self._crcs = name, dataset, crcs
        self._damaged, self._check_read = damaged, check_read
        self.shape: tuple[int, ...] = dataset.shape
        self._unit = 1 if crcs is None else checksums.block_rows(self.shape[0])
        self.dtype: np.dtype = dataset.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def _row_bytes(self) -> int:
        return max(1, int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize)

    def _rows_at_once(self, unit: int) -> int:
        limit = _READ_BYTES if self._dataset.chunks is None else _READ_BYTES_IN_CHUNKS
        return unit * max(1, limit // (unit * self._row_bytes))

    def read(self) -> np.ndarray:
        """The whole dataset, in the stored type."""
        values = np.empty(self.shape, self.dtype)
        self.read_into(values)
        return values

    def read_into(self, values: np.ndarray) -> None:
        """Read the whole dataset into an array of the stored type and shape, without further memory."""
        if not self._dataset.size:
            self._compare(0, values)
            return
        step = self._rows_at_once(self._unit)
        for start in range(0, len(self), step):
            rows = np.s_[start : min(start + step, len(self))]
            self._dataset.read_direct(values, rows, rows)
            self._compare(start, values[rows])

    def parts(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row, rows), in order, in parts of bounded size; at least once, also for an empty dataset."""
        step = self._rows_at_once(self._unit)
        for start in range(0, max(1, len(self)), step):
            values = self._dataset[start : start + step]
            self._compare(start, values)
            yield start, values

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows `start` (included) to `stop` (excluded)."""
        if stop <= start:
            return np.empty((0, *self.shape[1:]), self.dtype)
        first = start // self._unit * self._unit
        values = self._dataset[first : min(-(-stop // self._unit) * self._unit, len(self))]
        self._compare(first, values)
        return values[start - first : stop - first]

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Rows at increasing indices int64 [n], in the stored type.

        Only the blocks that contain them are read, so the cost depends on the rows and hardly on the size of the file.
        Each block is complete, so that its checksum can be compared.

        Args:
            rows: the indices.
            out: array of the stored type and n rows to return them in.
        """
        values = np.empty((len(rows), *self.shape[1:]), self.dtype) if out is None else out
        if not values.size:
            return values
        runs = list(self._runs(rows))
        # One small array for all reads: new memory for each of them would take longer than the reading.
        read = np.empty((max(stop - first for first, stop, _, _ in runs), *self.shape[1:]), self.dtype)
        for first, stop, low, high in runs:
            part = read[: stop - first]
            self._dataset.read_direct(part, np.s_[first:stop])
            self._compare(first, part)
            # "clip" avoids a copy; all indices are inside.
            np.take(part, rows[low:high] - first, axis=0, out=values[low:high], mode="clip")
        return values

    def _runs(self, rows: np.ndarray) -> Iterator[tuple[int, int, int, int]]:
        """(first row, end) of what is read at once, and (first, end) of the part of `rows` inside."""
        chunk = 0 if self._dataset.chunks is None else self._dataset.chunks[0]
        unit = chunk or _ROWS_TOGETHER if self._crcs is None else self._unit
        most = self._rows_at_once(unit) // unit
        blocks = rows // unit
        # Blocks that follow each other without a gap are read at once, up to the limit.
        ends = [*(np.flatnonzero(np.diff(blocks) > 1) + 1).tolist(), len(rows)]
        low = 0
        for end in ends:
            while low < end:
                high = low + int(np.searchsorted(blocks[low:end], blocks[low] + most))
                yield int(blocks[low]) * unit, min((int(blocks[high - 1]) + 1) * unit, len(self)), low, high
                low = high

    def summary(self) -> bytes:
        """Name, type, shape and checksums: equal for equal content, if it has checksums."""
        crcs = b"" if self._crcs is None else self._crcs.tobytes()
        return f"{self._name}:{self.dtype.str}:{list(self.shape)}:".encode() + crcs

    def within(self, row: int, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop` of one row of a dataset without checksums, which would be of whole rows."""
        if self._crcs is not None:
            self._damaged(f"{self._name} has checksums, which no file with a dataset of this shape has")
        values = self._dataset[row, start:stop]
        self._check_read()
        return values

    def verify(self) -> None:
        """Read and check all rows without keeping them."""
        if self._crcs is not None:
            for _ in self.parts():
                pass

    def _compare(self, first: int, values: np.ndarray) -> None:
        self._check_read()
        if self._crcs is None:
            return
        check = checksums.BlockChecksums(self._name, self.shape, self.dtype, first)
        check.add(values)
        found, block = check.result(), first // self._unit
        wrong = np.flatnonzero(found != self._crcs[block : block + len(found)])
        if len(wrong):
            row = (block + wrong[0]) * self._unit
            self._damaged(f"the checksum of {self._name} does not match (rows from {row})")
