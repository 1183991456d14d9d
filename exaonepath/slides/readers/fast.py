"""A faster way to read what OpenSlide reads, used only after it gave the same bytes on samples of that very slide.

OpenSlide stays responsible for the slide: its levels, its properties, and every region that it would interpolate. The
TIFF reader serves regions whose pixels are copies of stored tiles.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
from PIL import Image

from exaonepath.errors import MissingDependencyError, SlideError
from exaonepath.slides import tiff
from exaonepath.slides.readers.base import SlideReader
from exaonepath.slides.readers.openslide import OpenSlideReader
from exaonepath.slides.readers.tiff_decode import image_codecs
from exaonepath.slides.readers.tiff_image import Codec, NotReadable, TiffImage, tiff_image
from exaonepath.slides.readers.tiff_tiles import Region, TiffTiles

logger = logging.getLogger(__name__)

# OpenSlide puts the tiles of other vendors together in ways of their own (overlaps, offsets, several areas).
VENDORS = ("aperio", "generic-tiff")
_CORNERS, _RICHEST, _SPREAD = 4, 4, 4  # tiles that are compared on level 0; on others, half of them
_ALWAYS = 2  # regions that are compared on every level: one at the border, and one in the interior
_MAX_DECODED = 1 << 23  # pixels that are decoded of level 0 for the others, at most, and half of it of each other level
_TRIED = 5  # samples that OpenSlide must fail to read before it is left out
_SIDE = 512  # of a compared region


class OnlyTiffReader(str):
    """A reason to read a file without OpenSlide."""

    __slots__ = ()


class FastReader(SlideReader):
    """Reads a slide through OpenSlide, and copies of stored tiles through the TIFF reader.

    Args:
        slide: the slide, opened through OpenSlide; closed with this reader.
        tiles: the images of the file that hold its levels.
        images: for each level, the image in `tiles`; None if OpenSlide reads that level.
    """

    name = "tiff"

    def __init__(self, slide: OpenSlideReader, tiles: TiffTiles, images: list[int | None]) -> None:
        self.path = slide.path
        self.slide, self.tiles, self._images = slide, tiles, images
        self.properties = slide.properties
        self.level_dimensions = slide.level_dimensions
        self.scalar_downsamples = slide.scalar_downsamples

    def read_image(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """See `SlideReader.read_image`; through the TIFF reader, unless OpenSlide would interpolate."""
        region = self._copied(location, level, size)
        return self.slide.read_image(location, level, size) if region is None else region.image()

    def read_rgb(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> tuple[np.ndarray, float]:
        """See `SlideReader.read_rgb`; through the TIFF reader, unless OpenSlide would interpolate."""
        region = self._copied(location, level, size)
        return self.slide.read_rgb(location, level, size) if region is None else (region.pixels, region.missing)

    def _copied(self, location: tuple[int, int], level: int, size: tuple[int, int]) -> Region | None:
        """A region whose pixels are those of stored tiles; None if OpenSlide would return something else."""
        if not 0 <= level < len(self._images):
            return None
        image = self._images[level]
        scale = self.scalar_downsamples[level]
        if image is None or location[0] % scale or location[1] % scale or min(size) <= 0:
            return None
        region = self.tiles.region(image, int(location[0] // scale), int(location[1] // scale), *size)
        if (region.empty and level) or (region.alpha is not None and self.tiles.images[image].alpha):
            # OpenSlide may fill a gap in a smaller level from another level, and it blends what is partly covered.
            return None
        return region

    def best_level(self, downsample: float) -> int:
        """See `SlideReader.best_level`."""
        return self.slide.best_level(downsample)

    def encoded_tile(self, level: int, column: int, row: int) -> bytes | None:
        """See `SlideReader.encoded_tile`."""
        image = self._images[level]
        return None if image is None else self.tiles.encoded(image, column, row)

    @property
    def cache_bytes(self) -> int:  # type: ignore[override]
        """Bytes of decoded tiles that are kept at most, by OpenSlide and by the TIFF reader each."""
        return self.slide.cache_bytes

    def set_cache_bytes(self, capacity: int) -> None:
        """See `SlideReader.set_cache_bytes`."""
        self.slide.set_cache_bytes(capacity)
        self.tiles.cache.set_capacity(capacity)

    @contextmanager
    def tile_cache(self, capacity: int) -> Iterator[None]:
        """See `SlideReader.tile_cache`."""
        before = self.cache_bytes
        with self.slide.tile_cache(capacity):
            self.tiles.cache.set_capacity(capacity)
            try:
                yield
            finally:
                self.tiles.cache.set_capacity(before)

    def close(self) -> None:
        """See `SlideReader.close`."""
        self.slide.close()
        self.tiles.close()


def fast_reader(slide: OpenSlideReader, *, compare: bool = True) -> FastReader | str:
    """The fast reader of a slide that OpenSlide has opened, if it gives the same bytes on samples.

    Args:
        slide: the slide.
        compare: False: use it without a comparison.

    Returns:
        The reader, or a phrase that says why it is not used: an `OnlyTiffReader` if OpenSlide reads none of the
        samples, and the TIFF reader does.
    """
    vendor = slide.properties.get("openslide.vendor")
    if vendor not in VENDORS:
        return f"tiles of the vendor {vendor} are put together by OpenSlide"
    found = tiff.read_tiff(slide.path, tags=tiff.ALL_TAGS)
    if found is None:
        return "the file is not a TIFF"
    chosen: list[TiffImage] = []
    numbers: list[int | None] = []
    why = ""
    for level in range(len(slide.level_dimensions)):
        image = _image_of_level(slide, level, found)
        if isinstance(image, str):
            why = why or f"level {level} {image}"
            numbers.append(None)
        else:
            numbers.append(len(chosen))
            chosen.append(image)
    if numbers[0] is None:
        return why
    try:
        image_codecs()
    except MissingDependencyError as exc:
        return str(exc)
    try:
        reader = FastReader(slide, TiffTiles(slide.path, chosen), numbers)
    except OSError as exc:
        return f"the file cannot be opened again ({exc})"
    reader.as_openslide = compare
    for level in range(len(numbers)) if compare else ():
        difference = _difference(reader, level)
        if difference is not None:
            reader.tiles.close()
            return difference
    return reader


def _image_of_level(slide: OpenSlideReader, level: int, found: tiff.Tiff) -> TiffImage | str:
    """The image that holds a level of OpenSlide's, or a phrase that says why none is known to."""
    scale = slide.scalar_downsamples[level]
    if scale != int(scale):
        return f"is {scale:g} times smaller, not a whole number"
    size, tile = slide.level_dimensions[level], slide.tile_size(level)
    fitting = [
        directory
        for directory in found.images
        if (directory.number(tiff.WIDTH, 0), directory.number(tiff.LENGTH, 0)) == size
        and (directory.number(tiff.TILE_WIDTH, 0), directory.number(tiff.TILE_LENGTH, 0)) == tile
    ]
    if len(fitting) != 1:
        return f"may be any of {len(fitting)} images of the file"
    try:
        image = tiff_image(fitting[0], found.order)
    except NotReadable as exc:
        return str(exc)
    if image.bits != 8:
        return "has 16 bits a channel"
    if fitting[0].number(tiff.ORIENTATION, 1) not in (0, 1):
        return "states a rotation"
    if image.samples in (2, 4) and image.alpha is None:
        return "has a channel of unknown meaning"
    return image


def _difference(reader: FastReader, level: int) -> str | None:
    """Where the two readers differ on samples of a level; None if they give the same bytes everywhere.

    A level that cannot be compared, as no sample has data, is read through OpenSlide from now on.
    """
    number = reader._images[level]
    if number is None:
        return None
    image, scale = reader.tiles.images[number], int(reader.scalar_downsamples[level])
    budget = _MAX_DECODED if level == 0 else _MAX_DECODED // 2
    decoded = compared = 0
    for at, (x, y, width, height) in enumerate(_samples(image, level)):
        if at >= _ALWAYS and decoded > budget:
            break
        decoded += image.cells_of(x, y, width, height) * image.cell_width * image.cell_height
        where = f"at {(x * scale, y * scale)}, level {level}"
        try:
            theirs = np.asarray(reader.slide.read_image((x * scale, y * scale), level, (width, height)))
        except SlideError as exc:
            if level == 0 and at == 0 and _only_ours(reader, image):
                return OnlyTiffReader(f"OpenSlide cannot read any of {_TRIED} samples ({exc})")
            return f"OpenSlide cannot read a sample {where} ({exc})"
        try:
            ours = reader.tiles.region(number, x, y, width, height)
        except SlideError as exc:
            return f"only OpenSlide can read a sample {where} ({exc})"
        if ours.empty and level:
            continue  # read through OpenSlide in any case
        compared += 1
        alpha = np.full(theirs.shape[:2], 255, np.uint8) if ours.alpha is None else ours.alpha
        if not (np.array_equal(theirs[..., :3], ours.pixels) and np.array_equal(theirs[..., 3], alpha)):
            return f"its pixels differ from OpenSlide's {where}"
    if not compared:
        logger.info("%s: level %d has no data in any sample; it is read through OpenSlide", reader.path, level)
        reader._images[level] = None
    return None


def _only_ours(reader: FastReader, image: TiffImage) -> bool:
    """Whether OpenSlide reads none of some samples of level 0, and the TIFF reader all of them.

    That is a limit of OpenSlide's, and no damage: a damaged tile is one of many. OpenSlide reads JPEG of every kind.
    """
    if image.codec is Codec.JPEG or reader.properties.get("openslide.vendor") != "generic-tiff":
        return False
    if image.columns * image.segment_rows == 1 and image.codec is not Codec.NONE:
        return False
    for x, y, width, height in islice(_samples(image, 0), _TRIED):
        try:
            reader.tiles.region(0, x, y, width, height)
        except SlideError:
            return False
        try:
            reader.slide.read_image((x, y), 0, (width, height))
        except SlideError:
            continue
        return False
    return True


def _samples(image: TiffImage, level: int) -> Iterator[tuple[int, int, int, int]]:
    """Regions of an image to compare, (x, y, width, height): the same ones each time, the most important ones first.

    A region beyond the border; the tile with the most bytes (tissue, not empty glass); a region on several tiles; more
    tiles with many bytes; tiles at the corners; and some that are spread over the image. Of large tiles, only the
    beginning is compared.
    """
    columns, rows = image.columns, image.segment_rows
    share = 1 if level == 0 else 2
    lengths = image.lengths[: columns * rows]
    width, height = min(_SIDE, image.cell_width), min(_SIDE, image.cell_height)
    small = image.cell_width * image.cell_height <= _MAX_DECODED // 4
    left, top = image.width - width // 2 - 1, image.height - height // 2 - 1
    if not small:  # of one tile only
        left, top = max(left, (columns - 1) * image.cell_width), max(top, (rows - 1) * image.cell_height)
    yield left, top, width, height
    busiest = int(np.argmax(lengths))
    x, y = busiest % columns * image.cell_width, busiest // columns * image.cell_height
    yield x, y, width, height
    if small:
        yield max(0, x - width // 2), max(0, y - height // 2), width, height
    most = _RICHEST // share
    richest = np.argpartition(-lengths, most - 1)[:most] if len(lengths) > most else np.arange(len(lengths))
    corners = [0, columns * rows - 1, columns - 1, columns * (rows - 1)][: _CORNERS // share]
    spread = [columns * rows * (2 * i + 1) // (2 * _SPREAD) for i in range(_SPREAD // share)]
    others = dict.fromkeys([*map(int, np.sort(richest)), *corners, *spread])
    for index in (index for index in others if index != busiest):
        yield index % columns * image.cell_width, index // columns * image.cell_height, width, height
