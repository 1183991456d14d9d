"""Worker processes on one machine: one for each device, or several that share the processors (see `Dispatcher`)."""

from __future__ import annotations

import logging
import math
import multiprocessing
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from exaonepath.processors import usable_processors
from exaonepath.slides.cohort.dispatch import CohortWork, Dispatcher, Worker
from exaonepath.slides.cohort.local import SlideProgress
from exaonepath.slides.cohort.outcome import SlideOutcome
from exaonepath.slides.cohort.run_log import RunLog
from exaonepath.slides.cohort.run_options import EXIT_INTERRUPTED
from exaonepath.slides.cohort.schedule import Task
from exaonepath.slides.cohort.worker import worker_main

logger = logging.getLogger(__name__)

_GRACE = 60.0  # seconds that workers have to end in an orderly way


@dataclass(eq=False)
class _Worker(Worker):
    """A worker process."""

    process: SpawnProcess = field(kw_only=True)
    connection: Connection = field(kw_only=True)


def encode_with_workers(
    work: CohortWork, devices: Sequence[str], progress: SlideProgress | None = None
) -> Iterator[SlideOutcome]:
    """Work on the slides of a cohort in several processes, the largest slides first.

    Args:
        work: what is to be done.
        devices: of the workers, one each; a device may be repeated.
        progress: called with (slide, patches done, total patches).

    Yields:
        What became of each slide; exactly one outcome a slide (see `encode_cohort`).

    Raises:
        OutputError: the folder of claims cannot be written, although there is something to do.
        WorkerError: workers die before they begin.
        ExaonePathError: a worker cannot begin, since the weights cannot be loaded, for example.
    """
    outcomes = _WorkersRun(work, devices).run(progress)
    try:
        yield from outcomes
    finally:
        outcomes.close()


class _WorkersRun(Dispatcher[_Worker]):
    engine = "workers"

    def __init__(self, work: CohortWork, devices: Sequence[str]) -> None:
        super().__init__(work, devices, max(1, usable_processors() // len(devices)))
        self._context = multiprocessing.get_context("spawn")

    def _begin(self) -> None:
        for device in self._devices[: max(1, len(self._slides))]:
            self._start(device)

    def _start(self, device: str) -> None:
        ours, theirs = self._context.Pipe()
        config = replace(self._config, device=device)
        process = self._context.Process(
            target=worker_main, args=(theirs, config), name=f"exaonepath-worker-{device}", daemon=True
        )
        process.start()
        theirs.close()
        self._workers.append(_Worker(device, process=process, connection=ours))

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
                worker.process.join(_GRACE)
                if worker.process.is_alive():  # it can report nothing any more
                    worker.process.kill()
                    worker.process.join()
                worker.connection.close()
                code = worker.process.exitcode
                self._remove(worker, _reason(code), code == EXIT_INTERRUPTED, log)

    def _drain(self, worker: _Worker, progress: SlideProgress | None = None) -> bool:
        """Handle the messages of a worker that have arrived; False if there will be no more."""
        while True:
            try:
                if not worker.connection.poll():
                    return True
                message = worker.connection.recv()
            except (EOFError, OSError):
                return False
            # Not inside `try`: an `OSError` of the callback or of a full disk would be taken for the worker's end.
            self._handle(worker, message, progress)

    def _stop(self) -> None:
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


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with status {code}"
