"""Writes files and folders whole or not at all: under a temporary name, synced, then renamed.

A temporary name contains the id of the process that created it. Files of a killed process are removed by the next
writer of the same target, if that process no longer exists.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from exaonepath.errors import ExaonePathError, OutputError
from exaonepath.files.processes import is_running
from exaonepath.files.signals import signals_held

try:
    import fcntl
except ImportError:  # Windows: two runs that write the same file are not detected
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# The umask can only be read by setting it, for the whole process: this is done once, at import, not while other threads
# create files.
_UMASK = os.umask(0)
os.umask(_UMASK)

# Age in seconds from which a temporary file of another machine counts as abandoned: its process cannot be looked up.
_ABANDONED_S = 7 * 24 * 3600
# .<target>.<process space>-<process>-<random>.tmp; version 0.1 wrote eight random characters for these three parts.
_TEMPORARY = re.compile(r"\.(.+)\.(?:([0-9a-f]{8})-(\d+)-[0-9a-f]{8}|[a-z0-9_]{8})\.tmp", re.DOTALL)
# Errors by which a file system reports that an operation is not supported, as opposed to failed.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def ensure_folder(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` (and parents) and check that it is writable; `OutputError` is raised otherwise."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # os.access is wrong on some network file systems and for root; only creating a file is a reliable test.
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as exc:
        raise output_error(path, exc) from exc
    return path


@contextmanager
def atomic_path(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `target`; if the block succeeds, sync it and rename it to `target`.

    Otherwise the temporary file is deleted, and an existing `target` is unchanged.

    Raises:
        OutputError: the folder is missing, read-only or full, or the file cannot be written, synced or renamed.
    """
    path = Path(target)
    temporary = _make_temporary(path, folder=False)
    renamed = False
    try:
        yield temporary
        with signals_held():
            _publish(temporary, path)
            renamed = True
    except OSError as exc:
        if isinstance(exc, ExaonePathError):
            raise
        raise output_error(path, exc) from exc
    finally:
        if not renamed:
            _discard(temporary)


@contextmanager
def atomic_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder; if the block succeeds, sync every file in it and rename it to `target`.

    An existing folder `target` is renamed to a fixed name and deleted when the new one is in place. If the process is
    killed in between, the old folder keeps the fixed name; `recover_folder` renames it back.

    Raises:
        OutputError: as for `atomic_path`.
    """
    path = Path(target)
    recover_folder(path)
    temporary = _make_temporary(path, folder=True)
    try:
        yield temporary
        with signals_held():
            for root, _, files in os.walk(temporary):
                for name in files:
                    _sync(Path(root, name))
                _sync(Path(root))
            aside = _set_aside(path)
            if path.exists():
                path.rename(aside)
            temporary.rename(path)
            _sync(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as exc:
        recover_folder(path)
        if isinstance(exc, ExaonePathError):
            raise
        raise output_error(path, exc) from exc
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def recover_folder(target: str | os.PathLike[str]) -> None:
    """Complete an `atomic_folder` whose process was killed: the renamed old folder is restored, or removed.

    Raises:
        OutputError: the folder cannot be restored.
    """
    path = Path(target)
    aside = _set_aside(path)
    if not aside.is_dir() or aside.is_symlink():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        return
    try:
        aside.rename(path)
    except OSError as exc:
        raise output_error(path, exc) from exc


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_text_once(target: str | os.PathLike[str], text: str) -> bool:
    """Write a text file (UTF-8) unless it exists; of several processes, one writes it.

    Returns:
        Whether this call wrote it. Either way the file exists, and is complete.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(target)
    temporary = _make_temporary(path, folder=False)
    try:
        temporary.write_text(text, encoding="utf-8")
        with signals_held():
            _prepare(temporary)
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links: two processes may both write, one file remains
                if path.exists():
                    return False
                temporary.replace(path)
            _sync(path.parent)
        return True
    except OSError as exc:
        raise output_error(path, exc) from exc
    finally:
        _discard(temporary)


def open_private(path: Path) -> int:
    """Open a working file (a partial result, a lock) that only this package writes; it is created if missing.

    It is opened for reading and appending, never through a link: another user's file must not be written or emptied.

    Returns:
        The file descriptor.

    Raises:
        OutputError: the path is a link, a folder or a special file, or cannot be opened.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as exc:
        if exc.errno == errno.ELOOP or path.is_symlink():
            raise OutputError(f"{path} is a link to another file and is not followed; remove the link") from exc
        raise output_error(path, exc) from exc
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and status.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    what = "has a second name (a hard link)" if stat.S_ISREG(status.st_mode) else "is not a regular file"
    raise OutputError(f"{path} {what} and is not written; move it away")


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    """Take an advisory lock on an open file; False if another process holds it.

    The result is also True if the file system has no locks (ENOLCK, ENOTSUP, EIO, ... from network file systems): the
    file must then be protected by other means, because refusing to work at all would be worse.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        logger.debug("descriptor %d cannot be locked (%s)", descriptor, exc)
    return True


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders whose process no longer exists.

    Args:
        folder: the folder that contains them; other folders are not searched.
        name: name of the target that they were created for; None: any.
    """
    try:
        entries = [entry.name for entry in folder.iterdir()]
    except OSError:
        return  # the caller that creates a file in this folder reports the error
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry)
        if match is None or name not in (None, match[1]):
            continue
        left = folder / entry
        try:
            if match[2] == _process_space():
                abandoned = not is_running(int(match[3]))
            else:
                abandoned = time.time() - left.lstat().st_mtime > _ABANDONED_S
            if abandoned:
                logger.info("removing %s, left by a process that was killed", left)
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        except OSError as exc:
            logger.debug("%s stays (%s)", left, exc)


def temporary_name(path: Path) -> Path:
    """A new name next to `path`, for a file or folder that `remove_abandoned` removes if this process is killed."""
    return path.with_name(f".{path.name}.{_process_space()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")


def output_error(path: Path, exc: OSError) -> OutputError:
    """An `OutputError` with advice for an operating system error that occurred while `path` was written."""
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
    reason = " ".join((exc.strerror or str(exc)).split())  # HDF5's messages are whole paragraphs
    if exc.errno == errno.ENOSPC or "No space left" in reason:
        reason = "No space left on device"
    return OutputError(f"cannot write {path}: {reason} ({advice})")


def _make_temporary(path: Path, *, folder: bool) -> Path:
    remove_abandoned(path.parent, path.name)
    temporary = temporary_name(path)
    try:
        if folder:
            temporary.mkdir()
        else:
            # O_EXCL: never follow a link that another user created.
            os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as exc:
        raise output_error(path, exc) from exc
    return temporary


def _publish(temporary: Path, path: Path) -> None:
    _prepare(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _prepare(temporary: Path) -> None:
    """Give a finished temporary file its mode, and pass its content to the disk."""
    try:
        temporary.chmod(0o666 & ~_UMASK)
    except PermissionError:  # a file system without modes
        logger.debug("%s keeps its mode", temporary)
    _sync(temporary)


def _discard(temporary: Path) -> None:
    """Delete an unfinished file; an error here is not raised, because the earlier failure is the one to report."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("%s cannot be removed (%s); the next run removes it", temporary, exc)


@cache
def _process_space() -> str:
    """Eight hex digits for the set of processes whose ids can be compared: a machine, or a container on it."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{socket.gethostname()}:{namespace}".encode()).hexdigest()[:8]


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Folders (and some network file systems) do not support fsync; the rename is still atomic.
        if exc.errno not in (*_UNSUPPORTED, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)
