"""Decodes JPEG streams, and refuses those that are damaged or incomplete.

libjpeg decodes what it can and fills the rest with one colour; that something is wrong it says in a warning, which most
packages ignore. OpenSlide takes these warnings for errors, and so does simplejpeg.
"""

from __future__ import annotations

import struct
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from exaonepath.errors import MissingDependencyError

_START, _START_OF_SCAN, _END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_SCAN, _JFIF, _ADOBE = 0xDA, 0xE0, 0xEE
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # segments that state the size, and how the pixels are coded
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}
_NOTHING = 99  # bits of a coefficient of which no scan was found
_NO_JPEG = "is damaged: its JPEG stream does not begin with a valid header"
_ADOBE_MARK = struct.Struct(">BBH5sHHHB")


class JpegError(ValueError):
    """A stream cannot be decoded; the text is a phrase that says why."""


class Colours(Enum):
    """What the three channels of a stream are. In a TIFF its tags decide that, and not the stream.

    The values are those of Adobe's marker, which libjpeg reads.
    """

    RGB = 0
    YCBCR = 1


class _Header(NamedTuple):
    """What is in front of the first scan.

    Attributes:
        stream: the segments to decode with.
        channels: names of the channels; none if no frame was found.
        progressive: whether each scan makes the pixels more exact.
    """

    stream: bytes
    channels: tuple[int, ...]
    progressive: bool


def decode_jpeg(
    data: bytes, shape: tuple[int, int, int] | None = None, *, tables: bytes = b"", colours: Colours | None = None
) -> np.ndarray:
    """The pixels of a stream; bytes after its end are ignored.

    Args:
        data: the stream.
        shape: (height, width, channels) that it must have; no more memory is allocated than that. None: any.
        tables: a stream with the tables that `data` lacks, as TIFF files store it once for all tiles.
        colours: of three channels; None: what the stream says.

    Returns:
        uint8 [height, width, 1 or 3], grey or RGB.

    Raises:
        JpegError: the stream is damaged or incomplete, or has another shape.
        MissingDependencyError: simplejpeg is not installed.
    """
    try:
        import simplejpeg
    except ImportError as exc:
        raise MissingDependencyError(
            f"JPEG tiles cannot be decoded without simplejpeg ({exc}): pip install simplejpeg"
        ) from exc
    start = _first_scan(data)
    header = _header(data[:start], tables, colours)
    channels = len(header.channels)
    if channels not in (1, 3):
        raise JpegError(f"has {channels} channels in its JPEG stream; 1 and 3 are read" if channels else _NO_JPEG)
    if shape is not None and channels != shape[2]:
        raise JpegError(f"has {channels} channels in its JPEG stream, and {shape[2]} are stated")
    reason = _missing_scans(data, start, header)
    if reason:
        raise JpegError(reason)
    out = None if shape is None else np.empty(shape, np.uint8)
    stream = header.stream + data[start:]
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(stream, "GRAY" if channels == 1 else "RGB", buffer=out)
    except ValueError as exc:
        raise JpegError(f"is damaged or incomplete: {exc}") from exc
    if shape is not None and pixels.shape != shape:
        found, stated = (" x ".join(map(str, size[:2])) for size in (pixels.shape, shape))
        raise JpegError(f"has {found} pixels in its JPEG stream, and {stated} are stated")
    return pixels


def _first_scan(data: bytes) -> int:
    """Place of the first scan; the length of the stream if there is none."""
    start = data.find(_START_OF_SCAN)
    if start >= 0 and _segments(data[:start]) is not None:
        return start
    at = len(_START)  # the mark that was found may be that of a preview in a segment
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != _SCAN:
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big") if data[at + 1] != 0xFF else 1
    return at if data[at : at + 2] == _START_OF_SCAN else len(data)


@lru_cache(maxsize=256)
def _segments(header: bytes) -> tuple[tuple[int, bytes], ...] | None:
    """Kinds and bytes of the segments of a stream up to its first scan; None if they do not fill it."""
    found = []
    at = len(_START)
    while at + 4 <= len(header) and header[at] == 0xFF:
        if header[at + 1] == 0xFF:  # a mark may begin with any number of these
            at += 1
            continue
        end = at + 2 + int.from_bytes(header[at + 2 : at + 4], "big")
        found.append((header[at + 1], header[at:end]))
        at = end
    return tuple(found) if at == len(header) and header.startswith(_START) else None


@lru_cache(maxsize=256)
def _header(header: bytes, tables: bytes, colours: Colours | None) -> _Header:
    """What to decode with in place of the segments before the first scan; tiles of a slide have the same ones."""
    segments = _segments(header)
    if segments is None:
        return _Header(header, (), False)
    frames = [(kind, segment) for kind, segment in segments if kind in _FRAMES and len(segment) >= 10]
    if len(frames) != 1:
        return _Header(header, (), False)
    kind, frame = frames[0]
    channels = tuple(frame[10 : 10 + 3 * frame[9] : 3])
    common = b""
    if tables.startswith(_START):
        common = tables[len(_START) : -len(_END)] if tables.endswith(_END) else tables[len(_START) :]
    if colours is not None and len(channels) == 3:
        # libjpeg believes the mark of JFIF before that of Adobe.
        segments = tuple(one for one in segments if one[0] not in (_JFIF, _ADOBE))
        common = _ADOBE_MARK.pack(0xFF, _ADOBE, 14, b"Adobe", 100, 0, 0, colours.value) + common
    stream = _START + common + b"".join(segment for _, segment in segments)
    return _Header(stream, channels, kind in _PROGRESSIVE)


def _missing_scans(data: bytes, start: int, header: _Header) -> str | None:
    """A phrase if whole scans are missing, which libjpeg does not report: pixels would be coarse, or lack a colour.

    In the pixels' data, a byte 0xFF is never followed by that of a mark, so each scan is found by its mark.
    """
    if not header.progressive and data[start + 4 : start + 5] == bytes([len(header.channels)]):
        return None  # one scan with everything
    # For each channel and each of its 64 coefficients, the number of bits that are still missing.
    left = {channel: [_NOTHING] * 64 for channel in header.channels}
    end = data.find(_END, start)
    while 0 <= start < end - 4:
        names, after = start + 5, start + 5 + 2 * data[start + 4]
        if after + 3 > end:
            break
        first, last, bits = data[after : after + 3]
        for channel in left.keys() & set(data[names:after:2]):
            left[channel][first : last + 1] = [bits & 15] * len(left[channel][first : last + 1])
        start = data.find(_START_OF_SCAN, start + 2)
    missing = sum(bits > 0 for of in left.values() for bits in of)
    return (
        f"is incomplete: {missing} of {64 * len(left)} coefficients of its JPEG stream lack a scan" if missing else None
    )
