"""Decoded tiles, kept up to a number of bytes and shared by threads.

Two threads that need one tile at the same time decode it once: the second one waits for the first. (Neighbouring
patches share tiles, so this is the ordinary case where two threads read next to each other.)
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """A value with a size in bytes."""

    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class _Pending(Generic[T]):
    """A tile that is being decoded by one thread."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.value: T | None = None


class TileCache(Generic[T]):
    """A cache that drops what was not used for the longest time.

    Args:
        capacity: bytes that are kept at most. One tile is kept even if it is larger.

    Attributes:
        decoded: number of tiles that were decoded, for tests and benchmarks.
        peak: largest number of bytes that were kept at once.
    """

    def __init__(self, capacity: int) -> None:
        self.decoded = 0
        self.peak = 0
        self._capacity = capacity
        self._bytes = 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._pending: dict[Hashable, _Pending[T]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept now."""
        return self._bytes

    def set_capacity(self, capacity: int) -> None:
        """Change the capacity; what no longer fits is dropped now."""
        with self._lock:
            self._capacity = capacity
            self._shrink()

    def get(self, key: Hashable, decode: Callable[[], T]) -> T:
        """The kept value, or the result of `decode`, which is called by one thread at a time for each key.

        An error of `decode` is raised in the thread that called it. A thread that waited then tries itself: the error
        gets a traceback of its own, and a fault that was temporary is not multiplied.
        """
        while True:
            with self._lock:
                value = self._kept.get(key)
                if value is not None:
                    self._kept.move_to_end(key)
                    return value
                pending = self._pending.get(key)
                mine = pending is None
                if pending is None:
                    pending = self._pending[key] = _Pending()
            if mine:
                return self._decode(key, decode, pending)
            pending.done.wait()
            if pending.value is not None:
                return pending.value

    def _decode(self, key: Hashable, decode: Callable[[], T], pending: _Pending[T]) -> T:
        try:
            value = pending.value = decode()
            with self._lock:
                self.decoded += 1
                self._kept[key] = value
                self._bytes += value.nbytes
                self._shrink()
                self.peak = max(self.peak, self._bytes)
            return value
        finally:
            with self._lock:
                del self._pending[key]
            pending.done.set()

    def _shrink(self) -> None:
        while self._bytes > self._capacity and len(self._kept) > 1:
            _, value = self._kept.popitem(last=False)
            self._bytes -= value.nbytes
