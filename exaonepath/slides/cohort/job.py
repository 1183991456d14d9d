"""One slide on its way through a process: claimed, prepared, encoded, finished, released."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from exaonepath.errors import (
    DeviceError,
    DeviceMemoryError,
    LeaseLostError,
    MemoryLimitError,
    MissingDependencyError,
    OutputCollisionError,
    OutputError,
    SlideBusyError,
    WeightsError,
)
from exaonepath.files.file_identity import file_identity
from exaonepath.slides.cohort.device_gate import DeviceGate
from exaonepath.slides.cohort.encoders import Encoders
from exaonepath.slides.cohort.failures import Failures
from exaonepath.slides.cohort.finished_since import FinishedSince
from exaonepath.slides.cohort.lease import Lease, Leases
from exaonepath.slides.cohort.local_copies import LocalCopies
from exaonepath.slides.cohort.outcome import FailedBeforeError, Outcome, SlideOutcome, StageName, StageRecord
from exaonepath.slides.cohort.overwriting import Overwriting
from exaonepath.slides.cohort.read_ahead import ReadAhead
from exaonepath.slides.cohort.reading import Reading
from exaonepath.slides.cohort.schedule import Task
from exaonepath.slides.cohort.slide_settings import patching_of
from exaonepath.slides.features.encoding import HalvingEncoder
from exaonepath.slides.image import SlideImage
from exaonepath.slides.outputs import output_paths
from exaonepath.slides.stages import EncodeResult, EncodeSettings, Progress, SlideStages, request_hash

logger = logging.getLogger(__name__)

# Errors that would meet any other slide as well (with those of `_meets_all`).
_NOT_OF_THE_SLIDE = (FailedBeforeError, WeightsError, DeviceError, MissingDependencyError)

READ_AHEAD_BYTES = 128 << 20  # images of one slide that wait for the device


@dataclass(frozen=True)
class WorkContext:
    """What all slides of a process share.

    Attributes:
        out: output folder.
        settings: of the run.
        encoders: of the run.
        failures: records of slides that failed.
        leases: the claims; None: no other process works on the folder.
        overwriting: which results are computed again.
        finished: recognises slides that another process has finished meanwhile; None: they are verified.
        copies: local copies of slides; None: slides are read where they are.
        gate: lets the slide encoder have the device's memory for itself.
        read_ahead_bytes: see `READ_AHEAD_BYTES`.
        reading: where slides are read.
    """

    out: Path
    settings: EncodeSettings
    encoders: Encoders
    failures: Failures
    leases: Leases | None = None
    overwriting: Overwriting = field(default_factory=Overwriting)
    finished: FinishedSince | None = None
    copies: LocalCopies | None = None
    gate: DeviceGate = field(default_factory=DeviceGate)
    read_ahead_bytes: int = READ_AHEAD_BYTES
    reading: Reading = field(default_factory=Reading)


class Job:
    """One slide. `prepare`, `encode` and `finish` are called in this order, each from another thread.

    An error of one step is kept; the following steps then do nothing, and `finish` returns the slide as failed.

    Attributes:
        to_encode: whether `prepare` found patches to encode.
        begun, ended: when the first batch was given to the device, and the last one was stored (monotonic seconds);
            None without any.
    """

    def __init__(self, context: WorkContext, task: Task) -> None:
        self.task, self.slide = task, task.slide
        self.to_encode = False
        self.begun: float | None = None
        self.ended: float | None = None
        self._context = context
        self._begin = time.monotonic()
        self._records: dict[StageName, StageRecord] = {}
        self._error: Exception | None = None
        self._lease: Lease | None = None
        self._stack = ExitStack()
        self._image: SlideImage | None = None
        self._stages: SlideStages | None = None
        self._batches: ReadAhead | None = None
        self._encoder: HalvingEncoder | None = None
        self._preparing = 0.0
        self._found: EncodeResult | None = None

    def prepare(self) -> None:
        """Claim and open the slide, find its patches, look up what is stored, and begin to read."""
        with self._kept():
            self._prepare()

    def encode(self, progress: Progress | None = None) -> None:
        """Encode the patches; called from the thread that drives the device. `KeyboardInterrupt` is passed on."""
        if self._error is None and self.to_encode:
            assert self._batches is not None
            assert self._encoder is not None
            assert self._stages is not None
            self.begun = time.monotonic()
            with self._kept():
                encoder = self._context.gate.guard(self._encoder)
                self._stages.encode(self._batches, encoder, progress, lambda: self._check(thorough=False))
            self.ended = time.monotonic()

    def finish(self) -> SlideOutcome:
        """Write the features and the embedding, note what became of the slide, and release it."""
        result: EncodeResult | None = None
        try:
            if self._error is None:
                with self._kept():
                    result = self._finish()
            return self._outcome(result)
        finally:
            self.close()

    def close(self) -> None:
        """Stop reading, close the files and release the slide; what was stored is kept."""
        self._stack.close()

    def _prepare(self) -> None:
        context, slide = self._context, self.slide
        if context.leases is not None:
            self._lease = context.leases.claim(slide.id, self.task.stale)
            if self._lease is None:
                raise SlideBusyError(f"another process works on {slide.path}")
            self._stack.callback(self._lease.release)
        context.failures.check(slide)
        begin = time.monotonic()
        settings = replace(context.settings, patching=patching_of(slide, context.settings.patching))
        pair = context.encoders.pair(slide.weights)
        if context.finished is not None:
            request = request_hash(settings, pair.patch, pair.slide, slide.patient)
            paths = output_paths(context.out, slide.id)
            self._found = context.finished.result(slide.path, slide.id, paths, request)
            if self._found is not None:
                return
        copy = None
        if context.copies is not None:
            copy = context.copies.copy(slide.path, slide.id)
            self._stack.callback(context.copies.remove, slide.id)
        image = SlideImage(
            slide.path if copy is None else copy,
            settings.reader,
            settings.patching.get("mpp"),
            slide.id,
            None if copy is None else slide.path,
        )
        self._image = self._stack.enter_context(image)
        stages = SlideStages(
            image,
            context.out,
            pair.patch,
            pair.slide,
            settings,
            patient=slide.patient,
            token=self._lease.token if self._lease is not None else "",
            overwrite=context.overwriting.applies_to,
            unwanted=context.overwriting.partial,
            check=self._check,
        )
        self._stack.callback(stages.close)
        before = file_identity(stages.paths.patches)
        n_patches = context.reading.find_patches(self.task, stages)
        reused = before is not None and before == file_identity(stages.paths.patches)
        self._note("patches", begin, n_patches, 0, reused, torch.device("cpu"))
        begin = time.monotonic()
        self._stages = stages
        self.to_encode = stages.prepare()
        if self.to_encode:
            assert stages.extraction is not None
            encoder = context.encoders.batch_encoder(slide.weights, stages.extraction.earlier_batch_size)
            self._encoder = HalvingEncoder(encoder)
            self._batches = ReadAhead(context.reading.reader(self.task, stages, encoder), context.read_ahead_bytes)
            self._stack.callback(self._batches.close)
        self._preparing = time.monotonic() - begin

    def _finish(self) -> EncodeResult:
        if self._found is not None:
            return self._found
        stages = self._stages
        assert stages is not None
        begin = time.monotonic()
        device = self._context.encoders.device
        extracted = stages.write_features()
        if extracted is not None:
            encoding = (self.ended or 0.0) - (self.begun or 0.0)
            begin -= self._preparing + encoding
            failures = len(extracted.failures)
            self._note("features", begin, extracted.n_features, failures, extracted.reused, device)
        begin = time.monotonic()
        try:
            result = stages.embed()
        except (DeviceMemoryError, MemoryLimitError) as exc:
            if device.type != "cuda":
                raise
            logger.info("%s; trying it again while no patch is encoded", exc)
            with self._context.gate.alone(device):
                result = stages.embed()
        self._note("slide", begin, result.n_patches, 0, "slide" in result.reused, device)
        return result

    def _outcome(self, result: EncodeResult | None) -> SlideOutcome:
        error = self._error
        kind: Outcome = "failed"
        if result is not None:
            self._context.failures.clear(self.slide)
            kind = _kind(result)
        elif isinstance(error, SlideBusyError | LeaseLostError):
            kind = "busy"
        elif error is not None and not _meets_all(error):
            self._context.failures.add(self.slide, error)
        stages = tuple(self._records.values())
        return SlideOutcome(self.slide, kind, time.monotonic() - self._begin, result, error, stages)

    def _check(self, thorough: bool = True) -> None:
        if self._lease is not None:
            self._lease.check(thorough=thorough)

    def _note(
        self, stage: StageName, begin: float, patches: int, failures: int, reused: bool, device: torch.device
    ) -> None:
        reader = "" if self._image is None else self._image.reader
        seconds = time.monotonic() - begin
        self._records[stage] = StageRecord(
            stage, seconds, patches, failures, reused, reader, str(device), _peak_memory(device)
        )

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep an error of the slide. Whatever it is: a damaged file can make a library raise any error."""
        try:
            yield
        except Exception as exc:  # noqa: BLE001
            self._error = exc


def _meets_all(error: Exception) -> bool:
    """Whether an error does not count as a failed try of the slide (a full disk, missing weights, ...)."""
    if isinstance(error, OutputError):
        return not isinstance(error, OutputCollisionError)
    return isinstance(error, _NOT_OF_THE_SLIDE)


def _kind(result: EncodeResult) -> Outcome:
    if result.n_failed:
        return "unreadable"
    if {"features", "slide"} <= set(result.reused):
        return "reused"
    return "empty" if result.no_patch else "finished"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the device for CUDA, otherwise of this process; 0 if the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used << 10


def settings_key(settings: EncodeSettings, weights: str) -> str:
    """Hash of what may decide whether a slide fails: after a change of it, a failed slide is tried as if new."""
    kept = {name: value for name, value in vars(settings).items() if name not in ("overwrite", "num_workers")}
    return hashlib.sha256(f"{weights} {sorted(kept.items())}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
