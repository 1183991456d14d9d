"""Reads HDF5 files: returns plain, complete, checked datasets and rejects all other content.

A file of unknown origin can make HDF5 follow links into other files, load plug-ins, wait for a pipe, or request more
memory than is available. A file of arrays needs none of this, so it is rejected before it happens. Files written by
this package have checksums (`checksums.py`), and no row of them is returned without a comparison.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import h5py
import numpy as np

from exaonepath.errors import DamagedFileError, DataFileError, ExaonePathError, FileBusyError, ForeignFileError
from exaonepath.files import checksums
from exaonepath.files.atomic import try_lock
from exaonepath.files.raw_file import RawFile
from exaonepath.files.signals import signals_held
from exaonepath.files.stored_array import StoredArray

T = TypeVar("T")

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BUSY = {errno.EACCES, errno.EPERM, errno.EAGAIN, errno.EBUSY, errno.ESTALE}
# First bytes of other formats, so that the message for a file given by mistake names its format.
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a ZIP archive, such as PyTorch's .pt or NumPy's .npz"),
    (b"\x93NUMPY", "a NumPy .npy file"),
    (b"\x80", "a Python pickle"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"PAR1", "a Parquet table"),
)

_MAX_BYTES = 1 << 36  # size of one dataset: 10 million patches of width 1536
_MAX_RATIO = 1100  # deflate cannot compress more; a file that declares more was built to exhaust memory
_SLACK = 1 << 24  # a smaller declared size is harmless
_MAX_ATTRIBUTE = 1 << 16
_MAX_ELSEWHERE = 1 << 25  # bytes of a file outside its datasets, where variable-length attributes are stored
_STRING_REFERENCE = 16
# deflate, shuffle, fletcher32, szip, nbit, scaleoffset, lzf. For any other filter, HDF5 would search for a plug-in and
# load it.
_FILTERS = {1, 2, 3, 4, 5, 6, 32000}


@contextmanager
def open_h5(path: str | os.PathLike[str], required: Iterable[str] = ()) -> Iterator[StoredFile]:
    """Open a file of arrays for reading and check that it has the `required` datasets.

    Raises:
        DataFileError: the file is missing or lacks a dataset.
        DamagedFileError: the file is truncated or damaged, or damage is found while the block reads it.
        ForeignFileError: it is not an HDF5 file, or has content that a file of arrays does not need: links, external or
            virtual data.
        FileBusyError: another process is writing the file, or permission to read it is denied.
    """
    path = Path(path)
    with _opened(path) as (file, raw):
        stored = StoredFile(path, file, raw)
        stored.require(required)
        yield stored


@contextmanager
def open_h5_tree(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Open a file of nested groups (AnnData's, for example), after a check for data that is stored in other files.

    Raises:
        The errors of `open_h5`.
    """
    with open_h5_tree_in_parts(path) as (file, _):
        yield file


@contextmanager
def open_h5_tree_in_parts(path: str | os.PathLike[str]) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """`open_h5_tree` for a caller that uses what it read before the file is closed.

    Yields:
        The file, and a function that raises `DataFileError` if something could not be read so far: HDF5 gets zeros
            instead, and the error would be raised at the end only.

    Raises:
        The errors of `open_h5`.
    """
    path = Path(path)
    with _opened(path) as (file, raw):
        _check_tree(path, file)
        yield file, lambda: _raise_read_error(path, raw)


@contextmanager
def passing_errors(opened: AbstractContextManager[T]) -> Iterator[T]:
    """The value of a context manager of this module, or of one that is made of them, without its rule for errors.

    `open_h5` takes the errors of HDF5 that pass through it for damage of the file. In a block that also writes files,
    or does much else, they have other causes, and have to stay what they are.
    """
    with ExitStack() as stack:
        value = stack.enter_context(opened)
        try:
            yield value
        finally:
            stack.close()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[h5py.File, RawFile]]:
    with _raw(path) as raw, signals_held():
        try:
            # HDF5's own lock is off: some file systems have none, and `_raw` has checked the lock that writers take.
            with h5py.File(raw, "r") as file:
                yield file, raw
        except ExaonePathError:
            raise
        # HDF5 raises errors of several types for a damaged file, and not only while opening it.
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError, OverflowError) as exc:
            if raw.error is not None:
                raise DataFileError(f"{path} cannot be read: {raw.error}") from exc
            raise DamagedFileError(_damaged(path, " ".join(str(exc).split()))) from exc
        _raise_read_error(path, raw)


def _raise_read_error(path: Path, raw: RawFile) -> None:
    if raw.error is not None:
        raise DataFileError(f"{path} cannot be read: {raw.error}") from raw.error


@contextmanager
def _raw(path: Path) -> Iterator[RawFile]:
    """The regular file at `path`, with HDF5's signature, which no process is writing."""
    try:
        # O_NONBLOCK: opening a pipe must not block; the flag has no effect on a regular file.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as exc:
        raise DataFileError(f"{path}: no such file") from exc
    except OSError as exc:
        if exc.errno == errno.EACCES and os.name == "posix":  # on other systems it may be a lock
            raise FileBusyError(f"{path} may not be read (permission denied)") from exc
        if exc.errno in _BUSY:
            raise FileBusyError(f"{path} cannot be opened: {exc.strerror}; is another process using it?") from exc
        raise DataFileError(f"{path} cannot be opened: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataFileError(f"{path} is not a regular file")
    with RawFile(descriptor, "r", path) as raw:
        if not try_lock(descriptor, shared=True):
            raise FileBusyError(f"{path} is being written by another process; let it finish")
        _check_signature(path, raw)
        yield raw


def _check_signature(path: Path, raw: RawFile) -> None:
    size, offset = raw.size(), 0
    beginning = bytearray(8)
    # HDF5 searches for its signature at 0, 512, 1024, 2048, ...
    while offset + len(_SIGNATURE) <= size:
        found = bytearray(8)
        raw.seek(offset)
        raw.readinto(found)
        if bytes(found) == _SIGNATURE:
            return
        if offset == 0:
            beginning = found
        offset = 2 * offset or 512
    if raw.error is not None:
        raise DataFileError(f"{path} cannot be read: {raw.error}") from raw.error
    if size == 0:
        raise DamagedFileError(_damaged(path, "it is empty"))
    if not any(beginning):
        raise DamagedFileError(_damaged(path, "it begins with zeros"))
    other = next((what for magic, what in _OTHER_FORMATS if bytes(beginning).startswith(magic)), "another kind of file")
    raise ForeignFileError(f"{path} cannot be read as HDF5: it is {other}")


class StoredFile:
    """An HDF5 file open for reading.

    Attributes:
        path: path of the file.
        names: names of the objects directly inside, sorted.
        has_checksums: whether every dataset is checked when it is read (False for files of other programs).
    """

    def __init__(self, path: Path, file: h5py.File, raw: RawFile) -> None:
        self.path = path
        self._file = file
        self._raw = raw
        self._size = raw.size()
        self.names = sorted(file)
        self._elsewhere: int | None = None
        self._values: dict[tuple[str, str], Any] = {}
        self._owners: dict[str, tuple[Any, h5py.AttributeManager]] = {}
        self._covered = self._check_attributes()
        self.has_checksums = self._covered is not None
        for name in self._covered or ():
            if name and name not in self:
                self.damaged(f"{name} is missing")

    def __contains__(self, name: str) -> bool:
        """Whether a dataset of this name exists (a link is rejected, whatever its target)."""
        if name not in self.names:
            return False
        link = self._file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            self.foreign(f"{name} is a link{f' to {link.filename}' if isinstance(link, h5py.ExternalLink) else ''}")
        return self._file.get(name, getclass=True) is h5py.Dataset

    def require(self, names: Iterable[str]) -> None:
        """Raise `DataFileError` if the file lacks one of these datasets."""
        missing = [name for name in names if name not in self]
        if missing:
            raise DataFileError(f"{self.path} lacks {', '.join(missing)}; it holds {self.names or 'nothing'}")

    def raise_read_error(self) -> None:
        """Raise `DataFileError` if something could not be read so far: HDF5 gets zeros instead."""
        _raise_read_error(self.path, self._raw)

    def damaged(self, what: str) -> NoReturn:
        """Raise `DamagedFileError` for this file."""
        raise DamagedFileError(_damaged(self.path, what))

    def foreign(self, what: str) -> NoReturn:
        """Raise `ForeignFileError` for this file."""
        raise ForeignFileError(f"{self.path}: {what}; such a file is not read")

    def attribute(self, name: str, default: Any = None, *, of: str = "") -> Any:
        """An attribute of the file, or of the dataset `of`: str, a plain number or bool, or an array.

        Raises:
            ForeignFileError: the attribute is larger than any attribute needs to be, or refers to another object.
        """
        value = self._stored_attribute(of, name)
        if value is None:
            return default
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return value.item() if isinstance(value, np.generic) else value

    def attributes(self, names: Iterable[str]) -> dict[str, Any]:
        """Those of the named attributes that the file has."""
        values = {name: self.attribute(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def dataset(self, name: str, kinds: str, shape: tuple[int | None, ...]) -> StoredArray:
        """A dataset, after all checks that are possible without reading it.

        Args:
            name: name of a dataset directly inside the file.
            kinds: NumPy's codes of the allowed types, "f" or "iu".
            shape: the expected shape; None for a length that is not known.

        Raises:
            DataFileError: the dataset is missing, or has another type or shape.
            DamagedFileError: the file does not contain all of it.
            ForeignFileError: its bytes are stored in another file.
        """
        dataset = self._plain(name)
        wanted = "integers" if kinds == "iu" else "floating point"
        batch = len(shape) == 3  # [1, N, D]
        sides = ", ".join("NDC"[at - batch] if side is None else str(side) for at, side in enumerate(shape))
        fits = dataset.dtype.kind in kinds and dataset.dtype.itemsize <= 8 and dataset.ndim == len(shape)
        if not fits or any(side not in (None, got) for side, got in zip(shape, dataset.shape, strict=True)):
            raise DataFileError(
                f"{self.path}: {name} must be {wanted} [{sides}], got {dataset.dtype} {list(dataset.shape)}"
            )
        return StoredArray(name, dataset, self._stored_checksums(name, dataset), self.damaged, self.raise_read_error)

    def shape(self, name: str) -> tuple[int, ...]:
        """Declared shape of a plain dataset of numbers."""
        return tuple(self._plain(name).shape)

    def strings(self, name: str, length: int) -> list[str]:
        """The values of a dataset of `length` strings."""
        dataset = self._plain(name, strings=True)
        if dataset.shape != (length,):
            raise DataFileError(f"{self.path}: {name} must be [{length}], got {list(dataset.shape)}")
        values = [str(value) for value in dataset.asstr("utf-8", "replace")[:]]
        if self._covered is not None:
            stored = self.attribute(checksums.of_dataset(name))
            if not np.array_equal(stored, checksums.strings_checksum(name, values)):
                self.damaged(f"the checksum of {name} does not match")
        return values

    def verify(self) -> None:
        """Read every covered dataset and compare it with its checksums; a file without checksums is not read."""
        for name in self._covered or ():
            if not name:
                continue
            dataset = self._plain(name, strings=True)
            if h5py.check_string_dtype(dataset.dtype):
                self.strings(name, len(dataset))
            else:
                StoredArray(
                    name, dataset, self._stored_checksums(name, dataset), self.damaged, self.raise_read_error
                ).verify()

    def _plain(self, name: str, strings: bool = False) -> h5py.Dataset:
        """The dataset, if all of its bytes are in this file and its size is plausible for that number of bytes."""
        if name not in self:
            raise DataFileError(f"{self.path} lacks the dataset {name}; it holds {self.names or 'nothing'}")
        dataset = self._file[name]
        text = h5py.check_string_dtype(dataset.dtype)
        if dataset.dtype.kind not in "fiu" and not (strings and text):
            raise DataFileError(f"{self.path}: {name} holds {dataset.dtype}, not numbers")
        if dataset.shape is None:
            self.damaged(f"{name} has no extent")
        plan = dataset.id.get_create_plist()
        layout = plan.get_layout()
        if _lies_elsewhere(dataset):
            self.foreign(f"the data of {name} lie in another file")
        filters = [plan.get_filter(at)[0] for at in range(plan.get_nfilters())]
        if not set(filters) <= _FILTERS:
            self.foreign(f"{name} is packed by a filter that HDF5 does not bring")
        # A string of variable length is stored as its length and its position in the file.
        item = _STRING_REFERENCE if text and text.length is None else dataset.dtype.itemsize
        declared, stored = dataset.size * item, dataset.id.get_storage_size()
        if declared > _MAX_BYTES:
            self.foreign(f"{name} declares {list(dataset.shape)}, {declared} bytes, more than is ever read")
        complete = stored == declared
        if layout == h5py.h5d.CHUNKED:
            if np.prod(dataset.chunks, dtype=object) * item > max(declared, _SLACK):
                self.foreign(f"{name} has chunks of {list(dataset.chunks)}, larger than itself")
            wanted = np.prod([-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True)], dtype=object)
            complete = dataset.size == 0 or (
                dataset.id.get_num_chunks() == wanted and declared <= max(_SLACK, _MAX_RATIO * stored)
            )
        if not complete or stored > self._size:
            self.damaged(f"{name} declares {list(dataset.shape)}, and only {min(stored, self._size)} bytes are stored")
        return dataset

    def _stored_checksums(self, name: str, dataset: h5py.Dataset) -> np.ndarray | None:
        crcs = self.attribute(checksums.of_dataset(name))
        if self._covered is None:
            if crcs is not None:
                self.damaged(f"{name} has checksums, and the list of what they cover is missing")
            return None
        if name not in self._covered:
            return None  # added by another program
        rows = dataset.shape[0]
        if not isinstance(crcs, np.ndarray) or crcs.shape != (-(-max(1, rows) // checksums.block_rows(rows)),):
            self.damaged(f"the checksums of {name} are missing")
        return crcs

    def _check_attributes(self) -> set[str] | None:
        """Names of the datasets with checksums; None for a file without checksums."""
        covered, stored = self.attribute(checksums.COVERED), self.attribute(checksums.ATTRIBUTES)
        if covered is None and stored is None:
            return None
        try:
            names = json.loads(covered)
            values = {owner: self._present(owner, listed) for owner, listed in names.items()}
        except (TypeError, ValueError, LookupError, AttributeError, OSError, RuntimeError, OverflowError) as exc:
            raise DamagedFileError(_damaged(self.path, f"its attributes cannot be read ({exc})")) from exc
        if checksums.attributes_checksum(covered, values) != stored:
            self.damaged("the checksum of its attributes does not match")
        return set(names)

    def _present(self, owner: str, names: Iterable[str]) -> dict[str, Any]:
        """The values of attributes that must exist."""
        if owner and owner not in self:
            self.damaged(f"{owner} is missing")
        values = {name: self._stored_attribute(owner, name) for name in names}
        for name, value in values.items():
            if value is None:
                raise KeyError(name)
        return values

    def _stored_attribute(self, owner: str, name: str) -> Any:
        """The value as h5py returns it, after all checks; None if there is no such attribute.

        Each is read once and then kept: an attribute takes HDF5 longer to find than a row of a dataset.
        """
        if (owner, name) in self._values:
            return self._values[owner, name]
        if owner not in self._owners:
            opened = self._file[owner] if owner else self._file
            self._owners[owner] = opened.id, opened.attrs
        identifier, attributes = self._owners[owner]
        value = None
        if h5py.h5a.exists(identifier, name.encode()):
            self._check_attribute(name, h5py.h5a.open(identifier, name.encode()))
            value = attributes[name]
        self._values[owner, name] = value
        return value

    def _check_attribute(self, name: str, attribute: h5py.h5a.AttrID) -> None:
        kind = attribute.get_type()
        if isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str():
            if self._bytes_elsewhere() > _MAX_ELSEWHERE:
                self.foreign(f"{self._bytes_elsewhere()} bytes of it are attributes")
        elif not isinstance(kind, h5py.h5t.TypeStringID | h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID) and not (
            isinstance(kind, h5py.h5t.TypeEnumID)
        ):
            self.foreign(f"its attribute {name} is neither text nor numbers")
        if attribute.get_storage_size() > _MAX_ATTRIBUTE:
            self.foreign(f"its attribute {name} has {attribute.get_storage_size()} bytes")

    def _bytes_elsewhere(self) -> int:
        """Bytes of the file that belong to no dataset: an upper bound for the size of its attributes."""
        if self._elsewhere is None:
            self._elsewhere = self._size
            if self._size > _MAX_ELSEWHERE:
                found: list[int] = []
                self._file.visititems(
                    lambda _, item: found.append(item.id.get_storage_size()) if isinstance(item, h5py.Dataset) else None
                )
                self._elsewhere -= sum(found)
        return self._elsewhere


def _check_tree(path: Path, root: h5py.File) -> None:
    waiting, seen = [root], set()
    while waiting:
        group = waiting.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            continue
        seen.add(address)
        for name in group:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ForeignFileError(f"{path}: {group.name.rstrip('/')}/{name} is a link; such a file is not read")
            item = group[name]
            if isinstance(item, h5py.Group):
                waiting.append(item)
            elif isinstance(item, h5py.Dataset) and _lies_elsewhere(item):
                raise ForeignFileError(f"{path}: the data of {item.name} lie in another file; such a file is not read")


def _lies_elsewhere(dataset: h5py.Dataset) -> bool:
    plan = dataset.id.get_create_plist()
    return bool(plan.get_external_count()) or plan.get_layout() == h5py.h5d.VIRTUAL


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged ({what}); nothing of it was used: restore it, or make it again"
