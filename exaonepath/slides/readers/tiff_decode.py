"""Decodes one tile or strip of a TIFF file to 8-bit RGB, with the bytes that OpenSlide gives where both read it.

Every decoder gets the size that the file declares for a tile, and no more memory than that: a tile that decodes to
another size is an error, whatever its own header says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from exaonepath.errors import MissingDependencyError
from exaonepath.slides.readers.jpeg import Colours, JpegError, decode_jpeg
from exaonepath.slides.readers.tiff_image import Codec, Colour, TiffImage


class DecodeError(Exception):
    """A tile cannot be decoded; the text is a phrase that says why."""


def image_codecs() -> ModuleType:
    """The package imagecodecs, which is imported when the first tile is decoded.

    Raises:
        MissingDependencyError: it is not installed, or cannot be loaded.
    """
    try:
        import imagecodecs
    except ImportError as exc:
        raise MissingDependencyError(
            f"tiles cannot be decoded without imagecodecs ({exc}): pip install imagecodecs"
        ) from exc
    return imagecodecs


def decode(stored: Sequence[bytes], image: TiffImage, rows: int, scale: np.ndarray | None = None) -> np.ndarray:
    """The pixels of a tile or strip.

    Args:
        stored, image, rows: see `stored_values`.
        scale: for 16 bits, uint8 [65536]: the 8-bit value of each stored value.

    Returns:
        uint8 [rows, cell_width, image.channels].

    Raises:
        DecodeError: the bytes do not hold such a tile.
    """
    return _to_rgb(stored_values(stored, image, rows), image, scale)


def stored_values(stored: Sequence[bytes], image: TiffImage, rows: int) -> np.ndarray:
    """The unpacked values of a tile or strip.

    Args:
        stored: its bytes, one item for each plane.
        image: how it is stored.
        rows: its number of rows, `image.segment_height` or less for the last strip.

    Returns:
        uint8 or uint16 [rows, cell_width, samples]; JPEG is converted to RGB.

    Raises:
        DecodeError: the bytes do not hold such a tile.
    """
    planes = [_samples(data, image, rows, image.samples // image.planes) for data in stored]
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)


def _samples(data: bytes, image: TiffImage, rows: int, samples: int) -> np.ndarray:
    """Stored values, uint8 or uint16 [rows, cell_width, samples]; of JPEG in colour, RGB."""
    shape = (rows, image.cell_width, samples)
    if image.codec is Codec.JPEG:
        return _jpeg(data, image, shape)
    imagecodecs = image_codecs()
    try:
        if image.codec is Codec.JPEG2000:
            _check_jpeg2000(data, shape)
        if image.codec in (Codec.JPEG2000, Codec.WEBP):
            out = np.empty(shape if samples > 1 else shape[:2], np.uint8 if image.bits == 8 else np.uint16)
            if image.codec is Codec.JPEG2000:
                return imagecodecs.jpeg2k_decode(data, out=out).reshape(shape)
            # Tiles without a transparent pixel are stored without alpha, which is then 255.
            return imagecodecs.webp_decode(data, hasalpha=True if samples == 4 else None, out=out).reshape(shape)
        return _plain(imagecodecs, data, image, shape)
    except ImportError as exc:  # a build of imagecodecs without this one
        raise DecodeError(f"needs a decoder of {image.codec.value} that is not installed ({exc})") from exc
    except (ValueError, RuntimeError, TypeError) as exc:  # imagecodecs' errors are RuntimeErrors
        raise DecodeError(f"cannot be decoded as {image.codec.value}: {exc}") from exc


def _jpeg(data: bytes, image: TiffImage, shape: tuple[int, int, int]) -> np.ndarray:
    # As in OpenSlide, the TIFF tag decides about the colours, not the JPEG stream.
    colours = Colours.YCBCR if image.colour is Colour.YCBCR else Colours.RGB
    try:
        return decode_jpeg(data, shape, tables=image.tables, colours=colours)
    except JpegError as exc:
        raise DecodeError(str(exc)) from exc


def _check_jpeg2000(data: bytes, shape: tuple[int, int, int]) -> None:
    """Compare the size in the stream's header: the decoder allocates that much before it looks at ours."""
    at = data.find(b"\xff\x4f\xff\x51", 0, 1 << 12)  # the marks at the start of a stream, which may be in a file
    if at < 0 or len(data) < at + 42:
        raise DecodeError("is not a JPEG 2000 stream, or is truncated")
    right, bottom, left, top = struct.unpack_from(">4I", data, at + 8)
    (channels,) = struct.unpack_from(">H", data, at + 40)
    found = (bottom - top, right - left, channels)
    if found != shape:
        pixels = " and not ".join(f"{width} x {height} pixels of {n} channels" for height, width, n in (found, shape))
        raise DecodeError(f"holds {pixels}")


def _plain(imagecodecs: Any, data: bytes, image: TiffImage, shape: tuple[int, int, int]) -> np.ndarray:
    """Values that are stored one after the other, once they are unpacked."""
    itemsize = image.bits // 8
    size = shape[0] * shape[1] * shape[2] * itemsize
    decoders: dict[Codec, Callable[..., bytes]] = {
        Codec.LZW: imagecodecs.lzw_decode,
        Codec.DEFLATE: imagecodecs.deflate_decode,
        Codec.PACKBITS: imagecodecs.packbits_decode,
        Codec.ZSTD: imagecodecs.zstd_decode,
    }
    unpacked = data[:size] if image.codec is Codec.NONE else decoders[image.codec](data, out=size)
    if len(unpacked) != size:
        raise DecodeError(f"holds {len(unpacked)} bytes in place of {size}")
    values = np.frombuffer(unpacked, np.dtype(f"{image.order}u{itemsize}")).reshape(shape)
    if itemsize > 1:
        values = values.astype(np.uint16)
    if image.predictor:
        values = imagecodecs.delta_decode(values, axis=1)
    return values


def _to_rgb(values: np.ndarray, image: TiffImage, scale: np.ndarray | None) -> np.ndarray:
    if values.dtype == np.uint16:
        assert scale is not None
        values = scale[values]
    if image.colour is Colour.YCBCR and image.codec is Codec.JPEG2000:
        values = np.concatenate([_ycbcr_to_rgb(values), values[..., 3:]], axis=2)
    plain = image.colours
    if values.shape[2] == image.channels and plain == 3 and not image.alpha:
        return np.ascontiguousarray(values)
    out = np.empty((*values.shape[:2], image.channels), np.uint8)
    if image.palette is not None:
        out[..., :3] = image.palette[values[..., 0]]
    else:
        out[..., :3] = values[..., :plain]
        if image.colour is Colour.GREY_INVERTED:
            np.subtract(255, out[..., :3], out=out[..., :3])
    if image.alpha:
        out[..., 3] = values[..., plain]
        _straighten(out, image.alpha)
    return out


def _straighten(pixels: np.ndarray, alpha: str) -> None:
    """Make pixels without coverage (0, 0, 0, 0), and divide premultiplied colours by alpha."""
    cover = pixels[..., 3]
    if cover.min() == 255:
        return
    pixels[cover == 0] = 0
    if alpha == "premultiplied":
        partly = (cover > 0) & (cover < 255)
        weight = cover[partly].astype(np.uint32)[:, None]
        pixels[partly, :3] = np.minimum(255, (pixels[partly, :3].astype(np.uint32) * 255 + weight // 2) // weight)


def _ycbcr_to_rgb(values: np.ndarray) -> np.ndarray:
    """JFIF's conversion with factors of five digits and the nearest value, exactly as OpenSlide converts."""
    y, cb, cr = (values[..., channel].astype(np.int32) for channel in range(3))
    cb, cr = cb - 128, cr - 128
    unit, half = 100_000, 50_000
    red = y + (140_200 * cr + half) // unit
    green = y + (-34_414 * cb - 71_414 * cr + half) // unit
    blue = y + np.sign(cb) * ((177_200 * np.abs(cb) + half) // unit)  # -221.5 becomes -222
    return np.clip(np.stack([red, green, blue], axis=-1), 0, 255).astype(np.uint8)
