"""Worker processes on one machine: one for each device, or several that share the processors.

The process that starts them hands out one slide after another, watches over them, and starts a new one for each that
dies; it loads no encoder. Claims protect the slides from other runs on the same folder, not the workers from each
other.

A worker that dies had up to four slides in hand, and which of them is to blame is not known. They are worked on again,
one at a time. If a worker dies with one slide only in hand, and without having come further in it than before, this
counts as a failed try of that slide.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from exaonepath.errors import WorkerError
from exaonepath.processors import usable_processors
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.encoders import LoadEncoders, load_encoders
from exaonepath.slides.cohort.failures import Failures
from exaonepath.slides.cohort.finished_since import FinishedSince
from exaonepath.slides.cohort.job import settings_key
from exaonepath.slides.cohort.local import SlideProgress
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.overwriting import note_existing
from exaonepath.slides.cohort.run_log import RunLog, new_run_id
from exaonepath.slides.cohort.run_options import EXIT_INTERRUPTED, RunOptions, RunStatus, open_leases
from exaonepath.slides.cohort.schedule import Schedule, Task
from exaonepath.slides.cohort.scheduler import begin_at
from exaonepath.slides.cohort.worker import WorkerConfig, worker_main
from exaonepath.slides.outputs import remove_leftovers
from exaonepath.slides.stages import EncodeSettings

logger = logging.getLogger(__name__)

_MAX_STARTS = 3  # workers that die in a row before they ask for a slide: then the run is given up
_GRACE = 60.0  # seconds that workers have to end in an orderly way


@dataclass
class _Worker:
    """A worker process, as the process that started it sees it."""

    device: str
    process: SpawnProcess
    connection: Connection
    wants: bool = False
    asked: bool = False  # it has asked for a slide: its encoders are loaded
    ended: bool = False  # it was told that there are no more slides, and has said that it ends
    dismissed: bool = False
    in_hand: dict[str, Task] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)


def encode_with_workers(
    slides: Sequence[CohortSlide],
    out: Path,
    weights: str,
    settings: EncodeSettings,
    devices: Sequence[str],
    options: RunOptions | None = None,
    *,
    load: LoadEncoders = load_encoders,
    initialize: Callable[[], None] | None = None,
    arguments: Mapping[str, Any] | None = None,
    progress: SlideProgress | None = None,
) -> Iterator[SlideOutcome]:
    """Work on the slides of a cohort in several processes, the largest slides first.

    Args:
        slides: the slides.
        out: output folder.
        weights: of the slides that do not state weights of their own.
        settings: of all slides.
        devices: of the workers, one each; a device may be repeated.
        options: see `RunOptions`.
        load: loads encoders; it is pickled, like `initialize`.
        initialize: called at the start of each worker.
        arguments: plain JSON that describes the run; written into the run log.
        progress: called with (slide, patches done, total patches).

    Yields:
        What became of each slide; exactly one outcome a slide (see `encode_cohort`).

    Raises:
        OutputError: the folder of claims cannot be written, although there is something to do.
        WorkerError: workers die before they begin.
        ExaonePathError: a worker cannot begin, since the weights cannot be loaded, for example.
    """
    run = _WorkersRun(slides, out, weights, settings, devices, options or RunOptions(), load, initialize, arguments)
    outcomes = run.run(progress)
    try:
        yield from outcomes
    finally:
        outcomes.close()


class _WorkersRun:
    def __init__(
        self,
        slides: Sequence[CohortSlide],
        out: Path,
        weights: str,
        settings: EncodeSettings,
        devices: Sequence[str],
        options: RunOptions,
        load: LoadEncoders,
        initialize: Callable[[], None] | None,
        arguments: Mapping[str, Any] | None,
    ) -> None:
        self._devices, self._context = list(devices), multiprocessing.get_context("spawn")
        self._run = new_run_id()
        self._leases = open_leases(out, slides, self._run, settings, options)
        self._schedule = Schedule(in_order(slides, options), self._leases, options.poll)
        self._slides = {slide.id: slide for slide in slides}
        key = settings_key(settings, weights)
        self._failures = Failures(out / "failures", key, self._run, retry=options.retry_failed)
        self._config = WorkerConfig(
            out,
            weights,
            load,
            settings,
            options,
            "",
            max(1, usable_processors() // len(devices)),
            self._run,
            key,
            self._failures.known,
            note_existing(out, self._slides, settings.overwrite),
            None if self._leases is None else FinishedSince(out, self._slides),
            self._leases is not None,
            initialize,
            dict(arguments or {}),
            len(slides),
        )
        self._workers: list[_Worker] = []
        self._furthest: dict[str, int] = {}  # patches done when a worker died, by slide
        self._outcomes: deque[SlideOutcome] = deque()
        self._deaths_at_start = 0

    def run(self, progress: SlideProgress | None) -> Generator[SlideOutcome, None, None]:
        log = RunLog(
            self._config.out / "runs",
            self._run,
            arguments=self._config.arguments,
            n_slides=len(self._slides),
            engine="workers",
            devices=tuple(self._devices),
        )
        status = RunStatus()
        try:
            for device in self._devices[: max(1, len(self._slides))]:
                self._start(device)
            while self._workers:
                delay = self._serve()
                while self._outcomes:
                    outcome = self._outcomes.popleft()
                    status.add(outcome)
                    yield outcome
                self._receive(delay, progress, log)
            while self._outcomes:
                outcome = self._outcomes.popleft()
                status.add(outcome)
                yield outcome
            remove_leftovers(self._config.out, self._slides)
            status.ended = True
        finally:
            self._stop()
            log.close(status.exit_status)

    def _start(self, device: str) -> None:
        ours, theirs = self._context.Pipe()
        config = replace(self._config, device=device)
        process = self._context.Process(
            target=worker_main, args=(theirs, config), name=f"exaonepath-worker-{device}", daemon=True
        )
        process.start()
        theirs.close()
        self._workers.append(_Worker(device, process, ours))

    def _serve(self) -> float:
        """Hand out slides to the workers that want one; returns the seconds until this is to be done again."""
        delay = math.inf
        for worker in sorted(self._workers, key=lambda worker: len(worker.in_hand)):
            if not worker.wants or worker.dismissed:
                continue
            if worker.in_hand and (self._alone(worker) or self._needed_by_others(worker)):
                continue
            found = self._schedule.next()
            if isinstance(found, float):
                delay = min(delay, found)
            elif found is None:
                worker.dismissed, worker.wants = True, False
                self._send(worker, None)
            elif found.alone and worker.in_hand:
                self._schedule.again(found)
            else:
                worker.wants = False
                worker.in_hand[found.slide.id] = found
                self._send(worker, found)
        return delay

    def _alone(self, worker: _Worker) -> bool:
        return any(task.alone for task in worker.in_hand.values())

    def _needed_by_others(self, worker: _Worker) -> bool:
        """Whether the slides that are left are fewer than the workers without one: they are not taken in advance."""
        idle = sum(not other.in_hand and not other.dismissed for other in self._workers if other is not worker)
        return self._schedule.unclaimed <= idle

    def _send(self, worker: _Worker, message: Task | None) -> None:
        with suppress(OSError):  # it died; its end is noticed next
            worker.connection.send(message)

    def _receive(self, delay: float, progress: SlideProgress | None, log: RunLog) -> None:
        sources: dict[Any, _Worker] = {}
        for worker in self._workers:
            sources[worker.connection] = sources[worker.process.sentinel] = worker
        ready = wait(list(sources), None if delay == math.inf else max(0.01, delay))
        for worker in {id(worker): worker for worker in map(sources.__getitem__, ready)}.values():
            open_ = self._drain(worker, progress)
            if not open_ or not worker.process.is_alive():
                self._drain(worker, progress)
                self._bury(worker, log)

    def _drain(self, worker: _Worker, progress: SlideProgress | None = None) -> bool:
        """Handle the messages of a worker that have arrived; False if there will be no more."""
        try:
            while worker.connection.poll():
                self._handle(worker, worker.connection.recv(), progress)
        except (EOFError, OSError):
            return False
        return True

    def _handle(self, worker: _Worker, message: tuple[Any, ...], progress: SlideProgress | None) -> None:
        kind, *values = message
        if kind == "want":
            worker.wants = worker.asked = True
            self._deaths_at_start = 0
        elif kind == "busy":
            self._schedule.busy(worker.in_hand.pop(values[0]))
        elif kind == "progress":
            name, done, total = values
            worker.progress[name] = done
            if progress is not None:
                progress(self._slides[name], done, total)
        elif kind == "outcome":
            name, outcome = values
            self._schedule.done(worker.in_hand.pop(name))
            self._outcomes.append(outcome)
        elif kind == "end":
            worker.ended = True
        elif kind == "fatal":
            raise values[0]

    def _bury(self, worker: _Worker, log: RunLog) -> None:
        """A worker has ended: return its slides, and start another one if it is needed."""
        worker.process.join()
        worker.connection.close()
        self._workers.remove(worker)
        tasks, code = list(worker.in_hand.values()), worker.process.exitcode
        if worker.ended and not tasks:
            return
        reason = _reason(code)
        if code == EXIT_INTERRUPTED:  # somebody ended this worker in an orderly way: no fault of a slide
            for task in tasks:
                self._schedule.again(replace(task, stale=None))
        elif not worker.asked:
            self._deaths_at_start += 1
            if self._deaths_at_start >= _MAX_STARTS:
                raise WorkerError(
                    f"a worker process on {worker.device} {reason} before it began, {_MAX_STARTS} times in a row; "
                    "perhaps the memory does not suffice for so many workers"
                )
            logger.warning("a worker process on %s %s before it began; starting another one", worker.device, reason)
        else:
            names = ", ".join(worker.in_hand) or "no slide"
            logger.warning("a worker process on %s %s (in hand: %s)", worker.device, reason, names)
            self._blame(worker, tasks, reason, log)
        if self._schedule.unclaimed or not (self._workers or self._schedule.empty):
            self._start(worker.device)

    def _blame(self, worker: _Worker, tasks: list[Task], reason: str, log: RunLog) -> None:
        for task in tasks:
            name = task.slide.id
            done = worker.progress.get(name, 0)
            further = done > self._furthest.get(name, 0)
            self._furthest[name] = max(done, self._furthest.get(name, 0))
            if task.alone and not further:
                error = WorkerError(
                    f"{task.slide.path}: the worker process {reason} while it worked on this slide alone"
                )
                if self._failures.add(task.slide, error).quarantined:
                    outcome = SlideOutcome(task.slide, "failed", error=error)
                    log.add(outcome)
                    self._outcomes.append(outcome)
                    self._schedule.done(task)
                    continue
            self._schedule.again(Task(task.slide, alone=True))

    def _stop(self) -> None:
        """End the workers that are left: in an orderly way, or by force if that takes too long."""
        self._schedule.stop()
        try:
            for worker in self._workers:
                if worker.process.is_alive():
                    worker.process.terminate()
            deadline = time.monotonic() + _GRACE
            while self._workers and time.monotonic() < deadline:
                sources = [item for worker in self._workers for item in (worker.connection, worker.process.sentinel)]
                wait(sources, max(0.0, deadline - time.monotonic()))
                for worker in list(self._workers):
                    with suppress(Exception):  # another reason is being raised already
                        self._drain(worker)
                    if not worker.process.is_alive():
                        worker.process.join()
                        worker.connection.close()
                        self._workers.remove(worker)
        finally:
            for worker in self._workers:
                worker.process.kill()
                worker.process.join()
                worker.connection.close()
            self._workers.clear()
            if self._leases is not None:
                self._leases.close()


def in_order(slides: Sequence[CohortSlide], options: RunOptions) -> list[CohortSlide]:
    """The slides in the order in which workers take them: a shard's part after another, in each the largest first."""
    ordered = begin_at(slides, options.shard)
    size = max(1, -(-len(ordered) // max(1, options.shard.parts)))
    parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    return [slide for part in parts for slide in sorted(part, key=_size, reverse=True)]


def _size(slide: CohortSlide) -> int:
    try:
        return slide.path.stat().st_size
    except OSError:
        return 0


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with status {code}"
