"""Whether a path still names the file that it named before, without reading the file."""

from __future__ import annotations

from pathlib import Path

FileIdentity = tuple[int, int, int]  # inode, size, modification time in nanoseconds


def file_identity(path: Path) -> FileIdentity | None:
    """What changes if a file is replaced or written to; None if there is none, or it may not be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
