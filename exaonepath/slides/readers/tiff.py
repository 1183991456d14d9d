"""Reads TIFF files without OpenSlide: tiles and strips, pyramids in directories and in sub-directories (OME-TIFF).

It reads what OpenSlide does not, and it is the fast reader for tiles that OpenSlide does read (see `fast`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from exaonepath.errors import MemoryLimitError, SlideOpenError
from exaonepath.memory import available_host_memory
from exaonepath.slides import tiff
from exaonepath.slides.readers import depth
from exaonepath.slides.readers.base import SlideReader
from exaonepath.slides.readers.tiff_image import NotReadable, TiffImage, tiff_image
from exaonepath.slides.readers.tiff_tiles import Region, TiffTiles

logger = logging.getLogger(__name__)

_MAX_LEVELS = 64
_MEASURED_CELLS = 16
_REDUCED = 1  # bit of NewSubfileType: a smaller version of another image
_MICROMETRES = {2: 25_400.0, 3: 10_000.0}  # per unit of resolution: inch, centimetre
_APERIO = "Aperio"


class TiffReader(SlideReader):
    """A TIFF file that is decoded tile by tile.

    Level 0 is the image of the first directory; in an OME-TIFF, the largest one (an overview may come first). The other
    levels are its sub-directories, or else the directories that are marked as reduced; images of another shape (labels,
    overviews) are left out.

    Args:
        path: the file.
        properties: those of OpenSlide, if it opens the file too; others are read from the tags.

    Raises:
        SlideOpenError: the file is not such a TIFF; the message says why.
        MemoryLimitError: one tile or strip of it does not fit into the memory.
    """

    name = "tiff"

    def __init__(self, path: Path, properties: Mapping[str, str] | None = None) -> None:
        self.path = path
        found = tiff.read_tiff(path, tags=tiff.ALL_TAGS)
        if found is None or not found.images:
            raise SlideOpenError(f"{path} is not a TIFF with an image")
        number = main_image(found)
        first = found.images[number]
        try:
            images = list(_levels(found, number))
        except NotReadable as exc:
            raise SlideOpenError(f"{path} {exc}") from exc
        _check_memory(path, images)
        self.level_dimensions = tuple((image.width, image.height) for image in images)
        width, height = self.level_dimensions[0]
        self.scalar_downsamples = tuple((width / w + height / h) / 2 for w, h in self.level_dimensions)
        self.tiles = TiffTiles(path, images, None)
        # OpenSlide's properties are those of the first directory.
        self.properties = dict(properties if properties and not number else _properties(found, number))
        self.properties |= self._level_properties()
        if images[0].bits == 16:
            self._set_scale(first)
        if first.number(tiff.ORIENTATION, 1) not in (0, 1):
            logger.warning(
                "%s states a rotation (TIFF orientation %d), which is not applied: coordinates are those of the stored "
                "pixels", path, first.number(tiff.ORIENTATION, 1),
            )  # fmt: skip
        logger.info("%s: level 0 is %s", path, images[0].describe())

    def read_image(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """See `SlideReader.read_image`."""
        return self._region(location, level, size).image()

    def read_rgb(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[np.ndarray, float]:
        """See `SlideReader.read_rgb`."""
        region = self._region(location, level, size)
        return region.pixels, region.missing

    def tile_size(self, level: int) -> tuple[int, int] | None:
        """See `SlideReader.tile_size`."""
        image = self.tiles.images[level]
        return (image.cell_width, image.segment_height) if image.tiled else None

    def encoded_tile(self, level: int, column: int, row: int) -> bytes | None:
        """See `SlideReader.encoded_tile`."""
        return self.tiles.encoded(level, column, row)

    def set_cache_bytes(self, capacity: int) -> None:
        """See `SlideReader.set_cache_bytes`."""
        super().set_cache_bytes(capacity)
        self.tiles.cache.set_capacity(capacity)

    def close(self) -> None:
        """See `SlideReader.close`."""
        self.tiles.close()

    def _region(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Region:
        return self.tiles.region(level, *self.at_level(location, level), *size)

    def _level_properties(self) -> dict[str, str]:
        found = {"openslide.level-count": str(len(self.level_dimensions))}
        for level, (image, scale) in enumerate(zip(self.tiles.images, self.scalar_downsamples, strict=True)):
            name = f"openslide.level[{level}]"
            found |= {f"{name}.width": str(image.width), f"{name}.height": str(image.height)}
            found[f"{name}.downsample"] = repr(scale)
            # Also for strips: whoever reads a level in pieces has to know in which sizes it is decoded.
            found |= {f"{name}.tile-width": str(image.cell_width), f"{name}.tile-height": str(image.cell_height)}
        return found

    def _set_scale(self, first: tiff.Directory) -> None:
        stated = depth.stated_bits(first, self.properties, self.tiles.images[0].colours)
        if stated is None:
            largest = self.tiles.largest_value(len(self.level_dimensions) - 1, _MEASURED_CELLS)
            stated = depth.measured_bits(largest), f"its largest value found is {largest}; it does not state the bits"
        bits, source = stated
        self.tiles.scale = depth.scale_to_8_bits(bits)
        logger.warning(
            "%s has 16 bits a channel, read as %d significant bits (%s) and scaled to 8", self.path, bits, source
        )


def main_image(found: tiff.Tiff) -> int:
    """Number of the directory that holds level 0: the first, or in an OME-TIFF the first of the largest ones."""
    if "<OME" not in found.images[0].text(tiff.DESCRIPTION)[:4096]:
        return 0

    def size(number: int) -> int:
        image = found.images[number]
        reduced = image.number(tiff.SUBFILE_TYPE, 0) & _REDUCED
        return 0 if reduced else image.number(tiff.WIDTH, 0) * image.number(tiff.LENGTH, 0)

    return max(range(len(found.images)), key=size)


def _properties(found_tiff: tiff.Tiff, number: int) -> dict[str, str]:
    """What OpenSlide would state about a generic TIFF or an Aperio slide."""
    first = found_tiff.images[number]
    text = found_tiff.images[0].text(tiff.DESCRIPTION)
    found = {"openslide.vendor": "generic-tiff"}
    if text:
        found["tiff.ImageDescription"] = text
    if text.startswith(_APERIO):
        found["openslide.vendor"] = "aperio"
        for part in text.split("|")[1:]:
            name, equals, value = part.partition("=")
            if equals:
                found[f"aperio.{name.strip()}"] = value.strip()
        if "aperio.MPP" in found:
            # As OpenSlide does, which also takes a decimal comma.
            found["openslide.mpp-x"] = found["openslide.mpp-y"] = found["aperio.MPP"].replace(",", ".")
        if "aperio.AppMag" in found:
            found["openslide.objective-power"] = found["aperio.AppMag"]
        return found
    unit = _MICROMETRES.get(first.number(tiff.RESOLUTION_UNIT, 2))
    for axis, tag in (("x", tiff.X_RESOLUTION), ("y", tiff.Y_RESOLUTION)):
        resolution = first.ratio(tag)
        if unit and resolution:
            found[f"openslide.mpp-{axis}"] = repr(unit / resolution)
    return found


def _levels(found: tiff.Tiff, number: int) -> Iterator[TiffImage]:
    first = tiff_image(found.images[number], found.order)
    yield first
    # OME-TIFF keeps the smaller versions of an image in its sub-directories, other pyramids in further directories.
    candidates = found.children[number] if number < len(found.children) else []
    if not candidates:
        # Aperio's levels are all its tiled images; elsewhere a smaller version is marked as one.
        aperio = found.images[0].text(tiff.DESCRIPTION).startswith(_APERIO)
        others = found.images[number + 1 :]
        candidates = [image for image in others if aperio or image.number(tiff.SUBFILE_TYPE, 0) & _REDUCED]
    levels = []
    for directory in candidates[:_MAX_LEVELS]:
        try:
            image = tiff_image(directory, found.order)
        except NotReadable as exc:
            logger.info("a smaller version of the image %s; it is left out", exc)
            continue
        alike = (image.colour, image.bits, image.tiled) == (first.colour, first.bits, first.tiled)
        if alike and _same_shape(first, image):
            levels.append(image)
    levels.sort(key=lambda image: -image.width)
    last = first
    for image in levels:
        if image.width < last.width and image.height < last.height:
            yield image
            last = image


def _same_shape(first: TiffImage, image: TiffImage) -> bool:
    """Whether an image can be a smaller version of the first: the sides of a level are rounded by up to a pixel."""
    wide, high = first.width / image.width, first.height / image.height
    return abs(wide - high) <= max(wide, high) * 2 / min(image.width, image.height)


def _check_memory(path: Path, images: list[TiffImage]) -> None:
    free = available_host_memory()
    needed = max(2 * image.segment_bytes * image.planes + image.cell_bytes for image in images)
    if free is not None and needed > free:
        raise MemoryLimitError(
            f"{path}: a {'tile' if images[0].tiled else 'strip'} of it takes {needed / 1e9:.1f} GB to decode, and "
            f"{free / 1e9:.1f} GB are free; convert it to smaller tiles"
        )
