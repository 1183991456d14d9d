"""The file by which a process claims a slide: what it states, and the steps that are safe when several processes race.

See `lease` for when a claim is made, renewed and taken over.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from exaonepath.errors import OutputError
from exaonepath.files.atomic import output_error, temporary_name

_FORMAT = 1
_MAX_BYTES = 1 << 16
_BLOCK = 256  # the file has a multiple of these bytes, always the same number: it is written over in place
# Errors of `link` by which a file system reports that it has no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)


@dataclass(frozen=True)
class Holder:
    """What a lease states about its owner.

    Attributes:
        token: random; names the partial files of this owner.
        host, pid, job: where it runs; `job` is the id of a scheduler's job, or empty.
        space, started: identify the process on its machine (see `files.processes`).
        run: id of its run log.
        since: when the slide was claimed, by the owner's clock (UTC, ISO 8601); only shown.
        renew_every: seconds between two renewals.
        counter: number of renewals.
    """

    token: str
    host: str
    pid: int
    job: str
    space: str
    started: str
    run: str
    since: str
    renew_every: float
    counter: int


@dataclass(frozen=True)
class Claim:
    """A lease as an observer sees it.

    Attributes:
        content: the bytes of the file.
        holder: what they state; None if they cannot be understood (a lease that is damaged, or not yet written).
    """

    content: bytes
    holder: Holder | None


def read_claim(path: str | os.PathLike[str]) -> Claim | None:
    """Read a lease; None if there is none.

    Raises:
        OutputError: the path is a link, a folder or a special file, or cannot be read.
    """
    content = _content(Path(path))
    return None if content is None else Claim(content, _parse(content))


def create_claim(path: Path, content: bytes) -> int | None:
    """A descriptor of a new file with this content; None if the file exists. Never seen by others without content,
    unless the file system has no hard links."""
    temporary = temporary_name(path)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_all(descriptor, content)
        try:
            os.link(temporary, path)
            return descriptor
        except FileExistsError:
            # Over NFS, the answer to a successful request may get lost, and its repetition fails.
            if os.fstat(descriptor).st_nlink == 2 and path.exists() and path.samefile(temporary):
                return descriptor
            os.close(descriptor)
            return None
        except OSError as exc:
            if exc.errno not in _NO_LINKS:
                raise
    except BaseException:
        os.close(descriptor)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    os.close(descriptor)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return None
    try:
        write_all(descriptor, content)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def remove_claim(path: Path, expected: bytes) -> bool:
    """Remove a lease if it has this content; False if it was renewed, released or taken over by another meanwhile.

    The lease is renamed first: of several processes one succeeds. What it got may be another lease than it looked at;
    then it is put back.
    """
    taken = temporary_name(path)
    try:
        try:
            path.rename(taken)
        except FileNotFoundError:
            if not taken.exists():  # over NFS, a rename that was done may be reported as failed
                return False
        content = _content(taken)
        if content != expected and content is not None:
            _put_back(taken, path, content)
            return False
        taken.unlink(missing_ok=True)
    except OutputError:
        raise
    except OSError as exc:
        raise output_error(path, exc) from exc
    return True


def _put_back(taken: Path, path: Path, content: bytes) -> None:
    try:
        os.link(taken, path)
    except FileExistsError:
        pass  # claimed since; the owner of what was taken finds that it lost its lease
    except OSError:
        # Without hard links: a copy. Its owner opens it again when it renews it.
        with suppress(FileExistsError):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                write_all(descriptor, content)
            finally:
                os.close(descriptor)
    taken.unlink(missing_ok=True)


def _content(path: Path) -> bytes | None:
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        if path.is_symlink():
            raise _not_a_lease(path) from None
        return None
    except OSError as exc:
        if path.is_symlink():
            raise _not_a_lease(path) from exc
        if exc.errno == errno.ESTALE:  # removed by another machine between two steps of opening it
            return None
        raise output_error(path, exc) from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _not_a_lease(path)
        return os.read(descriptor, _MAX_BYTES)
    except OSError as exc:
        if isinstance(exc, OutputError):
            raise
        if exc.errno == errno.ESTALE:
            return None
        raise output_error(path, exc) from exc
    finally:
        os.close(descriptor)


def _not_a_lease(path: Path) -> OutputError:
    return OutputError(f"{path} stands where the claim of a slide is stored, and is no regular file; remove it")


def packed(holder: Holder, size: int = 0) -> bytes:
    """JSON, filled up with spaces: the counter grows in place."""
    text = json.dumps({"format": _FORMAT, **asdict(holder)}, ensure_ascii=True).encode() + b"\n"
    size = size or -(-(len(text) + 20) // _BLOCK) * _BLOCK
    return text[:-1].ljust(size - 1) + b"\n"


def _parse(content: bytes) -> Holder | None:
    try:
        values: Any = json.loads(content)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    kinds: dict[str, type | tuple[type, ...]] = {"pid": int, "counter": int, "renew_every": (int, float)}
    for each in fields(Holder):
        value = values.get(each.name)
        if not isinstance(value, kinds.get(each.name, str)) or isinstance(value, bool):
            return None
    return Holder(**{each.name: values[each.name] for each in fields(Holder)})


def write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
