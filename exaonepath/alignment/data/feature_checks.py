"""Checks of features files, and a record of them, so that an unchanged file is read completely only once.

A record belongs to one table of slides and lies in the user's cache. It states, for every file, what the check found
and what the file system said about the file: inode, size, and the times of the last change of the content and of the
inode. If any of these differs, the file is checked again. A change that leaves all four as they were is not noticed
here: damage on the disk itself, or, on a file system without inode times, a replacement of the same size whose
modification time was set back. A file written by this package has checksums, which are compared whenever rows are
read, so that damage is found then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from exaonepath.errors import ExaonePathError
from exaonepath.files.atomic import ensure_folder, write_text
from exaonepath.files.feature_rows import open_features
from exaonepath.files.features import read_failures
from exaonepath.files.user_cache import cache_folder

logger = logging.getLogger(__name__)

FeatureCheck = Literal["full", "again", "header"]

ATTRIBUTES = ("weights_fingerprint", "preprocessing", "weights")
_NO_STATE: FileState = (0, 0, 0, 0)
_FORMAT = 1  # of the record, and of the check: a stricter check needs another number
# A change directly after the check may fall into the same tick of the clock and would not be seen.
_SETTLED_SECONDS = 2.0
_SAVE_SECONDS = 30.0  # what an interrupted check has found by then is kept
# A check of fewer bytes takes about a second; no record of it is written.
LEAST_BYTES = 256 << 20

FileState = tuple[int, int, int, int]  # see `file_state`


@dataclass(frozen=True)
class CheckedFile:
    """What a check found.

    Attributes:
        n_patches, dim: shape of the features.
        half: whether they are stored as float16.
        header: see `OpenFeatures.header`.
        state: see `file_state`.
        attrs: those of `ATTRIBUTES` that the file has.
    """

    n_patches: int
    dim: int
    half: bool
    header: str
    state: FileState
    attrs: dict[str, Any] = field(default_factory=dict)


def file_state(path: Path) -> FileState | None:
    """Inode, size, and times of the last change of content and inode in nanoseconds; None if there is no such file.

    The device is not part of it: its number may be another one after a restart.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


class FeatureChecks:
    """Checks of the files of one table of slides.

    Args:
        table: the table of slides, which names the record.
        kind: "full": all content is checked, or was checked before and the file has not changed; "again": all content
            is checked now; "header": shapes only.

    Attributes:
        bytes_read: bytes of the files that were read completely.
        remembered: number of files that were not read.
    """

    def __init__(self, table: Path, kind: FeatureCheck) -> None:
        self.kind = kind
        folder = cache_folder()
        name = hashlib.sha256(os.fsencode(table.absolute())).hexdigest()[:32]
        self._table = table
        self._record = None if folder is None else folder / "feature-checks" / f"{name}.json"
        self._known = {} if self._record is None or kind == "again" else _load(self._record)
        self._saved_at = time.monotonic()
        self._changed = False
        self.bytes_read = self.remembered = 0

    def check(self, path: Path) -> CheckedFile:
        """Check a file, or return the result of an earlier check of the unchanged file.

        Raises:
            DataFileError: the file cannot be used; see `read_features`.
        """
        key, before, started = os.path.abspath(path), file_state(path), time.time_ns()  # noqa: PTH100
        known = self._known.get(key)
        if known is not None and known.state == before:
            self.remembered += 1
            return known
        if self._known.pop(key, None):
            self._changed = True
        found = _check(path, before or _NO_STATE, completely=self.kind != "header")
        if before is None or self.kind == "header":
            return found
        self.bytes_read += before[1]
        settled = max(before[2], before[3]) < started - _SETTLED_SECONDS * 1e9
        if settled and file_state(path) == before and _is_plain(found.attrs):
            self._known[key] = found
            self._changed = True
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()
        return found

    def save(self, only: Iterable[Path] | None = None) -> None:
        """Write the record. A record that cannot be written costs time later, so this is no error.

        Args:
            only: forget all other files.
        """
        self._saved_at = time.monotonic()
        if only is not None:
            kept = {os.path.abspath(path) for path in only}  # noqa: PTH100
            self._known = {key: entry for key, entry in self._known.items() if key in kept}
        if self._record is None or not self._changed or self.bytes_read < LEAST_BYTES:
            return
        try:
            ensure_folder(self._record.parent)
            write_text(self._record, _dump(self._table, self._known))
        except (ExaonePathError, OSError) as exc:
            logger.info("the check of %s is not remembered: %s", self._table, exc)
            return
        self._changed = False


def _check(path: Path, state: FileState, *, completely: bool) -> CheckedFile:
    with open_features(path) as file:
        attrs = file.stored.attributes(ATTRIBUTES)
        if completely:
            file.check()
            read_failures(path, file.stored)
        return CheckedFile(*file.shape, file.is_half, file.header, state, attrs)


def _is_plain(attrs: dict[str, Any]) -> bool:
    return all(isinstance(value, str | int | float) for value in attrs.values())


def _dump(table: Path, known: dict[str, CheckedFile]) -> str:
    # Nearly all files have the same attributes, so each combination is written once.
    makers: dict[str, int] = {}
    files = []
    for key, found in sorted(known.items()):
        maker = makers.setdefault(json.dumps(found.attrs, sort_keys=True), len(makers))
        files.append([key, found.n_patches, found.dim, found.half, found.header, list(found.state), maker])
    content = json.dumps({"table": str(table.absolute()), "attributes": list(makers), "files": files})
    return json.dumps({"format": _FORMAT, "crc32": zlib.crc32(content.encode()), "content": content}) + "\n"


def _load(record: Path) -> dict[str, CheckedFile]:
    """The files of a record; none if there is no record, or it is damaged or of another version."""
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["format"] != _FORMAT:
            return {}
        if zlib.crc32(stored["content"].encode()) != stored["crc32"]:
            raise ValueError("its checksum does not match")
        content = json.loads(stored["content"])
        makers = [json.loads(text) for text in content["attributes"]]
        return {
            key: CheckedFile(n, dim, half, header, (state[0], state[1], state[2], state[3]), makers[maker])
            for key, n, dim, half, header, state, maker in content["files"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
        logger.info("%s cannot be used (%s): features files are checked again", record, exc)
        return {}
