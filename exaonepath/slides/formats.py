"""Explains why a file is not a slide, or cannot be read correctly, and what the user can do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from exaonepath.slides.tiff import (
    BITS,
    COMPRESSION,
    LENGTH,
    ORIENTATION,
    PHOTOMETRIC,
    SAMPLE_FORMAT,
    SAMPLES,
    SUBFILE_TYPE,
    TILE_LENGTH,
    TILE_WIDTH,
    WIDTH,
    Directory,
    read_tiff,
)

CONVERT = "convert it, for example: vips tiffsave INPUT OUTPUT.tif --tile --pyramid --compression jpeg"
_COMPRESSIONS = {34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 50001: "WebP", 50000: "Zstandard"}
_FLOATING, _SIGNED = {3, 6}, {2, 5}  # kinds of values (SampleFormat)
_GREY = (0, 1)  # TIFF photometric interpretations
_OWN_DECODER = (7, 33003, 33005)  # JPEG, JPEG 2000 of Aperio: OpenSlide leaves all others to libtiff

_OWN_LIBRARY = {
    ".czi": "a Zeiss CZI file",
    ".isyntax": "a Philips iSyntax file",
    ".lif": "a Leica LIF file",
    ".nd2": "a Nikon ND2 file",
    ".oib": "an Olympus OIB file",
    ".oir": "an Olympus OIR file",
    ".vsi": "an Olympus VSI file",
    ".ets": "an Olympus ETS file",
    ".zvi": "a Zeiss ZVI file",
    ".jp2": "a JPEG 2000 file",
}


def why_not_a_slide(path: Path) -> str:
    """A phrase for a file that OpenSlide rejects, and that no other reader was found for."""
    tiff = read_tiff(path, check_data=True)
    if tiff is not None:
        if not tiff.images and tiff.truncated:
            return f"is truncated: {tiff.truncated}; copy it again"
        first = tiff.images[0] if tiff.images else Directory({})
        compression = _COMPRESSIONS.get(first.number(COMPRESSION, 0))
        if compression is not None:
            return f"is a TIFF whose pixels are compressed as {compression}, which OpenSlide does not read; {CONVERT}"
        if WIDTH in first and TILE_WIDTH not in first:
            return f"is a TIFF in strips, not in tiles, which OpenSlide does not read; {CONVERT}"
        if tiff.truncated:
            return f"is truncated: {tiff.truncated}; copy it again"
        if tiff.order == ">" and not tiff.big:
            return f"is a TIFF in big-endian byte order, which OpenSlide reads as BigTIFF only; {CONVERT}"
        return f"is a TIFF of a kind that OpenSlide does not read; {CONVERT}"
    kind = _plain_image(path)
    if kind is not None:
        return f"is a plain {kind} image, which is not read; {CONVERT}"
    with suppress(OSError):
        if path.is_file() and path.stat().st_size == 0:
            return "is empty; copy it again"
    return "is not a slide in a format that OpenSlide reads"


def why_rejected(path: Path) -> str:
    """A phrase for a TIFF whose tags cannot be right, or are of a kind that OpenSlide rejects; empty for any other."""
    tiff = read_tiff(path, tags={BITS, LENGTH, TILE_LENGTH, TILE_WIDTH, WIDTH})
    if tiff is None or not tiff.images or tiff.truncated:
        return ""
    first = tiff.images[0]
    width, height, bits = first.number(WIDTH, 0), first.number(LENGTH, 0), first.number(BITS, 1)
    tile_width, tile_height = first.number(TILE_WIDTH, 0), first.number(TILE_LENGTH, 0)
    if not (width and height):
        return f"states a size of {width} x {height} pixels"
    if TILE_WIDTH in first and not (tile_width and tile_height):
        return f"states tiles of {tile_width} x {tile_height} pixels"
    if bits < 8:
        return f"has {bits} bit{'s' if bits > 1 else ''} a channel, which is not read; convert it to 8"
    return ""


def needs_a_library(path: Path) -> str | None:
    """A phrase for a file of a known format (by its name) that only a library of its own reads; None for others."""
    kind = _OWN_LIBRARY.get(path.suffix.lower())
    return None if kind is None else f"seems to be {kind}, which needs a reader of its own"


def why_not_readable(path: Path) -> str | None:
    """A phrase for a path whose file cannot be opened at all; None if it can, and for a folder.

    OpenSlide reports any such file as one of an unknown format.
    """
    try:
        if path.is_file():
            with path.open("rb") as file:
                file.read(1)
    except PermissionError:
        return "may not be read (permission denied)"
    except OSError as exc:
        return f"cannot be read: {exc.strerror or exc}"
    return None


def wrong_pixels(path: Path, properties: Mapping[str, str]) -> str | None:
    """A phrase for a file that OpenSlide opens but whose pixels it returns incorrectly; None for any other file."""
    # NDPI files have an offset format of their own, and hold only JPEG of 8 bits.
    if properties.get("openslide.vendor") == "hamamatsu":
        return None
    wanted = {BITS, COMPRESSION, ORIENTATION, PHOTOMETRIC, SAMPLE_FORMAT, SAMPLES, SUBFILE_TYPE, TILE_WIDTH}
    tiff = read_tiff(path, tags=wanted)
    # Levels are tiled. Labels and overviews are not read here, and most of them are not tiled.
    levels = [image for image in (tiff.images if tiff else []) if TILE_WIDTH in image]
    if tiff and properties.get("openslide.vendor") == "generic-tiff":
        # As OpenSlide does: the first image, and what is marked as a smaller version of it.
        levels = [image for image in levels if image is tiff.images[0] or image.number(SUBFILE_TYPE, 0) & 1]
    kinds = {kind for image in levels for kind in image.numbers(SAMPLE_FORMAT)}
    if kinds & _FLOATING:
        return "has floating-point values, which are not read; convert them to 8 bits a channel"
    if kinds & _SIGNED:
        return "has signed values, which OpenSlide takes for unsigned ones; convert them to 8 bits a channel"
    several = [image.number(SAMPLES, 1) for image in levels if image.number(PHOTOMETRIC, 1) in _GREY]
    if max(several, default=1) > 2:
        return f"has {max(several)} channels that are no colours, of which OpenSlide reads the first"
    if any(image.number(SAMPLES, 1) == 2 for image in levels):
        return "has tiles of grey and alpha, which OpenSlide shifts at the right border"
    turned = [image for image in levels if image.number(ORIENTATION, 1) not in (0, 1)]
    if any(image.number(COMPRESSION, 1) not in _OWN_DECODER for image in turned):
        return "states a rotation (TIFF orientation), by which OpenSlide turns each tile by itself"
    bits = [max(image.numbers(BITS) or (8,)) for image in levels]
    if bits and (min(bits) < 8 or max(bits) > 16):
        wrong = min(bits) if min(bits) < 8 else max(bits)
        return f"has {wrong} bit{'s' if wrong > 1 else ''} a channel, which is not read; convert it to 8"
    if bits and max(bits) > 8:
        return (
            f"has {max(bits)} bits a channel, of which often only 10 or 12 are used: read as 8 bits it would be dark; "
            "scale it to 8 bits a channel first"
        )
    return None


def _plain_image(path: Path) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.format
    except Image.DecompressionBombError:
        return "very large"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return None
