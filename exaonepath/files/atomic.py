"""Files and folders that appear whole or not at all: written under a temporary name, synced, renamed.

A temporary name carries the process that made it. What a killed process left is removed by the next writer of the same
target, once that process is known to be gone.
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
from exaonepath.files.signals import signals_held

try:
    import fcntl
except ImportError:  # Windows: two runs that write one file are not told apart
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Only readable by setting it, which is process wide: done once, at import, not while other threads create files.
_UMASK = os.umask(0)
os.umask(_UMASK)

# A temporary file of another machine: its process cannot be looked up, so only age says that nobody writes it.
_ABANDONED_S = 7 * 24 * 3600
# .<target>.<process space>-<process>-<random>.tmp; version 0.1 wrote eight random characters in place of the three.
_TEMPORARY = re.compile(r"\.(.+)\.(?:([0-9a-f]{8})-(\d+)-[0-9a-f]{8}|[a-z0-9_]{8})\.tmp", re.DOTALL)
# What a file system answers that cannot do what is asked, rather than failing at it.
_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


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
    """Yield a temporary path in the folder of `target`; on a clean exit sync it and rename it to `target`.

    Otherwise it is deleted, and what was at `target` before stays.

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
    """Yield a temporary folder; on a clean exit sync every file in it and rename it to `target`.

    A folder that is at `target` already is set aside under a fixed name and deleted once the new one has its place. A
    process killed in between leaves the old one set aside: `recover_folder` puts it back.

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
    """Finish what a process killed inside `atomic_folder` began: the folder it set aside is put back, or removed.

    Raises:
        OutputError: the folder cannot be put back.
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


def open_private(path: Path) -> int:
    """Descriptor of a working file (a partial result, a lock) that nobody but this package writes, created if missing.

    Opened for reading and appending, never through a link: someone else's file must not be written or emptied.

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
    """Take an advisory lock on an open file; False where another process holds it.

    True too where the file system has no locks (ENOLCK, ENOTSUP, EIO, ... from network file systems): what a lock would
    guard then has to be guarded by other means, and refusing to work at all would be worse.
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
    """Remove temporary files and folders whose process is gone.

    Args:
        folder: where they lie; other folders are not looked at.
        name: of the target they were made for; None: any.
    """
    try:
        entries = [entry.name for entry in folder.iterdir()]
    except OSError:
        return  # whoever creates a file there reports it
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry)
        if match is None or name not in (None, match[1]):
            continue
        left = folder / entry
        try:
            if match[2] == _process_space():
                abandoned = not _is_running(int(match[3]))
            else:
                abandoned = time.time() - left.lstat().st_mtime > _ABANDONED_S
            if abandoned:
                logger.info("removing %s, left by a process that was killed", left)
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        except OSError as exc:
            logger.debug("%s stays (%s)", left, exc)


def output_error(path: Path, exc: OSError) -> OutputError:
    """The `OutputError` that says what to do about an operating system error met while writing `path`."""
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
    temporary = path.with_name(f".{path.name}.{_process_space()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        if folder:
            temporary.mkdir()
        else:
            # O_EXCL: never through a link that somebody put there.
            os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as exc:
        raise output_error(path, exc) from exc
    return temporary


def _publish(temporary: Path, path: Path) -> None:
    try:
        temporary.chmod(0o666 & ~_UMASK)
    except PermissionError:  # a file system without modes
        logger.debug("%s keeps its mode", temporary)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _discard(temporary: Path) -> None:
    """Delete an unfinished file; what failed before is the error to report, not this."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError as exc:
        logger.warning("%s cannot be removed (%s); the next run removes it", temporary, exc)


@cache
def _process_space() -> str:
    """Eight hex digits for the set of processes whose numbers can be compared: a machine, or a container on it."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return hashlib.sha256(f"{socket.gethostname()}:{namespace}".encode()).hexdigest()[:8]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _set_aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        # Folders (and some network file systems) refuse fsync; the rename is still atomic there.
        if exc.errno not in (*_UNSUPPORTED, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(descriptor)
