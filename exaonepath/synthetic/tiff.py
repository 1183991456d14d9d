"""A writer of tiled TIFF files whose tiles are JPEG already: the one layout that the slide maker needs.

tifffile can pass encoded tiles through too, but asks for imagecodecs (26 MB of codecs) before it does, and cannot let
equal tiles share their place in the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

_ASCII, _SHORT, _LONG, _RATIONAL, _LONG8 = 2, 3, 4, 5, 16
_FORMATS = {_ASCII: "u1", _SHORT: "<u2", _LONG: "<u4", _RATIONAL: "<u4", _LONG8: "<u8"}
_JPEG, _YCBCR, _CENTIMETRE = 7, 6, 3


@dataclass(frozen=True)
class Page:
    """What a page of JPEG tiles (YCbCr, chroma halved both ways) says of itself.

    Attributes:
        size: (width, height) in pixels.
        tile: side of a tile in pixels.
        description: ImageDescription; "" for none.
        pixels_per_cm: (x, y) resolution; None for none.
        reduced: whether it is a smaller copy of the first page.
    """

    size: tuple[int, int]
    tile: int
    description: str = ""
    pixels_per_cm: tuple[float, float] | None = None
    reduced: bool = False


class TiffWriter:
    """Appends pages to an empty binary file. `big`: BigTIFF, for files that may pass 4 GiB."""

    def __init__(self, file: BinaryIO, big: bool) -> None:
        self._file, self._big = file, big
        self._pointer = "<Q" if big else "<I"
        file.write(struct.pack("<2sHHH", b"II", 43, 8, 0) if big else struct.pack("<2sH", b"II", 42))
        self._next = file.tell()  # where the place of the next directory is to be noted
        file.write(struct.pack(self._pointer, 0))

    def write(self, page: Page, tiles: Iterable[tuple[object, bytes]]) -> None:
        """Append one page.

        Args:
            page: its tags.
            tiles: (key, JPEG bytes) of each tile, row by row; tiles with one key other than None are stored once.
        """
        places: dict[object, tuple[int, int]] = {}
        offsets, counts = [], []
        for key, data in tiles:
            place = places.get(key) if key is not None else None
            if place is None:
                place = (self._file.tell(), len(data))
                self._file.write(data)
                if key is not None:
                    places[key] = place
            offsets.append(place[0])
            counts.append(place[1])
        self._directory(self._entries(page, offsets, counts))

    def _entries(self, page: Page, offsets: list[int], counts: list[int]) -> list[tuple[int, int, list[int]]]:
        """(tag, type, values), by tag."""
        entries = [
            (254, _LONG, [int(page.reduced)]),
            (256, _LONG, [page.size[0]]),
            (257, _LONG, [page.size[1]]),
            (258, _SHORT, [8, 8, 8]),
            (259, _SHORT, [_JPEG]),
            (262, _SHORT, [_YCBCR]),
            (277, _SHORT, [3]),
            (284, _SHORT, [1]),
            (322, _LONG, [page.tile]),
            (323, _LONG, [page.tile]),
            (324, _LONG8 if self._big else _LONG, offsets),
            (325, _LONG, counts),
            (530, _SHORT, [2, 2]),
        ]
        if page.description:
            entries.append((270, _ASCII, [*page.description.encode("ascii"), 0]))
        if page.pixels_per_cm is not None:
            entries += [(tag, _RATIONAL, _rational(v)) for tag, v in zip((282, 283), page.pixels_per_cm, strict=True)]
            entries.append((296, _SHORT, [_CENTIMETRE]))
        return sorted(entries, key=lambda entry: entry[0])

    def _directory(self, entries: list[tuple[int, int, list[int]]]) -> None:
        file, room = self._file, struct.calcsize(self._pointer)
        fields = []
        for tag, kind, values in entries:
            data = np.array(values, _FORMATS[kind]).tobytes()
            count = len(values) // 2 if kind == _RATIONAL else len(values)
            if len(data) > room:
                self._align()
                data, place = struct.pack(self._pointer, file.tell()), data
                file.write(place)
            fields.append(struct.pack("<HH" + self._pointer[1], tag, kind, count) + data.ljust(room, b"\0"))
        self._align()
        start = file.tell()
        file.write(struct.pack("<Q" if self._big else "<H", len(fields)) + b"".join(fields))
        link = file.tell()
        file.write(struct.pack(self._pointer, 0))
        end = file.tell()
        file.seek(self._next)
        file.write(struct.pack(self._pointer, start))
        file.seek(end)
        self._next = link

    def _align(self) -> None:
        self._file.write(bytes(-self._file.tell() % 8))


def _rational(value: float) -> list[int]:
    denominator = 10_000 if value < 400_000 else 1
    return [round(value * denominator), denominator]
