"""Files that appear whole or not at all: written beside the target, synced, renamed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from exaonepath.errors import ExaonePathError, OutputError

# Only readable by setting it, which is process wide: done once, at import, not while other threads create files.
_UMASK = os.umask(0)
os.umask(_UMASK)


def ensure_folder(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` (and parents) and check that it can be written; raises `OutputError` otherwise."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # os.access is wrong on some network file systems and for root; creating a file is the only honest test.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as exc:
        raise output_error(path, exc) from exc
    return path


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on a clean exit sync it and rename it to `target`, else delete it.

    Raises `OutputError` when the folder is missing, read-only or full.
    """
    path = Path(target)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as exc:
        raise output_error(path, exc) from exc
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        # mkstemp makes 0600 files; give the result the permissions any other new file would have.
        temporary.chmod(0o666 & ~_UMASK)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as exc:
        if isinstance(exc, ExaonePathError):
            raise
        raise output_error(path, exc) from exc
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Folders (and some network file systems) refuse fsync; the rename is still atomic there.
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)


def output_error(path: Path, exc: OSError) -> OutputError:
    """The `OutputError` that tells what to do about an operating system error met while writing `path`."""
    if exc.errno == errno.ENOSPC or "No space left" in str(exc):
        advice = "the disk is full: free some space and run again, finished work is kept"
    elif exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "no permission to write there: choose another output folder"
    elif exc.errno == errno.ENOENT:
        advice = "the folder does not exist"
    elif exc.errno in (errno.EEXIST, errno.ENOTDIR):
        advice = "a file stands where a folder is needed"
    else:
        advice = "check the output folder"
    reason = " ".join((exc.strerror or str(exc)).split())  # HDF5 tells whole paragraphs
    if exc.errno == errno.ENOSPC or "No space left" in reason:
        reason = "No space left on device"
    return OutputError(f"cannot write {path}: {reason} ({advice})")
