"""What is finished, running and failed in an output folder, from its files: results, claims, failures, run logs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from exaonepath.errors import DataFileError, OutputError
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.run_log import read_run_log
from exaonepath.slides.cohort.state import SlideState, State, stored_state
from exaonepath.slides.outputs import (
    CLAIMS,
    FAILURES,
    RUNS,
    Kind,
    Layout,
    partial_ids,
    paths_in_layout,
    read_layout,
    stored_ids,
)

FORMAT = 1  # of `CohortStatus.as_json`
STATES: tuple[State, ...] = ("finished", "empty", "running", "failed", "stale", "partial", "new")
STAGES = ("patches", "features", "slide")


@dataclass(frozen=True)
class StageTime:
    """How long a stage of a slide took when it was last computed.

    Attributes:
        seconds: wall time. Stages of different slides overlap.
        device: where it ran.
        reader: of the slide.
        peak_memory: bytes.
        time: when it ended (UTC, ISO 8601).
    """

    seconds: float
    device: str = ""
    reader: str = ""
    peak_memory: int = 0
    time: str = ""


@dataclass(frozen=True)
class SlideStatus:
    """A slide, and the stages that were computed, by their names ("patches", "features", "slide")."""

    state: SlideState
    stages: Mapping[str, StageTime] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        one, holder = self.state, self.state.holder
        return {
            "id": one.id,
            "state": one.state,
            "reason": one.reason,
            "slide": one.slide,
            "patient": one.patient,
            "patches": one.n_patches,
            "unreadable": one.n_failed,
            "weights": one.weights,
            "random_weights": one.random_weights,
            "holder": holder
            and {"host": holder.host, "pid": holder.pid, "job": holder.job, "since": holder.since, "run": holder.run},
            "heartbeat_s": None if one.heartbeat_s is None else round(one.heartbeat_s, 1),
            "failure": one.failure
            and {
                "error": one.failure.error,
                "tries": one.failure.tries,
                "host": one.failure.host,
                "time": one.failure.time,
            },
            "quarantined": one.quarantined,
            "stages": {name: vars(stage) for name, stage in self.stages.items()},
        }


@dataclass(frozen=True)
class RunStatus:
    """What one process did.

    Attributes:
        run, group: its id, and that of the run's first process.
        host, pid, job: where it ran.
        engine: what it was: "local", "workers", "worker", ...
        began, latest: time of the first and of the last row of its log (UTC, ISO 8601).
        ended: whether the log has its last row. A process that was killed has none.
        exit_status: None if it has not ended.
        n_slides: slides of the run.
        counts: its slides by what became of them.
    """

    run: str
    group: str = ""
    host: str = ""
    pid: int = 0
    job: str = ""
    engine: str = ""
    began: str = ""
    latest: str = ""
    ended: bool = False
    exit_status: int | None = None
    n_slides: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CohortStatus:
    """The status of an output folder.

    Attributes:
        out: the folder.
        time: when it was looked at (UTC, ISO 8601).
        layout: of the folder.
        slides: every slide that has left a trace, and those that were asked about, by id.
        runs: by the time at which they began.
    """

    out: Path
    time: str
    layout: Layout
    slides: tuple[SlideStatus, ...]
    runs: tuple[RunStatus, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of slides in each state; "unreadable" ones are finished, and "quarantined" ones failed or stale."""
        states = Counter(one.state.state for one in self.slides)
        return {
            **{name: states[name] for name in STATES},
            "unreadable": sum(one.state.n_failed > 0 for one in self.slides),
            "quarantined": sum(one.state.quarantined for one in self.slides),
        }

    def as_json(self) -> dict[str, Any]:
        """The object that docs/cohorts.md describes."""
        return {
            "format": FORMAT,
            "out": str(self.out),
            "time": self.time,
            "layout": self.layout,
            "counts": self.counts,
            "patches": sum(one.state.n_patches or 0 for one in self.slides if one.state.state == "finished"),
            "slides": [one.as_json() for one in self.slides],
            "runs": [{**vars(run), "counts": dict(run.counts)} for run in self.runs],
        }


def cohort_status(out: str | os.PathLike[str], slides: Iterable[CohortSlide] = ()) -> CohortStatus:
    """Look at an output folder. Nothing is written, and no slide is opened.

    Args:
        out: an output folder of `exaonepath encode`.
        slides: slides that are listed as new if they have left no trace.

    Raises:
        DataFileError: there is no such folder, or its layout is not known.
        OutputError: a folder cannot be listed.
    """
    folder = Path(out)
    if not folder.is_dir():
        raise DataFileError(f"{folder}: no such folder")
    layout = read_layout(folder)
    partial = partial_ids(folder, layout)
    listed = {slide.id: slide for slide in slides}
    ids = {*listed, *partial}
    kinds: tuple[Kind, ...] = ("patches", "features", "embedding", "skipped")
    for kind in kinds:
        ids.update(name for name, _ in stored_ids(folder, kind, layout))
    for where in (CLAIMS, FAILURES):
        ids.update(_records(folder / where))
    stages, runs = _runs(folder / RUNS)
    found = []
    for name in sorted(ids):
        try:
            state = stored_state(folder, name, paths_in_layout(folder, name, layout), partial=name in partial)
        except OutputError as exc:  # something else stands in the place of its claim
            state = SlideState(name, "failed", str(exc))
        if not state.slide and name in listed:
            known = listed[name]
            state = replace(state, slide=str(known.path), patient=state.patient or known.patient or "")
        found.append(SlideStatus(state, stages.get(name, {})))
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return CohortStatus(folder, now, layout, tuple(found), tuple(runs))


def _records(folder: Path) -> list[str]:
    """Ids that have a file in the folder of claims or of failures."""
    try:
        with os.scandir(folder) as entries:
            return [e.name[:-5] for e in entries if e.name.endswith(".json") and not e.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise OutputError(f"{folder} cannot be listed: {exc.strerror}") from exc


def _runs(folder: Path) -> tuple[dict[str, dict[str, StageTime]], list[RunStatus]]:
    """The latest computation of each stage by id of the slide, and what each process did."""
    stages: dict[str, dict[str, StageTime]] = {}
    runs: list[RunStatus] = []
    try:
        logs = sorted(path for path in folder.iterdir() if path.suffix == ".jsonl" and not path.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return stages, runs
    except OSError as exc:
        raise OutputError(f"{folder} cannot be listed: {exc.strerror}") from exc
    for path in logs:
        try:
            runs.append(_run(path, stages))
        except OSError:  # removed a moment ago, or not readable: the results themselves say what is finished
            continue
    return stages, sorted(runs, key=lambda run: (run.began, run.run))


def _run(path: Path, stages: dict[str, dict[str, StageTime]]) -> RunStatus:
    values: dict[str, Any] = {"run": path.stem}
    counts: Counter[str] = Counter()
    for row in read_run_log(path):
        event, time = row["event"], _text(row.get("time"))
        values["latest"] = time or values.get("latest", "")
        if event == "run":
            values |= {name: _text(row.get(name)) for name in ("group", "host", "job", "engine")}
            values |= {"pid": _count(row.get("pid")), "n_slides": _count(row.get("n_slides")), "began": time}
        elif event == "slide":
            counts[_text(row.get("outcome"))] += 1
        elif event == "end":
            status = row.get("exit_status")
            values |= {"ended": True, "exit_status": status if isinstance(status, int) else None}
        elif event == "stage" and not row.get("reused"):
            name, stage = _text(row.get("slide")), _text(row.get("stage"))
            earlier = stages.setdefault(name, {}).get(stage)
            if stage in STAGES and (earlier is None or earlier.time <= time):
                stages[name][stage] = StageTime(
                    _seconds(row.get("seconds")),
                    _text(row.get("device")),
                    _text(row.get("reader")),
                    _count(row.get("peak_memory")),
                    time,
                )
    return RunStatus(**values, counts=dict(counts))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _seconds(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e9 else 0.0
