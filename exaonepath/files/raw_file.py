"""The file object that HDF5 reads and writes through.

HDF5 loses failed operations: a failed write during the release of a dataset object is not reported at all, and a full
disk can end in a crash inside the library. This object therefore stores the first OSError and reports success to HDF5;
the caller that opened the file checks for the error at the end. After an error, nothing more is written to the disk.
"""

from __future__ import annotations

import errno
import io
import os
import struct
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_HEAP = b"GCOL"
_HEAP_HEADER = struct.Struct("<4s4xQ")  # signature, version and padding, size of the collection in bytes
_HEAP_OBJECT = struct.Struct("<HH4xQ")  # index (0: the free rest), reference count, bytes


class RawFile(io.RawIOBase):
    """An open file whose operations do not raise exceptions.

    Args:
        descriptor: file descriptor; closed with this object.
        mode: "r" or "r+".
        name: used in messages.

    Attributes:
        error: the first OSError of any operation; None if there was none.
    """

    def __init__(self, descriptor: int, mode: str, name: object) -> None:
        self.name = name
        self._file = io.FileIO(descriptor, mode)  # owns the descriptor from here on
        self.error: OSError | None = None

    def __repr__(self) -> str:
        return str(self.name)  # h5py uses it to name the file in its own messages

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return self._file.readable()

    def writable(self) -> bool:
        return self._file.writable()

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self._attempt(self._file.tell, 0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._attempt(lambda: self._file.seek(offset, whence), 0)

    def size(self) -> int:
        """Size of the file in bytes; 0 after an error."""
        return self._attempt(lambda: os.fstat(self.fileno()).st_size, 0)

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")

        def read() -> int:
            done = 0
            while done < len(target) and (count := self._file.readinto(target[done:])):
                done += count
            return done

        done = self._attempt(read, 0)
        if target[:4] == _HEAP and not _heap_is_sound(target):
            target[:4] = bytes(4)  # HDF5 then raises an error; otherwise it would loop forever
        target[done:] = bytes(len(target) - done)  # past the end, or after an error: no uninitialised memory
        return len(target)

    def write(self, data: Any) -> int:
        source = memoryview(data).cast("B")

        def write() -> None:
            done = 0
            while done < len(source):
                done += self._file.write(source[done:])

        self._attempt(write, None)
        return len(source)

    def truncate(self, size: int | None = None) -> int:
        return self._attempt(lambda: self._file.truncate(size), size or 0)

    def flush(self) -> None:
        """Do nothing: this object has no buffer."""

    def sync(self) -> None:
        """Make sure that all written data has reached the disk."""
        try:
            os.fsync(self.fileno())
        except OSError as exc:
            # Some network file systems do not support fsync; a failed write has been noticed before this point.
            if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                self.error = self.error or exc

    def close(self) -> None:
        try:
            self._file.close()  # some failed writes are reported only here; the descriptor is closed in any case
        except OSError as exc:
            self.error = self.error or exc
        super().close()

    def raise_error(self) -> None:
        """Raise the first error, if there was one."""
        if self.error is not None:
            raise self.error

    def _attempt(self, operation: Callable[[], T], otherwise: T) -> T:
        if self.error is not None:
            return otherwise
        try:
            return operation()
        except OSError as exc:
            self.error = exc
            return otherwise


def _heap_is_sound(image: memoryview) -> bool:
    """Whether the objects of a global heap collection, in the part that was read, follow one another inside it.

    HDF5 keeps strings of variable length in such a collection. It moves from object to object by their stored sizes,
    and can loop forever on a damaged size.
    """
    if len(image) < _HEAP_HEADER.size:
        return True  # too short for HDF5 to iterate over
    _, end = _HEAP_HEADER.unpack_from(image)
    at = _HEAP_HEADER.size
    while at + _HEAP_OBJECT.size <= min(end, len(image)):
        index, _, size = _HEAP_OBJECT.unpack_from(image, at)
        step = _HEAP_OBJECT.size + -(-size // 8) * 8 if index else size
        if step < _HEAP_OBJECT.size or step > end - at:
            return False
        at += step
    return end >= _HEAP_HEADER.size
