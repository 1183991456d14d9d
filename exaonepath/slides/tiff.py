"""The directories of a TIFF file, classic or BigTIFF, in either byte order: the few tags that describe its content.

The input can be any file; most are files that OpenSlide rejects. No exception is raised for any content, and the number
of bytes read is bounded.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

WIDTH, BITS, COMPRESSION, TILE_WIDTH = 256, 258, 259, 322
_DATA = ((273, 279), (324, 325))  # tags of the offsets and the lengths of strips and of tiles
_SHORT_TAGS = {WIDTH, BITS, COMPRESSION, TILE_WIDTH}
_TYPES = {3: "u2", 4: "u4", 16: "u8"}
_MAX_DIRECTORIES, _MAX_ENTRIES, _MAX_VALUES = 256, 4096, 1 << 22


@dataclass(frozen=True)
class Tiff:
    """The directories of a TIFF file.

    Attributes:
        directories: for each image, in file order, those of the four tags above that it has.
        truncated: the reason why the file must be incomplete; None if no reason was found.
        order: byte order, "<" or ">".
        big: whether the file is a BigTIFF.
    """

    directories: list[dict[int, tuple[int, ...]]]
    truncated: str | None
    order: str
    big: bool


def read_tiff(path: Path, *, check_data: bool = False) -> Tiff | None:
    """The tags of a TIFF or BigTIFF; None for any other file, or for one that cannot be read.

    Args:
        path: any file.
        check_data: also read the location of the pixels, to find out whether the file is truncated.
    """
    try:
        with path.open("rb") as file:
            return _parse(file, os.fstat(file.fileno()).st_size, check_data)
    except OSError:
        return None


def _parse(file: BinaryIO, size: int, check_data: bool) -> Tiff | None:
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 4:
        return None
    version = struct.unpack(f"{order}H", head[2:4])[0]
    if version not in (42, 43):
        return None
    big = version == 43
    # Formats and sizes: offset of the header, number of entries, count of an entry, an offset.
    count_format, n_bytes, entry_bytes = ("Q", 8, 20) if big else ("H", 2, 12)
    offset_format, offset_bytes, at = ("Q", 8, 8) if big else ("I", 4, 4)
    if len(head) < at + offset_bytes:
        return Tiff([], f"it ends after {len(head)} bytes, inside its header", order, big)
    offset = struct.unpack_from(order + offset_format, head, at)[0]
    found: list[dict[int, tuple[int, ...]]] = []
    seen: set[int] = set()
    end = 0
    while offset and offset not in seen and len(found) < _MAX_DIRECTORIES:
        seen.add(offset)
        file.seek(min(offset, size))
        raw = file.read(n_bytes)
        entries = struct.unpack(order + count_format, raw)[0] if len(raw) == n_bytes else 0
        if entries > _MAX_ENTRIES:  # not a directory but other bytes
            break
        table = file.read(entries * entry_bytes + offset_bytes)
        if len(raw) < n_bytes or len(table) < entries * entry_bytes + offset_bytes:
            return Tiff(
                found, f"its directory {len(found)} lies at byte {offset}, and the file ends at byte {size}", order, big
            )
        tags: dict[int, tuple[int, ...]] = {}
        data: dict[int, np.ndarray] = {}
        for index in range(entries):
            entry = table[index * entry_bytes : (index + 1) * entry_bytes]
            tag, kind, count = struct.unpack_from(order + "HH" + offset_format, entry)
            wanted = tag in _SHORT_TAGS or (check_data and any(tag in pair for pair in _DATA))
            if not wanted or kind not in _TYPES or not 0 < count <= (_MAX_VALUES if tag not in _SHORT_TAGS else 64):
                continue
            dtype = np.dtype(order + _TYPES[kind])
            values = entry[-offset_bytes:]
            if count * dtype.itemsize > offset_bytes:
                place = struct.unpack(order + offset_format, values)[0]
                file.seek(min(place, size))
                values = file.read(count * dtype.itemsize)
                if len(values) < count * dtype.itemsize:
                    end = max(end, place + count * dtype.itemsize)
                    continue
            numbers = np.frombuffer(values, dtype, count)
            if tag in _SHORT_TAGS:
                tags[tag] = tuple(numbers.tolist())
            else:
                data[tag] = numbers.astype(np.uint64)
        for offsets, lengths in _DATA:
            if offsets in data and lengths in data and len(data[offsets]) == len(data[lengths]):
                end = max(end, int((data[offsets] + data[lengths]).max()))
        found.append(tags)
        offset = struct.unpack(order + offset_format, table[-offset_bytes:])[0]
    reach = f"its pixels reach to byte {end}, and the file ends at byte {size}" if end > size else None
    return Tiff(found, reach, order, big)
