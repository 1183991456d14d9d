"""Reads a slide through OpenSlide.

An OpenSlide handle keeps its first error: every later call on the handle fails too. `read_image` therefore retires a
failed handle and tries once more on a new one before the error is raised. The second try uses a handle of its own: on a
shared handle, a bad region read by one thread would make a good region of another thread fail.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openslide
from PIL import Image

from exaonepath.errors import SlideChangedError, SlideOpenError, SlideReadError
from exaonepath.slides.formats import CONVERT, why_not_a_slide, why_rejected
from exaonepath.slides.readers.base import DEFAULT_CACHE, SlideReader
from exaonepath.slides.readers.limits import too_large_for_openslide

logger = logging.getLogger(__name__)


class OpenSlideReader(SlideReader):
    """A slide file that OpenSlide reads.

    Args:
        path: the slide file.
        check_unchanged: called after a file was opened again; raises if it is another one now.

    Raises:
        SlideOpenError: OpenSlide cannot open the file.
    """

    name = "openslide"
    as_openslide = True

    def __init__(self, path: Path, check_unchanged: Callable[[], None]) -> None:
        self.path = path
        self._check_unchanged = check_unchanged
        self._lock = threading.Lock()
        self._closed = False
        self._cache: openslide.OpenSlideCache | None = None
        self._slide: openslide.OpenSlide | None = _open(path)
        # Number of readers of each handle, by id. A retired handle is closed when its last reader has finished.
        self._readers: dict[int, int] = {}
        self.properties = dict(self._slide.properties)
        self.level_dimensions = tuple(self._slide.level_dimensions)
        self.scalar_downsamples = tuple(self._slide.level_downsamples)

    def best_level(self, downsample: float) -> int:
        """The level that OpenSlide chooses for a downsample factor."""
        with self._reading() as handle:
            return int(handle.get_best_level_for_downsample(downsample))

    def read_image(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """See `SlideReader.read_image`; an error is raised only if a new handle cannot read the region either."""
        with self._reading() as handle:
            try:
                return handle.read_region(location, level, size)
            except openslide.OpenSlideError as exc:
                self._retire(handle)
                first = exc
        logger.warning(
            "%s: reading %s at level %d failed (%s); trying a fresh handle", self.path, location, level, first
        )
        fresh = self._open_fresh()
        try:
            image = fresh.read_region(location, level, size)
        except openslide.OpenSlideError as exc:
            fresh.close()
            raise SlideReadError(
                f"{self.path}: cannot read the {size[0]} x {size[1]} region at {tuple(location)}, level {level}: {exc}"
            ) from exc
        self._adopt(fresh)
        return image

    def set_cache_bytes(self, capacity: int) -> None:
        """Keep up to `capacity` bytes of decoded tiles, in new handles too."""
        cache = openslide.OpenSlideCache(capacity)
        with self._reading() as handle:
            handle.set_cache(cache)
        self._cache, self.cache_bytes = cache, capacity

    @contextmanager
    def tile_cache(self, capacity: int) -> Iterator[None]:
        """Apply `set_cache_bytes` for the duration of a `with` block; the previous cache is restored afterwards."""
        before, before_bytes = self._cache, self.cache_bytes
        self.set_cache_bytes(capacity)
        try:
            yield
        finally:
            self._cache, self.cache_bytes = before or openslide.OpenSlideCache(DEFAULT_CACHE), before_bytes
            # `_reading` is not used: it would open a file again that may just have failed.
            with self._lock:
                if self._slide is not None:
                    self._slide.set_cache(self._cache)

    def close(self) -> None:
        """See `SlideReader.close`."""
        with self._lock:
            self._closed = True
            handle = self._slide
        if handle is not None:
            self._retire(handle)

    @contextmanager
    def _reading(self) -> Iterator[openslide.OpenSlide]:
        """The shared handle, which stays open at least until the block ends."""
        with self._lock:
            if self._slide is None:
                self._slide = self._open_fresh()
            handle = self._slide
            self._readers[id(handle)] = self._readers.get(id(handle), 0) + 1
        try:
            yield handle
        finally:
            with self._lock:
                left = self._readers[id(handle)] - 1
                if left:
                    self._readers[id(handle)] = left
                else:
                    del self._readers[id(handle)]
                unused = not left and handle is not self._slide
            if unused:
                handle.close()

    def _open_fresh(self) -> openslide.OpenSlide:
        if self._closed:
            raise self._closed_error()
        handle = _open(self.path)
        try:
            self._check_unchanged()
        except SlideChangedError:
            handle.close()
            raise
        if self._cache is not None:
            handle.set_cache(self._cache)
        return handle

    def _retire(self, handle: openslide.OpenSlide) -> None:
        """Stop sharing `handle`; close it now if it has no reader."""
        with self._lock:
            shared = self._slide is handle
            if shared:
                self._slide = None
            unused = shared and id(handle) not in self._readers
        if unused:
            handle.close()

    def _adopt(self, handle: openslide.OpenSlide) -> None:
        """Share `handle` from now on, or close it if another shared handle has been opened in the meantime."""
        with self._lock:
            needed = self._slide is None and not self._closed
            if needed:
                self._slide = handle
        if not needed:
            handle.close()


class UnsupportedSlideError(SlideOpenError):
    """OpenSlide does not read this format; another reader may."""


def _open(path: Path) -> openslide.OpenSlide:
    too_large = too_large_for_openslide(path)
    if too_large is not None:
        raise SlideOpenError(f"{path} {too_large}; it may be damaged; if not, {CONVERT}")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as exc:
        raise UnsupportedSlideError(f"{path} {why_not_a_slide(path)}") from exc
    except (openslide.OpenSlideError, OSError) as exc:
        if "Unsupported TIFF compression" in str(exc):
            raise UnsupportedSlideError(f"{path} {why_not_a_slide(path)}") from exc
        reason = why_rejected(path)
        if reason:
            raise SlideOpenError(f"{path} {reason} (OpenSlide: {exc})") from exc
        raise SlideOpenError(f"{path} cannot be opened as a slide ({exc}); the file may be truncated") from exc
