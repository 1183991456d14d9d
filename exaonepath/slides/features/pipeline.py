"""Reads, encodes and stores batches at the same time, with the results and the errors of doing it one after another.

While batch t is encoded, the reader's threads read the batches after it, and one thread stores the batch before it. At
most two batches are between the reader and the file: one that is being encoded, and one that is being stored.

Batches are stored in their order, and batch t only after `progress` was called for batch t - 1. Of several errors, the
one of the earliest batch is raised; the batches before it are stored, and none after it. So an interrupted run leaves
the same file as if batches had been processed one after another, except that Ctrl-C may keep one batch more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from exaonepath.errors import BackendError, SettingsError
from exaonepath.slides.features.partial import Block, PartialFile
from exaonepath.slides.features.reader import PatchBatch
from exaonepath.text import few

Progress = Callable[[int, int], None]


class Started(Protocol):
    """Features of a batch that was given to the device (see `encoding.Features`)."""

    def result(self) -> np.ndarray:
        """Wait for the device; float32 [b, D]."""


class Encoder(Protocol):
    """What turns images into features (see `encoding.BatchEncoder`)."""

    def start(self, images: np.ndarray) -> Started:
        """Encode images uint8 [b, crop, crop, 3]."""


def encode_batches(
    batches: Iterable[PatchBatch],
    encoder: Encoder,
    partial: PartialFile,
    done: int,
    total: int,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Store the features of all batches.

    Args:
        batches: the batches, in order: a `PatchReader`, or any other source. An iterator with a method `close` is
            closed at the end, whatever happens.
        encoder: called with the batches in order, from this thread.
        partial: the file that they are appended to.
        done, total: patches processed before, and in all, for `progress`.
        progress: called from this thread with (patches done, total) at the start and after each stored batch.
        check: called before a batch is stored, from another thread; if it raises an error, the batch is not stored.

    Raises:
        SettingsError: the width of the features changed.
        BackendError: NaN, infinity or a number that cannot be stored in the features of a batch, which is not stored.
        ExaonePathError: see `PatchReader`, `BatchEncoder.start` and `PartialFile.append`; and the errors of `check`.
    """
    if progress:
        progress(done, total)
    iterator = iter(batches)
    with ExitStack() as stack:
        writer = _Writer(partial, done, total, progress, check)
        stack.callback(writer.close)
        # Also on Ctrl-C: otherwise the threads would run until the generator is collected.
        stack.callback(getattr(iterator, "close", lambda: None))
        try:
            for batch in iterator:
                features = encoder.start(batch.images) if len(batch.indices) else None
                writer.settle()
                writer.store(batch, features)
        except Exception:
            writer.settle()  # the batch before is stored; if that fails, its error is the first one
            raise
        writer.settle()


class _Writer:
    """Checks and stores one batch at a time, on a thread."""

    def __init__(
        self, partial: PartialFile, done: int, total: int, progress: Progress | None, check: Callable[[], None]
    ) -> None:
        self._partial, self._progress, self._check = partial, progress, check
        self._done, self._total = done, total
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="exaonepath-writer")
        self._pending: tuple[Future[None], int] | None = None

    def store(self, batch: PatchBatch, features: Started | None) -> None:
        """Begin to store a batch; the batch before must be settled. `features` is None if no patch was readable."""
        assert self._pending is None
        size = len(batch.indices) + len(batch.failures)
        self._pending = self._pool.submit(self._store, batch, features), size

    def settle(self) -> None:
        """Wait for the batch that is being stored, raise its error, and report the progress."""
        if self._pending is None:
            return
        (future, size), self._pending = self._pending, None
        future.result()
        self._done += size
        if self._progress:
            self._progress(self._done, self._total)

    def close(self) -> None:
        """Let a batch that is being stored end, and the thread with it; the file is not written to afterwards."""
        self._pool.shutdown(wait=True)

    def _store(self, batch: PatchBatch, features: Started | None) -> None:
        dim = self._partial.dim
        values = np.empty((0, dim or 0), np.float32) if features is None else features.result()
        _check_features(values, batch, dim)
        values = _as_stored(values, batch, self._partial.dtype)
        self._check()  # before the rows are stored: they may come from another file
        self._partial.append(Block(batch.indices, values, batch.failures, batch.stop, len(batch.partly_missing)))


def _check_features(features: np.ndarray, batch: PatchBatch, dim: int | None) -> None:
    if dim is not None and features.shape[1] != dim:
        raise SettingsError(f"the patch encoder returned {features.shape[1]} numbers a patch, and {dim} before")
    bad = batch.indices[~np.isfinite(features).all(axis=1)]
    if len(bad):
        raise BackendError(
            f"the patch encoder gave NaN or infinity for {len(bad)} of {len(features)} patches of a batch "
            f"(patch {few(bad, 10)}); the weights are broken, or the dtype is too narrow for them: try float32 or "
            "bfloat16"
        )


def _as_stored(features: np.ndarray, batch: PatchBatch, dtype: np.dtype) -> np.ndarray:
    """The features in the dtype of the file. A number that would become infinity is an error."""
    if features.dtype == dtype:
        return features
    with np.errstate(over="ignore"):
        stored = features.astype(dtype)
    bad = batch.indices[~np.isfinite(stored).all(axis=1)]
    if len(bad):
        raise BackendError(
            f"{len(bad)} of {len(features)} patches of a batch (patch {few(bad, 10)}) have features of up to "
            f"{np.abs(features).max():.6g}, and {dtype.name} holds numbers up to {np.finfo(dtype).max:g}; store "
            "float32 (--feature-dtype float32)"
        )
    return stored
