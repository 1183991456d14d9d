"""Reads plain images (PNG, JPEG, BMP) as slides of one level. The whole image is decoded when it is opened.

A plain image states no pixel size that could be trusted. The size is planned from the header before anything is
decoded, so an image that does not fit is refused with the figure.
"""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from exaonepath.errors import MemoryLimitError, SlideOpenError
from exaonepath.memory import available_host_memory
from exaonepath.slides.formats import CONVERT
from exaonepath.slides.readers import depth
from exaonepath.slides.readers.base import SlideReader
from exaonepath.slides.readers.jpeg import JpegError, decode_jpeg
from exaonepath.slides.readers.tiff_decode import image_codecs

logger = logging.getLogger(__name__)

_PNG, _JPEG, _BMP = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM"
_HEADER_BYTES = 1 << 20  # a JPEG may begin with profiles and previews
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # JPEG segments that state the size
_OLD_BMP = 12  # bytes of a header that has sizes of 16 bits
_PIECE = 256
_ORIENTATION = 274  # EXIF


def is_plain_image(path: Path) -> bool:
    """Whether the first bytes of a file are those of an image that `PlainImageReader` reads."""
    return _header(path) is not None


class _Header(NamedTuple):
    kind: str
    width: int
    height: int
    channels: int
    bits: int


class PlainImageReader(SlideReader):
    """A PNG, JPEG or BMP file as a slide of one level.

    Grey and palette images become RGB, 16 bits become 8 as in a TIFF (see `depth`). A rotation that a camera noted
    (EXIF orientation) is not applied: coordinates are those of the stored pixels.

    Args:
        path: the file.

    Raises:
        SlideOpenError: the file is not such an image, or is damaged.
        MemoryLimitError: the image does not fit into the memory.
    """

    name = "image"

    def __init__(self, path: Path) -> None:
        self.path = path
        header = _header(path)
        if header is None:
            raise SlideOpenError(f"{path} is not a PNG, JPEG or BMP image")
        _check_memory(path, header)
        self._pixels: np.ndarray | None = self._decoded(header)
        height, width = self._pixels.shape[:2]
        self.level_dimensions = ((width, height),)
        self.scalar_downsamples = (1.0,)
        level = "openslide.level[0]"
        self.properties = {
            "exaonepath.format": header.kind,
            "openslide.level-count": "1",
            f"{level}.width": str(width),
            f"{level}.height": str(height),
            f"{level}.downsample": "1",
            # The image is in memory: it may be read in pieces of any size.
            f"{level}.tile-width": str(_PIECE),
            f"{level}.tile-height": str(_PIECE),
        }

    def read_image(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """See `SlideReader.read_image`."""
        pixels = self._pixels
        if pixels is None:
            raise self._closed_error()
        (x, y), (width, height) = location, size
        full_height, full_width, channels = pixels.shape
        out = np.zeros((height, width, 4), np.uint8)
        left, top = min(max(0, x), full_width), min(max(0, y), full_height)
        part = pixels[top : max(top, y + height), left : max(left, x + width)]
        target = out[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]] if part.size else out[:0]
        if part.size:
            target[..., :channels] = part
            target[..., channels:] = 255
        return Image.fromarray(out)

    def close(self) -> None:
        """See `SlideReader.close`."""
        self._pixels = None

    def _decoded(self, header: _Header) -> np.ndarray:
        """uint8 [h, w, 3 or 4]."""
        try:
            if header.kind == "JPEG":
                if header.channels == 4:
                    raise SlideOpenError(f"{self.path} is a JPEG in CMYK, which is not read; convert it to RGB")
                self._warn_of_orientation()
                values = decode_jpeg(self.path.read_bytes())
            elif header.kind == "PNG":
                values = image_codecs().png_decode(self.path.read_bytes())
            else:
                with _quiet(), Image.open(self.path) as image:
                    if image.size != (header.width, header.height):
                        raise SlideOpenError(f"{self.path} does not have the size that its header states")
                    values = np.asarray(image.convert("RGB"))
        except Image.DecompressionBombError as exc:
            raise MemoryLimitError(f"{self.path} is larger than what Pillow decodes ({exc}); {CONVERT}") from exc
        except JpegError as exc:
            raise SlideOpenError(f"{self.path} {exc}; copy it again") from exc
        except (ValueError, RuntimeError, OSError, SyntaxError) as exc:
            raise SlideOpenError(f"{self.path} is a {header.kind} image that cannot be decoded: {exc}") from exc
        if values.dtype == np.uint16:
            # Not alpha, which is 65,535 whatever bits the colours use.
            colours = values[..., :-1] if values.ndim == 3 and values.shape[2] in (2, 4) else values
            largest = int(colours.max(initial=0))
            bits = depth.measured_bits(largest)
            logger.warning(
                "%s has 16 bits a channel, read as %d significant bits (its largest value is %d) and scaled to 8",
                self.path, bits, largest,
            )  # fmt: skip
            values = depth.scale_to_8_bits(bits)[values]
        if values.dtype != np.uint8 or values.ndim not in (2, 3):
            raise SlideOpenError(f"{self.path} has pixels of a kind that is not read ({values.dtype})")
        values = values.reshape(*values.shape[:2], -1)
        if values.shape[2] in (1, 2):  # grey, perhaps with alpha
            values = np.concatenate([np.repeat(values[..., :1], 3, axis=2), values[..., 1:]], axis=2)
        if values.shape[2] == 4:
            if values[..., 3].min(initial=255) == 255:
                values = np.ascontiguousarray(values[..., :3])
            else:
                values[values[..., 3] == 0] = 0
        return values

    def _warn_of_orientation(self) -> None:
        with _quiet(), suppress(UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            with Image.open(self.path) as image:
                stated = image.getexif().get(_ORIENTATION, 1)
            if stated != 1:
                logger.warning(
                    "%s states a rotation (EXIF orientation %s), which is not applied: coordinates are those of the "
                    "stored pixels", self.path, stated,
                )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large images; here their size has been compared with the memory that is free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _header(path: Path) -> _Header | None:
    """What the first bytes of a file state; None if it is no such image."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
    except OSError:
        return None
    if head.startswith(_PNG) and len(head) >= 26 and head[12:16] == b"IHDR":
        width, height, bits, colour = struct.unpack_from(">IIBB", head, 16)
        return _Header("PNG", width, height, {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(colour, 4), bits)
    if head.startswith(_JPEG):
        return _jpeg_header(head)
    if head.startswith(_BMP) and len(head) >= 26:
        old = struct.unpack_from("<I", head, 14)[0] == _OLD_BMP
        width, height = struct.unpack_from("<HH" if old else "<ii", head, 18)
        return _Header("BMP", abs(width), abs(height), 3, 8)
    return None


def _jpeg_header(head: bytes) -> _Header | None:
    at = 2
    while at + 9 < len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if marker in _FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", head, at + 4)
            return _Header("JPEG", width, height, channels, bits)
        at += 2 + length if marker != 0xFF else 1
    return None


def _check_memory(path: Path, header: _Header) -> None:
    if min(header.width, header.height) <= 0:
        raise SlideOpenError(f"{path} has no pixels: it states {header.width} x {header.height}")
    # The decoded values, their conversion to RGB, and what a decoder of progressive JPEG keeps.
    per_pixel = header.channels * max(1, header.bits // 8) + 4 + (6 if header.kind == "JPEG" else 0)
    needed, free = header.width * header.height * per_pixel, available_host_memory()
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"{path} is a {header.kind} image of {header.width} x {header.height} pixels, which takes "
            f"{needed / 1e9:.1f} GB to decode, and {free / 1e9:.1f} GB are free; {CONVERT}"
        )
