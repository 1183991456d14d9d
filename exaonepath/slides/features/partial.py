"""The append-only file that an extraction keeps next to its output, so that a killed run loses at most one batch.

The first line is JSON and states what the rows were made with. One block per batch follows: a header, the rows'
indices, their features, the batch's failures as JSON. Each block has a checksum, which detects a block that was cut
short by a kill, a full disk or a power failure; everything after the last complete block is removed on resuming.

A process that works with others on one folder gives the file a name with the token of its claim. Whoever continues its
work copies the whole blocks into a file of its own: two writers never write into one file, also if the first one was
only paused and wakes up again.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exaonepath.errors import OutputError, SlideBusyError
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
_TOKEN = re.compile(r"[0-9a-f]{16}\.part")  # what follows the name of the output


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
        self._header = header = canonical_json({"format": _FORMAT, **settings}).encode() + b"\n"
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
        for block, _ in _whole_blocks(self._file, self._begin, self.dtype):
            yield block

    def take_over(self, others: Iterable[Path], unwanted: Collection[str] = ()) -> None:
        """Copy the batches of the furthest of several partial files of the same output, and remove all of them.

        This file must be empty. Only files with equal settings are used. A writer that still has one of them open goes
        on writing into a file without a name.

        Args:
            others: the files.
            unwanted: names of those that are not used, only removed.

        Raises:
            SlideBusyError: a file without a token is locked: its writer does not take part in claims, and lives.
            OutputError: this file cannot be written.
        """
        assert not self.stop
        with ExitStack() as stack:
            found: list[tuple[Path, FileIO]] = []
            for path in others:
                file = _opened(path)
                if file is not None:
                    found.append((path, stack.enter_context(file)))
                    if not has_token(path) and not try_lock(file.fileno()):
                        raise SlideBusyError(f"{path} is being written by another process; let it finish, or stop it")
            best, furthest = None, 0
            for path, file in found:
                file.seek(0)
                if path.name not in unwanted and file.readline(_MAX_HEADER) == self._header:
                    stop = max((block.stop for block, _ in _whole_blocks(file, self._begin, self.dtype)), default=0)
                    if stop > furthest:
                        best, furthest = file, stop
            if best is not None:
                for block, _ in _whole_blocks(best, self._begin, self.dtype):
                    self.append(block)
            for path, _ in found:
                _unlink(path)

    def close(self) -> None:
        """Close the file; it is kept for a later run."""
        try:
            self._file.close()
        except OSError as exc:  # every block has a checksum: a block that was not written is computed again
            logger.warning("%s: closing failed (%s)", self.path, exc)

    def remove(self) -> None:
        """Delete the file, once its rows are in the finished output."""
        _unlink(self.path)  # before the lock is released, so that no process locks a deleted file
        self.close()

    def _recover(self) -> None:
        end = self._begin
        for block, end in _whole_blocks(self._file, self._begin, self.dtype):  # noqa: B007
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


def partial_path(out: Path, token: str = "") -> Path:
    """The partial file of an output; with the token of a claim, that of one owner."""
    return out.with_name(f".{out.name}.{token}.part" if token else f".{out.name}.part")


def partial_files(out: Path) -> list[Path]:
    """All partial files of an output, of any owner, by name."""
    begin = f".{out.name}."
    try:
        with os.scandir(out.parent) as entries:
            names = [entry.name for entry in entries if entry.name.startswith(begin)]
    except OSError:
        return []
    return sorted(out.with_name(name) for name in names if name == f"{begin}part" or _TOKEN.fullmatch(name, len(begin)))


def has_token(path: Path) -> bool:
    """Whether a partial file belongs to the owner of a claim."""
    return _TOKEN.fullmatch(path.name[-len("0123456789abcdef.part") :]) is not None


def remove_finished(path: Path) -> None:
    """Delete the partial file of a finished output if no process holds it: a killed process may have left it."""
    file = _opened(path)
    if file is None:
        return
    with file, suppress(OSError):
        if try_lock(file.fileno()) and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            _unlink(path)


def _pack(block: Block, dtype: np.dtype) -> bytes:
    indices = np.ascontiguousarray(block.indices, "<i8")
    features = np.ascontiguousarray(block.features, dtype)
    failures = json.dumps([[f.index, f.x, f.y, f.reason] for f in block.failures]).encode() if block.failures else b""
    payload = b"".join((indices.tobytes(), features.tobytes(), failures))
    fields = (_MAGIC, len(indices), features.shape[1], block.stop, len(failures), block.n_partly_missing)
    check = zlib.crc32(payload, zlib.crc32(_BLOCK.pack(*fields, 0)))
    return _BLOCK.pack(*fields, check) + payload


def _whole_blocks(file: FileIO, begin: int, dtype: np.dtype) -> Iterator[tuple[Block, int]]:
    """The blocks up to the first one that is torn or out of order, and where each ends; the file's position is kept."""
    descriptor, offset, stop = file.fileno(), begin, 0
    while True:
        head = os.pread(descriptor, _BLOCK.size, offset)
        if len(head) < _BLOCK.size:
            return
        magic, rows, width, block_stop, n_failures, n_partly_missing, check = _BLOCK.unpack(head)
        split = rows * 8
        end = split + rows * width * dtype.itemsize
        offset += _BLOCK.size
        size = end + n_failures
        # Out of order, cut short, or the size is invalid.
        if magic != _MAGIC or block_stop <= stop or size > os.fstat(descriptor).st_size - offset:
            return
        payload = _read_at(descriptor, size, offset)
        fields = (magic, rows, width, block_stop, n_failures, n_partly_missing)
        if zlib.crc32(payload, zlib.crc32(_BLOCK.pack(*fields, 0))) != check:
            return
        offset, stop = offset + size, block_stop
        indices = np.frombuffer(payload, "<i8", rows)
        features = np.frombuffer(payload, dtype, rows * width, split).reshape(rows, width)
        failures = tuple(PatchFailure(*entry) for entry in json.loads(payload[end:])) if n_failures else ()
        yield Block(indices, features, failures, stop, n_partly_missing), offset


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes, or fewer at the end of the file; one call may return less than was asked for."""
    parts: list[bytes] = []
    while size and (part := os.pread(descriptor, size, offset)):
        parts.append(part)
        size, offset = size - len(part), offset + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _opened(path: Path) -> FileIO | None:
    """An existing partial file; None if it is missing or cannot be opened."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        return FileIO(open_private(path), "a+")
    except OutputError as exc:
        logger.warning("%s is left as it is (%s)", path, exc)
        return None


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("%s cannot be removed (%s); its rows are in another file", path, exc)


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
