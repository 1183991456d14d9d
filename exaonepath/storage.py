"""Files that appear whole or not at all, and the hashes that tell whether a stored result is still valid.

What the package writes goes through `atomic_path`: written beside the target, synced, renamed. What it reads back from
HDF5 goes through `open_h5`, which turns the many ways a file can be broken into one `DataFileError`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from exaonepath.errors import DataFileError, ExaonePathError, FileBusyError, OutputCollisionError, OutputError

logger = logging.getLogger(__name__)

# Only readable by setting it, which is process wide: done once, at import, not while other threads create files.
_UMASK = os.umask(0)
os.umask(_UMASK)

_BUSY = {errno.EACCES, errno.EPERM, errno.EAGAIN, errno.ENOLCK, errno.EBUSY, errno.ESTALE}


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


@contextmanager
def atomic_h5(target: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """`atomic_path` for an HDF5 file opened for writing."""
    with atomic_path(target) as temporary:
        try:
            with h5py.File(temporary, "w") as file:
                yield file
        except RuntimeError as exc:
            # HDF5 reports some failed writes (a full disk met while closing) as RuntimeError.
            raise OutputError(f"cannot write {target}: {exc}; check that the disk is not full and run again") from exc


def write_text(target: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically (UTF-8)."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def open_h5(path: str | os.PathLike[str], required: Iterable[str] = ()) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading and check that the `required` datasets are there.

    Raises:
        DataFileError: the file is missing, is not HDF5, is truncated, lacks a dataset, or a damaged part of it shows
            while the block reads it.
        FileBusyError: the file is there, but another process holds it, or it may not be read.
    """
    path = Path(path)
    if not path.is_file():
        raise DataFileError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in required if not isinstance(file.get(name), h5py.Dataset)]
            if missing:
                raise DataFileError(f"{path} lacks {', '.join(missing)}; it holds {sorted(file) or 'nothing'}")
            yield file
    except ExaonePathError:
        raise
    # What a damaged file makes HDF5 say: it is told by no one type, and not only while opening.
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as exc:
        if getattr(exc, "errno", None) in _BUSY:
            raise FileBusyError(f"{path} cannot be opened now ({exc}); is another process using it?") from exc
        raise DataFileError(
            f"{path} cannot be read as HDF5 ({exc}); it is corrupt or half written: delete it and run the stage again"
        ) from exc


def check_owner(
    path: Path, attrs: Mapping[str, Any], fingerprint: str | None, slide_path: str | None, *, overwrite: bool
) -> bool:
    """Whether a stored result is of the slide at hand, by what its attributes say.

    Args:
        path: the stored file.
        attrs: its attributes `slide_fingerprint` and `slide_path`; a file without them counts as ours.
        fingerprint, slide_path: the slide at hand, None where unknown.
        overwrite: the user asked to start over.

    Returns:
        False where the result is stale: the slide was replaced under the same path, or overwriting was asked for.

    Raises:
        OutputCollisionError: the result belongs to a different slide, which would lose it.
    """
    stored = attrs.get("slide_fingerprint")
    if stored is None or fingerprint is None or stored == fingerprint:
        return True
    origin = attrs.get("slide_path")
    if overwrite or (origin is not None and origin == slide_path):
        logger.warning("%s was made from other content than %s holds now: doing it again", path, slide_path)
        return False
    raise OutputCollisionError(
        f"{path} holds the result of a different slide{f', {origin}' if origin else ''}; two slides of one name need "
        "output folders of their own (or ask to overwrite)"
    )


def refuse_foreign(path: Path, marker: str, foreign: Iterable[str] = ()) -> None:
    """Refuse to replace what is no result of the same stage: a slide, a text, the file of another stage.

    Our files appear whole, so what is there and is not HDF5, or lacks `marker`, or holds a dataset of `foreign`, was
    never an earlier result. A damaged HDF5 file may be.

    Raises:
        OutputCollisionError: something else is there. OutputError: a folder is.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; name a file to write")
    if not path.exists() or path.stat().st_size == 0:
        return
    other = OutputCollisionError(
        f"{path} is there already and is no earlier result of this stage; name another output, or delete it"
    )
    if not h5py.is_hdf5(path):
        raise other
    try:
        with open_h5(path) as file:
            names = set(file)
    except DataFileError:
        return
    if names and (marker not in names or names & set(foreign)):
        raise other


def refuse_input_as_output(out: Path, inputs: Iterable[Path]) -> None:
    """Raise `OutputCollisionError` where the output file is one of the inputs."""
    for path in inputs:
        if out.exists() and path.exists() and out.samefile(path):
            raise OutputCollisionError(f"{out} is an input of this command; choose another output file")


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Hex digest of a settings mapping, independent of key order; values must be plain JSON types."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()


def canonical_json(settings: Mapping[str, Any]) -> str:
    """JSON text with sorted keys and no white space: equal settings give equal text."""
    return json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)


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
