"""The encoder actor of a Ray cluster: the local engine, whose slides come from the driver and are read by tasks."""

from __future__ import annotations

import logging
import os
import queue
from contextlib import suppress
from typing import Any

import torch

from exaonepath.files.processes import process_space, start_time
from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.outcome import sendable
from exaonepath.slides.cohort.ray_reading import RayReading, ReaderOptions
from exaonepath.slides.cohort.ray_tasks import Place, check_version
from exaonepath.slides.cohort.schedule import Task
from exaonepath.slides.cohort.worker import PipeSource, WorkerConfig, work

_WAITS = 5.0  # seconds that `messages` waits for one


class EncoderActor:
    """Runs in an actor. `work` is called once, and the other methods, in another concurrency group, meanwhile.

    Messages to the driver are those of a worker process (see `worker`), and ("hello", Place, process space, start
    time), ("reading", id, stage, Place), ("log", level, message), ("stopped",).
    """

    def __init__(self, version: str) -> None:
        check_version(version)
        self._channel = _Channel()
        self._source: _ActorSource | None = None
        self._reading: RayReading | None = None
        self._stopped = False

    def work(self, config: WorkerConfig, options: ReaderOptions, folder: str) -> None:
        """Work on slides until the driver has no more; `folder` is the driver's current folder."""
        place = Place.here()
        self._channel.send(("hello", place, process_space(), start_time(place.pid)))
        handler = _Forwarding(self._channel)
        logging.getLogger("exaonepath").addHandler(handler)
        try:
            with suppress(OSError):
                os.chdir(folder)  # weights may be named by a relative path, which is stored as it was given
            if config.initialize is not None:
                config.initialize()
            if torch.get_num_threads() != config.threads:
                torch.set_num_threads(config.threads)  # Ray sets its own default for each worker
            self._reading = RayReading(
                config.out, options, lambda slide, stage, where: self._channel.send(("reading", slide, stage, where))
            )
            self._source = _ActorSource(self._channel, self._reading)
            if self._stopped:
                self.stop()
            work(self._source, config, self._reading, "ray-encoder", place.node)
            self._channel.send(("stopped" if self._stopped else "end",))
        except KeyboardInterrupt:
            self._channel.send(("stopped",))
        except Exception as exc:  # noqa: BLE001  raised by the driver
            self._channel.send(("fatal", sendable(exc)))
        finally:
            logging.getLogger("exaonepath").removeHandler(handler)

    def messages(self) -> list[tuple[Any, ...]]:
        """What was sent since the last call; waits for it, but not for ever."""
        return self._channel.sent()

    def give(self, task: Task | None) -> None:
        """Hand out a slide; None: there are no more."""
        self._channel.inbox.put(task)

    def stop(self) -> None:
        """End in an orderly way, as soon as possible: after the batch that is being encoded."""
        self._stopped = True
        if self._source is not None and self._reading is not None:
            self._source.interrupted = True
            self._reading.stopped.set()
            self._source.stop()


class _Channel:
    """The two queues of an actor, as a `Channel`."""

    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()

    def send(self, message: tuple[Any, ...]) -> None:
        self._outbox.put(message)

    def recv(self) -> Task | None:
        return self.inbox.get()

    def sent(self) -> list[tuple[Any, ...]]:
        found = []
        try:
            found.append(self._outbox.get(timeout=_WAITS))
            while True:
                found.append(self._outbox.get_nowait())
        except queue.Empty:
            return found


class _ActorSource(PipeSource):
    """The slides that the driver hands out. If the driver is gone, Ray ends the actor."""

    def __init__(self, channel: _Channel, reading: RayReading) -> None:
        super().__init__(channel)
        self._reading = reading

    def take(self) -> Task | None:
        """See `PipeSource`."""
        return None if self.interrupted else super().take()

    def progress(self, slide: CohortSlide, done: int, total: int) -> None:
        """Report progress; raise `KeyboardInterrupt` when the actor is to end."""
        if self.interrupted:
            raise KeyboardInterrupt
        super().progress(slide, done, total)


class _Forwarding(logging.Handler):
    """Sends warnings to the driver, where the user sees them."""

    def __init__(self, channel: _Channel) -> None:
        super().__init__(logging.WARNING)
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel.send(("log", record.levelno, record.getMessage()))
