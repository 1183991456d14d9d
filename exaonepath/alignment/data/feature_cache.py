"""Patch features of slides in memory that a process shares with the workers it starts: one budget for all of them.

A slide that was stored once stays until the end. Each epoch reads every slide once, in another order, so dropping the
least recently used one would nearly always drop a slide before it is read again. Keeping the first ones is best: a
budget for a third of the slides saves a third of the reading.
"""

from __future__ import annotations

import mmap
import multiprocessing
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from exaonepath.alignment.data.feature_checks import file_state
from exaonepath.alignment.data.slides import Slide
from exaonepath.errors import DataFileError, SettingsError
from exaonepath.files.feature_rows import OpenFeatures, open_features

# (coords int32 [N, 2], contour_index int32 [N]) to the rows that are wanted, increasing int64 [n]; None: all.
ChooseRows = Callable[[np.ndarray, np.ndarray], np.ndarray | None]
# A number of rows n to the tensor float32 [n, D] that takes them.
Allocate = Callable[[int], Tensor]

_ALIGNMENT = 64
_EMPTY, _BEING_FILLED, _FIRST = 0, 1, 2  # states of a slide; from `_FIRST` on: its position plus `_FIRST`
_USED, _OPENED, _HEAD = 0, 1, 2  # the index: bytes in use, files opened; from `_HEAD` on: a state for each slide


@dataclass(frozen=True)
class SlideRows:
    """Patches of a slide, copied: features float32 [n, D], coords int32 [n, 2], contour_index int32 [n]."""

    features: Tensor
    coords: Tensor
    contour_index: Tensor


@dataclass(frozen=True)
class _Views:
    """A slide in the shared memory; features in the stored type."""

    features: np.ndarray
    coords: np.ndarray
    contour_index: np.ndarray


class _SharedMemory:
    """`capacity` bytes, and `_HEAD + n` numbers, that are shared with forked processes.

    The memory has no name: it takes no space before it is written to, and the system frees it with the last process.
    """

    def __init__(self, capacity: int, n: int) -> None:
        self.capacity = capacity
        self.index = np.frombuffer(mmap.mmap(-1, 8 * (_HEAD + n)), np.int64)
        self.bytes = np.frombuffer(mmap.mmap(-1, max(1, capacity)), np.uint8)
        self.lock = _shared_lock()


class FeatureCache:
    """A cache of the features of some slides, for this process and those that are forked from it.

    Features are kept as stored: float16 takes half the memory. A process that was not forked (it gets a pickled copy of
    this object) has a cache of its own, with the budget divided by the number of workers.

    Args:
        slides: slides that may be stored.
        max_bytes: the budget; 0: nothing is stored.

    Raises:
        SettingsError: the system does not grant the memory.
    """

    def __init__(self, slides: Iterable[Slide], max_bytes: int) -> None:
        self._slides, self.max_bytes = tuple(slides), max_bytes
        self._number = {slide.features: at for at, slide in enumerate(self._slides)}
        self._memory: _SharedMemory | None = None
        _ = self._shared  # before any process is forked

    @property
    def _shared(self) -> _SharedMemory:
        if self._memory is None:
            worker = get_worker_info()
            budget = self.max_bytes // (1 if worker is None else worker.num_workers)
            capacity = min(budget, sum(_size(slide) for slide in self._slides))
            try:
                self._memory = _SharedMemory(capacity, len(self._slides))
            except (OSError, ValueError, OverflowError) as exc:
                raise SettingsError(
                    f"the cache of patch features (data.cache_mb) cannot have {capacity >> 20} MB: {exc}"
                ) from exc
        return self._memory

    def __getstate__(self) -> dict[str, Any]:
        return {"slides": self._slides, "max_bytes": self.max_bytes, "number": self._number}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self._slides, self.max_bytes, self._number = state["slides"], state["max_bytes"], state["number"]
        self._memory = None  # at its first use, when the number of workers is known

    @property
    def capacity(self) -> int:
        """Bytes that can be stored: the budget, or less if all slides together are smaller."""
        return self._shared.capacity

    @property
    def n_bytes(self) -> int:
        """Bytes in use."""
        with self._shared.lock:
            return int(self._shared.index[_USED])

    @property
    def n_opened(self) -> int:
        """How many times a file was opened, by all processes together."""
        with self._shared.lock:
            return int(self._shared.index[_OPENED])

    def read(self, slide: Slide, choose: ChooseRows | None = None, allocate: Allocate | None = None) -> SlideRows:
        """The patches of a slide: all, or the rows that `choose` selects.

        If there is space left, the whole file is read and stored. Otherwise only those blocks of the file are read that
        contain the rows.

        Args:
            slide: the slide.
            choose: selects rows.
            allocate: returns the tensor for the features, for example a part of that of a whole batch.

        Raises:
            DataFileError: the file cannot be read, or has changed since the cohort was checked.
        """
        allocate = allocate or (lambda n: torch.empty(n, slide.dim))
        views = self._find(slide) or self._store(slide)
        if views is not None:
            rows = None if choose is None else choose(views.coords, views.contour_index)
            features = allocate(len(views.coords) if rows is None else len(rows))
            _gather(views.features, rows, features)
            return SlideRows(features, _copied(views.coords, rows), _copied(views.contour_index, rows))
        with self._open(slide) as file:
            coords, contours = _coords(file), file.contour_index
            rows = None if choose is None else choose(coords, contours)
            features = allocate(len(coords) if rows is None else len(rows))
            _read(file, rows, features)
            return SlideRows(features, _copied(coords, rows), _copied(contours, rows))

    def _find(self, slide: Slide) -> _Views | None:
        at = self._number.get(slide.features)
        if at is None:
            return None
        with self._shared.lock:
            state = int(self._shared.index[_HEAD + at])
        return None if state < _FIRST else self._views(slide, state - _FIRST)

    def _store(self, slide: Slide) -> _Views | None:
        """Read the whole file into the cache; None if there is no space, or another process is doing it."""
        at, shared = self._number.get(slide.features), self._shared
        if at is None:
            return None
        with shared.lock:
            start = int(shared.index[_USED])
            if shared.index[_HEAD + at] != _EMPTY or start + _size(slide) > shared.capacity:
                return None
            shared.index[_USED] = start + _size(slide)
            shared.index[_HEAD + at] = _BEING_FILLED
        state = _EMPTY  # after an error; its space is not used again
        try:
            views = self._views(slide, start)
            with self._open(slide) as file:
                file.read_into(views.features)
                views.coords[:], views.contour_index[:] = _coords(file), file.contour_index
            state = _FIRST + start
        finally:
            with shared.lock:
                shared.index[_HEAD + at] = state
        return views

    def _views(self, slide: Slide, start: int) -> _Views:
        n, dtype = slide.n_patches, np.dtype(np.float16 if slide.half else np.float32)
        ends = np.cumsum([n * slide.dim * dtype.itemsize, n * 8, n * 4]).tolist()
        part = self._shared.bytes[start : start + ends[-1]]
        return _Views(
            part[: ends[0]].view(dtype).reshape(n, slide.dim),
            part[ends[0] : ends[1]].view(np.int32).reshape(n, 2),
            part[ends[1] :].view(np.int32),
        )

    @contextmanager
    def _open(self, slide: Slide) -> Iterator[OpenFeatures]:
        with self._shared.lock:
            self._shared.index[_OPENED] += 1
        with open_features(slide.features, expected_dim=slide.dim) as file:
            _check_unchanged(slide, file)
            yield file


def _check_unchanged(slide: Slide, file: OpenFeatures) -> None:
    """Raise `DataFileError` if the file has other content than when the cohort was checked."""
    changed = f"{slide.features} changed since the cohort was checked"
    if len(file) != slide.n_patches:
        raise DataFileError(f"{changed}: {len(file)} patches, not {slide.n_patches}")
    if file.is_half != slide.half or (slide.header and file.header != slide.header):
        raise DataFileError(f"{changed}: it holds other features; start again, or restore it")
    if slide.state is not None and not file.stored.has_checksums:
        # Without checksums, nothing in the header shows the content. Only the time of the inode may differ: it changes
        # with the permissions.
        now = file_state(slide.features)
        if now is None or now[:3] != slide.state[:3]:
            raise DataFileError(f"{changed}: it was replaced or written to; start again, or restore it")


def _coords(file: OpenFeatures) -> np.ndarray:
    assert file.coords is not None  # required when the file is opened
    return file.coords


def _gather(values: np.ndarray, rows: np.ndarray | None, out: Tensor) -> None:
    """Copy rows of [N, D] to `out`."""
    if values.dtype == np.float32 and rows is not None:
        np.take(values, rows, axis=0, out=out.numpy(), mode="clip")  # "clip" avoids a copy; all rows are inside
    else:
        # torch converts float16 ten times faster than numpy does; the conversion is exact in both.
        out.copy_(torch.from_numpy(values if rows is None else values[rows]))


def _read(file: OpenFeatures, rows: np.ndarray | None, out: Tensor) -> None:
    """Read rows of the file to `out`."""
    if file.is_half:
        out.copy_(torch.from_numpy(file.read() if rows is None else file.take(rows)))
    elif rows is None:
        file.read_into(out.numpy())
    else:
        file.take(rows, out.numpy())


def _copied(values: np.ndarray, rows: np.ndarray | None) -> Tensor:
    """Rows of the values, as a copy: a caller may change it, which must not change the cache."""
    return torch.from_numpy(values.copy() if rows is None else values[rows])


def _size(slide: Slide) -> int:
    """Bytes of a slide in the cache."""
    return -(-slide.n_bytes // _ALIGNMENT) * _ALIGNMENT


def _shared_lock() -> AbstractContextManager[Any]:
    """A lock that forked processes share; where there is no fork, one for the threads of this process."""
    if "fork" in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("fork").Lock()
    return threading.Lock()
