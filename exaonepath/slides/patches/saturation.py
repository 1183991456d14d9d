"""The image that tissue is found in: the saturation of the pixels with texture around them, streamed in bands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import cv2
import numpy as np

from exaonepath.slides.patches.levels import Band, Piece

WHITE_BAND = 20
_FLAT_LAPLACIAN = 15
_BAND_PIXELS = 1 << 20


class Bands(Protocol):
    """Pixels of a whole level in bands: a `LevelReader` or an `Overview`."""

    @property
    def size(self) -> tuple[int, int]: ...

    def bands(self) -> Iterator[Band]: ...


class Overview:
    """A small copy of a level, built from the pieces that are read of it anyway.

    Its outlines are accurate to one pixel of the copy, which is enough to detect that much tissue was overlooked.

    Args:
        size: (width, height) of the level as it is read.
        shrink: reduction factor, an integer.

    Attributes:
        pixels: uint8 [h, w, 3], RGB; white where nothing was added.
    """

    def __init__(self, size: tuple[int, int], shrink: int) -> None:
        self.size = (size[0] // shrink, size[1] // shrink)
        self.shrink = shrink
        self.pixels = np.full((self.size[1], self.size[0], 3), 255, np.uint8)

    def add(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Add a piece, uint8 [h, w, 3 or 4], whose top left corner is at (x, y) of the level as it is read."""
        h, w = pixels.shape[:2]
        left, top = x // self.shrink, y // self.shrink
        right, bottom = (min(-(-end // self.shrink), full) for end, full in zip((x + w, y + h), self.size, strict=True))
        if right > left and bottom > top:
            small = cv2.resize(pixels, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
            self.pixels[top:bottom, left:right] = small[..., :3]

    def bands(self) -> Iterator[Band]:
        """The whole overview as one band."""
        yield Band(0, self.size[1], iter([Piece(0, 0, self.pixels)]))


def textured_saturation(reader: Bands, overview: Overview | None = None) -> np.ndarray:
    """uint8 [h, w]: HSV saturation of each pixel; 0 where |Laplacian| <= 15.

    The original paints those pixels white, and white has saturation 0. The pixels read are also added to `overview`.
    """
    width, height = reader.size
    saturation = np.empty((height, width), np.uint8)
    grey = np.empty((0, width), np.uint8)  # rows [top - len(carry), bottom): the Laplacian needs one row on each side
    for top, bottom, pieces in reader.bands():
        carried = len(grey)
        grey = np.concatenate([grey, np.empty((bottom - top, width), np.uint8)])
        for x, y, pixels in pieces:
            if overview is not None:
                overview.add(x, y, pixels)
            h, w = pixels.shape[:2]
            row = y - top + carried
            cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY, dst=grey[row : row + h, x : x + w])
            cv2.extractChannel(cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV), 1, dst=saturation[y : y + h, x : x + w])
        first = top - carried
        _erase_flat(saturation, grey, first, top - (carried > 0), bottom if bottom == height else bottom - 1)
        grey = grey[-2:].copy()
    return saturation


def erase_frame(saturation: np.ndarray) -> list[np.ndarray]:
    """Zero the frame of 20-21 pixels, which the original paints white; returns copies of its four sides."""
    height, width = saturation.shape
    # Filled cv2 rectangles include their far corners: 21 rows at the top, 20 at the bottom.
    sides = [
        saturation[: WHITE_BAND + 1],
        saturation[max(0, height - WHITE_BAND) :],
        saturation[:, : WHITE_BAND + 1],
        saturation[:, max(0, width - WHITE_BAND) :],
    ]
    copies = [side.copy() for side in sides]
    for side in sides:
        side[:] = 0
    return copies


def _erase_flat(saturation: np.ndarray, grey: np.ndarray, first: int, start: int, stop: int) -> None:
    """Zero the saturation of rows [start, stop) where the grey image, which starts at row `first`, has no texture."""
    height, width = saturation.shape
    # 128 + Laplacian, saturated to a byte, decides |Laplacian| <= 15 exactly, in an eighth of the memory of float64.
    values = np.arange(256)
    keep = np.where(np.abs(values - 128) <= _FLAT_LAPLACIAN, 0, 255).astype(np.uint8)
    rows = max(1, _BAND_PIXELS // (4 * width))
    for top in range(start, stop, rows):
        bottom = min(top + rows, stop)
        above, below = int(top > 0), int(bottom < height)
        laplacian = cv2.Laplacian(grey[top - above - first : bottom + below - first], cv2.CV_8U, delta=128)
        textured = cv2.LUT(laplacian[above : above + bottom - top], keep)
        cv2.bitwise_and(saturation[top:bottom], textured, dst=saturation[top:bottom])


def median_in_place(image: np.ndarray, side: int) -> None:
    """cv2.medianBlur of a uint8 image [h, w] by an odd `side`, in bands; the image border is replicated, as in cv2."""
    if side == 1:
        return
    height, width = image.shape
    reach = side // 2
    rows, columns = max(4 * side, _BAND_PIXELS // width), 512
    above = np.empty((0, width), np.uint8)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        source = np.concatenate([above, image[top : bottom + reach]])
        offset = len(above)
        above = source[max(0, offset + bottom - top - reach) : offset + bottom - top].copy()
        for x in range(0, width, columns):
            x0, x1 = max(0, x - reach), min(x + columns + reach, width)
            block = source[:, x0:x1]
            # Most of a slide is empty, and the median of zeros is zero: empty blocks are skipped.
            if cv2.countNonZero(block):
                blurred = cv2.medianBlur(block, side)
                image[top:bottom, x : x + columns] = blurred[offset : offset + bottom - top, x - x0 : x - x0 + columns]
