"""A bounded number of open slides, shared by all requests; a slide that vanishes becomes an error, not a crash."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from exaonepath.errors import SlideError
from exaonepath.slides.image import SlideImage
from exaonepath.viz.values.library import Entry

_CHECK_SECONDS = 1.0  # how often a slide is compared with the file that was opened, at most


class _Open:
    """A slide handle, the number of requests that use it, and when its file was last looked at."""

    def __init__(self) -> None:
        self.opening = threading.Lock()
        self.slide: SlideImage | None = None
        self.users = 0
        self.checked = 0.0
        self.stale = False  # dropped from the pool; the last user closes it


class SlidePool:
    """Slide handles by key. Safe to share between threads.

    Args:
        limit: handles that stay open while nobody uses them; with more users than that, more are open.
        cache_bytes: decoded tiles that each handle keeps.
    """

    def __init__(self, limit: int = 16, cache_bytes: int = 64 << 20) -> None:
        self._limit, self._cache_bytes = limit, cache_bytes
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _Open] = OrderedDict()

    @contextmanager
    def use(self, entry: Entry) -> Iterator[SlideImage]:
        """The open slide of an entry; it is not closed while the block runs.

        Raises:
            SlideOpenError: the slide is missing or is no slide.
            SlideChangedError: the file was replaced since it was opened; the next call opens the new one.
        """
        with self._lock:
            held = self._open.setdefault(entry.key, _Open())
            self._open.move_to_end(entry.key)
            held.users += 1
        try:
            yield self._checked(entry, held)
        except SlideError:
            self._look_again(entry.key, held)
            raise
        finally:
            with self._lock:
                held.users -= 1
                self._evict(held)

    def __len__(self) -> int:
        """Number of open handles."""
        with self._lock:
            return sum(held.slide is not None for held in self._open.values())

    def close(self) -> None:
        """Close all handles; those in use as soon as their users are done."""
        with self._lock:
            for key in list(self._open):
                self._drop(key)

    def _checked(self, entry: Entry, held: _Open) -> SlideImage:
        with held.opening:  # a slide is opened once, and opening one does not delay requests for others
            if held.slide is None:
                held.slide = SlideImage(entry.slide_file(), mpp=entry.mpp(), name=entry.id)
                held.slide.set_cache_bytes(self._cache_bytes)
                held.checked = time.monotonic()
            elif time.monotonic() - held.checked > _CHECK_SECONDS:
                held.slide.check_unchanged()
                held.checked = time.monotonic()
            return held.slide

    def _look_again(self, key: str, held: _Open) -> None:
        """After an error, drop a handle that never opened or whose file has changed; a bad tile alone keeps it."""
        if held.slide is not None:
            try:
                held.slide.check_unchanged()
            except SlideError:
                pass
            else:
                return
        with self._lock:
            if self._open.get(key) is held:
                self._drop(key)

    def _drop(self, key: str) -> None:
        held = self._open.pop(key)
        held.stale = True
        if held.users == 0 and held.slide is not None:
            held.slide.close()

    def _evict(self, held: _Open) -> None:
        if held.stale and held.users == 0 and held.slide is not None:
            held.slide.close()
        for key in [key for key, other in self._open.items() if other.users == 0]:
            if len(self._open) <= self._limit:
                break
            self._drop(key)
