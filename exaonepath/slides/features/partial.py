"""The append-only file that an extraction keeps next to its output, so that a killed run loses at most one batch.

The first line is JSON and states what the rows were made with. One block per batch follows: a header, the rows'
indices, their features, the batch's failures as JSON. Each block has a checksum, which detects a block that was cut
short by a kill, a full disk or a power failure; everything after the last complete block is removed on resuming.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from exaonepath.errors import OutputError
from exaonepath.files.artifact import canonical_json
from exaonepath.files.atomic import open_private, output_error, try_lock
from exaonepath.files.features import PatchFailure

logger = logging.getLogger(__name__)

_FORMAT = 2
_MAX_HEADER = 1 << 16
# magic, rows, width of a row, one past the last patch covered, bytes of failure JSON, patches partly without data,
# checksum of the block without this field
_BLOCK = struct.Struct("<4sIIqIII")
_MAGIC = b"xpB2"


class Block(NamedTuple):
    """One batch: `features` [b, D], as stored, of patches `indices` int64 [b]; all patches before `stop` are processed.

    `n_partly_missing` of them have pixels for which the slide file holds no data.
    """

    indices: np.ndarray
    features: np.ndarray
    failures: tuple[PatchFailure, ...]
    stop: int
    n_partly_missing: int = 0


class PartialFile:
    """Opens or creates the partial file of an output; its blocks are kept only if it was created with equal `settings`.

    Args:
        path: the partial file.
        settings: plain JSON; every setting that changes the rows must be included.
        fresh: start again, even if the file has blocks.
        dtype: of the features that are stored, "float32" or "float16"; the settings must include it.

    Attributes:
        dtype: of the features in the file.
        stop: patches before this index are in the file (0: none).
        n_rows: feature rows in the file.
        dim: width of a row; None if the file has no row.
        failures: unreadable patches so far.
        n_partly_missing: patches so far that have pixels without data.
        batch_size: patches in the first block, readable or not; None if there is no block.

    Raises:
        OutputError: the file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, fresh: bool = False, dtype: str = "float32") -> None:
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.stop = self.n_rows = self.n_partly_missing = 0
        self.dim: int | None = None
        self.batch_size: int | None = None
        self.failures: list[PatchFailure] = []
        header = canonical_json({"format": _FORMAT, **settings}).encode() + b"\n"
        self._begin = len(header)
        self._file = _open_locked(path)
        try:
            self._file.seek(0)
            found = self._file.readline(_MAX_HEADER)
            if found and (found != header or fresh):
                logger.info("%s: made with other settings, or not wanted any more; starting over", path)
            if found == header and not fresh:
                self._recover()
            else:
                self._file.truncate(0)
                _write(self._file, header)
        except OSError as exc:
            self._file.close()
            raise output_error(path, exc) from exc

    def append(self, block: Block) -> None:
        """Add one batch and pass it to the operating system; `OutputError` is raised if that fails."""
        data = _pack(block, self.dtype)
        try:
            _write(self._file, data)
        except OSError as exc:
            raise output_error(self.path, exc) from exc
        self._count(block)

    def blocks(self) -> Iterator[Block]:
        """The batches in the file, in order; one at a time is in memory."""
        with self.path.open("rb") as file:
            file.seek(self._begin)
            while (block := _unpack(file, self.dtype)) is not None:
                yield block

    def close(self) -> None:
        """Close the file; it is kept for a later run."""
        try:
            self._file.close()
        except OSError as exc:  # every block has a checksum: a block that was not written is computed again
            logger.warning("%s: closing failed (%s)", self.path, exc)

    def remove(self) -> None:
        """Delete the file, once its rows are in the finished output."""
        try:
            self.path.unlink(missing_ok=True)  # before the lock is released, so that no process locks a deleted file
        except OSError as exc:
            logger.warning("%s cannot be removed (%s); its rows are in the finished file", self.path, exc)
        self.close()

    def _recover(self) -> None:
        end = self._begin
        while (block := _unpack(self._file, self.dtype)) is not None and block.stop > self.stop:
            end = self._file.tell()
            self._count(block)
        torn = self._file.seek(0, os.SEEK_END) - end
        if torn:
            logger.warning("%s: the last %d bytes are not a whole batch and are redone", self.path, torn)
            self._file.truncate(end)

    def _count(self, block: Block) -> None:
        self.stop = block.stop
        if self.batch_size is None:
            self.batch_size = len(block.indices) + len(block.failures)
        self.n_rows += len(block.indices)
        if len(block.indices):
            self.dim = block.features.shape[1]
        self.failures.extend(block.failures)
        self.n_partly_missing += block.n_partly_missing


def remove_finished(path: Path) -> None:
    """Delete the partial file of a finished output if no process holds it: a killed process may have left it."""
    if not path.is_file() or path.is_symlink():
        return
    try:
        with FileIO(open_private(path), "a+") as file:
            if try_lock(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                path.unlink()
    except (OSError, OutputError) as exc:
        logger.warning("%s cannot be removed (%s); its rows are in the finished file", path, exc)


def _pack(block: Block, dtype: np.dtype) -> bytes:
    indices = np.ascontiguousarray(block.indices, "<i8")
    features = np.ascontiguousarray(block.features, dtype)
    failures = json.dumps([[f.index, f.x, f.y, f.reason] for f in block.failures]).encode() if block.failures else b""
    payload = b"".join((indices.tobytes(), features.tobytes(), failures))
    fields = (_MAGIC, len(indices), features.shape[1], block.stop, len(failures), block.n_partly_missing)
    check = zlib.crc32(payload, zlib.crc32(_BLOCK.pack(*fields, 0)))
    return _BLOCK.pack(*fields, check) + payload


def _unpack(file: BinaryIO, dtype: np.dtype) -> Block | None:
    head = file.read(_BLOCK.size)
    if len(head) < _BLOCK.size:
        return None
    magic, rows, width, stop, n_failures, n_partly_missing, check = _BLOCK.unpack(head)
    if magic != _MAGIC:
        return None
    split = rows * 8
    end = split + rows * width * dtype.itemsize
    if end + n_failures > os.fstat(file.fileno()).st_size - file.tell():  # cut short, or the size is invalid
        return None
    payload = file.read(end + n_failures)
    fields = (magic, rows, width, stop, n_failures, n_partly_missing)
    if zlib.crc32(payload, zlib.crc32(_BLOCK.pack(*fields, 0))) != check:
        return None
    indices = np.frombuffer(payload, "<i8", rows)
    features = np.frombuffer(payload, dtype, rows * width, split).reshape(rows, width)
    failures = tuple(PatchFailure(*entry) for entry in json.loads(payload[end:])) if n_failures else ()
    return Block(indices, features, failures, stop, n_partly_missing)


def _open_locked(path: Path) -> FileIO:
    """Open and lock the file, and make sure that the path still names it."""
    while True:
        # Mode "a" does not empty the file before it is locked, and creates a missing file. Unbuffered: a full disk is
        # reported by the write that fails, not when the file is closed.
        file = FileIO(open_private(path), "a+")
        try:
            _lock(file, path)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()  # the process that held the lock has finished and deleted the file opened here


def _write(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _lock(file: FileIO, path: Path) -> None:
    if not try_lock(file.fileno()):
        raise OutputError(f"{path} is being written by another process; let it finish, or stop it")
