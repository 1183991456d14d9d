"""What each process of a run did: `runs/<run id>.jsonl`, one JSON object a line.

The first row describes the process, then come one row for each stage of a slide and one for each slide, and at last a
row with the counts. A row is appended with one write, so that a killed process leaves at most one torn line, the last.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import socket
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from exaonepath.errors import OutputError
from exaonepath.files.atomic import ensure_folder, open_private
from exaonepath.slides.cohort.batch_system import job_id
from exaonepath.slides.cohort.outcome import SlideOutcome, StageRecord
from exaonepath.version import __version__

logger = logging.getLogger(__name__)

FORMAT = 1


def new_run_id() -> str:
    """An id for this process: time (UTC), host, process id, four random digits."""
    host = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname()) or "host"
    return f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{host}-{os.getpid()}-{secrets.token_hex(2)}"


class RunLog:
    """Writes the run log of this process. Without a folder that can be written, one warning is logged instead.

    Args:
        folder: the folder `runs`; created if needed.
        run: id of this process (see `new_run_id`).
        group: id of the run's first process.
        arguments: of the run, plain JSON.
        n_slides: slides of the run.
        engine: "local", "workers" (a process that starts others), "worker", or the name of another engine.
        devices: devices that are used.
        node: id of the cluster's node that the process runs on, where a cluster gives one.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        *,
        group: str = "",
        arguments: Mapping[str, Any] | None = None,
        n_slides: int = 0,
        engine: str = "local",
        devices: tuple[str, ...] = (),
        node: str = "",
    ) -> None:
        self.run, self.path = run, folder / f"{run}.jsonl"
        self.counts: Counter[str] = Counter()
        self._descriptor: int | None = None
        try:
            ensure_folder(folder)
            self._descriptor = open_private(self.path)
        except OutputError as exc:
            # A finished folder may be read-only: this is no reason to warn.
            read_only = getattr(exc.__cause__, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS)
            logger.log(logging.INFO if read_only else logging.WARNING, "this run is not logged: %s", exc)
        self.write(
            "run",
            format=FORMAT,
            run=run,
            group=group or run,
            host=socket.gethostname(),
            pid=os.getpid(),
            job=job_id(),
            version=__version__,
            arguments=dict(arguments or {}),
            n_slides=n_slides,
            engine=engine,
            devices=list(devices),
            **({"node": node} if node else {}),
        )

    def write(self, event: str, **values: Any) -> None:
        """Append one row; `time` is added (UTC, ISO 8601)."""
        if self._descriptor is None:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        row = json.dumps({"event": event, "time": now, **values}, ensure_ascii=True, default=str) + "\n"
        try:
            os.write(self._descriptor, row.encode())
        except OSError as exc:
            logger.warning("%s cannot be written (%s); the run goes on without it", self.path, exc.strerror)
            os.close(self._descriptor)
            self._descriptor = None

    def add(self, outcome: SlideOutcome) -> None:
        """Append the rows of one slide: its stages, and what became of it."""
        self.counts[outcome.outcome] += 1
        for stage in outcome.stages:
            self.stage(outcome.slide.id, stage)
        error = outcome.error
        self.write(
            "slide",
            slide=outcome.slide.id,
            outcome=outcome.outcome,
            seconds=round(outcome.seconds, 3),
            error="" if error is None else type(error).__name__,
            reason="" if error is None else str(error),
        )

    def stage(self, slide: str, record: StageRecord) -> None:
        """Append the row of one stage."""
        self.write("stage", slide=slide, **{**asdict(record), "seconds": round(record.seconds, 3)})

    def close(self, exit_status: int) -> None:
        """Append the last row."""
        self.write("end", counts=dict(self.counts), exit_status=exit_status)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_run_log(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a run log; lines that cannot be understood, such as a torn last one, are left out."""
    with Path(path).open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and isinstance(row.get("event"), str):
                yield row
