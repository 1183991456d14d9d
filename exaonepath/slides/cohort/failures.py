"""Slides that failed: how often, why, and whether they are tried again.

`failures/<id>.json` counts the tries. A later run tries a failed slide again, up to three times in all; then it is
quarantined: reported as failed without being tried, until the user asks for it, or the slide file or the settings
change.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from exaonepath.files.atomic import ensure_folder, write_text
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.outcome import FailedBeforeError

logger = logging.getLogger(__name__)

MAX_TRIES = 3
_FORMAT = 1
_MAX_BYTES = 1 << 16
_MAX_REASON = 4000  # characters


@dataclass(frozen=True)
class FailureRecord:
    """What is stored of a slide that failed.

    Attributes:
        tries: how often it failed.
        error: type of the last error.
        reason: its message.
        slide: path of the slide file.
        size, mtime_ns: of the slide file; -1 if it could not be looked at.
        settings: hash of the settings of the run.
        group: id of the run (of all its processes).
        host, time: where and when (UTC, ISO 8601; only shown).
    """

    tries: int
    error: str
    reason: str
    slide: str
    size: int
    mtime_ns: int
    settings: str
    group: str
    host: str
    time: str

    @property
    def quarantined(self) -> bool:
        """Whether the slide has failed so often that it is not tried again by itself."""
        return self.tries >= MAX_TRIES

    def is_about(self, slide: Path) -> bool:
        """Whether the slide file is still the one that failed; a changed one is tried again."""
        return (self.size, self.mtime_ns) == _identity(slide)


def read_failure(path: Path) -> FailureRecord | None:
    """A failure record; None if there is none, or if it cannot be understood (the slide is then tried)."""
    try:
        with path.open("rb") as file:
            values: Any = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    for each in fields(FailureRecord):
        kind = int if each.name in ("tries", "size", "mtime_ns") else str
        if not isinstance(values.get(each.name), kind) or isinstance(values[each.name], bool):
            return None
    return FailureRecord(**{each.name: values[each.name] for each in fields(FailureRecord)})


class Failures:
    """The failure records of one output folder, as one run sees them.

    Args:
        folder: the folder `failures`; created when the first slide fails.
        settings: hash of the settings of the run.
        group: id of the run (of all its processes).
        retry: try the slides again that are quarantined now.
        known: the records at the start of the run; None: they are read now.
    """

    def __init__(
        self,
        folder: Path,
        settings: str,
        group: str,
        *,
        retry: bool = False,
        known: dict[str, FailureRecord] | None = None,
    ) -> None:
        self.folder, self._settings, self._group, self._retry = folder, settings, group, retry
        self.known = self._read_all() if known is None else known

    def check(self, slide: CohortSlide) -> None:
        """Raise an error if the slide is not to be tried now.

        Raises:
            FailedBeforeError: it is quarantined, or it has failed in another process since this run began.
        """
        record = self._current(slide)
        if record is None:
            return
        if record.quarantined and not (self._retry and record == self.known.get(slide.id)):
            raise FailedBeforeError(
                f"{slide.path} has failed {record.tries} times and is not tried any more (--retry-failed tries it "
                f"again); the last time: {record.reason}"
            )
        if record != self.known.get(slide.id) and record.group != self._group:
            raise FailedBeforeError(f"{slide.path} failed in another process on {record.host}: {record.reason}")

    def add(self, slide: CohortSlide, error: Exception) -> FailureRecord:
        """Count a failure of the slide."""
        before = self._current(slide)
        again = before is not None and not (self._retry and before == self.known.get(slide.id))
        size, mtime = _identity(slide.path)
        record = FailureRecord(
            tries=(before.tries if before is not None and again else 0) + 1,
            error=type(error).__name__,
            reason=" ".join(str(error).split())[:_MAX_REASON] or type(error).__name__,
            slide=os.fspath(slide.path),
            size=size,
            mtime_ns=mtime,
            settings=self._settings,
            group=self._group,
            host=socket.gethostname(),
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        try:
            ensure_folder(self.folder)
            write_text(self._path(slide.id), json.dumps({"format": _FORMAT, **asdict(record)}, indent=1) + "\n")
        except OSError as exc:  # a full disk, for example, which is why the slide failed
            logger.warning("the failure of %s cannot be noted (%s)", slide.path, exc)
        return record

    def clear(self, slide: CohortSlide) -> None:
        """Forget the failures of a slide that is finished now."""
        if slide.id in self.known or self.folder.is_dir():
            try:
                self._path(slide.id).unlink(missing_ok=True)
            except OSError as exc:
                logger.warning("%s cannot be removed (%s)", self._path(slide.id), exc)

    def _current(self, slide: CohortSlide) -> FailureRecord | None:
        """The record of the slide, if it is about this file and these settings."""
        record = read_failure(self._path(slide.id))
        if record is None or record.settings != self._settings:
            return None
        return record if record.is_about(slide.path) else None

    def _path(self, slide: str) -> Path:
        return self.folder / f"{slide}.json"

    def _read_all(self) -> dict[str, FailureRecord]:
        try:
            paths = [path for path in self.folder.iterdir() if path.suffix == ".json"]
        except OSError:
            return {}
        return {path.stem: record for path in paths if (record := read_failure(path)) is not None}


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except (OSError, ValueError):  # the path may be one that a damaged record states
        return -1, -1
    return status.st_size, status.st_mtime_ns
