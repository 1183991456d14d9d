"""Checksums stored inside an HDF5 file: written with the data, and compared on every read.

They are attributes of the file, because the attributes of the datasets are exactly those of EXAONE Path. There are
three. `crc32:<name>` holds one CRC-32 per block of rows of that dataset, seeded with its name, type and shape; because
of the blocks, a part of the dataset can be read and checked without the rest. `crc32_attributes` holds one CRC-32 over
every attribute that was written. `crc32_of` holds the JSON list of what is covered; data that a user adds later is not.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

COVERED, ATTRIBUTES = "crc32_of", "crc32_attributes"

_BLOCK_ROWS = 256
_MAX_BLOCKS = 8192  # an attribute in an HDF5 object header holds at most 64 KiB


def of_dataset(name: str) -> str:
    """Name of the file attribute that holds the checksums of a dataset."""
    return f"crc32:{name}"


def block_rows(n_rows: int) -> int:
    """Number of rows that share a checksum in a dataset of `n_rows` rows; this is part of the file format."""
    return max(_BLOCK_ROWS, -(-n_rows // _MAX_BLOCKS))


class BlockChecksums:
    """Checksums of a dataset whose rows arrive in order.

    Args:
        name: name of the dataset.
        shape, dtype: of the whole dataset, as stored.
        first: index of the first row that is added; it must be the start of a block.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: np.dtype, first: int = 0):
        self.rows = block_rows(shape[0])
        self._seed = zlib.crc32(f"{name}:{dtype.str}:{list(shape)}".encode())
        self._row = first
        self._block = self._seed
        self._done: list[int] = []

    def add(self, values: np.ndarray) -> None:
        """Add the next rows, contiguous and of the stored type."""
        start = 0
        while start < len(values):
            take = min(len(values) - start, self.rows - self._row % self.rows)
            self._block = zlib.crc32(np.ascontiguousarray(values[start : start + take]).data, self._block)
            start += take
            self._row += take
            if self._row % self.rows == 0:
                self._done.append(self._block)
                self._block = self._seed

    def result(self) -> np.ndarray:
        """uint32 [blocks]; an empty dataset has one checksum, of its name, type and shape."""
        unfinished = self._row % self.rows or not self._done
        return np.array(self._done + ([self._block] if unfinished else []), "<u4")


def strings_checksum(name: str, values: list[str]) -> np.ndarray:
    """uint32 [1], the checksum of a dataset of strings."""
    return np.array([zlib.crc32(json.dumps([name, values]).encode("utf-8", "surrogatepass"))], "<u4")


def attributes_checksum(covered: str, attributes: Mapping[str, Mapping[str, Any]]) -> int:
    """CRC-32 of attributes as they are read back; a mapping of object ("" is the file) to name to value.

    Args:
        covered: the text of `crc32_of`, which is also protected.
        attributes: values as returned by h5py.
    """
    check = zlib.crc32(covered.encode())
    for owner in sorted(attributes):
        for name, value in sorted(attributes[owner].items()):
            check = zlib.crc32(f"{owner}:{name}:".encode("utf-8", "surrogatepass") + _canonical(value), check)
    return check


def _canonical(value: Any) -> bytes:
    if isinstance(value, h5py.Empty):
        return b"empty"
    if isinstance(value, bytes):
        return b"bytes:" + value
    if isinstance(value, str):
        return b"text:" + value.encode("utf-8", "surrogateescape")
    array = np.asarray(value)
    if array.dtype.kind == "O":
        return b"texts:" + json.dumps([str(item) for item in array.ravel()]).encode()
    return f"{array.dtype.str}:{list(array.shape)}:".encode() + array.tobytes()
