"""Resizing of 8-bit RGB images, byte for byte as Pillow's bilinear filter does it, in about a quarter of the time.

Pillow computes the weights of each axis in float64, rounds them to whole numbers, and then adds up whole numbers. The
weights are computed here in the same way, and the sums in the extension. For each new geometry, both the weights and
the result for one image of noise are compared with Pillow's: where a version of Pillow computes something else, Pillow
itself is used.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from exaonepath.ops.extension import load_extension

logger = logging.getLogger(__name__)

_GEOMETRIES = 64  # those of a run are few: one for each size of patches


class Axis(NamedTuple):
    """One axis of a resize: `size` pixels become of [start, stop), and of these [first, end) are computed.

    `start` and `stop` may lie between pixels; they are rounded to float32, as by Pillow.
    """

    start: float
    stop: float
    size: int
    first: int
    end: int


class _Weights(NamedTuple):
    """Weights of one axis as the extension takes them: int32 [n] and int32 [n, taps]."""

    first: np.ndarray
    values: np.ndarray

    def pointers(self) -> tuple[int, int, int, int]:
        return self.first.ctypes.data, self.values.ctypes.data, *self.values.shape


def resize_bilinear(image: np.ndarray, rows: Axis, columns: Axis) -> np.ndarray:
    """Resize a part of an image, and compute a part of the result.

    Args:
        image: uint8 [h, w, 3].
        rows, columns: what becomes of the two axes, as by `Image.resize(..., BILINEAR, box=...)`, which is antialiased.

    Returns:
        uint8 [rows.end - rows.first, columns.end - columns.first, 3].
    """
    weights = _weights_if_equal(*image.shape[:2], rows, columns)
    if weights is None:
        return resize_by_pillow(image, rows, columns)
    return _by_extension(image, *weights)


def resize_by_pillow(image: np.ndarray, rows: Axis, columns: Axis) -> np.ndarray:
    """The same as `resize_bilinear`, by Pillow itself."""
    whole = Image.fromarray(np.ascontiguousarray(image))
    box = (columns.start, rows.start, columns.stop, rows.stop)
    resized = np.asarray(whole.resize((columns.size, rows.size), Image.Resampling.BILINEAR, box=box))
    return resized[rows.first : rows.end, columns.first : columns.end]


def _by_extension(image: np.ndarray, rows: _Weights, columns: _Weights, isa: str = "") -> np.ndarray:
    module = load_extension()[0]
    assert module is not None
    if image.strides[1:] != (3, 1):  # rows may lie apart: the image may be a part of another one
        image = np.ascontiguousarray(image)
    height, width = image.shape[:2]
    out = np.empty((len(rows.first), len(columns.first), 3), np.uint8)
    source, stride = image.ctypes.data, image.strides[0]
    module.resize_rgb(source, height, width, stride, rows.pointers(), columns.pointers(), out.ctypes.data, isa)
    return out


@lru_cache(_GEOMETRIES)
def _weights_if_equal(height: int, width: int, rows: Axis, columns: Axis) -> tuple[_Weights, _Weights] | None:
    """The weights of both axes; None if the extension is missing or Pillow computes something else."""
    module, reason = load_extension()
    if module is None:
        logger.info("images are resized by Pillow, which takes longer: %s", reason)
        return None
    bits = module.RESIZE_BITS
    axes = ((height, rows), (width, columns))
    exact = [_exact_weights(length, axis) for length, axis in axes]
    along_y, along_x = (_rounded(*made, length, axis, bits) for made, (length, axis) in zip(exact, axes, strict=True))
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    same = np.array_equal(_by_extension(image, along_y, along_x), resize_by_pillow(image, rows, columns)) and all(
        _pillow_has_these(*weights, *of) for weights, of in zip(exact, axes, strict=True)
    )
    if not same:
        logger.info("images of %d x %d are resized by Pillow, which computes other pixels than expected", width, height)
        return None
    return along_y, along_x


def _exact_weights(length: int, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of each result, int64 [size], and the weights from there on, float64 [size, taps].

    A triangle around the place where a result lies in the source, cut off at the image's border; it is one pixel wide
    to each side, or more if the image is shrunk. The sum over the weights is 1.
    """
    start, stop = np.float32(axis.start), np.float32(axis.stop)
    scale = float(stop - start) / axis.size  # the difference is one of float32
    stretch = max(scale, 1.0)
    taps = 2 * math.ceil(stretch) + 1
    centre = float(start) + (np.arange(axis.size) + 0.5) * scale
    first = np.maximum((centre - stretch + 0.5).astype(np.int64), 0)
    end = np.minimum((centre + stretch + 0.5).astype(np.int64), length)
    place = np.arange(taps)
    distance = ((place + first[:, None]) - centre[:, None] + 0.5) * (1.0 / stretch)
    weights = np.where(place < (end - first)[:, None], np.maximum(1.0 - np.abs(distance), 0.0), 0.0)
    total = np.zeros(axis.size)
    for t in range(taps):  # one after another: the order of a sum decides its last bit
        total = total + weights[:, t]
    return first, weights / np.where(total == 0, 1, total)[:, None]


def _rounded(first: np.ndarray, weights: np.ndarray, length: int, axis: Axis, bits: int) -> _Weights:
    """The weights of the results that are computed, as whole numbers, moved so that no tap lies outside the image."""
    first, weights = first[axis.first : axis.end], weights[axis.first : axis.end]
    whole = (0.5 + weights * (1 << bits)).astype(np.int32)
    used = max(int((whole != 0).cumsum(1).argmax(1).max(initial=0)) + 1, 1)
    taps = min(used, length)
    moved = np.maximum(np.minimum(first, length - taps), 0)
    place = np.arange(taps) + (moved - first)[:, None]
    values = np.where(place >= 0, np.take_along_axis(whole, np.clip(place, 0, whole.shape[1] - 1), 1), 0)
    return _Weights(np.ascontiguousarray(moved, np.int32), np.ascontiguousarray(values, np.int32))


def _pillow_has_these(first: np.ndarray, weights: np.ndarray, length: int, axis: Axis) -> bool:
    """Whether Pillow's weights are these, to the precision of float32: resizing single white pixels shows them."""
    if (axis.start, axis.stop, axis.size) == (0, length, length):
        return True  # Pillow leaves such an axis as it is
    taps = weights.shape[1]
    combs = (np.arange(length) % taps == np.arange(taps)[:, None]).astype(np.float32)
    box = (axis.start, 0, axis.stop, taps)
    seen = np.asarray(Image.fromarray(combs).resize((axis.size, taps), Image.Resampling.BILINEAR, box=box))
    place = (first[:, None] + np.arange(taps)) % taps
    expected = np.zeros(weights.shape, np.float32)
    np.put_along_axis(expected, place, weights.astype(np.float32), 1)
    return np.array_equal(seen.T, expected)
