"""Reads a whole pyramid level in pieces, with exactly the pixels that a single read of the level would return.

Arbitrary pieces would not do. OpenSlide takes locations in level-0 pixels. If the downsample of a level is not an
integer, a piece that starts at another position than in a full read is shifted by a fraction of a pixel and
interpolated (16 % of the pixels of a 16.02x level differ). A full read itself works in cells of 4096 x 4096 pixels,
whose origins are truncated to whole level-0 pixels. Therefore, with an integer downsample on a regular tile grid, any
piece is correct, and small ones on tile borders are read; otherwise exactly OpenSlide's own cells are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from exaonepath.slides.image import SlideImage

CELL = 4096
_PIECE_WIDTH, _PIECE_HEIGHT = 2048, 256
_STRIP_PIXELS = 1 << 19
_PIECES_BYTES = 1 << 26  # a cell of 4096 x 4096 pixels


class Piece(NamedTuple):
    """Pixels of a level at column `x`, row `y`: uint8 [h, w, 3 or 4], RGB first."""

    x: int
    y: int
    pixels: np.ndarray


class Band(NamedTuple):
    """Full-width rows [top, bottom) of a level; its pieces must be consumed before the next band is requested."""

    top: int
    bottom: int
    pieces: Iterator[Piece]


@dataclass
class LevelReader:
    """Streams one level of a slide, reduced by `shrink` with OpenCV's INTER_AREA, in full-width bands from the top.

    Args:
        slide: an opened slide.
        level: pyramid level.
        shrink: extra reduction (`seg_downsample`), >= 1; the result has (int(w / shrink), int(h / shrink)) pixels.

    Attributes:
        empty_pixels: number of pixels read so far for which the file holds no data; they are read as black.

    The pixels are bit for bit those of one read and one resize of the whole level. Memory: a few MiB if the level's
    downsample is an integer, 64 MiB otherwise; with a shrink that does not divide the level evenly, 3 bytes per pixel
    of the level.
    """

    slide: SlideImage
    level: int
    shrink: float = 1.0
    empty_pixels: int = field(default=0, init=False)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the result; 0 if the level is smaller than `shrink`."""
        w, h = self.slide.level_dimensions[self.level]
        return (int(w / self.shrink), int(h / self.shrink)) if self.shrink > 1 else (w, h)

    def peak_bytes(self) -> int:
        """Bytes needed to segment the result, without contours: 8 per pixel of the result, plus those for reading."""
        width, height = self.size
        level_width, level_height = self.slide.level_dimensions[self.level]
        whole = 0 if self._even_factor() is not None else 3 * level_width * level_height
        return 8 * width * height + whole + _PIECES_BYTES

    def bands(self) -> Iterator[Band]:
        """Yield the bands, in order; each row belongs to exactly one.

        Raises:
            SlideReadError: a region cannot be read.
        """
        factor = self._even_factor()
        if factor is None:
            yield from self._resized_whole()
            return
        width, height = self.slide.level_dimensions[self.level]
        step_x, step_y = self._piece_size(factor)
        for top in range(0, height, step_y):
            bottom = min(top + step_y, height)
            if step_x >= width:
                # Each strip has the full width of the level: the consumer need not hold another whole cell in memory.
                for piece in self._pieces(top, bottom, width, step_x, factor):
                    yield Band(piece.y, piece.y + len(piece.pixels), iter([piece]))
                continue
            yield Band(top // factor, bottom // factor, self._pieces(top, bottom, width, step_x, factor))

    def _pieces(self, top: int, bottom: int, width: int, step_x: int, factor: int) -> Iterator[Piece]:
        for left in range(0, width, step_x):
            size = (min(step_x, width - left), bottom - top)
            rows = max(1, _STRIP_PIXELS // size[0] // factor) * factor
            region = self.slide.read_strips(self._location(left, top), self.level, size, rows)
            for index, pixels in enumerate(region):
                y = top + index * rows
                if pixels.shape[2] == 4:
                    self.empty_pixels += pixels.shape[0] * pixels.shape[1] - cv2.countNonZero(pixels[..., 3])
                if factor > 1:
                    small = (pixels.shape[1] // factor, pixels.shape[0] // factor)
                    pixels = cv2.resize(pixels, small, interpolation=cv2.INTER_AREA)
                yield Piece(left // factor, y // factor, pixels)

    def _resized_whole(self) -> Iterator[Band]:
        # INTER_AREA with a fractional scale weights every pixel by its position in the whole image, so the level cannot
        # be resized in pieces.
        w, h = self.slide.level_dimensions[self.level]
        whole = np.empty((h, w, 3), np.uint8)
        unshrunk = LevelReader(self.slide, self.level)
        for band in unshrunk.bands():
            for x, y, pixels in band.pieces:
                whole[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels[..., :3]
        self.empty_pixels = unshrunk.empty_pixels
        reduced = cv2.resize(whole, self.size, interpolation=cv2.INTER_AREA)
        del whole
        rows = max(1, _STRIP_PIXELS // reduced.shape[1])
        for top in range(0, reduced.shape[0], rows):
            part = reduced[top : top + rows]
            yield Band(top, top + part.shape[0], iter([Piece(0, top, part)]))

    def _even_factor(self) -> int | None:
        """`shrink` as an integer if pieces can be reduced one by one, otherwise None."""
        if self.shrink <= 1:
            return 1
        factor = round(self.shrink)
        w, h = self.slide.level_dimensions[self.level]
        even = factor == self.shrink and w % factor == 0 and h % factor == 0
        return factor if even and (self._free_pieces() or CELL % factor == 0) else None

    def _free_pieces(self) -> bool:
        """Whether a region of the level may start at any pixel (see the module docstring)."""
        properties, scale = self.slide.properties, self.slide.scalar_downsamples[self.level]
        return scale == int(scale) and f"openslide.level[{self.level}].tile-width" in properties

    def _piece_size(self, factor: int) -> tuple[int, int]:
        if not self._free_pieces():
            return CELL, CELL
        sides = []
        for side, wanted in (("width", _PIECE_WIDTH), ("height", _PIECE_HEIGHT)):
            tile = int(self.slide.properties[f"openslide.level[{self.level}].tile-{side}"])
            unit = math.lcm(max(1, tile), factor)
            # A grid of huge tiles (or one tile as large as the level) must not lead to huge pieces.
            if unit > 4 * wanted:
                unit = factor
            sides.append(max(1, wanted // unit) * unit)
        return sides[0], sides[1]

    def _location(self, x: int, y: int) -> tuple[int, int]:
        scale = self.slide.scalar_downsamples[self.level]
        return int(x * scale), int(y * scale)
