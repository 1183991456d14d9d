"""Pictures of slides: Deep Zoom tiles, thumbnails and single patches as JPEG, through a bounded number of handles."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass

import cv2

from exaonepath.errors import SlideReadError
from exaonepath.slides.image import SlideImage
from exaonepath.viewer import tiles
from exaonepath.viewer.memo import NotFound, Outdated
from exaonepath.viewer.slide_pool import SlidePool
from exaonepath.viz.values.library import Entry

logger = logging.getLogger(__name__)

_TILE_CACHE_BYTES = 96 << 20
_THUMBNAIL = 224
_LARGEST_PATCH, _SMALLEST_SIDE, _LARGEST_SIDE = 1 << 14, 16, 512
_MOST_PIXELS = 1 << 24  # of a level, read for one patch


@dataclass(frozen=True)
class SlideInfo:
    """What the page has to know of a slide file: its size, its pixel size, and what names this very file."""

    width: int
    height: int
    fingerprint: str
    mpp: float
    mpp_source: str
    reader: str
    doubts: tuple[str, ...]
    levels: int


class Pixels:
    """Reads pictures of slides. Safe to share between threads.

    Args:
        pool: the open slides.
    """

    def __init__(self, pool: SlidePool) -> None:
        self._pool = pool
        self._overviews = tiles.Overviews()
        self._cache = _ByteCache(_TILE_CACHE_BYTES)
        self._bad: dict[str, set[tuple[int, int, int]]] = {}

    def info(self, entry: Entry) -> SlideInfo:
        """The slide file as it is now.

        Raises:
            SlideError: it is gone, or is no slide.
        """
        with self._pool.use(entry) as slide:
            return SlideInfo(
                *slide.dimensions,
                _short(slide),
                slide.mpp,
                slide.mpp_source,
                slide.reader,
                slide.scale_doubts,
                len(slide.level_dimensions),
            )

    def bad_tiles(self, entry: Entry) -> int:
        """Number of tiles of a slide that were shown grey, because they could not be read."""
        return len(self._bad.get(entry.key, ()))

    def tile(self, entry: Entry, fingerprint: str, level: int, column: int, row: int) -> tuple[bytes, bool]:
        """A Deep Zoom tile as JPEG, and whether it could be read: one that could not is grey.

        Raises:
            NotFound: there is no such tile.
            Outdated: the slide file is another one now.
            SlideError: the slide is gone, or was replaced.
        """
        name = f"{entry.key}/{fingerprint}/{level}/{column}_{row}"
        data = self._cache.get(name)
        if data is not None:
            return data, True
        with self._pool.use(entry) as slide:
            _check(slide, fingerprint)
            box = tiles.Pyramid(*slide.dimensions).box(level, column, row)
            if box is None:
                raise NotFound(f"there is no tile {column}, {row} on level {level}")
            try:
                pixels = tiles.tile_pixels(slide, _overview_key(entry, slide), self._overviews, level, column, row)
            except SlideReadError as exc:
                slide.check_unchanged()  # a file that is gone or was replaced is not a bad tile
                logger.warning("tile %d, %d of level %d is shown grey: %s", column, row, level, exc)
                self._bad.setdefault(entry.key, set()).add((level, column, row))
                return tiles.encode_jpeg(tiles.grey_tile(box)), False
        data = tiles.encode_jpeg(pixels)
        self._cache.put(name, data)
        return data, True

    def thumbnail(self, entry: Entry, fingerprint: str | None) -> bytes:
        """The whole slide as a small JPEG.

        Raises:
            Outdated, SlideError: as of `tile`.
        """
        with self._pool.use(entry) as slide:
            if fingerprint is not None:
                _check(slide, fingerprint)
            name = f"{entry.key}/{_short(slide)}/thumbnail"
            data = self._cache.get(name)
            if data is None:
                picture = self._overviews.get(_overview_key(entry, slide), slide)
                scale = _THUMBNAIL / max(picture.shape[:2])
                size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
                data = tiles.encode_jpeg(cv2.resize(picture, size, interpolation=cv2.INTER_AREA))
                self._cache.put(name, data)
            return data

    def patch(self, entry: Entry, fingerprint: str, x: int, y: int, size: int, side: int) -> tuple[bytes, bool]:
        """A square of the slide as JPEG of `side` pixels, and whether it could be read.

        Args:
            entry, fingerprint: the slide.
            x, y: top left corner in level-0 pixels.
            size: side in level-0 pixels.
            side: side of the picture.

        Raises:
            NotFound: the square is not on the slide, or too large.
            Outdated, SlideError: as of `tile`.
        """
        with self._pool.use(entry) as slide:
            _check(slide, fingerprint)
            width, height = slide.dimensions
            possible = 1 <= size <= _LARGEST_PATCH and _SMALLEST_SIDE <= side <= _LARGEST_SIDE
            if x >= width or y >= height or not possible:
                raise NotFound("there is no such patch")
            level = slide.get_best_level_for_downsample(max(1.0, size / side))
            down = slide.level_downsamples[level]
            shape = max(1, round(size / down[0])), max(1, round(size / down[1]))
            if shape[0] * shape[1] > _MOST_PIXELS:
                raise NotFound("the patch is too large to be read from this slide")
            good = True
            try:
                pixels = tiles.read_on_white(slide, (x, y), level, shape)
            except SlideReadError as exc:
                slide.check_unchanged()
                logger.warning("the patch at %d, %d is shown grey: %s", x, y, exc)
                pixels, good = tiles.grey_tile((0, 0, side, side)), False
        shrinks = pixels.shape[0] >= side
        pixels = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        return tiles.encode_jpeg(pixels), good


class _ByteCache:
    """The last encoded pictures, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._lock = threading.Lock()
        self._held: OrderedDict[str, bytes] = OrderedDict()

    def get(self, name: str) -> bytes | None:
        with self._lock:
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def put(self, name: str, data: bytes) -> None:
        with self._lock:
            self._used += len(data) - len(self._held.pop(name, b""))
            self._held[name] = data
            while self._used > self._limit:
                self._used -= len(self._held.popitem(last=False)[1])


def _short(slide: SlideImage) -> str:
    """The fingerprint as it stands in addresses."""
    return slide.fingerprint()[:16]


def _overview_key(entry: Entry, slide: SlideImage) -> str:
    return f"{entry.key}/{_short(slide)}"


def _check(slide: SlideImage, fingerprint: str) -> None:
    if fingerprint != _short(slide):
        raise Outdated("the slide file is another one than when the page was loaded; load it again")
