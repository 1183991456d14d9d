"""The directories of a TIFF file, classic or BigTIFF, in either byte order: the tags that describe its images.

The input can be any file. No exception is raised for any content, and the number of bytes read is bounded.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

SUBFILE_TYPE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
FILL_ORDER, DESCRIPTION, ORIENTATION, SAMPLES, ROWS_PER_STRIP = 266, 270, 274, 277, 278
STRIP_OFFSETS, STRIP_LENGTHS, MIN_SAMPLE, MAX_SAMPLE, X_RESOLUTION, Y_RESOLUTION = 273, 279, 280, 281, 282, 283
PLANAR, RESOLUTION_UNIT, PREDICTOR, COLOR_MAP, TILE_WIDTH, TILE_LENGTH = 284, 296, 317, 320, 322, 323
TILE_OFFSETS, TILE_LENGTHS, SUB_DIRECTORIES, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES = 324, 325, 330, 338, 339, 347

_DATA = ((STRIP_OFFSETS, STRIP_LENGTHS), (TILE_OFFSETS, TILE_LENGTHS))
_LONG_TAGS = {tag for pair in _DATA for tag in pair}
_SUMMARY = frozenset({WIDTH, BITS, COMPRESSION, TILE_WIDTH})
ALL_TAGS = frozenset(
    {
        SUBFILE_TYPE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, DESCRIPTION, ORIENTATION, SAMPLES,
        ROWS_PER_STRIP, MIN_SAMPLE, MAX_SAMPLE, X_RESOLUTION, Y_RESOLUTION, PLANAR, RESOLUTION_UNIT, PREDICTOR,
        COLOR_MAP, TILE_WIDTH, TILE_LENGTH, SUB_DIRECTORIES, EXTRA_SAMPLES, SAMPLE_FORMAT, JPEG_TABLES, *_LONG_TAGS,
    }
)  # fmt: skip
# Kinds of values. Bytes and texts stay bytes; a rational is two numbers.
_NUMBERS = {
    1: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 8: "i2", 9: "i4", 11: "f4", 12: "f8", 13: "u4", 16: "u8", 17: "i8",
    18: "u8",
}  # fmt: skip
_BYTES, _RATIONAL = {2, 7}, 5
_MAX_DIRECTORIES, _MAX_ENTRIES = 256, 4096
_MAX_TILES, _MAX_NUMBERS, _MAX_TEXT = 1 << 22, 1 << 10, 1 << 24
_MAX_BYTES = 1 << 28  # of all values of a file: a file can refer to the same bytes any number of times


@dataclass(frozen=True)
class Directory:
    """One image of a TIFF file.

    Attributes:
        tags: numbers (as an array) or bytes by tag; of a tag that occurs twice, the last value.
        unclear: the tags that another program may read otherwise: they occur twice, or have more values than are read.
    """

    tags: Mapping[int, np.ndarray | bytes]
    unclear: frozenset[int] = frozenset()

    def __contains__(self, tag: int) -> bool:
        return tag in self.tags

    def numbers(self, tag: int) -> tuple[int, ...]:
        """The values of a tag as integers, none negative; empty if it is missing or holds something else."""
        value = self.tags.get(tag)
        # libtiff reads signed integers too where unsigned ones are meant.
        if isinstance(value, np.ndarray) and (
            value.dtype.kind == "u" or (value.dtype.kind == "i" and value.min() >= 0)
        ):
            return tuple(value.tolist())
        return tuple(value) if isinstance(value, bytes) and tag not in (DESCRIPTION, JPEG_TABLES) else ()

    def number(self, tag: int, default: int) -> int:
        """The first value of a tag; `default` if it is missing."""
        return next(iter(self.numbers(tag)), default)

    def array(self, tag: int) -> np.ndarray:
        """The values of a tag as int64, which may be a long list."""
        value = self.tags.get(tag)
        if isinstance(value, np.ndarray) and value.dtype.kind in "ui":
            return value.astype(np.int64)
        return np.empty(0, np.int64)

    def ratio(self, tag: int) -> float | None:
        """The value of a tag with a fraction; None if it is missing or not positive."""
        pair = self.numbers(tag)
        return pair[0] / pair[1] if len(pair) == 2 and min(pair) > 0 else None

    def bytes(self, tag: int) -> bytes:
        """The bytes of a tag; empty if it is missing."""
        value = self.tags.get(tag)
        if isinstance(value, np.ndarray):
            return value.tobytes() if value.dtype == np.uint8 else b""
        return value or b""

    def text(self, tag: int) -> str:
        """The text of a tag, without what follows a NUL."""
        return self.bytes(tag).partition(b"\0")[0].decode("utf-8", "replace")


@dataclass(frozen=True)
class Tiff:
    """The directories of a TIFF file.

    Attributes:
        images: in file order.
        truncated: the reason why the file must be incomplete; None if no reason was found.
        order: byte order, "<" or ">".
        big: whether the file is a BigTIFF.
        children: for each image, the images in its sub-directories.
        complete: whether all directories were read; False if there are more than the limit.
    """

    images: list[Directory]
    truncated: str | None
    order: str
    big: bool
    children: list[list[Directory]] = field(default_factory=list)
    complete: bool = True


def read_tiff(
    path: Path, *, check_data: bool = False, tags: Collection[int] = _SUMMARY, limit: int = _MAX_DIRECTORIES
) -> Tiff | None:
    """The tags of a TIFF or BigTIFF; None for any other file, or for one that cannot be read.

    Args:
        path: any file.
        check_data: also read the location of the pixels, to find out whether the file is truncated.
        tags: the tags to read; with `SUB_DIRECTORIES`, those directories are read too.
        limit: number of directories that are read.
    """
    wanted = frozenset(tags) | (_LONG_TAGS if check_data else set())
    try:
        with path.open("rb") as file:
            return _parse(file, os.fstat(file.fileno()).st_size, wanted, limit)
    except OSError:
        return None


class _Layout:
    """Sizes and formats that depend on the kind of TIFF."""

    def __init__(self, order: str, big: bool) -> None:
        self.order, self.big, self.bytes_left = order, big, _MAX_BYTES
        self.count, self.count_bytes, self.entry_bytes = ("Q", 8, 20) if big else ("H", 2, 12)
        self.offset, self.offset_bytes, self.start = ("Q", 8, 8) if big else ("I", 4, 4)

    def unpack(self, kind: str, data: bytes) -> int:
        return int(struct.unpack(self.order + kind, data)[0])


def _parse(file: BinaryIO, size: int, wanted: frozenset[int], limit: int) -> Tiff | None:
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 4:
        return None
    version = struct.unpack(f"{order}H", head[2:4])[0]
    if version not in (42, 43):
        return None
    layout = _Layout(order, version == 43)
    if len(head) < layout.start + layout.offset_bytes:
        return Tiff([], f"it ends after {len(head)} bytes, inside its header", order, layout.big)
    offset = layout.unpack(layout.offset, head[layout.start : layout.start + layout.offset_bytes])
    images: list[Directory] = []
    children: list[list[Directory]] = []
    seen: set[int] = set()
    end = 0
    while offset and offset not in seen and len(seen) < limit:
        seen.add(offset)
        found = _directory(file, size, layout, offset, wanted)
        if found is None:
            reason = f"its directory {len(images)} lies at byte {offset}, and the file ends at byte {size}"
            return Tiff(images, reason, order, layout.big, children)
        image, offset, reach = found
        if image is None:  # not a directory but other bytes
            break
        end = max(end, reach)
        below = []
        for child in image.numbers(SUB_DIRECTORIES):
            if child in seen or len(seen) >= limit:
                continue
            seen.add(child)
            inner = _directory(file, size, layout, child, wanted)
            if inner is not None and inner[0] is not None:
                below.append(inner[0])
                end = max(end, inner[2])
        images.append(image)
        children.append(below)
    reach_text = f"its pixels reach to byte {end}, and the file ends at byte {size}" if end > size else None
    return Tiff(images, reach_text, order, layout.big, children, complete=len(seen) < limit or not offset)


def _directory(
    file: BinaryIO, size: int, layout: _Layout, offset: int, wanted: frozenset[int]
) -> tuple[Directory | None, int, int] | None:
    """(directory, offset of the next one, end of its data); no directory for other bytes; None beyond the end."""
    file.seek(min(offset, size))
    raw = file.read(layout.count_bytes)
    entries = layout.unpack(layout.count, raw) if len(raw) == layout.count_bytes else 0
    if entries > _MAX_ENTRIES:
        return None, 0, 0
    table = file.read(entries * layout.entry_bytes + layout.offset_bytes)
    if len(raw) < layout.count_bytes or len(table) < entries * layout.entry_bytes + layout.offset_bytes:
        return None
    tags: dict[int, np.ndarray | bytes] = {}
    unclear: set[int] = set()
    end = 0
    for index in range(entries):
        entry = table[index * layout.entry_bytes : (index + 1) * layout.entry_bytes]
        tag, kind, count = struct.unpack_from(layout.order + "HH" + layout.offset, entry)
        value, reach = _value(file, size, layout, entry, tag, kind, count) if tag in wanted else (None, 0)
        end = max(end, reach)
        if tag in tags or (tag in wanted and value is None and count > 1 and not reach):
            unclear.add(tag)
        if value is not None:
            tags[tag] = value
    directory = Directory(tags, frozenset(unclear))
    for pair in _DATA:
        offsets, lengths = (directory.array(tag).astype(np.uint64) for tag in pair)
        if len(offsets) == len(lengths):
            end = max(end, int((offsets + lengths).max(initial=0)))
    return directory, layout.unpack(layout.offset, table[-layout.offset_bytes :]), end


def _value(
    file: BinaryIO, size: int, layout: _Layout, entry: bytes, tag: int, kind: int, count: int
) -> tuple[np.ndarray | bytes | None, int]:
    """(value of an entry, end of its bytes if they lie beyond the end of the file)."""
    limit = _MAX_TILES if tag in _LONG_TAGS else _MAX_TEXT if kind in _BYTES or kind == 1 else _MAX_NUMBERS
    if (kind not in _NUMBERS and kind not in _BYTES) or not 0 < count <= limit:
        return None, 0
    dtype = np.dtype(layout.order + _NUMBERS[kind]) if kind in _NUMBERS else np.dtype("u1")
    numbers = count * (2 if kind == _RATIONAL else 1)
    values = entry[-layout.offset_bytes :]
    if numbers * dtype.itemsize > layout.offset_bytes:
        layout.bytes_left -= numbers * dtype.itemsize
        if layout.bytes_left < 0:
            return None, 0
        place = layout.unpack(layout.offset, values)
        file.seek(min(place, size))
        values = file.read(numbers * dtype.itemsize)
        if len(values) < numbers * dtype.itemsize:
            return None, place + numbers * dtype.itemsize
    found = np.frombuffer(values, dtype, numbers)
    return (found.tobytes() if kind in _BYTES else found.astype(dtype.newbyteorder("="))), 0
