"""Hands out the slides of a run to workers: other processes, on this machine or on others.

The process that does this loads no encoder. It watches over the workers, and starts a new one for each that dies.
Claims protect the slides from other runs on the same folder, not the workers from each other.

A worker that dies had up to four slides in hand, and which of them is to blame is not known. They are worked on again,
one at a time. If a worker dies with one slide only in hand, and without having come further in it than before, this
counts as a failed try of that slide.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from exaonepath.errors import WorkerError
from exaonepath.slides.cohort.batch_system import begin_at
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.encoders import LoadEncoders, load_encoders
from exaonepath.slides.cohort.failures import Failures
from exaonepath.slides.cohort.finished_since import FinishedSince
from exaonepath.slides.cohort.job import settings_key
from exaonepath.slides.cohort.local import SlideProgress
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.overwriting import note_existing
from exaonepath.slides.cohort.run_log import RunLog, new_run_id
from exaonepath.slides.cohort.run_options import RunOptions, RunStatus, open_leases
from exaonepath.slides.cohort.schedule import Schedule, Task
from exaonepath.slides.cohort.worker import WorkerConfig
from exaonepath.slides.outputs import FAILURES, RUNS, remove_leftovers
from exaonepath.slides.stages import EncodeSettings

logger = logging.getLogger(__name__)

_MAX_STARTS = 3  # workers that die in a row before they ask for a slide: then the run is given up


@dataclass(frozen=True)
class CohortWork:
    """What is to be done by workers.

    Attributes:
        slides: the slides.
        out: output folder.
        weights: of the slides that do not state weights of their own.
        settings: of all slides.
        options: see `RunOptions`.
        load: loads encoders; it is pickled, like `initialize`.
        initialize: called at the start of each worker.
        arguments: plain JSON that describes the run; written into the run log.
    """

    slides: Sequence[CohortSlide]
    out: Path
    weights: str
    settings: EncodeSettings
    options: RunOptions = field(default_factory=RunOptions)
    load: LoadEncoders = load_encoders
    initialize: Callable[[], None] | None = None
    arguments: Mapping[str, Any] | None = None


@dataclass(eq=False)
class Worker:
    """A worker, as the process that started it sees it.

    Attributes:
        device: where it encodes.
        wants: it waits for a slide.
        asked: it has asked for a slide: its encoders are loaded.
        ended: it has reported its end.
        dismissed: it was notified that there are no more slides.
        in_hand: the slides that it works on.
        progress: patches done of those.
    """

    device: str
    wants: bool = False
    asked: bool = False
    ended: bool = False
    dismissed: bool = False
    in_hand: dict[str, Task] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)


W = TypeVar("W", bound=Worker)


class Dispatcher(ABC, Generic[W]):
    """A run whose slides are worked on by others; subclasses start the workers and exchange messages with them.

    Args:
        work: what is to be done.
        devices: of the workers, one each.
        threads: of processors that each worker may use.

    Attributes:
        engine: its name in the run log.
    """

    engine: str

    def __init__(self, work: CohortWork, devices: Sequence[str], threads: int) -> None:
        out, settings, options = work.out, work.settings, work.options
        self._devices = list(devices)
        self._run = new_run_id()
        self._leases = open_leases(out, work.slides, self._run, settings, options)
        self._schedule = Schedule(in_order(work.slides, options), self._leases, options.poll)
        self._slides = {slide.id: slide for slide in work.slides}
        key = settings_key(settings, work.weights)
        self._failures = Failures(out / FAILURES, key, self._run, retry=options.retry_failed)
        self._config = WorkerConfig(
            out,
            work.weights,
            work.load,
            settings,
            options,
            "",
            threads,
            self._run,
            key,
            self._failures.known,
            note_existing(out, self._slides, settings.overwrite),
            None if self._leases is None else FinishedSince(out, self._slides),
            self._leases is not None,
            work.initialize,
            dict(work.arguments or {}),
            len(work.slides),
        )
        self._workers: list[W] = []
        self._furthest: dict[str, int] = {}  # patches done when a worker died, by slide
        self._outcomes: deque[SlideOutcome] = deque()
        self._deaths_at_start = 0

    @abstractmethod
    def _begin(self) -> None:
        """Start the first workers."""

    @abstractmethod
    def _start(self, device: str) -> None:
        """Start a worker."""

    @abstractmethod
    def _send(self, worker: W, message: Task | None) -> None:
        """Send a slide to a worker, or None at the end; nothing happens if it has died."""

    @abstractmethod
    def _receive(self, delay: float, progress: SlideProgress | None, log: RunLog) -> None:
        """Wait for messages of the workers, `delay` seconds at most, and handle them; remove those that have died."""

    @abstractmethod
    def _stop(self) -> None:
        """End the workers that are left: in an orderly way, or by force if that takes too long."""

    def _stale(self, worker: W, task: Task) -> bytes | None:
        """Content of the claim that a dead worker left on a slide, if only this process can know that it is stale."""
        return None

    def run(self, progress: SlideProgress | None) -> Generator[SlideOutcome, None, None]:
        """Yield what became of each slide."""
        log = RunLog(
            self._config.out / RUNS,
            self._run,
            arguments=self._config.arguments,
            n_slides=len(self._slides),
            engine=self.engine,
            devices=tuple(self._devices),
        )
        status = RunStatus()
        try:
            self._begin()
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
            self._schedule.stop()
            try:
                self._stop()
            finally:
                if self._leases is not None:
                    self._leases.close()
                log.close(status.exit_status)

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

    def _alone(self, worker: W) -> bool:
        return any(task.alone for task in worker.in_hand.values())

    def _needed_by_others(self, worker: W) -> bool:
        """Whether the slides that are left are fewer than the workers without one: they are not taken in advance."""
        idle = sum(not other.in_hand and not other.dismissed for other in self._workers if other is not worker)
        return self._schedule.unclaimed <= idle

    def _handle(self, worker: W, message: tuple[Any, ...], progress: SlideProgress | None) -> None:
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

    def _remove(self, worker: W, reason: str, orderly: bool, log: RunLog) -> None:
        """A worker has ended: return its slides, and start another one if it is needed.

        Args:
            worker: the worker, which is removed.
            reason: how it ended, as a part of a sentence.
            orderly: somebody ended it in an orderly way, which is no fault of a slide.
            log: of the run.
        """
        self._workers.remove(worker)
        tasks = list(worker.in_hand.values())
        if worker.ended and not tasks:
            return
        if orderly:
            for task in tasks:
                self._schedule.again(replace(task, stale=None))
        elif not worker.asked:
            self._deaths_at_start += 1
            if self._deaths_at_start >= _MAX_STARTS:
                raise WorkerError(
                    f"a worker on {worker.device} {reason} before it began, {_MAX_STARTS} times in a row; "
                    "perhaps the memory does not suffice for so many workers"
                )
            logger.warning("a worker on %s %s before it began; starting another one", worker.device, reason)
        else:
            names = ", ".join(worker.in_hand) or "no slide"
            logger.warning("a worker on %s %s (in hand: %s)", worker.device, reason, names)
            self._blame(worker, tasks, reason, log)
        if self._schedule.unclaimed or not (self._workers or self._schedule.empty):
            self._start(worker.device)

    def _blame(self, worker: W, tasks: list[Task], reason: str, log: RunLog) -> None:
        for task in tasks:
            name = task.slide.id
            done = worker.progress.get(name, 0)
            further = done > self._furthest.get(name, 0)
            self._furthest[name] = max(done, self._furthest.get(name, 0))
            if task.alone and not further:
                error = WorkerError(f"{task.slide.path}: the worker {reason} while it worked on this slide alone")
                if self._failures.add(task.slide, error).quarantined:
                    outcome = SlideOutcome(task.slide, "failed", error=error)
                    log.add(outcome)
                    self._outcomes.append(outcome)
                    self._schedule.done(task)
                    continue
            self._schedule.again(Task(task.slide, self._stale(worker, task), alone=True))


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
