"""Decoded tiles of the levels of a TIFF file, and regions that are put together from them.

The file is read with `pread`, so no thread changes the position of another one, and an error concerns one read only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from exaonepath.errors import SlideReadError
from exaonepath.slides.readers.base import DEFAULT_CACHE
from exaonepath.slides.readers.tiff_decode import DecodeError, decode, stored_values
from exaonepath.slides.readers.tiff_image import TiffImage
from exaonepath.slides.readers.tile_cache import TileCache

_ENCODED_SLACK = 64 << 10  # a stored tile may be larger than the decoded one: noise, tables, profiles


class Cell(NamedTuple):
    """A decoded tile or group of strips.

    Attributes:
        pixels: uint8 [h, w * 3], RGB.
        alpha: uint8 [h, w], or None if all pixels are covered.
        empty: whether the file has no data for it (`pixels` is not used then).
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    empty: bool

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return self.pixels.nbytes + (0 if self.alpha is None else self.alpha.nbytes) + 256


class Region(NamedTuple):
    """Pixels of a region.

    Attributes:
        pixels: uint8 [h, w, 3], RGB; black where there is no data.
        alpha: uint8 [h, w], 0 where there is no data; None if the whole region is covered.
        empty: number of pixels inside the image without data.
        inside: number of pixels inside the image.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    empty: int
    inside: int

    @property
    def missing(self) -> float:
        """Fraction of the pixels inside the image without data."""
        return self.empty / self.inside if self.empty else 0.0

    def image(self) -> Image.Image:
        """As a Pillow image, RGBA."""
        rgba = np.empty((*self.pixels.shape[:2], 4), np.uint8)
        rgba[..., :3] = self.pixels
        rgba[..., 3] = 255 if self.alpha is None else self.alpha
        return Image.fromarray(rgba)


_EMPTY = Cell(np.zeros((0, 0), np.uint8), None, True)


class TiffTiles:
    """The tiles of some images of a TIFF file, decoded when they are needed and shared by threads.

    Args:
        path: the file.
        images: how each of them is stored.
        scale: for 16-bit images, uint8 [65536], the 8-bit value of each stored value.
    """

    def __init__(self, path: Path, images: Sequence[TiffImage], scale: np.ndarray | None = None) -> None:
        self.path = path
        self.images = tuple(images)
        self.scale = scale
        self.cache: TileCache[Cell] = TileCache(DEFAULT_CACHE)
        self._lock = threading.Lock()
        self._readers, self._closed = 0, False
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))

    def region(self, level: int, x: int, y: int, width: int, height: int) -> Region:
        """Pixels of a region of an image, which may reach beyond it.

        Raises:
            SlideReadError: a tile of the region cannot be read.
        """
        if self._closed:  # also for tiles that are kept
            raise SlideReadError(f"{self.path} was closed")
        image = self.images[level]
        left, top, right, bottom = max(0, x), max(0, y), min(x + width, image.width), min(y + height, image.height)
        if right <= left or bottom <= top:
            return Region(np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.uint8), 0, 0)
        inside = (right - left) * (bottom - top)
        whole = inside == width * height
        pixels = np.empty((height, width * 3), np.uint8) if whole else np.zeros((height, width * 3), np.uint8)
        alpha = None if whole else _alpha(height, width, (left - x, top - y, right - x, bottom - y))
        empty = 0
        cell_width, cell_height = image.cell_width, image.cell_height
        for row in range(top // cell_height, -(-bottom // cell_height)):
            y0, y1 = max(top, row * cell_height), min(bottom, (row + 1) * cell_height)
            rows, from_rows = slice(y0 - y, y1 - y), slice(y0 - row * cell_height, y1 - row * cell_height)
            for column in range(left // cell_width, -(-right // cell_width)):
                x0, x1 = max(left, column * cell_width), min(right, (column + 1) * cell_width)
                cell = self.cell(level, column, row)
                start, stop = x0 - column * cell_width, x1 - column * cell_width
                if cell.empty:
                    pixels[rows, 3 * (x0 - x) : 3 * (x1 - x)] = 0
                else:
                    # Two dimensions: rows of bytes are copied faster than rows of pixels of three bytes.
                    pixels[rows, 3 * (x0 - x) : 3 * (x1 - x)] = cell.pixels[from_rows, 3 * start : 3 * stop]
                if cell.empty or cell.alpha is not None:
                    if alpha is None:
                        alpha = np.full((height, width), 255, np.uint8)
                    part = 0 if cell.alpha is None else cell.alpha[from_rows, start:stop]
                    alpha[rows, x0 - x : x1 - x] = part
                    empty += (y1 - y0) * (x1 - x0) - int(np.count_nonzero(part))
        return Region(pixels.reshape(height, width, 3), alpha, empty, inside)

    def cell(self, level: int, column: int, row: int) -> Cell:
        """A decoded cell, from the cache if it is kept there."""
        return self.cache.get((level, column, row), partial(self._decode, level, column, row))

    def encoded(self, level: int, column: int, row: int) -> bytes:
        """The stored bytes of a tile or strip (of the first plane, if there are several); empty if it has no data."""
        image = self.images[level]
        if not (0 <= column < image.columns and 0 <= row < image.segment_rows):
            raise SlideReadError(f"{self.path}: level {level} has no tile in column {column}, row {row}")
        return self._stored(image, row * image.columns + column)

    def largest_value(self, level: int, cells: int) -> int:
        """The largest stored colour in up to `cells` tiles or strips that are spread evenly over an image.

        Raises:
            SlideReadError: one of them cannot be read.
        """
        image = self.images[level]
        total = image.columns * image.segment_rows
        largest = 0
        for index in sorted({total * number // cells for number in range(cells)}):
            values = self._decoded(level, index % image.columns, index // image.columns, stored_values)
            largest = max(largest, 0 if values is None else int(values[..., : image.colours].max(initial=0)))
        return largest

    def close(self) -> None:
        """Close the file as soon as no thread reads it."""
        with self._lock:
            unused = not self._readers and not self._closed
            self._closed = True
        if unused:
            os.close(self._file)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()

    def _decode(self, level: int, column: int, row: int) -> Cell:
        image = self.images[level]
        per_cell = image.cell_height // image.segment_height
        segments = range(row * per_cell, min((row + 1) * per_cell, image.segment_rows))
        parts = [self._segment(level, column, segment) for segment in segments]
        found = [part for part in parts if part is not None]
        if not found:
            return _EMPTY
        if len(parts) == 1:
            return _cell(found[0])
        heights = [image.rows_of(segment) for segment in segments]
        channels = 4 if len(found) < len(parts) or image.alpha else 3
        whole = np.zeros((sum(heights), image.cell_width, channels), np.uint8)
        at = 0
        for height, part in zip(heights, parts, strict=True):
            if part is not None:
                whole[at : at + height, :, : part.shape[2]] = part
                whole[at : at + height, :, part.shape[2] :] = 255
            at += height
        return _cell(whole)

    def _segment(self, level: int, column: int, row: int) -> np.ndarray | None:
        """Pixels [rows, cell_width, channels] of a tile or strip; None if it has no data."""
        return self._decoded(level, column, row, partial(decode, scale=self.scale))

    def _decoded(
        self, level: int, column: int, row: int, decoder: Callable[[Sequence[bytes], TiffImage, int], np.ndarray]
    ) -> np.ndarray | None:
        image = self.images[level]
        index, per_plane = row * image.columns + column, image.columns * image.segment_rows
        stored = [self._stored(image, index + plane * per_plane) for plane in range(image.planes)]
        if not all(stored):
            return None
        try:
            return decoder(stored, image, image.rows_of(row))
        except DecodeError as exc:
            kind = "tile" if image.tiled else "strip"
            raise SlideReadError(
                f"{self.path}: the {kind} in column {column}, row {row} of level {level} {exc}"
            ) from exc

    def _stored(self, image: TiffImage, index: int) -> bytes:
        offset, length = int(image.offsets[index]), int(image.lengths[index])
        if length == 0:
            return b""
        most = 2 * image.segment_bytes + _ENCODED_SLACK
        if not (0 < length <= most and offset > 0):
            raise SlideReadError(
                f"{self.path}: a tile is stated to have {length} bytes at byte {offset}, and {image.segment_bytes} "
                "when it is decoded"
            )
        with self._reading() as file:
            try:
                size = os.fstat(file).st_size
                if offset + length > size:  # before memory for that length is allocated
                    raise SlideReadError(
                        f"{self.path}: a tile is stated to lie at bytes {offset} to {offset + length}, and the file "
                        f"ends at byte {size}"
                    )
                data = self._bytes(file, length, offset)
            except OSError as exc:
                raise SlideReadError(f"{self.path}: {length} bytes at byte {offset} cannot be read: {exc}") from exc
        if len(data) < length:
            raise SlideReadError(f"{self.path}: the file ends inside the {length} bytes at byte {offset}")
        return data

    def _bytes(self, file: int, length: int, offset: int) -> bytes:
        if hasattr(os, "pread"):
            return _pread(file, length, offset)
        with self._lock:  # Windows
            os.lseek(file, offset, os.SEEK_SET)
            return os.read(file, length)

    @contextmanager
    def _reading(self) -> Iterator[int]:
        """The descriptor, which stays open at least until the block ends."""
        with self._lock:
            if self._closed:
                raise SlideReadError(f"{self.path} was closed")
            self._readers += 1
        try:
            yield self._file
        finally:
            with self._lock:
                self._readers -= 1
                last = self._closed and not self._readers
            if last:
                os.close(self._file)


def _pread(file: int, length: int, offset: int) -> bytes:
    data = os.pread(file, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]  # a network file system may return less than was asked for
    while data and sum(map(len, parts)) < length:
        done = sum(map(len, parts))
        data = os.pread(file, length - done, offset + done)
        parts.append(data)
    return b"".join(parts)


def _cell(pixels: np.ndarray) -> Cell:
    height, width, channels = pixels.shape
    if channels == 3:
        return Cell(np.ascontiguousarray(pixels).reshape(height, width * 3), None, False)
    rgb = np.ascontiguousarray(pixels[..., :3]).reshape(height, width * 3)
    alpha = np.ascontiguousarray(pixels[..., 3])
    return Cell(rgb, None if alpha.size and alpha.min() == 255 else alpha, False)


def _alpha(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    alpha = np.zeros((height, width), np.uint8)
    alpha[box[1] : box[3], box[0] : box[2]] = 255
    return alpha
