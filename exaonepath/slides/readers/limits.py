"""What OpenSlide must not be asked to read: where it cannot get the memory for a tile, it ends the whole process.

The size of a tile is what the file states, so a damaged byte is enough. It is therefore checked before OpenSlide sees
the file.
"""

from __future__ import annotations

from pathlib import Path

from exaonepath.memory import available_host_memory
from exaonepath.slides import tiff

_MOST = 512 << 20  # bytes of a tile, decoded or stored; the largest known in practice have 64 MB
_RGBA = 4
_MAX_DIRECTORIES = 1 << 16  # more than libtiff reads by itself
_NDPI = 65420  # the tag that makes OpenSlide read a file as Hamamatsu NDPI, which has no tiles
_SIZES = frozenset({tiff.TILE_WIDTH, tiff.TILE_LENGTH, tiff.SAMPLES, tiff.BITS, tiff.PLANAR})
_LENGTHS = frozenset({tiff.TILE_LENGTHS, tiff.STRIP_LENGTHS})  # libtiff takes either for tiles


def too_large_for_openslide(path: Path) -> str | None:
    """A phrase for a TIFF of tiles that OpenSlide may not get the memory for; None for any other file."""
    wanted = _SIZES | _LENGTHS | {_NDPI, tiff.SUB_DIRECTORIES}
    found = tiff.read_tiff(path, tags=wanted, limit=_MAX_DIRECTORIES)
    if found is None or (found.images and _NDPI in found.images[0]):
        return None
    if found.order == ">" and not found.big:  # OpenSlide does not read these; the TIFF reader checks each tile
        return None
    if not found.complete:
        return f"has more than {_MAX_DIRECTORIES} images"
    free = available_host_memory()
    most = _MOST if free is None else min(_MOST, free)
    for image in [*found.images, *(child for below in found.children for child in below)]:
        reason = _too_large(image, most)
        if reason is not None:
            return reason
    return None


def _too_large(image: tiff.Directory, most: int) -> str | None:
    width, height = image.number(tiff.TILE_WIDTH, 0), image.number(tiff.TILE_LENGTH, 0)
    if not (tiff.TILE_WIDTH in image or tiff.TILE_LENGTH in image):
        return None
    if image.unclear & (_SIZES | _LENGTHS):
        return "states the size of its tiles twice, or has too many of them"
    samples = image.number(tiff.SAMPLES, 1) if image.number(tiff.PLANAR, 1) == 1 else 1
    stored = samples * -(-max(image.numbers(tiff.BITS), default=1) // 8)
    size = width * height * max(_RGBA, stored)
    if size > most:
        return (
            f"states tiles of {width} x {height} pixels, {size / 1e9:.3g} GB each, which OpenSlide is not asked to "
            f"read (the limit is {most / 1e9:.3g} GB)"
        )
    longest = max(int(image.array(tag).astype("u8").max(initial=0)) for tag in _LENGTHS)
    if longest > most:
        return f"states a tile of {longest / 1e9:.3g} GB as it is stored (the limit is {most / 1e9:.3g} GB)"
    return None
