"""HDF5 files: written whole or not at all, and read through one gate that turns what is broken into one error."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from exaonepath.errors import DataFileError, ExaonePathError, FileBusyError, OutputError
from exaonepath.files.atomic import atomic_path

_BUSY = {errno.EACCES, errno.EPERM, errno.EAGAIN, errno.ENOLCK, errno.EBUSY, errno.ESTALE}


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
