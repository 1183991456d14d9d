"""Measures a few batches of a run before it, for an estimate of its time and memory.

Batches of the first epoch are read from the disk, and from the cache, and their gradients are computed. Time in which
the reading thread uses no processor counts as time of the disk. Everything is a mean per patient: patients of an epoch
are in random order, so the batches are a sample of them.
"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from exaonepath.alignment.batch import PatientBatch
from exaonepath.alignment.data.dataset import PatientDataset
from exaonepath.alignment.data.feature_cache import FeatureCache
from exaonepath.alignment.data.slides import Slide
from exaonepath.alignment.training.estimate import Pass, RunEstimate
from exaonepath.alignment.training.slide_start import can_learn
from exaonepath.alignment.training.step import Chunk, accumulate_gradients
from exaonepath.alignment.training.trainer import Trainer
from exaonepath.alignment.training.validation import embed_patients
from exaonepath.errors import DeviceMemoryError
from exaonepath.memory import available_host_memory
from exaonepath.processors import usable_processors

_BATCHES = 4
_CACHED_PATIENTS = 4  # read to the cache: whole slides, which take time
_READ_AHEAD = 2  # batches that a worker of a loader has ready
_RESIDENT, _PEAK_RESET = Path("/proc/self/statm"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class _Reading:
    """Seconds per patient."""

    disk: float = 0.0
    decoding: float = 0.0

    def mixed(self, other: _Reading, share: float) -> _Reading:
        """The mean, in which `other` has this share."""
        return _Reading(
            self.disk + share * (other.disk - self.disk), self.decoding + share * (other.decoding - self.decoding)
        )


def estimate_run(trainer: Trainer, *, seconds: float = 20.0) -> RunEstimate:
    """Measure a few batches of one process. No weight is changed, and nothing is written.

    Args:
        trainer: of the run, before its first step.
        seconds: limit for the computing; if a single small batch takes longer, the estimate rests on that one.

    Raises:
        TrainingError: the loss or an embedding of a batch is not finite. DataFileError: a features file cannot be read.
        DeviceMemoryError: a small batch does not fit into the memory of the device.
    """
    device = trainer.processes.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer.model.train()
        try:
            return _Probe(trainer, seconds).run()
        except torch.OutOfMemoryError as exc:
            raise DeviceMemoryError(
                "a small batch of this run does not fit into the memory of the device; lower run.chunk_size or "
                "data.max_patches, or set model.gradient_checkpointing"
            ) from exc
        finally:
            for parameter in trainer.parameters:
                parameter.grad = None


class _Probe:
    def __init__(self, trainer: Trainer, seconds: float) -> None:
        self.trainer, self.seconds = trainer, seconds
        self.data, self.settings = trainer.data, trainer.settings
        self.device = trainer.processes.device
        planned = next(trainer.plan.steps(0, 0, 1))[1]
        self.order = [patient for patients, _, _ in planned for patient in patients]
        self.chunks_per_step = len(planned)
        self.largest = max(1, len(planned[0][0]))
        self.slides: dict[str, list[Slide]] = {}
        for slide in self.data.cohort.slides.slides:
            self.slides.setdefault(slide.patient, []).append(slide)

    def run(self) -> RunEstimate:
        # With several chunks in a step, gradients are computed in two passes.
        n_chunks = min(2, self.chunks_per_step)
        size = self._size(n_chunks)
        readings: list[_Reading] = []
        seconds: list[float] = []
        growth = 0
        while not seconds or (len(seconds) < _BATCHES and sum(seconds) + seconds[-1] <= self.seconds):
            chunks = [self._patients(len(seconds) * n_chunks + at, size) for at in range(n_chunks)]
            batches, reading = self._read(chunks, cache=0)
            took, grown = self._compute(batches)
            readings.append(reading)
            seconds.append(took)
            growth = max(growth, grown)
        patients = n_chunks * size
        read = _mean(readings)
        computing = sum(seconds) / len(seconds) / patients
        share = self._hit_share()
        filled, hit = self._cached() if share else (read, read)
        workers = min(self.settings.run.num_workers, usable_processors())
        plan = self.trainer.plan
        count = plan.steps_per_epoch * plan.batch_size
        first, later = (
            Pass(mixed.disk * count, mixed.decoding * count, computing * count, workers)
            for mixed in (read.mixed(other, share or 0.0) for other in (filled, hit))
        )
        host, on_device = self._memory(growth * self.largest // size)
        return RunEstimate(
            batches=len(seconds),
            patients=len(seconds) * patients,
            first=first,
            later=later,
            validation=self._validation(size, workers),
            epochs=(plan.total + self._slide_start_steps()) / plan.steps_per_epoch,
            validations=self._validations(),
            hit_share=share,
            host_bytes=host,
            device_bytes=on_device,
        )

    def _patients(self, number: int, size: int) -> list[str]:
        """Patients of chunk `number` of the probe; a small cohort starts again at its beginning."""
        return [self.order[(number * size + at) % len(self.order)] for at in range(size)]

    def _size(self, n_chunks: int) -> int:
        """Patients of a chunk, as many as time and memory allow: from a first chunk of two, which also warms up."""
        size = min(2, self.largest)
        batches, _ = self._read([self._patients(at, size) for at in range(n_chunks)], cache=0)
        took, grown = self._compute(batches)
        by_time = self.seconds / _BATCHES * size / max(took, 1e-6)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else available_host_memory()
        by_memory = self.largest if free is None or not grown else 0.5 * free * size / grown
        return int(min(self.largest, max(size, min(by_time, by_memory))))

    def _read(self, chunks: Sequence[Sequence[str]], *, cache: int) -> tuple[list[PatientBatch], _Reading]:
        """Batches of these patients, and the time to read them after their files left the system's own cache."""
        slides = [slide for patients in chunks for patient in patients for slide in self.slides.get(patient, ())]
        dataset = self._dataset(FeatureCache(slides, cache))
        _forget(slide.features for slide in slides)
        return self._timed(dataset, chunks)

    def _dataset(self, cache: FeatureCache) -> PatientDataset:
        data = self.settings.data
        return PatientDataset(
            self.data.cohort, self.data.standardizer, self.data.train,
            slides=data.slides_per_step, patch_budget=data.max_patches or None,  # type: ignore[arg-type]
            seed=self.settings.run.seed, cache=cache,
        )  # fmt: skip

    def _timed(self, dataset: PatientDataset, chunks: Sequence[Sequence[str]]) -> tuple[list[PatientBatch], _Reading]:
        number = {patient: at for at, patient in enumerate(dataset.cohort.patients)}
        wall, used = time.perf_counter(), time.thread_time()
        batches = [dataset.batch([number[patient] for patient in patients], 0) for patients in chunks]
        wall, used = time.perf_counter() - wall, time.thread_time() - used
        n = sum(map(len, chunks))
        return batches, _Reading(max(wall - used, 0.0) / n, used / n)

    def _cached(self) -> tuple[_Reading, _Reading]:
        """Reading whole slides to the cache, and from it."""
        chunks = [self._patients(at, 1) for at in range(min(_CACHED_PATIENTS, len(self.order)))]
        slides = [slide for patients in chunks for patient in patients for slide in self.slides.get(patient, ())]
        dataset = self._dataset(FeatureCache(slides, 1 << 62))
        _forget(slide.features for slide in slides)
        _, filled = self._timed(dataset, chunks)
        _, hit = self._timed(dataset, chunks)
        return filled, hit

    def _compute(self, batches: Sequence[PatientBatch]) -> tuple[float, int]:
        """Seconds of the gradients of a step, and the memory that they took."""
        with _peak(self.device) as grown:
            start = time.perf_counter()
            accumulate_gradients(
                self.trainer.model,
                self.trainer.objective,
                [Chunk(batch, at) for at, batch in enumerate(batches)],
                autocast=self.trainer.autocast,
                processes=self.trainer.processes,
            )
            self._wait()
            took = time.perf_counter() - start
        return took, grown()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _validation(self, size: int, workers: int) -> Pass | None:
        patients = self.data.validation
        if not patients:
            return None
        some = patients[:: max(1, len(patients) // size)][:size]
        dataset = PatientDataset(
            self.data.cohort, self.data.standardizer, some, slides="all", cache=FeatureCache((), 0)
        )  # fmt: skip
        _forget(slide.features for patient in some for slide in self.slides.get(patient, ()))
        batches, reading = self._timed(dataset, [some])
        start = time.perf_counter()
        embed_patients(
            self.trainer.model, [(range(len(some)), batches[0])], some,
            autocast=self.trainer.autocast, processes=self.trainer.processes,
        )  # fmt: skip
        self._wait()
        computing = (time.perf_counter() - start) / len(some)
        # The monitors embed as many training patients.
        count = len(patients) * (2 if self.settings.run.monitor else 1)
        return Pass(reading.disk * count, reading.decoding * count, computing * count, workers)

    def _validations(self) -> int:
        run, plan = self.settings.run, self.trainer.plan
        intervals = [n for n in ((run.validate_every or 0) * plan.steps_per_epoch, run.validate_every_steps) if n]
        due = (step == plan.total or any(step % n == 0 for n in intervals) for step in range(1, plan.total + 1))
        return sum(due) + (self.settings.model.start == "cca")

    def _slide_start_steps(self) -> int:
        """Steps of the slide encoder's first start, each of about the same cost as a training step."""
        return (self.settings.model.slide_start_steps or 0) if can_learn(self.trainer.model, self.settings) else 0

    def _hit_share(self) -> float | None:
        train = sum(slide.n_bytes for patient in self.data.train for slide in self.slides.get(patient, ()))
        return min(1.0, self.data.cache.capacity / train) if train else None

    def _memory(self, activations: int) -> tuple[int, int | None]:
        """Bytes of host and GPU; `activations`: of a whole chunk."""
        run, data = self.settings.run, self.settings.data
        counts = [min(slide.n_patches, data.max_patches or slide.n_patches) for slide in self.data.cohort.slides.slides]
        patches = sum(counts) / max(len(counts), 1)  # of a slide, on average
        chunk = int(self.largest * patches * ((self.data.cohort.slides.dim or 0) * 4 + 12))
        waiting = chunk * (1 + _READ_AHEAD * run.num_workers)
        moments = 2 * sum(p.numel() * p.element_size() for p in self.trainer.parameters)
        host = _resident() + self.data.cache.capacity - self.data.cache.n_bytes + waiting
        if self.device.type != "cuda":
            return host + activations + moments, None
        return host, torch.cuda.memory_allocated(self.device) + activations + moments


def _mean(readings: Sequence[_Reading]) -> _Reading:
    n = len(readings)
    return _Reading(sum(r.disk for r in readings) / n, sum(r.decoding for r in readings) / n)


def _forget(paths: Iterable[Path]) -> None:
    """Ask the system to drop these files from its own cache, so that reading them shows the speed of the disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident() -> int:
    """Bytes of this process in memory; its peak so far, where the system does not tell."""
    try:
        return int(_RESIDENT.read_text().split()[1]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextlib.contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Inside the block, memory is watched; the function that is returned tells by how much it grew at most."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - before
        return
    with contextlib.suppress(OSError):
        _PEAK_RESET.write_text("5")  # resets the system's record of the peak
    before = _resident()
    yield lambda: max(0, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before)
