"""Whether a JPEG stream is complete. libjpeg fills what is missing with one colour and reports no error.

Decoding a tile twice, the second time with more bytes at its end, shows it: the bytes change nothing if the stream is
complete, and they are used if it is not. This is done only where the last units of the tile, 32 pixels wide, have one
colour, as the filled ones have. (A unit is what is stored together: 8 x 8 pixels, or up to 16 x 16 where colours have a
lower resolution.) Less than these 32 pixels that are missing at the end are not noticed.

This holds for streams of one sequential scan without restart marks. Of others, anything in the middle may be missing
(see `is_simple`); what can be found there is found: the number of restart marks, and the end of the last scan.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

_START_OF_SCAN, _END = b"\xff\xda", b"\xff\xd9"
_RESTART_MARK = re.compile(rb"\xff[\xd0-\xd7]")
_END_SLACK = 256  # bytes that may follow the end mark; some writers pad tiles
_MORE_BYTES = bytes([0x55]) * 64
_WIDTH = 32  # pixels at the end that are looked at, a whole number of units
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # segments that state the size, and how the pixels are coded
_RESTART_INTERVAL, _SCAN = 0xDD, 0xDA


class _Header(NamedTuple):
    """What the segments before the first scan state.

    Attributes:
        known: whether all of them were understood.
        sequential: whether the pixels are coded from top to bottom, and not in several passes.
        width, height: of the image, in pixels.
        unit_height, unit_width: in pixels; 8 x 8, the smallest, if it is not known.
        restart: number of units between two restart marks; 0 without.
    """

    known: bool
    sequential: bool
    width: int
    height: int
    unit_height: int
    unit_width: int
    restart: int

    @property
    def restart_marks(self) -> int:
        """Number of restart marks that a single scan has."""
        units = -(-self.width // self.unit_width) * -(-self.height // self.unit_height)
        return max(0, units - 1) // self.restart if self.restart else 0


def why_truncated(data: bytes, slack: int = _END_SLACK) -> str | None:
    """A phrase for a stream that lacks its end mark or restart marks, or has an end mark in its middle.

    Args:
        data: the stream.
        slack: bytes that may follow it.
    """
    if data.rfind(_END, max(0, len(data) - slack)) < 0:
        return f"is truncated: its JPEG stream of {len(data)} bytes has no end mark"
    start = _scan(data)
    first = data.find(_END, start)
    if first < len(data) - slack:
        return f"is damaged: its JPEG stream of {len(data)} bytes has an end mark at byte {first}"
    header = _header(data[:start])
    if header.restart and header.known and header.sequential and data.find(_START_OF_SCAN, start + 2) < 0:
        found = len(_RESTART_MARK.findall(data, start))
        if found < header.restart_marks:
            return f"is damaged: its JPEG stream has {found} of {header.restart_marks} restart marks"
    return None


def first_image(data: bytes) -> bytes:
    """A stream up to the first end mark after the beginning of its pixels; all of it if there is none."""
    end = data.find(_END, _scan(data))
    return data if end < 0 else data[: end + len(_END)]


def is_simple(data: bytes) -> bool:
    """Whether a stream has one sequential scan without restart marks: `is_complete` then finds what is missing.

    So does every decoder if there is no scan at all.
    """
    start = _scan(data)
    if not start:
        return True
    header = _header(data[:start])
    return header.known and header.sequential and not header.restart and data.find(_START_OF_SCAN, start + 2) < 0


def is_complete(data: bytes, pixels: np.ndarray, decode: Callable[[bytes], np.ndarray]) -> bool:
    """Whether all pixels that were decoded from a stream are stored in it.

    Args:
        data: the stream, with an end mark.
        pixels: uint8 [h, w, channels], the result of `decode(data)`.
        decode: decodes a stream.
    """
    header = _header(data[: _scan(data)])
    height, width = header.unit_height, header.unit_width
    # Without the row and the column whose colour is mixed with that of the units before, where colours are subsampled.
    rows = (pixels.shape[0] - 1) % height + 1 - (height > 8)
    columns = (pixels.shape[1] - 1) % width + 1 - (width > 8) + _WIDTH - width
    last = pixels[pixels.shape[0] - rows :, max(0, pixels.shape[1] - columns) :]
    # A pass that refines the pixels and is cut leaves them as they were.
    if header.sequential and last.size and (last != last[-1, -1]).any():
        return True
    end = data.rfind(_END)
    while data[end - 1] == 0xFF:  # a mark may begin with any number of these
        end -= 1
    return np.array_equal(pixels, decode(data[:end] + _MORE_BYTES + data[end:]))


def _scan(data: bytes) -> int:
    """Place of the first scan; 0 if there is none."""
    start = max(0, data.find(_START_OF_SCAN))
    if _header(data[:start]).known:
        return start
    at = 2  # the mark that was found may be that of a preview in a segment
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big") if data[at + 1] != 0xFF else 1
    return at if data[at : at + 2] == _START_OF_SCAN else start


@lru_cache(maxsize=64)
def _header(header: bytes) -> _Header:
    """The segments of a stream up to its first scan; tiles of a slide have the same ones."""
    found = _Header(False, True, 0, 0, 8, 8, 0)
    at, frames = 2, 0
    while at + 4 <= len(header) and header[at] == 0xFF:
        kind, length = header[at + 1], int.from_bytes(header[at + 2 : at + 4], "big")
        if kind == 0xFF:
            at += 1
            continue
        segment = header[at + 4 : at + 2 + length]
        if kind in _FRAMES and len(segment) >= 6:
            frames += 1
            sampling = segment[7::3]
            unit = (8, 8)  # also for the blocks of a single channel, which are stored one by one
            if len(sampling) > 1 and kind in _SEQUENTIAL:
                unit = 8 * max(1, *(value & 15 for value in sampling)), 8 * max(1, *(value >> 4 for value in sampling))
            height, width = (int.from_bytes(segment[place : place + 2], "big") for place in (1, 3))
            found = _Header(False, kind in _SEQUENTIAL, width, height, *unit, found.restart)
        elif kind == _RESTART_INTERVAL:
            found = found._replace(restart=int.from_bytes(segment[:2], "big"))
        at += 2 + length
    return found._replace(known=at == len(header) and frames == 1 and header[:2] == b"\xff\xd8")
