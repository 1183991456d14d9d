"""Reads the patches of a slide ahead of the model, on threads, in order, within a fixed amount of memory.

Decoders and Pillow release the interpreter lock while they work, so reading scales with the number of cores. Each
thread reads a run of consecutive patches: neighbours on the grid share tiles, and two threads that read from the same
tile would both decode it.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from exaonepath.errors import DataFileError, SettingsError, SlideReadError
from exaonepath.files.features import PatchFailure
from exaonepath.log_once import warn_once
from exaonepath.processors import usable_processors
from exaonepath.slides.features.preprocessing import PreprocessingConfig, ReadWindow, read_window
from exaonepath.slides.image import SlideImage

logger = logging.getLogger(__name__)

# Decoded tiles kept for the next row of patches: two rows of 256 px tiles across 85,000 px of tissue. Larger tiles need
# more: without it, each row of patches would decode its tiles again.
_CACHE_BYTES, _LARGEST_CACHE = 128 << 20, 512 << 20
_RUN = 8  # consecutive patches that one thread reads
_MAX_DEFAULT_WORKERS = 16  # with more threads, storage is the limit, not decoding


@dataclass(frozen=True)
class PatchBatch:
    """Preprocessed patches of one batch, without the patches that could not be read.

    Attributes:
        indices: int64 [b], rows of the patches file, increasing.
        images: uint8 [b, crop, crop, 3] RGB, in the order of `indices`.
        failures: the batch's unreadable patches.
        stop: one past the last row that this batch covers, readable or not.
        partly_missing: rows of patches for which the file holds no data for some of the pixels (they are black).
    """

    indices: np.ndarray
    images: np.ndarray
    failures: tuple[PatchFailure, ...]
    stop: int
    partly_missing: tuple[int, ...] = ()


def default_workers() -> int:
    """Number of reading threads: one per processor that this process may use, at most 16."""
    return min(usable_processors(), _MAX_DEFAULT_WORKERS)


class PatchReader:
    """Iterates over the patches of a slide in batches, reading ahead of its consumer.

    Every `iter()` starts a new pass. When the loop is left early, for any reason, the threads stop within the reading
    time of one patch.

    Args:
        slide: an open slide.
        coords: int [N, 2], (x, y) of the top left corner of each patch at level 0, in pixels.
        patch_size: side of a patch in level-0 pixels. Pixels outside the slide are black.
        preprocessing: resize and crop.
        batch_size: patches in a batch; the last may have fewer.
        num_workers: reading threads; None: one per core; 0: read in the calling thread.
        indices: int [M], the rows of `coords` to read, increasing; None: all.

    Raises:
        SettingsError: a size or number is invalid.
        DataFileError: `coords` is not [N, 2].
    """

    def __init__(
        self,
        slide: SlideImage,
        coords: np.ndarray,
        patch_size: int,
        preprocessing: PreprocessingConfig | None = None,
        *,
        batch_size: int = 32,
        num_workers: int | None = None,
        indices: np.ndarray | None = None,
        page_locked: bool = False,
    ) -> None:
        if coords.ndim != 2 or coords.shape[1] != 2:
            raise DataFileError(f"patch coordinates must be [N, 2], got {list(coords.shape)}")
        if patch_size <= 0:
            raise SettingsError(f"patch size must be positive, got {patch_size}")
        if batch_size <= 0:
            raise SettingsError(f"batch size must be positive, got {batch_size}")
        if num_workers is None:
            num_workers = default_workers()
        elif num_workers < 0:
            raise SettingsError(f"number of reading threads must not be negative, got {num_workers}")
        self.slide = slide
        self.coords = coords
        self.indices = np.arange(len(coords), dtype=np.int64) if indices is None else np.asarray(indices, np.int64)
        self.preprocessing = preprocessing or PreprocessingConfig()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.page_locked = page_locked
        self._window: ReadWindow = read_window(patch_size, self.preprocessing)
        self._stop = threading.Event()

    @property
    def batches_ahead(self) -> int:
        """Number of batches that may be read, or in progress, in addition to the one that the consumer holds."""
        # At least one complete batch is waiting while each thread reads a run of its own.
        return 1 + -(-self.num_workers * _RUN // self.batch_size) if self.num_workers else 0

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Generator[PatchBatch, None, None]:
        with self.slide.tile_cache(self._cache_bytes()):
            yield from self._batches()

    def cancel(self) -> None:
        """Let the threads of the current pass stop, from any thread; the batches that still come are not complete."""
        self._stop.set()

    def _cache_bytes(self) -> int:
        """Bytes for the decoded tiles that one row of patches lies on, which are needed for the next row."""
        height = self.slide.properties.get("openslide.level[0].tile-height", "")
        if not height.isdecimal() or not len(self.indices):
            return _CACHE_BYTES
        across = self.coords[self.indices, 0]
        rows = (-(-self._window.size // int(height)) + 1) * int(height)
        needed = 3 * rows * (int(across.max()) - int(across.min()) + 2 * self._window.size)
        return max(_CACHE_BYTES, min(needed * 9 // 8, _LARGEST_CACHE))

    def _batches(self) -> Generator[PatchBatch, None, None]:
        batches = (self.indices[at : at + self.batch_size] for at in range(0, len(self.indices), self.batch_size))
        stop = self._stop = threading.Event()
        if not self.num_workers:
            for rows in batches:
                job = _Job(rows, self.preprocessing.crop, self.page_locked)
                self._read_run(job, 0, len(rows), stop)
                yield job.result()
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="exaonepath-reader")
        waiting: deque[_Job] = deque()
        try:
            for rows in batches:
                waiting.append(self._submit(pool, rows, stop))
                if len(waiting) > self.batches_ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            # Reached after the last batch, on an error, on Ctrl-C and when the consumer closes the generator.
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, rows: np.ndarray, stop: threading.Event) -> _Job:
        job = _Job(rows, self.preprocessing.crop, self.page_locked)
        for start in range(0, len(rows), _RUN):
            job.runs.append(pool.submit(self._read_run, job, start, min(start + _RUN, len(rows)), stop))
        return job

    def _read_run(self, job: _Job, start: int, end: int, stop: threading.Event) -> None:
        offset, size = self._window.offset, self._window.size
        for at in range(start, end):
            if stop.is_set():
                return
            index = int(job.rows[at])
            x, y = int(self.coords[index, 0]), int(self.coords[index, 1])
            corner = (x + offset, y + offset)
            try:
                part, missing = self.slide.read_rgb(corner, 0, (size, size))
                if missing == 1:
                    raise SlideReadError(f"{self.slide.path} has no image data there (tiles of zero length)")
            except SlideReadError as exc:
                logger.warning("patch %d at (%d, %d) cannot be read: %s", index, x, y, exc)
                job.failures[at] = PatchFailure(index, x, y, str(exc))
            else:
                if missing:
                    job.partly_missing[at] = missing
                job.images[at] = self._window.finish(part)


class _Job:
    """One batch that is being read. Each run writes its own rows, so no lock is needed."""

    def __init__(self, rows: np.ndarray, crop: int, page_locked: bool) -> None:
        self.rows = rows
        self.images = image_memory((len(rows), crop, crop, 3), page_locked)
        self.failures: dict[int, PatchFailure] = {}
        self.partly_missing: dict[int, float] = {}
        self.runs: list[Future[None]] = []

    def result(self) -> PatchBatch:
        for run in self.runs:
            run.result()
        failures = tuple(self.failures[at] for at in sorted(self.failures))
        rows, images = self.rows, self.images
        if failures:
            readable = np.setdiff1d(np.arange(len(rows)), list(self.failures))
            rows, images = rows[readable], images[readable]
        partial = tuple(int(self.rows[at]) for at in sorted(self.partly_missing))
        return PatchBatch(rows, images, failures, stop=int(self.rows[-1]) + 1, partly_missing=partial)


def image_memory(shape: tuple[int, ...], page_locked: bool) -> np.ndarray:
    """Uninitialised uint8 memory for images, page-locked if that is possible."""
    if page_locked:
        try:
            # torch keeps such memory when it is freed, and gives it out again after the copies from it have ended.
            images: np.ndarray = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy()
            return images
        except RuntimeError as exc:
            warn_once(logger, "no page-locked memory (%s); copies to the GPU are slower", exc)
    return np.empty(shape, np.uint8)
