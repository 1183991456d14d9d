"""What a file is that is no slide, or none that can be read rightly: the reason, and what to do about it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

_CONVERT = "convert it, for example: vips tiffsave INPUT OUTPUT.tif --tile --pyramid --compression jpeg"
_COMPRESSIONS = {34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 50001: "WebP", 50000: "Zstandard"}
_WIDTH, _BITS, _COMPRESSION, _TILE_WIDTH = 256, 258, 259, 322


def why_not_a_slide(path: Path) -> str:
    """A phrase for a file that OpenSlide refuses."""
    tags = first_tiff_tags(path)
    if tags is not None:
        compression = _COMPRESSIONS.get(tags.get(_COMPRESSION, 0))
        if compression is not None:
            return f"is a TIFF whose pixels are compressed as {compression}, which OpenSlide does not read; {_CONVERT}"
        if _WIDTH in tags and _TILE_WIDTH not in tags:
            return f"is a TIFF in strips, not in tiles, which OpenSlide does not read; {_CONVERT}"
        return f"is a TIFF of a kind that OpenSlide does not read; {_CONVERT}"
    kind = _plain_image(path)
    if kind is not None:
        return f"is a plain {kind} image, without tiles or a pixel size; {_CONVERT}"
    return "is not a slide in a format that OpenSlide reads"


def wrong_pixels(path: Path, properties: dict[str, str]) -> str | None:
    """A phrase where OpenSlide opens a file whose pixels it does not give as they are meant; None where it does."""
    if properties.get("openslide.vendor") != "generic-tiff":
        return None
    tags = first_tiff_tags(path) or {}
    bits = tags.get(_BITS, (8,))
    bits = bits if isinstance(bits, tuple) else (bits,)
    if any(bit > 8 for bit in bits):
        return (
            f"has {max(bits)} bits a channel, of which often only 10 or 12 are used: read as 8 bits it would be dark; "
            "scale it to 8 bits a channel first"
        )
    return None


def first_tiff_tags(path: Path) -> dict[int, Any] | None:
    """Tags of the first image of a TIFF or BigTIFF; None for any other file."""
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tags that nobody asks for
            head = file.read(8)
            if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return None
            if head[2:4] in (b"+\0", b"\0+"):
                head += file.read(8)
            directory = ImageFileDirectory_v2(head)
            file.seek(directory.next)
            directory.load(file)
            wanted = (_WIDTH, _BITS, _COMPRESSION, _TILE_WIDTH)
            return {tag: directory[tag] for tag in wanted if tag in directory}
    # What Pillow raises for a damaged directory is not documented.
    except (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError):
        return {}


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
