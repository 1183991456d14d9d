"""The local engine of one process: three slides at a time, each in another stage.

While the device encodes the patches of slide t, in the thread that called the engine, a thread opens slide t + 1, finds
its patches and begins to read them, and another one writes slide t - 1 and runs the slide encoder on it. Files are the
same as without overlap: every stage of a slide runs as it would alone.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import torch

from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.job import Job, WorkContext
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.schedule import Task

logger = logging.getLogger(__name__)

SlideProgress = Callable[[CohortSlide, int, int], None]

_FINISHING = 2  # slides that are finished or wait for it; more would only use memory and files


class Source(Protocol):
    """Where the engine gets its slides from: a `Schedule`, or another process."""

    def take(self) -> Task | None:
        """The next slide; waits for it. None: there is none any more."""

    def busy(self, task: Task) -> None:
        """Another process works on the slide."""

    def done(self, task: Task, outcome: SlideOutcome) -> None:
        """The slide is finished, or has failed. Called as soon as it is known, from a thread of the engine."""

    def stop(self) -> None:
        """Let `take` return None."""


_Event = Job | SlideOutcome | BaseException | None


class LocalEngine:
    """Works on slides until there are no more.

    Args:
        context: see `WorkContext`.
        source: the slides.
        progress: called with (slide, patches done, total) from the calling thread.
        finished: called with each outcome but busy ones, from a thread of the engine, as soon as it is known: also of a
            slide that is finished while the run is being interrupted.
        observe: called with each slide after its patches were encoded (for measurements).
    """

    def __init__(
        self,
        context: WorkContext,
        source: Source,
        progress: SlideProgress | None = None,
        finished: Callable[[SlideOutcome], None] = lambda outcome: None,
        observe: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self._context, self._source = context, source
        self._progress, self._finished, self._observe = progress, finished, observe
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._to_finish: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._room_ahead, self._room_behind = threading.Semaphore(1), threading.Semaphore(_FINISHING)
        self._stopped = threading.Event()
        self._open: list[Job] = []

    def run(self) -> Generator[SlideOutcome, None, None]:
        """Yield what became of each slide, as soon as it is known; slides that another process holds are left out.

        If the iteration ends early, for any reason, all threads are ended and all claims released.
        """
        threads = [
            threading.Thread(target=target, name=f"exaonepath-{name}", daemon=True)
            for name, target in (("prepare", self._prepare_all), ("finish", self._finish_all))
        ]
        try:
            for thread in threads:
                thread.start()
            yield from self._encode_all()
        finally:
            self._stopped.set()
            self._source.stop()
            self._room_ahead.release()
            self._to_finish.put(None)
            for thread in threads:
                if thread.is_alive():  # an interrupt may have come before its start, and join would be an error
                    thread.join()
            for job in self._open:  # interrupted between two steps
                job.close()

    def _encode_all(self) -> Iterator[SlideOutcome]:
        in_hand, ended = 0, False
        while in_hand or not ended:
            event = self._events.get()
            if event is None:
                ended = True
            elif isinstance(event, BaseException):
                raise event
            elif isinstance(event, SlideOutcome):
                in_hand -= 1
                if event.outcome != "busy":
                    yield event
            else:
                in_hand += 1
                self._room_ahead.release()
                self._encode(event)
                self._room_behind.acquire()
                self._to_finish.put(event)

    def _encode(self, job: Job) -> None:
        progress, slide = self._progress, job.slide
        job.encode(None if progress is None else lambda done, total: progress(slide, done, total))
        self._observe(job)

    def _choose_device(self) -> None:
        """The current device of CUDA belongs to a thread; some kernels run on it, whatever device their data are on."""
        device = self._context.encoders.device
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def _prepare_all(self) -> None:
        try:
            self._choose_device()
            while True:
                # At most one slide is prepared or waits: more would hold memory for images that nobody needs yet.
                self._room_ahead.acquire()
                task = None if self._stopped.is_set() else self._source.take()
                if task is None:
                    break
                job = Job(self._context, task)
                self._open.append(job)
                job.prepare()
                self._events.put(job)
            self._events.put(None)
        except BaseException as exc:  # noqa: BLE001  raised in the calling thread
            self._events.put(exc)

    def _finish_all(self) -> None:
        try:
            self._choose_device()
            while (job := self._to_finish.get()) is not None:
                if self._stopped.is_set():
                    break
                outcome = job.finish()
                self._open.remove(job)
                if outcome.outcome == "busy":
                    self._source.busy(job.task)
                else:
                    self._finished(outcome)
                    self._source.done(job.task, outcome)
                self._room_behind.release()
                self._events.put(outcome)
        except BaseException as exc:  # noqa: BLE001  raised in the calling thread
            self._events.put(exc)
            self._room_behind.release()  # for which the calling thread may wait
