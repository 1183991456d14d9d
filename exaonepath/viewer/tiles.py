"""Deep Zoom tiles of a slide: which tile shows what, and its pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from exaonepath.slides.image import SlideImage
from exaonepath.viewer.memo import Memo

TILE, OVERLAP = 254, 1
_QUALITY = 85
_MOST_SHRINK = 8  # a tile that would be shrunk more than this from the level it is read from comes from the overview
_GREY = 128


@dataclass(frozen=True)
class Pyramid:
    """The Deep Zoom pyramid of an image: level `top` is the full image, each lower level has half the sides.

    Attributes:
        width, height: of the full image, in pixels.
    """

    width: int
    height: int

    @property
    def top(self) -> int:
        """Number of the highest level."""
        return max(0, math.ceil(math.log2(max(self.width, self.height, 1))))

    def size(self, level: int) -> tuple[int, int]:
        """(width, height) of a level."""
        scale = 1 << (self.top - level)
        return -(-self.width // scale), -(-self.height // scale)

    def box(self, level: int, column: int, row: int) -> tuple[int, int, int, int] | None:
        """(left, top, right, bottom) of a tile with its overlap, in pixels of its level; None if there is no such
        tile."""
        if not 0 <= level <= self.top or column < 0 or row < 0:
            return None
        width, height = self.size(level)
        if column * TILE >= width or row * TILE >= height:
            return None
        left, top = max(0, column * TILE - OVERLAP), max(0, row * TILE - OVERLAP)
        return left, top, min(width, (column + 1) * TILE + OVERLAP), min(height, (row + 1) * TILE + OVERLAP)


class Overviews:
    """Small pictures of whole slides, each made once: the lowest levels are cut from them.

    A slide whose smallest level is large would otherwise be decoded again for every one of these tiles.
    """

    def __init__(self, limit: int = 64) -> None:
        self._made = Memo(limit)

    def get(self, key: str, slide: SlideImage) -> np.ndarray:
        """The slide as RGB uint8 [h, w, 3], shrunk from its smallest level by `_MOST_SHRINK`, at least 512 pixels.

        Raises:
            SlideReadError: the slide cannot be read.
        """
        smallest = max(slide.level_dimensions[-1])
        return self._made.get(key, lambda: slide.thumbnail(max(512, -(-smallest // _MOST_SHRINK))))


def tile_pixels(slide: SlideImage, key: str, overviews: Overviews, level: int, column: int, row: int) -> np.ndarray:
    """One tile as RGB uint8 [h, w, 3]; pixels that the slide does not cover are white.

    Args:
        slide: the open slide.
        key: names its overview.
        overviews: where overviews are kept.
        level, column, row: an existing tile of `Pyramid(*slide.dimensions)`.

    Raises:
        SlideReadError: the slide cannot be read there.
    """
    pyramid = Pyramid(*slide.dimensions)
    box = pyramid.box(level, column, row)
    assert box is not None
    width, height = box[2] - box[0], box[3] - box[1]
    scale = 1 << (pyramid.top - level)
    source = slide.get_best_level_for_downsample(1.01 * scale)
    down = slide.level_downsamples[source]
    if scale / min(down) > _MOST_SHRINK:
        picture = overviews.get(key, slide)
        factor = picture.shape[1] / slide.dimensions[0], picture.shape[0] / slide.dimensions[1]
        left, top, right, bottom = _source_box(box, (scale * factor[0], scale * factor[1]), picture.shape[1::-1])
        pixels = picture[top:bottom, left:right]
    else:
        left, top, right, bottom = _source_box(box, (scale / down[0], scale / down[1]), slide.level_dimensions[source])
        corner = slide.scalar_downsamples[source]
        pixels = read_on_white(slide, (int(left * corner), int(top * corner)), source, (right - left, bottom - top))
    if pixels.shape[:2] != (height, width):
        shrinks = pixels.shape[0] >= height and pixels.shape[1] >= width
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return pixels


def read_on_white(slide: SlideImage, location: tuple[int, int], level: int, size: tuple[int, int]) -> np.ndarray:
    """A region as RGB uint8 [h, w, 3], white where the slide has no pixels.

    Raises:
        SlideReadError: the region cannot be read.
    """
    pixels, missing = slide.read_rgb(location, level, size)
    (x, y), (w, h) = location, slide.dimensions
    scale = slide.scalar_downsamples[level]
    inside = x >= 0 and y >= 0 and x + size[0] * scale <= w + scale and y + size[1] * scale <= h + scale
    if not missing and inside:
        return pixels
    rgba = slide.read_region(location, level, size)
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def grey_tile(box: tuple[int, int, int, int]) -> np.ndarray:
    """What is shown in place of a tile that cannot be read: grey with a diagonal pattern, RGB uint8 [h, w, 3]."""
    height, width = box[3] - box[1], box[2] - box[0]
    stripes = (np.add.outer(np.arange(height), np.arange(width)) // 12) % 2
    return np.repeat((_GREY + 16 * stripes).astype(np.uint8)[..., None], 3, axis=2)


def encode_jpeg(pixels: np.ndarray, quality: int = _QUALITY) -> bytes:
    """JPEG of RGB uint8 [h, w, 3]."""
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420"))


def _source_box(
    box: tuple[int, int, int, int], scale: tuple[float, float], limit: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The pixels of a picture that a tile is made from: whole ones, at least one, inside (width, height) `limit`."""
    left, top = (min(int(box[at] * scale[at]), limit[at] - 1) for at in (0, 1))
    right = min(limit[0], max(left + 1, math.ceil(box[2] * scale[0] - 1e-6)))
    bottom = min(limit[1], max(top + 1, math.ceil(box[3] * scale[1] - 1e-6)))
    return left, top, right, bottom
