"""Reading slides in tasks of a Ray cluster, on whatever nodes have processors for it.

Each task opens a slide and yields its batches, in order, as a streaming generator: it stops when as many batches wait
as it may have, and goes on when the encoder has taken one. A slide may be read by several tasks, each of which reads
every n-th group of batches. A task that dies is started again at the first batch that has not arrived, so the batches
are those of a `PatchReader` of this process, whatever happens.

An encoder has the slide that it encodes read, and the next one. The tasks of the next one must not keep those of the
first from the last free processor (after a node has died, say): they wait until the others have begun, and give way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from exaonepath.errors import WorkerError
from exaonepath.slides.cohort.ray_tasks import Place, SlideRequest, find_patches_there, read_batches_there
from exaonepath.slides.cohort.reading import BatchReader, Reading
from exaonepath.slides.cohort.schedule import Task
from exaonepath.slides.features.extraction import ImageEncoder
from exaonepath.slides.features.preprocessing import PreprocessingConfig
from exaonepath.slides.features.reader import PatchBatch, image_memory
from exaonepath.slides.stages import SlideStages

logger = logging.getLogger(__name__)

_LOOK_EVERY = 0.25  # seconds between two looks at whether reading is still wanted
_ARRIVES_WITHIN = 60.0  # seconds for one batch that has been read to come over the network
_GIVES_WAY_AFTER = 5.0  # seconds that the slide before may wait for a processor
_MAX_TRIES = 3  # tasks that die in a row without a batch


@dataclass(frozen=True)
class ReaderOptions:
    """How slides are read.

    Attributes:
        threads: of each task, which asks for as many processors.
        tasks: that read one slide.
        max_bytes: of images that wait on the nodes that read one slide.
    """

    threads: int = 1
    tasks: int = 1
    max_bytes: int = 128 << 20


class RayReading(Reading):
    """Has the slides of one encoder read by tasks of the cluster.

    Args:
        out: output folder.
        options: see `ReaderOptions`.
        note: called with (slide's id, stage, where) when a task has begun.

    Attributes:
        stopped: set it to let everything end that waits.
    """

    def __init__(self, out: Path, options: ReaderOptions, note: Callable[[str, str, Place], None]) -> None:
        self._out, self._options, self._note = out, options, note
        self.stopped = threading.Event()
        self._turns = _Turns()

    def find_patches(self, task: Task, stages: SlideStages) -> int:
        """See `Reading`. A file that exists is looked at here; it is computed elsewhere if there is none."""
        overwrite = stages.overwrites_patches
        if overwrite or not stages.paths.patches.exists():
            place = self._found_there(task, stages, overwrite)
            self._note(task.slide.id, "patches", place)
        # What was written there is found and checked; it counts as new, so it is not overwritten.
        return stages.find_patches()

    def reader(self, task: Task, stages: SlideStages, encoder: ImageEncoder) -> BatchReader:
        """See `Reading`."""
        extraction = stages.extraction
        assert extraction is not None
        return RayReader(
            _request(task, stages),
            extraction.patches.coords,
            int(extraction.patches.patch_size),
            stages.settings.preprocessing,
            extraction.rows,
            encoder.batch_size,
            encoder.page_locked,
            self._options,
            self._turns,
            lambda place: self._note(task.slide.id, "features", place),
        )

    def _found_there(self, task: Task, stages: SlideStages, overwrite: bool) -> Place:
        import ray

        remote = ray.remote(find_patches_there).options(
            num_cpus=self._options.threads, max_retries=0, scheduling_strategy="SPREAD"
        )
        arguments = (_request(task, stages), self._out, dict(stages.settings.patching), overwrite)
        for tries in range(1, _MAX_TRIES + 1):
            ref = remote.remote(*arguments)
            try:
                while not ray.wait([ref], timeout=_LOOK_EVERY)[0]:
                    if self.stopped.is_set():
                        ray.cancel(ref)
                        raise KeyboardInterrupt
                place: Place = ray.get(ref)
                return place
            except ray.exceptions.RayTaskError as exc:
                raise _cause(exc) from None
            except ray.exceptions.RayError as exc:
                reason = _first_line(exc)
                logger.warning("%s: the task that finds patches died (%s), %d times", task.slide.path, reason, tries)
        raise WorkerError(f"{task.slide.path}: the task that finds its patches died {_MAX_TRIES} times: {reason}")


class RayReader:
    """The batches of a slide, read by tasks of the cluster (see `PatchReader`).

    Args:
        request: the slide.
        coords, patch_size, preprocessing, rows, batch_size, page_locked: see `PatchReader` (`rows` is `indices`).
        options: see `ReaderOptions`.
        turns: the readers of the same encoder.
        note: called with the place of each task that has begun.
    """

    def __init__(
        self,
        request: SlideRequest,
        coords: np.ndarray,
        patch_size: int,
        preprocessing: PreprocessingConfig,
        rows: np.ndarray,
        batch_size: int,
        page_locked: bool,
        options: ReaderOptions,
        turns: _Turns,
        note: Callable[[Place], None],
    ) -> None:
        self.request, self.options, self.turns, self.note = request, options, turns, note
        self.arguments = (coords, patch_size, preprocessing, batch_size)
        self.cancelled = threading.Event()
        self._page_locked = page_locked
        batches = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
        batch_bytes = batch_size * preprocessing.crop**2 * 3
        tasks = min(options.tasks, len(batches))
        # As many as may wait, so that all tasks of a slide can read at the same time.
        self.group = max(1, options.max_bytes // (max(1, tasks) * batch_bytes))
        self._order = [number // self.group % max(1, tasks) for number in range(len(batches))]
        self.lanes = [
            _Lane(self, [rows for rows, lane in zip(batches, self._order, strict=True) if lane == own])
            for own in range(tasks)
        ]

    def __iter__(self) -> Generator[PatchBatch, None, None]:
        with self.turns.member(self):
            try:
                for lane in self._order:
                    batch = self.lanes[lane].next()
                    if batch is None:  # cancelled
                        return
                    yield self._own(batch)
            finally:
                for each in self.lanes:
                    each.end()

    def cancel(self) -> None:
        """Stop reading; from any thread."""
        self.cancelled.set()

    def start(self) -> None:
        """Start the tasks that are not started, unless an older reader of this encoder waits for processors."""
        if self.turns.allows(self):
            for lane in self.lanes:
                lane.start()

    def _own(self, batch: PatchBatch) -> PatchBatch:
        """A batch in memory of this process: the cluster's is read-only, and needed for the next ones."""
        images = image_memory(batch.images.shape, self._page_locked)
        np.copyto(images, batch.images)
        return replace(batch, images=images, indices=batch.indices.copy())


class _Lane:
    """The batches of a slide that one task reads."""

    def __init__(self, reader: RayReader, batches: list[np.ndarray]) -> None:
        self._reader, self._batches = reader, batches
        self._at = self._deaths = 0
        self._task: Any = None  # ended by another thread too, if an older reader needs its processors
        self.waits_since: float | None = None  # started, and no sign of life yet; None: it runs, or has ended

    def start(self) -> None:
        """Start the task, if it does not run and batches are left."""
        if self._task is not None or self._at == len(self._batches):
            return
        import ray

        reader = self._reader
        threads = reader.options.threads
        remote = ray.remote(read_batches_there).options(
            num_returns="streaming",
            _generator_backpressure_num_objects=reader.group,
            num_cpus=threads,
            max_retries=0,
            scheduling_strategy="SPREAD",
        )
        rows = np.concatenate(self._batches[self._at :])
        self._task = remote.remote(reader.request, *reader.arguments, rows, threads)
        self.waits_since = self.waits_since or time.monotonic()

    def next(self) -> PatchBatch | None:
        """The next batch; None if the reader was cancelled.

        Raises:
            WorkerError: the task died several times in a row without a batch in between.
            ExaonePathError: what the task raised.
        """
        import ray

        while not self._reader.cancelled.is_set():
            self._reader.start()
            task = self._task
            try:
                value = self._arrived(task)
            except (ray.exceptions.RayError, StopIteration) as exc:
                if self._task is not task:  # it had to give way
                    continue
                cause = getattr(exc, "cause", None)
                if isinstance(exc, ray.exceptions.RayTaskError) and not isinstance(cause, ray.exceptions.RayError):
                    raise _cause(exc) from None
                self._died(exc)
                continue
            if isinstance(value, Place):
                self.waits_since = None
                self._reader.note(value)
            elif value is not None:
                self._deaths = 0
                self._at += 1
                if self._at == len(self._batches):
                    self._task = None
                return value
        return None

    def _arrived(self, task: Any) -> Place | PatchBatch | None:
        import ray

        if task is None:
            self._reader.cancelled.wait(_LOOK_EVERY)
            return None
        if not ray.wait([task], timeout=_LOOK_EVERY)[0]:
            self._reader.turns.make_way(self._reader)
            return None
        value: Place | PatchBatch = ray.get(next(task), timeout=_ARRIVES_WITHIN)
        return value

    def _died(self, exc: Exception) -> None:
        self._deaths += 1
        path, reason = self._reader.request.path, _first_line(exc)
        self.end()
        if self._deaths >= _MAX_TRIES:
            raise WorkerError(f"{path}: the task that reads it died {self._deaths} times in a row: {reason}")
        logger.warning("%s: a task that reads it died (%s); another one goes on", path, reason)

    def end(self) -> None:
        """End the task; batches that have not arrived are read again by the next one."""
        import ray

        task, self._task, self.waits_since = self._task, None, None
        if task is not None:
            # A generator that waits for its consumer would otherwise wait, and hold its processors, for ever.
            with suppress(ray.exceptions.RayError, ValueError, TypeError):
                ray.cancel(task)


class _Turns:
    """The readers of one encoder, the oldest first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: list[RayReader] = []

    @contextmanager
    def member(self, reader: RayReader) -> Iterator[None]:
        """Take part during the block."""
        with self._lock:
            self._readers.append(reader)
        try:
            yield
        finally:
            with self._lock:
                self._readers.remove(reader)

    def allows(self, reader: RayReader) -> bool:
        """Whether no older reader waits for processors."""
        return not any(lane.waits_since is not None for each in self._older(reader) for lane in each.lanes)

    def make_way(self, reader: RayReader) -> None:
        """End the tasks of newer readers, if this one waits for processors for long."""
        now = time.monotonic()
        if not any(lane.waits_since and now - lane.waits_since > _GIVES_WAY_AFTER for lane in reader.lanes):
            return
        with self._lock:
            newer = self._readers[self._readers.index(reader) + 1 :]
        for each in newer:
            for lane in each.lanes:
                lane.end()

    def _older(self, reader: RayReader) -> list[RayReader]:
        with self._lock:
            return self._readers[: self._readers.index(reader)]


def _request(task: Task, stages: SlideStages) -> SlideRequest:
    image, settings = stages.image, stages.settings
    return SlideRequest(
        task.slide.path.absolute(),
        task.slide.id,
        settings.patching.get("mpp"),
        settings.reader,
        image.fingerprint(),
        image.reader_settings(),
    )


def _cause(exc: Any) -> Exception:
    """The error that a task raised, without the traceback of the other process."""
    cause = getattr(exc, "cause", exc)
    return cause if isinstance(cause, Exception) else exc


def _first_line(exc: BaseException) -> str:
    if isinstance(exc, StopIteration):
        return "it ended early"
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0] if lines else type(exc).__name__
