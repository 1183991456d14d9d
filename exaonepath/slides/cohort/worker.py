"""A worker process: runs the local engine over the slides that the process which started it hands out.

Messages are tuples, the first item is their kind. From the worker: ("want",), ("busy", id), ("progress", id, done,
total), ("outcome", id, SlideOutcome), ("fatal", error), ("end",). To the worker: a `Task`, or None at the end.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from exaonepath.slides.cohort.cohort_slide import CohortSlide
from exaonepath.slides.cohort.encoders import Encoders, LoadEncoders
from exaonepath.slides.cohort.failures import FailureRecord, Failures
from exaonepath.slides.cohort.finished_since import FinishedSince
from exaonepath.slides.cohort.job import WorkContext
from exaonepath.slides.cohort.lease import Leases
from exaonepath.slides.cohort.local import LocalEngine
from exaonepath.slides.cohort.local_copies import LocalCopies
from exaonepath.slides.cohort.outcome import SlideOutcome, sendable
from exaonepath.slides.cohort.overwriting import Overwriting
from exaonepath.slides.cohort.reading import Reading
from exaonepath.slides.cohort.run_log import RunLog, new_run_id
from exaonepath.slides.cohort.run_options import EXIT_INTERRUPTED, RunOptions, RunStatus
from exaonepath.slides.cohort.schedule import Task
from exaonepath.slides.outputs import CLAIMS, FAILURES, RUNS
from exaonepath.slides.stages import EncodeSettings

logger = logging.getLogger(__name__)

_PROGRESS_EVERY = 0.2  # seconds between two messages about progress


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker process is started with; it is pickled.

    Attributes:
        out: output folder.
        weights: of the slides that do not state weights of their own.
        load: loads encoders.
        settings: of the run.
        options: of the run.
        device: where this worker encodes.
        threads: of processors that this worker may use.
        group: id of the run.
        key: hash of the settings, for failure records.
        known_failures: failure records at the start of the run.
        overwriting: results at the start of the run.
        finished: embeddings at the start of the run.
        claims: whether slides are claimed; not if the folder is read-only and everything is finished.
        initialize: called first in the process (sets up logging).
        arguments: of the run, for its log.
        n_slides: slides of the run.
    """

    out: Path
    weights: str
    load: LoadEncoders
    settings: EncodeSettings
    options: RunOptions
    device: str
    threads: int
    group: str
    key: str
    known_failures: dict[str, FailureRecord] = field(default_factory=dict)
    overwriting: Overwriting = field(default_factory=Overwriting)
    finished: FinishedSince | None = None
    claims: bool = True
    initialize: Callable[[], None] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    n_slides: int = 0


def worker_main(connection: Connection, config: WorkerConfig) -> None:
    """Work until there are no more slides; the target of the process."""
    # Ctrl-C reaches all processes of a terminal. The process that started this one decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    source = PipeSource(connection)
    try:
        if config.initialize is not None:
            config.initialize()
        work(source, config)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Exception as exc:
        logger.debug("the worker ends", exc_info=True)
        source.send("fatal", sendable(exc))
        sys.exit(1)
    source.send("end")


def work(
    source: PipeSource, config: WorkerConfig, reading: Reading | None = None, engine: str = "worker", node: str = ""
) -> None:
    """Work on the slides of a source until there are no more.

    Args:
        source: the slides.
        config: see `WorkerConfig`.
        reading: where slides are read; None: in this process.
        engine, node: see `RunLog`.
    """
    limit_threads(config.threads)
    device = only_visible(config.device)
    settings, options = config.settings, config.options
    if settings.num_workers is None:
        settings = replace(settings, num_workers=config.threads)
    run = new_run_id()
    encoders = Encoders(config.load(config.weights, device), settings, config.load)
    leases = Leases(config.out / CLAIMS, run=run, stale_after=options.stale_after) if config.claims else None
    copies = None if options.stage is None else LocalCopies(options.stage)
    context = WorkContext(
        config.out,
        settings,
        encoders,
        Failures(
            config.out / FAILURES,
            config.key,
            config.group,
            retry=options.retry_failed,
            known=config.known_failures,
        ),
        leases,
        config.overwriting,
        config.finished,
        copies,
        read_ahead_bytes=options.read_ahead_bytes,
        reading=reading or Reading(),
    )
    log = RunLog(
        config.out / RUNS,
        run,
        group=config.group,
        arguments=config.arguments,
        n_slides=config.n_slides,
        engine=engine,
        devices=(config.device,),
        node=node,
    )
    status = RunStatus()
    outcomes = LocalEngine(context, source, source.progress, log.add).run()
    try:
        for outcome in outcomes:
            status.add(outcome)
        status.ended = not source.interrupted
    finally:
        outcomes.close()
        log.close(status.exit_status)
        encoders.close()
        if copies is not None:
            copies.close()
        if leases is not None:
            leases.close()


class Channel(Protocol):
    """What messages go through; a `Connection`, for example."""

    def send(self, message: Any, /) -> None:
        """Send a message."""

    def recv(self) -> Any:
        """Wait for a message; `EOFError` is raised if the sender is gone."""


class PipeSource:
    """The slides that another process hands out. If that process is gone, this one is ended like by SIGTERM."""

    interrupted = False  # whether the work ends early (a process is ended by an exception instead)

    def __init__(self, connection: Channel) -> None:
        self._connection = connection
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._last = 0.0
        threading.Thread(target=self._listen, name="exaonepath-inbox", daemon=True).start()

    def take(self) -> Task | None:
        """Ask for a slide, and wait for it."""
        self.send("want")
        return self._inbox.get()

    def busy(self, task: Task) -> None:
        """Return a slide that another process holds."""
        self.send("busy", task.slide.id)

    def done(self, task: Task, outcome: SlideOutcome) -> None:
        """Report what became of a slide."""
        self.send("outcome", task.slide.id, outcome.sendable())

    def stop(self) -> None:
        """Let `take` return None."""
        self._inbox.put(None)

    def progress(self, slide: CohortSlide, done: int, total: int) -> None:
        """Report progress, not more often than is useful."""
        now = time.monotonic()
        if done == 0 or done == total or now - self._last >= _PROGRESS_EVERY:
            self._last = now
            self.send("progress", slide.id, done, total)

    def send(self, *message: Any) -> None:
        """Send a message; without a receiver, nothing happens."""
        try:
            with self._sending:
                self._connection.send(message)
        except (BrokenPipeError, ConnectionError, ValueError, OSError):
            logger.debug("the receiver of messages has ended")

    def _listen(self) -> None:
        try:
            while True:
                self._inbox.put(self._connection.recv())
        except (EOFError, OSError):
            os.kill(os.getpid(), signal.SIGTERM)


def only_visible(device: str, environment: MutableMapping[str, str] | None = None) -> torch.device:
    """Hide all other GPUs from this process, which has not used one yet; returns the device as it is named then.

    The current device of CUDA belongs to a thread, and this process has many: one that forgets to choose the device
    would allocate some hundred MB on the first GPU, which belongs to another worker.
    """
    values = os.environ if environment is None else environment
    name = torch.device(device)
    if name.type != "cuda":
        return name
    index = name.index or 0
    visible = [part.strip() for part in values.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    values["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    return torch.device("cuda", 0)


def limit_threads(threads: int) -> None:
    """Let the libraries of this process use at most so many threads for one computation."""
    import cv2

    if torch.get_num_threads() > threads:
        torch.set_num_threads(threads)
    if cv2.getNumThreads() > threads:
        cv2.setNumThreads(threads)
