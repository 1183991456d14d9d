"""The time of an epoch and the memory of a run, told before it: what `probe.py` measured, put together."""

from __future__ import annotations

from dataclasses import dataclass

from exaonepath.memory import available_host_memory
from exaonepath.processors import usable_processors

_MUCH_READING = 0.1  # share of the time from which workers are recommended


@dataclass(frozen=True)
class Pass:
    """A pass over patients, in seconds.

    Attributes:
        disk: waiting for the disk. decoding: checking and copying what was read. computing: the model.
        workers: processes that read while the model computes; 0: reading and computing alternate.
    """

    disk: float
    decoding: float
    computing: float
    workers: int = 0

    @property
    def reading(self) -> float:
        """Time until the batches have been read, by all workers."""
        return (self.disk + self.decoding) / max(self.workers, 1)

    @property
    def seconds(self) -> float:
        """Duration."""
        return max(self.reading, self.computing) if self.workers else self.reading + self.computing

    @property
    def bound(self) -> str:
        """The part that takes most of the time."""
        reading = self.reading if self.workers else max(self.disk, self.decoding)
        if self.computing >= reading:
            return "computing"
        return "the disk" if self.disk > self.decoding else "decoding"

    def __str__(self) -> str:
        parts = f"disk {_duration(self.disk)}, decoding {_duration(self.decoding)}, model {_duration(self.computing)}"
        return f"{_duration(self.seconds)}, bound by {self.bound} ({parts})"


@dataclass(frozen=True)
class RunEstimate:
    """What a run will take.

    Attributes:
        batches, patients: batches that were measured, and patients in all of them.
        first, later: the first epoch, and each of the others.
        validation: one validation; None: there are no validation patients.
        epochs, validations: their number in the run; the steps of the slide encoder's start count as training steps.
        hit_share: share of the training slides' bytes that the cache holds after the first epoch; None: no slides.
        host_bytes: memory of this process and its workers. device_bytes: memory of the GPU; None: there is none.
    """

    batches: int
    patients: int
    first: Pass
    later: Pass
    validation: Pass | None
    epochs: float
    validations: int
    hit_share: float | None
    host_bytes: int
    device_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Duration of the run."""
        epochs = min(self.epochs, 1) * self.first.seconds + max(self.epochs - 1, 0) * self.later.seconds
        return epochs + (0.0 if self.validation is None else self.validations * self.validation.seconds)

    def summary(self) -> str:
        """Lines of text."""
        lines = [f"first epoch: about {self.first}"]
        if self.epochs > 1:
            lines.append(f"each other epoch: about {self.later}")
        if self.validation is not None:
            lines.append(f"each validation, of {self.validations}: about {self.validation}")
        lines.append(
            f"the run: about {_duration(self.seconds)}, estimated from {self.batches} batches of "
            f"{self.patients // self.batches} patients"
        )
        if self.hit_share is not None:
            lines.append(f"cache: {self.hit_share:.0%} of the training slides, after the first epoch")
        return "\n".join([*lines, *self._memory(), *self._advice()])

    def _memory(self) -> list[str]:
        available = available_host_memory()
        known = "" if available is None else f", {_gigabytes(available)} available"
        device = "" if self.device_bytes is None else f"; of the GPU {_gigabytes(self.device_bytes)}"
        lines = [f"memory: about {_gigabytes(self.host_bytes)}{known}{device}"]
        if available is not None and self.host_bytes > available:
            lines.append(
                "warning: not enough memory; lower data.cache_mb, data.max_patches, run.chunk_size or run.num_workers"
            )
        return lines

    def _advice(self) -> list[str]:
        share = self.later.reading / self.later.seconds if self.later.seconds else 0.0
        if self.later.workers or share <= _MUCH_READING or usable_processors() == 1:
            return []
        return [f"{share:.0%} of an epoch is reading; with run.num_workers, workers read while the model computes"]


def _duration(seconds: float) -> str:
    for limit, factor, unit in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds / factor:.2g} {unit}" if seconds / factor < 10 else f"{seconds / factor:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB"
