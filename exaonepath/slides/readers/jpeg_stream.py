"""Whether a JPEG stream is complete. libjpeg fills what is missing with one colour and reports no error.

Decoding a tile twice, the second time with more bytes at its end, shows it: the bytes change nothing if the stream is
complete, and they are used if it is not. This is done only where the last units of the tile, 32 pixels wide, have one
colour, as the filled ones have. (A unit is what is stored together: 8 x 8 pixels, or up to 16 x 16 where colours have a
lower resolution.) Less than these 32 pixels that are missing at the end are not noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

_START_OF_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_END_SLACK = 256  # bytes that may follow the end mark; some writers pad tiles
_MORE_BYTES = bytes([0x55]) * 64
_WIDTH = 32  # pixels at the end that are looked at, a whole number of units
_SEQUENTIAL = (0xC0, 0xC1)  # segments that state the size of a unit


def why_truncated(data: bytes) -> str | None:
    """A phrase for a stream that lacks its end mark, or has one in its middle."""
    if data.rfind(_END, max(0, len(data) - _END_SLACK)) < 0:
        return f"is truncated: its JPEG stream of {len(data)} bytes has no end mark"
    first = data.find(_END, max(0, data.find(_START_OF_SCAN)))
    if first < len(data) - _END_SLACK:
        return f"is damaged: its JPEG stream of {len(data)} bytes has an end mark at byte {first}"
    return None


def is_complete(data: bytes, pixels: np.ndarray, decode: Callable[[bytes], np.ndarray]) -> bool:
    """Whether all pixels that were decoded from a stream are stored in it.

    Args:
        data: the stream, with an end mark.
        pixels: uint8 [h, w, channels], the result of `decode(data)`.
        decode: decodes a stream.
    """
    height, width = _unit(data[: max(0, data.find(_START_OF_SCAN))])
    # Without the row and the column whose colour is mixed with that of the units before, where colours are subsampled.
    rows = (pixels.shape[0] - 1) % height + 1 - (height > 8)
    columns = (pixels.shape[1] - 1) % width + 1 - (width > 8) + _WIDTH - width
    last = pixels[pixels.shape[0] - rows :, max(0, pixels.shape[1] - columns) :]
    if last.size and (last != last[-1, -1]).any():
        return True
    end = data.rfind(_END)
    while data[end - 1] == 0xFF:  # a mark may begin with any number of these
        end -= 1
    return np.array_equal(pixels, decode(data[:end] + _MORE_BYTES + data[end:]))


@lru_cache(maxsize=64)
def _unit(header: bytes) -> tuple[int, int]:
    """(height, width) of a unit in pixels; 8 x 8, the smallest, for a stream whose segments are not understood.

    Args:
        header: a stream up to its first scan; tiles of a slide have the same one.
    """
    at = 2
    while at + 10 < len(header) and header[at] == 0xFF:
        length = int.from_bytes(header[at + 2 : at + 4], "big")
        if header[at + 1] in _SEQUENTIAL:
            segment = header[at + 4 : at + 2 + length]
            sampling = segment[7::3]
            if len(sampling) < 2:  # the blocks of a single channel are stored one by one
                return 8, 8
            return 8 * max(1, *(value & 15 for value in sampling)), 8 * max(1, *(value >> 4 for value in sampling))
        at += 2 + length
    return 8, 8
